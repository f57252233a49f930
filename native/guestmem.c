/*
 * guestmem.c - guest memory is a stranger's: regions may be larger than their file says one day, may be truncated
 * after mapping, may overlap.  What can be checked is checked when a region comes in; what can change later
 * (the file shrinks) is met by a SIGBUS handler, so that a copy never kills the process.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "guestmem.h"

/* ---------------------------------------------------------------- guards */

#define GUARDS 16384		/* 32 tables of 509 regions; a slot costs 40 bytes of bss once touched */
#define HUGETLBFS 0x958458f6	/* statfs(2): f_type of hugetlbfs */

struct guard {
	_Atomic uintptr_t start, end;	/* 0, 0: free */
	_Atomic size_t page;
	_Atomic bool torn;
	bool taken;			/* under guards_lock */
};

_Atomic uint32_t guard_tears;
static struct guard guards[GUARDS];
static _Atomic uint32_t guards_top;	/* the handler looks no further */
static pthread_mutex_t guards_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t guards_once = PTHREAD_ONCE_INIT;
static struct sigaction previous;

/*
 * Reads only atomics and calls only mmap.  The mapping cannot go away meanwhile: the thread that faulted uses it,
 * so somebody holds it.
 */
static void on_sigbus(int signo, siginfo_t *info, void *context)
{
	uintptr_t at = (uintptr_t)info->si_addr;
	uint32_t top = atomic_load(&guards_top);
	int saved = errno;

	for (uint32_t i = 0; i < top; i++) {
		struct guard *guard = &guards[i];
		uintptr_t page;
		size_t size;

		if (at < atomic_load(&guard->start) || at >= atomic_load(&guard->end))
			continue;
		size = atomic_load(&guard->page);
		page = at & ~(uintptr_t)(size - 1);
		if (mmap((void *)page, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
		    MAP_FAILED)
			break;
		atomic_store(&guard->torn, true);
		atomic_fetch_add(&guard_tears, 1);
		errno = saved;
		return;
	}
	errno = saved;
	if (previous.sa_flags & SA_SIGINFO) {
		previous.sa_sigaction(signo, info, context);
	} else if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN) {
		/* Not ours: the instruction runs again and meets what was there before us. */
		signal(signo, SIG_DFL);
	} else {
		previous.sa_handler(signo);
	}
}

static void install(void)
{
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER };

	sigemptyset(&action.sa_mask);
	sigaction(SIGBUS, &action, &previous);
}

int guard_add(void *start, size_t length, size_t page, struct guard **ret_guard)
{
	int error = -ENOMEM;

	pthread_once(&guards_once, install);
	pthread_mutex_lock(&guards_lock);
	for (uint32_t i = 0; i < GUARDS; i++) {
		struct guard *guard = &guards[i];

		if (guard->taken)
			continue;
		guard->taken = true;
		atomic_store(&guard->torn, false);
		atomic_store(&guard->page, page);
		atomic_store(&guard->end, (uintptr_t)start + length);
		atomic_store(&guard->start, (uintptr_t)start);
		if (i >= atomic_load(&guards_top))
			atomic_store(&guards_top, i + 1);
		*ret_guard = guard;
		error = 0;
		break;
	}
	pthread_mutex_unlock(&guards_lock);
	return error;
}

void guard_drop(struct guard *guard)
{
	pthread_mutex_lock(&guards_lock);
	atomic_store(&guard->end, 0);
	atomic_store(&guard->start, 0);
	guard->taken = false;
	pthread_mutex_unlock(&guards_lock);
}

bool guard_torn(const struct guard *guard)
{
	return atomic_load_explicit(&guard->torn, memory_order_relaxed);
}

/* ---------------------------------------------------------------- regions */

/* The unit in which this file can be mapped: huge pages only as a whole. */
static size_t mapping_unit(int fd, const struct stat *status)
{
	struct statfs fs;

	if (!fstatfs(fd, &fs) && fs.f_type == HUGETLBFS)
		return (size_t)status->st_blksize;
	return (size_t)sysconf(_SC_PAGESIZE);
}

int vfc_map_new(int fd, uint64_t gpa, uint64_t size, uint64_t uaddr, uint64_t offset, struct vfc_map **ret_map)
{
	uint64_t first, length, end;
	struct vfc_map *map;
	struct stat status;
	size_t unit;
	int error;

	if (!size || __builtin_add_overflow(gpa, size, &end) || __builtin_add_overflow(uaddr, size, &end) ||
	    __builtin_add_overflow(offset, size, &end) || end > INT64_MAX)
		return -EINVAL;
	if (fstat(fd, &status) < 0)
		return -errno;
	if (S_ISREG(status.st_mode) && end > (uint64_t)status.st_size)
		return -EFBIG;
	unit = mapping_unit(fd, &status);
	first = offset & ~(uint64_t)(unit - 1);
	length = ((end - first) + unit - 1) & ~(uint64_t)(unit - 1);

	map = calloc(1, sizeof(*map));
	if (!map)
		return -ENOMEM;
	map->start = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, (off_t)first);
	if (map->start == MAP_FAILED) {
		error = -errno;
		free(map);
		return error;
	}
	/* A core dump is about us, not about the guest. */
	madvise(map->start, length, MADV_DONTDUMP);
	error = guard_add(map->start, length, unit, &map->guard);
	if (error) {
		munmap(map->start, length);
		free(map);
		return error;
	}
	atomic_init(&map->holds, 1);
	map->gpa = gpa;
	map->size = size;
	map->uaddr = uaddr;
	map->length = length;
	map->host = (uint8_t *)map->start + (offset - first);
	*ret_map = map;
	return 0;
}

