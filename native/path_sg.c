/*
 * path_sg.c - units behind /dev/sgN: commands as they are, asynchronously, several open files a unit.
 *
 * A lane is a worker's share of a unit's open files, a slot one of the 16 commands that such a file carries.  Data-out
 * goes from guest memory into the kernel during write(); data-in comes into the slot's buffer during read() and is
 * copied from there, for the one reason that a command must be answerable while the kernel still has it: what comes
 * for it later must not land in memory that the guest uses for something else by then.
 *
 * The kernel knows no way to take a command back.  It ends one itself after the time that the command came with; when
 * it fails to, we answer without it some seconds later.  Such a command may still run, so until it has come back new
 * ones for the unit are answered BUSY: a late WRITE must not overwrite what was written after it was given up.  That is
 * counted by the unit, not by a route: a lane stays behind without one until the kernel has given everything back.
 * What the kernel keeps is not waited for: when only that is in the way of a command it is answered BUSY, and what
 * waits beside others waits no longer than it would have had with the kernel.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <scsi/sg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "medium.h"
#include "path_sg.h"
#include "worker.h"

#define SMALL 65536		/* a buffer that is kept for the next */
#define KEEP 64
#define LIMIT (64u << 20)	/* bytes of a worker's buffers in use */
#define NS_PER_S 1000000000ull
#define NS_PER_MS 1000000ull
#define SAM_BUSY 0x08

/* ---------------------------------------------------------------- slots */

static bool take_buffer(struct sg *sg, struct slot *slot, size_t length)
{
	if (length <= SMALL && sg->spares) {
		slot->buffer = (uint8_t *)sg->spares;
		slot->room = SMALL;
		sg->spares = sg->spares->next;
		sg->kept--;
	} else {
		slot->room = length <= SMALL ? SMALL : length;
		slot->buffer = malloc(slot->room);
		if (!slot->buffer)
			return false;
	}
	sg->bytes += slot->room;
	return true;
}

static void give_buffer(struct sg *sg, struct slot *slot)
{
	struct spare *spare = (struct spare *)(void *)slot->buffer;

	if (!spare)
		return;
	sg->bytes -= slot->room;
	slot->buffer = NULL;
	if (slot->room != SMALL || sg->kept == KEEP) {
		free(spare);
		return;
	}
	spare->next = sg->spares;
	sg->spares = spare;
	sg->kept++;
}

void sg_release(struct sg *sg, struct slot *slot)
{
	struct stream *stream = slot->stream;
	struct lane *lane = stream->lane;

	if (!slot->cmd) {
		sg_credit_back(lane->unit, !slot->in);
		lane->kept--;
		sg->kept_bytes -= slot->buffer ? slot->room : 0;
	}
	give_buffer(sg, slot);
	sg->doubts -= slot->doubtful;
	slot->under_way = slot->doubtful = false;
	slot->cmd = NULL;
	sg_credit_give(lane->unit);
	stream->under_way--;
	lane->under_way--;
	sg->under_way--;
	slot->next = stream->free;
	stream->free = slot;
}

static struct stream *pick(struct lane *lane)
{
	for (uint32_t i = 0; i < lane->count; i++) {
		struct stream *stream = &lane->streams[(lane->turn + i) % lane->count];

		if (stream->free && !stream->gone) {
			lane->turn += i + 1;
			return stream;
		}
	}
	return NULL;
}

static bool all_gone(const struct lane *lane)
{
	for (uint32_t i = 0; i < lane->count; i++)
		if (!lane->streams[i].gone)
			return false;
	return true;
}

/* ---------------------------------------------------------------- submission */

static enum vfc_submit answer(struct vfc_cmd *cmd, const struct vfc_result *result)
{
	cmd->result = result;
	return VFC_DONE;
}

static const struct vfc_result busy_unit = { .refused = true, .response = VIRTIO_SCSI_S_OK, .status = SAM_BUSY };
static const struct vfc_result no_memory = { .refused = true, .response = VIRTIO_SCSI_S_BUSY };
static const struct vfc_result no_device = { .refused = true, .response = VIRTIO_SCSI_S_BAD_TARGET };
static const struct vfc_result no_room = { .refused = true, .response = VIRTIO_SCSI_S_TRANSPORT_FAILURE };
static const struct vfc_result failed = { .refused = true, .response = VIRTIO_SCSI_S_FAILURE };
/* ILLEGAL REQUEST, INVALID FIELD IN CDB: more than the port can carry, as the Block Limits page has told. */
static const uint8_t invalid_field[18] = { 0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0 };
static const struct vfc_result too_long = {
	.refused = true,
	.response = VIRTIO_SCSI_S_OK,
	.status = 2,
	.sense = invalid_field,
	.sense_length = sizeof(invalid_field),
};

