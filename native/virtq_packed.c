/*
 * virtq_packed.c - packed virtqueues, device side (virtio 1.3, 2.8).
 *
 * There is one ring.  The driver makes descriptors available in it, the device writes used ones over them; whose turn
 * a descriptor is says a pair of its flags, compared with a wrap counter that flips at each end of the ring.  A buffer
 * takes one descriptor or several in a row; the device writes one back and skips as many as the buffer had.
 *
 * A batch is published by its first used descriptor: all others are written before, so the driver, which looks at
 * them in order, sees none of the batch or (as far as it goes on) all of it.
 */
#include <errno.h>
#include <stdatomic.h>

#include "virtq_packed.h"

/* 2.8.14 Event Suppression Structure Format: desc offset and wrap counter, then flags */
#define EVENT_AT 0
#define EVENT_FLAGS 1
#define EVENT_ENABLE 0
#define EVENT_DISABLE 1
#define EVENT_DESC 2
#define EVENT_MASK 3
#define WRAP_BIT 15
#define INDEX_MASK 0x7fff

static inline bool available(const struct vq *vq, uint16_t flags)
{
	return (flags & (VQ_DESC_AVAIL | VQ_DESC_USED)) == (vq->avail_wrap ? VQ_DESC_AVAIL : VQ_DESC_USED);
}

int packed_begin(struct vq *vq, uint32_t base, struct vq_place *places)
{
	uint16_t avail = base & INDEX_MASK, used = base >> 16 & INDEX_MASK;

	if (avail >= vq->size || used >= vq->size || !places)
		return -EINVAL;
	vq->next_avail = avail;
	vq->avail_wrap = base >> WRAP_BIT & 1;
	vq->next_used = vq->published = used;
	vq->used_wrap = base >> 31;
	vq->held = false;
	vq->places = places;
	return 0;
}

uint32_t packed_base(const struct vq *vq)
{
	return vq->next_avail | (uint32_t)vq->avail_wrap << WRAP_BIT | (uint32_t)vq->next_used << 16 |
	       (uint32_t)vq->used_wrap << 31;
}

static inline int next(struct vq *vq, uint16_t *ret_id)
{
	uint32_t at = vq->next_avail, count = 1;
	uint16_t *words = vq_words(vq, at);
	/* Acquire pairs with the driver's barrier between writing a buffer's descriptors and the first one's flags. */
	uint16_t flags = __atomic_load_n(&words[VQ_WORD_FLAGS], __ATOMIC_ACQUIRE), id;

	if (!available(vq, flags))
		return 0;
	while (flags & VQ_DESC_NEXT) {
		if (count == vq->size)
			return -ELOOP;
		count++;
		if (++at == vq->size)
			at = 0;
		words = vq_words(vq, at);
		flags = __atomic_load_n(&words[VQ_WORD_FLAGS], __ATOMIC_RELAXED);
	}
	id = __atomic_load_n(&words[VQ_WORD_ID], __ATOMIC_RELAXED);
	if (id >= vq->size)
		return -EINVAL;
	if (vq->places[id].count)
		return -EBUSY;
	vq->places[id] = (struct vq_place){ vq->next_avail, (uint16_t)count };
	at = vq->next_avail + count;
	if (at >= vq->size) {
		at -= vq->size;
		vq->avail_wrap = !vq->avail_wrap;
	}
	vq->next_avail = (uint16_t)at;
	*ret_id = id;
	return 1;
}

int packed_next(struct vq *vq, uint16_t *ret_id)
{
	return next(vq, ret_id);
}

/* Buffers of one descriptor, as they are with indirect tables, without further ado; the others by next(). */
unsigned packed_take(struct vq *vq, uint16_t *ret_ids, unsigned max, int *ret_error)
{
	uint32_t at = vq->next_avail;
	unsigned count = 0;

	for (; count < max; count++) {
		const uint16_t *words = vq_words(vq, at);
		/* Acquire: as in next(). */
		uint16_t flags = __atomic_load_n(&words[VQ_WORD_FLAGS], __ATOMIC_ACQUIRE), id = vq->size;

		/* The other words of one that is not available are still the driver's. */
		if (!(flags & VQ_DESC_NEXT) && available(vq, flags))
			id = __atomic_load_n(&words[VQ_WORD_ID], __ATOMIC_RELAXED);
		if (id >= vq->size || vq->places[id].count) {
			vq->next_avail = (uint16_t)at;
			*ret_error = next(vq, &ret_ids[count]);
			if (*ret_error <= 0)
				return count;
			at = vq->next_avail;
			continue;
		}
		vq->places[id] = (struct vq_place){ (uint16_t)at, 1 };
		ret_ids[count] = id;
		if (++at == vq->size) {
			at = 0;
			vq->avail_wrap = !vq->avail_wrap;
		}
	}
	vq->next_avail = (uint16_t)at;
	*ret_error = 1;
	return count;
}

bool packed_publish(struct vq *vq)
{
	const uint16_t *wish = vq->avail;
	uint16_t at, flags;
	int old = vq->published, event;

	if (!vq->held)
		return false;
	/* Release pairs with the driver's acquire of the flags: data, responses and the rest of the batch come first. */
	__atomic_store_n(vq_used_word(vq, vq->published), vq->held_word, __ATOMIC_RELEASE);
	vq->held = false;
	vq->published = vq->next_used;
	/*
	 * Pairs with the driver's full barrier between writing its event suppression area and looking at the used
	 * descriptor again: either it sees ours or we see its wish.
	 */
	atomic_thread_fence(memory_order_seq_cst);
	flags = __atomic_load_n(&wish[EVENT_FLAGS], __ATOMIC_ACQUIRE) & EVENT_MASK;
	if (flags != EVENT_DESC || !vq->event_idx)
		return flags != EVENT_DISABLE;
	at = __atomic_load_n(&wish[EVENT_AT], __ATOMIC_RELAXED);
	event = at & INDEX_MASK;
	/* On one scale with next_used: what lies before the ring's last end counts from below zero. */
	if (at >> WRAP_BIT != vq->used_wrap)
		event -= vq->size;
	if (old >= vq->next_used)
		old -= vq->size;
	return (uint16_t)(vq->next_used - event - 1) < (uint16_t)(vq->next_used - old);
}

void packed_suppress(struct vq *vq)
{
	__atomic_store_n(&vq->used[EVENT_FLAGS], EVENT_DISABLE, __ATOMIC_RELAXED);
}

bool packed_rearm(struct vq *vq)
{
	if (vq->event_idx) {
		__atomic_store_n(&vq->used[EVENT_AT], vq->next_avail | (uint16_t)(vq->avail_wrap << WRAP_BIT),
				 __ATOMIC_RELAXED);
		/* Release: the place is there before the flags say that it counts. */
		__atomic_store_n(&vq->used[EVENT_FLAGS], EVENT_DESC, __ATOMIC_RELEASE);
	} else {
		__atomic_store_n(&vq->used[EVENT_FLAGS], EVENT_ENABLE, __ATOMIC_RELAXED);
	}
	/*
	 * Pairs with the driver's full barrier between making a descriptor available and reading our event
	 * suppression area: either it sees that we want a kick or we see what it added.
	 */
	atomic_thread_fence(memory_order_seq_cst);
	return available(vq, __atomic_load_n(&vq_words(vq, vq->next_avail)[VQ_WORD_FLAGS], __ATOMIC_RELAXED));
}
