"""What the guest can reach: the port's topology turned into target numbers, LUNs and routes.

The port's snapshot is the only truth.  `reconcile()` compares it with what the workers and the guest
know and makes up the difference: target numbers are bound to remote WWPNs, each unit gets a task that
keeps its route in force in every worker, and the guest hears of what came and went.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
import trio

from vhostfc.daemon.guestevents import GuestEvent, Kind
from vhostfc.daemon.workers import Workers
from vhostfc.errors import VhostfcError
from vhostfc.fc.bindings import Bindings
from vhostfc.fc.wwn import Wwn
from vhostfc.ports.base import InFlight, Port, RemotePortState, Route, RouteChange, Topology, Unit


def lun_number(lun: bytes) -> int | None:
    """The number of a single-level LUN (SAM-5 4.7.7.2 peripheral with bus 0, 4.7.7.3 flat space), else None."""
    method, high = lun[0] >> 6, lun[0] & 0x3F
    if any(lun[2:]) or method > 1 or (method == 0 and high):
        return None
    return high << 8 | lun[1]


def lun_bytes(number: int) -> bytes:
    """The usual encoding: peripheral below 256, flat from there."""
    return bytes([0x40 | number >> 8 if number > 255 else 0, number & 0xFF, 0, 0, 0, 0, 0, 0])


@dataclass(eq=False)
class Known:
    """A unit that the guest can address."""

    unit: Unit
    target: int
    lun: int
    nexus: int
    following: trio.CancelScope | None = None
    retired: trio.Event = field(default_factory=trio.Event)


class Units:
    """See the head of the file.  `announce` is told of what came and went; `fast_path` off routes nothing."""

    def __init__(
        self,
        *,
        workers: Workers,
        bindings: Bindings,
        save_bindings: Callable[[], None],
        announce: Callable[[GuestEvent], None],
        fast_path: bool,
        nursery: trio.Nursery,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._workers = workers
        self._bindings = bindings
        self._save_bindings = save_bindings
        self._announce = announce
        self._fast_path = fast_path
        self._nursery = nursery
        self._log = log
        self._port: Port | None = None
        self._saved = len(bindings)
        self._started = False
        self._targets: dict[int, Wwn] = {}
        self._known: dict[tuple[int, int], Known] = {}
        self._nexus = itertools.count(1)
        self._one_at_a_time = trio.Lock()
        self._complained: set[object] = set()

    def wwpn(self, target: int) -> Wwn | None:
        """The remote port behind a target number, if it is there now."""
        return self._targets.get(target)

    def unit(self, target: int, lun: int) -> Unit | None:
        """The unit that the fabric shows at this address."""
        known = self._known.get((target, lun))
        return known.unit if known else None

    def luns(self, target: int) -> frozenset[bytes]:
        """The LUNs of a target, as its REPORT LUNS gave them."""
        return frozenset(known.unit.lun for known in self._known.values() if known.target == target)

    def status(self) -> list[dict[str, object]]:
        """For `vhostfc status`."""
        return [
            {
                "target": target,
                "wwpn": str(wwpn),
                "luns": sorted(known.lun for known in self._known.values() if known.target == target),
            }
            for target, wwpn in sorted(self._targets.items())
        ]

    def address(self, unit: Unit) -> tuple[int, int] | None:
        """Target and LUN number under which the guest knows a unit."""
        for known in self._known.values():
            if known.unit == unit:
                return known.target, known.lun
        return None

    def attach(self, port: Port) -> None:
        """This port is logged in: what it sees is what there is, until withdraw()."""
        self._port = port

    async def reconcile(self) -> None:
        """Bring workers and guest to what the port sees now; without a port there is nothing to do."""
        async with self._one_at_a_time:
            port = self._port
            if port is None:
                return
            targets, units = self._wanted(port.snapshot())
            for key, known in list(self._known.items()):
                unit = units.get(key)
                if unit != known.unit or not known.unit.is_disk(unit.disk):
                    await self._retire(known)
                elif unit.disk:
                    known.unit = unit  # what could not be asked at first is known now
            for target in sorted(self._targets.keys() - targets.keys()):
                self._log.warning("target left the fabric", target=target, target_wwpn=str(self._targets[target]))
                del self._targets[target]
                await self._workers.set_target(target, present=False)
            for target in sorted(targets.keys() - self._targets.keys()):
                self._log.info("target found", target=target, target_wwpn=str(targets[target]))
                self._targets[target] = targets[target]
                await self._workers.set_target(target, present=True)
            for key, unit in units.items():
                if key not in self._known:
                    self._known[key] = Known(unit, *key, nexus=next(self._nexus))
                    self._announce(GuestEvent(Kind.ARRIVED, *key))
                    self._log.info("unit found", target=key[0], lun=key[1], target_wwpn=str(unit.wwpn))
            for known in self._known.values():
                if known.following is None and self._fast_path:
                    known.following = trio.CancelScope()
                    self._nursery.start_soon(self._follow, port, known)

    async def withdraw(self) -> None:
        """The port is gone: nothing can be reached, and the guest is told so."""
        self._port = None
        async with self._one_at_a_time:
            for known in list(self._known.values()):
                await self._retire(known)
            for target in list(self._targets):
                del self._targets[target]
                await self._workers.set_target(target, present=False)

    def _wanted(self, topology: Topology) -> tuple[dict[int, Wwn], dict[tuple[int, int], Unit]]:
        """Target numbers and units as the topology has them; new remote ports get a number."""
        targets: dict[int, Wwn] = {}
        units: dict[tuple[int, int], Unit] = {}
        for remote in topology.remote_ports:
            if remote.state is RemotePortState.NOT_PRESENT:
                continue
            target = self._bindings.bind(remote.wwpn)
            if target is None:
                self._complain(remote.wwpn, "no target number is left for this port", target_wwpn=str(remote.wwpn))
                continue
            targets[target] = remote.wwpn
            for unit in remote.units:
                number = lun_number(unit.lun)
                if number is None:
                    self._complain(unit, "virtio-scsi cannot address this LUN", unit=str(unit))
                else:
                    units.setdefault((target, number), unit)
        self._save()
        return targets, units

    def _save(self) -> None:
        """At the start an administrator has to hear that it fails; later a guest runs, and needs its disks."""
        if len(self._bindings) != self._saved:
            try:
                self._save_bindings()
            except VhostfcError as error:
                if self._started:
                    self._complain(str(error), "new target numbers hold until a restart only", reason=str(error))
                    return
                raise
            self._saved = len(self._bindings)
        self._started = True

    def _complain(self, what: object, message: str, **fields: str) -> None:
        if what not in self._complained:
            self._complained.add(what)
            self._log.warning(message, **fields)

    async def _retire(self, known: Known) -> None:
        """It keeps its address until its route is closed: what is sent there is meant for this disk, and no other."""
        if known.following is not None:
            known.following.cancel()
            await known.retired.wait()
        del self._known[known.target, known.lun]
        self._log.info("unit gone", target=known.target, lun=known.lun, target_wwpn=str(known.unit.wwpn))
        self._announce(GuestEvent(Kind.REMOVED, known.target, known.lun))

    async def _follow(self, port: Port, known: Known) -> None:
        """Keep one unit's route in force until the unit is retired or its path ends."""
        assert known.following is not None
        try:
            with known.following:
                path = await port.open_path(known.unit)
                if path is None:
                    return
                try:
                    async for change in path.changes():
                        with trio.CancelScope(shield=True):
                            await self._apply(known, change)
                finally:
                    with trio.CancelScope(shield=True):
                        await self._apply(known, RouteChange(Route(gone=True), InFlight.RESET))
                        await path.aclose()
        finally:
            known.following = None
            known.retired.set()
            known.retired = trio.Event()

    async def _apply(self, known: Known, change: RouteChange) -> None:
        """Put a route into force in every worker, then acknowledge it."""
        try:
            await self._workers.set_route(known.target, known.lun, known.nexus, change.route, change.in_flight)
        finally:
            if change.route.medium is not None:
                change.route.medium.close()
        change.acknowledge()
