"""Two adapters write the same units, and at random moments somebody is killed, also several at once.

Every block is known to its generation, from whichever adapter it is written or read, so it shows when an
acknowledged write is lost, and when one of the dead lands behind one of the living.
"""

from __future__ import annotations

import contextlib
import random
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from tests.lab.san import San, UnitSpec
from tests.process.driving import KIB, Beside, beside, units
from tests.waiting import until
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.load import GenerationTable, Load, Verification, run_load

ADAPTERS = (1, 2)
FABRIC = 0
#: Who is killed in a round; test_kill has the drivers.
VICTIMS: tuple[tuple[int, ...], ...] = ((FABRIC, 1), (2,), (FABRIC,), (1,), (1, 2), (FABRIC, 1, 2))
SIZE = 512 * KIB
SOURCES = (
    'file = "{directory}/disk.img"\nsize = {size}',
    'file = "{directory}/direct.img"\nsize = {size}\ncache = "none"',
)


@pytest.fixture
def san(tmp_path: Path) -> Iterator[San]:
    sources = [source.format(directory=tmp_path, size=SIZE) for source in SOURCES]
    with San(tmp_path, [UnitSpec(lun, source) for lun, source in enumerate(sources)]) as network:
        network.start_adapters({number: {} for number in ADAPTERS})
        yield network


def mixed(lun: int, check: Verification) -> Load:
    seed = secrets.randbits(32)
    return Load(0, lun, 0, SIZE // 512, 512, 16 * KIB, 8, 30, verification=check, stall=60.0, seed=seed)


def all_of(lun: int, check: Verification) -> Load:
    """Each block is read once."""
    commands = SIZE // (16 * KIB)
    return Load(0, lun, 0, SIZE // 512, 512, 16 * KIB, 4, random=False, commands=commands, verification=check)


@contextlib.asynccontextmanager
async def at_work(san: San, number: int, kept: list[Verification], *, doomed: bool) -> AsyncIterator[Beside]:
    async with ScsiDriver.open(san.socket(number), queues=len(kept), timeout=60) as driver:
        assert list(await units(driver)) == list(range(len(kept)))
        loads = [mixed(lun, check) for lun, check in enumerate(kept)]
        async with beside(driver, *loads, doomed=doomed) as load:
            yield load


async def some_more(san: San, number: int) -> None:
    """Wait until an adapter has moved some more data."""

    def fast() -> int:
        return int(san.status(number)["counters"]["fast"])

    enough = fast() + 50
    await until(lambda: fast() > enough, 30, what=f"for adapter {number}")


async def kill(san: San, victims: tuple[int, ...]) -> None:
    """All at once, and back again."""
    for victim in victims:
        (san.the_fabric if victim == FABRIC else san.adapters[victim]).kill()
    if FABRIC in victims:
        await trio.to_thread.run_sync(san.start_fabric)
    for victim in victims:
        if victim != FABRIC:
            await trio.to_thread.run_sync(san.start_adapter, victim)


async def all_is_there(san: San, kept: list[Verification]) -> None:
    """Each block as it was acknowledged, seen from both sides."""
    for number in ADAPTERS:
        async with ScsiDriver.open(san.socket(number), timeout=60) as driver:
            await units(driver)
            for lun, check in enumerate(kept):
                result = await run_load(driver, [all_of(lun, check)])
                assert result.errors == 0, f"adapter {number}, unit {lun}: {result.first}"
                assert result.verified


async def a_round(san: San, kept: list[Verification], victims: tuple[int, ...], pause: float) -> None:
    loads = {}
    async with contextlib.AsyncExitStack() as stack:
        for number in ADAPTERS:
            work = at_work(san, number, kept, doomed=number in victims)
            loads[number] = await stack.enter_async_context(work)
        for number in ADAPTERS:
            await some_more(san, number)
        await trio.sleep(pause)
        await kill(san, victims)
        for number in set(ADAPTERS) - set(victims):
            await trio.to_thread.run_sync(san.wait_online, number)
            await some_more(san, number)
    for number, load in loads.items():
        if number in victims:
            assert load.lost
        else:
            assert load.result.errors == 0, load.result.first
    await all_is_there(san, kept)


async def rounds(san: San, count: int) -> None:
    with contextlib.ExitStack() as tables:
        kept = [
            Verification(tables.enter_context(GenerationTable(0, SIZE // 512)), secrets.randbits(62) | 1, unit=lun)
            for lun in range(len(SOURCES))
        ]
        for number in range(count):
            pause = random.Random(number).random() / 20
            await a_round(san, kept, VICTIMS[number % len(VICTIMS)], pause)


async def test_nothing_is_lost(san: San) -> None:
    await rounds(san, 2)


@pytest.mark.long
async def test_nothing_is_ever_lost(san: San) -> None:
    await rounds(san, 60)
