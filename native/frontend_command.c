/*
 * frontend_command.c - the commands of a load: chosen, built and sent.
 *
 * What stays the same from one command of a slot to the next is built once: the generator's own cost is part of every
 * round trip that it measures.
 */
#include <endian.h>
#include <string.h>
#include <unistd.h>

#include "frontend_load.h"

#define REQUEST_TAG 8
#define REQUEST_CDB 19

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

/* splitmix64: small, and good enough to spread blocks */
static uint64_t next_random(struct load *l)
{
	uint64_t z = l->random += 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

void load_cdb(const struct load *l, uint8_t cdb[16], const struct slot *s)
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
	load_cdb(l, request + REQUEST_CDB, s);
	offer(l, slot);
}

void load_issue(struct load *l)
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
