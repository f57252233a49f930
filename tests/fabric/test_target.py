"""A target port: logins, exchanges, data both ways, aborts, task management, masking; frame by frame."""

from __future__ import annotations

import pytest

from tests.fabric.san import BLOCK, NODE, TARGET, Initiator, San, wwpn
from vhostfc.fabric.sessions import Abort, Lost, Manage, State
from vhostfc.fabric.target import BURST, MAX_DATA_OUT
from vhostfc.fc import bls, els
from vhostfc.fc.els import Els, Explanation, FcpService, LsRjt, Reason
from vhostfc.fc.fcp import FcpCmnd, FcpRsp, FcpXferRdy, ResponseCode, TmFlag, cmnd_frame
from vhostfc.fc.frame import FCtl, FcType, Frame, RCtl
from vhostfc.fc.login import Login
from vhostfc.fc.sequence import initiator_data
from vhostfc.scsi.task import ScsiResult, Status

LUN0 = bytes(8)
LUN1 = b"\0\1" + bytes(6)


def read_10(lba: int, blocks: int) -> bytes:
    return bytes([0x28, 0, *lba.to_bytes(4, "big"), 0, *blocks.to_bytes(2, "big"), 0])


def write_10(lba: int, blocks: int) -> bytes:
    return bytes([0x2A, *read_10(lba, blocks)[1:]])


def begin_write(one: Initiator, blocks: int, length: int | None = None) -> tuple[int, Frame, FcpXferRdy]:
    """Send a WRITE(10) at LBA 0; its OX_ID and the first FCP_XFER_RDY."""
    size = blocks * BLOCK if length is None else length
    ox_id = one.start(FcpCmnd(LUN0, write_10(0, blocks), size, write=True))
    (frame,) = one.take()
    assert frame.r_ctl == RCtl.DATA_DESCRIPTOR
    return ox_id, frame, FcpXferRdy.unpack(frame.payload)


def rejection(one: Initiator, payload: bytes) -> LsRjt | None:
    return els.rejection(one.els(one.san.target.port_id, payload))


# ---------------------------------------------------------------- logins


def test_plogi_and_prli_tell_who_we_are() -> None:
    san = San()
    one = Initiator(san, 1).login()
    accept = Login.unpack(one.plogi())
    assert (accept.command, accept.wwpn) == (Els.LS_ACC, TARGET)
    (page,) = els.Prli.unpack(one.prli()).pages
    assert page.response == 1
    assert page.flags & els.PrliPage.ESTABLISH
    assert page.parameters == FcpService.TARGET | FcpService.READ_XFER_RDY_DISABLED


def test_a_name_that_is_not_the_sender_s_gets_no_login() -> None:
    one = Initiator(San(), 1).login()
    one.wwpn = wwpn(9)
    assert els.rejection(one.plogi()) == LsRjt(Reason.LOGICAL_ERROR, Explanation.INVALID_PORT_NAME)


def test_prli_wants_a_plogi_and_a_type_that_we_have() -> None:
    one = Initiator(San(), 1).login()
    assert els.rejection(one.prli()) == LsRjt(Reason.UNABLE_TO_PERFORM, Explanation.LOGIN_REQUIRED)
    one.plogi()
    other = els.Prli((els.PrliPage(0x28, els.PrliPage.ESTABLISH, FcpService.INITIATOR),))
    (page,) = els.Prli.unpack(one.els(one.san.target.port_id, other.pack())).pages
    assert page.response == 5
    assert one.san.target.session(one.wwpn) is None


def test_commands_without_a_login_are_answered_with_logo() -> None:
    san = San()
    one = Initiator(san, 1).login()
    for _ in range(2):
        one.start(FcpCmnd(LUN0, bytes(6)))
        (frame,) = one.take()
        assert els.Logo.unpack(frame.payload) == els.Logo(san.target.port_id, TARGET)
        one.plogi()  # an image pair is wanted too


def test_the_small_link_services() -> None:
    san = San()
    one = Initiator(san, 1).open()
    target = san.target.port_id
    adisc = els.Adisc.unpack(one.els(target, els.Adisc(one.wwpn, one.wwnn, one.port_id).pack()))
    assert (adisc.wwpn, adisc.port_id) == (TARGET, target)
    assert els.RtvAcc.unpack(one.els(target, els.Rtv().pack())).e_d_tov == 2000
    assert one.els(target, els.Rrq(one.port_id, 1, 2).pack()) == els.LS_ACC
    assert one.els(target, els.Echo(b"abc!").pack())[4:] == b"abc!"
    node = els.RnidAcc.unpack(one.els(target, els.Rnid(els.NodeFormat.GENERAL_TOPOLOGY).pack()))
    assert node == els.RnidAcc(TARGET, NODE, els.AssociatedType.STORAGE_SUBSYSTEM, vendor=b"vhostfc")
    assert els.RnidAcc.unpack(one.els(target, els.Rnid(0x77).pack())) == els.RnidAcc(TARGET, NODE)
    assert rejection(one, bytes([0x77, 0, 0, 0])) == LsRjt(Reason.NOT_SUPPORTED, Explanation.NOT_SUPPORTED)


