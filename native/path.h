/*
 * path.h - where a worker's commands go: the C mirror of the Port seam.
 *
 * A command knows nothing of virtio: a CDB, iovecs, an expected length, a nexus.
 * A path takes it to its medium or device.  One engine of a kind (an io_uring, a
 * thread pool, later an sg reactor) exists per worker and is shared by its paths.
 *
 * Ownership: from VFC_QUEUED until reap() returns it, the path owns the command.
 * Bounded stop: cancel() asks; what does not come back is abandoned.  abandon()
 * says whether the command may be answered now: it may, when nothing can write to
 * the guest's memory (or read it late) any more, because the data was bounced.
 */
#ifndef VFC_PATH_H
#define VFC_PATH_H
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "latch.h"
#include "vhostfc.h"

enum vfc_submit {
	VFC_DONE = 0,		/* finished; ->error tells how */
	VFC_QUEUED = 1,		/* reap() will return it */
	VFC_BUSY = 2,		/* a latch or a limit: park it, try again */
};

#define VFC_NO_SLOT (-1)

enum vfc_op { VFC_OP_READ, VFC_OP_WRITE, VFC_OP_FLUSH };

struct vfc_path_ops;
struct bounce;

/* The one engine of a kind that a worker has; each kind embeds it first. */
struct vfc_path_engine {
	const struct vfc_path_ops *ops;
	bool unsent;	/* flush() could not hand over all, and nobody will say when it can: it is to be asked again */
};

/* A word of the latch that I/O of this path holds together. */
struct vfc_holders {
	struct bounce *first;	/* of what is under way */
	uint16_t count;		/* of it */
	uint16_t ever;		/* since the word was taken: others want it as well, one day */
};

/* First come, first served. */
struct bounce_list {
	struct bounce *first, *last;
};

/* Where one route leads; embedded in the route. */
struct vfc_path {
	struct vfc_path_engine *engine;
	struct vfc_medium *medium;
	uint32_t nexus, epoch;
	struct vfc_redo redo;	/* for writes to memory */
	struct vfc_holders *holders;	/* by word, made when the first is needed */
	uint16_t pass, passed;	/* reads that do not ask the page cache first: so many, and how many did not */
	int32_t slot;		/* the engine's own: 0 nothing was tried yet, VFC_NO_SLOT */
	bool writing;		/* a crew's: one of its threads writes, or is to, */
	struct bounce_list writes;	/* and then these */
	uint32_t busy;		/* operations that may still touch the medium, abandoned ones included; the engine counts */
	void *own;		/* the engine's, from open() to close() */
};

/* How a device ended a command that went to it as it was. */
struct vfc_result {
	uint8_t response;	/* virtio-scsi */
	uint8_t status;		/* SAM */
	uint8_t sense_length;
	bool refused;		/* it has not begun, or nobody knows: nothing was moved */
	bool kept;		/* answered without the device, which may still run it */
	uint32_t residual;
	uint32_t moved;		/* bytes of data-in */
	const uint8_t *sense;
};

/* What a path sees of a command; embedded in the ring's pool entry. */
struct vfc_cmd {
	struct vfc_path *path;
	uint8_t op;		/* enum vfc_op */
	bool fua;
	uint16_t cdb_length;
	const uint8_t *cdb;
	uint64_t lba;
	uint32_t blocks;
	uint32_t iov_count;
	struct iovec *iov;	/* guest memory, data-in or data-out */
	uint64_t length;	/* bytes = sum of iov */
	int error;		/* 0 or -errno once finished */
	uint32_t holder;	/* VFC_BUSY: who has the latch; 0: a limit was met */
	uint64_t done;		/* 0 on its first submit; of a parked one bytes moved already, or (sg) until when it may wait */
	void *priv;		/* the path's own */
	const struct vfc_result *result;	/* once finished; NULL: ->error tells all.  Good until the next submit() */
};

struct vfc_path_ops {
	const char *name;
	/* what is abandoned may still run: who only wants a command ended waits for it, who has to leave does not */
	bool runs_on;
	/* a path begins and ends, with nothing under way; NULL: nothing to be done.  0 or -errno */
	int (*open)(struct vfc_path_engine *engine, struct vfc_path *path, uint32_t worker);
	void (*close)(struct vfc_path_engine *engine, struct vfc_path *path);
	/* VFC_DONE, VFC_QUEUED or VFC_BUSY */
	enum vfc_submit (*submit)(struct vfc_path_engine *engine, struct vfc_cmd *cmd);
	/* hand what submit() gathered to the kernel; once a batch */
	void (*flush)(struct vfc_path_engine *engine);
	/* up to max finished commands */
	unsigned (*reap)(struct vfc_path_engine *engine, struct vfc_cmd **done, unsigned max);
	void (*cancel)(struct vfc_path_engine *engine, struct vfc_cmd *cmd);
	/* true: the guest's memory is out of reach, the command may be answered; the path forgets it */
	bool (*abandon)(struct vfc_path_engine *engine, struct vfc_cmd *cmd);
	/* readable when reap() has something; -1 if it never has */
	int (*wait_fd)(struct vfc_path_engine *engine);
	/* nothing is under way, not even what was abandoned: the engine may be freed */
	bool (*idle)(struct vfc_path_engine *engine);
	/* NULL, or: this path goes; nothing is under way on it */
	void (*leave)(struct vfc_path_engine *engine, struct vfc_path *path);
};

#endif
