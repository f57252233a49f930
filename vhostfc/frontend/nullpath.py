"""What a measurement costs by itself: a load on rings with nothing behind them, and a bare copy.

On the null path the generator of load.py does all its work, and each ring is answered at once by the very thread that
drives it (native/frontend_null.c): what a command costs there, the front end costs in every other figure too, but for
the ring's cache lines, which then go from core to core.  The bare copy is what a unit in memory cannot do without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from vhostfc.errors import VhostfcError
from vhostfc.frontend.client import background
from vhostfc.frontend.load import Load, LoadResult, native_ring, run_ring
from vhostfc.frontend.memory import PAGE, GuestMemory
from vhostfc.frontend.packed import PackedRing
from vhostfc.frontend.queue import DriverQueue
from vhostfc.frontend.ring import DriverRing, fence
from vhostfc.native import FFI, LIB

#: Where the null path stands in messages.
NOWHERE = Path("null path")
COPY_BYTES = 1 << 30
COPIES = 50_000


async def run_null_path(loads: Sequence[Load], *, queue_size: int = 128, packed: bool = False) -> LoadResult:
    """Run each load on a ring of its own, all at once, against the null path; the sum of their results.

    Raises ValueError for an impossible load.
    """
    results: list[LoadResult] = []
    with contextlib.ExitStack() as stack:
        memory = GuestMemory()
        stack.callback(memory.close)
        memory.add(sum(PAGE * 4 + 40 * queue_size for _ in loads) + PAGE)
        queues = [_queue(memory, number, queue_size, packed) for number in range(len(loads))]
        for queue in queues:
            stack.callback(queue.close)

        async def one(queue: DriverQueue, load: Load) -> None:
            results.append(await _run_one(memory, queue, load))

        try:
            async with trio.open_nursery() as nursery:
                for queue, load in zip(queues, loads, strict=True):
                    nursery.start_soon(one, queue, load)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
    return sum(results, LoadResult())


def _queue(memory: GuestMemory, number: int, size: int, packed: bool) -> DriverQueue:
    ring = (PackedRing if packed else DriverRing)(memory, size, fence=fence)
    return DriverQueue(number, ring)


async def _run_one(memory: GuestMemory, queue: DriverQueue, load: Load) -> LoadResult:
    stop = FFI.new("uint32_t *")
    size = LIB.vfd_arena_size(load.job(stop), 0)
    if not size:
        raise ValueError(f"a load that cannot be: {load}")
    region = memory.add(-(-size // PAGE) * PAGE)
    arena = region.allocate(region.size)
    assert arena is not None
    ring, views = native_ring(queue, arena)

    async def watch() -> None:
        try:
            await trio.sleep_forever()
        finally:
            stop[0] = LIB.VFD_STOP

    async with background() as nursery:
        nursery.start_soon(watch)
        with trio.CancelScope(shield=True):  # the stop flag ends it
            result = await run_ring(ring, dataclasses.replace(load, null=True), stop, NOWHERE)
    del views
    return result


class BareCopy:
    """Copies of `size` bytes from random places of `media` bytes (1 GiB at most) to one of `depth` buffers.

    Both are shared memory, as a unit's and a guest's are.  A context manager; raises VhostfcError where there is not
    so much memory.
    """

    def __init__(self, size: int, *, media: int, depth: int) -> None:
        self._size = size
        media = max(size, min(media, COPY_BYTES))
        try:
            self._maps = [mmap.mmap(-1, depth * size), mmap.mmap(-1, media)]
        except (OSError, MemoryError) as error:
            raise VhostfcError(f"no {media} bytes of memory for a bare copy: {error}") from error
        self._places = [FFI.from_buffer("uint8_t[]", each, require_writable=True) for each in self._maps]
        for each in self._maps:
            for at in range(0, len(each), PAGE):  # as of a unit that has been written
                each[at] = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for place in self._places:
            FFI.release(place)
        for each in self._maps:
            each.close()

    def time(self) -> float:
        """Nanoseconds of CPU that one takes now."""
        count = max(100, min(COPIES, COPY_BYTES // self._size))
        (to, from_), (here, there) = self._places, self._maps
        return float(LIB.vfd_copy(to, len(here), from_, len(there), self._size, count, 1) / count)
