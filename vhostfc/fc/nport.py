"""An N_Port: logs in to a fabric, registers, finds its targets, and carries commands to them.

Sans-IO: frames and the time come in, frames and events are taken out.  The login is a table of steps;
a step that fails is tried again after E_D_TOV, three times, and then the login begins anew, at a slowing
pace and for ever: a fabric that was away comes back, and nobody else would log in for us.

    LINK_DOWN -> FLOGI -> DNS -> RNN_ID -> RSNN_NN -> RSPN_ID -> RFT_ID -> RFF_ID -> SCR -> READY -> LOGO
                   ^________________________ RESTART <___ any step that fails ________________|

In READY discovery.py keeps the list of remote ports and initiator.py the commands; what arrives as a
request (RSCN, LOGO, PLOGI, ...) is answered here.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import partial

from vhostfc.fc import bls, ct, els, ns
from vhostfc.fc.discovery import EVERYTHING, Discovery, TopologyChanged
from vhostfc.fc.exchange import Event, LinkService, Timer, Wire
from vhostfc.fc.fcp import TmFlag
from vhostfc.fc.frame import Address, FcType, Frame, FrameError, RCtl, els_reply
from vhostfc.fc.initiator import Command, End, Initiator, Management
from vhostfc.fc.login import Feature, Login
from vhostfc.fc.remote import FCP, SERVICES, RemotePort
from vhostfc.fc.wwn import Wwn

_TRIES = 3
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


class LocalState(enum.Enum):
    LINK_DOWN = "link down"
    FLOGI = "fabric login"
    DNS = "login with the name server"
    RNN_ID = "registering the node name"
    RSNN_NN = "registering the node's symbolic name"
    RSPN_ID = "registering the port's symbolic name"
    RFT_ID = "registering FC-4 types"
    RFF_ID = "registering FC-4 features"
    SCR = "registering for state changes"
    READY = "ready"
    RESTART = "waiting for another try"
    LOGO = "logging out"


_NEXT = {
    LocalState.FLOGI: LocalState.DNS,
    LocalState.DNS: LocalState.RNN_ID,
    LocalState.RNN_ID: LocalState.RSNN_NN,
    LocalState.RSNN_NN: LocalState.RSPN_ID,
    LocalState.RSPN_ID: LocalState.RFT_ID,
    LocalState.RFT_ID: LocalState.RFF_ID,
    LocalState.RFF_ID: LocalState.SCR,
    LocalState.SCR: LocalState.READY,
}
_CT_STEPS = frozenset({LocalState.RNN_ID, LocalState.RSNN_NN, LocalState.RSPN_ID, LocalState.RFT_ID, LocalState.RFF_ID})


class LoginRejected(Event):
    """The fabric rejects our FLOGI or FDISC.  It will be tried again unless the link is taken down."""

    __slots__ = ("rejection",)

    def __init__(self, rejection: els.LsRjt) -> None:
        self.rejection = rejection


class LoggedOut(Event):
    """log_out() is done: the fabric has answered, or had its time to."""

    __slots__ = ()


class NPort:
    """One N_Port.  Every method takes the time, in seconds of any steady clock."""

    def __init__(
        self, wwpn: Wwn, wwnn: Wwn, *, symbolic_name: str = "", hold: float = 30.0, first: bool = True
    ) -> None:
        """hold: seconds for which a port that left the name server may come back.

        first: the first identity on its link logs in with FLOGI, further ones with FDISC.
        """
        self.wwpn = wwpn
        self.wwnn = wwnn
        self.state = LocalState.LINK_DOWN
        self.fabric_name: Wwn | None = None
        #: Frames that were no frames, or nobody's.
        self.dropped = 0
        self._symbolic_name = symbolic_name.encode()
        self._first = first
        self._wire = Wire()
        self._initiator = Initiator(self._wire)
        self._discovery = Discovery(self._wire, self._initiator, (wwpn, wwnn), hold=hold, failed=self._restart)
        self._exchange: LinkService | None = None
        self._timer: Timer | None = None
        self._tries = 0
        self._pause = _FIRST_PAUSE

    def __repr__(self) -> str:
        return f"<NPort {self.wwpn} {self.port_id:06x}, {self.state.value}>"

    # ---------------------------------------------------------------- the owner's side

    @property
    def port_id(self) -> int:
        """Our N_Port_ID, 0 while we have none."""
        return self._wire.port_id

    @property
    def remotes(self) -> dict[Wwn, RemotePort]:
        """Remote ports that were ready once, by Port_Name."""
        return {wwpn: remote for wwpn, remote in self._discovery.remotes.items() if remote.known}

    @property
    def commands(self) -> list[Command]:
        return [command for command in self._initiator.commands if command.done is None]

    def link_up(self, now: float) -> None:
        """Frames can be sent from now on: log in."""
        if self.state is LocalState.LINK_DOWN:
            self._pause = _FIRST_PAUSE
            self._tries = 0
            self._enter(LocalState.FLOGI, now)

    def link_down(self, now: float) -> None:
        """Frames go nowhere any more.  Commands in flight end with End.LOST."""
        self._abandon(now)
        self._wire.clear()
        self._move(LocalState.LINK_DOWN)

    def log_out(self, now: float) -> None:
        """LOGO to every target and to the fabric; a LoggedOut follows, at the latest after E_D_TOV."""
        for remote in self._discovery.remotes.values():
            remote.say_goodbye(now)
        port_id = self.port_id
        self._abandon(now)
        self._move(LocalState.LOGO)
        if not port_id:
            self._logged_out(None, now)
            return
        self._wire.port_id = port_id
        logo = els.Logo(port_id, self.wwpn).pack()
        self._exchange = self._wire.els(Address.F_PORT, logo, self._logged_out, now, self._wire.e_d_tov)

    def receive(self, data: bytes, now: float) -> None:
        """A frame from the link.  One that is broken, late or for somebody else is counted and dropped."""
        try:
            frame = Frame.unpack(data)
        except FrameError:
            self.dropped += 1
            return
        if frame.df_ctl or (self.port_id and frame.d_id != self.port_id):
            self.dropped += 1
        elif frame.from_responder:
            self.dropped += not self._wire.receive(frame, now)
        elif frame.r_ctl == RCtl.ELS_REQUEST and frame.type == FcType.ELS and self.port_id:
            self._answer(frame, now)
        elif frame.r_ctl == RCtl.BLS_ABTS and self.port_id:
            # We keep no exchange open as its responder: whatever is aborted is unknown here.
            unknown = bls.BaRjt(bls.Reason.LOGICAL_ERROR, bls.Explanation.INVALID_OX_ID_RX_ID)
            self._wire.send(bls.answer(frame, unknown))
        else:
            self.dropped += 1
        self._see_to_unresponsive(now)

    def tick(self, now: float) -> None:
        """Do what is due by now."""
        self._wire.timers.tick(now)
        self._see_to_unresponsive(now)

    def deadline(self) -> float | None:
        """When tick() is wanted next."""
        return self._wire.timers.deadline()

    def take_frames(self) -> list[bytes]:
        """Frames to be sent, in this order."""
        frames, self._wire.frames = self._wire.frames, []
        return frames

    def take_events(self) -> list[Event]:
        events, self._wire.events = self._wire.events, []
        return events

    def rescan(self, now: float) -> int:
        """Ask the name server and every target afresh; a Discovered with at least this number follows."""
        return self._discovery.request(EVERYTHING, now)

    def start_command(
        self,
        remote: RemotePort,
        lun: bytes,
        cdb: bytes,
        now: float,
        *,
        data_out: bytes = b"",
        data_in_length: int = 0,
        attribute: int = 0,
        timeout: float | None = None,
    ) -> Command:
        """Send a command to a remote port that is logged in; a CommandDone follows.  See Initiator.start."""
        return self._initiator.start(
            remote,
            lun,
            cdb,
            now,
            data_out=data_out,
            data_in_length=data_in_length,
            attribute=attribute,
            timeout=timeout,
        )

    def abort(self, command: Command, now: float, end: End = End.ABORTED) -> None:
        """ABTS; its CommandDone says `end`, or how it completed meanwhile."""
        self._initiator.abort(command, now, end)
        self._see_to_unresponsive(now)

    def manage(self, remote: RemotePort, lun: bytes, flag: TmFlag, timeout: float, now: float) -> Management:
        """A task management function; a ManagementDone follows, after the CommandDone of what it ends."""
        return self._initiator.manage(remote, lun, flag, timeout, now)

    def reset_nexus(self, remote: RemotePort, now: float) -> None:
        """LOGO and log in again: SAM's I_T NEXUS RESET.  Commands of the nexus end with End.LOST."""
        remote.log_out(now)

    # ---------------------------------------------------------------- the login

    def _move(self, state: LocalState) -> None:
        if (state is LocalState.READY) != (self.state is LocalState.READY) or state is LocalState.LINK_DOWN:
            self._wire.events.append(TopologyChanged())
        self.state = state

    def _enter(self, state: LocalState, now: float) -> None:
        self._move(state)
        wire = self._wire
        done: Callable[[bytes | None, float], None] = self._reply
        match state:
            case LocalState.FLOGI:
                login = Login.flogi if self._first else Login.fdisc
                payload = login(self.wwpn, self.wwnn).pack()
                self._exchange = wire.els(Address.F_PORT, payload, done, now, wire.e_d_tov)
            case LocalState.DNS:
                payload = Login.plogi(self.wwpn, self.wwnn).pack()
                self._exchange = wire.els(Address.DIRECTORY_SERVER, payload, done, now)
            case LocalState.SCR:
                self._exchange = wire.els(Address.FABRIC_CONTROLLER, els.Scr().pack(), done, now)
            case LocalState.READY:
                self._pause = _FIRST_PAUSE
                self._discovery.link_up(now)
            case LocalState.RESTART:
                self._timer = wire.timers.set(now + self._pause, lambda then: self._enter(LocalState.FLOGI, then))
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            case _ if state in _CT_STEPS:
                self._exchange = wire.ct(Address.DIRECTORY_SERVER, self._registration(state).pack(), done, now)
            case _:
                pass

    def _registration(self, state: LocalState) -> ns.Request:
        match state:
            case LocalState.RNN_ID:
                return ns.RnnId(self.port_id, self.wwnn)
            case LocalState.RSNN_NN:
                return ns.RsnnNn(self.wwnn, self._symbolic_name)
            case LocalState.RSPN_ID:
                return ns.RspnId(self.port_id, self._symbolic_name)
            case LocalState.RFT_ID:
                return ns.RftId(self.port_id, frozenset({FcType.FCP, FcType.CT}))
            case _:
                return ns.RffId(self.port_id, ns.Fc4Feature.INITIATOR)

    def _reply(self, reply: bytes | None, now: float) -> None:
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        try:
            accepted = reply is not None and self._accept(reply, exchange.replied_to)
        except FrameError:
            accepted = False
        if accepted:
            self._tries = 0
            self._enter(_NEXT[self.state], now)
            return
        self._tries += 1
        if self._tries < _TRIES:
            state = self.state
            self._timer = self._wire.timers.set(now + self._wire.e_d_tov, lambda then: self._enter(state, then))
        else:
            self._restart(now)

    def _accept(self, reply: bytes, port_id: int) -> bool:
        """Is this the reply that the step waits for?  Raises FrameError when it is no reply at all."""
        if self.state in _CT_STEPS:
            return ct.CtIu.unpack(reply).accepted
        rejection = els.rejection(reply)
        if rejection is not None:
            if self.state is LocalState.FLOGI and rejection.reason not in (
                els.Reason.LOGICAL_BUSY,
                els.Reason.IN_PROGRESS,
            ):
                self._wire.events.append(LoginRejected(rejection))
            return False
        if self.state is LocalState.FLOGI:
            login = Login.unpack(reply)
            if not login.features & Feature.F_PORT or not port_id:
                return False  # another N_Port, point to point: no fabric to be a member of
            self.fabric_name = login.wwnn
            # As Linux does: the fabric may only slow us down.
            self._wire.e_d_tov = max(self._wire.e_d_tov, login.e_d_tov_seconds)
            self._wire.r_a_tov = max(self._wire.r_a_tov, login.r_a_tov_seconds)
            self._wire.port_id = port_id
        return True

    def _restart(self, now: float) -> None:
        """Begin anew, after a pause."""
        self._abandon(now)
        self._enter(LocalState.RESTART, now)

    def _abandon(self, now: float) -> None:
        """Our login is void: nothing that rests on it goes on."""
        self._wire.timers.cancel(self._timer)
        self._wire.withdraw(self._exchange, now)
        self._timer = self._exchange = None
        self._tries = 0
        self._discovery.link_down(now)
        self._initiator.lose(None, now)
        self._wire.port_id = Address.UNIDENTIFIED

    def _logged_out(self, _reply: bytes | None, now: float) -> None:
        self._exchange = None
        self._wire.port_id = Address.UNIDENTIFIED
        self._wire.events.append(LoggedOut())

    def _see_to_unresponsive(self, now: float) -> None:
        """Ports that let an ABTS go unanswered are logged out: that ends every exchange (FCP-4 12.3)."""
        while self._initiator.unresponsive:
            remote = self._discovery.remotes.get(self._initiator.unresponsive.pop())
            if remote is not None and remote.logged_in:
                remote.log_out(now)

    # ---------------------------------------------------------------- requests of others

    def _answer(self, frame: Frame, now: float) -> None:
        try:
            request = els.parse_request(frame.payload)
        except els.ElsError as error:
            self._wire.send(els_reply(frame, error.rejection.pack()))
            return
        remote = self._discovery.by_port_id(frame.s_id)
        command = frame.payload[0]
        reply = els.LS_ACC
        after: Callable[[float], object] | None = None
        match request:
            case els.Rscn(pages):
                after = partial(self._discovery.request, pages)
            case els.Logo():
                after = self._left(frame.s_id, remote)
            case els.Prli() if command == els.Els.PRLO:
                pages_ = tuple(els.PrliPage(page.fc4_type, els.PrliPage.EXECUTED) for page in request.pages)
                reply = els.Prli(pages_, els.Els.LS_ACC).pack()
                after = self._left(frame.s_id, remote)
            case els.Prli():
                reply = els.Prli(tuple(_image_pair(page) for page in request.pages), els.Els.LS_ACC).pack()
            case Login() if command == els.Els.PLOGI:
                reply = Login.plogi(self.wwpn, self.wwnn, accept=True).pack()
                after = self._left(frame.s_id, remote)
            case els.Adisc():
                reply = els.Adisc(self.wwpn, self.wwnn, self.port_id, els.Els.LS_ACC).pack()
            case els.Rtv():
                reply = els.RtvAcc(round(self._wire.r_a_tov * 1000), round(self._wire.e_d_tov * 1000)).pack()
            case els.Echo(data):
                reply = els.Echo(data, els.Els.LS_ACC).pack()
            case els.Rnid():
                reply = els.RnidAcc.answer(request, self.wwpn, self.wwnn, els.AssociatedType.HOST).pack()
            case els.Rec():
                found = self._initiator.concise(request, frame.s_id) if request.s_id == self.port_id else None
                reply = found.pack() if found is not None else _UNKNOWN_EXCHANGE.pack()
            case els.Rrq():
                pass
            case _:
                reply = els.LsRjt(els.Reason.NOT_SUPPORTED, els.Explanation.NOT_SUPPORTED).pack()
        self._wire.send(els_reply(frame, reply))
        if after is not None:
            after(now)

    def _left(self, s_id: int, remote: RemotePort | None) -> Callable[[float], None] | None:
        """What to do when the login with this port has been ended by its side, once that is answered."""
        if s_id in (Address.F_PORT, Address.DIRECTORY_SERVER):
            return self._restart
        return remote.logged_out if remote is not None and remote.logged_in else None


_UNKNOWN_EXCHANGE = els.LsRjt(els.Reason.LOGICAL_ERROR, els.Explanation.INVALID_OX_ID_RX_ID)


def _image_pair(page: els.PrliPage) -> els.PrliPage:
    """Our side of an image pair: an initiator of FCP, nothing else (FCP-4 6.3)."""
    if page.fc4_type != FCP:
        return els.PrliPage(page.fc4_type, 0x08)  # response code 8: this FC-4 is not here
    flags = els.PrliPage.ESTABLISH | els.PrliPage.EXECUTED
    return els.PrliPage(FCP, flags, SERVICES)
