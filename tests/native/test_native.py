"""native.py against a guest in a memfd: each wrapper says to C what it means, and C's answer comes back whole."""

from __future__ import annotations

import errno
import mmap
import os
import select
import signal
import struct
from collections.abc import Callable
from typing import Any

import pytest

from vhostfc import native
from vhostfc.native import (
    Engine,
    EventKind,
    InFlight,
    Latch,
    Map,
    Match,
    Medium,
    MediumKind,
    Memory,
    RingRole,
    Why,
)

Host = Any  # the fixture's class lives in conftest.py
MakeMedium = Callable[..., tuple[Medium, mmap.mmap]]

INQUIRY = b"\x12"
READ_10, WRITE_10 = 0x28, 0x2A


def rw(opcode: int, lba: int, blocks: int) -> bytes:
    """READ(10) or WRITE(10)."""
    return struct.pack(">BBIBHB", opcode, 0, lba, 0, blocks, 0)


# ---------------------------------------------------------------- memory, latch, medium


def test_map_refuses_what_cannot_be_mapped() -> None:
    """The error names the region."""
    fd = os.memfd_create("small")
    os.ftruncate(fd, 4096)
    with pytest.raises(OSError, match="mapping 0x2000 bytes of guest memory at 0x1000 from offset 0x0") as caught:
        Map(fd, gpa=0x1000, size=0x2000, uaddr=0)
    assert caught.value.errno == errno.EFBIG
    with pytest.raises(OSError, match="mapping 0x0 bytes") as caught:
        Map(fd, gpa=0, size=0, uaddr=0)
    assert caught.value.errno == errno.EINVAL
    os.close(fd)


def test_memory_is_a_table_of_maps() -> None:
    """covers() speaks of user addresses; regions may not overlap; closed things say so."""
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 0x4000)
    first = Map(fd, gpa=0, size=0x2000, uaddr=0x10000)
    second = Map(fd, gpa=0x2000, size=0x2000, uaddr=0x20000, offset=0x2000)
    os.close(fd)
    with Memory([first, second]) as memory:
        assert memory.covers(0x10000, 0x2000)
        assert not memory.covers(0x10000, 0x2001)
        assert memory.covers(0x21FFF, 1)
    with pytest.raises(ValueError, match="Memory is closed"):
        memory.covers(0, 0)
    with pytest.raises(OSError, match="a table of 2 regions") as caught:
        Memory([first, first])
    assert caught.value.errno == errno.EINVAL
    first.close()
    second.close()
    second.close()
    with pytest.raises(ValueError, match="Map is closed"):
        Memory([second])


def test_latch() -> None:
    """take() names the holder; free() and recover() give back."""
    fd = os.memfd_create("latch")
    with pytest.raises(OSError, match="range latch"):
        Latch(fd)
    os.ftruncate(fd, native.LATCH_BYTES)
    with Latch(fd) as ours, Latch(fd) as theirs:
        os.close(fd)
        assert ours.take(1, 0, 2 * native.LATCH_STRIPE) is None
        assert theirs.take(5, native.LATCH_STRIPE, 512) == 1
        ours.free(1, native.LATCH_STRIPE, 1)
        assert theirs.take(5, native.LATCH_STRIPE, 512) is None
        assert ours.recover(5) == 1
        assert ours.recover(1) == 1


def test_medium_refuses_what_it_cannot_be() -> None:
    with pytest.raises(OSError, match=r"opening a medium \(null, 8 blocks of 100 bytes\)"):
        Medium(MediumKind.NULL, blocks=8, block_size=100)
    with Medium(MediumKind.NULL, blocks=8, block_size=4096) as medium:
        assert (medium.blocks, medium.block_size) == (8, 4096)


# ---------------------------------------------------------------- the engine


def test_engine_refuses_no_workers() -> None:
    with pytest.raises(OSError, match="starting 0 worker threads"):
        Engine(0)


def test_closed_engine() -> None:
    """close() twice is once."""
    engine = Engine(2)
    with pytest.raises(OSError, match="worker 2"):
        engine.fd(2)
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.fd(0)


def test_without_uring() -> None:
    with Engine(uring=False) as engine:
        assert not engine.uses_uring


def test_fd_is_readable_when_there_is_something(engine: Engine) -> None:
    assert not select.select([engine.fd(0)], [], [], 0)[0]
    engine.ping(0, 7)
    assert select.select([engine.fd(0)], [], [], 10)[0]
    event = engine.next(0)
    assert event is not None
    assert (event.kind, event.seq, event.result) == (EventKind.ACK, 7, 0)
    assert engine.next(0) is None
    assert not select.select([engine.fd(0)], [], [], 0)[0]


def test_write_then_read(host: Host, memory_medium: MakeMedium) -> None:
    """The fast path, end to end."""
    medium, view = memory_medium()
    assert host.route(medium).result == 0
    ring = host.ring()
    data = os.urandom(8 * 512)
    ring.command(rw(WRITE_10, 3, 8), out=data)
    answer = ring.answer()
    assert (answer.response, answer.status, answer.length) == (0, 0, 108)
    assert view[3 * 512 : 11 * 512] == data
    ring.command(rw(READ_10, 3, 8), room=len(data))
    answer = ring.answer()
    assert (answer.response, answer.status, answer.length) == (0, 0, 108 + len(data))
    assert answer.data_in == data
    stats = host.stats()
    assert (stats.fast, stats.read_bytes, stats.written_bytes, stats.in_flight) == (2, 4096, 4096, 0)


