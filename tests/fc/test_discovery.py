"""Remote ports that come, go, move and change; and their units."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.fc.conftest import ARRAY, Pair
from tests.fc.test_nport import codes
from tests.fc.tiny import BLOCK, INVALID_FIELD, INVALID_OPCODE, Done, TinyTarget, lun, page_83
from vhostfc.fc import ct, els
from vhostfc.fc.discovery import Discovered, TopologyChanged, visible
from vhostfc.fc.els import AddressFormat
from vhostfc.fc.fcp import FcpCmnd
from vhostfc.fc.frame import Address, RCtl, els_reply, els_request
from vhostfc.fc.initiator import End
from vhostfc.fc.login import Login
from vhostfc.fc.nport import LocalState
from vhostfc.fc.remote import RemoteState
from vhostfc.fc.survey import parse_luns, parse_names, report_luns
from vhostfc.fc.wwn import Wwn

OTHER = Wwn(0x5006_0160_0000_0002)
NAMES = tuple((lun(number), parse_names(page_83(lun(number)))) for number in (0, 3))
BUSY = 0x08
ATTENTION = bytes.fromhex("700006000000000a000000003f0e00000000")


def other() -> TinyTarget:
    return TinyTarget(OTHER, 0x01FE02, {lun(1): bytearray(8 * BLOCK)})


def test_a_target_that_comes_is_found(online: Pair) -> None:
    online.take_events()
    online.fabric.targets.append(other())
    online.inject(online.fabric.rscn(online.port.port_id, 0x01FE02))

    assert online.port.remotes[OTHER].units == (lun(1),)
    assert online.take_events() == [TopologyChanged(), Discovered(2)]


def test_a_notification_is_acknowledged_to_the_fabric(online: Pair) -> None:
    online.sent.clear()
    online.inject(online.fabric.rscn(online.port.port_id, 0x01FE01))

    assert online.sent[0].r_ctl == RCtl.ELS_REPLY
    assert online.sent[0].d_id == Address.FABRIC_CONTROLLER


def test_what_a_notification_names_is_looked_at_closely(online: Pair) -> None:
    online.fabric.targets.append(other())
    online.inject(online.fabric.rscn(online.port.port_id, 0x01FE02))
    online.sent.clear()
    online.array.units[lun(9)] = bytearray(BLOCK)
    online.inject(online.fabric.rscn(online.port.port_id, 0x01FE01))

    assert codes(online) == ["GPN_FT", "ADISC", "CMND a0"]
    assert {f.d_id for f in online.sent if f.r_ctl == RCtl.DATA_UNSOLICITED_COMMAND} == {0x01FE01}
    assert online.remote.units == (lun(0), lun(3), lun(9))


@pytest.mark.parametrize(
    ("address", "form", "looks"),
    [
        (0x01FE77, AddressFormat.AREA, True),
        (0x01AAAA, AddressFormat.DOMAIN, True),
        (0x777777, AddressFormat.FABRIC, True),
        (0x01FD01, AddressFormat.AREA, False),
        (0x01FE02, AddressFormat.PORT, False),
    ],
)
def test_how_much_of_an_address_counts(online: Pair, address: int, form: AddressFormat, looks: bool) -> None:
    online.sent.clear()
    rscn = els.Rscn((els.RscnPage(address, form),))
    online.inject(els_request(Address.FABRIC_CONTROLLER, online.port.port_id, 1, rscn.pack()))

    assert ("ADISC" in codes(online)) is looks


def test_a_rescan_looks_at_everything(online: Pair) -> None:
    online.sent.clear()
    online.array.units[lun(5)] = bytearray(BLOCK)
    number = online.port.rescan(online.now)
    online.settle()

    assert codes(online) == ["GPN_FT", "ADISC", "CMND a0"]
    assert lun(5) in online.remote.units
    assert Discovered(number) in online.events


def test_what_is_asked_while_the_name_server_is_asked_asks_it_once_more(online: Pair) -> None:
    first = online.port.rescan(online.now)
    second = online.port.rescan(online.now)
    third = online.port.rescan(online.now)
    online.take_events()
    online.sent.clear()
    online.settle()

    assert codes(online).count("GPN_FT") == 2
    assert [event.number for event in online.events if isinstance(event, Discovered)][-1] == third
    assert first < second < third


def test_a_target_that_leaves_is_held_then_gone(online: Pair) -> None:
    online.array.listed = False
    online.inject(online.fabric.rscn(online.port.port_id, 0x01FE01))
    assert visible(online.remote) == (RemoteState.UNLISTED, 0x01FE01, NAMES)
    assert not online.remote.logged_in

    online.take_events()
    online.advance(29)
    assert visible(online.remote)[0] is RemoteState.UNLISTED
    online.advance(1)
    assert visible(online.remote) == (RemoteState.GONE, 0x01FE01, ())
    assert online.take_events() == [TopologyChanged()]


def test_a_target_that_comes_back_in_time_keeps_its_units(online: Pair) -> None:
    online.array.listed = False
    online.inject(online.fabric.rscn(online.port.port_id, 0x01FE01))
    online.advance(10)
    online.array.listed = True
    online.inject(online.fabric.rscn(online.port.port_id, 0x01FE01))

    assert visible(online.remote) == (RemoteState.READY, 0x01FE01, NAMES)
    online.advance(60)
    assert visible(online.remote)[0] is RemoteState.READY


def test_a_target_that_comes_back_late_is_found_again(online: Pair) -> None:
    online.array.listed = False
    online.inject(online.fabric.rscn(online.port.port_id, 0x01FE01))
    online.advance(60)
    online.array.listed = True
    online.inject(online.fabric.rscn(online.port.port_id, 0x01FE01))

    assert visible(online.remote) == (RemoteState.READY, 0x01FE01, NAMES)


def test_a_target_that_left_while_the_link_was_down_is_held_from_then_on(online: Pair) -> None:
    online.port.link_down(online.now)
    online.settle()
    online.array.listed = False
    online.advance(1000)
    assert visible(online.remote)[0] is RemoteState.UNLISTED

    online.up()
    online.advance(29)
    assert visible(online.remote)[0] is RemoteState.UNLISTED
    online.advance(1)
    assert visible(online.remote)[0] is RemoteState.GONE


def test_a_target_that_moves_is_logged_in_to_at_its_new_address(online: Pair) -> None:
    online.array.port_id = 0x01FE44
    online.inject(online.fabric.rscn(online.port.port_id, 0x01FE01, 0x01FE44))

    assert online.remote.port_id == 0x01FE44
    assert online.remote.logged_in
    assert online.run(0, bytes(6)).end is End.COMPLETE


def test_a_target_that_logs_us_out_is_logged_in_to_again(online: Pair) -> None:
    online.array.hold = True
    command = online.port.start_command(online.remote, lun(0), bytes(6), online.now)
    online.settle()
    online.array.hold = False
    online.sent.clear()
    online.inject(online.array.logo(online.port.port_id))

    assert online.result(command).end is End.LOST
    assert codes(online) == ["PLOGI", "PRLI", "CMND a0"]
    assert online.remote.logged_in


def test_a_target_that_forgot_us_says_so_to_the_first_command(online: Pair) -> None:
    online.array.logins.clear()
    lost = online.run(0, bytes(6))

    assert lost.end is End.LOST
    assert online.run(0, bytes(6)).end is End.COMPLETE


def test_a_target_that_forgot_us_is_noticed_by_a_rescan(online: Pair) -> None:
    online.array.logins.clear()
    online.sent.clear()
    online.port.rescan(online.now)
    online.settle()

    assert codes(online) == ["GPN_FT", "ADISC", "PLOGI", "PRLI", "CMND a0"]
    assert online.remote.logged_in


def test_a_port_that_is_no_target_is_left_alone(online: Pair) -> None:
    initiator = other()
    initiator.is_target = False
    online.fabric.targets.append(initiator)
    online.inject(online.fabric.rscn(online.port.port_id, 0x01FE02))
    assert OTHER not in online.port.remotes

    online.sent.clear()
    online.inject(online.fabric.rscn(online.port.port_id, 0x01FE01))
    assert codes(online) == ["GPN_FT", "ADISC", "CMND a0"]


def test_a_target_that_does_not_answer_is_tried_for_ever(pair: Pair) -> None:
    pair.array.mute = True
    pair.up()
    pair.advance(300)
    assert ARRAY not in pair.port.remotes
    assert 8 <= codes(pair).count("PLOGI") - 1 <= 16

    pair.array.mute = False
    pair.advance(60)
    assert pair.remote.logged_in


def test_a_name_server_that_falls_silent_costs_the_login(online: Pair) -> None:
    online.fabric.deaf.add(ct.Ct.GPN_FT)
    online.port.rescan(online.now)
    online.settle()
    online.advance(3 * 20 + 2 * 2)
    assert online.state() is LocalState.RESTART

    online.fabric.deaf.clear()
    online.advance(1)
    assert online.state() is LocalState.READY
    assert online.remote.logged_in


def test_an_empty_fabric_is_no_error(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = ct.reject(ct.Reason.UNABLE_TO_PERFORM, ct.Explanation.FC4_TYPES_NOT_REGISTERED)
    accept = ct.accept
    monkeypatch.setattr(ct, "accept", lambda body=b"": empty if body else accept())
    pair.up()

    assert pair.port.remotes == {}
    assert Discovered(1) in pair.events


def test_many_targets_are_found_through_a_list_of_many_frames(pair: Pair) -> None:
    pair.fabric.targets += [
        TinyTarget(Wwn(0x5006 << 48 | n), 0x020000 | n, {lun(0): bytearray()}) for n in range(1, 90)
    ]
    pair.up()

    assert len(pair.port.remotes) == 90
    assert all(remote.logged_in for remote in pair.port.remotes.values())


@pytest.mark.parametrize(
    "wrong",
    [
        Login.plogi(Wwn(99), Wwn(100), accept=True),
        replace(Login.plogi(ARRAY, Wwn(100), accept=True), receive_size=3, class3_receive_size=3),
    ],
)
def test_a_login_with_somebody_else_or_for_nothing_is_none(pair: Pair, wrong: Login) -> None:
    plogi, pair.lose = [True], lambda frame: frame.s_id == 0x01FE01 and frame.r_ctl == RCtl.ELS_REPLY and plogi[0]
    pair.up()
    asked = next(frame for frame in pair.sent if frame.d_id == 0x01FE01)
    plogi[0] = False
    pair.inject(els_reply(asked, wrong.pack()))
    assert pair.port.remotes == {}

    pair.advance(1)
    assert pair.remote.logged_in


# ---------------------------------------------------------------- units


def test_report_luns_asks_quietly(online: Pair) -> None:
    cmnd = online.array.seen[0]

    assert cmnd.cdb[:12] == report_luns(cmnd.data_length, quiet=True)
    assert cmnd.cdb[11] == 0x80
    assert cmnd.lun == bytes(8)


def test_a_long_list_of_units_is_asked_for_again(pair: Pair) -> None:
    pair.array.units = {lun(number): bytearray() for number in range(3000)}
    pair.up()

    assert len(pair.remote.units) == 3000
    assert [cmnd.data_length for cmnd in pair.array.seen[:3]] == [8 + 8 * 256, 8 + 8 * 3000, 1020]


def script(pair: Pair, *answers: Done) -> None:
    """The first commands end like this."""
    left = list(answers)

    def answer(_cmnd: FcpCmnd) -> Done | None:
        return left.pop(0) if left else None

    pair.array.script = answer


def test_a_target_that_wants_control_to_be_zero_is_asked_so(pair: Pair) -> None:
    script(pair, Done(2, sense=INVALID_FIELD))
    pair.up()

    assert [(cmnd.cdb[0], cmnd.cdb[11]) for cmnd in pair.array.seen[:3]] == [(0xA0, 0x80), (0xA0, 0), (0x12, 0)]
    assert pair.remote.units == (lun(0), lun(3))


def test_a_target_without_report_luns_has_unit_0(pair: Pair) -> None:
    pair.array.script = lambda _cmnd: Done(2, sense=INVALID_OPCODE)
    pair.up()

    assert pair.remote.units == (lun(0),)


def test_a_busy_target_is_asked_again_after_a_while(pair: Pair) -> None:
    script(pair, Done(BUSY), Done(BUSY))
    pair.up()
    assert ARRAY not in pair.port.remotes
    assert Discovered(1) not in pair.events

    pair.advance(1)
    assert pair.remote.units == (lun(0), lun(3))
    assert Discovered(1) in pair.events


def test_a_unit_attention_is_asked_through_at_once(pair: Pair) -> None:
    script(pair, Done(2, sense=ATTENTION), Done(2, sense=bytes([0x72, 6, 0x29, 0, 0, 0, 0, 0])))
    pair.up()
    pair.advance(0)

    assert pair.remote.units == (lun(0), lun(3))


def test_a_target_that_is_always_busy_keeps_the_units_that_we_knew(online: Pair) -> None:
    online.array.script = lambda _cmnd: Done(BUSY)
    online.port.rescan(online.now)
    online.settle()
    online.advance(5)

    assert online.remote.state is RemoteState.READY
    assert online.remote.units == (lun(0), lun(3))
    assert Discovered(2) in online.events


def test_a_round_ends_though_a_target_hangs_in_it(online: Pair) -> None:
    online.fabric.targets.append(other())
    online.array.mute = True
    online.port.rescan(online.now)
    online.settle()
    online.advance(60)

    assert Discovered(2) in online.events
    assert online.port.remotes[OTHER].logged_in
    assert not online.remote.logged_in


@pytest.mark.parametrize(
    ("data", "found", "whole"),
    [
        (b"", (), 0),
        (bytes.fromhex("0000000800000000") + lun(3), (lun(3),), 16),
        (bytes.fromhex("0000001000000000") + lun(3), (lun(3),), 24),
        (bytes.fromhex("0000001000000000") + lun(3) + lun(0), (lun(0), lun(3)), 24),
        (bytes.fromhex("0000000800000000") + lun(3) + lun(0), (lun(3),), 16),
        (bytes.fromhex("0000001000000000") + lun(3) + lun(3), (lun(3),), 24),
    ],
)
def test_lists_of_luns(data: bytes, found: tuple[bytes, ...], whole: int) -> None:
    assert parse_luns(data) == (found, whole)
