"""`vhostfc fabric`: a storage area network in one process, for adapters on a socket.

The pure parts decide (fabric/), this puts them to work: links in, frames through the switch, commands
to the runner, paths to fencing, and changes of the configuration to all of them while they run.

A reload is in two halves.  First everything that may fail, which changes nothing: the new media are
opened.  Then everything that must not fail, at one stroke; it returns when nobody can do any more what
the new configuration forbids.
"""

from __future__ import annotations

import dataclasses
import resource
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial

import structlog
import trio

from vhostfc.config import FabricConfig
from vhostfc.daemon.capture import CaptureFile, capture_to
from vhostfc.daemon.control import serve_control
from vhostfc.daemon.fabric_changes import keep, load_with_kept, of_fault, of_order, with_changes
from vhostfc.daemon.fabric_config import check_attachments, check_change, check_fixed, check_places, units_of, zoning_of
from vhostfc.daemon.fabric_door import Door
from vhostfc.daemon.fabric_events import Events
from vhostfc.daemon.fabric_faults import Desk
from vhostfc.daemon.fabric_kept import KeptReservations
from vhostfc.daemon.fabric_maker import Maker, taken_by
from vhostfc.daemon.fabric_orders import orders_for
from vhostfc.daemon.fabric_placement import Placement
from vhostfc.daemon.fabric_reception import Reception
from vhostfc.daemon.fabric_runner import Runner
from vhostfc.daemon.fabric_status import Json, describe, topology
from vhostfc.daemon.fabric_store import Store
from vhostfc.daemon.fabric_units import Key, Served
from vhostfc.daemon.fcoe import FcoeAttachment
from vhostfc.daemon.fdsocket import listen
from vhostfc.daemon.notify import Notifier, PassedFd, passed_fds
from vhostfc.errors import ConfigError, VhostfcError
from vhostfc.fabric.array import Array
from vhostfc.fabric.faults import Active, Fault
from vhostfc.fabric.rations import Rations
from vhostfc.fabric.sessions import Exchange, Urgent
from vhostfc.fabric.switch import Output, Switch
from vhostfc.fc.wwn import Wwn
from vhostfc.overlay import Overlay, merged


@dataclasses.dataclass(slots=True)
class _New:
    """What a configuration asks for that was not there: opened, and not yet in use."""

    units: dict[Key, Served] = dataclasses.field(default_factory=dict)
    attachments: list[FcoeAttachment] = dataclasses.field(default_factory=list)


