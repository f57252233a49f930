"""One virtual adapter between a fabric that obeys the seam and a driver: order, endings, and who is told what."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
import trio.testing

from tests.waiting import until
from vhostfc.config import AdapterConfig, PortConfig
from vhostfc.daemon.fdsocket import Listener, listen
from vhostfc.daemon.hba import Adapter, run_adapter
from vhostfc.errors import VhostfcError, plain
from vhostfc.fc.wwn import Wwn
from vhostfc.frontend.driver import Response as Answer
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.native import LATCH_BYTES, Medium, MediumKind
from vhostfc.ports.base import (
    Outcome,
    PortEvent,
    PortEventKind,
    PortIdentity,
    PortState,
    RemotePort,
    RemotePortState,
    Route,
    RouteChange,
    ScsiResult,
    TaskManagement,
    TaskManagementResponse,
    Topology,
    Unit,
)
from vhostfc.ports.sg import Credits, SgMedium
from vhostfc.virtio.scsi import Response, TmfSubtype

ME = PortIdentity(Wwn(0x5001438012345678), Wwn(0x5001438012345679))
ARRAY = Wwn(0x5006016000000001)
BLOCKS = 2048
INQUIRY = bytes([0x12, 0, 0, 0, 36, 0])
READ = bytes([0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0])
#: READ(10) and WRITE(10).
FAST = bytes(5) + bytes([0b101]) + bytes(26)


def lun(number: int) -> bytes:
    return bytes([0, number, 0, 0, 0, 0, 0, 0])


def medium() -> Medium:
    fds = [os.memfd_create("medium"), os.memfd_create("latch")]
    os.ftruncate(fds[0], BLOCKS * 512)
    os.ftruncate(fds[1], LATCH_BYTES)
    made = Medium(MediumKind.MEMORY, blocks=BLOCKS, block_size=512, owner=2, fd=fds[0], latch_fd=fds[1])
    for fd in fds:
        os.close(fd)
    return made


class FakePath:
    """A path whose one route stays until it is given up."""

    def __init__(self, unit: Unit, said: list[str], medium: Medium) -> None:
        self.unit = unit
        self._said = said
        self._medium = medium

    async def changes(self) -> AsyncIterator[RouteChange]:
        yield RouteChange(
            Route(FAST, self._medium), acknowledge=lambda: self._said.append(f"routed {self.unit.lun[1]}")
        )
        await trio.sleep_forever()

    async def aclose(self) -> None:
        self._said.append(f"path closed {self.unit.lun[1]}")
        await trio.lowlevel.checkpoint()


@dataclass(eq=False)
class _Task:
    unit: Unit
    tag: int
    result: ScsiResult | None = None
    done: trio.Event = field(default_factory=trio.Event)

    def end(self, result: ScsiResult) -> None:
        self.result = result
        self.done.set()


class FakeFabric:
    """The fabric and the port on it.  said: what happened, in order.

    medium: makes what a route leads to.  hold: commands are not answered.  gate: what rescan() and open_path() wait
    for.
    """

    def __init__(self) -> None:
        self.identity = ME
        self.medium: Callable[[], Medium] = medium
        self.remotes: dict[Wwn, dict[int, bytes]] = {ARRAY: {0: b"disk"}}
        self.said: list[str] = []
        self.hold = False
        self.tasks: list[_Task] = []
        self.seen: list[Unit] = []
        self.gate = trio.Event()
        self.gate.set()
        self.waiting = 0
        self.managed: list[tuple[TaskManagement, int | None]] = []
        self.response = TaskManagementResponse.FUNCTION_COMPLETE
        self._send, self._receive = trio.open_memory_channel[PortEvent](1000)

    @asynccontextmanager
    async def login(self, identity: PortIdentity) -> AsyncIterator[Any]:
        await trio.lowlevel.checkpoint()
        self.said.append("login")
        try:
            yield self
        finally:
            self.said.append("logout")

    def snapshot(self) -> Topology:
        remotes = tuple(
            RemotePort(wwpn, wwpn, 0x010200, RemotePortState.ONLINE, tuple(Unit(wwpn, lun(n), d) for n, d in u.items()))
            for wwpn, u in self.remotes.items()
        )
        return Topology(PortState.ONLINE, 0x010100, ARRAY, remotes)

    def pending(self) -> int:
        """Events that nobody has taken."""
        return self._receive.statistics().current_buffer_used

    def changed(self) -> None:
        self._send.send_nowait(PortEvent(PortEventKind.TOPOLOGY))

    async def events(self) -> AsyncIterator[PortEvent]:
        async for event in self._receive.clone():
            yield event

    async def _pass(self) -> None:
        await trio.lowlevel.checkpoint()
        self.waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.waiting -= 1

    async def rescan(self) -> None:
        await self._pass()

    async def execute(
        self, unit: Unit, cdb: bytes, *, data_out: bytes = b"", data_in: int = 0, attribute: int = 0, tag: int = 0
    ) -> ScsiResult:
        self.seen.append(unit)
        there = self.remotes.get(unit.wwpn, {})
        if unit.lun[1] in there and not unit.is_disk(there[unit.lun[1]]):
            return ScsiResult(Outcome.NO_TARGET)
        if self.hold:
            task = _Task(unit, tag)
            self.tasks.append(task)
            try:
                await task.done.wait()
            finally:
                self.tasks.remove(task)
            assert task.result is not None
            return task.result
        await trio.lowlevel.checkpoint()
        data = {0x12: bytes([0, 0, 6, 2, 31]) + bytes(31), 0xA0: struct.pack(">I4x8x", 8)}.get(cdb[0], b"")[:data_in]
        return ScsiResult(Outcome.COMPLETE, data_in=data, residual=data_in + len(data_out) - len(data))

    async def manage(self, unit: Unit, function: TaskManagement, tag: int | None = None) -> TaskManagementResponse:
        await trio.lowlevel.checkpoint()
        self.managed.append((function, tag))
        if self.response is TaskManagementResponse.FUNCTION_COMPLETE:
            for task in [t for t in self.tasks if t.unit == unit and tag in (None, t.tag)]:
                task.end(ScsiResult(Outcome.ABORTED))
            while any(t.unit == unit and tag in (None, t.tag) for t in self.tasks):
                await trio.lowlevel.checkpoint()
        return self.response

    def latch_stuck(self, owner: int) -> None: ...

    async def open_path(self, unit: Unit) -> FakePath | None:
        await self._pass()
        return FakePath(unit, self.said, self.medium())


@dataclass
class Lab:
    fabric: FakeFabric
    config: AdapterConfig
    listener: Listener

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Adapter]:
        """The whole of `vhostfc serve`; leaving is SIGTERM."""
        with plain():
            async with trio.open_nursery() as nursery:

                async def run(task_status: trio.TaskStatus[Adapter]) -> None:
                    fabric: Any = self.fabric
                    await run_adapter(
                        self.config,
                        listener=self.listener,
                        log=structlog.get_logger(),
                        fabric=fabric,
                        task_status=task_status,
                    )

                yield await nursery.start(run)
                nursery.cancel_scope.cancel()


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Lab]]:
    with contextlib.ExitStack() as stack:

        def make(**changes: Any) -> Lab:
            settings: dict[str, Any] = {
                "path": tmp_path / "vm.toml",
                "name": "vm",
                "ports": (PortConfig(ME.wwpn, ME.wwnn),),
                "emulated": tmp_path / "fabric.sock",
                "socket": tmp_path / "vhost.sock",
                "control": tmp_path / "vhost.control",
                "state": tmp_path / "state",
                "drain_timeout": 0.2,
            }
            config = AdapterConfig(**(settings | changes))
            return Lab(FakeFabric(), config, stack.enter_context(listen(config.socket)))

        yield make


# ---------------------------------------------------------------- the port, and who follows it


async def test_a_rescan_that_outlives_the_login_finds_nothing(make: Callable[..., Lab]) -> None:
    """The device stops while an administrator rescans: no unit comes back from the dead."""
    lab = make(login="start")
    async with lab.running() as adapter:
        answers: list[dict[str, Any]] = []

        async def rescan() -> None:
            answers.append(await adapter.rescan({}))

        async with trio.open_nursery() as nursery:
            async with ScsiDriver.open(lab.config.socket):
                await until(lambda: "routed 0" in lab.fabric.said)
                lab.fabric.gate = trio.Event()
                nursery.start_soon(rescan)
                await until(lambda: lab.fabric.waiting)
            await until(lambda: "logout" in lab.fabric.said)
            lab.fabric.gate.set()
        assert answers == [{"targets": []}]
        assert adapter.units.status() == []
        with pytest.raises(VhostfcError, match="is not logged in"):
            await adapter.rescan({})


async def test_a_login_at_start_ends_at_stop_and_comes_again(make: Callable[..., Lab]) -> None:
    lab = make(login="start")
    async with lab.running() as adapter:
        assert (await adapter.status({}))["port"]["state"] == "logged out"
        for _ in range(2):
            async with ScsiDriver.open(lab.config.socket) as driver:
                await until(lambda: "routed 0" in lab.fabric.said)
                assert (await driver.command(0, 0, READ, data_in=512)).good
            await until(lambda: lab.fabric.said[-1] == "logout")
            assert lab.fabric.said == ["login", "routed 0", "path closed 0", "logout"]
            lab.fabric.said.clear()


async def test_a_flush_that_failed_is_not_good_because_another_one_succeeds(
    make: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says once what it has lost."""

    async def changes(path: FakePath) -> AsyncIterator[RouteChange]:
        flush = bytes(6) + bytes([1 << 5]) + bytes(25)
        fds = [*os.pipe(), os.memfd_create("latch")]  # a pipe cannot be synced
        os.ftruncate(fds[2], LATCH_BYTES)
        broken = Medium(MediumKind.FILE, blocks=BLOCKS, block_size=512, owner=2, fd=fds[0], latch_fd=fds[2])
        for fd in fds:
            os.close(fd)
        yield RouteChange(Route(flush, broken), acknowledge=lambda: path._said.append("routed 0"))
        await trio.sleep_forever()

    monkeypatch.setattr(FakePath, "changes", changes)
    lab = make()
    async with lab.running(), ScsiDriver.open(lab.config.socket) as driver:
        await until(lambda: "routed 0" in lab.fabric.said)
        answer = await driver.command(0, 0, bytes([0x35, *bytes(9)]))
        assert (answer.status, answer.sense[2], answer.sense[12:14]) == (2, 3, b"\x0c\x00")
        assert len(lab.fabric.seen) == 1, "the fabric has to hear of it"
        lab.fabric.seen.clear()
        assert (await driver.command(0, 0, bytes([0x35, *bytes(9)]))).good, "from now on it is the fabric that knows"
        assert len(lab.fabric.seen) == 1


