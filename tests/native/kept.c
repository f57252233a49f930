/*
 * kept.c - units behind /dev/sgN: what the kernel does not give back, and what must not be because it may yet do so.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include "device.h"

TEST(a_stop_does_not_wait_for_the_kernel)
{
	struct request read, write, after;
	struct sg_io_hdr headers[2];
	unsigned files[2];

	device_begin(64, 64);
	read = device_command(0, a_read, 0, 4096);
	write = device_command(1, a_write, 4096, 0);
	headers[0] = device_take(&files[0]);
	headers[1] = device_take(&files[1]);
	device_stop_and_start(20);
	CHECK_EQUAL(request_response(&device.ring, &read), S_RESET);
	CHECK_EQUAL(request_response(&device.ring, &write), S_RESET);
	CHECK_EQUAL(guest_stats(&device.guest, 0).abandoned, 2);

	/* The WRITE may still be carried out: what comes now must not be overtaken by it. */
	after = device_command(2, a_write, 4096, 0);
	drive_wait(&device.ring);
	CHECK_EQUAL(request_response(&device.ring, &after), S_OK);
	CHECK_EQUAL(request_status(&device.ring, &after), 8);
	CHECK(!device_any(0));

	for (unsigned i = 0; i < 2; i++) {
		if (headers[i].dxfer_direction == SG_DXFER_FROM_DEV)
			memset(headers[i].dxferp, 0x42, 4096);
		device_give(files[i], &headers[i]);
	}
	device_await(0);
	CHECK_EQUAL(((uint8_t *)guest_at(&device.guest, read.in))[0], 0xee);
	after = device_command(3, a_write, 4096, 0);
	device_serve();
	CHECK_EQUAL(request_status(&device.ring, &after), 0);
	device_end();
}

TEST(an_sg_read_that_was_given_up_is_in_nobodys_way)
{
	struct sg_io_hdr header;
	unsigned file;

	device_begin(64, 64);
	device_command(0, a_read, 0, 4096);
	header = device_take(&file);
	device_stop_and_start(0);
	device_command(1, a_write, 512, 0);
	device_serve();
	device_give(file, &header);
	device_await(0);
	device_end();
}

TEST(an_abort_waits_for_an_sg_command)
{
	struct vfc_msg msg = { .kind = VFC_MSG_ABORT, .match = { .response = S_ABORTED } };
	struct request request;
	struct sg_io_hdr header;
	uint64_t seq;
	unsigned file;

	device_begin(64, 64);
	request = device_command(0, a_write, 512, 0);
	header = device_take(&file);
	seq = guest_post(&device.guest, 0, &msg);
	CHECK(!guest_acked(&device.guest, 0, seq, 20));
	device_give(file, &header);
	CHECK_EQUAL(guest_ack(&device.guest, 0, seq).value, 1);
	drive_wait(&device.ring);
	CHECK_EQUAL(request_response(&device.ring, &request), S_ABORTED);

	/* But a stop does not, and the abort that waited is told so. */
	request = device_command(1, a_write, 512, 0);
	device_take(&file);
	seq = guest_post(&device.guest, 0, &msg);
	CHECK(!guest_acked(&device.guest, 0, seq, 20));
	drive_stop(&device.ring, 0);
	drive_close(&device.ring);
	CHECK_EQUAL(guest_event(&device.guest, 0).seq, seq);
	CHECK_EQUAL(request_response(&device.ring, &request), S_ABORTED);
	drive_open(&device.ring, &device.guest, 2, VFC_RING_REQUEST, 256, 0);
	device_end();
}

TEST(a_route_that_ends_does_not_wait_for_the_kernel)
{
	struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .in_flight = VFC_ABORT_RESET, .flags = VFC_ROUTE_GONE } };
	struct request request;
	struct sg_io_hdr header;
	unsigned file;

	device_begin(64, 64);
	request = device_command(0, a_write, 512, 0);
	header = device_take(&file);
	CHECK_EQUAL(guest_ask(&device.guest, 0, &msg).result, 0);
	drive_wait(&device.ring);
	CHECK_EQUAL(request_response(&device.ring, &request), S_RESET);
	/* But it counts until it has come back. */
	CHECK_EQUAL(vfc_credits_used(device.own), 1);
	CHECK_EQUAL(vfc_credits_used(device.host), 1);
	CHECK_EQUAL(vfc_credits_stale(device.own), 1);
	device_give(file, &header);
	device_await(0);
	CHECK_EQUAL(vfc_credits_used(device.host), 0);
	CHECK_EQUAL(vfc_credits_stale(device.own), 0);
	device_end();
}

