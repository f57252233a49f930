/*
 * virtq.c - virtqueues, device side: chains of both layouts, and split rings (virtio 1.3, 2.7).  Little endian, which
 * is also what legacy drivers on the machines that we run on use.
 */
#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "virtq_packed.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rings are read without swapping");

/* 2.7.6, 2.7.8: flags of the two rings, only without EVENT_IDX */
#define AVAIL_NO_INTERRUPT 1
#define USED_NO_NOTIFY 1

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next;
};

static inline uint16_t load(const uint16_t *at)
{
	return __atomic_load_n(at, __ATOMIC_RELAXED);
}

static inline void store(uint16_t *at, uint16_t value)
{
	__atomic_store_n(at, value, __ATOMIC_RELAXED);
}

/* avail: behind ring[size]; used: behind ring[size] of 8 bytes each */
static inline uint16_t *used_event(const struct vq *vq)
{
	return vq->avail + VQ_RING_FIRST + vq->size;
}

static inline uint16_t *avail_event(const struct vq *vq)
{
	return vq->used + VQ_RING_FIRST + 4 * vq->size;
}

int vq_setup(struct vq *vq, uint32_t size, uint64_t features, uint64_t desc, uint64_t avail, uint64_t used)
{
	bool packed = features >> VIRTIO_F_RING_PACKED & 1;

	if (features & 1ull << VIRTIO_F_ACCESS_PLATFORM)
		return -EOPNOTSUPP;
	/* 2.7, 2.8.10.1: only a packed ring's size need not be a power of two */
	if (!size || size > VQ_MAX_SIZE || (!packed && (size & (size - 1))))
		return -EINVAL;
	/* 2.7: alignment 16, 2, 4; 2.8: 16, 4, 4 */
	if (desc % 16 || avail % (packed ? 4 : 2) || used % 4)
		return -EINVAL;
	memset(vq, 0, sizeof(*vq));
	vq->packed = packed;
	vq->size = (uint16_t)size;
	vq->mask = (uint16_t)(size - 1);
	vq->event_idx = features >> VIRTIO_F_EVENT_IDX & 1;
	vq->indirect = features >> VIRTIO_F_INDIRECT_DESC & 1;
	vq->user_desc = desc;
	vq->user_avail = avail;
	vq->user_used = used;
	return 0;
}

int vq_locate(struct vq *vq, const struct vfc_mem *mem)
{
	const struct vfc_map *desc_map, *avail_map, *used_map;
	void *desc, *avail, *used;

	desc = mem_user(mem, vq->user_desc, 16ull * vq->size, &desc_map);
	avail = mem_user(mem, vq->user_avail, vq->packed ? EVENT_BYTES : 6 + 2ull * vq->size, &avail_map);
	used = mem_user(mem, vq->user_used, vq->packed ? EVENT_BYTES : 6 + 8ull * vq->size, &used_map);
	if (!desc || !avail || !used)
		return -EFAULT;
	/* A region that begins at an odd offset of its file moves what was aligned. */
	if ((uintptr_t)desc % 16 || (uintptr_t)avail % (vq->packed ? 4 : 2) || (uintptr_t)used % 4)
		return -EFAULT;
	vq->desc = desc;
	vq->avail = avail;
	vq->used = used;
	vq->guards[0] = desc_map->guard;
	vq->guards[1] = avail_map->guard;
	vq->guards[2] = used_map->guard;
	return 0;
}

int vq_begin(struct vq *vq, uint32_t base, struct vq_place *places)
{
	if (vq->packed)
		return packed_begin(vq, base, places);
	if (base > UINT16_MAX)
		return -EINVAL;
	vq->next_avail = vq->seen_avail = (uint16_t)base;
	vq->next_used = vq->published = load(&vq->used[VQ_RING_IDX]);
	return 0;
}

uint32_t vq_base(const struct vq *vq)
{
	return vq->packed ? packed_base(vq) : vq->next_avail;
}

bool vq_torn(const struct vq *vq)
{
	return guard_torn(vq->guards[0]) || guard_torn(vq->guards[1]) || guard_torn(vq->guards[2]);
}

static inline int split_next(struct vq *vq, uint16_t *ret_head)
{
	uint16_t head;

	if (vq->seen_avail == vq->next_avail) {
		/* Acquire pairs with the driver's barrier between writing ring[] and descriptors and writing idx. */
		uint16_t idx = __atomic_load_n(&vq->avail[VQ_RING_IDX], __ATOMIC_ACQUIRE);

		if ((uint16_t)(idx - vq->next_avail) > vq->size)
			return -EOVERFLOW;
		vq->seen_avail = idx;
		if (idx == vq->next_avail)
			return 0;
	}
	head = load(&vq->avail[VQ_RING_FIRST + (vq->next_avail & vq->mask)]);
	if (head >= vq->size)
		return -EINVAL;
	vq->next_avail++;
	*ret_head = head;
	return 1;
}

