/*
 * moves.c - rings that go from one worker to another: nothing is lost, done twice or left waiting.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <time.h>
#include <unistd.h>

#include "load.h"
#include "one.h"

static void begin(struct guest_options options, uint32_t kind, uint64_t features)
{
	options.workers = 2;
	one_begin_with(kind, &options, features);
	CHECK_EQUAL(guest_route(&guest, 1, unit.medium, VFC_FINISH).result, 0);
}

static void goes_on(uint64_t features)
{
	struct request request;

	begin((struct guest_options){ 0 }, VFC_MEDIUM_MEMORY, features);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	for (unsigned i = 0; i < 20; i++) {
		CHECK_EQUAL(guest_stats(&guest, ring.worker).commands, i / 2);
		request_send(&ring, &request);
		CHECK_EQUAL(drive_wait(&ring).head, request.head);
		CHECK_EQUAL(request_status(&ring, &request), 0);
		CHECK_EQUAL(drive_move(&ring, !ring.worker, 1000).result, 0);
	}
	CHECK_EQUAL(guest_stats(&guest, 0).commands, 10);
	CHECK_EQUAL(guest_stats(&guest, 1).commands, 10);
	/* The position goes with it. */
	CHECK_EQUAL(drive_stop(&ring, 0).value & 0x7fff, 20 * (features & FEATURE_PACKED && !ring.tables ? 3 : 1) % 64);
	one_end();
}

TEST(a_ring_moves_and_goes_on) { goes_on(0); }
TEST(a_ring_with_event_idx_moves_and_goes_on) { goes_on(FEATURE_EVENT_IDX); }
TEST(a_packed_ring_moves_and_goes_on) { goes_on(FEATURE_PACKED | FEATURE_EVENT_IDX); }

TEST(a_ring_that_is_looked_at_unasked_moves)
{
	struct request request;
	struct vfc_msg start;

	begin((struct guest_options){ 0 }, VFC_MEDIUM_MEMORY, 0);
	start = drive_start_msg(&ring, VFC_RING_REQUEST, drive_stop(&ring, 0).value);
	start.ring.kick_fd = -1;
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	for (unsigned i = 0; i < 4; i++) {
		CHECK_EQUAL(drive_move(&ring, !ring.worker, 1000).result, 0);
		drive_offer(&ring, request.head);
		drive_wait(&ring);
	}
	one_end();
}

