"""A guest that floods its adapter costs itself, not the others."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from tests.lab.san import San, UnitSpec
from tests.process.driving import MIB, ready
from vhostfc.frontend.driver import ScsiDriver

ROOT = Path(__file__).resolve().parents[2]
MODE_SENSE = bytes([0x1A, 0, 0x3F, 0, 255, 0])
SAMPLES = 100


def memory(pid: int) -> int:
    """Bytes that a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@contextmanager
def flooded(san: San, number: int) -> Iterator[dict[str, int]]:
    """While the block runs; how the commands ended is in the dictionary afterwards."""
    command = [sys.executable, "-m", "tests.process.flood", str(san.socket(number))]
    ends: dict[str, int] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as flood:
        try:
            assert flood.stdout
            assert flood.stdout.readline() == "ready\n"
            San.wait_for(lambda: san.status(number)["counters"]["punted"] > 1000)
            yield ends
            flood.terminate()
            ends.update(json.loads(flood.stdout.readline()))
        finally:
            flood.kill()


async def round_trips(driver: ScsiDriver) -> list[float]:
    """Seconds of MODE SENSE, one after the other."""
    found = []
    for _ in range(SAMPLES):
        began = trio.current_time()
        assert (await driver.command(0, 0, MODE_SENSE, data_in=255, timeout=30)).good
        found.append(trio.current_time() - began)
    return found


async def test_it_delays_nobody_else(tmp_path: Path) -> None:
    with San(tmp_path, [UnitSpec(0)]) as san:
        san.start_adapters({1: {}, 2: {"fabric": "fast_path = false"}})
        async with ScsiDriver.open(san.socket(1)) as driver:
            await ready(driver, 0)
            quiet = statistics.median(await round_trips(driver))
            before = memory(san.the_fabric.pid), memory(san.adapters[2].pid)
            with flooded(san, 2) as ends:
                trips = sorted(await round_trips(driver))
            after = memory(san.the_fabric.pid), memory(san.adapters[2].pid)
        print(
            f"MODE SENSE: {quiet * 1e6:.0f} us; beside a flood {statistics.median(trips) * 1e6:.0f} us,"
            f" p95 {trips[94] * 1e6:.0f} us, at most {trips[-1] * 1e6:.0f} us; the flood {ends}"
        )
        assert ends["other"] == 0
        assert ends["good"]
        assert ends["full"], "more than the ration was taken in"
        assert statistics.median(trips) < max(10 * quiet, 0.02)
        assert trips[-1] < 1.0
        for one, other in zip(before, after, strict=True):
            assert other - one < 32 * MIB