@pytest.mark.parametrize("uring", [True, False])
def test_file(ram: Any, make_host: Callable[..., Host], uring: bool) -> None:
    """A file through io_uring, or through the pool."""
    host = make_host(uring=uring)
    fd, latch = os.memfd_create("file"), os.memfd_create("latch")
    os.ftruncate(fd, 64 * 4096)
    os.ftruncate(latch, native.LATCH_BYTES)
    medium = Medium(MediumKind.FILE, blocks=64, block_size=4096, owner=2, fd=fd, latch_fd=latch)
    assert host.route(medium).result == 0
    medium.close()
    ring = host.ring()
    data = os.urandom(4096)
    ring.command(rw(WRITE_10, 5, 1), out=data)
    assert ring.answer().length == 108
    assert os.pread(fd, 4096, 5 * 4096) == data
    ring.command(rw(READ_10, 5, 1), room=4096)
    assert ring.answer().data_in == data
    ring.command(b"\x35".ljust(10, b"\0"))
    assert (ring.answer().status, host.stats().fast) == (0, 3)
    os.close(fd)
    os.close(latch)


def test_punt_and_reply(host: Host) -> None:
    """All of a command reaches Python, all of the answer the guest."""
    ring = host.ring()
    cdb = bytes(range(0x50, 0x60))
    ring.command(cdb, out=b"parameters", lun=300, tag=0xFEDC_BA98_7654_3210, attribute=2)
    event = host.event()
    assert event.kind is EventKind.PUNT
    assert event.why is Why.NO_ROUTE
    assert (event.target, event.lun) == (0, bytes([1, 0, 0x41, 0x2C, 0, 0, 0, 0]))
    assert (event.tag, event.attribute) == (0xFEDC_BA98_7654_3210, 2)
    assert event.cdb == cdb.ljust(32, b"\0")
    assert (event.data_in_length, event.data_out) == (0, b"parameters")
    assert host.engine.reply(event.handle, status=2, status_qualifier=3, residual=10, sense=b"\x70sense")
    answer = ring.answer()
    assert (answer.response, answer.status, answer.residual, answer.sense) == (0, 2, 10, b"\x70sense")
    assert not host.engine.reply(event.handle)
    ring.command(INQUIRY, room=36)
    event = host.event()
    assert (event.data_in_length, event.data_out) == (36, b"")
    assert host.engine.reply(event.handle, data_in=b"disk", residual=32)
    answer = ring.answer()
    assert (answer.length, answer.data_in[:4]) == (108 + 4, b"disk")
    ring.command(INQUIRY, room=36)
    assert host.engine.reply(host.event().handle, response=3)
    assert ring.answer().response == 3


def test_reply_to_nothing(engine: Engine) -> None:
    assert not engine.reply(0)
    with pytest.raises(OSError, match="answering a punted command"):
        engine.reply(63 << 23)


def test_control(host: Host) -> None:
    ring = host.ring(0, RingRole.CONTROL)
    ring.add([struct.pack("<II8sQ", 0, 5, bytes([1, 0, 0x40, 0, 0, 0, 0, 0]), 9)], [1])
    ring.notify()
    event = host.event()
    assert event.kind is EventKind.CONTROL
    assert (len(event.data_out), event.data_in_length, event.index) == (24, 1, 0)
    assert host.engine.reply_control(event.handle, b"\x0a")
    assert ring.wait()[1:] == (1, b"\x0a")
    assert not host.engine.reply_control(event.handle, b"\x0a")


def test_events(host: Host) -> None:
    """Without a buffer the ack says 0, and BUFFERS follows when there is one."""
    event = bytes(range(16))
    assert host.ask(lambda seq: host.engine.event(0, seq, event)).value == 0
    ring = host.ring(1, RingRole.EVENT)
    ring.add([], [16])
    ring.notify()
    assert host.event().kind is EventKind.BUFFERS
    assert host.ask(lambda seq: host.engine.event(0, seq, event)).value == 1
    assert ring.wait()[1:] == (16, event)


def test_targets_come_and_go(host: Host) -> None:
    ring = host.ring()
    ring.command(INQUIRY, room=36, target=9)
    assert ring.answer().response == 3
    assert host.ask(lambda seq: host.engine.target(0, seq, 9, present=True)).result == 0
    ring.command(INQUIRY, room=36, target=9)
    assert host.event().target == 9
    assert host.ask(lambda seq: host.engine.target(0, seq, 9, present=False)).result == 0
    assert host.ask(lambda seq: host.engine.target(0, seq, 256, present=True)).result == -errno.EINVAL


