"""The session against a front end: QEMU's own sequences, the traps around them, what is refused, and no fd leaked.

The front end's side is the codec's other half, and the descriptors are real: the data path's fake
looks at each that it is lent, and only Close effects close them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostfc.vhost import messages as m
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
from vhostfc.vhost.features import OFFERED, OFFERED_PROTOCOL, mask
from vhostfc.vhost.messages import Header, Packet, Payload, Region, VringAddr, VringFd, VringState
from vhostfc.vhost.requests import FRONT_END, Request, decode_reply, encode_request, has_own_reply
from vhostfc.vhost.session import NOT_SHARED, Session, SessionState
from vhostfc.vhost.vring import RingState

MODERN = mask(1, 2, 28, 29, 32)
RAM = Region(0, 1 << 30, 0x7F00_0000_0000, 0)
HIGH = Region(4 << 30, 1 << 30, 0x7F80_0000_0000, 2 << 30)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def no_leak() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


def place(index: int, region: Region = RAM) -> VringAddr:
    """Where the test puts a ring."""
    at = region.user_addr + 0x10000 * (index + 1)
    return VringAddr(index, 0, desc=at, used=at + 0x4000, avail=at + 0x2000, log_guest_addr=0x1000)


@dataclass
class Back:
    """A back end: a session, and a data path that does what it is told and knows what it was told."""

    session: Session = field(default_factory=Session)
    seen: list[Effect] = field(default_factory=list)
    replies: list[bytes] = field(default_factory=list)
    #: next avail index that a ring answers when it is stopped
    bases: dict[int, int] = field(default_factory=dict)
    #: effects of this kind fail, with this text
    failing: tuple[type, str] | None = None
    refused: str | None = None

    def run(self, effects: Iterator[Effect]) -> list[Effect]:
        done: list[Effect] = []
        for effect in effects:
            done.append(effect)
            for fd in lent(effect):
                os.fstat(fd)
            if self.failing and isinstance(effect, self.failing[0]):
                self.session.failed(self.failing[1])
                continue
            match effect:
                case Reply(data):
                    self.replies.append(data)
                case StopRing(index):
                    self.session.ring_stopped(index, self.bases.get(index, 0))
                case Close(fds):
                    for fd in fds:
                        os.close(fd)
                case Refuse(text):
                    self.refused = text
        self.seen += done
        return done

    def send(
        self, request: Request, payload: Payload | None = None, *, need_reply: bool = False, fds: int | None = None
    ) -> list[Effect]:
        """A request with as many fresh descriptors as it calls for, unless said; what was done, without Close."""
        body = payload or m.Empty()
        count = body.fd_count if body.fd_count is not None else FRONT_END[request].fds[0]
        data = encode_request(request, payload, need_reply=need_reply)
        done = self.run(self.session.receive(as_packet(data, [os.eventfd(1) for _ in range(fds or count)])))
        return [effect for effect in done if not isinstance(effect, Close)]

    def ask(self, request: Request, payload: Payload | None = None) -> Payload:
        """A request that has a reply of its own, and that reply."""
        assert has_own_reply(request)
        self.replies.clear()
        self.send(request, payload)
        (data,) = self.replies
        return decode_reply(request, as_packet(data))

    def number(self, request: Request) -> int:
        reply = self.ask(request)
        assert isinstance(reply, m.U64)
        return reply.value

    def command(self, request: Request, payload: Payload | None = None, *, need_reply: bool = False) -> list[Effect]:
        """A request without one: acknowledged with 0 at the end if need_reply, never else; the effects before that."""
        self.replies.clear()
        done = self.send(request, payload, need_reply=need_reply)
        assert self.refused is None
        if not need_reply:
            assert not self.replies
            return done
        assert done[-1] == Reply(self.replies[0])
        assert decode_reply(request, as_packet(self.replies[0])) == m.U64(0)
        return done[:-1]

    def hang_up(self) -> list[Effect]:
        return self.run(self.session.close())


def as_packet(data: bytes, fds: Sequence[int] = ()) -> Packet:
    return Packet(Header.unpack(data[:12]), data[12:], tuple(fds))


def lent(effect: Effect) -> list[int]:
    match effect:
        case StartRing():
            fds = [effect.kick_fd, effect.call_fd, effect.err_fd]
        case SetCall(_, fd) | SetErr(_, fd):
            fds = [fd]
        case SetMemory(regions):
            fds = [region.fd for region in regions]
        case Close(closing):
            fds = list(closing)
        case _:
            fds = []
    return [fd for fd in fds if fd >= 0]


@contextmanager
def connection(session: Session | None = None) -> Iterator[Back]:
    """A back end whose connection ends with the block; no descriptor may be left."""
    with no_leak():
        back = Back(session or Session())
        yield back
        back.hang_up()


# ------------------------------------------------------------------------------------------------ QEMU's sequences


@dataclass(frozen=True)
class Qemu:
    """What a version of QEMU does; the sequences of each were seen on the wire."""

    version: str
    protocol: int
    enable_acknowledged: bool = True
    fds_acknowledged: bool = False
    features_twice: bool = True

    def connect(self, back: Back, rings: int = 3, resets: int = 1) -> None:
        assert back.number(Request.GET_FEATURES) == OFFERED
        offered = back.number(Request.GET_PROTOCOL_FEATURES)
        assert offered == OFFERED_PROTOCOL
        back.command(Request.SET_PROTOCOL_FEATURES, m.U64(offered & self.protocol))
        assert back.number(Request.GET_QUEUE_NUM) == 64
        assert back.number(Request.GET_MAX_MEM_SLOTS) == 509
        back.command(Request.SET_OWNER)
        assert back.number(Request.GET_FEATURES) == OFFERED
        for index in range(rings):
            back.command(Request.SET_VRING_CALL, VringFd.of(index), need_reply=self.fds_acknowledged)
            back.command(Request.SET_VRING_ERR, VringFd.of(index), need_reply=self.fds_acknowledged)
        for _ in range(resets):
            assert back.command(Request.RESET_DEVICE) == [ResetDevice()]

    def start(
        self,
        back: Back,
        rings: int = 3,
        configured: Sequence[int] = (0, 1, 2),
        features: int = MODERN,
        regions: Sequence[Region] = (RAM, HIGH),
        base: int = 0,
    ) -> list[Effect]:
        """The effects of everything from SET_FEATURES to the real call descriptors."""
        already = len(back.seen)
        for _ in range(2 if self.features_twice else 1):
            back.command(Request.SET_FEATURES, m.U64(features | mask(30)), need_reply=True)
        for region in regions:
            back.command(Request.ADD_MEM_REG, m.SingleRegion.of(region), need_reply=True)
        for index in configured:
            back.command(Request.SET_VRING_NUM, VringState(index, 128))
            back.command(Request.SET_VRING_BASE, VringState(index, base))
            back.command(Request.SET_VRING_ADDR, place(index))
            back.command(Request.SET_VRING_KICK, VringFd.of(index), need_reply=self.fds_acknowledged)
        for index in range(rings):
            back.command(Request.SET_VRING_ENABLE, VringState(index, 1), need_reply=self.enable_acknowledged)
            if not self.enable_acknowledged:
                back.ask(Request.GET_FEATURES)
        for index in range(rings):
            back.command(Request.SET_VRING_CALL, VringFd.of(index), need_reply=self.fds_acknowledged)
        return [effect for effect in back.seen[already:] if not isinstance(effect, Reply | Close)]

    def stop(self, back: Back, rings: int = 3, configured: Sequence[int] = (0, 1, 2), resets: int = 0) -> list[Effect]:
        already = len(back.seen)
        for index in range(rings):
            back.command(Request.SET_VRING_ENABLE, VringState(index, 0), need_reply=self.enable_acknowledged)
        for index in configured:
            expected = back.bases.get(index, 0)
            assert back.ask(Request.GET_VRING_BASE, VringState(index)) == VringState(index, expected)
        for _ in range(resets):
            back.command(Request.RESET_DEVICE)
        return [effect for effect in back.seen[already:] if not isinstance(effect, Reply | Close)]


QEMUS = [
    Qemu("7.2", 0x01FDFF, enable_acknowledged=False, features_twice=False),
    Qemu("10.0", 0x0FFDFF),
    Qemu("11.1", 0x6FFDFF, fds_acknowledged=True),
]
every_qemu = pytest.mark.parametrize("qemu", QEMUS, ids=lambda qemu: qemu.version)


def shape(effects: Sequence[Effect]) -> list[Effect]:
    """Effects with descriptors as 1 (there is one) or -1, to compare."""

    def has(fd: int) -> int:
        return 1 if fd >= 0 else -1

    def flat(effect: Effect) -> Effect:
        match effect:
            case StartRing() as s:
                return StartRing(
                    s.index, s.size, s.desc, s.used, s.avail, s.base, s.features,
                    has(s.kick_fd), has(s.call_fd), has(s.err_fd),
                )  # fmt: skip
            case SetCall(index, fd):
                return SetCall(index, has(fd))
            case SetMemory(regions):
                return SetMemory(tuple(MemoryRegion(region.region, has(region.fd)) for region in regions))
            case _:
                return effect

    return [flat(effect) for effect in effects]


def started(index: int, features: int = MODERN, base: int = 0) -> StartRing:
    at = place(index)
    return StartRing(index, 128, at.desc, at.used, at.avail, base, features, 1, 1, 1)


@every_qemu
def test_connect_and_start(qemu: Qemu) -> None:
    """The effects of a whole start, in order: memory region by region, rings, enable, the guest's call descriptors."""
    with connection() as back:
        qemu.connect(back, resets=2)
        assert repr(back.session) == "<Session OPEN regions=0 rings={}>"

        effects = shape(qemu.start(back))

        assert effects == [
            SetMemory((MemoryRegion(RAM, 1),)),
            SetMemory((MemoryRegion(RAM), MemoryRegion(HIGH, 1))),
            *(started(index) for index in range(3)),
            *(EnableRing(index, enabled=True) for index in range(3)),
            *(SetCall(index, 1) for index in range(3)),
        ]
        assert back.session.active
        assert repr(back.session) == "<Session OPEN regions=2 rings={0: RUNNING, 1: RUNNING, 2: RUNNING}>"


