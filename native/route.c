/*
 * route.c - where (target, lun) leads, and draining what was replaced.
 *
 * The fabric sends GOOD for a PERSISTENT RESERVE OUT only after this worker's ack, so an ack means: no I/O that was
 * admitted under the old route can still touch the medium.  Commands with Python are not waited for: they carry
 * their epoch to the fabric, which looks at it itself (and one of them may be the very command that waits for us).
 */
#include <errno.h>
#include <stdlib.h>

#include "worker.h"

static struct route **slot(struct worker *worker, uint8_t target, uint16_t lun)
{
	struct route_pages *pages = worker->routes[target];
	struct route_page *page;

	if (!pages) {
		pages = calloc(1, sizeof(*pages));
		if (!pages)
			return NULL;
		worker->routes[target] = pages;
	}
	page = pages->page[lun >> 8];
	if (!page) {
		page = calloc(1, sizeof(*page));
		if (!page)
			return NULL;
		pages->page[lun >> 8] = page;
	}
	return &page->route[lun & 0xff];
}

/* Takes the medium of the message. */
static struct route *make(struct worker *worker, struct vfc_route *wish)
{
	struct route *route = calloc(1, sizeof(*route));
	struct vfc_medium *medium = wish->medium;
	bool read_only;

	if (!route)
		return NULL;
	wish->medium = NULL;
	route->target = wish->target;
	route->lun = wish->lun;
	route->path.nexus = wish->nexus;
	route->path.epoch = wish->epoch;
	route->path.medium = medium;
	if (!medium)
		return route;
	for (size_t i = 0; i < sizeof(route->mask); i++)
		route->mask[i] = wish->mask[i];
	if (medium->kind == VFC_MEDIUM_SG) {
		route->path.engine = worker_sg(worker);
		if (route->path.engine && !route->path.engine->ops->open(route->path.engine, &route->path, worker->index))
			return route;
		vfc_medium_put(medium);
		free(route);
		return NULL;
	}
	route->path.engine = medium->kind == VFC_MEDIUM_MEMORY || medium->kind == VFC_MEDIUM_NULL ? worker->media :
												      worker->files;
	read_only = wish->flags & VFC_ROUTE_READ_ONLY;
	/* Who finds no place to write from leaves writes to the fabric. */
	if (medium->kind == VFC_MEDIUM_MEMORY && !read_only)
		read_only = !latch_place(medium->latch, medium->owner, worker->index, &route->path.redo);
	vscsi_limit_mask(route->mask, read_only);
	return route;
}

static void free_route(struct route *route)
{
	if (!route)
		return;
	if (route->path.own)
		route->path.engine->ops->close(route->path.engine, &route->path);
	vfc_medium_put(route->path.medium);
	free(route->path.holders);
	free(route);
}

/* What is under way on the old route: finished, or answered at once; what is parked goes where the new one leads. */
static void turn_over(struct worker *worker, struct route *old, uint8_t in_flight)
{
	/* TAS is set: who is aborted by another nexus is told by status, and does it again (SAM-5 5.3.1). */
	uint8_t response = in_flight == VFC_ABORT_ABORTED ? VIRTIO_SCSI_S_OK : VIRTIO_SCSI_S_RESET;
	uint8_t status = in_flight == VFC_ABORT_ABORTED ? SAM_TASK_ABORTED : 0;
	struct command *command, *next;

	for (command = worker->parked; command; command = next) {
		next = command->next;
		if (command->route != old)
			continue;
		if (in_flight == VFC_FINISH) {
			command_unpark(worker, command);
			if (vscsi_dispatch(worker, command))
				command_submit(worker, command);
		} else {
			command_kill(worker, command, response, status, true);
		}
	}
	if (in_flight == VFC_FINISH)
		return;
	for (uint32_t i = 0; i < VFC_MAX_RINGS && old->commands; i++) {
		struct ring *ring = worker->rings[i];

		for (uint32_t head = 0; ring && ring->in_flight && head < ring->pool_size; head++) {
			command = &ring->pool[head];
			if (command->state == COMMAND_RUNNING && command->route == old)
				command_kill(worker, command, response, status, true);
		}
	}
}

static bool is_draining(const struct worker *worker, uint8_t target, uint16_t lun)
{
	for (const struct route *route = worker->draining; route; route = route->next)
		if (route->target == target && route->lun == lun)
			return true;
	return false;
}

void route_message(struct worker *worker, struct mail *mail)
{
	struct vfc_route *wish = &mail->msg.route;
	struct route **at, **link, *old, *new = NULL;

	if (wish->lun >= LUNS || wish->in_flight > VFC_ABORT_ABORTED) {
		vfc_medium_put(wish->medium);
		mailbox_ack(&worker->box, mail, -EINVAL, 0);
		return;
	}
	worker->recent = NULL;
	at = slot(worker, wish->target, wish->lun);
	old = at ? *at : NULL;
	/* Nothing to drain but what is draining already: an empty route waits its turn behind that. */
	if (at && !old && is_draining(worker, wish->target, wish->lun)) {
		old = calloc(1, sizeof(*old));
		if (!old)
			at = NULL;
		else
			*old = (struct route){ .target = wish->target, .lun = wish->lun };
	}
	if (at && !(wish->flags & VFC_ROUTE_GONE)) {
		new = make(worker, wish);
		if (!new) {
			if (old != *at)
				free(old);
			at = NULL;
		}
	}
	vfc_medium_put(wish->medium);
	if (!at) {
		mailbox_ack(&worker->box, mail, -ENOMEM, 0);
		return;
	}
	*at = new;
	if (!old) {
		mailbox_ack(&worker->box, mail, 0, 0);
		return;
	}
	old->ack = mail;
	for (link = &worker->draining; *link; link = &(*link)->next)
		;
	*link = old;
	turn_over(worker, old, wish->in_flight);
	worker->unsettled = true;
}

void route_settle(struct worker *worker)
{
	struct route **link = &worker->draining;

	while (*link) {
		struct route *route = *link, *before = worker->draining;
		bool held = route->commands || route->path.busy;

		/* An ack speaks for all that came before it, too. */
		for (; before != route && !held; before = before->next)
			held = before->target == route->target && before->lun == route->lun;
		if (held) {
			link = &route->next;
			continue;
		}
		*link = route->next;
		if (route->path.engine && route->path.engine->ops->leave)
			route->path.engine->ops->leave(route->path.engine, &route->path);
		/* First the medium, then the ack: after it the fabric may count on our hold being gone. */
		struct mail *mail = route->ack;

		free_route(route);
		mailbox_ack(&worker->box, mail, 0, 0);
	}
}

void route_free_all(struct worker *worker)
{
	while (worker->draining) {
		struct route *route = worker->draining;

		worker->draining = route->next;
		free(route->ack);
		free_route(route);
	}
	for (uint32_t target = 0; target < 256; target++) {
		struct route_pages *pages = worker->routes[target];

		for (uint32_t i = 0; pages && i < LUNS / 256; i++) {
			for (uint32_t lun = 0; pages->page[i] && lun < 256; lun++)
				free_route(pages->page[i]->route[lun]);
			free(pages->page[i]);
		}
		free(pages);
		worker->routes[target] = NULL;
	}
}
