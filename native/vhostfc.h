/*
 * vhostfc.h - all that Python sees of the data path.
 *
 * The C compiler and cffi read this one file, so below the line it holds plain
 * declarations only: no conditionals, no includes, no macros but numbers.
 *
 * The data path is an *engine*: one virtual adapter's worker threads.  A worker
 * owns its rings, their command pools and its copies of the tables; nothing on
 * the path of an I/O takes a lock.  Python and a worker talk by messages:
 *
 *	vfc_post()      Python -> worker   a message; answered by exactly one VFC_EVENT_ACK with its seq
 *	vfc_next()      worker -> Python   acks, and what the worker will not decide itself (punts)
 *	vfc_reply()     Python -> worker   the answer to a punt
 *
 * vfc_fd(engine, worker) becomes readable when vfc_next() has something to say.
 * C never calls Python.  Functions return 0 (or what they document) or -errno and
 * print nothing.  What a guest can cause is a value: a response, a counter, an event.
 *
 * A pointer passed in is only borrowed for the call unless "takes" is said; an fd
 * is always dup'ed.  All structures are host-endian.
 */
#ifndef VHOSTFC_H
#define VHOSTFC_H
#include <stdint.h>
/* ---- cffi reads from here ---- */

#define VFC_CDB_MAX 260		/* longest CDB, SPC-4 4.2.3 */
#define VFC_SENSE_MAX 252	/* longest sense data, SPC-4 4.5 */
#define VFC_CONTROL_MAX 64	/* readable bytes of a control request that are kept */
#define VFC_MAX_RINGS 256	/* vhost-user: the ring index is a byte */

/* ---------------------------------------------------------------- guest memory */

/*
 * A mapping of one region of guest memory, and a table of them.  Both are counted:
 * *_put() drops the caller's hold; a region is unmapped when neither a table nor a
 * command in flight needs it.  A page that its file no longer backs (SIGBUS) reads as
 * zeros from then on, the table is marked torn, and commands that touch the region fail.
 */
struct vfc_map;
struct vfc_mem;

/* -EINVAL: size 0, or gpa/uaddr/offset + size wraps; -EFBIG: larger than its file; else mmap's errno. */
int vfc_map_new(int fd, uint64_t gpa, uint64_t size, uint64_t uaddr, uint64_t offset, struct vfc_map **ret_map);
void vfc_map_put(struct vfc_map *map);
/* -EINVAL: regions overlap in gpa or in uaddr. */
int vfc_mem_new(struct vfc_map *const *maps, uint32_t n, struct vfc_mem **ret_mem);
void vfc_mem_put(struct vfc_mem *mem);
/* 1 if [uaddr, uaddr+size) lies in one region, else 0. */
int vfc_mem_covers(const struct vfc_mem *mem, uint64_t uaddr, uint64_t size);

/* ---------------------------------------------------------------- range latch */

/*
 * Per-block atomicity between every process that has a unit open: an array of words in a
 * shared memfd, one per stripe of the medium; a word holds its owner.  Reads and writes
 * alike take the stripes they touch.  Nobody blocks on a word: a command that cannot take
 * one is parked and tried again.  Owner 1 is the fabric, others are numbered by it; the
 * fabric frees a dead owner's words once that process and its I/O are gone.
 *
 * Memory is written by plain stores, so a writer that is killed leaves half a block.  Behind
 * the words each writer has a place for what it is about to write; see vfc_latch_redo().
 */
struct vfc_latch;
#define VFC_LATCH_BYTES 33656832	/* the memfd's size: words, places, and their data, sparse; a page for the count of losses */
#define VFC_LATCH_WORDS 16384
#define VFC_LATCH_PLACES 512
#define VFC_LATCH_STRIPE 65536	/* bytes of medium that share a word; stripes share words modulo the table */

int vfc_latch_open(int fd, struct vfc_latch **ret_latch);
void vfc_latch_put(struct vfc_latch *latch);
/* 0 taken all, -EAGAIN and *ret_holder (may be NULL) when somebody has one of them (nothing is kept then) */
int vfc_latch_take(struct vfc_latch *latch, uint32_t owner, uint64_t offset, uint64_t length, uint32_t *ret_holder);
void vfc_latch_free(struct vfc_latch *latch, uint32_t owner, uint64_t offset, uint64_t length);
/*
 * Finish what this owner, which is dead, had begun to write to the memory in fd, and give back its places.  Before its
 * words are freed.  owner 0: what any owner had, when all are dead.  How many copies that were, or -errno: do it again.
 */
