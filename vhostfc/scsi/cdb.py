"""Command descriptor blocks: one table of all that a disk here understands, and the fields in them.

The table feeds both the parser and REPORT SUPPORTED OPERATION CODES, so what is reported is what is
done.  Of each command it has the CDB usage data (SPC-4 6.35.3: a bit is one when the device server
looks at it) and the bits that it lets pass without looking: obsolete fields that initiators still
fill in, and the hint GROUP NUMBER.  Any other bit that is set is an INVALID FIELD IN CDB whose
field pointer names it.  That is stricter than the standard asks for reserved bits (SPC-4 4.2.5.1
leaves it open), and it is how a misunderstood command is kept from doing something else.  NACA in the
CONTROL byte is such a bit: there is no ACA here (NORMACA 0).
"""

from __future__ import annotations

from dataclasses import dataclass

from vhostfc.scsi.sense import Asc, illegal, invalid_cdb

#: CONTROL byte, vendor specific: a REPORT LUNS with it leaves a pending REPORTED LUNS DATA HAS CHANGED alone.
KEEP_ATTENTION = 0x80


#: The opcode of all CDBs of 32 bytes (SPC-4 4.2.3), and what their ADDITIONAL CDB LENGTH is.
VARIABLE_LENGTH, ADDITIONAL_CDB_LENGTH = 0x7F, 0x18


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the table.

    usage: CDB usage data, as long as the CDB, opcode and service action as they are.
    ignored: bits, from byte 1 on, that may be set and mean nothing here.
    service_action: the value in bits 4..0 of byte 1 (SPC-4 4.2.2.1), for opcodes that have one; in a CDB of
    32 bytes, in bytes 8 and 9 (4.2.3).
    writes: changes the medium, so a write-protected unit refuses it.
    thin: only for units with logical block provisioning.
    seconds: nominal and recommended timeout (SPC-4 6.35.4).
    """

    name: str
    usage: bytes
    ignored: bytes
    service_action: int | None = None
    writes: bool = False
    thin: bool = False
    seconds: tuple[int, int] = (1, 30)

    @property
    def opcode(self) -> int:
        return self.usage[0]

    @property
    def flags(self) -> int:
        """The byte with the PROTECT field, DPO, FUA, BYTCHK, UNMAP and the like, of a media command."""
        return 10 if self.opcode == VARIABLE_LENGTH else 1

    def check(self, cdb: bytes) -> None:
        """Raises CheckCondition unless every bit that is set is known; bytes beyond the CDB's length are padding."""
        if len(cdb) < len(self.usage):
            raise invalid_cdb(len(cdb))
        for i in range(1, len(self.usage)):
            allowed = self.usage[i] | self.ignored[i]
            if wrong := cdb[i] & ~allowed:
                raise invalid_cdb(i, wrong.bit_length() - 1)


def _command(
    name: str,
    usage: str,
    ignored: str = "",
    service_action: int | None = None,
    *,
    writes: bool = False,
    thin: bool = False,
    seconds: tuple[int, int] = (1, 30),
) -> Command:
    """usage and ignored in hexadecimal; the two vendor-specific bits of CONTROL pass everywhere."""
    bits = bytes.fromhex(usage)
    passing = bytearray(bytes.fromhex(ignored).ljust(len(bits), b"\0"))
    passing[-1] |= 0xC0
    return Command(name, bits, bytes(passing), service_action, writes, thin, seconds)


def _sanitize(name: str, action: int, *, thin: bool = False) -> Command:
    usage = f"48 {0xA0 | action:02x} 00 00 00 00 00 ff ff 00"
    return _command(f"SANITIZE, {name}", usage, service_action=action, writes=True, thin=thin, seconds=(1, 3600))


def _long(
    name: str, action: int, flags: str, passing: str, *, writes: bool, seconds: tuple[int, int] = (1, 30)
) -> Command:
    """A command of 32 bytes (SBC-3 5.11, 5.31, 5.35, 5.38, 5.42).

    Bytes 20 to 27 are for protection information, which there is none of; CONTROL is byte 1, GROUP NUMBER byte 6.
    """
    usage = bytes.fromhex(f"7f 00 00000000 00 18 {action:04x} {flags} 00" + "ff" * 8 + "00" * 8 + "ff" * 4)
    ignored = bytes.fromhex(f"00 c0 00000000 1f 00 0000 {passing} 00" + "00" * 8 + "ff" * 8 + "00" * 4)
    return Command(name, usage, ignored, action, writes, seconds=seconds)


