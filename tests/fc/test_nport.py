"""The login, what is registered, and what an N_Port answers."""

from __future__ import annotations

import pytest

from tests.fc.conftest import ARRAY, WWNN, WWPN, Pair
from tests.fc.tiny import FABRIC_NAME, lun
from vhostfc.fc import bls, ct, els, ns
from vhostfc.fc.discovery import Discovered, TopologyChanged
from vhostfc.fc.els import Els, Explanation, Reason
from vhostfc.fc.frame import Address, FcType, Frame, RCtl, els_request
from vhostfc.fc.initiator import CommandDone, End
from vhostfc.fc.login import Login
from vhostfc.fc.nport import LocalState, LoggedOut, LoginRejected
from vhostfc.fc.survey import identify
from vhostfc.fc.wwn import Wwn


def codes(pair: Pair) -> list[str]:
    """The requests that the port has sent, in words; without the INQUIRY of each unit that a look ends with."""
    words = []
    for frame in pair.sent:
        if frame.r_ctl == RCtl.ELS_REQUEST:
            words.append(Els(frame.payload[0]).name)
        elif frame.r_ctl == RCtl.DATA_UNSOLICITED_CONTROL:
            words.append(ct.Ct(ct.CtIu.unpack(frame.payload).code).name)
        elif frame.r_ctl == RCtl.DATA_UNSOLICITED_COMMAND and frame.payload[12:15] != identify()[:3]:
            words.append(f"CMND {frame.payload[12]:02x}")
    return words


REGISTER = ["PLOGI", "RNN_ID", "RSNN_NN", "RSPN_ID", "RFT_ID", "RFF_ID", "SCR", "GPN_FT"]
LOGIN = ["FLOGI", *REGISTER]


def test_login_registers_and_finds_the_units(pair: Pair) -> None:
    pair.up()

    assert codes(pair) == [*LOGIN, "PLOGI", "PRLI", "CMND a0"]
    assert pair.state() is LocalState.READY
    assert (pair.port.port_id, pair.port.fabric_name) == (0x010101, FABRIC_NAME)
    assert pair.remote.units == (lun(0), lun(3))
    assert pair.remote.logged_in
    assert Discovered(1) in pair.events
    assert pair.port.deadline() is None


def test_what_is_registered(pair: Pair) -> None:
    pair.up()

    assert ns.RnnId(0x010101, WWNN) in pair.fabric.asked
    assert ns.RspnId(0x010101, b"vm1") in pair.fabric.asked
    assert ns.RftId(0x010101, frozenset({FcType.FCP, FcType.CT})) in pair.fabric.asked
    assert ns.RffId(0x010101, ns.Fc4Feature.INITIATOR) in pair.fabric.asked
    assert els.Scr(els.ScrFunction.FULL) in pair.fabric.asked


def test_a_further_identity_logs_in_with_fdisc() -> None:
    pair = Pair(first=False).up()

    assert codes(pair)[0] == "FDISC"
    assert pair.state() is LocalState.READY


def test_the_fabrics_timers_are_taken_over(pair: Pair) -> None:
    pair.fabric.r_a_tov = 24000
    pair.up()
    pair.fabric.deaf.add(ct.Ct.GPN_FT)
    pair.port.rescan(pair.now)
    pair.settle()

    assert pair.port.deadline() == pair.now + 48


def test_a_refused_login_says_why_and_is_tried_again(pair: Pair) -> None:
    pair.fabric.refuse = els.LsRjt(Reason.LOGICAL_ERROR, Explanation.INVALID_PORT_NAME)
    pair.up()

    refusals = [event.rejection for event in pair.take_events() if isinstance(event, LoginRejected)]
    assert refusals == [pair.fabric.refuse]
    assert pair.port.port_id == 0

    pair.fabric.refuse = None
    pair.advance(3)
    assert pair.state() is LocalState.READY


def test_a_busy_fabric_refuses_nobody(pair: Pair) -> None:
    pair.fabric.refuse = els.LsRjt(Reason.LOGICAL_BUSY)
    pair.up()
    pair.advance(60)

    assert not [event for event in pair.take_events() if isinstance(event, LoginRejected)]


