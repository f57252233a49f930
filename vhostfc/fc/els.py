"""Extended Link Services: requests and their replies (FC-LS-3 clause 4 and 6).

A request is the payload of a frame with R_CTL 22h, its first byte says which; LS_ACC and LS_RJT
come back with R_CTL 23h.  An LS_ACC can only be read with its request in mind: each class reads its
own.  Where request and LS_ACC share their layout, one class is both, and `command` tells them apart.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Self

from vhostfc.fc.frame import FrameError, pack_id, unpack_id
from vhostfc.fc.login import Login
from vhostfc.fc.wwn import Wwn


class Els(enum.IntEnum):
    """ELS command codes (FC-LS-3 table 6)."""

    LS_RJT = 0x01
    LS_ACC = 0x02
    PLOGI = 0x03
    FLOGI = 0x04
    LOGO = 0x05
    RTV = 0x0E
    ECHO = 0x10
    RRQ = 0x12
    REC = 0x13
    PRLI = 0x20
    PRLO = 0x21
    FDISC = 0x51
    ADISC = 0x52
    RSCN = 0x61
    SCR = 0x62
    RNID = 0x78


class Reason(enum.IntEnum):
    """LS_RJT reason codes (FC-LS-3 table 8)."""

    INVALID_COMMAND = 0x01
    LOGICAL_ERROR = 0x03
    LOGICAL_BUSY = 0x05
    PROTOCOL_ERROR = 0x07
    UNABLE_TO_PERFORM = 0x09
    NOT_SUPPORTED = 0x0B
    IN_PROGRESS = 0x0E
    VENDOR = 0xFF


class Explanation(enum.IntEnum):
    """LS_RJT reason code explanations (FC-LS-3 table 9)."""

    NONE = 0x00
    OPTIONS = 0x01
    INITIATOR_CONTROL = 0x03
    RECIPIENT_CONTROL = 0x05
    RECEIVE_SIZE = 0x07
    CONCURRENT_SEQUENCES = 0x09
    CREDIT = 0x0B
    INVALID_PORT_NAME = 0x0D
    INVALID_NODE_NAME = 0x0E
    INVALID_COMMON_PARAMETERS = 0x0F
    INVALID_ORIGINATOR_S_ID = 0x15
    INVALID_OX_ID_RX_ID = 0x17
    IN_PROGRESS = 0x19
    LOGIN_REQUIRED = 0x1E
    INVALID_PORT_ID = 0x1F
    INSUFFICIENT_RESOURCES = 0x29
    UNABLE_TO_SUPPLY_DATA = 0x2A
    NOT_SUPPORTED = 0x2C
    INVALID_LENGTH = 0x2D


def describe(value: int, kind: type[enum.IntEnum]) -> str:
    """A code in words, and its number."""
    try:
        return f"{kind(value).name.lower().replace('_', ' ')} ({value:#04x})"
    except ValueError:
        return f"{value:#04x}"


@dataclass(frozen=True, slots=True)
class LsRjt:
    reason: int
    explanation: int = Explanation.NONE
    vendor: int = 0

    def pack(self) -> bytes:
        return struct.pack("!B3xxBBB", Els.LS_RJT, self.reason, self.explanation, self.vendor)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _require(payload, 8, Els.LS_RJT)
        return cls(*payload[5:8])

    def __str__(self) -> str:
        return f"reason {describe(self.reason, Reason)}, explanation {describe(self.explanation, Explanation)}"


class ElsError(FrameError):
    """A request that cannot be read; `rejection` is the answer that it deserves."""

    def __init__(self, message: str, reason: Reason, explanation: Explanation) -> None:
        super().__init__(message)
        self.rejection = LsRjt(reason, explanation)


def _require(payload: bytes, length: int, command: int) -> None:
    if len(payload) < length:
        raise ElsError(
            f"{describe(command, Els)} of {len(payload)} bytes, {length} are the least",
            Reason.PROTOCOL_ERROR,
            Explanation.INVALID_LENGTH,
        )


#: LS_ACC without a body: the reply to LOGO, SCR, RSCN and RRQ.
LS_ACC = bytes([Els.LS_ACC, 0, 0, 0])


@dataclass(frozen=True, slots=True)
class Logo:
    """Logout: the port that leaves."""

    port_id: int
    wwpn: Wwn

    def pack(self) -> bytes:
        return bytes([Els.LOGO, 0, 0, 0, 0]) + pack_id(self.port_id) + self.wwpn.pack()

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _require(payload, 16, Els.LOGO)
        return cls(unpack_id(payload[5:8]), Wwn.unpack(payload[8:16]))


class FcpService(enum.IntFlag):
    """FCP service parameters in PRLI (FCP-4 6.3)."""

    WRITE_XFER_RDY_DISABLED = 0x001
    READ_XFER_RDY_DISABLED = 0x002
    TARGET = 0x010
    INITIATOR = 0x020
    DATA_OVERLAY = 0x040
    CONFIRMED_COMPLETION = 0x080
    RETRY = 0x100


@dataclass(frozen=True, slots=True)
class PrliPage:
    """One service parameter page of PRLI or PRLO; parameters: the FC-4's word, for FCP an FcpService."""

    ESTABLISH = 0x20
    EXECUTED = 0x01

    fc4_type: int
    flags: int = 0
    parameters: int = 0
    originator_associator: int = 0
    responder_associator: int = 0

    @property
    def response(self) -> int:
        """The response code of an LS_ACC; 1 is "request executed"."""
        return self.flags & 0x0F


