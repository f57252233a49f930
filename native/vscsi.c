/*
 * vscsi.c - what a virtio-scsi request says (virtio 1.3, 5.6.6.1), and which commands C runs itself: READ, WRITE and
 * SYNCHRONIZE CACHE of SBC-4 that leave no question open.  Everything else is punted, so no sense data is built here.
 */
#include <string.h>

#include "scsi.h"
#include "worker.h"

#define REPORT_LUNS_WLUN 0xc101	/* SAM-5 4.7.7.5: extended addressing, well-known logical unit 1 */

static inline uint32_t be32(const uint8_t *at)
{
	uint32_t value;

	memcpy(&value, at, sizeof(value));
	return __builtin_bswap32(value);
}

static inline uint64_t be64(const uint8_t *at)
{
	uint64_t value;

	memcpy(&value, at, sizeof(value));
	return __builtin_bswap64(value);
}

/* lba, blocks, op and fua of ->cmd; false: a field that needs a closer look. */
static __attribute__((noinline)) bool decode_any(struct vfc_cmd *cmd, const uint8_t *cdb)
{
	uint8_t allowed = DPO | FUA;

	cmd->op = VFC_OP_READ;
	cmd->fua = cdb[1] & FUA;
	switch (cdb[0]) {
	case WRITE_6:
		cmd->op = VFC_OP_WRITE;
		/* fall through */
	case READ_6:
		cmd->fua = false;
		cmd->lba = (uint32_t)(cdb[1] & 0x1f) << 16 | (uint32_t)cdb[2] << 8 | cdb[3];
		cmd->blocks = cdb[4] ? cdb[4] : 256;
		return !(cdb[1] & 0xe0) && !cdb[5];
	case WRITE_12:
		cmd->op = VFC_OP_WRITE;
		/* fall through */
	case READ_12:
		cmd->lba = be32(cdb + 2);
		cmd->blocks = be32(cdb + 6);
		return !(cdb[1] & ~allowed) && !cdb[10] && !cdb[11];
	case WRITE_16:
		cmd->op = VFC_OP_WRITE;
		/* fall through */
	case READ_16:
		cmd->lba = be64(cdb + 2);
		cmd->blocks = be32(cdb + 10);
		return !(cdb[1] & ~allowed) && !cdb[14] && !cdb[15];
	case SYNCHRONIZE_CACHE_10:
		cmd->op = VFC_OP_FLUSH;
		cmd->fua = false;
		cmd->lba = be32(cdb + 2);
		cmd->blocks = (uint32_t)cdb[7] << 8 | cdb[8];
		return !(cdb[1] & ~SYNC_IMMED) && !cdb[6] && !cdb[9];
	default:	/* SYNCHRONIZE_CACHE_16: the mask has no others */
		cmd->op = VFC_OP_FLUSH;
		cmd->fua = false;
		cmd->lba = be64(cdb + 2);
		cmd->blocks = be32(cdb + 10);
		return !(cdb[1] & ~SYNC_IMMED) && !cdb[14] && !cdb[15];
	}
}

/* The two that are nearly all of them first. */
static inline bool decode(struct vfc_cmd *cmd, const uint8_t *cdb)
{
	if ((cdb[0] & ~(READ_10 ^ WRITE_10)) != READ_10)
		return decode_any(cmd, cdb);
	cmd->op = cdb[0] == READ_10 ? VFC_OP_READ : VFC_OP_WRITE;
	cmd->fua = cdb[1] & FUA;
	cmd->lba = be32(cdb + 2);
	cmd->blocks = (uint32_t)cdb[7] << 8 | cdb[8];
	return !((cdb[1] & ~(DPO | FUA)) | cdb[6] | cdb[9]);
}

void vscsi_limit_mask(uint8_t mask[32], bool read_only)
{
	static const uint8_t reads[] = { READ_6, READ_10, READ_12, READ_16, SYNCHRONIZE_CACHE_10, SYNCHRONIZE_CACHE_16 };
	static const uint8_t writes[] = { WRITE_6, WRITE_10, WRITE_12, WRITE_16 };
	uint8_t known[32] = { 0 };

	for (size_t i = 0; i < sizeof(reads); i++)
		known[reads[i] / 8] |= (uint8_t)(1 << (reads[i] % 8));
	for (size_t i = 0; i < sizeof(writes) && !read_only; i++)
		known[writes[i] / 8] |= (uint8_t)(1 << (writes[i] % 8));
	for (size_t i = 0; i < sizeof(known); i++)
		mask[i] &= known[i];
}

/* Whether the medium can do it as it stands; 0 or why not. */
static inline enum vfc_why examine(const struct worker *worker, const struct command *command,
			    const struct vfc_medium *medium)
{
	const struct vfc_cmd *cmd = &command->cmd;
	uint64_t length;

	if (cmd->lba >= medium->blocks || cmd->blocks > medium->blocks - cmd->lba)
		return VFC_WHY_RANGE;
	length = cmd->op == VFC_OP_FLUSH ? 0 : (uint64_t)cmd->blocks << medium->block_shift;
	if (command->in_bytes != (cmd->op == VFC_OP_READ ? length : 0) ||
	    command->out_bytes != (cmd->op == VFC_OP_WRITE ? length : 0))
		return VFC_WHY_RANGE;
	if (length > worker->ration->max_transfer)
		return VFC_WHY_TRANSFER;
	/* Past the page cache and the device's own there is no read that we could ask for. */
	if (cmd->fua && cmd->op == VFC_OP_READ &&
	    (medium->kind == VFC_MEDIUM_FILE || medium->kind == VFC_MEDIUM_DIRECT))
		return VFC_WHY_FIELD;
	if ((cmd->fua || cmd->op == VFC_OP_FLUSH) && medium_in_doubt(medium))
		return VFC_WHY_DOUBT;
	return 0;
}

