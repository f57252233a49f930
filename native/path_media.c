/*
 * path_media.c - media that need no waiting: memory (a copy between the guest and the medium, for writes by way of the
 * place that outlives us; see latch.c) and null.
 *
 * A copy takes the latch stripe by stripe: blocks are not larger than a stripe and aligned, so each is moved whole.
 * When a stripe is taken, what was moved stays moved and the rest follows later.
 */
#include <errno.h>
#include <string.h>

#include "iov.h"
#include "medium.h"
#include "worker.h"

static void copy_out(const struct vfc_medium *medium, const struct vfc_cmd *cmd, uint64_t at, size_t length)
{
	const uint8_t *medium_at = medium->memory + at;

	if (__builtin_expect(cmd->iov_count == 1, 1))
		memcpy((uint8_t *)cmd->iov->iov_base + cmd->done, medium_at, length);
	else
		iov_write(cmd->iov, cmd->iov_count, cmd->done, medium_at, length);
}

static void copy_in(const struct vfc_medium *medium, const struct vfc_cmd *cmd, uint64_t at, size_t length)
{
	const struct vfc_redo *redo = &cmd->path->redo;
	size_t most = medium->block_size > REDO_PIECE ? medium->block_size : REDO_PIECE;

	for (size_t done = 0, piece; done < length; done += piece) {
		piece = length - done < most ? length - done : most;
		if (__builtin_expect(cmd->iov_count == 1, 1))
			memcpy(redo->data, (const uint8_t *)cmd->iov->iov_base + cmd->done + done, piece);
		else
			iov_read(cmd->iov, cmd->iov_count, cmd->done + done, redo->data, piece);
		redo_copy(redo, medium->memory, at + done, piece);
	}
}

static enum vfc_submit move(struct vfc_medium *medium, struct vfc_cmd *cmd)
{
	while (cmd->done < cmd->length) {
		uint64_t at = (cmd->lba << medium->block_shift) + cmd->done;
		size_t length = VFC_LATCH_STRIPE - at % VFC_LATCH_STRIPE;

		if (length > cmd->length - cmd->done)
			length = cmd->length - cmd->done;
		if (__builtin_expect(!latch_take_one(medium->latch, medium->owner, at, &cmd->holder), 0))
			return VFC_BUSY;
		if (cmd->op == VFC_OP_READ)
			copy_out(medium, cmd, at, length);
		else
			copy_in(medium, cmd, at, length);
		latch_free_one(medium->latch, medium->owner, at);
		cmd->done += length;
	}
	return VFC_DONE;
}

static enum vfc_submit submit(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	struct vfc_medium *medium = cmd->path->medium;

	(void)engine;
	cmd->error = 0;
	if (cmd->op == VFC_OP_FLUSH || medium->kind == VFC_MEDIUM_NULL)
		return VFC_DONE;
	if (cmd->op == VFC_OP_WRITE && !medium->writable) {
		cmd->error = -EROFS;
		return VFC_DONE;
	}
	if (move(medium, cmd) == VFC_BUSY)
		return VFC_BUSY;
	if (guard_any_torn() && guard_torn(medium->guard))
		cmd->error = -EIO;
	return VFC_DONE;
}

static void flush(struct vfc_path_engine *engine)
{
	(void)engine;
}

static unsigned reap(struct vfc_path_engine *engine, struct vfc_cmd **done, unsigned max)
{
	(void)engine;
	(void)done;
	(void)max;
	return 0;
}

static void cancel(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	(void)engine;
	(void)cmd;
}

static bool abandon(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	(void)engine;
	(void)cmd;
	return true;
}

static int wait_fd(struct vfc_path_engine *engine)
{
	(void)engine;
	return -1;
}

static bool idle(struct vfc_path_engine *engine)
{
	(void)engine;
	return true;
}

static const struct vfc_path_ops ops = {
	.name = "media",
	.submit = submit,
	.flush = flush,
	.reap = reap,
	.cancel = cancel,
	.abandon = abandon,
	.wait_fd = wait_fd,
	.idle = idle,
};

struct vfc_path_engine *path_media_engine(void)
{
	static struct vfc_path_engine engine = { .ops = &ops };

	return &engine;
}
