"""Fencing: nobody touches a medium who may not, and "may not" is known to be in force before it is said.

An adapter that opens a path is given a description of the medium and a verdict (a Route): the opcodes
that it may run by itself.  Whenever the verdict changes it is given another Route.  A Route that
*narrows* (fewer opcodes, another in_flight than FINISH, the end) must be in force before any status goes
back to anybody: barrier() waits for that.  One that widens need not be waited for.

In force is a Route when it has been acknowledged AND the kernel says that the descriptions given with
older ones are gone (fabric_locks): an acknowledgement that is not true is not taken for one.

An adapter that is late by more than fence_timeout is killed.  Gone means gone: the process is dead,
or its link is closed, *and* the lock bytes of its descriptions are free; only then is finished what it
was just writing to memory (native/latch.c), are the words that it left in the range latch freed and its
Routes counted as acknowledged.  As long as that cannot be
had (a kernel that hangs in a device, a process that we may not kill) barriers wait, loudly.
"""

from __future__ import annotations

import enum
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import structlog
import trio

from vhostfc.daemon import fabric_locks
from vhostfc.daemon.fabric_latch import OWNER
from vhostfc.daemon.medium import Medium
from vhostfc.fabric.link import InFlight, MediumKind, Route
from vhostfc.fc.wwn import Wwn
from vhostfc.scsi.task import Nexus

#: A Route that is no answer to an Open has a seq with this bit.
OURS = 1 << 31
_NOTHING = bytes(32)


