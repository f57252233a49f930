"""The driver's ring and its memory, bit by bit."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostfc.frontend.memory import PAGE, USER_OFFSET, Buffer, GuestMemory, GuestMemoryError
from vhostfc.frontend.ring import INDIRECT, NEXT, WRITE, DriverRing, RingError, fence, table


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory()
    memory.add(1 << 20)
    yield memory
    memory.close()


def use(ring: DriverRing, *entries: tuple[int, int]) -> None:
    """What a device does."""
    index = ring.used_idx
    for head, length in entries:
        struct.pack_into("<II", ring.used.view, 4 + 8 * (index % ring.size), head, length)
        index = (index + 1) & 0xFFFF
    struct.pack_into("<H", ring.used.view, 2, index)


def descriptors(ring: DriverRing) -> list[tuple[int, int, int, int]]:
    return [struct.unpack_from("<QIHH", ring.desc.view, 16 * n) for n in range(ring.size)]


def test_a_chain_byte_by_byte(memory: GuestMemory) -> None:
    """Readable first, then writable, linked by NEXT; the head in the avail ring."""
    ring = DriverRing(memory, 8, indirect=False, fence=fence)
    head = ring.add([(0x1000, 51)], [(0x2000, 108), (0x3000, 512)])

    assert head == 0
    assert descriptors(ring)[:3] == [(0x1000, 51, NEXT, 1), (0x2000, 108, NEXT | WRITE, 2), (0x3000, 512, WRITE, 0)]
    assert struct.unpack_from("<HHH", ring.avail.view) == (0, 0, 0)
    ring.publish()
    assert struct.unpack_from("<HHH", ring.avail.view) == (0, 1, 0)


def test_an_indirect_chain(memory: GuestMemory) -> None:
    """One descriptor in the ring, the chain in a table; the table is free again when the chain was used."""
    ring = DriverRing(memory, 8, fence=fence)
    in_use = memory.regions[0].in_use
    head = ring.add([(0x1000, 51)], [(0x2000, 108)])
    address, length, flags, _ = descriptors(ring)[head]

    assert (length, flags) == (32, INDIRECT)
    offset = address - memory.regions[0].guest_phys
    assert bytes(memory.regions[0].view[offset : offset + 32]) == table([(0x1000, 51, 0), (0x2000, 108, WRITE)])
    use(ring, (head, 7))
    used = ring.take()
    assert used is not None
    assert (used.head, used.length, ring.take()) == (head, 7, None)
    assert memory.regions[0].in_use == in_use


@pytest.mark.parametrize("indirect", [False, True])
def test_indices_wrap(memory: GuestMemory, indirect: bool) -> None:
    """70,000 chains: the free running indices go round, descriptors are used again and again."""
    ring = DriverRing(memory, 4, indirect=indirect, fence=fence)
    for _ in range(70_000):
        head = ring.add([(0x1000, 1)], [(0x2000, 1)])
        ring.set_index(ring.avail_index)
        use(ring, (head, 1))
        assert ring.take() is not None
    assert ring.avail_index == ring.used_index == 70_000 & 0xFFFF
    assert ring.outstanding == 0


def test_room(memory: GuestMemory) -> None:
    """Without indirect tables a chain takes a descriptor for each piece."""
    direct = DriverRing(memory, 8, indirect=False, fence=fence)
    assert direct.room(8)
    assert not direct.room(9)
    direct.add([(0, 1)] * 3, [])
    assert not direct.room(6)
    with pytest.raises(IndexError, match="6 pieces, 5 free"):
        direct.add([(0, 1)] * 6, [])
    tables = DriverRing(memory, 2, fence=fence)
    assert tables.room(100)
    tables.reserve(2)
    assert not tables.room(1)


@pytest.mark.parametrize(
    ("wanted", "old", "new", "kick"),
    [(0, 0, 1, True), (1, 0, 1, False), (2, 0, 3, True), (0xFFFF, 0xFFFF, 0, True), (0, 0xFFFF, 1, True)],
)
def test_kicks_by_event_index(memory: GuestMemory, wanted: int, old: int, new: int, kick: bool) -> None:
    """A kick when the avail index passes avail_event (virtio 2.7.10)."""
    ring = DriverRing(memory, 4, fence=fence, base=old)
    struct.pack_into("<H", ring.used.view, 4 + 8 * 4, wanted)
    for _ in range((new - old) & 0xFFFF):
        ring.offer(0)
    assert ring.publish() == kick


def test_kicks_by_flag(memory: GuestMemory) -> None:
    """Without EVENT_IDX the used ring's flag says it."""
    ring = DriverRing(memory, 4, event_idx=False, fence=fence)
    ring.offer(0)
    assert ring.publish()
    struct.pack_into("<H", ring.used.view, 0, 1)
    ring.offer(0)
    assert not ring.publish()


