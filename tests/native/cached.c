/*
 * cached.c - the threads that write through the page cache: whom they serve, when their worker hears of it, where they run.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#include "load.h"
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

/* ---------------------------------------------------------------- who waits for them */

/* One that a thread is at, and one that waits for its turn. */
static void begin_to_write(uint32_t flags, struct request writes[2])
{
	one_begin(VFC_MEDIUM_FILE, flags);
	gate_close();
	for (unsigned i = 0; i < 2; i++) {
		writes[i] = request_rw(&ring, i, OP_WRITE_10, 8 * i, 1);
		memset(request_out(&ring, &writes[i]), 0x42, 512);
		request_send(&ring, &writes[i]);
	}
	gate_await(1);
	while (guest_stats(&guest, 0).in_flight < 2)
		guest_ping(&guest, 0);
}

/* Both are answered at once; what says that the old route is over says so when no thread can write any more. */
static void an_ack_waits(uint32_t flags)
{
	struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .in_flight = VFC_ABORT_ABORTED } };
	struct request writes[2];
	uint64_t seq;

	begin_to_write(flags, writes);
	seq = guest_post(&guest, 0, &msg);
	for (unsigned i = 0; i < 2; i++) {
		drive_wait(&ring);
		CHECK_EQUAL(request_status(&ring, &writes[i]), 0x40);
	}
	CHECK(!guest_acked(&guest, 0, seq, 20));
	gate_open();
	CHECK_EQUAL(guest_ack(&guest, 0, seq).result, 0);
	CHECK_EQUAL(unit.bytes[0], 0x42);
	CHECK_EQUAL(unit.bytes[8 * 512], 0);
	one_end();
}

TEST(a_routes_ack_waits_for_a_cached_write) { an_ack_waits(0); }
TEST(a_routes_ack_waits_for_a_cached_write_without_uring) { an_ack_waits(VFC_ENGINE_NO_URING); }

TEST(an_engine_waits_for_a_cached_write)
{
	struct request writes[2];

	begin_to_write(0, writes);
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	CHECK_EQUAL(request_response(&ring, &writes[0]), S_RESET);
	CHECK_EQUAL(vfc_engine_free(guest.engine, 30), -ETIMEDOUT);
	gate_open();
	CHECK_EQUAL(vfc_engine_free(guest.engine, 10000), 0);
	CHECK_EQUAL(unit.bytes[0], 0x42);
	CHECK_EQUAL(unit.bytes[8 * 512], 0);
	drive_close(&ring);
	vfc_mem_put(guest.mem);
	vfc_map_put(guest.map);
	unit_close(&unit);
}

/* ---------------------------------------------------------------- where they run */

/* The threads of the crew are on this CPU, and on no other; how many there are. */
static unsigned threads_on(int cpu)
{
	unsigned count = 0;
	DIR *tasks = opendir("/proc/self/task");
	struct dirent *entry;
	cpu_set_t cpus;

	while ((entry = readdir(tasks))) {
		char path[64], name[32] = { 0 };
		FILE *file;

		snprintf(path, sizeof(path), "/proc/self/task/%.16s/comm", entry->d_name);
		file = fopen(path, "r");
		if (!file)
			continue;
		if (fgets(name, sizeof(name), file) && !strcmp(name, "vhostfc-files\n")) {
			CHECK_EQUAL(sched_getaffinity(atoi(entry->d_name), sizeof(cpus), &cpus), 0);
			CHECK_EQUAL(CPU_COUNT(&cpus), 1);
			CHECK(CPU_ISSET(cpu, &cpus));
			count++;
		}
		fclose(file);
	}
	closedir(tasks);
	return count;
}

