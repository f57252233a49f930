"""EXTENDED COPY within a unit and between units, and what RECEIVE COPY RESULTS tells of it."""

from __future__ import annotations

import pytest

from tests.scsi.conftest import ALICE, BOB, NAA, Target, target
from vhostfc.scsi.alua import AccessState
from vhostfc.scsi.sense import Asc
from vhostfc.scsi.task import Nexus, Task, TaskManagement

SIZE = 512


def cscd(naa: bytes = NAA, *, kind: int = 0xE4, device: int = 0, block: int = SIZE, lu_id: int = 0) -> bytes:
    """An identification descriptor (SPC-4 6.4.5.8) with an NAA designator."""
    head = bytes([kind, lu_id << 6 | device, 0, 0, 0x01, 0x03, 0, len(naa)])
    return head + naa.ljust(20, b"\0") + block.to_bytes(4, "big")


def segment(source: int, destination: int, blocks: int, start: int, to: int, *, kind: int = 0x02) -> bytes:
    """A block to block segment (SPC-4 6.4.6.4)."""
    head = bytes([kind, 0]) + (24).to_bytes(2, "big") + source.to_bytes(2, "big") + destination.to_bytes(2, "big")
    return head + bytes(2) + blocks.to_bytes(2, "big") + start.to_bytes(8, "big") + to.to_bytes(8, "big")


def parameters(
    cscds: list[bytes], segments: list[bytes], *, list_id: int = 1, usage: int = 0, inline: int = 0
) -> bytes:
    targets, parts = b"".join(cscds), b"".join(segments)
    head = bytes([list_id, usage << 3]) + len(targets).to_bytes(2, "big") + bytes(4)
    head += len(parts).to_bytes(4, "big") + inline.to_bytes(4, "big")
    return head + targets + parts + bytes(inline)


