"""The driver's side of a packed virtqueue (virtio 1.3, 2.8), and raw access to its parts.

There is one ring of descriptors; whose turn one is say two of its flags, compared with a wrap counter that flips at
the ring's end.  `add()`, `publish()`, `take()` and `arm()` are DriverRing's (ring.py), so that a DriverQueue can
drive either; `put_descriptor()` and `put_event()` write what they are told, so that tests can be the guest that no
driver is.

A head is a buffer id here.  A place is an index with the wrap counter in bit 15, as event suppression areas have it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from vhostfc.frontend.memory import Buffer, GuestMemory
from vhostfc.frontend.ring import INDIRECT, NEXT, WRITE, RingError, Used

# 2.8.1: descriptor flags
AVAIL = 1 << 7
USED = 1 << 15
# 2.8.14: event suppression
ENABLE, DISABLE, AT = 0, 1, 2
WRAP = 1 << 15

DESCRIPTOR = struct.Struct("<QIHH")  # address, length, buffer id, flags
EVENT = struct.Struct("<HH")  # place, flags


def table(pieces: Sequence[tuple[int, int, int]]) -> bytes:
    """An indirect table: (address, length, flags) in order; there NEXT is reserved and the id is too (2.8.7)."""
    return b"".join(DESCRIPTOR.pack(addr, length, 0, flags) for addr, length, flags in pieces)


class PackedRing:
    """A packed ring in guest memory.  size: entries, any number up to 32768.  fence: a full memory barrier.

    avail_index, used_index: places of the next descriptor to make available and to be used.
    desc is the descriptor ring, avail the driver's event suppression area, used the device's.
    """

    PACKED = True
    #: SET_VRING_BASE of a fresh ring: both indices 0, both wrap counters 1 (2.8.1).
    START = (WRAP | WRAP << 16) & 0xFFFF_FFFF

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        event_idx: bool = True,
        indirect: bool = True,
        fence: Callable[[], None],
        base: int = START,
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.indirect = indirect
        self._fence = fence
        self.desc = memory.allocate(16 * size, 4096)
        self.avail = memory.allocate(4, 64)
        self.used = memory.allocate(4, 64)
        # Whole words, so that the device never sees half of one.
        self._words = self.desc.view.cast("H")
        self._avail = self.avail.view.cast("H")
        self._used = self.used.view.cast("H")
        self._chains: dict[int, tuple[int, Buffer | None]] = {}
        self.reset(base)

    def __repr__(self) -> str:
        places = f"avail {self.avail_index:#x}, used {self.used_index:#x}"
        return f"<PackedRing {self.size}, {self.outstanding} out, {places}>"

    def reset(self, base: int = START) -> None:
        """As a driver that starts afresh leaves it: nothing available, nothing used.  The device must not be at it."""
        for _, indirect in self._chains.values():
            if indirect is not None:
                self.memory.free(indirect)
        for part in (self.desc, self.avail, self.used):
            part.view[:] = bytes(len(part))
        self.avail_index, self.used_index = base & 0xFFFF, base >> 16
        self._ids = list(range(self.size - 1, -1, -1))
        self._chains = {}
        self._free = self.size
        self._batch: list[tuple[int, int]] = []  # (index, flags) of a batch's first descriptor, not shown yet
        self._added = 0
        self.outstanding = 0
        self.arm()

    def close(self) -> None:
        """Give the memory back; the device must have stopped."""
        self.reset()
        for part in (self.desc, self.avail, self.used):
            self.memory.free(part)

    # ------------------------------------------------------------------ what a driver does

    def room(self, pieces: int) -> bool:
        """Whether a chain of so many pieces can be added now."""
        return self._free >= (1 if self.indirect and pieces > 1 else pieces)

    def add(self, readable: Sequence[tuple[int, int]], writable: Sequence[tuple[int, int]]) -> int:
        """Make a chain of (guest address, length) pieces and offer it; its buffer id.  publish() shows it.

        Raises IndexError when there is no room() for it.
        """
        pieces = [(addr, length, 0) for addr, length in readable]
        pieces += [(addr, length, WRITE) for addr, length in writable]
        if not self.room(len(pieces)):
            raise IndexError(f"{len(pieces)} pieces, {self._free} free descriptors")
        indirect: Buffer | None = None
        if self.indirect and len(pieces) > 1:
            indirect = self.memory.allocate(16 * len(pieces), 16)
            indirect.view[:] = table(pieces)
            pieces = [(indirect.guest, len(indirect), INDIRECT)]
        number = self._ids.pop()
        self._chains[number] = (len(pieces), indirect)
        for n, (addr, length, flags) in enumerate(pieces):
            self.offer(addr, length, number, flags | (NEXT if n < len(pieces) - 1 else 0))
        self.outstanding += 1
        return number

    def offer(self, addr: int, length: int, number: int, flags: int) -> None:
        """Make the next descriptor, right or wrong; a batch's first one is shown by publish()."""
        index, wrap = self.avail_index & ~WRAP, self.avail_index & WRAP
        flags |= AVAIL if wrap else USED
        if self._batch:
            self.put_descriptor(index, addr, length, number, flags)
        else:
            self._batch.append((index, flags))
            self.put_descriptor(index, addr, length, number, self._words[8 * index + 7])
        self.avail_index = self._step(self.avail_index, 1)
        self._free -= 1
        self._added += 1

    def publish(self) -> bool:
        """Show the device what was offered; True when it wants a kick."""
        if not self._batch:
            return False
        index, flags = self._batch.pop()
        self._fence()
        self._words[8 * index + 7] = flags
        added, self._added = self._added, 0
        self._fence()
        wish = self._used[1] & 3
        if wish != AT or not self.event_idx:
            return wish != DISABLE
        place = self._used[0]
        event = (place & ~WRAP) - (0 if (place ^ self.avail_index) & WRAP == 0 else self.size)
        return ((self.avail_index & ~WRAP) - event - 1) & 0xFFFF < added

    def take(self) -> Used | None:
        """The next buffer that the device has used, or None.  Raises RingError."""
        if not self._is_used():
            return None
        if not self.outstanding:
            raise RingError("the device used a descriptor, no buffer is out")
        index = self.used_index & ~WRAP
        self._fence()
        _, length, number, _ = DESCRIPTOR.unpack_from(self.desc.view, 16 * index)
        count, indirect = self._chains.pop(number, (0, None))
        if not count:
            raise RingError(f"the device used buffer {number}, which it does not have")
        self.used_index = self._step(self.used_index, count)
        self._ids.append(number)
        self._free += count
        self.outstanding -= 1
        if indirect is not None:
            self.memory.free(indirect)
        return Used(number, length)

    def arm(self) -> bool:
        """Ask for an interrupt at the next used buffer; False when there is one already: look before you sleep."""
        self._avail[0] = self.used_index
        self._avail[1] = AT if self.event_idx else ENABLE
        self._fence()
        return not self._is_used()

    # ------------------------------------------------------------------ as it is

    def _step(self, place: int, by: int) -> int:
        index, wrap = (place & ~WRAP) + by, place & WRAP
        return index | wrap if index < self.size else (index - self.size) | (wrap ^ WRAP)

    def _is_used(self) -> bool:
        flags, wrap = self._words[8 * (self.used_index & ~WRAP) + 7], bool(self.used_index & WRAP)
        return bool(flags & AVAIL) == wrap and bool(flags & USED) == wrap

    @property
    def event(self) -> tuple[int, int]:
        """The device's event suppression area: (place, flags)."""
        return self._used[0], self._used[1]

    def put_event(self, place: int, flags: int) -> None:
        """Write the driver's event suppression area."""
        EVENT.pack_into(self.avail.view, 0, place, flags)

    def put_descriptor(self, index: int, addr: int, length: int, number: int, flags: int) -> None:
        DESCRIPTOR.pack_into(self.desc.view, 16 * index, addr, length, number, flags)

    def hand_back(self, avail_index: int, used_index: int) -> None:
        """Go on where somebody else who drove the ring left it, with nothing in flight."""
        self.avail_index, self.used_index = avail_index, used_index

    def suppress(self) -> None:
        """No interrupts, please."""
        self._avail[1] = DISABLE
