"""The commands that touch the medium: what they do, what they refuse, and what they ask of the runner."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scsi.conftest import ALICE, Target, describe, target
from vhostfc.scsi.task import Extents, Fill, Flush, Hold, MediumError, Read, Task, Write

A, B, C = (bytes([letter]) * 512 for letter in b"ABC")
ZEROS = bytes(512)
WRONG_LENGTH = "5/0E/03"


def out_of_range(first: int) -> str:
    """The sense for this first invalid LBA, which fixed format has no room for from 32 bits on (SBC-3 4.18.1)."""
    return f"5/21/00@{first:X}" if first < 1 << 32 else "5/21/00"


def rw(opcode: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    """A READ, WRITE, VERIFY... CDB of the length that the opcode has."""
    match opcode >> 5:
        case 0:
            return bytes([opcode, *lba.to_bytes(3, "big"), blocks & 0xFF, 0])
        case 1 | 2:
            return bytes([opcode, flags, *lba.to_bytes(4, "big"), 0, *blocks.to_bytes(2, "big"), 0])
        case 5:
            return bytes([opcode, flags, *lba.to_bytes(4, "big"), *blocks.to_bytes(4, "big"), 0, 0])
        case _:
            return bytes([opcode, flags, *lba.to_bytes(8, "big"), *blocks.to_bytes(4, "big"), 0, 0])


def unmap(*ranges: tuple[int, int]) -> tuple[bytes, bytes]:
    """CDB and parameter list of an UNMAP."""
    size = 16 * len(ranges)
    data = (size + 6).to_bytes(2, "big") + size.to_bytes(2, "big") + bytes(4)
    for lba, blocks in ranges:
        data += lba.to_bytes(8, "big") + blocks.to_bytes(4, "big") + bytes(4)
    return bytes([0x42, 0, 0, 0, 0, 0, 0, *len(data).to_bytes(2, "big"), 0]), data


# ---------------------------------------------------------------- READ, WRITE


@pytest.mark.parametrize(("write", "read"), [(0x0A, 0x08), (0x2A, 0x28), (0xAA, 0xA8), (0x8A, 0x88)])
def test_what_is_written_is_read_back(disk: Target, write: int, read: int) -> None:
    disk.good(rw(write, 62, 2), A + B)
    assert disk.effects == [Write(62, A + B)]

    assert disk.good(rw(read, 61, 3)) == ZEROS + A + B
    assert disk.effects == [Read(61, 3)]


def test_read_10_byte_by_byte(disk: Target) -> None:
    disk.medium.data[512:1024] = A

    assert (
        disk.good(
            bytes(
                [
                    0x28,  # READ(10)
                    0x08,  # FUA
                    *(0x00, 0x00, 0x00, 0x01),  # LOGICAL BLOCK ADDRESS
                    0x1F,  # GROUP NUMBER
                    *(0x00, 0x01),  # TRANSFER LENGTH
                    0xC0,  # CONTROL, vendor specific
                ]
            )
        )
        == A
    )
    assert disk.effects == [Read(1, 1, fua=True)]


def test_six_byte_commands_count_0_as_256_and_have_21_bits_of_address() -> None:
    one = target(blocks=300)

    one.good(rw(0x0A, 0, 0), A * 256)
    assert one.effects == [Write(0, A * 256)]
    assert one.bad(rw(0x08, 45, 0)) == out_of_range(300)
    assert one.bad("08 1f ff ff 01 00") == out_of_range(0x1FFFFF)
    assert one.good("08 e0 00 00 01 00") == A  # the LUN of SCSI-2


@pytest.mark.parametrize("flags", [0x08, 0x18])
@pytest.mark.parametrize("opcode", [0x2A, 0xAA, 0x8A])
def test_force_unit_access(disk: Target, opcode: int, flags: int) -> None:
    disk.good(rw(opcode, 0, 1, flags), A)
    assert disk.effects == [Write(0, A, fua=True)]
    disk.good(rw(opcode, 0, 1, flags & 0x10), A)
    assert disk.effects == [Write(0, A)]


@pytest.mark.parametrize("opcode", [0x28, 0xA8, 0x88, 0x2A, 0xAA, 0x8A, 0x2E, 0xAE, 0x8E, 0x2F, 0xAF, 0x8F, 0x8B])
@pytest.mark.parametrize("protect", range(0x20, 0x100, 0x20))
def test_protection_information_is_refused(disk: Target, opcode: int, protect: int) -> None:
    assert disk.bad(rw(opcode, 0, 1, protect), A) == "5/24/00:c1.7"
    assert disk.effects == []


@pytest.mark.parametrize(
    "opcode",
    [0x28, 0xA8, 0x88, 0x2A, 0xAA, 0x8A, 0x2E, 0xAE, 0x8E, 0x2F, 0xAF, 0x8F, 0x8B, 0x34, 0x90, 0x35, 0x91, 0x41, 0x93],
)
def test_beyond_the_end_without_wrapping(disk: Target, opcode: int) -> None:
    last = 2**64 - 1 if opcode >> 5 == 4 else 2**32 - 1
    longest = 2**16 - 1 if opcode >> 5 in (1, 2) else 2**32 - 1
    for lba, blocks in ((64, 1), (63, 2), (last, 1), (last, 2), (last, longest), (0, longest), (65, 0), (last, 0)):
        assert disk.bad(rw(opcode, lba, blocks), A) == out_of_range(max(lba, 64))
        assert disk.effects == []


@pytest.mark.parametrize("opcode", [0x28, 0xA8, 0x88, 0x2A, 0xAA, 0x8A, 0x2E, 0xAE, 0x8E, 0x2F, 0xAF, 0x8F, 0x8B])
def test_no_blocks_are_no_error_and_no_effect(disk: Target, opcode: int) -> None:
    for lba in (0, 63, 64):
        assert disk.good(rw(opcode, lba, 0)) == b""
        assert disk.effects == []


@pytest.mark.parametrize("opcode", [0x28, 0xA8, 0x88, 0x2A, 0xAA, 0x8A, 0x2E, 0xAE, 0x8E, 0x8B])
def test_maximum_transfer_length(opcode: int) -> None:
    one = target(max_transfer=8)
    field = {1: 7, 5: 6, 4: 10}[opcode >> 5]

    assert one.bad(rw(opcode, 0, 9), A * 9) == f"5/24/00:c{field}"
    one.good(rw(opcode, 0, 8), A * 8)


@pytest.mark.parametrize("opcode", [0x0A, 0x2A, 0xAA, 0x8A, 0x2E, 0xAE, 0x8E, 0x8B])
def test_too_little_data_writes_nothing(disk: Target, opcode: int) -> None:
    for data in (b"", A, A + B[:511]):
        assert disk.bad(rw(opcode, 0, 2), data) == WRONG_LENGTH
        assert disk.effects == []


def test_too_much_data_is_used_as_far_as_it_is_needed(disk: Target) -> None:
    disk.good(rw(0x2A, 0, 1), A + B)
    assert disk.effects == [Write(0, A)]


@pytest.mark.parametrize(
    "cdb",
    [
        rw(0x0A, 0, 1),
        rw(0x2A, 0, 1),
        rw(0xAA, 0, 1),
        rw(0x8A, 0, 1),
        rw(0x2E, 0, 1),
        rw(0xAE, 0, 1),
        rw(0x8E, 0, 1),
        rw(0x8B, 0, 1),
        rw(0x41, 0, 1),
        rw(0x93, 0, 1),
        bytes.fromhex("89 00 0000000000000000 000000 01 00 00"),
        unmap((0, 1))[0],
    ],
)
def test_a_write_protected_unit_keeps_its_data(cdb: bytes) -> None:
    one = target(read_only=True)

    assert one.bad(cdb, A + B) == "7/27/00"
    assert one.effects == []


def test_medium_errors_name_the_block(disk: Target) -> None:
    disk.medium.broken = {5}

    assert disk.bad(rw(0x28, 4, 4)) == "3/11/00@5"
    assert disk.bad(rw(0x2A, 4, 4), A * 4) == "3/0C/00@5"
    assert disk.bad(rw(0x8F, 0, 64)) == "3/11/00@5"
    assert disk.bad(*unmap((5, 1))) == "3/0C/00@5"


def test_a_full_medium_is_write_protected(disk: Target) -> None:
    disk.medium.full = True

    assert disk.bad(rw(0x2A, 4, 1), A) == "7/27/07@4"


def test_a_failed_flush_is_a_write_error(disk: Target) -> None:
    steps = disk.unit.execute(Task(ALICE, rw(0x35, 0, 0)))
    assert next(steps) == Flush()

    with pytest.raises(StopIteration) as end:
        steps.throw(MediumError(0))

    assert describe(end.value.value.sense) == "3/0C/00"


# ---------------------------------------------------------------- VERIFY


@pytest.mark.parametrize("opcode", [0x2F, 0xAF, 0x8F])
class TestVerify:
    def test_of_the_medium_reads_and_needs_no_data(self, disk: Target, opcode: int) -> None:
        disk.good(rw(opcode, 3, 4))
        assert disk.effects == [Read(3, 4)]

    def test_compares_byte_by_byte(self, disk: Target, opcode: int) -> None:
        disk.medium.data[512:1536] = A + B
        disk.good(rw(opcode, 1, 2, 0x02), A + B)
        assert disk.bad(rw(opcode, 1, 2, 0x02), A + C) == "E/1D/00@2"
        assert disk.bad(rw(opcode, 1, 2, 0x02), A[:-1] + C[:1] + B) == "E/1D/00@1"

    def test_compares_one_block_with_all(self, disk: Target, opcode: int) -> None:
        disk.medium.data[512:1536] = A + A
        disk.good(rw(opcode, 1, 2, 0x06), A)
        assert disk.bad(rw(opcode, 1, 3, 0x06), A) == "E/1D/00@3"

    def test_refuses_the_reserved_way(self, disk: Target, opcode: int) -> None:
        assert disk.bad(rw(opcode, 0, 1, 0x04), A) == "5/24/00:c1.2"

    def test_needs_its_data(self, disk: Target, opcode: int) -> None:
        assert disk.bad(rw(opcode, 0, 2, 0x02), A) == WRONG_LENGTH
        assert disk.bad(rw(opcode, 0, 2, 0x06)) == WRONG_LENGTH

    def test_does_not_compare_more_than_a_transfer(self, opcode: int) -> None:
        one = target(max_transfer=8)
        field = {1: 7, 5: 6, 4: 10}[opcode >> 5]
        assert one.bad(rw(opcode, 0, 9, 0x02), ZEROS * 9) == f"5/24/00:c{field}"
        one.good(rw(opcode, 0, 64))
        one.good(rw(opcode, 0, 64, 0x06), ZEROS)


def test_a_long_verify_reads_piece_by_piece_and_holds_its_range_while_it_compares() -> None:
    one = target(blocks=5000)

    one.good(rw(0x8F, 10, 4500))
    assert one.effects == [Read(10, 2048), Read(2058, 2048), Read(4106, 404)]

    one.good(rw(0x8F, 10, 4500, 0x02), ZEROS * 4500)
    assert one.effects == [Hold(10, 4500), Read(10, 2048), Read(2058, 2048), Read(4106, 404)]

    one.medium.data[512 * 4200] = 1
    assert one.bad(rw(0x8F, 10, 4500, 0x02), ZEROS * 4500) == "E/1D/00@1068"
    assert one.bad(rw(0x8F, 10, 4500, 0x06), ZEROS) == "E/1D/00@1068"


@pytest.mark.parametrize("opcode", [0x2E, 0xAE, 0x8E])
def test_write_and_verify(disk: Target, opcode: int) -> None:
    for flags in (0x00, 0x02):
        disk.good(rw(opcode, 7, 2, flags), A + B)
        assert disk.effects == [Hold(7, 2), Write(7, A + B, fua=True), Read(7, 2, fua=True)]
    assert disk.bad(rw(opcode, 0, 1, 0x04), A) == "5/24/00:c1.2"
    assert disk.bad(rw(opcode, 0, 1, 0x06), A) == "5/24/00:c1.2"


# ---------------------------------------------------------------- COMPARE AND WRITE, ORWRITE


def compare_and_write(lba: int, blocks: int, flags: int = 0) -> bytes:
    return bytes(
        [
            0x89,  # COMPARE AND WRITE
            flags,  # WRPROTECT, DPO, FUA
            *lba.to_bytes(8, "big"),
            *(0x00, 0x00, 0x00),
            blocks,  # NUMBER OF LOGICAL BLOCKS
            0x00,
            0x00,
        ]
    )


def test_compare_and_write_holds_its_range(disk: Target) -> None:
    disk.good(compare_and_write(9, 2), ZEROS + ZEROS + A + B)
    assert disk.effects == [Hold(9, 2), Read(9, 2), Write(9, A + B)]

    disk.good(compare_and_write(9, 1, 0x08), A + C)
    assert disk.effects[-1] == Write(9, C, fua=True)


def test_a_miscompare_names_the_offset_and_writes_nothing(disk: Target) -> None:
    disk.medium.data[512 * 10 + 3] = 1

    assert disk.bad(compare_and_write(9, 2), ZEROS + ZEROS + A + B) == "E/1D/00@203"
    assert disk.effects == [Hold(9, 2), Read(9, 2)]


@given(places=st.sets(st.integers(0, 3 * 512 - 1), min_size=1, max_size=4))
def test_a_miscompare_names_the_first_of_several(places: set[int]) -> None:
    disk = target()
    for place in places:
        disk.medium.data[512 * 9 + place] = 1
    assert disk.bad(compare_and_write(9, 3), ZEROS * 3 + A * 3) == f"E/1D/00@{min(places):X}"


def test_compare_and_write_insists_on_its_limits(disk: Target) -> None:
    for data in (b"", A, A + B + C, A * 4):
        assert disk.bad(compare_and_write(0, 1), data) == "5/24/00:c13"
    assert disk.bad(compare_and_write(0, 0), A * 512) == "5/24/00:c13"  # 256 blocks do not fit its byte
    assert disk.bad(compare_and_write(64, 1), A + B) == out_of_range(64)
    assert disk.bad(compare_and_write(2**64 - 1, 255), A + B) == out_of_range(2**64 - 1)
    assert disk.bad(compare_and_write(0, 1, 0x20), A + B) == "5/24/00:c1.7"
    assert target(max_compare_and_write=1).bad(compare_and_write(0, 2), A * 4) == "5/24/00:c13"
    disk.good(compare_and_write(0, 0))
    assert disk.effects == []


def test_orwrite(disk: Target) -> None:
    disk.medium.data[0:512] = b"\x0f" * 512

    disk.good(rw(0x8B, 0, 1), b"\x3c" * 512)

    assert disk.effects == [Hold(0, 1), Read(0, 1), Write(0, b"\x3f" * 512)]


# ---------------------------------------------------------------- cache


@pytest.mark.parametrize("opcode", [0x35, 0x91])
def test_synchronize_cache(disk: Target, opcode: int) -> None:
    for cdb in (rw(opcode, 0, 0), rw(opcode, 5, 9), rw(opcode, 63, 1, 0x02), rw(opcode, 64, 0, 0x04)):
        disk.good(cdb)
        assert disk.effects == [Flush()]


@pytest.mark.parametrize("opcode", [0x34, 0x90])
def test_pre_fetch_is_good_and_does_nothing(disk: Target, opcode: int) -> None:
    for cdb in (rw(opcode, 0, 0), rw(opcode, 0, 64), rw(opcode, 5, 9, 0x02)):
        disk.good(cdb)
        assert disk.effects == []


# ---------------------------------------------------------------- provisioning


@pytest.mark.parametrize("opcode", [0x41, 0x93])
class TestWriteSame:
    def test_fills(self, disk: Target, opcode: int) -> None:
        disk.good(rw(opcode, 4, 10), A)
        assert disk.effects == [Fill(4, 10, A)]

    def test_unmaps_a_block_of_zeros(self, disk: Target, opcode: int) -> None:
        disk.good(rw(opcode, 4, 10, 0x08), ZEROS)
        assert disk.effects == [Fill(4, 10, ZEROS, unmap=True)]

    def test_writes_what_would_not_read_back(self, disk: Target, opcode: int) -> None:
        disk.good(rw(opcode, 4, 10, 0x08), A)
        assert disk.effects == [Fill(4, 10, A)]

    def test_zeros_without_unmap_stay_mapped(self, disk: Target, opcode: int) -> None:
        disk.good(rw(opcode, 4, 10), ZEROS)
        assert disk.effects == [Fill(4, 10, ZEROS)]

    def test_refuses_what_there_is_not(self, disk: Target, opcode: int) -> None:
        assert disk.bad(rw(opcode, 0, 1, 0x10), A) == "5/24/00:c1.4"  # ANCHOR without UNMAP
        assert disk.bad(rw(opcode, 0, 1, 0x18), ZEROS) == "5/24/00:c1.4"  # ANCHOR
        assert disk.bad(rw(opcode, 0, 1, 0x20), A) == "5/24/00:c1.7"  # WRPROTECT
        assert disk.bad(rw(opcode, 0, 1, 0x04), A) == "5/24/00:c1.2"  # PBDATA
        assert disk.bad(rw(opcode, 0, 1, 0x02), A) == "5/24/00:c1.1"  # LBDATA
        assert target(thin=False).bad(rw(opcode, 0, 1, 0x08), ZEROS) == "5/24/00:c1.3"

    def test_limits(self, opcode: int) -> None:
        one = target(max_write_same=16)
        field = 7 if opcode == 0x41 else 10
        assert one.bad(rw(opcode, 0, 0), A) == f"5/24/00:c{field}"  # WSNZ
        assert one.bad(rw(opcode, 0, 17), A) == f"5/24/00:c{field}"
        one.good(rw(opcode, 0, 16), A)

    def test_insists_on_one_block_of_data(self, disk: Target, opcode: int) -> None:
        for data in (b"", A[:256], A + B):
            assert disk.bad(rw(opcode, 0, 1), data) == WRONG_LENGTH

    def test_is_on_the_medium_while_the_cache_is_off(self, opcode: int) -> None:
        one = target(write_cache=False)
        one.good(rw(opcode, 0, 1), A)
        assert one.effects == [Fill(0, 1, A), Flush()]


def test_write_same_without_data(disk: Target) -> None:
    disk.good(rw(0x93, 3, 2, 0x01))  # NDOB
    assert disk.effects == [Fill(3, 2, ZEROS)]
    disk.good(rw(0x93, 3, 2, 0x09))  # NDOB, UNMAP
    assert disk.effects == [Fill(3, 2, ZEROS, unmap=True)]


def test_unmap(disk: Target) -> None:
    disk.good(rw(0x2A, 0, 8), A * 8)

    disk.good(*unmap((1, 2), (5, 0), (6, 1)))

    assert disk.effects == [Fill(1, 2, ZEROS, unmap=True), Fill(6, 1, ZEROS, unmap=True)]
    assert disk.good(rw(0x28, 0, 8)) == A + ZEROS * 2 + A * 3 + ZEROS + A


def test_unmap_checks_every_range_before_the_first(disk: Target) -> None:
    for bad in ((64, 1), (63, 2), (2**64 - 1, 1), (2**64 - 1, 2**32 - 1), (65, 0)):
        assert disk.bad(*unmap((1, 2), bad)) == out_of_range(max(bad[0], 64))
        assert disk.effects == []


def test_unmap_lists_that_are_no_error(disk: Target) -> None:
    disk.good("42 00 00000000 00 0000 00")  # PARAMETER LIST LENGTH 0
    disk.good(*unmap())
    disk.good(*unmap((64, 0)))
    # a descriptor that is cut off is passed over: UNMAP BLOCK DESCRIPTOR DATA LENGTH 24
    disk.good(
        "42 00 00000000 00 0020 00", bytes.fromhex("001e 0018 000000000000000000000001 00000001 00000000" + "00" * 8)
    )
    assert disk.effects == [Fill(1, 1, ZEROS, unmap=True)]


def test_unmap_lists_that_are_wrong(disk: Target) -> None:
    cdb, data = unmap((0, 1), (2, 1))
    assert disk.bad(cdb, data[:-1]) == "5/1A/00"  # less data than PARAMETER LIST LENGTH
    assert disk.bad("42 00 00000000 00 0007 00", data) == "5/1A/00"  # shorter than its header
    assert disk.bad("42 00 00000000 00 0018 00", data) == "5/1A/00"  # its second descriptor is beyond the list
    assert disk.bad("42 01 00000000 00 0000 00") == "5/24/00:c1.0"  # ANCHOR


def test_unmap_limits() -> None:
    one = target(max_unmap=10, max_unmap_descriptors=3)

    one.good(*unmap((0, 5), (10, 5)))
    assert one.bad(*unmap((0, 5), (10, 6))) == "5/26/00:p32"
    assert one.bad(*unmap(*[(n, 1) for n in range(4)])) == "5/26/00:p2"
    assert one.effects == []


def get_lba_status(lba: int, length: int = 4096) -> bytes:
    return bytes([0x9E, 0x12, *lba.to_bytes(8, "big"), *length.to_bytes(4, "big"), 0, 0])


def test_get_lba_status(disk: Target) -> None:
    disk.good(rw(0x2A, 4, 8), A * 8)

    assert disk.good(get_lba_status(2)) == bytes.fromhex(
        "00000034 00000000"
        "0000000000000002 00000002 01 000000"  # deallocated
        "0000000000000004 00000008 00 000000"  # mapped
        "000000000000000c 00000034 01 000000"
    )
    assert disk.effects == [Extents(2, 62)]


def test_get_lba_status_with_little_room(disk: Target) -> None:
    disk.good(rw(0x2A, 4, 8), A * 8)

    assert disk.good(get_lba_status(0, 24)) == bytes.fromhex("00000014 00000000 0000000000000000 00000004 01 000000")
    assert disk.good(get_lba_status(0, 4)) == bytes.fromhex("00000014")
    assert disk.good(get_lba_status(0, 0)) == b""


def test_get_lba_status_beyond_the_end(disk: Target) -> None:
    for lba in (64, 65, 2**63, 2**64 - 1):
        assert disk.bad(get_lba_status(lba)) == out_of_range(lba)


def test_large_blocks() -> None:
    one = target(blocks=16, block_size=4096)

    one.good(rw(0x2A, 15, 1), b"x" * 4096)
    assert one.good(rw(0x88, 14, 2)) == bytes(4096) + b"x" * 4096
    assert one.bad(rw(0x2A, 0, 1), A) == WRONG_LENGTH
    assert one.bad(rw(0x28, 16, 1)) == out_of_range(16)


# ---------------------------------------------------------------- CDBs of 32 bytes


def long_cdb(action: int, lba: int, blocks: int, flags: int = 0, *, additional: int = 0x18) -> bytes:
    """flags: byte 10."""
    return bytes(
        [
            0x7F,
            0x00,  # CONTROL
            *bytes(4),
            0x00,  # GROUP NUMBER
            additional,  # ADDITIONAL CDB LENGTH
            *action.to_bytes(2, "big"),
            flags,
            0x00,
            *lba.to_bytes(8, "big"),
            *(0x11, 0x22, 0x33, 0x44),  # EXPECTED INITIAL LOGICAL BLOCK REFERENCE TAG: there is no protection
            *(0x55, 0x66, 0x77, 0x88),
            *blocks.to_bytes(4, "big"),
        ]
    )


READ_32, VERIFY_32, WRITE_32, WRITE_AND_VERIFY_32, WRITE_SAME_32 = range(0x09, 0x0E)


def test_commands_of_32_bytes(disk: Target) -> None:
    data = bytes(range(256)) * 4
    disk.good(long_cdb(WRITE_32, 5, 2), data)
    assert disk.good(long_cdb(READ_32, 5, 2)) == data
    disk.good(long_cdb(VERIFY_32, 5, 2, 0x02), data)
    assert disk.bad(long_cdb(VERIFY_32, 5, 2, 0x02), bytes(1024)) == "E/1D/00@5"
    disk.good(long_cdb(WRITE_AND_VERIFY_32, 7, 1, 0x02), data[:512])
    disk.good(long_cdb(WRITE_SAME_32, 20, 3), data[:512])
    assert disk.good(long_cdb(READ_32, 20, 3)) == data[:512] * 3
    disk.good(long_cdb(WRITE_SAME_32, 20, 3, 0x09))  # UNMAP, NDOB
    assert not disk.medium.mapped & {20, 21, 22}


def test_commands_of_32_bytes_that_are_wrong(disk: Target) -> None:
    assert disk.bad(long_cdb(READ_32, 0, 1, 0x20)) == "5/24/00:c10.7", "RDPROTECT"
    assert disk.bad(long_cdb(READ_32, 64, 1)) == out_of_range(64)
    assert disk.bad(long_cdb(READ_32, (1 << 64) - 1, 1)) == out_of_range(2**64 - 1)
    assert disk.bad(long_cdb(READ_32, 0, 1, additional=0x10)) == "5/24/00:c7"
    assert disk.bad(long_cdb(0x0008, 0, 1)) == "5/24/00:c8.7", "no such service action"
    assert disk.bad(b"\x7f" + bytes(5)) == "5/24/00:c8.7"
    assert disk.bad(long_cdb(READ_32, 0, 1)[:30]) == "5/24/00:c30"
    assert disk.bad(b"\x7f\x04" + long_cdb(READ_32, 0, 1)[2:]) == "5/24/00:c1.2", "NACA"
    assert disk.bad(long_cdb(WRITE_SAME_32, 0, 1, 0x10), bytes(512)) == "5/24/00:c10.4", "ANCHOR"
    assert disk.bad(long_cdb(WRITE_32, 0, 2), bytes(512)) == "5/0E/03"
    assert not any(disk.medium.data)


# ---------------------------------------------------------------- WRITE ATOMIC


def atomic(lba: int, blocks: int, flags: int = 0, boundary: int = 0) -> bytes:
    return bytes(
        [0x9C, flags, *lba.to_bytes(8, "big"), *boundary.to_bytes(2, "big"), *blocks.to_bytes(2, "big"), 0x00, 0x00]
    )


def test_write_atomic(disk: Target) -> None:
    disk.good(atomic(3, 2, 0x18), b"\xa6" * 1024)
    assert disk.effects == [Write(3, b"\xa6" * 1024, fua=True, atomic=True)]
    disk.good(atomic(64, 0))
    assert disk.effects == []


def test_write_atomic_that_is_wrong() -> None:
    disk = target(4096, max_atomic=8)
    assert disk.bad(atomic(0, 1, 0x20), bytes(512)) == "5/24/00:c1.7"
    assert disk.bad(atomic(4096, 1), bytes(512)) == out_of_range(4096)
    assert disk.bad(atomic(4097, 0)) == out_of_range(4097)
    assert disk.bad(atomic(0, 9), bytes(9 * 512)) == "5/24/00:c12"
    assert disk.bad(atomic(0, 8, boundary=4), bytes(8 * 512)) == "5/24/00:c10"
    assert disk.bad(atomic(0, 2), bytes(512)) == "5/0E/03"
    assert target(read_only=True).bad(atomic(0, 1), bytes(512)) == "7/27/00"
    assert not any(disk.medium.data)
