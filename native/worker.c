/*
 * worker.c - the thread: wait, take messages, run rings, reap paths, try what is parked, tell.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "worker.h"

/* Of a busy loop between two looks at what else there is: a command costs one, a turn of the loop TURN. */
#define CREDIT 512
#define TURN 4
#define EVENTS 64
/*
 * Ends that are taken from an engine at a time.  A disk mostly ends many together; when the first few are answered at
 * once, what their driver asks for next reaches the disk while the others' data is still being copied.
 */
#define REAP 4
#define TAG_MAILBOX VFC_MAX_RINGS
#define TAG_FILES (VFC_MAX_RINGS + 1)
#define TAG_SG (VFC_MAX_RINGS + 2)
#define NS_PER_MS 1000000ull

uint64_t worker_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

void worker_say(struct worker *worker, uint32_t kind, uint32_t index, int32_t result, uint32_t value)
{
	struct note *note = malloc(sizeof(*note));

	if (!note)
		return;
	note->event = (struct vfc_event){ .kind = kind, .index = index, .result = result, .value = value };
	mailbox_say(&worker->box, note, true);
}

/* ---------------------------------------------------------------- memory tables */

static bool all_in(const struct command *command, const struct vfc_mem *mem)
{
	uint32_t pieces = command->chain.readable + command->chain.writable;

	for (uint32_t i = 0; i < pieces; i++) {
		const struct vfc_map *map = mem_of_host(command->view->mem, command->chain.iov[i].iov_base);

		/* A piece that was trimmed to nothing may lie one past its region. */
		if (command->chain.iov[i].iov_len && (!map || !mem_has(mem, map)))
			return false;
	}
	return true;
}

/* A command that only uses regions which the new table has as well belongs to it from now on. */
static void move_commands(struct worker *worker, struct ring *ring)
{
	for (uint32_t head = 0; ring->in_flight && head < ring->pool_size; head++) {
		struct command *command = &ring->pool[head];

		if (command->state == COMMAND_FREE || !all_in(command, worker->view->mem))
			continue;
		command->view->users--;
		command->view = worker->view;
		command->view->users++;
	}
}

static void set_table(struct worker *worker, struct mail *mail)
{
	struct view *view = calloc(1, sizeof(*view)), *old = worker->view;

	if (!view) {
		vfc_mem_put(mail->msg.mem);
		mailbox_ack(&worker->box, mail, -ENOMEM, 0);
		return;
	}
	ring_publish_all(worker);
	view->mem = mail->msg.mem;
	worker->view = view;
	for (uint32_t i = 0; i < VFC_MAX_RINGS; i++) {
		struct ring *ring = worker->rings[i];

		if (!ring || !ring->started)
			continue;
		if (!ring->broken && vq_locate(&ring->vq, view->mem))
			ring_break(worker, ring, -EFAULT);
		move_commands(worker, ring);
	}
	old->ack = mail;
	old->next = worker->old_views;
	worker->old_views = old;
	worker->unsettled = true;
}

static void settle_views(struct worker *worker)
{
	struct view **link = &worker->old_views;

	while (*link) {
		struct view *view = *link;
		struct mail *mail = view->ack;

		if (view->users) {
			link = &view->next;
			continue;
		}
		*link = view->next;
		vfc_mem_put(view->mem);
		free(view);
		mailbox_ack(&worker->box, mail, 0, 0);
	}
}

/* ---------------------------------------------------------------- abort, query */

static bool matches(const struct command *command, const struct vfc_match *match)
{
	uint64_t tag;

	if (command->state == COMMAND_FREE || command->doomed)
		return false;
	memcpy(&tag, command->header + 8, sizeof(tag));
	return !((match->flags & VFC_MATCH_TARGET && command->target != match->target) ||
		 (match->flags & VFC_MATCH_LUN && command->lun != match->lun) ||
		 (match->flags & VFC_MATCH_TAG && tag != match->tag) ||
		 (match->flags & VFC_MATCH_HELD && command->state != COMMAND_HELD));
}

