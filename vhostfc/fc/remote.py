"""A remote N_Port: our login with it, and the logical units that it has for us.

Each way into READY ends with a look at the units (survey.py).  A port that leaves is not
forgotten at once: for `hold` seconds it is "blocked", as Linux calls it, because ports that are
replugged come back; only then are its units gone.  One that the name server lists and that does not
let us in is tried again for ever, at a slowing pace: nobody will tell us when it changes its mind.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from vhostfc.fc import els
from vhostfc.fc.exchange import Exchange, Timer, Wire
from vhostfc.fc.frame import FrameError
from vhostfc.fc.initiator import Initiator
from vhostfc.fc.login import MIN_PAYLOAD, Login
from vhostfc.fc.survey import Survey
from vhostfc.fc.wwn import Wwn

FCP = 0x08
#: What we are in an image pair: an initiator that confirms FCP_RSPs when asked to.
SERVICES = els.FcpService.INITIATOR | els.FcpService.READ_XFER_RDY_DISABLED | els.FcpService.CONFIRMED_COMPLETION
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
#: How often news may make a look at the units begin anew, before they have to wait for its end.
_HURRIES = 4


class RemoteState(enum.Enum):
    PLOGI = "port login"
    PRLI = "process login"
    SCAN = "looking for units"
    READY = "ready"
    ADISC = "asking who is there"
    PAUSE = "login failed, waiting"
    NOT_TARGET = "not a target"
    UNLISTED = "unlisted"  # the name server does not show it; it may come back
    GONE = "gone"  # it did not come back in time


#: Where a step leads when it succeeds and when it fails.
_SUCCESS = {
    RemoteState.PLOGI: RemoteState.PRLI,
    RemoteState.PRLI: RemoteState.SCAN,
    RemoteState.SCAN: RemoteState.READY,
    RemoteState.ADISC: RemoteState.SCAN,
}
_FAILURE = {
    RemoteState.PLOGI: RemoteState.PAUSE,
    RemoteState.PRLI: RemoteState.PAUSE,
    RemoteState.ADISC: RemoteState.PLOGI,
}
#: States in which a round of discovery is not over yet.
BUSY = frozenset({RemoteState.PLOGI, RemoteState.PRLI, RemoteState.SCAN, RemoteState.ADISC})
_LOGGED_IN = frozenset({RemoteState.SCAN, RemoteState.READY, RemoteState.ADISC})


class RemotePort:
    """One remote port.  `moved` is called after every change of state."""

    def __init__(
        self,
        wire: Wire,
        initiator: Initiator,
        ours: tuple[Wwn, Wwn],
        wwpn: Wwn,
        port_id: int,
        *,
        hold: float,
        moved: Callable[[float], None],
    ) -> None:
        """ours: our Port_Name and Node_Name."""
        self._wire = wire
        self._initiator = initiator
        self._ours = ours
        self._hold = hold
        self._moved = moved
        self.wwpn = wwpn
        self.wwnn = Wwn(0)
        self.port_id = port_id
        self.state = RemoteState.PAUSE
        self.payload_size = MIN_PAYLOAD
        #: It has been READY: the world has heard of it.
        self.known = False
        self._exchange: Exchange | None = None
        self._timer: Timer | None = None
        self._pause = _FIRST_PAUSE
        #: In this login we have looked at the units: those that we know are those that are there.
        self._looked = False
        self._survey = Survey(self, wire, initiator, self._surveyed)
        self._hurried = 0
        #: There were news during the look that is under way: it is to be followed by another.
        self._again = False

    def __repr__(self) -> str:
        return f"<RemotePort {self.wwpn} {self.port_id:06x}, {self.state.value}>"

    @property
    def logged_in(self) -> bool:
        """There is a login, which the other side can end."""
        return self.state in _LOGGED_IN

    @property
    def usable(self) -> bool:
        """We are logged in, and have seen which disks are there: commands may go to it."""
        return self.logged_in and self._looked

    @property
    def units(self) -> tuple[bytes, ...]:
        """The LUNs of its units, in order."""
        return self._survey.luns

    @property
    def names(self) -> dict[bytes, bytes]:
        """What each unit says of itself, by LUN: see survey.parse_names()."""
        return self._survey.names

    # ---------------------------------------------------------------- what the port hears about it

    def listed(self, port_id: int, now: float, *, refresh: bool) -> None:
        """The name server shows it at this address.  refresh: look closer even if nothing seems changed."""
        moved = port_id != self.port_id
        self.port_id = port_id
        if moved or self.state in (RemoteState.UNLISTED, RemoteState.GONE):
            self._restart(now)
        elif not refresh:
            return
        elif self.state is RemoteState.READY:
            self._enter(RemoteState.ADISC, now)
        elif self.state is RemoteState.SCAN:
            self._hurry(now)
        elif self.state in (RemoteState.PAUSE, RemoteState.NOT_TARGET):
            self._restart(now)

    def unlisted(self, now: float) -> None:
        """The name server does not show it any more."""
        if self.state in (RemoteState.UNLISTED, RemoteState.GONE):
            return
        self._stop(now)
        self._enter(RemoteState.UNLISTED, now)

    def logged_out(self, now: float) -> None:
        """It has ended our login (LOGO, PRLO, PLOGI): log in again at once."""
        if self.state not in (RemoteState.UNLISTED, RemoteState.GONE, RemoteState.NOT_TARGET):
            self._restart(now)

    def log_out(self, now: float) -> None:
        """End our login and make a new one: an I_T nexus loss, which is FC's I_T NEXUS RESET."""
        if self.state in (RemoteState.UNLISTED, RemoteState.GONE):
            return
        self.say_goodbye(now)
        self._restart(now)

    def say_goodbye(self, now: float) -> None:
        """LOGO; the answer is nobody's concern."""
        if self.state in _LOGGED_IN or self.state is RemoteState.PRLI:
            logo = els.Logo(self._wire.port_id, self._ours[0]).pack()
            self._wire.els(self.port_id, logo, lambda _reply, _now: None, now)

    def link_down(self, now: float) -> None:
        """Our own login is gone, and with it this one: hold what we know until the name server can be asked again."""
        self._stop(now)
        if self.state is not RemoteState.GONE:
            self._enter(RemoteState.PAUSE, now, timed=False)

    def forget(self, now: float) -> None:
        """It is not wanted any more: nothing of it may wake up later."""
        self._stop(now)

    # ---------------------------------------------------------------- the machine

    def _restart(self, now: float) -> None:
        self._stop(now)
        self._pause = _FIRST_PAUSE
        self._enter(RemoteState.PLOGI, now)

    def _stop(self, now: float) -> None:
        self._wire.timers.cancel(self._timer)
        self._wire.withdraw(self._exchange, now)
        self._timer = self._exchange = None
        self._looked = self._again = False
        self._hurried = 0
        self._survey.stop()
        self._initiator.lose(self.wwpn, now)

    def _hurry(self, now: float) -> None:
        """News while we look at its units: what we have seen may be old, what we wait for may never come."""
        if self._hurried == _HURRIES:
            self._again = True
            return
        self._hurried += 1
        self._survey.stop()
        self._enter(RemoteState.ADISC, now)

    def _enter(self, state: RemoteState, now: float, *, timed: bool = True) -> None:
        self.state = state
        match state:
            case RemoteState.PLOGI:
                self._exchange = self._wire.els(self.port_id, Login.plogi(*self._ours).pack(), self._reply, now)
            case RemoteState.PRLI:
                page = els.PrliPage(FCP, els.PrliPage.ESTABLISH, SERVICES)
                self._exchange = self._wire.els(self.port_id, els.Prli((page,)).pack(), self._reply, now)
            case RemoteState.ADISC:
                payload = els.Adisc(*self._ours, self._wire.port_id).pack()
                self._exchange = self._wire.els(self.port_id, payload, self._reply, now)
            case RemoteState.SCAN:
                self._survey.begin(now)
            case RemoteState.READY:
                self.known = self._looked = True
                self._pause = _FIRST_PAUSE
                self._hurried = 0
            case RemoteState.PAUSE if timed:
                self._timer = self._wire.timers.set(now + self._pause, self._retry)
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            case RemoteState.UNLISTED:
                self._timer = self._wire.timers.set(now + self._hold, self._give_up)
            case RemoteState.GONE:
                self._survey.forget()
            case _:
                pass
        self._moved(now)

    def _retry(self, now: float) -> None:
        self._enter(RemoteState.PLOGI, now)

    def _give_up(self, now: float) -> None:
        self._enter(RemoteState.GONE, now)

    def _reply(self, reply: bytes | None, now: float) -> None:
        self._exchange = None
        state = self.state
        try:
            accepted = reply is not None and els.rejection(reply) is None and self._accept(reply)
        except FrameError:
            accepted = False
        if self.state is not state:  # _accept saw that this is no target
            self._survey.forget()
            self._moved(now)
            return
        if state is RemoteState.ADISC and not accepted:
            self._looked = False
            self._initiator.lose(self.wwpn, now)
        self._enter(_SUCCESS[state] if accepted else _FAILURE[state], now)

    def _accept(self, reply: bytes) -> bool:
        match self.state:
            case RemoteState.PLOGI:
                login = Login.unpack(reply)
                if login.wwpn != self.wwpn or login.payload_size < MIN_PAYLOAD:
                    return False
                self.wwnn = login.wwnn
                self.payload_size = login.payload_size
                return True
            case RemoteState.PRLI:
                pages = [page for page in els.Prli.unpack(reply).pages if page.fc4_type == FCP]
                if not pages or pages[0].response != els.PrliPage.EXECUTED:
                    return False
                if not pages[0].parameters & els.FcpService.TARGET:
                    self.state = RemoteState.NOT_TARGET
                return True
            case _:
                adisc = els.Adisc.unpack(reply)
                return (adisc.wwpn, adisc.wwnn, adisc.port_id) == (self.wwpn, self.wwnn, self.port_id)

    def _surveyed(self, found: bool, now: float) -> None:
        if not found and not self._looked:
            self._enter(RemoteState.PAUSE, now)
        elif self._again:
            self._again = False
            self._enter(RemoteState.ADISC, now)
        else:
            self._enter(_SUCCESS[RemoteState.SCAN], now)
