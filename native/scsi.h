/*
 * scsi.h - the commands that C runs, and where a request carries them.
 */
#ifndef VFC_SCSI_H
#define VFC_SCSI_H

/* SBC-4 */
enum {
	READ_6 = 0x08, WRITE_6 = 0x0a,
	READ_10 = 0x28, WRITE_10 = 0x2a,
	SYNCHRONIZE_CACHE_10 = 0x35,
	READ_16 = 0x88, WRITE_16 = 0x8a,
	SYNCHRONIZE_CACHE_16 = 0x91,
	READ_12 = 0xa8, WRITE_12 = 0xaa,
};

#define DPO 0x10
#define FUA 0x08
#define SYNC_IMMED 0x02

/* struct virtio_scsi_req_cmd */
#define HEADER_ATTRIBUTE 16
#define HEADER_CDB 19
/* virtio 1.3, 5.6.6.1: task_attr */
#define ATTRIBUTE_SIMPLE 0
#define ATTRIBUTE_ORDERED 1
#define ATTRIBUTE_HEAD_OF_QUEUE 2

#endif
