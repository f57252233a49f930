/*
 * path_pool.c - files and block devices where io_uring is denied: a few threads that pread and pwrite.
 *
 * The worker and the threads share two lists and nothing else: a bounce belongs to a thread from the one list to
 * the other, but for ->cmd, which is the worker's alone.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include "bounce.h"
#include "worker.h"

#define THREADS 4

struct pool {
	struct vfc_path_engine base;
	struct bounce_pool bounces;
	pthread_mutex_t lock;
	pthread_cond_t work;
	struct bounce *wanted, **wanted_last;
	struct bounce *finished, **finished_last;
	bool quit;
	int fd;
	unsigned threads;
	pthread_t thread[THREADS];
};

static struct pool *pool_of(struct vfc_path_engine *engine)
{
	return (struct pool *)engine;	/* its first member */
}

static ssize_t once(const struct bounce *bounce)
{
	struct iovec iov = { bounce->data + bounce->done, bounce->length - bounce->done };
	off_t at = (off_t)(bounce->offset + bounce->done);
	int fd = bounce->medium->fd;
	ssize_t result;

	switch (bounce->op) {
	case VFC_OP_READ:
		result = preadv2(fd, &iov, 1, at, 0);
		break;
	case VFC_OP_WRITE:
		result = pwritev2(fd, &iov, 1, at, bounce->fua ? RWF_DSYNC : 0);
		break;
	default:
		result = fdatasync(fd);
	}
	return result < 0 ? -errno : result;
}

static void *serve(void *argument)
{
	struct pool *pool = argument;

	pthread_mutex_lock(&pool->lock);
	while (!pool->quit) {
		struct bounce *bounce = pool->wanted;
		uint64_t one = 1;
		bool was_empty;

		if (!bounce) {
			pthread_cond_wait(&pool->work, &pool->lock);
			continue;
		}
		pool->wanted = bounce->next;
		if (!pool->wanted)
			pool->wanted_last = &pool->wanted;
		if (bounce->cancelled)
			bounce->error = -ECANCELED;
		pthread_mutex_unlock(&pool->lock);

		while (!bounce->error && !bounce_step(bounce, once(bounce)))
			;

		pthread_mutex_lock(&pool->lock);
		was_empty = !pool->finished;
		bounce->next = NULL;
		*pool->finished_last = bounce;
		pool->finished_last = &bounce->next;
		/* Rung under the lock: reap() hushes it under the lock when it has taken all. */
		if (was_empty)
			(void)!write(pool->fd, &one, sizeof(one));
	}
	pthread_mutex_unlock(&pool->lock);
	return NULL;
}

static enum vfc_submit submit(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	struct pool *pool = pool_of(engine);
	struct bounce *bounce;
	enum vfc_submit verdict = bounce_begin(&pool->bounces, cmd, &bounce);

	if (verdict != VFC_QUEUED)
		return verdict;
	pthread_mutex_lock(&pool->lock);
	bounce->next = NULL;
	*pool->wanted_last = bounce;
	pool->wanted_last = &bounce->next;
	pthread_mutex_unlock(&pool->lock);
	pthread_cond_signal(&pool->work);
	return verdict;
}

static void flush(struct vfc_path_engine *engine)
{
	(void)engine;
}

static unsigned reap(struct vfc_path_engine *engine, struct vfc_cmd **done, unsigned max)
{
	struct pool *pool = pool_of(engine);
	unsigned count = 0;

	if (!pool->bounces.under_way)
		return 0;
	pthread_mutex_lock(&pool->lock);
	while (count < max && pool->finished) {
		struct bounce *bounce = pool->finished;

		pool->finished = bounce->next;
		done[count] = bounce_end(&pool->bounces, bounce);
		if (done[count])
			count++;
	}
	if (!pool->finished) {
		uint64_t rung;

		pool->finished_last = &pool->finished;
		(void)!read(pool->fd, &rung, sizeof(rung));
	}
	pthread_mutex_unlock(&pool->lock);
	return count;
}

static void cancel(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	struct pool *pool = pool_of(engine);
	struct bounce *bounce = cmd->priv;

	pthread_mutex_lock(&pool->lock);
	for (struct bounce *wanted = pool->wanted; wanted; wanted = wanted->next)
		if (wanted == bounce)
			bounce->cancelled = true;
	pthread_mutex_unlock(&pool->lock);
}

static bool abandon(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	(void)engine;
	bounce_abandon(cmd);
	return true;
}

static int wait_fd(struct vfc_path_engine *engine)
{
	return pool_of(engine)->fd;
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
	sigset_t all, before;
	int error = 0;

	if (!pool)
		return -ENOMEM;
	pool->base.ops = &ops;
	pthread_mutex_init(&pool->lock, NULL);
	pthread_cond_init(&pool->work, NULL);
	pool->wanted_last = &pool->wanted;
	pool->finished_last = &pool->finished;
	pool->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (pool->fd < 0) {
		error = -errno;
		free(pool);
		return error;
	}
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	for (; pool->threads < THREADS && !error; pool->threads += !error)
		error = -pthread_create(&pool->thread[pool->threads], NULL, serve, pool);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	/* One is enough to go on. */
	if (!pool->threads) {
		close(pool->fd);
		free(pool);
		return error;
	}
	*ret_engine = &pool->base;
	return 0;
}

void path_pool_free(struct vfc_path_engine *engine)
{
	struct pool *pool = pool_of(engine);

	pthread_mutex_lock(&pool->lock);
	pool->quit = true;
	pthread_mutex_unlock(&pool->lock);
	pthread_cond_broadcast(&pool->work);
	for (unsigned i = 0; i < pool->threads; i++)
		pthread_join(pool->thread[i], NULL);
	close(pool->fd);
	bounce_pool_free(&pool->bounces);
	free(pool);
}
