"""A fabric and a target that obey the standards and do nothing more: what an N_Port is tested against.

Frames in, frames out, no time.  Faults are attributes: `deaf` swallows requests by their code, `refuse`
rejects FLOGI, a target's `held` keeps commands unanswered, `script` answers them out of the ordinary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vhostfc.fc import bls, ct, els, ns
from vhostfc.fc.els import Els
from vhostfc.fc.fcp import FcpCmnd, FcpRsp, FcpXferRdy, ResponseCode, TmFlag, rsp_frame, xfer_rdy_frame
from vhostfc.fc.frame import Address, FcType, Frame, RCtl, els_reply, els_request
from vhostfc.fc.login import Login
from vhostfc.fc.sequence import DataBuffer, ct_reply, target_data
from vhostfc.fc.wwn import Wwn

BLOCK = 512
BURST = 8192
FABRIC_NAME = Wwn(0x1000_0000_0000_00FA)
INVALID_OPCODE = bytes.fromhex("700005000000000a00000000200000000000")
INVALID_FIELD = bytes.fromhex("700005000000000a00000000240000000000")
INVALID_LUN = bytes.fromhex("700005000000000a00000000250000000000")


def lun(number: int) -> bytes:
    """A flat LUN in 8 bytes."""
    return number.to_bytes(2, "big") + bytes(6)


@dataclass(frozen=True)
class Done:
    """How a command ends."""

    status: int = 0
    data: bytes = b""
    sense: bytes = b""


@dataclass(eq=False)
class Task:
    frame: Frame
    cmnd: FcpCmnd
    rx_id: int
    buffer: DataBuffer
    asked: int = 0
    seq_id: int = 0


def page_83(name: bytes) -> bytes:
    """Device Identification (SPC-4 7.8.6): a vendor specific designator of the unit, then the target port's."""
    unit = bytes([0x01, 0x00, 0, len(name)]) + name
    port = bytes([0x61, 0x93, 0, 8]) + bytes(8)
    return b"\0\x83" + (len(unit) + len(port)).to_bytes(2, "big") + unit + port


