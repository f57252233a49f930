"""Packed rings between this driver and the real engine, in one process; and guests that write them wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.frontend.fakebackend import FakeBackend
from tests.hostile.adapter import DaemonAdapter
from vhostfc.frontend.client import WANTED, BackendError
from vhostfc.frontend.driver import MIB, ScsiDriver
from vhostfc.frontend.load import GenerationTable, Load, LoadResult, Verification, run_load
from vhostfc.frontend.memory import Buffer
from vhostfc.frontend.packed import AVAIL, USED, WRAP, PackedRing, table
from vhostfc.frontend.ring import INDIRECT, NEXT, WRITE
from vhostfc.vhost.features import Feature
from vhostfc.virtio.scsi import CommandRequest, CommandResponse, Event, EventType, Response, encode_lun

INQUIRY = bytes.fromhex("12 00 00 00 24 00")
READ = bytes.fromhex("28 00 00000008 00 0001 00")
STORE = bytes.fromhex("2a 00 00000008 00 0001 00")
FRESH = 0x8000_8000
MIXED = Load(0, 0, 0, 4096, depth=16, read_percent=50, commands=2000)


@pytest.fixture
async def adapter(tmp_path: Path) -> AsyncIterator[DaemonAdapter]:
    async with DaemonAdapter.running(tmp_path / "vhost.sock") as adapter:
        yield adapter
        await adapter.idle()
        assert adapter.wrong == []
        assert adapter.counters()["in_flight"] == 0


async def test_is_an_error_where_it_is_not_offered(backend: FakeBackend, socket_path: Path) -> None:
    """Who asks for packed rings does not get split ones."""
    with pytest.raises(BackendError, match="does not offer packed rings"):
        async with ScsiDriver.open(socket_path, packed=True):
            pass


async def test_split_unless_asked_for(adapter: DaemonAdapter) -> None:
    """The offer alone changes nothing; each layout is refused under the other's name."""
    async with ScsiDriver.open(adapter.socket) as driver:
        assert not driver.client.features >> Feature.RING_PACKED & 1
        with pytest.raises(TypeError, match="ring 2 is split"):
            _ = driver.queues[2].packed
    async with ScsiDriver.open(adapter.socket, packed=True) as driver:
        with pytest.raises(TypeError, match="ring 2 is packed"):
            _ = driver.queues[2].ring


@pytest.mark.parametrize("without", [0, Feature.EVENT_IDX, Feature.INDIRECT_DESC])
@pytest.mark.parametrize("size", [128, 100, 9])
async def test_commands_of_every_queue(adapter: DaemonAdapter, without: int, size: int) -> None:
    """Requests, control and events, over several rounds of each ring."""
    features = WANTED & ~(1 << without)
    async with ScsiDriver.open(adapter.socket, packed=True, queue_size=size, features=features) as driver:
        for number in range(2 * size + 1):
            data = bytes([number & 0xFF]) * 512
            assert (await driver.command(0, 0, STORE, data_out=data)).good
            assert (await driver.command(0, 0, READ, data_in=512)).data_in == data
        assert (await driver.command(0, 0, INQUIRY, data_in=36)).data_in[8:15] == b"VHOSTFC"
        assert await driver.manage(7, 0, 0) == Response.FUNCTION_COMPLETE
        events = driver.events()
        for number in range(2 * size):
            event = Event(EventType.TRANSPORT_RESET, encode_lun(0, 0), number)
            await adapter.event(event.pack())
            with trio.fail_after(5):
                assert await events.receive() == event


@pytest.mark.parametrize("poll", [False, True])
@pytest.mark.parametrize("without", [0, Feature.EVENT_IDX, Feature.INDIRECT_DESC])
@pytest.mark.parametrize("segment", [0, 1024])
async def test_loads(adapter: DaemonAdapter, poll: bool, without: int, segment: int) -> None:
    """The load generator in C, checked, and the ring back in Python's hands in the end."""
    features = WANTED & ~(1 << without)
    async with ScsiDriver.open(adapter.socket, packed=True, queues=2, queue_size=99, features=features) as driver:
        with GenerationTable(0, MIXED.blocks) as table:
            load = dataclasses.replace(
                MIXED, poll=poll, segment=segment, verification=Verification(table, 0xBEEF), io_size=2048
            )
            result = await run_load(driver, [load, dataclasses.replace(load, seed=2)])
            back = await run_load(driver, [dataclasses.replace(load, read_percent=100, random=False, commands=1024)])
        assert (result.commands, result.errors, back.errors) == (4000, 0, 0)
        assert result.verified > 1000
        assert (await driver.command(0, 0, INQUIRY, data_in=36)).good


