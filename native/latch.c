/*
 * latch.c - per-block atomicity between processes: words in a shared memfd, one per stripe of the medium, each
 * holding its owner's number or 0.
 *
 * A word is all there is: no queue, no waiter count, nothing that a process killed at any instruction could leave
 * half done.  Whoever dies leaves its number; the fabric, once that process and its I/O are gone, writes 0 over it.
 *
 * Behind the words lies the count of losses, which has nothing to do with them but that all who have the medium have it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "latch.h"

#define LOSS (1ull << 32)	/* one more of them; below it are doubts */

_Static_assert(VFC_LATCH_WORDS * sizeof(uint32_t) + sizeof(uint64_t) <= VFC_LATCH_BYTES, "the memfd has room for both");

int vfc_latch_open(int fd, struct vfc_latch **ret_latch)
{
	struct vfc_latch *latch;
	struct stat status;
	int error;

	if (fstat(fd, &status) < 0)
		return -errno;
	if (status.st_size < VFC_LATCH_BYTES)
		return -EINVAL;
	latch = malloc(sizeof(*latch));
	if (!latch)
		return -ENOMEM;
	latch->words = mmap(NULL, VFC_LATCH_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (latch->words == MAP_FAILED) {
		error = -errno;
		free(latch);
		return error;
	}
	latch->losses = (_Atomic uint64_t *)(void *)(latch->words + LATCH_WORDS);
	*ret_latch = latch;
	return 0;
}

void vfc_latch_put(struct vfc_latch *latch)
{
	if (!latch)
		return;
	munmap((void *)latch->words, VFC_LATCH_BYTES);
	free(latch);
}

/* The first word, and how many follow it (modulo the table): never one twice. */
static uint64_t stripes(uint64_t offset, uint64_t length, uint64_t *ret_first)
{
	uint64_t first = offset / VFC_LATCH_STRIPE, count;

	*ret_first = first;
	if (!length)
		return 0;
	count = (offset + length - 1) / VFC_LATCH_STRIPE - first + 1;
	return count < LATCH_WORDS ? count : LATCH_WORDS;
}

int vfc_latch_take(struct vfc_latch *latch, uint32_t owner, uint64_t offset, uint64_t length, uint32_t *ret_holder)
{
	uint64_t first, count = stripes(offset, length, &first);

	for (uint64_t i = 0; i < count; i++) {
		uint32_t holder;

		if (latch_take_one(latch, owner, (first + i) * VFC_LATCH_STRIPE, &holder))
			continue;
		while (i--)
			latch_free_one(latch, owner, (first + i) * VFC_LATCH_STRIPE);
		if (ret_holder)
			*ret_holder = holder;
		return -EAGAIN;
	}
	return 0;
}

void vfc_latch_free(struct vfc_latch *latch, uint32_t owner, uint64_t offset, uint64_t length)
{
	uint64_t first, count = stripes(offset, length, &first);

	for (uint64_t i = 0; i < count; i++)
		latch_free_one(latch, owner, (first + i) * VFC_LATCH_STRIPE);
}

int vfc_latch_recover(struct vfc_latch *latch, uint32_t owner)
{
	int freed = 0;

	for (uint64_t i = 0; i < LATCH_WORDS; i++) {
		uint32_t holder = owner;

		if (owner && atomic_compare_exchange_strong(&latch->words[i], &holder, 0))
			freed++;
	}
	return freed;
}

uint64_t vfc_latch_losses(const struct vfc_latch *latch)
{
	return atomic_load(latch->losses);
}

uint64_t vfc_latch_lost(struct vfc_latch *latch, uint64_t known)
{
	uint64_t count = atomic_load(latch->losses), next;

	/* Where others have counted one since, it is most likely the same: that is for the fabric to find out. */
	do
		next = count + (count / LOSS == known / LOSS ? LOSS : 1);
	while (!atomic_compare_exchange_weak(latch->losses, &count, next));
	return next;
}

uint64_t vfc_latch_doubt(struct vfc_latch *latch)
{
	return atomic_fetch_add(latch->losses, 1) + 1;
}
