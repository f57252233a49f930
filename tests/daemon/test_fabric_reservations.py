"""Persistent reservations in a running fabric: in force before GOOD, whatever is in flight, and after a restart."""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from pathlib import Path

import pytest
import structlog
import trio

from tests.daemon.linkadapter import LinkAdapter, read_10, write_10, wwpn
from tests.daemon.test_fabricd import TARGET, UNIT, config, fabric, started
from vhostfc.daemon.fabricd import Fabric
from vhostfc.daemon.stable import make_directory
from vhostfc.fc.fcp import TmFlag
from vhostfc.fc.initiator import CommandResult
from vhostfc.native import Latch

REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT, IGNORE = 0, 1, 2, 3, 4, 5, 6
WE, EA, WERO = 1, 3, 5
GOOD, CHECK_CONDITION, CONFLICT, ABORTED = 0x00, 0x02, 0x18, 0x40
#: An owner in the latch that is neither the fabric nor any adapter: the test itself.
SOMEBODY = 0x7FFF


async def out(one: LinkAdapter, action: int, key: int, new: int = 0, kind: int = 0, *, aptpl: bool = False) -> int:
    """A PERSISTENT RESERVE OUT; its status."""
    data = key.to_bytes(8, "big") + new.to_bytes(8, "big") + bytes([0, 0, 0, 0, aptpl, 0, 0, 0])
    cdb = bytes([0x5F, action, kind, 0, 0, 0, 0, 0, 24, 0])
    return (await one.command(cdb, data_out=data)).status


async def keys(one: LinkAdapter) -> dict[str, int]:
    """WWPNs and keys as READ FULL STATUS tells them."""
    data = (await one.command(bytes([0x5E, 3, 0, 0, 0, 0, 0, 16, 0, 0]), data_in=4096)).data_in
    result = {}
    for at in range(8, len(data), 48):
        result[data[at + 32 : at + 40].hex(":")] = int.from_bytes(data[at : at + 8], "big")
    return result


async def members(nursery: trio.Nursery, tmp_path: Path) -> tuple[LinkAdapter, LinkAdapter]:
    """Two adapters, registered with keys 1 and 2; the first one holds the reservation (write exclusive,
    registrants only)."""
    one, two = await started(nursery, tmp_path, 1, 2)
    assert await out(one, REGISTER, 0, 1) == GOOD
    assert await out(two, REGISTER, 0, 2) == GOOD
    assert await out(one, RESERVE, 1, kind=WERO) == GOOD
    return one, two


