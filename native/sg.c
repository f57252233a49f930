/*
 * sg.c - units behind /dev/sgN: opening one for the workers, counting what the kernel has, and single commands for
 * Python.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <scsi/sg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "medium.h"
#include "sg.h"

/* ---------------------------------------------------------------- credits */

int vfc_credits_new(uint32_t limit, struct vfc_credits **ret_credits)
{
	struct vfc_credits *credits = calloc(1, sizeof(*credits));

	if (!credits)
		return -ENOMEM;
	atomic_init(&credits->holds, 1);
	atomic_init(&credits->limit, limit);
	*ret_credits = credits;
	return 0;
}

static struct vfc_credits *credits_hold(struct vfc_credits *credits)
{
	atomic_fetch_add(&credits->holds, 1);
	return credits;
}

void vfc_credits_set(struct vfc_credits *credits, uint32_t limit)
{
	atomic_store(&credits->limit, limit);
}

uint32_t vfc_credits_used(const struct vfc_credits *credits)
{
	return atomic_load(&credits->used);
}

uint32_t vfc_credits_stale(const struct vfc_credits *credits)
{
	return atomic_load(&credits->stale);
}

void vfc_credits_spoil(struct vfc_credits *credits, int32_t by)
{
	atomic_fetch_add(&credits->stale, (uint32_t)by);
}

void vfc_credits_put(struct vfc_credits *credits)
{
	if (credits && atomic_fetch_sub(&credits->holds, 1) == 1)
		free(credits);
}

static bool take(struct vfc_credits *credits)
{
	if (atomic_fetch_add(&credits->used, 1) < atomic_load_explicit(&credits->limit, memory_order_relaxed))
		return true;
	atomic_fetch_sub(&credits->used, 1);
	return false;
}

bool sg_credit_take(struct sg_unit *unit)
{
	if (!take(unit->own))
		return false;
	if (take(unit->host))
		return true;
	atomic_fetch_sub(&unit->own->used, 1);
	return false;
}

void sg_credit_give(struct sg_unit *unit)
{
	atomic_fetch_sub(&unit->host->used, 1);
	atomic_fetch_sub(&unit->own->used, 1);
}

void sg_credit_keep(struct sg_unit *unit, bool stale)
{
	atomic_fetch_add(&unit->host->kept, 1);
	atomic_fetch_add(&unit->own->kept, 1);
	if (stale)
		atomic_fetch_add(&unit->own->stale, 1);
}

void sg_credit_back(struct sg_unit *unit, bool stale)
{
	if (stale)
		atomic_fetch_sub(&unit->own->stale, 1);
	atomic_fetch_sub(&unit->own->kept, 1);
	atomic_fetch_sub(&unit->host->kept, 1);
}

static bool lost(const struct vfc_credits *credits)
{
	return atomic_load(&credits->kept) >= atomic_load(&credits->limit);
}

bool sg_credit_lost(const struct sg_unit *unit)
{
	return lost(unit->own) || lost(unit->host);
}

/* ---------------------------------------------------------------- a unit */

static int keep_fds(struct sg_unit *unit, const int32_t *fds, uint32_t count, int port_state_fd)
{
	if (port_state_fd >= 0) {
		unit->port_state_fd = fcntl(port_state_fd, F_DUPFD_CLOEXEC, 0);
		if (unit->port_state_fd < 0)
			return -errno;
	}
	unit->fds = calloc(count, sizeof(*unit->fds));
	if (!unit->fds)
		return -ENOMEM;
	for (; unit->count < count; unit->count++) {
		/* The same open file: what was opened for us once is opened by nobody else (see open_path in Python). */
		int fd = fcntl(fds[unit->count], F_DUPFD_CLOEXEC, 0);

		if (fd < 0)
			return -errno;
		unit->fds[unit->count] = fd;
	}
	return 0;
}

int vfc_sg_medium_new(const struct vfc_sg_setup *setup, struct vfc_medium **ret_medium)
{
	struct vfc_medium *medium;
	struct sg_unit *unit;
	int error;

	if (!setup->count || !setup->share || !setup->max_transfer || !setup->own || !setup->host)
		return -EINVAL;
	medium = calloc(1, sizeof(*medium));
	unit = calloc(1, sizeof(*unit));
	if (!medium || !unit) {
		free(medium);
		free(unit);
		return -ENOMEM;
	}
	atomic_init(&medium->holds, 1);
	medium->kind = VFC_MEDIUM_SG;
	medium->fd = -1;
	/* No latch has this owner: nothing here waits for one. */
	medium->owner = UINT32_MAX;
	medium->sg = unit;
	unit->share = setup->share;
	unit->max_transfer = setup->max_transfer;
	unit->grace_ms = setup->grace_ms;
	unit->port_state_fd = -1;
	memcpy(unit->timeouts, setup->timeouts, sizeof(unit->timeouts));
	unit->own = credits_hold(setup->own);
	unit->host = credits_hold(setup->host);
	error = keep_fds(unit, setup->fds, setup->count, setup->port_state_fd);
	if (error) {
		vfc_medium_put(medium);
		return error;
	}
	*ret_medium = medium;
	return 0;
}

