/*
 * latch.c - per-block atomicity between processes: words in a shared memfd, one per stripe of the medium, each
 * holding its owner's number or 0.
 *
 * A word is all there is: no queue, no waiter count, nothing that a process killed at any instruction could leave
 * half done.  Whoever dies leaves its number; the fabric, once that process and its I/O are gone, writes 0 over it.
 *
 * A block of memory that its writer was just copying is torn then, and the latch alone would hand it out.  So a writer
 * first gathers what it writes in a place of its own behind the words, says there where it belongs, and copies it from
 * there; the fabric does that again for a dead one.  The block is new, as if the command had come a moment earlier.
 *
 * Behind all that lies the count of losses, which has nothing to do with them but that all who have the medium have it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "latch.h"

#define LOSS (1ull << 32)	/* one more of them; below it are doubts */

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
	latch->words = mmap(NULL, VFC_LATCH_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	if (latch->words == MAP_FAILED) {
		error = -errno;
		free(latch);
		return error;
	}
	madvise((void *)latch->words, VFC_LATCH_BYTES, MADV_DONTDUMP);
	latch->places = (struct latch_place *)(void *)(latch->words + LATCH_WORDS);
	latch->data = (uint8_t *)(latch->places + VFC_LATCH_PLACES);
	latch->losses = (_Atomic uint64_t *)(void *)(latch->data + (size_t)VFC_LATCH_PLACES * REDO_ROOM);
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

bool latch_place(struct vfc_latch *latch, uint32_t owner, uint32_t worker, struct vfc_redo *ret_redo)
{
	uint64_t me = (uint64_t)owner << 32 | (worker + 1);
	uint32_t at = VFC_LATCH_PLACES;

	for (uint32_t i = 0; i < VFC_LATCH_PLACES && at == VFC_LATCH_PLACES; i++)
		if (atomic_load(&latch->places[i].user) == me)
			at = i;
	for (uint32_t i = 0; i < VFC_LATCH_PLACES && at == VFC_LATCH_PLACES; i++) {
		uint64_t nobody = 0;

		if (atomic_compare_exchange_strong(&latch->places[i].user, &nobody, me))
			at = i;
	}
	if (at == VFC_LATCH_PLACES)
		return false;
	*ret_redo = (struct vfc_redo){ &latch->places[at].what, latch->data + (size_t)at * REDO_ROOM };
	return true;
}

static int write_all(int fd, const uint8_t *data, size_t length, off_t offset)
{
	while (length) {
		ssize_t done = pwrite(fd, data, length, offset);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return done ? -errno : -EIO;
		data += done;
		length -= (size_t)done;
		offset += done;
	}
	return 0;
}

int vfc_latch_redo(struct vfc_latch *latch, uint32_t owner, int fd)
{
	struct stat status;
	int copies = 0, failure = 0;

	if (fstat(fd, &status) < 0)
		return -errno;
	for (uint32_t i = 0; i < VFC_LATCH_PLACES; i++) {
		struct latch_place *place = &latch->places[i];
		uint64_t user = atomic_load(&place->user), what = atomic_load(&place->what);
		uint64_t offset = what >> 8 << 9, length = (what & 0xff) << 9;

		if (!user || (owner && user >> 32 != owner))
			continue;
		/* Others may write here what they like; they can do no more than with the medium itself. */
		if (length && length <= REDO_ROOM && length <= (uint64_t)status.st_size &&
		    offset <= (uint64_t)status.st_size - length) {
			int error = write_all(fd, latch->data + (size_t)i * REDO_ROOM, length, (off_t)offset);

			if (error) {
				failure = error;
				continue;
			}
			copies++;
		}
		atomic_store(&place->what, 0);
		atomic_store(&place->user, 0);
	}
	return failure ? failure : copies;
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
