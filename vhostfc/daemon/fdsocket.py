"""Unix sockets that carry file descriptors: vhost-user's stream, the fabric link's packets, and their doors.

A stream has no borders, so descriptors can drift: they belong to the message whose first byte they
came with, and reading on past one message's end would give them to the next.  VhostSocket therefore
reads a header, with room for descriptors, and then exactly that message's payload.  LinkSocket is
SOCK_SEQPACKET, where the kernel keeps the borders.

Whoever is returned a descriptor owns it.  On every other way out (an error, a cancellation, too many
of them) those that came are closed here.  Received descriptors are close-on-exec.

Listening at a path: a socket file outlives its process, and only connecting tells a dead one (connection
refused) from a live one.  Looking, removing and binding happen under a lock on the directory, so that
of two that start at once one wins and neither removes the other's fresh socket.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import trio
from trio.socket import SocketType

from vhostfc.errors import LinkLost, VhostfcError
from vhostfc.fabric import link
from vhostfc.vhost import messages
from vhostfc.vhost.messages import Header, Packet, ProtocolError
from vhostfc.vhost.requests import Request, check_size

#: sun_path holds 108 bytes, the last of which is 0.
SUN_PATH = 107
BACKLOG = 128
#: How often a connection is tried again while the listener's queue, or our table of descriptors, is full; the
#: kernel tells nobody when it is not.
RETRY = 0.02
#: What accept(2) says while there is no room for one more; the connection waits until there is.
FULL = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def close_fds(fds: Sequence[int]) -> None:
    """Close each of these."""
    for fd in fds:
        os.close(fd)


async def _receive(sock: SocketType, size: int, max_fds: int) -> tuple[bytes, list[int], int]:
    """At most `size` bytes, the descriptors that came with them, and recvmsg's flags; the caller owns the fds.

    More than max_fds descriptors raise ProtocolError; a reset connection reads like its end.
    """
    try:
        data, ancillary, flags, _ = await sock.recvmsg(size, socket.CMSG_SPACE(4 * max_fds), socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return b"", [], 0
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
    if flags & socket.MSG_CTRUNC or len(fds) > max_fds:
        close_fds(fds)
        raise ProtocolError(f"a message with more than {max_fds} file descriptors (or this process can open no more)")
    return data, list(fds), flags


def _rights(fds: Sequence[int]) -> list[tuple[int, int, bytes]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []


class VhostSocket:
    """One connection to a front end: whole vhost-user messages in, bytes out."""

    def __init__(self, sock: SocketType) -> None:
        self._socket = sock

    async def receive(self) -> Packet | None:
        """The next message with its descriptors, which are the caller's now; None when the front end went away.

        Raises ProtocolError for what is not a message.  After an error or a cancellation in the middle of a
        message the stream has lost its place: close it.
        """
        fds: list[int] = []
        try:
            data = b""
            while len(data) < Header.SIZE:
                more, came, _ = await _receive(self._socket, Header.SIZE - len(data), messages.MAX_FDS)
                fds += came
                if not more:
                    if data:
                        raise ProtocolError(f"the connection ended after {len(data)} bytes of a header")
                    return None
                if len(fds) > messages.MAX_FDS:
                    raise ProtocolError(f"a message with more than {messages.MAX_FDS} file descriptors")
                data += more
            header = check_size(Header.unpack(data))
            return Packet(header, await self._payload(header), tuple(fds))
        except BaseException:
            close_fds(fds)
            raise

    async def _payload(self, header: Header) -> bytes:
        # plain recv: the kernel closes descriptors that come with a payload's bytes, where none belong
        payload = b""
        while len(payload) < header.size:
            try:
                more = await self._socket.recv(header.size - len(payload))
            except ConnectionResetError:
                more = b""
            if not more:
                known = header.request in Request.__members__.values()
                name = Request(header.request).name if known else f"request {header.request}"
                raise ProtocolError(
                    f"{name}: the connection ended after {len(payload)} of {header.size} bytes of payload"
                )
            payload += more
        return payload

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send a reply; its descriptors stay the caller's.

        Raises OSError (BrokenPipeError, ConnectionResetError) when the front end is gone: receive() says so too.
        """
        sent = await self._socket.sendmsg([data], _rights(fds))
        while sent < len(data):
            sent += await self._socket.send(data[sent:])

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


