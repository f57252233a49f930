"""The configuration: what an adapter's file and a fabric's file may say, as frozen values.

Strict: an unknown key, a value out of range and a contradiction are errors, and every one of them
is reported at once as `file:line: key: what is wrong and what is allowed`.  Relative paths are
relative to the file.  docs/configuration.md has every key with its meaning.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vhostfc.errors import ConfigError
from vhostfc.fc.fcoe import FC_MAP, is_unicast, parse_mac
from vhostfc.fc.wwn import OUI_QEMU, Wwn, WwnError
from vhostfc.overlay import Overlay, lay
from vhostfc.tomlfile import Document, Table, spelled

if TYPE_CHECKING:
    from vhostfc.fabric.faults import Fault

#: What QEMU can connect to: sockaddr_un.sun_path holds 108 bytes, one of them the final zero (unix(7)).
SUN_PATH_MAX = 107
#: Flat space addressing, the largest single-level LUN that virtio-scsi can carry (SAM-5 4.7.7.3, virtio 1.2 5.6.6.1).
LUN_MAX = 16383
#: What a null unit pretends to hold when the file does not say.
NULL_SIZE = 1 << 30
#: States of a target port group that a file may ask for (SPC-4 5.11.2).
ACCESS = ("optimized", "non-optimized", "standby", "unavailable", "transitioning")

_UNITS = {
    "B": 1,
    **{f"{prefix}iB": 1 << 10 * power for power, prefix in enumerate("KMGTPE", 1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGTPE", 1)},
    "KB": 1000,
}


@dataclass(frozen=True, slots=True)
class PortConfig:
    """Who the adapter is on the fabric."""

    wwpn: Wwn
    wwnn: Wwn


@dataclass(frozen=True, slots=True)
class HbaConfig:
    """A vport of a physical HBA.  hosts, wwpns: its ports that may carry it, fabric: the fabric that they must be in;
    nothing said: any.  dev_loss, fast_io_fail in seconds.  helper: the privileged process's socket."""

    hosts: tuple[str, ...] = ()
    wwpns: tuple[Wwn, ...] = ()
    fabric: Wwn | None = None
    dev_loss: int = 60
    fast_io_fail: int = 5
    keep: bool = False
    guard: bool = True
    survey: float = 30.0
    helper: Path = Path("/run/vhostfc-helper/helper.sock")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """One virtual adapter.  Times are in seconds, but for poll_us.  cpus: none, or one for each worker.

    Its fabric is `emulated`, or `hba`.
    """

    path: Path
    name: str
    ports: tuple[PortConfig, ...]
    emulated: Path | None
    socket: Path
    control: Path
    state: Path
    login: str = "always"
    fast_path: bool = True
    hold_timeout: float = 30.0
    command_timeout: float = 60.0
    workers: int = 1
    cpus: tuple[int, ...] = ()
    poll_us: int = 50
    drain_timeout: float = 1.0
    hba: HbaConfig | None = None


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


def load_adapter(path: Path, *, environ: Mapping[str, str] = os.environ) -> AdapterConfig:
    """Read an adapter's file.  Raises ConfigError with every problem in it."""
    return _adapter(Document(path), environ)


def load_fabric(path: Path, *, environ: Mapping[str, str] = os.environ) -> FabricConfig:
    """Read a fabric's file.  Raises ConfigError with every problem in it."""
    return _fabric(Document(path), environ)


def overlaid(config: FabricConfig, overlay: Overlay, *, environ: Mapping[str, str] = os.environ) -> FabricConfig:
    """What a fabric's file says with these changes.  Raises ConfigError with every problem."""
    assert config.document is not None
    return _fabric(config.document, environ, overlay)


def load(path: Path, *, environ: Mapping[str, str] = os.environ) -> AdapterConfig | FabricConfig:
    """Read a file of either kind; its tables tell which.  Raises ConfigError."""
    document = Document(path)
    fabric = document.values.get("fabric")
    keys = set(document.values) | set(fabric if isinstance(fabric, dict) else ())
    adapter = len(
        keys & {"port", "vhost", "emulated", "login", "fast_path", "hold_timeout", "command_timeout", *_PLACES}
    )
    array = len(keys & {"target", "zone", "fcoe", "socket", "wwn", "fence_timeout", "fault", "seed"})
    if not adapter and not array:
        raise ConfigError(f"{path}:1: neither an adapter's file (with [[port]]) nor a fabric's (with [[target]])")
    return _adapter(document, environ) if adapter >= array else _fabric(document, environ)


