"""Finding the units of an adapter as a Linux guest does: INQUIRY to LUN 0 of each target, REPORT LUNS, then
each unit's INQUIRY, VPD pages 00 80 83 and READ CAPACITY(16) (SPC-4 6.4, 6.33, 7.8; SBC-3 5.16)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import trio

from vhostfc.errors import VhostfcError
from vhostfc.virtio import scsi

if TYPE_CHECKING:
    from vhostfc.frontend.driver import Response

TARGETS = scsi.MAX_TARGET + 1
#: How often a command is sent again for a reason that passes, and how long to wait before that (Linux waits 3 ms).
RETRIES = 100
PAUSE = 0.003

PERIPHERAL_CONNECTED = 0
TYPE_DISK = 0x00
TYPE_UNKNOWN = 0x1F
TRANSIENT_RESPONSES = frozenset({scsi.Response.RESET, scsi.Response.BUSY})
TRANSIENT_STATUSES = frozenset({0x08, 0x28, 0x40})  # BUSY, TASK SET FULL, TASK ABORTED

REPORT_LUNS_FIRST = 4096


class Commander(Protocol):
    """What a scan needs of a driver."""

    async def command(self, target: int, lun: int, cdb: bytes, data_out: bytes = b"", data_in: int = 0) -> Response: ...


class ScanError(VhostfcError):
    """A unit that the target lists does not answer as a unit should."""


@dataclass(frozen=True, slots=True)
class UnitInfo:
    """A unit as the guest finds it.

    device_type: SPC's peripheral device type (0 disk).  blocks, block_size: 0 when it is no disk.  naa: the NAA
    designator of page 83h as hex digits, "" without; serial: page 80h.
    """

    target: int
    lun: int
    device_type: int = TYPE_DISK
    vendor: str = ""
    product: str = ""
    revision: str = ""
    serial: str = ""
    naa: str = ""
    blocks: int = 0
    block_size: int = 0

    @property
    def address(self) -> str:
        return f"{self.target}:{self.lun}"

    @property
    def size(self) -> int:
        """Bytes."""
        return self.blocks * self.block_size


async def patiently(
    driver: Commander, target: int, lun: int, cdb: bytes, *, data_out: bytes = b"", data_in: int = 0
) -> Response:
    """Run a command; send it again for a unit attention, BUSY and what else passes, as Linux does."""
    for _ in range(RETRIES):
        answer = await driver.command(target, lun, cdb, data_out, data_in)
        if answer.unit_attention:
            continue
        if answer.response not in TRANSIENT_RESPONSES and not (
            answer.response == scsi.Response.OK and answer.status in TRANSIENT_STATUSES
        ):
            return answer
        await trio.sleep(PAUSE)
    return answer


def inquiry(length: int = 36, page: int | None = None) -> bytes:
    """INQUIRY, of the standard data or of a VPD page."""
    return struct.pack(">BBBHB", 0x12, page is not None, page or 0, length, 0)


def report_luns(length: int) -> bytes:
    return struct.pack(">BxBxxxIxx", 0xA0, 0, length)


def read_capacity_16(length: int = 32) -> bytes:
    return struct.pack(">BBQIxx", 0x9E, 0x10, 0, length)


def decode_luns(data: bytes) -> list[int]:
    """The single-level LUNs (SAM-5 4.7) of REPORT LUNS data, in order; others a virtio-scsi LUN field cannot name."""
    luns = []
    end = min(len(data), 8 + int.from_bytes(data[:4], "big"))
    for at in range(8, end - 7, 8):
        entry = data[at : at + 8]
        if entry[0] >> 6 in (0, 1) and not any(entry[2:]):
            method = entry[0] & 0xC0
            if method or not entry[0]:
                luns.append((entry[0] & 0x3F) << 8 | entry[1])
    return luns


def decode_naa(page: bytes) -> str:
    """The logical unit's NAA designator in a page 83h (SPC-4 7.8.6), hex; "" when there is none."""
    at, end = 4, min(len(page), 4 + int.from_bytes(page[2:4], "big"))
    while at + 4 <= end:
        kind, length = page[at + 1], page[at + 3]
        if kind & 0x3F == 0x03:  # association: logical unit; type: NAA
            return page[at + 4 : at + 4 + length].hex()
        at += 4 + length
    return ""


def _text(data: bytes) -> str:
    return data.decode("ascii", "replace").strip(" \0")


async def scan(driver: Commander, *, targets: int = TARGETS) -> list[UnitInfo]:
    """Every unit of every target, in the order in which Linux finds them."""
    units: list[UnitInfo] = []
    for target in range(targets):
        units += await scan_target(driver, target)
    return units


async def scan_target(driver: Commander, target: int) -> list[UnitInfo]:
    """The units of one target; none when it is not there."""
    first = await patiently(driver, target, 0, inquiry(), data_in=36)
    if not first.good:
        return []
    units = []
    for lun in await _luns(driver, target):
        unit = await scan_unit(driver, target, lun)
        if unit is not None:
            units.append(unit)
    return units


async def _luns(driver: Commander, target: int) -> list[int]:
    length = REPORT_LUNS_FIRST
    while True:
        answer = await patiently(driver, target, 0, report_luns(length), data_in=length)
        if not answer.good or len(answer.data_in) < 8:
            return [0]  # an old target, with LUN 0 alone
        needed = 8 + int.from_bytes(answer.data_in[:4], "big")
        if needed <= length:
            return decode_luns(answer.data_in)
        length = needed


async def scan_unit(driver: Commander, target: int, lun: int) -> UnitInfo | None:
    """One unit; None when there is none at this LUN.  Raises ScanError for a disk without a capacity."""
    answer = await patiently(driver, target, lun, inquiry(), data_in=36)
    if not answer.good or len(answer.data_in) < 36 or answer.data_in[0] >> 5 != PERIPHERAL_CONNECTED:
        return None
    data = answer.data_in
    device_type = data[0] & 0x1F
    if device_type == TYPE_UNKNOWN:
        return None
    supported = await _page(driver, target, lun, 0x00)
    pages = supported[4:]
    serial = _text((await _page(driver, target, lun, 0x80))[4:]) if 0x80 in pages else ""
    naa = decode_naa(await _page(driver, target, lun, 0x83)) if 0x83 in pages else ""
    blocks, block_size = await _capacity(driver, target, lun) if device_type == TYPE_DISK else (0, 0)
    return UnitInfo(
        target, lun, device_type, _text(data[8:16]), _text(data[16:32]), _text(data[32:36]),
        serial, naa, blocks, block_size,
    )  # fmt: skip


async def _page(driver: Commander, target: int, lun: int, page: int) -> bytes:
    """A VPD page, cut to what it says it is; empty when the unit has none such."""
    answer = await patiently(driver, target, lun, inquiry(255, page), data_in=255)
    if not answer.good or len(answer.data_in) < 4 or answer.data_in[1] != page:
        return b""
    return answer.data_in[: 4 + int.from_bytes(answer.data_in[2:4], "big")]


async def _capacity(driver: Commander, target: int, lun: int) -> tuple[int, int]:
    answer = await patiently(driver, target, lun, read_capacity_16(), data_in=32)
    if not answer.good or len(answer.data_in) < 12:
        raise ScanError(f"unit {target}:{lun} does not tell its capacity: {answer}")
    last, block_size = struct.unpack_from(">QI", answer.data_in)
    return last + 1, block_size
