"""Runs the commands that reach the target ports as frames: takes them in turns, does their effects, answers.

A unit says what it wants done (scsi.task's effects); here it is done, on the unit's medium, under the
range latch.  Three rules of fencing live here:

- after every step of every task the verdicts are compared with what the adapters were told, and no
  status goes out before every narrowing is in force (Served.changed, Served.barrier);
- a command that has waited, for its data or for a latch, looks again before it writes: when reservations
  or mode pages are other ones and it could still begin, it goes on; else it hears of it (Withdrawn), and
  is begun anew unless it knows better, so its unit says what is to be said now; when its exchange has
  ended, it is over;
- a task that shall end is cancelled, at once; nobody is told that it has ended before it has.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Generator, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import structlog
import trio

from vhostfc.daemon.fabric_latch import Holding
from vhostfc.daemon.fabric_units import Served, narrows
from vhostfc.fabric.array import Array
from vhostfc.fabric.link import InFlight
from vhostfc.fabric.rations import Rations
from vhostfc.fabric.switch import Output, Switch
from vhostfc.fabric.target import Abort, Exchange, Lost, Manage, Opened, Session, Untold, Urgent
from vhostfc.fc.fcp import ResponseCode, TmFlag
from vhostfc.fc.frame import Frame
from vhostfc.fc.wwn import Wwn
from vhostfc.scsi import cdb as fields
from vhostfc.scsi import sanitize
from vhostfc.scsi.reservations import ReservationConflict
from vhostfc.scsi.sense import Asc, CheckCondition, Sense, SenseKey, attention_in
from vhostfc.scsi.server import DeviceServer
from vhostfc.scsi.task import (
    AbortTasks,
    At,
    Attribute,
    Background,
    Effect,
    Extents,
    Fill,
    Flush,
    Hold,
    Keep,
    KeepNote,
    MediumError,
    Nexus,
    Read,
    ScsiResult,
    ServiceResponse,
    Status,
    TakeTurn,
    Task,
    TaskManagement,
    Withdrawn,
    Write,
)
from vhostfc.scsi.unit import LogicalUnit

#: Commands that may run at a time for one initiator port; the others of its ration wait.
AT_ONCE = 16
_WRITES = frozenset(
    {
        fields.WRITE_6,
        fields.WRITE_10,
        fields.WRITE_12,
        fields.WRITE_16,
        fields.WRITE_32,
        fields.WRITE_AND_VERIFY_10,
        fields.WRITE_AND_VERIFY_12,
        fields.WRITE_AND_VERIFY_16,
        fields.WRITE_AND_VERIFY_32,
        fields.WRITE_ATOMIC_16,
    }
)
_FUNCTIONS = {
    TmFlag.ABORT_TASK_SET: TaskManagement.ABORT_TASK_SET,
    TmFlag.CLEAR_TASK_SET: TaskManagement.CLEAR_TASK_SET,
    TmFlag.LOGICAL_UNIT_RESET: TaskManagement.LOGICAL_UNIT_RESET,
    TmFlag.TARGET_RESET: TaskManagement.LOGICAL_UNIT_RESET,  # of every unit (FCP-4 9.2.2.6)
    TmFlag.CLEAR_ACA: TaskManagement.CLEAR_ACA,
}
_RESPONSES = {
    ServiceResponse.FUNCTION_COMPLETE: ResponseCode.COMPLETE,
    ServiceResponse.FUNCTION_REJECTED: ResponseCode.REJECTED,
    ServiceResponse.INCORRECT_LUN: ResponseCode.INCORRECT_LUN,
}
_ABORTED = ScsiResult(Status.TASK_ABORTED)
_NO_UNIT = ScsiResult(Status.CHECK_CONDITION, Sense(SenseKey.ILLEGAL_REQUEST, Asc.LOGICAL_UNIT_NOT_SUPPORTED).encode())
_OUR_FAULT = ScsiResult(Status.CHECK_CONDITION, Sense(SenseKey.HARDWARE_ERROR, Asc.INTERNAL_TARGET_FAILURE).encode())

T = TypeVar("T")


class _Elsewhere(Exception):
    """Another unit, or none, is where the command was for, and it is begun anew there; or its exchange has ended."""


@dataclass(eq=False, slots=True)
class _Running:
    """A command under way.

    began: the unit that it was for when it came; served: that which it is for now.  after: those that it has to
    wait for (task attributes, SAM-5 8.7).
    """

    exchange: Exchange
    began: Served | None
    served: Served | None
    after: tuple[_Running, ...]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    mask: bytes = b""
    epoch: int = 0
    task: Task | None = None

    @property
    def nexus(self) -> Nexus:
        return self.exchange.session.nexus

    @property
    def ordered(self) -> bool:
        return self.exchange.cmnd.attribute == Attribute.ORDERED


@dataclass(eq=False, slots=True)
class _Operation:
    """Something in the background: a SANITIZE, a FORMAT UNIT."""

    served: Served
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)


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
        self._running: dict[Exchange, _Running] = {}
        self._on: dict[Served, dict[_Running, None]] = {}  # the same, by the unit that they have begun at
        self._operations: set[_Operation] = set()
        self._of_port: Counter[Wwn] = Counter()

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
                    running = self._running.get(exchange)
                    if running is not None:
                        running.scope.cancel()
                    self._nursery.start_soon(self._abort, running, reply)
                case Manage(exchange):
                    self._nursery.start_soon(self._manage, exchange)
                case Untold(session, lun, sense):
                    again = self._tell_again(session, lun, sense)
                    if again is not None:
                        look_again[again] = None
        for unit in look_again:
            if (served := self._served(unit)) is not None:
                served.changed()
        while (taken := self._rations.take(self._may_run)) is not None:
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

    # ------------------------------------------------------------ commands

    def _may_run(self, wwpn: Wwn) -> bool:
        return self._of_port[wwpn] < AT_ONCE

    def _resolve(self, exchange: Exchange) -> tuple[DeviceServer, Served | None]:
        server = self._array.resolve(exchange.target, exchange.session.wwpn, exchange.cmnd.lun)
        return server, self._served(server) if isinstance(server, LogicalUnit) else None

    def _begin(self, exchange: Exchange) -> None:
        exchange.target.begin(exchange)
        self._of_port[exchange.session.wwpn] += 1
        _, served = self._resolve(exchange)
        attribute = exchange.cmnd.attribute
        before = [r for r in self._on.get(served, ()) if r.served is served] if served is not None else []
        if attribute == Attribute.HEAD_OF_QUEUE:
            before = []
        elif attribute != Attribute.ORDERED:
            before = [r for r in before if r.ordered]
        running = _Running(exchange, served, served, tuple(before))
        self._running[exchange] = running
        if served is not None:
            self._on.setdefault(served, {})[running] = None
        self._nursery.start_soon(self._run, running)

    async def _run(self, running: _Running) -> None:
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
            del self._running[exchange]
            if running.began is not None:
                self._on[running.began].pop(running)
                if not self._on[running.began]:
                    del self._on[running.began]
            self._of_port[exchange.session.wwpn] -= 1
            running.done.set()
        self.kick()

    async def _alone(self, running: _Running, served: Served) -> ScsiResult:
        """An ORDERED task: everything before it has ended, in the adapters too, and nothing after it has begun."""
        served.ordered += 1
        try:
            served.changed()
            await served.barrier()
            return await self._execute(running)
        finally:
            served.ordered -= 1
            served.changed()

    async def _execute(self, running: _Running) -> ScsiResult:
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
            if running.served is not None:
                running.epoch = running.served.epoch
                running.served.losses.known(running.nexus)
            result = await self._drive(server.execute(task), running.served, running, running.nexus)
            if result is not None:
                return result
        return _ABORTED  # which nobody hears

    async def _meet(self, running: _Running) -> ScsiResult | None:
        """What faults of the unit do to a command that is about to begin: it waits, or it ends with this."""
        if running.served is None or not running.served.faults:
            return None
        fate = running.served.faults.begin(_ports(running), running.exchange.cmnd.cdb)
        if fate.seconds:
            await trio.sleep(fate.seconds)
        return fate.result

    async def _drive(
        self, steps: Generator[Effect, object, T], served: Served | None, running: _Running | None, nexus: Nexus
    ) -> T | None:
        """Run a unit's generator to its end; None when it has to begin anew."""
        if served is None:
            try:
                effect = next(steps)
            except StopIteration as stop:
                answer: T = stop.value
                return answer
            raise AssertionError(f"{effect} without a medium")
        value: object = None
        error: MediumError | Withdrawn | None = None
        with Holding(served.medium, served.fence.stuck) as holding:
            try:
                while True:
                    effect = steps.throw(error) if error is not None else steps.send(value)
                    served.changed()
                    if running is not None and not running.mask:
                        running.mask = served.admit(nexus)
                    value, error = None, None
                    try:
                        value = await self._effect(effect, served, running, holding, nexus)
                    except MediumError as failed:
                        error = failed
                    except Withdrawn as doubt:
                        error = doubt
                        if running is not None:  # should it go on, then with what is true now
                            running.mask, running.epoch = b"", served.epoch
            except StopIteration as stop:
                served.changed()
                result: T = stop.value
                return result
            except (_Elsewhere, Withdrawn):
                return None
            finally:
                steps.close()
                if served.turn.statistics().owner is trio.lowlevel.current_task():
                    served.turn.release()
                if running is not None:
                    running.mask = b""

    async def _effect(
        self, effect: Effect, served: Served, running: _Running | None, holding: Holding, nexus: Nexus
    ) -> object:
        medium, mark = served.medium, holding.mark()
        write: Callable[[], Awaitable[None]]
        if served.faults and running is not None:
            _touch(effect, served, running)
        match effect:
            case Hold(lba, blocks):
                await holding.take(lba, blocks)
                return None
            case Flush():
                # With a write cache that is being turned off, no adapter may write behind the flush.
                await served.barrier()
                if running is None:
                    await medium.flush()
                else:
                    await served.losses.sync(nexus, 0, medium.flush)
                return None
            case Extents(lba, blocks):
                return await medium.extents(lba, blocks)
            case AbortTasks(nexuses, reset):
                await self._abort_tasks(served, nexuses, reset, running, nexus)
                return None
            case TakeTurn():
                await served.turn.acquire()
                return None
            case Keep(state):
                return await served.keep(state)
            case KeepNote(name, data):
                return await served.keep_note(name, data)
            case Background(steps, wait):
                operation = self._start(steps, served, nexus)
                if wait:
                    await operation.done.wait()
                return None
            case At(unit, there):
                return await self._at(unit, there, nexus, running)
            case Read(lba, blocks, fua):
                await holding.take(lba, blocks)
                try:
                    return await medium.read(lba, blocks, fua=fua)
                finally:
                    holding.release(to=mark)
            case Write(lba, data, fua, atomic):
                await holding.take(lba, len(data) // medium.block_size)
                fua = fua or not served.unit.mode.write_cache  # it may have been switched off meanwhile
                write = partial(medium.write, lba, data, fua=fua)
                if atomic:
                    write = partial(served.write_atomically, lba, data, holding)
                if fua:
                    write = partial(served.losses.sync, nexus, lba, write)
            case Fill(lba, blocks, block, unmap):
                # What must be atomic is a block, and on a busy unit no large range is ever free all at once.
                for first, count in medium.pieces(lba, blocks):
                    await holding.take(first, count)
                    await self._write(
                        partial(medium.fill, first, count, block, unmap=unmap), served, running, holding, mark
                    )
                return None
            case _:
                raise AssertionError(f"{effect}: nobody does this")
        await self._write(write, served, running, holding, mark)
        return None

    async def _write(
        self,
        write: Callable[[], Awaitable[None]],
        served: Served,
        running: _Running | None,
        holding: Holding,
        mark: int,
    ) -> None:
        """Now that its blocks are held; then they are free."""
        try:
            self._look_again(served, running)
            with served.operation():
                await write()
        finally:
            holding.release(to=mark)

    async def _at(self, unit: LogicalUnit, effect: Read | Write, nexus: Nexus, running: _Running | None) -> object:
        """The effect At.  All of it is an operation of that unit, so that nobody takes the medium from under it."""
        write = isinstance(effect, Write)
        size = unit.identity.block_size
        blocks = len(effect.data) // size if isinstance(effect, Write) else effect.blocks
        served = self._served(unit)
        if served is None:
            raise Withdrawn
        with served.operation(), Holding(served.medium, served.fence.stuck) as holding:
            await holding.take(effect.lba, blocks)
            if unit not in self._array.units(nexus):
                raise Withdrawn
            try:
                unit.admit(nexus, write=write)
            except (CheckCondition, ReservationConflict):
                raise Withdrawn from None
            if served.faults and running is not None:
                _touch(effect, served, running)
            if isinstance(effect, Write):
                fua = effect.fua or not unit.mode.write_cache
                work = partial(served.medium.write, effect.lba, effect.data, fua=fua)
                await (served.losses.sync(nexus, effect.lba, work) if fua else work())
                return None
            return await served.medium.read(effect.lba, blocks, fua=effect.fua)

    def resume(self, served: Served) -> None:
        """The unit is ours now: go on with what an earlier life of ours had begun in the background."""
        operation = served.unit.sanitizing.operation
        if operation is not None and (steps := sanitize.resume(served.unit)) is not None:
            self._log.info(f"going on with a {operation.name} that was cut short", unit=served.medium.name)
            self._start(steps, served, Nexus(b"", 0))

    def _start(self, steps: Generator[Effect, object, None], served: Served, nexus: Nexus) -> _Operation:
        operation = _Operation(served)
        self._operations.add(operation)
        self._nursery.start_soon(self._background, steps, operation, nexus)
        return operation

    async def _background(self, steps: Generator[Effect, object, None], operation: _Operation, nexus: Nexus) -> None:
        """What outlives the command that began it, but not the unit."""
        served = operation.served
        try:
            with operation.scope:
                await self._drive(steps, served, None, nexus)
        except Exception:
            self._log.exception("an operation failed in the fabric", unit=served.medium.name)
        finally:
            self._operations.discard(operation)
            operation.done.set()
        served.changed()

    def _look_again(self, served: Served, running: _Running | None) -> None:
        """Before a write, after all waiting.  Raises Withdrawn or _Elsewhere."""
        if running is None or running.task is None:
            return
        if running.exchange.over:
            raise _Elsewhere
        unit = served.unit
        if self._resolve(running.exchange)[0] is not unit:
            raise _Elsewhere
        narrowed = narrows(running.mask, unit.verdict(running.nexus))
        if narrowed or (running.epoch != served.epoch and not unit.allows(running.task)):
            raise Withdrawn
        running.epoch = served.epoch

    # ------------------------------------------------------------ ending them

    async def _abort(self, running: _Running | None, reply: Frame | None) -> None:
        """ABTS, or a lost login, for a command that was running and is cancelled; its exchange is ended already."""
        if running is not None:
            await running.done.wait()
        if reply is not None:
            await self.send([reply])

    async def end_tasks(self, served: Served) -> None:
        """Stop the commands on a unit that is taken away; they end as those that come later do."""
        ending = [r for r in self._running.values() if r.served is served]
        for running in ending:
            running.scope.cancel()
        for running in ending:
            await running.done.wait()
            await self.send(running.exchange.target.finish(running.exchange, _NO_UNIT))
        for operation in [one for one in self._operations if one.served is served]:
            operation.scope.cancel()
            await operation.done.wait()

    def _tasks(self, served: Served, nexuses: Iterable[Nexus]) -> list[Exchange]:
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

    async def _abort_tasks(
        self, served: Served, nexuses: frozenset[Nexus], reset: bool, but: _Running | None, nexus: Nexus
    ) -> None:
        """The effect AbortTasks.  The nexus that asked for it hears nothing of its own commands (SAM-5 5.8.2);
        others get TASK ABORTED, since a silent target would cost them their command timeout: whatever becomes of
        the command that asked for it."""
        victims = [e for e in self._tasks(served, nexuses) if but is None or e is not but.exchange]
        ending = [self._running[e] for e in victims if e in self._running]
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
                await self.send(exchange.target.finish(exchange, _ABORTED))
            ended.set()

        self._nursery.start_soon(end)
        await ended.wait()

    # ------------------------------------------------------------ task management

    async def _manage(self, exchange: Exchange) -> None:
        nexus, flag = exchange.session.nexus, exchange.cmnd.tm_flags
        server, served = self._resolve(exchange)
        code = ResponseCode.REJECTED
        if flag == TmFlag.QUERY_TASK_SET:
            some = served is not None and any(self._tasks(served, [nexus]))
            code = ResponseCode.SUCCEEDED if some else ResponseCode.COMPLETE
        elif flag == TmFlag.TARGET_RESET:
            for unit in self._array.seen(exchange.target, exchange.session.wwpn).values():
                await self._function(unit, self._served(unit), TaskManagement.LOGICAL_UNIT_RESET, nexus)
            code = ResponseCode.COMPLETE
        elif function := _FUNCTIONS.get(TmFlag(flag)):
            code = _RESPONSES[await self._function(server, served, function, nexus)]
        await self.send(exchange.target.respond(exchange, code))

    async def _function(
        self, server: DeviceServer, served: Served | None, function: TaskManagement, nexus: Nexus
    ) -> ServiceResponse:
        response = await self._drive(server.manage(nexus, function), served, None, nexus)
        if served is not None:
            served.changed()
            await served.barrier()
        return response or ServiceResponse.FUNCTION_REJECTED


def _ports(running: _Running) -> tuple[Wwn, Wwn]:
    return running.exchange.session.wwpn, running.exchange.target.wwpn


def _touch(effect: Effect, served: Served, running: _Running) -> None:
    """Raises MediumError where a fault says that the medium fails."""
    match effect:
        case Read(lba, blocks):
            write = False
        case Write(lba, data):
            write, blocks = True, len(data) // served.medium.block_size
        case Fill(lba, blocks):
            write = True
        case _:
            return
    bad = served.faults.touch(_ports(running), running.exchange.cmnd.cdb[0], lba, blocks, write=write)
    if bad is not None:
        raise MediumError(bad)


def _used(running: _Running, result: ScsiResult) -> int | None:
    """Bytes of data-out that a WRITE had a use for: FCP_DL may be more.  None: all that came."""
    cmnd = running.exchange.cmnd
    command = fields.known(cmnd.cdb)
    if running.served is None or command not in _WRITES or result.status != Status.GOOD:
        return None
    return fields.extent(command, cmnd.cdb)[1] * running.served.medium.block_size
