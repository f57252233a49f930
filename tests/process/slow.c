/*
 * slow.c - a medium that is slow on purpose, for LD_PRELOAD: what a thread other than the first one writes goes out in
 * small pieces with pauses between them, so that a write of 64 KiB is under way for many milliseconds.
 *
 * Memory is slow by memcpy(), files by pwrite() and pwritev2().  The first thread is the event loop's; it decides and
 * must not be slow.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PIECE 4096
#define PAUSE_NS 500000

static int slow(size_t length)
{
	return length > PIECE && gettid() != getpid();
}

static void rest(void)
{
	struct timespec pause = { 0, PAUSE_NS };

	nanosleep(&pause, NULL);
}

void *memcpy(void *restrict to, const void *restrict from, size_t length)
{
	char *at = to;
	const char *source = from;

	while (slow(length)) {
		memmove(at, source, PIECE);
		at += PIECE;
		source += PIECE;
		length -= PIECE;
		rest();
	}
	memmove(at, source, length);
	return to;
}

static ssize_t write_slowly(int fd, const char *data, size_t length, off_t at)
{
	static ssize_t (*real)(int, const void *, size_t, off_t);
	size_t done = 0;

	if (!real)
		real = (ssize_t(*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite64");
	while (slow(length - done)) {
		ssize_t got = real(fd, data + done, PIECE, at + (off_t)done);

		if (got < 0)
			return done ? (ssize_t)done : got;
		done += (size_t)got;
		rest();
	}
	ssize_t got = real(fd, data + done, length - done, at + (off_t)done);

	return got < 0 ? (done ? (ssize_t)done : got) : (ssize_t)done + got;
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t at)
{
	return write_slowly(fd, data, length, at);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off_t at)
{
	return write_slowly(fd, data, length, at);
}

ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t at, int flags)
{
	ssize_t done;

	if (count != 1)
		return errno = EINVAL, -1;
	done = write_slowly(fd, iov->iov_base, iov->iov_len, at);
	if (done >= 0 && flags && fdatasync(fd))
		return -1;
	return done;
}

ssize_t pwritev64v2(int fd, const struct iovec *iov, int count, off_t at, int flags)
{
	return pwritev2(fd, iov, count, at, flags);
}
