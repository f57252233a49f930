/*
 * frontend.c - a load generator on one ring: see frontend.h.
 *
 * A slot is a command's place: its header, response, descriptors and data never move, so a command costs no
 * allocation and the used ring's id tells its slot.  What stays the same from one command of a slot to the next is
 * built once: the generator's own cost is part of every round trip that it measures.
 */
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "frontend_ring.h"
#include "frontend_table.h"

/* virtio 5.6.6.1: struct virtio_scsi_req_cmd with cdb_size 32 and sense_size 96 */
#define REQUEST_BYTES 51
#define REQUEST_TAG 8
#define REQUEST_CDB 19
#define RESPONSE_BYTES 108
#define RESPONSE_RESIDUAL 4
#define RESPONSE_STATUS 10
#define RESPONSE_CODE 11
#define RESPONSE_SENSE 12	/* what comes before it is looked at each time */
#define SENSE_MAX 96

#define STATUS_CHECK_CONDITION 0x02
#define STATUS_BUSY 0x08
#define STATUS_TASK_SET_FULL 0x28
#define STATUS_TASK_ABORTED 0x40
#define RESPONSE_RESET 4
#define RESPONSE_BUSY 5

/* Where the parts of a slot's head lie, in bytes. */
#define HEAD_RESPONSE 64
#define HEAD_TABLE 192
#define ALIGNMENT 4096
#define IO_MAX (64u << 20)
#define RETRY_NS 3000000	/* a busy device gets as long as Linux gives it */
#define WAIT_MS 50	/* how late a stop flag may be seen by a thread that sleeps */

struct slot {
	uint64_t lba;
	uint64_t issued;	/* ns */
	uint32_t *generations;	/* per block: to be written, or the low ones of a read */
	bool busy;
	bool write;
	bool built, built_write;	/* what its chain and header were made for */
};

struct load {
	struct vfd_ring *ring;
	struct lane lane;
	struct null null;	/* VFD_NULL */
	const struct vfd_job *job;
	struct vfd_result *out;
	struct piece *chain;	/* to build one */
	struct slot *slots;
	uint32_t *free;		/* a stack of slots */
	uint32_t free_count;
	uint32_t *again;	/* slots to send again */
	uint32_t again_count;
	uint32_t segments;
	uint32_t io_blocks;
	uint64_t head_stride, data_stride, data_start;
	uint64_t positions, position;
	uint64_t random;
	uint64_t budget;	/* commands that may still be issued */
	uint32_t in_flight;
	uint32_t sent;
	bool measuring;
	bool stalled_claim;	/* every position tried is being written */
	uint64_t start, began, cpu;	/* ns */
	uint64_t again_at;	/* ns: not before */
	uint64_t now;
	uint64_t last_progress;
};

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#else
	__asm__ volatile("" ::: "memory");
#endif
}

static uint64_t now_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---------------------------------------------------------------- sizes */

static uint64_t round_up(uint64_t value, uint64_t to)
{
	return (value + to - 1) / to * to;
}

static uint32_t segments_of(const struct vfd_job *job)
{
	return job->segment ? (job->io_size + job->segment - 1) / job->segment : 1;
}

static uint64_t head_stride_of(const struct vfd_job *job)
{
	return round_up(HEAD_TABLE + (2 + (uint64_t)segments_of(job)) * sizeof(struct vfd_desc), 64);
}

static bool job_is_sane(const struct vfd_job *job)
{
	return job->block_size >= 512 && job->block_size <= IO_MAX && !(job->block_size & (job->block_size - 1)) &&
	       job->io_size && job->io_size <= IO_MAX && job->io_size % job->block_size == 0 && job->depth &&
	       job->depth <= 32768 && job->read_percent <= 100 && job->blocks >= job->io_size / job->block_size &&
	       job->first + job->blocks >= job->first;
}

