"""What a Linux guest says about its disks, and loads for them."""

from __future__ import annotations

from dataclasses import dataclass

from tests.lab.guest import Guest


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk as the guest has it.  path: /dev/sdX; size in bytes; wwid as sysfs shows it, e.g. "naa.6...".

    host: the number of its SCSI host; a host that is plugged in again has another.
    """

    path: str
    host: int
    target: int
    lun: int
    size: int
    wwid: str


def disks(guest: Guest) -> list[Disk]:
    """All SCSI disks, by host, target and LUN."""
    listed = guest.check(
        "for d in /sys/block/sd*; do [ -e $d ] || continue; "
        "echo $(basename $(readlink -f $d/device)) ${d##*/} $(cat $d/size) $(cat $d/device/wwid); done"
    )
    found = []
    for line in listed.splitlines():
        address, name, sectors, wwid = line.split(maxsplit=3)
        host, _, target, lun = map(int, address.split(":"))
        found.append(Disk(f"/dev/{name}", host, target, lun, int(sectors) * 512, wwid))
    return sorted(found, key=lambda disk: (disk.host, disk.target, disk.lun))


def disk_of(guest: Guest, lun: int) -> Disk:
    """The one disk with this LUN."""
    (found,) = (disk for disk in disks(guest) if disk.lun == lun)
    return found


def wait_for(guest: Guest, condition: str, seconds: int = 30) -> None:
    """Until a shell condition holds in the guest."""
    status, output = guest.run(f"for i in $(seq {seconds * 20}); do {condition} && exit 0; sleep 0.05; done; exit 1")
    assert status == 0, f"{condition}: {output}{guest.why()}"


def wait_for_disk(guest: Guest, lun: int) -> Disk:
    """The disk with this LUN, when the guest has found it."""
    wait_for(guest, f"ls -d /sys/class/scsi_disk/*:{lun}/device/block/* >/dev/null 2>&1")
    return disk_of(guest, lun)


def fio(disk: Disk, *words: str) -> str:
    """A command that writes, reads and verifies; words add to it or replace what it says."""
    options = dict(word.partition("=")[::2] for word in words)
    usual = {
        "--name": "v", "--filename": disk.path, "--rw": "randrw", "--bsrange": "512-64k", "--size": "8m",
        "--verify": "crc32c", "--verify_fatal": "1", "--ioengine": "libaio", "--direct": "1", "--iodepth": "8",
    }  # fmt: skip
    return "fio " + " ".join(f"{key}={value}" if value else key for key, value in {**usual, **options}.items())