async def test_bases(adapter: DaemonAdapter) -> None:
    """A fresh ring begins at 0x80008000; a stopped one says where it goes on, both halves alike when it is empty."""
    async with ScsiDriver.open(adapter.socket, packed=True, queue_size=5, event_buffers=2) as driver:
        assert [queue.setup(queue.vring.START).base for queue in driver.queues] == [FRESH] * 3
        expected = WRAP
        for rounds in range(1, 18):
            for _ in range(rounds):
                assert (await driver.command(0, 0, INQUIRY, data_in=36)).good
                expected = expected + 1 if expected & ~WRAP < 4 else (expected & WRAP) ^ WRAP
            control, _, request = await driver.stop()
            assert control == FRESH
            assert request == expected | expected << 16
            await driver.start()
        await driver.reset()
        assert (await driver.command(0, 0, INQUIRY, data_in=36)).good


async def test_stopped_and_started_under_load(adapter: DaemonAdapter) -> None:
    """A load that goes on over stops, starts, and memory that comes and goes: nothing is lost or mixed up."""
    async with ScsiDriver.open(adapter.socket, packed=True, queue_size=64) as driver:
        total = LoadResult()
        with GenerationTable(0, MIXED.blocks) as table:
            load = dataclasses.replace(MIXED, verification=Verification(table, 0xF00D), commands=300)
            for _ in range(12):
                region = await driver.client.add_region(MIB)
                total += await run_load(driver, [load])
                await driver.stop()
                await driver.client.remove_region(region)
                await driver.start()
                assert (await driver.command(0, 0, READ, data_in=512)).good
        assert (total.commands, total.errors) == (3600, 0)


async def test_commands_that_were_not_taken_stay(adapter: DaemonAdapter) -> None:
    """What is posted to a stopped ring is done when it runs again; what punts hold is ended by the stop."""
    async with ScsiDriver.open(adapter.socket, packed=True, queue_size=7, event_buffers=2) as driver:
        adapter.hold = True
        answers: list[int] = []

        async def ask() -> None:
            answers.append((await driver.command(0, 0, INQUIRY, data_in=36)).response)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
            while len(adapter.held) < 5:
                await trio.lowlevel.checkpoint()
            bases = await driver.stop()
            adapter.hold = False
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            await driver.start()
        assert answers == [Response.RESET] * 5 + [Response.OK]
        assert bases[2] == 0x8005_8005


# ---------------------------------------------------------------- what a driver must not do


class Attacker:
    """A request ring of 16 in the test's hands."""

    def __init__(self, driver: ScsiDriver) -> None:
        self.driver = driver
        self.queue = driver.queues[2]
        self.ring: PackedRing = self.queue.packed

    def buffer(self, content: bytes | int) -> Buffer:
        size = content if isinstance(content, int) else len(content)
        buffer = self.driver.memory.allocate(size, 64)
        buffer.view[:] = b"\xee" * size if isinstance(content, int) else content
        return buffer

    def parts(self) -> tuple[Buffer, Buffer, Buffer]:
        request = self.buffer(CommandRequest(encode_lun(0, 0), 1, READ).pack())
        return request, self.buffer(CommandResponse.SIZE), self.buffer(512)

    def offer(self, *pieces: tuple[Buffer | tuple[int, int], int], number: int = 0) -> None:
        for part, flags in pieces:
            address, length = (part.guest, len(part)) if isinstance(part, Buffer) else part
            self.ring.offer(address, length, number, flags)
        self.ring.outstanding += 1
        if self.ring.publish():
            self.queue.kick()

    async def broken(self) -> None:
        with trio.fail_after(5):
            await self.queue.broken.wait()

    async def works(self) -> None:
        await self.driver.reset()
        answer = await self.driver.command(0, 0, READ, data_in=512, timeout=5)
        assert answer.good


@pytest.fixture
async def attacker(adapter: DaemonAdapter) -> AsyncIterator[Attacker]:
    async with ScsiDriver.open(adapter.socket, packed=True, queue_size=16) as driver:
        attacker = Attacker(driver)
        yield attacker
        await attacker.works()


@pytest.mark.parametrize("number", [16, 0x7FFF, 0xFFFF])
async def test_id_outside_the_ring(adapter: DaemonAdapter, attacker: Attacker, number: int) -> None:
    """A buffer id is an index of what the device keeps: one beyond it breaks the ring."""
    request, response, data = attacker.parts()
    attacker.offer((request, NEXT), (response, NEXT | WRITE), (data, WRITE), number=number)
    await attacker.broken()
    assert adapter.counters()["broken_rings"] == 1
    assert bytes(response.view) == b"\xee" * len(response)


async def test_id_that_is_in_flight(adapter: DaemonAdapter, attacker: Attacker) -> None:
    """The same id twice: the first is answered at most once."""
    adapter.hold = True
    request = attacker.buffer(CommandRequest(encode_lun(0, 0), 1, INQUIRY).pack())
    response = attacker.buffer(CommandResponse.SIZE)
    attacker.offer((request, NEXT), (response, WRITE), number=3)
    attacker.offer((request, NEXT), (response, WRITE), number=3)
    await attacker.broken()
    adapter.hold = False