# ---------------------------------------------------------------- the two kinds of file


def _adapter(document: Document, environ: Mapping[str, str]) -> AdapterConfig:
    root, name = document.root, document.path.stem
    path = _path_in(document.path)
    state = root.get("state", path, state_directory(name, environ))
    ports: list[PortConfig] = []
    for table in root.tables("port"):
        if ports:
            document.problem(table.where, "is one too many: an adapter has exactly one port for now")
        ports.append(
            PortConfig(
                wwpn=table.need("wwpn", wwn, Wwn(0), 'wwpn = "50:..." (`vhostfc wwn new` makes one)'),
                wwnn=table.need("wwnn", wwn, Wwn(0), 'wwnn = "50:..." (`vhostfc wwn new` makes one)'),
            )
        )
        table.finish()
    if not root.has("port"):
        root.problem("port", "is missing; write [[port]] with wwpn and wwnn (`vhostfc wwn new` makes a pair)")
    fabric, vhost = root.table("fabric"), root.table("vhost")
    socket = vhost.get("socket", _socket_in(document.path), Path(f"/run/vhostfc/{name}/vhost.sock"))
    config = AdapterConfig(
        path=document.path,
        name=name,
        ports=tuple(ports),
        hba=(hba := _hba(fabric)),
        emulated=None if hba else fabric.need("emulated", path, Path(), f"{_EMULATED}; {_OR_HBA}"),
        login=fabric.get("login", choice("always", "start"), "always"),
        fast_path=fabric.get("fast_path", boolean, True),
        hold_timeout=fabric.get("hold_timeout", seconds(0, 3600), 30.0),
        command_timeout=fabric.get("command_timeout", seconds(1, 3600), 60.0),
        socket=socket,
        workers=(workers := vhost.get("workers", integer(1, 64), 1)),
        cpus=_cpus(vhost, workers),
        poll_us=vhost.get("poll_us", integer(0, 100_000), 50),
        drain_timeout=vhost.get("drain_timeout", seconds(0, 60), 1.0),
        control=_control(vhost, socket),
        state=state,
    )
    for table in (fabric, vhost, root):
        table.finish()
    document.raise_problems()
    return config


#: Keys that say which HBA ports carry the vport; one of them makes it an adapter of an HBA.
_PLACES = ("parent", "parent_wwpn", "parents", "fabric_wwn")
#: Keys that are for an adapter of an HBA only.
_OF_HBA = ("dev_loss", "fast_io_fail", "keep", "guard", "survey", "helper")
_EMULATED = 'emulated = "/run/vhostfc/fabric.sock", the fabric\'s socket'
_OR_HBA = 'for an HBA parent = "host5", parent_wwpn, parents or fabric_wwn'


def _hba(fabric: Table) -> HbaConfig | None:
    """The HBA's side of [fabric]; None when it says nothing of an HBA."""
    if not any(fabric.has(key) for key in _PLACES):
        for key in _OF_HBA:
            if fabric.has(key):
                fabric.get(key, lambda value: value, None)
                fabric.problem(key, f"is for an HBA's port; {_OR_HBA}")
        return None
    if fabric.has("emulated"):
        fabric.problem("emulated", "and an HBA exclude each other: a port is on one fabric")
        fabric.get("emulated", lambda value: value, None)
    hosts, wwpns = list(fabric.each_or_one("parent", _host)), list(fabric.each_or_one("parent_wwpn", wwn))
    for member in _parents_named(fabric) if fabric.has("parents") else ():
        (wwpns if isinstance(member, Wwn) else hosts).append(member)  # type: ignore[arg-type]
    config = HbaConfig(
        hosts=tuple(hosts),
        wwpns=tuple(wwpns),
        fabric=fabric.get("fabric_wwn", wwn, None),
        dev_loss=fabric.get("dev_loss", integer(1, 86400), 60),
        fast_io_fail=fabric.get("fast_io_fail", integer(1, 600), 5),
        keep=fabric.get("keep", boolean, False),
        guard=fabric.get("guard", boolean, True),
        survey=fabric.get("survey", seconds(1, 3600), 30.0),
        helper=fabric.get("helper", _path_in(fabric.document.path), Path("/run/vhostfc-helper/helper.sock")),
    )
    if config.fast_io_fail >= config.dev_loss:
        fabric.problem("fast_io_fail", f"{config.fast_io_fail} s is not less than dev_loss, {config.dev_loss} s")
    return config


