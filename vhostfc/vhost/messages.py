"""What vhost-user messages are made of: the header and the payload structures, each with its bytes.

A message is a 12-byte header, a payload, and file descriptors that travel with the header's first
byte.  Everything is in native byte order.  This file knows shapes only; which request carries which
shape, how many descriptors and what reply is the table in requests.py, whose encode and decode
functions are the doors that others use.

A peer's mistake is a ProtocolError; its text says what is wrong, and requests.py puts the request's
name in front.  Descriptors are plain numbers here: nothing in this room opens, maps or closes one.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

VERSION = 1
VERSION_MASK = 0x3
FLAG_REPLY = 0x4
FLAG_NEED_REPLY = 0x8
#: Bits 0-7 of a kick, call or err payload are the ring; bit 8 says that no descriptor comes with it.
VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 0x100
#: Flag of a vring address: the used ring's writes go into the dirty log.
VHOST_VRING_F_LOG = 0x1
#: Regions in one SET_MEM_TABLE, and so the most descriptors that one message may carry.
MAX_REGIONS = 8
MAX_FDS = 8
MAX_CONFIG = 256
SHMEM_REGIONS = 256


class ProtocolError(Exception):
    """The peer sent what the protocol does not allow; str() is one line that names the request."""


@dataclass(frozen=True, slots=True)
class Header:
    """Request number, flags (version, reply, need_reply) and payload size in bytes."""

    SIZE: ClassVar[int] = 12
    request: int
    flags: int
    size: int

    @property
    def is_reply(self) -> bool:
        return bool(self.flags & FLAG_REPLY)

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & FLAG_NEED_REPLY)

    def pack(self) -> bytes:
        return struct.pack("=III", self.request, self.flags, self.size)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if len(data) != cls.SIZE:
            raise ProtocolError(f"a header of {len(data)} bytes, expected {cls.SIZE}")
        return cls(*struct.unpack("=III", data))


@dataclass(frozen=True, slots=True)
class Packet:
    """One message as it came: undecoded, with the descriptors that came along (whoever holds the packet owns them)."""

    header: Header
    payload: bytes = b""
    fds: tuple[int, ...] = ()


class Payload(Protocol):
    """A payload structure.  LONGEST: its most bytes on the wire."""

    LONGEST: ClassVar[int]

    def pack(self) -> bytes: ...

    @classmethod
    def unpack(cls, data: bytes) -> Self: ...

    @property
    def fd_count(self) -> int | None:
        """How many descriptors this very payload calls for; None when the request's row in the table says it."""
        ...


def _exactly(data: bytes, size: int) -> None:
    if len(data) != size:
        raise ProtocolError(f"a payload of {len(data)} bytes, expected {size}")


