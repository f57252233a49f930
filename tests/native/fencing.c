/*
 * fencing.c - what an ack promises: latches, routes that change, aborts, commands that are abandoned.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "latch.h"
#include "load.h"
#include "medium.h"
#include "one.h"
#include "worker.h"

static struct vfc_latch *open_latch(void)
{
	struct vfc_latch *latch;

	CHECK_EQUAL(vfc_latch_open(unit.latch_fd, &latch), 0);
	return latch;
}

static void await_parked(uint64_t count)
{
	while (guest_stats(&guest, 0).parked < count)
		guest_ping(&guest, 0);
}

/* ---------------------------------------------------------------- latches */

TEST(latches_by_stripe)
{
	struct vfc_latch *latch;
	uint32_t holder;

	unit_open(&unit, VFC_MEDIUM_MEMORY, 4096, 2);
	latch = open_latch();
	CHECK_EQUAL(vfc_latch_take(latch, 7, VFC_LATCH_STRIPE - 1, 2, NULL), 0);	/* stripes 0 and 1 */
	CHECK_EQUAL(vfc_latch_take(latch, 8, 0, 1, &holder), -EAGAIN);
	CHECK_EQUAL(holder, 7);
	CHECK_EQUAL(vfc_latch_take(latch, 7, 0, 1, NULL), -EAGAIN);	/* no recursion: a word is a command's */
	CHECK_EQUAL(vfc_latch_take(latch, 8, 2 * VFC_LATCH_STRIPE, 1, NULL), 0);
	CHECK_EQUAL(vfc_latch_take(latch, 9, 0, 4ull * VFC_LATCH_STRIPE, NULL), -EAGAIN);
	/* All or nothing: stripe 3 was not kept. */
	CHECK_EQUAL(vfc_latch_take(latch, 10, 3 * VFC_LATCH_STRIPE, 1, NULL), 0);
	vfc_latch_free(latch, 8, 0, 4ull * VFC_LATCH_STRIPE);	/* only its own */
	CHECK_EQUAL(vfc_latch_take(latch, 8, 0, 1, NULL), -EAGAIN);
	CHECK_EQUAL(vfc_latch_recover(latch, 7), 2);
	CHECK_EQUAL(vfc_latch_recover(latch, 0), 0);
	CHECK_EQUAL(vfc_latch_take(latch, 8, 0, 1, NULL), 0);
	CHECK_EQUAL(vfc_latch_recover(latch, 8), 1);
	CHECK_EQUAL(vfc_latch_recover(latch, 10), 1);
	/* Words are shared modulo the table, and a range beyond it takes each once. */
	CHECK_EQUAL(vfc_latch_take(latch, 8, 1ull << 40, 1ull << 40, NULL), 0);
	CHECK_EQUAL(vfc_latch_take(latch, 9, 0, 1, NULL), -EAGAIN);
	CHECK_EQUAL(vfc_latch_recover(latch, 8), VFC_LATCH_WORDS);
	vfc_latch_put(latch);
	unit_close(&unit);
}

static void killed_holder(uint32_t kind, uint32_t flags)
{
	struct vfc_latch *latch;
	struct request request;
	int status, pipes[2];
	pid_t child;
	char byte;

	unit_open(&unit, kind, 4096, 2);
	CHECK_EQUAL(pipe(pipes), 0);
	child = fork();
	if (!child) {
		latch = open_latch();
		if (vfc_latch_take(latch, 9, 0, 4096, NULL) || write(pipes[1], "", 1) != 1)
			_exit(1);
		for (;;)
			pause();
	}
	CHECK_EQUAL(read(pipes[0], &byte, 1), 1);
	kill(child, SIGKILL);
	CHECK_EQUAL(waitpid(child, &status, 0), child);
	unit_close(&unit);

	one_begin(kind, flags);
	latch = open_latch();
	CHECK_EQUAL(vfc_latch_take(latch, 9, 0, 4096, NULL), 0);
	request = request_rw(&ring, 0, OP_WRITE_10, 0, 8);
	request_send(&ring, &request);
	await_parked(1);
	CHECK(drive_silent(&ring, 5));
	/* What it did not touch goes on meanwhile. */
	{
		struct request elsewhere = request_rw(&ring, 1, OP_WRITE_10, 1024, 8);

		request_send(&ring, &elsewhere);
		CHECK_EQUAL(drive_wait(&ring).head, elsewhere.head);
	}
	CHECK_EQUAL(vfc_latch_recover(latch, 9), 1);
	CHECK_EQUAL(drive_wait(&ring).head, request.head);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	vfc_latch_put(latch);
	close(pipes[0]);
	close(pipes[1]);
	one_end();
}