_PAGE = struct.Struct("!BxBxIII")


@dataclass(frozen=True, slots=True)
class Prli:
    """Process login and logout, request and LS_ACC.  command: PRLI, PRLO or LS_ACC."""

    pages: tuple[PrliPage, ...]
    command: int = Els.PRLI

    def pack(self) -> bytes:
        body = b"".join(
            _PAGE.pack(p.fc4_type, p.flags, p.originator_associator, p.responder_associator, p.parameters)
            for p in self.pages
        )
        return struct.pack("!BBH", self.command, _PAGE.size, 4 + len(body)) + body

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Raises ElsError for a page length other than 16 or a length that is not that of the pages."""
        _require(payload, 4, Els.PRLI)
        command, page_length, length = struct.unpack_from("!BBH", payload)
        _require(payload, length, command)
        if page_length != _PAGE.size or length < 4 + _PAGE.size or (length - 4) % _PAGE.size:
            raise ElsError(
                f"{describe(command, Els)} with pages of {page_length} bytes in {length}",
                Reason.PROTOCOL_ERROR,
                Explanation.INVALID_LENGTH,
            )
        pages = []
        for fc4_type, flags, originator, responder, parameters in _PAGE.iter_unpack(payload[4:length]):
            pages.append(PrliPage(fc4_type, flags, parameters, originator, responder))
        return cls(tuple(pages), command)


_ADISC = struct.Struct("!B4x3s8s8sx3s")


@dataclass(frozen=True, slots=True)
class Adisc:
    """Discover address, request and LS_ACC: who the sender is."""

    wwpn: Wwn
    wwnn: Wwn
    port_id: int
    command: int = Els.ADISC

    def pack(self) -> bytes:
        return _ADISC.pack(self.command, bytes(3), self.wwpn.pack(), self.wwnn.pack(), pack_id(self.port_id))

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _require(payload, _ADISC.size, Els.ADISC)
        command, _, wwpn, wwnn, port_id = _ADISC.unpack_from(payload)
        return cls(Wwn.unpack(wwpn), Wwn.unpack(wwnn), unpack_id(port_id), command)


@dataclass(frozen=True, slots=True)
class Rtv:
    """Read timeout values: the request."""

    def pack(self) -> bytes:
        return bytes([Els.RTV, 0, 0, 0])

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _require(payload, 4, Els.RTV)
        return cls()


@dataclass(frozen=True, slots=True)
class RtvAcc:
    """Times in milliseconds."""

    r_a_tov: int
    e_d_tov: int
    qualifier: int = 0

    def pack(self) -> bytes:
        return struct.pack("!B3xIII", Els.LS_ACC, self.r_a_tov, self.e_d_tov, self.qualifier)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _require(payload, 16, Els.RTV)
        return cls(*struct.unpack_from("!4xIII", payload))


class AddressFormat(enum.IntEnum):
    """How much of an RSCN page's address counts (FC-LS-3 table 103)."""

    PORT = 0
    AREA = 1
    DOMAIN = 2
    FABRIC = 3


class EventQualifier(enum.IntEnum):
    """Why an RSCN was sent (FC-LS-3 table 102)."""

    NONE = 0
    CHANGED_NAME_SERVER_OBJECT = 1
    CHANGED_PORT_ATTRIBUTE = 2
    CHANGED_SERVICE_OBJECT = 3
    CHANGED_SWITCH_CONFIGURATION = 4
    REMOVED_OBJECT = 5


@dataclass(frozen=True, slots=True)
class RscnPage:
    port_id: int
    address_format: int = AddressFormat.PORT
    qualifier: int = EventQualifier.NONE


