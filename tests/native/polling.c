/*
 * polling.c - a ring is looked at without kicks while commands flow and for a while after, then its worker sleeps;
 * and a ring with many commands does not keep another waiting.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include "load.h"
#include "one.h"

#define LONG 10000000	/* us: longer than any test */

static void begin(uint32_t poll_us, uint64_t features)
{
	one_begin_with(VFC_MEDIUM_MEMORY, &(struct guest_options){ .poll_us = poll_us }, features);
}

static bool asks_for_kicks(void)
{
	if (ring.features & FEATURE_PACKED)
		return __atomic_load_n(&ring.used[EVENT_FLAGS], __ATOMIC_ACQUIRE) != EVENTS_DISABLE;
	if (ring.features & FEATURE_EVENT_IDX)
		return __atomic_load_n(&ring.used[2 + 4 * 64], __ATOMIC_ACQUIRE) == ring.avail_index;
	return !(__atomic_load_n(&ring.used[0], __ATOMIC_ACQUIRE) & 1);
}

static void polled(uint64_t features)
{
	struct request request;

	begin(LONG, features);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	for (unsigned i = 0; i < 100; i++) {
		/* No kick. */
		drive_offer(&ring, request.head);
		drive_wait(&ring);
		guest_ping(&guest, 0);
		CHECK(!asks_for_kicks());
	}
	CHECK_EQUAL(guest_stats(&guest, 0).kicks, 0);
	one_end();
}

TEST(a_polled_ring_needs_no_kicks) { polled(0); }
TEST(a_polled_ring_needs_no_kicks_with_event_idx) { polled(FEATURE_EVENT_IDX); }
TEST(a_polled_packed_ring_needs_no_kicks) { polled(FEATURE_PACKED); }
TEST(a_polled_packed_ring_needs_no_kicks_with_event_idx) { polled(FEATURE_PACKED | FEATURE_EVENT_IDX); }

/* After the while the driver is asked for a kick again, and one is enough: a lost one would stop this test. */
static void sleeps(uint64_t features)
{
	struct request request;

	begin(20, features);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	for (unsigned i = 0; i < 2000; i++) {
		if (i % 8 == 0)
			while (!asks_for_kicks())
				sched_yield();
		request_send(&ring, &request);
		drive_wait(&ring);
	}
	CHECK(guest_stats(&guest, 0).kicks >= 250);
	one_end();
}

TEST(a_ring_that_was_polled_asks_for_kicks) { sleeps(0); }
TEST(a_ring_that_was_polled_asks_for_kicks_with_event_idx) { sleeps(FEATURE_EVENT_IDX); }
TEST(a_packed_ring_that_was_polled_asks_for_kicks) { sleeps(FEATURE_PACKED); }
TEST(a_packed_ring_that_was_polled_asks_for_kicks_with_event_idx) { sleeps(FEATURE_PACKED | FEATURE_EVENT_IDX); }

static uint64_t milliseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* A driver that answers at once is not waited for much longer than that. */
TEST(a_ring_is_polled_as_long_as_it_pays)
{
	struct request request;
	uint64_t begun;

	begin(4000000, 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	for (unsigned i = 0; i < 200; i++) {
		drive_offer(&ring, request.head);
		drive_wait(&ring);
	}
	begun = milliseconds();
	while (!asks_for_kicks())
		usleep(1000);
	CHECK(milliseconds() - begun < 3000);
	one_end();
}

/* Whether it is looked at after a command that came so long after the last one. */
static bool looked_at_after(uint32_t gap_us)
{
	struct request request = request_rw(&ring, 0, OP_READ_10, 0, 1);

	usleep(gap_us);
	request_send(&ring, &request);
	drive_wait(&ring);
	guest_ping(&guest, 0);
	return !asks_for_kicks();
}

/* And one whose commands come later than anybody would wait is not polled at all, until they come faster. */
TEST(a_ring_whose_commands_are_far_apart_is_not_polled)
{
	begin(20000, 0);
	for (unsigned i = 0; i < 5; i++)
		looked_at_after(100000);
	CHECK(!looked_at_after(100000));
	/* A machine that is busy may let one look pass; not all of them. */
	for (unsigned i = 0; i < 10000 && !looked_at_after(0); i++)
		;
	CHECK(looked_at_after(0) || looked_at_after(0) || looked_at_after(0));
	one_end();
}

/* What the worker waits for is in the kernel; that it waits shows in its switches, which stay the same. */
static unsigned long switches(void)
{
	unsigned long sum = 0;
	DIR *tasks = opendir("/proc/self/task");

	for (struct dirent *task; (task = readdir(tasks));) {
		char path[300], line[200];
		unsigned long value;
		bool worker = false;
		FILE *status;

		snprintf(path, sizeof(path), "/proc/self/task/%s/status", task->d_name);
		status = task->d_name[0] == '.' ? NULL : fopen(path, "r");
		while (status && fgets(line, sizeof(line), status)) {
			worker |= !strcmp(line, "Name:\tvhostfc-worker\n");
			if (worker && sscanf(line, "voluntary_ctxt_switches: %lu", &value) == 1)
				sum += value;
		}
		if (status)
			fclose(status);
	}
	closedir(tasks);
	return sum;
}

static void idle(uint64_t features)
{
	struct request request;
	unsigned long before;

	begin(50, features);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &request);
	drive_wait(&ring);
	while (!asks_for_kicks())
		sched_yield();
	/* It is on its way to sleep. */
	usleep(50000);
	before = switches();
	CHECK(before);
	usleep(300000);
	CHECK_EQUAL(switches(), before);
	one_end();
}

