/*
 * mailbox.h - messages between Python and one worker, both ways; and rings that go from worker to worker.
 *
 * A lock guards each list, held for a few instructions and never while anything else is done; no I/O takes it.
 */
#ifndef VFC_MAILBOX_H
#define VFC_MAILBOX_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "vhostfc.h"

/* What a worker says: an event, and the bytes that go with it behind it in one allocation. */
struct note {
	struct note *next;
	struct vfc_event event;
};

enum mail_kind { MAIL_MESSAGE, MAIL_REPLY, MAIL_REPLY_CONTROL, MAIL_RING, MAIL_QUIT };

struct ring;

/*
 * What a worker is told.  It becomes its own acknowledgement, so an ack needs no memory that might not be there:
 * the note comes first, and whoever frees the note frees the mail.
 */
struct mail {
	struct note note;
	struct mail *next;
	enum mail_kind kind;
	uint32_t waiting;	/* ABORT: commands that have yet to come back */
	bool kept;		/* ABORT: one of them was answered without the device */
	struct vfc_msg msg;	/* MAIL_MESSAGE: fds are dup'ed, mem and medium held */
	struct vfc_answer answer;	/* MAIL_REPLY*: sense and data_in point behind the mail */
	struct ring *ring;	/* MAIL_RING: from another worker, which has no more to do with it; ->msg as that was told */
};

struct mailbox {
	pthread_mutex_t lock;
	/* to the worker */
	struct mail *first, **last;
	int wake_fd;
	atomic_bool pressing;	/* there is a message among them: others wait until it is in force */
	/* to Python: what cannot wait overtakes the punts */
	struct note *urgent, **urgent_last;
	struct note *punts, **punts_last;
	struct note *shown;	/* what vfc_next() gave last; its bytes are still being looked at */
	int event_fd;
};

/* mailbox_close() is due even after an error. */
int mailbox_open(struct mailbox *box);
void mailbox_close(struct mailbox *box);

void mailbox_post(struct mailbox *box, struct mail *mail);
/* Whether a message waits; for a busy worker, which does not ask wake_fd each time. */
static inline bool mailbox_presses(const struct mailbox *box)
{
	return atomic_load_explicit(&box->pressing, memory_order_relaxed);
}
/* All that came, oldest first; clears wake_fd. */
struct mail *mailbox_take(struct mailbox *box);
/* Lets go of what an unprocessed mail holds. */
void mail_drop(struct mail *mail);

void mailbox_say(struct mailbox *box, struct note *note, bool urgent);
/* The mail's ack. */
void mailbox_ack(struct mailbox *box, struct mail *mail, int32_t result, uint32_t value);
/* The next note, or NULL (and event_fd is cleared).  A note stays valid until the next call. */
struct note *mailbox_next(struct mailbox *box);

#endif
