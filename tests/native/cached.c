/*
 * cached.c - the threads that write through the page cache: whom they serve, when their worker hears of it, where they run.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include "one.h"
#include "worker.h"

static uint64_t seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec;
}

/* ---------------------------------------------------------------- whose ends are taken */

#define ENDS 4		/* that are taken at a time */
#define DEPTH 32

/* An io_uring engine of the test's own; what is read directly is there when it is asked for (/dev/zero). */
static struct {
	struct vfc_path_engine *engine;
	struct vfc_path direct, cached;
	uint8_t blocks[DEPTH + 1][512];
	struct iovec iovs[DEPTH + 1];
	struct vfc_cmd commands[DEPTH + 1];
} bare;

static void bare_submit(struct vfc_cmd *command)
{
	CHECK_EQUAL(bare.engine->ops->submit(bare.engine, command), VFC_QUEUED);
}

TEST(ends_of_the_ring_keep_no_cached_write_waiting)
{
	struct vfc_medium_setup setup = { .kind = VFC_MEDIUM_DIRECT, .owner = 2, .block_size = 512, .blocks = 8192 };
	struct vfc_cmd *write = &bare.commands[DEPTH], *done[ENDS];
	struct vfc_medium *zeros;
	uint64_t until = seconds() + 5;
	unsigned in_flight = DEPTH;

	if (path_uring_new(&bare.engine))
		return;
	unit_open(&unit, VFC_MEDIUM_FILE, 8192, 2);
	bare.cached = (struct vfc_path){ .engine = bare.engine, .medium = unit.medium };
	setup.fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	setup.latch_fd = unit.latch_fd;
	CHECK_EQUAL(vfc_medium_new(&setup, &zeros), 0);
	bare.direct = (struct vfc_path){ .engine = bare.engine, .medium = zeros };
	for (unsigned i = 0; i <= DEPTH; i++) {
		bare.iovs[i] = (struct iovec){ bare.blocks[i], 512 };
		bare.commands[i] = (struct vfc_cmd){
			.path = i < DEPTH ? &bare.direct : &bare.cached, .op = i < DEPTH ? VFC_OP_READ : VFC_OP_WRITE,
			.lba = i * 128, .blocks = 1, .iov = &bare.iovs[i], .iov_count = 1, .length = 512,
		};
		bare_submit(&bare.commands[i]);
	}
	/* What is read is read again, so that there is always more than is taken; the write ends all the same. */
	for (bool written = false; in_flight || !written;) {
		unsigned took;

		bare.engine->ops->flush(bare.engine);
		took = bare.engine->ops->reap(bare.engine, done, ENDS);
		for (unsigned i = 0; i < took; i++) {
			CHECK_EQUAL(done[i]->error, 0);
			if (done[i] == write)
				written = true;
			else if (written)
				in_flight--;
			else
				bare_submit(done[i]);
		}
		CHECK(written || seconds() < until);
	}
	bare.engine->ops->leave(bare.engine, &bare.direct);
	bare.engine->ops->leave(bare.engine, &bare.cached);
	CHECK(bare.engine->ops->idle(bare.engine));
	path_uring_free(bare.engine);
	vfc_medium_put(zeros);
	close(setup.fd);
	free(bare.direct.holders);
	free(bare.cached.holders);
	unit_close(&unit);
}
