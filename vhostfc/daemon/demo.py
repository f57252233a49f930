"""`vhostfc demo`: the whole thing in one go, without QEMU and without root.

A fabric, two adapters and their drivers, as processes of their own, in a directory that goes away
afterwards.  What a first look should answer is shown rather than claimed: who sees what, that data of
one adapter never lands in another's unit, that a masked unit cannot be reached, and how fast it is.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from vhostfc.daemon.control import call
from vhostfc.errors import VhostfcError
from vhostfc.fc.wwn import Wwn, new_pair
from vhostfc.frontend.bench import BenchOptions, bench
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.scan import UnitInfo, patiently

START_TIMEOUT = 20.0
STOP_TIMEOUT = 10.0
BENCH_SECONDS = 0.5
#: Blocks that are tagged and read back in each unit, in one command.
TAGGED = 64

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Machine:
    """A virtual machine's adapter."""

    name: str
    wwpn: Wwn
    wwnn: Wwn
    socket: Path
    config: Path

    @property
    def control(self) -> Path:
        return self.socket.with_suffix(".control")


def _write_files(directory: Path) -> tuple[Path, list[Machine]]:
    """The fabric's file and each adapter's, as an administrator would write them."""
    machines = []
    for name in ("vm1", "vm2"):
        wwpn, wwnn = new_pair()
        machines.append(Machine(name, wwpn, wwnn, directory / f"{name}.sock", directory / f"{name}.toml"))
    first, second = machines
    array, node = "50:06:01:60:00:00:00:01", "50:06:01:60:00:00:00:00"
    for machine in machines:
        machine.config.write_text(
            f'state = "{directory / machine.name}"\n[[port]]\nwwpn = "{machine.wwpn}"\nwwnn = "{machine.wwnn}"\n'
            f'[fabric]\nemulated = "{directory / "fabric.sock"}"\n[vhost]\nsocket = "{machine.socket}"\n'
        )
    fabric = directory / "fabric.toml"
    fabric.write_text(
        f"""state = "{directory / "fabric"}"
[fabric]
socket = "{directory / "fabric.sock"}"
[[target]]
name = "array-a"
wwpn = "{array}"
wwnn = "{node}"
[[target.unit]]
lun = 0
size = "64MiB"
allow = ["{first.wwpn}"]
[[target.unit]]
lun = 1
file = "{directory / "disk.img"}"
size = "64MiB"
allow = ["{second.wwpn}"]
[[target.unit]]
lun = 2
size = "32MiB"
allow = ["{first.wwpn}", "{second.wwpn}"]
[[zone]]
name = "vm1"
members = ["{first.wwpn}", "{array}"]
[[zone]]
name = "vm2"
members = ["{second.wwpn}", "{array}"]
"""
    )
    return fabric, machines


