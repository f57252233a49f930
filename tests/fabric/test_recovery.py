"""Answers that get lost: REC tells how far an exchange has come, and FCP_CONF that an answer has arrived."""

from __future__ import annotations

import dataclasses

import pytest

from tests.fabric.san import BLOCK, Initiator, San
from vhostfc.fabric.recovery import KEPT
from vhostfc.fabric.sessions import State
from vhostfc.fabric.target import DATA_TIMEOUT
from vhostfc.fc import bls, els
from vhostfc.fc.els import Explanation, FcpService, LsRjt, Prli, Reason, RecAcc
from vhostfc.fc.fcp import FcpCmnd, FcpRsp, conf_frame
from vhostfc.fc.frame import FCtl, RCtl
from vhostfc.fc.sequence import initiator_data
from vhostfc.scsi.sense import Asc, Sense, SenseKey, attention_in
from vhostfc.scsi.task import Status

LUN0 = bytes(8)
READ = FcpCmnd(LUN0, b"\x28\0\0\0\0\0\0\0\x04\0", 4 * BLOCK, read=True)
WRITE = FcpCmnd(LUN0, b"\x2a\0\0\0\0\0\0\0\x04\0", 4 * BLOCK, write=True)
UNKNOWN = LsRjt(Reason.LOGICAL_ERROR, Explanation.INVALID_OX_ID_RX_ID)


def rec(one: Initiator, ox_id: int, rx_id: int = 0xFFFF, *, s_id: int | None = None) -> RecAcc | LsRjt:
    reply = one.els(one.san.target.port_id, els.Rec(one.port_id if s_id is None else s_id, ox_id, rx_id).pack())
    return els.rejection(reply) or RecAcc.unpack(reply)


def status(one: Initiator, ox_id: int) -> tuple[int, int]:
    """E_STAT and the bytes that have moved."""
    accept = rec(one, ox_id)
    assert isinstance(accept, RecAcc), accept
    assert (accept.ox_id, accept.originator_id, accept.responder_id) == (
        ox_id,
        one.port_id,
        one.san.target.port_id,
    )
    return accept.status, accept.fc4_value


# ---------------------------------------------------------------- REC


def test_a_command_that_waits_or_runs_has_the_initiative_here() -> None:
    san = San()
    one = Initiator(san, 1).open()
    ox_id = one.start(READ)
    ours = RecAcc.OWNER_RESPONDER | RecAcc.INITIATIVE
    assert status(one, ox_id) == (ours, 0)
    taken = san.rations.take()
    assert taken is not None
    san.target.begin(taken[1])
    assert status(one, ox_id) == (ours, 0)
    frames = list(san.target.finish(taken[1], san.execute(taken[1])))
    assert frames[-1].r_ctl == RCtl.DATA_COMMAND_STATUS
    assert status(one, ox_id) == (RecAcc.OWNER_RESPONDER | RecAcc.COMPLETED, 4 * BLOCK), "the answer was lost"


def test_a_write_that_waits_for_data_has_given_the_initiative_away() -> None:
    san = San()
    one = Initiator(san, 1).open()
    ox_id = one.start(WRITE)
    (ready,) = one.take()
    assert status(one, ox_id) == (RecAcc.OWNER_RESPONDER, 0)
    for frame in list(initiator_data(ready, bytes(4 * BLOCK), 0, seq_id=1, limit=BLOCK))[:3]:
        one.send(frame)
    assert status(one, ox_id) == (RecAcc.OWNER_RESPONDER, 3 * BLOCK)


def test_what_was_never_here_is_not_known() -> None:
    san = San()
    one, other = Initiator(san, 1).open(), Initiator(san, 2).open()
    ox_id = one.start(READ)
    assert rec(one, ox_id + 1) == UNKNOWN
    assert rec(one, ox_id, rx_id=0x7777) == UNKNOWN
    assert rec(other, ox_id) == UNKNOWN
    assert rec(other, ox_id, s_id=one.port_id) == LsRjt(Reason.LOGICAL_ERROR, Explanation.INVALID_ORIGINATOR_S_ID)
    san.run()
    one.take()
    assert rec(one, ox_id, rx_id=0x7777) == UNKNOWN
    one.plogi()
    one.prli()
    assert rec(one, ox_id) == UNKNOWN, "a login anew has ended them all"


def test_only_the_last_ones_are_remembered() -> None:
    san = San()
    one = Initiator(san, 1).open()
    first = one.start(READ)
    san.run()
    for _ in range(KEPT - 1):
        one.command(bytes(6))
    assert isinstance(rec(one, first), RecAcc)
    one.command(bytes(6))
    assert rec(one, first) == UNKNOWN


def test_data_that_never_come_give_way_to_other_commands() -> None:
    """libfc begins a command anew after a REC, and says nothing of the old exchange."""
    san = San()
    one = Initiator(san, 1).open()
    hanging = [one.start(WRITE) for _ in range(san.rations.commands)]
    one.take()
    san.now += DATA_TIMEOUT
    assert one.command(bytes(6))[0].status == Status.TASK_SET_FULL, "they may come yet"
    san.now += 1
    session = san.target.session(one.wwpn)
    assert session is not None
    session.exchanges[hanging[0]].heard = san.now
    assert one.command(bytes(6))[0].status == Status.GOOD
    assert [e.state for e in session.exchanges.values()] == [State.DATA]
    assert list(session.exchanges) == hanging[:1]


