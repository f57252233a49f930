/*
 * command.c - the life of one command: taken from its ring, run by a path, parked, punted to Python, answered.
 *
 * A command is an entry of its ring's pool, found by its head, so taking one allocates nothing.  It ends in exactly
 * one place, release(), and until then it holds its view of guest memory and, while the path or the park has it,
 * its route.
 */
#include <errno.h>
#include <stdlib.h>

#include "iov.h"
#include "worker.h"

#define LATCH_PATIENCE 1000000000ull	/* ns that one holder may keep a latch before we say so */
#define FAIRNESS 10000000ull		/* ns that our own I/O may keep a latch from a command before it waits, too */

/* struct virtio_scsi_resp_cmd up to its sense data */
struct answer_header {
	uint32_t sense_length;
	uint32_t residual;
	uint16_t status_qualifier;
	uint8_t status;
	uint8_t response;
};
_Static_assert(sizeof(struct answer_header) == RESPONSE_HEADER - SENSE_ROOM, "virtio 1.3, 5.6.6.1");

/* ---------------------------------------------------------------- beginning and end */

static inline void release(struct worker *worker, struct command *command, uint32_t length)
{
	struct ring *ring = command->ring;

	if (!ring->broken) {
		vq_push(&ring->vq, command->head, length);
		ring_mark_dirty(worker, ring);
	}
	command->state = COMMAND_FREE;
	if (__builtin_expect(command->set != NULL, 0))
		order_leave(worker, command);
	view_put(worker, command->view);
	add_to(&worker->work[ring->index], command->chain.read_bytes + command->chain.write_bytes);
	ADD(worker, in_flight, -1);
	if (!--ring->in_flight && ring->stop)
		worker->unsettled = true;
}

void command_drop(struct worker *worker, struct command *command)
{
	release(worker, command, 0);
}

static inline void leave_route(struct worker *worker, struct command *command)
{
	struct route *route = command->route;

	if (!route)
		return;
	command->route = NULL;
	if (!--route->commands && route->ack)
		worker->unsettled = true;
}

static __attribute__((noinline)) void write_pieces(const struct command *command, const void *bytes, size_t length)
{
	const struct iovec *first = command->chain.iov + command->chain.readable;
	size_t done;

	done = iov_write(first, command->answer_pieces, 0, bytes, length);
	if (done < length)
		memcpy((uint8_t *)first[command->answer_pieces].iov_base - command->answer_cut,
		       (const uint8_t *)bytes + done, length - done);
}

static inline __attribute__((always_inline)) void write_answer(const struct command *command, const void *bytes,
							       size_t length)
{
	if (__builtin_expect(command->answer != NULL, 1))
		memcpy(command->answer, bytes, length);
	else
		write_pieces(command, bytes, length);
}

bool command_torn(const struct command *command)
{
	uint32_t pieces = command->chain.readable + command->chain.writable;

	for (uint32_t i = 0; i < pieces; i++) {
		const struct vfc_map *map = mem_of_host(command->view->mem, command->chain.iov[i].iov_base);

		if (map && guard_torn(map->guard))
			return true;
	}
	return false;
}

bool command_found_torn(struct worker *worker, const struct command *command)
{
	if (!command_torn(command))
		return false;
	COUNT(worker, torn_memory);
	return true;
}

void command_respond(struct worker *worker, struct command *command, uint8_t response, uint8_t status)
{
	struct answer_header header = {
		.residual = command->out_bytes + command->in_bytes,
		.status = status,
		.response = response,
	};

	write_answer(command, &header, sizeof(header));
	leave_route(worker, command);
	release(worker, command, RESPONSE_HEADER);
}

/* ---------------------------------------------------------------- on a path */

static inline void good(struct worker *worker, struct command *command)
{
	static const struct answer_header header;
	uint32_t moved = 0;

	if (command->cmd.op == VFC_OP_READ) {
		moved = (uint32_t)command->cmd.length;
		ADD(worker, read_bytes, moved);
	} else {
		ADD(worker, written_bytes, command->cmd.length);
	}
	COUNT(worker, fast);
	write_answer(command, &header, sizeof(header));
	leave_route(worker, command);
	release(worker, command, RESPONSE_HEADER + moved);
}

