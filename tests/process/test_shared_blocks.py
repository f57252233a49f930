"""Two adapters on one unit: no torn block, no lost neighbour.

Two proofs.  In the one the adapters write the same blocks at the same time, and every block that is read
must be one write's, whole.  In the other a block is written by one of them at a time, and what it holds is
known to the generation: a write that takes a neighbour's block back to what it was is found, as is a write
that the other adapter does not see.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import trio

from tests.lab.san import San, UnitSpec
from tests.process.driving import KIB, MIB, units
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.load import GenerationTable, Load, LoadResult, Verification, run_load
from vhostfc.frontend.scan import UnitInfo

#: Blocks of the commands, all at once: single blocks, odd numbers of them, a stripe of the latch and more than that.
SIZES = {512: (1, 3, 8, 129, 256), 4096: (1, 3, 8, 17, 32)}
#: Few bytes, so that everybody meets everybody: some stripes of the latch.
REGION = 512 * KIB

MEDIA = {
    "memory": 'size = "4MiB"',
    "file": 'file = "{directory}/disk.img"\nsize = "4MiB"',
    "direct": 'file = "{directory}/disk.img"\nsize = "4MiB"\ncache = "none"',
}


@contextlib.asynccontextmanager
async def two_drivers(san: San) -> AsyncIterator[list[ScsiDriver]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                ScsiDriver.open(san.socket(number), queues=len(SIZES[512]), regions=(4 * MIB,), queue_size=64)
            )
            for number in san.adapters
        ]


def loads(unit: UnitInfo, check: Verification, seconds: float, seed: int) -> list[Load]:
    """A load of each size; every other one is a block off what the sizes are aligned to."""
    size = unit.block_size
    found = []
    for number, blocks in enumerate(SIZES[size]):
        first = number % 2
        found.append(
            Load(
                unit.target,
                unit.lun,
                first,
                REGION // size - first,
                size,
                blocks * size,
                depth=4,
                read_percent=40,
                seconds=seconds,
                seed=seed * 100 + number,
                verification=check,
            )
        )
    return found


async def at_once(drivers: Sequence[ScsiDriver], each: Sequence[list[Load]]) -> LoadResult:
    results: list[LoadResult] = []

    async def run(driver: ScsiDriver, loads: list[Load]) -> None:
        results.append(await run_load(driver, loads))

    async with trio.open_nursery() as nursery:
        for driver, loads in zip(drivers, each, strict=True):
            nursery.start_soon(run, driver, loads)
    for result in results:
        assert result.read_commands, "this adapter has read nothing"
        assert result.write_commands, "this adapter has written nothing"
        assert result.verified
    return sum(results, LoadResult())


async def shared_unit(san: San, seconds: float) -> None:
    async with two_drivers(san) as drivers:
        infos = [(await units(driver))[0] for driver in drivers]
        assert infos[0].naa == infos[1].naa
        run = secrets.randbits(62) | 1
        with contextlib.ExitStack() as tables:
            each = []
            for writer, info in enumerate(infos, 1):
                table = tables.enter_context(GenerationTable(0, info.blocks))
                each.append(loads(info, Verification(table, run, writer, shared=True), seconds, writer))
            result = await at_once(drivers, each)
            assert result.errors == 0, f"the same blocks: {result.kinds}, {result.first}"
        with GenerationTable(0, infos[0].blocks) as table:
            check = Verification(table, run + 2)
            result = await at_once(drivers, [loads(info, check, seconds, n) for n, info in enumerate(infos, 1)])
            assert result.errors == 0, f"neighbours: {result.kinds}, {result.first}"


def network(directory: Path, medium: str, block_size: int) -> San:
    return San(directory, [UnitSpec(0, MEDIA[medium].format(directory=directory), extra=f"block_size = {block_size}")])


def start(san: San, fast: tuple[bool, bool]) -> None:
    how = {
        n: {"fabric": "" if is_fast else "fast_path = false", "vhost": "workers = 2"}
        for n, is_fast in enumerate(fast, 1)
    }
    san.start_adapters(how)


BOTH_FAST, ONE_FAST = (True, True), (True, False)


@pytest.mark.parametrize(
    ("medium", "block_size", "fast"),
    [
        ("memory", 512, BOTH_FAST),
        ("memory", 4096, ONE_FAST),
        ("file", 512, ONE_FAST),
        ("file", 4096, BOTH_FAST),
        ("direct", 512, BOTH_FAST),
    ],
)
async def test_neither_torn_nor_lost(tmp_path: Path, medium: str, block_size: int, fast: tuple[bool, bool]) -> None:
    with network(tmp_path, medium, block_size) as san:
        start(san, fast)
        await shared_unit(san, 0.5)


@pytest.mark.long
@pytest.mark.parametrize("fast", [BOTH_FAST, ONE_FAST])
@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize("medium", sorted(MEDIA))
async def test_neither_torn_nor_lost_in_a_minute(
    tmp_path: Path, medium: str, block_size: int, fast: tuple[bool, bool]
) -> None:
    with network(tmp_path, medium, block_size) as san:
        start(san, fast)
        await shared_unit(san, 30.0)