TEST(a_killed_holder_is_recovered) { killed_holder(VFC_MEDIUM_MEMORY, 0); }
TEST(a_killed_holder_is_recovered_on_a_file) { killed_holder(VFC_MEDIUM_FILE, 0); }
TEST(a_killed_holder_is_recovered_without_uring) { killed_holder(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING); }

/* Writes 64 KiB of one byte after the other, as a worker does, until it is killed; its latch stays where it was. */
static void write_for_ever(int ready)
{
	static uint8_t data[VFC_LATCH_STRIPE];
	struct vfc_medium *medium = unit_again(&unit, VFC_MEDIUM_MEMORY, 9);
	struct vfc_path path = { .engine = path_media_engine(), .medium = medium };
	struct iovec whole = { data, sizeof(data) };
	struct vfc_cmd cmd = { .path = &path, .op = VFC_OP_WRITE, .blocks = 128, .iov_count = 1, .iov = &whole,
			       .length = sizeof(data) };

	if (!latch_place(medium->latch, 9, 0, &path.redo) || write(ready, "", 1) != 1)
		_exit(1);
	for (uint8_t value = 1;; value++) {
		memset(data, value, sizeof(data));
		cmd.done = 0;
		if (path.engine->ops->submit(path.engine, &cmd) != VFC_DONE)
			_exit(1);
	}
}

static unsigned torn_blocks(void)
{
	unsigned torn = 0;

	for (unsigned i = 0; i < 128; i++)
		torn += memcmp(unit.bytes + 512 * i, unit.bytes + 512 * i + 1, 511) != 0;
	return torn;
}

TEST(what_a_killed_writer_had_begun_is_finished)
{
	unsigned held = 0, torn = 0;
	struct vfc_latch *latch;

	unit_open(&unit, VFC_MEDIUM_MEMORY, 4096, 2);
	latch = open_latch();
	for (unsigned i = 0; i < 100; i++) {
		int status, pipes[2];
		pid_t child;
		char byte;

		CHECK_EQUAL(pipe(pipes), 0);
		child = fork();
		if (!child)
			write_for_ever(pipes[1]);
		CHECK_EQUAL(read(pipes[0], &byte, 1), 1);
		usleep(500 + 37 * i % 500);
		kill(child, SIGSTOP);
		kill(child, SIGKILL);
		CHECK_EQUAL(waitpid(child, &status, 0), child);
		CHECK(WIFSIGNALED(status));
		torn += torn_blocks();
		CHECK(vfc_latch_redo(latch, 9, unit.fd) >= 0);
		held += (unsigned)vfc_latch_recover(latch, 9);
		CHECK_EQUAL(torn_blocks(), 0);
		close(pipes[0]);
		close(pipes[1]);
	}
	fprintf(stderr, "of 100 writers %u were killed with the latch in hand, %u blocks were torn\n", held, torn);
	CHECK(held);
	vfc_latch_put(latch);
	unit_close(&unit);
}

