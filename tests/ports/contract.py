"""The contract of the seam: what every Fabric does, whoever is below it.

A test file subclasses FabricContract and gives a fixture `san`: a running fabric with an array.  The
array has one target with units 0 and 1 of at least 1 MiB; everything else is asked of `San`.  What of it
a guest can do too is CommandContract by itself.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

import pytest
import trio

from vhostfc.errors import LoginRefused
from vhostfc.fc.wwn import Wwn
from vhostfc.ports.base import (
    Fabric,
    InFlight,
    Outcome,
    Path,
    Port,
    PortEventKind,
    PortIdentity,
    PortState,
    RemotePort,
    RemotePortState,
    RouteChange,
    ScsiResult,
    TaskManagement,
    TaskManagementResponse,
    Unit,
)

ME = PortIdentity(Wwn(0x5001_4380_0000_0002), Wwn(0x5001_4380_0000_0003), "vm1")
OTHER = PortIdentity(Wwn(0x5001_4380_0000_0012), Wwn(0x5001_4380_0000_0013), "vm2")
NOWHERE = Wwn(0x5006_0160_0000_9999)

TUR = bytes(6)
INQUIRY = bytes([0x12, 0, 0, 0, 96, 0])


class San(Protocol):
    """A storage area network to test with.  Changes have happened when these return; news of them may be on the way."""

    @property
    def fabric(self) -> Fabric: ...

    @property
    def target(self) -> Wwn: ...

    async def add_unit(self, number: int) -> None: ...

    async def remove_unit(self, number: int) -> None: ...

    async def grow_unit(self, number: int) -> None: ...

    async def break_links(self) -> None:
        """Break every link; new ones can be made."""
        ...


def lun(number: int) -> bytes:
    return number.to_bytes(2, "big") + bytes(6)


def read(block: int, blocks: int) -> bytes:
    return bytes([0x28, 0]) + block.to_bytes(4, "big") + b"\0" + blocks.to_bytes(2, "big") + b"\0"


def write(block: int, blocks: int) -> bytes:
    return b"\x2a" + read(block, blocks)[1:]


def sense(result: ScsiResult) -> tuple[int, int, int]:
    """Sense key, additional sense code and qualifier, of either format."""
    assert result.outcome is Outcome.COMPLETE
    assert result.status == 2, result
    data = result.sense
    return (data[1], data[2], data[3]) if data[0] & 0x7F >= 0x72 else (data[2] & 15, data[12], data[13])


async def ready(port: Port, unit: Unit) -> None:
    """Take what unit attentions there are: a unit may have several to tell a new nexus."""
    for _ in range(8):
        result = await port.execute(unit, TUR)
        if result == ScsiResult(Outcome.COMPLETE):
            return
        assert sense(result)[0] == 6, result
    raise AssertionError(f"{unit} does not become ready: {result}")


async def until_topology(port: Port, wanted: object) -> None:
    """Follow the events until the snapshot is as it should be."""
    events = port.events()
    with trio.fail_after(10):
        async for event in events:
            if event.kind is PortEventKind.TOPOLOGY and wanted():  # type: ignore[operator]
                return


def remote(port: Port, san: San) -> RemotePort:
    (found,) = [remote for remote in port.snapshot().remote_ports if remote.wwpn == san.target]
    return found


def numbers(port: Port, san: San) -> list[int]:
    return [int.from_bytes(unit.lun[:2], "big") for unit in remote(port, san).units]


async def take(changes: AsyncIterator[RouteChange]) -> RouteChange:
    """The next route: drop its medium, say that it is in force."""
    with trio.fail_after(10):
        change = await anext(changes)
    if change.route.medium is not None:
        change.route.medium.close()
    change.acknowledge()
    return change


async def take_routed(changes: AsyncIterator[RouteChange]) -> RouteChange:
    """Routes, until one leads to a medium."""
    while True:
        change = await take(changes)
        if change.route.medium is not None:
            return change


@asynccontextmanager
async def path_to(port: Port, unit: Unit) -> AsyncIterator[tuple[Path, AsyncIterator[RouteChange]]]:
    with trio.fail_after(10):
        path = await port.open_path(unit)
    assert path is not None
    assert path.unit == unit
    try:
        yield path, path.changes()
    finally:
        await path.aclose()


class CommandContract:
    """Commands, task management, and what units do while one looks.

    residuals: what carries the commands tells how much of the data was not moved.
    """

    residuals = True

    @pytest.fixture
    async def port(self, san: San) -> AsyncIterator[Port]:
        async with san.fabric.login(ME) as port:
            yield port

    # ------------------------------------------------------------ commands

    async def test_inquiry_tells_a_disk(self, san: San, port: Port) -> None:
        result = await port.execute(Unit(san.target, lun(0)), INQUIRY, data_in=96)

        assert (result.outcome, result.status, result.data_in[0]) == (Outcome.COMPLETE, 0, 0)
        assert len(result.data_in) + result.residual == 96

    async def test_what_is_written_is_read(self, san: San, port: Port) -> None:
        unit = Unit(san.target, lun(1))
        await ready(port, unit)
        data = os.urandom(1 << 20)

        assert await port.execute(unit, write(0, 2048), data_out=data) == ScsiResult(Outcome.COMPLETE)
        result = await port.execute(unit, read(0, 2048), data_in=1 << 20)
        assert (result.outcome, result.status, result.residual) == (Outcome.COMPLETE, 0, 0)
        assert result.data_in == data

    async def test_less_than_there_was_room_for_is_a_residual(self, san: San, port: Port) -> None:
        unit = Unit(san.target, lun(0))
        await ready(port, unit)
        result = await port.execute(unit, read(0, 2), data_in=4096)

        expected = (0, 1024, 3072) if self.residuals else (0, 4096, 0)
        assert (result.status, len(result.data_in), result.residual) == expected
        assert not any(result.data_in[1024:])

    async def test_an_unknown_opcode_is_a_check_condition(self, san: San, port: Port) -> None:
        unit = Unit(san.target, lun(0))
        await ready(port, unit)

        for how in ({}, {"data_in": 512}, {"data_out": bytes(512)}):
            assert sense(await port.execute(unit, bytes([0xEE] + 15 * [0]), **how)) == (5, 0x20, 0)

    async def test_a_unit_that_is_not_there_is_a_check_condition(self, san: San, port: Port) -> None:
        assert sense(await port.execute(Unit(san.target, lun(99)), TUR)) == (5, 0x25, 0)

    async def test_a_target_that_is_not_there_is_an_outcome(self, port: Port) -> None:
        assert await port.execute(Unit(NOWHERE, lun(0)), TUR) == ScsiResult(Outcome.NO_TARGET)

    async def test_many_commands_at_a_time(self, san: San, port: Port) -> None:
        unit = Unit(san.target, lun(0))
        await ready(port, unit)
        wrong: list[int] = []

        async def one(number: int) -> None:
            data = bytes([number]) * 2048
            await port.execute(unit, write(number * 4, 4), data_out=data, tag=number)
            result = await port.execute(unit, read(number * 4, 4), data_in=2048, tag=number)
            if result.data_in != data:
                wrong.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(one, number)
        assert not wrong

    # ------------------------------------------------------------ task management

    async def test_functions_that_find_nothing_are_complete(self, san: San, port: Port) -> None:
        unit = Unit(san.target, lun(0))

        for function in (
            TaskManagement.ABORT_TASK,
            TaskManagement.QUERY_TASK,
            TaskManagement.QUERY_TASK_SET,
            TaskManagement.ABORT_TASK_SET,
            TaskManagement.LOGICAL_UNIT_RESET,
        ):
            response = await port.manage(unit, function, tag=7)
            assert response is TaskManagementResponse.FUNCTION_COMPLETE, function

    async def test_functions_for_what_is_not_there(self, san: San, port: Port) -> None:
        reset = TaskManagement.LOGICAL_UNIT_RESET

        assert await port.manage(Unit(NOWHERE, lun(0)), reset) is TaskManagementResponse.NO_TARGET
        assert await port.manage(Unit(san.target, lun(99)), reset) is TaskManagementResponse.INCORRECT_LUN

    async def test_after_a_nexus_reset_the_target_answers(self, san: San, port: Port) -> None:
        unit = Unit(san.target, lun(0))
        response = await port.manage(unit, TaskManagement.I_T_NEXUS_RESET)

        assert response is TaskManagementResponse.FUNCTION_COMPLETE
        await ready(port, unit)

    # ------------------------------------------------------------ changes

    async def test_a_unit_that_comes_is_seen(self, san: San, port: Port) -> None:
        await san.add_unit(5)
        await until_topology(port, lambda: 5 in numbers(port, san))

        await ready(port, Unit(san.target, lun(5)))

    async def test_a_unit_that_goes_is_seen(self, san: San, port: Port) -> None:
        await san.remove_unit(1)
        await until_topology(port, lambda: 1 not in numbers(port, san))

        assert sense(await port.execute(Unit(san.target, lun(1)), TUR)) == (5, 0x25, 0)

    async def test_a_rescan_shows_what_there_is(self, san: San, port: Port) -> None:
        await san.add_unit(6)
        with trio.fail_after(10):
            await port.rescan()

        assert 6 in numbers(port, san)

    async def test_a_broken_link_costs_nothing_but_time(self, san: San, port: Port) -> None:
        unit = Unit(san.target, lun(0))
        await ready(port, unit)
        await port.execute(unit, write(3, 1), data_out=b"\x5a" * 512)
        await san.break_links()
        with trio.fail_after(20):
            await ready(port, unit)
            result = await port.execute(unit, read(3, 1), data_in=512)

        assert result.data_in == b"\x5a" * 512
        await until_topology(port, lambda: port.snapshot().state is PortState.ONLINE)
        assert numbers(port, san)[:2] == [0, 1]


class FabricContract(CommandContract):
    """See the head of the file."""

    # ------------------------------------------------------------ login

    async def test_after_the_login_the_snapshot_is_complete(self, san: San, port: Port) -> None:
        topology = port.snapshot()

        assert port.identity == ME
        assert topology.state is PortState.ONLINE
        assert topology.port_id
        assert topology.fabric_name
        assert remote(port, san).state is RemotePortState.ONLINE
        assert remote(port, san).wwnn
        assert remote(port, san).port_id
        assert remote(port, san).units[:2] == (Unit(san.target, lun(0)), Unit(san.target, lun(1)))

    async def test_a_wwpn_can_be_logged_in_once(self, san: San, port: Port) -> None:
        with pytest.raises(LoginRefused, match=r"50:01:43:80:00:00:00:02.*already logged in"):
            async with san.fabric.login(ME):
                pass

        assert port.snapshot().state is PortState.ONLINE

    async def test_after_the_logout_it_can_log_in_again(self, san: San) -> None:
        for _ in range(3):
            async with san.fabric.login(ME) as port:
                assert port.snapshot().state is PortState.ONLINE

    async def test_two_ports_have_addresses_of_their_own(self, san: San, port: Port) -> None:
        async with san.fabric.login(OTHER) as other:
            assert other.snapshot().port_id != port.snapshot().port_id
            assert numbers(other, san)[:2] == [0, 1]

    async def test_what_goes_wrong_inside_comes_out_as_it_is(self, san: San) -> None:
        with pytest.raises(ZeroDivisionError):
            async with san.fabric.login(ME):
                raise ZeroDivisionError

    # ------------------------------------------------------------ events

    async def test_the_first_event_says_look(self, port: Port) -> None:
        event = await anext(port.events())

        assert (event.kind, event.unit) == (PortEventKind.TOPOLOGY, None)

    # ------------------------------------------------------------ paths

    async def test_a_path_has_a_route(self, san: San, port: Port) -> None:
        unit = Unit(san.target, lun(0))
        await ready(port, unit)
        async with path_to(port, unit) as (_, changes):
            route = (await take_routed(changes)).route

            assert route.mask[0x28 // 8] & 1 << 0x28 % 8, "READ(10)"
            assert not route.gone
            assert not route.read_only

    async def test_a_unit_that_is_not_there_has_no_path(self, san: San, port: Port) -> None:
        assert await port.open_path(Unit(san.target, lun(99))) is None
        assert await port.open_path(Unit(NOWHERE, lun(0))) is None

    async def test_the_path_of_a_unit_that_goes_ends(self, san: San, port: Port) -> None:
        unit = Unit(san.target, lun(1))
        await ready(port, unit)
        async with path_to(port, unit) as (_, changes):
            await take_routed(changes)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(san.remove_unit, 1)
                with trio.fail_after(10):
                    while not (change := await take(changes)).route.gone:
                        assert change.route.medium is None
                    with pytest.raises(StopAsyncIteration):
                        await anext(changes)

    async def test_a_route_is_closed_before_a_broken_link_is_made_again(self, san: San, port: Port) -> None:
        unit = Unit(san.target, lun(0))
        await ready(port, unit)
        async with path_to(port, unit) as (_, changes):
            await take_routed(changes)
            await san.break_links()
            with trio.fail_after(10):
                closing = await anext(changes)
            assert (closing.route.medium, closing.route.mask, closing.in_flight) == (None, bytes(32), InFlight.FINISH)
            assert port.snapshot().state is PortState.LINK_DOWN

            closing.acknowledge()
            await ready(port, unit)
            await take_routed(changes)

    async def test_a_nexus_reset_closes_the_route_and_opens_it_again(self, san: San, port: Port) -> None:
        unit = Unit(san.target, lun(0))
        await ready(port, unit)
        async with path_to(port, unit) as (_, changes), trio.open_nursery() as nursery:
            await take_routed(changes)
            nursery.start_soon(port.manage, unit, TaskManagement.I_T_NEXUS_RESET)
            assert (await take(changes)).route.mask == bytes(32)
            await ready(port, unit)
            await take_routed(changes)

    async def test_a_unit_that_grows_is_noticed(self, san: San, port: Port) -> None:
        unit = Unit(san.target, lun(0))
        await ready(port, unit)
        events = port.events()
        async with path_to(port, unit) as (_, changes), trio.open_nursery() as nursery:
            await take_routed(changes)
            nursery.start_soon(san.grow_unit, 0)
            with trio.fail_after(10):
                async for event in events:
                    if event.kind is PortEventKind.PARAMETERS:
                        break
                    continue
            assert (event.unit, event.asc, event.ascq) == (unit, 0x2A, 0x09)
            nursery.cancel_scope.cancel()
