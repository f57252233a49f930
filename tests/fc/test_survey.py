"""Which disk stands at a LUN, and that nobody's command reaches another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fc.conftest import Pair
from tests.fc.tiny import BLOCK, INVALID_FIELD, Done, lun, page_83
from vhostfc.fc.discovery import TopologyChanged
from vhostfc.fc.fcp import FcpCmnd
from vhostfc.fc.frame import Frame, RCtl
from vhostfc.fc.remote import RemoteState
from vhostfc.fc.survey import parse_names

IDENTIFY = b"\x12\x01\x83"
BUSY = 0x08


def name(of: bytes) -> bytes:
    return parse_names(page_83(of))


def test_each_unit_is_asked_who_it_is(online: Pair) -> None:
    assert online.remote.names == {lun(0): name(lun(0)), lun(3): name(lun(3))}
    assert [cmnd.lun for cmnd in online.array.seen if cmnd.cdb[:3] == IDENTIFY] == [lun(0), lun(3)]


def test_another_disk_in_the_same_place_is_noticed(online: Pair) -> None:
    online.take_events()
    online.array.names[lun(3)] = b"another"
    online.inject(online.fabric.rscn(online.port.port_id, 0x01FE01))

    assert online.remote.units == (lun(0), lun(3))
    assert online.remote.names == {lun(0): name(lun(0)), lun(3): name(b"another")}
    assert TopologyChanged() in online.take_events()


def test_after_a_login_nothing_may_go_there_before_we_have_looked(online: Pair) -> None:
    """Whoever broke the login may have put other disks there."""
    online.array.hold = True
    online.inject(online.array.logo(online.port.port_id))
    assert online.remote.state is RemoteState.SCAN
    assert online.remote.logged_in
    assert not online.remote.usable

    online.array.hold = False
    online.inject(*online.array.release())
    assert online.remote.usable


def test_a_look_around_in_between_stops_nobody(online: Pair) -> None:
    online.array.hold = True
    online.port.rescan(online.now)
    online.settle()

    assert online.remote.state is RemoteState.SCAN
    assert online.remote.usable


def test_a_new_login_whose_look_comes_to_nothing_is_none(online: Pair) -> None:
    """Rather wait than write to we know not what."""
    online.array.script = lambda cmnd: Done(BUSY) if cmnd.cdb[0] == 0xA0 else None
    online.inject(online.array.logo(online.port.port_id))
    online.advance(5)
    assert not online.remote.usable

    online.array.script = lambda _cmnd: None
    online.advance(60)
    assert online.remote.usable
    assert online.remote.units == (lun(0), lun(3))


def test_a_unit_that_is_busy_is_asked_again(pair: Pair) -> None:
    left = [1, 1]

    def script(cmnd: FcpCmnd) -> Done | None:
        return Done(BUSY) if cmnd.cdb[:3] == IDENTIFY and cmnd.lun == lun(3) and left and left.pop() else None

    pair.array.script = script
    pair.up()
    pair.advance(2)

    assert not left
    assert pair.remote.names[lun(3)] == name(lun(3))


@pytest.mark.parametrize("answer", [Done(2, sense=INVALID_FIELD), Done(BUSY), Done(data=b"\0" * 36)])
def test_a_unit_that_does_not_say_keeps_the_name_it_had(online: Pair, answer: Done) -> None:
    online.array.script = lambda cmnd: answer if cmnd.cdb[:3] == IDENTIFY else None
    online.port.rescan(online.now)
    online.settle()
    online.advance(5)

    assert online.remote.state is RemoteState.READY
    assert online.remote.names == {lun(0): name(lun(0)), lun(3): name(lun(3))}


def test_many_units_are_asked_some_at_a_time(pair: Pair) -> None:
    def is_question(frame: Frame) -> bool:
        return frame.r_ctl == RCtl.DATA_UNSOLICITED_COMMAND and frame.payload[12:15] == IDENTIFY

    pair.array.units = {lun(number): bytearray(BLOCK) for number in range(100)}
    pair.lose = is_question
    pair.up()
    assert sum(map(is_question, pair.sent)) == 16

    pair.lose = lambda _frame: False
    pair.advance(60)
    assert list(pair.remote.names) == [lun(number) for number in range(100)]
    assert all(pair.remote.names.values())


def test_only_what_names_the_unit_itself_counts() -> None:
    port = bytes([0x61, 0x93, 0, 8]) + bytes(8)
    unit = bytes([0x01, 0x03, 0, 2]) + b"ab"
    again = bytes([0x02, 0x01, 0, 1]) + b"c"
    head = b"\0\x83"
    assert parse_names(head + b"\0\x17" + port + unit + again) == unit + again
    assert parse_names(head + b"\0\x17" + again + port + unit) == unit + again
    assert parse_names(head + b"\0\x0c" + port) == b""
    assert parse_names(head + b"\0\x06" + unit[:4]) == b""


@given(st.binary(max_size=64))
def test_any_page_can_be_read(data: bytes) -> None:
    assert len(parse_names(data)) <= max(0, len(data) - 4)
