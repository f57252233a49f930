"""What a fabric's configuration means for what is running: zones, units, and what cannot change under way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vhostfc.config import FabricConfig, FcoeConfig, TargetConfig, UnitConfig
from vhostfc.daemon.fabric_maker import key
from vhostfc.daemon.fabric_units import Key, Served
from vhostfc.errors import ConfigError
from vhostfc.fabric.link import MediumKind
from vhostfc.fabric.zoning import Zone, Zoning


def zoning_of(config: FabricConfig) -> Zoning:
    return Zoning(Zone(zone.name, zone.members) for zone in config.zones)


def units_of(config: FabricConfig) -> dict[Key, tuple[TargetConfig, UnitConfig]]:
    """Each medium once, with the first place where it is listed."""
    units: dict[Key, tuple[TargetConfig, UnitConfig]] = {}
    for target in config.targets:
        for unit in target.units:
            units.setdefault(key(target, unit), (target, unit))
    return units


def check_change(config: FabricConfig, unit: UnitConfig, served: Served) -> None:
    """Raises ConfigError for what cannot change while a unit is served."""
    medium, where = served.medium, f"{config.path}:{unit.line}"
    again = "remove the unit, reload, and add it again"
    if unit.block_size != medium.block_size:
        raise ConfigError(f"{where}: block_size: is {medium.block_size} and cannot change while it is served; {again}")
    physical = medium.block_size << served.unit.identity.physical_exponent
    if unit.physical_block_size not in {None, physical}:
        raise ConfigError(f"{where}: physical_block_size: is {physical} and cannot change while it is served; {again}")
    if medium.kind in {MediumKind.FILE, MediumKind.DIRECT}:
        if (unit.cache == "none") != (medium.kind is MediumKind.DIRECT):
            raise ConfigError(f"{where}: cache: cannot change while the unit is served; {again}")
        if not unit.read_only and not medium.can_write:
            raise ConfigError(f"{where}: read_only: {medium.name} cannot be written to; {again}")
    size, served_size = unit.size or medium.current_size(), medium.blocks * medium.block_size
    if size // medium.block_size < medium.blocks:
        raise ConfigError(f"{where}: size: cannot shrink a unit, from {served_size} to {size} bytes")
    if size > served_size and unit.read_only and medium.current_size() < size:
        raise ConfigError(f"{where}: size: {medium.name} is read-only and has fewer than {size} bytes")


def check_fixed(old: FabricConfig, new: FabricConfig) -> None:
    """Raises ConfigError for what cannot change in a running fabric: who it is, and where."""
    fixed = [name for name in ("name", "socket", "control", "wwn") if getattr(old, name) != getattr(new, name)]
    if fixed:
        what = " and ".join(fixed)
        raise ConfigError(f"{new.path}:1: {what}: cannot change while the fabric runs; restart it")


def check_attachments(config: FabricConfig, open_ones: Mapping[str, FcoeConfig]) -> None:
    """Raises ConfigError for an FCoE attachment that is in use and described differently now."""
    for new in config.fcoe:
        old = open_ones.get(new.where)
        if old is not None and replace(old, line=new.line) != new:
            raise ConfigError(
                f"{config.path}:{new.line}: fcoe: {new.where} cannot change while it is in use;"
                " remove it, reload, and add it again"
            )


def check_places(old: FabricConfig, new: FabricConfig) -> None:
    """Raises ConfigError where another unit shall stand at a LUN at once.

    A guest that has the one open would write to the other before anybody could tell it; when the LUN is
    empty in between, it is told that the one is gone.
    """
    before = {(target.wwpn, unit.lun): key(target, unit) for target in old.targets for unit in target.units}
    for target in new.targets:
        for unit in target.units:
            kind, where = before.get((target.wwpn, unit.lun), key(target, unit))
            if (kind, where) != key(target, unit):
                raise ConfigError(
                    f"{new.path}:{unit.line}: lun: {unit.lun} of {target.name!r} is another unit now ({kind} {where});"
                    " guests would take the one for the other: remove that, reload, and add this"
                )