@every_qemu
def test_stop_and_cont(qemu: Qemu) -> None:
    """`stop`, `cont`: rings go on where they were, memory is not sent again, call and err descriptors stay."""
    with connection() as back:
        qemu.connect(back)
        qemu.start(back)
        back.bases = {0: 3, 1: 0, 2: 0xFFFF}

        effects = qemu.stop(back)

        assert effects == [
            *(EnableRing(index, enabled=False) for index in range(3)),
            *(StopRing(index) for index in range(3)),
        ]
        assert not back.session.active
        assert qemu.start(back, regions=())[:3] != []
        assert [ring.state for ring in back.session.rings[:4]] == [RingState.RUNNING] * 3 + [RingState.IDLE]


@every_qemu
def test_a_reset_that_comes_three_times(qemu: Qemu) -> None:
    """system_reset: stop, then RESET_DEVICE up to three times; memory, protocol features, call and err stay."""
    with connection() as back:
        qemu.connect(back)
        qemu.start(back)

        effects = qemu.stop(back, resets=3)

        assert effects[-3:] == [ResetDevice()] * 3
        assert back.session.features == 0
        assert back.session.memory.regions == (RAM, HIGH)
        again = shape(qemu.start(back, regions=()))
        assert again[0] == started(0)
        assert back.session.protocol_features == OFFERED_PROTOCOL


