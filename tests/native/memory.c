/*
 * memory.c - tables that change while I/O runs, and files that shrink under their mappings.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "load.h"
#include "one.h"

/* Another region, outside the first, with a memfd of its own. */
struct extra {
	int fd;
	uint8_t *bytes;
	struct vfc_map *map;
	struct vfc_mem *both;
};

#define EXTRA_GPA (RAM_GPA + (1ull << 32))
#define EXTRA_SIZE 65536

static void extra_open(struct extra *extra)
{
	struct vfc_map *maps[2];

	extra->fd = memfd_create("extra", MFD_CLOEXEC);
	CHECK_EQUAL(ftruncate(extra->fd, EXTRA_SIZE), 0);
	extra->bytes = mmap(NULL, EXTRA_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, extra->fd, 0);
	CHECK_EQUAL(vfc_map_new(extra->fd, EXTRA_GPA, EXTRA_SIZE, RAM_USER + (1ull << 32), 0, &extra->map), 0);
	maps[0] = guest.map;
	maps[1] = extra->map;
	CHECK_EQUAL(vfc_mem_new(maps, 2, &extra->both), 0);
}

static void extra_close(struct extra *extra)
{
	vfc_mem_put(extra->both);
	vfc_map_put(extra->map);
	munmap(extra->bytes, EXTRA_SIZE);
	close(extra->fd);
}

static uint64_t post_memory(struct vfc_mem *mem)
{
	struct vfc_msg msg = { .kind = VFC_MSG_MEM, .mem = mem };

	return guest_post(&guest, 0, &msg);
}

TEST(a_removed_region_stays_while_it_is_used)
{
	const uint8_t inquiry[16] = { 0x12 };
	struct request here, there;
	struct vfc_answer answers[2] = { { .data_in = (const uint8_t *)"answer", .data_in_length = 6 } };
	struct extra extra;
	uint64_t seq;

	one_begin(VFC_MEDIUM_MEMORY, 0);
	extra_open(&extra);
	guest_set_memory(&guest, extra.both);
	answers[1] = answers[0];
	here = request_make(&ring, 0, inquiry, 0, 36);
	there = request_make(&ring, 1, inquiry, 0, 36);
	ring.desc[there.head + 2].addr = EXTRA_GPA;
	request_send(&ring, &here);
	answers[0].handle = guest_event(&guest, 0).handle;
	request_send(&ring, &there);
	answers[1].handle = guest_event(&guest, 0).handle;
	/* Who uses only what stays is not waited for; who uses what goes is. */
	seq = post_memory(guest.mem);
	guest_ping(&guest, 0);
	CHECK(!guest_acked(&guest, 0, seq, 5));
	/* The caller's own hold is not what keeps the region. */
	vfc_map_put(extra.map);
	vfc_mem_put(extra.both);
	CHECK_EQUAL(vfc_reply(guest.engine, &answers[1]), 0);
	CHECK_EQUAL(guest_ack(&guest, 0, seq).result, 0);
	CHECK_EQUAL(drive_wait(&ring).length, 108 + 6);
	CHECK_EQUAL(memcmp(extra.bytes, "answer", 6), 0);
	/* And from now on it is not there. */
	request_send(&ring, &there);
	CHECK_EQUAL(drive_wait(&ring).length, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_address, 1);
	CHECK_EQUAL(vfc_reply(guest.engine, &answers[0]), 0);
	CHECK_EQUAL(drive_wait(&ring).length, 108 + 6);
	munmap(extra.bytes, EXTRA_SIZE);
	close(extra.fd);
	one_end();
}

TEST(a_region_that_is_added_waits_for_nobody)
{
	const uint8_t inquiry[16] = { 0x12 };
	struct request request;
	struct extra extra;

	one_begin(VFC_MEDIUM_MEMORY, 0);
	extra_open(&extra);
	request = request_make(&ring, 0, inquiry, 0, 36);
	request_send(&ring, &request);
	guest_event(&guest, 0);
	CHECK_EQUAL(guest_ack(&guest, 0, post_memory(extra.both)).result, 0);
	request = request_rw(&ring, 1, OP_READ_10, 3, 1);
	ring.desc[request.head + 2].addr = EXTRA_GPA + EXTRA_SIZE - 512;
	unit.bytes[3 * 512] = 0x21;
	request_send(&ring, &request);
	CHECK_EQUAL(drive_wait(&ring).length, 108 + 512);
	CHECK_EQUAL(extra.bytes[EXTRA_SIZE - 512], 0x21);
	one_end();
	extra_close(&extra);
}