# Byte 1, bits 7..5, was the LUN up to SCSI-2; edk2 still sends it in commands that find a disk ("00e0").
# Byte 6 (10-byte) and byte 14 (16-byte), bits 4..0: GROUP NUMBER, a hint.  Byte 1, bits 1 and 0 of the
# media commands: FUA_NV and RELADR, obsolete.
TEST_UNIT_READY = _command("TEST UNIT READY", "00 00 00 00 00 00", "00 e0")
REQUEST_SENSE = _command("REQUEST SENSE", "03 01 00 00 ff 00", "00 e0")
FORMAT_UNIT = _command("FORMAT UNIT", "04 ff 00 00 00 00", "00 00 ff ff 00", writes=True, seconds=(1, 3600))
READ_6 = _command("READ(6)", "08 1f ff ff ff 00", "00 e0")
WRITE_6 = _command("WRITE(6)", "0a 1f ff ff ff 00", "00 e0", writes=True)
INQUIRY = _command("INQUIRY", "12 01 ff ff ff 00", "00 e0")
RESERVE_6 = _command("RESERVE(6)", "16 00 00 00 00 00", "00 ff ff ff ff")
RELEASE_6 = _command("RELEASE(6)", "17 00 00 00 00 00", "00 ff ff ff ff")
MODE_SELECT_6 = _command("MODE SELECT(6)", "15 11 00 00 ff 00", "00 e0")
MODE_SENSE_6 = _command("MODE SENSE(6)", "1a 08 ff ff ff 00", "00 e0")
START_STOP_UNIT = _command("START STOP UNIT", "1b 01 00 0f f7 00", "00 e0", seconds=(1, 60))
SEND_DIAGNOSTIC = _command("SEND DIAGNOSTIC", "1d f7 00 ff ff 00")
PREVENT_ALLOW = _command("PREVENT ALLOW MEDIUM REMOVAL", "1e 00 00 00 03 00", "00 e0")
READ_CAPACITY_10 = _command("READ CAPACITY(10)", "25 00 ff ff ff ff 00 00 01 00", "00 e1")
READ_10 = _command("READ(10)", "28 f8 ff ff ff ff 00 ff ff 00", "00 03 00 00 00 00 1f")
WRITE_10 = _command("WRITE(10)", "2a f8 ff ff ff ff 00 ff ff 00", "00 03 00 00 00 00 1f", writes=True)
WRITE_AND_VERIFY_10 = _command(
    "WRITE AND VERIFY(10)", "2e f6 ff ff ff ff 00 ff ff 00", "00 01 00 00 00 00 1f", writes=True
)
VERIFY_10 = _command("VERIFY(10)", "2f f6 ff ff ff ff 00 ff ff 00", "00 01 00 00 00 00 1f", seconds=(1, 300))
PRE_FETCH_10 = _command("PRE-FETCH(10)", "34 02 ff ff ff ff 00 ff ff 00", "00 01 00 00 00 00 1f")
SYNCHRONIZE_CACHE_10 = _command(
    "SYNCHRONIZE CACHE(10)", "35 02 ff ff ff ff 00 ff ff 00", "00 05 00 00 00 00 1f", seconds=(1, 60)
)
READ_DEFECT_DATA_10 = _command("READ DEFECT DATA(10)", "37 00 1f 00 00 00 00 ff ff 00")
WRITE_SAME_10 = _command("WRITE SAME(10)", "41 f8 ff ff ff ff 00 ff ff 00", "00 01 00 00 00 00 1f", writes=True)
SANITIZE_OVERWRITE = _sanitize("OVERWRITE", 0x01)
SANITIZE_BLOCK_ERASE = _sanitize("BLOCK ERASE", 0x02, thin=True)
SANITIZE_CRYPTOGRAPHIC_ERASE = _sanitize("CRYPTOGRAPHIC ERASE", 0x03)
SANITIZE_EXIT_FAILURE_MODE = _sanitize("EXIT FAILURE MODE", 0x1F)
SANITIZES = (SANITIZE_OVERWRITE, SANITIZE_BLOCK_ERASE, SANITIZE_CRYPTOGRAPHIC_ERASE, SANITIZE_EXIT_FAILURE_MODE)
UNMAP = _command("UNMAP", "42 01 00 00 00 00 00 ff ff 00", "00 00 00 00 00 00 1f", writes=True, thin=True)
LOG_SENSE = _command("LOG SENSE", "4d 01 ff ff 00 00 00 ff ff 00")
MODE_SELECT_10 = _command("MODE SELECT(10)", "55 11 00 00 00 00 00 ff ff 00", "00 e0")
RESERVE_10 = _command("RESERVE(10)", "56 00 00 00 00 00 00 00 00 00", "00 ff ff ff ff ff ff ff ff")
RELEASE_10 = _command("RELEASE(10)", "57 00 00 00 00 00 00 00 00 00", "00 ff ff ff ff ff ff ff ff")
MODE_SENSE_10 = _command("MODE SENSE(10)", "5a 18 ff ff 00 00 00 ff ff 00", "00 e0")


