/*
 * requests.c - what C runs, what it punts and why, and how punts are answered.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "one.h"

static struct request run(const uint8_t *cdb, uint32_t out, uint32_t in)
{
	static unsigned slot;
	struct request request = request_make(&ring, slot++ % 16, cdb, out, in);

	for (uint32_t i = 0; i < out; i++)
		request_out(&ring, &request)[i] = (uint8_t)(i * 31 + cdb[0]);
	request_send(&ring, &request);
	return request;
}

static void good(const uint8_t *cdb, uint32_t out, uint32_t in, struct request *ret_request)
{
	struct request request = run(cdb, out, in);
	struct used used = drive_wait(&ring);

	CHECK_EQUAL(used.head, request.head);
	CHECK_EQUAL(used.length, 108 + in);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	CHECK_EQUAL(request_status(&ring, &request), 0);
	if (ret_request)
		*ret_request = request;
}

/* Punted for this reason; Python's CHECK CONDITION reaches the guest. */
static void punted(enum vfc_why why, const uint8_t *cdb, uint32_t out, uint32_t in)
{
	struct request request = run(cdb, out, in);
	struct vfc_event event = guest_event(&guest, 0);
	struct vfc_answer answer = { .handle = event.handle, .status = 2 };

	CHECK_EQUAL(event.kind, VFC_EVENT_PUNT);
	CHECK_EQUAL(event.why, why);
	CHECK_EQUAL(event.data_in_length, in);
	CHECK_EQUAL(event.data_out_length, out);
	CHECK_EQUAL(memcmp(event.cdb, cdb, 16), 0);
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
	CHECK_EQUAL(drive_wait(&ring).length, 108);
	CHECK_EQUAL(request_status(&ring, &request), 2);
}

/* ---------------------------------------------------------------- what C runs */

static void all_opcodes(uint32_t kind, uint32_t flags)
{
	struct guest_options options = { .flags = flags };
	const uint8_t writes[][16] = {
		{ 0x0a, 0, 0, 10, 2, 0 },
		{ 0x2a, 0, 0, 0, 0, 20, 0, 0, 2, 0 },
		{ 0xaa, 0, 0, 0, 0, 30, 0, 0, 0, 2, 0, 0 },
		{ 0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 40, 0, 0, 0, 2, 0, 0 },
		{ 0x2a, 0x18, 0, 0, 0, 50, 0, 0, 2, 0 },	/* DPO, FUA */
	};
	const uint8_t reads[][16] = {
		{ 0x08, 0, 0, 10, 2, 0 },
		{ 0x28, 0, 0, 0, 0, 20, 0, 0, 2, 0 },
		{ 0xa8, 0, 0, 0, 0, 30, 0, 0, 0, 2, 0, 0 },
		{ 0x88, 0, 0, 0, 0, 0, 0, 0, 0, 40, 0, 0, 0, 2, 0, 0 },
		{ 0x28, 0x10, 0, 0, 0, 50, 0, 0, 2, 0 },	/* DPO */
	};
	const uint8_t sync_10[16] = { 0x35, 0x02 }, sync_16[16] = { 0x91, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 9 };
	struct vfc_stats stats;

	one_begin_with(kind, &options, 0);
	for (unsigned i = 0; i < 5; i++) {
		struct request write, read;

		good(writes[i], 1024, 0, &write);
		CHECK_EQUAL(memcmp(unit.bytes + (i + 1) * 10 * 512, request_out(&ring, &write), 1024), 0);
		good(reads[i], 0, 1024, &read);
		CHECK_EQUAL(memcmp(request_in(&ring, &read), request_out(&ring, &write), 1024), 0);
	}
	good(sync_10, 0, 0, NULL);
	good(sync_16, 0, 0, NULL);
	stats = guest_stats(&guest, 0);
	CHECK_EQUAL(stats.fast, 12);
	CHECK_EQUAL(stats.commands, 12);
	CHECK_EQUAL(stats.read_bytes, 5 * 1024);
	CHECK_EQUAL(stats.written_bytes, 5 * 1024);
	one_end();
}

