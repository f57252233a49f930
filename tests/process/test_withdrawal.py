"""A right that is withdrawn under load: when the reload has returned, not one write lands any more.

Adapter 1 only looks.  Adapters 2 (fast path) and 3 (frames) write to the same unit when it is taken from
them, by the mask, by a zone, because the unit goes or is made read-only.  The medium right after the
reload and the medium later, while both still try, must be the same; and each command of theirs must end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.lab.san import San, UnitSpec, Zone
from tests.process.driving import KIB, Beside, beside, digest, read_10, ready, units, write_10
from tests.waiting import until
from vhostfc.frontend.driver import Response, ScsiDriver
from vhostfc.frontend.load import GenerationTable, Load, Verification
from vhostfc.frontend.scan import UnitInfo
from vhostfc.virtio.scsi import Response as Code

SIZE = 512 * KIB
WATCHER, WRITERS = 1, (2, 3)
EVERYBODY = (WATCHER, *WRITERS)
MEDIA = {
    "memory": "size = {size}",
    "file": 'file = "{directory}/{lun}.img"\nsize = {size}',
    "direct": 'file = "{directory}/{lun}.img"\nsize = {size}\ncache = "none"',
}
UNITS = 4
LOGICAL_UNIT_NOT_SUPPORTED = (0x5, 0x25, 0x00)
WRITE_PROTECTED = (0x7, 0x27, 0x00)

Look = Callable[[], Awaitable[str]]


def size(lun: int) -> int:
    """Another one for each unit, so that their memory can be told apart."""
    return SIZE + 64 * KIB * lun


@pytest.fixture(scope="module", params=["memory", "direct", pytest.param("file", marks=pytest.mark.long)])
def san(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    directory: Path = tmp_path_factory.mktemp(request.param)
    sources = [MEDIA[request.param].format(directory=directory, lun=lun, size=size(lun)) for lun in range(UNITS)]
    units = [UnitSpec(lun, source, allow=EVERYBODY) for lun, source in enumerate(sources)]
    with San(directory, units, zones=[Zone(f"vm{number}", [number]) for number in EVERYBODY]) as network:
        fast, slow = "hold_timeout = 0.5", "hold_timeout = 0.5\nfast_path = false"
        network.start_adapters({WATCHER: {}, 2: {"fabric": fast}, 3: {"fabric": slow}})
        yield network


def writes(unit: UnitInfo, number: int, table: GenerationTable) -> Load:
    """No write is like another: each block says who wrote it, and the how manieth time."""
    return Load(
        unit.target,
        unit.lun,
        0,
        unit.blocks,
        unit.block_size,
        4 * KIB if number == 2 else 64 * KIB,
        depth=16 if number == 2 else 4,
        read_percent=0,
        retry=False,
        seed=number,
        verification=Verification(table, run=1, writer=number, shared=True),
    )


@contextlib.contextmanager
def memory(san: San, lun: int) -> Iterator[Path]:
    """A path to a unit's memory, which the fabric may close in the meantime."""
    for path in Path(f"/proc/{san.the_fabric.pid}/fd").iterdir():
        if "vhostfc-unit" in str(path.readlink()) and path.stat().st_size == size(lun):
            with path.open("rb") as stream:
                yield Path(f"/proc/self/fd/{stream.fileno()}")
            return
    raise AssertionError("no such memory")


@contextlib.asynccontextmanager
async def writing(san: San, lun: int, *, gone: bool) -> AsyncIterator[tuple[dict[int, ScsiDriver], Look]]:
    """Both writers at work on this unit; and what tells the state of its medium.

    gone: the watcher will see it no longer, so it is looked at behind the fabric's back.
    """
    loads: list[Beside] = []
    async with contextlib.AsyncExitStack() as stack:
        drivers = {n: await stack.enter_async_context(ScsiDriver.open(san.socket(n), queues=2)) for n in EVERYBODY}
        unit = (await units(drivers[WATCHER]))[lun]
        path = san.directory / f"{lun}.img"

        if gone and not path.exists():
            path = stack.enter_context(memory(san, lun))

        async def look() -> str:
            if path.exists():
                return hashlib.sha256(path.read_bytes()).hexdigest()
            return await digest(drivers[WATCHER], unit)

        before = await look()
        for number in WRITERS:
            await ready(drivers[number], lun)
            load = writes(unit, number, stack.enter_context(GenerationTable(0, unit.blocks)))
            loads.append(await stack.enter_async_context(beside(drivers[number], load)))
            await tries(san, number)
        assert await look() != before, "nobody writes"
        yield drivers, look
    for one in loads:
        assert one.result.write_commands, "nothing was written before"
        assert one.result.errors, "nothing was refused afterwards"


