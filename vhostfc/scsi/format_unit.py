"""FORMAT UNIT (SBC-3 5.3): every block is initialized, with zeros or with a pattern of the sender's.

There is no format of a medium to be made here, and there are no defects, so all that it does is that; a thin unit drops
its blocks when they shall be zeros.  It runs as a SANITIZE does (sanitize.py), whatever becomes of the command: the
unit says FORMAT IN PROGRESS meanwhile, a crash suspends it, and one that fails leaves a unit whose blocks cannot be
read or written until another one, or a SANITIZE, succeeds.
"""

from __future__ import annotations

from vhostfc.scsi import cdb as fields
from vhostfc.scsi.cdb import Command
from vhostfc.scsi.sanitize import Operation, Unit, operate
from vhostfc.scsi.sense import Asc, illegal, invalid_cdb, invalid_parameter
from vhostfc.scsi.task import ScsiResult, Steps, Task

_LONGLIST, _FMTDATA = 0x20, 0x10
_FOV, _IP, _IMMED = 0x80, 0x08, 0x02
#: DPRY, DCRT, STPF and IP: they count with FOV only.
_OPTIONS = 0x78
#: INITIALIZATION PATTERN TYPE.
_DEFAULT, _REPEAT = 0x00, 0x01


def format_unit(unit: Unit, _command: Command, task: Task) -> Steps:
    """FORMAT UNIT; without IMMED it is answered when all is done."""
    if task.cdb[1] & 0xC0:
        raise invalid_cdb(1, 7)  # FMTPINFO: there is no protection information (PROTECT 0)
    pattern, immediate = b"", False
    if task.cdb[1] & _FMTDATA:
        immediate, pattern = _parse(task.data_out, unit.identity.block_size, long=bool(task.cdb[1] & _LONGLIST))
    yield from operate(unit, Operation(unrestricted=True, format=True, pattern=pattern.hex()), immediate=immediate)
    return ScsiResult()


def _parse(data: bytes, block_size: int, *, long: bool) -> tuple[bool, bytes]:
    """(IMMED, pattern) of a parameter list: header, and initialization pattern descriptor if there is one."""
    start = 8 if long else 4
    _has(data, start)
    if data[0]:
        raise invalid_parameter(0, data[0].bit_length() - 1)  # PROTECTION FIELDS USAGE
    flags = data[1]
    if flags & 0x05:
        raise invalid_parameter(1, (flags & 0x05).bit_length() - 1)  # obsolete; vendor specific
    if flags & _OPTIONS and not flags & _FOV:
        raise invalid_parameter(1, (flags & _OPTIONS).bit_length() - 1)
    if long and (data[2] or data[3]):
        raise invalid_parameter(2 if data[2] else 3)  # P_I_INFORMATION, PROTECTION INTERVAL EXPONENT
    at = 4 if long else 2
    if any(data[at:start]):
        raise invalid_parameter(at)  # DEFECT LIST LENGTH: there are no defects to be told of
    return bool(flags & _IMMED), _pattern(data, start, block_size) if flags & _IP else b""


def _pattern(data: bytes, at: int, block_size: int) -> bytes:
    """The pattern of the descriptor that begins here; empty: the default."""
    _has(data, at + 4)
    if data[at]:
        raise invalid_parameter(at, data[at].bit_length() - 1)  # SI: that is what SANITIZE is for
    kind, length = data[at + 1], fields.number(data, at + 2, at + 3)
    if kind not in {_DEFAULT, _REPEAT}:
        raise invalid_parameter(at + 1)
    if bool(length) != (kind == _REPEAT) or length > block_size:
        raise invalid_parameter(at + 2)
    _has(data, at + 4 + length)
    return data[at + 4 : at + 4 + length]


def _has(data: bytes, length: int) -> None:
    if len(data) < length:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)


HANDLERS = {fields.FORMAT_UNIT: format_unit}
