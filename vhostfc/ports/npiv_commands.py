"""Commands and task management of a vport, from here: what the workers do not send themselves.

What they send and what is sent here goes to the same /dev/sgN.  Linux takes no command back and has but one task
management function to offer, so of the others only those are done that come true: nothing of a unit is under way, so
there is nothing to abort; or it is, and the function is rejected, so that the guest resets the unit instead.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
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
from vhostfc.ports.npiv_paths import Paths, shares, transfer_limit
from vhostfc.ports.sysfs import Lun

INQUIRY, READ_CAPACITY_10, SERVICE_ACTION_IN_16, REPORT_LUNS = 0x12, 0x25, 0x9E, 0xA0
READ_CAPACITY_16 = 0x10
#: ILLEGAL REQUEST, LOGICAL UNIT NOT SUPPORTED.
NO_SUCH_UNIT = bytes.fromhex("700005000000000a00000000250000000000")
#: ILLEGAL REQUEST, INVALID FIELD IN CDB.
INVALID_FIELD = bytes.fromhex("700005000000000a00000000240000000000")
#: Peripheral qualifier 3, device type 1Fh: no device can be here (SPC-5 6.6.2).
NOTHING_HERE = bytes([0x7F, 0, 6, 2, 31]) + bytes(31)
SAM_BUSY, SAM_RESERVATION_CONFLICT = 0x08, 0x18
#: How long a function waits for commands that it cannot end, seconds.
PATIENCE = 1.0
#: And after a reset for those that the kernel ends.
AFTER_RESET = 10.0
_LOOK = 0.01

#: host_status of struct sg_io_hdr, in the seam's words; what is not here is RETRY.
_OUTCOMES = {
    0x01: Outcome.PATH_LOST,  # DID_NO_CONNECT
    0x03: Outcome.TIMED_OUT,  # DID_TIME_OUT
    0x04: Outcome.NO_TARGET,  # DID_BAD_TARGET
    0x05: Outcome.ABORTED,  # DID_ABORT
    0x08: Outcome.ABORTED,  # DID_RESET
    0x0E: Outcome.PATH_LOST,  # DID_TRANSPORT_DISRUPTED
    0x0F: Outcome.PATH_LOST,  # DID_TRANSPORT_FAILFAST
    0x14: Outcome.PATH_LOST,  # DID_TRANSPORT_MARGINAL
}
_STATUSES = {
    0x02: SAM_BUSY,  # DID_BUS_BUSY
    0x0B: SAM_BUSY,  # DID_SOFT_ERROR
    0x0C: SAM_BUSY,  # DID_IMM_RETRY
    0x0D: SAM_BUSY,  # DID_REQUEUE
    0x11: SAM_RESERVATION_CONFLICT,  # DID_NEXUS_FAILURE, before Linux 5.17
}


def result_of(outcome: sg.SgOutcome, length: int) -> ScsiResult:
    """The end of a command as the seam has it."""
    if outcome.host_status in _STATUSES:
        return ScsiResult(Outcome.COMPLETE, _STATUSES[outcome.host_status], residual=length)
    if outcome.host_status:
        return ScsiResult(_OUTCOMES.get(outcome.host_status, Outcome.RETRY))
    return ScsiResult(
        Outcome.COMPLETE, outcome.status, outcome.sense, data_in=outcome.data_in, residual=outcome.residual
    )


class View(Protocol):
    """What the port sees."""

    def lun_of(self, unit: Unit) -> Lun | None:
        """Where a unit is, whether it can be reached or not; None: it is not there."""
        ...

    def state_of(self, wwpn: Wwn) -> RemotePortState | None: ...

    def units_of(self, wwpn: Wwn) -> Iterable[Unit]: ...

    async def changed(self) -> None:
        """Wait for the next change of the topology."""
        ...


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
        self._opening = trio.Lock()
        self._host_room = trio.CapacityLimiter(32)
        self._tags: dict[Unit, list[int]] = {}
        self.segments = 128

    def set_host(self, can_queue: int, segments: int) -> None:
        self._host_room.total_tokens = max(1, min(32, can_queue // 4))
        self.segments = segments

    # ------------------------------------------------------------ commands

    async def execute(
        self,
        unit: Unit,
        cdb: bytes,
        data_out: bytes = b"",
        data_in: int = 0,
        *,
        tag: int = 0,
        timeout: float | None = None,
    ) -> ScsiResult:
        """See the seam.  A command that has been sent is not sent again, whatever becomes of it."""
        cdb = sg.cdb_of(cdb)
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
            return _nobody(cdb, data_in)
        try:
            place = await self._place(target)
        except OSError as error:
            self._log.error("cannot open a unit", unit=str(target), reason=f"{error.filename}: {error.strerror}")
            return ScsiResult(Outcome.PATH_LOST)
        if place is None:
            return ScsiResult(Outcome.NO_TARGET)
        return await self._run(target, place, cdb, data_out, data_in, tag, timeout)

    async def _run(
        self, unit: Unit, place: _Place, cdb: bytes, data_out: bytes, data_in: int, tag: int, timeout: float | None
    ) -> ScsiResult:
        if max(len(data_out), data_in) > place.limit:
            return ScsiResult(Outcome.COMPLETE, 2, INVALID_FIELD, residual=max(len(data_out), data_in))
        if timeout is None:
            timeout = sg.timeouts(place.lun.type, self._timeout)[cdb[0]]
        tags = self._tags.setdefault(unit, [])
        tags.append(tag)
        try:
            async with place.room, self._host_room:
                outcome = await place.file.run(cdb, data_out=data_out, data_in=data_in, timeout=timeout)
        except sg.SgGone:
            return ScsiResult(Outcome.PATH_LOST)
        except OSError as error:
            self._log.warning("a command was not taken", unit=str(unit), opcode=cdb[0], reason=error.strerror)
            return ScsiResult(Outcome.COMPLETE, SAM_BUSY, residual=max(len(data_out), data_in))
        finally:
            tags.remove(tag)
        result = result_of(outcome, max(len(data_out), data_in))
        return self._seen(place, cdb, result) if result.status == 0 else result

    def _addressed(self, unit: Unit, cdb: bytes) -> Unit | None:
        """The unit that takes the command: for REPORT LUNS any of the target will do (SPC-5 6.33)."""
        lun = self._view.lun_of(unit)
        if lun is not None and lun.sg is not None:
            return unit
        if cdb[0] == REPORT_LUNS:
            return next(iter(self._view.units_of(unit.wwpn)), None)
        return None

    async def _place(self, unit: Unit) -> _Place | None:
        async with self._opening:
            lun = self._view.lun_of(unit)
            if lun is None or not unit.is_disk(lun.disk):
                return None
            place = self._places.get(unit)
            if place is not None and place.file.fd >= 0 and (place.lun.hctl, place.lun.sg) == (lun.hctl, lun.sg):
                place.room.total_tokens = shares(lun.queue_depth)[1]
                return place
            if place is not None:
                place.file.close()
            (fd,), limit = await self._kernel.open_units(lun, 1)
            file = sg.SgFile(fd)
            self._serve(file.serve)
            room = trio.CapacityLimiter(shares(lun.queue_depth)[1])
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
        match function:
            case TaskManagement.QUERY_TASK | TaskManagement.QUERY_TASK_SET:
                tags = self._tags.get(unit, [])
                found = bool(tags) if tag is None or function is TaskManagement.QUERY_TASK_SET else tag in tags
                return TaskManagementResponse.FUNCTION_SUCCEEDED if found else TaskManagementResponse.FUNCTION_COMPLETE
            case TaskManagement.ABORT_TASK | TaskManagement.ABORT_TASK_SET:
                if await self._quiet([unit], PATIENCE):
                    return TaskManagementResponse.FUNCTION_COMPLETE
                return TaskManagementResponse.FUNCTION_REJECTED
            case TaskManagement.LOGICAL_UNIT_RESET:
                if state is not RemotePortState.ONLINE:  # the kernel would wait for dev_loss_tmo
                    return TaskManagementResponse.DELIVERY_FAILURE
                if await self._reset(lun, SG_SCSI_RESET_DEVICE) and await self._quiet([unit], AFTER_RESET):
                    return TaskManagementResponse.FUNCTION_COMPLETE
                return TaskManagementResponse.DELIVERY_FAILURE
            case _:
                return TaskManagementResponse.FUNCTION_REJECTED

    async def _reset_target(self, wwpn: Wwn) -> TaskManagementResponse:
        """All of the target's units, by the driver's target reset, or one by one where it has none."""
        units = list(self._view.units_of(wwpn))
        if self._view.state_of(wwpn) is not RemotePortState.ONLINE:
            return TaskManagementResponse.DELIVERY_FAILURE
        luns = [lun for lun in map(self._view.lun_of, units) if lun is not None]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._paths.hold, units)
            done = True
            if luns and not await self._reset(luns[0], SG_SCSI_RESET_TARGET):
                for lun in luns:
                    done &= await self._reset(lun, SG_SCSI_RESET_DEVICE)
        try:
            done &= await self._quiet(units, AFTER_RESET)
        finally:
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
            while any(self._tags.get(unit) or self._paths.in_flight(unit) for unit in units):
                await trio.sleep(_LOOK)
            return True
        return False


def clamped(page: bytes, blocks: int) -> bytes:
    """A Block Limits page (SBC-4 6.6.4) that allows no longer transfers than these; 0 says nothing, so it says ours."""
    maximum, optimal = (int.from_bytes(page[at : at + 4], "big") for at in (8, 12))
    maximum = min(maximum or blocks, blocks)
    return page[:8] + maximum.to_bytes(4, "big") + min(optimal, maximum).to_bytes(4, "big") + page[16:]


def _nobody(cdb: bytes, room: int) -> ScsiResult:
    """What a target says for a LUN that it does not have, when no unit of it can be asked (SPC-5 6.6, 6.33)."""
    if cdb[0] not in {INQUIRY, REPORT_LUNS}:
        return ScsiResult(Outcome.COMPLETE, 2, NO_SUCH_UNIT, residual=room)
    if cdb[0] == INQUIRY:
        if cdb[1] & 1:
            return ScsiResult(Outcome.COMPLETE, 2, INVALID_FIELD, residual=room)
        data = NOTHING_HERE
        allocated = int.from_bytes(cdb[3:5], "big")
    else:
        data = bytes(8)
        allocated = int.from_bytes(cdb[6:10], "big")
    data = data[: min(allocated, room)]
    return ScsiResult(Outcome.COMPLETE, data_in=data, residual=room - len(data))
