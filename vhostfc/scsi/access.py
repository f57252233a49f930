"""Which commands a reservation keeps whom from, and the commands that make reservations.

Two kinds of reservation exclude each other: persistent ones (reservations.py), and those of RESERVE and
RELEASE of SPC-2, which end with their nexus or a reset.  Between them stands CRH, compatible
reservation handling (SPC-4 5.12.3): whom a persistent reservation already gives what RESERVE would
give, gets GOOD for it, since cluster software of both ages may share a machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from vhostfc.scsi import cdb as fields
from vhostfc.scsi import persistent, reservations
from vhostfc.scsi.attention import UnitAttentions
from vhostfc.scsi.cdb import Command
from vhostfc.scsi.inquiry import Identity
from vhostfc.scsi.reservations import Action, Change, MoveRequest, Request, ReservationConflict, Right, State
from vhostfc.scsi.sense import Asc, CheckCondition, Sense, SenseKey, invalid_cdb
from vhostfc.scsi.task import AbortTasks, Keep, Nexus, ScsiResult, Steps, TakeTurn, Task

_PERSISTENT = frozenset((*fields.PERSISTENT_RESERVES_IN, *fields.PERSISTENT_RESERVES_OUT))
_RESERVES = frozenset((fields.RESERVE_6, fields.RESERVE_10))
_RELEASES = frozenset((fields.RELEASE_6, fields.RELEASE_10))

#: SPC-2 5.5.1: what others may do while a unit is reserved by RESERVE.  RELEASE of others does nothing.
_ALLOWED_BY_RESERVE = frozenset(
    (
        fields.INQUIRY,
        fields.LOG_SENSE,
        fields.READ_CAPACITY_10,
        fields.READ_CAPACITY_16,
        fields.REPORT_LUNS,
        fields.REQUEST_SENSE,
        *_RELEASES,
    )
)
#: SPC-4 table 65 and SBC-3 table 13: allowed to everybody, whatever the type; some follow rules of their own.
_ALWAYS = frozenset(
    (
        fields.INQUIRY,
        fields.LOG_SENSE,
        fields.READ_CAPACITY_10,
        fields.READ_CAPACITY_16,
        fields.RECEIVE_COPY_FAILURE_DETAILS,
        fields.RECEIVE_COPY_OPERATING_PARAMETERS,
        fields.RECEIVE_COPY_STATUS,
        fields.REPORT_LUNS,
        fields.REPORT_TARGET_PORT_GROUPS,
        fields.REQUEST_SENSE,
        fields.TEST_UNIT_READY,
        *_PERSISTENT,
        *_RESERVES,
        *_RELEASES,
    )
)
#: The same tables: allowed to everybody while the type is one of the write exclusive ones.  All others conflict.
_READS = frozenset(
    (
        fields.GET_LBA_STATUS,
        fields.MODE_SENSE_6,
        fields.MODE_SENSE_10,
        fields.PRE_FETCH_10,
        fields.PRE_FETCH_16,
        fields.READ_6,
        fields.READ_10,
        fields.READ_12,
        fields.READ_16,
        fields.READ_32,
        fields.READ_DEFECT_DATA_10,
        fields.READ_DEFECT_DATA_12,
        fields.REPORT_SUPPORTED_OPERATION_CODES,
        fields.REPORT_SUPPORTED_TASK_MANAGEMENT_FUNCTIONS,
        fields.VERIFY_10,
        fields.VERIFY_12,
        fields.VERIFY_16,
        fields.VERIFY_32,
    )
)


def _always(command: Command, cdb: bytes) -> bool:
    """Of two commands it is a field that decides: STOP is another's business, and so is a lock on the medium."""
    if command == fields.START_STOP_UNIT:
        return bool(cdb[4] & 0x01) and not cdb[4] & 0xF0
    if command == fields.PREVENT_ALLOW:
        return not cdb[4] & 0x03
    return command in _ALWAYS


