"""PREEMPT AND ABORT of adapters that write under load: after GOOD not one of their blocks lands.

Adapter 1 holds the reservation and only looks.  Adapters 2 (fast path) and 3 (frames) are registered and
write to the same unit until they are preempted, in any order, with and without an abort, and try on.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from tests.lab.san import San, UnitSpec
from tests.process.driving import KIB, Beside, beside, digest, read_10, ready, units, write_10
from tests.waiting import until
from vhostfc.frontend.driver import Response, ScsiDriver
from vhostfc.frontend.load import GenerationTable, Load, Verification
from vhostfc.frontend.scan import UnitInfo

SIZE = 512 * KIB
HOLDER, WRITERS = 1, (2, 3)
MEDIA = {"memory": f"size = {SIZE}", "file": 'file = "{directory}/disk"\nsize = ' + str(SIZE)}
REGISTER, RESERVE, CLEAR, PREEMPT, PREEMPT_AND_ABORT, IGNORE = 0, 1, 3, 4, 5, 6
WRITE_EXCLUSIVE_REGISTRANTS_ONLY = 5
GOOD, CONFLICT = 0x00, 0x18
FENCE_TIMEOUT = 1.0


@pytest.fixture(scope="module", params=list(MEDIA))
def san(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    directory: Path = tmp_path_factory.mktemp(request.param)
    units = [UnitSpec(0, MEDIA[request.param].format(directory=directory))]
    with San(directory, units, fence_timeout=FENCE_TIMEOUT) as network:
        network.start_adapter(HOLDER)
        network.start_adapter(2)
        network.start_adapter(3, fabric="fast_path = false")
        yield network


async def answer(driver: ScsiDriver, cdb: bytes, data: bytes = b"", data_in: int = 0) -> Response:
    """A command's answer, on a ring of its own; unit attentions are taken note of."""
    while True:
        found = await driver.command(0, 0, cdb, data, data_in, queue=1, timeout=30)
        if not found.unit_attention:
            return found


async def out(driver: ScsiDriver, action: int, key: int, new: int = 0, kind: int = 0) -> int:
    """A PERSISTENT RESERVE OUT; its status."""
    data = key.to_bytes(8, "big") + new.to_bytes(8, "big") + bytes(8)
    return (await answer(driver, bytes([0x5F, action, kind, 0, 0, 0, 0, 0, 24, 0]), data)).status


def writes(unit: UnitInfo, number: int, table: GenerationTable) -> Load:
    """No write is like another: each block says who wrote it, and the how manieth time."""
    length = 4 * KIB if number == 2 else 64 * KIB
    return Load(
        *(unit.target, unit.lun, 0, unit.blocks, unit.block_size, length),
        depth=16 if number == 2 else 4,
        read_percent=0,
        retry=False,
        seed=number,
        verification=Verification(table, run=1, writer=number, shared=True),
    )


class Cluster:
    """The drivers of a San's adapters, of which two write all the time."""

    def __init__(self, drivers: dict[int, ScsiDriver], unit: UnitInfo, loads: list[Beside]) -> None:
        self.drivers = drivers
        self.unit = unit
        self.loads = loads

    async def look(self) -> str:
        return await digest(self.drivers[HOLDER], self.unit)

    async def join(self, number: int) -> None:
        assert await out(self.drivers[number], IGNORE, 0, number) == GOOD

    async def write(self, number: int) -> int:
        """The status of a write of blocks that are written by nobody else."""
        return (await answer(self.drivers[number], write_10(0, 1), bytes(512))).status

    async def changes(self) -> None:
        """Wait until somebody has written."""
        before = await self.look()
        with trio.fail_after(20):
            while await self.look() == before:
                await trio.lowlevel.checkpoint()


@contextlib.asynccontextmanager
async def cluster(san: San, *, doomed: int = 0) -> AsyncIterator[Cluster]:
    """All registered, adapter 1 holds the reservation, 2 and 3 write.  doomed: one that will be killed."""
    async with contextlib.AsyncExitStack() as stack:
        drivers = {}
        for number in (HOLDER, *WRITERS):
            drivers[number] = await stack.enter_async_context(ScsiDriver.open(san.socket(number), queues=2))
            await ready(drivers[number], 0)
            assert await out(drivers[number], IGNORE, 0, number) == GOOD
        unit = (await units(drivers[HOLDER]))[0]
        assert await out(drivers[HOLDER], RESERVE, HOLDER, kind=WRITE_EXCLUSIVE_REGISTRANTS_ONLY) == GOOD
        loads = []
        for number in WRITERS:
            table = stack.enter_context(GenerationTable(0, unit.blocks))
            load = beside(drivers[number], writes(unit, number, table), doomed=number == doomed)
            loads.append(await stack.enter_async_context(load))
        yield Cluster(drivers, unit, loads)


async def rounds(san: San, count: int) -> None:
    async with cluster(san) as one:
        for number in range(count):
            await one.changes()
            action = PREEMPT if number % 3 == 2 else PREEMPT_AND_ABORT
            first, second = WRITERS if number % 2 else WRITERS[::-1]
            for victim in (first, second):
                status = await out(one.drivers[HOLDER], action, HOLDER, victim, WRITE_EXCLUSIVE_REGISTRANTS_ONLY)
                assert status == GOOD
                assert await one.write(victim) == CONFLICT
            after = await one.look()
            assert (await answer(one.drivers[2], read_10(0, 8), data_in=8 * 512)).good, "reading is not forbidden"
            for _ in range(5):
                assert await one.look() == after, f"a write landed after GOOD, in round {number}"
            for victim in WRITERS:
                await one.join(victim)
    for load in one.loads:
        assert load.result.write_commands, "nothing was written"
        assert load.result.errors, "nothing was refused"


async def test_not_one_block_lands_after_good(san: San) -> None:
    await rounds(san, 12)


@pytest.mark.long
async def test_not_one_block_lands_after_good_in_a_thousand_rounds(san: San) -> None:
    await rounds(san, 1000)


async def test_a_stopped_adapter_does_not_stop_a_preempt(san: San) -> None:
    """It is killed, and what it had in flight has landed or never will."""
    async with cluster(san, doomed=2) as one:
        await one.changes()
        san.adapters[2].signal(signal.SIGSTOP)
        began = time.monotonic()
        status = await out(one.drivers[HOLDER], PREEMPT_AND_ABORT, HOLDER, 2, WRITE_EXCLUSIVE_REGISTRANTS_ONLY)
        assert status == GOOD
        assert time.monotonic() - began < FENCE_TIMEOUT + 5
        await until(lambda: not san.adapters[2].alive, what="for the adapter to be killed")
        assert await out(one.drivers[HOLDER], PREEMPT_AND_ABORT, HOLDER, 3, WRITE_EXCLUSIVE_REGISTRANTS_ONLY) == GOOD
        after = await one.look()
        for _ in range(5):
            assert await one.look() == after
        await one.join(3)
    assert one.loads[0].lost
    san.start_adapter(2)
