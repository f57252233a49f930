"""Sockets with descriptors: whole messages, no leak on any way out, and doors that nobody else holds."""

from __future__ import annotations

import array
import errno
import os
import resource
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from vhostfc.daemon.fdsocket import (
    LinkSocket,
    Listener,
    VhostSocket,
    adopt,
    close_fds,
    connect,
    listen,
    peer,
)
from vhostfc.errors import LinkLost, VhostfcError
from vhostfc.fabric import link
from vhostfc.vhost import messages as m
from vhostfc.vhost.messages import Header, Packet, ProtocolError
from vhostfc.vhost.requests import Request, decode_request, encode_request


@contextmanager
def no_leak() -> Iterator[None]:
    """The process has as many descriptors open afterwards as before."""
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@contextmanager
def files(count: int) -> Iterator[list[int]]:
    fds = [os.memfd_create(f"test-{n}") for n in range(count)]
    try:
        yield fds
    finally:
        close_fds(fds)


@contextmanager
def pair() -> Iterator[tuple[socket.socket, VhostSocket]]:
    """A front end's plain socket and our end."""
    front, back = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with front, VhostSocket(trio.socket.from_stdlib_socket(back)) as vhost:
        yield front, vhost


def send(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])


KICK = encode_request(Request.SET_VRING_KICK, m.VringFd.of(1))
CALL = encode_request(Request.SET_VRING_CALL, m.VringFd.of(1))
OWNER = encode_request(Request.SET_OWNER)


# ------------------------------------------------------------------------------------------------ vhost-user


async def test_queued_messages_come_one_by_one_each_with_its_own_descriptors() -> None:
    with no_leak(), pair() as (front, vhost), files(2) as (kick, call):
        send(front, OWNER, [])
        send(front, KICK, [kick])
        send(front, CALL, [call])
        send(front, OWNER, [])

        packets = [await vhost.receive() for _ in range(4)]

        received = [packet for packet in packets if packet is not None]
        assert [decode_request(packet).request for packet in received] == [
            Request.SET_OWNER, Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_OWNER,
        ]  # fmt: skip
        got = [fd for packet in received for fd in packet.fds]
        assert [os.fstat(fd).st_ino for fd in got] == [os.fstat(fd).st_ino for fd in (kick, call)]
        assert not any(os.get_inheritable(fd) for fd in got)
        close_fds(got)


async def test_a_message_may_come_byte_by_byte() -> None:
    with no_leak(), pair() as (front, vhost), files(1) as fds:
        received: list[Packet | None] = []

        async def receive() -> None:
            received.append(await vhost.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for at in range(len(KICK)):
                await trio.testing.wait_all_tasks_blocked()
                send(front, KICK[at : at + 1], fds if at == 0 else [])

        (packet,) = received
        assert packet is not None
        assert decode_request(packet).payload == m.VringFd.of(1)
        close_fds(packet.fds)


async def test_the_end_between_messages_is_none() -> None:
    with no_leak(), pair() as (front, vhost):
        send(front, OWNER, [])
        front.close()

        assert await vhost.receive() == Packet(Header(3, 1, 0))
        assert await vhost.receive() is None


async def test_a_front_end_that_left_our_reply_unread_is_gone_too() -> None:
    with no_leak(), pair() as (front, vhost):
        await vhost.send(OWNER)
        front.close()

        assert await vhost.receive() is None
        with pytest.raises(BrokenPipeError):
            await vhost.send(OWNER)


async def test_the_end_within_a_message_names_it_and_closes_its_descriptors() -> None:
    with no_leak(), pair() as (front, vhost), files(1) as fds:
        send(front, KICK[:15], fds)
        front.close()
        with pytest.raises(ProtocolError, match=r"SET_VRING_KICK: .* after 3 of 8 bytes of payload"):
            await vhost.receive()

    with no_leak(), pair() as (front, vhost), files(1) as fds:
        send(front, KICK[:7], fds)
        front.close()
        with pytest.raises(ProtocolError, match="after 7 bytes of a header"):
            await vhost.receive()

    with no_leak(), pair() as (front, vhost):
        send(front, struct.pack("=III", 99, 1, 5), [])
        front.close()
        with pytest.raises(ProtocolError, match="request 99: the connection ended after 0 of 5 bytes"):
            await vhost.receive()


async def test_more_descriptors_than_any_message_may_carry_are_closed() -> None:
    with no_leak(), pair() as (front, vhost), files(m.MAX_FDS + 1) as fds:
        send(front, KICK, fds)
        with pytest.raises(ProtocolError, match="more than 8 file descriptors"):
            await vhost.receive()

    with no_leak(), pair() as (front, vhost), files(m.MAX_FDS) as fds:
        send(front, KICK[:4], fds)
        send(front, KICK[4:], fds)
        with pytest.raises(ProtocolError, match="more than 8 file descriptors"):
            await vhost.receive()


async def test_descriptors_that_come_with_a_payload_are_nobodys() -> None:
    with no_leak(), pair() as (front, vhost), files(2) as (kick, stray):
        send(front, KICK[:12], [kick])
        send(front, KICK[12:], [stray])

        packet = await vhost.receive()

        assert packet is not None
        (fd,) = packet.fds
        assert os.fstat(fd).st_ino == os.fstat(kick).st_ino
        close_fds(packet.fds)


async def test_a_header_that_promises_gigabytes_ends_it_at_once() -> None:
    with no_leak(), pair() as (front, vhost), files(1) as fds:
        send(front, struct.pack("=III", Request.SET_CONFIG, 1, 1 << 31), fds)
        with pytest.raises(ProtocolError, match="SET_CONFIG: a payload of 2147483648 bytes"):
            await vhost.receive()


async def test_a_cancelled_receive_closes_what_came() -> None:
    with no_leak(), pair() as (front, vhost), files(1) as fds:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vhost.receive)
            send(front, KICK[:14], fds)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()


