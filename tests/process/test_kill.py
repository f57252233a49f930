"""kill -9 of any process at any moment: nothing that was acknowledged is lost, nothing is in the way afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.lab.san import San, UnitSpec
from tests.process.driving import KIB, MIB, beside, read_10, ready, removed, rescan, told, units, write_10
from tests.waiting import until
from vhostfc.frontend.driver import Response, ScsiDriver
from vhostfc.frontend.load import GenerationTable, Load, LoadResult, Verification, run_load
from vhostfc.frontend.probe import probe
from vhostfc.frontend.scan import UnitInfo
from vhostfc.virtio.scsi import Response as Code

FILE, DIRECT, MEMORY = range(3)


@pytest.fixture
def san(tmp_path: Path) -> Iterator[San]:
    units = [
        UnitSpec(FILE, f'file = "{tmp_path}/disk.img"\nsize = "1MiB"'),
        UnitSpec(DIRECT, f'file = "{tmp_path}/direct.img"\nsize = "1MiB"\ncache = "none"'),
        UnitSpec(MEMORY, 'size = "1MiB"'),
    ]
    with San(tmp_path, units) as network:
        yield network
    assert not left_behind(tmp_path), "an orphan"


def left_behind(directory: Path) -> list[str]:
    """Processes that were started for this directory and are still there."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdecimal() and str(directory).encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
    return found


def verified(unit: UnitInfo, check: Verification, **changes: object) -> Load:
    load = Load(
        unit.target,
        unit.lun,
        0,
        unit.blocks,
        unit.block_size,
        8 * KIB,
        depth=8,
        read_percent=30,
        verification=check,
    )
    return dataclasses.replace(load, **changes)  # type: ignore[arg-type]


