"""READ CAPACITY and the REPORT, LOG and diagnostic commands."""

from __future__ import annotations

import pytest

from tests.scsi.conftest import Target, target
from vhostfc.scsi.cdb import COMMANDS, SERVICE_ACTION_OPCODES
from vhostfc.scsi.task import Flush


def test_read_capacity_10(disk: Target) -> None:
    # last LBA 63, 512 bytes
    assert disk.good("25 00 00000000 00 00 00 00") == bytes.fromhex("0000003f 00000200")


def test_read_capacity_10_of_a_unit_beyond_32_bits(disk: Target) -> None:
    disk.unit.blocks = (1 << 33) + 5
    assert disk.good("25 00 00000000 00 00 00 00") == bytes.fromhex("ffffffff 00000200")
    disk.unit.blocks = 1 << 32
    assert disk.good("25 00 00000000 00 00 00 00") == bytes.fromhex("ffffffff 00000200")


def test_read_capacity_with_an_address_but_no_pmi(disk: Target) -> None:
    assert disk.bad("25 00 00000001 00 00 00 00") == "5/24/00:c2"
    assert disk.bad("9e 10 0000000000000001 00000020 00 00") == "5/24/00:c2"
    disk.good("25 00 00000001 00 00 01 00")


def test_read_capacity_16(disk: Target) -> None:
    cdb = bytes(
        [
            0x9E,  # SERVICE ACTION IN(16)
            0x10,  # READ CAPACITY(16)
            *bytes(8),  # obsolete
            *(0x00, 0x00, 0x00, 0x20),  # ALLOCATION LENGTH
            0x00,
            0x00,
        ]
    )
    assert disk.good(cdb) == bytes(
        [
            *(0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x3F),  # RETURNED LOGICAL BLOCK ADDRESS
            *(0x00, 0x00, 0x02, 0x00),  # LOGICAL BLOCK LENGTH
            0x00,  # PROT_EN 0
            0x00,  # one logical block per physical block
            0xC0,  # LBPME, LBPRZ
            0x00,
            *bytes(16),
        ]
    )


def test_read_capacity_16_of_other_geometries() -> None:
    cdb = "9e 10 0000000000000000 00000010 00 00"
    one = target(physical_exponent=3, thin=False)

    assert one.good(cdb) == bytes.fromhex("000000000000003f 00000200 00 03 0000")
    assert target(block_size=4096).good(cdb) == bytes.fromhex("000000000000003f 00001000 00 00 c000")


# ---------------------------------------------------------------- REPORT SUPPORTED OPERATION CODES


def rsoc(options: int, opcode: int = 0, action: int = 0, *, timeouts: bool = False, length: int = 0xFFFF) -> bytes:
    return bytes(
        [
            0xA3,  # MAINTENANCE IN
            0x0C,  # REPORT SUPPORTED OPERATION CODES
            options | 0x80 * timeouts,  # RCTD, REPORTING OPTIONS
            opcode,  # REQUESTED OPERATION CODE
            *action.to_bytes(2, "big"),  # REQUESTED SERVICE ACTION
            *length.to_bytes(4, "big"),  # ALLOCATION LENGTH
            0x00,
            0x00,
        ]
    )


#: CDBs of 32 bytes are not in the list of all: some read 16 bytes of usage data and no more.
LISTED = [command for command in COMMANDS if len(command.usage) <= 16]


def test_all_commands(disk: Target) -> None:
    data = disk.good(rsoc(0))

    assert int.from_bytes(data[:4], "big") == len(data) - 4 == 8 * len(LISTED)
    listed = [data[at : at + 8] for at in range(4, len(data), 8)]
    assert bytes.fromhex("00 00 0000 00 00 0006") in listed  # TEST UNIT READY
    assert bytes.fromhex("9e 00 0010 00 01 0010") in listed  # READ CAPACITY(16): SERVACTV
    assert bytes.fromhex("a3 00 000c 00 01 000c") in listed


def test_all_commands_with_timeouts(disk: Target) -> None:
    data = disk.good(rsoc(0, timeouts=True))

    assert int.from_bytes(data[:4], "big") == len(data) - 4 == 20 * len(LISTED)
    # TEST UNIT READY: CTDP; nominal 1 s, recommended 30 s
    assert data[4:24] == bytes.fromhex("00 00 0000 00 02 0006 000a 00 00 00000001 0000001e")


def test_one_command(disk: Target) -> None:
    assert disk.good(rsoc(1, 0x28)) == bytes.fromhex("00 03 000a  28 f8 ffffffff 00 ffff 00")
    assert disk.good(rsoc(3, 0x28)) == bytes.fromhex("00 03 000a  28 f8 ffffffff 00 ffff 00")
    assert disk.good(rsoc(2, 0x9E, 0x12)) == bytes.fromhex("00 03 0010  9e 12 ffffffffffffffffffffffff 00 00")
    assert disk.good(rsoc(1, 0x12, timeouts=True)) == bytes.fromhex(
        "00 83 0006  12 01 ff ff ff 00  000a 00 00 00000001 0000001e"
    )


def test_a_command_of_32_bytes_is_told_when_asked_for(disk: Target) -> None:
    usage = "7f 00 00000000 00 18 0009 f8 00" + "ff" * 8 + "00" * 8 + "ff" * 4
    assert disk.good(rsoc(2, 0x7F, 0x09)) == bytes.fromhex("00 03 0020" + usage)
    assert disk.good(rsoc(2, 0x7F, 0x08)) == bytes.fromhex("00 01 0000")


