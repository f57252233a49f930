/*
 * rings.c - notifications, starting and stopping, the control ring and the event ring.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <unistd.h>

#include "load.h"

static struct guest guest;
static struct driver ring;
static struct unit unit;

static void begin_role(uint32_t role, uint64_t features)
{
	guest_open(&guest, NULL);
	unit_open(&unit, VFC_MEDIUM_MEMORY, 4096, 2);
	CHECK_EQUAL(guest_route(&guest, 0, unit.medium, VFC_FINISH).result, 0);
	drive_open(&ring, &guest, 2, role, 64, features);
}

static void begin(uint64_t features)
{
	begin_role(VFC_RING_REQUEST, features);
}

static void end(void)
{
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	drive_close(&ring);
	guest_close(&guest);
	unit_close(&unit);
}

static bool called(const struct driver *driver)
{
	struct pollfd waiting = { .fd = driver->call, .events = POLLIN };
	uint64_t count;

	if (poll(&waiting, 1, 0) <= 0)
		return false;
	CHECK_EQUAL(read(driver->call, &count, sizeof(count)), sizeof(count));
	return true;
}

/* Comes back without a look at the call eventfd. */
static void spin_for(struct driver *driver)
{
	struct used used;

	while (!drive_take(driver, &used))
		guest_ping(&guest, 0);
	guest_ping(&guest, 0);
}

/* ---------------------------------------------------------------- notifications */

TEST(no_interrupt_means_no_signal)
{
	struct request request;

	begin(0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	ring.avail[0] = 1;
	request_send(&ring, &request);
	spin_for(&ring);
	CHECK(!called(&ring));
	ring.avail[0] = 0;
	request_send(&ring, &request);
	spin_for(&ring);
	CHECK(called(&ring));
	end();
}

TEST(used_event_says_when_to_signal)
{
	struct request request;

	begin(FEATURE_EVENT_IDX);
	ring.avail[0] = 1;	/* has no say with EVENT_IDX */
	ring.avail[2 + 64] = 1;	/* after the second entry */
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &request);
	spin_for(&ring);
	CHECK(!called(&ring));
	request_send(&ring, &request);
	spin_for(&ring);
	CHECK(called(&ring));
	request_send(&ring, &request);
	spin_for(&ring);
	CHECK(!called(&ring));
	end();
}

TEST(a_batch_has_one_signal)
{
	struct request requests[16];
	struct vfc_stats before;

	begin(0);
	before = guest_stats(&guest, 0);
	for (unsigned i = 0; i < 16; i++) {
		requests[i] = request_rw(&ring, i, OP_READ_10, i, 1);
		drive_offer(&ring, requests[i].head);
	}
	drive_kick(&ring);
	for (unsigned i = 0; i < 16; i++)
		CHECK_EQUAL(drive_wait(&ring).head, requests[i].head);
	guest_ping(&guest, 0);
	CHECK_EQUAL(guest_stats(&guest, 0).calls - before.calls, 1);
	end();
}

static void rearmed(uint64_t features)
{
	struct request request;

	begin(features);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	for (unsigned i = 0; i < 3; i++) {
		request_send(&ring, &request);
		drive_wait(&ring);
		guest_ping(&guest, 0);
		if (features & FEATURE_EVENT_IDX)
			CHECK_EQUAL(ring.used[2 + 4 * 64], ring.avail_index);
		else
			CHECK_EQUAL(ring.used[0], 0);
	}
	end();
}

TEST(an_empty_ring_asks_for_a_kick) { rearmed(0); }
TEST(an_empty_ring_asks_for_a_kick_with_event_idx) { rearmed(FEATURE_EVENT_IDX); }

TEST(a_new_call_fd_is_written_once)
{
	struct vfc_msg call = { .kind = VFC_MSG_RING_CALL, .index = 2 };

	begin(0);
	call.fd = ring.call;
	CHECK(!called(&ring));
	CHECK_EQUAL(guest_ask(&guest, 0, &call).result, 0);
	CHECK(called(&ring));
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	CHECK_EQUAL(guest_ask(&guest, 0, &call).result, 0);
	CHECK(!called(&ring));
	end();
}

