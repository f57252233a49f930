"""The load generator against a back end that obeys, and against one that lies."""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.frontend.fakebackend import Disk, FakeBackend, Outcome, check, good
from vhostfc.frontend.client import BackendError
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.load import GenerationTable, Load, LoadResult, Verification, max_depth, run_load
from vhostfc.vhost.features import Feature
from vhostfc.virtio.scsi import CommandRequest, CommandResponse, Response

READ = Load(0, 0, 0, 256, io_size=1024, depth=8, commands=300)
WRITE = dataclasses.replace(READ, read_percent=0)
MIXED = dataclasses.replace(READ, read_percent=50)
RUN = 0xC0FFEE


@pytest.fixture
async def driver(backend: FakeBackend, socket_path: Path) -> AsyncIterator[ScsiDriver]:
    async with ScsiDriver.open(socket_path, queues=2) as driver:
        yield driver


def verified(load: Load, table: GenerationTable, *, shared: bool = False, writer: int = 1) -> Load:
    return dataclasses.replace(load, verification=Verification(table, RUN, writer, unit=3, shared=shared))


@pytest.mark.parametrize("poll", [False, True])
@pytest.mark.parametrize("random", [False, True])
async def test_runs_exactly_as_many_commands_as_asked(
    backend: FakeBackend, driver: ScsiDriver, poll: bool, random: bool
) -> None:
    """Count, bytes and latency add up, the ring comes back usable, and the memory is taken out again."""
    result = await run_load(driver, [dataclasses.replace(MIXED, poll=poll, random=random)])

    assert result.commands == 300
    assert result.read_bytes + result.write_bytes == 300 * 1024
    assert (result.errors, result.first, result.kinds) == (0, None, {})
    assert result.statuses == {0: 300}
    assert 0 < result.latency.least <= result.latency.percentile(50) <= result.latency.most
    assert sum(result.reads.histogram) == result.read_commands > 0
    assert sum(result.writes.histogram) == result.write_commands > 0
    assert len(backend.commands) == 300
    assert len(backend.regions) == 1
    assert (await driver.command(0, 0, bytes(6))).good


async def test_sequential_goes_round(backend: FakeBackend, driver: ScsiDriver) -> None:
    """Sequential commands walk the range in order and begin again."""
    load = Load(0, 0, 10, 9, io_size=1024, depth=1, commands=6, random=False)
    await run_load(driver, [load])

    assert [struct.unpack_from(">I", request.cdb, 2)[0] for request in backend.commands] == [10, 12, 14, 16, 10, 12]


@pytest.mark.parametrize("without", [Feature.INDIRECT_DESC, Feature.EVENT_IDX])
@pytest.mark.parametrize("segment", [0, 100])
async def test_rings_of_all_sorts(socket_path: Path, without: Feature, segment: int) -> None:
    """Without indirect descriptors or event indices, in one piece or many."""
    fake = FakeBackend()
    fake.offered &= ~(1 << without)
    async with fake.listen(socket_path), ScsiDriver.open(socket_path) as driver:
        with GenerationTable(0, 256) as table:
            load = verified(dataclasses.replace(MIXED, segment=segment), table)
            result = await run_load(driver, [load])

    assert (result.commands, result.errors) == (300, 0)


async def test_limits_of_depth() -> None:
    """A ring without indirect tables holds fewer commands; a chain longer than the ring never fits."""
    load = dataclasses.replace(READ, segment=512)
    assert max_depth(load, 128, indirect=True) == 128
    assert max_depth(load, 128, indirect=False) == 32
    assert max_depth(load, 2, indirect=True) == 0


async def test_impossible_load_is_refused(driver: ScsiDriver) -> None:
    """Nonsense is a ValueError, and nothing is left behind."""
    for nonsense in ({"io_size": 1000}, {"depth": 0}, {"depth": 129}, {"blocks": 1}, {"block_size": 520}):
        with pytest.raises(ValueError, match="a load that cannot be"):
            await run_load(driver, [dataclasses.replace(READ, **nonsense)])  # type: ignore[arg-type]
    assert (await run_load(driver, [READ])).commands == 300


async def test_runs_for_a_time_after_a_warm_up(driver: ScsiDriver) -> None:
    """The warm-up is not counted; the clock ends the run."""
    warm: list[float] = []
    load = dataclasses.replace(READ, commands=0, seconds=0.15, warmup=0.1)
    began = trio.current_time()
    result = await run_load(driver, [load], warm=lambda: warm.append(trio.current_time() - began))

    assert 0.15 <= result.seconds < 1
    assert warm[0] >= 0.1
    assert 0 < result.cpu_seconds <= result.seconds
    assert 0 < result.commands < sum(result.statuses.values())


