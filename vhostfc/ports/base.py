"""The first seam: where an adapter's port lives.

Above it, `daemon/` turns a guest's virtio-scsi into commands for units; below it is either the
software fabric (`emulated`) or a vport of a physical HBA.  Nothing above may ask which.  One
contract suite (tests/ports/contract.py) runs over every implementation.

What the fabric can cause is a value here: a lost path, a port that is gone, a command that timed
out are an `Outcome`.  Exceptions are for login (LoginRefused) and for bugs.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from vhostfc.fc.wwn import Wwn

if TYPE_CHECKING:
    from vhostfc.native import Medium


@dataclass(frozen=True, slots=True)
class PortIdentity:
    """Who an N_Port is on the fabric."""

    wwpn: Wwn
    wwnn: Wwn
    symbolic_name: str = ""


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """A logical unit as an initiator names it: the target port and the 8-byte LUN (SAM-5 4.7).

    disk: what stands there says of itself (its designators, SPC-4 7.8.6), b"" unknown.  Another disk in the
    same place is the same Unit, but no command that was meant for the one may reach the other.
    """

    wwpn: Wwn
    lun: bytes
    disk: bytes = field(default=b"", compare=False)

    def __str__(self) -> str:
        return f"{self.wwpn}/{self.lun.hex()}"

    def is_disk(self, disk: bytes) -> bool:
        """Is this the disk that is meant?  What is not known may be it."""
        return not self.disk or not disk or self.disk == disk


class PortState(enum.Enum):
    """Where an N_Port is on its way into the fabric."""

    LINK_DOWN = "link down"
    LOGGING_IN = "logging in"
    ONLINE = "online"


class RemotePortState(enum.Enum):
    """How we stand with a remote N_Port; the words of Linux's fc_remote_ports."""

    ONLINE = "online"
    BLOCKED = "blocked"
    NOT_PRESENT = "not present"


@dataclass(frozen=True, slots=True)
class RemotePort:
    """A target port that zoning lets us see, and the units that it has for us."""

    wwpn: Wwn
    wwnn: Wwn
    port_id: int
    state: RemotePortState
    units: tuple[Unit, ...] = ()


@dataclass(frozen=True, slots=True)
class Topology:
    """What one logged-in N_Port sees: the truth, at one moment."""

    state: PortState
    port_id: int
    fabric_name: Wwn | None
    remote_ports: tuple[RemotePort, ...] = ()


class PortEventKind(enum.Enum):
    TOPOLOGY = "topology"  # link, remote ports or units changed: take a new snapshot
    PARAMETERS = "parameters"  # a unit's parameters changed; asc and ascq say which (2Ah 09h: capacity)


@dataclass(frozen=True, slots=True)
class PortEvent:
    """Says "look again, here": never a second truth beside the snapshot."""

    kind: PortEventKind
    unit: Unit | None = None
    asc: int = 0
    ascq: int = 0


class Outcome(enum.Enum):
    """How a command or a task management function ended, as far as the transport knows."""

    COMPLETE = "complete"  # the device server answered: status and sense hold
    NO_TARGET = "no target"  # there is no such remote port, or another disk where the unit was
    PATH_LOST = "path lost"  # the path went away and did not come back in time
    RETRY = "retry"  # lost with the path, and not run again by us: the guest may send it anew
    TIMED_OUT = "timed out"  # aborted by us after its time
    ABORTED = "aborted"  # ended by a task management function or a reset
    GIVEN_UP = "given up"  # by the host's own driver, for reasons of its own
    FAILED = "failed"  # the host could not carry it out; what became of it at the device is unknown
    TARGET_FAILED = "target failed"  # the target is broken, on all paths


@dataclass(frozen=True, slots=True)
class ScsiResult:
    """The end of a command.

    residual: bytes of the expected length that were not moved (> 0, FCP_RESID_UNDER), or bytes that
    the device had beyond it (< 0, FCP_RESID_OVER).
    """

    outcome: Outcome
    status: int = 0
    sense: bytes = b""
    data_in: bytes = b""
    residual: int = 0
    status_qualifier: int = 0


