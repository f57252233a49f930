/*
 * frontend_table.h - tagged blocks and what is known of their generations (frontend.h's
 * verification), apart from the ring that moves them.
 */
#ifndef VHOSTFC_FRONTEND_TABLE_H
#define VHOSTFC_FRONTEND_TABLE_H
#include <stdbool.h>

#include "frontend.h"

bool vfd_table_covers(const struct vfd_table *table, uint64_t lba, uint64_t blocks);

/*
 * Take the right to write these blocks; generations[] gets what to tag them with.
 * False, and nothing taken, when another write of ours to one of them is in flight.
 */
bool vfd_table_claim(struct vfd_table *table, uint64_t lba, uint32_t blocks, uint32_t *ret_generations);
/* Give it back.  Only of a write that succeeded is it known that it is there. */
void vfd_table_settle(struct vfd_table *table, uint64_t lba, uint32_t blocks, bool written);
/* The generations that a read submitted from now on must at least see. */
void vfd_table_low(const struct vfd_table *table, uint64_t lba, uint32_t blocks, uint32_t *ret_low);

/* Fill a block with its tag. */
void vfd_tag_fill(uint8_t *block, uint32_t size, const struct vfd_tag *tag);

/* What a block that was read turned out to be. */
struct vfd_finding {
	enum vfd_kind kind;	/* VFD_OK or what is wrong */
	bool known;		/* it carried a tag of this run */
	uint32_t high;		/* the newest generation that it might have had */
	struct vfd_tag found;
};

/* Check a block against its identity and its generations; what was seen raises the table's low end. */
void vfd_table_check(struct vfd_table *table, const struct vfd_job *job, uint64_t lba, const uint8_t *block,
		     uint32_t low, struct vfd_finding *ret_finding);

#endif
