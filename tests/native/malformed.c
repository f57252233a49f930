/*
 * malformed.c - what a driver can get wrong, one test each: it is answered where there is a place to answer,
 * counted, and the next good command runs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#include "harness.h"

static struct guest guest;
static struct driver ring;
static struct unit unit;

static void begin(uint64_t features)
{
	guest_open(&guest, NULL);
	unit_open(&unit, VFC_MEDIUM_MEMORY, 1024, 2);
	CHECK_EQUAL(guest_route(&guest, 0, unit.medium, VFC_FINISH).result, 0);
	drive_open(&ring, &guest, 2, VFC_RING_REQUEST, 16, features);
}

/* A read of one block works. */
static void still_works(void)
{
	struct request request = request_rw(&ring, 3, OP_READ_10, 7, 1);
	struct used used;

	unit.bytes[7 * 512] = 0x5a;
	request_send(&ring, &request);
	used = drive_wait(&ring);
	CHECK_EQUAL(used.head, request.head);
	CHECK_EQUAL(used.length, 108 + 512);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	CHECK_EQUAL(*request_in(&ring, &request), 0x5a);
}

static void end(void)
{
	still_works();
	CHECK_EQUAL(guest_stats(&guest, 0).in_flight, 0);
	CHECK_EQUAL(drive_stop(&ring, 0).value, ring.avail_index);
	drive_close(&ring);
	guest_close(&guest);
	unit_close(&unit);
}

/* The chain at 0 comes back with this length; with 108 the response says FAILURE. */
static void rejected(const struct request *request, uint32_t length)
{
	struct used used;

	drive_offer(&ring, 0);
	drive_kick(&ring);
	used = drive_wait(&ring);
	CHECK_EQUAL(used.head, 0);
	CHECK_EQUAL(used.length, length);
	CHECK_EQUAL(request_response(&ring, request), length ? S_FAILURE : 0xee);
}

/* ---------------------------------------------------------------- chains */

TEST(a_loop_of_descriptors)
{
	struct request request;

	begin(0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	drive_desc(&ring, 2, request.in, 512, D_WRITE | D_NEXT, 1);
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_chain, 1);
	end();
}

TEST(a_loop_without_room_for_an_answer)
{
	struct request request;

	begin(0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	drive_desc(&ring, 0, request.header, 51, D_NEXT, 0);
	rejected(&request, 0);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_chain, 1);
	end();
}

TEST(next_outside_the_ring)
{
	struct request request;

	begin(0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	drive_desc(&ring, 1, request.response, 108, D_WRITE | D_NEXT, 16);
	rejected(&request, 108);
	drive_desc(&ring, 0, request.header, 51, D_NEXT, 0xffff);
	memset(guest_at(&guest, request.response), 0xee, 108);
	rejected(&request, 0);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_chain, 2);
	end();
}

TEST(readable_after_writable)
{
	struct request request;

	begin(0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	drive_desc(&ring, 2, request.in, 512, 0, 0);
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_chain, 1);
	end();
}

TEST(lengths_beyond_32_bits)
{
	/* 16 descriptors of 256 MiB are 4 GiB: the region is that large, its file is sparse. */
	struct request request;
	struct vfc_map *maps[2], *huge;
	struct vfc_mem *mem;
	int fd = memfd_create("huge", MFD_CLOEXEC);

	begin(0);
	CHECK_EQUAL(ftruncate(fd, 1ll << 33), 0);
	CHECK_EQUAL(vfc_map_new(fd, 1ull << 40, 1ull << 33, 1ull << 40, 0, &huge), 0);
	maps[0] = huge;
	maps[1] = guest.map;
	CHECK_EQUAL(vfc_mem_new(maps, 2, &mem), 0);
	guest_set_memory(&guest, mem);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	drive_desc(&ring, 2, 1ull << 40, 0xffffff94, D_WRITE | D_NEXT, 3);	/* 108 and this: 2^32 */
	drive_desc(&ring, 3, 1ull << 40, 1, D_WRITE, 0);
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_chain, 1);
	vfc_mem_put(mem);
	vfc_map_put(huge);
	close(fd);
	end();
}

