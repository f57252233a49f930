"""Fairness: what a flood on one queue does to a guest that asks for one block at a time on another.

    python -m tests.bench.fairness [--socket SOCKET --unit T:L] [--runs 5] [--json]

Writes at depth 256 on one queue, reads at depth 1 on the other, of one worker: the latency of the reads with the flood
and without it, taken in turn.  Without --socket a fabric and an adapter are started.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import trio

from tests.lab.san import San, UnitSpec
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.load import Load, run_load
from vhostfc.frontend.options import parse_unit
from vhostfc.frontend.scan import scan_unit

FLOOD = 256
SECONDS, WARM_UP = 1.0, 0.2


async def measure(socket: Path, where: tuple[int, int], runs: int) -> dict[str, Any]:
    """Microseconds, medians over the runs; flood_iops: what the flood gets meanwhile."""
    quiet: list[float] = []
    flooded: list[float] = []
    iops: list[float] = []
    async with ScsiDriver.open(socket, queues=2, queue_size=FLOOD) as driver:
        unit = await scan_unit(driver, *where)
        assert unit is not None
        probe = Load(
            *where, 0, unit.blocks, unit.block_size, max(4096, unit.block_size), 1, seconds=SECONDS, warmup=WARM_UP
        )
        flood = Load(
            *where, 0, unit.blocks, unit.block_size, probe.io_size, FLOOD, 0, seconds=SECONDS, warmup=WARM_UP, seed=2
        )
        for _ in range(runs):
            quiet.append((await run_load(driver, [probe])).reads.percentile(50) / 1000)
            both = await run_load(driver, [flood, probe])
            assert not both.errors, both.first
            flooded.append(both.reads.percentile(50) / 1000)
            iops.append(both.write_commands / both.seconds)
    ratios = [b / a for a, b in zip(quiet, flooded, strict=True)]
    return {
        "quiet_p50_us": round(statistics.median(quiet), 2),
        "flooded_p50_us": round(statistics.median(flooded), 2),
        "ratio": round(statistics.median(ratios), 2),
        "flood_iops": round(statistics.median(iops)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency at depth 1 beside a flood.")
    parser.add_argument("--socket", type=Path, help="this back end instead of one of our own; destroys the unit's data")
    parser.add_argument("--unit", default="0:0", metavar="T:L")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.socket is not None:
        figures = trio.run(measure, options.socket, parse_unit(options.unit), options.runs)
    else:
        with (
            tempfile.TemporaryDirectory(prefix="vhostfc-fair-") as directory,
            San(Path(directory), [UnitSpec(0, 'size = "1GiB"')]) as san,
        ):
            san.start_adapter(1)
            figures = trio.run(measure, san.socket(1), (0, 0), options.runs)
    print(json.dumps(figures) if options.json else "\n".join(f"{key:16} {value:,}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