TEST(all_opcodes_on_memory) { all_opcodes(VFC_MEDIUM_MEMORY, 0); }
TEST(all_opcodes_on_a_file) { all_opcodes(VFC_MEDIUM_FILE, 0); }
TEST(all_opcodes_on_a_file_without_uring) { all_opcodes(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING); }
TEST(all_opcodes_past_the_cache) { all_opcodes(VFC_MEDIUM_DIRECT, 0); }

TEST(read_6_of_nothing_is_256_blocks)
{
	const uint8_t read[16] = { 0x08, 0, 0, 0, 0, 0 };

	one_begin_with(VFC_MEDIUM_MEMORY, NULL, 0);
	good(read, 0, 256 * 512, NULL);
	one_end();
}

TEST(no_blocks_are_good)
{
	const uint8_t read_10[16] = { 0x28 }, write_16[16] = { 0x8a }, read_12[16] = { 0xa8 };

	one_begin_with(VFC_MEDIUM_MEMORY, NULL, 0);
	good(read_10, 0, 0, NULL);
	good(write_16, 0, 0, NULL);
	good(read_12, 0, 0, NULL);
	punted(VFC_WHY_RANGE, read_10, 0, 512);
	one_end();
}

TEST(a_null_medium_moves_nothing)
{
	const uint8_t read[16] = { 0x28, 0, 0, 0, 0, 0, 0, 0, 1 }, write[16] = { 0x2a, 0, 0, 0, 0, 0, 0, 0, 1 };
	struct vfc_medium_setup setup = {
		.kind = VFC_MEDIUM_NULL, .fd = -1, .latch_fd = -1, .block_size = 512, .blocks = 16,
	};
	struct vfc_medium *null;

	one_begin_with(VFC_MEDIUM_MEMORY, NULL, 0);
	CHECK_EQUAL(vfc_medium_new(&setup, &null), 0);
	CHECK_EQUAL(guest_route(&guest, 0, null, VFC_FINISH).result, 0);
	vfc_medium_put(null);
	good(write, 512, 0, NULL);
	good(read, 0, 512, NULL);
	CHECK_EQUAL(guest_stats(&guest, 0).fast, 2);
	one_end();
}

TEST(media_that_cannot_be)
{
	struct vfc_medium_setup setup;
	struct vfc_medium *medium;

	unit_open(&unit, VFC_MEDIUM_MEMORY, 16, 2);
	setup = (struct vfc_medium_setup){
		.kind = VFC_MEDIUM_MEMORY, .fd = unit.fd, .latch_fd = unit.latch_fd, .owner = 2,
		.block_size = 512, .blocks = 17,
	};
	CHECK_EQUAL(vfc_medium_new(&setup, &medium), -EFBIG);
	setup.blocks = 0;
	CHECK_EQUAL(vfc_medium_new(&setup, &medium), -EINVAL);
	setup.blocks = ~0ull / 512 + 1;
	CHECK_EQUAL(vfc_medium_new(&setup, &medium), -EINVAL);
	setup.blocks = 16;
	setup.block_size = 768;
	CHECK_EQUAL(vfc_medium_new(&setup, &medium), -EINVAL);
	setup.block_size = 512;
	setup.owner = 0;
	CHECK_EQUAL(vfc_medium_new(&setup, &medium), -EINVAL);
	setup.owner = 2;
	setup.kind = 9;
	CHECK_EQUAL(vfc_medium_new(&setup, &medium), -EINVAL);
	setup.kind = VFC_MEDIUM_FILE;
	setup.latch_fd = -1;
	CHECK_EQUAL(vfc_medium_new(&setup, &medium), -EINVAL);
	unit_close(&unit);
}

static void beyond_the_end(uint32_t flags)
{
	const uint8_t last[16] = { 0x28, 0, 0, 0, 0, 6, 0, 0, 1 }, across[16] = { 0x28, 0, 0, 0, 0, 6, 0, 0, 4 };
	const uint8_t cut[16] = { 0x28, 0, 0, 0, 0, 7, 0, 0, 1 }, behind[16] = { 0x28, 0, 0, 0, 0, 9, 0, 0, 1 };
	struct guest_options options = { .flags = flags };
	struct request request;

	one_begin_with(VFC_MEDIUM_FILE, &options, 0);
	memset(unit.bytes, 0x33, 8 * 512);
	CHECK_EQUAL(ftruncate(unit.fd, 7 * 512 + 100), 0);
	for (unsigned i = 0; i < 2; i++) {
		good(last, 0, 512, &request);
		CHECK_EQUAL(request_in(&ring, &request)[511], 0x33);
		punted(VFC_WHY_MEDIUM, across, 0, 4 * 512);
		punted(VFC_WHY_MEDIUM, cut, 0, 512);
		punted(VFC_WHY_MEDIUM, behind, 0, 512);
	}
	one_end();
}

