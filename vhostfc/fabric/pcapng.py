"""Captures that Wireshark opens: pcapng with Fibre Channel frames, a codec (draft-ietf-opsawg-pcapng).

The link type is FC-2 with frame delimiters: SOF, the frame as it was on the wire, CRC, EOF.  The
frames of this fabric have neither delimiters nor CRC; they follow from the header, as class 3 has them
(FC-FS-4 clause 10): SOFi3 begins a sequence, SOFn3 goes on with one, EOFt ends it.

An interface is a port.  Times have nanoseconds.  Everything is little-endian, as the section header says.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from vhostfc.fc.frame import HEADER_LENGTH

#: LINKTYPE_FC_2_WITH_FRAME_DELIMS: 4 bytes SOF, the frame, 4 bytes CRC, 4 bytes EOF.
LINKTYPE = 225
SOF_I3, SOF_N3 = 0xBCB55656, 0xBCB53636
EOF_N, EOF_T = 0xBC95D5D5, 0xBC957575

_SECTION, _INTERFACE, _STATISTICS, _PACKET = 0x0A0D0D0A, 1, 5, 6
_BYTE_ORDER = 0x1A2B3C4D
_END, _COMMENT = 0, 1
_USER_APPLICATION = 4
_IF_NAME, _IF_DESCRIPTION, _IF_TSRESOL = 2, 3, 9
_EPB_FLAGS = 2
_ISB_IFRECV, _ISB_IFDROP = 4, 5
_INBOUND = 1
#: The longest text of an option that we write; lengths have 16 bits.
MAX_TEXT = 4096


@dataclass(frozen=True, slots=True)
class Interface:
    """A port that sends frames.  name: what Wireshark calls it; description: which port that is."""

    name: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """A frame that `interface` has sent.  time: nanoseconds of the epoch; comment: for people, or empty."""

    time: int
    interface: Interface
    frame: bytes
    comment: str = ""


def delimited(frame: bytes) -> bytes:
    """A frame with the delimiters that its header implies; what is too short for one is a whole sequence."""
    whole = len(frame) >= HEADER_LENGTH
    begins = not whole or frame[14:16] == b"\0\0"  # SEQ_CNT
    ends = not whole or bool(frame[9] & 0x08)  # F_CTL: END_SEQUENCE
    crc = struct.pack("<I", zlib.crc32(frame))
    return (
        (SOF_I3 if begins else SOF_N3).to_bytes(4, "big") + frame + crc + (EOF_T if ends else EOF_N).to_bytes(4, "big")
    )


class Section:
    """One capture file: bytes in the order in which they are to be written.

    Interfaces come into being with their first frame.  packets: how many there are.
    """

    def __init__(self, application: str, comment: str = "") -> None:
        self.packets = 0
        self._interfaces: dict[Interface, int] = {}
        self._received: dict[Interface, int] = {}
        self._options = [(_USER_APPLICATION, _text(application)), (_COMMENT, _text(comment))]

    def header(self) -> bytes:
        """What a file begins with."""
        return _block(_SECTION, struct.pack("<IHHq", _BYTE_ORDER, 1, 0, -1), self._options)

    def packet(self, record: Record) -> bytes:
        """A frame, after the description of its interface when that is new."""
        self.packets += 1
        number = self._interfaces.get(record.interface)
        described = b""
        if number is None:
            number = self._interfaces[record.interface] = len(self._interfaces)
            described = _interface(record.interface)
        self._received[record.interface] = self._received.get(record.interface, 0) + 1
        data = delimited(record.frame)
        high, low = divmod(record.time & 0xFFFF_FFFF_FFFF_FFFF, 1 << 32)
        body = struct.pack("<IIIII", number, high, low, len(data), len(data)) + _padded(data)
        options = [(_EPB_FLAGS, struct.pack("<I", _INBOUND)), (_COMMENT, _text(record.comment))]
        return described + _block(_PACKET, body, options)

    def statistics(self, time: int, dropped: int) -> bytes:
        """What a file ends with: frames of each interface; dropped: those that were lost for want of room, of all."""
        blocks = b""
        high, low = divmod(time, 1 << 32)
        for interface, number in self._interfaces.items():
            options = [(_ISB_IFRECV, struct.pack("<Q", self._received[interface]))]
            if number == 0:  # nobody knows whose they were
                options.append((_ISB_IFDROP, struct.pack("<Q", dropped)))
            blocks += _block(_STATISTICS, struct.pack("<III", number, high, low), options)
        return blocks


def _interface(interface: Interface) -> bytes:
    options = [
        (_IF_NAME, _text(interface.name)),
        (_IF_DESCRIPTION, _text(interface.description)),
        (_IF_TSRESOL, b"\x09"),
    ]
    return _block(_INTERFACE, struct.pack("<HHI", LINKTYPE, 0, 0), options)


def _text(text: str) -> bytes:
    return text.encode(errors="replace")[:MAX_TEXT].decode(errors="ignore").encode()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _block(kind: int, body: bytes, options: list[tuple[int, bytes]]) -> bytes:
    for code, value in options:
        if value:
            body += struct.pack("<HH", code, len(value)) + _padded(value)
    body += struct.pack("<HH", _END, 0)
    length = 12 + len(body)
    return struct.pack("<II", kind, length) + body + struct.pack("<I", length)