@dataclass(frozen=True, slots=True)
class Rscn:
    """Registered state change notification: "look again, here"."""

    pages: tuple[RscnPage, ...]

    def pack(self) -> bytes:
        body = b"".join(bytes([p.qualifier << 2 | p.address_format]) + pack_id(p.port_id) for p in self.pages)
        return struct.pack("!BBH", Els.RSCN, 4, 4 + len(body)) + body

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _require(payload, 8, Els.RSCN)
        page_length, length = struct.unpack_from("!xBH", payload)
        _require(payload, length, Els.RSCN)
        if page_length != 4 or length < 8 or length % 4:
            raise ElsError(
                f"RSCN with pages of {page_length} bytes in {length}", Reason.PROTOCOL_ERROR, Explanation.INVALID_LENGTH
            )
        return cls(
            tuple(
                RscnPage(unpack_id(payload[i + 1 : i + 4]), payload[i] & 3, payload[i] >> 2 & 0x0F)
                for i in range(4, length, 4)
            )
        )


class ScrFunction(enum.IntEnum):
    """What an N_Port registers for (FC-LS-3 table 107)."""

    FABRIC_DETECTED = 1
    N_PORT_DETECTED = 2
    FULL = 3
    CLEAR = 255


@dataclass(frozen=True, slots=True)
class Scr:
    """State change registration."""

    function: int = ScrFunction.FULL

    def pack(self) -> bytes:
        return bytes([Els.SCR, 0, 0, 0, 0, 0, 0, self.function])

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _require(payload, 8, Els.SCR)
        return cls(payload[7])


_EXCHANGE = struct.Struct("!B3xx3sHH")


@dataclass(frozen=True, slots=True)
class _OfExchange:
    """RRQ and REC: an exchange by its originator and its two identifiers."""

    s_id: int
    ox_id: int
    rx_id: int

    def _pack(self, command: Els) -> bytes:
        return _EXCHANGE.pack(command, pack_id(self.s_id), self.ox_id, self.rx_id)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _require(payload, _EXCHANGE.size, payload[0] if payload else 0)
        _, s_id, ox_id, rx_id = _EXCHANGE.unpack_from(payload)
        return cls(unpack_id(s_id), ox_id, rx_id)


@dataclass(frozen=True, slots=True)
class Rrq(_OfExchange):
    """Reinstate recovery qualifier: an aborted exchange's identifiers may be used again."""

    def pack(self) -> bytes:
        return self._pack(Els.RRQ)


@dataclass(frozen=True, slots=True)
class Rec(_OfExchange):
    """Read exchange concise: how far an exchange has come."""

    def pack(self) -> bytes:
        return self._pack(Els.REC)


_REC_ACC = struct.Struct("!B3xHHx3sx3sII")


@dataclass(frozen=True, slots=True)
class RecAcc:
    """fc4_value: bytes moved so far; status: E_STAT (FC-LS-3 table 47).

    INITIATIVE: the sender of this accept has the Sequence Initiative.
    """

    OWNER_RESPONDER = 0x80000000
    INITIATIVE = 0x40000000
    COMPLETED = 0x20000000

    ox_id: int
    rx_id: int
    originator_id: int
    responder_id: int
    fc4_value: int
    status: int

    def pack(self) -> bytes:
        return _REC_ACC.pack(
            Els.LS_ACC,
            self.ox_id,
            self.rx_id,
            pack_id(self.originator_id),
            pack_id(self.responder_id),
            self.fc4_value,
            self.status,
        )

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _require(payload, _REC_ACC.size, Els.REC)
        _, ox_id, rx_id, originator, responder, value, status = _REC_ACC.unpack_from(payload)
        return cls(ox_id, rx_id, unpack_id(originator), unpack_id(responder), value, status)


class NodeFormat(enum.IntEnum):
    """Node identification data formats of RNID (FC-LS-3 clause 4)."""

    COMMON = 0x00
    GENERAL_TOPOLOGY = 0xDF


class AssociatedType(enum.IntEnum):
    """What kind of thing a node is, in the general topology discovery format."""

    UNKNOWN = 0x01
    SWITCH = 0x04
    HOST = 0x0A
    STORAGE_SUBSYSTEM = 0x0B


@dataclass(frozen=True, slots=True)
class Rnid:
    """Request node identification data."""

    format: int = NodeFormat.COMMON

    def pack(self) -> bytes:
        return bytes([Els.RNID, 0, 0, 0, self.format, 0, 0, 0])

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _require(payload, 8, Els.RNID)
        return cls(payload[4])


