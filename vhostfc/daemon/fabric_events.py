"""What happens in a fabric, as it happens: logins, zones, faults that hit, adapters that are killed.

Whoever has something to tell publishes it; whoever listens gets what comes from then on.  A listener
that does not keep up loses events, and is told how many.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import trio

Json = dict[str, Any]
#: Events that wait for a listener before it loses some; and those that are kept for who comes later.
WAITING, KEPT = 4096, 1000


class Listener:
    """One who listens: iterate over it.  Each event has "time" (seconds of the epoch) and "event"."""

    def __init__(self, earlier: Iterator[Json]) -> None:
        self._waiting = deque(earlier)
        self._lost = 0
        self._news = trio.Event()

    def put(self, event: Json) -> None:
        if len(self._waiting) >= WAITING:
            self._lost += 1
        else:
            self._waiting.append(event)
        self._news.set()

    def __aiter__(self) -> AsyncIterator[Json]:
        return self

    async def __anext__(self) -> Json:
        while not self._waiting and not self._lost:
            self._news = trio.Event()
            await self._news.wait()
        if self._waiting:
            return self._waiting.popleft()
        lost, self._lost = self._lost, 0
        return {"time": time.time(), "event": "events lost", "count": lost}


class Events:
    """See the head of the file."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._kept: deque[Json] = deque(maxlen=KEPT)
        self._listeners: list[Listener] = []

    def publish(self, event: str, values: Json | None = None) -> None:
        told = {"time": self._clock(), "event": event, **(values or {})}
        self._kept.append(told)
        for listener in self._listeners:
            listener.put(told)

    @contextmanager
    def listen(self, *, last: int = 0) -> Iterator[Listener]:
        """last: so many events from before come first."""
        listener = Listener(iter(list(self._kept)[len(self._kept) - min(last, len(self._kept)) :]))
        self._listeners.append(listener)
        try:
            yield listener
        finally:
            self._listeners.remove(listener)
