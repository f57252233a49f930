"""ORDERED commands among SIMPLE ones of the same ring, through a whole adapter: both ways round, in one batch and over
many, whatever becomes of them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.fakes.stream import HEAD, INQUIRY, ORDERED, PATIENCE, READ, SIMPLE, WRITE, Stream, Task, block, random_stream
from tests.hostile.adapter import DaemonAdapter
from vhostfc.frontend.client import WANTED
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.vhost.features import Feature
from vhostfc.virtio.scsi import Response, TmfSubtype

LAYOUTS = pytest.mark.parametrize(
    ("packed", "indirect"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["split", "split-indirect", "packed", "packed-indirect"],
)


@asynccontextmanager
async def stream(adapter: DaemonAdapter, *, packed: bool = False, indirect: bool = True) -> AsyncIterator[Stream]:
    features = WANTED if indirect else WANTED & ~(1 << Feature.INDIRECT_DESC)
    async with ScsiDriver.open(adapter.socket, queues=2, queue_size=128, features=features, packed=packed) as driver:
        assert (await driver.command(0, 0, READ, data_in=512)).good  # the way to the unit is known
        yield Stream(driver)


async def punts(adapter: DaemonAdapter, count: int) -> None:
    """So many commands are with Python, and no more come."""
    with trio.fail_after(PATIENCE):
        while len(adapter.held) < count:
            await trio.testing.wait_all_tasks_blocked(0.001)
    await trio.testing.wait_all_tasks_blocked(0.02)
    assert len(adapter.held) == count


@LAYOUTS
@pytest.mark.parametrize("at_once", [True, False], ids=["one batch", "batches"])
async def test_both_ways(adapter: DaemonAdapter, packed: bool, indirect: bool, at_once: bool) -> None:
    async with stream(adapter, packed=packed, indirect=indirect) as ring:
        adapter.hold = True

        def put(cdb: bytes, attribute: int, data: bytes | int) -> Task:
            task = ring.put(cdb, attribute, data)
            if not at_once:
                ring.show()
            return task

        before = put(WRITE, SIMPLE, block(1))
        older = put(INQUIRY, SIMPLE, 36)
        ordered = put(INQUIRY, ORDERED, 36)
        after = put(WRITE, SIMPLE, block(2))
        last = put(READ, SIMPLE, 512)
        head = put(INQUIRY, HEAD, 36)
        ring.show()

        await ring.until(before)
        await punts(adapter, 2)  # older, head
        assert ring.answered == [before]
        adapter.answer_held()
        adapter.answer_held()
        await ring.until(older, head)
        await punts(adapter, 1)  # ordered
        assert len(ring.answered) == 3
        # Another ring promises nothing, and so shows what is there.
        assert (await ring.driver.command(0, 0, READ, data_in=512, queue=1)).data_in == block(1)
        adapter.answer_held()
        await ring.until(ordered, after, last)
        assert ordered.place == 3
        assert last.data is not None
        assert bytes(last.data.view) == block(2)
        assert adapter.counters()["held"] == 3
        adapter.hold = False


async def test_other_units_are_not_held_up(adapter: DaemonAdapter) -> None:
    """One that is there and one that is not."""
    async with stream(adapter) as ring:
        adapter.hold = True
        ordered = ring.put(INQUIRY, ORDERED, 36, lun=5)
        behind = ring.put(INQUIRY, SIMPLE, 36, lun=5)
        free = [ring.put(WRITE, SIMPLE, block(1)), ring.put(READ, SIMPLE, 512, pieces=2)]
        ring.show()
        await ring.until(*free)
        await punts(adapter, 1)
        adapter.answer_held()
        await ring.until(ordered)
        await punts(adapter, 1)
        adapter.answer_held()
        await ring.until(behind)
        adapter.hold = False


@pytest.mark.parametrize(
    ("subtype", "tag", "ended", "how"),
    [
        (TmfSubtype.ABORT_TASK, 1, [1], Response.ABORTED),
        (TmfSubtype.ABORT_TASK, 0, [0], Response.ABORTED),
        (TmfSubtype.ABORT_TASK, 2, [2], Response.ABORTED),
        (TmfSubtype.ABORT_TASK_SET, 0, [0, 1, 2, 3], Response.ABORTED),
        (TmfSubtype.LOGICAL_UNIT_RESET, 0, [0, 1, 2, 3], Response.RESET),
        (TmfSubtype.I_T_NEXUS_RESET, 0, [0, 1, 2, 3], Response.RESET),
    ],
    ids=["the ordered one", "what it waits for", "one behind it", "task set", "unit", "nexus"],
)
async def test_held_commands_are_ended(
    adapter: DaemonAdapter, subtype: TmfSubtype, tag: int, ended: list[int], how: Response
) -> None:
    """An INQUIRY, an ORDERED one, a write and a read: what is not ended goes on in the order that is left."""
    async with stream(adapter) as ring:
        adapter.hold = True
        tasks = [
            ring.put(INQUIRY, SIMPLE, 36),
            ring.put(INQUIRY, ORDERED, 36),
            ring.put(WRITE, SIMPLE, block(7)),
            ring.put(READ, SIMPLE, 512),
        ]
        ring.show()
        await punts(adapter, 1)
        assert ring.answered == []
        assert await ring.driver.manage(TmfSubtype.QUERY_TASK, 0, 0, tag=1) == Response.FUNCTION_SUCCEEDED
        assert await ring.driver.manage(subtype, 0, 0, tag=tag) == Response.FUNCTION_COMPLETE
        await ring.until(*(tasks[number] for number in ended))
        assert {tasks[number].answer.response for number in ended} == {how}
        adapter.hold = False
        left = [task for number, task in enumerate(tasks) if number not in ended]
        with trio.fail_after(PATIENCE):
            while any(task.place is None for task in left):
                if adapter.held:
                    adapter.answer_held()
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert all(task.answer.response == Response.OK for task in left)
        if len(ended) < 4:
            read = tasks[3]
            assert read.data is not None
            assert (bytes(read.data.view) == block(7)) == (2 not in ended)


async def test_a_stop_with_held_commands(adapter: DaemonAdapter) -> None:
    """What cannot end in the drain time is RESET, the held ones with it; then the ring begins anew."""
    async with stream(adapter) as ring:
        adapter.hold = True
        for number in range(1, 30):
            ring.put(*((INQUIRY, ORDERED, 36) if number % 3 else (WRITE, SIMPLE, block(number))))
        ring.show()
        await punts(adapter, 1)
        with trio.fail_after(5):
            await ring.driver.stop()
        adapter.hold = False
        await ring.until(*ring.tasks)
        assert {task.answer.response for task in ring.tasks} == {Response.RESET}
        await ring.driver.start()
        assert (await ring.driver.command(0, 0, READ, data_in=512)).data_in != block(3)


async def test_a_stop_lets_held_commands_end(adapter: DaemonAdapter) -> None:
    """Nothing is RESET that can end in time."""
    async with stream(adapter) as ring:
        for number in range(1, 30):
            ring.put(*((INQUIRY, ORDERED, 36) if number % 3 else (WRITE, SIMPLE, block(number))))
        ring.show()
        await ring.driver.stop()
        await ring.driver.start()
        await ring.until(*ring.tasks)
        assert ring.answered == ring.tasks


async def test_a_flood_of_ordered_commands(adapter: DaemonAdapter) -> None:
    """They go one by one; another ring, and the control queue, are served meanwhile."""
    async with stream(adapter) as ring:
        for _ in range(20):
            for _ in range(40):
                ring.put(INQUIRY, ORDERED, 36)
            ring.show()
            assert (await ring.driver.command(0, 0, READ, data_in=512, queue=1, timeout=PATIENCE)).good
            assert await ring.driver.manage(TmfSubtype.QUERY_TASK, 0, 0, tag=999) == Response.FUNCTION_COMPLETE
            await ring.until(*ring.tasks)
            assert ring.answered == ring.tasks
            ring.forget()


@LAYOUTS
@pytest.mark.parametrize("seed", range(3))
async def test_a_random_stream(adapter: DaemonAdapter, packed: bool, indirect: bool, seed: int) -> None:
    """ORDERED commands that do nothing, among reads and writes that C runs and others that it does not."""
    async with stream(adapter, packed=packed, indirect=indirect) as ring:
        await random_stream(ring, random.Random(seed), 40, lambda _: ring.put(INQUIRY, ORDERED, 36))