static void stay_with_their_worker(uint32_t flags)
{
	struct vfc_msg second = { .kind = VFC_MSG_ROUTE, .route = { .lun = 1, .in_flight = VFC_FINISH } };
	struct unit beside;
	cpu_set_t cpus;
	int cpu = 0;

	CHECK_EQUAL(sched_getaffinity(0, sizeof(cpus), &cpus), 0);
	while (!CPU_ISSET(cpu, &cpus))
		cpu++;
	one_begin(VFC_MEDIUM_FILE, flags);
	CHECK_EQUAL(vfc_pin(guest.engine, 0, (uint32_t)cpu), 0);
	unit_open(&beside, VFC_MEDIUM_FILE, 4096, 2);
	second.route.medium = beside.medium;
	memset(second.route.mask, 0xff, sizeof(second.route.mask));
	CHECK_EQUAL(guest_ask(&guest, 0, &second).result, 0);
	gate_close();
	for (unsigned i = 0; i < 2; i++) {
		struct request write = request_rw(&ring, i, OP_WRITE_10, 0, 1);

		request_header(&ring, &write)[3] = (uint8_t)i;
		request_send(&ring, &write);
	}
	gate_await(2);
	CHECK(threads_on(cpu) >= 2);
	gate_open();
	drive_wait(&ring);
	drive_wait(&ring);
	second.route.medium = NULL;
	CHECK_EQUAL(guest_ask(&guest, 0, &second).result, 0);
	one_end();
	unit_close(&beside);
}

TEST(a_crew_stays_with_its_worker) { stay_with_their_worker(0); }
TEST(a_crew_stays_with_its_worker_without_uring) { stay_with_their_worker(VFC_ENGINE_NO_URING); }

/* ---------------------------------------------------------------- more files than threads */

#define QUEUES 2
#define FILES 100
#define SLOTS 16
#define BLOCKS 8	/* of a slot's own, in each file */

struct slot {
	struct request write, read;
	unsigned file;
	uint64_t tag;			/* being written, or 0: a read */
	uint64_t known[FILES];		/* what its blocks hold there; 0: nobody knows */
};

static struct many {
	struct guest guest;
	struct driver rings[QUEUES];
	struct unit units[FILES];
	struct slot slots[QUEUES][SLOTS];
	atomic_bool stop, done[QUEUES];
	_Atomic uint64_t good;
} many;

static void many_route(unsigned file, uint32_t worker, bool there, uint8_t in_flight)
{
	struct vfc_msg msg = {
		.kind = VFC_MSG_ROUTE,
		.route = { .lun = (uint16_t)file, .medium = there ? many.units[file].medium : NULL, .in_flight = in_flight },
	};

	memset(msg.route.mask, 0xff, sizeof(msg.route.mask));
	CHECK_EQUAL(guest_ask(&many.guest, worker, &msg).result, 0);
}

static uint32_t random_of(uint64_t *random, uint32_t below)
{
	*random = *random * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)(*random >> 33) % below;
}

static void many_send(unsigned queue, unsigned at, uint64_t *random)
{
	struct driver *ring = &many.rings[queue];
	struct slot *slot = &many.slots[queue][at];
	bool write = random_of(random, 4) > 0;
	const struct request *request = write ? &slot->write : &slot->read;
	uint8_t *header = request_header(ring, request);
	uint64_t *data = (uint64_t *)(void *)request_out(ring, request);

	slot->file = random_of(random, FILES);
	slot->tag = write ? *random | 1 : 0;
	for (unsigned i = 0; write && i < BLOCKS * 64; i++)
		data[i] = slot->tag;
	header[3] = (uint8_t)slot->file;
	/* FUA: by io_uring, where there is one, beside those of the crew */
	header[19 + 1] = write && !random_of(random, 4) ? 8 : 0;
	drive_offer(ring, request->head);
}

static void many_look(unsigned queue, unsigned at)
{
	struct driver *ring = &many.rings[queue];
	struct slot *slot = &many.slots[queue][at];
	const struct request *request = slot->tag ? &slot->write : &slot->read;
	uint8_t response = request_response(ring, request), status = request_status(ring, request);
	const uint64_t *data = (const uint64_t *)(const void *)request_in(ring, request);
	uint64_t known = slot->known[slot->file];

	if (response == S_OK && !status) {
		atomic_fetch_add(&many.good, 1);
		if (slot->tag)
			slot->known[slot->file] = slot->tag;
		for (unsigned i = 0; !slot->tag && known && i < BLOCKS * 64; i++)
			CHECK_EQUAL(data[i], known);
		return;
	}
	CHECK(response == S_RESET || (response == S_OK && status == 0x40));
	if (slot->tag)
		slot->known[slot->file] = 0;
}

