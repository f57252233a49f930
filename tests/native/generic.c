/*
 * generic.c - units behind /dev/sgN: the test is the SCSI generic driver, at the other end of a socket pair.
 *
 * What write() hands over and read() gives back is the same struct sg_io_hdr, with the same pointers; a device in a
 * kernel is looked after by tests/guest.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <scsi/sg.h>
#include <sys/socket.h>
#include <unistd.h>

#include "hba.h"
#include "harness.h"

#define FILES 2
#define S_BUSY 5
#define S_TRANSPORT_FAILURE 6
#define S_TARGET_FAILURE 7
#define S_NEXUS_FAILURE 8
#define SECOND 0xd0	/* an opcode that has a second to run */

static struct guest guest;
static struct driver ring;
static struct vfc_credits *host;
static struct vfc_medium *medium;
static int ours[FILES], device[FILES];

static struct vfc_medium *make(uint32_t credits, uint32_t max_transfer)
{
	struct vfc_sg_setup setup = {
		.fds = ours, .count = FILES, .share = FILES, .credits = credits, .max_transfer = max_transfer, .host = host,
	};
	struct vfc_medium *made;

	for (unsigned i = 0; i < 256; i++)
		setup.timeouts[i] = 60;
	setup.timeouts[SECOND] = 1;
	CHECK_EQUAL(vfc_sg_medium_new(&setup, &made), 0);
	return made;
}

static void route(uint8_t in_flight, bool inquiries)
{
	struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .medium = medium, .in_flight = in_flight } };

	memset(msg.route.mask, 0xff, sizeof(msg.route.mask));
	if (!inquiries)
		msg.route.mask[0x12 / 8] &= (uint8_t)~(1 << (0x12 % 8));
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).result, 0);
}

static void begin(uint32_t credits, uint32_t limit)
{
	guest_open(&guest, NULL);
	CHECK_EQUAL(vfc_credits_new(limit, &host), 0);
	for (unsigned i = 0; i < FILES; i++) {
		int ends[2];

		CHECK_EQUAL(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends), 0);
		ours[i] = ends[0];
		device[i] = ends[1];
	}
	medium = make(credits, 1 << 20);
	for (unsigned i = 0; i < FILES; i++)
		close(ours[i]);
	route(VFC_FINISH, true);
	drive_open(&ring, &guest, 2, VFC_RING_REQUEST, 256, 0);
}

static void end(void)
{
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	CHECK_EQUAL(guest_stats(&guest, 0).in_flight, 0);
	drive_close(&ring);
	guest_close(&guest);
	vfc_medium_put(medium);
	vfc_credits_put(host);
	for (unsigned i = 0; i < FILES; i++)
		close(device[i]);
}

/* The next command of any file; which file is in *ret_file. */
static struct sg_io_hdr take(unsigned *ret_file)
{
	struct pollfd fds[FILES];
	struct sg_io_hdr header;

	for (unsigned i = 0; i < FILES; i++)
		fds[i] = (struct pollfd){ .fd = device[i], .events = POLLIN };
	CHECK(poll(fds, FILES, 10000) > 0);
	for (unsigned i = 0; i < FILES; i++)
		if (fds[i].revents & POLLIN) {
			CHECK_EQUAL(read(device[i], &header, sizeof(header)), sizeof(header));
			CHECK_EQUAL(header.interface_id, 'S');
			*ret_file = i;
			return header;
		}
	abort();
}

static bool any(int ms)
{
	struct pollfd fds[FILES];

	for (unsigned i = 0; i < FILES; i++)
		fds[i] = (struct pollfd){ .fd = device[i], .events = POLLIN };
	return poll(fds, FILES, ms) > 0;
}

static void give(unsigned file, const struct sg_io_hdr *header)
{
	CHECK_EQUAL(write(device[file], header, sizeof(*header)), sizeof(*header));
}

static struct request command(unsigned slot, const uint8_t *cdb, uint32_t out, uint32_t in)
{
	struct request request = request_make(&ring, slot, cdb, out, in);

	for (uint32_t i = 0; i < out; i++)
		request_out(&ring, &request)[i] = (uint8_t)(i * 31 + 7);
	memset(request_in(&ring, &request), 0xee, in);
	request_send(&ring, &request);
	return request;
}

