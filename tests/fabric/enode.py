"""An ENode: the other side of an FCF, as Linux's libfcoe and libfc are, without a clock or a wire of its own."""

from __future__ import annotations

import itertools

from vhostfc.fc import els, fcoe, fip
from vhostfc.fc.els import Els
from vhostfc.fc.fcoe import Ethernet, decapsulate, encapsulate
from vhostfc.fc.fip import Encapsulated, Fip, Flag, Operation
from vhostfc.fc.frame import Address, Frame, els_request
from vhostfc.fc.login import Login
from vhostfc.fc.wwn import Wwn

_KINDS = {Els.FLOGI: Encapsulated.FLOGI, Els.FDISC: Encapsulated.FDISC, Els.LOGO: Encapsulated.LOGO}


class Enode:
    """Frames that it wants to send are in `out`; receive() takes what comes.

    ports: N_Port_ID -> Port_Name of those that are logged in.  frames: FC frames that came, newest last.
    cleared: Clear Virtual Links operations.  rejected: LS_RJTs to logins.
    """

    def __init__(self, number: int) -> None:
        self.mac = bytes([0x52, 0x54, 0, 0, 0, number])
        self.fcf: bytes | None = None
        self.out: list[bytes] = []
        self.ports: dict[int, Wwn] = {}
        self.frames: list[Frame] = []
        self.cleared: list[Fip] = []
        self.rejected: list[els.LsRjt] = []
        self._asked: dict[int, Wwn] = {}
        self._ox_id = itertools.count(number << 8)

    # ------------------------------------------------------------ what it sends

    def _fip(self, operation: Operation, *descriptors: fip.Descriptor, source: bytes | None = None) -> None:
        message = Fip(operation, Flag.FPMA, descriptors)
        to = self.fcf or fcoe.ALL_FCF_MACS
        self.out.append(Ethernet(to, source or self.mac, fcoe.ETHERTYPE_FIP, message.pack()).pack())

    def solicit(self) -> None:
        name = Wwn(0x1000 << 48 | int.from_bytes(self.mac, "big"))
        self._fip(Operation.SOLICITATION, fip.Mac(self.mac), fip.NameIdentifier(name), fip.MaxFcoeSize(2158))

    def _ask(self, command: Els, s_id: int, wwpn: Wwn, payload: bytes) -> None:
        ox_id = next(self._ox_id)
        self._asked[ox_id] = wwpn
        frame = els_request(s_id, Address.F_PORT, ox_id, payload).pack()
        self._fip(Operation.LINK_SERVICE_REQUEST, Encapsulated(_KINDS[command], frame), fip.Mac(bytes(6)))

    def login(self, wwpn: Wwn, *, fdisc: bool = False) -> None:
        login = (Login.fdisc if fdisc else Login.flogi)(wwpn, Wwn(wwpn | 1))
        self._ask(Els.FDISC if fdisc else Els.FLOGI, 0, wwpn, login.pack())

    def log_out(self, port_id: int) -> None:
        self._ask(Els.LOGO, port_id, self.ports[port_id], els.Logo(port_id, self.ports[port_id]).pack())

    def keep_alive(self, port_id: int | None = None) -> None:
        claim = [fip.VxPortId(self.fpma(port_id), port_id, self.ports[port_id])] if port_id else []
        self._fip(Operation.KEEP_ALIVE, fip.Mac(self.mac), *claim, source=self.fpma(port_id) if port_id else None)

    def send(self, frame: Frame, *, source: bytes | None = None) -> None:
        assert self.fcf
        pdu = encapsulate(frame.pack())
        self.out.append(Ethernet(self.fcf, source or self.fpma(frame.s_id), fcoe.ETHERTYPE_FCOE, pdu).pack())

    def plogi(self, port_id: int, d_id: int) -> int:
        """Its OX_ID."""
        ox_id = next(self._ox_id)
        wwpn = self.ports[port_id]
        self.send(els_request(port_id, d_id, ox_id, Login.plogi(wwpn, Wwn(wwpn | 1)).pack()))
        return ox_id

    @staticmethod
    def fpma(port_id: int) -> bytes:
        return fcoe.fpma(fcoe.FC_MAP, port_id)

    # ------------------------------------------------------------ what comes

    def receive(self, data: bytes) -> None:
        ethernet = Ethernet.unpack(data)
        if ethernet.ethertype == fcoe.ETHERTYPE_FIP:
            self._operation(ethernet, Fip.unpack(ethernet.payload))
        elif any(ethernet.destination == self.fpma(port_id) for port_id in self.ports):
            assert ethernet.source == self.fcf
            frame = Frame.unpack(decapsulate(ethernet.payload))
            assert frame.d_id.to_bytes(3, "big") == ethernet.destination[3:]
            self.frames.append(frame)

    def _operation(self, ethernet: Ethernet, message: Fip) -> None:
        assert ethernet.destination in (self.mac, fcoe.ALL_ENODE_MACS)
        match message.operation:
            case Operation.ADVERTISEMENT:
                # What libfcoe insists on: these five, once each, and no other.
                kinds = (fip.Priority, fip.Mac, fip.NameIdentifier, fip.Fabric, fip.KeepAlivePeriod)
                assert tuple(type(one) for one in message.descriptors) == kinds
                if message.flags & Flag.SOLICITED:
                    assert len(ethernet.payload) == 2158
                    self.fcf = message.one(fip.Mac).address
            case Operation.LINK_SERVICE_REPLY:
                reply = Frame.unpack(message.one(Encapsulated).frame)
                wwpn = self._asked.pop(reply.ox_id)
                if reply.payload[0] == Els.LS_RJT:
                    self.rejected.append(els.LsRjt.unpack(reply.payload))
                    return
                assert message.one(fip.Mac).address == self.fpma(reply.d_id)
                match message.one(Encapsulated).type:
                    case Encapsulated.FLOGI:
                        self.ports = {reply.d_id: wwpn}
                    case Encapsulated.FDISC:
                        self.ports[reply.d_id] = wwpn
                    case _:
                        del self.ports[reply.d_id]
            case Operation.CLEAR_VIRTUAL_LINKS:
                assert message.one(fip.Mac).address == ethernet.source
                message.one(fip.NameIdentifier)
                self.cleared.append(message)
                for claim in message.all(fip.VxPortId):
                    assert self.ports.pop(claim.port_id) == claim.wwpn
                    assert claim.mac == self.fpma(claim.port_id)
                if not message.all(fip.VxPortId):
                    self.ports.clear()
