/*
 * frontend_ring.h - the driver's side of a virtqueue whose chains all have the same number of descriptors: split
 * (virtio 1.3, 2.7) or packed (2.8).  What frontend.c loads; it knows slots, not how the ring is laid out.
 */
#ifndef VHOSTFC_FRONTEND_RING_H
#define VHOSTFC_FRONTEND_RING_H
#include <stdbool.h>

#include "frontend.h"

/* A descriptor's 16 bytes.  Split: flags, next; packed: id, flags. */
struct vfd_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t third, fourth;
};

/* A piece of a chain: guest physical address, bytes, and whether the device writes it. */
struct piece {
	uint64_t addr;
	uint32_t len;
	bool write;
};

/* A ring while it is driven. */
struct lane {
	struct vfd_ring *ring;
	uint32_t pieces;	/* of each chain */
	uint32_t step;		/* descriptors that a chain takes in the ring */
	uint32_t out;		/* chains that the device has */
	uint16_t avail, used;	/* split: free running; packed: the next descriptor's index */
	uint16_t published;	/* split: avail idx as the device sees it */
	uint16_t hushed;	/* split: used_event, where that says no interrupts */
	uint16_t seen;		/* split: used idx as loaded last */
	bool avail_wrap, used_wrap;	/* packed */
	struct vfd_desc *held;	/* packed: a batch's first descriptor, whose flags are written last */
	uint16_t held_flags;
	uint16_t added;		/* packed: descriptors since the last publish */
};

/* -EINVAL: no such ring, or an index outside it. */
int lane_begin(struct lane *lane, struct vfd_ring *ring, uint32_t pieces);
/* The indices go back into the ring. */
void lane_end(struct lane *lane);

/*
 * Offer a slot's chain; lane_publish() shows it.  table: room for it where the ring is indirect, table_gpa: where the
 * device finds that.  fresh: the slot's chain is not the one of last time.
 */
void lane_offer(struct lane *lane, uint32_t slot, const struct piece *chain, struct vfd_desc *table,
		uint64_t table_gpa, bool fresh);
/* True: the device wants a kick. */
bool lane_publish(struct lane *lane);

/* 1 and a slot, 0: nothing, -EPROTO: not a chain that the device has; what it said is in the two values. */
int lane_next(struct lane *lane, uint32_t *ret_slot, uint32_t *ret_length);

/* No interrupts. */
void lane_hush(struct lane *lane);
/* Now and then after that: an index that has passed must not come round in 2^16. */
static inline void lane_stay_hushed(struct lane *lane)
{
	if ((uint16_t)(lane->used - lane->hushed) > 1 << 14)
		lane_hush(lane);
}
/* An interrupt at the next used chain; false: there is one already. */
bool lane_arm(struct lane *lane);

/* ---------------------------------------------------------------- frontend_null.c */

/* The other side of a ring, in the same thread's hands. */
struct null {
	const struct vfd_ring *ring;
	bool packed;
	uint16_t next, used;	/* split: free running; packed: descriptors */
	bool wrap, used_wrap;
};

/* Take over from the lane's indices; nothing is in flight. */
void null_begin(struct null *null, const struct lane *lane);
/* Answer all that is there. */
void null_serve(struct null *null);

#endif
