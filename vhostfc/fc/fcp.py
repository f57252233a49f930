"""The SCSI Fibre Channel Protocol's information units (FCP-4 clause 9).

FCP_CMND takes a command or a task management function to a logical unit, FCP_XFER_RDY asks for a
burst of the data of a write, FCP_DATA carries data either way (its payload is nothing but data),
FCP_RSP ends the exchange, or asks for an FCP_CONF that does.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Self

from vhostfc.fc.frame import (
    F_CTL_CONF,
    F_CTL_REQUEST,
    F_CTL_RESPONSE,
    F_CTL_RSP_TO_CONFIRM,
    F_CTL_XFER_RDY,
    FcType,
    Frame,
    FrameError,
    RCtl,
)

#: The longest CDB (SPC-4 4.2.3).
MAX_CDB = 260


class TaskAttribute(enum.IntEnum):
    """FCP-4 table 22."""

    SIMPLE = 0
    HEAD_OF_QUEUE = 1
    ORDERED = 2
    ACA = 4


class TmFlag(enum.IntFlag):
    """TASK MANAGEMENT FLAGS (FCP-4 table 23); at most one is set."""

    QUERY_TASK_SET = 0x01
    ABORT_TASK_SET = 0x02
    CLEAR_TASK_SET = 0x04
    QUERY_ASYNCHRONOUS_EVENT = 0x08
    LOGICAL_UNIT_RESET = 0x10
    TARGET_RESET = 0x20
    CLEAR_ACA = 0x40


_CMND = struct.Struct("!8sBBBB")
_WRITE_DATA, _READ_DATA = 1, 2


@dataclass(frozen=True, slots=True)
class FcpCmnd:
    """FCP_CMND (FCP-4 9.2).

    cdb: 16 bytes, or more, up to 260, in words; a shorter one is filled with zeros when packed.
    data_length: FCP_DL, bytes of the data buffer.  write, read: which way the data goes; when both ways,
    data_length is the write's and bidirectional_read_length the read's.
    """

    lun: bytes
    cdb: bytes
    data_length: int = 0
    write: bool = False
    read: bool = False
    attribute: int = TaskAttribute.SIMPLE
    priority: int = 0
    reference: int = 0
    tm_flags: int = 0
    bidirectional_read_length: int = 0

    def pack(self) -> bytes:
        """Raises FrameError for a CDB that no FCP_CMND can carry."""
        if len(self.cdb) > MAX_CDB:
            raise FrameError(f"a CDB of {len(self.cdb)} bytes, {MAX_CDB} are the most")
        cdb = self.cdb.ljust(16, b"\0")
        cdb += bytes(-len(cdb) % 4)
        additional = (len(cdb) - 16) // 4
        return (
            _CMND.pack(
                self.lun,
                self.reference,
                self.priority << 3 | self.attribute,
                self.tm_flags,
                additional << 2 | _READ_DATA * self.read | _WRITE_DATA * self.write,
            )
            + cdb
            + struct.pack("!I", self.data_length)
            + (struct.pack("!I", self.bidirectional_read_length) if self.read and self.write else b"")
        )

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Raises FrameError when the payload is shorter than its additional CDB length says, or that is too long."""
        if len(payload) < 32:
            raise FrameError(f"an FCP_CMND of {len(payload)} bytes, 32 are the least")
        lun, reference, attribute, tm_flags, flags = _CMND.unpack_from(payload)
        end = 28 + 4 * (flags >> 2)
        if end - 12 > MAX_CDB:
            raise FrameError(f"an FCP_CMND with a CDB of {end - 12} bytes, {MAX_CDB} are the most")
        both = flags & 3 == _READ_DATA | _WRITE_DATA
        if len(payload) < end + (8 if both else 4):
            raise FrameError(f"an FCP_CMND of {len(payload)} bytes with a CDB of {end - 12}")
        return cls(
            lun=lun,
            cdb=payload[12:end],
            data_length=int.from_bytes(payload[end : end + 4], "big"),
            write=bool(flags & _WRITE_DATA),
            read=bool(flags & _READ_DATA),
            attribute=attribute & 7,
            priority=attribute >> 3 & 0x0F,
            reference=reference,
            tm_flags=tm_flags,
            bidirectional_read_length=int.from_bytes(payload[end + 4 : end + 8], "big") if both else 0,
        )


@dataclass(frozen=True, slots=True)
class FcpXferRdy:
    """FCP_XFER_RDY (FCP-4 9.3): the target wants this part of the data of a write."""

    offset: int
    length: int

    def pack(self) -> bytes:
        return struct.pack("!II4x", self.offset, self.length)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        if len(payload) < 12:
            raise FrameError(f"an FCP_XFER_RDY of {len(payload)} bytes, 12 are the least")
        return cls(*struct.unpack_from("!II", payload))