def test_routes_come_and_go(host: Host, memory_medium: MakeMedium) -> None:
    medium, _ = memory_medium()
    ring = host.ring()
    assert host.route(medium, read_only=True).result == 0
    ring.command(rw(WRITE_10, 0, 1), out=bytes(512))
    event = host.event()
    assert event.why is Why.OPCODE
    assert host.engine.reply(event.handle)
    ring.answer()
    assert host.ask(lambda seq: host.engine.route(0, seq, 0, 0, gone=True, in_flight=InFlight.RESET)).result == 0
    ring.command(rw(READ_10, 0, 1), room=512)
    assert host.event().why is Why.NO_ROUTE


def test_abort_and_query(host: Host) -> None:
    engine = host.engine
    ring = host.ring()
    for tag in (1, 2):
        ring.command(INQUIRY, room=36, tag=tag, lun=tag)
    handles = [host.event().handle for _ in range(2)]
    for match, count in (
        (Match(), 2),
        (Match(target=0), 2),
        (Match(target=1), 0),
        (Match(target=0, lun=2), 1),
        (Match(target=0, lun=2, tag=1), 0),
    ):
        assert host.ask(lambda seq, match=match: engine.query(0, seq, match)).value == count
    assert host.ask(lambda seq: engine.abort(0, seq, Match(target=0, lun=2, tag=2, response=2))).value == 1
    assert ring.answer().response == 2
    assert not engine.reply(handles[1])
    assert engine.reply(handles[0])
    assert ring.answer().response == 0


def test_ring_life(host: Host) -> None:
    """Start, stop, start again; the call eventfd is written when it is new; reset wants stopped rings."""
    engine = host.engine
    ring = host.ring()
    assert host.ask(lambda seq: engine.ring_start(0, seq, 2, ring.setup(RingRole.REQUEST))).result == -errno.EBUSY
    assert host.ask(lambda seq: engine.reset(0, seq)).result == -errno.EBUSY
    assert host.ask(lambda seq: engine.ring_call(0, seq, 2, ring.call)).result == 0
    assert os.eventfd_read(ring.call) == 1
    assert host.ask(lambda seq: engine.ring_err(0, seq, 2, -1)).result == 0
    ring.command(INQUIRY, room=36, target=1)
    ring.answer()
    assert host.ask(lambda seq: engine.ring_stop(0, seq, 2, 0.5)).value == 1
    assert host.ask(lambda seq: engine.ring_start(0, seq, 2, ring.setup(RingRole.REQUEST, base=1))).result == 0
    assert host.ask(lambda seq: engine.ring_enable(0, seq, 2, enabled=False)).result == 0
    ring.command(INQUIRY, room=36, target=1)
    assert host.ask(lambda seq: engine.ping(0, seq)).result == 0
    assert ring.take() is None
    assert host.ask(lambda seq: engine.ring_enable(0, seq, 2, enabled=True)).result == 0
    assert ring.answer().response == 3
    assert host.ask(lambda seq: engine.ring_stop(0, seq, 2, 0)).value == 2
    assert host.ask(lambda seq: engine.reset(0, seq)).result == 0


def test_ring_outside_memory(host: Host, ram: Any) -> None:
    """The ack says so; nothing runs."""
    with Memory([]) as nothing:
        assert host.ask(lambda seq: host.engine.set_memory(0, seq, nothing)).result == 0
    with pytest.raises(AssertionError):
        host.ring()
    driver = host.drivers[0]
    ack = host.ask(lambda seq: host.engine.ring_start(0, seq, 2, driver.setup(RingRole.REQUEST)))
    assert ack.result == -errno.EFAULT


def test_broken_ring(host: Host) -> None:
    ring = host.ring()
    ring.offer(999)
    ring.notify()
    event = host.event()
    assert (event.kind, event.index, event.result) == (EventKind.BROKEN, 2, -errno.EINVAL)
    assert os.eventfd_read(ring.err) == 1
    assert host.stats().broken_rings == 1


def test_message_to_nobody(engine: Engine) -> None:
    with pytest.raises(OSError, match="worker 1"):
        engine.ping(1, 1)
    with pytest.raises(OSError, match="worker 1"):
        engine.stats(1)


def test_latch_of_a_killed_process(host: Host, memory_medium: MakeMedium) -> None:
    """A command waits for a latch that nobody will free, until the fabric recovers it."""
    latch_fd = os.memfd_create("latch")
    os.ftruncate(latch_fd, native.LATCH_BYTES)
    fd = os.memfd_create("unit")
    os.ftruncate(fd, 512 * 8)
    medium = Medium(MediumKind.MEMORY, blocks=8, block_size=512, owner=2, fd=fd, latch_fd=latch_fd)
    latch = Latch(latch_fd)
    child = os.fork()
    if not child:
        latch.take(40, 0, 512)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert host.route(medium).result == 0
    ring = host.ring()
    ring.command(rw(READ_10, 0, 1), room=512)
    event = host.event()
    assert (event.kind, event.value) == (EventKind.LATCH, 40)
    assert ring.take() is None
    assert latch.recover(40) == 1
    assert ring.answer().status == 0
    latch.close()
    medium.close()
    os.close(fd)
    os.close(latch_fd)
