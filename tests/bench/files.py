"""File media against fio's io_uring engine: the same file, block size, depth and direct setting, in turn.

    python -m tests.bench.files [--directory DIR] [--bs 4k] [--iodepth 32] [--rw RW]... [--seconds 2] [--runs 5]

Two files of 1 GiB, written from end to end first, are units of a fabric: one through the page cache, one with direct
I/O.  Each workload is run A B A B: fio on the file, and a driver on the unit (with an adapter of one worker between),
with what is dirty written out before each run, and nothing in the page cache of the file that is there for direct I/O
(which has to look for such pages, and get rid of them).  A row is the medians of both and the median of their ratios;
wanted is 0.95 of fio's rate.

Both sides have the same CPUs: fio and the worker the last one, the driver and the rest of the house the others.  The
driver polls, so that what it costs to wake it, which is the guest's business, does not count.  A CPU that spins may
take something from the device (a virtual machine's disk is a thread of its host, which has the same CPUs), so one spins
beside fio, too.  --sleep: a driver that waits for interrupts, and fio alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

from tests.lab.san import San, UnitSpec
from vhostfc.frontend.bench import BenchOptions, bench
from vhostfc.frontend.options import WORKLOADS, parse_size

SIZE = 1 << 30
WARM_UP = 0.3
CACHES = ("writeback", "none")


@dataclass(frozen=True, slots=True)
class Row:
    """Commands per second, medians; ratio: ours to fio's, the median over the pairs; worker_ns: CPU a command."""

    cache: str
    rw: str
    fio: float
    ours: float
    ratio: float
    least: float
    most: float
    fio_ns: float
    backend_ns: float | None


def write_out(path: Path, *, forget: bool = False) -> None:
    """What is dirty goes to the disk now, so that it is not in the next run's way.  forget: and out of the cache."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def fill(path: Path) -> None:
    """Every block is there: no hole, no extent that was never written."""
    with path.open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(4096) * 256)
    write_out(path)


@contextlib.contextmanager
def spinning(cpu: int) -> Iterator[None]:
    """A CPU has something to do all the time, as that of a driver which polls."""
    process = subprocess.Popen(["taskset", "-c", str(cpu), sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def fio(path: Path, cache: str, options: BenchOptions, cpu: int) -> tuple[float, float]:
    """(commands per second, nanoseconds of CPU a command) of one run.

    As a thread: its processes begin sessions of their own, which the scheduler weighs for themselves.
    """
    done = subprocess.run(
        ["taskset", "-c", str(cpu), "fio", "--name=files", f"--filename={path}", "--ioengine=io_uring", "--norandommap",
         f"--rw={options.rw}", f"--bs={options.block_size}", f"--iodepth={options.iodepth}", f"--size={SIZE}",
         f"--direct={int(cache == 'none')}", "--time_based", f"--runtime={options.seconds}", f"--ramp_time={WARM_UP}",
         "--randrepeat=0", "--invalidate=0", "--fallocate=none", "--thread", "--output-format=json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (job,) = json.loads(done.stdout)["jobs"]
    side = job["read" if WORKLOADS[options.rw][2] else "write"]
    return side["iops"], (job["usr_cpu"] + job["sys_cpu"]) / 100 / side["iops"] * 1e9


async def ours(socket: Path, options: BenchOptions) -> tuple[float, float | None]:
    result = await bench(socket, options)
    assert not result.errors, result.first_error
    return result.iops, result.backend_ns


async def measure(san: San, files: list[Path], options: list[BenchOptions], runs: int, cpu: int) -> list[Row]:
    rows = []
    for cache, path in zip(CACHES, files, strict=True):
        for one in options:
            theirs: list[tuple[float, float]] = []
            found: list[tuple[float, float | None]] = []
            unit = BenchOptions(
                one.rw,
                one.block_size,
                one.iodepth,
                seconds=one.seconds,
                unit=(0, CACHES.index(cache)),
                warmup=WARM_UP,
                poll=one.poll,
            )
            for _ in range(runs):
                write_out(path, forget=cache == "none")
                with spinning(min(os.sched_getaffinity(0))) if one.poll else contextlib.nullcontext():
                    theirs.append(await trio.to_thread.run_sync(fio, path, cache, one, cpu))
                write_out(path, forget=cache == "none")
                found.append(await ours(san.socket(1), unit))
            ratios = [b[0] / a[0] for a, b in zip(theirs, found, strict=True)]
            cpus = [ns for _, ns in found if ns is not None]
            rows.append(
                Row(
                    cache, one.rw, round(statistics.median(rate for rate, _ in theirs)),
                    round(statistics.median(rate for rate, _ in found)), round(statistics.median(ratios), 3),
                    round(min(ratios), 3), round(max(ratios), 3), round(statistics.median(ns for _, ns in theirs)),
                    round(statistics.median(cpus)) if cpus else None,
                )
            )  # fmt: skip
            print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    return (
        f"{row.cache:10} {row.rw:10} fio {row.fio:>9,.0f}/s ({row.fio_ns:,.0f} ns)  ours {row.ours:>9,.0f}/s"
        f" ({row.backend_ns:,.0f} ns)  ratio {row.ratio:.3f} ({row.least:.2f} to {row.most:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="File media against fio's io_uring engine.")
    parser.add_argument("--directory", type=Path, help="where the two files of 1 GiB are to lie")
    parser.add_argument("--bs", default="4k")
    parser.add_argument("--iodepth", type=int, default=32)
    parser.add_argument("--rw", action="append", choices=[*WORKLOADS], help="default: read, write, random and not")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sleep", action="store_true", help="a driver that waits for interrupts, and fio alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    asked = parser.parse_args()
    if not shutil.which("fio"):
        parser.error("fio is not installed")
    kinds = asked.rw or ["randread", "read", "randwrite", "write"]
    options = [
        BenchOptions(rw, parse_size(asked.bs), asked.iodepth, seconds=asked.seconds, unit=(0, 0), poll=not asked.sleep)
        for rw in kinds
    ]
    allowed = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="vhostfc-files-", dir=asked.directory) as name:
        directory = Path(name)
        files = [directory / f"{cache}.img" for cache in CACHES]
        for path in files:
            fill(path)
        units = [
            UnitSpec(lun, f'file = "{path}"\ncache = "{cache}"')
            for lun, (cache, path) in enumerate(zip(CACHES, files, strict=True))
        ]
        with San(directory, units) as san:
            san.start_adapter(1, vhost=f"cpus = [{allowed[-1]}]")
            if len(allowed) > 1:
                os.sched_setaffinity(0, allowed[:-1])
            rows = trio.run(measure, san, files, options, asked.runs, allowed[-1])
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
