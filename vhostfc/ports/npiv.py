"""The port that lives on an HBA: a vport of Linux's, and what it sees (the seam of base.py).

Linux logs the vport in, finds its targets and scans their units.  Here sysfs is read and made into a topology,
again whenever the kernel hints at something, and every second without: vport and remote port states change in silence.
Twice a minute each target is asked which units it has, because a unit that was added is announced to nobody who
sends no command.

A lost path blocks the remote port for fast_io_fail seconds, in which commands wait; then they fail, and the units stay
until dev_loss seconds have passed.  Both are the kernel's timers; we set them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path as FilePath

import structlog
import trio

from vhostfc.errors import LoginRefused
from vhostfc.fc.wwn import Wwn
from vhostfc.ports.base import (
    Outcome,
    Path,
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
from vhostfc.ports.fcevents import FcEvent, FcEventCode, Hint, Uevent
from vhostfc.ports.kernel import Kernel
from vhostfc.ports.npiv_before import Before
from vhostfc.ports.npiv_care import HANDS_OFF, Care
from vhostfc.ports.npiv_commands import Commands
from vhostfc.ports.npiv_paths import Paths
from vhostfc.ports.npiv_results import SAM_BUSY
from vhostfc.ports.npiv_survey import Survey
from vhostfc.ports.npiv_watch import AGAIN, Watch
from vhostfc.ports.ownfiles import OwnFiles
from vhostfc.ports.subscriber import Subscriber
from vhostfc.ports.sysfs import Lun, Rport, Vport
from vhostfc.ports.vport import Parents, Vports

#: Between looks at sysfs without a hint, seconds.
LOOK = 1.0
#: After a hint, for those that come with it.
SETTLE = 0.02
#: A first look around is over when nothing new has come for so long, or at the latest then.
QUIET, DISCOVERY = 1.0, 10.0
#: How long a logout may take before we leave it to the kernel.
LOGOUT = 15.0

_STATES = {
    "Active": PortState.ONLINE,
    "Initializing": PortState.LOGGING_IN,
    "Unknown": PortState.LOGGING_IN,
}
_REMOTE_STATES = {
    "Online": RemotePortState.ONLINE,
    "Marginal": RemotePortState.ONLINE,
    "Blocked": RemotePortState.BLOCKED,
}
#: SDEV_UA of a unit's uevent: the unit attention that was met, as additional sense code and qualifier.
_ATTENTIONS = {
    "CAPACITY_DATA_HAS_CHANGED": (0x2A, 0x09),
    "MODE_PARAMETERS_CHANGED": (0x2A, 0x01),
    "ASYMMETRIC_ACCESS_STATE_CHANGED": (0x2A, 0x06),
    "INQUIRY_DATA_HAS_CHANGED": (0x3F, 0x03),
    "THIN_PROVISIONING_SOFT_THRESHOLD_REACHED": (0x38, 0x07),
}
_INQUIRY_CHANGED = "INQUIRY_DATA_HAS_CHANGED"
_LUNS_CHANGED = "REPORTED_LUNS_DATA_HAS_CHANGED"
_HCTL = re.compile(r"/(\d+:\d+:\d+:\d+)(?:/|$)")


class NpivFabric:
    """The way into a fabric through an HBA.

    state: a directory of this adapter's own.  dev_loss, fast_io_fail: seconds.  keep: leave the vport where it is at
    the end, so that a restart finds it logged in.  guard: refuse to start where the host would use the units.
    workers: threads that a unit is opened for.  survey: seconds between questions to the targets.
    """

    def __init__(
        self,
        kernel: Kernel,
        parents: Parents,
        *,
        state: FilePath,
        log: structlog.typing.FilteringBoundLogger,
        dev_loss: int = 60,
        fast_io_fail: int = 5,
        keep: bool = False,
        workers: int = 1,
        command_timeout: float = 60.0,
        survey: float = 30.0,
        patience: float = 30.0,
        guard: bool = True,
    ) -> None:
        self._kernel = kernel
        self._parents = parents
        self._state = state
        self._log = log
        self._dev_loss, self._fast_io_fail = dev_loss, fast_io_fail
        self._keep = keep
        self._workers = workers
        self._command_timeout = command_timeout
        self._survey = survey
        self._patience = patience
        self._guard = guard

    def _check_hands_off(self) -> None:
        """The host's own drivers must keep off: sd would read the units, and take the guest's unit attentions."""
        if not self._kernel.sysfs.autoprobe():
            return
        if self._guard:
            raise LoginRefused(HANDS_OFF)
        self._log.warning(HANDS_OFF)

    @asynccontextmanager
    async def login(self, identity: PortIdentity) -> AsyncIterator[Port]:
        """See the seam.  Waits for a link that is down; LoginRefused tells what has to be mended."""
        log = self._log.bind(wwpn=str(identity.wwpn))
        self._check_hands_off()
        vports = Vports(self._kernel, self._parents, state=self._state, log=log, patience=self._patience)
        before = Before(identity, vports, self._kernel.sysfs, state=self._state, log=log)
        failure: Exception | None = None
        with _one_of_us(self._state, identity):
            try:
                vport = await before.acquire()
                async with self._kernel.hints() as hints, trio.open_nursery() as nursery:
                    port = NpivPort(
                        identity,
                        vport,
                        vports,
                        self._kernel,
                        nursery,
                        dev_loss=self._dev_loss,
                        fast_io_fail=self._fast_io_fail,
                        workers=self._workers,
                        command_timeout=self._command_timeout,
                        survey=self._survey,
                        patience=self._patience,
                        guard=self._guard,
                        log=log,
                    )
                    await port.begin(hints)
                    try:
                        yield port
                    except Exception as error:  # raised below, outside the nurseries, as it is
                        failure = error
                    finally:
                        port.end()
                        if self._keep:
                            before.leave(idle=port.idle)
                        nursery.cancel_scope.cancel()
            finally:  # whatever is there by now: one that was being made, or has been made anew on another port
                if not self._keep:
                    with trio.move_on_after(LOGOUT) as scope:
                        scope.shield = True
                        await vports.delete(identity)
                    if scope.cancelled_caught:
                        log.error("the logout takes long; the kernel goes on with it", seconds=LOGOUT)
        if failure is not None:
            raise failure


@contextlib.contextmanager
def _one_of_us(state: FilePath, identity: PortIdentity) -> Iterator[None]:
    """Two processes of one adapter must not take the vport for one that the other has left behind."""
    try:
        fd = OwnFiles(state).open(f"vport-{identity.wwpn.pack().hex()}.lock")
    except OSError as error:
        raise LoginRefused(f"{error.filename}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise LoginRefused(f"{identity.wwpn} is already logged in, by another process of this adapter") from None
    try:
        yield
    finally:
        os.close(fd)


class NpivPort:
    """A Port of the seam."""

    def __init__(
        self,
        identity: PortIdentity,
        vport: Vport,
        vports: Vports,
        kernel: Kernel,
        nursery: trio.Nursery,
        *,
        dev_loss: int,
        fast_io_fail: int,
        workers: int,
        command_timeout: float,
        survey: float,
        patience: float,
        guard: bool,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._identity = identity
        self._kernel = kernel
        self._sysfs = kernel.sysfs
        self._watch = Watch(vport, vports, kernel.sysfs, identity, patience=patience, log=log)
        self._nursery = nursery
        self._care = Care(kernel, dev_loss=dev_loss, fast_io_fail=fast_io_fail, guard=guard, serve=self._serve, log=log)
        self._log = log
        self._topology = Topology(PortState.LOGGING_IN, 0, None)
        self._luns: dict[Unit, Lun] = {}
        self._rports: dict[Wwn, Rport] = {}
        self._subscribers: list[Subscriber] = []
        self._look = trio.Event()
        self._changed = trio.Event()
        self._reconciling = trio.Lock()
        self._host: str | None = None
        self._moved = False
        self._paths = Paths(
            kernel,
            workers=workers,
            command_timeout=command_timeout,
            reachable=self._reachable,
            gone=lambda unit: self.lun_of(unit) is None,
            log=log,
        )
        self._commands = Commands(
            kernel,
            self,
            self._paths,
            hold=fast_io_fail,
            command_timeout=command_timeout,
            serve=self._serve,
            log=log,
        )
        self._survey = Survey(kernel, self, self._commands, interval=survey, log=log)

    # ---------------------------------------------------------------- the seam

    @property
    def identity(self) -> PortIdentity:
        return self._identity

    def snapshot(self) -> Topology:
        return self._topology

    def events(self) -> AsyncIterator[PortEvent]:
        """See the seam.  Begins with "look again": what happened before is in the snapshot."""
        subscriber = Subscriber()
        subscriber.put(PortEvent(PortEventKind.TOPOLOGY))
        self._subscribers.append(subscriber)
        return subscriber

    async def rescan(self) -> None:
        await self._survey.scan_all()
        await self.reconcile()

    async def execute(
        self, unit: Unit, cdb: bytes, *, data_out: bytes = b"", data_in: int = 0, attribute: int = 0, tag: int = 0
    ) -> ScsiResult:
        """See the seam.  Linux's interface knows no task attributes: every command goes as SIMPLE."""
        if self.kept_off(unit):  # as busy as a unit can be: whoever has it gives it back, or does not
            return ScsiResult(Outcome.COMPLETE, SAM_BUSY, residual=max(len(data_out), data_in))
        return await self._commands.execute(unit, cdb, data_out, data_in, tag=tag)

    async def manage(self, unit: Unit, function: TaskManagement, tag: int | None = None) -> TaskManagementResponse:
        return await self._commands.manage(unit, function, tag)

    async def open_path(self, unit: Unit) -> Path | None:
        return await self._paths.open(unit)

    def latch_stuck(self, owner: int) -> None:
        """Nobody has latches here."""

    # ---------------------------------------------------------------- what is there

    @property
    def vport(self) -> Vport:
        """The one that we have now, or had last."""
        return self._watch.vport

    @property
    def host(self) -> str | None:
        """The vport's own SCSI host, e.g. "host7"."""
        return self._host

    def lun_of(self, unit: Unit) -> Lun | None:
        lun = self._luns.get(unit)
        return lun if lun is not None and unit.is_disk(lun.disk) else None

    def state_of(self, wwpn: Wwn) -> RemotePortState | None:
        return next((remote.state for remote in self._topology.remote_ports if remote.wwpn == wwpn), None)

    def is_online(self, wwpn: Wwn) -> bool:
        """By what sysfs says now, which may not be in the topology yet."""
        rport = self._rports.get(wwpn)
        return rport is not None and (
            self._sysfs.text(self._sysfs.of_class("fc_remote_ports") / rport.name / "port_state") == "Online"
        )

    def units_of(self, wwpn: Wwn) -> Iterable[Unit]:
        return [unit for unit in self._luns if unit.wwpn == wwpn]

    def rports(self) -> Iterable[Rport]:
        return list(self._rports.values())

    async def changed(self) -> None:
        await self._changed.wait()

    def kept_off(self, unit: Unit) -> bool:
        """Must nobody use it now, since a driver of this host has it?"""
        lun = self.lun_of(unit)
        return lun is not None and self._care.kept_off(lun)

    def _reachable(self, unit: Unit) -> Lun | None:
        lun = self.lun_of(unit)
        if (
            lun is None
            or self._care.kept_off(lun)
            or lun.sg is None
            or self.state_of(unit.wwpn) is not RemotePortState.ONLINE
        ):
            return None
        return lun

    # ---------------------------------------------------------------- tasks

    async def begin(self, hints: trio.MemoryReceiveChannel[Hint]) -> None:
        """Start, and wait until the first look around is over."""
        await self.reconcile()
        self._nursery.start_soon(self._follow)
        self._nursery.start_soon(self._listen, hints)
        with trio.move_on_after(DISCOVERY):
            quiet = False
            while not quiet:
                with trio.move_on_after(QUIET if not self._complete() else QUIET / 10) as nothing:
                    await self._changed.wait()
                quiet = nothing.cancelled_caught
        self._nursery.start_soon(self._survey.run)

    def _complete(self) -> bool:
        """Every target that is there has shown units: it may still have more, but not many come later."""
        remotes = self._topology.remote_ports
        return bool(remotes) and all(remote.units for remote in remotes)

    @property
    def idle(self) -> bool:
        """The kernel has nothing that may change what is on a medium."""
        return self._paths.idle and not self._commands.changing

    def end(self) -> None:
        self._paths.end_all()
        self._commands.close()

    def _serve(self, task: Callable[[], Awaitable[None]]) -> None:
        self._nursery.start_soon(task)

    async def _follow(self) -> None:
        """Look again and again; make the vport anew when somebody has taken it away."""
        while True:
            with trio.move_on_after(LOOK):
                await self._look.wait()
                await trio.sleep(SETTLE)
            self._look = trio.Event()
            await self.reconcile()
            if self._watch.needs_help():
                while not await self._watch.help():
                    await self.reconcile()
                    await trio.sleep(AGAIN)
                self._care.begin_anew()

    async def _listen(self, hints: trio.MemoryReceiveChannel[Hint]) -> None:
        async for hint in hints:
            if isinstance(hint, FcEvent):
                if hint.code == FcEventCode.RSCN:
                    self._survey.look_again()
            elif hint.subsystem == "scsi" and hint.action == "change":
                self._attention(hint)
            self._look.set()

    def _attention(self, hint: Uevent) -> None:
        """A unit attention that somebody's command has met; the command's sender has had it, too."""
        where = _HCTL.search(hint.devpath)
        what = hint.properties.get("SDEV_UA", "")
        unit = next((unit for unit, lun in self._luns.items() if where and lun.hctl == where[1]), None)
        if unit is None:
            return
        if what in {_LUNS_CHANGED, _INQUIRY_CHANGED}:
            self._survey.look_again()
        if what in _ATTENTIONS:
            self._emit(PortEvent(PortEventKind.PARAMETERS, unit, *_ATTENTIONS[what]))

    def _emit(self, event: PortEvent) -> None:
        for subscriber in self._subscribers:
            subscriber.put(event)

    # ---------------------------------------------------------------- looking

    async def reconcile(self) -> None:
        """Read sysfs, and make up the difference."""
        async with self._reconciling:
            topology = self._read()
            if topology != self._topology or self._moved:
                self._topology = topology
                self._commands.look_again()
                await self._paths.look_again()
                self._emit(PortEvent(PortEventKind.TOPOLOGY))
                self._changed.set()
                self._changed = trio.Event()
            elif self._paths.wanting:
                await self._paths.look_again()
            await self._care.look(list(self._rports.values()), list(self._luns.values()))

    def _read(self) -> Topology:
        vport = self._watch.look()
        host = self._sysfs.host(vport.host) if vport is not None and vport.host is not None else None
        before, self._moved = self._luns, False
        if vport is None or host is None:
            remotes = tuple(_lost(remote) for remote in self._topology.remote_ports)
            return Topology(PortState.LINK_DOWN, 0, None, remotes)
        if host.name != self._host:
            self._host = host.name
            can_queue, segments = self._sysfs.can_queue(host.name), self._sysfs.segments(host.name)
            self._paths.set_host(can_queue, segments)
            self._commands.set_host(can_queue, segments)
        state = _STATES.get(vport.state, PortState.LINK_DOWN)
        parent = self._sysfs.host(vport.parent)
        fabric_name = host.fabric_name or (parent.fabric_name if parent is not None else None)
        by_target: dict[int, list[Lun]] = {}
        for lun in self._sysfs.luns(host.name):
            by_target.setdefault(lun.target, []).append(lun)
        self._rports = {rport.wwpn: rport for rport in self._sysfs.rports(host.name)}
        self._luns = {}
        remotes = tuple(
            self._remote(rport, by_target.get(-1 if rport.target is None else rport.target, []), state)
            for _, rport in sorted(self._rports.items())
        )
        self._paths.set_units(len(self._luns))
        self._moved = before != self._luns
        return Topology(state, host.port_id if state is PortState.ONLINE else 0, fabric_name, remotes)

    def _remote(self, rport: Rport, luns: list[Lun], state: PortState) -> RemotePort:
        there = _REMOTE_STATES.get(rport.state, RemotePortState.NOT_PRESENT)
        if there is RemotePortState.ONLINE and state is not PortState.ONLINE:
            there = RemotePortState.BLOCKED  # the kernel will say so in a moment
        if there is not RemotePortState.NOT_PRESENT:
            self._luns |= {Unit(rport.wwpn, lun.lun, lun.disk): lun for lun in luns if lun.sg is not None}
        units = tuple(unit for unit in self._luns if unit.wwpn == rport.wwpn)
        return RemotePort(rport.wwpn, rport.wwnn, rport.port_id, there, tuple(sorted(units)))


def _lost(remote: RemotePort) -> RemotePort:
    state = RemotePortState.NOT_PRESENT if remote.state is RemotePortState.NOT_PRESENT else RemotePortState.BLOCKED
    return RemotePort(remote.wwpn, remote.wwnn, remote.port_id, state, remote.units)