@every_qemu
def test_reboots(qemu: Qemu) -> None:
    """SeaBIOS, Linux, reboot, again: one connection sees many starts and stops."""
    with connection() as back:
        qemu.connect(back, rings=6)
        for boot in range(3):
            regions = (RAM, HIGH) if boot == 0 else ()
            firmware = qemu.start(back, rings=6, configured=[2], features=mask(32), regions=regions)
            assert started(2, features=mask(32)) in shape(firmware)
            back.bases = {2: 265}
            qemu.stop(back, rings=6, configured=[2], resets=2)
            back.bases = dict.fromkeys(range(6), 7)
            qemu.start(back, rings=6, configured=range(6), regions=())
            qemu.stop(back, rings=6, configured=range(6), resets=2)
        assert not back.session.active


@every_qemu
def test_a_front_end_that_comes_back(qemu: Qemu) -> None:
    """A connection that ends in the middle is wound up; the next starts from nothing, at the index it names."""
    with connection() as first:
        qemu.connect(first)
        qemu.start(first)
        assert first.hang_up()[:4] == [StopRing(0), StopRing(1), StopRing(2), SetMemory(())]
        assert first.hang_up() == []
        assert repr(first.session) == "<Session CLOSED regions=0 rings={}>"

    with connection() as second:
        qemu.connect(second, resets=0)
        effects = shape(qemu.start(second, base=0x1234))
        assert started(2, base=0x1234) in effects


# ------------------------------------------------------------------------------------------------ traps


@pytest.fixture
def running() -> Iterator[Back]:
    """QEMU 10.0, three rings running."""
    with connection() as back:
        QEMUS[1].connect(back)
        QEMUS[1].start(back)
        yield back


@pytest.fixture
def connected() -> Iterator[Back]:
    """QEMU 10.0, connected, nothing started."""
    with connection() as back:
        QEMUS[1].connect(back)
        yield back


def test_trap_1_enabling_a_started_ring_always_says_so_to_the_data_path(running: Back) -> None:
    """A kick that came while the ring was disabled is found: each ENABLE is an effect, and it means "look"."""
    for _ in range(2):
        assert running.command(Request.SET_VRING_ENABLE, VringState(2, 1)) == [EnableRing(2, enabled=True)]


def test_trap_1_a_ring_that_is_enabled_before_its_kick_runs_with_the_kick(connected: Back) -> None:
    connected.command(Request.ADD_MEM_REG, m.SingleRegion.of(RAM))
    connected.command(Request.SET_VRING_ENABLE, VringState(2, 1))
    connected.command(Request.SET_VRING_NUM, VringState(2, 128))
    connected.command(Request.SET_VRING_ADDR, place(2))

    effects = shape(connected.command(Request.SET_VRING_KICK, VringFd.of(2)))

    assert effects == [started(2, features=0), EnableRing(2, enabled=True)]


def test_trap_2_a_new_call_descriptor_of_a_running_ring_is_handed_on_at_once(running: Back) -> None:
    """And without one there are no interrupts; the old one is closed after the new is in force."""
    old = running.session.rings[2].call_fd
    (effect,) = running.command(Request.SET_VRING_CALL, VringFd.of(2))
    assert isinstance(effect, SetCall)
    assert effect.fd >= 0
    assert running.seen[-2:] == [effect, Close((old,))]
    assert running.command(Request.SET_VRING_CALL, VringFd.of(2, fd=False)) == [SetCall(2, -1)]


def test_trap_3_rings_that_are_never_configured(connected: Back) -> None:
    """SeaBIOS sets up only ring 2; QEMU enables 0 and 1 all the same, and asks no base of them."""
    effects = shape(QEMUS[1].start(connected, configured=[2], features=mask(32), regions=[RAM]))

    assert effects == [
        SetMemory((MemoryRegion(RAM, 1),)),
        started(2, features=mask(32)),
        EnableRing(2, enabled=True),
        SetCall(2, 1),
    ]
    assert [ring.state for ring in connected.session.rings[:3]] == [RingState.ARMED, RingState.ARMED, RingState.RUNNING]
    assert connected.ask(Request.GET_VRING_BASE, VringState(0)) == VringState(0, 0)


def test_trap_4_the_addresses_of_a_running_ring_may_be_repeated(running: Back) -> None:
    assert running.command(Request.SET_VRING_ADDR, place(2), need_reply=True) == []
    assert running.session.rings[2].started


