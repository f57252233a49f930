/*
 * intake.c - taking commands from a ring: claimed, gathered, read, and told where to go.
 *
 * Step by step for a whole batch, not command by command: while one is worked on, memory fetches what the next ones
 * need (the driver wrote all of it on another CPU a moment ago).
 */
#include <errno.h>

#include "iov.h"
#include "worker.h"

/* NULL: the driver gave it to us twice. */
struct command *intake_claim(struct worker *worker, struct ring *ring, uint16_t head)
{
	struct command *command = &ring->pool[head];

	if (__builtin_expect(command->state != COMMAND_FREE, 0)) {
		COUNT(worker, bad_chain);
		return NULL;
	}
	vq_prefetch(&ring->vq, head);
	command->state = COMMAND_TAKEN;
	command->ring = ring;
	command->head = head;
	command->view = worker->view;
	command->view->users++;
	command->route = NULL;
	command->doomed = false;
	command->waiter = NULL;
	command->set = NULL;
	ring->in_flight++;
	return command;
}

void intake_gather(struct worker *worker, struct command *command)
{
	struct ring *ring = command->ring;
	struct vq_chain *chain = &command->chain;

	ADD(worker, in_flight, 1);
	command->bad = (int16_t)vq_gather(&ring->vq, command->view, command->head, command->few, FEW_IOV,
					  ring->slab + (size_t)command->head * VQ_MAX_IOV, chain);
	if (!command->bad && chain->readable && chain->writable) {
		__builtin_prefetch(chain->iov[0].iov_base);
		__builtin_prefetch(chain->iov[chain->readable].iov_base, 1);
	}
}

void intake_count_bad(struct worker *worker, int error)
{
	switch (error) {
	case -EFAULT:
		COUNT(worker, bad_address);
		break;
	case -EBADMSG:
		COUNT(worker, bad_indirect);
		break;
	default:
		COUNT(worker, bad_chain);
	}
}

/* Finds the answer's place in the writable part, which is long enough, and leaves the data behind it in ->in. */
static void place_answer(struct command *command)
{
	struct iovec *first = command->chain.iov + command->chain.readable;
	uint8_t *start = first->iov_base;
	bool whole = first->iov_len >= RESPONSE_HEADER;

	command->answer_pieces = iov_trim(first, RESPONSE_HEADER, &command->answer_cut);
	command->answer = whole ? start : NULL;
	command->in = first + command->answer_pieces;
	command->in_pieces = command->chain.writable - command->answer_pieces;
	command->in_bytes = (uint32_t)(command->chain.write_bytes - RESPONSE_HEADER);
}

/* A request that says too little, or is no chain: the guest hears of it where there is a place to say it. */
static void reject(struct worker *worker, struct command *command)
{
	if (command->chain.write_bytes < RESPONSE_HEADER) {
		command_drop(worker, command);
		return;
	}
	place_answer(command);
	command->out_bytes = 0;
	command_respond(worker, command, VIRTIO_SCSI_S_FAILURE, 0);
}

/* Request and response where nobody else's bytes share their pieces: as all drivers lay them out. */
static inline bool place_plain(struct command *command)
{
	const struct vq_chain *chain = &command->chain;
	struct iovec *request = chain->iov, *response = request + chain->readable;

	if (!chain->readable || request->iov_len != REQUEST_HEADER || !chain->writable ||
	    response->iov_len != RESPONSE_HEADER)
		return false;
	memcpy(command->header, request->iov_base, REQUEST_HEADER);
	command->out = request + 1;
	command->out_pieces = chain->readable - 1;
	command->out_bytes = (uint32_t)chain->read_bytes - REQUEST_HEADER;
	command->answer = response->iov_base;
	command->answer_pieces = 1;
	command->answer_cut = 0;
	command->in = response + 1;
	command->in_pieces = chain->writable - 1;
	command->in_bytes = (uint32_t)chain->write_bytes - RESPONSE_HEADER;
	return true;
}

static __attribute__((noinline)) void place(struct command *command)
{
	size_t cut;

	iov_read(command->chain.iov, command->chain.readable, 0, command->header, REQUEST_HEADER);
	command->out = command->chain.iov + iov_trim(command->chain.iov, REQUEST_HEADER, &cut);
	command->out_pieces = command->chain.readable - (uint32_t)(command->out - command->chain.iov);
	command->out_bytes = (uint32_t)(command->chain.read_bytes - REQUEST_HEADER);
	place_answer(command);
}

/* True: the path is next; else it is answered, held, or with Python. */
static inline bool accept(struct worker *worker, struct command *command)
{
	if (__builtin_expect(command->bad, 0)) {
		intake_count_bad(worker, command->bad);
		reject(worker, command);
		return false;
	}
	if (__builtin_expect(!place_plain(command), 0)) {
		if (command->chain.read_bytes < REQUEST_HEADER || command->chain.write_bytes < RESPONSE_HEADER) {
			COUNT(worker, bad_header);
			reject(worker, command);
			return false;
		}
		place(command);
	}
	COUNT(worker, commands);
	if (is_torn(worker, command)) {
		command_respond(worker, command, VIRTIO_SCSI_S_FAILURE, 0);
		return false;
	}
	if (__builtin_expect(command->out_bytes && command->in_bytes, 0)) {
		COUNT(worker, bad_direction);
		command_respond(worker, command, VIRTIO_SCSI_S_FAILURE, 0);
		return false;
	}
	if (__builtin_expect(order_matters(command), 0) && !order_take(worker, command))
		return false;
	if (!vscsi_dispatch(worker, command))
		return false;
	command->state = COMMAND_READY;
	return true;
}

void intake_hold(struct worker *worker, struct ring *ring, const uint16_t *heads, unsigned count, struct hold *hold)
{
	for (unsigned i = 0; i < count; i++) {
		struct command *command = intake_claim(worker, ring, heads[i]);

		if (__builtin_expect(command != NULL, 1))
			hold->commands[hold->count++] = command;
		else
			hold->busy = true;
	}
	for (unsigned i = 0; i < hold->count; i++)
		intake_gather(worker, hold->commands[i]);
}

int intake_run(struct worker *worker, struct ring *ring)
{
	uint16_t heads[BATCH];
	struct hold hold;
	int more;
	unsigned count = vq_take(&ring->vq, heads, worker->batch, &more), ready = 0;

	if (count) {
		if (ring->empty_since)
			ring_tune(worker, ring);
		ring->shallow = count <= SMALL_BATCH;
		worker->credit -= (int)count;
		move_count(worker, ring, count);
	}

	hold.count = 0;
	hold.busy = false;
	express_run(worker, ring, heads, count, &hold);
	for (unsigned i = 0; i < hold.count; i++)
		if (accept(worker, hold.commands[i]))
			hold.commands[ready++] = hold.commands[i];
	for (unsigned i = 0; i < ready; i++)
		command_submit(worker, hold.commands[i]);
	return hold.busy ? -EBUSY : more;
}
