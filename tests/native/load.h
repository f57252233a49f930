/*
 * load.h - a driver that keeps a ring busy from a thread of its own, with blocks that tell who wrote them.
 */
#ifndef LOAD_H
#define LOAD_H
#include <pthread.h>
#include <stdatomic.h>

#include "harness.h"

struct load {
	struct driver *ring;	/* the thread's alone while it runs */
	unsigned depth;		/* commands in flight, at most size / 4 */
	uint32_t blocks;	/* of a command */
	uint64_t span;		/* blocks of the unit that are used: a multiple of `blocks` */
	unsigned write_percent;
	uint32_t writer;	/* in the tags */
	atomic_bool stop;
	pthread_t thread;
	atomic_bool done;	/* nothing is in flight any more */
	/* what happened */
	_Atomic uint64_t good, reset, full, other, torn;
};

void load_start(struct load *load);
/* Lets what is in flight come back. */
void load_stop(struct load *load);
/* Waits until so many commands were good since now. */
void load_await(struct load *load, uint64_t good);

#endif
