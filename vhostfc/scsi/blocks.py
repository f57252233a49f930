"""The commands that touch the medium (SBC-3 clause 5): generators of effects, checked before the first one.

Range checks come in one form, "blocks <= capacity and LBA <= capacity - blocks", which cannot wrap.

Data-out.  The task holds what the initiator sent, FCP_DL bytes.  If a command needs more, nothing is
written and the sense is INVALID FIELD IN COMMAND INFORMATION UNIT, one of the answers FCP-4 9.1.2.11
allows (Linux's LIO gives it too): half a WRITE that ends in GOOD would be lost data, since few drivers
look at FCP_RESID_OVER.  If it needs less, what it needs is used and the caller reports the residual;
but WRITE SAME and COMPARE AND WRITE insist on the exact length, since a wrong one means that the two
sides disagree about the block size.  (For COMPARE AND WRITE the field in error is NUMBER OF LOGICAL
BLOCKS: it has one byte, and an initiator that wants 256 blocks sends 0 and the data of 256.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vhostfc.scsi import cdb as fields
from vhostfc.scsi.cdb import Command
from vhostfc.scsi.inquiry import Identity
from vhostfc.scsi.mode import ModePages
from vhostfc.scsi.sense import Asc, CheckCondition, Sense, SenseKey, illegal, invalid_cdb, invalid_parameter
from vhostfc.scsi.task import Extents, Fill, Flush, Hold, Read, ScsiResult, Status, Steps, Task, Write

#: How much a VERIFY reads at once.
_VERIFY_BYTES = 1 << 20
#: How far one GET LBA STATUS looks, in blocks: what it costs must not depend on how fragmented the unit is.
_STATUS_BLOCKS = 1 << 18

GOOD = ScsiResult(Status.GOOD)


class Disk(Protocol):
    """What a media command has to know of its unit."""

    @property
    def identity(self) -> Identity: ...
    @property
    def blocks(self) -> int: ...
    @property
    def mode(self) -> ModePages: ...


Handler = Callable[[Disk, Command, Task], Steps]


# ---------------------------------------------------------------- checks


def _in_range(disk: Disk, lba: int, blocks: int) -> None:
    """SBC-3 4.5.x: also a command for no blocks must start within the medium or right behind it."""
    if blocks > disk.blocks or lba > disk.blocks - blocks:
        raise _out_of_range(max(lba, disk.blocks))


def _out_of_range(first: int) -> CheckCondition:
    """first: the first invalid LBA (SBC-3 4.18.1)."""
    return CheckCondition(Sense(SenseKey.ILLEGAL_REQUEST, Asc.LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE, information=first))


def _unprotected(command: Command, task: Task) -> None:
    """The unit has no protection information (PROTECT 0): the PROTECT field must be zero."""
    if task.cdb[command.flags] & 0xE0:
        raise invalid_cdb(command.flags, 7)


def _length_field(command: Command) -> int:
    """The byte at which TRANSFER LENGTH starts."""
    return {6: 4, 10: 7, 12: 6, 16: 10, 32: 28}[len(command.usage)]


def _transfer(disk: Disk, command: Command, task: Task) -> tuple[int, int]:
    """LBA and blocks of a command that moves them: in range, and within MAXIMUM TRANSFER LENGTH."""
    lba, blocks = fields.extent(command, task.cdb)
    _in_range(disk, lba, blocks)
    if blocks > disk.identity.max_transfer:
        raise invalid_cdb(_length_field(command))
    return lba, blocks


def _data(disk: Disk, task: Task, blocks: int) -> bytes:
    """The data-out of this many blocks."""
    length = blocks * disk.identity.block_size
    if len(task.data_out) < length:
        raise illegal(Asc.INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT)
    return task.data_out[:length]


def _one_block(disk: Disk, task: Task) -> bytes:
    """The data-out, which must be one block and nothing else."""
    if len(task.data_out) != disk.identity.block_size:
        raise illegal(Asc.INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT)
    return task.data_out


def _fua(disk: Disk, command: Command, task: Task) -> bool:
    """The write must be on the medium before GOOD: FUA is set, or the cache is switched off by WCE."""
    asked = len(command.usage) > 6 and bool(task.cdb[command.flags] & 0x08)
    return asked or not disk.mode.write_cache


def _miscompare(at: int) -> CheckCondition:
    return CheckCondition(Sense(SenseKey.MISCOMPARE, Asc.MISCOMPARE_DURING_VERIFY_OPERATION, information=at))


def _difference(one: bytes, other: bytes) -> int:
    """The offset of the first byte that differs; by halves, since byte by byte takes all others' time."""
    low, high = 0, len(one)
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _bytes(answer: object) -> bytes:
    """What a Read is answered with."""
    if not isinstance(answer, bytes | bytearray | memoryview):
        raise TypeError(f"a Read is answered with bytes, not {type(answer).__name__}")
    return bytes(answer)