TEST(what_a_file_has_lost_is_not_zeros) { beyond_the_end(0); }
TEST(what_a_file_has_lost_is_not_zeros_without_uring) { beyond_the_end(VFC_ENGINE_NO_URING); }

static void large(uint32_t kind, uint32_t flags)
{
	const uint8_t write[16] = { 0x2a, 0, 0, 0, 0, 1, 0, 8, 0 }, read[16] = { 0x28, 0, 0, 0, 0, 1, 0, 8, 0 };
	struct guest_options options = { .flags = flags };
	struct request out, in;

	one_begin_with(kind, &options, 0);
	good(write, 1 << 20, 0, &out);
	CHECK_EQUAL(memcmp(unit.bytes + 512, request_out(&ring, &out), 1 << 20), 0);
	good(read, 0, 1 << 20, &in);
	CHECK_EQUAL(memcmp(request_in(&ring, &in), request_out(&ring, &out), 1 << 20), 0);
	one_end();
}

TEST(a_megabyte_on_memory) { large(VFC_MEDIUM_MEMORY, 0); }
TEST(a_megabyte_on_a_file) { large(VFC_MEDIUM_FILE, 0); }
TEST(a_megabyte_on_a_file_without_uring) { large(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING); }

/* ---------------------------------------------------------------- what it punts */

/* In a packed ring what is answered is written over what was asked: also over what is still to be looked at. */
TEST(a_doubt_before_reads_of_its_batch)
{
	struct request first = { 0 }, doubt, reads[3];
	const uint8_t inquiry[16] = { 0x12, 0, 0, 0, 96 };
	struct vfc_answer answer = { .status = 0 };
	struct vfc_event event;

	one_begin_with(VFC_MEDIUM_MEMORY, NULL, 0);
	for (unsigned i = 0; i < 4; i++)
		memset(unit.bytes + 512 * i, (int)(0x40 + i), 512);
	first = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &first);
	drive_wait(&ring);
	doubt = request_make(&ring, 1, inquiry, 0, 96);
	drive_offer(&ring, doubt.head);
	for (unsigned i = 0; i < 3; i++) {
		reads[i] = request_rw(&ring, 2 + i, OP_READ_10, 1 + i, 1);
		drive_offer(&ring, reads[i].head);
	}
	drive_kick(&ring);
	for (unsigned i = 0; i < 3; i++)
		CHECK_EQUAL(drive_wait(&ring).length, 108 + 512);
	for (unsigned i = 0; i < 3; i++) {
		CHECK_EQUAL(request_response(&ring, &reads[i]), S_OK);
		CHECK_EQUAL(request_in(&ring, &reads[i])[511], 0x41 + i);
	}
	event = guest_event(&guest, 0);
	CHECK_EQUAL(event.kind, VFC_EVENT_PUNT);
	CHECK_EQUAL(event.cdb[0], 0x12);
	CHECK_EQUAL(event.data_in_length, 96);
	answer.handle = event.handle;
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
	CHECK_EQUAL(drive_wait(&ring).head, doubt.head);
	CHECK_EQUAL(request_response(&ring, &doubt), S_OK);
	one_end();
}