class _Daemon:
    """A daemon of the demo; leaving it behind would be rude, so it ends with us."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        self.name = arguments[0]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vhostfc", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )

    def check(self) -> None:
        """Raises VhostfcError with the end of its log when it has ended."""
        if self.process.poll() is not None:
            tail = self.log.read_text(errors="replace")[-2000:]
            raise VhostfcError(f"vhostfc {self.name} ended with status {self.process.returncode}:\n{tail}")

    async def stop(self) -> int:
        """SIGTERM, and SIGKILL when that is not enough; the exit status."""
        self.process.terminate()
        with trio.move_on_after(STOP_TIMEOUT):
            while self.process.poll() is None:
                await trio.sleep(0.01)
        if self.process.poll() is None:
            self.process.kill()
        return self.process.wait()


async def _online(daemon: _Daemon, control: Path) -> dict[str, Any]:
    """The daemon's status once it serves (and an adapter's port is online)."""
    with trio.move_on_after(START_TIMEOUT):
        while True:
            daemon.check()
            if control.exists():
                status = await call(control, "status")
                if status.get("port", {"state": "online"})["state"] == "online":
                    return status
            await trio.sleep(0.01)
    raise VhostfcError(f"vhostfc {daemon.name} is not up after {START_TIMEOUT:g} s:\n{daemon.log.read_text()[-2000:]}")


def _pattern(machine: Machine, unit: UnitInfo, generation: int) -> bytes:
    """TAGGED blocks, each with who wrote it, where and when, and filled with what follows from that."""
    blocks = []
    for lba in range(TAGGED):
        tag = f"{machine.name} {machine.wwpn} {unit.naa} lba={lba} generation={generation}\n".encode()
        filler = hashlib.sha512(tag).digest()
        blocks.append((tag + filler * (unit.block_size // len(filler) + 1))[: unit.block_size])
    return b"".join(blocks)


async def _write(driver: ScsiDriver, unit: UnitInfo, data: bytes) -> None:
    cdb = bytes([0x2A, 0, 0, 0, 0, 0, 0, 0, TAGGED, 0])  # WRITE(10) of LBA 0
    answer = await patiently(driver, unit.target, unit.lun, cdb, data_out=data)
    if not answer.good:
        raise VhostfcError(f"writing unit {unit.address} failed: {answer}")


async def _read(driver: ScsiDriver, unit: UnitInfo) -> bytes:
    cdb = bytes([0x28, 0, 0, 0, 0, 0, 0, 0, TAGGED, 0])  # READ(10) of LBA 0
    answer = await patiently(driver, unit.target, unit.lun, cdb, data_in=TAGGED * unit.block_size)
    if not answer.good:
        raise VhostfcError(f"reading unit {unit.address} failed: {answer}")
    return answer.data_in


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise VhostfcError(f"the demo found a fault: {what}")


def _tree(fabric: dict[str, Any], machines: list[Machine], seen: dict[str, list[UnitInfo]]) -> list[str]:
    """The topology for people."""
    ports = {login["wwpn"]: login["port_id"] for login in fabric["logins"]}
    lines = [f"fabric {fabric['fabric']['wwn']}"]
    for target in fabric["targets"]:
        lines.append(f"├─ target {target['name']}  {target['wwpn']}  port {target['port_id']}")
        for unit in target["units"]:
            size = unit["blocks"] * unit["block_size"] >> 20
            lines.append(f"│  ├─ LUN {unit['lun']}  {size} MiB {unit['medium']:6}  naa.{unit['naa']}")
    for machine in machines:
        last = machine is machines[-1]
        lines.append(f"{'└' if last else '├'}─ {machine.name}  {machine.wwpn}  port {ports[str(machine.wwpn)]}")
        for unit in seen[machine.name]:
            stem = " " if last else "│"
            lines.append(f"{stem}  ├─ sees {unit.address}  {unit.size >> 20} MiB  naa.{unit.naa}")
    return lines


async def run_demo(say: Say = print) -> None:
    """Run it; raises VhostfcError when anything is not as it should be."""
    began = trio.current_time()
    with tempfile.TemporaryDirectory(prefix="vhostfc-demo-") as name:
        directory = Path(name)
        fabric_file, machines = _write_files(directory)
        daemons: list[_Daemon] = []
        try:
            fabric = _Daemon(["fabric", "--config", str(fabric_file)], directory / "fabric.log")
            daemons.append(fabric)
            adapters = {}
            for machine in machines:
                adapter = _Daemon(["serve", "--config", str(machine.config)], directory / f"{machine.name}.log")
                adapters[machine.name] = adapter
                daemons.append(adapter)
            for machine in machines:
                await _online(adapters[machine.name], machine.control)
            say(f"a fabric and {len(machines)} adapters are up after {trio.current_time() - began:.1f} s\n")
            await _tour(directory, machines, say)
        finally:
            with trio.CancelScope(shield=True):
                statuses = [await daemon.stop() for daemon in reversed(daemons)]
        _expect(not any(statuses), f"the daemons ended with statuses {statuses}")
        left = sorted(path.name for path in directory.glob("*.sock")) + sorted(
            path.name for path in directory.glob("*.control")
        )
        _expect(not left, f"sockets were left behind: {', '.join(left)}")
    say(f"\nall is well, after {trio.current_time() - began:.1f} s")


async def _tour(directory: Path, machines: list[Machine], say: Say) -> None:
    """What the drivers see and do."""
    seen: dict[str, list[UnitInfo]] = {}
    async with AsyncExitStack() as stack:
        drivers = {m.name: await stack.enter_async_context(ScsiDriver.open(m.socket)) for m in machines}
        for machine in machines:
            seen[machine.name] = await drivers[machine.name].scan()
        for line in _tree(await call(directory / "fabric.control", "status"), machines, seen):
            say(line)
        say("")
        first, second = machines
        luns = {name: [unit.lun for unit in units] for name, units in seen.items()}
        _expect(luns == {"vm1": [0, 2], "vm2": [1, 2]}, f"the adapters see LUNs {luns}")
        for generation in (1, 2):
            for machine in machines:
                own = seen[machine.name][0]
                await _write(drivers[machine.name], own, _pattern(machine, own, generation))
        for machine in machines:
            own = seen[machine.name][0]
            _expect(
                await _read(drivers[machine.name], own) == _pattern(machine, own, 2), f"{own.address} has other data"
            )
            say(f"{machine.name} wrote its own unit {own.address} twice and reads back the second generation")
        shared, same = seen["vm1"][1], seen["vm2"][1]
        _expect(shared.naa == same.naa, "the shared unit has two names")
        for writer, reader in ((first, second), (second, first)):
            await _write(drivers[writer.name], shared, _pattern(writer, shared, 3))
            _expect(
                await _read(drivers[reader.name], same) == _pattern(writer, shared, 3),
                f"{reader.name} does not read what {writer.name} wrote",
            )
            say(f"{reader.name} reads on the shared unit {shared.address} what {writer.name} wrote")
        masked = await patiently(drivers["vm1"], 0, 1, bytes([0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0]), data_in=512)
        _expect(masked.sense_code == (0x5, 0x25, 0x00), f"vm1 can reach the unit that is masked from it: {masked}")
        say("vm1 cannot reach LUN 1, which is masked from it: LOGICAL UNIT NOT SUPPORTED\n")
    for machine, unit in ((first, "0:0"), (second, "0:1")):
        for rw in ("randread", "randwrite"):
            run = partial(BenchOptions, rw=rw, block_size=4096, iodepth=32, seconds=BENCH_SECONDS, warmup=0.1)
            target, lun = map(int, unit.split(":"))
            result = await bench(machine.socket, run(unit=(target, lun)))
            _expect(result.errors == 0, f"{result.errors} commands of the bench failed")
            kind = "memory" if unit == "0:0" else "file"
            figures = result.as_json()
            latency = figures["latency_us"]
            say(
                f"{machine.name} {rw:9} 4 KiB, 32 in flight, {kind:6} unit: {figures['iops']:9,.0f} IOPS, "
                f"{latency['mean']:6.1f} us mean, {latency['p99']:7.1f} us p99"
            )
