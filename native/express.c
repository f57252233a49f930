/*
 * express.c - the few commands that are nearly all of them, in one go: READ(10) and WRITE(10) in the shape in which
 * drivers send them, to a medium that never waits.
 *
 * Such a command begins and ends here, so it needs no entry of the pool, holds nothing and cannot be in anybody's way:
 * no message is looked at meanwhile, so its route and its memory stay.  Whatever is unusual or wrong about one sends it
 * to intake.c, which looks anew at all of it; nothing of what was seen here counts then.  Of what the driver can change
 * meanwhile each word is loaded once, checked, and used.
 *
 * They overtake what is left of their batch, which is theirs to do among SIMPLE ones.  What comes behind one that is
 * ORDERED, or that keeps its attribute where it is not seen from here, is left to intake.c as well; and so is everything
 * while the ring has such a command in flight (order.c).
 *
 * A batch goes step by step (see intake.c): tables, headers, media, copies.
 */
#include <string.h>

#include "latch.h"
#include "scsi.h"
#include "worker.h"

#define TABLE_LENGTH 48	/* three descriptors: header, response and data, or header, data and response */

/* Where the region that was used last is, as plain numbers that no store can change. */
struct window {
	uint64_t gpa, size;
	uint8_t *host;
};

struct express {
	uint16_t head;
	bool write;
	uint32_t bit;		/* 1 << its place in the batch */
	uint32_t length;	/* of the data */
	union {
		volatile uint64_t *table;
		volatile uint8_t *header;
		uint8_t *medium;
	};
	uint8_t *data, *answer;
	struct route *route;
	uint64_t at;		/* in the medium */
};

static inline bool move_window(struct window *window, const struct view *view, uint64_t gpa)
{
	const struct vfc_map *map = mem_find(view->mem, gpa);

	if (!map)
		return false;
	*window = (struct window){ map->gpa, map->size, map->host };
	return true;
}

/* The bytes at gpa, if they are all in one region. */
static inline uint8_t *translate(struct window *window, const struct view *view, uint64_t gpa, uint32_t length)
{
	uint64_t offset = gpa - window->gpa;

	if (__builtin_expect(offset >= window->size, 0)) {
		if (!move_window(window, view, gpa))
			return NULL;
		offset = gpa - window->gpa;
	}
	return length <= window->size - offset ? window->host + offset : NULL;
}

/* The driver's words at any alignment, loaded once. */
static inline uint64_t once64(volatile const uint8_t *at)
{
	return ((volatile const struct { uint64_t value; } __attribute__((packed, may_alias)) *)at)->value;
}

static inline uint16_t once16(volatile const uint8_t *at)
{
	return ((volatile const struct { uint16_t value; } __attribute__((packed, may_alias)) *)at)->value;
}

/* ---------------------------------------------------------------- the steps: false sends it to intake.c */

static inline bool find_table(const struct ring *ring, struct window *window, bool packed, struct express *express)
{
	const struct vq *vq = &ring->vq;
	volatile uint64_t *desc;
	uint64_t gpa, what;
	uint8_t *table;

	if (packed) {
		if (vq->places[express->head].count != 1)
			return false;
		desc = vq->desc + 2 * (size_t)vq->places[express->head].first;
	} else {
		if (ring->pool[express->head].state != COMMAND_FREE)
			return false;
		desc = vq->desc + 2 * (size_t)express->head;
	}
	gpa = desc[0];
	what = desc[1];
	if ((uint32_t)what != TABLE_LENGTH ||
	    (what >> (packed ? 48 : 32) & (VQ_DESC_INDIRECT | VQ_DESC_NEXT)) != VQ_DESC_INDIRECT)
		return false;
	table = translate(window, ring->worker->view, gpa, TABLE_LENGTH);
	if (!table || (uintptr_t)table % sizeof(uint64_t))
		return false;
	__builtin_prefetch(table);
	__builtin_prefetch(table + TABLE_LENGTH - 1);
	express->table = (volatile uint64_t *)(void *)table;
	return true;
}

static inline __attribute__((always_inline)) bool read_table(const struct view *view, struct window *window, bool packed,
							     struct express *express)
{
	volatile uint64_t *table = express->table;
	uint64_t header = table[0], header_what = table[1], second = table[2], second_what = table[3], third = table[4],
		 third_what = table[5];
	uint8_t *header_at, *second_at, *third_at;