/* The same where it is the latch that keeps one back. */
TEST(a_read_that_waits_for_the_latch_before_reads_of_its_batch)
{
	struct request first, reads[4];
	struct vfc_latch *latch;

	one_begin_with(VFC_MEDIUM_MEMORY, NULL, 0);
	CHECK_EQUAL(vfc_latch_open(unit.latch_fd, &latch), 0);
	for (unsigned i = 0; i < 5; i++)
		memset(unit.bytes + 65536 * i, (int)(0x40 + i), 512);
	first = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &first);
	drive_wait(&ring);
	CHECK_EQUAL(vfc_latch_take(latch, 7, 65536, 512, NULL), 0);
	for (unsigned i = 0; i < 4; i++) {
		reads[i] = request_rw(&ring, 1 + i, OP_READ_10, 128 * (1 + i), 1);
		drive_offer(&ring, reads[i].head);
	}
	drive_kick(&ring);
	for (unsigned i = 1; i < 4; i++)
		CHECK(drive_wait(&ring).head != reads[0].head);
	vfc_latch_free(latch, 7, 65536, 512);
	CHECK_EQUAL(drive_wait(&ring).head, reads[0].head);
	for (unsigned i = 0; i < 4; i++) {
		CHECK_EQUAL(request_response(&ring, &reads[i]), S_OK);
		CHECK_EQUAL(request_in(&ring, &reads[i])[511], 0x41 + i);
	}
	vfc_latch_put(latch);
	one_end();
}

TEST(doubts_are_punted)
{
	const uint8_t inquiry[16] = { 0x12 }, reserve[16] = { 0x5f };
	const uint8_t protect[16] = { 0x28, 0x20, 0, 0, 0, 0, 0, 0, 1 };
	const uint8_t rarc[16] = { 0x28, 0x04, 0, 0, 0, 0, 0, 0, 1 };
	const uint8_t group[16] = { 0x28, 0, 0, 0, 0, 0, 1, 0, 1 };
	const uint8_t control[16] = { 0x28, 0, 0, 0, 0, 0, 0, 0, 1, 4 };
	const uint8_t reserved_6[16] = { 0x08, 0x20, 0, 0, 1, 0 };
	const uint8_t last[16] = { 0x28, 0, 0, 0, 0x0f, 0xff, 0, 0, 1 };
	const uint8_t behind[16] = { 0x28, 0, 0, 0, 0x10, 0, 0, 0, 1 };
	const uint8_t across[16] = { 0x28, 0, 0, 0, 0x0f, 0xff, 0, 0, 2 };
	const uint8_t wraps[16] = { 0x88, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1 };
	const uint8_t one[16] = { 0x28, 0, 0, 0, 0, 0, 0, 0, 1 }, write[16] = { 0x2a, 0, 0, 0, 0, 0, 0, 0, 1 };
	const uint8_t sync_behind[16] = { 0x35, 0, 0, 0, 0x10, 0 }, sync[16] = { 0x35 };
	const uint8_t much[16] = { 0x28, 0, 0, 0, 0, 0, 0, 8, 1 };

	one_begin_with(VFC_MEDIUM_MEMORY, NULL, 0);
	punted(VFC_WHY_OPCODE, inquiry, 0, 96);
	punted(VFC_WHY_OPCODE, reserve, 24, 0);
	punted(VFC_WHY_FIELD, protect, 0, 512);
	punted(VFC_WHY_FIELD, rarc, 0, 512);
	punted(VFC_WHY_FIELD, group, 0, 512);
	punted(VFC_WHY_FIELD, control, 0, 512);
	punted(VFC_WHY_FIELD, reserved_6, 0, 512);
	good(last, 0, 512, NULL);
	punted(VFC_WHY_RANGE, behind, 0, 512);
	punted(VFC_WHY_RANGE, across, 0, 1024);
	punted(VFC_WHY_RANGE, wraps, 0, 512);
	punted(VFC_WHY_RANGE, one, 0, 511);
	punted(VFC_WHY_RANGE, one, 0, 513);
	punted(VFC_WHY_RANGE, one, 0, 0);
	punted(VFC_WHY_RANGE, one, 512, 0);
	punted(VFC_WHY_RANGE, write, 0, 512);
	punted(VFC_WHY_RANGE, write, 511, 0);
	punted(VFC_WHY_RANGE, sync_behind, 0, 0);
	punted(VFC_WHY_RANGE, sync, 0, 1);
	punted(VFC_WHY_TRANSFER, much, 0, (1 << 20) + 512);
	one_end();
}

