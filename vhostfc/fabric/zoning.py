"""Zoning: which ports of a fabric see each other (FC-GS-7 6.4, in its smallest useful form).

A zone is a set of Port_Names; ports that share a zone see each other, in the name server and for
frames.  A fabric without any zone has no zoning: everybody sees everybody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from vhostfc.fc.wwn import Wwn


@dataclass(frozen=True, slots=True)
class Zone:
    """A name for people, and Port_Names that see each other."""

    name: str
    members: frozenset[Wwn]


class Zoning:
    """The zones in force.  A value: a change is another Zoning, and `affected()` says what it means."""

    def __init__(self, zones: Iterable[Zone] = ()) -> None:
        self.zones = tuple(zones)
        self._zones_of: dict[Wwn, set[int]] = {}
        for index, zone in enumerate(self.zones):
            for member in zone.members:
                self._zones_of.setdefault(member, set()).add(index)

    def visible(self, one: Wwn, other: Wwn) -> bool:
        """May these two talk?  A port always sees itself."""
        if not self.zones or one == other:
            return True
        return not self._zones_of.get(one, _NONE).isdisjoint(self._zones_of.get(other, _NONE))

    def peers(self, wwpn: Wwn) -> set[Wwn] | None:
        """Whom a port sees, itself among them, logged in or not; None: everybody."""
        if not self.zones:
            return None
        zones = self._zones_of.get(wwpn, _NONE)
        return {wwpn}.union(*(self.zones[index].members for index in zones))

    def peers_in(self, wwpn: Wwn, ports: Mapping[Wwn, int]) -> Collection[Wwn]:
        """Those of these ports that a port sees."""
        peers = self.peers(wwpn)
        return ports.keys() if peers is None else [peer for peer in peers if peer in ports]


_NONE: set[int] = set()


def affected(old: Zoning, new: Zoning, ports: Mapping[Wwn, int], targets: Iterable[Wwn]) -> dict[int, list[int]]:
    """What a change of zones means for the ports that are logged in (Port_Name -> N_Port_ID).

    Only pairs with a target among them count: initiators are not told of each other.  Returns, for each
    port that sees others differently from now on, the ids of those others: the pages of the RSCN that
    the change causes at that port.  Costs time in proportion to the pairs that are or were zoned.
    """
    pages: dict[int, set[int]] = {}
    for target in targets:
        before, now = old.peers_in(target, ports), new.peers_in(target, ports)
        for other in set(before) ^ set(now):
            pages.setdefault(ports[target], set()).add(ports[other])
            pages.setdefault(ports[other], set()).add(ports[target])
    return {port_id: sorted(pages[port_id]) for port_id in sorted(pages)}
