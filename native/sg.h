/*
 * sg.h - a unit behind /dev/sgN as the workers share it.
 */
#ifndef VFC_SG_H
#define VFC_SG_H
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "hba.h"

#define Q_AT_TAIL 0x10	/* SG_FLAG_Q_AT_TAIL, that the C library does not know: behind what is queued already */

struct vfc_credits {
	_Atomic uint32_t holds;
	_Atomic uint32_t limit;
	_Atomic uint32_t used;
	_Atomic uint32_t kept;	/* of these: answered without the kernel, which may have them for ever */
	_Atomic uint32_t stale;	/* of these: may still change what is on the medium */
};

struct sg_unit {
	int *fds;
	uint32_t count;
	uint32_t share;
	uint32_t max_transfer;
	uint32_t grace_ms;
	int port_state_fd;
	struct vfc_credits *own, *host;
	uint16_t timeouts[256];
};

/* One of the unit and one of its host, or neither. */
bool sg_credit_take(struct sg_unit *unit);
void sg_credit_give(struct sg_unit *unit);
/* A command was answered and the kernel has it still; and the end of that. */
void sg_credit_keep(struct sg_unit *unit, bool stale);
void sg_credit_back(struct sg_unit *unit, bool stale);
/* Whether all that there may be is kept so: nothing that somebody waits for will make room. */
bool sg_credit_lost(const struct sg_unit *unit);
/* Bytes of the CDB that begins so (SPC-4 4.2.5.1): what is behind is not the command's. */
uint32_t sg_cdb_length(const uint8_t *cdb);
void sg_unit_free(struct sg_unit *unit);

#endif
