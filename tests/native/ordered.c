/*
 * ordered.c - ORDERED commands: what came before has ended when they begin, and what comes after waits for them.
 *
 * Python is the test: a command that was punted is under way until the test answers it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "device.h"
#include "latch.h"

#define SIMPLE 0
#define ORDERED 1
#define HEAD_OF_QUEUE 2
#define ACA 3
#define OP_INQUIRY 0x12	/* punted */
#define LBA 8
#define SLOTS 256

static struct guest guest;
static struct driver ring;
static struct unit unit;
static struct request all[SLOTS];	/* by slot, which is the tag as well */
static uint64_t sent;

static void begin(uint32_t kind, const struct guest_options *options)
{
	struct request warm;

	guest_open(&guest, options);
	unit_open(&unit, kind, 4096, 2);
	CHECK_EQUAL(guest_route(&guest, 0, unit.medium, VFC_FINISH).result, 0);
	drive_open(&ring, &guest, 2, VFC_RING_REQUEST, 4 * SLOTS, 0);
	/* The one that is looked for first from then on. */
	warm = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &warm);
	drive_wait(&ring);
	sent = 1;
}

static void end(void)
{
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	CHECK_EQUAL(guest_stats(&guest, 0).in_flight, 0);
	drive_close(&ring);
	guest_close(&guest);
	unit_close(&unit);
}

/* Made, and not offered yet. */
static struct request *make(unsigned slot, uint8_t opcode, uint8_t attribute, uint16_t lun)
{
	const uint8_t other[16] = { opcode, 0, 0, 0, 36 };
	uint64_t tag = slot;
	uint8_t *header;

	all[slot] = opcode == OP_READ_10 || opcode == OP_WRITE_10 ? request_rw(&ring, slot, opcode, LBA, 1) :
								    request_make(&ring, slot, other, 0, 36);
	header = request_header(&ring, &all[slot]);
	header[2] = (uint8_t)(0x40 | lun >> 8);
	header[3] = (uint8_t)lun;
	header[16] = attribute;
	memcpy(header + 8, &tag, sizeof(tag));
	if (opcode == OP_WRITE_10)
		memset(request_out(&ring, &all[slot]), (int)slot, 512);
	return &all[slot];
}

static void offer(const struct request *request)
{
	drive_offer(&ring, request->head);
	sent++;
}

static void put(unsigned slot, uint8_t opcode, uint8_t attribute)
{
	offer(make(slot, opcode, attribute, 0));
}

/* What was offered has been taken, and what could be done about it has been done. */
static void taken(void)
{
	drive_kick(&ring);
	while (guest_stats(&guest, ring.worker).commands < sent)
		guest_ping(&guest, ring.worker);
	/* In the turn of the loop that hears the second, the first one's is over. */
	guest_ping(&guest, ring.worker);
	guest_ping(&guest, ring.worker);
}

static void answered(unsigned slot, uint8_t response)
{
	CHECK_EQUAL(drive_wait(&ring).head, all[slot].head);
	CHECK_EQUAL(request_response(&ring, &all[slot]), response);
}

static void ended(unsigned slot)
{
	answered(slot, S_OK);
}

static uint64_t begun(unsigned slot)
{
	struct vfc_event event = guest_event(&guest, ring.worker);

	CHECK_EQUAL(event.kind, VFC_EVENT_PUNT);
	CHECK_EQUAL(event.tag, slot);
	return event.handle;
}

static void answer(uint64_t handle)
{
	struct vfc_answer answer = { .handle = handle };

	CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
}

static void nothing(void)
{
	taken();
	CHECK(guest_quiet(&guest, ring.worker, 0));
	CHECK(drive_silent(&ring, 0));
}

static void block_is(unsigned slot)
{
	CHECK_EQUAL(unit.bytes[LBA * 512], slot);
	CHECK_EQUAL(unit.bytes[LBA * 512 + 511], slot);
}

/* ---------------------------------------------------------------- order */

