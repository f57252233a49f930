"""A machine in a machine: a guest of a guest boots from a unit of a vport.

The outer guest's kernel is the host with the HBA; QEMU runs inside it, its SeaBIOS drives the adapter, and the boot
sector comes over virtio-scsi, vhost-user, the SCSI generic driver, libfc, fcoe and the fabric.  Two emulators on top of
each other: half a minute on a machine that has nothing else to do.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.bootdisk import bios_disk
from tests.lab.fcoe import attachment, netdev
from tests.lab.npiv import NpivGuest
from tests.lab.san import San, UnitSpec

pytestmark = pytest.mark.guest

LINE = "a unit of the vport has booted"


def test_a_nested_guest_boots_from_a_unit_of_the_vport(tmp_path: Path) -> None:
    disk = tmp_path / "boot.img"
    disk.write_bytes(bios_disk(LINE).ljust(16 << 20, b"\0"))
    san = San(tmp_path, [UnitSpec(0, f'file = "{disk}"', allow=[1])])
    san.extra = attachment(san)
    (tmp_path / "vm").mkdir()
    with san, NpivGuest(netdev(san, 1), workdir=tmp_path / "vm", memory="1536M") as guest:
        guest.make_ready()
        guest.start_adapter(1)
        command = (
            "timeout 500 qemu-system-x86_64 -accel tcg -nodefaults -display none -serial file:/run/inner.log"
            " -m 64 -object memory-backend-memfd,id=mem,size=64M,share=on -machine q35,memory-backend=mem"
            f" -chardev socket,id=hba0,path={guest.socket(1)}"
            " -device vhost-user-scsi-pci,chardev=hba0,bootindex=1,boot_tpgt=0"
        )
        job = guest.popen(f"{command} >/run/qemu.log 2>&1")
        try:
            guest.wait(f"grep -aqs '{LINE}' /run/inner.log", timeout=480)
        finally:
            guest.run("pkill qemu-system")
            job.wait(60)
