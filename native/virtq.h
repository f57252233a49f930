/*
 * virtq.h - one virtqueue as the device sees it: split (virtio 1.3, 2.7; virtq.c) or packed (2.8; virtq_packed.c).
 *
 * Whoever uses it knows heads, chains of iovecs and "published", not how the ring is laid out.  A head is what names
 * a buffer while the device has it: the index of its first descriptor in a split ring, its id in a packed one.
 * Everything in a ring is the driver's to change at any time, so each value is loaded once, checked, and then only
 * the copy is used.
 */
#ifndef VFC_VIRTQ_H
#define VFC_VIRTQ_H
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "guestmem.h"

#define VIRTIO_F_INDIRECT_DESC 28
#define VIRTIO_F_EVENT_IDX 29
#define VIRTIO_F_ACCESS_PLATFORM 33
#define VIRTIO_F_RING_PACKED 34

#define VQ_MAX_SIZE 32768	/* virtio 2.7: the largest queue */
#define VQ_MAX_IOV 1024		/* pieces of one chain; also the longest indirect table (UIO_MAXIOV, as QEMU bounds it) */

/* 2.7.5, 2.8.1: flags of a descriptor; the last two in a packed ring only */
#define VQ_DESC_NEXT 1
#define VQ_DESC_WRITE 2
#define VQ_DESC_INDIRECT 4
#define VQ_DESC_AVAIL (1 << 7)
#define VQ_DESC_USED (1 << 15)
/* Split: the two rings as arrays of 16 bits: flags, idx, ring[], event */
#define VQ_RING_FLAGS 0
#define VQ_RING_IDX 1
#define VQ_RING_FIRST 2
/* Packed: a descriptor as 16-bit words: address 0-3, length 4-5, id 6, flags 7; the last four are vq_used_word() */
#define VQ_WORDS 8
#define VQ_WORD_ID 6
#define VQ_WORD_FLAGS 7

/* A worker's use of a memory table; commands in flight count themselves in. */
struct view {
	struct vfc_mem *mem;
	/* Where the last translation ended up; mostly the next one does too. */
	const struct vfc_map *last;
	uint32_t users;
	struct mail *ack;	/* goes out when users is 0; then the view goes too */
	struct view *next;
};

/* Packed: which descriptors a buffer came in, by its id. */
struct vq_place {
	uint16_t first, count;
};

struct vq {
	uint16_t size, mask;
	bool event_idx, indirect, packed;
	uint16_t next_avail;	/* the next entry of the avail ring, or descriptor, that we take */
	uint16_t seen_avail;	/* split: the driver's idx as loaded last */
	uint16_t next_used;	/* where the next used entry goes */
	uint16_t published;	/* next_used as the driver may see it */
	bool avail_wrap, used_wrap;	/* packed: the ring wrap counters, 2.8.1 */
	bool held;		/* packed: the used descriptor at `published` is written last */
	uint64_t held_word;
	struct vq_place *places;	/* packed: size of them */
	volatile uint64_t *desc;
	uint16_t *avail;
	uint16_t *used;
	uint64_t user_desc, user_avail, user_used;	/* to find the parts again in another table */
	struct guard *guards[3];
};

/* What a chain consists of: `readable` iovecs that the device reads, then `writable` ones that it writes. */
struct vq_chain {
	struct iovec *iov;
	uint32_t readable, writable;
	uint64_t read_bytes, write_bytes;
};

/* Sizes and features; -EINVAL: size or alignment, -EOPNOTSUPP: addresses that are not offered. */
int vq_setup(struct vq *vq, uint32_t size, uint64_t features, uint64_t desc, uint64_t avail, uint64_t used);
/* Finds the parts in a table: -EFAULT when one is not in one region. */
int vq_locate(struct vq *vq, const struct vfc_mem *mem);
/*
 * Begins at a position as SET_VRING_BASE gives it.  Split: the avail index; the used index is what memory says.
 * Packed: avail index and wrap counter in bits 0-15, the used ones in 16-31.  -EINVAL: no position in this ring.
 * places: for `size` buffers, all zero; they stay the caller's.  A split ring has no use for them.
 */
int vq_begin(struct vq *vq, uint32_t base, struct vq_place *places);
/* The position for GET_VRING_BASE. */
uint32_t vq_base(const struct vq *vq);
/* A part's file shrank. */
bool vq_torn(const struct vq *vq);

