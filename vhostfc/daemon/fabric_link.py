"""One adapter's link, the fabric's end: what comes is passed on at once, what goes out waits in two lanes.

Routes overtake frames.  The reader waits for nothing but the next packet; frames that commands send wait
for room, so that an adapter that does not read costs no more memory than its commands' ration.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import count

import structlog
import trio

from vhostfc.daemon.fabric_locks import Process
from vhostfc.daemon.fdsocket import LinkSocket, close_fds
from vhostfc.daemon.fencing import Fence, Opening
from vhostfc.errors import LinkLost
from vhostfc.fabric import link
from vhostfc.fabric.link import Hello, LinkError, Message, Note, Route
from vhostfc.fabric.switch import NPort

#: Seconds in which an adapter has to say HELLO.
GREETING = 5.0
#: Frames that wait for the adapter before commands that have more are made to wait too.
LANE = 256
#: Beyond this many, answers to what the adapter sends without reading are discarded, as class 3 may.
LANE_MAX = 16384


class Link:
    """A link that has said HELLO.  It is the Adapter that fencing talks to.

    openings: what the adapter has open, by handle.
    """

    def __init__(self, socket: LinkSocket, process: Process, hello: Hello) -> None:
        self.name = hello.name
        self.pid = process.pid
        self.kind = "link"
        self.f_port = 0
        self.openings: dict[int, tuple[Fence, Opening]] = {}
        self._socket = socket
        self._process = process
        self._routes: deque[tuple[Route | link.Ping, list[int]]] = deque()
        self._frames: deque[bytes] = deque()
        self._news = trio.Event()
        self._room = trio.Event()
        self._closed = False
        self._scope = trio.CancelScope()
        self._seqs: dict[int, int] = {}  # a Route's seq -> its handle
        self._pings = count(1)
        self._asked: dict[int, trio.Event] = {}

    def __repr__(self) -> str:
        return f"<Link {self.name} (process {self.pid})>"

    # ------------------------------------------------------------ what goes out

    def post(self, route: Route, fds: list[int]) -> None:
        """fencing's Adapter."""
        if self._closed:
            close_fds(fds)
            return
        self._seqs[route.seq] = route.nexus
        self._routes.append((route, fds))
        self._news.set()

    async def sign_of_life(self) -> None:
        """fencing's Adapter."""
        number, answered = next(self._pings) & 0xFFFFFFFF, trio.Event()
        self._asked[number] = answered
        if not self._closed:
            self._routes.append((link.Ping(number), []))
            self._news.set()
        try:
            await answered.wait()
        finally:
            del self._asked[number]

    def post_frame(self, what: bytes | Note) -> None:
        """Send a frame, or a note for people, when its turn comes."""
        if not self._closed and len(self._frames) < LANE_MAX:
            self._frames.append(link.encode(what if isinstance(what, Note) else link.Frame(what)))
            self._news.set()

    async def send_frame(self, what: bytes | Note) -> None:
        """The same, when there is room in the lane."""
        await trio.lowlevel.checkpoint()
        while len(self._frames) >= LANE and not self._closed:
            await self._room.wait()
        self.post_frame(what)

    def link_down(self) -> None:
        """The door's Attachment: the adapter finds its link broken, and tries to connect again."""
        self._scope.cancel()

    def link_up(self) -> None:
        """The adapter comes back with another link."""

    def clear_virtual_link(self, ports: Sequence[NPort]) -> bool:
        """There is no FIP on a link."""
        return False

    def kill(self) -> str | None:
        """fencing's Adapter."""
        return self._process.kill()

    async def _write(self) -> None:
        while True:
            if self._routes:
                message, fds = self._routes.popleft()
                try:
                    await self._socket.send(link.encode(message), fds)
                finally:
                    close_fds(fds)
            elif self._frames:
                await self._socket.send(self._frames.popleft())
                if len(self._frames) < LANE:
                    self._room.set()
                    self._room = trio.Event()
            else:
                self._news = trio.Event()
                await self._news.wait()

    # ------------------------------------------------------------ what comes

    async def serve(self, handle: Callable[[Link, Message], None], log: structlog.typing.FilteringBoundLogger) -> None:
        """Until the adapter goes, dies or says what it must not.  `handle` gets what is not fencing's own."""
        try:
            with self._scope:
                await self._serve(handle, log)
        finally:
            self._closed = True
            self._room.set()
            self._socket.close()
            for _, fds in self._routes:
                close_fds(fds)
            self._routes.clear()
            self._frames.clear()

    async def _serve(self, handle: Callable[[Link, Message], None], log: structlog.typing.FilteringBoundLogger) -> None:
        async with trio.open_nursery() as nursery:

            async def part(run: Callable[[], Awaitable[None]]) -> None:
                try:
                    await run()
                except LinkLost as error:
                    log.warning("a link broke", adapter=self.name, pid=self.pid, reason=str(error))
                nursery.cancel_scope.cancel()

            nursery.start_soon(part, self._write)
            nursery.start_soon(part, lambda: self._read(handle, log))
            if not self._process.is_us:
                nursery.start_soon(part, self._process.ended)

    async def _read(self, handle: Callable[[Link, Message], None], log: structlog.typing.FilteringBoundLogger) -> None:
        while True:
            try:
                message = await receive(self._socket)
                if message is None:
                    return
                if not self._fencing(message):
                    handle(self, message)
            except LinkError as error:
                log.warning("an adapter does not speak the link's protocol", adapter=self.name, reason=str(error))
                return
            await trio.lowlevel.checkpoint()

    def _fencing(self, message: Message) -> bool:
        """Messages about openings; False for all others."""
        match message:
            case link.RouteAck(seq):
                found = self.openings.get(self._seqs.pop(seq, 0))
                if found is not None:
                    found[0].acked(found[1], seq)
            case link.Close(handle):
                found = self.openings.pop(handle, None)
                if found is not None:
                    found[0].close(found[1])
            case link.LatchStuck(handle, owner):
                found = self.openings.get(handle)
                if found is not None:
                    found[0].stuck(owner, found[1])
            case link.Pong(number):
                if number in self._asked:
                    self._asked[number].set()
            case _:
                return False
        return True

    def lost(self) -> list[Opening]:
        """The link is no more; returns the openings that have to be buried."""
        openings = [opening for _, opening in self.openings.values()]
        for fence, opening in self.openings.values():
            fence.lost(opening)
        self.openings.clear()
        return openings


async def receive(socket: LinkSocket) -> Message | None:
    """The next message; None at the end.  Raises LinkError for what is none; adapters send no descriptors."""
    packet, fds = await socket.receive()
    if fds:
        close_fds(fds)
        raise LinkError("a message with file descriptors, which only the fabric sends")
    return link.decode(packet) if packet else None


async def greet(
    socket: LinkSocket, process: Process, fabric: str, *, is_down: Callable[[str], bool] = lambda name: False
) -> Link | None:
    """The adapter's HELLO, and ours; raises LinkError, LinkLost.  None: it went away, or its link shall be down."""
    with trio.move_on_after(GREETING):
        hello = await receive(socket)
        if hello is None:
            return None
        if not isinstance(hello, Hello):
            raise LinkError(f"{hello.kind.name} before HELLO")
        if is_down(hello.name):
            return None
        await socket.send(link.encode(Hello(fabric)))
        if hello.version != link.VERSION:
            raise LinkError(f"version {hello.version} of the protocol; this fabric speaks {link.VERSION}")
        return Link(socket, process, hello)
    raise LinkError(f"no HELLO in {GREETING:g} s")
