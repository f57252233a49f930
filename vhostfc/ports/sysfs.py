"""What Linux shows of its Fibre Channel hosts, vports, remote ports and units under /sys: read, never written.

Sysfs is the only truth.  Uevents and netlink events (fcevents.py) come late, not at all, or for something else; they
say when to look.  What vanishes while it is looked at is not there: that is no error.

    .../hostN/vport-N:0-V/hostM/rport-M:0-R/targetM:0:T/M:0:T:L

World Wide Names are compared as numbers: the kernel's text has no leading zeros.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vhostfc.fc.wwn import Wwn

_NONE = (0, 0xFFFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True, slots=True)
class FcHost:
    """A port of an HBA, or a vport's own host.  vport_create: the file that makes vports, None where it is missing."""

    name: str
    wwpn: Wwn
    wwnn: Wwn
    fabric_name: Wwn | None
    state: str
    port_id: int
    max_vports: int
    vports_in_use: int
    symbolic_name: str
    driver: str
    speed: str
    vport_create: Path | None

    @property
    def number(self) -> int:
        return int(self.name.removeprefix("host"))

    def __str__(self) -> str:
        return f"{self.name} ({self.wwpn})"


@dataclass(frozen=True, slots=True)
class Vport:
    """A virtual port; host: the name of its own SCSI host, parent: that of the HBA's."""

    name: str
    parent: str
    host: str | None
    wwpn: Wwn
    wwnn: Wwn
    state: str
    last_state: str
    symbolic_name: str


@dataclass(frozen=True, slots=True)
class Rport:
    """A remote port as one host sees it.  target: its SCSI target number, None when it is no target."""

    name: str
    wwpn: Wwn
    wwnn: Wwn
    port_id: int
    state: str
    roles: str
    target: int | None


@dataclass(frozen=True, slots=True)
class Lun:
    """A logical unit.  hctl: "1:0:2:3"; sg: "sg4", None before the node is there; disk: what VPD page 83h says."""

    hctl: str
    lun: bytes
    sg: str | None
    type: int
    queue_depth: int
    state: str
    disk: bytes
    driver: str | None

    @property
    def target(self) -> int:
        return int(self.hctl.split(":")[2])


def scsi_lun(number: int) -> bytes:
    """The 8 bytes of a LUN that Linux prints as a number: groups of two bytes, the lowest first (int_to_scsilun)."""
    return b"".join((number >> shift & 0xFFFF).to_bytes(2, "big") for shift in (0, 16, 32, 48))


