"""A vhost-user-scsi back end for the front end's tests: small, slow, by the standard, and obedient.

It is the far side of every test here and owes nothing to the daemon or the engine.  `answer` may be
replaced to make it misbehave on a command; `silent` names requests that it never answers.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from vhostfc.vhost import messages as m
from vhostfc.vhost.features import Feature, ProtocolFeature, mask
from vhostfc.vhost.requests import Request, decode_request, encode_reply, has_own_reply
from vhostfc.virtio.scsi import CommandRequest, CommandResponse, Event, Response, decode_control, decode_lun

FEATURES = mask(
    Feature.SCSI_HOTPLUG,
    Feature.SCSI_CHANGE,
    Feature.INDIRECT_DESC,
    Feature.EVENT_IDX,
    Feature.PROTOCOL_FEATURES,
    Feature.VERSION_1,
)
PROTOCOL = mask(
    ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.RESET_DEVICE, ProtocolFeature.CONFIGURE_MEM_SLOTS
)

NAA = bytes.fromhex("6001438012345678") + bytes(7)


@dataclass
class Disk:
    """A unit of memory.  attention: how many commands it answers with 6/29/00 first."""

    blocks: int = 256
    block_size: int = 512
    serial: bytes = b"S0001"
    naa: bytes = NAA + b"\1"
    attention: int = 0
    data: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.data = bytearray(self.blocks * self.block_size)


@dataclass
class Outcome:
    response: CommandResponse
    data_in: bytes = b""


def good(data_in: bytes = b"", *, room: int = 0) -> Outcome:
    cut = data_in[:room]
    return Outcome(CommandResponse(residual=room - len(cut)), cut)


def check(key: int, asc: int, ascq: int) -> Outcome:
    sense = bytes([0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, asc, ascq, 0, 0, 0, 0])
    return Outcome(CommandResponse(status=2, sense=sense))


@dataclass
class Ring:
    size: int = 0
    desc: int = 0
    avail: int = 0
    used: int = 0
    next: int = 0
    kick: int = -1
    call: int = -1
    err: int = -1
    started: bool = False
    enabled: bool = False
    scope: trio.CancelScope | None = None


Answer = Callable[[CommandRequest, bytes, int], Outcome | None]


class FakeBackend:
    """commands, requests: all that came, in order.  held: heads that `answer` returned None for, by ring."""

    def __init__(
        self,
        disks: dict[tuple[int, int], Disk] | None = None,
        *,
        features: int = FEATURES,
        protocol: int = PROTOCOL,
        queue_num: int = 4,
        slots: int = 509,
    ) -> None:
        self.disks = {(0, 0): Disk()} if disks is None else disks
        self.offered, self.protocol_offered = features, protocol
        self.queue_num, self.slots = queue_num, slots
        self.answer: Answer = self.execute
        self.silent: set[Request] = set()
        self.fail: set[Request] = set()
        self.requests: list[Request] = []
        self.commands: list[CommandRequest] = []
        self.controls: list[bytes] = []
        self.held: list[tuple[int, int]] = []
        self.event_heads: list[int] = []
        self.features = self.protocol = 0
        self.rings: dict[int, Ring] = {}
        self.regions: list[tuple[m.Region, mmap.mmap]] = []
        self.connections = 0
        self._nursery: trio.Nursery
        self._socket: trio.socket.SocketType | None = None

    # ------------------------------------------------------------------ the socket

    @contextlib.asynccontextmanager
    async def listen(self, path: Path) -> AsyncIterator[FakeBackend]:
        listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        await listener.bind(str(path))
        listener.listen(1)
        with listener:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._accept, listener)
                yield self
                self._nursery.cancel_scope.cancel()
        self.forget()

    async def _accept(self, listener: trio.socket.SocketType) -> None:
        while True:
            sock, _ = await listener.accept()
            self.connections += 1
            with sock:
                self._socket = sock
                await self._talk(sock)
            self.forget()

    def hang_up(self) -> None:
        assert self._socket is not None
        self._socket.shutdown(socket.SHUT_RDWR)

    def forget(self) -> None:
        for ring in self.rings.values():
            if ring.scope is not None:
                ring.scope.cancel()
            for fd in (ring.kick, ring.call, ring.err):
                if fd >= 0:
                    os.close(fd)
        self.rings = {}
        self.regions = []
        self.event_heads = []
        self.features = self.protocol = 0

    async def _talk(self, sock: trio.socket.SocketType) -> None:
        while True:
            data, ancillary, _, _ = await sock.recvmsg(12, socket.CMSG_SPACE(32))
            if not data:
                return
            fds = [fd for _, _, content in ancillary for (fd,) in struct.iter_unpack("i", content)]
            header = m.Header.unpack(data)
            payload = await sock.recv(header.size) if header.size else b""
            message = decode_request(m.Packet(header, payload, tuple(fds)))
            request = Request(message.request)
            self.requests.append(request)
            reply = self._handle(request, message.payload, fds)
            if request in self.silent:
                continue
            acks = self.protocol >> ProtocolFeature.REPLY_ACK & 1
            if reply is None and message.need_reply and acks and not has_own_reply(request):
                reply = m.U64(int(request in self.fail))
            if reply is not None:
                await sock.send(encode_reply(request, reply))

    def _handle(self, request: Request, payload: m.Payload, fds: list[int]) -> m.Payload | None:
        match request, payload:
            case Request.GET_FEATURES, _:
                return m.U64(self.offered)
            case Request.GET_PROTOCOL_FEATURES, _:
                return m.U64(self.protocol_offered)
            case Request.GET_QUEUE_NUM, _:
                return m.U64(self.queue_num)
            case Request.GET_MAX_MEM_SLOTS, _:
                return m.U64(self.slots)
            case Request.SET_FEATURES, m.U64(value):
                self.features = value
            case Request.SET_PROTOCOL_FEATURES, m.U64(value):
                self.protocol = value
            case Request.SET_MEM_TABLE, m.MemoryTable(regions):
                self.regions = [self._map(region, fd) for region, fd in zip(regions, fds, strict=True)]
            case Request.ADD_MEM_REG, m.SingleRegion() as single:
                self.regions.append(self._map(single.region, fds[0]))
            case Request.REM_MEM_REG, m.SingleRegion() as single:
                self.regions = [entry for entry in self.regions if entry[0].guest_phys != single.guest_phys]
            case Request.GET_VRING_BASE, m.VringState(index):
                return m.VringState(index, self._stop(index))
            case _, m.VringState() | m.VringAddr() | m.VringFd():
                self._ring_message(request, payload, fds)
            case _:
                pass
        return None

    def _map(self, region: m.Region, fd: int) -> tuple[m.Region, mmap.mmap]:
        mapping = mmap.mmap(fd, region.mmap_offset + region.size)
        os.close(fd)
        return region, mapping

    def _ring_message(self, request: Request, payload: m.VringState | m.VringAddr | m.VringFd, fds: list[int]) -> None:
        ring = self.rings.setdefault(payload.index, Ring())
        match request, payload:
            case Request.SET_VRING_NUM, m.VringState(_, num):
                ring.size = num
            case Request.SET_VRING_BASE, m.VringState(_, num):
                ring.next = num
            case Request.SET_VRING_ADDR, m.VringAddr() as addr:
                ring.desc, ring.used, ring.avail = addr.desc, addr.used, addr.avail
            case Request.SET_VRING_ENABLE, m.VringState(_, num):
                ring.enabled = bool(num)
                self._run(payload.index)
            case Request.SET_VRING_KICK, _:
                ring.kick, ring.started = fds[0], True
                ring.enabled |= not self.features >> Feature.PROTOCOL_FEATURES & 1
                ring.scope = trio.CancelScope()
                self._nursery.start_soon(self._serve, payload.index, ring)
            case Request.SET_VRING_CALL, _:
                if ring.call >= 0:
                    os.close(ring.call)
                ring.call = fds[0]
                os.eventfd_write(ring.call, 1)
            case Request.SET_VRING_ERR, _:
                if ring.err >= 0:
                    os.close(ring.err)
                ring.err = fds[0]

    def _stop(self, index: int) -> int:
        ring = self.rings[index]
        if ring.scope is not None:
            ring.scope.cancel()
        if ring.kick >= 0:
            os.close(ring.kick)
        ring.kick, ring.started, ring.scope = -1, False, None
        if index == 1:
            ring.next = (ring.next - len(self.event_heads)) & 0xFFFF
            self.event_heads = []
        return ring.next

    # ------------------------------------------------------------------ guest memory and rings

    def bytes_at(self, address: int, length: int, *, user: bool = False) -> memoryview:
        for region, mapping in self.regions:
            start = region.user_addr if user else region.guest_phys
            if start <= address and address + length <= start + region.size:
                at = region.mmap_offset + address - start
                return memoryview(mapping)[at : at + length]
        raise AssertionError(f"{address:#x}+{length} is outside guest memory")

    def _word(self, address: int) -> memoryview:
        return self.bytes_at(address, 2, user=True).cast("H")

    async def _serve(self, index: int, ring: Ring) -> None:
        assert ring.scope is not None
        with ring.scope:
            while True:
                await trio.lowlevel.wait_readable(ring.kick)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(ring.kick)
                self._run(index)

    def _run(self, index: int) -> None:
        ring = self.rings[index]
        if not ring.started or not ring.enabled:
            return
        while True:
            while ring.next != self._word(ring.avail + 2)[0]:
                head = self._word(ring.avail + 4 + 2 * (ring.next % ring.size))[0]
                ring.next = (ring.next + 1) & 0xFFFF
                self._process(index, ring, head)
            self._word(ring.used + 4 + 8 * ring.size)[0] = ring.next  # avail_event
            if ring.next == self._word(ring.avail + 2)[0]:
                return

    def chain(self, ring: Ring, head: int) -> tuple[bytes, list[memoryview]]:
        """What is readable, gathered, and what is writable, in pieces."""
        readable, writable = b"", []
        table, user = self.bytes_at(ring.desc, 16 * ring.size, user=True), head
        while True:
            address, length, flags, following = struct.unpack_from("<QIHH", table, 16 * user)
            if flags & 4:
                table, user = self.bytes_at(address, length), 0
                continue
            if flags & 2:
                writable.append(self.bytes_at(address, length))
            else:
                assert not writable, "readable after writable"
                readable += bytes(self.bytes_at(address, length))
            if not flags & 1:
                return readable, writable
            user = following

    def use(self, index: int, head: int, pieces: list[memoryview], data: bytes) -> None:
        """Write `data` into the pieces, use the chain, and interrupt if the driver wants it."""
        ring, left = self.rings[index], data
        for piece in pieces:
            part, left = left[: len(piece)], left[len(piece) :]
            piece[: len(part)] = part
        idx = self._word(ring.used + 2)
        old = idx[0]
        entry = self.bytes_at(ring.used + 4 + 8 * (old % ring.size), 8, user=True)
        struct.pack_into("<II", entry, 0, head, len(data))
        idx[0] = new = (old + 1) & 0xFFFF
        if self.features >> Feature.EVENT_IDX & 1:
            wanted = self._word(ring.avail + 4 + 2 * ring.size)[0] == old
        else:
            wanted = not self._word(ring.avail)[0] & 1
        if wanted and new is not None and ring.call >= 0:
            os.eventfd_write(ring.call, 1)

    def _process(self, index: int, ring: Ring, head: int) -> None:
        if index == 1:
            self.event_heads.append(head)
            return
        readable, writable = self.chain(ring, head)
        if index == 0:
            self.use(0, head, writable, self.control(readable))
            return
        request = CommandRequest.unpack(readable)
        assert request is not None
        self.commands.append(request)
        room = sum(len(piece) for piece in writable) - CommandResponse.SIZE
        outcome = self.answer(request, readable[CommandRequest.SIZE :], room)
        if outcome is None:
            self.held.append((index, head))
        else:
            self.use(index, head, writable, outcome.response.pack() + outcome.data_in)

    def release(self, index: int, head: int, outcome: Outcome) -> None:
        """Answer a held command."""
        _, writable = self.chain(self.rings[index], head)
        self.use(index, head, writable, outcome.response.pack() + outcome.data_in)

    def send_event(self, event: Event) -> None:
        head = self.event_heads.pop(0)
        _, writable = self.chain(self.rings[1], head)
        self.use(1, head, writable, event.pack())

    # ------------------------------------------------------------------ the device

    def control(self, data: bytes) -> bytes:
        self.controls.append(data)
        if decode_control(data) is None:
            return bytes([Response.FAILURE])
        return bytes([0]) if data[0] == 0 else bytes(5)

    def execute(self, request: CommandRequest, data_out: bytes, room: int) -> Outcome | None:
        where = decode_lun(request.lun)
        luns = [lun for target, lun in self.disks if where is not None and target == where.target]
        if where is None or not luns:
            return Outcome(CommandResponse(Response.BAD_TARGET))
        disk = self.disks.get((where.target, where.lun)) if where.lun is not None else None
        cdb = request.cdb
        if cdb[0] == 0xA0:
            entries = b"".join(bytes([0x40 | lun >> 8 if lun > 255 else 0, lun & 0xFF, *bytes(6)]) for lun in luns)
            return good(struct.pack(">I4x", len(entries)) + entries, room=room)
        if cdb[0] == 0x12:
            return good(self._inquiry(disk, cdb), room=room)
        if disk is None:
            return check(5, 0x25, 0)
        if disk.attention:
            disk.attention -= 1
            return check(6, 0x29, 0)
        if cdb[0] == 0x9E:
            return good(struct.pack(">QI20x", disk.blocks - 1, disk.block_size), room=room)
        if cdb[0] in (0x28, 0x2A, 0x88, 0x8A):
            return self._transfer(disk, cdb, data_out, room)
        return good(room=room) if cdb[0] == 0 else check(5, 0x20, 0)

    @staticmethod
    def _inquiry(disk: Disk | None, cdb: bytes) -> bytes:
        if disk is None:
            return bytes([0x7F, 0, 6, 2, 31]) + bytes(31)
        if not cdb[1] & 1:
            return bytes([0, 0, 6, 2, 31, 0, 0, 2]) + b"VHOSTFC " + b"FAKE DISK       " + b"0001"
        pages = {
            0x00: bytes([0x00, 0x80, 0x83]),
            0x80: disk.serial,
            0x83: bytes([2, 1, 0, 4]) + b"none" + bytes([1, 3, 0, len(disk.naa)]) + disk.naa,
        }
        return struct.pack(">BBH", 0, cdb[2], len(pages[cdb[2]])) + pages[cdb[2]]

    @staticmethod
    def _transfer(disk: Disk, cdb: bytes, data_out: bytes, room: int) -> Outcome:
        if cdb[0] & 0x80:
            lba, blocks = struct.unpack_from(">QI", cdb, 2)
        else:
            lba, blocks = struct.unpack_from(">IxH", cdb, 2)
        if lba + blocks > disk.blocks:
            return check(5, 0x21, 0)
        at, size = lba * disk.block_size, blocks * disk.block_size
        if cdb[0] & 0x02:
            disk.data[at : at + size] = data_out
            return good()
        return good(bytes(disk.data[at : at + size]), room=room)
