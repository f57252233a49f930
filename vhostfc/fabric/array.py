"""What is behind the target ports: which unit is at which LUN, and who may see it (LUN masking).

A unit may be at LUNs of several target ports, which are paths to it.  An initiator that a mask keeps
out finds nothing there, exactly as where there is nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from vhostfc.fabric.target import TargetPort
from vhostfc.fc.wwn import Wwn
from vhostfc.scsi.report import REPORT_LUNS_W_LUN, lun_number
from vhostfc.scsi.server import AbsentUnit, DeviceServer, ReportLunsUnit
from vhostfc.scsi.task import Nexus
from vhostfc.scsi.unit import LogicalUnit


@dataclass(frozen=True, slots=True)
class Place:
    """A unit at a LUN.  allow: the initiator ports that see it, None for all."""

    unit: LogicalUnit
    allow: frozenset[Wwn] | None = None

    def visible(self, wwpn: Wwn) -> bool:
        return self.allow is None or wwpn in self.allow


@dataclass(slots=True)
class _Behind:
    port: TargetPort
    places: dict[int, Place] = field(default_factory=dict)
    well_known: ReportLunsUnit | None = None


class Array:
    """The table of units; the Inventory of all of them."""

    def __init__(self) -> None:
        self._targets: dict[int, _Behind] = {}
        self._absent = AbsentUnit(self)

    def add(self, port: TargetPort) -> None:
        self._targets[port.relative] = _Behind(port)

    def remove(self, port: TargetPort) -> None:
        del self._targets[port.relative]

    def port(self, relative: int) -> TargetPort | None:
        """The target port with this relative identifier."""
        behind = self._targets.get(relative)
        return behind.port if behind else None

    def places(self, port: TargetPort) -> dict[int, Place]:
        """What is behind a target port, by LUN.  A copy."""
        return dict(self._targets[port.relative].places)

    def set_places(self, port: TargetPort, places: dict[int, Place]) -> None:
        """Replace all that is behind a target port."""
        behind = self._targets[port.relative]
        behind.places = dict(places)
        some = next(iter(places.values()), None)
        behind.well_known = ReportLunsUnit(self, some.unit) if some else None

    def resolve(self, port: TargetPort, wwpn: Wwn, lun: bytes) -> DeviceServer:
        """What answers this initiator port at a LUN: a unit, the well-known one, or the one that says there is none."""
        behind = self._targets.get(port.relative)
        if behind is None:
            return self._absent
        if lun == REPORT_LUNS_W_LUN and behind.well_known is not None:
            return behind.well_known
        number = lun_number(lun)
        place = behind.places.get(number) if number is not None else None
        return place.unit if place and place.visible(wwpn) else self._absent

    def seen(self, port: TargetPort, wwpn: Wwn) -> dict[int, LogicalUnit]:
        """The units that an initiator port may see behind a target port, by LUN."""
        behind = self._targets.get(port.relative)
        places = behind.places if behind else {}
        return {lun: place.unit for lun, place in sorted(places.items()) if place.visible(wwpn)}

    def paths(self, unit: LogicalUnit) -> Iterator[tuple[TargetPort, int]]:
        """Where a unit is: target ports and LUNs."""
        for behind in self._targets.values():
            for lun, place in behind.places.items():
                if place.unit is unit:
                    yield behind.port, lun

    # ------------------------------------------------------------ scsi's Inventory

    def luns(self, nexus: Nexus) -> Iterable[int]:
        behind = self._targets.get(nexus.port)
        return list(self.seen(behind.port, initiator(nexus))) if behind else ()

    def units(self, nexus: Nexus) -> Iterable[LogicalUnit]:
        behind = self._targets.get(nexus.port)
        return self.seen(behind.port, initiator(nexus)).values() if behind else ()

    def reported(self, nexus: Nexus) -> None:
        for unit in self.units(nexus):
            unit.inventory_reported(nexus)


def initiator(nexus: Nexus) -> Wwn:
    """The Port_Name in an FCP TransportID (SPC-4 7.6.4.2)."""
    return Wwn.unpack(nexus.initiator[8:16])
