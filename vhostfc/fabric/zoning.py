"""Zoning: which ports of a fabric see each other (FC-GS-7 6.4, in its smallest useful form).

A zone is a set of Port_Names; ports that share a zone see each other, in the name server and for
frames.  A fabric without any zone has no zoning: everybody sees everybody.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
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
        return not self._zones_of.get(one, set()).isdisjoint(self._zones_of.get(other, ()))


def affected(old: Zoning, new: Zoning, ports: Mapping[Wwn, int]) -> dict[int, list[int]]:
    """What a change of zones means for the ports that are logged in (Port_Name -> N_Port_ID).

    Returns, for each port that sees others differently from now on, the ids of those others: the
    pages of the RSCN that the change causes at that port.
    """
    pages: dict[int, list[int]] = {}
    for (one, one_id), (other, other_id) in itertools.combinations(sorted(ports.items()), 2):
        if old.visible(one, other) != new.visible(one, other):
            pages.setdefault(one_id, []).append(other_id)
            pages.setdefault(other_id, []).append(one_id)
    return pages