TEST(a_ring_without_call_fd_runs)
{
	struct vfc_msg call = { .kind = VFC_MSG_RING_CALL, .index = 2, .fd = -1 };
	struct request request;

	begin(0);
	CHECK_EQUAL(guest_ask(&guest, 0, &call).result, 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &request);
	spin_for(&ring);
	CHECK(!called(&ring));
	end();
}

TEST(a_new_err_fd_hears_of_a_broken_ring)
{
	struct vfc_msg err = { .kind = VFC_MSG_RING_ERR, .index = 2 };
	uint64_t count;

	begin(0);
	err.fd = ring.call;
	CHECK_EQUAL(guest_ask(&guest, 0, &err).result, 0);
	drive_offer(&ring, 64);
	drive_kick(&ring);
	CHECK_EQUAL(guest_event(&guest, 0).kind, VFC_EVENT_BROKEN);
	CHECK(called(&ring));
	CHECK_EQUAL(read(ring.err, &count, sizeof(count)), -1);
	end();
}

TEST(enabling_looks_at_the_ring)
{
	struct request request;

	begin(0);
	drive_enable(&ring, false);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	/* The kick is used up while the ring is disabled. */
	request_send(&ring, &request);
	guest_ping(&guest, 0);
	CHECK(drive_silent(&ring, 0));
	drive_enable(&ring, true);
	CHECK_EQUAL(drive_wait(&ring).length, 108 + 512);
	end();
}

TEST(enabled_before_started)
{
	struct request request;
	struct vfc_msg start;

	guest_open(&guest, NULL);
	unit_open(&unit, VFC_MEDIUM_MEMORY, 4096, 2);
	CHECK_EQUAL(guest_route(&guest, 0, unit.medium, VFC_FINISH).result, 0);
	drive_make(&ring, &guest, 2, 64, 0);
	drive_enable(&ring, true);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	drive_offer(&ring, request.head);
	start = drive_start_msg(&ring, VFC_RING_REQUEST, 0);
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	CHECK_EQUAL(drive_wait(&ring).length, 108 + 512);
	end();
}

TEST(a_ring_without_kick_fd_is_polled)
{
	struct request request;
	struct vfc_msg start;

	begin(0);
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	start = drive_start_msg(&ring, VFC_RING_REQUEST, 0);
	start.ring.kick_fd = -1;
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	guest_ping(&guest, 0);
	drive_offer(&ring, request.head);
	CHECK_EQUAL(drive_wait(&ring).length, 108 + 512);
	end();
}

/* ---------------------------------------------------------------- stopping */

TEST(a_ring_goes_on_where_it_stopped)
{
	struct vfc_msg start;

	begin(0);
	for (unsigned round = 0; round < 3; round++) {
		struct request request = request_rw(&ring, 0, OP_READ_10, 0, 1);

		for (unsigned i = 0; i < 70; i++) {
			request_send(&ring, &request);
			drive_wait(&ring);
		}
		CHECK_EQUAL(drive_stop(&ring, 0).value, ring.avail_index);
		/* Stopped: what comes is left where it is. */
		request_send(&ring, &request);
		guest_ping(&guest, 0);
		CHECK(drive_silent(&ring, 0));
		CHECK_EQUAL(drive_stop(&ring, 0).value, ring.avail_index - 1);
		start = drive_start_msg(&ring, VFC_RING_REQUEST, (uint16_t)(ring.avail_index - 1));
		CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
		CHECK_EQUAL(drive_wait(&ring).length, 108 + 512);
	}
	end();
}

TEST(a_stop_waits_for_punts_and_then_resets_them)
{
	const uint8_t inquiry[16] = { 0x12 };
	struct vfc_msg stop = { .kind = VFC_MSG_RING_STOP, .index = 2, .value = 10000 }, start;
	struct request first, second;
	struct vfc_answer answer = { 0 };
	uint64_t seq;

	begin(0);
	first = request_make(&ring, 0, inquiry, 0, 36);
	second = request_make(&ring, 1, inquiry, 0, 36);
	request_send(&ring, &first);
	answer.handle = guest_event(&guest, 0).handle;
	seq = guest_post(&guest, 0, &stop);
	guest_ping(&guest, 0);
	/* Nothing more is fetched meanwhile, and another stop has to wait. */
	request_send(&ring, &second);
	CHECK_EQUAL(drive_stop(&ring, 0).result, -EBUSY);
	CHECK(!guest_acked(&guest, 0, seq, 0));
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
	CHECK_EQUAL(guest_ack(&guest, 0, seq).value, 1);
	CHECK_EQUAL(drive_wait(&ring).head, first.head);
	start = drive_start_msg(&ring, VFC_RING_REQUEST, 1);
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	answer.handle = guest_event(&guest, 0).handle;
	CHECK_EQUAL(drive_stop(&ring, 20).value, 2);
	CHECK_EQUAL(drive_wait(&ring).head, second.head);
	CHECK_EQUAL(request_response(&ring, &second), S_RESET);
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), -ESTALE);
	end();
}

