/*
 * paths.c - I/O that hangs, is cancelled, abandoned or waited for; buffers that are bounded; who goes first.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#include "load.h"
#include "one.h"
#include "path.h"

static void await_parked(uint64_t count)
{
	while (guest_stats(&guest, 0).parked < count)
		guest_ping(&guest, 0);
}

static uint64_t post_route(struct vfc_medium *medium, uint8_t in_flight)
{
	struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .medium = medium, .in_flight = in_flight } };

	return guest_post(&guest, 0, &msg);
}

/* ---------------------------------------------------------------- I/O that hangs */

TEST(a_stop_is_bounded_when_io_hangs)
{
	struct request read, write;
	struct vfc_event stopped;

	one_begin(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING);
	memset(unit.bytes, 0x66, 512);
	gate_close();
	read = request_rw(&ring, 0, OP_READ_10, 0, 1);
	write = request_rw(&ring, 1, OP_WRITE_10, 1024, 1);
	memset(request_out(&ring, &write), 0x42, 512);
	memset(request_in(&ring, &read), 0xee, 512);
	request_send(&ring, &read);
	request_send(&ring, &write);
	gate_await(2);
	stopped = drive_stop(&ring, 30);
	CHECK_EQUAL(stopped.value, 2);
	CHECK_EQUAL(request_response(&ring, &read), S_RESET);
	CHECK_EQUAL(request_response(&ring, &write), S_RESET);
	memset(request_out(&ring, &write), 0x99, 512);
	/* The engine cannot be freed while its threads hang: it says so, and lives on. */
	CHECK_EQUAL(vfc_engine_free(guest.engine, 30), -ETIMEDOUT);
	gate_open();
	/* Late data reaches no guest, and the medium as it was meant. */
	CHECK_EQUAL(vfc_engine_free(guest.engine, 10000), 0);
	CHECK_EQUAL(request_in(&ring, &read)[0], 0xee);
	CHECK_EQUAL(unit.bytes[1024 * 512], 0x42);
	drive_close(&ring);
	vfc_mem_put(guest.mem);
	vfc_map_put(guest.map);
	unit_close(&unit);
}

/* ---------------------------------------------------------------- writes through the page cache */

static struct request send_write(unsigned slot, uint16_t lun, uint32_t lba, uint8_t byte)
{
	struct request write = request_rw(&ring, slot, OP_WRITE_10, lba, 1);

	request_header(&ring, &write)[3] = (uint8_t)lun;
	memset(request_out(&ring, &write), byte, 512);
	request_send(&ring, &write);
	return write;
}

/* One at a time to one file, and as many as there are files. */
static void writes_go_in_turn(uint32_t flags)
{
	struct vfc_msg second = { .kind = VFC_MSG_ROUTE, .route = { .lun = 1, .in_flight = VFC_FINISH } };
	struct unit beside;

	one_begin(VFC_MEDIUM_FILE, flags);
	unit_open(&beside, VFC_MEDIUM_FILE, 4096, 2);
	second.route.medium = beside.medium;
	memset(second.route.mask, 0xff, sizeof(second.route.mask));
	CHECK_EQUAL(guest_ask(&guest, 0, &second).result, 0);
	gate_close();
	for (unsigned i = 0; i < 12; i++)
		send_write(i, 0, 8 * i, 0x42);
	gate_await(1);
	send_write(12, 1, 0, 0x43);
	gate_await(2);
	CHECK_EQUAL(gate_waits(), 2);
	gate_open();
	for (unsigned i = 0; i < 13; i++)
		drive_wait(&ring);
	for (unsigned i = 0; i < 12; i++)
		CHECK_EQUAL(unit.bytes[8 * i * 512], 0x42);
	CHECK_EQUAL(beside.bytes[0], 0x43);
	second.route.medium = NULL;
	CHECK_EQUAL(guest_ask(&guest, 0, &second).result, 0);
	one_end();
	unit_close(&beside);
}

TEST(cached_writes_go_in_turn) { writes_go_in_turn(0); }
TEST(cached_writes_go_in_turn_without_uring) { writes_go_in_turn(VFC_ENGINE_NO_URING); }

