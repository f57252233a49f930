"""The driver against a back end that obeys: commands, task management, events, life and death."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.frontend.fakebackend import Disk, FakeBackend, check, good
from vhostfc.frontend.client import BackendError
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.vhost.features import Feature
from vhostfc.vhost.requests import Request
from vhostfc.virtio.scsi import CommandRequest, ControlType, Event, ResetReason, Response, TaskAttribute, TmfSubtype


def read10(lba: int, blocks: int) -> bytes:
    return bytes([0x28, 0, *lba.to_bytes(4, "big"), 0, *blocks.to_bytes(2, "big"), 0])


def write10(lba: int, blocks: int) -> bytes:
    return bytes([0x2A, *read10(lba, blocks)[1:]])


async def test_reads_back_what_was_written(backend: FakeBackend, socket_path: Path) -> None:
    """Data goes out and comes in through any cut of descriptors, and the response says so."""
    data = bytes(range(256)) * 8
    async with ScsiDriver.open(socket_path) as driver:
        for segment in (0, 512, 1000, 7):
            out = await driver.command(0, 0, write10(3, 4), data_out=data, segment=segment)
            answer = await driver.command(0, 0, read10(3, 4), data_in=2048, segment=segment)

            assert (out.good, out.residual, out.used_length) == (True, 0, 108)
            assert answer.data_in == data
            assert (answer.response, answer.status, answer.residual, answer.used_length) == (0, 0, 0, 108 + 2048)
            assert not any(region.in_use for region in driver.memory.regions[1:])


@pytest.mark.parametrize("without", [Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.PROTOCOL_FEATURES])
async def test_does_without_a_feature(socket_path: Path, without: Feature) -> None:
    """What the back end does not offer is not used, and everything works."""
    fake = FakeBackend()
    fake.offered &= ~(1 << without)
    async with fake.listen(socket_path), ScsiDriver.open(socket_path) as driver:
        for _ in range(300):  # more than a ring
            assert (await driver.command(0, 0, read10(0, 1), data_in=512)).good
        assert fake.features == fake.offered


async def test_carries_header_fields(backend: FakeBackend, socket_path: Path) -> None:
    """Tag, attribute and LUN field reach the device as they were given."""
    async with ScsiDriver.open(socket_path) as driver:
        await driver.command(0, 0, bytes(6), attribute=TaskAttribute.ORDERED, tag=7)
        await driver.command(0, 0, bytes(6), lun_field=bytes.fromhex("c101000000000000"))

    first, second = backend.commands
    assert (first.lun.hex(), first.tag, first.task_attribute) == ("0100400000000000", 7, 1)
    assert second.lun.hex() == "c101000000000000"


async def test_keeps_more_in_flight_than_a_ring_holds(backend: FakeBackend, socket_path: Path) -> None:
    """Commands beyond the ring wait for room, and each gets its own answer."""
    answers: dict[int, bytes] = {}
    backend.disks[0, 0].data[:] = b"".join(bytes([n]) * 512 for n in range(256))
    async with ScsiDriver.open(socket_path, queue_size=8, queues=2) as driver:

        async def read(lba: int) -> None:
            answers[lba] = (await driver.command(0, 0, read10(lba, 1), data_in=512, queue=lba % 2)).data_in

        async with trio.open_nursery() as nursery:
            for lba in range(200):
                nursery.start_soon(read, lba)

    assert answers == {lba: bytes([lba]) * 512 for lba in range(200)}


async def test_sense_and_residual_are_values(backend: FakeBackend, socket_path: Path) -> None:
    """A CHECK CONDITION and an underrun come back as they were told."""
    async with ScsiDriver.open(socket_path) as driver:
        bad = await driver.command(0, 0, read10(256, 1), data_in=512)
        short = await driver.command(0, 0, bytes.fromhex("12000000ff00"), data_in=255)
        nobody = await driver.command(9, 0, bytes(6))

    assert (bad.response, bad.status, bad.sense_code, bad.good) == (0, 2, (5, 0x21, 0), False)
    assert str(bad) == "status 02h, sense 5/21/00"
    assert (short.residual, len(short.data_in)) == (255 - 36, 36)
    assert (nobody.response, str(nobody)) == (Response.BAD_TARGET, "response BAD_TARGET")


async def test_task_management_and_notifications(backend: FakeBackend, socket_path: Path) -> None:
    """The control queue carries both kinds of request."""
    async with ScsiDriver.open(socket_path) as driver:
        assert await driver.manage(TmfSubtype.LOGICAL_UNIT_RESET, 0, 3, tag=9) == Response.FUNCTION_COMPLETE
        assert await driver.notifications(ControlType.AN_QUERY, 0, 0, 2) == (0, 0)
        assert await driver.control(b"\xff\xff\xff\xff", 1) == bytes([Response.FAILURE])

    assert backend.controls[0].hex() == "000000000500000001004003000000000900000000000000"


async def test_events_arrive_and_buffers_return(backend: FakeBackend, socket_path: Path) -> None:
    """More events than buffers come through, in order, since each buffer is posted again."""
    async with ScsiDriver.open(socket_path, event_buffers=2) as driver:
        events = driver.events()
        for lun in range(10):
            while not backend.event_heads:
                await trio.testing.wait_all_tasks_blocked(0.01)
            backend.send_event(Event.transport_reset(0, lun, ResetReason.RESCAN))
        got = [await events.receive() for _ in range(10)]

    assert [event.lun[3] for event in got] == list(range(10))


async def test_stop_and_continue(backend: FakeBackend, socket_path: Path) -> None:
    """Rings go on where they stopped; what was parked in the event ring is there again."""
    async with ScsiDriver.open(socket_path) as driver:
        for _ in range(3):
            assert (await driver.command(0, 0, read10(0, 1), data_in=512)).good
        assert await driver.stop() == [0, 0, 3]
        assert driver.running is False
        await driver.start()
        assert (await driver.command(0, 0, read10(0, 1), data_in=512)).good
        assert len(backend.event_heads) == 8


async def test_reset_fails_what_is_held_and_starts_afresh(backend: FakeBackend, socket_path: Path) -> None:
    """After a virtio reset the old commands are over and the rings begin at zero."""
    failed: list[str] = []
    async with ScsiDriver.open(socket_path) as driver, trio.open_nursery() as nursery:
        backend.answer = lambda request, data, room: None
        in_use = driver.memory.regions[0].in_use

        async def hang() -> None:
            with pytest.raises(BackendError) as error:
                await driver.command(0, 0, read10(0, 1), data_in=512)
            failed.append(str(error.value))

        nursery.start_soon(hang)
        while not backend.held:
            await trio.testing.wait_all_tasks_blocked(0.01)
        await driver.reset()
        backend.answer = backend.execute
        assert (await driver.command(0, 0, read10(0, 1), data_in=512)).good
        assert driver.memory.regions[0].in_use == in_use

    assert failed == [f"{socket_path}: the driver reset the device"]
    assert Request.RESET_DEVICE in backend.requests


async def test_late_answer_after_the_caller_left(backend: FakeBackend, socket_path: Path) -> None:
    """A command that nobody waits for any more keeps its memory until the device lets go of it."""
    async with ScsiDriver.open(socket_path) as driver:
        before = driver.memory.regions[0].in_use
        backend.answer = lambda request, data, room: None
        with pytest.raises(BackendError, match=r"no answer to 28h for 0:0 within 0\.01 s"):
            await driver.command(0, 0, read10(0, 1), data_in=512, timeout=0.01)
        assert driver.memory.regions[0].in_use > before

        backend.release(*backend.held.pop(), good(bytes(512), room=512))
        backend.answer = backend.execute
        assert (await driver.command(0, 0, read10(0, 1), data_in=512)).good
        assert driver.memory.regions[0].in_use == before


async def test_back_end_goes_away(backend: FakeBackend, socket_path: Path) -> None:
    """Commands in flight and later ones end with an error that names the socket."""

    async def use() -> None:
        async with ScsiDriver.open(socket_path) as driver:
            backend.answer = lambda request, data, room: backend.hang_up()
            await driver.command(0, 0, read10(0, 1), data_in=512)

    with pytest.raises(BackendError, match=f"{socket_path}: the back end closed the connection"):
        await use()


async def test_broken_ring_is_reported(backend: FakeBackend, socket_path: Path) -> None:
    """The error eventfd ends what waits on that ring, not the others; a reset mends it."""
    async with ScsiDriver.open(socket_path, queues=2) as driver:
        backend.answer = lambda request, data, room: os.eventfd_write(backend.rings[2].err, 1)
        with pytest.raises(BackendError, match="ring 2 is broken"):
            await driver.command(0, 0, read10(0, 1), data_in=512)
        backend.answer = backend.execute
        assert (await driver.command(0, 0, read10(0, 1), data_in=512, queue=1)).good
        await driver.reset()
        assert (await driver.command(0, 0, read10(0, 1), data_in=512)).good


async def test_lent_ring_is_left_alone(backend: FakeBackend, socket_path: Path) -> None:
    """While a ring is lent the driver takes nothing from it; afterwards it goes on."""
    async with ScsiDriver.open(socket_path) as driver:
        queue = driver.queues[2]
        async with queue.lend() as ring:
            request = driver.memory.allocate(51)
            response = driver.memory.allocate(108)
            request.view[:] = CommandRequest(bytes.fromhex("0100400000000000"), 1, bytes(6)).pack()
            head = ring.add([(request.guest, 51)], [(response.guest, 108)])
            queue.publish()
            while queue.ring.used_idx != 1:
                await trio.testing.wait_all_tasks_blocked(0.01)
            used = ring.take()
            assert used is not None
            assert (used.head, used.length) == (head, 108)
        assert (await driver.command(0, 0, bytes(6))).good


async def test_scan_finds_units_as_linux_does(socket_path: Path) -> None:
    """All targets are asked; unit attentions are taken; LUNs in both address methods are found."""
    disks = {
        (0, 0): Disk(blocks=2048, serial=b"A", attention=2),
        (0, 300): Disk(blocks=64, block_size=4096, serial=b"B", naa=bytes.fromhex("5001438012345678")),
        (255, 7): Disk(serial=b"C"),
    }
    fake = FakeBackend(disks)
    async with fake.listen(socket_path), ScsiDriver.open(socket_path) as driver:
        units = await driver.scan()

    assert [(unit.target, unit.lun, unit.blocks, unit.block_size, unit.serial) for unit in units] == [
        (0, 0, 2048, 512, "A"),
        (0, 300, 64, 4096, "B"),
        (255, 7, 256, 512, "C"),
    ]
    assert units[1].naa == "5001438012345678"
    assert (units[0].vendor, units[0].product, units[0].revision) == ("VHOSTFC", "FAKE DISK", "0001")
    assert {command.lun[1] for command in fake.commands} == set(range(256))


async def test_scan_of_a_unit_without_capacity_fails_loudly(backend: FakeBackend, socket_path: Path) -> None:
    """A disk that does not tell its size is named."""

    def refuse(request: CommandRequest, data: bytes, room: int) -> object:
        return check(2, 4, 3) if request.cdb[0] == 0x9E else backend.execute(request, data, room)

    backend.answer = refuse  # type: ignore[assignment]
    async with ScsiDriver.open(socket_path) as driver:
        with pytest.raises(Exception, match="unit 0:0 does not tell its capacity: status 02h, sense 2/04/03"):
            await driver.scan(targets=1)
