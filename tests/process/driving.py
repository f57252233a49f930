"""What the tests of whole processes do as a guest's driver: blocks by number, loads that run beside a test.

All of it over real sockets and rings; nothing here knows what is on the other side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import AsyncIterator

import trio

from vhostfc.frontend.client import BackendError
from vhostfc.frontend.driver import Response, ScsiDriver
from vhostfc.frontend.load import Load, LoadResult, run_load
from vhostfc.frontend.scan import UnitInfo, patiently, scan_target
from vhostfc.virtio.scsi import Event, EventType, ResetReason

MIB = 1 << 20
KIB = 1 << 10
TEST_UNIT_READY = bytes(6)


def read_10(lba: int, blocks: int) -> bytes:
    return b"\x28\x00" + lba.to_bytes(4, "big") + b"\x00" + blocks.to_bytes(2, "big") + b"\x00"


def write_10(lba: int, blocks: int) -> bytes:
    return b"\x2a\x00" + lba.to_bytes(4, "big") + b"\x00" + blocks.to_bytes(2, "big") + b"\x00"


async def units(driver: ScsiDriver) -> dict[int, UnitInfo]:
    """The units of target 0, by LUN."""
    return {unit.lun: unit for unit in await scan_target(driver, 0)}


async def ready(driver: ScsiDriver, lun: int) -> Response:
    """Wait until a unit answers GOOD; what pends is delivered on the way."""
    answer = await patiently(driver, 0, lun, TEST_UNIT_READY)
    assert answer.good, answer
    return answer


async def digest(driver: ScsiDriver, unit: UnitInfo, *, piece: int = MIB) -> str:
    """A hash over all of a unit."""
    found = hashlib.sha256()
    per_command = piece // unit.block_size
    for lba in range(0, unit.blocks, per_command):
        blocks = min(per_command, unit.blocks - lba)
        answer = await patiently(driver, unit.target, unit.lun, read_10(lba, blocks), data_in=blocks * unit.block_size)
        assert answer.good, answer
        assert len(answer.data_in) == blocks * unit.block_size
        found.update(answer.data_in)
    return found.hexdigest()


@dataclasses.dataclass
class Beside:
    """A load that runs beside a test; result: when it has ended.

    doomed: its back end will go away, which is no fault; lost then says how the driver saw that.
    """

    driver: ScsiDriver
    loads: tuple[Load, ...]
    doomed: bool = False
    lost: BackendError | None = None
    until: trio.Event = dataclasses.field(default_factory=trio.Event)
    results: list[LoadResult] = dataclasses.field(default_factory=list)

    @property
    def result(self) -> LoadResult:
        return self.results[0]

    async def run(self) -> None:
        try:
            self.results.append(await run_load(self.driver, self.loads, until=self.until))
        except BackendError as error:
            if not self.doomed:
                raise
            self.lost = error


@contextlib.asynccontextmanager
async def beside(driver: ScsiDriver, *loads: Load, doomed: bool = False) -> AsyncIterator[Beside]:
    """Run loads, one on each request queue from the first, while the block does; they end in good order with it."""
    load = Beside(driver, loads, doomed)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            try:
                yield load
            finally:
                load.until.set()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:  # for a test that expects it, as it was raised
            raise group.exceptions[0] from None
        raise


#: An event, short: (type, target, LUN, reason).  LUNs below 256.
Told = tuple[EventType, int, int, int]


def short(event: Event) -> Told:
    return EventType(event.type), event.lun[1], event.lun[3], event.reason


async def told(driver: ScsiDriver, *wanted: Told, timeout: float = 20.0) -> list[Event]:
    """The events of the device until all of these have come, in any order."""
    missing, found = list(wanted), list[Event]()
    with trio.move_on_after(timeout):
        async for event in driver.events():
            found.append(event)
            if short(event) in missing:
                missing.remove(short(event))
            if not missing:
                return found
    raise AssertionError(f"not told of {missing}, but of {[short(event) for event in found]}")


def rescan(lun: int) -> Told:
    return EventType.TRANSPORT_RESET, 0, lun, ResetReason.RESCAN


def removed(lun: int) -> Told:
    return EventType.TRANSPORT_RESET, 0, lun, ResetReason.REMOVED


def give_event_buffers(driver: ScsiDriver, count: int) -> None:
    """To a driver that was opened without any."""
    driver._event_buffers += [driver.memory.allocate(Event.SIZE, 16) for _ in range(count)]
    driver._post_event_buffers()