static void *many_drive(void *argument)
{
	unsigned queue = *(unsigned *)argument, in_flight = 0;
	struct driver *ring = &many.rings[queue];
	uint64_t random = 77 + queue;

	for (; in_flight < SLOTS; in_flight++)
		many_send(queue, in_flight, &random);
	drive_kick(ring);
	while (in_flight) {
		unsigned at = drive_wait(ring).head / 8;

		many_look(queue, at);
		if (atomic_load(&many.stop)) {
			in_flight--;
			continue;
		}
		many_send(queue, at, &random);
		drive_kick(ring);
	}
	atomic_store(&many.done[queue], true);
	return NULL;
}

static void over_many(uint32_t flags, uint32_t poll_us)
{
	static unsigned numbers[QUEUES] = { 0, 1 };
	pthread_t threads[QUEUES];
	uint64_t random = 4711;

	guest_open(&many.guest, &(struct guest_options){ .workers = QUEUES, .flags = flags, .poll_us = poll_us });
	for (unsigned file = 0; file < FILES; file++) {
		unit_open(&many.units[file], VFC_MEDIUM_FILE, QUEUES * SLOTS * BLOCKS, 2);
		for (unsigned worker = 0; worker < QUEUES; worker++)
			many_route(file, worker, true, VFC_FINISH);
	}
	for (unsigned queue = 0; queue < QUEUES; queue++) {
		struct driver *ring = &many.rings[queue];

		drive_open(ring, &many.guest, 2 + queue, VFC_RING_REQUEST, 8 * SLOTS, 0);
		for (unsigned at = 0; at < SLOTS; at++) {
			uint64_t lba = (queue * SLOTS + at) * BLOCKS;

			many.slots[queue][at].write = request_rw(ring, 2 * at, OP_WRITE_10, lba, BLOCKS);
			many.slots[queue][at].read = request_rw(ring, 2 * at + 1, OP_READ_10, lba, BLOCKS);
		}
		CHECK_EQUAL(pthread_create(&threads[queue], NULL, many_drive, &numbers[queue]), 0);
	}
	/* Routes change, rings move, the files hang for a moment. */
	for (unsigned turn = 0; turn < 300; turn++) {
		struct driver *ring = &many.rings[turn % QUEUES];
		uint64_t good = atomic_load(&many.good);

		if (turn % 10 == 9)
			gate_close();
		if (turn % 3 == 0)
			drive_move(ring, random_of(&random, QUEUES), 20);
		if (turn % 10 == 9)
			gate_open();
		many_route(random_of(&random, FILES), random_of(&random, QUEUES), true, (uint8_t)random_of(&random, 3));
		while (atomic_load(&many.good) < good + 20)
			sched_yield();
	}
	atomic_store(&many.stop, true);
	for (unsigned queue = 0; queue < QUEUES; queue++)
		pthread_join(threads[queue], NULL);
	for (unsigned queue = 0; queue < QUEUES; queue++) {
		CHECK_EQUAL(drive_stop(&many.rings[queue], 1000).result, 0);
		for (unsigned file = 0; file < FILES; file++)
			many_route(file, queue, false, VFC_FINISH);
		CHECK_EQUAL(guest_stats(&many.guest, queue).in_flight, 0);
	}
	for (unsigned queue = 0; queue < QUEUES; queue++) {
		drive_close(&many.rings[queue]);
		for (unsigned at = 0; at < SLOTS; at++)
			for (unsigned file = 0; file < FILES; file++) {
				const struct slot *slot = &many.slots[queue][at];
				uint64_t found;

				memcpy(&found, many.units[file].bytes + (queue * SLOTS + at) * BLOCKS * 512, sizeof(found));
				CHECK(!slot->known[file] || slot->known[file] == found);
			}
	}
	guest_close(&many.guest);
	for (unsigned file = 0; file < FILES; file++)
		unit_close(&many.units[file]);
}

TEST(many_files) { over_many(0, 0); }
TEST(many_files_polled) { over_many(0, 50); }
TEST(many_files_without_uring) { over_many(VFC_ENGINE_NO_URING, 0); }
TEST(many_files_without_uring_polled) { over_many(VFC_ENGINE_NO_URING, 50); }