class Adapter(Protocol):
    """Where Routes go: the link to an adapter, and the process behind it."""

    name: str
    pid: int

    def post(self, route: Route, fds: list[int]) -> None:
        """Send a Route before all else; takes the fds, and closes them when they are sent or cannot be."""
        ...

    async def sign_of_life(self) -> None:
        """Returns when the adapter's threads have said that they live, whatever their I/O waits for; else never."""
        ...

    def kill(self) -> str | None:
        """Kill the process; None, or why not."""
        ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a nexus may do by itself on a unit.  gone: the nexus or the unit is no more.  losses: see fabric_losses."""

    mask: bytes = _NOTHING
    read_only: bool = False
    blocks: int = 0
    gone: bool = False
    losses: int = 0

    def narrows(self, before: Verdict) -> bool:
        """Is something forbidden that was allowed before?"""
        fewer = int.from_bytes(before.mask, "big") & ~int.from_bytes(self.mask, "big")
        return bool(fewer) or self.gone or self.blocks < before.blocks or self.read_only > before.read_only


class End(enum.Enum):
    """How an opening is over."""

    CLOSED = "closed"
    LOST = "link lost"


@dataclass(eq=False, slots=True)
class _Pending:
    """A Route that is out.  settled: it is in force, or its adapter is gone."""

    seq: int
    narrow: bool
    acked: trio.Event = field(default_factory=trio.Event)
    settled: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False, slots=True)
class Opening:
    """A path that an adapter has open: its number for both sides, its number in the latch, what it was told.

    numbers: lock bytes of the descriptions that it was given and may still have.  asked: for a sign of life.
    """

    adapter: Adapter
    nexus: Nexus
    wwpn: Wwn
    lun: int
    handle: int
    owner: int
    decide: Callable[[], Verdict]
    epoch: int = 0
    out: Verdict = field(default_factory=Verdict)
    pending: list[_Pending] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    asked: bool = False
    end: End | None = None
    gone: trio.Event = field(default_factory=trio.Event)

    @property
    def busy(self) -> bool:
        """May the adapter have commands under way?"""
        return any(self.out.mask) or bool(self.numbers) or any(pending.narrow for pending in self.pending)


class Numbers:
    """What must be unique in a fabric: handles and owners, lock bytes, Routes' seqs.

    going: openings that are over and not yet gone, of all units, by initiator port.
    """

    def __init__(self) -> None:
        self.handle = itertools.count(1)
        self.owner = itertools.count(OWNER + 1)
        self.lock = itertools.count(1)
        self.seq = itertools.count(OURS)
        self.going: dict[Wwn, set[Opening]] = {}


class Fence:
    """The openings of one unit."""

    def __init__(
        self,
        medium: Medium,
        *,
        name: str,
        timeout: float,
        numbers: Numbers,
        nursery: trio.Nursery,
        publish: Callable[[str, dict[str, object]], None] = lambda event, values: None,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.medium = medium
        self._publish = publish
        self.name = name
        self.timeout = timeout
        self.openings: dict[int, Opening] = {}
        self._numbers = numbers
        self._nursery = nursery
        self._log = log

    # ------------------------------------------------------------ what adapters do

    def open(
        self, adapter: Adapter, seq: int, *, nexus: Nexus, wwpn: Wwn, lun: int, decide: Callable[[], Verdict]
    ) -> Opening:
        """A path for this nexus; its first Route answers the Open with this seq.  decide: the verdict, now."""
        opening = Opening(adapter, nexus, wwpn, lun, next(self._numbers.handle), next(self._numbers.owner), decide)
        self.openings[opening.handle] = opening
        self._send(opening, decide(), InFlight.FINISH, seq=seq)
        return opening

    def acked(self, opening: Opening, seq: int) -> None:
        """The adapter says that this Route is in force; that goes for all older ones too."""
        known = next((i for i, pending in enumerate(opening.pending) if pending.seq == seq), -1)
        for pending in opening.pending[: known + 1]:
            pending.acked.set()
        opening.pending = [p for p in opening.pending if p.narrow or not p.acked.is_set()]

    def close(self, opening: Opening) -> None:
        """The adapter gives the path up."""
        self._finish(opening, End.CLOSED)

    def lost(self, opening: Opening) -> None:
        """The link is closed, or the process is dead."""
        self._finish(opening, End.LOST)

    def _finish(self, opening: Opening, end: End) -> None:
        if opening.end is None:
            opening.end = end
            self._numbers.going.setdefault(opening.wwpn, set()).add(opening)
            self._nursery.start_soon(self._bury, opening)

    def stuck(self, owner: int, asking: Opening | None = None) -> None:
        """This owner has held a stripe of the medium for more than a second, says another one (None: the fabric).

        It has to show that it is alive, and no more: its device may be slow, so nothing that would wait for its
        I/O is asked of it.
        """
        if asking is not None and asking.owner == owner:
            return
        if owner == OWNER:
            self._log.warning("the fabric itself holds blocks for more than a second", unit=self.name)
            return
        opening = next((o for o in self.openings.values() if o.owner == owner), None)
        if opening is None:
            if freed := self._recover(owner):  # else: another unit's, or free by now
                self._log.warning("freed blocks that a dead adapter held", unit=self.name, owner=owner, stripes=freed)
        elif opening.end is None and not opening.asked and not any(pending.narrow for pending in opening.pending):
            self._log.warning(
                "an adapter holds blocks for more than a second",
                unit=self.name,
                adapter=opening.adapter.name,
                wwpn=str(opening.wwpn),
            )
            opening.asked = True
            self._nursery.start_soon(self._ask, opening)

    async def _ask(self, opening: Opening) -> None:
        """See to it that an adapter shows that it is alive, or is not."""
        with trio.move_on_after(self.timeout) as scope:
            await opening.adapter.sign_of_life()
        opening.asked = False
        if scope.cancelled_caught and opening.end is None:
            self._kill(opening, "does not answer, and holds blocks that others wait for")

    # ------------------------------------------------------------ what the fabric does

    def settle(self, in_flight: Mapping[Nexus, InFlight] | None = None) -> bool:
        """Compare what every opening may do with what it was told, and tell it.

        in_flight: nexuses whose commands shall end now, whatever the verdict.  True when something was narrowed.
        """
        narrowed = False
        for opening in list(self.openings.values()):
            if opening.end is not None or opening.out.gone:
                continue
            verdict = opening.decide()
            action = (in_flight or {}).get(opening.nexus, InFlight.FINISH)
            if not opening.busy:
                action = InFlight.FINISH
            if verdict != opening.out or action is not InFlight.FINISH:
                narrowed |= self._send(opening, verdict, action)
        return narrowed

    async def barrier(self) -> None:
        """Wait until every narrowing that is out now is in force, and every adapter that is going is gone.

        Who may do nothing has no description either, whatever came between.
        """
        waiting: list[trio.Event] = []
        idle: list[tuple[Opening, tuple[int, ...]]] = []
        for opening in self.openings.values():
            if opening.end is not None:
                waiting.append(opening.gone)
            elif not any(opening.out.mask):
                idle.append((opening, tuple(opening.numbers)))
            waiting += [pending.settled for pending in opening.pending if pending.narrow]
        await trio.lowlevel.checkpoint()
        for event in waiting:
            await event.wait()
        for opening, numbers in idle:
            await self._released(opening, numbers)

    async def drained(self) -> None:
        """Wait until there is no opening any more."""
        while self.openings:
            await next(iter(self.openings.values())).gone.wait()
        await trio.lowlevel.checkpoint()

    async def settled(self, nexuses: Iterable[Nexus]) -> None:
        """The same for these nexuses only."""
        among = set(nexuses)
        for opening in [o for o in self.openings.values() if o.nexus in among]:
            for pending in [p for p in opening.pending if p.narrow]:
                await pending.settled.wait()
            if opening.end is not None:
                await opening.gone.wait()
        await trio.lowlevel.checkpoint()

    def _send(
        self,
        opening: Opening,
        verdict: Verdict,
        action: InFlight,
        *,
        seq: int | None = None,
    ) -> bool:
        """Give an opening its next Route; True when that has to be waited for."""
        older = tuple(opening.numbers)
        fds: list[int] = []
        kind = MediumKind.NONE
        must_ack = action is not InFlight.FINISH
        if not verdict.gone and any(verdict.mask):
            try:
                fds = self._describe(opening)
                kind = self.medium.kind
            except OSError as error:
                verdict = Verdict(read_only=verdict.read_only, blocks=verdict.blocks)
                if seq is None and verdict == opening.out and not must_ack:
                    return False  # as before, and that was said
                self._log.error("cannot give an adapter its medium", unit=self.name, reason=error.strerror)
        narrow = seq is None and (must_ack or verdict.narrows(opening.out))
        opening.epoch += 1
        opening.out = verdict
        pending = _Pending(next(self._numbers.seq) if seq is None else seq, narrow)
        opening.pending.append(pending)
        route = Route(
            seq=pending.seq,
            nexus=opening.handle,
            epoch=opening.epoch,
            mask=verdict.mask if kind is not MediumKind.NONE else _NOTHING,
            in_flight=action,
            gone=verdict.gone,
            read_only=verdict.read_only,
            medium=kind,
            owner=opening.owner,
            block_size=self.medium.block_size,
            blocks=verdict.blocks,
            losses=verdict.losses,
        )
        opening.adapter.post(route, fds)
        if narrow:
            told = {"unit": self.name, "adapter": opening.adapter.name, "wwpn": str(opening.wwpn), "gone": verdict.gone}
            self._publish("fence", told)
            self._nursery.start_soon(self._enforce, opening, pending, older)
        return narrow

    def _describe(self, opening: Opening) -> list[int]:
        """[medium, latch] for an adapter: a description of its own, with a lock byte of its own."""
        if self.medium.kind is MediumKind.NULL:
            return []
        number = next(self._numbers.lock)
        fd = self.medium.reopen()
        try:
            fabric_locks.take(fd, number, read_only=self.medium.read_only)
            fds = [fd, os.dup(self.medium.latch_fd)]
        except OSError:
            os.close(fd)
            raise
        opening.numbers.append(number)
        return fds

    async def _enforce(self, opening: Opening, pending: _Pending, older: tuple[int, ...]) -> None:
        """See to it that a narrower Route comes into force, by whatever it takes."""
        with trio.move_on_after(self.timeout) as scope:
            await self._in_force(opening, pending, older)
        if scope.cancelled_caught:
            if opening.end is None:
                said = "acknowledged a route, but keeps the medium" if pending.acked.is_set() else "does not answer"
                self._kill(opening, said)
            await self._in_force(opening, pending, older)
        pending.settled.set()
        if pending in opening.pending:
            opening.pending.remove(pending)
        if opening.out.gone:
            self._finish(opening, End.CLOSED)

    async def _in_force(self, opening: Opening, pending: _Pending, older: tuple[int, ...]) -> None:
        await pending.acked.wait()
        await self._released(opening, older)

    async def _released(self, opening: Opening, numbers: tuple[int, ...], *, loud: bool = False) -> None:
        """Wait until the descriptions with these lock bytes are gone; loud: say who has them when it takes long."""

        def late() -> None:
            by = ", ".join(fabric_locks.holders(self.medium.fd)) or "nobody that can be seen from here"
            adapter = opening.adapter.name
            self._log.critical("a medium is still held; others wait for it", unit=self.name, adapter=adapter, by=by)

        for number in numbers:
            if number in opening.numbers:
                await fabric_locks.until_free(self.medium.fd, number, 1, late=late if loud else None)
                if number in opening.numbers:
                    opening.numbers.remove(number)

    async def _bury(self, opening: Opening) -> None:
        """An opening is over: wait until its adapter has nothing of the medium any more, then forget it."""
        with trio.move_on_after(self.timeout) as scope:
            await self._released(opening, tuple(opening.numbers))
        if scope.cancelled_caught:
            said = "closed a path" if opening.end is End.CLOSED else "lost its link"
            self._kill(opening, f"{said}, but keeps the medium")
            await self._released(opening, tuple(opening.numbers), loud=True)
        freed = self._recover(opening.owner)
        if freed:
            self._log.warning(
                "freed blocks that an adapter held when it went",
                unit=self.name,
                adapter=opening.adapter.name,
                wwpn=str(opening.wwpn),
                stripes=freed,
            )
        del self.openings[opening.handle]
        going = self._numbers.going[opening.wwpn]
        going.discard(opening)
        if not going:
            del self._numbers.going[opening.wwpn]
        opening.gone.set()
        for pending in opening.pending:
            pending.acked.set()
            pending.settled.set()
        opening.pending.clear()

    def _recover(self, owner: int) -> int:
        """Free what a dead owner held; how many stripes.  What cannot be done is tried again when somebody waits."""
        try:
            return self.medium.recover(owner)
        except OSError as error:
            self._log.critical("cannot free what a dead adapter holds", unit=self.name, reason=str(error))
            return 0

    def _kill(self, opening: Opening, why: str) -> None:
        adapter = opening.adapter
        fields = {"adapter": adapter.name, "pid": adapter.pid, "wwpn": str(opening.wwpn), "unit": self.name}
        refused = adapter.kill()
        self._publish("kill", {**fields, "why": f"it {why}", "refused": refused})
        if refused is None:
            self._log.error(f"killed an adapter: it {why}", seconds=self.timeout, **fields)
        else:
            self._log.critical(f"an adapter {why}, and cannot be killed: {refused}; others wait for it", **fields)
