/*
 * harness.h - tests of the data path in C: a table of named tests, and a guest whose driver can do all that a
 * driver can do, also wrong.
 *
 * One program holds all tests; `program NAME` runs one, so that each has a process of its own.
 */
#ifndef HARNESS_H
#define HARNESS_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vhostfc.h"

void test_add(const char *name, void (*run)(void));

#define TEST(name)                                                                  \
	static void name(void);                                                     \
	__attribute__((constructor)) static void add_##name(void) { test_add(#name, name); } \
	static void name(void)

#define CHECK(condition)                                                                          \
	do {                                                                                      \
		if (!(condition)) {                                                               \
			fprintf(stderr, "%s:%d: %s: not so\n", __FILE__, __LINE__, #condition);    \
			abort();                                                                  \
		}                                                                                 \
	} while (0)

#define CHECK_EQUAL(left, right)                                                                          \
	do {                                                                                              \
		long long left_ = (long long)(left), right_ = (long long)(right);                         \
		if (left_ != right_) {                                                                    \
			fprintf(stderr, "%s:%d: %s is %lld, not %lld\n", __FILE__, __LINE__, #left, left_, \
				right_);                                                                  \
			abort();                                                                          \
		}                                                                                         \
	} while (0)

/* ---------------------------------------------------------------- the guest */

#define RAM_GPA 0x100000000ull
#define RAM_USER 0x7f0000000000ull
#define RAM_SIZE (32u << 20)
#define FEATURE_INDIRECT (1ull << 28)
#define FEATURE_EVENT_IDX (1ull << 29)
#define FEATURE_PACKED (1ull << 34)
#define D_NEXT 1
#define D_WRITE 2
#define D_INDIRECT 4

struct guest {
	int fd;
	uint8_t *ram;
	uint64_t next;		/* offset of what guest_alloc() gives next */
	struct vfc_map *map;
	struct vfc_mem *mem;
	struct vfc_engine *engine;
	uint64_t seq;
	struct vfc_event kept[64];	/* events that came before an ack */
	unsigned kept_count;
};

struct guest_options {
	uint32_t workers, flags, max_punts, max_transfer, poll_us;
	uint64_t max_punt_bytes;
};

/* Memory, an engine, the table posted, target 0 present.  NULL: one worker, generous rations. */
void guest_open(struct guest *guest, const struct guest_options *options);
void guest_close(struct guest *guest);
uint64_t guest_alloc(struct guest *guest, size_t size);
void *guest_at(const struct guest *guest, uint64_t gpa);

/* Posts and waits for the ack; other events are kept for guest_event(). */
struct vfc_event guest_ask(struct guest *guest, uint32_t worker, struct vfc_msg *msg);
uint64_t guest_post(struct guest *guest, uint32_t worker, struct vfc_msg *msg);
struct vfc_event guest_ack(struct guest *guest, uint32_t worker, uint64_t seq);
/* Whether that ack is there within so many ms. */
bool guest_acked(struct guest *guest, uint32_t worker, uint64_t seq, int ms);
/* The next event that is no ack. */
struct vfc_event guest_event(struct guest *guest, uint32_t worker);
bool guest_quiet(struct guest *guest, uint32_t worker, int ms);
struct vfc_stats guest_stats(struct guest *guest, uint32_t worker);
void guest_ping(struct guest *guest, uint32_t worker);
struct vfc_event guest_route(struct guest *guest, uint32_t worker, struct vfc_medium *medium, uint8_t in_flight);
void guest_set_memory(struct guest *guest, struct vfc_mem *mem);

/* ---------------------------------------------------------------- one ring */

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags, next;
};

/*
 * A packed ring is driven by the same calls: ->desc is then a table of the driver's own, and drive_offer() writes the
 * chain that begins there at `head` into the ring, as a buffer with that id.
 *
 * HARNESS_LAYOUT=indirect or =packed in the environment makes all rings such with indirect tables, as Linux drives
 * them, for tests that are about commands and not about rings.
 */
#define TABLE 8

struct driver {
	struct guest *guest;
	uint32_t worker, index, size;
	uint64_t features;
	uint64_t desc_gpa, avail_gpa, used_gpa;
	struct desc *desc;
	uint16_t *avail;	/* flags, idx, ring[], used_event; packed: the driver's event suppression, place and flags */
	uint16_t *used;		/* flags, idx, ring[], avail_event; packed: the device's */
	uint64_t tables;	/* 0, or where drive_offer() makes an indirect table of each chain: TABLE entries by head */
	uint16_t avail_index, used_index;	/* buffers so far */
	struct packed {
		struct packed_desc *ring;
		uint16_t *counts;	/* descriptors by id */
		uint16_t at, used_at;
		uint16_t kicked;	/* `at` at the last kick */
		bool wrap, used_wrap;
	} packed;
	int kick, call, err;
};

