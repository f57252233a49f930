"""Messages and their descriptors: what comes whole is handed on, what does not leaves nothing open."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from trio.socket import SocketType

from vhostfc.errors import LinkLost
from vhostfc.fabric import link
from vhostfc.ports.linksocket import LinkSocket, close_fds

ROUTE = link.Route(1, 2, 3, medium=link.MediumKind.MEMORY, block_size=512, blocks=1)


@pytest.fixture
async def ends() -> AsyncIterator[tuple[LinkSocket, SocketType]]:
    one, other = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with LinkSocket(one) as ours, other:
        yield ours, other


@pytest.fixture
def fds() -> Iterator[list[int]]:
    made = [os.memfd_create(name) for name in "abc"]
    yield made
    close_fds(made)


async def send(sock: SocketType, data: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())]
    await sock.sendmsg([data], rights if fds else [])


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_message_comes_with_its_descriptors(ends: tuple[LinkSocket, SocketType], fds: list[int]) -> None:
    ours, other = ends
    await send(other, link.encode(ROUTE), fds[:2])
    message, received = await ours.receive()

    assert message == ROUTE
    assert [os.fstat(fd).st_ino for fd in received] == [os.fstat(fd).st_ino for fd in fds[:2]]
    assert not any(os.get_inheritable(fd) for fd in received)
    close_fds(received)


async def test_messages_keep_their_borders(ends: tuple[LinkSocket, SocketType]) -> None:
    ours, other = ends
    await ours.send(link.encode(link.Hello("a")))
    await ours.send(link.encode(link.Frame(bytes(2136))))

    assert link.decode(await other.recv(link.MAX_MESSAGE)) == link.Hello("a")
    assert link.decode(await other.recv(link.MAX_MESSAGE)) == link.Frame(bytes(2136))


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_the_wrong_number_of_descriptors_ends_the_link(
    ends: tuple[LinkSocket, SocketType], fds: list[int], count: int
) -> None:
    ours, other = ends
    before = open_fds()
    await send(other, link.encode(ROUTE), fds[:count])

    with pytest.raises(LinkLost, match="descriptors"):
        await ours.receive()
    assert open_fds() == before


@pytest.mark.parametrize(
    ("data", "complaint"), [(b"\x02short", "frame"), (bytes(5000), "too long"), (b"\xee", "unknown message")]
)
async def test_what_is_no_message_ends_the_link(
    ends: tuple[LinkSocket, SocketType], fds: list[int], data: bytes, complaint: str
) -> None:
    ours, other = ends
    before = open_fds()
    await send(other, data, fds[:2])

    with pytest.raises(LinkLost, match=complaint):
        await ours.receive()
    assert open_fds() == before


async def test_a_peer_that_left_is_a_lost_link(ends: tuple[LinkSocket, SocketType]) -> None:
    ours, other = ends
    other.close()

    with pytest.raises(LinkLost, match="closed"):
        await ours.receive()
    with pytest.raises(LinkLost, match="broke"):
        await ours.send(b"x")


async def test_where_nobody_listens_there_is_no_link(tmp_path: Path) -> None:
    before = open_fds()
    with pytest.raises(FileNotFoundError):
        await LinkSocket.connect(tmp_path / "fabric.sock")

    assert open_fds() == before