TEST(what_was_given_up_outlives_its_route)
{
	int old[FILES], *now = device.ends;
	struct request request;
	struct sg_io_hdr write, header;
	unsigned file;

	device_begin(64, 64);
	request = device_command(0, a_write, 4096, 0);
	write = device_take(&file);
	device_stop_and_start(0);
	CHECK_EQUAL(request_response(&device.ring, &request), S_RESET);
	device_close_route(VFC_FINISH);
	CHECK_EQUAL(vfc_credits_used(device.own), 1);

	/* The path is back, with files of its own: what comes now must not be overtaken by what went before. */
	memcpy(old, now, sizeof(old));
	device_reopen(1 << 20);
	request = device_command(1, a_write, 4096, 0);
	drive_wait(&device.ring);
	CHECK_EQUAL(request_response(&device.ring, &request), S_OK);
	CHECK_EQUAL(request_status(&device.ring, &request), SAM_BUSY);
	CHECK(!device_any(0));

	CHECK_EQUAL(send(old[file], &write, sizeof(write), 0), sizeof(write));
	device_await(0);
	request = device_command(2, a_write, 4096, 0);
	device_serve();
	CHECK_EQUAL(request_status(&device.ring, &request), 0);
	/* The old files are closed with it. */
	guest_ping(&device.guest, 0);
	for (unsigned i = 0; i < FILES; i++) {
		CHECK_EQUAL(recv(old[i], &header, sizeof(header), 0), 0);
		close(old[i]);
	}
	device_end();
}

TEST(an_old_device_that_goes_gives_back_what_it_had)
{
	int old[FILES];
	struct request request;
	unsigned file;

	device_begin(64, 64);
	device_command(0, a_write, 4096, 0);
	device_command(1, a_read, 0, 4096);
	device_take(&file);
	device_take(&file);
	device_stop_and_start(0);
	device_close_route(VFC_FINISH);
	memcpy(old, device.ends, sizeof(old));
	device_reopen(1 << 20);
	CHECK_EQUAL(vfc_credits_used(device.own), 2);
	for (unsigned i = 0; i < FILES; i++)
		close(old[i]);
	device_await(0);
	request = device_command(2, a_write, 512, 0);
	device_serve();
	CHECK_EQUAL(request_status(&device.ring, &request), 0);
	device_end();
}

TEST(a_host_counts_what_an_old_route_left)
{
	struct request request;
	struct sg_io_hdr header;
	unsigned file, other;
	int old[FILES];

	device_begin(64, 2);
	device_command(0, a_read, 0, 512);
	header = device_take(&file);
	device_stop_and_start(0);
	device_close_route(VFC_FINISH);
	memcpy(old, device.ends, sizeof(old));
	device_reopen(1 << 20);
	for (unsigned i = 1; i < 4; i++)
		request = device_command(i, a_read, 0, 512);
	for (unsigned i = 1; i < 4; i++) {
		struct sg_io_hdr one = device_take(&other);

		CHECK(!device_any(20));
		device_give(other, &one);
		drive_wait(&device.ring);
	}
	CHECK_EQUAL(request_status(&device.ring, &request), 0);
	CHECK_EQUAL(send(old[file], &header, sizeof(header), 0), sizeof(header));
	device_await(0);
	for (unsigned i = 0; i < FILES; i++)
		close(old[i]);
	device_end();
}

TEST(an_engine_ends_whatever_the_kernel_keeps)
{
	unsigned file;

	device_begin(64, 64);
	device_command(0, a_write, 4096, 0);
	device_command(1, a_read, 0, 1 << 20);
	device_take(&file);
	device_take(&file);
	device_stop_and_start(0);
	device_close_route(VFC_FINISH);
	device_end();
}

/* An abort counts on a command that was answered without the kernel: it has not come true. */
TEST(an_abort_of_what_the_kernel_keeps_fails)
{
	const uint8_t cdb[16] = { SECOND };
	struct vfc_msg msg = { .kind = VFC_MSG_ABORT, .match = { .response = S_ABORTED } };
	struct request request;
	struct sg_io_hdr header;
	struct vfc_event ack;
	uint64_t seq;
	unsigned file;

	device_begin(64, 64);
	request = device_command(0, cdb, 512, 0);
	header = device_take(&file);
	seq = guest_post(&device.guest, 0, &msg);
	ack = guest_ack(&device.guest, 0, seq);
	CHECK_EQUAL(ack.result, -ETIMEDOUT);
	CHECK_EQUAL(ack.value, 1);
	drive_wait(&device.ring);
	CHECK_EQUAL(request_response(&device.ring, &request), S_ABORTED);
	device_give(file, &header);
	device_await(0);
	device_end();
}

