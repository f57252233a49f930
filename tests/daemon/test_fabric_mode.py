"""Mode pages that are saved: in force before GOOD, after resets, and from the first command on after a restart."""

from __future__ import annotations

import errno
import os
import re
import time
from pathlib import Path

import pytest
import structlog
import trio
from structlog.testing import capture_logs

from tests.daemon.disk import Disk
from tests.daemon.linkadapter import LinkAdapter, write_10
from tests.daemon.test_fabric_reservations import may
from tests.daemon.test_fabric_sanitize import file_unit
from tests.daemon.test_fabricd import TARGET, Manager, config, fabric, join, life, started, unit
from vhostfc.daemon.fabricd import Fabric
from vhostfc.fabric.link import Route
from vhostfc.fc.fcp import TmFlag

GOOD, CHECK_CONDITION = 0x00, 0x02
WRITE_THROUGH = bytes.fromhex("0812 0000 ffff 0000 ffff ffff 00 00 0000 00 000000")
WRITE_BACK = bytes.fromhex("0812 0400 ffff 0000 ffff ffff 00 00 0000 00 000000")
PROTECTED = bytes.fromhex("0a0a 0210 0840 0000 ffff 0000")
CURRENT, SAVED = 0, 3
READ, WRITE = 0x28, 0x2A


async def select(one: LinkAdapter, page: bytes, *, save: bool = True) -> int:
    """MODE SELECT(6) of this page; its status."""
    data = bytes(4) + page
    return (await one.command(bytes([0x15, 0x10 | save, 0, 0, len(data), 0]), data_out=data)).status


async def cached(one: LinkAdapter, control: int = CURRENT) -> bool:
    """WCE, as MODE SENSE(6) says it."""
    page = (await one.command(bytes([0x1A, 0x08, control << 6 | 8, 0, 255, 0]), data_in=255)).data_in[4:]
    assert page[:2] == b"\x88\x12"
    return bool(page[2] & 0x04)


def notes(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "state").rglob("*.mode"))


