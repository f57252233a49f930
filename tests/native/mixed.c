/*
 * mixed.c - commands of all task attributes to several units, at random, with aborts, stops, new tables and moves among
 * them: what has begun before an ORDERED one is told, and that nothing behind it has.
 *
 * The test answers punts and looks at the media, so it knows of most commands whether they have begun or ended: of a
 * punt by its event and its answer, of a write that C runs by its block, which no other command has.
 */
#include "one.h"

#define SLOTS 32
#define UNITS 4	/* memory, a file, memory, and nothing: punted */
#define NOWHERE 3
#define ROUNDS 4000
#define SIMPLE 0
#define ORDERED 1
#define HEAD 2

static struct {
	struct request write, read;
	uint64_t tag;
	unsigned unit;
	uint8_t attribute;
	bool is_write, punts;	/* sure to be */
	enum { FREE, SENT, BEGUN, ANSWERED } state;
	uint64_t handle;
} slots[SLOTS];

static struct unit units[UNITS - 1];
static uint64_t state_of_chance, sequence;

static uint32_t chance(uint32_t below)
{
	state_of_chance = state_of_chance * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)(state_of_chance >> 33) % below;
}

static bool landed(unsigned slot)
{
	uint64_t found;

	if (slots[slot].unit == NOWHERE || !slots[slot].is_write)
		return false;
	memcpy(&found, units[slots[slot].unit].bytes + slot * 512, sizeof(found));
	return found == slots[slot].tag;
}

static bool before(unsigned one, unsigned other)
{
	return slots[one].unit == slots[other].unit && slots[one].tag < slots[other].tag;
}

static void send(unsigned slot)
{
	static const uint8_t attributes[16] = { [10] = ORDERED, ORDERED, HEAD, HEAD, 3, 0x81 };
	const struct request *request;
	uint8_t *header;

	slots[slot].is_write = chance(4) > 0;
	request = slots[slot].is_write ? &slots[slot].write : &slots[slot].read;
	header = request_header(&ring, request);
	slots[slot].tag = ++sequence << 8 | slot;
	slots[slot].unit = chance(2) ? 0 : chance(UNITS);
	slots[slot].attribute = attributes[chance(16)];
	slots[slot].punts = slots[slot].attribute != SIMPLE || slots[slot].unit == NOWHERE;
	slots[slot].state = SENT;
	header[2] = chance(8) ? 0x40 : 0;	/* flat and peripheral addressing */
	header[3] = (uint8_t)slots[slot].unit;
	header[16] = slots[slot].attribute;
	memcpy(header + 8, &slots[slot].tag, 8);
	memcpy(request_out(&ring, request), &slots[slot].tag, slots[slot].is_write ? 8 : 0);
	drive_offer(&ring, request->head);
}

static void take_back(void)
{
	struct used used;

	while (drive_take(&ring, &used))
		slots[used.head / 8].state = FREE;
}

/* This one has begun: was that right? */
static void begun(unsigned slot)
{
	take_back();
	for (unsigned other = 0; other < SLOTS; other++) {
		if (slots[other].state == FREE || slots[other].state == ANSWERED || !before(other, slot))
			continue;
		/* What came before an ORDERED one has ended, and an ORDERED one has before what came after it. */
		if (slots[slot].attribute == ORDERED)
			CHECK(slots[other].punts ? false : !slots[other].is_write || landed(other));
		if (slots[slot].attribute != HEAD)
			CHECK(slots[other].attribute != ORDERED);
	}
}

static void answer(unsigned slot)
{
	struct vfc_answer answer = { .handle = slots[slot].handle };

	for (unsigned other = 0; slots[slot].attribute == ORDERED && other < SLOTS; other++)
		if (slots[other].state == SENT && !slots[other].punts && before(slot, other))
			CHECK(!landed(other));
	slots[slot].state = ANSWERED;
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
}

static void look_at(const struct vfc_event *event)
{
	unsigned slot = (uint8_t)event->tag;

	if (event->kind != VFC_EVENT_PUNT || slots[slot].state != SENT || slots[slot].tag != event->tag)
		return;	/* it was ended before anybody saw it */
	begun(slot);
	slots[slot].state = BEGUN;
	slots[slot].handle = event->handle;
}

static void look(void)
{
	struct vfc_event event;

	take_back();
	while (guest.kept_count) {
		event = guest_event(&guest, ring.worker);
		look_at(&event);
	}
	while (vfc_next(guest.engine, ring.worker, &event) > 0)
		look_at(&event);
}

