"""A vport's port beyond the contract: timers, lost paths, resets that cannot be, limits, other devices, lives."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
import trio
import trio.testing
from structlog.testing import capture_logs

from tests import waiting
from tests.fakes.array import FakeTarget, FakeUnit
from tests.fakes.kernel import FakeKernel
from tests.fc.tiny import Done
from tests.ports.contract import ME, TUR, lun, path_to, ready, sense, take, take_routed, until_topology
from vhostfc.errors import LoginRefused
from vhostfc.fc.wwn import Wwn
from vhostfc.ports import npiv_commands
from vhostfc.ports.base import (
    Outcome,
    PortEventKind,
    PortState,
    RemotePortState,
    ScsiResult,
    TaskManagement,
    TaskManagementResponse,
    Unit,
)
from vhostfc.ports.npiv import NpivFabric, NpivPort
from vhostfc.ports.npiv_paths import MASK, NpivPath, shares, transfer_limit
from vhostfc.ports.sg import CHANGER, TAPE, cdb_of, timeouts
from vhostfc.ports.sysfs import Lun
from vhostfc.ports.vport import ADVICE, Parents, symbolic_name

ARRAY = Wwn(0x5006_0160_0000_0001)
UNIT = Unit(ARRAY, lun(0))
WRITE = bytes([0x2A]) + (8).to_bytes(5, "big") + b"\0" + (1).to_bytes(2, "big") + b"\0"
LOG = structlog.get_logger()


class Lab:
    def __init__(self, directory: Path, nursery: trio.Nursery, style: str = "fcoe") -> None:
        units = {number: FakeUnit(bytearray(1 << 20), b"disk %d" % number) for number in (0, 1)}
        self.array = FakeTarget(ARRAY, 0x01FE01, units)
        self.kernel = FakeKernel(directory, nursery, self.array, style=style)
        self.directory = directory

    def fabric(self, **options: object) -> NpivFabric:
        settings = {"dev_loss": 2, "fast_io_fail": 1, "command_timeout": 10.0, "survey": 0.3, **options}
        return NpivFabric(
            self.kernel,
            Parents(),
            state=self.directory / "state",
            log=LOG,
            **settings,  # type: ignore[arg-type]
        )

    @property
    def vhost(self) -> object:
        return next(host for host in self.kernel.hosts.values() if host.parent)


@pytest.fixture
def lab(tmp_path: Path, nursery: trio.Nursery) -> Lab:
    return Lab(tmp_path, nursery)


@pytest.fixture
async def port(lab: Lab) -> AsyncIterator[NpivPort]:
    async with lab.fabric().login(ME) as port:
        assert isinstance(port, NpivPort)
        yield port


def state(port: NpivPort) -> RemotePortState | None:
    return port.state_of(ARRAY)


async def until(port: NpivPort, wanted: object) -> None:
    if not wanted():  # type: ignore[operator]
        await until_topology(port, wanted)


# ---------------------------------------------------------------- timers and lost paths


async def test_the_timers_of_each_remote_port_are_set(lab: Lab, port: NpivPort) -> None:
    at = lab.kernel.sysfs.of_class("fc_remote_ports") / "rport-1:0-0"
    assert (lab.kernel.sysfs.text(at / "dev_loss_tmo"), lab.kernel.sysfs.text(at / "fast_io_fail_tmo")) == ("2", "1")


@pytest.mark.parametrize(("dev_loss", "fast"), [(3600, 5), (60, 30), (3, 2), (700, 100)])
async def test_no_pair_of_timers_is_refused(lab: Lab, dev_loss: int, fast: int) -> None:
    """The kernel refuses pairs that would be wrong only for a moment."""
    async with lab.fabric(dev_loss=dev_loss, fast_io_fail=fast).login(ME):
        at = lab.kernel.sysfs.of_class("fc_remote_ports") / "rport-1:0-0"
        assert lab.kernel.sysfs.text(at / "dev_loss_tmo") == str(dev_loss)
        assert lab.kernel.sysfs.text(at / "fast_io_fail_tmo") == str(fast)


async def test_a_lost_path_keeps_its_units_until_dev_loss(lab: Lab, port: NpivPort) -> None:
    lab.kernel.lose(lab.vhost, lab.array)  # type: ignore[arg-type]
    await until(port, lambda: state(port) is RemotePortState.BLOCKED)
    assert len(list(port.units_of(ARRAY))) == 2
    began = trio.current_time()
    assert await port.execute(UNIT, TUR) == ScsiResult(Outcome.PATH_LOST)
    assert trio.current_time() - began < 2
    await until(port, lambda: state(port) is RemotePortState.NOT_PRESENT)
    assert list(port.units_of(ARRAY)) == []
    assert await port.execute(UNIT, TUR) == ScsiResult(Outcome.NO_TARGET)


async def test_after_dev_loss_a_unit_goes_on_behind_another_node(lab: Lab, port: NpivPort) -> None:
    before = port.lun_of(UNIT)
    lab.kernel.lose(lab.vhost, lab.array)  # type: ignore[arg-type]
    await until(port, lambda: state(port) is RemotePortState.NOT_PRESENT)
    lab.kernel.back(lab.vhost, lab.array)  # type: ignore[arg-type]
    await until(port, lambda: state(port) is RemotePortState.ONLINE and port.lun_of(UNIT) is not None)
    after = port.lun_of(UNIT)
    assert before is not None
    assert after is not None
    assert before.sg != after.sg
    assert await port.execute(UNIT, TUR) == ScsiResult(Outcome.COMPLETE)


async def test_a_path_comes_back_with_its_route(lab: Lab, port: NpivPort) -> None:
    async with path_to(port, UNIT) as (_, changes):
        assert (await take_routed(changes)).route.mask == MASK
        lab.kernel.lose(lab.vhost, lab.array)  # type: ignore[arg-type]
        assert (await take(changes)).route.mask == bytes(32)
        lab.kernel.back(lab.vhost, lab.array)  # type: ignore[arg-type]
        await take_routed(changes)


async def test_a_command_in_flight_at_the_loss_may_be_sent_anew(lab: Lab, port: NpivPort) -> None:
    lab.array.units[0].hold = True
    results: list[ScsiResult] = []

    async def send() -> None:
        results.append(await port.execute(UNIT, TUR))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await waiting.until(lambda: any(node.held for node in lab.kernel.nodes.values()))
        lab.kernel.lose(lab.vhost, lab.array)  # type: ignore[arg-type]
    assert results == [ScsiResult(Outcome.PATH_LOST)]


async def test_a_command_that_the_kernel_keeps_is_answered_without_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its place in the unit's queue, and those behind it do not wait for ever either."""
    monkeypatch.setattr(npiv_commands, "GRACE", 0.2)
    lab.array.units[0].queue_depth = 1
    async with lab.fabric(command_timeout=1.0).login(ME) as port:
        await ready(port, UNIT)
        lab.array.units[0].hold = True
        results: list[ScsiResult] = []

        async def send() -> None:
            results.append(await port.execute(UNIT, TUR))

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                nursery.start_soon(send)
        assert results == [ScsiResult(Outcome.TIMED_OUT)] * 2
        assert sum(len(node.held) for node in lab.kernel.nodes.values()) == 1, "the other was never sent"
        lab.array.units[0].hold = False
        lab.kernel.release(lab.array)
        assert await port.execute(UNIT, TUR) == ScsiResult(Outcome.COMPLETE)


