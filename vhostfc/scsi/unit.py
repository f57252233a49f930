"""The disk: a device server that answers every command sent to its LUN.

A unit is shared by all nexuses, and its commands run interleaved: between two effects of one, others
run.  All state that is not the medium (mode pages, unit attentions) is read and changed without a
yield in between, so it needs no lock.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace

from vhostfc.scsi import blocks as media
from vhostfc.scsi import cdb as fields
from vhostfc.scsi import inquiry, report
from vhostfc.scsi.access import HANDLERS as RESERVING
from vhostfc.scsi.access import Reservations
from vhostfc.scsi.alua import HANDLERS as GROUPING
from vhostfc.scsi.alua import Access, AccessState
from vhostfc.scsi.attention import UnitAttentions
from vhostfc.scsi.cdb import COMMANDS, Command
from vhostfc.scsi.copies import Copies
from vhostfc.scsi.extended_copy import HANDLERS as COPYING
from vhostfc.scsi.format_unit import HANDLERS as FORMATTING
from vhostfc.scsi.inquiry import Identity, TargetPort
from vhostfc.scsi.mode import NOTE, ModePages
from vhostfc.scsi.reservations import ReservationConflict, Right
from vhostfc.scsi.sanitize import HANDLERS as SANITIZING
from vhostfc.scsi.sanitize import Sanitizing
from vhostfc.scsi.sense import NO_SENSE, Asc, CheckCondition, Sense, SenseKey, illegal, invalid_cdb
from vhostfc.scsi.server import Inventory, answer_report_luns, check_condition, inquiry_page
from vhostfc.scsi.task import (
    AbortTasks,
    Attribute,
    Effect,
    Fill,
    Flush,
    KeepNote,
    ManageSteps,
    MediumError,
    Nexus,
    ScsiResult,
    ServiceResponse,
    Status,
    Steps,
    TakeTurn,
    Task,
    TaskManagement,
    Withdrawn,
    Write,
)

#: These neither report a pending unit attention condition nor clear it in the common way (SAM-5 5.14).
_NO_ATTENTION = frozenset((fields.INQUIRY.opcode, fields.REPORT_LUNS.opcode, fields.REQUEST_SENSE.opcode))

#: Of reservations, target port groups, copies, SANITIZE and FORMAT UNIT.
_OTHERS: dict[Command, Callable[[LogicalUnit, Command, Task], Steps]] = {
    **RESERVING,
    **GROUPING,
    **COPYING,
    **SANITIZING,
    **FORMATTING,
}

_FAST_READS = (fields.READ_6, fields.READ_10, fields.READ_12, fields.READ_16)
_FAST_FLUSHES = (fields.SYNCHRONIZE_CACHE_10, fields.SYNCHRONIZE_CACHE_16)
_FAST_WRITES = (fields.WRITE_6, fields.WRITE_10, fields.WRITE_12, fields.WRITE_16)


def _mask(*commands: Command) -> bytes:
    bits = sum(1 << command.opcode for command in commands)
    return bits.to_bytes(32, "little")


_MASK_NOTHING = bytes(32)
_MASK_READ_ONLY = _mask(*_FAST_READS)
_MASK_READ = _mask(*_FAST_READS, *_FAST_FLUSHES)
_MASK_ALL = _mask(*_FAST_READS, *_FAST_FLUSHES, *_FAST_WRITES)


class LogicalUnit:
    """A direct access block device (SPC-4, SBC-3), seen by any number of nexuses."""

    def __init__(self, identity: Identity, blocks: int, inventory: Inventory) -> None:
        """blocks: the capacity in logical blocks, at least one."""
        if blocks < 1:
            raise ValueError("a unit has at least one block")
        self.identity = identity
        self.blocks = blocks
        self.mode = ModePages(identity)
        self.attentions = UnitAttentions()
        self.reservations = Reservations()
        self.access = Access()
        self.copies = Copies()
        self.sanitizing = Sanitizing()
        self._inventory = inventory
        self._commands = tuple(one for one in COMMANDS if identity.thin or not one.thin)

    # ------------------------------------------------------------ what the fabric does to the unit

    def attach(self, nexus: Nexus) -> None:
        """A nexus begins: it has a power-on (or, when it comes back, nexus loss) unit attention pending."""
        self.attentions.attach(nexus)

    def succeed(self, before: LogicalUnit) -> None:
        """Take the place of a unit that differs in nothing but whether it is read-only, with all that it holds."""
        self.reservations, self.access, self.sanitizing = before.reservations, before.access, before.sanitizing
        self.mode = before.mode
        self.mode.belong(self.identity)

    def detach(self, nexus: Nexus) -> None:
        """A nexus ends, and with it a RESERVE; registrations stay (SPC-4 5.12.1).

        Its tasks are the caller's to end; what it missed it hears on its return.
        """
        self.reservations.lose(nexus)
        self.copies.forget(nexus)
        self.attentions.detach(nexus)

    def attention(self, asc: Asc, nexuses: Iterable[Nexus] | None = None, but: Nexus | None = None) -> None:
        """Make a unit attention condition pending, once, for these nexuses (None: all) except one."""
        self.attentions.establish(asc, nexuses, but)

    def not_told(self, nexus: Nexus, asc: Asc) -> None:
        """The result with this unit attention condition did not reach the initiator: it is pending again."""
        self.attentions.restore(nexus, asc)

    def resize(self, blocks: int) -> None:
        """The capacity is another: CAPACITY DATA HAS CHANGED for all."""
        if blocks < 1:
            raise ValueError("a unit has at least one block")
        if blocks != self.blocks:
            self.blocks = blocks
            self.attention(Asc.CAPACITY_DATA_HAS_CHANGED)

    def set_ports(self, ports: tuple[TargetPort, ...]) -> None:
        """The target ports that lead to it, in pages 83h and 88h: INQUIRY DATA HAS CHANGED for all."""
        if ports != self.identity.ports:
            self.identity = replace(self.identity, ports=ports)
            self.attention(Asc.INQUIRY_DATA_HAS_CHANGED)

    def set_access(self, states: Mapping[int, AccessState]) -> None:
        """The states that the array gives to all target port groups: ASYMMETRIC ACCESS STATE CHANGED for all, if one of
        those that lead here is concerned."""
        if self.access.give(states) & {port.group for port in self.identity.ports}:
            self.attention(Asc.ASYMMETRIC_ACCESS_STATE_CHANGED)

    def inventory_changed(self) -> None:
        """Units of this target came or went: REPORTED LUNS DATA HAS CHANGED for all."""
        self.attention(Asc.REPORTED_LUNS_DATA_HAS_CHANGED)

    def inventory_reported(self, nexus: Nexus) -> None:
        """This nexus had the inventory from another unit or this one: it knows."""
        self.attentions.clear(nexus, Asc.REPORTED_LUNS_DATA_HAS_CHANGED)

    def verdict(self, nexus: Nexus) -> bytes:
        """The opcodes that the fast path may run now.

        Nothing while a unit attention is pending or the nexus is not attached; no writes while the unit
        is write-protected, nor while WCE is off on a unit with a cache, when each write has to be flushed;
        and nothing that a reservation of others forbids, the state of the target port group, or a SANITIZE.
        """
        right = self.reservations.right(nexus)
        if right is Right.NONE or not self._access_state(nexus).active or self.sanitizing.closed:
            return _MASK_NOTHING
        if not self.attentions.attached(nexus) or self.attentions.pending(nexus):
            return _MASK_NOTHING
        if right is Right.READ:
            return _MASK_READ_ONLY
        flushes = self.identity.write_cache and not self.mode.write_cache
        return _MASK_READ if self.mode.write_protected or flushes else _MASK_ALL

    @property
    def version(self) -> int:
        """Grows with every change of reservations and mode pages, by which a command may have lost its right."""
        return self.reservations.version + self.mode.version

    def allows(self, task: Task) -> bool:
        """Could this command, which is under way, begin now?"""
        try:
            self.check(fields.parse(task.cdb, thin=self.identity.thin), task)
        except (ReservationConflict, CheckCondition):
            return False
        return True

    def _access_state(self, nexus: Nexus) -> AccessState:
        return self.access.state(self.identity.group(nexus.port))

    # ------------------------------------------------------------ task management

    def manage(self, nexus: Nexus, function: TaskManagement) -> ManageSteps:
        """SAM-5 clause 7.  Ends the tasks first, then says so to those who must know."""
        match function:
            case TaskManagement.ABORT_TASK_SET:
                yield AbortTasks(frozenset((nexus,)))
            case TaskManagement.CLEAR_TASK_SET:
                # Others are told with TASK ABORTED, since TAS is set; a unit attention as well is for TAS 0 (SAM-5).
                yield AbortTasks(self.attentions.nexuses | {nexus})
            case TaskManagement.LOGICAL_UNIT_RESET:
                yield AbortTasks(self.attentions.nexuses | {nexus}, reset=True)
                yield from self._reset_mode()
                self.reservations.lose()
                self.copies.clear()
                self.attention(Asc.BUS_DEVICE_RESET_FUNCTION_OCCURRED)
            case _:
                return ServiceResponse.FUNCTION_REJECTED  # CLEAR ACA: NORMACA is 0
        return ServiceResponse.FUNCTION_COMPLETE

    def _reset_mode(self) -> Generator[Effect, object, None]:
        """The saved mode pages are the current ones; a cache that is off with them is emptied before."""
        if not self.mode.switches_off(None):
            self.mode.reset()
            return
        with self.mode.write_through():
            with suppress(MediumError):  # a loss: each nexus hears of it at its next write, which goes to the medium
                yield Flush()
            self.mode.reset()

    # ------------------------------------------------------------ commands

    def execute(self, task: Task) -> Steps:
        """Run one command."""
        effect: Effect | None = None
        doubt: Withdrawn | MediumError | None = None
        try:
            steps = self._start(task)
            answer: object = None
            while True:
                try:
                    effect = steps.throw(doubt) if doubt is not None else steps.send(answer)
                except StopIteration as done:
                    result: ScsiResult = done.value
                    return result
                doubt = None
                try:
                    answer = yield effect
                except (Withdrawn, MediumError) as problem:
                    doubt = problem
        except ReservationConflict:
            return ScsiResult(Status.RESERVATION_CONFLICT)
        except CheckCondition as end:
            sense = end.sense
        except MediumError as error:
            sense = self._medium_sense(error, effect)
        return check_condition(sense, descriptor=self.mode.d_sense)

    @staticmethod
    def _medium_sense(error: MediumError, effect: Effect | None) -> Sense:
        """The medium failed while it did this."""
        if error.space:
            return Sense(SenseKey.DATA_PROTECT, Asc.SPACE_ALLOCATION_FAILED_WRITE_PROTECT, information=error.lba)
        writes = isinstance(effect, Write | Fill | Flush)
        asc = Asc.WRITE_ERROR if writes else Asc.UNRECOVERED_READ_ERROR
        lba = None if isinstance(effect, Flush) else error.lba  # a flush is of no block in particular
        return Sense(SenseKey.MEDIUM_ERROR, asc, information=lba)

    def _start(self, task: Task) -> Steps:
        """Checks that come before any command, then the command."""
        opcode = task.cdb[0] if task.cdb else None
        if opcode not in _NO_ATTENTION and (attention := self.attentions.take(task.nexus)):
            raise CheckCondition(attention)
        if task.attribute == Attribute.ACA:
            raise illegal(Asc.INVALID_MESSAGE_ERROR)  # there is no ACA condition (SAM-5 8.6)
        command = fields.parse(task.cdb, thin=self.identity.thin)
        self.check(command, task)
        if handler := media.HANDLERS.get(command):
            return handler(self, command, task)
        if other := _OTHERS.get(command):
            return other(self, command, task)
        return self._control(command, task)

    def check(self, command: Command, task: Task) -> None:
        """May this command be run for its nexus now?  Raises ReservationConflict or CheckCondition if not."""
        self.access.check(command, self.identity.group(task.nexus.port))
        self.reservations.check(command, task.cdb, task.nexus)
        self.sanitizing.check(command)
        if command.writes and self.mode.write_protected:
            raise CheckCondition(Sense(SenseKey.DATA_PROTECT, Asc.WRITE_PROTECTED))

    def admit(self, nexus: Nexus, *, write: bool) -> None:
        """May this nexus read, or write, blocks now?  Raises as check() does."""
        self.check(fields.WRITE_16 if write else fields.READ_16, Task(nexus, b""))

    def neighbours(self, nexus: Nexus) -> Iterable[LogicalUnit]:
        """The units that this nexus sees through the same target port."""
        return self._inventory.units(nexus)

    def _control(self, command: Command, task: Task) -> Steps:
        """The commands that do not touch the medium; two of them write the cache back."""
        cdb = task.cdb
        data = b""
        told: Asc | None = None
        match command:
            case fields.TEST_UNIT_READY:
                pass
            case fields.INQUIRY:
                data = self._inquiry(task)[: fields.number(cdb, 3, 4)]
            case fields.REPORT_LUNS:
                data = answer_report_luns(self._inventory, task)
            case fields.REQUEST_SENSE:
                attention = self.attentions.take(task.nexus)
                told = attention.asc if attention is not None else None
                sense = attention or self.sanitizing.sense or NO_SENSE
                data = sense.encode(descriptor=bool(cdb[1] & 0x01))[: cdb[4]]
            case fields.READ_CAPACITY_10:
                if not cdb[8] & 0x01 and fields.number(cdb, 2, 5):
                    raise invalid_cdb(2)  # an address without PMI (SBC-2 5.10)
                data = report.read_capacity_10(self.blocks, self.identity.block_size)
            case fields.READ_CAPACITY_16:
                if not cdb[14] & 0x01 and fields.number(cdb, 2, 9):
                    raise invalid_cdb(2)
                data = report.read_capacity_16(self.identity, self.blocks)[: fields.number(cdb, 10, 13)]
            case fields.MODE_SENSE_6:
                data = self.mode.sense(cdb, self.blocks)[: cdb[4]]
            case fields.MODE_SENSE_10:
                data = self.mode.sense(cdb, self.blocks)[: fields.number(cdb, 7, 8)]
            case fields.MODE_SELECT_6 | fields.MODE_SELECT_10:
                yield from self._mode_select(command, task)
            case fields.LOG_SENSE:
                data = report.log_pages(cdb)[: fields.number(cdb, 7, 8)]
            case fields.REPORT_SUPPORTED_OPERATION_CODES:
                data = report.supported_operation_codes(cdb, self._commands)[: fields.number(cdb, 6, 9)]
            case fields.REPORT_SUPPORTED_TASK_MANAGEMENT_FUNCTIONS:
                data = report.supported_task_management(cdb)[: fields.number(cdb, 6, 9)]
            case fields.READ_DEFECT_DATA_10:
                data = report.defect_data_10(cdb)[: fields.number(cdb, 7, 8)]
            case fields.READ_DEFECT_DATA_12:
                data = report.defect_data_12(cdb)[: fields.number(cdb, 6, 9)]
            case fields.START_STOP_UNIT:
                yield from self._start_stop(cdb)
            case fields.PREVENT_ALLOW:
                if cdb[4] & 0x02:
                    raise invalid_cdb(4, 1)  # obsolete, for changers
            case fields.SEND_DIAGNOSTIC:
                _check_diagnostic(cdb)
            case _:
                raise AssertionError(f"{command.name} is in the table and has nobody who runs it")
        return ScsiResult(data_in=data, attention=told)

    def _inquiry(self, task: Task) -> bytes:
        page = inquiry_page(task.cdb)
        if page is None:
            return inquiry.standard(self.identity)
        return inquiry.vital_product_data(self.identity, page, task.nexus.port)

    def _mode_select(self, command: Command, task: Task) -> Steps:
        """Empty a cache that is switched off, keep what is saved, then change the pages and tell the others.

        When one of these cannot be done, nothing has changed.
        """
        yield TakeTurn()
        self.check(command, task)
        mode = self.mode
        wanted = mode.select(task.cdb, task.data_out)
        with nullcontext() if mode.caches(wanted) else mode.write_through():
            if mode.switches_off(wanted):
                yield Flush()
            if mode.saves(wanted):
                mode.in_doubt = not (yield KeepNote(NOTE, mode.note(wanted)))
                if mode.in_doubt:
                    raise CheckCondition(Sense(SenseKey.HARDWARE_ERROR, Asc.INTERNAL_TARGET_FAILURE))
            if mode.take(wanted):
                self.attention(Asc.MODE_PARAMETERS_CHANGED, but=task.nexus)
        return media.GOOD

    @staticmethod
    def _start_stop(cdb: bytes) -> Steps:
        """START STOP UNIT: an array's unit always runs, so START 0 only writes the cache back.

        One guest that shuts down must not stop a unit that others use, nor leave one that firmware,
        which sends no START, cannot boot from.
        """
        if cdb[3]:
            raise invalid_cdb(3, 3)  # POWER CONDITION MODIFIER
        if cdb[4] & 0xF0:
            raise invalid_cdb(4, 7)  # POWER CONDITION: there are none
        if cdb[4] & 0x02:
            raise invalid_cdb(4, 1)  # LOEJ: nothing to load or eject
        if not cdb[4] & 0x05:
            yield Flush()
        return media.GOOD


def _check_diagnostic(cdb: bytes) -> None:
    """SEND DIAGNOSTIC: the default self-test, which always passes, is all there is (SPC-4 6.42)."""
    if cdb[1] & 0xE0:
        raise invalid_cdb(1, 7)  # SELF-TEST CODE
    if fields.number(cdb, 3, 4):
        raise invalid_cdb(3)  # PARAMETER LIST LENGTH: no diagnostic pages