uint64_t vfd_arena_size(const struct vfd_job *job, uint32_t ring_flags)
{
	(void)ring_flags;	/* the indirect tables cost little: one layout for both */
	if (!job_is_sane(job))
		return 0;
	return round_up(job->depth * head_stride_of(job), ALIGNMENT) + job->depth * round_up(job->io_size, 512);
}

uint32_t vfd_max_depth(const struct vfd_job *job, uint32_t ring_size, uint32_t ring_flags)
{
	uint32_t chain = 2 + segments_of(job);

	if (chain > ring_size)	/* virtio 2.7.5.3.1, 2.8.19: no chain is longer than the ring, an indirect one neither */
		return 0;
	return ring_flags & VFD_INDIRECT ? ring_size : ring_size / chain;
}

/* ---------------------------------------------------------------- histogram */

static uint32_t bucket_of(uint64_t ns)
{
	uint32_t octave, bucket;

	if (ns < 64)
		return (uint32_t)ns;
	octave = 63 - (uint32_t)__builtin_clzll(ns);	/* >= 6 */
	bucket = (octave - 5) * 64 + (uint32_t)((ns >> (octave - 6)) & 63);
	return bucket < VFD_BUCKETS ? bucket : VFD_BUCKETS - 1;
}

uint64_t vfd_bucket_floor(uint32_t bucket)
{
	if (bucket < 64)
		return bucket;
	return (64ULL + bucket % 64) << (bucket / 64 - 1);
}

/* ---------------------------------------------------------------- the ring */

static uint8_t *slot_head(const struct load *l, uint32_t slot)
{
	return l->ring->arena + slot * l->head_stride;
}

static uint8_t *slot_data(const struct load *l, uint32_t slot)
{
	return l->ring->arena + l->data_start + slot * l->data_stride;
}

/* Header, data-out, response, data-in: readable first (virtio 2.7.4.2). */
static void lay_chain(struct load *l, uint32_t slot, bool write)
{
	uint64_t head = l->ring->arena_gpa + slot * l->head_stride;
	uint64_t data = l->ring->arena_gpa + l->data_start + slot * l->data_stride;
	struct piece response = { head + HEAD_RESPONSE, RESPONSE_BYTES, true };
	uint32_t at = 0, i;

	l->chain[at++] = (struct piece){ head, REQUEST_BYTES, false };
	if (!write)
		l->chain[at++] = response;
	for (i = 0; i < l->segments; i++) {
		uint32_t done = i * l->job->segment, len = l->job->io_size - done;

		if (l->job->segment && len > l->job->segment)
			len = l->job->segment;
		l->chain[at++] = (struct piece){ data + done, len, !write };
	}
	if (write)
		l->chain[at] = response;
}

/* Give the device a slot's command; publish() shows it. */
static void offer(struct load *l, uint32_t slot)
{
	struct slot *s = &l->slots[slot];
	uint8_t *head = slot_head(l, slot);
	bool fresh = !s->built || s->built_write != s->write;

	memset(head + HEAD_RESPONSE, 0xff, RESPONSE_SENSE);	/* a response that was never written shows */
	/* A direct chain of a packed ring is written at another place each time. */
	if (fresh || (l->ring->flags & (VFD_PACKED | VFD_INDIRECT)) == VFD_PACKED)
		lay_chain(l, slot, s->write);
	lane_offer(&l->lane, slot, l->chain, (struct vfd_desc *)(head + HEAD_TABLE),
		   l->ring->arena_gpa + slot * l->head_stride + HEAD_TABLE, fresh);
	s->built = true;
	s->built_write = s->write;
	l->in_flight++;
}

static void publish(struct load *l)
{
	uint64_t one = 1;

	if (lane_publish(&l->lane)) {
		l->out->kicks++;
		if (write(l->ring->kick_fd, &one, sizeof(one)) < 0)
			l->out->kicks--;	/* EAGAIN: the counter is full, the device has been told already */
	}
}

