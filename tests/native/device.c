/*
 * device.c - see device.h.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "device.h"

struct device device;

static void open_files(int ours[FILES])
{
	for (unsigned i = 0; i < FILES; i++) {
		int ends[2];

		CHECK_EQUAL(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends), 0);
		ours[i] = ends[0];
		device.ends[i] = ends[1];
	}
}

void device_reopen(uint32_t max_transfer)
{
	int ours[FILES];
	struct vfc_sg_setup setup = {
		.fds = ours, .count = FILES, .share = FILES, .max_transfer = max_transfer,
		.own = device.own, .host = device.host, .port_state_fd = device.port_state,
	};

	vfc_medium_put(device.medium);
	open_files(ours);
	for (unsigned i = 0; i < 256; i++)
		setup.timeouts[i] = 60;
	setup.timeouts[SECOND] = 1;
	CHECK_EQUAL(vfc_sg_medium_new(&setup, &device.medium), 0);
	for (unsigned i = 0; i < FILES; i++)
		close(ours[i]);
	device_route(VFC_FINISH, true);
}

void device_route(uint8_t in_flight, bool inquiries)
{
	struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .medium = device.medium, .in_flight = in_flight } };

	memset(msg.route.mask, 0xff, sizeof(msg.route.mask));
	if (!inquiries)
		msg.route.mask[0x12 / 8] &= (uint8_t)~(1 << (0x12 % 8));
	CHECK_EQUAL(guest_ask(&device.guest, 0, &msg).result, 0);
}

void device_close_route(uint8_t in_flight)
{
	struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .in_flight = in_flight } };

	CHECK_EQUAL(guest_ask(&device.guest, 0, &msg).result, 0);
}

void device_begin(uint32_t credits, uint32_t limit)
{
	device = (struct device){ .port_state = -1 };
	guest_open(&device.guest, NULL);
	CHECK_EQUAL(vfc_credits_new(credits, &device.own), 0);
	CHECK_EQUAL(vfc_credits_new(limit, &device.host), 0);
	device_reopen(1 << 20);
	drive_open(&device.ring, &device.guest, 2, VFC_RING_REQUEST, 256, 0);
}

void device_end(void)
{
	CHECK_EQUAL(drive_stop(&device.ring, 0).result, 0);
	CHECK_EQUAL(guest_stats(&device.guest, 0).in_flight, 0);
	drive_close(&device.ring);
	guest_close(&device.guest);
	vfc_medium_put(device.medium);
	vfc_credits_put(device.own);
	vfc_credits_put(device.host);
	for (unsigned i = 0; i < FILES; i++)
		close(device.ends[i]);
}

struct sg_io_hdr device_take(unsigned *ret_file)
{
	struct pollfd fds[FILES];
	struct sg_io_hdr header;

	for (unsigned i = 0; i < FILES; i++)
		fds[i] = (struct pollfd){ .fd = device.ends[i], .events = POLLIN };
	CHECK(poll(fds, FILES, 10000) > 0);
	for (unsigned i = 0; i < FILES; i++)
		if (fds[i].revents & POLLIN) {
			CHECK_EQUAL(read(device.ends[i], &header, sizeof(header)), sizeof(header));
			CHECK_EQUAL(header.interface_id, 'S');
			*ret_file = i;
			return header;
		}
	abort();
}

bool device_any(int ms)
{
	struct pollfd fds[FILES];

	for (unsigned i = 0; i < FILES; i++)
		fds[i] = (struct pollfd){ .fd = device.ends[i], .events = POLLIN };
	return poll(fds, FILES, ms) > 0;
}

void device_give(unsigned file, const struct sg_io_hdr *header)
{
	CHECK_EQUAL(write(device.ends[file], header, sizeof(*header)), sizeof(*header));
}

void device_serve(void)
{
	unsigned file;
	struct sg_io_hdr header = device_take(&file);

	device_give(file, &header);
	drive_wait(&device.ring);
}

void device_await(uint32_t count)
{
	while (vfc_credits_used(device.own) != count)
		guest_ping(&device.guest, 0);
}

void device_stop_and_start(uint32_t ms)
{
	drive_stop(&device.ring, ms);
	drive_close(&device.ring);
	drive_open(&device.ring, &device.guest, 2, VFC_RING_REQUEST, 256, 0);
}

struct request device_command(unsigned slot, const uint8_t *cdb, uint32_t out, uint32_t in)
{
	struct request request = request_make(&device.ring, slot, cdb, out, in);

	for (uint32_t i = 0; i < out; i++)
		request_out(&device.ring, &request)[i] = (uint8_t)(i * 31 + 7);
	memset(request_in(&device.ring, &request), 0xee, in);
	request_send(&device.ring, &request);
	return request;
}
