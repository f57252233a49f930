"""Loads on a driver's request rings: the door from Python to native/frontend.c.

A load runs on one thread per ring, with the ring lent to it by the driver, its buffers in a memory
region of their own (plugged in for the time of the load), and the GIL released.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import trio

from vhostfc.frontend.client import BackendError, background
from vhostfc.frontend.driver import ScsiDriver, sense_code
from vhostfc.frontend.memory import PAGE, Buffer
from vhostfc.frontend.packed import PackedRing
from vhostfc.frontend.queue import DriverQueue
from vhostfc.frontend.ring import DriverRing
from vhostfc.native import FFI, LIB
from vhostfc.virtio.scsi import Queue, Response, encode_lun

SECOND = 1_000_000_000
READS, WRITES = 0, 1
#: What each kind of failure is called, by enum vfd_kind.
KINDS = (
    "ok",
    "used ring",
    "used length",
    "response",
    "status",
    "residual",
    "torn block",
    "misplaced block",
    "stale block",
    "block from the future",
)


class GenerationTable:
    """What each block of a range should hold; shared by all loads that write it.  A context manager."""

    def __init__(self, first: int, blocks: int) -> None:
        self.first, self.blocks = first, blocks
        box = FFI.new("struct vfd_table **")
        result = LIB.vfd_table_new(first, blocks, box)
        if result < 0:
            raise OSError(-result, f"a table of {blocks} blocks")
        self.handle: Any = box[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        LIB.vfd_table_free(self.handle)
        self.handle = FFI.NULL


@dataclass(frozen=True, slots=True)
class Verification:
    """Tag what is written and check what is read.

    run: tells this run's blocks from all others, not 0; who writes to the same blocks shares it.  writer: our
    number among those.  unit: the unit's number, so that a block of another unit is found out.  shared: others
    write these blocks too.
    """

    table: GenerationTable
    run: int
    writer: int = 1
    unit: int = 0
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """What one ring is to do.

    first, blocks: the range, in the unit's blocks.  io_size: bytes of a command.  depth: commands in flight.
    segment: bytes of a data descriptor, 0: one for all.  seconds: measured, 0: until `commands`; warmup: seconds
    before that; commands: 0: no limit.  stall: seconds without any answer that are taken for a dead device.
    null: nobody is behind the ring, see nullpath.py.
    """

    target: int
    lun: int
    first: int
    blocks: int
    block_size: int = 512
    io_size: int = 4096
    depth: int = 32
    read_percent: int = 100
    random: bool = True
    segment: int = 0
    poll: bool = False
    retry: bool = True
    fua: bool = False
    null: bool = False
    seconds: float = 0.0
    warmup: float = 0.0
    commands: int = 0
    seed: int = 1
    stall: float = 30.0
    verification: Verification | None = None

    def _flags(self) -> int:
        flags = 0
        for on, bit in (
            (self.random, LIB.VFD_RANDOM),
            (self.poll, LIB.VFD_POLL),
            (not self.retry, LIB.VFD_NO_RETRY),
            (self.fua, LIB.VFD_FUA),
            (self.null, LIB.VFD_NULL),
            (self.verification is not None, LIB.VFD_VERIFY),
            (self.verification is not None and self.verification.shared, LIB.VFD_SHARED),
        ):
            flags |= bit if on else 0
        return flags

    def job(self, stop: Any) -> Any:
        """The struct vfd_job; stop: a uint32_t * that outlives it."""
        job = FFI.new("struct vfd_job *")
        job.lun = encode_lun(self.target, self.lun)
        job.first, job.blocks, job.block_size = self.first, self.blocks, self.block_size
        job.io_size, job.segment, job.depth = self.io_size, self.segment, self.depth
        job.read_percent, job.flags, job.seed = self.read_percent, self._flags(), self.seed
        job.warmup_ns, job.duration_ns = int(self.warmup * SECOND), int(self.seconds * SECOND)
        job.max_commands, job.stall_ns = self.commands, int(self.stall * SECOND)
        if self.verification is not None:
            check = self.verification
            job.run, job.writer, job.unit, job.table = check.run, check.writer, check.unit, check.table.handle
        job.stop = stop
        return job


def max_depth(load: Load, ring_size: int, *, indirect: bool) -> int:
    """The most commands of this load that a ring holds at a time."""
    depth: int = LIB.vfd_max_depth(load.job(FFI.NULL), ring_size, LIB.VFD_INDIRECT if indirect else 0)
    return depth


# ------------------------------------------------------------------------------------------------ results


@dataclass(frozen=True, slots=True)
class Failure:
    """The first thing that went wrong, in full.  low, high: the generations that would have been right."""

    kind: str
    write: bool
    lba: int
    blocks: int
    cdb: bytes
    response: bytes
    used_id: int = 0
    used_length: int = 0
    low: int = 0
    high: int = 0
    found_run: int = 0
    found_writer: int = 0
    found_unit: int = 0
    found_lba: int = 0
    found_generation: int = 0
    found_place: int = 0

    def __str__(self) -> str:
        what = f"{'write' if self.write else 'read'} of {self.blocks} blocks at {self.lba}"
        response, status = self.response[11], self.response[10]
        match self.kind:
            case "response":
                names = {member.value: member.name for member in Response}
                return f"{what}: response {names.get(response, response)}"
            case "status":
                key, asc, ascq = sense_code(self.response[12:])
                return f"{what}: status {status:02x}h, sense {key:x}/{asc:02x}/{ascq:02x}"
            case "residual":
                return f"{what}: GOOD, but {int.from_bytes(self.response[4:8], 'little')} bytes were not moved"
            case "used length":
                return f"{what}: the used ring says {self.used_length} bytes"
            case "used ring":
                return f"the used ring is nonsense: id {self.used_id}, length {self.used_length}"
        return (
            f"{self.kind} at LBA {self.lba}: generation {self.low} to {self.high} was expected; found run"
            f" {self.found_run:#x} writer {self.found_writer} unit {self.found_unit} LBA {self.found_lba}"
            f" generation {self.found_generation} at place {self.found_place}"
        )


@dataclass(frozen=True, slots=True)
class Latency:
    """A distribution of nanoseconds in the buckets of vfd_bucket_floor()."""

    count: int = 0
    total: int = 0
    least: int = 0
    most: int = 0
    histogram: tuple[int, ...] = ()

    def __add__(self, other: Latency) -> Latency:
        if not self.count or not other.count:
            return self if self.count else other
        return Latency(
            self.count + other.count,
            self.total + other.total,
            min(self.least, other.least),
            max(self.most, other.most),
            tuple(a + b for a, b in zip(self.histogram, other.histogram, strict=True)),
        )

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """The value that so many per cent do not exceed, to within a bucket (1.6 %)."""
        rank = percent / 100 * self.count
        seen = 0
        for bucket, number in enumerate(self.histogram):
            seen += number
            if number and seen >= rank:
                middle = (LIB.vfd_bucket_floor(bucket) + LIB.vfd_bucket_floor(bucket + 1)) / 2
                return float(min(max(middle, self.least), self.most))
        return 0.0


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What a load did; results of rings that ran at the same time add up.

    errors: commands that ended badly.  kinds, responses, statuses: how many of each.  seconds: of the measured
    part (the longest).  cpu_seconds: of the driver's threads in it.  verified: blocks whose generation was checked.
    """

    read_commands: int = 0
    write_commands: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    reads: Latency = Latency()
    writes: Latency = Latency()
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    errors: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    responses: dict[int, int] = field(default_factory=dict)
    statuses: dict[int, int] = field(default_factory=dict)
    retries: int = 0
    verified: int = 0
    unknown: int = 0
    kicks: int = 0
    waits: int = 0
    first: Failure | None = None

    @property
    def commands(self) -> int:
        return self.read_commands + self.write_commands

    @property
    def latency(self) -> Latency:
        return self.reads + self.writes

    def __add__(self, other: LoadResult) -> LoadResult:
        return LoadResult(
            self.read_commands + other.read_commands,
            self.write_commands + other.write_commands,
            self.read_bytes + other.read_bytes,
            self.write_bytes + other.write_bytes,
            self.reads + other.reads,
            self.writes + other.writes,
            max(self.seconds, other.seconds),
            self.cpu_seconds + other.cpu_seconds,
            self.errors + other.errors,
            _sum(self.kinds, other.kinds),
            _sum(self.responses, other.responses),
            _sum(self.statuses, other.statuses),
            self.retries + other.retries,
            self.verified + other.verified,
            self.unknown + other.unknown,
            self.kicks + other.kicks,
            self.waits + other.waits,
            self.first or other.first,
        )


