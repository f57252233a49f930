"""Unit attention conditions: what an initiator has to be told before anything else (SAM-5 5.14).

Each I_T nexus has a queue of its own, ordered by SAM-5's precedence levels: the news that everything
was reset comes before a detail that the reset has made stale.  Among equals, first come, first told.
A condition that is pending already is not queued twice, so the queue cannot grow beyond the handful
of conditions that exist, whatever a fabric or a guest does.
"""

from __future__ import annotations

from collections.abc import Iterable

from vhostfc.scsi.sense import Asc, Sense, SenseKey
from vhostfc.scsi.task import Nexus

#: SAM-5 table 39: a smaller number is told first; what is not here comes last.
_PRECEDENCE = {
    Asc.POWER_ON_RESET_OR_BUS_DEVICE_RESET_OCCURRED: 0,
    Asc.POWER_ON_OCCURRED: 0,
    Asc.DEVICE_INTERNAL_RESET: 0,
    Asc.SCSI_BUS_RESET_OCCURRED: 1,
    Asc.MICROCODE_HAS_BEEN_CHANGED: 1,
    Asc.BUS_DEVICE_RESET_FUNCTION_OCCURRED: 2,
    Asc.I_T_NEXUS_LOSS_OCCURRED: 3,
}
_OTHERS = 4


#: Nexuses that are away and known; more than a fabric has ports, fewer than names that one can make up.
MAX_AWAY = 8192


class UnitAttentions:
    """The pending unit attention conditions of every nexus that is attached, and of those that were.

    What happens while a nexus is away is kept for its return, unless so many others left after it that it is
    forgotten: then it hears POWER ON OCCURRED, which says that anything may have happened.
    """

    def __init__(self) -> None:
        self._pending: dict[Nexus, list[Asc]] = {}
        self._attached: set[Nexus] = set()
        self._away: dict[Nexus, None] = {}  # in the order in which they left

    @property
    def nexuses(self) -> frozenset[Nexus]:
        """The nexuses that are attached."""
        return frozenset(self._attached)

    def attached(self, nexus: Nexus) -> bool:
        return nexus in self._attached

    def attach(self, nexus: Nexus) -> None:
        """A nexus is there: its first word is POWER ON OCCURRED, or I_T NEXUS LOSS OCCURRED if it was here before.

        Attaching one that is attached is a loss and a return (a login without a logout).
        """
        self._attached.add(nexus)
        self._away.pop(nexus, None)
        if nexus in self._pending:
            self.establish(Asc.I_T_NEXUS_LOSS_OCCURRED, [nexus])
        else:
            self._pending[nexus] = [Asc.POWER_ON_OCCURRED]

    def detach(self, nexus: Nexus) -> None:
        """The nexus is gone, for now."""
        if nexus not in self._attached:
            return
        self._attached.discard(nexus)
        self._away[nexus] = None
        if len(self._away) > MAX_AWAY:
            oldest = next(iter(self._away))
            del self._away[oldest], self._pending[oldest]

    def establish(self, asc: Asc, nexuses: Iterable[Nexus] | None = None, but: Nexus | None = None) -> None:
        """Make a condition pending for these nexuses (None: all that are known) except one."""
        for nexus in list(self._pending) if nexuses is None else nexuses:
            queue = self._pending.get(nexus)
            if queue is not None and nexus != but and asc not in queue:
                queue.append(asc)
                queue.sort(key=lambda one: _PRECEDENCE.get(one, _OTHERS))

    def pending(self, nexus: Nexus) -> bool:
        return bool(self._pending.get(nexus))

    def take(self, nexus: Nexus) -> Sense | None:
        """The first pending condition as sense data, which clears it; None if nothing is pending."""
        queue = self._pending.get(nexus)
        return Sense(SenseKey.UNIT_ATTENTION, queue.pop(0)) if queue else None

    def restore(self, nexus: Nexus, asc: Asc) -> None:
        """It was taken, and has not reached the initiator: pending again, and the first among its equals."""
        queue = self._pending.get(nexus)
        if queue is not None and asc not in queue:
            queue.insert(0, asc)
            queue.sort(key=lambda one: _PRECEDENCE.get(one, _OTHERS))

    def clear(self, nexus: Nexus, asc: Asc) -> None:
        """Forget a condition that the initiator has learned of in another way."""
        if asc in (queue := self._pending.get(nexus, [])):
            queue.remove(asc)
