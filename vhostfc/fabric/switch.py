"""The switch: one door, `receive(F_Port, frame) -> [(F_Port, frame)]`, pure.

Behind F_Ports are N_Ports of whatever kind: our adapters on their links, Linux kernels on FCoE.
Several N_Ports may be behind one F_Port (NPIV): the first logs in with FLOGI, the others with FDISC.
Target ports of arrays live inside (InternalPort): they are given frames and give frames.

Well-known addresses answer here: the F_Port (FLOGI, FDISC, LOGO), the name server, the management
server, the domain controller, and the fabric controller, which sends RSCNs to those who asked for them
with SCR.  A frame whose S_ID is not logged in at its F_Port is discarded, and so is one that zoning does
not let through: class 3 has no negative answer.  An ELS request to an address that is not there is
rejected in its name, so that nobody waits twice R_A_TOV for it.

RSCNs concern targets: initiators are not told of other initiators, which would make every guest
rediscover whenever another one starts.

Whatever happens costs time in proportion to the ports that are zoned with those that it happens to,
never to all that there are: thousands of N_Ports log in at once when a site gets its power back.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from vhostfc.fabric.gathering import Gathering
from vhostfc.fabric.link import Note
from vhostfc.fabric.management import ManagementServer
from vhostfc.fabric.nameserver import Entry, NameServer
from vhostfc.fabric.zoning import Zoning, affected
from vhostfc.fc import els, ns
from vhostfc.fc.els import Els, ElsError, EventQualifier, Explanation, LsRjt, Reason, ScrFunction
from vhostfc.fc.frame import DOMAIN_CONTROLLER, Address, FcType, Frame, FrameError, RCtl, els_reply, els_request
from vhostfc.fc.login import Login
from vhostfc.fc.sequence import ct_reply
from vhostfc.fc.wwn import Wwn

#: FC-FS-4 default timers, as FLOGI hands them out, in milliseconds.
R_A_TOV, E_D_TOV = 10_000, 2_000
DOMAIN = 0x01
_FIRST_ID, _LAST_ID = 0x0100, 0xFEFF

#: What goes out at an F_Port: a frame, or a sentence that goes with the frame after it.
Output = tuple[int, "bytes | Note"]
#: What is told of what happens: an event's name, and values for people and programs.
Notice = Callable[[str, dict[str, object]], None]


class InternalPort(Protocol):
    """A target port, as the switch knows it.  port_id is the switch's to set."""

    name: str
    wwpn: Wwn
    wwnn: Wwn
    port_id: int

    def receive(self, frame: Frame, source: Wwn) -> Iterable[Frame]:
        """A frame for this port, from a logged-in N_Port that zoning lets through; returns its own."""
        ...

    def forget(self, port_id: int) -> None:
        """That N_Port is not logged in any more, or not to be seen: an implicit logout."""
        ...


@dataclass(frozen=True, slots=True)
class NPort:
    """A login.  holder: what people call the thing behind the F_Port; since: seconds of the epoch."""

    wwpn: Wwn
    wwnn: Wwn
    port_id: int
    f_port: int
    holder: str
    since: float


@dataclass(slots=True)
class _FPort:
    holder: str
    ids: dict[int, None] = field(default_factory=dict)  # in the order of their logins