async def test_a_unit_that_vanishes_while_its_path_opens(make: Callable[..., Lab]) -> None:
    lab = make()
    lab.fabric.gate = trio.Event()
    async with lab.running() as adapter:
        await until(lambda: lab.fabric.waiting)
        lab.fabric.remotes[ARRAY] = {}
        lab.fabric.changed()
        await until(lambda: adapter.units.luns(0) == frozenset())
        await until(lambda: not lab.fabric.waiting)
        assert lab.fabric.said == ["login"]


async def test_what_was_sent_to_a_disk_does_not_reach_the_next_one_there(
    make: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the old disk's route closes, its address means it."""
    lab = make()
    async with lab.running() as adapter, ScsiDriver.open(lab.config.socket) as driver:
        await until(lambda: "routed 0" in lab.fabric.said)
        closing, go_on = trio.Event(), trio.Event()
        aclose = FakePath.aclose

        async def slowly(path: FakePath) -> None:
            closing.set()
            await go_on.wait()
            await aclose(path)

        monkeypatch.setattr(FakePath, "aclose", slowly)
        lab.fabric.remotes[ARRAY] = {0: b"another"}
        lab.fabric.changed()
        await closing.wait()
        assert (await driver.command(0, 0, INQUIRY, data_in=36)).response == Response.BAD_TARGET
        go_on.set()
        await until(lambda: lab.fabric.said.count("routed 0") == 2)
        assert (await driver.command(0, 0, INQUIRY, data_in=36)).good
        assert [unit.disk for unit in lab.fabric.seen if unit.lun == lun(0)] == [b"disk", b"another"]
        assert adapter.units.unit(0, 0) == Unit(ARRAY, lun(0))


async def test_a_disk_that_is_known_later_is_told_from_its_successor(make: Callable[..., Lab]) -> None:
    lab = make()
    lab.fabric.remotes[ARRAY] = {0: b""}
    async with lab.running():
        await until(lambda: lab.fabric.said == ["login", "routed 0"])
        for disk in (b"disk", b"another"):
            lab.fabric.remotes[ARRAY] = {0: disk}
            lab.fabric.changed()
            await until(lambda: not lab.fabric.pending())
            await trio.testing.wait_all_tasks_blocked(0.01)
        await until(lambda: lab.fabric.said == ["login", "routed 0", "path closed 0", "routed 0"])


# ---------------------------------------------------------------- the end


async def test_at_the_end_commands_are_answered_before_the_port_logs_out(make: Callable[..., Lab]) -> None:
    """SIGTERM while a command is at the target."""
    lab = make(drain_timeout=10.0)
    lab.fabric.hold = True
    answers: list[Answer] = []
    ending = trio.Event()

    async def serve() -> None:
        async with lab.running():
            await ending.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with ScsiDriver.open(lab.config.socket) as driver:

            async def inquire() -> None:
                answers.append(await driver.command(0, 0, INQUIRY, data_in=36))

            await until(lambda: "routed 0" in lab.fabric.said)
            nursery.start_soon(inquire)
            await until(lambda: lab.fabric.tasks)
            ending.set()
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert lab.fabric.said == ["login", "routed 0"]
            lab.fabric.tasks[0].end(ScsiResult(Outcome.COMPLETE, data_in=bytes(36)))
            await until(lambda: answers)
    assert answers[0].good
    assert lab.fabric.said == ["login", "routed 0", "path closed 0", "logout"]


# ---------------------------------------------------------------- target numbers


async def test_broken_target_numbers_are_named(make: Callable[..., Lab]) -> None:
    lab = make()
    lab.config.state.mkdir()
    (lab.config.state / "bindings.json").write_text("{")
    with pytest.raises(VhostfcError, match=r"state/bindings.json: cannot read the target numbers"):
        async with lab.running():
            pass


async def test_target_numbers_that_cannot_be_saved_end_a_start_but_no_guest(make: Callable[..., Lab]) -> None:
    """A full disk must not take a running machine's disks away."""
    lab = make()
    in_the_way = lab.config.state / "bindings.new"
    in_the_way.mkdir(parents=True)
    with pytest.raises(VhostfcError, match=r"state/bindings.json: cannot save the target numbers"):
        async with lab.running():
            await trio.sleep_forever()

    in_the_way.rmdir()
    async with lab.running(), ScsiDriver.open(lab.config.socket) as driver:
        await until(lambda: "routed 0" in lab.fabric.said)
        saved = lab.config.state / "bindings.json"
        before = saved.read_bytes()
        in_the_way.mkdir()
        lab.fabric.remotes[Wwn(ARRAY + 1)] = {1: b"more"}
        lab.fabric.changed()
        await until(lambda: "routed 1" in lab.fabric.said)
        assert (await driver.command(1, 1, READ, data_in=512)).good
        assert saved.read_bytes() == before
        in_the_way.rmdir()
        lab.fabric.changed()
        await until(lambda: saved.read_bytes() != before)


# ---------------------------------------------------------------- task management


@pytest.mark.parametrize(
    ("function", "response"),
    [
        (TmfSubtype.ABORT_TASK, Response.ABORTED),
        (TmfSubtype.ABORT_TASK_SET, Response.ABORTED),
        (TmfSubtype.LOGICAL_UNIT_RESET, Response.RESET),
    ],
)
async def test_a_command_at_the_target_is_answered_as_the_function_says(
    make: Callable[..., Lab], function: TmfSubtype, response: Response
) -> None:
    lab = make()
    async with lab.running(), ScsiDriver.open(lab.config.socket) as driver, trio.open_nursery() as nursery:
        await until(lambda: "routed 0" in lab.fabric.said)
        lab.fabric.hold = True
        answers: list[Answer] = []

        async def inquire() -> None:
            answers.append(await driver.command(0, 0, INQUIRY, data_in=36, tag=7))

        nursery.start_soon(inquire)
        await until(lambda: lab.fabric.tasks)
        assert await driver.manage(function, 0, 0, tag=7) == Response.FUNCTION_COMPLETE
        assert not lab.fabric.tasks
        await until(lambda: answers)
        assert answers[0].response == response


async def test_a_command_whose_ring_has_stopped_does_not_go_on(make: Callable[..., Lab]) -> None:
    """Its guest has begun anew, perhaps: what it wanted written before must not be written after."""
    lab = make()
    async with lab.running():
        async with ScsiDriver.open(lab.config.socket) as driver, trio.open_nursery() as nursery:
            await until(lambda: "routed 0" in lab.fabric.said)
            lab.fabric.hold = True
            answers: list[Answer] = []

            async def inquire() -> None:
                answers.append(await driver.command(0, 0, INQUIRY, data_in=36))

            nursery.start_soon(inquire)
            await until(lambda: lab.fabric.tasks)
            await driver.stop()
            assert not lab.fabric.tasks
            nursery.cancel_scope.cancel()
        lab.fabric.hold = False
        async with ScsiDriver.open(lab.config.socket) as driver:
            assert (await driver.command(0, 0, INQUIRY, data_in=36)).response == Response.OK


async def test_a_target_that_does_not_answer_is_no_success(make: Callable[..., Lab]) -> None:
    lab = make()
    lab.fabric.response = TaskManagementResponse.DELIVERY_FAILURE
    async with lab.running(), ScsiDriver.open(lab.config.socket) as driver:
        await until(lambda: "routed 0" in lab.fabric.said)
        assert await driver.manage(TmfSubtype.LOGICAL_UNIT_RESET, 0, 0) == Response.TARGET_FAILURE
        assert await driver.manage(TmfSubtype.LOGICAL_UNIT_RESET, 0, 9) == Response.INCORRECT_LUN
        assert await driver.manage(TmfSubtype.LOGICAL_UNIT_RESET, 9, 0) == Response.BAD_TARGET


async def test_a_function_whose_command_its_device_keeps_is_no_success(make: Callable[..., Lab]) -> None:
    """The target says that it is done, but a worker's command does not come back and is answered without."""
    lab = make()
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)

    def generic() -> Medium:
        return SgMedium(
            [ours.fileno()],
            share=1,
            max_transfer=1 << 20,
            grace=0,
            own=Credits(8),
            host=Credits(8),
            timeouts=[1] * 256,
        )

    lab.fabric.medium = generic
    with ours, kernel:
        async with lab.running(), ScsiDriver.open(lab.config.socket) as driver, trio.open_nursery() as nursery:
            await until(lambda: "routed 0" in lab.fabric.said)
            answers: list[Answer] = []

            async def read() -> None:
                answers.append(await driver.command(0, 0, READ, data_in=512, tag=7))

            nursery.start_soon(read)
            await trio.lowlevel.wait_readable(kernel)
            assert await driver.manage(TmfSubtype.ABORT_TASK, 0, 0, tag=7) == Response.TARGET_FAILURE
            await until(lambda: answers)
            assert answers[0].response == Response.ABORTED
