"""A path as a port keeps it: routes on their way into force, in order, each with what its acknowledgement sets off.

A path outlives what it stands on.  While its unit cannot be reached its route is closed and the path waits; when the
unit is back it gets another.  It ends when the unit is gone for good, or its user gives it up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol, Self

import trio

from vhostfc.ports.base import InFlight, Route, RouteChange, Unit


class Owner(Protocol):
    """Who made the path."""

    def forget(self, path: RoutedPath) -> None:
        """Its user has given it up."""
        ...


@dataclass(slots=True)
class _Change:
    """A route on its way into force.  done: what its acknowledgement sets off; None once it has."""

    route: Route
    in_flight: InFlight
    done: Callable[[], None] | None

    def acknowledge(self) -> None:
        if self.done is not None:
            done, self.done = self.done, None
            done()


class RoutedPath:
    """A Path of the seam.

    nexus: the fabric's handle, None while the path waits for its unit.  ended: changes() ends when it is
    empty.  settled: its user has given it up, nothing of it is in force.
    """

    def __init__(self, owner: Owner, unit: Unit) -> None:
        self._owner = owner
        self._unit = unit
        self._queue: deque[_Change] = deque()
        self._unacknowledged: list[_Change] = []
        self._news = trio.Event()
        self.nexus: int | None = None
        self.opening: int | None = None
        self.blocks = 0
        self.answered = trio.Event()
        self.ended = False
        self.settled = trio.Event()

    def __repr__(self) -> str:
        state = "ended" if self.ended else "waiting" if self.nexus is None else f"nexus {self.nexus}"
        return f"<RoutedPath {self._unit}, {state}>"

    @property
    def unit(self) -> Unit:
        return self._unit

    def changes(self) -> AsyncIterator[RouteChange]:
        """See the seam.  The medium of a change belongs to whoever takes the change."""
        return _Changes(self)

    async def take(self) -> RouteChange | None:
        """The next change, None when there will be none."""
        await trio.lowlevel.checkpoint()
        while not self._queue:
            if self.ended:
                return None
            self._news = trio.Event()
            await self._news.wait()
        change = self._queue.popleft()
        return RouteChange(change.route, change.in_flight, change.acknowledge)

    async def aclose(self) -> None:
        """Give the path up; its last route is not in force any more."""
        self._owner.forget(self)
        await trio.lowlevel.checkpoint()

    @property
    def closing(self) -> bool:
        """A route of it may still be in force."""
        return any(change.done is not None for change in self._unacknowledged)

    def push(self, route: Route, in_flight: InFlight, done: Callable[[], None]) -> None:
        """The next route.  One for an ended path is in force as soon as the path is given up."""
        change = _Change(route, in_flight, done)
        self._unacknowledged = [c for c in self._unacknowledged if c.done is not None]
        self._unacknowledged.append(change)
        if not self.ended:
            self._queue.append(change)
        elif route.medium is not None:
            route.medium.close()
        self._news.set()

    def close_route(self, done: Callable[[], None], *, gone: bool = False) -> None:
        """Close the route in the place of what has not been taken yet; what was to be aborted still is."""
        in_flight = InFlight.FINISH
        superseded = self._empty_queue()
        for change in superseded:
            if change.in_flight is not InFlight.FINISH:
                in_flight = change.in_flight

        def acknowledge() -> None:
            for change in superseded:
                change.acknowledge()
            done()

        self.push(Route(gone=gone), in_flight, acknowledge)

    def end(self) -> None:
        """The unit is gone for good: a last change, then changes() ends."""
        self.close_route(lambda: None, gone=True)
        self.ended = True
        self.answered.set()

    def settle(self) -> None:
        """Nobody uses the path any more: everything that was to come into force is."""
        self._empty_queue()
        for change in self._unacknowledged:
            change.acknowledge()
        self.ended = True
        self.answered.set()
        self.settled.set()
        self._news.set()

    def _empty_queue(self) -> list[_Change]:
        changes = list(self._queue)
        self._queue.clear()
        for change in changes:
            if change.route.medium is not None:
                change.route.medium.close()
        return changes


class _Changes:
    """A class, not an async generator: one that is dropped half way needs nobody to close it."""

    def __init__(self, path: RoutedPath) -> None:
        self._path = path

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RouteChange:
        change = await self._path.take()
        if change is None:
            raise StopAsyncIteration
        return change
