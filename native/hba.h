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
 * A number of commands that several units share, such as the commands that a SCSI host takes at a time.  Counted, as
 * all handles.  Below it a submission never waits for a tag of the kernel's.
 */
struct vfc_credits;

int vfc_credits_new(uint32_t limit, struct vfc_credits **ret_credits);
void vfc_credits_set(struct vfc_credits *credits, uint32_t limit);
void vfc_credits_put(struct vfc_credits *credits);

struct vfc_sg_setup {
	const int32_t *fds;	/* open files of the same unit, O_RDWR and O_NONBLOCK */
	uint32_t count;
	uint32_t share;		/* of these, for each worker: worker n has fds[n * share] and on */
	uint32_t credits;	/* commands at a time, all workers together */
	uint32_t max_transfer;	/* bytes; more is answered CHECK CONDITION */
	uint32_t grace_ms;	/* after a command's time, for the kernel to end it; then it is answered without */
	struct vfc_credits *host;
	uint16_t timeouts[256];	/* seconds, by opcode */
};

/* A medium whose commands go as they are: a route to it runs every opcode of its mask.  -EINVAL: a number is 0. */
int vfc_sg_medium_new(const struct vfc_sg_setup *setup, struct vfc_medium **ret_medium);
/* Another hold on the same, for as long as somebody wants to count its commands or limit them. */
struct vfc_medium *vfc_sg_hold(struct vfc_medium *medium);
void vfc_sg_limit(struct vfc_medium *medium, uint32_t credits);
/* Commands of the workers that the kernel has now, those included that were answered without it. */
uint32_t vfc_sg_in_flight(const struct vfc_medium *medium);

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