TEST(empty_descriptors_are_nothing)
{
	struct request request;
	struct used used;

	begin(0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	drive_desc(&ring, 0, request.header, 51, D_NEXT, 4);
	drive_desc(&ring, 4, 0xdead, 0, D_NEXT, 5);
	drive_desc(&ring, 5, 0xdead, 0, D_WRITE | D_NEXT, 1);
	drive_desc(&ring, 2, request.in, 512, D_WRITE | D_NEXT, 6);
	drive_desc(&ring, 6, ~0ull, 0, D_WRITE, 0);
	drive_offer(&ring, 0);
	drive_kick(&ring);
	used = drive_wait(&ring);
	CHECK_EQUAL(used.length, 108 + 512);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	end();
}

TEST(headers_in_many_pieces)
{
	struct request request;
	struct used used;
	uint16_t at = 0;
	uint64_t table;
	struct desc *descs;

	begin(FEATURE_INDIRECT);
	request = request_rw(&ring, 0, OP_READ_10, 9, 1);
	table = guest_alloc(&guest, 16 * 256);
	descs = guest_at(&guest, table);
	for (unsigned i = 0; i < 51; i++, at++)
		descs[at] = (struct desc){ request.header + i, 1, D_NEXT, (uint16_t)(at + 1) };
	for (unsigned i = 0; i < 107; i++, at++)
		descs[at] = (struct desc){ request.response + i, 1, D_WRITE | D_NEXT, (uint16_t)(at + 1) };
	/* The response's last byte and the data's first share a piece. */
	memcpy(guest_at(&guest, request.response + 107), "\xee", 1);
	descs[at] = (struct desc){ request.in, 513, D_WRITE, 0 };
	guest_alloc(&guest, 64);
	memset(unit.bytes + 9 * 512, 0x77, 512);
	drive_desc(&ring, 0, table, 16u * (at + 1u), D_INDIRECT, 0);
	drive_offer(&ring, 0);
	drive_kick(&ring);
	used = drive_wait(&ring);
	CHECK_EQUAL(used.length, 108 + 512);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	for (unsigned i = 0; i < 512; i++)
		CHECK_EQUAL(request_in(&ring, &request)[1 + i], 0x77);
	end();
}

/* ---------------------------------------------------------------- addresses */

TEST(an_address_outside_every_region)
{
	struct request request;

	begin(0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	drive_desc(&ring, 2, RAM_GPA + RAM_SIZE - 511, 512, D_WRITE, 0);
	rejected(&request, 108);
	drive_desc(&ring, 2, 0, 512, D_WRITE, 0);
	rejected(&request, 108);
	memset(guest_at(&guest, request.response), 0xee, 108);
	drive_desc(&ring, 0, RAM_GPA - 1, 51, D_NEXT, 1);
	rejected(&request, 0);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_address, 3);
	end();
}

TEST(an_address_that_wraps)
{
	struct request request;

	begin(0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	drive_desc(&ring, 2, ~0ull - 255, 512, D_WRITE, 0);
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_address, 1);
	end();
}

TEST(a_buffer_across_regions)
{
	/* The same memory as two regions of odd sizes, adjacent in the guest, far apart here. */
	struct vfc_map *maps[2];
	struct vfc_mem *mem;
	struct request request;
	struct used used;
	uint64_t cut;

	begin(0);
	request = request_rw(&ring, 0, OP_READ_10, 5, 1);
	cut = request.in + 100 - RAM_GPA;
	CHECK_EQUAL(vfc_map_new(guest.fd, RAM_GPA, cut, RAM_USER, 0, &maps[0]), 0);
	CHECK_EQUAL(vfc_map_new(guest.fd, RAM_GPA + cut, RAM_SIZE - cut, RAM_USER + cut, cut, &maps[1]), 0);
	CHECK_EQUAL(vfc_mem_new(maps, 2, &mem), 0);
	guest_set_memory(&guest, mem);
	for (unsigned i = 0; i < 512; i++)
		unit.bytes[5 * 512 + i] = (uint8_t)i;
	request_send(&ring, &request);
	used = drive_wait(&ring);
	CHECK_EQUAL(used.length, 108 + 512);
	CHECK_EQUAL(memcmp(request_in(&ring, &request), unit.bytes + 5 * 512, 512), 0);
	guest_set_memory(&guest, guest.mem);
	vfc_mem_put(mem);
	vfc_map_put(maps[0]);
	vfc_map_put(maps[1]);
	end();
}

/* ---------------------------------------------------------------- indirect tables */

static struct request indirect(uint64_t *ret_table)
{
	struct request request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	uint64_t table = guest_alloc(&guest, 16 * 8);
	struct desc *descs = guest_at(&guest, table);

	descs[0] = (struct desc){ request.header, 51, D_NEXT, 1 };
	descs[1] = (struct desc){ request.response, 108, D_WRITE | D_NEXT, 2 };
	descs[2] = (struct desc){ request.in, 512, D_WRITE, 0 };
	drive_desc(&ring, 0, table, 48, D_INDIRECT, 0);
	*ret_table = table;
	return request;
}

TEST(an_indirect_table)
{
	struct request request;
	uint64_t table;

	begin(FEATURE_INDIRECT);
	request = indirect(&table);
	drive_offer(&ring, 0);
	drive_kick(&ring);
	CHECK_EQUAL(drive_wait(&ring).length, 108 + 512);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	end();
}

TEST(an_indirect_table_after_direct_descriptors)
{
	struct request request;
	uint64_t table;

	begin(FEATURE_INDIRECT);
	request = indirect(&table);
	drive_desc(&ring, 0, request.header, 51, D_NEXT, 1);
	drive_desc(&ring, 1, table + 16, 32, D_INDIRECT, 0);
	/* Its own numbering begins at 0. */
	((struct desc *)guest_at(&guest, table))[1].next = 1;
	drive_offer(&ring, 0);
	drive_kick(&ring);
	CHECK_EQUAL(drive_wait(&ring).length, 108 + 512);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	end();
}

TEST(an_indirect_table_at_an_odd_address_across_regions)
{
	struct vfc_map *maps[2];
	struct request request;
	struct vfc_mem *mem;
	uint64_t table, odd, cut;

	begin(FEATURE_INDIRECT);
	request = indirect(&table);
	odd = guest_alloc(&guest, 128) + 3;
	memcpy(guest_at(&guest, odd), guest_at(&guest, table), 48);
	cut = odd + 21 - RAM_GPA;
	CHECK_EQUAL(vfc_map_new(guest.fd, RAM_GPA, cut, RAM_USER, 0, &maps[0]), 0);
	CHECK_EQUAL(vfc_map_new(guest.fd, RAM_GPA + cut, RAM_SIZE - cut, RAM_USER + cut, cut, &maps[1]), 0);
	CHECK_EQUAL(vfc_mem_new(maps, 2, &mem), 0);
	guest_set_memory(&guest, mem);
	drive_desc(&ring, 0, odd, 48, D_INDIRECT, 0);
	drive_offer(&ring, 0);
	drive_kick(&ring);
	CHECK_EQUAL(drive_wait(&ring).length, 108 + 512);
	CHECK_EQUAL(request_response(&ring, &request), S_OK);
	guest_set_memory(&guest, guest.mem);
	vfc_mem_put(mem);
	vfc_map_put(maps[0]);
	vfc_map_put(maps[1]);
	end();
}

TEST(indirect_lengths)
{
	const uint32_t bad[] = { 0, 8, 47, 16 * 1025, 0xfffffff0 };
	struct request request;
	uint64_t table;

	begin(FEATURE_INDIRECT);
	request = indirect(&table);
	for (unsigned i = 0; i < 5; i++) {
		drive_desc(&ring, 0, table, bad[i], D_INDIRECT, 0);
		rejected(&request, 0);
	}
	CHECK_EQUAL(guest_stats(&guest, 0).bad_indirect, 5);
	end();
}

TEST(an_indirect_table_within_another)
{
	struct request request;
	uint64_t table;

	begin(FEATURE_INDIRECT);
	request = indirect(&table);
	((struct desc *)guest_at(&guest, table))[2].flags |= D_INDIRECT;
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_indirect, 1);
	end();
}

