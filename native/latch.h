/*
 * latch.h - the words of a range latch, and taking one of them: what every small command does; and the places where
 * writes to memory are complete before they begin.
 */
#ifndef VFC_LATCH_H
#define VFC_LATCH_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "vhostfc.h"

#define LATCH_WORDS ((uint64_t)VFC_LATCH_WORDS)
#define LATCH_PAGE 4096	/* of the count of losses */
#define REDO_ROOM VFC_LATCH_STRIPE	/* bytes of data in a place */
#define REDO_PIECE 16384		/* bytes that are copied at a time, if a block is not larger: they stay in the cache */

/* A writer's place: whose it is, and where its data are just being copied to.  In the memfd, behind the words. */
struct latch_place {
	_Atomic uint64_t user;	/* owner << 32 | worker + 1; 0: nobody's */
	_Atomic uint64_t what;	/* offset / 512 << 8 | length / 512; 0: nothing */
	uint8_t rest[48];	/* a cache line for each */
};

struct vfc_latch {
	_Atomic uint32_t *words;
	struct latch_place *places;
	uint8_t *data;		/* REDO_ROOM for each place */
	_Atomic uint64_t *losses;	/* behind them, a page of its own */
};

_Static_assert(VFC_LATCH_BYTES == LATCH_WORDS * sizeof(uint32_t) +
		       (size_t)VFC_LATCH_PLACES * (sizeof(struct latch_place) + REDO_ROOM) + LATCH_PAGE, "no more and no less");

/* A place in use. */
struct vfc_redo {
	_Atomic uint64_t *what;
	uint8_t *data;
};

/* The place of this worker of this owner, the same at each call; false: all are taken. */
bool latch_place(struct vfc_latch *latch, uint32_t owner, uint32_t worker, struct vfc_redo *ret_redo);

/*
 * Whole blocks from the place to the memory: whoever is killed in between has either not begun, or all of it is in the
 * place.  That other side looks when we are dead, so the order of our own stores is all that matters.
 */
static inline void redo_copy(const struct vfc_redo *redo, uint8_t *memory, uint64_t offset, size_t length)
{
	atomic_store_explicit(redo->what, offset >> 9 << 8 | length >> 9, memory_order_release);
	atomic_signal_fence(memory_order_seq_cst);
	memcpy(memory + offset, redo->data, length);
	atomic_store_explicit(redo->what, 0, memory_order_release);
}

/* The stripe of this byte of the medium.  False, and who has it, when it is taken. */
static inline bool latch_take_one(struct vfc_latch *latch, uint32_t owner, uint64_t offset, uint32_t *ret_holder)
{
	uint32_t holder = 0;

	/* Acquire pairs with the release of the last holder: we see all that it wrote. */
	if (atomic_compare_exchange_strong_explicit(&latch->words[offset / VFC_LATCH_STRIPE % LATCH_WORDS], &holder, owner,
						    memory_order_acquire, memory_order_relaxed))
		return true;
	*ret_holder = holder;
	return false;
}

static inline void latch_free_one(struct vfc_latch *latch, uint32_t owner, uint64_t offset)
{
	uint32_t mine = owner;

	/* Only our own: a word that the fabric recovered meanwhile may have a new holder. */
	atomic_compare_exchange_strong_explicit(&latch->words[offset / VFC_LATCH_STRIPE % LATCH_WORDS], &mine, 0,
						memory_order_release, memory_order_relaxed);
}

#endif
