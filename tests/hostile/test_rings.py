"""Rings that lie: indices that jump, heads that are none, addresses that lead nowhere, doorbells that block."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.hostile.adapter import DaemonAdapter
from tests.hostile.guest import FAILURE, INQUIRY, READ, Guest, R, W, chain
from vhostfc.frontend.client import BackendError, RingSetup, VhostUserClient
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.memory import USER_OFFSET
from vhostfc.frontend.ring import WRITE
from vhostfc.vhost.messages import VringFd, VringState
from vhostfc.vhost.requests import Request
from vhostfc.virtio.scsi import Response


@pytest.mark.parametrize("jump", [65, 0x7FFF, 0xFFFF])
async def test_avail_index_jumps(adapter: DaemonAdapter, guest: Guest, jump: int) -> None:
    """More entries than the ring has: the ring is broken and says so; a reset mends it."""
    ring = guest.queue.ring
    ring.set_index(ring.avail_index + jump & 0xFFFF)
    guest.queue.kick()
    await guest.broken()

    assert adapter.counters()["broken_rings"] == 1
    assert (await guest.driver.manage(7, 0, 0)) == Response.FUNCTION_COMPLETE
    await guest.driver.reset()
    await guest.works()


@pytest.mark.parametrize("head", [64, 0x8000, 0xFFFF])
async def test_head_out_of_range(adapter: DaemonAdapter, guest: Guest, head: int) -> None:
    """A head that is no descriptor."""
    guest.queue.ring.offer(head)
    guest.queue.publish()
    await guest.broken()

    assert adapter.counters()["broken_rings"] == 1
    await guest.driver.reset()
    await guest.works()


async def test_head_that_is_in_flight_already(adapter: DaemonAdapter, guest: Guest) -> None:
    """One descriptor, two commands at a time: the second breaks the ring, the first is not answered twice."""
    adapter.hold = True
    request, response = guest.request(INQUIRY), guest.response()
    guest.put(chain((request, R), (response, W)))
    guest.queue.ring.offer(0)
    guest.queue.ring.offer(0)
    guest.queue.publish()
    await guest.broken()

    assert adapter.counters()["bad_chain"] == 1
    assert guest.queue.ring.used_idx == 0
    adapter.hold = False
    await guest.driver.reset()
    await guest.works()


async def test_ring_is_broken_while_commands_are_in_flight(adapter: DaemonAdapter, guest: Guest) -> None:
    """What was in flight when the ring broke is ended by the stop, and the next start is clean."""
    adapter.hold = True
    for _ in range(4):
        guest.queue.post(
            [(guest.request(INQUIRY).guest, 51)], [(guest.response().guest, 108), (guest.buffer(36).guest, 36)]
        )
    with trio.fail_after(5):
        while len(adapter.held) < 4:
            await trio.testing.wait_all_tasks_blocked(0.001)
    guest.queue.ring.offer(0xFFFF)
    guest.queue.publish()
    await guest.broken()
    adapter.hold = False
    await guest.driver.reset()
    await guest.works()


async def test_endless_kicks(adapter: DaemonAdapter, guest: Guest) -> None:
    """A guest that kicks without work costs itself alone: other rings are served."""
    stop = trio.Event()

    async def kick() -> None:
        while not stop.is_set():
            for _ in range(100):
                guest.queue.kick()
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kick)
        for _ in range(20):
            assert (await guest.driver.manage(7, 0, 0)) == Response.FUNCTION_COMPLETE
        stop.set()
    await guest.works()


async def test_used_ring_over_the_other_parts(adapter: DaemonAdapter) -> None:
    """All three parts of a ring at the same place: nonsense for the guest, harmless to the back end."""
    async with ScsiDriver.open(adapter.socket, queue_size=64, start=False) as driver:
        setup = driver.queues[2].setup(0)
        place = driver.memory.allocate(4096, 4096).user
        driver.queues[2].ring.set_index(3)
        await driver.client.start([RingSetup(2, 64, place, place, place, setup.kick_fd, setup.call_fd, setup.err_fd)])
        driver.queues[2].kick()
        await driver.client.stop([2])


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@pytest.mark.parametrize("where", ["zero", "guest address", "behind", "half out", "wraps"])
async def test_ring_outside_memory(adapter: DaemonAdapter, part: str, where: str) -> None:
    """Each part of a ring at an address that is not (wholly) the guest's ends the connection with a line."""
    async with ScsiDriver.open(adapter.socket, queue_size=64, start=False) as driver:
        setup = driver.queues[2].setup(0)
        region = driver.memory.regions[0]
        address = {
            "zero": 0,
            "guest address": region.guest_phys,
            "behind": region.user_addr + region.size,
            "half out": region.user_addr + region.size - 16,
            "wraps": (1 << 64) - 16,
        }[where]
        parts = {"desc": setup.desc, "avail": setup.avail, "used": setup.used, part: address}
        with pytest.raises(BackendError):
            await driver.client.start(
                [RingSetup(2, 64, parts["desc"], parts["avail"], parts["used"], setup.kick_fd, -1, setup.err_fd)]
            )
        await driver.client.gone.wait()
    await adapter.idle()
    assert len(adapter.refusals) == 1
    assert "ring 2" in adapter.refusals[0]
    assert "outside guest memory" in adapter.refusals[0]