TEST(an_indirect_table_with_a_successor)
{
	struct request request;
	uint64_t table;

	begin(FEATURE_INDIRECT);
	request = indirect(&table);
	drive_desc(&ring, 0, table, 48, D_INDIRECT | D_NEXT, 1);
	rejected(&request, 0);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_indirect, 1);
	end();
}

TEST(an_indirect_table_without_the_feature)
{
	struct request request;
	uint64_t table;

	begin(0);
	request = indirect(&table);
	rejected(&request, 0);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_indirect, 1);
	end();
}

TEST(an_indirect_table_outside_memory)
{
	struct request request;
	uint64_t table;

	begin(FEATURE_INDIRECT);
	request = indirect(&table);
	drive_desc(&ring, 0, RAM_GPA + RAM_SIZE - 16, 32, D_INDIRECT, 0);
	memset(guest_at(&guest, RAM_GPA + RAM_SIZE - 16), 0, 16);
	((struct desc *)guest_at(&guest, RAM_GPA + RAM_SIZE - 16))->flags = D_NEXT;
	((struct desc *)guest_at(&guest, RAM_GPA + RAM_SIZE - 16))->next = 1;
	rejected(&request, 0);
	drive_desc(&ring, 0, ~0ull - 15, 32, D_INDIRECT, 0);
	rejected(&request, 0);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_address, 2);
	end();
}