TEST(a_read_past_the_cache_is_punted_where_there_is_one)
{
	const uint8_t fua[16] = { 0x28, 0x08, 0, 0, 0, 0, 0, 0, 1 };

	one_begin_with(VFC_MEDIUM_FILE, NULL, 0);
	punted(VFC_WHY_FIELD, fua, 0, 512);
	one_end();
	one_begin_with(VFC_MEDIUM_DIRECT, NULL, 0);
	punted(VFC_WHY_FIELD, fua, 0, 512);
	one_end();
	one_begin_with(VFC_MEDIUM_MEMORY, NULL, 0);
	good(fua, 0, 512, NULL);
	one_end();
}

TEST(other_attributes_than_simple_are_punted)
{
	const uint8_t read[16] = { 0x28, 0, 0, 0, 0, 0, 0, 0, 1 };

	one_begin_with(VFC_MEDIUM_MEMORY, NULL, 0);
	for (uint8_t attribute = 1; attribute < 4; attribute++) {
		struct request request = request_make(&ring, 0, read, 0, 512);
		struct vfc_event event;
		struct vfc_answer answer = { 0 };
		const uint64_t tag = 0x1122334455667788ull;

		request_header(&ring, &request)[16] = attribute;
		request_header(&ring, &request)[17] = 5;
		request_header(&ring, &request)[18] = 6;
		memcpy(request_header(&ring, &request) + 8, &tag, 8);
		request_send(&ring, &request);
		event = guest_event(&guest, 0);
		CHECK_EQUAL(event.why, VFC_WHY_ATTRIBUTE);
		CHECK_EQUAL(event.attribute, attribute);
		CHECK_EQUAL(event.priority, 5);
		CHECK_EQUAL(event.crn, 6);
		CHECK_EQUAL(event.tag, tag);
		answer.handle = event.handle;
		CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
		drive_wait(&ring);
	}
	one_end();
}

TEST(the_mask_decides)
{
	const uint8_t read[16] = { 0x28, 0, 0, 0, 0, 0, 0, 0, 1 }, write[16] = { 0x2a, 0, 0, 0, 0, 0, 0, 0, 1 };
	struct vfc_msg msg = { .kind = VFC_MSG_ROUTE };

	one_begin_with(VFC_MEDIUM_MEMORY, NULL, 0);
	msg.route.medium = unit.medium;
	msg.route.mask[0x28 / 8] = 1 << 0x28 % 8;
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).result, 0);
	good(read, 0, 512, NULL);
	punted(VFC_WHY_OPCODE, write, 512, 0);
	memset(msg.route.mask, 0xff, 32);
	msg.route.flags = VFC_ROUTE_READ_ONLY;
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).result, 0);
	good(read, 0, 512, NULL);
	punted(VFC_WHY_OPCODE, write, 512, 0);
	msg.route.flags = 0;
	msg.route.medium = NULL;
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).result, 0);
	punted(VFC_WHY_OPCODE, read, 0, 512);
	msg.route.flags = VFC_ROUTE_GONE;
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).result, 0);
	punted(VFC_WHY_NO_ROUTE, read, 0, 512);
	msg.route.lun = 16384;
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).result, -EINVAL);
	one_end();
}

static void medium_error(uint32_t flags)
{
	const uint8_t write[16] = { 0x2a, 0, 0, 0, 0, 0, 0, 0, 1 };
	struct guest_options options = { .flags = flags };
	struct vfc_answer answer = { .status = 2 };
	struct unit read_only;
	struct request request;
	struct vfc_event event;
	char path[64];

	one_begin_with(VFC_MEDIUM_MEMORY, &options, 0);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", unit.fd);
	read_only = unit;
	read_only.fd = open(path, O_RDONLY);
	read_only.medium = unit_again(&read_only, VFC_MEDIUM_FILE, 2);
	CHECK_EQUAL(guest_route(&guest, 0, read_only.medium, VFC_FINISH).result, 0);
	request = run(write, 512, 0);
	event = guest_event(&guest, 0);
	CHECK_EQUAL(event.why, VFC_WHY_MEDIUM);
	CHECK_EQUAL(event.data_out_length, 512);
	CHECK_EQUAL(memcmp(event.data_out, request_out(&ring, &request), 512), 0);
	CHECK_EQUAL(guest_stats(&guest, 0).medium_errors, 1);
	answer.handle = event.handle;
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
	CHECK_EQUAL(drive_wait(&ring).length, 108);
	/* Its latch is free again. */
	CHECK_EQUAL(guest_route(&guest, 0, unit.medium, VFC_FINISH).result, 0);
	good(write, 512, 0, NULL);
	vfc_medium_put(read_only.medium);
	close(read_only.fd);
	one_end();
}

