"""FC frames: the 24-byte Frame_Header and the Data_Field behind it (FC-FS-4 clause 11 and 12).

SOF, EOF and CRC belong to the medium under a frame and are not here: the first and the last frame
of a sequence follow from SEQ_CNT and F_CTL, and class 3 is the only class.  Fill bytes are: a
Data_Field is whole words on the wire, F_CTL says how many bytes of the last one are fill.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

HEADER_LENGTH = 24
#: The longest Data_Field (FC-FS-4 9.3).
MAX_PAYLOAD = 2112
MAX_FRAME = HEADER_LENGTH + MAX_PAYLOAD
#: An exchange identifier that its side has not assigned (FC-FS-4 12.13).
UNASSIGNED_XID = 0xFFFF


class FrameError(ValueError):
    """Bytes that are not a frame, or not the structure that they should be; the message says why."""


class RCtl(enum.IntEnum):
    """R_CTL, routing and information category (FC-FS-4 tables 24 to 30), as far as class 3 and FCP use it."""

    DATA_UNCATEGORIZED = 0x00
    DATA_SOLICITED = 0x01  # FCP_DATA
    DATA_UNSOLICITED_CONTROL = 0x02  # CT requests
    DATA_SOLICITED_CONTROL = 0x03  # CT replies, FCP_CONF
    DATA_DESCRIPTOR = 0x05  # FCP_XFER_RDY
    DATA_UNSOLICITED_COMMAND = 0x06  # FCP_CMND
    DATA_COMMAND_STATUS = 0x07  # FCP_RSP
    ELS_REQUEST = 0x22
    ELS_REPLY = 0x23
    BLS_NOP = 0x80
    BLS_ABTS = 0x81
    BLS_BA_ACC = 0x84
    BLS_BA_RJT = 0x85
    LINK_P_RJT = 0xC2
    LINK_F_RJT = 0xC3
    LINK_P_BSY = 0xC4
    LINK_F_BSY = 0xC5


class FcType(enum.IntEnum):
    """TYPE (FC-FS-4 table 34)."""

    BLS = 0x00
    ELS = 0x01
    FCP = 0x08
    CT = 0x20


class FCtl(enum.IntFlag):
    """F_CTL (FC-FS-4 table 37); the fill bits are the codec's."""

    EXCHANGE_RESPONDER = 0x800000  # Exchange Context: sent by the responder
    SEQUENCE_RECIPIENT = 0x400000
    FIRST_SEQUENCE = 0x200000
    LAST_SEQUENCE = 0x100000
    END_SEQUENCE = 0x080000
    PRIORITY = 0x020000
    SEQUENCE_INITIATIVE = 0x010000  # transferred with this sequence
    RETRANSMITTED = 0x000200
    RELATIVE_OFFSET = 0x000008  # PARAMETER holds the offset of the payload


#: F_CTL of a request in one frame (ELS, CT, FCP_CMND) and of the reply that ends its exchange.
F_CTL_REQUEST = FCtl.FIRST_SEQUENCE | FCtl.END_SEQUENCE | FCtl.SEQUENCE_INITIATIVE
F_CTL_REPLY = FCtl.EXCHANGE_RESPONDER | FCtl.LAST_SEQUENCE | FCtl.END_SEQUENCE | FCtl.SEQUENCE_INITIATIVE
#: FCP_XFER_RDY gives the initiative away; FCP_RSP, BA_ACC and BA_RJT end the exchange and keep it.
F_CTL_XFER_RDY = FCtl.EXCHANGE_RESPONDER | FCtl.END_SEQUENCE | FCtl.SEQUENCE_INITIATIVE
F_CTL_RESPONSE = FCtl.EXCHANGE_RESPONDER | FCtl.LAST_SEQUENCE | FCtl.END_SEQUENCE
#: An FCP_RSP that asks to be confirmed gives the initiative away; FCP_CONF ends the exchange, from its originator.
F_CTL_RSP_TO_CONFIRM = F_CTL_XFER_RDY
F_CTL_CONF = FCtl.LAST_SEQUENCE | FCtl.END_SEQUENCE
F_CTL_ABTS = FCtl.END_SEQUENCE | FCtl.SEQUENCE_INITIATIVE


class Address(enum.IntEnum):
    """Well-known addresses (FC-FS-4 table 32)."""

    UNIDENTIFIED = 0x000000  # an N_Port before its login
    MANAGEMENT_SERVER = 0xFFFFFA
    DIRECTORY_SERVER = 0xFFFFFC
    FABRIC_CONTROLLER = 0xFFFFFD
    F_PORT = 0xFFFFFE
    BROADCAST = 0xFFFFFF


