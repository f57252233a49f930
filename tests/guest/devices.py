"""A guest's SCSI devices, found by where they are on its adapters."""

from __future__ import annotations

from tests.lab.guest import Guest


def sg(guest: Guest, lun: int) -> list[str]:
    """The /dev/sgN of a LUN: through the first adapter, and through the second."""
    found = guest.check(f"ls -d /sys/class/scsi_generic/sg*/device/scsi_device/*:0:{lun}").split()
    hosts = sorted((int(path.split("/")[-1].split(":")[0]), path.split("/")[4]) for path in found)
    return [f"/dev/{name}" for _, name in hosts]


def heard(guest: Guest, *devices: str) -> None:
    """Take what unit attentions pend there: a reset, mode parameters changed, reservations preempted."""
    for device in devices:
        guest.check(f"for i in 1 2 3 4 5 6 7 8; do sg_turs {device} >/dev/null 2>&1; done; sg_turs {device}")
