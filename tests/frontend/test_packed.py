"""The driver's packed ring, bit by bit: what virtio 1.3, 2.8 says of flags, wrap counters and event suppression."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostfc.frontend.memory import GuestMemory
from vhostfc.frontend.packed import AT, AVAIL, DESCRIPTOR, DISABLE, ENABLE, USED, WRAP, PackedRing, table
from vhostfc.frontend.ring import INDIRECT, NEXT, WRITE, RingError, fence


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory()
    memory.add(1 << 20)
    yield memory
    memory.close()


def descriptor(ring: PackedRing, index: int) -> tuple[int, int, int, int]:
    """(address, length, id, flags)."""
    found: tuple[int, int, int, int] = DESCRIPTOR.unpack_from(ring.desc.view, 16 * index)
    return found


class Device:
    """The far side: takes buffers in order, uses them in any."""

    def __init__(self, ring: PackedRing) -> None:
        self.ring = ring
        self.next, self.wrap = 0, True
        self.at, self.at_wrap = 0, True

    def fetch(self) -> tuple[int, int] | None:
        """(id, descriptors) of the next buffer."""
        count = 0
        while True:
            _, _, number, flags = descriptor(self.ring, self.next)
            if bool(flags & AVAIL) != self.wrap or bool(flags & USED) == self.wrap:
                assert not count, "a chain that is only partly available"
                return None
            count += 1
            self.next += 1
            if self.next == self.ring.size:
                self.next, self.wrap = 0, not self.wrap
            if not flags & NEXT:
                return number, count

    def use(self, number: int, count: int, length: int = 0) -> None:
        flags = (AVAIL | USED) if self.at_wrap else 0
        struct.pack_into("<IHH", self.ring.desc.view, 16 * self.at + 8, length, number, flags)
        self.at += count
        if self.at >= self.ring.size:
            self.at, self.at_wrap = self.at - self.ring.size, not self.at_wrap


def test_a_chain_byte_by_byte(memory: GuestMemory) -> None:
    """Descriptors in a row with one id; the first one is not available before it is published."""
    ring = PackedRing(memory, 8, indirect=False, fence=fence)
    number = ring.add([(0x1000, 51)], [(0x2000, 108), (0x3000, 512)])
    assert descriptor(ring, 0) == (0x1000, 51, number, 0)
    ring.publish()

    assert [descriptor(ring, n) for n in range(4)] == [
        (0x1000, 51, number, NEXT | AVAIL),
        (0x2000, 108, number, NEXT | WRITE | AVAIL),
        (0x3000, 512, number, WRITE | AVAIL),
        (0, 0, 0, 0),
    ]
    assert ring.avail_index == WRAP | 3


def test_an_indirect_chain(memory: GuestMemory) -> None:
    """One descriptor; its table has neither NEXT nor ids, and is free again when the buffer was used."""
    ring = PackedRing(memory, 8, fence=fence)
    device = Device(ring)
    in_use = memory.regions[0].in_use
    number = ring.add([(0x1000, 51)], [(0x2000, 108)])
    ring.publish()
    address, length, _, flags = descriptor(ring, 0)

    assert (length, flags) == (32, INDIRECT | AVAIL)
    offset = address - memory.regions[0].guest_phys
    assert bytes(memory.regions[0].view[offset : offset + 32]) == table([(0x1000, 51, 0), (0x2000, 108, WRITE)])
    assert device.fetch() == (number, 1)
    device.use(number, 1, 7)
    used = ring.take()
    assert used is not None
    assert (used.head, used.length, ring.take()) == (number, 7, None)
    assert memory.regions[0].in_use == in_use


def test_the_second_round(memory: GuestMemory) -> None:
    """Behind the ring's end both flags mean the opposite; a chain may lie across it."""
    ring = PackedRing(memory, 4, indirect=False, fence=fence)
    device = Device(ring)
    for _ in range(3):
        ring.add([(0x1000, 1)], [(0x2000, 1)])
        ring.publish()
        found = device.fetch()
        assert found is not None
        device.use(*found)
        assert ring.take() is not None
    assert ring.avail_index == 2  # the wrap counter is 0
    assert descriptor(ring, 1)[3] & (AVAIL | USED) == USED