def test_trap_4_a_running_ring_cannot_move(running: Back) -> None:
    running.send(Request.SET_VRING_ADDR, place(7).__class__(2, 0, place(7).desc, place(7).used, place(7).avail))

    assert running.refused == "SET_VRING_ADDR: ring 2 is running and cannot move"


def test_trap_5_user_addresses_are_opaque(connected: Back) -> None:
    """A front end may use guest addresses as user addresses, or any others."""
    odd = Region(guest_phys=1 << 40, size=1 << 20, user_addr=0, mmap_offset=0)
    connected.command(Request.ADD_MEM_REG, m.SingleRegion.of(odd))
    connected.command(Request.SET_VRING_NUM, VringState(2, 256))
    connected.command(Request.SET_VRING_ADDR, VringAddr(2, 0, desc=0, used=0x2000, avail=0x1000))

    (effect,) = connected.command(Request.SET_VRING_KICK, VringFd.of(2))

    assert isinstance(effect, StartRing)
    assert (effect.desc, effect.avail, effect.used) == (0, 0x1000, 0x2000)


def test_trap_6_what_outlives_a_stop_and_a_reset(running: Back) -> None:
    """Memory, protocol features, call and err descriptors; kick descriptors do not."""
    call, err = running.session.rings[2].call_fd, running.session.rings[2].err_fd
    kick = running.session.rings[2].kick_fd

    QEMUS[1].stop(running, resets=1)

    ring = running.session.rings[2]
    assert (ring.kick_fd, ring.call_fd, ring.err_fd) == (-1, call, err)
    assert any(kick in effect.fds for effect in running.seen if isinstance(effect, Close))
    assert running.session.memory.regions == (RAM, HIGH)


def test_trap_7_a_ring_starts_where_set_vring_base_says(connected: Back) -> None:
    assert started(1, base=0xFFFE) in shape(QEMUS[1].start(connected, base=0xFFFE))


def test_trap_8_the_answer_to_get_vring_base_is_the_data_paths(running: Back) -> None:
    """It knows how many event buffers are parked and takes the base back by as many."""
    running.bases = {1: 0xFFF8}

    assert running.ask(Request.GET_VRING_BASE, VringState(1)) == VringState(1, 0xFFF8)
    assert running.ask(Request.GET_VRING_BASE, VringState(1)) == VringState(1, 0xFFF8), "a stopped ring remembers"


# ------------------------------------------------------------------------------------------------ rings


def test_get_vring_base_is_answered_when_the_ring_is_stopped_and_not_before(running: Back) -> None:
    effects = running.session.receive(as_packet(encode_request(Request.GET_VRING_BASE, VringState(2))))

    assert next(effects) == StopRing(2)
    running.session.ring_stopped(2, 77)
    reply = next(effects)
    assert isinstance(reply, Reply)
    assert decode_reply(Request.GET_VRING_BASE, as_packet(reply.data)) == VringState(2, 77)
    running.run(effects)


def test_a_kick_for_a_running_ring_restarts_it_where_it_is(running: Back) -> None:
    running.bases = {2: 9}
    old = running.session.rings[2].kick_fd

    effects = running.command(Request.SET_VRING_KICK, VringFd.of(2))

    assert shape(effects) == [StopRing(2), started(2, base=9), EnableRing(2, enabled=True)]
    assert running.seen[-1] == Close((old,))
    assert running.session.rings[2].state is RingState.RUNNING


def test_a_ring_without_a_kick_descriptor_is_polled(connected: Back) -> None:
    connected.command(Request.ADD_MEM_REG, m.SingleRegion.of(RAM))
    connected.command(Request.SET_VRING_NUM, VringState(2, 128))
    connected.command(Request.SET_VRING_ADDR, place(2))

    (effect,) = connected.command(Request.SET_VRING_KICK, VringFd.of(2, fd=False))

    assert isinstance(effect, StartRing)
    assert effect.kick_fd == -1


def test_a_new_err_descriptor_of_a_running_ring(running: Back) -> None:
    (effect,) = running.command(Request.SET_VRING_ERR, VringFd.of(2))
    assert isinstance(effect, SetErr)


def test_a_front_end_without_protocol_features_has_all_rings_enabled(connected: Back) -> None:
    connected.command(Request.ADD_MEM_REG, m.SingleRegion.of(RAM))
    connected.command(Request.SET_FEATURES, m.U64(MODERN))
    assert {ring.state for ring in connected.session.rings} == {RingState.ARMED}
    connected.command(Request.SET_VRING_NUM, VringState(2, 128))
    connected.command(Request.SET_VRING_ADDR, place(2))

    effects = shape(connected.command(Request.SET_VRING_KICK, VringFd.of(2)))

    assert effects == [started(2), EnableRing(2, enabled=True)]
    assert connected.command(Request.SET_VRING_ENABLE, VringState(2, 1)) == [EnableRing(2, enabled=True)]


def test_a_legacy_driver_acknowledges_nothing(connected: Back) -> None:
    """OVMF on the root bus: SET_FEATURES is 0x40000000, without VERSION_1."""
    effects = shape(QEMUS[1].start(connected, configured=[2], features=0))

    assert started(2, features=0) in effects


def test_reset_device_stops_what_runs_first(running: Back) -> None:
    effects = running.command(Request.RESET_DEVICE, need_reply=True)

    assert effects == [StopRing(0), StopRing(1), StopRing(2), ResetDevice()]
    assert all(ring.state is RingState.IDLE and ring.base == 0 for ring in running.session.rings)


