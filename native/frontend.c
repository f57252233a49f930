/*
 * frontend.c - a load generator on one ring: see frontend.h, and frontend_load.h for its parts.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "frontend_load.h"

#define ALIGNMENT 4096
#define IO_MAX (64u << 20)
#define WAIT_MS 50	/* how late a stop flag may be seen by a thread that sleeps */

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#else
	__asm__ volatile("" ::: "memory");
#endif
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

uint64_t vfd_bucket_floor(uint32_t bucket)
{
	if (bucket < 64)
		return bucket;
	return (64ULL + bucket % 64) << (bucket / 64 - 1);
}

/* ---------------------------------------------------------------- the run */

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
		load_issue(l);
		if (!l->in_flight && !l->again_count && !l->budget && (l->measuring || draining))
			break;
		if (l->job->flags & VFD_NULL)
			null_serve(&l->null);
		err = load_reap(l);
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
