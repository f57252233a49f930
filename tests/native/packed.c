/*
 * packed.c - packed rings: buffers in any order and of any length across the ring's end, notifications, stopping,
 * and what a driver can get wrong in this layout.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "load.h"

static struct guest guest;
static struct driver ring;
static struct unit unit;

static void begin(uint32_t size, uint64_t features)
{
	guest_open(&guest, NULL);
	unit_open(&unit, VFC_MEDIUM_MEMORY, 4096, 2);
	CHECK_EQUAL(guest_route(&guest, 0, unit.medium, VFC_FINISH).result, 0);
	drive_open(&ring, &guest, 2, VFC_RING_REQUEST, size, features | FEATURE_PACKED);
	for (unsigned block = 0; block < 4096; block++)
		memset(unit.bytes + 512 * block, (int)(block * 7 % 251), 512);
}

static void end(void)
{
	CHECK_EQUAL(guest_stats(&guest, 0).in_flight, 0);
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	drive_close(&ring);
	guest_close(&guest);
	unit_close(&unit);
}

static uint32_t place(uint16_t at, bool wrap)
{
	return at | (uint32_t)wrap << 15;
}

/* Where both sides stand when nothing is in flight. */
static uint32_t position(void)
{
	return place(ring.packed.at, ring.packed.wrap) | place(ring.packed.used_at, ring.packed.used_wrap) << 16;
}

static void set_lba(const struct request *request, uint16_t lba)
{
	uint8_t *cdb = request_header(&ring, request) + 19;

	cdb[4] = (uint8_t)(lba >> 8);
	cdb[5] = (uint8_t)lba;
}

static void is_block(const struct request *request, unsigned lba)
{
	CHECK_EQUAL(request_response(&ring, request), S_OK);
	for (unsigned i = 0; i < 512; i++)
		CHECK_EQUAL(request_in(&ring, request)[i], lba * 7 % 251);
}

static void read_one(const struct request *request, uint16_t lba)
{
	struct used used;

	set_lba(request, lba);
	memset(request_in(&ring, request), 0xee, 512);
	request_send(&ring, request);
	used = drive_wait(&ring);
	CHECK_EQUAL(used.head, request->head);
	CHECK_EQUAL(used.length, 108 + 512);
	is_block(request, lba);
}

/* ---------------------------------------------------------------- buffers */

/* Three descriptors in a ring of 13: every way to lie across its end. */
static void many_turns(uint64_t features)
{
	struct request request;

	begin(13, features);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	for (uint16_t i = 0; i < 100; i++)
		read_one(&request, i);
	CHECK_EQUAL(drive_stop(&ring, 0).value, position());
	end();
}

TEST(buffers_across_the_end_of_a_packed_ring) { many_turns(0); }
TEST(buffers_across_the_end_of_a_packed_ring_with_event_idx) { many_turns(FEATURE_EVENT_IDX); }

TEST(a_buffer_as_long_as_the_packed_ring)
{
	struct request request;

	begin(3, FEATURE_EVENT_IDX);
	ring.desc = realloc(ring.desc, 4 * sizeof(*ring.desc));
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	for (uint16_t i = 0; i < 10; i++)
		read_one(&request, i);
	end();
}

TEST(writes_through_a_packed_ring)
{
	struct request request;

	begin(16, 0);
	request = request_rw(&ring, 0, OP_WRITE_10, 9, 2);
	for (unsigned round = 0; round < 8; round++) {
		memset(request_out(&ring, &request), 0x40 + (int)round, 1024);
		request_send(&ring, &request);
		CHECK_EQUAL(drive_wait(&ring).length, 108);
		CHECK_EQUAL(unit.bytes[9 * 512], 0x40 + round);
		CHECK_EQUAL(unit.bytes[11 * 512 - 1], 0x40 + round);
	}
	end();
}

