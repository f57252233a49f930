"""An FCoE Forwarder: what makes an Ethernet segment one of the switch's attachments (FC-BB-5 clause 7).  Pure.

ENodes, Linux kernels with fcoe among them, find it with FIP, log in, and then have virtual links: each ENode one
F_Port of the switch, behind which its N_Ports are (the first by FLOGI, others by FDISC).  In between is only this:

- what comes from the segment is checked and becomes frames for the switch: the MAC address must be the one that
  belongs to the frame's S_ID, and come from where that port logged in;
- what the switch sends to one of these F_Ports becomes an Ethernet frame, or a FIP reply where FIP has asked;
- an advertisement goes out every FKA_ADV_Period, and who is not heard of for two and a half is logged out.

`station` is where a frame came from and goes to, whatever the caller's sockets know that by: on a segment of datagram
sockets nobody can speak for somebody else's MAC address.

libfc sends LOGOs while it resets a port whose link was cleared, and takes an answer to one for that to its next FDISC:
so frames of a port that is not logged in are discarded without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field

from vhostfc.fc import fcoe, fip
from vhostfc.fc.els import Els
from vhostfc.fc.fcoe import Ethernet, decapsulate, encapsulate, fpma, is_unicast
from vhostfc.fc.fip import Encapsulated, Fip, Flag, Operation
from vhostfc.fc.frame import HEADER_LENGTH, Address, Frame, FrameError, RCtl, pack_id
from vhostfc.fc.login import Login
from vhostfc.fc.wwn import Wwn

#: A VN_Port says every 90 s that it is there (FC-BB-5 7.8.7.2); after this many periods of silence it is not.
VN_PORT_PERIOD = 90.0
MISSED = 2.5
#: ENodes of one attachment, and stations that are sent advertisements; each costs an F_Port of the switch.
MAX_ENODES = 1024
#: Logins and logouts of one ENode that wait for the switch; it answers at once, unless a fault has lost them.
_MAX_ASKED = 64
#: What a VN_Port may say to the fabric in FIP only (FC-BB-5 7.8).
_IN_FIP = frozenset({bytes([Els.FLOGI]), bytes([Els.FDISC]), bytes([Els.LOGO])})


@dataclass(frozen=True, slots=True)
class Send:
    """An Ethernet frame for a station; None: for everybody on the segment."""

    station: Hashable
    data: bytes


@dataclass(frozen=True, slots=True)
class Deliver:
    """An FC frame for the switch, at this F_Port."""

    f_port: int
    frame: bytes


@dataclass(frozen=True, slots=True)
class LogOut:
    """This N_Port is not there any more."""

    port_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Detach:
    """This F_Port is no more, with all that was behind it."""

    f_port: int
    reason: str


Action = Send | Deliver | LogOut | Detach


@dataclass(eq=False, slots=True)
class _Port:
    """An N_Port behind an ENode.  heard: when it was."""

    enode: _Enode
    port_id: int
    wwpn: Wwn
    heard: float


@dataclass(eq=False, slots=True)
class _Enode:
    """heard: when it was.  asked: OX_ID -> what FIP asked: a descriptor type, and the port's name."""

    station: Hashable
    mac: bytes
    f_port: int
    heard: float
    ports: dict[int, _Port] = field(default_factory=dict)
    asked: dict[int, tuple[int, Wwn]] = field(default_factory=dict)


