"""The table of guest memory: which changes to it are right, and what lies in it.

User addresses are opaque here: the front end's names for memory, by which it places rings.  Nothing is
mapped in this room; a Memory is a value, and each change gives another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from vhostfc.vhost.messages import ProtocolError, Region

#: What GET_MAX_MEM_SLOTS answers; fewer make memory hotplug fail, and it may never shrink over a reconnection.
MAX_SLOTS = 509
_END = 1 << 64


def describe(region: Region) -> str:
    return f"the region of {region.size:#x} bytes at guest address {region.guest_phys:#x}"


@dataclass(frozen=True, slots=True)
class Memory:
    """Regions that overlap neither in guest nor in user addresses."""

    regions: tuple[Region, ...] = ()

    @classmethod
    def of(cls, regions: Iterable[Region]) -> Self:
        """A whole new table.  Raises ProtocolError."""
        memory = cls()
        for region in regions:
            memory = memory.add(region)
        return memory

    def add(self, region: Region) -> Self:
        """With one more region.  Raises ProtocolError: it is empty, wraps, overlaps another, or there are too many."""
        if not region.size:
            raise ProtocolError(f"{describe(region)} is empty")
        if any(start + region.size > _END for start in (region.guest_phys, region.user_addr, region.mmap_offset)):
            raise ProtocolError(f"{describe(region)} wraps around")
        for other in self.regions:
            if _overlap(region.guest_phys, region.size, other.guest_phys, other.size) or _overlap(
                region.user_addr, region.size, other.user_addr, other.size
            ):
                raise ProtocolError(f"{describe(region)} overlaps {describe(other)}")
        if len(self.regions) == MAX_SLOTS:
            raise ProtocolError(f"more than {MAX_SLOTS} regions")
        return type(self)((*self.regions, region))

    def remove(self, region: Region) -> Self:
        """Without the region of this guest address, user address and size.  Raises ProtocolError: there is none."""
        kept = tuple(other for other in self.regions if _key(other) != _key(region))
        if len(kept) == len(self.regions):
            raise ProtocolError(f"{describe(region)} is not in the table")
        return type(self)(kept)

    def covers(self, user_addr: int, size: int) -> bool:
        """True if these bytes lie in one region."""
        return any(
            region.user_addr <= user_addr and user_addr + size <= region.user_addr + region.size
            for region in self.regions
        )


def _overlap(a: int, a_size: int, b: int, b_size: int) -> bool:
    return a < b + b_size and b < a + a_size


def _key(region: Region) -> tuple[int, int, int]:
    return region.guest_phys, region.user_addr, region.size
