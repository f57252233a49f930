"""Guest memory that is not what it was said to be, or goes away while it is in use."""

from __future__ import annotations

import os
import struct

import pytest
import trio
import trio.testing

from tests.hostile.adapter import BLOCKS, DaemonAdapter
from tests.hostile.guest import FAILURE, INQUIRY, READ, WRITE_BLOCK, Guest, R, W, chain
from vhostfc.frontend.client import WANTED_PROTOCOL, BackendError, wire_region
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.load import GenerationTable, Load, Verification, run_load
from vhostfc.vhost.features import ProtocolFeature
from vhostfc.vhost.messages import MemoryTable, Region, SingleRegion
from vhostfc.vhost.requests import Request
from vhostfc.virtio.scsi import Response

MIB = 1 << 20
NO_SLOTS = WANTED_PROTOCOL & ~(1 << ProtocolFeature.CONFIGURE_MEM_SLOTS)
WHOLE = (1 << 64) - 1


@pytest.mark.parametrize(
    "region",
    [
        Region(1 << 33, 2 * MIB, 1 << 43, 0),
        Region(1 << 33, MIB, 1 << 43, 4096),
        Region(1 << 33, 1 << 62, 1 << 43, 0),
        Region(1 << 33, MIB, 1 << 43, 1 << 62),
        Region(1 << 33, MIB, 1 << 43, WHOLE - 4095),
        Region(WHOLE - 4095, MIB, 1 << 43, 0),
        Region(1 << 33, MIB, WHOLE - 4095, 0),
        Region(1 << 33, 0, 1 << 43, 0),
    ],
    ids=["larger", "offset", "huge", "far", "offset wraps", "gpa wraps", "uaddr wraps", "empty"],
)
@pytest.mark.parametrize("table", [False, True])
async def test_region_that_its_file_does_not_hold(adapter: DaemonAdapter, region: Region, table: bool) -> None:
    """A region larger than its file, or that wraps, ends the connection with one line."""
    fd = os.memfd_create("short")
    os.ftruncate(fd, MIB)
    try:
        protocol = NO_SLOTS if table else WANTED_PROTOCOL
        request = Request.SET_MEM_TABLE if table else Request.ADD_MEM_REG
        payload = MemoryTable((region,)) if table else SingleRegion.of(region)
        async with ScsiDriver.open(adapter.socket, start=False, protocol=protocol) as driver:
            with pytest.raises(BackendError):
                await driver.client.request(request, payload, [fd])
    finally:
        os.close(fd)
    await adapter.idle()
    assert len(adapter.refusals) == 1


@pytest.mark.parametrize("shift", [(0, 1 << 40), (1 << 40, 0)])
async def test_regions_that_overlap(adapter: DaemonAdapter, shift: tuple[int, int]) -> None:
    """In guest or in user addresses."""
    async with ScsiDriver.open(adapter.socket) as driver:
        first = wire_region(driver.memory.regions[0])
        other = SingleRegion(first.guest_phys + shift[0], MIB, first.user_addr + shift[1], 0)
        with pytest.raises(BackendError):
            await driver.client.request(Request.ADD_MEM_REG, other, [driver.memory.regions[0].fd])
    await adapter.idle()
    assert len(adapter.refusals) == 1


async def test_descriptor_that_is_no_memory(adapter: DaemonAdapter) -> None:
    """A pipe cannot be mapped: one line, no crash."""
    read_end, write_end = os.pipe()
    try:
        async with ScsiDriver.open(adapter.socket, start=False) as driver:
            with pytest.raises(BackendError):
                await driver.client.request(Request.ADD_MEM_REG, SingleRegion(1 << 33, MIB, 1 << 43, 0), [read_end])
    finally:
        os.close(read_end)
        os.close(write_end)
    await adapter.idle()
    assert len(adapter.refusals) == 1