def test_owner_requests_change_nothing(running: Back) -> None:
    assert running.command(Request.SET_OWNER) == []
    assert running.command(Request.RESET_OWNER) == []
    assert running.session.active


# ------------------------------------------------------------------------------------------------ memory


def test_memory_may_change_while_rings_run(running: Back) -> None:
    dimm = Region(8 << 30, 1 << 30, 0x7FC0_0000_0000, 0)

    added = running.command(Request.ADD_MEM_REG, m.SingleRegion.of(dimm), need_reply=True)
    removed = running.command(Request.REM_MEM_REG, m.SingleRegion.of(dimm), need_reply=True)

    assert shape(added) == [SetMemory((MemoryRegion(RAM), MemoryRegion(HIGH), MemoryRegion(dimm, 1)))]
    assert removed == [SetMemory((MemoryRegion(RAM), MemoryRegion(HIGH)))]


def test_a_whole_table_replaces_everything_and_is_mapped_anew(running: Back) -> None:
    effects = running.command(Request.SET_MEM_TABLE, m.MemoryTable((HIGH, RAM)), need_reply=True)

    assert shape(effects) == [SetMemory((MemoryRegion(HIGH, 1), MemoryRegion(RAM, 1)))]


def test_a_region_is_removed_by_address_and_size_whatever_its_offset_and_with_a_descriptor(running: Back) -> None:
    same = m.SingleRegion(HIGH.guest_phys, HIGH.size, HIGH.user_addr, mmap_offset=12345)

    assert running.send(Request.REM_MEM_REG, same, fds=1) == [SetMemory((MemoryRegion(RAM),))]


def test_509_regions_and_not_one_more(connected: Back) -> None:
    for n in range(509):
        connected.command(Request.ADD_MEM_REG, m.SingleRegion(n << 20, 1 << 20, n << 20, 0))

    connected.send(Request.ADD_MEM_REG, m.SingleRegion(1 << 40, 1 << 20, 1 << 40, 0))

    assert connected.refused == "ADD_MEM_REG: more than 509 regions"


def test_guest_memory_that_is_not_shared_is_recognised(connected: Back) -> None:
    """With memory slots QEMU silently sends no region at all; the start of the first ring shows it."""
    connected.command(Request.SET_VRING_NUM, VringState(2, 128))
    connected.command(Request.SET_VRING_ADDR, place(2))

    connected.send(Request.SET_VRING_KICK, VringFd.of(2))

    assert connected.refused == f"SET_VRING_KICK: {NOT_SHARED}"
    assert "memory-backend-memfd,share=on" in NOT_SHARED


# ------------------------------------------------------------------------------------------------ acknowledgements


def test_need_reply_means_nothing_before_reply_ack_is_negotiated() -> None:
    with connection() as back:
        back.send(Request.SET_OWNER, need_reply=True)
        assert back.replies == []
        back.command(Request.SET_PROTOCOL_FEATURES, m.U64(OFFERED_PROTOCOL))
        back.command(Request.SET_OWNER, need_reply=True)


def test_a_request_with_a_reply_of_its_own_gets_no_second_one(connected: Back) -> None:
    connected.replies.clear()
    connected.send(Request.GET_FEATURES, need_reply=True)
    assert len(connected.replies) == 1


def test_what_the_data_path_could_not_do_is_told_the_front_end_and_ends_the_connection(running: Back) -> None:
    running.failing = (SetMemory, "mapping failed: File too large")
    running.replies.clear()

    done = running.send(Request.ADD_MEM_REG, m.SingleRegion(1 << 40, 4096, 1 << 40, 0), need_reply=True)

    assert [type(effect) for effect in done] == [SetMemory, Reply, Refuse]
    assert decode_reply(Request.ADD_MEM_REG, as_packet(running.replies[0])) == m.U64(1)
    assert running.refused == "ADD_MEM_REG: mapping failed: File too large"
    running.failing = None
    assert running.hang_up()[:3] == [StopRing(0), StopRing(1), StopRing(2)]


def test_a_reply_that_cannot_be_sent_ends_the_connection(connected: Back) -> None:
    connected.failing = (Reply, "the front end closed the connection")

    done = connected.send(Request.SET_OWNER, need_reply=True)

    assert [type(effect) for effect in done] == [Reply, Reply, Refuse]
    assert connected.refused == "SET_OWNER: the front end closed the connection"


def test_a_stop_that_fails_at_the_end_does_not_keep_the_rest_from_being_given_back(running: Back) -> None:
    running.failing = (StopRing, "the worker does not answer")

    assert [type(effect) for effect in running.hang_up()[:4]] == [StopRing, StopRing, StopRing, SetMemory]


def test_a_stop_that_fails_is_asked_for_again_at_the_end(running: Back) -> None:
    running.failing = (StopRing, "the worker does not answer")

    running.send(Request.GET_VRING_BASE, VringState(2))

    assert running.refused == "GET_VRING_BASE: the worker does not answer"
    running.failing = None
    assert running.hang_up()[:3] == [StopRing(0), StopRing(1), StopRing(2)]


