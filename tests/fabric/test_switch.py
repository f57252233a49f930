"""The switch's door: logins, addresses, who is told of what, and what is discarded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fabric.san import FABRIC, TARGET, Initiator, San, wwpn
from vhostfc.fabric.link import Note
from vhostfc.fabric.zoning import Zone, Zoning
from vhostfc.fc import els
from vhostfc.fc.els import Els, EventQualifier, Explanation, LsRjt, Reason
from vhostfc.fc.frame import Address, Frame, RCtl, els_reply, els_request
from vhostfc.fc.login import Feature, Login
from vhostfc.fc.nport import LocalState, NPort
from vhostfc.fc.wwn import Wwn


def zone(*members: Wwn) -> Zoning:
    return Zoning([Zone("z", frozenset(members))])


def rscns(initiator: Initiator) -> list[els.RscnPage]:
    """The pages of what the fabric controller sent."""
    pages: list[els.RscnPage] = []
    for frame in initiator.take():
        if frame.s_id == Address.FABRIC_CONTROLLER and frame.payload[0] == Els.RSCN:
            pages += els.Rscn.unpack(frame.payload).pages
            initiator.send(els_reply(frame, els.LS_ACC))
    return pages


def test_flogi_is_answered_with_what_an_n_port_needs() -> None:
    san = San()
    one = Initiator(san, 1)
    one.send(els_request(0, Address.F_PORT, 7, Login.flogi(one.wwpn, one.wwnn).pack()))
    (reply,) = one.take()
    accept = Login.unpack(reply.payload)
    assert (accept.command, accept.wwnn) == (Els.LS_ACC, FABRIC)
    assert accept.features & Feature.F_PORT
    assert accept.features & Feature.NPIV
    assert reply.s_id == Address.F_PORT
    assert reply.d_id
    assert san.switch.find(one.wwpn) == san.switch.login(reply.d_id)


def test_a_name_that_comes_back_has_the_id_that_it_had() -> None:
    san = San()
    ids = [Initiator(san, n).login().port_id for n in range(1, 6)]
    assert len(set(ids)) == 5
    for login in san.switch.logins():
        san.switch.detach(login.f_port)
    assert [Initiator(san, n).login().port_id for n in (5, 4, 3, 2, 1)] == ids[::-1]


def test_several_n_ports_share_an_f_port() -> None:
    san = San()
    first = Initiator(san, 1).login()
    second = Initiator(san, 2, f_port=first.f_port).login(fdisc=True)
    assert first.port_id != second.port_id
    assert second.plogi()[0] == Els.LS_ACC
    san.switch.detach(first.f_port)
    assert san.switch.logins() == []


def test_fdisc_wants_a_flogi_before_it() -> None:
    one = Initiator(San(), 1)
    reply = one.els(Address.F_PORT, Login.fdisc(one.wwpn, one.wwnn).pack())
    assert els.rejection(reply) == LsRjt(Reason.LOGICAL_ERROR, Explanation.LOGIN_REQUIRED)


@pytest.mark.parametrize("fdisc", [False, True])
def test_a_name_that_is_in_use_is_refused_and_the_note_says_by_whom(fdisc: bool) -> None:
    san = San()
    Initiator(san, 1).login()
    thief = Initiator(san, 2)
    if fdisc:
        thief.login()
    login = (Login.fdisc if fdisc else Login.flogi)(wwpn(1), wwpn(1))
    thief.send(els_request(0, Address.F_PORT, 9, login.pack()))
    note, reply = san.inbox.pop(thief.f_port)
    assert isinstance(note, Note)
    assert note.text == f"{wwpn(1)} is already logged in, by 'vm1' since 2001-09-09 01:46:40 UTC"
    assert isinstance(reply, bytes)
    assert els.rejection(Frame.unpack(reply).payload) == LsRjt(Reason.LOGICAL_ERROR, Explanation.INVALID_PORT_NAME)
    holder = san.switch.find(wwpn(1))
    assert holder is not None
    assert holder.holder == "vm1"
    assert fdisc == (san.switch.find(wwpn(2)) is not None), "an FDISC that is refused leaves the other login alone"


def test_a_target_s_name_is_in_use_too() -> None:
    san = San()
    one = Initiator(san, 1)
    one.send(els_request(0, Address.F_PORT, 9, Login.flogi(TARGET, TARGET).pack()))
    note, _ = san.inbox[one.f_port]
    assert isinstance(note, Note)
    assert "array-a" in note.text


def test_a_name_of_zero_is_no_name() -> None:
    one = Initiator(San(), 1)
    reply = one.els(Address.F_PORT, Login.flogi(Wwn(0), one.wwnn).pack())
    assert els.rejection(reply) == LsRjt(Reason.LOGICAL_ERROR, Explanation.INVALID_PORT_NAME)


def test_a_login_anew_is_a_reset_port() -> None:
    san = San()
    one = Initiator(san, 1).open()
    Initiator(san, 2, f_port=one.f_port).login(fdisc=True)
    port_id = one.port_id
    one.login()
    assert one.port_id == port_id
    assert [login.wwpn for login in san.switch.logins()] == [wwpn(1)]
    assert san.target.sessions == {}


def test_logo_ends_one_login_and_the_answer_arrives() -> None:
    san = San()
    one = Initiator(san, 1).open()
    assert one.els(Address.F_PORT, els.Logo(one.port_id, one.wwpn).pack()) == els.LS_ACC
    assert san.switch.logins() == []
    assert san.target.sessions == {}


def test_frames_of_a_port_that_is_not_logged_in_here_are_discarded() -> None:
    san = San()
    one = Initiator(san, 1).login()
    two = Initiator(san, 2)
    two.port_id = one.port_id  # two sends in the name of one
    two.send(els_request(one.port_id, Address.DIRECTORY_SERVER, 1, Login.plogi(two.wwpn, two.wwnn).pack()))
    assert san.inbox == {}
    assert san.switch.discarded == {"not logged in": 1}


def test_n_ports_reach_each_other_unless_zones_part_them() -> None:
    san = San()
    one, two = Initiator(san, 1).login(), Initiator(san, 2).login()
    frame = els_request(one.port_id, two.port_id, 5, els.Echo(b"ping").pack())
    one.send(frame)
    assert two.take() == [frame]
    san.deliver(san.switch.set_zoning(zone(wwpn(1), TARGET)))
    assert els.rejection(one.els(two.port_id, els.Echo(b"ping").pack())) == LsRjt(
        Reason.UNABLE_TO_PERFORM, Explanation.INVALID_PORT_ID
    )
    assert two.take() == []


def test_an_els_request_to_nobody_is_rejected_and_other_frames_are_not() -> None:
    one = Initiator(San(), 1).login()
    assert els.rejection(one.els(0x01FFFE, els.Rtv().pack())) is not None
    one.send(Frame(RCtl.DATA_UNSOLICITED_COMMAND, 0x01FFFE, one.port_id, 8, 0x290000, 77, payload=bytes(32)))
    assert one.take() == []


def test_state_changes_are_told_to_those_who_asked_and_concern_targets() -> None:
    san = San()
    asks = Initiator(san, 1).login().scr()
    silent = Initiator(san, 2).login()
    asks.take()
    san.deliver(san.switch.service_changed(san.target, [wwpn(1), wwpn(2), wwpn(3)]))
    assert rscns(asks) == [els.RscnPage(san.target.port_id, qualifier=EventQualifier.CHANGED_SERVICE_OBJECT)]
    assert rscns(silent) == []
    Initiator(san, 3).login()
    assert rscns(asks) == [], "an initiator is not told of another initiator"
    san.deliver(san.switch.remove_target(san.target))
    assert [page.port_id for page in rscns(asks)] == [san.target.port_id]
    assert asks.els(Address.FABRIC_CONTROLLER, els.Scr(els.ScrFunction.CLEAR).pack()) == els.LS_ACC
    san.deliver(san.switch.add_target(san.target))
    assert rscns(asks) == []


def test_a_change_of_zones_is_an_implicit_logout_and_an_rscn() -> None:
    san = San()
    one = Initiator(san, 1).open().scr()
    two = Initiator(san, 2).open().scr()
    san.deliver(san.switch.set_zoning(zone(wwpn(2), TARGET)))
    assert [session.wwpn for session in san.target.sessions.values()] == [wwpn(2)]
    assert [page.port_id for page in rscns(one)] == [san.target.port_id]
    assert rscns(two) == []
    assert els.rejection(one.plogi()) is not None


def test_well_known_addresses_answer_what_they_know() -> None:
    one = Initiator(San(), 1).login()
    assert one.els(Address.DIRECTORY_SERVER, Login.plogi(one.wwpn, one.wwnn).pack())[0] == Els.LS_ACC
    assert one.els(Address.DIRECTORY_SERVER, els.Logo(one.port_id, one.wwpn).pack()) == els.LS_ACC
    assert one.els(Address.F_PORT, els.Rtv().pack())[0] == Els.LS_ACC
    assert one.els(Address.FABRIC_CONTROLLER, els.Echo(b"abcd").pack())[4:] == b"abcd"
    node = els.RnidAcc.unpack(one.els(Address.F_PORT, els.Rnid(els.NodeFormat.GENERAL_TOPOLOGY).pack()))
    assert (node.wwpn, node.associated_type, node.attached) == (FABRIC, els.AssociatedType.SWITCH, 2)
    rejection = els.rejection(one.els(Address.FABRIC_CONTROLLER, els.Rec(one.port_id, 1, 2).pack()))
    assert rejection == LsRjt(Reason.NOT_SUPPORTED, Explanation.NOT_SUPPORTED)


@given(st.lists(st.binary(max_size=120), max_size=5), st.integers(0, 2**24 - 1))
def test_no_frame_whatever_it_is_raises(garbage: list[bytes], d_id: int) -> None:
    san = San()
    one = Initiator(san, 1).open()
    for data in garbage:
        san.switch.receive(one.f_port, data)
        for r_ctl, kind in ((RCtl.ELS_REQUEST, 1), (RCtl.DATA_UNSOLICITED_CONTROL, 0x20), (RCtl.DATA_SOLICITED, 8)):
            for to in (d_id, san.target.port_id, Address.F_PORT, Address.DIRECTORY_SERVER, Address.FABRIC_CONTROLLER):
                frame = Frame(r_ctl, to, one.port_id, kind, 0x290000, 1, payload=data)
                san.switch.receive(one.f_port, frame.pack())
        san.run()
        if san.switch.login(one.port_id) is None:
            one.open()


def test_the_n_port_of_our_adapters_comes_up_and_finds_the_target() -> None:
    san = San()
    port = NPort(wwpn(1), wwpn(9), symbolic_name="vm1")
    f_port = san.switch.attach("vm1")
    port.link_up(0.0)
    while (frames := port.take_frames()) or san.inbox.get(f_port):
        for data in frames:
            san.deliver(san.switch.receive(f_port, data))
        san.run()
        for what in san.inbox.pop(f_port, []):
            assert isinstance(what, bytes)
            port.receive(what, 0.0)
    assert port.state is LocalState.READY
    assert port.fabric_name == FABRIC
    (remote,) = port.remotes.values()
    assert remote.wwpn == TARGET
