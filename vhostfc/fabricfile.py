"""A fabric's file: the switch, its attachments, targets with their units, zones and faults."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vhostfc.fc.fcoe import FC_MAP
from vhostfc.fc.wwn import Wwn
from vhostfc.overlay import Overlay, lay
from vhostfc.tomlfile import Document, Table
from vhostfc.values import (
    ACCESS,
    LUN_MAX,
    boolean,
    choice,
    control_in,
    derived_wwn,
    fc_map,
    integer,
    interface_name,
    mac,
    path_in,
    seconds,
    sector,
    size,
    socket_in,
    state_directory,
    text,
    unit_place,
    wwn,
)

if TYPE_CHECKING:
    from vhostfc.fabric.faults import Fault

#: What a null unit pretends to hold when the file does not say.
NULL_SIZE = 1 << 30


@dataclass(frozen=True, slots=True)
class UnitConfig:
    """A logical unit of a target.

    Its medium is `file`, `block` or `null` when one of them is set, else memory of `size` bytes.
    size is None only where the medium tells it, physical_block_size where the kind of medium decides.
    allow None: no masking.  share: (name of a target, LUN), where the unit has its home, and home: the
    WWPN and LUN of that; the rest is as it is there.
    """

    lun: int
    line: int
    size: int | None = None
    file: Path | None = None
    block: Path | None = None
    null: bool = False
    block_size: int = 512
    physical_block_size: int | None = None
    cache: str = "writeback"
    read_only: bool = False
    allow: frozenset[Wwn] | None = None
    share: tuple[str, int] | None = None
    home: tuple[Wwn, int] | None = None


@dataclass(frozen=True, slots=True)
class TargetConfig:
    """A target port of an array and its units.  group, access: its target port group and the state of that."""

    name: str
    wwpn: Wwn
    wwnn: Wwn
    units: tuple[UnitConfig, ...]
    line: int
    group: int = 1
    access: str = "optimized"


@dataclass(frozen=True, slots=True)
class ZoneConfig:
    """Port_Names that see each other."""

    name: str
    members: frozenset[Wwn]
    line: int


@dataclass(frozen=True, slots=True)
class FcoeConfig:
    """An attachment of the fabric to an Ethernet segment: a unix datagram socket, or a network interface.

    mac: the FCF's own; None for the interface's.  period: FKA_ADV_Period in seconds.
    """

    line: int
    socket: Path | None = None
    interface: str | None = None
    mac: bytes | None = None
    fc_map: int = FC_MAP
    priority: int = 128
    period: float = 8.0

    @property
    def where(self) -> str:
        """What people call it."""
        return str(self.socket or self.interface)


@dataclass(frozen=True, slots=True)
class FabricConfig:
    """The software fabric.  wwn: Fabric_Name.  No zone at all: everybody sees everybody.

    seed: of the dice that faults roll.  document: what it was read from.
    """

    path: Path
    name: str
    socket: Path
    control: Path
    wwn: Wwn
    state: Path
    targets: tuple[TargetConfig, ...] = ()
    zones: tuple[ZoneConfig, ...] = ()
    fcoe: tuple[FcoeConfig, ...] = ()
    fence_timeout: float = 2.0
    faults: tuple[Fault, ...] = ()
    seed: int = 0
    document: Document | None = field(default=None, compare=False, repr=False)


def read(original: Document, environ: Mapping[str, str], overlay: Overlay | None = None) -> FabricConfig:
    document, gone_zones, gone_units = original, set[str](), set[tuple[str, int]]()
    if overlay is not None:
        document = original.copy()
        gone_zones, gone_units = lay(overlay, document.values)
    root, name = document.root, document.path.stem
    path = path_in(document.path)
    state = root.get("state", path, state_directory(name, environ))
    fabric = root.table("fabric")
    socket = fabric.get("socket", path, Path("/run/vhostfc/fabric.sock"))
    config = FabricConfig(
        path=document.path,
        name=name,
        socket=socket,
        control=control_in(fabric, socket),
        wwn=fabric.get("wwn", wwn, derived_wwn(name)),
        fence_timeout=fabric.get("fence_timeout", seconds(0.1, 60), 2.0),
        targets=(targets := _shared(document, tuple(_target(table, gone_units) for table in root.tables("target")))),
        zones=tuple(zone for zone in map(_zone, root.tables("zone")) if zone.name not in gone_zones),
        faults=_faults(root, targets),
        seed=fabric.get("seed", integer(0, (1 << 63) - 1), 0),
        fcoe=tuple(_fcoe(table, name) for table in root.tables("fcoe")),
        state=state,
        document=original,
    )
    fabric.finish()
    root.finish()
    _check_names(document, config)
    _check_attachments(document, config)
    _check_media(document, config)
    _check_groups(document, config)
    document.raise_problems()
    return config


def _faults(root: Table, targets: tuple[TargetConfig, ...]) -> tuple[Fault, ...]:
    if not any(True for _ in root.tables("fault")):
        return ()
    # Adapters read files too, and have no use for all that faults know of.
    from vhostfc import faultfile  # noqa: PLC0415

    return faultfile.read(root, {target.name: target.wwpn for target in targets})


def _target(table: Table, gone: Collection[tuple[str, int]] = ()) -> TargetConfig:
    config = TargetConfig(
        name=table.need("name", text, "", 'name = "array-a"'),
        wwpn=table.need("wwpn", wwn, Wwn(0), 'wwpn = "50:06:01:60:00:00:00:01"'),
        wwnn=table.need("wwnn", wwn, Wwn(0), 'wwnn = "50:06:01:60:00:00:00:00"'),
        units=tuple(_unit(unit) for unit in table.tables("unit")),
        line=table.line,
        group=table.get("group", integer(1, 0xFFFF), 1),
        access=table.get("access", choice(*ACCESS), "optimized"),
    )
    table.finish()
    seen: dict[int, int] = {}
    for index, unit in enumerate(config.units):
        if unit.lun in seen:
            where = (*table.where, "unit", index, "lun")
            table.document.problem(where, f"{unit.lun} is already the LUN of the unit in line {seen[unit.lun]}")
        elif unit.lun >= 0:
            seen[unit.lun] = unit.line
    return replace(config, units=tuple(unit for unit in config.units if (config.name, unit.lun) not in gone))


def _unit(table: Table) -> UnitConfig:
    path = path_in(table.document.path)
    lun = table.need("lun", integer(0, LUN_MAX), -1, f"lun = 0, a number up to {LUN_MAX}")
    capacity = table.get("size", size, None)
    file: Path | None = table.get("file", path, None)
    block: Path | None = table.get("block", path, None)
    null = table.get("null", boolean, False)
    share = table.get("share", unit_place, None)
    block_size = table.get("block_size", sector, 512)
    physical = table.get("physical_block_size", sector, None)
    if physical is not None and physical < block_size:
        table.problem("physical_block_size", f"{physical} is less than block_size, {block_size}")
    cache = table.get("cache", choice("writeback", "none"), "writeback")
    allow = table.each("allow", wwn)
    media = [key for key in ("file", "block", "share") if table.has(key)] + ["null"] * null
    if len(media) > 1:
        table.problem(media[1], f"and {media[0]} exclude each other: a unit has one medium")
    elif not media and not table.has("size"):
        media_allowed = 'size = "1GiB" (memory), file = "...", block = "/dev/...", null = true or share = "array-a:0"'
        table.document.problem(table.where, f"has no medium; write one of {media_allowed}")
    for told in ("size", "block_size", "physical_block_size", "cache", "read_only") if table.has("share") else ():
        if table.has(told):
            table.problem(told, "does not go with share: it is as at the unit's home")
    if table.has("size") and table.has("block"):
        table.problem("size", "does not go with block: the device tells its size")
    if table.has("cache") and not any(table.has(key) for key in ("file", "block", "share")):
        table.problem("cache", "is for file and block; memory has no cache")
    if capacity is not None and capacity % block_size:
        table.problem("size", f"{capacity} bytes is not a multiple of block_size, {block_size}")
    config = UnitConfig(
        lun=lun,
        size=NULL_SIZE if null and capacity is None else capacity,
        file=file,
        block=block,
        null=null,
        block_size=block_size,
        physical_block_size=physical,
        cache=cache,
        read_only=table.get("read_only", boolean, False),
        allow=None if allow is None else frozenset(allow),
        share=share,
        line=table.line,
    )
    table.finish()
    return config


def _zone(table: Table) -> ZoneConfig:
    members = table.each("members", wwn)
    if members is None:
        table.problem("members", 'is missing; write members = ["50:...", "50:..."]')
    config = ZoneConfig(
        name=table.need("name", text, "", 'name = "vm1"'), members=frozenset(members or ()), line=table.line
    )
    table.finish()
    return config


def _fcoe(table: Table, fabric: str) -> FcoeConfig:
    socket = table.get("socket", socket_in(table.document.path), None)
    interface = table.get("interface", interface_name, None)
    if (socket is None) == (interface is None) and table.has("socket") == table.has("interface"):
        what = 'socket = "..." (for QEMU\'s -netdev dgram) or interface = "eth1"'
        table.document.problem(table.where, f"is at one place; write one of {what}")
    derived = hashlib.sha256(f"{fabric} {socket}".encode(errors="surrogateescape")).digest()
    config = FcoeConfig(
        line=table.line,
        socket=socket,
        interface=interface,
        # of a socket: locally administered, and the same each time
        mac=table.get("mac", mac, None if interface else bytes([0x02, *derived[:5]])),
        fc_map=table.get("fc_map", fc_map, FC_MAP),
        priority=table.get("priority", integer(0, 255), 128),
        period=table.get("fka_adv_period", seconds(0.5, 90), 8.0),
    )
    table.finish()
    return config


# ---------------------------------------------------------------- what only the whole file shows


def _shared(document: Document, targets: tuple[TargetConfig, ...]) -> tuple[TargetConfig, ...]:
    """Units that are somewhere else at home are as they are there."""
    homes = {(target.name, unit.lun): (target.wwpn, unit) for target in targets for unit in target.units}

    def settle(index: int, number: int, unit: UnitConfig) -> UnitConfig:
        if unit.share is None:
            return unit
        wwpn, home = homes.get(unit.share, (None, None))
        if home is None or wwpn is None or home.share is not None:
            name = f"{unit.share[0]}:{unit.share[1]}"
            what = "is shared itself; write the LUN where it has its medium" if home else "is not in this file"
            document.problem(("target", index, "unit", number, "share"), f"the unit {name} {what}")
            return unit
        there = (wwpn, home.lun)
        return replace(home, lun=unit.lun, line=unit.line, allow=unit.allow, share=unit.share, home=there)

    return tuple(
        replace(target, units=tuple(settle(index, number, unit) for number, unit in enumerate(target.units)))
        for index, target in enumerate(targets)
    )


def _check_names(document: Document, config: FabricConfig) -> None:
    ports: dict[Wwn, int] = {}
    names: dict[tuple[str, str], int] = {}
    for index, target in enumerate(config.targets):
        if target.wwpn in ports:
            where = ("target", index, "wwpn")
            document.problem(where, f"{target.wwpn} is already the WWPN of the target in line {ports[target.wwpn]}")
        elif target.wwpn:
            ports[target.wwpn] = target.line
    for kind in ("target", "zone"):
        items: tuple[TargetConfig | ZoneConfig, ...] = config.targets if kind == "target" else config.zones
        for index, item in enumerate(items):
            if (kind, item.name) in names:
                also = f"the {kind} in line {names[kind, item.name]}"
                document.problem((kind, index, "name"), f"{item.name!r} is already the name of {also}")
            elif item.name:
                names[kind, item.name] = item.line


def _check_attachments(document: Document, config: FabricConfig) -> None:
    seen: dict[str, int] = {}
    for index, one in enumerate(config.fcoe):
        key = "socket" if one.socket else "interface"
        if one.where in seen:
            document.problem(("fcoe", index, key), f"{one.where} is already in line {seen[one.where]}")
        elif one.socket in (config.socket, config.control):
            document.problem(("fcoe", index, key), f"{one.where} is the path of another socket of this fabric")
        else:
            seen[one.where] = one.line


def _check_media(document: Document, config: FabricConfig) -> None:
    """One medium may be a unit of several targets (several paths), but then it is one and the same unit."""
    seen: dict[Path, UnitConfig] = {}
    for index, target in enumerate(config.targets):
        for number, unit in enumerate(target.units):
            medium = unit.file or unit.block
            if medium is None:
                continue
            other = seen.setdefault(medium, unit)
            for key in ("size", "block_size", "physical_block_size", "cache", "read_only"):
                if getattr(other, key) != getattr(unit, key):
                    document.problem(
                        ("target", index, "unit", number, key),
                        f"differs from the unit in line {other.line}, which has the same medium {medium}",
                    )


def _check_groups(document: Document, config: FabricConfig) -> None:
    """The state is the group's: all target ports of a group have the same one."""
    groups: dict[int, TargetConfig] = {}
    for index, target in enumerate(config.targets):
        first = groups.setdefault(target.group, target)
        if first.access != target.access:
            document.problem(
                ("target", index, "access"),
                f"differs from the target in line {first.line}, which is in the same group {target.group}",
            )
