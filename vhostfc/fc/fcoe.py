"""FC over Ethernet: an FC frame between an Ethernet header and an EOF (FC-BB-5 clause 7.4 to 7.7).

    Ethernet header | version, 100 reserved bits | SOF | FC header, Data_Field | CRC | EOF, 3 reserved bytes

SOF, CRC and EOF, which a frame of `fc.frame` does not have, are made here: class 3 only, so the first frame of
a sequence begins with SOFi3 and the others with SOFn3, the last one ends with EOFt and the others with EOFn.
A VLAN tag is not known here: it belongs to the network interface.
"""

from __future__ import annotations

import enum
import struct
import zlib
from dataclasses import dataclass

from vhostfc.fc.frame import HEADER_LENGTH, MAX_FRAME, FCtl, FrameError, unpack_id

#: EtherTypes (FC-BB-5 7.4.1 and 7.8.1).
ETHERTYPE_FCOE = 0x8906
ETHERTYPE_FIP = 0x8914
#: Group addresses (FC-BB-5 table 40): all FCFs, and all ENodes.
ALL_FCF_MACS = bytes.fromhex("011018010002")
ALL_ENODE_MACS = bytes.fromhex("011018010001")
#: The default FC-MAP (FC-BB-5 7.6): the upper half of a fabric provided MAC address.
FC_MAP = 0x0EFC00

ETHERNET_LENGTH = 14
#: The shortest and the longest FCoE PDU: 14 bytes before the FC frame, CRC and EOF behind it.
_MIN_PDU, _MAX_PDU = 14 + HEADER_LENGTH + 8, 14 + MAX_FRAME + 8
#: The longest FCoE frame with its Ethernet header.
MAX_ETHERNET = ETHERNET_LENGTH + _MAX_PDU


class Sof(enum.IntEnum):
    """Start of frame (FC-BB-5 table 27)."""

    F = 0x28
    I4 = 0x29
    I2 = 0x2D
    I3 = 0x2E
    N4 = 0x31
    N2 = 0x35
    N3 = 0x36
    C4 = 0x39


class Eof(enum.IntEnum):
    """End of frame (FC-BB-5 table 28)."""

    N = 0x41
    T = 0x42
    RT = 0x44
    DT = 0x46
    NI = 0x49
    DTI = 0x4E
    RTI = 0x4F
    A = 0x50


@dataclass(frozen=True, slots=True)
class Ethernet:
    """An Ethernet frame without its FCS.  Addresses are 6 bytes."""

    destination: bytes
    source: bytes
    ethertype: int
    payload: bytes

    def pack(self) -> bytes:
        return self.destination + self.source + self.ethertype.to_bytes(2, "big") + self.payload

    @classmethod
    def unpack(cls, data: bytes) -> Ethernet:
        """Raises FrameError for what is shorter than a header."""
        if len(data) < ETHERNET_LENGTH:
            raise FrameError(f"an Ethernet frame of {len(data)} bytes")
        return cls(bytes(data[:6]), bytes(data[6:12]), int.from_bytes(data[12:14], "big"), bytes(data[14:]))


def delimiters(frame: bytes) -> tuple[Sof, Eof]:
    """SOF and EOF of an FC frame (header and Data_Field) in class 3."""
    last = unpack_id(frame[9:12]) & FCtl.END_SEQUENCE
    first = not any(frame[14:16])  # SEQ_CNT
    return Sof.I3 if first else Sof.N3, Eof.T if last else Eof.N


def encapsulate(frame: bytes) -> bytes:
    """The FCoE PDU of an FC frame."""
    sof, eof = delimiters(frame)
    return bytes(13) + bytes([sof]) + frame + struct.pack("<I", zlib.crc32(frame)) + bytes([eof, 0, 0, 0])


def decapsulate(pdu: bytes) -> bytes:
    """The FC frame, header and Data_Field, of an FCoE PDU.

    Raises FrameError for another version, a length that no frame has, delimiters other than those of class 3,
    and a wrong CRC.
    """
    if not _MIN_PDU <= len(pdu) <= _MAX_PDU:
        raise FrameError(f"an FCoE PDU of {len(pdu)} bytes")
    if pdu[0] >> 4:
        raise FrameError(f"FCoE version {pdu[0] >> 4}")
    if pdu[13] not in (Sof.I3, Sof.N3):
        raise FrameError(f"SOF {pdu[13]:#04x}, which is not class 3")
    if pdu[-4] not in (Eof.N, Eof.T):
        raise FrameError(f"EOF {pdu[-4]:#04x}, which ends no good frame of class 3")
    frame = bytes(pdu[14:-8])
    if struct.unpack("<I", pdu[-8:-4])[0] != zlib.crc32(frame):
        raise FrameError("a wrong CRC")
    return frame


def fpma(fc_map: int, port_id: int) -> bytes:
    """Fabric provided MAC address of an N_Port_ID (FC-BB-5 7.6)."""
    return (fc_map << 24 | port_id).to_bytes(6, "big")


def parse_mac(text: str) -> bytes:
    """52:54:00:12:34:56, with colons or hyphens.  Raises ValueError for anything else."""
    parts = text.strip().lower().replace("-", ":").split(":")
    if len(parts) != 6 or any(len(part) != 2 for part in parts):
        raise ValueError(f"{text!r} is not a MAC address: expected six pairs of hexadecimal digits")
    try:
        return bytes(int(part, 16) for part in parts)
    except ValueError:
        raise ValueError(f"{text!r} is not a MAC address: expected six pairs of hexadecimal digits") from None


def is_unicast(mac: bytes) -> bool:
    """An address that one station can have: not a group's, and not zero."""
    return not mac[0] & 1 and any(mac)
