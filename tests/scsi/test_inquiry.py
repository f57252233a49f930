"""INQUIRY: standard data and every vital product data page, whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scsi.conftest import NAA, Target, identity, target
from vhostfc.scsi import inquiry
from vhostfc.scsi.task import Nexus


def inquire(page: int | None = None, length: int = 0xFFFF) -> bytes:
    return bytes(
        [
            0x12,  # INQUIRY
            0x00 if page is None else 0x01,  # EVPD
            page or 0x00,  # PAGE CODE
            *length.to_bytes(2, "big"),  # ALLOCATION LENGTH
            0x00,  # CONTROL
        ]
    )


def test_standard_data(disk: Target) -> None:
    assert disk.good(inquire()) == bytes(
        [
            0x00,  # connected, direct access block device
            0x00,  # not removable
            0x06,  # SPC-4
            0x12,  # HISUP, response data format 2
            0x5B,  # 91 bytes follow
            0x38,  # TPGS: implicit and explicit; 3PC
            0x10,  # MULTIP
            0x02,  # CMDQUE
            *b"VHOSTFC ",
            *b"Software disk   ",
            *b"0001",
            *bytes(22),
            *(0x00, 0xA0),  # SAM-5
            *(0x0A, 0x40),  # FCP-4
            *(0x04, 0x60),  # SPC-4
            *(0x04, 0xC0),  # SBC-3
            *bytes(30),
        ]
    )


@pytest.mark.parametrize("length", [0, 1, 5, 36, 96, 97, 255])
def test_allocation_length_cuts(disk: Target, length: int) -> None:
    assert disk.good(inquire(length=length)) == disk.good(inquire())[:length]


def test_names_are_padded_cut_and_printable() -> None:
    data = inquiry.standard(identity(vendor="A-LONG-VENDOR", product="caf\u00e9", revision=""))

    assert data[8:36] == b"A-LONG-V" + b"caf?            " + b"    "


def test_one_port_is_not_multip() -> None:
    assert target(ports=()).good(inquire())[6] == 0x00


def test_page_code_without_evpd_is_refused(disk: Target) -> None:
    assert disk.bad("12 00 01 00 ff 00") == "5/24/00:c2"


def test_cmddt_is_refused(disk: Target) -> None:
    assert disk.bad("12 02 00 00 ff 00") == "5/24/00:c1.1"


def test_a_page_that_there_is_not(disk: Target) -> None:
    assert disk.bad("12 01 b3 00 ff 00") == "5/24/00:c2"


def test_page_00_supported_pages(disk: Target) -> None:
    assert disk.good(inquire(0x00)) == bytes.fromhex("00 00 000a  00 80 83 86 87 88 8f b0 b1 b2")


def test_each_supported_page_is_there_and_has_its_length(disk: Target) -> None:
    for page in disk.good(inquire(0x00))[4:]:
        data = disk.good(inquire(page))
        assert data[:2] == bytes([0x00, page])
        assert len(data) == 4 + int.from_bytes(data[2:4], "big")


def test_page_80_unit_serial_number(disk: Target) -> None:
    assert disk.good(inquire(0x80)) == bytes.fromhex("00 80 0006") + b"SN0001"


def test_page_83_device_identification(disk: Target) -> None:
    assert disk.good(inquire(0x83)) == bytes(
        [
            *(0x00, 0x83),
            *(0x00, 20 + 18 + 12 + 8 + 8 + 12),
            # NAA 6 of the logical unit
            *(0x01, 0x03, 0x00, 0x10, *NAA),
            # T10 vendor ID of the logical unit, ASCII
            *(0x02, 0x01, 0x00, 0x0E, *b"VHOSTFC SN0001"),
            # FCP, target port: its name
            *(0x01, 0x93, 0x00, 0x08, *bytes.fromhex("5006016000000001")),
            # its relative target port identifier
            *(0x01, 0x94, 0x00, 0x04, 0x00, 0x00, 0x00, 0x01),
            # its target port group
            *(0x01, 0x95, 0x00, 0x04, 0x00, 0x00, 0x00, 0x01),
            # target device: Node_Name
            *(0x01, 0xA3, 0x00, 0x08, *bytes.fromhex("5006016000000000")),
        ]
    )


def test_page_83_names_the_port_that_the_command_came_through(disk: Target) -> None:
    one = disk.good(inquire(0x83))
    two = disk.good(inquire(0x83), nexus=Nexus(b"alice", 2))

    assert one[:42] == two[:42]  # the unit is the same
    assert bytes.fromhex("0193000850060160000000020194000400000002" + "0195000400000002") in two


def test_page_86_extended_inquiry_data(disk: Target) -> None:
    # HEADSUP, ORDSUP, SIMPSUP; V_SUP; LUICLR
    assert disk.good(inquire(0x86)) == bytes.fromhex("00 86 003c 00 07 01 01") + bytes(56)


def test_page_b0_block_limits(disk: Target) -> None:
    assert disk.good(inquire(0xB0)) == bytes(
        [
            *(0x00, 0xB0, 0x00, 0x3C),
            0x01,  # WSNZ
            0xFF,  # MAXIMUM COMPARE AND WRITE LENGTH
            *(0x00, 0x00),  # OPTIMAL TRANSFER LENGTH GRANULARITY
            *(0x00, 0x01, 0x00, 0x00),  # MAXIMUM TRANSFER LENGTH: 32 MiB
            *(0x00, 0x00, 0x00, 0x00),  # OPTIMAL TRANSFER LENGTH
            *(0x00, 0x00, 0x00, 0x00),  # MAXIMUM PREFETCH LENGTH
            *(0x00, 0x10, 0x00, 0x00),  # MAXIMUM UNMAP LBA COUNT
            *(0x00, 0x00, 0x01, 0x00),  # MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT
            *(0x00, 0x00, 0x00, 0x01),  # OPTIMAL UNMAP GRANULARITY
            *(0x80, 0x00, 0x00, 0x00),  # UGAVALID, UNMAP GRANULARITY ALIGNMENT
            *(0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x08, 0x00),  # MAXIMUM WRITE SAME LENGTH: 1 MiB
            *(0x00, 0x00, 0x08, 0x00),  # MAXIMUM ATOMIC TRANSFER LENGTH: 1 MiB
            *bytes(16),  # ATOMIC ALIGNMENT, ATOMIC TRANSFER LENGTH GRANULARITY, with boundary, BOUNDARY SIZE
        ]
    )


def test_page_b0_of_a_512e_unit_asks_for_whole_physical_blocks() -> None:
    page = target(physical_exponent=3).good(inquire(0xB0))

    assert page[6:8] == bytes([0, 8])
    assert page[28:32] == bytes([0, 0, 0, 8])


def test_pages_b0_and_b2_of_a_fully_provisioned_unit() -> None:
    one = target(thin=False)

    assert one.good(inquire(0xB0))[20:36] == bytes(16)
    assert one.good(inquire(0xB2)) == bytes.fromhex("00 b2 0004 00 00 00 00")


def test_page_b1_says_that_nothing_rotates(disk: Target) -> None:
    # MEDIUM ROTATION RATE 1; WABEREQ and WACEREQ 01b; VBULS: VERIFY compares unmapped blocks too, as zeros
    assert disk.good(inquire(0xB1)) == bytes.fromhex("00 b1 003c 0001 00 50 01") + bytes(55)
    assert target(thin=False).good(inquire(0xB1))[7] == 0x10, "without provisioning there is no BLOCK ERASE"


def test_page_87_mode_page_policy(disk: Target) -> None:
    assert disk.good(inquire(0x87)) == bytes.fromhex("00 87 0004 3fff 00 00")


def test_page_88_scsi_ports(disk: Target) -> None:
    ports = b"".join(
        bytes.fromhex(f"0000 {number:04x} 0000 0000 0000 000c  01 93 00 08 500601600000{number:04x}")
        for number in (1, 2)
    )
    assert disk.good(inquire(0x88)) == bytes.fromhex("00 88 0030") + ports


def test_page_b2_logical_block_provisioning(disk: Target) -> None:
    # LBPU, LBPWS, LBPWS10, LBPRZ; thin
    assert disk.good(inquire(0xB2)) == bytes.fromhex("00 b2 0004 00 e4 02 00")


def test_well_known_unit(disk: Target) -> None:
    data = disk.good(inquire(), at=disk.well_known)

    assert data[:8] == bytes.fromhex("1e 00 06 12 5b 00 10 02")
    assert data[8:32] == b"VHOSTFC REPORT LUNS     "
    assert disk.good(inquire(0x00), at=disk.well_known) == bytes.fromhex("1e 00 0002 00 83")
    assert disk.good(inquire(0x83), at=disk.well_known)[4:8] == bytes.fromhex("01 93 00 08")
    assert disk.bad(inquire(0xB0), at=disk.well_known) == "5/24/00:c2"


def test_absent_unit(disk: Target) -> None:
    data = disk.good(inquire(), at=disk.absent)

    assert data == bytes.fromhex("7f 00 06 12 5b 00 00 02") + b" " * 28 + bytes(60)
    assert disk.good(inquire(0x00), at=disk.absent) == bytes.fromhex("7f 00 0001 00")
    assert disk.bad(inquire(0x83), at=disk.absent) == "5/24/00:c2"


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_no_name_makes_the_data_longer_or_unprintable(vendor: str, product: str, revision: str) -> None:
    data = inquiry.standard(identity(vendor=vendor, product=product, revision=revision))

    assert len(data) == 96
    assert all(0x20 <= byte <= 0x7E for byte in data[8:36])
