"""A fabric on a socket: the link protocol around tests/fc/tiny.py, with faults to order.

It gives out a memfd for each unit, remembers what was acknowledged, and checks nothing: the tests do.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import trio
from trio.socket import SocketType

from tests.fc.tiny import BLOCK, TinyFabric, TinyTarget
from vhostfc.fabric import link
from vhostfc.fc import els
from vhostfc.fc.els import Els
from vhostfc.fc.frame import Address, Frame, RCtl, els_reply
from vhostfc.fc.login import Login
from vhostfc.fc.wwn import Wwn
from vhostfc.native import LATCH_BYTES

#: READ(10) and WRITE(10).
MASK = (1 << 0x28 | 1 << 0x2A).to_bytes(32, "little")
#: Of the memfd that is medium and latch in one, as nobody here does I/O.
MEDIUM_BYTES = max(4 << 20, LATCH_BYTES)


@dataclass(eq=False)
class Connection:
    """One adapter.  routes: the last of each nexus; acks: seqs, in order."""

    stream: SocketType
    name: str = ""
    routes: dict[int, link.Route] = field(default_factory=dict)
    acks: list[int] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)
    other: list[link.Message] = field(default_factory=list)
    wwpns: set[Wwn] = field(default_factory=set)

    async def send(self, message: link.Message, fds: tuple[int, ...] = ()) -> None:
        sock = self.stream
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(fd.to_bytes(4, "little") for fd in fds))]
        await sock.sendmsg([link.encode(message)], rights if fds else [])


class FakeFabric:
    """connections: open links, oldest first; all: every one that ever was."""

    def __init__(self, path: Path, *targets: TinyTarget) -> None:
        self.path = path
        self.san = TinyFabric(list(targets))
        self.targets = list(targets)
        self.connections: list[Connection] = []
        self.all: list[Connection] = []
        self.mask = MASK
        self.refuse_open = False
        self.hold_open = False
        self.held_opens: list[tuple[Connection, link.Open]] = []
        self.hello: link.Message | None = link.Hello("fake")
        self.note = ""
        self._nexus = 0
        self._seq = 1 << 31
        self._changed = trio.Event()
        self._memfd = os.memfd_create("medium")
        os.ftruncate(self._memfd, MEDIUM_BYTES)

    def close(self) -> None:
        os.close(self._memfd)

    # ---------------------------------------------------------------- for tests

    async def until(self, *truths: object) -> None:
        """Wait until these callables are all true; each is looked at whenever anything arrived."""
        while not all(truth() for truth in truths):  # type: ignore[operator]
            await self._changed.wait()

    @property
    def last(self) -> Connection:
        return self.connections[-1]

    def cut(self) -> None:
        """Break every link; new ones are welcome."""
        for connection in list(self.connections):
            connection.stream.shutdown(socket.SHUT_RDWR)

    async def push(self, *frames: Frame) -> None:
        """Frames of the fabric's own."""
        for frame in frames:
            for connection in self.connections:
                if self.san.ports.get(frame.d_id) in connection.wwpns:
                    await connection.send(link.Frame(frame.pack()))

    async def rscn(self, *about: int) -> None:
        for port_id in self.san.registered & self.san.ports.keys():
            await self.push(self.san.rscn(port_id, *about))

    async def route(self, connection: Connection, nexus: int, **changes: object) -> link.Route:
        """Send another route for this nexus."""
        self._seq += 1
        last = connection.routes[nexus]
        route = replace(last, seq=self._seq, epoch=last.epoch + 1, **changes)  # type: ignore[arg-type]
        await self._send_route(connection, route)
        return route

    async def answer_opens(self) -> None:
        """Answer what was held."""
        for connection, wanted in self.held_opens:
            await self._open(connection, wanted)

    async def end_nexuses(self, connection: Connection, in_flight: link.InFlight = link.InFlight.FINISH) -> None:
        """A logout: every route of the adapter is gone."""
        for nexus in list(connection.routes):
            gone = {"gone": True, "medium": link.MediumKind.NONE, "mask": bytes(32), "in_flight": in_flight}
            await self.route(connection, nexus, **gone)
            del connection.routes[nexus]

    # ---------------------------------------------------------------- the fabric

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled; a socket file of an earlier life is removed."""
        self.path.unlink(missing_ok=True)
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with sock:
            await sock.bind(str(self.path))
            sock.listen()
            task_status.started()
            async with trio.open_nursery() as nursery:
                while True:
                    peer, _ = await sock.accept()
                    nursery.start_soon(partial(self._welcome, peer))

    async def _welcome(self, stream: SocketType) -> None:
        connection = Connection(stream)
        self.connections.append(connection)
        self.all.append(connection)
        try:
            while data := await stream.recv(link.MAX_MESSAGE):
                await self._take(connection, link.decode(data))
                self._news()
        except OSError:
            pass
        finally:
            stream.close()
            self.connections.remove(connection)
            for port_id in [port_id for port_id, wwpn in self.san.ports.items() if wwpn in connection.wwpns]:
                del self.san.ports[port_id]
                for target in self.targets:
                    target.logins.discard(port_id)
            self._news()

    def _news(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _take(self, connection: Connection, message: link.Message) -> None:
        match message:
            case link.Hello(name):
                connection.name = name
                if self.hello is not None:
                    await connection.send(self.hello)
            case link.Frame(data):
                await self._frame(connection, data)
            case link.Open() if self.hold_open:
                self.held_opens.append((connection, message))
            case link.Open():
                await self._open(connection, message)
            case link.RouteAck(seq):
                connection.acks.append(seq)
            case link.Close(nexus):
                connection.closed.append(nexus)
            case _:
                connection.other.append(message)

    async def _frame(self, connection: Connection, data: bytes) -> None:
        frame = Frame.unpack(data)
        if frame.d_id == Address.F_PORT and frame.payload[0] in (Els.FLOGI, Els.FDISC):
            wwpn = Login.unpack(frame.payload).wwpn
            if wwpn in self.san.ports.values():
                reason = els.LsRjt(els.Reason.LOGICAL_ERROR, els.Explanation.INVALID_PORT_NAME)
                await connection.send(link.Note(f"{wwpn} is already logged in, by 'somebody'"))
                await connection.send(link.Frame(els_reply(frame, reason.pack()).pack()))
                return
            connection.wwpns.add(wwpn)
        if self.note and frame.d_id == Address.F_PORT:
            await connection.send(link.Note(self.note))
        for reply in self.san.receive(data):
            await connection.send(link.Frame(reply.pack()))
        if frame.r_ctl == RCtl.ELS_REQUEST and frame.payload[0] == Els.LOGO and frame.d_id < 0xFFFFF0:
            await self.end_nexuses(connection)

    async def _open(self, connection: Connection, wanted: link.Open) -> None:
        target = next((t for t in self.targets if t.port_id == wanted.d_id), None)
        unit = target.units.get(wanted.lun) if target else None
        if target is None or unit is None or wanted.s_id not in target.logins or self.refuse_open:
            await connection.send(link.Route(wanted.seq, 0, 0, gone=True))
            return
        self._nexus += 1
        route = link.Route(
            wanted.seq,
            self._nexus,
            1,
            mask=self.mask,
            medium=link.MediumKind.MEMORY,
            owner=self._nexus + 1,
            block_size=BLOCK,
            blocks=len(unit) // BLOCK,
        )
        await self._send_route(connection, route)

    async def _send_route(self, connection: Connection, route: link.Route) -> None:
        connection.routes[route.nexus] = route
        fds = (self._memfd, self._memfd) if link.fd_count(route) else ()
        await connection.send(route, fds)
        self._news()
