/*
 * hba.h - what a physical host bus adapter needs of C, as Python sees it: units behind /dev/sgN, and one careful write.
 *
 * The SCSI generic driver's asynchronous interface, version 3: a command is one write() of struct sg_io_hdr, its end
 * one read().  An open file carries 16 commands at a time, so a unit has several.  The kernel copies data in the
 * system call itself, never later: data-out leaves guest memory during write(), data-in goes to a buffer of ours
 * during read() and from there to the guest.  So a command that the kernel does not give back can be answered, and its
 * memory taken away, at any moment.
 *
 * Rules as in vhostfc.h: 0 (or what is documented) or -errno, nothing is printed, what is passed in is borrowed.
 */
#ifndef VFC_HBA_H
#define VFC_HBA_H
#include <stdint.h>

#include "vhostfc.h"
/* ---- cffi reads from here ---- */

#define VFC_SG_QUEUE 16		/* commands of one open file (SG_MAX_QUEUE) */
#define VFC_SG_SENSE 96		/* what the kernel keeps of sense data */

/*
 * Commands with the kernel, counted, and how many of them there may be at a time: all of a SCSI host, or those of one
 * unit whatever the routes that led there.  Below the limit of the host a submission never waits for a tag of the
 * kernel's.  Counted itself, as all handles.
 */
struct vfc_credits;

int vfc_credits_new(uint32_t limit, struct vfc_credits **ret_credits);
void vfc_credits_set(struct vfc_credits *credits, uint32_t limit);
/* Commands of the workers that the kernel has now, those included that were answered without it. */
uint32_t vfc_credits_used(const struct vfc_credits *credits);
/* Of these, those that were answered without it and may still change what is on the medium. */
uint32_t vfc_credits_stale(const struct vfc_credits *credits);
/* So many more or fewer of those, by somebody who sends commands to the unit beside the workers. */
void vfc_credits_spoil(struct vfc_credits *credits, int32_t by);
void vfc_credits_put(struct vfc_credits *credits);

struct vfc_sg_setup {
	const int32_t *fds;	/* open files of the same unit, O_RDWR and O_NONBLOCK */
	uint32_t count;
	uint32_t share;		/* of these, for each worker: worker n has fds[n * share] and on */
	uint32_t max_transfer;	/* bytes; more is answered CHECK CONDITION */
	uint32_t grace_ms;	/* after a command's time, for the kernel to end it; then it is answered without */
	int32_t port_state_fd;	/* port_state of the unit's remote port in sysfs; -1: nobody knows it */
	struct vfc_credits *own;	/* of the unit, all workers together, and the same for all its media */
	struct vfc_credits *host;
	uint16_t timeouts[256];	/* seconds, by opcode */
};

/*
 * A medium whose commands go as they are: a route to it runs every opcode of its mask.  -EINVAL: a number is 0.
 * When its last route has ended it stays until the kernel has given back all that it has of it.
 */
int vfc_sg_medium_new(const struct vfc_sg_setup *setup, struct vfc_medium **ret_medium);

/* ---------------------------------------------------------------- single commands, for Python */

struct vfc_sg_call;

struct vfc_sg_command {
	const uint8_t *cdb;
	const uint8_t *data_out;
	uint32_t cdb_length;
	uint32_t out_length;
	uint32_t in_length;	/* not together with out_length */
	uint32_t timeout_ms;
};

struct vfc_sg_outcome {
	uint8_t status;		/* SAM */
	uint8_t sense_length;
	uint16_t host_status;
	uint16_t driver_status;
	uint16_t pad;
	int32_t residual;
	uint32_t in_length;	/* bytes of data_in that came */
	const uint8_t *data_in;	/* as long as the call */
	const uint8_t *sense;
};

/* -EDOM or -EAGAIN: 16 are on their way already; else as write(2) says. */
int vfc_sg_submit(int fd, const struct vfc_sg_command *command, struct vfc_sg_call **ret_call);
/* 1: this one has ended; 0: none has; -errno: the device is gone, none will.  It stays the submitter's to free. */
int vfc_sg_collect(int fd, struct vfc_sg_call **ret_call);
void vfc_sg_outcome(const struct vfc_sg_call *call, struct vfc_sg_outcome *ret_outcome);
/* Not before it was collected, or its fd was closed. */
void vfc_sg_call_free(struct vfc_sg_call *call);

/*
 * One open(), one write(), whatever comes of it: bytes written or -errno, EINTR too.  What a driver says when it
 * creates a port is said once: asking again would create another.
 */
int vfc_write_once(const char *path, const uint8_t *data, uint32_t length);

/* ---- cffi reads to here ---- */
#endif
