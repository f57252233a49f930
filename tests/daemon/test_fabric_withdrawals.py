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
