/*
 * frontend_answer.c - what comes back of a load: judged, verified, counted; and what a driver sends again by itself.
 */
#include <endian.h>
#include <errno.h>
#include <string.h>

#include "frontend_load.h"

#define RESPONSE_RESIDUAL 4
#define RESPONSE_STATUS 10
#define RESPONSE_CODE 11
#define SENSE_MAX 96
#define STATUS_CHECK_CONDITION 0x02
#define STATUS_BUSY 0x08
#define STATUS_TASK_SET_FULL 0x28
#define STATUS_TASK_ABORTED 0x40
#define RESPONSE_RESET 4
#define RESPONSE_BUSY 5

static uint32_t bucket_of(uint64_t ns)
{
	uint32_t octave, bucket;

	if (ns < 64)
		return (uint32_t)ns;
	octave = 63 - (uint32_t)__builtin_clzll(ns);	/* >= 6 */
	bucket = (octave - 5) * 64 + (uint32_t)((ns >> (octave - 6)) & 63);
	return bucket < VFD_BUCKETS ? bucket : VFD_BUCKETS - 1;
}

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
	load_cdb(l, f->cdb, s);
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

int load_reap(struct load *l)
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