static uint64_t patience(const struct sg_unit *unit, uint8_t opcode)
{
	return unit->timeouts[opcode] * NS_PER_S + unit->grace_ms * NS_PER_MS;
}

/* There is no room for it now. */
static enum vfc_submit wait_for_room(const struct sg *sg, const struct lane *lane, struct vfc_cmd *cmd)
{
	uint64_t now = worker_now();

	if (sg_credit_lost(lane->unit) || lane->kept == lane->count * VFC_SG_QUEUE ||
	    (cmd->op == VFC_OP_READ && sg->kept_bytes && sg->kept_bytes + cmd->length > LIMIT))
		return answer(cmd, &busy_unit);
	if (!cmd->done)
		cmd->done = now + patience(lane->unit, cmd->cdb[0]);
	return now < cmd->done ? VFC_BUSY : answer(cmd, &no_room);
}

static enum vfc_submit refused(const struct sg *sg, const struct lane *lane, struct vfc_cmd *cmd, int error)
{
	switch (error) {
	case EAGAIN:
	case EDOM:	/* 16 are on their way in this file, whatever we count */
		return wait_for_room(sg, lane, cmd);
	case ENOMEM:
		return answer(cmd, &no_memory);
	case ENODEV:
	case ENXIO:
	case EPIPE:
	case ECONNRESET:
		return answer(cmd, &no_device);
	case EINVAL:
	case EIO:
	case EMSGSIZE:
		return answer(cmd, &too_long);
	default:	/* EFAULT: guest memory that is not there */
		return answer(cmd, &failed);
	}
}

static enum vfc_submit submit(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	struct sg *sg = sg_of(engine);
	struct lane *lane = cmd->path->own;
	struct sg_unit *unit = lane->unit;
	struct stream *stream = pick(lane);
	struct sg_io_hdr header;
	struct slot *slot;
	ssize_t written;
	int error;

	cmd->result = NULL;
	cmd->error = 0;
	cmd->holder = 0;
	if (all_gone(lane))
		return answer(cmd, &no_device);
	if (vfc_credits_stale(unit->own))
		return answer(cmd, &busy_unit);
	if (cmd->length > unit->max_transfer)
		return answer(cmd, &too_long);
	if (!stream || (cmd->op == VFC_OP_READ && sg->bytes && sg->bytes + cmd->length > LIMIT) || !sg_credit_take(unit))
		return wait_for_room(sg, lane, cmd);
	slot = stream->free;
	slot->in = cmd->op == VFC_OP_READ;
	if (slot->in && !take_buffer(sg, slot, cmd->length)) {
		sg_credit_give(unit);
		return answer(cmd, &no_memory);
	}
	/* The CDB as it was checked: the guest cannot change this copy. */
	memcpy(slot->cdb, cmd->cdb, sizeof(slot->cdb));
	header = (struct sg_io_hdr){
		.interface_id = 'S',
		.dxfer_direction = slot->in ? SG_DXFER_FROM_DEV : cmd->op == VFC_OP_WRITE ? SG_DXFER_TO_DEV : SG_DXFER_NONE,
		.cmd_len = (unsigned char)sg_cdb_length(slot->cdb),
		.mx_sb_len = VFC_SG_SENSE,
		.dxfer_len = (unsigned)cmd->length,
		.cmdp = slot->cdb,
		.sbp = slot->sense,
		.timeout = unit->timeouts[slot->cdb[0]] * 1000u,
		.flags = Q_AT_TAIL,
		.usr_ptr = slot,
	};
	if (slot->in) {
		header.dxferp = slot->buffer;
	} else if (cmd->op == VFC_OP_WRITE) {
		header.iovec_count = (unsigned short)(cmd->iov_count > 1 ? cmd->iov_count : 0);
		header.dxferp = cmd->iov_count > 1 ? (void *)cmd->iov : cmd->iov->iov_base;
	}
	written = write(stream->fd, &header, sizeof(header));
	if (written != sizeof(header)) {
		error = written < 0 ? errno : EIO;
		give_buffer(sg, slot);
		sg_credit_give(unit);
		return refused(sg, lane, cmd, error);
	}
	stream->free = slot->next;
	slot->cmd = cmd;
	slot->under_way = true;
	slot->deadline = worker_now() + patience(unit, slot->cdb[0]);
	stream->under_way++;
	lane->under_way++;
	sg->under_way++;
	cmd->priv = slot;
	if (!sg->ticking)
		sg_tick_after(sg, SG_TICK_NS);
	return VFC_QUEUED;
}

static void flush(struct vfc_path_engine *engine)
{
	(void)engine;
}

/* ---------------------------------------------------------------- giving up */

static void cancel(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	(void)engine;
	(void)cmd;
}

static bool abandon(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	sg_let_go(sg_of(engine), cmd->priv);
	return true;
}

