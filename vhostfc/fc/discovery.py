"""Who is out there: the name server's list, and a RemotePort for each entry.

A request asks the name server (GPN_FT) and brings every remote port up to date; it is answered when no
port is busy any more for its sake.  What is requested while the name server is being asked waits for that
answer and asks anew then, so a notification is never lost in a list that was made before it; but it
does not wait for ports: one that hangs is perhaps just the one that the news are about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vhostfc.fc import ct, ns
from vhostfc.fc.els import AddressFormat, RscnPage
from vhostfc.fc.exchange import Event, Exchange, Timer, Wire
from vhostfc.fc.frame import Address, FrameError
from vhostfc.fc.initiator import Initiator
from vhostfc.fc.remote import BUSY, RemotePort, RemoteState
from vhostfc.fc.wwn import Wwn

_TRIES = 3
#: How much of an address counts in a page of an RSCN.
_MASKS = {
    AddressFormat.PORT: 0xFFFFFF,
    AddressFormat.AREA: 0xFFFF00,
    AddressFormat.DOMAIN: 0xFF0000,
    AddressFormat.FABRIC: 0x000000,
}
#: Addresses that are kept for the next look; more of them mean everything.
_MOST_PAGES = 256
EVERYTHING = (RscnPage(0, AddressFormat.FABRIC),)


#: State (READY, UNLISTED for "it may come back", or GONE), address and units (LUN and name) of a known port.
Visible = tuple[RemoteState, int, tuple[tuple[bytes, bytes], ...]]


@dataclass(frozen=True, slots=True)
class TopologyChanged(Event):
    """Our own state, a remote port's, or the units of one are not what they were."""


@dataclass(frozen=True, slots=True)
class Discovered(Event):
    """Every request for discovery up to this number has been answered."""

    number: int


class Discovery:
    """remotes: every port that is or was listed; those that nobody has heard of yet are not `known`."""

    def __init__(
        self,
        wire: Wire,
        initiator: Initiator,
        ours: tuple[Wwn, Wwn],
        *,
        hold: float,
        failed: Callable[[float], None],
    ) -> None:
        """failed: called when the name server does not answer."""
        self.remotes: dict[Wwn, RemotePort] = {}
        self._wire = wire
        self._initiator = initiator
        self._ours = ours
        self._hold = hold
        self._failed = failed
        self._online = False
        # Requests are numbered: how many there were, and up to which the name server has answered and we have told.
        self._asked = self._answered = self._told = 0
        self._query_for: int | None = None  # up to which the query under way is for
        self._busy_since: dict[Wwn, int] = {}  # ports that are busy, and which answer found or made them so
        self._pages: list[RscnPage] = []
        self._tries = 0
        self._exchange: Exchange | None = None
        self._timer: Timer | None = None
        self._shown: dict[Wwn, Visible] = {}

    def request(self, pages: Sequence[RscnPage], now: float) -> int:
        """Look again, and closely at these addresses.  Returns the number that a Discovered will reach."""
        self._asked += 1
        self._pages.extend(page for page in pages if page not in self._pages)
        if len(self._pages) > _MOST_PAGES:
            self._pages = list(EVERYTHING)
        self._begin(now)
        return self._asked

    def link_up(self, now: float) -> None:
        """We are logged in and registered: begin with a round over everything."""
        self._online = True
        self.request(EVERYTHING, now)

    def link_down(self, now: float) -> None:
        """We are not logged in any more, and so is nobody."""
        self._online = False
        self._query_for = None
        self._wire.timers.cancel(self._timer)
        self._wire.withdraw(self._exchange, now)
        for wwpn, remote in list(self.remotes.items()):
            remote.link_down(now)
            if not remote.known:
                del self.remotes[wwpn]

    def by_port_id(self, port_id: int) -> RemotePort | None:
        return next((remote for remote in self.remotes.values() if remote.port_id == port_id), None)

    # ---------------------------------------------------------------- asking

    def _begin(self, now: float) -> None:
        if self._online and self._query_for is None and self._answered < self._asked:
            self._query_for = self._asked
            self._tries = 0
            self._query(now)

    def _query(self, now: float) -> None:
        self._timer = None
        request = ns.ByFc4Type(ct.Ct.GPN_FT).pack()
        self._exchange = self._wire.ct(Address.DIRECTORY_SERVER, request, self._answer, now)

    def _answer(self, reply: bytes | None, now: float) -> None:
        self._exchange = None
        try:
            ports = _ports(reply)
        except FrameError:
            self._tries += 1
            if self._tries < _TRIES:
                self._timer = self._wire.timers.set(now + self._wire.e_d_tov, self._query)
            else:
                self._failed(now)
            return
        assert self._query_for is not None
        self._answered = self._query_for
        pages, self._pages = self._pages, []
        listed = {wwpn: port_id for port_id, wwpn in ports if port_id != self._wire.port_id and wwpn != self._ours[0]}
        for wwpn, remote in list(self.remotes.items()):
            if wwpn in listed:
                continue
            if remote.known:
                remote.unlisted(now)
            else:
                remote.forget(now)
                del self.remotes[wwpn]
        for wwpn, port_id in listed.items():
            if wwpn not in self.remotes:
                self.remotes[wwpn] = RemotePort(
                    self._wire, self._initiator, self._ours, wwpn, port_id, hold=self._hold, moved=self._moved
                )
            self.remotes[wwpn].listed(port_id, now, refresh=_concerned(port_id, pages))
        self._query_for = None
        self._moved(now)
        self._begin(now)

    def _moved(self, now: float) -> None:
        shown = {wwpn: visible(remote) for wwpn, remote in self.remotes.items() if remote.known}
        if shown != self._shown:
            self._shown = shown
            self._wire.events.append(TopologyChanged())
        busy = {wwpn for wwpn, remote in self.remotes.items() if remote.state in BUSY}
        self._busy_since = {wwpn: self._busy_since.get(wwpn, self._answered) for wwpn in busy}
        if self._online and self._query_for != self._answered:  # not in the middle of an answer
            done = min(self._busy_since.values(), default=self._answered + 1) - 1
            if done > self._told:
                self._told = done
                self._wire.events.append(Discovered(done))


def visible(remote: RemotePort) -> Visible:
    """What the world sees of a known port."""
    if remote.usable:
        state = RemoteState.READY
    elif remote.state in (RemoteState.GONE, RemoteState.NOT_TARGET):
        state = RemoteState.GONE
    else:
        state = RemoteState.UNLISTED
    return state, remote.port_id, tuple(remote.names.items())


def _concerned(port_id: int, pages: Sequence[RscnPage]) -> bool:
    return any((port_id ^ page.port_id) & _MASKS[AddressFormat(page.address_format)] == 0 for page in pages)


def _ports(reply: bytes | None) -> list[tuple[int, Wwn]]:
    """The ports in an answer to GPN_FT.  Raises FrameError when there is no usable answer."""
    if reply is None:
        raise FrameError("no answer")
    iu = ct.CtIu.unpack(reply)
    if iu.accepted:
        return ns.unpack_port_names(iu.body)
    if iu.code == ct.Ct.REJECT and iu.reason == ct.Reason.UNABLE_TO_PERFORM:
        return []  # nobody is registered: so does a name server say that the list is empty
    raise FrameError(f"GPN_FT rejected: {iu}")
