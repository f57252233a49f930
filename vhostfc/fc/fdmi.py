"""The Fabric Device Management Interface: HBAs tell the management server who they are (FC-GS-6 clause 6).

CT_IUs of the management service (FFFFFAh), subtype 10h.  An HBA has an identifier (drivers take the Port_Name of its
first port), a list of ports, and attributes; so has each port.  An attribute is a type and bytes: what the types mean
is for those who show them.

Drivers send it at every login: libfc DHBA, DPRT, RHBA, RPA; qla2xxx RHBA, RPA, and DHBA when it is told that it was
here already; lpfc the same, and DPRT, RPRT for a virtual port.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vhostfc.fc.ct import MANAGEMENT_SERVICE, Ct, CtError, CtIu, Reason
from vhostfc.fc.frame import FrameError
from vhostfc.fc.wwn import Wwn

#: GS_Subtype of FDMI.
SUBTYPE = 0x10
#: The longest list and the most attributes that are read; drivers send 1 and 18.
MAX_PORTS, MAX_ATTRIBUTES = 256, 64


class Fdmi(enum.IntEnum):
    """Command codes of FDMI (FC-GS-6 clause 6)."""

    GRHL = 0x0100  # Get Registered HBA List
    GHAT = 0x0101  # Get HBA Attributes
    GRPL = 0x0102  # Get Registered Port List
    GPAT = 0x0110  # Get Port Attributes
    RHBA = 0x0200  # Register HBA
    RHAT = 0x0201  # Register HBA Attributes
    RPRT = 0x0210  # Register Port
    RPA = 0x0211  # Register Port Attributes
    DHBA = 0x0300  # De-Register HBA
    DHAT = 0x0301  # De-Register HBA Attributes
    DPRT = 0x0310  # De-Register Port
    DPA = 0x0311  # De-Register Port Attributes


class Explanation(enum.IntEnum):
    """Reason code explanations of FDMI, all with "unable to perform"; those that we have a use for."""

    NONE = 0x00
    HBA_ALREADY_REGISTERED = 0x10
    MULTIPLE_HBA_ATTRIBUTES = 0x12
    INVALID_HBA_BLOCK_LENGTH = 0x13
    HBA_NOT_IN_PORT_LIST = 0x16
    HBA_NOT_REGISTERED = 0x17
    PORT_NOT_REGISTERED = 0x21
    MULTIPLE_PORT_ATTRIBUTES = 0x22
    INVALID_PORT_BLOCK_LENGTH = 0x23


class HbaAttribute(enum.IntEnum):
    """Types of HBA attributes; one that has no name here is kept all the same."""

    NODE_NAME = 0x0001
    MANUFACTURER = 0x0002
    SERIAL_NUMBER = 0x0003
    MODEL = 0x0004
    MODEL_DESCRIPTION = 0x0005
    HARDWARE_VERSION = 0x0006
    DRIVER_VERSION = 0x0007
    OPTION_ROM_VERSION = 0x0008
    FIRMWARE_VERSION = 0x0009
    OS_NAME_AND_VERSION = 0x000A
    MAXIMUM_CT_PAYLOAD = 0x000B


class PortAttribute(enum.IntEnum):
    """Types of port attributes."""

    SUPPORTED_FC4_TYPES = 0x0001
    SUPPORTED_SPEEDS = 0x0002
    CURRENT_SPEED = 0x0003
    MAXIMUM_FRAME_SIZE = 0x0004
    OS_DEVICE_NAME = 0x0005
    HOST_NAME = 0x0006


Attributes = Mapping[int, bytes]


def pack_attributes(attributes: Attributes) -> bytes:
    """An attribute block: a count, and entries of a type, a length that counts its own header, and a value."""
    entries = [struct.pack("!HH", kind, 4 + len(value)) + value for kind, value in attributes.items()]
    return struct.pack("!I", len(entries)) + b"".join(entries)


def unpack_attributes(data: bytes, of: Fdmi) -> dict[int, bytes]:
    """The attribute block that data begins with, of a request.

    Raises CtError for a block that does not hold what it says, and for two attributes of one type.
    """
    port = of in (Fdmi.RPRT, Fdmi.RPA, Fdmi.GPAT)
    broken = Explanation.INVALID_PORT_BLOCK_LENGTH if port else Explanation.INVALID_HBA_BLOCK_LENGTH
    twice = Explanation.MULTIPLE_PORT_ATTRIBUTES if port else Explanation.MULTIPLE_HBA_ATTRIBUTES
    count = int.from_bytes(data[:4], "big")
    if len(data) < 4 or count > MAX_ATTRIBUTES:
        raise CtError(f"{of.name} with {count} attributes in {len(data)} bytes", Reason.UNABLE_TO_PERFORM, broken)
    found: dict[int, bytes] = {}
    at = 4
    for _ in range(count):
        if at + 4 > len(data):
            raise CtError(f"{of.name}: {count} attributes in {len(data)} bytes", Reason.UNABLE_TO_PERFORM, broken)
        kind, length = struct.unpack_from("!HH", data, at)
        if length < 4 or at + length > len(data):
            raise CtError(f"{of.name}: an attribute of {length} bytes", Reason.UNABLE_TO_PERFORM, broken)
        if kind in found:
            raise CtError(f"{of.name}: attribute {kind:#06x} twice", Reason.UNABLE_TO_PERFORM, twice)
        found[kind] = data[at + 4 : at + length]
        at += length
    return found


def text(value: bytes) -> str:
    """An attribute that is text: up to the first NUL, what is no UTF-8 replaced."""
    return value.split(b"\0", 1)[0].decode(errors="replace").strip()


def _request(command: Fdmi, body: bytes) -> bytes:
    return CtIu(command, body, fs_type=MANAGEMENT_SERVICE, fs_subtype=SUBTYPE).pack()


_NOBODY = Wwn(0)


@dataclass(frozen=True, slots=True)
class Simple:
    """A command about an HBA (GHAT, GRPL, DHBA, DHAT: its identifier), a port (GPAT, DPRT, DPA), or all (GRHL: 0)."""

    command: Fdmi
    name: Wwn = _NOBODY

    def pack(self) -> bytes:
        return _request(self.command, b"" if self.command is Fdmi.GRHL else self.name.pack())


@dataclass(frozen=True, slots=True)
class RegisterHba:
    """RHBA: an HBA with its ports."""

    hba: Wwn
    ports: tuple[Wwn, ...]
    attributes: Attributes = field(default_factory=dict)

    def pack(self) -> bytes:
        return _request(Fdmi.RHBA, self.hba.pack() + pack_names(self.ports) + pack_attributes(self.attributes))


@dataclass(frozen=True, slots=True)
class RegisterPort:
    """RPRT: one more port of an HBA."""

    hba: Wwn
    port: Wwn
    attributes: Attributes = field(default_factory=dict)

    def pack(self) -> bytes:
        return _request(Fdmi.RPRT, self.hba.pack() + self.port.pack() + pack_attributes(self.attributes))


@dataclass(frozen=True, slots=True)
class RegisterAttributes:
    """RHAT and RPA: attributes of an HBA or of a port that is registered; others that it has stay."""

    command: Fdmi
    name: Wwn
    attributes: Attributes = field(default_factory=dict)

    def pack(self) -> bytes:
        return _request(self.command, self.name.pack() + pack_attributes(self.attributes))


Request = Simple | RegisterHba | RegisterPort | RegisterAttributes


def pack_names(names: Sequence[Wwn]) -> bytes:
    """A count and Port_Names or HBA identifiers: a port list, and the accepts of GRHL and GRPL."""
    return struct.pack("!I", len(names)) + b"".join(name.pack() for name in names)


def unpack_names(data: bytes) -> tuple[Wwn, ...]:
    """Raises FrameError when data does not begin with a list of at most 256 names."""
    count = int.from_bytes(data[:4], "big")
    if len(data) < 4 or count > MAX_PORTS or len(data) < 4 + 8 * count:
        raise FrameError(f"a list of {count} names in {len(data)} bytes")
    return tuple(Wwn.unpack(data[at : at + 8]) for at in range(4, 4 + 8 * count, 8))


def pack_hba(ports: Iterable[Wwn], attributes: Attributes) -> bytes:
    """The accept of GHAT; that of GPAT is an attribute block alone."""
    return pack_names(list(ports)) + pack_attributes(attributes)


def parse_request(iu: CtIu) -> Request:
    """The request in a CT_IU.

    Raises CtError, with what the Reject_CT_IU shall say, for another server or subtype, for a command that is not
    known, and for a body that does not hold what it should.
    """
    if (iu.fs_type, iu.fs_subtype) != (MANAGEMENT_SERVICE, SUBTYPE):
        raise CtError(f"CT server {iu.fs_type:02x}/{iu.fs_subtype:02x} is not here", Reason.NOT_SUPPORTED)
    try:
        command = Fdmi(iu.code)
    except ValueError:
        raise CtError(f"FDMI command {iu.code:#06x} is not known", Reason.NOT_SUPPORTED) from None
    body = iu.body
    if command is Fdmi.GRHL:
        return Simple(command)
    if len(body) < 8:
        raise CtError(f"{command.name} with {len(body)} bytes, 8 are the least", Reason.INVALID_SIZE)
    name = Wwn.unpack(body[:8])
    match command:
        case Fdmi.RHBA:
            try:
                ports = unpack_names(body[8:])
            except FrameError as error:
                raise CtError(f"RHBA: {error}", Reason.INVALID_SIZE) from error
            return RegisterHba(name, ports, unpack_attributes(body[12 + 8 * len(ports) :], command))
        case Fdmi.RPRT:
            if len(body) < 16:
                raise CtError(f"RPRT with {len(body)} bytes, 16 are the least", Reason.INVALID_SIZE)
            return RegisterPort(name, Wwn.unpack(body[8:16]), unpack_attributes(body[16:], command))
        case Fdmi.RHAT | Fdmi.RPA:
            return RegisterAttributes(command, name, unpack_attributes(body[8:], command))
        case _:
            return Simple(command, name)


def answer(iu: CtIu) -> CtIu:
    """An accept or a reject as an answer of this server: drivers look at whose it is."""
    assert iu.code in (Ct.ACCEPT, Ct.REJECT)
    return CtIu(iu.code, iu.body, iu.reason, iu.explanation, fs_type=MANAGEMENT_SERVICE, fs_subtype=SUBTYPE)
