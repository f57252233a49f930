"""Who listens to a port's events."""

from __future__ import annotations

from typing import Self

import trio

from vhostfc.ports.base import PortEvent


class Subscriber:
    """Events that have not been read; the same one twice says nothing new.

    A class, not an async generator: a reader that just goes away needs nobody to close it.
    """

    def __init__(self) -> None:
        self._events: dict[PortEvent, None] = {}
        self._news = trio.Event()

    def put(self, event: PortEvent) -> None:
        self._events[event] = None
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> PortEvent:
        await trio.lowlevel.checkpoint()
        while not self._events:
            self._news = trio.Event()
            await self._news.wait()
        event = next(iter(self._events))
        del self._events[event]
        return event
