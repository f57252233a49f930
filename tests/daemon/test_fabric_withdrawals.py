"""Commands that come as frames and lose their right, their exchange or their turn while they wait."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from tests.daemon.linkadapter import write_10, wwpn
from tests.daemon.test_fabric_sanitize import SOMEBODY, atomic, file_unit
from tests.daemon.test_fabricd import config, fabric, join
from vhostfc.config import FabricConfig
from vhostfc.daemon.fabric_latch import PAUSE_MAX
from vhostfc.fabric.switch import Output
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
        one = await join(nursery, tmp_path, 1)
        await one.command(bytes(6))
        (served,) = san._served.values()
        latch, runner = served.medium.latch, san._runner
        assert latch is not None
        assert latch.take(SOMEBODY, 0, 512) is None

        async def write() -> None:
            await one.command(cdb, data_out=b"W" * 512)

        nursery.start_soon(write)
        await one.until(lambda: runner._running)
        set_targets = san._set_targets

        def come_free(view: FabricConfig) -> list[Output]:
            """In the middle of the reload the block comes free, and the command has slept long enough to see it."""
            latch.free(SOMEBODY, 0, 512)
            time.sleep(2 * PAUSE_MAX)
            return set_targets(view)

        monkeypatch.setattr(san, "_set_targets", come_free)
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
        one = await join(nursery, tmp_path, 1)
        await one.command(bytes(6))
        await one.command(write_10(0, 2048), data_out=b"A" * (1 << 20))
        (served,) = san._served.values()
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
