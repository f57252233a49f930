/*
 * latch.h - the words of a range latch, and taking one of them: what every small command does.
 */
#ifndef VFC_LATCH_H
#define VFC_LATCH_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "vhostfc.h"

#define LATCH_WORDS ((uint64_t)VFC_LATCH_WORDS)

struct vfc_latch {
	_Atomic uint32_t *words;
	_Atomic uint64_t *losses;	/* behind them */
};

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