/* What waits for its turn when its ring is stopped is not written afterwards. */
static void waiting_writes_end_with_their_ring(uint32_t flags)
{
	struct request first, waiting;

	one_begin(VFC_MEDIUM_FILE, flags);
	gate_close();
	first = send_write(0, 0, 0, 0x42);
	gate_await(1);
	waiting = send_write(1, 0, 8, 0x43);
	while (guest_stats(&guest, 0).in_flight < 2)
		guest_ping(&guest, 0);
	drive_stop(&ring, 30);
	CHECK_EQUAL(request_response(&ring, &first), S_RESET);
	CHECK_EQUAL(request_response(&ring, &waiting), S_RESET);
	gate_open();
	/* The ack of the next route says that all of it is over. */
	CHECK_EQUAL(guest_ack(&guest, 0, post_route(NULL, VFC_FINISH)).result, 0);
	CHECK_EQUAL(unit.bytes[0], 0x42);
	CHECK_EQUAL(unit.bytes[8 * 512], 0);
	one_end();
}

TEST(waiting_cached_writes_end_with_their_ring) { waiting_writes_end_with_their_ring(0); }
TEST(waiting_cached_writes_end_with_their_ring_without_uring) { waiting_writes_end_with_their_ring(VFC_ENGINE_NO_URING); }

TEST(io_uring_that_hangs_is_cancelled)
{
	/* A pipe is a file that nothing can be read from for as long as we like. */
	struct vfc_medium_setup setup = { .kind = VFC_MEDIUM_FILE, .owner = 2, .block_size = 512, .blocks = 4096 };
	struct vfc_medium *medium;
	struct request request;
	int pipes[2];

	one_begin(VFC_MEDIUM_FILE, 0);
	if (!vfc_uses_uring(guest.engine)) {
		one_end();
		return;
	}
	CHECK_EQUAL(pipe(pipes), 0);
	setup.fd = pipes[0];
	setup.latch_fd = unit.latch_fd;
	CHECK_EQUAL(vfc_medium_new(&setup, &medium), 0);
	CHECK_EQUAL(guest_route(&guest, 0, medium, VFC_FINISH).result, 0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &request);
	/* The ack of the route that resets it says that the kernel let go. */
	while (!guest_stats(&guest, 0).in_flight)
		guest_ping(&guest, 0);
	CHECK(drive_silent(&ring, 5));
	CHECK_EQUAL(guest_ack(&guest, 0, post_route(unit.medium, VFC_ABORT_RESET)).result, 0);
	drive_wait(&ring);
	CHECK_EQUAL(request_response(&ring, &request), S_RESET);
	CHECK_EQUAL(guest_stats(&guest, 0).abandoned, 1);
	vfc_medium_put(medium);
	close(pipes[0]);
	close(pipes[1]);
	one_end();
}

/* A kernel without memory takes nothing and does not say when it will: it is asked again. */
TEST(what_io_uring_refuses_is_submitted_later)
{
	struct request read;

	one_begin(VFC_MEDIUM_DIRECT, 0);
	memset(unit.bytes, 0x66, 512);
	atomic_store(&harness_refusals, 20);
	read = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &read);
	drive_wait(&ring);
	CHECK_EQUAL(request_in(&ring, &read)[0], 0x66);
	one_end();
}

