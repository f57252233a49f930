"""SANITIZE: what it wipes, what is served meanwhile, and how a unit is left when it fails."""

from __future__ import annotations

import pytest

from tests.scsi.conftest import ALICE, BOB, Target, describe, target
from vhostfc.scsi.sanitize import resume
from vhostfc.scsi.task import Fill, Flush, KeepNote, ServiceResponse, Task, TaskManagement

IN_PROGRESS, FAILED = "2/04/1B", "3/31/03"
OVERWRITE, BLOCK_ERASE, CRYPTOGRAPHIC_ERASE, EXIT = 0x01, 0x02, 0x03, 0x1F
IMMED, AUSE = 0x80, 0x20


def sanitize(action: int, length: int = 0, *, flags: int = 0) -> bytes:
    return bytes([0x48, flags | action, 0, 0, 0, 0, 0, *length.to_bytes(2, "big"), 0])


def overwrite(pattern: bytes, *, count: int = 1, invert: bool = False, flags: int = 0) -> tuple[bytes, bytes]:
    data = bytes([0x80 * invert | count, 0]) + len(pattern).to_bytes(2, "big") + pattern
    return sanitize(OVERWRITE, len(data), flags=flags), data


def filled(one: Target) -> Target:
    for lba in range(one.medium.blocks):
        one.good(bytes([0x2A, 0, 0, 0, 0, lba, 0, 0, 1, 0]), bytes([lba + 1]) * one.identity.block_size)
    return one


@pytest.mark.parametrize("action", [BLOCK_ERASE, CRYPTOGRAPHIC_ERASE])
def test_an_erasure_leaves_nothing(disk: Target, action: int) -> None:
    filled(disk)
    disk.good(sanitize(action))
    assert not any(disk.medium.data)
    assert not disk.medium.mapped
    assert not disk.medium.notes
    assert disk.good("28 00 00000000 00 0001 00") == bytes(512)


#: Commands allowed during sanitize (SBC-4 4.11.2): who begins meanwhile finds a disk that has a size.
SERVED = (
    *("12 00 00 00 60 00", "4d 00 00 00 00 00 00 00 10 00", "1a 00 3f 00 ff 00", "5a 00 3f 00 00 00 00 00ff 00"),
    *("25 00 00000000 0000 00 00", "9e 10" + "00" * 11 + "20 0000", "a0 00 00 00 00 00 00 00 00 40 00 00"),
    *("a3 0c 00 00 0000 00000100 00 00", "a3 0d 00 00 0000 00000004 00 00"),
)


def test_without_provisioning_there_is_no_block_erase() -> None:
    one = filled(target(thin=False))
    assert one.bad(sanitize(BLOCK_ERASE)) == "5/24/00:c1.4"
    one.good(sanitize(CRYPTOGRAPHIC_ERASE))
    assert not any(one.medium.data)


@pytest.mark.parametrize(("block_size", "pattern"), [(512, b"\xaa" * 512), (512, b"abc"), (4096, b"\x01\x02\x03\x04")])
def test_overwrite_repeats_its_pattern_in_each_block(block_size: int, pattern: bytes) -> None:
    one = filled(target(8, block_size=block_size))
    one.good(*overwrite(pattern))
    assert one.medium.data == (pattern * block_size)[:block_size] * 8


@pytest.mark.parametrize(("count", "first"), [(1, 0x0F), (2, 0xF0), (3, 0x0F), (31, 0x0F)])
def test_overwrite_passes_and_their_inversion(disk: Target, count: int, first: int) -> None:
    """The last pass leaves the pattern itself (SBC-4 5.30.2.2)."""
    disk.good(*overwrite(b"\x0f", count=count, invert=True))
    passes = [effect.block[0] for effect in disk.effects if isinstance(effect, Fill)]
    assert passes == [first ^ (0xFF * (number % 2)) for number in range(count)]
    assert disk.medium.data == b"\x0f" * len(disk.medium.data)


