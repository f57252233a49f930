"""What goes into a logical unit and what comes out: values, no I/O.

A LogicalUnit is a device server that owns no socket, no file and no clock.  `execute()` is a
generator: it yields what it wants done to the medium (an Effect), is sent the answer, and returns a
ScsiResult.  Whoever runs it (a test with a bytearray, the fabric with memfds and files) decides how
and in which thread.  So a command reads top to bottom, and one unit serves frames, tests and fuzzers.

Fencing is the runner's duty, by one rule: after each step it compares verdict() of every nexus with
the routes that are out, and no status goes back before every narrower route is acknowledged.
"""

from __future__ import annotations

import enum
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhostfc.scsi.reservations import State
    from vhostfc.scsi.sense import Asc
    from vhostfc.scsi.unit import LogicalUnit


@dataclass(frozen=True, slots=True)
class Nexus:
    """An I_T nexus as the device server knows it.

    initiator: the TransportID (SPC-4 7.6.4), opaque here; port: relative target port identifier.
    """

    initiator: bytes
    port: int


class Attribute(enum.IntEnum):
    """Task attributes in FCP's numbers (FCP-4 table 22)."""

    SIMPLE = 0
    HEAD_OF_QUEUE = 1
    ORDERED = 2
    ACA = 4


@dataclass(frozen=True, slots=True)
class Task:
    """A command as it reaches the device server; all data-out is here already."""

    nexus: Nexus
    cdb: bytes
    data_out: bytes = b""
    data_in_length: int = 0
    attribute: int = Attribute.SIMPLE
    tag: int = 0


class TaskManagement(enum.Enum):
    """The task management functions that a device server has a part in (SAM-5 7.1).

    ABORT TASK and the QUERY functions are their runner's, who knows the tasks.
    """

    ABORT_TASK_SET = "ABORT TASK SET"
    CLEAR_ACA = "CLEAR ACA"
    CLEAR_TASK_SET = "CLEAR TASK SET"
    LOGICAL_UNIT_RESET = "LOGICAL UNIT RESET"


class ServiceResponse(enum.Enum):
    """How a task management function ended (SAM-5 7.1)."""

    FUNCTION_COMPLETE = "FUNCTION COMPLETE"
    FUNCTION_REJECTED = "FUNCTION REJECTED"
    INCORRECT_LUN = "INCORRECT LOGICAL UNIT NUMBER"


class Status(enum.IntEnum):
    """SAM-5 5.3.1."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02
    CONDITION_MET = 0x04
    BUSY = 0x08
    RESERVATION_CONFLICT = 0x18
    TASK_SET_FULL = 0x28
    ACA_ACTIVE = 0x30
    TASK_ABORTED = 0x40


@dataclass(frozen=True, slots=True)
class ScsiResult:
    """Status, sense data and data-in; the caller cuts data_in to what there is room for and counts the residual.

    attention: the unit attention condition that it tells of, which is not pending any more.  A caller that
    cannot deliver the result gives it back to the unit (unit.not_told).
    """

    status: int = Status.GOOD
    sense: bytes = b""
    data_in: bytes = b""
    attention: Asc | None = None


# ---------------------------------------------------------------- effects: what a unit asks of its runner


@dataclass(frozen=True, slots=True)
class Hold:
    """Take the range latch of these blocks until the generator ends; a single effect holds its own range by itself."""

    lba: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Read:
    """Answered with the bytes.  fua: not from a volatile cache."""

    lba: int
    blocks: int
    fua: bool = False


@dataclass(frozen=True, slots=True)
class Write:
    """data: whole blocks.  atomic: after whatever crash, all of it or none of it is there; with fua only."""

    lba: int
    data: bytes
    fua: bool = False
    atomic: bool = False


@dataclass(frozen=True, slots=True)
class Fill:
    """The same block in each of these; a block of zeros with unmap lets the medium drop them (they read as zeros)."""

    lba: int
    blocks: int
    block: bytes
    unmap: bool = False


@dataclass(frozen=True, slots=True)
class Flush:
    """What was written is on the medium when this is answered."""


@dataclass(frozen=True, slots=True)
class Extents:
    """Answered with [(lba, blocks, mapped)] that covers the range in order."""

    lba: int
    blocks: int


@dataclass(frozen=True, slots=True)
class AbortTasks:
    """End the tasks of these nexuses on this unit, in every adapter and over frames.

    Answered when none of them can touch the medium any more.  reset: their guests are told RESET,
    else ABORTED.  The task that yields this is not one of them.
    """

    nexuses: frozenset[Nexus]
    reset: bool = False


@dataclass(frozen=True, slots=True)
class TakeTurn:
    """Answered when no other command of this unit is between its own TakeTurn and its end."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Answered with True when these reservations would be found after a crash, else with False.

    They take the place of what was kept before, at one stroke; None: there is nothing to keep.
    """

    state: State | None


@dataclass(frozen=True, slots=True)
class KeepNote:
    """Answered with True when this note of the unit would be found after a crash, else with False.

    data: None removes it.
    """

    name: str
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Background:
    """Run these steps to their end, whatever becomes of the command.  wait: answered then, else at once."""

    steps: BackgroundSteps
    wait: bool


@dataclass(frozen=True, slots=True)
class At:
    """Do this at another unit, for the same nexus; answered as it is, or Withdrawn where the nexus may not (any more).

    unit: one of those that the Inventory has named.
    """

    unit: LogicalUnit
    effect: Read | Write


Effect = Hold | Read | Write | Fill | Flush | Extents | AbortTasks | TakeTurn | Keep | KeepNote | Background | At


class MediumError(Exception):
    """Thrown into the generator by the runner: the medium failed at this block.  space: it is full."""

    def __init__(self, lba: int, *, space: bool = False) -> None:
        super().__init__(f"medium error at block {lba}")
        self.lba = lba
        self.space = space


class Withdrawn(Exception):
    """Thrown into the generator by the runner at a write that was not done: it may not be right any more.

    A command that lets it pass is begun anew, which is right for all that may be done twice.  One that catches it looks
    again itself, and may ask for the same write once more.
    """


#: What execute() returns.  The value sent in is what the effect's docstring promises, else None.
Steps = Generator[Effect, object, ScsiResult]
#: What manage() returns; run like Steps.
ManageSteps = Generator[Effect, object, ServiceResponse]
#: What goes on in the background; its end is all that it answers.
BackgroundSteps = Generator[Effect, object, None]
