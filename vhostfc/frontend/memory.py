"""A guest's memory as the front end keeps it: memfds, mapped here and handed to the back end.

Guest physical and user addresses are far apart on purpose, and neither is where the memory is mapped
here: a back end that mixes them up finds nothing.
"""

from __future__ import annotations

import bisect
import mmap
import os
from dataclasses import dataclass, field

from vhostfc.errors import VhostfcError

PAGE = 4096
#: Where the first region lies for the guest, and how far apart regions are at least: no two touch by accident.
FIRST_GUEST_PHYS = 0x1_0000_0000
GAP = 0x10_0000
#: user_addr - guest_phys of every region.
USER_OFFSET = 0x7E00_0000_0000


class GuestMemoryError(VhostfcError):
    """The guest's memory has no room for a buffer."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """A piece of a region: `guest` is its guest physical address, `user` its user address, `view` its bytes here."""

    region: MemoryRegion = field(repr=False)
    offset: int
    view: memoryview = field(repr=False)

    @property
    def guest(self) -> int:
        return self.region.guest_phys + self.offset

    @property
    def user(self) -> int:
        return self.region.user_addr + self.offset

    def __len__(self) -> int:
        return len(self.view)

    def slice(self, start: int, length: int) -> Buffer:
        """A part of this buffer; it is freed with the whole."""
        return Buffer(self.region, self.offset + start, self.view[start : start + length])


class MemoryRegion:
    """One region: a memfd, mapped, with a first-fit allocator."""

    def __init__(self, guest_phys: int, size: int, *, mmap_offset: int = 0) -> None:
        self.guest_phys = guest_phys
        self.user_addr = guest_phys + USER_OFFSET
        self.size = size
        self.mmap_offset = mmap_offset
        self.fd = os.memfd_create("vhostfc-guest", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, mmap_offset + size)
            # The mapping goes when the last view of it does.
            self.mapping = mmap.mmap(self.fd, size, offset=mmap_offset)
        except BaseException:
            os.close(self.fd)
            raise
        self.view = memoryview(self.mapping)
        self._free: list[tuple[int, int]] = [(0, size)]  # (offset, length), in order, never adjacent

    def __repr__(self) -> str:
        return f"<MemoryRegion {self.guest_phys:#x}+{self.size:#x}>"

    def allocate(self, size: int, alignment: int = 64) -> Buffer | None:
        """A buffer that starts at a multiple of `alignment` (a power of two), or None when none fits."""
        if not size:
            return Buffer(self, 0, self.view[:0])
        for index, (start, length) in enumerate(self._free):
            offset = (start + alignment - 1) & ~(alignment - 1)
            end = offset + size
            if end <= start + length:
                left = [(start, offset - start), (end, start + length - end)]
                self._free[index : index + 1] = [hole for hole in left if hole[1]]
                return Buffer(self, offset, self.view[offset:end])
        return None

    def free(self, buffer: Buffer) -> None:
        """Give a whole buffer back."""
        offset, size = buffer.offset, len(buffer)
        if not size:
            return
        index = bisect.bisect(self._free, (offset, 0))
        if index < len(self._free) and offset + size == self._free[index][0]:
            size += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == offset:
            offset, before = self._free.pop(index - 1)
            size += before
        bisect.insort(self._free, (offset, size))

    @property
    def in_use(self) -> int:
        """Bytes that are not free."""
        return self.size - sum(length for _, length in self._free)

    def close(self) -> None:
        os.close(self.fd)


class GuestMemory:
    """All regions of a guest.  Closing it closes the memfds; the back end keeps its own mappings."""

    def __init__(self) -> None:
        self.regions: list[MemoryRegion] = []
        self._next = FIRST_GUEST_PHYS

    def add(self, size: int, *, mmap_offset: int = 0, guest_phys: int | None = None) -> MemoryRegion:
        """A new region of `size` bytes (whole pages), the offset into its file being `mmap_offset`."""
        where = self._next if guest_phys is None else guest_phys
        region = MemoryRegion(where, size, mmap_offset=mmap_offset)
        self.regions.append(region)
        self._next = max(self._next, where + size + GAP)
        return region

    def remove(self, region: MemoryRegion) -> None:
        self.regions.remove(region)
        region.close()

    def allocate(self, size: int, alignment: int = 64) -> Buffer:
        """A buffer from the first region that has room."""
        for region in self.regions:
            buffer = region.allocate(size, alignment)
            if buffer is not None:
                return buffer
        raise GuestMemoryError(f"the driver's guest memory has no {size} bytes left")

    @staticmethod
    def free(buffer: Buffer) -> None:
        buffer.region.free(buffer)

    def close(self) -> None:
        while self.regions:
            self.regions.pop().close()