class Sysfs:
    """A walker; root: /sys, or what stands for it."""

    def __init__(self, root: Path = Path("/sys")) -> None:
        self.root = root

    # ------------------------------------------------------------ reading

    def text(self, path: Path) -> str | None:
        """A file's text without its end of line; None when there is nothing to read."""
        try:
            return path.read_bytes().decode(errors="replace").strip()
        except OSError:
            return None

    def data(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError:
            return b""

    def number(self, path: Path, default: int = 0) -> int:
        text = self.text(path)
        with contextlib.suppress(ValueError):
            return int(text or "", 0)
        return default

    def of_class(self, name: str) -> Path:
        return self.root / "class" / name

    def members(self, name: str) -> list[str]:
        """The names in a class, in the order of their numbers."""
        return _names(self.of_class(name))

    # ------------------------------------------------------------ hosts and vports

    def hosts(self) -> Iterator[FcHost]:
        """Every fc_host, vports' own included."""
        for name in self.members("fc_host"):
            host = self.host(name)
            if host is not None:
                yield host

    def host(self, name: str) -> FcHost | None:
        at = self.of_class("fc_host") / name
        wwpn = self.number(at / "port_name")
        if not wwpn:
            return None
        old = self.of_class("scsi_host") / name / "vport_create"  # until Linux 2.6.27, and some drivers' own
        create = next((file for file in (at / "vport_create", old) if file.exists()), None)
        fabric = self.number(at / "fabric_name")
        return FcHost(
            name=name,
            wwpn=Wwn(wwpn),
            wwnn=Wwn(self.number(at / "node_name")),
            fabric_name=None if fabric in _NONE else Wwn(fabric),
            state=self.text(at / "port_state") or "Unknown",
            port_id=self.number(at / "port_id") & 0xFFFFFFFF,
            max_vports=self.number(at / "max_npiv_vports"),
            vports_in_use=self.number(at / "npiv_vports_inuse"),
            symbolic_name=self.text(at / "symbolic_name") or "",
            driver=self.text(self.of_class("scsi_host") / name / "proc_name") or "",
            speed=self.text(at / "speed") or "",
            vport_create=create,
        )

    def vports(self) -> Iterator[Vport]:
        for name in self.members("fc_vports"):
            vport = self.vport(name)
            if vport is not None:
                yield vport

    def vport(self, name: str) -> Vport | None:
        at = self.of_class("fc_vports") / name
        text = self.text(at / "port_name")
        if text is None:
            return None
        device = Path(os.path.realpath(at / "device"))
        hosts = [child for child in _names(device) if re.fullmatch(r"host\d+", child)]
        return Vport(
            name=name,
            parent=f"host{name.removeprefix('vport-').split(':')[0]}",
            host=hosts[0] if hosts else None,
            wwpn=Wwn(self.number(at / "port_name")),
            wwnn=Wwn(self.number(at / "node_name")),
            state=self.text(at / "vport_state") or "Unknown",
            last_state=self.text(at / "vport_last_state") or "Unknown",
            symbolic_name=self.text(at / "symbolic_name") or "",
        )

    def vport_of(self, wwpn: Wwn) -> Vport | None:
        """The vport with this Port_Name, on whatever host."""
        return next((vport for vport in self.vports() if vport.wwpn == wwpn), None)

    # ------------------------------------------------------------ what a host sees

    def rports(self, host: str) -> Iterator[Rport]:
        """The remote ports of a host that are, or were, FCP targets."""
        prefix = f"rport-{host.removeprefix('host')}:"
        for name in self.members("fc_remote_ports"):
            if not name.startswith(prefix):
                continue
            at = self.of_class("fc_remote_ports") / name
            wwpn = self.number(at / "port_name")
            if not wwpn:
                continue
            target = self.number(at / "scsi_target_id", -1)
            roles = self.text(at / "roles") or ""
            if "FCP Target" not in roles and target < 0:
                continue
            yield Rport(
                name=name,
                wwpn=Wwn(wwpn),
                wwnn=Wwn(self.number(at / "node_name")),
                port_id=self.number(at / "port_id") & 0xFFFFFF,
                state=self.text(at / "port_state") or "Unknown",
                roles=roles,
                target=None if target < 0 else target,
            )

    def luns(self, host: str) -> Iterator[Lun]:
        """The units of a host, whatever their type."""
        prefix = f"{host.removeprefix('host')}:"
        for name in self.members("scsi_device"):
            if name.startswith(prefix):
                lun = self.lun(name)
                if lun is not None:
                    yield lun

    def lun(self, hctl: str) -> Lun | None:
        at = self.of_class("scsi_device") / hctl / "device"
        state = self.text(at / "state")
        if state is None or state in {"cancel", "deleted", "created"}:
            return None
        nodes = _names(at / "scsi_generic")
        page = self.data(at / "vpd_pg83")
        driver = at / "driver"
        return Lun(
            hctl=hctl,
            lun=scsi_lun(int(hctl.split(":")[3])),
            sg=nodes[0] if nodes else None,
            type=self.number(at / "type", 31),
            queue_depth=self.number(at / "queue_depth", 1),
            state=state,
            disk=page[4 : 4 + int.from_bytes(page[2:4], "big")] if len(page) >= 4 else b"",
            driver=Path(os.readlink(driver)).name if driver.is_symlink() else None,
        )

    def port_state_file(self, hctl: str) -> Path:
        """The file with the state of a unit's remote port; it need not be there."""
        device = Path(os.path.realpath(self.of_class("scsi_device") / hctl / "device"))
        return self.of_class("fc_remote_ports") / device.parent.parent.name / "port_state"

    def can_queue(self, host: str) -> int:
        """Commands that the host takes at a time."""
        return self.number(self.of_class("scsi_host") / host / "can_queue", 1)

    def segments(self, host: str) -> int:
        return self.number(self.of_class("scsi_host") / host / "sg_tablesize", 128)

    # ------------------------------------------------------------ the SCSI bus

    @property
    def autoprobe_file(self) -> Path:
        return self.root / "bus/scsi/drivers_autoprobe"

    def autoprobe(self) -> bool | None:
        """Are drivers bound to new units of this machine by themselves?  None: there is no SCSI bus."""
        text = self.text(self.autoprobe_file)
        return None if text is None else text != "0"


def _names(directory: Path) -> list[str]:
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    return sorted(names, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