	if (packed) {
		/* 2.8.7: of the flags only INDIRECT, which is not allowed here, and WRITE say something. */
		if ((header_what | second_what | third_what) >> 48 & VQ_DESC_INDIRECT || header_what >> 48 & VQ_DESC_WRITE ||
		    !(third_what >> 48 & VQ_DESC_WRITE))
			return false;
		express->write = !(second_what >> 48 & VQ_DESC_WRITE);
	} else {
		uint32_t second_tail = (uint32_t)(second_what >> 32);

		if (header_what >> 32 != (VQ_DESC_NEXT | 1 << 16) ||
		    (second_tail & ~(uint32_t)VQ_DESC_WRITE) != (VQ_DESC_NEXT | 2 << 16) ||
		    (uint16_t)(third_what >> 32) != VQ_DESC_WRITE)
			return false;
		express->write = !(second_tail & VQ_DESC_WRITE);
	}
	if ((uint32_t)header_what != REQUEST_HEADER)
		return false;
	header_at = translate(window, view, header, REQUEST_HEADER);
	if (!header_at)
		return false;
	second_at = translate(window, view, second, (uint32_t)second_what);
	if (!second_at)
		return false;
	third_at = translate(window, view, third, (uint32_t)third_what);
	if (!third_at)
		return false;
	express->answer = express->write ? third_at : second_at;
	express->data = express->write ? second_at : third_at;
	express->length = (uint32_t)(express->write ? second_what : third_what);
	if ((uint32_t)(express->write ? third_what : second_what) != RESPONSE_HEADER)
		return false;
	__builtin_prefetch(header_at);
	__builtin_prefetch(express->answer, 1);
	express->header = header_at;
	return true;
}

static inline bool read_header(const struct worker *worker, struct express *express)
{
	volatile const uint8_t *header = express->header;
	uint64_t lun = once64(header), cdb = once64(header + HEADER_CDB), at;
	uint16_t last = once16(header + HEADER_CDB + 8);	/* low byte of the length, CONTROL */
	struct route *route = worker->recent;
	const struct vfc_medium *medium;
	uint32_t lba, blocks;
	uint8_t opcode = express->write ? WRITE_10 : READ_10;

	/* CDB bytes 0, 1 (but for DPO and FUA), 6 and, last, 9 */
	if (!route || lun != worker->recent_address || header[HEADER_ATTRIBUTE] != ATTRIBUTE_SIMPLE ||
	    (cdb & 0x00ff00000000e7ff) != opcode || last >> 8)
		return false;
	if (!(route->mask[opcode / 8] >> (opcode % 8) & 1) || route->path.engine != worker->media)
		return false;
	medium = route->path.medium;
	lba = __builtin_bswap32((uint32_t)(cdb >> 16));
	blocks = (uint32_t)(cdb >> 56) << 8 | last;
	if (!blocks || lba >= medium->blocks || blocks > medium->blocks - lba ||
	    express->length != (uint64_t)blocks << medium->block_shift || express->length > worker->ration->max_transfer)
		return false;
	express->route = route;
	express->medium = NULL;
	if (medium->kind == VFC_MEDIUM_NULL)
		return true;
	at = (uint64_t)lba << medium->block_shift;
	if (at % VFC_LATCH_STRIPE + express->length > VFC_LATCH_STRIPE || (express->write && !medium->writable))
		return false;
	express->at = at;
	express->medium = medium->memory + at;
	return true;
}

/* Whether this one, that is none of ours, might be ORDERED; looked at as vq_gather() will. */
static bool may_be_ordered(const struct ring *ring, struct window *window, bool packed, uint16_t head)
{
	const struct vq *vq = &ring->vq;
	volatile uint64_t *desc = vq->desc + 2 * (size_t)(packed ? vq->places[head].first : head);
	uint64_t gpa = desc[0], what = desc[1];
	volatile const uint8_t *at;

	if (what >> (packed ? 48 : 32) & VQ_DESC_INDIRECT) {
		at = translate(window, ring->worker->view, gpa, 2 * sizeof(uint64_t));
		if (!at)
			return true;
		gpa = once64(at);
		what = once64(at + sizeof(uint64_t));
	}
	if ((uint32_t)what <= HEADER_ATTRIBUTE)
		return true;
	at = translate(window, ring->worker->view, gpa, HEADER_ATTRIBUTE + 1);
	return !at || at[HEADER_ATTRIBUTE] == ATTRIBUTE_ORDERED;
}

/* Of all[] to end those that stand before what must not be overtaken; returns their end. */
static __attribute__((noinline)) struct express *keep_order(const struct ring *ring, struct window *window, bool packed,
							     const uint16_t *heads, unsigned count,
							     struct express *all, struct express *end)
{
	uint32_t ours = 0, first;

	for (struct express *express = all; express < end; express++)
		ours |= express->bit;
	for (unsigned i = 0; i < count; i++) {
		first = 1u << i;
		/* Nobody left that stands behind it. */
		if (ours < first)
			break;
		if (ours & first || !may_be_ordered(ring, window, packed, heads[i]))
			continue;
		for (struct express *express = all; express < end;)
			if (express->bit > first)
				*express = *--end;
			else
				express++;
		break;
	}
	return end;
}

