"""Who is logged in to a target port, what exchanges they have there, and what their runner hears of it.

Commands that are complete wait in the rations; what must not wait behind them (task management, aborts, logins
and their losses) is told in its order.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vhostfc.fabric.recovery import Ends
from vhostfc.fc.fcp import FcpCmnd, TmFlag
from vhostfc.fc.frame import Frame
from vhostfc.fc.sequence import DataBuffer
from vhostfc.fc.wwn import Wwn
from vhostfc.scsi.task import Nexus, TaskManagement

if TYPE_CHECKING:
    from vhostfc.fabric.target import TargetPort


#: Task management functions, as a device server knows them.
FUNCTIONS = {
    TmFlag.ABORT_TASK_SET: TaskManagement.ABORT_TASK_SET,
    TmFlag.CLEAR_TASK_SET: TaskManagement.CLEAR_TASK_SET,
    TmFlag.LOGICAL_UNIT_RESET: TaskManagement.LOGICAL_UNIT_RESET,
    TmFlag.TARGET_RESET: TaskManagement.LOGICAL_UNIT_RESET,  # of every unit (FCP-4 9.2.2.6)
    TmFlag.CLEAR_ACA: TaskManagement.CLEAR_ACA,
}


class State(enum.Enum):
    """Where an exchange is."""

    DATA = "waiting for data"
    WAITING = "waiting to be run"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False, slots=True)
class Session:
    """A login of an N_Port with us.

    image: PRLI was done; nexus: as the device server knows the I_T nexus; since: seconds of the epoch.
    functions: task management functions that are under way.  confirms: it sends an FCP_CONF when asked to.
    """

    port_id: int
    wwpn: Wwn
    nexus: Nexus
    payload_size: int
    image: bool = False
    since: float = 0.0
    functions: int = 0
    confirms: bool = False
    exchanges: dict[int, Exchange] = field(default_factory=dict)
    ends: Ends = field(default_factory=Ends)


@dataclass(eq=False, slots=True)
class Exchange:
    """An FCP exchange: a command, or a task management function.

    admitted, managing: it counts against the ration of commands, or of functions.  size: its bytes there.
    """

    target: TargetPort
    session: Session
    frame: Frame
    cmnd: FcpCmnd
    rx_id: int
    state: State = State.RUNNING
    size: int = 0
    admitted: bool = False
    managing: bool = False
    data: DataBuffer | None = None
    asked: int = 0  # bytes of data that XFER_RDYs have asked for
    sent: int = 0  # bytes of data-in
    heard: float = 0.0  # when it came, or data of it did
    seq_id: int = 0

    def next_seq(self) -> int:
        self.seq_id = (self.seq_id + 1) & 0xFF
        return self.seq_id

    @property
    def over(self) -> bool:
        """It has ended, or its login has: whoever runs it may do nothing more for it."""
        return self.state is State.ENDED or self.target.sessions.get(self.session.port_id) is not self.session

    @property
    def data_out(self) -> bytes:
        return self.data.take() if self.data else b""

    @property
    def data_in_length(self) -> int:
        """Bytes that the initiator has room for."""
        if not self.cmnd.read:
            return 0
        return self.cmnd.bidirectional_read_length if self.cmnd.write else self.cmnd.data_length


@dataclass(frozen=True, slots=True)
class Manage:
    """A task management function to run; its exchange gets a response with respond()."""

    exchange: Exchange


@dataclass(frozen=True, slots=True)
class Abort:
    """A running command to be stopped; `reply` goes out when it cannot touch the medium any more."""

    exchange: Exchange
    reply: Frame | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """An image pair was established (PRLI): the I_T nexus is there, perhaps again."""

    session: Session


@dataclass(frozen=True, slots=True)
class Lost:
    """An I_T nexus is lost."""

    session: Session


@dataclass(frozen=True, slots=True)
class Untold:
    """Sense data that were sent to an initiator for this LUN have not arrived."""

    session: Session
    lun: bytes
    sense: bytes


Urgent = Manage | Abort | Opened | Lost | Untold
