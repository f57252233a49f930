"""FIP, the FCoE Initialization Protocol: how ENodes and FCFs find each other and log in (FC-BB-5 clause 7.8, 7.9).

A FIP operation is a header and a list of descriptors, each a type and a length in words.  Descriptors of a type
below 128 are critical: who does not know one has to discard the operation.  Others are skipped.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from vhostfc.fc.frame import HEADER_LENGTH, FrameError, pack_id, unpack_id
from vhostfc.fc.wwn import Wwn


class Operation(enum.Enum):
    """Protocol code and subcode (FC-BB-5 table 32)."""

    SOLICITATION = (1, 1)
    ADVERTISEMENT = (1, 2)
    LINK_SERVICE_REQUEST = (2, 1)
    LINK_SERVICE_REPLY = (2, 2)
    KEEP_ALIVE = (3, 1)
    CLEAR_VIRTUAL_LINKS = (3, 2)
    VLAN_REQUEST = (4, 1)
    VLAN_NOTIFICATION = (4, 2)


class Flag(enum.IntFlag):
    """Flags of the header (FC-BB-5 7.8.4)."""

    FPMA = 0x8000  # fabric provided MAC addresses are supported, requested or granted
    SPMA = 0x4000  # server provided ones
    AVAILABLE = 0x0004  # A: the FCF takes logins
    SOLICITED = 0x0002  # S: an advertisement that answers a solicitation
    FROM_FCF = 0x0001  # F


@dataclass(frozen=True, slots=True)
class Priority:
    """Of an FCF, the lower the better; 128 where nobody cares (FC-BB-5 7.8.6.2)."""

    TYPE: ClassVar[int] = 1
    WORDS: ClassVar[int] = 1
    value: int = 128

    def body(self) -> bytes:
        return bytes([0, self.value])

    @classmethod
    def parse(cls, body: bytes) -> Priority:
        return cls(body[1])


@dataclass(frozen=True, slots=True)
class Mac:
    TYPE: ClassVar[int] = 2
    WORDS: ClassVar[int] = 2
    address: bytes

    def body(self) -> bytes:
        return self.address

    @classmethod
    def parse(cls, body: bytes) -> Mac:
        return cls(body)


@dataclass(frozen=True, slots=True)
class FcMap:
    TYPE: ClassVar[int] = 3
    WORDS: ClassVar[int] = 2
    value: int

    def body(self) -> bytes:
        return bytes(3) + pack_id(self.value)

    @classmethod
    def parse(cls, body: bytes) -> FcMap:
        return cls(unpack_id(body[3:6]))


@dataclass(frozen=True, slots=True)
class NameIdentifier:
    """Node_Name of an ENode, Switch_Name of an FCF."""

    TYPE: ClassVar[int] = 4
    WORDS: ClassVar[int] = 3
    name: Wwn

    def body(self) -> bytes:
        return bytes(2) + self.name.pack()

    @classmethod
    def parse(cls, body: bytes) -> NameIdentifier:
        return cls(Wwn.unpack(body[2:10]))


@dataclass(frozen=True, slots=True)
class Fabric:
    """VF_ID, FC-MAP and Fabric_Name."""

    TYPE: ClassVar[int] = 5
    WORDS: ClassVar[int] = 4
    name: Wwn
    fc_map: int
    vf_id: int = 0

    def body(self) -> bytes:
        return struct.pack("!Hx3s8s", self.vf_id, pack_id(self.fc_map), self.name.pack())

    @classmethod
    def parse(cls, body: bytes) -> Fabric:
        vf_id, fc_map, name = struct.unpack("!Hx3s8s", body)
        return cls(Wwn.unpack(name), unpack_id(fc_map), vf_id)


@dataclass(frozen=True, slots=True)
class MaxFcoeSize:
    """The longest FCoE PDU that the sender takes, in bytes."""

    TYPE: ClassVar[int] = 6
    WORDS: ClassVar[int] = 1
    size: int

    def body(self) -> bytes:
        return struct.pack("!H", self.size)

    @classmethod
    def parse(cls, body: bytes) -> MaxFcoeSize:
        return cls(int.from_bytes(body, "big"))


@dataclass(frozen=True, slots=True)
class Encapsulated:
    """A whole FC frame: FLOGI, FDISC, LOGO, ELP or the reply to one, without SOF, CRC and EOF."""

    FLOGI: ClassVar[int] = 7
    FDISC: ClassVar[int] = 8
    LOGO: ClassVar[int] = 9
    ELP: ClassVar[int] = 10
    type: int
    frame: bytes

    def body(self) -> bytes:
        return bytes(2) + self.frame


@dataclass(frozen=True, slots=True)
class VxPortId:
    """Who a VN_Port is: its MAC address, N_Port_ID and Port_Name."""

    TYPE: ClassVar[int] = 11
    WORDS: ClassVar[int] = 5
    mac: bytes
    port_id: int
    wwpn: Wwn

    def body(self) -> bytes:
        return self.mac + b"\0" + pack_id(self.port_id) + self.wwpn.pack()

    @classmethod
    def parse(cls, body: bytes) -> VxPortId:
        return cls(body[:6], unpack_id(body[7:10]), Wwn.unpack(body[10:18]))


@dataclass(frozen=True, slots=True)
class KeepAlivePeriod:
    """FKA_ADV_Period in milliseconds.  no_keep_alives: the D bit."""

    TYPE: ClassVar[int] = 12
    WORDS: ClassVar[int] = 2
    period: int
    no_keep_alives: bool = False

    def body(self) -> bytes:
        return struct.pack("!xBI", self.no_keep_alives, self.period)

    @classmethod
    def parse(cls, body: bytes) -> KeepAlivePeriod:
        flags, period = struct.unpack("!xBI", body)
        return cls(period, bool(flags & 1))


@dataclass(frozen=True, slots=True)
class VendorId:
    TYPE: ClassVar[int] = 13
    WORDS: ClassVar[int] = 3
    vendor: bytes

    def body(self) -> bytes:
        return bytes(2) + self.vendor

    @classmethod
    def parse(cls, body: bytes) -> VendorId:
        return cls(body[2:10])


@dataclass(frozen=True, slots=True)
class Vlan:
    """An FCoE VLAN, in a VLAN notification."""

    TYPE: ClassVar[int] = 14
    WORDS: ClassVar[int] = 1
    vlan_id: int

    def body(self) -> bytes:
        return struct.pack("!H", self.vlan_id)

    @classmethod
    def parse(cls, body: bytes) -> Vlan:
        return cls(int.from_bytes(body, "big") & 0xFFF)


Fixed = Priority | Mac | FcMap | NameIdentifier | Fabric | MaxFcoeSize | VxPortId | KeepAlivePeriod | VendorId | Vlan
Descriptor = Fixed | Encapsulated
D = TypeVar("D", bound=Descriptor)

_FIXED: dict[int, type[Fixed]] = {
    one.TYPE: one
    for one in (Priority, Mac, FcMap, NameIdentifier, Fabric, MaxFcoeSize, VxPortId, KeepAlivePeriod, VendorId, Vlan)
}
_ENCAPSULATED = range(Encapsulated.FLOGI, Encapsulated.ELP + 1)
#: Descriptors of this type and above may be skipped (FC-BB-5 7.8.6.1).
_NOT_CRITICAL = 128
_VERSION = 1
_HEADER = struct.Struct("!BBHBBHH")


@dataclass(frozen=True, slots=True)
class Fip:
    """A FIP operation with its descriptors, in their order."""

    operation: Operation
    flags: int
    descriptors: tuple[Descriptor, ...]

    def pack(self, pad_to: int = 0) -> bytes:
        """pad_to: bytes to fill up to with zeros; a solicited advertisement shows that long frames get through."""
        body = b"".join(_pack(descriptor) for descriptor in self.descriptors)
        code, subcode = self.operation.value
        header = _HEADER.pack(_VERSION << 4, 0, code, 0, subcode, len(body) // 4, self.flags)
        return (header + body).ljust(pad_to, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Fip:
        """Raises FrameError for what is to be discarded: another version, an operation or a critical descriptor that
        is not known, lengths that contradict each other."""
        if len(data) < _HEADER.size:
            raise FrameError(f"a FIP operation of {len(data)} bytes")
        version, _, code, _, subcode, words, flags = _HEADER.unpack_from(data)
        if version >> 4 != _VERSION:
            raise FrameError(f"FIP version {version >> 4}")
        try:
            operation = Operation((code, subcode))
        except ValueError:
            raise FrameError(f"FIP operation {code:#06x}/{subcode:#04x}") from None
        end = _HEADER.size + 4 * words
        if end > len(data):
            raise FrameError(f"FIP descriptors of {4 * words} bytes in {len(data) - _HEADER.size}")
        return cls(operation, flags, tuple(_unpack(data[_HEADER.size : end])))

    def one(self, kind: type[D]) -> D:
        """The descriptor of this kind.  Raises FrameError when there is none, or more than one."""
        found = [descriptor for descriptor in self.descriptors if isinstance(descriptor, kind)]
        if len(found) != 1:
            raise FrameError(f"{len(found)} {kind.__name__} descriptors where one was due")
        return found[0]

    def all(self, kind: type[D]) -> list[D]:
        return [descriptor for descriptor in self.descriptors if isinstance(descriptor, kind)]


def _pack(descriptor: Descriptor) -> bytes:
    body = descriptor.body()
    kind = descriptor.type if isinstance(descriptor, Encapsulated) else descriptor.TYPE
    return bytes([kind, (2 + len(body)) // 4]) + body


def _unpack(data: bytes) -> list[Descriptor]:
    descriptors: list[Descriptor] = []
    at = 0
    while at < len(data):
        kind, length = data[at], 4 * data[at + 1]
        body = bytes(data[at + 2 : at + length])
        if not length or at + length > len(data):
            raise FrameError(f"a FIP descriptor of type {kind} and {length} bytes where {len(data) - at} are left")
        if fixed := _FIXED.get(kind):
            if length != 4 * fixed.WORDS:
                raise FrameError(f"a {fixed.__name__} descriptor of {length} bytes; {4 * fixed.WORDS} is right")
            descriptors.append(fixed.parse(body))
        elif kind in _ENCAPSULATED:
            if length < 4 + HEADER_LENGTH:
                raise FrameError(f"a FIP descriptor of {length} bytes that shall hold an FC frame")
            descriptors.append(Encapsulated(kind, body[2:]))
        elif kind < _NOT_CRITICAL:
            raise FrameError(f"a critical FIP descriptor of type {kind}, which nobody knows here")
        at += length
    return descriptors
