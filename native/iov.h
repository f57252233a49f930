/*
 * iov.h - moving bytes between our memory and a list of pieces of the guest's.
 */
#ifndef VFC_IOV_H
#define VFC_IOV_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

/* Copies up to length bytes out of the list, starting skip bytes into it; returns how many there were. */
static inline size_t iov_read(const struct iovec *iov, uint32_t count, size_t skip, void *to, size_t length)
{
	size_t done = 0;

	for (; count && done < length; iov++, count--) {
		size_t piece;

		if (skip >= iov->iov_len) {
			skip -= iov->iov_len;
			continue;
		}
		piece = iov->iov_len - skip;
		if (piece > length - done)
			piece = length - done;
		memcpy((uint8_t *)to + done, (const uint8_t *)iov->iov_base + skip, piece);
		done += piece;
		skip = 0;
	}
	return done;
}

/* The other way. */
static inline size_t iov_write(const struct iovec *iov, uint32_t count, size_t skip, const void *from, size_t length)
{
	size_t done = 0;

	for (; count && done < length; iov++, count--) {
		size_t piece;

		if (skip >= iov->iov_len) {
			skip -= iov->iov_len;
			continue;
		}
		piece = iov->iov_len - skip;
		if (piece > length - done)
			piece = length - done;
		memcpy((uint8_t *)iov->iov_base + skip, (const uint8_t *)from + done, piece);
		done += piece;
		skip = 0;
	}
	return done;
}

/*
 * Cuts the first bytes off a list that has at least that many.  Returns the index of the piece where the rest
 * begins, and in *ret_cut how many bytes were cut off that very piece.
 */
static inline uint32_t iov_trim(struct iovec *iov, size_t bytes, size_t *ret_cut)
{
	uint32_t at = 0;

	while (bytes && bytes >= iov[at].iov_len)
		bytes -= iov[at++].iov_len;
	if (bytes) {
		iov[at].iov_base = (uint8_t *)iov[at].iov_base + bytes;
		iov[at].iov_len -= bytes;
	}
	*ret_cut = bytes;
	return at;
}

#endif