static void abort_or_query(struct worker *worker, struct mail *mail)
{
	const struct vfc_match *match = &mail->msg.match;
	uint32_t count = 0;

	mail->waiting = 0;
	mail->kept = false;
	for (uint32_t i = 0; i < VFC_MAX_RINGS; i++) {
		struct ring *ring = worker->rings[i];

		if (!ring || ring->role != VFC_RING_REQUEST)
			continue;
		for (uint32_t head = 0; ring->in_flight && head < ring->pool_size; head++) {
			struct command *command = &ring->pool[head];

			if (!matches(command, match))
				continue;
			count++;
			if (mail->msg.kind == VFC_MSG_ABORT && !command_kill(worker, command, match->response, 0, false)) {
				command->waiter = mail;
				mail->waiting++;
			}
		}
	}
	ring_publish_all(worker);
	mail->msg.value = count;
	if (!mail->waiting)
		mailbox_ack(&worker->box, mail, 0, count);
}

/* ---------------------------------------------------------------- messages */

static int reset(struct worker *worker)
{
	for (uint32_t i = 0; i < VFC_MAX_RINGS; i++)
		if (worker->rings[i] && worker->rings[i]->started)
			return -EBUSY;
	for (uint32_t i = 0; i < VFC_MAX_RINGS; i++) {
		struct ring *ring = worker->rings[i];

		if (!ring)
			continue;
		ring->enabled = ring->broken = false;
		ring->vq = (struct vq){ 0 };
	}
	worker->hungry = false;
	return 0;
}

static int ring_message(struct worker *worker, struct ring *ring, struct vfc_msg *msg)
{
	int fd = msg->fd;

	switch (msg->kind) {
	case VFC_MSG_RING_START:
		return ring_start(worker, ring, &msg->ring);
	case VFC_MSG_RING_ENABLE:
		ring->enabled = msg->value;
		/* The kick may be past: whoever enables wants us to look. */
		ring_activate(worker, ring);
		return 0;
	case VFC_MSG_RING_CALL:
		msg->fd = -1;
		ring_set_call(worker, ring, fd);
		return 0;
	default:	/* VFC_MSG_RING_ERR */
		msg->fd = -1;
		ring_set_err(ring, fd);
		return 0;
	}
}

static void close_fds(struct vfc_ring_setup *setup)
{
	int fds[] = { setup->kick_fd, setup->call_fd, setup->err_fd };

	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
		if (fds[i] >= 0)
			close(fds[i]);
}

static void message(struct worker *worker, struct mail *mail)
{
	struct vfc_msg *msg = &mail->msg;
	struct ring *ring;
	uint32_t value = 0;
	int error = 0;

	switch (msg->kind) {
	case VFC_MSG_MEM:
		set_table(worker, mail);
		return;
	case VFC_MSG_ROUTE:
		route_message(worker, mail);
		return;
	case VFC_MSG_ABORT:
	case VFC_MSG_QUERY:
		abort_or_query(worker, mail);
		return;
	case VFC_MSG_RING_START:
	case VFC_MSG_RING_ENABLE:
	case VFC_MSG_RING_CALL:
	case VFC_MSG_RING_ERR:
		error = ring_get(worker, msg->index, &ring);
		if (!error)
			error = ring_message(worker, ring, msg);
		if (msg->kind == VFC_MSG_RING_START)
			close_fds(&msg->ring);
		else if (msg->kind != VFC_MSG_RING_ENABLE && msg->fd >= 0)
			close(msg->fd);
		break;
	case VFC_MSG_RING_STOP:
		error = ring_get(worker, msg->index, &ring);
		if (!error) {
			ring_stop(worker, ring, mail);
			return;
		}
		break;
	case VFC_MSG_TARGET:
		if (msg->index < 256)
			worker->targets[msg->index] = msg->value;
		else
			error = -EINVAL;
		worker->recent = NULL;
		break;
	case VFC_MSG_EVENT:
		value = ring_put_event(worker, msg->event);
		ring_publish_all(worker);
		break;
	case VFC_MSG_RESET:
		error = reset(worker);
		break;
	case VFC_MSG_RING_MOVE:
		move_message(worker, mail);
		return;
	default:	/* VFC_MSG_PING: vfc_post() lets no others through */
		break;
	}
	mailbox_ack(&worker->box, mail, error, value);
}

