"""The name server: who is on this fabric, as far as zoning lets the asker know (FC-GS-6 clause 5.2).

A port's entry begins with its login, which tells its names; what it can do it registers itself.
Answers are values; the switch puts them into frames and tells others of changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vhostfc.fc import ct
from vhostfc.fc.ct import Ct, CtError, CtIu, Explanation, Fc4Feature, Reason
from vhostfc.fc.frame import FcType, pack_id
from vhostfc.fc.wwn import Wwn

#: visible(one, other): Zoning.visible.
Visible = Callable[[Wwn, Wwn], bool]


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

    @property
    def is_target(self) -> bool:
        return bool(self.features.get(FcType.FCP, 0) & Fc4Feature.TARGET)


@dataclass(frozen=True, slots=True)
class Answer:
    """changed: the entry that now says something else to others, or None."""

    iu: CtIu
    changed: Entry | None = None


class NameServer:
    """The entries, and the answers to requests about them."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self._node_names: dict[Wwn, bytes] = {}

    def add(self, entry: Entry) -> None:
        """A port has logged in."""
        self.entries[entry.port_id] = entry

    def remove(self, port_id: int) -> Entry | None:
        entry = self.entries.pop(port_id, None)
        if entry and all(other.wwnn != entry.wwnn for other in self.entries.values()):
            self._node_names.pop(entry.wwnn, None)
        return entry

    def answer(self, asker: int, payload: bytes, visible: Visible) -> Answer:
        """The answer to a CT_IU from N_Port_ID `asker`.  Raises FrameError when it is no CT_IU at all."""
        try:
            request = ct.parse_request(payload)
        except CtError as error:
            return Answer(ct.reject(error.reason, error.explanation))
        mine = self.entries.get(asker)
        if mine is None:
            return Answer(ct.reject(Reason.UNABLE_TO_PERFORM, Explanation.ACCESS_DENIED))
        match request:
            case ct.ByPortId() | ct.GidPn() | ct.ByFc4Type():
                if request == ct.ByPortId(Ct.DA_ID, asker):
                    return self._deregister(mine)
                seen = {i: e for i, e in sorted(self.entries.items()) if visible(mine.wwpn, e.wwpn)}
                return Answer(self._query(request, seen))
            case _:
                return self._register(mine, request)

    # ------------------------------------------------------------ queries

    def _query(self, request: ct.ByPortId | ct.GidPn | ct.ByFc4Type, seen: dict[int, Entry]) -> CtIu:
        match request:
            case ct.GidPn(wwpn):
                for entry in seen.values():
                    if entry.wwpn == wwpn:
                        return ct.accept(b"\0" + pack_id(entry.port_id))
                return ct.reject(Reason.UNABLE_TO_PERFORM, Explanation.PORT_NAME_NOT_REGISTERED)
            case ct.ByFc4Type(command, fc4_type, domain, area):
                ports = [
                    (entry.port_id, entry.wwpn)
                    for entry in seen.values()
                    if fc4_type in entry.types
                    and domain in {0, entry.port_id >> 16}
                    and area in {0, entry.port_id >> 8 & 0xFF}
                ]
                if not ports:
                    return ct.reject(Reason.UNABLE_TO_PERFORM, Explanation.FC4_TYPES_NOT_REGISTERED)
                if command == Ct.GPN_FT:
                    return ct.accept(ct.pack_port_names(ports))
                return ct.accept(ct.pack_port_ids([port_id for port_id, _ in ports]))
            case ct.ByPortId(Ct.GA_NXT, port_id):
                return self._next(port_id, seen)
            case ct.ByPortId(command, port_id):
                found = seen.get(port_id)
                if found is None:
                    return ct.reject(Reason.UNABLE_TO_PERFORM, Explanation.PORT_ID_NOT_REGISTERED)
                if command == Ct.DA_ID:
                    return ct.reject(Reason.UNABLE_TO_PERFORM, Explanation.ACCESS_DENIED)
                return ct.accept((found.wwpn if command == Ct.GPN_ID else found.wwnn).pack())

    def _next(self, port_id: int, seen: dict[int, Entry]) -> CtIu:
        """GA_NXT: the entry with the next higher id, or the first again; the asker's own is always there."""
        entry = next((e for i, e in seen.items() if i > port_id), next(iter(seen.values())))
        return ct.accept(
            ct.PortEntry(
                port_id=entry.port_id,
                wwpn=entry.wwpn,
                wwnn=entry.wwnn,
                types=entry.types,
                port_symbolic_name=entry.symbolic_name,
                node_symbolic_name=self._node_names.get(entry.wwnn, b""),
                fabric_port_name=entry.fabric_port_name,
            ).pack()
        )

    # ------------------------------------------------------------ registrations

    def _register(self, mine: Entry, request: ct.RnnId | ct.RftId | ct.RffId | ct.RspnId | ct.RsnnNn) -> Answer:
        """A port registers for itself only."""
        if isinstance(request, ct.RsnnNn):
            if request.wwnn != mine.wwnn:
                return Answer(ct.reject(Reason.UNABLE_TO_PERFORM, Explanation.NODE_NAME_NOT_REGISTERED))
            self._node_names[mine.wwnn] = request.name
            return Answer(ct.accept())
        if request.port_id != mine.port_id:
            return Answer(ct.reject(Reason.UNABLE_TO_PERFORM, Explanation.UNACCEPTABLE_PORT_ID))
        before = (mine.types, dict(mine.features))
        match request:
            case ct.RnnId(_, wwnn):
                mine.wwnn = wwnn
            case ct.RftId(_, types):
                mine.types = types
            case ct.RffId(_, features, fc4_type):
                mine.features[fc4_type] = features
            case ct.RspnId(_, name):
                mine.symbolic_name = name
        return Answer(ct.accept(), mine if (mine.types, mine.features) != before else None)

    def _deregister(self, mine: Entry) -> Answer:
        """DA_ID: all that the port registered itself is gone; who it is stays, as long as it is logged in."""
        mine.types, mine.features, mine.symbolic_name = frozenset(), {}, b""
        return Answer(ct.accept(), mine)
