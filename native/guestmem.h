/*
 * guestmem.h - guest memory: mapped regions, tables of them, translation, and pages that vanish.
 */
#ifndef VFC_GUESTMEM_H
#define VFC_GUESTMEM_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vhostfc.h"

/*
 * A guard lets a mapping survive that its file shrinks: SIGBUS in it puts a page of zeros there and marks the
 * guard torn, for good.  Whoever read the mapping asks guard_torn() afterwards and disbelieves what it read.
 */
struct guard;

int guard_add(void *start, size_t length, size_t page, struct guard **ret_guard);
void guard_drop(struct guard *guard);
bool guard_torn(const struct guard *guard);

/* Pages torn in this process so far: while it is 0 nobody need ask for single guards. */
extern _Atomic uint32_t guard_tears;

static inline bool guard_any_torn(void)
{
	return atomic_load_explicit(&guard_tears, memory_order_relaxed) != 0;
}

struct vfc_map {
	_Atomic uint32_t holds;
	uint64_t gpa, size, uaddr;
	uint8_t *host;		/* where gpa is */
	void *start;		/* what mmap gave: page aligned, so it may begin before host */
	size_t length;
	struct guard *guard;
};

struct vfc_mem {
	_Atomic uint32_t holds;
	uint32_t count;
	struct vfc_map *maps[];	/* by gpa */
};

struct vfc_mem *mem_hold(struct vfc_mem *mem);
/* The region that holds this guest physical address, or NULL. */
const struct vfc_map *mem_find(const struct vfc_mem *mem, uint64_t gpa);
/* The host address of a user address range that lies in one region, or NULL; *ret_map tells which. */
void *mem_user(const struct vfc_mem *mem, uint64_t uaddr, uint64_t size, const struct vfc_map **ret_map);
/* The region that a translated pointer lies in. */
const struct vfc_map *mem_of_host(const struct vfc_mem *mem, const void *host);
bool mem_has(const struct vfc_mem *mem, const struct vfc_map *map);

#endif