static void messages(struct worker *worker)
{
	struct mail *mail = mailbox_take(&worker->box), *next;

	for (; mail; mail = next) {
		next = mail->next;
		switch (mail->kind) {
		case MAIL_MESSAGE:
			message(worker, mail);
			break;
		case MAIL_RING:
			move_arrive(worker, mail);
			break;
		case MAIL_QUIT:
			worker->quit = true;
			free(mail);
			break;
		default:
			command_reply(worker, mail);
			free(mail);
		}
	}
}

/* ---------------------------------------------------------------- the loop */

static unsigned reap(struct worker *worker, struct vfc_path_engine *engine)
{
	struct vfc_cmd *done[REAP];
	unsigned count = engine->ops->reap(engine, done, REAP);

	if (count)
		move_took(worker);
	if (count == REAP)
		worker->more = true;
	for (unsigned i = 0; i < count; i++) {
		struct command *command = (struct command *)done[i];	/* its first member */

		worker->running--;
		command->state = COMMAND_FREE;
		command_finish(worker, command);
	}
	return count;
}

/* A ring with many commands does not keep one waiting that has few, and is looked at all the time. */
static unsigned fair_batch(const struct worker *worker)
{
	unsigned rings = 0, shallow = 0;

	for (uint32_t i = 0; i < VFC_MAX_RINGS / 64; i++)
		for (uint64_t bits = worker->active[i]; bits; bits &= bits - 1) {
			rings++;
			shallow += worker->rings[i * 64 + (uint32_t)__builtin_ctzll(bits)]->shallow;
		}
	return rings > 1 && shallow ? SMALL_BATCH : BATCH;
}

static void run_active(struct worker *worker)
{
	worker->batch = fair_batch(worker);
	for (uint32_t i = 0; i < VFC_MAX_RINGS / 64; i++)
		for (uint64_t bits = worker->active[i]; bits; bits &= bits - 1) {
			uint32_t index = i * 64 + (uint32_t)__builtin_ctzll(bits);

			ring_run(worker, worker->rings[index]);
		}
}

static void settle(struct worker *worker)
{
	uint64_t now = worker->stopping ? worker_now() : 0;

	worker->unsettled = false;
	for (uint32_t i = 0; worker->stopping && i < VFC_MAX_RINGS; i++)
		if (worker->rings[i])
			ring_settle(worker, worker->rings[i], now);
	ring_publish_all(worker);
	route_settle(worker);
	settle_views(worker);
}

static int patience(const struct worker *worker)
{
	uint64_t now, first = UINT64_MAX;

	if (!TAILQ_EMPTY(&worker->loose))
		return 0;
	if (worker->parked || worker->polled || worker->files->unsent)
		return 1;
	if (!worker->stopping)
		return -1;
	now = worker_now();
	for (uint32_t i = 0; i < VFC_MAX_RINGS; i++) {
		const struct ring *ring = worker->rings[i];

		if (ring && ring->stop && !ring->expired && ring->deadline < first)
			first = ring->deadline;
	}
	if (first == UINT64_MAX)
		return -1;
	first = first > now ? (first - now + NS_PER_MS - 1) / NS_PER_MS : 0;
	return first > 1000 ? 1000 : (int)first;
}

static void wait_for_work(struct worker *worker, int timeout)
{
	struct epoll_event events[EVENTS];
	int count;

	if (worker->peer_count > 1 && timeout)
		move_rest(worker);
	count = epoll_wait(worker->epoll_fd, events, EVENTS, timeout);
	if (worker->peer_count > 1)
		move_look(worker);
	worker->credit = CREDIT;
	for (int i = 0; i < count; i++) {
		uint32_t tag = events[i].data.u32;

		if (tag < VFC_MAX_RINGS) {
			COUNT(worker, kicks);
			ring_activate(worker, worker->rings[tag]);
		} else if (tag == TAG_MAILBOX) {
			messages(worker);
		}
	}
	if (worker->polled)
		for (uint32_t i = 0; i < VFC_MAX_RINGS; i++)
			if (worker->rings[i] && worker->rings[i]->started && worker->rings[i]->kick_fd < 0)
				ring_activate(worker, worker->rings[i]);
}

