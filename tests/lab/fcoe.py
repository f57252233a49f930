"""A guest whose own kernel is on the fabric: Linux's FCoE initiator on QEMU's -netdev dgram.

The fabric's file needs an [[fcoe]] with San.fcoe_socket; the guest's network card is the cable.
"""

from __future__ import annotations

from pathlib import Path

from tests.lab.guest import Guest
from tests.lab.san import San


def attachment(san: San, *, period: float = 4.0) -> str:
    """For San.extra."""
    return f'[[fcoe]]\nsocket = "{san.fcoe_socket}"\nfka_adv_period = {period}\n'


def netdev(san: San, number: int, *, mac: str | None = None) -> list[str]:
    """QEMU's arguments for cable `cable<number>` to the fabric."""
    local = san.directory / f"net{number}.sock"
    kind = f"dgram,id=cable{number},local.type=unix,local.path={local},remote.type=unix,remote.path={san.fcoe_socket}"
    return ["-netdev", kind, "-device", f"virtio-net-pci,netdev=cable{number},mac={mac or mac_of(number)}"]


def mac_of(number: int) -> str:
    return f"52:54:00:00:00:{number:02x}"


def wwpn_of(number: int) -> str:
    """What the kernel makes of the MAC address: the Port_Name of the physical port."""
    return f"20:00:{mac_of(number)}"


class FcoeGuest(Guest):
    """A Guest with kernel FCoE; `online()` logs its physical port in."""

    def online(self, interface: str = "eth0", *, timeout: int = 60) -> str:
        """The name of the fc_host, which is Online."""
        self.check(
            "modprobe virtio_net && modprobe fcoe e_d_tov=500 && modprobe sg &&"
            f" ip link set {interface} mtu 2500 up && echo {interface} >/sys/module/libfcoe/parameters/create"
        )
        host = self.check("ls /sys/class/fc_host").split()[0]
        self.wait(f"[ $(cat /sys/class/fc_host/{host}/port_state) = Online ]", timeout=timeout)
        return host

    def wait(self, condition: str, *, timeout: int = 60) -> None:
        """Until a shell condition holds."""
        loop = f"for i in $(seq {timeout * 10}); do {condition} && exit 0; sleep 0.1; done; exit 1"
        status, output = self.run(loop, timeout + 60)
        assert status == 0, f"{condition}: {output}{self.why()}"

    def create_vport(self, host: str, wwpn: str) -> str:
        """The name of the new fc_vport, which is Active."""
        name, node = wwpn.replace(":", ""), wwpn.replace(":", "")[:-2] + "fe"
        self.check(f"echo {name}:{node} >/sys/class/fc_host/{host}/vport_create")
        vport = self.check(f"cd /sys/class/fc_vports; dirname $(grep -l 0x{name.lstrip('0')} */port_name)").strip()
        self.wait(f"[ $(cat /sys/class/fc_vports/{vport}/vport_state) = Active ]")
        return vport

    def host_of(self, vport: str) -> str:
        """The Scsi_Host of a vport."""
        return Path(self.check(f"ls -d /sys/class/fc_vports/{vport}/device/host*").strip()).name

    def luns(self, host: str) -> dict[int, str]:
        """What a host has found: LUN -> device name of the disk."""
        number = host.removeprefix("host")
        command = f"for d in /sys/class/scsi_disk/{number}:*; do [ -e $d ] && echo $d $(ls $d/device/block); done; true"
        found = {}
        for line in self.check(command).splitlines():
            path, name = line.split()
            found[int(path.rsplit(":", 1)[1])] = name
        return found
