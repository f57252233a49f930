"""Firmware boots from a unit of the adapter: SeaBIOS and OVMF, in QEMU.

Firmware is a driver of its own kind.  SeaBIOS sets up one request ring and no other and asks all 256
targets; OVMF speaks the legacy interface on the root bus.  Neither waits: what is not there when it
looks is not there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.bootdisk import bios_disk, efi_program, fat_disk
from tests.lab.console import wait_for_line
from tests.lab.guest import Machine, vhost_user_scsi
from tests.lab.san import San, UnitSpec
from vhostfc.vhost.features import Feature

pytestmark = pytest.mark.guest

OVMF = Path("/usr/share/OVMF")
BIOS_LINE = "the array's boot sector runs"
UEFI_LINE = "the array's EFI program runs"
OTHER_LINE = "the other disk's boot sector runs"


@pytest.fixture
def san(tmp_path: Path) -> Iterator[San]:
    """LUN 0 of target 0 is the file boot.img, which a test fills before it starts the adapter."""
    units = [UnitSpec(0, f'file = "{tmp_path / "boot.img"}"'), UnitSpec(1, 'size = "1MiB"')]
    (tmp_path / "boot.img").write_bytes(bytes(16 << 20))
    with San(tmp_path, units) as network:
        network.start_adapter(1)
        yield network


@pytest.mark.parametrize(("ours", "other"), [(1, 2), (2, 1)])
def test_seabios_boots_by_bootindex(san: San, tmp_path: Path, ours: int, other: int) -> None:
    write(tmp_path / "boot.img", bios_disk(BIOS_LINE))
    (tmp_path / "other.img").write_bytes(bios_disk(OTHER_LINE))
    args = [
        *vhost_user_scsi(san.socket(1), bootindex=ours, boot_tpgt=0),
        *("-device", "virtio-scsi-pci,id=s0", "-device", f"scsi-hd,drive=other,bus=s0.0,bootindex={other}"),
        *("-drive", f"if=none,id=other,format=raw,file={tmp_path / 'other.img'}"),
    ]
    with Machine(args, workdir=tmp_path, memory="256M", slots=0) as machine:
        first = wait_for_line(machine, BIOS_LINE, OTHER_LINE)

    assert first == (BIOS_LINE if ours < other else OTHER_LINE)
    assert "error" not in san.adapters[1].text()


@pytest.mark.parametrize("legacy", [True, False])
def test_ovmf_boots_by_bootindex(san: San, tmp_path: Path, legacy: bool) -> None:
    """On the root bus it drives the legacy interface, behind a root port the modern one."""
    write(tmp_path / "boot.img", fat_disk({"EFI/BOOT/BOOTX64.EFI": efi_program(UEFI_LINE)}))
    shutil.copy(OVMF / "OVMF_VARS_4M.fd", tmp_path / "vars.fd")
    args = [
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={OVMF / 'OVMF_CODE_4M.fd'}"),
        *("-drive", f"if=pflash,unit=1,format=raw,file={tmp_path / 'vars.fd'}"),
        *vhost_user_scsi(san.socket(1), bootindex=1, boot_tpgt=0, bus="pcie.0" if legacy else "slot0"),
    ]
    with Machine(args, workdir=tmp_path, memory="256M", slots=1) as machine:
        wait_for_line(machine, UEFI_LINE, seconds=120)
        features = int(san.status(1)["front_end"]["features"], 16)

    assert bool(features >> Feature.VERSION_1 & 1) is not legacy
    assert "error" not in san.adapters[1].text()


def write(path: Path, data: bytes) -> None:
    """Into the unit's file as it is: the fabric has it open."""
    with path.open("r+b") as stream:
        stream.write(data)