static const uint8_t test_unit_ready[16] = { 0 };
static const uint8_t a_read[16] = { 0x28, 0, 0, 0, 0, 8, 0, 0, 8, 0 };
static const uint8_t a_write[16] = { 0x2a, 0, 0, 0, 0, 8, 0, 0, 8, 0 };

/* ---------------------------------------------------------------- commands as they are */

TEST(an_sg_command_goes_as_it_is)
{
	const uint8_t cdbs[][17] = {
		/* the length that its group says is behind it */
		{ 0x00, [16] = 6 },
		{ 0x5e, 1, 2, 3, 4, 5, 6, 7, 8, 9, [16] = 10 },
		{ 0x88, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, [16] = 16 },
		{ 0xa3, 0x0c, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, [16] = 12 },
		{ 0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, 9, [16] = 32 },
		{ 0xee, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, [16] = 16 },
	};

	begin(64, 64);
	for (unsigned i = 0; i < sizeof(cdbs) / sizeof(cdbs[0]); i++) {
		struct request request = command(i, cdbs[i], 0, 0);
		unsigned file;
		struct sg_io_hdr header = take(&file);

		CHECK_EQUAL(header.cmd_len, cdbs[i][16]);
		CHECK_EQUAL(memcmp(header.cmdp, cdbs[i], header.cmd_len < 16 ? header.cmd_len : 16), 0);
		CHECK_EQUAL(header.dxfer_direction, SG_DXFER_NONE);
		CHECK_EQUAL(header.timeout, 60000);
		give(file, &header);
		CHECK_EQUAL(drive_wait(&ring).length, 108);
		CHECK_EQUAL(request_response(&ring, &request), S_OK);
	}
	CHECK_EQUAL(guest_stats(&guest, 0).punted, 0);
	end();
}

TEST(sg_data_goes_both_ways_and_what_is_left_is_told)
{
	struct request request;
	struct sg_io_hdr header;
	unsigned file;

	begin(64, 64);
	request = command(0, a_write, 4096, 0);
	header = take(&file);
	CHECK_EQUAL(header.dxfer_direction, SG_DXFER_TO_DEV);
	CHECK_EQUAL(header.dxfer_len, 4096);
	CHECK_EQUAL(header.iovec_count, 0);
	CHECK_EQUAL(memcmp(header.dxferp, request_out(&ring, &request), 4096), 0);
	give(file, &header);
	CHECK_EQUAL(drive_wait(&ring).length, 108);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);

	request = command(1, a_read, 0, 4096);
	header = take(&file);
	CHECK_EQUAL(header.dxfer_direction, SG_DXFER_FROM_DEV);
	memset(header.dxferp, 0x42, 4096);
	header.resid = 96;
	give(file, &header);
	CHECK_EQUAL(drive_wait(&ring).length, 108 + 4000);
	CHECK_EQUAL(request_in(&ring, &request)[3999], 0x42);
	CHECK_EQUAL(request_in(&ring, &request)[4000], 0xee);
	CHECK_EQUAL(*(uint32_t *)(guest_at(&guest, request.response + 4)), 96);
	CHECK_EQUAL(guest_stats(&guest, 0).read_bytes, 4000);
	CHECK_EQUAL(guest_stats(&guest, 0).written_bytes, 4096);
	end();
}

TEST(sg_sense_data_reach_the_guest)
{
	struct request request;
	struct sg_io_hdr header;
	unsigned file;

	begin(64, 64);
	request = command(0, test_unit_ready, 0, 0);
	header = take(&file);
	for (unsigned i = 0; i < 96; i++)
		header.sbp[i] = (unsigned char)i;
	header.sb_len_wr = 96;
	header.status = 2;
	header.driver_status = 8;
	give(file, &header);
	drive_wait(&ring);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	CHECK_EQUAL(request_status(&ring, &request), 2);
	CHECK_EQUAL(*(uint32_t *)guest_at(&guest, request.response), 96);
	CHECK_EQUAL(((uint8_t *)guest_at(&guest, request.response))[12 + 95], 95);
	end();
}

