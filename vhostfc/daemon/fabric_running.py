"""The commands under way at the target ports: which unit each is for, and which must wait for which.

A command belongs to two units: the one that it was for when it came, which decides what it waits for, and
the one that it is for now, since masks and zones change under it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import ValuesView
from dataclasses import dataclass, field

import trio

from vhostfc.daemon.fabric_units import Served
from vhostfc.fabric.sessions import Exchange
from vhostfc.fc.wwn import Wwn
from vhostfc.scsi.server import DeviceServer
from vhostfc.scsi.task import Attribute, Nexus, Task

#: Commands that may run at a time for one initiator port; the others of its ration wait.
AT_ONCE = 16


@dataclass(eq=False, slots=True)
class Running:
    """A command under way.

    began: the unit that it was for when it came; served: that which it is for now; server: what executes it.
    after: those that it has to wait for (task attributes, SAM-5 8.7).  mask, epoch: the verdict and the unit's
    epoch that it goes on with.
    """

    exchange: Exchange
    began: Served | None
    served: Served | None
    after: tuple[Running, ...]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    mask: bytes = b""
    epoch: int = 0
    task: Task | None = None
    server: DeviceServer | None = None

    @property
    def nexus(self) -> Nexus:
        return self.exchange.session.nexus

    @property
    def ordered(self) -> bool:
        return self.exchange.cmnd.attribute == Attribute.ORDERED

    @property
    def ports(self) -> tuple[Wwn, Wwn]:
        """(initiator port, target port)."""
        return self.exchange.session.wwpn, self.exchange.target.wwpn


class RunningCommands:
    """All of them."""

    def __init__(self) -> None:
        self._running: dict[Exchange, Running] = {}
        self._on: dict[Served, dict[Running, None]] = {}  # the same, by the unit that they have begun at
        self._of_port: Counter[Wwn] = Counter()

    def __len__(self) -> int:
        return len(self._running)

    def values(self) -> ValuesView[Running]:
        return self._running.values()

    def get(self, exchange: Exchange) -> Running | None:
        return self._running.get(exchange)

    def at(self, served: Served) -> list[Running]:
        """Those that are for this unit now."""
        return [running for running in self.values() if running.served is served]

    def may_begin(self, wwpn: Wwn) -> bool:
        """Whether one more of this initiator port may run."""
        return self._of_port[wwpn] < AT_ONCE

    def begin(self, exchange: Exchange, served: Served | None) -> Running:
        """A command for this unit is under way from now on; what it has to wait for is in `after`."""
        self._of_port[exchange.session.wwpn] += 1
        running = Running(exchange, served, served, tuple(self._before(exchange, served)))
        self._running[exchange] = running
        if served is not None:
            self._on.setdefault(served, {})[running] = None
        return running

    def end(self, running: Running) -> None:
        """It is over, and whoever waits for it goes on."""
        del self._running[running.exchange]
        if running.began is not None:
            self._on[running.began].pop(running)
            if not self._on[running.began]:
                del self._on[running.began]
        self._of_port[running.exchange.session.wwpn] -= 1
        running.done.set()

    def _before(self, exchange: Exchange, served: Served | None) -> list[Running]:
        """What is enabled before it (SAM-5 8.7): an ORDERED task comes after all, a SIMPLE one after these."""
        attribute = exchange.cmnd.attribute
        if served is None or attribute == Attribute.HEAD_OF_QUEUE:
            return []
        before = [r for r in self._on.get(served, ()) if r.served is served]
        return before if attribute == Attribute.ORDERED else [r for r in before if r.ordered]
