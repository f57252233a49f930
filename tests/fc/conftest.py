"""An N_Port and a tiny fabric, with a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings

from tests.fc.tiny import BLOCK, TinyFabric, TinyTarget, lun
from vhostfc.fc.exchange import Event
from vhostfc.fc.frame import Frame
from vhostfc.fc.initiator import CommandDone, CommandResult
from vhostfc.fc.nport import LocalState, NPort
from vhostfc.fc.remote import RemotePort
from vhostfc.fc.wwn import Wwn

# A machine that is busy with other things must not fail a property.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

WWPN, WWNN = Wwn(0x5001_4380_0000_0002), Wwn(0x5001_4380_0000_0003)
ARRAY = Wwn(0x5006_0160_0000_0001)


class Pair:
    """The N_Port and the fabric; frames travel in no time, in order."""

    def __init__(self, **nport: object) -> None:
        self.now = 1000.0
        self.array = TinyTarget(ARRAY, 0x01FE01, {lun(0): bytearray(64 * BLOCK), lun(3): bytearray(64 * BLOCK)})
        self.fabric = TinyFabric([self.array])
        self.port = NPort(WWPN, WWNN, symbolic_name="vm1", **nport)  # type: ignore[arg-type]  # any of its keywords
        self.events: list[Event] = []
        self.lose: Callable[[Frame], bool] = lambda _frame: False
        self.sent: list[Frame] = []

    def settle(self) -> None:
        """Until nobody has anything to say."""
        while frames := self.port.take_frames():
            for data in frames:
                frame = Frame.unpack(data)
                self.sent.append(frame)
                if not self.lose(frame):
                    self.deliver(*self.fabric.receive(data))
        self.events += self.port.take_events()

    def deliver(self, *frames: Frame) -> None:
        for frame in frames:
            if not self.lose(frame):
                self.port.receive(frame.pack(), self.now)

    def inject(self, *frames: Frame) -> None:
        self.deliver(*frames)
        self.settle()

    def up(self) -> Pair:
        self.port.link_up(self.now)
        self.settle()
        return self

    def advance(self, seconds: float) -> None:
        """Let time pass, stopping at every deadline on the way."""
        end = self.now + seconds
        while (at := self.port.deadline()) is not None and at <= end:
            self.now = max(self.now, at)
            self.port.tick(self.now)
            self.settle()
        self.now = end
        self.port.tick(end)
        self.settle()

    def take_events(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def state(self) -> LocalState:
        return self.port.state

    @property
    def remote(self) -> RemotePort:
        return self.port.remotes[ARRAY]

    def run(self, number: int, cdb: bytes, **how: object) -> CommandResult:
        """Run a command that is answered at once."""
        command = self.port.start_command(self.remote, lun(number), cdb, self.now, **how)  # type: ignore[arg-type]  # any of its keywords
        self.settle()
        return self.result(command)

    def result(self, command: object) -> CommandResult:
        results = [e.result for e in self.events if isinstance(e, CommandDone) and e.command is command]
        assert len(results) == 1, f"{command!r} ended {len(results)} times"
        return results[0]


@pytest.fixture
def pair() -> Pair:
    """Not yet logged in."""
    return Pair()


@pytest.fixture
def online() -> Pair:
    """Logged in, with its units found."""
    return Pair().up()
