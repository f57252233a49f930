/*
 * device.h - units behind /dev/sgN: the test is the SCSI generic driver, at the other end of a socket pair.
 *
 * What write() hands over and read() gives back is the same struct sg_io_hdr, with the same pointers; a device in a
 * kernel is looked after by tests/guest.
 */
#ifndef DEVICE_H
#define DEVICE_H
#include <scsi/sg.h>

#include "harness.h"
#include "hba.h"

#define FILES 2
#define S_BUSY 5
#define S_TRANSPORT_FAILURE 6
#define S_TARGET_FAILURE 7
#define S_NEXUS_FAILURE 8
#define SAM_BUSY 8
#define SECOND 0xd0	/* an opcode that has a second to run; the others have a minute */

struct device {
	struct guest guest;
	struct driver ring;
	struct vfc_credits *own, *host;
	struct vfc_medium *medium;
	int ends[FILES];	/* the kernel's, of the files that are open now */
	int port_state;		/* -1, or a file that says how the remote port is */
};
extern struct device device;

static const uint8_t test_unit_ready[16] = { 0 };
static const uint8_t a_read[16] = { 0x28, 0, 0, 0, 0, 8, 0, 0, 8, 0 };
static const uint8_t a_write[16] = { 0x2a, 0, 0, 0, 0, 8, 0, 0, 8, 0 };

/* A unit that takes so many commands at a time, on a host that takes so many, its route in force; and a ring. */
void device_begin(uint32_t credits, uint32_t limit);
void device_end(void);
/* What becomes of the ends that were the kernel's is the caller's affair. */
void device_reopen(uint32_t max_transfer);
void device_route(uint8_t in_flight, bool inquiries);
/* The unit cannot be reached: no route. */
void device_close_route(uint8_t in_flight);

/* The next command of any file; which file is in *ret_file. */
struct sg_io_hdr device_take(unsigned *ret_file);
/* Whether one comes within so many ms. */
bool device_any(int ms);
void device_give(unsigned file, const struct sg_io_hdr *header);
/* The next command is done, well, and its driver has the answer. */
void device_serve(void);
/* Until the kernel has so many. */
void device_await(uint32_t count);

/* Stops the ring, what is in flight has so many ms, and starts it anew. */
void device_stop_and_start(uint32_t ms);
struct request device_command(unsigned slot, const uint8_t *cdb, uint32_t out, uint32_t in);

#endif
