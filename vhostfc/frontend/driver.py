"""A guest's virtio-scsi driver over a vhost-user socket: commands, task management, events.

What a Linux guest's driver does (virtio 1.3, 5.6), without a guest: a control queue, an event queue
with buffers, request queues.  Any number of tasks may have commands in flight.

    async with ScsiDriver.open("/run/vhostfc/vm1/vhost.sock") as driver:
        answer = await driver.command(0, 0, bytes.fromhex("12 00 00 00 24 00"), data_in=36)

A SCSI status, a sense and a virtio-scsi response are values.  BackendError is for a back end that is
gone, silent, or breaks the protocol.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from vhostfc.frontend.client import TIMEOUT, WANTED, WANTED_PROTOCOL, BackendError, VhostUserClient, background
from vhostfc.frontend.memory import Buffer, GuestMemory
from vhostfc.frontend.packed import PackedRing
from vhostfc.frontend.queue import DriverQueue, Posted
from vhostfc.frontend.ring import DriverRing, Used, fence
from vhostfc.frontend.scan import TARGETS, UnitInfo, scan
from vhostfc.vhost.features import Feature
from vhostfc.virtio import scsi
from vhostfc.virtio.scsi import CommandRequest, CommandResponse, ControlType, Event, Queue, TaskManagementRequest

MIB = 1 << 20
#: Seconds for a command; a back end answers each within its own command timeout.
COMMAND_TIMEOUT = 120.0


@dataclass(frozen=True, slots=True)
class Response:
    """How a command ended: virtio-scsi's response byte, the SCSI status with its sense, and what was read.

    status and sense hold when response is OK (0).  residual: bytes of the buffers that were not moved.
    used_length: what the device says it wrote, response included.
    """

    response: int
    status: int = 0
    sense: bytes = b""
    residual: int = 0
    status_qualifier: int = 0
    data_in: bytes = b""
    used_length: int = 0

    @property
    def good(self) -> bool:
        return self.response == scsi.Response.OK and self.status == 0

    @property
    def sense_code(self) -> tuple[int, int, int]:
        """(sense key, ASC, ASCQ)."""
        return sense_code(self.sense)

    @property
    def unit_attention(self) -> bool:
        return self.response == scsi.Response.OK and self.status == 0x02 and self.sense_code[0] == 0x06

    def __str__(self) -> str:
        if self.response:
            names = {member.value: member.name for member in scsi.Response}
            return f"response {names.get(self.response, self.response)}"
        if self.status:
            key, asc, ascq = self.sense_code
            return f"status {self.status:02x}h" + (f", sense {key:x}/{asc:02x}/{ascq:02x}" if self.sense else "")
        return f"GOOD, {len(self.data_in)} bytes"


def sense_code(sense: bytes) -> tuple[int, int, int]:
    """(sense key, ASC, ASCQ); zeros without sense data (SPC-4 4.5, fixed and descriptor format)."""
    if not sense:
        return 0, 0, 0
    sense = sense.ljust(14, b"\0")
    if sense[0] & 0x7F in (0x72, 0x73):
        return sense[1] & 0x0F, sense[2], sense[3]
    return sense[2] & 0x0F, sense[12], sense[13]


def _pieces(buffer: Buffer | None, segment: int) -> list[tuple[int, int]]:
    """A data buffer cut into descriptors of at most `segment` bytes (0: one)."""
    if buffer is None:
        return []
    size = len(buffer)
    step = segment or size
    return [(buffer.guest + at, min(step, size - at)) for at in range(0, size, step)]


class ScsiDriver:
    """See open().  queues: control, event, then the request queues."""

    def __init__(
        self, client: VhostUserClient, memory: GuestMemory, queues: int, queue_size: int, event_buffers: int
    ) -> None:
        self.client = client
        self.memory = memory
        self.request_queues = queues
        event_idx = bool(client.features >> Feature.EVENT_IDX & 1)
        indirect = bool(client.features >> Feature.INDIRECT_DESC & 1)
        ring = PackedRing if client.features >> Feature.RING_PACKED & 1 else DriverRing
        self.queues = [
            DriverQueue(index, ring(memory, queue_size, event_idx=event_idx, indirect=indirect, fence=fence))
            for index in range(Queue.REQUEST + queues)
        ]
        self.running = False
        self._event_buffers = [memory.allocate(Event.SIZE, 16) for _ in range(event_buffers)]
        self._tags = itertools.count(1)
        self._send_event, self._events = trio.open_memory_channel[Event](math.inf)
        self._bases = [queue.vring.START for queue in self.queues]

    def __repr__(self) -> str:
        return f"<ScsiDriver {self.client.path} [{'running' if self.running else 'stopped'}]>"

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        path: Path | str,
        *,
        queues: int = 1,
        queue_size: int = 128,
        event_buffers: int = 8,
        regions: Sequence[int] = (32 * MIB,),
        features: int = WANTED,
        protocol: int = WANTED_PROTOCOL,
        packed: bool = False,
        start: bool = True,
        timeout: float = TIMEOUT,
    ) -> AsyncIterator[ScsiDriver]:
        """Connect, negotiate, start; stop and disconnect at the end.

        queues: request queues; queue_size: entries of each ring; event_buffers: 0 posts none, as firmware
        does; regions: sizes of the guest's memory regions, in bytes; features, protocol: what may be taken
        of the back end's offer; packed: packed rings, which must be offered.
        Raises BackendError when there is no back end or it cannot do this.
        """
        memory = GuestMemory()
        try:
            for size in regions:
                memory.add(size)
            async with VhostUserClient.open(path, memory=memory, timeout=timeout) as client:
                packing = 1 << Feature.RING_PACKED
                await client.negotiate(features=features | packing if packed else features, protocol=protocol)
                if packed and not client.features & packing:
                    raise BackendError(f"{path}: the back end does not offer packed rings")
                if queues > client.queue_num:
                    raise BackendError(f"{path}: {queues} request queues wanted, the back end has {client.queue_num}")
                driver = cls(client, memory, queues, queue_size, event_buffers)
                try:
                    async with background() as nursery:
                        nursery.start_soon(driver._watch_connection)
                        for queue in driver.queues:
                            nursery.start_soon(queue.serve)
                            nursery.start_soon(queue.watch)
                        if start:
                            await driver.start()
                        yield driver
                        with contextlib.suppress(BackendError):  # it is gone: so be it
                            await driver.stop()
                finally:
                    for queue in driver.queues:
                        queue.close()
        finally:
            memory.close()

    async def _watch_connection(self) -> None:
        await self.client.gone.wait()
        for queue in self.queues:
            queue.collect()
            queue.fail(self.client.reason or BackendError("the connection is lost"))

    # ------------------------------------------------------------------ start, stop, reset

    async def start(self) -> None:
        """DRIVER_OK: all rings run (again, where they were stopped)."""
        setups = [queue.setup(base) for queue, base in zip(self.queues, self._bases, strict=True)]
        self._post_event_buffers()
        await self.client.start(setups, ring_count=len(self.queues))
        self.running = True

    async def stop(self) -> list[int]:
        """As QEMU's `stop`: all rings stop; each one's base to go on from.  What was not taken yet stays posted."""
        if not self.running:
            return self._bases
        self.running = False
        bases = await self.client.stop(range(len(self.queues)), ring_count=len(self.queues))
        self._bases = [bases[index] for index in range(len(self.queues))]
        for queue in self.queues:
            queue.collect()
        return self._bases

    async def reset(self) -> None:
        """A virtio reset and a new start, as at a guest's reboot: what was posted is forgotten."""
        await self.stop()
        await self.client.reset_device()
        for queue in self.queues:
            queue.reset(BackendError(f"{self.client.path}: the driver reset the device"))
        self._bases = [queue.vring.START for queue in self.queues]
        await self.start()

    # ------------------------------------------------------------------ commands

    async def command(
        self,
        target: int,
        lun: int,
        cdb: bytes,
        data_out: bytes = b"",
        data_in: int = 0,
        attribute: int = 0,
        queue: int = 0,
        *,
        tag: int | None = None,
        segment: int = 0,
        lun_field: bytes | None = None,
        timeout: float = COMMAND_TIMEOUT,
    ) -> Response:
        """Run one SCSI command.

        cdb: up to 32 bytes.  data_in: bytes of room for data-in.  attribute: virtio's task attribute (0
        SIMPLE).  queue: request queue, from 0.  tag: for task management; by default a new one each.
        segment: cut the data into descriptors of so many bytes.  lun_field: the 8 bytes instead of target
        and LUN.  Raises BackendError when no answer comes in `timeout` seconds.
        """
        where = self.queues[Queue.REQUEST + queue]
        header = CommandRequest(
            lun_field or scsi.encode_lun(target, lun), next(self._tags) if tag is None else tag, cdb, attribute
        ).pack()
        pieces = 2 + sum(-(-size // (segment or size)) for size in (len(data_out), data_in) if size)
        await where.room(pieces)
        buffers = [self.memory.allocate(CommandRequest.SIZE), self.memory.allocate(CommandResponse.SIZE)]
        out = self.memory.allocate(len(data_out), 512) if data_out else None
        room = self.memory.allocate(data_in, 512) if data_in else None
        buffers += [buffer for buffer in (out, room) if buffer is not None]

        request, response = buffers[:2]
        request.view[:] = header
        response.view[:] = b"\xff" * CommandResponse.SIZE
        if out is not None:
            out.view[:] = data_out
        answer: list[tuple[bytes, bytes]] = []

        def finish(posted: Posted) -> None:
            # The buffers are freed when the device lets go of them, whether anybody still waits or not.
            if posted.used is not None:
                answer.append((bytes(response.view), bytes(room.view) if room is not None else b""))
            self._free(buffers)

        try:
            posted = where.post(
                [(request.guest, len(request)), *_pieces(out, segment)],
                [(response.guest, len(response)), *_pieces(room, segment)],
                finish,
            )
        except BackendError:
            self._free(buffers)
            raise
        used = await self._wait(posted, timeout, f"{cdb[:1].hex()}h for {target}:{lun}")
        decoded = CommandResponse.unpack(answer[0][0])
        if used.length < CommandResponse.SIZE or decoded is None:
            raise BackendError(f"{self.client.path}: a command came back without a response ({used.length} bytes)")
        moved = max(0, data_in - decoded.residual) if data_in else 0
        return Response(
            decoded.response, decoded.status, decoded.sense, decoded.residual, decoded.status_qualifier,
            answer[0][1][:moved], used.length,
        )  # fmt: skip

    def _free(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            self.memory.free(buffer)

    async def _wait(self, posted: Posted, timeout: float, what: str) -> Used:
        try:
            with trio.fail_after(timeout):
                return await posted.wait()
        except trio.TooSlowError:
            raise BackendError(f"{self.client.path}: no answer to {what} within {timeout:g} s") from None

    async def scan(self, *, targets: int = TARGETS) -> list[UnitInfo]:
        """Every unit that a guest would find; see scan.py."""
        return await scan(self, targets=targets)

    # ------------------------------------------------------------------ control queue

    async def control(self, request: bytes, room: int, *, timeout: float = COMMAND_TIMEOUT) -> bytes:
        """A raw control request; what the device wrote into `room` bytes."""
        where = self.queues[Queue.CONTROL]
        await where.room(2)
        readable, writable = self.memory.allocate(max(1, len(request))), self.memory.allocate(max(1, room))
        readable.view[: len(request)] = request
        writable.view[:] = b"\xff" * len(writable)
        answer: list[bytes] = []

        def finish(posted: Posted) -> None:
            if posted.used is not None:
                answer.append(bytes(writable.view[: min(room, posted.used.length)]))
            self._free([readable, writable])

        pieces = [(readable.guest, len(request))] if request else [], [(writable.guest, room)] if room else []
        try:
            posted = where.post(*pieces, finish)
        except BackendError:
            self._free([readable, writable])
            raise
        await self._wait(posted, timeout, "a control request")
        return answer[0]

    async def manage(self, subtype: int, target: int, lun: int = 0, tag: int = 0) -> int:
        """A task management function (scsi.TmfSubtype); the response byte (scsi.Response)."""
        data = await self.control(TaskManagementRequest(subtype, scsi.encode_lun(target, lun), tag).pack(), 1)
        if len(data) != 1:
            raise BackendError(f"{self.client.path}: task management was answered with {len(data)} bytes")
        return data[0]

    async def notifications(self, kind: ControlType, target: int, lun: int, events: int) -> tuple[int, int]:
        """AN_QUERY or AN_SUBSCRIBE: the event bits that hold, and the response byte."""
        request = scsi.AsyncNotification(kind, scsi.encode_lun(target, lun), events)
        answer = scsi.decode_async_answer(await self.control(request.pack(), 5))
        if answer is None:
            raise BackendError(f"{self.client.path}: an asynchronous notification request was answered too shortly")
        return answer

    # ------------------------------------------------------------------ event queue

    def events(self) -> trio.MemoryReceiveChannel[Event]:
        """What the device reports, from the start on; each event goes to one reader."""
        return self._events.clone()

    def _post_event_buffers(self) -> None:
        queue = self.queues[Queue.EVENT]
        for buffer in self._event_buffers[queue.posted :]:
            self._post_event_buffer(queue, buffer)

    def _post_event_buffer(self, queue: DriverQueue, buffer: Buffer) -> None:
        def arrived(posted: Posted) -> None:
            if posted.used is None:
                return
            event = Event.unpack(bytes(buffer.view[: posted.used.length]))
            if event is not None:
                self._send_event.send_nowait(event)
            self._post_event_buffer(queue, buffer)

        queue.post([], [(buffer.guest, len(buffer))], arrived)
