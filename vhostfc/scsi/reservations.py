"""Persistent reservations: who is registered with a unit, and who may do what with it (SPC-4 5.12).

A State is a value; obey() takes one and a request and returns the next one, together with the unit
attentions that others get and the nexuses whose tasks are to be aborted.  Nothing is changed in place,
so whoever runs it may write the next state to stable storage before it becomes the one in force, and
a test may compare whole states.

What the standard leaves open, and what is done here:
- ALL_TG_PT is "as if the same request had been received through each target port" (6.16.3).  All of
  these requests must succeed, else none is done.
- REGISTER of an unregistered nexus with both keys zero does nothing, so PRgeneration stays (table 61).
- PREEMPT of a key that is not the holder's removes the sender's registration too if that has this key
  (5.12.11.5); PREEMPT of the holder keeps the sender's (5.12.11.4.3).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from vhostfc.scsi.sense import Asc, CheckCondition, Sense, SenseKey, invalid_cdb, invalid_parameter
from vhostfc.scsi.task import Nexus

#: Where the TransportIDs of SPEC_I_PT begin in the parameter list (SPC-4 table 215).
TRANSPORT_IDS = 28
#: More registrations than this are refused: a guest must not fill memory or the state directory with them.
MAX_REGISTRATIONS = 1024


class Kind(enum.IntEnum):
    """The TYPE of a persistent reservation (SPC-4 table 64)."""

    WRITE_EXCLUSIVE = 1
    EXCLUSIVE_ACCESS = 3
    WRITE_EXCLUSIVE_REGISTRANTS_ONLY = 5
    EXCLUSIVE_ACCESS_REGISTRANTS_ONLY = 6
    WRITE_EXCLUSIVE_ALL_REGISTRANTS = 7
    EXCLUSIVE_ACCESS_ALL_REGISTRANTS = 8

    @property
    def others_read(self) -> bool:
        """Whoever is kept from writing may still read."""
        return self in (1, 5, 7)

    @property
    def registrants(self) -> bool:
        """Every registered nexus has access: registrants only, or all registrants."""
        return self >= Kind.WRITE_EXCLUSIVE_REGISTRANTS_ONLY

    @property
    def all_registrants(self) -> bool:
        """Every registered nexus is a holder."""
        return self >= Kind.WRITE_EXCLUSIVE_ALL_REGISTRANTS


class Right(enum.IntEnum):
    """What a nexus may do with the medium."""

    NONE = 0
    READ = 1
    ALL = 2


class ReservationConflict(Exception):
    """The command ends in RESERVATION CONFLICT.  Never leaves the package."""


@dataclass(frozen=True, slots=True)
class State:
    """All there is to know about the reservations of a unit.

    generation: PRgeneration.  aptpl: they outlive a loss of power.  keys: the registered nexuses, in the
    order of their registration.  kind None: no reservation.  holder: None also when all registrants hold it.
    """

    generation: int = 0
    aptpl: bool = False
    keys: Mapping[Nexus, int] = field(default_factory=dict)
    kind: Kind | None = None
    holder: Nexus | None = None

    def holds(self, nexus: Nexus) -> bool:
        """Is this nexus a holder of the reservation?"""
        if self.kind is None:
            return False
        return nexus in self.keys if self.kind.all_registrants else nexus == self.holder

    def right(self, nexus: Nexus) -> Right:
        """The columns of SPC-4's tables of commands that are allowed in the presence of reservations."""
        if self.kind is None or self.holds(nexus) or (self.kind.registrants and nexus in self.keys):
            return Right.ALL
        return Right.READ if self.kind.others_read else Right.NONE

    @property
    def kept(self) -> State | None:
        """What a restart must find: None if nothing; PRgeneration begins at zero again (SPC-4 5.12.6)."""
        return replace(self, generation=0) if self.aptpl else None


@dataclass(frozen=True, slots=True)
class Request:
    """A PERSISTENT RESERVE OUT, all service actions but REGISTER AND MOVE.

    scope, kind: SCOPE and TYPE as they are in the CDB.  key and new_key: RESERVATION KEY and SERVICE ACTION
    RESERVATION KEY.  others: the TransportIDs of SPEC_I_PT.
    """

    key: int
    new_key: int = 0
    scope: int = 0
    kind: int = 0
    others: tuple[bytes, ...] = ()
    spec_i_pt: bool = False
    all_tg_pt: bool = False
    aptpl: bool = False


@dataclass(frozen=True, slots=True)
class MoveRequest:
    """A REGISTER AND MOVE.  initiator: TransportID; port: RELATIVE TARGET PORT IDENTIFIER."""

    key: int
    new_key: int
    initiator: bytes
    port: int
    unregister: bool = False
    aptpl: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """The state that follows, unit attentions for some nexuses, and the nexuses whose tasks end."""

    state: State
    attentions: tuple[tuple[Asc, frozenset[Nexus]], ...] = ()
    abort: frozenset[Nexus] = frozenset()


