"""The initiator's side of FCP exchanges: commands and task management functions (FCP-4 clause 4 and 12).

An exchange is OPEN until its FCP_RSP, or ABORTING from our ABTS until the answer to that; either way it
ends with one event.  What ends without an FCP_RSP is told apart by its End: whoever started the command
knows whether it may run a second time.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vhostfc.fc import els
from vhostfc.fc.bls import abts_frame
from vhostfc.fc.exchange import Event, Exchange, Timer, Wire
from vhostfc.fc.fcp import MAX_CDB, FcpCmnd, FcpRsp, FcpXferRdy, ResponseCode, TmFlag, cmnd_frame, conf_frame
from vhostfc.fc.frame import FCtl, Frame, FrameError, RCtl
from vhostfc.fc.sequence import DataBuffer, data_payload, initiator_data
from vhostfc.fc.wwn import Wwn


class End(enum.Enum):
    """How an exchange ended."""

    COMPLETE = "complete"  # with an FCP_RSP that holds a status
    FAILED = "failed"  # the target answered, but not with what FCP allows: frames were lost
    LOST = "lost"  # the link or the login went away
    ABORTED = "aborted"  # by abort(), or by a task management function
    TIMED_OUT = "timed out"


class State(enum.Enum):
    OPEN = "open"
    ABORTING = "aborting"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class CommandResult:
    """residual: > 0 bytes that were not moved, < 0 bytes that did not fit (FCP_RESID)."""

    end: End
    status: int = 0
    sense: bytes = b""
    data_in: bytes = b""
    residual: int = 0
    status_qualifier: int = 0


@dataclass(frozen=True, slots=True)
class CommandDone(Event):
    command: Command
    result: CommandResult


@dataclass(frozen=True, slots=True)
class ManagementDone(Event):
    """code: the RSP_CODE (FCP-4 table 30), or None when no answer came."""

    management: Management
    code: int | None


class Remote(Protocol):
    """What a command must know of the port that it goes to."""

    @property
    def wwpn(self) -> Wwn: ...
    @property
    def port_id(self) -> int: ...
    @property
    def payload_size(self) -> int: ...


class FcpExchange(Exchange):
    """One FCP exchange; identity is its only key."""

    __slots__ = ("_initiator", "end", "lun", "number", "payload_size", "sequences", "state", "timer", "wwpn")

    def __init__(self, initiator: Initiator, remote: Remote, lun: bytes, number: int) -> None:
        super().__init__(remote.port_id)
        self._initiator = initiator
        self.wwpn = remote.wwpn
        self.payload_size = remote.payload_size
        self.lun = lun
        self.number = number
        self.state = State.OPEN
        self.end = End.ABORTED
        self.timer: Timer | None = None
        self.sequences = 0

    def next_seq(self) -> int:
        """SEQ_ID for another sequence of ours in this exchange."""
        self.sequences += 1
        return self.sequences & 0xFF

    def receive(self, frame: Frame, now: float) -> None:
        self._initiator.receive(self, frame, now)

    def expire(self, now: float) -> None:
        self._initiator.expire(self, now)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.wwpn}/{self.lun.hex()} OX_ID {self.ox_id:04x}, {self.state.value}>"


class Command(FcpExchange):
    """A command on its way; data_in_length: bytes that the initiator has room for."""

    __slots__ = ("buffer", "cdb", "data_in_length", "data_out", "done")

    def __init__(
        self,
        initiator: Initiator,
        remote: Remote,
        lun: bytes,
        number: int,
        cdb: bytes,
        data_out: bytes,
        data_in_length: int,
        done: Callable[[CommandResult, float], None] | None,
    ) -> None:
        super().__init__(initiator, remote, lun, number)
        self.cdb = cdb
        self.data_out = data_out
        self.data_in_length = data_in_length
        self.buffer = DataBuffer(data_in_length)
        self.done = done


class Management(FcpExchange):
    """A task management function on its way."""

    __slots__ = ("flag",)

    def __init__(self, initiator: Initiator, remote: Remote, lun: bytes, number: int, flag: TmFlag) -> None:
        super().__init__(initiator, remote, lun, number)
        self.flag = flag


#: Functions that end commands of this initiator, and whether they do so in all units of the target.
_ENDS_COMMANDS = {
    TmFlag.ABORT_TASK_SET: False,
    TmFlag.CLEAR_TASK_SET: False,
    TmFlag.LOGICAL_UNIT_RESET: False,
    TmFlag.TARGET_RESET: True,
}


class Initiator:
    """All FCP exchanges of one N_Port."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._open: dict[FcpExchange, None] = {}
        self._numbers = 0
        #: Remote ports that did not even answer an ABTS; their owner logs them out and takes them away.
        self.unresponsive: list[Wwn] = []

    @property
    def commands(self) -> list[Command]:
        """The commands in flight, oldest first."""
        return [exchange for exchange in self._open if isinstance(exchange, Command)]

    def start(
        self,
        remote: Remote,
        lun: bytes,
        cdb: bytes,
        now: float,
        *,
        data_out: bytes = b"",
        data_in_length: int = 0,
        attribute: int = 0,
        timeout: float | None = None,
        done: Callable[[CommandResult, float], None] | None = None,
    ) -> Command:
        """Send a command to a port that we are logged in to.  Ends with a CommandDone, or a call of `done`.

        Raises FrameError for a CDB of more than 260 bytes, or when 65535 exchanges are open.
        """
        if len(cdb) > MAX_CDB:
            raise FrameError(f"a CDB of {len(cdb)} bytes, {MAX_CDB} are the most")
        # A command both ways states the length of either direction (FCP-4 9.2.2.14).
        cmnd = FcpCmnd(
            lun=lun,
            cdb=cdb,
            data_length=len(data_out) or data_in_length,
            write=bool(data_out),
            read=data_in_length > 0,
            attribute=attribute,
            bidirectional_read_length=data_in_length if data_out else 0,
        )
        command = Command(self, remote, lun, self._number(), cdb, data_out, data_in_length, done)
        self._send(command, cmnd, timeout, now)
        return command

    def manage(self, remote: Remote, lun: bytes, flag: TmFlag, timeout: float, now: float) -> Management:
        """Send a task management function.  Ends with a ManagementDone, after the commands that it ends."""
        management = Management(self, remote, lun, self._number(), flag)
        self._send(management, FcpCmnd(lun=lun, cdb=bytes(16), tm_flags=flag), timeout, now)
        return management

    def abort(self, exchange: FcpExchange, now: float, end: End = End.ABORTED) -> None:
        """Abort by ABTS; it ends with `end` when the target has answered that, or has not in R_A_TOV.

        An FCP_RSP that was on its way wins: the command has completed then.
        """
        if exchange.state is not State.OPEN:
            return
        exchange.state = State.ABORTING
        exchange.end = end
        self._abts(exchange)
        self._time(exchange, now + self._wire.r_a_tov)

    def lose(self, wwpn: Wwn | None, now: float) -> None:
        """The login with this port, or with every port, is no more: its exchanges ended with it."""
        for exchange in [e for e in self._open if wwpn is None or e.wwpn == wwpn]:
            self._wire.rest(exchange.ox_id, now)
            self._end(exchange, End.LOST if exchange.state is State.OPEN else exchange.end, now)

    def concise(self, request: els.Rec, s_id: int) -> els.RecAcc | None:
        """How far an exchange of ours has come, for the port that it is with; None when there is no such one.

        A target asks so when it has lost sight of it (FC-LS-3, REC); what has moved is data-in.
        """
        for exchange in self._open:
            if exchange.ox_id == request.ox_id and exchange.d_id == s_id:
                moved = exchange.buffer.received if isinstance(exchange, Command) else 0
                return els.RecAcc(exchange.ox_id, exchange.rx_id, request.s_id, s_id, moved & 0xFFFFFFFF, 0)
        return None

    # ---------------------------------------------------------------- what comes

    def receive(self, exchange: FcpExchange, frame: Frame, now: float) -> None:
        try:
            match frame.r_ctl:
                case RCtl.DATA_SOLICITED if isinstance(exchange, Command):
                    offset = frame.parameter if frame.f_ctl & FCtl.RELATIVE_OFFSET else exchange.buffer.received
                    exchange.buffer.add(offset, frame.payload)
                case RCtl.DATA_DESCRIPTOR if isinstance(exchange, Command):
                    self._send_burst(exchange, frame, FcpXferRdy.unpack(frame.payload))
                case RCtl.DATA_COMMAND_STATUS:
                    rsp = FcpRsp.unpack(frame.payload)
                    if rsp.confirm:
                        self._wire.send(conf_frame(frame, exchange.next_seq()))
                    self._respond(exchange, rsp, now)
                case RCtl.BLS_BA_ACC if exchange.state is State.ABORTING:
                    self._wire.rest(exchange.ox_id, now)
                    self._reinstate_later(exchange, now)
                    self._end(exchange, exchange.end, now)
                case RCtl.BLS_BA_RJT if exchange.state is State.ABORTING:
                    self._wire.rest(exchange.ox_id, now)
                    self._end(exchange, exchange.end, now)
                case RCtl.LINK_F_RJT | RCtl.LINK_P_RJT:
                    self._end(exchange, End.FAILED, now)
                case _:
                    pass
        except FrameError:
            self.abort(exchange, now, End.FAILED)

    def expire(self, exchange: FcpExchange, now: float) -> None:
        if exchange.state is State.OPEN:
            self.abort(exchange, now, End.TIMED_OUT)
        elif exchange.state is State.ABORTING:
            # The target never said that it has stopped: nobody may be told that the abort succeeded.
            self._wire.rest(exchange.ox_id, now)
            self._end(exchange, End.TIMED_OUT, now)
            self.unresponsive.append(exchange.wwpn)

    def _send_burst(self, command: Command, frame: Frame, wanted: FcpXferRdy) -> None:
        if command.state is not State.OPEN:
            return
        end = wanted.offset + wanted.length
        if end > len(command.data_out):
            raise FrameError(f"FCP_XFER_RDY up to {end} of {len(command.data_out)} bytes")
        seq_id = command.next_seq()
        burst = memoryview(command.data_out)[wanted.offset : end]
        limit = data_payload(command.payload_size)
        for data in initiator_data(frame, burst, wanted.offset, seq_id=seq_id, limit=limit):
            self._wire.send(data)

    def _respond(self, exchange: FcpExchange, rsp: FcpRsp, now: float) -> None:
        if isinstance(exchange, Management):
            code = ResponseCode.COMPLETE if rsp.code is None else rsp.code
            if code == ResponseCode.COMPLETE and exchange.flag in _ENDS_COMMANDS:
                self._end_commands(exchange, _ENDS_COMMANDS[exchange.flag], now)
            self._end(exchange, End.COMPLETE, now, code=code)
            return
        assert isinstance(exchange, Command)
        if rsp.code or not _all_here(exchange, rsp):
            self._end(exchange, End.FAILED, now)
            return
        self._end(exchange, End.COMPLETE, now, rsp)

    def _end_commands(self, management: Management, everywhere: bool, now: float) -> None:
        """The target has dropped these tasks and says nothing more about them; ABTS frees their exchanges there."""
        for command in self.commands:
            if (
                command.number < management.number
                and command.wwpn == management.wwpn
                and (everywhere or command.lun == management.lun)
            ):
                if command.state is State.OPEN:
                    self._abts(command)
                self._wire.rest(command.ox_id, now)
                self._end(command, End.ABORTED, now)

    # ---------------------------------------------------------------- bookkeeping

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _send(self, exchange: FcpExchange, cmnd: FcpCmnd, timeout: float | None, now: float) -> None:
        self._wire.open(exchange, now)
        self._open[exchange] = None
        if timeout is not None:
            self._time(exchange, now + timeout)
        self._wire.send(cmnd_frame(self._wire.port_id, exchange.d_id, exchange.ox_id, cmnd))

    def _time(self, exchange: FcpExchange, at: float) -> None:
        self._wire.timers.cancel(exchange.timer)
        exchange.timer = self._wire.timers.set(at, exchange.expire)

    def _abts(self, exchange: FcpExchange) -> None:
        self._wire.send(abts_frame(self._wire.port_id, exchange.d_id, exchange.ox_id, exchange.rx_id))

    def _reinstate_later(self, exchange: FcpExchange, now: float) -> None:
        """After R_A_TOV tell the target that it may forget the aborted exchange (RRQ, FC-LS-3 4.3.13)."""
        s_id, d_id = self._wire.port_id, exchange.d_id
        rrq = els.Rrq(s_id, exchange.ox_id, exchange.rx_id).pack()

        def send(then: float) -> None:
            if self._wire.port_id == s_id:
                self._wire.els(d_id, rrq, lambda _reply, _now: None, then)

        self._wire.timers.set(now + self._wire.r_a_tov, send)

    def _end(
        self, exchange: FcpExchange, end: End, now: float, rsp: FcpRsp | None = None, *, code: int | None = None
    ) -> None:
        exchange.state = State.ENDED
        self._wire.timers.cancel(exchange.timer)
        self._wire.close(exchange)
        del self._open[exchange]
        if isinstance(exchange, Management):
            self._wire.events.append(ManagementDone(exchange, code))
        elif isinstance(exchange, Command):
            result = CommandResult(end)
            if rsp is not None:
                data = exchange.buffer.take()
                result = CommandResult(end, rsp.status, rsp.sense, data, rsp.residual, rsp.status_qualifier)
            if exchange.done is not None:
                exchange.done(result, now)
            else:
                self._wire.events.append(CommandDone(exchange, result))


def _all_here(command: Command, rsp: FcpRsp) -> bool:
    """Has every byte of a read arrived that the target says it sent?  A lost frame must not look like data."""
    if rsp.status != 0 or not command.data_in_length or command.data_out:
        return True
    expected = command.data_in_length - max(rsp.residual, 0)
    return command.buffer.received == expected or (rsp.residual < 0 and command.buffer.received > expected)