def _reserve_in(name: str, action: int) -> Command:
    usage = f"5e {action:02x} 00 00 00 00 00 ff ff 00"
    return _command(f"PERSISTENT RESERVE IN, {name}", usage, service_action=action)


def _reserve_out(name: str, action: int, *, typed: bool = False) -> Command:
    """typed: SCOPE and TYPE count; elsewhere they are passed over."""
    usage = f"5f {action:02x} {'ff' if typed else '00'} 00 00 ff ff ff ff 00"
    return _command(f"PERSISTENT RESERVE OUT, {name}", usage, "00 00 ff", service_action=action)


READ_KEYS = _reserve_in("READ KEYS", 0x00)
READ_RESERVATION = _reserve_in("READ RESERVATION", 0x01)
REPORT_CAPABILITIES = _reserve_in("REPORT CAPABILITIES", 0x02)
READ_FULL_STATUS = _reserve_in("READ FULL STATUS", 0x03)
REGISTER = _reserve_out("REGISTER", 0x00)
RESERVE = _reserve_out("RESERVE", 0x01, typed=True)
RELEASE = _reserve_out("RELEASE", 0x02, typed=True)
CLEAR = _reserve_out("CLEAR", 0x03)
PREEMPT = _reserve_out("PREEMPT", 0x04, typed=True)
PREEMPT_AND_ABORT = _reserve_out("PREEMPT AND ABORT", 0x05, typed=True)
REGISTER_AND_IGNORE_EXISTING_KEY = _reserve_out("REGISTER AND IGNORE EXISTING KEY", 0x06)
REGISTER_AND_MOVE = _reserve_out("REGISTER AND MOVE", 0x07)
PERSISTENT_RESERVES_IN = (READ_KEYS, READ_RESERVATION, REPORT_CAPABILITIES, READ_FULL_STATUS)
PERSISTENT_RESERVES_OUT = (
    *(REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT),
    *(REGISTER_AND_IGNORE_EXISTING_KEY, REGISTER_AND_MOVE),
)
EXTENDED_COPY = _command(
    "EXTENDED COPY(LID1)", "83 00" + "00" * 8 + "ffffffff 00 00", service_action=0x00, seconds=(1, 300)
)
RECEIVE_COPY_STATUS = _command(
    "RECEIVE COPY STATUS(LID1)", "84 00 ff" + "00" * 7 + "ffffffff 00 00", service_action=0x00
)
RECEIVE_COPY_OPERATING_PARAMETERS = _command(
    "RECEIVE COPY OPERATING PARAMETERS", "84 03" + "00" * 8 + "ffffffff 00 00", "00 00 ff", service_action=0x03
)
RECEIVE_COPY_FAILURE_DETAILS = _command(
    "RECEIVE COPY FAILURE DETAILS(LID1)", "84 04 ff" + "00" * 7 + "ffffffff 00 00", service_action=0x04
)
READ_16 = _command("READ(16)", "88 f8" + "ff" * 12 + "00 00", "00 03" + "00" * 12 + "1f")
COMPARE_AND_WRITE = _command(
    "COMPARE AND WRITE", "89 f8" + "ff" * 8 + "000000 ff 00 00", "00 02" + "00" * 12 + "1f", writes=True
)
WRITE_16 = _command("WRITE(16)", "8a f8" + "ff" * 12 + "00 00", "00 03" + "00" * 12 + "1f", writes=True)
ORWRITE_16 = _command("ORWRITE(16)", "8b f8" + "ff" * 12 + "00 00", "00 02" + "00" * 12 + "1f", writes=True)
WRITE_AND_VERIFY_16 = _command("WRITE AND VERIFY(16)", "8e f6" + "ff" * 12 + "00 00", "00" * 14 + "1f", writes=True)
VERIFY_16 = _command("VERIFY(16)", "8f f6" + "ff" * 12 + "00 00", "00" * 14 + "1f", seconds=(1, 300))
PRE_FETCH_16 = _command("PRE-FETCH(16)", "90 02" + "ff" * 12 + "00 00", "00" * 14 + "1f")
SYNCHRONIZE_CACHE_16 = _command(
    "SYNCHRONIZE CACHE(16)", "91 02" + "ff" * 12 + "00 00", "00 04" + "00" * 12 + "1f", seconds=(1, 60)
)
WRITE_ATOMIC_16 = _command("WRITE ATOMIC(16)", "9c f8" + "ff" * 12 + "00 00", "00" * 14 + "1f", writes=True)
READ_32 = _long("READ(32)", 0x0009, "f8", "03", writes=False)
VERIFY_32 = _long("VERIFY(32)", 0x000A, "f6", "00", writes=False, seconds=(1, 300))
WRITE_32 = _long("WRITE(32)", 0x000B, "f8", "03", writes=True)
WRITE_AND_VERIFY_32 = _long("WRITE AND VERIFY(32)", 0x000C, "f6", "00", writes=True)
WRITE_SAME_32 = _long("WRITE SAME(32)", 0x000D, "f9", "00", writes=True)
WRITE_SAME_16 = _command("WRITE SAME(16)", "93 f9" + "ff" * 12 + "00 00", "00" * 14 + "1f", writes=True)
READ_CAPACITY_16 = _command("READ CAPACITY(16)", "9e 10" + "ff" * 12 + "01 00", service_action=0x10)
GET_LBA_STATUS = _command("GET LBA STATUS", "9e 12" + "ff" * 12 + "00 00", service_action=0x12, thin=True)
REPORT_LUNS = _command("REPORT LUNS", "a0 00 ff 00 00 00 ff ff ff ff 00 80")
REPORT_TARGET_PORT_GROUPS = _command(
    "REPORT TARGET PORT GROUPS", "a3 ea 00 00 00 00 ff ff ff ff 00 00", service_action=0x0A
)
REPORT_SUPPORTED_OPERATION_CODES = _command(
    "REPORT SUPPORTED OPERATION CODES", "a3 0c 87 ff ff ff ff ff ff ff 00 00", service_action=0x0C
)
REPORT_SUPPORTED_TASK_MANAGEMENT_FUNCTIONS = _command(
    "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS", "a3 0d 80 00 00 00 ff ff ff ff 00 00", service_action=0x0D
)
SET_TARGET_PORT_GROUPS = _command("SET TARGET PORT GROUPS", "a4 0a 00 00 00 00 ff ff ff ff 00 00", service_action=0x0A)
READ_12 = _command("READ(12)", "a8 f8" + "ff" * 8 + "00 00", "00 03" + "00" * 8 + "1f")
WRITE_12 = _command("WRITE(12)", "aa f8" + "ff" * 8 + "00 00", "00 03" + "00" * 8 + "1f", writes=True)
WRITE_AND_VERIFY_12 = _command(
    "WRITE AND VERIFY(12)", "ae f6" + "ff" * 8 + "00 00", "00 01" + "00" * 8 + "1f", writes=True
)
VERIFY_12 = _command("VERIFY(12)", "af f6" + "ff" * 8 + "00 00", "00 01" + "00" * 8 + "1f", seconds=(1, 300))
READ_DEFECT_DATA_12 = _command("READ DEFECT DATA(12)", "b7 1f 00 00 00 00 ff ff ff ff 00 00")

