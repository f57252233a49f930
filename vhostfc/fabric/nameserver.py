"""The name server: who is on this fabric, as far as zoning lets the asker know (FC-GS-6 clause 5.2).

A port's entry begins with its login, which tells its names; what it can do it registers itself.
Answers are values; the switch puts them into frames and tells others of changes.

A query costs time in proportion to the ports that its asker sees, not to those that there are.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vhostfc.fabric.zoning import Zoning
from vhostfc.fc import ct, ns
from vhostfc.fc.ct import Ct, CtError, CtIu, Explanation, Reason
from vhostfc.fc.frame import FcType, pack_id
from vhostfc.fc.ns import Fc4Feature, PortType
from vhostfc.fc.wwn import Wwn


@dataclass(slots=True)
class Entry:
    """What is known of a port that is logged in.  features: by FC-4 type, for FCP a Fc4Feature."""

    port_id: int
    wwpn: Wwn
    wwnn: Wwn
    fabric_port_name: Wwn
    types: frozenset[int] = frozenset()
    features: dict[int, int] = field(default_factory=dict)
    symbolic_name: bytes = b""
    port_type: int = PortType.N_PORT
    classes: int = ns.CLASS_3

    @property
    def is_target(self) -> bool:
        return bool(self.features.get(FcType.FCP, 0) & Fc4Feature.TARGET)


@dataclass(frozen=True, slots=True)
class Answer:
    """changed: the entry that now says something else to others, or None."""

    iu: CtIu
    changed: Entry | None = None


def _no(explanation: Explanation) -> CtIu:
    return ct.reject(Reason.UNABLE_TO_PERFORM, explanation)


class NameServer:
    """The entries, and the answers to requests about them.

    by_name: N_Port_IDs of those that are here.  targets: N_Port_IDs of those that say they are FCP targets.
    """

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.by_name: dict[Wwn, int] = {}
        self.targets: set[int] = set()
        self._ids: list[int] = []  # in order
        self._nodes: Counter[Wwn] = Counter()  # ports of each Node_Name
        self._node_names: dict[Wwn, bytes] = {}

    def add(self, entry: Entry) -> None:
        """A port has logged in."""
        self.entries[entry.port_id] = entry
        self.by_name[entry.wwpn] = entry.port_id
        bisect.insort(self._ids, entry.port_id)
        self._nodes[entry.wwnn] += 1
        self._sort(entry)

    def remove(self, port_id: int) -> Entry | None:
        entry = self.entries.pop(port_id, None)
        if entry is not None:
            del self.by_name[entry.wwpn]
            del self._ids[bisect.bisect_left(self._ids, port_id)]
            self.targets.discard(port_id)
            self._leave_node(entry.wwnn)
        return entry

    def _sort(self, entry: Entry) -> None:
        (self.targets.add if entry.is_target else self.targets.discard)(entry.port_id)

    def _leave_node(self, wwnn: Wwn) -> None:
        self._nodes[wwnn] -= 1
        if not self._nodes[wwnn]:
            del self._nodes[wwnn]
            self._node_names.pop(wwnn, None)

    def answer(self, asker: int, payload: bytes, zoning: Zoning) -> Answer:
        """The answer to a CT_IU from N_Port_ID `asker`.  Raises FrameError when it is no CT_IU at all."""
        room = CtIu.unpack(payload).size
        try:
            request = ns.parse_request(payload)
        except CtError as error:
            return Answer(ct.reject(error.reason, error.explanation))
        mine = self.entries.get(asker)
        if mine is None:
            return Answer(_no(Explanation.ACCESS_DENIED))
        if isinstance(request, ns.Query):
            if request == ns.ByPortId(Ct.DA_ID, asker):
                return self._deregister(mine)
            return Answer(_cut(self._query(request, mine, zoning), room))
        return self._register(mine, request)

    # ------------------------------------------------------------ queries

    def _seen(self, mine: Entry, zoning: Zoning) -> Sequence[int]:
        """The ids that a port may know of, in order."""
        if zoning.peers(mine.wwpn) is None:
            return self._ids
        return sorted(self.by_name[peer] for peer in zoning.peers_in(mine.wwpn, self.by_name))

    def _query(self, request: ns.Query, mine: Entry, zoning: Zoning) -> CtIu:
        match request:
            case ns.ByName(Ct.GID_PN, wwpn):
                port_id = self.by_name.get(wwpn)
                if port_id is None or not zoning.visible(mine.wwpn, wwpn):
                    return _no(Explanation.PORT_NAME_NOT_REGISTERED)
                return ct.accept(b"\0" + pack_id(port_id))
            case ns.ByName(command, wwnn):
                ports = [i for i in self._seen(mine, zoning) if self.entries[i].wwnn == wwnn]
                if not ports:
                    return _no(Explanation.NODE_NAME_NOT_REGISTERED)
                if command == Ct.GID_NN:
                    return ct.accept(ns.pack_port_ids(ports))
                return _symbolic(self._node_names.get(wwnn, b""), Explanation.SYMBOLIC_NODE_NAME_NOT_REGISTERED)
            case ns.ByFc4Type() | ns.GidPt() | ns.GidFf():
                return self._list(request, (self.entries[i] for i in self._seen(mine, zoning)))
            case ns.ByPortId(Ct.GA_NXT, port_id):
                return self._next(port_id, self._seen(mine, zoning))
            case ns.ByPortId(command, port_id):
                found = self.entries.get(port_id)
                if found is None or not zoning.visible(mine.wwpn, found.wwpn):
                    return _no(Explanation.PORT_ID_NOT_REGISTERED)
                return _about(found, command)

    def _list(self, request: ns.ByFc4Type | ns.GidPt | ns.GidFf, seen: Iterable[Entry]) -> CtIu:
        def wanted(entry: Entry) -> bool:
            if request.domain not in {0, entry.port_id >> 16} or request.area not in {0, entry.port_id >> 8 & 0xFF}:
                return False
            match request:
                case ns.GidPt(port_type):
                    return port_type in {PortType.NX_PORT, entry.port_type}
                case ns.GidFf(features, fc4_type):
                    return bool(entry.features.get(fc4_type, 0) & features)
                case ns.ByFc4Type(_, fc4_type):
                    return fc4_type in entry.types

        ports = [entry for entry in seen if wanted(entry)]
        if not ports:
            return _no(_NOBODY[type(request)])
        if isinstance(request, ns.ByFc4Type) and request.command in {Ct.GPN_FT, Ct.GNN_FT}:
            by_port = request.command == Ct.GPN_FT
            return ct.accept(ns.pack_port_names([(e.port_id, e.wwpn if by_port else e.wwnn) for e in ports]))
        return ct.accept(ns.pack_port_ids([entry.port_id for entry in ports]))

    def _next(self, port_id: int, seen: Sequence[int]) -> CtIu:
        """GA_NXT: the entry with the next higher id, or the first again; the asker's own is always there."""
        entry = self.entries[seen[bisect.bisect_right(seen, port_id) % len(seen)]]
        return ct.accept(
            ns.PortEntry(
                port_id=entry.port_id,
                wwpn=entry.wwpn,
                wwnn=entry.wwnn,
                types=entry.types,
                port_symbolic_name=entry.symbolic_name,
                node_symbolic_name=self._node_names.get(entry.wwnn, b""),
                fabric_port_name=entry.fabric_port_name,
                port_type=entry.port_type,
                classes=entry.classes,
            ).pack()
        )

    # ------------------------------------------------------------ registrations

    def _register(self, mine: Entry, request: ns.Registration) -> Answer:
        """A port registers for itself only."""
        if isinstance(request, ns.RsnnNn):
            if request.wwnn != mine.wwnn:
                return Answer(_no(Explanation.NODE_NAME_NOT_REGISTERED))
            self._node_names[mine.wwnn] = request.name
            return Answer(ct.accept())
        if request.port_id != mine.port_id:
            return Answer(_no(Explanation.UNACCEPTABLE_PORT_ID))
        before, was_target = (mine.types, dict(mine.features)), mine.is_target
        match request:
            case ns.RpnId(_, wwpn):
                if wwpn != mine.wwpn:  # zones and masks go by the name that it has logged in with
                    return Answer(_no(Explanation.ACCESS_DENIED))
            case ns.RnnId(_, wwnn):
                self._nodes[wwnn] += 1
                self._leave_node(mine.wwnn)
                mine.wwnn = wwnn
            case ns.RcsId(_, classes):
                mine.classes = classes
            case ns.RptId(_, port_type):
                mine.port_type = port_type
            case ns.RftId(_, types):
                mine.types = types
            case ns.RffId(_, features, fc4_type):
                mine.features[fc4_type] = features
                self._sort(mine)
            case ns.RspnId(_, name):
                mine.symbolic_name = name
        if (mine.types, mine.features) == before:
            return Answer(ct.accept())
        return Answer(ct.accept(), _target_once(mine) if was_target else mine)

    def _deregister(self, mine: Entry) -> Answer:
        """DA_ID: all that the port registered itself is gone; who it is stays, as long as it is logged in."""
        was_target = mine.is_target
        mine.types, mine.features, mine.symbolic_name = frozenset(), {}, b""
        mine.port_type, mine.classes = PortType.N_PORT, ns.CLASS_3
        self._sort(mine)
        return Answer(ct.accept(), _target_once(mine) if was_target else mine)


