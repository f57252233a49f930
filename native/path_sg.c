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
 * ones for the unit are answered BUSY: a late WRITE must not overwrite what was written after it was given up.
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

#include "iov.h"
#include "medium.h"
#include "sg.h"
#include "worker.h"

#define SMALL 65536		/* a buffer that is kept for the next */
#define KEEP 64
#define LIMIT (64u << 20)	/* bytes of a worker's buffers in use */
#define TICK_NS 1000000000l	/* between looks at what is late */
#define HASTE_NS 5000000l	/* the same while a device is on its way out */
#define READY 16
#define NS_PER_S 1000000000ull
#define NS_PER_MS 1000000ull
#define SAM_BUSY 0x08

struct stream;

struct slot {
	struct stream *stream;
	struct vfc_cmd *cmd;	/* NULL while under way: abandoned */
	bool under_way;
	bool stale;		/* abandoned, and counted so by its unit */
	bool in;		/* data-in */
	uint64_t deadline;	/* ns */
	uint8_t *buffer;
	size_t room;
	uint8_t cdb[32];
	uint8_t sense[VFC_SG_SENSE];
	struct vfc_result result;
	struct slot *next;	/* free */
};

struct stream {
	struct lane *lane;
	int fd;
	bool hung;		/* the device is being removed: looked after by the timer */
	bool gone;		/* nothing will come any more */
	uint32_t under_way;
	struct slot *free;
	struct slot slots[VFC_SG_QUEUE];
};

struct lane {
	struct sg_unit *unit;
	struct lane *next, **link;
	uint32_t users;		/* routes: a new one over the same files begins before the old one has ended */
	uint32_t count, turn;
	struct stream streams[];
};

struct spare {
	struct spare *next;
};

struct sg {
	struct vfc_path_engine base;
	struct spare *spares;	/* of SMALL bytes */
	uint32_t kept;
	int epoll_fd, timer_fd;
	bool ticking, hasty;
	uint32_t under_way;
	size_t bytes;
	struct lane *lanes;
};

static struct sg *sg_of(struct vfc_path_engine *engine)
{
	return (struct sg *)engine;	/* its first member */
}

static void tick_after(struct sg *sg, long ns)
{
	struct itimerspec when = { .it_value = { ns / (long)NS_PER_S, ns % (long)NS_PER_S } };

	timerfd_settime(sg->timer_fd, 0, &when, NULL);
	sg->ticking = true;
	sg->hasty = ns < TICK_NS;
}

/* ---------------------------------------------------------------- results */

static uint8_t response_of(uint16_t host_status)
{
	switch (host_status) {
	case 0x00:	/* DID_OK */
		return VIRTIO_SCSI_S_OK;
	case 0x04:	/* DID_BAD_TARGET */
		return VIRTIO_SCSI_S_BAD_TARGET;
	case 0x05:	/* DID_ABORT */
		return VIRTIO_SCSI_S_ABORTED;
	case 0x08:	/* DID_RESET */
		return VIRTIO_SCSI_S_RESET;
	case 0x02:	/* DID_BUS_BUSY */
	case 0x0b:	/* DID_SOFT_ERROR */
	case 0x0c:	/* DID_IMM_RETRY */
	case 0x0d:	/* DID_REQUEUE */
		return VIRTIO_SCSI_S_BUSY;
	case 0x01:	/* DID_NO_CONNECT: the remote port may be back one day; a unit that is gone loses its route */
	case 0x03:	/* DID_TIME_OUT: the kernel has aborted it */
	case 0x0e:	/* DID_TRANSPORT_DISRUPTED */
	case 0x0f:	/* DID_TRANSPORT_FAILFAST */
	case 0x14:	/* DID_TRANSPORT_MARGINAL */
		return VIRTIO_SCSI_S_TRANSPORT_FAILURE;
	case 0x10:	/* DID_TARGET_FAILURE, before Linux 5.17 as those that follow */
		return VIRTIO_SCSI_S_TARGET_FAILURE;
	case 0x11:	/* DID_NEXUS_FAILURE */
		return VIRTIO_SCSI_S_NEXUS_FAILURE;
	default:	/* DID_PARITY, DID_ERROR, DID_BAD_INTR, DID_PASSTHROUGH, DID_ALLOC_FAILURE, DID_MEDIUM_ERROR */
		return VIRTIO_SCSI_S_FAILURE;
	}
}

