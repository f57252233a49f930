/*
 * ring.c - starting, running and stopping rings, and the event ring.
 *
 * Stopping is bounded, because the front end's main loop waits for it: fetch nothing more, wait a while for what is
 * in flight, then answer the rest RESET.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include "iov.h"
#include "worker.h"

#define VIRTIO_SCSI_F_INOUT 0
#define VIRTIO_SCSI_F_T10_PI 3
#define EVENT_BYTES 16	/* struct virtio_scsi_event */
#define WATCH 32	/* looks at a ring that is watched, at a time */
#define FAR 3		/* times that a ring's next command came later than anybody would look, in a row */

static void signal_fd(int fd)
{
	uint64_t one = 1;

	/* EAGAIN: it is signalled already. */
	if (fd >= 0)
		(void)!write(fd, &one, sizeof(one));
}

static void replace_fd(int *at, int fd)
{
	if (*at >= 0)
		close(*at);
	*at = fd;
	/* Whoever holds the other end must not be able to make us wait. */
	if (fd >= 0)
		fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

static inline void deactivate(struct worker *worker, const struct ring *ring)
{
	worker->active[ring->index / 64] &= ~(1ull << (ring->index % 64));
}

int ring_get(struct worker *worker, uint32_t index, struct ring **ret_ring)
{
	struct ring *ring;

	if (index >= VFC_MAX_RINGS)
		return -EINVAL;
	ring = worker->rings[index];
	if (!ring) {
		ring = calloc(1, sizeof(*ring));
		if (!ring)
			return -ENOMEM;
		ring->worker = worker;
		ring->index = index;
		ring->kick_fd = ring->call_fd = ring->err_fd = -1;
		worker->rings[index] = ring;
	}
	*ret_ring = ring;
	return 0;
}

static void free_pool(struct ring *ring)
{
	if (ring->pool)
		munmap(ring->pool, ring->pool_size * sizeof(*ring->pool));
	if (ring->slab)
		munmap(ring->slab, ring->pool_size * sizeof(*ring->slab) * VQ_MAX_IOV);
	if (ring->sets)
		munmap(ring->sets, ring->pool_size * sizeof(*ring->sets));
	if (ring->set_lists)
		munmap(ring->set_lists, ring->pool_size * sizeof(*ring->set_lists));
	free(ring->places);
	ring->pool = NULL;
	ring->slab = NULL;
	ring->sets = NULL;
	ring->set_lists = NULL;
	ring->places = NULL;
	ring->pool_size = 0;
}

static void *lazy(size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return at == MAP_FAILED ? NULL : at;
}

static int make_pool(struct ring *ring, uint32_t size)
{
	if (ring->pool_size == size)
		return 0;
	free_pool(ring);
	ring->pool_size = size;
	ring->pool = lazy(size * sizeof(*ring->pool));
	ring->slab = lazy(size * sizeof(*ring->slab) * VQ_MAX_IOV);
	ring->sets = lazy(size * sizeof(*ring->sets));
	ring->set_lists = lazy(size * sizeof(*ring->set_lists));
	ring->places = calloc(size, sizeof(*ring->places));
	if (ring->pool && ring->slab && ring->sets && ring->set_lists && ring->places)
		return 0;
	free_pool(ring);
	return -ENOMEM;
}

int ring_listen(struct worker *worker, struct ring *ring, int kick_fd)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLET, .data.u32 = ring->index };

	if (kick_fd >= 0 && epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, kick_fd, &event) < 0)
		return -errno;
	if (kick_fd < 0)
		worker->polled++;
	ring->armed = true;
	ring->empty_since = 0;
	ring_activate(worker, ring);
	return 0;
}

void ring_leave(struct worker *worker, struct ring *ring)
{
	ring_publish_all(worker);
	deactivate(worker, ring);
	if (ring->kick_fd >= 0)
		epoll_ctl(worker->epoll_fd, EPOLL_CTL_DEL, ring->kick_fd, NULL);
	else
		worker->polled--;
	ring->stop = NULL;
	ring->expired = false;
	worker->stopping--;
}

int ring_start(struct worker *worker, struct ring *ring, struct vfc_ring_setup *setup)
{
	struct vq vq;
	int error;

	if (ring->started)
		return -EBUSY;
	if (setup->role > VFC_RING_REQUEST)
		return -EINVAL;
	if (setup->features & (1ull << VIRTIO_SCSI_F_INOUT | 1ull << VIRTIO_SCSI_F_T10_PI))
		return -EOPNOTSUPP;
	error = vq_setup(&vq, setup->size, setup->features, setup->desc, setup->avail, setup->used);
	if (!error)
		error = vq_locate(&vq, worker->view->mem);
	if (!error)
		error = make_pool(ring, setup->size);
	if (!error) {
		memset(ring->places, 0, setup->size * sizeof(*ring->places));
		error = vq_begin(&vq, setup->base, ring->places);
	}
	if (!error)
		error = ring_listen(worker, ring, setup->kick_fd);
	if (error)
		return error;

	ring->vq = vq;
	ring->role = setup->role;
	replace_fd(&ring->kick_fd, setup->kick_fd);
	replace_fd(&ring->call_fd, setup->call_fd);
	replace_fd(&ring->err_fd, setup->err_fd);
	setup->kick_fd = setup->call_fd = setup->err_fd = -1;
	ring->broken = false;
	ring->started = true;
	ring->shallow = false;
	ring->gap = worker->poll_ns;
	ring->far = 0;
	if (ring->role == VFC_RING_EVENT)
		worker->event_ring = ring;
	return 0;
}

