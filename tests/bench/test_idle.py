"""Idle means idle: nobody wakes up for a guest that asks nothing."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from tests.bench.many import WORKER, first_read, memory
from tests.lab.san import San, UnitSpec
from vhostfc.frontend.cputime import Thread, threads
from vhostfc.frontend.driver import ScsiDriver

SECONDS = 10.0
#: What belongs to what was done before (timers of exchanges that have ended well) is over in so many seconds.
SETTLED = 4.0
PSS_MIB = 24.0  # of one adapter alone on the machine; 20 where others share what can be shared (many.py)


def slept(before: dict[int, Thread], after: dict[int, Thread], *, workers: bool) -> int:
    return sum(
        thread.switches - (before[number].switches if number in before else 0)
        for number, thread in after.items()
        if (thread.name == WORKER) == workers
    )


async def test_a_quiet_guest_costs_nothing(tmp_path: Path) -> None:
    """Over ten seconds, split and packed, after real I/O: no switch of a worker, at most one of each process."""
    with San(tmp_path, [UnitSpec(0)]) as san:
        for number in (1, 2):
            san.start_adapter(number, vhost="workers = 2")
        async with AsyncExitStack() as stack:
            for number in (1, 2):
                driver = await stack.enter_async_context(ScsiDriver.open(san.socket(number), packed=number == 2))
                await first_read(driver)
            pids = [san.adapters[1].pid, san.adapters[2].pid, san.the_fabric.pid]
            await trio.sleep(SETTLED)
            before = [threads(pid) for pid in pids]
            await trio.sleep(SECONDS)
            after = [threads(pid) for pid in pids]
        woken = [slept(a, b, workers=True) for a, b in zip(before, after, strict=True)]
        others = [slept(a, b, workers=False) for a, b in zip(before, after, strict=True)]
        assert sum(thread.name == WORKER for thread in after[0].values()) == 2
        assert woken == [0, 0, 0]
        assert max(others) <= 1, others
        assert memory(pids[0])["Pss"] / 1024 <= PSS_MIB


@pytest.mark.long
@pytest.mark.parametrize("packed", [False, True])
async def test_a_driver_that_stopped_polls_nothing(tmp_path: Path, packed: bool) -> None:
    """Rings that are stopped, and a guest that is gone, wake nobody either."""
    with San(tmp_path, [UnitSpec(0)]) as san:
        daemon = san.start_adapter(1)
        async with ScsiDriver.open(san.socket(1), packed=packed) as driver:
            await first_read(driver)
            await driver.stop()
            before = threads(daemon.pid)
            await trio.sleep(2.0)
            assert slept(before, threads(daemon.pid), workers=True) == 0
        await trio.sleep(0.5)
        before = threads(daemon.pid)
        await trio.sleep(2.0)
        assert slept(before, threads(daemon.pid), workers=True) == 0