static void both_ways(uint32_t kind, bool one_batch)
{
	uint64_t older, ordered;

	begin(kind, NULL);
	put(1, OP_INQUIRY, SIMPLE);
	taken();
	older = begun(1);
	put(2, OP_WRITE_10, SIMPLE);
	if (!one_batch)
		taken();
	put(3, OP_READ_10, ORDERED);
	if (!one_batch)
		taken();
	put(4, OP_WRITE_10, SIMPLE);
	if (!one_batch)
		taken();
	put(5, OP_READ_10, ACA);
	put(6, OP_READ_10, SIMPLE);
	taken();
	ended(2);
	nothing();
	block_is(2);
	answer(older);
	ended(1);
	ordered = begun(3);
	nothing();
	block_is(2);
	answer(ordered);
	ended(3);
	ended(4);
	ended(6);
	CHECK_EQUAL(*request_in(&ring, &all[6]), 4);
	answer(begun(5));
	ended(5);
	CHECK_EQUAL(guest_stats(&guest, 0).held, 4);
	block_is(4);
	/* And nothing of it is left. */
	put(7, OP_WRITE_10, SIMPLE);
	taken();
	ended(7);
	end();
}

TEST(an_ordered_one_is_not_overtaken) { both_ways(VFC_MEDIUM_MEMORY, false); }
TEST(an_ordered_one_is_not_overtaken_in_a_batch) { both_ways(VFC_MEDIUM_MEMORY, true); }
TEST(an_ordered_one_is_not_overtaken_on_a_file) { both_ways(VFC_MEDIUM_FILE, true); }

/* Those that need no command of their own see only a few shapes; an ORDERED one of another is one all the same. */
static void shapes(void (*shape)(unsigned slot))
{
	uint64_t handle;

	begin(VFC_MEDIUM_MEMORY, NULL);
	put(1, OP_WRITE_10, SIMPLE);
	shape(2);
	put(3, OP_WRITE_10, SIMPLE);
	taken();
	ended(1);
	handle = begun(2);
	nothing();
	block_is(1);
	answer(handle);
	ended(2);
	ended(3);
	block_is(3);
	end();
}

static void plain(unsigned slot)
{
	put(slot, OP_READ_10, ORDERED);
}

/* Descriptors of a slot: header, data out, response, data in; the last moves up for another one. */
static void in_pieces(unsigned slot, uint32_t cut, bool header)
{
	struct request *request = make(slot, OP_READ_10, ORDERED, 0);
	uint16_t at = request->head;
	struct desc whole = ring.desc[at + (header ? 0 : 2)];

	if (header) {
		ring.desc[at + 3] = ring.desc[at + 2];
		ring.desc[at + 2] = ring.desc[at + 1];
		ring.desc[at + 2].next = (uint16_t)(at + 3);
		ring.desc[at] = (struct desc){ whole.addr, cut, D_NEXT, (uint16_t)(at + 1) };
		ring.desc[at + 1] = (struct desc){ whole.addr + cut, whole.len - cut, D_NEXT, (uint16_t)(at + 2) };
	} else {
		ring.desc[at + 2] = (struct desc){ whole.addr, cut, D_WRITE | D_NEXT, (uint16_t)(at + 3) };
		ring.desc[at + 3] = (struct desc){ whole.addr + cut, whole.len - cut, D_WRITE, 0 };
	}
	offer(request);
}

static void header_cut_before_the_attribute(unsigned slot)
{
	in_pieces(slot, 10, true);
}

static void header_cut_behind_it(unsigned slot)
{
	in_pieces(slot, 17, true);
}

static void data_in_pieces(unsigned slot)
{
	in_pieces(slot, 100, false);
}

/* Its table is shorter. */
static void no_data(unsigned slot)
{
	struct request *request = make(slot, OP_INQUIRY, ORDERED, 0);

	ring.desc[request->head + 1].flags = D_WRITE;
	request->in_length = 0;
	offer(request);
}

TEST(a_plain_ordered_one) { shapes(plain); }
TEST(an_ordered_one_with_its_attribute_in_the_second_piece) { shapes(header_cut_before_the_attribute); }
TEST(an_ordered_one_with_its_header_in_pieces) { shapes(header_cut_behind_it); }
TEST(an_ordered_one_with_its_data_in_pieces) { shapes(data_in_pieces); }
TEST(an_ordered_one_without_data) { shapes(no_data); }

