"""Faults on demand: what a storage network may do to those on it, made to happen when somebody wants it.

A Fault says what, to whom, how often and for how long; it is a value, read from a file or an order.
Here is the pure part: what becomes of a frame at the switch's door (FrameFaults) and of a command at
a unit (UnitFaults).  What concerns ports, zones and maps is done by whoever runs the fabric.

Every fault has dice of its own, seeded by the fabric's seed and its name: the same frames in the same
order meet the same fate, whatever other faults there are.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from vhostfc.fc.els import Explanation, LsRjt, Reason
from vhostfc.fc.frame import HEADER_LENGTH, Address, FcType, Frame, FrameError, RCtl, els_reply
from vhostfc.fc.login import Login
from vhostfc.fc.wwn import Wwn
from vhostfc.scsi.sense import Asc, Sense, SenseKey
from vhostfc.scsi.task import ScsiResult, Status

#: Exchanges whose opcode is remembered while a fault asks for it; the oldest are forgotten.
EXCHANGES = 65536


class What(enum.Enum):
    """The kinds of faults, as they are spelled in files and orders."""

    # to frames at the switch's door
    LOSE = "lose"
    DELAY = "delay"
    DUPLICATE = "duplicate"
    CORRUPT = "corrupt"
    REJECT = "reject"
    SILENCE = "silence"
    # to ports
    LINK_DOWN = "link-down"
    LOGOUT = "logout"
    CLEAR_VIRTUAL_LINK = "clear-virtual-link"
    TARGET_GONE = "target-gone"
    # to commands at a unit
    BUSY = "busy"
    FULL = "full"
    OFFLINE = "offline"
    MEDIUM_ERROR = "medium-error"
    LATENCY = "latency"
    # to what the configuration says
    ZONE = "zone"
    MASK = "mask"
    UNMAP = "unmap"
    MAP = "map"
    ACCESS = "access"


OF_FRAMES = frozenset({What.LOSE, What.DELAY, What.DUPLICATE, What.CORRUPT, What.REJECT, What.SILENCE})
OF_UNITS = frozenset({What.BUSY, What.FULL, What.OFFLINE, What.MEDIUM_ERROR, What.LATENCY})
OF_CONFIGURATION = frozenset({What.ZONE, What.MASK, What.UNMAP, What.MAP, What.ACCESS})
#: These happen once, and are over then.
AT_ONCE = frozenset({What.LOGOUT, What.CLEAR_VIRTUAL_LINK})


class Direction(enum.Enum):
    """Past the switch's door: from an N_Port outside, or to one."""

    IN = "in"
    OUT = "out"


@dataclass(frozen=True, slots=True)
class Latency:
    """A time in seconds: fixed when `most` is None and `mean` too, uniform from `least` to `most`, or exponential."""

    least: float = 0.0
    most: float | None = None
    mean: float | None = None

    def draw(self, dice: Dice) -> float:
        if self.mean is not None:
            return self.least - self.mean * math.log(1.0 - dice.roll())
        if self.most is not None:
            return self.least + (self.most - self.least) * dice.roll()
        return self.least


class Dice:
    """Numbers that look random and are the same each time: SplitMix64."""

    _MASK = (1 << 64) - 1

    def __init__(self, seed: int, name: str = "") -> None:
        digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
        self._state = int.from_bytes(digest[:8], "big")

    def number(self) -> int:
        """64 bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & self._MASK
        z = self._state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & self._MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & self._MASK
        return z ^ z >> 31

    def roll(self) -> float:
        """At least 0, less than 1."""
        return (self.number() >> 11) / (1 << 53)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, as it was asked for.  None: any, or no bound.

    after: seconds from when it was asked for; at: seconds of the epoch, instead.  lasts: seconds.
    rate: the probability that what could be hit is; count: hits until it is over.
    wwpn and target: Port_Names that a frame's two ends, or a command's nexus, must have among them.
    els, ct: the first byte of an ELS's payload, the code of a CT_IU.  opcode: of the SCSI command
    that a frame belongs to.  byte: of the frame that is changed.  on: "read", "write" or "both".
    """

    what: What
    name: str = ""
    after: float = 0.0
    at: float | None = None
    lasts: float | None = None
    rate: float = 1.0
    count: int | None = None
    direction: Direction | None = None
    s_id: int | None = None
    d_id: int | None = None
    wwpn: Wwn | None = None
    target: Wwn | None = None
    r_ctl: int | None = None
    type: int | None = None
    els: int | None = None
    ct: int | None = None
    opcode: int | None = None
    byte: int | None = None
    reason: int = Reason.UNABLE_TO_PERFORM
    explanation: int = Explanation.NONE
    latency: Latency = field(default_factory=Latency)
    holder: str | None = None
    lun: int | None = None
    lba: int = 0
    blocks: int | None = None
    on: str = "both"
    zone: str = ""
    members: frozenset[Wwn] | None = None
    allow: frozenset[Wwn] | None = None
    share: tuple[str, int] | None = None
    group: int = 0
    access: str = ""