def _parents_named(fabric: Table) -> list[str | Wwn]:
    """The members of a named set of HBA ports: parents.toml beside the adapter's file has a list for each name."""
    name = fabric.get("parents", text, "")
    file = fabric.document.path.parent / "parents.toml"
    if not name:
        return []
    try:
        sets = Document(file)
    except ConfigError as error:
        fabric.problem("parents", f"{name!r} is looked for in {file}: {error}")
        return []
    members = sets.root.each(name, lambda value: _host(value) if str(value).startswith("host") else wwn(value))
    if not members:
        fabric.problem("parents", f'{name!r} is no set in {file}; write {name} = ["host5", "21:00:..."] there')
    for line, what in sets.problems:
        fabric.problem("parents", f"{file}:{line}: {what}")
    return members or []


def _host(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"(scsi_)?host\d+", value):
        raise ValueError(f'is {spelled(value)}; expected the name of a SCSI host, like "host5"')
    return value.removeprefix("scsi_")


def _cpus(vhost: Table, workers: int) -> tuple[int, ...]:
    """One CPU for each worker, or none at all."""
    cpus = tuple(vhost.each("cpus", integer(0, 1023)) or ())
    if cpus and len(cpus) != workers:
        vhost.problem("cpus", f"names {len(cpus)} CPUs for {workers} workers; name one for each")
        return ()
    for cpu in cpus:
        if cpu not in os.sched_getaffinity(0):
            vhost.problem("cpus", f"CPU {cpu} is none of those that this process may use")
            return ()
    return cpus


