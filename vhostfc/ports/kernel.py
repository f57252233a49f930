"""What is asked of the kernel beyond reading: a narrow door, so that a fake kernel can stand behind it.

LinuxKernel does all of it itself, as root.  Where the process that faces a guest is not root, `HelpedKernel`
(daemon/helper.py) has a small privileged process do the writes and the resets, and only opens its units itself: the
SCSI generic driver takes commands only from the process that opened the file.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import trio

from vhostfc.native import FFI, LIB
from vhostfc.ports import fcevents
from vhostfc.ports.sysfs import Lun, Sysfs

#: scsi/sg.h
SG_GET_SCSI_ID = 0x2276
SG_SCSI_RESET = 0x2284
SG_SCSI_RESET_DEVICE = 1
SG_SCSI_RESET_TARGET = 4
SG_SCSI_RESET_NO_ESCALATE = 0x100
#: linux/fs.h; for a SCSI generic node it gives bytes in an int.
BLKSECTGET = 0x1267
#: Writes and resets at a time.  They sleep in the kernel; who asks for many is rationed elsewhere (daemon/helper.py).
THREADS = 1024


class Kernel(Protocol):
    """See the head of the file."""

    @property
    def sysfs(self) -> Sysfs: ...

    async def write(self, path: Path, data: bytes) -> int:
        """One write of `data` to a file of sysfs.  The count, which may be less than all; OSError, EINTR too."""
        ...

    async def open_units(self, lun: Lun, count: int) -> tuple[list[int], int]:
        """`count` open files of a unit's node, and how many bytes one command may move.  OSError."""
        ...

    async def reset(self, lun: Lun, level: int) -> None:
        """SG_SCSI_RESET with one of its levels.  OSError."""
        ...

    def hints(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[fcevents.Hint]]: ...


class LinuxKernel:
    """The kernel that we run on.  sys, dev: where it shows itself."""

    def __init__(self, sys: Path = Path("/sys"), dev: Path = Path("/dev")) -> None:
        self._sysfs = Sysfs(sys)
        self._dev = dev
        # Of our own: a reset or a scan may wait for a minute, and nothing else should wait for it.
        self._threads = trio.CapacityLimiter(THREADS)

    @property
    def sysfs(self) -> Sysfs:
        return self._sysfs

    async def write(self, path: Path, data: bytes) -> int:
        """In a thread: making or deleting a vport takes from milliseconds to seconds."""
        return await trio.to_thread.run_sync(write_once, path, data, limiter=self._threads)

    async def open_units(self, lun: Lun, count: int) -> tuple[list[int], int]:
        return await trio.to_thread.run_sync(open_units, self._dev, lun, count)

    async def reset(self, lun: Lun, level: int) -> None:
        await trio.to_thread.run_sync(reset, self._dev, lun, level, limiter=self._threads)

    def hints(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[fcevents.Hint]]:
        return fcevents.hints()


def write_once(path: Path, data: bytes) -> int:
    """One open, one write, in C: Python repeats a write that ends with EINTR (PEP 475), and lpfc says EINTR when it has
    no resources left for another vport."""
    result = LIB.vfc_write_once(os.fsencode(path), FFI.from_buffer("uint8_t[]", data), len(data))
    if result < 0:
        raise OSError(-result, os.strerror(-result), str(path))
    return int(result)


def _open(dev: Path, lun: Lun) -> int:
    """The unit's node.  Numbers of nodes are used again: what was opened must be the unit that is meant."""
    if lun.sg is None:
        raise OSError(errno.ENOENT, "there is no /dev/sg* for it yet (is the module sg loaded?)", lun.hctl)
    fd = os.open(dev / lun.sg, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = fcntl.ioctl(fd, SG_GET_SCSI_ID, bytes(64))
        host, channel, target, number = (int.from_bytes(found[at : at + 4], "little") for at in (0, 4, 8, 12))
        # struct sg_scsi_id has the LUN as an int: of a longer one the lower half.
        wanted = [int(part) for part in lun.hctl.split(":")]
        if [host, channel, target, number] != [*wanted[:3], wanted[3] & 0xFFFFFFFF]:
            raise OSError(errno.ENODEV, "another unit has its node now", str(dev / lun.sg))
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_units(dev: Path, lun: Lun, count: int) -> tuple[list[int], int]:
    fds: list[int] = []
    try:
        for _ in range(count):
            fds.append(_open(dev, lun))
        limit = int.from_bytes(fcntl.ioctl(fds[0], BLKSECTGET, bytes(4)), "little")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds, limit


def reset(dev: Path, lun: Lun, level: int) -> None:
    fd = _open(dev, lun)
    try:
        fcntl.ioctl(fd, SG_SCSI_RESET, level.to_bytes(4, "little"))
    finally:
        os.close(fd)
