/*
 * move.c - rings that go from one worker to another, and when there is reason to.
 *
 * A ring moves when nothing of it is in flight: it stops fetching, is drained, and then the other worker has it, with
 * all that belongs to it.  What the driver has made available meanwhile waits in the ring, and a kick in its eventfd, so
 * nothing is lost; what does not end in time keeps the ring where it is.
 *
 * Which ring goes where is Python's to decide.  A worker only says when it has little rest and more than one ring with
 * commands: what a sleep and an empty turn of the loop are is known here alone.  Where there is one worker nothing of
 * this costs anything.
 */
#include <errno.h>
#include <unistd.h>

#include "worker.h"

#define WINDOW 500000000ull	/* ns over which a worker looks at its pace */

void move_message(struct worker *worker, struct mail *mail)
{
	const struct vfc_msg *msg = &mail->msg;
	struct ring *ring = msg->index < VFC_MAX_RINGS ? worker->rings[msg->index] : NULL;

	if (!ring || !ring->started || ring->role != VFC_RING_REQUEST || msg->worker >= worker->peer_count ||
	    msg->worker == worker->index) {
		mailbox_ack(&worker->box, mail, -EINVAL, 0);
	} else if (ring->stop) {
		mailbox_ack(&worker->box, mail, -EBUSY, 0);
	} else {
		ring->stop = mail;
		ring->deadline = worker_now() + msg->value * 1000000ull;
		worker->stopping++;
		worker->unsettled = true;
	}
}

void move_away(struct worker *worker, struct ring *ring)
{
	struct mail *mail = ring->stop;

	ring_leave(worker, ring);
	worker->rings[ring->index] = NULL;
	mail->kind = MAIL_RING;
	mail->ring = ring;
	mailbox_post(&worker->peers[mail->msg.worker].box, mail);
}

void move_give_up(struct worker *worker, struct ring *ring, int error)
{
	struct mail *mail = ring->stop;

	ring->stop = NULL;
	worker->stopping--;
	ring_activate(worker, ring);
	mailbox_ack(&worker->box, mail, error, 0);
}

void move_arrive(struct worker *worker, struct mail *mail)
{
	struct ring *ring = mail->ring;
	int error;

	/* What a ring of this number left behind here. */
	ring_free(worker->rings[ring->index]);
	worker->rings[ring->index] = ring;
	ring->worker = worker;
	/* The table of this worker may be older or newer: in both cases the next one puts it right. */
	error = vq_locate(&ring->vq, worker->view->mem);
	if (error && !ring->broken)
		ring_break(worker, ring, error);
	if (ring_listen(worker, ring, ring->kick_fd)) {
		/* Without being told, then. */
		close(ring->kick_fd);
		ring->kick_fd = -1;
		ring_listen(worker, ring, -1);
	}
	mailbox_ack(&worker->box, mail, 0, 0);
}

static unsigned rings_at_work(const struct pace *pace)
{
	unsigned count = 0;

	for (uint32_t i = 0; i < VFC_MAX_RINGS / 64; i++)
		count += (unsigned)__builtin_popcountll(pace->rings[i]);
	return count;
}

void move_begin(struct worker *worker)
{
	worker->pace.rested += worker_now() - worker->pace.resting;
	worker->pace.resting = 0;
}

void move_rest(struct worker *worker)
{
	if (!worker->pace.took && !worker->pace.resting)
		worker->pace.resting = worker_now();
	worker->pace.took = false;
}

void move_look(struct worker *worker)
{
	struct pace *pace = &worker->pace;
	uint64_t now = worker_now(), whole = now - pace->since;

	if (whole < WINDOW)
		return;
	if (pace->resting)
		pace->rested += now - pace->resting;
	if (pace->rested < whole / 2 && rings_at_work(pace) > 1)
		worker_say(worker, VFC_EVENT_BUSY, 0, 0, 0);
	*pace = (struct pace){ .since = now, .resting = pace->resting ? now : 0, .took = pace->took };
}