TEST(an_idle_worker_does_not_wake) { idle(FEATURE_EVENT_IDX); }
TEST(an_idle_worker_of_a_packed_ring_does_not_wake) { idle(FEATURE_PACKED | FEATURE_EVENT_IDX); }

TEST(a_polled_ring_stops_and_goes_on)
{
	struct request request;

	begin(LONG, FEATURE_PACKED);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	for (unsigned i = 0; i < 20; i++) {
		struct vfc_event stopped;
		struct vfc_msg start;

		drive_offer(&ring, request.head);
		drive_wait(&ring);
		stopped = drive_stop(&ring, 0);
		start = drive_start_msg(&ring, VFC_RING_REQUEST, stopped.value);
		CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	}
	one_end();
}

static void under_load(uint64_t features)
{
	struct load load = { .ring = &ring, .depth = 8, .blocks = 8, .span = 4096, .write_percent = 50, .writer = 1 };

	begin(20, features);
	load_start(&load);
	load_await(&load, 5000);
	load_stop(&load);
	CHECK_EQUAL(load.reset + load.full + load.other + load.torn, 0);
	one_end();
}

TEST(polling_under_load) { under_load(0); }
TEST(polling_under_load_with_event_idx) { under_load(FEATURE_EVENT_IDX); }
TEST(polling_a_packed_ring_under_load) { under_load(FEATURE_PACKED | FEATURE_EVENT_IDX); }

static int ascending(const void *a, const void *b)
{
	uint64_t one = *(const uint64_t *)a, two = *(const uint64_t *)b;

	return one < two ? -1 : one > two;
}

/* While one ring has 64 at a time, few of them go before the one of the other. */
static void flooded(uint32_t poll_us)
{
	static struct driver flood;
	struct load load = { .ring = &flood, .depth = 64, .blocks = 8, .span = 4096, .writer = 1 };
	struct request request;
	uint64_t between[101];

	begin(poll_us, FEATURE_EVENT_IDX);
	drive_open(&flood, &guest, 3, VFC_RING_REQUEST, 256, FEATURE_EVENT_IDX);
	request = request_rw(&ring, 0, OP_READ_10, 0, 8);
	load_start(&load);
	load_await(&load, 1000);
	for (unsigned i = 0; i < 101; i++) {
		uint64_t before = guest_stats(&guest, 0).commands;

		request_send(&ring, &request);
		drive_wait(&ring);
		between[i] = guest_stats(&guest, 0).commands - before;
	}
	load_stop(&load);
	qsort(between, 101, sizeof(between[0]), ascending);
	CHECK(between[50] < 200);
	CHECK_EQUAL(drive_stop(&flood, 0).result, 0);
	drive_close(&flood);
	one_end();
}

TEST(a_flooded_ring_starves_no_other) { flooded(0); }
TEST(a_flooded_polled_ring_starves_no_other) { flooded(LONG); }

TEST(workers_stay_where_they_are_put)
{
	cpu_set_t cpus;
	unsigned cpu = 0;

	begin(0, 0);
	CHECK_EQUAL(sched_getaffinity(0, sizeof(cpus), &cpus), 0);
	while (!CPU_ISSET(cpu, &cpus))
		cpu++;
	CHECK_EQUAL(vfc_pin(guest.engine, 0, cpu), 0);
	CHECK_EQUAL(vfc_pin(guest.engine, 1, cpu), -EINVAL);
	CHECK_EQUAL(vfc_pin(guest.engine, 0, 1023), -EINVAL);
	CHECK_EQUAL(vfc_pin(guest.engine, 0, 100000), -EINVAL);
	one_end();
}