/* Sleep until the device has used something, or for WAIT_MS. */
static void await(struct load *l)
{
	struct pollfd fd = { .fd = l->ring->call_fd, .events = POLLIN };
	uint64_t count;

	if (lane_arm(&l->lane)) {
		l->out->waits++;
		if (poll(&fd, 1, l->again_count ? RETRY_NS / 1000000 : WAIT_MS) > 0 && read(l->ring->call_fd, &count, sizeof(count)) < 0)
			l->out->waits--;	/* somebody else has read it: as good as not slept */
	}
	lane_hush(&l->lane);
}

/* ---------------------------------------------------------------- commands */

/* splitmix64: small, and good enough to spread blocks */
static uint64_t next_random(struct load *l)
{
	uint64_t z = l->random += 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

/* SBC-3 5.10, 5.12, 5.29, 5.31: the 10-byte form while the numbers fit */
static void build_cdb(const struct load *l, uint8_t cdb[16], const struct slot *s)
{
	bool small = s->lba + l->io_blocks <= 1ULL << 32 && l->io_blocks <= 0xffff;
	uint64_t lba = htobe64(s->lba);
	uint32_t lba_low = htobe32((uint32_t)s->lba), blocks = htobe32(l->io_blocks);

	memset(cdb, 0, 16);
	cdb[1] = s->write && l->job->flags & VFD_FUA ? 0x08 : 0;
	if (small) {
		cdb[0] = s->write ? 0x2a : 0x28;
		memcpy(cdb + 2, &lba_low, 4);
		cdb[7] = (uint8_t)(l->io_blocks >> 8);
		cdb[8] = (uint8_t)l->io_blocks;
	} else {
		cdb[0] = s->write ? 0x8a : 0x88;
		memcpy(cdb + 2, &lba, 8);
		memcpy(cdb + 10, &blocks, 4);
	}
}

static void tag_blocks(struct load *l, uint32_t slot)
{
	struct slot *s = &l->slots[slot];
	struct vfd_tag tag = { .run = l->job->run, .writer = l->job->writer, .unit = l->job->unit };
	uint8_t *data = slot_data(l, slot);
	uint32_t i;

	for (i = 0; i < l->io_blocks; i++, data += l->job->block_size) {
		tag.lba = s->lba + i;
		tag.generation = s->generations[i];
		vfd_tag_fill(data, l->job->block_size, &tag);
	}
}

/* So that data that the device never wrote cannot pass for what it should have read. */
static void spoil_blocks(struct load *l, uint32_t slot)
{
	uint8_t *data = slot_data(l, slot);
	uint32_t i;

	for (i = 0; i < l->io_blocks; i++)
		memset(data + (uint64_t)i * l->job->block_size, 0xa5, sizeof(struct vfd_tag));
}

static uint64_t choose(struct load *l)
{
	uint64_t at;

	if (l->job->flags & VFD_RANDOM)
		at = next_random(l) % l->positions;
	else
		at = l->position++ % l->positions;
	return l->job->first + at * l->io_blocks;
}

/* Choose the blocks of a slot's next command; false when all that was tried is being written. */
static bool prepare(struct load *l, uint32_t slot)
{
	struct slot *s = &l->slots[slot];
	unsigned tries = l->job->flags & VFD_RANDOM ? 16 : 1;

	s->write = l->job->read_percent == 0 ||
		   (l->job->read_percent < 100 && next_random(l) % 100 >= l->job->read_percent);
	s->lba = choose(l);
	if (!(l->job->flags & VFD_VERIFY))
		return true;
	if (!s->write) {
		vfd_table_low(l->job->table, s->lba, l->io_blocks, s->generations);
		spoil_blocks(l, slot);
		return true;
	}
	while (!vfd_table_claim(l->job->table, s->lba, l->io_blocks, s->generations)) {
		if (!--tries) {
			if (!(l->job->flags & VFD_RANDOM))
				l->position--;
			return false;
		}
		s->lba = choose(l);
	}
	tag_blocks(l, slot);
	return true;
}

static void send(struct load *l, uint32_t slot)
{
	struct slot *s = &l->slots[slot];
	uint8_t *request = slot_head(l, slot);
	uint64_t tag = htole64((uint64_t)l->sent++ << 32 | slot);

	if (!s->built) {
		memset(request, 0, REQUEST_BYTES);
		memcpy(request, l->job->lun, 8);
	}
	memcpy(request + REQUEST_TAG, &tag, 8);
	build_cdb(l, request + REQUEST_CDB, s);
	offer(l, slot);
}

static void issue(struct load *l)
{
	if (!l->in_flight)
		l->last_progress = l->now;
	l->stalled_claim = false;
	while (l->again_count && l->now >= l->again_at) {
		uint32_t slot = l->again[--l->again_count];

		if (l->job->flags & VFD_VERIFY && !l->slots[slot].write)
			spoil_blocks(l, slot);
		send(l, slot);
	}
	while (l->free_count && l->budget) {
		uint32_t slot = l->free[l->free_count - 1];

		if (!prepare(l, slot)) {
			l->stalled_claim = true;
			break;
		}
		l->free_count--;
		l->budget--;
		l->slots[slot].issued = l->now;
		l->slots[slot].busy = true;
		send(l, slot);
	}
	publish(l);
}

/* ---------------------------------------------------------------- completions */

static struct vfd_failure *first_failure(struct load *l, enum vfd_kind kind, uint32_t slot, uint32_t id, uint32_t length)
{
	struct vfd_failure *f = &l->out->first;
	const struct slot *s = &l->slots[slot];

	if (f->kind)
		return NULL;
	f->kind = kind;
	f->write = s->write;
	f->lba = s->lba;
	f->blocks = l->io_blocks;
	f->used_id = id;
	f->used_length = length;
	build_cdb(l, f->cdb, s);
	memcpy(f->response, slot_head(l, slot) + HEAD_RESPONSE, RESPONSE_BYTES);
	return f;
}

/* What a driver sends again without telling anybody. */
static bool is_transient(const uint8_t *response)
{
	if (response[RESPONSE_CODE])
		return response[RESPONSE_CODE] == RESPONSE_RESET || response[RESPONSE_CODE] == RESPONSE_BUSY;
	switch (response[RESPONSE_STATUS]) {
	case STATUS_BUSY:
	case STATUS_TASK_SET_FULL:
	case STATUS_TASK_ABORTED:
		return true;
	case STATUS_CHECK_CONDITION:	/* a unit attention, in fixed format (SPC-4 4.5.3) or in descriptors (4.5.2) */
		if ((response[RESPONSE_SENSE] & 0x7e) == 0x72)
			return (response[RESPONSE_SENSE + 1] & 0x0f) == 6;
		return (response[RESPONSE_SENSE + 2] & 0x0f) == 6;
	default:
		return false;
	}
}

static enum vfd_kind judge(struct load *l, const struct slot *s, const uint8_t *response, uint32_t length)
{
	uint8_t code = response[RESPONSE_CODE], status = response[RESPONSE_STATUS];
	uint32_t sense_length, residual;

	l->out->responses[code < 15 ? code : 15]++;
	if (code)
		return VFD_BAD_RESPONSE;
	l->out->statuses[status]++;
	if (status)
		return VFD_BAD_STATUS;
	memcpy(&sense_length, response, 4);
	memcpy(&residual, response + RESPONSE_RESIDUAL, 4);
	if (residual || le32toh(sense_length) > SENSE_MAX)
		return VFD_BAD_RESIDUAL;
	if (length != RESPONSE_BYTES + (s->write ? 0 : l->job->io_size))
		return VFD_BAD_LENGTH;
	return VFD_OK;
}

static enum vfd_kind verify(struct load *l, uint32_t slot, uint32_t id, uint32_t length)
{
	struct slot *s = &l->slots[slot];
	enum vfd_kind kind = VFD_OK;
	uint32_t i;

	for (i = 0; i < l->io_blocks; i++) {
		struct vfd_finding finding;
		struct vfd_failure *f;

		vfd_table_check(l->job->table, l->job, s->lba + i, slot_data(l, slot) + (uint64_t)i * l->job->block_size,
				s->generations[i], &finding);
		if (finding.kind == VFD_OK) {
			if (finding.known)
				l->out->verified++;
			else
				l->out->unknown++;
			continue;
		}
		if (!kind)
			kind = finding.kind;
		f = first_failure(l, finding.kind, slot, id, length);
		if (f) {
			f->lba = s->lba + i;
			f->low = s->generations[i];
			f->high = finding.high;
			f->found = finding.found;
		}
	}
	return kind;
}

static void account(struct load *l, const struct slot *s)
{
	struct vfd_side *side = &l->out->side[s->write];
	uint64_t latency = l->now - s->issued;

	side->bytes += l->job->io_size;
	side->latency_sum += latency;
	if (!side->commands++ || latency < side->latency_min)
		side->latency_min = latency;
	if (latency > side->latency_max)
		side->latency_max = latency;
	side->histogram[bucket_of(latency)]++;
}

static void complete(struct load *l, uint32_t slot, uint32_t id, uint32_t length)
{
	struct slot *s = &l->slots[slot];
	const uint8_t *response = slot_head(l, slot) + HEAD_RESPONSE;	/* the device has done with it */
	enum vfd_kind kind;

	kind = judge(l, s, response, length);
	l->in_flight--;
	if (kind && !(l->job->flags & VFD_NO_RETRY) && l->now - s->issued < l->job->stall_ns && is_transient(response)) {
		l->out->retries++;
		l->again[l->again_count++] = slot;
		if (response[RESPONSE_CODE] == RESPONSE_BUSY || response[RESPONSE_STATUS] != STATUS_CHECK_CONDITION)
			l->again_at = l->now + RETRY_NS;
		return;
	}
	if (kind)
		first_failure(l, kind, slot, id, length);
	if (l->job->flags & VFD_VERIFY) {
		if (s->write)
			vfd_table_settle(l->job->table, s->lba, l->io_blocks, kind == VFD_OK);
		else if (!kind)
			kind = verify(l, slot, id, length);
	}
	l->out->kinds[kind]++;
	if (kind)
		l->out->errors++;
	else if (l->measuring)
		account(l, s);
	s->busy = false;
	l->free[l->free_count++] = slot;
}

/* What the device has used; how many, or -EPROTO. */
static int reap(struct load *l)
{
	uint32_t slot, length;
	int found, count = 0;

	while ((found = lane_next(&l->lane, &slot, &length)) > 0) {
		if (!count++)
			l->now = now_ns(CLOCK_MONOTONIC);
		if (slot >= l->job->depth || !l->slots[slot].busy) {
			found = -EPROTO;
			break;
		}
		complete(l, slot, slot, length);
	}
	if (found < 0) {
		l->out->kinds[VFD_BAD_USED]++;
		first_failure(l, VFD_BAD_USED, 0, slot, length);
		return found;
	}
	if (count)
		l->last_progress = l->now;
	return count;
}

/* ---------------------------------------------------------------- the run */

static uint32_t stop_flag(const struct vfd_job *job)
{
	return job->stop ? __atomic_load_n(job->stop, __ATOMIC_RELAXED) : 0;
}

/* Warm-up, measurement, draining: what the clock and the stop flag say of this moment. */
static bool steer(struct load *l, bool draining)
{
	const struct vfd_job *job = l->job;

	if (!l->measuring && !draining && l->now - l->start >= job->warmup_ns) {
		l->measuring = true;
		l->began = l->now;
		l->cpu = now_ns(CLOCK_THREAD_CPUTIME_ID);
		if (job->max_commands)
			l->budget = job->max_commands > l->in_flight ? job->max_commands - l->in_flight : 0;
	}
	if (stop_flag(job))
		draining = true;
	if (l->measuring && job->duration_ns && l->now - l->began >= job->duration_ns)
		draining = true;
	if (draining)
		l->budget = 0;
	return draining;
}

static int run(struct load *l)
{
	uint32_t spins = 0;
	bool draining = false;
	int err = 0;

	l->now = l->start = now_ns(CLOCK_MONOTONIC);
	lane_hush(&l->lane);
	for (;;) {
		draining = steer(l, draining);
		issue(l);
		if (!l->in_flight && !l->again_count && !l->budget && (l->measuring || draining))
			break;
		if (l->job->flags & VFD_NULL)
			null_serve(&l->null);
		err = reap(l);
		if (err < 0)
			break;
		if (err) {
			lane_stay_hushed(&l->lane);
			continue;
		}
		if (!(l->job->flags & VFD_POLL) || !l->in_flight) {
			await(l);
		} else if (++spins % 32) {
			relax();
			continue;
		}
		l->now = now_ns(CLOCK_MONOTONIC);
		if (l->in_flight && l->now - l->last_progress > l->job->stall_ns)
			err = -ETIMEDOUT;
		else if (stop_flag(l->job) == VFD_STOP_NOW)
			err = -ECANCELED;
		if (err)
			break;
	}
	if (l->measuring) {
		l->out->elapsed_ns = now_ns(CLOCK_MONOTONIC) - l->began;
		l->out->cpu_ns = now_ns(CLOCK_THREAD_CPUTIME_ID) - l->cpu;
	}
	l->out->in_flight = l->in_flight;
	return err < 0 ? err : 0;
}

static int allocate(struct load *l)
{
	const struct vfd_job *job = l->job;
	uint32_t i;

	l->slots = calloc(job->depth, sizeof(*l->slots));
	l->free = calloc(job->depth, sizeof(*l->free));
	l->again = calloc(job->depth, sizeof(*l->again));
	l->chain = calloc(2 + (size_t)l->segments, sizeof(*l->chain));
	if (!l->slots || !l->free || !l->again || !l->chain)
		return -ENOMEM;
	for (i = 0; i < job->depth; i++) {
		l->free[l->free_count++] = job->depth - 1 - i;
		if (!(job->flags & VFD_VERIFY))
			continue;
		l->slots[i].generations = calloc(l->io_blocks, sizeof(uint32_t));
		if (!l->slots[i].generations)
			return -ENOMEM;
	}
	return 0;
}

static void release(struct load *l)
{
	uint32_t i;

	for (i = 0; l->slots && i < l->job->depth; i++) {
		struct slot *s = &l->slots[i];

		if (s->busy && s->write && l->job->flags & VFD_VERIFY)	/* it may have landed or not */
			vfd_table_settle(l->job->table, s->lba, l->io_blocks, false);
		free(s->generations);
	}
	free(l->slots);
	free(l->free);
	free(l->again);
	free(l->chain);
}

int vfd_run(struct vfd_ring *ring, const struct vfd_job *job, struct vfd_result *ret_result)
{
	struct load l = { .ring = ring, .job = job, .out = ret_result };
	uint64_t need = vfd_arena_size(job, ring->flags);
	int err;

	if (!need || ring->arena_size < need || lane_begin(&l.lane, ring, 2 + segments_of(job)) < 0)
		return -EINVAL;
	if (job->depth > vfd_max_depth(job, ring->size, ring->flags))
		return -EINVAL;
	if (job->flags & VFD_VERIFY && (!job->run || !job->table || !vfd_table_covers(job->table, job->first, job->blocks)))
		return -EINVAL;
	memset(ret_result, 0, sizeof(*ret_result));
	l.segments = segments_of(job);
	l.io_blocks = job->io_size / job->block_size;
	l.head_stride = head_stride_of(job);
	l.data_start = round_up(job->depth * l.head_stride, ALIGNMENT);
	l.data_stride = round_up(job->io_size, 512);
	l.positions = job->blocks / l.io_blocks;
	l.random = job->seed;
	l.budget = UINT64_MAX;
	if (job->flags & VFD_NULL)
		null_begin(&l.null, &l.lane);
	err = allocate(&l);
	if (!err)
		err = run(&l);
	lane_end(&l.lane);
	release(&l);
	return err;
}