class TaskManagement(enum.Enum):
    """Task management functions (SAM-5 7.1)."""

    ABORT_TASK = "ABORT TASK"
    ABORT_TASK_SET = "ABORT TASK SET"
    CLEAR_ACA = "CLEAR ACA"
    CLEAR_TASK_SET = "CLEAR TASK SET"
    I_T_NEXUS_RESET = "I_T NEXUS RESET"
    LOGICAL_UNIT_RESET = "LOGICAL UNIT RESET"
    QUERY_TASK = "QUERY TASK"
    QUERY_TASK_SET = "QUERY TASK SET"


class TaskManagementResponse(enum.Enum):
    """Service responses of task management functions (SAM-5 7.1), and the transport's own."""

    FUNCTION_COMPLETE = "FUNCTION COMPLETE"
    FUNCTION_SUCCEEDED = "FUNCTION SUCCEEDED"
    FUNCTION_REJECTED = "FUNCTION REJECTED"
    INCORRECT_LUN = "INCORRECT LOGICAL UNIT NUMBER"
    NO_TARGET = "no target"
    DELIVERY_FAILURE = "SERVICE DELIVERY OR TARGET FAILURE"


class InFlight(enum.Enum):
    """What becomes of commands that were admitted under the route that ends.

    ABORTED: by another initiator's doing; their status is TASK ABORTED.
    """

    FINISH = "finish"
    RESET = "reset"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Route:
    """What a worker may do for a unit without asking: the opcodes in `mask`, on `medium`.

    mask: 32 bytes, bit n%8 of byte n//8 is opcode n.  medium None: everything is asked for (punted).
    """

    mask: bytes = bytes(32)
    medium: Medium | None = None
    epoch: int = 0
    read_only: bool = False
    gone: bool = False


@dataclass(frozen=True, slots=True)
class RouteChange:
    """A route that shall be in force in every worker; call acknowledge() when it is (and never else).

    The acknowledgement is a promise: nothing that was admitted under an older route can touch the
    medium any more, and the older route's medium has been dropped.
    """

    route: Route
    in_flight: InFlight = InFlight.FINISH
    acknowledge: Callable[[], None] = field(default=lambda: None)


class Path(Protocol):
    """An open way to a unit: what the workers' routes point to."""

    @property
    def unit(self) -> Unit: ...

    def changes(self) -> AsyncIterator[RouteChange]:
        """The route as it is, then each change of it, in order; ends when the unit is gone for good."""
        ...

    async def aclose(self) -> None:
        """Give the path up.  Its last route must not be in force any more."""
        ...


class Port(Protocol):
    """One logged-in N_Port."""

    @property
    def identity(self) -> PortIdentity: ...

    def snapshot(self) -> Topology: ...

    def events(self) -> AsyncIterator[PortEvent]: ...

    async def rescan(self) -> None:
        """Ask the fabric and every target afresh; returns when the snapshot shows it."""
        ...

    async def execute(
        self, unit: Unit, cdb: bytes, *, data_out: bytes = b"", data_in: int = 0, attribute: int = 0, tag: int = 0
    ) -> ScsiResult:
        """Run a command.  data_in: bytes that the initiator has room for; attribute: FCP's task attribute
        (0 SIMPLE, 1 HEAD OF QUEUE, 2 ORDERED, 4 ACA); tag: what manage() finds it by, not unique."""
        ...

    async def manage(self, unit: Unit, function: TaskManagement, tag: int | None = None) -> TaskManagementResponse:
        """Run a task management function; commands of this port that it ends have returned before it does."""
        ...

    async def open_path(self, unit: Unit) -> Path | None:
        """A path for the workers, or None when the unit cannot be reached now."""
        ...

    def latch_stuck(self, owner: int) -> None:
        """A worker met a range latch that this owner has held for longer than a second: look after it."""
        ...


class Fabric(Protocol):
    """The way into a fabric: an HBA's port or the link to a software fabric."""

    def login(self, identity: PortIdentity) -> AbstractAsyncContextManager[Port]:
        """Log this identity in; leaving the context logs it out (LOGO, or vport_delete).

        Raises LoginRefused when the fabric says no; the message names the WWPN and the reason.
        """
        ...
