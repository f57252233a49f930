"""The guest's side of an adapter: front ends that connect, what they ask for, and the event queue.

A session (vhost/session.py) says what a front end wants; here it is carried out by the workers, one
effect after the other.  QEMU's main loop stands still while it waits for an answer, so nothing here
waits without a bound: stopping all the rings of a device together takes `drain_timeout` at most.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable

import structlog
import trio
from trio.socket import SocketType

from vhostfc.daemon.fdsocket import Listener, VhostSocket, close_fds, peer
from vhostfc.daemon.guestevents import GuestEvent, GuestEvents, Kind
from vhostfc.daemon.workers import Workers, WorkersError
from vhostfc.native import Event
from vhostfc.vhost.effects import (
    Close,
    Effect,
    EnableRing,
    Refuse,
    Reply,
    ResetDevice,
    SetCall,
    SetErr,
    SetMemory,
    StartRing,
    StopRing,
)
from vhostfc.vhost.features import Feature
from vhostfc.vhost.messages import ProtocolError
from vhostfc.vhost.session import NOT_SHARED, Session
from vhostfc.virtio import scsi as virtio

#: How long a new front end waits for the last one's connection to end, seconds.
HANDOVER = 2.0
#: How long a driver may have run without a command before that is told, seconds: all look for disks at once.
SILENCE = 3.0
#: What SET_VRING_BASE says of a ring that nobody has used yet: a split one, and a packed one.
UNUSED = (0, 0x8000_8000)


class GuestSide:
    """See the head of the file.

    active and inactive are events: the first set while a driver runs the device, the other while none does.
    ended is set while nobody is connected, and everything of the last one has been given back.

    held: each time that a driver begins, its commands wait in its rings until let_run(): what it looks for is
    not there yet.  The front end does not wait with them.
    stopped: is told of each ring that has stopped, None: of all.
    """

    def __init__(
        self,
        workers: Workers,
        *,
        drain_timeout: float,
        log: structlog.typing.FilteringBoundLogger,
        held: bool = False,
        stopped: Callable[[int | None], Awaitable[None]],
    ) -> None:
        self.active = trio.Event()
        self.inactive = trio.Event()
        self.inactive.set()
        self._workers = workers
        self._drain_timeout = drain_timeout
        self._stopped = stopped
        self._log = log
        self._session: Session | None = None
        self._peer = ""
        self.ended = trio.Event()
        self.ended.set()
        self._drain_until: float | None = None
        self._held = held
        self._may_run = not held
        self._waiting: set[int] = set()
        self._events = GuestEvents()
        self._driven = False  # a driver has used the device since its last reset
        self._wake = trio.Event()
        self._buffers = True
        self._continued = False
        self._seen = workers.counters()["commands"]

    # ------------------------------------------------------------ connections

    async def serve(self, door: Listener | SocketType) -> None:
        """Front ends from a listener until cancelled, or the one that is connected until it leaves."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver_events)
            nursery.start_soon(self._notice_silence)
            if isinstance(door, Listener):
                while True:
                    sock = await door.accept()
                    nursery.start_soon(self._receive_guest, sock)
            with VhostSocket(door) as end:
                await self._connection(end, peer(door))
            nursery.cancel_scope.cancel()

    async def _receive_guest(self, sock: SocketType) -> None:
        """A front end connects; the one before it must have left."""
        with VhostSocket(sock) as end:
            who = peer(sock)
            with trio.move_on_after(HANDOVER):
                await self.ended.wait()
            if not self.ended.is_set():
                self._log.error("refused a second front end", peer=who, connected=self._peer)
                return
            await self._connection(end, who)

    async def _connection(self, end: VhostSocket, who: str) -> None:
        self.ended = trio.Event()
        self._peer = who
        self._session = session = Session()
        self._log.info("front end connected", peer=self._peer)
        try:
            await self._converse(session, end)
        except ProtocolError as error:
            self._log.error("front end broke the protocol", peer=self._peer, reason=str(error))
        finally:
            with trio.CancelScope(shield=True):
                for effect in session.close():
                    try:
                        await self._carry_out(session, end, effect)
                    except WorkersError as error:  # what is left still has to be given back
                        self._log.error("cannot give back all of a front end's things", reason=str(error))
                self._session = None
                self._follow_state()
                self._log.info("front end left", peer=self._peer)
                self.ended.set()

    async def _converse(self, session: Session, end: VhostSocket) -> None:
        while (packet := await end.receive()) is not None:
            for effect in session.receive(packet):
                if isinstance(effect, Refuse):
                    self._log.error("front end refused", peer=self._peer, reason=effect.text)
                    return
                try:
                    await self._carry_out(session, end, effect)
                except WorkersError as error:
                    session.failed(str(error))
            self._follow_state()

    async def _carry_out(self, session: Session, end: VhostSocket, effect: Effect) -> None:
        """Do one thing.  Raises WorkersError when it cannot be done; a peer that is gone is its own business."""
        match effect:
            case Reply(data):
                with contextlib.suppress(OSError):  # it left; the next receive says so
                    await end.send(data)
            case SetMemory(regions):
                await self._workers.set_memory(regions, timeout=self._drain_timeout)
            case StartRing() as ring:
                self._drain_until = None
                if ring.index == virtio.Queue.EVENT:
                    self._buffers = True
                self._continued |= ring.base not in UNUSED
                await self._workers.start_ring(ring)
                self._driven = True
            case EnableRing(index, enabled):
                await self._enable(index, enabled)
            case SetCall(index, fd):
                await self._workers.set_call(index, fd)
            case SetErr(index, fd):
                await self._workers.set_err(index, fd)
            case StopRing(index):
                self._waiting.discard(index)
                base = await self._workers.stop_ring(index, self._time_to_drain())
                await self._stopped(index)
                session.ring_stopped(index, base)
            case ResetDevice():
                self._driven = False
                self._events.clear()
                await self._workers.reset()
                await self._stopped(None)
            case Close(fds):
                close_fds(fds)

    async def _enable(self, index: int, enabled: bool) -> None:
        if enabled and index >= virtio.Queue.REQUEST and not self._may_run:
            self._waiting.add(index)
            return
        self._waiting.discard(index)
        await self._workers.enable_ring(index, enabled=enabled)
        self._wake.set()

    async def let_run(self) -> None:
        """What the driver looks for is there: its commands may be taken."""
        self._may_run = True
        while self._waiting:
            await self._enable(self._waiting.pop(), True)

    def _time_to_drain(self) -> float:
        """What is left of the time that all rings of one stop share, in seconds."""
        now = trio.current_time()
        if self._drain_until is None:
            self._drain_until = now + self._drain_timeout
        return max(self._drain_until - now, 0)

    def _follow_state(self) -> None:
        """Set active and inactive by the session's state."""
        active = self._session is not None and self._session.active
        if active and not self.active.is_set():
            self.active.set()
            self._wake.set()
            self.inactive = trio.Event()
        elif not active and not self.inactive.is_set():
            self.inactive.set()
            self.active = trio.Event()
            self._may_run = not self._held
            self._continued = False
            self._seen = self._workers.counters()["commands"]

    async def _notice_silence(self) -> None:
        """Tell when a driver has started and nothing is seen of it.

        Of memory that QEMU has mapped for itself alone (memory-backend-file without share=on) it sends the file all
        the same, and all that ever shows there is zeros.
        """
        while True:
            await self.active.wait()
            inactive = self.inactive
            with trio.move_on_after(SILENCE) as silence:
                await inactive.wait()
            seen = self._workers.counters()["commands"]
            if silence.cancelled_caught and self._may_run and not self._continued and seen == self._seen:
                self._log.warning("a driver has started, and nothing is seen of it", reason=NOT_SHARED)
            await inactive.wait()

    # ------------------------------------------------------------ the event queue

    def announce(self, event: GuestEvent) -> None:
        """Tell the guest: later, if its driver is stopped for a while; one that starts anew looks by itself."""
        if self._driven:
            self._events.add(event)
            self._wake.set()

    def _wants(self, event: GuestEvent | None) -> bool:
        """Has the driver negotiated events of this kind?"""
        wanted = Feature.SCSI_CHANGE if event and event.kind is Kind.PARAMETERS else Feature.SCSI_HOTPLUG
        return self._session is not None and bool(self._session.features >> wanted & 1)

    def buffers_came(self) -> None:
        """The driver has given event buffers after we ran out of them."""
        self._buffers = True
        self._wake.set()

    async def _deliver_events(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._buffers and self._events and self.active.is_set():
                event = self._events.first()
                missed = self._events.missed
                if not self._wants(event):
                    self._events.delivered(event, missed=missed)
                    continue
                self._buffers = False  # beforehand: that some have come may be told before this answer is read
                if not await self._workers.put_event(encode(event, missed=missed)):
                    continue
                self._buffers = True
                self._events.delivered(event, missed=missed)
                self._log.info("told the guest", **describe(event), missed=missed)

    def ring_broke(self, event: Event) -> None:
        """A guest has made nonsense of a ring; it stands still until the driver resets the device."""
        self._log.error("ring is broken by its driver", ring=event.index, reason=os.strerror(-event.result))

    def status(self) -> dict[str, object]:
        """For `vhostfc status`."""
        session = self._session
        return {
            "state": "detached" if session is None else "active" if session.active else "standby",
            "peer": self._peer if session else None,
            "rings": [ring.index for ring in session.rings if ring.started] if session else [],
            "features": f"{session.features:#x}" if session else None,
            "events_waiting": len(self._events),
        }


def encode(event: GuestEvent | None, *, missed: bool) -> bytes:
    """An event as the guest reads it; None is a bare VIRTIO_SCSI_T_NO_EVENT that carries the missed bit."""
    if event is None:
        return virtio.Event(missed=missed).pack()
    match event.kind:
        case Kind.ARRIVED:
            reason = virtio.ResetReason.RESCAN
        case Kind.REMOVED:
            reason = virtio.ResetReason.REMOVED
        case Kind.PARAMETERS:
            return virtio.Event.param_change(event.target, event.lun, event.asc, event.ascq, missed=missed).pack()
    return virtio.Event.transport_reset(event.target, event.lun, reason, missed=missed).pack()


def describe(event: GuestEvent | None) -> dict[str, object]:
    """The fields of a log line about an event."""
    if event is None:
        return {"about": "missed events"}
    return {"about": f"unit {event.kind.value}", "target": event.target, "lun": event.lun}
