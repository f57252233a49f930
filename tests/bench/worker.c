/*
 * worker.c - the data path without threads: a driver fills a ring, the worker's own code takes it from there, in turn.
 *
 *	worker split|packed null|memory|written|copy COMMANDS [BYTES [DEPTH]]
 *
 * One ring of 256, requests as Linux makes them: one indirect table of header, response and data.  Reads of BYTES
 * (4096) from random blocks in batches of DEPTH (32); "written" writes them.  "copy" does the bare memcpy of the same blocks to the same
 * buffers and nothing else.  Prints the nanoseconds of a command, the driver's share excluded as far as a clock can.
 * Under callgrind, with --toggle-collect=ring_run, it gives the instructions.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "worker.h"

#define RAM_GPA 0x100000000ull
#define RAM_USER 0x7f0000000000ull
#define RAM_SIZE (64ull << 20)
#define MEDIUM_SIZE (256ull << 20)
#define SIZE 256
#define EVENT_IDX (1ull << VIRTIO_F_EVENT_IDX)
#define INDIRECT (1ull << VIRTIO_F_INDIRECT_DESC)
#define PACKED (1ull << VIRTIO_F_RING_PACKED)

static uint8_t *ram;
static struct worker worker;
static struct vfc_medium *medium;
static uint32_t bytes = 4096, depth = 32;
static uint64_t *desc;
static uint16_t *avail, *used;
static uint16_t avail_index, used_index;	/* packed: descriptor */
static bool packed, writes, wrap = true, used_wrap = true;
static uint64_t random_state = 88172645463325252ull;

/* Where the guest has what: rings first, then a page for each slot's headers, then the data. */
#define DESC_AT 0
#define AVAIL_AT 65536
#define USED_AT 131072
#define HEADERS_AT (1ull << 20)
#define DATA_AT (4ull << 20)

static void must(bool good, const char *what)
{
	if (good)
		return;
	fprintf(stderr, "%s\n", what);
	exit(1);
}

static uint64_t now(void)
{
	return worker_now();
}

static uint32_t random_block(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return (uint32_t)(random_state % (MEDIUM_SIZE / bytes)) * (bytes / 512);
}

static uint8_t *header_of(unsigned slot)
{
	return ram + HEADERS_AT + 4096ull * slot + 64;
}

static uint8_t *data_of(unsigned slot)
{
	return ram + DATA_AT + (uint64_t)bytes * slot;
}

static void make_requests(void)
{
	for (unsigned slot = 0; slot < depth; slot++) {
		uint64_t page = RAM_GPA + HEADERS_AT + 4096ull * slot;
		uint64_t data = RAM_GPA + DATA_AT + (uint64_t)bytes * slot;
		uint64_t lengths[3] = { 51, writes ? bytes : 108, writes ? 108 : bytes };
		uint64_t addresses[3] = { page + 64, writes ? data : page + 128, writes ? page + 128 : data };
		uint64_t *table = (uint64_t *)(ram + HEADERS_AT + 4096ull * slot);
		uint8_t *header = header_of(slot);

		for (unsigned i = 0; i < 3; i++) {
			uint64_t flags = (i > writes ? 2 : 0) | (i < 2 && !packed ? 1 : 0);

			table[2 * i] = addresses[i];
			table[2 * i + 1] = lengths[i] | (packed ? flags << 48 : flags << 32 | (uint64_t)(i + 1) << 48);
		}
		header[0] = 1;
		header[2] = 0x40;
		header[19] = writes ? 0x2a : 0x28;
		header[19 + 7] = (uint8_t)(bytes / 512 >> 8);
		header[19 + 8] = (uint8_t)(bytes / 512);
		if (!packed) {
			desc[2 * slot] = page;
			desc[2 * slot + 1] = 48 | 4ull << 32;
		}
	}
}

static __attribute__((noinline)) void offer_all(void)
{
	for (unsigned slot = 0; slot < depth; slot++) {
		uint32_t lba = __builtin_bswap32(random_block());

		memcpy(header_of(slot) + 19 + 2, &lba, 4);
		if (packed) {
			desc[2 * avail_index] = RAM_GPA + HEADERS_AT + 4096ull * slot;
			__atomic_store_n(&desc[2 * avail_index + 1],
					 48 | (uint64_t)slot << 32 | (uint64_t)(4 | (wrap ? 1 << 7 : 1 << 15)) << 48,
					 __ATOMIC_RELEASE);
			if (++avail_index == SIZE) {
				avail_index = 0;
				wrap = !wrap;
			}
			continue;
		}
		avail[2 + avail_index++ % SIZE] = (uint16_t)slot;
	}
	if (!packed)
		__atomic_store_n(&avail[1], avail_index, __ATOMIC_RELEASE);
}

