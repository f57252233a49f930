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

/* ---------------------------------------------------------------- when the worker hears of it */

#define THREADS 16	/* of the pool */

TEST(a_cached_write_that_is_done_waits_for_no_other_file)
{
	struct vfc_msg second = { .kind = VFC_MSG_ROUTE, .route = { .lun = 1, .in_flight = VFC_FINISH } };
	struct unit beside;
	struct request write;

	one_begin(VFC_MEDIUM_DIRECT, VFC_ENGINE_NO_URING);
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	drive_close(&ring);
	drive_open(&ring, &guest, 3, VFC_RING_REQUEST, 128, 0);
	unit_open(&beside, VFC_MEDIUM_FILE, 4096, 2);
	second.route.medium = beside.medium;
	memset(second.route.mask, 0xff, sizeof(second.route.mask));
	CHECK_EQUAL(guest_ask(&guest, 0, &second).result, 0);
	/* All threads but one hang.  That one writes, and hangs next. */
	gate_close_to_reads();
	for (unsigned i = 0; i < THREADS - 1; i++) {
		struct request read = request_rw(&ring, i, OP_READ_10, i, 1);

		request_send(&ring, &read);
	}
	gate_await(THREADS - 1);
	write = request_rw(&ring, THREADS, OP_WRITE_10, 0, 1);
	request_header(&ring, &write)[3] = 1;
	drive_offer(&ring, write.head);
	drive_offer(&ring, request_rw(&ring, THREADS + 1, OP_READ_10, THREADS, 1).head);
	drive_kick(&ring);
	CHECK_EQUAL(drive_wait(&ring).head, write.head);
	gate_open();
	for (unsigned i = 0; i < THREADS; i++)
		drive_wait(&ring);
	second.route.medium = NULL;
	CHECK_EQUAL(guest_ask(&guest, 0, &second).result, 0);
	one_end();
	unit_close(&beside);
}
