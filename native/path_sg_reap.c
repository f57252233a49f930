/*
 * path_sg_reap.c - how commands for /dev/sgN end: given back by the kernel, ended with their device, or late.
 *
 * DID_ERROR does not tell a lost path from a device's trouble, and some drivers say it a moment before the remote port
 * is seen to be gone.  So its state is read, and where it is Online read again a little later.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <scsi/sg.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "iov.h"
#include "path_sg.h"
#include "worker.h"

#define READY 16
#define DOUBT_NS 50000000ull	/* until the second look at a remote port */
#define AT_ONCE_NS 1l	/* there was no room to give all back */
#define DID_PARITY 0x06
#define DID_ERROR 0x07
#define DRIVER_TIMEOUT 0x06
#define DRIVER_SENSE 0x08
#define NS_PER_S 1000000000ull

static const struct vfc_result late = { .refused = true, .kept = true, .response = VIRTIO_SCSI_S_TRANSPORT_FAILURE };
static const struct vfc_result no_device = { .refused = true, .response = VIRTIO_SCSI_S_BAD_TARGET };

void sg_tick_after(struct sg *sg, long ns)
{
	struct itimerspec when = { .it_value = { ns / (long)NS_PER_S, ns % (long)NS_PER_S } };

	timerfd_settime(sg->timer_fd, 0, &when, NULL);
	sg->ticking = true;
	sg->hasty = ns < SG_TICK_NS;
}

void sg_tick_no_more(struct sg *sg)
{
	struct itimerspec never = { 0 };

	/* What it has counted already is forgotten, too: it is not readable. */
	timerfd_settime(sg->timer_fd, 0, &never, NULL);
	sg->ticking = sg->hasty = false;
}

/* ---------------------------------------------------------------- results */

static bool is_online(const struct sg_unit *unit)
{
	char text[16] = { 0 };

	/* A port that is gone cannot be read. */
	if (unit->port_state_fd < 0)
		return true;
	if (pread(unit->port_state_fd, text, sizeof(text) - 1, 0) <= 0)
		return false;
	return !strncmp(text, "Online", 6) || !strncmp(text, "Marginal", 8);
}

/* Before Linux 5.14 the end of its time is told there, and host and SCSI status are 0 (scsi/scsi.h of then). */
static uint8_t response_of_driver(const struct sg_io_hdr *header)
{
	switch (header->status ? 0 : header->driver_status & 0x0f) {
	case 0:
	case DRIVER_SENSE:
		return VIRTIO_SCSI_S_OK;
	case DRIVER_TIMEOUT:
		return VIRTIO_SCSI_S_TRANSPORT_FAILURE;
	default:	/* DRIVER_BUSY, SOFT, MEDIA, ERROR, INVALID, HARD */
		return VIRTIO_SCSI_S_FAILURE;
	}
}

static bool tells_nothing(const struct sg_io_hdr *header)
{
	return header->host_status == DID_ERROR || header->host_status == DID_PARITY;
}

static uint8_t response_of(const struct sg_unit *unit, const struct sg_io_hdr *header)
{
	switch (header->host_status) {
	case 0x00:	/* DID_OK */
		return response_of_driver(header);
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
	case DID_PARITY:
	case DID_ERROR:
		return is_online(unit) ? VIRTIO_SCSI_S_FAILURE : VIRTIO_SCSI_S_TRANSPORT_FAILURE;
	default:	/* DID_BAD_INTR, DID_PASSTHROUGH, DID_ALLOC_FAILURE, DID_MEDIUM_ERROR */
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
		.response = response_of(slot->stream->lane->unit, header),
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

static bool in_doubt(const struct slot *slot, const struct sg_io_hdr *header)
{
	const struct sg_unit *unit = slot->stream->lane->unit;

	return slot->cmd && tells_nothing(header) && unit->port_state_fd >= 0 && is_online(unit);
}

static void look_again_later(struct sg *sg, struct slot *slot, uint32_t length)
{
	slot->doubtful = true;
	slot->deadline = worker_now() + DOUBT_NS;
	slot->result = (struct vfc_result){ .response = VIRTIO_SCSI_S_FAILURE, .residual = length };
	sg->doubts++;
	if (!sg->hasty)
		sg_tick_after(sg, SG_HASTE_NS);
}

/* ---------------------------------------------------------------- without the kernel */

void sg_let_go(struct sg *sg, struct slot *slot)
{
	struct lane *lane = slot->stream->lane;

	if (slot->doubtful) {	/* it has come back */
		sg_release(sg, slot);
		return;
	}
	slot->cmd = NULL;
	sg_credit_keep(lane->unit, !slot->in);
	lane->kept++;
	if (slot->buffer)
		sg->kept_bytes += slot->room;
}

/* Whose time is over: a second look at one that has come back, or the kernel has one for longer than we had agreed. */
static struct vfc_cmd *end_by_time(struct sg *sg, struct slot *slot)
{
	struct vfc_cmd *cmd = slot->cmd;

	if (slot->doubtful) {
		if (!is_online(slot->stream->lane->unit))
			slot->result.response = VIRTIO_SCSI_S_TRANSPORT_FAILURE;
		cmd->result = &slot->result;
	} else {
		cmd->result = &late;
	}
	sg_let_go(sg, slot);
	return cmd;
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
		sg_release(sg, slot);
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
		if (in_doubt(slot, &header)) {
			look_again_later(sg, slot, header.dxfer_len);
			continue;
		}
		cmd = conclude(slot, &header);
		sg_release(sg, slot);
		if (cmd)
			done[count++] = cmd;
	}
	return count;
}

static unsigned look_at_times(struct sg *sg, struct stream *stream, uint64_t now, struct vfc_cmd **done, unsigned count,
			      unsigned max)
{
	for (unsigned i = 0; i < VFC_SG_QUEUE && count < max; i++) {
		struct slot *slot = &stream->slots[i];

		if (slot->under_way && slot->cmd && now >= slot->deadline)
			done[count++] = end_by_time(sg, slot);
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
			count = look_at_times(sg, stream, now, done, count, max);
			if (stream->hung && stream->under_way)
				count = drain(sg, stream, false, done, count, max);
			haste |= stream->hung && stream->under_way;
		}
	haste |= sg->doubts;
	sg->ticking = sg->hasty = false;
	if (count == max)
		sg_tick_after(sg, AT_ONCE_NS);
	else if (haste)
		sg_tick_after(sg, SG_HASTE_NS);
	else if (sg->under_way)
		sg_tick_after(sg, SG_TICK_NS);
	return count;
}

unsigned sg_reap(struct vfc_path_engine *engine, struct vfc_cmd **done, unsigned max)
{
	struct sg *sg = sg_of(engine);
	struct epoll_event ready[READY];
	unsigned count = 0, share;
	int found;

	if (!sg->lanes && !sg->ticking)
		return 0;
	/* Each of these has its share; those for which there is no room come first the next time: the kernel goes round. */
	found = epoll_wait(sg->epoll_fd, ready, max < READY ? (int)max : READY, 0);
	for (int i = 0; i < found; i++) {
		struct stream *stream = ready[i].data.ptr;

		share = count + (max - count) / (unsigned)(found - i);
		if (!stream) {
			count = tick(sg, done, count, share);
			continue;
		}
		count = drain(sg, stream, ready[i].events & (EPOLLHUP | EPOLLERR), done, count, share);
		if (stream->hung && stream->under_way && !sg->hasty)
			sg_tick_after(sg, count == share ? AT_ONCE_NS : SG_HASTE_NS);
	}
	if (sg->leaving)
		sg_end_lanes(sg);
	return count;
}
