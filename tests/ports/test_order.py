"""ORDERED commands of a guest all the way: the emulated port, where C, Python and the fabric each have a part in it,
and an HBA's, whose kernel knows no task attributes."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from tests.fakes.stream import HEAD, INQUIRY, ORDERED, READ, SIMPLE, WRITE, Stream, block, random_stream
from tests.ports.contract import ME, lun, ready
from tests.ports.driven import DrivenFabric, DrivenPort
from tests.ports.test_contract import RealSan
from tests.ports.test_contract_npiv import FakeKernelSan
from vhostfc.ports.base import Fabric, Unit
from vhostfc.virtio.scsi import Response, TmfSubtype


@asynccontextmanager
async def stream(san: RealSan | FakeKernelSan, *, fast_path: bool = True) -> AsyncIterator[Stream]:
    """A ring of a guest whose adapter is on this fabric, and knows the way to unit 0."""
    fabric: Fabric = DrivenFabric(san.fabric, fast_path=fast_path)
    async with fabric.login(ME) as port:
        unit = Unit(san.target, lun(0))
        await ready(port, unit)
        driven = cast("DrivenPort", port)
        target, _ = driven.address(unit)
        assert (await driven.driver.command(target, 0, READ, data_in=512)).good
        yield Stream(driven.driver, target)


async def random_ordered_stream(ring: Stream, seed: int, rounds: int) -> None:
    """ORDERED commands of each kind, among SIMPLE ones."""
    chance = random.Random(seed)

    def ordered(number: int) -> None:
        match chance.randrange(3):
            case 0:
                ring.put(INQUIRY, ORDERED, 36)
            case 1:
                ring.put(READ, ORDERED, 512)
            case _:
                ring.put(WRITE, ORDERED, block(number))

    await random_stream(ring, chance, rounds, ordered)


@pytest.fixture
async def emulated(tmp_path: Path, nursery: trio.Nursery) -> RealSan:
    san = RealSan(tmp_path)
    await nursery.start(san.served.serve)
    return san


async def test_a_write_that_is_slow(emulated: RealSan) -> None:
    """It waits for a latch with its worker: neither does the ORDERED one get to the fabric before it, nor the read at
    the medium."""
    async with stream(emulated) as ring:
        latches = [served.medium.latch for served in emulated.served.placement.served.values()]
        for latch in latches:
            assert latch is not None
            latch.take(77, 8 * 512, 512)
        before, ordered = ring.put(WRITE, SIMPLE, block(1)), ring.put(WRITE, ORDERED, block(2))
        after, head = ring.put(READ, SIMPLE, 512), ring.put(INQUIRY, HEAD, 36)
        ring.show()
        await ring.until(head)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert ring.answered == [head]
        for latch in latches:
            assert latch is not None
            latch.recover(77)
        await ring.until(after)
        assert ring.answered == [head, before, ordered, after]
        assert after.data is not None
        assert bytes(after.data.view) == block(2)


@pytest.mark.parametrize("fast_path", [True, False], ids=["fast path", "frames"])
@pytest.mark.parametrize("seed", range(2))
async def test_a_random_stream_to_the_fabric(emulated: RealSan, fast_path: bool, seed: int) -> None:
    async with stream(emulated, fast_path=fast_path) as ring:
        await random_ordered_stream(ring, seed, 10)


@pytest.mark.parametrize("style", ["fcoe", "lpfc"])
async def test_a_device_that_is_slow(tmp_path: Path, nursery: trio.Nursery, style: str) -> None:
    """What the kernel is given is what may run beside each other."""
    san = FakeKernelSan(tmp_path, nursery, style)
    async with stream(san) as ring:
        unit = san.array.units[0]
        unit.hold = True
        before = [ring.put(WRITE, SIMPLE, block(1)), ring.put(READ, SIMPLE, 512)]
        ordered = [ring.put(WRITE, ORDERED, block(2)), ring.put(READ, ORDERED, 512)]
        after = [ring.put(WRITE, SIMPLE, block(3)), ring.put(INQUIRY, SIMPLE, 36)]
        other = ring.put(READ, SIMPLE, 512, lun=1)
        ring.show()
        await ring.until(other)
        for group in (before, ordered[:1], ordered[1:], after):
            with trio.fail_after(10):
                while sum(len(node.held) for node in san.kernel.nodes.values()) < len(group):
                    await trio.testing.wait_all_tasks_blocked(0.001)
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert sum(len(node.held) for node in san.kernel.nodes.values()) == len(group)
            san.kernel.release(san.array)
            await ring.until(*group)
        unit.hold = False
        assert bytes(unit.data[8 * 512 : 9 * 512]) == block(3)
        assert ordered[1].data is not None
        assert bytes(ordered[1].data.view) == block(2)


async def test_a_task_that_waits_is_aborted(tmp_path: Path, nursery: trio.Nursery) -> None:
    """The kernel cannot take a command back, but it has not got this one."""
    san = FakeKernelSan(tmp_path, nursery, "lpfc")
    async with stream(san) as ring:
        unit = san.array.units[0]
        unit.hold = True
        before, ordered = ring.put(WRITE, SIMPLE, block(1)), ring.put(WRITE, ORDERED, block(2))
        after = ring.put(INQUIRY, SIMPLE, 36)
        ring.show()
        with trio.fail_after(10):
            while not any(node.held for node in san.kernel.nodes.values()):
                await trio.testing.wait_all_tasks_blocked(0.001)
        function = TmfSubtype.ABORT_TASK
        assert await ring.driver.manage(function, ring.target, 0, tag=0) == Response.FUNCTION_REJECTED
        assert await ring.driver.manage(function, ring.target, 0, tag=1) == Response.FUNCTION_COMPLETE
        await ring.until(ordered)
        assert ordered.answer.response == Response.ABORTED
        assert before.place is None
        unit.hold = False
        san.kernel.release(san.array)
        await ring.until(before, after)
        assert bytes(unit.data[8 * 512 : 9 * 512]) == block(1)


async def test_a_random_stream_to_a_device(tmp_path: Path, nursery: trio.Nursery) -> None:
    async with stream(FakeKernelSan(tmp_path, nursery, "lpfc")) as ring:
        await random_ordered_stream(ring, 0, 20)