K = TypeVar("K")


def _sum(one: dict[K, int], other: dict[K, int]) -> dict[K, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in [*one, *(key for key in other if key not in one)]}


def _latency(side: Any) -> Latency:
    return Latency(
        side.commands, side.latency_sum, side.latency_min, side.latency_max,
        tuple(FFI.unpack(side.histogram, LIB.VFD_BUCKETS)),
    )  # fmt: skip


def _failure(first: Any) -> Failure | None:
    if not first.kind:
        return None
    found = first.found
    return Failure(
        KINDS[first.kind], bool(first.write), first.lba, first.blocks, bytes(first.cdb), bytes(first.response),
        first.used_id, first.used_length, first.low, first.high,
        found.run, found.writer, found.unit, found.lba, found.generation, found.place,
    )  # fmt: skip


def _result(out: Any) -> LoadResult:
    reads, writes = out.side[READS], out.side[WRITES]
    return LoadResult(
        reads.commands, writes.commands, reads.bytes, writes.bytes, _latency(reads), _latency(writes),
        out.elapsed_ns / SECOND, out.cpu_ns / SECOND, out.errors,
        {KINDS[n]: out.kinds[n] for n in range(1, LIB.VFD_KINDS) if out.kinds[n]},
        {n: out.responses[n] for n in range(16) if out.responses[n]},
        {n: out.statuses[n] for n in range(256) if out.statuses[n]},
        out.retries, out.verified, out.unknown, out.kicks, out.waits, _failure(out.first),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ running


def ring_flags(ring: DriverRing | PackedRing) -> int:
    """vfd_ring.flags."""
    flags = 0
    for on, bit in (
        (ring.event_idx, LIB.VFD_EVENT_IDX),
        (ring.indirect, LIB.VFD_INDIRECT),
        (ring.PACKED, LIB.VFD_PACKED),
    ):
        flags |= bit if on else 0
    return flags


def native_ring(queue: DriverQueue, arena: Buffer) -> tuple[Any, list[Any]]:
    """The struct vfd_ring, and what keeps its pointers alive."""
    own = queue.vring
    views = [FFI.from_buffer("uint8_t[]", part.view) for part in (own.desc, own.avail, own.used, arena)]
    ring = FFI.new("struct vfd_ring *")
    ring.desc, ring.avail, ring.used, ring.arena = views
    ring.flags = ring_flags(own)
    ring.arena_gpa, ring.arena_size, ring.size = arena.guest, len(arena), own.size
    ring.kick_fd, ring.call_fd = queue.kick_fd, queue.call_fd
    ring.avail_index, ring.used_index = own.avail_index, own.used_index
    return ring, views


class _StoppedError(Exception):
    """vfd_run() gave up: its error, and what it had to say."""

    def __init__(self, code: int, out: Any) -> None:
        super().__init__(code)
        self.code, self.out = code, out


async def run_ring(ring: Any, load: Load, stop: Any, where: Path) -> LoadResult:
    """Run a load on a struct vfd_ring.  Raises ValueError for an impossible one, BackendError."""
    try:
        return await _run(ring, load, stop)
    except _StoppedError as ending:
        raise _complaint(str(where), load, ending) from None


async def _run(ring: Any, load: Load, stop: Any) -> LoadResult:
    out = FFI.new("struct vfd_result *")
    result = await trio.to_thread.run_sync(LIB.vfd_run, ring, load.job(stop), out)
    if result < 0:
        raise _StoppedError(-result, out)
    return _result(out)


async def _run_one(driver: ScsiDriver, queue: DriverQueue, load: Load, arena: Buffer, stop: Any) -> LoadResult:
    where = f"{driver.client.path}: ring {queue.index}"
    async with queue.lend() as own:
        ring, views = native_ring(queue, arena)
        try:
            return await _run(ring, load, stop)
        except _StoppedError as ending:
            error = _complaint(where, load, ending, str(driver.client.reason or f"{where} is broken"))
            if isinstance(error, BackendError):
                queue.fail(error)
            raise error from None
        finally:
            del views
            own.hand_back(ring.avail_index, ring.used_index)


def _complaint(where: str, load: Load, ending: _StoppedError, gone: str = "") -> BackendError | ValueError:
    out = ending.out
    match ending.code:
        case errno.ETIMEDOUT:
            return BackendError(f"{where}: {out.in_flight} commands in flight, and no answer for {load.stall:g} s")
        case errno.ECANCELED:
            return BackendError(f"{gone} ({out.in_flight} commands in flight)")
        case errno.EPROTO:
            return BackendError(f"{where}: {_failure(out.first)}")
    return ValueError(f"a load that cannot be: {load}")


async def run_load(
    driver: ScsiDriver,
    loads: Sequence[Load],
    *,
    warm: Callable[[], None] | None = None,
    until: trio.Event | None = None,
) -> LoadResult:
    """Run each load on a request queue of its own, the first on queue 0, all at once; the sum of their results.

    warm: called when the (first load's) warm-up is over.  until: ends the loads in good order, as a cancellation
    does (which leaves no result).  Raises BackendError when the back end goes away, falls silent or breaks the
    ring; ValueError for an impossible load.
    """
    stop = FFI.new("uint32_t *")
    sizes = [-(-LIB.vfd_arena_size(load.job(stop), 0) // PAGE) * PAGE for load in loads]
    if not all(sizes):
        raise ValueError(f"a load that cannot be: {loads[sizes.index(0)]}")
    region = await driver.client.add_region(sum(sizes))
    results: list[LoadResult] = []
    failures: list[Exception] = []

    async def one(queue: DriverQueue, load: Load, arena: Buffer) -> None:
        try:
            with trio.CancelScope(shield=True):  # the stop flag ends it, so that the ring comes back empty
                results.append(await _run_one(driver, queue, load, arena, stop))
        except (BackendError, ValueError) as error:
            failures.append(error)
            stop[0] = max(stop[0], LIB.VFD_STOP)

    async def watch(event: trio.Event, how: int = LIB.VFD_STOP_NOW) -> None:
        await event.wait()
        stop[0] = max(stop[0], how)

    async def steer() -> None:
        try:
            await trio.sleep(loads[0].warmup)
            if warm is not None:
                warm()
            await trio.sleep_forever()
        finally:
            stop[0] = max(stop[0], LIB.VFD_STOP)

    try:
        async with background() as watchers:
            watchers.start_soon(watch, driver.client.gone)
            watchers.start_soon(steer)
            if until is not None:
                watchers.start_soon(watch, until, LIB.VFD_STOP)
            async with trio.open_nursery() as nursery:
                for number, load in enumerate(loads):
                    queue = driver.queues[Queue.REQUEST + number]
                    watchers.start_soon(watch, queue.broken)
                    start = sum(sizes[:number])
                    arena = Buffer(region, start, region.view[start : start + sizes[number]])
                    nursery.start_soon(one, queue, load, arena)
    finally:
        if not failures:  # else the region stays: the back end may still write to it
            with trio.CancelScope(shield=True):
                await driver.client.remove_region(region)
    if failures:
        raise failures[0]
    return sum(results, LoadResult())