/* ---------------------------------------------------------------- in nobody's way */

TEST(what_the_kernel_keeps_for_ever_is_not_waited_for)
{
	const uint8_t second[16] = { SECOND };
	struct sg_io_hdr headers[4], header;
	struct request request;
	unsigned files[4], file;

	for (unsigned round = 0; round < 2; round++) {
		device_begin(round ? 64 : 4, round ? 4 : 64);
		for (unsigned i = 0; i < 4; i++)
			device_command(i, second, 0, 512);
		for (unsigned i = 0; i < 4; i++)
			headers[i] = device_take(&files[i]);
		for (unsigned i = 0; i < 4; i++)
			drive_wait(&device.ring);
		request = device_command(4, a_read, 0, 512);
		drive_wait(&device.ring);
		CHECK_EQUAL(request_response(&device.ring, &request), S_OK);
		CHECK_EQUAL(request_status(&device.ring, &request), SAM_BUSY);
		device_give(files[0], &headers[0]);
		device_await(3);
		request = device_command(5, a_read, 0, 512);
		header = device_take(&file);
		device_give(file, &header);
		drive_wait(&device.ring);
		CHECK_EQUAL(request_status(&device.ring, &request), 0);
		device_end();
	}
}

TEST(files_full_of_what_the_kernel_keeps_are_not_waited_for)
{
	const uint8_t second[16] = { SECOND };
	struct request request;
	unsigned file;

	device_begin(64, 64);
	for (unsigned i = 0; i < FILES * VFC_SG_QUEUE; i++)
		device_command(i, second, 0, 512);
	for (unsigned i = 0; i < FILES * VFC_SG_QUEUE; i++)
		device_take(&file);
	for (unsigned i = 0; i < FILES * VFC_SG_QUEUE; i++)
		drive_wait(&device.ring);
	request = device_command(40, a_read, 0, 512);
	drive_wait(&device.ring);
	CHECK_EQUAL(request_status(&device.ring, &request), SAM_BUSY);
	device_end();
}

/* Beside what the kernel keeps there is one that may come back: it is waited for, but not for ever. */
TEST(a_command_waits_for_a_credit_for_its_time)
{
	const uint8_t second[16] = { SECOND };
	struct request request;
	struct sg_io_hdr header;
	unsigned file;

	device_begin(2, 64);
	device_command(0, second, 0, 512);
	device_take(&file);
	drive_wait(&device.ring);
	device_command(1, a_read, 0, 512);
	header = device_take(&file);
	request = device_command(2, second, 0, 512);
	CHECK(drive_silent(&device.ring, 500));
	drive_wait(&device.ring);
	CHECK_EQUAL(request_response(&device.ring, &request), S_TRANSPORT_FAILURE);
	CHECK(!device_any(0));
	device_give(file, &header);
	drive_wait(&device.ring);
	device_end();
}

TEST(an_sg_command_that_the_kernel_keeps_is_answered)
{
	const uint8_t cdb[16] = { SECOND };
	struct request request;
	struct sg_io_hdr header;
	unsigned file;

	device_begin(64, 64);
	request = device_command(0, cdb, 0, 0);
	header = device_take(&file);
	CHECK_EQUAL(header.timeout, 1000);
	drive_wait(&device.ring);
	CHECK_EQUAL(request_response(&device.ring, &request), S_TRANSPORT_FAILURE);
	CHECK_EQUAL(vfc_credits_used(device.own), 1);
	device_give(file, &header);
	device_await(0);
	device_end();
}

TEST(an_sg_device_that_goes_ends_its_commands)
{
	struct request requests[20];
	unsigned file;

	device_begin(64, 64);
	for (unsigned i = 0; i < 20; i++)
		requests[i] = device_command(i, i % 2 ? a_write : a_read, i % 2 ? 512 : 0, i % 2 ? 0 : 512);
	for (unsigned i = 0; i < 20; i++)
		device_take(&file);
	for (unsigned i = 0; i < FILES; i++)
		shutdown(device.ends[i], SHUT_RDWR);
	for (unsigned i = 0; i < 20; i++)
		drive_wait(&device.ring);
	for (unsigned i = 0; i < 20; i++)
		CHECK_EQUAL(request_response(&device.ring, &requests[i]), S_BAD_TARGET);
	CHECK_EQUAL(vfc_credits_used(device.own), 0);
	requests[0] = device_command(0, a_read, 0, 512);
	drive_wait(&device.ring);
	CHECK_EQUAL(request_response(&device.ring, &requests[0]), S_BAD_TARGET);
	device_end();
}
