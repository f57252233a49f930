"""Asymmetric logical unit access: target port groups and what a unit answers through each (SPC-4 5.11, 6.37, 6.45).

The state of a group is the unit's own.  It is changed by the array (implicitly) or by an initiator with
SET TARGET PORT GROUPS (explicitly), both at once and for good: there is no time in which a transition
goes on, so TRANSITIONING is a state that only the array sets.

SPC-4 5.16.2.4.5 wants PERIPHERAL QUALIFIER 001b of an INQUIRY through a port in the unavailable state.  It stays 000b:
Linux binds no disk to a unit that says 001b, and does not ask again when the state is another.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from typing import Protocol

from vhostfc.scsi import cdb as fields
from vhostfc.scsi.attention import UnitAttentions
from vhostfc.scsi.cdb import Command
from vhostfc.scsi.inquiry import Identity
from vhostfc.scsi.sense import Asc, CheckCondition, Sense, SenseKey, illegal, invalid_cdb, invalid_parameter
from vhostfc.scsi.task import ScsiResult, Steps, Task


class AccessState(enum.IntEnum):
    """ASYMMETRIC ACCESS STATE (SPC-4 table 322)."""

    OPTIMIZED = 0x0
    NON_OPTIMIZED = 0x1
    STANDBY = 0x2
    UNAVAILABLE = 0x3
    TRANSITIONING = 0xF

    @property
    def active(self) -> bool:
        """All commands are served."""
        return self in {AccessState.OPTIMIZED, AccessState.NON_OPTIMIZED}


#: What an initiator may ask for.
_SETTABLE = frozenset(AccessState) - {AccessState.TRANSITIONING}
#: T_SUP, U_SUP, S_SUP, AN_SUP, AO_SUP.
_SUPPORTED = 0x8F
#: STATUS CODE: by SET TARGET PORT GROUPS, by implicit behavior.
_EXPLICIT, _IMPLICIT = 0x01, 0x02

_ASC = {
    AccessState.STANDBY: Asc.LOGICAL_UNIT_NOT_ACCESSIBLE_TARGET_PORT_IN_STANDBY_STATE,
    AccessState.UNAVAILABLE: Asc.LOGICAL_UNIT_NOT_ACCESSIBLE_TARGET_PORT_IN_UNAVAILABLE_STATE,
    AccessState.TRANSITIONING: Asc.LOGICAL_UNIT_NOT_ACCESSIBLE_ASYMMETRIC_ACCESS_STATE_TRANSITION,
}
#: Served in the unavailable state and while a transition goes on (SPC-4 5.11.2.6, 5.11.2.8).
_ALWAYS = frozenset(
    (
        fields.INQUIRY,
        fields.REPORT_LUNS,
        fields.REPORT_TARGET_PORT_GROUPS,
        fields.REQUEST_SENSE,
        fields.SET_TARGET_PORT_GROUPS,
    )
)
#: Served in the standby state besides (5.11.2.5).
_STANDBY = _ALWAYS | {
    fields.LOG_SENSE,
    fields.MODE_SELECT_6,
    fields.MODE_SELECT_10,
    fields.MODE_SENSE_6,
    fields.MODE_SENSE_10,
    fields.SEND_DIAGNOSTIC,
    *fields.PERSISTENT_RESERVES_IN,
    *fields.PERSISTENT_RESERVES_OUT,
}


class Access:
    """The states of a unit's target port groups.  A group that nobody spoke of is optimized."""

    def __init__(self) -> None:
        self._given: Mapping[int, AccessState] = {}
        self._states: dict[int, AccessState] = {}
        self._status: dict[int, int] = {}

    def state(self, group: int) -> AccessState:
        return self._states.get(group, AccessState.OPTIMIZED)

    def status(self, group: int) -> int:
        """STATUS CODE: why it has this state."""
        return self._status.get(group, 0)

    def give(self, states: Mapping[int, AccessState]) -> frozenset[int]:
        """The array gives groups these states: those that it did not have before; what initiators set stays else.

        Returns the groups that have another state now.
        """
        before, self._given = self._given, dict(states)
        new = {group: state for group, state in states.items() if state != before.get(group, AccessState.OPTIMIZED)}
        return self.set(new, explicit=False)

    def set(self, states: Mapping[int, AccessState], *, explicit: bool) -> frozenset[int]:
        """Returns the groups that have another state now."""
        changed = frozenset(group for group, state in states.items() if state != self.state(group))
        for group in changed:
            self._states[group] = states[group]
            self._status[group] = _EXPLICIT if explicit else _IMPLICIT
        return changed

    def check(self, command: Command, group: int) -> None:
        """Raises CheckCondition for a command that is not served through this group."""
        state = self.state(group)
        if state.active or command in (_STANDBY if state is AccessState.STANDBY else _ALWAYS):
            return
        raise CheckCondition(Sense(SenseKey.NOT_READY, _ASC[state]))


class Unit(Protocol):
    """What these commands need of their unit."""

    @property
    def identity(self) -> Identity: ...
    @property
    def access(self) -> Access: ...
    @property
    def attentions(self) -> UnitAttentions: ...


def _groups(identity: Identity) -> dict[int, list[int]]:
    """The relative identifiers of the ports of each group."""
    groups: dict[int, list[int]] = {}
    for port in identity.ports:
        groups.setdefault(port.group, []).append(port.relative)
    return dict(sorted(groups.items()))


def report_target_port_groups(unit: Unit, _command: Command, task: Task) -> Steps:
    """REPORT TARGET PORT GROUPS, with the length only or the extended header."""
    yield from ()
    form = task.cdb[1] >> 5
    if form > 1:
        raise invalid_cdb(1, 7)
    body = struct.pack("!BBxx", 0x10, 0) if form else b""  # extended; IMPLICIT TRANSITION TIME: not reported
    for group, ports in _groups(unit.identity).items():
        state, status = unit.access.state(group), unit.access.status(group)
        body += struct.pack("!BBHxBxB", state, _SUPPORTED, group, status, len(ports))
        body += b"".join(struct.pack("!HH", 0, port) for port in ports)
    data = struct.pack("!I", len(body)) + body
    return ScsiResult(data_in=data[: fields.number(task.cdb, 6, 9)])


def set_target_port_groups(unit: Unit, _command: Command, task: Task) -> Steps:
    """SET TARGET PORT GROUPS: all that the list asks for, or nothing."""
    yield from ()
    length = fields.number(task.cdb, 6, 9)
    if not length:
        return ScsiResult()
    if length < 4 or length % 4:
        raise invalid_cdb(6)
    if len(task.data_out) < length:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    wanted: dict[int, AccessState] = {}
    groups = _groups(unit.identity)
    for at in range(4, length, 4):
        state, group = task.data_out[at] & 0x0F, fields.number(task.data_out, at + 2, at + 3)
        if state not in _SETTABLE:
            raise invalid_parameter(at, 3)
        if group not in groups or group in wanted:
            raise invalid_parameter(at + 2)
        wanted[group] = AccessState(state)
    if unit.access.set(wanted, explicit=True):
        unit.attentions.establish(Asc.ASYMMETRIC_ACCESS_STATE_CHANGED, but=task.nexus)
    return ScsiResult()


HANDLERS = {
    fields.REPORT_TARGET_PORT_GROUPS: report_target_port_groups,
    fields.SET_TARGET_PORT_GROUPS: set_target_port_groups,
}
