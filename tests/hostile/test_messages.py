"""vhost-user messages that are wrong: each ends that connection with one line that names it, leaks nothing, and
leaves the back end serving the next."""

from __future__ import annotations

import os
import random
import struct

import pytest
import trio
import trio.lowlevel

from tests.hostile.adapter import DaemonAdapter
from tests.hostile.guest import Guest
from vhostfc.frontend.client import BackendError, VhostUserClient
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.vhost.messages import U64, VringFd, VringState
from vhostfc.vhost.requests import Request


def message(request: int, payload: bytes = b"", *, flags: int = 1, size: int | None = None) -> bytes:
    return struct.pack("=III", request, flags, len(payload) if size is None else size) + payload


U64_MAX = b"\xff" * 8

WRONG = {
    "unknown request": (message(999), 0),
    "request zero": (message(0), 0),
    "version 0": (message(Request.GET_FEATURES, flags=0), 0),
    "version 2": (message(Request.GET_FEATURES, flags=2), 0),
    "a reply": (message(Request.GET_FEATURES, flags=5), 0),
    "unknown flag": (message(Request.GET_FEATURES, flags=0x11), 0),
    "payload where none belongs": (message(Request.GET_FEATURES, bytes(8)), 0),
    "short payload": (message(Request.SET_FEATURES, bytes(7)), 0),
    "long payload": (message(Request.SET_VRING_NUM, bytes(16)), 0),
    "gigabytes": (message(Request.SET_FEATURES, bytes(8), size=1 << 30), 0),
    "largest size": (message(Request.SET_FEATURES, bytes(8), size=0xFFFFFFFF), 0),
    "fd where none belongs": (message(Request.GET_FEATURES), 1),
    "eight fds where none belong": (message(Request.SET_OWNER), 8),
    "more fds than any message has": (message(Request.SET_OWNER), 30),
    "kick without its fd": (message(Request.SET_VRING_KICK, struct.pack("=Q", 2)), 0),
    "kick with two fds": (message(Request.SET_VRING_KICK, struct.pack("=Q", 2)), 2),
    "no fd announced, one sent": (message(Request.SET_VRING_CALL, struct.pack("=Q", 0x102)), 1),
    "ring that does not exist": (message(Request.SET_VRING_NUM, struct.pack("=II", 0xFFFFFFFF, 64)), 0),
    "ring 255": (message(Request.SET_VRING_CALL, struct.pack("=Q", 0xFF)), 1),
    "reserved bits of a ring fd": (message(Request.SET_VRING_CALL, struct.pack("=Q", 0xFF00)), 1),
    "enable 7": (message(Request.SET_VRING_ENABLE, struct.pack("=II", 2, 7)), 0),
    "features that nobody has": (message(Request.SET_FEATURES, U64_MAX), 0),
    "protocol features that nobody has": (message(Request.SET_PROTOCOL_FEATURES, U64_MAX), 0),
    "region count": (message(Request.SET_MEM_TABLE, struct.pack("=II", 9, 0) + bytes(9 * 32)), 8),
    "huge region count": (message(Request.SET_MEM_TABLE, struct.pack("=II", 0xFFFFFFFF, 0)), 0),
    "regions without fds": (message(Request.SET_MEM_TABLE, struct.pack("=II", 1, 0) + bytes(32)), 0),
    "fewer regions than said": (message(Request.SET_MEM_TABLE, struct.pack("=II", 2, 0) + bytes(32)), 2),
    "another device's request": (message(Request.SEND_RARP, bytes(8)), 0),
    "a request of an unnegotiated feature": (message(Request.SET_LOG_BASE, bytes(16)), 1),
    "kick before anything": (message(Request.SET_VRING_KICK, struct.pack("=Q", 2)), 1),
    "base beyond a ring": (message(Request.SET_VRING_BASE, struct.pack("=II", 2, 0x10000)), 0),
}


@pytest.mark.parametrize("name", WRONG)
async def test_wrong_message(adapter: DaemonAdapter, name: str) -> None:
    """One line, the connection ends, the next one is served."""
    data, count = WRONG[name]
    fds = [os.open("/dev/null", os.O_RDWR) for _ in range(count)]
    try:
        async with VhostUserClient.open(adapter.socket) as client:
            await client.negotiate()
            await client.send_raw(data, fds)
            with trio.fail_after(5):
                await client.gone.wait()
    finally:
        for fd in fds:
            os.close(fd)
    await adapter.idle()
    assert len(adapter.refusals) == 1
    assert "\n" not in adapter.refusals[0]


@pytest.mark.parametrize("cut", [1, 11, 12, 15])
async def test_connection_ends_inside_a_message(adapter: DaemonAdapter, cut: int) -> None:
    """A front end that dies in the middle of a word."""
    async with VhostUserClient.open(adapter.socket) as client:
        await client.negotiate()
        await client.send_raw(message(Request.SET_FEATURES, bytes(8))[:cut])
    await adapter.idle()
    assert len(adapter.refusals) == 1


