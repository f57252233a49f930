"""The daemon's own adapter under attack: everything of `vhostfc serve` but the fabric.

The port is a fake that obeys the seam: one target with one disk of memory, and as few commands beside
the fast path as a device server may have.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import trio

from vhostfc.config import AdapterConfig, PortConfig
from vhostfc.daemon.fdsocket import listen
from vhostfc.daemon.hba import Adapter
from vhostfc.daemon.workers import Workers
from vhostfc.fc.wwn import Wwn
from vhostfc.native import LATCH_BYTES, Engine, Event, EventKind, Medium, MediumKind
from vhostfc.ports.base import (
    Outcome,
    PortEvent,
    PortEventKind,
    PortIdentity,
    PortState,
    RemotePort,
    RemotePortState,
    Route,
    RouteChange,
    ScsiResult,
    TaskManagement,
    TaskManagementResponse,
    Topology,
    Unit,
)

BLOCKS, BLOCK_SIZE = 65536, 512
#: What the workers may run by themselves: READ and WRITE (6) to (16), SYNCHRONIZE CACHE.
_FAST_OPCODES = (0x08, 0x0A, 0x28, 0x2A, 0x35, 0x88, 0x8A, 0x91, 0xA8, 0xAA)
FAST = bytes(sum(1 << op % 8 for op in _FAST_OPCODES if op // 8 == byte) for byte in range(32))
DRAIN = 0.2
TARGET_PORT = Wwn(0x5006016000000001)
UNIT = Unit(TARGET_PORT, bytes(8))


def fixed_sense(key: int, asc: int, ascq: int = 0) -> bytes:
    """Sense data in fixed format (SPC-4 4.5.3)."""
    return bytes([0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, asc, ascq, 0, 0, 0, 0])


class Recorder:
    """A log that tells what a guest may cause from what it may not."""

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.broken: list[int] = []
        self.wrong: list[str] = []

    def bind(self, **_: Any) -> Self:
        return self

    def debug(self, *_: Any, **__: Any) -> None: ...

    info = warning = debug

    def error(self, event: str, **fields: Any) -> None:
        if event in ("front end refused", "front end broke the protocol"):
            self.refusals.append(fields["reason"])
        elif event == "ring is broken by its driver":
            self.broken.append(fields["ring"])
        else:
            self.wrong.append(f"{event} {fields}")

    critical = exception = error


class HoldingWorkers(Workers):
    """Workers whose punts can be kept unanswered."""

    hold = False

    def __init__(self, engine: Engine, *, log: Any) -> None:
        super().__init__(engine, log=log)
        self.held: list[int] = []
        self.engine = engine

    def _heard(self, event: Event) -> None:
        if event.kind is EventKind.PUNT and self.hold:
            self.held.append(event.handle)
        else:
            super()._heard(event)


class OneUnit:
    """A fabric, the port on it and the path to its one unit."""

    identity = PortIdentity(Wwn(0x5001438012345678), Wwn(0x5001438012345679))
    unit = UNIT

    @asynccontextmanager
    async def login(self, identity: PortIdentity) -> AsyncIterator[Any]:
        yield self

    def snapshot(self) -> Topology:
        remote = RemotePort(TARGET_PORT, TARGET_PORT, 0x010200, RemotePortState.ONLINE, (UNIT,))
        return Topology(PortState.ONLINE, 0x010100, TARGET_PORT, (remote,))

    async def events(self) -> AsyncIterator[PortEvent]:
        await trio.sleep_forever()
        yield PortEvent(PortEventKind.TOPOLOGY)  # never reached: it makes this a generator

    async def rescan(self) -> None:
        await trio.lowlevel.checkpoint()

    async def execute(self, unit: Unit, cdb: bytes, *, data_out: bytes = b"", data_in: int = 0, **_: Any) -> ScsiResult:
        """A device server that knows INQUIRY, TEST UNIT READY, REPORT LUNS and READ CAPACITY(16)."""
        await trio.lowlevel.checkpoint()
        residual = data_in + len(data_out)
        known = {
            0x00: b"",
            0x12: bytes([0, 0, 6, 2, 31, 0, 0, 2]) + b"VHOSTFC " + b"ONE DISK        " + b"0001",
            0xA0: struct.pack(">I4x8x", 8),
            0x9E: struct.pack(">QI20x", BLOCKS - 1, BLOCK_SIZE),
        }
        if unit != UNIT:
            return ScsiResult(Outcome.COMPLETE, 2, fixed_sense(5, 0x25), residual=residual)
        if cdb[0] not in known or cdb[1] & 1:
            code = 0x24 if cdb[0] in known else 0x21 if FAST[cdb[0] // 8] >> cdb[0] % 8 & 1 else 0x20
            return ScsiResult(Outcome.COMPLETE, 2, fixed_sense(5, code), residual=residual)
        data = known[cdb[0]][:data_in]
        return ScsiResult(Outcome.COMPLETE, data_in=data, residual=residual - len(data))

    async def manage(self, _: Unit, function: TaskManagement, tag: int | None = None) -> TaskManagementResponse:
        await trio.lowlevel.checkpoint()
        if function is TaskManagement.CLEAR_ACA:
            return TaskManagementResponse.FUNCTION_REJECTED
        return TaskManagementResponse.FUNCTION_COMPLETE

    def latch_stuck(self, owner: int) -> None: ...

    async def open_path(self, _: Unit) -> Any:
        await trio.lowlevel.checkpoint()
        return self

    async def changes(self) -> AsyncIterator[RouteChange]:
        medium_fd, latch_fd = os.memfd_create("medium"), os.memfd_create("latch")
        os.ftruncate(medium_fd, BLOCKS * BLOCK_SIZE)
        os.ftruncate(latch_fd, LATCH_BYTES)
        medium = Medium(
            MediumKind.MEMORY, blocks=BLOCKS, block_size=BLOCK_SIZE, owner=2, fd=medium_fd, latch_fd=latch_fd
        )
        os.close(medium_fd)
        os.close(latch_fd)
        yield RouteChange(Route(FAST, medium))
        await trio.sleep_forever()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class DaemonAdapter:
    """A running adapter with a disk of memory at 0:0.

    refusals: why connections were ended, one line each.  broken: rings that their driver broke.  wrong: errors that
    no guest may cause.  hold: True keeps punted commands unanswered, their handles are in held.
    """

    def __init__(self, socket: Path, workers: HoldingWorkers, adapter: Adapter, log: Recorder) -> None:
        self.socket = socket
        self._workers = workers
        self._adapter = adapter
        self.refusals, self.broken, self.wrong = log.refusals, log.broken, log.wrong

    @property
    def hold(self) -> bool:
        return self._workers.hold

    @hold.setter
    def hold(self, on: bool) -> None:
        self._workers.hold = on

    @property
    def held(self) -> list[int]:
        return self._workers.held

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, socket: Path, *, workers: int = 1) -> AsyncIterator[DaemonAdapter]:
        log: Any = Recorder()
        fabric: Any = OneUnit()
        config = AdapterConfig(
            path=socket,
            name="one",
            ports=(PortConfig(OneUnit.identity.wwpn, OneUnit.identity.wwnn),),
            emulated=socket,
            socket=socket,
            control=socket.with_suffix(".control"),
            state=socket.parent,
            drain_timeout=DRAIN,
        )
        with contextlib.ExitStack() as stack:
            async with (
                HoldingWorkers.running(workers, log=log, max_punts=16, max_punt_bytes=8 << 20) as running,
                trio.open_nursery() as nursery,
            ):
                assert isinstance(running, HoldingWorkers)
                adapter = Adapter(config, fabric, running, nursery, log=log)
                nursery.start_soon(adapter.hold_port)
                door = stack.enter_context(listen(socket))
                nursery.start_soon(adapter.serve_guests, door, trio.CancelScope())
                yield cls(socket, running, adapter, log)
                nursery.cancel_scope.cancel()

    def counters(self) -> dict[str, int]:
        """struct vfc_stats."""
        return self._workers.counters()

    @property
    def owners(self) -> dict[int, int]:
        """Which worker has which request ring."""
        return self._workers.owners()

    async def move(self, ring: int, worker: int) -> bool:
        """Give a request ring to another worker; False: it stays."""
        return await self._workers.move_ring(ring, worker)

    async def order_move(self, order: dict[str, Any]) -> dict[str, Any]:
        """The same as an administrator says it."""
        return await self._adapter.move(order)

    async def idle(self) -> None:
        """Wait until nobody is connected and all that the last one had is given back."""
        await self._adapter.guest.ended.wait()
        await self._workers.ping()

    def answer_held(self, *, data_in: bytes = b"") -> bool:
        """Answer the oldest command that was held; False: it is over already."""
        return self._workers.engine.reply(self.held.pop(0), data_in=data_in)

    async def event(self, data: bytes) -> bool:
        """Put an event into the event ring; False: there was no buffer."""
        return await self._workers.put_event(data)
