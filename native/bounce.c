/*
 * bounce.c - buffers for I/O to files: made, filled, emptied, kept for the next.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bounce.h"
#include "iov.h"
#include "latch.h"

#define SMALL 65536		/* a buffer that is kept */
#define KEEP 256
#define LIMIT (64u << 20)	/* bytes of one worker's buffers in use */
#define SHARE 256		/* reads that one hold on a latch word may serve */
#define ALIGNMENT 4096		/* what direct I/O asks for at most */

static struct bounce *make(struct bounce_pool *pool, size_t length)
{
	struct bounce *bounce = pool->free;
	void *data = NULL;

	if (length <= SMALL && bounce) {
		uint8_t *kept = bounce->data;

		pool->free = bounce->next;
		pool->kept--;
		*bounce = (struct bounce){ .data = kept, .room = SMALL };
		return bounce;
	}
	bounce = calloc(1, sizeof(*bounce));
	if (!bounce)
		return NULL;
	bounce->room = length <= SMALL ? SMALL : (length + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
	if (posix_memalign(&data, ALIGNMENT, bounce->room)) {
		free(bounce);
		return NULL;
	}
	bounce->data = data;
	return bounce;
}

static void discard(struct bounce_pool *pool, struct bounce *bounce)
{
	if (bounce->room == SMALL && pool->kept < KEEP) {
		bounce->next = pool->free;
		pool->free = bounce;
		pool->kept++;
		return;
	}
	free(bounce->data);
	free(bounce);
}

/*
 * Reads within one stripe share its word, so that sequential ones run side by side.  Only so many, then the word is
 * let go of: whoever wants to write there, in this process or another, gets a turn.
 */
static bool take_shared(struct vfc_path *path, uint64_t offset, uint32_t *ret_holder)
{
	struct vfc_medium *medium = path->medium;
	struct vfc_readers *readers = &path->readers[offset / VFC_LATCH_STRIPE % LATCH_WORDS];

	if (readers->count) {
		*ret_holder = medium->owner;
		if (readers->ever == SHARE)
			return false;
	} else {
		if (!latch_take_one(medium->latch, medium->owner, offset, ret_holder))
			return false;
		readers->ever = 0;
	}
	readers->count++;
	readers->ever++;
	return true;
}

static void free_shared(struct vfc_path *path, uint64_t offset)
{
	struct vfc_readers *readers = &path->readers[offset / VFC_LATCH_STRIPE % LATCH_WORDS];

	if (!--readers->count)
		latch_free_one(path->medium->latch, path->medium->owner, offset);
}

static bool may_share(struct vfc_path *path, enum vfc_op op, uint64_t offset, uint64_t length)
{
	if (op != VFC_OP_READ || offset % VFC_LATCH_STRIPE + length > VFC_LATCH_STRIPE)
		return false;
	/* Lazily backed: what is touched is what is used. */
	if (!path->readers)
		path->readers = calloc(LATCH_WORDS, sizeof(*path->readers));
	return path->readers;
}

/* All stripes or none, and nothing is waited for while they are held: two commands cannot block each other. */
static bool take(struct vfc_cmd *cmd, uint64_t offset, bool *ret_shared)
{
	struct vfc_medium *medium = cmd->path->medium;

	*ret_shared = may_share(cmd->path, cmd->op, offset, cmd->length);
	if (*ret_shared)
		return take_shared(cmd->path, offset, &cmd->holder);
	return cmd->op == VFC_OP_FLUSH ||
	       !vfc_latch_take(medium->latch, medium->owner, offset, cmd->length, &cmd->holder);
}

static void let_go(struct vfc_path *path, enum vfc_op op, bool shared, uint64_t offset, uint64_t length)
{
	if (shared)
		free_shared(path, offset);
	else if (op != VFC_OP_FLUSH)
		vfc_latch_free(path->medium->latch, path->medium->owner, offset, length);
}

enum vfc_submit bounce_begin(struct bounce_pool *pool, struct vfc_cmd *cmd, struct bounce **ret_bounce)
{
	struct vfc_medium *medium = cmd->path->medium;
	uint64_t offset = cmd->lba << medium->block_shift;
	struct bounce *bounce;
	bool shared;

	cmd->error = 0;
	cmd->holder = 0;
	if (cmd->length > LIMIT) {
		cmd->error = -EFBIG;
		return VFC_DONE;
	}
	if (pool->bytes + cmd->length > LIMIT)
		return VFC_BUSY;
	if (!take(cmd, offset, &shared))
		return VFC_BUSY;
	bounce = make(pool, cmd->length);
	if (!bounce) {
		let_go(cmd->path, cmd->op, shared, offset, cmd->length);
		cmd->error = -ENOMEM;
		return VFC_DONE;
	}
	bounce->cmd = cmd;
	bounce->path = cmd->path;
	bounce->medium = medium;
	bounce->op = cmd->op;
	bounce->fua = cmd->fua;
	bounce->shared = shared;
	bounce->offset = offset;
	bounce->length = cmd->length;
	if (cmd->op == VFC_OP_WRITE)
		iov_read(cmd->iov, cmd->iov_count, 0, bounce->data, bounce->length);
	cmd->path->busy++;
	cmd->priv = bounce;
	pool->bytes += bounce->length;
	pool->under_way++;
	*ret_bounce = bounce;
	return VFC_QUEUED;
}

bool bounce_step(struct bounce *bounce, ssize_t result)
{
	size_t left = bounce->length - bounce->done;

	if ((result == -EINTR || result == -EAGAIN) && !bounce->cancelled)
		return false;
	if (result < 0) {
		bounce->error = (int)result;
		return true;
	}
	if (bounce->op == VFC_OP_FLUSH)
		return true;
	if (!result && bounce->op == VFC_OP_READ) {
		memset(bounce->data + bounce->done, 0, left);
		bounce->done = bounce->length;
		return true;
	}
	/* Direct I/O goes on where a block begins. */
	if ((size_t)result < left && bounce->medium->kind == VFC_MEDIUM_DIRECT)
		result -= result % bounce->medium->block_size;
	if (!result) {
		bounce->error = -EIO;
		return true;
	}
	bounce->done += (size_t)result;
	return bounce->done >= bounce->length;
}

struct vfc_cmd *bounce_end(struct bounce_pool *pool, struct bounce *bounce)
{
	struct vfc_cmd *cmd = bounce->cmd;

	if (cmd) {
		cmd->error = bounce->error;
		if (bounce->op == VFC_OP_READ && !bounce->error)
			iov_write(cmd->iov, cmd->iov_count, 0, bounce->data, bounce->length);
	}
	let_go(bounce->path, bounce->op, bounce->shared, bounce->offset, bounce->length);
	bounce->path->busy--;
	pool->bytes -= bounce->length;
	pool->under_way--;
	discard(pool, bounce);
	return cmd;
}

void bounce_abandon(struct vfc_cmd *cmd)
{
	struct bounce *bounce = cmd->priv;

	bounce->cmd = NULL;
}

void bounce_pool_free(struct bounce_pool *pool)
{
	while (pool->free) {
		struct bounce *bounce = pool->free;

		pool->free = bounce->next;
		free(bounce->data);
		free(bounce);
	}
}
