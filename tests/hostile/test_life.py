"""Stopping, resetting and managing while commands are in flight: bounded, complete, and in the right order."""

from __future__ import annotations

import contextlib
import os

import pytest
import trio
import trio.testing

from tests.hostile.adapter import DaemonAdapter
from tests.hostile.guest import INQUIRY, READ
from vhostfc.frontend.client import BackendError
from vhostfc.frontend.driver import Response as Answer
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.load import GenerationTable, Load, Verification, run_load
from vhostfc.virtio.scsi import ControlType, Response, TmfSubtype

HELD = 6


Answers = list[tuple[int, Answer]]


async def hold(adapter: DaemonAdapter, driver: ScsiDriver, nursery: trio.Nursery, answers: Answers) -> None:
    """Put HELD INQUIRYs in flight, tags 1 to HELD, on LUN 0; they stay there."""

    async def inquire(tag: int) -> None:
        answers.append((tag, await driver.command(0, 0, INQUIRY, data_in=36, tag=tag)))

    adapter.hold = True
    for tag in range(1, HELD + 1):
        nursery.start_soon(inquire, tag)
    with trio.fail_after(5):
        while len(adapter.held) < HELD:
            await trio.testing.wait_all_tasks_blocked(0.001)
    adapter.hold = False


@pytest.mark.parametrize(
    ("subtype", "answer", "ended", "how"),
    [
        (TmfSubtype.ABORT_TASK, Response.FUNCTION_COMPLETE, {3}, Response.ABORTED),
        (TmfSubtype.ABORT_TASK_SET, Response.FUNCTION_COMPLETE, set(range(1, 7)), Response.ABORTED),
        (TmfSubtype.CLEAR_ACA, Response.FUNCTION_REJECTED, set(), None),
        (TmfSubtype.CLEAR_TASK_SET, Response.FUNCTION_COMPLETE, set(range(1, 7)), Response.ABORTED),
        (TmfSubtype.I_T_NEXUS_RESET, Response.FUNCTION_COMPLETE, set(range(1, 7)), Response.RESET),
        (TmfSubtype.LOGICAL_UNIT_RESET, Response.FUNCTION_COMPLETE, set(range(1, 7)), Response.RESET),
        (TmfSubtype.QUERY_TASK, Response.FUNCTION_SUCCEEDED, set(), None),
        (TmfSubtype.QUERY_TASK_SET, Response.FUNCTION_SUCCEEDED, set(), None),
    ],
)
async def test_task_management_with_commands_in_flight(
    adapter: DaemonAdapter, subtype: TmfSubtype, answer: Response, ended: set[int], how: Response | None
) -> None:
    """Every function is answered, after the commands that it ends are in the used ring."""
    answers: Answers = []
    async with ScsiDriver.open(adapter.socket) as driver, trio.open_nursery() as nursery:
        await hold(adapter, driver, nursery, answers)
        before = driver.queues[2].ring.used_idx
        assert await driver.manage(subtype, 0, 0, tag=3) == answer
        assert driver.queues[2].ring.used_idx - before == len(ended)
        driver.queues[2].collect()
        await trio.testing.wait_all_tasks_blocked(0.001)
        assert {tag for tag, _ in answers} == ended
        assert {each.response for _, each in answers} == ({how} if how is not None else set())
        assert await driver.manage(TmfSubtype.LOGICAL_UNIT_RESET, 0, 0) == Response.FUNCTION_COMPLETE


async def test_task_management_of_nobody(adapter: DaemonAdapter) -> None:
    """A task, a unit, a target that are not there."""
    async with ScsiDriver.open(adapter.socket) as driver:
        assert await driver.manage(TmfSubtype.ABORT_TASK, 0, 0, tag=99) == Response.FUNCTION_COMPLETE
        assert await driver.manage(TmfSubtype.QUERY_TASK, 0, 0, tag=99) == Response.FUNCTION_COMPLETE
        assert await driver.manage(TmfSubtype.LOGICAL_UNIT_RESET, 9, 0) == Response.BAD_TARGET
        assert await driver.notifications(ControlType.AN_QUERY, 0, 0, 0xFFFF) == (0, Response.OK)
        assert await driver.notifications(ControlType.AN_SUBSCRIBE, 0, 0, 0xFFFF) == (0, Response.OK)


async def test_stop_is_bounded_and_answers_what_is_held(adapter: DaemonAdapter) -> None:
    """Commands that nobody answers are RESET after the drain time; the stop takes no longer."""
    answers: Answers = []
    async with ScsiDriver.open(adapter.socket) as driver, trio.open_nursery() as nursery:
        await hold(adapter, driver, nursery, answers)
        with trio.fail_after(5):
            await driver.stop()
            while len(answers) < HELD:
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert {each.response for _, each in answers} == {Response.RESET}
        await driver.start()
        assert (await driver.command(0, 0, READ, data_in=512)).good


async def test_nothing_happens_after_the_stop(adapter: DaemonAdapter) -> None:
    """When the last GET_VRING_BASE is answered, the used rings, the memory and the eventfds are still; what was not
    taken runs after the next start, and each command is answered exactly once."""
    done: list[int] = []
    async with ScsiDriver.open(adapter.socket, queues=2, queue_size=256) as driver, trio.open_nursery() as nursery:

        async def read(number: int) -> None:
            answer = await driver.command(0, 0, READ, data_in=512, queue=number % 2)
            assert answer.good
            done.append(number)

        for number in range(400):
            nursery.start_soon(read, number)
        await trio.lowlevel.checkpoint()
        bases = await driver.stop()
        rings = [queue.ring for queue in driver.queues[2:]]
        used = [ring.used_idx for ring in rings]
        for queue in driver.queues:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(queue.call_fd)
        assert used == bases[2:]
        data = [bytes(region.view[:65536]) for region in driver.memory.regions]
        for queue in driver.queues[2:]:
            queue.kick()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert [ring.used_idx for ring in rings] == used
        assert [bytes(region.view[:65536]) for region in driver.memory.regions] == data
        for queue in driver.queues:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(queue.call_fd)
        await driver.start()
    assert sorted(done) == list(range(400))


async def test_reset_storm(adapter: DaemonAdapter) -> None:
    """A guest that reboots again and again with commands in flight."""
    async with ScsiDriver.open(adapter.socket, queues=2) as driver:
        for _ in range(20):
            async with trio.open_nursery() as nursery:

                async def read(queue: int) -> None:
                    try:
                        answer = await driver.command(0, 0, READ, data_in=512, queue=queue)
                    except BackendError:
                        return
                    assert answer.good

                for number in range(40):
                    nursery.start_soon(read, number % 2)
                await trio.lowlevel.checkpoint()
                await driver.reset()
        assert (await driver.command(0, 0, READ, data_in=512)).good


async def test_stop_and_continue_between_verified_loads(adapter: DaemonAdapter) -> None:
    """Data survives any number of stops, with and without a reset."""
    async with ScsiDriver.open(adapter.socket) as driver:
        with GenerationTable(0, 2048) as table:
            load = Load(
                0, 0, 0, 2048, io_size=1024, depth=16, read_percent=50, commands=400,
                verification=Verification(table, run=5),
            )  # fmt: skip
            for turn in range(6):
                result = await run_load(driver, [load])
                assert (result.errors, result.first) == (0, None)
                if turn % 2:
                    await driver.reset()
                else:
                    await driver.stop()
                    await driver.start()