static int wait_fd(struct vfc_path_engine *engine)
{
	return sg_of(engine)->epoll_fd;
}

/* What was abandoned needs nothing but our buffers, and not even these once its file is closed. */
static bool idle(struct vfc_path_engine *engine)
{
	(void)engine;
	return true;
}

/* ---------------------------------------------------------------- beginning and end */

/* What the kernel still has of it stays counted: it has it, and nobody will learn when that ends. */
static void close_lane(struct sg *sg, struct lane *lane)
{
	*lane->link = lane->next;
	if (lane->next)
		lane->next->link = lane->link;
	for (uint32_t i = 0; i < lane->count; i++) {
		struct stream *stream = &lane->streams[i];

		if (!stream->hung)
			epoll_ctl(sg->epoll_fd, EPOLL_CTL_DEL, stream->fd, NULL);
		for (unsigned n = 0; n < VFC_SG_QUEUE; n++)
			free(stream->slots[n].buffer);
	}
	vfc_medium_put(lane->medium);
	free(lane);
	if (!sg->lanes)
		sg_tick_no_more(sg);
}

void sg_end_lanes(struct sg *sg)
{
	sg->leaving = false;
	for (struct lane *lane = sg->lanes, *next; lane; lane = next) {
		next = lane->next;
		if (lane->users)
			continue;
		if (lane->under_way)
			sg->leaving = true;
		else
			close_lane(sg, lane);
	}
}

static void path_close(struct vfc_path_engine *engine, struct vfc_path *path)
{
	struct lane *lane = path->own;

	path->own = NULL;
	if (!--lane->users)
		sg_end_lanes(sg_of(engine));
}

static int path_open(struct vfc_path_engine *engine, struct vfc_path *path, uint32_t worker)
{
	struct sg *sg = sg_of(engine);
	struct sg_unit *unit = path->medium->sg;
	struct lane *lane;

	for (lane = sg->lanes; lane; lane = lane->next)
		if (lane->unit == unit) {
			lane->users++;
			path->own = lane;
			return 0;
		}
	if ((uint64_t)(worker + 1) * unit->share > unit->count)
		return -EINVAL;
	lane = calloc(1, sizeof(*lane) + unit->share * sizeof(lane->streams[0]));
	if (!lane)
		return -ENOMEM;
	lane->medium = medium_hold(path->medium);
	lane->unit = unit;
	lane->users = 1;
	lane->link = &sg->lanes;
	lane->next = sg->lanes;
	if (lane->next)
		lane->next->link = &lane->next;
	sg->lanes = lane;
	for (; lane->count < unit->share; lane->count++) {
		struct stream *stream = &lane->streams[lane->count];
		struct epoll_event wanted = { .events = EPOLLIN, .data.ptr = stream };

		stream->lane = lane;
		stream->fd = unit->fds[worker * unit->share + lane->count];
		for (unsigned i = 0; i < VFC_SG_QUEUE; i++) {
			stream->slots[i].stream = stream;
			stream->slots[i].next = stream->free;
			stream->free = &stream->slots[i];
		}
		if (epoll_ctl(sg->epoll_fd, EPOLL_CTL_ADD, stream->fd, &wanted) < 0) {
			int error = -errno;

			close_lane(sg, lane);
			return error;
		}
	}
	path->own = lane;
	return 0;
}

static const struct vfc_path_ops ops = {
	.name = "sg",
	.runs_on = true,
	.open = path_open,
	.close = path_close,
	.submit = submit,
	.flush = flush,
	.reap = sg_reap,
	.cancel = cancel,
	.abandon = abandon,
	.wait_fd = wait_fd,
	.idle = idle,
};

int path_sg_new(struct vfc_path_engine **ret_engine)
{
	struct sg *sg = calloc(1, sizeof(*sg));
	struct epoll_event ticks = { .events = EPOLLIN };
	int error;

	if (!sg)
		return -ENOMEM;
	sg->base.ops = &ops;
	sg->timer_fd = -1;
	sg->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (sg->epoll_fd >= 0)
		sg->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (sg->timer_fd < 0 || epoll_ctl(sg->epoll_fd, EPOLL_CTL_ADD, sg->timer_fd, &ticks) < 0) {
		error = -errno;
		path_sg_free(&sg->base);
		return error;
	}
	*ret_engine = &sg->base;
	return 0;
}

void path_sg_free(struct vfc_path_engine *engine)
{
	struct sg *sg = sg_of(engine);

	while (sg->lanes)
		close_lane(sg, sg->lanes);
	while (sg->spares) {
		struct spare *spare = sg->spares;

		sg->spares = spare->next;
		free(spare);
	}
	if (sg->timer_fd >= 0)
		close(sg->timer_fd);
	if (sg->epoll_fd >= 0)
		close(sg->epoll_fd);
	free(sg);
}