@pytest.mark.parametrize("cdb", [READ, WRITE_BLOCK, INQUIRY], ids=["read", "write", "punt"])
async def test_file_truncated_under_the_data(adapter: DaemonAdapter, cdb: bytes) -> None:
    """The pages behind a buffer are gone (SIGBUS): the command fails, the worker goes on, nothing is written."""
    async with ScsiDriver.open(adapter.socket, queue_size=64, regions=(8 * MIB, MIB)) as driver:
        guest = Guest(driver)
        request, response = guest.request(cdb), guest.response()
        gone = driver.memory.regions[1]
        os.ftruncate(gone.fd, 0)
        data = (gone.guest_phys, 512)
        if cdb == WRITE_BLOCK:
            used = await guest.submit(chain((request, R), (data, R), (response, W)))
        else:
            used = await guest.submit(chain((request, R), (response, W), (data, W)))

        assert used.length == 108
        assert guest.decode(response).response == FAILURE
        assert adapter.counters()["torn_memory"] >= 1
        await guest.works()


async def test_file_truncated_under_the_response(adapter: DaemonAdapter) -> None:
    """No place for the answer any more: the command comes back, nobody is hurt."""
    async with ScsiDriver.open(adapter.socket, queue_size=64, regions=(8 * MIB, MIB)) as driver:
        guest = Guest(driver)
        gone = driver.memory.regions[1]
        os.ftruncate(gone.fd, 0)
        await guest.submit(chain((guest.request(), R), ((gone.guest_phys, 108), W), (guest.buffer(512), W)))
        await guest.works()


async def test_file_truncated_under_the_request(adapter: DaemonAdapter) -> None:
    """A header of zeros, which is what is read there, leads nowhere."""
    async with ScsiDriver.open(adapter.socket, queue_size=64, regions=(8 * MIB, MIB)) as driver:
        guest = Guest(driver)
        response, gone = guest.response(), driver.memory.regions[1]
        os.ftruncate(gone.fd, 0)
        await guest.submit(chain(((gone.guest_phys, 51), R), (response, W)))
        assert guest.decode(response).response in (FAILURE, Response.BAD_TARGET)
        await guest.works()


async def test_file_truncated_under_an_indirect_table(adapter: DaemonAdapter) -> None:
    """A table of zeros."""
    async with ScsiDriver.open(adapter.socket, queue_size=64, regions=(8 * MIB, MIB)) as driver:
        guest = Guest(driver)
        gone = driver.memory.regions[1]
        os.ftruncate(gone.fd, 0)
        assert (await guest.submit([(gone.guest_phys, 48, 4, 0)])).length == 0
        await guest.works()


async def test_file_truncated_under_the_rings(adapter: DaemonAdapter) -> None:
    """The rings themselves are gone: they are broken, and the back end tells who listens."""
    async with ScsiDriver.open(adapter.socket, queue_size=64, regions=(MIB,)) as driver:
        queue = driver.queues[2]
        assert (await driver.command(0, 0, READ, data_in=512)).good
        async with queue.lend():  # nothing of this driver may touch its rings while they are not there
            os.ftruncate(driver.memory.regions[0].fd, 0)
            queue.kick()
            with trio.fail_after(5):
                await queue.broken.wait()
            assert adapter.counters()["broken_rings"] == 1
            driver.running = False  # leave like a guest that is killed
            os.ftruncate(driver.memory.regions[0].fd, MIB)
    assert 2 in adapter.broken


@pytest.mark.parametrize("protocol", [WANTED_PROTOCOL, NO_SLOTS], ids=["slots", "table"])
async def test_memory_comes_and_goes_under_load(adapter: DaemonAdapter, protocol: int) -> None:
    """Regions are plugged and unplugged while two rings run at full speed: no block is lost or wrong."""
    async with ScsiDriver.open(adapter.socket, queues=2, protocol=protocol) as driver:
        with GenerationTable(0, 4096) as table:
            check = Verification(table, run=77)
            load = Load(0, 0, 0, 4096, io_size=4096, depth=16, read_percent=50, seconds=0.5, verification=check)
            async with trio.open_nursery() as nursery:

                async def plug() -> None:
                    while True:
                        regions = [await driver.client.add_region(MIB, mmap_offset=4096 * n) for n in range(3)]
                        for region in regions:
                            await driver.client.remove_region(region)

                nursery.start_soon(plug)
                result = await run_load(driver, [load, load])
                nursery.cancel_scope.cancel()
    assert adapter.refusals == []
    assert (result.errors, result.first) == (0, None)
    assert result.commands > 100


