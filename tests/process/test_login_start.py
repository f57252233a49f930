"""login = "start": the port is on the fabric only while a driver runs the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.san import San, UnitSpec, wwpn
from tests.process.driving import read_10, ready, units
from tests.waiting import until
from vhostfc.frontend.driver import ScsiDriver


@pytest.fixture
def san(tmp_path: Path) -> Iterator[San]:
    with San(tmp_path, [UnitSpec(0), UnitSpec(1)]) as network:
        network.start_adapter(1, fabric='login = "start"', online=False)
        yield network


def logins(san: San) -> list[str]:
    return [login["wwpn"] for login in san.fabric_status()["logins"]]


async def test_the_port_comes_and_goes_with_the_driver(san: San) -> None:
    for _ in range(3):
        await until(lambda: logins(san) == [])
        assert san.status(1)["port"]["state"] == "logged out"
        async with ScsiDriver.open(san.socket(1), start=False) as driver:
            await until(lambda: san.status(1)["front_end"]["state"] == "standby")
            assert logins(san) == [], "connected is not running"
            await driver.start()
            assert list(await units(driver)) == [0, 1], "a driver's first look finds all"
            assert logins(san) == [wwpn(1)]
            await ready(driver, 0)
            assert (await driver.command(0, 0, read_10(0, 1), data_in=512)).good


async def test_a_stop_is_a_logout(san: San) -> None:
    async with ScsiDriver.open(san.socket(1)) as driver:
        assert list(await units(driver)) == [0, 1]
        for _ in range(3):
            await driver.stop()
            await until(lambda: logins(san) == [])
            await driver.start()
            assert list(await units(driver)) == [0, 1]
        await driver.reset()
        assert list(await units(driver)) == [0, 1]
    await until(lambda: logins(san) == [])


async def test_firmware_that_looks_once_finds_its_disk(san: San) -> None:
    """No patience: the very first commands, not sent again."""
    async with ScsiDriver.open(san.socket(1), event_buffers=0) as driver:
        inquiry = await driver.command(0, 0, bytes([0x12, 0, 0, 0, 36, 0]), data_in=36)
        assert inquiry.good, inquiry
        assert inquiry.data_in[0] == 0