class Reservations:
    """The reservations of one unit.  state: the persistent ones; reserved: the nexus that has sent RESERVE.

    version: grows with every change of these; no earlier state has the same one.  in_doubt: it could not be kept,
    so what is on stable storage may be something else.
    """

    def __init__(self) -> None:
        self.version = 0
        self.in_doubt = False
        self._state = State()
        self._reserved: Nexus | None = None

    @property
    def state(self) -> State:
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self.version += state != self._state
        self._state = state

    @property
    def reserved(self) -> Nexus | None:
        return self._reserved

    @reserved.setter
    def reserved(self, nexus: Nexus | None) -> None:
        self.version += nexus != self._reserved
        self._reserved = nexus

    def right(self, nexus: Nexus) -> Right:
        """What a nexus may do with the medium now."""
        if self.reserved is not None:
            return Right.ALL if nexus == self.reserved else Right.NONE
        return self.state.right(nexus)

    def check(self, command: Command, cdb: bytes, nexus: Nexus) -> None:
        """Raises ReservationConflict for a command that this nexus may not send now."""
        if self.reserved is not None:
            if command in _PERSISTENT:  # from whomever (SPC-2 5.5.1)
                raise ReservationConflict
            if nexus != self.reserved and command not in _ALLOWED_BY_RESERVE and not _allows_removal(command, cdb):
                raise ReservationConflict
            return
        right = self.state.right(nexus)
        if right is Right.ALL or _always(command, cdb) or (right is Right.READ and command in _READS):
            return
        raise ReservationConflict

    def lose(self, nexus: Nexus | None = None) -> None:
        """A nexus is gone, or (None) the unit was reset: a RESERVE ends with that, registrations do not."""
        if nexus is None or nexus == self.reserved:
            self.reserved = None

    # ------------------------------------------------------------ RESERVE and RELEASE

    def reserve(self, nexus: Nexus) -> None:
        """Raises ReservationConflict."""
        if not self._compatible(nexus):
            self.reserved = nexus

    def release(self, nexus: Nexus) -> None:
        """Raises ReservationConflict; without a reservation of one's own it does nothing."""
        if not self._compatible(nexus):
            self.lose(nexus)

    def _compatible(self, nexus: Nexus) -> bool:
        """SPC-4 5.12.3: True when the command is to end in GOOD and change nothing."""
        if self.state.right(nexus) is Right.ALL and self.state.kind is not None:
            return True
        if self.state.keys:
            raise ReservationConflict
        return False


def _allows_removal(command: Command, cdb: bytes) -> bool:
    return command == fields.PREVENT_ALLOW and _always(command, cdb)


# ---------------------------------------------------------------- the commands


class Unit(Protocol):
    """What these commands need of their unit."""

    @property
    def identity(self) -> Identity: ...
    @property
    def reservations(self) -> Reservations: ...
    @property
    def attentions(self) -> UnitAttentions: ...


def persistent_reserve_in(unit: Unit, command: Command, task: Task) -> Steps:
    """PERSISTENT RESERVE IN."""
    yield from ()
    state = unit.reservations.state
    match command:
        case fields.READ_KEYS:
            data = persistent.read_keys(state)
        case fields.READ_RESERVATION:
            data = persistent.read_reservation(state)
        case fields.REPORT_CAPABILITIES:
            data = persistent.report_capabilities(state)
        case _:
            data = persistent.read_full_status(state)
    return ScsiResult(data_in=data[: fields.number(task.cdb, 7, 8)])


def persistent_reserve_out(unit: Unit, _command: Command, task: Task) -> Steps:
    """PERSISTENT RESERVE OUT: what shall outlive a restart is on stable storage before it is in force."""
    request = persistent.parse_out(task.cdb, task.data_out)
    yield TakeTurn()
    here = unit.reservations
    if here.reserved is not None:
        raise ReservationConflict
    ports = [port.relative for port in unit.identity.ports] or [task.nexus.port]
    change = _obey(here.state, task, request, ports)
    kept = change.state.kept
    if kept != here.state.kept or here.in_doubt:
        here.in_doubt = not (yield Keep(kept))
        if here.in_doubt:
            raise CheckCondition(Sense(SenseKey.HARDWARE_ERROR, Asc.INTERNAL_TARGET_FAILURE))
    here.state = change.state
    for asc, nexuses in change.attentions:
        unit.attentions.establish(asc, nexuses)
    if change.abort:
        yield AbortTasks(change.abort)
    return ScsiResult()


def _obey(state: State, task: Task, request: Request | MoveRequest, ports: Iterable[int]) -> Change:
    if isinstance(request, MoveRequest):
        return reservations.move(state, task.nexus, request, set(ports))
    return reservations.obey(state, task.nexus, Action(task.cdb[1] & 0x1F), request, sorted(ports))


def reserve(unit: Unit, command: Command, task: Task) -> Steps:
    """RESERVE (6, 10) and RELEASE (6, 10) of a whole unit, for the sender itself."""
    if task.cdb[1] & 0x1F:
        raise invalid_cdb(1, (task.cdb[1] & 0x1F).bit_length() - 1)  # third parties, extents: obsolete
    yield TakeTurn()
    here = unit.reservations
    if here.reserved is not None and here.reserved != task.nexus and command in _RESERVES:
        raise ReservationConflict
    if command in _RESERVES:
        here.reserve(task.nexus)
    else:
        here.release(task.nexus)
    return ScsiResult()


HANDLERS = {
    **dict.fromkeys(fields.PERSISTENT_RESERVES_IN, persistent_reserve_in),
    **dict.fromkeys(fields.PERSISTENT_RESERVES_OUT, persistent_reserve_out),
    **dict.fromkeys((*_RESERVES, *_RELEASES), reserve),
}
