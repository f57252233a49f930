"""A small fabric of values: a switch, a target with two units on bytearrays, and N_Ports that talk to it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from vhostfc.fabric.array import Array, Place
from vhostfc.fabric.link import Note
from vhostfc.fabric.rations import Rations
from vhostfc.fabric.sessions import Exchange, Opened, Untold, Urgent
from vhostfc.fabric.switch import Output, Switch
from vhostfc.fabric.target import TargetPort
from vhostfc.fabric.zoning import Zoning
from vhostfc.fc import els
from vhostfc.fc.fcp import FcpCmnd, FcpRsp, cmnd_frame
from vhostfc.fc.frame import Address, FcType, Frame, RCtl, els_request
from vhostfc.fc.login import Login
from vhostfc.fc.wwn import Wwn
from vhostfc.scsi.inquiry import Identity
from vhostfc.scsi.inquiry import TargetPort as IdentityPort
from vhostfc.scsi.sense import attention_in
from vhostfc.scsi.task import Read, ScsiResult, Task, Write
from vhostfc.scsi.unit import LogicalUnit

FABRIC = Wwn(0x1000_0000_0000_0001)
TARGET, NODE = Wwn(0x5006_0160_0000_0001), Wwn(0x5006_0160_0000_0000)
BLOCK = 512


def wwpn(number: int) -> Wwn:
    return Wwn(0x5001_4380_0000_0000 + number)


@dataclass(eq=False)
class San:
    """All of it; time stands still at `now`."""

    zoning: Zoning = field(default_factory=Zoning)
    now: float = 1_000_000_000.0

    def __post_init__(self) -> None:
        self.switch = Switch(FABRIC, self.zoning, clock=lambda: self.now)
        self.rations: Rations[Exchange] = Rations(commands=4, size=1 << 20)
        self.urgent: deque[Urgent] = deque()
        self.array = Array()
        self.target = TargetPort(
            "array-a", TARGET, NODE, 1, rations=self.rations, urgent=self.urgent, clock=lambda: self.now
        )
        self.array.add(self.target)
        self.units = [self.unit(n) for n in range(2)]
        self.array.set_places(self.target, {0: Place(self.units[0]), 1: Place(self.units[1], frozenset({wwpn(2)}))})
        self.stored = {unit: bytearray(256 * BLOCK) for unit in self.units}
        self.switch.add_target(self.target)
        self.inbox: dict[int, list[bytes | Note]] = {}

    def unit(self, number: int) -> LogicalUnit:
        naa = bytes([0x60, 0, 0, 0, *bytes(11), number])
        port = IdentityPort(1, TARGET.pack())
        return LogicalUnit(Identity(serial=f"unit{number}", naa=(naa,), ports=(port,)), 256, self.array)

    def deliver(self, outputs: list[Output]) -> None:
        for port, what in outputs:
            self.inbox.setdefault(port, []).append(what)

    def run(self) -> None:
        """Serve what is in the queues, one after the other."""
        while self.urgent:
            match self.urgent.popleft():
                case Untold(session, lun, sense):
                    unit = self.array.resolve(self.target, session.wwpn, lun)
                    asc = attention_in(sense)
                    if isinstance(unit, LogicalUnit) and asc is not None:
                        unit.attention(asc, [session.nexus])
                case Opened(session):
                    for unit in self.array.seen(self.target, session.wwpn).values():
                        unit.attach(session.nexus)
                case _:
                    pass
        while (taken := self.rations.take()) is not None:
            exchange = taken[1]
            exchange.target.begin(exchange)
            for frame in exchange.target.finish(exchange, self.execute(exchange)):
                self.deliver(self.switch.send(frame))

    def execute(self, exchange: Exchange) -> ScsiResult:
        server = self.array.resolve(exchange.target, exchange.session.wwpn, exchange.cmnd.lun)
        cdb = exchange.cmnd.cdb
        steps = server.execute(Task(exchange.session.nexus, cdb, exchange.data_out, exchange.data_in_length))
        answer: object = None
        while True:
            try:
                effect = steps.send(answer)
            except StopIteration as stop:
                result: ScsiResult = stop.value
                return result
            assert isinstance(server, LogicalUnit)
            match effect:
                case Read(lba, blocks):
                    answer = bytes(self.stored[server][lba * BLOCK : (lba + blocks) * BLOCK])
                case Write(lba, data):
                    self.stored[server][lba * BLOCK : lba * BLOCK + len(data)] = data
                    answer = None
                case _:
                    answer = None


class Initiator:
    """An N_Port that does one thing after the other and sees every frame that comes."""

    def __init__(self, san: San, number: int, *, f_port: int | None = None) -> None:
        self.san = san
        self.wwpn, self.wwnn = wwpn(number), Wwn(wwpn(number) | 1 << 40)
        self.f_port = san.switch.attach(f"vm{number}") if f_port is None else f_port
        self.port_id = 0
        self.ox_id = number << 8
        self.services = 0

    def send(self, frame: Frame) -> None:
        self.san.deliver(self.san.switch.receive(self.f_port, frame.pack()))

    def take(self) -> list[Frame]:
        """What came in since the last time; notes are not frames."""
        return [Frame.unpack(what) for what in self.san.inbox.pop(self.f_port, []) if isinstance(what, bytes)]

    def els(self, d_id: int, payload: bytes) -> bytes:
        """The payload of the answer."""
        self.ox_id += 1
        self.send(els_request(self.port_id, d_id, self.ox_id, payload))
        replies = [frame for frame in self.take() if frame.ox_id == self.ox_id and frame.r_ctl == RCtl.ELS_REPLY]
        assert len(replies) == 1
        return replies[0].payload

    def login(self, *, fdisc: bool = False) -> Initiator:
        login = (Login.fdisc if fdisc else Login.flogi)(self.wwpn, self.wwnn)
        self.ox_id += 1
        self.send(els_request(0, Address.F_PORT, self.ox_id, login.pack()))
        (reply,) = (frame for frame in self.take() if frame.ox_id == self.ox_id)
        assert reply.payload[0] == els.Els.LS_ACC
        self.port_id = reply.d_id
        return self

    def scr(self) -> Initiator:
        assert self.els(Address.FABRIC_CONTROLLER, els.Scr().pack()) == els.LS_ACC
        return self

    def plogi(self) -> bytes:
        return self.els(self.san.target.port_id, Login.plogi(self.wwpn, self.wwnn).pack())

    def prli(self) -> bytes:
        page = els.PrliPage(FcType.FCP, els.PrliPage.ESTABLISH, els.FcpService.INITIATOR | self.services)
        return self.els(self.san.target.port_id, els.Prli((page,)).pack())

    def open(self) -> Initiator:
        """Logged in everywhere, and the power-on unit attentions taken."""
        if not self.port_id:
            self.login()
        assert self.plogi()[0] == els.Els.LS_ACC
        assert self.prli()[0] == els.Els.LS_ACC
        self.san.run()
        for lun in self.san.array.seen(self.san.target, self.wwpn):
            self.command(bytes(6), lun=lun)
        return self

    def start(self, cmnd: FcpCmnd) -> int:
        """Send an FCP_CMND; returns its OX_ID."""
        self.ox_id += 1
        self.send(cmnd_frame(self.port_id, self.san.target.port_id, self.ox_id, cmnd))
        return self.ox_id

    def command(self, cdb: bytes, *, lun: int = 0, data_in: int = 0) -> tuple[FcpRsp, bytes]:
        """A command without data-out, to its end."""
        ox_id = self.start(FcpCmnd(bytes([0, lun, *bytes(6)]), cdb, data_in, read=data_in > 0))
        self.san.run()
        return self.result(ox_id)

    def result(self, ox_id: int) -> tuple[FcpRsp, bytes]:
        data = b""
        for frame in self.take():
            if frame.ox_id == ox_id and frame.r_ctl == RCtl.DATA_SOLICITED:
                assert frame.parameter == len(data)
                data += frame.payload
            elif frame.ox_id == ox_id and frame.r_ctl == RCtl.DATA_COMMAND_STATUS:
                return FcpRsp.unpack(frame.payload), data
        raise AssertionError(f"no FCP_RSP for {ox_id:04x}")