_RNID_ACC = struct.Struct("!B3xBBxB8s8s")
_GENERAL = struct.Struct("!16sIIIBBH16s2xH")


@dataclass(frozen=True, slots=True)
class RnidAcc:
    """Who a node is; with associated_type also what it is: the general topology discovery format.

    attached: nodes behind it, as a switch has them.  The format has room for management addresses; we have none.
    """

    wwpn: Wwn
    wwnn: Wwn
    associated_type: int | None = None
    attached: int = 0
    physical_port: int = 0
    vendor: bytes = b""

    @classmethod
    def answer(cls, request: Rnid, wwpn: Wwn, wwnn: Wwn, kind: AssociatedType, *, attached: int = 0) -> Self:
        """In the format that was asked for, or with the common data alone where that is not known."""
        if request.format != NodeFormat.GENERAL_TOPOLOGY:
            return cls(wwpn, wwnn)
        return cls(wwpn, wwnn, kind, attached, vendor=b"vhostfc")

    def pack(self) -> bytes:
        general = b""
        if self.associated_type is not None:
            vendor = self.vendor.ljust(16, b"\0")
            general = _GENERAL.pack(
                vendor, self.associated_type, self.physical_port, self.attached, 0, 0, 0, bytes(16), 0
            )
        form = NodeFormat.GENERAL_TOPOLOGY if general else NodeFormat.COMMON
        return _RNID_ACC.pack(Els.LS_ACC, form, 16, len(general), self.wwpn.pack(), self.wwnn.pack()) + general

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Raises FrameError for data that are shorter than they say; a format not known here has common data only."""
        _require(payload, _RNID_ACC.size, Els.RNID)
        _, form, common, specific, wwpn, wwnn = _RNID_ACC.unpack_from(payload)
        if common != 16 or len(payload) < _RNID_ACC.size + specific:
            raise FrameError(f"an LS_ACC of RNID with {common} and {specific} bytes in {len(payload)}")
        if form != NodeFormat.GENERAL_TOPOLOGY or specific < _GENERAL.size:
            return cls(Wwn.unpack(wwpn), Wwn.unpack(wwnn))
        vendor, kind, port, attached, *_ = _GENERAL.unpack_from(payload, _RNID_ACC.size)
        return cls(Wwn.unpack(wwpn), Wwn.unpack(wwnn), kind, attached, port, vendor.rstrip(b"\0"))


@dataclass(frozen=True, slots=True)
class Echo:
    """Any bytes, and the same bytes in the LS_ACC."""

    data: bytes
    command: int = Els.ECHO

    def pack(self) -> bytes:
        return bytes([self.command, 0, 0, 0]) + self.data

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        _require(payload, 4, Els.ECHO)
        return cls(payload[4:], payload[0])


Request = Login | Logo | Prli | Adisc | Rtv | Rscn | Scr | Rrq | Rec | Rnid | Echo

_REQUESTS: dict[int, type[Request]] = {
    Els.PLOGI: Login,
    Els.FLOGI: Login,
    Els.FDISC: Login,
    Els.LOGO: Logo,
    Els.PRLI: Prli,
    Els.PRLO: Prli,
    Els.ADISC: Adisc,
    Els.RTV: Rtv,
    Els.RSCN: Rscn,
    Els.SCR: Scr,
    Els.RRQ: Rrq,
    Els.REC: Rec,
    Els.RNID: Rnid,
    Els.ECHO: Echo,
}


def parse_request(payload: bytes) -> Request:
    """The request in a payload.  Raises ElsError, whose `rejection` is the answer, if it is unknown or broken."""
    command = payload[0] if payload else 0
    kind = _REQUESTS.get(command)
    if kind is None:
        raise ElsError(f"ELS {command:#04x} is not known", Reason.NOT_SUPPORTED, Explanation.NOT_SUPPORTED)
    try:
        return kind.unpack(payload)
    except ElsError:
        raise
    except FrameError as error:
        raise ElsError(str(error), Reason.PROTOCOL_ERROR, Explanation.INVALID_LENGTH) from error


def rejection(payload: bytes) -> LsRjt | None:
    """The LS_RJT in a reply, or None for an LS_ACC.  Raises FrameError when it is neither."""
    command = payload[0] if payload else 0
    if command == Els.LS_RJT:
        return LsRjt.unpack(payload)
    if command != Els.LS_ACC:
        raise FrameError(f"{command:#04x} is no reply to an ELS")
    return None