/* A SIMPLE one that needs a closer look does not slow down the rest of its batch. */
TEST(a_simple_one_may_be_overtaken)
{
	begin(VFC_MEDIUM_MEMORY, NULL);
	in_pieces(1, 100, false);
	request_header(&ring, &all[1])[16] = SIMPLE;
	put(2, OP_READ_10, SIMPLE);
	taken();
	ended(ring.tables ? 2 : 1);
	ended(ring.tables ? 1 : 2);
	CHECK_EQUAL(guest_stats(&guest, 0).held, 0);
	end();
}

/* Not begun: running with a device that is slow, or waiting for a latch. */
TEST(an_ordered_one_waits_for_a_slow_medium)
{
	struct guest_options options = { .flags = VFC_ENGINE_NO_URING };
	uint64_t handle;

	begin(VFC_MEDIUM_FILE, &options);
	gate_close();
	put(1, OP_WRITE_10, SIMPLE);
	put(2, OP_READ_10, SIMPLE);
	put(3, OP_INQUIRY, ORDERED);
	put(4, OP_READ_10, SIMPLE);
	nothing();
	CHECK_EQUAL(guest_stats(&guest, 0).parked, 1);
	gate_open();
	ended(1);
	ended(2);
	handle = begun(3);
	gate_close();
	nothing();
	answer(handle);
	ended(3);
	gate_await(1);
	gate_open();
	ended(4);
	CHECK_EQUAL(*request_in(&ring, &all[4]), 1);
	end();
}

TEST(ordered_ones_go_one_by_one)
{
	begin(VFC_MEDIUM_MEMORY, NULL);
	for (unsigned slot = 1; slot < 60; slot++)
		put(slot, OP_INQUIRY, ORDERED);
	for (unsigned slot = 1; slot < 60; slot++) {
		uint64_t handle;

		taken();
		handle = begun(slot);
		nothing();
		answer(handle);
		ended(slot);
	}
	end();
}

TEST(head_of_queue_goes_at_once)
{
	uint64_t simple, ordered, first, second;

	begin(VFC_MEDIUM_MEMORY, NULL);
	put(1, OP_INQUIRY, SIMPLE);
	put(2, OP_INQUIRY, ORDERED);
	put(3, OP_INQUIRY, HEAD_OF_QUEUE);
	put(4, OP_WRITE_10, SIMPLE);
	taken();
	simple = begun(1);
	first = begun(3);
	nothing();
	/* An ORDERED one waits for it, too. */
	answer(simple);
	ended(1);
	nothing();
	answer(first);
	ended(3);
	ordered = begun(2);
	put(5, OP_INQUIRY, HEAD_OF_QUEUE);
	taken();
	second = begun(5);
	answer(ordered);
	ended(2);
	ended(4);
	nothing();
	answer(second);
	ended(5);
	end();
}

TEST(other_units_go_on)
{
	struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .lun = 5 } };
	uint64_t first, second;

	begin(VFC_MEDIUM_MEMORY, NULL);
	msg.route.medium = unit.medium;
	memset(msg.route.mask, 0xff, sizeof(msg.route.mask));
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).result, 0);
	put(1, OP_INQUIRY, ORDERED);
	put(2, OP_WRITE_10, SIMPLE);
	offer(make(3, OP_READ_10, SIMPLE, 5));
	offer(make(4, OP_INQUIRY, ORDERED, 5));
	offer(make(5, OP_READ_10, SIMPLE, 5));
	/* The same unit by another name (SAM-5 4.7.7.3). */
	make(6, OP_READ_10, SIMPLE, 5);
	request_header(&ring, &all[6])[2] = 0;
	offer(&all[6]);
	/* No unit at all. */
	make(7, OP_READ_10, ORDERED, 0);
	request_header(&ring, &all[7])[2] = 0x80;
	offer(&all[7]);
	taken();
	first = begun(1);
	second = begun(4);
	answered(7, S_BAD_TARGET);
	ended(3);
	nothing();
	answer(second);
	ended(4);
	ended(5);
	ended(6);
	nothing();
	answer(first);
	ended(1);
	ended(2);
	end();
}