class _Fixed:
    """A structure of fixed size whose dataclass fields are, in order, what `_wire` packs."""

    __slots__ = ()
    _wire: ClassVar[struct.Struct]
    __match_args__: ClassVar[tuple[str, ...]]  # the fields, as dataclass() has them
    LONGEST: ClassVar[int]

    def __init_subclass__(cls, wire: str = "", **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        # dataclass(slots=True) makes the class a second time, then without the argument
        if wire:
            cls._wire = struct.Struct("=" + wire)
            cls.LONGEST = cls._wire.size

    def pack(self) -> bytes:
        return self._wire.pack(*(getattr(self, name) for name in self.__match_args__))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        _exactly(data, cls.LONGEST)
        return cls(*cls._wire.unpack(data))

    @property
    def fd_count(self) -> int | None:
        return None


@dataclass(frozen=True, slots=True)
class Empty(_Fixed, wire="0x"):
    """No payload."""


@dataclass(frozen=True, slots=True)
class U64(_Fixed, wire="Q"):
    """A number: feature words, counts, and the acknowledgement (0: done, else: failed)."""

    value: int = 0


@dataclass(frozen=True, slots=True)
class VringState(_Fixed, wire="II"):
    """A ring and a number: its size, its base, enabled or not."""

    index: int
    num: int = 0


@dataclass(frozen=True, slots=True)
class VringAddr(_Fixed, wire="IIQQQQ"):
    """User addresses of a ring's three parts (mind the order: used before avail)."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log_guest_addr: int = 0

    def same_place(self, other: VringAddr) -> bool:
        return (self.desc, self.used, self.avail) == (other.desc, other.used, other.avail)


@dataclass(frozen=True, slots=True)
class VringFd(_Fixed, wire="Q"):
    """Kick, call and err: the ring's index and whether a descriptor comes with it."""

    value: int

    @classmethod
    def of(cls, index: int, *, fd: bool = True) -> Self:
        return cls(index & VRING_INDEX_MASK | (0 if fd else VRING_NO_FD))

    @property
    def index(self) -> int:
        return self.value & VRING_INDEX_MASK

    @property
    def has_fd(self) -> bool:
        return not self.value & VRING_NO_FD

    @property
    def fd_count(self) -> int | None:
        return 1 if self.has_fd else 0

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        self = super(VringFd, cls).unpack(data)
        if self.value & ~(VRING_INDEX_MASK | VRING_NO_FD):
            raise ProtocolError(f"unknown bits in {self.value:#x}")
        return self


@dataclass(frozen=True, slots=True)
class Region(_Fixed, wire="QQQQ"):
    """A piece of guest memory: where the guest and the front end see it, and where it is in its file."""

    guest_phys: int
    size: int
    user_addr: int
    mmap_offset: int


@dataclass(frozen=True, slots=True)
class SingleRegion(_Fixed, wire="8xQQQQ"):
    """A region by itself (ADD_MEM_REG, REM_MEM_REG)."""

    guest_phys: int
    size: int
    user_addr: int
    mmap_offset: int

    @classmethod
    def of(cls, region: Region) -> Self:
        return cls(region.guest_phys, region.size, region.user_addr, region.mmap_offset)

    @property
    def region(self) -> Region:
        return Region(self.guest_phys, self.size, self.user_addr, self.mmap_offset)


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """All of guest memory, at most eight regions; the size on the wire covers only those used."""

    LONGEST: ClassVar[int] = 8 + 32 * MAX_REGIONS
    regions: tuple[Region, ...] = ()

    def pack(self) -> bytes:
        return struct.pack("=I4x", len(self.regions)) + b"".join(region.pack() for region in self.regions)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if len(data) < 8:
            raise ProtocolError(f"a payload of {len(data)} bytes, expected at least 8")
        (count,) = struct.unpack_from("=I", data)
        if count > MAX_REGIONS:
            raise ProtocolError(f"{count} regions, at most {MAX_REGIONS} are allowed")
        _exactly(data, 8 + 32 * count)
        return cls(tuple(Region.unpack(data[at : at + 32]) for at in range(8, len(data), 32)))

    @property
    def fd_count(self) -> int | None:
        return len(self.regions)


@dataclass(frozen=True, slots=True)
class Log(_Fixed, wire="QQ"):
    """Size and offset of the dirty log in its file."""

    size: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Inflight(_Fixed, wire="QQHH4x"):
    """The in-flight region.  20 bytes by its fields, 24 with QEMU, whose C structure is padded: both are read."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return super(Inflight, cls).unpack(data + bytes(4) if len(data) == 20 else data)


@dataclass(frozen=True, slots=True)
class Config:
    """A part of the device's configuration space.  flags: 0 a write by the guest, 1 live migration."""

    LONGEST: ClassVar[int] = 12 + MAX_CONFIG
    offset: int
    flags: int
    data: bytes

    def pack(self) -> bytes:
        return struct.pack("=III", self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if len(data) < 12:
            raise ProtocolError(f"a payload of {len(data)} bytes, expected at least 12")
        offset, size, flags = struct.unpack_from("=III", data)
        if size > MAX_CONFIG:
            raise ProtocolError(f"{size} bytes of configuration space, at most {MAX_CONFIG} are allowed")
        _exactly(data, 12 + size)
        return cls(offset, flags, data[12:])

    @property
    def fd_count(self) -> int | None:
        return None


@dataclass(frozen=True, slots=True)
class Iotlb(_Fixed, wire="QQQBB6x"):
    """A translation.  perm: 1 read, 2 write, 3 both.  type: 1 miss, 2 update, 3 invalidate, 4 access failed."""

    iova: int
    size: int
    uaddr: int
    perm: int
    type: int


@dataclass(frozen=True, slots=True)
class VringArea(_Fixed, wire="QQQ"):
    """A page of the back end that the front end may show the guest as a ring's doorbell."""

    value: int
    size: int
    offset: int

    @property
    def index(self) -> int:
        return self.value & VRING_INDEX_MASK

    @property
    def fd_count(self) -> int | None:
        return 0 if self.value & VRING_NO_FD else 1


@dataclass(frozen=True, slots=True)
class DeviceState(_Fixed, wire="II"):
    """direction: 0 save, 1 load.  phase: 0 stopped."""

    direction: int
    phase: int = 0


@dataclass(frozen=True, slots=True)
class SharedObject:
    """The UUID of a shared object, RFC 4122 byte order."""

    LONGEST: ClassVar[int] = 16
    id: uuid.UUID

    def pack(self) -> bytes:
        return self.id.bytes

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        _exactly(data, 16)
        return cls(uuid.UUID(bytes=data))

    @property
    def fd_count(self) -> int | None:
        return None


@dataclass(frozen=True, slots=True)
class MmapRequest(_Fixed, wire="B7xQQQQ"):
    """Map a part of a file into a shared memory region of the device.  flags: bit 0 read-write."""

    shmid: int
    fd_offset: int
    shm_offset: int
    length: int
    flags: int = 0


@dataclass(frozen=True, slots=True)
class ShmemConfig:
    """The sizes of the device's shared memory regions by shmid; 0: there is none."""

    LONGEST: ClassVar[int] = 8 + 8 * SHMEM_REGIONS
    sizes: tuple[int, ...]

    def pack(self) -> bytes:
        sizes = self.sizes + (0,) * (SHMEM_REGIONS - len(self.sizes))
        return struct.pack("=I4x256Q", sum(size > 0 for size in sizes), *sizes)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        _exactly(data, cls.LONGEST)
        count, *sizes = struct.unpack("=I4x256Q", data)
        if count != sum(size > 0 for size in sizes):
            raise ProtocolError(f"{count} shared memory regions announced, {sum(size > 0 for size in sizes)} given")
        return cls(tuple(sizes))

    @property
    def fd_count(self) -> int | None:
        return None


@dataclass(frozen=True, slots=True)
class Opaque:
    """Bytes that belong to another device type (a crypto session's description)."""

    LONGEST: ClassVar[int] = 4096
    data: bytes

    def pack(self) -> bytes:
        return self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(data)

    @property
    def fd_count(self) -> int | None:
        return None
