"""virtio-scsi's structures (virtio 1.3, 5.6): configuration, LUN field, commands, control queue, event queue.

Both sides are here: a device decodes requests and encodes responses, a driver the other way round, and
the tests join them.  Integers are little endian (a legacy guest's order is its own; all that we meet
are little endian too).  A driver may cut its buffers where it likes, so these functions see gathered
bytes and never descriptors.

What a driver gets wrong is a value: a LUN field that addresses nothing decodes to None, and so does a
control request that cannot be read.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar, Self


class Feature(enum.IntEnum):
    """Feature bits (5.6.3)."""

    INOUT = 0
    HOTPLUG = 1
    CHANGE = 2
    T10_PI = 3


class Queue(enum.IntEnum):
    """Virtqueues (5.6.2); REQUEST is the first of num_queues."""

    CONTROL = 0
    EVENT = 1
    REQUEST = 2


class TaskAttribute(enum.IntEnum):
    """task_attr of a command (5.6.6.1); the numbers differ from FCP's."""

    SIMPLE = 0
    ORDERED = 1
    HEAD_OF_QUEUE = 2
    ACA = 3


class Response(enum.IntEnum):
    """Response bytes of commands and control requests (5.6.6.1, 5.6.6.2)."""

    OK = 0
    OVERRUN = 1
    ABORTED = 2
    BAD_TARGET = 3
    RESET = 4
    BUSY = 5
    TRANSPORT_FAILURE = 6
    TARGET_FAILURE = 7
    NEXUS_FAILURE = 8
    FAILURE = 9
    FUNCTION_SUCCEEDED = 10
    FUNCTION_REJECTED = 11
    INCORRECT_LUN = 12
    # VIRTIO_SCSI_S_FUNCTION_COMPLETE is VIRTIO_SCSI_S_OK by another name, for task management
    FUNCTION_COMPLETE = 0


class ControlType(enum.IntEnum):
    """First word of a control request (5.6.6.2)."""

    TMF = 0
    AN_QUERY = 1
    AN_SUBSCRIBE = 2


class TmfSubtype(enum.IntEnum):
    """Task management functions (5.6.6.2)."""

    ABORT_TASK = 0
    ABORT_TASK_SET = 1
    CLEAR_ACA = 2
    CLEAR_TASK_SET = 3
    I_T_NEXUS_RESET = 4
    LOGICAL_UNIT_RESET = 5
    QUERY_TASK = 6
    QUERY_TASK_SET = 7


class EventType(enum.IntEnum):
    """Events (5.6.6.3)."""

    NO_EVENT = 0
    TRANSPORT_RESET = 1
    ASYNC_NOTIFY = 2
    PARAM_CHANGE = 3


class ResetReason(enum.IntEnum):
    """reason of a TRANSPORT_RESET event (5.6.6.3)."""

    HARD = 0
    RESCAN = 1
    REMOVED = 2


#: Bit of an event's first word: events were lost for lack of buffers.
EVENTS_MISSED = 0x80000000
#: Sizes after a reset; a guest that changes them makes QEMU give up, so they are constants.
CDB_SIZE = 32
SENSE_SIZE = 96
MAX_TARGET = 255
MAX_LUN = 16383


# ------------------------------------------------------------------------------------------------ LUN field

#: The REPORT LUNS well known logical unit, which stands beside the targets (5.6.6.1).
REPORT_LUNS_WELL_KNOWN = bytes.fromhex("c101000000000000")


@dataclass(frozen=True, slots=True)
class LunAddress:
    """Whom a LUN field addresses.  lun None: the target is named, but not by a single-level LUN (SAM-5 4.7)."""

    target: int
    lun: int | None


def encode_lun(target: int, lun: int) -> bytes:
    """The field as Linux and SeaBIOS write it: flat space addressing for every LUN, 0 <= lun <= 16383."""
    return bytes([1, target, 0x40 | lun >> 8, lun & 0xFF, 0, 0, 0, 0])