/* ---------------------------------------------------------------- commands that are ended */

static struct vfc_msg abort_of(unsigned slot)
{
	return (struct vfc_msg){
		.kind = VFC_MSG_ABORT,
		.match = { .flags = VFC_MATCH_TARGET | VFC_MATCH_LUN | VFC_MATCH_TAG, .tag = slot, .response = S_ABORTED },
	};
}

TEST(a_held_one_is_aborted)
{
	struct vfc_msg msg;
	uint64_t older;

	begin(VFC_MEDIUM_MEMORY, NULL);
	put(1, OP_INQUIRY, SIMPLE);
	put(2, OP_INQUIRY, ORDERED);
	put(3, OP_WRITE_10, SIMPLE);
	put(4, OP_WRITE_10, SIMPLE);
	put(5, OP_WRITE_10, SIMPLE);
	taken();
	older = begun(1);
	nothing();
	msg = abort_of(2);
	msg.kind = VFC_MSG_QUERY;
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).value, 1);
	msg.match.flags |= VFC_MATCH_HELD;
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).value, 1);
	msg = abort_of(1);
	msg.match.flags |= VFC_MATCH_HELD;
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).value, 0);
	msg = abort_of(4);
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).value, 1);
	answered(4, S_ABORTED);
	nothing();
	/* Without it nobody has to wait. */
	msg = abort_of(2);
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).value, 1);
	answered(2, S_ABORTED);
	ended(3);
	ended(5);
	block_is(5);
	CHECK_EQUAL(guest_stats(&guest, 0).aborted, 2);
	answer(older);
	ended(1);
	end();
}

TEST(one_that_others_wait_for_is_aborted)
{
	struct vfc_msg msg = abort_of(1);
	struct vfc_answer late;

	begin(VFC_MEDIUM_MEMORY, NULL);
	put(1, OP_INQUIRY, ORDERED);
	put(2, OP_WRITE_10, SIMPLE);
	put(3, OP_INQUIRY, ORDERED);
	taken();
	late = (struct vfc_answer){ .handle = begun(1) };
	nothing();
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).value, 1);
	answered(1, S_ABORTED);
	ended(2);
	CHECK_EQUAL(vfc_reply(guest.engine, &late), -ESTALE);
	answer(begun(3));
	ended(3);
	end();
}

TEST(a_reset_ends_held_ones)
{
	struct vfc_msg msg = { .kind = VFC_MSG_ABORT, .match = { .flags = VFC_MATCH_TARGET | VFC_MATCH_LUN, .response = S_RESET } };

	begin(VFC_MEDIUM_MEMORY, NULL);
	for (unsigned slot = 1; slot < 5; slot++)
		put(slot, OP_WRITE_10, slot % 2 ? ORDERED : SIMPLE);
	offer(make(5, OP_INQUIRY, ORDERED, 9));
	offer(make(6, OP_INQUIRY, SIMPLE, 9));
	taken();
	begun(1);
	begun(5);
	nothing();
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).value, 4);
	for (unsigned slot = 1; slot < 5; slot++)
		answered(slot, S_RESET);
	nothing();
	block_is(0);
	/* The other unit's are as they were; and this one's begin anew. */
	put(7, OP_WRITE_10, SIMPLE);
	taken();
	ended(7);
	msg.match.flags = VFC_MATCH_TARGET;
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).value, 2);
	answered(5, S_RESET);
	answered(6, S_RESET);
	end();
}

TEST(a_stop_lets_held_ones_end)
{
	struct vfc_msg msg = { .kind = VFC_MSG_RING_STOP, .index = 2, .value = 20000 };
	uint64_t seq, handle;

	begin(VFC_MEDIUM_MEMORY, NULL);
	put(1, OP_INQUIRY, SIMPLE);
	put(2, OP_INQUIRY, ORDERED);
	put(3, OP_WRITE_10, SIMPLE);
	put(4, OP_INQUIRY, ORDERED);
	taken();
	handle = begun(1);
	seq = guest_post(&guest, 0, &msg);
	CHECK(!guest_acked(&guest, 0, seq, 5));
	answer(handle);
	answer(begun(2));
	answer(begun(4));
	CHECK_EQUAL(guest_ack(&guest, 0, seq).result, 0);
	for (unsigned slot = 1; slot < 5; slot++)
		ended(slot);
	block_is(3);
	end();
}

