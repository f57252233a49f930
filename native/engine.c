/*
 * engine.c - the functions that Python calls.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "worker.h"

#define MAX_WORKERS 64

struct vfc_engine {
	struct ration ration;
	uint32_t count;
	bool uring;
	struct worker workers[];
};

/* ---------------------------------------------------------------- beginning and end */

static int open_worker(struct vfc_engine *engine, struct worker *worker, uint32_t index, uint32_t count)
{
	void *live;
	int error;

	worker->index = index;
	worker->ration = &engine->ration;
	worker->peers = engine->workers;
	worker->peer_count = count;
	worker->media = path_media_engine();
	worker->epoll_fd = -1;
	error = mailbox_open(&worker->box);
	if (error)
		return error;
	worker->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (worker->epoll_fd < 0)
		return -errno;
	live = mmap(NULL, HANDLE_SLOTS * sizeof(*worker->live), PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (live == MAP_FAILED)
		return -errno;
	worker->live = live;
	/* A table without regions stands in until there is one. */
	worker->view = calloc(1, sizeof(*worker->view));
	if (!worker->view)
		return -ENOMEM;
	return vfc_mem_new(NULL, 0, &worker->view->mem);
}

static void free_files(struct vfc_engine *engine)
{
	for (uint32_t i = 0; i < engine->count; i++) {
		struct worker *worker = &engine->workers[i];

		if (!worker->files)
			continue;
		if (engine->uring)
			path_uring_free(worker->files);
		else
			path_pool_free(worker->files);
		worker->files = NULL;
	}
}

static int open_files(struct vfc_engine *engine, bool uring)
{
	int error = 0;

	engine->uring = uring;
	for (uint32_t i = 0; i < engine->count && !error; i++)
		error = uring ? path_uring_new(&engine->workers[i].files) : path_pool_new(&engine->workers[i].files);
	if (error)
		free_files(engine);
	return error;
}

/* Signals are Python's, but for those that a thread causes itself. */
static int start_thread(struct worker *worker)
{
	sigset_t all, before;
	int error;

	sigfillset(&all);
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGFPE);
	sigdelset(&all, SIGILL);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&worker->thread, NULL, worker_main, worker);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!error) {
		worker->started = true;
		pthread_setname_np(worker->thread, "vhostfc-worker");
	}
	return -error;
}

int vfc_engine_new(const struct vfc_engine_setup *setup, struct vfc_engine **ret_engine)
{
	struct vfc_engine *engine;
	int error = 0;

	if (!setup->workers || setup->workers > MAX_WORKERS || setup->flags & ~(uint32_t)VFC_ENGINE_NO_URING)
		return -EINVAL;
	engine = calloc(1, sizeof(*engine) + setup->workers * sizeof(engine->workers[0]));
	if (!engine)
		return -ENOMEM;
	engine->ration.max_punts = setup->max_punts;
	engine->ration.max_bytes = setup->max_punt_bytes;
	engine->ration.max_transfer = setup->max_transfer;
	for (; engine->count < setup->workers && !error; engine->count++)
		error = open_worker(engine, &engine->workers[engine->count], engine->count, setup->workers);
	for (uint32_t i = 0; i < engine->count; i++)
		engine->workers[i].poll_ns = setup->poll_us * 1000ull;
	if (!error && (setup->flags & VFC_ENGINE_NO_URING || open_files(engine, true)))
		error = open_files(engine, false);
	for (uint32_t i = 0; i < setup->workers && !error; i++)
		error = start_thread(&engine->workers[i]);
	if (error) {
		vfc_engine_free(engine, UINT32_MAX);
		return error;
	}
	*ret_engine = engine;
	return 0;
}

static void after(struct timespec *ret_time, uint32_t ms)
{
	clock_gettime(CLOCK_REALTIME, ret_time);
	ret_time->tv_sec += ms / 1000;
	ret_time->tv_nsec += ms % 1000 * 1000000l;
	if (ret_time->tv_nsec >= 1000000000l) {
		ret_time->tv_nsec -= 1000000000l;
		ret_time->tv_sec++;
	}
}

