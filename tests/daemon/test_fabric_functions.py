"""Task management functions in a running fabric: of a whole target, and of a LUN where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.daemon.linkadapter import read_10
from tests.daemon.test_fabric_reservations import CHECK_CONDITION, GOOD
from tests.daemon.test_fabricd import TARGET, UNIT, config, fabric, join
from vhostfc.fabric.link import InFlight
from vhostfc.fc.fcp import ResponseCode, TmFlag

SECOND = UNIT.replace("lun = 0", "lun = 1")


async def test_a_target_reset_is_of_every_unit(tmp_path: Path) -> None:
    async with fabric(tmp_path, TARGET + UNIT + SECOND) as (_, nursery):
        one, two = await join(nursery, tmp_path, 1), await join(nursery, tmp_path, 2)
        for lun in (0, 1):
            for member in (one, two):
                await member.command(bytes(6), lun=lun)
            assert (await one.command(bytes([0x16, 0, 0, 0, 0, 0]), lun=lun)).status == GOOD
        assert await two.manage(TmFlag.TARGET_RESET) == ResponseCode.COMPLETE
        for lun in (0, 1):
            for member in (one, two):
                answer = await member.command(bytes(6), lun=lun)
                assert (answer.status, answer.sense[12:14]) == (CHECK_CONDITION, bytes.fromhex("2903"))
                assert (await member.command(bytes(6), lun=lun)).status == GOOD, "RESERVE has ended"


@pytest.mark.parametrize("after", ["", SECOND + "read_only = true\n"], ids=["taken away", "made read-only"])
async def test_a_target_reset_while_units_change(tmp_path: Path, after: str) -> None:
    async with fabric(tmp_path, TARGET + UNIT + SECOND) as (san, nursery):
        one, two = await join(nursery, tmp_path, 1), await join(nursery, tmp_path, 2)
        for member in (one, two):
            await member.command(bytes(6))
        await one.open()
        one.acks = False
        done: list[object] = []

        async def reset() -> None:
            done.append(await two.manage(TmFlag.TARGET_RESET))

        nursery.start_soon(reset)
        await one.until(lambda: next(iter(one.routes.values())).in_flight is InFlight.RESET)
        (target,) = san.placement.targets.values()
        before = san.array.places(target)
        nursery.start_soon(san.reload, config(tmp_path, TARGET + UNIT + after))
        with trio.fail_after(10):
            while san.array.places(target) == before:
                await trio.sleep(0.01)
        assert not done
        one.acks = True
        await one.acknowledge()
        await one.until(lambda: done)
        assert done == [ResponseCode.COMPLETE]
        assert (await two.command(bytes(6))).sense[12:14] == bytes.fromhex("2903")


async def test_functions_for_a_lun_where_nothing_is(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        one = await join(nursery, tmp_path, 1)
        for flag in (
            TmFlag.ABORT_TASK_SET,
            TmFlag.CLEAR_TASK_SET,
            TmFlag.LOGICAL_UNIT_RESET,
            TmFlag.QUERY_TASK_SET,
        ):
            assert await one.manage(flag, lun=9) == ResponseCode.INCORRECT_LUN
        for flag in (TmFlag.CLEAR_ACA, TmFlag.QUERY_ASYNCHRONOUS_EVENT, TmFlag(0x80)):
            assert await one.manage(flag) == ResponseCode.REJECTED
        await one.command(bytes(6))
        assert (await one.command(read_10(0, 1), data_in=512)).status == GOOD