TEST(an_sg_opcode_outside_the_mask_is_punted)
{
	const uint8_t inquiry[16] = { 0x12, 1, 0xb0, 0, 64, 0 };

	begin(64, 64);
	route(VFC_FINISH, false);
	command(0, inquiry, 0, 64);
	CHECK_EQUAL(guest_event(&guest, 0).kind, VFC_EVENT_PUNT);
	CHECK(!any(0));
	end();
}

TEST(sg_host_states_become_responses)
{
	const uint8_t table[][2] = {
		{ 0x01, S_TRANSPORT_FAILURE }, { 0x02, S_BUSY }, { 0x03, S_TRANSPORT_FAILURE }, { 0x04, S_BAD_TARGET },
		{ 0x05, S_ABORTED }, { 0x06, S_FAILURE }, { 0x07, S_FAILURE }, { 0x08, S_RESET }, { 0x0b, S_BUSY },
		{ 0x0c, S_BUSY }, { 0x0d, S_BUSY }, { 0x0e, S_TRANSPORT_FAILURE }, { 0x0f, S_TRANSPORT_FAILURE },
		{ 0x10, S_TARGET_FAILURE }, { 0x11, S_NEXUS_FAILURE }, { 0x12, S_FAILURE }, { 0x13, S_FAILURE },
		{ 0x14, S_TRANSPORT_FAILURE }, { 0x77, S_FAILURE },
	};

	begin(64, 64);
	for (unsigned i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
		struct request request = command(i % 16, a_read, 0, 4096);
		unsigned file;
		struct sg_io_hdr header = take(&file);

		memset(header.dxferp, 0x42, 4096);
		header.host_status = table[i][0];
		header.status = 2;
		give(file, &header);
		CHECK_EQUAL(drive_wait(&ring).length, 108);
		CHECK_EQUAL(request_response(&ring, &request), table[i][1]);
		CHECK_EQUAL(request_status(&ring, &request), 0);
		CHECK_EQUAL(request_in(&ring, &request)[0], 0xee);
	}
	end();
}

TEST(what_is_too_long_for_an_sg_unit_is_a_check_condition)
{
	struct request request;

	begin(64, 64);
	vfc_medium_put(medium);
	for (unsigned i = 0; i < FILES; i++) {
		int ends[2];

		close(device[i]);
		CHECK_EQUAL(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends), 0);
		ours[i] = ends[0];
		device[i] = ends[1];
	}
	medium = make(64, 2048);
	for (unsigned i = 0; i < FILES; i++)
		close(ours[i]);
	route(VFC_FINISH, true);
	request = command(0, a_write, 4096, 0);
	drive_wait(&ring);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	CHECK_EQUAL(request_status(&ring, &request), 2);
	CHECK_EQUAL(((uint8_t *)guest_at(&guest, request.response))[12 + 12], 0x24);
	CHECK_EQUAL(*(uint32_t *)(guest_at(&guest, request.response + 4)), 4096);
	end();
}

/* ---------------------------------------------------------------- how many */

static void send_many(unsigned count)
{
	for (unsigned i = 0; i < count; i++)
		command(i, test_unit_ready, 0, 0);
}

static void no_more_than(unsigned limit, unsigned count)
{
	struct sg_io_hdr headers[64];
	unsigned files[64], per_file[FILES] = { 0 };

	send_many(count);
	for (unsigned i = 0; i < limit; i++) {
		headers[i] = take(&files[i]);
		per_file[files[i]]++;
	}
	for (unsigned i = 0; i < FILES; i++)
		CHECK(per_file[i] <= VFC_SG_QUEUE);
	CHECK(!any(30));
	CHECK_EQUAL(vfc_sg_in_flight(medium), limit);
	for (unsigned i = 0; i < limit; i++)
		give(files[i], &headers[i]);
	for (unsigned i = limit; i < count; i++) {
		struct sg_io_hdr header = take(&files[0]);

		give(files[0], &header);
	}
	for (unsigned i = 0; i < count; i++)
		drive_wait(&ring);
	CHECK_EQUAL(vfc_sg_in_flight(medium), 0);
}

TEST(sg_files_carry_sixteen_each)
{
	begin(64, 64);
	no_more_than(32, 48);
	end();
}

TEST(sg_credits_of_the_unit_are_kept)
{
	begin(5, 64);
	no_more_than(5, 20);
	vfc_sg_limit(medium, 9);
	no_more_than(9, 20);
	end();
}