class ResponseCode(enum.IntEnum):
    """RSP_CODE (FCP-4 table 30)."""

    COMPLETE = 0x00
    DATA_LENGTH_MISMATCH = 0x01
    INVALID_CMND_FIELD = 0x02
    DATA_RO_MISMATCH = 0x03
    REJECTED = 0x04
    FAILED = 0x05
    SUCCEEDED = 0x08
    INCORRECT_LUN = 0x09


_RSP = struct.Struct("!8xHBBIII")
_INFO_VALID, _SENSE_VALID, _OVER, _UNDER, _CONFIRM = 0x01, 0x02, 0x04, 0x08, 0x10


@dataclass(frozen=True, slots=True)
class FcpRsp:
    """FCP_RSP (FCP-4 9.5).

    residual: bytes that were expected and not moved (> 0, FCP_RESID_UNDER) or that did not fit (< 0,
    FCP_RESID_OVER).  code: the RSP_CODE, or None when there is no response information; status holds
    only then or with code COMPLETE.  confirm: FCP_CONF_REQ, the exchange goes on until an FCP_CONF has come.
    """

    status: int = 0
    residual: int = 0
    sense: bytes = b""
    code: int | None = None
    status_qualifier: int = 0
    confirm: bool = False

    def pack(self) -> bytes:
        info = b"" if self.code is None else struct.pack("!3xB4x", self.code)
        flags = _INFO_VALID * bool(info) | _SENSE_VALID * bool(self.sense)
        flags |= _UNDER * (self.residual > 0) | _OVER * (self.residual < 0) | _CONFIRM * self.confirm
        return (
            _RSP.pack(
                self.status_qualifier,
                flags,
                self.status,
                min(abs(self.residual), 0xFFFFFFFF),
                len(self.sense),
                len(info),
            )
            + info
            + self.sense
        )

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Raises FrameError when the payload does not hold the lengths that it states."""
        if len(payload) < _RSP.size:
            raise FrameError(f"an FCP_RSP of {len(payload)} bytes, {_RSP.size} are the least")
        qualifier, flags, status, residual, sense_length, info_length = _RSP.unpack_from(payload)
        if not flags & _INFO_VALID:
            info_length = 0
        if not flags & _SENSE_VALID:
            sense_length = 0
        sense_at = _RSP.size + info_length
        if len(payload) < sense_at + sense_length or (flags & _INFO_VALID and info_length not in (4, 8)):
            raise FrameError(
                f"an FCP_RSP of {len(payload)} bytes with {info_length} of information and {sense_length} of sense"
            )
        sign = 1 if flags & _UNDER else -1 if flags & _OVER else 0
        return cls(
            status=status,
            residual=sign * residual,
            sense=payload[sense_at : sense_at + sense_length],
            code=payload[_RSP.size + 3] if flags & _INFO_VALID else None,
            status_qualifier=qualifier,
            confirm=bool(flags & _CONFIRM),
        )


# ---------------------------------------------------------------- frames


def cmnd_frame(s_id: int, d_id: int, ox_id: int, cmnd: FcpCmnd) -> Frame:
    return Frame(RCtl.DATA_UNSOLICITED_COMMAND, d_id, s_id, FcType.FCP, F_CTL_REQUEST, ox_id, payload=cmnd.pack())


def xfer_rdy_frame(cmnd: Frame, rx_id: int, seq_id: int, xfer_rdy: FcpXferRdy) -> Frame:
    """From the target, in the exchange of this FCP_CMND."""
    return Frame(
        RCtl.DATA_DESCRIPTOR,
        cmnd.s_id,
        cmnd.d_id,
        FcType.FCP,
        F_CTL_XFER_RDY,
        cmnd.ox_id,
        rx_id,
        seq_id,
        payload=xfer_rdy.pack(),
    )


def rsp_frame(cmnd: Frame, rx_id: int, seq_id: int, rsp: FcpRsp) -> Frame:
    """From the target: ends the exchange of this FCP_CMND, or gives the initiative away for an FCP_CONF."""
    return Frame(
        RCtl.DATA_COMMAND_STATUS,
        cmnd.s_id,
        cmnd.d_id,
        FcType.FCP,
        F_CTL_RSP_TO_CONFIRM if rsp.confirm else F_CTL_RESPONSE,
        cmnd.ox_id,
        rx_id,
        seq_id,
        payload=rsp.pack(),
    )


def conf_frame(rsp: Frame, seq_id: int) -> Frame:
    """FCP_CONF, without a payload (FCP-4 9.6): from the initiator, ends the exchange of this FCP_RSP."""
    return Frame(RCtl.DATA_SOLICITED_CONTROL, rsp.s_id, rsp.d_id, FcType.FCP, F_CTL_CONF, rsp.ox_id, rsp.rx_id, seq_id)
