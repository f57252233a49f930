"""Cluster software for guests: multipath-tools with udev, and the fence agents, unpacked and not installed."""

from __future__ import annotations

from tests.lab.guest import Guest
from tests.lab.packages import into_root, unpacked

PACKAGES = (
    *(
        "multipath-tools",
        "kpartx",
        "liburcu8",
        "libdevmapper1.02.1",
        "dmsetup",
        "libaio1",
        "libreadline8",
        "libjson-c5",
    ),
    *("udev", "libudev1", "libsystemd-shared"),
    *("fence-agents", "python3-pexpect", "python3-ptyprocess", "python3-pycurl", "libcurl3-gnutls"),
)


def install(guest: Guest) -> None:
    """Into the guest's own root."""
    guest.check(into_root(unpacked("cluster-tools", PACKAGES)))


def start_udev(guest: Guest) -> None:
    guest.check(
        "/lib/systemd/systemd-udevd --daemon || /bin/udevadm --version; udevadm trigger --action=add && udevadm settle"
    )


def start_multipathd(guest: Guest, configuration: str) -> None:
    """configuration: the lines of its section "defaults"."""
    guest.check(f"cat >/etc/multipath.conf <<'EOF'\ndefaults {{\n{configuration}\n}}\nEOF\nmkdir -p /run/multipath")
    guest.check("modprobe -a dm-multipath scsi_dh_alua; multipathd && sleep 0.5 && multipathd show config >/dev/null")
