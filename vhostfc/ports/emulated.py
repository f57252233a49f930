"""A port on the software fabric: the N_Port engine of `fc/`, pumped by a link.

One link carries one login.  The engine outlives the link: when the fabric restarts, routes are closed
first, then it is connected to again, for ever, and commands that were under way meet their end in
`emulated_commands`.  The link's reader only ever hands on what it reads; it waits for nobody.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
import trio

from vhostfc.errors import LinkLost, LoginRefused
from vhostfc.fabric import link
from vhostfc.fc.discovery import Discovered, TopologyChanged, visible
from vhostfc.fc.initiator import CommandDone, ManagementDone
from vhostfc.fc.nport import LocalState, LoggedOut, LoginRejected, NPort
from vhostfc.fc.remote import RemotePort as FcRemotePort
from vhostfc.fc.remote import RemoteState
from vhostfc.ports.base import Path as PortPath
from vhostfc.ports.base import (
    Port,
    PortEvent,
    PortEventKind,
    PortIdentity,
    PortState,
    RemotePort,
    RemotePortState,
    ScsiResult,
    TaskManagement,
    TaskManagementResponse,
    Topology,
    Unit,
)
from vhostfc.ports.emulated_commands import Commands
from vhostfc.ports.emulated_paths import MakeMedium, Paths, native_medium
from vhostfc.ports.linksocket import LinkSocket, close_fds
from vhostfc.ports.subscriber import Subscriber

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
_HELLO_TIMEOUT = 5.0
_LOGOUT_TIMEOUT = 1.0
#: How long login() waits for targets that do not answer, once the fabric has let us in.
_DISCOVERY_TIMEOUT = 5.0

_REMOTE_STATES = {
    RemoteState.READY: RemotePortState.ONLINE,
    RemoteState.UNLISTED: RemotePortState.BLOCKED,
    RemoteState.GONE: RemotePortState.NOT_PRESENT,
}


class EmulatedFabric:
    """The way into a software fabric.

    socket_path: the fabric's link socket.  name: ours, for people.  hold_timeout: seconds for which commands
    wait for a lost target, and for which a target that left the name server keeps its units.
    command_timeout: seconds for one command.  alive: returns when all that does I/O has answered.
    """

    def __init__(
        self,
        socket_path: Path,
        *,
        name: str,
        hold_timeout: float,
        command_timeout: float,
        log: structlog.typing.FilteringBoundLogger,
        make_medium: MakeMedium = native_medium,
        alive: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
    ) -> None:
        self._path = socket_path
        self._name = name
        self._hold = hold_timeout
        self._timeout = command_timeout
        self._log = log
        self._make_medium = make_medium
        self._alive = alive

    @asynccontextmanager
    async def login(self, identity: PortIdentity) -> AsyncIterator[Port]:
        """See the seam.  Waits for a fabric that is not there yet; refused is only what a fabric refuses."""
        port = EmulatedPort(
            identity,
            socket_path=self._path,
            name=self._name,
            hold=self._hold,
            timeout=self._timeout,
            log=self._log.bind(wwpn=str(identity.wwpn)),
            make_medium=self._make_medium,
            alive=self._alive,
        )
        failure: Exception | None = None
        refusal: str | None = None
        # A cancellation from outside must not take the link away before LOGO has gone over it.
        linked = trio.CancelScope(shield=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(port.run, linked)
            try:
                refusal = await port.decided()
                if refusal is None:
                    yield port
            except Exception as error:  # raised below, outside the nursery, as it is
                failure = error
            finally:
                if refusal is None:
                    with trio.move_on_after(_LOGOUT_TIMEOUT) as scope:
                        scope.shield = True
                        await port.log_out()
                linked.cancel()
        if refusal is not None:
            raise LoginRefused(refusal)
        if failure is not None:
            raise failure


class EmulatedPort:
    """A Port of the seam."""

    def __init__(
        self,
        identity: PortIdentity,
        *,
        socket_path: Path,
        name: str,
        hold: float,
        timeout: float,
        log: structlog.typing.FilteringBoundLogger,
        make_medium: MakeMedium,
        alive: Callable[[], Awaitable[None]],
    ) -> None:
        self._identity = identity
        self._socket_path = socket_path
        self._name = name
        self._log = log
        self._engine = NPort(identity.wwpn, identity.wwnn, symbolic_name=identity.symbolic_name, hold=hold)
        self._commands = Commands(self._engine, hold=hold, timeout=timeout, pump=self._pump)
        self._paths = Paths(
            send=self._post,
            emit=self._emit,
            reachable=self._reachable,
            gone=self._is_gone,
            make_medium=make_medium,
            log=log,
        )
        self._alive = alive
        self._linked = False
        self._urgent: deque[bytes] = deque()
        self._frames: deque[bytes] = deque()
        self._to_send = trio.Event()
        self._earlier = trio.Event()
        self._asleep_until = 0.0
        self._subscribers: weakref.WeakSet[Subscriber] = weakref.WeakSet()
        self._discovered = 0
        self._changed = trio.Event()
        self._note = ""
        self._refusal: str | None = None
        self._was_online = False
        self._logged_out = trio.Event()
        self._said: str | None = None

    # ---------------------------------------------------------------- the seam

    @property
    def identity(self) -> PortIdentity:
        return self._identity

    def snapshot(self) -> Topology:
        state = PortState.LOGGING_IN
        if self._engine.state is LocalState.READY:
            state = PortState.ONLINE
        elif self._engine.state is LocalState.LINK_DOWN:
            state = PortState.LINK_DOWN
        remotes = tuple(_remote_port(remote) for _, remote in sorted(self._engine.remotes.items()))
        return Topology(state, self._engine.port_id, self._engine.fabric_name, remotes)

    def events(self) -> AsyncIterator[PortEvent]:
        """See the seam.  Begins with "look again": what happened before is in the snapshot."""
        subscriber = Subscriber()
        subscriber.put(PortEvent(PortEventKind.TOPOLOGY))
        self._subscribers.add(subscriber)
        return subscriber

    async def rescan(self) -> None:
        number = self._engine.rescan(trio.current_time())
        self._pump()
        while self._discovered < number and self._engine.state is LocalState.READY:
            await self._changed.wait()

    async def execute(
        self, unit: Unit, cdb: bytes, *, data_out: bytes = b"", data_in: int = 0, attribute: int = 0, tag: int = 0
    ) -> ScsiResult:
        return await self._commands.execute(unit, cdb, data_out, data_in, attribute, tag)

    async def manage(self, unit: Unit, function: TaskManagement, tag: int | None = None) -> TaskManagementResponse:
        return await self._commands.manage(unit, function, tag)

    async def open_path(self, unit: Unit) -> PortPath | None:
        return await self._paths.open(unit)

    def latch_stuck(self, owner: int) -> None:
        self._paths.latch_stuck(owner)

    # ---------------------------------------------------------------- login and logout

    async def decided(self) -> str | None:
        """Wait for the first login: None when we are in and have looked around, else why we are refused."""
        while not self._was_online and self._refusal is None:
            await self._changed.wait()
        with trio.move_on_after(_DISCOVERY_TIMEOUT):
            while self._refusal is None and not self._discovered:
                await self._changed.wait()
        return self._refusal

    async def log_out(self) -> None:
        """LOGO, and wait until it is answered and sent."""
        if not self._linked:
            return
        self._engine.log_out(trio.current_time())
        self._pump()
        await self._logged_out.wait()

    # ---------------------------------------------------------------- links, one after the other

    async def run(self, linked: trio.CancelScope) -> None:
        """Keep the port linked until `linked` is cancelled."""
        try:
            with linked:
                await self._link_for_ever()
        finally:
            self._paths.end_all()

    async def _link_for_ever(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            try:
                with await LinkSocket.connect(self._socket_path) as sock:
                    await self._greet(sock)
                    pause = _FIRST_PAUSE
                    await self._serve(sock)
            except (OSError, LinkLost) as error:
                self._say(f"waiting for the fabric at {self._socket_path}: {_reason(error)}")
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _greet(self, sock: LinkSocket) -> None:
        await sock.send(link.encode(link.Hello(self._name)))
        with trio.move_on_after(_HELLO_TIMEOUT):
            message, fds = await sock.receive()
            close_fds(fds)
            if not isinstance(message, link.Hello):
                raise LinkLost(f"it says {message.kind.name} for HELLO")
            if message.version != link.VERSION:
                raise LinkLost(f"it speaks version {message.version} of the link, we speak {link.VERSION}")
            self._say(f"linked to the fabric {message.name!r}")
            return
        raise LinkLost("it does not say HELLO")

    async def _serve(self, sock: LinkSocket) -> None:
        """One link, from login until it breaks; then close what stood on it."""
        self._linked = True
        self._to_send = trio.Event()
        broken: LinkLost | None = None
        try:
            async with trio.open_nursery() as nursery:
                self._engine.link_up(trio.current_time())
                self._pump()
                nursery.start_soon(self._write, sock, nursery.cancel_scope)
                nursery.start_soon(self._keep_time)
                try:
                    while True:
                        message, fds = await sock.receive()
                        if isinstance(message, link.Ping):
                            nursery.start_soon(self._pong, message.number)
                        else:
                            self._take(message, fds)
                except LinkLost as error:
                    broken = error
                nursery.cancel_scope.cancel()
        finally:
            self._linked = False
            self._urgent.clear()
            self._frames.clear()
            self._engine.link_down(trio.current_time())
            self._pump()
        sock.close()
        self._say(f"lost the fabric: {broken or 'the link broke'}")
        await self._paths.close_all()

    async def _write(self, sock: LinkSocket, scope: trio.CancelScope) -> None:
        try:
            while True:
                while self._urgent or self._frames:
                    await sock.send((self._urgent or self._frames).popleft())
                await self._to_send.wait()
                self._to_send = trio.Event()
        except LinkLost:
            scope.cancel()  # the reader may have nothing to read that tells it so

    async def _pong(self, number: int) -> None:
        await self._alive()
        self._post(link.Pong(number))

    async def _keep_time(self) -> None:
        while True:
            deadline = self._engine.deadline()
            self._asleep_until = float("inf") if deadline is None else deadline
            self._earlier = trio.Event()
            with trio.move_on_at(self._asleep_until):
                await self._earlier.wait()
            self._engine.tick(trio.current_time())
            self._pump()

    def _take(self, message: link.Message, fds: list[int]) -> None:
        match message:
            case link.Frame(data):
                self._engine.receive(data, trio.current_time())
                self._pump()
                self._note = ""
            case link.Note(text):
                self._note = text
            case link.Route():
                self._paths.route(message, fds)
            case _:
                close_fds(fds)
                raise LinkLost(f"the fabric sent {message.kind.name}")

    # ---------------------------------------------------------------- what the engine has to say

    def _pump(self) -> None:
        """Send the engine's frames, act on its events, mind its deadline."""
        frames = self._engine.take_frames()
        if self._linked:
            self._frames.extend(link.encode(link.Frame(frame)) for frame in frames)
            self._to_send.set()
        for event in self._engine.take_events():
            match event:
                case TopologyChanged():
                    self._was_online |= self._engine.state is LocalState.READY
                    self._emit(PortEvent(PortEventKind.TOPOLOGY))
                    self._commands.look_again()
                    self._paths.look_again()
                case Discovered(number):
                    self._discovered = number
                case CommandDone(command, result):
                    self._commands.done(command, result)
                case ManagementDone(management, code):
                    self._commands.managed(management, code)
                case LoginRejected():
                    self._rejected(event)
                case LoggedOut():
                    self._logged_out.set()
                case _:
                    pass
            self._notify()
        deadline = self._engine.deadline()
        if deadline is not None and deadline < self._asleep_until:
            self._earlier.set()

    def _rejected(self, event: LoginRejected) -> None:
        why = f"{self._note}; " if self._note else ""
        message = (
            f"the fabric at {self._socket_path} refuses the login of {self._identity.wwpn}: {why}{event.rejection}"
        )
        if self._was_online:
            self._say(message)
        else:
            self._refusal = message

    def _post(self, message: link.Message) -> None:
        if self._linked:
            self._urgent.append(link.encode(message))
            self._to_send.set()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _say(self, message: str) -> None:
        """Once, until there is something else to say."""
        if message != self._said:
            self._said = message
            self._log.info(message)

    # ---------------------------------------------------------------- who is there

    def _reachable(self, unit: Unit) -> tuple[int, int] | None:
        remote = self._engine.remotes.get(unit.wwpn)
        if self._linked and remote is not None and remote.usable and _has(remote, unit):
            return self._engine.port_id, remote.port_id
        return None

    def _is_gone(self, unit: Unit) -> bool:
        remote = self._engine.remotes.get(unit.wwpn)
        return remote is None or not _has(remote, unit)

    # ---------------------------------------------------------------- events

    def _emit(self, event: PortEvent) -> None:
        for subscriber in self._subscribers:
            subscriber.put(event)


def _has(remote: FcRemotePort, unit: Unit) -> bool:
    """Is the unit there, and still the disk that it was?"""
    return unit.lun in remote.names and unit.is_disk(remote.names[unit.lun])


def _remote_port(remote: FcRemotePort) -> RemotePort:
    state, port_id, names = visible(remote)
    units = tuple(Unit(remote.wwpn, lun, disk) for lun, disk in names)
    return RemotePort(remote.wwpn, remote.wwnn, port_id, _REMOTE_STATES[state], units)


def _reason(error: OSError | LinkLost) -> str:
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return "nobody listens there"
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
