/*
 * path_uring.c - files and block devices through io_uring: one ring per worker, shared by its routes.
 *
 * submit() only prepares; flush() hands a batch to the kernel.  The ring's own fd is what a worker waits for.
 */
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>

#include "bounce.h"
#include "worker.h"

#define ENTRIES 256

struct uring {
	struct vfc_path_engine base;
	struct bounce_pool pool;
	struct io_uring ring;
	struct bounce *again;	/* the rest of short ones, waiting for room in the ring */
	unsigned cancels;	/* that the kernel has yet to answer */
};

static struct uring *uring_of(struct vfc_path_engine *engine)
{
	return (struct uring *)engine;	/* its first member */
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
	int fd = bounce->medium->fd;

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
	io_uring_sqe_set_data(sqe, bounce);
	return true;
}

static enum vfc_submit submit(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	struct uring *uring = uring_of(engine);
	struct bounce *bounce;
	enum vfc_submit verdict = bounce_begin(&uring->pool, cmd, &bounce);

	if (verdict == VFC_QUEUED && !prepare(uring, bounce)) {
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
	/* EBUSY or EAGAIN: the kernel wants completions reaped first, which is what comes next. */
	if (io_uring_sq_ready(&uring->ring))
		io_uring_submit(&uring->ring);
}

static unsigned reap(struct vfc_path_engine *engine, struct vfc_cmd **done, unsigned max)
{
	struct uring *uring = uring_of(engine);
	struct io_uring_cqe *cqe;
	unsigned count = 0;

	/* The kernel owes us nothing: not even a look at the ring. */
	if (!uring->pool.under_way && !uring->cancels)
		return 0;
	while (count < max && !io_uring_peek_cqe(&uring->ring, &cqe)) {
		struct bounce *bounce = io_uring_cqe_get_data(cqe);
		int result = cqe->res;

		io_uring_cqe_seen(&uring->ring, cqe);
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

static void cancel(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	struct uring *uring = uring_of(engine);
	struct bounce *bounce = cmd->priv;
	struct io_uring_sqe *sqe = get_sqe(uring);

	bounce->cancelled = true;
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
};

int path_uring_new(struct vfc_path_engine **ret_engine)
{
	struct io_uring_params params = { .flags = IORING_SETUP_CLAMP };
	struct uring *uring = calloc(1, sizeof(*uring));
	int error;

	if (!uring)
		return -ENOMEM;
	uring->base.ops = &ops;
	error = io_uring_queue_init_params(ENTRIES, &uring->ring, &params);
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
	bounce_pool_free(&uring->pool);
	free(uring);
}