void sg_unit_free(struct sg_unit *unit)
{
	if (!unit)
		return;
	for (uint32_t i = 0; i < unit->count; i++)
		close(unit->fds[i]);
	if (unit->port_state_fd >= 0)
		close(unit->port_state_fd);
	vfc_credits_put(unit->own);
	vfc_credits_put(unit->host);
	free(unit->fds);
	free(unit);
}

/*
 * By the group code in the opcode; a variable length CDB tells its length itself.  Of vendor specific ones nobody
 * knows: 16 bytes, which is what an FCP_CMND has room for, padded with zeros as there.
 */
uint32_t sg_cdb_length(const uint8_t *cdb)
{
	static const uint8_t lengths[8] = { 6, 10, 10, 16, 16, 12, 16, 16 };
	uint32_t length;

	if (cdb[0] != 0x7f)
		return lengths[cdb[0] >> 5];
	length = 8u + cdb[7];
	return length < 12 ? 12 : length > 32 ? 32 : length;
}

/* ---------------------------------------------------------------- single commands */

struct vfc_sg_call {
	struct sg_io_hdr header;
	uint8_t cdb[VFC_CDB_MAX];
	uint8_t sense[VFC_SG_SENSE];
	uint8_t data[];
};

int vfc_sg_submit(int fd, const struct vfc_sg_command *command, struct vfc_sg_call **ret_call)
{
	uint32_t length = command->out_length ? command->out_length : command->in_length;
	struct vfc_sg_call *call;
	ssize_t written;

	if (command->cdb_length < 6 || command->cdb_length > VFC_CDB_MAX || (command->out_length && command->in_length))
		return -EINVAL;
	call = calloc(1, sizeof(*call) + length);
	if (!call)
		return -ENOMEM;
	memcpy(call->cdb, command->cdb, command->cdb_length);
	if (command->out_length)
		memcpy(call->data, command->data_out, length);
	call->header = (struct sg_io_hdr){
		.interface_id = 'S',
		.dxfer_direction = command->out_length ? SG_DXFER_TO_DEV : length ? SG_DXFER_FROM_DEV : SG_DXFER_NONE,
		.cmd_len = (unsigned char)command->cdb_length,
		.mx_sb_len = VFC_SG_SENSE,
		.dxfer_len = length,
		.dxferp = call->data,
		.cmdp = call->cdb,
		.sbp = call->sense,
		.timeout = command->timeout_ms,
		.flags = Q_AT_TAIL,
		.usr_ptr = call,
	};
	do
		written = write(fd, &call->header, sizeof(call->header));
	while (written < 0 && errno == EINTR);
	if (written != sizeof(call->header)) {
		int error = written < 0 ? -errno : -EIO;

		free(call);
		return error;
	}
	*ret_call = call;
	return 0;
}

int vfc_sg_collect(int fd, struct vfc_sg_call **ret_call)
{
	struct sg_io_hdr header = { .interface_id = 'S' };
	ssize_t got;

	do
		got = read(fd, &header, sizeof(header));
	while (got < 0 && errno == EINTR);
	if (got < 0 && errno == EAGAIN)
		return 0;
	if (!header.usr_ptr)
		return got < 0 ? -errno : -ENODEV;
	*ret_call = header.usr_ptr;
	(*ret_call)->header = header;
	return 1;
}

void vfc_sg_outcome(const struct vfc_sg_call *call, struct vfc_sg_outcome *ret_outcome)
{
	const struct sg_io_hdr *header = &call->header;
	uint32_t length = header->dxfer_direction == SG_DXFER_FROM_DEV ? header->dxfer_len : 0;

	*ret_outcome = (struct vfc_sg_outcome){
		.status = header->status,
		.sense_length = header->sb_len_wr,
		.host_status = header->host_status,
		.driver_status = header->driver_status,
		.residual = header->resid,
		.in_length = header->resid <= 0 ? length : (uint32_t)header->resid < length ? length - (uint32_t)header->resid : 0,
		.data_in = call->data,
		.sense = call->sense,
	};
}

void vfc_sg_call_free(struct vfc_sg_call *call)
{
	free(call);
}

/* ---------------------------------------------------------------- sysfs */

int vfc_write_once(const char *path, const uint8_t *data, uint32_t length)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	ssize_t written;
	int error;

	if (fd < 0)
		return -errno;
	written = write(fd, data, length);
	error = written < 0 ? -errno : (int)written;
	close(fd);
	return error;
}
