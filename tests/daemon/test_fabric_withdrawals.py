"""Commands that come as frames and lose their right, their exchange or their turn while they wait."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.daemon.linkadapter import write_10, wwpn
from tests.daemon.test_fabric_reservations import PREEMPT_AND_ABORT, WERO, may, members, out
from tests.daemon.test_fabric_sanitize import SOMEBODY, atomic, file_unit
from tests.daemon.test_fabricd import config, fabric, join, started
from vhostfc.config import FabricConfig
from vhostfc.daemon.fabric_latch import PAUSE_MAX
from vhostfc.fabric.switch import Output
from vhostfc.fc.fcp import TmFlag
from vhostfc.fc.initiator import CommandResult, End
from vhostfc.fc.wwn import Wwn
from vhostfc.native import LATCH_STRIPE


def zone(number: int) -> str:
    return f'[[zone]]\nname = "z"\nmembers = ["{wwpn(number)}", "50:06:01:60:00:00:00:01"]\n'


@pytest.mark.parametrize("cdb", [write_10(0, 1), atomic(0, 1)], ids=["write", "write atomic"])
@pytest.mark.parametrize("attempt", range(6))  # whose turn comes first is a matter of luck
async def test_nothing_lands_after_a_reload_that_took_its_zone_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cdb: bytes, attempt: int
) -> None:
    del attempt
    async with fabric(tmp_path, file_unit(tmp_path) + zone(1)) as (san, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        (served,) = san.placement.served.values()
        latch, runner = served.medium.latch, san._runner
        assert latch is not None
        assert latch.take(SOMEBODY, 0, 512) is None

        async def write() -> None:
            await one.command(cdb, data_out=b"W" * 512)

        nursery.start_soon(write)
        await one.until(lambda: runner._running)
        set_targets = san.placement.set_targets

        def come_free(view: FabricConfig, is_away: Callable[[Wwn], bool]) -> list[Output]:
            """In the middle of the reload the block comes free, and the command has slept long enough to see it."""
            latch.free(SOMEBODY, 0, 512)
            time.sleep(2 * PAUSE_MAX)
            return set_targets(view, is_away)

        monkeypatch.setattr(san.placement, "set_targets", come_free)
        with trio.fail_after(5):
            await san.reload(config(tmp_path, file_unit(tmp_path) + zone(2)))
            before = (tmp_path / "disk").read_bytes()
            while runner._running:
                await trio.sleep(0.001)
        assert (tmp_path / "disk").read_bytes() == before, "it was written after the reload had returned"
        assert before == bytes(len(before)), "it was begun after its exchange had ended"
        nursery.cancel_scope.cancel()


async def test_an_unmap_of_all_of_a_busy_unit_gets_through(tmp_path: Path) -> None:
    """At any moment somebody has some block; no large range is ever free as a whole."""
    async with fabric(tmp_path, file_unit(tmp_path).replace("1MiB", "8MiB")) as (san, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        await one.command(write_10(0, 2048), data_out=b"A" * (1 << 20))
        (served,) = san.placement.served.values()
        latch, stripe = served.medium.latch, 0
        assert latch is not None
        assert latch.take(SOMEBODY, 0, 512) is None
        taken = 0

        async def others() -> None:
            """Always hold one stripe: the next is taken before the last is let go of."""
            nonlocal stripe, taken
            while True:
                after = (stripe + 32) % 128  # another megabyte or two from here
                if latch.take(SOMEBODY, after * LATCH_STRIPE, 512) is None:
                    latch.free(SOMEBODY, stripe * LATCH_STRIPE, 512)
                    stripe = after
                    taken += 1
                await trio.sleep(0.001)

        nursery.start_soon(others)
        data = bytes.fromhex("0016001000000000") + bytes(8) + (16384).to_bytes(4, "big") + bytes(4)
        with trio.fail_after(5):
            result = await one.command(bytes([0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]), data_out=data)
        assert result.status == 0
        assert taken > 1
        nursery.cancel_scope.cancel()
    assert (tmp_path / "disk").read_bytes() == bytes(8 << 20)
    assert (tmp_path / "disk").stat().st_blocks == 0, "the pieces leave nothing between them"


async def test_a_unit_attention_whose_command_was_aborted_is_told_by_the_next(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one, two, three = [await join(nursery, tmp_path, number) for number in (1, 2, 3)]
        await two.open()
        await three.command(bytes(6))
        two.acks = False
        nursery.start_soon(three.command, bytes([0x16, 0, 0, 0, 0, 0]))  # RESERVE
        await two.until(lambda: not may(two, 0x28))
        done: list[object] = []

        async def run(how: Callable[[], Awaitable[object]]) -> None:
            done.append(await how())

        nursery.start_soon(run, partial(one.command, bytes(6)))  # has its answer, and waits for two to obey
        running = san._runner._running
        with trio.fail_after(10):
            while len(running) < 2:
                await trio.sleep(0.001)
            nursery.start_soon(run, partial(one.manage, TmFlag.ABORT_TASK_SET))
            while len(running) == 2:
                await trio.sleep(0.001)
        assert not done
        await two.acknowledge()
        await one.until(lambda: len(done) == 2)
        assert [one.end for one in done if isinstance(one, CommandResult)] == [End.ABORTED]
        result = await one.command(bytes(6))
        assert (result.status, result.sense[12:14]) == (0x02, b"\x29\x01"), "POWER ON OCCURRED"
        assert (await one.command(bytes(6))).status == 0x18


async def test_who_was_aborted_is_told_whatever_becomes_of_the_command_that_did_it(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one, two = await members(nursery, tmp_path)
        await two.open()
        (served,) = san.placement.served.values()
        latch = served.medium.latch
        assert latch is not None
        assert latch.take(SOMEBODY, 0, 512) is None
        done: list[int] = []

        async def write() -> None:
            done.append((await two.command(write_10(0, 1), data_out=b"W" * 512)).status)

        nursery.start_soon(write)
        await two.until(lambda: san._runner._running)
        two.acks = False
        nursery.start_soon(out, one, PREEMPT_AND_ABORT, 1, 2, WERO)
        await two.until(lambda: not may(two, 0x2A))
        nursery.start_soon(one.manage, TmFlag.ABORT_TASK_SET)  # gives up the PREEMPT AND ABORT
        with trio.move_on_after(0.1):
            await two.until(lambda: done)
        assert not done
        await two.acknowledge()
        await two.until(lambda: done)
        assert done == [0x40]
