"""When faults begin and end: each is a task that waits for its time, has its effect, and takes it back.

What a fault does to frames and to commands is the pure part's (fabric.faults); here are the clock, the
ports that go down, and the rule that an order to begin a fault returns when the fault is in force: no
adapter does I/O on such a unit by itself any more, no session sees what a changed zone hides.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog
import trio

from vhostfc.daemon.fabric_door import Attachment, Door
from vhostfc.daemon.fabric_units import Served
from vhostfc.errors import VhostfcError
from vhostfc.fabric.faults import AT_ONCE, OF_CONFIGURATION, OF_FRAMES, OF_UNITS, Active, Fault, What
from vhostfc.fabric.switch import NPort, Switch
from vhostfc.fc.wwn import Wwn

Json = dict[str, Any]
#: Faults that are over and still shown.
SHOWN = 200


class State(enum.Enum):
    """Where a fault is in its life."""

    WAITING = "waiting"
    ACTIVE = "active"
    OVER = "over"
    FAILED = "failed"


class Subject(Protocol):
    """The fabric, as far as faults act on it."""

    switch: Switch
    door: Door

    def units_at(self, target: Wwn | None, lun: int | None) -> Collection[Served]:
        """The units at these LUNs of these target ports (None: all)."""
        ...

    def withdraw(self, target: Wwn) -> None:
        """Take a target port off the fabric."""
        ...

    def restore(self, target: Wwn) -> None:
        """Put it back, if it is still configured."""
        ...

    async def override(self, name: str, fault: Fault | None) -> None:
        """Lay this change over the configuration, or take it away; raises ConfigError when it cannot be."""
        ...


@dataclass(eq=False, slots=True)
class _Entry:
    active: Active
    source: str
    state: State = State.WAITING
    since: float = 0.0
    error: str = ""
    units: set[Served] = field(default_factory=set)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    begun: trio.Event = field(default_factory=trio.Event)
    spent: trio.Event = field(default_factory=trio.Event)
    done: trio.Event = field(default_factory=trio.Event)

    @property
    def fault(self) -> Fault:
        return self.active.fault


@dataclass(slots=True)
class _Down:
    """A link that shall be down, by name, and what was found plugged in under that name."""

    fault: Fault
    holders: set[str]
    attachments: list[Attachment] = field(default_factory=list)


class Desk:
    """See the head of the file.  seed: of all dice.  publish: is told when faults begin, hit and end."""

    def __init__(
        self,
        subject: Subject,
        *,
        seed: int,
        nursery: trio.Nursery,
        publish: Callable[[str, Json], None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.seed = seed
        self._subject = subject
        self._nursery = nursery
        self._publish = publish
        self._log = log
        self._entries: dict[str, _Entry] = {}
        self._links_down: dict[str, _Down] = {}
        self._away: dict[str, Wwn] = {}

    # ------------------------------------------------------------ orders

    async def add(self, faults: Iterable[Fault], *, source: str) -> list[str]:
        """Faults to be; returns when those that begin now are in force.

        Raises VhostfcError when a name is in use, or when one cannot begin.
        """
        faults = list(faults)
        for fault in faults:
            known = self._entries.get(fault.name)
            if known is not None and known.state in {State.WAITING, State.ACTIVE}:
                raise VhostfcError(f"{fault.name!r} is already the name of a fault; clear it first")
        entries = [self._start(fault, source) for fault in faults]
        for entry in entries:
            if not _wait(entry.fault):
                await entry.begun.wait()
                if entry.error:
                    raise VhostfcError(f"fault {entry.fault.name}: {entry.error}")
        return [entry.fault.name for entry in entries]

    def _start(self, fault: Fault, source: str) -> _Entry:
        self._entries.pop(fault.name, None)
        over = [name for name, entry in self._entries.items() if entry.state in {State.OVER, State.FAILED}]
        for name in over[: max(0, len(over) - SHOWN)]:
            del self._entries[name]
        entry = self._entries[fault.name] = _Entry(Active(fault, self.seed), source)
        self._nursery.start_soon(self._live, entry)
        return entry

    async def clear(self, names: Iterable[str] | None = None, *, source: str | None = None) -> list[str]:
        """End these faults (None: all), of this source; returns the names of those that were there, when they are over.

        Raises VhostfcError for a name that is not known.
        """
        wanted = list(self._entries) if names is None else list(names)
        for name in wanted:
            if name not in self._entries:
                raise VhostfcError(f"no fault is called {name!r}; there are: {', '.join(self._entries) or 'none'}")
        entries = [self._entries[name] for name in wanted]
        entries = [entry for entry in entries if source is None or entry.source == source]
        for entry in entries:
            entry.scope.cancel()
        for entry in entries:
            await entry.done.wait()
            if self._entries.get(entry.fault.name) is entry:
                del self._entries[entry.fault.name]
        await trio.lowlevel.checkpoint()
        return [entry.fault.name for entry in entries]

    async def follow(self, faults: Collection[Fault]) -> None:
        """The file says these now: those that it does not say any more end, those that it says anew begin."""
        mine = {name: entry for name, entry in self._entries.items() if entry.source == "file"}
        same = {fault.name for fault in faults if fault.name in mine and mine[fault.name].fault == fault}
        await self.clear([name for name in mine if name not in same])
        for fault in faults:
            if fault.name not in same:
                self._start(fault, "file")

    def describe(self) -> list[Json]:
        """All of them, also those that are over."""
        return [_shown(entry) for entry in self._entries.values()]

    # ------------------------------------------------------------ what others ask and tell

    def hit(self, active: Active, what: str) -> None:
        """A fault has hit something."""
        entry = self._entries.get(active.fault.name)
        self._publish("fault hit", {"fault": active.fault.name, "what": active.fault.what.value, "hit": what})
        if entry is not None and entry.active is active and active.over:
            entry.spent.set()

    def is_down(self, holder: str) -> bool:
        """Shall the link of something of this name be down?"""
        return any(holder in down.holders for down in self._links_down.values())

    def logged_in(self, wwpn: Wwn, holder: str) -> None:
        """Somebody whose link shall be down had not been here when it was to go down."""
        for down in self._links_down.values():
            if down.fault.wwpn == wwpn or holder in down.holders:
                self._nursery.start_soon(self._down_soon, down.fault)

    async def _down_soon(self, fault: Fault) -> None:
        """When the frame that told of it has been dealt with."""
        await trio.lowlevel.checkpoint()
        if fault.name in self._links_down:
            self._take_down(fault)

    def _take_down(self, fault: Fault) -> None:
        down = self._links_down[fault.name]
        for f_port in self._f_ports(fault):
            attachment = self._subject.door.attachments.get(f_port)
            if attachment is not None:  # else it went with another one, which shares its cable
                down.holders.add(attachment.name)
                down.attachments.append(attachment)
                self._subject.door.link_down(f_port)

    def is_away(self, target: Wwn) -> bool:
        """Is this target port off the fabric?"""
        return target in self._away.values()

    def refit(self) -> None:
        """Units have come, gone or moved: those that faults are about may be others."""
        for entry in self._entries.values():
            if entry.state is State.ACTIVE and entry.fault.what in OF_UNITS:
                self._fit(entry)

    # ------------------------------------------------------------ a fault's life

    async def _live(self, entry: _Entry) -> None:
        fault = entry.fault
        try:
            with entry.scope:
                if wait := _wait(fault):
                    await trio.sleep(wait)
                await self._hold(entry)
        finally:
            if entry.state is not State.FAILED:
                entry.state = State.OVER
            entry.begun.set()
            entry.done.set()

    async def _hold(self, entry: _Entry) -> None:
        """Begin, wait, end."""
        fault = entry.fault
        try:
            with trio.CancelScope(shield=True):
                await self._begin(entry)
                entry.state, entry.since = State.ACTIVE, time.time()
                self._say("fault begins", fault)
                entry.begun.set()
            if fault.what not in AT_ONCE:
                with trio.move_on_after(float("inf") if fault.lasts is None else fault.lasts):
                    await entry.spent.wait()
        except VhostfcError as error:
            entry.state, entry.error = State.FAILED, str(error)
            self._log.warning("a fault could not begin", fault=fault.name, reason=str(error))
            self._publish("fault failed", {"fault": fault.name, "reason": str(error)})
        finally:
            with trio.CancelScope(shield=True):
                await self._end(entry)
            if entry.state is State.ACTIVE:
                self._say("fault ends", fault, hits=entry.active.hits)

    def _say(self, event: str, fault: Fault, **values: object) -> None:
        self._log.info(event, fault=fault.name, what=fault.what.value)
        self._publish(event, {"fault": fault.name, "what": fault.what.value, **values})

    async def _begin(self, entry: _Entry) -> None:
        fault, subject = entry.fault, self._subject
        if fault.what in OF_FRAMES:
            subject.door.faults.add(entry.active)
        elif fault.what in OF_UNITS:
            self._fit(entry)
            for served in list(entry.units):
                await served.barrier()
        elif fault.what in OF_CONFIGURATION:
            await subject.override(fault.name, fault)
        elif fault.what is What.TARGET_GONE:
            assert fault.target is not None
            self._away[fault.name] = fault.target
            subject.withdraw(fault.target)
        elif fault.what is What.LINK_DOWN:
            self._links_down[fault.name] = _Down(fault, set() if fault.holder is None else {fault.holder})
            self._take_down(fault)
        else:
            ports = self._n_ports(fault)
            entry.active.hits += len(ports)
            if fault.what is What.LOGOUT:
                subject.door.log_out(ports)
            else:
                subject.door.clear_virtual_links(ports)

    async def _end(self, entry: _Entry) -> None:
        fault, subject = entry.fault, self._subject
        subject.door.faults.remove(fault.name)
        for served in entry.units:
            served.faults.remove(fault.name)
            served.changed()
        entry.units.clear()
        if fault.what in OF_CONFIGURATION and not entry.error:
            await subject.override(fault.name, None)
        if (target := self._away.pop(fault.name, None)) is not None and not self.is_away(target):
            subject.restore(target)
        if (down := self._links_down.pop(fault.name, None)) is not None:
            for attachment in down.attachments:
                if not self.is_down(attachment.name):
                    subject.door.link_up(attachment)

    def _fit(self, entry: _Entry) -> None:
        """Put it on the units that it is about, and nowhere else."""
        wanted = set(self._subject.units_at(entry.fault.target, entry.fault.lun))
        for served in entry.units - wanted:
            served.faults.remove(entry.fault.name)
            served.changed()
        for served in wanted:
            served.faults.add(entry.active)
            served.changed()
        entry.units = wanted

    def _f_ports(self, fault: Fault) -> list[int]:
        login = None if fault.wwpn is None else self._subject.switch.find(fault.wwpn)
        return [
            f_port
            for f_port, attachment in self._subject.door.attachments.items()
            if attachment.name == fault.holder or (login is not None and login.f_port == f_port)
        ]

    def _n_ports(self, fault: Fault) -> list[NPort]:
        """Raises VhostfcError when nobody is there."""
        if fault.wwpn is not None:
            login = self._subject.switch.find(fault.wwpn)
            ports = [login] if login is not None else []
        else:
            ports = [port for f_port in self._f_ports(fault) for port in self._subject.switch.behind(f_port)]
        if not ports:
            raise VhostfcError(f"{fault.wwpn or fault.holder} is not logged in")
        return ports


def _wait(fault: Fault) -> float:
    return fault.after if fault.at is None else max(0.0, fault.at - time.time())


def _shown(entry: _Entry) -> Json:
    fault = entry.fault
    told: Json = {"name": fault.name, "what": fault.what.value, "state": entry.state.value, "hits": entry.active.hits}
    if entry.state is State.ACTIVE:
        told["since"] = entry.since
    if entry.error:
        told["error"] = entry.error
    told["source"] = entry.source
    return told