/*
 * 1 and a head, 0: none, -EOVERFLOW: idx jumped further than the ring is long, -EINVAL: a head outside the ring,
 * -ELOOP: a chain longer than the packed ring, -EBUSY: an id that the device has already.
 */
int vq_next(struct vq *vq, uint16_t *ret_head);
/* Up to max heads, and in *ret_error what vq_next() would give after them: 0, an error, or 1 when max is reached. */
unsigned vq_take(struct vq *vq, uint16_t *ret_heads, unsigned max, int *ret_error);
/* Asks the cache for what vq_gather() will look at. */
static inline void vq_prefetch(const struct vq *vq, uint16_t head)
{
	__builtin_prefetch((const void *)(vq->desc + 2 * (size_t)(vq->packed ? vq->places[head].first : head)));
}
/*
 * The chain of a head, in iovecs of `few` entries of `some`, or of `many` where that is too short.
 * -ELOOP: a loop, longer than the ring, next outside it, readable after writable, more than 32 bits of length
 * -EFAULT: an address outside every region, or that wraps
 * -EBADMSG: an indirect table of bad length, within another, not negotiated
 * On error the chain holds what was collected until then.
 */
int vq_gather(const struct vq *vq, struct view *view, uint16_t head, struct iovec *some, uint32_t few,
	      struct iovec *many, struct vq_chain *ret_chain);
/* Queues a used entry; the driver sees it with vq_publish(). */
void vq_push(struct vq *vq, uint16_t head, uint32_t length);
static inline void vq_push_split(struct vq *vq, uint16_t head, uint32_t length)
{
	uint32_t *entry = (uint32_t *)(vq->used + VQ_RING_FIRST) + 2 * (vq->next_used & vq->mask);

	__atomic_store_n(&entry[0], head, __ATOMIC_RELAXED);
	__atomic_store_n(&entry[1], length, __ATOMIC_RELAXED);
	vq->next_used++;
}

static inline uint16_t *vq_words(const struct vq *vq, uint32_t at)
{
	return (uint16_t *)(uintptr_t)vq->desc + VQ_WORDS * (size_t)at;
}

static inline uint64_t *vq_used_word(const struct vq *vq, uint32_t at)
{
	return (uint64_t *)(uintptr_t)vq->desc + 2 * (size_t)at + 1;
}

/*
 * 2.8.8: of a used descriptor length, id and flags count, which are one word.  So its line, which the driver looks at all
 * the time, is written once, and whoever sees the flags sees the rest.
 */
static inline void vq_push_packed(struct vq *vq, uint16_t id, uint32_t length)
{
	uint64_t flags = -(uint64_t)vq->used_wrap & (VQ_DESC_AVAIL | VQ_DESC_USED), word;
	uint32_t at = vq->next_used + vq->places[id].count;

	/* 2.8.12: the flag WRITE says that the length means something. */
	if (length)
		flags |= VQ_DESC_WRITE;
	word = length | (uint64_t)id << 32 | flags << 48;
	if (!vq->held) {
		vq->held = true;
		vq->held_word = word;
	} else {
		/* Release: a driver that has the batch's first one, and reads on, finds data and response there. */
		__atomic_store_n(vq_used_word(vq, vq->next_used), word, __ATOMIC_RELEASE);
	}
	vq->places[id].count = 0;
	if (at >= vq->size) {
		at -= vq->size;
		vq->used_wrap = !vq->used_wrap;
	}
	vq->next_used = (uint16_t)at;
}

/* Whether vq_take() would find something; asks the cache for where. */
static inline bool vq_waiting(const struct vq *vq)
{
	uint16_t flags;

	if (!vq->packed) {
		/* Often another line than the index, and written just before it: both come at once. */
		__builtin_prefetch(vq->avail + VQ_RING_FIRST + (vq->next_avail & vq->mask));
		return __atomic_load_n(&vq->avail[VQ_RING_IDX], __ATOMIC_RELAXED) != vq->next_avail;
	}
	flags = __atomic_load_n(&vq_words(vq, vq->next_avail)[VQ_WORD_FLAGS], __ATOMIC_RELAXED);
	return (flags & (VQ_DESC_AVAIL | VQ_DESC_USED)) == (vq->avail_wrap ? VQ_DESC_AVAIL : VQ_DESC_USED);
}

/* One store of the index; true: the driver wants a signal. */
bool vq_publish(struct vq *vq);

/* The doorbell idiom: suppress, drain, re-arm, (fence), look again: true when something came meanwhile. */
void vq_suppress(struct vq *vq);
bool vq_rearm(struct vq *vq);

#endif
