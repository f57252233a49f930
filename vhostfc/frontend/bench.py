"""`vhostfc bench`: load a unit as a guest would, measure it, and prove its data when asked.

What writes is never guessed: without an explicit unit nothing is written, whether by the workload or
by --verify, which must write the blocks that it wants to recognize.

A figure is the median of several runs, each after a warm-up.  Two back ends are compared in one go, A B A B, since
what a machine does beside changes from minute to minute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import zlib
from collections.abc import Sequence
from pathlib import Path

from vhostfc.errors import VhostfcError
from vhostfc.frontend.client import WANTED
from vhostfc.frontend.cputime import Thread, threads, used
from vhostfc.frontend.driver import MIB, ScsiDriver
from vhostfc.frontend.figures import BenchResult, Comparison, Run, merge
from vhostfc.frontend.load import GenerationTable, Load, LoadResult, Verification, max_depth, run_load
from vhostfc.frontend.nullpath import BareCopy, run_null_path
from vhostfc.frontend.options import WORKLOADS, BenchOptions
from vhostfc.frontend.scan import TYPE_DISK, UnitInfo
from vhostfc.vhost.features import Feature

__all__ = ["BenchOptions", "BenchResult", "Comparison", "bench", "choose_unit", "compare", "null_path", "unit_number"]

#: What a verified run works on at most, so that writing it first and reading it back last stay short.
VERIFIED_BYTES = 256 * MIB
FILL_SIZE = 256 * 1024
FILL_DEPTH = 8


def choose_unit(units: Sequence[UnitInfo], wanted: tuple[int, int] | None, socket: Path) -> UnitInfo:
    """The unit to load.  Raises VhostfcError that lists what there is."""
    disks = [unit for unit in units if unit.device_type == TYPE_DISK and unit.blocks]
    there = ", ".join(unit.address for unit in disks) or "none"
    if wanted is None:
        if len(disks) == 1:
            return disks[0]
        if not disks:
            raise VhostfcError(f"{socket}: there is no disk to load")
        raise VhostfcError(f"{socket}: say which unit with --unit; there are {there}")
    for unit in disks:
        if (unit.target, unit.lun) == wanted:
            return unit
    raise VhostfcError(f"{socket}: --unit {wanted[0]}:{wanted[1]}: there is no such disk; there are {there}")


def unit_number(unit: UnitInfo) -> int:
    """16 bits that tell a unit's tags from another's, the same from every adapter that sees it."""
    name = unit.naa or unit.serial or unit.address
    return zlib.crc32(name.encode()) & 0xFFFF


def _check_against(unit: UnitInfo, options: BenchOptions, driver: ScsiDriver) -> int:
    """The blocks of a command.  Raises VhostfcError for what this unit or this back end cannot do."""
    if options.block_size % unit.block_size:
        raise VhostfcError(
            f"--bs: {options.block_size} bytes are not a multiple of unit {unit.address}'s blocks of {unit.block_size}"
        )
    blocks = options.block_size // unit.block_size
    if blocks * options.queues > unit.blocks:
        raise VhostfcError(f"--bs: {options.queues} x {options.block_size} bytes are more than unit {unit.address} has")
    load = Load(unit.target, unit.lun, 0, unit.blocks, unit.block_size, options.block_size, options.iodepth)
    ring = driver.queues[-1].vring
    most = max_depth(load, ring.size, indirect=ring.indirect)
    if options.iodepth > most:
        raise VhostfcError(f"--iodepth: {options.iodepth} in flight, but a ring of {ring.size} holds {most} commands")
    return blocks


def _loads(
    unit: UnitInfo, options: BenchOptions, region: tuple[int, int], check: Verification | None, run: int = 0
) -> list[Load]:
    """One load a queue: random ones share the range, sequential ones have a slice each."""
    random = WORKLOADS[options.rw][0]
    first, blocks = region
    per_command = options.block_size // unit.block_size
    share = blocks // per_command // options.queues * per_command
    return [
        Load(
            unit.target,
            unit.lun,
            first if random else first + number * share,
            blocks if random else share,
            unit.block_size,
            options.block_size,
            options.iodepth,
            options.percent,
            random,
            poll=options.poll,
            seconds=0.0 if options.commands else options.seconds / options.runs,
            warmup=options.warmup,
            commands=-(-options.commands // options.queues),
            seed=options.seed + number + options.queues * run,
            verification=check,
        )
        for number in range(options.queues)
    ]


def _pass(unit: UnitInfo, region: tuple[int, int], check: Verification, size: int, *, write: bool) -> list[Load]:
    """One sequential pass over the region: loads to run one after the other."""
    first, blocks = region
    per_command = max(1, size // unit.block_size)
    whole = blocks // per_command
    parts = [(first, whole * per_command, per_command)] if whole else []
    if blocks % per_command:
        parts.append((first + whole * per_command, blocks % per_command, blocks % per_command))
    return [
        Load(
            unit.target,
            unit.lun,
            start,
            count,
            unit.block_size,
            each * unit.block_size,
            min(FILL_DEPTH, count // each),
            0 if write else 100,
            random=False,
            commands=count // each,
            verification=check,
        )
        for start, count, each in parts
    ]


async def _sweep(driver: ScsiDriver, loads: Sequence[Load]) -> LoadResult:
    result = LoadResult()
    for load in loads:
        result += await run_load(driver, [load])
    return result


async def bench(socket: Path, options: BenchOptions, *, timeout: float = 10.0) -> BenchResult:
    """Run the workload `runs` times.

    With verify: blocks are tagged with writer, LBA and generation; what the workload only reads is written
    before (the first 256 MiB at most), every block read is checked, and all of it is read back at the end.
    Raises VhostfcError, one line, when it cannot be run; what goes wrong while it runs is counted in the result,
    but for a back end that goes away or falls silent (BackendError).
    """
    async with contextlib.AsyncExitStack() as stack:
        driver = await stack.enter_async_context(_driver(socket, options, timeout))
        unit = choose_unit(await driver.scan(), options.unit, socket)
        per_command = _check_against(unit, options, driver)
        blocks = unit.blocks
        check = None
        if options.verify:
            least = options.queues * per_command
            blocks = min(blocks, max(VERIFIED_BYTES // unit.block_size, least))
            table = stack.enter_context(GenerationTable(0, blocks))
            check = Verification(table, secrets.randbits(62) | 1, unit=unit_number(unit))
        region = (0, blocks)
        checks = LoadResult() if check is not None else None
        if check is not None and options.percent:
            checks = await _sweep(driver, _pass(unit, region, check, FILL_SIZE, write=True))
        copy = None
        if options.bare_copy:
            copy = stack.enter_context(BareCopy(options.block_size, media=unit.size, depth=options.iodepth))
        runs = []
        for number in range(options.runs):
            bare = copy.time() if copy else None  # beside each run: they are to meet the same machine
            run = await _measure(driver, _loads(unit, options, region, check, number))
            runs.append(dataclasses.replace(run, copy=(bare + copy.time()) / 2) if bare and copy else run)
        if check is not None and checks is not None:
            checks += await _sweep(driver, _pass(unit, region, check, FILL_SIZE, write=False))
    null = await null_path(options, unit) if options.null_path else None
    return BenchResult(socket, unit, options, region, tuple(runs), checks, null)


def _driver(socket: Path, options: BenchOptions, timeout: float) -> contextlib.AbstractAsyncContextManager[ScsiDriver]:
    # No interest in events: a bench must not be told of what it does not read.
    features = WANTED & ~(1 << Feature.SCSI_HOTPLUG) & ~(1 << Feature.SCSI_CHANGE)
    return ScsiDriver.open(
        socket, queues=options.queues, queue_size=options.ring_size, timeout=timeout, features=features,
        packed=options.packed,
    )  # fmt: skip


async def _measure(driver: ScsiDriver, loads: Sequence[Load]) -> Run:
    pid = driver.client.peer_pid
    own = pid in (0, os.getpid())  # in one process the two sides' CPU cannot be told apart
    before: list[dict[int, Thread]] = [{}]

    def warm() -> None:
        before[0] = {} if own else threads(pid)

    load = await run_load(driver, loads, warm=warm)
    after = {} if own else threads(pid)
    return Run(load, used(before[0], after) if before[0] and after else None)


async def null_path(options: BenchOptions, unit: UnitInfo | None = None) -> tuple[Run, ...]:
    """The same workload on rings with nothing behind them.  unit: whose geometry to take, else a disk of 1 GiB."""
    unit = unit or UnitInfo(0, 0, blocks=1 << 21, block_size=512)
    options = dataclasses.replace(options, verify=False, poll=True)
    most = max_depth(Load(0, 0, 0, unit.blocks, unit.block_size, options.block_size), options.ring_size, indirect=True)
    if options.iodepth > most or options.block_size % unit.block_size:
        raise VhostfcError(f"--null-path: commands of {options.block_size} bytes, {options.iodepth} in flight")
    runs = []
    for number in range(options.runs):
        loads = _loads(unit, options, (0, unit.blocks), None, number)
        result = await run_null_path(loads, queue_size=options.ring_size, packed=options.packed)
        runs.append(Run(result, None))
    return tuple(runs)


async def compare(sockets: tuple[Path, Path], options: BenchOptions, *, timeout: float = 10.0) -> Comparison:
    """Load two back ends in turn, A B A B, `runs` times each.  Raises what bench() raises.

    Each run is a connection of its own, so that the two may also be one back end.
    """
    once = dataclasses.replace(
        options, runs=1, seconds=options.seconds / options.runs, null_path=False, bare_copy=False
    )
    results: tuple[list[BenchResult], list[BenchResult]] = ([], [])
    for _ in range(options.runs):
        for socket, found in zip(sockets, results, strict=True):
            found.append(await bench(socket, once, timeout=timeout))
    first, second = (merge(found, options) for found in results)
    return Comparison(first, second)
