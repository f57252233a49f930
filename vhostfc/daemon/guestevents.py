"""What the guest still has to be told through its event queue: pure bookkeeping, no I/O.

Linux gives 8 event buffers and hands them back from a work queue, so events wait here.  They are
merged per unit: what appears and vanishes again before the guest has heard of it needs no word, a
unit that is replaced is a removal and then an arrival, a parameter that changes twice is told once.
What does not fit is not kept: the next event then carries VIRTIO_SCSI_T_EVENTS_MISSED and the driver
looks at everything anew (virtio 1.2, 5.6.6.3).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.Enum):
    ARRIVED = "arrived"  # TRANSPORT_RESET, RESCAN
    REMOVED = "removed"  # TRANSPORT_RESET, REMOVED
    PARAMETERS = "parameters"  # PARAM_CHANGE


@dataclass(frozen=True, slots=True)
class GuestEvent:
    kind: Kind
    target: int
    lun: int
    asc: int = 0
    ascq: int = 0


class GuestEvents:
    """The queue.  `limit`: events kept at most."""

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._waiting: list[GuestEvent] = []
        self.missed = False

    def __len__(self) -> int:
        return len(self._waiting) + self.missed

    def __repr__(self) -> str:
        return f"<GuestEvents waiting={len(self._waiting)} missed={self.missed}>"

    def clear(self) -> None:
        """The driver starts from nothing and will look by itself (device reset)."""
        self._waiting.clear()
        self.missed = False

    def add(self, event: GuestEvent) -> None:
        """Take an event in, merged with what waits for the same unit."""
        same = [e for e in self._waiting if (e.target, e.lun) == (event.target, event.lun)]
        if event.kind is Kind.REMOVED:
            # Whatever waits for this unit is moot; was it never announced, then neither is its end.
            keep = [same[0]] if same and same[0].kind is Kind.REMOVED else []
            self._waiting = [e for e in self._waiting if e not in same or e in keep]
            if same and same[0].kind is not Kind.PARAMETERS:
                return
        elif event in same or (same and same[-1].kind is Kind.ARRIVED):
            return
        if len(self._waiting) >= self._limit:
            self.missed = True
            return
        self._waiting.append(event)

    def first(self) -> GuestEvent | None:
        """The event to deliver next; None with `missed` set means a bare VIRTIO_SCSI_T_NO_EVENT carries the bit."""
        return self._waiting[0] if self._waiting else None

    def delivered(self, event: GuestEvent | None, *, missed: bool = False) -> None:
        """This event (or None, the bare one) is in the guest's buffer; missed: it carried the missed bit."""
        if event in self._waiting:  # not when its unit changed again meanwhile
            self._waiting.remove(event)
        if missed:
            self.missed = False