int vfc_engine_free(struct vfc_engine *engine, uint32_t grace_ms)
{
	struct timespec deadline;
	bool hung = false;

	if (!engine)
		return 0;
	for (uint32_t i = 0; i < engine->count; i++) {
		struct worker *worker = &engine->workers[i];
		struct mail *quit;

		if (!worker->started || worker->joined)
			continue;
		quit = calloc(1, sizeof(*quit));
		if (!quit)
			return -ENOMEM;
		quit->kind = MAIL_QUIT;
		mailbox_post(&worker->box, quit);
	}
	after(&deadline, grace_ms);
	for (uint32_t i = 0; i < engine->count; i++) {
		struct worker *worker = &engine->workers[i];

		if (!worker->started || worker->joined)
			continue;
		if (pthread_timedjoin_np(worker->thread, NULL, &deadline))
			hung = true;
		else
			worker->joined = true;
	}
	/* A thread that lives may still use any of it. */
	if (hung)
		return -ETIMEDOUT;
	free_files(engine);
	for (uint32_t i = 0; i < engine->count; i++)
		worker_free(&engine->workers[i]);
	free(engine);
	return 0;
}

int vfc_pin(struct vfc_engine *engine, uint32_t index, uint32_t cpu)
{
	cpu_set_t cpus;

	if (index >= engine->count || cpu >= CPU_SETSIZE)
		return -EINVAL;
	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	return -pthread_setaffinity_np(engine->workers[index].thread, sizeof(cpus), &cpus);
}

int vfc_uses_uring(struct vfc_engine *engine)
{
	return engine->uring;
}

int vfc_fd(struct vfc_engine *engine, uint32_t index)
{
	return index < engine->count ? engine->workers[index].box.event_fd : -EINVAL;
}

/* ---------------------------------------------------------------- messages to a worker */

static int keep_fd(int32_t *fd)
{
	if (*fd < 0) {
		*fd = -1;
		return 0;
	}
	*fd = fcntl(*fd, F_DUPFD_CLOEXEC, 0);
	return *fd < 0 ? -errno : 0;
}

/* Replaces what the caller lends by what the mail owns. */
static int keep(struct vfc_msg *msg)
{
	struct vfc_ring_setup *ring = &msg->ring;
	int32_t fds[3] = { ring->kick_fd, ring->call_fd, ring->err_fd };
	int error;

	switch (msg->kind) {
	case VFC_MSG_MEM:
		mem_hold(msg->mem);
		return 0;
	case VFC_MSG_ROUTE:
		if (msg->route.medium)
			medium_hold(msg->route.medium);
		return 0;
	case VFC_MSG_RING_CALL:
	case VFC_MSG_RING_ERR:
		return keep_fd(&msg->fd);
	case VFC_MSG_RING_START:
		ring->kick_fd = ring->call_fd = ring->err_fd = -1;
		error = keep_fd(&fds[0]);
		if (error)
			return error;
		ring->kick_fd = fds[0];
		error = keep_fd(&fds[1]);
		if (error)
			return error;
		ring->call_fd = fds[1];
		error = keep_fd(&fds[2]);
		if (error)
			return error;
		ring->err_fd = fds[2];
		return 0;
	}
	return 0;
}

int vfc_post(struct vfc_engine *engine, uint32_t index, const struct vfc_msg *msg)
{
	struct mail *mail;
	int error;

	if (index >= engine->count || msg->kind < VFC_MSG_PING || msg->kind > VFC_MSG_RING_MOVE)
		return -EINVAL;
	if (msg->kind == VFC_MSG_MEM && !msg->mem)
		return -EINVAL;
	mail = calloc(1, sizeof(*mail));
	if (!mail)
		return -ENOMEM;
	mail->kind = MAIL_MESSAGE;
	mail->msg = *msg;
	error = keep(&mail->msg);
	if (error) {
		mail_drop(mail);
		return error;
	}
	mailbox_post(&engine->workers[index].box, mail);
	return 0;
}

