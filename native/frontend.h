/*
 * frontend.h - the driver's side of a request ring: a load generator.
 *
 * What a guest's virtio-scsi driver does, as fast as one thread can: it keeps `depth`
 * READs and WRITEs in flight on one ring, times them, and, if asked, proves that every
 * block that comes back is one that was written (`vfd_table`).  Python sets the ring up,
 * lends it to vfd_run() for the time of the call, and gets it back empty; one thread
 * drives one ring.
 *
 * This is the other side of vhostfc.h and shares nothing with it but the language: it is
 * the witness against the engine, so it is written from the standard (virtio 1.3: 2.7 split
 * virtqueues, 2.8 packed ones, 5.6 SCSI host device) and not from the engine.
 *
 * As in vhostfc.h: functions return 0 or -errno and print nothing; what the device
 * does wrong is counted, and the first instance of it is kept whole.
 */
#ifndef VHOSTFC_FRONTEND_H
#define VHOSTFC_FRONTEND_H
#include <stdint.h>
/* ---- cffi reads from here ---- */

/* A full memory barrier, for the rings that Python drives itself. */
void vfd_fence(void);

/* ---------------------------------------------------------------- what the blocks should hold */

/*
 * The generations of a range of a unit's blocks: what has certainly been written (low) and
 * what may have been (high).  Shared by all rings that load the same unit.  A block has at
 * most one write of ours in flight; reads race with writes freely, since a logical block is
 * atomic: what is read must be whole, and of a generation in [low at submission, high at completion].
 */
struct vfd_table;

/* -EINVAL: no blocks, or their end wraps; -ENOMEM. */
int vfd_table_new(uint64_t first, uint64_t blocks, struct vfd_table **ret_table);
void vfd_table_free(struct vfd_table *table);

/* What each 32 bytes of a written block hold; host-endian, since only this side reads it. */
struct vfd_tag {
	uint64_t run;		/* the run that wrote it, see vfd_job.run */
	uint64_t lba;
	uint32_t generation;
	uint16_t writer;	/* the adapter that wrote it */
	uint16_t unit;
	uint64_t place;		/* which 32 bytes of the block */
};

/* ---------------------------------------------------------------- the ring and the job */

#define VFD_EVENT_IDX 1		/* VIRTIO_F_EVENT_IDX was negotiated */
#define VFD_INDIRECT 2		/* VIRTIO_F_INDIRECT_DESC was negotiated */

#define VFD_PACKED 4		/* VIRTIO_F_RING_PACKED was negotiated */

/*
 * A ring as mapped here, and memory for the requests; the indices go in and come out.  Of a packed ring desc is the
 * descriptor ring, avail and used are the driver's and the device's event suppression areas, and the indices have the
 * wrap counter in bit 15.
 */
struct vfd_ring {
	uint8_t *desc;
	uint8_t *avail;
	uint8_t *used;
	uint8_t *arena;		/* vfd_arena_size() bytes */
	uint64_t arena_gpa;	/* where the device finds the arena */
	uint64_t arena_size;
	uint32_t size;		/* entries */
	uint32_t flags;		/* VFD_EVENT_IDX, VFD_INDIRECT, VFD_PACKED */
	int32_t kick_fd;
	int32_t call_fd;
	uint16_t avail_index;	/* the next entry of the avail ring, or descriptor to be made available */
	uint16_t used_index;	/* the next entry of the used ring, or descriptor to be used */
	uint32_t pad;
};

#define VFD_RANDOM 1		/* else sequential, and round again */
#define VFD_POLL 2		/* spin on the used ring; else wait for the call eventfd */
#define VFD_VERIFY 4		/* tag what is written, check what is read */
#define VFD_SHARED 8		/* others write these blocks too: their tags are as good as ours */
#define VFD_NO_RETRY 16		/* unit attentions, BUSY, RESET: count them as errors */
#define VFD_FUA 32		/* force unit access on writes */
/*
 * The null path: nobody is behind the ring, this very thread answers each command at once with GOOD.  What a command
 * costs then is the generator's own.
 */
#define VFD_NULL 64

struct vfd_job {
	uint8_t lun[8];		/* as virtio-scsi wants it */
	uint64_t first;		/* first block of the range */
	uint64_t blocks;	/* blocks in it */
	uint32_t block_size;	/* bytes */
	uint32_t io_size;	/* bytes of a command, a multiple of block_size */
	uint32_t segment;	/* bytes of a data descriptor, 0: one descriptor a command */
	uint32_t depth;		/* commands in flight */
	uint32_t read_percent;	/* 0 .. 100 */
	uint32_t flags;
	uint64_t seed;
	uint64_t warmup_ns;	/* not measured */
	uint64_t duration_ns;	/* measured; 0: until max_commands or stop */
	uint64_t max_commands;	/* measured ones; 0: no limit */
	uint64_t stall_ns;	/* in flight, and nothing comes back for so long: -ETIMEDOUT */
	uint64_t run;		/* VERIFY: tells this run's blocks from all else; not 0 */
	uint16_t writer;	/* VERIFY */
	uint16_t unit;		/* VERIFY */
	uint32_t pad;
	struct vfd_table *table;	/* VERIFY: covers the range */
	const uint32_t *stop;	/* one of VFD_STOP_*, set at any time by another thread; may be NULL */
};

