/*
 * losses.c - what the host lost of its cache: counted by whoever hears of it, and no flush is GOOD to who has not.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "one.h"

#define LOSS (1ull << 32)

static const uint8_t sync_10[16] = { 0x35 }, sync_16[16] = { 0x91 };
static const uint8_t write_10[16] = { 0x2a, 0, 0, 0, 0, 7, 0, 0, 1 }, write_fua[16] = { 0x2a, 8, 0, 0, 0, 7, 0, 0, 1 };

static struct vfc_latch *latch;

static void begin(uint32_t kind)
{
	one_begin(kind, VFC_ENGINE_NO_URING);
	CHECK_EQUAL(vfc_latch_open(unit.latch_fd, &latch), 0);
}

static void end(void)
{
	atomic_store(&harness_sync_error, 0);
	vfc_latch_put(latch);
	one_end();
}

static struct request run(const uint8_t *cdb, uint32_t out)
{
	static unsigned slot;
	struct request request = request_make(&ring, slot++ % 16, cdb, out, 0);

	if (out)
		memset(request_out(&ring, &request), 0x42, out);
	request_send(&ring, &request);
	return request;
}

static void good(const uint8_t *cdb, uint32_t out)
{
	struct request request = run(cdb, out);

	CHECK_EQUAL(drive_wait(&ring).head, request.head);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	CHECK_EQUAL(request_status(&ring, &request), 0);
}

static void await_punt(enum vfc_why why)
{
	struct vfc_event event = guest_event(&guest, 0);
	struct vfc_answer answer = { .handle = event.handle, .status = 2 };

	CHECK_EQUAL(event.kind, VFC_EVENT_PUNT);
	CHECK_EQUAL(event.why, why);
	CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
	drive_wait(&ring);
}

static void punted(enum vfc_why why, const uint8_t *cdb, uint32_t out)
{
	run(cdb, out);
	await_punt(why);
}

/* The fabric has told the nexus, and gives it another route. */
static void know(uint64_t losses)
{
	struct vfc_medium_setup setup = {
		.fd = unit.fd, .latch_fd = unit.latch_fd, .kind = VFC_MEDIUM_FILE, .owner = 2,
		.block_size = 512, .blocks = 4096, .losses = losses,
	};
	struct vfc_medium *medium;

	CHECK_EQUAL(vfc_medium_new(&setup, &medium), 0);
	CHECK_EQUAL(guest_route(&guest, 0, medium, VFC_FINISH).result, 0);
	vfc_medium_put(medium);
}

TEST(a_loss_is_counted_once_for_all_who_hear_of_it)
{
	begin(VFC_MEDIUM_FILE);
	CHECK_EQUAL(vfc_latch_losses(latch), 0);
	CHECK_EQUAL(vfc_latch_lost(latch, 0), LOSS);
	CHECK_EQUAL(vfc_latch_lost(latch, 0), LOSS + 1);	/* the same one, most likely */
	CHECK_EQUAL(vfc_latch_doubt(latch), LOSS + 2);
	CHECK_EQUAL(vfc_latch_lost(latch, LOSS), 2 * LOSS + 2);	/* of a description that is newer than the first */
	CHECK_EQUAL(vfc_latch_recover(latch, 2), 0);
	CHECK_EQUAL(vfc_latch_take(latch, 7, 0, UINT64_MAX / 2, NULL), 0);
	CHECK_EQUAL(vfc_latch_losses(latch), 2 * LOSS + 2);
	end();
}

TEST(a_flush_that_fails_is_a_loss)
{
	begin(VFC_MEDIUM_FILE);
	good(sync_10, 0);
	atomic_store(&harness_sync_error, EIO);
	punted(VFC_WHY_MEDIUM, sync_10, 0);
	CHECK_EQUAL(vfc_latch_losses(latch), LOSS);
	/* The kernel has said it, and says it no more. */
	atomic_store(&harness_sync_error, 0);
	punted(VFC_WHY_DOUBT, sync_10, 0);
	punted(VFC_WHY_DOUBT, sync_16, 0);
	punted(VFC_WHY_DOUBT, write_fua, 512);
	CHECK_EQUAL(unit.bytes[7 * 512], 0);
	good(write_10, 512);
	CHECK_EQUAL(unit.bytes[7 * 512], 0x42);
	know(LOSS);
	good(sync_10, 0);
	good(sync_16, 0);
	good(write_fua, 512);
	end();
}

TEST(a_forced_write_that_fails_is_a_doubt)
{
	begin(VFC_MEDIUM_FILE);
	good(write_fua, 512);
	atomic_store(&harness_sync_error, EIO);
	good(write_10, 512);
	punted(VFC_WHY_MEDIUM, write_fua, 512);
	atomic_store(&harness_sync_error, 0);
	CHECK_EQUAL(vfc_latch_losses(latch), 1);
	punted(VFC_WHY_DOUBT, sync_10, 0);
	end();
}

TEST(a_loss_of_others_counts_even_while_the_flush_is_under_way)
{
	begin(VFC_MEDIUM_FILE);
	gate_close();
	run(sync_10, 0);
	gate_await(1);
	vfc_latch_lost(latch, 0);
	gate_open();
	await_punt(VFC_WHY_DOUBT);
	end();
}

/* The kernel's word went to a command that nobody waits for any more. */
TEST(a_loss_is_counted_for_an_abandoned_flush)
{
	struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .in_flight = VFC_ABORT_RESET } };
	struct request request;
	uint64_t seq;

	begin(VFC_MEDIUM_FILE);
	gate_close();
	atomic_store(&harness_sync_error, EIO);
	request = run(sync_10, 0);
	gate_await(1);
	seq = guest_post(&guest, 0, &msg);
	CHECK_EQUAL(drive_wait(&ring).head, request.head);
	CHECK_EQUAL(request_response(&ring, &request), S_RESET);
	CHECK_EQUAL(vfc_latch_losses(latch), 0);
	gate_open();
	CHECK_EQUAL(guest_ack(&guest, 0, seq).result, 0);
	CHECK_EQUAL(vfc_latch_losses(latch), LOSS);
	end();
}