def _target_once(entry: Entry) -> Entry:
    """As others knew it: those who are told of targets have to hear that this one is none any more."""
    return dataclasses.replace(entry, features={FcType.FCP: Fc4Feature.TARGET})


def _about(entry: Entry, command: int) -> CtIu:
    """What one entry says."""
    match command:
        case Ct.GPN_ID:
            return ct.accept(entry.wwpn.pack())
        case Ct.GNN_ID:
            return ct.accept(entry.wwnn.pack())
        case Ct.GFPN_ID:
            return ct.accept(entry.fabric_port_name.pack())
        case Ct.GCS_ID:
            return ct.accept(entry.classes.to_bytes(4, "big"))
        case Ct.GPT_ID:
            return ct.accept(bytes([entry.port_type, 0, 0, 0]))
        case Ct.GFT_ID:
            types = ct.accept(ns.pack_types(entry.types))
            return types if entry.types else _no(Explanation.FC4_TYPES_NOT_REGISTERED)
        case Ct.GFF_ID:
            features = ct.accept(ns.pack_features(entry.features))
            return features if any(entry.features.values()) else _no(Explanation.FC4_FEATURES_NOT_REGISTERED)
        case Ct.GSPN_ID:
            return _symbolic(entry.symbolic_name, Explanation.SYMBOLIC_PORT_NAME_NOT_REGISTERED)
    return _no(Explanation.ACCESS_DENIED)  # DA_ID for another port


def _symbolic(name: bytes, missing: Explanation) -> CtIu:
    return ct.accept(ns.pack_symbolic_name(name)) if name else _no(missing)


_NOBODY: dict[type[ns.Query], Explanation] = {
    ns.ByFc4Type: Explanation.FC4_TYPES_NOT_REGISTERED,
    ns.GidFf: Explanation.FC4_FEATURES_NOT_REGISTERED,
    ns.GidPt: Explanation.PORT_TYPE_NOT_REGISTERED,
}


def _cut(iu: CtIu, room: int) -> CtIu:
    """An asker may say for how many words of body it has room; it is told how many are missing (FC-GS-6 4.3.2.5)."""
    words = -(-len(iu.body) // 4)
    if not room or words <= room:
        return iu
    return dataclasses.replace(iu, body=iu.body[: 4 * room], size=min(words - room, 0xFFFF))