/* Buffers of 3, 2 and 3 descriptors that come back in another order: each is skipped by its own length. */
TEST(packed_buffers_used_out_of_order)
{
	const uint8_t inquiry[16] = { 0x12 }, ready[16] = { 0 };
	struct request slow, empty, fast;

	begin(16, FEATURE_EVENT_IDX);
	slow = request_make(&ring, 0, inquiry, 0, 36);
	empty = request_make(&ring, 1, ready, 0, 0);
	fast = request_rw(&ring, 2, OP_READ_10, 3, 1);
	for (unsigned i = 0; i < 40; i++) {
		struct vfc_answer answer = { 0 }, other = { 0 };

		request_send(&ring, &slow);
		answer.handle = guest_event(&guest, 0).handle;
		request_send(&ring, &empty);
		other.handle = guest_event(&guest, 0).handle;
		read_one(&fast, 3);
		CHECK_EQUAL(vfc_reply(guest.engine, &other), 0);
		CHECK_EQUAL(drive_wait(&ring).head, empty.head);
		read_one(&fast, 3);
		CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
		CHECK_EQUAL(drive_wait(&ring).head, slow.head);
	}
	end();
}

TEST(a_batch_of_packed_buffers)
{
	struct request requests[16];
	struct vfc_stats before;

	begin(61, 0);
	for (unsigned i = 0; i < 15; i++)
		requests[i] = request_rw(&ring, i, OP_READ_10, i, 1);
	for (unsigned round = 0; round < 20; round++) {
		guest_ping(&guest, 0);
		before = guest_stats(&guest, 0);
		drive_enable(&ring, false);
		for (unsigned i = 0; i < 15; i++)
			drive_offer(&ring, requests[i].head);
		drive_enable(&ring, true);
		for (unsigned i = 0; i < 15; i++)
			CHECK_EQUAL(drive_wait(&ring).head, requests[i].head);
		for (unsigned i = 0; i < 15; i++)
			is_block(&requests[i], i);
		guest_ping(&guest, 0);
		CHECK_EQUAL(guest_stats(&guest, 0).calls - before.calls, 1);
	}
	end();
}

/* ---------------------------------------------------------------- indirect tables */

static struct request indirect(unsigned slot, uint64_t *ret_table)
{
	struct request request = request_rw(&ring, slot, OP_READ_10, 0, 1);
	uint64_t table = guest_alloc(&guest, 16 * 8);
	struct packed_desc *descs = guest_at(&guest, table);

	/* 2.8.7: NEXT and the id say nothing here. */
	descs[0] = (struct packed_desc){ request.header, 51, 0xffff, 0 };
	descs[1] = (struct packed_desc){ request.response, 108, 0xffff, D_WRITE };
	descs[2] = (struct packed_desc){ request.in, 512, 0xffff, D_WRITE | D_NEXT };
	drive_desc(&ring, request.head, table, 48, D_INDIRECT, 0);
	*ret_table = table;
	return request;
}

TEST(an_indirect_table_in_a_packed_ring)
{
	struct request request;
	uint64_t table;

	begin(7, FEATURE_INDIRECT);
	request = indirect(0, &table);
	for (uint16_t i = 0; i < 50; i++)
		read_one(&request, i);
	end();
}

TEST(all_slots_of_a_packed_ring_indirect)
{
	struct request requests[32];
	uint64_t table;

	begin(128, FEATURE_INDIRECT | FEATURE_EVENT_IDX);
	for (unsigned i = 0; i < 32; i++) {
		requests[i] = indirect(i, &table);
		set_lba(&requests[i], (uint16_t)i);
	}
	for (unsigned round = 0; round < 50; round++) {
		for (unsigned i = 0; i < 32; i++)
			drive_offer(&ring, requests[i].head);
		drive_kick(&ring);
		for (unsigned i = 0; i < 32; i++)
			is_block(&requests[drive_wait(&ring).head / 4], i);
	}
	end();
}

static void rejected(const struct request *request, uint32_t length)
{
	struct used used;

	memset(guest_at(&guest, request->response), 0xee, 108);
	drive_offer(&ring, request->head);
	drive_kick(&ring);
	used = drive_wait(&ring);
	CHECK_EQUAL(used.head, request->head);
	CHECK_EQUAL(used.length, length);
	CHECK_EQUAL(request_response(&ring, request), length ? S_FAILURE : 0xee);
}

