/*
 * frontend_null.c - the other end of a load's ring with nothing behind it, and the copy that a unit in memory cannot
 * avoid: what figures of a back end are to be seen against.  See frontend.h.
 *
 * A device that is as short as the standard allows (virtio 1.3, 2.7, 2.8): it believes all that it reads, for both
 * sides are ours.
 */
#include <endian.h>
#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <time.h>

#include "frontend_ring.h"

#define DESC_NEXT 1
#define DESC_WRITE 2
#define DESC_INDIRECT 4
#define DESC_AVAIL (1 << 7)
#define DESC_USED (1 << 15)
#define USED_NO_NOTIFY 1
#define EVENT_DISABLE 1
#define RESPONSE_SENSE 12	/* bytes of a response that ended well */

static struct vfd_desc *desc_at(const struct null *n, uint32_t index)
{
	return (struct vfd_desc *)n->ring->desc + index;
}

static uint16_t *word(uint8_t *base, uint32_t index)
{
	return (uint16_t *)base + index;
}

static uint16_t load16(const uint16_t *from)
{
	return le16toh(__atomic_load_n(from, __ATOMIC_ACQUIRE));
}

static void store16(uint16_t *to, uint16_t value)
{
	__atomic_store_n(to, htole16(value), __ATOMIC_RELEASE);
}

static uint16_t flags_of(const struct null *n, const struct vfd_desc *desc)
{
	return load16(n->packed ? &desc->fourth : &desc->third);
}

/* Answer a chain with GOOD; how many bytes are said to be written.  ret_count: descriptors that it took in the ring. */
static uint32_t answer(const struct null *n, uint32_t head, uint32_t *ret_count)
{
	const struct vfd_desc *desc = desc_at(n, head), *table = NULL;
	uint32_t written = 0, left = UINT32_MAX, at = head;
	uint16_t flags = flags_of(n, desc);

	*ret_count = 1;
	if (flags & DESC_INDIRECT) {
		table = (const struct vfd_desc *)(n->ring->arena + (le64toh(desc->addr) - n->ring->arena_gpa));
		left = le32toh(desc->len) / (uint32_t)sizeof(*table);
		desc = table;
	}
	for (;;) {
		flags = flags_of(n, desc);
		if (flags & DESC_WRITE) {
			if (!written)	/* the response comes first of what is writable */
				memset(n->ring->arena + (le64toh(desc->addr) - n->ring->arena_gpa), 0, RESPONSE_SENSE);
			written += le32toh(desc->len);
		}
		if (table ? !--left : !(flags & DESC_NEXT))
			return written;
		if (table) {
			desc++;
			continue;
		}
		at = n->packed ? (at + 1 == n->ring->size ? 0 : at + 1) : le16toh(desc->fourth);
		desc = desc_at(n, at);
		++*ret_count;
	}
}

/* Ask for one at an index that has passed. */
static void no_kicks(const struct null *n)
{
	if (n->ring->flags & VFD_EVENT_IDX)
		store16(word(n->ring->used, 2 + n->ring->size * 4), n->next - 1);
	else
		store16(word(n->ring->used, 0), USED_NO_NOTIFY);
}

static void serve_split(struct null *n)
{
	uint16_t idx = load16(word(n->ring->avail, 1));
	uint32_t count, mask = n->ring->size - 1;

	while (n->next != idx) {
		uint16_t head = le16toh(*word(n->ring->avail, 2 + (n->next++ & mask)));
		uint32_t *entry = (uint32_t *)(n->ring->used + 4) + 2 * (n->used & mask);

		entry[1] = htole32(answer(n, head, &count));
		entry[0] = htole32(head);
		n->used++;
	}
	store16(word(n->ring->used, 1), n->used);
	no_kicks(n);
}

static void step(const struct null *n, uint16_t *at, bool *wrap, uint32_t by)
{
	uint32_t next = *at + by;

	if (next >= n->ring->size) {
		next -= n->ring->size;
		*wrap = !*wrap;
	}
	*at = (uint16_t)next;
}

static void serve_packed(struct null *n)
{
	for (;;) {
		struct vfd_desc *desc = desc_at(n, n->next), *used;
		uint16_t flags = load16(&desc->fourth), id;
		uint32_t written, last, count;

		if (!!(flags & DESC_AVAIL) != n->wrap || !!(flags & DESC_USED) == n->wrap)
			return;
		written = answer(n, n->next, &count);
		last = n->next + count - 1;
		id = desc_at(n, last >= n->ring->size ? last - n->ring->size : last)->third;
		used = desc_at(n, n->used);
		used->third = id;
		used->len = htole32(written);
		store16(&used->fourth, (n->used_wrap ? DESC_AVAIL | DESC_USED : 0) | DESC_WRITE);
		step(n, &n->next, &n->wrap, count);
		step(n, &n->used, &n->used_wrap, count);
	}
}

void null_begin(struct null *n, const struct lane *lane)
{
	*n = (struct null){
		.ring = lane->ring, .packed = lane->ring->flags & VFD_PACKED, .next = lane->avail, .used = lane->used,
		.wrap = lane->avail_wrap, .used_wrap = lane->used_wrap,
	};
	if (n->packed)
		store16(word(n->ring->used, 1), EVENT_DISABLE);
	else
		no_kicks(n);
}

void null_serve(struct null *n)
{
	if (n->packed)
		serve_packed(n);
	else
		serve_split(n);
}

uint64_t vfd_copy(uint8_t *to, uint64_t to_size, const uint8_t *from, uint64_t from_size, uint64_t bytes, uint64_t count,
		  uint64_t seed)
{
	uint64_t slots = to_size / bytes, places = from_size / bytes, i;
	struct timespec begin, end;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
	for (i = 0; i < count; i++) {
		uint64_t z = seed += 0x9e3779b97f4a7c15u;

		z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
		z ^= z >> 27;
		memcpy(to + i % slots * bytes, from + z % places * bytes, bytes);
		__asm__ volatile("" ::: "memory");
	}
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
	return (uint64_t)(end.tv_sec - begin.tv_sec) * 1000000000u + (uint64_t)end.tv_nsec - (uint64_t)begin.tv_nsec;
}
