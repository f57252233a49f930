"""EXTENDED COPY in a running fabric: what becomes of one that is under way when rights change."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.daemon.linkadapter import LinkAdapter, read_10, wwpn
from tests.daemon.test_fabric_reservations import (
    CHECK_CONDITION,
    CONFLICT,
    EA,
    GOOD,
    REGISTER,
    RESERVE,
    SOMEBODY,
    WE,
    out,
)
from tests.daemon.test_fabricd import TARGET, config, fabric, join, started
from tests.scsi.test_extended_copy import cdb, cscd, parameters, segment
from tests.waiting import until
from vhostfc.daemon.fabricd import Fabric
from vhostfc.native import Latch

SIZE = 512
#: 3 MiB and their copy, which begins within them and so has to be made from the end, in pieces of 1 MiB.
BLOCKS, TO = 3 * 2048, 2048
UNIT = '[[target.unit]]\nlun = 0\nfile = "{}/disk"\nsize = "4MiB"\n'


def naa(san: Fabric) -> bytes:
    (served,) = san.placement.served.values()
    return served.unit.identity.naa[0]


async def copy(one: LinkAdapter, name: bytes, done: list[int]) -> None:
    data = parameters([cscd(name)], [segment(0, 0, BLOCKS, 0, TO)])
    done.append((await one.command(cdb(data), data_out=data)).status)


@asynccontextmanager
async def copying(disk: Path) -> AsyncIterator[tuple[LinkAdapter, Latch, list[int]]]:
    """A copy of adapter 1's that has one piece left, whose source somebody holds in this latch; another adapter.

    At the end the copy has ended, and its status is in the list.
    """
    before = disk.read_bytes()
    async with fabric(disk.parent, TARGET + UNIT.format(disk.parent)) as (san, nursery):
        one, two = await started(nursery, disk.parent, 1, 2)
        route = await two.open()
        done: list[int] = []

        with Latch(two.fds[route.nexus][1]) as latch:
            assert latch.take(SOMEBODY, 0, SIZE) is None
            nursery.start_soon(copy, one, naa(san), done)
            with trio.fail_after(10):
                while disk.read_bytes()[2 << 20 :] != before[1 << 20 : 3 << 20]:
                    await trio.sleep(0.01)
            yield two, latch, done
        await one.until(lambda: done)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """With blocks that tell their numbers."""
    path = tmp_path / "disk"
    path.write_bytes(b"".join(n.to_bytes(4, "big") * (SIZE // 4) for n in range(4 * 2048)))
    return path


async def test_a_copy_onto_itself_survives_that_rights_are_looked_at_again(disk: Path) -> None:
    """It goes on where it was: begun anew it would copy what it has copied already."""
    before = disk.read_bytes()
    async with copying(disk) as (two, latch, done):
        assert await out(two, REGISTER, 0, 2) == GOOD
        latch.free(SOMEBODY, 0, SIZE)
    assert done == [GOOD]
    assert disk.read_bytes() == before[: 1 << 20] + before[: 3 << 20]


async def test_a_copy_ends_when_its_right_does(disk: Path) -> None:
    async with copying(disk) as (two, latch, done):
        assert await out(two, REGISTER, 0, 2) == GOOD
        assert await out(two, RESERVE, 2, kind=EA) == GOOD
        before = disk.read_bytes()
        latch.free(SOMEBODY, 0, SIZE)
    assert done == [CONFLICT]
    assert disk.read_bytes() == before


@pytest.mark.parametrize("why", ["news", "no cache"])
@pytest.mark.parametrize("how", ["write protect", "standby"])
async def test_a_copy_ends_when_its_right_does_also_where_its_nexus_may_not_write_by_itself(
    disk: Path, tmp_path: Path, how: str, why: str
) -> None:
    """With a unit attention pending, or while WCE is off, it may not before and after: that is no measure."""
    was = disk.read_bytes()
    async with fabric(tmp_path, TARGET + UNIT.format(tmp_path)) as (san, nursery):
        one, two = await join(nursery, tmp_path, 1), await join(nursery, tmp_path, 2)
        for each in (one, two):
            await each.command(bytes(6))
        (served,) = san.placement.served.values()
        done: list[int] = []
        with Latch(served.medium.latch_fd) as latch:
            for piece in (0, 1):
                assert latch.take(SOMEBODY, piece << 20, SIZE) is None
            if why == "no cache":
                assert await select(one, NO_CACHE) == GOOD
                await two.command(bytes(6))
            nursery.start_soon(copy, one, naa(san), done)
            await until(lambda: disk.read_bytes()[3 << 20 :] == was[2 << 20 : 3 << 20])
            if why == "news":
                assert await select(two, D_SENSE) == GOOD
            latch.free(SOMEBODY, 1 << 20, SIZE)
            await until(lambda: disk.read_bytes()[2 << 20 : 3 << 20] == was[1 << 20 : 2 << 20])
            # the second piece is copied, and the third waits for its source
            assert latch.take(SOMEBODY, 1 << 20, SIZE) is None
            latch.free(SOMEBODY, 0, SIZE)
            await trio.sleep(0.2)  # and now for its destination
            if how == "standby":
                stpg = bytes([0xA4, 0x0A, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0])
                assert (await two.command(stpg, data_out=bytes(4) + bytes([2, 0, 0, 1]))).status == GOOD
            else:
                assert await select(two, PROTECT) == GOOD
            before = disk.read_bytes()
            assert not done
            latch.free(SOMEBODY, 1 << 20, SIZE)
        await one.until(lambda: done)
        assert done == [CHECK_CONDITION]
        assert disk.read_bytes() == before


NO_CACHE = bytes.fromhex("08 12 00 00 ffff 0000 ffff ffff 00 00 0000 00 000000")
D_SENSE = bytes.fromhex("0a 0a 06 10 00 40 00 00 ffff 0000")
PROTECT = bytes.fromhex("0a 0a 02 10 08 40 00 00 ffff 0000")


async def select(one: LinkAdapter, page: bytes) -> int:
    """A MODE SELECT of this page; its status."""
    cdb = bytes([0x15, 0x10, 0, 0, 4 + len(page), 0])
    return (await one.command(cdb, data_out=bytes(4) + page)).status


async def test_a_copy_ends_when_its_unit_becomes_read_only(disk: Path, tmp_path: Path) -> None:
    was = disk.read_bytes()
    unit = UNIT.format(tmp_path)
    async with fabric(tmp_path, TARGET + unit) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        await one.command(bytes(6))
        (served,) = san.placement.served.values()
        done: list[int] = []
        with Latch(served.medium.latch_fd) as latch:
            assert latch.take(SOMEBODY, 0, SIZE) is None
            nursery.start_soon(copy, one, naa(san), done)
            await until(lambda: disk.read_bytes()[2 << 20 :] == was[1 << 20 : 3 << 20])
            await san.reload(config(tmp_path, TARGET + unit + "read_only = true\n"))
            with disk.open("r+b") as file:
                file.write(b"a" * SIZE)  # what the copy reads, if it does
            before = disk.read_bytes()
            latch.free(SOMEBODY, 0, SIZE)
        await one.until(lambda: done)
        assert done == [CHECK_CONDITION]
        assert disk.read_bytes() == before


# ---------------------------------------------------------------- between units

PAIR = "".join(f'[[target.unit]]\nlun = {n}\nfile = "{{0}}/{n}"\nsize = "1MiB"\n' for n in (0, 1))
A = b"a" * SIZE


def names(san: Fabric) -> list[bytes]:
    """The units' NAA designators, by their files' names."""
    return [served.unit.identity.naa[0] for _, served in sorted(san.placement.served.items())]


async def over(one: LinkAdapter, designators: list[bytes], done: list[tuple[int, str]]) -> None:
    """Block 0 of LUN 0 to block 7 of LUN 1."""
    data = parameters([cscd(name) for name in designators], [segment(0, 1, 1, 0, 7)])
    answer = await one.command(cdb(data), data_out=data)
    done.append((answer.status, bytes([answer.sense[2], *answer.sense[12:14]]).hex() if answer.sense else ""))


def writing(san: Fabric) -> bool:
    """The copy is at its write, which waits for the block."""
    return any(served._operations for served in san.placement.served.values())


async def ready(adapter: LinkAdapter) -> LinkAdapter:
    for lun in (0, 1):
        await adapter.command(bytes(6), lun=lun)
    return adapter


async def test_blocks_are_copied_between_units(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(A.ljust(1 << 20, b"\0"))
    masked = f'allow = ["{wwpn(2)}"]\n'
    async with fabric(tmp_path, TARGET + PAIR.format(tmp_path)) as (san, nursery):
        one = await ready(await join(nursery, tmp_path, 1))
        done: list[tuple[int, str]] = []
        await over(one, names(san), done)
        assert done.pop() == (GOOD, "")
        assert (tmp_path / "1").read_bytes().replace(A, b"") == bytes((1 << 20) - SIZE)
        assert (await one.command(read_10(7, 1), lun=1, data_in=SIZE)).data_in == A
        await san.reload(config(tmp_path, TARGET + PAIR.format(tmp_path) + masked))
        await one.command(bytes(6))  # reported LUNs data has changed
        await over(one, names(san), done)
        assert done.pop() == (2, "0a0d02"), "LUN 1 is not for this initiator any more"


async def test_a_copy_does_not_land_behind_a_preempt_at_the_other_unit(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(A.ljust(1 << 20, b"\0"))
    async with fabric(tmp_path, TARGET + PAIR.format(tmp_path)) as (san, nursery):
        one = await ready(await join(nursery, tmp_path, 1))
        two = await ready(await join(nursery, tmp_path, 2))
        route = await two.open(lun=1)
        done: list[tuple[int, str]] = []
        reserved: list[int] = []

        async def reserve() -> None:
            for action, key, new in ((REGISTER, 0, 2), (RESERVE, 2, 0)):
                data = key.to_bytes(8, "big") + new.to_bytes(8, "big") + bytes(8)
                command = bytes([0x5F, action, WE, 0, 0, 0, 0, 0, 24, 0])
                reserved.append((await two.command(command, lun=1, data_out=data)).status)

        with Latch(two.fds[route.nexus][1]) as latch:
            assert latch.take(SOMEBODY, 7 * SIZE, SIZE) is None
            nursery.start_soon(over, one, names(san), done)
            await until(lambda: writing(san))
            nursery.start_soon(reserve)
            await until(lambda: len(san._runner._running) == 2)
            await trio.testing.wait_all_tasks_blocked()
            assert len(reserved) < 2, "it waits for what is under way"
            latch.free(SOMEBODY, 7 * SIZE, SIZE)
        await two.until(lambda: len(reserved) == 2)
        await one.until(lambda: done)
    assert reserved == [GOOD, GOOD]
    # It was first, or it was not done
    landed = (tmp_path / "1").read_bytes() != bytes(1 << 20)
    assert done == [(GOOD, "") if landed else (2, "0a0d01")]


async def test_a_unit_is_taken_away_while_it_is_copied_to(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(A.ljust(1 << 20, b"\0"))
    both = TARGET + PAIR.format(tmp_path)
    async with fabric(tmp_path, both) as (san, nursery):
        one = await ready(await join(nursery, tmp_path, 1))
        two = await ready(await join(nursery, tmp_path, 2))
        route = await two.open(lun=1)
        done: list[tuple[int, str]] = []
        reloaded: list[bool] = []

        async def take_away() -> None:
            await san.reload(config(tmp_path, both[: both.rindex("[[target.unit]]")]))
            reloaded.append(True)

        with Latch(two.fds[route.nexus][1]) as latch:
            assert latch.take(SOMEBODY, 7 * SIZE, SIZE) is None
            nursery.start_soon(over, one, names(san), done)
            await until(lambda: writing(san))
            nursery.start_soon(take_away)
            await until(lambda: len(san.config.targets[0].units) == 1)
            await trio.testing.wait_all_tasks_blocked()
            assert not reloaded
            latch.free(SOMEBODY, 7 * SIZE, SIZE)
        await one.until(lambda: done)
        await until(lambda: reloaded)
    assert done == [(2, "0a0d02")]
    assert not any((tmp_path / "1").read_bytes())