TEST(next_outside_an_indirect_table)
{
	struct request request;
	uint64_t table;

	begin(FEATURE_INDIRECT);
	request = indirect(&table);
	((struct desc *)guest_at(&guest, table))[1].next = 3;
	rejected(&request, 108);
	((struct desc *)guest_at(&guest, table))[1].next = 0xffff;
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_chain, 2);
	end();
}

TEST(a_loop_in_an_indirect_table)
{
	struct request request;
	uint64_t table;

	begin(FEATURE_INDIRECT);
	request = indirect(&table);
	((struct desc *)guest_at(&guest, table))[2] = (struct desc){ request.in, 512, D_WRITE | D_NEXT, 2 };
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_chain, 1);
	end();
}

static atomic_bool flipping;

static void *flip(void *table)
{
	volatile struct desc *descs = table;
	const struct desc data = descs[2], response = descs[1];

	for (uint64_t i = 0; atomic_load(&flipping); i++) {
		descs[2].addr = i % 3 ? data.addr : ~0ull - 100;
		descs[2].len = i % 5 ? data.len : 0xffffffff;
		descs[1].next = (uint16_t)(i % 7 ? 2 : 9);
		descs[1].flags = (uint16_t)(i % 11 ? response.flags : D_INDIRECT);
		descs[1].addr = i % 13 ? response.addr : 1;
	}
	return NULL;
}

TEST(an_indirect_table_that_changes_under_us)
{
	struct vfc_stats stats;
	struct request request;
	pthread_t thread;
	uint64_t table;

	begin(FEATURE_INDIRECT);
	request = indirect(&table);
	(void)request;
	atomic_store(&flipping, true);
	CHECK_EQUAL(pthread_create(&thread, NULL, flip, guest_at(&guest, table)), 0);
	for (unsigned i = 0; i < 20000; i++) {
		struct used used;
		struct vfc_event event;

		drive_offer(&ring, 0);
		drive_kick(&ring);
		/* A length that is not the command's is a question for Python. */
		while (!drive_take(&ring, &used))
			if (vfc_next(guest.engine, 0, &event) == 1 && event.kind == VFC_EVENT_PUNT) {
				struct vfc_answer answer = { .handle = event.handle, .status = 2 };

				CHECK_EQUAL(vfc_reply(guest.engine, &answer), 0);
			}
		CHECK_EQUAL(used.head, 0);
		CHECK(used.length == 0 || used.length == 108 || used.length == 108 + 512);
	}
	atomic_store(&flipping, false);
	pthread_join(thread, NULL);
	stats = guest_stats(&guest, 0);
	CHECK(stats.fast && stats.bad_chain + stats.bad_address + stats.bad_indirect);
	end();
}

