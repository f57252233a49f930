"""How the fabric grows: N_Ports by the thousand log in, discover their targets, and are told that their zones changed.

    python -m tests.bench.fabric_scale [--ports 256 1024 4096] [--targets 64] [--units 16384] [--json]

The fabric is a whole one (`daemon.fabricd.Fabric`) in this process; the N_Ports are on attachments of their own in its
door, so that what is measured is the fabric and no socket.  Each number of ports has a process of its own.  A port is
zoned with two targets, and sees as many units there as there are for it.

start: read the file, make the units.  login: FLOGI or FDISC, the registrations with the name server, SCR.
discover: GPN_FT, and at each target PLOGI, PRLI, REPORT LUNS.  rezone: every port gets another second target, by a
reload; until it has returned and every port has its RSCN.  logout: all F_Ports are unplugged.  memory: what the
process has grown by since the fabric was up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import structlog
import trio

from vhostfc.config import FabricConfig, load_fabric
from vhostfc.daemon.fabricd import Fabric
from vhostfc.fabric.link import Note
from vhostfc.fabric.switch import NPort
from vhostfc.fc import ct, els, ns
from vhostfc.fc.els import Els
from vhostfc.fc.fcp import FcpCmnd, cmnd_frame
from vhostfc.fc.frame import Address, FcType, Frame, RCtl, els_reply, els_request
from vhostfc.fc.login import Login
from vhostfc.fc.wwn import Wwn

#: N_Ports behind an F_Port: what a host with NPIV has.
PER_F_PORT = 64


def initiator(number: int) -> Wwn:
    return Wwn(0x5001_4380_0000_0000 + number)


def target(number: int) -> Wwn:
    return Wwn(0x5006_0160_0000_0000 + number)


def file(directory: Path, ports: int, targets: int, units: int, shift: int) -> str:
    """A fabric's file: port n is zoned with targets n and n + shift; each unit belongs to one port."""
    lines = [f'state = "{directory}/state"', "[fabric]", f'socket = "{directory}/f.sock"']
    mine: dict[int, list[int]] = {number: [] for number in range(targets)}
    for port in range(ports):
        mine[port % targets].append(port)
    for number in range(targets):
        lines += [
            "[[target]]",
            f'name = "t{number}"',
            f'wwpn = "{target(number)}"',
            'wwnn = "50:06:01:60:ff:00:00:00"',
        ]
        owners = mine[number] or [0]
        for lun in range(units // targets):
            allow = initiator(owners[lun % len(owners)])
            lines += ["[[target.unit]]", f"lun = {lun}", "null = true", f'allow = ["{allow}"]']
    for port in range(ports):
        members = [initiator(port), target(port % targets), target((port + shift) % targets)]
        lines += ["[[zone]]", f'name = "z{port}"', f"members = {json.dumps([str(one) for one in members])}"]
    return "\n".join(lines) + "\n"


class Host:
    """An attachment with N_Ports behind it, which do what they are told and count what comes."""

    kind = "bench"
    pid = None

    def __init__(self, fabric: Fabric, number: int) -> None:
        self.name = f"host{number}"
        self.fabric = fabric
        self.inbox: list[Frame] = []
        self.rscns = 0
        self.ids: dict[Wwn, int] = {}
        self.targets: dict[int, list[int]] = {}
        self.f_port = fabric.door.plug(self)
        self._ox_id = 0

    def post_frame(self, what: bytes | Note) -> None:
        if isinstance(what, Note):
            return
        frame = Frame.unpack(what)
        if frame.s_id == Address.FABRIC_CONTROLLER and frame.payload[0] == Els.RSCN:
            self.rscns += 1
            self.fabric.door.arrive(self.f_port, els_reply(frame, els.LS_ACC).pack())
        else:
            self.inbox.append(frame)

    async def send_frame(self, what: bytes | Note) -> None:
        self.post_frame(what)

    def link_down(self) -> None: ...

    def link_up(self) -> None: ...

    def clear_virtual_link(self, ports: Sequence[NPort]) -> bool:
        return False

    def ask(self, frame: Frame) -> list[Frame]:
        """The answer, which comes at once from the switch and from a target's login."""
        self.inbox.clear()
        self.fabric.door.arrive(self.f_port, frame.pack())
        return self.inbox[:]

    def els(self, port_id: int, d_id: int, payload: bytes) -> Frame:
        self._ox_id = (self._ox_id + 1) & 0x7FFF
        (reply,) = self.ask(els_request(port_id, d_id, self._ox_id, payload))
        assert reply.payload[0] == Els.LS_ACC, reply
        return reply

    def ct(self, port_id: int, payload: bytes) -> ct.CtIu:
        self._ox_id = (self._ox_id + 1) & 0x7FFF
        frames = self.ask(ct.ct_request(port_id, Address.DIRECTORY_SERVER, self._ox_id, payload))
        return ct.CtIu.unpack(b"".join(frame.payload for frame in frames))

    def login(self, wwpn: Wwn) -> None:
        login = (Login.fdisc if self.ids else Login.flogi)(wwpn, wwpn)
        port_id = self.ids[wwpn] = self.els(0, Address.F_PORT, login.pack()).d_id
        self.els(port_id, Address.DIRECTORY_SERVER, Login.plogi(wwpn, wwpn).pack())
        for request in (
            ns.RnnId(port_id, wwpn),
            ns.RsnnNn(wwpn, b"bench"),
            ns.RspnId(port_id, b"bench"),
            ns.RftId(port_id, frozenset({FcType.FCP})),
            ns.RffId(port_id, ns.Fc4Feature.INITIATOR),
        ):
            assert self.ct(port_id, request.pack()).accepted
        self.els(port_id, Address.FABRIC_CONTROLLER, els.Scr().pack())

    async def discover(self, wwpn: Wwn) -> int:
        """Returns the number of units that were found."""
        port_id = self.ids[wwpn]
        listed = ns.unpack_port_names(self.ct(port_id, ns.ByFc4Type(ct.Ct.GPN_FT).pack()).body)
        found = self.targets[port_id] = [other for other, name in listed if name >> 32 == target(0) >> 32]
        image = els.PrliPage(FcType.FCP, els.PrliPage.ESTABLISH, els.FcpService.INITIATOR)
        units = 0
        for other in found:
            self.els(port_id, other, Login.plogi(wwpn, wwpn).pack())
            self.els(port_id, other, els.Prli((image,)).pack())
            self._ox_id = (self._ox_id + 1) & 0x7FFF
            cdb = bytes([0xA0, 0, 0, 0, 0, 0]) + (8192).to_bytes(4, "big") + bytes(2)
            self.inbox.clear()
            command = cmnd_frame(port_id, other, self._ox_id, FcpCmnd(bytes(8), cdb, 8192, read=True))
            self.fabric.door.arrive(self.f_port, command.pack())
            while not any(frame.r_ctl == RCtl.DATA_COMMAND_STATUS for frame in self.inbox):
                await trio.lowlevel.checkpoint()
            data = b"".join(frame.payload for frame in self.inbox if frame.r_ctl == RCtl.DATA_SOLICITED)
            units += int.from_bytes(data[:4], "big") // 8
        return units


def resident() -> int:
    """Bytes of this process in memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


@contextmanager
def timed(figures: dict[str, float], name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    figures[name] = time.perf_counter() - begin


async def measure(ports: int, targets: int, units: int) -> dict[str, float]:
    """Seconds of each part, and bytes."""
    figures: dict[str, float] = {"ports": ports, "pairs": 2 * ports}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = directory / "fabric.toml"

        def written(shift: int) -> FabricConfig:
            path.write_text(file(directory, ports, targets, units, shift))
            return load_fabric(path)

        async with trio.open_nursery() as nursery:
            with timed(figures, "start"):
                fabric = Fabric(written(1), log=structlog.get_logger())
                await nursery.start(fabric.serve)
            before = resident()
            names = [initiator(number) for number in range(ports)]
            with timed(figures, "login"):
                hosts = [Host(fabric, number) for number in range(-(-ports // PER_F_PORT))]
                for number, wwpn in enumerate(names):
                    hosts[number // PER_F_PORT].login(wwpn)
            with timed(figures, "discover"):
                found = sum([await hosts[n // PER_F_PORT].discover(wwpn) for n, wwpn in enumerate(names)])
            assert all(len(known) == 2 for host in hosts for known in host.targets.values())
            assert found >= (units if ports >= targets else 1)
            figures["memory"] = resident() - before
            config = written(2)
            with timed(figures, "rezone"):
                await fabric.reload(config)
            assert sum(host.rscns for host in hosts) >= ports
            with timed(figures, "logout"):
                for host in hosts:
                    fabric.door.unplug(host.f_port)
                await trio.lowlevel.checkpoint()
            assert fabric.switch.logins() == []
            nursery.cancel_scope.cancel()
    return figures


COLUMNS: dict[str, Callable[[dict[str, float]], str]] = {
    "ports": lambda f: f"{f['ports']:.0f}",
    "start s": lambda f: f"{f['start']:.1f}",
    "login ms/port": lambda f: f"{f['login'] / f['ports'] * 1e3:.2f}",
    "discover ms/port": lambda f: f"{f['discover'] / f['ports'] * 1e3:.2f}",
    "rezone s": lambda f: f"{f['rezone']:.2f}",
    "rezone ms/port": lambda f: f"{f['rezone'] / f['ports'] * 1e3:.2f}",
    "logout ms/port": lambda f: f"{f['logout'] / f['ports'] * 1e3:.2f}",
    "KiB/port": lambda f: f"{f['memory'] / f['ports'] / 1024:.1f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="How the fabric grows.", allow_abbrev=False)
    parser.add_argument("--ports", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--targets", type=int, default=64)
    parser.add_argument("--units", type=int, default=16384)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if len(options.ports) == 1 and options.json:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
        print(json.dumps(trio.run(measure, options.ports[0], options.targets, options.units)))
        return
    rows = []
    for ports in options.ports:
        words = ["--json", "--ports", ports, "--targets", options.targets, "--units", options.units]
        command = [sys.executable, "-m", "tests.bench.fabric_scale", *map(str, words)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    if options.json:
        print(json.dumps(rows))
        return
    print(" | ".join(COLUMNS))
    for row in rows:
        print(" | ".join(column(row).rjust(len(name)) for name, column in COLUMNS.items()))


if __name__ == "__main__":
    main()
