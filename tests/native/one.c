/*
 * one.c - see one.h.
 */
#include "one.h"

struct guest guest;
struct driver ring;
struct unit unit;

void one_begin(uint32_t kind, uint32_t flags)
{
	one_begin_with(kind, &(struct guest_options){ .flags = flags }, 0);
}

void one_begin_with(uint32_t kind, const struct guest_options *options, uint64_t features)
{
	guest_open(&guest, options);
	unit_open(&unit, kind, 4096, 2);
	CHECK_EQUAL(guest_route(&guest, 0, unit.medium, VFC_FINISH).result, 0);
	drive_open(&ring, &guest, 2, VFC_RING_REQUEST, 64, features);
}

void one_end(void)
{
	CHECK_EQUAL(drive_stop(&ring, 0).result, 0);
	CHECK_EQUAL(guest_stats(&guest, 0).in_flight, 0);
	drive_close(&ring);
	guest_close(&guest);
	unit_close(&unit);
}
