"""FCoE attachments of the fabric: Ethernet frames in and out, for the Forwarder that makes F_Ports of them.

Two kinds of segment carry them:

- a unix datagram socket, one datagram an Ethernet frame, as QEMU's `-netdev dgram` sends them: no root is needed, and
  a frame that the guest has no room for waits here.  Each sender's own socket is its station, so no guest can speak
  for another;
- a network interface, with AF_PACKET: whoever is on that network.  It has a large receive buffer, since frames that
  overflow are lost, and a write that lost one costs its initiator a command timeout.

What goes out waits in a lane for each station, so that one that does not read holds up nobody else.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog
import trio
from trio.socket import SocketType

from vhostfc.config import FcoeConfig
from vhostfc.daemon.fabric_door import Door
from vhostfc.daemon.fdsocket import connect, listen
from vhostfc.errors import VhostfcError
from vhostfc.fabric.fcf import Action, Deliver, Detach, Forwarder, LogOut, Send
from vhostfc.fabric.link import Note
from vhostfc.fabric.switch import NPort, Switch
from vhostfc.fc import fcoe
from vhostfc.fc.wwn import Wwn

#: Frames that wait for a station before commands that have more are made to wait too, and the most that wait at all.
LANE, LANE_MAX = 256, 16384
#: Stations of a segment; frames of more are discarded.
MAX_STATIONS = 1024
#: Bytes that the kernel keeps for us of an interface's frames.
RECEIVE_BUFFER = 32 << 20
#: How long to wait before an interface is looked for again that is gone or down, in seconds.
RETRY = 1.0
#: packet(7): frames that this host sent itself, and two kinds of membership.
_PACKET_OUTGOING, _MR_MULTICAST, _MR_UNICAST = 4, 0, 3
_PACKET_ADD_MEMBERSHIP, _SOL_PACKET, _SO_RCVBUFFORCE = 1, 263, 33


class Gone(Exception):
    """Nobody is at that station any more, or the interface is down."""


#: What a segment does with a frame that comes: the station that it comes from, and the frame.
Receive = Callable[[Hashable, bytes], None]


class Segment(Protocol):
    """How Ethernet frames come and go.  mac: the FCF's address there."""

    mac: bytes

    async def run(self, receive: Receive) -> None:
        """Hand over what comes, until cancelled.  Raises Gone when the segment is, for a while."""
        ...

    async def send(self, station: Hashable, data: bytes) -> None:
        """Raises Gone when nobody is there."""
        ...

    def stations(self, known: Iterable[Hashable]) -> Iterable[Hashable]:
        """Where to send what is for everybody, given who was heard of."""
        ...

    def close(self) -> None: ...


class DatagramSegment:
    """Peers on a unix datagram socket.  A station is the path that a peer is bound to."""

    def __init__(self, path: Path, mac: bytes) -> None:
        """Raises VhostfcError naming the path."""
        self.mac = mac
        self._listener = listen(path, socket.SOCK_DGRAM)
        self._peers: dict[str, SocketType] = {}

    async def run(self, receive: Receive) -> None:
        while True:
            data, station = await self._listener.sock.recvfrom(fcoe.MAX_ETHERNET + 4)
            # who is bound to nothing could not be answered
            if isinstance(station, str) and station and station[0] != "\0":
                receive(station, data)

    async def send(self, station: Hashable, data: bytes) -> None:
        # Connected, each peer to a socket of its own: only so does the kernel tell when it has room again.
        assert isinstance(station, str)
        known = self._peers.get(station)
        if known is not None:
            try:
                await known.send(data)
                return
            except OSError as error:
                self._forget(station)
                if error.errno != errno.ECONNREFUSED:
                    raise Gone(error.strerror) from error
        try:  # a QEMU that was started anew is at the same path
            peer = self._peers[station] = await connect(Path(station), socket.SOCK_DGRAM)
            await peer.send(data)
        except (VhostfcError, OSError) as error:
            self._forget(station)
            raise Gone(str(error)) from error

    def _forget(self, station: str) -> None:
        peer = self._peers.pop(station, None)
        if peer is not None:
            peer.close()

    def stations(self, known: Iterable[Hashable]) -> Iterable[Hashable]:
        return known

    def close(self) -> None:
        for station in list(self._peers):
            self._forget(station)
        self._listener.close()


