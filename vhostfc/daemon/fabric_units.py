"""A unit as the fabric serves it: its medium, its device server, its fence; and where its names come from.

Names.  A file or a device keeps its unit's NAA designator and serial number over restarts, moves to
another LUN and more paths: they derive from the fabric's name and the path.  Memory is another disk
whenever it begins empty, so its name is drawn by lot and kept with it: systemd's file descriptor store
holds the memfd under a name that says target, LUN and NAA.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import structlog
import trio

from vhostfc.config import TargetConfig, UnitConfig
from vhostfc.daemon import fabric_locks, media
from vhostfc.daemon.fabric_journal import Journal
from vhostfc.daemon.fabric_kept import KeptReservations
from vhostfc.daemon.fabric_latch import Holding
from vhostfc.daemon.fabric_losses import Losses
from vhostfc.daemon.fencing import Fence, Numbers, Opening
from vhostfc.daemon.media import Medium
from vhostfc.daemon.notify import Notifier, PassedFd
from vhostfc.errors import VhostfcError
from vhostfc.fabric.faults import UnitFaults
from vhostfc.fabric.link import InFlight, MediumKind
from vhostfc.fc.wwn import OUI_QEMU, Wwn
from vhostfc.scsi.inquiry import Identity
from vhostfc.scsi.reservations import State
from vhostfc.scsi.server import Inventory
from vhostfc.scsi.task import MediumError, Nexus
from vhostfc.scsi.unit import LogicalUnit

#: The first pause and the longest between attempts to clear a journal, in seconds.
RETRY, RETRY_MAX = 0.1, 10.0
#: What makes two units of two configurations the same one: its medium.
Key = tuple[str, str]
#: What a file or a device is to the kernel: a word, and two numbers.
What = tuple[str, int, int]


def key(target: TargetConfig, unit: UnitConfig) -> Key:
    """A file and a device are what they are wherever they are listed; memory and null belong to their home's LUN."""
    if unit.file is not None:
        return ("file", str(unit.file))
    if unit.block is not None:
        return ("block", str(unit.block))
    wwpn, lun = unit.home or (target.wwpn, unit.lun)
    return ("null" if unit.null else "memory", f"{wwpn.pack().hex()}-{lun}")


def _naa(seed: bytes) -> bytes:
    """NAA 6, IEEE Registered Extended (SPC-4 7.8.6.6.5): QEMU's company id and 100 bits."""
    bits = int.from_bytes(hashlib.sha256(seed).digest()[:16], "big") >> 28
    return (6 << 124 | OUI_QEMU << 100 | bits).to_bytes(16, "big")


class Store:
    """Memory that outlives the fabric: what systemd kept for us, and what we ask it to keep."""

    _NAME = re.compile(r"(unit|latch)-([0-9a-f]{16}-\d+)-([0-9a-f]{32})")

    def __init__(self, notifier: Notifier, passed: Sequence[PassedFd] = ()) -> None:
        self._notifier = notifier
        self._kept: dict[str, tuple[bytes, int]] = {}
        self._latches: dict[bytes, int] = {}
        for one in passed:
            if not (match := self._NAME.fullmatch(one.name)):
                continue
            if match[1] == "unit":
                self._kept[match[2]] = (bytes.fromhex(match[3]), one.fd)
            else:
                self._latches[bytes.fromhex(match[3])] = one.fd

    def take(self, place: str, size: int) -> tuple[bytes, int] | None:
        """(NAA, memfd) that was kept for this place, if it is not larger than it shall be now."""
        kept = self._kept.get(place)
        if kept is None or os.fstat(kept[1]).st_size > size:
            return None
        return self._kept.pop(place)

    def take_latch(self, naa: bytes) -> int | None:
        """The latch that was kept with it: in it is what dead adapters had begun to write."""
        return self._latches.pop(naa, None)

    def put(self, place: str, naa: bytes, fd: int, latch_fd: int) -> None:
        self._notifier.store(self._name("unit", place, naa), [fd])
        self._notifier.store(self._name("latch", place, naa), [latch_fd])

    def remove(self, place: str, naa: bytes) -> None:
        self._notifier.forget(self._name("unit", place, naa))
        self._notifier.forget(self._name("latch", place, naa))

    def drop_rest(self) -> None:
        """What nobody took is of units that are not configured any more, or not so large."""
        for place, kept in list(self._kept.items()):
            self._drop(place, *kept)
        self._kept.clear()
        for fd in self._latches.values():
            os.close(fd)
        self._latches.clear()

    def _drop(self, place: str, naa: bytes, fd: int) -> None:
        os.close(fd)
        self.remove(place, naa)

    @staticmethod
    def _name(what: str, place: str, naa: bytes) -> str:
        return f"{what}-{place}-{naa.hex()}"


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

        False, too, while a write that was cut short cannot be undone.
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