@pytest.mark.parametrize(
    "step",
    [Els.FLOGI, Els.PLOGI, ct.Ct.RNN_ID, ct.Ct.RSNN_NN, ct.Ct.RSPN_ID, ct.Ct.RFT_ID, ct.Ct.RFF_ID, Els.SCR],
    ids=lambda step: step.name,
)
def test_every_step_that_gets_no_answer_is_tried_again(pair: Pair, step: Els | ct.Ct) -> None:
    pair.fabric.deaf.add(step)
    pair.up()
    assert codes(pair).count(step.name) == 1

    pair.advance(25)
    assert codes(pair).count(step.name) > 1
    assert pair.state() is not LocalState.READY

    pair.fabric.deaf.clear()
    pair.advance(90)
    assert pair.state() is LocalState.READY
    assert pair.remote.logged_in


def test_tries_slow_down_and_never_end(pair: Pair) -> None:
    pair.fabric.deaf.add(Els.FLOGI)
    pair.up()
    pair.advance(60)
    first = len(pair.sent)
    pair.advance(600)
    later = len(pair.sent) - first

    assert first > 8
    assert 600 / 45 * 2 < later < 600 / 30 * 8


def test_a_reply_that_is_no_reply_is_a_failed_step(pair: Pair) -> None:
    pair.port.link_up(pair.now)
    (flogi,) = [Frame.unpack(data) for data in pair.port.take_frames()]
    reply = pair.fabric.receive(flogi.pack())[0]
    pair.inject(Frame(reply.r_ctl, reply.d_id, reply.s_id, reply.type, reply.f_ctl, reply.ox_id, payload=b"\x07"))

    assert pair.state() is LocalState.FLOGI
    pair.advance(3)
    assert pair.state() is LocalState.READY


def test_a_peer_that_is_no_fabric_is_not_logged_in_to(pair: Pair) -> None:
    pair.port.link_up(pair.now)
    (flogi,) = [Frame.unpack(data) for data in pair.port.take_frames()]
    accept = Login.plogi(Wwn(7), Wwn(8), accept=True).pack()
    pair.inject(Frame(RCtl.ELS_REPLY, 5, Address.F_PORT, FcType.ELS, 0x990000, flogi.ox_id, payload=accept))

    assert pair.port.port_id == 0


def test_link_down_ends_everything_and_link_up_begins_anew(online: Pair) -> None:
    online.array.hold = True
    command = online.port.start_command(online.remote, lun(0), bytes(6), online.now)
    online.settle()
    online.port.link_down(online.now)
    online.settle()

    assert online.result(command).end is End.LOST
    assert online.state() is LocalState.LINK_DOWN
    assert online.port.port_id == 0
    assert not online.remote.logged_in
    assert online.remote.units == (lun(0), lun(3))
    assert online.port.deadline() is None
    assert TopologyChanged() in online.take_events()

    online.array.hold = False
    online.sent.clear()
    online.up()
    assert codes(online) == [*LOGIN, "PLOGI", "PRLI", "CMND a0"]
    assert online.remote.logged_in


def test_logging_out_says_so_to_target_and_fabric(online: Pair) -> None:
    online.sent.clear()
    online.port.log_out(online.now)
    online.settle()

    assert [(Els(f.payload[0]), f.d_id) for f in online.sent] == [
        (Els.LOGO, online.array.port_id),
        (Els.LOGO, Address.F_PORT),
    ]
    assert sum(isinstance(event, LoggedOut) for event in online.events) == 1
    assert not online.fabric.ports
    assert not online.array.logins


def test_logging_out_from_a_deaf_fabric_takes_e_d_tov(online: Pair) -> None:
    online.fabric.deaf.add(Els.LOGO)
    online.port.log_out(online.now)
    online.settle()
    assert not any(isinstance(event, LoggedOut) for event in online.events)

    online.advance(2)
    assert sum(isinstance(event, LoggedOut) for event in online.events) == 1


def test_logging_out_before_the_login_is_done_at_once(pair: Pair) -> None:
    pair.port.log_out(pair.now)
    pair.settle()

    assert sum(isinstance(event, LoggedOut) for event in pair.events) == 1
    assert not pair.sent


def answer(pair: Pair, s_id: int, payload: bytes) -> bytes:
    """What the port answers to an ELS request."""
    pair.sent.clear()
    pair.inject(els_request(s_id, pair.port.port_id, 0x123, payload))
    replies = [frame for frame in pair.sent if frame.r_ctl == RCtl.ELS_REPLY]
    assert [(frame.d_id, frame.ox_id) for frame in replies] == [(s_id, 0x123)]
    return replies[0].payload


