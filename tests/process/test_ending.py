"""SIGTERM while everything is at work: quick, in good order, nothing left behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from tests.lab.san import San, UnitSpec
from tests.process.driving import KIB, MIB, beside, ready, units
from tests.waiting import until
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.load import Load

QUICK = 5.0
UNITS = (
    'size = "1MiB"',
    'file = "{directory}/disk.img"\nsize = "1MiB"',
    'file = "{directory}/direct.img"\nsize = "1MiB"\ncache = "none"',
)


def loads(number: int) -> list[Load]:
    return [Load(0, lun, 0, MIB // 512, 512, 16 * KIB, 16, 50) for lun in range(number)]


def network(directory: Path) -> San:
    return San(directory, [UnitSpec(lun, source.format(directory=directory)) for lun, source in enumerate(UNITS)])


def sockets(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_socket())


@pytest.mark.parametrize("fast", [True, False])
async def test_an_adapter(tmp_path: Path, fast: bool) -> None:
    with network(tmp_path) as san:
        adapter = san.start_adapter(1, fabric="" if fast else "fast_path = false", vhost="workers = 2")
        async with ScsiDriver.open(san.socket(1), queues=3) as driver:
            await units(driver)
            async with beside(driver, *loads(3), doomed=True) as load:
                await until(lambda: san.status(1)["counters"]["commands"] > 300)
                began = time.monotonic()
                assert await trio.to_thread.run_sync(adapter.stop) == 0
                took = time.monotonic() - began
        assert load.lost
        assert took < QUICK
        print(f"an adapter at work ends in {took:.2f} s")
        assert san.fabric_status()["logins"] == [], "it has logged out"
        assert sockets(tmp_path) == ["fabric.control", "fabric.sock"]
        assert not adapter.lines("error|critical")


async def test_the_fabric(tmp_path: Path) -> None:
    with network(tmp_path) as san:
        san.start_adapters({1: {}, 2: {"fabric": "fast_path = false"}})
        async with (
            ScsiDriver.open(san.socket(1), queues=3) as driver,
            ScsiDriver.open(san.socket(2), queues=3) as other,
        ):
            await units(driver)
            await units(other)
            async with beside(driver, *loads(3)), beside(other, *loads(3)):
                await until(lambda: all(san.status(n)["counters"]["commands"] > 300 for n in (1, 2)))
                began = time.monotonic()
                assert await trio.to_thread.run_sync(san.the_fabric.stop) == 0
                took = time.monotonic() - began
                assert took < QUICK
                print(f"the fabric at work ends in {took:.2f} s")
                assert sockets(tmp_path) == ["vm1.control", "vm1.sock", "vm2.control", "vm2.sock"]
                assert not san.the_fabric.lines("error|critical")
                await trio.to_thread.run_sync(san.start_fabric)
                for number in (1, 2):
                    await trio.to_thread.run_sync(san.wait_online, number)
        for daemon in san.adapters.values():
            assert daemon.lines("lost the fabric")


async def test_everybody_at_once(tmp_path: Path) -> None:
    """As `systemctl stop` of all of them does it."""
    with network(tmp_path) as san:
        san.start_adapters({1: {}, 2: {}})
        async with ScsiDriver.open(san.socket(1), queues=3) as driver, ScsiDriver.open(san.socket(2)) as idle:
            await units(driver)
            await ready(idle, 0)
            async with beside(driver, *loads(3), doomed=True):
                await until(lambda: san.status(1)["counters"]["commands"] > 300)
                began = time.monotonic()
                for daemon in san.started:
                    daemon.process.terminate()
                assert [await trio.to_thread.run_sync(daemon.process.wait) for daemon in san.started] == [0, 0, 0]
                assert time.monotonic() - began < QUICK
        assert sockets(tmp_path) == []
        for daemon in san.started:
            assert not daemon.lines("error|critical")
