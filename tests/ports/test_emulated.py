"""The emulated port against a fabric that does what a test wants of it.

Every test has a clock on which time passes only when nobody has anything to do (autojump_clock).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import structlog
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from tests.fc.tiny import BLOCK, Done, TinyTarget
from tests.ports.contract import ME, TUR, lun, read, sense, take, until_topology, write
from tests.ports.fakefabric import MASK, MEDIUM_BYTES, Connection, FakeFabric
from tests.waiting import until
from vhostfc.errors import LoginRefused
from vhostfc.fabric import link
from vhostfc.fc import els
from vhostfc.fc.fcp import TmFlag
from vhostfc.fc.frame import Address, Frame, RCtl
from vhostfc.fc.wwn import Wwn
from vhostfc.ports.base import (
    InFlight,
    Outcome,
    Port,
    PortEvent,
    PortEventKind,
    PortState,
    RemotePortState,
    RouteChange,
    ScsiResult,
    TaskManagement,
    TaskManagementResponse,
    Unit,
)
from vhostfc.ports.base import (
    Path as PortPath,
)
from vhostfc.ports.emulated import EmulatedFabric, EmulatedPort

ARRAY = Wwn(0x5006_0160_0000_0001)
UNIT = Unit(ARRAY, lun(0))
NEIGHBOUR = Unit(ARRAY, lun(1))
RESERVE_OUT = bytes([0x5F] + 9 * [0])
GOOD = ScsiResult(Outcome.COMPLETE)


@dataclass
class FakeMedium:
    """In the place of the C side; remembers whether it was dropped."""

    route: link.Route
    readable: bool
    closed: bool = False

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class Media(list[FakeMedium]):
    """Every medium that was ever made."""

    fail: OSError | None = None

    def make(self, route: link.Route, fds: list[int]) -> FakeMedium:
        if self.fail is not None:
            raise self.fail
        self.append(FakeMedium(route, [os.fstat(fd).st_size for fd in fds] == [MEDIUM_BYTES] * 2))
        return self[-1]


@dataclass
class Lab:
    fake: FakeFabric
    array: TinyTarget
    fabric: EmulatedFabric
    nursery: trio.Nursery
    media: Media

    def start(self, port: Port, unit: Unit, cdb: bytes, *, tag: int = 0, **how: object) -> list[ScsiResult]:
        """Run a command in the background; the result will be in the list."""
        results: list[ScsiResult] = []

        async def run() -> None:
            results.append(await port.execute(unit, cdb, tag=tag, **how))  # type: ignore[arg-type]

        self.nursery.start_soon(run)
        return results

    async def held(self, number: int) -> None:
        """Until the target has this many commands that it does not answer."""
        await self.fake.until(lambda: len(self.array.tasks) == number)

    async def release(self) -> None:
        await self.fake.push(*self.array.release())

    async def take_away(self) -> None:
        self.array.listed = False
        await self.fake.rscn(self.array.port_id)

    async def bring_back(self) -> None:
        self.array.listed = True
        await self.fake.rscn(self.array.port_id)


@pytest.fixture
async def idle(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Lab]:
    """A fabric that is not up yet."""
    media = Media()
    array = TinyTarget(ARRAY, 0x01FE01, {lun(0): bytearray(64 * BLOCK), lun(1): bytearray(64 * BLOCK)})
    fake = FakeFabric(tmp_path / "fabric.sock", array)
    fabric = EmulatedFabric(
        fake.path,
        name="vm1",
        hold_timeout=30.0,
        command_timeout=60.0,
        log=structlog.get_logger(),
        make_medium=media.make,  # type: ignore[arg-type]
    )
    lab = Lab(fake, array, fabric, nursery, media)
    yield lab
    fake.close()


@pytest.fixture
async def lab(idle: Lab) -> Lab:
    await idle.nursery.start(idle.fake.serve)
    return idle


@pytest.fixture
async def port(lab: Lab) -> AsyncIterator[Port]:
    async with lab.fabric.login(ME) as port:
        yield port


# ---------------------------------------------------------------- login


async def test_login_waits_for_a_fabric_and_says_so_once(idle: Lab, autojump_clock: MockClock) -> None:
    with capture_logs() as logs:
        async with trio.open_nursery() as nursery:

            async def begin() -> None:
                await trio.sleep(60)
                await idle.nursery.start(idle.fake.serve)

            nursery.start_soon(begin)
            async with idle.fabric.login(ME) as port:
                assert port.snapshot().state is PortState.ONLINE
                assert trio.current_time() >= 60

    waiting = [entry["event"] for entry in logs if "waiting" in entry["event"]]
    assert waiting == [f"waiting for the fabric at {idle.fake.path}: nobody listens there"]


@pytest.mark.parametrize("logged_in", [True, False])
async def test_who_is_cancelled_logs_out_first(
    lab: Lab, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, logged_in: bool
) -> None:
    """SIGTERM is a cancellation, and may come before the fabric has said a word."""
    logouts: list[Wwn] = []
    receive = lab.fake.san.receive

    def watch(data: bytes) -> list[Frame]:
        frame = Frame.unpack(data)
        if frame.r_ctl == RCtl.ELS_REQUEST and frame.d_id == Address.F_PORT and frame.payload[0] == els.Els.LOGO:
            logouts.append(els.Logo.unpack(frame.payload).wwpn)
        return receive(data)

    monkeypatch.setattr(lab.fake.san, "receive", watch)
    if not logged_in:
        lab.fake.hello = None

    async def hold() -> None:
        async with lab.fabric.login(ME):
            inside.set()
            await trio.sleep_forever()

    inside = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold)
        if logged_in:
            await inside.wait()
        else:
            await lab.fake.until(lambda: lab.fake.connections and lab.fake.last.name)
        nursery.cancel_scope.cancel()

    assert logouts == ([ME.wwpn] if logged_in else [])
    assert inside.is_set() == logged_in


async def test_a_refusal_says_who_why_and_what_the_fabric_notes(lab: Lab, autojump_clock: MockClock) -> None:
    lab.fake.note = "50:01:43:80:00:00:00:02 is already logged in, by 'vm7'"
    lab.fake.san.refuse = els.LsRjt(els.Reason.LOGICAL_ERROR, els.Explanation.INVALID_PORT_NAME)

    with pytest.raises(LoginRefused) as caught:
        async with lab.fabric.login(ME):
            pass
    assert str(caught.value) == (
        f"the fabric at {lab.fake.path} refuses the login of 50:01:43:80:00:00:00:02: "
        "50:01:43:80:00:00:00:02 is already logged in, by 'vm7'; "
        "reason logical error (0x03), explanation invalid port name (0x0d)"
    )


async def test_a_refusal_after_a_broken_link_is_not_the_end(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    lab.fake.san.refuse = els.LsRjt(els.Reason.UNABLE_TO_PERFORM, els.Explanation.INSUFFICIENT_RESOURCES)
    with capture_logs() as logs:
        lab.fake.cut()
        await trio.sleep(20)
    assert port.snapshot().state is PortState.LOGGING_IN
    assert len([entry for entry in logs if "refuses the login" in entry["event"]]) == 1

    lab.fake.san.refuse = None
    await until_topology(port, lambda: port.snapshot().state is PortState.ONLINE)
    assert await port.execute(UNIT, TUR) == GOOD


@pytest.mark.parametrize(
    ("hello", "complaint"),
    [
        (None, "it does not say HELLO"),
        (link.Note("hi"), "it says NOTE for HELLO"),
        (link.Hello("new", version=9), "it speaks version 9 of the link, we speak 2"),
    ],
)
async def test_what_does_not_greet_is_no_fabric(
    lab: Lab, hello: link.Message | None, complaint: str, autojump_clock: MockClock
) -> None:
    lab.fake.hello = hello
    with capture_logs() as logs, trio.move_on_after(60):
        async with lab.fabric.login(ME):
            raise AssertionError("logged in")

    assert [entry["event"] for entry in logs] == [f"waiting for the fabric at {lab.fake.path}: {complaint}"]
    assert len(lab.fake.all) > 5


async def test_what_is_no_message_ends_the_link_and_a_new_one_is_made(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    await lab.fake.last.stream.send(b"\xff nonsense")
    await lab.fake.until(lambda: len(lab.fake.all) == 2 and ARRAY and lab.array.logins)

    assert await port.execute(UNIT, TUR) == GOOD


async def test_a_message_that_only_adapters_send_ends_the_link(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    await lab.fake.last.send(link.Close(1))
    await lab.fake.until(lambda: len(lab.fake.all) == 2)

    assert await port.execute(UNIT, TUR) == GOOD


async def test_leaving_logs_out_of_target_and_fabric(lab: Lab, autojump_clock: MockClock) -> None:
    async with lab.fabric.login(ME) as port:
        assert port.snapshot().port_id in lab.array.logins
    await lab.fake.until(lambda: not lab.fake.connections)

    logos = [r for r in lab.fake.san.asked if isinstance(r, els.Logo)]
    assert logos == [els.Logo(0x010101, ME.wwpn)]
    assert not lab.array.logins


async def test_leaving_a_deaf_fabric_takes_a_second(lab: Lab, autojump_clock: MockClock) -> None:
    async with lab.fabric.login(ME):
        lab.fake.san.deaf.add(els.Els.LOGO)
        before = trio.current_time()

    assert trio.current_time() - before <= 1.0


async def test_a_target_that_hangs_does_not_hold_up_the_login(lab: Lab, autojump_clock: MockClock) -> None:
    lab.array.mute = True
    async with lab.fabric.login(ME) as port:
        assert trio.current_time() <= 6
        assert port.snapshot().state is PortState.ONLINE
        assert port.snapshot().remote_ports == ()


# ---------------------------------------------------------------- lost paths


async def test_a_command_waits_for_a_lost_target(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    await lab.take_away()
    await until_topology(port, lambda: port.snapshot().remote_ports[0].state is RemotePortState.BLOCKED)
    results = lab.start(port, UNIT, TUR)
    await trio.sleep(20)
    assert results == []

    await lab.bring_back()
    await until(lambda: results)
    assert results == [GOOD]


async def test_a_target_that_stays_away_is_a_lost_path_then_no_target(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    await lab.take_away()
    await until_topology(port, lambda: port.snapshot().remote_ports[0].state is RemotePortState.BLOCKED)

    assert await port.execute(UNIT, TUR) == ScsiResult(Outcome.PATH_LOST)
    assert 29 <= trio.current_time() <= 31
    await until_topology(port, lambda: port.snapshot().remote_ports[0].state is RemotePortState.NOT_PRESENT)
    assert port.snapshot().remote_ports[0].units == ()
    assert await port.execute(UNIT, TUR) == ScsiResult(Outcome.NO_TARGET)


async def test_a_fabric_that_stays_away_is_a_lost_path_for_ever(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    lab.fake.hello = None
    lab.fake.cut()
    await until_topology(port, lambda: port.snapshot().state is PortState.LINK_DOWN)

    for _ in range(3):
        assert await port.execute(UNIT, TUR) == ScsiResult(Outcome.PATH_LOST)
    assert trio.current_time() >= 90
    assert port.snapshot().remote_ports[0].state is RemotePortState.BLOCKED
    assert port.snapshot().remote_ports[0].units == (UNIT, NEIGHBOUR)


async def test_what_can_run_twice_is_run_again_after_a_broken_link(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    lab.array.hold = True
    data = os.urandom(4 * BLOCK)
    wrote = lab.start(port, UNIT, write(1, 4), data_out=data)
    asked = lab.start(port, UNIT, RESERVE_OUT)
    await lab.held(2)
    lab.array.hold = False
    lab.array.tasks.clear()
    lab.fake.cut()
    await until(lambda: wrote and asked)

    assert wrote == [GOOD]
    assert asked == [ScsiResult(Outcome.RETRY)]
    assert lab.array.units[lun(0)][BLOCK : 5 * BLOCK] == data
    assert [cmnd.cdb[0] for cmnd in lab.array.seen].count(0x5F) == 1


async def test_what_is_lost_again_and_again_is_left_to_the_guest(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    lab.array.hold = True
    results = lab.start(port, UNIT, TUR)
    for _ in range(5):
        await lab.held(1)
        lab.array.tasks.clear()
        lab.array.hold = False
        lab.fake.cut()
        await lab.fake.until(lambda: not lab.fake.connections)
        lab.array.hold = True
        lab.array.script = lambda _cmnd: None
        await until(lambda: results or lab.fake.connections)
        for question in (0xA0, 0x12):  # the port's own look at the units
            await trio.sleep(0.5)
            for task in list(lab.array.tasks.values()):
                if task.cmnd.cdb[0] == question:
                    await lab.fake.push(*lab.array.go_on(task))
    await until(lambda: results)

    assert results == [ScsiResult(Outcome.RETRY)]


async def test_a_command_never_reaches_another_disk(lab: Lab, port: Port) -> None:
    """Neither what was under way, nor what waited, nor what comes from a guest that has not heard of it."""
    unit = port.snapshot().remote_ports[0].units[0]
    assert (unit, unit.is_disk(lun(0))) == (UNIT, False)
    lab.array.hold = True
    results = lab.start(port, unit, write(0, 1), data_out=bytes(BLOCK))
    await lab.held(1)
    lab.array.tasks.clear()
    lab.array.hold = False
    lab.array.names[lun(0)] = b"another"
    seen = len(lab.array.seen)
    lab.fake.cut()
    await until(lambda: results)
    later = lab.start(port, unit, TUR)
    await until(lambda: later)

    assert results == later == [ScsiResult(Outcome.NO_TARGET)]
    assert not [cmnd for cmnd in lab.array.seen[seen:] if cmnd.cdb[0] in (0x00, 0x2A)]
    assert not port.snapshot().remote_ports[0].units[0].is_disk(unit.disk)


async def test_lost_frames_are_left_to_the_guest(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    lab.array.script = lambda _cmnd: Done(data=b"")
    lab.array.hold = True
    results = lab.start(port, UNIT, read(0, 2), data_in=1024)
    await lab.held(1)
    (task,) = lab.array.tasks.values()
    frames = list(lab.array.go_on(task))
    rsp = frames[-1]
    await lab.fake.push(type(rsp)(**{**{n: getattr(rsp, n) for n in rsp.__slots__}, "payload": bytes(24)}))
    await until(lambda: results)

    assert results == [ScsiResult(Outcome.RETRY)]


async def test_a_command_that_takes_too_long_is_aborted(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    lab.array.hold = True
    result = await port.execute(UNIT, TUR)

    assert result == ScsiResult(Outcome.TIMED_OUT)
    assert 60 <= trio.current_time() <= 61
    assert [frame.r_ctl for frame in lab.fake.san.log][-2:] == [RCtl.BLS_ABTS, RCtl.BLS_BA_ACC]


async def test_a_command_that_nobody_waits_for_is_aborted(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    lab.array.hold = True
    with trio.move_on_after(1):
        await port.execute(UNIT, TUR)
    await lab.held(0)

    assert lab.fake.san.log[-1].r_ctl == RCtl.BLS_BA_ACC


# ---------------------------------------------------------------- task management


async def test_abort_task_ends_the_command_with_the_tag(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    lab.array.hold = True
    one = lab.start(port, UNIT, TUR, tag=1)
    two = lab.start(port, UNIT, TUR, tag=2)
    elsewhere = lab.start(port, NEIGHBOUR, TUR, tag=1)
    await lab.held(3)

    assert await port.manage(UNIT, TaskManagement.ABORT_TASK, 1) is TaskManagementResponse.FUNCTION_COMPLETE
    assert (one, two, elsewhere) == ([ScsiResult(Outcome.ABORTED)], [], [])
    await lab.release()
    await until(lambda: two and elsewhere)
    assert two + elsewhere == [GOOD, GOOD]


async def test_query_finds_what_is_under_way(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    lab.array.hold = True
    lab.start(port, UNIT, TUR, tag=5)
    await lab.held(1)
    succeeded, complete = TaskManagementResponse.FUNCTION_SUCCEEDED, TaskManagementResponse.FUNCTION_COMPLETE

    assert await port.manage(UNIT, TaskManagement.QUERY_TASK, 5) is succeeded
    assert await port.manage(UNIT, TaskManagement.QUERY_TASK, 6) is complete
    assert await port.manage(UNIT, TaskManagement.QUERY_TASK_SET) is succeeded
    assert await port.manage(NEIGHBOUR, TaskManagement.QUERY_TASK_SET) is complete
    await lab.release()


@pytest.mark.parametrize(
    ("function", "flag"),
    [
        (TaskManagement.ABORT_TASK_SET, TmFlag.ABORT_TASK_SET),
        (TaskManagement.CLEAR_TASK_SET, TmFlag.CLEAR_TASK_SET),
        (TaskManagement.LOGICAL_UNIT_RESET, TmFlag.LOGICAL_UNIT_RESET),
    ],
)
async def test_a_function_ends_the_units_commands_first(
    lab: Lab, port: Port, function: TaskManagement, flag: TmFlag, autojump_clock: MockClock
) -> None:
    lab.array.hold = True
    mine = [lab.start(port, UNIT, TUR, tag=number) for number in range(3)]
    spared = lab.start(port, NEIGHBOUR, TUR)
    await lab.held(4)

    assert await port.manage(UNIT, function) is TaskManagementResponse.FUNCTION_COMPLETE
    assert mine == [[ScsiResult(Outcome.ABORTED)]] * 3
    assert spared == []
    assert lab.array.seen[-1].tm_flags == flag
    await lab.release()


async def test_clear_aca_ends_nothing(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    lab.array.hold = True
    results = lab.start(port, UNIT, TUR)
    await lab.held(1)

    assert await port.manage(UNIT, TaskManagement.CLEAR_ACA) is TaskManagementResponse.FUNCTION_COMPLETE
    assert results == []
    await lab.release()


async def test_a_nexus_reset_ends_everything_of_the_target(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    lab.array.hold = True
    results = [lab.start(port, unit, TUR) for unit in (UNIT, NEIGHBOUR)]
    await lab.held(2)
    lab.array.hold = False

    response = await port.manage(UNIT, TaskManagement.I_T_NEXUS_RESET)
    assert response is TaskManagementResponse.FUNCTION_COMPLETE
    assert results == [[ScsiResult(Outcome.ABORTED)]] * 2


async def test_a_function_for_a_lost_target_ends_what_waits_for_it(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    await lab.take_away()
    await until_topology(port, lambda: port.snapshot().remote_ports[0].state is RemotePortState.BLOCKED)
    results = lab.start(port, UNIT, TUR, tag=3)
    await trio.sleep(1)

    assert await port.manage(UNIT, TaskManagement.ABORT_TASK, 3) is TaskManagementResponse.FUNCTION_COMPLETE
    assert results == [ScsiResult(Outcome.ABORTED)]
    reset = await port.manage(UNIT, TaskManagement.LOGICAL_UNIT_RESET)
    assert reset in (TaskManagementResponse.NO_TARGET, TaskManagementResponse.DELIVERY_FAILURE)


async def test_a_target_that_does_not_answer_a_function_is_a_delivery_failure(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    lab.array.mute = True

    response = await port.manage(UNIT, TaskManagement.LOGICAL_UNIT_RESET)
    assert response is TaskManagementResponse.DELIVERY_FAILURE


# ---------------------------------------------------------------- paths and routes


@asynccontextmanager
async def opened(lab: Lab, port: Port, unit: Unit = UNIT) -> AsyncIterator[tuple[PortPath, AsyncIterator[RouteChange]]]:
    path = await port.open_path(unit)
    assert path is not None
    try:
        yield path, path.changes()
    finally:
        await path.aclose()


def acked(connection: Connection, route: link.Route) -> bool:
    return route.seq in connection.acks


async def test_a_path_is_opened_and_closed(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    async with opened(lab, port) as (_, changes):
        route = (await take(changes)).route
        (first,) = lab.fake.last.routes.values()
        assert (route.mask, route.epoch, route.read_only, route.gone) == (MASK, 1, False, False)
        await lab.fake.until(partial(acked, lab.fake.last, first))
        assert [medium.readable for medium in lab.media] == [True]
    await lab.fake.until(lambda: lab.fake.last.closed == [first.nexus])


async def test_a_route_is_acknowledged_when_it_is_in_force_and_not_before(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    async with opened(lab, port) as (_, changes):
        await take(changes)
        connection = lab.fake.last
        (nexus,) = connection.routes
        narrow = await lab.fake.route(
            connection, nexus, mask=bytes(32), medium=link.MediumKind.NONE, in_flight=link.InFlight.ABORTED
        )
        change = await anext(changes)
        assert (change.route.mask, change.route.medium, change.in_flight) == (bytes(32), None, InFlight.ABORTED)
        assert await port.execute(UNIT, TUR) == GOOD, "the reader waits for nobody"
        assert not acked(connection, narrow)

        change.acknowledge()
        change.acknowledge()
        await lab.fake.until(partial(acked, connection, narrow))
        assert await port.execute(UNIT, TUR) == GOOD
        assert connection.acks.count(narrow.seq) == 1


async def test_routes_come_in_order(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    async with opened(lab, port) as (_, changes):
        connection = lab.fake.last
        (nexus,) = connection.routes
        for epoch in range(2, 6):
            await lab.fake.route(connection, nexus, read_only=epoch % 2 == 0)
        routes = [(await take(changes)).route for _ in range(5)]

        assert [route.epoch for route in routes] == [1, 2, 3, 4, 5]
        assert [route.read_only for route in routes] == [False, True, False, True, False]


async def test_a_route_for_nobody_is_acknowledged_and_its_descriptors_closed(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    async with opened(lab, port) as (_, changes):
        await take(changes)
        connection = lab.fake.last
        (nexus,) = connection.routes
    await lab.fake.until(lambda: connection.closed)
    before = len(os.listdir("/proc/self/fd"))
    late = await lab.fake.route(connection, nexus)
    await lab.fake.until(partial(acked, connection, late))

    assert len(os.listdir("/proc/self/fd")) == before
    assert len(lab.media) == 1


async def test_a_medium_that_cannot_be_used_is_a_route_without_one(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    lab.media.fail = OSError(27, "too large")
    async with opened(lab, port) as (_, changes):
        route = (await take(changes)).route

        assert (route.medium, route.mask) == (None, bytes(32))
        await lab.fake.until(lambda: lab.fake.last.acks)


async def test_media_that_nobody_took_are_dropped(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    async with opened(lab, port):
        connection = lab.fake.last
        (nexus,) = connection.routes
        await lab.fake.route(connection, nexus)
        await until(lambda: len(lab.media) == 2)
        lab.fake.cut()
        await lab.fake.until(lambda: not lab.fake.connections)
        await until(lambda: all(medium.closed for medium in lab.media))


async def test_no_new_link_is_made_before_every_route_is_closed(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    async with opened(lab, port) as (_, one), opened(lab, port, NEIGHBOUR) as (_, two):
        await take(one)
        await take(two)
        lab.fake.cut()
        closing = await anext(one)
        await take(two)
        await trio.sleep(100)
        assert len(lab.fake.all) == 1
        assert await port.open_path(UNIT) is None

        closing.acknowledge()
        assert (await take(one)).route.medium is not None
        assert (await take(two)).route.medium is not None
        assert len(lab.fake.all) == 2


async def test_what_was_to_be_aborted_is_aborted_though_the_link_breaks(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    async with opened(lab, port) as (_, changes):
        await take(changes)
        connection = lab.fake.last
        (nexus,) = connection.routes
        await lab.fake.route(connection, nexus, mask=bytes(32), in_flight=link.InFlight.ABORTED)
        await until(lambda: len(lab.media) == 2)
        lab.fake.cut()
        await until(lambda: port.snapshot().state is PortState.LINK_DOWN)
        change = await take(changes)

        assert (change.route.medium, change.in_flight) == (None, InFlight.ABORTED)


async def test_an_old_acknowledgement_is_not_sent_on_a_new_link(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    async with opened(lab, port) as (_, changes):
        first = await anext(changes)
        lab.fake.cut()
        await take(changes)
        await take(changes)
        first.acknowledge()
        await trio.sleep(1)

        (route,) = lab.fake.last.routes.values()
        assert lab.fake.last.acks == [route.seq]


async def test_a_path_waits_for_a_target_that_is_held_and_ends_when_it_is_gone(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    async with opened(lab, port) as (_, changes):
        await take(changes)
        await lab.fake.end_nexuses(lab.fake.last, link.InFlight.RESET)
        await lab.take_away()
        closing = await take(changes)
        assert (closing.route.medium, closing.route.gone, closing.in_flight) == (None, False, InFlight.RESET)
        await lab.bring_back()
        assert (await take(changes)).route.medium is not None

        await lab.take_away()
        before = trio.current_time()
        with trio.move_on_after(60):
            while not (await anext(changes)).route.gone:
                pass
        assert trio.current_time() - before >= 29
        with pytest.raises(StopAsyncIteration):
            await anext(changes)


async def test_a_route_for_an_ended_path_waits_for_its_user(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    """The user has not yet closed the old route: an acknowledgement now would be a lie."""
    async with opened(lab, port) as (_, changes):
        await take(changes)
        connection = lab.fake.last
        (nexus,) = connection.routes
        del lab.array.units[lun(0)]
        await lab.fake.rscn(lab.array.port_id)
        await until_topology(port, lambda: port.snapshot().remote_ports[0].units == (NEIGHBOUR,))
        late = await lab.fake.route(connection, nexus, mask=bytes(32))
        await trio.sleep(1)
        assert not acked(connection, late)
        assert (await anext(changes)).route.gone
    await lab.fake.until(partial(acked, connection, late))
    assert all(medium.closed for medium in lab.media)


async def test_a_refused_path_is_none(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    lab.fake.refuse_open = True

    assert await port.open_path(UNIT) is None


async def test_a_path_that_nobody_waits_for_any_more_is_closed_when_it_comes(
    lab: Lab, port: Port, autojump_clock: MockClock
) -> None:
    lab.fake.hold_open = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(port.open_path, UNIT)
        await lab.fake.until(lambda: lab.fake.held_opens)
        nursery.cancel_scope.cancel()
    await lab.fake.answer_opens()
    await lab.fake.until(lambda: lab.fake.last.closed)

    (route,) = lab.fake.last.routes.values()
    assert (lab.fake.last.acks, lab.fake.last.closed) == ([route.seq], [route.nexus])


async def test_a_changed_size_is_an_event(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    events = port.events()
    await anext(events)
    async with opened(lab, port) as (_, changes):
        await take(changes)
        (nexus,) = lab.fake.last.routes
        await lab.fake.route(lab.fake.last, nexus, blocks=128)

        assert await anext(events) == PortEvent(PortEventKind.PARAMETERS, UNIT, 0x2A, 0x09)


async def test_paths_end_with_the_login(lab: Lab, autojump_clock: MockClock) -> None:
    async with lab.fabric.login(ME) as port:
        path = await port.open_path(UNIT)
    assert path is not None

    changes = [change async for change in path.changes()]
    assert changes[-1].route.gone
    assert all(medium.closed for medium in lab.media)


async def test_a_stuck_latch_is_the_fabrics_business(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    async with opened(lab, port) as (_, changes):
        await take(changes)
        (nexus,) = lab.fake.last.routes
        port.latch_stuck(77)
        await lab.fake.until(lambda: lab.fake.last.other)

        assert lab.fake.last.other == [link.LatchStuck(nexus, 77)]


async def test_a_sign_of_life_is_given_when_the_workers_have_given_theirs(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    alive = trio.Event()
    monkeypatch.setattr(lab.fabric, "_alive", alive.wait)
    async with lab.fabric.login(ME):
        await lab.fake.last.send(link.Ping(7))
        await trio.testing.wait_all_tasks_blocked()
        assert lab.fake.last.other == []
        alive.set()
        await lab.fake.until(lambda: lab.fake.last.other)

        assert lab.fake.last.other == [link.Pong(7)]


# ---------------------------------------------------------------- odds and ends


async def test_events_that_nobody_reads_do_not_pile_up(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    events = port.events()
    for _ in range(5):
        await port.rescan()
        lab.array.units[lun(len(lab.array.units))] = bytearray(BLOCK)
    await port.rescan()

    assert await anext(events) == PortEvent(PortEventKind.TOPOLOGY)
    with trio.move_on_after(1) as scope:
        await anext(events)
    assert scope.cancelled_caught


async def test_a_rescan_without_a_link_ends(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    lab.fake.hello = None
    lab.fake.cut()
    await until_topology(port, lambda: port.snapshot().state is PortState.LINK_DOWN)

    await port.rescan()
    assert len(port.snapshot().remote_ports) == 1


async def test_an_impossible_cdb_is_the_guests_to_retry(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    assert await port.execute(UNIT, bytes(300)) == ScsiResult(Outcome.RETRY)


async def test_attribute_and_sense_pass(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    result = await port.execute(UNIT, bytes([0xEE] + 15 * [0]), attribute=2)

    assert sense(result) == (5, 0x20, 0)
    assert lab.array.seen[-1].attribute == 2


async def test_the_symbolic_name_is_registered(lab: Lab, port: Port, autojump_clock: MockClock) -> None:
    assert isinstance(port, EmulatedPort)
    names = [r.name for r in lab.fake.san.asked if hasattr(r, "name")]
    assert names == [b"vm1", b"vm1"]
    assert lab.fake.last.name == "vm1"
