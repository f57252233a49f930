"""The FCF: ENodes log in through it, are held to what they may say, and are told when it is over."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fabric.enode import Enode
from tests.fabric.san import FABRIC, wwpn
from tests.fabric.segment import FCF, Segment
from vhostfc.fabric.fcf import Deliver, Forwarder, LogOut, Send
from vhostfc.fc import els, fip
from vhostfc.fc.els import Els, Reason
from vhostfc.fc.fcoe import Ethernet
from vhostfc.fc.fip import Fip, Flag, Operation
from vhostfc.fc.frame import Address, Frame, RCtl, els_request
from vhostfc.fc.login import Login


def logged_in(segment: Segment, number: int = 1, vports: int = 0) -> Enode:
    enode = segment.enode(number)
    enode.login(wwpn(number << 4))
    segment.settle()
    for vport in range(1, vports + 1):
        enode.login(wwpn(number << 4 | vport), fdisc=True)
        segment.settle()
    assert len(enode.ports) == 1 + vports
    return enode


def test_an_enode_finds_the_fcf_and_logs_in_with_virtual_ports() -> None:
    segment = Segment()
    enode = logged_in(segment, vports=2)
    assert enode.fcf == FCF
    assert sorted(segment.logins()) == sorted(str(name) for name in enode.ports.values())
    assert {login.holder for login in segment.san.switch.logins()} == {"52:54:00:00:00:01 on a segment"}
    for port_id in enode.ports:
        ox_id = enode.plogi(port_id, segment.san.target.port_id)
        segment.settle()
        reply = enode.frames[-1]
        assert (reply.d_id, reply.ox_id, reply.r_ctl) == (port_id, ox_id, RCtl.ELS_REPLY)
        assert reply.payload[0] == Els.LS_ACC


def test_a_name_in_use_is_refused() -> None:
    segment = Segment()
    logged_in(segment, 1)
    other = segment.enode(2)
    other.login(wwpn(1 << 4))
    segment.settle()
    assert [rejection.reason for rejection in other.rejected] == [Reason.LOGICAL_ERROR]
    assert not other.ports


def test_a_login_anew_that_is_refused_ends_what_was_before_too() -> None:
    """The switch has reset the port by then; keep-alives must not keep here what is not there any more."""
    segment = Segment()
    logged_in(segment, 1)
    enode = logged_in(segment, 2, vports=1)
    enode.login(wwpn(1 << 4))
    segment.settle()
    assert len(enode.rejected) == 1
    assert segment.logins() == [str(wwpn(1 << 4))]
    assert repr(segment.forwarder) == "<Forwarder a segment: 2 ENodes, 1 N_Ports>"


def test_logout_of_one_port_leaves_the_others() -> None:
    segment = Segment()
    enode = logged_in(segment, vports=1)
    first, second = enode.ports
    enode.log_out(second)
    segment.settle()
    assert list(enode.ports) == [first]
    assert len(segment.logins()) == 1


def test_a_login_anew_ends_what_was_before() -> None:
    segment = Segment()
    enode = logged_in(segment, vports=3)
    enode.login(wwpn(1 << 4))
    segment.settle()
    assert segment.logins() == [str(wwpn(1 << 4))]
    assert len(enode.ports) == 1
    assert repr(segment.forwarder) == "<Forwarder a segment: 1 ENodes, 1 N_Ports>"


# ---------------------------------------------------------------- who may say what


def test_nobody_speaks_for_another() -> None:
    """An N_Port_ID belongs to the station that it was given to, and to the MAC address that goes with it."""
    segment = Segment()
    victim, thief = logged_in(segment, 1), logged_in(segment, 2)
    (port_id,), (own,) = victim.ports, thief.ports
    stolen = Frame(RCtl.ELS_REQUEST, segment.san.target.port_id, port_id, 1, 0x290000, 9, payload=b"\x05" + bytes(15))
    before = len(victim.frames)
    thief.send(stolen)
    thief.send(stolen, source=thief.fpma(own))
    thief.send(dataclasses.replace(stolen, s_id=own), source=thief.mac)
    segment.settle()
    assert segment.forwarder.discarded == {"another port's N_Port_ID": 3}
    thief.ports[port_id] = victim.ports[port_id]
    thief.log_out(port_id)
    segment.settle()
    assert segment.forwarder.discarded["not logged in"] == 1
    assert len(segment.logins()) == 2
    assert len(victim.frames) == before
    thief.keep_alive(port_id)  # the claim of a port of somebody else is answered to him who makes it
    segment.settle()
    assert len(thief.cleared) == 1
    assert not victim.cleared


def test_frames_of_ports_that_are_not_logged_in_are_discarded_without_a_word() -> None:
    """libfc takes the answer to a LOGO that it sends while it resets a port for that to its next FDISC."""
    segment = Segment()
    enode = logged_in(segment, vports=1)
    _, second = enode.ports
    f_port = segment.san.switch.logins()[0].f_port
    segment.do(segment.forwarder.clear(f_port, [second]))
    assert second not in enode.ports
    enode.ports[second] = wwpn(1 << 4 | 1)
    enode.log_out(second)
    enode.plogi(second, segment.san.target.port_id)
    before = len(enode.frames)
    segment.settle()
    assert len(enode.frames) == before
    assert segment.forwarder.discarded == {"not logged in": 2}


@pytest.mark.parametrize("command", [Operation.ADVERTISEMENT, Operation.VLAN_REQUEST, Operation.CLEAR_VIRTUAL_LINKS])
def test_operations_that_are_not_for_an_fcf_are_discarded(command: Operation) -> None:
    segment = Segment()
    enode = segment.enode(1)
    enode._fip(command, fip.Mac(enode.mac))
    segment.settle()
    assert list(segment.forwarder.discarded.values()) == [1]


def test_an_fdisc_needs_a_flogi() -> None:
    segment = Segment()
    enode = segment.enode(1)
    enode.login(wwpn(5), fdisc=True)
    segment.settle()
    assert not segment.logins()
    assert segment.forwarder.discarded == {"a login that no FLOGI goes before, or one too many": 1}


@pytest.mark.parametrize("command", [Els.FLOGI, Els.FDISC, Els.LOGO])
def test_a_login_or_logout_outside_fip_is_discarded(command: Els) -> None:
    """The switch would act on it, and the forwarder would not know: a port without an address, or the reverse."""
    segment = Segment()
    enode = logged_in(segment, vports=1)
    first, second = enode.ports
    payload = els.Logo(second, enode.ports[second]).pack()
    if command != Els.LOGO:
        payload = dataclasses.replace(Login.flogi(wwpn(7), wwpn(8)), command=command).pack()
    enode.send(els_request(second, Address.F_PORT, 7, payload))
    segment.settle()
    assert segment.forwarder.discarded == {"a login or logout outside FIP": 1}
    assert [login.port_id for login in segment.san.switch.logins()] == sorted([first, second])
    assert "2 N_Ports" in repr(segment.forwarder)


def test_logins_that_nobody_answers_are_not_kept_for_ever() -> None:
    segment = Segment()
    enode = logged_in(segment)
    request = Login.fdisc(wwpn(7), wwpn(8)).pack()
    for ox_id in range(1000):
        frame = els_request(0, Address.F_PORT, ox_id, request).pack()
        message = Fip(Operation.LINK_SERVICE_REQUEST, Flag.FPMA, (fip.Encapsulated(fip.Encapsulated.FDISC, frame),))
        data = Ethernet(FCF, enode.mac, 0x8914, message.pack()).pack()
        assert [type(one) for one in segment.forwarder.receive(1, data, segment.now)] == [Deliver]
    (kept,) = [one.asked for one in segment.forwarder._enodes.values()]
    assert len(kept) == 64


@pytest.mark.parametrize("kind", [fip.Encapsulated.FDISC, fip.Encapsulated.LOGO])
def test_a_login_for_somebody_else_than_the_fabric_is_discarded(kind: int) -> None:
    segment = Segment()
    enode = logged_in(segment)
    ((port_id, name),) = enode.ports.items()
    is_logo = kind == fip.Encapsulated.LOGO
    payload = els.Logo(port_id, name).pack() if is_logo else Login.fdisc(wwpn(7), wwpn(8)).pack()
    frame = els_request(port_id if is_logo else 0, segment.san.target.port_id, 9, payload).pack()
    enode._fip(Operation.LINK_SERVICE_REQUEST, fip.Encapsulated(kind, frame))
    segment.settle()
    assert segment.forwarder.discarded == {"a FIP descriptor that does not hold what it says": 1}


@given(st.lists(st.tuples(st.sampled_from([0x8906, 0x8914, 0x0800]), st.binary(max_size=120)), max_size=8))
def test_whatever_comes_is_no_error_and_is_bounded(frames: list[tuple[int, bytes]]) -> None:
    segment = Segment()
    enode = logged_in(segment)
    for ethertype, payload in frames:
        data = Ethernet(FCF, enode.mac, ethertype, payload).pack()
        segment.do(segment.forwarder.receive(1, data, segment.now))
        segment.do(segment.forwarder.receive(1, data[:13], segment.now))
    assert len(segment.forwarder.discarded) <= 65
    assert len(segment.logins()) == 1


# ---------------------------------------------------------------- time


def test_it_advertises_and_logs_out_who_is_silent() -> None:
    segment = Segment(period=8)
    talker, silent = logged_in(segment, 1), logged_in(segment, 2)
    for _ in range(3):
        talker.keep_alive()
        segment.settle()
        segment.tick(8)
    assert silent.cleared
    assert not talker.cleared
    assert segment.logins() == [str(name) for name in talker.ports.values()]
    assert [end.reason for end in segment.ended] == ["silent for 20 s"]


def test_a_virtual_port_that_is_silent_is_logged_out_alone() -> None:
    segment = Segment(period=60)
    enode = logged_in(segment, vports=1)
    first, _ = enode.ports
    for _ in range(4):
        enode.keep_alive(first)
        segment.settle()
        segment.tick(60)
    assert list(enode.ports) == [first]
    assert [type(end) for end in segment.ended] == [LogOut]


def test_who_believes_to_be_logged_in_is_told_otherwise() -> None:
    """As after a restart of the fabric: the next keep-alive, not the next command, finds out."""
    segment = Segment()
    enode = segment.enode(1)
    enode.keep_alive()
    segment.settle()
    assert len(enode.cleared) == 1
    enode.ports[0x010203] = wwpn(1)
    enode.keep_alive(0x010203)
    segment.settle()
    assert enode.cleared[-1].one(fip.VxPortId).port_id == 0x010203


def test_the_advertisements_of_a_link_that_is_down_stop() -> None:
    segment = Segment()
    enode = logged_in(segment)
    segment.do(segment.forwarder.set_link(False))
    assert not segment.logins()
    assert not enode.ports
    assert segment.forwarder.deadline() == float("inf")
    enode.login(wwpn(1))
    segment.settle()
    assert segment.forwarder.discarded == {"the link is down": 1}
    segment.do(segment.forwarder.set_link(True))
    segment.tick(0)
    enode.login(wwpn(1))
    segment.settle()
    assert segment.logins() == [str(wwpn(1))]


def test_the_priority_is_in_the_advertisement() -> None:
    forwarder = Forwarder("here", lambda _: 1, name=FABRIC, fabric=FABRIC, mac=FCF, priority=7, period=2)
    (action,) = forwarder.tick(0)
    assert isinstance(action, Send)
    message = Fip.unpack(Ethernet.unpack(action.data).payload)
    assert message.one(fip.Priority).value == 7
    assert message.one(fip.KeepAlivePeriod).period == 2000
    assert message.flags == Flag.FPMA | Flag.AVAILABLE | Flag.FROM_FCF