/* The same without luck: killed when half of it is there. */
TEST(half_a_write_is_made_whole)
{
	struct vfc_latch *latch;
	struct vfc_redo redo, other;

	unit_open(&unit, VFC_MEDIUM_MEMORY, 4096, 2);
	latch = open_latch();
	CHECK(latch_place(latch, 9, 0, &redo));
	CHECK(latch_place(latch, 9, 1, &other));
	CHECK(redo.data != other.data);
	memset(redo.data, 0x77, 1024);
	atomic_store(redo.what, 8ull << 8 | 2);	/* as redo_copy() does: blocks 8 and 9 */
	memset(unit.bytes + 8 * 512, 0x77, 700);
	CHECK_EQUAL(vfc_latch_redo(latch, 8, unit.fd), 0);
	CHECK_EQUAL(unit.bytes[9 * 512 + 511], 0);
	CHECK_EQUAL(vfc_latch_redo(latch, 9, unit.fd), 1);
	CHECK_EQUAL(unit.bytes[9 * 512 + 511], 0x77);
	CHECK_EQUAL(unit.bytes[10 * 512], 0);
	CHECK_EQUAL(vfc_latch_redo(latch, 9, unit.fd), 0);	/* the places are nobody's */
	/* What cannot be is not done: somebody else may have written it. */
	CHECK(latch_place(latch, 9, 0, &redo));
	atomic_store(redo.what, 4095ull << 8 | 2);
	CHECK_EQUAL(vfc_latch_redo(latch, 0, unit.fd), 0);
	for (uint32_t i = 0; i < VFC_LATCH_PLACES; i++)
		CHECK(latch_place(latch, 10 + i, 0, &redo));
	CHECK(!latch_place(latch, 9, 0, &redo));
	CHECK(latch_place(latch, 10, 0, &other));
	vfc_latch_put(latch);
	unit_close(&unit);
}

TEST(who_finds_no_place_leaves_writes_to_others)
{
	struct request request;
	struct vfc_latch *latch;
	struct vfc_redo redo;

	one_begin(VFC_MEDIUM_NULL, 0);
	latch = open_latch();
	for (uint32_t i = 0; i < VFC_LATCH_PLACES; i++)
		CHECK(latch_place(latch, 10 + i, 0, &redo));
	vfc_medium_put(unit.medium);
	unit.medium = unit_again(&unit, VFC_MEDIUM_MEMORY, 2);
	CHECK_EQUAL(guest_route(&guest, 0, unit.medium, VFC_FINISH).result, 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &request);
	CHECK_EQUAL(drive_wait(&ring).head, 0);
	request = request_rw(&ring, 0, OP_WRITE_10, 0, 1);
	request_send(&ring, &request);
	CHECK_EQUAL(guest_event(&guest, 0).kind, VFC_EVENT_PUNT);
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	vfc_latch_put(latch);
	drive_close(&ring);
	guest_close(&guest);
	unit_close(&unit);
}

TEST(who_holds_a_latch_for_long_is_named)
{
	struct vfc_latch *latch;
	struct request request;
	struct vfc_event event;

	one_begin(VFC_MEDIUM_MEMORY, 0);
	latch = open_latch();
	CHECK_EQUAL(vfc_latch_take(latch, 77, 0, 512, NULL), 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &request);
	event = guest_event(&guest, 0);
	CHECK_EQUAL(event.kind, VFC_EVENT_LATCH);
	CHECK_EQUAL(event.value, 77);
	/* Once a second, not once a turn. */
	CHECK(guest_quiet(&guest, 0, 100));
	vfc_latch_free(latch, 77, 0, 512);
	drive_wait(&ring);
	/* What our own I/O holds, because its device is slow, is nobody else's business. */
	CHECK_EQUAL(vfc_latch_take(latch, 2, 0, 512, NULL), 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &request);
	CHECK(guest_quiet(&guest, 0, 1300));
	vfc_latch_free(latch, 2, 0, 512);
	drive_wait(&ring);
	vfc_latch_put(latch);
	one_end();
}

TEST(a_parked_write_goes_on_where_it_was)
{
	struct vfc_latch *latch;
	struct request request;

	one_begin(VFC_MEDIUM_MEMORY, 0);
	latch = open_latch();
	CHECK_EQUAL(vfc_latch_take(latch, 9, VFC_LATCH_STRIPE, 512, NULL), 0);
	request = request_rw(&ring, 0, OP_WRITE_10, 0, 256);
	memset(request_out(&ring, &request), 0x11, 256 * 512);
	request_send(&ring, &request);
	await_parked(1);
	/* The first stripe is written; what comes after it must stay. */
	CHECK_EQUAL(vfc_latch_take(latch, 9, 0, 512, NULL), 0);
	CHECK_EQUAL(unit.bytes[0], 0x11);
	CHECK_EQUAL(unit.bytes[VFC_LATCH_STRIPE], 0);
	unit.bytes[0] = 0x22;
	vfc_latch_free(latch, 9, 0, 512);
	vfc_latch_free(latch, 9, VFC_LATCH_STRIPE, 512);
	drive_wait(&ring);
	CHECK_EQUAL(unit.bytes[0], 0x22);
	CHECK_EQUAL(unit.bytes[VFC_LATCH_STRIPE], 0x11);
	vfc_latch_put(latch);
	one_end();
}

