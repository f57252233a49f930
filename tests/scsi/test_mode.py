"""MODE SENSE and MODE SELECT: whole parameter lists, and who may change what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scsi.conftest import ALICE, BOB, Target, target
from vhostfc.scsi.mode import NOTE, ModePages
from vhostfc.scsi.task import AbortTasks, Flush, KeepNote, MediumError, ServiceResponse, TakeTurn, Task, TaskManagement

RECOVERY = "01 0a c0 00 00 00 00 00 00 00 00 00"
CACHING = "88 12 04 00 ffff 0000 ffff ffff 00 00 0000 00 000000"  # PS
CONTROL = "8a 0a 02 10 00 40 00 00 ffff 0000"  # PS
EXCEPTIONS = "1c 0a 08 00 00000000 00000000"
SHORT_DESCRIPTOR = "00000040 00 000200"
#: As initiators send them that know that PS is reserved in MODE SELECT.
WRITE_THROUGH = "08 12 00 00 ffff 0000 ffff ffff 00 00 0000 00 000000"
WRITE_BACK = "08 12 04 00 ffff 0000 ffff ffff 00 00 0000 00 000000"
PROTECTED = "0a 0a 02 10 08 40 00 00 ffff 0000"
DESCRIPTORS = "0a 0a 06 10 00 40 00 00 ffff 0000"
FIXED = "0a 0a 02 10 00 40 00 00 ffff 0000"


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


def save(disk: Target, data: str) -> None:
    """The same with SP."""
    raw = bytes.fromhex("00000000" + data)
    disk.good(select_6(raw, flags=0x11), raw)


def page(disk: Target, code: int, control: int = 0) -> str:
    """The page as MODE SENSE gives it, without PS, which does not depend on anything."""
    data = disk.good(sense_6(control << 6 | code, dbd=True))[4:]
    assert data[0] == 0x80 | code
    return bytes([code, *data[1:]]).hex()


def same(found: str, wanted: str) -> bool:
    return bytes.fromhex(found) == bytes.fromhex(wanted)


def again(disk: Target) -> Target:
    """The same medium, and what was kept for it, after a restart."""
    one = Target(disk.identity, disk.medium)
    note = disk.medium.notes.get(NOTE)
    if note is not None:
        one.unit.mode.found(note)
    one.unit.attach(ALICE)
    assert one.bad("00 00 00 00 00 00") == "6/29/01"
    return one


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
    assert disk.good(sense_6(0xC0 | page, dbd=True))[4:] == bytes.fromhex(data)  # saved


def test_changeable_values(disk: Target) -> None:
    changeable = bytes.fromhex(
        "01 0a 00 00 00 00 00 00 00 00 00 00"
        "88 12 04 00 0000 0000 0000 0000 00 00 0000 00 000000"  # WCE
        "8a 0a 04 00 08 00 00 00 0000 0000"  # D_SENSE, SWP
        "1c 0a 00 00 00000000 00000000"
    )

    assert disk.good(sense_6(0x40 | 0x3F, dbd=True))[4:] == changeable
    assert disk.good(sense_6(0x40 | 0x3F, subpage=0xFF, dbd=True))[4:] == changeable


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
    assert one.good(sense_6(0x08, dbd=True))[4] == 0x08, "so there is nothing to save"
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
    assert disk.effects == [TakeTurn(), Flush()]

    disk.good("2a 00 00000000 00 0001 00", bytes(512))
    assert [getattr(effect, "fua", None) for effect in disk.effects] == [True]

    select(disk, "00000000" + CACHING)
    assert disk.effects == [TakeTurn()]


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


# ---------------------------------------------------------------- saved values


def test_what_is_saved_outlives_a_reset_and_a_restart(disk: Target) -> None:
    save(disk, WRITE_THROUGH)

    assert [type(effect) for effect in disk.effects] == [TakeTurn, Flush, KeepNote]
    for one in (disk, disk, again(disk)):
        assert same(page(one, 0x08), WRITE_THROUGH)
        assert same(page(one, 0x08, control=3), WRITE_THROUGH)
        assert same(page(one, 0x08, control=2), WRITE_BACK)
        one.good("2a 00 00000000 00 0001 00", bytes(512))
        assert [getattr(effect, "fua", None) for effect in one.effects] == [True]
        assert one.manage(TaskManagement.LOGICAL_UNIT_RESET) is ServiceResponse.FUNCTION_COMPLETE
        assert [type(effect) for effect in one.effects] == [AbortTasks]
        assert one.bad("00 00 00 00 00 00") == "6/29/03"


def test_what_is_not_saved_ends_with_a_reset(disk: Target) -> None:
    select(disk, "00000000" + DESCRIPTORS)
    assert not disk.medium.notes
    assert same(page(disk, 0x0A, control=3), FIXED)

    disk.manage(TaskManagement.LOGICAL_UNIT_RESET)
    disk.bad("00 00 00 00 00 00")

    assert same(page(disk, 0x0A), FIXED)


def test_pages_that_were_not_sent_are_saved_as_they_are(disk: Target) -> None:
    """SPC-4 6.11: all the saveable mode pages including any sent."""
    select(disk, "00000000" + PROTECTED)
    save(disk, WRITE_THROUGH)
    select(disk, "00000000" + FIXED)

    one = again(disk)
    assert same(page(one, 0x08), WRITE_THROUGH)
    assert same(page(one, 0x0A), PROTECTED)
    assert one.bad("2a 00 00000000 00 0001 00", bytes(512)) == "7/27/00"
    assert same(page(disk, 0x0A), FIXED)
    assert same(page(disk, 0x0A, control=3), PROTECTED)


def test_an_empty_list_saves_what_is_current(disk: Target) -> None:
    select(disk, "00000000" + DESCRIPTORS)
    disk.good("15 11 00 00 00 00")

    assert same(page(again(disk), 0x0A), DESCRIPTORS)
    disk.good("55 11 00 00 00 00 00 00 00 00")
    assert disk.effects == [TakeTurn()], "it is there already"


def test_defaults_leave_nothing_behind(disk: Target) -> None:
    save(disk, WRITE_THROUGH + PROTECTED)
    assert disk.medium.notes
    save(disk, WRITE_BACK + FIXED)

    assert not disk.medium.notes
    assert same(page(again(disk), 0x08), WRITE_BACK)


def test_what_cannot_be_kept_changes_nothing(disk: Target) -> None:
    disk.medium.forgetful = True
    assert refused(disk, "00000000" + WRITE_THROUGH, flags=0x11) == "4/44/00"
    assert same(page(disk, 0x08, control=3), WRITE_BACK)
    disk.good("00 00 00 00 00 00", nexus=BOB)
    disk.good("2a 00 00000000 00 0001 00", bytes(512))
    assert [getattr(effect, "fua", None) for effect in disk.effects] == [False]

    disk.medium.forgetful = False
    save(disk, WRITE_BACK)
    assert [type(effect) for effect in disk.effects] == [TakeTurn, KeepNote], "who knows what is there"
    save(disk, WRITE_BACK)
    assert disk.effects == [TakeTurn()]


def test_a_cache_that_cannot_be_emptied_stays_on(disk: Target) -> None:
    raw = bytes.fromhex("00000000" + WRITE_THROUGH)
    steps = disk.unit.execute(Task(ALICE, select_6(raw, flags=0x11), raw))
    assert next(steps) == TakeTurn()
    assert next(steps) == Flush()
    with pytest.raises(StopIteration) as end:
        steps.throw(MediumError(0))

    assert end.value.value.sense[2] == 0x03  # MEDIUM ERROR
    assert same(page(disk, 0x08), WRITE_BACK)
    assert not disk.medium.notes


def test_others_learn_of_a_cache_that_is_off_when_it_is_empty(disk: Target) -> None:
    """Until then they have to go on with their flushes, and nothing new may be written into it."""
    raw = bytes.fromhex("00000000" + WRITE_THROUGH)
    steps = disk.unit.execute(Task(ALICE, select_6(raw), raw))
    next(steps)
    before = disk.unit.version, disk.unit.verdict(BOB)
    assert next(steps) == Flush()

    assert disk.unit.version > before[0]
    assert disk.unit.verdict(BOB) != before[1]
    assert same(page(disk, 0x08), WRITE_BACK)
    disk.good("2a 00 00000000 00 0001 00", bytes(512), nexus=BOB)
    assert [getattr(effect, "fua", None) for effect in disk.effects] == [True]

    steps.close()  # aborted: all is as it was
    assert disk.unit.verdict(BOB) == before[1]
    disk.good("2a 00 00000000 00 0001 00", bytes(512), nexus=BOB)
    assert [getattr(effect, "fua", None) for effect in disk.effects] == [False]


@pytest.mark.parametrize("works", [True, False])
def test_a_reset_to_a_cache_that_is_off_empties_it(disk: Target, works: bool) -> None:
    save(disk, WRITE_THROUGH)
    select(disk, "00000000" + WRITE_BACK)

    steps = disk.unit.manage(BOB, TaskManagement.LOGICAL_UNIT_RESET)
    assert isinstance(next(steps), AbortTasks)
    assert next(steps) == Flush()
    assert same(page(disk, 0x08), WRITE_BACK)
    assert not disk.unit.mode.write_cache
    with pytest.raises(StopIteration) as end:
        next(steps) if works else steps.throw(MediumError(0))

    assert end.value.value is ServiceResponse.FUNCTION_COMPLETE
    disk.bad("00 00 00 00 00 00")
    assert same(page(disk, 0x08), WRITE_THROUGH)


def test_a_select_that_has_lost_its_right_while_it_waited_for_its_turn(disk: Target) -> None:
    raw = bytes.fromhex("00000000" + PROTECTED)
    steps = disk.unit.execute(Task(ALICE, select_6(raw, flags=0x11), raw))
    assert next(steps) == TakeTurn()
    disk.good("16 00 00 00 00 00", nexus=BOB)  # RESERVE(6)
    with pytest.raises(StopIteration) as end:
        next(steps)

    assert end.value.value.status == 0x18
    disk.good("17 00 00 00 00 00", nexus=BOB)
    assert same(page(disk, 0x0A), FIXED)


def test_what_may_not_be_changed_is_not_taken_from_what_was_kept(disk: Target) -> None:
    """Another version may have had other values there."""
    pages = ModePages(disk.identity)
    pages.found(b'{"version": 1, "pages": {"0a": "0a0a0400080000000000ffff"}}')
    kept = pages.sense(sense_6(0x0A, dbd=True), 64)[4:]
    assert kept == bytes.fromhex("8a 0a 06 10 08 40 00 00 ffff 0000")


@pytest.mark.parametrize(
    ("note", "said"),
    [
        (b"", "Expecting value"),
        (b"\xff", "decode"),
        (b"[]", "not a record of mode pages"),
        (b"{}", "not a record of mode pages"),
        (b'{"version": 2, "pages": {}}', "version 2 is not known"),
        (b'{"version": 1, "pages": []}', "not a record of mode pages"),
        (b'{"version": 1, "pages": {"08": 8}}', "not a record of mode pages"),
        (b'{"version": 1, "pages": {"08": "0812"}}', "no such page 08h"),
        (b'{"version": 1, "pages": {"0b": "0a0a02100040000000000000"}}', "no such page 0bh"),
        (b'{"version": 1, "pages": {"08": "0a0a02100040000000000000"}}', "no such page 08h"),
    ],
)
def test_a_note_that_cannot_be_understood(disk: Target, note: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        disk.unit.mode.found(note)
    assert same(page(disk, 0x08), WRITE_BACK)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()), max_size=6))
def test_what_was_saved_last_is_what_a_restart_finds(steps: list[tuple[bool, bool, bool, bool]]) -> None:
    one, saved = target(), (WRITE_BACK, FIXED)
    for keep, cache, protect, descriptors in steps:
        caching = WRITE_BACK if cache else WRITE_THROUGH
        control = f"0a 0a {'06' if descriptors else '02'} 10 {'08' if protect else '00'} 40 00 00 ffff 0000"
        if keep:
            saved = caching, control
        (save if keep else lambda disk, data: select(disk, "00000000" + data))(one, caching + control)
        assert same(page(one, 0x08) + page(one, 0x0A), caching + control)
    for disk in (one, again(one)):
        assert same(page(disk, 0x08, control=3) + page(disk, 0x0A, control=3), "".join(saved))
    assert same(page(again(one), 0x08) + page(again(one), 0x0A), "".join(saved))
