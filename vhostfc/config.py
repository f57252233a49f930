"""The configuration: what an adapter's file may say, and a fabric's (fabricfile.py), as frozen values.

Strict: an unknown key, a value out of range and a contradiction are errors, and every one of them
is reported at once as `file:line: key: what is wrong and what is allowed`.  Relative paths are
relative to the file.  docs/configuration.md has every key with its meaning.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vhostfc import fabricfile
from vhostfc.errors import ConfigError
from vhostfc.fabricfile import FabricConfig, FcoeConfig, TargetConfig, UnitConfig, ZoneConfig
from vhostfc.fc.wwn import Wwn
from vhostfc.overlay import Overlay
from vhostfc.tomlfile import Document, Table, spelled
from vhostfc.values import (
    boolean,
    choice,
    control_for,
    control_in,
    integer,
    path_in,
    seconds,
    socket_in,
    state_directory,
    text,
    wwn,
)

__all__ = [
    "AdapterConfig",
    "FabricConfig",
    "FcoeConfig",
    "HbaConfig",
    "PortConfig",
    "TargetConfig",
    "UnitConfig",
    "ZoneConfig",
    "control_for",
    "load",
    "load_adapter",
    "load_fabric",
    "overlaid",
    "state_directory",
]


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


def load_adapter(path: Path, *, environ: Mapping[str, str] = os.environ) -> AdapterConfig:
    """Read an adapter's file.  Raises ConfigError with every problem in it."""
    return _adapter(Document(path), environ)


def load_fabric(path: Path, *, environ: Mapping[str, str] = os.environ) -> FabricConfig:
    """Read a fabric's file.  Raises ConfigError with every problem in it."""
    return fabricfile.read(Document(path), environ)


def overlaid(config: FabricConfig, overlay: Overlay, *, environ: Mapping[str, str] = os.environ) -> FabricConfig:
    """What a fabric's file says with these changes.  Raises ConfigError with every problem."""
    assert config.document is not None
    return fabricfile.read(config.document, environ, overlay)


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
    return _adapter(document, environ) if adapter >= array else fabricfile.read(document, environ)


# ---------------------------------------------------------------- the two kinds of file


def _adapter(document: Document, environ: Mapping[str, str]) -> AdapterConfig:
    root, name = document.root, document.path.stem
    path = path_in(document.path)
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
    socket = vhost.get("socket", socket_in(document.path), Path(f"/run/vhostfc/{name}/vhost.sock"))
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
        control=control_in(vhost, socket),
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
        if isinstance(member, Wwn):
            wwpns.append(member)
        else:
            hosts.append(member)
    config = HbaConfig(
        hosts=tuple(hosts),
        wwpns=tuple(wwpns),
        fabric=fabric.get("fabric_wwn", wwn, None),
        dev_loss=fabric.get("dev_loss", integer(1, 86400), 60),
        fast_io_fail=fabric.get("fast_io_fail", integer(1, 600), 5),
        keep=fabric.get("keep", boolean, False),
        guard=fabric.get("guard", boolean, True),
        survey=fabric.get("survey", seconds(1, 3600), 30.0),
        helper=fabric.get("helper", path_in(fabric.document.path), Path("/run/vhostfc-helper/helper.sock")),
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