def may(one: LinkAdapter, opcode: int) -> bool:
    (route,) = one.routes.values()
    return bool(route.mask[opcode // 8] >> opcode % 8 & 1)


async def test_each_adapter_is_an_initiator_of_its_own(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        one, two = await members(nursery, tmp_path)
        (three,) = await started(nursery, tmp_path, 3)
        assert await keys(three) == {str(wwpn(1)): 1, str(wwpn(2)): 2}
        assert (await two.command(write_10(0, 1), data_out=bytes(512))).status == GOOD
        assert (await three.command(write_10(0, 1), data_out=bytes(512))).status == CONFLICT
        assert (await three.command(read_10(0, 1), data_in=512)).status == GOOD
        assert await out(one, CLEAR, 1) == GOOD
        assert (await three.command(write_10(0, 1), data_out=bytes(512))).status == GOOD
        assert (await two.command(bytes(6))).sense[12:14] == bytes.fromhex("2a03")


async def test_good_waits_until_the_adapters_obey(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        one, two = await members(nursery, tmp_path)
        await two.open()
        assert may(two, 0x2A)
        two.acks = False
        done: list[int] = []

        async def preempt() -> None:
            done.append(await out(one, PREEMPT, 1, 2, WERO))

        nursery.start_soon(preempt)
        await two.until(lambda: not may(two, 0x2A))
        await one.command(bytes([0x12, 0, 0, 0, 36, 0]), data_in=36, lun=9)  # the fabric does other things meanwhile
        assert not done
        await two.acknowledge()
        await one.until(lambda: done)
        assert done == [GOOD]
        two.acks = True
        assert (await two.command(bytes(6))).sense[12:14] == bytes.fromhex("2a05")
        await two.until(lambda: may(two, 0x28))
        assert not may(two, 0x2A)
        assert not may(two, 0x35)


@pytest.mark.parametrize("action", [PREEMPT, PREEMPT_AND_ABORT])
@pytest.mark.parametrize("unit", [UNIT, '[[target.unit]]\nlun = 0\nfile = "disk"\nsize = "1MiB"\n'])
async def test_a_frame_that_waits_for_its_block_does_not_land_after_a_preempt(
    tmp_path: Path, action: int, unit: str
) -> None:
    async with fabric(tmp_path, TARGET + unit) as (san, nursery):
        one, two = await members(nursery, tmp_path)
        (served,) = san.placement.served.values()
        done: list[CommandResult] = []

        async def write() -> None:
            done.append(await two.command(write_10(8, 1), data_out=b"\xee" * 512))

        with Latch(served.medium.latch_fd) as latch:
            assert latch.take(SOMEBODY, 8 * 512, 512) is None
            nursery.start_soon(write)
            await one.until(lambda: _running(san) == 1)
            assert await out(one, action, 1, 2, WERO) == GOOD
            if action == PREEMPT_AND_ABORT:
                await two.until(lambda: done)
                assert done[0].status == ABORTED
            latch.recover(SOMEBODY)
        await two.until(lambda: done)
        assert done[0].status in {ABORTED, CHECK_CONDITION}
        assert (await one.command(read_10(8, 1), data_in=512)).data_in == bytes(512)


def _running(san: Fabric) -> int:
    return len(san._runner._running)


async def test_a_logout_ends_reserve_6_and_not_a_registration(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        assert (await one.command(bytes([0x16, 0, 0, 0, 0, 0]))).status == GOOD
        assert (await two.command(bytes(6))).status == CONFLICT
        one.close()
        with trio.fail_after(10):
            while (await two.command(bytes(6))).status == CONFLICT:
                await trio.sleep(0.01)
        assert await out(two, REGISTER, 0, 2) == GOOD
        await two.manage(TmFlag.LOGICAL_UNIT_RESET)
        await two.command(bytes(6))
        assert await keys(two) == {str(wwpn(2)): 2}


async def test_aptpl_outlives_the_fabric(tmp_path: Path) -> None:
    unit = '[[target.unit]]\nlun = 0\nfile = "disk"\nsize = "1MiB"\n'
    async with fabric(tmp_path, TARGET + unit) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        assert await out(two, REGISTER, 0, 2) == GOOD
        assert await out(one, REGISTER, 0, 1, aptpl=True) == GOOD
        assert await out(one, RESERVE, 1, kind=EA) == GOOD
    # The target has another number now: another one comes before it.
    more = TARGET.replace(':01"', ':02"').replace("array-a", "array-b")
    zone = f'[[zone]]\nname = "z"\nmembers = ["50:06:01:60:00:00:00:01", "{wwpn(1)}", "{wwpn(2)}"]\n'
    async with fabric(tmp_path, more + TARGET + unit + zone) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        assert await keys(one) == {str(wwpn(1)): 1, str(wwpn(2)): 2}
        assert (await one.command(read_10(0, 1), data_in=512)).status == GOOD
        assert (await two.command(read_10(0, 1), data_in=512)).status == CONFLICT
        assert await out(one, IGNORE, 0, 1) == GOOD, "APTPL off"
        assert not list((tmp_path / "state/reservations").iterdir())


async def test_without_aptpl_nothing_is_left(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        await members(nursery, tmp_path)
    assert not (tmp_path / "state").exists()


async def test_a_record_that_cannot_be_understood_stops_the_start(tmp_path: Path) -> None:
    unit = '[[target.unit]]\nlun = 0\nfile = "disk"\nsize = "1MiB"\n'
    async with fabric(tmp_path, TARGET + unit) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert await out(one, REGISTER, 0, 1, aptpl=True) == GOOD
    (path,) = (tmp_path / "state/reservations").iterdir()
    path.write_bytes(path.read_bytes()[:40])

    with pytest.raises(ExceptionGroup) as caught:
        await Fabric(config(tmp_path, TARGET + unit), log=structlog.get_logger()).serve()
    assert re.match(f"{path}: .*cannot be understood.*remove the file", str(caught.value.exceptions[0]))


async def test_a_state_directory_that_cannot_be_written_is_told_to_the_initiator(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        (tmp_path / "state").write_text("not a directory")
        assert await out(one, REGISTER, 0, 1, aptpl=True) == CHECK_CONDITION
        assert await keys(one) == {}
        assert await out(one, REGISTER, 0, 1) == GOOD


async def test_status_shows_them(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        await members(nursery, tmp_path)
        assert san.status()["targets"][0]["units"][0]["reservations"] == {
            "type": "write exclusive registrants only",
            "aptpl": False,
            "registrations": [
                {"wwpn": str(wwpn(1)), "key": "0x1", "holder": True},
                {"wwpn": str(wwpn(2)), "key": "0x2", "holder": False},
            ],
            "reserved_by": None,
        }


# ---------------------------------------------------------------- a command of many steps, and others' commands between

BIG = '[[target.unit]]\nlun = 0\nsize = "16MiB"\n'
#: Blocks that are moved up by one: pieces of 1 MiB, each of which overlaps the next.
SHIFTED = 10_000


def shift_by_one(naa: bytes) -> tuple[bytes, bytes]:
    """EXTENDED COPY of blocks 0 to SHIFTED onto 1 and the following: CDB and parameter list."""
    cscd = bytes([0xE4, 0, 0, 0, 1, 3, 0, 16]) + naa.ljust(21, b"\0") + (512).to_bytes(3, "big")
    segment = struct.pack("!BBHHHHHQQ", 2, 0, 0x18, 0, 0, 0, SHIFTED, 0, 1)
    data = bytes([1, 0]) + struct.pack("!HIII", len(cscd), 0, len(segment), 0) + cscd + segment
    return bytes([0x83, *bytes(9), *len(data).to_bytes(4, "big"), 0, 0]), data


def numbered(first: int, blocks: int) -> bytes:
    return b"".join(i.to_bytes(4, "big") * 128 for i in range(first, first + blocks))


class Copy:
    """A copy of member `one` under way; a block in its way is held, so that it stops after its first pieces."""

    def __init__(self, san: Fabric, one: LinkAdapter, nursery: trio.Nursery) -> None:
        (self.served,) = san.placement.served.values()
        self.ended: list[CommandResult] = []
        self._one = one
        self._nursery = nursery

    async def begin(self, held: int) -> None:
        os.pwrite(self.served.medium.fd, numbered(0, SHIFTED + 1), 0)
        assert self.served.medium.latch is not None
        assert self.served.medium.latch.take(SOMEBODY, held * 512, 512) is None
        self._nursery.start_soon(self._run)
        with trio.fail_after(10):
            while os.pread(self.served.medium.fd, 4, SHIFTED * 512) == numbered(SHIFTED, 1)[:4]:
                await trio.sleep(0.001)

    async def _run(self) -> None:
        cdb, data = shift_by_one(self.served.unit.identity.naa[0])
        self.ended.append(await self._one.command(cdb, data_out=data))

    async def end(self) -> CommandResult:
        assert self.served.medium.latch is not None
        self.served.medium.latch.recover(SOMEBODY)
        await self._one.until(lambda: self.ended)
        return self.ended[0]

    def medium(self) -> bytes:
        return os.pread(self.served.medium.fd, (SHIFTED + 1) * 512, 0)


async def test_a_copy_is_not_done_twice_because_others_send_commands(tmp_path: Path) -> None:
    async with fabric(tmp_path, TARGET + BIG) as (san, nursery):
        one, two = await members(nursery, tmp_path)
        (three,) = await started(nursery, tmp_path, 3)
        copy = Copy(san, one, nursery)
        await copy.begin(held=4000)
        epoch = copy.served.epoch
        assert await out(three, RESERVE, 99, kind=WE) == CONFLICT
        assert await out(two, RESERVE, 2, kind=WE) == CONFLICT
        assert copy.served.epoch == epoch, "nothing has changed"
        assert await out(three, REGISTER, 0, 3) == GOOD
        assert copy.served.epoch > epoch
        assert (await copy.end()).status == GOOD
        assert copy.medium() == numbered(0, 1) + numbered(0, SHIFTED)


async def test_a_copy_goes_on_under_a_unit_attention_that_came_later(tmp_path: Path) -> None:
    async with fabric(tmp_path, TARGET + BIG) as (san, nursery):
        one, two = await members(nursery, tmp_path)
        copy = Copy(san, one, nursery)
        await copy.begin(held=4000)
        assert await out(two, CLEAR, 2) == GOOD
        assert (await copy.end()).status == GOOD
        assert copy.medium() == numbered(0, 1) + numbered(0, SHIFTED)
        assert (await one.command(bytes(6))).sense[12:14] == bytes.fromhex("2a03")


async def test_a_copy_that_has_lost_its_right_ends_where_it_is(tmp_path: Path) -> None:
    async with fabric(tmp_path, TARGET + BIG) as (san, nursery):
        one, two = await members(nursery, tmp_path)
        copy = Copy(san, one, nursery)
        await copy.begin(held=4000)
        assert await out(two, PREEMPT, 2, 1, WERO) == GOOD
        before = copy.medium()
        assert (await copy.end()).status == CONFLICT
        assert copy.medium() == before


# ---------------------------------------------------------------- what cannot be kept

DISK = '[[target.unit]]\nlun = 0\nfile = "{}/disk"\nsize = "1MiB"\n'


class Directories:
    """fsync of directories fails; of the files in them it does not.  synced: of which it did not fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail = False
        self.synced: list[str] = []
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            if self.fail:
                raise OSError(errno.EIO, "Input/output error")
            self.synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        self._fsync(fd)


async def test_what_was_refused_is_not_in_force_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TARGET + DISK.format(tmp_path)
    directories = Directories(monkeypatch)
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        directories.fail = True
        assert await out(one, REGISTER, 0, 7, aptpl=True) == CHECK_CONDITION
        directories.fail = False
        assert await keys(one) == {}
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert await keys(one) == {}
        assert await out(one, REGISTER, 0, 1, aptpl=True) == GOOD
        directories.fail = True
        assert await out(one, CLEAR, 1) == CHECK_CONDITION
        directories.fail = False
        assert await keys(one) == {str(wwpn(1)): 1}
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert await keys(one) == {str(wwpn(1)): 1}


async def test_what_may_not_be_kept_is_written_again_by_the_next_that_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TARGET + DISK.format(tmp_path)
    directories = Directories(monkeypatch)
    async with fabric(tmp_path, text) as (san, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert await out(one, REGISTER, 0, 1, aptpl=True) == GOOD
        directories.fail = True
        assert await out(one, RESERVE, 1, kind=WE) == CHECK_CONDITION
        (served,) = san.placement.served.values()
        assert served.unit.reservations.in_doubt
        assert await out(one, IGNORE, 0, 1, aptpl=True) == CHECK_CONDITION, "GOOD would say that it is kept"
        (path,) = (tmp_path / "state").rglob("*.json")
        path.write_bytes(b"what else may be there")
        directories.fail = False
        assert await out(one, IGNORE, 0, 1, aptpl=True) == GOOD
        assert not served.unit.reservations.in_doubt
    async with fabric(tmp_path, text) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert await keys(one) == {str(wwpn(1)): 1}


def test_a_directory_that_is_made_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directories = Directories(monkeypatch)
    make_directory(tmp_path / "a" / "b" / "c")
    assert directories.synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    make_directory(tmp_path / "a" / "b")
    assert len(directories.synced) == 3
    directories.fail = True
    with pytest.raises(OSError, match="error"):
        make_directory(tmp_path / "d")
    assert not (tmp_path / "d").exists(), "or the next one would take it for one that stays"
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="File exists"):
        make_directory(tmp_path / "file" / "x")