TEST(indirect_tables_that_cannot_be_in_a_packed_ring)
{
	const uint32_t bad[] = { 0, 8, 47, 16 * 1025, 0xfffffff0 };
	struct packed_desc *descs;
	struct request request;
	uint64_t table;

	begin(16, FEATURE_INDIRECT);
	request = indirect(0, &table);
	descs = guest_at(&guest, table);
	for (unsigned i = 0; i < 5; i++) {
		drive_desc(&ring, 0, table, bad[i], D_INDIRECT, 0);
		rejected(&request, 0);
	}
	/* 2.8.7: alone in its buffer, neither before nor behind others */
	drive_desc(&ring, 0, table, 48, D_INDIRECT | D_NEXT, 1);
	rejected(&request, 0);
	drive_desc(&ring, 0, request.header, 51, D_NEXT, 1);
	drive_desc(&ring, 1, table + 16, 32, D_INDIRECT, 0);
	rejected(&request, 0);
	drive_desc(&ring, 0, table, 48, D_INDIRECT, 0);
	descs[2].flags = D_WRITE | D_INDIRECT;
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_indirect, 8);
	descs[2].flags = 0;
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_chain, 1);
	descs[2].flags = D_WRITE;
	drive_desc(&ring, 0, RAM_GPA + RAM_SIZE - 16, 32, D_INDIRECT, 0);
	rejected(&request, 0);
	drive_desc(&ring, 0, ~0ull - 15, 32, D_INDIRECT, 0);
	rejected(&request, 0);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_address, 2);
	drive_desc(&ring, 0, table, 48, D_INDIRECT, 0);
	read_one(&request, 5);
	end();
}

TEST(an_indirect_table_in_a_packed_ring_without_the_feature)
{
	struct request request;
	uint64_t table;

	begin(16, 0);
	request = indirect(0, &table);
	rejected(&request, 0);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_indirect, 1);
	end();
}

/* ---------------------------------------------------------------- chains */

TEST(packed_chains_that_cannot_be)
{
	struct request request;

	begin(16, 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	drive_desc(&ring, 2, request.in, 512, 0, 0);
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_chain, 1);
	drive_desc(&ring, 2, RAM_GPA + RAM_SIZE - 511, 512, D_WRITE, 0);
	rejected(&request, 108);
	drive_desc(&ring, 2, ~0ull - 255, 512, D_WRITE, 0);
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_address, 2);
	drive_desc(&ring, 2, request.in, 512, D_WRITE, 0);
	drive_desc(&ring, 0, request.header, 50, D_NEXT, 1);
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_header, 1);
	drive_desc(&ring, 0, request.header, 51, D_NEXT, 1);
	read_one(&request, 5);
	end();
}

static void broken(int error)
{
	struct vfc_event event = guest_event(&guest, 0);
	uint64_t count = 0;

	CHECK_EQUAL(event.kind, VFC_EVENT_BROKEN);
	CHECK_EQUAL(event.index, 2);
	CHECK_EQUAL(event.result, error);
	CHECK_EQUAL(read(ring.err, &count, sizeof(count)), sizeof(count));
}

/* A driver that begins anew, over cleared memory. */
static void mended(void)
{
	struct request request;
	struct vfc_msg start;

	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	memset(ring.packed.ring, 0, 16 * ring.size);
	memset(ring.packed.counts, 0, 2 * ring.size);
	ring.packed.at = ring.packed.used_at = ring.packed.kicked = 0;
	ring.packed.wrap = ring.packed.used_wrap = true;
	start = drive_start_msg(&ring, VFC_RING_REQUEST, drive_first(&ring));
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	request = request_rw(&ring, 3, OP_READ_10, 0, 1);
	for (uint16_t i = 0; i < 20; i++)
		read_one(&request, i);
	end();
}

