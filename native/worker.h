/*
 * worker.h - a worker: one thread that owns its rings, their commands, its routes and its copies of the tables.
 *
 *	worker.c  the thread, its loop and its messages
 *	ring.c    starting, running and stopping rings; the event ring
 *	move.c    rings that go from one worker to another, and when there is reason to
 *	route.c   where (target, lun) leads; draining what was replaced
 *	intake.c  taking commands from a ring
 *	express.c the few commands that are nearly all of them, from the ring to the used ring in one go
 *	order.c   task attributes: commands that wait for others of their unit
 *	command.c the life of one command: run, parked, punted, answered
 *	vscsi.c   what a virtio-scsi request says
 *	path_*.c  where commands go: memory, files, and (path_sg*.c) devices that take them as they are
 *	bounce.c  an I/O on its way to a file; crew.c: the threads that do those that block
 *
 * Everything here belongs to the worker's thread but what is marked (any thread).
 */
#ifndef VFC_WORKER_H
#define VFC_WORKER_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#include "mailbox.h"
#include "medium.h"
#include "path.h"
#include "scsi.h"
#include "vhostfc.h"
#include "virtq.h"

#define BATCH 32	/* heads taken from a ring before it is published */
#define SMALL_BATCH 4	/* the same where others, that have few commands, wait meanwhile */
#define FEW_IOV 8	/* pieces that a command holds without its slab */
#define LUNS 16384	/* flat addressing, SAM-5 4.7.7.3 */

/* virtio 1.3, 5.6.6.1: response */
enum {
	VIRTIO_SCSI_S_OK = 0,
	VIRTIO_SCSI_S_ABORTED = 2,
	VIRTIO_SCSI_S_BAD_TARGET = 3,
	VIRTIO_SCSI_S_RESET = 4,
	VIRTIO_SCSI_S_BUSY = 5,
	VIRTIO_SCSI_S_TRANSPORT_FAILURE = 6,
	VIRTIO_SCSI_S_TARGET_FAILURE = 7,
	VIRTIO_SCSI_S_NEXUS_FAILURE = 8,
	VIRTIO_SCSI_S_FAILURE = 9,
};
#define SAM_TASK_SET_FULL 0x28	/* SAM-5 5.3.1 */
#define SAM_TASK_ABORTED 0x40
#define REQUEST_HEADER 51	/* struct virtio_scsi_req_cmd without data, cdb_size 32 */
#define RESPONSE_HEADER 108	/* struct virtio_scsi_resp_cmd without data, sense_size 96 */
#define SENSE_ROOM 96

struct worker;
struct ring;

struct route {
	struct vfc_path path;
	uint8_t mask[32];
	uint32_t commands;	/* running or parked */
	uint8_t target;
	uint16_t lun;
	/* once replaced */
	struct mail *ack;
	struct route *next;	/* in the order of replacement */
};

/* Found in two steps; made by messages only. */
struct route_page {
	struct route *route[256];
};
struct route_pages {
	struct route_page *page[LUNS / 256];
};

enum command_state {
	COMMAND_FREE,
	COMMAND_TAKEN,		/* from the ring, and not looked at yet */
	COMMAND_HELD,		/* waits for others of its unit to end (order.c) */
	COMMAND_READY,		/* its path is next, in this batch */
	COMMAND_RUNNING,	/* the path has it */
	COMMAND_PARKED,		/* waits for a latch or a limit */
	COMMAND_PUNTED,		/* Python has it */
};

