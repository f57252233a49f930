"""Paths of an emulated port: what the link's ROUTE messages make of the workers' routes.

A path outlives what it stands on.  When the nexus ends (a logout, a broken link, the unit is taken away
for a moment) the path's route is closed and the path waits; when target and unit are back it is opened
anew.  It ends when the unit is gone for good, or its user gives it up.

Two promises are kept here.  A ROUTE is acknowledged when its user has said that it is in force, at once
when nobody uses it.  And after the link broke, no new one is made before every path's user has said that
its route is closed: an adapter must not hold media of a fabric that does not know of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog
import trio

from vhostfc.fabric import link
from vhostfc.ports.base import InFlight, PortEvent, PortEventKind, Route, Unit
from vhostfc.ports.linksocket import close_fds
from vhostfc.ports.routed import RoutedPath

if TYPE_CHECKING:
    from vhostfc.native import Medium

#: CAPACITY DATA HAS CHANGED (SPC-4 annex D).
CAPACITY_CHANGED = (0x2A, 0x09)
_IN_FLIGHT = {
    link.InFlight.FINISH: InFlight.FINISH,
    link.InFlight.RESET: InFlight.RESET,
    link.InFlight.ABORTED: InFlight.ABORTED,
}

#: Makes the C side of a ROUTE's medium; borrows the descriptors.  Raises OSError.
MakeMedium = Callable[[link.Route, list[int]], "Medium"]


def native_medium(route: link.Route, fds: list[int]) -> Medium:
    """The door to C; imported when the first route comes, because `fast_path = false` never needs it."""
    from vhostfc.native import Medium, MediumKind  # noqa: PLC0415

    fd, latch_fd = fds or (-1, -1)
    return Medium(
        MediumKind(route.medium),
        blocks=route.blocks,
        block_size=route.block_size,
        owner=route.owner,
        fd=fd,
        latch_fd=latch_fd,
        losses=route.losses,
    )


class Paths:
    """All paths of one port, on whatever link there is."""

    def __init__(
        self,
        *,
        send: Callable[[link.Message], None],
        emit: Callable[[PortEvent], None],
        reachable: Callable[[Unit], tuple[int, int] | None],
        gone: Callable[[Unit], bool],
        make_medium: MakeMedium,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        """send: puts a message on the link, if there is one.  reachable: S_ID and D_ID of a unit that can be
        opened now.  gone: is a unit gone for good?"""
        self._send = send
        self._emit = emit
        self._reachable = reachable
        self._gone = gone
        self._make_medium = make_medium
        self._log = log
        self._paths: list[RoutedPath] = []
        self._by_nexus: dict[int, RoutedPath] = {}
        self._by_seq: dict[int, RoutedPath] = {}
        self._seq = 0
        self._link = 0  # counts links: an acknowledgement for an older one is nobody's business

    async def open(self, unit: Unit) -> RoutedPath | None:
        """A path whose first change is its route, or None when the unit cannot be reached now."""
        if self._reachable(unit) is None:
            return None
        path = RoutedPath(self, unit)
        self._paths.append(path)
        try:
            self._ask(path)
            await path.answered.wait()
        except BaseException:
            await path.aclose()
            raise
        if path.nexus is None:
            await path.aclose()
            return None
        return path

    def forget(self, path: RoutedPath) -> None:
        """Its user has given it up."""
        if path not in self._paths:
            return
        path.settle()
        self._paths.remove(path)
        if path.nexus is not None:
            self._by_nexus.pop(path.nexus, None)
            self._send(link.Close(path.nexus))
            path.nexus = None

    def look_again(self) -> None:
        """The topology changed: end what is gone for good, open what is back."""
        for path in list(self._paths):
            if path.ended:
                continue
            if self._gone(path.unit):
                path.end()
            elif path.nexus is None and path.opening is None:
                self._ask(path)

    def end_all(self) -> None:
        """The port is logged out: every path ends."""
        for path in self._paths:
            if not path.ended:
                path.end()

    def latch_stuck(self, owner: int) -> None:
        """Ask the fabric after an owner that keeps a range latch of a unit that we have open."""
        for nexus in self._by_nexus:
            self._send(link.LatchStuck(nexus, owner))

    async def close_all(self) -> None:
        """The link is gone.  Returns when every path's user has closed its route; see the head of the file."""
        self._link += 1
        self._by_nexus.clear()
        self._by_seq.clear()
        waiting: list[trio.Event] = []
        for path in self._paths:
            path.opening = None
            if path.ended:
                waiting.append(path.settled)
            elif path.nexus is not None or path.closing:
                closed = trio.Event()
                path.close_route(closed.set)
                waiting.append(closed)
            path.nexus = None
            path.answered.set()
        for closed in waiting:
            await closed.wait()

    def route(self, route: link.Route, fds: list[int]) -> None:
        """A ROUTE from the fabric; takes the descriptors."""
        path = self._by_seq.pop(route.seq, None)
        if path is not None:
            path.opening = None
            path.nexus = None if route.gone else route.nexus
            path.answered.set()
            if route.gone:
                close_fds(fds)
                if route.nexus:
                    self._send(link.RouteAck(route.seq))
                return
            if path.settled.is_set():  # given up while the answer was on its way
                close_fds(fds)
                self._send(link.RouteAck(route.seq))
                self._send(link.Close(route.nexus))
                path.nexus = None
                return
            self._by_nexus[route.nexus] = path
        else:
            path = self._by_nexus.get(route.nexus)
        acknowledge = self._acknowledgement(route.seq)
        if path is None:
            close_fds(fds)
            acknowledge()
            return
        if route.gone:
            close_fds(fds)
            del self._by_nexus[route.nexus]
            path.nexus = None

            def closed() -> None:
                acknowledge()
                self.look_again()

            path.push(Route(epoch=route.epoch), _IN_FLIGHT[route.in_flight], closed)
            return
        medium = self._medium(path, route, fds)
        applied = Route(
            mask=route.mask if medium is not None else bytes(32),
            medium=medium,
            epoch=route.epoch,
            read_only=route.read_only,
        )
        path.push(applied, _IN_FLIGHT[route.in_flight], acknowledge)
        if route.blocks and path.blocks and route.blocks != path.blocks:
            self._emit(PortEvent(PortEventKind.PARAMETERS, path.unit, *CAPACITY_CHANGED))
        path.blocks = route.blocks or path.blocks

    def _ask(self, path: RoutedPath) -> None:
        ids = self._reachable(path.unit)
        if ids is None:
            return
        self._seq = self._seq % 0x7FFFFFFF + 1
        path.opening = self._seq
        self._by_seq[self._seq] = path
        self._send(link.Open(self._seq, *ids, path.unit.lun))

    def _acknowledgement(self, seq: int) -> Callable[[], None]:
        number = self._link

        def acknowledge() -> None:
            if number == self._link:
                self._send(link.RouteAck(seq))

        return acknowledge

    def _medium(self, path: RoutedPath, route: link.Route, fds: list[int]) -> Medium | None:
        """The C side of the medium, None when the route has none, or has one that C does not take."""
        if route.medium is link.MediumKind.NONE:
            return None
        try:
            return self._make_medium(route, fds)
        except OSError as error:
            self._log.error("cannot use a medium; its commands go by frames", unit=str(path.unit), reason=str(error))
            return None
        finally:
            close_fds(fds)