async def test_a_command_that_opens_its_unit_when_the_port_logs_out(lab: Lab, nursery: trio.Nursery) -> None:
    opening, gate = trio.Event(), trio.Event()
    really = lab.kernel.open_units
    opened: list[int] = []
    results: list[ScsiResult] = []

    async def slowly(lun: Lun, count: int) -> tuple[list[int], int]:
        opening.set()
        await gate.wait()
        fds, limit = await really(lun, count)
        opened.extend(fds)
        return fds, limit

    async with lab.fabric(survey=1000.0, keep=True).login(ME) as port:
        lab.kernel.open_units = slowly  # type: ignore[method-assign]

        async def send() -> None:
            results.append(await port.execute(UNIT, TUR))

        nursery.start_soon(send)
        await opening.wait()
    gate.set()
    await waiting.until(lambda: results)
    assert results == [ScsiResult(Outcome.PATH_LOST)]
    for fd in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


# ---------------------------------------------------------------- task management


async def held(lab: Lab, port: NpivPort, nursery: trio.Nursery, cdb: bytes = TUR, data: bytes = b"") -> None:
    """A command of ours that the kernel has."""
    lab.array.units[0].hold = True
    nursery.start_soon(lambda: port.execute(UNIT, cdb, data_out=data, tag=5))
    await waiting.until(lambda: any(node.held for node in lab.kernel.nodes.values()))


async def test_an_abort_that_cannot_be_is_rejected(lab: Lab, port: NpivPort, nursery: trio.Nursery) -> None:
    await held(lab, port, nursery)
    answer = await port.manage(UNIT, TaskManagement.ABORT_TASK, tag=5)
    assert answer is TaskManagementResponse.FUNCTION_REJECTED
    assert await port.manage(UNIT, TaskManagement.QUERY_TASK, tag=5) is TaskManagementResponse.FUNCTION_SUCCEEDED
    lab.kernel.release(lab.array)


@pytest.mark.parametrize("how", ["abort", "abort set", "reset of the target", "its ring has stopped"])
async def test_a_write_that_waits_for_its_path_and_is_ended_never_lands(
    lab: Lab, port: NpivPort, nursery: trio.Nursery, how: str
) -> None:
    await ready(port, UNIT)
    lab.kernel.lose(lab.vhost, lab.array)  # type: ignore[arg-type]
    await until(port, lambda: state(port) is RemotePortState.BLOCKED)
    results: list[ScsiResult] = []
    scope = trio.CancelScope()

    async def send() -> None:
        with scope:
            results.append(await port.execute(UNIT, WRITE, data_out=b"O" * 512, tag=5))

    nursery.start_soon(send)
    await trio.testing.wait_all_tasks_blocked()
    match how:
        case "abort":
            answer = await port.manage(UNIT, TaskManagement.ABORT_TASK, tag=5)
            assert answer is TaskManagementResponse.FUNCTION_COMPLETE
        case "abort set":
            answer = await port.manage(UNIT, TaskManagement.ABORT_TASK_SET)
            assert answer is TaskManagementResponse.FUNCTION_COMPLETE
        case "reset of the target":
            lab.kernel.back(lab.vhost, lab.array)  # type: ignore[arg-type]
            await port._commands._end_all([UNIT], _true)
        case _:
            scope.cancel()
    lab.kernel.back(lab.vhost, lab.array)  # type: ignore[arg-type]
    await until(port, lambda: state(port) is RemotePortState.ONLINE)
    await ready(port, UNIT)
    assert results in ([ScsiResult(Outcome.ABORTED)], [])
    assert b"O" not in lab.array.units[0].data