TEST(sg_credits_of_the_host_are_kept)
{
	begin(64, 6);
	no_more_than(6, 20);
	vfc_credits_set(host, 10);
	no_more_than(10, 20);
	end();
}

/* ---------------------------------------------------------------- what does not come back */

TEST(a_stop_does_not_wait_for_the_kernel)
{
	struct request read, write, after;
	struct sg_io_hdr headers[2], header;
	unsigned files[2], file;

	begin(64, 64);
	read = command(0, a_read, 0, 4096);
	write = command(1, a_write, 4096, 0);
	headers[0] = take(&files[0]);
	headers[1] = take(&files[1]);
	drive_stop(&ring, 20);
	CHECK_EQUAL(request_response(&ring, &read), S_RESET);
	CHECK_EQUAL(request_response(&ring, &write), S_RESET);
	CHECK_EQUAL(guest_stats(&guest, 0).abandoned, 2);
	drive_close(&ring);
	drive_open(&ring, &guest, 2, VFC_RING_REQUEST, 256, 0);

	/* The WRITE may still be carried out: what comes now must not be overtaken by it. */
	after = command(2, a_write, 4096, 0);
	drive_wait(&ring);
	CHECK_EQUAL(request_response(&ring, &after), S_OK);
	CHECK_EQUAL(request_status(&ring, &after), 8);
	CHECK(!any(0));

	for (unsigned i = 0; i < 2; i++) {
		if (headers[i].dxfer_direction == SG_DXFER_FROM_DEV)
			memset(headers[i].dxferp, 0x42, 4096);
		give(files[i], &headers[i]);
	}
	while (vfc_sg_in_flight(medium))
		guest_ping(&guest, 0);
	CHECK_EQUAL(((uint8_t *)guest_at(&guest, read.in))[0], 0xee);
	after = command(3, a_write, 4096, 0);
	header = take(&file);
	give(file, &header);
	drive_wait(&ring);
	CHECK_EQUAL(request_status(&ring, &after), 0);
	end();
}

TEST(an_sg_read_that_was_given_up_is_in_nobodys_way)
{
	struct sg_io_hdr header, next;
	unsigned file, other;

	begin(64, 64);
	command(0, a_read, 0, 4096);
	header = take(&file);
	drive_stop(&ring, 0);
	drive_close(&ring);
	drive_open(&ring, &guest, 2, VFC_RING_REQUEST, 256, 0);
	command(1, a_write, 512, 0);
	next = take(&other);
	give(other, &next);
	drive_wait(&ring);
	give(file, &header);
	while (vfc_sg_in_flight(medium))
		guest_ping(&guest, 0);
	end();
}

TEST(an_abort_waits_for_an_sg_command)
{
	struct vfc_msg msg = { .kind = VFC_MSG_ABORT, .match = { .response = S_ABORTED } };
	struct request request;
	struct sg_io_hdr header;
	uint64_t seq;
	unsigned file;

	begin(64, 64);
	request = command(0, a_write, 512, 0);
	header = take(&file);
	seq = guest_post(&guest, 0, &msg);
	CHECK(!guest_acked(&guest, 0, seq, 20));
	give(file, &header);
	CHECK_EQUAL(guest_ack(&guest, 0, seq).value, 1);
	drive_wait(&ring);
	CHECK_EQUAL(request_response(&ring, &request), S_ABORTED);

	/* But a stop does not, and the abort that waited is told so. */
	request = command(1, a_write, 512, 0);
	take(&file);
	seq = guest_post(&guest, 0, &msg);
	CHECK(!guest_acked(&guest, 0, seq, 20));
	drive_stop(&ring, 0);
	drive_close(&ring);
	CHECK_EQUAL(guest_event(&guest, 0).seq, seq);
	CHECK_EQUAL(request_response(&ring, &request), S_ABORTED);
	drive_open(&ring, &guest, 2, VFC_RING_REQUEST, 256, 0);
	end();
}

