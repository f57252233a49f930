/*
 * path_uring.c - files and block devices through io_uring: one ring per worker, shared by its routes.
 *
 * submit() only prepares; flush() hands a batch to the kernel.  The ring's own fd is what a worker waits for.
 *
 * What the kernel needs not do again for every I/O is done once: each route's file is registered (the kernel then takes
 * no reference of its own for an I/O), and completions are worked off when the worker asks for them, by itself, instead
 * of whenever they interrupt it (IORING_SETUP_COOP_TASKRUN, Linux 5.19).
 *
 * Writes through the page cache go to a crew of threads instead.  Most file systems let io_uring do none without
 * blocking, so it has threads of its own for them, which wake up whoever waits after every single one; that costs more
 * than the write.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "crew.h"
#include "worker.h"

#define ENTRIES 256
#define FILES 256	/* registered at a time; routes beyond that go by their descriptors */
/*
 * Of Linux 6.14.  Since 6.13 a file that is taken out of the table is let go of when its own last I/O is done; before,
 * that waited for others' I/O and, for a second, for nothing, and an ack says that our hold is gone (see route.c).
 */
#define FEATURE_RW_ATTR (1u << 16)

struct uring {
	struct vfc_path_engine base;
	struct bounce_pool pool;
	struct io_uring ring;
	struct bounce *again;	/* the rest of short ones, waiting for room in the ring */
	unsigned cancels;	/* that the kernel has yet to answer */
	struct crew crew;
	enum { NO_CREW_YET, CREW, NO_CREW } has;	/* made when the first has something to do */
	bool hears;		/* the ring looks at the crew's eventfd */
	bool left_out;		/* the crew, the last time, since the ring had so much: it goes first */
	bool enabled;		/* the worker's thread has made it its own */
	bool registers;		/* there is a table of files */
	uint64_t taken[FILES / 64];	/* of its slots */
};

static struct uring *uring_of(struct vfc_path_engine *engine)
{
	return (struct uring *)engine;	/* its first member */
}

/* Whoever enables the ring is the one who may submit: not the thread that made it. */
static void enable(struct uring *uring)
{
	/* liburing 2.3 declares a function for it and does not export it. */
	if (uring->ring.flags & IORING_SETUP_R_DISABLED)
		syscall(SYS_io_uring_register, uring->ring.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
	uring->registers = uring->ring.features & FEATURE_RW_ATTR && !io_uring_register_files_sparse(&uring->ring, FILES);
	uring->enabled = true;
}

/* A slot for this path's file, if there is one left. */
static void register_file(struct uring *uring, struct vfc_path *path)
{
	int fd = path->medium->fd;

	path->slot = VFC_NO_SLOT;
	for (uint32_t i = 0; uring->registers && i < FILES / 64; i++) {
		unsigned bit;

		if (uring->taken[i] == UINT64_MAX)
			continue;
		bit = (unsigned)__builtin_ctzll(~uring->taken[i]);
		if (io_uring_register_files_update(&uring->ring, i * 64 + bit, &fd, 1) != 1)
			return;
		uring->taken[i] |= 1ull << bit;
		path->slot = (int32_t)(i * 64 + bit) + 1;
		return;
	}
}

static void leave(struct vfc_path_engine *engine, struct vfc_path *path)
{
	struct uring *uring = uring_of(engine);
	uint32_t slot = (uint32_t)path->slot - 1;
	int none = -1;

	if (path->slot <= 0)
		return;
	io_uring_register_files_update(&uring->ring, slot, &none, 1);
	uring->taken[slot / 64] &= ~(1ull << (slot % 64));
	path->slot = 0;
}

static struct io_uring_sqe *get_sqe(struct uring *uring)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&uring->ring);

	if (sqe)
		return sqe;
	io_uring_submit(&uring->ring);
	return io_uring_get_sqe(&uring->ring);
}

