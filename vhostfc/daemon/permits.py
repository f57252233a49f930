"""What the helper (helper.py) does for whom: a short list of files below /sys, each with what may be written there.

Who asks is an adapter: it says which, by the name of its file under /etc/vhostfc, and gets vports with that file's
names and what stands below them, nothing of another's.  A process in a unit of systemd's, vhostfc@vm1.service, is vm1
and nobody else: its control group is not its own to change.  Processes that were started by hand have but their word;
they all run as one user, and the kernel knows no difference between them.

A vport with an adapter's names may still be somebody else's: its symbolic name tells.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vhostfc.fc.wwn import Wwn, WwnError
from vhostfc.ports.base import PortIdentity
from vhostfc.ports.kernel import SG_SCSI_RESET_DEVICE, SG_SCSI_RESET_NO_ESCALATE, SG_SCSI_RESET_TARGET
from vhostfc.ports.sysfs import Sysfs, Vport
from vhostfc.ports.vport import symbolic_name

LEVELS = tuple(level | SG_SCSI_RESET_NO_ESCALATE for level in (SG_SCSI_RESET_DEVICE, SG_SCSI_RESET_TARGET))

_NAMES = r"[0-9a-f]{16}:[0-9a-f]{16}"
_HCTL = r"\d+:\d+:\d+:\d+"
_VPORT_NAME = r"class/fc_vports/vport-[\d:-]+/symbolic_name"
_STATE = rf"class/scsi_device/{_HCTL}/device/state"
#: Files that make or delete vports, and files below a vport, each with what may be written there.
_MAKING = re.compile(r"class/(?:fc_host|scsi_host)/(host\d+)/vport_(create|delete)")
_UNBIND = re.compile(r"bus/scsi/drivers/[\w-]+/unbind")
_BELOW: tuple[tuple[str, str], ...] = (
    (_VPORT_NAME, r"vhostfc [^\0\n]+"),
    (r"class/fc_vports/vport-[\d:-]+/vport_disable", r"[01]"),
    (r"class/fc_remote_ports/rport-[\d:-]+/dev_loss_tmo", r"\d{1,6}"),
    (r"class/fc_remote_ports/rport-[\d:-]+/fast_io_fail_tmo", r"\d{1,4}|off"),
    (r"class/scsi_host/host\d+/scan", r"[-0] (-|\d{1,5}) (-|\d{1,10})"),
    (rf"class/scsi_device/{_HCTL}/device/(delete|rescan)", r"1"),
    (_STATE, r"running\n"),  # the kernel wants the end of line
)


class Refused(Exception):
    """It is none of the things that are done here, or not for this adapter; str() says why, for an administrator."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """Who asks, and what its file says.  file: for messages."""

    name: str
    file: Path
    ports: frozenset[tuple[Wwn, Wwn]]

    def owns(self, vport: Vport) -> bool:
        """By its names; nobody else has given it another symbolic name."""
        return (vport.wwpn, vport.wwnn) in self.ports and vport.symbolic_name in {"", self.symbolic_name(vport)}

    def symbolic_name(self, vport: Vport) -> str:
        return symbolic_name(PortIdentity(vport.wwpn, vport.wwnn, f"vhostfc {self.name}"))


def adapter_of(etc: Path, name: object) -> Adapter:
    """The adapter of a file under `etc`, as it is now.  Refused when there is none, or it cannot be read."""
    if not isinstance(name, str) or not re.fullmatch(r"[^./\0][^/\0]{0,250}", name):
        raise Refused("expected the name of an adapter's file, without .toml")
    path = etc / f"{name}.toml"
    try:
        ports = tomllib.loads(path.read_text()).get("port", [])
        names = frozenset((Wwn.parse(port["wwpn"]), Wwn.parse(port["wwnn"])) for port in ports)
    except FileNotFoundError:
        raise Refused(f"{path} is not there: the helper works for adapters whose files are in {etc}") from None
    except PermissionError:
        # It is root without the right to read everything.
        raise Refused(f"the helper cannot read {path}: give it to root (chown root:vhostfc, chmod 640)") from None
    except OSError as error:
        raise Refused(f"the helper cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, WwnError):
        raise Refused(f"{path} is no adapter's file: see `vhostfc check {path}`") from None
    return Adapter(name, path, names)


def unit_of(proc: Path, pid: int) -> str | None:
    """The instance of the unit vhostfc@.service that a process is in; None when it is in none.

    Not below user.slice: there a user names units.
    """
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        found = re.search(r"/vhostfc@([^/]+)\.service(?:/|$)", path)
        if controllers in {"", "name=systemd"} and found and not path.startswith("/user.slice/"):
            return found[1]
    return None


def check_write(sysfs: Sysfs, adapter: Adapter, relative: str, data: str, made: Callable[[Vport], bool]) -> Path:
    """The file to be written.  made: has the helper made this vport for an adapter?  Raises Refused."""
    making = _MAKING.fullmatch(relative)
    if making:
        _check_names(sysfs, adapter, making[1], making[2], data, made)
        return sysfs.root / relative
    if _UNBIND.fullmatch(relative):  # a driver of this host has a unit of the adapter's
        if not re.fullmatch(_HCTL, data):
            raise Refused(f"not a value for {relative}")
        below_a_vport(sysfs, adapter, sysfs.of_class("scsi_device") / data)
        return sysfs.root / relative
    for pattern, values in _BELOW:
        if re.fullmatch(pattern, relative):
            if not re.fullmatch(values, data):
                raise Refused(f"not a value for {relative}")
            vport = below_a_vport(sysfs, adapter, sysfs.root / relative)
            if pattern == _VPORT_NAME and data != adapter.symbolic_name(vport):
                raise Refused(f"{adapter.name} is no {data!r}")
            if pattern == _STATE and sysfs.text(sysfs.root / relative) != "offline":
                raise Refused(f"{relative} is not offline")
            return sysfs.root / relative
    raise Refused(f"{relative} is not written here")


def _check_names(
    sysfs: Sysfs, adapter: Adapter, host: str, what: str, names: str, made: Callable[[Vport], bool]
) -> None:
    if not re.fullmatch(_NAMES, names):
        raise Refused("expected the two names of a vport, as 16 digits each")
    wwpn, wwnn = (Wwn(int(part, 16)) for part in names.split(":"))
    if (wwpn, wwnn) not in adapter.ports:
        raise Refused(f"{wwpn} with the WWNN {wwnn} is not in {adapter.file}")
    for vport in sysfs.vports() if what == "delete" else ():
        if (vport.parent, vport.wwpn, vport.wwnn) != (host, wwpn, wwnn):
            continue
        if not adapter.owns(vport) or not (vport.symbolic_name or made(vport)):
            owner = repr(vport.symbolic_name) if vport.symbolic_name else "without a name"
            raise Refused(f"{vport.name} on {host} ({owner}) was not made by {adapter.name}")


def below_a_vport(sysfs: Sysfs, adapter: Adapter, path: Path) -> Vport:
    """The adapter's vport that this belongs to: the path shows whose child it is.  Raises Refused."""
    match = re.search(r"/(vport-[\d:-]+)(/|$)", os.path.realpath(path))
    vport = sysfs.vport(match[1]) if match else None
    if vport is None or not adapter.owns(vport):
        raise Refused(f"{path} belongs to no vport of {adapter.name}")
    return vport


def check_reset(sysfs: Sysfs, adapter: Adapter, hctl: str, level: object) -> None:
    """Raises Refused."""
    if not re.fullmatch(_HCTL, hctl) or level not in LEVELS:
        raise Refused("not a reset that is done here")
    below_a_vport(sysfs, adapter, sysfs.of_class("scsi_device") / hctl)