TEST(a_route_that_ends_does_not_wait_for_the_kernel)
{
	struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .in_flight = VFC_ABORT_RESET, .flags = VFC_ROUTE_GONE } };
	struct request request;
	unsigned file;

	begin(64, 64);
	request = command(0, a_write, 512, 0);
	take(&file);
	CHECK_EQUAL(guest_ask(&guest, 0, &msg).result, 0);
	drive_wait(&ring);
	CHECK_EQUAL(request_response(&ring, &request), S_RESET);
	CHECK_EQUAL(vfc_sg_in_flight(medium), 0);
	end();
}

TEST(an_sg_command_that_the_kernel_keeps_is_answered)
{
	const uint8_t cdb[16] = { SECOND };
	struct request request;
	struct sg_io_hdr header;
	unsigned file;

	begin(64, 64);
	request = command(0, cdb, 0, 0);
	header = take(&file);
	CHECK_EQUAL(header.timeout, 1000);
	drive_wait(&ring);
	CHECK_EQUAL(request_response(&ring, &request), S_TRANSPORT_FAILURE);
	CHECK_EQUAL(vfc_sg_in_flight(medium), 1);
	give(file, &header);
	while (vfc_sg_in_flight(medium))
		guest_ping(&guest, 0);
	end();
}

TEST(an_sg_device_that_goes_ends_its_commands)
{
	struct request requests[20];
	unsigned file;

	begin(64, 64);
	for (unsigned i = 0; i < 20; i++)
		requests[i] = command(i, i % 2 ? a_write : a_read, i % 2 ? 512 : 0, i % 2 ? 0 : 512);
	for (unsigned i = 0; i < 20; i++)
		take(&file);
	for (unsigned i = 0; i < FILES; i++)
		shutdown(device[i], SHUT_RDWR);
	for (unsigned i = 0; i < 20; i++)
		drive_wait(&ring);
	for (unsigned i = 0; i < 20; i++)
		CHECK_EQUAL(request_response(&ring, &requests[i]), S_BAD_TARGET);
	CHECK_EQUAL(vfc_sg_in_flight(medium), 0);
	requests[0] = command(0, a_read, 0, 512);
	drive_wait(&ring);
	CHECK_EQUAL(request_response(&ring, &requests[0]), S_BAD_TARGET);
	end();
}

/* ---------------------------------------------------------------- single commands, for Python */

TEST(a_single_sg_command)
{
	struct vfc_sg_command wanted = { .cdb = a_read, .cdb_length = 10, .in_length = 64, .timeout_ms = 5000 };
	struct vfc_sg_call *call, *ended;
	struct vfc_sg_outcome outcome;
	struct sg_io_hdr header;
	int ends[2];

	CHECK_EQUAL(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends), 0);
	CHECK_EQUAL(vfc_sg_submit(ends[0], &wanted, &call), 0);
	CHECK_EQUAL(vfc_sg_collect(ends[0], &ended), 0);
	CHECK_EQUAL(read(ends[1], &header, sizeof(header)), sizeof(header));
	CHECK_EQUAL(header.timeout, 5000);
	memset(header.dxferp, 0x42, 64);
	header.resid = 4;
	header.status = 2;
	header.sbp[0] = 0x70;
	header.sb_len_wr = 18;
	CHECK_EQUAL(write(ends[1], &header, sizeof(header)), sizeof(header));
	CHECK_EQUAL(vfc_sg_collect(ends[0], &ended), 1);
	CHECK(ended == call);
	vfc_sg_outcome(call, &outcome);
	CHECK_EQUAL(outcome.in_length, 60);
	CHECK_EQUAL(outcome.data_in[59], 0x42);
	CHECK_EQUAL(outcome.sense_length, 18);
	CHECK_EQUAL(outcome.sense[0], 0x70);
	vfc_sg_call_free(call);
	close(ends[1]);
	CHECK_EQUAL(vfc_sg_collect(ends[0], &ended), -ENODEV);
	close(ends[0]);
}

TEST(one_write_is_one_write)
{
	char path[] = "/tmp/vhostfc-write-XXXXXX", back[8] = { 0 };
	int fd = mkstemp(path);

	CHECK_EQUAL(vfc_write_once(path, (const uint8_t *)"abc", 3), 3);
	CHECK_EQUAL(read(fd, back, sizeof(back)), 3);
	CHECK_EQUAL(vfc_write_once("/nowhere/at/all", (const uint8_t *)"abc", 3), -ENOENT);
	unlink(path);
	close(fd);
}