#define VFD_STOP 1		/* issue nothing more, return when all has come back */
#define VFD_STOP_NOW 2		/* return at once: the device is gone */

/* Bytes of arena that this job wants of a ring with these flags; 0 when the job is nonsense. */
uint64_t vfd_arena_size(const struct vfd_job *job, uint32_t ring_flags);
/* The most commands that a ring holds at a time. */
uint32_t vfd_max_depth(const struct vfd_job *job, uint32_t ring_size, uint32_t ring_flags);

/* ---------------------------------------------------------------- what happened */

enum vfd_kind {
	VFD_OK = 0,
	VFD_BAD_USED,		/* used ring: an id that was not given, or the index ran ahead */
	VFD_BAD_LENGTH,		/* used length is not what was written */
	VFD_BAD_RESPONSE,	/* virtio-scsi response other than OK */
	VFD_BAD_STATUS,		/* SCSI status other than GOOD */
	VFD_BAD_RESIDUAL,	/* GOOD, but not all was moved; or sense length out of bounds */
	VFD_TORN,		/* a block that is not one write's */
	VFD_MISPLACED,		/* this run's, but another block's or unit's */
	VFD_STALE,		/* an older generation than the one that was written */
	VFD_FUTURE,		/* a generation that nobody wrote yet */
	VFD_KINDS
};

/* The first failure, in full. */
struct vfd_failure {
	uint32_t kind;		/* enum vfd_kind; VFD_OK: there was none */
	uint32_t write;		/* 1: of a WRITE */
	uint64_t lba;		/* the command's, or the block's for what verification finds */
	uint32_t blocks;
	uint32_t low, high;	/* generations that would have been right */
	uint32_t used_id, used_length;
	uint8_t cdb[16];
	uint8_t response[108];	/* struct virtio_scsi_cmd_resp with 96 bytes of sense */
	struct vfd_tag found;	/* the tag that shows the fault */
};

#define VFD_BUCKETS 2560	/* 40 octaves of 64: nanoseconds, up to hours */

struct vfd_side {		/* of reads [0] and writes [1] */
	uint64_t commands;
	uint64_t bytes;
	uint64_t latency_sum;	/* ns */
	uint64_t latency_min, latency_max;
	uint64_t histogram[VFD_BUCKETS];
};

struct vfd_result {
	struct vfd_side side[2];
	uint64_t elapsed_ns;	/* of the measured part */
	uint64_t cpu_ns;	/* of this thread in the measured part */
	uint64_t errors;	/* commands that ended badly, warm-up included */
	uint64_t kinds[VFD_KINDS];
	uint64_t responses[16];	/* by virtio-scsi response; [15]: higher ones */
	uint64_t statuses[256];	/* by SCSI status, where the response was OK */
	uint64_t retries;
	uint64_t verified;	/* blocks that were checked against their generation */
	uint64_t unknown;	/* blocks read that no run of ours wrote yet */
	uint64_t kicks;
	uint64_t waits;		/* times this thread slept */
	uint32_t in_flight;	/* commands that did not come back before an error return */
	uint32_t pad;
	struct vfd_failure first;
};

/* The lower bound of a bucket, ns. */
uint64_t vfd_bucket_floor(uint32_t bucket);

/*
 * Run the job.  -EINVAL: a field is nonsense, the arena too small, or the depth beyond
 * vfd_max_depth(); -ETIMEDOUT: see stall_ns; -ECANCELED: VFD_STOP_NOW; -EPROTO: the used ring is
 * nonsense, nothing more can be known.  After these three the ring must be stopped before its memory
 * is used again.
 */
int vfd_run(struct vfd_ring *ring, const struct vfd_job *job, struct vfd_result *ret_result);

/* ---------------------------------------------------------------- what is not the back end's */

/* Nanoseconds of CPU of `count` copies of `bytes` each, from random places of `from` to the places of `to` in turn. */
uint64_t vfd_copy(uint8_t *to, uint64_t to_size, const uint8_t *from, uint64_t from_size, uint64_t bytes, uint64_t count,
		  uint64_t seed);

/* ---- cffi reads to here ---- */
#endif
