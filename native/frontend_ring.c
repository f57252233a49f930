/*
 * frontend_ring.c - virtqueues, driver side: see frontend_ring.h.
 *
 * Two fences matter here (virtio 1.3, 2.7.13, 2.7.10, 2.8.20, 2.8.21), each pairs with one in the device:
 *	lane_publish()	what is available, FENCE, the device's wish for a kick - it writes the wish, fences, looks again
 *	lane_arm()	our wish for an interrupt, FENCE, what is used - it writes what is used, fences, looks at the wish
 */
#include <endian.h>
#include <errno.h>
#include <stddef.h>

#include "frontend_ring.h"

/* 2.7.5, 2.8.8 */
#define DESC_NEXT 1
#define DESC_WRITE 2
#define DESC_INDIRECT 4
/* 2.8.1 */
#define DESC_AVAIL (1 << 7)
#define DESC_USED (1 << 15)
/* 2.7.6, 2.7.8 */
#define AVAIL_NO_INTERRUPT 1
#define USED_NO_NOTIFY 1
/* 2.8.14: an event suppression structure's two words */
#define EVENT_PLACE 0
#define EVENT_FLAGS 1
#define EVENT_ENABLE 0
#define EVENT_DISABLE 1
#define EVENT_DESC 2
#define EVENT_MASK 3
#define WRAP_BIT 15
#define PLACE_MASK 0x7fff

