"""What logical units a target has for us, and which disks they are: REPORT LUNS, then INQUIRY of each.

A LUN is only a place.  What stands there says its page 83h: when that names another disk than before,
the array has been given another unit or has lost the one that it had, and a command that was meant for
the old disk must not reach the new one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from vhostfc.fc.exchange import Timer, Wire
from vhostfc.fc.initiator import CommandResult, End, Initiator, Remote

_TRIES = 5
_PAUSE = 0.25
_TIMEOUT = 10.0
_FIRST_ROOM = 8 + 8 * 256
_MOST_ROOM = 8 + 8 * 16384
_AT_ONCE = 16
_PAGE_ROOM = 1020


def report_luns(room: int, *, quiet: bool) -> bytes:
    """REPORT LUNS (SPC-4 6.33), SELECT REPORT 0.

    quiet: the vendor specific bit 80h of CONTROL, by which an array of ours keeps a pending REPORTED LUNS
    DATA HAS CHANGED for the initiator that this port belongs to.
    """
    return bytes([0xA0, 0, 0, 0, 0, 0]) + room.to_bytes(4, "big") + bytes([0, 0x80 if quiet else 0])


def parse_luns(data: bytes) -> tuple[tuple[bytes, ...], int]:
    """The LUNs in what has arrived, and how many bytes the whole list has."""
    if len(data) < 8:
        return (), 0
    whole = 8 + int.from_bytes(data[:4], "big")
    entries = [data[at : at + 8] for at in range(8, min(whole, len(data)) - 7, 8)]
    return tuple(sorted(set(entries))), whole


def identify(room: int = _PAGE_ROOM) -> bytes:
    """INQUIRY of the Device Identification page (SPC-4 6.4, 7.8.6)."""
    return bytes([0x12, 0x01, 0x83]) + room.to_bytes(2, "big") + b"\0"


def parse_names(data: bytes) -> bytes:
    """The designators of the logical unit itself in a page 83h, one after the other; empty when it has none."""
    if len(data) < 4 or data[1] != 0x83:
        return b""
    found, at, end = [], 4, min(len(data), 4 + int.from_bytes(data[2:4], "big"))
    while at + 4 <= end and at + 4 + data[at + 3] <= end:
        after = at + 4 + data[at + 3]
        if not data[at + 1] & 0x30:  # ASSOCIATION: the addressed logical unit
            found.append(data[at:after])
        at = after
    return b"".join(sorted(found))


class Survey:
    """Looks at the units of a port, when told to; luns and names are what the last look has shown.

    names: by LUN, see parse_names(); a unit that does not say keeps the name that it had.
    """

    def __init__(self, remote: Remote, wire: Wire, initiator: Initiator, done: Callable[[bool, float], None]) -> None:
        """done: called at the end of a look: has it come to anything, and the time."""
        self.luns: tuple[bytes, ...] = ()
        self.names: dict[bytes, bytes] = {}
        self._remote = remote
        self._wire = wire
        self._initiator = initiator
        self._done = done
        self._timer: Timer | None = None
        self._look = 0  # its number while one is under way, else 0
        self._looks = 0
        self._quiet = True
        self._room = _FIRST_ROOM
        self._tries = 0
        self._found: dict[bytes, bytes] = {}
        self._to_ask: deque[bytes] = deque()
        self._asked = 0

    def begin(self, now: float) -> None:
        """A new look; what the one before has asked for ends as it may."""
        self.stop()
        self._looks += 1
        self._look = self._looks
        self._tries = 0
        self._report(now)

    def stop(self) -> None:
        """No more of it; `done` is not called."""
        self._wire.timers.cancel(self._timer)
        self._timer = None
        self._look = 0

    def forget(self) -> None:
        self.luns = ()
        self.names = {}

    # ---------------------------------------------------------------- REPORT LUNS

    def _report(self, now: float) -> None:
        self._timer = None
        self._initiator.start(
            self._remote,
            bytes(8),
            report_luns(self._room, quiet=self._quiet),
            now,
            data_in_length=self._room,
            timeout=_TIMEOUT,
            done=partial(self._reported, self._look),
        )

    def _reported(self, look: int, result: CommandResult, now: float) -> None:
        if look != self._look:  # of a look that nobody waits for any more
            return
        self._tries += 1
        if result.end is End.COMPLETE and result.status == 0:
            luns, whole = parse_luns(result.data_in)
            if self._room < whole <= _MOST_ROOM:
                self._room = whole
                self._report(now)
                return
            self._identify_all(luns, now)
        elif result.end is End.COMPLETE and _sense_key(result) == 0x5:
            if self._quiet:  # a target that insists on CONTROL being zero
                self._quiet = False
                self._report(now)
                return
            # SPC-4 wants REPORT LUNS of every target; one that has none can have only LUN 0.
            self._identify_all((bytes(8),), now)
        elif self._tries < _TRIES:  # BUSY, TASK SET FULL, a unit attention, lost frames
            at_once = _sense_key(result) == 0x6
            self._timer = self._wire.timers.set(now + (0 if at_once else _PAUSE * self._tries), self._report)
        else:
            self._end(False, now)

    # ---------------------------------------------------------------- INQUIRY

    def _identify_all(self, luns: tuple[bytes, ...], now: float) -> None:
        self._tries = 0
        self._found = {lun: self.names.get(lun, b"") for lun in luns}
        self._to_ask = deque(luns)
        self._asked = 0
        self._identify_more(now)

    def _identify_more(self, now: float) -> None:
        self._timer = None
        while self._to_ask and self._asked < _AT_ONCE:
            lun = self._to_ask.popleft()
            self._asked += 1
            self._initiator.start(
                self._remote,
                lun,
                identify(),
                now,
                data_in_length=_PAGE_ROOM,
                timeout=_TIMEOUT,
                done=partial(self._identified, self._look, lun),
            )
        if not self._asked:
            self.luns, self.names = tuple(self._found), self._found
            self._end(True, now)

    def _identified(self, look: int, lun: bytes, result: CommandResult, now: float) -> None:
        if look != self._look:
            return
        self._asked -= 1
        if result.end is End.COMPLETE and result.status == 0:
            self._found[lun] = parse_names(result.data_in) or self._found[lun]
        elif _sense_key(result) != 0x5 and (self._timer is not None or self._tries < _TRIES):
            self._to_ask.append(lun)
            if self._timer is None:
                self._tries += 1
                self._timer = self._wire.timers.set(now + _PAUSE * self._tries, self._identify_more)
        if self._timer is None:
            self._identify_more(now)

    def _end(self, found: bool, now: float) -> None:
        self._look = 0
        self._done(found, now)


def _sense_key(result: CommandResult) -> int | None:
    """The sense key of either format (SPC-4 4.5), or None when there is no sense data."""
    sense = result.sense
    if result.status != 0x02 or len(sense) < 3:
        return None
    return sense[1] & 0x0F if sense[0] & 0x7F >= 0x72 else sense[2] & 0x0F