/* 2.8.13: the other order of the last two */
struct packed_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t id, flags;
};
#define D_AVAIL (1 << 7)
#define D_USED (1 << 15)
#define EVENT_PLACE 0	/* in ->avail and ->used of a packed ring */
#define EVENT_FLAGS 1
#define EVENTS_ENABLE 0
#define EVENTS_DISABLE 1
#define EVENTS_DESC 2

void drive_make(struct driver *ring, struct guest *guest, uint32_t index, uint32_t size, uint64_t features);
/* Where a ring that was never used begins. */
uint32_t drive_first(const struct driver *ring);
struct vfc_msg drive_start_msg(const struct driver *ring, uint32_t role, uint32_t base);
/* Made, started and enabled. */
void drive_open(struct driver *ring, struct guest *guest, uint32_t index, uint32_t role, uint32_t size, uint64_t features);
void drive_enable(struct driver *ring, bool enabled);
struct vfc_event drive_stop(struct driver *ring, uint32_t ms);
/* To another worker, which has it from then on; or the error, and it stays. */
struct vfc_event drive_move(struct driver *ring, uint32_t worker, uint32_t ms);
void drive_close(struct driver *ring);
void drive_desc(struct driver *ring, uint16_t at, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next);
void drive_offer(struct driver *ring, uint16_t head);
/* One descriptor of a packed ring as it is, with avail and used flags of this turn; the driver's place moves on. */
void drive_raw(struct driver *ring, uint64_t addr, uint32_t len, uint16_t flags, uint16_t id);
/* Tells the device, if it wants to know. */
void drive_kick(struct driver *ring);
struct used {
	uint32_t head, length;
};
bool drive_take(struct driver *ring, struct used *ret_used);
struct used drive_wait(struct driver *ring);
/* Whether nothing comes back within so many ms. */
bool drive_silent(struct driver *ring, int ms);

/* ---------------------------------------------------------------- commands */

/* A request at descriptors 4 * slot .. 4 * slot + 3 of its ring: header, data out, response, data in. */
struct request {
	uint16_t head;
	uint64_t header, out, response, in;
	uint32_t out_length, in_length;
};

struct request request_make(struct driver *ring, unsigned slot, const uint8_t *cdb, uint32_t out_length,
			    uint32_t in_length);
void request_send(struct driver *ring, const struct request *request);
struct request request_rw(struct driver *ring, unsigned slot, uint8_t opcode, uint64_t lba, uint32_t blocks);
uint8_t *request_header(const struct driver *ring, const struct request *request);
uint8_t request_response(const struct driver *ring, const struct request *request);
uint8_t request_status(const struct driver *ring, const struct request *request);
uint8_t *request_out(const struct driver *ring, const struct request *request);
uint8_t *request_in(const struct driver *ring, const struct request *request);

#define OP_READ_10 0x28
#define OP_WRITE_10 0x2a
#define OP_SYNC_10 0x35
#define S_OK 0
#define S_ABORTED 2
#define S_BAD_TARGET 3
#define S_RESET 4
#define S_FAILURE 9

/* ---------------------------------------------------------------- media */

struct unit {
	int fd, latch_fd;
	uint8_t *bytes;		/* how the test looks at it */
	size_t size;
	struct vfc_medium *medium;
};

/* A memfd of 512-byte blocks, opened as this kind by this owner. */
void unit_open(struct unit *unit, uint32_t kind, uint64_t blocks, uint32_t owner);
/* Another holder of the same medium. */
struct vfc_medium *unit_again(const struct unit *unit, uint32_t kind, uint32_t owner);
void unit_close(struct unit *unit);

/* A gate in front of preadv2, pwritev2 and fdatasync: while it is closed the crew's threads wait there. */
void gate_close(void);
/* Writes and flushes go through. */
void gate_close_to_reads(void);
void gate_open(void);
/* Waits until that many threads stand before it. */
void gate_await(unsigned threads);
/* How many stand there. */
unsigned gate_waits(void);

/* The errno that what syncs ends with: the crew's fdatasync, and pwritev2 with RWF_DSYNC.  0: as they do. */
extern _Atomic int harness_sync_error;
/* So often io_uring_submit_and_get_events() says EAGAIN. */
extern _Atomic int harness_refusals;

/* What engines made with VFC_ENGINE_NO_URING use for files; NULL: the pool. */
struct vfc_path_engine;
extern struct vfc_path_engine *harness_files;

#endif
