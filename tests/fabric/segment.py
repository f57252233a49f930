"""An Ethernet segment of values: a forwarder, ENodes at their stations, and the switch of a San behind it."""

from __future__ import annotations

from collections.abc import Iterable

from tests.fabric.enode import Enode
from tests.fabric.san import FABRIC, San
from vhostfc.fabric.fcf import Action, Deliver, Detach, Forwarder, LogOut, Send
from vhostfc.fc.fcoe import MAX_ETHERNET

FCF = bytes.fromhex("020000000001")


class Segment:
    """A forwarder between ENodes, each at a station of its own (its number), and the switch of a San."""

    def __init__(self, san: San | None = None, *, period: float = 8.0) -> None:
        self.san = san or San()
        self.now = 1000.0
        self.forwarder = Forwarder(
            "a segment", self.san.switch.attach, name=FABRIC, fabric=FABRIC, mac=FCF, period=period
        )
        self.enodes: dict[int, Enode] = {}
        self.ended: list[Detach | LogOut] = []

    def enode(self, number: int) -> Enode:
        """One that has found the FCF."""
        enode = self.enodes[number] = Enode(number)
        enode.solicit()
        self.settle()
        return enode

    def settle(self) -> None:
        while any(enode.out for enode in self.enodes.values()):
            for number, enode in self.enodes.items():
                while enode.out:
                    self.come(number, enode.out.pop(0))

    def come(self, station: int, data: bytes) -> None:
        """An Ethernet frame from a station."""
        self.do(self.forwarder.receive(station, data, self.now))
        self.forward()

    def forward(self) -> None:
        """What the switch has for us."""
        for port in list(self.san.inbox):
            for what in self.san.inbox.pop(port):
                if isinstance(what, bytes) and (send := self.forwarder.output(port, what, self.now)):
                    self.do([send])

    def do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Send(station, data):
                    assert len(data) <= MAX_ETHERNET
                    for number, enode in self.enodes.items():
                        if station in (None, number):
                            self.hear(enode, data)
                case Deliver(f_port, frame):
                    self.san.deliver(self.san.switch.receive(f_port, frame))
                case LogOut(port_id):
                    self.ended.append(action)
                    self.san.deliver(self.san.switch.forget(port_id))
                case Detach(f_port):
                    self.ended.append(action)
                    self.san.deliver(self.san.switch.detach(f_port))

    def hear(self, enode: Enode, data: bytes) -> None:
        """An Ethernet frame from the forwarder."""
        enode.receive(data)

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.forwarder.tick(self.now))

    def logins(self) -> list[str]:
        return [str(login.wwpn) for login in self.san.switch.logins()]
