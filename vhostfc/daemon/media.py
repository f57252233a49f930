"""Opens media: a memfd, a file, a block device, or nothing at all.

Whatever is wrong with one is said before anybody is served, with its path and what to set instead.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path

from vhostfc.daemon.medium import Medium, aligned, device_size
from vhostfc.errors import VhostfcError
from vhostfc.fabric.link import MediumKind
from vhostfc.native import LATCH_BYTES

# linux/fs.h
_BLKSSZGET, _BLKROGET = 0x1268, 0x125E


def memory(size: int, *, block_size: int, name: str, fd: int | None = None, latch_fd: int | None = None) -> Medium:
    """A memfd of `size` bytes that nobody can shrink under a mapping; `fd` takes over one that was kept for us.

    latch_fd: its latch, if that was kept as well: what holders have left in it is dealt with by settle().
    """
    if fd is None:
        fd = os.memfd_create("vhostfc-unit", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    elif os.fstat(fd).st_size < size:
        os.ftruncate(fd, size)
    if latch_fd is not None and os.fstat(latch_fd).st_size != LATCH_BYTES:
        os.close(latch_fd)  # of another version of ours
        latch_fd = None
    return Medium(MediumKind.MEMORY, fd, name=name, block_size=block_size, size=size, latch_fd=latch_fd)


def null(size: int, *, block_size: int, name: str) -> Medium:
    """Takes everything, gives zeros."""
    return Medium(MediumKind.NULL, -1, name=name, block_size=block_size, size=size)


def file(path: Path, size: int | None, *, block_size: int, direct: bool, read_only: bool) -> Medium:
    """A regular file; one that is not there is made when size is given, a shorter one is grown to it.

    Raises VhostfcError, which names the path.
    """
    create = os.O_CREAT if size is not None and not read_only else 0
    with _Opening(path, create, direct=direct, read_only=read_only) as opening:
        fd = opening.fd
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            raise VhostfcError(f"{path}: is not a regular file (use block = for a device)")
        if size is None:
            size = state.st_size
        elif state.st_size < size and read_only:
            raise VhostfcError(f"{path}: has {state.st_size} bytes, fewer than size = {size}, and is read-only")
        elif state.st_size < size:
            os.ftruncate(fd, size)
        if size < block_size:
            raise VhostfcError(f"{path}: has no whole block of {block_size} bytes; set size")
        if direct:
            _try_direct(fd, path, block_size)
        kind = MediumKind.DIRECT if direct else MediumKind.FILE
        return opening.keep(Medium(kind, fd, name=str(path), block_size=block_size, size=size, read_only=read_only))


def block(path: Path, *, block_size: int, direct: bool, read_only: bool) -> Medium:
    """A block device.  Raises VhostfcError, which names the path."""
    with _Opening(path, 0, direct=direct, read_only=read_only) as opening:
        fd = opening.fd
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise VhostfcError(f"{path}: is not a block device (use file = for a file)")
        sector = _ioctl_int(fd, _BLKSSZGET)
        if sector > block_size:
            raise VhostfcError(f"{path}: its blocks have {sector} bytes; set block_size = {sector}")
        if _ioctl_int(fd, _BLKROGET) and not read_only:
            raise VhostfcError(f"{path}: the device is read-only; set read_only = true")
        size = device_size(fd)
        kind = MediumKind.DIRECT if direct else MediumKind.FILE
        return opening.keep(Medium(kind, fd, name=str(path), block_size=block_size, size=size, read_only=read_only))


class _Opening:
    """Opens a path; the descriptor is closed again unless a medium was made of it.

    A unit that is read-only is opened for writing all the same where that is possible: it may become
    writable while we run.  Adapters never see this descriptor.
    """

    def __init__(self, path: Path, flags: int, *, direct: bool, read_only: bool) -> None:
        self._path = path
        self._kept = False
        flags |= os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        try:
            try:
                self.fd = os.open(path, flags | os.O_RDWR, 0o600)
            except OSError as error:
                if not read_only or error.errno not in {errno.EACCES, errno.EPERM, errno.EROFS}:
                    raise
                self.fd = os.open(path, flags | os.O_RDONLY)
        except OSError as error:
            if direct and error.errno == errno.EINVAL:
                raise VhostfcError(f'{path}: its file system has no O_DIRECT; set cache = "writeback"') from None
            raise VhostfcError(f"{path}: {error.strerror}") from None

    def __enter__(self) -> _Opening:
        return self

    def keep(self, medium: Medium) -> Medium:
        self._kept = True
        return medium

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if not self._kept:
            os.close(self.fd)
        if isinstance(error, OSError):
            raise VhostfcError(f"{self._path}: {error.strerror}") from None


def _ioctl_int(fd: int, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, request, bytes(4)), "little")


def _try_direct(fd: int, path: Path, block_size: int) -> None:
    """O_DIRECT takes whole device blocks only; better to know now than at the guest's first write."""
    try:
        with aligned(block_size) as buffer:
            os.preadv(fd, [buffer], 0)
            if block_size < mmap.PAGESIZE:
                os.preadv(fd, [memoryview(buffer)[:block_size]], block_size)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise VhostfcError(
            f"{path}: O_DIRECT wants larger blocks than {block_size} bytes; "
            'set block_size = 4096 or cache = "writeback"'
        ) from None
