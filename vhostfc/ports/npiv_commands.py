"""Commands and task management of a vport, from here: what the workers do not send themselves.

What they send and what is sent here goes to the same /dev/sgN.  Linux takes no command back and has but one task
management function to offer, so of the others only those are done that come true: what has not been sent yet is not
sent any more; nothing of a unit is under way, so there is nothing to abort; or it is, and the function is rejected, so
that the guest resets the unit instead.

What the kernel does not give back in its time is answered without it.  It keeps its place in the unit's queue until it
is given back: what is sent must never wait in the kernel for room.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import structlog
import trio

from vhostfc.fc.wwn import Wwn
from vhostfc.ports import sg
from vhostfc.ports.base import (
    Outcome,
    RemotePortState,
    ScsiResult,
    TaskManagement,
    TaskManagementResponse,
    Unit,
)
from vhostfc.ports.kernel import (
    SG_SCSI_RESET_DEVICE,
    SG_SCSI_RESET_NO_ESCALATE,
    SG_SCSI_RESET_TARGET,
    Kernel,
)
from vhostfc.ports.npiv_paths import GRACE, Paths, transfer_limit
from vhostfc.ports.npiv_results import INQUIRY, INVALID_FIELD, REPORT_LUNS, SAM_BUSY, clamped, nobody, result_of
from vhostfc.ports.sysfs import Lun

READ_CAPACITY_10, SERVICE_ACTION_IN_16 = 0x25, 0x9E
READ_CAPACITY_16 = 0x10
#: How long a function waits for commands that it cannot end, seconds.
PATIENCE = 1.0
#: And after a reset for those that the kernel ends.
AFTER_RESET = 10.0
_LOOK = 0.01
#: The tag of commands that no guest has sent.
NO_TAG = -1
#: write(2) of a command: the kernel has no room for it now; and there cannot be such a command here.
_NO_ROOM = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EBUSY, errno.EDOM})
_IMPOSSIBLE = frozenset({errno.EINVAL, errno.EIO, errno.E2BIG})


class View(Protocol):
    """What the port sees."""

    def lun_of(self, unit: Unit) -> Lun | None:
        """Where a unit is, whether it can be reached or not; None: it is not there."""
        ...

    def state_of(self, wwpn: Wwn) -> RemotePortState | None: ...

    def is_online(self, wwpn: Wwn) -> bool:
        """Is a remote port, by what the kernel says at this moment?"""
        ...

    def units_of(self, wwpn: Wwn) -> Iterable[Unit]: ...

    async def changed(self) -> None:
        """Wait for the next change of the topology."""
        ...


class _Ended(Exception):
    """A function has ended the command before it was sent."""


class _Overtaken(Exception):
    """What was given up may still land, even on what this one would write."""


@dataclass(eq=False)
class _Task:
    """A command on its way through execute().  call: what the kernel has of it, None before it is sent."""

    unit: Unit
    tag: int
    call: sg.Call | None = None
    ended: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    returned: trio.Event = field(default_factory=trio.Event)

    def end(self) -> None:
        """If it has not been sent it will not be."""
        if self.call is None:
            self.ended = True
            self.scope.cancel()


@dataclass(eq=False)
class _Place:
    """A unit's node, opened for us.  blocks: its logical block length, None unknown."""

    lun: Lun
    file: sg.SgFile
    limit: int
    room: trio.CapacityLimiter
    block_size: int | None = None


