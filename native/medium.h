/*
 * medium.h - a unit's blocks as one process sees them.
 */
#ifndef VFC_MEDIUM_H
#define VFC_MEDIUM_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "guestmem.h"
#include "vhostfc.h"

struct vfc_medium {
	_Atomic uint32_t holds;
	uint32_t kind;		/* enum vfc_medium_kind */
	uint32_t owner;
	uint32_t block_size;
	uint32_t block_shift;
	bool writable;		/* MEMORY: whether the fd allowed it */
	int fd;			/* FILE, DIRECT; else -1 */
	uint64_t blocks;
	uint64_t bytes;
	uint64_t losses;	/* of which the nexus knows; see vhostfc.h */
	uint8_t *memory;	/* MEMORY */
	struct guard *guard;	/* MEMORY */
	struct vfc_latch *latch;	/* all but NULL and SG */
	struct sg_unit *sg;	/* SG */
};

struct vfc_medium *medium_hold(struct vfc_medium *medium);

/* Whether something may have been lost that the nexus has not heard of. */
static inline bool medium_in_doubt(const struct vfc_medium *medium)
{
	return medium->latch && vfc_latch_losses(medium->latch) != medium->losses;
}

#endif
