"""What is known of the copies of each nexus: how far they are, and how they have ended (SPC-4 6.23, 6.25).

A copy goes by the LIST IDENTIFIER that its initiator gave it.  Of those that have ended the last one of each nexus is
remembered, until it is told, or another takes its identifier, or the nexus is lost, or the unit is reset.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vhostfc.scsi.sense import Asc, illegal, invalid_cdb
from vhostfc.scsi.task import Nexus, Status

#: LIST ID USAGE 11b: nothing is remembered, and nobody asks for it.
NO_LIST_ID = 0x03
#: TRANSFER COUNT UNITS: bytes.
_BYTES = 0x00
#: COPY COMMAND STATUS.
_IN_PROGRESS, _WITHOUT_ERRORS, _WITH_ERRORS = 0x00, 0x01, 0x02


@dataclass(eq=False, slots=True)
class Copying:
    """An EXTENDED COPY.  segment: which one it is at, from 1; moved: bytes that were written in order.

    status: how it has ended, None while it goes on; then sense, too, if there is any.
    """

    list_id: int
    usage: int
    segment: int = 0
    moved: int = 0
    status: int | None = None
    sense: bytes = b""

    def end(self, status: int, sense: bytes = b"") -> None:
        self.status, self.sense = status, sense

    @property
    def report(self) -> bytes:
        """Parameter data of RECEIVE COPY STATUS(LID1)."""
        state = _WITHOUT_ERRORS if self.status == Status.GOOD else _WITH_ERRORS
        if self.status is None:
            state = _IN_PROGRESS
        return struct.pack("!IBHBI", 8, state, self.segment, _BYTES, min(self.moved, 0xFFFFFFFF))

    @property
    def details(self) -> bytes:
        """Parameter data of RECEIVE COPY FAILURE DETAILS(LID1)."""
        if self.status == Status.GOOD:
            return bytes(4)
        return struct.pack("!I52xBxH", 56 + len(self.sense), self.status, len(self.sense)) + self.sense


class Copies:
    """The copies that one unit was asked for."""

    def __init__(self) -> None:
        self._running: dict[Nexus, dict[int, Copying]] = {}
        self._ended: dict[Nexus, Copying] = {}
        self._detailed: dict[Nexus, Copying] = {}

    def begin(self, nexus: Nexus, list_id: int, usage: int) -> Copying:
        """Raises CheckCondition when another one with this identifier goes on."""
        copying = Copying(list_id, usage)
        if usage != NO_LIST_ID:
            running = self._running.setdefault(nexus, {})
            if list_id in running:
                raise illegal(Asc.OPERATION_IN_PROGRESS)
            running[list_id] = copying
            for memory in (self._ended, self._detailed):
                if nexus in memory and memory[nexus].list_id == list_id:
                    del memory[nexus]
        return copying

    def end(self, nexus: Nexus, copying: Copying) -> None:
        """It goes on no more; without a status it was aborted."""
        if copying.status is None:
            copying.end(Status.TASK_ABORTED)
        running = self._running.get(nexus, {})
        if running.get(copying.list_id) is copying:  # else: nobody would hear of it
            del running[copying.list_id]
            if not running:
                del self._running[nexus]
            self._ended[nexus] = self._detailed[nexus] = copying

    def report(self, nexus: Nexus, list_id: int) -> bytes:
        """How far one is, or how it has ended, which is told once.  Raises CheckCondition when there is none."""
        if (running := self._running.get(nexus, {}).get(list_id)) is not None:
            return running.report
        return self._take(self._ended, nexus, list_id).report

    def details(self, nexus: Nexus, list_id: int) -> bytes:
        """Why one has failed, once.  Raises CheckCondition for one that goes on or that there is none of."""
        if list_id in self._running.get(nexus, {}):
            raise invalid_cdb(2)
        return self._take(self._detailed, nexus, list_id).details

    @staticmethod
    def _take(memory: dict[Nexus, Copying], nexus: Nexus, list_id: int) -> Copying:
        if nexus not in memory or memory[nexus].list_id != list_id:
            raise invalid_cdb(2)
        return memory.pop(nexus)

    def forget(self, nexus: Nexus) -> None:
        """The nexus is lost."""
        for memory in (self._running, self._ended, self._detailed):
            memory.pop(nexus, None)

    def clear(self) -> None:
        """The unit was reset: nothing is held for anybody (SPC-4 5.17.4.3)."""
        for memory in (self._running, self._ended, self._detailed):
            memory.clear()
