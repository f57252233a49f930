"""EXTENDED COPY in a running fabric: what becomes of one that is under way when rights change."""

from __future__ import annotations

from pathlib import Path

import trio

from tests.daemon.linkadapter import LinkAdapter
from tests.daemon.test_fabric_reservations import CONFLICT, EA, GOOD, REGISTER, RESERVE, SOMEBODY, out
from tests.daemon.test_fabricd import TARGET, fabric, join
from tests.scsi.test_extended_copy import cdb, cscd, parameters, segment
from vhostfc.daemon.fabricd import Fabric
from vhostfc.native import Latch

SIZE = 512
#: 3 MiB and their copy, which begins within them and so has to be made from the end, in pieces of 1 MiB.
BLOCKS, TO = 3 * 2048, 2048
UNIT = '[[target.unit]]\nlun = 0\nfile = "{}/disk"\nsize = "4MiB"\n'


def naa(san: Fabric) -> bytes:
    (served,) = san._served.values()
    return served.unit.identity.naa[0]


async def copy(one: LinkAdapter, name: bytes, done: list[int]) -> None:
    data = parameters([cscd(name)], [segment(0, 0, BLOCKS, 0, TO)])
    done.append((await one.command(cdb(data), data_out=data)).status)


async def test_a_copy_onto_itself_survives_that_rights_are_looked_at_again(tmp_path: Path) -> None:
    """It goes on where it was: begun anew it would copy what it has copied already."""
    disk = tmp_path / "disk"
    before = b"".join(n.to_bytes(4, "big") * (SIZE // 4) for n in range(4 * 2048))
    disk.write_bytes(before)
    async with fabric(tmp_path, TARGET + UNIT.format(tmp_path)) as (san, nursery):
        one, two = await join(nursery, tmp_path, 1), await join(nursery, tmp_path, 2)
        for each in (one, two):
            await each.command(bytes(6))
        route = await two.open()
        done: list[int] = []
        with Latch(two.fds[route.nexus][1]) as latch:
            assert latch.take(SOMEBODY, 0, SIZE) is None  # the last piece waits for its source
            nursery.start_soon(copy, one, naa(san), done)
            with trio.fail_after(10):
                while disk.read_bytes()[2 << 20 :] != before[1 << 20 : 3 << 20]:
                    await trio.sleep(0.01)
            assert await out(two, REGISTER, 0, 2) == GOOD
            latch.free(SOMEBODY, 0, SIZE)
        await one.until(lambda: done)
    assert done == [GOOD]
    assert disk.read_bytes() == before[: 1 << 20] + before[: 3 << 20]


async def test_a_copy_ends_when_its_right_does(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    async with fabric(tmp_path, TARGET + UNIT.format(tmp_path)) as (san, nursery):
        one, two = await join(nursery, tmp_path, 1), await join(nursery, tmp_path, 2)
        for each in (one, two):
            await each.command(bytes(6))
        route = await two.open()
        done: list[int] = []
        with Latch(two.fds[route.nexus][1]) as latch:
            assert latch.take(SOMEBODY, 0, SIZE) is None
            nursery.start_soon(copy, one, naa(san), done)
            await trio.sleep(0.2)
            assert await out(two, REGISTER, 0, 2) == GOOD
            assert await out(two, RESERVE, 2, kind=EA) == GOOD
            before = disk.read_bytes()
            latch.free(SOMEBODY, 0, SIZE)
        await one.until(lambda: done)
    assert done == [CONFLICT]
    assert disk.read_bytes() == before
