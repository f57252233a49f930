"""What the workers do not decide: punted commands and control requests, answered through the port.

A punt becomes a command on the port and its end becomes a virtio-scsi response.  A task management
function runs at the target first (so that nothing of the command can happen there any more), then in
the workers (so that its completion is in the guest's used ring), and is answered last
(virtio 1.2, 5.6.6.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
import trio

from vhostfc.daemon.units import Units, lun_bytes, lun_number
from vhostfc.daemon.workers import Match, Workers
from vhostfc.fc.wwn import Wwn
from vhostfc.native import Event, Why
from vhostfc.ports.base import Outcome, Port, ScsiResult, TaskManagement, TaskManagementResponse, Unit
from vhostfc.scsi.sense import Asc, Sense, SenseKey
from vhostfc.virtio import scsi as virtio

REPORT_LUNS = 0xA0
SYNCHRONIZE_CACHE = frozenset((0x35, 0x91))
CHECK_CONDITION = 0x02
#: A LUN that no target has: what a driver names by a method that virtio-scsi does not know (SAM-5 4.7.7.1, 11b).
NOWHERE = b"\xff" * 8
#: Task attributes: virtio 1.2 5.6.6.1 numbers to FCP-4's.
FCP_ATTRIBUTE = {0: 0, 1: 2, 2: 1, 3: 4}
#: The end of a flush that has failed in a worker: what was lost then, another flush cannot find.
_LOST = ScsiResult(Outcome.COMPLETE, CHECK_CONDITION, Sense(SenseKey.MEDIUM_ERROR, Asc.WRITE_ERROR).encode())

_RESPONSE = {
    Outcome.NO_TARGET: virtio.Response.BAD_TARGET,
    Outcome.PATH_LOST: virtio.Response.TRANSPORT_FAILURE,
    Outcome.RETRY: virtio.Response.RESET,
    Outcome.TIMED_OUT: virtio.Response.TRANSPORT_FAILURE,
    Outcome.ABORTED: virtio.Response.RESET,
    Outcome.GIVEN_UP: virtio.Response.ABORTED,
    Outcome.FAILED: virtio.Response.FAILURE,
    Outcome.TARGET_FAILED: virtio.Response.TARGET_FAILURE,
}
_FUNCTION: dict[int, TaskManagement] = {
    virtio.TmfSubtype.ABORT_TASK: TaskManagement.ABORT_TASK,
    virtio.TmfSubtype.ABORT_TASK_SET: TaskManagement.ABORT_TASK_SET,
    virtio.TmfSubtype.CLEAR_ACA: TaskManagement.CLEAR_ACA,
    virtio.TmfSubtype.CLEAR_TASK_SET: TaskManagement.CLEAR_TASK_SET,
    virtio.TmfSubtype.I_T_NEXUS_RESET: TaskManagement.I_T_NEXUS_RESET,
    virtio.TmfSubtype.LOGICAL_UNIT_RESET: TaskManagement.LOGICAL_UNIT_RESET,
    virtio.TmfSubtype.QUERY_TASK: TaskManagement.QUERY_TASK,
    virtio.TmfSubtype.QUERY_TASK_SET: TaskManagement.QUERY_TASK_SET,
}
_TMF_RESPONSE = {
    TaskManagementResponse.FUNCTION_COMPLETE: virtio.Response.FUNCTION_COMPLETE,
    TaskManagementResponse.FUNCTION_SUCCEEDED: virtio.Response.FUNCTION_SUCCEEDED,
    TaskManagementResponse.FUNCTION_REJECTED: virtio.Response.FUNCTION_REJECTED,
    TaskManagementResponse.INCORRECT_LUN: virtio.Response.INCORRECT_LUN,
    TaskManagementResponse.NO_TARGET: virtio.Response.BAD_TARGET,
    TaskManagementResponse.DELIVERY_FAILURE: virtio.Response.TARGET_FAILURE,
}
#: What a function does to the guest's own commands: how they are answered, and which it means.
_ENDS = {
    TaskManagement.ABORT_TASK: virtio.Response.ABORTED,
    TaskManagement.ABORT_TASK_SET: virtio.Response.ABORTED,
    TaskManagement.CLEAR_TASK_SET: virtio.Response.ABORTED,
    TaskManagement.LOGICAL_UNIT_RESET: virtio.Response.RESET,
    TaskManagement.I_T_NEXUS_RESET: virtio.Response.RESET,
}


def response_of(result: ScsiResult) -> int:
    """The virtio-scsi response for the end of a command (virtio 1.2, 5.6.6.1.1)."""
    if result.outcome is not Outcome.COMPLETE:
        return _RESPONSE[result.outcome]
    if result.residual < 0 and result.status == 0:
        return virtio.Response.OVERRUN  # the device had more than the guest made room for
    return virtio.Response.OK


def listed_luns(parameter_data: bytes) -> frozenset[bytes] | None:
    """The LUNs in REPORT LUNS parameter data (SPC-4 6.33), or None when the list is cut short."""
    if len(parameter_data) < 8:
        return None
    length = int.from_bytes(parameter_data[:4], "big")
    if len(parameter_data) < 8 + length:
        return None
    return frozenset(parameter_data[at : at + 8] for at in range(8, 8 + length, 8))


def _means(match: Match, event: Event) -> bool:
    """Is this command among those that a task management function is about?"""
    address = virtio.decode_lun(event.lun)
    return (
        event.target == match.target
        and (match.lun is None or (address is not None and address.lun == match.lun))
        and (match.tag is None or event.tag == match.tag)
    )


@dataclass(eq=False, slots=True)
class _Punt:
    """A command on its way through punt()."""

    event: Event
    unit: Unit
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Commands:
    """See the head of the file.  `look_again` is called when the guest's own REPORT LUNS shows a change."""

    def __init__(
        self,
        *,
        workers: Workers,
        units: Units,
        look_again: Callable[[], None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.port: Port | None = None
        self._workers = workers
        self._units = units
        self._look_again = look_again
        self._log = log
        self._running: dict[int, _Punt] = {}
        self._ending: list[Match] = []

    # ------------------------------------------------------------ commands

    def _unit(self, target: int, lun: bytes) -> Unit | None:
        """The unit that a guest's LUN field names; one that the fabric does not show goes to the target as it is."""
        wwpn = self._units.wwpn(target)
        if wwpn is None:
            return None
        if lun == virtio.REPORT_LUNS_WELL_KNOWN:
            return Unit(wwpn, lun)
        address = virtio.decode_lun(lun)
        if address is None or address.lun is None:
            return Unit(wwpn, NOWHERE)
        return self._units.unit(target, address.lun) or Unit(wwpn, lun_bytes(address.lun))

    async def punt(self, event: Event) -> None:
        """Run one punted command and answer it."""
        unit = self._unit(event.target, event.lun)
        if unit is None or self.port is None:
            result = ScsiResult(Outcome.NO_TARGET)
        else:
            punt = self._running[event.handle] = _Punt(event, unit)
            try:
                with punt.scope:
                    result = await self.port.execute(
                        unit,
                        virtio.cdb_of(event.cdb),
                        data_out=event.data_out,
                        data_in=event.data_in_length,
                        attribute=FCP_ATTRIBUTE.get(event.attribute, 0),
                        tag=event.tag,
                    )
            finally:
                del self._running[event.handle]
            if punt.scope.cancelled_caught:
                return
        if event.why is Why.MEDIUM and event.cdb[0] in SYNCHRONIZE_CACHE and result == ScsiResult(Outcome.COMPLETE):
            result = _LOST
        self._workers.reply(event, result, self._response(event, result))
        if unit is not None and event.cdb[0] == REPORT_LUNS and result.outcome is Outcome.COMPLETE:
            self._compare(event.target, result.data_in)

    async def ring_stopped(self, index: int | None) -> None:
        """The workers have answered all commands of a ring, None: of every ring: none of them may run any more."""
        await trio.lowlevel.checkpoint()  # punts that were told of before the ring stopped have begun
        for punt in self._running.values():
            if index is None or punt.event.index == index:
                punt.scope.cancel()

    def _response(self, event: Event, result: ScsiResult) -> int:
        """As response_of(), but a command that a function has ended is answered as that function says."""
        if result.outcome is Outcome.ABORTED:
            for match in self._ending:
                if _means(match, event):
                    return match.response
        return response_of(result)

    def _compare(self, target: int, parameter_data: bytes) -> None:
        """A rescan in the guest has just asked the target: does it know what we do not?"""
        listed = listed_luns(parameter_data)
        if listed is not None and {lun for lun in listed if lun_number(lun) is not None} != self._units.luns(target):
            self._look_again()

    # ------------------------------------------------------------ control queue

    async def control(self, event: Event) -> None:
        """Answer one control request; a request that cannot be read is answered FAILURE."""
        request = virtio.decode_control(event.data_out)
        match request:
            case virtio.TaskManagementRequest():
                answer = bytes([await self._manage(request)])
            case virtio.AsyncNotification():
                # Disks have no asynchronous notifications to offer (virtio 1.2, 5.6.6.2): event_actual 0.
                present = self._target(request.lun) is not None
                answer = virtio.encode_async_answer(0, virtio.Response.OK if present else virtio.Response.BAD_TARGET)
            case None:
                answer = bytes([virtio.Response.FAILURE])
        self._workers.reply_control(event, answer)

    def _target(self, lun: bytes) -> Wwn | None:
        address = virtio.decode_lun(lun)
        return None if address is None else self._units.wwpn(address.target)

    async def _manage(self, request: virtio.TaskManagementRequest) -> int:
        function = _FUNCTION.get(request.subtype)
        if function is None:
            return virtio.Response.FUNCTION_REJECTED
        address = virtio.decode_lun(request.lun)
        wwpn = self._target(request.lun)
        if address is None or wwpn is None or self.port is None:
            return virtio.Response.BAD_TARGET
        unit = None if address.lun is None else self._units.unit(address.target, address.lun)
        if unit is None and function is not TaskManagement.I_T_NEXUS_RESET:
            return virtio.Response.INCORRECT_LUN
        one_task = function in (TaskManagement.ABORT_TASK, TaskManagement.QUERY_TASK)
        match = Match(
            target=address.target,
            lun=None if function is TaskManagement.I_T_NEXUS_RESET else address.lun,
            tag=request.tag if one_task else None,
            response=_ENDS.get(function, virtio.Response.OK),
        )
        if function in (TaskManagement.QUERY_TASK, TaskManagement.QUERY_TASK_SET):
            found = await self._workers.query(match)
            return virtio.Response.FUNCTION_SUCCEEDED if found else virtio.Response.FUNCTION_COMPLETE
        if function not in _ENDS:
            return _TMF_RESPONSE[await self.port.manage(unit or Unit(wwpn, bytes(8)), function)]
        self._ending.append(match)
        try:
            return await self._end(self.port, unit or Unit(wwpn, bytes(8)), function, match)
        finally:
            self._ending.remove(match)

    async def _end(self, port: Port, unit: Unit, function: TaskManagement, match: Match) -> int:
        """A function that ends commands: at the target, then in the workers.

        One task that has not begun needs nobody else's word, and an HBA's port could only say when it is idle.
        """
        response = TaskManagementResponse.FUNCTION_COMPLETE
        one = function is TaskManagement.ABORT_TASK
        if not (one and (await self._workers.abort(dataclasses.replace(match, held=True))).ended):
            response = await port.manage(unit, function, tag=match.tag)
        if response is TaskManagementResponse.FUNCTION_COMPLETE:
            aborted = await self._workers.abort(match)
            if aborted.kept:
                response = TaskManagementResponse.DELIVERY_FAILURE
            await trio.lowlevel.checkpoint()  # punts that were told of before the workers answered have begun
            for late in [punt for punt in self._running.values() if _means(match, punt.event)]:
                # They were answered there, on their way here: now they must not run at the target either.
                last = await port.manage(late.unit, TaskManagement.ABORT_TASK, tag=late.event.tag)
                if last is not TaskManagementResponse.FUNCTION_COMPLETE:
                    response = last
            self._log.info(
                "task management function",
                function=function.value,
                target=match.target,
                lun=match.lun,
                commands_ended=aborted.ended,
            )
        return _TMF_RESPONSE[response]