def test_commands_that_there_are_not(disk: Target) -> None:
    for request in (rsoc(1, 0xC0), rsoc(2, 0xC0, 1), rsoc(3, 0xC0), rsoc(2, 0x9E, 0x1F), rsoc(3, 0x28, 1)):
        assert disk.good(request) == bytes.fromhex("00 01 0000")


def test_options_must_fit_the_command(disk: Target) -> None:
    assert disk.bad(rsoc(1, 0x9E)) == "5/24/00:c2.2"
    assert disk.bad(rsoc(2, 0x28)) == "5/24/00:c2.2"
    assert disk.bad(rsoc(4)) == "5/24/00:c2.2"


def test_what_is_reported_can_be_asked_for_one_by_one(disk: Target) -> None:
    data = disk.good(rsoc(0))
    for at in range(4, len(data), 8):
        opcode, action, has_action = data[at], int.from_bytes(data[at + 2 : at + 4], "big"), data[at + 5] & 1
        one = disk.good(rsoc(2 if has_action else 1, opcode, action))
        assert one[1] == 0x03
        assert one[4] == opcode
        assert len(one) - 4 == int.from_bytes(one[2:4], "big") == int.from_bytes(data[at + 6 : at + 8], "big")
        assert bool(has_action) == (opcode in SERVICE_ACTION_OPCODES)


def test_a_fully_provisioned_unit_has_no_unmap() -> None:
    one = target(thin=False)

    assert one.good(rsoc(1, 0x42)) == bytes.fromhex("00 01 0000")
    assert one.bad("42 00 00000000 00 0000 00") == "5/20/00"
    assert one.bad("9e 12" + "00" * 14) == "5/24/00:c1.4"


def test_every_command_of_the_table_is_run_by_somebody(disk: Target) -> None:
    """Each CDB of zeros ends in a status, and never in INVALID COMMAND OPERATION CODE."""
    for command in COMMANDS:
        cdb = bytes([command.opcode, command.service_action or 0]).ljust(len(command.usage), b"\0")
        result = disk.send(cdb, bytes(2048))
        assert result.status in (0x00, 0x02)
        assert result.sense[12:14] != bytes.fromhex("2000"), command.name


# ---------------------------------------------------------------- the rest


def test_supported_task_management_functions(disk: Target) -> None:
    # ATS, ATSS, CTSS, LURS
    assert disk.good("a3 0d 00 000000 00000010 00 00") == bytes.fromhex("d8 02 00 00")
    assert disk.good("a3 0d 80 000000 00000010 00 00") == bytes.fromhex("d8 02 00 0c") + bytes(12)
    assert disk.good("a3 0d 80 000000 00000004 00 00") == bytes.fromhex("d8 02 00 0c")
    for length in range(4):
        assert disk.bad(f"a3 0d 00 000000 0000000{length} 00 00") == "5/24/00:c6", "SPC-4 6.36: four at least"


def test_log_sense_has_the_page_of_pages(disk: Target) -> None:
    assert disk.good("4d 00 40 00 00 0000 00ff 00") == bytes.fromhex("00 00 0001 00")
    assert disk.good("4d 00 40 ff 00 0000 00ff 00") == bytes.fromhex("40 ff 0004 0000 00ff")
    assert disk.bad("4d 00 42 00 00 0000 00ff 00") == "5/24/00:c2.5"
    assert disk.bad("4d 00 40 01 00 0000 00ff 00") == "5/24/00:c3"
    assert disk.bad("4d 01 40 00 00 0000 00ff 00") == "5/24/00:c1.0"


def test_defect_lists_are_empty(disk: Target) -> None:
    # REQ_PLIST, REQ_GLIST, physical sector format
    assert disk.good("37 00 1d 00000000 0008 00") == bytes.fromhex("00 1d 0000")
    assert disk.good("b7 1d 00000000 00000008 00 00") == bytes.fromhex("00 1d 0000 00000000")


@pytest.mark.parametrize(
    ("cdb", "effects"),
    [
        ("1b 00 00 00 01 00", []),  # START
        ("1b 00 00 00 00 00", [Flush()]),  # stop: the cache goes to the medium
        ("1b 01 00 00 00 00", [Flush()]),  # IMMED
        ("1b 00 00 00 04 00", []),  # NO_FLUSH
    ],
)
def test_start_stop_unit(disk: Target, cdb: str, effects: list[Flush]) -> None:
    disk.good(cdb)

    assert disk.effects == effects
    disk.good("28 00 00000000 00 0001 00")  # it still runs


def test_start_stop_unit_refuses_what_a_fixed_disk_has_not(disk: Target) -> None:
    assert disk.bad("1b 00 00 00 02 00") == "5/24/00:c4.1"  # LOEJ
    assert disk.bad("1b 00 00 00 10 00") == "5/24/00:c4.7"  # POWER CONDITION
    assert disk.bad("1b 00 00 01 00 00") == "5/24/00:c3.3"  # POWER CONDITION MODIFIER


def test_prevent_allow_medium_removal(disk: Target) -> None:
    disk.good("1e 00 00 00 01 00")
    disk.good("1e 00 00 00 00 00")
    assert disk.bad("1e 00 00 00 02 00") == "5/24/00:c4.1"


def test_send_diagnostic_runs_the_default_self_test(disk: Target) -> None:
    disk.good("1d 04 00 0000 00")  # SELFTEST
    disk.good("1d 00 00 0000 00")
    assert disk.bad("1d 20 00 0000 00") == "5/24/00:c1.7"  # a background self-test
    assert disk.bad("1d 10 00 0004 00", bytes(4)) == "5/24/00:c3"  # a diagnostic page
