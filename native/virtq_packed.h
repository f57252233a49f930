/*
 * virtq_packed.h - the packed layout's share of a virtqueue; virtq.h says what each function does.
 */
#ifndef VFC_VIRTQ_PACKED_H
#define VFC_VIRTQ_PACKED_H
#include "virtq.h"

#define EVENT_BYTES 4	/* 2.8.14: an event suppression structure */

int packed_begin(struct vq *vq, uint32_t base, struct vq_place *places);
uint32_t packed_base(const struct vq *vq);
int packed_next(struct vq *vq, uint16_t *ret_id);
unsigned packed_take(struct vq *vq, uint16_t *ret_ids, unsigned max, int *ret_error);
bool packed_publish(struct vq *vq);
void packed_suppress(struct vq *vq);
bool packed_rearm(struct vq *vq);

#endif