static bool prepare(struct uring *uring, struct bounce *bounce)
{
	struct io_uring_sqe *sqe = get_sqe(uring);
	uint8_t *data = bounce->data + bounce->done;
	unsigned length = (unsigned)(bounce->length - bounce->done);
	bool registered = bounce->path->slot > 0;
	int fd = registered ? bounce->path->slot - 1 : bounce->medium->fd;

	if (!sqe)
		return false;
	switch (bounce->op) {
	case VFC_OP_READ:
		io_uring_prep_read(sqe, fd, data, length, bounce->offset + bounce->done);
		break;
	case VFC_OP_WRITE:
		io_uring_prep_write(sqe, fd, data, length, bounce->offset + bounce->done);
		if (bounce->fua)
			sqe->rw_flags = RWF_DSYNC;
		break;
	default:
		io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
	}
	if (registered)
		sqe->flags |= IOSQE_FIXED_FILE;
	io_uring_sqe_set_data(sqe, bounce);
	return true;
}

/* The crew's eventfd wakes up whoever waits for the ring. */
static void hear(struct uring *uring)
{
	struct io_uring_sqe *sqe = uring->hears ? NULL : get_sqe(uring);

	if (!sqe)
		return;
	io_uring_prep_poll_multishot(sqe, uring->crew.fd, POLLIN);
	io_uring_sqe_set_data(sqe, &uring->crew);
	uring->hears = true;
}

static bool lend(struct uring *uring, struct bounce *bounce)
{
	if (bounce->op != VFC_OP_WRITE || bounce->fua || bounce->medium->kind != VFC_MEDIUM_FILE)
		return false;
	/* Of Linux 5.13, as is a poll that goes on after its first event. */
	if (uring->has == NO_CREW_YET)
		uring->has = uring->ring.features & IORING_FEAT_RSRC_TAGS && !crew_begin(&uring->crew, CREW_MOST) ? CREW : NO_CREW;
	if (uring->has == NO_CREW)
		return false;
	hear(uring);
	bounce->lent = true;
	crew_give(&uring->crew, bounce);
	return true;
}

static enum vfc_submit submit(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	struct uring *uring = uring_of(engine);
	struct bounce *bounce;
	enum vfc_submit verdict = bounce_begin(&uring->pool, cmd, &bounce);

	if (__builtin_expect(!uring->enabled, 0))
		enable(uring);
	if (__builtin_expect(!cmd->path->slot, 0))
		register_file(uring, cmd->path);
	if (verdict == VFC_QUEUED && !lend(uring, bounce) && !prepare(uring, bounce)) {
		bounce->next = uring->again;
		uring->again = bounce;
	}
	return verdict;
}

static void flush(struct vfc_path_engine *engine)
{
	struct uring *uring = uring_of(engine);

	while (uring->again) {
		struct bounce *bounce = uring->again;

		if (!prepare(uring, bounce))
			break;
		uring->again = bounce->next;
	}
	if (uring->has == CREW) {
		hear(uring);
		crew_flush(&uring->crew);
	}
	/* EBUSY: the kernel wants completions reaped first, which is what comes next.  EAGAIN: it has no memory just now. */
	if (io_uring_sq_ready(&uring->ring))
		io_uring_submit_and_get_events(&uring->ring);
	engine->unsent = uring->again || io_uring_sq_ready(&uring->ring);
}

/* True: it was the crew's. */
static bool heard(struct uring *uring, const struct io_uring_cqe *cqe)
{
	if (io_uring_cqe_get_data(cqe) != &uring->crew)
		return false;
	if (!(cqe->flags & IORING_CQE_F_MORE))
		uring->hears = false;
	return true;
}

static unsigned reap_crew(struct uring *uring, struct vfc_cmd **done, unsigned count, unsigned max)
{
	struct bounce *bounce;

	while (count < max && (bounce = crew_take(&uring->crew))) {
		done[count] = bounce_end(&uring->pool, bounce);
		if (done[count])
			count++;
	}
	return count;
}

