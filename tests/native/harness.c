/*
 * harness.c - see harness.h.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "harness.h"

#define MAX_TESTS 512
#define PATIENCE 20000	/* ms until a test that waits has failed */

static struct {
	const char *name;
	void (*run)(void);
} tests[MAX_TESTS];
static unsigned test_count;

void test_add(const char *name, void (*run)(void))
{
	tests[test_count].name = name;
	tests[test_count++].run = run;
}

int main(int argc, char **argv)
{
	for (unsigned i = 0; argc == 2 && i < test_count; i++)
		if (!strcmp(tests[i].name, argv[1])) {
			tests[i].run();
			return 0;
		}
	fprintf(stderr, "usage: %s TEST\n", argv[0]);
	return 2;
}

/* ---------------------------------------------------------------- the guest */

void guest_open(struct guest *guest, const struct guest_options *options)
{
	struct vfc_engine_setup setup = {
		.workers = options && options->workers ? options->workers : 1,
		.flags = options ? options->flags : 0,
		.max_punts = options && options->max_punts ? options->max_punts : 64,
		.max_transfer = options && options->max_transfer ? options->max_transfer : 1 << 20,
		.max_punt_bytes = options && options->max_punt_bytes ? options->max_punt_bytes : 16 << 20,
		.poll_us = options ? options->poll_us : 0,
	};

	*guest = (struct guest){ .fd = memfd_create("guest", MFD_CLOEXEC) };
	CHECK(guest->fd >= 0);
	CHECK_EQUAL(ftruncate(guest->fd, RAM_SIZE), 0);
	guest->ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, guest->fd, 0);
	CHECK(guest->ram != MAP_FAILED);
	CHECK_EQUAL(vfc_map_new(guest->fd, RAM_GPA, RAM_SIZE, RAM_USER, 0, &guest->map), 0);
	CHECK_EQUAL(vfc_mem_new(&guest->map, 1, &guest->mem), 0);
	CHECK_EQUAL(vfc_engine_new(&setup, &guest->engine), 0);
	guest_set_memory(guest, guest->mem);
	for (uint32_t i = 0; i < setup.workers; i++) {
		struct vfc_msg target = { .kind = VFC_MSG_TARGET, .index = 0, .value = 1 };

		CHECK_EQUAL(guest_ask(guest, i, &target).result, 0);
	}
}

void guest_set_memory(struct guest *guest, struct vfc_mem *mem)
{
	for (uint32_t i = 0; vfc_fd(guest->engine, i) >= 0; i++) {
		struct vfc_msg msg = { .kind = VFC_MSG_MEM, .mem = mem };

		CHECK_EQUAL(guest_ask(guest, i, &msg).result, 0);
	}
}

void guest_close(struct guest *guest)
{
	CHECK_EQUAL(vfc_engine_free(guest->engine, PATIENCE), 0);
	vfc_mem_put(guest->mem);
	vfc_map_put(guest->map);
	munmap(guest->ram, RAM_SIZE);
	close(guest->fd);
}

uint64_t guest_alloc(struct guest *guest, size_t size)
{
	uint64_t length = (size + 63) & ~(uint64_t)63;
	uint64_t at = __atomic_fetch_add(&guest->next, length, __ATOMIC_RELAXED);

	CHECK(at + length <= RAM_SIZE);
	return RAM_GPA + at;
}

void *guest_at(const struct guest *guest, uint64_t gpa)
{
	return guest->ram + (gpa - RAM_GPA);
}

static bool next_event(struct guest *guest, uint32_t worker, struct vfc_event *ret_event, int ms)
{
	struct pollfd waiting = { .fd = vfc_fd(guest->engine, worker), .events = POLLIN };

	for (;;) {
		int got = vfc_next(guest->engine, worker, ret_event);

		CHECK(got >= 0);
		if (got)
			return true;
		if (poll(&waiting, 1, ms) <= 0)
			return false;
	}
}