async def _true() -> bool:
    await trio.lowlevel.checkpoint()
    return True


async def test_a_command_of_the_survey_is_no_task_of_the_guests(lab: Lab, port: NpivPort) -> None:
    lab.array.units[0].hold = True
    await waiting.until(lambda: any(node.held for node in lab.kernel.nodes.values()))
    assert await port.manage(UNIT, TaskManagement.QUERY_TASK_SET) is TaskManagementResponse.FUNCTION_COMPLETE


async def test_a_reset_of_a_unit_that_is_never_idle_is_done(lab: Lab, port: NpivPort) -> None:
    """What comes meanwhile waits."""
    await ready(port, UNIT)
    sent = 0

    async def busy() -> None:
        nonlocal sent
        while True:
            await port.execute(UNIT, TUR, tag=9)
            sent += 1

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(busy)
        while sent < 20:
            await trio.sleep(0.01)
        for function in (TaskManagement.LOGICAL_UNIT_RESET, TaskManagement.I_T_NEXUS_RESET):
            before = sent
            with trio.fail_after(5):
                assert await port.manage(UNIT, function) is TaskManagementResponse.FUNCTION_COMPLETE
                while sent < before + 20:
                    await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_a_reset_ends_what_is_in_flight_first(lab: Lab, port: NpivPort) -> None:
    results: list[ScsiResult] = []
    lab.array.units[0].hold = True

    async def send() -> None:
        results.append(await port.execute(UNIT, TUR))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await waiting.until(lambda: any(node.held for node in lab.kernel.nodes.values()))
        answer = await port.manage(UNIT, TaskManagement.LOGICAL_UNIT_RESET)
        assert answer is TaskManagementResponse.FUNCTION_COMPLETE
        assert results == [ScsiResult(Outcome.ABORTED)]
    assert [level for _, level in lab.kernel.resets] == [0x101], "never with escalation"


async def test_a_reset_of_a_blocked_unit_fails_at_once(lab: Lab, port: NpivPort) -> None:
    """The kernel would wait until dev_loss."""
    lab.kernel.lose(lab.vhost, lab.array)  # type: ignore[arg-type]
    await until(port, lambda: state(port) is RemotePortState.BLOCKED)
    answer = await port.manage(UNIT, TaskManagement.LOGICAL_UNIT_RESET)
    assert answer is TaskManagementResponse.DELIVERY_FAILURE
    assert lab.kernel.resets == []


@pytest.mark.parametrize(("style", "levels"), [("fcoe", [0x104, 0x101, 0x101]), ("lpfc", [0x104])])
async def test_a_target_without_a_reset_is_reset_unit_by_unit(
    tmp_path: Path, nursery: trio.Nursery, style: str, levels: list[int]
) -> None:
    lab = Lab(tmp_path, nursery, style)
    async with lab.fabric().login(ME) as port:
        answer = await port.manage(UNIT, TaskManagement.I_T_NEXUS_RESET)
        assert answer is TaskManagementResponse.FUNCTION_COMPLETE
    assert [level for _, level in lab.kernel.resets] == levels


@pytest.mark.parametrize("function", [TaskManagement.CLEAR_TASK_SET, TaskManagement.CLEAR_ACA])
async def test_what_linux_cannot_do_is_rejected(port: NpivPort, function: TaskManagement) -> None:
    assert await port.manage(UNIT, function) is TaskManagementResponse.FUNCTION_REJECTED


# ---------------------------------------------------------------- limits


async def test_block_limits_tell_what_the_port_can_carry(lab: Lab, port: NpivPort) -> None:
    page = bytes([0x12, 1, 0xB0, 0, 64, 0])
    await port.execute(UNIT, bytes([0x25]) + bytes(9), data_in=8)
    limits = (await port.execute(UNIT, page, data_in=64)).data_in
    assert int.from_bytes(limits[8:12], "big") == lab.kernel.limit // 512
    lab.array.units[0].max_blocks = 100
    limits = (await port.execute(UNIT, page, data_in=64)).data_in
    assert (int.from_bytes(limits[8:12], "big"), int.from_bytes(limits[12:16], "big")) == (100, 100)


async def test_more_than_that_is_a_check_condition(lab: Lab, port: NpivPort) -> None:
    await ready(port, UNIT)
    result = await port.execute(UNIT, bytes([0x2A]) + bytes(9), data_out=bytes(lab.kernel.limit + 512))
    assert sense(result) == (5, 0x24, 0)


@pytest.mark.parametrize(("depth", "workers", "ours"), [(1, 0, 1), (2, 1, 1), (32, 28, 4), (254, 250, 4), (8, 7, 1)])
def test_a_queue_is_shared_with_the_workers(depth: int, workers: int, ours: int) -> None:
    assert shares(depth) == (workers, ours)


def test_a_transfer_is_bounded_by_all_that_carries_it() -> None:
    assert transfer_limit(1310720, 128) == 1310720
    assert transfer_limit(32 << 20, 64) == 2 << 20
    assert transfer_limit(1 << 30, 1024) == 4 << 20