TEST(a_punt_that_ended_unseen_is_not_shown)
{
	const uint8_t inquiry[16] = { 0x12 };
	struct vfc_msg stop = { .kind = VFC_MSG_RING_STOP, .index = 2 };
	struct request request;
	struct vfc_event event;

	begin(0);
	request = request_make(&ring, 0, inquiry, 0, 36);
	request_send(&ring, &request);
	while (!guest_stats(&guest, 0).punted)
		;
	guest_post(&guest, 0, &stop);
	CHECK_EQUAL(drive_wait(&ring).head, 0);
	/* The ack comes after the used entry, so it may not be there yet. */
	while (!vfc_next(guest.engine, 0, &event))
		;
	CHECK_EQUAL(event.kind, VFC_EVENT_ACK);
	CHECK(guest_quiet(&guest, 0, 0));
	end();
}

TEST(stopping_under_load)
{
	struct load load = { .ring = &ring, .depth = 16, .blocks = 8, .span = 4096, .write_percent = 50, .writer = 1 };
	struct vfc_msg start;

	begin(FEATURE_EVENT_IDX);
	load_start(&load);
	for (unsigned i = 0; i < 20; i++) {
		struct vfc_event stopped;

		load_await(&load, 200);
		stopped = drive_stop(&ring, 1000);
		CHECK_EQUAL(stopped.result, 0);
		/* Nothing is in flight: what was taken is used. */
		CHECK_EQUAL(__atomic_load_n(&ring.used[1], __ATOMIC_ACQUIRE), stopped.value);
		start = drive_start_msg(&ring, VFC_RING_REQUEST, (uint16_t)stopped.value);
		CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	}
	load_stop(&load);
	CHECK_EQUAL(load.reset + load.full + load.other + load.torn, 0);
	end();
}

TEST(reset_wants_stopped_rings)
{
	struct vfc_msg reset = { .kind = VFC_MSG_RESET }, start;
	struct request request;

	begin(0);
	CHECK_EQUAL(guest_ask(&guest, 0, &reset).result, -EBUSY);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &request);
	drive_wait(&ring);
	CHECK_EQUAL(drive_stop(&ring, 0).value, 1);
	CHECK_EQUAL(guest_ask(&guest, 0, &reset).result, 0);
	CHECK_EQUAL(drive_stop(&ring, 0).value, 0);
	/* Enabled is forgotten as well. */
	start = drive_start_msg(&ring, VFC_RING_REQUEST, 1);
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	request_send(&ring, &request);
	guest_ping(&guest, 0);
	CHECK(drive_silent(&ring, 0));
	drive_enable(&ring, true);
	drive_wait(&ring);
	end();
}

TEST(messages_that_cannot_be)
{
	struct vfc_msg msg = { .kind = VFC_MSG_PING };

	begin(0);
	CHECK_EQUAL(vfc_post(guest.engine, 1, &msg), -EINVAL);
	msg.kind = 0;
	CHECK_EQUAL(vfc_post(guest.engine, 0, &msg), -EINVAL);
	msg.kind = VFC_MSG_RING_MOVE + 1;
	CHECK_EQUAL(vfc_post(guest.engine, 0, &msg), -EINVAL);
	msg.kind = VFC_MSG_MEM;
	CHECK_EQUAL(vfc_post(guest.engine, 0, &msg), -EINVAL);
	msg.kind = VFC_MSG_RING_CALL;
	msg.fd = 100000;
	CHECK_EQUAL(vfc_post(guest.engine, 0, &msg), -EBADF);
	msg = drive_start_msg(&ring, VFC_RING_REQUEST, 0);
	msg.ring.err_fd = 100000;
	CHECK_EQUAL(vfc_post(guest.engine, 0, &msg), -EBADF);
	CHECK_EQUAL(vfc_fd(guest.engine, 1), -EINVAL);
	end();
}

