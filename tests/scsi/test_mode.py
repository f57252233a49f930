"""MODE SENSE and MODE SELECT: whole parameter lists, and who may change what."""

from __future__ import annotations

import pytest

from tests.scsi.conftest import ALICE, BOB, Target, target
from vhostfc.scsi.task import Flush

RECOVERY = "01 0a c0 00 00 00 00 00 00 00 00 00"
CACHING = "08 12 04 00 ffff 0000 ffff ffff 00 00 0000 00 000000"
CONTROL = "0a 0a 02 10 00 40 00 00 ffff 0000"
EXCEPTIONS = "1c 0a 08 00 00000000 00000000"
SHORT_DESCRIPTOR = "00000040 00 000200"


def sense_6(page: int, *, subpage: int = 0, dbd: bool = False, length: int = 255) -> bytes:
    return bytes(
        [
            0x1A,  # MODE SENSE(6)
            0x08 if dbd else 0x00,  # DBD
            page,  # PC, PAGE CODE
            subpage,
            length,  # ALLOCATION LENGTH
            0x00,
        ]
    )


def sense_10(page: int, *, subpage: int = 0, flags: int = 0, length: int = 255) -> bytes:
    return bytes(
        [
            0x5A,  # MODE SENSE(10)
            flags,  # LLBAA 10h, DBD 08h
            page,  # PC, PAGE CODE
            subpage,
            *(0x00, 0x00, 0x00),
            *length.to_bytes(2, "big"),  # ALLOCATION LENGTH
            0x00,
        ]
    )


def select_6(data: bytes, *, flags: int = 0x10) -> bytes:
    return bytes(
        [
            0x15,  # MODE SELECT(6)
            flags,  # PF 10h, SP 01h
            *(0x00, 0x00),
            len(data),  # PARAMETER LIST LENGTH
            0x00,
        ]
    )


def select_10(data: bytes) -> bytes:
    return bytes([0x55, 0x10, 0, 0, 0, 0, 0, *len(data).to_bytes(2, "big"), 0x00])


def refused(disk: Target, data: str, *, flags: int = 0x10) -> str:
    """The sense of a MODE SELECT(6) with this list, which must change nothing."""
    before = disk.good(sense_6(0x3F))
    raw = bytes.fromhex(data)
    said = disk.bad(select_6(raw, flags=flags), raw)
    assert disk.good(sense_6(0x3F)) == before
    return said


def select(disk: Target, data: str) -> None:
    raw = bytes.fromhex(data)
    disk.good(select_6(raw), raw)


# ---------------------------------------------------------------- MODE SENSE


def test_all_pages_in_6_bytes(disk: Target) -> None:
    pages = RECOVERY + CACHING + CONTROL + EXCEPTIONS

    assert disk.good(sense_6(0x3F)) == bytes.fromhex(
        "43"  # MODE DATA LENGTH: 67 bytes follow
        "00"  # MEDIUM TYPE
        "10"  # DPOFUA
        "08" + SHORT_DESCRIPTOR + pages  # BLOCK DESCRIPTOR LENGTH
    )


def test_all_pages_in_10_bytes(disk: Target) -> None:
    pages = RECOVERY + CACHING + CONTROL + EXCEPTIONS

    assert disk.good(sense_10(0x3F)) == bytes.fromhex("0046 00 10 00 00 0008" + SHORT_DESCRIPTOR + pages)


def test_the_caching_page_is_28_bytes_long_as_firmware_wants(disk: Target) -> None:
    data = disk.good(sense_10(0x08, flags=0x08, length=28))

    assert data == bytes.fromhex("001a 00 10 00 00 0000" + CACHING)
    assert len(data) == 28


@pytest.mark.parametrize(("page", "data"), [(0x01, RECOVERY), (0x08, CACHING), (0x0A, CONTROL), (0x1C, EXCEPTIONS)])
def test_each_page(disk: Target, page: int, data: str) -> None:
    assert disk.good(sense_6(page, dbd=True))[4:] == bytes.fromhex(data)
    assert disk.good(sense_6(page, subpage=0xFF, dbd=True))[4:] == bytes.fromhex(data)
    assert disk.good(sense_6(0x80 | page, dbd=True))[4:] == bytes.fromhex(data)  # defaults