class Action(enum.IntEnum):
    """Service actions of PERSISTENT RESERVE OUT (SPC-4 table 223)."""

    REGISTER = 0x00
    RESERVE = 0x01
    RELEASE = 0x02
    CLEAR = 0x03
    PREEMPT = 0x04
    PREEMPT_AND_ABORT = 0x05
    REGISTER_AND_IGNORE_EXISTING_KEY = 0x06
    REGISTER_AND_MOVE = 0x07


def obey(state: State, nexus: Nexus, action: Action, request: Request, ports: Collection[int]) -> Change:
    """What a PERSISTENT RESERVE OUT of this nexus does.

    ports: the relative identifiers of all target ports.  Raises ReservationConflict or CheckCondition.
    """
    return _ACTIONS[action](state, nexus, request, ports)


# ---------------------------------------------------------------- parts


def _registered(state: State, nexus: Nexus, key: int) -> None:
    """Raises unless the nexus is registered with this key (all service actions but REGISTER want that)."""
    if nexus not in state.keys or state.keys[nexus] != key:
        raise ReservationConflict


def _kind(request: Request) -> Kind:
    """SCOPE and TYPE, where they count."""
    if request.scope:
        raise invalid_cdb(2, 7)  # only LU_SCOPE is left (SPC-4 5.12.1)
    try:
        return Kind(request.kind)
    except ValueError:
        raise invalid_cdb(2, 3) from None


def _counted(state: State) -> State:
    return replace(state, generation=state.generation + 1 & 0xFFFFFFFF)


def _without(state: State, gone: Collection[Nexus]) -> State:
    """The registrations of these nexuses are removed, with the reservation if nobody holds it any more."""
    keys = {nexus: key for nexus, key in state.keys.items() if nexus not in gone}
    kind, holder = state.kind, state.holder
    if not keys or (kind is not None and not kind.all_registrants and holder not in keys):
        kind = holder = None
    return replace(state, keys=keys, kind=kind, holder=holder)


def _reserved(state: State, nexus: Nexus, kind: Kind) -> State:
    return replace(state, kind=kind, holder=None if kind.all_registrants else nexus)


def _told(*pairs: tuple[Asc, Collection[Nexus]]) -> tuple[tuple[Asc, frozenset[Nexus]], ...]:
    return tuple((asc, frozenset(nexuses)) for asc, nexuses in pairs if nexuses)


# ---------------------------------------------------------------- REGISTER


def _register(state: State, nexus: Nexus, request: Request, ports: Collection[int]) -> Change:
    """REGISTER (SPC-4 table 61)."""
    mine = _through(nexus, request, ports)
    if any(state.keys.get(one, 0) != request.key for one in mine):
        raise ReservationConflict
    return _set_keys(state, nexus, mine, request, ports)


def _register_and_ignore(state: State, nexus: Nexus, request: Request, ports: Collection[int]) -> Change:
    """REGISTER AND IGNORE EXISTING KEY (SPC-4 table 62)."""
    return _set_keys(state, nexus, _through(nexus, request, ports), request, ports)


def _through(nexus: Nexus, request: Request, ports: Collection[int]) -> list[Nexus]:
    """The nexuses of the sender that the request is for: the one it came through, or all of its initiator port."""
    if not request.all_tg_pt:
        return [nexus]
    return [nexus, *(Nexus(nexus.initiator, port) for port in ports if port != nexus.port)]


def _set_keys(state: State, nexus: Nexus, mine: list[Nexus], request: Request, ports: Collection[int]) -> Change:
    if request.spec_i_pt and nexus in state.keys:
        raise invalid_parameter(20, 3)
    if not request.new_key:
        return _unregister(state, mine, request)
    keys = {**state.keys, **dict.fromkeys(mine, request.new_key)}
    for number, initiator in enumerate(request.others):
        for port in {nexus.port, *ports} if request.all_tg_pt else (nexus.port,):
            if Nexus(initiator, port) in state.keys:  # then nobody is registered (SPC-4 table 67, b)
                raise invalid_parameter(TRANSPORT_IDS + number * len(initiator))
            keys[Nexus(initiator, port)] = request.new_key
    _check_room(keys)
    return Change(_counted(replace(state, keys=keys, aptpl=request.aptpl)))


def _check_room(keys: Mapping[Nexus, int]) -> None:
    if len(keys) > MAX_REGISTRATIONS:
        raise CheckCondition(Sense(SenseKey.ILLEGAL_REQUEST, Asc.INSUFFICIENT_REGISTRATION_RESOURCES))


def _unregister(state: State, mine: list[Nexus], request: Request) -> Change:
    """SERVICE ACTION RESERVATION KEY is zero (SPC-4 5.12.11.3)."""
    if not any(one in state.keys for one in mine):
        return Change(state)
    after = _without(state, mine)
    released = state.kind is not None and after.kind is None and state.kind.registrants
    return Change(
        _counted(replace(after, aptpl=request.aptpl)),
        _told((Asc.RESERVATIONS_RELEASED, after.keys if released else ())),
    )