TEST(an_id_outside_the_packed_ring)
{
	struct request request;

	begin(16, 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	read_one(&request, 1);
	drive_raw(&ring, request.header, 51, 0, 16);
	drive_kick(&ring);
	broken(-EINVAL);
	/* It stays where the bad one is. */
	CHECK_EQUAL(drive_stop(&ring, 0).value, place(3, true) | place(3, true) << 16);
	mended();
}

TEST(an_id_that_is_in_flight)
{
	const uint8_t inquiry[16] = { 0x12 };
	struct request request;

	begin(16, 0);
	request = request_make(&ring, 0, inquiry, 0, 36);
	request_send(&ring, &request);
	CHECK_EQUAL(guest_event(&guest, 0).kind, VFC_EVENT_PUNT);
	drive_raw(&ring, request.header, 51, 0, 0);
	drive_kick(&ring);
	broken(-EBUSY);
	CHECK_EQUAL(guest_stats(&guest, 0).in_flight, 1);
	mended();
}

TEST(a_chain_without_end_in_a_packed_ring)
{
	begin(16, 0);
	for (unsigned i = 0; i < 16; i++)
		ring.packed.ring[i] = (struct packed_desc){ RAM_GPA, 1, 0, D_NEXT | D_AVAIL };
	drive_kick(&ring);
	broken(-ELOOP);
	CHECK_EQUAL(drive_stop(&ring, 0).value, drive_first(&ring));
	mended();
}

TEST(positions_that_are_none_in_a_packed_ring)
{
	const uint32_t bad[] = { 13, 0x8000u | 13, 13u << 16, 0xffff0000, 0x7fff };
	struct vfc_msg start;

	begin(13, 0);
	CHECK_EQUAL(drive_stop(&ring, 0).value, drive_first(&ring));
	for (unsigned i = 0; i < 5; i++) {
		start = drive_start_msg(&ring, VFC_RING_REQUEST, bad[i]);
		CHECK_EQUAL(guest_ask(&guest, 0, &start).result, -EINVAL);
	}
	start = drive_start_msg(&ring, VFC_RING_REQUEST, drive_first(&ring));
	for (unsigned i = 0; i < 3; i++) {
		struct vfc_msg part = start;

		*(i == 0 ? &part.ring.desc : i == 1 ? &part.ring.avail : &part.ring.used) = RAM_USER + RAM_SIZE;
		CHECK_EQUAL(guest_ask(&guest, 0, &part).result, -EFAULT);
		*(i == 0 ? &part.ring.desc : i == 1 ? &part.ring.avail : &part.ring.used) = RAM_USER + 2;
		CHECK_EQUAL(guest_ask(&guest, 0, &part).result, -EINVAL);
	}
	start.ring.size = 32769;
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, -EINVAL);
	start.ring.size = 13;
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	end();
}

static atomic_bool flipping;

/* Everything but the id and the turn of the first two descriptors of each buffer. */
static void *flip(void *table)
{
	volatile struct packed_desc *descs = table;

	for (uint64_t i = 0; atomic_load(&flipping); i++) {
		descs[0].flags = (uint16_t)(i % 3 ? 0 : i % 2 ? D_INDIRECT : D_WRITE);
		descs[1].addr = i % 5 ? RAM_GPA + 8192 : ~0ull - 20;
		descs[1].flags = (uint16_t)(i % 7 ? D_WRITE : D_NEXT);
		descs[2].len = i % 11 ? 512 : 0xffffffff;
	}
	return NULL;
}

#ifdef __SANITIZE_THREAD__
#define UNDER_TSAN true
#else
#define UNDER_TSAN false
#endif

static bool met_both(void)
{
	struct vfc_stats stats = guest_stats(&guest, 0);

	return stats.fast && stats.bad_chain + stats.bad_address + stats.bad_indirect;
}

TEST(an_indirect_table_of_a_packed_ring_that_changes_under_us)
{
	struct request request;
	pthread_t thread;
	uint64_t table;

	begin(16, FEATURE_INDIRECT);
	guest_alloc(&guest, 16384);
	request = indirect(0, &table);
	atomic_store(&flipping, true);
	CHECK_EQUAL(pthread_create(&thread, NULL, flip, guest_at(&guest, table)), 0);
	/* As long as it takes to see both, where the other thread does not run much; under TSan races are all it is about. */
	for (unsigned i = 0; i < 20000 || (!UNDER_TSAN && i < 2000000 && !met_both()); i++) {
		struct vfc_event event;
		struct used used;

		request_send(&ring, &request);
		while (!drive_take(&ring, &used))
			if (vfc_next(guest.engine, 0, &event) == 1 && event.kind == VFC_EVENT_PUNT) {
				struct vfc_answer answer = { .handle = event.handle, .status = 2 };

				CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
			}
		CHECK(used.length == 0 || used.length == 108 || used.length == 108 + 512);
	}
	atomic_store(&flipping, false);
	pthread_join(thread, NULL);
	CHECK(UNDER_TSAN || met_both());
	end();
}

