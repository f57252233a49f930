/*
 * generic.c - units behind /dev/sgN: commands as they are, and how many at a time.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "device.h"
#include "worker.h"

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

	device_begin(64, 64);
	for (unsigned i = 0; i < sizeof(cdbs) / sizeof(cdbs[0]); i++) {
		struct request request = device_command(i, cdbs[i], 0, 0);
		unsigned file;
		struct sg_io_hdr header = device_take(&file);

		CHECK_EQUAL(header.cmd_len, cdbs[i][16]);
		CHECK_EQUAL(memcmp(header.cmdp, cdbs[i], header.cmd_len < 16 ? header.cmd_len : 16), 0);
		CHECK_EQUAL(header.dxfer_direction, SG_DXFER_NONE);
		CHECK_EQUAL(header.timeout, 60000);
		device_give(file, &header);
		CHECK_EQUAL(drive_wait(&device.ring).length, 108);
		CHECK_EQUAL(request_response(&device.ring, &request), S_OK);
	}
	CHECK_EQUAL(guest_stats(&device.guest, 0).punted, 0);
	device_end();
}

TEST(sg_data_goes_both_ways_and_what_is_left_is_told)
{
	struct request request;
	struct sg_io_hdr header;
	unsigned file;

	device_begin(64, 64);
	request = device_command(0, a_write, 4096, 0);
	header = device_take(&file);
	CHECK_EQUAL(header.dxfer_direction, SG_DXFER_TO_DEV);
	CHECK_EQUAL(header.dxfer_len, 4096);
	CHECK_EQUAL(header.iovec_count, 0);
	CHECK_EQUAL(memcmp(header.dxferp, request_out(&device.ring, &request), 4096), 0);
	device_give(file, &header);
	CHECK_EQUAL(drive_wait(&device.ring).length, 108);
	CHECK_EQUAL(request_response(&device.ring, &request), S_OK);

	request = device_command(1, a_read, 0, 4096);
	header = device_take(&file);
	CHECK_EQUAL(header.dxfer_direction, SG_DXFER_FROM_DEV);
	memset(header.dxferp, 0x42, 4096);
	header.resid = 96;
	device_give(file, &header);
	CHECK_EQUAL(drive_wait(&device.ring).length, 108 + 4000);
	CHECK_EQUAL(request_in(&device.ring, &request)[3999], 0x42);
	CHECK_EQUAL(request_in(&device.ring, &request)[4000], 0xee);
	CHECK_EQUAL(*(uint32_t *)(guest_at(&device.guest, request.response + 4)), 96);
	CHECK_EQUAL(guest_stats(&device.guest, 0).read_bytes, 4000);
	CHECK_EQUAL(guest_stats(&device.guest, 0).written_bytes, 4096);
	device_end();
}

TEST(sg_sense_data_reach_the_guest)
{
	struct request request;
	struct sg_io_hdr header;
	unsigned file;

	device_begin(64, 64);
	request = device_command(0, test_unit_ready, 0, 0);
	header = device_take(&file);
	for (unsigned i = 0; i < 96; i++)
		header.sbp[i] = (unsigned char)i;
	header.sb_len_wr = 96;
	header.status = 2;
	header.driver_status = 8;
	device_give(file, &header);
	drive_wait(&device.ring);
	CHECK_EQUAL(request_response(&device.ring, &request), S_OK);
	CHECK_EQUAL(request_status(&device.ring, &request), 2);
	CHECK_EQUAL(*(uint32_t *)guest_at(&device.guest, request.response), 96);
	CHECK_EQUAL(((uint8_t *)guest_at(&device.guest, request.response))[12 + 95], 95);
	device_end();
}

TEST(an_sg_opcode_outside_the_mask_is_punted)
{
	const uint8_t inquiry[16] = { 0x12, 1, 0xb0, 0, 64, 0 };

	device_begin(64, 64);
	device_route(VFC_FINISH, false);
	device_command(0, inquiry, 0, 64);
	CHECK_EQUAL(guest_event(&device.guest, 0).kind, VFC_EVENT_PUNT);
	CHECK(!device_any(0));
	device_end();
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

	device_begin(64, 64);
	for (unsigned i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
		struct request request = device_command(i % 16, a_read, 0, 4096);
		unsigned file;
		struct sg_io_hdr header = device_take(&file);

		memset(header.dxferp, 0x42, 4096);
		header.host_status = table[i][0];
		header.status = 2;
		device_give(file, &header);
		CHECK_EQUAL(drive_wait(&device.ring).length, 108);
		CHECK_EQUAL(request_response(&device.ring, &request), table[i][1]);
		CHECK_EQUAL(request_status(&device.ring, &request), 0);
		CHECK_EQUAL(request_in(&device.ring, &request)[0], 0xee);
	}
	device_end();
}

/* Before Linux 5.14 that is where a time that was up is told, with host and SCSI status both 0. */
TEST(sg_driver_states_become_responses)
{
	const uint8_t table[][3] = {
		/* driver_status, status, response */
		{ 0x00, 0, S_OK }, { 0x08, 2, S_OK }, { 0x08, 0, S_OK }, { 0x28, 2, S_OK }, { 0x06, 2, S_OK },
		{ 0x06, 0, S_TRANSPORT_FAILURE }, { 0x16, 0, S_TRANSPORT_FAILURE }, { 0x01, 0, S_FAILURE },
		{ 0x04, 0, S_FAILURE }, { 0x05, 0, S_FAILURE }, { 0x07, 0, S_FAILURE },
	};

	device_begin(64, 64);
	for (unsigned i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
		struct request request = device_command(i, a_write, 512, 0);
		unsigned file;
		struct sg_io_hdr header = device_take(&file);

		header.driver_status = table[i][0];
		header.status = table[i][1];
		device_give(file, &header);
		drive_wait(&device.ring);
		CHECK_EQUAL(request_response(&device.ring, &request), table[i][2]);
		CHECK_EQUAL(request_status(&device.ring, &request), table[i][1]);
	}
	device_end();
}