async def test_a_reply_carries_descriptors_and_goes_out_whole() -> None:
    with no_leak(), pair() as (front, vhost), files(1) as fds:
        reply = bytes(range(256)) * 4096

        async with trio.open_nursery() as nursery:
            nursery.start_soon(vhost.send, reply, fds)
            await trio.testing.wait_all_tasks_blocked()
            data, ancillary, _, _ = await trio.to_thread.run_sync(front.recvmsg, 4096, 100)
            while len(data) < len(reply):
                data += await trio.to_thread.run_sync(front.recv, 65536)

        assert data == reply
        received = array.array("i", ancillary[0][2])
        assert os.fstat(received[0]).st_ino == os.fstat(fds[0]).st_ino
        close_fds(received)


# ------------------------------------------------------------------------------------------------ links


async def test_a_link_keeps_messages_and_descriptors_together() -> None:
    with no_leak(), files(2) as fds:
        one, other = LinkSocket.pair()
        with one, other:
            await one.send(b"first", fds)
            await one.send(b"second")
            first, first_fds = await other.receive()
            second = await other.receive()

            assert (first, second) == (b"first", (b"second", []))
            assert [os.fstat(fd).st_ino for fd in first_fds] == [os.fstat(fd).st_ino for fd in fds]
            close_fds(first_fds)
            one.close()
            assert await other.receive() == (b"", [])
            with pytest.raises(LinkLost, match="the peer closed the link"):
                await other.send(b"x")


async def test_a_link_refuses_more_than_a_message() -> None:
    with no_leak(), files(link.MAX_FDS + 3) as fds:
        one, other = LinkSocket.pair()
        with one, other:
            await one.send(bytes(link.MAX_MESSAGE + 1), fds[:1])
            with pytest.raises(LinkLost, match="longer than 4096 bytes"):
                await other.receive()
            await one.send(b"x", fds)
            with pytest.raises(LinkLost, match="more than 2 file descriptors"):
                await other.receive()
            await one.send(b"", fds[:1])
            with pytest.raises(LinkLost, match="or none at all"):
                await other.receive()
            await one.send(bytes(link.MAX_MESSAGE))
            assert len((await other.receive())[0]) == link.MAX_MESSAGE


async def test_tasks_that_send_on_a_full_link_take_turns() -> None:
    one, other = LinkSocket.pair()
    with one, other:
        received: list[bytes] = []

        async with trio.open_nursery() as nursery:
            for n in range(600):
                nursery.start_soon(one.send, n.to_bytes(4, "big") * 1000)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(600):
                received.append((await other.receive())[0])

        assert sorted(received) == [n.to_bytes(4, "big") * 1000 for n in range(600)]


async def test_a_link_knows_its_peer() -> None:
    one, other = LinkSocket.pair()
    with one, other:
        assert one.peer_pid == os.getpid()
        assert one.peer.startswith(f"process {os.getpid()} (")


# ------------------------------------------------------------------------------------------------ doors


async def test_listening_connecting_and_leaving_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with no_leak():
        with listen(path, mode=0o660, owner=(-1, os.getgid())) as door:
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            with await connect(path) as client, await door.accept() as server:
                await client.send(b"x")
                assert await server.recv(1) == b"x"
                assert peer(server).startswith(f"process {os.getpid()} (")
        assert not path.exists()


async def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.mkdir(parents=True)
    path = directory / "a.sock"
    with no_leak():
        with listen(path, socket.SOCK_SEQPACKET) as door:
            with await connect(path, socket.SOCK_SEQPACKET) as client, await door.accept() as server:
                await client.send(b"packet")
                assert await server.recv(100) == b"packet"
            with pytest.raises(VhostfcError, match="listens there already"):
                listen(path, socket.SOCK_SEQPACKET)
        assert not path.exists()
        with pytest.raises(VhostfcError, match="the file's name is too long"):
            listen(directory / ("n" * 200))