class InterfaceSegment:
    """A network interface: one station, the wire."""

    def __init__(self, interface: str, mac: bytes | None, *, sysfs: Path = Path("/sys")) -> None:
        """mac: None for the interface's own.  Raises VhostfcError naming the interface."""
        try:
            own = fcoe.parse_mac((sysfs / "class/net" / interface / "address").read_text())
        except OSError as error:
            raise VhostfcError(f"{interface}: no such network interface ({error.strerror})") from error
        except ValueError as error:
            raise VhostfcError(f"{interface}: is not an Ethernet interface: {error}") from error
        self.mac = mac or own
        self._sockets: list[SocketType] = []
        try:
            for ethertype in (fcoe.ETHERTYPE_FCOE, fcoe.ETHERTYPE_FIP):
                self._sockets.append(_packets(interface, ethertype, None if self.mac == own else self.mac))
        except OSError as error:
            self.close()
            raise VhostfcError(f"{interface}: cannot send and receive frames there: {error.strerror}") from error

    async def run(self, receive: Receive) -> None:
        async with trio.open_nursery() as nursery:
            for sock in self._sockets:
                nursery.start_soon(self._read, sock, receive)

    async def _read(self, sock: SocketType, receive: Receive) -> None:
        while True:
            try:
                data, address = await sock.recvfrom(fcoe.MAX_ETHERNET + 4)
            except OSError as error:
                raise Gone(error.strerror) from error
            if address[2] != _PACKET_OUTGOING:
                receive(None, data)

    async def send(self, station: Hashable, data: bytes) -> None:
        while True:
            try:
                await self._sockets[0].send(data)
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # the queue of the device is full: it says no when, only that
                    raise Gone(error.strerror) from error
            await trio.sleep(0.001)

    def stations(self, known: Iterable[Hashable]) -> Iterable[Hashable]:
        return (None,)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


def _packets(interface: str, ethertype: int, mac: bytes | None) -> SocketType:
    """A packet socket for this ethertype; mac: an address to take frames for that is not the interface's own."""
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER)
        except PermissionError:  # without CAP_NET_ADMIN: as much as net.core.rmem_max allows
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        index = socket.if_nametoindex(interface)
        for kind, address in [(_MR_MULTICAST, fcoe.ALL_FCF_MACS), *([(_MR_UNICAST, mac)] if mac else [])]:
            membership = struct.pack("iHH8s", index, kind, len(address), address)
            sock.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, membership)
        sock.bind((interface, ethertype))
        undo.pop_all()
    return trio.socket.from_stdlib_socket(sock)


class Fabric(Protocol):
    """The fabric, as an attachment knows it."""

    door: Door
    switch: Switch

    def frame(self, f_port: int, data: bytes) -> None: ...

    def log_out(self, port_id: int) -> None: ...


class VirtualLink:
    """An F_Port's way out: one ENode of an attachment."""

    kind = "fcoe"
    pid = None

    def __init__(self, segment: FcoeAttachment, name: str) -> None:
        self.name = name
        self.f_port = 0
        self._segment = segment

    def post_frame(self, what: bytes | Note) -> None:
        self._segment.post(self.f_port, what)

    async def send_frame(self, what: bytes | Note) -> None:
        await self._segment.send(self.f_port, what)

    def link_down(self) -> None:
        """The cable is the segment's: all that is on it sees that."""
        self._segment.set_link(False)

    def link_up(self) -> None:
        self._segment.set_link(True)

    def clear_virtual_link(self, ports: Sequence[NPort]) -> bool:
        """With all of its N_Ports the F_Port goes too: the ENode begins anew."""
        everything = len(ports) == len(self._segment.behind(self.f_port))
        self._segment.clear(self.f_port, () if everything else [port.port_id for port in ports])
        return True