static void set_port_state(const char *text)
{
	CHECK_EQUAL(ftruncate(device.port_state, 0), 0);
	CHECK_EQUAL(pwrite(device.port_state, text, strlen(text), 0), (ssize_t)strlen(text));
}

/* DID_ERROR says nothing of why: when the remote port has gone, or goes in the same moment, it was the path. */
TEST(an_sg_error_of_a_port_that_is_not_online_is_the_paths)
{
	const struct {
		const char *before, *after;
		uint8_t response;
	} table[] = {
		{ "Online\n", "Online\n", S_FAILURE },
		{ "Marginal\n", "Marginal\n", S_FAILURE },
		{ "Blocked\n", "Blocked\n", S_TRANSPORT_FAILURE },
		{ "Online\n", "Blocked\n", S_TRANSPORT_FAILURE },
		{ "Not Present\n", "Not Present\n", S_TRANSPORT_FAILURE },
		{ "", "", S_TRANSPORT_FAILURE },
	};

	device_begin(64, 64);
	device.port_state = memfd_create("port_state", MFD_CLOEXEC);
	for (unsigned i = 0; i < FILES; i++)
		close(device.ends[i]);
	device_reopen(1 << 20);
	for (unsigned i = 0; i < sizeof(table) / sizeof(table[0]); i++)
		for (uint16_t status = 6; status <= 7; status++) {
			struct request request = device_command(i, a_read, 0, 4096);
			unsigned file;
			struct sg_io_hdr header = device_take(&file);

			set_port_state(table[i].before);
			header.host_status = status;
			device_give(file, &header);
			/* It looks once between these. */
			guest_ping(&device.guest, 0);
			guest_ping(&device.guest, 0);
			set_port_state(table[i].after);
			CHECK_EQUAL(drive_wait(&device.ring).length, 108);
			CHECK_EQUAL(request_response(&device.ring, &request), table[i].response);
			CHECK_EQUAL(request_in(&device.ring, &request)[0], 0xee);
		}
	CHECK_EQUAL(vfc_credits_used(device.own), 0);
	close(device.port_state);
	device_end();
}