static struct vfc_cmd *conclude(struct slot *slot, const struct sg_io_hdr *header)
{
	struct vfc_cmd *cmd = slot->cmd;
	uint32_t length = header->dxfer_len, left = header->resid > 0 ? (uint32_t)header->resid : 0;

	if (!cmd)
		return NULL;
	if (left > length)
		left = length;
	slot->result = (struct vfc_result){
		.response = response_of(header->host_status),
		.status = header->status,
		.residual = left,
	};
	if (slot->result.response == VIRTIO_SCSI_S_OK) {
		slot->result.sense = slot->sense;
		slot->result.sense_length = header->sb_len_wr < VFC_SG_SENSE ? header->sb_len_wr : VFC_SG_SENSE;
		if (slot->in && length > left)
			slot->result.moved = (uint32_t)iov_write(cmd->iov, cmd->iov_count, 0, slot->buffer, length - left);
	} else {
		slot->result.status = 0;
		slot->result.residual = length;
	}
	cmd->result = &slot->result;
	return cmd;
}

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

static void release(struct sg *sg, struct slot *slot)
{
	struct stream *stream = slot->stream;

	give_buffer(sg, slot);
	if (slot->stale)
		atomic_fetch_sub(&stream->lane->unit->stale, 1);
	slot->stale = slot->under_way = false;
	slot->cmd = NULL;
	sg_credit_give(stream->lane->unit);
	stream->under_way--;
	sg->under_way--;
	slot->next = stream->free;
	stream->free = slot;
}

static void let_go(struct slot *slot)
{
	slot->cmd = NULL;
	if (slot->in)
		return;
	slot->stale = true;
	atomic_fetch_add(&slot->stream->lane->unit->stale, 1);
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
static const struct vfc_result failed = { .refused = true, .response = VIRTIO_SCSI_S_FAILURE };
static const struct vfc_result late = { .refused = true, .response = VIRTIO_SCSI_S_TRANSPORT_FAILURE };
/* ILLEGAL REQUEST, INVALID FIELD IN CDB: more than the port can carry, as the Block Limits page has told. */
static const uint8_t invalid_field[18] = { 0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0 };
static const struct vfc_result too_long = {
	.refused = true,
	.response = VIRTIO_SCSI_S_OK,
	.status = 2,
	.sense = invalid_field,
	.sense_length = sizeof(invalid_field),
};

static enum vfc_submit refused(struct vfc_cmd *cmd, int error)
{
	switch (error) {
	case EAGAIN:
	case EDOM:	/* 16 are on their way in this file, whatever we count */
		return VFC_BUSY;
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
	if (atomic_load_explicit(&unit->stale, memory_order_relaxed))
		return answer(cmd, &busy_unit);
	if (cmd->length > unit->max_transfer)
		return answer(cmd, &too_long);
	if (!stream || (cmd->op == VFC_OP_READ && sg->bytes && sg->bytes + cmd->length > LIMIT) || !sg_credit_take(unit))
		return VFC_BUSY;
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
		return refused(cmd, error);
	}
	stream->free = slot->next;
	slot->cmd = cmd;
	slot->under_way = true;
	slot->deadline = worker_now() + unit->timeouts[slot->cdb[0]] * NS_PER_S + unit->grace_ms * NS_PER_MS;
	stream->under_way++;
	sg->under_way++;
	cmd->priv = slot;
	if (!sg->ticking)
		tick_after(sg, TICK_NS);
	return VFC_QUEUED;
}

static void flush(struct vfc_path_engine *engine)
{
	(void)engine;
}

/* ---------------------------------------------------------------- completion */

/* All that are still under way have ended with the device. */
static unsigned fail_all(struct sg *sg, struct stream *stream, struct vfc_cmd **done, unsigned count, unsigned max)
{
	for (unsigned i = 0; i < VFC_SG_QUEUE && count < max; i++) {
		struct slot *slot = &stream->slots[i];

		if (!slot->under_way)
			continue;
		if (slot->cmd) {
			slot->cmd->result = &no_device;
			done[count++] = slot->cmd;
		}
		release(sg, slot);
	}
	return count;
}

static void stop_watching(struct sg *sg, struct stream *stream)
{
	if (!stream->hung)
		epoll_ctl(sg->epoll_fd, EPOLL_CTL_DEL, stream->fd, NULL);
	stream->hung = true;
	stream->gone = true;
}

static unsigned drain(struct sg *sg, struct stream *stream, bool leaving, struct vfc_cmd **done, unsigned count,
		      unsigned max)
{
	while (count < max) {
		struct sg_io_hdr header = { .interface_id = 'S' };
		ssize_t got = read(stream->fd, &header, sizeof(header));
		struct slot *slot = header.usr_ptr;
		struct vfc_cmd *cmd;

		if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
			/* It is being removed, and some have not come back: the kernel says so all the time. */
			if (leaving)
				stop_watching(sg, stream);
			break;
		}
		if (!slot) {
			stop_watching(sg, stream);
			count = fail_all(sg, stream, done, count, max);
			break;
		}
		cmd = conclude(slot, &header);
		release(sg, slot);
		if (cmd)
			done[count++] = cmd;
	}
	return count;
}

