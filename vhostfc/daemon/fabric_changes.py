"""Changes that administrators make to a running fabric, and where those that shall last are kept.

`changes.json` in the state directory is an Overlay; it takes the place of the one before by a rename.
The file of the fabric itself is never written: it belongs to whoever wrote it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vhostfc.config import FabricConfig, load_fabric, overlaid
from vhostfc.errors import ConfigError, VhostfcError
from vhostfc.fabric.faults import Fault, What
from vhostfc.fc.wwn import Wwn, WwnError
from vhostfc.overlay import Overlay, split

Json = dict[str, Any]


def path_of(config: FabricConfig) -> Path:
    return config.state / "changes.json"


def load_kept(config: FabricConfig) -> Overlay:
    """The changes that were kept.  Raises ConfigError, which names the file."""
    path = path_of(config)
    try:
        return Overlay.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return Overlay()
    except OSError as error:
        raise ConfigError(f"{path}: the changes that were kept cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(
            f"{path}: the changes that were kept cannot be understood: {error}; mend or remove it"
        ) from None


def load_with_kept(path: Path) -> tuple[FabricConfig, Overlay]:
    """A fabric's file, and the changes that were kept.  Raises ConfigError when they do not go together."""
    config = load_fabric(path)
    kept = load_kept(config)
    with_changes(config, kept)
    return config, kept


def with_changes(config: FabricConfig, overlay: Overlay) -> FabricConfig:
    """Raises ConfigError, which says where the changes come from."""
    if not overlay:
        return config
    try:
        return overlaid(config, overlay)
    except ConfigError as error:
        said = f"{config.path}: with these changes: {', '.join(overlay.keys())}"
        raise ConfigError(said, *error.problems) from None


def keep(config: FabricConfig, overlay: Overlay) -> None:
    """Make this what load_kept() finds.  Raises VhostfcError, and then nothing has changed."""
    path = path_of(config)
    try:
        if not overlay:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("w") as stream:
            json.dump(overlay.as_json(), stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        raise VhostfcError(f"{path}: the change cannot be kept: {error.strerror}") from None


# ---------------------------------------------------------------- orders


def of_order(order: Mapping[str, Any], config: FabricConfig) -> Overlay:
    """What an order means: {"change": "zone" | "mask" | "unit" | "access", ...}.  Raises VhostfcError.

    zone: "zone", and "members", or "add" and "remove", or "gone".  mask: "unit", "allow" (None: all).
    unit: "unit", and "values" of a [[target.unit]], or "gone".  access: "group", "state".
    """
    try:
        match order.get("change"):
            case "zone":
                return Overlay(zone={_text(order, "zone"): _members(order, config)})
            case "mask":
                _unit_in(config, _text(order, "unit"))
                allow = order.get("allow")
                return Overlay(mask={_text(order, "unit"): None if allow is None else _names(allow)})
            case "unit":
                return Overlay(unit={_text(order, "unit"): _values(order, config)})
            case "access":
                group = str(int(_text(order, "group")))
                if all(str(target.group) != group for target in config.targets):
                    raise VhostfcError(f"no target is in target port group {group}")
                return Overlay(access={group: _text(order, "state")})
            case other:
                raise VhostfcError(f"unknown change {other!r}; known: zone, mask, unit, access")
    except ValueError as error:
        raise VhostfcError(str(error)) from None


def of_fault(fault: Fault, config: FabricConfig) -> Overlay:
    """What a fault of the configuration means.  Raises VhostfcError."""
    place = f"{_name_of(config, fault.target)}:{fault.lun}"
    match fault.what:
        case What.ZONE:
            members = None if fault.members is None else _sorted(fault.members)
            if members is None and all(zone.name != fault.zone for zone in config.zones):
                raise VhostfcError(f"no zone is called {fault.zone!r}")
            return Overlay(zone={fault.zone: members})
        case What.MASK:
            _unit_in(config, place)
            return Overlay(mask={place: None if fault.allow is None else _sorted(fault.allow)})
        case What.UNMAP:
            _unit_in(config, place)
            return Overlay(unit={place: None})
        case What.MAP:
            assert fault.share is not None
            if _has_unit(config, place):
                raise VhostfcError(f"there is a unit at {place} already")
            return Overlay(unit={place: {"share": f"{fault.share[0]}:{fault.share[1]}"}})
        case What.ACCESS:
            return Overlay(access={str(fault.group): fault.access})
    raise AssertionError(fault.what)


def _text(order: Mapping[str, Any], key: str) -> str:
    value = order.get(key)
    if not isinstance(value, str | int) or isinstance(value, bool) or not str(value):
        raise ValueError(f"{key}: is {value!r}; expected a text")
    return str(value)


def _names(values: object) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{values!r}: expected World Wide Names")
    try:
        return _sorted({Wwn.parse(value) for value in values})
    except WwnError as error:
        raise ValueError(str(error)) from None


def _sorted(names: frozenset[Wwn] | set[Wwn]) -> list[str]:
    return [str(name) for name in sorted(names)]


def _members(order: Mapping[str, Any], config: FabricConfig) -> list[str] | None:
    zone = next((zone for zone in config.zones if zone.name == order.get("zone")), None)
    if zone is None and (order.get("gone") or "remove" in order):
        raise ValueError(f"no zone is called {order.get('zone')!r}")
    if order.get("gone"):
        return None
    if "members" in order:
        return _names(order["members"])
    now = {str(member) for member in zone.members} if zone else set()
    return sorted(now.difference(_names(order.get("remove", []))).union(_names(order.get("add", []))))


def _values(order: Mapping[str, Any], config: FabricConfig) -> Json | None:
    place = _text(order, "unit")
    if order.get("gone"):
        _unit_in(config, place)
        return None
    values = order.get("values")
    if not isinstance(values, dict):
        raise ValueError(f"values: is {values!r}; expected what a [[target.unit]] may say")
    name, _ = split(place)
    if all(target.name != name for target in config.targets):
        raise ValueError(f"no target is called {name!r}; there are: {', '.join(t.name for t in config.targets)}")
    if _has_unit(config, place):
        raise ValueError(f"there is a unit at {place} already; remove it first")
    return {key: value for key, value in values.items() if key != "lun"}


def _has_unit(config: FabricConfig, place: str) -> bool:
    name, lun = split(place)
    return any(target.name == name and any(unit.lun == lun for unit in target.units) for target in config.targets)


def _unit_in(config: FabricConfig, place: str) -> None:
    if not _has_unit(config, place):
        raise VhostfcError(f"there is no unit at {place}")


def _name_of(config: FabricConfig, target: Wwn | None) -> str:
    return next((one.name for one in config.targets if one.wwpn == target), "")
