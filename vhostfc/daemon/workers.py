"""The worker threads, as the rest of the daemon sees them: messages that are awaited until they are in force.

Each worker has copies of the tables, so most messages go to all of them and are done when the last has
acknowledged.  One task per worker reads what it says: acknowledgements wake whoever waits for them,
punts and control requests start a task each; the engine's rations bound how many there are.

Request rings are dealt out among the workers as they come.  When a worker says that it has little rest, what each ring
does is looked at for a moment, and one goes to another worker if that helps (balance.py); so nothing of this wakes an
adapter that is idle.

The reading tasks are shielded from cancellation: at the end rings must still be drained and routes
closed, and that means messages.  They stop when the context is left.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import NamedTuple

import structlog
import trio

from vhostfc.daemon import balance
from vhostfc.native import Engine, Event, EventKind, InFlight, Map, Match, Memory, RingRole, RingSetup
from vhostfc.ports import base
from vhostfc.vhost.effects import MemoryRegion, StartRing
from vhostfc.vhost.messages import Region

__all__ = ["Aborted", "Match", "Workers", "WorkersError"]

#: Events taken from one worker before other tasks get a turn.
TURN = 64
#: How long the rings of busy workers are looked at before one is moved, seconds.
LOOK = 0.2
#: How long a ring that is to move may take to drain, seconds; then it stays where it is.
PATIENCE = 0.05

_IN_FLIGHT = {
    base.InFlight.FINISH: InFlight.FINISH,
    base.InFlight.RESET: InFlight.RESET,
    base.InFlight.ABORTED: InFlight.ABORTED,
}
#: How a front end's wish can fail, in words for an administrator.
_WHY = {
    errno.EFAULT: "a part of the ring is outside guest memory",
    errno.EFBIG: "the region is larger than its file",
}

Handler = Callable[[Event], Awaitable[None]]
Post = Callable[[int, int], None]


class Aborted(NamedTuple):
    """ended: how many commands.  kept: with some of them their device has not ended, it still has them."""

    ended: int
    kept: bool


class WorkersError(Exception):
    """A front end's wish that cannot be fulfilled; str() says what and why on one line."""


