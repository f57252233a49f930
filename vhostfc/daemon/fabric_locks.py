"""Who still has a medium open: lock bytes, far beyond its data; and the processes that can be made to let go.

The fabric gives every open nexus a file description of its own and takes, through it, an
open-file-description lock on a byte with a number of its own (F_OFD_SETLK, fcntl(2)).  The kernel
drops that lock when the last reference is gone: every descriptor, every mapping, every request
that io_uring or direct I/O still has in flight, in whatever process, also one that was killed.  So
F_OFD_GETLK answers what no message of an adapter can: can anybody still write here?

Byte 0 is the fabric's own, so that two fabrics do not serve one file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import trio

from vhostfc.daemon.fdsocket import peer_pid

#: Where the lock bytes begin; no medium is that large.
BASE = 1 << 62
#: Waiting for a lock to be dropped: the first pause and the longest, in seconds.
PAUSE, PAUSE_MAX = 0.001, 0.05

_FLOCK = struct.Struct("hhqqi4x")  # struct flock
_SO_PEERPIDFD = 77  # Linux 6.5


def take(fd: int, number: int, *, read_only: bool = False) -> None:
    """Lock byte `number` through this description.  Raises OSError (EAGAIN) when another one has it."""
    kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, BASE + number, 1, 0))


def held(fd: int, number: int = 0, count: int = 0) -> int | None:
    """The first byte of `count` (0: all that follow) that another description has locked, else None."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, BASE + number, count, 0)
    kind, _, start, _, _ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request))
    return None if kind == fcntl.F_UNLCK else max(0, start - BASE)


async def until_free(fd: int, number: int = 0, count: int = 0, *, late: Callable[[], None] | None = None) -> None:
    """Wait until nobody else holds a lock in this range; `late` is called when that takes more than a second."""
    pause, began = PAUSE, trio.current_time()
    await trio.lowlevel.checkpoint()
    while held(fd, number, count) is not None:
        if late is not None and trio.current_time() - began > 1.0:
            late()
            late = None
        await trio.sleep(pause)
        pause = min(2 * pause, PAUSE_MAX)


def holders(fd: int, *, proc: Path = Path("/proc")) -> list[str]:
    """The processes that have our lock bytes of this file locked, for people: "4711 (vhostfc)".

    Of those that we may look at, and without those that only have the file mapped.
    """
    state = os.fstat(fd)
    inode = f"{os.major(state.st_dev):02x}:{os.minor(state.st_dev):02x}:{state.st_ino}"
    found = []
    for process in sorted((p for p in proc.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name)):
        if process.name == str(os.getpid()):
            continue
        try:
            if any(_has_lock(info.read_text(), inode) for info in (process / "fdinfo").iterdir()):
                found.append(f"{process.name} ({(process / 'comm').read_text().strip()})")
        except OSError:
            continue
    return found


def _has_lock(fdinfo: str, inode: str) -> bool:
    """A line of /proc/PID/fdinfo/N: "lock: 1: OFDLCK ADVISORY WRITE -1 00:01:1025 4611686018427387904 4611..."."""
    for line in fdinfo.splitlines():
        words = line.split()
        if words[:1] == ["lock:"] and "OFDLCK" in words and inode in words:
            start = words[words.index(inode) + 1]
            if start.isdecimal() and int(start) >= BASE:
                return True
    return False


class Process:
    """The process at the other end of a connection, as it was when it connected: a pidfd, not a number.

    Raises ProcessLookupError when it is gone already, or cannot be seen from here (another PID namespace),
    and so could not be made to let go of what it would be given.
    """

    def __init__(self, sock: trio.socket.SocketType | socket.socket) -> None:
        self.pid = peer_pid(sock)
        if not self.pid:
            raise ProcessLookupError(errno.ESRCH, "the process cannot be seen from here")
        try:
            self._fd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
            os.set_inheritable(self._fd, False)
        except OSError:
            self._fd = os.pidfd_open(self.pid)
        self.is_us = self.pid == os.getpid()

    async def ended(self) -> None:
        """Wait until it is dead."""
        await trio.lowlevel.wait_readable(self._fd)

    def kill(self) -> str | None:
        """Kill it; None, or why that is not possible."""
        if self.is_us:
            return "it is this very process"
        try:
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)
        except ProcessLookupError:
            return None
        except OSError as error:
            return error.strerror
        return None

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            trio.lowlevel.notify_closing(self._fd)
            os.close(self._fd)
        self._fd = -1
