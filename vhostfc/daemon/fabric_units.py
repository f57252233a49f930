"""A unit as the fabric serves it: its medium, its device server, its fence.

Here commands that come as frames, the fence of the adapters' own I/O, and the journal of WRITE ATOMIC meet:
whoever wants the verdicts of a unit to be in force, or its medium for itself, asks here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import structlog
import trio

from vhostfc.daemon import fabric_locks
from vhostfc.daemon.fabric_journal import Journal
from vhostfc.daemon.fabric_latch import Holding
from vhostfc.daemon.fabric_losses import Losses
from vhostfc.daemon.fencing import Fence
from vhostfc.daemon.medium import Medium
from vhostfc.fabric.faults import UnitFaults
from vhostfc.fabric.link import InFlight, MediumKind
from vhostfc.scsi.reservations import State
from vhostfc.scsi.task import MediumError, Nexus
from vhostfc.scsi.unit import LogicalUnit

#: The first pause and the longest between attempts to clear a journal, in seconds.
RETRY, RETRY_MAX = 0.1, 10.0
#: What makes two units of two configurations the same one: its medium.
Key = tuple[str, str]


class Served:
    """See the head of the file.

    ready: nobody of an earlier life has the medium open, so it can be given out.  ordered: ORDERED tasks
    that want to be alone.  epoch: grows whenever it has changed who may do what.
    keep, keep_note: make reservations and notes outlive us, False if that cannot be.  journal: for WRITE ATOMIC.
    turn: for commands that go one by one.
    faults: what commands meet here; nobody does I/O past us while there are some.  losses: of the host's cache.
    """

    def __init__(
        self,
        unit_key: Key,
        medium: Medium,
        unit: LogicalUnit,
        fence: Fence,
        keep: Callable[[State | None], Awaitable[bool]],
        keep_note: Callable[[str, bytes | None], Awaitable[bool]],
        journal: Journal,
        nursery: trio.Nursery,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.key = unit_key
        self.medium = medium
        self.unit = unit
        self.fence = fence
        self.keep = keep
        self.keep_note = keep_note
        self.journal = journal
        self.faults = UnitFaults()
        self.losses = Losses(medium)
        self.turn = trio.Lock()
        self._journaling = trio.Lock()  # the journal has room for one
        self.ready = False
        self.claiming = trio.CancelScope()
        self.ordered = 0
        self.epoch = 0
        self._version = unit.version
        self._uncleared: Holding | None = None  # the range of a record that stayed there
        self._clearing = trio.CancelScope()
        self._nursery = nursery
        self._log = log
        self._operations: set[trio.Event] = set()
        self._draining: set[trio.Event] = set()
        self._told: dict[Nexus, bytes] = {}

    def __repr__(self) -> str:
        return f"<Served {'/'.join(self.key)}>"

    # ------------------------------------------------------------ commands that come as frames

    def admit(self, nexus: Nexus) -> bytes:
        """The verdict that a command of this nexus starts with; from now on changed() watches over it."""
        self._told[nexus] = mask = self.unit.verdict(nexus)
        return mask

    @contextmanager
    def operation(self) -> Iterator[None]:
        """Around every write to the medium: what barrier() waits for when the verdict narrows meanwhile."""
        done = trio.Event()
        self._operations.add(done)
        try:
            yield
        finally:
            self._operations.discard(done)
            done.set()

    async def write_atomically(self, lba: int, data: bytes, holding: Holding) -> None:
        """All of it or nothing, in whatever way this ends; `holding` has the range.  Raises MediumError.

        A record that stayed in the journal would undo what is written later, so as long as it cannot be cleared
        the range stays latched, and no other record is written.
        """
        if self.medium.kind is MediumKind.NULL:
            return
        async with self._journaling:
            if self._uncleared is not None and not await self._clear_journal():
                raise MediumError(lba)
            try:
                await self._write_journaled(lba, data)
            finally:
                with trio.CancelScope(shield=True):
                    cleared = await self._clear_journal()
                    if not cleared:
                        self._uncleared = holding.hand_over()
                        self._nursery.start_soon(self._keep_clearing)
            if not cleared:
                raise MediumError(lba)

    async def _write_journaled(self, lba: int, data: bytes) -> None:
        medium = self.medium
        with trio.CancelScope(shield=True):
            before = await medium.read(lba, len(data) // medium.block_size)
            try:
                await trio.to_thread.run_sync(self.journal.write, lba, medium.block_size, before)
            except OSError as error:
                raise MediumError(lba) from error
            try:
                await medium.write(lba, data, fua=True)
            except MediumError:
                with suppress(MediumError):  # a hole that cannot be filled still is one
                    await medium.write(lba, before, fua=True)
                raise

    async def _clear_journal(self) -> bool:
        """Whether there is no record any more; then its range is free, if it was kept."""
        try:
            await trio.to_thread.run_sync(self.journal.clear)
        except OSError as error:
            self._log.error("cannot clear a journal", path=str(self.journal.path), reason=error.strerror)
            return False
        if self._uncleared is not None:
            self._uncleared.release()
            self._uncleared = None
        return True

    async def _keep_clearing(self) -> None:
        self._log.error("blocks stay locked until it can be cleared", unit=self.medium.name)
        pause, kept, self._clearing = RETRY, self._uncleared, trio.CancelScope()
        with self._clearing:
            while self._uncleared is kept:
                await trio.sleep(pause)
                pause = min(2 * pause, RETRY_MAX)
                async with self._journaling:
                    if self._uncleared is kept:
                        with trio.CancelScope(shield=True):
                            await self._clear_journal()

    def _undo(self) -> bool:
        """Put back what a WRITE ATOMIC had begun to write over when an earlier life of ours ended.

        False: that cannot be done now, so what the unit holds may be neither the old nor the new.
        """
        try:
            found = self.journal.load()
            if found is not None and self.medium.can_write:
                self.medium.restore(found[0] * found[1], found[2])
                self.journal.clear()
        except OSError as error:
            path, unit = str(self.journal.path), self.medium.name
            self._log.error("cannot undo half a WRITE ATOMIC", unit=unit, path=path, reason=error.strerror)
            return False
        return True

    def _empty(self) -> None:
        try:
            self.medium.sync()
        except MediumError:
            self._log.error("the host lost what an earlier life had in its cache", unit=self.medium.name)

    def close(self) -> None:
        """The unit is not served any more; nobody has its medium open."""
        self._clearing.cancel()
        if self._uncleared is not None:
            with suppress(OSError):
                self.journal.clear()
        self.medium.close()

    # ------------------------------------------------------------ fencing

    def changed(self, *, epoch: bool = False, ending: Mapping[Nexus, InFlight] | None = None) -> None:
        """After every step of every task: tell everybody who may do something else now.

        epoch: what came before may not be right any more, whatever the verdicts say.  ending: nexuses whose
        commands in the adapters shall end.
        """
        epoch |= self.unit.version != self._version
        self._version = self.unit.version
        narrowed = self.fence.settle(ending) or epoch
        self.epoch += epoch
        for nexus, before in list(self._told.items()):
            now = self.unit.verdict(nexus)
            self._told[nexus] = now
            narrowed |= narrows(before, now)
        if narrowed:
            self._draining |= self._operations

    async def barrier(self) -> None:
        """Wait until all that was narrowed is in force: in the adapters, and for commands under way here."""
        await self.fence.barrier()
        while self._draining:
            await next(iter(self._draining)).wait()
            self._draining = {event for event in self._draining if not event.is_set()}

    # ------------------------------------------------------------ the medium's earlier holders

    def claim(self) -> bool:
        """Make the medium ours; False while somebody else has it open: an old adapter, another fabric.

        False, too, while a write that was cut short cannot be undone.  With a cache that is off from now on, what there
        was in it is on the medium.
        """
        if self.medium.kind is not MediumKind.NULL and not self.ready:
            if fabric_locks.held(self.medium.fd) is not None:
                return False
            try:
                fabric_locks.take(self.medium.fd, 0, read_only=not self.medium.can_write)
            except BlockingIOError:
                return False
            self.medium.settle()
            if not self._undo():
                return False
            if self.unit.identity.write_cache and not self.unit.mode.write_cache:
                self._empty()
        self.ready = True
        return True

    async def wait_for_claim(self, log: structlog.typing.FilteringBoundLogger) -> None:
        """Wait for those holders to go; says who they are when that takes long."""

        def late() -> None:
            who = ", ".join(fabric_locks.holders(self.medium.fd)) or "a process that cannot be seen from here"
            log.warning("a unit is not served yet: its medium is still open elsewhere", unit=self.medium.name, by=who)

        pause = RETRY
        while not self.claim():
            await fabric_locks.until_free(self.medium.fd, late=late)
            if not self.claim():  # it may be the journal that does not let us
                await trio.sleep(pause)
                pause = min(2 * pause, RETRY_MAX)


def narrows(before: bytes, now: bytes) -> bool:
    return bool(int.from_bytes(before, "big") & ~int.from_bytes(now, "big"))