/* While it is looked at again the command is as good as with the kernel: a stop does not wait, and nothing is left. */
TEST(a_stop_does_not_wait_for_a_second_look)
{
	struct request request;
	struct sg_io_hdr header;
	unsigned file;

	device_begin(64, 64);
	device.port_state = memfd_create("port_state", MFD_CLOEXEC);
	for (unsigned i = 0; i < FILES; i++)
		close(device.ends[i]);
	device_reopen(1 << 20);
	set_port_state("Online\n");
	request = device_command(0, a_write, 4096, 0);
	header = device_take(&file);
	header.host_status = 7;
	device_give(file, &header);
	device_stop_and_start(0);
	device_await(0);
	request = device_command(1, a_write, 4096, 0);
	device_serve();
	CHECK_EQUAL(request_status(&device.ring, &request), 0);
	close(device.port_state);
	device_end();
}

TEST(what_is_too_long_for_an_sg_unit_is_a_check_condition)
{
	struct request request;

	device_begin(64, 64);
	for (unsigned i = 0; i < FILES; i++)
		close(device.ends[i]);
	device_reopen(2048);
	request = device_command(0, a_write, 4096, 0);
	drive_wait(&device.ring);
	CHECK_EQUAL(request_response(&device.ring, &request), S_OK);
	CHECK_EQUAL(request_status(&device.ring, &request), 2);
	CHECK_EQUAL(((uint8_t *)guest_at(&device.guest, request.response))[12 + 12], 0x24);
	CHECK_EQUAL(*(uint32_t *)(guest_at(&device.guest, request.response + 4)), 4096);
	device_end();
}

/* ---------------------------------------------------------------- how many */

static void send_many(unsigned count)
{
	for (unsigned i = 0; i < count; i++)
		device_command(i, test_unit_ready, 0, 0);
}

static void no_more_than(unsigned limit, unsigned count)
{
	struct sg_io_hdr headers[64];
	unsigned files[64], per_file[FILES] = { 0 };

	send_many(count);
	for (unsigned i = 0; i < limit; i++) {
		headers[i] = device_take(&files[i]);
		per_file[files[i]]++;
	}
	for (unsigned i = 0; i < FILES; i++)
		CHECK(per_file[i] <= VFC_SG_QUEUE);
	CHECK(!device_any(30));
	CHECK_EQUAL(vfc_credits_used(device.own), limit);
	for (unsigned i = 0; i < limit; i++)
		device_give(files[i], &headers[i]);
	for (unsigned i = limit; i < count; i++) {
		struct sg_io_hdr header = device_take(&files[0]);

		device_give(files[0], &header);
	}
	for (unsigned i = 0; i < count; i++)
		drive_wait(&device.ring);
	CHECK_EQUAL(vfc_credits_used(device.own), 0);
}

TEST(sg_files_carry_sixteen_each)
{
	device_begin(64, 64);
	no_more_than(32, 48);
	device_end();
}

TEST(sg_credits_of_the_unit_are_kept)
{
	device_begin(5, 64);
	no_more_than(5, 20);
	vfc_credits_set(device.own, 9);
	no_more_than(9, 20);
	device_end();
}

