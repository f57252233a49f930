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
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import structlog
import trio

from vhostfc.config import FabricConfig, TargetConfig, UnitConfig
from vhostfc.daemon.capture import CaptureFile, capture_to
from vhostfc.daemon.control import serve_control
from vhostfc.daemon.fabric_changes import keep, load_with_kept, of_fault, of_order, with_changes
from vhostfc.daemon.fabric_config import check_attachments, check_change, check_fixed, check_places, units_of, zoning_of
from vhostfc.daemon.fabric_door import Attachment, Door
from vhostfc.daemon.fabric_events import Events
from vhostfc.daemon.fabric_faults import Desk
from vhostfc.daemon.fabric_kept import KeptReservations
from vhostfc.daemon.fabric_link import Link, greet
from vhostfc.daemon.fabric_locks import Process
from vhostfc.daemon.fabric_orders import orders_for
from vhostfc.daemon.fabric_runner import Runner
from vhostfc.daemon.fabric_status import Json, describe, topology
from vhostfc.daemon.fabric_units import Key, Maker, Served, Store, key, taken_by
from vhostfc.daemon.fcoe import FcoeAttachment
from vhostfc.daemon.fdsocket import LinkSocket, listen
from vhostfc.daemon.fencing import OURS, Opening, Verdict
from vhostfc.daemon.notify import Notifier, PassedFd, passed_fds
from vhostfc.errors import ConfigError, LinkLost, VhostfcError
from vhostfc.fabric import link
from vhostfc.fabric.array import Array, Place
from vhostfc.fabric.faults import Active, Fault
from vhostfc.fabric.link import LinkError, Message, Route
from vhostfc.fabric.rations import Rations
from vhostfc.fabric.switch import Output, Switch
from vhostfc.fabric.target import Exchange, Session, TargetPort, Urgent
from vhostfc.fc.els import Els
from vhostfc.fc.frame import Address, Frame, FrameError, RCtl
from vhostfc.fc.login import Login
from vhostfc.fc.wwn import Wwn
from vhostfc.overlay import Overlay, merged
from vhostfc.scsi.alua import AccessState
from vhostfc.scsi.inquiry import TargetPort as IdentityPort
from vhostfc.scsi.report import lun_number
from vhostfc.scsi.sense import Asc
from vhostfc.scsi.unit import LogicalUnit


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
        self._targets: dict[Wwn, TargetPort] = {}
        self._relative: dict[Wwn, int] = {}
        self._names: dict[int, Wwn] = {}
        self._served: dict[Key, Served] = {}
        self._fcoe: dict[str, tuple[FcoeAttachment, trio.CancelScope]] = {}
        self._units: dict[LogicalUnit, Served] = {}
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
                        nursery.start_soon(self._welcome, await listener.accept())
            finally:
                for served in self._served.values():
                    served.medium.close()

    def _begin(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._maker = Maker(
            fabric=self.config.wwn,
            inventory=self.array,
            store=self._store,
            kept=KeptReservations(
                self.config.state / "reservations",
                port_name=lambda number: self._names[number].pack(),
                port_number=lambda name: self._number(Wwn.unpack(name)),
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
            served=self._served_of,
            transmit=self.door.transmit,
            nursery=nursery,
            log=self._log,
        )

    def _number(self, target: Wwn) -> int:
        """The relative identifier of a target port; one that was in use once is not given to another."""
        number = self._relative.setdefault(target, len(self._relative) + 1)
        self._names[number] = target
        return number

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

    def _served_of(self, unit: LogicalUnit) -> Served | None:
        return self._units.get(unit)

    # ------------------------------------------------------------ links

    async def _welcome(self, sock: trio.socket.SocketType) -> None:
        """One connection, from its beginning to its end."""
        with LinkSocket(sock) as connection:
            try:
                process = Process(sock)
            except OSError as error:
                self._log.warning("refused a link: its process could not be fenced", reason=error.strerror)
                return
            openings: list[Opening] = []
            try:
                adapter = await greet(connection, process, self.config.name, is_down=self.desk.is_down)
                if adapter is not None:
                    openings = await self._serve_link(adapter)
            except (LinkError, LinkLost) as error:
                self._log.warning("refused a link", peer=connection.peer, reason=str(error))
            finally:
                # The process is needed for as long as it may have to be killed.
                if any(not opening.gone.is_set() for opening in openings):
                    self._nursery.start_soon(_farewell, process, openings)
                else:
                    process.close()

    async def _serve_link(self, adapter: Link) -> list[Opening]:
        adapter.f_port = self.door.plug(adapter)
        self._log.info("a link is up", adapter=adapter.name, pid=adapter.pid)
        self.events.publish("link up", {"holder": adapter.name, "pid": adapter.pid})
        try:
            await adapter.serve(self._handle, self._log)
        finally:
            openings = adapter.lost()
            self.door.unplug(adapter.f_port)
            self._log.info("a link is down", adapter=adapter.name, pid=adapter.pid)
            self.events.publish("link down", {"holder": adapter.name, "pid": adapter.pid})
        return openings

    def _handle(self, adapter: Link, message: Message) -> None:
        """What an adapter sends, but for acknowledgements.  Raises LinkError for what it may not send."""
        match message:
            case link.Frame(data):
                self.frame(adapter.f_port, data)
            case link.Open():
                self._open(adapter, message)
            case _:
                raise LinkError(f"{message.kind.name} from an adapter")

    def frame(self, f_port: int, data: bytes) -> None:
        """A frame from an F_Port, whatever is behind that."""
        attachment = self.door.attachments[f_port]
        going = self._going(attachment, data)
        if going:
            self._nursery.start_soon(self._late_login, f_port, attachment, data, going)
        else:
            self.door.arrive(f_port, data)

    def _going(self, attachment: object, data: bytes) -> list[Opening]:
        """For a FLOGI or FDISC: what an earlier life of this Port_Name still has open.

        Its commands may still reach the medium; they must not land behind those of the new life.
        """
        if data[0] != RCtl.ELS_REQUEST or int.from_bytes(data[1:4], "big") != Address.F_PORT:
            return []
        try:
            login = Login.unpack(Frame.unpack(data).payload)
        except FrameError:
            return []
        if login.command not in {Els.FLOGI, Els.FDISC}:
            return []
        return [opening for opening in self._maker.going(login.wwpn) if opening.adapter is not attachment]

    async def _late_login(self, f_port: int, attachment: Attachment, data: bytes, going: list[Opening]) -> None:
        for opening in going:
            await opening.gone.wait()
        if self.door.attachments.get(f_port) is attachment:
            self.door.arrive(f_port, data)

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

    # ------------------------------------------------------------ paths

    def _open(self, adapter: Link, wanted: link.Open) -> None:
        if wanted.seq & OURS:
            raise LinkError(f"OPEN with seq {wanted.seq:#x}, whose top bit is the fabric's")
        login, target = self.switch.login(wanted.s_id), self.switch.target(wanted.d_id)
        if login is not None and login.f_port == adapter.f_port and isinstance(target, TargetPort):
            session = target.sessions.get(wanted.s_id)
            served = self._reachable(target, session, wanted.lun)
            if session is not None and served is not None:
                opening = served.fence.open(
                    adapter,
                    wanted.seq,
                    nexus=session.nexus,
                    wwpn=session.wwpn,
                    lun=lun_number(wanted.lun) or 0,
                    decide=partial(self._verdict, served, target, session, wanted.lun),
                )
                adapter.openings[opening.handle] = (served.fence, opening)
                return
        adapter.post(Route(wanted.seq, 0, 0, gone=True), [])

    def _reachable(self, target: TargetPort, session: Session | None, lun: bytes) -> Served | None:
        """The unit at this LUN, if the session still is one, and zones and masks let it through."""
        if session is None or not session.image or target.sessions.get(session.port_id) is not session:
            return None
        if not self.switch.visible(session.wwpn, target.wwpn):
            return None
        server = self.array.resolve(target, session.wwpn, lun)
        return self._served_of(server) if isinstance(server, LogicalUnit) else None

    def _verdict(self, served: Served, target: TargetPort, session: Session, lun: bytes) -> Verdict:
        """What fencing asks for each opening, whenever anything may have changed."""
        if self._reachable(target, session, lun) is not served:
            return Verdict(gone=True)
        unit = served.unit
        mask = bytes(32) if served.ordered or served.faults else unit.verdict(session.nexus)
        return Verdict(mask, unit.mode.write_protected, unit.blocks, losses=served.losses.known(session.nexus))

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
            self._number(target.wwpn)
            login = self.switch.find(target.wwpn)
            if login is not None:
                raise ConfigError(f"{config.path}:{target.line}: wwpn: {target.wwpn} is logged in, by {login.holder!r}")
        check_attachments(config, {where: attachment.config for where, (attachment, _) in self._fcoe.items()})
        try:
            taken = taken_by(self._served.values())
            for unit_key, (target, unit) in units_of(config).items():
                served = self._served.get(unit_key)
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
        self._served.update(new.units)
        self._units.update((served.unit, served) for served in new.units.values())
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
        outputs += self._set_targets(self.view)
        self._kick()  # sessions that zones have ended leave the units where those are now
        resized = self._set_units(wanted)
        outputs += self._place(resized)
        self.desk.refit()
        self.door.post(outputs)
        self._kick()
        everybody = list(self._served.values())
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
            del self._served[served.key], self._units[served.unit]
            self._maker.remove(served)

    def _set_targets(self, config: FabricConfig) -> list[Output]:
        """Target ports come and go; one with another node name is another one."""
        outputs: list[Output] = []
        wanted = {target.wwpn: target for target in config.targets}
        for wwpn, port in list(self._targets.items()):
            target = wanted.get(wwpn)
            if target is not None and target.wwnn == port.wwnn:
                port.name = target.name
                continue
            del self._targets[wwpn]
            if not self.desk.is_away(wwpn):
                outputs += self.switch.remove_target(port)
            for port_id in list(port.sessions):
                port.forget(port_id)
            self._runner.kick()
            self.array.remove(port)
        for wwpn, target in wanted.items():
            if wwpn not in self._targets:
                relative = self._number(wwpn)
                port = TargetPort(
                    target.name,
                    wwpn,
                    target.wwnn,
                    relative,
                    rations=self._rations,
                    urgent=self._urgent,
                    clock=time.time,
                )
                self._targets[wwpn] = port
                self.array.add(port)
                if not self.desk.is_away(wwpn):
                    outputs += self.switch.add_target(port)
        return outputs

    def withdraw(self, target: Wwn) -> None:
        """A target port leaves the fabric; its units stay what they are."""
        port = self._targets.get(target)
        if port is not None and self.switch.target(port.port_id) is port:
            self.door.post(self.switch.remove_target(port))
            for port_id in list(port.sessions):
                port.forget(port_id)
            self._kick()

    def restore(self, target: Wwn) -> None:
        """It is back."""
        port = self._targets.get(target)
        if port is not None and self.switch.target(port.port_id) is not port:
            try:
                self.door.post(self.switch.add_target(port))
            except ValueError as error:  # somebody logged in under its name
                self._log.error("a target port cannot come back", target=port.name, reason=str(error))

    def units_at(self, target: Wwn | None, lun: int | None) -> list[Served]:
        """The units at these LUNs of these target ports (None: all)."""
        keys = {
            key(config, unit)
            for config in self.view.targets
            if target in {None, config.wwpn}
            for unit in config.units
            if lun in {None, unit.lun}
        }
        return [served for unit_key, served in self._served.items() if unit_key in keys]

    def _unit_hit(self, served: Served, active: Active) -> None:
        self._hit(active, f"a command at {served.medium.name}")

    def _set_units(self, wanted: dict[Key, tuple[TargetConfig, UnitConfig]]) -> set[LogicalUnit]:
        """Sizes, write protection and names of what is served; returns the units that have grown."""
        resized: set[LogicalUnit] = set()
        access = {one.group: AccessState[one.access.upper().replace("-", "_")] for one in self.view.targets}
        paths: dict[Key, list[TargetConfig]] = {}
        for one in self.view.targets:
            for unit in one.units:
                ports_of = paths.setdefault(key(one, unit), [])
                if one not in ports_of[-1:]:
                    ports_of.append(one)
        for unit_key, (target, config) in wanted.items():
            served = self._served[unit_key]
            medium = served.medium
            if medium.read_only != config.read_only:
                medium.read_only = config.read_only
                before = served.unit
                del self._units[before]
                served.unit = self._maker.unit(medium, before.identity.naa[0], target.wwnn, config.physical_block_size)
                served.unit.reservations, served.unit.access = before.reservations, before.access
                served.unit.sanitizing = before.sanitizing
                self._units[served.unit] = served
            size = config.size or medium.current_size()
            if size // medium.block_size > medium.blocks:
                medium.grow(size)
                served.unit.resize(medium.blocks)
                resized.add(served.unit)
            ports = tuple(
                IdentityPort(self._relative[other.wwpn], other.wwpn.pack(), other.group)
                for other in paths.get(unit_key, ())
            )
            served.unit.set_ports(ports)
            served.unit.set_access(access)
        return resized

    def _place(self, resized: Collection[LogicalUnit] = ()) -> list[Output]:
        """Put every unit that is ready at its LUNs, and tell those for whom that makes a difference."""
        outputs: list[Output] = []
        for config in self.view.targets:
            target = self._targets[config.wwpn]
            was, places = self.array.places(target), dict[int, Place]()
            for unit in config.units:
                served = self._served[key(config, unit)]
                if served.ready:
                    places[unit.lun] = Place(served.unit, unit.allow)
            changed = [lun for lun in was.keys() | places.keys() if was.get(lun) != places.get(lun)]
            grown = [place for place in places.values() if place.unit in resized] if resized else []
            if not changed and not grown:
                continue
            self.array.set_places(target, places)
            concerned = []
            for wwpn in self.switch.zoning.peers_in(target.wwpn, self.switch.names.by_name):
                if any(_seen(was, lun, wwpn) is not _seen(places, lun, wwpn) for lun in changed):
                    before = {lun: place.unit for lun, place in was.items() if place.visible(wwpn)}
                    self._tell(target, wwpn, before, self.array.seen(target, wwpn))
                    concerned.append(wwpn)
                elif any(place.visible(wwpn) for place in grown):
                    concerned.append(wwpn)
            outputs += self.switch.service_changed(target, concerned)
        return outputs

    def _tell(self, target: TargetPort, wwpn: Wwn, before: dict[int, LogicalUnit], now: dict[int, LogicalUnit]) -> None:
        """Nexuses end and begin; those that stay are told that the inventory is another."""
        session = target.session(wwpn)
        if session is None:
            return
        for unit in {*before.values()} - {*now.values()}:
            unit.detach(session.nexus)
        for unit in {*now.values()} - {*before.values()}:
            unit.attach(session.nexus)
        if now.keys() != before.keys():
            for unit in {*now.values()} & {*before.values()}:
                unit.attention(Asc.REPORTED_LUNS_DATA_HAS_CHANGED, [session.nexus])

    async def _claim_later(self, served: Served) -> None:
        """A medium that somebody of an earlier life still has open: the unit appears when it is free."""
        with served.claiming:
            await served.wait_for_claim(self._log)
            self._runner.resume(served)
            self.door.post(self._place())
            for one in self._served.values():
                one.changed()
            self._log.info("a unit is served now", unit=served.medium.name)

    # ------------------------------------------------------------ control

    def status(self) -> Json:
        """What there is, as JSON: the fabric, logins, targets with units and who has them open, zones."""
        pids = {f_port: one.pid for f_port, one in self.door.attachments.items()}
        segments = [segment for segment, _ in self._fcoe.values()]
        return describe(self.view, self.switch, self._targets, self._served, pids, segments)

    def topology(self) -> Json:
        """The same the other way round: what is plugged in where, and who is logged in where since when."""
        return topology(self.view, self.switch, self._targets, self._served, self.door, self.desk)

    def changes(self) -> Json:
        """The changes of administrators, and whether they are kept."""
        return {"kept": self._kept.as_json(), "until reload": self._unkept.as_json()}


def _seen(places: Mapping[int, Place], lun: int, wwpn: Wwn) -> LogicalUnit | None:
    place = places.get(lun)
    return place.unit if place is not None and place.visible(wwpn) else None


async def _farewell(process: Process, openings: list[Opening]) -> None:
    try:
        for opening in openings:
            await opening.gone.wait()
    finally:
        process.close()


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