@pytest.mark.parametrize("steps", range(4))
def test_the_end_may_come_in_the_middle_of_a_message(running: Back, steps: int) -> None:
    """Cancelled between any two effects, even those of a stop: everything is stopped and closed all the same."""
    running.session.rings[2].call_fd, keep = os.eventfd(0), running.session.rings[2].call_fd
    os.close(keep)
    effects = running.session.receive(as_packet(encode_request(Request.RESET_DEVICE)))
    for _ in range(steps):
        effect = next(effects)
        if isinstance(effect, StopRing) and effect.index == 0:
            running.session.ring_stopped(0, 0)

    ending = running.hang_up()

    assert [effect for effect in ending if isinstance(effect, StopRing)][-2:] == [StopRing(1), StopRing(2)]
    assert SetMemory(()) in ending


# ------------------------------------------------------------------------------------------------ packed rings


def test_a_packed_ring_starts_and_stops_with_both_its_indices() -> None:
    """A base has the avail and the used index, each with its wrap counter (0x80008000 is a fresh ring's)."""
    with connection() as back:
        QEMUS[1].connect(back)
        back.bases = {2: 0x0003_8005}
        started = QEMUS[1].start(back, features=MODERN | mask(30, 34), configured=[2], base=0x80008000)

        (ring,) = [effect for effect in started if isinstance(effect, StartRing)]
        assert ring.base == 0x80008000
        assert ring.features >> 34 & 1
        assert back.ask(Request.GET_VRING_BASE, VringState(2, 0)) == VringState(2, 0x0003_8005)


def test_a_packed_ring_may_have_any_size_and_its_small_parts() -> None:
    """100 entries need 1600 bytes and two areas of 4; as a split ring it would not even be one."""
    with connection() as back:
        QEMUS[1].connect(back)
        back.command(Request.SET_FEATURES, m.U64(MODERN | mask(30, 34)))
        back.command(Request.ADD_MEM_REG, m.SingleRegion(0, 1608, 0, 0))
        back.command(Request.SET_VRING_NUM, VringState(2, 100))
        back.command(Request.SET_VRING_ADDR, VringAddr(2, 0, 0, 1604, 1600))
        back.command(Request.SET_VRING_KICK, VringFd.of(2))


def test_a_packed_ring_larger_than_any_is_refused() -> None:
    with connection() as back:
        back.send(Request.SET_FEATURES, m.U64(MODERN | mask(34)))
        back.send(Request.SET_VRING_NUM, VringState(2, 32769))

        assert back.refused == "SET_VRING_NUM: packed ring 2 with 32769 entries, expected 1 to 32768"


# ------------------------------------------------------------------------------------------------ refusals

