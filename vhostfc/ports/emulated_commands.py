"""Commands and task management functions of an emulated port: waiting for paths, running again, ending.

A command whose path is lost waits for it.  One that was under way when it was lost is run again if a
second run cannot be told from the first: the guest has heard of neither.  Everything else goes back to
the guest, which knows what it meant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from vhostfc.fc.fcp import ResponseCode, TmFlag
from vhostfc.fc.frame import FrameError
from vhostfc.fc.initiator import Command, CommandResult, End, Management
from vhostfc.fc.nport import LocalState, NPort
from vhostfc.fc.remote import RemotePort, RemoteState
from vhostfc.ports.base import Outcome, ScsiResult, TaskManagement, TaskManagementResponse, Unit

#: How often one command is begun before the guest is told to retry by itself.
_TRIES = 5

#: Opcodes whose second run cannot be told from the first: they read, or write the same blocks again.
RUN_AGAIN = frozenset(
    {
        0x00,  # TEST UNIT READY
        0x12,  # INQUIRY
        0xA0,  # REPORT LUNS
        *(0x08, 0x28, 0xA8, 0x88),  # READ 6, 10, 12, 16
        *(0x0A, 0x2A, 0xAA, 0x8A),  # WRITE 6, 10, 12, 16
        *(0x2F, 0xAF, 0x8F),  # VERIFY 10, 12, 16
        *(0x35, 0x91),  # SYNCHRONIZE CACHE 10, 16
        *(0x1A, 0x5A),  # MODE SENSE 6, 10
        *(0x25, 0x9E),  # READ CAPACITY 10, SERVICE ACTION IN (16): READ CAPACITY 16, GET LBA STATUS
        0xA3,  # MAINTENANCE IN: the reports
    }
)

_FLAGS = {
    TaskManagement.ABORT_TASK_SET: TmFlag.ABORT_TASK_SET,
    TaskManagement.CLEAR_TASK_SET: TmFlag.CLEAR_TASK_SET,
    TaskManagement.LOGICAL_UNIT_RESET: TmFlag.LOGICAL_UNIT_RESET,
    TaskManagement.CLEAR_ACA: TmFlag.CLEAR_ACA,
}
#: Functions after which no command of the unit is left.
_ENDS_UNIT = frozenset(
    {TaskManagement.ABORT_TASK_SET, TaskManagement.CLEAR_TASK_SET, TaskManagement.LOGICAL_UNIT_RESET}
)
_RESPONSES = {
    ResponseCode.COMPLETE: TaskManagementResponse.FUNCTION_COMPLETE,
    ResponseCode.SUCCEEDED: TaskManagementResponse.FUNCTION_SUCCEEDED,
    ResponseCode.REJECTED: TaskManagementResponse.FUNCTION_REJECTED,
    ResponseCode.INCORRECT_LUN: TaskManagementResponse.INCORRECT_LUN,
}


@dataclass(eq=False, slots=True)
class _Running:
    """A command on its way through execute().

    command: its exchange, None while it waits for the path.  ended: a task management function has ended it.
    """

    unit: Unit
    tag: int
    command: Command | None = None
    result: CommandResult | None = None
    ended: bool = False
    news: trio.Event = field(default_factory=trio.Event)
    returned: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False, slots=True)
class _Managing:
    code: int | None = None
    done: trio.Event = field(default_factory=trio.Event)


class Commands:
    """pump: sends what the engine has to send, and acts on its events."""

    def __init__(self, engine: NPort, *, hold: float, timeout: float, pump: Callable[[], None]) -> None:
        self._engine = engine
        self._hold = hold
        self._timeout = timeout
        self._pump = pump
        self._running: dict[_Running, None] = {}
        self._by_command: dict[Command, _Running] = {}
        self._managing: dict[Management, _Managing] = {}
        self._topology = trio.Event()

    # ---------------------------------------------------------------- what the engine tells

    def look_again(self) -> None:
        """Paths came or went."""
        self._topology.set()
        self._topology = trio.Event()
        for running in self._running:
            if running.command is None:
                running.news.set()

    def done(self, command: Command, result: CommandResult) -> None:
        running = self._by_command.pop(command, None)
        if running is not None:
            running.command = None
            running.result = result
            running.news.set()

    def managed(self, management: Management, code: int | None) -> None:
        managing = self._managing.pop(management, None)
        if managing is not None:
            managing.code = code
            managing.done.set()

    # ---------------------------------------------------------------- commands

    async def execute(
        self, unit: Unit, cdb: bytes, data_out: bytes, data_in: int, attribute: int, tag: int
    ) -> ScsiResult:
        """Run a command: see the seam."""
        running = _Running(unit, tag)
        self._running[running] = None
        try:
            outcome = await self._wait_for_path(running)
            for _ in range(_TRIES):
                if outcome is not None:
                    return ScsiResult(outcome)
                result = await self._run(running, cdb, data_out, data_in, attribute)
                if running.ended and result.end is not End.COMPLETE:
                    return ScsiResult(Outcome.ABORTED)
                match result.end:
                    case End.COMPLETE:
                        return ScsiResult(
                            Outcome.COMPLETE,
                            result.status,
                            result.sense,
                            result.data_in,
                            result.residual,
                            result.status_qualifier,
                        )
                    case End.TIMED_OUT:
                        return ScsiResult(Outcome.TIMED_OUT)
                    case End.ABORTED:
                        return ScsiResult(Outcome.ABORTED)
                    case End.LOST if cdb[0] in RUN_AGAIN:
                        outcome = await self._wait_for_path(running)
                    case _:
                        return ScsiResult(Outcome.RETRY)
            return ScsiResult(Outcome.RETRY)
        finally:
            del self._running[running]
            if running.command is not None:  # cancelled: nobody waits for it any more
                self._by_command.pop(running.command, None)
                self._engine.abort(running.command, trio.current_time())
                self._pump()
            running.returned.set()

    async def _wait_for_path(self, running: _Running) -> Outcome | None:
        """None when commands can go to the unit's port; else how a command ends that cannot wait longer."""
        waited = False
        with trio.move_on_after(self._hold):
            while not running.ended:
                remote = self._engine.remotes.get(running.unit.wwpn)
                if remote is None or remote.state in (RemoteState.GONE, RemoteState.NOT_TARGET):
                    return Outcome.PATH_LOST if waited else Outcome.NO_TARGET
                if self._reachable(remote):
                    # A LUN that is not listed is the target's to answer for.
                    there = running.unit.is_disk(remote.names.get(running.unit.lun, b""))
                    return None if there else Outcome.NO_TARGET
                waited = True
                running.news = trio.Event()
                await running.news.wait()
        return Outcome.ABORTED if running.ended else Outcome.PATH_LOST

    def _reachable(self, remote: RemotePort) -> bool:
        return self._engine.state is LocalState.READY and remote.usable

    async def _run(self, running: _Running, cdb: bytes, data_out: bytes, data_in: int, attribute: int) -> CommandResult:
        running.result = None
        try:
            running.command = self._engine.start_command(
                self._engine.remotes[running.unit.wwpn],
                running.unit.lun,
                cdb,
                trio.current_time(),
                data_out=data_out,
                data_in_length=data_in,
                attribute=attribute,
                timeout=self._timeout,
            )
        except FrameError:  # too many exchanges; the CDB's length was the guest's to get right
            return CommandResult(End.FAILED)
        self._by_command[running.command] = running
        self._pump()
        while running.result is None:
            running.news = trio.Event()
            await running.news.wait()
        return running.result

    # ---------------------------------------------------------------- task management

    async def manage(self, unit: Unit, function: TaskManagement, tag: int | None) -> TaskManagementResponse:
        """Run a task management function: see the seam."""
        concerned = [running for running in self._running if running.unit == unit]
        match function:
            case TaskManagement.QUERY_TASK_SET:
                return _found(concerned)
            case TaskManagement.QUERY_TASK:
                return _found([running for running in concerned if running.tag == tag])
            case TaskManagement.ABORT_TASK:
                aborted = [running for running in concerned if running.tag == tag]
                await self._end(aborted)
                if any(running.result is not None and running.result.end is End.TIMED_OUT for running in aborted):
                    return TaskManagementResponse.DELIVERY_FAILURE
                return TaskManagementResponse.FUNCTION_COMPLETE
            case TaskManagement.I_T_NEXUS_RESET:
                return await self._reset_nexus(unit)
            case _:
                return await self._send(unit, function, concerned)

    async def _send(self, unit: Unit, function: TaskManagement, concerned: list[_Running]) -> TaskManagementResponse:
        remote = await self._remote(unit)
        if isinstance(remote, TaskManagementResponse):
            return remote
        managing = _Managing()
        management = self._engine.manage(remote, unit.lun, _FLAGS[function], self._timeout, trio.current_time())
        self._managing[management] = managing
        self._pump()
        try:
            await managing.done.wait()
        finally:
            self._managing.pop(management, None)
        if managing.code is None:
            return TaskManagementResponse.DELIVERY_FAILURE
        response = _RESPONSES.get(ResponseCode(managing.code)) if managing.code in list(ResponseCode) else None
        if response is TaskManagementResponse.FUNCTION_COMPLETE and function in _ENDS_UNIT:
            await self._end(concerned)
        return response or TaskManagementResponse.DELIVERY_FAILURE

    async def _reset_nexus(self, unit: Unit) -> TaskManagementResponse:
        """LOGO and a new login: FCP has no function for it (FCP-4 4.9)."""
        remote = await self._remote(unit)
        if isinstance(remote, TaskManagementResponse):
            return remote
        concerned = [running for running in self._running if running.unit.wwpn == unit.wwpn]
        for running in concerned:
            running.ended = True
        self._engine.reset_nexus(remote, trio.current_time())
        self._pump()
        await self._end(concerned)
        back = await self._remote(unit)
        return (
            TaskManagementResponse.DELIVERY_FAILURE
            if isinstance(back, TaskManagementResponse)
            else (TaskManagementResponse.FUNCTION_COMPLETE)
        )

    async def _remote(self, unit: Unit) -> RemotePort | TaskManagementResponse:
        """The unit's port once it can be reached, or what to answer when it cannot."""
        with trio.move_on_after(self._hold):
            while True:
                remote = self._engine.remotes.get(unit.wwpn)
                if remote is None or remote.state in (RemoteState.GONE, RemoteState.NOT_TARGET):
                    return TaskManagementResponse.NO_TARGET
                if self._reachable(remote):
                    return remote
                await self._topology.wait()
        return TaskManagementResponse.DELIVERY_FAILURE

    async def _end(self, concerned: list[_Running]) -> None:
        """End these commands, by ABTS where they are under way, and wait until their callers have the result."""
        now = trio.current_time()
        for running in concerned:
            running.ended = True
            running.news.set()
            if running.command is not None:
                self._engine.abort(running.command, now)
        self._pump()
        for running in concerned:
            await running.returned.wait()


def _found(tasks: list[_Running]) -> TaskManagementResponse:
    return TaskManagementResponse.FUNCTION_SUCCEEDED if tasks else TaskManagementResponse.FUNCTION_COMPLETE
