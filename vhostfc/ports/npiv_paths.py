"""Paths of a vport's units: what the workers' routes lead to while the unit can be reached.

A route is open while the unit's remote port is Online and its node is there; else it is closed, commands come here
(npiv_commands.py) and wait.  A unit that comes back behind another node gets a new route under the same path.

What the kernel has of a unit is counted by the unit, whatever routes there were: a WRITE that was given up with an old
one keeps the next BUSY until the kernel has given it back.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path as FilePath

import structlog
import trio

from vhostfc.ports import sg
from vhostfc.ports.base import InFlight, Route, Unit
from vhostfc.ports.kernel import Kernel
from vhostfc.ports.routed import RoutedPath
from vhostfc.ports.sysfs import Lun

#: What is looked at here on its way: INQUIRY and READ CAPACITY for the transfer limits, REPORT LUNS for what is new.
SEEN = (0x12, 0x25, 0x9E, 0xA0)
MASK = bytes(0xFF & ~sum(1 << opcode % 8 for opcode in SEEN if opcode // 8 == byte) for byte in range(32))
#: Open files of a unit for one worker: 16 commands each.
MOST_FILES = 4
#: Seconds beyond a command's own time that the kernel has for its error recovery before we answer without it.
GRACE = 30.0
#: Bytes that one command moves at most, whatever the unit's queue would take: buffers come from kernel memory.
MOST_BYTES = 4 << 20


#: Tags that Linux leaves each unit of a host at least, however many share them (hctx_may_queue()).
FEWEST_TAGS = 4


def shares(depth: int) -> tuple[int, int]:
    """Commands at a time for the workers, and for us, of a queue so deep; none for the workers when it is 1."""
    ours = max(1, min(4, depth // 8))
    return (0, 1) if depth <= 1 else (depth - ours, ours)


def transfer_limit(queue_limit: int, segments: int) -> int:
    """Bytes of one command: what the unit's queue takes (BLKSECTGET), what the generic driver's buffers of 32 KiB make
    in so many segments, and our own bound."""
    return max(4096, min(queue_limit, segments * 32768, MOST_BYTES))


class NpivPath(RoutedPath):
    """A Path of the seam.  lun: what its open route leads to, None while that is closed.  said: it cannot be opened.
    workers: commands at a time that the route was opened for, or given since."""

    lun: Lun | None = None
    said: bool = False
    workers: int = 0


class Paths:
    """All paths of one port.  reachable: the unit's place now, None when it cannot be reached."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        workers: int,
        command_timeout: float,
        reachable: Callable[[Unit], Lun | None],
        gone: Callable[[Unit], bool],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._kernel = kernel
        self._workers = workers
        self._timeout = command_timeout
        self._reachable = reachable
        self._gone = gone
        self._log = log
        self._paths: list[NpivPath] = []
        self._media: dict[str, list[sg.SgMedium]] = {}
        self._host = sg.Credits(1)
        self._can_queue = 1
        self._units = 1
        self._credits: dict[Unit, sg.Credits] = {}
        self._segments = 128
        self._one_at_a_time = trio.Lock()
        self._held: Counter[Unit] = Counter()
        self._freed = trio.Event()

    def set_host(self, can_queue: int, segments: int) -> None:
        """What the vport's SCSI host takes; a quarter, 32 at most, is kept for commands from here."""
        self._can_queue = can_queue
        self._host.set(max(1, can_queue - min(32, can_queue // 4)))
        self._segments = segments

    def set_units(self, count: int) -> None:
        """How many units share what the host takes; look_again() puts it into force."""
        self._units = max(1, count)

    def shares(self, lun: Lun) -> tuple[int, int]:
        """Commands at a time for the workers, and for us.

        The units of a host share its tags, and one that wants more than its part of them waits in the kernel, inside
        write(2), whatever its queue's depth.
        """
        return shares(min(lun.queue_depth, max(FEWEST_TAGS, self._can_queue // self._units)))

    def in_flight(self, unit: Unit) -> int:
        """The workers' commands for a unit that the kernel has, whatever route they went by."""
        own = self._credits.get(unit)
        return 0 if own is None else own.used

    def is_stale(self, unit: Unit) -> bool:
        """Something that was given up may still change what is on the medium: what comes now could be overtaken."""
        own = self._credits.get(unit)
        return own is not None and own.stale > 0

    @property
    def idle(self) -> bool:
        """The kernel has nothing of the workers'."""
        return not any(one.used or one.stale for one in self._credits.values())

    def spoil(self, unit: Unit) -> Callable[[], None]:
        """A command from here that may change what is on the medium was given up: the same holds for the workers' next.
        The function that this returns says that the kernel has given it back."""
        own = self._credits.setdefault(unit, sg.Credits(1))
        own.spoil(1)
        return partial(own.spoil, -1)

    async def open(self, unit: Unit) -> NpivPath | None:
        if self._reachable(unit) is None:
            return None
        path = NpivPath(self, unit)
        self._paths.append(path)
        try:
            await self.look_again()
        except BaseException:
            await path.aclose()
            raise
        if path.ended or (path.lun is None and not path.said):
            await path.aclose()
            return None
        return path

    def forget(self, path: RoutedPath) -> None:
        """Its user has given it up."""
        if path in self._paths:
            path.settle()
            self._paths.remove(path)
            assert isinstance(path, NpivPath)
            path.lun = None

    async def look_again(self) -> None:
        """What can be reached has changed: open, close, end."""
        async with self._one_at_a_time:
            for path in list(self._paths):
                if path.ended:
                    continue
                if self._gone(path.unit):
                    path.lun = None
                    path.end()
                    continue
                lun = None if self._held[path.unit] else self._reachable(path.unit)
                before = path.lun
                if before is not None and (lun is None or (lun.hctl, lun.sg) != (before.hctl, before.sg)):
                    path.lun = None
                    path.close_route(_nothing)
                    before = None
                if lun is not None and before is None:
                    await self._open_route(path, lun)
                elif lun is not None:
                    await self._new_share(path, lun)
            self._forget_credits()

    def _forget_credits(self) -> None:
        """Of units that nobody has a path to, once the kernel has nothing of them."""
        wanted = {path.unit for path in self._paths}
        self._credits = {unit: one for unit, one in self._credits.items() if unit in wanted or one.used or one.stale}

    @property
    def wanting(self) -> bool:
        """There are paths that could not be opened: try again."""
        return any(path.said and not path.ended for path in self._paths)

    async def _open_route(self, path: NpivPath, lun: Lun) -> None:
        try:
            route = await self._route(path, lun)
        except OSError as error:
            if not path.said:
                self._log.error("cannot open a unit", unit=str(path.unit), reason=f"{error.filename}: {error.strerror}")
                path.said = True
                path.push(Route(), InFlight.FINISH, _nothing)  # its commands come here meanwhile
            return
        if path.ended or path not in self._paths:
            if route.medium is not None:
                route.medium.close()
            return
        path.said = False
        path.lun = lun
        path.push(route, InFlight.FINISH, _nothing)

    async def _new_share(self, path: NpivPath, lun: Lun) -> None:
        """Drivers take a unit's queue depth back when it says TASK SET FULL, and raise it again later; and units come
        and go that share the host's tags."""
        workers, _ = self.shares(lun)
        if bool(workers) != bool(path.workers):
            path.lun = None
            path.close_route(_nothing)
            await self._open_route(path, lun)
            return
        path.lun = lun
        if workers != path.workers:
            path.workers = workers
            self._credits[path.unit].set(workers)

    async def _route(self, path: NpivPath, lun: Lun) -> Route:
        path.workers, _ = self.shares(lun)
        if not path.workers:
            return Route()
        # As many files as the whole depth wants: the share may grow when other units go.
        share = min(MOST_FILES, math.ceil(shares(lun.queue_depth)[0] / sg.QUEUE / self._workers))
        fds, limit = await self._kernel.open_units(lun, share * self._workers)
        state = _open_state(self._kernel.sysfs.port_state_file(lun.hctl))
        own = self._credits.setdefault(path.unit, sg.Credits(path.workers))
        own.set(path.workers)
        try:
            medium = sg.SgMedium(
                fds,
                share=share,
                max_transfer=transfer_limit(limit, self._segments),
                grace=GRACE,
                own=own,
                host=self._host,
                timeouts=sg.timeouts(lun.type, self._timeout),
                port_state=state,
            )
        finally:
            for fd in (*fds, state):
                if fd >= 0:
                    os.close(fd)
        return Route(mask=MASK, medium=medium)

    def take(self, units: Collection[Unit]) -> None:
        """From here to release() no route of these units is opened; several may have taken one."""
        self._held.update(units)

    async def hold(self, units: Collection[Unit]) -> None:
        """Close the routes of units that were taken; returns when that is in force."""
        waiting = []
        async with self._one_at_a_time:
            for path in self._paths:
                if path.unit in units and path.lun is not None:
                    closed = trio.Event()
                    path.lun = None
                    path.close_route(closed.set)
                    waiting.append(closed)
        for closed in waiting:
            await closed.wait()

    async def release(self, units: Collection[Unit]) -> None:
        self._held.subtract(units)
        self._held = +self._held
        self._freed.set()
        self._freed = trio.Event()
        await self.look_again()

    async def free(self, unit: Unit) -> None:
        """Wait until nobody has taken the unit."""
        while self._held[unit]:
            await self._freed.wait()

    def end_all(self) -> None:
        """The port is logged out: every path ends."""
        for path in self._paths:
            if not path.ended:
                path.lun = None
                path.end()


def _open_state(path: FilePath) -> int:
    """A file descriptor, or -1."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _nothing() -> None:
    """A closed route is nobody's business but its user's: the kernel keeps its own books."""
