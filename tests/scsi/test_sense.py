"""Sense data, byte by byte, in both formats."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scsi.conftest import describe
from vhostfc.scsi.sense import Asc, FieldPointer, Sense, SenseKey, invalid_cdb, invalid_parameter

BAD_BIT = Sense(SenseKey.ILLEGAL_REQUEST, Asc.INVALID_FIELD_IN_CDB, field=FieldPointer(2, 5))
BAD_BLOCK = Sense(SenseKey.MEDIUM_ERROR, Asc.UNRECOVERED_READ_ERROR, information=0x12345678)
FAR_BLOCK = Sense(SenseKey.MEDIUM_ERROR, Asc.WRITE_ERROR, information=0x123456789A)


def test_fixed_format_with_a_field_pointer() -> None:
    assert BAD_BIT.encode() == bytes(
        [
            0x70,  # current, fixed format, INFORMATION not valid
            0x00,  # obsolete
            0x05,  # ILLEGAL REQUEST
            *(0x00, 0x00, 0x00, 0x00),  # INFORMATION
            0x0A,  # ADDITIONAL SENSE LENGTH
            *(0x00, 0x00, 0x00, 0x00),  # COMMAND-SPECIFIC INFORMATION
            0x24,  # INVALID FIELD IN CDB
            0x00,
            0x00,  # FIELD REPLACEABLE UNIT CODE
            0xCD,  # SKSV, C/D, BPV, bit 5
            *(0x00, 0x02),  # byte 2
        ]
    )


def test_descriptor_format_with_a_field_pointer() -> None:
    assert BAD_BIT.encode(descriptor=True) == bytes(
        [
            0x72,  # current, descriptor format
            0x05,  # ILLEGAL REQUEST
            *(0x24, 0x00),  # INVALID FIELD IN CDB
            *(0x00, 0x00, 0x00),
            0x08,  # ADDITIONAL SENSE LENGTH
            0x02,  # sense-key specific descriptor
            0x06,
            *(0x00, 0x00),
            0xCD,  # SKSV, C/D, BPV, bit 5
            *(0x00, 0x02),  # byte 2
            0x00,
        ]
    )


def test_fixed_format_with_an_lba() -> None:
    assert BAD_BLOCK.encode() == bytes.fromhex("f0 00 03 12345678 0a 00000000 1100 00 000000")


def test_an_lba_beyond_32_bits_needs_descriptor_format() -> None:
    assert FAR_BLOCK.encode() == bytes.fromhex("70 00 03 00000000 0a 00000000 0c00 00 000000")
    assert FAR_BLOCK.encode(descriptor=True) == bytes.fromhex("72 03 0c00 000000 0c  00 0a 80 00 000000123456789a")


def test_command_specific_information() -> None:
    sense = Sense(SenseKey.COPY_ABORTED, Asc.THIRD_PARTY_DEVICE_FAILURE, command_specific=3)
    assert sense.encode() == bytes.fromhex("70 00 0a 00000000 0a 00000003 0d01 00 000000")
    assert sense.encode(descriptor=True) == bytes.fromhex("72 0a 0d01 000000 0c  01 0a 00 00 0000000000000003")


def test_a_field_of_the_parameter_list_without_a_bit() -> None:
    assert invalid_parameter(300).sense.encode()[15:] == bytes.fromhex("80 012c")


def test_a_field_of_the_cdb_without_a_bit() -> None:
    assert invalid_cdb(7).sense.encode()[15:] == bytes.fromhex("c0 0007")


@pytest.mark.parametrize("descriptor", [False, True])
@given(
    key=st.sampled_from(SenseKey),
    asc=st.sampled_from(Asc),
    information=st.none() | st.integers(0, 2**64 - 1),
    field=st.none()
    | st.builds(FieldPointer, st.integers(0, 1 << 20), st.none() | st.integers(0, 7), in_cdb=st.booleans()),
    number=st.none() | st.integers(1, 0xFFFF),
)
def test_every_sense_is_well_formed(
    descriptor: bool,
    key: SenseKey,
    asc: Asc,
    information: int | None,
    field: FieldPointer | None,
    number: int | None,
) -> None:
    said = describe(Sense(key, asc, information, field, number).encode(descriptor=descriptor))

    assert said.startswith(f"{key:X}/{asc >> 8:02X}/{asc & 0xFF:02X}")
    if information is not None and (descriptor or information < 2**32):
        assert said.removesuffix(f"#{number or 0:X}").endswith(f"@{information:X}")
    if number is not None:
        assert said.endswith(f"#{number:X}")
    if field is not None:
        assert (":c" if field.in_cdb else ":p") + str(min(field.byte, 0xFFFF)) in said