async def test_units_share_the_tags_of_their_host(lab: Lab, port: NpivPort) -> None:
    """Linux gives each its part of them, four at least, and has who wants more wait inside write(2)."""
    found = port.lun_of(UNIT)
    assert found is not None
    port._paths.set_host(40, 128)
    for units, depth in ((1, 32), (2, 20), (3, 13), (11, 4), (100, 4)):
        port._paths.set_units(units)
        assert port._paths.shares(found) == shares(depth)


async def test_a_unit_more_makes_the_others_parts_smaller(lab: Lab, port: NpivPort) -> None:
    port._paths.set_host(40, 128)
    async with path_to(port, UNIT) as (path, changes):
        await take_routed(changes)
        assert isinstance(path, NpivPath)
        assert path.workers == shares(20)[0]
        lab.array.units[7] = FakeUnit(bytearray(4096), b"new")
        await until(port, lambda: len(list(port.units_of(ARRAY))) == 3)
        assert path.workers == port._paths._credits[UNIT].limit == shares(13)[0]


async def test_a_unit_with_a_queue_of_one_is_driven_from_here(lab: Lab) -> None:
    lab.array.units[0].queue_depth = 1
    async with lab.fabric().login(ME) as port, path_to(port, UNIT) as (_, changes):
        assert (await take(changes)).route.medium is None
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(lambda: port.execute(UNIT, TUR))


# ---------------------------------------------------------------- devices of other kinds, and places without one


def test_what_takes_long_has_time() -> None:
    disk, tape, changer = timeouts(0), timeouts(TAPE), timeouts(CHANGER)
    assert disk[0x28] == 60
    assert disk[0x04] > 3600
    assert tape[0x19] > 3600
    assert tape[0x11] > 3600
    assert changer[0xA5] >= 600
    assert changer[0x07] >= 1800
    assert disk[0xA5] == 60
    assert min(timeouts(0, 90)) == 90


@pytest.mark.parametrize("kind", [TAPE, CHANGER, 0x0D])
async def test_any_type_is_passed_through(lab: Lab, kind: int) -> None:
    lab.array.units[0].type = kind
    lab.array.units[0].script = lambda cdb: Done(data=b"position") if cdb[0] == 0x34 else None
    async with lab.fabric().login(ME) as port:
        inquiry = await port.execute(UNIT, bytes([0x12, 0, 0, 0, 36, 0]), data_in=36)
        assert inquiry.data_in[0] == kind
        result = await port.execute(UNIT, bytes([0x34]) + bytes(9), data_in=20)
        assert (result.data_in, result.residual) == (b"position", 12)


async def test_where_no_unit_is_the_target_still_answers(lab: Lab, port: NpivPort) -> None:
    nowhere = Unit(ARRAY, lun(9))
    inquiry = await port.execute(nowhere, bytes([0x12, 0, 0, 0, 36, 0]), data_in=36)
    assert inquiry.data_in[0] == 0x7F, "peripheral qualifier 3: nothing can be here"
    assert sense(await port.execute(nowhere, bytes([0x12, 1, 0, 0, 36, 0]), data_in=36)) == (5, 0x24, 0)
    report = bytes([0xA0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0])
    for unit in (nowhere, Unit(ARRAY, bytes.fromhex("c101000000000000"))):
        luns = (await port.execute(unit, report, data_in=64)).data_in
        assert luns[:4] == (16).to_bytes(4, "big")


@pytest.mark.parametrize(
    ("padded", "length"),
    [
        ("00" * 32, 6),
        ("28" + "00" * 31, 10),
        ("88" + "00" * 31, 16),
        ("a3" + "00" * 31, 12),
        ("7f" + "00" * 6 + "18" + "00" * 24, 32),
    ],
)
def test_a_cdb_is_as_long_as_its_opcode_says(padded: str, length: int) -> None:
    assert len(cdb_of(bytes.fromhex(padded))) == length


# ---------------------------------------------------------------- what the kernel keeps

WRITE = bytes([0x2A]) + bytes(6) + (1).to_bytes(2, "big") + bytes(1)
BUSY = ScsiResult(Outcome.COMPLETE, 8, residual=512)


async def test_a_path_that_comes_back_counts_what_it_had(lab: Lab, port: NpivPort) -> None:
    """Whatever route a command went by, and behind whichever node."""
    async with path_to(port, UNIT) as (_, changes):
        await take_routed(changes)
        before = port._paths._credits[UNIT]
        lab.kernel.lose(lab.vhost, lab.array)  # type: ignore[arg-type]
        await until(port, lambda: state(port) is RemotePortState.NOT_PRESENT)
        lab.kernel.back(lab.vhost, lab.array)  # type: ignore[arg-type]
        await until(port, lambda: state(port) is RemotePortState.ONLINE and port.lun_of(UNIT) is not None)
        async with path_to(port, UNIT) as (_, others):
            await take_routed(others)
            assert port._paths._credits[UNIT] is before
    await port.reconcile()


async def test_a_write_that_was_given_up_keeps_the_next_busy(lab: Lab, port: NpivPort, nursery: trio.Nursery) -> None:
    await ready(port, UNIT)
    lab.array.units[0].hold = True
    given_up = trio.CancelScope()

    async def send() -> None:
        with given_up:
            await port.execute(UNIT, WRITE, data_out=b"O" * 512)

    nursery.start_soon(send)
    await waiting.until(lambda: any(node.held for node in lab.kernel.nodes.values()))
    given_up.cancel()
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert port._paths.is_stale(UNIT)
    lab.array.units[0].hold = False
    assert await port.execute(UNIT, WRITE, data_out=b"N" * 512) == BUSY
    assert (await port.execute(UNIT, bytes([0x28]) + WRITE[1:], data_in=512)).status == 0
    lab.kernel.release(lab.array)
    while port._paths.is_stale(UNIT):
        await trio.sleep(0.01)
    assert await port.execute(UNIT, WRITE, data_out=b"N" * 512) == ScsiResult(Outcome.COMPLETE)
    assert lab.array.units[0].data[:512] == b"N" * 512


