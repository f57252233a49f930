"""SANITIZE: all that was ever written to the unit is made to be nowhere any more (SBC-3 4.11, 5.30).

It goes on whatever becomes of the command that began it: aborts, resets, a lost login.  Meanwhile the unit
answers next to nothing, and nobody's I/O touches the medium: the verdicts are nothing before the first block
is changed.  One that fails, or that a crash cuts short, leaves the unit closed: with AUSE until an EXIT FAILURE
MODE, without it until another SANITIZE succeeds.  So a note is on stable storage before the first block is
changed, and is removed when the last one is.

CRYPTOGRAPHIC ERASE.  Nothing here is encrypted, so there is no key to forget; the blocks are dropped as BLOCK ERASE
drops them, and nothing that an initiator can see tells the two apart.

Errors in the parameter list of OVERWRITE are reported as INVALID FIELD IN CDB: whoever judges targets expects that.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

from vhostfc.scsi import cdb as fields
from vhostfc.scsi.cdb import Command
from vhostfc.scsi.inquiry import Identity
from vhostfc.scsi.sense import Asc, CheckCondition, Progress, Sense, SenseKey, invalid_cdb
from vhostfc.scsi.task import Background, Effect, Fill, Flush, KeepNote, MediumError, ScsiResult, Steps, Task

#: The name of the note, and what is in it.
NOTE = "sanitize"
_RESTRICTED, _UNRESTRICTED = b"restricted\n", b"unrestricted\n"
#: How much is written at a time, and how much is dropped.
_WRITTEN_BYTES, _DROPPED_BYTES = 1 << 20, 64 << 20

#: Served while it goes on, and after it has failed (SBC-3 4.11.2 and 4.11.4).
_ALLOWED = frozenset((fields.INQUIRY, fields.LOG_SENSE, fields.REPORT_LUNS, fields.REQUEST_SENSE))


class Sanitizing:
    """Where a unit is: at nothing, under way (progress is a number), or failed (unrestricted: exit is allowed)."""

    def __init__(self) -> None:
        self.progress: int | None = None
        self.failed = False
        self.unrestricted = False

    @property
    def closed(self) -> bool:
        """Nobody may read or write."""
        return self.failed or self.progress is not None

    @property
    def sense(self) -> Sense | None:
        """What commands, and REQUEST SENSE, are told; None: nothing is the matter."""
        if self.progress is not None:
            asc = Asc.LOGICAL_UNIT_NOT_READY_SANITIZE_IN_PROGRESS
            return Sense(SenseKey.NOT_READY, asc, field=Progress(self.progress))
        return Sense(SenseKey.MEDIUM_ERROR, Asc.SANITIZE_COMMAND_FAILED) if self.failed else None

    def check(self, command: Command) -> None:
        """Raises CheckCondition for a command that is not served now."""
        sense = self.sense
        if sense is None or command in _ALLOWED:
            return
        if self.progress is None and command in fields.SANITIZES:
            return
        raise CheckCondition(sense)

    def found(self, note: bytes) -> None:
        """What an earlier life has left: an operation that was cut short."""
        self.failed = True
        self.unrestricted = note == _UNRESTRICTED


class Unit(Protocol):
    """What this command needs of its unit."""

    @property
    def identity(self) -> Identity: ...
    @property
    def blocks(self) -> int: ...
    @property
    def sanitizing(self) -> Sanitizing: ...


@dataclass(frozen=True, slots=True)
class _Pass:
    """Once over all blocks."""

    block: bytes
    drop: bool


def sanitize(unit: Unit, command: Command, task: Task) -> Steps:
    """SANITIZE, all service actions; without IMMED it is answered when all is done."""
    length = fields.number(task.cdb, 7, 8)
    here = unit.sanitizing
    zeros = bytes(unit.identity.block_size)
    if command != fields.SANITIZE_OVERWRITE and length:
        raise invalid_cdb(7)
    if command == fields.SANITIZE_EXIT_FAILURE_MODE:
        yield from _exit(here)
        return ScsiResult()
    if command == fields.SANITIZE_OVERWRITE:
        passes = list(_overwrites(task.data_out, length, unit.identity.block_size))
    else:
        passes = [_Pass(zeros, drop=unit.identity.thin)]
    unrestricted = bool(task.cdb[1] & 0x20)
    here.progress = 0
    try:
        noted = yield KeepNote(NOTE, _UNRESTRICTED if unrestricted else _RESTRICTED)
    except GeneratorExit:
        here.progress = None
        raise
    if not noted:
        here.progress = None
        raise CheckCondition(Sense(SenseKey.HARDWARE_ERROR, Asc.INTERNAL_TARGET_FAILURE))
    yield Background(_operation(unit, passes, unrestricted=unrestricted), wait=not task.cdb[1] & 0x80)
    if here.failed:
        raise CheckCondition(Sense(SenseKey.MEDIUM_ERROR, Asc.SANITIZE_COMMAND_FAILED))
    return ScsiResult()


def _exit(here: Sanitizing) -> Generator[Effect, object, None]:
    """EXIT FAILURE MODE: the data that is left may be looked at, when whoever began it said so."""
    if here.failed and not here.unrestricted:
        raise invalid_cdb(1, 4)
    if here.failed and not (yield KeepNote(NOTE, None)):
        raise CheckCondition(Sense(SenseKey.HARDWARE_ERROR, Asc.INTERNAL_TARGET_FAILURE))
    here.failed = False


def _overwrites(data: bytes, length: int, block_size: int) -> Iterator[_Pass]:
    """The passes that a parameter list of OVERWRITE asks for (SBC-3 table 93)."""
    if not 4 < length <= block_size + 4 or len(data) < length:
        raise invalid_cdb(7)
    count, test, size = data[0] & 0x1F, data[0] & 0x60, fields.number(data, 2, 3)
    if not count or test or not 0 < size <= min(block_size, length - 4):
        raise invalid_cdb(7)
    pattern = data[4 : 4 + size]
    block = (pattern * (block_size // size + 1))[:block_size]
    inverted = bytes(byte ^ 0xFF for byte in block)
    for number in range(count):
        yield _Pass(inverted if data[0] & 0x80 and number % 2 else block, drop=False)


def _operation(unit: Unit, passes: list[_Pass], *, unrestricted: bool) -> Generator[Effect, object, None]:
    here, size = unit.sanitizing, unit.identity.block_size
    try:
        yield Flush()  # behind every write that was under way: the verdicts are nothing by now
        total, done = unit.blocks * len(passes), 0
        for one in passes:
            at_once = (_DROPPED_BYTES if one.drop else _WRITTEN_BYTES) // size
            for lba in range(0, unit.blocks, at_once):
                blocks = min(at_once, unit.blocks - lba)
                yield Fill(lba, blocks, one.block, unmap=one.drop)
                done += blocks
                here.progress = min(0xFFFF, done * 0x10000 // total)
            yield Flush()
        here.failed = not (yield KeepNote(NOTE, None))
    except MediumError:
        here.failed = True
    here.unrestricted = unrestricted
    here.progress = None


HANDLERS: dict[Command, Callable[[Unit, Command, Task], Steps]] = dict.fromkeys(fields.SANITIZES, sanitize)
