"""The blocks of one unit, as the fabric uses them: memory (a sealed memfd), a file, a block device, or nothing (null).

The adapters' C works on the same bytes through descriptors of its own, so three rules hold here as there:

- every access holds the range latch of its stripes (the fabric is owner 1), reads too: no block is
  ever seen half written.  Nobody blocks on a latch: we ask, sleep a little, ask again;
- one cache mode per unit.  O_DIRECT needs aligned memory, which a bounce buffer mends; it never mends
  a length: nothing here reads, changes and writes back part of a device block;
- a command may lose its right to the medium while it waits for a latch, so the caller takes the latch
  (fabric_latch.Holding), looks again, and only then writes.

Memory answers at once; files and devices may sleep, so their calls run in threads of the medium's
own allowance: a device that hangs takes no other unit's threads with it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import trio

from vhostfc.errors import VhostfcError
from vhostfc.fabric.link import MediumKind
from vhostfc.native import LATCH_BYTES, LATCH_WORDS, Latch
from vhostfc.scsi.task import MediumError

#: Threads that may work on one medium at a time.
THREADS = 8
#: The largest piece that memory is touched in without leaving the event loop, and that a fill writes at a time.
PIECE = 1 << 20

# linux/falloc.h: FS_IOC_UNRESVSP64 punches a hole into any regular file; struct space_resv.
_FS_IOC_UNRESVSP64 = 0x4030582B
_SPACE_RESV = struct.Struct("hhqqiI16x")
# linux/fs.h
_BLKGETSIZE64, _BLKZEROOUT = 0x80081272, 0x127F

T = TypeVar("T")


class NotSynced(MediumError):
    """What the host had in its cache did not get to the medium: not only of this command, and not another time."""


class Medium:
    """The blocks of one unit.  Made by the functions of media.py; close() gives it up.

    read_only: what others are given; can_write: what we could do.  fd: -1 for null.  latch_fd: the memfd
    that goes to adapters with the fd.  Blocks and ranges are in units of block_size; what a caller asks
    for is inside `blocks`.  Failures are scsi's MediumError; those of a sync are NotSynced, and counted.
    """

    def __init__(
        self,
        kind: MediumKind,
        fd: int,
        *,
        name: str,
        block_size: int,
        size: int,
        read_only: bool = False,
        latch_fd: int | None = None,
    ) -> None:
        self.kind = kind
        self.fd = fd
        self.name = name
        self.block_size = block_size
        self.blocks = size // block_size
        self.read_only = read_only
        self.can_write = fd < 0 or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        self.is_device = fd >= 0 and stat.S_ISBLK(os.fstat(fd).st_mode)
        self.latch_fd = -1
        self.latch: Latch | None = None
        self._known = 0  # of the losses, by our description
        self._syncing = threading.Lock()  # of two that sync at a time the kernel tells only one
        self._limiter = trio.CapacityLimiter(THREADS)
        self._inherited = latch_fd is not None
        if kind is not MediumKind.NULL:
            self.latch_fd = _new_latch() if latch_fd is None else latch_fd
            self.latch = Latch(self.latch_fd)

    def __repr__(self) -> str:
        return f"<Medium {self.kind.name} {self.name}: {self.blocks} x {self.block_size}>"

    def close(self) -> None:
        """Idempotent.  No command may be using it."""
        if self.latch is not None:
            self.latch.close()
            self.latch = None
        for fd in (self.fd, self.latch_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.latch_fd = -1

    def recover(self, owner: int) -> int:
        """Free what a dead owner holds in the latch, and finish first what it was writing; how many stripes.

        OSError: that cannot be done now, and nothing is freed.
        """
        if self.latch is None:
            return 0
        if self.kind is MediumKind.MEMORY and not self.read_only:
            self.latch.redo(owner, self.fd)
        return self.latch.recover(owner)

    def settle(self) -> None:
        """Nobody of an earlier life is left: finish what they were writing, free what they held.  Raises OSError."""
        if self._inherited and self.latch is not None:
            if not self.read_only:
                self.latch.redo(0, self.fd)
            os.pwrite(self.latch_fd, bytes(4 * LATCH_WORDS), 0)
        self._inherited = False

    def reopen(self) -> int:
        """A new open file description of the same medium (never a dup: locks belong to descriptions)."""
        flags = os.O_RDONLY if self.read_only else os.O_RDWR
        if self.kind is MediumKind.DIRECT:
            flags |= os.O_DIRECT
        return os.open(f"/proc/self/fd/{self.fd}", flags | os.O_CLOEXEC)

    def current_size(self) -> int:
        """Bytes that the file or the device has now; for others, what they were made with."""
        if self.kind not in {MediumKind.FILE, MediumKind.DIRECT}:
            return self.blocks * self.block_size
        return device_size(self.fd) if self.is_device else os.fstat(self.fd).st_size

    def grow(self, size: int) -> None:
        """Make room for `size` bytes; blocks follow.  Raises VhostfcError: it cannot grow, or would shrink."""
        if size // self.block_size < self.blocks:
            raise VhostfcError(f"{self.name}: cannot shrink from {self.blocks * self.block_size} to {size} bytes")
        if self.fd >= 0 and not self.is_device and os.fstat(self.fd).st_size < size:
            try:
                os.ftruncate(self.fd, size)
            except OSError as error:
                raise VhostfcError(f"{self.name}: cannot grow to {size} bytes: {error.strerror}") from None
        self.blocks = size // self.block_size

    def pieces(self, lba: int, blocks: int) -> Iterator[tuple[int, int]]:
        """(lba, blocks) of a range bit by bit, cut where the medium's own allocation may be: at multiples of PIECE."""
        at_once, end = max(1, PIECE // self.block_size), lba + blocks
        if self.latch is None:
            yield lba, blocks  # nobody has to be waited for
            return
        while lba < end:
            count = min(at_once - lba % at_once, end - lba)
            yield lba, count
            lba += count

    # ------------------------------------------------------------ what a unit's effects ask for

    async def read(self, lba: int, blocks: int, *, fua: bool = False) -> bytes:
        length = blocks * self.block_size
        if self.kind is MediumKind.NULL:
            return bytes(length)
        return await self._run(length, lambda: self._read(lba, length, fua))

    async def write(self, lba: int, data: bytes, *, fua: bool = False) -> None:
        if self.kind is not MediumKind.NULL:
            await self._run(len(data), lambda: self._write(lba, data, fua))

    def restore(self, offset: int, data: bytes) -> None:
        """Write at once, before anybody is served; bytes, since the blocks may have been other ones.  Raises OSError.

        By a description without O_DIRECT, which takes whole device blocks only.
        """
        if self.kind is MediumKind.NULL or offset + len(data) > self.blocks * self.block_size:
            return
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(fd, data[done:], offset + done)
            os.fsync(fd)
        finally:
            os.close(fd)

    async def fill(self, lba: int, blocks: int, block: bytes, *, unmap: bool = False) -> None:
        """unmap, with a block of zeros: the medium may drop the blocks, and they read as zeros."""
        if self.kind is not MediumKind.NULL:
            drop = unmap and not any(block)
            await self._run(blocks * self.block_size, lambda: self._fill(lba, blocks, block, drop))

    def losses(self) -> int:
        """How often the host lost what it had in its cache; see fabric_losses."""
        return self.latch.losses() if self.latch is not None else 0

    async def flush(self) -> None:
        if self.kind in {MediumKind.FILE, MediumKind.DIRECT}:
            await self._run(0, lambda: self._sync(0))

    def sync(self) -> None:
        """flush(), at once: before anybody is served.  Raises MediumError."""
        self._sync(0)

    async def extents(self, lba: int, blocks: int) -> list[tuple[int, int, bool]]:
        """[(lba, blocks, mapped)] over the range in order.  A device tells nothing: all of it is mapped."""
        if self.kind is MediumKind.NULL:
            return [(lba, blocks, False)]
        if self.is_device:
            return [(lba, blocks, True)]
        return await self._run(0, lambda: self._extents(lba, blocks))

    async def _run(self, length: int, call: Callable[[], T]) -> T:
        """In a thread where the call may take long.  Not abandoned when cancelled: it is done when we are."""
        if self.kind is MediumKind.MEMORY and length <= PIECE:
            await trio.lowlevel.checkpoint()
            return call()
        return await trio.to_thread.run_sync(call, limiter=self._limiter)

    # ------------------------------------------------------------ in the thread

    def _failed(self, lba: int, error: OSError) -> MediumError:
        return MediumError(lba, space=error.errno in {errno.ENOSPC, errno.EDQUOT})

    def _sync(self, lba: int) -> None:
        if self.kind is MediumKind.MEMORY:
            return
        with self._syncing:
            before = self.losses()
            try:
                os.fdatasync(self.fd)
            except OSError as error:
                if self.latch is not None and before >> 32 == self._known >> 32:  # else: others have counted it
                    before = self.latch.lost(before)
                raise NotSynced(lba) from error
            finally:
                self._known = before

    def _read(self, lba: int, length: int, fua: bool) -> bytes:
        if fua:
            self._sync(lba)
        offset, done = lba * self.block_size, 0
        with aligned(length) as buffer, memoryview(buffer) as view:
            while done < length:
                try:
                    got = os.preadv(self.fd, [view[done:length]], offset + done)
                except OSError as error:
                    raise self._failed(lba + done // self.block_size, error) from error
                if not got:
                    raise MediumError(lba + done // self.block_size)  # somebody truncated the file
                done += got
            return bytes(view[:length])

    def _write(self, lba: int, data: bytes, fua: bool) -> None:
        if self.kind is MediumKind.DIRECT:
            with aligned(len(data)) as buffer:
                buffer[: len(data)] = data
                with memoryview(buffer) as view:
                    self._write_all(lba, view[: len(data)])
        else:
            self._write_all(lba, memoryview(data))
        if fua:
            self._sync(lba)

    def _write_all(self, lba: int, view: memoryview) -> None:
        offset, done = lba * self.block_size, 0
        with view:
            while done < len(view):
                with view[done:] as rest:
                    try:
                        done += os.pwrite(self.fd, rest, offset + done)
                    except OSError as error:
                        raise self._failed(lba + done // self.block_size, error) from error

    def _fill(self, lba: int, blocks: int, block: bytes, drop: bool) -> None:
        if drop and self._drop(lba * self.block_size, blocks * self.block_size):
            return
        at_once = max(1, PIECE // self.block_size)
        for first in range(0, blocks, at_once):
            self._write(lba + first, block * min(at_once, blocks - first), False)

    def _drop(self, offset: int, length: int) -> bool:
        """Punch a hole; False where that cannot be done.

        A block device is zeroed (by its own means where it has some) and not discarded: BLKDISCARD
        promises nothing about what is read afterwards.
        """
        try:
            if self.is_device:
                fcntl.ioctl(self.fd, _BLKZEROOUT, struct.pack("QQ", offset, length))
            else:
                fcntl.ioctl(self.fd, _FS_IOC_UNRESVSP64, _SPACE_RESV.pack(0, os.SEEK_SET, offset, length, 0, 0))
        except OSError:
            return False
        return True

    def _extents(self, lba: int, blocks: int) -> list[tuple[int, int, bool]]:
        found = self._runs(lba, blocks)
        if self.kind is MediumKind.MEMORY:
            found = _joined(part for run in found for part in (self._zeros(*run[:2]) if run[2] else (run,)))
        return found

    def _zeros(self, lba: int, blocks: int) -> Iterator[tuple[int, int, bool]]:
        """Which of the pages of memory hold something.

        The adapters read memory through a mapping, which fills holes with pages of zeros; these are as good as
        deallocated, and SBC-3 4.7.4.6 lets them become that by themselves.
        """
        at_once, page = PIECE // self.block_size, max(1, mmap.PAGESIZE // self.block_size)
        for first in range(lba, lba + blocks, at_once):
            count = min(at_once, lba + blocks - first)
            data = os.pread(self.fd, count * self.block_size, first * self.block_size)
            if data == bytes(len(data)):
                yield first, count, False
                continue
            zeros = bytes(page * self.block_size)
            for start in range(0, count, page):
                piece = data[start * self.block_size : (start + page) * self.block_size]
                yield first + start, min(page, count - start), piece != zeros[: len(piece)]

    def _runs(self, lba: int, blocks: int) -> list[tuple[int, int, bool]]:
        """Data and holes, as the file system has them."""
        found: list[tuple[int, int, bool]] = []
        end = lba + blocks
        while lba < end:
            data = self._seek(lba * self.block_size, os.SEEK_DATA)
            first = end if data is None else min(end, data // self.block_size)
            if first > lba:
                found.append((lba, first - lba, False))
            if first < end:
                hole = self._seek(max(data or 0, first * self.block_size), os.SEEK_HOLE)
                last = end if hole is None else min(end, -(-hole // self.block_size))
                found.append((first, last - first, True))
                first = last
            lba = first
        return found

    def _seek(self, offset: int, whence: int) -> int | None:
        """None: nothing of that kind from here on."""
        try:
            return os.lseek(self.fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise self._failed(offset // self.block_size, error) from error


def _new_latch() -> int:
    fd = os.memfd_create("vhostfc-latch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, LATCH_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def _joined(parts: Iterable[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    """Neighbours of one kind are one."""
    found: list[tuple[int, int, bool]] = []
    for lba, blocks, mapped in parts:
        if found and found[-1][2] == mapped:
            found[-1] = (found[-1][0], found[-1][1] + blocks, mapped)
        else:
            found.append((lba, blocks, mapped))
    return found


def aligned(length: int) -> mmap.mmap:
    """Memory as O_DIRECT wants it: whole pages."""
    return mmap.mmap(-1, max(length, 1))


def device_size(fd: int) -> int:
    """Bytes of a block device.  Raises OSError."""
    return int.from_bytes(fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)), "little")
