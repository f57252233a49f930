"""What the front end says, in which order, and what it makes of a back end that is not as it should be."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.frontend.fakebackend import FakeBackend
from vhostfc.frontend.client import WANTED, BackendError, VhostUserClient
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.vhost.features import Feature, ProtocolFeature
from vhostfc.vhost.messages import U64, VringState
from vhostfc.vhost.requests import Request

R = Request


async def test_connect_start_and_stop_in_qemus_order(backend: FakeBackend, socket_path: Path) -> None:
    """The sequences of QEMU, in which back ends expect to be spoken to."""
    async with ScsiDriver.open(socket_path) as driver:
        connect = [
            R.GET_FEATURES, R.GET_PROTOCOL_FEATURES, R.SET_PROTOCOL_FEATURES, R.GET_QUEUE_NUM, R.GET_MAX_MEM_SLOTS,
            R.SET_OWNER, R.GET_FEATURES,
        ]  # fmt: skip
        ring = [R.SET_VRING_ERR, R.SET_VRING_NUM, R.SET_VRING_BASE, R.SET_VRING_ADDR, R.SET_VRING_KICK]
        start = [R.SET_FEATURES, R.ADD_MEM_REG, *ring * 3, *[R.SET_VRING_ENABLE] * 3, *[R.SET_VRING_CALL] * 3]
        assert backend.requests == connect + start
        backend.requests.clear()
        await driver.stop()
        assert backend.requests == [R.SET_VRING_ENABLE] * 3 + [R.GET_VRING_BASE] * 3
        backend.requests.clear()
        await driver.start()
        assert R.ADD_MEM_REG not in backend.requests  # it has the memory already


async def test_barriers_without_reply_ack(socket_path: Path) -> None:
    """Where nothing is acknowledged, a GET_FEATURES follows what must be in force."""
    fake = FakeBackend()
    fake.protocol_offered &= ~(1 << ProtocolFeature.REPLY_ACK)
    async with fake.listen(socket_path), ScsiDriver.open(socket_path) as driver:
        at = fake.requests.index(R.SET_VRING_ENABLE)
        assert fake.requests[at : at + 4] == [R.SET_VRING_ENABLE] * 3 + [R.GET_FEATURES]
        assert fake.requests[fake.requests.index(R.ADD_MEM_REG) + 1] == R.GET_FEATURES
        await driver.client.barrier()
        fake.requests.clear()
        region = await driver.client.add_region(1 << 20)
        await driver.client.remove_region(region)
        assert fake.requests == [R.ADD_MEM_REG, R.GET_FEATURES, R.REM_MEM_REG, R.GET_FEATURES]


async def test_whole_tables_without_memory_slots(socket_path: Path) -> None:
    """Each change sends all regions; the ninth is refused here, since a message has room for eight."""
    fake = FakeBackend()
    fake.protocol_offered &= ~(1 << ProtocolFeature.CONFIGURE_MEM_SLOTS)
    async with fake.listen(socket_path), ScsiDriver.open(socket_path, regions=(1 << 20, 1 << 20)) as driver:
        assert len(fake.regions) == 2
        regions = [await driver.client.add_region(4096, mmap_offset=8192) for _ in range(6)]
        assert len(fake.regions) == 8
        assert fake.regions[7][0].mmap_offset == 8192
        with pytest.raises(BackendError, match="takes 8 memory regions, all in use"):
            await driver.client.add_region(4096)
        for region in regions:
            await driver.client.remove_region(region)
        assert len(fake.regions) == 2


async def test_without_protocol_features_rings_are_enabled_from_the_start(socket_path: Path) -> None:
    """There is nothing to enable, no feature to ask for, one request queue and eight regions."""
    fake = FakeBackend(features=1 << Feature.VERSION_1)
    async with fake.listen(socket_path), ScsiDriver.open(socket_path) as driver:
        assert (await driver.command(0, 0, bytes(6))).good
        assert (driver.client.queue_num, driver.client.max_mem_slots) == (1, 8)
    assert not {R.SET_VRING_ENABLE, R.GET_PROTOCOL_FEATURES, R.GET_QUEUE_NUM, R.RESET_DEVICE} & set(fake.requests)


async def test_only_what_is_wanted_is_taken(backend: FakeBackend, socket_path: Path) -> None:
    """A caller may do without what is offered."""
    async with ScsiDriver.open(socket_path, features=WANTED & ~(1 << Feature.EVENT_IDX)):
        assert backend.features == WANTED & ~(1 << Feature.EVENT_IDX)


async def test_more_queues_than_there_are(backend: FakeBackend, socket_path: Path) -> None:
    """Said before anything is set up."""
    with pytest.raises(BackendError, match="5 request queues wanted, the back end has 4"):
        async with ScsiDriver.open(socket_path, queues=5):
            pass
    assert R.SET_FEATURES not in backend.requests


async def test_refusal_is_named(backend: FakeBackend, socket_path: Path) -> None:
    """A negative acknowledgement is an error with the request's name; the connection lives on."""
    backend.fail = {R.SET_VRING_NUM}
    async with VhostUserClient.open(socket_path) as client:
        await client.negotiate()
        with pytest.raises(BackendError, match=f"{socket_path}: the back end refused SET_VRING_NUM"):
            await client.request(R.SET_VRING_NUM, VringState(0, 64))
        backend.fail = set()
        await client.barrier()