async def all_is_there(driver: ScsiDriver, unit: UnitInfo, check: Verification) -> LoadResult:
    """Read every block once; what was acknowledged must be in it."""
    load = verified(unit, check, read_percent=100, random=False, commands=unit.size // (8 * KIB))
    result = await run_load(driver, [load])
    assert result.errors == 0, result.first
    return result


def both_written(san: San) -> bool:
    """More of either file than a load has in flight: some of it was acknowledged, however slow its disk is."""
    images = [(san.directory / name).read_bytes() for name in ("disk.img", "direct.img")]
    return all(sum(any(image[at : at + 8 * KIB]) for at in range(0, MIB, 8 * KIB)) > 16 for image in images)


@contextlib.contextmanager
def checks(count: int, blocks: int) -> Iterator[list[Verification]]:
    with contextlib.ExitStack() as stack:
        tables = [stack.enter_context(GenerationTable(0, blocks)) for _ in range(count)]
        yield [Verification(table, secrets.randbits(62) | 1, unit=number) for number, table in enumerate(tables)]


# ---------------------------------------------------------------- an adapter


async def adapters_die(san: San, rounds: int) -> None:
    with checks(2, MIB // 512) as kept:
        for seed in range(rounds):
            adapter = san.start_adapter(1)
            async with ScsiDriver.open(san.socket(1), queues=2) as driver:
                found = await units(driver)
                for unit in (FILE, DIRECT):
                    await all_is_there(driver, found[unit], kept[unit])
                both = [verified(found[unit], kept[unit]) for unit in (FILE, DIRECT)]
                async with beside(driver, *both, doomed=True) as load:
                    await until(lambda: san.status(1)["counters"]["fast"] > 2 * MIB // (8 * KIB) + 100)
                    await until(lambda: both_written(san))
                    await trio.sleep(random.Random(seed).random() / 20)
                    adapter.kill()
            assert load.lost
        san.the_fabric.await_line("a link is down.*adapter=vm1")
        san.start_adapter(1)
        async with ScsiDriver.open(san.socket(1)) as driver:
            found = await units(driver)
            for unit in (FILE, DIRECT):
                result = await all_is_there(driver, found[unit], kept[unit])
                assert result.verified, "nothing had been written"


async def test_an_adapter(san: San) -> None:
    await adapters_die(san, 2)


@pytest.mark.long
async def test_an_adapter_always(san: San) -> None:
    await adapters_die(san, 60)


# ---------------------------------------------------------------- the fabric


async def fabrics_die(san: San, rounds: int) -> None:
    """The adapter comes back by itself; its guest has only waited."""
    adapter = san.start_adapter(1)
    with checks(2, MIB // 512) as kept:
        async with ScsiDriver.open(san.socket(1), queues=2) as driver:
            found = await units(driver)
            both = [verified(found[unit], kept[unit]) for unit in (FILE, DIRECT)]
            async with beside(driver, *both) as load:
                for seed in range(rounds):
                    fast = san.status(1)["counters"]["fast"]
                    await until(lambda fast=fast: san.status(1)["counters"]["fast"] > fast + 100)  # type: ignore[misc]
                    await trio.sleep(random.Random(seed).random() / 20)
                    san.the_fabric.kill()
                    adapter.await_line("lost the fabric")
                    await trio.to_thread.run_sync(san.start_fabric)
                    await trio.to_thread.run_sync(san.wait_online, 1)
                fast = san.status(1)["counters"]["fast"]
                await until(lambda: san.status(1)["counters"]["fast"] > fast + 100)
            assert load.result.errors == 0, load.result.first
            again = await units(driver)
            for unit in (FILE, DIRECT):
                assert again[unit].naa == found[unit].naa
                await all_is_there(driver, found[unit], kept[unit])


async def test_the_fabric(san: San) -> None:
    await fabrics_die(san, 2)


@pytest.mark.long
async def test_the_fabric_always(san: San) -> None:
    await fabrics_die(san, 60)


async def test_a_write_cache_that_was_switched_off_for_good(san: San) -> None:
    """No write goes past a fabric that came back: each has to be on the medium, and its adapter does not do that."""

    page = bytes.fromhex("0812 0000 ffff 0000 ffff ffff 00 00 0000 00 000000")
    san.start_adapter(1)
    async with ScsiDriver.open(san.socket(1)) as driver:

        async def alone(unit: int, *, write: bool) -> bool:
            """Does the adapter do it without the fabric?"""
            fast = san.status(1)["counters"]["fast"]
            data, room = (bytes(512), 0) if write else (b"", 512)
            assert (await driver.command(0, unit, (write_10 if write else read_10)(0, 1), data, room)).good
            return bool(san.status(1)["counters"]["fast"] > fast)

        async def until_alone(unit: int, *, write: bool) -> None:
            with trio.fail_after(20):
                while not await alone(unit, write=write):
                    pass

        for unit in (FILE, DIRECT):
            await ready(driver, unit)
            await until_alone(unit, write=True)
            assert (await driver.command(0, unit, bytes([0x15, 0x11, 0, 0, 24, 0]), bytes(4) + page)).good
        san.the_fabric.kill()
        await until(lambda: san.status(1)["port"]["state"] != "online")
        await trio.to_thread.run_sync(san.start_fabric)
        for unit in (FILE, DIRECT):
            await ready(driver, unit)
            assert not await alone(unit, write=True)
            await until_alone(unit, write=False)
            assert not await alone(unit, write=True)
            found = await driver.command(0, unit, bytes([0x1A, 8, 8, 0, 24, 0]), b"", 24)
            assert found.data_in[4:] == bytes([0x88]) + page[1:]


async def test_memory_that_is_lost_is_another_disk(san: San) -> None:
    """Never the same one, empty: what the guest has in flight fails, and it is told to look."""
    san.start_adapter(1)
    async with ScsiDriver.open(san.socket(1)) as driver:
        before = await units(driver)
        await ready(driver, MEMORY)
        assert (await driver.command(0, MEMORY, write_10(0, 1), b"mine" * 128)).good
        san.the_fabric.kill()
        await until(lambda: san.status(1)["port"]["state"] != "online")
        async with trio.open_nursery() as nursery:
            held: list[Response] = []

            async def write(lun: int) -> None:
                held.append(await driver.command(0, lun, write_10(8, 1), b"late" * 128))

            nursery.start_soon(write, MEMORY)
            await until(lambda: san.status(1)["counters"]["in_flight"] == 1)
            await trio.to_thread.run_sync(san.start_fabric)
        assert not held[0].good, "a write for the old disk reached the new one"
        await told(driver, removed(MEMORY), rescan(MEMORY))
        after = await units(driver)
        assert after[MEMORY].naa != before[MEMORY].naa
        assert {lun: after[lun].naa for lun in (FILE, DIRECT)} == {lun: before[lun].naa for lun in (FILE, DIRECT)}
        await ready(driver, MEMORY)
        found = await driver.command(0, MEMORY, read_10(0, 16), data_in=16 * 512)
        assert found.good
        assert not any(found.data_in)


async def test_commands_are_held_for_so_long(san: San) -> None:
    """Without a fabric they wait hold_timeout, then they fail; with it they work again."""
    san.start_adapter(1, fabric="hold_timeout = 1.0")
    async with ScsiDriver.open(san.socket(1)) as driver:
        await ready(driver, FILE)
        san.the_fabric.kill()
        await until(lambda: san.status(1)["port"]["state"] != "online")
        with trio.fail_after(20):
            while True:  # its routes are closed a moment after the link is lost
                began = trio.current_time()
                found = await driver.command(0, FILE, read_10(0, 1), data_in=512)
                if not found.good:
                    break
        assert found.response == Code.TRANSPORT_FAILURE
        assert 0.9 < trio.current_time() - began < 3.0
        assert [target["target"] for target in san.status(1)["targets"]] == [0], "its number stays"
        await trio.to_thread.run_sync(san.start_fabric)
        await trio.to_thread.run_sync(san.wait_online, 1)
        await ready(driver, FILE)
        assert (await driver.command(0, FILE, read_10(0, 1), data_in=512)).good


async def test_a_medium_is_served_when_its_old_holder_is_gone(san: San) -> None:
    """An adapter that hung when the fabric died may still write; the next fabric waits for it, and says so."""
    san.start_adapters({1: {}, 2: {}})
    hung = san.adapters[2]
    async with (
        ScsiDriver.open(san.socket(1), timeout=60) as driver,
        ScsiDriver.open(san.socket(2), timeout=60) as other,
    ):
        await ready(driver, FILE)
        await ready(other, FILE)
        await until(lambda: all(unit["open"] for unit in san.fabric_status()["targets"][0]["units"]))
        hung.signal(signal.SIGSTOP)
        san.the_fabric.kill()
        await trio.to_thread.run_sync(san.start_fabric)
        await trio.to_thread.run_sync(san.wait_online, 1)
        said = san.the_fabric.await_line("not served yet.*disk.img")
        assert str(hung.pid) in said, said
        shown = {unit["lun"]: unit["ready"] for unit in san.fabric_status()["targets"][0]["units"]}
        assert not shown[FILE]
        assert shown[MEMORY], "that one is new"
        await told(driver, removed(FILE))
        hung.signal(signal.SIGCONT)
        san.the_fabric.await_line("served now.*disk.img")
        await told(driver, rescan(FILE))
        await ready(driver, FILE)
        await trio.to_thread.run_sync(san.wait_online, 2)
        await ready(other, FILE)


# ---------------------------------------------------------------- a driver, everybody


def test_a_driver(san: San) -> None:
    """QEMU that is killed: the next one is served, and nothing of the last one is kept."""
    adapter = san.start_adapter(1)

    def descriptors() -> int:
        return len(list(Path(f"/proc/{adapter.pid}/fd").iterdir()))

    def run(seconds: float) -> None:
        command = ["bench", str(san.socket(1)), "--unit", f"0:{FILE}", "--rw", "randrw", "--seconds", "30"]
        bench = subprocess.Popen(
            [sys.executable, "-m", "vhostfc", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        fast = san.status(1)["counters"]["fast"]
        San.wait_for(lambda: san.status(1)["counters"]["fast"] > fast + 100)
        time.sleep(seconds)
        bench.kill()
        bench.wait()
        San.wait_for(lambda: san.status(1)["front_end"]["state"] == "detached")

    run(0.0)
    before = descriptors()
    for seed in range(3):
        run(random.Random(seed).random() / 20)
    San.wait_for(lambda: descriptors() <= before)
    assert san.status(1)["counters"]["in_flight"] == 0
    assert [unit.lun for unit in trio.run(probe, san.socket(1)).units] == [FILE, DIRECT, MEMORY]


async def test_everybody(san: San) -> None:
    """What was acknowledged is in the files, and nothing is in the way of the next start."""
    adapter = san.start_adapter(1)
    with checks(2, MIB // 512) as kept:
        async with ScsiDriver.open(san.socket(1), queues=2) as driver:
            found = await units(driver)
            both = [verified(found[unit], kept[unit]) for unit in (FILE, DIRECT)]
            async with beside(driver, *both, doomed=True) as load:
                await until(lambda: san.status(1)["counters"]["fast"] > 200 and both_written(san))
                san.the_fabric.kill()
                adapter.kill()
        assert load.lost
        await trio.to_thread.run_sync(san.start_fabric)
        await trio.to_thread.run_sync(san.start_adapter, 1)
        async with ScsiDriver.open(san.socket(1)) as driver:
            for unit in (FILE, DIRECT):
                assert (await all_is_there(driver, found[unit], kept[unit])).verified
    assert san.the_fabric.stop() == 0
    assert san.adapters[1].stop() == 0
    assert not [path.name for path in san.directory.iterdir() if path.is_socket()]