/* ---------------------------------------------------------------- headers */

TEST(a_short_request_header)
{
	struct request request;

	begin(0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	drive_desc(&ring, 0, request.header, 50, D_NEXT, 1);
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_header, 1);
	end();
}

TEST(no_request_header)
{
	struct request request;

	begin(0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 1);
	drive_desc(&ring, 0, request.response, 108, D_WRITE, 0);
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_header, 1);
	end();
}

TEST(a_short_response)
{
	struct request request;

	begin(0);
	request = request_rw(&ring, 0, OP_READ_10, 0, 0);
	drive_desc(&ring, 1, request.response, 107, D_WRITE, 0);
	rejected(&request, 0);
	drive_desc(&ring, 0, request.header, 51, 0, 0);
	rejected(&request, 0);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_header, 2);
	end();
}

TEST(data_both_ways)
{
	const uint8_t cdb[16] = { 0x12 };
	struct request request;

	begin(0);
	request = request_make(&ring, 0, cdb, 512, 512);
	rejected(&request, 108);
	CHECK_EQUAL(guest_stats(&guest, 0).bad_direction, 1);
	end();
}

/* ---------------------------------------------------------------- rings */

static void broken(int error)
{
	struct vfc_event event = guest_event(&guest, 0);
	uint64_t count = 0;

	CHECK_EQUAL(event.kind, VFC_EVENT_BROKEN);
	CHECK_EQUAL(event.index, 2);
	CHECK_EQUAL(event.result, error);
	CHECK_EQUAL(read(ring.err, &count, sizeof(count)), sizeof(count));
	CHECK_EQUAL(count, 1);
	CHECK_EQUAL(guest_stats(&guest, 0).broken_rings, 1);
}

/* Stopped and started anew, a ring that was broken runs again. */
static void mended(void)
{
	struct vfc_msg start;

	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	ring.avail_index = ring.used_index;
	__atomic_store_n(&ring.avail[1], ring.avail_index, __ATOMIC_RELEASE);
	start = drive_start_msg(&ring, VFC_RING_REQUEST, ring.avail_index);
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	end();
}

TEST(a_head_outside_the_ring)
{
	begin(0);
	still_works();
	drive_offer(&ring, 16);
	drive_kick(&ring);
	broken(-EINVAL);
	/* It stays where the bad entry is. */
	CHECK_EQUAL(drive_stop(&ring, 0).value, 1);
	mended();
}

TEST(an_avail_index_that_jumps)
{
	begin(0);
	still_works();
	__atomic_store_n(&ring.avail[1], (uint16_t)(ring.avail_index + 17), __ATOMIC_RELEASE);
	drive_kick(&ring);
	broken(-EOVERFLOW);
	mended();
}

TEST(a_head_that_is_in_flight)
{
	const uint8_t inquiry[16] = { 0x12 };
	struct request request;
	struct vfc_event punt;

	begin(0);
	request = request_make(&ring, 0, inquiry, 0, 36);
	request_send(&ring, &request);
	punt = guest_event(&guest, 0);
	CHECK_EQUAL(punt.kind, VFC_EVENT_PUNT);
	drive_offer(&ring, 0);
	drive_kick(&ring);
	broken(-EBUSY);
	mended();
}

TEST(a_broken_ring_is_left_alone)
{
	begin(0);
	drive_offer(&ring, 16);
	drive_kick(&ring);
	broken(-EINVAL);
	drive_kick(&ring);
	drive_enable(&ring, true);
	guest_ping(&guest, 0);
	CHECK(guest_quiet(&guest, 0, 0));
	CHECK(drive_silent(&ring, 0));
	mended();
}

TEST(parts_of_a_ring_outside_memory)
{
	struct vfc_msg start;

	begin(0);
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	for (unsigned i = 0; i < 3; i++) {
		start = drive_start_msg(&ring, VFC_RING_REQUEST, 0);
		/* The last entries fall off the end. */
		*(i == 0 ? &start.ring.desc : i == 1 ? &start.ring.avail : &start.ring.used) = RAM_USER + RAM_SIZE - 32;
		CHECK_EQUAL(guest_ask(&guest, 0, &start).result, -EFAULT);
	}
	start = drive_start_msg(&ring, VFC_RING_REQUEST, 0);
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	end();
}

