"""Runs the commands that reach the target ports as frames: takes them in turns, has their effects done, answers.

A unit says what it wants done (scsi.task's effects), and Effects does it.  No status goes out before every
narrowing is in force (Served.barrier).  What ends commands is in Aborts, what asks for that in TaskManager.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable

import structlog
import trio

from vhostfc.daemon.fabric_aborts import ABORTED, Aborts
from vhostfc.daemon.fabric_effects import Effects
from vhostfc.daemon.fabric_running import Running, RunningCommands
from vhostfc.daemon.fabric_task_manager import TaskManager
from vhostfc.daemon.fabric_units import Served
from vhostfc.fabric.array import Array
from vhostfc.fabric.rations import Rations
from vhostfc.fabric.sessions import Abort, Exchange, Lost, Manage, Opened, Session, Untold, Urgent
from vhostfc.fabric.switch import Output, Switch
from vhostfc.fc.frame import Frame
from vhostfc.scsi import cdb as fields
from vhostfc.scsi.sense import Asc, Sense, SenseKey, attention_in
from vhostfc.scsi.server import DeviceServer
from vhostfc.scsi.task import ScsiResult, Status, Task
from vhostfc.scsi.unit import LogicalUnit

_OUR_FAULT = ScsiResult(Status.CHECK_CONDITION, Sense(SenseKey.HARDWARE_ERROR, Asc.INTERNAL_TARGET_FAILURE).encode())


class Runner:
    """See the head of the file.

    served: the Served of a unit.  transmit: sends what the switch puts out, waiting for room on the way.
    """

    def __init__(
        self,
        *,
        switch: Switch,
        array: Array,
        rations: Rations[Exchange],
        urgent: deque[Urgent],
        served: Callable[[LogicalUnit], Served | None],
        transmit: Callable[[Iterable[Output]], Awaitable[None]],
        nursery: trio.Nursery,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._switch = switch
        self._array = array
        self._rations = rations
        self._urgent = urgent
        self._served = served
        self._transmit = transmit
        self._nursery = nursery
        self._log = log
        self._running = RunningCommands()
        self._aborts = Aborts(self._running, array=array, resolve=self._resolve, send=self.send, nursery=nursery)
        self._effects = Effects(
            array=array,
            served=served,
            resolve=self._resolve,
            abort_tasks=self._aborts.abort_tasks,
            nursery=nursery,
            log=log,
        )
        self._task_manager = TaskManager(
            array=array,
            effects=self._effects,
            served=served,
            resolve=self._resolve,
            tasks=self._aborts.tasks,
            send=self.send,
        )

    def kick(self) -> None:
        """Something has arrived: begin what can be begun."""
        look_again: dict[LogicalUnit, None] = {}
        while self._urgent:
            match self._urgent.popleft():
                case Opened(session):
                    target = self._array.port(session.nexus.port)
                    for unit in self._array.seen(target, session.wwpn).values() if target else ():
                        unit.attach(session.nexus)
                        look_again[unit] = None
                case Lost(session):
                    target = self._array.port(session.nexus.port)
                    for place in self._array.places(target).values() if target else ():
                        place.unit.detach(session.nexus)
                        look_again[place.unit] = None
                case Abort(exchange, reply):
                    self._aborts.abort(exchange, reply)
                case Manage(exchange):
                    self._nursery.start_soon(self._task_manager.manage, exchange)
                case Untold(session, lun, sense):
                    again = self._tell_again(session, lun, sense)
                    if again is not None:
                        look_again[again] = None
        for unit in look_again:
            if (served := self._served(unit)) is not None:
                served.changed()
        while (taken := self._rations.take(self._running.may_begin)) is not None:
            self._begin(taken[1])

    def _tell_again(self, session: Session, lun: bytes, sense: bytes) -> LogicalUnit | None:
        """A unit attention condition that was told, and lost on the way, is pending again."""
        asc = attention_in(sense)
        target = self._array.port(session.nexus.port)
        if asc is None or target is None:
            return None
        unit = self._array.resolve(target, session.wwpn, lun)
        if not isinstance(unit, LogicalUnit):
            return None
        unit.attention(asc, [session.nexus])
        return unit

    async def send(self, frames: Iterable[Frame]) -> None:
        """Frames of a target, each when there is room for it."""
        for frame in frames:
            await self._transmit(self._switch.send(frame))

    def resume(self, served: Served) -> None:
        """The unit is ours now: go on with what an earlier life of ours had begun in the background."""
        self._effects.operations.resume(served)

    async def end_tasks(self, served: Served) -> None:
        """Stop the commands on a unit that is taken away; they end as those that come later do."""
        await self._aborts.end(served)
        await self._effects.operations.end(served)

    # ------------------------------------------------------------ commands

    def _resolve(self, exchange: Exchange) -> tuple[DeviceServer, Served | None]:
        server = self._array.resolve(exchange.target, exchange.session.wwpn, exchange.cmnd.lun)
        return server, self._served(server) if isinstance(server, LogicalUnit) else None

    def _begin(self, exchange: Exchange) -> None:
        exchange.target.begin(exchange)
        _, served = self._resolve(exchange)
        self._nursery.start_soon(self._run, self._running.begin(exchange, served))

    async def _run(self, running: Running) -> None:
        exchange, undelivered = running.exchange, None
        try:
            with running.scope:
                for other in running.after:
                    await other.done.wait()
                if running.ordered and running.served is not None:
                    result = await self._alone(running, running.served)
                else:
                    result = await self._execute(running)
                undelivered = result.attention
                if running.served is not None:
                    await running.served.barrier()
                if not exchange.over:
                    await self.send(exchange.target.finish(exchange, result, _used(running, result)))
                    undelivered = None
        except Exception:
            self._log.exception("a command failed in the fabric", cdb=exchange.cmnd.cdb.hex())
            await self.send(exchange.target.finish(exchange, _OUR_FAULT))
        finally:
            if undelivered is not None and running.served is not None:
                running.served.unit.not_told(running.nexus, undelivered)
                running.served.changed()
            self._running.end(running)
        self.kick()

    async def _alone(self, running: Running, served: Served) -> ScsiResult:
        """An ORDERED task: everything before it has ended, in the adapters too, and nothing after it has begun."""
        served.ordered += 1
        try:
            served.changed()
            await served.barrier()
            return await self._execute(running)
        finally:
            served.ordered -= 1
            served.changed()

    async def _execute(self, running: Running) -> ScsiResult:
        exchange = running.exchange
        running.task = task = Task(
            running.nexus,
            exchange.cmnd.cdb,
            exchange.data_out,
            exchange.data_in_length,
            exchange.cmnd.attribute,
            exchange.frame.ox_id,
        )
        fate = await self._meet(running)
        if fate is not None:
            return fate
        while not exchange.over:
            server, running.served = self._resolve(exchange)
            running.server = server
            if running.served is not None:
                running.epoch = running.served.epoch
                running.served.losses.known(running.nexus)
            result = await self._effects.drive(server.execute(task), running.served, running.nexus, running)
            if result is not None:
                return result
        return ABORTED  # which nobody hears

    async def _meet(self, running: Running) -> ScsiResult | None:
        """What faults of the unit do to a command that is about to begin: it waits, or it ends with this."""
        if running.served is None or not running.served.faults:
            return None
        fate = running.served.faults.begin(running.ports, running.exchange.cmnd.cdb)
        if fate.seconds:
            await trio.sleep(fate.seconds)
        return fate.result


def _used(running: Running, result: ScsiResult) -> int | None:
    """Bytes of data-out that a command had a use for: FCP_DL may be more.  None: all that came."""
    if running.served is None or result.status != Status.GOOD:
        return None
    return fields.data_out_length(running.exchange.cmnd.cdb, running.served.medium.block_size)
