"""A ring with its doorbells, and who waits for what on it: from a chain that is posted to its completion."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence

import trio

from vhostfc.frontend.client import BackendError, RingSetup
from vhostfc.frontend.packed import PackedRing
from vhostfc.frontend.ring import DriverRing, RingError, Used

#: An eventfd begins at 1 where QEMU makes it; so does our kick: a back end must look at a ring when it is enabled.
QEMU_KICK = 1


class Posted:
    """A chain that the device has.  done(used, error) is called once: used by the device, or never to be."""

    __slots__ = ("_done", "error", "event", "head", "used")

    def __init__(self, head: int, done: Callable[[Posted], None] | None = None) -> None:
        self.head = head
        self.used: Used | None = None
        self.error: BackendError | None = None
        self.event = trio.Event()
        self._done = done

    def finish(self, used: Used | None, error: BackendError | None = None) -> None:
        self.used, self.error = used, error
        self.event.set()
        if self._done is not None:
            self._done(self)

    async def wait(self) -> Used:
        """How the device used it.  Raises BackendError when it will not any more."""
        await self.event.wait()
        if self.used is None:
            raise BackendError(str(self.error))
        return self.used


class DriverQueue:
    """One virtqueue of the driver; serve() and watch() run in the background while the driver is open.

    vring: its ring, of either layout.
    stray: heads that the device used and nobody posted, in order (for tests that drive the ring raw).
    broken: the back end has reported the ring broken.
    """

    def __init__(self, index: int, ring: DriverRing | PackedRing) -> None:
        self.index = index
        self.vring = ring
        self.kick_fd = os.eventfd(QEMU_KICK, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.err_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.kicks = 0
        self.stray: list[Used] = []
        self.broken = trio.Event()
        self._posted: dict[int, Posted] = {}
        self._room = trio.lowlevel.ParkingLot()
        self._sleep: trio.CancelScope | None = None
        self._lent = False
        self._returned = trio.Event()
        self._failure: BackendError | None = None

    def __repr__(self) -> str:
        return f"<DriverQueue {self.index} [{len(self._posted)} posted] {self.vring!r}>"

    @property
    def ring(self) -> DriverRing:
        """The split ring, for who looks into it."""
        if not isinstance(self.vring, DriverRing):
            raise TypeError(f"ring {self.index} is packed")
        return self.vring

    @property
    def packed(self) -> PackedRing:
        """The packed ring, for who looks into it."""
        if not isinstance(self.vring, PackedRing):
            raise TypeError(f"ring {self.index} is split")
        return self.vring

    def setup(self, base: int) -> RingSetup:
        """What the back end is told at the start.  base: where the ring goes on, as GET_VRING_BASE gave it."""
        ring = self.vring
        return RingSetup(
            self.index, ring.size, ring.desc.user, ring.avail.user, ring.used.user,
            self.kick_fd, self.call_fd, self.err_fd, base,
        )  # fmt: skip

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    # ------------------------------------------------------------------ posting

    async def room(self, pieces: int) -> None:
        """Wait until a chain of so many pieces fits."""
        while not self.vring.room(pieces):
            self.check()
            await self._room.park()

    def post(
        self,
        readable: Sequence[tuple[int, int]],
        writable: Sequence[tuple[int, int]],
        done: Callable[[Posted], None] | None = None,
    ) -> Posted:
        """Give the device a chain of (guest address, length) pieces; there must be room."""
        self.check()
        posted = self.expect(self.vring.add(readable, writable), done)
        self.publish()
        return posted

    def expect(self, head: int, done: Callable[[Posted], None] | None = None) -> Posted:
        """Wait for a head that was offered raw."""
        posted = self._posted[head] = Posted(head, done)
        return posted

    def publish(self) -> None:
        """Show the device what was offered, and kick it if it wants to be."""
        if self.vring.publish():
            self.kick()

    def kick(self) -> None:
        self.kicks += 1
        with contextlib.suppress(BlockingIOError):  # the counter is full: it has been told
            os.eventfd_write(self.kick_fd, 1)

    @property
    def posted(self) -> int:
        """Chains that somebody waits for."""
        return len(self._posted)

    def check(self) -> None:
        """Raises BackendError when the device will not use what is posted."""
        if self._failure is not None:
            raise BackendError(str(self._failure))

    # ------------------------------------------------------------------ completions

    def collect(self) -> int:
        """Finish what the device has used; how many.  Nonsense in the used ring fails the queue."""
        count = 0
        try:
            while (used := self.vring.take()) is not None:
                count += 1
                posted = self._posted.pop(used.head, None)
                if posted is None:
                    self.stray.append(used)
                else:
                    posted.finish(used)
        except RingError as error:
            self.fail(BackendError(f"ring {self.index}: {error}"))
        if count:
            self._room.unpark_all()
        return count

    def fail(self, error: BackendError) -> None:
        """Nothing that is posted will be used any more, nor what is posted later, until reset()."""
        self._failure = self._failure or error
        failed, self._posted = self._posted, {}
        for posted in failed.values():
            posted.finish(None, error)
        self._room.unpark_all()

    def reset(self, error: BackendError) -> None:
        """Start afresh after a reset of the device; what was posted fails with `error`."""
        self.fail(error)
        self._failure = None
        self.broken = trio.Event()
        self.vring.reset()

    async def serve(self) -> None:
        """Collect whenever the device interrupts."""
        while True:
            if self._lent:
                await self._returned.wait()
                continue
            self.collect()
            if not self.vring.arm():
                await trio.lowlevel.checkpoint()
                continue
            with trio.CancelScope() as self._sleep:
                await trio.lowlevel.wait_readable(self.call_fd)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self.call_fd)
            self._sleep = None

    async def watch(self) -> None:
        """Notice that the back end calls the ring broken (SET_VRING_ERR)."""
        while True:
            await trio.lowlevel.wait_readable(self.err_fd)
            os.eventfd_read(self.err_fd)
            if not self._lent:  # who drives it collects, and knows whether its memory is still there
                self.collect()
            self.broken.set()
            self.fail(BackendError(f"the back end says that ring {self.index} is broken"))

    @contextlib.asynccontextmanager
    async def lend(self) -> AsyncIterator[DriverRing | PackedRing]:
        """The ring for somebody else to drive; it must be idle, and come back idle."""
        if self._posted or self._lent:
            raise RuntimeError(f"ring {self.index} is in use")
        self.check()
        self._lent, self._returned = True, trio.Event()
        if self._sleep is not None:
            self._sleep.cancel()
        try:
            yield self.vring
        finally:
            self._lent = False
            self._returned.set()
