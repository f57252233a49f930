"""Commands and task management functions, from FCP_CMND to their end."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fc.conftest import Pair
from tests.fc.tiny import BLOCK, BURST, INVALID_OPCODE, Done, lun
from vhostfc.fc import els
from vhostfc.fc.els import Els
from vhostfc.fc.exchange import Timers
from vhostfc.fc.fcp import FcpRsp, FcpXferRdy, ResponseCode, TmFlag, xfer_rdy_frame
from vhostfc.fc.frame import FCtl, FcType, Frame, FrameError, RCtl, els_request
from vhostfc.fc.initiator import Command, CommandDone, CommandResult, End, ManagementDone

TUR = bytes(6)


def read(block: int, blocks: int) -> bytes:
    return bytes([0x28, 0]) + block.to_bytes(4, "big") + b"\0" + blocks.to_bytes(2, "big") + b"\0"


def write(block: int, blocks: int) -> bytes:
    return b"\x2a" + read(block, blocks)[1:]


def test_a_read_brings_the_data(online: Pair) -> None:
    online.array.units[lun(3)][:] = random.Random(1).randbytes(64 * BLOCK)

    result = online.run(3, read(2, 50), data_in_length=50 * BLOCK)

    assert result == CommandResult(End.COMPLETE, data_in=bytes(online.array.units[lun(3)][2 * BLOCK : 52 * BLOCK]))


def test_a_write_sends_what_is_asked_for(online: Pair) -> None:
    data = random.Random(2).randbytes(40 * BLOCK)
    online.sent.clear()
    result = online.run(0, write(7, 40), data_out=data)

    assert result == CommandResult(End.COMPLETE)
    assert online.array.units[lun(0)][7 * BLOCK : 47 * BLOCK] == data
    bursts = [frame for frame in online.sent if frame.r_ctl == RCtl.DATA_SOLICITED]
    assert len(bursts) == len(data) // 2048
    assert sum(frame.ends_sequence for frame in bursts) == -(-len(data) // BURST)
    assert {frame.rx_id for frame in bursts} == {online.array.rx_id}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.integers(0, 1 << 32)), max_size=8))
def test_what_is_written_is_read(writes: list[tuple[int, int, int]]) -> None:
    pair = Pair().up()
    model = bytearray(80 * BLOCK)
    pair.array.units[lun(0)] = bytearray(80 * BLOCK)
    for block, blocks, seed in writes:
        data = random.Random(seed).randbytes(blocks * BLOCK)
        model[block * BLOCK : (block + blocks) * BLOCK] = data
        assert pair.run(0, write(block, blocks), data_out=data).end is End.COMPLETE

    assert pair.run(0, read(0, 80), data_in_length=80 * BLOCK).data_in == model


def test_less_data_than_expected_is_a_residual(online: Pair) -> None:
    result = online.run(0, bytes([0x25] + 9 * [0]), data_in_length=20)

    assert (result.end, result.residual, len(result.data_in)) == (End.COMPLETE, 12, 8)


def test_more_data_than_expected_is_a_negative_residual(online: Pair) -> None:
    result = online.run(0, read(0, 4), data_in_length=100)

    assert (result.end, result.residual, len(result.data_in)) == (End.COMPLETE, 100 - 4 * BLOCK, 100)


def test_status_and_sense_come_back(online: Pair) -> None:
    result = online.run(0, bytes([0xEE] + 15 * [0]), data_in_length=64)

    assert (result.end, result.status, result.sense) == (End.COMPLETE, 2, INVALID_OPCODE)


def test_attribute_and_long_cdb_reach_the_target(online: Pair) -> None:
    cdb = bytes([0x7F] + 31 * [7])
    online.run(0, cdb, attribute=2)

    assert (online.array.seen[-1].cdb, online.array.seen[-1].attribute) == (cdb, 2)


def test_a_command_both_ways_states_both_lengths(online: Pair) -> None:
    online.array.hold = True
    online.port.start_command(online.remote, lun(0), bytes(16), online.now, data_out=bytes(24), data_in_length=40)
    online.settle()
    cmnd = online.array.seen[-1]

    assert (cmnd.write, cmnd.read, cmnd.data_length, cmnd.bidirectional_read_length) == (True, True, 24, 40)


def test_an_impossible_cdb_is_refused_before_anything_is_sent(online: Pair) -> None:
    with pytest.raises(FrameError, match="261"):
        online.port.start_command(online.remote, lun(0), bytes(261), online.now)

    assert online.port.commands == []
    assert online.port.take_frames() == []


def test_many_commands_at_a_time_have_identifiers_of_their_own(online: Pair) -> None:
    online.array.hold = True
    commands = [online.port.start_command(online.remote, lun(n % 4), TUR, online.now) for n in range(500)]
    online.settle()
    assert len({command.ox_id for command in commands}) == 500
    assert online.port.commands == commands

    frames = online.array.release()
    random.Random(3).shuffle(frames)
    online.inject(*frames)
    assert all(online.result(command).end is End.COMPLETE for command in commands)
    assert online.port.commands == []


def test_lost_data_is_not_taken_for_data(online: Pair) -> None:
    lost = iter([True])
    online.lose = lambda frame: frame.r_ctl == RCtl.DATA_SOLICITED and frame.seq_cnt == 3 and next(lost, False)
    result = online.run(0, read(0, 16), data_in_length=16 * BLOCK)
    assert result.end is End.FAILED
    assert [frame.r_ctl for frame in online.sent[-1:]] == [RCtl.BLS_ABTS]

    last = iter([True])
    online.lose = lambda frame: frame.r_ctl == RCtl.DATA_SOLICITED and frame.ends_sequence and next(last, False)
    assert online.run(0, read(0, 16), data_in_length=16 * BLOCK).end is End.FAILED


def test_a_response_that_says_the_exchange_went_wrong_is_a_failure(online: Pair) -> None:
    online.array.script = lambda _cmnd: FcpRsp(code=ResponseCode.DATA_LENGTH_MISMATCH)

    assert online.run(0, TUR).end is End.FAILED


def test_a_transfer_ready_beyond_the_data_ends_the_command(online: Pair) -> None:
    online.array.hold = True
    command = online.port.start_command(online.remote, lun(0), write(0, 1), online.now, data_out=bytes(BLOCK))
    online.settle()
    cmnd = online.sent[-1]
    online.inject(xfer_rdy_frame(cmnd, 5, 1, FcpXferRdy(256, 512)))

    assert online.result(command).end is End.FAILED
    assert not [frame for frame in online.sent if frame.r_ctl == RCtl.DATA_SOLICITED]


# ---------------------------------------------------------------- time and aborts


def start(pair: Pair, **how: object) -> Command:
    """A command that the target keeps."""
    pair.array.hold = True
    command = pair.port.start_command(pair.remote, lun(0), TUR, pair.now, **how)  # type: ignore[arg-type]  # any of its keywords
    pair.settle()
    return command


def test_a_command_that_takes_too_long_is_aborted(online: Pair) -> None:
    command = start(online, timeout=30.0)
    online.advance(29.9)
    assert not [event for event in online.events if isinstance(event, CommandDone)]

    online.advance(0.1)
    assert online.result(command).end is End.TIMED_OUT
    assert online.array.tasks == {}


def test_an_abort_ends_with_the_targets_answer(online: Pair) -> None:
    command = start(online)
    online.port.abort(command, online.now)
    online.settle()

    assert online.result(command).end is End.ABORTED
    abts = online.sent[-1]
    assert (abts.r_ctl, abts.ox_id) == (RCtl.BLS_ABTS, command.ox_id)
    assert online.port.commands == []


def test_a_response_that_was_on_its_way_beats_the_abort(online: Pair) -> None:
    command = start(online)
    frames = online.array.release()
    online.port.abort(command, online.now)
    online.inject(*frames)

    assert online.result(command).end is End.COMPLETE


def test_an_aborted_exchange_is_given_back_to_the_target_later(online: Pair) -> None:
    command = start(online)
    online.port.abort(command, online.now)
    online.settle()
    online.advance(9.9)
    assert online.sent[-1].r_ctl == RCtl.BLS_ABTS

    online.advance(0.1)
    assert els.parse_request(online.sent[-1].payload) == els.Rrq(online.port.port_id, command.ox_id, command.rx_id)


def test_the_identifier_of_an_aborted_exchange_rests(online: Pair) -> None:
    command = start(online)
    online.port.abort(command, online.now)
    online.settle()
    online.array.hold = False
    wire = online.port._wire
    wire._next = command.ox_id
    after = online.port.start_command(online.remote, lun(0), TUR, online.now)
    assert after.ox_id == command.ox_id + 1

    online.settle()
    online.advance(25)
    wire._next = command.ox_id
    assert online.port.start_command(online.remote, lun(0), TUR, online.now).ox_id == command.ox_id


def test_a_target_that_ignores_an_abort_is_logged_out(online: Pair) -> None:
    command, other = start(online), start(online)
    online.array.mute = True
    online.sent.clear()
    online.port.abort(command, online.now)
    online.settle()
    online.advance(9.9)
    assert not [event for event in online.events if isinstance(event, CommandDone)]

    online.advance(0.1)
    assert online.result(command).end is End.TIMED_OUT, "an abort that nobody answered is none"
    assert online.result(other).end is End.LOST
    assert [Els(f.payload[0]) for f in online.sent if f.r_ctl == RCtl.ELS_REQUEST] == [Els.LOGO, Els.PLOGI]


def test_when_all_identifiers_rest_the_oldest_is_used_again(online: Pair) -> None:
    wire = online.port._wire
    wire._resting = dict.fromkeys([77, *range(0xFFFF)], online.now + 1)

    assert online.port.start_command(online.remote, lun(0), TUR, online.now).ox_id == 77
    assert online.port.start_command(online.remote, lun(0), TUR, online.now).ox_id == 0


def test_when_all_identifiers_are_in_use_there_is_an_error(online: Pair) -> None:
    online.array.hold = True
    for _ in range(0xFFFF):
        online.port.start_command(online.remote, lun(0), TUR, online.now)

    with pytest.raises(FrameError, match="exchange"):
        online.port.start_command(online.remote, lun(0), TUR, online.now)
    assert len(online.port.commands) == 0xFFFF


# ---------------------------------------------------------------- task management


@pytest.mark.parametrize("flag", [TmFlag.ABORT_TASK_SET, TmFlag.CLEAR_TASK_SET, TmFlag.LOGICAL_UNIT_RESET])
def test_what_a_function_ends_has_ended_before_it(online: Pair, flag: TmFlag) -> None:
    online.array.hold = True
    ended = [online.port.start_command(online.remote, lun(0), TUR, online.now) for _ in range(3)]
    spared = online.port.start_command(online.remote, lun(3), TUR, online.now)
    online.settle()
    online.take_events()
    management = online.port.manage(online.remote, lun(0), flag, 10, online.now)
    online.settle()

    aborted = CommandResult(End.ABORTED)
    assert online.take_events() == [
        *(CommandDone(command, aborted) for command in ended),
        ManagementDone(management, ResponseCode.COMPLETE),
    ]
    assert online.port.commands == [spared]


def test_a_function_that_ends_nothing_lets_commands_be(online: Pair) -> None:
    command = start(online)
    management = online.port.manage(online.remote, lun(0), TmFlag.CLEAR_ACA, 10, online.now)
    online.settle()

    assert ManagementDone(management, ResponseCode.COMPLETE) in online.events
    assert online.port.commands == [command]


def test_a_function_for_a_unit_that_is_not_there(online: Pair) -> None:
    management = online.port.manage(online.remote, lun(77), TmFlag.LOGICAL_UNIT_RESET, 10, online.now)
    online.settle()

    assert ManagementDone(management, ResponseCode.INCORRECT_LUN) in online.events


def test_a_function_that_gets_no_answer_ends_without_a_code(online: Pair) -> None:
    online.array.mute = True
    management = online.port.manage(online.remote, lun(0), TmFlag.LOGICAL_UNIT_RESET, 10, online.now)
    online.settle()
    online.advance(20)

    assert ManagementDone(management, None) in online.events


def test_a_nexus_reset_is_a_new_login(online: Pair) -> None:
    command = start(online)
    online.array.hold = False
    online.sent.clear()
    online.port.reset_nexus(online.remote, online.now)
    online.settle()

    assert online.result(command).end is End.LOST
    requests = [Els(f.payload[0]) for f in online.sent if f.r_ctl == RCtl.ELS_REQUEST]
    assert requests == [Els.LOGO, Els.PLOGI, Els.PRLI]
    assert online.remote.logged_in
    assert online.run(0, TUR).end is End.COMPLETE


# ---------------------------------------------------------------- timers


def test_timers_run_in_order_and_only_once() -> None:
    timers, ran = Timers(), list[tuple[str, float]]()
    for name, at in [("b", 2.0), ("a", 1.0), ("c", 3.0), ("b2", 2.0)]:
        timers.set(at, lambda now, name=name: ran.append((name, now)))  # type: ignore[misc]  # mypy infers no lambda's defaults
    timers.tick(2.5)
    timers.tick(2.6)

    assert ran == [("a", 2.5), ("b", 2.5), ("b2", 2.5)]
    assert timers.deadline() == 3.0


def test_a_cancelled_timer_does_not_run_nor_stay() -> None:
    timers, ran = Timers(), list[float]()
    kept = timers.set(5.0, ran.append)
    for _ in range(1000):
        timers.cancel(timers.set(9.0, ran.append))
    timers.cancel(None)

    assert len(timers._heap) < 200
    timers.tick(10.0)
    assert ran == [10.0]
    timers.cancel(kept)
    assert timers.deadline() is None


def test_an_unknown_frame_in_an_exchange_is_overlooked(online: Pair) -> None:
    command = start(online)
    cmnd = online.sent[-1]
    online.inject(Frame(0x44, cmnd.s_id, cmnd.d_id, 8, 0x800000, cmnd.ox_id))
    assert online.port.commands == [command]

    online.array.script = lambda _cmnd: Done()
    online.inject(*online.array.release())
    assert online.result(command).end is End.COMPLETE


# ---------------------------------------------------------------- confirmation, and REC


def test_a_response_that_wants_to_be_confirmed_is(online: Pair) -> None:
    online.array.script = lambda _cmnd: FcpRsp(2, sense=INVALID_OPCODE, confirm=True)
    online.sent.clear()
    result = online.run(0, bytes(6))

    assert (result.end, result.status) == (End.COMPLETE, 2)
    cmnd, conf = online.sent
    assert (conf.r_ctl, conf.type, conf.payload) == (RCtl.DATA_SOLICITED_CONTROL, FcType.FCP, b"")
    assert conf.f_ctl == FCtl.LAST_SEQUENCE | FCtl.END_SEQUENCE
    assert (conf.ox_id, conf.d_id, conf.rx_id) == (cmnd.ox_id, online.array.port_id, online.array.rx_id)


def test_prli_says_that_we_confirm(online: Pair) -> None:
    (page,) = [els.Prli.unpack(f.payload).pages[0] for f in online.sent if f.payload[:1] == b"\x20"]
    assert page.parameters & els.FcpService.CONFIRMED_COMPLETION


def test_a_target_may_ask_how_far_an_exchange_has_come(online: Pair) -> None:
    online.array.hold = True
    command = online.port.start_command(online.remote, lun(0), read(0, 8), online.now, data_in_length=8 * BLOCK)
    online.settle()

    def ask(s_id: int, ox_id: int) -> bytes:
        online.sent.clear()
        rec = els.Rec(s_id, ox_id, 0xFFFF).pack()
        online.inject(els_request(online.array.port_id, online.port.port_id, 0x99, rec))
        return online.sent[0].payload

    me = online.port.port_id
    accept = els.RecAcc.unpack(ask(me, command.ox_id))
    assert (accept.ox_id, accept.originator_id, accept.responder_id) == (command.ox_id, me, online.array.port_id)
    assert accept.status == 0, "ours, under way, and it is the target's turn"
    for s_id, ox_id in ((me, command.ox_id + 1), (online.array.port_id, command.ox_id)):
        rejection = els.LsRjt.unpack(ask(s_id, ox_id))
        assert rejection == els.LsRjt(els.Reason.LOGICAL_ERROR, els.Explanation.INVALID_OX_ID_RX_ID)