/* ---------------------------------------------------------------- torn blocks */

static void two_engines(uint32_t kind, uint32_t second_flags)
{
	struct guest_options options = { .flags = second_flags };
	struct guest guests[2];
	struct driver rings[2];
	struct vfc_medium *second;
	struct load loads[2];

	unit_open(&unit, kind, 256, 2);
	second = unit_again(&unit, kind, 3);
	for (unsigned i = 0; i < 2; i++) {
		guest_open(&guests[i], i ? &options : NULL);
		CHECK_EQUAL(guest_route(&guests[i], 0, i ? second : unit.medium, VFC_FINISH).result, 0);
		drive_open(&rings[i], &guests[i], 2, VFC_RING_REQUEST, 64, FEATURE_EVENT_IDX);
		memset(&loads[i], 0, sizeof(loads[i]));
		loads[i].ring = &rings[i];
		loads[i].depth = 8;
		loads[i].blocks = 8;
		loads[i].span = 256;
		loads[i].write_percent = 50;
		loads[i].writer = i + 1;
		load_start(&loads[i]);
	}
	for (unsigned i = 0; i < 2; i++)
		load_await(&loads[i], 5000);
	for (unsigned i = 0; i < 2; i++) {
		load_stop(&loads[i]);
		CHECK_EQUAL(loads[i].torn, 0);
		CHECK_EQUAL(loads[i].reset + loads[i].full + loads[i].other, 0);
		CHECK_EQUAL(drive_stop(&rings[i], 0).result, 0);
		drive_close(&rings[i]);
		guest_close(&guests[i]);
	}
	vfc_medium_put(second);
	unit_close(&unit);
}

TEST(no_torn_block_in_memory) { two_engines(VFC_MEDIUM_MEMORY, 0); }
TEST(no_torn_block_in_a_file) { two_engines(VFC_MEDIUM_FILE, 0); }
TEST(no_torn_block_in_a_file_by_uring_and_pool) { two_engines(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING); }

/* ---------------------------------------------------------------- routes */

static uint64_t post_route(struct vfc_medium *medium, uint8_t in_flight)
{
	struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .medium = medium, .in_flight = in_flight } };

	return guest_post(&guest, 0, &msg);
}

TEST(a_route_waits_for_what_is_under_way)
{
	struct request request;
	uint64_t seq;

	one_begin(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING);
	gate_close();
	request = request_rw(&ring, 0, OP_WRITE_10, 0, 1);
	memset(request_out(&ring, &request), 0x42, 512);
	request_send(&ring, &request);
	gate_await(1);
	seq = post_route(NULL, VFC_FINISH);
	guest_ping(&guest, 0);
	CHECK(!guest_acked(&guest, 0, seq, 0));
	CHECK(drive_silent(&ring, 0));
	gate_open();
	CHECK_EQUAL(guest_ack(&guest, 0, seq).result, 0);
	CHECK_EQUAL(unit.bytes[0], 0x42);
	CHECK_EQUAL(drive_wait(&ring).head, 0);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	one_end();
}

static void aborting_route(uint8_t in_flight, uint8_t response, uint8_t status)
{
	struct request request;
	uint64_t first, second;

	one_begin(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING);
	gate_close();
	request = request_rw(&ring, 0, OP_WRITE_10, 0, 1);
	memset(request_out(&ring, &request), 0x42, 512);
	request_send(&ring, &request);
	gate_await(1);
	first = post_route(unit.medium, in_flight);
	/* The guest has its answer, and its memory back; the medium may still be touched. */
	CHECK_EQUAL(drive_wait(&ring).length, 108);
	CHECK_EQUAL(request_response(&ring, &request), response);
	CHECK_EQUAL(request_status(&ring, &request), status);
	memset(request_out(&ring, &request), 0x99, 512);
	/* A later route must not be in force before an earlier one. */
	second = post_route(NULL, VFC_FINISH);
	guest_ping(&guest, 0);
	CHECK(!guest_acked(&guest, 0, second, 0));
	CHECK_EQUAL(guest_stats(&guest, 0).abandoned, 1);
	gate_open();
	CHECK_EQUAL(guest_ack(&guest, 0, first).result, 0);
	CHECK_EQUAL(guest_ack(&guest, 0, second).result, 0);
	CHECK_EQUAL(unit.bytes[0], 0x42);
	CHECK(drive_silent(&ring, 0));
	one_end();
}