TEST(a_medium_error_is_punted) { medium_error(0); }
TEST(a_medium_error_is_punted_without_uring) { medium_error(VFC_ENGINE_NO_URING); }

/* ---------------------------------------------------------------- addresses */

TEST(absent_targets_are_answered_at_once)
{
	const uint8_t read[16] = { 0x28, 0, 0, 0, 0, 0, 0, 0, 1 };
	const uint8_t luns[][8] = {
		{ 1, 1, 0x40, 0 },	/* target 1 */
		{ 0, 0, 0x40, 0 }, { 2, 0, 0x40, 0 },	/* byte 0 */
		{ 1, 0, 0x80, 0 }, { 1, 0, 0xc0, 0 },	/* address methods */
		{ 0xc1, 1, 0, 0, 1 }, { 0xc1, 2 },
	};
	struct request request;

	one_begin_with(VFC_MEDIUM_MEMORY, NULL, 0);
	for (unsigned i = 0; i < sizeof(luns) / 8; i++) {
		request = request_make(&ring, 0, read, 0, 512);
		memcpy(request_header(&ring, &request), luns[i], 8);
		request_send(&ring, &request);
		CHECK_EQUAL(drive_wait(&ring).length, 108);
		CHECK_EQUAL(request_response(&ring, &request), S_BAD_TARGET);
	}
	CHECK_EQUAL(guest_stats(&guest, 0).bad_target, sizeof(luns) / 8);
	one_end();
}

TEST(both_forms_of_a_lun_lead_to_it)
{
	const uint8_t read[16] = { 0x28, 0, 0, 0, 0, 0, 0, 0, 1 };
	const uint8_t luns[][8] = { { 1, 0, 0, 5 }, { 1, 0, 0x40, 5 }, { 1, 0, 0x7f, 0xff } };
	struct vfc_msg msg = { .kind = VFC_MSG_ROUTE };

	one_begin_with(VFC_MEDIUM_MEMORY, NULL, 0);
	msg.route.medium = unit.medium;
	memset(msg.route.mask, 0xff, 32);
	msg.route.lun = 5;
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).result, 0);
	msg.route.lun = 16383;
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).result, 0);
	for (unsigned i = 0; i < 3; i++) {
		struct request request = request_make(&ring, 0, read, 0, 512);

		memcpy(request_header(&ring, &request), luns[i], 8);
		request_send(&ring, &request);
		CHECK_EQUAL(drive_wait(&ring).length, 108 + 512);
	}
	one_end();
}

TEST(the_report_luns_unit_is_punted)
{
	const uint8_t report_luns[16] = { 0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64 }, well_known[8] = { 0xc1, 1 };
	struct vfc_msg target = { .kind = VFC_MSG_TARGET, .index = 0, .value = 0 };
	struct vfc_answer answer = { 0 };
	struct request request;
	struct vfc_event event;

	one_begin_with(VFC_MEDIUM_MEMORY, NULL, 0);
	request = request_make(&ring, 0, report_luns, 0, 64);
	memcpy(request_header(&ring, &request), well_known, 8);
	request_send(&ring, &request);
	event = guest_event(&guest, 0);
	CHECK_EQUAL(event.why, VFC_WHY_NO_ROUTE);
	CHECK_EQUAL(event.target, 0);
	CHECK_EQUAL(memcmp(event.lun, well_known, 8), 0);
	answer.handle = event.handle;
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
	drive_wait(&ring);
	CHECK_EQUAL(guest_ask(&guest, 0, &target).result, 0);
	request_send(&ring, &request);
	CHECK_EQUAL(drive_wait(&ring).length, 108);
	CHECK_EQUAL(request_response(&ring, &request), S_BAD_TARGET);
	target.index = 256;
	CHECK_EQUAL(guest_ask(&guest, 0, &target).result, -EINVAL);
	one_end();
}

/* ---------------------------------------------------------------- answers */