TEST(rings_of_no_shape)
{
	struct vfc_msg start;

	begin(0);
	start = drive_start_msg(&ring, VFC_RING_REQUEST, 0);
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, -EBUSY);
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	start.ring.size = 12;
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, -EINVAL);
	start.ring.size = 0;
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, -EINVAL);
	start.ring.size = 65536;
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, -EINVAL);
	start = drive_start_msg(&ring, VFC_RING_REQUEST, 0);
	start.ring.desc += 8;
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, -EINVAL);
	start = drive_start_msg(&ring, VFC_RING_REQUEST, 0);
	start.ring.features = 1ull << 34;	/* RING_PACKED: a base beyond the ring's end */
	start.ring.base = start.ring.size;
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, -EINVAL);
	start.ring.base = 0;
	start.ring.features = 1ull << 33;	/* ACCESS_PLATFORM */
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, -EOPNOTSUPP);
	start.ring.features = 1ull << 3;	/* T10_PI */
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, -EOPNOTSUPP);
	start = drive_start_msg(&ring, VFC_RING_REQUEST, 0);
	start.index = VFC_MAX_RINGS;
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, -EINVAL);
	start.index = 2;
	CHECK_EQUAL(guest_ask(&guest, 0, &start).result, 0);
	end();
}

/* ---------------------------------------------------------------- regions */

TEST(regions_that_cannot_be)
{
	struct vfc_map *map, *maps[2];
	struct vfc_mem *mem;

	guest_open(&guest, NULL);
	CHECK_EQUAL(vfc_map_new(guest.fd, 0, 0, 0, 0, &map), -EINVAL);
	CHECK_EQUAL(vfc_map_new(guest.fd, ~0ull - 4094, 4096, 0, 0, &map), -EINVAL);
	CHECK_EQUAL(vfc_map_new(guest.fd, 0, 4096, ~0ull - 4094, 0, &map), -EINVAL);
	CHECK_EQUAL(vfc_map_new(guest.fd, 0, 4096, 0, ~0ull - 4094, &map), -EINVAL);
	CHECK_EQUAL(vfc_map_new(guest.fd, 0, 4097, 0, RAM_SIZE - 4096, &map), -EFBIG);
	CHECK_EQUAL(vfc_map_new(-1, 0, 4096, 0, 0, &map), -EBADF);
	CHECK_EQUAL(vfc_map_new(guest.fd, 0, 8192, 0, 0, &maps[0]), 0);
	CHECK_EQUAL(vfc_map_new(guest.fd, 8191, 8192, 1 << 20, 0, &maps[1]), 0);
	CHECK_EQUAL(vfc_mem_new(maps, 2, &mem), -EINVAL);
	vfc_map_put(maps[1]);
	CHECK_EQUAL(vfc_map_new(guest.fd, 8192, 8192, 8191, 0, &maps[1]), 0);
	CHECK_EQUAL(vfc_mem_new(maps, 2, &mem), -EINVAL);
	vfc_map_put(maps[1]);
	CHECK_EQUAL(vfc_map_new(guest.fd, 8192, 8192, 8192, 0, &maps[1]), 0);
	CHECK_EQUAL(vfc_mem_new(maps, 2, &mem), 0);
	vfc_map_put(maps[0]);
	vfc_map_put(maps[1]);
	CHECK_EQUAL(vfc_mem_covers(mem, 0, 8192), 1);
	CHECK_EQUAL(vfc_mem_covers(mem, 1, 8192), 0);
	CHECK_EQUAL(vfc_mem_covers(mem, 8192, 1), 1);
	CHECK_EQUAL(vfc_mem_covers(mem, 16384, 1), 0);
	CHECK_EQUAL(vfc_mem_covers(mem, 1, ~0ull), 0);
	vfc_mem_put(mem);
	guest_close(&guest);
}