async def check_write_through(one: LinkAdapter, disk: Disk) -> None:
    """As MODE SENSE says it, as the adapter may do it, and as the fabric does it."""
    assert not await cached(one)
    assert not await cached(one, SAVED)
    if not one.routes:
        await one.open()
    await one.until(lambda: may(one, READ))
    assert not any(route.mask[WRITE // 8] >> WRITE % 8 & 1 for route in one.seen if isinstance(route, Route))
    before = disk.flushed
    assert (await one.command(write_10(0, 1), data_out=bytes(512))).status == GOOD
    assert disk.flushed == before + 1


async def test_a_cache_that_was_switched_off_stays_off(tmp_path: Path, disk: Disk) -> None:
    text = file_unit(tmp_path)
    async with fabric(tmp_path, text) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        assert await select(one, WRITE_THROUGH) == GOOD
        assert len(notes(tmp_path)) == 1
        assert (await two.command(bytes(6))).sense[12:14] == bytes.fromhex("2a01")
        await two.manage(TmFlag.LOGICAL_UNIT_RESET)
        for member in (one, two):
            assert (await member.command(bytes(6))).sense[12:14] == bytes.fromhex("2903")
            await check_write_through(member, disk)
        await two.manage(TmFlag.TARGET_RESET)
        await one.command(bytes(6))
        await check_write_through(one, disk)
    async with fabric(tmp_path, text) as (_, nursery):
        one = await join(nursery, tmp_path, 1)
        before = disk.flushed
        assert (await one.command(bytes(6))).status == CHECK_CONDITION, "the power on"
        assert disk.flushed == before
        await check_write_through(one, disk)
        assert await select(one, WRITE_BACK) == GOOD
        assert not notes(tmp_path)
        await one.until(lambda: may(one, WRITE))
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert await cached(one)


async def test_without_sp_it_lasts_until_a_reset(tmp_path: Path) -> None:
    async with fabric(tmp_path, file_unit(tmp_path)) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert await select(one, WRITE_THROUGH, save=False) == GOOD
        assert not await cached(one)
        assert await cached(one, SAVED)
        await one.manage(TmFlag.LOGICAL_UNIT_RESET)
        await one.command(bytes(6))
        assert await cached(one)
    assert not (tmp_path / "state").exists()


async def test_a_unit_that_was_write_protected_for_good_is_so_after_a_restart(tmp_path: Path) -> None:
    """By memory that is kept, too; one that begins empty is another disk, and so is another file."""
    manager = Manager(tmp_path / "notify")
    async with life(tmp_path, manager, TARGET + unit(0)) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert await select(one, PROTECTED) == GOOD
    async with life(tmp_path, manager, TARGET + unit(0)) as (san, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        await one.open()
        assert not may(one, WRITE)
        assert (await one.command(write_10(0, 1), data_out=bytes(512))).sense[2] & 0xF == 7
        await san.reload(config(tmp_path, TARGET))
        assert not notes(tmp_path)
        await san.reload(config(tmp_path, TARGET + unit(0)))
        await one.command(bytes(6))
        await one.command(bytes(6))
        assert (await one.command(write_10(0, 1), data_out=bytes(512))).status == GOOD
    manager.close()


async def test_another_file_has_no_pages_of_the_old_one(tmp_path: Path) -> None:
    text = file_unit(tmp_path)
    for number, there in enumerate((text, text.replace("/disk", "/other"), text)):
        async with fabric(tmp_path, there) as (_, nursery):
            (one,) = await started(nursery, tmp_path, 1)
            assert await cached(one) == (number < 2)
            if number == 0:
                assert await select(one, WRITE_THROUGH) == GOOD


async def test_what_cannot_be_kept_is_told_and_changes_nothing(tmp_path: Path) -> None:
    async with fabric(tmp_path, file_unit(tmp_path)) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        (tmp_path / "state").write_text("not a directory")
        for _ in range(2):
            result = await one.command(bytes([0x15, 0x11, 0, 0, 24, 0]), data_out=bytes(4) + WRITE_THROUGH)
            assert (result.status, result.sense[2], result.sense[12:14]) == (2, 4, bytes.fromhex("4400"))
            assert await cached(one)
            assert await cached(one, SAVED)
        assert (await two.command(bytes(6))).status == GOOD, "no news"
        await two.open()
        await two.until(lambda: may(two, WRITE))
        assert await select(one, WRITE_THROUGH, save=False) == GOOD


async def test_what_does_not_get_to_the_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def broken(fd: int) -> None:
        if ".mode" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    text = file_unit(tmp_path)
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert await select(one, WRITE_THROUGH) == GOOD
        monkeypatch.setattr(os, "fsync", broken)
        assert await select(one, WRITE_BACK + PROTECTED) == CHECK_CONDITION
        assert not await cached(one)
        assert (await one.command(write_10(0, 1), data_out=bytes(512))).status == GOOD
        monkeypatch.setattr(os, "fsync", real)
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert not await cached(one)


async def test_good_waits_until_the_adapters_obey_and_nothing_is_kept_before(tmp_path: Path) -> None:
    async with fabric(tmp_path, file_unit(tmp_path)) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        await two.open()
        assert may(two, WRITE)
        two.acks = False
        done: list[int] = []

        async def switch() -> None:
            done.append(await select(one, WRITE_THROUGH))

        nursery.start_soon(switch)
        await two.until(lambda: not may(two, WRITE))
        await two.command(bytes([0x12, 0, 0, 0, 36, 0]), data_in=36, lun=9)  # the fabric does other things meanwhile
        assert not done
        assert not notes(tmp_path)
        two.acks = True
        await two.acknowledge()
        await one.until(lambda: done)
        assert done == [GOOD]
        assert len(notes(tmp_path)) == 1
        assert (await two.command(bytes(6))).sense[12:14] == bytes.fromhex("2a01")
        assert not await cached(two)


@pytest.mark.parametrize("how", ["ABTS", "ABORT TASK SET", "logout"])
async def test_one_that_is_aborted_leaves_the_cache_on(tmp_path: Path, how: str) -> None:
    async with fabric(tmp_path, file_unit(tmp_path)) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        await two.open()
        two.acks = False
        data = bytes(4) + WRITE_THROUGH
        cdb, lun, now = bytes([0x15, 0x11, 0, 0, len(data), 0]), bytes(8), time.monotonic()
        command = one.port.start_command(one.remote(), lun, cdb, now, data_out=data, data_in_length=0)
        await one.until(lambda: not may(two, WRITE))
        match how:
            case "ABTS":
                one.port.abort(command, now)
            case "ABORT TASK SET":
                one.port.manage(one.remote(), lun, TmFlag.ABORT_TASK_SET, 20.0, now)
            case _:
                one.close()
        await two.until(lambda: may(two, WRITE))
        two.acks = True
        await two.acknowledge()
        assert await cached(two)
        assert not notes(tmp_path)
        assert await select(two, WRITE_THROUGH) == GOOD


async def test_a_reset_to_a_cache_that_is_off_empties_it(tmp_path: Path, disk: Disk) -> None:
    async with fabric(tmp_path, file_unit(tmp_path)) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert await select(one, WRITE_THROUGH) == GOOD
        assert await select(one, WRITE_BACK, save=False) == GOOD
        before = disk.flushed
        await one.manage(TmFlag.LOGICAL_UNIT_RESET)
        assert disk.flushed == before + 1
        await one.command(bytes(6))
        await check_write_through(one, disk)


async def test_a_start_to_a_cache_that_is_off_empties_it(tmp_path: Path, disk: Disk) -> None:
    text = file_unit(tmp_path)
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert await select(one, WRITE_THROUGH) == GOOD
        assert await select(one, WRITE_BACK, save=False) == GOOD
        await one.command(write_10(0, 1), data_out=bytes(512))
    before, disk.error = disk.flushed, errno.EIO
    with capture_logs() as logs:
        async with fabric(tmp_path, text) as (_, nursery):
            assert disk.flushed == before + 1
            (one,) = await started(nursery, tmp_path, 1)
            await check_write_through(one, disk)
    assert [one["event"] for one in logs if one["log_level"] == "error"] == [
        "the host lost what an earlier life had in its cache"
    ]


async def test_a_note_that_cannot_be_understood_stops_the_start(tmp_path: Path) -> None:
    text = file_unit(tmp_path)
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert await select(one, WRITE_THROUGH) == GOOD
    (path,) = notes(tmp_path)
    path.write_bytes(path.read_bytes()[:20])

    with pytest.raises(ExceptionGroup) as caught:
        await Fabric(config(tmp_path, text), log=structlog.get_logger()).serve()
    assert re.match(f"{path}: .*mode pages cannot be understood.*remove the file", str(caught.value.exceptions[0]))


async def test_two_that_save_go_one_by_one(tmp_path: Path) -> None:
    """Else the later note would be without what the earlier one has saved."""
    async with fabric(tmp_path, file_unit(tmp_path)) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        done: list[int] = []

        async def send(member: LinkAdapter, page: bytes) -> None:
            done.append(await select(member, page))

        async with trio.open_nursery() as both:
            both.start_soon(send, one, WRITE_THROUGH)
            both.start_soon(send, two, PROTECTED)
        if CHECK_CONDITION in done:  # the other one's news came first
            assert await select(two, PROTECTED) == GOOD
    (path,) = notes(tmp_path)
    assert WRITE_THROUGH.hex() in path.read_text()
    assert PROTECTED.hex() in path.read_text()
