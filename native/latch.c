/*
 * latch.c - per-block atomicity between processes: words in a shared memfd, one per stripe of the medium, each
 * holding its owner's number or 0.
 *
 * A word is all there is: no queue, no waiter count, nothing that a process killed at any instruction could leave
 * half done.  Whoever dies leaves its number; the fabric, once that process and its I/O are gone, writes 0 over it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "latch.h"

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