#: Domain controllers: the switch with this Domain_ID (FC-FS-4 table 32).
DOMAIN_CONTROLLER = 0xFFFC00


_HEADER = struct.Struct("!B3sB3sB3sBBHHHI")


def pack_id(port_id: int) -> bytes:
    """An N_Port_ID or another 24-bit number in 3 bytes."""
    return port_id.to_bytes(3, "big")


def unpack_id(data: bytes) -> int:
    return int.from_bytes(data, "big")


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame.  payload: the Data_Field without fill bytes, with optional headers where df_ctl says so.

    r_ctl and type are plain integers, because a switch also carries frames that it does not know;
    they compare equal to RCtl and FcType.  f_ctl is without the fill bits.
    """

    r_ctl: int
    d_id: int
    s_id: int
    type: int
    f_ctl: int
    ox_id: int
    rx_id: int = UNASSIGNED_XID
    seq_id: int = 0
    seq_cnt: int = 0
    parameter: int = 0
    payload: bytes = b""
    df_ctl: int = 0
    cs_ctl: int = 0

    def pack(self) -> bytes:
        """Header, payload and fill bytes.  Raises FrameError when the payload is longer than a frame carries."""
        fill = -len(self.payload) % 4
        if len(self.payload) + fill > MAX_PAYLOAD:
            raise FrameError(f"a payload of {len(self.payload)} bytes does not fit in a frame")
        header = _HEADER.pack(
            self.r_ctl,
            pack_id(self.d_id),
            self.cs_ctl,
            pack_id(self.s_id),
            self.type,
            pack_id(self.f_ctl & ~3 | fill),
            self.seq_id,
            self.df_ctl,
            self.seq_cnt,
            self.ox_id,
            self.rx_id,
            self.parameter,
        )
        return header + self.payload + bytes(fill)

    @classmethod
    def unpack(cls, data: bytes) -> Frame:
        """Raises FrameError when this is not a frame: too short, too long, not whole words, more fill than payload."""
        if not HEADER_LENGTH <= len(data) <= MAX_FRAME or len(data) % 4:
            raise FrameError(f"{len(data)} bytes are no frame")
        (r_ctl, d_id, cs_ctl, s_id, type_, f_ctl_, seq_id, df_ctl, seq_cnt, ox_id, rx_id, parameter) = (
            _HEADER.unpack_from(data)
        )
        f_ctl = unpack_id(f_ctl_)
        fill = f_ctl & 3
        if fill > len(data) - HEADER_LENGTH:
            raise FrameError(f"{fill} fill bytes in a frame without payload")
        return cls(
            r_ctl=r_ctl,
            d_id=unpack_id(d_id),
            s_id=unpack_id(s_id),
            type=type_,
            f_ctl=f_ctl & ~3,
            ox_id=ox_id,
            rx_id=rx_id,
            seq_id=seq_id,
            seq_cnt=seq_cnt,
            parameter=parameter,
            payload=bytes(data[HEADER_LENGTH : len(data) - fill]),
            df_ctl=df_ctl,
            cs_ctl=cs_ctl,
        )

    @property
    def from_responder(self) -> bool:
        """Sent by the exchange's responder: OX_ID is the receiver's own number."""
        return bool(self.f_ctl & FCtl.EXCHANGE_RESPONDER)

    @property
    def ends_sequence(self) -> bool:
        return bool(self.f_ctl & FCtl.END_SEQUENCE)

    def __str__(self) -> str:
        return (
            f"R_CTL {self.r_ctl:02x} TYPE {self.type:02x} {self.s_id:06x}->{self.d_id:06x} "
            f"OX_ID {self.ox_id:04x} RX_ID {self.rx_id:04x} SEQ {self.seq_id}/{self.seq_cnt} {len(self.payload)} bytes"
        )


def els_request(s_id: int, d_id: int, ox_id: int, payload: bytes) -> Frame:
    """An Extended Link Service request, first sequence of its exchange."""
    return Frame(RCtl.ELS_REQUEST, d_id, s_id, FcType.ELS, F_CTL_REQUEST, ox_id, payload=payload)


def els_reply(request: Frame, payload: bytes, *, d_id: int | None = None, rx_id: int = UNASSIGNED_XID) -> Frame:
    """LS_ACC or LS_RJT for a request, from whom it was sent to.  d_id: the new N_Port_ID in an LS_ACC of FLOGI."""
    to = request.s_id if d_id is None else d_id
    return Frame(RCtl.ELS_REPLY, to, request.d_id, FcType.ELS, F_CTL_REPLY, request.ox_id, rx_id, payload=payload)
