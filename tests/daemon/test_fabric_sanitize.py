"""SANITIZE and WRITE ATOMIC in a running fabric: what is in flight, who is kept out, and what a crash leaves."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import trio

from tests.daemon.linkadapter import LinkAdapter, read_10, write_10
from tests.daemon.test_fabric_reservations import may
from tests.daemon.test_fabricd import TARGET, UNIT, config, fabric, started
from tests.waiting import until
from vhostfc.daemon.fabric_journal import Journal
from vhostfc.daemon.medium import Medium
from vhostfc.errors import VhostfcError
from vhostfc.fc.fcp import TmFlag
from vhostfc.native import Latch
from vhostfc.scsi.sanitize import Operation
from vhostfc.scsi.task import MediumError

BLOCKS = 2048
ERASE, IMMED = bytes([0x48, 0x02, *bytes(8)]), 0x80
GOOD, CHECK_CONDITION = 0x00, 0x02
#: An owner in the latch that is neither the fabric nor any adapter: the test itself.
SOMEBODY = 0x7FFF
A, B, C = b"a" * 512, b"b" * 512, b"c" * 512


def file_unit(tmp_path: Path) -> str:
    return f'{TARGET}[[target.unit]]\nlun = 0\nfile = "{tmp_path}/disk"\nsize = "1MiB"\n'


async def test_nothing_lands_behind_a_sanitize(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        await two.open()
        two.acks = False
        two.releases = False
        (fds,) = two.fds.values()
        done: list[int] = []

        async def sanitize() -> None:
            done.append((await one.command(ERASE)).status)

        nursery.start_soon(sanitize)
        await two.until(lambda: not may(two, 0x28))
        os.pwrite(fds[0], A, 0)  # it was under way: it has the right, until it says that it is over
        with trio.move_on_after(0.05):
            await trio.sleep_forever()
        assert not done
        two.drop_media()
        await two.acknowledge()
        await one.until(lambda: done)
        assert done == [GOOD]
        assert (await one.command(read_10(0, 1), data_in=512)).data_in == bytes(512)


async def test_an_abort_ends_the_command_and_not_the_operation(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        await one.command(write_10(7, 1), data_out=A)
        route = await two.open()
        with Latch(two.fds[route.nexus][1]) as latch:  # somebody holds a block: it goes on only later
            assert latch.take(SOMEBODY, 0, 512) is None
            nursery.start_soon(one.command, ERASE)
            await two.until(lambda: not may(two, 0x28))
            await one.manage(TmFlag.ABORT_TASK_SET)
            await two.manage(TmFlag.LOGICAL_UNIT_RESET)
            await two.command(bytes(6))  # the reset
            answer = await two.command(bytes(6))
            assert (answer.status, answer.sense[2], answer.sense[12:14]) == (CHECK_CONDITION, 0x2, b"\x04\x1b")
            latch.free(SOMEBODY, 0, 512)
        with trio.fail_after(10):
            while (await two.command(bytes(6))).status != GOOD:
                await trio.sleep(0.01)
        assert (await two.command(read_10(7, 1), data_in=512)).data_in == bytes(512)


async def test_immed_is_answered_at_once(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        route = await one.open()
        with Latch(one.fds[route.nexus][1]) as latch:
            assert latch.take(SOMEBODY, 0, 512) is None
            cdb = bytes([0x48, IMMED | 0x02, *bytes(8)])
            assert (await one.command(cdb)).status == GOOD
            assert (await one.command(read_10(0, 1), data_in=512)).sense[12:14] == b"\x04\x1b"
            sense = (await one.command(bytes([0x03, 0, 0, 0, 18, 0]), data_in=18)).data_in
            assert (sense[2], sense[12:14], sense[15] & 0x80) == (0x2, b"\x04\x1b", 0x80)
            latch.free(SOMEBODY, 0, 512)


async def test_a_unit_that_is_taken_away_ends_it(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        route = await one.open()
        with Latch(one.fds[route.nexus][1]) as latch:
            assert latch.take(SOMEBODY, 0, 512) is None
            assert (await one.command(bytes([0x48, IMMED | 0x02, *bytes(8)]))).status == GOOD
            with trio.fail_after(10):
                await san.reload(config(tmp_path, TARGET + UNIT.replace("lun = 0", "lun = 1")))


async def test_the_next_fabric_goes_on_with_one_that_was_cut_short(tmp_path: Path) -> None:
    text = file_unit(tmp_path)
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert (await one.command(write_10(7, 1), data_out=A)).status == GOOD
        route = await one.open()
        with Latch(one.fds[route.nexus][1]) as latch:
            assert latch.take(SOMEBODY, 0, 512) is None
            assert (await one.command(bytes([0x48, IMMED | 0x02, *bytes(8)]))).status == GOOD
    assert A in (tmp_path / "disk").read_bytes()
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        with trio.fail_after(10):
            while (await one.command(bytes(6))).status != GOOD:
                await trio.sleep(0.01)
        assert (await one.command(read_10(7, 1), data_in=512)).data_in == bytes(512)
    assert not any((tmp_path / "disk").read_bytes())
    assert not list((tmp_path / "state").rglob("*.sanitize"))


async def test_one_that_had_failed_keeps_the_unit_closed(tmp_path: Path) -> None:
    text = file_unit(tmp_path)
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        route = await one.open()
        with Latch(one.fds[route.nexus][1]) as latch:
            assert latch.take(SOMEBODY, 0, 512) is None
            assert (await one.command(bytes([0x48, IMMED | 0x02, *bytes(8)]))).status == GOOD
        (note,) = (tmp_path / "state").rglob("*.sanitize")
    note.write_bytes(Operation(unrestricted=True, failed=True).pack())
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        answer = await one.command(read_10(0, 1), data_in=512)
        assert (answer.status, answer.sense[2], answer.sense[12:14]) == (CHECK_CONDITION, 0x3, b"\x31\x03")
        assert (await one.command(bytes([0x48, 0x1F, *bytes(8)]))).status == GOOD
        assert (await one.command(read_10(0, 1), data_in=512)).status == GOOD


# ---------------------------------------------------------------- WRITE ATOMIC


def atomic(lba: int, blocks: int) -> bytes:
    return bytes([0x9C, 0, *lba.to_bytes(8, "big"), 0, 0, *blocks.to_bytes(2, "big"), 0, 0])


async def test_a_write_atomic_leaves_no_record_behind(tmp_path: Path) -> None:
    async with fabric(tmp_path, file_unit(tmp_path)) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert (await one.command(atomic(3, 2), data_out=A + B)).status == GOOD
        assert (await one.command(read_10(3, 2), data_in=1024)).data_in == A + B
        (journal,) = (tmp_path / "state").rglob("*.atomic")
        assert journal.stat().st_size == 0


async def test_one_that_fails_half_way_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fabric(tmp_path, file_unit(tmp_path)) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        await one.command(write_10(3, 2), data_out=A + A)
        whole = Medium._write
        failures = [None]

        def half(self: Medium, lba: int, data: bytes, fua: bool) -> None:
            if failures:
                failures.pop()
                whole(self, lba, data[:512], fua)
                raise MediumError(lba + 1, space=True)
            whole(self, lba, data, fua)

        monkeypatch.setattr(Medium, "_write", half)
        answer = await one.command(atomic(3, 2), data_out=B + B)
        assert (answer.status, answer.sense[2], answer.sense[12:14]) == (CHECK_CONDITION, 0x7, b"\x27\x07")
        assert (await one.command(read_10(3, 2), data_in=1024)).data_in == A + A


async def test_two_at_a_time_do_not_share_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for one: the second waits until the first is done, or a crash would tear one of them."""
    open_records, seen = set[int](), list[int]()
    write, clear = Journal.write, Journal.clear

    def begin(self: Journal, lba: int, block_size: int, data: bytes) -> None:
        open_records.add(lba)
        seen.append(len(open_records))
        time.sleep(0.05)  # in a thread
        write(self, lba, block_size, data)

    def end(self: Journal) -> None:
        clear(self)
        open_records.clear()

    monkeypatch.setattr(Journal, "write", begin)
    monkeypatch.setattr(Journal, "clear", end)
    async with fabric(tmp_path, file_unit(tmp_path)) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        done: list[int] = []

        async def send(adapter: LinkAdapter, lba: int) -> None:
            done.append((await adapter.command(atomic(lba, 1), data_out=A)).status)

        for number in range(4):
            nursery.start_soon(send, (one, two)[number % 2], 100 * number)
        await one.until(lambda: len(done) == 4)
    assert (done, seen) == ([GOOD] * 4, [1] * 4)


