"""The harness itself, with QEMU's own virtio-scsi disk in place of our adapter."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.lab.backports import backports_qemu
from tests.lab.boot import load_order
from tests.lab.channel import GuestError
from tests.lab.guest import Guest, vhost_user_scsi

DISK = ["-device", "virtio-scsi-pci,id=s0", "-blockdev", "null-co,node-name=n0,size=1048576,read-zeroes=on"]
DISK += ["-device", "scsi-hd,drive=n0,bus=s0.0,id=d0"]


def test_modules_are_loaded_after_what_they_need(tmp_path: Path) -> None:
    listed = ["a/sd_mod.ko: b/scsi_mod.ko c/t10-pi.ko", "b/scsi_mod.ko:", "c/t10-pi.ko: d/crc.ko"]
    (tmp_path / "modules.dep").write_text("\n".join(listed))
    order = load_order(tmp_path, ["scsi_mod", "sd_mod", "virtio_built_in"])
    assert order == ["b/scsi_mod.ko", "c/t10-pi.ko", "a/sd_mod.ko"]


def test_an_adapter_on_the_command_line() -> None:
    words = vhost_user_scsi("/run/x.sock", "hba1", num_queues=2, bootindex=1)
    assert words[1] == "socket,id=chr-hba1,path=/run/x.sock"
    assert words[3] == "vhost-user-scsi-pci,id=hba1,chardev=chr-hba1,num_queues=2,bootindex=1"


@pytest.mark.guest
def test_a_guest_runs_what_it_is_told_and_reboots(tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    with Guest(DISK, workdir=tmp_path, shares=[share], reboot=True) as guest:
        print(f"guest up after {guest.boot_seconds:.1f} s")
        assert "QEMU HARDDISK" in guest.check("lsscsi")
        assert guest.check("blockdev --getsize64 /dev/sda") == "1048576\n"
        assert guest.run("exit 3") == (3, "")
        assert guest.run("cat", data=b"x" * 100_000)[1] == "x" * 100_000
        assert guest.run("sleep 1000", timeout=0.1)[0] == 124
        guest.check(f"echo here >{share}/file; echo gone >/etc/vhostfc-lab")
        assert (share / "file").read_text() == "here\n"
        assert not Path("/etc/vhostfc-lab").exists()
        guest.qmp("device_del", id="d0")
        guest.event("DEVICE_DELETED")
        assert guest.run("test -e /dev/sda")[0] == 1
        assert guest.kernel_errors() == []
        first = guest.check("cat /proc/sys/kernel/random/boot_id")
        guest.popen("echo b >/proc/sysrq-trigger")
        guest.event("RESET")
        guest.ready()
        assert guest.check("cat /proc/sys/kernel/random/boot_id") != first
        guest.kill()
        with pytest.raises(GuestError, match=r"guest is gone|went away"):
            guest.run("true")


@pytest.mark.guest
def test_a_newer_qemu(tmp_path: Path) -> None:
    qemu = backports_qemu()
    assert "version 10." in subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    with Guest(DISK, workdir=tmp_path, qemu=qemu) as guest:
        assert "QEMU HARDDISK" in guest.check("lsscsi")


@pytest.mark.guest
def test_qemu_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="no-such-device"), Guest(["-device", "no-such-device"], workdir=tmp_path):
        pass