def cdb(data: bytes, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return bytes([0x83, 0, *bytes(8), *size.to_bytes(4, "big"), 0, 0])


def copy(one: Target, data: bytes, length: int | None = None) -> str:
    result = one.send(cdb(data, length), data)
    if result.status == 0:
        return "good"
    return one.bad(cdb(data, length), data)


def block(n: int) -> bytes:
    return bytes([n]) * SIZE


@pytest.fixture
def filled(disk: Target) -> Target:
    disk.medium.data[:] = b"".join(block(n) for n in range(64))
    return disk


def status(one: Target, list_id: int = 1) -> bytes:
    return one.good(bytes([0x84, 0, list_id, *bytes(7), 0, 0, 0, 12, 0, 0]))


def test_blocks_are_copied(filled: Target) -> None:
    data = parameters([cscd()], [segment(0, 0, 3, 4, 40), segment(0, 0, 1, 9, 60)])
    assert copy(filled, data) == "good"
    expected = [*range(64)]
    expected[40:43], expected[60] = [4, 5, 6], 9
    assert filled.medium.data == b"".join(block(n) for n in expected)


@pytest.mark.parametrize(("start", "to"), [(0, 5), (5, 0)])
def test_overlapping_blocks_in_pieces(start: int, to: int) -> None:
    """4 MiB and a bit: five pieces, the destination within the source."""
    blocks = 8192 + 7
    one = target(blocks=blocks + 10)
    one.medium.data[:] = b"".join(n.to_bytes(4, "big") * 128 for n in range(blocks + 10))
    before = bytes(one.medium.data[start * SIZE : (start + blocks) * SIZE])
    assert copy(one, parameters([cscd()], [segment(0, 0, blocks, start, to)])) == "good"
    assert one.medium.data[to * SIZE : (to + blocks) * SIZE] == before


def test_the_unit_goes_by_its_t10_designator_too(filled: Target) -> None:
    name = b"VHOSTFC SN0001"
    one = bytes([0xE4, 0, 0, 0, 0x02, 0x01, 0, len(name)]) + name.ljust(20, b"\0") + SIZE.to_bytes(4, "big")
    assert copy(filled, parameters([one], [segment(0, 0, 1, 1, 2)])) == "good"


def test_nothing_to_do(filled: Target) -> None:
    assert copy(filled, b"", 0) == "good"
    assert copy(filled, parameters([], [])) == "good"
    assert copy(filled, parameters([cscd(lu_id=3)], [segment(0, 0, 0, 0, 0)])) == "good"


def test_lists_that_are_wrong(filled: Target) -> None:
    good = parameters([cscd()], [segment(0, 0, 1, 1, 2)])
    for length in (1, 15, 16 + 31, len(good) - 1):
        assert copy(filled, good, length) == "5/1A/00"
    assert copy(filled, good + bytes(1)) == "5/1A/00"
    assert copy(filled, parameters([cscd()], [], inline=8)) == "5/26/0B"
    assert copy(filled, parameters([cscd()] * 9, [segment(0, 0, 1, 1, 2)])) == "5/26/06"
    assert copy(filled, parameters([cscd()], [segment(0, 0, 1, 1, 2)] * 17)) == "5/26/08"
    assert copy(filled, parameters([cscd()] * 9, [segment(0, 0, 1, 1, 2)] * 17)) == "5/1A/00"
    assert copy(filled, parameters([cscd(kind=0xE0)], [segment(0, 0, 1, 1, 2)])) == "5/26/07"
    assert copy(filled, parameters([cscd()], [segment(0, 0, 1, 1, 2, kind=3)])) == "5/26/09"
    assert copy(filled, parameters([cscd()[:31]], [])) == "5/26/00:p2"
    assert copy(filled, parameters([cscd()], [segment(0, 0, 1, 1, 2)[:27]])) == "5/26/00:p50"
    assert copy(filled, parameters([cscd()], [segment(0, 0, 1, 1, 2)], usage=1)) == "5/26/00:p1.4"
    assert copy(filled, parameters([cscd()], [segment(0, 0, 1, 1, 2)], usage=3)) == "5/26/00:p0", "LIST IDENTIFIER"
    assert filled.effects == []


def test_segments_that_lead_elsewhere(filled: Target) -> None:
    """The field pointer is of the CSCD descriptor, or of what is wrong in the segment (SPC-4 5.17.7.4)."""
    assert copy(filled, parameters([cscd()], [segment(1, 0, 1, 1, 2)])) == "A/08/04:p52"
    assert copy(filled, parameters([cscd()], [segment(0, 1, 1, 1, 2)])) == "A/08/04:p54"
    assert copy(filled, parameters([cscd(), cscd(OTHER)], [segment(0, 1, 1, 1, 2)])) == "A/0D/02:p48"
    assert copy(filled, parameters([cscd(device=5)], [segment(0, 0, 1, 1, 2)])) == "A/0D/03:p16"
    assert copy(filled, parameters([cscd(block=4096)], [segment(0, 0, 1, 1, 2)])) == "A/0D/03:p16"
    for start, to, at in ((0, 63, 68), (63, 0, 60), (2**64 - 1, 0, 60)):
        assert copy(filled, parameters([cscd()], [segment(0, 0, 2, start, to)])) == f"A/00/00:p{at}"
    null = bytearray(cscd())
    null[1] |= 0x20
    for source, destination in ((0, 1), (1, 0)):
        said = copy(filled, parameters([cscd(), bytes(null)], [segment(source, destination, 1, 1, 2)]))
        assert said == "A/08/04:p48", "NUL: that device is none of ours, whatever else is in its descriptor"
    assert filled.medium.data == b"".join(block(n) for n in range(64))


def test_one_that_fails_says_where(two: Target) -> None:
    """The segment's number, and how many of its blocks are left if some were written (SPC-4 5.17.7.4)."""
    first = segment(0, 1, 1, 1, 1)
    assert copy(two, parameters([cscd(), cscd(OTHER)], [first, segment(0, 1, 2, 0, 31)])) == "A/00/00:p128#1"
    (other,) = two.others
    other.medium.broken.add(20)
    assert copy(two, parameters([cscd(), cscd(OTHER)], [first, first, segment(0, 1, 1, 0, 20)])) == "A/0D/01:p48#2"
    two.medium.broken.add(9)
    assert copy(two, parameters([cscd(), cscd(OTHER)], [first, segment(0, 1, 1, 9, 0)])) == "A/0D/01:p16#1"


@pytest.mark.parametrize(("start", "to", "left"), [(4200, 0, 2048 + 7), (0, 4200, 2 * 2048 + 7)])
def test_one_that_fails_halfway_says_how_much_is_left(start: int, to: int, left: int) -> None:
    """Pieces of 1 MiB, the second one fails; what is copied out of order, from the end, counts as left."""
    one = target(blocks=8400)
    one.medium.broken.add(start + 2048 + 5)
    assert copy(one, parameters([cscd()], [segment(0, 0, 2 * 2048 + 7, start, to)])) == f"A/0D/01:p16@{left:X}"
    assert status(one) == bytes.fromhex("00000008 02 0001 00") + (512 * (2 * 2048 + 7 - left)).to_bytes(4, "big")


OTHER = bytes.fromhex("6001a4a000000000 0000000000000002")


@pytest.fixture
def two(filled: Target) -> Target:
    """The filled one, beside another of 32 blocks."""
    other = target(32, naa=(OTHER,), serial="SN0002")
    filled.others.append(other)
    return filled


def test_blocks_are_copied_between_units_that_the_initiator_sees(two: Target) -> None:
    (other,) = two.others
    data = parameters(
        [cscd(), cscd(OTHER)], [segment(0, 1, 3, 4, 10), segment(1, 0, 2, 11, 60), segment(1, 1, 1, 12, 0)]
    )
    assert copy(two, data) == "good"
    assert other.medium.data == b"".join(block({10: 4, 11: 5, 12: 6, 0: 6}.get(n, 0)) for n in range(32))
    assert two.medium.data[60 * SIZE : 62 * SIZE] == block(5) + block(6)
    assert status(two) == bytes.fromhex("00000008 01 0003 00 00000c00")
    # Each unit by its own size and block size
    assert copy(two, parameters([cscd(), cscd(OTHER)], [segment(0, 1, 1, 0, 32)])) == "A/00/00:p100"
    assert copy(two, parameters([cscd(), cscd(OTHER, block=4096)], [segment(0, 1, 1, 0, 0)])) == "A/0D/03:p48"


def test_blocks_of_another_size_are_not_copied(filled: Target) -> None:
    filled.others.append(target(8, block_size=4096, naa=(OTHER,), serial="SN0002"))
    data = parameters([cscd(), cscd(OTHER, block=4096)], [segment(0, 1, 1, 0, 0)])
    assert copy(filled, data) == "A/0D/03:p48"


@pytest.mark.parametrize("what", ["reserved", "write protected", "standby", "sanitizing", "broken"])
def test_a_copy_gives_no_rights_at_the_other_unit(two: Target, what: str) -> None:
    (other,) = two.others
    match what:
        case "reserved":
            other.good("16 00 00 00 00 00", nexus=BOB)
        case "write protected":
            other.good("15 10 00 00 10 00", bytes(4) + bytes.fromhex("0a 0a 02 10 08 40 00 00 ffff 0000"))
        case "standby":
            other.unit.set_access({1: AccessState.STANDBY})
        case "sanitizing":
            other.good("48 83 00 00 00 00 00 0000 00")
        case _:
            other.medium.broken.add(20)
    assert copy(two, parameters([cscd(), cscd(OTHER)], [segment(0, 1, 1, 1, 20)])) == "A/0D/01:p48"
    assert not any(other.medium.data)
    expected = "good" if what == "write protected" else "A/0D/01:p48"
    assert copy(two, parameters([cscd(), cscd(OTHER)], [segment(1, 0, 1, 20, 1)])) == expected


def test_what_one_has_to_hear_at_the_other_unit_is_no_hindrance(two: Target) -> None:
    (other,) = two.others
    other.unit.attention(Asc.CAPACITY_DATA_HAS_CHANGED)
    assert copy(two, parameters([cscd(), cscd(OTHER)], [segment(0, 1, 1, 1, 20)])) == "good"
    assert other.bad("00 00 00 00 00 00") == "6/2A/09"


def test_a_copy_from_a_unit_that_is_write_protected() -> None:
    one = target(read_only=True)
    one.others.append(target(naa=(OTHER,), serial="SN0002"))
    one.medium.data[SIZE : 2 * SIZE] = block(9)
    assert copy(one, parameters([cscd(), cscd(OTHER)], [segment(0, 1, 1, 1, 2)])) == "good"
    assert one.others[0].medium.data[2 * SIZE : 3 * SIZE] == block(9)


def test_copy_status(filled: Target) -> None:
    assert filled.bad(bytes([0x84, 0, 1, *bytes(7), 0, 0, 0, 12, 0, 0])) == "5/24/00:c2"
    copy(filled, parameters([cscd()], [segment(0, 0, 2, 1, 5), segment(0, 0, 1, 1, 9)]))
    assert filled.bad(bytes([0x84, 0, 1, *bytes(7), 0, 0, 0, 12, 0, 0]), nexus=BOB) == "5/24/00:c2"
    # done without errors, 2 segments, 1536 bytes
    assert status(filled) == bytes.fromhex("00000008 01 0002 00 00000600")
    assert filled.bad(bytes([0x84, 0, 1, *bytes(7), 0, 0, 0, 12, 0, 0])) == "5/24/00:c2", "told once"
    filled.send(cdb(data := parameters([cscd()], [segment(0, 0, 1, 1, 5), segment(0, 1, 1, 1, 9)])), data)
    # with errors, in the second segment
    assert status(filled) == bytes.fromhex("00000008 02 0002 00 00000200")
    copy(filled, parameters([cscd()], [segment(0, 0, 1, 1, 5)], list_id=0, usage=3))
    assert filled.bad(bytes([0x84, 0, 0, *bytes(7), 0, 0, 0, 12, 0, 0])) == "5/24/00:c2", "nobody wanted it kept"


def details(one: Target, list_id: int = 1, *, nexus: Nexus = ALICE) -> bytes:
    return one.good(bytes([0x84, 4, list_id, *bytes(7), 0, 0, 1, 0, 0, 0]), nexus=nexus)


def test_failure_details(filled: Target) -> None:
    """SPC-4 6.23: status and sense data of the command, once."""
    no_details = bytes([0x84, 4, 1, *bytes(7), 0, 0, 1, 0, 0, 0])
    assert filled.bad(no_details) == "5/24/00:c2"
    copy(filled, parameters([cscd()], [segment(0, 0, 1, 1, 5)]))
    assert details(filled) == bytes(4), "nothing has failed"
    assert filled.bad(no_details) == "5/24/00:c2"
    failed = filled.send(cdb(data := parameters([cscd()], [segment(0, 1, 1, 1, 9)], usage=2)), data)
    assert filled.bad(no_details, nexus=BOB) == "5/24/00:c2"
    assert details(filled) == bytes.fromhex("0000004a" + "00" * 52 + "02 00 0012") + failed.sense
    assert filled.bad(no_details) == "5/24/00:c2", "told once"
    assert status(filled)[4] == 2, "which is another matter"


def test_while_a_copy_goes_on(filled: Target) -> None:
    data = parameters([cscd()], [segment(0, 0, 2, 1, 5), segment(0, 0, 1, 1, 9)])
    going = filled.unit.execute(Task(ALICE, cdb(data), data))
    effect, effects = next(going), 0
    while effects < 3:  # a read, a write, and a read of the second segment
        effect, effects = going.send(filled.medium.do(effect)), effects + 1
    for _ in range(2):
        assert status(filled) == bytes.fromhex("00000008 00 0002 00 00000400"), "so far"
    assert filled.bad(bytes([0x84, 4, 1, *bytes(7), 0, 0, 1, 0, 0, 0])) == "5/24/00:c2", "it has not failed"
    assert copy(filled, data) == "5/00/16", "its identifier is taken"
    assert copy(filled, parameters([cscd()], [segment(0, 0, 1, 1, 5)], list_id=2)) == "good"
    assert filled.send(cdb(data), data, nexus=BOB).status == 0, "by this nexus"
    going.close()
    assert status(filled) == bytes.fromhex("00000008 02 0002 00 00000400"), "it was aborted"
    assert details(filled)[56] == 0x40
    again = filled.unit.execute(Task(ALICE, cdb(data), data))
    next(again)
    filled.unit.detach(ALICE)
    again.close()
    filled.unit.attach(ALICE)
    assert filled.bad("00 00 00 00 00 00") == "6/29/07"
    assert filled.bad(bytes([0x84, 0, 1, *bytes(7), 0, 0, 0, 12, 0, 0])) == "5/24/00:c2"


def test_a_reset_forgets_how_copies_ended(filled: Target) -> None:
    copy(filled, parameters([cscd()], [segment(0, 0, 1, 0, 20)], usage=0))
    filled.manage(TaskManagement.LOGICAL_UNIT_RESET)
    assert filled.bad("00 00 00 00 00 00") == "6/29/03"
    assert filled.bad(b"\x84\x00\x01" + bytes(7) + b"\0\0\0\x40\0\0") == "5/24/00:c2"


def test_operating_parameters_and_page_8f_say_the_same(filled: Target) -> None:
    # SNLID; 8 CSCDs, 16 segments, 704 bytes; 65535 blocks a segment; one copy at a time; the two descriptors
    data = filled.good("84 03" + "00" * 8 + "00000100 0000")
    assert data == bytes.fromhex(
        "0000002a 01 000000 0008 0010 000002c0 01fffe00 00000000 00000000 00000000 0000 0001 01 00 00 00 000000 02 02e4"
    )
    assert filled.good("12 01 8f 00 ff 00") == bytes.fromhex(
        "00 8f 0064"
        "0001 000c 08 830100 8403000304 000000"
        "0004 001c 00000000 0008 0010 000002c0 00000000" + "00" * 12 + "0008 0004 02 02e4 00"
        "000c 0004 0000 0000"
        "8001 0020 00000001 00000001 01fffe00 00 00" + "00" * 18
    )


def test_a_write_protected_unit_is_not_copied_to() -> None:
    one = target(read_only=True)
    data = parameters([cscd()], [segment(0, 0, 1, 1, 2)])
    assert copy(one, data) == "7/27/00"
