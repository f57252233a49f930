"""FORMAT UNIT: what the blocks are afterwards, what is served meanwhile, and what it does not know how to do."""

from __future__ import annotations

import pytest

from tests.scsi.conftest import ALICE, BOB, Target, describe, target
from tests.scsi.test_sanitize import after_a_crash, filled
from tests.scsi.test_sanitize import sanitize as sanitize_cdb

IN_PROGRESS, FAILED = "2/04/04", "3/31/01"
FORMAT = bytes([0x04, 0, 0, 0, 0, 0])
FMTDATA, LONGLIST = 0x10, 0x20
FOV, IP, IMMED = 0x80, 0x08, 0x02
READ = "28 00 00000000 00 0001 00"


def with_data(flags: int, pattern: bytes | None = None, *, long: bool = False) -> tuple[bytes, bytes]:
    header = bytes([0, flags, *bytes(6 if long else 2)])
    body = b"" if pattern is None else bytes([0, bool(pattern)]) + len(pattern).to_bytes(2, "big") + pattern
    return bytes([0x04, FMTDATA | LONGLIST * long, 0, 0, 0, 0]), header + body


@pytest.mark.parametrize("thin", [True, False])
def test_all_blocks_are_zeros(thin: bool) -> None:
    disk = filled(target(thin=thin))
    disk.good(FORMAT)
    assert not any(disk.medium.data)
    assert bool(disk.medium.mapped) is not thin
    assert not disk.medium.notes
    assert disk.good(READ) == bytes(512)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("pattern", [b"\xa5", b"abc", b"z" * 512])
def test_a_pattern_is_repeated_in_each_block(disk: Target, pattern: bytes, long: bool) -> None:
    disk.good(*with_data(FOV | IP, pattern, long=long))
    assert disk.medium.data == (pattern * 512)[:512] * 64


@pytest.mark.parametrize("pattern", [None, b""])
def test_the_default_pattern(disk: Target, pattern: bytes | None) -> None:
    filled(disk)
    disk.good(*with_data(FOV | (0 if pattern is None else IP), pattern))
    assert not any(disk.medium.data)


def test_what_obsolete_and_vendor_specific_bytes_say_is_passed_over(disk: Target) -> None:
    disk.good(bytes([0x04, LONGLIST | 0x0F, 0xFF, 0xFF, 0, 0]))


def test_what_it_does_not_do(disk: Target) -> None:
    filled(disk)
    before = bytes(disk.medium.data)
    assert disk.bad(bytes([0x04, 0x40, 0, 0, 0, 0])) == "5/24/00:c1.7", "FMTPINFO"
    assert disk.bad(bytes([0x04, 0, 0, 0, 1, 0])) == "5/24/00:c4.0", "a fast format"
    short, long = (bytes([0x04, FMTDATA | flag, 0, 0, 0, 0]) for flag in (0, LONGLIST))
    for cdb, length in ((short, 3), (long, 7)):
        assert disk.bad(cdb, bytes(length)) == "5/1A/00"
    for data, said in (
        ("01 00 0000", "5/26/00:p0.0"),  # PROTECTION FIELDS USAGE
        ("00 08 0000", "5/26/00:p1.3"),  # IP without FOV
        ("00 40 0000", "5/26/00:p1.6"),  # DPRY without FOV
        ("00 84 0000", "5/26/00:p1.2"),
        ("00 81 0000", "5/26/00:p1.0"),
        ("00 00 0004 00000001", "5/26/00:p2"),  # a defect
        ("00 88 0000", "5/1A/00"),
        ("00 88 0000 20 01 0001 ff", "5/26/00:p4.5"),  # SI
        ("00 88 0000 00 02 0001 ff", "5/26/00:p5"),
        ("00 88 0000 00 00 0001 ff", "5/26/00:p6"),  # a default pattern of one byte
        ("00 88 0000 00 01 0000", "5/26/00:p6"),  # a pattern of none
        ("00 88 0000 00 01 0201" + "ff" * 513, "5/26/00:p6"),
        ("00 88 0000 00 01 0002 ff", "5/1A/00"),
    ):
        assert disk.bad(short, bytes.fromhex(data)) == said, data
    for data, said in (
        ("00 00 01 00 00000000", "5/26/00:p2"),
        ("00 00 00 01 00000000", "5/26/00:p3"),
        ("00 00 00 00 00000008", "5/26/00:p4"),
    ):
        assert disk.bad(long, bytes.fromhex(data)) == said, data
    assert bytes(disk.medium.data) == before
    assert not disk.medium.notes
    protected = target(read_only=True)
    assert protected.bad(FORMAT) == "7/27/00"


def test_while_it_goes_on() -> None:
    disk = target(4096)
    disk.good(*with_data(FOV | IP | IMMED, b"\x55"))
    for nexus in (ALICE, BOB):
        assert disk.unit.verdict(nexus) == bytes(32)
        for cdb in ("00 00 00 00 00 00", READ, FORMAT, sanitize_cdb(0x03)):
            assert disk.bad(cdb, nexus=nexus) == f"{IN_PROGRESS}:p0"
    disk.good("12 00 00 00 60 00")
    disk.go_on(3)
    assert describe(disk.good("03 00 00 00 12 00")) == f"{IN_PROGRESS}:p32768", "half of the blocks"
    disk.go_on()
    assert describe(disk.good("03 00 00 00 12 00")) == "0/00/00"
    assert disk.good(READ) == b"\x55" * 512


def test_a_crash_suspends_it(disk: Target) -> None:
    filled(disk)
    disk.good(*with_data(FOV | IP | IMMED, b"\x55"))
    again = after_a_crash(disk)
    assert again.bad("00 00 00 00 00 00") == f"{IN_PROGRESS}:p0"
    again.go_on()
    assert disk.medium.data == b"\x55" * 512 * 64


@pytest.mark.parametrize("way_out", [FORMAT, sanitize_cdb(0x03), sanitize_cdb(0x03, flags=0x20)])
def test_one_that_fails(disk: Target, way_out: bytes) -> None:
    filled(disk)
    disk.medium.broken.add(40)
    assert disk.bad(FORMAT) == FAILED
    one = after_a_crash(disk)
    assert one.unit.verdict(ALICE) == bytes(32)
    for cdb in ("00 00 00 00 00 00", READ):
        assert one.bad(cdb) == FAILED
    one.good("5a 00 3f 00 00 00 00 00ff 00")
    one.good(sanitize_cdb(0x1F))
    assert one.bad(READ) == FAILED, "EXIT FAILURE MODE is for what a SANITIZE has failed in"
    disk.medium.broken.clear()
    one.good(way_out)
    one.good(READ)


def test_it_is_no_way_out_of_a_sanitize_that_failed(disk: Target) -> None:
    disk.medium.broken.add(40)
    for flags in (0x00, 0x20):
        disk.bad(sanitize_cdb(0x03, flags=flags))
        assert disk.bad(FORMAT) == "3/31/03"