#: All of them, in the order of opcode and service action.
COMMANDS = tuple(
    sorted(
        (value for value in list(globals().values()) if isinstance(value, Command)),
        key=lambda command: (command.opcode, command.service_action or 0),
    )
)
#: Opcodes that are told apart by a service action.
SERVICE_ACTION_OPCODES = frozenset(command.opcode for command in COMMANDS if command.service_action is not None)

_BY_CODE = {(command.opcode, command.service_action): command for command in COMMANDS}


def find(opcode: int, service_action: int | None) -> Command | None:
    """The command with this opcode, and this service action if the opcode has any."""
    return _BY_CODE.get((opcode, service_action))


def parse(cdb: bytes, *, thin: bool = True) -> Command:
    """The command in a CDB, every set bit of it known.  Raises CheckCondition.

    An opcode that is not in the table is INVALID COMMAND OPERATION CODE, a service action that is not,
    an INVALID FIELD IN CDB (SPC-4 4.2.5.1, 6.35).  thin: the unit has logical block provisioning.
    """
    command = known(cdb)
    if command is None or (command.thin and not thin):
        if cdb and cdb[0] == VARIABLE_LENGTH:
            raise invalid_cdb(8, 7)
        has_action = len(cdb) > 1 and cdb[0] in SERVICE_ACTION_OPCODES
        raise invalid_cdb(1, 4) if has_action else illegal(Asc.INVALID_COMMAND_OPERATION_CODE)
    if command.opcode == VARIABLE_LENGTH and cdb[7] != ADDITIONAL_CDB_LENGTH:
        raise invalid_cdb(7)
    command.check(cdb)
    return command


