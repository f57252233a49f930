"""The task management functions (FCP-4 9.2.2.6) that arrive at the target ports in FCP_CMND."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from vhostfc.daemon.fabric_effects import Effects
from vhostfc.daemon.fabric_units import Served
from vhostfc.fabric.array import Array
from vhostfc.fabric.sessions import FUNCTIONS, Exchange
from vhostfc.fc.fcp import ResponseCode, TmFlag
from vhostfc.fc.frame import Frame
from vhostfc.scsi.server import AbsentUnit, DeviceServer
from vhostfc.scsi.task import Nexus, ServiceResponse, TaskManagement
from vhostfc.scsi.unit import LogicalUnit

_RESPONSES = {
    ServiceResponse.FUNCTION_COMPLETE: ResponseCode.COMPLETE,
    ServiceResponse.FUNCTION_REJECTED: ResponseCode.REJECTED,
    ServiceResponse.INCORRECT_LUN: ResponseCode.INCORRECT_LUN,
}


class TaskManager:
    """Takes them, and answers when what they ask for is in force.

    served: the Served of a unit.  resolve: the device server that a function is for, and its Served.  tasks: the
    commands of these nexuses on a unit.  send: frames of a target, when there is room for them.
    """

    def __init__(
        self,
        *,
        array: Array,
        effects: Effects,
        served: Callable[[LogicalUnit], Served | None],
        resolve: Callable[[Exchange], tuple[DeviceServer, Served | None]],
        tasks: Callable[[Served, Iterable[Nexus]], list[Exchange]],
        send: Callable[[Iterable[Frame]], Awaitable[None]],
    ) -> None:
        self._array = array
        self._effects = effects
        self._served = served
        self._resolve = resolve
        self._tasks = tasks
        self._send = send

    async def manage(self, exchange: Exchange) -> None:
        """Do the function of this FCP_CMND, and answer it."""
        nexus, flag = exchange.session.nexus, exchange.cmnd.tm_flags
        server, served = self._resolve(exchange)
        code = ResponseCode.REJECTED
        if flag == TmFlag.QUERY_TASK_SET:
            some = served is not None and any(self._tasks(served, [nexus]))
            code = ResponseCode.SUCCEEDED if some else ResponseCode.COMPLETE
            if isinstance(server, AbsentUnit):
                code = ResponseCode.INCORRECT_LUN
        elif flag == TmFlag.TARGET_RESET:
            for unit in self._array.seen(exchange.target, exchange.session.wwpn).values():
                if (there := self._served(unit)) is not None:  # else it went while another one was reset
                    await self._function(unit, there, TaskManagement.LOGICAL_UNIT_RESET, nexus)
            code = ResponseCode.COMPLETE
        elif function := FUNCTIONS.get(TmFlag(flag)):
            code = _RESPONSES[await self._function(server, served, function, nexus)]
        await self._send(exchange.target.respond(exchange, code))

    async def _function(
        self, server: DeviceServer, served: Served | None, function: TaskManagement, nexus: Nexus
    ) -> ServiceResponse:
        response = await self._effects.drive(server.manage(nexus, function), served, nexus)
        if served is not None:
            served.changed()
            await served.barrier()
        return response or ServiceResponse.FUNCTION_REJECTED