class _Lane:
    """What waits for one station."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.news = trio.Event()
        self.room = trio.Event()
        self.scope = trio.CancelScope()

    def post(self, data: bytes) -> None:
        if len(self.frames) < LANE_MAX:  # beyond that discarded, as class 3 may
            self.frames.append(data)
            self.news.set()

    def end(self) -> None:
        self.scope.cancel()
        self.room.set()

    async def run(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        with self.scope:
            while True:
                while self.frames:
                    await send(self.frames.popleft())
                    if len(self.frames) < LANE:
                        self.room.set()
                        self.room = trio.Event()
                self.news = trio.Event()
                await self.news.wait()


class FcoeAttachment:
    """One `[[fcoe]]` of the fabric's file, from its beginning to its end: run() it."""

    def __init__(
        self, config: FcoeConfig, name: Wwn, fabric: Fabric, *, log: structlog.typing.FilteringBoundLogger
    ) -> None:
        """Raises VhostfcError when its socket or interface cannot be had."""
        self.config = config
        self._fabric = fabric
        self._log = log.bind(fcoe=config.where)
        self._segment = self._open()
        self._links: dict[int, VirtualLink] = {}
        self._lanes: dict[Hashable, _Lane] = {}
        self.forwarder = Forwarder(
            config.where,
            self._attach,
            name=name,
            fabric=name,
            mac=self._segment.mac,
            fc_map=config.fc_map,
            priority=config.priority,
            period=config.period,
        )

    def __repr__(self) -> str:
        return f"<Attachment {self.forwarder!r}>"

    def _open(self) -> Segment:
        if self.config.socket is not None:
            assert self.config.mac is not None
            return DatagramSegment(self.config.socket, self.config.mac)
        return InterfaceSegment(self.config.interface or "", self.config.mac)

    def close(self) -> None:
        """For one that was never run; run() closes by itself."""
        self._segment.close()

    # ------------------------------------------------------------ its life

    async def run(self) -> None:
        """Until cancelled.  An interface that goes is looked for until it comes back; its links are down meanwhile."""
        self._log.info("an FCoE attachment is up", mac=self._segment.mac.hex(":"))
        try:
            while True:
                try:
                    async with trio.open_nursery() as nursery:
                        self._nursery = nursery
                        nursery.start_soon(self._advertise)
                        await self._segment.run(self._receive)
                except* Gone as gone:
                    self._log.warning("an FCoE attachment is down", reason=str(gone.exceptions[0]))
                self._end_all()
                self._segment.close()
                await self._reopen()
                self._log.info("an FCoE attachment is up again")
        finally:
            self._end_all()
            self._segment.close()

    async def _reopen(self) -> None:
        while True:
            await trio.sleep(RETRY)
            with contextlib.suppress(VhostfcError):
                self._segment = self._open()
                return

    def _end_all(self) -> None:
        for station in list(self._lanes):
            self._gone(station)
        for f_port in list(self._links):
            self._detach(f_port)

    async def _advertise(self) -> None:
        while True:
            now = trio.current_time()
            self._do(self.forwarder.tick(now))
            await trio.sleep(min(self.forwarder.deadline() - now, self.config.period))

    # ------------------------------------------------------------ in and out

    def _receive(self, station: Hashable, data: bytes) -> None:
        if station not in self._lanes:
            if len(self._lanes) >= MAX_STATIONS:
                return
            lane = self._lanes[station] = _Lane()
            self._nursery.start_soon(self._serve_lane, station, lane)
        self._do(self.forwarder.receive(station, data, trio.current_time()))

    async def _serve_lane(self, station: Hashable, lane: _Lane) -> None:
        try:
            await lane.run(partial(self._segment.send, station))
        except Gone as error:
            if self._lanes.get(station) is lane:
                self._log.info("a station is gone", station=station, reason=str(error))
                self._gone(station)

    def _gone(self, station: Hashable) -> None:
        lane = self._lanes.pop(station, None)
        if lane is not None:
            lane.end()
        self._do(self.forwarder.gone(station))

    def post(self, f_port: int, what: bytes | Note) -> None:
        """What the switch sends to one of our F_Ports."""
        if isinstance(what, Note):
            self._log.warning("a login is refused", reason=what.text)
            return
        send = self.forwarder.output(f_port, what, trio.current_time())
        if send is not None:
            self._do([send])

    async def send(self, f_port: int, what: bytes | Note) -> None:
        """The same, when there is room on the way."""
        await trio.lowlevel.checkpoint()
        station = self.forwarder.station(f_port)
        while (lane := self._lanes.get(station)) is not None and len(lane.frames) >= LANE:
            await lane.room.wait()
        self.post(f_port, what)

    def _do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Send(station, data):
                    for one in self._segment.stations(list(self._lanes)) if station is None else (station,):
                        if one in self._lanes:
                            self._lanes[one].post(data)
                case Deliver(f_port, frame):
                    self._fabric.frame(f_port, frame)
                case LogOut(port_id, reason):
                    self._log.info("a virtual link is down", port_id=f"{port_id:06x}", reason=reason)
                    self._fabric.log_out(port_id)
                case Detach(f_port, reason):
                    self._log.info("an ENode is gone", f_port=f_port, reason=reason)
                    self._detach(f_port)

    # ------------------------------------------------------------ F_Ports

    def _attach(self, holder: str) -> int:
        link = VirtualLink(self, holder)
        link.f_port = self._fabric.door.plug(link)
        self._links[link.f_port] = link
        return link.f_port

    def _detach(self, f_port: int) -> None:
        if self._links.pop(f_port, None) is not None:
            self._fabric.door.unplug(f_port)

    # ------------------------------------------------------------ what an administrator does to it

    def clear(self, f_port: int, port_ids: Iterable[int] = ()) -> None:
        """Clear Virtual Links: of these N_Ports, or the F_Port with all that is behind it."""
        self._do(self.forwarder.clear(f_port, port_ids))

    def behind(self, f_port: int) -> list[NPort]:
        """The N_Ports behind one of our F_Ports."""
        return self._fabric.switch.behind(f_port)

    def set_link(self, up: bool) -> None:
        """As if the cable were pulled, or plugged in again."""
        self._do(self.forwarder.set_link(up))
        self._do(self.forwarder.tick(trio.current_time()))