TEST(sg_credits_of_the_host_are_kept)
{
	device_begin(64, 6);
	no_more_than(6, 20);
	vfc_credits_set(device.host, 10);
	no_more_than(10, 20);
	device_end();
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

/* ---------------------------------------------------------------- nothing to do */

TEST(an_sg_engine_without_routes_has_nothing_to_do)
{
	struct vfc_path_engine *engine;
	struct vfc_path path = { 0 };
	struct vfc_cmd cmd = { .path = &path, .op = VFC_OP_FLUSH, .cdb_length = 32 }, *done;
	struct sg_io_hdr header;
	uint8_t cdb[32] = { 0 };
	struct pollfd ready;
	unsigned file;

	device_begin(64, 64);
	device_close_route(VFC_FINISH);
	CHECK_EQUAL(path_sg_new(&engine), 0);
	path.engine = engine;
	path.medium = device.medium;
	cmd.cdb = cdb;
	CHECK_EQUAL(engine->ops->open(engine, &path, 0), 0);
	CHECK_EQUAL(engine->ops->submit(engine, &cmd), VFC_QUEUED);
	header = device_take(&file);
	device_give(file, &header);
	ready = (struct pollfd){ .fd = engine->ops->wait_fd(engine), .events = POLLIN };
	CHECK_EQUAL(poll(&ready, 1, 10000), 1);
	CHECK_EQUAL(engine->ops->reap(engine, &done, 1), 1);
	CHECK(done == &cmd);
	engine->ops->close(engine, &path);
	/* Its next look at what is late would have been within a second: a worker that is woken then never sleeps again. */
	CHECK_EQUAL(poll(&ready, 1, 1200), 0);
	path_sg_free(engine);
	device_end();
}

/* ---------------------------------------------------------------- many ends */

#define ENDS 4	/* that are taken at a time */

/* An engine of the test's own over the device's files, each of which has all that it takes. */
static struct {
	struct vfc_path_engine *engine;
	struct vfc_path path;
	struct vfc_cmd commands[16 * FILES];
} bare;

static void bare_submit(struct vfc_cmd *command)
{
	static const uint8_t cdb[32];	/* TEST UNIT READY */

	*command = (struct vfc_cmd){ .path = &bare.path, .op = VFC_OP_FLUSH, .cdb = cdb, .cdb_length = sizeof(cdb) };
	CHECK_EQUAL(bare.engine->ops->submit(bare.engine, command), VFC_QUEUED);
}

static void bare_begin(void)
{
	device_begin(64, 64);
	device_close_route(VFC_FINISH);
	bare.path = (struct vfc_path){ .medium = device.medium };
	CHECK_EQUAL(path_sg_new(&bare.engine), 0);
	CHECK_EQUAL(bare.engine->ops->open(bare.engine, &bare.path, 0), 0);
	for (unsigned i = 0; i < 16 * FILES; i++)
		bare_submit(&bare.commands[i]);
}

static void bare_end(void)
{
	bare.engine->ops->close(bare.engine, &bare.path);
	path_sg_free(bare.engine);
	device_end();
}

TEST(an_sg_file_with_many_ends_keeps_no_other_waiting)
{
	struct sg_io_hdr others[16], header;
	struct vfc_cmd *done[ENDS];
	unsigned file, waiting = 0, rounds = 0, took = 0;

	bare_begin();
	/* The first file's come back, and one of the second's. */
	for (unsigned i = 0; i < 16 * FILES; i++) {
		header = device_take(&file);
		if (file)
			others[waiting++] = header;
		else
			device_give(file, &header);
	}
	device_give(1, &others[--waiting]);
	/* What is taken from the first is asked for again, and back before anybody looks. */
	for (bool seen = false; !seen; rounds++) {
		CHECK(rounds < 8);
		took = bare.engine->ops->reap(bare.engine, done, ENDS);
		for (unsigned i = 0; i < took; i++) {
			seen |= (done[i] - bare.commands) % FILES;
			bare_submit(done[i]);
			header = device_take(&file);
			device_give(file, &header);
		}
	}
	while (waiting)
		device_give(1, &others[--waiting]);
	for (unsigned left = 16 * FILES; left; left -= took)
		took = bare.engine->ops->reap(bare.engine, done, ENDS);
	bare_end();
}

TEST(what_ends_with_its_sg_device_ends_at_once)
{
	struct vfc_cmd *done[ENDS];
	unsigned file;

	bare_begin();
	for (unsigned i = 0; i < 16 * FILES; i++)
		device_take(&file);
	for (unsigned i = 0; i < FILES; i++)
		shutdown(device.ends[i], SHUT_RDWR);
	for (unsigned left = 16 * FILES, took; left; left -= took) {
		struct pollfd more = { .fd = bare.engine->ops->wait_fd(bare.engine), .events = POLLIN };

		CHECK_EQUAL(poll(&more, 1, 1), 1);
		took = bare.engine->ops->reap(bare.engine, done, ENDS);
		for (unsigned i = 0; i < took; i++)
			CHECK_EQUAL(done[i]->result->response, S_BAD_TARGET);
	}
	bare_end();
}