static __attribute__((noinline)) void take_all(void)
{
	for (unsigned i = 0; i < depth; i++) {
		uint64_t entry;

		if (packed) {
			entry = __atomic_load_n(&desc[2 * used_index + 1], __ATOMIC_ACQUIRE);
			must((entry >> 55 & 1) == used_wrap && entry >> 63 == used_wrap, "nothing in the ring");
			entry = (entry & 0xffffffff) << 32 | (entry >> 32 & 0xffff);
			if (++used_index == SIZE) {
				used_index = 0;
				used_wrap = !used_wrap;
			}
		} else {
			must(__atomic_load_n(&used[1], __ATOMIC_ACQUIRE) != used_index, "nothing in the ring");
			memcpy(&entry, used + 2 + 4 * (used_index++ % SIZE), 8);
		}
		must(entry >> 32 == 108 + (writes ? 0 : bytes), "a command that was cut");
		must(!header_of((unsigned)entry)[64 + 11], "a command that failed");
	}
}

static struct ring *make_worker(bool null)
{
	struct vfc_medium_setup setup = { .fd = -1, .latch_fd = -1, .kind = VFC_MEDIUM_NULL, .block_size = 512,
					  .blocks = MEDIUM_SIZE / 512 };
	struct mail *mail = calloc(1, sizeof(*mail));
	struct vfc_ring_setup rings = {
		.role = VFC_RING_REQUEST,
		.size = SIZE,
		.desc = RAM_USER + DESC_AT,
		.avail = RAM_USER + AVAIL_AT,
		.used = RAM_USER + USED_AT,
		.features = EVENT_IDX | INDIRECT | (packed ? PACKED : 0),
		.base = packed ? 0x80008000 : 0,
		.kick_fd = eventfd(0, EFD_NONBLOCK),
		.call_fd = eventfd(0, EFD_NONBLOCK),
		.err_fd = -1,
	};
	static struct ration ration = { .max_transfer = 32 << 20 };
	int fd = memfd_create("guest", 0), media = memfd_create("medium", 0), latch = memfd_create("latch", 0);
	struct vfc_map *map;
	struct ring *ring;

	must(!ftruncate(fd, RAM_SIZE) && !ftruncate(media, MEDIUM_SIZE) && !ftruncate(latch, VFC_LATCH_BYTES), "memory");
	ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
	must(ram != MAP_FAILED, "memory");
	desc = (uint64_t *)(ram + DESC_AT);
	avail = (uint16_t *)(ram + AVAIL_AT);
	used = (uint16_t *)(ram + USED_AT);
	must(!vfc_map_new(fd, RAM_GPA, RAM_SIZE, RAM_USER, 0, &map), "map");
	worker.view = calloc(1, sizeof(*worker.view));
	must(!vfc_mem_new(&map, 1, &worker.view->mem), "table");
	worker.epoll_fd = epoll_create1(0);
	worker.media = path_media_engine();
	worker.ration = &ration;
	worker.batch = BATCH;
	worker.targets[0] = true;
	worker.parked_last = &worker.parked;
	must(!mailbox_open(&worker.box), "mailbox");
	if (!null) {
		setup.kind = VFC_MEDIUM_MEMORY;
		setup.fd = media;
		setup.latch_fd = latch;
		setup.owner = 2;
	}
	must(!vfc_medium_new(&setup, &medium), "medium");
	if (medium->memory)
		memset(medium->memory, 0x5a, MEDIUM_SIZE);
	mail->msg.route.medium = medium_hold(medium);
	memset(mail->msg.route.mask, 0xff, sizeof(mail->msg.route.mask));
	route_message(&worker, mail);
	must(!ring_get(&worker, 2, &ring) && !ring_start(&worker, ring, &rings), "ring");
	ring->enabled = true;
	make_requests();
	return ring;
}

static __attribute__((noinline)) void copy_all(void)
{
	for (unsigned slot = 0; slot < depth; slot++)
		memcpy(data_of(slot), medium->memory + 512ull * random_block(), bytes);
}

static void turn(struct ring *ring)
{
	if (!ring) {
		copy_all();
		return;
	}
	offer_all();
	for (unsigned taken = 0; taken < depth; taken += BATCH)
		ring_run(&worker, ring);
	take_all();
}

int main(int argc, char **argv)
{
	uint64_t commands, begun, driving;
	struct ring *ring;

	must(argc >= 4, "usage: worker split|packed null|memory|written|copy COMMANDS [BYTES [DEPTH]]");
	packed = !strcmp(argv[1], "packed");
	writes = !strcmp(argv[2], "written");
	commands = strtoull(argv[3], NULL, 0);
	if (argc > 4)
		bytes = (uint32_t)atoi(argv[4]);
	if (argc > 5)
		depth = (uint32_t)atoi(argv[5]);
	must(bytes >= 512 && bytes % 512 == 0 && depth && depth <= SIZE && DATA_AT + (uint64_t)bytes * depth <= RAM_SIZE,
	     "BYTES or DEPTH");
	ring = make_worker(!strcmp(argv[2], "null"));
	if (!strcmp(argv[2], "copy"))
		ring = NULL;
	for (unsigned i = 0; i < 100; i++)
		turn(ring);
	begun = now();
	for (uint64_t done = 0; done < commands; done += depth)
		turn(ring);
	driving = now() - begun;
	printf("%.1f\n", (double)driving / (double)((commands + depth - 1) / depth * depth));
	return 0;
}