class Maker:
    """Makes Served units of configurations."""

    def __init__(
        self,
        *,
        fabric: Wwn,
        inventory: Inventory,
        store: Store,
        kept: KeptReservations,
        timeout: float,
        nursery: trio.Nursery,
        publish: Callable[[str, dict[str, object]], None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.timeout = timeout
        self._publish = publish
        self._fabric = fabric
        self._inventory = inventory
        self._store = store
        self._kept = kept
        self._nursery = nursery
        self._log = log
        self._numbers = Numbers()

    def make(self, target: TargetConfig, config: UnitConfig, taken: dict[What, str]) -> Served:
        """Raises VhostfcError, which names the path: it cannot be opened, or is one of these already.

        taken: see taken_by(); what this unit takes is put there.
        """
        unit_key = key(target, config)
        medium, naa = self._open(unit_key, config)
        try:
            self._check_distinct(medium, taken)
            state = self._kept.load(naa)
            note = self._kept.note(naa)
        except VhostfcError:
            medium.close()
            raise
        unit = self.unit(medium, naa, target.wwnn, config.physical_block_size)
        unit.reservations.state = state
        if note is not None:
            unit.sanitizing.found(note)
            if unit.sanitizing.failed and (operation := unit.sanitizing.operation) is not None:
                name = operation.name
                self._log.warning(f"a {name} has failed; the unit is closed until another succeeds", unit=medium.name)
        fence = Fence(
            medium,
            name=medium.name,
            timeout=self.timeout,
            numbers=self._numbers,
            nursery=self._nursery,
            publish=self._publish,
            log=self._log,
        )
        keep, keep_note = partial(self._kept.save, naa), partial(self._kept.keep_note, naa)
        journal = self._kept.journal(naa)
        return Served(unit_key, medium, unit, fence, keep, keep_note, journal, self._nursery, self._log)

    def unit(self, medium: Medium, naa: bytes, node: Wwn, physical: int | None) -> LogicalUnit:
        """The device server of a medium; what ports lead to it is known when it is placed.

        physical: bytes in a physical block.  None: a file's pages have 4096 bytes, writes of whole ones need not
        read first; memory has none but its blocks.
        """
        backed = medium.kind in {MediumKind.FILE, MediumKind.DIRECT}
        physical = physical or (4096 if backed else medium.block_size)
        identity = Identity(
            serial=naa.hex()[7:],
            naa=(naa,),
            node=node.pack(),
            block_size=medium.block_size,
            physical_exponent=(physical // medium.block_size).bit_length() - 1,
            thin=not medium.is_device,
            write_cache=backed,
            read_only=medium.read_only,
        )
        return LogicalUnit(identity, medium.blocks, self._inventory)

    def keep(self, served: Served) -> None:
        """The unit is in use from now on: its memory shall outlive us."""
        if served.key[0] == "memory":
            medium = served.medium
            self._store.put(served.key[1], served.unit.identity.naa[0], medium.fd, medium.latch_fd)

    def remove(self, served: Served) -> None:
        """The unit is not configured any more; its fence is empty."""
        if served.key[0] == "memory":
            self._store.remove(served.key[1], served.unit.identity.naa[0])
            self._kept.forget(served.unit.identity.naa[0])
        served.close()

    def _open(self, unit_key: Key, config: UnitConfig) -> tuple[Medium, bytes]:
        kind, where = unit_key
        seed = self._fabric.pack() + "\0".join(unit_key).encode(errors="surrogateescape")
        match kind:
            case "file":
                return (
                    media.file(
                        Path(where),
                        config.size,
                        block_size=config.block_size,
                        direct=config.cache == "none",
                        read_only=config.read_only,
                    ),
                    _naa(seed),
                )
            case "block":
                return (
                    media.block(
                        Path(where),
                        block_size=config.block_size,
                        direct=config.cache == "none",
                        read_only=config.read_only,
                    ),
                    _naa(seed),
                )
            case "null":
                assert config.size is not None
                medium = media.null(config.size, block_size=config.block_size, name=f"null {where}")
                medium.read_only = config.read_only
                return medium, _naa(seed)
        return self._memory(where, config)

    def _memory(self, where: str, config: UnitConfig) -> tuple[Medium, bytes]:
        assert config.size is not None
        kept = self._store.take(where, config.size)
        naa, fd = kept or (_naa(secrets.token_bytes(32)), None)
        latch_fd = self._store.take_latch(naa)
        try:
            medium = media.memory(
                config.size, block_size=config.block_size, name=f"memory {where}", fd=fd, latch_fd=latch_fd
            )
        except OSError as error:
            raise VhostfcError(f"no memory for a unit of {config.size} bytes: {error.strerror}") from None
        medium.read_only = config.read_only
        return medium, naa

    @staticmethod
    def _check_distinct(medium: Medium, taken: dict[What, str]) -> None:
        """One file under two paths would be two disks that know nothing of each other."""
        for what in _what(medium):
            other = taken.setdefault(what, medium.name)
            if other != medium.name:
                raise VhostfcError(f"{medium.name}: is the same as {other}, which is a unit already")

    def going(self, wwpn: Wwn) -> list[Opening]:
        """The openings of this initiator port that are over, and whose adapters may still have the medium."""
        return list(self._numbers.going.get(wwpn, ()))


def _what(medium: Medium) -> list[What]:
    """What a file or a device is, whatever its path."""
    if medium.kind not in {MediumKind.FILE, MediumKind.DIRECT}:
        return []
    state = os.fstat(medium.fd)
    file = ("file", state.st_dev, state.st_ino)
    return [file, ("device", 0, state.st_rdev)] if medium.is_device else [file]


def taken_by(served: Iterable[Served]) -> dict[What, str]:
    """The files and devices that are units already, for Maker.make()."""
    return {what: one.medium.name for one in served for what in _what(one.medium)}