TEST(a_stop_answers_held_ones)
{
	begin(VFC_MEDIUM_MEMORY, NULL);
	for (unsigned slot = 1; slot < SLOTS; slot++)
		put(slot, slot % 2 ? OP_INQUIRY : OP_WRITE_10, slot % 3 ? ORDERED : SIMPLE);
	taken();
	begun(1);
	nothing();
	CHECK_EQUAL(drive_stop(&ring, 10).result, 0);
	for (unsigned slot = 1; slot < SLOTS; slot++)
		answered(slot, S_RESET);
	CHECK(guest_quiet(&guest, 0, 0));
	block_is(0);
	end();
}

/* ---------------------------------------------------------------- many */

TEST(a_flood_of_ordered_ones)
{
	struct guest_options options = { .max_punts = 1 };
	uint64_t handle;

	begin(VFC_MEDIUM_MEMORY, &options);
	/* Every other one for the same unit, the rest for as many units. */
	for (unsigned slot = 1; slot < SLOTS; slot++)
		offer(make(slot, OP_INQUIRY, ORDERED, slot % 2 ? 0 : (uint16_t)(slot * 64)));
	taken();
	handle = begun(1);
	for (unsigned slot = 2; slot < SLOTS; slot += 2) {
		ended(slot);
		CHECK_EQUAL(request_status(&ring, &all[slot]), 0x28);
	}
	for (unsigned slot = 3; slot < SLOTS; slot += 2) {
		answer(handle);
		ended(slot - 2);
		handle = begun(slot);
		nothing();
	}
	answer(handle);
	ended(SLOTS - 1);
	end();
}

/* Each of them ends as soon as it begins, so that nothing but the one before wakes the next. */
TEST(a_flood_that_ends_at_once)
{
	struct guest_options options = { .max_punts = 1 };
	struct vfc_latch *latch;
	uint64_t handle;

	begin(VFC_MEDIUM_MEMORY, &options);
	CHECK_EQUAL(vfc_latch_open(unit.latch_fd, &latch), 0);
	CHECK_EQUAL(vfc_latch_take(latch, 7, 0, 1 << 20, NULL), 0);
	offer(make(1, OP_INQUIRY, SIMPLE, 9));
	put(2, OP_WRITE_10, SIMPLE);
	for (unsigned slot = 3; slot < SLOTS; slot++)
		put(slot, OP_READ_10, slot % 2 ? ORDERED : SIMPLE);
	taken();
	handle = begun(1);
	nothing();
	vfc_latch_free(latch, 7, 0, 1 << 20);
	for (unsigned slot = 2; slot < SLOTS; slot++) {
		ended(slot);
		CHECK_EQUAL(request_status(&ring, &all[slot]), slot % 2 ? 0x28 : 0);
	}
	answer(handle);
	ended(1);
	vfc_latch_put(latch);
	end();
}

/* ---------------------------------------------------------------- what changes meanwhile */

TEST(a_ring_with_held_ones_moves_later)
{
	struct guest_options options = { .workers = 2 };
	uint64_t handle;

	begin(VFC_MEDIUM_MEMORY, &options);
	CHECK_EQUAL(guest_route(&guest, 1, unit.medium, VFC_FINISH).result, 0);
	put(1, OP_INQUIRY, ORDERED);
	put(2, OP_WRITE_10, SIMPLE);
	taken();
	handle = begun(1);
	CHECK_EQUAL(drive_move(&ring, 1, 10).result, -ETIMEDOUT);
	nothing();
	answer(handle);
	ended(1);
	ended(2);
	CHECK_EQUAL(drive_move(&ring, 1, 20000).result, 0);
	sent = 0;
	put(3, OP_INQUIRY, ORDERED);
	put(4, OP_WRITE_10, SIMPLE);
	taken();
	handle = begun(3);
	nothing();
	block_is(2);
	answer(handle);
	ended(3);
	ended(4);
	CHECK_EQUAL(drive_move(&ring, 0, 20000).result, 0);
	end();
}

