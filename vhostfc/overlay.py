"""Changes to a fabric that were not written into its file: zones, masks, units, states of target port groups.

An overlay is laid over the file's values before they are checked, so that a change has to obey the
same rules as the file.  Each thing is in it once, with what it shall be; a later overlay goes over an
earlier one.  As JSON it is what the fabric keeps in its state directory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Values = dict[str, Any]
KINDS = ("zone", "mask", "unit", "access")


@dataclass(slots=True)
class Overlay:
    """None takes a thing away: a zone, a mask (everybody sees the unit then), a unit.

    zone: members, by name.  mask: World Wide Names, and unit: the values of a [[target.unit]] without its
    LUN; both by "TARGET:LUN" with the target's name.  access: the state, by the group's number.
    """

    zone: dict[str, list[str] | None] = field(default_factory=dict)
    mask: dict[str, list[str] | None] = field(default_factory=dict)
    unit: dict[str, Values | None] = field(default_factory=dict)
    access: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(getattr(self, kind) for kind in KINDS)

    def as_json(self) -> Values:
        return {kind: dict(getattr(self, kind)) for kind in KINDS if getattr(self, kind)}

    @classmethod
    def from_json(cls, values: object) -> Overlay:
        """Raises ValueError for what as_json() cannot have said."""
        if not isinstance(values, dict) or not values.keys() <= set(KINDS):
            raise ValueError(f"expected an object with {', '.join(KINDS)}")
        for kind, things in values.items():
            kinds = {"zone": list, "mask": list, "unit": dict, "access": str}
            if not isinstance(things, dict) or not all(
                isinstance(one, kinds[kind]) or (one is None and kind != "access") for one in things.values()
            ):
                raise ValueError(f"{kind}: expected an object of {kinds[kind].__name__}s by their names")
        return cls(**values)

    def keys(self) -> list[str]:
        """What is in it, in words: "zone vm1"."""
        return [f"{kind} {name}" for kind in KINDS for name in getattr(self, kind)]

    def without(self, keys: Iterable[str]) -> Overlay:
        gone = set(keys)
        kept = {k: {n: v for n, v in getattr(self, k).items() if f"{k} {n}" not in gone} for k in KINDS}
        return Overlay(**kept)


def merged(overlays: Iterable[Overlay]) -> Overlay:
    """One that says what all of them say, the last one first to be heard."""
    result = Overlay()
    for overlay in overlays:
        for kind in KINDS:
            getattr(result, kind).update(getattr(overlay, kind))
    return result


def lay(overlay: Overlay, values: Values) -> tuple[set[str], set[tuple[str, int]]]:
    """Change a file's values; what they are not made for is left for the file's own check to find.

    Returns what has to be left out afterwards: names of zones, and units by target name and LUN.
    Nothing moves to another index, so that every line number stays right.
    """
    zones, targets = _tables(values, "zone"), _tables(values, "target")
    gone = {name for name, members in overlay.zone.items() if members is None}
    for name, members in overlay.zone.items():
        if members is None:
            continue
        found = next((zone for zone in zones if zone.get("name") == name), None)
        if found is None:
            zones.append(found := {"name": name})
        found["members"] = list(members)
    left_out: set[tuple[str, int]] = set()
    for target in targets:
        if (group := str(target.get("group", 1))) in overlay.access:
            target["access"] = overlay.access[group]
        units, here = _tables(target, "unit"), target.get("name")
        for key, told in overlay.unit.items():
            owner, lun = split(key)
            if owner != here:
                continue
            at = [i for i, one in enumerate(units) if one.get("lun") == lun]
            if told is None:
                left_out.add((owner, lun))
            elif at:
                units[at[0]].clear()
                units[at[0]].update({"lun": lun, **told})
            else:
                units.append({"lun": lun, **told})
        for unit in units:
            place = f"{here}:{unit.get('lun')}"
            if place in overlay.mask:
                unit.pop("allow", None)
                if (allow := overlay.mask[place]) is not None:
                    unit["allow"] = list(allow)
    return gone, left_out


def split(key: str) -> tuple[str, int]:
    """A unit's "TARGET:LUN".  Raises ValueError."""
    name, _, lun = key.rpartition(":")
    if not name or not lun.isdecimal():
        raise ValueError(f'{key!r}: expected a target\'s name and a LUN, like "array-a:0"')
    return name, int(lun)


def _tables(values: Mapping[str, Any], key: str) -> list[Values]:
    """The tables of an array of tables, which is made when there is none."""
    assert isinstance(values, dict)
    tables = values.setdefault(key, [])
    return tables if isinstance(tables, list) and all(isinstance(one, dict) for one in tables) else []
