"""Fencing: adapters that keep their word, that do not answer, that are stopped, killed, or cheat.

The adapters that misbehave are processes of their own: they are to be killed.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.daemon.linkadapter import LinkAdapter, attach, read_10, write_10, wwpn
from tests.daemon.test_fabric_reservations import EA, REGISTER, RELEASE, RESERVE, WE, may, out
from tests.daemon.test_fabricd import TARGET, UNIT, config, fabric, join, started
from tests.waiting import until
from vhostfc.config import FabricConfig
from vhostfc.daemon import fabric_latch, fabric_locks
from vhostfc.daemon.fabricd import Fabric
from vhostfc.daemon.fencing import Verdict
from vhostfc.daemon.medium import Medium
from vhostfc.fabric import link
from vhostfc.fabric.link import InFlight, MediumKind, Route
from vhostfc.fc.fcp import TmFlag
from vhostfc.fc.initiator import End
from vhostfc.native import LATCH_STRIPE, LATCH_WORDS

ROOT = Path(__file__).resolve().parents[2]
MASKED = UNIT + f'allow = ["{wwpn(2)}"]\n'


class Process:
    """tests.daemon.linkadapter as a process, ready with a path open."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    async def tell(self, *words: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        await self.process.stdin.send_all(",".join(str(word) for word in words).encode() + b"\n")
        with trio.fail_after(10):
            while b"\n" not in self._buffer:
                chunk = await self.process.stdout.receive_some()
                assert chunk, "the adapter ended"
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        self.process.kill()

    async def died(self) -> int:
        with trio.fail_after(10):
            return await self.process.wait()


@asynccontextmanager
async def process(tmp_path: Path, number: int = 1, *, lun: int = 0) -> AsyncIterator[Process]:
    command = [sys.executable, "-m", "tests.daemon.linkadapter", str(tmp_path / "f.sock"), str(number)]
    async with trio.open_nursery() as nursery:
        child: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                check=False,
                deliver_cancel=_kill,
            )
        )
        adapter = Process(child)
        await adapter.tell("ready")
        assert (await adapter.tell("open", lun))["medium"] == MediumKind.MEMORY
        yield adapter
        child.kill()
        nursery.cancel_scope.cancel()


async def _kill(child: trio.Process) -> None:
    child.kill()


def masked(tmp_path: Path, text: str = TARGET + MASKED) -> FabricConfig:
    """The configuration in which initiator 1 has lost the unit."""
    return config(tmp_path, text)


# ---------------------------------------------------------------- adapters that keep their word