int vfc_latch_redo(struct vfc_latch *latch, uint32_t owner, int fd);
/* Free every word that this owner holds; returns how many. */
int vfc_latch_recover(struct vfc_latch *latch, uint32_t owner);

/*
 * Losses: how often the host could not write back what it had in its cache for this unit.  Linux says so once for each
 * open file description, and never to one that was opened after somebody was told; but everybody may have had data
 * there.  So whoever is told counts it here, and a SYNCHRONIZE CACHE is GOOD only where nothing was counted since the
 * nexus last heard of it.
 *
 * The high half counts losses, the low half doubts: somebody's call failed, and whether something was lost that was
 * not counted yet only the fabric can tell, by its own description, which is as old as the unit.
 */
uint64_t vfc_latch_losses(const struct vfc_latch *latch);
/* A call that syncs has failed on a description that is as new as this count; returns the count that came of it. */
uint64_t vfc_latch_lost(struct vfc_latch *latch, uint64_t known);
/* A call that moves data and syncs has failed: because of either. */
uint64_t vfc_latch_doubt(struct vfc_latch *latch);

/* ---------------------------------------------------------------- media */

/* What a unit's blocks are kept in, as one process sees it.  Counted; a route keeps its own hold. */
struct vfc_medium;

enum vfc_medium_kind {
	VFC_MEDIUM_MEMORY = 1,	/* fd is mapped; one copy moves the data */
	VFC_MEDIUM_FILE = 2,	/* file or block device through the page cache */
	VFC_MEDIUM_DIRECT = 3,	/* the same with O_DIRECT; fd was opened so */
	VFC_MEDIUM_NULL = 4,	/* no fd; reads give zeros only where asked, moves no data */
	VFC_MEDIUM_SG = 5	/* /dev/sgN, made by vfc_sg_medium_new(): takes commands, not blocks */
};

struct vfc_medium_setup {
	int32_t fd;
	int32_t latch_fd;	/* -1: no latch (VFC_MEDIUM_NULL) */
	uint32_t kind;
	uint32_t owner;		/* this nexus in the latch */
	uint32_t block_size;	/* bytes, power of two, >= 512 */
	uint32_t pad;
	uint64_t blocks;
	uint64_t losses;	/* the count up to which the nexus knows of them; with another one the fabric has to answer */
};

int vfc_medium_new(const struct vfc_medium_setup *setup, struct vfc_medium **ret_medium);
void vfc_medium_put(struct vfc_medium *medium);

/* ---------------------------------------------------------------- engine */

struct vfc_engine;

struct vfc_engine_setup {
	uint32_t workers;		/* 1 .. 64 */
	uint32_t flags;			/* VFC_ENGINE_* */
	uint32_t max_punts;		/* ration: punted commands at a time, then TASK SET FULL */
	uint32_t max_transfer;		/* bytes; a command that moves more is punted */
	uint64_t max_punt_bytes;	/* ration: bytes of punted data, out and in, at a time */
	uint32_t poll_us;		/* a ring is polled for so long after its last command, at most; 0: never */
	uint32_t pad;
};
#define VFC_ENGINE_NO_URING 1	/* pretend that io_uring is denied */

/* Starts the threads. */
int vfc_engine_new(const struct vfc_engine_setup *setup, struct vfc_engine **ret_engine);
/*
 * Stops and joins the threads, then frees paths, rings and memory in that order.
 * -ETIMEDOUT: a thread did not stop in grace_ms; nothing was freed, the process must exit.
 */
int vfc_engine_free(struct vfc_engine *engine, uint32_t grace_ms);
int vfc_fd(struct vfc_engine *engine, uint32_t worker);
/* Keeps the worker's thread on one CPU; -EINVAL: there is no such worker, or no such CPU for this process. */
int vfc_pin(struct vfc_engine *engine, uint32_t worker, uint32_t cpu);
/* 1 where the worker's file media go through io_uring, 0 where a pool of threads does the work */
int vfc_uses_uring(struct vfc_engine *engine);