uint64_t guest_post(struct guest *guest, uint32_t worker, struct vfc_msg *msg)
{
	msg->seq = ++guest->seq;
	CHECK_EQUAL(vfc_post(guest->engine, worker, msg), 0);
	return msg->seq;
}

static bool await_ack(struct guest *guest, uint32_t worker, uint64_t seq, int ms, struct vfc_event *ret_event)
{
	while (next_event(guest, worker, ret_event, ms)) {
		if (ret_event->kind == VFC_EVENT_ACK && ret_event->seq == seq)
			return true;
		CHECK(guest->kept_count < 64);
		guest->kept[guest->kept_count++] = *ret_event;
	}
	return false;
}

struct vfc_event guest_ack(struct guest *guest, uint32_t worker, uint64_t seq)
{
	struct vfc_event event;

	CHECK(await_ack(guest, worker, seq, PATIENCE, &event));
	return event;
}

bool guest_acked(struct guest *guest, uint32_t worker, uint64_t seq, int ms)
{
	struct vfc_event event;

	return await_ack(guest, worker, seq, ms, &event);
}

struct vfc_event guest_ask(struct guest *guest, uint32_t worker, struct vfc_msg *msg)
{
	return guest_ack(guest, worker, guest_post(guest, worker, msg));
}

struct vfc_event guest_event(struct guest *guest, uint32_t worker)
{
	struct vfc_event event;

	if (guest->kept_count) {
		event = guest->kept[0];
		memmove(guest->kept, guest->kept + 1, --guest->kept_count * sizeof(event));
		return event;
	}
	CHECK(next_event(guest, worker, &event, PATIENCE));
	CHECK(event.kind != VFC_EVENT_ACK);
	return event;
}

bool guest_quiet(struct guest *guest, uint32_t worker, int ms)
{
	struct vfc_event event;

	return !guest->kept_count && !next_event(guest, worker, &event, ms);
}

struct vfc_stats guest_stats(struct guest *guest, uint32_t worker)
{
	struct vfc_stats stats;

	CHECK_EQUAL(vfc_stats(guest->engine, worker, &stats), 0);
	return stats;
}

void guest_ping(struct guest *guest, uint32_t worker)
{
	struct vfc_msg msg = { .kind = VFC_MSG_PING };

	CHECK_EQUAL(guest_ask(guest, worker, &msg).result, 0);
}

struct vfc_event guest_route(struct guest *guest, uint32_t worker, struct vfc_medium *medium, uint8_t in_flight)
{
	struct vfc_msg msg = { .kind = VFC_MSG_ROUTE, .route = { .medium = medium, .in_flight = in_flight } };

	memset(msg.route.mask, 0xff, sizeof(msg.route.mask));
	return guest_ask(guest, worker, &msg);
}

/* ---------------------------------------------------------------- one ring */