static inline void fetch_medium(const struct express *express)
{
	/* The page's address and its first lines; what reads in sequence is fetched ahead by the machine. */
	for (unsigned i = 0; i < 2; i++) {
		__builtin_prefetch(express->medium + 64 * i, 0);
		__builtin_prefetch(express->data + 64 * i, 1);
	}
}

static __attribute__((noinline)) void write_memory(const struct express *express)
{
	const struct vfc_path *path = &express->route->path;
	uint32_t most = path->medium->block_size > REDO_PIECE ? path->medium->block_size : REDO_PIECE;

	for (uint32_t done = 0, piece; done < express->length; done += piece) {
		piece = express->length - done < most ? express->length - done : most;
		memcpy(path->redo.data, express->data + done, piece);
		redo_copy(&path->redo, path->medium->memory, express->at + done, piece);
	}
}

static inline bool move(const struct express *express)
{
	const struct vfc_medium *medium = express->route->path.medium;
	uint32_t holder;

	if (!express->medium)
		return true;
	if (__builtin_expect(!latch_take_one(medium->latch, medium->owner, express->at, &holder), 0))
		return false;
	if (express->write)
		write_memory(express);
	else
		memcpy(express->data, express->medium, express->length);
	latch_free_one(medium->latch, medium->owner, express->at);
	return true;
}

static inline void answer(struct vq *vq, bool packed, const struct express *express)
{
	uint32_t used = RESPONSE_HEADER + (express->write ? 0 : express->length);

	/* GOOD: struct virtio_scsi_resp_cmd up to its sense data is all zeros. */
	memset(express->answer, 0, RESPONSE_HEADER - SENSE_ROOM);
	if (packed)
		vq_push_packed(vq, express->head, used);
	else
		vq_push_split(vq, express->head, used);
}

/* ---------------------------------------------------------------- a batch */

_Static_assert(BATCH <= 32, "a bit for each of a batch");

static inline uint32_t all_of(unsigned count)
{
	return count < 32 ? (1u << count) - 1 : UINT32_MAX;
}

static inline __attribute__((always_inline)) void run(struct worker *worker, struct ring *ring, uint16_t *heads,
							  unsigned count, struct hold *hold, bool packed)
{
	struct express all[BATCH], *express = all, *end;
	const struct view *view = worker->view;
	struct window window = { 0 };
	unsigned rest = 0;
	uint32_t done = 0;
	uint64_t bytes[2] = { 0, 0 };

	for (unsigned i = 0; i < count; i++) {
		express->head = heads[i];
		express->bit = 1u << i;
		express += find_table(ring, &window, packed, express);
	}
	end = express;
	for (express = all; express < end;)
		if (__builtin_expect(read_table(view, &window, packed, express), 1))
			express++;
		else
			*express = *--end;
	if (end > all) {
		ring->last_header = (uintptr_t)all->header;
		ring->last_answer = (uintptr_t)all->answer;
	}
	for (express = all; express < end;) {
		if (__builtin_expect(!read_header(worker, express), 0)) {
			*express = *--end;
			continue;
		}
		if (express->medium)
			fetch_medium(express);
		express++;
	}
	if (__builtin_expect(end < all + count, 0))
		end = keep_order(ring, &window, packed, heads, count, all, end);
	for (express = all; express < end;) {
		/* What a page was that went meanwhile, nobody knows: again, and closely. */
		if (__builtin_expect(!move(express) || guard_any_torn(), 0)) {
			*express = *--end;
			continue;
		}
		done |= express->bit;
		express++;
	}
	/*
	 * What is left keeps its order, and is gathered before anything is answered: in a packed ring used descriptors
	 * are written over those that were available, and these may be of commands that stay.
	 */
	for (unsigned i = 0; i < count && done != all_of(count); i++)
		if (!(done >> i & 1))
			heads[rest++] = heads[i];
	if (__builtin_expect(rest, 0))
		intake_hold(worker, ring, heads, rest, hold);
	for (express = all; express < end; express++) {
		answer(&ring->vq, packed, express);
		bytes[express->write] += express->length;
	}
	if (rest < count) {
		ring_mark_dirty(worker, ring);
		ADD(worker, commands, count - rest);
		ADD(worker, fast, count - rest);
		ADD(worker, read_bytes, bytes[0]);
		ADD(worker, written_bytes, bytes[1]);
		add_to(&worker->work[ring->index], bytes[0] + bytes[1]);
	}
}

void express_run(struct worker *worker, struct ring *ring, uint16_t *heads, unsigned count, struct hold *hold)
{
	/* A page that has gone, or a command that others wait for, need a closer look; files wait. */
	if (guard_any_torn() || worker->starving || ring->ordered || !ring->vq.indirect ||
	    (worker->recent && worker->recent->path.engine != worker->media))
		intake_hold(worker, ring, heads, count, hold);
	else if (ring->vq.packed)
		run(worker, ring, heads, count, hold, true);
	else
		run(worker, ring, heads, count, hold, false);
}
