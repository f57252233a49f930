/*
 * bounce.c - buffers for I/O to files: made, filled, emptied, kept for the next.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "bounce.h"
#include "iov.h"
#include "latch.h"

#define SMALL 65536		/* a buffer that is kept */
#define KEEP 256
#define LIMIT (64u << 20)	/* bytes of one worker's buffers in use */
#define SHARE 256		/* commands that one hold on a latch word may serve */
#define PASS 63			/* reads that go by the page cache unasked, at most, before it is asked again */
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
 * What this path has under way within one stripe shares its word, as long as no two touch the same blocks and one of
 * them writes there: so I/O in sequence runs side by side.  Only so many, then the word is let go of: whoever wants it,
 * in this process or another, gets a turn.
 */
static bool take_shared(struct vfc_path *path, enum vfc_op op, uint64_t offset, uint64_t length, uint32_t *ret_holder)
{
	struct vfc_medium *medium = path->medium;
	struct vfc_holders *holders = &path->holders[offset / VFC_LATCH_STRIPE % LATCH_WORDS];

	if (holders->count) {
		*ret_holder = medium->owner;
		if (holders->ever == SHARE)
			return false;
		for (const struct bounce *other = holders->first; other; other = other->beside)
			if ((op == VFC_OP_WRITE || other->op == VFC_OP_WRITE) && offset < other->offset + other->length &&
			    other->offset < offset + length)
				return false;
	} else {
		if (!latch_take_one(medium->latch, medium->owner, offset, ret_holder))
			return false;
		holders->ever = 0;
	}
	holders->count++;
	holders->ever++;
	return true;
}

static void stand_beside(struct bounce *bounce)
{
	struct vfc_holders *holders = &bounce->path->holders[bounce->offset / VFC_LATCH_STRIPE % LATCH_WORDS];

	bounce->beside = holders->first;
	holders->first = bounce;
}

static void free_shared(struct vfc_path *path, const struct bounce *bounce, uint64_t offset)
{
	struct vfc_holders *holders = &path->holders[offset / VFC_LATCH_STRIPE % LATCH_WORDS];

	for (struct bounce **link = &holders->first; bounce && *link; link = &(*link)->beside)
		if (*link == bounce) {
			*link = bounce->beside;
			break;
		}
	if (!--holders->count)
		latch_free_one(path->medium->latch, path->medium->owner, offset);
}

static bool may_share(struct vfc_path *path, enum vfc_op op, uint64_t offset, uint64_t length)
{
	if (op == VFC_OP_FLUSH || offset % VFC_LATCH_STRIPE + length > VFC_LATCH_STRIPE)
		return false;
	/* Lazily backed: what is touched is what is used. */
	if (!path->holders)
		path->holders = calloc(LATCH_WORDS, sizeof(*path->holders));
	return path->holders;
}

/* All stripes or none, and nothing is waited for while they are held: two commands cannot block each other. */
static bool take(struct vfc_cmd *cmd, uint64_t offset, bool *ret_shared)
{
	struct vfc_medium *medium = cmd->path->medium;

	*ret_shared = may_share(cmd->path, cmd->op, offset, cmd->length);
	if (*ret_shared)
		return take_shared(cmd->path, cmd->op, offset, cmd->length, &cmd->holder);
	return cmd->op == VFC_OP_FLUSH ||
	       !vfc_latch_take(medium->latch, medium->owner, offset, cmd->length, &cmd->holder);
}

/* bounce: NULL where there was no memory for one. */
static void let_go(struct vfc_path *path, enum vfc_op op, const struct bounce *bounce, bool shared, uint64_t offset,
		   uint64_t length)
{
	if (shared)
		free_shared(path, bounce, offset);
	else if (op != VFC_OP_FLUSH)
		vfc_latch_free(path->medium->latch, path->medium->owner, offset, length);
}

/*
 * What the page cache has is copied at once, straight to the guest: the kernel is done with its memory when the call
 * returns, and it does not wait for the device.  A path whose file is mostly not there is asked less and less often.
 */
static bool read_now(struct vfc_cmd *cmd, uint64_t offset)
{
	struct vfc_path *path = cmd->path;
	ssize_t result;

	if (path->passed < path->pass) {
		path->passed++;
		return false;
	}
	result = preadv2(path->medium->fd, cmd->iov, (int)cmd->iov_count, (off_t)offset, RWF_NOWAIT);
	path->passed = 0;
	if (result == (ssize_t)cmd->length) {
		path->pass = 0;
		return true;
	}
	path->pass = path->pass < PASS ? 2 * path->pass + 1 : PASS;
	return false;
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
	if (shared && cmd->op == VFC_OP_READ && medium->kind == VFC_MEDIUM_FILE && read_now(cmd, offset)) {
		let_go(cmd->path, cmd->op, NULL, shared, offset, cmd->length);
		return VFC_DONE;
	}
	bounce = make(pool, cmd->length);
	if (!bounce) {
		let_go(cmd->path, cmd->op, NULL, shared, offset, cmd->length);
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
	if (shared)
		stand_beside(bounce);
	if (cmd->op == VFC_OP_WRITE)
		iov_read(cmd->iov, cmd->iov_count, 0, bounce->data, bounce->length);
	cmd->path->busy++;
	cmd->priv = bounce;
	pool->bytes += bounce->length;
	pool->under_way++;
	*ret_bounce = bounce;
	return VFC_QUEUED;
}

/*
 * The kernel says only once that it lost something, and it may have said so just now: even where nobody waits for this
 * command any more, others have to hear of it.
 */
static void count_loss(const struct bounce *bounce)
{
	if (bounce->error == -ECANCELED || (bounce->op != VFC_OP_FLUSH && !bounce->fua))
		return;
	if (bounce->fua || bounce->error == -EINTR || bounce->error == -EAGAIN)
		vfc_latch_doubt(bounce->medium->latch);
	else
		vfc_latch_lost(bounce->medium->latch, bounce->medium->losses);
}

bool bounce_step(struct bounce *bounce, ssize_t result)
{
	size_t left = bounce->length - bounce->done;

	if ((result == -EINTR || result == -EAGAIN) && !bounce->cancelled)
		return false;
	if (result < 0) {
		bounce->error = (int)result;
		count_loss(bounce);
		return true;
	}
	if (bounce->op == VFC_OP_FLUSH)
		return true;
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
	let_go(bounce->path, bounce->op, bounce, bounce->shared, bounce->offset, bounce->length);
	bounce->path->busy--;
	pool->bytes -= bounce->length;
	pool->under_way--;
	discard(pool, bounce);
	return cmd;
}

struct bounce *bounce_first(struct bounce_list *list)
{
	struct bounce *bounce = list->first;

	if (bounce)
		list->first = bounce->next;
	return bounce;
}

void bounce_append(struct bounce_list *list, struct bounce *bounce)
{
	bounce->next = NULL;
	if (list->first)
		list->last->next = bounce;
	else
		list->first = bounce;
	list->last = bounce;
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
