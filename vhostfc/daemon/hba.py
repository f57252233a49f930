"""One virtual adapter: a port on the fabric below, a front end with its guest above, workers between.

The adapter is Detached (nobody connected), Standby (connected, rings stopped) or Active.  With
login = "always" the port is logged in from start to end; with "start" only while Active.  A guest's
reboot is stop and start, and does not log out under "always".

What a guest stands on outlives it.  At the end rings are drained while commands are still answered, then
routes are closed and the port is logged out, and last the threads are joined.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import structlog
import trio
from trio.socket import SocketType

from vhostfc.config import AdapterConfig
from vhostfc.daemon.commands import Commands
from vhostfc.daemon.control import Json, serve_control
from vhostfc.daemon.fabrics import fabric_of
from vhostfc.daemon.fdsocket import Listener
from vhostfc.daemon.guest import GuestSide
from vhostfc.daemon.guestevents import GuestEvent, Kind
from vhostfc.daemon.notify import Notifier
from vhostfc.daemon.sights import look
from vhostfc.daemon.units import Units
from vhostfc.daemon.workers import Workers
from vhostfc.errors import VhostfcError, plain
from vhostfc.fc.bindings import Bindings
from vhostfc.ports.base import Fabric, Port, PortEvent, PortEventKind, PortIdentity

#: How long a guest that begins before the fabric has answered is kept waiting for targets, seconds: firmware
#: looks once, so a boot disk must be there by then.
DISCOVERY_GRACE = 10.0
#: Shortest time between two rescans that a guest causes, seconds.
RESCAN_INTERVAL = 1.0


class BindingsFile:
    """Target numbers, kept over restarts: guests name their disks and boot by them."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "bindings.json"

    def load(self) -> Bindings:
        """The bindings as saved; none when there is no file yet.  Raises VhostfcError naming a broken file."""
        try:
            return Bindings.from_dict(json.loads(self.path.read_text()))
        except FileNotFoundError:
            return Bindings()
        except (OSError, ValueError) as error:
            raise VhostfcError(
                f"{self.path}: cannot read the target numbers: {error}; mend it, or remove it to number targets anew"
            ) from error

    def save(self, bindings: Bindings) -> None:
        """Replace the file whole; a crash leaves the old one or the new one."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(".new")
            with temporary.open("w") as stream:
                json.dump(bindings.to_dict(), stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self.path)
        except OSError as error:
            raise VhostfcError(f"{self.path}: cannot save the target numbers: {error.strerror}") from error


class Adapter:
    """See the head of the file.  `fabric` is the seam's lower side; nothing here knows which."""

    def __init__(
        self,
        config: AdapterConfig,
        fabric: Fabric,
        workers: Workers,
        nursery: trio.Nursery,
        *,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.config = config
        self._fabric = fabric
        self._workers = workers
        self._log = log
        self._port: Port | None = None
        self._decided = trio.Event()
        self._look = trio.Event()
        file = BindingsFile(config.state)
        bindings = file.load()
        self.units = Units(
            workers=workers,
            bindings=bindings,
            save_bindings=lambda: file.save(bindings),
            announce=self._announce,
            fast_path=config.fast_path,
            nursery=nursery,
            log=log,
        )
        self.commands = Commands(workers=workers, units=self.units, look_again=self._look_again, log=log)
        self.guest = GuestSide(
            workers,
            drain_timeout=config.drain_timeout,
            log=log,
            held=config.login == "start",
            stopped=self.commands.ring_stopped,
        )
        workers.attach(
            nursery,
            punt=self.commands.punt,
            control=self.commands.control,
            buffers=self.guest.buffers_came,
            broken=self.guest.ring_broke,
            latch_stuck=self._latch_stuck,
        )

    @property
    def identity(self) -> PortIdentity:
        port = self.config.ports[0]
        return PortIdentity(port.wwpn, port.wwnn, f"vhostfc {self.config.name}")

    # ------------------------------------------------------------ the port

    async def hold_port(self) -> None:
        """Log in, follow the fabric, log out at the end.  LoginRefused when the fabric does not let us in."""
        while True:
            if self.config.login == "start":
                await self.guest.active.wait()
                self._decided = trio.Event()
            async with trio.open_nursery() as nursery:
                if self.config.login == "start":
                    nursery.start_soon(self._until_inactive, nursery.cancel_scope)
                    nursery.start_soon(self._hold_guest, self._decided)
                async with self._fabric.login(self.identity) as port:
                    self._port = self.commands.port = port
                    self.units.attach(port)
                    try:
                        await self.units.reconcile()
                        self._decided.set()
                        nursery.start_soon(self._rescans, port)
                        async for event in port.events():
                            await self._port_event(event)
                    finally:
                        self._port = self.commands.port = None
                        with trio.CancelScope(shield=True):
                            await self.units.withdraw()

    async def _hold_guest(self, decided: trio.Event) -> None:
        """Keep a driver that begins waiting for targets, but not for ever."""
        await self._grace(decided)
        await self.guest.let_run()

    async def _grace(self, decided: trio.Event) -> None:
        with trio.move_on_after(DISCOVERY_GRACE):
            await decided.wait()
            return
        self._log.warning("the fabric has not answered yet; a guest finds no targets until it does")

    async def _until_inactive(self, scope: trio.CancelScope) -> None:
        await self.guest.inactive.wait()
        scope.cancel()

    async def _port_event(self, event: PortEvent) -> None:
        if event.kind is PortEventKind.TOPOLOGY:
            await self.units.reconcile()
        elif event.unit is not None and (address := self.units.address(event.unit)) is not None:
            self._announce(GuestEvent(Kind.PARAMETERS, *address, event.asc, event.ascq))

    async def _rescans(self, port: Port) -> None:
        """Ask the fabric again when a guest's own look has shown something new; not too often."""
        while True:
            await self._look.wait()
            self._look = trio.Event()
            await port.rescan()
            await self.units.reconcile()
            await trio.sleep(RESCAN_INTERVAL)

    def _look_again(self) -> None:
        self._look.set()

    def _latch_stuck(self, owner: int) -> None:
        """A worker has waited for another adapter's range latch for a second: the fabric shall look after it."""
        if self._port is not None:
            self._port.latch_stuck(owner)

    def _announce(self, event: GuestEvent) -> None:
        self.guest.announce(event)

    # ------------------------------------------------------------ the front end

    async def serve_guests(self, listener: Listener | SocketType, leaving: trio.CancelScope) -> None:
        """One front end at a time, any number of them one after the other."""
        if self.config.login == "always":
            await self._grace(self._decided)
        await self.guest.serve(listener)
        leaving.cancel()

    # ------------------------------------------------------------ for administrators

    async def status(self, _: Json) -> Json:
        """What `vhostfc status` shows."""
        topology = self._port.snapshot() if self._port else None
        return {
            "name": self.config.name,
            "wwpn": str(self.identity.wwpn),
            "wwnn": str(self.identity.wwnn),
            "port": {
                "state": topology.state.value if topology else "logged out",
                "port_id": f"{topology.port_id:06x}" if topology else None,
                "fabric": str(topology.fabric_name) if topology and topology.fabric_name else None,
            },
            "targets": self.units.status(),
            "front_end": self.guest.status(),
            "workers": {str(ring): worker for ring, worker in sorted(self._workers.owners().items())},
            "counters": self._workers.counters(),
        }

    async def rescan(self, _: Json) -> Json:
        """What `vhostfc rescan` does: ask the fabric and every target afresh."""
        if self._port is None:
            raise VhostfcError(f"{self.identity.wwpn} is not logged in to the fabric")
        await self._port.rescan()
        await self.units.reconcile()
        return {"targets": self.units.status()}

    async def ls(self, _: Json) -> Json:
        """What `vhostfc ls` shows."""
        if self._port is None:
            raise VhostfcError(f"{self.identity.wwpn} is not logged in to the fabric")
        return await look(self._port)

    async def move(self, request: Json) -> Json:
        """Give a request ring to another worker now, whatever they have to do: {"ring": 2, "worker": 1}.

        Not on the command line: the workers balance their rings themselves.  It is for who tests that nothing is
        lost on the way (tests/bench/soak.py).
        """
        ring, worker = request.get("ring"), request.get("worker")
        if not isinstance(worker, int) or not isinstance(ring, int) or ring not in self._workers.owners():
            raise VhostfcError(f"no such ring or worker: {ring!r}, {worker!r}")
        return {"moved": await self._workers.move_ring(ring, worker)}

    async def feed_watchdog(self, notifier: Notifier) -> None:
        """Tell the service manager that we are well, only as long as every worker answers."""
        if notifier.watchdog_timeout is None:
            return
        while True:
            with trio.move_on_after(notifier.watchdog_timeout / 2) as late:
                await self._workers.ping()
                notifier.watchdog()
            if late.cancelled_caught:
                self._log.error("a worker does not answer; the watchdog is not fed")
            await trio.sleep(notifier.watchdog_timeout / 2)


async def run_adapter(
    config: AdapterConfig,
    *,
    listener: Listener | SocketType,
    log: structlog.typing.FilteringBoundLogger,
    fabric: Fabric | None = None,
    notifier: Notifier | None = None,
    task_status: trio.TaskStatus[Adapter] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled, or until the one front end whose connection was passed in has left.

    fabric: by default the one that the configuration names; notifier: by default systemd's.
    Raises LoginRefused, or VhostfcError when a socket or a file is in the way.
    """
    notifier = notifier or Notifier.from_environment()
    with plain():
        running = Workers.running(config.workers, log=log, poll_us=config.poll_us, cpus=config.cpus)
        async with running as workers, trio.open_nursery() as whole:
            if fabric is None:
                fabric = fabric_of(config, alive=workers.ping, log=log)
            ground: trio.Nursery = await whole.start(_ground)
            try:
                async with trio.open_nursery() as nursery:
                    adapter = Adapter(config, fabric, workers, ground, log=log)
                    handlers = {
                        "status": adapter.status,
                        "rescan": adapter.rescan,
                        "ls": adapter.ls,
                        "move": adapter.move,
                    }
                    await nursery.start(partial(serve_control, config.control, handlers, log=log))
                    ground.start_soon(adapter.hold_port)
                    nursery.start_soon(adapter.serve_guests, listener, nursery.cancel_scope)
                    nursery.start_soon(adapter.feed_watchdog, notifier)
                    notifier.ready(f"adapter {config.name}, WWPN {adapter.identity.wwpn}")
                    log.info("adapter is up", wwpn=str(adapter.identity.wwpn), socket=str(config.socket))
                    task_status.started(adapter)
            finally:
                ground.cancel_scope.cancel()


async def _ground(task_status: trio.TaskStatus[trio.Nursery]) -> None:
    """A nursery for what guests stand on: no cancellation from outside reaches it, only its own."""
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.shield = True
        task_status.started(nursery)
        await trio.sleep_forever()
