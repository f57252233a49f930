"""A guest whose kernel is the host: its FCoE port carries vports, and `vhostfc serve` runs inside it.

The adapter runs as its own user with CAP_SYS_RAWIO and nothing else, beside `vhostfc helper`, with udev's rules in
force: as systemd and `vhostfc setup` would have it on a host with an HBA.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.lab.channel import Job
from tests.lab.fcoe import FcoeGuest
from tests.lab.san import wwpn

SOURCE = Path(__file__).resolve().parent.parent.parent
#: What the adapter's process may do.
RIGHTS = (
    "setpriv --reuid vhostfc --regid vhostfc --clear-groups --inh-caps=-all,+sys_rawio --ambient-caps=+sys_rawio"
    " --bounding-set=-all,+sys_rawio --no-new-privs"
)
#: Runs commands through an adapter's socket, and prints how each ended.
DRIVER = """
import json, sys, trio
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.scan import patiently
async def main():
    wanted = json.loads(sys.argv[2])
    async with ScsiDriver.open(sys.argv[1]) as driver:
        for one in wanted:
            if "tmf" in one:
                print(json.dumps({"answer": await driver.manage(one["tmf"], one["target"], one["lun"])}))
                continue
            run = patiently if one.get("patient", True) else driver.command
            answer = await run(driver, one["target"], one["lun"], bytes.fromhex(one["cdb"]),
                data_out=bytes.fromhex(one.get("out", "")), data_in=one.get("in", 0)) if run is patiently else \\
                await driver.command(one["target"], one["lun"], bytes.fromhex(one["cdb"]),
                bytes.fromhex(one.get("out", "")), one.get("in", 0))
            print(json.dumps({"response": answer.response, "status": answer.status, "sense": answer.sense.hex(),
                "in": answer.data_in.hex()}))
trio.run(main)
"""


class NpivGuest(FcoeGuest):
    """An FcoeGuest with adapters."""

    python = f"cd {SOURCE} && PYTHONDONTWRITEBYTECODE=1 exec {sys.executable}"

    def make_ready(self) -> str:
        """udev, the user, `vhostfc setup`, the physical port, the helper.  The name of the physical host."""
        self.check(f"systemd-sysusers {SOURCE}/systemd/vhostfc.sysusers 2>&1")
        self.check("mkdir -p /etc/vhostfc /run/vhostfc; modprobe sd_mod; modprobe sg")
        self.check(f"({self.python} -m vhostfc setup)")
        host = self.online()
        self.check("mkdir -p /run/udev; /lib/systemd/systemd-udevd --daemon")  # now: it would rename eth0
        self.helper = self.popen(f"{self.python} -m vhostfc helper >/run/helper.log 2>&1")
        self.wait("[ -S /run/vhostfc-helper/helper.sock ]")
        return host

    def write_adapter(self, number: int, fabric: str = "") -> str:
        """The adapter's file; fabric: more lines for [fabric]."""
        name = f"vm{number}"
        text = (
            f'state = "/run/vhostfc/{name}"\n[[port]]\nwwpn = "{wwpn(number)}"\nwwnn = "{wwpn(number)[:-2]}fe"\n'
            f'[fabric]\nparent = "host0"\ndev_loss = 8\nfast_io_fail = 2\nsurvey = 2\n{fabric}\n'
            f'[vhost]\nsocket = "/run/vhostfc/{name}/vhost.sock"\n'
        )
        status, output = self.run(
            f"cat >/etc/vhostfc/{name}.toml && install -d -o vhostfc -g vhostfc /run/vhostfc/{name}", data=text.encode()
        )
        assert status == 0, output
        return f"/etc/vhostfc/{name}.toml"

    def start_adapter(self, number: int, fabric: str = "") -> Job:
        """Start it, and wait until its port is logged in."""
        path = self.write_adapter(number, fabric)
        up = f'grep -cs "adapter is up" /run/vm{number}.log'
        before = int(self.run(up)[1].strip() or 0)  # what an earlier one has said, and its socket, are no sign
        job = self.popen(
            f"cd {SOURCE} && exec {RIGHTS} {sys.executable} -m vhostfc serve --config {path} >>/run/vm{number}.log 2>&1"
        )
        self.wait(f"[ $({up}) -gt {before} ]")
        for _ in range(30):
            if self.status(number)["port"]["state"] == "online":
                return job
        raise AssertionError(self.log(number))

    def vhostfc(self, words: str, *, timeout: float = 120) -> Any:
        """`vhostfc WORDS --json`, as root."""
        return json.loads(self.check(f"{self.python} -m vhostfc {words} --json", timeout))

    def status(self, number: int) -> Any:
        return self.vhostfc(f"status /run/vhostfc/vm{number}/vhost.control")

    def socket(self, number: int) -> str:
        return f"/run/vhostfc/vm{number}/vhost.sock"

    def log(self, number: int) -> str:
        return self.check(f"cat /run/vm{number}.log")

    def drive(self, number: int, commands: Sequence[dict[str, Any]], *, timeout: float = 120) -> list[dict[str, Any]]:
        """Run commands on an adapter as a guest's driver does."""
        self.run("cat >/run/driver.py", data=DRIVER.encode())
        status, output = self.run(
            f"{self.python} /run/driver.py {self.socket(number)} '{json.dumps(list(commands))}'", timeout
        )
        assert status == 0, f"{output}\n{self.log(number)}\n{self.check('cat /run/helper.log')}"
        return [json.loads(line) for line in output.splitlines()]

    def units(self, number: int) -> dict[tuple[int, int], dict[str, Any]]:
        """What a driver finds: (target, LUN) -> unit."""
        found = self.vhostfc(f"probe {self.socket(number)}")["units"]
        return {(unit["target"], unit["lun"]): unit for unit in found}

    def vport(self, number: int) -> str | None:
        """The fc_vport of an adapter, None when it has none."""
        digits = wwpn(number).replace(":", "").lstrip("0")
        found = self.check(f"grep -l 0x{digits} /sys/class/fc_vports/*/port_name 2>/dev/null; true").split()
        return Path(found[0]).parent.name if found else None
