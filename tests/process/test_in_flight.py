"""The fence with writes in flight: after GOOD not one block of a preempted adapter lands, whatever happens when.

The medium is slow on purpose (slow.c): a write of 64 KiB is under way for ten milliseconds and more.  Adapter 2
writes by its C threads, adapter 3 through frames (the fabric writes), both all the time.  Adapter 1 preempts them.
In each round something is done to adapter 2 at one step: nothing, a kill or a stop before the verdict, when its
message has come, before the acknowledgement, after it, before GOOD.  The blocks are looked at where they are, beside
all SCSI: at the moment of GOOD, and again when every write that was under way would have landed.

A round counts when its step was reached.  On a machine that has much else to do an adapter may be killed before that,
for being late; nothing may land then either, and it is done once more.
"""

from __future__ import annotations

import math
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
from tests.waiting import until
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
    """What the rounds have met: writes under way at the verdict, by path; and how long GOOD took.

    missed: times that the adapter was killed before it came to the step.
    """

    rounds: int = 0
    missed: int = 0
    fast: int = 0
    frames: int = 0
    seconds: list[float] = field(default_factory=list)

    def within(self, share: float) -> float:
        """Seconds in which GOOD came in this share of the rounds."""
        return sorted(self.seconds)[math.ceil(share * len(self.seconds)) - 1]

    def __str__(self) -> str:
        times = [
            f"{self.within(share):.3f} s ({name})" for share, name in ((0.5, "median"), (0.99, "99 %"), (1, "most"))
        ]
        return (
            f"{self.rounds} rounds ({self.missed} more missed the step); with writes in flight by the fast path "
            f"{self.fast}, by frames {self.frames}; GOOD after {', '.join(times)}"
        )


async def fence(san: SlowSan, holder: ScsiDriver, victims: list[Victim], step: str, number: int, tally: Tally) -> None:
    """One verdict, and the proof; counted if the step was reached."""
    fast, frames = victims
    adapter = san.adapters[FAST]
    for one in victims:
        await until(partial(getattr, one, "writing"), what="nobody writes")
    await trio.sleep(number % 16 / 1000)
    where, _, what = step.partition(" ")
    if where == "before":
        adapter.signal(signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    elif where == "good":
        san.plan.write_text(f"good {what} {adapter.pid}")
    elif what:
        san.plan.write_text(f"{where} {what}")
    flying = bool(fast.flying), bool(frames.flying)
    action = PREEMPT if number % 4 == 3 else PREEMPT_AND_ABORT
    began = time.monotonic()
    status = await out(holder, action, HOLDER, KEY, WRITE_EXCLUSIVE_REGISTRANTS_ONLY)
    with san.blocks() as medium:
        after = bytes(medium)
        took = time.monotonic() - began
        assert status == GOOD
        await trio.sleep(LANDED)
        assert bytes(medium) == after, f"a write landed after GOOD: {step}, round {number}"
        if what:
            await until(lambda: not adapter.alive, what=f"{step}: the adapter lives")
        else:
            assert adapter.alive, "an adapter that is well was killed: it did not look at its message in time"
        refused = frames.refused
        await until(lambda: frames.refused > refused, what="the writes of frames go on")
        assert bytes(medium) == after, f"a write landed late: {step}, round {number}"
    if san.plan.exists():
        san.plan.unlink()
        tally.missed += 1
        return
    tally.rounds += 1
    tally.fast += flying[0]
    tally.frames += flying[1]
    tally.seconds.append(took)


async def rounds(san: SlowSan, step: str, count: int) -> Tally:
    tally = Tally()
    async with ScsiDriver.open(san.socket(HOLDER), queues=2) as holder, victim(san, FRAMES, b"fr") as frames:
        await ready(holder, 0)
        assert await out(holder, IGNORE, 0, HOLDER) == GOOD
        assert await out(holder, CLEAR, HOLDER) == GOOD
        assert await out(holder, IGNORE, 0, HOLDER) == GOOD
        assert await out(holder, RESERVE, HOLDER, kind=WRITE_EXCLUSIVE_REGISTRANTS_ONLY) == GOOD
        while tally.rounds < count:
            if not san.adapters[FAST].alive:
                await trio.to_thread.run_sync(san.start_adapter, FAST)
            async with victim(san, FAST, b"fa") as fast:
                while tally.rounds < count:
                    for one in (fast, frames):
                        await join(one)
                        one.written = 0
                    await fence(san, holder, [fast, frames], step, tally.rounds + tally.missed, tally)
                    assert tally.missed <= 1 + count / 20, (
                        f"{step}: the machine has too much to do: {tally.missed} missed"
                    )
                    if fast.lost or not san.adapters[FAST].alive:
                        break
    print(f"{step}: {tally}")
    assert tally.fast > 0.9 * count, "the fast path's writes were not in flight"
    assert tally.frames > 0.9 * count, "frames were not in flight"
    limit = FENCE_TIMEOUT + MARGIN if "stop" in step else MARGIN
    assert tally.within(0.99) < limit, str(tally)
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
            await until(partial(getattr, one, "writing"), what="nobody writes")
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