/* ---------------------------------------------------------------- the control ring */

static uint16_t control(unsigned slot, const void *bytes, uint32_t out, uint32_t in, uint64_t *ret_in)
{
	uint16_t at = (uint16_t)(2 * slot);
	uint64_t from = guest_alloc(&guest, out + 1);

	*ret_in = guest_alloc(&guest, in + 1);
	memcpy(guest_at(&guest, from), bytes, out);
	memset(guest_at(&guest, *ret_in), 0xee, in + 1);
	drive_desc(&ring, at, from, out, D_NEXT, (uint16_t)(at + 1));
	drive_desc(&ring, (uint16_t)(at + 1), *ret_in, in, D_WRITE, 0);
	drive_offer(&ring, at);
	drive_kick(&ring);
	return at;
}

TEST(control_requests_go_to_python)
{
	const uint8_t abort_task[24] = { 0, 0, 0, 0, 5 };
	struct vfc_event event;
	struct used used;
	uint64_t in;

	begin_role(VFC_RING_CONTROL, 0);
	control(0, abort_task, 24, 1, &in);
	event = guest_event(&guest, 0);
	CHECK_EQUAL(event.kind, VFC_EVENT_CONTROL);
	CHECK_EQUAL(event.data_out_length, 24);
	CHECK_EQUAL(event.data_in_length, 1);
	CHECK_EQUAL(memcmp(event.data_out, abort_task, 24), 0);
	/* Longer than the guest's room: cut. */
	CHECK_EQUAL(vfc_reply_control(guest.engine, event.handle, (const uint8_t *)"\x0a\x0b", 2), 0);
	used = drive_wait(&ring);
	CHECK_EQUAL(used.length, 1);
	CHECK_EQUAL(*(uint8_t *)guest_at(&guest, in), 10);
	CHECK_EQUAL(*(uint8_t *)guest_at(&guest, in + 1), 0xee);
	CHECK_EQUAL(vfc_reply_control(guest.engine, event.handle, (const uint8_t *)"\x0a", 1), -ESTALE);
	end();
}

TEST(control_requests_without_sense)
{
	const uint8_t bytes[100] = { 0 };
	uint64_t in;

	begin_role(VFC_RING_CONTROL, 0);
	control(0, bytes, 3, 1, &in);
	CHECK_EQUAL(drive_wait(&ring).length, 0);
	control(0, bytes, 24, 0, &in);
	CHECK_EQUAL(drive_wait(&ring).length, 0);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_header, 2);
	/* Of a long one the beginning is kept. */
	control(0, bytes, 100, 1, &in);
	CHECK_EQUAL(guest_event(&guest, 0).data_out_length, VFC_CONTROL_MAX);
	end();
}

TEST(control_requests_of_a_stopped_ring_fail)
{
	const uint8_t manage[24] = { 0 }, query[16] = { 1 };
	uint64_t in[2];

	begin_role(VFC_RING_CONTROL, 0);
	control(0, manage, 24, 1, &in[0]);
	control(1, query, 16, 5, &in[1]);
	guest_event(&guest, 0);
	guest_event(&guest, 0);
	CHECK_EQUAL(drive_stop(&ring, 0).value, 2);
	CHECK_EQUAL(drive_wait(&ring).length, 1);
	CHECK_EQUAL(drive_wait(&ring).length, 5);
	CHECK_EQUAL(*(uint8_t *)guest_at(&guest, in[0]), S_RESET);
	CHECK_EQUAL(*(uint8_t *)guest_at(&guest, in[1] + 4), S_RESET);
	end();
}

/* ---------------------------------------------------------------- the event ring */

static uint64_t buffer(unsigned at, uint32_t length)
{
	uint64_t place = guest_alloc(&guest, 64);

	memset(guest_at(&guest, place), 0xee, 64);
	drive_desc(&ring, (uint16_t)at, place, length, D_WRITE, 0);
	drive_offer(&ring, (uint16_t)at);
	return place;
}

