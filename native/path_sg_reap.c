/*
 * path_sg_reap.c - how commands for /dev/sgN end: given back by the kernel, ended with their device, or late.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <scsi/sg.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "iov.h"
#include "path_sg.h"
#include "worker.h"

#define READY 16
#define NS_PER_S 1000000000ull

static const struct vfc_result late = { .refused = true, .response = VIRTIO_SCSI_S_TRANSPORT_FAILURE };
static const struct vfc_result no_device = { .refused = true, .response = VIRTIO_SCSI_S_BAD_TARGET };

void sg_tick_after(struct sg *sg, long ns)
{
	struct itimerspec when = { .it_value = { ns / (long)NS_PER_S, ns % (long)NS_PER_S } };

	timerfd_settime(sg->timer_fd, 0, &when, NULL);
	sg->ticking = true;
	sg->hasty = ns < SG_TICK_NS;
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
void sg_let_go(struct slot *slot)
{
	slot->cmd = NULL;
	if (slot->in)
		return;
	slot->stale = true;
	atomic_fetch_add(&slot->stream->lane->unit->stale, 1);
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
		cmd = conclude(slot, &header);
		sg_release(sg, slot);
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
		sg_let_go(slot);
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
		sg_tick_after(sg, SG_HASTE_NS);
	else if (sg->under_way)
		sg_tick_after(sg, SG_TICK_NS);
	return count;
}

unsigned sg_reap(struct vfc_path_engine *engine, struct vfc_cmd **done, unsigned max)
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
			sg_tick_after(sg, SG_HASTE_NS);
	}
	return count;
}