# ---------------------------------------------------------------- READ, WRITE


def read(disk: Disk, command: Command, task: Task) -> Steps:
    """READ (6, 10, 12, 16, 32)."""
    long = len(command.usage) > 6
    if long:
        _unprotected(command, task)
    lba, blocks = _transfer(disk, command, task)
    if not blocks:
        return GOOD
    data = yield Read(lba, blocks, fua=long and bool(task.cdb[command.flags] & 0x08))
    return ScsiResult(data_in=_bytes(data))


def write(disk: Disk, command: Command, task: Task) -> Steps:
    """WRITE (6, 10, 12, 16, 32)."""
    if len(command.usage) > 6:
        _unprotected(command, task)
    lba, blocks = _transfer(disk, command, task)
    data = _data(disk, task, blocks)
    if blocks:
        yield Write(lba, data, fua=_fua(disk, command, task))
    return GOOD


def write_atomic(disk: Disk, command: Command, task: Task) -> Steps:
    """WRITE ATOMIC(16) (SBC-4): all of it or nothing, also when we are killed or the power goes meanwhile.

    No alignment or granularity is asked for; ATOMIC BOUNDARY must be zero (MAXIMUM ATOMIC BOUNDARY SIZE 0).
    """
    _unprotected(command, task)
    lba, blocks = fields.extent(command, task.cdb)
    _in_range(disk, lba, blocks)
    if fields.number(task.cdb, 10, 11):
        raise invalid_cdb(10)
    if blocks > disk.identity.max_atomic:
        raise invalid_cdb(12)
    data = _data(disk, task, blocks)
    if blocks:
        yield Write(lba, data, fua=True, atomic=True)
    return GOOD


def compare_and_write(disk: Disk, command: Command, task: Task) -> Steps:
    """COMPARE AND WRITE: one step for everybody else, so it holds its range (SBC-3 5.2)."""
    _unprotected(command, task)
    lba, blocks = fields.number(task.cdb, 2, 9), task.cdb[13]
    _in_range(disk, lba, blocks)
    if blocks > disk.identity.max_compare_and_write:
        raise invalid_cdb(13)
    if len(task.data_out) != 2 * blocks * disk.identity.block_size:
        raise invalid_cdb(13)
    if not blocks:
        return GOOD
    half = len(task.data_out) // 2
    expected, new = task.data_out[:half], task.data_out[half:]
    yield Hold(lba, blocks)
    found = _bytes((yield Read(lba, blocks)))
    if found != expected:
        raise _miscompare(_difference(found, expected))
    yield Write(lba, new, fua=_fua(disk, command, task))
    return GOOD


def orwrite(disk: Disk, command: Command, task: Task) -> Steps:
    """ORWRITE(16): the blocks become what they were, or what was sent (SBC-3 5.10)."""
    _unprotected(command, task)
    lba, blocks = _transfer(disk, command, task)
    data = _data(disk, task, blocks)
    if not blocks:
        return GOOD
    yield Hold(lba, blocks)
    found = _bytes((yield Read(lba, blocks)))
    result = int.from_bytes(found, "big") | int.from_bytes(data, "big")
    yield Write(lba, result.to_bytes(len(data), "big"), fua=_fua(disk, command, task))
    return GOOD


# ---------------------------------------------------------------- VERIFY