/* A device has ended it, and says how. */
static __attribute__((noinline)) void pass_on(struct worker *worker, struct command *command)
{
	const struct vfc_result *result = command->cmd.result;
	struct {
		struct answer_header header;
		uint8_t sense[SENSE_ROOM];
	} whole = {
		.header = {
			.sense_length = result->sense_length,
			.residual = result->refused ? command->out_bytes + command->in_bytes : result->residual,
			.status = result->status,
			.response = result->response,
		},
	};

	if (result->sense_length)
		memcpy(whole.sense, result->sense, result->sense_length);
	COUNT(worker, fast);
	ADD(worker, read_bytes, result->moved);
	if (command->cmd.op == VFC_OP_WRITE && !result->response)
		ADD(worker, written_bytes, command->cmd.length - result->residual);
	write_answer(command, &whole, sizeof(whole));
	leave_route(worker, command);
	release(worker, command, RESPONSE_HEADER + result->moved);
}

/* kept: its device may still run it, so whoever wanted it ended must not count on that. */
static void end_doomed(struct worker *worker, struct command *command, bool kept)
{
	struct mail *waiter = command->waiter;

	command_respond(worker, command, command->doom, command->doom_status);
	if (!waiter)
		return;
	waiter->kept |= kept;
	if (--waiter->waiting)
		return;
	ring_publish_all(worker);
	mailbox_ack(&worker->box, waiter, waiter->kept ? -ETIMEDOUT : 0, waiter->msg.value);
}

static inline void finish(struct worker *worker, struct command *command)
{
	if (__builtin_expect(command->doomed, 0)) {
		end_doomed(worker, command, command->cmd.result && command->cmd.result->kept);
	} else if (is_torn(worker, command)) {
		command_respond(worker, command, VIRTIO_SCSI_S_FAILURE, 0);
	} else if (command->cmd.result) {
		pass_on(worker, command);
	} else if (__builtin_expect(command->cmd.error, 0)) {
		COUNT(worker, medium_errors);
		command_punt(worker, command, VFC_WHY_MEDIUM);
	} else if (command->cmd.op == VFC_OP_FLUSH && medium_in_doubt(command->cmd.path->medium)) {
		command_punt(worker, command, VFC_WHY_DOUBT);
	} else {
		good(worker, command);
	}
}

void command_finish(struct worker *worker, struct command *command)
{
	finish(worker, command);
}

static void park(struct worker *worker, struct command *command)
{
	if (command->state != COMMAND_PARKED)
		COUNT(worker, parked);
	if (command->state != COMMAND_PARKED || command->holder != command->cmd.holder) {
		command->holder = command->cmd.holder;
		command->parked_since = worker_now();
	}
	command->state = COMMAND_PARKED;
	command->next = NULL;
	*worker->parked_last = command;
	worker->parked_last = &command->next;
}

/*
 * A large command needs all its stripes at once; small ones that come and go could keep it from them for ever.
 * So one that our own I/O has kept waiting for too long goes before all that touch what it waits for.
 */
static __attribute__((noinline)) bool must_give_way(const struct command *first, const struct command *command)
{
	const struct vfc_medium *medium = command->cmd.path->medium;
	uint32_t shift = medium->block_shift;

	if (first == command || first->cmd.path->medium != medium || command->cmd.op == VFC_OP_FLUSH)
		return false;
	return ((command->cmd.lba + command->cmd.blocks - 1) << shift) / VFC_LATCH_STRIPE >=
		       (first->cmd.lba << shift) / VFC_LATCH_STRIPE &&
	       (command->cmd.lba << shift) / VFC_LATCH_STRIPE <=
		       ((first->cmd.lba + first->cmd.blocks - 1) << shift) / VFC_LATCH_STRIPE;
}

void command_submit(struct worker *worker, struct command *command)
{
	struct vfc_path *path = command->cmd.path;
	struct route *route = (struct route *)path;	/* its first member */
	enum vfc_submit verdict = VFC_BUSY;

	if (__builtin_expect(worker->starving && must_give_way(worker->starving, command), 0))
		command->cmd.holder = path->medium->owner;
	else
		verdict = path->engine->ops->submit(path->engine, &command->cmd);
	if (__builtin_expect(verdict == VFC_DONE, 1)) {
		finish(worker, command);
		return;
	}
	if (!command->route) {
		command->route = route;
		route->commands++;
	}
	if (verdict == VFC_QUEUED) {
		command->state = COMMAND_RUNNING;
		worker->running++;
	} else {
		park(worker, command);
	}
}

