"""A target port of an array: FC's side of it, from PLOGI to FCP_RSP.  Pure.

It knows who is logged in, keeps the exchanges, gathers the data of writes in bursts, and hands what
is complete to a runner through two queues: `rations` for commands, `urgent` for what must not wait
behind them (task management, aborts, lost logins).  The runner gives results back with finish().

Exchanges are known by (S_ID, OX_ID): several N_Ports may share one space of identifiers.  An OX_ID is used
again, so what belongs to an exchange under way has its RX_ID too: late data of an earlier one do not.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from vhostfc.fabric.rations import Rations
from vhostfc.fabric.recovery import Ended
from vhostfc.fabric.sessions import Abort, Exchange, Lost, Manage, Opened, Session, State, Untold, Urgent
from vhostfc.fc import bls, els
from vhostfc.fc.els import Els, ElsError, Explanation, FcpService, LsRjt, Prli, PrliPage, Reason
from vhostfc.fc.fcp import FcpCmnd, FcpRsp, FcpXferRdy, ResponseCode, rsp_frame, xfer_rdy_frame
from vhostfc.fc.frame import UNASSIGNED_XID, FCtl, FcType, Frame, FrameError, RCtl, els_reply, els_request
from vhostfc.fc.login import MIN_PAYLOAD, Login
from vhostfc.fc.sequence import DataBuffer, data_payload, target_data
from vhostfc.fc.wwn import Wwn
from vhostfc.scsi.sense import Asc, Sense, SenseKey
from vhostfc.scsi.task import Nexus, ScsiResult, Status

#: Bytes that one FCP_XFER_RDY asks for; lossy attachments bear no more (an FCoE link drops what overflows).
BURST = 64 << 10
#: Seconds after which data that were asked for and do not come are given up, if others need the room: R_A_TOV.
#: An initiator that recovers with REC begins its command anew and says nothing of the old exchange.
DATA_TIMEOUT = 10.0
#: The most data-out of one command: the transfer limit of page B0h with room to spare.
MAX_DATA_OUT = 40 << 20

_TOO_LONG = ScsiResult(
    Status.CHECK_CONDITION,
    Sense(SenseKey.ILLEGAL_REQUEST, Asc.INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT).encode(),
)


class TargetPort:
    """See the head of the file.

    relative: relative target port identifier.  `urgent` may be shared by several target ports, like
    the rations: one runner serves them all.
    """

    def __init__(
        self,
        name: str,
        wwpn: Wwn,
        wwnn: Wwn,
        relative: int,
        *,
        rations: Rations[Exchange],
        urgent: deque[Urgent],
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.name = name
        self.wwpn = wwpn
        self.wwnn = wwnn
        self.relative = relative
        self.port_id = 0
        self.rations = rations
        self.urgent = urgent
        self.sessions: dict[int, Session] = {}
        self._by_name: dict[Wwn, Session] = {}
        self._clock = clock
        self._rx_ids = itertools.cycle(range(1, 0xFFFF))

    def nexus(self, wwpn: Wwn) -> Nexus:
        """The I_T nexus of an initiator port here: its TransportID for FCP (SPC-4 7.6.4.2)."""
        return Nexus(bytes(8) + wwpn.pack() + bytes(8), self.relative)

    def session(self, wwpn: Wwn) -> Session | None:
        """The login of this initiator port with an image pair, if there is one."""
        session = self._by_name.get(wwpn)
        return session if session is not None and session.image else None

    # ------------------------------------------------------------ the switch's side

    def receive(self, frame: Frame, source: Wwn) -> Iterable[Frame]:
        """A frame for us; returns ours.  Commands that are complete are in the queues then."""
        if frame.r_ctl == RCtl.ELS_REQUEST and frame.type == FcType.ELS:
            return self._els(frame, source)
        session = self.sessions.get(frame.s_id)
        if frame.r_ctl == RCtl.BLS_ABTS:
            return self._abts(frame, session)
        if frame.type != FcType.FCP or frame.from_responder:
            return ()
        if frame.r_ctl == RCtl.DATA_UNSOLICITED_COMMAND:
            if session is None or not session.image:
                return (self._logo(frame.s_id),)
            return self._command(frame, session)
        if frame.r_ctl == RCtl.DATA_SOLICITED and session is not None:
            exchange = session.exchanges.get(frame.ox_id)
            if exchange is not None and exchange.rx_id == frame.rx_id and exchange.state is State.DATA:
                return self._data(frame, exchange)
        if frame.r_ctl == RCtl.DATA_SOLICITED_CONTROL and session is not None:
            session.ends.confirm(frame.ox_id)
        return ()

    def forget(self, port_id: int) -> None:
        """An implicit logout."""
        session = self.sessions.pop(port_id, None)
        if session is None:
            return
        if self._by_name.get(session.wwpn) is session:
            del self._by_name[session.wwpn]
        for exchange in list(session.exchanges.values()):
            if self.drop(exchange):
                self.urgent.append(Abort(exchange))
        if session.image:
            self.urgent.append(Lost(session))

    # ------------------------------------------------------------ ELS

    def _els(self, frame: Frame, source: Wwn) -> Iterable[Frame]:
        try:
            request = els.parse_request(frame.payload)
        except ElsError as error:
            return (els_reply(frame, error.rejection.pack()),)
        session = self.sessions.get(frame.s_id)
        match request:
            case Login(Els.PLOGI):
                return (self._plogi(frame, request, source),)
            case els.Echo(data):
                return (els_reply(frame, els.Echo(data, Els.LS_ACC).pack()),)
            case els.Rtv():
                return (els_reply(frame, els.RtvAcc(10_000, 2_000).pack()),)
            case els.Rnid():
                node = els.RnidAcc.answer(request, self.wwpn, self.wwnn, els.AssociatedType.STORAGE_SUBSYSTEM)
                return (els_reply(frame, node.pack()),)
            case els.Logo():
                self.forget(frame.s_id)
                return (els_reply(frame, els.LS_ACC),)
            case _ if session is None:
                return (_reject(frame, Reason.UNABLE_TO_PERFORM, Explanation.LOGIN_REQUIRED),)
            case Prli(pages, Els.PRLI):
                return (self._prli(frame, session, pages),)
            case Prli(pages, Els.PRLO):
                self._prlo(session)
                gone = tuple(PrliPage(page.fc4_type, PrliPage.EXECUTED) for page in pages)
                return (els_reply(frame, Prli(gone, Els.LS_ACC).pack()),)
            case els.Adisc():
                return (els_reply(frame, els.Adisc(self.wwpn, self.wwnn, self.port_id, Els.LS_ACC).pack()),)
            case els.Rrq():
                return (els_reply(frame, els.LS_ACC),)
            case els.Rec():
                return (self._rec(frame, request, session),)
        return (_reject(frame, Reason.NOT_SUPPORTED, Explanation.NOT_SUPPORTED),)

    def _plogi(self, frame: Frame, request: Login, source: Wwn) -> Frame:
        if request.wwpn != source:
            return _reject(frame, Reason.LOGICAL_ERROR, Explanation.INVALID_PORT_NAME)
        if request.payload_size < MIN_PAYLOAD:
            return _reject(frame, Reason.LOGICAL_ERROR, Explanation.RECEIVE_SIZE)
        self.forget(frame.s_id)  # a login anew ends what the old one began (FC-LS-3 6.3.2.3)
        session = Session(frame.s_id, source, self.nexus(source), request.payload_size, since=self._clock())
        self.sessions[frame.s_id] = self._by_name[source] = session
        return els_reply(frame, Login.plogi(self.wwpn, self.wwnn, accept=True).pack())

    def _prli(self, frame: Frame, session: Session, pages: tuple[PrliPage, ...]) -> Frame:
        answers = []
        for page in pages:
            if page.fc4_type != FcType.FCP or not page.parameters & FcpService.INITIATOR:
                answers.append(PrliPage(page.fc4_type, 0x05))  # 5: no such service parameters (FC-LS-3 table 94)
                continue
            establish = page.flags & PrliPage.ESTABLISH
            if establish:
                self._prlo(session)
                session.image = True
                self.urgent.append(Opened(session))
            confirms = page.parameters & FcpService.CONFIRMED_COMPLETION
            if establish:
                session.confirms = bool(confirms)
            parameters = FcpService.TARGET | FcpService.READ_XFER_RDY_DISABLED | confirms
            answers.append(PrliPage(FcType.FCP, establish | PrliPage.EXECUTED, parameters))
        return els_reply(frame, Prli(tuple(answers), Els.LS_ACC).pack())

    def _rec(self, frame: Frame, request: els.Rec, session: Session) -> Frame:
        """How far an exchange has come.  It is the initiator's turn as long as we wait for its data."""
        if request.s_id != frame.s_id:
            return _reject(frame, Reason.LOGICAL_ERROR, Explanation.INVALID_ORIGINATOR_S_ID)
        exchange = session.exchanges.get(request.ox_id)
        if exchange is not None and request.rx_id in {exchange.rx_id, UNASSIGNED_XID}:
            moved = exchange.data.received if exchange.data else exchange.sent
            status = els.RecAcc.OWNER_RESPONDER
            if exchange.state is not State.DATA:
                status |= els.RecAcc.INITIATIVE
            accept = els.RecAcc(request.ox_id, exchange.rx_id, frame.s_id, self.port_id, moved, status)
            return els_reply(frame, accept.pack())
        ended = session.ends.concise(request, self.port_id)
        if ended is None:
            return _reject(frame, Reason.LOGICAL_ERROR, Explanation.INVALID_OX_ID_RX_ID)
        return els_reply(frame, ended.pack())

    def _prlo(self, session: Session) -> None:
        """The image pair ends, the login stays."""
        for exchange in list(session.exchanges.values()):
            if self.drop(exchange):
                self.urgent.append(Abort(exchange))
        if session.image:
            session.image = False
            self.urgent.append(Lost(session))

    def _logo(self, port_id: int) -> Frame:
        """Whoever sends commands without a login is told so (FCP-4 4.2)."""
        return els_request(self.port_id, port_id, next(self._rx_ids), els.Logo(self.port_id, self.wwpn).pack())

    # ------------------------------------------------------------ exchanges

    def _command(self, frame: Frame, session: Session) -> Iterable[Frame]:
        try:
            cmnd = FcpCmnd.unpack(frame.payload)
        except FrameError:
            # The flags are in byte 11 if anywhere; too short for them, there is nothing to answer to.
            rsp = FcpRsp(code=ResponseCode.INVALID_CMND_FIELD)
            return (rsp_frame(frame, next(self._rx_ids), 0, rsp),) if len(frame.payload) >= 12 else ()
        stale = session.exchanges.get(frame.ox_id)
        if stale is not None and self.drop(stale):  # its originator has given it up, without a word
            self.urgent.append(Abort(stale))
        session.ends.forget(frame.ox_id)
        exchange = Exchange(self, session, frame, cmnd, next(self._rx_ids), heard=self._clock())
        session.exchanges[frame.ox_id] = exchange
        if cmnd.tm_flags:
            if cmnd.tm_flags & cmnd.tm_flags - 1:
                return self.respond(exchange, ResponseCode.INVALID_CMND_FIELD)
            if session.functions >= self.rations.commands:
                return self.respond(exchange, ResponseCode.FAILED)
            session.functions += 1
            exchange.managing = True
            self.urgent.append(Manage(exchange))
            return ()
        if cmnd.write and cmnd.data_length > MAX_DATA_OUT:
            return self.finish(exchange, _TOO_LONG)
        exchange.size = (cmnd.data_length if cmnd.write else 0) + min(exchange.data_in_length, MAX_DATA_OUT)
        if not self._admit(session, exchange.size):
            return self.finish(exchange, ScsiResult(_refusal(exchange)))
        exchange.admitted = True
        if cmnd.write and cmnd.data_length:
            exchange.state = State.DATA
            exchange.data = DataBuffer(cmnd.data_length)
            return (self._ask(exchange),)
        self._ready(exchange)
        return ()

    def _admit(self, session: Session, size: int) -> bool:
        """Room for a command; where there is none, what waits for data that never come gives way."""
        if self.rations.admit(session.wwpn, size):
            return True
        since = self._clock() - DATA_TIMEOUT
        hanging = [e for e in session.exchanges.values() if e.state is State.DATA and e.heard < since]
        for exchange in hanging:
            self.drop(exchange)
        return bool(hanging) and self.rations.admit(session.wwpn, size)

    def _ready(self, exchange: Exchange) -> None:
        exchange.state = State.WAITING
        self.rations.put(exchange.session.wwpn, exchange)

    def _ask(self, exchange: Exchange) -> Frame:
        """FCP_XFER_RDY for the next burst."""
        length = min(BURST, exchange.cmnd.data_length - exchange.asked)
        xfer_rdy = FcpXferRdy(exchange.asked, length)
        exchange.asked += length
        return xfer_rdy_frame(exchange.frame, exchange.rx_id, exchange.next_seq(), xfer_rdy)

    def _data(self, frame: Frame, exchange: Exchange) -> Iterable[Frame]:
        assert exchange.data is not None
        exchange.heard = self._clock()
        offset = frame.parameter if frame.f_ctl & FCtl.RELATIVE_OFFSET else exchange.data.received
        try:
            if offset + len(frame.payload) > exchange.asked:
                raise FrameError(f"data beyond the {exchange.asked} bytes that were asked for")
            exchange.data.add(offset, frame.payload)
        except FrameError:
            return self.respond(exchange, ResponseCode.DATA_RO_MISMATCH)
        if not frame.ends_sequence:
            return ()
        if exchange.data.received < exchange.asked:
            return self.respond(exchange, ResponseCode.DATA_LENGTH_MISMATCH)
        if exchange.asked < exchange.cmnd.data_length:
            return (self._ask(exchange),)
        self._ready(exchange)
        return ()

    def _abts(self, frame: Frame, session: Session | None) -> Iterable[Frame]:
        exchange = session.exchanges.get(frame.ox_id) if session else None
        ended = session.ends.abort(frame.ox_id) if session and not exchange and not frame.from_responder else None
        if session is not None and ended is not None:
            self.urgent.append(Untold(session, ended.lun, ended.sense))
            return (bls.answer(frame, bls.BaAcc(frame.ox_id, ended.rx_id), rx_id=ended.rx_id),)
        if exchange is None or frame.rx_id not in {exchange.rx_id, UNASSIGNED_XID} or frame.from_responder:
            rejection = bls.BaRjt(bls.Reason.LOGICAL_ERROR, bls.Explanation.INVALID_OX_ID_RX_ID)
            return (bls.answer(frame, rejection),)
        reply = bls.answer(frame, bls.BaAcc(frame.ox_id, exchange.rx_id), rx_id=exchange.rx_id)
        if not self.drop(exchange):
            return (reply,)
        self.urgent.append(Abort(exchange, reply))
        return ()

    # ------------------------------------------------------------ the runner's side

    def begin(self, exchange: Exchange) -> None:
        """The runner took it from the rations and runs it."""
        exchange.state = State.RUNNING

    def drop(self, exchange: Exchange) -> bool:
        """End an exchange without an answer; True when it was running, and so is not quite gone yet."""
        running = exchange.state is State.RUNNING
        if exchange.state is State.WAITING:
            self.rations.drop(exchange.session.wwpn, exchange)
        self._end(exchange)
        return running

    def _end(self, exchange: Exchange) -> None:
        if exchange.state is State.ENDED:
            return
        exchange.state = State.ENDED
        if exchange.admitted:
            self.rations.release(exchange.session.wwpn, exchange.size)
        if exchange.managing:
            exchange.session.functions -= 1
        if exchange.session.exchanges.get(exchange.frame.ox_id) is exchange:
            del exchange.session.exchanges[exchange.frame.ox_id]

    def finish(self, exchange: Exchange, result: ScsiResult, moved: int | None = None) -> Iterator[Frame]:
        """The data-in and the FCP_RSP of a command, piece by piece; nothing when it has ended meanwhile.

        moved: bytes of data-out that the command had a use for; None: all that came.  The exchange
        ends with the last frame, so that its data count against the ration until they are out.
        """
        if exchange.state is State.ENDED:
            return
        cmnd, frame = exchange.cmnd, exchange.frame
        data = result.data_in[: exchange.data_in_length]
        used = len(result.data_in)
        if cmnd.write:
            came = exchange.data.received if exchange.data else 0
            used = came if moved is None else moved
        if exchange.state is State.WAITING:
            self.rations.drop(exchange.session.wwpn, exchange)
        exchange.state = State.RUNNING
        if data:
            limit = data_payload(exchange.session.payload_size)
            for one in target_data(frame, data, rx_id=exchange.rx_id, seq_id=exchange.next_seq(), limit=limit):
                exchange.sent += len(one.payload)
                yield one
                if exchange.state is not State.RUNNING:
                    return
        confirm = exchange.session.confirms and bool(result.sense)
        rsp = FcpRsp(result.status, cmnd.data_length - used, result.sense, confirm=confirm)
        self._end(exchange)
        moved_ = used if cmnd.write else exchange.sent
        exchange.session.ends.add(
            Ended(frame.ox_id, exchange.rx_id, moved_, cmnd.lun, result.sense, confirmed=not confirm)
        )
        yield rsp_frame(frame, exchange.rx_id, exchange.next_seq(), rsp)

    def respond(self, exchange: Exchange, code: ResponseCode) -> tuple[Frame, ...]:
        """FCP_RSP with response information: of a task management function, or of an exchange that went wrong."""
        if exchange.state is State.ENDED:
            return ()
        self._end(exchange)
        exchange.session.ends.add(Ended(exchange.frame.ox_id, exchange.rx_id, 0, exchange.cmnd.lun))
        return (rsp_frame(exchange.frame, exchange.rx_id, exchange.next_seq(), FcpRsp(code=code)),)

    def exchanges(self) -> Iterator[Exchange]:
        """All that are open."""
        for session in list(self.sessions.values()):
            yield from list(session.exchanges.values())


def _refusal(exchange: Exchange) -> Status:
    """There is no room for a command: BUSY when its nexus has no task at the unit that could end (SAM-5 5.3.1)."""
    others = (one.cmnd for one in exchange.session.exchanges.values() if one is not exchange)
    some = any(one.lun == exchange.cmnd.lun and not one.tm_flags for one in others)
    return Status.TASK_SET_FULL if some else Status.BUSY


def _reject(frame: Frame, reason: Reason, explanation: Explanation) -> Frame:
    return els_reply(frame, LsRjt(reason, explanation).pack())