enum vfc_msg_kind {
	VFC_MSG_PING = 1,	/* acked at once: the data path answers */
	VFC_MSG_MEM,		/* mem: the table from now on; acked when no command uses the old one */
	VFC_MSG_RING_START,	/* ring: start it; acked with 0, or -EFAULT when a part is outside memory */
	VFC_MSG_RING_ENABLE,	/* index, value 0/1; enabling always looks at the ring (a kick may be past) */
	VFC_MSG_RING_CALL,	/* index, fd (-1 none): the call eventfd; a new one is written once */
	VFC_MSG_RING_ERR,	/* index, fd (-1 none) */
	VFC_MSG_RING_STOP,	/* index, value = drain time in ms; acked with value = its position, as `base` has it */
	VFC_MSG_TARGET,		/* index = target, value 0/1: 0 answers BAD_TARGET, 1 punts what has no route */
	VFC_MSG_ROUTE,		/* route: acked when nothing admitted under the old one can touch the medium */
	/*
	 * match: complete in-flight commands with .response; acked with the count.  -ETIMEDOUT, and the count: of these,
	 * some had to be answered while their device has them still
	 */
	VFC_MSG_ABORT,
	VFC_MSG_QUERY,		/* match: acked with the count of in-flight commands */
	VFC_MSG_EVENT,		/* event: put it into an event buffer; acked with 1, or 0 when there is no buffer */
	VFC_MSG_RESET,		/* drop all rings' state (RESET_DEVICE); rings are stopped already */
	/*
	 * index, worker = where to, value = ms: a started request ring goes to another worker as soon as nothing of it is in
	 * flight.  Acked by that one; or by this one, and the ring stays and goes on: -ETIMEDOUT something still is,
	 * -ECANCELED it is stopped, -EBUSY it stops or moves already, -EINVAL there is no such ring or worker
	 */
	VFC_MSG_RING_MOVE
};

enum vfc_ring_role { VFC_RING_CONTROL = 0, VFC_RING_EVENT = 1, VFC_RING_REQUEST = 2 };

struct vfc_ring_setup {
	uint32_t role;
	uint32_t size;		/* entries */
	uint64_t desc, avail, used;	/* user addresses */
	uint64_t features;	/* virtio bits as acknowledged */
	uint32_t base;		/* as SET_VRING_BASE gives it: next avail index; of a packed ring both and wrap counters */
	int32_t kick_fd;	/* -1: poll */
	int32_t call_fd;	/* -1: no interrupts */
	int32_t err_fd;
};

#define VFC_ROUTE_GONE 1	/* no such route any more: what comes is punted (target there) */
#define VFC_ROUTE_READ_ONLY 2

/* What commands under way end with: as the medium ends them, RESET, or status TASK ABORTED. */
enum vfc_in_flight { VFC_FINISH = 0, VFC_ABORT_RESET = 1, VFC_ABORT_ABORTED = 2 };

/* Where (target, lun) leads.  mask: bit n of byte n/8 is opcode n: C may run it, all else is punted. */
struct vfc_route {
	uint8_t target;
	uint8_t in_flight;	/* enum vfc_in_flight: what becomes of commands under the old route */
	uint16_t lun;
	uint32_t flags;
	uint32_t nexus;		/* handle of the I_T_L nexus */
	uint32_t epoch;
	uint8_t mask[32];
	struct vfc_medium *medium;	/* NULL: everything is punted */
};

#define VFC_MATCH_TAG 1
#define VFC_MATCH_LUN 2		/* without it: all LUNs of the target */
#define VFC_MATCH_TARGET 4	/* without it: everything */
#define VFC_MATCH_HELD 8	/* only those that have not begun, because of a task attribute */

struct vfc_match {
	uint8_t target;
	uint8_t response;	/* virtio-scsi response for VFC_MSG_ABORT */
	uint16_t lun;
	uint32_t flags;
	uint64_t tag;
};

struct vfc_msg {
	uint64_t seq;		/* chosen by the caller, comes back in the ack */
	uint32_t kind;
	uint32_t index;		/* ring, or target */
	int32_t fd;
	uint32_t value;
	uint32_t worker;
	uint32_t pad;
	struct vfc_mem *mem;
	struct vfc_ring_setup ring;
	struct vfc_route route;
	struct vfc_match match;
	uint8_t event[16];	/* struct virtio_scsi_event as the guest will read it */
};

/* -EINVAL for a worker or a kind that does not exist, -ENOMEM. */
int vfc_post(struct vfc_engine *engine, uint32_t worker, const struct vfc_msg *msg);