void ring_set_call(struct worker *worker, struct ring *ring, int fd)
{
	replace_fd(&ring->call_fd, fd);
	/* What was signalled to the old one may have gone nowhere: a front end swaps a masked notifier for the real. */
	if (ring->started) {
		signal_fd(fd);
		COUNT(worker, calls);
	}
}

void ring_set_err(struct ring *ring, int fd)
{
	replace_fd(&ring->err_fd, fd);
}

void ring_break(struct worker *worker, struct ring *ring, int error)
{
	if (ring->broken)
		return;
	ring->broken = true;
	COUNT(worker, broken_rings);
	signal_fd(ring->err_fd);
	worker_say(worker, VFC_EVENT_BROKEN, ring->index, error, 0);
}

void ring_publish_all(struct worker *worker)
{
	while (worker->dirty) {
		struct ring *ring = worker->dirty;

		worker->dirty = ring->next_dirty;
		ring->dirty = false;
		/* Who gets an answer may soon ask again. */
		ring->empty_since = 0;
		if (worker->poll_ns)
			ring_activate(worker, ring);
		if (ring->broken || !vq_publish(&ring->vq))
			continue;
		signal_fd(ring->call_fd);
		COUNT(worker, calls);
	}
}

static bool runs(const struct ring *ring)
{
	return ring->started && ring->enabled && !ring->broken && !ring->stop;
}

/* The event ring is not emptied ahead of events: it only says that there is something, once, if somebody waits. */
static void look_for_buffers(struct worker *worker, struct ring *ring)
{
	if (worker->hungry && vq_rearm(&ring->vq)) {
		worker->hungry = false;
		worker_say(worker, VFC_EVENT_BUFFERS, ring->index, 0, 0);
	}
}

static int take_control(struct worker *worker, struct ring *ring)
{
	uint16_t head;
	int more = 1;

	for (unsigned i = 0; i < BATCH && !ring->broken; i++) {
		more = vq_next(&ring->vq, &head);
		if (more <= 0)
			break;
		command_accept_control(worker, ring, head);
	}
	return more;
}

/*
 * Looking at an empty ring takes a CPU, perhaps from the device or the driver that is to fill it.  It pays for about as
 * long as the ring is mostly empty (a few times that: what comes later is better waited for), and not at all where that
 * is longer than anybody would look.  While the kernel has commands it is their ends that bring the next ones, so we
 * wake up anyway: then only a driver that answers at once is looked at.
 */
static uint64_t patience(const struct worker *worker, const struct ring *ring)
{
	uint64_t most = worker->poll_ns, least = most / 8, wanted = 4 * ring->gap;

	if (ring->far >= FAR || (worker->running && ring->gap > least))
		return 0;
	return wanted < least || worker->running ? least : wanted < most ? wanted : most;
}

void ring_tune(struct worker *worker, struct ring *ring)
{
	uint64_t gap = (ring->slept ? worker_now() : ring->looked) - ring->empty_since;

	ring->slept = false;
	ring->empty_since = 0;
	if (gap < worker->poll_ns) {
		ring->gap = (7 * ring->gap + gap) / 8;
		ring->far = 0;
	} else if (ring->far < FAR) {
		ring->far++;
	}
}

/*
 * Watch a ring closely for a moment, where nothing else is to be done.  A driver that has few commands mostly uses the
 * same memory for the next one: while the cache looks for the ring's, it can bring that as well.
 */
static bool watch(struct worker *worker, struct ring *ring)
{
	if (!worker->poll_ns || ring->role != VFC_RING_REQUEST || worker->running || worker->parked ||
	    worker->unsettled || worker->stopping || worker->draining || worker->credit < 0 ||
	    mailbox_presses(&worker->box) || worker_any_active(worker))
		return false;
	worker->credit -= WATCH / 4;
	for (unsigned i = 0; i < WATCH; i++) {
		if (!vq_waiting(&ring->vq))
			continue;
		ring->gap -= ring->gap / 8;	/* it was empty for a moment */
		__builtin_prefetch((const void *)(uintptr_t)ring->last_header);
		__builtin_prefetch((const void *)(uintptr_t)ring->last_answer, 1);
		return true;
	}
	return false;
}

/* Whether an empty ring is looked at again without a kick: while it is polled, or when something came after all. */
static bool goes_on(struct worker *worker, struct ring *ring)
{
	if (worker->poll_ns && ring->role == VFC_RING_REQUEST) {
		uint64_t now = worker_now();

		if (!ring->empty_since)
			ring->empty_since = now;
		ring->looked = now;
		if (worker->more || now - ring->empty_since < patience(worker, ring))
			return true;
		ring->slept = true;
	}
	ring->armed = true;
	return vq_rearm(&ring->vq);
}