def encode_event_lun(target: int, lun: int) -> bytes:
    """The field of an event.  Linux reads bytes 2 and 3 as a plain number there and does not take 0x40 off:
    peripheral device addressing below 256, flat space addressing (its LUN 16384 + n) above."""
    return bytes([1, target, 0x40 | lun >> 8 if lun > 0xFF else 0, lun & 0xFF, 0, 0, 0, 0])


def decode_lun(field: bytes) -> LunAddress | None:
    """Target and LUN, in either addressing method; None when the field names no target at all (BAD_TARGET)."""
    if len(field) != 8 or field[0] != 1:
        return None
    method = field[2]
    if method and method >> 6 != 1:
        return LunAddress(field[1], None)
    return LunAddress(field[1], (method & 0x3F) << 8 | field[3])


# ------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """The configuration space (5.6.4); the defaults are what QEMU's vhost-user-scsi shows a guest."""

    WIRE: ClassVar[struct.Struct] = struct.Struct("<IIIIIIIHHI")
    num_queues: int = 1
    seg_max: int = 126
    max_sectors: int = 65535
    cmd_per_lun: int = 128
    event_info_size: int = 16
    sense_size: int = SENSE_SIZE
    cdb_size: int = CDB_SIZE
    max_channel: int = 0
    max_target: int = MAX_TARGET
    max_lun: int = MAX_LUN

    def pack(self) -> bytes:
        return self.WIRE.pack(
            self.num_queues,
            self.seg_max,
            self.max_sectors,
            self.cmd_per_lun,
            self.event_info_size,
            self.sense_size,
            self.cdb_size,
            self.max_channel,
            self.max_target,
            self.max_lun,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From exactly 36 bytes; struct.error otherwise."""
        return cls(*cls.WIRE.unpack(data))


# ------------------------------------------------------------------------------------------------ commands


@dataclass(frozen=True, slots=True)
class CommandRequest:
    """The readable header of a command, 51 bytes; data-out follows it.

    lun: the 8-byte field.  tag: the driver's, not unique.  cdb: up to 32 bytes, padded with zeros on the wire.
    """

    SIZE: ClassVar[int] = 51
    WIRE: ClassVar[struct.Struct] = struct.Struct("<8sQBBB32s")
    lun: bytes
    tag: int
    cdb: bytes
    task_attribute: int = TaskAttribute.SIMPLE
    priority: int = 0
    crn: int = 0

    def pack(self) -> bytes:
        return self.WIRE.pack(self.lun, self.tag, self.task_attribute, self.priority, self.crn, self.cdb)

    @classmethod
    def unpack(cls, data: bytes) -> Self | None:
        """From the start of a request's readable part; None when it is too short to be one."""
        if len(data) < cls.SIZE:
            return None
        lun, tag, attribute, priority, crn, cdb = cls.WIRE.unpack_from(data)
        return cls(lun, tag, cdb, attribute, priority, crn)


@dataclass(frozen=True, slots=True)
class CommandResponse:
    """The writable header of a command, 108 bytes; data-in follows it.

    status and sense hold with Response.OK.  residual: bytes of the data buffers that were not moved.
    Sense beyond 96 bytes is cut (Linux warns when told of more).
    """

    SIZE: ClassVar[int] = 108
    WIRE: ClassVar[struct.Struct] = struct.Struct("<IIHBB96s")
    response: int = Response.OK
    status: int = 0
    sense: bytes = b""
    residual: int = 0
    status_qualifier: int = 0

    def pack(self) -> bytes:
        sense = self.sense[:SENSE_SIZE]
        return self.WIRE.pack(len(sense), self.residual, self.status_qualifier, self.status, self.response, sense)

    @classmethod
    def unpack(cls, data: bytes) -> Self | None:
        """From the start of what the device wrote; None when that is too short or its sense too long."""
        if len(data) < cls.SIZE:
            return None
        sense_length, residual, qualifier, status, response, sense = cls.WIRE.unpack_from(data)
        if sense_length > SENSE_SIZE:
            return None
        return cls(response, status, sense[:sense_length], residual, qualifier)


# ------------------------------------------------------------------------------------------------ control queue

_TMF = struct.Struct("<II8sQ")
_AN = struct.Struct("<I8sI")
_AN_ANSWER = struct.Struct("<IB")


@dataclass(frozen=True, slots=True)
class TaskManagementRequest:
    """A task management function: 24 bytes, answered by one response byte.  subtype may be unknown."""

    subtype: int
    lun: bytes
    tag: int = 0

    def pack(self) -> bytes:
        return _TMF.pack(ControlType.TMF, self.subtype, self.lun, self.tag)


@dataclass(frozen=True, slots=True)
class AsyncNotification:
    """A query for (AN_QUERY) or subscription to (AN_SUBSCRIBE) MMC's events: 16 bytes, answered by 5.

    type: which of the two.  events: the bits asked for.
    """

    type: ControlType
    lun: bytes
    events: int

    def pack(self) -> bytes:
        return _AN.pack(self.type, self.lun, self.events)


def decode_control(data: bytes) -> TaskManagementRequest | AsyncNotification | None:
    """The request in a control buffer's readable part; None when its type is unknown or it is too short (FAILURE)."""
    kind = int.from_bytes(data[:4], "little")
    if len(data) >= _TMF.size and kind == ControlType.TMF:
        _, subtype, lun, tag = _TMF.unpack_from(data)
        return TaskManagementRequest(subtype, lun, tag)
    if len(data) >= _AN.size and kind in (ControlType.AN_QUERY, ControlType.AN_SUBSCRIBE):
        _, lun, events = _AN.unpack_from(data)
        return AsyncNotification(ControlType(kind), lun, events)
    return None


def encode_async_answer(events: int, response: int) -> bytes:
    """The 5 bytes that answer an AsyncNotification: the bits that are (now) subscribed to, and the response."""
    return _AN_ANSWER.pack(events, response)


def decode_async_answer(data: bytes) -> tuple[int, int] | None:
    """(events, response); None when the device wrote less than 5 bytes."""
    if len(data) < _AN_ANSWER.size:
        return None
    events, response = _AN_ANSWER.unpack_from(data)
    return events, response


# ------------------------------------------------------------------------------------------------ event queue


@dataclass(frozen=True, slots=True)
class Event:
    """An event, 16 bytes.  lun: the field, see encode_event_lun.  missed: others were lost before it."""

    SIZE: ClassVar[int] = 16
    WIRE: ClassVar[struct.Struct] = struct.Struct("<I8sI")
    type: int = EventType.NO_EVENT
    lun: bytes = bytes(8)
    reason: int = 0
    missed: bool = False

    def pack(self) -> bytes:
        return self.WIRE.pack(self.type | (EVENTS_MISSED if self.missed else 0), self.lun, self.reason)

    @classmethod
    def unpack(cls, data: bytes) -> Self | None:
        """From an event buffer; None when the device wrote less than an event."""
        if len(data) < cls.SIZE:
            return None
        word, lun, reason = cls.WIRE.unpack_from(data)
        return cls(word & ~EVENTS_MISSED, lun, reason, bool(word & EVENTS_MISSED))

    @classmethod
    def transport_reset(cls, target: int, lun: int, reason: ResetReason, *, missed: bool = False) -> Self:
        """A unit appeared, went away or was reset.  Needs HOTPLUG, but for HARD."""
        return cls(EventType.TRANSPORT_RESET, encode_event_lun(target, lun), reason, missed)

    @classmethod
    def param_change(cls, target: int, lun: int, asc: int, ascq: int, *, missed: bool = False) -> Self:
        """A unit's parameters changed, as the sense code says (2Ah 09h: its capacity).  Needs CHANGE."""
        return cls(EventType.PARAM_CHANGE, encode_event_lun(target, lun), asc | ascq << 8, missed)


def cdb_of(field: bytes) -> bytes:
    """The CDB in a request's cdb field, without what the driver has filled the field up with.

    At least 16 bytes; more only for a variable length CDB (7Fh, SPC-4 4.2.3), or where more than zeros follow: a target
    may refuse a command whose CDB is longer than its operation code says.
    """
    if field[:1] == b"\x7f":
        return field[: max(16, 8 + field[7])]
    return field if any(field[16:]) else field[:16]
