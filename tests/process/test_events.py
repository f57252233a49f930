"""What changes on the array reaches the guest's driver by its event queue, with no hand on either side."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import trio

from tests.lab.san import San, UnitSpec
from tests.process.driving import Told, give_event_buffers, ready, removed, rescan, short, told, units
from tests.waiting import until
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.virtio.scsi import Event, EventType

MIB = 1 << 20
CAPACITY_HAS_CHANGED = 0x2A | 0x09 << 8


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    with San(tmp_path_factory.mktemp("events"), []) as network:
        network.start_adapter(1)
        yield network


@pytest.fixture
def san(network: San) -> San:
    """A network of one unit, 0."""
    network.units = [UnitSpec(0, 'size = "1MiB"')]
    network.reload()
    San.wait_for(lambda: network.status(1)["targets"][0]["luns"] == [0])
    return network


def grown(lun: int) -> Told:
    return EventType.PARAM_CHANGE, 0, lun, CAPACITY_HAS_CHANGED


async def reload(san: San) -> None:
    await trio.to_thread.run_sync(san.reload)


async def test_units_come_go_and_grow(san: San) -> None:
    async with ScsiDriver.open(san.socket(1)) as driver:
        assert list(await units(driver)) == [0]
        san.units.append(UnitSpec(7, 'size = "2MiB"'))
        await reload(san)
        await told(driver, rescan(7))
        assert list(await units(driver)) == [0, 7]
        await ready(driver, 7)

        san.units[1] = UnitSpec(7, 'size = "3MiB"')
        await reload(san)
        await told(driver, grown(7))
        assert (await units(driver))[7].size == 3 * MIB

        del san.units[1]
        await reload(san)
        await told(driver, removed(7))
        assert list(await units(driver)) == [0]


async def test_masks_and_zones_are_the_same_to_a_guest(san: San) -> None:
    san.units.append(UnitSpec(1, allow=[2]))
    async with ScsiDriver.open(san.socket(1)) as driver:
        await reload(san)
        san.units[1] = UnitSpec(1, allow=[1, 2])
        await reload(san)
        assert [short(event) for event in await told(driver, rescan(1))] == [rescan(1)]
        san.units[1] = UnitSpec(1, allow=[2])
        await reload(san)
        await told(driver, removed(1))


async def test_sighup_is_a_reload(san: San) -> None:
    async with ScsiDriver.open(san.socket(1)) as driver:
        san.units.append(UnitSpec(1))
        san.write_fabric()
        san.the_fabric.signal(signal.SIGHUP)
        await told(driver, rescan(1))
        await until(lambda: san.the_fabric.lines("reloaded"))


async def test_the_command_reloads_too(san: San) -> None:
    async with ScsiDriver.open(san.socket(1)) as driver:
        san.units.append(UnitSpec(1))
        san.write_fabric()
        await trio.to_thread.run_sync(san.ask, san.fabric_control, "reload")
        await told(driver, rescan(1))


def test_an_error_in_the_file_changes_nothing(san: San) -> None:
    before = san.fabric_status()
    san.units.append(UnitSpec(1, 'size = "1 furlong"'))
    path = san.write_fabric()
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "furlong" in text)
    command = [sys.executable, "-m", "vhostfc", "reload", str(san.fabric_control)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{path}:{line}: " in done.stderr
    assert "furlong" in done.stderr
    assert san.fabric_status() == before

    san.the_fabric.signal(signal.SIGHUP)
    assert f"{path}:{line}: " in san.the_fabric.await_line("not reloaded, nothing has changed")
    assert san.fabric_status() == before
    del san.units[1]
    san.reload()
    assert san.fabric_status() == before


async def test_what_finds_no_buffer_is_reported_as_missed(san: San) -> None:
    """Firmware gives none; when a driver does, it hears of all that it could not be told, or that it has to look."""
    async with ScsiDriver.open(san.socket(1), event_buffers=0) as driver:
        for number in range(1, 81):
            san.units.append(UnitSpec(number, 'size = "64KiB"\nnull = true'))
        await reload(san)
        await until(lambda: len(san.status(1)["targets"][0]["luns"]) == 81)
        await until(lambda: san.status(1)["front_end"]["events_waiting"] >= 64)
        give_event_buffers(driver, 8)
        found: list[Event] = []
        with trio.fail_after(20):
            async for event in driver.events():
                found.append(event)
                if not san.status(1)["front_end"]["events_waiting"]:
                    break
        assert any(event.missed for event in found)
        assert list(await units(driver)) == list(range(81))