enum vfc_event_kind {
	VFC_EVENT_ACK = 1,	/* seq, result (0 or -errno), value */
	VFC_EVENT_PUNT,		/* a command that Python shall answer: handle .. data_out (both ways cut at max_punt_bytes) */
	VFC_EVENT_CONTROL,	/* a control request: handle, data_out = its readable part, data_in_length = writable bytes */
	VFC_EVENT_BUFFERS,	/* the event ring got buffers after an event found none */
	/*
	 * ring index, and why it is stopped until it is started anew: -EINVAL a head outside the ring, -EOVERFLOW an
	 * avail index that jumped, -EBUSY a head that is in flight, -EFAULT a part that is not in guest memory any
	 * more, -EIO a part whose file shrank
	 */
	VFC_EVENT_BROKEN,
	VFC_EVENT_LATCH,	/* value = another owner, that has held a latch for longer than a second */
	VFC_EVENT_BUSY		/* of several workers this one has little rest, and more than one ring with commands */
};

/* Why a command was punted. */
enum vfc_why {
	VFC_WHY_OPCODE = 1,	/* the mask does not allow it */
	VFC_WHY_NO_ROUTE,
	VFC_WHY_ATTRIBUTE,	/* task attribute other than SIMPLE */
	VFC_WHY_FIELD,		/* protection bits, FUA read, ... */
	VFC_WHY_RANGE,		/* LBA out of range, or length not that of the data buffer */
	VFC_WHY_TRANSFER,	/* larger than max_transfer */
	VFC_WHY_MEDIUM,		/* the medium failed: do it again, carefully; what a flush has lost is not there another time */
	VFC_WHY_DOUBT		/* SYNCHRONIZE CACHE, or FUA: the host may have lost what was written before */
};

struct vfc_event {
	uint64_t seq;
	uint64_t handle;
	uint32_t kind;
	uint32_t index;		/* ring */
	int32_t result;
	uint32_t value;
	uint32_t why;
	uint8_t lun[8];		/* as the guest sent it */
	uint64_t tag;
	uint8_t target;
	uint8_t attribute;	/* virtio's numbers */
	uint8_t priority;
	uint8_t crn;
	uint32_t cdb_length;
	uint8_t cdb[32];
	uint32_t data_in_length;
	uint32_t data_out_length;
	const uint8_t *data_out;	/* a copy; valid until the next vfc_next() for this worker */
};

/* 1 and an event, or 0 when there is none; drains the fd. */
int vfc_next(struct vfc_engine *engine, uint32_t worker, struct vfc_event *ret_event);

struct vfc_answer {
	uint64_t handle;
	uint8_t response;	/* virtio-scsi */
	uint8_t status;		/* SAM */
	uint16_t status_qualifier;
	uint32_t residual;
	uint32_t sense_length;
	uint32_t data_in_length;
	const uint8_t *sense;
	const uint8_t *data_in;
};

/* -ESTALE: the command was answered meanwhile (abort, reset, stop): not an error. */
int vfc_reply(struct vfc_engine *engine, const struct vfc_answer *answer);
/* The same for a control request: bytes as the guest will read them. */
int vfc_reply_control(struct vfc_engine *engine, uint64_t handle, const uint8_t *bytes, uint32_t length);

/* Counters of one worker since its start. */
struct vfc_stats {
	uint64_t commands;		/* popped from request rings */
	uint64_t fast;			/* run by C */
	uint64_t punted;
	uint64_t read_bytes, written_bytes;	/* by C */
	uint64_t bad_target;
	uint64_t task_set_full;		/* over the ration */
	uint64_t aborted;
	uint64_t abandoned;
	uint64_t parked;		/* waits for a latch */
	uint64_t held;			/* ORDERED, or behind one that is: waits for its turn */
	uint64_t medium_errors;
	uint64_t bad_chain;		/* loop, too long, order, next out of range */
	uint64_t bad_address;		/* outside every region, or wraps */
	uint64_t bad_indirect;		/* table length, nesting */
	uint64_t bad_header;		/* short request header or response space */
	uint64_t bad_direction;		/* data both ways without VIRTIO_SCSI_F_INOUT */
	uint64_t torn_memory;		/* SIGBUS met */
	uint64_t broken_rings;
	uint64_t kicks, calls;
	uint64_t in_flight;		/* now */
};
int vfc_stats(struct vfc_engine *engine, uint32_t worker, struct vfc_stats *ret_stats);

#define VFC_WORK_COMMAND 1024	/* what a command counts beside its bytes: about what it costs beside them */
/* How much each of the VFC_MAX_RINGS rings has made this worker do since its start. */
int vfc_work(struct vfc_engine *engine, uint32_t worker, uint64_t *ret_work);

/* ---- cffi reads to here ---- */
#endif