async def test_silence_is_bounded(backend: FakeBackend, socket_path: Path) -> None:
    """A back end that does not answer loses the connection, and everybody hears why."""
    backend.silent = {R.GET_QUEUE_NUM}
    async with VhostUserClient.open(socket_path, timeout=0.05) as client:
        with pytest.raises(BackendError, match=r"did not answer GET_QUEUE_NUM within 0\.05 s"):
            await client.negotiate()
        assert client.gone.is_set()
        with pytest.raises(BackendError, match="did not answer GET_QUEUE_NUM"):
            await client.barrier()
        assert "gone" in repr(client)


async def test_cancelled_request_does_not_mix_up_answers(backend: FakeBackend, socket_path: Path) -> None:
    """Question and answer stay together when the asker is cancelled in between."""
    async with VhostUserClient.open(socket_path) as client:
        await client.negotiate()
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.ask(R.GET_QUEUE_NUM, U64)
        assert (await client.ask(R.GET_MAX_MEM_SLOTS, U64)).value == 509


Script = Callable[[trio.socket.SocketType], Awaitable[None]]


@asynccontextmanager
async def stranger(path: Path, script: Script) -> AsyncIterator[None]:
    """Somebody who listens at `path` and answers the first message by `script`."""
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(str(path))
    listener.listen(1)

    async def serve() -> None:
        sock, _ = await listener.accept()
        with sock:
            await sock.recv(12)
            await script(sock)

    with listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield
            nursery.cancel_scope.cancel()


def reply(request: int, flags: int, payload: bytes, size: int | None = None) -> bytes:
    return struct.pack("=III", request, flags, len(payload) if size is None else size) + payload


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "answers nonsense"),
        (reply(1, 5, bytes(4)), "answers nonsense: reply to GET_FEATURES"),
        (reply(3, 5, bytes(8)), "answers nonsense: reply to GET_FEATURES: it answers SET_OWNER instead"),
        (reply(1, 1, bytes(8)), "the reply flag is missing"),
        (reply(1, 5, bytes(8), size=1 << 30), "far too long"),
        (reply(1, 5, bytes(8))[:15], "the connection ended inside a message"),
        (b"", "the back end closed the connection"),
    ],
)
async def test_nonsense_is_named(socket_path: Path, answer: bytes, text: str) -> None:
    """Whatever listens there: one line that says what is wrong with it."""

    async def script(sock: trio.socket.SocketType) -> None:
        if answer:
            await sock.send(answer)

    async with stranger(socket_path, script), VhostUserClient.open(socket_path, timeout=5) as client:
        with pytest.raises(BackendError, match=text) as error:
            await client.negotiate()
        assert str(socket_path) in str(error.value)
        assert "\n" not in str(error.value)


async def test_descriptors_in_a_reply_are_closed(socket_path: Path) -> None:
    """Nobody can make the front end collect descriptors."""

    async def script(sock: trio.socket.SocketType) -> None:
        fd = os.open("/dev/null", os.O_RDONLY)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
        await sock.sendmsg([reply(1, 5, bytes(8))], rights)
        os.close(fd)

    async with stranger(socket_path, script), VhostUserClient.open(socket_path) as client:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(BackendError, match="1 file descriptors, expected 0"):
            await client.negotiate()
        assert len(os.listdir("/proc/self/fd")) <= before


async def test_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    """A path of any length can be connected to, as the daemon can listen there."""
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    directory = os.open(deep, os.O_RDONLY)
    fake = FakeBackend()
    try:
        async with (
            fake.listen(Path(f"/proc/self/fd/{directory}/vhost.sock")),
            VhostUserClient.open(deep / "vhost.sock") as client,
        ):
            await client.negotiate()
    finally:
        os.close(directory)