static uint32_t put_event(void)
{
	struct vfc_msg msg = { .kind = VFC_MSG_EVENT, .event = { 1, 2, 3 } };
	struct vfc_event ack = guest_ask(&guest, 0, &msg);

	CHECK_EQUAL(ack.result, 0);
	return ack.value;
}

static void events(uint64_t features)
{
	uint64_t place;
	struct used used;

	begin_role(VFC_RING_EVENT, features);
	place = buffer(0, 16);
	buffer(1, 16);
	drive_kick(&ring);
	CHECK_EQUAL(put_event(), 1);
	used = drive_wait(&ring);
	CHECK_EQUAL(used.head, 0);
	CHECK_EQUAL(used.length, 16);
	CHECK_EQUAL(memcmp(guest_at(&guest, place), "\1\2\3\0\0\0\0\0\0\0\0\0\0\0\0\0\xee", 17), 0);
	/* The second buffer has not been touched. */
	CHECK_EQUAL(drive_stop(&ring, 0).value, 1);
	CHECK_EQUAL(put_event(), 0);
	end();
}

TEST(events_find_buffers) { events(0); }
TEST(events_find_buffers_with_event_idx) { events(FEATURE_EVENT_IDX); }

static void waiting_events(uint64_t features)
{
	begin_role(VFC_RING_EVENT, features);
	CHECK_EQUAL(put_event(), 0);
	CHECK_EQUAL(put_event(), 0);
	CHECK(guest_quiet(&guest, 0, 0));
	buffer(0, 16);
	drive_kick(&ring);
	CHECK_EQUAL(guest_event(&guest, 0).kind, VFC_EVENT_BUFFERS);
	buffer(1, 16);
	drive_kick(&ring);
	guest_ping(&guest, 0);
	/* Once is enough. */
	CHECK(guest_quiet(&guest, 0, 0));
	CHECK_EQUAL(put_event(), 1);
	CHECK_EQUAL(put_event(), 1);
	CHECK_EQUAL(put_event(), 0);
	end();
}

TEST(buffers_after_an_event_found_none) { waiting_events(0); }
TEST(buffers_after_an_event_found_none_with_event_idx) { waiting_events(FEATURE_EVENT_IDX); }

TEST(an_event_before_there_is_a_ring)
{
	struct vfc_msg start;

	guest_open(&guest, NULL);
	unit_open(&unit, VFC_MEDIUM_MEMORY, 16, 2);
	CHECK_EQUAL(put_event(), 0);
	drive_make(&ring, &guest, 1, 64, 0);
	buffer(0, 16);
	start = drive_start_msg(&ring, VFC_RING_EVENT, 0);
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	drive_enable(&ring, true);
	CHECK_EQUAL(guest_event(&guest, 0).kind, VFC_EVENT_BUFFERS);
	CHECK_EQUAL(put_event(), 1);
	end();
}

TEST(event_buffers_that_are_too_short)
{
	begin_role(VFC_RING_EVENT, 0);
	buffer(0, 15);
	drive_desc(&ring, 1, RAM_GPA - 1, 16, D_WRITE, 0);
	drive_offer(&ring, 1);
	drive_desc(&ring, 2, RAM_GPA, 16, D_INDIRECT, 0);
	drive_offer(&ring, 2);
	drive_desc(&ring, 3, RAM_GPA, 16, D_WRITE | D_NEXT, 3);
	drive_offer(&ring, 3);
	buffer(4, 16);
	CHECK_EQUAL(put_event(), 1);
	for (unsigned i = 0; i < 4; i++)
		CHECK_EQUAL(drive_wait(&ring).length, 0);
	CHECK_EQUAL(drive_wait(&ring).length, 16);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_header, 1);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_address, 1);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_indirect, 1);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_chain, 1);
	end();
}

TEST(an_event_ring_that_breaks)
{
	begin_role(VFC_RING_EVENT, 0);
	drive_offer(&ring, 999);
	CHECK_EQUAL(put_event(), 0);
	CHECK_EQUAL(guest_event(&guest, 0).kind, VFC_EVENT_BROKEN);
	CHECK_EQUAL(put_event(), 0);
	end();
}
