"""The parameter data of the REPORT commands and READ CAPACITY (SPC-4 6.33, 6.35, 6.36; SBC-3 5.15, 5.16)."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from vhostfc.scsi import cdb
from vhostfc.scsi.cdb import Command
from vhostfc.scsi.inquiry import Identity
from vhostfc.scsi.sense import invalid_cdb

#: The REPORT LUNS well-known logical unit (SAM-5 4.6.13, SPC-4 8.2).
REPORT_LUNS_W_LUN = bytes.fromhex("c101 0000 0000 0000")


def lun_bytes(number: int) -> bytes:
    """The 8 bytes of a single-level LUN, 0..16383: peripheral device addressing below 256, else flat (SAM-5 4.6)."""
    if not 0 <= number < 0x4000:
        raise ValueError(f"LUN {number} is not in 0..16383")
    return (number if number < 256 else 0x4000 | number).to_bytes(2, "big") + bytes(6)


def lun_number(lun: bytes) -> int | None:
    """The number in a single-level LUN of 8 bytes, in peripheral (bus 0) or flat addressing; None for any other."""
    if len(lun) != 8 or any(lun[2:]):
        return None
    value = int.from_bytes(lun[:2], "big")
    if value < 256:
        return value
    return value & 0x3FFF if value >> 14 == 1 else None


def report_luns(select: int, luns: Iterable[int]) -> bytes:
    """REPORT LUNS parameter data.  select: SELECT REPORT; luns: the numbers that the initiator may see."""
    match select:
        case 0x00:
            entries = [lun_bytes(number) for number in sorted(luns)]
        case 0x01:
            entries = [REPORT_LUNS_W_LUN]
        case 0x02:
            entries = [REPORT_LUNS_W_LUN, *(lun_bytes(number) for number in sorted(luns))]
        case _:
            raise invalid_cdb(2)
    return struct.pack("!I4x", 8 * len(entries)) + b"".join(entries)


def read_capacity_10(blocks: int, block_size: int) -> bytes:
    return struct.pack("!II", min(blocks - 1, 0xFFFFFFFF), block_size)


def read_capacity_16(identity: Identity, blocks: int) -> bytes:
    """32 bytes; LBPME and LBPRZ for a unit with logical block provisioning."""
    return struct.pack(
        "!QIBBB17x", blocks - 1, identity.block_size, 0, identity.physical_exponent, 0xC0 if identity.thin else 0x00
    )


def supported_operation_codes(request: bytes, commands: tuple[Command, ...]) -> bytes:
    """REPORT SUPPORTED OPERATION CODES parameter data (SPC-4 6.35) for a CDB and the commands that there are.

    CDBs of 32 bytes are reported to whoever asks for them by name, and left out of the list of all: initiators that
    go through that list have room for usage data of 16 bytes (libiscsi), and judge the rest as zeros.
    """
    with_timeouts = bool(request[2] & 0x80)
    options, opcode, action = request[2] & 0x07, request[3], cdb.number(request, 4, 5)
    if options == 0:
        body = b"".join(
            _descriptor(command, with_timeouts=with_timeouts) for command in commands if len(command.usage) <= 16
        )
        return struct.pack("!I", len(body)) + body
    known = [command for command in commands if command.opcode == opcode]
    has_actions = any(command.service_action is not None for command in known)
    if options > 3 or (known and options == 1 + (not has_actions)):
        raise invalid_cdb(2, 2)
    wanted = action if has_actions else None
    found = next((command for command in known if command.service_action == wanted), None)
    if options == 3 and not has_actions and action:
        found = None
    if found is None:
        return bytes([0, 0x01, 0, 0])  # SUPPORT 001b: not supported
    support = 0x03 | 0x80 * with_timeouts  # SUPPORT 011b: as the standard says
    head = struct.pack("!BBH", 0, support, len(found.usage))
    return head + found.usage + (_timeouts(found) if with_timeouts else b"")


def _descriptor(command: Command, *, with_timeouts: bool) -> bytes:
    """A command descriptor: opcode, service action, CTDP and SERVACTV, CDB length."""
    flags = 0x02 * with_timeouts | 0x01 * (command.service_action is not None)
    head = struct.pack("!BxHxBH", command.opcode, command.service_action or 0, flags, len(command.usage))
    return head + (_timeouts(command) if with_timeouts else b"")


def _timeouts(command: Command) -> bytes:
    """A command timeouts descriptor (SPC-4 6.35.4), in seconds."""
    return struct.pack("!HxBII", 10, 0, *command.seconds)


def supported_task_management(request: bytes) -> bytes:
    """REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS: ATS, ATSS, CTSS, LURS, QTSS; with REPD set, 16 bytes, no timeouts."""
    if cdb.number(request, 6, 9) < 4:
        raise invalid_cdb(6)
    return bytes([0xD8, 0x02, 0, 12]) + bytes(12) if request[2] & 0x80 else bytes([0xD8, 0x02, 0, 0])


def log_pages(request: bytes) -> bytes:
    """LOG SENSE: page 00h, the supported pages, and its subpage FFh; there is nothing else to log (SPC-4 7.3)."""
    page, subpage = request[2] & 0x3F, request[3]
    if request[1] & 0x01:
        raise invalid_cdb(1, 0)  # SP: nothing is saved
    if page:
        raise invalid_cdb(2, 5)
    match subpage:
        case 0x00:
            return bytes.fromhex("00 00 0001 00")
        case 0xFF:
            return bytes.fromhex("40 ff 0004 0000 00ff")
    raise invalid_cdb(3)


def defect_data_10(request: bytes) -> bytes:
    """READ DEFECT DATA(10): the lists that are asked for, both empty (SBC-3 5.17)."""
    return bytes([0, request[2] & 0x1F, 0, 0])


def defect_data_12(request: bytes) -> bytes:
    """READ DEFECT DATA(12), the same with a longer header (SBC-3 5.18)."""
    return bytes([0, request[1] & 0x1F, 0, 0, 0, 0, 0, 0])