TEST(a_route_that_resets) { aborting_route(VFC_ABORT_RESET, S_RESET, 0); }
TEST(a_route_that_aborts) { aborting_route(VFC_ABORT_ABORTED, S_OK, 0x40); }

TEST(a_route_after_one_that_is_gone_waits_as_well)
{
	struct request request;
	struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .flags = VFC_ROUTE_GONE } };
	uint64_t first, second;

	one_begin(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING);
	gate_close();
	request = request_rw(&ring, 0, OP_WRITE_10, 0, 1);
	request_send(&ring, &request);
	gate_await(1);
	first = guest_post(&guest, 0, &msg);
	second = guest_post(&guest, 0, &msg);
	guest_ping(&guest, 0);
	CHECK(!guest_acked(&guest, 0, second, 0));
	gate_open();
	guest_ack(&guest, 0, first);
	guest_ack(&guest, 0, second);
	drive_wait(&ring);
	one_end();
}

TEST(an_abandoned_write_keeps_its_latch)
{
	struct vfc_match all = { .response = S_ABORTED };
	struct vfc_msg abort_all = { .kind = VFC_MSG_ABORT, .match = all };
	struct vfc_latch *latch;
	struct request request;
	uint32_t holder;

	one_begin(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING);
	latch = open_latch();
	gate_close();
	request = request_rw(&ring, 0, OP_WRITE_10, 0, 1);
	request_send(&ring, &request);
	gate_await(1);
	CHECK_EQUAL(guest_ask(&guest, 0, &abort_all).value, 1);
	CHECK_EQUAL(request_response(&ring, &request), S_ABORTED);
	CHECK_EQUAL(vfc_latch_take(latch, 9, 0, 512, &holder), -EAGAIN);
	CHECK_EQUAL(holder, 2);
	gate_open();
	while (vfc_latch_take(latch, 9, 0, 512, NULL))
		guest_ping(&guest, 0);
	vfc_latch_put(latch);
	one_end();
}

static void parked_route(uint8_t in_flight)
{
	struct vfc_latch *latch;
	struct request request;
	uint64_t seq;

	one_begin(VFC_MEDIUM_MEMORY, 0);
	latch = open_latch();
	CHECK_EQUAL(vfc_latch_take(latch, 9, 0, 512, NULL), 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &request);
	await_parked(1);
	seq = post_route(NULL, in_flight);
	CHECK_EQUAL(guest_ack(&guest, 0, seq).result, 0);
	if (in_flight == VFC_FINISH) {
		/* It follows the new route, which leads to Python. */
		struct vfc_event event = guest_event(&guest, 0);
		struct vfc_answer answer = { .handle = event.handle, .status = 0x18 };

		CHECK_EQUAL(event.why, VFC_WHY_OPCODE);
		CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
		drive_wait(&ring);
		CHECK_EQUAL(request_status(&ring, &request), 0x18);
	} else {
		drive_wait(&ring);
		CHECK_EQUAL(request_response(&ring, &request), S_RESET);
	}
	vfc_latch_put(latch);
	one_end();
}

TEST(a_parked_command_follows_the_new_route) { parked_route(VFC_FINISH); }
TEST(a_parked_command_is_reset_by_a_route_that_resets) { parked_route(VFC_ABORT_RESET); }