def test_a_parameter_list_that_is_wrong(disk: Target) -> None:
    filled(disk)
    before = bytes(disk.medium.data)
    cdb, data = overwrite(bytes(512))
    for length in (0, 1, 2, 3, 4, 517):
        assert disk.bad(sanitize(OVERWRITE, length), data.ljust(600, b"\0")) == "5/24/00:c7"
    assert disk.bad(cdb, data[:-1]) == "5/24/00:c7", "less came than the CDB says"
    assert disk.bad(cdb, b"\0" + data[1:]) == "5/24/00:c7", "OVERWRITE COUNT 0"
    assert disk.bad(cdb, b"\x21" + data[1:]) == "5/24/00:c7", "TEST"
    assert disk.bad(cdb, data[:2] + b"\0\0" + data[4:]) == "5/24/00:c7", "INITIALIZATION PATTERN LENGTH 0"
    assert disk.bad(cdb, data[:2] + b"\x02\x04" + data[4:]) == "5/24/00:c7", "longer than a block"
    for action in (BLOCK_ERASE, CRYPTOGRAPHIC_ERASE, EXIT):
        assert disk.bad(sanitize(action, 8), bytes(8)) == "5/24/00:c7"
    assert disk.bad(sanitize(BLOCK_ERASE, flags=0x40)) == "5/24/00:c1.6", "ZNR is for zones"
    assert disk.bad(sanitize(0x04)) == "5/24/00:c1.4"
    assert bytes(disk.medium.data) == before
    assert not disk.medium.notes


def test_a_write_protected_unit_and_a_reserved_one_refuse() -> None:
    protected = target(read_only=True)
    for cdb, data in (overwrite(bytes(512)), (sanitize(BLOCK_ERASE), b""), (sanitize(CRYPTOGRAPHIC_ERASE), b"")):
        assert protected.bad(cdb, data) == "7/27/00"
    disk = target()
    disk.good("16 00 00 00 00 00", nexus=BOB)
    assert disk.send(sanitize(BLOCK_ERASE)).status == 0x18


def test_while_it_goes_on(disk: Target) -> None:
    filled(disk)
    assert disk.good(sanitize(BLOCK_ERASE, flags=IMMED)) == b""
    assert list(disk.medium.notes) == ["sanitize"]
    assert any(disk.medium.data), "GOOD came before anything was done"
    for nexus in (ALICE, BOB):
        assert disk.unit.verdict(nexus) == bytes(32), "nobody's I/O may touch the medium"
        for cdb in ("00 00 00 00 00 00", "1b 00 00 00 01 00", "28 00 00000000 00 0001 00", sanitize(BLOCK_ERASE)):
            assert disk.bad(cdb, nexus=nexus).startswith(IN_PROGRESS)
    for cdb in SERVED:
        disk.good(cdb)
    disk.go_on(1)
    assert isinstance(disk.effects[-1], Flush), "what was under way comes before the first block"
    disk.go_on()
    assert not any(disk.medium.data)
    disk.good("00 00 00 00 00 00")
    assert any(disk.unit.verdict(ALICE))


def test_progress_is_told() -> None:
    one = target(4096)
    one.good(*overwrite(b"\x55", flags=IMMED))
    assert one.bad("00 00 00 00 00 00") == f"{IN_PROGRESS}:p0"
    one.go_on(3)
    assert describe(one.good("03 00 00 00 12 00")) == f"{IN_PROGRESS}:p32768", "half of the blocks"
    one.go_on()
    assert describe(one.good("03 00 00 00 12 00")) == "0/00/00"


def test_resets_and_a_lost_nexus_do_not_end_it(disk: Target) -> None:
    filled(disk)
    disk.good(sanitize(BLOCK_ERASE, flags=IMMED))
    for function in (TaskManagement.ABORT_TASK_SET, TaskManagement.LOGICAL_UNIT_RESET):
        assert disk.manage(function) is ServiceResponse.FUNCTION_COMPLETE
    disk.unit.detach(ALICE)
    disk.unit.attach(ALICE)
    for _ in range(2):  # bus device reset, I_T nexus loss
        assert disk.bad("00 00 00 00 00 00").startswith("6/29")
    assert disk.bad("00 00 00 00 00 00").startswith(IN_PROGRESS)
    disk.go_on()
    assert not any(disk.medium.data)


def test_a_command_that_is_aborted_before_it_began_leaves_the_unit_open(disk: Target) -> None:
    steps = disk.unit.execute(Task(ALICE, sanitize(BLOCK_ERASE)))
    assert isinstance(next(steps), KeepNote)
    steps.close()
    disk.good("00 00 00 00 00 00")


@pytest.mark.parametrize("flags", [0, AUSE])
def test_one_that_fails_closes_the_unit(disk: Target, flags: int) -> None:
    filled(disk)
    disk.medium.broken.add(40)
    assert disk.bad(sanitize(CRYPTOGRAPHIC_ERASE, flags=flags)) == FAILED
    assert disk.unit.verdict(ALICE) == bytes(32)
    assert disk.bad("28 00 00000000 00 0001 00") == FAILED
    assert describe(disk.good("03 00 00 00 12 00")) == FAILED
    for cdb in SERVED:
        disk.good(cdb)
    if flags:
        disk.good(sanitize(EXIT))
        assert not disk.medium.notes
    else:
        assert disk.bad(sanitize(EXIT)) == "5/24/00:c1.4"
        disk.medium.broken.clear()
        disk.good(sanitize(BLOCK_ERASE))
    disk.good("28 00 00000000 00 0001 00")
    disk.good(sanitize(EXIT))