class Fabric:
    """A running fabric.  serve() runs it; the others are for whoever runs it.

    file: what the file says; config: with the changes of administrators; view: with those of faults as
    well, which is what is in force.  Media are open for all that config knows, so that what a fault
    takes away comes back as it was.
    """

    def __init__(
        self,
        config: FabricConfig,
        *,
        log: structlog.typing.FilteringBoundLogger,
        kept: Overlay | None = None,
        notifier: Notifier | None = None,
        passed: Sequence[PassedFd] = (),
    ) -> None:
        self.file = config
        self.config = self.view = with_changes(config, kept or Overlay())
        self.events = Events()
        self.switch = Switch(config.wwn, zoning_of(self.view), clock=time.time, notice=self._notice)
        self.door = Door(self.switch, kick=self._kick, later=self._later, hit=self._hit)
        self.array = Array()
        self._log = log
        self._store = Store(notifier or Notifier(), passed)
        self._rations: Rations[Exchange] = Rations()
        self._urgent: deque[Urgent] = deque()
        self.placement = Placement(self.switch, self.array, rations=self._rations, urgent=self._urgent, kick=self._kick)
        self._fcoe: dict[str, tuple[FcoeAttachment, trio.CancelScope]] = {}
        self._reloading = trio.Lock()
        self._kept = kept or Overlay()
        self._unkept = Overlay()
        self._overrides: dict[str, Overlay] = {}

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled.  Raises VhostfcError when it cannot begin: a socket, a medium."""
        config = self.config
        with listen(config.socket, socket.SOCK_SEQPACKET) as listener:
            try:
                async with trio.open_nursery() as nursery:
                    self._begin(nursery)
                    await self._apply(config, self._prepare(config))
                    self._store.drop_rest()
                    await self.desk.follow(config.faults)
                    handlers = orders_for(self)
                    await nursery.start(partial(serve_control, config.control, handlers, log=self._log))
                    self._log.info("the fabric is up", fabric=config.name, socket=str(config.socket))
                    task_status.started()
                    while True:
                        nursery.start_soon(self._reception.welcome, await listener.accept())
            finally:
                for served in self.placement.served.values():
                    served.medium.close()

    def _begin(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._maker = Maker(
            fabric=self.config.wwn,
            inventory=self.array,
            store=self._store,
            kept=KeptReservations(
                self.config.state / "reservations",
                port_name=lambda number: self.placement.name(number).pack(),
                port_number=lambda name: self.placement.number(Wwn.unpack(name)),
                log=self._log,
            ),
            timeout=self.config.fence_timeout,
            nursery=nursery,
            publish=self.events.publish,
            log=self._log,
        )
        self.desk = Desk(self, seed=self.config.seed, nursery=nursery, publish=self.events.publish, log=self._log)
        self._runner = Runner(
            switch=self.switch,
            array=self.array,
            rations=self._rations,
            urgent=self._urgent,
            served=self.placement.served_of,
            transmit=self.door.transmit,
            nursery=nursery,
            log=self._log,
        )

        self._reception = Reception(
            self.config.name,
            switch=self.switch,
            door=self.door,
            placement=self.placement,
            maker=self._maker,
            is_down=self.desk.is_down,
            publish=self.events.publish,
            nursery=nursery,
            log=self._log,
        )

    def _kick(self) -> None:
        self._runner.kick()

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        async def wait() -> None:
            await trio.sleep(seconds)
            do()

        self._nursery.start_soon(wait)

    def _notice(self, event: str, values: Json) -> None:
        """What the switch has to tell."""
        self.events.publish(event, values)
        if event == "login":
            self.desk.logged_in(Wwn.parse(str(values["wwpn"])), str(values["holder"]))

    def _hit(self, active: Active, what: str) -> None:
        self.desk.hit(active, what)

    def frame(self, f_port: int, data: bytes) -> None:
        """A frame from an F_Port, whatever is behind that."""
        self._reception.frame(f_port, data)

    # ------------------------------------------------------------ FCoE

    def log_out(self, port_id: int) -> None:
        """An N_Port whose virtual link is down."""
        self.door.post(self.switch.forget(port_id))
        self._runner.kick()

    def _set_fcoe(self, config: FabricConfig, new: list[FcoeAttachment]) -> None:
        wanted = {one.where for one in config.fcoe}
        for where in self._fcoe.keys() - wanted:
            self._fcoe.pop(where)[1].cancel()
        for attachment in new:
            scope = trio.CancelScope()
            self._fcoe[attachment.config.where] = (attachment, scope)
            self._nursery.start_soon(self._run_fcoe, attachment, scope)

    async def _run_fcoe(self, attachment: FcoeAttachment, scope: trio.CancelScope) -> None:
        with scope:
            await attachment.run()

    # ------------------------------------------------------------ configuration

    async def reload(self, config: FabricConfig, kept: Overlay | None = None) -> None:
        """Make this configuration the one in force; when it returns, nobody does any more what it forbids.

        kept: the changes that were kept.  Those that were not are forgotten.  Raises ConfigError or
        VhostfcError when it cannot be; nothing has changed then.
        """
        async with self._reloading:
            await self._become(config, kept or Overlay(), Overlay(), self._overrides)
        await self.desk.follow(config.faults)
        self._log.info("reloaded", path=str(config.path), targets=len(config.targets), zones=len(config.zones))
        self.events.publish("reloaded", {"targets": len(config.targets), "zones": len(config.zones)})

    async def change(self, order: Json, *, lasting: bool) -> str:
        """Make one change, for as long as the fabric runs and is not reloaded, or for good; returns what it is of.

        Raises VhostfcError when it cannot be; nothing has changed then.
        """
        async with self._reloading:
            overlay = of_order(order, self.config)
            keys = overlay.keys()
            kept, unkept = self._kept, merged([self._unkept, overlay])
            if lasting:
                kept, unkept = merged([self._kept, overlay]), self._unkept.without(keys)
                keep(self.file, kept)
            try:
                await self._become(self.file, kept, unkept, self._overrides)
            except VhostfcError:
                if lasting:
                    keep(self.file, self._kept)
                raise
        self.events.publish("change", {"of": keys[0], "kept": lasting})
        return keys[0]

    async def undo(self, keys: Collection[str] | None) -> list[str]:
        """Take changes back, kept ones too (None: all); returns which.  Raises VhostfcError."""
        async with self._reloading:
            there = merged([self._kept, self._unkept]).keys()
            wanted = there if keys is None else list(keys)
            if unknown := [key for key in wanted if key not in there]:
                raise VhostfcError(f"no change of {', '.join(unknown)}; there are: {', '.join(there) or 'none'}")
            kept = self._kept.without(wanted)
            await self._become(self.file, kept, self._unkept.without(wanted), self._overrides)
            keep(self.file, kept)
        for one in wanted:
            self.events.publish("change undone", {"of": one})
        return wanted

    async def override(self, name: str, fault: Fault | None) -> None:
        """A fault's change begins or ends.  Raises VhostfcError when it cannot be."""
        async with self._reloading:
            overrides = {other: overlay for other, overlay in self._overrides.items() if other != name}
            if fault is not None:
                overrides[name] = of_fault(fault, self.view)
            await self._become(self.file, self._kept, self._unkept, overrides)

    async def _become(self, file: FabricConfig, kept: Overlay, unkept: Overlay, overrides: dict[str, Overlay]) -> None:
        """Raises ConfigError or VhostfcError, and then nothing has changed."""
        config = with_changes(file, merged([kept, unkept]))
        view = with_changes(file, merged([kept, unkept, *overrides.values()]))
        check_fixed(self.config, config)
        check_places(self.view, view)
        new = self._prepare(config)
        self.file, self._kept, self._unkept, self._overrides = file, kept, unkept, overrides
        await self._apply(config, new, view)

    def _prepare(self, config: FabricConfig) -> _New:
        """Open what is new.  Raises ConfigError or VhostfcError, and then leaves nothing behind."""
        new = _New()
        for target in config.targets:
            self.placement.number(target.wwpn)
            login = self.switch.find(target.wwpn)
            if login is not None:
                raise ConfigError(f"{config.path}:{target.line}: wwpn: {target.wwpn} is logged in, by {login.holder!r}")
        check_attachments(config, {where: attachment.config for where, (attachment, _) in self._fcoe.items()})
        try:
            taken = taken_by(self.placement.served.values())
            for unit_key, (target, unit) in units_of(config).items():
                served = self.placement.served.get(unit_key)
                if served is not None:
                    check_change(config, unit, served)
                else:
                    new.units[unit_key] = self._maker.make(target, unit, taken)
            for one in config.fcoe:
                if one.where not in self._fcoe:
                    new.attachments.append(FcoeAttachment(one, config.wwn, self, log=self._log))
        except VhostfcError:
            for served in new.units.values():
                served.medium.close()
            for attachment in new.attachments:
                attachment.close()
            raise
        return new

    async def _apply(self, config: FabricConfig, new: _New, view: FabricConfig | None = None) -> None:
        """Nothing here may fail, and nothing waits before all of it is done."""
        self.config, self.view = config, view or config
        self._maker.timeout = config.fence_timeout
        self.placement.add(new.units)
        for served in new.units.values():
            self._maker.keep(served)
            served.faults.told = partial(self._unit_hit, served)
            if served.claim():
                self._runner.resume(served)
            else:
                self._nursery.start_soon(self._claim_later, served)
        self._set_fcoe(config, new.attachments)
        wanted = units_of(config)
        outputs: list[Output] = []
        zoning = zoning_of(self.view)
        if zoning.zones != self.switch.zoning.zones:
            outputs += self.switch.set_zoning(zoning)
        outputs += self.placement.set_targets(self.view, self.desk.is_away)
        self._kick()  # sessions that zones have ended leave the units where those are now
        resized = self.placement.set_units(self.view, wanted, self._maker)
        outputs += self.placement.place(self.view, resized)
        self.desk.refit()
        self.door.post(outputs)
        self._kick()
        everybody = list(self.placement.served.values())
        for served in everybody:
            served.fence.timeout = config.fence_timeout
            served.changed(epoch=True)
        gone = [served for served in everybody if served.key not in wanted]
        for served in gone:
            served.claiming.cancel()
            await self._runner.end_tasks(served)
        for served in everybody:
            await served.barrier()
        for served in gone:
            await served.fence.drained()
            self.placement.remove(served)
            self._maker.remove(served)

    def withdraw(self, target: Wwn) -> None:
        """A target port leaves the fabric; its units stay what they are."""
        self.door.post(self.placement.withdraw(target))
        self._kick()

    def restore(self, target: Wwn) -> None:
        """It is back."""
        try:
            self.door.post(self.placement.restore(target))
        except ValueError as error:  # somebody logged in under its name
            name = self.placement.targets[target].name
            self._log.error("a target port cannot come back", target=name, reason=str(error))

    def units_at(self, target: Wwn | None, lun: int | None) -> list[Served]:
        """The units at these LUNs of these target ports (None: all)."""
        return self.placement.units_at(self.view, target, lun)

    def _unit_hit(self, served: Served, active: Active) -> None:
        self._hit(active, f"a command at {served.medium.name}")

    async def _claim_later(self, served: Served) -> None:
        """A medium that somebody of an earlier life still has open: the unit appears when it is free."""
        with served.claiming:
            await served.wait_for_claim(self._log)
            self._runner.resume(served)
            self.door.post(self.placement.place(self.view))
            for one in self.placement.served.values():
                one.changed()
            self._log.info("a unit is served now", unit=served.medium.name)

    # ------------------------------------------------------------ control

    def status(self) -> Json:
        """What there is, as JSON: the fabric, logins, targets with units and who has them open, zones."""
        pids = {f_port: one.pid for f_port, one in self.door.attachments.items()}
        segments = [segment for segment, _ in self._fcoe.values()]
        return describe(self.view, self.switch, self.placement.targets, self.placement.served, pids, segments)

    def topology(self) -> Json:
        """The same the other way round: what is plugged in where, and who is logged in where since when."""
        return topology(self.view, self.switch, self.placement.targets, self.placement.served, self.door, self.desk)

    def changes(self) -> Json:
        """The changes of administrators, and whether they are kept."""
        return {"kept": self._kept.as_json(), "until reload": self._unkept.as_json()}