async def test_region_removed_with_commands_in_it(adapter: DaemonAdapter) -> None:
    """The acknowledgement of REM_MEM_REG waits for the commands that use the region."""
    async with ScsiDriver.open(adapter.socket, queue_size=64, regions=(8 * MIB, MIB)) as driver:
        guest = Guest(driver)
        adapter.hold = True
        going = driver.memory.regions[1]
        request, response = guest.request(INQUIRY), guest.response()
        guest.put(chain((request, R), (response, W), ((going.guest_phys, 36), W)))
        posted = guest.queue.expect(0)
        guest.queue.ring.offer(0)
        guest.queue.publish()
        with trio.fail_after(5):
            while not adapter.held:
                await trio.testing.wait_all_tasks_blocked(0.001)
        removed = trio.Event()

        async def remove() -> None:
            await driver.client.remove_region(going)
            removed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(remove)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not removed.is_set()
            going.view[:36] = b"\xee" * 36
            assert adapter.answer_held(data_in=b"x" * 36)
            with trio.fail_after(5):
                await posted.wait()
                await removed.wait()
        assert bytes(going.view[:36]) == b"x" * 36
        adapter.hold = False
        response = guest.response()
        used = await guest.submit(chain((guest.request(), R), (response, W), ((going.guest_phys, 512), W)))
        assert used.length == 108
        assert guest.decode(response).response == FAILURE
        await guest.works()


async def test_region_under_a_running_ring_cannot_go(adapter: DaemonAdapter) -> None:
    """Taking away the memory that a ring lies in ends the connection, not the back end."""
    async with ScsiDriver.open(adapter.socket) as driver:
        with pytest.raises(BackendError, match="REM_MEM_REG"):
            await driver.client.request(Request.REM_MEM_REG, SingleRegion.of(wire_region(driver.memory.regions[0])))
    await adapter.idle()
    assert "outside guest memory" in adapter.refusals[0]


@pytest.mark.parametrize("where", ["unknown", "other size", "twice"])
async def test_removing_what_is_not_there(adapter: DaemonAdapter, where: str) -> None:
    """Only regions that are there can be removed, once."""
    async with ScsiDriver.open(adapter.socket, regions=(8 * MIB, MIB)) as driver:
        region = wire_region(driver.memory.regions[1])
        match where:
            case "unknown":
                region = Region(1 << 50, MIB, 1 << 51, 0)
            case "other size":
                region = Region(region.guest_phys, region.size - 4096, region.user_addr, 0)
            case _:
                await driver.client.request(Request.REM_MEM_REG, SingleRegion.of(region))
        with pytest.raises(BackendError):
            await driver.client.request(Request.REM_MEM_REG, SingleRegion.of(region))
    await adapter.idle()
    assert len(adapter.refusals) == 1


async def test_more_regions_than_there_are_slots(adapter: DaemonAdapter) -> None:
    """The limit that GET_MAX_MEM_SLOTS told is kept, by both sides."""
    fd = os.memfd_create("many")
    os.ftruncate(fd, 4096)
    try:
        async with ScsiDriver.open(adapter.socket) as driver:
            client = driver.client
            regions = [Region(1 << 40 | n << 20, 4096, 1 << 44 | n << 20, 0) for n in range(client.max_mem_slots)]
            for region in regions[1:]:
                await client.request(Request.ADD_MEM_REG, SingleRegion.of(region), [fd])
            assert (await driver.command(0, 0, READ, data_in=512)).good
            with pytest.raises(BackendError):
                await client.request(Request.ADD_MEM_REG, SingleRegion.of(regions[0]), [fd])
    finally:
        os.close(fd)
    await adapter.idle()
    assert len(adapter.refusals) == 1


async def test_windows_like_buffers(adapter: DaemonAdapter) -> None:
    """Pieces at odd addresses and of odd lengths, up to the 126 segments that the config promises, and 512 KiB."""
    async with ScsiDriver.open(adapter.socket) as driver:
        data = os.urandom(512 * 1024)
        cdb = struct.pack(">BxIxHx", 0x2A, BLOCKS - 1024, 1024)
        for segment in (4161, 65535, 0):
            assert (await driver.command(0, 0, cdb, data_out=data, segment=segment)).good
            answer = await driver.command(0, 0, bytes([0x28]) + cdb[1:], data_in=len(data), segment=segment)
            assert answer.data_in == data
            data = data[::-1]
