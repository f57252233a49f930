"""EXTENDED COPY(LID1) and RECEIVE COPY RESULTS (SPC-4 6.4, 6.22 to 6.25): the array copies blocks by itself.

Block to block segments (02h) between designated units (E4h) are done: the unit that is asked, and those that the
initiator sees beside it through the same target port.  Of others it says COPY TARGET DEVICE NOT REACHABLE.  Nobody
gains rights by it: what the initiator may not read or write itself now is not read or written for it either.
A segment is copied piece by piece.  Each piece is atomic to everybody else; the segment is not, which
is what the standard asks for.  A copy whose rights are in doubt on the way looks again and goes on where
it was: what it has overwritten may be a source of what was copied before, so it cannot be begun anew.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from vhostfc.scsi import cdb as fields
from vhostfc.scsi.cdb import Command
from vhostfc.scsi.copies import NO_LIST_ID, Copies, Copying
from vhostfc.scsi.inquiry import (
    COPY_DESCRIPTORS,
    MAX_COPY_LIST,
    MAX_CSCDS,
    MAX_SEGMENTS,
    Identity,
    designators,
)
from vhostfc.scsi.mode import ModePages
from vhostfc.scsi.reservations import ReservationConflict
from vhostfc.scsi.sense import Asc, CheckCondition, FieldPointer, Sense, SenseKey, illegal, invalid_parameter
from vhostfc.scsi.task import At, Effect, MediumError, Nexus, Read, ScsiResult, Status, Steps, Task, Withdrawn, Write

if TYPE_CHECKING:
    from vhostfc.scsi.unit import LogicalUnit

_HEADER, _CSCD, _SEGMENT = 16, 32, 28
_IDENTIFICATION, _BLOCK_TO_BLOCK = 0xE4, 0x02
#: NUL: the descriptor is of a null device, which takes all and has nothing.
_NUL = 0x20
#: How much is copied at a time.
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Segment:
    """A block to block copy between CSCD descriptors, by their indexes.  at: where it is in the parameter list."""

    at: int
    source: int
    destination: int
    blocks: int
    from_lba: int
    to_lba: int


class Unit(Protocol):
    """What these commands need of their unit."""

    @property
    def identity(self) -> Identity: ...
    @property
    def blocks(self) -> int: ...
    @property
    def mode(self) -> ModePages: ...
    @property
    def copies(self) -> Copies: ...

    def neighbours(self, nexus: Nexus) -> Iterable[LogicalUnit]:
        """The units that this nexus sees through the same target port, this one among them."""
        ...

    def check(self, command: Command, task: Task) -> None:
        """Raises when this command may not be run for its nexus now."""
        ...


def _aborted(asc: Asc, at: int) -> CheckCondition:
    """at: the byte of the parameter list that is to blame, of a segment or of a CSCD descriptor."""
    return CheckCondition(Sense(SenseKey.COPY_ABORTED, asc, field=FieldPointer(at, in_cdb=False)))


def extended_copy(unit: Unit, command: Command, task: Task) -> Steps:
    """EXTENDED COPY(LID1): the list is checked whole before the first segment is copied."""
    length = fields.number(task.cdb, 10, 13)
    if not length:
        return ScsiResult()
    data = task.data_out[:length]
    cscds, segments = _parse(data, length)
    copying = unit.copies.begin(task.nexus, data[0], data[1] >> 3 & 0x03)
    try:
        for segment in segments:
            copying.segment += 1
            yield from _copy(unit, command, task, cscds, segment, copying)
        copying.end(Status.GOOD)
    except CheckCondition as failed:
        copying.end(Status.CHECK_CONDITION, failed.sense.encode(descriptor=unit.mode.d_sense))
        raise
    except ReservationConflict:
        copying.end(Status.RESERVATION_CONFLICT)
        raise
    finally:
        unit.copies.end(task.nexus, copying)
    return ScsiResult()


def _copy(
    unit: Unit, command: Command, task: Task, cscds: list[bytes], segment: _Segment, copying: Copying
) -> Generator[Effect, object, None]:
    """One segment.  Raises CheckCondition, which tells its number and how many of its blocks are left (5.17.7.4)."""
    before, in_order, wrote = copying.moved, 0, False
    try:
        source, destination = _ends(unit, cscds, segment, task.nexus)
        size = source.identity.block_size
        for start, count in _pieces(source, segment, onto_itself=source is destination):
            at = _cscd_at(segment.source)
            piece = yield from _do(unit, command, task, source, Read(segment.from_lba + start, count), at)
            assert isinstance(piece, bytes | bytearray | memoryview)
            write = Write(segment.to_lba + start, bytes(piece), fua=not destination.mode.write_cache)
            yield from _do(unit, command, task, destination, write, _cscd_at(segment.destination))
            wrote = True
            in_order += count if start == in_order else 0
            copying.moved = before + in_order * size
        copying.moved = before + segment.blocks * size
    except CheckCondition as failed:
        if failed.sense.key is not SenseKey.COPY_ABORTED:
            raise
        left = segment.blocks - in_order if wrote else None
        raise CheckCondition(replace(failed.sense, information=left, command_specific=copying.segment - 1)) from None


def _cscd_at(index: int) -> int:
    return _HEADER + _CSCD * index


def _do(
    unit: Unit, command: Command, task: Task, where: LogicalUnit, effect: Read | Write, at: int
) -> Generator[Effect, object, object]:
    """At one of the ends; as often as it is in doubt whether that may be, and may be.  at: its CSCD descriptor."""
    while True:
        if where is not unit and where not in unit.neighbours(task.nexus):
            raise _aborted(Asc.COPY_TARGET_DEVICE_NOT_REACHABLE, at)
        try:
            where.admit(task.nexus, write=isinstance(effect, Write))
        except (CheckCondition, ReservationConflict):
            if where is unit:
                raise
            raise _aborted(Asc.THIRD_PARTY_DEVICE_FAILURE, at) from None
        try:
            return (yield effect if where is unit else At(where, effect))
        except MediumError:
            raise _aborted(Asc.THIRD_PARTY_DEVICE_FAILURE, at) from None
        except Withdrawn:
            unit.check(command, task)


def _parse(data: bytes, length: int) -> tuple[list[bytes], list[_Segment]]:
    """The CSCD descriptors and the segments of a parameter list (SPC-4 6.4.3)."""
    if len(data) < length or length < _HEADER:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    usage = data[1] >> 3 & 0x03
    if usage == 0x01:
        raise invalid_parameter(1, 4)  # reserved
    if usage == NO_LIST_ID and data[0]:
        raise invalid_parameter(0)
    targets, parts = fields.number(data, 2, 3), fields.number(data, 8, 11)
    inline = fields.number(data, 12, 15)
    if _HEADER + targets + parts + inline != length or targets + parts > MAX_COPY_LIST:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    if inline:
        raise illegal(Asc.INLINE_DATA_LENGTH_EXCEEDED)
    if targets % _CSCD:
        raise invalid_parameter(2)
    if targets > MAX_CSCDS * _CSCD:
        raise illegal(Asc.TOO_MANY_TARGET_DESCRIPTORS)
    cscds = [data[at : at + _CSCD] for at in range(_HEADER, _HEADER + targets, _CSCD)]
    if any(one[0] != _IDENTIFICATION for one in cscds):
        raise illegal(Asc.UNSUPPORTED_TARGET_DESCRIPTOR_TYPE_CODE)
    if parts > MAX_SEGMENTS * _SEGMENT:
        raise illegal(Asc.TOO_MANY_SEGMENT_DESCRIPTORS)
    segments = []
    for at in range(_HEADER + targets, length, _SEGMENT):
        if data[at] != _BLOCK_TO_BLOCK:
            raise illegal(Asc.UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE_CODE)
        if at + _SEGMENT > length or fields.number(data, at + 2, at + 3) != _SEGMENT - 4:
            raise invalid_parameter(at + 2)
        segments.append(_Segment(at, *struct.unpack_from("!HHxxHQQ", data, at + 4)))
    return cscds, segments


def _ends(unit: Unit, cscds: list[bytes], segment: _Segment, nexus: Nexus) -> tuple[LogicalUnit, LogicalUnit]:
    """Source and destination of a segment.  Raises unless both are there, alike, and have these blocks."""
    source = _find(unit, cscds, segment.source, nexus, segment.at + 4)
    destination = _find(unit, cscds, segment.destination, nexus, segment.at + 6)
    if source.identity.block_size != destination.identity.block_size:
        raise _aborted(Asc.INCORRECT_COPY_TARGET_DEVICE_TYPE, _cscd_at(segment.destination))
    for one, lba, at in (
        (source, segment.from_lba, segment.at + 12),
        (destination, segment.to_lba, segment.at + 20),
    ):
        if segment.blocks > one.blocks or lba > one.blocks - segment.blocks:
            raise _aborted(Asc.NO_ADDITIONAL_SENSE_INFORMATION, at)
    return source, destination


def _find(unit: Unit, cscds: list[bytes], index: int, nexus: Nexus, at: int) -> LogicalUnit:
    """The unit that a CSCD descriptor designates.  at: where its index is in the parameter list."""
    if index >= len(cscds):
        raise _aborted(Asc.UNREACHABLE_COPY_TARGET, at)
    one = cscds[index]
    if one[1] & _NUL:
        raise _aborted(Asc.UNREACHABLE_COPY_TARGET, _cscd_at(index))  # whatever it designates besides
    wanted = bytes([one[4] & 0x0F, one[5] & 0x3F, 0, min(one[7], 20)]) + one[8 : 8 + min(one[7], 20)]
    found = next((other for other in unit.neighbours(nexus) if wanted in _names(other.identity)), None)
    if found is None:
        raise _aborted(Asc.COPY_TARGET_DEVICE_NOT_REACHABLE, _cscd_at(index))
    if one[1] & 0x1F or fields.number(one, 29, 31) not in (0, found.identity.block_size):
        raise _aborted(Asc.INCORRECT_COPY_TARGET_DEVICE_TYPE, _cscd_at(index))
    return found


def _names(identity: Identity) -> set[bytes]:
    """The designators by which a unit is known, cut to the 20 bytes that a CSCD descriptor has room for."""
    data, found = designators(identity, 0), set()
    while data:
        size = 4 + data[3]
        if not data[1] & 0x30:  # associated with the logical unit
            found.add(data[:3] + bytes([min(data[3], 20)]) + data[4 : min(size, 24)])
        data = data[size:]
    return found


def _pieces(source: LogicalUnit, segment: _Segment, *, onto_itself: bool) -> list[tuple[int, int]]:
    """(offset, blocks); from the end when the destination begins within the source."""
    most = _PIECE_BYTES // source.identity.block_size
    pieces = [(start, min(most, segment.blocks - start)) for start in range(0, segment.blocks, most)]
    return pieces[::-1] if onto_itself and segment.to_lba > segment.from_lba else pieces


def copy_status(unit: Unit, _command: Command, task: Task) -> Steps:
    """RECEIVE COPY RESULTS, COPY STATUS: of a copy that goes on, or that has ended, once."""
    yield from ()
    data = unit.copies.report(task.nexus, task.cdb[2])
    return ScsiResult(data_in=data[: fields.number(task.cdb, 10, 13)])


def failure_details(unit: Unit, _command: Command, task: Task) -> Steps:
    """RECEIVE COPY RESULTS, FAILED SEGMENT DETAILS: of a copy that has ended, once."""
    yield from ()
    data = unit.copies.details(task.nexus, task.cdb[2])
    return ScsiResult(data_in=data[: fields.number(task.cdb, 10, 13)])


def operating_parameters(unit: Unit, _command: Command, task: Task) -> Steps:
    """RECEIVE COPY RESULTS, OPERATING PARAMETERS (SPC-4 table 174)."""
    yield from ()
    body = struct.pack("!B3xHHI", 1, MAX_CSCDS, MAX_SEGMENTS, MAX_COPY_LIST)  # SNLID: no list identifier is fine
    body += struct.pack("!III", 0xFFFF * unit.identity.block_size, 0, 0)  # segment, inline, held
    body += struct.pack("!I2xHB3B3x", 0, 1, 1, 0, 0, 0)
    body += bytes([len(COPY_DESCRIPTORS), *COPY_DESCRIPTORS])
    data = struct.pack("!I", len(body)) + body
    return ScsiResult(data_in=data[: fields.number(task.cdb, 10, 13)])


HANDLERS = {
    fields.EXTENDED_COPY: extended_copy,
    fields.RECEIVE_COPY_STATUS: copy_status,
    fields.RECEIVE_COPY_FAILURE_DETAILS: failure_details,
    fields.RECEIVE_COPY_OPERATING_PARAMETERS: operating_parameters,
}
