"""The disk as a whole: what comes before any command, unit attentions, resets, the verdict."""

from __future__ import annotations

from tests.scsi.conftest import ALICE, BOB, Target, target
from vhostfc.scsi.sense import Asc
from vhostfc.scsi.task import AbortTasks, Attribute, Flush, ServiceResponse, TakeTurn, TaskManagement

TEST_UNIT_READY = "00 00 00 00 00 00"
READS = {0x08, 0x28, 0xA8, 0x88}
WRITES = {0x0A, 0x2A, 0xAA, 0x8A}
FLUSHES = {0x35, 0x91}


def opcodes(mask: bytes) -> set[int]:
    assert len(mask) == 32
    return {n for n in range(256) if mask[n // 8] >> n % 8 & 1}


def test_a_new_nexus_hears_of_the_power_on_once() -> None:
    one = target(attach=False)
    one.unit.attach(ALICE)

    assert one.bad(TEST_UNIT_READY) == "6/29/01"
    assert one.good(TEST_UNIT_READY) == b""


def test_a_nexus_that_comes_back_hears_of_the_loss_and_of_what_it_missed(disk: Target) -> None:
    disk.unit.detach(ALICE)
    disk.unit.resize(100)
    disk.unit.attach(ALICE)

    assert disk.bad(TEST_UNIT_READY) == "6/29/07"
    assert disk.bad(TEST_UNIT_READY) == "6/2A/09"
    assert disk.good(TEST_UNIT_READY) == b""


def test_inquiry_report_luns_and_request_sense_do_not_report_a_unit_attention(disk: Target) -> None:
    disk.unit.attention(Asc.CAPACITY_DATA_HAS_CHANGED)

    disk.good("12 00 00 00 24 00")
    disk.good("a0 00 00 00 00 00 00 00 10 00 00 00")
    # REQUEST SENSE, 18 bytes: tells it and clears it
    assert disk.good("03 00 00 00 12 00") == bytes.fromhex("70 00 06 00000000 0a 00000000 2a 09 00 000000")
    assert disk.good("03 00 00 00 12 00") == bytes.fromhex("70 00 00 00000000 0a 00000000 00 00 00 000000")
    assert disk.good(TEST_UNIT_READY) == b""


def test_request_sense_in_descriptor_format(disk: Target) -> None:
    disk.unit.attention(Asc.CAPACITY_DATA_HAS_CHANGED)

    # DESC set
    assert disk.good("03 01 00 00 fc 00") == bytes.fromhex("72 06 2a 09 00 00 00 00")


def test_conditions_are_told_in_the_order_of_their_precedence_and_once(disk: Target) -> None:
    for _ in range(2):
        disk.unit.attention(Asc.CAPACITY_DATA_HAS_CHANGED)
        disk.unit.inventory_changed()
        disk.unit.attention(Asc.I_T_NEXUS_LOSS_OCCURRED)
        disk.unit.attention(Asc.BUS_DEVICE_RESET_FUNCTION_OCCURRED)

    told = [disk.bad(TEST_UNIT_READY) for _ in range(4)]

    assert told == ["6/29/03", "6/29/07", "6/2A/09", "6/3F/0E"]
    assert disk.good(TEST_UNIT_READY) == b""


def test_attention_for_some_and_for_all_but_one(disk: Target) -> None:
    disk.unit.attention(Asc.INQUIRY_DATA_HAS_CHANGED, nexuses=[ALICE])
    disk.unit.attention(Asc.MODE_PARAMETERS_CHANGED, but=ALICE)

    assert disk.bad(TEST_UNIT_READY) == "6/3F/03"
    disk.good(TEST_UNIT_READY)
    assert disk.bad(TEST_UNIT_READY, nexus=BOB) == "6/2A/01"
    disk.good(TEST_UNIT_READY, nexus=BOB)


def test_report_luns_clears_the_news_of_a_changed_inventory_for_that_nexus(disk: Target) -> None:
    disk.unit.inventory_changed()

    disk.good("a0 00 00 00 00 00 00 00 10 00 00 00", at=disk.absent)

    disk.good(TEST_UNIT_READY)
    assert disk.bad(TEST_UNIT_READY, nexus=BOB) == "6/3F/0E"


def test_report_luns_with_the_vendor_bit_leaves_the_news_pending(disk: Target) -> None:
    disk.unit.inventory_changed()

    disk.good("a0 00 00 00 00 00 00 00 10 00 00 80")

    assert disk.bad(TEST_UNIT_READY) == "6/3F/0E"


def test_verdict_is_empty_until_the_unit_attention_is_delivered() -> None:
    one = target(attach=False)
    assert opcodes(one.unit.verdict(ALICE)) == set()
    one.unit.attach(ALICE)
    assert opcodes(one.unit.verdict(ALICE)) == set()

    one.bad(TEST_UNIT_READY)

    assert opcodes(one.unit.verdict(ALICE)) == READS | WRITES | FLUSHES
    assert opcodes(one.unit.verdict(BOB)) == set()


def test_verdict_of_a_read_only_unit_has_no_writes() -> None:
    one = target(read_only=True)

    assert opcodes(one.unit.verdict(ALICE)) == READS | FLUSHES


def test_verdict_has_no_writes_while_the_cache_is_off(disk: Target) -> None:
    """MODE SELECT(6) with the caching page, WCE 0: each write must then be flushed, which the fast path does not do."""
    page = "08 12 00 00 ffff 0000 ffff ffff 00 00 0000 00 000000"
    disk.good("15 10 00 00 18 00", bytes.fromhex("00 00 00 00" + page))

    assert disk.effects == [TakeTurn(), Flush()]
    assert opcodes(disk.unit.verdict(ALICE)) == READS | FLUSHES
    assert opcodes(disk.unit.verdict(BOB)) == set()  # mode parameters changed


def test_a_detached_nexus_may_run_nothing(disk: Target) -> None:
    disk.unit.detach(ALICE)

    assert opcodes(disk.unit.verdict(ALICE)) == set()
    assert opcodes(disk.unit.verdict(BOB)) == READS | WRITES | FLUSHES


def test_resize_is_told_to_all_and_is_seen(disk: Target) -> None:
    disk.unit.resize(32)

    assert disk.bad(TEST_UNIT_READY) == "6/2A/09"
    assert disk.bad(TEST_UNIT_READY, nexus=BOB) == "6/2A/09"
    assert disk.good("25 00 00 00 00 00 00 00 00 00") == bytes.fromhex("0000001f 00000200")
    disk.unit.resize(32)
    disk.good(TEST_UNIT_READY)


def test_logical_unit_reset_aborts_all_and_brings_the_default_pages_back(disk: Target) -> None:
    # MODE SELECT(6), control page with SWP
    disk.good("15 10 00 00 10 00", bytes.fromhex("00 00 00 00 0a 0a 02 10 08 40 00 00 ffff 0000"))
    assert disk.unit.mode.write_protected

    assert disk.manage(TaskManagement.LOGICAL_UNIT_RESET) is ServiceResponse.FUNCTION_COMPLETE

    assert disk.effects == [AbortTasks(frozenset((ALICE, BOB)), reset=True)]
    assert not disk.unit.mode.write_protected
    assert disk.bad(TEST_UNIT_READY) == "6/29/03"
    assert disk.bad(TEST_UNIT_READY, nexus=BOB) == "6/29/03"


def test_abort_task_set_ends_the_tasks_of_one_nexus_and_tells_nobody(disk: Target) -> None:
    assert disk.manage(TaskManagement.ABORT_TASK_SET, BOB) is ServiceResponse.FUNCTION_COMPLETE

    assert disk.effects == [AbortTasks(frozenset((BOB,)))]
    disk.good(TEST_UNIT_READY)
    disk.good(TEST_UNIT_READY, nexus=BOB)


def test_clear_task_set_ends_all_tasks_whose_status_tells_the_others(disk: Target) -> None:
    assert disk.manage(TaskManagement.CLEAR_TASK_SET) is ServiceResponse.FUNCTION_COMPLETE

    assert disk.effects == [AbortTasks(frozenset((ALICE, BOB)))]
    disk.good(TEST_UNIT_READY)
    disk.good(TEST_UNIT_READY, nexus=BOB)


def test_clear_aca_is_rejected(disk: Target) -> None:
    assert disk.manage(TaskManagement.CLEAR_ACA) is ServiceResponse.FUNCTION_REJECTED


def test_an_unknown_opcode_is_refused_whatever_its_data(disk: Target) -> None:
    for opcode in (0x01, 0x3B, 0x5C, 0x5D, 0x7E, 0x85, 0xC0, 0xFF):
        for data in (b"", bytes(512)):
            assert disk.bad(bytes([opcode]) + bytes(15), data) == "5/20/00"
    assert disk.bad(b"") == "5/20/00"


def test_an_unknown_service_action_is_an_invalid_field(disk: Target) -> None:
    assert disk.bad("9e 1f" + "00" * 14) == "5/24/00:c1.4"
    assert disk.bad("a3 1f" + "00" * 10) == "5/24/00:c1.4"


def test_naca_is_refused(disk: Target) -> None:
    assert disk.bad("00 00 00 00 00 04") == "5/24/00:c5.2"


def test_a_reserved_bit_is_refused_with_a_pointer_to_it(disk: Target) -> None:
    assert disk.bad("00 00 00 20 00 00") == "5/24/00:c3.5"
    assert disk.bad("25 00 00 00 00 00 00 40 00 00") == "5/24/00:c7.6"


def test_the_lun_that_edk2_puts_into_byte_1_is_passed_over(disk: Target) -> None:
    disk.good("00 e0 00 00 00 00")
    disk.good("12 20 00 00 60 00")
    disk.good("25 20 00 00 00 00 00 00 00 00")


def test_a_cdb_that_is_cut_off_is_refused(disk: Target) -> None:
    assert disk.bad("28 00 00 00") == "5/24/00:c4"


def test_padding_behind_the_cdb_is_passed_over(disk: Target) -> None:
    disk.good(bytes(6) + b"\xff" * 26)


def test_the_aca_attribute_is_refused(disk: Target) -> None:
    result = disk.send(TEST_UNIT_READY, attribute=Attribute.ACA)

    assert result.sense[12:14] == bytes.fromhex("49 00")