struct vfc_path_engine *worker_sg(struct worker *worker)
{
	struct epoll_event completions = { .events = EPOLLIN, .data.u32 = TAG_SG };

	if (worker->sg || path_sg_new(&worker->sg))
		return worker->sg;
	epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, worker->sg->ops->wait_fd(worker->sg), &completions);
	return worker->sg;
}

/* Nothing of ours may be under way in the kernel when the thread ends, but what needs nothing of ours (path_sg.c). */
static void wind_up(struct worker *worker)
{
	const struct vfc_path_ops *ops = worker->files->ops;

	for (uint32_t i = 0; i < VFC_MAX_RINGS; i++)
		if (worker->rings[i])
			ring_kill_all(worker, worker->rings[i]);
	ring_publish_all(worker);
	while (!ops->idle(worker->files)) {
		struct pollfd waiting = { .fd = ops->wait_fd(worker->files), .events = POLLIN };

		ops->flush(worker->files);
		poll(&waiting, 1, 10);
		reap(worker, worker->files);
	}
	ring_publish_all(worker);
}

void *worker_main(void *argument)
{
	struct worker *worker = argument;
	struct epoll_event mailbox = { .events = EPOLLIN, .data.u32 = TAG_MAILBOX };
	struct epoll_event completions = { .events = EPOLLIN, .data.u32 = TAG_FILES };
	const struct vfc_path_ops *files = worker->files->ops;

	worker->parked_last = &worker->parked;
	TAILQ_INIT(&worker->loose);
	worker->pace.since = worker_now();
	epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, worker->box.wake_fd, &mailbox);
	epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, files->wait_fd(worker->files), &completions);
	while (!worker->quit) {
		bool busy = worker_any_active(worker) || worker->more;

		if (!busy)
			wait_for_work(worker, patience(worker));
		else if ((worker->credit -= TURN) < 0 || mailbox_presses(&worker->box))
			wait_for_work(worker, 0);
		run_active(worker);
		files->flush(worker->files);
		worker->more = false;
		reap(worker, worker->files);
		if (worker->sg)
			reap(worker, worker->sg);
		/* What was reaped may be what others waited for: they go before what comes new. */
		if (worker->parked)
			command_retry(worker, worker_now());
		order_let_go(worker);
		/* Those, and the rest of what was reaped half done. */
		files->flush(worker->files);
		ring_publish_all(worker);
		if (worker->unsettled || worker->draining || worker->stopping)
			settle(worker);
		if (worker->peer_count > 1)
			move_rest(worker);
	}
	wind_up(worker);
	return NULL;
}

void worker_free(struct worker *worker)
{
	struct mail *mail = mailbox_take(&worker->box), *next;

	for (uint32_t i = 0; i < VFC_MAX_RINGS; i++)
		ring_free(worker->rings[i]);
	for (; mail; mail = next) {
		next = mail->next;
		if (mail->kind == MAIL_RING)
			ring_free(mail->ring);
		mail_drop(mail);
	}
	route_free_all(worker);
	if (worker->sg)
		path_sg_free(worker->sg);
	while (worker->old_views) {
		struct view *view = worker->old_views;

		worker->old_views = view->next;
		vfc_mem_put(view->mem);
		free(view->ack);
		free(view);
	}
	if (worker->view) {
		vfc_mem_put(worker->view->mem);
		free(worker->view);
	}
	if (worker->live)
		munmap((void *)worker->live, HANDLE_SLOTS * sizeof(*worker->live));
	if (worker->epoll_fd >= 0)
		close(worker->epoll_fd);
	mailbox_close(&worker->box);
}