# ---------------------------------------------------------------- changes


async def test_a_unit_that_the_array_adds_is_found_without_a_word(lab: Lab, port: NpivPort) -> None:
    lab.array.units[7] = FakeUnit(bytearray(4096), b"new")
    await until(port, lambda: Unit(ARRAY, lun(7)) in set(port.units_of(ARRAY)))


async def test_a_unit_that_it_takes_away_is_taken_out(lab: Lab, port: NpivPort) -> None:
    del lab.array.units[1]
    await until(port, lambda: len(list(port.units_of(ARRAY))) == 1)
    assert ("class/scsi_device/1:0:0:1/device/delete", "1") in lab.kernel.writes


async def test_nobodys_attention_is_taken_by_asking(lab: Lab, port: NpivPort) -> None:
    """TEST UNIT READY would report one that the guest waits for; INQUIRY does not (SAM-5 5.14)."""
    whole, asked = lab.array.run, set()

    def watch(initiator: Wwn, number: int, cdb: bytes, data: bytes) -> Done:
        asked.add((number, cdb[0]))
        if cdb[0] == 0xA0:
            return Done(data=(8).to_bytes(4, "big") + bytes(4) + lun(0))
        return whole(initiator, number, cdb, data)

    lab.array.run = watch  # type: ignore[method-assign]
    with trio.fail_after(5):
        while (1, 0x12) not in asked:
            await trio.sleep(0.05)
    await trio.sleep(0.5)
    assert {opcode for _, opcode in asked} == {0x12, 0xA0}
    assert len(list(port.units_of(ARRAY))) == 2


@pytest.mark.parametrize(
    "answer",
    [
        Done(data=bytes([0x7F]) + bytes(35)),
        Done(data=bytes([0x20]) + bytes(35)),
        Done(2, sense=bytes.fromhex("70000500000000 0a 00000000 2500 00000000")),
    ],
)
async def test_a_unit_that_says_it_is_not_there_is_gone(lab: Lab, port: NpivPort, answer: Done) -> None:
    """By the peripheral qualifier, as SPC has it, or by the error that some give."""
    whole = lab.array.run

    def gone(initiator: Wwn, number: int, cdb: bytes, data: bytes) -> Done:
        if cdb[0] == 0xA0:
            return Done(data=(8).to_bytes(4, "big") + bytes(4) + lun(0))
        return answer if number else whole(initiator, number, cdb, data)

    lab.array.run = gone  # type: ignore[method-assign]
    await until(port, lambda: len(list(port.units_of(ARRAY))) == 1)


async def test_a_unit_that_a_list_forgets_but_that_answers_stays(lab: Lab, port: NpivPort) -> None:
    whole, asked = lab.array.run, 0

    def forgetful(initiator: Wwn, number: int, cdb: bytes, data: bytes) -> Done:
        nonlocal asked
        if cdb[0] == 0xA0:
            asked += 1
            return Done(data=(8).to_bytes(4, "big") + bytes(4) + lun(0))
        return whole(initiator, number, cdb, data)

    lab.array.run = forgetful  # type: ignore[method-assign]
    await waiting.until(lambda: asked == 3)
    assert len(list(port.units_of(ARRAY))) == 2


async def test_an_rscn_makes_us_ask(tmp_path: Path, nursery: trio.Nursery) -> None:
    lab = Lab(tmp_path, nursery, "lpfc")
    async with lab.fabric(survey=3600.0).login(ME) as port:
        assert isinstance(port, NpivPort)
        lab.array.units[7] = FakeUnit(bytearray(4096), b"new")
        lab.kernel.rscn()
        await until(port, lambda: Unit(ARRAY, lun(7)) in set(port.units_of(ARRAY)))


async def test_attentions_of_a_unit_become_events(lab: Lab, port: NpivPort) -> None:
    events = port.events()
    await anext(events)
    lab.kernel.attention(lab.array, "MODE_PARAMETERS_CHANGED", 1)
    with trio.fail_after(5):
        async for event in events:
            if event.kind is PortEventKind.PARAMETERS:
                assert (event.unit, event.asc, event.ascq) == (Unit(ARRAY, lun(1)), 0x2A, 0x01)
                return


# ---------------------------------------------------------------- lives


async def test_at_the_end_the_vport_is_deleted_unless_kept(lab: Lab) -> None:
    async with lab.fabric(keep=True).login(ME):
        pass
    kept = lab.kernel.sysfs.vport_of(ME.wwpn)
    assert kept is not None
    async with lab.fabric().login(ME) as port:
        assert isinstance(port, NpivPort)
        assert port.vport.name == kept.name
    assert lab.kernel.sysfs.vport_of(ME.wwpn) is None


def the_vport(lab: Lab) -> str | None:
    vport = lab.kernel.sysfs.vport_of(ME.wwpn)
    return None if vport is None else vport.name