TEST(a_held_one_keeps_its_memory)
{
	struct vfc_msg msg = { .kind = VFC_MSG_MEM };
	int fd = memfd_create("extra", MFD_CLOEXEC);
	struct vfc_map *maps[2];
	struct vfc_mem *both;
	uint64_t handle, seq;
	uint8_t *bytes;

	begin(VFC_MEDIUM_MEMORY, NULL);
	CHECK_EQUAL(ftruncate(fd, 65536), 0);
	bytes = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	maps[0] = guest.map;
	CHECK_EQUAL(vfc_map_new(fd, RAM_GPA + (1ull << 32), 65536, RAM_USER + (1ull << 32), 0, &maps[1]), 0);
	CHECK_EQUAL(vfc_mem_new(maps, 2, &both), 0);
	guest_set_memory(&guest, both);
	put(1, OP_INQUIRY, ORDERED);
	make(2, OP_READ_10, SIMPLE, 0);
	ring.desc[all[2].head + 2].addr = RAM_GPA + (1ull << 32);
	offer(&all[2]);
	put(3, OP_READ_10, SIMPLE);
	taken();
	handle = begun(1);
	msg.mem = guest.mem;
	seq = guest_post(&guest, 0, &msg);
	CHECK(!guest_acked(&guest, 0, seq, 5));
	memset(unit.bytes + LBA * 512, 0x5a, 512);
	answer(handle);
	CHECK_EQUAL(guest_ack(&guest, 0, seq).result, 0);
	ended(1);
	ended(2);
	ended(3);
	CHECK_EQUAL(bytes[511], 0x5a);
	CHECK_EQUAL(*request_in(&ring, &all[3]), 0x5a);
	end();
	vfc_mem_put(both);
	vfc_map_put(maps[1]);
	munmap(bytes, 65536);
	close(fd);
}

TEST(a_held_one_loses_its_memory)
{
	int fd = memfd_create("extra", MFD_CLOEXEC);
	struct vfc_map *maps[2];
	struct vfc_mem *both;
	struct request torn;
	uint64_t handle;

	begin(VFC_MEDIUM_MEMORY, NULL);
	CHECK_EQUAL(ftruncate(fd, 65536), 0);
	maps[0] = guest.map;
	CHECK_EQUAL(vfc_map_new(fd, RAM_GPA + (1ull << 32), 65536, RAM_USER + (1ull << 32), 0, &maps[1]), 0);
	CHECK_EQUAL(vfc_mem_new(maps, 2, &both), 0);
	guest_set_memory(&guest, both);
	put(1, OP_INQUIRY, ORDERED);
	make(2, OP_WRITE_10, SIMPLE, 0);
	ring.desc[all[2].head + 1].addr = RAM_GPA + (1ull << 32);
	offer(&all[2]);
	taken();
	handle = begun(1);
	memset(unit.bytes + LBA * 512, 0x77, 512);
	CHECK_EQUAL(ftruncate(fd, 0), 0);
	/* Who finds that out is another, for another unit, and another block. */
	torn = *make(3, OP_READ_10, SIMPLE, 5);
	request_header(&ring, &torn)[19 + 5] = LBA + 1;
	ring.desc[torn.head + 2].addr = RAM_GPA + (1ull << 32);
	{
		struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .medium = unit.medium, .lun = 5 } };

		memset(msg.route.mask, 0xff, sizeof(msg.route.mask));
		CHECK_EQUAL(guest_ask(&guest, 0, &msg).result, 0);
	}
	offer(&torn);
	taken();
	answered(3, S_FAILURE);
	answer(handle);
	ended(1);
	answered(2, S_FAILURE);
	block_is(0x77);
	end();
	vfc_mem_put(both);
	vfc_map_put(maps[1]);
	close(fd);
}