TEST(a_ring_that_loses_its_memory_is_broken)
{
	struct extra extra;
	struct vfc_mem *other;
	struct vfc_event event;

	one_begin(VFC_MEDIUM_MEMORY, 0);
	extra_open(&extra);
	CHECK_EQUAL(vfc_mem_new(&extra.map, 1, &other), 0);
	CHECK_EQUAL(guest_ack(&guest, 0, post_memory(other)).result, 0);
	event = guest_event(&guest, 0);
	CHECK_EQUAL(event.kind, VFC_EVENT_BROKEN);
	CHECK_EQUAL(event.result, -EFAULT);
	drive_kick(&ring);
	guest_ping(&guest, 0);
	vfc_mem_put(other);
	one_end();
	extra_close(&extra);
}

static void changing_tables(uint32_t kind)
{
	struct load load = { .ring = &ring, .depth = 16, .blocks = 8, .span = 4096, .write_percent = 50, .writer = 1 };

	one_begin(kind, 0);
	load_start(&load);
	for (unsigned i = 0; i < 100; i++) {
		/* The same memory at other addresses of ours, as after SET_MEM_TABLE, now in one region, now in three. */
		uint64_t cuts[] = { 0, 123 * 4096, 123 * 4096 + 777, RAM_SIZE };
		struct vfc_map *maps[3];
		struct vfc_mem *mem;
		unsigned count = i % 2 ? 3 : 1;

		if (count == 1)
			cuts[1] = RAM_SIZE;
		for (unsigned n = 0; n < count; n++)
			CHECK_EQUAL(vfc_map_new(guest.fd, RAM_GPA + cuts[n], cuts[n + 1] - cuts[n], RAM_USER + cuts[n],
						cuts[n], &maps[n]), 0);
		CHECK_EQUAL(vfc_mem_new(maps, count, &mem), 0);
		for (unsigned n = 0; n < count; n++)
			vfc_map_put(maps[n]);
		guest_set_memory(&guest, mem);
		vfc_mem_put(mem);
		load_await(&load, 20);
	}
	load_stop(&load);
	CHECK_EQUAL(load.reset + load.full + load.other + load.torn, 0);
	one_end();
}

TEST(tables_change_under_load) { changing_tables(VFC_MEDIUM_MEMORY); }
TEST(tables_change_under_load_on_a_file) { changing_tables(VFC_MEDIUM_FILE); }

/* ---------------------------------------------------------------- files that shrink */

static void shrunken(uint32_t kind, uint32_t flags, uint8_t opcode)
{
	struct request request;
	struct extra extra;

	one_begin(kind, flags);
	extra_open(&extra);
	guest_set_memory(&guest, extra.both);
	request = request_rw(&ring, 0, opcode, 0, 8);
	ring.desc[request.head + (opcode == OP_WRITE_10 ? 1 : 2)].addr = EXTRA_GPA + 4096;
	request_send(&ring, &request);
	drive_wait(&ring);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	CHECK_EQUAL(ftruncate(extra.fd, 4096), 0);
	for (unsigned i = 0; i < 2; i++) {
		request_send(&ring, &request);
		CHECK_EQUAL(drive_wait(&ring).length, 108);
		CHECK_EQUAL(request_response(&ring, &request), S_FAILURE);
	}
	CHECK_EQUAL(guest_stats(&guest, 0).torn_memory, 2);
	/* Other regions are as good as before. */
	request = request_rw(&ring, 1, opcode, 0, 8);
	request_send(&ring, &request);
	drive_wait(&ring);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	one_end();
	extra_close(&extra);
}

TEST(a_read_into_memory_that_is_gone) { shrunken(VFC_MEDIUM_MEMORY, 0, OP_READ_10); }
TEST(a_write_from_memory_that_is_gone) { shrunken(VFC_MEDIUM_MEMORY, 0, OP_WRITE_10); }
TEST(a_file_read_into_memory_that_is_gone) { shrunken(VFC_MEDIUM_FILE, 0, OP_READ_10); }
TEST(a_file_write_from_memory_that_is_gone) { shrunken(VFC_MEDIUM_FILE, 0, OP_WRITE_10); }
TEST(a_pool_read_into_memory_that_is_gone) { shrunken(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING, OP_READ_10); }