async def test_one_that_a_crash_cut_short_is_undone(tmp_path: Path) -> None:
    text = file_unit(tmp_path)
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        await one.command(atomic(0, 1), data_out=A)
        (path,) = (tmp_path / "state").rglob("*.atomic")
    Journal(path).write(4, 512, A + B)
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert (await one.command(read_10(4, 2), data_in=1024)).data_in == A + B
        assert path.stat().st_size == 0


async def test_a_record_that_cannot_be_cleared_undoes_nothing_that_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(_journal: Journal) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    text = file_unit(tmp_path)
    async with fabric(tmp_path, text) as (san, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        await one.command(write_10(3, 1), data_out=A)
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "clear", read_only)
            answer = await one.command(atomic(3, 1), data_out=B)
            assert (answer.status, answer.sense[2]) == (CHECK_CONDITION, 0x3)
            done: list[int] = []

            async def write() -> None:
                done.append((await one.command(write_10(3, 1), data_out=C)).status)

            nursery.start_soon(write)
            assert (await two.command(write_10(1003, 1), data_out=C)).status == GOOD
            answer = await two.command(atomic(1003, 1), data_out=B)
            assert (answer.status, answer.sense[2]) == (CHECK_CONDITION, 0x3), "there is no room for its record"
            assert not done, "its block is kept"
        await one.until(lambda: done)
        assert done == [GOOD]
        assert (await two.command(atomic(1003, 1), data_out=B)).status == GOOD
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "clear", read_only)
            assert (await one.command(atomic(7, 1), data_out=B)).status == CHECK_CONDITION
        assert (await one.command(write_10(7, 1), data_out=C)).status == GOOD
    async with fabric(tmp_path, text) as (san, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert (await one.command(read_10(3, 1), data_in=512)).data_in == C
        (served,) = san.placement.served.values()
        assert served.journal.load() is None


async def test_a_record_that_stays_until_the_end_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was not let in meanwhile was not told that it was."""

    def read_only(_journal: Journal) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    text = file_unit(tmp_path)
    with monkeypatch.context() as patch:
        async with fabric(tmp_path, text) as (_, nursery):
            (one,) = await started(nursery, tmp_path, 1)
            await one.command(write_10(3, 1), data_out=A)
            patch.setattr(Journal, "clear", read_only)
            assert (await one.command(atomic(3, 1), data_out=B)).status == CHECK_CONDITION
        async with fabric(tmp_path, text) as (san, _):
            (served,) = san.placement.served.values()
            assert not served.ready, "it cannot be told whether the record is of now or of then"
            patch.undo()
            await until(lambda: served.ready)
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert (await one.command(read_10(3, 1), data_in=512)).data_in == A


@pytest.mark.parametrize("cache", ["writeback", "none"])
async def test_a_record_of_other_blocks_is_undone_all_the_same(tmp_path: Path, cache: str) -> None:
    text = file_unit(tmp_path) + f'block_size = 4096\ncache = "{cache}"\n'
    try:
        async with fabric(tmp_path, text) as (_, nursery):
            (one,) = await started(nursery, tmp_path, 1)
            await one.command(atomic(0, 1), data_out=A * 8)
            (path,) = (tmp_path / "state").rglob("*.atomic")
    except VhostfcError as error:
        pytest.skip(str(error))
    Journal(path).write(9, 512, B)
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert path.stat().st_size == 0
        assert (await one.command(read_10(1, 1), data_in=4096)).data_in == bytes(512) + B + bytes(6 * 512)


async def test_of_two_each_has_its_record_while_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fabric(tmp_path, file_unit(tmp_path)) as (san, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        (served,) = san.placement.served.values()
        whole = Medium.write
        records: list[tuple[int, object]] = []

        async def slowly(self: Medium, lba: int, data: bytes, *, fua: bool = False) -> None:
            await until(lambda: len(san._runner._running) == 2 or records)  # the other one has begun meanwhile
            record = served.journal.load()
            records.append((lba, record and record[0]))
            await whole(self, lba, data, fua=fua)

        monkeypatch.setattr(Medium, "write", slowly)
        done: list[int] = []

        async def write(member: LinkAdapter, lba: int) -> None:
            done.append((await member.command(atomic(lba, 1), data_out=A)).status)

        nursery.start_soon(write, one, 3)
        nursery.start_soon(write, two, 1003)
        await one.until(lambda: len(done) == 2)
        assert done == [GOOD, GOOD]
        assert sorted(records) == [(3, 3), (1003, 1003)]


def test_a_record_is_found_where_half_of_a_longer_one_was(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x.atomic")
    journal.path.write_bytes(bytes(100_000))
    journal.write(7, 512, A)
    assert journal.load() == (7, 512, A)


def test_half_a_record_is_none(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x.atomic")
    assert journal.load() is None
    journal.write(7, 512, A + B)
    assert journal.load() == (7, 512, A + B)
    record = journal.path.read_bytes()
    for length in (0, 10, 32, 48, len(record) - 1):
        journal.path.write_bytes(record[:length])
        assert journal.load() is None
    journal.path.write_bytes(record[:40] + b"!" + record[41:])
    assert journal.load() is None
    journal.path.write_bytes(record)
    journal.clear()
    assert journal.load() is None
    journal.path.unlink()
    journal.clear()
    Journal(tmp_path / "none" / "x.atomic").clear()
