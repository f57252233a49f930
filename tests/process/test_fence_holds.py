"""The fence over stops and kills of adapters and of the fabric itself, in a loop: who is out stays out (APTPL).

Adapter 1 holds a reservation that outlives a restart, adapters 2 (fast path) and 3 (frames) write.  In each round
something happens to an adapter or to the fabric around a PREEMPT AND ABORT of both; when it has been answered with
GOOD, whoever has answered, not one of their blocks lands, now or after the next restart of the fabric.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.lab.san import UnitSpec
from tests.process.driving import ready, write_10
from tests.process.slowsan import (
    FAST,
    FENCE_TIMEOUT,
    FRAMES,
    HOLDER,
    KEY,
    LANDED,
    MARGIN,
    SIZE,
    SlowSan,
    Victim,
    victim,
)
from tests.process.test_preempt import (
    CLEAR,
    CONFLICT,
    GOOD,
    IGNORE,
    PREEMPT_AND_ABORT,
    RESERVE,
    WRITE_EXCLUSIVE_REGISTRANTS_ONLY,
    answer,
)
from tests.process.zygote import Zygote
from tests.waiting import until
from vhostfc.frontend.driver import ScsiDriver

#: LOGICAL UNIT NOT SUPPORTED: a new fabric does not serve a unit before all who had it are gone.
NOT_THERE_YET = (0x5, 0x25, 0x00)
#: What happens, and to whom; the moment is drawn by lot, around the verdict.
HAPPENINGS = (
    *("stop adapter", "kill adapter", "kill fabric", "stop adapter, kill fabric", "kill adapter, kill fabric"),
    "nothing",
)


@pytest.fixture
def san(tmp_path: Path, zygote: Zygote) -> Iterator[SlowSan]:
    unit = UnitSpec(0, f'file = "{tmp_path}/disk"\nsize = {SIZE}')
    network = SlowSan(tmp_path, [unit], fence_timeout=FENCE_TIMEOUT)
    network.zygote = zygote
    with network:
        network.start_adapter(HOLDER)
        network.start_adapter(FAST)
        network.start_adapter(FRAMES, fabric="fast_path = false")
        yield network


async def out(driver: ScsiDriver, action: int, key: int, new: int = 0, kind: int = 0) -> int:
    """A PERSISTENT RESERVE OUT with APTPL, until the array has answered it."""
    data = key.to_bytes(8, "big") + new.to_bytes(8, "big") + bytes([0, 0, 0, 0, 1, 0, 0, 0])
    while True:
        found = await answer(driver, bytes([0x5F, action, kind, 0, 0, 0, 0, 0, 24, 0]), data)
        if not found.response and found.sense_code != NOT_THERE_YET:
            return found.status
        await trio.sleep(0.005)  # the fabric went while it was asked; the initiator does not know what came of it


async def preempted(driver: ScsiDriver) -> None:
    """Both victims are out: GOOD, or CONFLICT when a fabric that died afterwards had done it already."""
    assert await out(driver, PREEMPT_AND_ABORT, HOLDER, KEY, WRITE_EXCLUSIVE_REGISTRANTS_ONLY) in (GOOD, CONFLICT)
    assert await keys(driver) == [HOLDER]


async def keys(driver: ScsiDriver) -> list[int]:
    while True:
        found = await answer(driver, bytes([0x5E, 0, 0, 0, 0, 0, 0, 1, 0, 0]), data_in=256)
        if found.good:
            data = found.data_in
            return [int.from_bytes(data[at : at + 8], "big") for at in range(8, len(data), 8)]
        await trio.sleep(0.005)


async def happen(san: SlowSan, what: str, moment: float) -> None:
    await trio.sleep(moment)
    if "adapter" in what:
        san.adapters[FAST].signal(signal.SIGSTOP if "stop adapter" in what else signal.SIGKILL)
    if "fabric" in what:
        san.the_fabric.kill()
        if "stop adapter" in what:
            # The next fabric does not serve what a stopped process holds: nobody writes until somebody ends it.
            await trio.to_thread.run_sync(san.start_fabric)
            with san.blocks() as medium:
                before = bytes(medium)
                await trio.sleep(0.3)
                assert bytes(medium) == before
            san.adapters[FAST].kill()
            return
        await trio.to_thread.run_sync(san.start_fabric)


async def a_round(san: SlowSan, holder: ScsiDriver, victims: list[Victim], what: str, moment: float) -> float:
    """Seconds until the verdict was in force."""
    for one in victims:
        assert await out(one.driver, IGNORE, 0, KEY) == GOOD
        one.written = 0
    for one in victims:
        await until(partial(getattr, one, "writing"), what="nobody writes")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(happen, san, what, max(0.0, moment))
        await trio.sleep(max(0.0, -moment))
        began = time.monotonic()
        await preempted(holder)
        took = time.monotonic() - began
        with san.blocks() as medium:
            after = bytes(medium)
            await trio.sleep(LANDED)
            assert bytes(medium) == after, f"a write landed after GOOD: {what}"
    with san.blocks() as medium:
        assert bytes(medium) == after, f"a write landed late: {what}"
    return took


async def still_out(san: SlowSan, holder: ScsiDriver, frames: Victim) -> None:
    """After a restart of the fabric, as before it."""
    with san.blocks() as medium:
        before = bytes(medium)
    san.the_fabric.kill()
    await trio.to_thread.run_sync(san.start_fabric)
    await ready(holder, 0)
    assert await keys(holder) == [HOLDER]
    refused = frames.refused
    await until(lambda: frames.refused > refused + 2, what="the writes of frames go on")
    with san.blocks() as medium:
        assert bytes(medium) == before, "a write landed after a restart"
    assert (await answer(holder, write_10(0, 1), before[:512])).good


async def loop(san: SlowSan, rounds: int) -> None:
    times: dict[str, list[float]] = {what: [] for what in HAPPENINGS}
    async with (
        ScsiDriver.open(san.socket(HOLDER), queues=2, timeout=60) as holder,
        victim(san, FRAMES, b"fr") as frames,
    ):
        await ready(holder, 0)
        for action in (IGNORE, CLEAR, IGNORE):
            assert await out(holder, action, HOLDER if action == CLEAR else 0, HOLDER) == GOOD
        assert await out(holder, RESERVE, HOLDER, kind=WRITE_EXCLUSIVE_REGISTRANTS_ONLY) == GOOD
        for number in range(rounds):
            if not san.adapters[FAST].alive:
                await trio.to_thread.run_sync(san.start_adapter, FAST)
            what = HAPPENINGS[number % len(HAPPENINGS)]
            moment = random.Random(number).uniform(-0.02, 0.06)
            async with victim(san, FAST, b"fa") as fast:
                await ready(fast.driver, 0)
                times[what].append(await a_round(san, holder, [fast, frames], what, moment))
                if "adapter" in what:
                    await until(lambda: not san.adapters[FAST].alive or fast.refused, what="neither dead nor refused")
                    san.adapters[FAST].kill()
            if number % 2:
                await still_out(san, holder, frames)
    for what, found in times.items():
        if found:
            found.sort()
            print(
                f"{what}: {len(found)} rounds, in force after {found[len(found) // 2]:.3f} s, at most {found[-1]:.3f} s"
            )
    assert max(times["stop adapter"]) < FENCE_TIMEOUT + MARGIN


async def test_the_fence_holds(san: SlowSan) -> None:
    await loop(san, len(HAPPENINGS))


@pytest.mark.long
async def test_the_fence_holds_for_minutes(san: SlowSan) -> None:
    await loop(san, 300)
