"""Ends commands before they have ended by themselves: aborts, resets, units that are taken away.

A command that shall end is cancelled, at once; nobody is told that it has ended before it has, here and in
the adapters.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import trio

from vhostfc.daemon.fabric_running import Running, RunningCommands
from vhostfc.daemon.fabric_units import Served
from vhostfc.fabric.array import Array
from vhostfc.fabric.link import InFlight
from vhostfc.fabric.sessions import Exchange
from vhostfc.fc.frame import Frame
from vhostfc.scsi.sense import Asc, Sense, SenseKey
from vhostfc.scsi.server import DeviceServer
from vhostfc.scsi.task import Nexus, ScsiResult, Status

#: What is said of a command that another nexus has ended.
ABORTED = ScsiResult(Status.TASK_ABORTED)
_NO_UNIT = ScsiResult(Status.CHECK_CONDITION, Sense(SenseKey.ILLEGAL_REQUEST, Asc.LOGICAL_UNIT_NOT_SUPPORTED).encode())


class Aborts:
    """See the head of the file.

    resolve: the device server that a command is for now, and its Served.  send: frames of a target, when there
    is room for them.
    """

    def __init__(
        self,
        running: RunningCommands,
        *,
        array: Array,
        resolve: Callable[[Exchange], tuple[DeviceServer, Served | None]],
        send: Callable[[Iterable[Frame]], Awaitable[None]],
        nursery: trio.Nursery,
    ) -> None:
        self._running = running
        self._array = array
        self._resolve = resolve
        self._send = send
        self._nursery = nursery

    def abort(self, exchange: Exchange, reply: Frame | None) -> None:
        """ABTS, or a lost login, for a command whose exchange is ended already; the reply goes out when it is over."""
        running = self._running.get(exchange)
        if running is not None:
            running.scope.cancel()
        self._nursery.start_soon(self._answer, running, reply)

    async def _answer(self, running: Running | None, reply: Frame | None) -> None:
        if running is not None:
            await running.done.wait()
        if reply is not None:
            await self._send([reply])

    async def end(self, served: Served) -> None:
        """Stop the commands on a unit that is taken away; they end as those that come later do."""
        ending = self._running.at(served)
        for running in ending:
            running.scope.cancel()
        for running in ending:
            await running.done.wait()
            await self._send(running.exchange.target.finish(running.exchange, _NO_UNIT))

    def tasks(self, served: Served, nexuses: Iterable[Nexus]) -> list[Exchange]:
        """The commands of these nexuses on this unit, wherever they are."""
        among = set(nexuses)
        return [
            exchange
            for target in {target.relative: target for target, _ in self._array.paths(served.unit)}.values()
            for exchange in target.exchanges()
            if exchange.session.nexus in among
            and not exchange.cmnd.tm_flags
            and self._resolve(exchange)[0] is served.unit
        ]

    async def abort_tasks(
        self, served: Served, nexuses: frozenset[Nexus], reset: bool, but: Running | None, nexus: Nexus
    ) -> None:
        """The effect AbortTasks.  The nexus that asked for it hears nothing of its own commands (SAM-5 5.8.2);
        others get TASK ABORTED, since a silent target would cost them their command timeout: whatever becomes of
        the command that asked for it."""
        victims = [e for e in self.tasks(served, nexuses) if but is None or e is not but.exchange]
        ending = [running for e in victims if (running := self._running.get(e)) is not None]
        for running in ending:
            running.scope.cancel()
        for exchange in victims:
            if exchange.session.nexus == nexus:
                exchange.target.drop(exchange)
        action = InFlight.RESET if reset else InFlight.ABORTED
        served.changed(ending=dict.fromkeys(nexuses, action))
        ended = trio.Event()

        async def end() -> None:
            for running in ending:
                await running.done.wait()
            await served.fence.settled(nexuses)
            for exchange in victims:
                await self._send(exchange.target.finish(exchange, ABORTED))
            ended.set()

        self._nursery.start_soon(end)
        await ended.wait()