struct command {
	struct vfc_cmd cmd;
	struct ring *ring;
	struct view *view;
	struct route *route;	/* RUNNING, PARKED */
	uint16_t head;
	uint8_t state;
	uint8_t target;
	uint16_t lun;
	int16_t bad;		/* what was wrong with its chain, or 0 */
	bool doomed;		/* answered with `doom` and `doom_status` when the path gives it back */
	uint8_t doom, doom_status;
	struct vq_chain chain;
	/* The response's place: `answer` where it is in one piece, else the pieces up to answer_cut bytes of the last. */
	uint8_t *answer;
	uint32_t answer_pieces;
	size_t answer_cut;
	/* Data behind the headers */
	struct iovec *out, *in;
	uint32_t out_pieces, in_pieces;
	uint32_t out_bytes, in_bytes;
	struct task_set *set;	/* NULL: nobody asks what order it has */
	TAILQ_ENTRY(command) turn;	/* HELD */
	struct command *next;	/* parked */
	struct mail *waiter;	/* the ABORT that counts on a doomed one */
	uint64_t parked_since;	/* ns; by this holder */
	uint32_t holder;
	uint32_t generation;	/* PUNTED: makes the handle unique */
	uint64_t punt_bytes;
	uint8_t header[REQUEST_HEADER];
	struct iovec few[FEW_IOV];
};

/* A ring's commands for one unit, while it matters who came first; see order.c. */
struct task_set {
	uint32_t address;	/* target, LUN */
	uint32_t under_way;	/* in flight, and not held */
	bool alone;		/* one of those is ORDERED */
	bool loose;		/* in the worker's list: the first that is held may begin */
	TAILQ_HEAD(, command) held;	/* as they came */
	LIST_ENTRY(task_set) others;	/* whose addresses are alike, or that are spare */
	TAILQ_ENTRY(task_set) turn;	/* loose */
};
LIST_HEAD(set_list, task_set);

struct ring {
	struct worker *worker;
	struct vq vq;
	uint32_t index;
	uint32_t role;
	bool started, enabled, broken, dirty;
	bool armed;		/* the driver is asked for kicks */
	bool shallow;		/* few commands at a time lately */
	uint64_t empty_since;	/* ns; 0: there was work at the last look */
	uint64_t looked;	/* ns: the last look at it since then */
	bool slept;		/* nobody looks at it since then */
	uint8_t far;		/* times in a row that it was empty for longer than anybody looks */
	uint64_t gap;		/* ns: mean of how long it is empty otherwise */
	uintptr_t last_header, last_answer;	/* where a command was: no more than a guess at the next, never used */
	int kick_fd, call_fd, err_fd;
	uint32_t in_flight;
	uint32_t ordered;	/* ORDERED commands, held or not */
	uint32_t set_count;	/* in use */
	struct task_set *sets;	/* pool_size, touched when there is an ORDERED command */
	struct set_list *set_lists;	/* by address modulo pool_size; as many */
	struct set_list spare_sets;	/* of sets[]: were in use since there were none */
	struct command *pool;	/* by head */
	struct iovec *slab;	/* VQ_MAX_IOV by head, touched by large commands only */
	struct vq_place *places;	/* packed rings */
	uint32_t pool_size;
	struct mail *stop;
	uint64_t deadline;	/* ns */
	bool expired;
	struct ring *next_dirty;
};

/* How busy a worker is, since a while ago; kept where there are others to give rings to. */
struct pace {
	uint64_t since, rested;	/* ns */
	uint64_t resting;	/* ns: since when nothing was taken and nothing came back; 0: something was */
	bool took;		/* in this turn of the loop */
	uint64_t rings[VFC_MAX_RINGS / 64];	/* those with commands */
};

/* Shared by all workers of an engine. */
struct ration {
	_Atomic uint32_t punts;
	_Atomic uint64_t bytes;
	uint32_t max_punts;
	uint32_t max_transfer;
	uint64_t max_bytes;
};