int vq_next(struct vq *vq, uint16_t *ret_head)
{
	return vq->packed ? packed_next(vq, ret_head) : split_next(vq, ret_head);
}

unsigned vq_take(struct vq *vq, uint16_t *ret_heads, unsigned max, int *ret_error)
{
	unsigned count = 0;

	if (vq->packed)
		return packed_take(vq, ret_heads, max, ret_error);
	*ret_error = 1;
	while (count < max) {
		*ret_error = split_next(vq, &ret_heads[count]);
		if (*ret_error <= 0)
			break;
		count++;
	}
	return count;
}

/* ---------------------------------------------------------------- chains */

/* Two loads and no more: what is checked is what is used. */
static inline struct desc load_desc(volatile uint64_t *at)
{
	uint64_t addr = at[0], rest = at[1];

	return (struct desc){ addr, (uint32_t)rest, (uint16_t)(rest >> 32), (uint16_t)(rest >> 48) };
}

/* In a packed ring the last two fields of a descriptor stand the other way round. */
static inline struct desc load_packed(volatile uint64_t *at)
{
	uint64_t addr = at[0], rest = at[1];

	return (struct desc){ addr, (uint32_t)rest, (uint16_t)(rest >> 48), (uint16_t)(rest >> 32) };
}

static inline const struct vfc_map *find(struct view *view, uint64_t gpa)
{
	const struct vfc_map *map = view->last;

	if (map && gpa - map->gpa < map->size)
		return map;
	map = mem_find(view->mem, gpa);
	if (map)
		view->last = map;
	return map;
}

/* A descriptor of an indirect table that may lie across regions at any alignment. */
static int fetch_desc(struct view *view, uint64_t gpa, bool packed, struct desc *ret_desc)
{
	uint64_t words[2];
	size_t done = 0;

	while (done < sizeof(words)) {
		const struct vfc_map *map = find(view, gpa + done);
		uint64_t offset, piece;

		if (!map)
			return -EFAULT;
		offset = gpa + done - map->gpa;
		piece = map->size - offset;
		if (piece > sizeof(words) - done)
			piece = sizeof(words) - done;
		for (uint64_t i = 0; i < piece; i++)
			((uint8_t *)words)[done + i] = *(volatile uint8_t *)(map->host + offset + i);
		done += piece;
	}
	*ret_desc = packed ? load_packed(words) : load_desc(words);
	return 0;
}

struct gathering {
	struct view *view;
	struct vq_chain *chain;
	struct iovec *many;
	uint32_t room;
};

static int add(struct gathering *g, const struct desc *desc)
{
	struct vq_chain *chain = g->chain;
	uint64_t gpa = desc->addr, left = desc->len, last;
	bool write = desc->flags & VQ_DESC_WRITE;

	if (!write && chain->writable)
		return -ELOOP;
	if (!left)
		return 0;
	if (__builtin_add_overflow(gpa, left - 1, &last))
		return -EFAULT;
	/* A used entry's length has 32 bits, so no direction can have more. */
	if ((write ? chain->write_bytes : chain->read_bytes) + left > UINT32_MAX)
		return -ELOOP;
	while (left) {
		const struct vfc_map *map = find(g->view, gpa);
		uint32_t at = chain->readable + chain->writable;
		uint64_t offset, piece;

		if (!map)
			return -EFAULT;
		offset = gpa - map->gpa;
		piece = map->size - offset;
		if (piece > left)
			piece = left;
		if (at == g->room) {
			if (g->room == VQ_MAX_IOV)
				return -ELOOP;
			memcpy(g->many, chain->iov, at * sizeof(*chain->iov));
			chain->iov = g->many;
			g->room = VQ_MAX_IOV;
		}
		chain->iov[at].iov_base = map->host + offset;
		chain->iov[at].iov_len = piece;
		if (write) {
			chain->writable++;
			chain->write_bytes += piece;
		} else {
			chain->readable++;
			chain->read_bytes += piece;
		}
		gpa += piece;
		left -= piece;
	}
	return 0;
}