TEST(buffers_are_bounded)
{
	struct request all[80];
	unsigned count = 0;

	one_begin(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING);
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	drive_close(&ring);
	drive_open(&ring, &guest, 3, VFC_RING_REQUEST, 512, 0);
	gate_close();
	/* 70 reads of a megabyte into the same memory; no two touch the same stripes of their latch. */
	CHECK_EQUAL(ftruncate(unit.fd, 70 << 20), 0);
	{
		struct vfc_medium_setup setup = {
			.fd = unit.fd, .latch_fd = unit.latch_fd, .kind = VFC_MEDIUM_FILE, .owner = 2,
			.block_size = 512, .blocks = 70 << 11,
		};
		struct vfc_medium *medium;

		CHECK_EQUAL(vfc_medium_new(&setup, &medium), 0);
		CHECK_EQUAL(guest_route(&guest, 0, medium, VFC_FINISH).result, 0);
		vfc_medium_put(medium);
	}
	for (; count < 70; count++) {
		uint64_t next = guest.next;

		all[count] = request_rw(&ring, count, OP_READ_10, count << 11, 2048);
		guest.next = next + 256;	/* the data of each lies over the next one's headers, but for the last */
		if (count)
			ring.desc[4 * count + 2].addr = ring.desc[2].addr;
		else
			guest.next = next + 256 + (1 << 20);
		drive_offer(&ring, all[count].head);
	}
	drive_kick(&ring);
	await_parked(6);
	CHECK_EQUAL(guest_stats(&guest, 0).parked, 6);
	gate_open();
	for (unsigned i = 0; i < 70; i++)
		CHECK_EQUAL(drive_wait(&ring).length, 108 + (1 << 20));
	one_end();
}

/* ---------------------------------------------------------------- a path that obeys the test */

static struct {
	struct vfc_path_engine base;
	struct vfc_cmd *taken[8];
	_Atomic unsigned count;
	atomic_bool release;	/* give back what was taken */
	atomic_bool refuse;	/* BUSY for commands of more than one block: our own I/O has the latch */
	atomic_bool cancelled;
	int pipes[2];
} fake;

static enum vfc_submit fake_submit(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	(void)engine;
	if (atomic_load(&fake.refuse) && cmd->blocks > 1) {
		cmd->holder = 2;
		return VFC_BUSY;
	}
	cmd->path->busy++;
	fake.taken[atomic_load(&fake.count)] = cmd;
	atomic_fetch_add(&fake.count, 1);
	return VFC_QUEUED;
}

static void fake_flush(struct vfc_path_engine *engine)
{
	(void)engine;
}

static unsigned fake_reap(struct vfc_path_engine *engine, struct vfc_cmd **done, unsigned max)
{
	unsigned count = 0;

	(void)engine;
	(void)max;
	if (!atomic_load(&fake.release))
		return 0;
	for (; count < atomic_load(&fake.count); count++) {
		done[count] = fake.taken[count];
		done[count]->path->busy--;
	}
	atomic_store(&fake.count, 0);
	return count;
}

static void fake_cancel(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	(void)engine;
	(void)cmd;
	atomic_store(&fake.cancelled, true);
}

/* As a device that writes straight to the guest: it cannot be answered before it is done. */
static bool fake_abandon(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	(void)engine;
	(void)cmd;
	return false;
}

static int fake_wait_fd(struct vfc_path_engine *engine)
{
	(void)engine;
	return fake.pipes[0];
}

static bool fake_idle(struct vfc_path_engine *engine)
{
	(void)engine;
	return !atomic_load(&fake.count);
}

static void begin_fake(void)
{
	static const struct vfc_path_ops ops = {
		.name = "fake", .submit = fake_submit, .flush = fake_flush, .reap = fake_reap, .cancel = fake_cancel,
		.abandon = fake_abandon, .wait_fd = fake_wait_fd, .idle = fake_idle,
	};

	CHECK_EQUAL(pipe(fake.pipes), 0);
	fake.base.ops = &ops;
	harness_files = &fake.base;
	one_begin(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING);
}

static void fake_give_back(void)
{
	atomic_store(&fake.release, true);
	CHECK_EQUAL(write(fake.pipes[1], "", 1), 1);
}

static void end_fake(void)
{
	one_end();
	close(fake.pipes[0]);
	close(fake.pipes[1]);
}