/*
 * One batch, and those that come at once after it where nothing else is to be done.  The ring stays active until it was
 * found empty after its notifications were armed again.
 */
void ring_run(struct worker *worker, struct ring *ring)
{
	int more;

	deactivate(worker, ring);
	if (!runs(ring))
		return;
	if (guard_any_torn() && vq_torn(&ring->vq)) {
		ring_break(worker, ring, -EIO);
		return;
	}
	if (ring->role == VFC_RING_EVENT) {
		look_for_buffers(worker, ring);
		return;
	}
	if (ring->armed) {
		ring->armed = false;
		vq_suppress(&ring->vq);
	}
	do {
		more = ring->role == VFC_RING_CONTROL ? take_control(worker, ring) : intake_run(worker, ring);
		ring_publish_all(worker);
		deactivate(worker, ring);
	} while (!more && watch(worker, ring));
	if (more < 0)
		ring_break(worker, ring, more);
	else if (!ring->broken && (more || goes_on(worker, ring)))
		ring_activate(worker, ring);
}

uint32_t ring_put_event(struct worker *worker, const uint8_t event[EVENT_BYTES])
{
	struct ring *ring = worker->event_ring;

	/* Every pass takes a buffer or leaves, so a driver that feeds us bad ones cannot keep us here for long. */
	for (uint32_t passes = 0; ring && runs(ring) && passes <= ring->vq.size; passes++) {
		struct command *scratch;
		struct vq_chain *chain;
		uint16_t head;
		int taken = vq_next(&ring->vq, &head), error;

		if (taken < 0) {
			ring_break(worker, ring, taken);
			break;
		}
		if (!taken) {
			if (vq_rearm(&ring->vq))
				continue;
			break;
		}
		scratch = &ring->pool[head];
		chain = &scratch->chain;
		error = vq_gather(&ring->vq, worker->view, head, scratch->few, FEW_IOV,
				  ring->slab + (size_t)head * VQ_MAX_IOV, chain);
		ring_mark_dirty(worker, ring);
		if (error || chain->write_bytes < EVENT_BYTES) {
			if (error == -EFAULT)
				COUNT(worker, bad_address);
			else if (error == -EBADMSG)
				COUNT(worker, bad_indirect);
			else if (error)
				COUNT(worker, bad_chain);
			else
				COUNT(worker, bad_header);
			vq_push(&ring->vq, head, 0);
			continue;
		}
		iov_write(chain->iov + chain->readable, chain->writable, 0, event, EVENT_BYTES);
		vq_push(&ring->vq, head, EVENT_BYTES);
		vq_suppress(&ring->vq);
		return 1;
	}
	worker->hungry = true;
	return 0;
}

/* ---------------------------------------------------------------- stopping */

static void finish_stop(struct worker *worker, struct ring *ring)
{
	struct mail *mail = ring->stop;

	ring_leave(worker, ring);
	replace_fd(&ring->kick_fd, -1);
	if (worker->event_ring == ring)
		worker->event_ring = NULL;
	ring->started = false;
	mailbox_ack(&worker->box, mail, 0, vq_base(&ring->vq));
}

void ring_stop(struct worker *worker, struct ring *ring, struct mail *mail)
{
	if (ring_moves(ring))
		move_give_up(worker, ring, -ECANCELED);
	if (ring->stop) {
		mailbox_ack(&worker->box, mail, -EBUSY, 0);
	} else if (!ring->started) {
		mailbox_ack(&worker->box, mail, 0, vq_base(&ring->vq));
	} else {
		ring->stop = mail;
		ring->deadline = worker_now() + mail->msg.value * 1000000ull;
		worker->stopping++;
		worker->unsettled = true;
	}
}

void ring_kill_all(struct worker *worker, struct ring *ring)
{
	for (uint32_t head = 0; ring->in_flight && head < ring->pool_size; head++)
		if (ring->pool[head].state != COMMAND_FREE)
			command_kill(worker, &ring->pool[head], VIRTIO_SCSI_S_RESET, 0, true);
}

void ring_settle(struct worker *worker, struct ring *ring, uint64_t now)
{
	if (!ring->stop)
		return;
	if (ring->in_flight && now >= ring->deadline && !ring->expired) {
		if (ring_moves(ring)) {
			move_give_up(worker, ring, -ETIMEDOUT);
			return;
		}
		ring->expired = true;
		ring_kill_all(worker, ring);
	}
	if (ring->in_flight)
		return;
	if (ring_moves(ring))
		move_away(worker, ring);
	else
		finish_stop(worker, ring);
}

void ring_free(struct ring *ring)
{
	if (!ring)
		return;
	free(ring->stop);
	free_pool(ring);
	replace_fd(&ring->kick_fd, -1);
	replace_fd(&ring->call_fd, -1);
	replace_fd(&ring->err_fd, -1);
	free(ring);
}
