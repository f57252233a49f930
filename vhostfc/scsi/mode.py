"""Mode pages: what a disk's behaviour is and which of it may be changed (SPC-4 7.5, SBC-3 6.5).

A page is bytes: its default values, a mask of what may be changed, its saved values and its current ones.  Pages with
anything to change can be saved (PS).  A reset, and a restart, make the saved values the current ones: a guest that
has switched the write cache off sends no flushes from then on, and does not look again after somebody's reset.

MODE SELECT is in two steps, for what it saves has to be on stable storage before it is in force: select() says
what is wanted, and take() does it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from vhostfc.scsi.inquiry import Identity
from vhostfc.scsi.sense import Asc, illegal, invalid_cdb, invalid_parameter

READ_WRITE_ERROR_RECOVERY = 0x01
CACHING = 0x08
CONTROL = 0x0A
INFORMATIONAL_EXCEPTIONS_CONTROL = 0x1C
ALL_PAGES = 0x3F
ALL_SUBPAGES = 0xFF

#: The name of the note of saved pages.
NOTE = "mode"
#: PARAMETERS SAVEABLE, in the first byte of a page (SPC-4 7.5).  In a MODE SELECT it is reserved, and passed over: some
#: initiators send back what they were given.
PS = 0x80
#: DEVICE-SPECIFIC PARAMETER of a direct access block device (SBC-3 6.5.1).
WP, DPOFUA = 0x80, 0x10


@dataclass(frozen=True, slots=True)
class PageFormat:
    """default and changeable are the whole page, header included; changeable has ones where a MODE SELECT may write."""

    default: bytes
    changeable: bytes

    @property
    def saveable(self) -> bool:
        return any(self.changeable)


@dataclass(frozen=True, slots=True)
class Selected:
    """What a MODE SELECT asks for.

    pages: the current values of those that were sent.  saved: all saved values, from then on.  save: SP.
    """

    pages: Mapping[int, bytes]
    saved: Mapping[int, bytes]
    save: bool


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
        self._saved: Mapping[int, bytes] = {code: one.default for code, one in self._formats.items()}
        self._current = dict(self._saved)
        self._emptying = 0
        self.version = 0  # grows with every change
        self.in_doubt = False  # the saved pages could not be kept: what is on stable storage may be something else

    def reset(self) -> None:
        """Back to the saved values, as after a logical unit reset."""
        self._current = dict(self._saved)
        self.version += 1

    @contextmanager
    def write_through(self) -> Iterator[None]:
        """While a cache is emptied that is about to be off: writes are done as though it were.

        Initiators are told afterwards only; before, they have to go on with their flushes.
        """
        self.version += self.write_cache
        self._emptying += 1
        try:
            yield
        finally:
            self._emptying -= 1
            self.version += self.write_cache

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
        return _wce(self._current) and not self._emptying

    def caches(self, wanted: Selected | None) -> bool:
        """WCE as it is when this has been done; None: a reset."""
        return _wce(self._saved if wanted is None else {**self._current, **wanted.pages})

    def switches_off(self, wanted: Selected | None) -> bool:
        """There is a cache now, and will not be; so it has to be empty before."""
        return _wce(self._current) and not self.caches(wanted)

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
        for one in self._formats if code == ALL_PAGES else (code,):
            form = self._formats[one]
            page = (self._current[one], form.default[:2] + form.changeable[2:], form.default, self._saved[one])[control]
            yield bytes([page[0] | PS * form.saveable]) + page[1:]

    # ------------------------------------------------------------ MODE SELECT

    def select(self, cdb: bytes, data: bytes) -> Selected:
        """What a MODE SELECT(6) or (10) asks for whose parameter list is `data`; nothing is changed yet.

        Raises CheckCondition unless all of it is right (SPC-4 6.12).
        """
        if not cdb[1] & 0x10:
            raise invalid_cdb(1, 4)  # PF: pages of a vendor's own format
        save = bool(cdb[1] & 0x01)
        ten = cdb[0] == 0x55
        length = int.from_bytes(cdb[7:9], "big") if ten else cdb[4]
        if len(data) < length:
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        pages = self._wanted(data[:length], ten=ten) if length else {}
        # SP: all pages that can be saved, those that were sent among them (SPC-4 6.11)
        return Selected(pages, {**self._current, **pages} if save else self._saved, save)

    def saves(self, wanted: Selected) -> bool:
        """It needs another note than the one that is on stable storage."""
        return wanted.saved != self._saved or (wanted.save and self.in_doubt)

    def note(self, wanted: Selected) -> bytes | None:
        """The saved values as found() understands them; None: they are the defaults."""
        saved = {code: page for code, page in wanted.saved.items() if page != self._formats[code].default}
        pages = {f"{code:02x}": page.hex() for code, page in saved.items()}
        return json.dumps({"version": 1, "pages": pages}).encode() + b"\n" if pages else None

    def take(self, wanted: Selected) -> bool:
        """Do it; True if current values are others than before."""
        self._saved = wanted.saved
        current = {**self._current, **wanted.pages}
        changed = current != self._current
        self._current = current
        self.version += changed
        return changed

    def found(self, note: bytes) -> None:
        """What an earlier life has saved is in force.  Raises ValueError, which says what is wrong with it."""
        try:
            value = json.loads(note)
            if value["version"] != 1:
                raise ValueError(f"version {value['version']!r} is not known")
            pages = {int(code, 16): bytes.fromhex(page) for code, page in value["pages"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a record of mode pages: {error!r}") from None
        saved = dict(self._saved)
        for code, page in pages.items():
            form = self._formats.get(code)
            if form is None or page[:2] != form.default[:2] or len(page) != len(form.default):
                raise ValueError(f"there is no such page {code:02x}h: {page.hex()}")
            values = zip(form.default, page, form.changeable, strict=True)
            saved[code] = bytes(default ^ (default ^ own) & may for default, own, may in values)
        self._saved = saved
        self.reset()

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
        wanted: dict[int, bytes] = {}
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
        page = bytearray(wanted.get(code, self._current[code]))
        for i in range(2, len(page)):
            different = data[at + i] ^ page[i]
            if refused := different & ~changeable[i]:
                raise invalid_parameter(at + i, refused.bit_length() - 1)
            page[i] ^= different
        wanted[code] = bytes(page)
        return end


def _wce(pages: Mapping[int, bytes]) -> bool:
    return bool(pages[CACHING][2] & 0x04)
