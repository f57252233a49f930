"""The guest's side of an adapter, with workers that do nothing: what is told of a driver."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from vhostfc.daemon.fdsocket import listen
from vhostfc.daemon.guest import SILENCE, GuestSide
from vhostfc.daemon.guestevents import GuestEvent, Kind
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.vhost.effects import StartRing
from vhostfc.vhost.session import NOT_SHARED


async def nobody(_index: int | None) -> None:
    """Has commands that a stopped ring would end."""
    await trio.lowlevel.checkpoint()


class IdleWorkers:
    """Every wish is fulfilled at once.  commands: what they claim to have taken from rings."""

    def __init__(self) -> None:
        self.commands = 7

    def counters(self) -> dict[str, int]:
        return {"commands": self.commands}

    async def set_memory(self, regions: Sequence[object], *, timeout: float) -> None: ...
    async def start_ring(self, ring: StartRing) -> None: ...
    async def enable_ring(self, index: int, *, enabled: bool) -> None: ...
    async def set_call(self, index: int, fd: int) -> None: ...
    async def set_err(self, index: int, fd: int) -> None: ...
    async def reset(self) -> None: ...

    async def stop_ring(self, index: int, drain: float) -> int:
        return 0


class Warnings:
    """A log of which only warnings and worse are kept."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, object]] = []

    def info(self, *_: object, **__: object) -> None: ...

    def warning(self, event: str, **fields: object) -> None:
        self.lines.append((event, fields.get("reason")))

    error = warning


class LateWorkers(IdleWorkers):
    """The first event finds no buffer, and that there are some again is told before that answer is read."""

    def __init__(self) -> None:
        super().__init__()
        self.side: GuestSide | None = None
        self.events: list[bytes] = []

    async def put_event(self, event: bytes) -> bool:
        if self.side is None:
            self.events.append(event)
            return True
        self.side.buffers_came()
        self.side = None
        await trio.lowlevel.checkpoint()
        return False


@asynccontextmanager
async def driver_of(
    directory: Path, workers: IdleWorkers, log: Any, side: GuestSide | None = None
) -> AsyncIterator[ScsiDriver]:
    """A driver that is connected to a GuestSide on these workers, and has not started."""
    side = side or GuestSide(workers, drain_timeout=1, log=log, stopped=nobody)  # type: ignore[arg-type]  # a fake
    with listen(directory / "vhost.sock") as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side.serve, listener)
            async with ScsiDriver.open(directory / "vhost.sock", start=False) as driver:
                yield driver
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("base", "commands", "told"),
    [
        (0, 0, [("a driver has started, and nothing is seen of it", NOT_SHARED)]),
        (0, 1, []),
        (5, 0, []),  # one that was stopped, and goes on
    ],
)
async def test_a_silent_driver_is_told_once(
    tmp_path: Path, autojump_clock: MockClock, base: int, commands: int, told: list[object]
) -> None:
    workers, log = IdleWorkers(), Warnings()
    async with driver_of(tmp_path, workers, log) as driver:
        await driver.client.start([driver.queues[2].setup(base)])
        workers.commands += commands
        await trio.sleep(SILENCE * 5)
        assert log.lines == told


async def test_firmware_that_hands_over_soon_is_not_silent(tmp_path: Path, autojump_clock: MockClock) -> None:
    workers, log = IdleWorkers(), Warnings()
    async with driver_of(tmp_path, workers, log) as driver:
        for _ in range(3):
            await driver.client.start([driver.queues[2].setup(0)])
            await trio.sleep(SILENCE / 2)
            await driver.client.stop([2])
        await trio.sleep(SILENCE * 5)
        assert log.lines == []


async def test_buffers_that_come_while_an_event_finds_none_are_used(tmp_path: Path) -> None:
    workers = LateWorkers()
    side = workers.side = GuestSide(workers, drain_timeout=1, log=Warnings(), stopped=nobody)  # type: ignore[arg-type]  # a fake
    async with driver_of(tmp_path, workers, Warnings(), side) as driver:
        await driver.client.start([queue.setup(0) for queue in driver.queues])
        await side.active.wait()
        side.announce(GuestEvent(Kind.ARRIVED, 0, 1))
        with trio.fail_after(5):
            while not workers.events:
                await trio.testing.wait_all_tasks_blocked(0.001)
    assert len(workers.events) == 1
