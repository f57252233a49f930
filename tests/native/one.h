/*
 * one.h - what most tests begin with: one guest, a unit of 4096 blocks that its worker 0 has a route to, and a ring.
 */
#ifndef ONE_H
#define ONE_H
#include "harness.h"

extern struct guest guest;
extern struct driver ring;	/* request ring 2, of 64 */
extern struct unit unit;

/* Flags: the engine's. */
void one_begin(uint32_t kind, uint32_t flags);
void one_begin_with(uint32_t kind, const struct guest_options *options, uint64_t features);
/* Nothing is in flight any more. */
void one_end(void);

#endif
