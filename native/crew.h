/*
 * crew.h - threads that do blocking file I/O for a worker.
 *
 * The worker gives them bounces and takes them back; in between a bounce is theirs, but for ->cmd, which is the worker's
 * alone.  There are as many threads as it takes, up to a limit, so one that waits for a slow file does not keep another
 * file's I/O waiting.  Through the page cache a path has one write to its file at a time, since the kernel lets no more
 * in: the others stand in the path's own queue, and a thread goes through them without going to sleep.
 */
#ifndef VFC_CREW_H
#define VFC_CREW_H
#include <pthread.h>

#include "bounce.h"

#define CREW_MOST 64

struct crew {
	/* the worker's */
	struct bounce_list fresh;	/* given since the last crew_flush() */
	int fd;				/* an eventfd: readable when crew_take() has something */
	unsigned most;
	bool settled;			/* where the worker runs */
	/* under the lock */
	pthread_mutex_t lock;
	pthread_cond_t work;
	struct bounce_list wanted;	/* each may begin at once */
	struct bounce_list finished;
	bool told;			/* the worker, of what is finished */
	bool short_handed;		/* nobody was left to be called, since it was last seen that nothing is wanted */
	bool quit;
	unsigned threads, resting, called;
	pthread_t thread[CREW_MOST];
};

/* The first thread is there, or it is -errno.  most: threads, up to CREW_MOST. */
int crew_begin(struct crew *crew, unsigned most);
/* Nothing may be under way. */
void crew_end(struct crew *crew);
void crew_give(struct crew *crew, struct bounce *bounce);
/* What was given is begun. */
void crew_flush(struct crew *crew);
/* One that is finished, or NULL. */
struct bounce *crew_take(struct crew *crew);
/* One that no thread has begun ends with -ECANCELED. */
void crew_cancel(struct crew *crew, struct bounce *bounce);

#endif
