"""The name server's requests and accepts (FC-GS-6 5.2).

The name server is where N_Ports register who they are and ask who else is there, at FFFFFCh.  A reply
can only be read with its request in mind, so the bodies of accepts have codecs of their own at the end
of this file.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from vhostfc.fc.ct import DIRECTORY_SERVICE, NAME_SERVER, Ct, CtError, CtIu, Reason
from vhostfc.fc.frame import FcType, FrameError, pack_id, unpack_id
from vhostfc.fc.wwn import Wwn


class PortType(enum.IntEnum):
    """Port types (FC-GS-6 table 24)."""

    UNIDENTIFIED = 0x00
    N_PORT = 0x01
    NL_PORT = 0x02
    NX_PORT = 0x7F
    F_PORT = 0x81


#: Class 3 among the classes of service, a bit for each (FC-GS-6 5.2.3.5).
CLASS_3 = 0x08


class Fc4Feature(enum.IntFlag):
    """FC-4 features of FCP (FCP-4 5.3)."""

    TARGET = 1
    INITIATOR = 2


# ---------------------------------------------------------------- requests


@dataclass(frozen=True, slots=True)
class ByPortId:
    """GA_NXT, DA_ID and all G..._ID: a command and an N_Port_ID."""

    command: int
    port_id: int

    def pack(self) -> bytes:
        return CtIu(self.command, b"\0" + pack_id(self.port_id)).pack()


@dataclass(frozen=True, slots=True)
class ByName:
    """GID_PN, of a Port_Name; GID_NN and GSNN_NN, of a Node_Name."""

    command: int
    name: Wwn

    def pack(self) -> bytes:
        return CtIu(self.command, self.name.pack()).pack()


@dataclass(frozen=True, slots=True)
class ByFc4Type:
    """GID_FT, GPN_FT and GNN_FT: every port of an FC-4 type; domain and area 0 mean all of the fabric."""

    command: int
    fc4_type: int = FcType.FCP
    domain: int = 0
    area: int = 0

    def pack(self) -> bytes:
        return CtIu(self.command, bytes([0, self.domain, self.area, self.fc4_type])).pack()


@dataclass(frozen=True, slots=True)
class GidPt:
    """Get the N_Port_IDs of every port of a type; N_PORT and NX_PORT mean the same here, where there is no loop."""

    port_type: int = PortType.NX_PORT
    domain: int = 0
    area: int = 0

    def pack(self) -> bytes:
        return CtIu(Ct.GID_PT, bytes([self.port_type, self.domain, self.area, 0])).pack()


@dataclass(frozen=True, slots=True)
class GidFf:
    """Get the N_Port_IDs of every port with one of these features for an FC-4 type."""

    features: int
    fc4_type: int = FcType.FCP
    domain: int = 0
    area: int = 0

    def pack(self) -> bytes:
        body = bytes([0, self.domain, self.area, 0, 0, 0, self.features, self.fc4_type])
        return CtIu(Ct.GID_FF, body).pack()


@dataclass(frozen=True, slots=True)
class RpnId:
    """Register the Port_Name of a port: its login has told it already."""

    port_id: int
    wwpn: Wwn

    def pack(self) -> bytes:
        return CtIu(Ct.RPN_ID, b"\0" + pack_id(self.port_id) + self.wwpn.pack()).pack()


@dataclass(frozen=True, slots=True)
class RnnId:
    """Register the Node_Name of a port."""

    port_id: int
    wwnn: Wwn

    def pack(self) -> bytes:
        return CtIu(Ct.RNN_ID, b"\0" + pack_id(self.port_id) + self.wwnn.pack()).pack()


@dataclass(frozen=True, slots=True)
class RcsId:
    """Register the classes of service of a port, a bit for each."""

    port_id: int
    classes: int = CLASS_3

    def pack(self) -> bytes:
        return CtIu(Ct.RCS_ID, b"\0" + pack_id(self.port_id) + struct.pack("!I", self.classes)).pack()


@dataclass(frozen=True, slots=True)
class RptId:
    """Register the type of a port."""

    port_id: int
    port_type: int = PortType.N_PORT

    def pack(self) -> bytes:
        return CtIu(Ct.RPT_ID, b"\0" + pack_id(self.port_id) + bytes([self.port_type, 0, 0, 0])).pack()


@dataclass(frozen=True, slots=True)
class RftId:
    """Register the FC-4 types of a port."""

    port_id: int
    types: frozenset[int]

    def pack(self) -> bytes:
        return CtIu(Ct.RFT_ID, b"\0" + pack_id(self.port_id) + pack_types(self.types)).pack()


@dataclass(frozen=True, slots=True)
class RffId:
    """Register the features of a port for one FC-4 type."""

    port_id: int
    features: int
    fc4_type: int = FcType.FCP

    def pack(self) -> bytes:
        return CtIu(Ct.RFF_ID, b"\0" + pack_id(self.port_id) + bytes([0, 0, self.features, self.fc4_type])).pack()


@dataclass(frozen=True, slots=True)
class RspnId:
    """Register the symbolic name of a port; at most 255 bytes of it count."""

    port_id: int
    name: bytes

    def pack(self) -> bytes:
        return CtIu(Ct.RSPN_ID, b"\0" + pack_id(self.port_id) + _counted(self.name)).pack()


@dataclass(frozen=True, slots=True)
class RsnnNn:
    """Register the symbolic name of a node; at most 255 bytes of it count."""

    wwnn: Wwn
    name: bytes

    def pack(self) -> bytes:
        return CtIu(Ct.RSNN_NN, self.wwnn.pack() + _counted(self.name)).pack()


Query = ByPortId | ByName | ByFc4Type | GidPt | GidFf
Registration = RpnId | RnnId | RcsId | RftId | RptId | RffId | RspnId | RsnnNn
Request = Query | Registration

#: The shortest body of each request.
_LENGTHS = {
    **dict.fromkeys((Ct.GA_NXT, Ct.GPN_ID, Ct.GNN_ID, Ct.GCS_ID, Ct.GFT_ID, Ct.GSPN_ID, Ct.GPT_ID, Ct.GFPN_ID), 4),
    **dict.fromkeys((Ct.GFF_ID, Ct.DA_ID, Ct.GID_FT, Ct.GPN_FT, Ct.GNN_FT, Ct.GID_PT), 4),
    **dict.fromkeys((Ct.GID_PN, Ct.GID_NN, Ct.GSNN_NN, Ct.GID_FF), 8),
    **dict.fromkeys((Ct.RPN_ID, Ct.RNN_ID), 12),
    **dict.fromkeys((Ct.RCS_ID, Ct.RPT_ID, Ct.RFF_ID), 8),
    Ct.RFT_ID: 36,
    Ct.RSPN_ID: 5,
    Ct.RSNN_NN: 9,
}


def parse_request(payload: bytes) -> Request:
    """A request to the name server.

    Raises CtError, with what the Reject_CT_IU shall say, for another server, a command that is not
    known or a body that is too short; FrameError when there is no CT_IU at all.
    """
    iu = CtIu.unpack(payload)
    if (iu.fs_type, iu.fs_subtype) != (DIRECTORY_SERVICE, NAME_SERVER):
        raise CtError(f"CT server {iu.fs_type:02x}/{iu.fs_subtype:02x} is not here", Reason.NOT_SUPPORTED)
    try:
        code = Ct(iu.code)
        length = _LENGTHS[code]
    except (ValueError, KeyError):
        raise CtError(f"CT command {iu.code:#06x} is not known", Reason.NOT_SUPPORTED) from None
    body = iu.body
    if len(body) < length:
        raise CtError(f"{code.name} with {len(body)} bytes, {length} are the least", Reason.INVALID_SIZE)
    port_id = unpack_id(body[1:4])
    match code:
        case Ct.GID_PN | Ct.GID_NN | Ct.GSNN_NN:
            return ByName(code, Wwn.unpack(body[:8]))
        case Ct.GID_FT | Ct.GPN_FT | Ct.GNN_FT:
            return ByFc4Type(code, fc4_type=body[3], domain=body[1], area=body[2])
        case Ct.GID_PT:
            return GidPt(body[0], domain=body[1], area=body[2])
        case Ct.GID_FF:
            return GidFf(features=body[6], fc4_type=body[7], domain=body[1], area=body[2])
        case Ct.RPN_ID:
            return RpnId(port_id, Wwn.unpack(body[4:12]))
        case Ct.RNN_ID:
            return RnnId(port_id, Wwn.unpack(body[4:12]))
        case Ct.RCS_ID:
            return RcsId(port_id, int.from_bytes(body[4:8], "big"))
        case Ct.RFT_ID:
            return RftId(port_id, unpack_types(body[4:36]))
        case Ct.RPT_ID:
            return RptId(port_id, body[4])
        case Ct.RFF_ID:
            return RffId(port_id, features=body[6], fc4_type=body[7])
        case Ct.RSPN_ID:
            return RspnId(port_id, _uncounted(body[4:], code))
        case Ct.RSNN_NN:
            return RsnnNn(Wwn.unpack(body[:8]), _uncounted(body[8:], code))
        case _:
            return ByPortId(code, port_id)


def _counted(text: bytes) -> bytes:
    return bytes([min(len(text), 255)]) + text[:255]


def _uncounted(data: bytes, code: Ct) -> bytes:
    if not data or len(data) < 1 + data[0]:
        raise CtError(f"{code.name}: a name of {data[0] if data else 0} bytes in {len(data)}", Reason.INVALID_SIZE)
    return data[1 : 1 + data[0]]


# ---------------------------------------------------------------- bodies of requests and accepts


def pack_types(types: Iterable[int]) -> bytes:
    """An FC-4 TYPEs object: bit t%32 of word t//32 (FC-GS-6 5.2.3.8)."""
    words = [0] * 8
    for fc4_type in types:
        words[fc4_type // 32] |= 1 << fc4_type % 32
    return struct.pack("!8I", *words)


def unpack_types(data: bytes) -> frozenset[int]:
    words = struct.unpack("!8I", data)
    return frozenset(t for t in range(256) if words[t // 32] >> t % 32 & 1)


def pack_features(features: Mapping[int, int]) -> bytes:
    """An FC-4 Features object, the accept of GFF_ID: four bits for each type (FC-GS-6 5.2.3.15)."""
    words = [0] * 32
    for fc4_type, bits in features.items():
        words[fc4_type // 8] |= (bits & 0x0F) << 4 * (fc4_type % 8)
    return struct.pack("!32I", *words)


def unpack_features(body: bytes) -> dict[int, int]:
    """Raises FrameError when the body is too short."""
    if len(body) < 128:
        raise FrameError(f"FC-4 features in {len(body)} bytes, 128 are the least")
    words = struct.unpack_from("!32I", body)
    return {t: bits for t in range(256) if (bits := words[t // 8] >> 4 * (t % 8) & 0x0F)}


def pack_symbolic_name(name: bytes) -> bytes:
    """The accept of GSPN_ID and GSNN_NN: a length and as many bytes."""
    return _counted(name)


def unpack_symbolic_name(body: bytes) -> bytes:
    """Raises FrameError when the body is shorter than its length says."""
    return _uncounted(body, Ct.GSPN_ID)


_LAST = 0x80


def pack_port_ids(ports: Sequence[int]) -> bytes:
    """The accept of GID_FT; the last entry is marked, an initiator stops reading there."""
    return b"".join(bytes([_LAST * (i == len(ports) - 1)]) + pack_id(port) for i, port in enumerate(ports))


def unpack_port_ids(body: bytes) -> list[int]:
    """Raises FrameError when no entry is the last."""
    return [unpack_id(entry[1:4]) for entry in _entries(body, 4)]


def pack_port_names(ports: Sequence[tuple[int, Wwn]]) -> bytes:
    """The accept of GPN_FT and GNN_FT: N_Port_IDs, and Port_Names or Node_Names."""
    return b"".join(
        bytes([_LAST * (i == len(ports) - 1)]) + pack_id(port) + bytes(4) + name.pack()
        for i, (port, name) in enumerate(ports)
    )


def unpack_port_names(body: bytes) -> list[tuple[int, Wwn]]:
    """Raises FrameError when no entry is the last."""
    return [(unpack_id(entry[1:4]), Wwn.unpack(entry[8:16])) for entry in _entries(body, 16)]


def _entries(body: bytes, size: int) -> list[bytes]:
    entries = []
    for start in range(0, len(body) - size + 1, size):
        entries.append(body[start : start + size])
        if body[start] & _LAST:
            return entries
    raise FrameError(f"a list of {len(body)} bytes without a last entry")


_UNNAMED = Wwn(0)
_GA_NXT = struct.Struct("!B3s8s256s8s256s8x16xI32s16x8sx3s")


@dataclass(frozen=True, slots=True)
class PortEntry:
    """All that the name server knows of a port: the accept of GA_NXT (FC-GS-6 5.2.5.2).

    classes: a bit for each class of service.
    """

    port_id: int
    wwpn: Wwn
    wwnn: Wwn
    types: frozenset[int] = frozenset()
    port_symbolic_name: bytes = b""
    node_symbolic_name: bytes = b""
    fabric_port_name: Wwn = _UNNAMED
    port_type: int = PortType.N_PORT
    classes: int = CLASS_3

    def pack(self) -> bytes:
        return _GA_NXT.pack(
            self.port_type,
            pack_id(self.port_id),
            self.wwpn.pack(),
            _counted(self.port_symbolic_name),
            self.wwnn.pack(),
            _counted(self.node_symbolic_name),
            self.classes,
            pack_types(self.types),
            self.fabric_port_name.pack(),
            bytes(3),
        )

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """Raises FrameError when the body is too short."""
        if len(body) < _GA_NXT.size:
            raise FrameError(f"an accept of GA_NXT with {len(body)} bytes, {_GA_NXT.size} are the least")
        port_type, port_id, wwpn, port_name, wwnn, node_name, classes, types, fabric_port, _ = _GA_NXT.unpack_from(body)
        return cls(
            port_id=unpack_id(port_id),
            wwpn=Wwn.unpack(wwpn),
            wwnn=Wwn.unpack(wwnn),
            types=unpack_types(types),
            port_symbolic_name=_uncounted(port_name, Ct.GA_NXT),
            node_symbolic_name=_uncounted(node_name, Ct.GA_NXT),
            fabric_port_name=Wwn.unpack(fabric_port),
            port_type=port_type,
            classes=classes,
        )
