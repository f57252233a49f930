/*
 * order.c - task attributes (SAM-5 8.7): what an ORDERED command waits for, and what waits for it.
 *
 * An ORDERED command begins when all that came before it has ended, and what comes after it begins when it has.  Neither
 * a path nor Python nor the fabric could make up for an order that was lost on the way there, so whoever may not begin
 * yet is held here, untouched, for all paths alike.  HEAD OF QUEUE goes at once; everything else is SIMPLE to us, and
 * SIMPLE ones are free among themselves.
 *
 * What came before is what the ring says.  Virtio knows no order between rings, so nothing is promised there but what
 * the fabric does about commands that have arrived.  Within a ring each unit has a task set of its own: a slow one holds
 * up no other.
 *
 * Task sets are kept while there is need.  An ORDERED command that comes to a ring without any makes them for all that is
 * in flight, by one look at the pool; from then on each command that comes gets into one, until these have all ended.  So
 * what a command costs does not grow with those that are held, and a guest with nothing but SIMPLE ones pays nothing.
 *
 * Letting go takes no kick: the end of a command makes its task set loose, and the worker does not sleep while one is.
 */
#include "scsi.h"
#include "worker.h"

static inline uint8_t attribute(const struct command *command)
{
	return command->header[HEADER_ATTRIBUTE];
}

/* ---------------------------------------------------------------- task sets */

/* This command's, which it belongs to from here on.  There is room for one for each of the pool. */
static struct task_set *enter(struct command *command)
{
	struct ring *ring = command->ring;
	uint32_t address = (uint32_t)command->target << 16 | command->lun;
	struct set_list *list = &ring->set_lists[address % ring->pool_size];
	struct task_set *set;

	LIST_FOREACH(set, list, others)
		if (set->address == address)
			break;
	if (!set) {
		set = LIST_FIRST(&ring->spare_sets);
		if (set)
			LIST_REMOVE(set, others);
		else
			set = &ring->sets[ring->set_count];
		*set = (struct task_set){ .address = address };
		TAILQ_INIT(&set->held);
		LIST_INSERT_HEAD(list, set, others);
		ring->set_count++;
	}
	command->set = set;
	return set;
}

static void open_sets(struct ring *ring)
{
	LIST_INIT(&ring->spare_sets);
	for (uint32_t head = 0, left = ring->in_flight; left && head < ring->pool_size; head++) {
		struct command *command = &ring->pool[head];

		if (command->state == COMMAND_FREE)
			continue;
		left--;
		/* Those of this batch that are still to be looked at come later. */
		if (command->state != COMMAND_TAKEN && vscsi_address(command))
			enter(command)->under_way++;
	}
}

static inline bool may_begin(const struct task_set *set, const struct command *command)
{
	return attribute(command) == ATTRIBUTE_ORDERED ? !set->under_way : !set->alone;
}

static void begin(struct task_set *set, const struct command *command)
{
	set->under_way++;
	set->alone |= attribute(command) == ATTRIBUTE_ORDERED;
}

/* Something has changed: perhaps one may begin, perhaps nobody needs it any more. */
static void look_again(struct worker *worker, struct ring *ring, struct task_set *set)
{
	const struct command *first = TAILQ_FIRST(&set->held);

	if (first && !set->loose && may_begin(set, first)) {
		set->loose = true;
		TAILQ_INSERT_TAIL(&worker->loose, set, turn);
		worker->unsettled = true;
	}
	if (first || set->under_way)
		return;
	if (set->loose)
		TAILQ_REMOVE(&worker->loose, set, turn);
	LIST_REMOVE(set, others);
	LIST_INSERT_HEAD(&ring->spare_sets, set, others);
	ring->set_count--;
}

/* ---------------------------------------------------------------- commands */

bool order_take(struct worker *worker, struct command *command)
{
	struct ring *ring = command->ring;
	struct task_set *set;

	if (!vscsi_address(command))
		return true;
	if (!ring->set_count)
		open_sets(ring);
	set = enter(command);
	ring->ordered += attribute(command) == ATTRIBUTE_ORDERED;
	if (attribute(command) == ATTRIBUTE_HEAD_OF_QUEUE || (TAILQ_EMPTY(&set->held) && may_begin(set, command))) {
		begin(set, command);
		return true;
	}
	COUNT(worker, held);
	command->state = COMMAND_HELD;
	TAILQ_INSERT_TAIL(&set->held, command, turn);
	return false;
}

static struct task_set *leave(struct command *command)
{
	struct task_set *set = command->set;

	command->set = NULL;
	command->ring->ordered -= attribute(command) == ATTRIBUTE_ORDERED;
	return set;
}

void order_leave(struct worker *worker, struct command *command)
{
	struct task_set *set = leave(command);

	set->under_way--;
	if (attribute(command) == ATTRIBUTE_ORDERED)
		set->alone = false;
	look_again(worker, command->ring, set);
}

void order_drop(struct worker *worker, struct command *command)
{
	struct task_set *set = leave(command);

	TAILQ_REMOVE(&set->held, command, turn);
	look_again(worker, command->ring, set);
}

void order_let_go(struct worker *worker)
{
	struct task_set *set;

	/* By turns, and not all at once: messages wait meanwhile. */
	for (unsigned i = 0; i < BATCH && (set = TAILQ_FIRST(&worker->loose)); i++) {
		struct command *command = TAILQ_FIRST(&set->held);

		TAILQ_REMOVE(&worker->loose, set, turn);
		set->loose = false;
		/* A HEAD OF QUEUE command may have come meanwhile, the one that was first may have been aborted. */
		if (!command || !may_begin(set, command))
			continue;
		TAILQ_REMOVE(&set->held, command, turn);
		begin(set, command);
		look_again(worker, command->ring, set);
		command->state = COMMAND_TAKEN;
		if (is_torn(worker, command))
			command_respond(worker, command, VIRTIO_SCSI_S_FAILURE, 0);
		else if (vscsi_dispatch(worker, command))
			command_submit(worker, command);
	}
}