class Workers:
    """See the head of the file."""

    def __init__(self, engine: Engine, *, log: structlog.typing.FilteringBoundLogger) -> None:
        self._engine = engine
        self._log = log
        self._seq = itertools.count(1)
        self._waiting: dict[int, tuple[trio.Event, list[Event]]] = {}
        self._maps: dict[Region, Map] = {}
        self._listening = [trio.CancelScope(shield=True) for _ in range(engine.workers)]
        self._nursery: trio.Nursery | None = None
        self._punt: Handler | None = None
        self._control: Handler | None = None
        self._buffers: Callable[[], None] = lambda: None
        self._broken: Callable[[Event], None] = lambda event: None
        self._latch_stuck: Callable[[int], None] = lambda owner: None
        self._owners: dict[int, int] = {}  # by request ring
        self._rings = trio.Lock()  # whose order this is: messages about rings find their owners
        self._balancing = False
        self._moved = 0

    @classmethod
    @asynccontextmanager
    async def running(
        cls,
        count: int,
        *,
        log: structlog.typing.FilteringBoundLogger,
        uring: bool = True,
        cpus: Sequence[int] = (),
        **options: int,
    ) -> AsyncIterator[Workers]:
        """Start `count` threads; on leaving, stop them and free what they hold.

        cpus: none, or one for each thread to stay on; OSError where that cannot be.  options: Engine's, in part.
        """
        engine = Engine(count, uring=uring, **options)
        try:
            for worker, cpu in enumerate(cpus):
                engine.pin(worker, cpu)
        except OSError:
            engine.close()
            raise
        workers = cls(engine, log=log)
        if not engine.uses_uring:
            log.warning("io_uring is denied here; a pool of threads does file I/O")
        try:
            async with trio.open_nursery() as nursery:
                for worker in range(count):
                    nursery.start_soon(workers._listen, worker)
                try:
                    yield workers
                finally:
                    for scope in workers._listening:
                        scope.cancel()
        finally:
            for region in workers._maps.values():
                region.close()
            workers._close(engine)

    def _close(self, engine: Engine) -> None:
        try:
            engine.close()
        except OSError as error:
            # A thread still uses the memory: unmapping it would be worse than leaving without a goodbye.
            self._log.critical("a worker thread does not stop; leaving at once", reason=str(error))
            os._exit(1)

    def attach(
        self,
        nursery: trio.Nursery,
        *,
        punt: Handler,
        control: Handler,
        buffers: Callable[[], None],
        broken: Callable[[Event], None],
        latch_stuck: Callable[[int], None] = lambda owner: None,
    ) -> None:
        """Who answers what the workers say; punt and control run as tasks of the nursery."""
        self._nursery = nursery
        self._punt, self._control = punt, control
        self._buffers, self._broken, self._latch_stuck = buffers, broken, latch_stuck

    # ------------------------------------------------------------ listening

    async def _listen(self, worker: int) -> None:
        with self._listening[worker]:
            while True:
                await trio.lowlevel.wait_readable(self._engine.fd(worker))
                for _ in range(TURN):
                    event = self._engine.next(worker)
                    if event is None:
                        break
                    self._heard(event)
                await trio.lowlevel.checkpoint()

    def _heard(self, event: Event) -> None:
        match event.kind:
            case EventKind.ACK:
                done, acks = self._waiting.pop(event.seq)
                acks.append(event)
                done.set()
            case EventKind.PUNT:
                self._start(self._punt, event)
            case EventKind.CONTROL:
                self._start(self._control, event)
            case EventKind.BUFFERS:
                self._buffers()
            case EventKind.BROKEN:
                self._broken(event)
            case EventKind.LATCH:
                self._latch_stuck(event.value)
            case EventKind.BUSY:
                if not self._balancing:
                    self._balancing = True
                    self._start(self._balance, event)

    def _start(self, handler: Handler | None, event: Event) -> None:
        assert self._nursery is not None, "attach() comes before rings"
        assert handler is not None
        if not self._nursery.cancel_scope.cancel_called:
            self._nursery.start_soon(handler, event)

    # ------------------------------------------------------------ asking

    async def _ask(self, workers: Sequence[int], post: Post) -> list[Event]:
        """Post to these workers and wait for all of their acknowledgements."""
        tickets = []
        for worker in workers:
            seq = next(self._seq)
            ticket: tuple[trio.Event, list[Event]] = (trio.Event(), [])
            self._waiting[seq] = ticket
            post(worker, seq)
            tickets.append(ticket)
        for done, _ in tickets:
            await done.wait()
        return [ack for _, (ack,) in tickets]

    @property
    def _all(self) -> range:
        return range(self._engine.workers)

    async def ping(self) -> None:
        """Returns when every worker has answered."""
        await self._ask(self._all, self._engine.ping)

    def counters(self) -> dict[str, int]:
        """The workers' counters, added up, and how often a ring has moved between them."""
        total = {"rings_moved": self._moved}
        for worker in self._all:
            for name, value in asdict(self._engine.stats(worker)).items():
                total[name] = total.get(name, 0) + value
        return total

    # ------------------------------------------------------------ guest memory and rings

    async def set_memory(self, regions: Sequence[MemoryRegion], *, timeout: float) -> None:
        """The table from now on.  Waits until nothing uses what is gone, but not longer than `timeout` seconds:
        a region that a stuck command needs stays mapped until that command ends."""
        maps: dict[Region, Map] = {}
        new: list[Map] = []
        try:
            for one in regions:
                if one.fd < 0:
                    maps[one.region] = self._maps[one.region]
                else:
                    maps[one.region] = made = _map(one)
                    new.append(made)
            with Memory(maps.values()) as memory:
                with trio.move_on_after(timeout) as late:
                    await self._ask(self._all, lambda worker, seq: self._engine.set_memory(worker, seq, memory))
        except (OSError, WorkersError) as error:
            for made in new:
                made.close()
            raise WorkersError(str(error)) from error
        if late.cancelled_caught:
            self._log.warning("a command still uses memory that the guest gave up; it stays mapped until that ends")
        for gone in [kept for kept in self._maps.values() if kept not in maps.values()]:
            gone.close()
        self._maps = maps

    def _worker_of(self, index: int) -> int:
        """Control and event ring belong to the first worker, a new request ring to the one that has fewest."""
        if index < RingRole.REQUEST:
            return 0
        if index not in self._owners:
            owned = [*self._owners.values()]
            self._owners[index] = min(self._all, key=owned.count)
        return self._owners[index]

    async def _ask_one(self, index: int, post: Post, doing: str) -> int:
        """Ask the worker that owns ring `index`; its answer's value.  Raises WorkersError."""
        if index < RingRole.REQUEST:
            (ack,) = await self._ask([self._worker_of(index)], post)
        else:
            async with self._rings:
                (ack,) = await self._ask([self._worker_of(index)], post)
        if ack.result < 0:
            raise WorkersError(f"ring {index}: {doing}: {_WHY.get(-ack.result) or os.strerror(-ack.result)}")
        return ack.value

    async def start_ring(self, ring: StartRing) -> None:
        setup = RingSetup(
            role=RingRole(min(ring.index, RingRole.REQUEST)),
            size=ring.size,
            desc=ring.desc,
            avail=ring.avail,
            used=ring.used,
            features=ring.features,
            base=ring.base,
            kick_fd=ring.kick_fd,
            call_fd=ring.call_fd,
            err_fd=ring.err_fd,
        )
        await self._ask_one(ring.index, lambda w, s: self._engine.ring_start(w, s, ring.index, setup), "starting it")

    async def enable_ring(self, index: int, *, enabled: bool) -> None:
        await self._ask_one(index, lambda w, s: self._engine.ring_enable(w, s, index, enabled=enabled), "enabling it")

    async def set_call(self, index: int, fd: int) -> None:
        await self._ask_one(index, lambda w, s: self._engine.ring_call(w, s, index, fd), "its call descriptor")

    async def set_err(self, index: int, fd: int) -> None:
        await self._ask_one(index, lambda w, s: self._engine.ring_err(w, s, index, fd), "its error descriptor")

    async def stop_ring(self, index: int, drain: float) -> int:
        """Stop within `drain` seconds and a little; the next avail index."""
        until = trio.current_time() + drain

        def post(worker: int, seq: int) -> None:  # what a move has taken meanwhile is taken off
            self._engine.ring_stop(worker, seq, index, max(until - trio.current_time(), 0))

        return await self._ask_one(index, post, "stopping it")

    async def reset(self) -> None:
        """Forget all rings; they are stopped."""
        await self._ask(self._all, self._engine.reset)

    def _work(self) -> list[dict[int, int]]:
        work = [self._engine.work(worker) for worker in self._all]
        return [{ring: done for ring, done in rings.items() if ring in self._owners} for rings in work]

    async def _balance(self, _: Event) -> None:
        """A worker has little rest; others may have."""
        try:
            before = self._work()
            await trio.sleep(LOOK)
            move = balance.choose(balance.done_between(before, self._work()))
            if move is not None:
                await self.move_ring(move.ring, move.target)
        finally:
            self._balancing = False

    async def move_ring(self, index: int, worker: int) -> bool:
        """Give a request ring to another worker.  False: it stays, because it does not come to rest, or is stopped."""
        async with self._rings:
            source = self._worker_of(index)
            if source == worker or worker not in self._all:
                return False
            with trio.CancelScope(shield=True):  # or nobody knew where it is; PATIENCE bounds it
                (ack,) = await self._ask([source], lambda w, s: self._engine.ring_move(w, s, index, worker, PATIENCE))
            if ack.result < 0:
                return False
            self._owners[index] = worker
            self._moved += 1
        self._log.debug("a ring has moved", ring=index, source=source, target=worker)
        return True

    def owners(self) -> dict[int, int]:
        """Which worker has which request ring."""
        return dict(self._owners)

    async def put_event(self, event: bytes) -> bool:
        """Put an event into one of the guest's buffers; False when it has given none."""
        return bool(await self._ask_one(RingRole.EVENT, lambda w, s: self._engine.event(w, s, event), "an event"))

    # ------------------------------------------------------------ targets, routes, commands

    async def set_target(self, target: int, *, present: bool) -> None:
        await self._ask(self._all, lambda w, s: self._engine.target(w, s, target, present=present))

    async def set_route(self, target: int, lun: int, nexus: int, route: base.Route, in_flight: base.InFlight) -> None:
        """Returns when it is in force everywhere: nothing admitted before can touch the old medium any more."""
        await self._ask(
            self._all,
            lambda worker, seq: self._engine.route(
                worker,
                seq,
                target,
                lun,
                mask=route.mask,
                medium=route.medium,
                nexus=nexus,
                epoch=route.epoch,
                read_only=route.read_only,
                gone=route.gone,
                in_flight=_IN_FLIGHT[in_flight],
            ),
        )

    async def abort(self, match: Match) -> Aborted:
        """End the guest's commands that match.  They are in the used rings when this returns."""
        acks = await self._ask(self._all, lambda w, s: self._engine.abort(w, s, match))
        return Aborted(sum(ack.value for ack in acks), any(ack.result == -errno.ETIMEDOUT for ack in acks))

    async def query(self, match: Match) -> int:
        """How many of the guest's commands match."""
        return sum(ack.value for ack in await self._ask(self._all, lambda w, s: self._engine.query(w, s, match)))

    def reply(self, event: Event, result: base.ScsiResult, response: int) -> None:
        """Answer a punt, unless an abort, a reset or a stop has done so meanwhile."""
        self._engine.reply(
            event.handle,
            response=response,
            status=result.status,
            status_qualifier=result.status_qualifier,
            residual=max(result.residual, 0),
            sense=result.sense,
            data_in=result.data_in,
        )

    def reply_control(self, event: Event, answer: bytes) -> None:
        """Answer a control request."""
        self._engine.reply_control(event.handle, answer[: event.data_in_length])


def _map(one: MemoryRegion) -> Map:
    region = one.region
    try:
        return Map(
            one.fd,
            gpa=region.guest_phys,
            size=region.size,
            uaddr=region.user_addr,
            offset=region.mmap_offset,
        )
    except OSError as error:
        why = _WHY.get(error.errno or 0) or os.strerror(error.errno or 0)
        raise WorkersError(f"memory at {region.guest_phys:#x}, {region.size:#x} bytes: {why}") from error
