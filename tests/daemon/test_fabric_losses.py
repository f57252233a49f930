"""What the host loses of its cache: each nexus is told, once, whoever heard of it first and whatever route it has."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio

from tests.daemon.disk import Disk
from tests.daemon.linkadapter import LinkAdapter, write_10
from tests.daemon.test_fabric_reservations import may
from tests.daemon.test_fabric_sanitize import file_unit
from tests.daemon.test_fabricd import fabric, started
from tests.scsi.test_extended_copy import cdb, cscd, parameters, segment
from vhostfc.daemon import media
from vhostfc.daemon.medium import NotSynced
from vhostfc.fabric.link import Route
from vhostfc.native import Latch

SYNC = bytes([0x35, *bytes(9)])
LOSS = 1 << 32
#: CHECK CONDITION, MEDIUM ERROR, WRITE ERROR.
GOOD, LOST = (0, 0, b""), (2, 3, b"\x0c\x00")


async def ended(one: LinkAdapter, command: bytes, data: bytes = b"") -> tuple[int, int, bytes]:
    result = await one.command(command, data_out=data)
    return (result.status, result.sense[2], result.sense[12:14]) if result.sense else (result.status, 0, b"")


def route_of(one: LinkAdapter) -> Route:
    (route,) = one.routes.values()
    return route


def latch_of(one: LinkAdapter) -> Latch:
    (fds,) = one.fds.values()
    return Latch(fds[1])


async def test_a_loss_is_told_to_every_nexus_once(tmp_path: Path, disk: Disk) -> None:
    async with fabric(tmp_path, file_unit(tmp_path)) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        for member in (one, two):
            assert await ended(member, SYNC) == GOOD
        disk.error = errno.EIO
        assert await ended(one, SYNC) == LOST
        assert await ended(one, SYNC) == GOOD
        assert await ended(two, write_10(0, 1), bytes(512)) == GOOD
        assert await ended(two, SYNC) == LOST
        assert await ended(two, SYNC) == GOOD
        assert await ended(one, SYNC) == GOOD


async def test_space_that_was_missing_for_the_cache_is_a_loss_too(tmp_path: Path, disk: Disk) -> None:
    async with fabric(tmp_path, file_unit(tmp_path)) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        disk.error = errno.ENOSPC
        assert await ended(one, SYNC) == LOST
        assert await ended(two, SYNC) == LOST


async def test_a_forced_write_and_a_forced_read_hear_of_it_for_all(tmp_path: Path, disk: Disk) -> None:
    write_fua, read_fua = bytes([0x2A, 8, *write_10(3, 1)[2:]]), bytes([0x28, 8, *write_10(3, 1)[2:]])
    async with fabric(tmp_path, file_unit(tmp_path)) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        disk.error = errno.EIO
        assert await ended(one, write_fua, bytes(512)) == LOST
        assert await ended(one, write_fua, bytes(512)) == GOOD
        assert await ended(two, write_fua, bytes(512)) == LOST
        assert await ended(two, write_fua, bytes(512)) == GOOD
        disk.error = errno.EIO
        assert (await one.command(read_fua, data_in=512)).status == 2
        for member in (one, two):
            assert await ended(member, SYNC) == LOST
            assert await ended(member, SYNC) == GOOD


async def test_a_new_route_does_not_forget_what_the_nexus_was_not_told(tmp_path: Path, disk: Disk) -> None:
    async with fabric(tmp_path, file_unit(tmp_path)) as (san, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        await two.open()
        disk.error = errno.EIO
        assert await ended(one, SYNC) == LOST
        (served,) = san.placement.served.values()
        before = route_of(two)
        served.unit.inventory_changed()  # a unit attention: two has another route, and another description
        served.changed()
        await two.until(lambda: not may(two, 0x35))
        await two.command(bytes(6))
        await two.until(lambda: may(two, 0x35))
        assert route_of(two).epoch > before.epoch
        with latch_of(two) as latch:
            assert latch.losses() == LOSS
            assert route_of(two).losses == 0, "so its worker asks the fabric"
        assert await ended(two, SYNC) == LOST
        await two.until(lambda: route_of(two).losses == LOSS)
        assert await ended(two, SYNC) == GOOD


async def test_who_logs_in_again_still_has_to_be_told_and_who_is_new_has_not(tmp_path: Path, disk: Disk) -> None:
    async with fabric(tmp_path, file_unit(tmp_path)) as (san, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        assert await ended(two, write_10(0, 1), bytes(512)) == GOOD
        two.close()
        with trio.fail_after(10):
            while len(san.status()["logins"]) > 1:
                await trio.sleep(0.01)
        disk.error = errno.EIO
        assert await ended(one, SYNC) == LOST
        two, three = await started(nursery, tmp_path, 2, 3)
        assert await ended(three, SYNC) == GOOD
        assert await ended(two, SYNC) == LOST


async def test_a_loss_that_an_adapter_has_counted_is_the_same_that_the_fabric_finds(tmp_path: Path, disk: Disk) -> None:
    async with fabric(tmp_path, file_unit(tmp_path)) as (_, nursery):
        one, two, three = await started(nursery, tmp_path, 1, 2, 3)
        for member in (one, two):
            await member.open()
        with latch_of(one) as latch:
            assert latch.lost(route_of(one).losses) == LOSS  # what C does when its flush fails
            disk.error = errno.EIO
            assert await ended(one, SYNC) == LOST
            assert latch.losses() == LOSS
            await one.until(lambda: route_of(one).losses == LOSS)
            # Its own description tells the second one; the fabric's has told already.
            latch.lost(route_of(two).losses)
            assert await ended(two, SYNC) == LOST
            assert await ended(three, SYNC) == LOST
            for member in (one, two, three):
                assert await ended(member, SYNC) == GOOD
            await one.until(lambda: route_of(one).losses == route_of(two).losses == latch.losses())


async def test_a_copy_to_another_unit_hears_of_what_that_one_lost(tmp_path: Path, disk: Disk) -> None:
    text = file_unit(tmp_path) + f'[[target.unit]]\nlun = 1\nfile = "{tmp_path}/other"\nsize = "1MiB"\n'
    async with fabric(tmp_path, text) as (san, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        for member in (one, two):
            await member.command(bytes(6), lun=1)
        page = (await one.command(bytes([0x1A, 0x08, 0x08, 0, 255, 0]), data_in=255, lun=1)).data_in[4:]
        uncached = bytes(4) + page[:2] + bytes([page[2] & ~0x04]) + page[3:]
        select = bytes([0x15, 0x10, 0, 0, len(uncached), 0])
        assert (await one.command(select, data_out=uncached, lun=1)).status == 0
        await two.command(bytes(6), lun=1)
        names = [served.unit.identity.naa[0] for served in san.placement.served.values()]
        data = parameters([cscd(name) for name in names], [segment(0, 1, 8, 0, 0)])
        disk.error = errno.EIO
        assert (await one.command(cdb(data), data_out=data)).status == 2
        assert (await one.command(SYNC, lun=1)).status == 0, "it has heard of it"
        assert (await two.command(SYNC, lun=1)).sense[2] == 3
        assert (await two.command(SYNC, lun=0)).status == 0


async def test_a_doubt_is_cleared_up_without_an_error(tmp_path: Path, disk: Disk) -> None:
    async with fabric(tmp_path, file_unit(tmp_path)) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        await one.open()
        await two.open()
        with latch_of(one) as latch:
            assert latch.lost(0) == LOSS
            assert await ended(one, SYNC) == LOST
            assert latch.lost(0) == LOSS + 1
            assert await ended(one, SYNC) == GOOD
            await one.until(lambda: route_of(one).losses == LOSS + 1)
            assert route_of(two).losses == 0


def test_a_loss_is_counted_once_by_the_fabric(tmp_path: Path, disk: Disk) -> None:
    medium = media.file(tmp_path / "f", 4096, block_size=512, direct=False, read_only=False)
    disk.error = errno.EIO
    with pytest.raises(NotSynced):
        medium._write(0, bytes(512), fua=True)
    assert medium.losses() == LOSS
    medium._sync(0)
    assert medium.losses() == LOSS
    medium.close()