def test_changeable_values(disk: Target) -> None:
    changeable = bytes.fromhex(
        "01 0a 00 00 00 00 00 00 00 00 00 00"
        "08 12 04 00 0000 0000 0000 0000 00 00 0000 00 000000"  # WCE
        "0a 0a 04 00 08 00 00 00 0000 0000"  # D_SENSE, SWP
        "1c 0a 00 00 00000000 00000000"
    )

    assert disk.good(sense_6(0x40 | 0x3F, dbd=True))[4:] == changeable
    assert disk.good(sense_6(0x40 | 0x3F, subpage=0xFF, dbd=True))[4:] == changeable


def test_nothing_is_saved(disk: Target) -> None:
    assert disk.bad(sense_6(0xC0 | 0x08)) == "5/39/00"


def test_pages_that_there_are_not(disk: Target) -> None:
    assert disk.bad(sense_6(0x04)) == "5/24/00:c2.5"
    assert disk.bad(sense_10(0x00)) == "5/24/00:c2.5"
    assert disk.bad(sense_6(0x0A, subpage=0x01)) == "5/24/00:c3"
    assert disk.bad(sense_6(0x3F, subpage=0x02)) == "5/24/00:c3"


def test_allocation_length_cuts_but_mode_data_length_stays(disk: Target) -> None:
    assert disk.good(sense_6(0x3F, length=4)) == bytes.fromhex("43 00 10 08")
    assert disk.good(sense_6(0x3F, length=0)) == b""


def test_long_lba_block_descriptor(disk: Target) -> None:
    assert disk.good(sense_10(0x08, flags=0x10))[:24] == bytes.fromhex(
        "002a 00 10 01 00 0010"  # LONGLBA
        "0000000000000040 00000000 00000200"
    )


def test_block_descriptor_of_a_unit_beyond_32_bits() -> None:
    one = target()
    one.unit.blocks = 1 << 33

    assert one.good(sense_6(0x08))[4:12] == bytes.fromhex("ffffffff 00 000200")
    assert one.good(sense_10(0x08, flags=0x10))[8:16] == bytes.fromhex("0000000200000000")


def test_a_read_only_unit_says_wp() -> None:
    assert target(read_only=True).good(sense_6(0x3F))[2] == 0x90


def test_a_unit_without_a_cache_says_so_and_cannot_be_given_one() -> None:
    one = target(write_cache=False)

    assert one.good(sense_6(0x08, dbd=True))[6] == 0x00
    assert one.good(sense_6(0x48, dbd=True))[6] == 0x00
    assert refused(one, "00000000" + CACHING) == "5/26/00:p6.2"


# ---------------------------------------------------------------- MODE SELECT


def test_software_write_protect(disk: Target) -> None:
    select(disk, "00000000 0a 0a 02 10 08 40 00 00 ffff 0000")

    assert disk.good(sense_6(0x0A))[2] == 0x90
    assert disk.bad("2a 00 00000000 00 0001 00", bytes(512)) == "7/27/00"
    disk.good("28 00 00000000 00 0001 00")
    assert disk.bad("00 00 00 00 00 00", nexus=BOB) == "6/2A/01"

    select(disk, "00000000" + CONTROL)
    disk.good("2a 00 00000000 00 0001 00", bytes(512))


def test_descriptor_format_sense_can_be_asked_for(disk: Target) -> None:
    select(disk, "00000000 0a 0a 06 10 00 40 00 00 ffff 0000")

    result = disk.send("28 00 ffffffff 00 0001 00")

    assert result.sense == bytes.fromhex("72 05 21 00 00 00 00 0c  00 0a 80 00 00000000ffffffff")


def test_switching_the_cache_off_flushes_it_and_makes_writes_fua(disk: Target) -> None:
    select(disk, "00000000 08 12 00 00 ffff 0000 ffff ffff 00 00 0000 00 000000")
    assert disk.effects == [Flush()]

    disk.good("2a 00 00000000 00 0001 00", bytes(512))
    assert [getattr(effect, "fua", None) for effect in disk.effects] == [True]

    select(disk, "00000000" + CACHING)
    assert disk.effects == []