void drive_make(struct driver *ring, struct guest *guest, uint32_t index, uint32_t size, uint64_t features)
{
	const char *layout = getenv("HARNESS_LAYOUT");

	*ring = (struct driver){ .guest = guest, .index = index, .size = size };
	ring->desc_gpa = guest_alloc(guest, 16 * size);
	ring->avail_gpa = guest_alloc(guest, 6 + 2 * size);
	ring->used_gpa = guest_alloc(guest, 6 + 8 * size);
	ring->desc = guest_at(guest, ring->desc_gpa);
	if (layout)
		features |= FEATURE_INDIRECT | (!strcmp(layout, "packed") ? FEATURE_PACKED : 0);
	ring->features = features;
	if (layout) {
		ring->tables = guest_alloc(guest, (size_t)16 * TABLE * size);
		ring->desc = calloc(size, sizeof(*ring->desc));
	}
	if (features & FEATURE_PACKED) {
		ring->packed.ring = guest_at(guest, ring->desc_gpa);
		ring->packed.wrap = ring->packed.used_wrap = true;
		ring->desc = layout ? ring->desc : calloc(size, sizeof(*ring->desc));
		ring->packed.counts = calloc(size, sizeof(*ring->packed.counts));
	}
	ring->avail = guest_at(guest, ring->avail_gpa);
	ring->used = guest_at(guest, ring->used_gpa);
	ring->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	ring->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	ring->err = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

uint32_t drive_first(const struct driver *ring)
{
	return ring->features & FEATURE_PACKED ? 0x80008000 : 0;
}

struct vfc_msg drive_start_msg(const struct driver *ring, uint32_t role, uint32_t base)
{
	return (struct vfc_msg){
		.kind = VFC_MSG_RING_START,
		.index = ring->index,
		.ring = {
			.role = role,
			.size = ring->size,
			.desc = ring->desc_gpa - RAM_GPA + RAM_USER,
			.avail = ring->avail_gpa - RAM_GPA + RAM_USER,
			.used = ring->used_gpa - RAM_GPA + RAM_USER,
			.features = ring->features,
			.base = base,
			.kick_fd = ring->kick,
			.call_fd = ring->call,
			.err_fd = ring->err,
		},
	};
}

void drive_enable(struct driver *ring, bool enabled)
{
	struct vfc_msg msg = { .kind = VFC_MSG_RING_ENABLE, .index = ring->index, .value = enabled };

	CHECK_EQUAL(guest_ask(ring->guest, ring->worker, &msg).result, 0);
}

void drive_open(struct driver *ring, struct guest *guest, uint32_t index, uint32_t role, uint32_t size, uint64_t features)
{
	struct vfc_msg msg;

	drive_make(ring, guest, index, size, features);
	msg = drive_start_msg(ring, role, drive_first(ring));
	CHECK_EQUAL(guest_ask(guest, 0, &msg).result, 0);
	drive_enable(ring, true);
}

struct vfc_event drive_stop(struct driver *ring, uint32_t ms)
{
	struct vfc_msg msg = { .kind = VFC_MSG_RING_STOP, .index = ring->index, .value = ms };

	return guest_ask(ring->guest, ring->worker, &msg);
}

struct vfc_event drive_move(struct driver *ring, uint32_t worker, uint32_t ms)
{
	struct vfc_msg msg = { .kind = VFC_MSG_RING_MOVE, .index = ring->index, .worker = worker, .value = ms };
	uint64_t seq = guest_post(ring->guest, ring->worker, &msg);
	struct vfc_event event;

	for (int waited = 0; waited < PATIENCE; waited++) {
		if (await_ack(ring->guest, worker, seq, 1, &event)) {
			ring->worker = worker;
			return event;
		}
		if (await_ack(ring->guest, ring->worker, seq, 0, &event))
			return event;
	}
	CHECK(!"a move is answered");
	return event;
}

void drive_close(struct driver *ring)
{
	close(ring->kick);
	close(ring->call);
	close(ring->err);
	if (ring->features & FEATURE_PACKED || ring->tables)
		free(ring->desc);
	free(ring->packed.counts);
}

void drive_desc(struct driver *ring, uint16_t at, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
	ring->desc[at] = (struct desc){ addr, len, flags, next };
}

static uint16_t turn_flags(const struct driver *ring)
{
	return ring->packed.wrap ? D_AVAIL : D_USED;
}

static void forward(const struct driver *ring, uint16_t *at, bool *wrap, uint16_t count)
{
	*at = (uint16_t)(*at + count);
	if (*at >= ring->size) {
		*at = (uint16_t)(*at - ring->size);
		*wrap = !*wrap;
	}
}

/* There are tests in which somebody else writes there at the same time. */
__attribute__((no_sanitize_thread)) static void write_packed(struct driver *ring, const struct desc *desc, uint16_t id, uint16_t flags)
{
	struct packed_desc *to = &ring->packed.ring[ring->packed.at];

	to->addr = desc->addr;
	to->len = desc->len;
	to->id = id;
	__atomic_store_n(&to->flags, (uint16_t)(flags | turn_flags(ring)), __ATOMIC_RELEASE);
	forward(ring, &ring->packed.at, &ring->packed.wrap, 1);
}

void drive_raw(struct driver *ring, uint64_t addr, uint32_t len, uint16_t flags, uint16_t id)
{
	write_packed(ring, &(struct desc){ .addr = addr, .len = len }, id, flags);
}

/* The chain of this head as a table; the descriptor that names it. */
static struct desc make_table(struct driver *ring, uint16_t head)
{
	uint64_t at = ring->tables + (uint64_t)16 * TABLE * head;
	struct desc *table = guest_at(ring->guest, at);
	uint16_t count = 0, index = head;

	for (;; index = ring->desc[index].next) {
		const struct desc *desc = &ring->desc[index];

		CHECK(count < TABLE);
		if (ring->features & FEATURE_PACKED)
			((struct packed_desc *)table)[count] = (struct packed_desc){ desc->addr, desc->len, 0, desc->flags };
		else
			table[count] = (struct desc){ desc->addr, desc->len, desc->flags, (uint16_t)(count + 1) };
		count++;
		if (!(desc->flags & D_NEXT))
			break;
	}
	return (struct desc){ at, 16u * count, D_INDIRECT, 0 };
}

/* All but the first one's flags, then those. */
__attribute__((no_sanitize_thread)) static void offer_packed(struct driver *ring, uint16_t head)
{
	struct packed_desc *first = &ring->packed.ring[ring->packed.at];
	uint16_t first_flags = (uint16_t)(ring->desc[head].flags | turn_flags(ring)), count = 1;
	const struct desc *desc = &ring->desc[head];
	struct desc table;

	if (ring->tables) {
		table = make_table(ring, head);
		desc = &table;
		first_flags = (uint16_t)(table.flags | turn_flags(ring));
	}
	first->addr = desc->addr;
	first->len = desc->len;
	first->id = head;
	forward(ring, &ring->packed.at, &ring->packed.wrap, 1);
	for (; desc->flags & D_NEXT && !ring->tables; count++) {
		desc = &ring->desc[desc->next];
		write_packed(ring, desc, head, desc->flags);
	}
	ring->packed.counts[head] = count;
	ring->avail_index++;
	__atomic_store_n(&first->flags, first_flags, __ATOMIC_RELEASE);
}

void drive_offer(struct driver *ring, uint16_t head)
{
	if (ring->features & FEATURE_PACKED) {
		offer_packed(ring, head);
		return;
	}
	if (ring->tables)
		((struct desc *)guest_at(ring->guest, ring->desc_gpa))[head] = make_table(ring, head);
	__atomic_store_n(&ring->avail[2 + ring->avail_index % ring->size], head, __ATOMIC_RELAXED);
	ring->avail_index++;
	__atomic_store_n(&ring->avail[1], ring->avail_index, __ATOMIC_RELEASE);
}

/* 2.8.10: as a driver does it that kicks no more often than it must */
static bool kick_wanted_packed(struct driver *ring)
{
	uint16_t flags = __atomic_load_n(&ring->used[EVENT_FLAGS], __ATOMIC_ACQUIRE) & 3;
	uint16_t place = __atomic_load_n(&ring->used[EVENT_PLACE], __ATOMIC_RELAXED);
	uint16_t event = place & 0x7fff, old = ring->packed.kicked, new = ring->packed.at;

	ring->packed.kicked = new;
	if (flags != EVENTS_DESC)
		return flags == EVENTS_ENABLE;
	/* Places before the ring's end count from below 0 once we are past it. */
	if (place >> 15 != ring->packed.wrap)
		event = (uint16_t)(event - ring->size);
	if (old >= new)
		old = (uint16_t)(old - ring->size);
	return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}

void drive_kick(struct driver *ring)
{
	uint64_t one = 1;
	bool wanted;

	/* pairs with the device's, between arming and looking again */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (ring->features & FEATURE_PACKED)
		wanted = kick_wanted_packed(ring);
	else if (ring->features & FEATURE_EVENT_IDX)
		wanted = true;	/* a kick too many is allowed, and the last one may have been for several */
	else
		wanted = !(__atomic_load_n(&ring->used[0], __ATOMIC_RELAXED) & 1);
	if (wanted)
		CHECK_EQUAL(write(ring->kick, &one, sizeof(one)), sizeof(one));
}

static bool take_packed(struct driver *ring, struct used *ret_used)
{
	const struct packed_desc *desc = &ring->packed.ring[ring->packed.used_at];
	uint16_t flags = __atomic_load_n(&desc->flags, __ATOMIC_ACQUIRE);

	if (!!(flags & D_AVAIL) != ring->packed.used_wrap || !!(flags & D_USED) != ring->packed.used_wrap)
		return false;
	ret_used->head = desc->id;
	ret_used->length = desc->len;
	CHECK(desc->id < ring->size && ring->packed.counts[desc->id]);
	/* 2.8.12: the flag says that the length means something. */
	CHECK_EQUAL(!!(flags & D_WRITE), !!desc->len);
	forward(ring, &ring->packed.used_at, &ring->packed.used_wrap, ring->packed.counts[desc->id]);
	ring->packed.counts[desc->id] = 0;
	ring->used_index++;
	return true;
}

bool drive_take(struct driver *ring, struct used *ret_used)
{
	const uint32_t *entries = (const uint32_t *)(ring->used + 2);

	if (ring->features & FEATURE_PACKED)
		return take_packed(ring, ret_used);
	if (__atomic_load_n(&ring->used[1], __ATOMIC_ACQUIRE) == ring->used_index)
		return false;
	ret_used->head = __atomic_load_n(&entries[2 * (ring->used_index % ring->size)], __ATOMIC_RELAXED);
	ret_used->length = __atomic_load_n(&entries[2 * (ring->used_index % ring->size) + 1], __ATOMIC_RELAXED);
	ring->used_index++;
	return true;
}

static bool await_used(struct driver *ring, struct used *ret_used, int ms)
{
	struct pollfd waiting = { .fd = ring->call, .events = POLLIN };

	for (;;) {
		uint64_t calls;

		if (ring->features & FEATURE_PACKED) {
			bool wrap = ring->packed.used_wrap;

			__atomic_store_n(&ring->avail[EVENT_PLACE], (uint16_t)(ring->packed.used_at | wrap << 15),
					 __ATOMIC_RELAXED);
			__atomic_store_n(&ring->avail[EVENT_FLAGS],
					 ring->features & FEATURE_EVENT_IDX ? EVENTS_DESC : EVENTS_ENABLE,
					 __ATOMIC_RELEASE);
			/* pairs with the device's, between publishing and reading this */
			__atomic_thread_fence(__ATOMIC_SEQ_CST);
		} else if (ring->features & FEATURE_EVENT_IDX) {
			__atomic_store_n(&ring->avail[2 + ring->size], ring->used_index, __ATOMIC_RELAXED);
			/* pairs with the device's, between publishing and reading used_event */
			__atomic_thread_fence(__ATOMIC_SEQ_CST);
		}
		if (drive_take(ring, ret_used))
			return true;
		if (poll(&waiting, 1, ms) <= 0)
			return false;
		(void)!read(ring->call, &calls, sizeof(calls));
	}
}

struct used drive_wait(struct driver *ring)
{
	struct used used;

	CHECK(await_used(ring, &used, PATIENCE));
	return used;
}

bool drive_silent(struct driver *ring, int ms)
{
	struct used used;

	return !await_used(ring, &used, ms);
}

/* ---------------------------------------------------------------- commands */

struct request request_make(struct driver *ring, unsigned slot, const uint8_t *cdb, uint32_t out_length,
			    uint32_t in_length)
{
	struct guest *guest = ring->guest;
	struct request request = { .head = (uint16_t)(4 * slot), .out_length = out_length, .in_length = in_length };
	uint16_t at = request.head;
	uint8_t *header;

	request.header = guest_alloc(guest, 51);
	request.response = guest_alloc(guest, 108);
	header = guest_at(guest, request.header);
	memset(header, 0, 51);
	header[0] = 1;
	header[2] = 0x40;
	memcpy(header + 19, cdb, 16);
	memset(guest_at(guest, request.response), 0xee, 108);
	drive_desc(ring, at, request.header, 51, D_NEXT, (uint16_t)(at + 1));
	if (out_length) {
		request.out = guest_alloc(guest, out_length);
		at++;
		drive_desc(ring, at, request.out, out_length, D_NEXT, (uint16_t)(at + 1));
	}
	at++;
	drive_desc(ring, at, request.response, 108, D_WRITE | (in_length ? D_NEXT : 0), (uint16_t)(at + 1));
	if (in_length) {
		request.in = guest_alloc(guest, in_length);
		at++;
		drive_desc(ring, at, request.in, in_length, D_WRITE, 0);
	}
	return request;
}

void request_send(struct driver *ring, const struct request *request)
{
	drive_offer(ring, request->head);
	drive_kick(ring);
}

struct request request_rw(struct driver *ring, unsigned slot, uint8_t opcode, uint64_t lba, uint32_t blocks)
{
	uint8_t cdb[16] = { opcode, 0, (uint8_t)(lba >> 24), (uint8_t)(lba >> 16), (uint8_t)(lba >> 8), (uint8_t)lba,
			    0, (uint8_t)(blocks >> 8), (uint8_t)blocks };
	uint32_t bytes = blocks * 512;

	return request_make(ring, slot, cdb, opcode == OP_WRITE_10 ? bytes : 0, opcode == OP_READ_10 ? bytes : 0);
}

uint8_t *request_header(const struct driver *ring, const struct request *request)
{
	return guest_at(ring->guest, request->header);
}

uint8_t request_response(const struct driver *ring, const struct request *request)
{
	return ((uint8_t *)guest_at(ring->guest, request->response))[11];
}

uint8_t request_status(const struct driver *ring, const struct request *request)
{
	return ((uint8_t *)guest_at(ring->guest, request->response))[10];
}

uint8_t *request_out(const struct driver *ring, const struct request *request)
{
	return guest_at(ring->guest, request->out);
}

uint8_t *request_in(const struct driver *ring, const struct request *request)
{
	return guest_at(ring->guest, request->in);
}

/* ---------------------------------------------------------------- media */

void unit_open(struct unit *unit, uint32_t kind, uint64_t blocks, uint32_t owner)
{
	*unit = (struct unit){ .fd = memfd_create("unit", MFD_CLOEXEC), .latch_fd = memfd_create("latch", MFD_CLOEXEC) };
	unit->size = blocks * 512;
	CHECK_EQUAL(ftruncate(unit->fd, (off_t)unit->size), 0);
	CHECK_EQUAL(ftruncate(unit->latch_fd, VFC_LATCH_BYTES), 0);
	unit->bytes = mmap(NULL, unit->size, PROT_READ | PROT_WRITE, MAP_SHARED, unit->fd, 0);
	CHECK(unit->bytes != MAP_FAILED);
	unit->medium = unit_again(unit, kind, owner);
}

struct vfc_medium *unit_again(const struct unit *unit, uint32_t kind, uint32_t owner)
{
	struct vfc_medium_setup setup = {
		.fd = unit->fd,
		.latch_fd = unit->latch_fd,
		.kind = kind,
		.owner = owner,
		.block_size = 512,
		.blocks = unit->size / 512,
	};
	struct vfc_medium *medium;

	CHECK_EQUAL(vfc_medium_new(&setup, &medium), 0);
	return medium;
}

void unit_close(struct unit *unit)
{
	vfc_medium_put(unit->medium);
	munmap(unit->bytes, unit->size);
	close(unit->fd);
	close(unit->latch_fd);
}

/* ---------------------------------------------------------------- the gate */

static pthread_mutex_t gate_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t gate_turn = PTHREAD_COND_INITIALIZER;
static bool gate_shut, gate_lets_writes;
static unsigned gate_waiting;

static void shut(bool lets_writes)
{
	pthread_mutex_lock(&gate_lock);
	gate_shut = true;
	gate_lets_writes = lets_writes;
	pthread_mutex_unlock(&gate_lock);
}

void gate_close(void)
{
	shut(false);
}

void gate_close_to_reads(void)
{
	shut(true);
}

void gate_open(void)
{
	pthread_mutex_lock(&gate_lock);
	gate_shut = false;
	pthread_cond_broadcast(&gate_turn);
	pthread_mutex_unlock(&gate_lock);
}

unsigned gate_waits(void)
{
	unsigned waiting;

	pthread_mutex_lock(&gate_lock);
	waiting = gate_waiting;
	pthread_mutex_unlock(&gate_lock);
	return waiting;
}

void gate_await(unsigned threads)
{
	pthread_mutex_lock(&gate_lock);
	while (gate_waiting < threads)
		pthread_cond_wait(&gate_turn, &gate_lock);
	pthread_mutex_unlock(&gate_lock);
}

static void pass_gate(bool writes)
{
	pthread_mutex_lock(&gate_lock);
	gate_waiting++;
	pthread_cond_broadcast(&gate_turn);
	while (gate_shut && !(writes && gate_lets_writes))
		pthread_cond_wait(&gate_turn, &gate_lock);
	gate_waiting--;
	pthread_mutex_unlock(&gate_lock);
}

_Atomic int harness_sync_error;

static bool sync_fails(void)
{
	errno = atomic_load(&harness_sync_error);
	return errno;
}

/* The linker leads the pool's calls here (--wrap). */
int __real_fdatasync(int fd);
int __wrap_fdatasync(int fd);
ssize_t __real_preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags);
ssize_t __real_pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags);
ssize_t __wrap_preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags);
ssize_t __wrap_pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags);