def test_interrupts_are_asked_for_and_not(memory: GuestMemory) -> None:
    """Both ways at once, since only one of them counts for the device."""
    ring = DriverRing(memory, 4, fence=fence, base=5)
    assert ring.arm()
    assert (ring.avail.view[0], struct.unpack_from("<H", ring.avail.view, 4 + 8)) == (0, (5,))
    ring.suppress()
    assert (ring.avail.view[0], struct.unpack_from("<H", ring.avail.view, 4 + 8)) == (1, (4,))
    ring.offer(0)
    use(ring, (0, 0))
    assert not ring.arm()


def test_used_index_that_runs_ahead(memory: GuestMemory) -> None:
    """More used than was offered is an error, not a loop."""
    ring = DriverRing(memory, 4, fence=fence)
    ring.add([(0, 1)], [])
    use(ring, (0, 0), (0, 0))
    with pytest.raises(RingError, match="the used index is 2 ahead, 1 chains are out"):
        ring.take()


def test_reset_gives_everything_back(memory: GuestMemory) -> None:
    """Tables, descriptors, indices."""
    ring = DriverRing(memory, 4, fence=fence)
    in_use = memory.regions[0].in_use
    for _ in range(4):
        ring.add([(0, 1)], [(0, 1)])
    ring.reset()
    assert memory.regions[0].in_use == in_use
    assert ring.room(1)
    assert repr(ring) == "<DriverRing 4, 0 out, avail 0, used 0>"
    ring.close()
    assert memory.regions[0].in_use == 0


@given(st.lists(st.tuples(st.integers(0, 5000), st.sampled_from([1, 16, 64, 512, 4096])), max_size=60), st.randoms())
@settings(max_examples=60, deadline=None)
def test_allocator(sizes: list[tuple[int, int]], dice: object) -> None:
    """No two buffers overlap, all are aligned and inside, and what was freed is whole again."""
    memory = GuestMemory()
    region = memory.add(16 * PAGE)
    held: list[Buffer] = []
    for size, alignment in sizes:
        if held and dice.random() < 0.4:  # type: ignore[attr-defined]
            memory.free(held.pop(dice.randrange(len(held))))  # type: ignore[attr-defined]
        buffer = region.allocate(size, alignment)
        if buffer is not None:
            assert buffer.offset % alignment == 0
            assert buffer.offset + len(buffer) <= region.size
            assert buffer.user - buffer.guest == USER_OFFSET
            held.append(buffer)
        taken = sorted((each.offset, each.offset + len(each)) for each in held if len(each))
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(taken))
    for buffer in held:
        memory.free(buffer)
    assert region.in_use == 0
    assert region.allocate(16 * PAGE) is not None
    memory.close()


def test_memory_runs_out(memory: GuestMemory) -> None:
    """An error that says how much was wanted; other regions are tried first."""
    memory.add(1 << 20)
    first, second = memory.allocate(1 << 20), memory.allocate(1 << 20)
    assert first.region is not second.region
    with pytest.raises(GuestMemoryError, match="has no 1 bytes left"):
        memory.allocate(1)