async def test_descriptors_with_a_payload(adapter: DaemonAdapter) -> None:
    """Descriptors that come with the payload's bytes belong to nobody and are closed."""
    fd = os.open("/dev/null", os.O_RDWR)
    data = message(Request.SET_FEATURES, bytes(8))
    try:
        async with VhostUserClient.open(adapter.socket) as client:
            await client.negotiate()
            await client.send_raw(data[:12])
            await client.send_raw(data[12:], [fd])
            await client.barrier()
    finally:
        os.close(fd)


async def test_message_byte_by_byte(adapter: DaemonAdapter) -> None:
    """A stream has no borders: a message in crumbs is a message."""
    async with VhostUserClient.open(adapter.socket) as client:
        await client.negotiate()
        for byte in message(Request.SET_FEATURES, struct.pack("=Q", client.features)):
            await client.send_raw(bytes([byte]))
        await client.barrier()
        assert (await client.ask(Request.GET_QUEUE_NUM, U64)).value > 0
    assert adapter.refusals == []


async def test_many_messages_at_once(adapter: DaemonAdapter) -> None:
    """Ten thousand requests before the first answer is read are answered in order."""
    async with VhostUserClient.open(adapter.socket) as client:
        await client.negotiate()
        half = message(Request.SET_VRING_NUM, struct.pack("=II", 2, 64)) * 5000
        await client.send_raw(half)
        await client.barrier()
    assert adapter.refusals == []


async def test_failure_is_acknowledged_before_the_end(adapter: DaemonAdapter) -> None:
    """Who asked for an acknowledgement hears that it failed."""
    async with VhostUserClient.open(adapter.socket) as client:
        await client.negotiate()
        with pytest.raises(BackendError, match="refused SET_VRING_ENABLE"):
            await client.request(Request.SET_VRING_ENABLE, VringState(2, 9))


async def test_front_ends_come_and_go(adapter: DaemonAdapter) -> None:
    """Connections that end at every step of the start leave nothing behind."""
    for steps in range(12):
        async with ScsiDriver.open(adapter.socket, start=False) as driver:
            setup = driver.queues[2].setup(0)
            client = driver.client
            sequence = [
                client.send_memory(),
                client.request(Request.SET_FEATURES, U64(client.features)),
                client.request(Request.SET_VRING_ERR, VringFd.of(2), [setup.err_fd]),
                client.request(Request.SET_VRING_CALL, VringFd.of(2), [setup.call_fd]),
                client.start([setup]),
                client.request(Request.SET_VRING_KICK, VringFd.of(2), [setup.kick_fd]),
                client.stop([2]),
                client.stop([2]),
                client.reset_device(),
                client.start([setup]),
                client.reset_device(),
                client.enable([2], enable=True),
            ]
            for step, action in enumerate(sequence):
                if step < steps:
                    await action
                else:
                    action.close()
        await adapter.idle()
    assert adapter.refusals == []


@pytest.mark.parametrize("seed", range(20))
async def test_noise(adapter: DaemonAdapter, seed: int) -> None:
    """Messages with random contents, right in shape and not: the back end outlives them all."""
    dice = random.Random(seed)
    fds = [os.eventfd(0), os.open("/dev/null", os.O_RDWR), os.memfd_create("noise")]
    os.ftruncate(fds[2], 1 << 20)
    sizes = {5: 40, 8: 8, 9: 40, 10: 8, 11: 8, 12: 8, 13: 8, 14: 8, 18: 8, 2: 8, 16: 8, 37: 40, 38: 40}
    try:
        for _ in range(10):
            async with VhostUserClient.open(adapter.socket) as client:
                await client.negotiate()
                try:
                    for _ in range(30):
                        request = dice.choice([*sizes, dice.randrange(50)])
                        payload = bytearray(dice.choice([0, 0, 0, 1, 2, 255, dice.randrange(256)]) for _ in range(48))
                        payload = payload[: sizes.get(request, dice.choice([0, 8, 16]))]
                        await client.send_raw(message(request, bytes(payload)), dice.choice([[], [], fds[:1], fds[2:]]))
                    await client.barrier()
                except BackendError:
                    pass
            await adapter.idle()
    finally:
        for fd in fds:
            os.close(fd)


async def test_guest_that_is_killed_with_commands_in_flight(adapter: DaemonAdapter, guest: Guest) -> None:
    """The connection just ends: what was in flight is dropped, and the rings are stopped before memory goes."""
    adapter.hold = True
    for _ in range(8):
        guest.queue.post([(guest.request(bytes([0x12]) + bytes(5)).guest, 51)], [(guest.response().guest, 108)])
    with trio.fail_after(5):
        while len(adapter.held) < 8:
            await trio.lowlevel.checkpoint()
    guest.driver.running = False
    guest.driver.client._socket.close()
    await adapter.idle()
    adapter.hold = False
    assert adapter.counters()["in_flight"] == 0
    assert adapter.counters()["aborted"] == 8
    assert not adapter.answer_held()