def test_none_begins_while_another_is_left(disk: Target) -> None:
    """Else the one's note could be removed with the other's."""
    disk.medium.broken.add(40)
    assert disk.bad(sanitize(BLOCK_ERASE, flags=AUSE)) == FAILED
    leaving = disk.unit.execute(Task(ALICE, sanitize(EXIT)))
    assert isinstance(next(leaving), KeepNote)
    assert disk.bad(sanitize(BLOCK_ERASE), nexus=BOB).startswith(IN_PROGRESS)
    leaving.close()
    assert disk.bad("00 00 00 00 00 00") == FAILED
    disk.good(sanitize(EXIT))
    disk.good("00 00 00 00 00 00")


def test_nothing_is_changed_without_a_note_on_stable_storage(disk: Target) -> None:
    filled(disk)
    disk.medium.forgetful = True
    assert disk.bad(sanitize(BLOCK_ERASE)) == "4/44/00"
    assert all(disk.medium.data[::512])
    disk.good("00 00 00 00 00 00")


def after_a_crash(disk: Target, *, read_only: bool = False) -> Target:
    """The same unit in a next life: its blocks and what was noted are there, all else is new."""
    again = target(disk.medium.blocks, read_only=read_only)
    again.medium = disk.medium
    again.unit.sanitizing.found(disk.medium.notes["sanitize"])
    if steps := resume(again.unit):
        again.waiting.append(steps)
    return again


@pytest.mark.parametrize("flags", [0, AUSE])
def test_a_crash_suspends_it(flags: int) -> None:
    disk = filled(target())
    disk.good(*overwrite(b"\x0f\x1e", count=2, invert=True, flags=IMMED | flags))
    disk.go_on(1)
    again = after_a_crash(disk)
    assert again.bad("00 00 00 00 00 00").startswith(IN_PROGRESS)
    assert again.unit.verdict(ALICE) == bytes(32)
    again.go_on()
    assert disk.medium.data == b"\x0f\x1e" * 256 * 64, "the second pass"
    again.good("00 00 00 00 00 00")
    assert not disk.medium.notes


@pytest.mark.parametrize("flags", [0, AUSE])
def test_a_crash_does_not_make_good_what_had_failed(disk: Target, flags: int) -> None:
    filled(disk)
    disk.medium.broken.add(40)
    assert disk.bad(sanitize(CRYPTOGRAPHIC_ERASE, flags=flags)) == FAILED
    again = after_a_crash(disk)
    assert not again.waiting
    assert again.bad("28 00 00000000 00 0001 00") == FAILED
    if flags:
        again.good(sanitize(EXIT))
    else:
        assert again.bad(sanitize(EXIT)) == "5/24/00:c1.4"


def test_what_cannot_go_on_has_failed(disk: Target) -> None:
    """The unit is read-only by now, or nobody knows any more what was to be done."""
    disk.good(sanitize(CRYPTOGRAPHIC_ERASE, flags=IMMED))
    again = after_a_crash(disk, read_only=True)
    assert not again.waiting
    assert again.bad("28 00 00000000 00 0001 00") == FAILED
    for note in (b"", b"restricted\n", b'{"version": 2}', b'{"version": 1}', b"[]"):
        disk.medium.notes["sanitize"] = note
        again = after_a_crash(disk)
        assert not again.waiting
        assert again.bad("28 00 00000000 00 0001 00") == FAILED
        assert again.bad(sanitize(EXIT)) == "5/24/00:c1.4"


def test_a_restricted_failure_has_no_way_out_by_an_unrestricted_one(disk: Target) -> None:
    """Else AUSE and EXIT FAILURE MODE would give back what a restricted one was to hide."""
    disk.medium.broken.add(40)
    assert disk.bad(sanitize(CRYPTOGRAPHIC_ERASE)) == FAILED
    assert disk.bad(sanitize(CRYPTOGRAPHIC_ERASE, flags=AUSE)) == "5/24/00:c1.5"
    assert disk.bad(sanitize(EXIT)) == "5/24/00:c1.4"
    assert disk.bad(sanitize(CRYPTOGRAPHIC_ERASE)) == FAILED
    disk.medium.broken.clear()
    disk.good(sanitize(CRYPTOGRAPHIC_ERASE))
    disk.good(sanitize(CRYPTOGRAPHIC_ERASE, flags=AUSE))