struct worker {
	uint32_t index;
	pthread_t thread;
	bool started, joined;	/* (engine_new, engine_free) */
	struct mailbox box;	/* (any thread) */
	struct ration *ration;	/* (any thread) */
	_Atomic uint32_t *live;	/* (any thread) by handle: generation of a punt that waits for its answer, or 0 */
	struct vfc_stats stats;	/* (any thread reads) */
	uint64_t work[VFC_MAX_RINGS];	/* (any thread reads) */
	struct worker *peers;	/* all of the engine; of others only ->box is ours to touch */
	uint32_t peer_count;
	struct pace pace;
	int epoll_fd;
	struct vfc_path_engine *media;	/* memory and null */
	struct vfc_path_engine *files;	/* file and direct: io_uring or a pool of threads */
	struct vfc_path_engine *sg;	/* /dev/sgN; made when the first route leads there */
	uint32_t running;	/* commands with a path */
	struct ring *rings[VFC_MAX_RINGS];
	uint64_t active[VFC_MAX_RINGS / 64];	/* rings that may have something, or are polled */
	uint64_t poll_ns;	/* how long a ring is polled after its last command, at most */
	unsigned batch;		/* commands that a ring may have in this round */
	int credit;		/* of work until the next look at what else there is */
	struct ring *dirty;	/* rings with used entries to publish */
	struct view *view;	/* the table from now on */
	struct view *old_views;
	bool targets[256];
	struct route_pages *routes[256];	/* by target */
	/* The last address that led to a route, and that route; NULL after every change of routes or targets */
	uint64_t recent_address;
	struct route *recent;
	struct route *draining;
	struct command *parked, **parked_last;
	struct command *starving;	/* a parked one that others give way to */
	TAILQ_HEAD(, task_set) loose;	/* some that are held may begin */
	struct ring *event_ring;
	bool hungry;		/* an event found no buffer: tell when there are some */
	uint32_t stopping;	/* rings with a stop under way */
	uint32_t polled;	/* rings without a kick fd */
	uint32_t generation;
	bool unsettled;		/* a view, a route or a ring may have become free */
	bool more;		/* an engine may have more ends than were taken */
	bool quit;
	uint64_t latch_said;	/* ns: the last VFC_EVENT_LATCH */
};

#define COUNT(worker, counter) ADD(worker, counter, 1)
#define ADD(worker, counter, n) add_to(&(worker)->stats.counter, (uint64_t)(n))
/* Written by one thread, read by any: a plain add to the compiler, no torn value to the reader. */
static inline void add_to(uint64_t *counter, uint64_t n)
{
	__atomic_store_n(counter, __atomic_load_n(counter, __ATOMIC_RELAXED) + n, __ATOMIC_RELAXED);
}

uint64_t worker_now(void);	/* ns, CLOCK_MONOTONIC */
void *worker_main(void *worker);
/* The engine for /dev/sgN, made at the first call; NULL: no memory or descriptor is left. */
struct vfc_path_engine *worker_sg(struct worker *worker);
void worker_free(struct worker *worker);
/* Tells Python; an event that finds no memory is lost, as are those that nobody reads. */
void worker_say(struct worker *worker, uint32_t kind, uint32_t index, int32_t result, uint32_t value);

/* ring.c */
int ring_get(struct worker *worker, uint32_t index, struct ring **ret_ring);
/* Takes the fds of the setup. */
int ring_start(struct worker *worker, struct ring *ring, struct vfc_ring_setup *setup);
void ring_run(struct worker *worker, struct ring *ring);
/* It is not empty any more. */
void ring_tune(struct worker *worker, struct ring *ring);
void ring_break(struct worker *worker, struct ring *ring, int error);
void ring_stop(struct worker *worker, struct ring *ring, struct mail *mail);
/* Goes on with stops: those that nothing holds up are acked, those whose time is over cancel what is left. */
void ring_settle(struct worker *worker, struct ring *ring, uint64_t now);
/* Answers every command RESET, as far as its path lets go of it. */
void ring_kill_all(struct worker *worker, struct ring *ring);
void ring_publish_all(struct worker *worker);
/* Take the fd. */
void ring_set_call(struct worker *worker, struct ring *ring, int fd);
void ring_set_err(struct ring *ring, int fd);
/* 1: in a buffer, 0: there was none */
uint32_t ring_put_event(struct worker *worker, const uint8_t event[16]);
/* Its own things, and itself. */
void ring_free(struct ring *ring);
/* What its kicks wake from now on; or not any more. */
int ring_listen(struct worker *worker, struct ring *ring, int kick_fd);
void ring_leave(struct worker *worker, struct ring *ring);