void command_retry(struct worker *worker, uint64_t now)
{
	struct command *command = worker->parked, *next;

	worker->parked = NULL;
	worker->parked_last = &worker->parked;
	for (; command; command = next) {
		next = command->next;
		command_submit(worker, command);
		if (command->state != COMMAND_PARKED) {
			if (worker->starving == command)
				worker->starving = NULL;
			continue;
		}
		if (!worker->starving && command->holder == command->cmd.path->medium->owner &&
		    now > command->parked_since + FAIRNESS)
			worker->starving = command;
		/* Who waits for our own I/O waits for a device that is slow, which nobody else can help. */
		if (command->holder && command->holder != command->cmd.path->medium->owner &&
		    now > command->parked_since + LATCH_PATIENCE && now > worker->latch_said + LATCH_PATIENCE) {
			worker->latch_said = now;
			worker_say(worker, VFC_EVENT_LATCH, command->ring->index, 0, command->holder);
		}
	}
}

void command_unpark(struct worker *worker, struct command *command)
{
	struct command **link = &worker->parked;

	while (*link != command)
		link = &(*link)->next;
	*link = command->next;
	if (!*link)
		worker->parked_last = link;
	if (worker->starving == command)
		worker->starving = NULL;
	command->state = COMMAND_FREE;
	leave_route(worker, command);
}

/* ---------------------------------------------------------------- with Python */

static bool ration_take(struct ration *ration, uint64_t bytes)
{
	if (atomic_fetch_add(&ration->punts, 1) >= ration->max_punts) {
		atomic_fetch_sub(&ration->punts, 1);
		return false;
	}
	if (atomic_fetch_add(&ration->bytes, bytes) + bytes > ration->max_bytes) {
		atomic_fetch_sub(&ration->bytes, bytes);
		atomic_fetch_sub(&ration->punts, 1);
		return false;
	}
	return true;
}

static void ration_give(struct ration *ration, uint64_t bytes)
{
	atomic_fetch_sub(&ration->bytes, bytes);
	atomic_fetch_sub(&ration->punts, 1);
}

/* From here on the handle is good, until somebody swaps the generation in ->live for 0. */
static void go_live(struct worker *worker, struct command *command, struct note *note, bool control)
{
	if (!++worker->generation)
		++worker->generation;
	command->generation = worker->generation;
	command->state = COMMAND_PUNTED;
	note->event.handle = handle_make(command, control);
	note->event.index = command->ring->index;
	atomic_store(&worker->live[HANDLE_SLOT(note->event.handle)], command->generation);
	mailbox_say(&worker->box, note, control);
}

void command_punt(struct worker *worker, struct command *command, enum vfc_why why)
{
	/* More than the whole ration in one command is no write that anybody would do: Python sees it cut. */
	uint64_t most = worker->ration->max_bytes;
	uint32_t out = command->out_bytes < most ? command->out_bytes : (uint32_t)most;
	uint32_t in = command->in_bytes < most ? command->in_bytes : (uint32_t)most;
	const uint8_t *header = command->header;
	struct note *note = NULL;

	leave_route(worker, command);
	command->punt_bytes = (uint64_t)out + in;
	if (ration_take(worker->ration, command->punt_bytes)) {
		note = malloc(sizeof(*note) + out);
		if (!note)
			ration_give(worker->ration, command->punt_bytes);
	}
	if (!note) {
		COUNT(worker, task_set_full);
		command_respond(worker, command, VIRTIO_SCSI_S_OK, SAM_TASK_SET_FULL);
		return;
	}
	iov_read(command->out, command->out_pieces, 0, note + 1, out);
	note->event = (struct vfc_event){
		.kind = VFC_EVENT_PUNT,
		.why = why,
		.target = command->target,
		.attribute = header[16],
		.priority = header[17],
		.crn = header[18],
		.cdb_length = 32,
		.data_in_length = in,
		.data_out_length = out,
		.data_out = (const uint8_t *)(note + 1),
	};
	memcpy(note->event.lun, header, sizeof(note->event.lun));
	memcpy(&note->event.tag, header + 8, sizeof(note->event.tag));
	memcpy(note->event.cdb, header + 19, sizeof(note->event.cdb));
	if (is_torn(worker, command)) {
		free(note);
		ration_give(worker->ration, command->punt_bytes);
		command_respond(worker, command, VIRTIO_SCSI_S_FAILURE, 0);
		return;
	}
	COUNT(worker, punted);
	go_live(worker, command, note, false);
}

