"""What is common to all device servers: the disk, the LUN where nothing is, and the well-known LUN.

A target holds a table of LUNs with a DeviceServer at each, and asks nothing about what it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from vhostfc.scsi import cdb as fields
from vhostfc.scsi import inquiry, report
from vhostfc.scsi.sense import NO_SENSE, Asc, CheckCondition, Sense, SenseKey, illegal, invalid_cdb
from vhostfc.scsi.task import ManageSteps, Nexus, ScsiResult, ServiceResponse, Status, Steps, Task, TaskManagement

if TYPE_CHECKING:
    from vhostfc.scsi.unit import LogicalUnit


class Inventory(Protocol):
    """What a target knows of its units; every unit answers REPORT LUNS from it."""

    def luns(self, nexus: Nexus) -> Iterable[int]:
        """The numbers of the logical units that this nexus may see."""
        ...

    def units(self, nexus: Nexus) -> Iterable[LogicalUnit]:
        """The same, the units themselves."""
        ...

    def reported(self, nexus: Nexus) -> None:
        """This nexus was told: call inventory_reported(nexus) on every unit (SPC-4 6.33)."""
        ...


class DeviceServer(Protocol):
    """What a target needs of whatever is at a LUN."""

    def execute(self, task: Task) -> Steps:
        """Run one command.  All that an initiator can do wrong ends in a ScsiResult, not in an exception."""
        ...

    def manage(self, nexus: Nexus, function: TaskManagement) -> ManageSteps:
        """Run one task management function."""
        ...

    def verdict(self, nexus: Nexus) -> bytes:
        """The opcodes that may now run for this nexus without asking: bit n%8 of byte n//8 is opcode n."""
        ...

    def attach(self, nexus: Nexus) -> None: ...

    def detach(self, nexus: Nexus) -> None: ...

    def inventory_reported(self, nexus: Nexus) -> None: ...


def check_condition(sense: Sense, *, descriptor: bool = False) -> ScsiResult:
    """CHECK CONDITION with this sense, in descriptor or fixed format."""
    attention = sense.asc if sense.key is SenseKey.UNIT_ATTENTION else None
    return ScsiResult(Status.CHECK_CONDITION, sense.encode(descriptor=descriptor), attention=attention)


def answer_report_luns(inventory: Inventory, task: Task) -> bytes:
    """REPORT LUNS, which is the same at every LUN.  Raises CheckCondition."""
    data = report.report_luns(task.cdb[2], inventory.luns(task.nexus))
    if not task.cdb[11] & fields.KEEP_ATTENTION:
        inventory.reported(task.nexus)
    return data[: fields.number(task.cdb, 6, 9)]


def inquiry_page(cdb: bytes) -> int | None:
    """The vital product data page that an INQUIRY asks for, None for standard data.  Raises CheckCondition."""
    if cdb[1] & 0x01:
        return cdb[2]
    if cdb[2]:
        raise invalid_cdb(2)
    return None


class _NoDisk:
    """A device server without a medium: the few commands that it has need no effect."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory

    def execute(self, task: Task) -> Steps:
        yield from ()
        try:
            return ScsiResult(data_in=self._answer(task))
        except CheckCondition as end:
            return check_condition(end.sense)

    def _answer(self, task: Task) -> bytes:
        """The data-in of the command.  Raises CheckCondition."""
        raise NotImplementedError

    def manage(self, nexus: Nexus, function: TaskManagement) -> ManageSteps:
        """No command is ever in flight here, so all that could be ended has ended."""
        yield from ()
        if function is TaskManagement.CLEAR_ACA:
            return ServiceResponse.FUNCTION_REJECTED
        return ServiceResponse.FUNCTION_COMPLETE

    def verdict(self, nexus: Nexus) -> bytes:
        """Nothing: there is no medium."""
        return bytes(32)

    def attach(self, nexus: Nexus) -> None:
        """Nothing is kept for a nexus."""

    def detach(self, nexus: Nexus) -> None:
        """Nothing is kept for a nexus."""

    def inventory_reported(self, nexus: Nexus) -> None:
        """No unit attention is ever pending here."""


class AbsentUnit(_NoDisk):
    """The null object at a LUN that does not exist, or that an initiator may not see (SAM-5 4.6.19, SPC-4 5.9)."""

    def _answer(self, task: Task) -> bytes:
        opcode = task.cdb[0] if task.cdb else None
        if opcode == fields.INQUIRY.opcode:
            fields.parse(task.cdb)
            return inquiry.absent_data(inquiry_page(task.cdb))[: fields.number(task.cdb, 3, 4)]
        if opcode == fields.REPORT_LUNS.opcode:
            fields.parse(task.cdb)
            return answer_report_luns(self._inventory, task)
        sense = Sense(SenseKey.ILLEGAL_REQUEST, Asc.LOGICAL_UNIT_NOT_SUPPORTED)
        if opcode == fields.REQUEST_SENSE.opcode:
            fields.parse(task.cdb)
            return sense.encode(descriptor=bool(task.cdb[1] & 0x01))[: task.cdb[4]]
        raise CheckCondition(sense)

    def manage(self, nexus: Nexus, function: TaskManagement) -> ManageSteps:
        yield from ()
        return ServiceResponse.INCORRECT_LUN


class ReportLunsUnit(_NoDisk):
    """The REPORT LUNS well-known logical unit, C101 0000 0000 0000h (SPC-4 8.2)."""

    def __init__(self, inventory: Inventory, disk: LogicalUnit) -> None:
        """disk: any of the target; the names of the device and its ports are taken from it."""
        super().__init__(inventory)
        self._disk = disk

    def _answer(self, task: Task) -> bytes:
        command = fields.parse(task.cdb)
        cdb = task.cdb
        match command:
            case fields.INQUIRY:
                return inquiry.well_known_data(self._disk.identity, inquiry_page(cdb), task.nexus.port)[
                    : fields.number(cdb, 3, 4)
                ]
            case fields.REPORT_LUNS:
                return answer_report_luns(self._inventory, task)
            case fields.REQUEST_SENSE:
                return NO_SENSE.encode(descriptor=bool(cdb[1] & 0x01))[: cdb[4]]
            case fields.TEST_UNIT_READY:
                return b""
        raise illegal(Asc.INVALID_COMMAND_OPERATION_CODE)
