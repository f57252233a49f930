/*
 * medium.c - opening what a unit's blocks are kept in: an fd from the fabric, checked once against what was said
 * about it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "medium.h"
#include "sg.h"

static int map_memory(struct vfc_medium *medium, int fd)
{
	struct stat status;
	int error;

	if (fstat(fd, &status) < 0)
		return -errno;
	if ((uint64_t)status.st_size < medium->bytes)
		return -EFBIG;
	medium->writable = true;
	medium->memory = mmap(NULL, medium->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	if (medium->memory == MAP_FAILED && (errno == EACCES || errno == EPERM)) {
		medium->writable = false;
		medium->memory = mmap(NULL, medium->bytes, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, 0);
	}
	if (medium->memory == MAP_FAILED) {
		error = -errno;
		medium->memory = NULL;
		return error;
	}
	madvise(medium->memory, medium->bytes, MADV_DONTDUMP);
	return guard_add(medium->memory, medium->bytes, (size_t)sysconf(_SC_PAGESIZE), &medium->guard);
}

int vfc_medium_new(const struct vfc_medium_setup *setup, struct vfc_medium **ret_medium)
{
	struct vfc_medium *medium;
	int error = 0;

	if (setup->block_size < 512 || setup->block_size > VFC_LATCH_STRIPE ||
	    (setup->block_size & (setup->block_size - 1)) || !setup->blocks ||
	    setup->blocks > INT64_MAX / setup->block_size)
		return -EINVAL;
	if (setup->kind < VFC_MEDIUM_MEMORY || setup->kind > VFC_MEDIUM_NULL)
		return -EINVAL;
	if (setup->kind != VFC_MEDIUM_NULL && (setup->fd < 0 || setup->latch_fd < 0 || !setup->owner))
		return -EINVAL;

	medium = calloc(1, sizeof(*medium));
	if (!medium)
		return -ENOMEM;
	atomic_init(&medium->holds, 1);
	medium->kind = setup->kind;
	medium->owner = setup->owner;
	medium->block_size = setup->block_size;
	medium->block_shift = (uint32_t)__builtin_ctz(setup->block_size);
	medium->blocks = setup->blocks;
	medium->bytes = setup->blocks * setup->block_size;
	medium->losses = setup->losses;
	medium->fd = -1;
	if (setup->kind != VFC_MEDIUM_NULL)
		error = vfc_latch_open(setup->latch_fd, &medium->latch);
	if (!error && setup->kind == VFC_MEDIUM_MEMORY) {
		error = map_memory(medium, setup->fd);
	} else if (!error && setup->kind != VFC_MEDIUM_NULL) {
		medium->fd = fcntl(setup->fd, F_DUPFD_CLOEXEC, 0);
		if (medium->fd < 0)
			error = -errno;
	}
	if (error) {
		vfc_medium_put(medium);
		return error;
	}
	*ret_medium = medium;
	return 0;
}

struct vfc_medium *medium_hold(struct vfc_medium *medium)
{
	atomic_fetch_add(&medium->holds, 1);
	return medium;
}

void vfc_medium_put(struct vfc_medium *medium)
{
	if (!medium || atomic_fetch_sub(&medium->holds, 1) != 1)
		return;
	if (medium->guard)
		guard_drop(medium->guard);
	if (medium->memory)
		munmap(medium->memory, medium->bytes);
	if (medium->fd >= 0)
		close(medium->fd);
	vfc_latch_put(medium->latch);
	sg_unit_free(medium->sg);
	free(medium);
}
