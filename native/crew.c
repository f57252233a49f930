/*
 * crew.c - the threads that do blocking file I/O: whom they serve first, when they tell.
 *
 * The worker is told of what is finished when there is nothing left to begin, or a few are finished, or some time has
 * gone by: a thread that woke it up after each write would mostly pay for that (the two may have one CPU between them).
 * What is finished and not told of may have to wait for the next write of its thread, which is of the same load.  It
 * does not wait for another file, which may be slow: for each that is wanted somebody is called, so one of those finds
 * nothing left when a thread goes on to what it was not called for.  Where there was nobody to be called the thread
 * tells before it goes on.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "crew.h"

#define TELL 16			/* finished ones that are told of at once, */
#define TELL_NS 200000		/* and after this time */
#define STACK (128u << 10)

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000ull + (uint64_t)time.tv_nsec;
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

/* Through the page cache a file takes one write at a time. */
static bool in_turn(const struct bounce *bounce)
{
	return bounce->op == VFC_OP_WRITE && bounce->medium->kind == VFC_MEDIUM_FILE;
}

static void tell(struct crew *crew)
{
	uint64_t one = 1;

	if (crew->told || !crew->finished.first)
		return;
	crew->told = true;
	(void)!write(crew->fd, &one, sizeof(one));
}

/* The next of its file stands behind what others want. */
static void finish(struct crew *crew, struct bounce *bounce)
{
	struct vfc_path *path = bounce->path;

	bounce_append(&crew->finished, bounce);
	if (!in_turn(bounce))
		return;
	if (path->writes.first)
		bounce_append(&crew->wanted, bounce_first(&path->writes));
	else
		path->writing = false;
}

static void *serve(void *argument)
{
	struct crew *crew = argument;
	const struct vfc_path *last = NULL;
	unsigned untold = 0;
	uint64_t since = 0;

	pthread_mutex_lock(&crew->lock);
	while (!crew->quit) {
		struct bounce *bounce = bounce_first(&crew->wanted);

		if (!bounce) {
			tell(crew);
			untold = 0;
			crew->short_handed = false;
			crew->resting++;
			pthread_cond_wait(&crew->work, &crew->lock);
			crew->resting--;
			if (crew->called)
				crew->called--;
			continue;
		}
		if (untold && crew->short_handed && (!in_turn(bounce) || bounce->path != last)) {
			tell(crew);
			untold = 0;
		}
		last = bounce->path;
		bounce->begun = true;
		if (bounce->cancelled)
			bounce->error = -ECANCELED;
		pthread_mutex_unlock(&crew->lock);

		while (!bounce->error && !bounce_step(bounce, once(bounce)))
			;
		if (!untold++)
			since = now();

		pthread_mutex_lock(&crew->lock);
		finish(crew, bounce);
		if (!in_turn(bounce) || untold == TELL || now() - since > TELL_NS) {
			tell(crew);
			untold = 0;
		}
	}
	pthread_mutex_unlock(&crew->lock);
	return NULL;
}

/* One more thread, who hears no signal of the process. */
static int grow(struct crew *crew)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	int error = pthread_attr_init(&attributes);

	if (error)
		return -error;
	pthread_attr_setstacksize(&attributes, STACK);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&crew->thread[crew->threads], &attributes, serve, crew);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	if (error)
		return -error;
	pthread_setname_np(crew->thread[crew->threads], "vhostfc-files");
	crew->threads++;
	return 0;
}

/* Somebody who rests, or one more; else it has to wait for one of those who are busy. */
static void call(struct crew *crew)
{
	if (crew->resting > crew->called) {
		crew->called++;
		pthread_cond_signal(&crew->work);
	} else if (crew->threads == crew->most || grow(crew)) {
		crew->short_handed = true;
	}
}

/* The first thread may have been made before its worker, which may have been put on a CPU since; the others are heirs. */
static void settle(struct crew *crew)
{
	cpu_set_t cpus;

	crew->settled = true;
	if (!pthread_getaffinity_np(pthread_self(), sizeof(cpus), &cpus))
		pthread_setaffinity_np(crew->thread[0], sizeof(cpus), &cpus);
}

void crew_give(struct crew *crew, struct bounce *bounce)
{
	bounce_append(&crew->fresh, bounce);
}

void crew_flush(struct crew *crew)
{
	struct bounce *bounce;

	if (!crew->fresh.first)
		return;
	if (!crew->settled)
		settle(crew);
	pthread_mutex_lock(&crew->lock);
	while ((bounce = bounce_first(&crew->fresh))) {
		struct vfc_path *path = bounce->path;

		if (in_turn(bounce) && path->writing) {
			bounce_append(&path->writes, bounce);
			continue;
		}
		path->writing |= in_turn(bounce);
		bounce_append(&crew->wanted, bounce);
		call(crew);
	}
	pthread_mutex_unlock(&crew->lock);
}

struct bounce *crew_take(struct crew *crew)
{
	struct bounce *bounce;
	uint64_t rung;

	pthread_mutex_lock(&crew->lock);
	bounce = bounce_first(&crew->finished);
	if (!bounce && crew->told) {
		crew->told = false;
		(void)!read(crew->fd, &rung, sizeof(rung));
	}
	pthread_mutex_unlock(&crew->lock);
	return bounce;
}

void crew_cancel(struct crew *crew, struct bounce *bounce)
{
	pthread_mutex_lock(&crew->lock);
	if (!bounce->begun)
		bounce->cancelled = true;
	pthread_mutex_unlock(&crew->lock);
}

int crew_begin(struct crew *crew, unsigned most)
{
	int error;

	*crew = (struct crew){ .most = most < CREW_MOST ? most : CREW_MOST };
	crew->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (crew->fd < 0)
		return -errno;
	pthread_mutex_init(&crew->lock, NULL);
	pthread_cond_init(&crew->work, NULL);
	error = grow(crew);
	if (error) {
		close(crew->fd);
		pthread_mutex_destroy(&crew->lock);
		pthread_cond_destroy(&crew->work);
	}
	return error;
}

void crew_end(struct crew *crew)
{
	pthread_mutex_lock(&crew->lock);
	crew->quit = true;
	pthread_mutex_unlock(&crew->lock);
	pthread_cond_broadcast(&crew->work);
	for (unsigned i = 0; i < crew->threads; i++)
		pthread_join(crew->thread[i], NULL);
	close(crew->fd);
	pthread_mutex_destroy(&crew->lock);
	pthread_cond_destroy(&crew->work);
}