/* Where it leads is looked at when it begins. */
TEST(a_held_one_finds_another_route)
{
	struct unit other;
	uint64_t handle;

	begin(VFC_MEDIUM_MEMORY, NULL);
	unit_open(&other, VFC_MEDIUM_MEMORY, 4096, 3);
	put(1, OP_INQUIRY, ORDERED);
	put(2, OP_WRITE_10, SIMPLE);
	taken();
	handle = begun(1);
	/* Held ones are with no medium, and so in nobody's way. */
	CHECK_EQUAL(guest_route(&guest, 0, other.medium, VFC_FINISH).result, 0);
	answer(handle);
	ended(1);
	ended(2);
	CHECK_EQUAL(other.bytes[LBA * 512], 2);
	block_is(0);
	end();
	unit_close(&other);
}

/* ---------------------------------------------------------------- a device that takes commands as they are */

static struct request to_device(unsigned slot, const uint8_t *cdb, uint8_t attribute)
{
	uint32_t out = cdb == a_write ? 4096 : 0, in = cdb == a_read ? 4096 : 0;
	struct request request = request_make(&device.ring, slot, cdb, out, in);
	uint64_t tag = slot;

	request_header(&device.ring, &request)[16] = attribute;
	memcpy(request_header(&device.ring, &request) + 8, &tag, sizeof(tag));
	drive_offer(&device.ring, request.head);
	return request;
}

static void given(const uint8_t *cdb, const struct request *request)
{
	unsigned file;
	struct sg_io_hdr header = device_take(&file);

	CHECK_EQUAL(header.cmdp[0], cdb[0]);
	CHECK(!device_any(5));
	device_give(file, &header);
	CHECK_EQUAL(drive_wait(&device.ring).head, request->head);
	CHECK_EQUAL(request_response(&device.ring, request), S_OK);
}

TEST(an_ordered_one_to_a_device)
{
	struct request requests[6];

	device_begin(64, 64);
	requests[0] = to_device(0, a_write, SIMPLE);
	requests[1] = to_device(1, test_unit_ready, ORDERED);
	requests[2] = to_device(2, a_read, SIMPLE);
	drive_kick(&device.ring);
	given(a_write, &requests[0]);
	given(test_unit_ready, &requests[1]);
	given(a_read, &requests[2]);
	requests[3] = to_device(3, test_unit_ready, ORDERED);
	requests[4] = to_device(4, a_write, ORDERED);
	requests[5] = to_device(5, a_read, SIMPLE);
	drive_kick(&device.ring);
	given(test_unit_ready, &requests[3]);
	given(a_write, &requests[4]);
	given(a_read, &requests[5]);
	CHECK_EQUAL(guest_stats(&device.guest, 0).punted, 0);
	device_end();
}

TEST(a_held_one_for_a_device_is_aborted)
{
	struct vfc_msg msg = abort_of(2);
	struct request requests[4];
	struct sg_io_hdr headers[3];
	unsigned files[3];

	device_begin(64, 64);
	requests[1] = to_device(1, a_write, SIMPLE);
	requests[2] = to_device(2, test_unit_ready, ORDERED);
	requests[3] = to_device(3, a_read, SIMPLE);
	drive_kick(&device.ring);
	headers[0] = device_take(&files[0]);
	CHECK(!device_any(5));
	CHECK_EQUAL(guest_ask(&device.guest, 0, &msg).value, 1);
	CHECK_EQUAL(drive_wait(&device.ring).head, requests[2].head);
	CHECK_EQUAL(request_response(&device.ring, &requests[2]), S_ABORTED);
	headers[1] = device_take(&files[1]);
	CHECK_EQUAL(headers[1].cmdp[0], a_read[0]);
	/* One that goes at once, beside both. */
	requests[0] = to_device(4, test_unit_ready, HEAD_OF_QUEUE);
	drive_kick(&device.ring);
	headers[2] = device_take(&files[2]);
	CHECK_EQUAL(headers[2].cmdp[0], test_unit_ready[0]);
	for (unsigned i = 0; i < 3; i++) {
		device_give(files[i], &headers[i]);
		drive_wait(&device.ring);
	}
	device_end();
}