class Active:
    """A fault in force: how often it has hit, and its dice.  over: its count is used up."""

    def __init__(self, fault: Fault, seed: int) -> None:
        self.fault = fault
        self.hits = 0
        self.dice = Dice(seed, fault.name)

    @property
    def over(self) -> bool:
        return self.fault.count is not None and self.hits >= self.fault.count

    def strikes(self) -> bool:
        """Roll for something that it could hit; counts the hit."""
        if self.over or (self.fault.rate < 1.0 and self.dice.roll() >= self.fault.rate):
            return False
        self.hits += 1
        return True


# ---------------------------------------------------------------- frames


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a frame: its copies, each after so many seconds; an answer to its sender; what did it."""

    copies: tuple[tuple[float, bytes], ...]
    answer: Frame | None = None
    hits: tuple[Active, ...] = ()

    @property
    def comment(self) -> str:
        return "; ".join(f"{_DONE[hit.fault.what]}: fault {hit.fault.name}" for hit in self.hits)


_DONE = {
    What.LOSE: "lost",
    What.SILENCE: "not answered",
    What.DELAY: "late",
    What.DUPLICATE: "sent twice",
    What.CORRUPT: "corrupted",
    What.REJECT: "rejected",
}


class FrameFaults:
    """The faults at the switch's door.

    name_of: the Port_Name of an N_Port_ID, None when nobody has it.
    """

    def __init__(self, name_of: Callable[[int], Wwn | None]) -> None:
        self._name_of = name_of
        self._active: dict[str, Active] = {}
        self._opcodes: OrderedDict[tuple[int, int], int] | None = None

    def __bool__(self) -> bool:
        return bool(self._active)

    def add(self, active: Active) -> None:
        self._active[active.fault.name] = active
        self._remember()

    def remove(self, name: str) -> None:
        self._active.pop(name, None)
        self._remember()

    def _remember(self) -> None:
        """Opcodes are kept only while a fault asks for them."""
        if not any(active.fault.opcode is not None for active in self._active.values()):
            self._opcodes = None
        elif self._opcodes is None:
            self._opcodes = OrderedDict()

    def meet(self, direction: Direction, data: bytes) -> Fate:
        """A frame passes the door."""
        if not self._active:
            return Fate(((0.0, data),))
        try:
            frame = Frame.unpack(data)
        except FrameError:
            return Fate(((0.0, data),))
        passage = _Passage(direction, frame, frozenset(self._ends(frame)), self._opcode(frame))
        copies: list[tuple[float, bytes]] = [(0.0, data)]
        hits: list[Active] = []
        for active in list(self._active.values()):
            fault = active.fault
            if not passage.matches(fault) or not active.strikes():
                continue
            hits.append(active)
            match fault.what:
                case What.LOSE | What.SILENCE:
                    return Fate((), hits=tuple(hits))
                case What.REJECT:
                    answer = els_reply(frame, LsRjt(fault.reason, fault.explanation).pack())
                    return Fate((), answer, tuple(hits))
                case What.DELAY:
                    late = fault.latency.draw(active.dice)
                    copies = [(delay + late, one) for delay, one in copies]
                case What.DUPLICATE:
                    copies *= 2
                case What.CORRUPT:
                    copies = [(delay, _corrupted(one, fault.byte, active.dice)) for delay, one in copies]
        return Fate(tuple(copies), hits=tuple(hits))

    def _ends(self, frame: Frame) -> Iterator[Wwn]:
        for port_id in (frame.s_id, frame.d_id):
            name = self._name_of(port_id)
            if name is not None:
                yield name
        if frame.r_ctl == RCtl.ELS_REQUEST and frame.d_id == Address.F_PORT:
            try:
                yield Login.unpack(frame.payload).wwpn  # it has no N_Port_ID yet
            except FrameError:
                return

    def _opcode(self, frame: Frame) -> int | None:
        """Of the command that a frame of FCP belongs to, an ABTS too."""
        if self._opcodes is None or frame.type not in {FcType.FCP, FcType.BLS}:
            return None
        key = (frame.d_id if frame.from_responder else frame.s_id, frame.ox_id)
        if frame.r_ctl == RCtl.DATA_UNSOLICITED_COMMAND and len(frame.payload) > 12:
            self._opcodes[key] = frame.payload[12]
            self._opcodes.move_to_end(key)
            if len(self._opcodes) > EXCHANGES:
                self._opcodes.popitem(last=False)
        return self._opcodes.get(key)


@dataclass(frozen=True, slots=True)
class _Passage:
    """A frame at the door, with what its filters ask for."""

    direction: Direction
    frame: Frame
    ends: frozenset[Wwn]
    opcode: int | None

    def matches(self, fault: Fault) -> bool:
        frame = self.frame
        if fault.direction is not None and fault.direction is not self.direction:
            return False
        for wanted, value in (
            (fault.s_id, frame.s_id),
            (fault.d_id, frame.d_id),
            (fault.r_ctl, frame.r_ctl),
            (fault.type, frame.type),
            (fault.opcode, self.opcode),
        ):
            if wanted is not None and wanted != value:
                return False
        if not {name for name in (fault.wwpn, fault.target) if name is not None} <= self.ends:
            return False
        if fault.els is not None and (frame.type != FcType.ELS or frame.payload[:1] != bytes([fault.els])):
            return False
        if fault.ct is not None and (frame.type != FcType.CT or frame.payload[8:10] != fault.ct.to_bytes(2, "big")):
            return False
        if fault.what is What.REJECT:
            return frame.r_ctl == RCtl.ELS_REQUEST and self.direction is Direction.IN
        return True


def _corrupted(data: bytes, byte: int | None, dice: Dice) -> bytes:
    """One bit is another: of this byte, else of any in the payload, or in the header where there is none."""
    at = byte
    if at is None:
        first = HEADER_LENGTH if len(data) > HEADER_LENGTH else 0
        at = first + dice.number() % (len(data) - first)
    if at >= len(data):
        return data
    return data[:at] + bytes([data[at] ^ 1 << dice.number() % 8]) + data[at + 1 :]


# ---------------------------------------------------------------- commands at a unit

_STATUS = {What.BUSY: Status.BUSY, What.FULL: Status.TASK_SET_FULL}
#: Answered whatever state a unit is in (SPC-4 5.3): INQUIRY, REPORT LUNS, REQUEST SENSE.
_ALWAYS = frozenset({0x12, 0xA0, 0x03})
_NOT_READY = ScsiResult(
    Status.CHECK_CONDITION,
    Sense(SenseKey.NOT_READY, Asc.LOGICAL_UNIT_NOT_READY_MANUAL_INTERVENTION_REQUIRED).encode(),
)


@dataclass(frozen=True, slots=True)
class CommandFate:
    """seconds: how long the command waits before it begins; result: its end, without having begun, or None."""

    seconds: float = 0.0
    result: ScsiResult | None = None


class UnitFaults:
    """The faults of one unit.  As long as there is one, no adapter may run anything on the unit by itself.

    told: is called with each fault that has hit.
    """

    def __init__(self, told: Callable[[Active], None] = lambda active: None) -> None:
        self.told = told
        self._active: dict[str, Active] = {}

    def __bool__(self) -> bool:
        return bool(self._active)

    def add(self, active: Active) -> None:
        self._active[active.fault.name] = active

    def remove(self, name: str) -> None:
        self._active.pop(name, None)

    def begin(self, ports: Iterable[Wwn], cdb: bytes) -> CommandFate:
        """A command is about to begin.  ports: its initiator port and its target port."""
        seconds, ends = 0.0, set(ports)
        for active in list(self._active.values()):
            fault = active.fault
            if fault.what is What.MEDIUM_ERROR or not self._concerns(fault, ends, cdb[0]):
                continue
            if fault.what is not What.LATENCY and cdb[0] in _ALWAYS:
                continue
            if not active.strikes():
                continue
            self.told(active)
            if fault.what is What.LATENCY:
                seconds += fault.latency.draw(active.dice)
            elif fault.what is What.OFFLINE:
                return CommandFate(seconds, _NOT_READY)
            else:
                return CommandFate(seconds, ScsiResult(_STATUS[fault.what]))
        return CommandFate(seconds)

    def touch(self, ports: Iterable[Wwn], opcode: int | None, lba: int, blocks: int, *, write: bool) -> int | None:
        """A command reads or writes these blocks of the medium: the first that fails, None when all is well."""
        ends = set(ports)
        for active in list(self._active.values()):
            fault = active.fault
            if fault.what is not What.MEDIUM_ERROR or fault.on not in {"both", "write" if write else "read"}:
                continue
            first = max(lba, fault.lba)
            end = lba + blocks if fault.blocks is None else min(lba + blocks, fault.lba + fault.blocks)
            if first < end and self._concerns(fault, ends, opcode) and active.strikes():
                self.told(active)
                return first
        return None

    @staticmethod
    def _concerns(fault: Fault, ends: set[Wwn], opcode: int | None) -> bool:
        if fault.opcode is not None and fault.opcode != opcode:
            return False
        return {name for name in (fault.wwpn, fault.target) if name is not None} <= ends