static unsigned reap_ring(struct uring *uring, struct vfc_cmd **done, unsigned count, unsigned max)
{
	struct io_uring_cqe *cqe;

	while (count < max && !io_uring_peek_cqe(&uring->ring, &cqe)) {
		struct bounce *bounce = io_uring_cqe_get_data(cqe);
		int result = cqe->res;
		bool crews = heard(uring, cqe);

		io_uring_cqe_seen(&uring->ring, cqe);
		if (crews)
			continue;
		/* The answer to a cancel; what it cancelled answers for itself. */
		if (!bounce) {
			uring->cancels--;
			continue;
		}
		if (!bounce_step(bounce, result)) {
			bounce->next = uring->again;
			uring->again = bounce;
			continue;
		}
		done[count] = bounce_end(&uring->pool, bounce);
		if (done[count])
			count++;
	}
	return count;
}

static unsigned reap(struct vfc_path_engine *engine, struct vfc_cmd **done, unsigned max)
{
	struct uring *uring = uring_of(engine);
	bool crew_first = uring->left_out;
	unsigned count;

	/* Nobody owes us anything: not even a look at the ring. */
	if (!uring->pool.under_way && !uring->cancels && uring->has != CREW)
		return 0;
	count = reap_ring(uring, done, crew_first ? reap_crew(uring, done, 0, max) : 0, max);
	if (uring->has != CREW)
		return count;
	uring->left_out = count == max && !crew_first;
	/* Last: a note of the crew's that was read just now may be of these. */
	return reap_crew(uring, done, count, max);
}

static void cancel(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	struct uring *uring = uring_of(engine);
	struct bounce *bounce = cmd->priv;
	struct io_uring_sqe *sqe;

	if (bounce->lent) {
		crew_cancel(&uring->crew, bounce);
		return;
	}
	bounce->cancelled = true;
	sqe = get_sqe(uring);
	if (!sqe)
		return;
	uring->cancels++;
	io_uring_prep_cancel(sqe, bounce, 0);
	io_uring_sqe_set_data(sqe, NULL);
}

static bool abandon(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	(void)engine;
	bounce_abandon(cmd);
	return true;
}

static int wait_fd(struct vfc_path_engine *engine)
{
	return uring_of(engine)->ring.ring_fd;
}

static bool idle(struct vfc_path_engine *engine)
{
	return !uring_of(engine)->pool.under_way;
}

static const struct vfc_path_ops ops = {
	.name = "io_uring",
	.submit = submit,
	.flush = flush,
	.reap = reap,
	.cancel = cancel,
	.abandon = abandon,
	.wait_fd = wait_fd,
	.idle = idle,
	.leave = leave,
};

int path_uring_new(struct vfc_path_engine **ret_engine)
{
	static const unsigned ways[] = {
		IORING_SETUP_R_DISABLED | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN |
			IORING_SETUP_TASKRUN_FLAG,	/* Linux 6.0 */
		0,
	};
	struct io_uring_params params;
	struct uring *uring = calloc(1, sizeof(*uring));
	int error = -EINVAL;

	if (!uring)
		return -ENOMEM;
	uring->base.ops = &ops;
	for (size_t i = 0; i < sizeof(ways) / sizeof(ways[0]) && error == -EINVAL; i++) {
		params = (struct io_uring_params){ .flags = IORING_SETUP_CLAMP | ways[i] };
		error = io_uring_queue_init_params(ENTRIES, &uring->ring, &params);
	}
	/* Without NODROP (Linux 5.5) a completion could be lost. */
	if (!error && !(params.features & IORING_FEAT_NODROP)) {
		io_uring_queue_exit(&uring->ring);
		error = -EOPNOTSUPP;
	}
	if (error) {
		free(uring);
		return error;
	}
	*ret_engine = &uring->base;
	return 0;
}

void path_uring_free(struct vfc_path_engine *engine)
{
	struct uring *uring = uring_of(engine);

	io_uring_queue_exit(&uring->ring);
	if (uring->has == CREW)
		crew_end(&uring->crew);
	bounce_pool_free(&uring->pool);
	free(uring);
}