/* ---------------------------------------------------------------- events from a worker */

int vfc_next(struct vfc_engine *engine, uint32_t index, struct vfc_event *ret_event)
{
	struct worker *worker;
	struct note *note;

	if (index >= engine->count)
		return -EINVAL;
	worker = &engine->workers[index];
	while ((note = mailbox_next(&worker->box))) {
		const struct vfc_event *event = &note->event;

		/* Ended before anybody saw it: the ack that says so may already have overtaken it. */
		if ((event->kind == VFC_EVENT_PUNT || event->kind == VFC_EVENT_CONTROL) &&
		    atomic_load(&worker->live[HANDLE_SLOT(event->handle)]) != HANDLE_GENERATION(event->handle))
			continue;
		*ret_event = *event;
		return 1;
	}
	return 0;
}

static int reply(struct vfc_engine *engine, const struct vfc_answer *answer, enum mail_kind kind)
{
	uint32_t generation = HANDLE_GENERATION(answer->handle);
	uint32_t sense_length = answer->sense_length < SENSE_ROOM ? answer->sense_length : SENSE_ROOM;
	struct worker *worker;
	struct mail *mail;
	uint8_t *bytes;

	if (HANDLE_WORKER(answer->handle) >= engine->count ||
	    HANDLE_CONTROL(answer->handle) != (kind == MAIL_REPLY_CONTROL))
		return -EINVAL;
	worker = &engine->workers[HANDLE_WORKER(answer->handle)];
	mail = malloc(sizeof(*mail) + sense_length + answer->data_in_length);
	if (!mail)
		return -ENOMEM;
	mail->kind = kind;
	mail->answer = *answer;
	mail->answer.sense_length = sense_length;
	bytes = (uint8_t *)(mail + 1);
	mail->answer.sense = bytes;
	mail->answer.data_in = bytes + sense_length;
	if (sense_length)
		memcpy(bytes, answer->sense, sense_length);
	if (answer->data_in_length)
		memcpy(bytes + sense_length, answer->data_in, answer->data_in_length);
	/* Whoever takes the generation away answers the command; the worker does so when it ends one itself. */
	if (!generation || !atomic_compare_exchange_strong(&worker->live[HANDLE_SLOT(answer->handle)], &generation, 0)) {
		free(mail);
		return -ESTALE;
	}
	mailbox_post(&worker->box, mail);
	return 0;
}

int vfc_reply(struct vfc_engine *engine, const struct vfc_answer *answer)
{
	return reply(engine, answer, MAIL_REPLY);
}

int vfc_reply_control(struct vfc_engine *engine, uint64_t handle, const uint8_t *bytes, uint32_t length)
{
	struct vfc_answer answer = { .handle = handle, .data_in = bytes, .data_in_length = length };

	return reply(engine, &answer, MAIL_REPLY_CONTROL);
}

int vfc_stats(struct vfc_engine *engine, uint32_t index, struct vfc_stats *ret_stats)
{
	const uint64_t *from;
	uint64_t *to = (uint64_t *)ret_stats;

	if (index >= engine->count)
		return -EINVAL;
	from = (const uint64_t *)&engine->workers[index].stats;
	for (size_t i = 0; i < sizeof(*ret_stats) / sizeof(*to); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
	return 0;
}

int vfc_work(struct vfc_engine *engine, uint32_t index, uint64_t *ret_work)
{
	if (index >= engine->count)
		return -EINVAL;
	for (size_t i = 0; i < VFC_MAX_RINGS; i++)
		ret_work[i] = __atomic_load_n(&engine->workers[index].work[i], __ATOMIC_RELAXED);
	return 0;
}