/* Lengths of chains that change between counting and gathering: the count of the first look is what holds. */
__attribute__((no_sanitize_thread)) static void *flip_ring(void *argument)
{
	volatile struct packed_desc *descs = argument;

	for (uint64_t i = 0; atomic_load(&flipping); i++) {
		descs[1].len = i % 3 ? 108 : 0xffffffff;
		descs[1].addr = i % 5 ? RAM_GPA + 8192 : ~0ull - 20;
	}
	return NULL;
}

TEST(descriptors_of_a_packed_ring_that_change_under_us)
{
	struct request request;
	pthread_t thread;

	begin(3, 0);
	ring.desc = realloc(ring.desc, 4 * sizeof(*ring.desc));
	guest_alloc(&guest, 16384);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	atomic_store(&flipping, true);
	CHECK_EQUAL(pthread_create(&thread, NULL, flip_ring, ring.packed.ring), 0);
	for (unsigned i = 0; i < 20000; i++) {
		struct vfc_event event;

		request_send(&ring, &request);
		/* A used entry goes over the first descriptor only. */
		while (!(__atomic_load_n(&ring.packed.ring[0].flags, __ATOMIC_ACQUIRE) & D_USED) == ring.packed.used_wrap)
			if (vfc_next(guest.engine, 0, &event) == 1 && event.kind == VFC_EVENT_PUNT) {
				struct vfc_answer answer = { .handle = event.handle, .status = 2 };

				CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
			}
		drive_wait(&ring);
	}
	atomic_store(&flipping, false);
	pthread_join(thread, NULL);
	end();
}

/* ---------------------------------------------------------------- notifications */

static bool called(void)
{
	struct pollfd waiting = { .fd = ring.call, .events = POLLIN };
	uint64_t count;

	if (poll(&waiting, 1, 0) <= 0)
		return false;
	CHECK_EQUAL(read(ring.call, &count, sizeof(count)), sizeof(count));
	return true;
}

/* One batch of reads, without a look at the call eventfd. */
static void batch(const struct request *requests, unsigned count)
{
	struct used used;

	drive_enable(&ring, false);
	for (unsigned i = 0; i < count; i++)
		drive_offer(&ring, requests[i].head);
	drive_enable(&ring, true);
	for (unsigned i = 0; i < count; i++)
		while (!drive_take(&ring, &used))
			guest_ping(&guest, 0);
	guest_ping(&guest, 0);
}

/* The wish at every place of the ring, in batches of one to four: a signal for the batch that uses that place. */
static void wishes(uint32_t size)
{
	struct request requests[4];

	begin(size, FEATURE_INDIRECT | FEATURE_EVENT_IDX);
	for (unsigned i = 0; i < 4; i++) {
		uint64_t table;

		requests[i] = indirect(i, &table);
	}
	for (unsigned ahead = 0; ahead < size; ahead++)
		for (unsigned count = 1; count <= 4; count++) {
			uint16_t at = (uint16_t)(ring.packed.used_at + ahead);
			bool wrap = ring.packed.used_wrap;

			if (at >= size) {
				at = (uint16_t)(at - size);
				wrap = !wrap;
			}
			__atomic_store_n(&ring.avail[EVENT_PLACE], (uint16_t)place(at, wrap), __ATOMIC_RELAXED);
			__atomic_store_n(&ring.avail[EVENT_FLAGS], EVENTS_DESC, __ATOMIC_RELEASE);
			called();
			batch(requests, count);
			CHECK_EQUAL(called(), ahead < count);
		}
	end();
}

TEST(wishes_for_a_signal_at_each_place) { wishes(16); }
TEST(wishes_for_a_signal_at_each_place_of_an_odd_ring) { wishes(19); }