/* Whether a command has been with the kernel for longer than it and we had agreed. */
static unsigned look_for_late(struct stream *stream, uint64_t now, struct vfc_cmd **done, unsigned count, unsigned max)
{
	for (unsigned i = 0; i < VFC_SG_QUEUE && count < max; i++) {
		struct slot *slot = &stream->slots[i];

		if (!slot->under_way || !slot->cmd || now < slot->deadline)
			continue;
		slot->cmd->result = &late;
		done[count++] = slot->cmd;
		let_go(slot);
	}
	return count;
}

static unsigned tick(struct sg *sg, struct vfc_cmd **done, unsigned count, unsigned max)
{
	uint64_t now = worker_now(), expirations;
	bool haste = false;

	(void)!read(sg->timer_fd, &expirations, sizeof(expirations));
	for (struct lane *lane = sg->lanes; lane; lane = lane->next)
		for (uint32_t i = 0; i < lane->count; i++) {
			struct stream *stream = &lane->streams[i];

			if (!stream->under_way)
				continue;
			count = look_for_late(stream, now, done, count, max);
			if (stream->hung && stream->under_way)
				count = drain(sg, stream, false, done, count, max);
			haste |= stream->hung && stream->under_way;
		}
	sg->ticking = sg->hasty = false;
	if (haste || count == max)
		tick_after(sg, HASTE_NS);
	else if (sg->under_way)
		tick_after(sg, TICK_NS);
	return count;
}

static unsigned reap(struct vfc_path_engine *engine, struct vfc_cmd **done, unsigned max)
{
	struct sg *sg = sg_of(engine);
	struct epoll_event ready[READY];
	unsigned count = 0;
	int found;

	if (!sg->lanes)
		return 0;
	found = epoll_wait(sg->epoll_fd, ready, READY, 0);
	for (int i = 0; i < found && count < max; i++) {
		struct stream *stream = ready[i].data.ptr;

		if (!stream) {
			count = tick(sg, done, count, max);
			continue;
		}
		count = drain(sg, stream, ready[i].events & (EPOLLHUP | EPOLLERR), done, count, max);
		if (stream->hung && stream->under_way && !sg->hasty)
			tick_after(sg, HASTE_NS);
	}
	return count;
}

/* ---------------------------------------------------------------- giving up */

static void cancel(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	(void)engine;
	(void)cmd;
}

static bool abandon(struct vfc_path_engine *engine, struct vfc_cmd *cmd)
{
	(void)engine;
	let_go(cmd->priv);
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
			if (stream->slots[n].under_way)
				release(sg, &stream->slots[n]);
	}
	free(lane);
}

static void path_close(struct vfc_path_engine *engine, struct vfc_path *path)
{
	struct lane *lane = path->own;

	path->own = NULL;
	if (!--lane->users)
		close_lane(sg_of(engine), lane);
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
	.reap = reap,
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