TEST(a_path_that_does_not_let_go_is_waited_for)
{
	struct vfc_msg abort_all = { .kind = VFC_MSG_ABORT, .match = { .response = S_ABORTED } };
	struct vfc_msg stop = { .kind = VFC_MSG_RING_STOP, .index = 2 };
	struct request request;
	uint64_t aborted, stopped;

	begin_fake();
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &request);
	while (!atomic_load(&fake.count))
		guest_ping(&guest, 0);
	aborted = guest_post(&guest, 0, &abort_all);
	stopped = guest_post(&guest, 0, &stop);
	guest_ping(&guest, 0);
	CHECK(!guest_acked(&guest, 0, aborted, 20));
	CHECK_EQUAL(ring.used[1], 0);
	fake_give_back();
	CHECK_EQUAL(guest_ack(&guest, 0, aborted).value, 1);
	CHECK_EQUAL(ring.used[1], 1);
	CHECK_EQUAL(request_response(&ring, &request), S_ABORTED);
	CHECK_EQUAL(guest_ack(&guest, 0, stopped).value, 1);
	CHECK(atomic_load(&fake.cancelled));
	end_fake();
}

TEST(a_route_waits_for_a_path_that_does_not_let_go)
{
	struct request request;
	uint64_t seq;

	begin_fake();
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	request_send(&ring, &request);
	while (!atomic_load(&fake.count))
		guest_ping(&guest, 0);
	seq = post_route(NULL, VFC_ABORT_ABORTED);
	CHECK(!guest_acked(&guest, 0, seq, 20));
	CHECK_EQUAL(ring.used[1], 0);
	fake_give_back();
	CHECK_EQUAL(guest_ack(&guest, 0, seq).result, 0);
	drive_wait(&ring);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	CHECK_EQUAL(request_status(&ring, &request), 0x40);
	end_fake();
}

TEST(small_commands_do_not_starve_a_large_one)
{
	struct request large, near, far;

	begin_fake();
	atomic_store(&fake.refuse, true);
	atomic_store(&fake.release, true);
	large = request_rw(&ring, 0, OP_READ_10, 100, 200);	/* stripes 0, 1 and 2 */
	near = request_rw(&ring, 1, OP_READ_10, 383, 1);	/* stripe 2 */
	far = request_rw(&ring, 2, OP_READ_10, 384, 1);		/* stripe 3 */
	request_send(&ring, &large);
	await_parked(1);
	/* Small ones overtake it, but not for ever: one is parked although the path would have it. */
	request_send(&ring, &near);
	while (guest_stats(&guest, 0).parked < 2) {
		struct used used;

		guest_ping(&guest, 0);
		if (drive_take(&ring, &used) && used.head == near.head)
			request_send(&ring, &near);
	}
	/* Elsewhere nothing waits. */
	request_send(&ring, &far);
	CHECK_EQUAL(drive_wait(&ring).head, far.head);
	atomic_store(&fake.refuse, false);
	fake_give_back();
	CHECK_EQUAL(drive_wait(&ring).head, large.head);
	CHECK_EQUAL(drive_wait(&ring).head, near.head);
	end_fake();
}

/* ---------------------------------------------------------------- reads side by side */

TEST(reads_of_one_stripe_run_together)
{
	struct request reads[2], write;
	struct vfc_latch *latch;

	one_begin(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING);
	CHECK_EQUAL(vfc_latch_open(unit.latch_fd, &latch), 0);
	gate_close();
	for (unsigned i = 0; i < 2; i++) {
		unit.bytes[i * 512] = (uint8_t)(0x60 + i);
		reads[i] = request_rw(&ring, i, OP_READ_10, i, 1);
		request_send(&ring, &reads[i]);
	}
	gate_await(2);
	/* A write there waits for both, and so does everybody else. */
	write = request_rw(&ring, 2, OP_WRITE_10, 0, 1);
	memset(request_out(&ring, &write), 0x77, 512);
	request_send(&ring, &write);
	await_parked(1);
	CHECK_EQUAL(vfc_latch_take(latch, 7, 0, 512, NULL), -EAGAIN);
	CHECK_EQUAL(unit.bytes[0], 0x60);
	gate_open();
	for (unsigned i = 0; i < 3; i++)
		drive_wait(&ring);
	CHECK_EQUAL(*request_in(&ring, &reads[0]), 0x60);
	CHECK_EQUAL(*request_in(&ring, &reads[1]), 0x61);
	CHECK_EQUAL(unit.bytes[0], 0x77);
	/* Nothing is left of it. */
	CHECK_EQUAL(vfc_latch_take(latch, 7, 0, 512, NULL), 0);
	vfc_latch_free(latch, 7, 0, 512);
	vfc_latch_put(latch);
	one_end();
}

