"""`vhostfc doctor`: what of this host is ready for adapters on an HBA, missing or wrong, and what mends it.

Everything is read below a root, so that a fake host has its diagnosis, too; what is not a file comes in as `facts`.
"""

from __future__ import annotations

import enum
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_IRGRP, S_IROTH, S_IRUSR

from vhostfc.daemon import setup
from vhostfc.fc.wwn import Wwn, WwnError
from vhostfc.ports.sysfs import FcHost, Sysfs, Vport
from vhostfc.ports.vport import ACTIVE, ADVICE, why_not


class Verdict(enum.Enum):
    READY = "ready"
    NOTE = "note"  # worth knowing, and nothing that has to be mended
    MISSING = "missing"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line.  mend: the command that mends it, or what to do."""

    about: str
    verdict: Verdict
    says: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is no file.  qemu: the program's version and whether it has the device; user: is there a user vhostfc?"""

    qemu: Callable[[], tuple[str, bool] | None]
    user: Callable[[], bool]


def real_facts() -> Facts:
    return Facts(qemu=_qemu, user=_user)


def _qemu() -> tuple[str, bool] | None:
    program = shutil.which("qemu-system-x86_64") or shutil.which("qemu-kvm", path="/usr/bin:/usr/libexec")
    if program is None:
        return None
    try:
        version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False)
        devices = subprocess.run([program, "-device", "help"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return program, False
    first = version.stdout.splitlines()[:1]
    return (first[0] if first else program), "vhost-user-scsi-pci" in devices.stdout


def _user() -> bool:
    import pwd  # noqa: PLC0415

    try:
        pwd.getpwnam("vhostfc")
    except KeyError:
        return False
    return True


def examine(root: Path, facts: Facts) -> Iterator[Finding]:
    """All findings, in the order in which they are best mended."""
    sysfs = Sysfs(root / "sys")
    hosts = list(sysfs.hosts())
    yield from _hbas(root, sysfs, hosts)
    yield from _modules(sysfs)
    yield from _hands_off(root, sysfs)
    vports = list(sysfs.vports())
    yield from _vports(root, vports)
    yield from _units(sysfs, vports)
    yield from _rights(root, facts)
    yield from _files(root)
    yield from _qemu_findings(facts)
    yield from _memory(root)


# ---------------------------------------------------------------- HBAs


def _hbas(root: Path, sysfs: Sysfs, hosts: list[FcHost]) -> Iterator[Finding]:
    vport_hosts = {vport.host for vport in sysfs.vports()}
    physical = [host for host in hosts if host.name not in vport_hosts]
    if not physical:
        mend = "put in an HBA and load its driver: lspci | grep -i fibre; modprobe lpfc (or qla2xxx)"
        yield Finding("hba", Verdict.MISSING, "there is no Fibre Channel host", mend)
    for host in physical:
        about = f"hba {host.name}"
        if host.vport_create is None:
            yield Finding(about, Verdict.WRONG, f"{host} does no NPIV", _npiv_off(root, host))
            continue
        why = why_not(host)
        use = f"{host.vports_in_use} of {host.max_vports} vports in use"
        if why is None:
            yield Finding(about, Verdict.READY, f"{host}, {host.driver}, {host.speed}: {use}")
        elif host.state != "Online":
            yield Finding(about, Verdict.WRONG, why, "plug it in, and enable the switch's port")
        else:
            yield Finding(about, Verdict.WRONG, why, "name another HBA port in `parent`, or move machines elsewhere")


def _npiv_off(root: Path, host: FcHost) -> str:
    switch = root / "sys/module/lpfc/parameters/lpfc_enable_npiv"
    if host.driver == "lpfc" and _text(switch) == "0":
        return "echo 'options lpfc lpfc_enable_npiv=1' > /etc/modprobe.d/lpfc.conf; and load the driver anew"
    if host.driver == "qla2xxx":
        return "the firmware of this QLogic HBA must do NPIV (ql2xmaxqueues and its NVRAM): update it"
    return "use an HBA whose driver makes vports: lpfc, qla2xxx, bfa, qedf, bnx2fc, csiostor, fcoe"


# ---------------------------------------------------------------- modules


def _modules(sysfs: Sysfs) -> Iterator[Finding]:
    if (sysfs.root / "module/sg").exists() or sysfs.of_class("scsi_generic").exists():
        yield Finding("module sg", Verdict.READY, "the SCSI generic driver is there")
    else:
        yield Finding("module sg", Verdict.MISSING, "commands go through /dev/sg*, which is not there", "modprobe sg")
    scan = sysfs.text(sysfs.root / "module/scsi_mod/parameters/scan")
    if scan in {"manual", "none"}:
        mend = "echo async > /sys/module/scsi_mod/parameters/scan; and take scsi_mod.scan off the kernel's command line"
        yield Finding("scan", Verdict.WRONG, f"scsi_mod.scan is {scan}: no unit is found by itself", mend)


# ---------------------------------------------------------------- hands off


def _hands_off(root: Path, sysfs: Sysfs) -> Iterator[Finding]:
    mend = "vhostfc setup"
    match sysfs.autoprobe():
        case None:
            says = "there is no SCSI bus yet; once there is, it will bind drivers to guests' units"
            yield Finding("hands off", Verdict.MISSING, says, f"modprobe scsi_mod; {mend}")
        case True:
            yield Finding("hands off", Verdict.WRONG, "this host binds its drivers to every unit that it sees", mend)
        case False:
            yield Finding("hands off", Verdict.READY, "this host binds no driver by itself")
    missing = [str(path) for path, text in setup.wanted(root).items() if _text(path) != text.strip()]
    if missing:
        says = f"not there, or not as they should be: {', '.join(missing)}"
        yield Finding("rules", Verdict.MISSING, says, mend)
    else:
        yield Finding("rules", Verdict.READY, "udev, tmpfiles, modules and the adapters' unit have their files")
    if (root / "run/multipathd.pid").exists() and not (root / "etc/multipath/conf.d/vhostfc.conf").exists():
        yield Finding("multipath", Verdict.NOTE, "multipathd runs, and does not know of vports' units", mend)


def _units(sysfs: Sysfs, vports: list[Vport]) -> Iterator[Finding]:
    for vport in vports:
        for lun in sysfs.luns(vport.host) if vport.host else ():
            if lun.state == "offline":
                mend = (
                    f"look for its error in the kernel's log; echo running > {sysfs.root}/class/scsi_device/{lun.hctl}"
                )
                says = (
                    f"{lun.hctl} of {vport.name} was given up by the kernel's error recovery, and fails every command"
                )
                yield Finding(f"unit {lun.hctl}", Verdict.WRONG, says, f"{mend}/device/state")
            if lun.driver is not None:
                mend = f"echo {lun.hctl} > /sys/bus/scsi/drivers/{lun.driver}/unbind"
                says = f"{lun.hctl} of {vport.name} is bound to this host's driver {lun.driver}"
                yield Finding("hands off", Verdict.WRONG, says, mend)


# ---------------------------------------------------------------- vports


def _vports(root: Path, vports: list[Vport]) -> Iterator[Finding]:
    adapters = _adapters(root)
    for vport in vports:
        about = f"vport {vport.name}"
        who = f"{vport.wwpn} ({vport.symbolic_name or 'without a name'}) on {vport.parent}"
        if vport.symbolic_name.startswith("vhostfc ") and vport.wwpn not in adapters:
            names = f"{vport.wwpn.pack().hex()}:{vport.wwnn.pack().hex()}"
            mend = f"echo {names} > /sys/class/fc_host/{vport.parent}/vport_delete"
            yield Finding(about, Verdict.NOTE, f"{who} is of an adapter that has no file any more", mend)
        elif vport.state == ACTIVE:
            yield Finding(about, Verdict.READY, f"{who} is logged in")
        else:
            advice = ADVICE.get(vport.state, "its state is unknown here")
            yield Finding(about, Verdict.WRONG, f"{who} is {vport.state}", advice)


def _files(root: Path) -> Iterator[Finding]:
    """The helper is root without the right to read everything (systemd/vhostfc-helper.service)."""
    for path in sorted((root / "etc/vhostfc").glob("*.toml")):
        try:
            found = path.stat()
        except OSError:
            continue
        if not (
            (found.st_uid == 0 and found.st_mode & S_IRUSR)
            or (found.st_uid and found.st_gid == 0 and found.st_mode & S_IRGRP)
            or (found.st_uid and found.st_gid and found.st_mode & S_IROTH)
        ):
            mend = f"chown root:vhostfc {path}; chmod 640 {path}"
            yield Finding("helper", Verdict.WRONG, f"it cannot read {path}, and does nothing for that adapter", mend)


def _adapters(root: Path) -> set[Wwn]:
    names = set()
    for path in (root / "etc/vhostfc").glob("*.toml"):
        try:
            names |= {Wwn.parse(port["wwpn"]) for port in tomllib.loads(path.read_text()).get("port", [])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, WwnError):
            continue
    return names


# ---------------------------------------------------------------- rights, QEMU, memory


def _rights(root: Path, facts: Facts) -> Iterator[Finding]:
    if not facts.user():
        yield Finding("user", Verdict.MISSING, "there is no user vhostfc", "systemd-sysusers vhostfc.conf")
    helper = root / "run/vhostfc-helper/helper.sock"
    if helper.exists():
        yield Finding("helper", Verdict.READY, f"{helper} is there")
    else:
        says = "the privileged helper does not listen: only root can run an adapter on an HBA"
        yield Finding("helper", Verdict.MISSING, says, "systemctl enable --now vhostfc-helper.socket")


def _qemu_findings(facts: Facts) -> Iterator[Finding]:
    found = facts.qemu()
    if found is None:
        yield Finding("qemu", Verdict.MISSING, "there is no QEMU here", "apt-get install qemu-system-x86")
    elif not found[1]:
        mend = "install a QEMU that is built with vhost-user"
        yield Finding("qemu", Verdict.WRONG, f"{found[0]} has no device vhost-user-scsi-pci", mend)
    else:
        yield Finding("qemu", Verdict.READY, f"{found[0]} has vhost-user-scsi-pci")
        version = re.search(r"version (\d+)\.(\d+)", found[0])
        if version and (int(version[1]), int(version[2])) < (8, 2):
            says = "before 8.2 a guest does not find an adapter again that was restarted"
            yield Finding("qemu", Verdict.NOTE, says, "use QEMU 8.2 or newer, with reconnect=1 on the chardev")


def _memory(root: Path) -> Iterator[Finding]:
    meminfo = _text(root / "proc/meminfo") or ""
    pages = re.search(r"HugePages_Total:\s+(\d+)", meminfo)
    if pages and int(pages[1]):
        yield Finding("memory", Verdict.READY, f"{pages[1]} huge pages, for memory-backend-memfd,hugetlb=on")
    else:
        yield Finding(
            "memory", Verdict.NOTE, "guests need share=on memory; without huge pages it is memfd's small ones"
        )
    disabled = _text(root / "proc/sys/kernel/io_uring_disabled")
    if disabled not in {None, "0"}:
        yield Finding("io_uring", Verdict.NOTE, "io_uring is off here; adapters on an HBA do not need it")


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def healthy(findings: list[Finding]) -> bool:
    return all(finding.verdict in {Verdict.READY, Verdict.NOTE} for finding in findings)


def as_text(findings: list[Finding]) -> str:
    """A line each, and below it what mends it."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict.value:<8} {finding.about}: {finding.says}")
        if finding.mend:
            lines.append(f"         -> {finding.mend}")
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> list[dict[str, str]]:
    return [
        {"about": one.about, "verdict": one.verdict.value, "says": one.says, **({"mend": one.mend} if one.mend else {})}
        for one in findings
    ]


def where_am_i() -> Path:
    """The root that is examined; another one for tests."""
    return Path(os.environ.get("VHOSTFC_ROOT") or "/")