static inline void ring_activate(struct worker *worker, const struct ring *ring)
{
	worker->active[ring->index / 64] |= 1ull << (ring->index % 64);
}

static inline bool worker_any_active(const struct worker *worker)
{
	for (size_t i = 0; i < VFC_MAX_RINGS / 64; i++)
		if (worker->active[i])
			return true;
	return false;
}

static inline void ring_mark_dirty(struct worker *worker, struct ring *ring)
{
	if (ring->dirty)
		return;
	ring->dirty = true;
	ring->next_dirty = worker->dirty;
	worker->dirty = ring;
}

/* move.c */
void move_message(struct worker *worker, struct mail *mail);
/* Nothing of it is in flight: it is with the other worker from here on. */
void move_away(struct worker *worker, struct ring *ring);
/* It stays, for this reason. */
void move_give_up(struct worker *worker, struct ring *ring, int error);
void move_arrive(struct worker *worker, struct mail *mail);
/* Now and then: says so when it would be good to have less to do. */
void move_look(struct worker *worker);
/* What is taken after a rest; a turn's end, or a sleep's begin. */
void move_begin(struct worker *worker);
void move_rest(struct worker *worker);

static inline void move_took(struct worker *worker)
{
	worker->pace.took = true;
	if (__builtin_expect(worker->pace.resting != 0, 0))
		move_begin(worker);
}

static inline bool ring_moves(const struct ring *ring)
{
	return ring->stop && ring->stop->msg.kind == VFC_MSG_RING_MOVE;
}

/* These commands came from a ring in one batch. */
static inline void move_count(struct worker *worker, const struct ring *ring, unsigned commands)
{
	add_to(&worker->work[ring->index], (uint64_t)commands * VFC_WORK_COMMAND);
	move_took(worker);
	worker->pace.rings[ring->index / 64] |= 1ull << (ring->index % 64);
}

/* intake.c */
/* One batch of a request ring.  0: it is empty now, 1: it may have more, -errno: as vq_next(), -EBUSY: in flight already. */
int intake_run(struct worker *worker, struct ring *ring);
/* NULL: it is in flight already. */
struct command *intake_claim(struct worker *worker, struct ring *ring, uint16_t head);
/* Its pieces, or what is wrong with them in ->bad. */
void intake_gather(struct worker *worker, struct command *command);
void intake_count_bad(struct worker *worker, int error);

/* Of a batch, the commands that have an entry of the pool: claimed and gathered. */
struct hold {
	struct command *commands[BATCH];
	unsigned count;
	bool busy;	/* a head was in flight already */
};
void intake_hold(struct worker *worker, struct ring *ring, const uint16_t *heads, unsigned count, struct hold *hold);

/* express.c */
/* Runs those of these heads that need no command of their own; the rest is held.  heads[] is used up. */
void express_run(struct worker *worker, struct ring *ring, uint16_t *heads, unsigned count, struct hold *hold);

/* command.c */
/* Takes the command of this head from the control ring, as far as its answer where that can be given at once. */
void command_accept_control(struct worker *worker, struct ring *ring, uint16_t head);
/* The path is done with it: ->cmd.error tells how. */
void command_finish(struct worker *worker, struct command *command);
/* Gives it back without a word. */
void command_drop(struct worker *worker, struct command *command);
void command_respond(struct worker *worker, struct command *command, uint8_t response, uint8_t status);
void command_punt(struct worker *worker, struct command *command, enum vfc_why why);
void command_submit(struct worker *worker, struct command *command);
/*
 * Answers a command in any state; false: when the path gives it back.  at_once: we have to leave, so not even a device
 * that may still run it is waited for.
 */
