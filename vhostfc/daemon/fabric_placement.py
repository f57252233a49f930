"""Where things are in a running fabric: its target ports on the switch, and units at their LUNs.

What is wanted is a configuration, as it is in force with the changes of administrators and of faults; what is there is
brought to it, and those for whom that makes a difference are told: nexuses begin and end, inventories change.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping

from vhostfc.config import FabricConfig, TargetConfig, UnitConfig
from vhostfc.daemon.fabric_maker import Maker, key
from vhostfc.daemon.fabric_units import Key, Served
from vhostfc.daemon.fencing import Verdict
from vhostfc.fabric.array import Array, Place
from vhostfc.fabric.rations import Rations
from vhostfc.fabric.sessions import Exchange, Session, Urgent
from vhostfc.fabric.switch import Output, Switch
from vhostfc.fabric.target import TargetPort
from vhostfc.fc.wwn import Wwn
from vhostfc.scsi.alua import AccessState
from vhostfc.scsi.inquiry import TargetPort as IdentityPort
from vhostfc.scsi.sense import Asc
from vhostfc.scsi.unit import LogicalUnit


class Placement:
    """targets: the target ports, by Port_Name.  served: the units, by key; all that are known, placed or not.

    kick: called when sessions have ended, which are in `urgent` then.
    """

    def __init__(
        self,
        switch: Switch,
        array: Array,
        *,
        rations: Rations[Exchange],
        urgent: deque[Urgent],
        kick: Callable[[], None],
    ) -> None:
        self.targets: dict[Wwn, TargetPort] = {}
        self.served: dict[Key, Served] = {}
        self._switch = switch
        self._array = array
        self._rations = rations
        self._urgent = urgent
        self._kick = kick
        self._relative: dict[Wwn, int] = {}
        self._names: dict[int, Wwn] = {}
        self._units: dict[LogicalUnit, Served] = {}

    # ------------------------------------------------------------ what is here

    def name(self, number: int) -> Wwn:
        """The Port_Name of the target port that has, or had, this relative identifier."""
        return self._names[number]

    def add(self, units: Mapping[Key, Served]) -> None:
        """Units that are new; they are at no LUN yet."""
        self.served.update(units)
        self._units.update((served.unit, served) for served in units.values())

    def remove(self, served: Served) -> None:
        """A unit that is at no LUN any more and that nobody has open."""
        del self.served[served.key], self._units[served.unit]

    def number(self, target: Wwn) -> int:
        """The relative identifier of a target port; one that was in use once is not given to another."""
        number = self._relative.setdefault(target, len(self._relative) + 1)
        self._names[number] = target
        return number

    def served_of(self, unit: LogicalUnit) -> Served | None:
        """The unit as it is served, None for one that was taken away."""
        return self._units.get(unit)

    def reachable(self, target: TargetPort, session: Session | None, lun: bytes) -> Served | None:
        """The unit at this LUN, if the session still is one, and zones and masks let it through."""
        if session is None or not session.image or target.sessions.get(session.port_id) is not session:
            return None
        if not self._switch.visible(session.wwpn, target.wwpn):
            return None
        server = self._array.resolve(target, session.wwpn, lun)
        return self.served_of(server) if isinstance(server, LogicalUnit) else None

    def verdict(self, served: Served, target: TargetPort, session: Session, lun: bytes) -> Verdict:
        """What fencing asks for each opening, whenever anything may have changed."""
        if self.reachable(target, session, lun) is not served:
            return Verdict(gone=True)
        unit = served.unit
        mask = bytes(32) if served.ordered or served.faults else unit.verdict(session.nexus)
        return Verdict(mask, unit.mode.write_protected, unit.blocks, losses=served.losses.known(session.nexus))

    # ------------------------------------------------------------ bringing it to what is wanted

    def set_targets(self, config: FabricConfig, is_away: Callable[[Wwn], bool]) -> list[Output]:
        """Target ports come and go; one with another node name is another one.

        is_away: is this one off the fabric for a while, though it is wanted?
        """
        outputs: list[Output] = []
        wanted = {target.wwpn: target for target in config.targets}
        for wwpn, port in list(self.targets.items()):
            target = wanted.get(wwpn)
            if target is not None and target.wwnn == port.wwnn:
                port.name = target.name
                continue
            del self.targets[wwpn]
            if not is_away(wwpn):
                outputs += self._switch.remove_target(port)
            for port_id in list(port.sessions):
                port.forget(port_id)
            self._kick()
            self._array.remove(port)
        for wwpn, target in wanted.items():
            if wwpn not in self.targets:
                relative = self.number(wwpn)
                port = TargetPort(
                    target.name,
                    wwpn,
                    target.wwnn,
                    relative,
                    rations=self._rations,
                    urgent=self._urgent,
                    clock=time.time,
                )
                self.targets[wwpn] = port
                self._array.add(port)
                if not is_away(wwpn):
                    outputs += self._switch.add_target(port)
        return outputs

    def withdraw(self, target: Wwn) -> list[Output]:
        """A target port leaves the fabric; its units stay what they are."""
        port = self.targets.get(target)
        if port is None or self._switch.target(port.port_id) is not port:
            return []
        outputs = self._switch.remove_target(port)
        for port_id in list(port.sessions):
            port.forget(port_id)
        return outputs

    def restore(self, target: Wwn) -> list[Output]:
        """It is back.  Raises ValueError when somebody logged in under its name."""
        port = self.targets.get(target)
        if port is None or self._switch.target(port.port_id) is port:
            return []
        return self._switch.add_target(port)

    def units_at(self, view: FabricConfig, target: Wwn | None, lun: int | None) -> list[Served]:
        """The units at these LUNs of these target ports (None: all)."""
        keys = {
            key(config, unit)
            for config in view.targets
            if target in {None, config.wwpn}
            for unit in config.units
            if lun in {None, unit.lun}
        }
        return [served for unit_key, served in self.served.items() if unit_key in keys]

    def set_units(
        self, view: FabricConfig, wanted: dict[Key, tuple[TargetConfig, UnitConfig]], maker: Maker
    ) -> set[LogicalUnit]:
        """Sizes, write protection and names of what is served; returns the units that have grown."""
        resized: set[LogicalUnit] = set()
        access = {one.group: AccessState[one.access.upper().replace("-", "_")] for one in view.targets}
        paths: dict[Key, list[TargetConfig]] = {}
        for one in view.targets:
            for unit in one.units:
                ports_of = paths.setdefault(key(one, unit), [])
                if one not in ports_of[-1:]:
                    ports_of.append(one)
        for unit_key, (target, config) in wanted.items():
            served = self.served[unit_key]
            medium = served.medium
            if medium.read_only != config.read_only:
                medium.read_only = config.read_only
                before = served.unit
                del self._units[before]
                served.unit = maker.unit(medium, before.identity.naa[0], target.wwnn, config.physical_block_size)
                served.unit.succeed(before)
                self._units[served.unit] = served
            size = config.size or medium.current_size()
            if size // medium.block_size > medium.blocks:
                medium.grow(size)
                served.unit.resize(medium.blocks)
                resized.add(served.unit)
            ports = tuple(
                IdentityPort(self._relative[other.wwpn], other.wwpn.pack(), other.group)
                for other in paths.get(unit_key, ())
            )
            served.unit.set_ports(ports)
            served.unit.set_access(access)
        return resized

    def place(self, view: FabricConfig, resized: Collection[LogicalUnit] = ()) -> list[Output]:
        """Put every unit that is ready at its LUNs, and tell those for whom that makes a difference."""
        outputs: list[Output] = []
        for config in view.targets:
            target = self.targets[config.wwpn]
            was, places = self._array.places(target), dict[int, Place]()
            for unit in config.units:
                served = self.served[key(config, unit)]
                if served.ready:
                    places[unit.lun] = Place(served.unit, unit.allow)
            changed = [lun for lun in was.keys() | places.keys() if was.get(lun) != places.get(lun)]
            grown = [place for place in places.values() if place.unit in resized] if resized else []
            if not changed and not grown:
                continue
            self._array.set_places(target, places)
            concerned = []
            for wwpn in self._switch.zoning.peers_in(target.wwpn, self._switch.names.by_name):
                if any(_seen(was, lun, wwpn) is not _seen(places, lun, wwpn) for lun in changed):
                    before = {lun: place.unit for lun, place in was.items() if place.visible(wwpn)}
                    self._tell(target, wwpn, before, self._array.seen(target, wwpn))
                    concerned.append(wwpn)
                elif any(place.visible(wwpn) for place in grown):
                    concerned.append(wwpn)
            outputs += self._switch.service_changed(target, concerned)
        return outputs

    def _tell(self, target: TargetPort, wwpn: Wwn, before: dict[int, LogicalUnit], now: dict[int, LogicalUnit]) -> None:
        """Nexuses end and begin; those that stay are told that the inventory is another."""
        session = target.session(wwpn)
        if session is None:
            return
        for unit in {*before.values()} - {*now.values()}:
            unit.detach(session.nexus)
        for unit in {*now.values()} - {*before.values()}:
            unit.attach(session.nexus)
        if now.keys() != before.keys():
            for unit in {*now.values()} & {*before.values()}:
                unit.attention(Asc.REPORTED_LUNS_DATA_HAS_CHANGED, [session.nexus])


def _seen(places: Mapping[int, Place], lun: int, wwpn: Wwn) -> LogicalUnit | None:
    place = places.get(lun)
    return place.unit if place is not None and place.visible(wwpn) else None