TEST(a_read_of_two_stripes_shares_nothing)
{
	struct request reads[2];

	one_begin(VFC_MEDIUM_FILE, VFC_ENGINE_NO_URING);
	gate_close();
	reads[0] = request_rw(&ring, 0, OP_READ_10, 100, 1);
	reads[1] = request_rw(&ring, 1, OP_READ_10, 127, 2);
	request_send(&ring, &reads[0]);
	gate_await(1);
	request_send(&ring, &reads[1]);
	await_parked(1);
	gate_open();
	drive_wait(&ring);
	drive_wait(&ring);
	one_end();
}

/* Within a word of the latch, I/O waits for nothing but for a write of its own blocks, or to them. */
TEST(only_what_overlaps_a_write_waits)
{
	struct request first, beside, read, same, over, behind;

	one_begin(VFC_MEDIUM_DIRECT, VFC_ENGINE_NO_URING);
	memset(unit.bytes, 0x11, 64 * 512);
	gate_close();
	first = request_rw(&ring, 0, OP_WRITE_10, 0, 2);
	memset(request_out(&ring, &first), 0x42, 1024);
	request_send(&ring, &first);
	gate_await(1);
	beside = request_rw(&ring, 1, OP_WRITE_10, 2, 2);
	memset(request_out(&ring, &beside), 0x43, 1024);
	request_send(&ring, &beside);
	gate_await(2);
	read = request_rw(&ring, 2, OP_READ_10, 4, 2);
	request_send(&ring, &read);
	gate_await(3);
	same = request_rw(&ring, 3, OP_READ_10, 5, 2);
	request_send(&ring, &same);
	gate_await(4);
	over = request_rw(&ring, 4, OP_WRITE_10, 1, 1);
	memset(request_out(&ring, &over), 0x44, 512);
	request_send(&ring, &over);
	await_parked(1);
	behind = request_rw(&ring, 5, OP_READ_10, 3, 1);
	request_send(&ring, &behind);
	await_parked(2);
	gate_open();
	for (unsigned i = 0; i < 6; i++)
		drive_wait(&ring);
	CHECK_EQUAL(request_in(&ring, &read)[0], 0x11);
	CHECK_EQUAL(request_in(&ring, &behind)[0], 0x43);
	CHECK_EQUAL(unit.bytes[0], 0x42);
	CHECK_EQUAL(unit.bytes[512], 0x44);
	CHECK_EQUAL(unit.bytes[1024], 0x43);
	one_end();
}

/* I/O without a pause holds a word only for so long: another process gets it. */
static void others_get_a_turn(uint32_t flags, unsigned write_percent)
{
	struct load load = { .ring = &ring, .depth = 16, .blocks = 1, .span = 64, .write_percent = write_percent, .writer = 1 };
	struct vfc_latch *latch;

	one_begin(VFC_MEDIUM_FILE, flags);
	CHECK_EQUAL(vfc_latch_open(unit.latch_fd, &latch), 0);
	load_start(&load);
	load_await(&load, 1000);
	for (unsigned i = 0; i < 20; i++) {
		while (vfc_latch_take(latch, 7, 0, 512, NULL))
			;
		vfc_latch_free(latch, 7, 0, 512);
	}
	load_stop(&load);
	CHECK_EQUAL(load.reset + load.full + load.other + load.torn, 0);
	vfc_latch_put(latch);
	one_end();
}

TEST(reads_side_by_side_let_others_have_a_turn) { others_get_a_turn(0, 0); }
TEST(reads_side_by_side_let_others_have_a_turn_without_uring) { others_get_a_turn(VFC_ENGINE_NO_URING, 0); }
TEST(writes_in_turn_let_others_have_a_turn) { others_get_a_turn(0, 100); }
TEST(writes_side_by_side_let_others_have_a_turn) { others_get_a_turn(0, 50); }
TEST(writes_side_by_side_let_others_have_a_turn_without_uring) { others_get_a_turn(VFC_ENGINE_NO_URING, 50); }