/* What was kicked while nobody listened. */
TEST(a_kick_during_a_move_is_heard)
{
	struct request request;

	begin((struct guest_options){ 0 }, VFC_MEDIUM_MEMORY, 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	for (unsigned i = 0; i < 200; i++) {
		struct vfc_msg move = { .kind = VFC_MSG_RING_MOVE, .index = 2, .worker = !ring.worker, .value = 1000 };
		uint64_t seq = guest_post(&guest, ring.worker, &move);

		request_send(&ring, &request);
		drive_wait(&ring);
		if (guest_acked(&guest, move.worker, seq, 1000))
			ring.worker = move.worker;
	}
	one_end();
}

TEST(a_ring_that_is_disabled_moves_and_stays_so)
{
	struct request request;

	begin((struct guest_options){ 0 }, VFC_MEDIUM_MEMORY, 0);
	drive_enable(&ring, false);
	CHECK_EQUAL(drive_move(&ring, 1, 1000).result, 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &request);
	CHECK(drive_silent(&ring, 20));
	drive_enable(&ring, true);
	drive_wait(&ring);
	one_end();
}

TEST(what_cannot_move_stays)
{
	struct driver control;

	begin((struct guest_options){ 0 }, VFC_MEDIUM_MEMORY, 0);
	drive_open(&control, &guest, 0, VFC_RING_CONTROL, 64, 0);
	CHECK_EQUAL(drive_move(&control, 1, 0).result, -EINVAL);
	CHECK_EQUAL(drive_move(&ring, 0, 0).result, -EINVAL);
	drive_stop(&ring, 0);
	CHECK_EQUAL(drive_move(&ring, 1, 0).result, -EINVAL);
	ring.index = 300;
	CHECK_EQUAL(drive_move(&ring, 1, 0).result, -EINVAL);
	ring.index = 2;
	drive_stop(&control, 0);
	drive_close(&control);
	one_end();
}

TEST(there_is_no_such_worker_to_move_to)
{
	struct vfc_msg move = { .kind = VFC_MSG_RING_MOVE, .index = 2, .worker = 2 };

	begin((struct guest_options){ 0 }, VFC_MEDIUM_MEMORY, 0);
	CHECK_EQUAL(guest_ask(&guest, 0, &move).result, -EINVAL);
	one_end();
}

/* ---------------------------------------------------------------- something is in flight */

TEST(a_move_waits_for_what_is_in_flight_but_not_for_ever)
{
	struct request request;

	begin((struct guest_options){ .flags = VFC_ENGINE_NO_URING }, VFC_MEDIUM_FILE, 0);
	request = request_rw(&ring, 0, OP_WRITE_10, 0, 1);
	gate_close();
	request_send(&ring, &request);
	gate_await(1);
	CHECK_EQUAL(drive_move(&ring, 1, 20).result, -ETIMEDOUT);
	/* It goes on where it is, with what came meanwhile too. */
	gate_open();
	drive_wait(&ring);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	request_send(&ring, &request);
	drive_wait(&ring);
	CHECK_EQUAL(guest_stats(&guest, 0).commands, 2);
	CHECK_EQUAL(drive_move(&ring, 1, 1000).result, 0);
	one_end();
}

TEST(a_command_that_python_has_is_in_flight)
{
	static const uint8_t inquiry[16] = { 0x12, 0, 0, 0, 36 };
	struct vfc_answer answer = { 0 };
	struct request request;
	struct vfc_msg move = { .kind = VFC_MSG_RING_MOVE, .index = 2, .worker = 1, .value = 20000 };
	struct vfc_event event;
	uint64_t seq;

	begin((struct guest_options){ 0 }, VFC_MEDIUM_MEMORY, 0);
	request = request_make(&ring, 0, inquiry, 0, 36);
	request_send(&ring, &request);
	event = guest_event(&guest, 0);
	CHECK_EQUAL(event.kind, VFC_EVENT_PUNT);
	seq = guest_post(&guest, 0, &move);
	CHECK(!guest_acked(&guest, 1, seq, 20));
	answer.handle = event.handle;
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
	CHECK_EQUAL(guest_ack(&guest, 1, seq).result, 0);
	ring.worker = 1;
	drive_wait(&ring);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	one_end();
}

TEST(a_stop_comes_before_a_move)
{
	struct vfc_msg move = { .kind = VFC_MSG_RING_MOVE, .index = 2, .worker = 1, .value = 20000 };
	struct request request;
	struct vfc_event event;
	uint64_t seq;

	begin((struct guest_options){ .flags = VFC_ENGINE_NO_URING }, VFC_MEDIUM_FILE, 0);
	request = request_rw(&ring, 0, OP_WRITE_10, 0, 1);
	gate_close();
	request_send(&ring, &request);
	gate_await(1);
	seq = guest_post(&guest, 0, &move);
	CHECK_EQUAL(guest_ask(&guest, 0, &move).result, -EBUSY);
	CHECK_EQUAL(drive_stop(&ring, 0).value, 1);
	drive_wait(&ring);
	CHECK_EQUAL(request_response(&ring, &request), S_RESET);
	event = guest_event(&guest, 0);
	CHECK_EQUAL(event.seq, seq);
	CHECK_EQUAL(event.result, -ECANCELED);
	gate_open();
	one_end();
}

TEST(an_engine_ends_with_a_ring_on_its_way)
{
	for (unsigned i = 0; i < 50; i++) {
		struct vfc_msg move = { .kind = VFC_MSG_RING_MOVE, .index = 2, .worker = 1, .value = 1000 };

		begin((struct guest_options){ 0 }, VFC_MEDIUM_MEMORY, 0);
		guest_post(&guest, 0, &move);
		drive_close(&ring);
		guest_close(&guest);
		unit_close(&unit);
	}
}

/* ---------------------------------------------------------------- under load */

static void under_load(uint32_t kind, uint64_t features, uint32_t poll_us)
{
	struct load load = { .ring = &ring, .depth = 8, .blocks = 8, .span = 4096, .write_percent = 50, .writer = 1 };
	struct driver mover;
	unsigned moved = 0;

	begin((struct guest_options){ .poll_us = poll_us }, kind, features);
	/* The load's thread has the ring; what is asked of the workers is asked with another's face. */
	mover = ring;
	load_start(&load);
	while (moved < 100) {
		int32_t result = drive_move(&mover, !mover.worker, 1000).result;

		CHECK(!result || result == -ETIMEDOUT);
		moved += !result;
		load_await(&load, 20);
	}
	load_stop(&load);
	ring.worker = mover.worker;
	CHECK_EQUAL(load.reset + load.full + load.other + load.torn, 0);
	CHECK(guest_stats(&guest, 0).commands);
	CHECK(guest_stats(&guest, 1).commands);
	one_end();
}

TEST(moving_under_load) { under_load(VFC_MEDIUM_MEMORY, 0, 0); }
TEST(moving_under_load_with_event_idx) { under_load(VFC_MEDIUM_MEMORY, FEATURE_EVENT_IDX, 0); }
TEST(moving_a_polled_ring_under_load) { under_load(VFC_MEDIUM_MEMORY, FEATURE_EVENT_IDX, 1000); }
TEST(moving_a_packed_ring_under_load) { under_load(VFC_MEDIUM_MEMORY, FEATURE_PACKED | FEATURE_EVENT_IDX, 20); }
TEST(moving_under_load_on_a_file) { under_load(VFC_MEDIUM_FILE, FEATURE_EVENT_IDX, 20); }

/* ---------------------------------------------------------------- when there is reason to */

#define DEEP 8
#define LARGE 2048	/* blocks: the copies are the worker's, so it has more to do than who sends them */

static void flood(struct driver *driver, struct request requests[DEEP])
{
	for (unsigned slot = 0; slot < DEEP; slot++) {
		requests[slot] = request_rw(driver, slot, OP_READ_10, 0, LARGE);
		request_send(driver, &requests[slot]);
	}
}

static uint64_t milliseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* Sends again what comes back, for so many ms, or until worker 0 says that it has little rest. */
static bool says_busy(struct driver **drivers, unsigned count, uint64_t ms)
{
	uint64_t end = milliseconds() + ms;
	struct vfc_event event;
	struct used used;

	while (milliseconds() < end) {
		for (unsigned i = 0; i < count; i++)
			while (drive_take(drivers[i], &used)) {
				drive_offer(drivers[i], (uint16_t)used.head);
				drive_kick(drivers[i]);
			}
		if (!vfc_next(guest.engine, 0, &event))
			continue;
		CHECK_EQUAL(event.kind, VFC_EVENT_BUSY);
		return true;
	}
	return false;
}

TEST(a_busy_worker_with_two_rings_says_so)
{
	struct request requests[2][DEEP];
	uint64_t work[VFC_MAX_RINGS];
	struct driver other, *both[] = { &ring, &other };

	begin((struct guest_options){ .poll_us = 50 }, VFC_MEDIUM_MEMORY, 0);
	drive_open(&other, &guest, 3, VFC_RING_REQUEST, 64, 0);
	/* One ring alone has nowhere better to go. */
	flood(&ring, requests[0]);
	CHECK(!says_busy(both, 1, 1200));
	CHECK_EQUAL(vfc_work(guest.engine, 0, work), 0);
	CHECK(work[2] >= LARGE * 512 + VFC_WORK_COMMAND);
	CHECK_EQUAL(work[3], 0);
	flood(&other, requests[1]);
	CHECK(says_busy(both, 2, 60000));
	CHECK_EQUAL(drive_move(&other, 1, 10000).result, 0);
	says_busy(both, 2, 100);
	CHECK_EQUAL(vfc_work(guest.engine, 1, work), 0);
	CHECK_EQUAL(work[2], 0);
	CHECK(work[3]);
	drive_stop(&other, 10000);
	drive_close(&other);
	one_end();
}

static void says_nothing(uint32_t poll_us)
{
	struct request request, again;
	struct driver other;

	begin((struct guest_options){ .poll_us = poll_us }, VFC_MEDIUM_MEMORY, 0);
	drive_open(&other, &guest, 3, VFC_RING_REQUEST, 64, 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	again = request_rw(&other, 0, OP_READ_10, 0, 1);
	for (unsigned i = 0; i < 60; i++) {
		request_send(&ring, &request);
		request_send(&other, &again);
		drive_wait(&ring);
		drive_wait(&other);
		usleep(25000);
	}
	CHECK(guest_quiet(&guest, 0, 0));
	drive_stop(&other, 0);
	drive_close(&other);
	one_end();
}

TEST(a_worker_with_little_to_do_says_nothing) { says_nothing(0); }
TEST(a_worker_that_polls_and_has_little_to_do_says_nothing) { says_nothing(1000000); }