TEST(wishes_for_signals_always_and_never)
{
	struct request request;

	begin(16, FEATURE_EVENT_IDX);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	for (unsigned i = 0; i < 20; i++) {
		__atomic_store_n(&ring.avail[EVENT_FLAGS], EVENTS_DISABLE, __ATOMIC_RELEASE);
		batch(&request, 1);
		CHECK(!called());
		__atomic_store_n(&ring.avail[EVENT_FLAGS], EVENTS_ENABLE, __ATOMIC_RELEASE);
		batch(&request, 1);
		CHECK(called());
	}
	end();
}

static void rearmed(uint64_t features)
{
	struct request request;

	begin(13, features);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	for (uint16_t i = 0; i < 30; i++) {
		read_one(&request, i);
		guest_ping(&guest, 0);
		if (features & FEATURE_EVENT_IDX) {
			CHECK_EQUAL(ring.used[EVENT_FLAGS], EVENTS_DESC);
			CHECK_EQUAL(ring.used[EVENT_PLACE], place(ring.packed.at, ring.packed.wrap));
		} else {
			CHECK_EQUAL(ring.used[EVENT_FLAGS], EVENTS_ENABLE);
		}
	}
	end();
}

TEST(an_empty_packed_ring_asks_for_a_kick) { rearmed(0); }
TEST(an_empty_packed_ring_asks_for_a_kick_with_event_idx) { rearmed(FEATURE_EVENT_IDX); }

/* ---------------------------------------------------------------- stopping, load */

TEST(a_packed_ring_goes_on_where_it_stopped)
{
	struct request request;

	begin(13, 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	for (uint16_t i = 0; i < 40; i++) {
		struct vfc_event stopped;
		struct vfc_msg start;

		read_one(&request, i);
		stopped = drive_stop(&ring, 0);
		CHECK_EQUAL(stopped.value, position());
		start = drive_start_msg(&ring, VFC_RING_REQUEST, stopped.value);
		CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	}
	end();
}

TEST(what_a_packed_ring_has_when_it_stops_is_answered)
{
	const uint8_t inquiry[16] = { 0x12 };
	struct request punted, fast;
	struct vfc_event stopped;
	struct vfc_msg start;

	begin(13, 0);
	punted = request_make(&ring, 0, inquiry, 0, 36);
	fast = request_rw(&ring, 1, OP_READ_10, 0, 1);
	for (unsigned i = 0; i < 10; i++) {
		request_send(&ring, &punted);
		guest_event(&guest, 0);
		read_one(&fast, 4);
		stopped = drive_stop(&ring, 0);
		CHECK_EQUAL(drive_wait(&ring).head, punted.head);
		CHECK_EQUAL(request_response(&ring, &punted), S_RESET);
		CHECK_EQUAL(stopped.value, position());
		start = drive_start_msg(&ring, VFC_RING_REQUEST, stopped.value);
		CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	}
	end();
}

static void under_load(uint32_t size, unsigned depth, uint64_t features)
{
	struct load load = { .ring = &ring, .depth = depth, .blocks = 8, .span = 4096, .write_percent = 50, .writer = 1 };

	begin(size, features);
	for (unsigned block = 0; block < 4096; block++)
		memset(unit.bytes + 512 * block, 0, 512);
	load_start(&load);
	for (unsigned i = 0; i < 20; i++) {
		struct vfc_event stopped;
		struct vfc_msg start;

		load_await(&load, 200);
		stopped = drive_stop(&ring, 1000);
		CHECK_EQUAL(stopped.result, 0);
		/* Nothing is in flight: what was taken is used. */
		CHECK_EQUAL(stopped.value >> 16, stopped.value & 0xffff);
		start = drive_start_msg(&ring, VFC_RING_REQUEST, stopped.value);
		CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	}
	load_stop(&load);
	CHECK_EQUAL(load.reset + load.full + load.other + load.torn, 0);
	end();
}

TEST(a_packed_ring_under_load) { under_load(64, 16, 0); }
TEST(a_packed_ring_under_load_with_event_idx) { under_load(67, 16, FEATURE_EVENT_IDX); }
TEST(a_packed_ring_of_one_buffer_under_load) { under_load(5, 1, FEATURE_EVENT_IDX); }
