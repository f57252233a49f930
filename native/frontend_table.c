/*
 * frontend_table.c - the proof of the load generator: every block tagged, every tag remembered.
 *
 * A word per block: the newest generation that is certainly on the medium (bits 0-31), the
 * newest that was ever sent there (32-62), and whether a write is in flight (63).  A block is
 * filled with copies of its tag that differ in `place` alone, so a block that two writes share
 * (torn), that came from elsewhere (misplaced) or that lost a write (stale) shows it.
 */
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "frontend_table.h"

#define WRITING (1ULL << 63)
#define LOW(word) ((uint32_t)(word))
#define HIGH(word) ((uint32_t)((word) >> 32) & 0x7fffffffu)
#define WORD(low, high) ((uint64_t)(high) << 32 | (low))

struct vfd_table {
	uint64_t first;
	uint64_t blocks;
	uint64_t *words;
};

int vfd_table_new(uint64_t first, uint64_t blocks, struct vfd_table **ret_table)
{
	struct vfd_table *table;

	if (!blocks || first + blocks < first)
		return -EINVAL;
	table = malloc(sizeof(*table));
	if (!table)
		return -ENOMEM;
	table->first = first;
	table->blocks = blocks;
	/* calloc of much memory is pages of zeros that cost nothing until they are touched */
	table->words = calloc(blocks, sizeof(*table->words));
	if (!table->words) {
		free(table);
		return -ENOMEM;
	}
	*ret_table = table;
	return 0;
}

void vfd_table_free(struct vfd_table *table)
{
	if (!table)
		return;
	free(table->words);
	free(table);
}

bool vfd_table_covers(const struct vfd_table *table, uint64_t lba, uint64_t blocks)
{
	return lba >= table->first && blocks <= table->blocks && lba - table->first <= table->blocks - blocks;
}

static uint64_t *word_of(const struct vfd_table *table, uint64_t lba)
{
	return &table->words[lba - table->first];
}

/* Change a word by a pure function of its value; other rings' threads may be at it too. */
static bool update(uint64_t *word, uint64_t old, uint64_t new)
{
	return __atomic_compare_exchange_n(word, &old, new, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

bool vfd_table_claim(struct vfd_table *table, uint64_t lba, uint32_t blocks, uint32_t *ret_generations)
{
	uint32_t i;

	for (i = 0; i < blocks; i++) {
		uint64_t *word = word_of(table, lba + i), old;

		do {
			old = __atomic_load_n(word, __ATOMIC_ACQUIRE);
			if (old & WRITING)
				goto undo;
		} while (!update(word, old, WRITING | WORD(LOW(old), HIGH(old) + 1)));
		ret_generations[i] = HIGH(old) + 1;
	}
	return true;
undo:
	while (i--) {
		uint64_t *word = word_of(table, lba + i), old;

		do {
			old = __atomic_load_n(word, __ATOMIC_ACQUIRE);
		} while (!update(word, old, WORD(LOW(old), HIGH(old) - 1)));
	}
	return false;
}

void vfd_table_settle(struct vfd_table *table, uint64_t lba, uint32_t blocks, bool written)
{
	uint32_t i;

	for (i = 0; i < blocks; i++) {
		uint64_t *word = word_of(table, lba + i), old;

		do {
			old = __atomic_load_n(word, __ATOMIC_ACQUIRE);
		} while (!update(word, old, WORD(written ? HIGH(old) : LOW(old), HIGH(old))));
	}
}

void vfd_table_low(const struct vfd_table *table, uint64_t lba, uint32_t blocks, uint32_t *ret_low)
{
	uint32_t i;

	for (i = 0; i < blocks; i++)
		ret_low[i] = LOW(__atomic_load_n(word_of(table, lba + i), __ATOMIC_ACQUIRE));
}

void vfd_tag_fill(uint8_t *block, uint32_t size, const struct vfd_tag *tag)
{
	struct vfd_tag copy = *tag;
	uint32_t at;

	for (at = 0; at + sizeof(copy) <= size; at += sizeof(copy)) {
		copy.place = at / sizeof(copy);
		memcpy(block + at, &copy, sizeof(copy));
	}
}

/* How many of the block's tags are of this run, and are all the same but for their place? */
static bool block_is_whole(const uint8_t *block, uint32_t size, uint64_t run, uint32_t *ret_tags, struct vfd_tag *ret_odd)
{
	struct vfd_tag first, tag;
	uint32_t at, tags = 0;
	bool same = true;

	memcpy(&first, block, sizeof(first));
	*ret_odd = first;
	for (at = 0; at + sizeof(tag) <= size; at += sizeof(tag)) {
		memcpy(&tag, block + at, sizeof(tag));
		tags += tag.run == run;
		if (same && (memcmp(&tag, &first, offsetof(struct vfd_tag, place)) || tag.place != at / sizeof(tag))) {
			same = false;
			*ret_odd = tag;
		}
	}
	*ret_tags = tags;
	return same;
}

/* A read that saw a generation settles that it is there: no later one may see an older. */
static void raise_low(uint64_t *word, uint32_t seen)
{
	uint64_t old;

	do {
		old = __atomic_load_n(word, __ATOMIC_ACQUIRE);
		if (LOW(old) >= seen)
			return;
	} while (!update(word, old, (old & WRITING) | WORD(seen, HIGH(old))));
}

void vfd_table_check(struct vfd_table *table, const struct vfd_job *job, uint64_t lba, const uint8_t *block,
		     uint32_t low, struct vfd_finding *ret_finding)
{
	uint64_t *word = word_of(table, lba);
	struct vfd_finding *f = ret_finding;
	uint32_t tags;
	bool whole;

	whole = block_is_whole(block, job->block_size, job->run, &tags, &f->found);
	f->known = tags != 0;
	f->high = HIGH(__atomic_load_n(word, __ATOMIC_ACQUIRE));
	f->kind = VFD_OK;
	if (!tags) {	/* nothing of this run in it: right as long as nothing was written */
		if (low)
			f->kind = VFD_STALE;
	} else if (!whole) {
		f->kind = VFD_TORN;
	} else if (f->found.lba != lba || f->found.unit != job->unit) {
		f->kind = VFD_MISPLACED;
	} else if (f->found.writer != job->writer) {
		if (!(job->flags & VFD_SHARED))
			f->kind = VFD_MISPLACED;
	} else if (f->found.generation < low) {
		f->kind = VFD_STALE;
	} else if (f->found.generation > f->high) {
		f->kind = VFD_FUTURE;
	} else {
		raise_low(word, f->found.generation);
	}
}