TEST(a_route_does_not_wait_for_punts)
{
	const uint8_t reserve[16] = { 0x5f };
	struct request request;
	struct vfc_answer answer = { 0 };

	one_begin(VFC_MEDIUM_MEMORY, 0);
	request = request_make(&ring, 0, reserve, 24, 0);
	request_send(&ring, &request);
	answer.handle = guest_event(&guest, 0).handle;
	CHECK_EQUAL(guest_ack(&guest, 0, post_route(NULL, VFC_ABORT_RESET)).result, 0);
	CHECK(drive_silent(&ring, 0));
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
	drive_wait(&ring);
	one_end();
}

/* Answers what is punted, if there is anything. */
static void answer_one(uint32_t worker)
{
	struct vfc_event event;

	if (vfc_next(guest.engine, worker, &event) == 1 && event.kind == VFC_EVENT_PUNT) {
		struct vfc_answer answer = { .handle = event.handle };

		CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
	}
}

static void no_write_after_the_ack(uint32_t kind, uint32_t flags, uint8_t in_flight)
{
	struct guest_options options = { .workers = 2, .flags = flags };
	struct driver rings[2];
	struct load loads[2];
	uint8_t *snapshot;

	guest_open(&guest, &options);
	unit_open(&unit, kind, 256, 2);
	snapshot = malloc(unit.size);
	for (unsigned i = 0; i < 2; i++) {
		struct vfc_msg start, enable = { .kind = VFC_MSG_RING_ENABLE, .index = 2 + i, .value = 1 };

		CHECK_EQUAL(guest_route(&guest, i, unit.medium, VFC_FINISH).result, 0);
		drive_make(&rings[i], &guest, 2 + i, 64, FEATURE_EVENT_IDX);
		rings[i].worker = i;
		start = drive_start_msg(&rings[i], VFC_RING_REQUEST, drive_first(&rings[i]));
		CHECK_EQUAL(guest_ask(&guest, i, &start).result, 0);
		CHECK_EQUAL(guest_ask(&guest, i, &enable).result, 0);
		memset(&loads[i], 0, sizeof(loads[i]));
		loads[i].ring = &rings[i];
		loads[i].depth = 8;
		loads[i].blocks = 4;
		loads[i].span = 256;
		loads[i].write_percent = 100;
		loads[i].writer = i + 1;
		load_start(&loads[i]);
	}
	for (unsigned round = 0; round < 10; round++) {
		uint64_t seqs[2];

		for (unsigned i = 0; i < 2; i++) {
			uint64_t fast = guest_stats(&guest, i).fast;

			while (guest_stats(&guest, i).fast < fast + 100)
				answer_one(i);
		}
		/* Both workers lose the medium: from their acks on writes are punted, and only said to be done. */
		for (unsigned i = 0; i < 2; i++) {
			struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .in_flight = in_flight } };

			seqs[i] = guest_post(&guest, i, &msg);
		}
		for (unsigned i = 0; i < 2; i++) {
			CHECK_EQUAL(guest_ack(&guest, i, seqs[i]).result, 0);
			while (guest.kept_count)
				CHECK_EQUAL(vfc_reply(guest.engine, &(struct vfc_answer){
					.handle = guest.kept[--guest.kept_count].handle }), 0);
		}
		memcpy(snapshot, unit.bytes, unit.size);
		for (unsigned i = 0; i < 2; i++) {
			uint64_t punted = guest_stats(&guest, i).punted;

			while (guest_stats(&guest, i).punted < punted + 100)
				answer_one(i);
		}
		CHECK_EQUAL(memcmp(snapshot, unit.bytes, unit.size), 0);
		for (unsigned i = 0; i < 2; i++) {
			CHECK_EQUAL(guest_route(&guest, i, unit.medium, VFC_FINISH).result, 0);
			while (guest.kept_count)
				CHECK_EQUAL(vfc_reply(guest.engine, &(struct vfc_answer){
					.handle = guest.kept[--guest.kept_count].handle }), 0);
		}
	}
	for (unsigned i = 0; i < 2; i++) {
		atomic_store(&loads[i].stop, true);
		while (!atomic_load(&loads[i].done))
			answer_one(i);
		load_stop(&loads[i]);
		CHECK_EQUAL(loads[i].other + loads[i].full, 0);
		if (in_flight == VFC_FINISH)
			CHECK_EQUAL(loads[i].reset, 0);
		CHECK_EQUAL(drive_stop(&rings[i], 0).result, 0);
		drive_close(&rings[i]);
	}
	free(snapshot);
	guest_close(&guest);
	unit_close(&unit);
}