bool command_kill(struct worker *worker, struct command *command, uint8_t response, uint8_t status, bool at_once);
void command_reply(struct worker *worker, const struct mail *mail);
/* Tries parked commands again. */
void command_retry(struct worker *worker, uint64_t now);
/* Takes a parked command's turn back, so that it can be dispatched anew. */
void command_unpark(struct worker *worker, struct command *command);
/* Whether a page that this command touches has gone; the second counts it. */
bool command_torn(const struct command *command);
bool command_found_torn(struct worker *worker, const struct command *command);

static inline bool is_torn(struct worker *worker, const struct command *command)
{
	return __builtin_expect(guard_any_torn(), 0) && command_found_torn(worker, command);
}

/* order.c */
/* True: it may begin; else it is held.  To be asked wherever order_matters(). */
bool order_take(struct worker *worker, struct command *command);
/* It has ended, and had a task set. */
void order_leave(struct worker *worker, struct command *command);
/* It is held, and will be answered without having begun. */
void order_drop(struct worker *worker, struct command *command);
/* Begins some of those that were held and may begin now. */
void order_let_go(struct worker *worker);

static inline bool order_matters(const struct command *command)
{
	return command->ring->set_count || command->header[HEADER_ATTRIBUTE] == ATTRIBUTE_ORDERED;
}

/* vscsi.c: decides where the command of ->header goes: answer, punt, or (true) the path in ->cmd. */
bool vscsi_dispatch(struct worker *worker, struct command *command);
/* ->target and ->lun, in whichever way ->header spells them; false: it names nothing. */
bool vscsi_address(struct command *command);
/* Takes out of a route's mask what C cannot run. */
void vscsi_limit_mask(uint8_t mask[32], bool read_only);

/* route.c */
void route_message(struct worker *worker, struct mail *mail);
/* Acks what has drained. */
void route_settle(struct worker *worker);
void route_free_all(struct worker *worker);

static inline struct route *route_find(const struct worker *worker, uint8_t target, uint16_t lun)
{
	const struct route_pages *pages = worker->routes[target];
	const struct route_page *page = pages && lun < LUNS ? pages->page[lun >> 8] : NULL;

	return page ? page->route[lun & 0xff] : NULL;
}

static inline void view_put(struct worker *worker, struct view *view)
{
	if (!--view->users && view != worker->view)
		worker->unsettled = true;
}

/* A handle: generation, control?, worker, ring, head. */
static inline uint64_t handle_make(const struct command *command, bool control)
{
	const struct ring *ring = command->ring;

	return (uint64_t)command->generation << 32 | (uint64_t)control << 29 | (uint64_t)ring->worker->index << 23 |
	       (uint64_t)ring->index << 15 | command->head;
}

#define HANDLE_CONTROL(handle) ((bool)((handle) >> 29 & 1))
#define HANDLE_WORKER(handle) ((uint32_t)((handle) >> 23 & 0x3f))
#define HANDLE_SLOT(handle) ((uint32_t)((handle) & 0x7fffff))	/* ring and head: index into worker->live */
#define HANDLE_RING(handle) ((uint32_t)((handle) >> 15 & 0xff))
#define HANDLE_HEAD(handle) ((uint16_t)((handle) & 0x7fff))
#define HANDLE_GENERATION(handle) ((uint32_t)((handle) >> 32))
#define HANDLE_SLOTS (1u << 23)

/* paths: media never wait; the others have threads or a ring in the kernel to be freed when nothing is left */
struct vfc_path_engine *path_media_engine(void);
int path_uring_new(struct vfc_path_engine **ret_engine);
void path_uring_free(struct vfc_path_engine *engine);
int path_pool_new(struct vfc_path_engine **ret_engine);
void path_pool_free(struct vfc_path_engine *engine);
int path_sg_new(struct vfc_path_engine **ret_engine);
void path_sg_free(struct vfc_path_engine *engine);

#endif