def known(cdb: bytes) -> Command | None:
    """The command that a CDB is of, by its opcode and service action; nothing else is looked at."""
    if not cdb:
        return None
    if cdb[0] == VARIABLE_LENGTH:
        return find(VARIABLE_LENGTH, number(cdb, 8, 9)) if len(cdb) >= 10 else None
    has_action = cdb[0] in SERVICE_ACTION_OPCODES and len(cdb) > 1
    return find(cdb[0], cdb[1] & 0x1F if has_action else None)


def number(cdb: bytes, start: int, end: int) -> int:
    """The big-endian number in bytes start..end, the last one included, as the standards count."""
    return int.from_bytes(cdb[start : end + 1], "big")


def extent(command: Command, cdb: bytes) -> tuple[int, int]:
    """(LBA, number of blocks) of a media command, by the length of its CDB (SPC-4 4.2.2)."""
    if command == WRITE_ATOMIC_16:  # bytes 10 and 11 are ATOMIC BOUNDARY
        return number(cdb, 2, 9), number(cdb, 12, 13)
    match len(command.usage):
        case 6:
            return number(cdb, 1, 3) & 0x1FFFFF, cdb[4] or 256
        case 10:
            return number(cdb, 2, 5), number(cdb, 7, 8)
        case 12:
            return number(cdb, 2, 5), number(cdb, 6, 9)
        case 32:
            return number(cdb, 12, 19), number(cdb, 28, 31)
        case _:
            return number(cdb, 2, 9), number(cdb, 10, 13)


#: Commands whose data-out is a parameter list, and the bytes that hold its length.
_LISTS = {
    MODE_SELECT_6: (4, 4),
    MODE_SELECT_10: (7, 8),
    SANITIZE_OVERWRITE: (7, 8),
    UNMAP: (7, 8),
    EXTENDED_COPY: (10, 13),
    SET_TARGET_PORT_GROUPS: (6, 9),
    **dict.fromkeys(PERSISTENT_RESERVES_OUT, (5, 8)),
}
#: Commands that bring a block for each that they name.
_FULL = frozenset(
    (
        *(WRITE_6, WRITE_10, WRITE_12, WRITE_16, WRITE_32, WRITE_ATOMIC_16, ORWRITE_16),
        *(WRITE_AND_VERIFY_10, WRITE_AND_VERIFY_12, WRITE_AND_VERIFY_16, WRITE_AND_VERIFY_32),
    )
)
_SAME = frozenset((WRITE_SAME_10, WRITE_SAME_16, WRITE_SAME_32))
_VERIFY = frozenset((VERIFY_10, VERIFY_12, VERIFY_16, VERIFY_32))


def data_out_length(cdb: bytes, block_size: int) -> int | None:
    """Bytes of data-out that a command has a use for; None when its CDB does not say so, or is of no command."""
    command = known(cdb)
    if command is None or command == FORMAT_UNIT or len(cdb) < len(command.usage):
        return None
    flags = cdb[command.flags]
    if command in _LISTS:
        return number(cdb, *_LISTS[command])
    if command in _FULL:
        return extent(command, cdb)[1] * block_size
    if command == COMPARE_AND_WRITE:
        return 2 * cdb[13] * block_size
    if command in _SAME:
        no_data = command != WRITE_SAME_10 and flags & 0x01  # NDOB
        return 0 if no_data else block_size
    if command in _VERIFY and flags & 0x02:  # BYTCHK 01b, 11b
        blocks = extent(command, cdb)[1]
        return min(blocks, 1) * block_size if flags & 0x04 else blocks * block_size
    return 0