@pytest.mark.parametrize("size", [0, 3, 100, 65536, 0x80000000])
async def test_ring_of_an_impossible_size(adapter: DaemonAdapter, size: int) -> None:
    """Not a power of two, none at all, or too many entries."""
    async with ScsiDriver.open(adapter.socket, start=False) as driver:
        await driver.client.send_memory()
        with pytest.raises(BackendError, match="SET_VRING_NUM"):
            await driver.client.request(Request.SET_VRING_NUM, VringState(2, size))
    assert "SET_VRING_NUM" in adapter.refusals[0]


@pytest.mark.parametrize(("part", "off"), [("desc", 8), ("avail", 1), ("used", 2)])
async def test_misaligned_ring(adapter: DaemonAdapter, part: str, off: int) -> None:
    """The standard's alignment (virtio 2.7) is required, not hoped for."""
    async with ScsiDriver.open(adapter.socket, queue_size=64, start=False) as driver:
        setup = driver.queues[2].setup(0)
        parts = {"desc": setup.desc, "avail": setup.avail, "used": setup.used}
        parts[part] += off
        with pytest.raises(BackendError):
            await driver.client.start(
                [RingSetup(2, 64, parts["desc"], parts["avail"], parts["used"], setup.kick_fd, -1, setup.err_fd)]
            )
    assert len(adapter.refusals) == 1


async def test_call_eventfd_that_blocks(adapter: DaemonAdapter, guest: Guest) -> None:
    """A full eventfd in blocking mode must not stop the worker: the guest could freeze its adapter's others."""
    blocking = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(blocking, 0xFFFFFFFFFFFFFFFE)
    try:
        await guest.driver.client.request(Request.SET_VRING_CALL, VringFd.of(2), [blocking])
        posted = guest.queue.post([(guest.request().guest, 51)], [(guest.response().guest, 108)])
        with trio.fail_after(5):
            while not guest.queue.collect():
                await trio.sleep(0.001)
        assert posted.used is not None
        assert (await guest.driver.manage(7, 0, 0)) == Response.FUNCTION_COMPLETE
    finally:
        os.close(blocking)


@pytest.mark.parametrize("what", ["pipe", "file", "null", "socket"])
async def test_doorbells_that_are_no_eventfds(adapter: DaemonAdapter, tmp_path: Path, what: str) -> None:
    """Whatever is handed over as kick and call: served or refused, never a hang or a crash."""
    fds: list[int] = []
    match what:
        case "pipe":
            fds += os.pipe()
        case "file":
            fds.append(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT))
        case "null":
            fds.append(os.open("/dev/null", os.O_RDWR))
        case _:
            one, other = socket.socketpair()
            fds += [one.detach(), other.detach()]
    try:
        async with ScsiDriver.open(adapter.socket, queue_size=64, start=False) as driver:
            setup = driver.queues[2].setup(0)
            bad = RingSetup(2, 64, setup.desc, setup.avail, setup.used, fds[0], fds[-1], fds[-1])
            try:
                await driver.client.start([bad])
                await driver.client.stop([2])
            except BackendError:
                await driver.client.gone.wait()
    finally:
        for fd in fds:
            os.close(fd)


async def test_ring_that_is_started_twice(adapter: DaemonAdapter, guest: Guest) -> None:
    """A second kick descriptor for a running ring takes the first one's place."""
    other = os.eventfd(1, os.EFD_NONBLOCK)
    try:
        await guest.driver.client.request(Request.SET_VRING_KICK, VringFd.of(2), [other])
        request, response = guest.request(), guest.response()
        data = guest.buffer(512)
        guest.put(chain((request, R), (response, W), (data, W)))
        posted = guest.queue.expect(0)
        guest.queue.ring.offer(0)
        guest.queue.ring.publish()
        os.eventfd_write(other, 1)
        with trio.fail_after(5):
            await posted.wait()
        assert guest.decode(response).response == Response.OK
    finally:
        os.close(other)


async def test_ring_without_a_kick_descriptor_is_polled(adapter: DaemonAdapter) -> None:
    """Bit 8 of SET_VRING_KICK: no descriptor, the back end looks by itself."""
    async with ScsiDriver.open(adapter.socket, queue_size=64) as driver:
        await driver.stop()
        await driver.client.request(Request.SET_VRING_KICK, VringFd.of(2, fd=False))
        await driver.client.enable([2], enable=True)
        queue = driver.queues[2]
        request, response = driver.memory.allocate(51), driver.memory.allocate(108)
        request.view[:] = bytes(51)
        posted = queue.expect(queue.ring.add([(request.guest, 51)], [(response.guest, 108)]))
        queue.ring.publish()
        with trio.fail_after(5):
            while posted.used is None:
                queue.collect()
                await trio.sleep(0.001)
        await driver.client.stop([2])