TEST(no_write_lands_after_the_ack) { no_write_after_the_ack(VFC_MEDIUM_MEMORY, 0, VFC_FINISH); }
TEST(no_write_lands_after_the_ack_on_a_file) { no_write_after_the_ack(VFC_MEDIUM_FILE, 0, VFC_FINISH); }
TEST(no_write_lands_after_a_reset_on_a_file) { no_write_after_the_ack(VFC_MEDIUM_FILE, 0, VFC_ABORT_RESET); }
TEST(no_write_lands_after_a_reset_without_uring)
{
	no_write_after_the_ack(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING, VFC_ABORT_RESET);
}

/* ---------------------------------------------------------------- abort, query */

static struct request send_tagged(unsigned slot, uint8_t opcode, uint16_t lun, uint64_t tag)
{
	const uint8_t cdb[16] = { opcode };
	struct request request = request_make(&ring, slot, cdb, 0, 36);
	uint8_t *header = request_header(&ring, &request);

	header[3] = (uint8_t)lun;
	memcpy(header + 8, &tag, 8);
	request_send(&ring, &request);
	return request;
}

TEST(abort_and_query_match)
{
	struct vfc_msg query = { .kind = VFC_MSG_QUERY }, abort_one = { .kind = VFC_MSG_ABORT };
	struct vfc_latch *latch;
	struct request request;
	uint64_t handles[3];

	one_begin(VFC_MEDIUM_MEMORY, 0);
	latch = open_latch();
	for (unsigned i = 0; i < 3; i++) {
		send_tagged(i, 0x12, (uint16_t)(i / 2), 100 + i);
		handles[i] = guest_event(&guest, 0).handle;
	}
	/* A parked one, too. */
	CHECK_EQUAL(vfc_latch_take(latch, 9, 0, 512, NULL), 0);
	request = request_rw(&ring, 3, OP_READ_10, 0, 1);
	request_send(&ring, &request);
	await_parked(1);
	CHECK_EQUAL(guest_ask(&guest, 0, &query).value, 4);
	query.match.flags = VFC_MATCH_TARGET;
	CHECK_EQUAL(guest_ask(&guest, 0, &query).value, 4);
	query.match.target = 1;
	CHECK_EQUAL(guest_ask(&guest, 0, &query).value, 0);
	query.match = (struct vfc_match){ .flags = VFC_MATCH_TARGET | VFC_MATCH_LUN, .lun = 1 };
	CHECK_EQUAL(guest_ask(&guest, 0, &query).value, 1);
	query.match = (struct vfc_match){ .flags = VFC_MATCH_TARGET | VFC_MATCH_LUN | VFC_MATCH_TAG, .tag = 102 };
	CHECK_EQUAL(guest_ask(&guest, 0, &query).value, 0);
	query.match.lun = 1;
	CHECK_EQUAL(guest_ask(&guest, 0, &query).value, 1);

	abort_one.match = query.match;
	abort_one.match.response = S_ABORTED;
	CHECK_EQUAL(guest_ask(&guest, 0, &abort_one).value, 1);
	/* The ack comes after the used entry. */
	CHECK_EQUAL(ring.used[1], 1);
	CHECK_EQUAL(drive_wait(&ring).head, 2 * 4);
	CHECK_EQUAL(guest_ask(&guest, 0, &abort_one).value, 0);
	CHECK_EQUAL(vfc_reply(guest.engine, &(struct vfc_answer){ .handle = handles[2] }), -ESTALE);
	abort_one.match = (struct vfc_match){ .response = S_RESET };
	CHECK_EQUAL(guest_ask(&guest, 0, &abort_one).value, 3);
	CHECK_EQUAL(ring.used[1], 4);
	CHECK_EQUAL(request_response(&ring, &request), S_RESET);
	CHECK_EQUAL(guest_stats(&guest, 0).aborted, 4);
	for (unsigned i = 0; i < 3; i++)
		drive_wait(&ring);
	vfc_latch_put(latch);
	one_end();
}