@pytest.mark.parametrize("how", ["logo", "prlo", "plogi", "detach"])
def test_every_way_out_is_a_lost_nexus_and_drops_what_waits(how: str) -> None:
    san = San()
    one = Initiator(san, 1).open()
    begin_write(one, 1)
    one.start(FcpCmnd(LUN0, bytes(6)))
    session = san.target.session(one.wwpn)
    match how:
        case "logo":
            assert one.els(san.target.port_id, els.Logo(one.port_id, one.wwpn).pack()) == els.LS_ACC
        case "prlo":
            prlo = els.Prli((els.PrliPage(FcType.FCP),), Els.PRLO)
            assert one.els(san.target.port_id, prlo.pack())[0] == Els.LS_ACC
        case "plogi":
            one.plogi()
        case _:
            san.switch.detach(one.f_port)
    assert [type(item) for item in san.urgent] == [Lost]
    assert san.target.session(one.wwpn) is None
    assert session is not None
    assert session.exchanges == {}
    assert san.rations.usage(one.wwpn) == (0, 0)
    assert san.rations.take() is None


# ---------------------------------------------------------------- data


def test_a_read_comes_in_frames_and_a_response() -> None:
    san = San()
    one = Initiator(san, 1).open()
    san.stored[san.units[0]][: 20 * BLOCK] = bytes(n // BLOCK for n in range(20 * BLOCK))
    rsp, data = one.command(read_10(0, 20), data_in=20 * BLOCK)
    assert (rsp.status, rsp.residual) == (Status.GOOD, 0)
    assert data == san.stored[san.units[0]][: 20 * BLOCK]


def test_a_port_with_a_small_receive_size_gets_small_frames() -> None:
    san = San()
    one = Initiator(san, 1).login()
    login = Login.plogi(one.wwpn, one.wwnn)
    small = Login.unpack(login.pack()[:10] + (1000).to_bytes(2, "big") + login.pack()[12:])
    assert one.els(san.target.port_id, small.pack())[0] == Els.LS_ACC
    one.prli()
    san.run()
    one.command(bytes(6))
    one.start(FcpCmnd(LUN0, read_10(0, 4), 4 * BLOCK, read=True))
    san.run()
    assert [len(frame.payload) for frame in one.take() if frame.r_ctl == RCtl.DATA_SOLICITED] == [512] * 4


def test_residuals_both_ways() -> None:
    one = Initiator(San(), 1).open()
    rsp, data = one.command(bytes([0x12, 0, 0, 0, 36, 0]), data_in=100)
    assert (rsp.residual, len(data)) == (64, 36)
    rsp, data = one.command(bytes([0x12, 0, 0, 0, 96, 0]), data_in=36)
    assert (rsp.residual, len(data)) == (-60, 36)
    rsp, _ = one.command(read_10(0, 2), data_in=BLOCK)
    assert rsp.residual == -BLOCK


@pytest.mark.parametrize("blocks", [1, 128, 129, 256])
def test_a_write_is_asked_for_in_bursts(blocks: int) -> None:
    san = San()
    one = Initiator(san, 1).open()
    data = bytes((n // BLOCK * 7 + n) & 0xFF for n in range(blocks * BLOCK))
    ox_id, frame, wanted = begin_write(one, blocks)
    bursts = 0
    while True:
        bursts += 1
        assert wanted.length == min(BURST, len(data) - wanted.offset)
        part = data[wanted.offset : wanted.offset + wanted.length]
        for one_frame in initiator_data(frame, part, wanted.offset, seq_id=bursts):
            one.send(one_frame)
        more = one.take()
        if not more:
            break
        (frame,) = more
        wanted = FcpXferRdy.unpack(frame.payload)
    san.run()
    rsp, _ = one.result(ox_id)
    assert rsp.status == Status.GOOD
    assert bursts == -(-len(data) // BURST)
    assert san.stored[san.units[0]][: len(data)] == data


@pytest.mark.parametrize(
    ("offset", "length", "end", "code"),
    [
        (512, 512, True, ResponseCode.DATA_RO_MISMATCH),  # a hole: the first frame was lost
        (0, 512, True, ResponseCode.DATA_LENGTH_MISMATCH),  # the last frame was lost
        (0, 1536, True, ResponseCode.DATA_RO_MISMATCH),  # more than was asked for
    ],
)
def test_data_that_are_not_what_was_asked_for(offset: int, length: int, end: bool, code: ResponseCode) -> None:
    san = San()
    one = Initiator(san, 1).open()
    ox_id, frame, _ = begin_write(one, 2)
    f_ctl = FCtl.RELATIVE_OFFSET | (FCtl.END_SEQUENCE if end else 0)
    one.send(
        Frame(
            RCtl.DATA_SOLICITED,
            frame.s_id,
            one.port_id,
            FcType.FCP,
            f_ctl,
            ox_id,
            frame.rx_id,
            parameter=offset,
            payload=b"x" * length,
        )
    )
    rsp, _ = one.result(ox_id)
    assert rsp.code == code
    assert san.rations.usage(one.wwpn) == (0, 0)
    san.run()
    assert not any(san.stored[san.units[0]])


def test_what_nobody_may_ask_for() -> None:
    san = San()
    one = Initiator(san, 1).open()
    rsp, _ = one.result(one.start(FcpCmnd(LUN0, write_10(0, 1), MAX_DATA_OUT + 1, write=True)))
    assert rsp.status == Status.CHECK_CONDITION
    rsp, _ = one.result(one.start(FcpCmnd(LUN0, bytes(16), tm_flags=TmFlag.ABORT_TASK_SET | TmFlag.CLEAR_ACA)))
    assert rsp.code == ResponseCode.INVALID_CMND_FIELD
    assert not san.urgent


def test_over_the_ration_is_task_set_full_and_others_have_theirs() -> None:
    san = San()
    one, two = Initiator(san, 1).open(), Initiator(san, 2).open()
    running = [one.start(FcpCmnd(LUN0, bytes(6))) for _ in range(4)]
    over = one.start(FcpCmnd(LUN0, bytes(6)))
    assert one.result(over)[0].status == Status.TASK_SET_FULL
    assert two.command(bytes(6))[0].status == Status.GOOD
    frames = one.take()
    assert {frame.ox_id for frame in frames} == set(running)
    assert one.command(bytes(6))[0].status == Status.GOOD, "what has been answered counts no more"


def test_over_the_ration_is_busy_where_the_nexus_has_nothing_at_the_unit() -> None:
    """SAM-5 5.3.1: TASK SET FULL is for who has a task in the set; it would wait for one of its own to end."""
    san = San()
    one = Initiator(san, 1).open()
    for _ in range(4):
        one.start(FcpCmnd(LUN0, bytes(6)))
    assert one.result(one.start(FcpCmnd(LUN1, bytes(6))))[0].status == Status.BUSY
    assert one.result(one.start(FcpCmnd(LUN0, bytes(6))))[0].status == Status.TASK_SET_FULL


# ---------------------------------------------------------------- aborts and task management


@pytest.mark.parametrize("state", [State.DATA, State.WAITING, State.RUNNING])
def test_abts_ends_a_command_wherever_it_is(state: State) -> None:
    san = San()
    one = Initiator(san, 1).open()
    if state is State.DATA:
        ox_id, _, _ = begin_write(one, 1)
    else:
        ox_id = one.start(FcpCmnd(LUN0, bytes(6)))
    session = san.target.session(one.wwpn)
    assert session is not None
    exchange = session.exchanges[ox_id]
    if state is State.RUNNING:
        san.rations.take()
        san.target.begin(exchange)
    assert exchange.state is state
    one.send(bls.abts_frame(one.port_id, san.target.port_id, ox_id))
    if state is State.RUNNING:
        assert one.take() == [], "not before the command is known to be gone"
        abort = san.urgent.popleft()
        assert isinstance(abort, Abort)
        assert abort.reply is not None
        san.deliver(san.switch.send(abort.reply))
    (answer,) = one.take()
    assert answer.r_ctl == RCtl.BLS_BA_ACC
    assert bls.BaAcc.unpack(answer.payload).ox_id == ox_id
    assert list(san.target.finish(exchange, ScsiResult())) == [], "an aborted command has no answer"
    assert san.rations.usage(one.wwpn) == (0, 0)


def test_abts_for_an_exchange_that_is_not_here() -> None:
    san = San()
    one = Initiator(san, 1).open()
    one.send(bls.abts_frame(one.port_id, san.target.port_id, 0x7777))
    (answer,) = one.take()
    assert answer.r_ctl == RCtl.BLS_BA_RJT


def test_the_same_ox_id_again_ends_the_command_before() -> None:
    san = San()
    one = Initiator(san, 1).open()
    ox_id, _, _ = begin_write(one, 1)
    one.ox_id = ox_id - 1
    assert one.command(bytes(6))[0].status == Status.GOOD
    assert san.rations.usage(one.wwpn) == (0, 0)


def test_what_comes_late_of_an_exchange_is_not_taken_for_its_successor_s() -> None:
    san = San()
    one = Initiator(san, 1).open()
    ox_id, asked, _ = begin_write(one, 1)
    late = list(initiator_data(asked, b"O" * BLOCK, 0, seq_id=1))
    late.append(bls.abts_frame(one.port_id, san.target.port_id, ox_id, asked.rx_id))
    one.plogi()
    one.prli()
    command = cmnd_frame(one.port_id, san.target.port_id, ox_id, FcpCmnd(LUN0, write_10(0, 1), BLOCK, write=True))
    san.switch.receive(one.f_port, command.pack())
    (exchange,) = san.target.exchanges()
    one.take()
    for frame in late:
        for f_port, answer in san.switch.receive(one.f_port, frame.pack()):
            assert f_port == one.f_port
            assert isinstance(answer, bytes)
            assert bls.BaRjt.unpack(Frame.unpack(answer).payload).reason == bls.Reason.LOGICAL_ERROR
    assert exchange.state is State.DATA
    assert exchange.data is not None
    assert exchange.data.received == 0


def test_a_task_management_function_goes_to_the_runner_past_the_queue() -> None:
    san = San()
    one = Initiator(san, 1).open()
    one.start(FcpCmnd(LUN0, bytes(6)))
    ox_id = one.start(FcpCmnd(LUN0, bytes(16), tm_flags=TmFlag.LOGICAL_UNIT_RESET))
    manage = san.urgent.popleft()
    assert isinstance(manage, Manage)
    for frame in san.target.respond(manage.exchange, ResponseCode.COMPLETE):
        san.deliver(san.switch.send(frame))
    rsp, _ = one.result(ox_id)
    assert rsp == FcpRsp(code=ResponseCode.COMPLETE)


# ---------------------------------------------------------------- what an initiator may see


def luns(data: bytes) -> list[int]:
    return [data[at + 1] for at in range(8, len(data), 8)]


def test_task_management_functions_are_rationed_too() -> None:
    """Each waits for fences, so a port that asks without end must not have them all wait at once."""
    san = San()
    one, other = Initiator(san, 1).open(), Initiator(san, 2).open()
    function = FcpCmnd(LUN0, bytes(16), tm_flags=TmFlag.QUERY_TASK_SET)
    kept = [one.start(function) for _ in range(san.rations.commands)]
    rsp, _ = one.result(one.start(function))
    assert rsp.code == ResponseCode.FAILED
    other.start(function)
    assert len(san.urgent) == len(kept) + 1
    (first,) = [e for e in san.target.exchanges() if e.frame.ox_id == kept[0] and e.session.wwpn == one.wwpn]
    san.target.respond(first, ResponseCode.COMPLETE)
    one.start(function)
    assert not one.take()


def test_report_luns_shows_what_the_mask_lets_through() -> None:
    san = San()
    report = bytes([0xA0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0])
    for number, seen in ((1, [0]), (2, [0, 1])):
        one = Initiator(san, number).open()
        assert luns(one.command(report, data_in=256)[1]) == seen


def test_a_masked_unit_and_a_lun_without_a_unit_look_alike() -> None:
    san = San()
    one = Initiator(san, 1).open()
    inquiry, ready = bytes([0x12, 0, 0, 0, 36, 0]), bytes(6)
    masked, nothing = one.command(inquiry, lun=1, data_in=36), one.command(inquiry, lun=9, data_in=36)
    assert masked == nothing
    assert masked[1][0] == 0x7F
    assert one.command(ready, lun=1) == one.command(ready, lun=9)
    rsp, _ = one.command(ready, lun=1)
    assert (rsp.sense[2] & 0xF, rsp.sense[12], rsp.sense[13]) == (5, 0x25, 0)


def test_the_well_known_report_luns_unit() -> None:
    san = San()
    one = Initiator(san, 1).open()
    lun = bytes.fromhex("c101000000000000")
    ox_id = one.start(FcpCmnd(lun, bytes([0xA0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]), 256, read=True))
    san.run()
    assert luns(one.result(ox_id)[1]) == [0]