# ---------------------------------------------------------------- FCP_CONF


@pytest.fixture
def san() -> San:
    return San()


@pytest.fixture
def one(san: San) -> Initiator:
    """It confirms what it is asked to."""
    one = Initiator(san, 1)
    one.services = FcpService.CONFIRMED_COMPLETION
    one.open()
    return one


def told(one: Initiator, ox_id: int) -> tuple[FcpRsp, FCtl]:
    (frame,) = [f for f in one.take() if f.ox_id == ox_id and f.r_ctl == RCtl.DATA_COMMAND_STATUS]
    return FcpRsp.unpack(frame.payload), FCtl(frame.f_ctl)


def test_confirmed_completion_is_agreed_on_in_prli(san: San, one: Initiator) -> None:
    def agreed(initiator: Initiator) -> int:
        return Prli.unpack(initiator.prli()).pages[0].parameters & FcpService.CONFIRMED_COMPLETION

    assert agreed(one)
    assert not agreed(Initiator(san, 2).open())


def test_sense_data_are_to_be_confirmed_and_nothing_else(san: San, one: Initiator) -> None:
    good = one.start(FcpCmnd(LUN0, bytes(6)))
    san.run()
    rsp, f_ctl = told(one, good)
    assert (rsp.status, rsp.confirm, bool(f_ctl & FCtl.LAST_SEQUENCE)) == (Status.GOOD, False, True)
    bad = one.start(FcpCmnd(LUN0, b"\xee".ljust(16, b"\0")))
    san.run()
    rsp, f_ctl = told(one, bad)
    assert (rsp.status, rsp.confirm) == (Status.CHECK_CONDITION, True)
    assert f_ctl == FCtl.EXCHANGE_RESPONDER | FCtl.END_SEQUENCE | FCtl.SEQUENCE_INITIATIVE
    assert status(one, bad) == (RecAcc.OWNER_RESPONDER, 0), "it is the initiator's turn"
    other = Initiator(san, 2).open()
    assert not other.command(b"\xee".ljust(16, b"\0"))[0].confirm, "which has not agreed"


def attention(san: San, one: Initiator) -> int:
    """The OX_ID of a command whose answer tells of a changed mode page."""
    session = san.target.session(one.wwpn)
    assert session is not None
    san.units[0].attention(Asc.MODE_PARAMETERS_CHANGED, [session.nexus])
    ox_id = one.start(FcpCmnd(LUN0, bytes(6)))
    san.run()
    return ox_id


def test_what_is_confirmed_is_over(san: San, one: Initiator) -> None:
    ox_id = attention(san, one)
    (frame,) = one.take()
    assert attention_in(FcpRsp.unpack(frame.payload).sense) == Asc.MODE_PARAMETERS_CHANGED
    one.send(conf_frame(frame, 1))
    assert status(one, ox_id)[0] == RecAcc.OWNER_RESPONDER | RecAcc.COMPLETED
    one.send(bls.abts_frame(one.port_id, san.target.port_id, ox_id))
    assert one.take()[0].r_ctl == RCtl.BLS_BA_RJT, "too late"
    assert one.command(bytes(6))[0].status == Status.GOOD


def test_a_unit_attention_that_was_lost_with_its_frame_is_told_again(san: San, one: Initiator) -> None:
    ox_id = attention(san, one)
    one.take()  # as if it had not come
    one.send(bls.abts_frame(one.port_id, san.target.port_id, ox_id))
    (answer,) = one.take()
    assert answer.r_ctl == RCtl.BLS_BA_ACC
    san.run()
    rsp, _ = one.command(bytes(6))
    assert attention_in(rsp.sense) == Asc.MODE_PARAMETERS_CHANGED
    assert one.command(bytes(6))[0].status == Status.GOOD


def test_a_confirmation_of_nothing_is_let_pass(san: San, one: Initiator) -> None:
    ox_id = attention(san, one)
    (frame,) = one.take()
    one.send(conf_frame(dataclasses.replace(frame, ox_id=ox_id + 7), 1))
    assert one.take() == []
    assert status(one, ox_id)[0] == RecAcc.OWNER_RESPONDER


@pytest.mark.parametrize("descriptor", [False, True])
def test_which_attention_sense_data_tell(descriptor: bool) -> None:
    def read(key: SenseKey, asc: Asc) -> Asc | None:
        return attention_in(Sense(key, asc).encode(descriptor=descriptor))

    assert read(SenseKey.UNIT_ATTENTION, Asc.POWER_ON_OCCURRED) is Asc.POWER_ON_OCCURRED
    assert read(SenseKey.ILLEGAL_REQUEST, Asc.INVALID_FIELD_IN_CDB) is None
    assert attention_in(b"") is None
