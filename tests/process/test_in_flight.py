"""The fence with writes in flight: after GOOD not one block of a preempted adapter lands, whatever happens when.

The medium is slow on purpose (slow.c): a write of 64 KiB is under way for ten milliseconds and more.  Adapter 2
writes by its C threads, adapter 3 through frames (the fabric writes), both all the time.  Adapter 1 preempts them.
In each round something is done to adapter 2 at one step: nothing, a kill or a stop before the verdict, when its
message has come, before the acknowledgement, after it, before GOOD.  The blocks are looked at where they are, beside
all SCSI: at the moment of GOOD, and again when every write that was under way would have landed.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

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
    join,
    until,
    victim,
)
from tests.process.test_preempt import (
    CLEAR,
    CONFLICT,
    GOOD,
    IGNORE,
    PREEMPT,
    PREEMPT_AND_ABORT,
    RESERVE,
    WRITE_EXCLUSIVE_REGISTRANTS_ONLY,
    out,
)
from tests.process.zygote import Zygote
from vhostfc.frontend.driver import ScsiDriver

MEDIA = {"memory": f"size = {SIZE}", "file": 'file = "{directory}/disk"\nsize = ' + str(SIZE)}
#: Where the something is done, and what.
STEPS = (
    *("nothing", "before kill", "message kill", "ack kill", "acked kill", "good kill"),
    *("before stop", "message stop", "ack stop"),
)


@pytest.fixture(scope="module", params=list(MEDIA))
def san(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Iterator[SlowSan]:
    directory = tmp_path_factory.mktemp(request.param)
    unit = UnitSpec(0, MEDIA[request.param].format(directory=directory))
    network = SlowSan(directory, [unit], fence_timeout=FENCE_TIMEOUT)
    network.zygote = zygote
    with network:
        network.start_adapter(HOLDER)
        network.start_adapter(FAST)
        network.start_adapter(FRAMES, fabric="fast_path = false")
        yield network


@dataclass
class Tally:
    """What the rounds have met: writes under way at the verdict, by path; and how long GOOD took."""

    rounds: int = 0
    fast: int = 0
    frames: int = 0
    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        times = sorted(self.seconds)
        return (
            f"{self.rounds} rounds; with writes in flight by the fast path {self.fast}, by frames {self.frames}; "
            f"GOOD after {times[len(times) // 2]:.3f} s (median), {times[-1]:.3f} s (most)"
        )


async def fence(san: SlowSan, holder: ScsiDriver, victims: list[Victim], step: str, number: int, tally: Tally) -> None:
    """One verdict; and the proof."""
    fast, frames = victims
    adapter = san.adapters[FAST]
    for one in victims:
        await until(partial(getattr, one, "writing"), "nobody writes")
    await trio.sleep(number % 16 / 1000)
    where, _, what = step.partition(" ")
    if where == "before":
        adapter.signal(signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    elif where == "good":
        san.plan.write_text(f"good {what} {adapter.pid}")
    elif what:
        san.plan.write_text(f"{where} {what}")
    tally.rounds += 1
    tally.fast += bool(fast.flying)
    tally.frames += bool(frames.flying)
    action = PREEMPT if number % 4 == 3 else PREEMPT_AND_ABORT
    began = time.monotonic()
    status = await out(holder, action, HOLDER, KEY, WRITE_EXCLUSIVE_REGISTRANTS_ONLY)
    with san.blocks() as medium:
        after = bytes(medium)
        tally.seconds.append(time.monotonic() - began)
        assert status == GOOD
        await trio.sleep(LANDED)
        assert bytes(medium) == after, f"a write landed after GOOD: {step}, round {number}"
        if what:
            await until(lambda: not adapter.alive, f"{step}: the adapter lives")
            assert not san.plan.exists()
        else:
            assert adapter.alive, "an adapter that is well was killed: it did not look at its message in time"
        refused = frames.refused
        await until(lambda: frames.refused > refused, "the writes of frames go on")
        assert bytes(medium) == after, f"a write landed late: {step}, round {number}"


async def rounds(san: SlowSan, step: str, count: int) -> Tally:
    tally = Tally()
    number = 0
    async with ScsiDriver.open(san.socket(HOLDER), queues=2) as holder, victim(san, FRAMES, b"fr") as frames:
        await ready(holder, 0)
        assert await out(holder, IGNORE, 0, HOLDER) == GOOD
        assert await out(holder, CLEAR, HOLDER) == GOOD
        assert await out(holder, IGNORE, 0, HOLDER) == GOOD
        assert await out(holder, RESERVE, HOLDER, kind=WRITE_EXCLUSIVE_REGISTRANTS_ONLY) == GOOD
        while number < count:
            if not san.adapters[FAST].alive:
                await trio.to_thread.run_sync(san.start_adapter, FAST)
            async with victim(san, FAST, b"fa") as fast:
                while number < count:
                    for one in (fast, frames):
                        await join(one)
                        one.written = 0
                    await fence(san, holder, [fast, frames], step, number, tally)
                    number += 1
                    if fast.lost or not san.adapters[FAST].alive:
                        break
    print(f"{step}: {tally}")
    assert tally.fast > 0.9 * count, "the fast path's writes were not in flight"
    assert tally.frames > 0.9 * count, "frames were not in flight"
    limit = FENCE_TIMEOUT + MARGIN if "stop" in step else MARGIN
    assert max(tally.seconds) < limit, tally
    return tally


@pytest.mark.parametrize("step", STEPS)
async def test_nothing_lands_after_good(san: SlowSan, step: str) -> None:
    await rounds(san, step, 2 if "stop" in step else 5)


@pytest.mark.long
@pytest.mark.parametrize("step", STEPS)
async def test_nothing_lands_after_good_in_a_thousand_rounds(san: SlowSan, step: str) -> None:
    await rounds(san, step, 1000)


async def test_the_proof_can_fail(san: SlowSan) -> None:
    """Without a verdict the blocks do change in the time that the proof waits, and killed writers leave them torn."""
    seen = Counter[bool]()
    if not san.adapters[FAST].alive:
        await trio.to_thread.run_sync(san.start_adapter, FAST)
    async with ScsiDriver.open(san.socket(HOLDER), queues=2) as holder:
        await ready(holder, 0)
        assert await out(holder, IGNORE, 0, HOLDER) == GOOD
        assert await out(holder, CLEAR, HOLDER) == GOOD
    async with victim(san, FRAMES, b"fr") as frames, victim(san, FAST, b"fa") as fast:
        for one in (fast, frames):
            await ready(one.driver, 0)
            await until(partial(getattr, one, "writing"), "nobody writes")
        with san.blocks() as medium:
            for _ in range(20):
                before = bytes(medium)
                await trio.sleep(LANDED)
                seen[bytes(medium) != before] += 1
        assert await out(frames.driver, IGNORE, 0, 9) == GOOD
        assert await out(frames.driver, RESERVE, 9, kind=WRITE_EXCLUSIVE_REGISTRANTS_ONLY) == GOOD
        status = (await fast.driver.command(0, 0, write_10(0, 1), bytes(512), queue=1)).status
        assert status == CONFLICT
    assert seen[True] >= 18, seen
