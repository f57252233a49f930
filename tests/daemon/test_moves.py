"""Request rings that go from one worker to another while a front end and its driver use them."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.hostile.adapter import DaemonAdapter
from tests.waiting import until
from vhostfc.errors import VhostfcError
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.load import GenerationTable, Load, Verification, run_load

READ = bytes.fromhex("28 00 00000008 00 0001 00")
INQUIRY = bytes.fromhex("12 00 00 00 24 00")
LOAD = Load(0, 0, 0, 4096, depth=16, read_percent=50, io_size=2048)


@pytest.fixture
async def adapter(tmp_path: Path) -> AsyncIterator[DaemonAdapter]:
    async with DaemonAdapter.running(tmp_path / "vhost.sock", workers=2) as adapter:
        yield adapter
        await adapter.idle()
        assert adapter.wrong == []
        assert adapter.counters()["in_flight"] == 0


async def test_rings_are_dealt_out(adapter: DaemonAdapter) -> None:
    """Each new one to the worker that has fewest."""
    async with ScsiDriver.open(adapter.socket, queues=5):
        assert adapter.owners == {2: 0, 3: 1, 4: 0, 5: 1, 6: 0}


@pytest.mark.parametrize("packed", [False, True])
async def test_a_ring_moves_through_all_that_a_guest_does(adapter: DaemonAdapter, packed: bool) -> None:
    async with ScsiDriver.open(adapter.socket, packed=packed) as driver:
        for number in range(8):
            assert (await driver.command(0, 0, READ, data_in=512)).good
            assert await adapter.move(2, (number + 1) % 2)
            assert (await driver.command(0, 0, INQUIRY, data_in=36)).good
            await driver.stop()
            assert not await adapter.move(2, number % 2)  # it is not started
            await driver.start()
            assert adapter.owners == {2: (number + 1) % 2}
            if number % 3 == 2:
                await driver.reset()
    assert adapter.counters()["rings_moved"] == 8
    async with ScsiDriver.open(adapter.socket, packed=packed) as driver:
        assert (await driver.command(0, 0, READ, data_in=512)).good


async def test_an_order_to_move(adapter: DaemonAdapter) -> None:
    """What the control socket is told, right and wrong."""
    async with ScsiDriver.open(adapter.socket, queues=2):
        assert await adapter.order_move({"ring": 3, "worker": 0}) == {"moved": True}
        assert await adapter.order_move({"ring": 3, "worker": 0}) == {"moved": False}
        assert adapter.owners == {2: 0, 3: 0}
        for wrong in ({}, {"ring": 0, "worker": 1}, {"ring": [], "worker": 1}, {"ring": 2, "worker": "1"}):
            with pytest.raises(VhostfcError, match="no such ring or worker"):
                await adapter.order_move(wrong)


async def test_nowhere_to_go(adapter: DaemonAdapter) -> None:
    async with ScsiDriver.open(adapter.socket):
        assert not await adapter.move(2, 0)
        assert not await adapter.move(2, 7)
        assert adapter.owners == {2: 0}


async def test_a_command_that_is_not_answered_keeps_its_ring(adapter: DaemonAdapter) -> None:
    adapter.hold = True
    async with ScsiDriver.open(adapter.socket) as driver, trio.open_nursery() as nursery:
        nursery.start_soon(driver.command, 0, 0, INQUIRY)
        await until(lambda: adapter.held)
        assert not await adapter.move(2, 1)
        assert adapter.answer_held()
    assert adapter.counters()["rings_moved"] == 0


@pytest.mark.parametrize("packed", [False, True])
async def test_verified_loads_on_rings_that_move(adapter: DaemonAdapter, packed: bool) -> None:
    over = trio.Event()

    async def move() -> None:
        turn = 0
        while not over.is_set():
            await adapter.move(2 + turn % 2, turn // 2 % 2)
            turn += 1

    async with ScsiDriver.open(adapter.socket, packed=packed, queues=2) as driver:
        with GenerationTable(0, LOAD.blocks) as table:
            load = dataclasses.replace(LOAD, verification=Verification(table, 0xBEEF), commands=5000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(move)
                result = await run_load(driver, [load, dataclasses.replace(load, seed=2)])
                over.set()
        assert (result.commands, result.errors, result.retries) == (10000, 0, 0)
        assert adapter.counters()["rings_moved"] > 2


async def test_who_has_too_much_to_do_is_relieved(adapter: DaemonAdapter) -> None:
    """Two of three queues are busy, both with the first worker."""
    busy = dataclasses.replace(LOAD, io_size=1 << 20, blocks=65536, read_percent=100, seconds=60)
    over = trio.Event()

    async def load() -> None:
        idle = dataclasses.replace(busy, io_size=512, depth=1, commands=1, seconds=0)
        await run_load(driver, [busy, idle, busy], until=over)

    async with ScsiDriver.open(adapter.socket, queues=3) as driver, trio.open_nursery() as nursery:
        nursery.start_soon(load)
        with trio.fail_after(50):
            while adapter.owners[2] == adapter.owners[4]:
                await trio.sleep(0.05)
        over.set()
    assert adapter.counters()["rings_moved"] == 1