def test_what_others_may_ask(online: Pair) -> None:
    other = 0x010909
    plogi = Login.unpack(answer(online, other, Login.plogi(Wwn(5), Wwn(6)).pack()))
    assert (plogi.command, plogi.wwpn, plogi.wwnn) == (Els.LS_ACC, WWPN, WWNN)

    page = els.PrliPage(FcType.FCP, els.PrliPage.ESTABLISH, els.FcpService.INITIATOR)
    (granted,) = els.Prli.unpack(answer(online, other, els.Prli((page,)).pack())).pages
    assert granted.response == els.PrliPage.EXECUTED
    assert granted.parameters & els.FcpService.INITIATOR
    assert not granted.parameters & els.FcpService.TARGET

    (nvme,) = els.Prli.unpack(answer(online, other, els.Prli((els.PrliPage(0x28, 0x20),)).pack())).pages
    assert nvme.response != els.PrliPage.EXECUTED

    adisc = els.Adisc.unpack(answer(online, other, els.Adisc(Wwn(5), Wwn(6), other).pack()))
    assert adisc == els.Adisc(WWPN, WWNN, online.port.port_id, Els.LS_ACC)
    assert answer(online, other, els.Echo(b"abcd").pack()) == b"\x02\0\0\0abcd"
    assert els.RtvAcc.unpack(answer(online, other, els.Rtv().pack())) == els.RtvAcc(10000, 2000)
    node = els.RnidAcc.unpack(answer(online, other, els.Rnid(els.NodeFormat.GENERAL_TOPOLOGY).pack()))
    assert node == els.RnidAcc(WWPN, WWNN, els.AssociatedType.HOST, vendor=b"vhostfc")
    assert answer(online, other, els.Rrq(other, 1, 2).pack()) == els.LS_ACC


@pytest.mark.parametrize("payload", [bytes([0x7E, 0, 0, 0]), els.Scr().pack()])
def test_what_is_not_supported_is_rejected(online: Pair, payload: bytes) -> None:
    reply = answer(online, 0x010909, payload)

    assert els.rejection(reply) == els.LsRjt(Reason.NOT_SUPPORTED, Explanation.NOT_SUPPORTED)


def test_an_abort_of_what_we_do_not_know_is_rejected(online: Pair) -> None:
    online.sent.clear()
    online.inject(bls.abts_frame(online.array.port_id, online.port.port_id, 77))

    assert [frame.r_ctl for frame in online.sent] == [RCtl.BLS_BA_RJT]
    assert bls.BaRjt.unpack(online.sent[0].payload).explanation == bls.Explanation.INVALID_OX_ID_RX_ID


@pytest.mark.parametrize("address", [Address.F_PORT, Address.DIRECTORY_SERVER])
def test_when_the_fabric_logs_us_out_we_log_in_again(online: Pair, address: Address) -> None:
    online.sent.clear()
    online.inject(els_request(address, online.port.port_id, 1, els.Logo(address, FABRIC_NAME).pack()))
    assert online.state() is LocalState.RESTART

    online.advance(1)
    assert codes(online) == [*LOGIN, "PLOGI", "PRLI", "CMND a0"]


def test_frames_for_others_and_of_no_exchange_are_dropped(online: Pair) -> None:
    done = online.run(0, bytes(6))
    assert done.end is End.COMPLETE
    rsp = online.fabric.log[-1]
    online.take_events()

    for wrong in (
        rsp,  # late: its exchange is over
        Frame(rsp.r_ctl, 0x020202, rsp.s_id, rsp.type, rsp.f_ctl, rsp.ox_id),
        Frame(rsp.r_ctl, rsp.d_id, rsp.s_id, rsp.type, 0, rsp.ox_id),
    ):
        before = online.port.dropped
        online.inject(wrong)
        assert online.port.dropped == before + 1
    online.port.receive(b"no frame at all", online.now)

    assert online.port.dropped == 4
    assert not online.take_events()
    assert online.state() is LocalState.READY


def test_an_answer_from_another_port_is_not_taken(online: Pair) -> None:
    online.array.hold = True
    command = online.port.start_command(online.remote, lun(0), bytes(6), online.now)
    online.settle()
    (rsp,) = online.array.release()
    online.inject(Frame(rsp.r_ctl, rsp.d_id, 0x01FE99, rsp.type, rsp.f_ctl, rsp.ox_id, payload=rsp.payload))
    assert not [event for event in online.events if isinstance(event, CommandDone)]

    online.inject(rsp)
    assert online.result(command).end is End.COMPLETE
    assert online.remote.wwpn == ARRAY