TEST(a_header_in_memory_that_is_gone)
{
	struct request request;
	struct extra extra;

	one_begin(VFC_MEDIUM_MEMORY, 0);
	extra_open(&extra);
	guest_set_memory(&guest, extra.both);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	ring.desc[request.head].addr = EXTRA_GPA + 4096;
	CHECK_EQUAL(ftruncate(extra.fd, 0), 0);
	request_send(&ring, &request);
	CHECK_EQUAL(drive_wait(&ring).length, 108);
	CHECK_EQUAL(request_response(&ring, &request), S_FAILURE);
	one_end();
	extra_close(&extra);
}

TEST(a_ring_in_memory_that_is_gone)
{
	struct vfc_event event;

	one_begin(VFC_MEDIUM_MEMORY, 0);
	CHECK_EQUAL(ftruncate(guest.fd, 0), 0);
	CHECK_EQUAL(write(ring.kick, "\1\0\0\0\0\0\0", 8), 8);
	/* It may look empty once, at the page of zeros; it does not twice. */
	guest_ping(&guest, 0);
	CHECK_EQUAL(write(ring.kick, "\1\0\0\0\0\0\0", 8), 8);
	event = guest_event(&guest, 0);
	CHECK_EQUAL(event.kind, VFC_EVENT_BROKEN);
	CHECK_EQUAL(event.result, -EIO);
	one_end();
}

TEST(a_medium_that_is_gone)
{
	struct request request;
	struct vfc_event event;
	struct vfc_answer answer = { .status = 2 };

	one_begin(VFC_MEDIUM_MEMORY, 0);
	request = request_rw(&ring, 0, OP_READ_10, 1024, 8);
	CHECK_EQUAL(ftruncate(unit.fd, 4096), 0);
	request_send(&ring, &request);
	event = guest_event(&guest, 0);
	CHECK_EQUAL(event.kind, VFC_EVENT_PUNT);
	CHECK_EQUAL(event.why, VFC_WHY_MEDIUM);
	answer.handle = event.handle;
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
	drive_wait(&ring);
	/* For good: nobody knows what else is not there. */
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &request);
	CHECK_EQUAL(guest_event(&guest, 0).why, VFC_WHY_MEDIUM);
	one_end();
}

TEST(a_fault_elsewhere_is_not_ours)
{
	/* A child meets SIGBUS outside our mappings and dies of it as it would have without us. */
	pid_t child = fork();
	int status;

	if (!child) {
		int fd = memfd_create("elsewhere", MFD_CLOEXEC);
		volatile char *bytes;

		signal(SIGBUS, SIG_DFL);
		guest_open(&guest, NULL);
		if (ftruncate(fd, 4096))
			_exit(1);
		bytes = mmap(NULL, 8192, PROT_READ, MAP_SHARED, fd, 0);
		(void)bytes[4096];
		_exit(0);
	}
	CHECK_EQUAL(waitpid(child, &status, 0), child);
	CHECK(WIFSIGNALED(status));
	CHECK_EQUAL(WTERMSIG(status), SIGBUS);
}

static volatile sig_atomic_t met;

static void meet(int signo, siginfo_t *info, void *context)
{
	(void)signo;
	(void)context;
	met = 1;
	mmap((void *)((uintptr_t)info->si_addr & ~4095ul), 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

TEST(a_handler_that_was_there_before_is_called)
{
	struct sigaction action = { .sa_sigaction = meet, .sa_flags = SA_SIGINFO };
	int fd = memfd_create("elsewhere", MFD_CLOEXEC);
	volatile char *bytes;

	sigaction(SIGBUS, &action, NULL);
	one_begin(VFC_MEDIUM_MEMORY, 0);
	CHECK_EQUAL(ftruncate(fd, 4096), 0);
	bytes = mmap(NULL, 8192, PROT_READ, MAP_SHARED, fd, 0);
	CHECK_EQUAL(bytes[4096], 0);
	CHECK_EQUAL(met, 1);
	one_end();
	close(fd);
}
