"""The driver's side of a split virtqueue (virtio 1.3, 2.7), and raw access to its parts.

`add()`, `publish()` and `take()` are what a driver does.  The rest (`put_descriptor()`, `offer()`,
`set_index()`) writes the parts as they are told, so that tests can be the guest that no driver is.

Two fences, each pairs with one in the device:
  publish()  avail idx, FENCE, look at avail_event; the device writes avail_event, fences, looks at avail idx
  arm()      used_event, FENCE, look at used idx; the device writes used idx, fences, looks at used_event
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vhostfc.frontend.memory import Buffer, GuestMemory
from vhostfc.native import LIB

NEXT = 1
WRITE = 2
INDIRECT = 4
AVAIL_NO_INTERRUPT = 1
USED_NO_NOTIFY = 1

DESCRIPTOR = struct.Struct("<QIHH")


def fence() -> None:
    """A full memory barrier."""
    LIB.vfd_fence()


def descriptor(addr: int, length: int, flags: int = 0, following: int = 0) -> bytes:
    """A descriptor's 16 bytes."""
    return DESCRIPTOR.pack(addr, length, flags, following)


def table(pieces: Sequence[tuple[int, int, int]], first: int = 0) -> bytes:
    """Chained descriptors, as they stand in an indirect table: (address, length, flags) in order."""
    last = len(pieces) - 1
    return b"".join(
        descriptor(addr, length, flags | (NEXT if n < last else 0), first + n + 1 if n < last else 0)
        for n, (addr, length, flags) in enumerate(pieces)
    )


@dataclass(frozen=True, slots=True)
class Used:
    """An entry of the used ring: the chain's head, and the bytes that the device says it wrote."""

    head: int
    length: int


class RingError(Exception):
    """The device's part of the ring contradicts the standard: its index ran ahead of what was offered."""


class DriverRing:
    """A split ring in guest memory.  size: entries, a power of two.  fence: a full memory barrier.

    avail_index, used_index: free running, as the next entry to write and to read.
    """

    PACKED = False
    #: SET_VRING_BASE of a fresh ring.
    START = 0

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        event_idx: bool = True,
        indirect: bool = True,
        fence: Callable[[], None],
        base: int = 0,
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.indirect = indirect
        self._fence = fence
        self.desc = memory.allocate(16 * size, 4096)
        self.avail = memory.allocate(6 + 2 * size, 4096)
        self.used = memory.allocate(6 + 8 * size, 4096)
        # Whole words, so that the device never sees half of one.
        self._avail = self.avail.view.cast("H")
        self._used = self.used.view[: (6 + 8 * size) // 2 * 2].cast("H")
        self._chains: dict[int, tuple[list[int], Buffer | None]] = {}
        self.reset(base)

    def __repr__(self) -> str:
        return f"<DriverRing {self.size}, {self.outstanding} out, avail {self.avail_index}, used {self.used_index}>"

    def reset(self, base: int = 0) -> None:
        """As a driver that starts afresh leaves it: nothing offered, nothing used.  The device must not be at it."""
        for _, indirect in self._chains.values():
            if indirect is not None:
                self.memory.free(indirect)
        for part in (self.desc, self.avail, self.used):
            part.view[:] = bytes(len(part))
        self.avail_index = self.used_index = self._published = base
        self._avail[1] = self._used[1] = base
        self._free = list(range(self.size - 1, -1, -1))
        self._chains = {}
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
        return len(self._free) >= (1 if self.indirect and pieces > 1 else pieces)

    def add(self, readable: Sequence[tuple[int, int]], writable: Sequence[tuple[int, int]]) -> int:
        """Make a chain of (guest address, length) pieces and offer it; its head.  publish() shows it.

        Raises IndexError when there is no room() for it.
        """
        pieces = [(addr, length, 0) for addr, length in readable]
        pieces += [(addr, length, WRITE) for addr, length in writable]
        indirect: Buffer | None = None
        if self.indirect and len(pieces) > 1:
            indirect = self.memory.allocate(16 * len(pieces), 16)
            indirect.view[:] = table(pieces)
            slots = [self._free.pop()]
            self.put_descriptor(slots[0], indirect.guest, len(indirect), INDIRECT)
        else:
            if len(pieces) > len(self._free):
                raise IndexError(f"{len(pieces)} pieces, {len(self._free)} free descriptors")
            slots = [self._free.pop() for _ in pieces]
            for n, (addr, length, flags) in enumerate(pieces):
                last = n == len(pieces) - 1
                self.put_descriptor(slots[n], addr, length, flags | (0 if last else NEXT), 0 if last else slots[n + 1])
        self._chains[slots[0]] = (slots, indirect)
        self.offer(slots[0])
        return slots[0]

    def publish(self) -> bool:
        """Show the device what was offered; True when it wants a kick."""
        old, new = self._published, self.avail_index
        self.set_index(new)
        self._fence()
        if not self.event_idx:
            return not self._used[0] & USED_NO_NOTIFY
        return (new - self.avail_event - 1) & 0xFFFF < (new - old) & 0xFFFF

    def take(self) -> Used | None:
        """The next thing that the device has used, or None.  Raises RingError."""
        ready = (self._used[1] - self.used_index) & 0xFFFF
        if not ready:
            return None
        if ready > self.outstanding:
            raise RingError(f"the used index is {ready} ahead, {self.outstanding} chains are out")
        at = 4 + 8 * (self.used_index % self.size)
        head, length = struct.unpack_from("<II", self.used.view, at)
        self.used_index = (self.used_index + 1) & 0xFFFF
        self.outstanding -= 1
        slots, indirect = self._chains.pop(head, ((), None))
        self._free.extend(slots)
        if indirect is not None:
            self.memory.free(indirect)
        return Used(head, length)

    def arm(self) -> bool:
        """Ask for an interrupt at the next used entry; False when there is one already: look before you sleep."""
        self._avail[0] = 0
        self._avail[2 + self.size] = self.used_index
        self._fence()
        return self._used[1] == self.used_index

    # ------------------------------------------------------------------ as it is

    @property
    def avail_event(self) -> int:
        """The avail index at which the device wants to be kicked (EVENT_IDX)."""
        return self._used[2 + 4 * self.size]

    @property
    def used_idx(self) -> int:
        """The device's used index."""
        return self._used[1]

    def put_descriptor(self, index: int, addr: int, length: int, flags: int = 0, following: int = 0) -> None:
        DESCRIPTOR.pack_into(self.desc.view, 16 * index, addr, length, flags, following)

    def reserve(self, count: int) -> list[int]:
        """Descriptors that add() will not use any more, for chains that are made by hand."""
        return [self._free.pop() for _ in range(count)]

    def offer(self, head: int) -> None:
        """Put a head, right or wrong, into the next entry of the avail ring."""
        self._avail[2 + self.avail_index % self.size] = head
        self.avail_index = (self.avail_index + 1) & 0xFFFF
        self.outstanding += 1

    def set_index(self, index: int) -> None:
        """Write the avail index that the device sees."""
        self._avail[1] = index
        self._published = index

    def hand_back(self, avail_index: int, used_index: int) -> None:
        """Go on where somebody else who drove the ring left it, with nothing in flight."""
        self.avail_index = self._published = avail_index
        self.used_index = used_index

    def suppress(self) -> None:
        """No interrupts, please (without EVENT_IDX: the flag; with it: an index that has passed)."""
        self._avail[0] = AVAIL_NO_INTERRUPT
        self._avail[2 + self.size] = (self.used_index - 1) & 0xFFFF
