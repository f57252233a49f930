"""Start and size: one adapter, or many of them on one fabric, each idle with a driver connected.

    python -m tests.bench.many [--adapters 64] [--json]

Prints how long it takes from exec to a listening socket, from a driver's connect to its first completed READ, until
all are up, and what CPU that takes; what memory each process takes (PSS: shared pages counted by their share), and how
often the adapters wake up in ten seconds when nobody asks anything of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tests.lab.san import Daemon, San, UnitSpec
from vhostfc.frontend.cputime import process_cpu, threads
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.scan import patiently

READ = b"\x28\x00" + bytes(5) + b"\x00\x08\x00"
QUIET_SECONDS = 10.0
WORKER = "vhostfc-worker"
ACCEPTS = "00010000"


def memory(pid: int) -> dict[str, int]:
    """KiB of a process, as /proc/PID/smaps_rollup has them."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        found[name] = int(value.split()[0])
    return found


async def listening(path: Path, daemon: Daemon) -> None:
    """Until somebody listens there (proc(5), /proc/net/unix: a socket that accepts has this flag)."""
    while not any(
        line.split()[3] == ACCEPTS and line.endswith(f" {path}")
        for line in Path("/proc/net/unix").read_text().splitlines()
    ):
        assert daemon.alive, daemon.text()
        await trio.sleep(0.001)


async def first_read(driver: ScsiDriver) -> None:
    """Until a READ of the unit at 0:0 is good: right after the start the port may still look for its targets."""
    while not (await patiently(driver, 0, 0, READ, data_in=4096)).good:
        await trio.sleep(0.001)


def imports(command: str) -> float:
    """Seconds of CPU until a daemon has all its modules, in a fresh interpreter."""
    modules = {
        "serve": "from vhostfc import config, log; from vhostfc.daemon import fdsocket, hba, notify",
        "fabric": "from vhostfc import config, log; from vhostfc.daemon import fabricd",
    }[command]
    code = (
        f"from vhostfc import lean; lean.postpone(); import vhostfc.cli; {modules}; lean.settle()\n"
        "import time; print(time.process_time())"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


@dataclass
class Adapter:
    """started, online, connected, read: seconds of the clock."""

    number: int
    daemon: Daemon
    started: float
    bound: float = 0.0
    connected: float = 0.0
    read: float = 0.0


def spawn(san: San, number: int) -> Adapter:
    began = time.monotonic()
    daemon = Daemon(["serve", "--config", san.write_adapter(number)], san.directory / f"vm{number}.log")
    san.adapters[number] = daemon
    san.started.append(daemon)
    return Adapter(number, daemon, began)


async def bring_up(san: San, adapter: Adapter, stack: AsyncExitStack) -> None:
    """Wait for its socket, connect, read a block; the driver stays until the stack ends."""
    await listening(san.socket(adapter.number), adapter.daemon)
    adapter.bound = time.monotonic()
    driver = await stack.enter_async_context(ScsiDriver.open(san.socket(adapter.number), regions=(1 << 20,)))
    adapter.connected = adapter.bound
    await first_read(driver)
    adapter.read = time.monotonic()


def switches(pids: Sequence[int]) -> list[tuple[int, int]]:
    """(of the workers, of the other threads) of each process."""
    found = []
    for pid in pids:
        there = threads(pid).values()
        worker = sum(thread.switches for thread in there if thread.name == WORKER)
        found.append((worker, sum(thread.switches for thread in there) - worker))
    return found


async def measure(san: San, count: int) -> dict[str, Any]:
    """Start them all at once; the figures."""
    began = time.monotonic()
    san.start_fabric()
    fabric = time.monotonic()
    async with AsyncExitStack() as stack:
        adapters = [spawn(san, number) for number in range(1, count + 1)]
        for adapter in adapters:
            await bring_up(san, adapter, stack)
        up = time.monotonic()
        spent = [process_cpu(adapter.daemon.pid) or 0.0 for adapter in adapters]
        pids = [adapter.daemon.pid for adapter in adapters]
        fabric_pid = san.the_fabric.pid
        await trio.sleep(4.0)  # what belongs to the start
        before = switches([*pids, fabric_pid])
        await trio.sleep(QUIET_SECONDS)
        after = switches([*pids, fabric_pid])
        sizes = [memory(pid) for pid in pids]
        woke = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)]
        return {
            "adapters": count,
            "fabric_up_s": round(fabric - began, 3),
            "all_up_s": round(up - began, 3),
            "exec_to_socket_s": _spread([adapter.bound - adapter.started for adapter in adapters]),
            "cpu_until_up_s": _spread(spent),
            "connect_to_read_s": _spread([adapter.read - adapter.connected for adapter in adapters]),
            "pss_mib": _spread([size["Pss"] / 1024 for size in sizes]),
            "rss_mib": _spread([size["Rss"] / 1024 for size in sizes]),
            "private_mib": _spread([size["Private_Dirty"] / 1024 for size in sizes]),
            "fabric_pss_mib": round(memory(fabric_pid)["Pss"] / 1024, 2),
            "worker_switches_10s": _spread([float(worker) for worker, _ in woke[:-1]]),
            "process_switches_10s": _spread([float(rest) for _, rest in woke[:-1]]),
            "fabric_switches_10s": woke[-1][1],
        }


def _spread(values: Sequence[float]) -> dict[str, float]:
    figures = {"median": statistics.median(values), "max": max(values)}
    return {name: round(value, 3) for name, value in figures.items()}


def run(count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="vhostfc-many-") as directory:
        san = San(Path(directory), [UnitSpec(0, 'size = "64MiB"')])
        with contextlib.ExitStack() as stack:
            stack.callback(san.stop)
            figures = trio.run(measure, san, count)
        for log in Path(directory).glob("*.log"):
            text = log.read_text(errors="replace")
            if "Traceback" in text:
                raise RuntimeError(f"{log.name}: an exception in the log is a fault\n{text}")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Start and size of adapters.")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = {"import_cpu_s": {name: imports(name) for name in ("serve", "fabric")}}
    figures |= {"one": run(1)}
    if options.adapters > 1:
        figures |= {"many": run(options.adapters)}
    if options.json:
        print(json.dumps(figures))
        return
    for name, values in figures.items():
        print(f"{name}:")
        for key, value in values.items():
            shown = ", ".join(f"{k} {v:g}" for k, v in value.items()) if isinstance(value, dict) else f"{value:g}"
            print(f"  {key:24} {shown}")


if __name__ == "__main__":
    main()
