"""Does what a unit asks for (scsi.task's effects) on its medium, under the range latch.

Two rules of fencing live here:

- after every step of every task the verdicts are compared with what the adapters were told, and no flush
  begins before every narrowing is in force (Served.changed, Served.barrier);
- a command that has waited, for its data or for a latch, looks again before it writes: when reservations
  or mode pages are other ones and it could still begin, it goes on; else it hears of it (Withdrawn), and
  is begun anew unless it knows better, so its unit says what is to be said now; when its exchange has
  ended, it is over.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Protocol, TypeVar

import structlog
import trio

from vhostfc.daemon.fabric_background import Operations
from vhostfc.daemon.fabric_latch import Holding
from vhostfc.daemon.fabric_running import Running
from vhostfc.daemon.fabric_units import Served, narrows
from vhostfc.fabric.array import Array
from vhostfc.fabric.sessions import Exchange
from vhostfc.scsi import cdb as fields
from vhostfc.scsi.reservations import ReservationConflict
from vhostfc.scsi.sense import CheckCondition
from vhostfc.scsi.server import DeviceServer
from vhostfc.scsi.task import (
    AbortTasks,
    At,
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
    TakeTurn,
    Withdrawn,
    Write,
)
from vhostfc.scsi.unit import LogicalUnit

T = TypeVar("T")
_WRITE = fields.WRITE_16.opcode


class _Elsewhere(Exception):
    """Another unit, or none, is where the command was for, and it is begun anew there; or its exchange has ended."""


class AbortsTasks(Protocol):
    """Who does the effect AbortTasks: `but` is the command that asked for it, `nexus` where that came from."""

    async def __call__(
        self, served: Served, nexuses: frozenset[Nexus], reset: bool, but: Running | None, nexus: Nexus
    ) -> None: ...


class Effects:
    """See the head of the file.

    served: the Served of a unit.  resolve: the device server that a command is for now, and its Served.
    """

    def __init__(
        self,
        *,
        array: Array,
        served: Callable[[LogicalUnit], Served | None],
        resolve: Callable[[Exchange], tuple[DeviceServer, Served | None]],
        abort_tasks: AbortsTasks,
        nursery: trio.Nursery,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._array = array
        self._served = served
        self._resolve = resolve
        self._abort_tasks = abort_tasks
        self.operations = Operations(self.drive, nursery=nursery, log=log)

    async def drive(
        self, steps: Generator[Effect, object, T], served: Served | None, nexus: Nexus, running: Running | None = None
    ) -> T | None:
        """Run a unit's generator to its end; None when it has to begin anew.  running: the command that it is."""
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
            except trio.Cancelled:
                steps.close()  # what it takes back of what it had begun is news, too
                served.changed()
                raise
            finally:
                steps.close()
                if served.turn.statistics().owner is trio.lowlevel.current_task():
                    served.turn.release()
                if running is not None:
                    running.mask = b""

    async def _effect(
        self, effect: Effect, served: Served, running: Running | None, holding: Holding, nexus: Nexus
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
                over = self.operations.start(steps, served, nexus)
                if wait:
                    await over.wait()
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
        running: Running | None,
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

    async def _at(self, unit: LogicalUnit, effect: Read | Write, nexus: Nexus, running: Running | None) -> object:
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

    def _look_again(self, served: Served, running: Running | None) -> None:
        """Before a write, after all waiting.  Raises Withdrawn or _Elsewhere."""
        if running is None or running.task is None:
            return
        if running.exchange.over:
            raise _Elsewhere
        if self._resolve(running.exchange)[0] is not running.server:
            raise _Elsewhere
        unit = served.unit
        narrowed = narrows(running.mask, unit.verdict(running.nexus))
        if narrowed or (running.epoch != served.epoch and not unit.allows(running.task)):
            raise Withdrawn
        if not running.mask[_WRITE // 8] & 1 << _WRITE % 8:  # for whatever reason: so the verdicts are no measure
            try:
                unit.admit(running.nexus, write=True)
            except (CheckCondition, ReservationConflict):
                raise Withdrawn from None
        running.epoch = served.epoch


def _touch(effect: Effect, served: Served, running: Running) -> None:
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
    bad = served.faults.touch(running.ports, running.exchange.cmnd.cdb[0], lba, blocks, write=write)
    if bad is not None:
        raise MediumError(bad)
