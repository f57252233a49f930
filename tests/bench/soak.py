"""Correctness under speed: verified loads of every shape, while the guest does to its device what guests do.

    python -m tests.bench.soak [--minutes 10] [--seed N] [--socket SOCKET --unit T:L]

Rounds until the time is over.  A round is a driver of its own: split or packed rings, with and without indirect
descriptors and event indices, 1 to 4 queues, depths 1 to 256, commands of 512 bytes to 1 MiB in one piece or many,
polling or sleeping, reads and writes mixed, the queues alike or the first and third much busier.  Its loads are
verified block by block, and go on over rings that are stopped and started, memory that is plugged and pulled, rings
that move from worker to worker (not with --socket), and device resets; at its end all is read back.  Without --socket
it starts a fabric with units of memory, file and both block sizes, and an adapter with two workers.

Exit status 1: something came back wrong; the round's shape and seed are printed, to run it again.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from tests.lab.san import San, UnitSpec
from vhostfc.daemon.control import call
from vhostfc.frontend.client import WANTED
from vhostfc.frontend.driver import MIB, ScsiDriver
from vhostfc.frontend.load import GenerationTable, Load, LoadResult, Verification, max_depth, run_load
from vhostfc.frontend.options import parse_unit
from vhostfc.frontend.scan import UnitInfo, scan_unit
from vhostfc.vhost.features import Feature

KIB = 1024
#: Bytes of a unit that a round works on, and what its depth times its command size may come to.
REGION = 32 * MIB
IN_FLIGHT = 64 * MIB
ROUND_SECONDS = 2.0
PART_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Shape:
    """A round.  segment: bytes of a data descriptor, 0: one."""

    seed: int
    packed: bool
    indirect: bool
    event_idx: bool
    ring: int
    queues: int
    depth: int
    io_size: int
    segment: int
    poll: bool
    random: bool
    read_percent: int
    uneven: bool

    @classmethod
    def draw(cls, seed: int, block_size: int) -> Shape:
        dice = random.Random(seed)
        packed = seed % 2 == 1
        io_size = max(block_size, 512 << dice.randint(0, 11))
        queues = dice.randint(1, 4)
        depth = min(1 << dice.randint(0, 8), max(1, IN_FLIGHT // io_size // queues))
        ring = dice.choice([64, 128, 256, 1024])
        if packed and dice.random() < 0.5:
            ring -= dice.randint(1, 15)  # not a power of two
        return cls(
            seed, packed, dice.random() < 0.75, dice.random() < 0.75, ring, queues, depth, io_size,
            dice.choice([0, 0, 4096, max(4096, io_size // 16)]), dice.random() < 0.3, dice.random() < 0.7,
            dice.choice([0, 30, 50, 70, 95]), dice.random() < 0.5,
        )  # fmt: skip

    @property
    def features(self) -> int:
        features = WANTED & ~(1 << Feature.SCSI_HOTPLUG) & ~(1 << Feature.SCSI_CHANGE)
        features &= ~0 if self.indirect else ~(1 << Feature.INDIRECT_DESC)
        return features & (~0 if self.event_idx else ~(1 << Feature.EVENT_IDX))


def loads(shape: Shape, unit: UnitInfo, check: Verification) -> list[Load]:
    """One a queue, all on the same blocks."""
    blocks = min(unit.blocks, REGION // unit.block_size)
    load = Load(
        unit.target, unit.lun, 0, blocks, unit.block_size, shape.io_size, shape.depth, shape.read_percent,
        shape.random, shape.segment, shape.poll, seconds=PART_SECONDS, verification=check,
    )  # fmt: skip
    most = max_depth(load, shape.ring, indirect=shape.indirect)
    if not most:  # too many pieces for this ring
        return loads(replace(shape, segment=0), unit, check)
    depths = [min(shape.depth, most) if number % 2 == 0 or not shape.uneven else 1 for number in range(shape.queues)]
    return [replace(load, depth=depth, seed=shape.seed * 8 + number) for number, depth in enumerate(depths)]


async def disturb(driver: ScsiDriver, dice: random.Random) -> None:
    """What a guest does between two commands: each leaves the driver able to go on."""
    match dice.randrange(4):
        case 0:
            await driver.stop()
            await driver.start()
        case 1:
            await driver.reset()
        case 2:
            region = await driver.client.add_region(dice.randint(1, 16) * MIB)
            await driver.stop()
            await driver.client.remove_region(region)
            await driver.start()
        case _:
            pass


async def plug(driver: ScsiDriver, dice: random.Random) -> None:
    """Memory comes and goes while the loads run."""
    while True:
        region = await driver.client.add_region(dice.randint(1, 8) * MIB)
        await trio.sleep(0.01)
        with trio.CancelScope(shield=True):
            await driver.client.remove_region(region)
        await trio.sleep(0.01)


async def move(control: Path, queues: int, dice: random.Random) -> None:
    """Rings go from one worker of the adapter to the other."""
    while True:
        await call(control, "move", {"ring": 2 + dice.randrange(queues), "worker": dice.randrange(2)})
        await trio.sleep(0.003)


async def one_round(
    socket: Path, where: tuple[int, int], shape: Shape, unit: UnitInfo, control: Path | None
) -> LoadResult:
    """A driver's life; what its loads did."""
    dice = random.Random(shape.seed)
    result = LoadResult()
    async with ScsiDriver.open(
        socket, queues=shape.queues, queue_size=shape.ring, features=shape.features, packed=shape.packed
    ) as driver:
        with GenerationTable(0, min(unit.blocks, REGION // unit.block_size)) as table:
            work = loads(shape, unit, Verification(table, shape.seed << 8 | 1))
            end = time.monotonic() + ROUND_SECONDS
            while time.monotonic() < end:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(plug, driver, dice)
                    if control is not None:
                        nursery.start_soon(move, control, shape.queues, dice)
                    result += await run_load(driver, work)
                    nursery.cancel_scope.cancel()
                await disturb(driver, dice)
            back = replace(
                work[0], io_size=max(4096, unit.block_size), depth=min(16, work[0].depth), read_percent=100,
                segment=0, random=False, seconds=0.0, commands=min(unit.size, REGION) // max(4096, unit.block_size),
            )  # fmt: skip
            result += await run_load(driver, [back])
    return result


async def find(socket: Path, where: tuple[int, int]) -> UnitInfo:
    async with ScsiDriver.open(socket) as driver:
        unit = await scan_unit(driver, *where)
        assert unit is not None, f"{socket}: no unit at {where}"
        return unit


async def soak(
    socket: Path, places: list[tuple[int, int]], minutes: float, seed: int, control: Path | None = None
) -> int:
    """Rounds over these units until the time is over; how many commands went wrong."""
    units = {where: await find(socket, where) for where in places}
    end, number, commands, verified, wrong = time.monotonic() + 60 * minutes, 0, 0, 0, 0
    while time.monotonic() < end:
        where = places[number % len(places)]
        # Split and packed by turns on each unit.
        shape = Shape.draw(2 * (seed + number) + number // len(places) % 2, units[where].block_size)
        result = await one_round(socket, where, shape, units[where], control)
        commands += sum(result.statuses.values())
        verified += result.verified
        wrong += result.errors
        if result.errors:
            print(f"WRONG: unit {where}: {result.kinds}, first: {result.first}\n  {shape}", flush=True)
        number += 1
    print(f"{number} rounds, {commands:,} commands, {verified:,} blocks verified, {wrong} wrong", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Verified loads while the device is stopped, started and changed.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--socket", type=Path, help="this back end instead of one of our own; destroys the unit's data")
    parser.add_argument("--unit", default="0:0", metavar="T:L")
    options = parser.parse_args()
    if options.socket is not None:
        return int(bool(trio.run(soak, options.socket, [parse_unit(options.unit)], options.minutes, options.seed)))
    with tempfile.TemporaryDirectory(prefix="vhostfc-soak-") as name:
        directory = Path(name)
        units = [
            UnitSpec(0, 'size = "64MiB"'),
            UnitSpec(1, f'file = "{directory}/disk.img"\nsize = "64MiB"'),
            UnitSpec(2, 'size = "64MiB"\nblock_size = 4096'),
        ]
        with San(directory, units) as san:
            san.start_adapter(1, vhost="workers = 2")
            places = [(0, unit.lun) for unit in units]
            wrong = trio.run(soak, san.socket(1), places, options.minutes, options.seed, san.control(1))
            print(f"rings moved {san.status(1)['counters']['rings_moved']} times between the workers")
            return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