class LinkSocket:
    """One end of a fabric link (SOCK_SEQPACKET): a message and its descriptors per packet."""

    def __init__(self, sock: SocketType) -> None:
        self._socket = sock
        self._sending = trio.StrictFIFOLock()

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        """Two ends of one link."""
        one, other = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    async def receive(self) -> tuple[bytes, list[int]]:
        """The next message and its descriptors, which are the caller's now; (b"", []) when the peer went away.

        Raises LinkLost when the packet is larger or carries more descriptors than any message may: close the link.
        """
        try:
            data, fds, flags = await _receive(self._socket, link.MAX_MESSAGE, link.MAX_FDS)
        except ProtocolError as error:
            raise LinkLost(f"the peer sent {error}") from error
        if flags & socket.MSG_TRUNC or (fds and not data):
            close_fds(fds)
            raise LinkLost(f"the peer sent a message longer than {link.MAX_MESSAGE} bytes, or none at all")
        return data, fds

    async def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message whole; tasks that send at once take turns.  Its descriptors stay the caller's.

        Raises LinkLost when the peer is gone.
        """
        async with self._sending:
            try:
                await self._socket.sendmsg([message], _rights(fds))
            except (BrokenPipeError, ConnectionResetError, ConnectionRefusedError) as error:
                raise LinkLost("the peer closed the link") from error

    @property
    def peer(self) -> str:
        return peer(self._socket)

    @property
    def peer_pid(self) -> int:
        return peer_pid(self._socket)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------ doors


def peer_pid(sock: SocketType | socket.socket) -> int:
    """The process that connected, or that listens (SO_PEERCRED, unix(7)); 0 when it is outside our PID namespace."""
    pid: int = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def peer(sock: SocketType | socket.socket) -> str:
    """The other process, for people: "process 4711 (qemu-system-x86)"."""
    pid = peer_pid(sock)
    try:
        return f"process {pid} ({Path(f'/proc/{pid}/comm').read_text(errors='replace').strip()})"
    except OSError:
        return f"process {pid}"


@contextlib.contextmanager
def _address(path: Path) -> Iterator[tuple[str, int]]:
    """What to give bind() and connect() for a path of any length, and its directory (locked by nobody yet)."""
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise VhostfcError(f"{path}: its directory cannot be opened: {error.strerror}") from error
    try:
        name = str(path) if len(os.fsencode(path)) <= SUN_PATH else f"/proc/self/fd/{directory}/{path.name}"
        if len(os.fsencode(name)) > SUN_PATH:
            raise VhostfcError(f"{path}: the file's name is too long for a socket")
        yield name, directory
    finally:
        os.close(directory)


@dataclass(slots=True)
class Listener:
    """A listening socket.  close() removes its file, if it still is ours; an inherited one has no file of ours."""

    sock: SocketType
    path: Path | None = None
    _file: tuple[int, int] | None = field(default=None, repr=False)

    async def accept(self) -> SocketType:
        """The next connection."""
        while True:
            try:
                sock, _ = await self.sock.accept()
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in FULL:
                    raise
                await trio.sleep(RETRY)
                continue
            return sock

    def close(self) -> None:
        if self.path is not None and self._file is not None:
            with contextlib.suppress(OSError):
                now = self.path.lstat()
                if (now.st_dev, now.st_ino) == self._file:
                    self.path.unlink()
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def listen(
    path: Path,
    kind: int = socket.SOCK_STREAM,
    *,
    mode: int | None = None,
    owner: tuple[int, int] | None = None,
) -> Listener:
    """Listen at a path.  kind: SOCK_STREAM, SOCK_SEQPACKET, or SOCK_DGRAM, which is only bound;
    mode: permission bits instead of the umask's; owner: (uid, gid) instead of ours, -1 to keep one.

    A socket that a dead process left is replaced.  Raises VhostfcError naming the path: another process
    listens there (and which), something else than a socket is there, or the system refuses.
    """
    with _address(path) as (name, directory):
        fcntl.flock(directory, fcntl.LOCK_EX)
        _clear(path, name, kind)
        sock = socket.socket(socket.AF_UNIX, kind)
        bound = False
        try:
            if mode is not None:
                os.fchmod(sock.fileno(), mode)  # bind() gives it to the file, less the umask
            sock.bind(name)
            bound = True
            # nobody can connect before listen(), so the file is never open to more than was asked for
            if mode is not None and stat.S_IMODE(path.lstat().st_mode) != mode:
                path.chmod(mode)  # by its path: root should not need it in a directory of another user
            if owner is not None:
                os.chown(path, *owner)
            if kind != socket.SOCK_DGRAM:
                sock.listen(BACKLOG)
            file = path.lstat()
        except BaseException as error:
            sock.close()
            if bound:
                path.unlink()
            if isinstance(error, OSError):
                raise VhostfcError(f"{path}: cannot listen there: {error.strerror}") from error
            raise
        return Listener(trio.socket.from_stdlib_socket(sock), path, (file.st_dev, file.st_ino))


def _clear(path: Path, name: str, kind: int) -> None:
    """Make room at a path: nothing there, or a dead process's socket.  The directory is locked."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise VhostfcError(f"{path}: cannot listen there: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise VhostfcError(f"{path}: something that is not a socket is in the way")
    with socket.socket(socket.AF_UNIX, kind) as trial:
        trial.setblocking(False)
        result = trial.connect_ex(name)
        if result == 0:
            raise VhostfcError(f"{path}: {peer(trial)} listens there already")
    if result == errno.ECONNREFUSED:
        path.unlink(missing_ok=True)
    elif result != errno.ENOENT:
        # EAGAIN: alive with a full queue; EPROTOTYPE: alive with another type of socket; EACCES: another user's
        raise VhostfcError(f"{path}: a socket that is in use is in the way: {os.strerror(result)}")