def test_a_list_that_changes_nothing_is_no_news(disk: Target) -> None:
    select(disk, "00000000" + CACHING + CONTROL)

    disk.good("00 00 00 00 00 00", nexus=BOB)


def test_what_mode_sense_gave_may_be_sent_back(disk: Target) -> None:
    for data, cdb in (
        (disk.good(sense_6(0x3F)), select_6),
        (disk.good(sense_10(0x3F)), select_10),
        (disk.good(sense_10(0x3F, flags=0x10)), select_10),
    ):
        disk.good(cdb(data), data)


def test_an_empty_list_is_no_error(disk: Target) -> None:
    disk.good("15 10 00 00 00 00")
    disk.good("55 10 00 00 00 00 00 00 00 00")


def test_flags_of_mode_select(disk: Target) -> None:
    assert refused(disk, "00000000" + CONTROL, flags=0x00) == "5/24/00:c1.4"  # PF
    assert refused(disk, "00000000" + CONTROL, flags=0x11) == "5/24/00:c1.0"  # SP
    assert refused(disk, "00000000" + CONTROL, flags=0x12) == "5/24/00:c1.1"  # RTD


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("000000", "5/1A/00"),  # shorter than the header
        ("00000000 0a", "5/1A/00"),  # cut in the page header
        ("00000000 0a0a02", "5/1A/00"),  # cut in the page
        ("00000008 00000000", "5/1A/00"),  # cut in the block descriptor
        ("00010000" + CONTROL, "5/26/00:p1.0"),  # MEDIUM TYPE
        ("00000004 00000000", "5/26/00:p3"),  # BLOCK DESCRIPTOR LENGTH
        ("00000008 00000040 00001000", "5/26/00:p9"),  # another block size
        ("00000000 04 16", "5/26/00:p4.5"),  # no such page
        ("00000000 4a 01 0000", "5/26/00:p4.6"),  # a subpage
        ("00000000 0a 0b 02 10 00 00 00 00 ffff 0000 00", "5/26/00:p5"),  # PAGE LENGTH
        ("00000000 0a 0a 02 10 48 00 00 00 ffff 0000", "5/26/00:p8.6"),  # a bit that may not change, beside SWP
        ("00000000 0a 0a 02 10 00 40 00 00 fffe 0000", "5/26/00:p13.0"),
        ("00000000 0a 0a 02 10 08 40 00 00 ffff 0000" + "1c 0a 00 00 00000000 00000000", "5/26/00:p18.3"),
    ],
)
def test_a_wrong_list_changes_nothing(disk: Target, data: str, said: str) -> None:
    assert refused(disk, data) == said


def test_data_shorter_than_the_list_length(disk: Target) -> None:
    assert disk.bad("15 10 00 00 10 00", bytes(15)) == "5/1A/00"
    assert disk.bad("55 10 00 00 00 00 00 00 10 00", bytes(4)) == "5/1A/00"


@pytest.mark.parametrize("blocks", ["00000000", "00000040", "00000041", "0000003f", "ffffffff"])
def test_capacity_in_the_block_descriptor_is_passed_over(disk: Target, blocks: str) -> None:
    """SBC-3 6.5.2.2: so it is where it cannot be changed.  The unit may have grown since MODE SENSE gave it."""
    select(disk, f"00000008 {blocks} 00000200" + CONTROL)
    long = bytes.fromhex(f"0000 00 00 01 00 0010 00000000 {blocks} 00000000 00000200" + CONTROL)
    disk.good("55 10 00 00 00 00 00 00 24 00", long)
    assert disk.good("25 00 00000000 0000 00 00") == bytes.fromhex("0000003f 00000200")


def test_mode_pages_are_one_for_all_nexuses(disk: Target) -> None:
    select(disk, "00000000 0a 0a 02 10 08 40 00 00 ffff 0000")

    assert disk.bad("00 00 00 00 00 00", nexus=BOB) == "6/2A/01"
    assert disk.good(sense_6(0x0A), nexus=BOB) == disk.good(sense_6(0x0A), nexus=ALICE)
