"""A network whose medium is slow on purpose, and drivers that write to it as long as they may.

The fabric and adapter 2 are children of a zygote, so they are back in no time after a kill.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tests.lab.san import Daemon, San
from tests.process.driving import KIB, write_10
from tests.process.test_preempt import GOOD, IGNORE, out
from tests.process.zygote import Forked, Zygote
from vhostfc.frontend.client import BackendError
from vhostfc.frontend.driver import ScsiDriver

SIZE = 512 * KIB
WRITE = 64 * KIB
HOLDER, FAST, FRAMES = 1, 2, 3
KEY = 2  # of both victims: one command preempts both
FENCE_TIMEOUT = 0.5
MARGIN = 2.0  # what a busy machine may add
#: Longer than a slow write is under way: 16 pieces with half a millisecond between them, and what the machine adds.
LANDED = 0.04
#: Until a write that was refused is tried again: all of its data crosses the fabric, refused or not.
REFUSED = 0.04


class SlowSan(San):
    """A network whose fabric and adapter 2 are the zygote's children."""

    zygote: Zygote

    @property
    def plan(self) -> Path:
        return self.directory / "plan"

    def start_fabric(self, *options: str) -> Daemon:
        arguments = ["fabric", "--config", str(self.write_fabric()), *options]
        self.fabric = Forked(self.zygote, arguments, self.directory / "fabric.log", self.plan)
        self.started.append(self.fabric)
        self.wait_for(lambda: self.answers(self.fabric_control, self.the_fabric), self.fabric)
        return self.fabric

    def spawn_adapter(self, number: int, **how: Any) -> Daemon:
        if number != FAST:
            return super().spawn_adapter(number, **how)
        arguments = ["serve", "--config", str(self.write_adapter(number))]
        self.adapters[number] = daemon = Forked(self.zygote, arguments, self.directory / f"vm{number}.log", self.plan)
        self.started.append(daemon)
        return daemon

    @contextlib.contextmanager
    def blocks(self) -> Iterator[mmap.mmap]:
        """The medium itself."""
        path = self.directory / "disk"
        if not path.exists():
            links = Path(f"/proc/{self.the_fabric.pid}/fd").iterdir()
            path = next(link for link in links if "vhostfc-unit" in os.readlink(link))
        with path.open("rb") as file, mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ) as view:
            yield view


@dataclass
class Victim:
    """A driver that writes as long as it may, several commands at a time.  flying: those under way."""

    driver: ScsiDriver
    name: bytes
    flying: int = 0
    written: int = 0
    refused: int = 0
    lost: bool = False

    @property
    def writing(self) -> bool:
        return self.written >= 2 and self.flying >= 2

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(self._writer, number)

    async def _writer(self, number: int) -> None:
        for turn in itertools.count():
            at = (turn * 5 + number * 2) * WRITE % SIZE
            data = (self.name + turn.to_bytes(4, "big") * 3 + bytes([number])).ljust(16, b"\0") * (WRITE // 16)
            self.flying += 1
            try:
                answer = await self.driver.command(0, 0, write_10(at // 512, WRITE // 512), data, queue=0, timeout=60)
            except BackendError:
                self.lost = True
                return
            finally:
                self.flying -= 1
            if answer.good:
                self.written += 1
            elif not answer.unit_attention:
                self.refused += 1
                await trio.sleep(REFUSED)


@contextlib.asynccontextmanager
async def victim(san: San, number: int, name: bytes) -> AsyncIterator[Victim]:
    """Registered and writing; its back end may go away."""
    with contextlib.suppress(BackendError):
        async with ScsiDriver.open(san.socket(number), queues=2, timeout=60, regions=(4 << 20,)) as driver:
            one = Victim(driver, name)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.run)
                yield one
                nursery.cancel_scope.cancel()


async def join(one: Victim) -> None:
    assert await out(one.driver, IGNORE, 0, KEY) == GOOD