@given(st.integers(1, 9), st.booleans(), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=200))
@settings(max_examples=60, deadline=None)
def test_many_rounds(size: int, indirect: bool, steps: list[tuple[int, int]]) -> None:
    """Any size, chains of any length, used in any order: each comes back once, and the ring is whole at the end."""
    memory = GuestMemory()
    memory.add(1 << 18)
    ring = PackedRing(memory, size, indirect=indirect, fence=fence)
    device, held, out = Device(ring), list[tuple[int, int]](), set[int]()
    for more, pick in steps:
        if more and ring.room(more):
            out.add(ring.add([(0x1000, 1)] * (more - 1), [(0x2000, 1)]))
            ring.publish()
        while (found := device.fetch()) is not None:
            held.append(found)
        if held and pick:
            device.use(*held.pop(pick % len(held)), length=pick)
            used = ring.take()
            assert used is not None
            assert used.length == pick
            out.remove(used.head)
    while held:
        device.use(*held.pop())
    while (used := ring.take()) is not None:
        out.remove(used.head)
    assert not out
    assert ring.outstanding == 0
    assert ring.room(1 if indirect else size)
    memory.close()


@pytest.mark.parametrize(
    ("place", "start", "added", "kick"),
    [
        (WRAP | 0, WRAP | 0, 1, True),  # the very descriptor that is added
        (WRAP | 1, WRAP | 0, 1, False),
        (WRAP | 1, WRAP | 0, 3, True),
        (WRAP | 3, WRAP | 3, 2, True),  # the batch runs over the end
        (0, WRAP | 3, 2, True),
        (1, WRAP | 3, 2, False),
        (WRAP | 0, 0, 1, False),  # of the round before
    ],
)
def test_kicks_by_place(memory: GuestMemory, place: int, start: int, added: int, kick: bool) -> None:
    """A kick when the batch passes the device's place (virtio 2.8.14)."""
    ring = PackedRing(memory, 4, fence=fence, base=start | start << 16)
    struct.pack_into("<HH", ring.used.view, 0, place, AT)
    for _ in range(added):
        ring.offer(0, 0, 0, 0)
    assert ring.publish() == kick
    assert not ring.publish()


def test_kicks_by_flag(memory: GuestMemory) -> None:
    """Always or never, with EVENT_IDX or without."""
    for event_idx in (True, False):
        ring = PackedRing(memory, 4, event_idx=event_idx, fence=fence)
        for flags in (ENABLE, DISABLE):
            struct.pack_into("<HH", ring.used.view, 0, 0, flags)
            ring.offer(0, 0, 0, 0)
            assert ring.publish() == (flags == ENABLE)


def test_interrupts_are_asked_for_and_not(memory: GuestMemory) -> None:
    """At a place with EVENT_IDX, at all without."""
    ring = PackedRing(memory, 4, fence=fence)
    assert ring.arm()
    assert struct.unpack("<HH", ring.avail.view) == (WRAP, AT)
    ring.suppress()
    assert struct.unpack("<HH", ring.avail.view) == (WRAP, DISABLE)
    plain = PackedRing(memory, 4, event_idx=False, fence=fence)
    assert plain.arm()
    assert struct.unpack("<HH", plain.avail.view)[1] == ENABLE
    device = Device(ring)
    ring.add([(0, 1)], [])
    ring.publish()
    device.use(*(device.fetch() or (0, 0)))
    assert not ring.arm()


def test_what_a_device_must_not_use(memory: GuestMemory) -> None:
    """A buffer that is not out, and one when none is."""
    ring = PackedRing(memory, 4, fence=fence)
    device = Device(ring)
    device.use(0, 1)
    with pytest.raises(RingError, match="no buffer is out"):
        ring.take()
    ring.reset()
    device = Device(ring)
    number = ring.add([(0, 1)], [])
    ring.publish()
    device.use(number + 1, 1)
    with pytest.raises(RingError, match="the device used buffer 1, which it does not have"):
        ring.take()


def test_room_and_reset(memory: GuestMemory) -> None:
    """Descriptors, tables and ids come back."""
    ring = PackedRing(memory, 6, indirect=False, fence=fence)
    in_use = memory.regions[0].in_use
    ring.add([(0, 1)] * 4, [])
    assert not ring.room(3)
    with pytest.raises(IndexError, match="3 pieces, 2 free descriptors"):
        ring.add([(0, 1)] * 3, [])
    ring.reset()
    assert memory.regions[0].in_use == in_use
    assert ring.room(6)
    assert repr(ring) == "<PackedRing 6, 0 out, avail 0x8000, used 0x8000>"
    ring.close()
    assert memory.regions[0].in_use == 0
