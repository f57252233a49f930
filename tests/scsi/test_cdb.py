"""How much data-out a command has a use for, as its CDB says."""

from __future__ import annotations

import pytest

from vhostfc.scsi.cdb import COMMANDS, data_out_length

SIZE = 512


@pytest.mark.parametrize(
    ("cdb", "length"),
    [
        ("0a 00 00 00 00 00", 256 * SIZE),
        ("2a 00 00000000 00 0003 00", 3 * SIZE),
        ("8a 00 0000000000000000 00010000 00 00", 65536 * SIZE),
        ("2e 00 00000000 00 0003 00", 3 * SIZE),
        ("9c 00 0000000000000000 0000 0003 00 00", 3 * SIZE),
        ("8b 00 0000000000000000 00000003 00 00", 3 * SIZE),
        ("89 00 0000000000000000 000000 03 00 00", 6 * SIZE),
        ("7f 00 00000000 00 18 000b 00 00" + "00" * 16 + "00000003", 3 * SIZE),
        ("2f 00 00000000 00 0003 00", 0),
        ("2f 02 00000000 00 0003 00", 3 * SIZE),
        ("2f 06 00000000 00 0003 00", SIZE),
        ("2f 06 00000000 00 0000 00", 0),
        ("41 00 00000000 00 0003 00", SIZE),
        ("93 00 0000000000000000 00000003 00 00", SIZE),
        ("93 01 0000000000000000 00000003 00 00", 0),
        ("15 10 00 00 18 00", 24),
        ("55 10 00 00 00 00 00 0118 00", 280),
        ("42 00 00000000 00 0018 00", 24),
        ("48 01 0000000000 0204 00", 516),
        ("5f 00 00 0000 00000018 00", 24),
        ("83 00" + "00" * 8 + "0000003c 00 00", 60),
        ("a4 0a 00000000 00000008 00 00", 8),
        ("00 00 00 00 00 00", 0),
        ("12 00 00 00 24 00", 0),
        ("28 00 00000000 00 0003 00", 0),
        ("ee 00 00 00 00 00", None),
        ("", None),
        ("15", None),
        ("04 10 00 00 00 00", None),  # its parameter list says so itself
    ],
)
def test_data_out_length(cdb: str, length: int | None) -> None:
    assert data_out_length(bytes.fromhex(cdb), SIZE) == length


def test_all_that_change_the_medium_but_for_those_without_data_have_some() -> None:
    """With every bit of the CDB set that the command knows; SANITIZE and FORMAT UNIT are not told from it."""
    without = {one.name for one in COMMANDS if one.writes and not data_out_length(one.usage, SIZE)}
    assert without == {
        "FORMAT UNIT",
        "SANITIZE, BLOCK ERASE",
        "SANITIZE, CRYPTOGRAPHIC ERASE",
        "SANITIZE, EXIT FAILURE MODE",
        "WRITE SAME(16)",  # NDOB
        "WRITE SAME(32)",
    }