ssize_t __wrap_preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
	/* The worker itself, which waits for nothing: behind the gate lies what the page cache has not. */
	if (flags & RWF_NOWAIT) {
		bool shut;

		pthread_mutex_lock(&gate_lock);
		shut = gate_shut;
		pthread_mutex_unlock(&gate_lock);
		errno = EAGAIN;
		return shut ? -1 : __real_preadv2(fd, iov, count, offset, flags);
	}
	pass_gate(false);
	return __real_preadv2(fd, iov, count, offset, flags);
}

ssize_t __wrap_pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
	pass_gate(true);
	if (flags & RWF_DSYNC && sync_fails())
		return -1;
	return __real_pwritev2(fd, iov, count, offset, flags);
}

int __wrap_fdatasync(int fd)
{
	pass_gate(true);
	return sync_fails() ? -1 : __real_fdatasync(fd);
}

_Atomic int harness_refusals;

struct io_uring;
int __real_io_uring_submit_and_get_events(struct io_uring *ring);
int __wrap_io_uring_submit_and_get_events(struct io_uring *ring);

int __wrap_io_uring_submit_and_get_events(struct io_uring *ring)
{
	if (atomic_load(&harness_refusals) > 0) {
		atomic_fetch_sub(&harness_refusals, 1);
		return -EAGAIN;
	}
	return __real_io_uring_submit_and_get_events(ring);
}

/* ---------------------------------------------------------------- an engine for files that is the tests' own */

struct vfc_path_engine;
struct vfc_path_engine *harness_files;

int __real_path_pool_new(struct vfc_path_engine **ret_engine);
void __real_path_pool_free(struct vfc_path_engine *engine);
int __wrap_path_pool_new(struct vfc_path_engine **ret_engine);
void __wrap_path_pool_free(struct vfc_path_engine *engine);

int __wrap_path_pool_new(struct vfc_path_engine **ret_engine)
{
	if (!harness_files)
		return __real_path_pool_new(ret_engine);
	*ret_engine = harness_files;
	return 0;
}

void __wrap_path_pool_free(struct vfc_path_engine *engine)
{
	if (engine != harness_files)
		__real_path_pool_free(engine);
}