/*
 * To a device that takes commands as they are: nothing is looked at but what Python wants to see itself.  Linux's
 * interface knows no task attributes, so each goes as SIMPLE, as it does from any program on a host.  What an ORDERED
 * one asks for is kept all the same: of its ring it is alone with the device (order.c).
 */
static __attribute__((noinline)) bool pass_through(struct worker *worker, struct command *command, struct route *route)
{
	const uint8_t *cdb = command->header + HEADER_CDB;
	struct vfc_cmd *cmd = &command->cmd;

	if (!(route->mask[cdb[0] / 8] >> (cdb[0] % 8) & 1)) {
		command_punt(worker, command, VFC_WHY_OPCODE);
		return false;
	}
	*cmd = (struct vfc_cmd){
		.path = &route->path,
		.op = command->in_bytes ? VFC_OP_READ : command->out_bytes ? VFC_OP_WRITE : VFC_OP_FLUSH,
		.cdb = cdb,
		.cdb_length = 32,
		.iov = command->in_bytes ? command->in : command->out,
		.iov_count = command->in_bytes ? command->in_pieces : command->out_pieces,
		.length = command->in_bytes ? command->in_bytes : command->out_bytes,
	};
	return true;
}

/* True: the path is next. */
static inline bool run(struct worker *worker, struct command *command, struct route *route)
{
	const uint8_t *cdb = command->header + HEADER_CDB;
	struct vfc_cmd *cmd = &command->cmd;
	enum vfc_why why;

	if (route->path.medium && route->path.medium->kind == VFC_MEDIUM_SG)
		return pass_through(worker, command, route);
	if (__builtin_expect(command->header[HEADER_ATTRIBUTE] != ATTRIBUTE_SIMPLE, 0)) {
		command_punt(worker, command, VFC_WHY_ATTRIBUTE);
		return false;
	}
	if (__builtin_expect(!(route->mask[cdb[0] / 8] >> (cdb[0] % 8) & 1), 0)) {
		command_punt(worker, command, VFC_WHY_OPCODE);
		return false;
	}
	if (__builtin_expect(!decode(cmd, cdb), 0)) {
		command_punt(worker, command, VFC_WHY_FIELD);
		return false;
	}
	why = examine(worker, command, route->path.medium);
	if (__builtin_expect(why != 0, 0)) {
		command_punt(worker, command, why);
		return false;
	}
	cmd->path = &route->path;
	cmd->cdb = cdb;
	cmd->cdb_length = 32;
	cmd->error = 0;
	cmd->result = NULL;
	cmd->done = 0;
	if (cmd->op == VFC_OP_WRITE) {
		cmd->iov = command->out;
		cmd->iov_count = command->out_pieces;
		cmd->length = command->out_bytes;
	} else {
		cmd->iov = command->in;
		cmd->iov_count = command->in_pieces;
		cmd->length = command->in_bytes;
	}
	if (__builtin_expect(!cmd->length && cmd->op != VFC_OP_FLUSH, 0)) {
		command_finish(worker, command);
		return false;
	}
	return true;
}

bool vscsi_address(struct command *command)
{
	static const uint8_t report_luns[8] = { 0xc1, 0x01 };
	const uint8_t *lun = command->header;

	/* virtio 1.3, 5.6.6.1: 1, target, single-level LUN; or the REPORT LUNS well-known unit, which names no target */
	if (lun[0] == 1 && !(lun[2] & 0x80)) {
		command->target = lun[1];
		command->lun = (uint16_t)((lun[2] & 0x3f) << 8 | lun[3]);
		return true;
	}
	if (memcmp(lun, report_luns, sizeof(report_luns)) != 0)
		return false;
	command->target = 0;
	command->lun = REPORT_LUNS_WLUN;
	return true;
}

static __attribute__((noinline)) bool dispatch(struct worker *worker, struct command *command)
{
	struct route *route;

	if (!vscsi_address(command) || !worker->targets[command->target]) {
		COUNT(worker, bad_target);
		command_respond(worker, command, VIRTIO_SCSI_S_BAD_TARGET, 0);
		return false;
	}
	route = route_find(worker, command->target, command->lun);
	if (!route) {
		command_punt(worker, command, VFC_WHY_NO_ROUTE);
		return false;
	}
	memcpy(&worker->recent_address, command->header, sizeof(worker->recent_address));
	worker->recent = route;
	return run(worker, command, route);
}

bool vscsi_dispatch(struct worker *worker, struct command *command)
{
	struct route *recent = worker->recent;
	uint64_t address;

	memcpy(&address, command->header, sizeof(address));
	if (__builtin_expect(!recent || address != worker->recent_address, 0))
		return dispatch(worker, command);
	command->target = recent->target;
	command->lun = recent->lun;
	return run(worker, command, recent);
}