class Commands:
    """See the head of the file.  hold: seconds for which commands wait for a path; serve: runs a task of the port's."""

    def __init__(
        self,
        kernel: Kernel,
        view: View,
        paths: Paths,
        *,
        hold: float,
        command_timeout: float,
        serve: Callable[[Callable[[], Awaitable[None]]], None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._kernel = kernel
        self._view = view
        self._paths = paths
        self._hold = hold
        self._timeout = command_timeout
        self._serve = serve
        self._log = log
        self._places: dict[Unit, _Place] = {}
        self._files: list[tuple[Unit, sg.SgFile]] = []
        self._opening = trio.Lock()
        self._host_room = trio.CapacityLimiter(32)
        self._tasks: dict[_Task, None] = {}
        self._changing: set[_Task] = set()
        self._closed = False
        self.segments = 128

    def set_host(self, can_queue: int, segments: int) -> None:
        self._host_room.total_tokens = max(1, min(32, can_queue // 4))
        self.segments = segments

    @property
    def changing(self) -> bool:
        """The kernel has a command that may change what is on a medium."""
        return bool(self._changing)

    # ------------------------------------------------------------ commands

    async def execute(
        self,
        unit: Unit,
        cdb: bytes,
        data_out: bytes = b"",
        data_in: int = 0,
        *,
        tag: int = NO_TAG,
        timeout: float | None = None,
    ) -> ScsiResult:
        """See the seam.  A command that has been sent is not sent again, whatever becomes of it."""
        task = _Task(unit, tag)
        self._tasks[task] = None
        try:
            with task.scope:
                return await self._execute(task, sg.cdb_of(cdb), data_out, data_in, timeout)
            return ScsiResult(Outcome.ABORTED)
        finally:
            del self._tasks[task]
            task.returned.set()

    async def _execute(
        self, task: _Task, cdb: bytes, data_out: bytes, data_in: int, timeout: float | None
    ) -> ScsiResult:
        unit, length = task.unit, max(len(data_out), data_in)
        await self._paths.free(unit)
        with trio.move_on_after(self._hold) as late:
            while self._view.state_of(unit.wwpn) is RemotePortState.BLOCKED:
                await self._view.changed()
        if late.cancelled_caught:
            return ScsiResult(Outcome.PATH_LOST)
        if self._view.state_of(unit.wwpn) is not RemotePortState.ONLINE:
            return ScsiResult(Outcome.NO_TARGET)
        target = self._addressed(unit, cdb)
        if target is None:
            if any(other == unit and not unit.is_disk(other.disk) for other in self._view.units_of(unit.wwpn)):
                return ScsiResult(Outcome.NO_TARGET)  # another disk stands there now
            return nobody(cdb, data_in)
        try:
            place = await self._place(target)
            if place is None:
                return ScsiResult(Outcome.NO_TARGET)
            if length > place.limit:
                return ScsiResult(Outcome.COMPLETE, 2, INVALID_FIELD, residual=length)
            if timeout is None:
                timeout = sg.timeouts(place.lun.type, self._timeout)[cdb[0]]
            with trio.move_on_after(timeout + GRACE):
                outcome = await self._send(task, place, cdb, data_out, data_in, timeout)
                result = result_of(outcome, length, online=outcome.host_status == 0 or self._view.is_online(unit.wwpn))
                return self._seen(place, cdb, result) if result.status == 0 else result
            self._log.warning("the kernel does not give commands back", unit=str(target), opcode=cdb[0])
            return ScsiResult(Outcome.TIMED_OUT)
        except _Ended:
            return ScsiResult(Outcome.ABORTED)
        except _Overtaken:
            return ScsiResult(Outcome.COMPLETE, SAM_BUSY, residual=length)
        except sg.SgGone:
            return ScsiResult(Outcome.PATH_LOST)
        except OSError as error:
            self._log.warning("a command was not taken", unit=str(target), opcode=cdb[0], reason=error.strerror)
            if error.errno in _NO_ROOM:
                return ScsiResult(Outcome.COMPLETE, SAM_BUSY, residual=length)
            if error.errno in _IMPOSSIBLE:
                return ScsiResult(Outcome.COMPLETE, 2, INVALID_FIELD, residual=length)
            return ScsiResult(Outcome.FAILED)

    async def _send(
        self, task: _Task, place: _Place, cdb: bytes, data_out: bytes, data_in: int, timeout: float
    ) -> sg.SgOutcome:
        """In a place of the unit's queue and of the host's, which the command has until the kernel gives it back."""
        await place.room.acquire_on_behalf_of(task)
        try:
            await self._host_room.acquire_on_behalf_of(task)
        except BaseException:
            place.room.release_on_behalf_of(task)
            raise

        mend: Callable[[], None] | None = None
        back = False

        def ended() -> None:
            nonlocal back
            back = True
            self._host_room.release_on_behalf_of(task)
            place.room.release_on_behalf_of(task)
            self._changing.discard(task)
            if mend is not None:
                mend()

        try:
            if task.ended:
                raise _Ended
            if data_out and self._paths.is_stale(task.unit):
                raise _Overtaken
            if data_out:
                self._changing.add(task)
            task.call = place.file.submit(cdb, data_out=data_out, data_in=data_in, timeout=timeout, ended=ended)
        except BaseException:
            ended()
            raise
        try:
            return await task.call.wait()
        finally:
            if data_out and not back:
                mend = self._paths.spoil(task.unit)

    def _addressed(self, unit: Unit, cdb: bytes) -> Unit | None:
        """The unit that takes the command: for REPORT LUNS any of the target will do (SPC-5 6.33)."""
        lun = self._view.lun_of(unit)
        if lun is not None and lun.sg is not None:
            return unit
        if cdb[0] == REPORT_LUNS:
            return next(iter(self._view.units_of(unit.wwpn)), None)
        return None

    async def _place(self, unit: Unit) -> _Place | None:
        """Raises SgGone when the unit cannot be opened, or the port is logged out."""
        async with self._opening:
            lun = self._view.lun_of(unit)
            if lun is None or not unit.is_disk(lun.disk):
                return None
            place = self._places.get(unit)
            if place is not None and not place.file.closed and (place.lun.hctl, place.lun.sg) == (lun.hctl, lun.sg):
                place.room.total_tokens = self._paths.shares(lun)[1]
                return place
            if place is not None:
                place.file.close()
            try:
                (fd,), limit = await self._kernel.open_units(lun, 1)
            except OSError as error:
                self._log.error("cannot open a unit", unit=str(unit), reason=f"{error.filename}: {error.strerror}")
                raise sg.SgGone(error.errno, error.strerror) from error
            file = sg.SgFile(fd)
            if self._closed:
                file.close()
                raise sg.SgGone(errno.ENODEV, "the port is logged out")
            self._serve(file.serve)
            self._files = [(one, other) for one, other in self._files if not other.closed or other.in_flight]
            self._files.append((unit, file))
            room = trio.CapacityLimiter(self._paths.shares(lun)[1])
            place = _Place(lun, file, transfer_limit(limit, self.segments), room)
            self._places[unit] = place
            return place

    def look_again(self) -> None:
        """The topology changed: what is not there any more is closed."""
        for unit, place in list(self._places.items()):
            lun = self._view.lun_of(unit)
            if lun is None or (lun.hctl, lun.sg) != (place.lun.hctl, place.lun.sg):
                place.file.close()
                del self._places[unit]

    def close(self) -> None:
        self._closed = True
        for place in self._places.values():
            place.file.close()
        self._places.clear()

    # ------------------------------------------------------------ what is looked at on its way

    def _seen(self, place: _Place, cdb: bytes, result: ScsiResult) -> ScsiResult:
        data = result.data_in
        if cdb[0] == READ_CAPACITY_10 and len(data) >= 8:
            place.block_size = int.from_bytes(data[4:8], "big")
        elif cdb[0] == SERVICE_ACTION_IN_16 and cdb[1] & 0x1F == READ_CAPACITY_16 and len(data) >= 12:
            place.block_size = int.from_bytes(data[8:12], "big")
        elif cdb[0] == INQUIRY and cdb[1] & 1 and cdb[2] == 0xB0 and len(data) >= 16 and data[0] & 0x1F == 0:
            # Unknown: the longest that disks have, so that the limit is not too high.
            blocks = place.limit // (place.block_size or 4096)
            return replace(result, data_in=clamped(data, blocks))
        return result

    # ------------------------------------------------------------ task management

    async def manage(self, unit: Unit, function: TaskManagement, tag: int | None) -> TaskManagementResponse:
        """See the seam, and the head of the file."""
        state = self._view.state_of(unit.wwpn)
        if state in {None, RemotePortState.NOT_PRESENT}:
            return TaskManagementResponse.NO_TARGET
        if function is TaskManagement.I_T_NEXUS_RESET:
            return await self._reset_target(unit.wwpn)
        lun = self._view.lun_of(unit)
        if lun is None:
            return TaskManagementResponse.INCORRECT_LUN
        tasks = [task for task in self._tasks if task.unit == unit and task.tag != NO_TAG]
        match function:
            case TaskManagement.QUERY_TASK | TaskManagement.QUERY_TASK_SET:
                found = any(function is TaskManagement.QUERY_TASK_SET or task.tag == tag for task in tasks)
                return TaskManagementResponse.FUNCTION_SUCCEEDED if found else TaskManagementResponse.FUNCTION_COMPLETE
            case TaskManagement.ABORT_TASK:
                return await self._abort(unit, [task for task in tasks if task.tag == tag])
            case TaskManagement.ABORT_TASK_SET:
                for task in tasks:
                    task.end()
                if await self._quiet([unit], PATIENCE):
                    return TaskManagementResponse.FUNCTION_COMPLETE
                return TaskManagementResponse.FUNCTION_REJECTED
            case TaskManagement.LOGICAL_UNIT_RESET:
                if state is not RemotePortState.ONLINE:  # the kernel would wait for dev_loss_tmo
                    return TaskManagementResponse.DELIVERY_FAILURE
                return await self._end_all([unit], partial(self._reset, lun, SG_SCSI_RESET_DEVICE))
            case _:
                return TaskManagementResponse.FUNCTION_REJECTED

    async def _abort(self, unit: Unit, tasks: list[_Task]) -> TaskManagementResponse:
        """These; or the one that is not known here: then the workers may have sent it, who cannot tell theirs apart."""
        for task in tasks:
            task.end()
        if not tasks:
            done = await self._quiet([unit], PATIENCE)
        else:
            with trio.move_on_after(PATIENCE) as late:
                for task in tasks:
                    await task.returned.wait()
            done = not late.cancelled_caught
        return TaskManagementResponse.FUNCTION_COMPLETE if done else TaskManagementResponse.FUNCTION_REJECTED

    async def _reset_target(self, wwpn: Wwn) -> TaskManagementResponse:
        """All of the target's units, by the driver's target reset, or one by one where it has none."""
        if self._view.state_of(wwpn) is not RemotePortState.ONLINE:
            return TaskManagementResponse.DELIVERY_FAILURE
        units = list(self._view.units_of(wwpn))
        luns = [lun for lun in map(self._view.lun_of, units) if lun is not None]

        async def reset() -> bool:
            done = True
            if luns and not await self._reset(luns[0], SG_SCSI_RESET_TARGET):
                for lun in luns:
                    done &= await self._reset(lun, SG_SCSI_RESET_DEVICE)
            return done

        return await self._end_all(units, reset)

    async def _end_all(self, units: list[Unit], reset: Callable[[], Awaitable[bool]]) -> TaskManagementResponse:
        """A reset of these units.  What comes meanwhile waits: what is under way then is what the reset is about."""
        for task in self._tasks:
            if task.unit in units:
                task.end()
        self._paths.take(units)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._paths.hold, units)
                done = await reset()
                nursery.cancel_scope.deadline = trio.current_time() + AFTER_RESET if done else -math.inf
            done = done and await self._quiet(units, AFTER_RESET)
        finally:
            with trio.CancelScope(shield=True):
                await self._paths.release(units)
        return TaskManagementResponse.FUNCTION_COMPLETE if done else TaskManagementResponse.DELIVERY_FAILURE

    async def _reset(self, lun: Lun, level: int) -> bool:
        """Without escalation: a host reset would log the vport out."""
        try:
            await self._kernel.reset(lun, level | SG_SCSI_RESET_NO_ESCALATE)
        except OSError as error:
            self._log.info("reset refused", unit=lun.hctl, level=level, reason=error.strerror)
            return False
        return True

    async def _quiet(self, units: Iterable[Unit], patience: float) -> bool:
        """Wait until the kernel has no command of these units any more."""
        units = list(units)
        with trio.move_on_after(patience):
            while any(file.in_flight for unit, file in self._files if unit in units) or any(
                self._paths.in_flight(unit) for unit in units
            ):
                await trio.sleep(_LOOK)
            return True
        return False