async def test_chain_without_an_end(adapter: DaemonAdapter, attacker: Attacker) -> None:
    """NEXT on every descriptor of the ring: the walk ends after one round."""
    request, _, _ = attacker.parts()
    attacker.offer(*[(request, NEXT)] * 16)
    await attacker.broken()
    assert adapter.counters()["broken_rings"] == 1


async def test_all_descriptors_are_available_at_once(adapter: DaemonAdapter, attacker: Attacker) -> None:
    """A guest that paints the whole ring with requests that have no room for a response: each is given back once."""
    request, _, _ = attacker.parts()
    for index in range(16):
        attacker.ring.put_descriptor(index, request.guest, len(request), index, AVAIL)
    attacker.queue.kick()
    with trio.fail_after(5):
        while adapter.counters()["bad_header"] < 16:
            await trio.sleep(0.001)
    assert not attacker.queue.broken.is_set()


@pytest.mark.parametrize("address", [0, 0x7000_0000_0000, 0xFFFF_FFFF_FFFF_F000], ids=["unmapped", "far", "wraps"])
async def test_address_that_leads_nowhere(adapter: DaemonAdapter, attacker: Attacker, address: int) -> None:
    """Data outside memory: the command fails, the ring lives."""
    request, response, _ = attacker.parts()
    attacker.offer((request, NEXT), (response, NEXT | WRITE), ((address, 0x2000), WRITE))
    with trio.fail_after(5):
        while not attacker.queue.broken.is_set() and response.view[11] == 0xEE:
            await trio.sleep(0.001)
    assert response.view[11] == Response.FAILURE
    assert adapter.counters()["bad_address"] == 1


@pytest.mark.parametrize("length", [0, 15, 17, 16 * 4096, 0xFFFF_FFF0])
async def test_table_of_the_wrong_size(adapter: DaemonAdapter, attacker: Attacker, length: int) -> None:
    """An indirect table is whole descriptors and not longer than one may be."""
    attacker.offer(((attacker.buffer(64).guest, length), INDIRECT))
    with trio.fail_after(5):
        while not adapter.counters()["bad_indirect"]:
            await trio.sleep(0.001)


async def test_table_that_is_called_writable(adapter: DaemonAdapter, attacker: Attacker) -> None:
    """WRITE beside INDIRECT is reserved, and the device ignores it (2.8.7)."""
    parts = attacker.parts()
    pieces = [(part.guest, len(part), flags) for part, flags in zip(parts, (0, WRITE, WRITE), strict=True)]
    attacker.offer((attacker.buffer(table(pieces)), INDIRECT | WRITE))
    with trio.fail_after(5):
        while parts[1].view[11] == 0xEE:
            await trio.sleep(0.001)
    assert parts[1].view[11] == Response.OK


async def test_table_within_a_table(adapter: DaemonAdapter, attacker: Attacker) -> None:
    """Tables do not nest."""
    nested = attacker.buffer(64)
    nested.view[:] = table([(nested.guest, 64, INDIRECT)] * 4)
    attacker.offer((nested, INDIRECT))
    with trio.fail_after(5):
        while not adapter.counters()["bad_indirect"]:
            await trio.sleep(0.001)


async def test_event_area_is_anything(adapter: DaemonAdapter, attacker: Attacker) -> None:
    """Flags and places that mean nothing: at worst no interrupt comes, and the ring goes on."""
    for place, flags in ((0xFFFF, 3), (0x7FFF, 2), (WRAP | 0x7FFF, 2), (0, 0xFFFF)):
        attacker.ring.put_event(place, flags)
        request, response, data = attacker.parts()
        attacker.offer((request, NEXT), (response, NEXT | WRITE), (data, WRITE))
        with trio.fail_after(5):
            while response.view[11] == 0xEE:
                await trio.sleep(0.001)
        assert response.view[11] == Response.OK


async def test_flags_that_flicker(adapter: DaemonAdapter, attacker: Attacker) -> None:
    """A descriptor that is used at once, by the driver itself: nothing happens."""
    request, _, _ = attacker.parts()
    for index in range(16):
        attacker.ring.put_descriptor(index, request.guest, len(request), 0, AVAIL | USED)
    attacker.queue.kick()
    await trio.testing.wait_all_tasks_blocked(0.02)
    assert adapter.counters()["commands"] == 0


@pytest.mark.parametrize("base", [0x8000_0000 | 16, 16 << 16, 0x7FFF_7FFF, 0xFFFF_FFFF])
async def test_base_outside_the_ring(adapter: DaemonAdapter, base: int) -> None:
    """SET_VRING_BASE beyond the ring: refused, and the next driver is served."""

    async def begin() -> None:
        async with ScsiDriver.open(adapter.socket, packed=True, queue_size=16, start=False) as driver:
            driver._bases[2] = base
            await driver.start()
            await driver.command(0, 0, READ, data_in=512, timeout=2)

    with pytest.raises(BackendError):
        await begin()
    async with ScsiDriver.open(adapter.socket, packed=True, queue_size=16) as driver:
        assert (await driver.command(0, 0, READ, data_in=512)).good