async def test_feature_that_was_not_offered(adapter: DaemonAdapter) -> None:
    """What QEMU lets a guest acknowledge unasked is refused with what to set on its command line."""
    async with VhostUserClient.open(adapter.socket) as client:
        await client.negotiate()
        client.features |= 1 << 3
        with pytest.raises(BackendError):
            await client.start([])
    assert "t10_pi=off" in adapter.refusals[0]


async def test_event_buffers_that_are_none(adapter: DaemonAdapter) -> None:
    """Event buffers that are too short, readable, outside memory or loops are given back empty; a good one is used."""
    async with ScsiDriver.open(adapter.socket, queue_size=64, event_buffers=0) as driver:
        queue = driver.queues[1]
        queue.ring.reserve(16)
        good = driver.memory.allocate(16)
        bad = [
            (good.guest, 15, WRITE, 0),
            (good.guest, 16, 0, 0),
            (0x10, 16, WRITE, 0),
            (good.guest + USER_OFFSET, 16, WRITE, 0),
            (good.guest, 16, WRITE | 1, 4),
            (good.guest, 8, 4, 0),
        ]
        posted = []
        for index, each in enumerate(bad):
            queue.ring.put_descriptor(index, *each)
            posted.append(queue.expect(index))
            queue.ring.offer(index)
        queue.ring.put_descriptor(8, good.guest, 16, WRITE)
        posted.append(queue.expect(8))
        queue.ring.offer(8)
        queue.publish()
        assert await adapter.event(b"\x01" + bytes(15))
        with trio.fail_after(5):
            lengths = [(await each.wait()).length for each in posted]

        assert lengths == [0, 0, 0, 0, 0, 0, 16]
        assert bytes(good.view) == b"\x01" + bytes(15)
        assert not await adapter.event(bytes(16))
        counters = adapter.counters()
        assert counters["bad_header"] == 2
        assert counters["bad_address"] == 2


async def test_event_ring_that_jumps(adapter: DaemonAdapter, guest: Guest) -> None:
    """A broken event ring is told when an event needs it, and breaks nothing else."""
    queue = guest.driver.queues[1]
    for _ in range(8):
        assert await adapter.event(bytes(16))
    queue.ring.set_index(queue.ring.avail_index + 1000 & 0xFFFF)
    while await adapter.event(bytes(16)):
        pass
    with trio.fail_after(5):
        await queue.broken.wait()
    await guest.works()


@pytest.mark.parametrize(
    ("request_bytes", "room", "answer"),
    [
        (b"", 1, b""),
        (b"\x00\x00\x00", 1, b""),
        (bytes(4), 1, bytes([FAILURE])),
        (bytes(23), 1, bytes([FAILURE])),
        (b"\xff" * 24, 1, bytes([FAILURE])),
        (b"\xff" * 5000, 5, bytes([FAILURE])),
        (bytes(24), 0, b""),
        (b"\x01\x00\x00\x00" + bytes(11), 5, bytes([FAILURE])),
        (bytes(4) + b"\x63\x00\x00\x00" + bytes.fromhex("0100400000000000") + bytes(8), 1, bytes([11])),
    ],
)
async def test_control_requests_that_are_none(
    adapter: DaemonAdapter, guest: Guest, request_bytes: bytes, room: int, answer: bytes
) -> None:
    """Too short, of no known kind, with no place for an answer: each comes back at once."""
    assert await guest.driver.control(request_bytes, room, timeout=5) == answer
    assert await guest.driver.manage(7, 0, 0) == Response.FUNCTION_COMPLETE
    await guest.works()


@pytest.mark.parametrize("flags", [R, W])
async def test_control_chain_that_loops(adapter: DaemonAdapter, guest: Guest, flags: int) -> None:
    """A loop in the control ring comes back with nothing written."""
    queue = guest.driver.queues[0]
    queue.ring.reserve(2)
    buffer = guest.buffer(bytes(24))
    queue.ring.put_descriptor(0, buffer.guest, 24, flags | 1, 1)
    queue.ring.put_descriptor(1, buffer.guest, 24, flags | 1, 0)
    posted = queue.expect(0)
    queue.ring.offer(0)
    queue.publish()
    with trio.fail_after(5):
        assert (await posted.wait()).length == 0
    assert adapter.counters()["bad_chain"] == 1
    assert await guest.driver.manage(7, 0, 0) == Response.FUNCTION_COMPLETE


async def test_flood_of_punts_is_rationed(adapter: DaemonAdapter, guest: Guest) -> None:
    """More commands for Python than the ration: TASK SET FULL for the rest, and READs still pass."""
    adapter.hold = True
    answers: list[int] = []

    async def inquire() -> None:
        answer = await guest.driver.command(0, 0, INQUIRY, data_in=36)
        answers.append(answer.status)

    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(inquire)
        with trio.fail_after(5):
            while len(adapter.held) + len(answers) < 30:
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert answers == [0x28] * 14
        assert (await guest.driver.command(0, 0, READ, data_in=512)).good
        assert (await guest.driver.manage(5, 0, 0)) == Response.FUNCTION_COMPLETE
        nursery.cancel_scope.cancel()
    adapter.hold = False
    assert adapter.counters()["task_set_full"] == 14
    assert adapter.counters()["aborted"] == 16