async def run_fabric(
    config: FabricConfig,
    *,
    kept: Overlay | None = None,
    capture: CaptureFile | None = None,
    log: structlog.typing.FilteringBoundLogger,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """`vhostfc fabric`: serve until cancelled, as a service of systemd where it is one; SIGHUP reloads the file.

    kept: changes that were kept.  capture: where all frames go.  Raises VhostfcError when it cannot begin.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two for each unit, and more for each that has it open
    notifier = Notifier.from_environment()
    fabric = Fabric(config, log=log, kept=kept, notifier=notifier, passed=passed_fds())
    with trio.open_signal_receiver(signal.SIGHUP) as hangups:
        async with trio.open_nursery() as nursery:
            if capture is not None:
                await nursery.start(capture_to, fabric.door, capture)
            await nursery.start(fabric.serve)
            if notifier.watchdog_timeout:
                nursery.start_soon(_feed, notifier, notifier.watchdog_timeout / 2)
            notifier.ready()
            task_status.started()
            async for _ in hangups:
                notifier.reloading()
                try:
                    await fabric.reload(*load_with_kept(config.path))
                except VhostfcError as error:
                    log.error("not reloaded, nothing has changed", reason=str(error))
                notifier.ready()


async def _feed(notifier: Notifier, interval: float) -> None:
    while True:
        notifier.watchdog()
        await trio.sleep(interval)
