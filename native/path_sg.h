/*
 * path_sg.h - what path_sg.c (commands on their way out, beginning and end) and path_sg_reap.c (their ends) share.
 */
#ifndef VFC_PATH_SG_H
#define VFC_PATH_SG_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "path.h"
#include "sg.h"

#define SG_TICK_NS 1000000000l	/* between looks at what is late */
#define SG_HASTE_NS 5000000l	/* the same while a device is on its way out */

struct stream;

struct slot {
	struct stream *stream;
	struct vfc_cmd *cmd;	/* NULL while under way: abandoned */
	bool under_way;
	bool in;		/* data-in */
	bool doubtful;		/* given back with an error that is looked into once more */
	uint64_t deadline;	/* ns */
	uint8_t *buffer;
	size_t room;
	uint8_t cdb[32];
	uint8_t sense[VFC_SG_SENSE];
	struct vfc_result result;
	struct slot *next;	/* free */
};

struct stream {
	struct lane *lane;
	int fd;
	bool hung;		/* the device is being removed: looked after by the timer */
	bool gone;		/* nothing will come any more */
	uint32_t under_way;
	struct slot *free;
	struct slot slots[VFC_SG_QUEUE];
};

struct lane {
	struct vfc_medium *medium;	/* held */
	struct sg_unit *unit;
	struct lane *next, **link;
	uint32_t users;		/* routes: a new one over the same files begins before the old one has ended */
	uint32_t under_way, kept;	/* of all its files; kept: nobody waits for it any more */
	uint32_t count, turn;
	struct stream streams[];
};

struct spare {
	struct spare *next;
};

struct sg {
	struct vfc_path_engine base;
	struct spare *spares;	/* of SMALL bytes */
	uint32_t kept;
	int epoll_fd, timer_fd;
	bool ticking, hasty;
	bool leaving;		/* a lane without users waits for the kernel */
	uint32_t under_way, doubts;
	size_t bytes, kept_bytes;
	struct lane *lanes;
};

static inline struct sg *sg_of(struct vfc_path_engine *engine)
{
	return (struct sg *)engine;	/* its first member */
}

/* path_sg.c */
void sg_release(struct sg *sg, struct slot *slot);
/* Ends lanes that no route leads to, as far as the kernel has nothing of them. */
void sg_end_lanes(struct sg *sg);

/* path_sg_reap.c */
void sg_tick_after(struct sg *sg, long ns);
void sg_tick_no_more(struct sg *sg);
/* Nobody waits for it any more; the kernel has it still. */
void sg_let_go(struct sg *sg, struct slot *slot);
unsigned sg_reap(struct vfc_path_engine *engine, struct vfc_cmd **done, unsigned max);

#endif
