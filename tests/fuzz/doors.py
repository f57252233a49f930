"""Fuzzed: the switch's door, and the FCF's.

An input is a script of steps, so that a few bytes of it can bring an attacker to where it gets interesting: logged
in, with commands under way.  After each script the tables are looked at, and a port that behaves is served.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tests.fabric.enode import Enode
from tests.fabric.san import Initiator, wwpn
from tests.fabric.segment import FCF, Segment
from tests.fc.tiny import lun
from tests.fuzz.frames import linux
from tests.fuzz.lab import GOOD, Lab
from tests.fuzz.target import Step, Target, script, steps, whole
from vhostfc.fabric.fcf import MAX_ENODES
from vhostfc.fabric.zoning import Zone, Zoning
from vhostfc.fc import bls, ct, els, fcoe, fdmi, fip, ns
from vhostfc.fc.els import Els
from vhostfc.fc.fcoe import Ethernet, encapsulate
from vhostfc.fc.fcp import FcpCmnd, TmFlag, cmnd_frame
from vhostfc.fc.frame import Address, FCtl, FcType, Frame, RCtl, els_request
from vhostfc.fc.login import Login
from vhostfc.fc.sequence import data_frames
from vhostfc.fc.wwn import Wwn

# ---------------------------------------------------------------- the switch

_ZONINGS = (Zoning(), Zoning((Zone("one", frozenset({wwpn(1), wwpn(GOOD)})),)))
RAW, AS_ME, TO_TARGET, TO_PEER, OTHER_PORT, RUN, REPLUG, ZONES, KICK_OUT = range(9)


class SwitchDoor:
    """Two F_Ports of attackers, who are logged in when it begins (the second with two N_Ports)."""

    def __init__(self) -> None:
        self.lab = Lab()
        self.first = Initiator(self.lab, 1).open()
        self.second = Initiator(self.lab, 3).open()
        self.vport = Initiator(self.lab, 4, f_port=self.second.f_port).login(fdisc=True)
        self.zoned = 0

    def play(self, data: bytes) -> None:
        count = 0
        for count, step in enumerate(steps(data), 1):
            self._do(step)
            self.lab.check(count + 4)
        self.lab.run()
        if self.zoned:
            self.lab.deliver(self.lab.switch.set_zoning(Zoning()))
        self.lab.check(count + 4)
        self.lab.serve_the_good_one()
        self.lab.check(count + 5)

    def _do(self, step: Step) -> None:
        switch, lab, data = self.lab.switch, self.lab, bytearray(step.data)
        f_port, who = self.first.f_port, self.first
        match step.what % 9:
            case 0:
                lab.deliver(switch.receive(f_port, step.data))
            case 1:
                data = bytearray(whole(step.data))
                data[5:8] = who.port_id.to_bytes(3, "big")
                lab.deliver(switch.receive(f_port, bytes(data)))
            case 2:
                data = bytearray(whole(step.data))
                data[1:4] = lab.target.port_id.to_bytes(3, "big")
                data[5:8] = who.port_id.to_bytes(3, "big")
                lab.deliver(switch.receive(f_port, bytes(data)))
            case 3:
                data = bytearray(whole(step.data))
                data[1:4] = self.second.port_id.to_bytes(3, "big")
                data[5:8] = who.port_id.to_bytes(3, "big")
                lab.deliver(switch.receive(f_port, bytes(data)))
            case 4:
                data = bytearray(whole(step.data))
                data[5:8] = (self.vport if step.data[:1] > b"\x80" else self.second).port_id.to_bytes(3, "big")
                lab.deliver(switch.receive(self.second.f_port, bytes(data)))
            case 5:
                lab.run()
            case 6:
                lab.deliver(switch.detach(who.f_port))
                self.first = Initiator(lab, 1)
                if switch.find(self.first.wwpn) is None:
                    self.first.login()
            case 7:
                self.zoned = len(step.data) % 2
                lab.deliver(switch.set_zoning(_ZONINGS[self.zoned]))
            case _:
                if switch.login(self.second.port_id) is not None:
                    lab.deliver(switch.log_out(self.second.port_id, tell=bool(step.data)))
        lab.inbox.clear()


def _requests(me: int = 0x010200, target: int = 0x01FE01) -> Iterator[tuple[int, Frame]]:
    """What an initiator has to say: to well-known addresses, to a target, and to another port."""
    name = wwpn(1)
    page = els.PrliPage(FcType.FCP, els.PrliPage.ESTABLISH, els.FcpService.INITIATOR)
    well_known: list[tuple[Address, els.Request]] = [
        (Address.F_PORT, Login.flogi(name, name)),
        (Address.F_PORT, Login.fdisc(wwpn(5), name)),
        (Address.DIRECTORY_SERVER, Login.plogi(name, name)),
        (Address.FABRIC_CONTROLLER, els.Scr()),
        (Address.F_PORT, els.Rtv()),
        (Address.F_PORT, els.Logo(me, name)),
        (Address.MANAGEMENT_SERVER, els.Echo(b"echo")),
    ]
    for number, (address, request) in enumerate(well_known):
        yield AS_ME, els_request(me, address, 0x100 + number, request.pack())
    queries: list[ns.Request] = [
        ns.ByPortId(ct.Ct.GA_NXT, me),
        ns.ByPortId(ct.Ct.GPN_ID, me),
        ns.ByPortId(ct.Ct.DA_ID, me),
        ns.ByName(ct.Ct.GSNN_NN, name),
        ns.ByFc4Type(ct.Ct.GPN_FT),
        ns.GidPt(),
        ns.GidFf(3),
        ns.RnnId(me, name),
        ns.RcsId(me),
        ns.RptId(me),
        ns.RftId(me, frozenset({8})),
        ns.RffId(me, 3),
        ns.RspnId(me, b"port"),
        ns.RsnnNn(name, b"node"),
    ]
    for number, query in enumerate(queries):
        yield AS_ME, ct.ct_request(me, Address.DIRECTORY_SERVER, 0x200 + number, query.pack())
    attributes = {kind: bytes(64) for kind in range(1, 8)}
    registrations: list[fdmi.Request] = [
        fdmi.RegisterHba(name, (name, wwpn(3)), attributes),
        fdmi.RegisterPort(name, name, attributes),
        fdmi.RegisterAttributes(fdmi.Fdmi.RPA, name, attributes),
        fdmi.Simple(fdmi.Fdmi.GRHL),
        *(fdmi.Simple(command, name) for command in (fdmi.Fdmi.GHAT, fdmi.Fdmi.DPRT, fdmi.Fdmi.DHBA)),
    ]
    for number, registration in enumerate(registrations):
        yield AS_ME, ct.ct_request(me, Address.MANAGEMENT_SERVER, 0x280 + number, registration.pack())
    whole_ = ct.ct_request(me, Address.MANAGEMENT_SERVER, 0x2F0, registrations[0].pack())
    yield AS_ME, dataclasses.replace(whole_, payload=whole_.payload[:256], f_ctl=FCtl.FIRST_SEQUENCE)
    yield AS_ME, dataclasses.replace(whole_, payload=whole_.payload[256:], seq_cnt=1)
    requests: list[els.Request] = [
        Login.plogi(name, name),
        els.Prli((page,)),
        els.Prli((page,), Els.PRLO),
        els.Adisc(name, name, me),
        els.Rrq(me, 1, 2),
        els.Rec(me, 0x400, 0xFFFF),
        els.Rnid(els.NodeFormat.GENERAL_TOPOLOGY),
        els.Logo(me, name),
    ]
    for number, request_ in enumerate(requests):
        yield TO_TARGET, els_request(me, target, 0x300 + number, request_.pack())
        yield TO_PEER, els_request(me, target, 0x380 + number, request_.pack())


def _commands(me: int = 0x010200, target: int = 0x01FE01) -> Iterator[Frame]:
    unit = bytes(8)
    for number, flag in enumerate(TmFlag):
        yield cmnd_frame(me, target, 0x500 + number, FcpCmnd(unit, bytes(16), tm_flags=flag))
    reads = ["12000000ff00", "120183003c00", "a0000000000000001000", "2800000000000000080000", "5e000000000000020000"]
    reads += ["1a003f00ff00", "9e100000000000000000000000200000", "a3050000000000000400", "4d0000000000000040"]
    for number, cdb in enumerate(reads):
        yield cmnd_frame(me, target, 0x520 + number, FcpCmnd(unit, bytes.fromhex(cdb), 4096, read=True))
    writes = [
        ("2a000000000000000100", 512),
        ("5f000000000000001800", 24),
        ("15100000180000", 24),
        ("42000000000000001800", 24),
        ("93000000000000000000000000080000", 512),
        ("89000000000000000000000000010000", 1024),
        ("830000000000000000000000001c0000", 28),
    ]
    for number, (cdb, size) in enumerate(writes):
        ox_id = 0x540 + number
        command = cmnd_frame(me, target, ox_id, FcpCmnd(unit, bytes.fromhex(cdb), size, write=True))
        yield command
        template = Frame(RCtl.DATA_SOLICITED, target, me, FcType.FCP, 0, ox_id)
        yield from data_frames(template, bytes(size))
    yield bls.abts_frame(me, target, 0x540)


def _switch_seeds() -> Iterator[bytes]:
    told = list(_requests())
    for what, frame in told:
        yield script((what, frame.pack()))
    yield script(*((what, frame.pack()) for what, frame in told if frame.d_id == Address.MANAGEMENT_SERVER))
    commands = [(TO_TARGET, frame.pack()) for frame in _commands()]
    for command in commands:
        yield script(command, (RUN, b""))
    yield script(*commands[:20], (RUN, b""), (ZONES, b"1"), (ZONES, b""), (KICK_OUT, b"1"), (REPLUG, b""))
    login = els_request(0, Address.F_PORT, 1, Login.flogi(wwpn(1), wwpn(1)).pack()).pack()
    yield script((RAW, login), (RAW, login), (OTHER_PORT, login))
    for data in linux():
        yield script((AS_ME, data), (OTHER_PORT, b"\xff" + data[1:]))


def _switch(data: bytes) -> None:
    SwitchDoor().play(data)


# ---------------------------------------------------------------- the FCF


class FcfDoor(Segment):
    """A segment with two stations: an attacker who has logged in, with a vport, and later one that behaves."""

    def __init__(self) -> None:
        self.lab = Lab()
        super().__init__(self.lab)
        self.deaf: Enode | None = None
        self.bad = self.join(1, wwpn(1))
        self.bad.login(wwpn(3), fdisc=True)
        self.settle()

    def join(self, number: int, name: Wwn) -> Enode:
        enode = self.enode(number)
        enode.login(name)
        self.settle()
        return enode

    def forward(self) -> None:
        self.lab.run()
        super().forward()

    def hear(self, enode: Enode, data: bytes) -> None:
        if enode is not self.deaf:
            super().hear(enode, data)

    def play(self, data: bytes) -> None:
        first, *others = self.bad.ports
        self.deaf = self.bad  # what the attacker hears matters only while it plays by the rules
        count = 0
        for count, step in enumerate(steps(data), 1):
            match step.what % 6:
                case 0:
                    self.come(1, step.data)
                case 1:  # FIP, from its own MAC address
                    self.come(1, Ethernet(FCF, self.bad.mac, fcoe.ETHERTYPE_FIP, step.data).pack())
                case 2 | 3:  # an FC frame of one of its ports, with all that FCoE puts around it
                    port_id = others[0] if others and step.what & 1 else first
                    raw = bytearray(whole(step.data))
                    raw[5:8] = port_id.to_bytes(3, "big")
                    pdu = encapsulate(bytes(raw))
                    self.come(1, Ethernet(FCF, fcoe.fpma(fcoe.FC_MAP, port_id), fcoe.ETHERTYPE_FCOE, pdu).pack())
                case 4:
                    self.tick(len(step.data) / 4)
                case _:
                    self.come(3, step.data)  # from another station
            self.check(count)
        self.do(self.forwarder.set_link(up=False))
        self.do(self.forwarder.set_link(up=True))
        assert not self.forwarder._enodes
        assert not self.forwarder._ports
        self.check(count)
        self.serve_the_good_one()

    def check(self, count: int) -> None:
        forwarder = self.forwarder
        assert len(forwarder._enodes) <= min(MAX_ENODES, count + 2)
        assert forwarder._enodes.keys() == {(one.station, one.mac) for one in forwarder._by_f_port.values()}
        ports = {port_id: port for enode in forwarder._enodes.values() for port_id, port in enode.ports.items()}
        assert ports == forwarder._ports
        assert ports.keys() == {login.port_id for login in self.lab.switch.logins()}
        assert not any(enode.asked for enode in forwarder._enodes.values())
        assert len(forwarder.discarded) <= 65
        self.lab.check(2 * count + 4)

    def serve_the_good_one(self) -> None:
        good = self.join(GOOD, wwpn(GOOD))
        ((port_id, name),) = good.ports.items()
        assert name == wwpn(GOOD)
        ox_id = good.plogi(port_id, self.lab.target.port_id)
        self.settle()
        assert [frame.payload[0] for frame in good.frames if frame.ox_id == ox_id] == [Els.LS_ACC]
        page = els.PrliPage(FcType.FCP, els.PrliPage.ESTABLISH, els.FcpService.INITIATOR)
        good.send(els_request(port_id, self.lab.target.port_id, 0x7000, els.Prli((page,)).pack()))
        read = FcpCmnd(lun(1), b"\x28\0\0\0\0\0\0\0\x01\0", 512, read=True)
        for number in range(2):  # the first is told of a power on
            good.send(cmnd_frame(port_id, self.lab.target.port_id, 0x7001 + number, read))
        self.settle()
        data = [frame for frame in good.frames if frame.ox_id == 0x7002 and frame.r_ctl == RCtl.DATA_SOLICITED]
        assert b"".join(frame.payload for frame in data) == b"\x5a" * 512


def _fcf_seeds() -> Iterator[bytes]:
    enode = Enode(1)
    enode.fcf = FCF
    enode.ports = {0x010200: wwpn(1)}
    enode.solicit()
    enode.login(wwpn(1))
    enode.login(wwpn(4), fdisc=True)
    enode.log_out(0x010200)
    enode.keep_alive()
    enode.keep_alive(0x010200)
    enode.plogi(0x010200, 0x01FE01)
    for data in enode.out:
        yield script((0, data))
        yield script((1, data[14:]))
        yield script((5, data))
    for _, frame in _requests():
        yield script((2, frame.pack()), (3, frame.pack()))
    for frame in _commands():
        yield script((2, frame.pack()))
    yield script((4, bytes(90)), (4, bytes(200)), (4, bytes(1000)))
    twice = (fip.Encapsulated(fip.Encapsulated.FLOGI, linux()[0]),) * 2
    yield script((1, fip.Fip(fip.Operation.LINK_SERVICE_REQUEST, fip.Flag.FPMA, twice).pack()))


def _fcf(data: bytes) -> None:
    FcfDoor().play(data)


SWITCH = Target("switch", _switch, _switch_seeds)
FORWARDER = Target("fcf", _fcf, _fcf_seeds)