@dataclass(eq=False)
class TinyTarget:
    wwpn: Wwn
    port_id: int
    units: dict[bytes, bytearray]
    listed: bool = True
    is_target: bool = True
    mute: bool = False
    hold: bool = False
    script: Callable[[FcpCmnd], Done | FcpRsp | None] = lambda _cmnd: None
    logins: set[int] = field(default_factory=set)
    tasks: dict[tuple[int, int], Task] = field(default_factory=dict)
    seen: list[FcpCmnd] = field(default_factory=list)
    names: dict[bytes, bytes] = field(default_factory=dict)
    rx_id: int = 0x1000

    @property
    def wwnn(self) -> Wwn:
        return Wwn(self.wwpn + 1)

    def receive(self, frame: Frame) -> Iterable[Frame]:
        if self.mute:
            return
        if frame.r_ctl == RCtl.ELS_REQUEST:
            yield from self._els(frame)
        elif frame.r_ctl == RCtl.BLS_ABTS:
            task = self.tasks.pop((frame.s_id, frame.ox_id), None)
            unknown = bls.BaRjt(bls.Reason.LOGICAL_ERROR, bls.Explanation.INVALID_OX_ID_RX_ID)
            yield bls.answer(frame, bls.BaAcc(frame.ox_id, task.rx_id) if task else unknown)
        elif frame.r_ctl == RCtl.DATA_UNSOLICITED_COMMAND:
            if frame.s_id not in self.logins:
                yield self.logo(frame.s_id)
                return
            self.rx_id += 1
            cmnd = FcpCmnd.unpack(frame.payload)
            self.seen.append(cmnd)
            task = Task(frame, cmnd, self.rx_id, DataBuffer(cmnd.data_length))
            self.tasks[frame.s_id, frame.ox_id] = task
            if cmnd.tm_flags:
                yield from self._manage(task)
            elif not self.hold:
                yield from self.go_on(task)
        elif frame.r_ctl == RCtl.DATA_SOLICITED:
            task = self.tasks[frame.s_id, frame.ox_id]
            task.buffer.add(frame.parameter, frame.payload)
            if frame.ends_sequence:
                yield from self.go_on(task)

    def logo(self, to: int) -> Frame:
        self.logins.discard(to)
        return els_request(self.port_id, to, 0x7777, els.Logo(self.port_id, self.wwpn).pack())

    def release(self) -> list[Frame]:
        """Answer what was held."""
        self.hold = False
        return [frame for task in list(self.tasks.values()) for frame in self.go_on(task)]

    def go_on(self, task: Task) -> Iterable[Frame]:
        cmnd = task.cmnd
        if cmnd.write and task.buffer.received < cmnd.data_length:
            length = min(BURST, cmnd.data_length - task.asked)
            task.seq_id += 1
            yield xfer_rdy_frame(task.frame, task.rx_id, task.seq_id, FcpXferRdy(task.asked, length))
            task.asked += length
            return
        del self.tasks[task.frame.s_id, task.frame.ox_id]
        done = self.script(cmnd) or self.run(cmnd, task.buffer.take())
        if isinstance(done, FcpRsp):
            yield rsp_frame(task.frame, task.rx_id, 9, done)
            return
        data = done.data[: cmnd.data_length] if cmnd.read else b""
        yield from target_data(task.frame, data, rx_id=task.rx_id, seq_id=task.seq_id + 1, limit=1024)
        moved = len(done.data) if cmnd.read else task.buffer.received
        rsp = FcpRsp(done.status, cmnd.data_length - moved, done.sense)
        yield rsp_frame(task.frame, task.rx_id, task.seq_id + 2, rsp)

    def run(self, cmnd: FcpCmnd, data: bytes) -> Done:
        cdb = cmnd.cdb
        if cdb[0] == 0xA0:
            luns = b"".join(sorted(self.units))
            return Done(data=(len(luns).to_bytes(4, "big") + bytes(4) + luns)[: int.from_bytes(cdb[6:10], "big")])
        if cmnd.lun not in self.units:
            return Done(2, sense=INVALID_LUN)
        unit = self.units[cmnd.lun]
        start = int.from_bytes(cdb[2:6], "big") * BLOCK
        end = start + int.from_bytes(cdb[7:9], "big") * BLOCK
        match cdb[0]:
            case 0x00:
                return Done()
            case 0x12 if cdb[1:3] == b"\x01\x83":
                return Done(data=page_83(self.names.get(cmnd.lun, cmnd.lun)))
            case 0x12:
                return Done(data=b"\0\0\x06\x12\x1f\0\0\x02VHOSTFC TINY            0001"[: cdb[4]])
            case 0x25:
                return Done(data=(len(unit) // BLOCK - 1).to_bytes(4, "big") + BLOCK.to_bytes(4, "big"))
            case 0x28:
                return Done(data=bytes(unit[start:end]))
            case 0x2A:
                unit[start:end] = data
                return Done()
            case _:
                return Done(2, sense=INVALID_OPCODE)

    def _manage(self, task: Task) -> Iterable[Frame]:
        flag, s_id = task.cmnd.tm_flags, task.frame.s_id
        del self.tasks[s_id, task.frame.ox_id]
        if flag in (TmFlag.ABORT_TASK_SET, TmFlag.CLEAR_TASK_SET, TmFlag.LOGICAL_UNIT_RESET):
            for key, other in list(self.tasks.items()):
                if other.cmnd.lun == task.cmnd.lun:
                    del self.tasks[key]
        code = ResponseCode.COMPLETE if task.cmnd.lun in self.units else ResponseCode.INCORRECT_LUN
        yield rsp_frame(task.frame, task.rx_id, 1, FcpRsp(code=code))

    def _els(self, frame: Frame) -> Iterable[Frame]:
        request = els.parse_request(frame.payload)
        command = frame.payload[0]
        login_first = els.LsRjt(els.Reason.UNABLE_TO_PERFORM, els.Explanation.LOGIN_REQUIRED)
        if command == Els.PLOGI:
            self.logins.add(frame.s_id)
            for key in [key for key in self.tasks if key[0] == frame.s_id]:
                del self.tasks[key]
            yield els_reply(frame, Login.plogi(self.wwpn, self.wwnn, accept=True).pack())
        elif command == Els.LOGO:
            self.logins.discard(frame.s_id)
            yield els_reply(frame, els.LS_ACC)
        elif frame.s_id not in self.logins:
            yield els_reply(frame, login_first.pack())
        elif isinstance(request, els.Prli):
            services = els.FcpService.TARGET if self.is_target else els.FcpService.INITIATOR
            page = els.PrliPage(FcType.FCP, els.PrliPage.ESTABLISH | els.PrliPage.EXECUTED, services)
            yield els_reply(frame, els.Prli((page,), Els.LS_ACC).pack())
        elif isinstance(request, els.Adisc):
            yield els_reply(frame, els.Adisc(self.wwpn, self.wwnn, self.port_id, Els.LS_ACC).pack())
        elif isinstance(request, els.Rrq):
            yield els_reply(frame, els.LS_ACC)
        else:
            yield els_reply(frame, els.LsRjt(els.Reason.NOT_SUPPORTED, els.Explanation.NOT_SUPPORTED).pack())


@dataclass(eq=False)
class TinyFabric:
    """One F_Port per N_Port_ID it gave away; frames for N_Ports come out of receive()."""

    targets: list[TinyTarget]
    refuse: els.LsRjt | None = None
    deaf: set[int] = field(default_factory=set)
    first_id: int = 0x010101
    ports: dict[int, Wwn] = field(default_factory=dict)
    given: dict[Wwn, int] = field(default_factory=dict)
    registered: set[int] = field(default_factory=set)
    asked: list[ns.Request | els.Request] = field(default_factory=list)
    log: list[Frame] = field(default_factory=list)
    r_a_tov: int = 10000

    def receive(self, data: bytes) -> list[Frame]:
        frame = Frame.unpack(data)
        out = list(self._receive(frame))
        self.log += [frame, *out]
        return out

    def _receive(self, frame: Frame) -> Iterable[Frame]:
        if frame.r_ctl == RCtl.DATA_UNSOLICITED_CONTROL:
            yield from self._name_server(frame)
        elif frame.d_id >= 0xFFFFF0:
            if frame.r_ctl == RCtl.ELS_REQUEST:
                yield from self._well_known(frame)
        else:
            for target in self.targets:
                if target.port_id == frame.d_id:
                    yield from target.receive(frame)

    def _well_known(self, frame: Frame) -> Iterable[Frame]:
        request = els.parse_request(frame.payload)
        command = frame.payload[0]
        self.asked.append(request)
        if command in self.deaf:
            return
        if isinstance(request, Login) and frame.d_id == Address.F_PORT:
            if self.refuse is not None:
                yield els_reply(frame, self.refuse.pack())
                return
            port_id = self.given.setdefault(request.wwpn, self.first_id + len(self.given))
            self.ports[port_id] = request.wwpn
            for target in self.targets:
                target.logins.discard(port_id)
            self.registered.discard(port_id)
            accept = Login.fabric_accept(Wwn(FABRIC_NAME + 1), FABRIC_NAME, r_a_tov=self.r_a_tov, e_d_tov=2000)
            yield els_reply(frame, accept.pack(), d_id=port_id)
        elif isinstance(request, Login):
            yield els_reply(frame, Login.plogi(FABRIC_NAME, FABRIC_NAME, accept=True).pack())
        else:
            if isinstance(request, els.Scr):
                self.registered.add(frame.s_id)
            if isinstance(request, els.Logo) and frame.d_id == Address.F_PORT:
                self.ports.pop(frame.s_id, None)
            yield els_reply(frame, els.LS_ACC)

    def _name_server(self, frame: Frame) -> Iterable[Frame]:
        request = ns.parse_request(frame.payload)
        self.asked.append(request)
        code = ct.CtIu.unpack(frame.payload).code
        if code in self.deaf:
            return
        iu = ct.accept()
        if code == ct.Ct.GPN_FT:
            ports = [(target.port_id, target.wwpn) for target in self.targets if target.listed]
            ports.append((frame.s_id, self.ports[frame.s_id]))  # the caller too, as real ones do
            iu = ct.accept(ns.pack_port_names(ports))
        yield from ct_reply(frame, iu.pack(), limit=512)

    def rscn(self, to: int, *about: int) -> Frame:
        pages = tuple(els.RscnPage(port_id) for port_id in about)
        frame = els_request(Address.FABRIC_CONTROLLER, to, 0x5555, els.Rscn(pages).pack())
        self.log.append(frame)
        return frame