def move(state: State, nexus: Nexus, request: MoveRequest, ports: Collection[int]) -> Change:
    """REGISTER AND MOVE (SPC-4 5.12.8, table 63): the holder hands the reservation over.

    Raises ReservationConflict or CheckCondition.
    """
    _registered(state, nexus, request.key)
    if state.kind is None:
        raise invalid_cdb(1, 4)  # there is nothing to move
    if state.kind.all_registrants or not state.holds(nexus):
        raise ReservationConflict
    if not request.new_key:
        raise invalid_parameter(8)
    if request.port not in ports:
        raise invalid_parameter(18)
    if request.initiator == nexus.initiator:
        raise invalid_parameter(24)
    to = Nexus(request.initiator, request.port)
    keys = {**state.keys, to: request.new_key}
    if request.unregister:
        del keys[nexus]
    _check_room(keys)
    return Change(_counted(replace(state, keys=keys, holder=to, aptpl=request.aptpl)))


# ---------------------------------------------------------------- RESERVE, RELEASE, CLEAR


def _reserve(state: State, nexus: Nexus, request: Request, _ports: Collection[int]) -> Change:
    """SPC-4 5.12.9."""
    _registered(state, nexus, request.key)
    kind = _kind(request)
    if state.kind is None:
        return Change(_reserved(state, nexus, kind))
    if state.holds(nexus) and state.kind == kind:
        return Change(state)
    raise ReservationConflict


def _release(state: State, nexus: Nexus, request: Request, _ports: Collection[int]) -> Change:
    """SPC-4 5.12.11.2."""
    _registered(state, nexus, request.key)
    if not state.holds(nexus):
        return Change(state)
    if request.scope or request.kind != state.kind:
        raise CheckCondition(Sense(SenseKey.ILLEGAL_REQUEST, Asc.INVALID_RELEASE_OF_PERSISTENT_RESERVATION))
    told = state.keys.keys() - {nexus} if state.kind.registrants else ()
    return Change(replace(state, kind=None, holder=None), _told((Asc.RESERVATIONS_RELEASED, told)))


def _clear(state: State, nexus: Nexus, request: Request, _ports: Collection[int]) -> Change:
    """SPC-4 5.12.11.6."""
    _registered(state, nexus, request.key)
    others = state.keys.keys() - {nexus}
    return Change(
        _counted(replace(state, keys={}, kind=None, holder=None)),
        _told((Asc.RESERVATIONS_PREEMPTED, others)),
    )


# ---------------------------------------------------------------- PREEMPT


def _preempt(state: State, nexus: Nexus, request: Request, _ports: Collection[int]) -> Change:
    """SPC-4 5.12.11.4 and figure 8: of the holder, or else the removal of registrations."""
    _registered(state, nexus, request.key)
    held = state.kind is not None
    everybody = held and state.kind is not None and state.kind.all_registrants
    if not request.new_key:
        if not everybody:
            raise invalid_parameter(8)
        return _preempt_holder(state, nexus, request, state.keys.keys() - {nexus})
    victims = {one for one, key in state.keys.items() if key == request.new_key}
    if not victims:
        raise ReservationConflict
    if held and not everybody and state.holder in victims:
        return _preempt_holder(state, nexus, request, victims - {nexus})
    after = _counted(_without(state, victims))
    return Change(after, _told((Asc.REGISTRATIONS_PREEMPTED, victims - {nexus})))


def _preempt_holder(state: State, nexus: Nexus, request: Request, victims: Collection[Nexus]) -> Change:
    """The sender becomes the holder, with the type that it asks for; the victims lose their registrations."""
    kind = _kind(request)
    after = _reserved(_without(state, victims), nexus, kind)
    bystanders = after.keys.keys() - {nexus} if kind != state.kind else ()
    return Change(
        _counted(after),
        _told((Asc.REGISTRATIONS_PREEMPTED, victims), (Asc.RESERVATIONS_RELEASED, bystanders)),
    )


def _preempt_and_abort(state: State, nexus: Nexus, request: Request, ports: Collection[int]) -> Change:
    """SPC-4 5.12.11.4.4: the same, and the tasks of those who lost their registration end."""
    change = _preempt(state, nexus, request, ports)
    return replace(change, abort=frozenset(state.keys.keys() - change.state.keys.keys()))


_ACTIONS: dict[Action, Callable[[State, Nexus, Request, Collection[int]], Change]] = {
    Action.REGISTER: _register,
    Action.RESERVE: _reserve,
    Action.RELEASE: _release,
    Action.CLEAR: _clear,
    Action.PREEMPT: _preempt,
    Action.PREEMPT_AND_ABORT: _preempt_and_abort,
    Action.REGISTER_AND_IGNORE_EXISTING_KEY: _register_and_ignore,
}
