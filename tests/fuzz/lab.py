"""What stands behind the doors that are fuzzed: the fabric of tests/fabric, with units that do all that they can.

Everything happens in one thread and in no time, so an input is the same story each time it is told.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from tests.fabric.san import BLOCK, Initiator, San
from tests.scsi.conftest import Medium
from vhostfc.fabric.gathering import AT_ONCE
from vhostfc.fabric.management import MAX_BYTES
from vhostfc.fabric.recovery import KEPT
from vhostfc.fabric.sessions import FUNCTIONS, Abort, Exchange, Lost, Manage, Opened, Untold
from vhostfc.fc import els
from vhostfc.fc.fcp import FcpCmnd, ResponseCode, TmFlag
from vhostfc.fc.sequence import initiator_data
from vhostfc.scsi.sense import attention_in
from vhostfc.scsi.server import DeviceServer
from vhostfc.scsi.task import Background, Effect, MediumError, ScsiResult, Task
from vhostfc.scsi.unit import LogicalUnit

R = TypeVar("R")

#: The port that behaves, to which alone unit 1 is shown.
GOOD = 2
_MOST_FRAMES = 4096


class Lab(San):
    """A San whose units run every command, and whose tables are looked at."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.media = {unit: Medium(256) for unit in self.units}
        self.media[self.units[1]].data[:] = bytes([0x5A]) * (256 * BLOCK)

    # ------------------------------------------------------------ the runner

    def run(self) -> None:
        while self.urgent or (taken := self.rations.take()) is not None:
            if self.urgent:
                self._see_to(self.urgent.popleft())
                continue
            assert taken is not None
            exchange = taken[1]
            exchange.target.begin(exchange)
            for frame in exchange.target.finish(exchange, self.execute(exchange)):
                self.deliver(self.switch.send(frame))

    def _see_to(self, urgent: object) -> None:
        match urgent:
            case Opened(session):
                for unit in self.array.seen(self.target, session.wwpn).values():
                    unit.attach(session.nexus)
            case Lost(session):
                for place in self.array.places(self.target).values():
                    place.unit.detach(session.nexus)
            case Abort(_, reply) if reply is not None:
                self.deliver(self.switch.send(reply))
            case Manage(exchange):
                self._manage(exchange)
            case Untold(session, lun, sense):
                server = self.array.resolve(self.target, session.wwpn, lun)
                if isinstance(server, LogicalUnit) and (asc := attention_in(sense)) is not None:
                    server.attention(asc, [session.nexus])
            case _:
                pass

    def _manage(self, exchange: Exchange) -> None:
        server = self._server(exchange)
        function = FUNCTIONS.get(TmFlag(exchange.cmnd.tm_flags))
        if function is not None:
            self._drive(server, server.manage(exchange.session.nexus, function))
        for frame in exchange.target.respond(exchange, ResponseCode.COMPLETE if function else ResponseCode.REJECTED):
            self.deliver(self.switch.send(frame))

    def _server(self, exchange: Exchange) -> DeviceServer:
        return self.array.resolve(exchange.target, exchange.session.wwpn, exchange.cmnd.lun)

    def execute(self, exchange: Exchange) -> ScsiResult:
        server = self._server(exchange)
        task = Task(
            exchange.session.nexus,
            exchange.cmnd.cdb,
            exchange.data_out,
            exchange.data_in_length,
            exchange.cmnd.attribute,
            exchange.frame.ox_id,
        )
        return self._drive(server, server.execute(task))

    def _drive(self, server: DeviceServer, steps: Generator[Effect, object, R]) -> R:
        answer: object = None
        error: MediumError | None = None
        while True:
            try:
                effect = steps.throw(error) if error else steps.send(answer)
            except StopIteration as stop:
                result: R = stop.value
                return result
            assert isinstance(server, LogicalUnit), f"{effect} without a medium"
            answer = error = None
            if isinstance(effect, Background):
                self._drive(server, effect.steps)
                continue
            try:
                answer = self.media[server].do(effect)
            except MediumError as failed:
                error = failed

    # ------------------------------------------------------------ what must be true whatever came

    def check(self, steps: int) -> None:
        """The tables are those of the ports that are here.  steps: how many things have happened."""
        switch, target = self.switch, self.target
        logins = {login.port_id: login for login in switch.logins()}
        behind = {n_port.port_id for f_port in switch._f_ports for n_port in switch.behind(f_port)}
        assert behind == logins.keys()
        assert switch._by_name.keys() == {login.wwpn for login in logins.values()} | {target.wwpn}
        assert switch.names.entries.keys() == logins.keys() | {target.port_id}
        assert switch.names._ids == sorted(switch.names.entries)
        assert sum(switch.names._nodes.values()) == len(switch.names.entries)
        assert switch.names._node_names.keys() <= switch.names._nodes.keys()
        names = {login.wwpn for login in logins.values()}
        assert switch.management._of_port.keys() <= names
        assert {
            port for hba in switch.management.hbas.values() for port in hba.ports
        } == switch.management._of_port.keys()
        for hba in switch.management.hbas.values():
            for attributes in (hba.attributes, *hba.ports.values()):
                assert sum(4 + len(value) for value in attributes.values()) <= MAX_BYTES
        assert switch._gathering._begun.keys() <= logins.keys()
        assert len(switch._gathering) <= AT_ONCE * len(logins)
        assert switch._registered.keys() <= logins.keys()
        assert switch._met.keys() <= logins.keys()
        assert len(switch._addresses) <= steps + 2
        assert len(switch.discarded) <= 16
        assert target.sessions.keys() <= logins.keys()
        for port_id, session in target.sessions.items():
            assert session.wwpn == logins[port_id].wwpn
            assert target._by_name[session.wwpn] is session
            waiting = [exchange for exchange in session.exchanges.values() if exchange.admitted]
            commands, size = self.rations.usage(session.wwpn)
            assert commands == len(waiting) <= self.rations.commands
            assert size == sum(exchange.size for exchange in waiting)
            assert sum(len(exchange.data_out) for exchange in waiting) <= size
            functions = [exchange for exchange in session.exchanges.values() if exchange.managing]
            assert session.functions == len(functions) <= self.rations.commands
            assert len(session.exchanges) == len(waiting) + len(functions)
            assert len(session.ends) <= KEPT
            assert not session.exchanges.keys() & session.ends._ends.keys()
        assert len(target.sessions) == len(target._by_name)
        assert set(self.rations._shares) <= {s.wwpn for s in target.sessions.values()}
        for unit in self.units if not self.urgent else ():
            assert unit.attentions.nexuses <= {session.nexus for session in target.sessions.values()}
        for inbox in self.inbox.values():
            assert len(inbox) <= _MOST_FRAMES * (steps + 1)

    def serve_the_good_one(self) -> None:
        """It logs in, finds its unit, reads what nobody else may have written, and writes."""
        good = Initiator(self, GOOD)
        if self.switch.find(good.wwpn) is not None:
            return  # somebody says that he is this one, and was here first: that is refused, as it should be
        good.login().scr().open()
        rsp, data = good.command(b"\x28\0\0\0\0\0\0\0\x02\0", lun=1, data_in=2 * BLOCK)
        assert (rsp.status, rsp.residual) == (0, 0)
        assert data == bytes([0x5A]) * (2 * BLOCK)
        ox_id = good.start(FcpCmnd(bytes([0, 1, *bytes(6)]), b"\x2a\0\0\0\0\x09\0\0\x01\0", BLOCK, write=True))
        (ready,) = [frame for frame in good.take() if frame.ox_id == ox_id]
        for frame in initiator_data(ready, b"\xa5" * BLOCK, 0, seq_id=1):
            good.send(frame)
        self.run()
        rsp, _ = good.result(ox_id)
        assert rsp.status == 0
        assert self.media[self.units[1]].data[9 * BLOCK : 10 * BLOCK] == b"\xa5" * BLOCK
        assert good.els(self.target.port_id, els.Logo(good.port_id, good.wwpn).pack()) == els.LS_ACC
        self.run()
