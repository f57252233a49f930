/*
 * bounce.h - an I/O on its way to a file, with a buffer of its own.
 *
 * The kernel never sees guest memory here: a command can be answered and its memory given back while a read is
 * still under way, and a write carries the bytes that it was submitted with.  So a bounce outlives its command when
 * that is abandoned; it keeps the latch and the path busy until the kernel is done.
 */
#ifndef VFC_BOUNCE_H
#define VFC_BOUNCE_H
#include "medium.h"
#include "path.h"

struct bounce {
	struct vfc_cmd *cmd;	/* NULL: abandoned */
	struct vfc_path *path;
	struct vfc_medium *medium;	/* path->medium; the route that holds it stays while the path is busy */
	uint8_t op;		/* enum vfc_op */
	bool fua;
	bool cancelled;
	bool lent;		/* to a crew, */
	bool begun;		/* and one of its threads is at it */
	bool shared;		/* the latch, with others of this path */
	int error;
	uint64_t offset;	/* in the medium */
	size_t length;
	size_t done;		/* moved so far */
	uint8_t *data;		/* NULL for a flush */
	size_t room;
	struct bounce *next;
	struct bounce *beside;	/* another that shares the latch's word */
};

/* A worker's buffers: small ones are kept, larger ones made; all together they are bounded. */
struct bounce_pool {
	struct bounce *free;
	uint32_t kept;
	size_t bytes;		/* in use */
	uint32_t under_way;
};

/*
 * VFC_QUEUED: takes the latch, makes a buffer and fills it for a write; VFC_BUSY: cmd->holder tells why;
 * VFC_DONE: cmd->error tells why it cannot be.
 */
enum vfc_submit bounce_begin(struct bounce_pool *pool, struct vfc_cmd *cmd, struct bounce **ret_bounce);
/*
 * What came back: a byte count or -errno.  True: it is over; false: the rest is to be submitted.
 * A file that has become shorter than its medium has lost blocks: who reads them gets an error, not zeros.
 */
bool bounce_step(struct bounce *bounce, ssize_t result);
/* Lets go of everything, after the data of a read went to the guest.  Returns the command, or NULL. */
struct vfc_cmd *bounce_end(struct bounce_pool *pool, struct bounce *bounce);
/* The first of a list, taken from it; NULL: there is none. */
struct bounce *bounce_first(struct bounce_list *list);
void bounce_append(struct bounce_list *list, struct bounce *bounce);
void bounce_abandon(struct vfc_cmd *cmd);
void bounce_pool_free(struct bounce_pool *pool);

#endif