void vfc_map_put(struct vfc_map *map)
{
	if (!map || atomic_fetch_sub(&map->holds, 1) != 1)
		return;
	guard_drop(map->guard);
	munmap(map->start, map->length);
	free(map);
}

/* ---------------------------------------------------------------- tables */

static int by_gpa(const void *a, const void *b)
{
	const struct vfc_map *one = *(struct vfc_map *const *)a, *two = *(struct vfc_map *const *)b;

	return one->gpa < two->gpa ? -1 : one->gpa > two->gpa;
}

static int by_uaddr(const void *a, const void *b)
{
	const struct vfc_map *one = *(struct vfc_map *const *)a, *two = *(struct vfc_map *const *)b;

	return one->uaddr < two->uaddr ? -1 : one->uaddr > two->uaddr;
}

int vfc_mem_new(struct vfc_map *const *maps, uint32_t n, struct vfc_mem **ret_mem)
{
	struct vfc_mem *mem = calloc(1, sizeof(*mem) + n * sizeof(mem->maps[0]));

	if (!mem)
		return -ENOMEM;
	for (uint32_t i = 0; i < n; i++)
		mem->maps[i] = maps[i];
	qsort(mem->maps, n, sizeof(mem->maps[0]), by_uaddr);
	for (uint32_t i = 1; i < n; i++)
		if (mem->maps[i - 1]->uaddr + mem->maps[i - 1]->size > mem->maps[i]->uaddr)
			goto overlap;
	qsort(mem->maps, n, sizeof(mem->maps[0]), by_gpa);
	for (uint32_t i = 1; i < n; i++)
		if (mem->maps[i - 1]->gpa + mem->maps[i - 1]->size > mem->maps[i]->gpa)
			goto overlap;
	for (uint32_t i = 0; i < n; i++)
		atomic_fetch_add(&mem->maps[i]->holds, 1);
	atomic_init(&mem->holds, 1);
	mem->count = n;
	*ret_mem = mem;
	return 0;
overlap:
	free(mem);
	return -EINVAL;
}

struct vfc_mem *mem_hold(struct vfc_mem *mem)
{
	atomic_fetch_add(&mem->holds, 1);
	return mem;
}

void vfc_mem_put(struct vfc_mem *mem)
{
	if (!mem || atomic_fetch_sub(&mem->holds, 1) != 1)
		return;
	for (uint32_t i = 0; i < mem->count; i++)
		vfc_map_put(mem->maps[i]);
	free(mem);
}

const struct vfc_map *mem_find(const struct vfc_mem *mem, uint64_t gpa)
{
	uint32_t low = 0, high = mem->count;

	while (low < high) {
		uint32_t middle = (low + high) / 2;
		const struct vfc_map *map = mem->maps[middle];

		if (gpa < map->gpa)
			high = middle;
		else if (gpa - map->gpa >= map->size)
			low = middle + 1;
		else
			return map;
	}
	return NULL;
}

void *mem_user(const struct vfc_mem *mem, uint64_t uaddr, uint64_t size, const struct vfc_map **ret_map)
{
	for (uint32_t i = 0; i < mem->count; i++) {
		const struct vfc_map *map = mem->maps[i];
		uint64_t offset = uaddr - map->uaddr;

		if (uaddr >= map->uaddr && offset < map->size && size <= map->size - offset) {
			*ret_map = map;
			return map->host + offset;
		}
	}
	return NULL;
}

int vfc_mem_covers(const struct vfc_mem *mem, uint64_t uaddr, uint64_t size)
{
	const struct vfc_map *map;

	return mem_user(mem, uaddr, size, &map) != NULL;
}

const struct vfc_map *mem_of_host(const struct vfc_mem *mem, const void *host)
{
	for (uint32_t i = 0; i < mem->count; i++) {
		const struct vfc_map *map = mem->maps[i];

		if ((const uint8_t *)host >= map->host && (const uint8_t *)host < map->host + map->size)
			return map;
	}
	return NULL;
}

bool mem_has(const struct vfc_mem *mem, const struct vfc_map *map)
{
	for (uint32_t i = 0; i < mem->count; i++)
		if (mem->maps[i] == map)
			return true;
	return false;
}