def verify(disk: Disk, command: Command, task: Task) -> Steps:
    """VERIFY (10, 12, 16, 32): read (BYTCHK 00b), and compare with the data-out (01b) or with its one block (11b)."""
    _unprotected(command, task)
    byte_check = task.cdb[command.flags] >> 1 & 0x03
    if byte_check == 0x02:
        raise invalid_cdb(command.flags, 2)
    lba, blocks = fields.extent(command, task.cdb)
    _in_range(disk, lba, blocks)
    if byte_check == 0x01 and blocks > disk.identity.max_transfer:
        raise invalid_cdb(_length_field(command))
    expected = b""
    if byte_check and blocks:
        expected = _data(disk, task, blocks if byte_check == 0x01 else 1)
    yield from _compare(disk, lba, blocks, expected)
    return GOOD


def _compare(disk: Disk, lba: int, blocks: int, expected: bytes) -> Steps:
    """Read the blocks piece by piece; compare them with `expected`, which is nothing, one block, or all of them."""
    size = disk.identity.block_size
    whole = len(expected) == blocks * size
    piece = max(1, _VERIFY_BYTES // size)
    if whole and blocks > piece:
        yield Hold(lba, blocks)
    for start in range(0, blocks, piece):
        count = min(piece, blocks - start)
        found = _bytes((yield Read(lba + start, count)))
        if not expected:
            continue
        wanted = expected[start * size : (start + count) * size] if whole else expected * count
        if found != wanted:
            raise _miscompare(lba + start + _difference(found, wanted) // size)
    return GOOD


def write_and_verify(disk: Disk, command: Command, task: Task) -> Steps:
    """WRITE AND VERIFY (10, 12, 16, 32): on the medium, then read back; BYTCHK 01b compares (SBC-3 5.36)."""
    _unprotected(command, task)
    byte_check = task.cdb[command.flags] >> 1 & 0x03
    if byte_check > 0x01:
        raise invalid_cdb(command.flags, 2)
    lba, blocks = _transfer(disk, command, task)
    data = _data(disk, task, blocks)
    if not blocks:
        return GOOD
    yield Hold(lba, blocks)
    yield Write(lba, data, fua=True)
    found = _bytes((yield Read(lba, blocks, fua=True)))
    if byte_check and found != data:
        raise _miscompare(lba + _difference(found, data) // disk.identity.block_size)
    return GOOD


# ---------------------------------------------------------------- cache


def synchronize_cache(disk: Disk, command: Command, task: Task) -> Steps:
    """SYNCHRONIZE CACHE (10, 16): all of the cache, whatever the range; IMMED is answered when it is done."""
    _in_range(disk, *fields.extent(command, task.cdb))
    yield Flush()
    return GOOD


def pre_fetch(disk: Disk, command: Command, task: Task) -> Steps:
    """PRE-FETCH (10, 16): nothing to do.  GOOD: not all blocks are known to fit the cache (SBC-3 5.11)."""
    _in_range(disk, *fields.extent(command, task.cdb))
    yield from ()
    return GOOD


# ---------------------------------------------------------------- provisioning


def write_same(disk: Disk, command: Command, task: Task) -> Steps:
    """WRITE SAME (10, 16, 32) with NDOB, UNMAP and ANCHOR (SBC-3 5.41 to 5.43)."""
    _unprotected(command, task)
    flags = task.cdb[command.flags]
    unmap = bool(flags & 0x08)
    if flags & 0x10:
        raise invalid_cdb(command.flags, 4)  # ANCHOR: blocks cannot be anchored (ANC_SUP 0)
    if unmap and not disk.identity.thin:
        raise invalid_cdb(command.flags, 3)
    lba, blocks = fields.extent(command, task.cdb)
    _in_range(disk, lba, blocks)
    if not 0 < blocks <= disk.identity.max_write_same:  # WSNZ
        raise invalid_cdb(_length_field(command))
    zeros = bytes(disk.identity.block_size)
    no_data = len(command.usage) > 10 and bool(flags & 0x01)  # NDOB
    block = zeros if no_data else _one_block(disk, task)
    yield Fill(lba, blocks, block, unmap=unmap and block == zeros)
    if not disk.mode.write_cache:
        yield Flush()
    return GOOD


def unmap(disk: Disk, command: Command, task: Task) -> Steps:
    """UNMAP (SBC-3 5.28): every descriptor is checked before the first block is unmapped."""
    if task.cdb[1] & 0x01:
        raise invalid_cdb(1, 0)  # ANCHOR
    length = fields.number(task.cdb, 7, 8)
    if not length:
        return GOOD
    data = task.data_out[:length]
    if length < 8 or len(data) < length:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    # UNMAP DATA LENGTH may say less than what was sent, never more; a descriptor that is cut off is ignored.
    size = fields.number(data, 2, 3)
    if size > length - 8:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    count = size // 16
    if count > disk.identity.max_unmap_descriptors:
        raise invalid_parameter(2)
    ranges = []
    total = 0
    for at in range(8, 8 + 16 * count, 16):
        lba, blocks = fields.number(data, at, at + 7), fields.number(data, at + 8, at + 11)
        _in_range(disk, lba, blocks)
        total += blocks
        if total > disk.identity.max_unmap:
            raise invalid_parameter(at + 8)
        if blocks:
            ranges.append((lba, blocks))
    zeros = bytes(disk.identity.block_size)
    for lba, blocks in ranges:
        yield Fill(lba, blocks, zeros, unmap=True)
    if ranges and not disk.mode.write_cache:
        yield Flush()
    return GOOD


def get_lba_status(disk: Disk, command: Command, task: Task) -> Steps:
    """GET LBA STATUS (SBC-3 5.6): extents that are mapped (0) or deallocated (1), as many as there is room for."""
    lba, room = fields.number(task.cdb, 2, 9), fields.number(task.cdb, 10, 13)
    if lba >= disk.blocks:
        raise _out_of_range(lba)
    answer = yield Extents(lba, min(disk.blocks - lba, _STATUS_BLOCKS))
    if not isinstance(answer, list | tuple):
        raise TypeError(f"Extents is answered with a list, not {type(answer).__name__}")
    # One descriptor is always there, so that an initiator with little room learns how much it needs.
    answer = answer[: max(1, (room - 8) // 16)]
    body = b"".join(
        start.to_bytes(8, "big") + blocks.to_bytes(4, "big") + bytes([0 if mapped else 1, 0, 0, 0])
        for start, blocks, mapped in answer
    )
    return ScsiResult(data_in=((4 + len(body)).to_bytes(4, "big") + bytes(4) + body)[:room])


#: Which of the functions above runs a command.
HANDLERS: dict[Command, Handler] = {
    **dict.fromkeys((fields.READ_6, fields.READ_10, fields.READ_12, fields.READ_16, fields.READ_32), read),
    **dict.fromkeys((fields.WRITE_6, fields.WRITE_10, fields.WRITE_12, fields.WRITE_16, fields.WRITE_32), write),
    **dict.fromkeys((fields.VERIFY_10, fields.VERIFY_12, fields.VERIFY_16, fields.VERIFY_32), verify),
    **dict.fromkeys(
        (
            fields.WRITE_AND_VERIFY_10,
            fields.WRITE_AND_VERIFY_12,
            fields.WRITE_AND_VERIFY_16,
            fields.WRITE_AND_VERIFY_32,
        ),
        write_and_verify,
    ),
    fields.WRITE_ATOMIC_16: write_atomic,
    **dict.fromkeys((fields.SYNCHRONIZE_CACHE_10, fields.SYNCHRONIZE_CACHE_16), synchronize_cache),
    **dict.fromkeys((fields.PRE_FETCH_10, fields.PRE_FETCH_16), pre_fetch),
    **dict.fromkeys((fields.WRITE_SAME_10, fields.WRITE_SAME_16, fields.WRITE_SAME_32), write_same),
    fields.COMPARE_AND_WRITE: compare_and_write,
    fields.ORWRITE_16: orwrite,
    fields.UNMAP: unmap,
    fields.GET_LBA_STATUS: get_lba_status,
}