REFUSED: list[tuple[str, Request, Payload, str]] = [
    ("protection information", Request.SET_FEATURES, m.U64(MODERN | mask(3, 30)),
     "SET_FEATURES: SCSI_T10_PI (3) is not implemented: set t10_pi=off on QEMU's vhost-user-scsi device"),
    ("an IOMMU", Request.SET_FEATURES, m.U64(MODERN | mask(30, 33)),
     "SET_FEATURES: ACCESS_PLATFORM (33) is not implemented: set iommu_platform=off on QEMU's vhost-user-scsi device"),
    ("several at once", Request.SET_FEATURES, m.U64(mask(3, 33)),
     "SET_FEATURES: SCSI_T10_PI (3), ACCESS_PLATFORM (33) is not implemented: "
     "set t10_pi=off,iommu_platform=off on QEMU's vhost-user-scsi device"),
    ("a feature that was not offered", Request.SET_FEATURES, m.U64(mask(35)),
     "SET_FEATURES: IN_ORDER (35) is not implemented, and was not offered"),
    ("logging", Request.SET_FEATURES, m.U64(mask(26)),
     "SET_FEATURES: LOG_ALL (26) is not implemented, and was not offered"),
    ("a protocol feature that was not offered", Request.SET_PROTOCOL_FEATURES, m.U64(mask(3, 14)),
     "SET_PROTOCOL_FEATURES: INBAND_NOTIFICATIONS (14): not offered"),
    ("the dirty log", Request.SET_LOG_BASE, m.Log(4096),
     "SET_LOG_BASE: it needs the protocol feature LOG_SHMFD (1), which was not negotiated"),
    ("the log's eventfd", Request.SET_LOG_FD, m.Empty(),
     "SET_LOG_FD: not a request for this kind of device, with what was negotiated"),
    ("an IOTLB message", Request.IOTLB_MSG, m.Iotlb(0, 0, 0, 0, 2),
     "IOTLB_MSG: not a request for this kind of device, with what was negotiated"),
    ("the in-flight region", Request.GET_INFLIGHT_FD, m.Inflight(0, 0, 3, 128),
     "GET_INFLIGHT_FD: it needs the protocol feature INFLIGHT_SHMFD (12), which was not negotiated"),
    ("a back-end channel", Request.SET_BACKEND_REQ_FD, m.Empty(),
     "SET_BACKEND_REQ_FD: it needs the protocol feature BACKEND_REQ (5), which was not negotiated"),
    ("configuration space", Request.GET_CONFIG, m.Config(0, 0, bytes(4)),
     "GET_CONFIG: it needs the protocol feature CONFIG (9), which was not negotiated"),
    ("a ring beyond the last", Request.SET_VRING_NUM, VringState(66, 128),
     "SET_VRING_NUM: ring 66, but this device has 66: num_queues may be up to 64"),
    ("a ring of no size", Request.SET_VRING_NUM, VringState(2, 0),
     "SET_VRING_NUM: ring 2 with 0 entries, expected a power of two up to 32768"),
    ("a ring of an odd size", Request.SET_VRING_NUM, VringState(2, 100),
     "SET_VRING_NUM: ring 2 with 100 entries, expected a power of two up to 32768"),
    ("a ring that is too large", Request.SET_VRING_NUM, VringState(2, 65536),
     "SET_VRING_NUM: ring 2 with 65536 entries, expected a power of two up to 32768"),
    ("a packed ring's base", Request.SET_VRING_BASE, VringState(2, 0x80008000),
     "SET_VRING_BASE: ring 2 at 0x80008000, the index of a split ring has 16 bits"),
    ("a misaligned ring", Request.SET_VRING_ADDR, VringAddr(2, 0, 0x1008, 0x3000, 0x2000),
     "SET_VRING_ADDR: ring 2 is misaligned: descriptors 0x1008, available 0x2000, used 0x3000"),
    ("a logged ring", Request.SET_VRING_ADDR, VringAddr(2, 1, 0x1000, 0x3000, 0x2000),
     "SET_VRING_ADDR: ring 2 with flags 0x1, but LOG_ALL was not negotiated"),
    ("a kick before the set-up", Request.SET_VRING_KICK, VringFd.of(2),
     "SET_VRING_KICK: ring 2 has no size or no addresses yet"),
    ("an enable that is neither", Request.SET_VRING_ENABLE, VringState(2, 2),
     "SET_VRING_ENABLE: ring 2 to be 2, expected 0 or 1"),
    ("an empty region", Request.ADD_MEM_REG, m.SingleRegion(4096, 0, 4096, 0),
     "ADD_MEM_REG: the region of 0x0 bytes at guest address 0x1000 is empty"),
    ("a region that wraps", Request.ADD_MEM_REG, m.SingleRegion(0, 4096, 2**64 - 4095, 0),
     "ADD_MEM_REG: the region of 0x1000 bytes at guest address 0x0 wraps around"),
    ("overlapping regions", Request.SET_MEM_TABLE, m.MemoryTable((RAM, Region(4096, 4096, 0, 0))),
     "SET_MEM_TABLE: the region of 0x1000 bytes at guest address 0x1000 overlaps "
     "the region of 0x40000000 bytes at guest address 0x0"),
    ("a region that is not there", Request.REM_MEM_REG, m.SingleRegion.of(RAM),
     "REM_MEM_REG: the region of 0x40000000 bytes at guest address 0x0 is not in the table"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "payload", "text"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_refused_with_one_line_that_names_it(connected: Back, request_: Request, payload: Payload, text: str) -> None:
    connected.send(request_, payload)

    assert connected.refused == text
    assert connected.session.state is SessionState.REFUSED
    assert connected.send(Request.SET_VRING_CALL, VringFd.of(0)) == [], "nothing more is listened to"


RUNNING_REFUSED: list[tuple[str, Request, Payload, str]] = [
    ("another size", Request.SET_VRING_NUM, VringState(2, 64), "SET_VRING_NUM: ring 2 is running"),
    ("another base", Request.SET_VRING_BASE, VringState(2, 64), "SET_VRING_BASE: ring 2 is running"),
    ("other features", Request.SET_FEATURES, m.U64(mask(30, 32)),
     "SET_FEATURES: features 0x100000000 while rings run with 0x130000006"),
    ("memory taken away", Request.REM_MEM_REG, m.SingleRegion.of(RAM),
     "REM_MEM_REG: ring 0's descriptor table, 2048 bytes at user address 0x7f0000010000, is outside guest memory"),
    ("memory replaced", Request.SET_MEM_TABLE, m.MemoryTable((HIGH,)),
     "SET_MEM_TABLE: ring 0's descriptor table, 2048 bytes at user address 0x7f0000010000, is outside guest memory"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "payload", "text"), [case[1:] for case in RUNNING_REFUSED], ids=[case[0] for case in RUNNING_REFUSED]
)
def test_refused_while_rings_run(running: Back, request_: Request, payload: Payload, text: str) -> None:
    running.send(request_, payload)

    assert running.refused == text


def test_the_features_of_running_rings_may_be_repeated(running: Back) -> None:
    assert running.command(Request.SET_FEATURES, m.U64(MODERN | mask(30)), need_reply=True) == []


@pytest.mark.parametrize(
    ("part", "addresses"),
    [
        ("descriptor table, 2048 bytes at user address 0x1000", VringAddr(2, 0, 0x1000, RAM.user_addr, RAM.user_addr)),
        ("used ring, 1030 bytes", VringAddr(2, 0, RAM.user_addr, RAM.user_addr + RAM.size - 1028, RAM.user_addr)),
        ("available ring, 262 bytes", VringAddr(2, 0, RAM.user_addr, RAM.user_addr, RAM.user_addr - 2)),
    ],
)
def test_ring_parts_outside_guest_memory(connected: Back, part: str, addresses: VringAddr) -> None:
    connected.command(Request.ADD_MEM_REG, m.SingleRegion.of(RAM))
    connected.command(Request.SET_VRING_NUM, VringState(2, 128))
    connected.command(Request.SET_VRING_ADDR, addresses)

    connected.send(Request.SET_VRING_KICK, VringFd.of(2))

    assert connected.refused is not None
    assert connected.refused.startswith(f"SET_VRING_KICK: ring 2's {part}")
    assert connected.refused.endswith("is outside guest memory")


def test_a_refused_request_that_wanted_an_acknowledgement_gets_a_bad_one_first(connected: Back) -> None:
    connected.replies.clear()

    done = connected.send(Request.SET_FEATURES, m.U64(mask(33)), need_reply=True)

    assert [type(effect) for effect in done] == [Reply, Refuse]
    assert decode_reply(Request.SET_FEATURES, as_packet(connected.replies[0])) == m.U64(1)


def test_a_message_that_cannot_be_read_is_refused_and_its_descriptors_closed(connected: Back) -> None:
    connected.send(Request.SET_VRING_KICK, VringFd.of(2), fds=3)

    assert connected.refused == "SET_VRING_KICK: 3 file descriptors, expected 1"


def test_a_device_has_at_most_256_rings() -> None:
    assert len(Session(254).rings) == 256
    for queues in (0, 255):
        with pytest.raises(ValueError, match="request rings, a device has 1 to 254"):
            Session(queues)


def test_callers_that_break_the_rules_hear_of_it(running: Back) -> None:
    with pytest.raises(RuntimeError, match="ring 2 was not to be stopped"):
        running.session.ring_stopped(2, 0)
    effects = running.session.receive(as_packet(encode_request(Request.GET_VRING_BASE, VringState(2))))
    with pytest.raises(RuntimeError, match="were not carried out"):
        running.session.receive(as_packet(encode_request(Request.SET_OWNER)))
    running.run(effects)


# ------------------------------------------------------------------------------------------------ any front end

small = st.integers(0, 4)
region = st.sampled_from(
    [RAM, HIGH, Region(0, 4096, 0, 0), Region(8 << 30, 4096, 0x1000, 0), Region(5, 0, 5, 5), Region(1, 2**64 - 1, 1, 1)]
)
plausible: st.SearchStrategy[tuple[Request, Payload]] = st.one_of(
    st.tuples(st.just(Request.SET_FEATURES), st.sampled_from([m.U64(MODERN), m.U64(MODERN | mask(30)), m.U64(0)])),
    st.tuples(st.just(Request.SET_PROTOCOL_FEATURES), st.just(m.U64(OFFERED_PROTOCOL))),
    st.tuples(st.just(Request.SET_MEM_TABLE), st.lists(region, max_size=2).map(lambda r: m.MemoryTable(tuple(r)))),
    st.tuples(st.sampled_from([Request.ADD_MEM_REG, Request.REM_MEM_REG]), region.map(m.SingleRegion.of)),
    st.tuples(st.just(Request.SET_VRING_NUM), st.builds(VringState, small, st.sampled_from([0, 1, 128, 32768, 65536]))),
    st.tuples(st.just(Request.SET_VRING_ADDR), small.map(place)),
    st.tuples(st.just(Request.SET_VRING_BASE), st.builds(VringState, small, st.integers(0, 0x10000))),
    st.tuples(st.just(Request.SET_VRING_ENABLE), st.builds(VringState, small, st.integers(0, 2))),
    st.tuples(st.just(Request.GET_VRING_BASE), st.builds(VringState, small)),
    st.tuples(
        st.sampled_from([Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]),
        st.builds(lambda index, fd: VringFd.of(index, fd=fd), small, st.booleans()),
    ),
    st.tuples(
        st.sampled_from([Request.RESET_DEVICE, Request.SET_OWNER, Request.RESET_OWNER, Request.GET_FEATURES]),
        st.just(m.Empty()),
    ),
)
anything = st.builds(
    lambda number, flags, body, fds: (Header(number, flags, len(body)).pack() + body, fds),
    st.integers(0, 50),
    st.sampled_from([1, 9, 0, 5, 0xFF]),
    st.binary(max_size=80),
    st.integers(0, 8),
)


@settings(max_examples=200, deadline=None)
@given(
    st.booleans(),
    st.lists(plausible, max_size=30),
    st.lists(anything, max_size=2),
    st.integers(0, 30),
    st.sampled_from([None, SetMemory, StartRing, EnableRing, SetCall, StopRing, Reply]),
    st.randoms(),
)
def test_no_front_end_raises_or_leaks(
    start: bool,
    requests_: list[tuple[Request, Payload]],
    junk: list[tuple[bytes, int]],
    at: int,
    failing: type | None,
    dice: random.Random,
) -> None:
    """Any sequence, with junk somewhere in it, effects that fail and ends in the middle of a message."""
    with no_leak():
        session = Session(max_queues=3)
        back = Back(session)
        back.command(Request.SET_PROTOCOL_FEATURES, m.U64(OFFERED_PROTOCOL))
        if start:
            QEMUS[1].start(back)
        packets = [
            (
                encode_request(request, payload, need_reply=dice.random() < 0.5),
                FRONT_END[request].fds[0] if payload.fd_count is None else payload.fd_count,
            )
            for request, payload in requests_
        ]
        packets[at:at] = junk
        for data, fds in packets:
            if failing and dice.random() < 0.05:
                back.failing = (failing, "made to fail")
            effects = session.receive(as_packet(data, [os.eventfd(0) for _ in range(fds)]))
            if dice.random() < 0.02:
                break
            back.run(effects)
            started_ = [ring for ring in session.rings if ring.started]
            assert session.active == bool(started_)
            packed = bool(session.features >> 34 & 1)
            assert all(
                session.memory.covers(where, size) for ring in started_ for _, where, size in ring.parts(packed=packed)
            )
        back.failing = None
        ending = back.hang_up()
        assert session.state is SessionState.CLOSED
        assert not session.active
        assert not any(isinstance(effect, Reply | StartRing) for effect in ending)
