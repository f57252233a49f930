"""Mode pages: what a disk's behaviour is and which of it may be changed (SPC-4 7.5, SBC-3 6.5).

A page is bytes: its default values, a mask of what may be changed, and its current values.  Saved
values are not kept (PS 0, SP refused, page control 3 refused), so a reset brings the defaults back.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from vhostfc.scsi.inquiry import Identity
from vhostfc.scsi.sense import Asc, illegal, invalid_cdb, invalid_parameter

READ_WRITE_ERROR_RECOVERY = 0x01
CACHING = 0x08
CONTROL = 0x0A
INFORMATIONAL_EXCEPTIONS_CONTROL = 0x1C
ALL_PAGES = 0x3F
ALL_SUBPAGES = 0xFF

#: DEVICE-SPECIFIC PARAMETER of a direct access block device (SBC-3 6.5.1).
WP, DPOFUA = 0x80, 0x10


@dataclass(frozen=True, slots=True)
class PageFormat:
    """default and changeable are the whole page, header included; changeable has ones where a MODE SELECT may write."""

    default: bytes
    changeable: bytes


def formats(identity: Identity) -> dict[int, PageFormat]:
    """The pages of a disk with this identity, by page code, ascending."""
    recovery = bytes.fromhex("01 0a c0 00 00 00 00 00 00 00 00 00")  # AWRE, ARRE
    caching = bytearray.fromhex("08 12 00 00 ffff 0000 ffff ffff 00 00 0000 00 000000")
    may_cache = bytearray(20)
    if identity.write_cache:
        caching[2] = may_cache[2] = 0x04  # WCE
    # GLTSD, unrestricted reordering, QERR 00b, TAS (who is aborted by others is told), BUSY TIMEOUT PERIOD unlimited
    control = bytes.fromhex("0a 0a 02 10 00 40 00 00 ffff 0000")
    may_control = bytearray(12)
    may_control[2] = 0x04  # D_SENSE
    may_control[4] = 0x08  # SWP
    exceptions = bytes.fromhex("1c 0a 08 00 00000000 00000000")  # DEXCPT
    return {
        READ_WRITE_ERROR_RECOVERY: PageFormat(recovery, bytes(12)),
        CACHING: PageFormat(bytes(caching), bytes(may_cache)),
        CONTROL: PageFormat(control, bytes(may_control)),
        INFORMATIONAL_EXCEPTIONS_CONTROL: PageFormat(exceptions, bytes(12)),
    }


class ModePages:
    """The current values of a unit's mode pages, and the parameter lists of MODE SENSE and MODE SELECT."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._formats = formats(identity)
        self._current: dict[int, bytes] = {}
        self.version = 0  # grows with every change
        self.reset()

    def reset(self) -> None:
        """Back to the default values, as after a logical unit reset."""
        self._current = {code: one.default for code, one in self._formats.items()}
        self.version += 1

    def belong(self, identity: Identity) -> None:
        """The pages are those of a disk that differs from the former one in nothing but `read_only`."""
        self._identity = identity
        self.version += 1

    @property
    def d_sense(self) -> bool:
        """Sense data is wanted in descriptor format."""
        return bool(self._current[CONTROL][2] & 0x04)

    @property
    def write_protected(self) -> bool:
        """By the software write protect bit (SWP), or because the unit is read-only."""
        return self._identity.read_only or bool(self._current[CONTROL][4] & 0x08)

    @property
    def write_cache(self) -> bool:
        """WCE: GOOD may be answered while data is in a volatile cache only."""
        return bool(self._current[CACHING][2] & 0x04)

    # ------------------------------------------------------------ MODE SENSE

    def sense(self, cdb: bytes, blocks: int) -> bytes:
        """The parameter list that a MODE SENSE(6) or (10) asks for, not yet cut to its allocation length."""
        ten = cdb[0] == 0x5A
        descriptor = b"" if cdb[1] & 0x08 else self._descriptor(blocks, long=ten and bool(cdb[1] & 0x10))
        pages = b"".join(self._pages(cdb[2] & 0x3F, cdb[3], cdb[2] >> 6))
        specific = DPOFUA | WP * self.write_protected
        if ten:
            length = 6 + len(descriptor) + len(pages)
            head = struct.pack("!HBBBxH", length, 0, specific, len(descriptor) == 16, len(descriptor))
        else:
            length = 3 + len(descriptor) + len(pages)
            head = struct.pack("!BBBB", length, 0, specific, len(descriptor))
        return head + descriptor + pages

    def _descriptor(self, blocks: int, *, long: bool) -> bytes:
        """The block descriptor, short or long LBA (SBC-3 6.5.2)."""
        if long:
            return struct.pack("!Q4xI", blocks, self._identity.block_size)
        return struct.pack("!II", min(blocks, 0xFFFFFFFF), self._identity.block_size)

    def _pages(self, code: int, subpage: int, control: int) -> Iterator[bytes]:
        if subpage not in (0, ALL_SUBPAGES):
            raise invalid_cdb(3)
        if code != ALL_PAGES and code not in self._formats:
            raise invalid_cdb(2, 5)
        if control == 3:
            raise illegal(Asc.SAVING_PARAMETERS_NOT_SUPPORTED)
        for one in self._formats if code == ALL_PAGES else (code,):
            match control:
                case 0:
                    yield self._current[one]
                case 1:
                    yield self._formats[one].default[:2] + self._formats[one].changeable[2:]
                case _:
                    yield self._formats[one].default

    # ------------------------------------------------------------ MODE SELECT

    def select(self, cdb: bytes, data: bytes) -> bool:
        """Obey a MODE SELECT(6) or (10) whose parameter list is `data`; True if something changed.

        Nothing is changed unless all of it is right (SPC-4 6.12).
        """
        if not cdb[1] & 0x10:
            raise invalid_cdb(1, 4)  # PF: pages of a vendor's own format
        if cdb[1] & 0x01:
            raise invalid_cdb(1, 0)  # SP: nothing is saved
        ten = cdb[0] == 0x55
        length = int.from_bytes(cdb[7:9], "big") if ten else cdb[4]
        if not length:
            return False
        if len(data) < length:
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        wanted = self._wanted(data[:length], ten=ten)
        changed = wanted != self._current
        self.version += changed
        self._current = wanted
        return changed

    def _wanted(self, data: bytes, *, ten: bool) -> dict[int, bytes]:
        """The pages as the list wants them.  MODE DATA LENGTH, WP and DPOFUA are ignored (SBC-3 6.5.1)."""
        start = 8 if ten else 4
        if len(data) < start:
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        if medium_type := data[2 if ten else 1]:
            raise invalid_parameter(2 if ten else 1, medium_type.bit_length() - 1)
        long = ten and bool(data[4] & 0x01)
        size = int.from_bytes(data[6:8], "big") if ten else data[3]
        if size not in (0, 16 if long else 8):
            raise invalid_parameter(6 if ten else 3)
        if len(data) < start + size:
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        if size:
            self._check_descriptor(data[start : start + size], start)
        wanted = dict(self._current)
        at = start + size
        while at < len(data):
            at = self._take_page(data, at, wanted)
        return wanted

    def _check_descriptor(self, descriptor: bytes, start: int) -> None:
        """The block size is not for an initiator to change; nor is the capacity, which is ignored (SBC-3 6.5.2)."""
        at = 12 if len(descriptor) == 16 else 5
        if int.from_bytes(descriptor[at:], "big") != self._identity.block_size:
            raise invalid_parameter(start + at)

    def _take_page(self, data: bytes, at: int, wanted: dict[int, bytes]) -> int:
        """One page of the list into `wanted`; where the next one starts."""
        code = data[at] & 0x3F
        if data[at] & 0x40:
            raise invalid_parameter(at, 6)  # SPF: there are no subpages
        if code not in self._formats:
            raise invalid_parameter(at, 5)
        changeable = self._formats[code].changeable
        if at + 2 > len(data):
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        if data[at + 1] != len(changeable) - 2:
            raise invalid_parameter(at + 1)
        end = at + len(changeable)
        if end > len(data):
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        page = bytearray(wanted[code])
        for i in range(2, len(page)):
            different = data[at + i] ^ page[i]
            if refused := different & ~changeable[i]:
                raise invalid_parameter(at + i, refused.bit_length() - 1)
            page[i] ^= different
        wanted[code] = bytes(page)
        return end