async def test_cancellation_ends_it_in_good_order(driver: ScsiDriver) -> None:
    """A cancelled load drains its ring, and the driver goes on."""
    with trio.move_on_after(0.1) as scope:
        await run_load(driver, [dataclasses.replace(READ, commands=0)] * 2)
    assert scope.cancelled_caught
    assert (await driver.command(0, 0, bytes(6))).good
    assert (await driver.command(0, 0, bytes(6), queue=1)).good
    assert len(driver.memory.regions) == 1


async def test_an_event_ends_it_in_good_order(driver: ScsiDriver) -> None:
    """Everything that was issued has come back, and is counted."""
    until = trio.Event()
    results: list[LoadResult] = []

    async def run() -> None:
        results.append(await run_load(driver, [dataclasses.replace(READ, commands=0)], until=until))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        while not driver.client.memory.regions[1:]:
            await trio.lowlevel.checkpoint()
        until.set()

    assert results[0].errors == 0
    assert (await driver.command(0, 0, bytes(6))).good


async def test_verifies_what_two_rings_write(backend: FakeBackend, driver: ScsiDriver) -> None:
    """Two rings, one range: every block read was written, whole, and is of its time."""
    with GenerationTable(0, 256) as table:
        mixed = [verified(dataclasses.replace(MIXED, seed=seed, commands=1500), table) for seed in (1, 2)]
        result = await run_load(driver, mixed)
        back = await run_load(driver, [verified(dataclasses.replace(READ, random=False, commands=128), table)])

    assert result.errors == back.errors == 0
    assert result.verified > 1000
    assert back.verified + back.unknown == 256
    assert back.verified > 250


async def written(driver: ScsiDriver, table: GenerationTable, times: int = 1) -> None:
    for _ in range(times):
        result = await run_load(driver, [verified(dataclasses.replace(WRITE, random=False, commands=128), table)])
        assert result.errors == 0


async def read_all(driver: ScsiDriver, table: GenerationTable) -> LoadResult:
    return await run_load(driver, [verified(dataclasses.replace(READ, random=False, commands=128), table)])


async def test_finds_a_torn_block(backend: FakeBackend, driver: ScsiDriver) -> None:
    """Half of a block is the older generation."""
    with GenerationTable(0, 256) as table:
        await written(driver, table)
        old = bytes(backend.disks[0, 0].data)
        await written(driver, table)
        backend.disks[0, 0].data[77 * 512 + 256 : 78 * 512] = old[77 * 512 + 256 : 78 * 512]
        result = await read_all(driver, table)

    assert (result.errors, result.kinds) == (1, {"torn block": 1})
    assert result.first is not None
    assert (result.first.lba, result.first.found_generation, result.first.found_place) == (77, 1, 8)
    assert str(result.first).startswith("torn block at LBA 77: generation 2 to 2 was expected")


async def test_finds_a_stale_block(backend: FakeBackend, driver: ScsiDriver) -> None:
    """A lost write is found, whether the older block is ours or what was there before the run."""
    with GenerationTable(0, 256) as table:
        await written(driver, table)
        old = bytes(backend.disks[0, 0].data)
        await written(driver, table)
        backend.disks[0, 0].data[77 * 512 : 78 * 512] = old[77 * 512 : 78 * 512]
        backend.disks[0, 0].data[100 * 512 : 101 * 512] = bytes(512)
        result = await read_all(driver, table)

    assert result.kinds == {"stale block": 2}


async def test_finds_a_misplaced_block(backend: FakeBackend, driver: ScsiDriver) -> None:
    """A block of another address, of another unit, of another writer."""
    data = backend.disks[0, 0].data
    with GenerationTable(0, 256) as table:
        await written(driver, table)
        data[10 * 512 : 11 * 512] = data[11 * 512 : 12 * 512]
        for lba, at, value in ((50, 22, 9), (90, 20, 9)):  # vfd_tag.unit, vfd_tag.writer
            for place in range(16):
                struct.pack_into("<H", data, lba * 512 + place * 32 + at, value)
        result = await read_all(driver, table)
        shared = await run_load(
            driver, [verified(dataclasses.replace(READ, random=False, commands=128), table, shared=True)]
        )

    assert result.kinds == {"misplaced block": 3}
    assert shared.kinds == {"misplaced block": 2}


async def test_finds_a_block_that_nobody_wrote(backend: FakeBackend, driver: ScsiDriver) -> None:
    """A generation that was never sent."""
    data = backend.disks[0, 0].data
    with GenerationTable(0, 256) as table:
        await written(driver, table)
        for place in range(16):
            struct.pack_into("<I", data, 10 * 512 + place * 32 + 16, 7)
        result = await read_all(driver, table)

    assert result.kinds == {"block from the future": 1}


async def test_finds_data_that_was_never_moved(backend: FakeBackend, driver: ScsiDriver) -> None:
    """A read that says GOOD and moves nothing does not pass, although the buffer held such blocks before."""
    with GenerationTable(0, 256) as table:
        await written(driver, table)
        backend.answer = lambda request, data, room: Outcome(CommandResponse(), b"")
        result = await read_all(driver, table)

    assert result.errors == 128
    assert result.first is not None
    assert result.first.kind == "used length"