def _fabric(original: Document, environ: Mapping[str, str], overlay: Overlay | None = None) -> FabricConfig:
    document, gone_zones, gone_units = original, set[str](), set[tuple[str, int]]()
    if overlay is not None:
        document = original.copy()
        gone_zones, gone_units = lay(overlay, document.values)
    root, name = document.root, document.path.stem
    path = _path_in(document.path)
    state = root.get("state", path, state_directory(name, environ))
    fabric = root.table("fabric")
    socket = fabric.get("socket", path, Path("/run/vhostfc/fabric.sock"))
    config = FabricConfig(
        path=document.path,
        name=name,
        socket=socket,
        control=_control(fabric, socket),
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
    path = _path_in(table.document.path)
    lun = table.need("lun", integer(0, LUN_MAX), -1, f"lun = 0, a number up to {LUN_MAX}")
    capacity = table.get("size", size, None)
    file: Path | None = table.get("file", path, None)
    block: Path | None = table.get("block", path, None)
    null = table.get("null", boolean, False)
    share = table.get("share", _place, None)
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
    socket = table.get("socket", _socket_in(table.document.path), None)
    interface = table.get("interface", _interface, None)
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


def _control(table: Table, socket: Path) -> Path:
    control = table.get("control", _path_in(table.document.path), control_for(socket))
    if control == socket:
        table.problem("control", "is the same path as socket")
    return control


def control_for(socket: Path) -> Path:
    """Where a daemon that serves this socket takes orders: the same path with .control for .sock."""
    return Path(str(socket).removesuffix(".sock") + ".control")


def state_directory(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """systemd tells in STATE_DIRECTORY, a list with colons (systemd.exec(5)), what it made for us."""
    given = environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(given) if given else Path("/var/lib/vhostfc") / name


def derived_wwn(name: str) -> Wwn:
    """A name that is the same each time: NAA 5, QEMU's company id, 36 bits of a hash."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return Wwn(5 << 60 | OUI_QEMU << 36 | int.from_bytes(digest[:8], "big") >> 28)


# ---------------------------------------------------------------- values


def wwn(value: object) -> Wwn:
    if not isinstance(value, str):
        raise ValueError(f"is {spelled(value)}; expected a World Wide Name in quotes")
    try:
        return Wwn.parse(value)
    except WwnError as error:
        raise ValueError(str(error)) from None


def mac(value: object) -> bytes:
    """A MAC address that a station can have."""
    try:
        address = parse_mac(value) if isinstance(value, str) else None
    except ValueError as error:
        raise ValueError(str(error)) from None
    if address is None or not is_unicast(address):
        raise ValueError(f'is {spelled(value)}; expected the MAC address of one station, like "02:00:00:12:34:56"')
    return address


def fc_map(value: object) -> int:
    """The first three bytes of fabric provided MAC addresses (FC-BB-5 7.6)."""
    match = re.fullmatch(r"([0-9A-Fa-f]{2})[:-]?([0-9A-Fa-f]{2})[:-]?([0-9A-Fa-f]{2})", str(value))
    number = int("".join(match.groups()), 16) if match and isinstance(value, str) else 0
    if not 0x0EFC00 <= number <= 0x0EFCFF:
        raise ValueError(f'is {spelled(value)}; expected "0e:fc:00" up to "0e:fc:ff"')
    return number


def _interface(value: object) -> str:
    """A network interface's name (dev_valid_name() of the kernel)."""
    if not isinstance(value, str) or not re.fullmatch(r"[^\s/:]{1,15}", value) or value in {".", ".."}:
        raise ValueError(f"is {spelled(value)}; expected the name of a network interface")
    return value


def text(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError(f"is {spelled(value)}; expected a printable text in quotes")
    return value


def _place(value: object) -> tuple[str, int]:
    """A unit by its target's name and its LUN: "array-a:0"."""
    match = re.fullmatch(r"(.+):(\d{1,5})", value) if isinstance(value, str) else None
    if not match:
        raise ValueError(f'is {spelled(value)}; expected a target\'s name and a LUN, like "array-a:0"')
    return match[1], int(match[2])


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"is {spelled(value)}; expected true or false")
    return value


def integer(low: int, high: int) -> Callable[[object], int]:
    def convert(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"is {spelled(value)}; expected a whole number from {low} to {high}")
        return value

    return convert


def seconds(low: float, high: float) -> Callable[[object], float]:
    def convert(value: object) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type, operator]
            raise ValueError(f"is {spelled(value)}; expected a number of seconds from {low:g} to {high:g}")
        return float(value)  # type: ignore[arg-type]

    return convert


def choice(*allowed: str) -> Callable[[object], str]:
    def convert(value: object) -> str:
        if value not in allowed or not isinstance(value, str):
            raise ValueError(f"is {spelled(value)}; expected {' or '.join(repr(one) for one in allowed)}")
        return value

    return convert


def sector(value: object) -> int:
    if value not in {512, 4096} or not isinstance(value, int):
        raise ValueError(f"is {spelled(value)}; expected 512 or 4096")
    return value


def size(value: object) -> int | None:
    """Bytes: a whole number, or a text such as "1GiB", "512MB", "1.5 TiB"."""
    expected = 'expected bytes, or a text such as "512MB" or "1GiB"'
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+)(?:\.(\d{1,9}))?\s*([A-Za-z]*)", value.strip(), re.ASCII)
        if not match or (match[3] or "B") not in _UNITS:
            raise ValueError(f"is {spelled(value)}; {expected}")
        fraction = match[2] or ""
        value, rest = divmod(int(match[1] + fraction) * _UNITS[match[3] or "B"], 10 ** len(fraction))
        if rest:
            raise ValueError(f"is {spelled(match[0])}, not a whole number of bytes")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 63:
        raise ValueError(f"is {spelled(value)}; {expected}, more than none and less than 8 EiB")
    return value


def _path_in(file: Path) -> Callable[[object], Path]:
    def convert(value: object) -> Path:
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError(f"is {spelled(value)}; expected a path in quotes")
        return Path(os.path.abspath(file.parent / value))

    return convert


def _socket_in(file: Path) -> Callable[[object], Path]:
    def convert(value: object) -> Path:
        path = _path_in(file)(value)
        if len(os.fsencode(path)) > SUN_PATH_MAX:
            raise ValueError(f"is a path of {len(os.fsencode(path))} bytes; QEMU connects to at most {SUN_PATH_MAX}")
        return path

    return convert
