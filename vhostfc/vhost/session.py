"""A vhost-user session, the back end's side: one front end's connection from its first message to its end.

Sans-IO.  Messages go in, effects come out (effects.py), and the caller carries each out before it asks
for the next:

    session = Session()
    try:
        while (packet := await socket.receive()) is not None:
            for effect in session.receive(packet):
                try:
                    await carry_out(effect)          # StopRing: ... ; session.ring_stopped(index, base)
                except CouldNot as error:
                    session.failed(str(error))       # what is left changes under the loop
    finally:
        for effect in session.close():
            ...

The iterators hand out one queue, so a continuation only changes what comes next:

* ring_stopped(index, base), called while a StopRing is carried out, puts the answer to GET_VRING_BASE
  in front (or whatever the ring was stopped for).
* failed(text), called when an effect could not be carried out, drops all that was to follow: the
  front end is told, if it asked for an acknowledgement, and the connection ends with one line.
* close() drops everything and stops, unmaps and closes what there is.  It is right at any moment, a
  cancellation in the middle of an effect included.

An acknowledgement is the last but for Close, so it goes out when everything before it succeeded.
What a front end gets wrong is a Refuse, never an exception.  Exceptions (RuntimeError) are for a
caller that breaks the rules above.

Messages are answered strictly in order: QEMU uses GET_FEATURES as a barrier.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator

from vhostfc.vhost import features, requests
from vhostfc.vhost.effects import (
    Close,
    Effect,
    EnableRing,
    MemoryRegion,
    Refuse,
    Reply,
    ResetDevice,
    SetCall,
    SetErr,
    SetMemory,
    StartRing,
    StopRing,
)
from vhostfc.vhost.features import ACCEPTED, OFFERED, OFFERED_PROTOCOL, Feature, ProtocolFeature
from vhostfc.vhost.memory import MAX_SLOTS, Memory
from vhostfc.vhost.messages import (
    U64,
    MemoryTable,
    Packet,
    Payload,
    ProtocolError,
    Region,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
)
from vhostfc.vhost.requests import AnyRequest, Message, Request
from vhostfc.vhost.vring import RingEvent, Vring

#: Control and event ring come before the request rings.
OTHER_RINGS = 2
MAX_RINGS = 256

#: Bits that QEMU lets a guest acknowledge without asking the back end, and how to tell it not to.
UNASKED = {
    Feature.SCSI_T10_PI: "t10_pi=off",
    Feature.ACCESS_PLATFORM: "iommu_platform=off",
}
NOT_SHARED = "guest memory is not shared: use memory-backend-memfd,share=on"


class SessionState(enum.Enum):
    OPEN = enum.auto()
    REFUSED = enum.auto()
    CLOSED = enum.auto()


class _Why(enum.Enum):
    """What a ring is being stopped for."""

    BASE = enum.auto()  # GET_VRING_BASE wants to know where it is
    RESTART = enum.auto()  # it goes on with another kick descriptor
    RESET = enum.auto()


class Session:
    """See the head of the file.  max_queues: request rings that a device may have, what GET_QUEUE_NUM answers."""

    def __init__(self, max_queues: int = 64) -> None:
        if not 0 < max_queues <= MAX_RINGS - OTHER_RINGS:
            raise ValueError(f"{max_queues} request rings, a device has 1 to {MAX_RINGS - OTHER_RINGS}")
        self.state = SessionState.OPEN
        #: virtio bits that the driver acknowledged, without PROTOCOL_FEATURES
        self.features = 0
        self.protocol_features = 0
        self.memory = Memory()
        self.rings = [Vring(index) for index in range(max_queues + OTHER_RINGS)]
        self._memory_seen = False
        self._queue: deque[Effect] = deque()
        self._stopping: dict[int, _Why] = {}
        self._message: Message | None = None
        self._unused: list[int] = []

    def __repr__(self) -> str:
        rings = ", ".join(f"{ring.index}: {ring.state.name}" for ring in self.rings if ring.started or ring.enabled)
        return f"<Session {self.state.name} regions={len(self.memory.regions)} rings={{{rings}}}>"

    @property
    def active(self) -> bool:
        """True while any ring is started: a driver uses the device."""
        return any(ring.started for ring in self.rings)

    # -------------------------------------------------------------------------------- what the caller says

    def receive(self, packet: Packet) -> Iterator[Effect]:
        """Take a message in, with its descriptors, and hand out the effects that it has."""
        if self.state is not SessionState.OPEN:
            self._close(*packet.fds)
            return self._hand_out()
        if self._queue or self._stopping:
            raise RuntimeError("the effects of the last message were not carried out")
        self._message = None
        self._unused = list(packet.fds)
        try:
            self._message = requests.decode_request(packet)
            self._apply(self._message)
            self._acknowledge(0)
        except ProtocolError as error:
            self._refuse(str(error) if self._message is None else f"{self._message.request.name}: {error}")
        self._close(*self._unused)
        return self._hand_out()

    def ring_stopped(self, index: int, base: int) -> None:
        """The ring that StopRing named is stopped; base: the next avail index.  Called while that effect is at hand."""
        if index not in self._stopping:
            raise RuntimeError(f"ring {index} was not to be stopped")
        why = self._stopping.pop(index)
        ring = self.rings[index]
        if why is _Why.BASE:
            ring.base = base
            answer = requests.encode_reply(Request.GET_VRING_BASE, VringState(index, base))
            self._queue.appendleft(Reply(answer))
        elif why is _Why.RESTART:
            ring.base = base
            self._queue.appendleft(self._start(ring))

    def failed(self, text: str) -> None:
        """The effect at hand could not be carried out; text says what and why, on one line.

        Once the connection is being ended, that goes on as far as it can.
        """
        if self.state is SessionState.OPEN and self._message is not None:
            self._refuse(f"{self._message.request.name}: {text}")

    def close(self) -> Iterator[Effect]:
        """The connection ended, or is to end: stop and give back everything.  A second call goes on with the first."""
        if self.state is not SessionState.CLOSED:
            self.state = SessionState.CLOSED
            closing = self._only_closing()
            for ring in self.rings:
                if ring.started or ring.index in self._stopping:
                    self._stop(ring, _Why.RESET)
                ring.forget()
            if self._memory_seen:
                self.memory = Memory()
                self._queue.append(SetMemory(()))
            self._queue.extend(closing)
            for ring in self.rings:
                self._close(ring.kick_fd, ring.call_fd, ring.err_fd)
                ring.kick_fd = ring.call_fd = ring.err_fd = -1
        return self._hand_out()

    # -------------------------------------------------------------------------------- the queue

    def _hand_out(self) -> Iterator[Effect]:
        while self._queue:
            yield self._queue.popleft()

    def _only_closing(self) -> list[Close]:
        """Forget all that is to be done; returns what must be done nevertheless."""
        closing = [effect for effect in self._queue if isinstance(effect, Close)]
        self._queue.clear()
        return closing

    def _close(self, *fds: int) -> None:
        if real := tuple(fd for fd in fds if fd >= 0):
            self._queue.append(Close(real))

    def _refuse(self, text: str) -> None:
        self._queue.extend(self._only_closing())
        self._acknowledge(1)
        self._queue.append(Refuse(text))
        self.state = SessionState.REFUSED

    def _acknowledge(self, value: int) -> None:
        """0: done; else: failed.  Only to who asked for it, may ask for it, and gets no other answer."""
        message = self._message
        if message is None or not message.need_reply or requests.has_own_reply(message.request):
            return
        if self._negotiated(ProtocolFeature.REPLY_ACK):
            self._reply(message.request, U64(value))

    def _reply(self, request: AnyRequest, payload: Payload) -> None:
        self._queue.append(Reply(requests.encode_reply(request, payload)))

    def _take(self) -> int:
        """The descriptor that came with the message, to be kept; -1: none did."""
        return self._unused.pop() if self._unused else -1

    def _negotiated(self, feature: ProtocolFeature) -> bool:
        return bool(self.protocol_features >> feature & 1)

    # -------------------------------------------------------------------------------- what requests do

    def _apply(self, message: Message) -> None:
        """Change the state and queue the effects.  Raises ProtocolError."""
        needs = requests.row(message.request).needs
        if needs is not None and not self._negotiated(needs):
            raise ProtocolError(f"it needs the protocol feature {needs.name} ({needs.value}), which was not negotiated")
        match message:
            case Message(Request.GET_FEATURES as request):
                self._reply(request, U64(OFFERED))
            case Message(Request.GET_PROTOCOL_FEATURES as request):
                self._reply(request, U64(OFFERED_PROTOCOL))
            case Message(Request.GET_QUEUE_NUM as request):
                self._reply(request, U64(len(self.rings) - OTHER_RINGS))
            case Message(Request.GET_MAX_MEM_SLOTS as request):
                self._reply(request, U64(MAX_SLOTS))
            case Message(Request.SET_FEATURES, U64(word)):
                self._set_features(word)
            case Message(Request.SET_PROTOCOL_FEATURES, U64(word)):
                if unknown := word & ~OFFERED_PROTOCOL:
                    raise ProtocolError(f"{features.names(unknown, ProtocolFeature)}: not offered")
                self.protocol_features = word
            case Message(Request.SET_OWNER | Request.RESET_OWNER):
                pass  # a connection is its front end's from the beginning; RESET_OWNER is obsolete
            case Message(Request.SET_MEM_TABLE, MemoryTable(regions)):
                self._set_memory(Memory.of(regions), dict(zip(regions, self._unused, strict=True)))
            case Message(Request.ADD_MEM_REG, SingleRegion() as single):
                self._set_memory(self.memory.add(single.region), {single.region: self._unused[0]})
            case Message(Request.REM_MEM_REG, SingleRegion() as single):
                self._set_memory(self.memory.remove(single.region), {})
            case Message(Request.SET_VRING_NUM, VringState(index, num)):
                self._ring(index).set_size(num, packed=self._packed)
            case Message(Request.SET_VRING_BASE, VringState(index, num)):
                self._ring(index).set_base(num, packed=self._packed)
            case Message(Request.SET_VRING_ADDR, VringAddr(index) as addresses):
                self._ring(index).set_addresses(addresses)
            case Message(Request.SET_VRING_KICK, VringFd() as which):
                self._kick(self._ring(which.index))
            case Message(Request.SET_VRING_CALL, VringFd() as which):
                self._set_call(self._ring(which.index))
            case Message(Request.SET_VRING_ERR, VringFd() as which):
                self._set_err(self._ring(which.index))
            case Message(Request.SET_VRING_ENABLE, VringState(index, num)):
                if num > 1:
                    raise ProtocolError(f"ring {index} to be {num}, expected 0 or 1")
                self._enable(self._ring(index), on=bool(num))
            case Message(Request.GET_VRING_BASE, VringState(index)):
                self._get_base(self._ring(index))
            case Message(Request.RESET_DEVICE):
                self._reset()
            case _:
                raise ProtocolError("not a request for this kind of device, with what was negotiated")

    def _ring(self, index: int) -> Vring:
        if index >= len(self.rings):
            raise ProtocolError(
                f"ring {index}, but this device has {len(self.rings)}: num_queues may be up to "
                f"{len(self.rings) - OTHER_RINGS}"
            )
        return self.rings[index]

    def _set_features(self, word: int) -> None:
        if unknown := word & ~ACCEPTED:
            advice = [option for bit, option in UNASKED.items() if unknown >> bit & 1]
            then = f": set {','.join(advice)} on QEMU's vhost-user-scsi device" if advice else ", and was not offered"
            raise ProtocolError(f"{features.names(unknown, Feature)} is not implemented{then}")
        virtio = word & ~features.mask(Feature.PROTOCOL_FEATURES)
        if self.active and virtio != self.features:
            raise ProtocolError(f"features {virtio:#x} while rings run with {self.features:#x}")
        self.features = virtio
        if not word >> Feature.PROTOCOL_FEATURES & 1:
            # there will be no SET_VRING_ENABLE (or QEMU is older than 7.2 and sends it all the same)
            for ring in self.rings:
                self._enable(ring, on=True)

    def _set_memory(self, memory: Memory, fds: dict[Region, int]) -> None:
        for ring in self.rings:
            if ring.started:
                self._must_be_in(memory, ring)
        self.memory = memory
        self._memory_seen = self._memory_seen or bool(memory.regions)
        self._queue.append(SetMemory(tuple(MemoryRegion(region, fds.get(region, -1)) for region in memory.regions)))

    @property
    def _packed(self) -> bool:
        return bool(self.features >> Feature.RING_PACKED & 1)

    def _must_be_in(self, memory: Memory, ring: Vring) -> None:
        for part, address, size in ring.parts(packed=self._packed):
            if not memory.covers(address, size):
                raise ProtocolError(
                    f"ring {ring.index}'s {part}, {size} bytes at user address {address:#x}, is outside guest memory"
                )

    def _kick(self, ring: Vring) -> None:
        if not ring.size or ring.addresses is None:
            raise ProtocolError(f"ring {ring.index} has no size or no addresses yet")
        if not self._memory_seen:
            raise ProtocolError(NOT_SHARED)
        self._must_be_in(self.memory, ring)
        was_started, old = ring.started, ring.kick_fd
        ring.kick_fd = self._take()
        ring.move(RingEvent.KICK)
        if was_started:
            self._stop(ring, _Why.RESTART)
        else:
            self._queue.append(self._start(ring))
        if ring.enabled:
            self._queue.append(EnableRing(ring.index, enabled=True))
        self._unused.append(old)

    def _start(self, ring: Vring) -> StartRing:
        assert ring.addresses is not None
        return StartRing(
            index=ring.index,
            size=ring.size,
            desc=ring.addresses.desc,
            used=ring.addresses.used,
            avail=ring.addresses.avail,
            base=ring.base,
            features=self.features,
            kick_fd=ring.kick_fd,
            call_fd=ring.call_fd,
            err_fd=ring.err_fd,
        )

    def _set_call(self, ring: Vring) -> None:
        old, ring.call_fd = ring.call_fd, self._take()
        if ring.started:
            self._queue.append(SetCall(ring.index, ring.call_fd))
        self._unused.append(old)

    def _set_err(self, ring: Vring) -> None:
        old, ring.err_fd = ring.err_fd, self._take()
        if ring.started:
            self._queue.append(SetErr(ring.index, ring.err_fd))
        self._unused.append(old)

    def _enable(self, ring: Vring, *, on: bool) -> None:
        ring.move(RingEvent.ENABLE if on else RingEvent.DISABLE)
        if ring.started:
            self._queue.append(EnableRing(ring.index, enabled=on))

    def _get_base(self, ring: Vring) -> None:
        if ring.started:
            ring.move(RingEvent.BASE)
            self._stop(ring, _Why.BASE)
            self._drop_kick(ring)
        else:
            self._reply(Request.GET_VRING_BASE, VringState(ring.index, ring.base))

    def _reset(self) -> None:
        for ring in self.rings:
            if ring.started:
                self._stop(ring, _Why.RESET)
                self._drop_kick(ring)
            ring.forget()
        self.features = 0
        self._queue.append(ResetDevice())

    def _stop(self, ring: Vring, why: _Why) -> None:
        self._stopping[ring.index] = why
        self._queue.append(StopRing(ring.index))

    def _drop_kick(self, ring: Vring) -> None:
        """Front ends send a new one at each start."""
        self._unused.append(ring.kick_fd)
        ring.kick_fd = -1
