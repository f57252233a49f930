"""A guest as far as the data path sees one: memory in a memfd, and a driver of split virtqueues."""

from __future__ import annotations

import mmap
import os
import select
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import pytest

from vhostfc import native
from vhostfc.native import Engine, Event, EventKind, Map, Medium, MediumKind, Memory, RingRole, RingSetup

RAM = 8 << 20
GPA, UADDR = 0x1000_0000, 0x7F00_0000_0000
RING_BYTES = 0x10000
RING_SIZE = 64
INDIRECT_DESC, EVENT_IDX = 1 << 28, 1 << 29
NEXT, WRITE, INDIRECT = 1, 2, 4

READ_10, WRITE_10, SYNCHRONIZE_CACHE_10 = 0x28, 0x2A, 0x35
FAST = bytes(
    sum(1 << op % 8 for op in (0x08, 0x0A, 0x28, 0x2A, 0x35, 0x88, 0x8A, 0x91, 0xA8, 0xAA) if op // 8 == byte)
    for byte in range(32)
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A used entry, and what the device wrote for it."""

    head: int
    length: int
    response: int
    status: int
    residual: int
    sense: bytes
    data_in: bytes


class Ram:
    """Guest memory in a memfd; address() hands out pieces that are never given back."""

    def __init__(self, size: int = RAM) -> None:
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.bytes = mmap.mmap(self.fd, size)
        self.size = size
        self._next = 0x100000

    def map(self) -> Map:
        return Map(self.fd, gpa=GPA, size=self.size, uaddr=UADDR)

    def address(self, size: int) -> int:
        at = self._next
        self._next += (size + 63) & ~63
        return GPA + at

    def write(self, gpa: int, data: bytes) -> None:
        self.bytes[gpa - GPA : gpa - GPA + len(data)] = data

    def read(self, gpa: int, size: int) -> bytes:
        return self.bytes[gpa - GPA : gpa - GPA + size]

    def close(self) -> None:
        self.bytes.close()
        os.close(self.fd)


class Driver:
    """The driver's side of one ring."""

    def __init__(self, ram: Ram, index: int, *, size: int = RING_SIZE, features: int = INDIRECT_DESC) -> None:
        self.ram, self.index, self.size, self.features = ram, index, size, features
        self.at = GPA + index * RING_BYTES
        self.avail, self.used = self.at + 0x4000, self.at + 0x8000
        self.avail_index = self.used_index = 0
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._free = list(range(size))
        self._chains: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}

    def setup(self, role: RingRole, base: int = 0) -> RingSetup:
        user = UADDR - GPA
        return RingSetup(
            role,
            self.size,
            self.at + user,
            self.avail + user,
            self.used + user,
            self.features,
            base,
            self.kick,
            self.call,
            self.err,
        )

    def add(self, readable: Sequence[bytes], writable: Sequence[int]) -> int:
        """Make a chain available: pieces to read, sizes to write.  Its head."""
        pieces: list[tuple[int, int, int]] = []
        places: list[tuple[int, int]] = []
        for data in readable:
            at = self.ram.address(len(data))
            self.ram.write(at, data)
            pieces.append((at, len(data), 0))
        for size in writable:
            at = self.ram.address(size)
            pieces.append((at, size, WRITE))
            places.append((at, size))
        heads = [self._free.pop(0) for _ in pieces]
        for n, (at, size, flags) in enumerate(pieces):
            last = n == len(pieces) - 1
            self.descriptor(heads[n], at, size, flags | (0 if last else NEXT), 0 if last else heads[n + 1])
        self._chains[heads[0]] = (heads, places)
        self.offer(heads[0])
        return heads[0]

    def descriptor(self, index: int, at: int, size: int, flags: int, following: int = 0) -> None:
        self.ram.write(self.at + 16 * index, struct.pack("<QIHH", at, size, flags, following))

    def offer(self, head: int) -> None:
        self.ram.write(self.avail + 4 + 2 * (self.avail_index % self.size), struct.pack("<H", head))
        self.avail_index = (self.avail_index + 1) & 0xFFFF
        self.ram.write(self.avail + 2, struct.pack("<H", self.avail_index))

    def notify(self) -> None:
        os.eventfd_write(self.kick, 1)

    def take(self) -> tuple[int, int, bytes] | None:
        """The next used entry: head, length, and what its writable pieces hold."""
        if struct.unpack("<H", self.ram.read(self.used + 2, 2))[0] == self.used_index:
            return None
        head, length = struct.unpack("<II", self.ram.read(self.used + 4 + 8 * (self.used_index % self.size), 8))
        self.used_index = (self.used_index + 1) & 0xFFFF
        heads, places = self._chains.pop(head)
        self._free.extend(heads)
        return head, length, b"".join(self.ram.read(at, size) for at, size in places)

    def wait(self, timeout: float = 10.0) -> tuple[int, int, bytes]:
        """take(), waiting for the interrupt; TimeoutError."""
        while (taken := self.take()) is None:
            ready, _, _ = select.select([self.call], [], [], timeout)
            if not ready:
                raise TimeoutError(f"ring {self.index}: nothing came back")
            os.eventfd_read(self.call)
        return taken

    def command(
        self,
        cdb: bytes,
        *,
        out: bytes = b"",
        room: int = 0,
        target: int = 0,
        lun: int = 0,
        tag: int = 1,
        attribute: int = 0,
    ) -> int:
        """A virtio-scsi command; its head."""
        address = bytes([1, target, 0x40 | lun >> 8, lun & 0xFF, 0, 0, 0, 0])
        header = address + struct.pack("<QBBB", tag, attribute, 0, 0) + cdb.ljust(32, b"\0")
        head = self.add([header, out] if out else [header], [108, room] if room else [108])
        self.notify()
        return head

    def answer(self) -> Answer:
        head, length, written = self.wait()
        sense_length, residual, _, status, response = struct.unpack_from("<IIHBB", written)
        return Answer(head, length, response, status, residual, written[12 : 12 + sense_length], written[108:])

    def close(self) -> None:
        for fd in (self.kick, self.call, self.err):
            os.close(fd)


class Host:
    """An engine with one worker on a guest, and the daemon's end of its mailbox."""

    def __init__(self, engine: Engine, ram: Ram) -> None:
        self.engine, self.ram = engine, ram
        self.events: list[Event] = []
        self.drivers: list[Driver] = []
        self._seq = count(1)
        with ram.map() as region, Memory([region]) as memory:
            assert self.ask(lambda seq: engine.set_memory(0, seq, memory)).result == 0
        assert self.ask(lambda seq: engine.target(0, seq, 0, present=True)).result == 0

    def ask(self, post: Callable[[int], None]) -> Event:
        """Post a message and wait for its ack; what else comes is kept in events."""
        seq = next(self._seq)
        post(seq)
        while True:
            event = self.next()
            if event.kind is EventKind.ACK and event.seq == seq:
                return event
            self.events.append(event)

    def next(self, timeout: float = 10.0) -> Event:
        while (event := self.engine.next(0)) is None:
            if not select.select([self.engine.fd(0)], [], [], timeout)[0]:
                raise TimeoutError("the worker says nothing")
        return event

    def event(self) -> Event:
        """The next event that is no ack."""
        return self.events.pop(0) if self.events else self.next()

    def ring(self, index: int = 2, role: RingRole = RingRole.REQUEST, **options: int) -> Driver:
        driver = Driver(self.ram, index, **options)
        self.drivers.append(driver)
        assert self.ask(lambda seq: self.engine.ring_start(0, seq, index, driver.setup(role))).result == 0
        assert self.ask(lambda seq: self.engine.ring_enable(0, seq, index, enabled=True)).result == 0
        return driver

    def route(self, medium: Medium | None, *, lun: int = 0, mask: bytes = FAST, read_only: bool = False) -> Event:
        return self.ask(lambda seq: self.engine.route(0, seq, 0, lun, mask=mask, medium=medium, read_only=read_only))

    def stats(self) -> native.Stats:
        return self.engine.stats(0)


@pytest.fixture
def ram() -> Iterator[Ram]:
    memory = Ram()
    yield memory
    memory.close()


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as started:
        yield started


@pytest.fixture
def make_host(ram: Ram) -> Iterator[Callable[..., Host]]:
    """Makes hosts; the options are the engine's."""
    made: list[Host] = []

    def make(**options: bool) -> Host:
        made.append(Host(Engine(**options), ram))
        return made[-1]

    yield make
    for host in made:
        host.engine.close()
        for driver in host.drivers:
            driver.close()


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    return make_host()


@pytest.fixture
def memory_medium() -> Iterator[Callable[..., tuple[Medium, mmap.mmap]]]:
    """Makes media of memory; each with its bytes as Python sees them."""
    made: list[tuple[Medium, mmap.mmap, int, int]] = []

    def make(blocks: int = 1024, block_size: int = 512, owner: int = 2) -> tuple[Medium, mmap.mmap]:
        fd, latch = os.memfd_create("unit"), os.memfd_create("latch")
        os.ftruncate(fd, blocks * block_size)
        os.ftruncate(latch, native.LATCH_BYTES)
        medium = Medium(MediumKind.MEMORY, blocks=blocks, block_size=block_size, owner=owner, fd=fd, latch_fd=latch)
        made.append((medium, mmap.mmap(fd, blocks * block_size), fd, latch))
        return medium, made[-1][1]

    yield make
    for medium, view, fd, latch in made:
        medium.close()
        view.close()
        os.close(fd)
        os.close(latch)
