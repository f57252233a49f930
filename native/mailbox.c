/*
 * mailbox.c - the two lists and their doorbells.
 *
 * A doorbell is rung only when its list was empty; who answers it takes the whole list (the worker) or clears it
 * only after finding the list empty, under the lock (Python).  A ring too many is possible, a ring too few is not.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "guestmem.h"
#include "mailbox.h"
#include "medium.h"

static void ring_bell(int fd)
{
	uint64_t one = 1;

	/* EAGAIN: it is ringing already, 2^64 - 2 times */
	(void)!write(fd, &one, sizeof(one));
}

static void hush_bell(int fd)
{
	uint64_t count;

	(void)!read(fd, &count, sizeof(count));
}

int mailbox_open(struct mailbox *box)
{
	*box = (struct mailbox){ .lock = PTHREAD_MUTEX_INITIALIZER };
	box->last = &box->first;
	box->urgent_last = &box->urgent;
	box->punts_last = &box->punts;
	box->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	box->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return box->wake_fd < 0 || box->event_fd < 0 ? -errno : 0;
}

static void free_notes(struct note *note)
{
	while (note) {
		struct note *next = note->next;

		free(note);
		note = next;
	}
}

void mailbox_close(struct mailbox *box)
{
	for (struct mail *mail = box->first; mail;) {
		struct mail *next = mail->next;

		mail_drop(mail);
		mail = next;
	}
	free_notes(box->urgent);
	free_notes(box->punts);
	free(box->shown);
	if (box->wake_fd >= 0)
		close(box->wake_fd);
	if (box->event_fd >= 0)
		close(box->event_fd);
}

static void close_fd(int fd)
{
	if (fd >= 0)
		close(fd);
}

void mail_drop(struct mail *mail)
{
	if (mail->kind == MAIL_MESSAGE) {
		switch (mail->msg.kind) {
		case VFC_MSG_MEM:
			vfc_mem_put(mail->msg.mem);
			break;
		case VFC_MSG_ROUTE:
			vfc_medium_put(mail->msg.route.medium);
			break;
		case VFC_MSG_RING_START:
			close_fd(mail->msg.ring.kick_fd);
			close_fd(mail->msg.ring.call_fd);
			close_fd(mail->msg.ring.err_fd);
			break;
		case VFC_MSG_RING_CALL:
		case VFC_MSG_RING_ERR:
			close_fd(mail->msg.fd);
			break;
		}
	}
	free(mail);
}

void mailbox_post(struct mailbox *box, struct mail *mail)
{
	bool was_empty;

	mail->next = NULL;
	pthread_mutex_lock(&box->lock);
	was_empty = !box->first;
	*box->last = mail;
	box->last = &mail->next;
	if (mail->kind == MAIL_MESSAGE || mail->kind == MAIL_RING)
		atomic_store_explicit(&box->pressing, true, memory_order_relaxed);
	pthread_mutex_unlock(&box->lock);
	if (was_empty)
		ring_bell(box->wake_fd);
}

struct mail *mailbox_take(struct mailbox *box)
{
	struct mail *first;

	/* Before the list is taken: a mail that comes after that finds it empty and rings again. */
	hush_bell(box->wake_fd);
	pthread_mutex_lock(&box->lock);
	first = box->first;
	box->first = NULL;
	box->last = &box->first;
	atomic_store_explicit(&box->pressing, false, memory_order_relaxed);
	pthread_mutex_unlock(&box->lock);
	return first;
}

void mailbox_say(struct mailbox *box, struct note *note, bool urgent)
{
	struct note ***last = urgent ? &box->urgent_last : &box->punts_last;
	bool was_empty;

	note->next = NULL;
	pthread_mutex_lock(&box->lock);
	was_empty = !box->urgent && !box->punts;
	**last = note;
	*last = &note->next;
	pthread_mutex_unlock(&box->lock);
	if (was_empty)
		ring_bell(box->event_fd);
}

void mailbox_ack(struct mailbox *box, struct mail *mail, int32_t result, uint32_t value)
{
	mail->note.event = (struct vfc_event){
		.kind = VFC_EVENT_ACK,
		.seq = mail->msg.seq,
		.index = mail->msg.index,
		.result = result,
		.value = value,
	};
	mailbox_say(box, &mail->note, true);
}

static struct note *pop(struct note **first, struct note ***last)
{
	struct note *note = *first;

	if (note) {
		*first = note->next;
		if (!*first)
			*last = first;
	}
	return note;
}

struct note *mailbox_next(struct mailbox *box)
{
	struct note *note;

	pthread_mutex_lock(&box->lock);
	free(box->shown);
	note = pop(&box->urgent, &box->urgent_last);
	if (!note)
		note = pop(&box->punts, &box->punts_last);
	if (!note)
		hush_bell(box->event_fd);
	box->shown = note;
	pthread_mutex_unlock(&box->lock);
	return note;
}
