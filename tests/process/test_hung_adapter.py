"""An adapter that hangs (SIGSTOP) must not stop fencing, nor for good the I/O of others."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.lab.san import San, UnitSpec, wwpn
from tests.process.driving import KIB, beside, ready, units
from tests.waiting import until
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.load import Load, run_load
from vhostfc.frontend.scan import UnitInfo

FENCE_TIMEOUT = 0.5
#: What the machine may add: the tests share two cores with whatever else runs.
MARGIN = 1.5
#: After how many seconds a worker asks after whoever has a latch (worker.h, LATCH_PATIENCE).
PATIENCE = 1.0
SILENCE = 60.0
SHARED, OTHER = 0, 1
MEDIA = {"memory": "size = {size}", "file": 'file = "{directory}/{lun}.img"\nsize = {size}'}


def network(directory: Path, medium: str) -> San:
    sources = [MEDIA[medium].format(directory=directory, lun=lun, size=256 * KIB) for lun in (SHARED, OTHER)]
    return San(directory, [UnitSpec(lun, source) for lun, source in enumerate(sources)], fence_timeout=FENCE_TIMEOUT)


def mixed(unit: UnitInfo, **changes: object) -> Load:
    load = Load(
        unit.target, unit.lun, 0, unit.blocks, unit.block_size, 64 * KIB, depth=8, read_percent=50, stall=SILENCE
    )
    return dataclasses.replace(load, **changes)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def doomed(san: San, number: int, lun: int) -> AsyncIterator[None]:
    """A load by an adapter that will be killed."""
    async with ScsiDriver.open(san.socket(number), timeout=SILENCE) as driver:
        unit = (await units(driver))[lun]
        async with beside(driver, mixed(unit), doomed=True):
            yield


def stop(san: San, number: int) -> None:
    san.adapters[number].signal(signal.SIGSTOP)
    stat = Path(f"/proc/{san.adapters[number].pid}/stat")
    San.wait_for(lambda: stat.read_text().rpartition(") ")[2][0] == "T")


@pytest.mark.parametrize("medium", sorted(MEDIA))
async def test_a_reload_is_not_held_up(tmp_path: Path, medium: str) -> None:
    """It kills what does not acknowledge in time, says whom, and what has nothing to do with it goes on."""
    with network(tmp_path, medium) as san:
        san.start_adapters({1: {}, 2: {}})
        hung = san.adapters[2]
        async with ScsiDriver.open(san.socket(1)) as driver, doomed(san, 2, SHARED):
            other = (await units(driver))[OTHER]
            await ready(driver, OTHER)
            async with beside(driver, mixed(other)) as load:
                await until(lambda: san.status(2)["counters"]["fast"] > 100)
                stop(san, 2)
                san.units[SHARED] = dataclasses.replace(san.units[SHARED], allow=[1])
                began = time.monotonic()
                await trio.to_thread.run_sync(san.reload)
                took = time.monotonic() - began
                assert hung.process.wait(1) == -signal.SIGKILL
        assert took < FENCE_TIMEOUT + MARGIN
        print(f"a reload with a hung adapter took {took:.3f} s, fence_timeout {FENCE_TIMEOUT:g} s")
        said = san.the_fabric.await_line("killed an adapter")
        for part in ("vm2", str(hung.pid), wwpn(2)):
            assert part in said, said
        assert load.result.errors == 0, load.result.first
        assert load.result.latency.most < 1e9, "the other adapter's I/O elsewhere stood still"


@pytest.mark.parametrize("medium", sorted(MEDIA))
async def test_what_it_holds_is_given_back(tmp_path: Path, medium: str) -> None:
    """Stopped at any moment, most of all while it holds a latch: others go on after a while."""
    with network(tmp_path, medium) as san:
        await rounds(san, 1)


@pytest.mark.long
@pytest.mark.parametrize("medium", sorted(MEDIA))
async def test_what_it_holds_is_given_back_always(tmp_path: Path, medium: str) -> None:
    with network(tmp_path, medium) as san:
        await rounds(san, 40)


async def rounds(san: San, number: int) -> None:
    san.start_adapter(1)
    waits: list[float] = []
    async with ScsiDriver.open(san.socket(1)) as driver:
        for seed in range(number):
            hung = san.start_adapter(2)
            unit = (await units(driver))[SHARED]
            async with doomed(san, 2, SHARED):
                await until(lambda: san.status(2)["counters"]["fast"] > 100)
                await trio.sleep(random.Random(seed).random() / 50)
                stop(san, 2)
                began = time.monotonic()
                result = await run_load(driver, [all_of(unit)])
                waits.append(time.monotonic() - began)
                assert (result.errors, result.write_bytes) == (0, unit.size), result.first
                hung.kill()
    print(f"seconds to write all blocks beside a stopped adapter: {', '.join(f'{wait:.2f}' for wait in waits)}")
    assert len(waits) == number
    assert max(waits) < PATIENCE + FENCE_TIMEOUT + MARGIN


def all_of(unit: UnitInfo) -> Load:
    """Each block once, one stripe of the latch after the other."""
    commands = unit.size // (64 * KIB)
    return mixed(unit, random=False, read_percent=0, depth=1, commands=commands)