async def left_behind(lab: Lab) -> str:
    """A vport of an adapter that was killed."""
    lab.kernel.make_vport(lab.kernel.hosts["host0"], ME.wwpn, ME.wwnn, symbolic_name(ME))
    left = the_vport(lab)
    assert left is not None
    while (vport := lab.kernel.sysfs.vport(left)) is None or vport.state != "Active":
        await trio.sleep(0.01)
    return left


async def test_the_vport_of_a_killed_adapter_is_made_anew(lab: Lab) -> None:
    """The kernel may have commands of it, which are over for certain only when the vport is gone."""
    left = await left_behind(lab)
    async with lab.fabric().login(ME) as port:
        assert port.snapshot().state is PortState.ONLINE
        assert the_vport(lab) not in {None, left}


async def test_a_vport_of_before_that_cannot_be_deleted_is_not_gone_on_with(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = await left_behind(lab)
    whole = lab.kernel.write

    async def write(path: Path, data: bytes) -> int:
        if path.name == "vport_delete":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        return await whole(path, data)

    monkeypatch.setattr(lab.kernel, "write", write)
    with pytest.raises(LoginRefused, match=f"{left} on host0 cannot be deleted"):
        async with lab.fabric().login(ME):
            pass


async def test_a_kept_vport_with_a_write_under_way_is_made_anew(lab: Lab) -> None:
    async with lab.fabric(keep=True).login(ME) as port, trio.open_nursery() as nursery:
        assert isinstance(port, NpivPort)
        await held(lab, port, nursery, WRITE, b"O" * 512)
        nursery.cancel_scope.cancel()
    kept = the_vport(lab)
    async with lab.fabric(keep=True).login(ME):
        anew = the_vport(lab)
        assert anew not in {None, kept}
    lab.array.units[0].hold = False
    for _ in range(2):  # what was idle at its end is, until something begins with it
        async with lab.fabric(keep=True).login(ME):
            assert the_vport(lab) == anew


async def test_a_note_of_an_idle_vport_is_good_for_one_life(lab: Lab, nursery: trio.Nursery) -> None:
    async with lab.fabric(keep=True).login(ME):
        pass
    kept = the_vport(lab)
    note = lab.directory / "state" / f"vport-{ME.wwpn.pack().hex()}.idle"
    assert note.read_text() == kept
    async with lab.fabric(keep=True).login(ME):
        assert not note.exists()


async def test_a_cancelled_adapter_logs_out(lab: Lab) -> None:
    with trio.CancelScope() as scope:
        async with lab.fabric().login(ME):
            scope.cancel()
            await trio.sleep_forever()
    assert lab.kernel.sysfs.vport_of(ME.wwpn) is None


async def test_a_link_in_place_of_the_lock_is_not_followed(lab: Lab, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("root:x")
    (lab.directory / "state").mkdir()
    (lab.directory / f"state/vport-{ME.wwpn.pack().hex()}.lock").symlink_to(other)
    with pytest.raises(LoginRefused, match=rf"state/vport-{ME.wwpn.pack().hex()}\.lock: "):
        async with lab.fabric().login(ME):
            pass
    assert lab.kernel.writes == []


@pytest.mark.parametrize("what", ["silent", "link down"])
async def test_one_that_is_stopped_while_it_logs_in_leaves_nothing(lab: Lab, what: str) -> None:
    """Left there, it would log in once the link is back, while the machine runs elsewhere."""
    lab.kernel.verdict = "silent"
    with trio.CancelScope() as scope:

        async def stop() -> None:
            await waiting.until(lambda: any(host.parent for host in lab.kernel.hosts.values()))
            if what == "link down":
                await lab.kernel.link_down()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            async with lab.fabric(patience=30).login(ME):
                raise AssertionError
    assert scope.cancelled_caught
    assert list(lab.kernel.sysfs.vports()) == []


async def test_a_vport_that_was_made_anew_elsewhere_is_logged_out(tmp_path: Path, nursery: trio.Nursery) -> None:
    lab = Lab(tmp_path, nursery)
    lab.kernel = FakeKernel(tmp_path / "two", nursery, lab.array, hosts=2)
    with trio.CancelScope() as scope:
        async with lab.fabric().login(ME) as port:
            assert isinstance(port, NpivPort)
            first = port.vport
            await lab.kernel.link_down(first.parent)
            lab.kernel.remove_vport(lab.vhost)  # type: ignore[arg-type]
            with trio.fail_after(10):
                while port.vport.parent == first.parent:
                    await trio.sleep(0.01)
            scope.cancel()
            await trio.sleep_forever()
    assert list(lab.kernel.sysfs.vports()) == []


async def test_a_vport_that_somebody_deletes_is_made_anew(lab: Lab, port: NpivPort) -> None:
    lab.kernel.remove_vport(lab.vhost)  # type: ignore[arg-type]
    await until(port, lambda: state(port) is not RemotePortState.ONLINE)
    await until(port, lambda: state(port) is RemotePortState.ONLINE and bool(list(port.units_of(ARRAY))))
    assert await port.execute(UNIT, TUR) == ScsiResult(Outcome.COMPLETE)


async def test_a_logout_leaves_what_somebody_else_made_meanwhile(lab: Lab) -> None:
    async with lab.fabric().login(ME):
        parent = lab.vhost.parent  # type: ignore[attr-defined]
        lab.kernel.remove_vport(lab.vhost)  # type: ignore[arg-type]
        lab.kernel.make_vport(parent, ME.wwpn, ME.wwnn, "libvirt web7")
        await trio.sleep(0.1)
    assert [vport.symbolic_name for vport in lab.kernel.sysfs.vports()] == ["libvirt web7"]
    assert not [path for path, _ in lab.kernel.writes if path.endswith("vport_delete")]


@pytest.mark.parametrize("now", ["No Fabric Support", "Fabric Rejected WWN", "Fabric Logout"])
async def test_a_vport_that_is_thrown_out_is_told_and_logged_in_elsewhere(
    tmp_path: Path, nursery: trio.Nursery, now: str
) -> None:
    lab = Lab(tmp_path, nursery)
    lab.kernel = FakeKernel(tmp_path / "two", nursery, lab.array, hosts=2, style="lpfc")
    with capture_logs() as logs:
        async with lab.fabric(patience=0.3).login(ME) as port:
            assert isinstance(port, NpivPort)
            first = port.vport
            if now == "Fabric Logout":  # another login of the same port mends that
                lab.kernel._state(lab.vhost, now)  # type: ignore[arg-type]
            else:
                lab.kernel.refusing["host0"] = now
                lab.kernel._state(lab.vhost, now)  # type: ignore[arg-type]
            await until(port, lambda: state(port) is not RemotePortState.ONLINE)
            await until(port, lambda: state(port) is RemotePortState.ONLINE and bool(list(port.units_of(ARRAY))))
            assert (port.vport.parent == first.parent) == (now == "Fabric Logout")
            assert await port.execute(UNIT, TUR) == ScsiResult(Outcome.COMPLETE)
    told = [log for log in logs if log["event"] == "the vport is" and log["state"] == now]
    assert told[0]["advice"] == ADVICE[now]
    assert told[0]["log_level"] == "warning"
    assert list(lab.kernel.sysfs.vports()) == []


async def test_a_vport_that_somebody_has_disabled_is_left_so(lab: Lab) -> None:
    with capture_logs() as logs:
        async with lab.fabric(patience=0.1).login(ME) as port:
            assert isinstance(port, NpivPort)
            name = port.vport.name
            disable = lab.kernel.sysfs.of_class("fc_vports") / name / "vport_disable"
            await lab.kernel.write(disable, b"1")
            await trio.sleep(2)
            assert [vport.state for vport in lab.kernel.sysfs.vports()] == ["Disabled"]
            await lab.kernel.write(disable, b"0")
            await until(port, lambda: state(port) is RemotePortState.ONLINE)
            assert port.vport.name == name
    assert any(log.get("advice") == ADVICE["Disabled"] for log in logs)


# ---------------------------------------------------------------- units that the kernel gives up


def give_up(lab: Lab) -> None:
    """As the kernel's error recovery does."""
    for node in lab.kernel.nodes.values():
        lab.kernel._set(lab.kernel._lun(node) / "state", "offline")


def started(lab: Lab) -> list[str]:
    return [path for path, text in lab.kernel.writes if path.endswith("device/state") and text == "running"]


async def test_a_unit_that_the_kernel_gave_up_is_set_running_again(lab: Lab) -> None:
    with capture_logs() as logs:
        async with lab.fabric(survey=1000.0).login(ME) as port:
            assert isinstance(port, NpivPort)
            await ready(port, UNIT)
            give_up(lab)
            assert await port.execute(UNIT, TUR) == ScsiResult(Outcome.PATH_LOST)
            with trio.fail_after(5):
                while await port.execute(UNIT, TUR) != ScsiResult(Outcome.COMPLETE):
                    await trio.sleep(0.05)
            assert len(started(lab)) == 2
            give_up(lab)  # and again: the next attempt has time
            await trio.sleep(2.5)
            assert len(started(lab)) == 2
    events = [log["event"] for log in logs]
    assert len([event for event in events if "the kernel has set a unit offline" in event]) == 2
    assert events.count("set a unit running again") == 2


async def test_a_unit_is_not_set_running_where_nobody_is(lab: Lab, port: NpivPort) -> None:
    lab.kernel.lose(lab.vhost, lab.array)  # type: ignore[arg-type]
    await until(port, lambda: state(port) is RemotePortState.BLOCKED)
    give_up(lab)
    await port.reconcile()
    await trio.sleep(0.1)
    assert started(lab) == []


async def test_a_unit_that_does_not_answer_keeps_nobody_waiting(lab: Lab, port: NpivPort) -> None:
    lab.kernel.recovered = trio.Event()
    give_up(lab)
    with trio.fail_after(5):
        while not started(lab):
            await port.reconcile()
            await trio.sleep(0.05)
        for _ in range(3):
            await port.reconcile()
    assert len(started(lab)) == 1, "one at a time"
    lab.kernel.recovered.set()


async def test_a_host_that_would_use_the_units_is_refused(lab: Lab) -> None:
    await lab.kernel.write(lab.kernel.root / "bus/scsi/drivers_autoprobe", b"1")
    with pytest.raises(LoginRefused, match="vhostfc setup"):
        async with lab.fabric().login(ME):
            pass
    async with lab.fabric(guard=False).login(ME):
        pass


def drivers(lab: Lab) -> set[str | None]:
    vhost = lab.vhost.name  # type: ignore[attr-defined]
    return {lun.driver for lun in lab.kernel.sysfs.luns(vhost)}


async def test_units_that_this_host_has_taken_are_taken_back(lab: Lab) -> None:
    """A vport that was left behind, adopted by an adapter: meanwhile a driver has its units."""
    async with lab.fabric(keep=True).login(ME):
        pass
    for node in lab.kernel.nodes.values():
        lab.kernel.bind(node.hctl)
    with capture_logs() as logs:
        async with lab.fabric().login(ME) as port:
            assert isinstance(port, NpivPort)
            with trio.fail_after(5):
                while drivers(lab) != {None}:
                    await trio.sleep(0.01)
            await until(port, lambda: port.lun_of(UNIT) is not None and not port.kept_off(UNIT))
            async with path_to(port, UNIT) as (_, changes):
                await take_routed(changes)
            assert await port.execute(UNIT, TUR) == ScsiResult(Outcome.COMPLETE)
    told = [log for log in logs if "this host's driver had" in log["event"]]
    assert {(log["driver"], log["log_level"]) for log in told} == {("sd", "error")}
    assert len(told) == 2


async def test_a_unit_that_this_host_does_not_give_back_is_not_used(lab: Lab, port: NpivPort) -> None:
    async with path_to(port, UNIT) as (_, changes):
        await take_routed(changes)
        lab.kernel.recovered = trio.Event()  # the driver does not let go
        for node in lab.kernel.nodes.values():
            lab.kernel.bind(node.hctl)
        await port.reconcile()
        assert (await take(changes)).route.medium is None
        assert await port.execute(UNIT, TUR) == ScsiResult(Outcome.COMPLETE, 0x08)
        assert TUR not in lab.array.units[0].seen
        lab.kernel.recovered.set()
        await take_routed(changes)
        assert await port.execute(UNIT, TUR) == ScsiResult(Outcome.COMPLETE)


async def test_without_its_guard_it_only_warns(lab: Lab) -> None:
    await lab.kernel.write(lab.kernel.root / "bus/scsi/drivers_autoprobe", b"1")
    with capture_logs() as logs:
        async with lab.fabric(guard=False).login(ME) as port:
            await ready(port, UNIT)
            await trio.sleep(1.2)
            assert drivers(lab) == {"sd"}
            assert await port.execute(UNIT, TUR) == ScsiResult(Outcome.COMPLETE)
    assert [log["log_level"] for log in logs if "this host's driver had" in log["event"]] == ["warning"] * 2


async def test_hands_that_are_let_loose_later_are_told_once(lab: Lab) -> None:
    with capture_logs() as logs:
        async with lab.fabric().login(ME) as port:
            assert isinstance(port, NpivPort)
            await lab.kernel.write(lab.kernel.root / "bus/scsi/drivers_autoprobe", b"1")
            for _ in range(3):
                await port.reconcile()
            lab.array.units[7] = FakeUnit(bytearray(4096), b"new")
            seven = Unit(ARRAY, lun(7))
            await until(port, lambda: seven in set(port.units_of(ARRAY)) and not port.kept_off(seven))
            assert await port.execute(seven, TUR) == ScsiResult(Outcome.COMPLETE)
    assert len([log for log in logs if "vhostfc setup" in log["event"]]) == 1


async def test_another_disk_in_the_place_is_another_disk(lab: Lab, port: NpivPort) -> None:
    """Commands that were meant for the one do not reach the other."""
    old = next(unit for unit in port.units_of(ARRAY) if unit == UNIT)
    async with path_to(port, old) as (_, changes):
        await take_routed(changes)
        lab.array.units[0] = FakeUnit(bytearray(4096), b"another")
        lab.kernel.attention(lab.array, "INQUIRY_DATA_HAS_CHANGED", 0)
        while not (await take(changes)).route.gone:
            pass
    assert await port.execute(old, TUR) == ScsiResult(Outcome.NO_TARGET)
    new = next(unit for unit in port.units_of(ARRAY) if unit == UNIT)
    assert b"another" in new.disk
    assert await port.execute(new, TUR) == ScsiResult(Outcome.COMPLETE)


async def test_a_node_that_cannot_be_opened_yet_is_tried_again(lab: Lab, port: NpivPort) -> None:
    lab.kernel.locked = True
    async with path_to(port, UNIT) as (_, changes):
        assert (await take(changes)).route.medium is None
        lab.kernel.locked = False
        await take_routed(changes)


async def test_a_unit_whose_route_is_in_force_can_be_reset(lab: Lab, port: NpivPort) -> None:
    """Who takes a route closes its medium once the workers have it."""
    async with path_to(port, UNIT) as (_, changes):
        await take_routed(changes)
        for function in (TaskManagement.ABORT_TASK, TaskManagement.LOGICAL_UNIT_RESET):
            assert await port.manage(UNIT, function) is TaskManagementResponse.FUNCTION_COMPLETE


async def test_a_queue_depth_that_changes_is_followed(lab: Lab, port: NpivPort) -> None:
    async with path_to(port, UNIT) as (path, changes):
        await take_routed(changes)
        found = port.lun_of(UNIT)
        assert found is not None
        at = lab.kernel.sysfs.of_class("scsi_device") / found.hctl / "device"
        lab.kernel._set(at / "queue_depth", "16")
        await until(port, lambda: (now := port.lun_of(UNIT)) is not None and now.queue_depth == 16)
        assert isinstance(path, NpivPath)
        assert path.workers == port._paths._credits[UNIT].limit == shares(16)[0]
        lab.kernel._set(at / "queue_depth", "1")
        assert (await take(changes)).route.medium is None