class Forwarder:
    """See the head of the file.

    where: how people call the attachment.  attach: gives an F_Port of the switch for a holder.  name, fabric:
    Switch_Name and Fabric_Name.  mac: the FCF's own.  period: FKA_ADV_Period in seconds.  discarded: by reason.
    """

    def __init__(
        self,
        where: str,
        attach: Callable[[str], int],
        *,
        name: Wwn,
        fabric: Wwn,
        mac: bytes,
        fc_map: int = fcoe.FC_MAP,
        priority: int = 128,
        period: float = 8.0,
    ) -> None:
        self.where = where
        self.mac = mac
        self.fc_map = fc_map
        self.discarded: dict[str, int] = {}
        self._attach = attach
        self._name, self._fabric = name, fabric
        self._priority, self._period = priority, period
        self._enodes: dict[tuple[Hashable, bytes], _Enode] = {}
        self._by_f_port: dict[int, _Enode] = {}
        self._ports: dict[int, _Port] = {}
        self._advertise_at = float("-inf")
        self._up = True

    def __repr__(self) -> str:
        return f"<Forwarder {self.where}: {len(self._enodes)} ENodes, {len(self._ports)} N_Ports>"

    # ------------------------------------------------------------ from the segment

    def receive(self, station: Hashable, data: bytes, now: float) -> list[Action]:
        """An Ethernet frame.  Whatever it is, it is answered, delivered or discarded; never an error."""
        if not self._up:
            return self._discard("the link is down")
        try:
            ethernet = Ethernet.unpack(data)
            if not is_unicast(ethernet.source):
                raise FrameError("a source address that no station has")
            match ethernet.ethertype:
                case fcoe.ETHERTYPE_FIP:
                    if ethernet.destination in (self.mac, fcoe.ALL_FCF_MACS):
                        return self._fip(station, ethernet, now)
                case fcoe.ETHERTYPE_FCOE:
                    if ethernet.destination == self.mac:
                        return self._fcoe(station, ethernet, now)
        except FrameError as error:
            return self._discard(str(error))
        return []  # not for us

    def _discard(self, reason: str) -> list[Action]:
        if reason not in self.discarded and len(self.discarded) >= 64:
            reason = "other"  # what strangers can send in many variants
        self.discarded[reason] = self.discarded.get(reason, 0) + 1
        return []

    def _fcoe(self, station: Hashable, ethernet: Ethernet, now: float) -> list[Action]:
        frame = decapsulate(ethernet.payload)
        s_id = int.from_bytes(frame[5:8], "big")
        port = self._ports.get(s_id)
        if port is None:
            return self._discard("not logged in")
        if port.enode.station != station or ethernet.source != fpma(self.fc_map, s_id):
            return self._discard("another port's N_Port_ID")
        port.heard = port.enode.heard = now
        to_fabric = frame[1:4] == pack_id(Address.F_PORT) and frame[0] == RCtl.ELS_REQUEST
        if to_fabric and frame[HEADER_LENGTH : HEADER_LENGTH + 1] in _IN_FIP:
            return self._discard("a login or logout outside FIP")
        return [Deliver(port.enode.f_port, frame)]

    # ------------------------------------------------------------ FIP

    def _fip(self, station: Hashable, ethernet: Ethernet, now: float) -> list[Action]:
        request = Fip.unpack(ethernet.payload)
        match request.operation:
            case Operation.SOLICITATION if not request.flags & Flag.FROM_FCF:
                size = request.one(fip.MaxFcoeSize).size
                request.one(fip.NameIdentifier)
                mac = request.one(fip.Mac).address
                # Filled up to what the ENode says it takes: the answer arrives only if frames of that size do.
                return [Send(station, self._advertisement(mac, pad_to=min(size, 2158)))]
            case Operation.LINK_SERVICE_REQUEST:
                return self._link_service(station, ethernet.source, request, now)
            case Operation.KEEP_ALIVE:
                return self._keep_alive(station, request, now)
        return self._discard(f"{request.operation.name.lower().replace('_', ' ')} for an FCF")

    def _ethernet(self, destination: bytes, payload: bytes, ethertype: int = fcoe.ETHERTYPE_FIP) -> bytes:
        return Ethernet(destination, self.mac, ethertype, payload).pack()

    def _advertisement(self, to: bytes | None, *, pad_to: int = 0) -> bytes:
        """Multicast, or the answer to a solicitation from this MAC address."""
        flags = Flag.FPMA | Flag.AVAILABLE | Flag.FROM_FCF | (Flag.SOLICITED if to else 0)
        descriptors = (
            fip.Priority(self._priority),
            fip.Mac(self.mac),
            fip.NameIdentifier(self._name),
            fip.Fabric(self._fabric, self.fc_map),
            fip.KeepAlivePeriod(round(self._period * 1000)),
        )
        message = Fip(Operation.ADVERTISEMENT, flags, descriptors)
        return self._ethernet(to or fcoe.ALL_ENODE_MACS, message.pack(pad_to=pad_to))

    def _link_service(self, station: Hashable, source: bytes, request: Fip, now: float) -> list[Action]:
        """FLOGI, FDISC and LOGO come in FIP, since before a login there is no MAC address to send frames from."""
        asked = request.one(Encapsulated)
        frame = Frame.unpack(asked.frame)
        command = {Encapsulated.FLOGI: Els.FLOGI, Encapsulated.FDISC: Els.FDISC, Encapsulated.LOGO: Els.LOGO}
        is_it = frame.r_ctl == RCtl.ELS_REQUEST and frame.d_id == Address.F_PORT
        if not is_it or frame.payload[:1] != bytes([command.get(asked.type, 0)]):
            return self._discard("a FIP descriptor that does not hold what it says")
        if not request.flags & Flag.FPMA:
            return self._discard("a login that wants a MAC address of its own")
        if asked.type == Encapsulated.LOGO:
            # From the address of the port that leaves, or of its ENode.
            port = self._ports.get(frame.s_id)
            if port is None or port.enode.station != station or source not in (port.enode.mac, self._fpma(port)):
                return self._discard("not logged in")
            enode, wwpn = port.enode, port.wwpn
        else:
            wwpn = Login.unpack(frame.payload).wwpn
            found = self._enodes.get((station, source))
            if found is None and (asked.type != Encapsulated.FLOGI or len(self._enodes) >= MAX_ENODES):
                return self._discard("a login that no FLOGI goes before, or one too many")
            enode = found or self._new(station, source, now)
            enode.heard = now
        if len(enode.asked) >= _MAX_ASKED:
            del enode.asked[next(iter(enode.asked))]
        enode.asked[frame.ox_id] = (asked.type, wwpn)
        return [Deliver(enode.f_port, asked.frame)]

    def _fpma(self, port: _Port) -> bytes:
        return fpma(self.fc_map, port.port_id)

    def _new(self, station: Hashable, mac: bytes, now: float) -> _Enode:
        enode = _Enode(station, mac, self._attach(f"{mac.hex(':')} on {self.where}"), now)
        self._enodes[station, mac] = enode
        self._by_f_port[enode.f_port] = enode
        return enode

    def _keep_alive(self, station: Hashable, request: Fip, now: float) -> list[Action]:
        mac = request.one(fip.Mac).address
        if not request.all(fip.VxPortId):
            enode = self._enodes.get((station, mac))
            if enode is None:
                # It thinks that it is logged in, since before we began, perhaps: let it find out now.
                return [Send(station, self._clear(mac, []))]
            enode.heard = now
            return []
        claim = request.one(fip.VxPortId)
        port = self._ports.get(claim.port_id)
        if port is None or port.enode.station != station or port.wwpn != claim.wwpn:
            return [Send(station, self._clear(mac, [claim]))]
        port.heard = port.enode.heard = now
        return []

    def _clear(self, to: bytes, ports: Iterable[fip.VxPortId]) -> bytes:
        """Clear Virtual Links: these, or all of that ENode."""
        descriptors: tuple[fip.Descriptor, ...] = (fip.Mac(self.mac), fip.NameIdentifier(self._name), *ports)
        message = Fip(Operation.CLEAR_VIRTUAL_LINKS, Flag.FPMA | Flag.FROM_FCF, descriptors)
        return self._ethernet(to, message.pack())

    # ------------------------------------------------------------ from the switch

    def output(self, f_port: int, data: bytes, now: float) -> Send | None:
        """A frame that the switch sends to one of our F_Ports; None when that is gone."""
        enode = self._by_f_port.get(f_port)
        if enode is None:
            return None
        frame = Frame.unpack(data)
        if frame.s_id == Address.F_PORT and frame.r_ctl == RCtl.ELS_REPLY and frame.ox_id in enode.asked:
            return self._reply(enode, frame, data, now)
        ethernet = self._ethernet(fpma(self.fc_map, frame.d_id), encapsulate(data), fcoe.ETHERTYPE_FCOE)
        return Send(enode.station, ethernet)

    def enodes(self) -> list[str]:
        """The MAC addresses of those that have logged in."""
        return sorted(enode.mac.hex(":") for enode in self._enodes.values())

    def station(self, f_port: int) -> Hashable:
        """Where the ENode of this F_Port is; None when there is none (any more), or on a wire."""
        enode = self._by_f_port.get(f_port)
        return enode.station if enode else None

    def _reply(self, enode: _Enode, frame: Frame, data: bytes, now: float) -> Send:
        kind, wwpn = enode.asked.pop(frame.ox_id)
        descriptors: tuple[fip.Descriptor, ...] = (Encapsulated(kind, data),)
        if kind == Encapsulated.FLOGI:  # whatever was there before is gone, even if this is a rejection
            self._forget(list(enode.ports.values()))
        if frame.payload[:1] == bytes([Els.LS_ACC]):
            descriptors += (fip.Mac(fpma(self.fc_map, frame.d_id)),)
            if kind == Encapsulated.LOGO:
                self._forget([port for port in enode.ports.values() if port.port_id == frame.d_id])
            else:
                port = _Port(enode, frame.d_id, wwpn, now)
                enode.ports[port.port_id] = self._ports[port.port_id] = port
        message = Fip(Operation.LINK_SERVICE_REPLY, Flag.FPMA | Flag.FROM_FCF, descriptors)
        return Send(enode.station, self._ethernet(enode.mac, message.pack()))

    def _forget(self, ports: Iterable[_Port]) -> None:
        for port in ports:
            del port.enode.ports[port.port_id]
            if self._ports.get(port.port_id) is port:
                del self._ports[port.port_id]

    # ------------------------------------------------------------ ends of virtual links

    def clear(self, f_port: int, port_ids: Iterable[int] = (), *, reason: str = "virtual link cleared") -> list[Action]:
        """Clear Virtual Links: of these N_Ports behind one of our F_Ports, or the whole F_Port."""
        enode = self._by_f_port.get(f_port)
        if enode is None:
            return []
        ports = [enode.ports[port_id] for port_id in port_ids if port_id in enode.ports]
        if not ports:
            return list(self._end(enode, reason))
        claims = [fip.VxPortId(self._fpma(port), port.port_id, port.wwpn) for port in ports]
        self._forget(ports)
        logouts = [LogOut(port.port_id, reason) for port in ports]
        return [Send(enode.station, self._clear(enode.mac, claims)), *logouts]

    def _end(self, enode: _Enode, reason: str) -> Iterator[Action]:
        self._forget(list(enode.ports.values()))
        del self._enodes[enode.station, enode.mac]
        del self._by_f_port[enode.f_port]
        yield Send(enode.station, self._clear(enode.mac, []))
        yield Detach(enode.f_port, reason)

    def gone(self, station: Hashable) -> list[Action]:
        """Nobody is at this station any more."""
        ended = [enode for enode in self._enodes.values() if enode.station == station]
        return [action for enode in ended for action in self._end(enode, "gone") if not isinstance(action, Send)]

    def set_link(self, up: bool) -> list[Action]:
        """Up or down, as if the cable were pulled; ENodes are told, since they cannot see it."""
        self._up = up
        self._advertise_at = float("-inf")
        if up:
            return []
        return [action for enode in list(self._enodes.values()) for action in self._end(enode, "link down")]

    # ------------------------------------------------------------ time

    def deadline(self) -> float:
        """When tick() has something to do: once in an FKA_ADV_Period."""
        return self._advertise_at if self._up else float("inf")

    def tick(self, now: float) -> list[Action]:
        """Advertise, and log out who has been silent for too long."""
        if now < self.deadline():
            return []
        self._advertise_at = now + self._period
        actions: list[Action] = [Send(None, self._advertisement(None))]
        for enode in list(self._enodes.values()):
            if now >= enode.heard + MISSED * self._period:
                actions += self._end(enode, f"silent for {MISSED * self._period:g} s")
                continue
            silent = [port.port_id for port in enode.ports.values() if now >= port.heard + MISSED * VN_PORT_PERIOD]
            if silent:
                actions += self.clear(enode.f_port, silent, reason=f"silent for {MISSED * VN_PORT_PERIOD:g} s")
        return actions
