"""Basic Link Services: ABTS and its two answers (FC-FS-4 clause 16).

ABTS travels inside the exchange that it aborts: the same OX_ID and RX_ID, no payload.  BA_ACC with
LAST_SEQUENCE ends that exchange; its SEQ_CNT range says what is not to be trusted until R_A_TOV is over.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Self

from vhostfc.fc.frame import (
    F_CTL_ABTS,
    F_CTL_RESPONSE,
    UNASSIGNED_XID,
    FCtl,
    FcType,
    Frame,
    FrameError,
    RCtl,
)

_ACC = struct.Struct("!BBxxHHHH")


@dataclass(frozen=True, slots=True)
class BaAcc:
    """seq_id: the last deliverable sequence, None when not told."""

    ox_id: int
    rx_id: int
    seq_id: int | None = None
    low_seq_cnt: int = 0
    high_seq_cnt: int = 0xFFFF

    def pack(self) -> bytes:
        valid = 0 if self.seq_id is None else 0x80
        return _ACC.pack(valid, self.seq_id or 0, self.ox_id, self.rx_id, self.low_seq_cnt, self.high_seq_cnt)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        if len(payload) < _ACC.size:
            raise FrameError(f"a BA_ACC of {len(payload)} bytes, {_ACC.size} are the least")
        valid, seq_id, ox_id, rx_id, low, high = _ACC.unpack_from(payload)
        return cls(ox_id, rx_id, seq_id if valid & 0x80 else None, low, high)


class Reason(enum.IntEnum):
    """BA_RJT reason codes (FC-FS-4 table 90)."""

    INVALID_COMMAND = 0x01
    LOGICAL_ERROR = 0x03
    LOGICAL_BUSY = 0x05
    PROTOCOL_ERROR = 0x07
    UNABLE_TO_PERFORM = 0x09


class Explanation(enum.IntEnum):
    """BA_RJT reason code explanations (FC-FS-4 table 91)."""

    NONE = 0x00
    INVALID_OX_ID_RX_ID = 0x03
    SEQUENCE_ABORTED = 0x05


@dataclass(frozen=True, slots=True)
class BaRjt:
    reason: int
    explanation: int = Explanation.NONE
    vendor: int = 0

    def pack(self) -> bytes:
        return bytes([0, self.reason, self.explanation, self.vendor])

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        if len(payload) < 4:
            raise FrameError(f"a BA_RJT of {len(payload)} bytes, 4 are the least")
        return cls(*payload[1:4])


def abts_frame(s_id: int, d_id: int, ox_id: int, rx_id: int = UNASSIGNED_XID, seq_id: int = 0) -> Frame:
    """From the exchange's originator."""
    return Frame(RCtl.BLS_ABTS, d_id, s_id, FcType.BLS, F_CTL_ABTS, ox_id, rx_id, seq_id)


def answer(abts: Frame, body: BaAcc | BaRjt, *, rx_id: int | None = None) -> Frame:
    """The answer to an ABTS, whichever side of the exchange sent it."""
    f_ctl = F_CTL_RESPONSE if not abts.from_responder else F_CTL_RESPONSE & ~FCtl.EXCHANGE_RESPONDER
    return Frame(
        RCtl.BLS_BA_ACC if isinstance(body, BaAcc) else RCtl.BLS_BA_RJT,
        abts.s_id,
        abts.d_id,
        FcType.BLS,
        f_ctl,
        abts.ox_id,
        abts.rx_id if rx_id is None else rx_id,
        abts.seq_id,
        payload=body.pack(),
    )
