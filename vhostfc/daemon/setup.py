"""`vhostfc setup`: this host keeps its hands off the units of vports, and its other disks are found as before.

Linux binds its drivers (sd, st, ch) to every unit that it scans.  They read the disk, look for partitions, volumes and
multipath maps on it, and take unit attentions that a guest waits for.  There is no switch for one SCSI host; so the
switch for the whole bus is off (drivers_autoprobe), and a udev rule binds drivers to whatever is not below a vport.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vhostfc.errors import VhostfcError
from vhostfc.ports.sysfs import Sysfs

#: The first line of each of our files: what does not begin so is not ours to replace or remove.
MARK = "# Made by `vhostfc setup`; `vhostfc setup --undo` removes it.\n"

UDEV_RULE = (
    MARK
    + """# drivers_autoprobe is off.  What is not below a vport gets its driver as always.
ACTION=="remove", GOTO="vhostfc_end"
SUBSYSTEM=="scsi", ENV{DEVTYPE}=="scsi_device", ACTION=="add", DEVPATH!="*/vport-*", TEST!="driver", \\
    RUN+="/bin/sh -c 'echo %k > /sys/bus/scsi/drivers_probe'"
DEVPATH!="*/vport-*", GOTO="vhostfc_end"
# Should a driver be bound by hand: nothing on this host uses the disk.
SUBSYSTEM=="block", ENV{VHOSTFC}="1", ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}="1", \\
    ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}="1", ENV{nompath}="1", ENV{SYSTEMD_READY}="0", ENV{UDISKS_IGNORE}="1"
# Root resets units through the node, adapters send commands.
SUBSYSTEM=="scsi_generic", GROUP="vhostfc", MODE="0660"
LABEL="vhostfc_end"
"""
)
UDEV_NOWATCH = MARK + 'SUBSYSTEM=="block", DEVPATH=="*/vport-*", OPTIONS+="nowatch"\n'
TMPFILES = MARK + "w /sys/bus/scsi/drivers_autoprobe - - - - 0\n"
MODULES = MARK + "sg\n"
MULTIPATH = MARK + 'blacklist {\n    property "VHOSTFC"\n}\n'
DROP_IN = (
    MARK
    + """# An adapter on an HBA: the nodes of its units, and the right to send them every command.  Nothing else.
[Unit]
Wants=vhostfc-helper.socket
After=vhostfc-helper.socket

[Service]
CapabilityBoundingSet=CAP_SYS_RAWIO
AmbientCapabilities=CAP_SYS_RAWIO
PrivateDevices=no
DeviceAllow=char-sg rw
"""
)

#: File -> what it holds, below the root.
FILES = {
    "etc/udev/rules.d/59-vhostfc.rules": UDEV_RULE,
    "etc/udev/rules.d/61-vhostfc.rules": UDEV_NOWATCH,  # behind 60-block.rules, which watches
    "etc/tmpfiles.d/vhostfc-hba.conf": TMPFILES,
    "etc/modules-load.d/vhostfc-hba.conf": MODULES,
    "etc/systemd/system/vhostfc@.service.d/50-hba.conf": DROP_IN,
}
#: The same, where the program that reads it is there.
WITH = {"etc/multipath/conf.d/vhostfc.conf": (MULTIPATH, "etc/multipath.conf")}

Run = Callable[[Sequence[str]], bool]


@dataclass(frozen=True, slots=True)
class Step:
    """What was done, or was not."""

    done: bool
    what: str


def run(command: Sequence[str]) -> bool:
    """Run a program; False when it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def wanted(root: Path) -> dict[Path, str]:
    """The files that belong on this host."""
    files = {root / name: text for name, text in FILES.items()}
    return files | {root / name: text for name, (text, reader) in WITH.items() if (root / reader).exists()}


def set_up(root: Path = Path("/"), runner: Run = run) -> list[Step]:
    """Write what is missing and put it in force.  VhostfcError when a file cannot be written, or is somebody else's."""
    steps = []
    for path, text in wanted(root).items():
        old = _text(path)
        if old is not None and old != text and not old.startswith(MARK):
            raise VhostfcError(f"{path} is there and not ours; move it away first")
        if old != text:
            _write(path, text)
            steps.append(Step(True, f"wrote {path}"))
    steps += _reload(root, runner)
    runner(["modprobe", "sg"])
    steps += _autoprobe(root, "0")
    return steps or [Step(True, "all was in place already")]


def undo(root: Path = Path("/"), runner: Run = run) -> list[Step]:
    """Remove what set_up() has written; disks are found by the kernel itself again.

    VhostfcError while adapters are logged in: this host would take their guests' units.
    """
    ours = [vport for vport in Sysfs(root / "sys").vports() if vport.symbolic_name.startswith("vhostfc ")]
    if ours:
        who = ", ".join(f"{vport.name} ({vport.symbolic_name})" for vport in ours)
        raise VhostfcError(f"{who} is logged in; stop its adapter first, or delete what `vhostfc doctor` tells of")
    steps = []
    names = [*FILES, *WITH]
    for path in [root / name for name in names]:
        old = _text(path)
        if old is None:
            continue
        if not old.startswith(MARK):
            steps.append(Step(False, f"{path} is not ours; it stays"))
            continue
        path.unlink()
        steps.append(Step(True, f"removed {path}"))
    steps += _autoprobe(root, "1")
    return [*steps, *_reload(root, runner)] or [Step(True, "nothing was in place")]


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise VhostfcError(f"{path}: {error.strerror}; run this as root") from error


def _autoprobe(root: Path, value: str) -> list[Step]:
    path = root / "sys/bus/scsi/drivers_autoprobe"
    if not path.exists():
        return [Step(False, f"{path} is not there: no SCSI in this kernel yet")]
    if (_text(path) or "").strip() == value:
        return []
    _write(path, value)
    return [Step(True, f"{path}: {value}")]


def _reload(root: Path, runner: Run) -> list[Step]:
    steps = []
    if (root / "run/udev").exists():
        done = runner(["udevadm", "control", "--reload"])
        steps.append(Step(done, "udev reads its rules" + ("" if done else ": udevadm control --reload failed")))
    if (root / "run/systemd/system").exists():
        done = runner(["systemctl", "daemon-reload"])
        steps.append(Step(done, "systemd reads its units" + ("" if done else ": systemctl daemon-reload failed")))
    return steps


def as_root() -> None:
    """Raises VhostfcError when we are not."""
    if os.geteuid() != 0:
        raise VhostfcError("this is for root: it changes how this host finds its disks")