async def test_a_live_socket_is_left_alone_and_its_holder_named(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with no_leak(), listen(path):
        with pytest.raises(VhostfcError) as caught:
            listen(path)
        assert str(caught.value).startswith(f"{path}: process {os.getpid()} (")
        with pytest.raises(VhostfcError, match="in use is in the way: Protocol wrong type"):
            listen(path, socket.SOCK_SEQPACKET)
        assert path.exists()


async def test_a_dead_processs_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    program = "import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == 9  # noqa: ASYNC221  nothing else runs here
    assert path.exists()

    with no_leak(), listen(path), await connect(path):
        pass
    assert not path.exists()


async def test_what_is_not_a_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    path.write_text("precious")
    with no_leak():
        with pytest.raises(VhostfcError, match=r"a\.sock: something that is not a socket is in the way"):
            listen(path)
        with pytest.raises(VhostfcError, match="cannot connect: Connection refused"):
            await connect(path)
    assert path.read_text() == "precious"


async def test_a_missing_directory_and_a_missing_socket_are_named(tmp_path: Path) -> None:
    with no_leak():
        with pytest.raises(VhostfcError, match=r"no/a\.sock: its directory cannot be opened: No such file"):
            listen(tmp_path / "no" / "a.sock")
        with pytest.raises(VhostfcError, match=r"/a\.sock: cannot connect: No such file") as caught:
            await connect(tmp_path / "a.sock")
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ENOENT


async def test_a_file_that_is_no_longer_ours_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    first = listen(path)
    path.unlink()
    with listen(path):
        first.close()
        assert path.exists()


async def test_a_door_that_cannot_be_given_to_its_owner_is_removed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chown(path: Path, uid: int, gid: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chown", chown)
    path = tmp_path / "a.sock"
    with no_leak(), pytest.raises(VhostfcError, match=r"a\.sock: cannot listen there: Operation not permitted"):
        listen(path, owner=(64055, -1))
    assert not path.exists()


async def test_connecting_waits_while_the_listeners_queue_is_full(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        with await connect(path):
            with pytest.raises(VhostfcError, match="in use is in the way: Resource temporarily unavailable"):
                listen(path)
            with no_leak(), trio.move_on_after(1) as scope:
                await connect(path)
            assert scope.cancelled_caught


async def test_a_full_table_of_descriptors_keeps_callers_waiting(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Whoever may connect can do so a thousand times; that must not end the daemon."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with listen(tmp_path / "door") as door, closing(await connect(tmp_path / "door")):
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with trio.move_on_after(1) as waiting:
                await door.accept()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert waiting.cancelled_caught
        (await door.accept()).close()


async def test_a_peers_name_may_be_anything(tmp_path: Path) -> None:
    """The kernel cuts a process's name at 15 bytes, in the middle of a letter if need be."""
    comm = Path("/proc/self/comm")
    before = comm.read_bytes()
    with listen(tmp_path / "door") as door, closing(await connect(tmp_path / "door")):
        comm.write_bytes(b"caf\xc3")
        try:
            with closing(await door.accept()) as sock:
                assert peer(sock) == f"process {os.getpid()} (caf\ufffd)"
        finally:
            comm.write_bytes(before.strip())


async def test_an_inherited_listening_socket(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with no_leak():
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(path))
        sock.listen()
        os.set_inheritable(sock.fileno(), True)
        door = adopt(sock.detach())
        assert isinstance(door, Listener)
        assert not os.get_inheritable(door.sock.fileno())
        with door, await connect(path), await door.accept():
            pass
    assert path.exists(), "who passed it on owns the file"


async def test_an_inherited_connection() -> None:
    with no_leak():
        one, other = socket.socketpair()
        connection = adopt(other.detach())
        assert not isinstance(connection, Listener)
        with connection, one:
            one.send(b"x")
            assert await connection.recv(1) == b"x"


def test_what_cannot_be_adopted_is_said() -> None:
    def refused(fd: int) -> str:
        with pytest.raises(VhostfcError) as caught:
            adopt(fd)
        return str(caught.value)

    with no_leak(), files(1) as (fd,), socket.socket(socket.AF_UNIX) as idle, socket.socket() as tcp:
        assert refused(fd) == f"file descriptor {fd} is not a socket"
        assert refused(tcp.fileno()) == f"file descriptor {tcp.fileno()} is not a unix stream socket"
        assert refused(idle.fileno()) == f"file descriptor {idle.fileno()} neither listens nor is connected"
        assert refused(987654) == "file descriptor 987654: Bad file descriptor"