class Switch:
    """See the head of the file.

    name: the fabric's and the switch's name.  clock: seconds of the epoch, for "since when".
    version: grows whenever a login ends or zones change, so that others know when to look again.
    discarded: frames, by reason; why: the reason of the frame that came last, None when it was not discarded.
    notice: is told of logins, logouts, RSCNs and zones.
    """

    def __init__(
        self,
        name: Wwn,
        zoning: Zoning,
        *,
        clock: Callable[[], float],
        notice: Notice = lambda event, values: None,
    ) -> None:
        self.name = name
        self.zoning = zoning
        self.names = NameServer()
        self.management = ManagementServer()
        self._gathering = Gathering()
        self.version = 0
        self.discarded: dict[str, int] = {}
        self.why: str | None = None
        self._clock = clock
        self._notice = notice
        self._f_ports: dict[int, _FPort] = {}
        self._numbers = itertools.count(1)
        self._n_ports: dict[int, NPort] = {}
        self._targets: dict[int, InternalPort] = {}
        self._by_name: dict[Wwn, int] = {}
        self._addresses: dict[Wwn, int] = {}  # what each name has, or had when it was here last
        self._assigned: set[int] = set()  # the values of that
        self._met: dict[int, set[InternalPort]] = {}  # N_Port_ID -> targets that it has sent something to
        self._registered: dict[int, int] = {}  # SCR: N_Port_ID -> function
        self._ox_id = itertools.cycle(range(0xFFFF))

    # ------------------------------------------------------------ what is here

    def logins(self) -> list[NPort]:
        return [self._n_ports[i] for i in sorted(self._n_ports)]

    def login(self, port_id: int) -> NPort | None:
        return self._n_ports.get(port_id)

    def find(self, wwpn: Wwn) -> NPort | None:
        """The login of this Port_Name."""
        return self._n_ports.get(self._by_name.get(wwpn, 0))

    def target(self, port_id: int) -> InternalPort | None:
        return self._targets.get(port_id)

    def targets(self) -> list[InternalPort]:
        return list(self._targets.values())

    def visible(self, one: Wwn, other: Wwn) -> bool:
        return self.zoning.visible(one, other)

    # ------------------------------------------------------------ what happens to it

    def attach(self, holder: str) -> int:
        """Plug something in; returns its F_Port."""
        number = next(self._numbers)
        self._f_ports[number] = _FPort(holder)
        return number

    def detach(self, f_port: int) -> list[Output]:
        """It is unplugged: all its N_Ports are logged out."""
        outputs = self.reset(f_port)
        del self._f_ports[f_port]
        return outputs

    def forget(self, port_id: int) -> list[Output]:
        """An implicit logout of this N_Port, if it is logged in; nobody tells it."""
        return self._log_out(port_id) if port_id in self._n_ports else []

    def reset(self, f_port: int) -> list[Output]:
        """All N_Ports behind it are logged out."""
        return [out for port_id in list(self._f_ports[f_port].ids) for out in self._log_out(port_id)]

    def behind(self, f_port: int) -> list[NPort]:
        """The N_Ports behind an F_Port, in the order of their logins."""
        return [self._n_ports[port_id] for port_id in self._f_ports[f_port].ids]

    def log_out(self, port_id: int, *, tell: bool = True) -> list[Output]:
        """End a login from this side.  tell: the N_Port gets a LOGO."""
        logo = els.Logo(port_id, self._n_ports[port_id].wwpn).pack()
        told = self.send(els_request(Address.F_PORT, port_id, next(self._ox_id), logo)) if tell else []
        return [*told, *self._log_out(port_id)]

    def add_target(self, target: InternalPort) -> list[Output]:
        """Raises ValueError when its Port_Name is in use."""
        if target.wwpn in self._by_name:
            raise ValueError(self._in_use(target.wwpn))
        target.port_id = self._address(target.wwpn)
        self._targets[target.port_id] = target
        self._by_name[target.wwpn] = target.port_id
        entry = Entry(target.port_id, target.wwpn, target.wwnn, self._f_port_name(0))
        entry.types = frozenset({FcType.FCP})
        entry.features = {FcType.FCP: ns.Fc4Feature.TARGET}
        entry.symbolic_name = target.name.encode()
        self.names.add(entry)
        self._notice("target", {"target": target.name, "wwpn": str(target.wwpn), "port_id": f"{target.port_id:06x}"})
        return self._notify(entry)

    def remove_target(self, target: InternalPort) -> list[Output]:
        del self._targets[target.port_id]
        del self._by_name[target.wwpn]
        for met in self._met.values():
            met.discard(target)
        self.version += 1
        self._notice("target gone", {"target": target.name, "wwpn": str(target.wwpn)})
        entry = self.names.remove(target.port_id)
        return self._notify(entry) if entry else []

    def set_zoning(self, zoning: Zoning) -> list[Output]:
        """Zones change at once; those who see others differently are told with RSCNs."""
        before, self.zoning = self.zoning, zoning
        self.version += 1
        self._notice("zones", {"zones": len(zoning.zones)})
        targets = [self.names.entries[port_id].wwpn for port_id in sorted(self.names.targets)]
        pages = affected(before, zoning, self._by_name, targets)
        for target in self._targets.values():
            for port_id in pages.get(target.port_id, []):
                login = self._n_ports.get(port_id)
                if login and not zoning.visible(login.wwpn, target.wwpn):
                    target.forget(port_id)
        outputs: list[Output] = []
        for port_id, others in pages.items():
            if port_id in self._registered:
                outputs += self._rscn(port_id, others, EventQualifier.CHANGED_NAME_SERVER_OBJECT)
        return outputs

    def service_changed(self, target: InternalPort, initiators: Iterable[Wwn]) -> list[Output]:
        """Tell these initiators that what a target has for them is not what it was."""
        outputs: list[Output] = []
        for wwpn in initiators:
            port_id = self._by_name.get(wwpn)
            if port_id in self._registered and self.visible(wwpn, target.wwpn):
                outputs += self._rscn(port_id, [target.port_id], EventQualifier.CHANGED_SERVICE_OBJECT)
        return outputs

    # ------------------------------------------------------------ the door

    def receive(self, f_port: int, data: bytes) -> list[Output]:
        """A frame from an F_Port.  Whatever it is, it is answered, delivered or discarded; never an error."""
        self.why = None
        try:
            frame = Frame.unpack(data)
        except FrameError:
            return self._discard("no frame")
        if frame.d_id == Address.F_PORT and frame.r_ctl == RCtl.ELS_REQUEST and frame.payload[:1] in _LOGINS:
            return self._fabric_login(f_port, frame)
        source = self._n_ports.get(frame.s_id)
        if source is None or source.f_port != f_port:
            return self._discard("not logged in")
        if frame.d_id >= 0xFFFFF0 or frame.d_id == DOMAIN_CONTROLLER | DOMAIN:
            return self._well_known(source, frame)
        target = self._targets.get(frame.d_id)
        destination = target or self._n_ports.get(frame.d_id)
        if destination is None or not self.visible(source.wwpn, destination.wwpn):
            if frame.r_ctl == RCtl.ELS_REQUEST and frame.type == FcType.ELS:
                return self.send(_reject(frame, Reason.UNABLE_TO_PERFORM, Explanation.INVALID_PORT_ID))
            return self._discard("no such destination")
        if target is not None:
            self._met.setdefault(source.port_id, set()).add(target)
            return [out for reply in target.receive(frame, source.wwpn) for out in self.send(reply)]
        return [(self._n_ports[frame.d_id].f_port, data)]

    def send(self, frame: Frame) -> list[Output]:
        """A frame of the switch's own or of a target, to whom it is for."""
        destination = self._n_ports.get(frame.d_id)
        return [(destination.f_port, frame.pack())] if destination else self._discard("destination logged out")

    def _discard(self, reason: str) -> list[Output]:
        self.why = reason
        self.discarded[reason] = self.discarded.get(reason, 0) + 1
        return []

    # ------------------------------------------------------------ FFFFFE: logins

    def _fabric_login(self, f_port: int, frame: Frame) -> list[Output]:
        try:
            request = Login.unpack(frame.payload)
        except FrameError:
            return [(f_port, _reject(frame, Reason.PROTOCOL_ERROR, Explanation.INVALID_LENGTH).pack())]
        port = self._f_ports[f_port]
        outputs: list[Output] = []
        if request.command == Els.FLOGI:
            # A port that logs in anew has been reset: what was behind it is gone (FC-LS-3 6.2.2.3).
            outputs = self.reset(f_port)
        elif not port.ids:
            reply = _reject(frame, Reason.LOGICAL_ERROR, Explanation.LOGIN_REQUIRED)
            return [(f_port, reply.pack())]
        if not request.wwpn:
            reply = _reject(frame, Reason.LOGICAL_ERROR, Explanation.INVALID_PORT_NAME)
            return [*outputs, (f_port, reply.pack())]
        if request.wwpn in self._by_name:
            reply = _reject(frame, Reason.LOGICAL_ERROR, Explanation.INVALID_PORT_NAME)
            return [*outputs, (f_port, Note(self._in_use(request.wwpn))), (f_port, reply.pack())]
        port_id = self._address(request.wwpn)
        if not port_id:
            reply = _reject(frame, Reason.UNABLE_TO_PERFORM, Explanation.INSUFFICIENT_RESOURCES)
            return [*outputs, (f_port, reply.pack())]
        login = NPort(request.wwpn, request.wwnn, port_id, f_port, port.holder, self._clock())
        self._n_ports[port_id] = login
        self._by_name[login.wwpn] = port_id
        port.ids[port_id] = None
        self.names.add(Entry(port_id, login.wwpn, login.wwnn, self._f_port_name(f_port)))
        self._tell("login", login)
        accept = Login.fabric_accept(self._f_port_name(f_port), self.name, r_a_tov=R_A_TOV, e_d_tov=E_D_TOV)
        reply = Frame(
            RCtl.ELS_REPLY,
            port_id,
            Address.F_PORT,
            FcType.ELS,
            els_reply(frame, b"").f_ctl,
            frame.ox_id,
            payload=accept.pack(),
        )
        return [*outputs, (f_port, reply.pack())]

    def _in_use(self, wwpn: Wwn) -> str:
        port_id = self._by_name[wwpn]
        target = self._targets.get(port_id)
        if target is not None:
            return f"{wwpn} is the WWPN of this fabric's own target port {target.name!r}"
        login = self._n_ports[port_id]
        since = datetime.fromtimestamp(login.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"{wwpn} is already logged in, by {login.holder!r} since {since}"

    def _f_port_name(self, f_port: int) -> Wwn:
        """An F_Port's own Port_Name: the switch's with the number in the vendor's bits."""
        return Wwn(self.name & ~0xFFFF | f_port & 0xFFFF)

    def _address(self, wwpn: Wwn) -> int:
        """An N_Port_ID: the one this name had before if nobody else has it now, 0 when there are no more.

        Where the search begins depends on the name alone, so that most ports have the same id on a
        restarted fabric too.
        """
        known = self._addresses.get(wwpn)
        if known is not None:
            return known
        span = _LAST_ID - _FIRST_ID + 1
        here = len(self._by_name)
        if len(self._addresses) >= max(span // 2, 2 * here) or len(self._addresses) >= span > here:
            # Many names came and went: only those that are here count.
            self._addresses = dict(self._by_name)
            self._assigned = set(self._by_name.values())
        start = zlib.crc32(wwpn.pack()) % span
        for step in range(span):
            port_id = DOMAIN << 16 | _FIRST_ID + (start + step) % span
            if port_id not in self._assigned:
                self._addresses[wwpn] = port_id
                self._assigned.add(port_id)
                return port_id
        return 0

    def _log_out(self, port_id: int) -> list[Output]:
        login = self._n_ports.pop(port_id)
        del self._by_name[login.wwpn]
        del self._f_ports[login.f_port].ids[port_id]
        self._registered.pop(port_id, None)
        self._gathering.forget(port_id)
        self.management.forget(login.wwpn)
        self.version += 1
        for target in self._met.pop(port_id, ()):
            target.forget(port_id)
        self._tell("logout", login)
        entry = self.names.remove(port_id)
        return self._notify(entry) if entry else []

    def _tell(self, event: str, login: NPort) -> None:
        self._notice(event, {"wwpn": str(login.wwpn), "port_id": f"{login.port_id:06x}", "holder": login.holder})

    # ------------------------------------------------------------ well-known addresses

    def _well_known(self, source: NPort, frame: Frame) -> list[Output]:
        if frame.type == FcType.CT and frame.r_ctl == RCtl.DATA_UNSOLICITED_CONTROL:
            return self._common_transport(source, frame)
        if frame.type != FcType.ELS or frame.r_ctl != RCtl.ELS_REQUEST:
            return []  # replies to our RSCNs, basic link services: nothing waits for them
        try:
            request = els.parse_request(frame.payload)
        except ElsError as error:
            return self.send(els_reply(frame, error.rejection.pack()))
        match frame.d_id, request:
            case address, Login(Els.PLOGI) if address in _LOG_IN_HERE:
                accept = Login.plogi(Wwn(self.name), Wwn(self.name), accept=True, e_d_tov=E_D_TOV)
                return self.send(els_reply(frame, accept.pack()))
            case Address.F_PORT, els.Logo():
                # The answer first: after it there is nobody to send it to.
                return [*self.send(els_reply(frame, els.LS_ACC)), *self._log_out(source.port_id)]
            case Address.F_PORT, els.Rtv():
                return self.send(els_reply(frame, els.RtvAcc(R_A_TOV, E_D_TOV).pack()))
            case _, els.Logo():
                return self.send(els_reply(frame, els.LS_ACC))
            case Address.FABRIC_CONTROLLER, els.Scr(function):
                if function == ScrFunction.CLEAR:
                    self._registered.pop(source.port_id, None)
                elif function in {ScrFunction.FABRIC_DETECTED, ScrFunction.N_PORT_DETECTED, ScrFunction.FULL}:
                    self._registered[source.port_id] = function
                else:
                    return self.send(_reject(frame, Reason.LOGICAL_ERROR, Explanation.NONE))
                return self.send(els_reply(frame, els.LS_ACC))
            case _, els.Echo(data):
                return self.send(els_reply(frame, els.Echo(data, Els.LS_ACC).pack()))
            case _, els.Rnid():
                here = len(self._n_ports) + len(self._targets)
                node = els.RnidAcc.answer(request, self.name, self.name, els.AssociatedType.SWITCH, attached=here)
                return self.send(els_reply(frame, node.pack()))
        return self.send(_reject(frame, Reason.NOT_SUPPORTED, Explanation.NOT_SUPPORTED))

    def _common_transport(self, source: NPort, frame: Frame) -> list[Output]:
        try:
            payload = self._gathering.add(frame)
            if payload is None:
                return []
            if frame.d_id == Address.DIRECTORY_SERVER:
                answer = self.names.answer(source.port_id, payload, self.zoning)
                iu, changed = answer.iu, answer.changed
            elif frame.d_id == Address.MANAGEMENT_SERVER:
                iu = self.management.answer(source.wwpn, payload, self._n_port_here, self.visible)
                changed = None
            else:
                return self._discard("no service")
        except FrameError:
            return self._discard("no CT_IU")
        outputs = [out for reply in ct_reply(frame, iu.pack()) for out in self.send(reply)]
        return outputs + (self._notify(changed) if changed else [])

    def _n_port_here(self, wwpn: Wwn) -> bool:
        return self.find(wwpn) is not None

    # ------------------------------------------------------------ RSCN

    def _notify(self, about: Entry) -> list[Output]:
        """This entry came, changed or went: tell those who can see it and asked.

        A port is told of targets, and a target of everybody.
        """
        if about.is_target:
            among: Iterable[int] = (self._by_name[w] for w in self.zoning.peers_in(about.wwpn, self._by_name))
        else:
            among = (i for i in self.names.targets if self.visible(self.names.entries[i].wwpn, about.wwpn))
        outputs: list[Output] = []
        for port_id in sorted(self._registered.keys() & set(among)):
            if port_id != about.port_id:
                outputs += self._rscn(port_id, [about.port_id], EventQualifier.CHANGED_NAME_SERVER_OBJECT)
        return outputs

    def _rscn(self, port_id: int, about: Iterable[int], qualifier: EventQualifier) -> list[Output]:
        pages = tuple(els.RscnPage(other, qualifier=qualifier) for other in about)
        named = ", ".join(f"{page.port_id:06x}" for page in pages[:8])
        self._notice("rscn", {"to": f"{port_id:06x}", "about": named, "pages": len(pages)})
        outputs: list[Output] = []
        for start in range(0, len(pages), 255):
            payload = els.Rscn(pages[start : start + 255]).pack()
            outputs += self.send(els_request(Address.FABRIC_CONTROLLER, port_id, next(self._ox_id), payload))
        return outputs


#: Where an N_Port may log in; who asks there without is served as well.
_LOG_IN_HERE = frozenset(
    {
        Address.DIRECTORY_SERVER,
        Address.FABRIC_CONTROLLER,
        Address.MANAGEMENT_SERVER,
        DOMAIN_CONTROLLER | DOMAIN,
    }
)
_LOGINS = frozenset({bytes([Els.FLOGI]), bytes([Els.FDISC])})


def _reject(frame: Frame, reason: Reason, explanation: Explanation) -> Frame:
    return els_reply(frame, LsRjt(reason, explanation).pack())
