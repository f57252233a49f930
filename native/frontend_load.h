/*
 * frontend_load.h - a load while it runs, for the files that make it up:
 *
 *	frontend.c          what a load may be, and its run from the first command to the last
 *	frontend_command.c  choosing, building and sending commands
 *	frontend_answer.c   what comes back: judged, verified, counted
 *	frontend_ring.c     the virtqueue that both go through
 *	frontend_table.c    what each block should hold
 *	frontend_null.c     a device that does nothing, to know what all of this costs
 *
 * A slot is a command's place: its header, response, descriptors and data never move, so a command costs no
 * allocation and the used ring's id tells its slot.
 */
#ifndef VHOSTFC_FRONTEND_LOAD_H
#define VHOSTFC_FRONTEND_LOAD_H
#include <time.h>

#include "frontend_ring.h"
#include "frontend_table.h"

/* virtio 5.6.6.1: struct virtio_scsi_req_cmd with cdb_size 32 and sense_size 96 */
#define REQUEST_BYTES 51
#define RESPONSE_BYTES 108
#define RESPONSE_SENSE 12	/* what comes before it is looked at each time */
/* Where the parts of a slot's head lie, in bytes. */
#define HEAD_RESPONSE 64
#define HEAD_TABLE 192
#define RETRY_NS 3000000	/* a busy device gets as long as Linux gives it */

struct slot {
	uint64_t lba;
	uint64_t issued;	/* ns */
	uint32_t *generations;	/* per block: to be written, or the low ones of a read */
	bool busy;
	bool write;
	bool built, built_write;	/* what its chain and header were made for */
};

struct load {
	struct vfd_ring *ring;
	struct lane lane;
	struct null null;	/* VFD_NULL */
	const struct vfd_job *job;
	struct vfd_result *out;
	struct piece *chain;	/* to build one */
	struct slot *slots;
	uint32_t *free;		/* a stack of slots */
	uint32_t free_count;
	uint32_t *again;	/* slots to send again */
	uint32_t again_count;
	uint32_t segments;
	uint32_t io_blocks;
	uint64_t head_stride, data_stride, data_start;
	uint64_t positions, position;
	uint64_t random;
	uint64_t budget;	/* commands that may still be issued */
	uint32_t in_flight;
	uint32_t sent;
	bool measuring;
	bool stalled_claim;	/* every position tried is being written */
	uint64_t start, began, cpu;	/* ns */
	uint64_t again_at;	/* ns: not before */
	uint64_t now;
	uint64_t last_progress;
};

static inline uint64_t now_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline uint8_t *slot_head(const struct load *l, uint32_t slot)
{
	return l->ring->arena + slot * l->head_stride;
}

static inline uint8_t *slot_data(const struct load *l, uint32_t slot)
{
	return l->ring->arena + l->data_start + slot * l->data_stride;
}

/* frontend_command.c */
/* SBC-3 5.10, 5.12, 5.29, 5.31: the 10-byte form while the numbers fit */
void load_cdb(const struct load *l, uint8_t cdb[16], const struct slot *s);
/* As many commands as there are slots and budget. */
void load_issue(struct load *l);

/* frontend_answer.c */
/* What the device has used; how many, or -EPROTO. */
int load_reap(struct load *l);

#endif
