/*
 * together.c - the load generator of frontend.c and the worker in one process and at the same addresses, so that the
 * thread sanitizer sees all that they do to each other's memory; in use the two are processes of their own, and no tool
 * looks across.
 *
 * Two queues of two workers, verified loads on the same blocks, while the memory table changes and the queues move from
 * worker to worker; rings are stopped and started between the rounds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

#include "frontend.h"
#include "guestmem.h"
#include "harness.h"

#define QUEUES 2
#define ROUNDS 3
#define SIZE 64
#define BLOCKS 256
#define BLOCK 512

static struct guest guest;
static struct unit unit;
static uint8_t *mapped;	/* the guest's own mapping of its memory, which is not used here */

struct queue {
	struct driver driver;
	struct vfd_ring ring;
	struct vfd_job job;
	struct vfd_result result;
	int error;
	pthread_t thread;
};
static struct queue queues[QUEUES];
static atomic_bool over;

static uint32_t ring_flags(uint64_t features)
{
	return (features & FEATURE_EVENT_IDX ? VFD_EVENT_IDX : 0) | (features & FEATURE_INDIRECT ? VFD_INDIRECT : 0) |
	       (features & FEATURE_PACKED ? VFD_PACKED : 0);
}

static void start(struct queue *queue, uint32_t base)
{
	struct vfc_msg msg = drive_start_msg(&queue->driver, VFC_RING_REQUEST, base);

	CHECK_EQUAL(guest_ask(&guest, queue->driver.worker, &msg).result, 0);
	drive_enable(&queue->driver, true);
}

static void make_queue(unsigned number, uint64_t features, uint32_t depth, uint32_t flags, struct vfd_table *table)
{
	struct queue *queue = &queues[number];
	struct driver *driver = &queue->driver;
	uint16_t first = features & FEATURE_PACKED ? 1 << 15 : 0;
	uint64_t arena, bytes;

	drive_make(driver, &guest, 2 + number, SIZE, features);
	driver->worker = number;
	queue->job = (struct vfd_job){
		.lun = { 1, 0, 0x40, 0 }, .blocks = BLOCKS, .block_size = BLOCK, .io_size = 4 * BLOCK, .segment = 2 * BLOCK,
		.depth = depth, .read_percent = 50, .flags = VFD_RANDOM | VFD_VERIFY | flags, .seed = number + 1,
		.max_commands = 1500, .stall_ns = 60000000000ull, .run = 77, .writer = 1, .table = table,
	};
	bytes = vfd_arena_size(&queue->job, ring_flags(features));
	arena = guest_alloc(&guest, bytes + 4096);
	arena = (arena + 4095) & ~4095ull;
	queue->ring = (struct vfd_ring){
		.desc = guest_at(&guest, driver->desc_gpa), .avail = guest_at(&guest, driver->avail_gpa),
		.used = guest_at(&guest, driver->used_gpa), .arena = guest_at(&guest, arena), .arena_gpa = arena,
		.arena_size = bytes, .size = SIZE, .flags = ring_flags(features), .kick_fd = driver->kick,
		.call_fd = driver->call, .avail_index = first, .used_index = first,
	};
	start(queue, drive_first(driver));
}

static void *run(void *argument)
{
	struct queue *queue = argument;

	queue->error = vfd_run(&queue->ring, &queue->job, &queue->result);
	return NULL;
}

static void *finish(void *argument)
{
	(void)argument;
	for (unsigned i = 0; i < QUEUES; i++)
		pthread_join(queues[i].thread, NULL);
	atomic_store(&over, true);
	return NULL;
}

static void one_round(void)
{
	struct vfc_mem *other;
	pthread_t waiter;

	CHECK_EQUAL(vfc_mem_new(&guest.map, 1, &other), 0);
	atomic_store(&over, false);
	for (unsigned i = 0; i < QUEUES; i++)
		CHECK_EQUAL(pthread_create(&queues[i].thread, NULL, run, &queues[i]), 0);
	CHECK_EQUAL(pthread_create(&waiter, NULL, finish, NULL), 0);
	for (unsigned turn = 0; !atomic_load(&over); turn++) {
		struct driver *driver = &queues[turn % QUEUES].driver;
		int32_t moved = drive_move(driver, (driver->worker + 1) % QUEUES, 1000).result;

		CHECK(!moved || moved == -ETIMEDOUT);
		guest_set_memory(&guest, turn % 2 ? guest.mem : other);
	}
	pthread_join(waiter, NULL);
	guest_set_memory(&guest, guest.mem);
	vfc_mem_put(other);
}

static void together(uint32_t kind, uint64_t features, uint32_t depth, uint32_t flags, uint32_t poll_us)
{
	struct vfd_table *table;

	guest_open(&guest, &(struct guest_options){ .workers = QUEUES, .poll_us = poll_us });
	mapped = guest.ram;
	guest.ram = guest.map->host;
	unit_open(&unit, kind, BLOCKS, 2);
	CHECK_EQUAL(vfd_table_new(0, BLOCKS, &table), 0);
	for (unsigned i = 0; i < QUEUES; i++) {
		CHECK_EQUAL(guest_route(&guest, i, unit.medium, VFC_FINISH).result, 0);
		make_queue(i, features, depth, flags, table);
	}
	for (unsigned turn = 0; turn < ROUNDS; turn++) {
		one_round();
		for (unsigned i = 0; i < QUEUES; i++) {
			struct vfc_event stopped = drive_stop(&queues[i].driver, 1000);

			CHECK_EQUAL(queues[i].error, 0);
			CHECK_EQUAL(queues[i].result.errors, 0);
			CHECK(queues[i].result.verified);
			if (turn + 1 < ROUNDS)
				start(&queues[i], stopped.value);
		}
	}
	for (unsigned i = 0; i < QUEUES; i++)
		drive_close(&queues[i].driver);
	vfd_table_free(table);
	guest.ram = mapped;
	guest_close(&guest);
	unit_close(&unit);
}

#define ALL (FEATURE_INDIRECT | FEATURE_EVENT_IDX)

TEST(together_split) { together(VFC_MEDIUM_MEMORY, 0, 12, 0, 50); }
TEST(together_split_as_linux_drives_it) { together(VFC_MEDIUM_MEMORY, ALL, 32, 0, 50); }
TEST(together_split_polled_by_both) { together(VFC_MEDIUM_MEMORY, ALL, 1, VFD_POLL, 1000); }
TEST(together_split_without_polling) { together(VFC_MEDIUM_MEMORY, ALL, 8, 0, 0); }
TEST(together_packed) { together(VFC_MEDIUM_MEMORY, FEATURE_PACKED, 12, 0, 50); }
TEST(together_packed_as_linux_drives_it) { together(VFC_MEDIUM_MEMORY, FEATURE_PACKED | ALL, 32, 0, 50); }
TEST(together_packed_polled_by_both) { together(VFC_MEDIUM_MEMORY, FEATURE_PACKED | ALL, 1, VFD_POLL, 1000); }
TEST(together_on_a_file) { together(VFC_MEDIUM_FILE, ALL, 16, 0, 50); }
TEST(together_on_a_file_and_packed) { together(VFC_MEDIUM_FILE, FEATURE_PACKED | ALL, 16, 0, 50); }
