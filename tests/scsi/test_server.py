"""REPORT LUNS, the LUN at which nothing is, and the well-known LUN."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scsi.conftest import ALICE, Target
from vhostfc.scsi import report
from vhostfc.scsi.task import ServiceResponse, TaskManagement

WELL_KNOWN = "c101000000000000"


def report_luns(select: int = 0, length: int = 4096, control: int = 0) -> bytes:
    return bytes(
        [
            0xA0,  # REPORT LUNS
            0x00,
            select,  # SELECT REPORT
            *(0x00, 0x00, 0x00),
            *length.to_bytes(4, "big"),  # ALLOCATION LENGTH
            0x00,
            control,
        ]
    )


def test_addressing_by_number(disk: Target) -> None:
    disk.numbers = (300, 0, 255, 256)

    assert disk.good(report_luns()) == bytes.fromhex(
        "00000020 00000000"  # 32 bytes follow
        "0000000000000000"  # 0, peripheral device addressing
        "00ff000000000000"  # 255
        "4100000000000000"  # 256, flat space addressing
        "412c000000000000"  # 300
    )


def test_select_report(disk: Target) -> None:
    assert disk.good(report_luns(0x00)).hex() == "00000008000000000000000000000000"
    assert disk.good(report_luns(0x01)).hex() == "0000000800000000" + WELL_KNOWN
    assert disk.good(report_luns(0x02)).hex() == "0000001000000000" + WELL_KNOWN + "0000000000000000"
    for select in (0x03, 0x10, 0x11, 0x12, 0xFF):
        assert disk.bad(report_luns(select)) == "5/24/00:c2"


def test_allocation_length_cuts_the_list_but_not_its_length_field(disk: Target) -> None:
    disk.numbers = tuple(range(10))

    assert disk.good(report_luns(length=16)).hex() == "0000005000000000" + "0000000000000000"


def test_all_device_servers_tell_the_same(disk: Target) -> None:
    disk.numbers = (1, 5)

    answers = {disk.good(report_luns(), at=server) for server in (disk.unit, disk.absent, disk.well_known)}

    assert answers == {bytes.fromhex("0000001000000000 0001000000000000 0005000000000000")}


def test_absent_unit_refuses_all_else(disk: Target) -> None:
    assert disk.bad("00 00 00 00 00 00", at=disk.absent) == "5/25/00"
    assert disk.bad("28 00 00 00 00 00 00 00 01 00", at=disk.absent) == "5/25/00"
    assert disk.bad("ff", b"data", at=disk.absent) == "5/25/00"
    assert disk.bad("", at=disk.absent) == "5/25/00"


def test_absent_unit_says_so_in_the_data_of_request_sense(disk: Target) -> None:
    assert disk.good("03 00 00 00 ff 00", at=disk.absent) == bytes.fromhex(
        "70 00 05 00000000 0a 00000000 25 00 00 000000"
    )
    assert disk.good("03 01 00 00 ff 00", at=disk.absent) == bytes.fromhex("72 05 25 00 00 00 00 00")
    assert disk.good("03 00 00 00 04 00", at=disk.absent) == bytes.fromhex("70 00 05 00")


def test_absent_unit_runs_nothing_and_manages_nothing(disk: Target) -> None:
    assert disk.absent.verdict(ALICE) == bytes(32)
    for function in TaskManagement:
        assert disk.run(disk.absent.manage(ALICE, function)) is ServiceResponse.INCORRECT_LUN


def test_well_known_unit_has_its_four_commands(disk: Target) -> None:
    disk.good("00 00 00 00 00 00", at=disk.well_known)
    assert disk.good("03 00 00 00 ff 00", at=disk.well_known)[2] == 0x00
    for cdb in ("25 00 00 00 00 00 00 00 00 00", "28 00 00 00 00 00 00 00 01 00", "c0 00"):
        assert disk.bad(cdb, at=disk.well_known) == "5/20/00"
    assert disk.run(disk.well_known.manage(ALICE, TaskManagement.LOGICAL_UNIT_RESET)) is (
        ServiceResponse.FUNCTION_COMPLETE
    )
    assert disk.run(disk.well_known.manage(ALICE, TaskManagement.CLEAR_ACA)) is ServiceResponse.FUNCTION_REJECTED
    assert disk.well_known.verdict(ALICE) == bytes(32)


@given(st.integers(0, 0x3FFF))
def test_every_lun_survives_the_trip(number: int) -> None:
    assert report.lun_number(report.lun_bytes(number)) == number


@pytest.mark.parametrize(
    ("lun", "number"),
    [
        ("4005000000000000", 5),  # flat addressing below 256, as some initiators send it
        ("0105000000000000", None),  # bus 1
        ("0005000100000000", None),  # a second level
        (WELL_KNOWN, None),
        ("00050000", None),
    ],
)
def test_other_spellings_of_a_lun(lun: str, number: int | None) -> None:
    assert report.lun_number(bytes.fromhex(lun)) == number


def test_a_lun_that_does_not_fit_is_our_bug() -> None:
    with pytest.raises(ValueError, match="16384"):
        report.lun_bytes(0x4000)