def commands(san: San, number: int) -> int:
    return int(san.status(number)["counters"]["commands"])


async def tries(san: San, number: int) -> None:
    """Wait until an adapter's driver has tried again many times."""
    enough = commands(san, number) + 50
    await until(lambda: commands(san, number) > enough, what=f"for more tries of adapter {number}")


async def answer(driver: ScsiDriver, lun: int, cdb: bytes, data: bytes = b"", data_in: int = 0) -> Response:
    """A command's answer, on a ring of its own; unit attentions are taken note of."""
    while True:
        found = await driver.command(0, lun, cdb, data, data_in, queue=1, timeout=10)
        if not found.unit_attention:
            return found


@contextlib.asynccontextmanager
async def restored(san: San) -> AsyncIterator[None]:
    """The network as it was, at the end, and the adapters too."""
    units, zones = list(san.units), list(san.zones)

    def whole(number: int) -> bool:
        return [target["luns"] for target in san.status(number)["targets"]] == [list(range(UNITS))]

    try:
        yield
    finally:
        san.units, san.zones = units, zones
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(san.reload)
            for number in EVERYBODY:
                await until(partial(whole, number), what=f"for adapter {number} to see all")


async def withdraw(san: San, lun: int, ends: Callable[[Response], bool], *, gone: bool = False) -> None:
    """Reload with what the fields of the network say now, while both write.

    ends: is it how a write must end then?  gone: nobody sees the unit any more.
    """
    async with writing(san, lun, gone=gone) as (drivers, look):
        await trio.to_thread.run_sync(san.reload)
        after = await look()
        for number in WRITERS:
            found = await answer(drivers[number], lun, write_10(0, 8), bytes(8 * 512))
            assert ends(found), found
            await tries(san, number)
        assert await look() == after, "a write landed after the reload"


def others(san: San, lun: int) -> list[UnitSpec]:
    return [unit for unit in san.units if unit.lun != lun]


async def test_by_the_mask(san: San) -> None:
    async with restored(san):
        san.units = [*others(san, 0), dataclasses.replace(san.units[0], allow=[WATCHER])]
        await withdraw(san, 0, lambda found: found.sense_code == LOGICAL_UNIT_NOT_SUPPORTED)


async def test_by_a_zone(san: San) -> None:
    """The target is not there any more for them, as if its cable had been pulled."""
    async with restored(san):
        san.zones = [zone for zone in san.zones if WATCHER in zone.adapters]
        await withdraw(
            san, 1, lambda found: found.response in {Code.BAD_TARGET, Code.TRANSPORT_FAILURE, Code.TARGET_FAILURE}
        )


async def test_because_the_unit_goes(san: San) -> None:
    async with restored(san):
        san.units = others(san, 2)
        await withdraw(san, 2, lambda found: found.sense_code == LOGICAL_UNIT_NOT_SUPPORTED, gone=True)


async def test_because_the_unit_is_made_read_only(san: San) -> None:
    async with restored(san):
        san.units = [*others(san, 3), dataclasses.replace(san.units[3], extra="read_only = true")]
        await withdraw(san, 3, lambda found: found.sense_code == WRITE_PROTECTED)
        async with ScsiDriver.open(san.socket(2), queues=2) as driver:
            await ready(driver, 3)
            assert (await answer(driver, 3, read_10(0, 8), data_in=8 * 512)).good