void vfd_fence(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static uint16_t load16(const uint16_t *from)
{
	return le16toh(__atomic_load_n(from, __ATOMIC_ACQUIRE));
}

static void store16(uint16_t *to, uint16_t value)
{
	__atomic_store_n(to, htole16(value), __ATOMIC_RELEASE);
}

static bool is_packed(const struct lane *lane)
{
	return lane->ring->flags & VFD_PACKED;
}

static bool is_indirect(const struct lane *lane)
{
	return lane->ring->flags & VFD_INDIRECT;
}

static bool has_event_idx(const struct lane *lane)
{
	return lane->ring->flags & VFD_EVENT_IDX;
}

static uint16_t *avail16(const struct lane *lane, uint32_t index)
{
	return (uint16_t *)lane->ring->avail + index;
}

static uint16_t *used16(const struct lane *lane, uint32_t index)
{
	return (uint16_t *)lane->ring->used + index;
}

static struct vfd_desc *desc_at(const struct lane *lane, uint32_t index)
{
	return (struct vfd_desc *)lane->ring->desc + index;
}

int lane_begin(struct lane *lane, struct vfd_ring *ring, uint32_t pieces)
{
	bool packed = ring->flags & VFD_PACKED;

	if (!ring->size || ring->size > 32768 || (!packed && ring->size & (ring->size - 1)))
		return -EINVAL;
	*lane = (struct lane){ .ring = ring, .pieces = pieces, .step = ring->flags & VFD_INDIRECT ? 1 : pieces };
	lane->avail = ring->avail_index;
	lane->used = ring->used_index;
	if (packed) {
		lane->avail_wrap = lane->avail >> WRAP_BIT;
		lane->used_wrap = lane->used >> WRAP_BIT;
		lane->avail &= PLACE_MASK;
		lane->used &= PLACE_MASK;
		if (lane->avail >= ring->size || lane->used >= ring->size)
			return -EINVAL;
	}
	lane->published = lane->avail;
	lane->seen = lane->used;
	return 0;
}

void lane_end(struct lane *lane)
{
	lane->ring->avail_index = lane->avail | (uint16_t)(lane->avail_wrap << WRAP_BIT);
	lane->ring->used_index = lane->used | (uint16_t)(lane->used_wrap << WRAP_BIT);
}

static void advance(const struct lane *lane, uint16_t *place, bool *wrap, uint32_t by)
{
	uint32_t at = *place + by;

	if (at >= lane->ring->size) {
		at -= lane->ring->size;
		*wrap = !*wrap;
	}
	*place = (uint16_t)at;
}

/* ---------------------------------------------------------------- offering */

static uint16_t piece_flags(const struct lane *lane, const struct piece *chain, uint32_t n)
{
	return (chain[n].write ? DESC_WRITE : 0) | (n + 1 < lane->pieces ? DESC_NEXT : 0);
}

/* `first`: the index of to[0], which the chain's links count from. */
static void put_split(const struct lane *lane, struct vfd_desc *to, const struct piece *chain, uint32_t first)
{
	uint32_t n;

	for (n = 0; n < lane->pieces; n++)
		to[n] = (struct vfd_desc){
			htole64(chain[n].addr), htole32(chain[n].len), htole16(piece_flags(lane, chain, n)),
			htole16((uint16_t)(n + 1 < lane->pieces ? first + n + 1 : 0)),
		};
}

/* 2.8.7: a table's descriptors stand in order; NEXT and the id mean nothing there. */
static void put_table(const struct lane *lane, struct vfd_desc *to, const struct piece *chain)
{
	uint32_t n;

	for (n = 0; n < lane->pieces; n++)
		to[n] = (struct vfd_desc){
			htole64(chain[n].addr), htole32(chain[n].len), 0, htole16(chain[n].write ? DESC_WRITE : 0),
		};
}

static void offer_split(struct lane *lane, uint32_t slot, const struct piece *chain, struct vfd_desc *table,
			uint64_t table_gpa, bool fresh)
{
	uint32_t head = slot * lane->step;

	if (fresh && is_indirect(lane)) {
		*desc_at(lane, head) = (struct vfd_desc){
			htole64(table_gpa), htole32(lane->pieces * (uint32_t)sizeof(*table)), htole16(DESC_INDIRECT), 0,
		};
		put_split(lane, table, chain, 0);
	} else if (fresh) {
		put_split(lane, desc_at(lane, head), chain, head);
	}
	*avail16(lane, 2 + (lane->avail & (lane->ring->size - 1))) = htole16((uint16_t)head);
	lane->avail++;
}

/* The next descriptor of the ring; that of a batch's first is made available by lane_publish(). */
static void put_packed(struct lane *lane, uint64_t addr, uint32_t len, uint32_t id, uint16_t flags)
{
	struct vfd_desc *to = desc_at(lane, lane->avail);

	flags |= lane->avail_wrap ? DESC_AVAIL : DESC_USED;
	to->addr = htole64(addr);
	to->len = htole32(len);
	to->third = htole16((uint16_t)id);
	if (lane->held) {
		store16(&to->fourth, flags);
	} else {
		lane->held = to;
		lane->held_flags = flags;
	}
	advance(lane, &lane->avail, &lane->avail_wrap, 1);
	lane->added++;
}

static void offer_packed(struct lane *lane, uint32_t slot, const struct piece *chain, struct vfd_desc *table,
			 uint64_t table_gpa, bool fresh)
{
	uint32_t n;

	if (is_indirect(lane)) {
		if (fresh)
			put_table(lane, table, chain);
		put_packed(lane, table_gpa, lane->pieces * (uint32_t)sizeof(*table), slot, DESC_INDIRECT);
		return;
	}
	for (n = 0; n < lane->pieces; n++)
		put_packed(lane, chain[n].addr, chain[n].len, slot, piece_flags(lane, chain, n));
}

void lane_offer(struct lane *lane, uint32_t slot, const struct piece *chain, struct vfd_desc *table,
		uint64_t table_gpa, bool fresh)
{
	if (is_packed(lane))
		offer_packed(lane, slot, chain, table, table_gpa, fresh);
	else
		offer_split(lane, slot, chain, table, table_gpa, fresh);
	lane->out++;
}

static bool publish_split(struct lane *lane)
{
	uint16_t old = lane->published, new = lane->avail;

	if (old == new)
		return false;
	store16(avail16(lane, 1), new);
	lane->published = new;
	vfd_fence();
	if (has_event_idx(lane))
		return (uint16_t)(new - load16(used16(lane, 2 + lane->ring->size * 4)) - 1) < (uint16_t)(new - old);
	return !(load16(used16(lane, 0)) & USED_NO_NOTIFY);
}

static bool publish_packed(struct lane *lane)
{
	uint16_t flags, place, added = lane->added;
	int event;

	if (!lane->held)
		return false;
	store16(&lane->held->fourth, lane->held_flags);
	lane->held = NULL;
	lane->added = 0;
	vfd_fence();
	flags = load16(used16(lane, EVENT_FLAGS)) & EVENT_MASK;
	if (flags != EVENT_DESC || !has_event_idx(lane))
		return flags != EVENT_DISABLE;
	place = load16(used16(lane, EVENT_PLACE));
	event = place & PLACE_MASK;
	if (place >> WRAP_BIT != lane->avail_wrap)	/* of the round before */
		event -= (int)lane->ring->size;
	return (uint16_t)(lane->avail - event - 1) < added;
}

bool lane_publish(struct lane *lane)
{
	return is_packed(lane) ? publish_packed(lane) : publish_split(lane);
}

/* ---------------------------------------------------------------- what comes back */

static int next_split(struct lane *lane, uint32_t *ret_slot, uint32_t *ret_length)
{
	const uint32_t *entry;
	uint32_t head;

	if (lane->seen == lane->used) {
		/* Often another line than the index, and written just before it: both come at once. */
		__builtin_prefetch(lane->ring->used + 4 + 8 * (size_t)(lane->used & (lane->ring->size - 1)));
		lane->seen = load16(used16(lane, 1));
		if (lane->seen == lane->used)
			return 0;
		if ((uint16_t)(lane->seen - lane->used) > lane->out) {
			*ret_slot = lane->seen;
			*ret_length = (uint16_t)(lane->seen - lane->used);
			return -EPROTO;
		}
	}
	entry = (const uint32_t *)(lane->ring->used + 4) + 2 * (lane->used & (lane->ring->size - 1));
	head = le32toh(entry[0]);
	*ret_length = le32toh(entry[1]);
	if (head % lane->step) {
		*ret_slot = head;
		return -EPROTO;
	}
	*ret_slot = head / lane->step;
	lane->used++;
	return 1;
}

/* Length, id and flags, as the device may have written them: in one piece or, the flags last, in several. */
static bool is_used(const struct lane *lane, uint64_t *ret_word)
{
	const uint64_t *at = (const uint64_t *)(const void *)&desc_at(lane, lane->used)->len;
	uint64_t word = le64toh(__atomic_load_n(at, __ATOMIC_ACQUIRE)), flags = word >> 48;

	*ret_word = word;
	return !!(flags & DESC_AVAIL) == lane->used_wrap && !!(flags & DESC_USED) == lane->used_wrap;
}

static int next_packed(struct lane *lane, uint32_t *ret_slot, uint32_t *ret_length)
{
	uint64_t word;

	if (!lane->out || !is_used(lane, &word))
		return 0;
	*ret_slot = (uint16_t)(word >> 32);
	*ret_length = (uint32_t)word;
	advance(lane, &lane->used, &lane->used_wrap, lane->step);
	return 1;
}

int lane_next(struct lane *lane, uint32_t *ret_slot, uint32_t *ret_length)
{
	int found = is_packed(lane) ? next_packed(lane, ret_slot, ret_length) : next_split(lane, ret_slot, ret_length);

	if (found > 0)
		lane->out--;
	return found;
}

void lane_hush(struct lane *lane)
{
	lane->hushed = lane->used - 1;	/* an index that has passed */
	if (is_packed(lane))
		store16(avail16(lane, EVENT_FLAGS), EVENT_DISABLE);
	else if (has_event_idx(lane))
		store16(avail16(lane, 2 + lane->ring->size), lane->hushed);
	else
		store16(avail16(lane, 0), AVAIL_NO_INTERRUPT);
}

bool lane_arm(struct lane *lane)
{
	uint64_t word;

	if (is_packed(lane)) {
		store16(avail16(lane, EVENT_PLACE), lane->used | (uint16_t)(lane->used_wrap << WRAP_BIT));
		store16(avail16(lane, EVENT_FLAGS), has_event_idx(lane) ? EVENT_DESC : EVENT_ENABLE);
	} else if (has_event_idx(lane)) {
		store16(avail16(lane, 2 + lane->ring->size), lane->used);
	} else {
		store16(avail16(lane, 0), 0);
	}
	vfd_fence();
	return is_packed(lane) ? !is_used(lane, &word) : load16(used16(lane, 1)) == lane->used;
}
