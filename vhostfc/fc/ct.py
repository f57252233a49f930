"""Common Transport: how the fabric's servers are asked (FC-GS-6 clause 4).

A CT_IU is a 16-byte preamble that names the server and the command, and a body.  Requests go to the
server's address with R_CTL 02h, replies come with 03h.  The bodies are each server's own: ns.py, fdmi.py.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Self

from vhostfc.fc.els import describe
from vhostfc.fc.frame import (
    F_CTL_REQUEST,
    FcType,
    Frame,
    FrameError,
    RCtl,
    pack_id,
    unpack_id,
)

DIRECTORY_SERVICE = 0xFC
NAME_SERVER = 0x02
MANAGEMENT_SERVICE = 0xFA
_PREAMBLE = struct.Struct("!B3sBBBxHHxBBB")
PREAMBLE_LENGTH = _PREAMBLE.size


class Ct(enum.IntEnum):
    """Command and response codes (FC-GS-6 tables 6 and 20)."""

    REJECT = 0x8001
    ACCEPT = 0x8002
    GA_NXT = 0x0100
    GPN_ID = 0x0112
    GNN_ID = 0x0113
    GCS_ID = 0x0114
    GFT_ID = 0x0117
    GSPN_ID = 0x0118
    GPT_ID = 0x011A
    GFPN_ID = 0x011C
    GFF_ID = 0x011F
    GID_PN = 0x0121
    GID_NN = 0x0131
    GSNN_NN = 0x0139
    GID_FT = 0x0171
    GPN_FT = 0x0172
    GNN_FT = 0x0173
    GID_PT = 0x01A1
    GID_FF = 0x01F1
    RPN_ID = 0x0212
    RNN_ID = 0x0213
    RCS_ID = 0x0214
    RFT_ID = 0x0217
    RSPN_ID = 0x0218
    RPT_ID = 0x021A
    RFF_ID = 0x021F
    RSNN_NN = 0x0239
    DA_ID = 0x0300


class Reason(enum.IntEnum):
    """Reject_CT_IU reason codes (FC-GS-6 table 9)."""

    INVALID_COMMAND = 0x01
    INVALID_VERSION = 0x02
    LOGICAL_ERROR = 0x03
    INVALID_SIZE = 0x04
    LOGICAL_BUSY = 0x05
    PROTOCOL_ERROR = 0x07
    UNABLE_TO_PERFORM = 0x09
    NOT_SUPPORTED = 0x0B


class Explanation(enum.IntEnum):
    """The name server's reason code explanations (FC-GS-6 table 22)."""

    NONE = 0x00
    PORT_ID_NOT_REGISTERED = 0x01
    PORT_NAME_NOT_REGISTERED = 0x02
    NODE_NAME_NOT_REGISTERED = 0x03
    CLASS_NOT_REGISTERED = 0x04
    FC4_TYPES_NOT_REGISTERED = 0x07
    SYMBOLIC_PORT_NAME_NOT_REGISTERED = 0x08
    SYMBOLIC_NODE_NAME_NOT_REGISTERED = 0x09
    PORT_TYPE_NOT_REGISTERED = 0x0A
    FC4_FEATURES_NOT_REGISTERED = 0x0F
    ACCESS_DENIED = 0x10
    UNACCEPTABLE_PORT_ID = 0x11
    DATABASE_EMPTY = 0x12
    NO_OBJECT_IN_SCOPE = 0x13


class CtError(FrameError):
    """A request that cannot be read; reason and explanation are what its Reject_CT_IU shall say."""

    def __init__(self, message: str, reason: Reason, explanation: int = Explanation.NONE) -> None:
        super().__init__(message)
        self.reason = reason
        self.explanation = explanation


@dataclass(frozen=True, slots=True)
class CtIu:
    """A CT information unit.  code: a Ct; size: most words of body that a request accepts, residual in a reply."""

    code: int
    body: bytes = b""
    reason: int = 0
    explanation: int = 0
    vendor: int = 0
    size: int = 0
    fs_type: int = DIRECTORY_SERVICE
    fs_subtype: int = NAME_SERVER
    options: int = 0
    in_id: int = 0
    revision: int = 1

    def pack(self) -> bytes:
        return (
            _PREAMBLE.pack(
                self.revision,
                pack_id(self.in_id),
                self.fs_type,
                self.fs_subtype,
                self.options,
                self.code,
                self.size,
                self.reason,
                self.explanation,
                self.vendor,
            )
            + self.body
        )

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Raises FrameError when there is not even a preamble."""
        if len(payload) < PREAMBLE_LENGTH:
            raise FrameError(f"a CT_IU of {len(payload)} bytes, {PREAMBLE_LENGTH} are the least")
        revision, in_id, fs_type, fs_subtype, options, code, size, reason, explanation, vendor = _PREAMBLE.unpack_from(
            payload
        )
        return cls(
            code=code,
            body=payload[PREAMBLE_LENGTH:],
            reason=reason,
            explanation=explanation,
            vendor=vendor,
            size=size,
            fs_type=fs_type,
            fs_subtype=fs_subtype,
            options=options,
            in_id=unpack_id(in_id),
            revision=revision,
        )

    @property
    def accepted(self) -> bool:
        return self.code == Ct.ACCEPT

    def __str__(self) -> str:
        if self.code == Ct.REJECT:
            return f"reason {describe(self.reason, Reason)}, explanation {describe(self.explanation, Explanation)}"
        return describe(self.code, Ct)


def accept(body: bytes = b"") -> CtIu:
    return CtIu(Ct.ACCEPT, body)


def reject(reason: int, explanation: int = Explanation.NONE) -> CtIu:
    return CtIu(Ct.REJECT, reason=reason, explanation=explanation)


def ct_request(s_id: int, d_id: int, ox_id: int, payload: bytes) -> Frame:
    """A CT request in one frame."""
    return Frame(RCtl.DATA_UNSOLICITED_CONTROL, d_id, s_id, FcType.CT, F_CTL_REQUEST, ox_id, payload=payload)