async def test_a_narrower_route_is_waited_for_and_a_wider_one_is_not(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one, two = await join(nursery, tmp_path, 1), await join(nursery, tmp_path, 2)
        route = await one.open()
        await two.command(bytes(6))
        one.acks = False
        done = trio.Event()

        async def select() -> None:
            # MODE SELECT of another nexus: a unit attention for ours, so our mask closes.
            page = (await two.command(bytes([0x1A, 0x08, 0x0A, 0, 255, 0]), data_in=255)).data_in[4:]
            page = page[:2] + bytes([page[2] ^ 0x04]) + page[3:]
            result = await two.command(bytes([0x15, 0x10, 0, 0, 16, 0]), data_out=bytes(4) + page)
            assert result.status == 0, result.sense.hex()
            done.set()

        nursery.start_soon(select)
        await one.until(lambda: not any(one.routes[route.nexus].mask))
        await two.manage(TmFlag.QUERY_TASK_SET)
        assert not done.is_set(), "GOOD before the narrower route is in force"
        await one.acknowledge()
        with trio.fail_after(5):
            await done.wait()
        assert (await one.command(bytes(6))).status == 2
        await one.until(lambda: any(one.routes[route.nexus].mask))
        assert (await two.command(bytes(6))).status == 0, "the wider one has no acknowledgement yet"
        assert san.status()["targets"][0]["units"][0]["open"][0]["fast"]


async def test_a_reset_ends_what_the_adapter_has_under_way(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        one, two = await join(nursery, tmp_path, 1), await join(nursery, tmp_path, 2)
        route = await one.open()
        assert await two.manage(TmFlag.LOGICAL_UNIT_RESET) == 0
        assert [r.in_flight for r in one.seen if isinstance(r, Route) and r.nexus == route.nexus][-2:] == [
            InFlight.RESET,
            InFlight.FINISH,
        ]
        assert not any(one.routes[route.nexus].mask), "a unit attention tells of the reset"


async def test_every_route_brings_descriptions_of_its_own_and_ends_the_ones_before(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one, two = await join(nursery, tmp_path, 1), await join(nursery, tmp_path, 2)
        route = await one.open()
        medium = _medium(san)
        first = fabric_locks.held(medium.fd, 1)
        assert first is not None
        assert await two.manage(TmFlag.CLEAR_TASK_SET) == 0
        assert await one.manage(TmFlag.QUERY_TASK_SET) == 0
        assert (await one.command(bytes(6))).status == 0, "who is told with TASK ABORTED is not told again"
        await one.until(lambda: any(one.routes[route.nexus].mask))
        second = fabric_locks.held(medium.fd, 1)
        assert second is not None
        assert second > first


async def test_a_masked_unit_ends_the_path(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        route = await one.open()
        with trio.fail_after(5):
            await san.reload(masked(tmp_path))
        assert one.routes[route.nexus].gone
        assert _medium(san).latch is not None
        assert fabric_locks.held(_medium(san).fd, 1) is None
        result = await one.command(read_10(0, 1), data_in=512)
        assert result.sense[12:14] == b"\x25\x00"
        assert (await one.open(ready=False)).gone


async def test_closing_a_path_is_enough(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        route = await one.open()
        one.drop_media()
        await one.send(link.Close(route.nexus))
        await until(lambda: not san.status()["targets"][0]["units"][0]["open"])


# ---------------------------------------------------------------- adapters that do not


async def test_an_adapter_that_does_not_acknowledge_is_killed(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, _), process(tmp_path) as adapter:
        await adapter.tell("mute")
        await _reload_in_time(san, tmp_path, adapter)
        assert await adapter.died() == -signal.SIGKILL


async def test_an_adapter_that_is_stopped_is_killed(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, _), process(tmp_path) as adapter:
        adapter.stop()
        await _reload_in_time(san, tmp_path, adapter)
        assert await adapter.died() == -signal.SIGKILL


async def test_an_acknowledgement_that_is_not_true_is_not_taken_for_one(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, _), process(tmp_path) as adapter:
        await adapter.tell("hoard")  # acknowledges, and keeps the descriptors
        await _reload_in_time(san, tmp_path, adapter)
        assert await adapter.died() == -signal.SIGKILL


async def test_a_link_that_is_closed_is_not_a_medium_that_is_closed(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, _), process(tmp_path) as adapter:
        await adapter.tell("hang up")
        await until(lambda: not san.status()["logins"])
        (opening,) = san.status()["targets"][0]["units"][0]["open"]
        assert opening["state"] == "link lost"
        await _reload_in_time(san, tmp_path, adapter)
        assert await adapter.died() == -signal.SIGKILL


async def test_an_adapter_that_lost_its_link_and_lets_go_lives_on(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, _), process(tmp_path) as adapter:
        await adapter.tell("hang up")
        await adapter.tell("drop")
        await until(lambda: not san.status()["targets"][0]["units"][0]["open"])
        assert adapter.process.poll() is None


async def test_a_killed_adapter_s_blocks_are_freed(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery), process(tmp_path) as adapter:
        assert await adapter.tell("latch", 5 * LATCH_STRIPE) is None
        (two,) = await started(nursery, tmp_path, 2)
        done = trio.Event()

        async def write() -> None:
            lba = 5 * LATCH_STRIPE // 512
            assert (await two.command(write_10(lba, 1), data_out=bytes(512))).status == 0
            done.set()

        nursery.start_soon(write)
        assert (await two.command(read_10(0, 1), data_in=512)).status == 0, "others' blocks are free"
        assert not done.is_set()
        adapter.kill()
        with trio.fail_after(5):
            await done.wait()
        assert san.status()["targets"][0]["units"][0]["open"] == []


async def test_what_a_killed_adapter_was_writing_is_finished_before_anybody_reads_it(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery), process(tmp_path) as adapter:
        (two,) = await started(nursery, tmp_path, 2)
        owner, medium = _openings(san)[0].owner, _medium(san)
        assert await adapter.tell("latch", 0) is None
        # What native/latch.h leaves behind between half of a block and all of it.
        os.pwrite(medium.latch_fd, struct.pack("=QQ", owner << 32 | 1, 0 << 8 | 1), 4 * LATCH_WORDS)
        os.pwrite(medium.latch_fd, b"N" * 512, 4 * LATCH_WORDS + 512 * 64)
        os.pwrite(medium.fd, b"N" * 100, 0)
        adapter.kill()
        assert (await two.command(read_10(0, 1), data_in=512)).data_in == b"N" * 512


async def test_an_owner_that_is_stuck_is_asked_and_then_killed(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery), process(tmp_path) as adapter:
        owner = _openings(san)[0].owner
        assert await adapter.tell("latch", 0) is None
        two = await join(nursery, tmp_path, 2)
        route = await two.open()
        await two.send(link.LatchStuck(route.nexus, owner))
        with trio.fail_after(10):
            while not await adapter.tell("pings"):
                await trio.sleep(0.01)
        await until(lambda: not _openings(san)[0].asked)  # it has answered, and is alive
        adapter.stop()
        await two.send(link.LatchStuck(route.nexus, owner))
        assert await adapter.died() == -signal.SIGKILL
        assert (await two.command(read_10(0, 1), data_in=512)).status == 0


@pytest.mark.parametrize("who", ["itself", "another"])
async def test_an_adapter_whose_disk_is_slow_lives_on(tmp_path: Path, who: str) -> None:
    """Its I/O takes longer than fence_timeout, so no route drains; but nobody has asked it to let go of anything."""
    async with fabric(tmp_path) as (san, nursery), process(tmp_path) as adapter:
        owner, handle = _openings(san)[0].owner, _openings(san)[0].handle
        assert await adapter.tell("latch", 0) is None
        await adapter.tell("mute")
        two = await join(nursery, tmp_path, 2)
        if who == "itself":  # a command of its own waits as well
            await adapter.tell("stuck", handle, owner)
        else:
            await two.send(link.LatchStuck((await two.open()).nexus, owner))
        with trio.move_on_after(3 * 0.3):
            await adapter.process.wait()
        assert adapter.process.poll() is None


async def test_a_name_that_returns_waits_until_its_former_life_is_over(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery), process(tmp_path) as adapter:
        await adapter.tell("hang up")
        await until(lambda: not san.status()["logins"])
        again = await attach(nursery, tmp_path / "f.sock", 1)
        assert not san.status()["logins"]
        await again.ready()
        assert await adapter.died() == -signal.SIGKILL, "it had kept the medium"


async def test_a_medium_that_cannot_be_given_anew_is_taken_away_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fabric(tmp_path) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        assert await out(one, REGISTER, 0, 1) == 0
        assert await out(one, RESERVE, 1, kind=WE) == 0
        await two.open()
        assert may(two, 0x28)
        assert not may(two, 0x2A)
        two.acks = two.releases = False  # from here on it does not answer
        routes = len(two.seen)

        def reopen(_: Medium) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(Medium, "reopen", reopen)
        done: list[int] = []

        async def reserve() -> None:
            done.append(await out(one, RELEASE, 1, kind=WE))  # the other one may write, but no descriptor is left
            done.append(await out(one, RESERVE, 1, kind=EA))

        nursery.start_soon(reserve)
        await two.until(lambda: not may(two, 0x28))
        with trio.move_on_after(0.2):
            await one.until(lambda: done)
        assert not done, "GOOD while the adapter can still read"
        assert [type(one) for one in two.seen[routes:]].count(Route) == 1, "nothing else to say than that once"
        two.drop_media()
        await two.acknowledge()
        await one.until(lambda: len(done) == 2)
        assert done == [0, 0]


# ---------------------------------------------------------------- commands that come as frames


async def test_a_write_that_waited_while_its_right_was_taken_away_does_not_land(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        medium = _medium(san)
        assert medium.latch is not None
        medium.latch.take(77, 0, 512)
        results = []

        async def write() -> None:
            results.append(await one.command(write_10(0, 1), data_out=b"\xff" * 512))

        nursery.start_soon(write)
        await until(lambda: _waiting(san) == 1)
        await san.reload(masked(tmp_path))
        medium.latch.recover(77)
        await until(lambda: results)
        assert results[0].sense[12:14] == b"\x25\x00"
        assert os.pread(medium.fd, 512, 0) == bytes(512)


async def test_commands_of_others_end_with_task_aborted_and_the_blocks_are_free(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        medium = _medium(san)
        assert medium.latch is not None
        medium.latch.take(77, 0, 512)
        results = {}

        async def write(adapter: LinkAdapter) -> None:
            results[adapter.name] = await adapter.command(write_10(0, 1), data_out=b"\xff" * 512)

        nursery.start_soon(write, one)
        nursery.start_soon(write, two)
        await until(lambda: _waiting(san) == 2)
        assert await two.manage(TmFlag.CLEAR_TASK_SET) == 0
        await until(lambda: len(results) == 2)
        assert results["vm1"].status == 0x40
        assert results["vm2"].end is End.ABORTED
        assert medium.latch.recover(fabric_latch.OWNER) == 0
        assert os.pread(medium.fd, 512, 0) == bytes(512)


# ---------------------------------------------------------------- after a restart


async def test_a_restarted_fabric_waits_for_holders_of_the_former_one(tmp_path: Path) -> None:
    text = (
        TARGET
        + f'\n[[target.unit]]\nlun = 0\nfile = "{tmp_path}/disk.img"\nsize = "1MiB"\n'
        + UNIT.replace("0", "1", 1)
    )
    (tmp_path / "disk.img").write_bytes(b"")
    holder = os.open(tmp_path / "disk.img", os.O_RDWR)
    fabric_locks.take(holder, 9)
    try:
        async with fabric(tmp_path, text) as (san, nursery):
            one = await join(nursery, tmp_path, 1)
            assert not san.status()["targets"][0]["units"][0]["ready"]
            report = bytes([0xA0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0])
            assert (await one.command(report, data_in=256)).data_in[8:] == bytes([0, 1, *bytes(6)])
            os.close(holder)
            holder = -1
            await until(lambda: san.status()["targets"][0]["units"][0]["ready"])
            assert len((await one.command(report, data_in=256)).data_in) == 24
    finally:
        if holder >= 0:
            os.close(holder)


async def test_two_fabrics_do_not_serve_one_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    text = TARGET + f'\n[[target.unit]]\nlun = 0\nfile = "{tmp_path}/disk.img"\nsize = "1MiB"\n'
    async with fabric(tmp_path / "a", text) as (first, _), fabric(tmp_path / "b", text) as (second, _):
        assert first.status()["targets"][0]["units"][0]["ready"]
        assert not second.status()["targets"][0]["units"][0]["ready"]


# ---------------------------------------------------------------- small parts


def test_who_has_a_file_locked_is_found_in_proc(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    code = (
        f"import os, sys; from vhostfc.daemon import fabric_locks; fd = os.open({str(path)!r}, os.O_RDWR);"
        "fabric_locks.take(fd, 3); print('locked', flush=True); sys.stdin.read()"
    )
    with (
        path.open("r+b") as file,
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child,
    ):
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        assert fabric_locks.held(file.fileno()) == 3
        (who,) = fabric_locks.holders(file.fileno())
        assert who.startswith(f"{child.pid} (")
        child.stdin.close()
        child.wait()
        assert fabric_locks.held(file.fileno()) is None
        assert fabric_locks.holders(file.fileno()) == []


def test_what_narrows() -> None:
    some, more = bytes([1, *bytes(31)]), bytes([3, *bytes(31)])
    assert Verdict(some).narrows(Verdict(more))
    assert not Verdict(more).narrows(Verdict(some))
    assert Verdict(more, read_only=True).narrows(Verdict(more))
    assert Verdict(more, gone=True).narrows(Verdict(more))
    assert Verdict(more, blocks=1).narrows(Verdict(more, blocks=2))
    assert not Verdict(more, blocks=2).narrows(Verdict(more, blocks=1))


# ---------------------------------------------------------------- helpers


def _medium(san: Fabric) -> Medium:
    (served,) = san.placement.served.values()
    return served.medium


def _openings(san: Fabric) -> list[Any]:
    (served,) = san.placement.served.values()
    return list(served.fence.openings.values())


def _waiting(san: Fabric) -> int:
    """Commands that have got as far as the medium, and wait for its latch."""
    return sum(bool(running.mask) for running in san._runner._running.values())


async def _reload_in_time(san: Fabric, tmp_path: Path, adapter: Process) -> None:
    """Withdraw the unit from initiator 1: not before its process is dead and has let go, and soon."""
    medium = _medium(san)
    began = trio.current_time()
    await san.reload(masked(tmp_path))
    assert fabric_locks.held(medium.fd, 1) is None
    assert trio.current_time() - began < 0.3 + 2.0
    assert await adapter.died() < 0
