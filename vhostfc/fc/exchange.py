"""What all parts of an N_Port share: its address and timers, the exchanges it originates, the way out.

An exchange is found by its OX_ID, and only a frame from the port that the exchange is with belongs to
it; whatever else comes is late or lost, and dropped.  An OX_ID whose exchange ended in doubt (no answer,
aborted) rests for a while: a frame of the old exchange must not meet a new one (FC-FS-4, recovery qualifier).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from vhostfc.fc.bls import abts_frame
from vhostfc.fc.ct import ct_request
from vhostfc.fc.frame import UNASSIGNED_XID, Address, Frame, FrameError, RCtl, els_request
from vhostfc.fc.sequence import Reassembly

#: The longest reply of a link service that is put together: a name server list of some 16,000 ports.
MAX_REPLY = 1 << 18


class Event:
    """Something that the owner of an N_Port wants to hear of; take_events() gives them."""

    __slots__ = ()


@dataclass(order=True, slots=True)
class Timer:
    at: float
    number: int
    run: Callable[[float], None] | None = field(compare=False)


class Timers:
    """What is to be done when, with a time that is passed in."""

    def __init__(self) -> None:
        self._heap: list[Timer] = []
        self._numbers = itertools.count()
        self._cancelled = 0

    def set(self, at: float, run: Callable[[float], None]) -> Timer:
        timer = Timer(at, next(self._numbers), run)
        heapq.heappush(self._heap, timer)
        return timer

    def cancel(self, timer: Timer | None) -> None:
        """A timer that has run or was cancelled already, or None, is no error."""
        if timer is None or timer.run is None:
            return
        timer.run = None
        self._cancelled += 1
        # Nearly every command ends before its time: its timer must not stay in the heap that long.
        if self._cancelled > 64 and self._cancelled > len(self._heap) // 2:
            self._heap = [kept for kept in self._heap if kept.run is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def deadline(self) -> float | None:
        while self._heap and self._heap[0].run is None:
            heapq.heappop(self._heap)
            self._cancelled -= 1
        return self._heap[0].at if self._heap else None

    def tick(self, now: float) -> None:
        while (at := self.deadline()) is not None and at <= now:
            timer = heapq.heappop(self._heap)
            run, timer.run = timer.run, None
            if run is not None:
                run(now)


class Exchange:
    """An exchange that this port originated."""

    __slots__ = ("d_id", "ox_id", "rx_id")

    def __init__(self, d_id: int) -> None:
        self.d_id = d_id
        self.ox_id = UNASSIGNED_XID
        self.rx_id = UNASSIGNED_XID

    def receive(self, frame: Frame, now: float) -> None:
        raise NotImplementedError


#: Called with the payload of the reply, or None: no answer in time, or the fabric threw the request back.
Done = Callable[[bytes | None, float], None]


class LinkService(Exchange):
    """An ELS or a CT request that waits for its reply."""

    __slots__ = ("_done", "_reply", "_wire", "replied_to", "timer")

    def __init__(self, wire: Wire, d_id: int, done: Done) -> None:
        super().__init__(d_id)
        self._wire = wire
        self._done = done
        self._reply = Reassembly(MAX_REPLY)
        self.timer: Timer | None = None
        #: D_ID of the reply: in that to FLOGI, the address that the fabric gives us.
        self.replied_to: int = Address.UNIDENTIFIED

    def receive(self, frame: Frame, now: float) -> None:
        self.replied_to = frame.d_id
        match frame.r_ctl:
            case RCtl.ELS_REPLY | RCtl.DATA_SOLICITED_CONTROL:
                try:
                    payload = self._reply.add(frame)
                except FrameError:
                    self.fail(now)
                    return
                if payload is not None:
                    self._wire.close(self)
                    self._done(payload, now)
            case RCtl.LINK_F_RJT | RCtl.LINK_P_RJT:
                self._wire.close(self)
                self._done(None, now)
            case _:
                pass

    def fail(self, now: float) -> None:
        """No answer, or a broken one: abort the exchange; its answer is not waited for (FC-LS-3 4.1)."""
        self._wire.close(self)
        self._wire.rest(self.ox_id, now)
        self._wire.send(abts_frame(self._wire.port_id, self.d_id, self.ox_id, self.rx_id))
        self._done(None, now)


class Wire:
    """frames and events collect here until they are taken.  Times in seconds.

    port_id: our N_Port_ID, 0 before the fabric gives one.  e_d_tov, r_a_tov: the fabric's, once it has told.
    """

    def __init__(self) -> None:
        self.port_id: int = Address.UNIDENTIFIED
        self.e_d_tov = 2.0
        self.r_a_tov = 10.0
        self.timers = Timers()
        self.frames: list[bytes] = []
        self.events: list[Event] = []
        self._open: dict[int, Exchange] = {}
        self._resting: dict[int, float] = {}
        self._next = 0

    def send(self, frame: Frame) -> None:
        self.frames.append(frame.pack())

    def open(self, exchange: Exchange, now: float) -> None:
        """Give the exchange an OX_ID of its own.  Raises FrameError when all 65535 are in use.

        When the others are resting, the one that has rested longest is taken: a guest that aborts without
        end must not run us dry.
        """
        for _ in range(UNASSIGNED_XID):
            ox_id, self._next = self._next, (self._next + 1) % UNASSIGNED_XID
            if ox_id not in self._open and self._resting.get(ox_id, now) <= now:
                break
        else:
            rested = next((ox_id for ox_id in self._resting if ox_id not in self._open), None)
            if rested is None:
                raise FrameError("no exchange identifier is free")
            ox_id = rested
        self._resting.pop(ox_id, None)
        self._open[ox_id] = exchange
        exchange.ox_id = ox_id

    def close(self, exchange: Exchange) -> None:
        """The exchange has ended; what still comes for it is dropped."""
        self._open.pop(exchange.ox_id, None)
        if isinstance(exchange, LinkService):
            self.timers.cancel(exchange.timer)

    def rest(self, ox_id: int, now: float) -> None:
        """Keep the OX_ID of an exchange that ended in doubt out of use for 2 R_A_TOV."""
        self._resting.pop(ox_id, None)  # the dict is in the order in which they began to rest
        self._resting[ox_id] = now + 2 * self.r_a_tov

    def withdraw(self, exchange: Exchange | None, now: float) -> None:
        """Nobody waits for this one any more."""
        if exchange is not None and self._open.get(exchange.ox_id) is exchange:
            self.close(exchange)
            self.rest(exchange.ox_id, now)

    def clear(self) -> None:
        """The link is gone and all frames with it."""
        for exchange in list(self._open.values()):
            self.close(exchange)
        self._resting.clear()
        self.frames.clear()

    def receive(self, frame: Frame, now: float) -> bool:
        """Hand a responder's frame to its exchange; False when it has none."""
        exchange = self._open.get(frame.ox_id)
        # The fabric's answer to FLOGI may come from another address than it was sent to (FC-LS-3 6.3.2).
        if exchange is None or exchange.d_id not in (frame.s_id, Address.F_PORT):
            return False
        if exchange.rx_id == UNASSIGNED_XID:
            exchange.rx_id = frame.rx_id
        exchange.receive(frame, now)
        return True

    @property
    def in_use(self) -> int:
        """How many exchanges are open."""
        return len(self._open)

    def els(self, d_id: int, payload: bytes, done: Done, now: float, timeout: float | None = None) -> LinkService:
        """Send an ELS request; timeout: 2 R_A_TOV when not given."""
        exchange = self._link_service(d_id, done, now, timeout)
        self.send(els_request(self.port_id, d_id, exchange.ox_id, payload))
        return exchange

    def ct(self, d_id: int, payload: bytes, done: Done, now: float, timeout: float | None = None) -> LinkService:
        """Send a CT request; timeout: 2 R_A_TOV when not given."""
        exchange = self._link_service(d_id, done, now, timeout)
        self.send(ct_request(self.port_id, d_id, exchange.ox_id, payload))
        return exchange

    def _link_service(self, d_id: int, done: Done, now: float, timeout: float | None) -> LinkService:
        exchange = LinkService(self, d_id, done)
        self.open(exchange, now)
        exchange.timer = self.timers.set(now + (2 * self.r_a_tov if timeout is None else timeout), exchange.fail)
        return exchange
