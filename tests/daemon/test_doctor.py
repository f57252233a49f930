"""`vhostfc doctor` on hosts that are broken in one way each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.fakes.array import FakeTarget, FakeUnit
from tests.fakes.kernel import FakeKernel
from tests.ports.contract import ME
from tests.waiting import until
from vhostfc.daemon import setup
from vhostfc.daemon.doctor import Facts, Finding, Verdict, as_json, as_text, examine, healthy
from vhostfc.fc.wwn import Wwn

GOOD = Facts(qemu=lambda: ("QEMU emulator version 9.0.2", True), user=lambda: True)


@pytest.fixture
async def kernel(tmp_path: Path, nursery: trio.Nursery) -> FakeKernel:
    """A host in order: an HBA with one vport of ours on it."""
    target = FakeTarget(Wwn(0x5006_0160_0000_0001), 0x01FE01, {0: FakeUnit(bytearray(4096))})
    fake = FakeKernel(tmp_path, nursery, target, style="lpfc", max_vports=4)
    for name in ("etc/vhostfc", "run/vhostfc-helper", "proc", "sys/module/sg", "sys/module/lpfc/parameters"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run/vhostfc-helper/helper.sock").touch()
    (tmp_path / "proc/meminfo").write_text("HugePages_Total:     512\n")
    (tmp_path / "sys/module/lpfc/parameters/lpfc_enable_npiv").write_text("1\n")
    (tmp_path / "etc/vhostfc/vm1.toml").write_text(f'[[port]]\nwwpn = "{ME.wwpn}"\n')
    setup.set_up(tmp_path, lambda command: True)
    fake.make_vport(fake.hosts["host0"], ME.wwpn, ME.wwnn, "vhostfc vm1")
    await until(lambda: fake.nodes)
    return fake


def diagnosis(tmp_path: Path, facts: Facts = GOOD) -> list[Finding]:
    return list(examine(tmp_path, facts))


async def test_a_host_in_order(tmp_path: Path, kernel: FakeKernel) -> None:
    findings = diagnosis(tmp_path)
    assert healthy(findings), as_text(findings)
    assert {finding.verdict for finding in findings} == {Verdict.READY}
    assert [f.says for f in findings if f.about == "hba host0"] == [
        "host0 (21:00:00:00:00:00:00:00), lpfc, 16 Gbit: 1 of 4 vports in use"
    ]


def cut_the_link(kernel: FakeKernel) -> None:
    kernel._set(kernel.root / "class/fc_host/host0/port_state", "Linkdown")


def use_up(kernel: FakeKernel) -> None:
    kernel._set(kernel.root / "class/fc_host/host0/npiv_vports_inuse", "4")


def npiv_off(kernel: FakeKernel) -> None:
    (kernel.root / "class/fc_host/host0/vport_create").unlink()
    kernel._set(kernel.root / "module/lpfc/parameters/lpfc_enable_npiv", "0")


def let_it_bind(kernel: FakeKernel) -> None:
    kernel._set(kernel.root / "bus/scsi/drivers_autoprobe", "1")


def bind(kernel: FakeKernel) -> None:
    kernel.bind("1:0:0:0")


def give_up(kernel: FakeKernel) -> None:
    kernel._set(kernel.root / "class/scsi_device/1:0:0:0/device/state", "offline")


def lose_a_rule(kernel: FakeKernel) -> None:
    (kernel.root.parent / "etc/udev/rules.d/59-vhostfc.rules").unlink()


def edit_a_rule(kernel: FakeKernel) -> None:
    (kernel.root.parent / "etc/udev/rules.d/59-vhostfc.rules").write_text(setup.MARK)


def scan_by_hand(kernel: FakeKernel) -> None:
    kernel._put(kernel.root / "module/scsi_mod/parameters/scan", "manual")


def no_sg(kernel: FakeKernel) -> None:
    (kernel.root / "module/sg").rmdir()
    for entry in (kernel.root / "class/scsi_generic").iterdir():
        entry.unlink()
    (kernel.root / "class/scsi_generic").rmdir()


def reject(kernel: FakeKernel) -> None:
    kernel._state(next(host for host in kernel.hosts.values() if host.parent), "Fabric Rejected WWN")


def no_helper(kernel: FakeKernel) -> None:
    (kernel.root.parent / "run/vhostfc-helper/helper.sock").unlink()


def lock_away(kernel: FakeKernel) -> None:
    path = kernel.root.parent / "etc/vhostfc/vm1.toml"
    path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)


def no_adapter(kernel: FakeKernel) -> None:
    (kernel.root.parent / "etc/vhostfc/vm1.toml").unlink()


def multipath(kernel: FakeKernel) -> None:
    (kernel.root.parent / "run/multipathd.pid").touch()


@pytest.mark.parametrize(
    ("broken", "about", "verdict", "says", "mend"),
    [
        (cut_the_link, "hba host0", Verdict.WRONG, "is Linkdown", "plug it in"),
        (use_up, "hba host0", Verdict.WRONG, "4 of 4 vports in use", "another HBA port"),
        (npiv_off, "hba host0", Verdict.WRONG, "does no NPIV", "lpfc_enable_npiv=1"),
        (let_it_bind, "hands off", Verdict.WRONG, "binds its drivers", "vhostfc setup"),
        (bind, "hands off", Verdict.WRONG, "bound to this host's driver sd", "echo 1:0:0:0 > "),
        (give_up, "unit 1:0:0:0", Verdict.WRONG, "error recovery", "echo running > "),
        (lose_a_rule, "rules", Verdict.MISSING, "59-vhostfc.rules", "vhostfc setup"),
        (edit_a_rule, "rules", Verdict.MISSING, "59-vhostfc.rules", "vhostfc setup"),
        (scan_by_hand, "scan", Verdict.WRONG, "scsi_mod.scan is manual", "echo async"),
        (no_sg, "module sg", Verdict.MISSING, "/dev/sg*", "modprobe sg"),
        (reject, "vport vport-0:0-0", Verdict.WRONG, "Fabric Rejected WWN", "invalid or for a duplicate"),
        (no_helper, "helper", Verdict.MISSING, "does not listen", "systemctl enable --now vhostfc-helper.socket"),
        (lock_away, "helper", Verdict.WRONG, "cannot read", "chown root:vhostfc "),
        (no_adapter, "vport vport-0:0-0", Verdict.NOTE, "has no file any more", "vport_delete"),
        (multipath, "multipath", Verdict.NOTE, "does not know", "vhostfc setup"),
    ],
)
async def test_each_fault_is_found_with_what_mends_it(
    tmp_path: Path,
    kernel: FakeKernel,
    broken: Callable[[FakeKernel], None],
    about: str,
    verdict: Verdict,
    says: str,
    mend: str,
) -> None:
    broken(kernel)
    findings = diagnosis(tmp_path)
    (found,) = [one for one in findings if one.about == about and one.verdict is not Verdict.READY]
    assert found.verdict is verdict
    assert says in found.says
    assert mend in found.mend
    assert healthy(findings) == (verdict is Verdict.NOTE)
    others = [one for one in findings if one.verdict in {Verdict.WRONG, Verdict.MISSING} and one.about != about]
    assert others == [], "one fault, one finding"


async def test_a_host_without_anything(tmp_path: Path) -> None:
    findings = diagnosis(tmp_path, Facts(qemu=lambda: None, user=lambda: False))
    missing = {one.about for one in findings if one.verdict is Verdict.MISSING}
    assert missing == {"hba", "module sg", "hands off", "rules", "user", "helper", "qemu"}
    assert all(one.mend for one in findings if one.verdict is Verdict.MISSING)


@pytest.mark.parametrize(
    ("qemu", "verdict", "says"),
    [
        (("QEMU emulator version 9.0", False), Verdict.WRONG, "no device vhost-user-scsi-pci"),
        (("QEMU emulator version 7.2.11", True), Verdict.NOTE, "before 8.2"),
    ],
)
async def test_qemu(tmp_path: Path, kernel: FakeKernel, qemu: tuple[str, bool], verdict: Verdict, says: str) -> None:
    found = [f for f in diagnosis(tmp_path, Facts(lambda: qemu, lambda: True)) if f.about == "qemu"]
    assert [one.verdict for one in found if says in one.says] == [verdict]


async def test_lines_and_json(tmp_path: Path, kernel: FakeKernel) -> None:
    let_it_bind(kernel)
    findings = diagnosis(tmp_path)
    text = as_text(findings)
    assert (
        "wrong    hands off: this host binds its drivers to every unit that it sees\n         -> vhostfc setup" in text
    )
    assert {"about", "verdict", "says", "mend"} in [set(one) for one in as_json(findings)]