/* 2.7.5.3 Indirect Descriptors; 2.8.7: a packed ring's tables are read from front to back, NEXT says nothing */
static int add_table(struct gathering *g, const struct desc *table, bool packed)
{
	uint32_t count = table->len / sizeof(struct desc), index = 0;
	volatile uint64_t *direct = NULL;
	const struct vfc_map *map;
	uint64_t last;

	if (!table->len || table->len % sizeof(struct desc) || count > VQ_MAX_IOV || table->flags & VQ_DESC_NEXT)
		return -EBADMSG;
	if (__builtin_add_overflow(table->addr, (uint64_t)table->len - 1, &last))
		return -EFAULT;
	map = find(g->view, table->addr);
	if (!map)
		return -EFAULT;
	if (table->len <= map->size - (table->addr - map->gpa) &&
	    (uintptr_t)(map->host + (table->addr - map->gpa)) % sizeof(uint64_t) == 0)
		direct = (volatile uint64_t *)(map->host + (table->addr - map->gpa));
	for (uint32_t steps = 0; steps < count; steps++) {
		struct desc desc;
		int error;

		if (direct) {
			desc = packed ? load_packed(direct + 2 * (size_t)index) : load_desc(direct + 2 * (size_t)index);
		} else {
			error = fetch_desc(g->view, table->addr + sizeof(desc) * (uint64_t)index, packed, &desc);
			if (error)
				return error;
		}
		if (desc.flags & VQ_DESC_INDIRECT)
			return -EBADMSG;
		error = add(g, &desc);
		if (error)
			return error;
		if (packed) {
			index++;
			continue;
		}
		if (!(desc.flags & VQ_DESC_NEXT))
			return 0;
		index = desc.next;
		if (index >= count)
			return -ELOOP;
	}
	return packed ? 0 : -ELOOP;
}

/* The descriptors that packed_next() has counted; what their flags say about NEXT by now does not matter. */
static int gather_packed(const struct vq *vq, struct gathering *g, struct vq_place place)
{
	uint32_t index = place.first;

	for (uint32_t steps = 0; steps < place.count; steps++) {
		struct desc desc = load_packed(vq->desc + 2 * (size_t)index);
		int error;

		if (desc.flags & VQ_DESC_INDIRECT)
			error = vq->indirect && place.count == 1 ? add_table(g, &desc, true) : -EBADMSG;
		else
			error = add(g, &desc);
		if (error)
			return error;
		if (++index == vq->size)
			index = 0;
	}
	return 0;
}

int vq_gather(const struct vq *vq, struct view *view, uint16_t head, struct iovec *some, uint32_t few,
	      struct iovec *many, struct vq_chain *ret_chain)
{
	struct gathering g = { view, ret_chain, many, few };
	uint16_t index = head;

	ret_chain->iov = some;
	ret_chain->readable = ret_chain->writable = 0;
	ret_chain->read_bytes = ret_chain->write_bytes = 0;
	if (vq->packed)
		return gather_packed(vq, &g, vq->places[head]);
	for (uint32_t steps = 0; steps < vq->size; steps++) {
		struct desc desc = load_desc(vq->desc + 2 * (size_t)index);
		int error;

		if (desc.flags & VQ_DESC_INDIRECT)
			return vq->indirect ? add_table(&g, &desc, false) : -EBADMSG;
		error = add(&g, &desc);
		if (error)
			return error;
		if (!(desc.flags & VQ_DESC_NEXT))
			return 0;
		index = desc.next;
		if (index >= vq->size)
			return -ELOOP;
	}
	return -ELOOP;
}

/* ---------------------------------------------------------------- used entries, notifications */

void vq_push(struct vq *vq, uint16_t head, uint32_t length)
{
	if (vq->packed)
		vq_push_packed(vq, head, length);
	else
		vq_push_split(vq, head, length);
}

bool vq_publish(struct vq *vq)
{
	uint16_t old = vq->published, new = vq->next_used;

	if (vq->packed)
		return packed_publish(vq);
	if (old == new)
		return false;
	/* Release pairs with the driver's acquire of idx: data, response and entries are there before it. */
	__atomic_store_n(&vq->used[VQ_RING_IDX], new, __ATOMIC_RELEASE);
	vq->published = new;
	/*
	 * Pairs with the driver's full barrier between writing used_event (or flags) and looking at idx again:
	 * either it sees our idx or we see its wish.
	 */
	atomic_thread_fence(memory_order_seq_cst);
	if (vq->event_idx)
		return (uint16_t)(new - load(used_event(vq)) - 1) < (uint16_t)(new - old);
	return !(load(&vq->avail[VQ_RING_FLAGS]) & AVAIL_NO_INTERRUPT);
}

void vq_suppress(struct vq *vq)
{
	/* With EVENT_IDX an avail_event that stays behind does it. */
	if (vq->packed)
		packed_suppress(vq);
	else if (!vq->event_idx)
		store(&vq->used[VQ_RING_FLAGS], USED_NO_NOTIFY);
}

bool vq_rearm(struct vq *vq)
{
	if (vq->packed)
		return packed_rearm(vq);
	if (vq->event_idx)
		store(avail_event(vq), vq->next_avail);
	else
		store(&vq->used[VQ_RING_FLAGS], 0);
	/*
	 * Pairs with the driver's full barrier between writing avail idx and reading avail_event (or flags): either
	 * it sees that we want a kick or we see what it added.
	 */
	atomic_thread_fence(memory_order_seq_cst);
	return load(&vq->avail[VQ_RING_IDX]) != vq->next_avail;
}
