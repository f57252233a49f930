"""The table of guest memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfc.vhost.memory import MAX_SLOTS, Memory
from vhostfc.vhost.messages import ProtocolError, Region

near = st.integers(0, 40)
regions = st.builds(Region, near, st.integers(0, 12), near, near)


def spans(region: Region) -> tuple[set[int], set[int]]:
    return (
        set(range(region.guest_phys, region.guest_phys + region.size)),
        set(range(region.user_addr, region.user_addr + region.size)),
    )


@given(st.lists(regions, max_size=6), near, st.integers(1, 12))
def test_a_table_holds_what_does_not_overlap_and_covers_what_lies_in_one_region(
    asked: list[Region], at: int, size: int
) -> None:
    """Against sets of addresses, which cannot be wrong."""
    memory = Memory()
    for region in asked:
        guest, user = spans(region)
        clash = not region.size or any(guest & spans(other)[0] or user & spans(other)[1] for other in memory.regions)
        try:
            memory = memory.add(region)
        except ProtocolError:
            assert clash
        else:
            assert not clash

    wanted = set(range(at, at + size))
    assert memory.covers(at, size) == any(wanted <= spans(region)[1] for region in memory.regions)
    for region in memory.regions:
        assert set(memory.remove(region).regions) == set(memory.regions) - {region}


def test_the_last_byte_of_the_address_space_may_be_used_and_none_beyond() -> None:
    top = Region(2**64 - 4096, 4096, 2**64 - 4096, 2**64 - 4096)
    memory = Memory.of([top])
    assert memory.covers(2**64 - 1, 1)
    assert not memory.covers(2**64 - 1, 2)
    for region in (Region(2**64 - 4095, 4096, 0, 0), Region(0, 4096, 2**64 - 4095, 0), Region(0, 4096, 0, 2**64 - 1)):
        with pytest.raises(ProtocolError, match="wraps around"):
            Memory().add(region)


def test_slots_are_counted() -> None:
    memory = Memory.of(Region(n, 1, n, 0) for n in range(MAX_SLOTS))

    with pytest.raises(ProtocolError, match="more than 509 regions"):
        memory.add(Region(1000, 1, 1000, 0))


def test_a_region_is_known_by_where_it_is_and_its_size() -> None:
    memory = Memory.of([Region(0, 8, 100, 7)])

    assert memory.remove(Region(0, 8, 100, 9)) == Memory()
    for other in (Region(1, 8, 100, 7), Region(0, 9, 100, 7), Region(0, 8, 101, 7)):
        with pytest.raises(ProtocolError, match="is not in the table"):
            memory.remove(other)
