"""Sense data: why a command ended in CHECK CONDITION (SPC-4 4.5).

Two formats carry the same facts: fixed (70h), which everybody reads, and descriptor (72h), which has
room for a 64-bit LBA and is used when the D_SENSE bit of the control mode page asks for it.

Inside this package a command that cannot go on raises CheckCondition; LogicalUnit.execute() is the
one door where it becomes a ScsiResult, so no caller outside ever sees the exception.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass


class SenseKey(enum.IntEnum):
    """SPC-4 table 48."""

    NO_SENSE = 0x0
    RECOVERED_ERROR = 0x1
    NOT_READY = 0x2
    MEDIUM_ERROR = 0x3
    HARDWARE_ERROR = 0x4
    ILLEGAL_REQUEST = 0x5
    UNIT_ATTENTION = 0x6
    DATA_PROTECT = 0x7
    COPY_ABORTED = 0xA
    ABORTED_COMMAND = 0xB
    MISCOMPARE = 0xE


class Asc(enum.IntEnum):
    """Additional sense code << 8 | its qualifier, by the names of SPC-4 annex F."""

    NO_ADDITIONAL_SENSE_INFORMATION = 0x0000
    OPERATION_IN_PROGRESS = 0x0016
    LOGICAL_UNIT_NOT_READY_INITIALIZING_COMMAND_REQUIRED = 0x0402
    LOGICAL_UNIT_NOT_READY_MANUAL_INTERVENTION_REQUIRED = 0x0403
    LOGICAL_UNIT_NOT_READY_FORMAT_IN_PROGRESS = 0x0404
    LOGICAL_UNIT_NOT_ACCESSIBLE_ASYMMETRIC_ACCESS_STATE_TRANSITION = 0x040A
    LOGICAL_UNIT_NOT_ACCESSIBLE_TARGET_PORT_IN_STANDBY_STATE = 0x040B
    LOGICAL_UNIT_NOT_ACCESSIBLE_TARGET_PORT_IN_UNAVAILABLE_STATE = 0x040C
    LOGICAL_UNIT_NOT_READY_SANITIZE_IN_PROGRESS = 0x041B
    UNREACHABLE_COPY_TARGET = 0x0804
    WRITE_ERROR = 0x0C00
    THIRD_PARTY_DEVICE_FAILURE = 0x0D01
    COPY_TARGET_DEVICE_NOT_REACHABLE = 0x0D02
    INCORRECT_COPY_TARGET_DEVICE_TYPE = 0x0D03
    INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT = 0x0E03
    UNRECOVERED_READ_ERROR = 0x1100
    PARAMETER_LIST_LENGTH_ERROR = 0x1A00
    MISCOMPARE_DURING_VERIFY_OPERATION = 0x1D00
    INVALID_COMMAND_OPERATION_CODE = 0x2000
    LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE = 0x2100
    INVALID_FIELD_IN_CDB = 0x2400
    LOGICAL_UNIT_NOT_SUPPORTED = 0x2500
    INVALID_FIELD_IN_PARAMETER_LIST = 0x2600
    INVALID_RELEASE_OF_PERSISTENT_RESERVATION = 0x2604
    TOO_MANY_TARGET_DESCRIPTORS = 0x2606
    UNSUPPORTED_TARGET_DESCRIPTOR_TYPE_CODE = 0x2607
    TOO_MANY_SEGMENT_DESCRIPTORS = 0x2608
    UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE_CODE = 0x2609
    INLINE_DATA_LENGTH_EXCEEDED = 0x260B
    WRITE_PROTECTED = 0x2700
    SPACE_ALLOCATION_FAILED_WRITE_PROTECT = 0x2707
    POWER_ON_RESET_OR_BUS_DEVICE_RESET_OCCURRED = 0x2900
    POWER_ON_OCCURRED = 0x2901
    SCSI_BUS_RESET_OCCURRED = 0x2902
    BUS_DEVICE_RESET_FUNCTION_OCCURRED = 0x2903
    DEVICE_INTERNAL_RESET = 0x2904
    I_T_NEXUS_LOSS_OCCURRED = 0x2907
    MODE_PARAMETERS_CHANGED = 0x2A01
    RESERVATIONS_PREEMPTED = 0x2A03
    RESERVATIONS_RELEASED = 0x2A04
    REGISTRATIONS_PREEMPTED = 0x2A05
    ASYMMETRIC_ACCESS_STATE_CHANGED = 0x2A06
    CAPACITY_DATA_HAS_CHANGED = 0x2A09
    FORMAT_COMMAND_FAILED = 0x3101
    SANITIZE_COMMAND_FAILED = 0x3103
    MICROCODE_HAS_BEEN_CHANGED = 0x3F01
    INQUIRY_DATA_HAS_CHANGED = 0x3F03
    REPORTED_LUNS_DATA_HAS_CHANGED = 0x3F0E
    INTERNAL_TARGET_FAILURE = 0x4400
    INVALID_MESSAGE_ERROR = 0x4900
    INSUFFICIENT_REGISTRATION_RESOURCES = 0x5504


@dataclass(frozen=True, slots=True)
class FieldPointer:
    """Which field is in error (SPC-4 4.5.2.4.2): a byte of the CDB or of the parameter list, perhaps a bit (0..7)."""

    byte: int
    bit: int | None = None
    in_cdb: bool = True

    def encode(self) -> bytes:
        """The three sense-key specific bytes; a byte number that does not fit is FFFFh."""
        first = 0x80 | 0x40 * self.in_cdb | (0 if self.bit is None else 0x08 | self.bit)
        return struct.pack("!BH", first, min(self.byte, 0xFFFF))


@dataclass(frozen=True, slots=True)
class Progress:
    """PROGRESS INDICATION (SPC-4 4.5.2.4.4): how much is done, in 65536ths."""

    done: int

    def encode(self) -> bytes:
        return struct.pack("!BH", 0x80, self.done)


@dataclass(frozen=True, slots=True)
class Sense:
    """What went wrong.  information: an LBA, for COMPARE AND WRITE a byte offset, for EXTENDED COPY the blocks left.

    field: the sense-key specific part: which field is in error, or how far an operation is.
    command_specific: for EXTENDED COPY the number of the segment.
    """

    key: SenseKey
    asc: Asc
    information: int | None = None
    field: FieldPointer | Progress | None = None
    command_specific: int | None = None

    def encode(self, *, descriptor: bool = False) -> bytes:
        """Sense data: 18 bytes in fixed format, or 8 bytes and descriptors with descriptor=True.

        In fixed format an information value beyond 32 bits is left out (VALID 0, SPC-4 4.5.3).
        """
        return self._descriptors() if descriptor else self._fixed()

    def _fixed(self) -> bytes:
        fits = self.information is not None and self.information <= 0xFFFFFFFF
        return struct.pack(
            "!BBBIBIHB3s",
            0x70 | 0x80 * fits,
            0,
            self.key,
            self.information if fits and self.information is not None else 0,
            10,
            self.command_specific or 0,
            self.asc,
            0,
            self.field.encode() if self.field else bytes(3),
        )

    def _descriptors(self) -> bytes:
        body = b""
        if self.information is not None:
            body += struct.pack("!BBBxQ", 0x00, 0x0A, 0x80, self.information)
        if self.command_specific is not None:
            body += struct.pack("!BBxxQ", 0x01, 0x0A, self.command_specific)
        if self.field is not None:
            body += struct.pack("!BBxx3sx", 0x02, 0x06, self.field.encode())
        return struct.pack("!BBH3xB", 0x72, self.key, self.asc, len(body)) + body


def attention_in(sense: bytes) -> Asc | None:
    """The unit attention condition that sense data of ours tell, in either format; None when they tell of none."""
    if len(sense) < 14 and sense[:1] != b"\x72":
        return None
    key, at = (sense[1], 2) if sense[:1] == b"\x72" else (sense[2], 12)
    if key & 0x0F != SenseKey.UNIT_ATTENTION:
        return None
    return Asc(int.from_bytes(sense[at : at + 2], "big"))


NO_SENSE = Sense(SenseKey.NO_SENSE, Asc.NO_ADDITIONAL_SENSE_INFORMATION)


class CheckCondition(Exception):
    """The command ends here, with this sense.  Never leaves the package."""

    def __init__(self, sense: Sense) -> None:
        super().__init__(f"{sense.key.name} {sense.asc:04x}")
        self.sense = sense


def illegal(asc: Asc) -> CheckCondition:
    """ILLEGAL REQUEST for a reason that is no single field."""
    return CheckCondition(Sense(SenseKey.ILLEGAL_REQUEST, asc))


def invalid_cdb(byte: int, bit: int | None = None) -> CheckCondition:
    """INVALID FIELD IN CDB; byte and bit are where the field starts (its most significant bit)."""
    return CheckCondition(Sense(SenseKey.ILLEGAL_REQUEST, Asc.INVALID_FIELD_IN_CDB, field=FieldPointer(byte, bit)))


def invalid_parameter(byte: int, bit: int | None = None) -> CheckCondition:
    """INVALID FIELD IN PARAMETER LIST; byte counts from the start of the list."""
    return CheckCondition(
        Sense(
            SenseKey.ILLEGAL_REQUEST, Asc.INVALID_FIELD_IN_PARAMETER_LIST, field=FieldPointer(byte, bit, in_cdb=False)
        )
    )