void command_accept_control(struct worker *worker, struct ring *ring, uint16_t head)
{
	struct command *command = intake_claim(worker, ring, head);
	struct note *note;

	if (!command) {
		ring_break(worker, ring, -EBUSY);
		return;
	}
	intake_gather(worker, command);
	if (command->bad) {
		intake_count_bad(worker, command->bad);
		release(worker, command, 0);
		return;
	}
	if (command->chain.read_bytes < sizeof(uint32_t) || !command->chain.write_bytes) {
		COUNT(worker, bad_header);
		release(worker, command, 0);
		return;
	}
	command->in = command->chain.iov + command->chain.readable;
	command->in_pieces = command->chain.writable;
	command->in_bytes = (uint32_t)command->chain.write_bytes;
	command->punt_bytes = 0;
	note = malloc(sizeof(*note) + VFC_CONTROL_MAX);
	if (note) {
		size_t length = iov_read(command->chain.iov, command->chain.readable, 0, note + 1, VFC_CONTROL_MAX);

		memcpy(command->header, note + 1, sizeof(uint32_t));
		note->event = (struct vfc_event){
			.kind = VFC_EVENT_CONTROL,
			.data_in_length = command->in_bytes,
			.data_out_length = (uint32_t)length,
			.data_out = (const uint8_t *)(note + 1),
		};
	}
	if (!note || is_torn(worker, command)) {
		free(note);
		release(worker, command, 0);
		return;
	}
	go_live(worker, command, note, true);
}

/* virtio 1.3, 5.6.6.2: a task management response is one byte; those about events have the events before it. */
static void fail_control(struct worker *worker, struct command *command, uint8_t response)
{
	uint8_t answer[5] = { 0 };
	uint32_t type, length;

	memcpy(&type, command->header, sizeof(type));
	length = type == 0 ? 1 : 5;
	answer[length - 1] = response;
	release(worker, command, (uint32_t)iov_write(command->in, command->in_pieces, 0, answer, length));
}

static void end_punt(struct worker *worker, struct command *command)
{
	if (command->ring->role != VFC_RING_CONTROL)
		ration_give(worker->ration, command->punt_bytes);
	command->state = COMMAND_FREE;
}

bool command_kill(struct worker *worker, struct command *command, uint8_t response, uint8_t status, bool at_once)
{
	struct vfc_path_engine *engine;
	bool control = command->ring->role == VFC_RING_CONTROL;

	switch (command->state) {
	case COMMAND_HELD:
		order_drop(worker, command);
		break;
	case COMMAND_PARKED:
		command_unpark(worker, command);
		break;
	case COMMAND_PUNTED:
		atomic_store(&worker->live[HANDLE_SLOT(handle_make(command, control))], 0);
		end_punt(worker, command);
		break;
	case COMMAND_RUNNING:
		engine = command->cmd.path->engine;
		if (command->doomed && !(engine->ops->runs_on && at_once))
			return false;
		engine->ops->cancel(engine, &command->cmd);
		if ((engine->ops->runs_on && !at_once) || !engine->ops->abandon(engine, &command->cmd)) {
			command->doomed = true;
			command->doom = response;
			command->doom_status = status;
			return false;
		}
		worker->running--;
		COUNT(worker, abandoned);
		if (command->doomed) {
			end_doomed(worker, command, true);
			return true;
		}
		break;
	default:
		return true;
	}
	COUNT(worker, aborted);
	if (control)
		fail_control(worker, command, response);
	else
		command_respond(worker, command, response, status);
	return true;
}

void command_reply(struct worker *worker, const struct mail *mail)
{
	const struct vfc_answer *answer = &mail->answer;
	struct ring *ring = worker->rings[HANDLE_RING(answer->handle)];
	uint16_t head = HANDLE_HEAD(answer->handle);
	struct command *command;
	uint32_t moved;

	/* The command may have ended, its ring may even be another by now. */
	if (!ring || !ring->started || head >= ring->vq.size)
		return;
	command = &ring->pool[head];
	if (command->state != COMMAND_PUNTED || command->generation != HANDLE_GENERATION(answer->handle))
		return;
	end_punt(worker, command);
	moved = (uint32_t)iov_write(command->in, command->in_pieces, 0, answer->data_in, answer->data_in_length);
	if (mail->kind == MAIL_REPLY_CONTROL) {
		release(worker, command, moved);
	} else if (is_torn(worker, command)) {
		command_respond(worker, command, VIRTIO_SCSI_S_FAILURE, 0);
	} else {
		struct {
			struct answer_header header;
			uint8_t sense[SENSE_ROOM];
		} whole = {
			.header = {
				.sense_length = answer->sense_length < SENSE_ROOM ? answer->sense_length : SENSE_ROOM,
				.residual = answer->residual,
				.status_qualifier = answer->status_qualifier,
				.status = answer->status,
				.response = answer->response,
			},
		};

		if (whole.header.sense_length)
			memcpy(whole.sense, answer->sense, whole.header.sense_length);
		write_answer(command, &whole, sizeof(whole));
		release(worker, command, RESPONSE_HEADER + moved);
	}
}