async def connect(path: Path, kind: int = socket.SOCK_STREAM) -> SocketType:
    """Connect to a path of any length.  Raises VhostfcError naming it; the cause is the OSError."""
    with _address(path) as (name, _):
        sock = socket.socket(socket.AF_UNIX, kind)
        try:
            sock.setblocking(False)
            while (result := sock.connect_ex(name)) == errno.EAGAIN:
                await trio.sleep(RETRY)
            if result:
                raise OSError(result, os.strerror(result))
        except OSError as error:
            sock.close()
            raise VhostfcError(f"{path}: cannot connect: {error.strerror}") from error
        except BaseException:
            sock.close()
            raise
        return trio.socket.from_stdlib_socket(sock)


def adopt(fd: int) -> Listener | SocketType:
    """The inherited socket `fd`: a Listener when it listens, else the connection (SO_ACCEPTCONN, socket(7)).

    Raises VhostfcError when it is not a unix stream socket of either sort; the descriptor then stays open.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise VhostfcError(f"file descriptor {fd} is not a socket")
    except OSError as error:
        raise VhostfcError(f"file descriptor {fd}: {error.strerror}") from error
    sock = socket.socket(fileno=fd)
    try:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise VhostfcError(f"file descriptor {fd} is not a unix stream socket")
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if not listening:
            try:
                sock.getpeername()
            except OSError as error:
                raise VhostfcError(f"file descriptor {fd} neither listens nor is connected") from error
    except VhostfcError:
        sock.detach()
        raise
    sock.set_inheritable(False)
    adopted = trio.socket.from_stdlib_socket(sock)
    return Listener(adopted) if listening else adopted
