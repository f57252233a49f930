/*
 * path_pool.c - files and block devices where io_uring is denied: a crew of threads does the work.
 */
#include <errno.h>
#include <stdlib.h>

#include "crew.h"
#include "worker.h"

#define THREADS 16	/* at most; a device has no more than that to do at a time */

struct pool {
	struct vfc_path_engine base;
	struct bounce_pool bounces;
	struct crew crew;
};

static struct pool *pool_of(struct vfc_path_engine *engine)
{
	return (struct pool *)engine;	/* its first member */
}

static enum vfc_submit submit(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	struct pool *pool = pool_of(engine);
	struct bounce *bounce;
	enum vfc_submit verdict = bounce_begin(&pool->bounces, cmd, &bounce);

	if (verdict == VFC_QUEUED)
		crew_give(&pool->crew, bounce);
	return verdict;
}

static void flush(struct vfc_path_engine *engine)
{
	crew_flush(&pool_of(engine)->crew);
}

static unsigned reap(struct vfc_path_engine *engine, struct vfc_cmd **done, unsigned max)
{
	struct pool *pool = pool_of(engine);
	unsigned count = 0;
	struct bounce *bounce;

	while (count < max && (bounce = crew_take(&pool->crew))) {
		done[count] = bounce_end(&pool->bounces, bounce);
		if (done[count])
			count++;
	}
	return count;
}

static void cancel(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	crew_cancel(&pool_of(engine)->crew, cmd->priv);
}

static bool abandon(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	(void)engine;
	bounce_abandon(cmd);
	return true;
}

static int wait_fd(struct vfc_path_engine *engine)
{
	return pool_of(engine)->crew.fd;
}

static bool idle(struct vfc_path_engine *engine)
{
	return !pool_of(engine)->bounces.under_way;
}

static const struct vfc_path_ops ops = {
	.name = "pool",
	.submit = submit,
	.flush = flush,
	.reap = reap,
	.cancel = cancel,
	.abandon = abandon,
	.wait_fd = wait_fd,
	.idle = idle,
};

int path_pool_new(struct vfc_path_engine **ret_engine)
{
	struct pool *pool = calloc(1, sizeof(*pool));
	int error;

	if (!pool)
		return -ENOMEM;
	pool->base.ops = &ops;
	error = crew_begin(&pool->crew, THREADS);
	if (error) {
		free(pool);
		return error;
	}
	*ret_engine = &pool->base;
	return 0;
}

void path_pool_free(struct vfc_path_engine *engine)
{
	struct pool *pool = pool_of(engine);

	crew_end(&pool->crew);
	bounce_pool_free(&pool->bounces);
	free(pool);
}