async def test_counts_bad_answers_by_kind(backend: FakeBackend, driver: ScsiDriver) -> None:
    """Each sort of failure has its name, the first is told in full, and nothing of it counts as done."""
    answers = iter(
        [check(3, 0x11, 0), Outcome(CommandResponse(Response.TARGET_FAILURE)), Outcome(CommandResponse(residual=1))]
    )
    backend.answer = lambda request, data, room: next(answers, None) or backend.execute(request, data, room)
    result = await run_load(driver, [dataclasses.replace(READ, depth=1, commands=10)])

    assert result.kinds == {"response": 1, "status": 1, "residual": 1}
    assert (result.errors, result.commands) == (3, 7)
    assert (result.responses, result.statuses) == ({0: 9, 7: 1}, {0: 8, 2: 1})
    assert str(result.first).endswith(": status 02h, sense 3/11/00")


async def test_sends_again_what_passes(backend: FakeBackend, driver: ScsiDriver) -> None:
    """Unit attentions, BUSY, TASK SET FULL and RESET cost a retry; with retry=False they are errors."""
    descriptor = Outcome(CommandResponse(status=2, sense=bytes([0x72, 6, 0x29, 0, 0, 0, 0, 0])))
    transient = [
        check(6, 0x29, 0),
        descriptor,
        Outcome(CommandResponse(status=8)),
        Outcome(CommandResponse(status=0x28)),
        Outcome(CommandResponse(Response.RESET)),
        Outcome(CommandResponse(Response.BUSY)),
    ]
    for retry in (True, False):
        answers = iter(transient)
        backend.answer = lambda request, data, room, answers=answers: (  # type: ignore[misc]
            next(answers, None) or backend.execute(request, data, room)
        )
        result = await run_load(driver, [dataclasses.replace(READ, commands=20, retry=retry)])
        assert (result.retries, result.errors) == ((6, 0) if retry else (0, 6))


async def test_silence_is_noticed(backend: FakeBackend, driver: ScsiDriver, socket_path: Path) -> None:
    """A device that keeps commands is given up after `stall`, by number."""
    answers = iter([None] * 3)
    backend.answer = lambda request, data, room: next(answers, backend.execute(request, data, room))
    with pytest.raises(BackendError, match=f"{socket_path}: ring 2: 3 commands in flight, and no answer for 0.2 s"):
        await run_load(driver, [dataclasses.replace(READ, stall=0.2)])


async def test_back_end_that_goes_away_ends_it_at_once(
    backend: FakeBackend, driver: ScsiDriver, socket_path: Path
) -> None:
    """The load does not wait out its stall time."""

    def answer(request: CommandRequest, data: bytes, room: int) -> Outcome | None:
        if len(backend.commands) == 50:
            backend.hang_up()
        return None if len(backend.commands) >= 50 else good(bytes(room), room=room)

    backend.answer = answer
    with trio.fail_after(5), pytest.raises(BackendError, match="the back end closed the connection"):
        await run_load(driver, [READ])


async def test_broken_ring_ends_it_at_once(backend: FakeBackend, driver: ScsiDriver) -> None:
    """So does the error eventfd."""
    backend.answer = lambda request, data, room: os.eventfd_write(backend.rings[2].err, 1)
    with trio.fail_after(5), pytest.raises(BackendError, match="is broken"):
        await run_load(driver, [READ])


async def test_nonsense_in_the_used_ring(backend: FakeBackend, driver: ScsiDriver, socket_path: Path) -> None:
    """An id that was never given out ends the load."""

    def answer(request: CommandRequest, data: bytes, room: int) -> Outcome | None:
        backend.use(2, 99, [], b"")
        return None

    backend.answer = answer
    with pytest.raises(BackendError, match=f"{socket_path}: ring 2: the used ring is nonsense: id 99, length 0"):
        await run_load(driver, [READ])


async def test_long_commands_and_high_addresses(backend: FakeBackend, socket_path: Path) -> None:
    """READ and WRITE of 16 bytes where the address needs it; 4096-byte blocks; FUA."""

    class Far(Disk):
        pass

    far = Disk(blocks=64, block_size=4096)
    backend.disks[0, 1] = far
    requests: list[bytes] = []

    def answer(request: CommandRequest, data: bytes, room: int) -> Outcome:
        requests.append(request.cdb)
        return good(bytes(room), room=room) if room else good()

    async with ScsiDriver.open(socket_path) as driver:
        backend.answer = answer
        load = Load(0, 1, 1 << 40, 64, 4096, 65536, depth=2, read_percent=50, random=False, commands=8, fua=True)
        assert (await run_load(driver, [load])).errors == 0

    assert {cdb[0] for cdb in requests} == {0x88, 0x8A}
    assert all(cdb[1] == (8 if cdb[0] == 0x8A else 0) for cdb in requests)
    assert struct.unpack_from(">QI", requests[1], 2) == ((1 << 40) + 16, 16)