static void answer_some(uint32_t one_in)
{
	look();
	for (unsigned slot = 0; slot < SLOTS; slot++)
		if (slots[slot].state == BEGUN && !chance(one_in))
			answer(slot);
}

static void abort_some(void)
{
	unsigned slot = chance(SLOTS);
	struct vfc_msg msg = {
		.kind = VFC_MSG_ABORT,
		.match = {
			.flags = chance(2) ? VFC_MATCH_TAG : VFC_MATCH_TARGET | VFC_MATCH_LUN, .lun = (uint16_t)chance(UNITS),
			.tag = slots[slot].tag, .response = S_RESET,
		},
	};

	CHECK_EQUAL(guest_ask(&guest, ring.worker, &msg).result, 0);
	look();
}

static void start_anew(void)
{
	struct vfc_event stopped = drive_stop(&ring, chance(2));
	struct vfc_msg msg;

	CHECK_EQUAL(stopped.result, 0);
	look();
	for (unsigned slot = 0; slot < SLOTS; slot++) {
		CHECK(slots[slot].state == FREE || slots[slot].state == SENT);
		/* What was sent and not yet taken waits in the ring. */
		if (slots[slot].state == SENT)
			CHECK(!landed(slot));
	}
	msg = drive_start_msg(&ring, VFC_RING_REQUEST, stopped.value);
	CHECK_EQUAL(guest_ask(&guest, ring.worker, &msg).result, 0);
	drive_enable(&ring, true);
}

static void mix(uint32_t flags, uint32_t poll_us, uint64_t features, uint64_t seed)
{
	struct vfc_mem *other;

	guest_open(&guest, &(struct guest_options){ .workers = 2, .flags = flags, .poll_us = poll_us });
	CHECK_EQUAL(vfc_mem_new(&guest.map, 1, &other), 0);
	state_of_chance = seed;
	for (unsigned i = 0; i < NOWHERE; i++) {
		struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .lun = (uint16_t)i, .in_flight = VFC_FINISH } };

		unit_open(&units[i], i == 1 ? VFC_MEDIUM_FILE : VFC_MEDIUM_MEMORY, 4096, 2);
		memset(msg.route.mask, 0xff, sizeof(msg.route.mask));
		msg.route.medium = units[i].medium;
		for (uint32_t worker = 0; worker < 2; worker++)
			CHECK_EQUAL(guest_ask(&guest, worker, &msg).result, 0);
	}
	drive_open(&ring, &guest, 2, VFC_RING_REQUEST, 8 * SLOTS, features);
	for (unsigned slot = 0; slot < SLOTS; slot++) {
		slots[slot].write = request_rw(&ring, 2 * slot, OP_WRITE_10, slot, 1);
		slots[slot].read = request_rw(&ring, 2 * slot + 1, OP_READ_10, slot, 1);
	}
	for (unsigned round = 0; round < ROUNDS; round++) {
		uint32_t what = chance(100), few = chance(SLOTS);

		for (unsigned slot = 0; slot < SLOTS && few; slot++)
			if (slots[slot].state == FREE && chance(2)) {
				send(slot);
				few--;
			}
		drive_kick(&ring);
		if (chance(2))
			guest_ping(&guest, ring.worker);
		answer_some(1 + chance(4));
		if (what < 4)
			abort_some();
		else if (what == 4)
			start_anew();
		else if (what == 5)
			drive_move(&ring, 1 - ring.worker, 1);
		else if (what == 6)
			guest_set_memory(&guest, round % 2 ? guest.mem : other);
	}
	/* None is left behind. */
	for (bool left = true; left;) {
		answer_some(1);
		left = false;
		for (unsigned slot = 0; slot < SLOTS; slot++)
			left |= slots[slot].state != FREE;
	}
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	for (uint32_t worker = 0; worker < 2; worker++)
		CHECK_EQUAL(guest_stats(&guest, worker).in_flight, 0);
	drive_close(&ring);
	guest_close(&guest);
	for (unsigned i = 0; i < NOWHERE; i++)
		unit_close(&units[i]);
	vfc_mem_put(other);
}

TEST(attributes_mixed) { mix(0, 0, 0, 1); }
TEST(attributes_mixed_polled) { mix(0, 50, FEATURE_EVENT_IDX, 2); }
TEST(attributes_mixed_without_uring) { mix(VFC_ENGINE_NO_URING, 50, 0, 3); }