TEST(an_answer_reaches_the_guest)
{
	const uint8_t inquiry[16] = { 0x12 };
	uint8_t sense[252], data[200], *response;
	struct vfc_answer answer = {
		.status = 2, .status_qualifier = 0x1234, .residual = 77, .sense = sense, .sense_length = 252,
		.data_in = data, .data_in_length = 200,
	};
	struct request request;
	uint32_t word;

	one_begin_with(VFC_MEDIUM_MEMORY, NULL, 0);
	memset(sense, 0x70, sizeof(sense));
	memset(data, 0x44, sizeof(data));
	request = run(inquiry, 0, 96);
	answer.handle = guest_event(&guest, 0).handle;
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
	/* Cut to the guest's room, both of them. */
	CHECK_EQUAL(drive_wait(&ring).length, 108 + 96);
	response = guest_at(&guest, request.response);
	memcpy(&word, response, 4);
	CHECK_EQUAL(word, 96);
	memcpy(&word, response + 4, 4);
	CHECK_EQUAL(word, 77);
	CHECK_EQUAL(response[8], 0x34);
	CHECK_EQUAL(response[9], 0x12);
	CHECK_EQUAL(response[10], 2);
	CHECK_EQUAL(response[11], 0);
	CHECK_EQUAL(response[12], 0x70);
	CHECK_EQUAL(response[107], 0x70);
	CHECK_EQUAL(request_in(&ring, &request)[95], 0x44);
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), -ESTALE);
	answer.handle = 0;
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), -ESTALE);
	answer.handle = 1u << 23;
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), -EINVAL);	/* no such worker */
	CHECK_EQUAL(vfc_reply_control(guest.engine, 1, data, 1), -EINVAL);	/* no control request */
	one_end();
}

TEST(punts_are_rationed_by_number)
{
	const uint8_t inquiry[16] = { 0x12 };
	struct guest_options options = { .max_punts = 2 };
	struct vfc_answer answer = { 0 };
	struct request request;

	one_begin_with(VFC_MEDIUM_MEMORY, &options, 0);
	run(inquiry, 0, 36);
	run(inquiry, 0, 36);
	request = run(inquiry, 0, 36);
	CHECK_EQUAL(drive_wait(&ring).head, request.head);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	CHECK_EQUAL(request_status(&ring, &request), 0x28);
	CHECK_EQUAL(guest_stats(&guest, 0).task_set_full, 1);
	answer.handle = guest_event(&guest, 0).handle;
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
	drive_wait(&ring);
	run(inquiry, 0, 36);
	CHECK_EQUAL(guest_event(&guest, 0).kind, VFC_EVENT_PUNT);
	CHECK_EQUAL(guest_event(&guest, 0).kind, VFC_EVENT_PUNT);
	one_end();
}

TEST(punts_are_rationed_by_bytes)
{
	const uint8_t mode_select[16] = { 0x15 };
	struct guest_options options = { .max_punt_bytes = 1000 };
	struct request request;
	struct vfc_event event;

	one_begin_with(VFC_MEDIUM_MEMORY, &options, 0);
	run(mode_select, 600, 0);
	request = run(mode_select, 600, 0);
	drive_wait(&ring);
	CHECK_EQUAL(request_status(&ring, &request), 0x28);
	event = guest_event(&guest, 0);
	CHECK_EQUAL(event.data_out_length, 600);
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	CHECK_EQUAL(drive_wait(&ring).length, 108);
	one_end();
}

TEST(more_than_the_ration_in_one_command_is_cut)
{
	const uint8_t unknown[16] = { 0xff };
	struct guest_options options = { .max_punt_bytes = 1000 };
	struct vfc_answer answer = { .status = 2 };
	struct request request;
	struct vfc_event event;

	one_begin_with(VFC_MEDIUM_MEMORY, &options, 0);
	request = run(unknown, 5000, 0);
	event = guest_event(&guest, 0);
	CHECK_EQUAL(event.data_out_length, 1000);
	CHECK_EQUAL(memcmp(event.data_out, request_out(&ring, &request), 1000), 0);
	answer.handle = event.handle;
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
	drive_wait(&ring);
	CHECK_EQUAL(request_status(&ring, &request), 2);
	one_end();
}
