"""What faults do to frames and commands, and that they do the same each time."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fabric.san import wwpn
from vhostfc.fabric.faults import (
    EXCHANGES,
    Active,
    CommandFate,
    Dice,
    Direction,
    Fate,
    Fault,
    FrameFaults,
    Latency,
    UnitFaults,
    What,
)
from vhostfc.fc import bls, ct, els, ns
from vhostfc.fc.els import Els, Explanation, LsRjt, Reason
from vhostfc.fc.fcp import FcpCmnd, FcpRsp, cmnd_frame, rsp_frame
from vhostfc.fc.frame import Address, Frame, RCtl, els_request
from vhostfc.fc.login import Login
from vhostfc.fc.wwn import Wwn
from vhostfc.scsi.task import Status

HOST, ARRAY = 0x010101, 0x01FE01
NAMES = {HOST: wwpn(1), ARRAY: Wwn(0x5006_0160_0000_0001)}
PLOGI = els_request(HOST, ARRAY, 1, Login.plogi(wwpn(1), wwpn(1)).pack())
FLOGI = els_request(0, Address.F_PORT, 2, Login.flogi(wwpn(7), wwpn(7)).pack())
GPN_FT = ct.ct_request(HOST, Address.DIRECTORY_SERVER, 3, ns.ByFc4Type(ct.Ct.GPN_FT).pack())
READ = cmnd_frame(HOST, ARRAY, 4, FcpCmnd(bytes(8), bytes([0x28]) + bytes(9), 512, read=True))
DATA = Frame(RCtl.DATA_SOLICITED, HOST, ARRAY, 8, 0x880008, 4, 9, payload=bytes(512))
RSP = rsp_frame(READ, 9, 1, FcpRsp())
ABTS = bls.abts_frame(HOST, ARRAY, 4)
ALL = {"plogi": PLOGI, "flogi": FLOGI, "gpn_ft": GPN_FT, "read": READ, "data": DATA, "rsp": RSP, "abts": ABTS}


def door(*faults: Fault, seed: int = 1) -> FrameFaults:
    door = FrameFaults(NAMES.get)
    for number, fault in enumerate(faults):
        door.add(Active(fault if fault.name else named(fault, f"f{number}"), seed))
    return door


def named(fault: Fault, name: str) -> Fault:
    return dataclasses.replace(fault, name=name)


def meet(door: FrameFaults, frame: Frame, direction: Direction = Direction.IN) -> Fate:
    return door.meet(direction, frame.pack())


@pytest.mark.parametrize(
    ("fault", "hit"),
    [
        (Fault(What.LOSE), set(ALL)),
        (Fault(What.LOSE, s_id=ARRAY), {"data", "rsp"}),
        (Fault(What.LOSE, d_id=Address.DIRECTORY_SERVER), {"gpn_ft"}),
        (Fault(What.LOSE, wwpn=wwpn(1)), set(ALL) - {"flogi"}),
        (Fault(What.LOSE, wwpn=wwpn(1), target=NAMES[ARRAY]), set(ALL) - {"flogi", "gpn_ft"}),
        (Fault(What.LOSE, wwpn=wwpn(7)), {"flogi"}),
        (Fault(What.LOSE, wwpn=wwpn(8)), set()),
        (Fault(What.LOSE, r_ctl=RCtl.DATA_SOLICITED), {"data"}),
        (Fault(What.LOSE, type=8), {"read", "data", "rsp"}),
        (Fault(What.LOSE, els=Els.PLOGI), {"plogi"}),
        (Fault(What.LOSE, ct=ct.Ct.GPN_FT), {"gpn_ft"}),
        (Fault(What.LOSE, opcode=0x28), {"read", "data", "rsp", "abts"}),
        (Fault(What.LOSE, opcode=0x2A), set()),
        (Fault(What.LOSE, direction=Direction.OUT), set()),
        (Fault(What.REJECT, els=Els.FLOGI), {"flogi"}),
        (Fault(What.REJECT, type=8), set()),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value.what.value),
)
def test_a_filter_lets_all_others_pass(fault: Fault, hit: set[str]) -> None:
    faults = door(fault)
    assert {name for name, frame in ALL.items() if meet(faults, frame).hits} == hit


def test_the_fates_of_a_frame() -> None:
    data = PLOGI.pack()
    assert meet(door(), PLOGI) == Fate(((0.0, data),))
    assert meet(door(Fault(What.LOSE)), PLOGI).copies == ()
    assert meet(door(Fault(What.DELAY, latency=Latency(0.5))), PLOGI).copies == ((0.5, data),)
    assert meet(door(Fault(What.DUPLICATE)), PLOGI).copies == ((0.0, data), (0.0, data))
    late_twice = meet(door(Fault(What.DUPLICATE), Fault(What.DELAY, latency=Latency(0.1))), PLOGI)
    assert late_twice.copies == ((0.1, data), (0.1, data))
    assert late_twice.comment == "sent twice: fault f0; late: fault f1"


def test_a_rejected_request_is_answered_in_the_name_of_its_destination() -> None:
    fault = Fault(
        What.REJECT, els=Els.PLOGI, reason=Reason.LOGICAL_BUSY, explanation=Explanation.INSUFFICIENT_RESOURCES
    )
    assert not meet(door(fault), PLOGI, Direction.OUT).hits, "nobody but a port outside asks"
    fate = meet(door(fault), PLOGI)
    assert fate.copies == ()
    assert fate.answer is not None
    assert (fate.answer.s_id, fate.answer.d_id, fate.answer.ox_id) == (ARRAY, HOST, 1)
    assert els.rejection(fate.answer.payload) == LsRjt(Reason.LOGICAL_BUSY, Explanation.INSUFFICIENT_RESOURCES)


def test_a_corrupt_frame_differs_in_one_bit() -> None:
    data = DATA.pack()
    for byte in (None, 0, 24, 500):
        ((_, bad),) = meet(door(Fault(What.CORRUPT, byte=byte)), DATA).copies
        (at,) = (i for i in range(len(data)) if data[i] != bad[i])
        assert at == byte if byte is not None else at >= 24
        assert (data[at] ^ bad[at]).bit_count() == 1
    beyond = meet(door(Fault(What.CORRUPT, byte=3000)), DATA)
    assert beyond.copies == ((0.0, data),)


def test_a_count_is_of_hits_and_ends_the_fault() -> None:
    faults = FrameFaults(NAMES.get)
    active = Active(Fault(What.LOSE, "x", count=2, els=Els.PLOGI), 1)
    faults.add(active)
    fates = [bool(meet(faults, frame).copies) for frame in (PLOGI, READ, PLOGI, PLOGI)]
    assert fates == [False, True, False, True]
    assert active.over


def test_the_same_seed_hits_the_same_frames_whatever_other_faults_there_are() -> None:
    lossy, noise = Fault(What.LOSE, "a", rate=0.3, type=8), Fault(What.DUPLICATE, "b", rate=0.5)

    def lost(faults: FrameFaults) -> list[bool]:
        return [not meet(faults, READ).copies for _ in range(500)]

    once = lost(door(lossy))
    assert once == lost(door(lossy)) == lost(door(noise, lossy))
    assert once != lost(door(lossy, seed=2))
    assert 100 < sum(once) < 200


def test_opcodes_are_remembered_within_bounds_and_only_while_asked_for() -> None:
    faults = door(Fault(What.LOSE, "a", opcode=0x28, count=0))
    for ox_id in range(EXCHANGES + 10):
        meet(faults, cmnd_frame(HOST + (ox_id >> 16), ARRAY, ox_id & 0xFFFF, FcpCmnd(bytes(8), bytes([0x28]))))
    assert faults._opcodes is not None
    assert len(faults._opcodes) == EXCHANGES
    faults.remove("a")
    assert faults._opcodes is None


@given(st.binary(max_size=200), st.sampled_from(list(Direction)))
def test_nothing_that_arrives_is_too_odd(data: bytes, direction: Direction) -> None:
    faults = door(
        Fault(What.CORRUPT, opcode=1), Fault(What.REJECT, els=0x51, count=0), Fault(What.CORRUPT), Fault(What.DUPLICATE)
    )
    assert len(faults.meet(direction, data).copies) in {1, 2}


# ---------------------------------------------------------------- latencies


def test_latencies_have_the_distribution_that_they_are_given() -> None:
    dice = Dice(7)
    assert {Latency(0.2).draw(dice) for _ in range(5)} == {0.2}
    uniform = [Latency(0.1, 0.3).draw(dice) for _ in range(2000)]
    assert 0.1 <= min(uniform) < 0.11
    assert 0.29 < max(uniform) <= 0.3
    exponential = sorted(Latency(mean=0.1).draw(dice) for _ in range(4000))
    assert 0.09 < sum(exponential) / 4000 < 0.11
    assert 0.06 < exponential[2000] < 0.08, "the median is ln 2 of the mean"


def test_dice_are_fair() -> None:
    dice = Dice(1, "x")
    rolls = Counter(int(dice.roll() * 6) for _ in range(6000))
    assert set(rolls) == set(range(6))
    assert all(850 < n < 1150 for n in rolls.values())


# ---------------------------------------------------------------- units


def unit(*faults: Fault) -> UnitFaults:
    faulty = UnitFaults()
    for number, fault in enumerate(faults):
        faulty.add(Active(named(fault, f"f{number}"), 1))
    return faulty


PORTS = (wwpn(1), NAMES[ARRAY])
READ_10, WRITE_10, INQUIRY = (bytes([opcode]) + bytes(9) for opcode in (0x28, 0x2A, 0x12))


def test_a_unit_that_is_busy_full_or_offline_still_says_what_it_is() -> None:
    for what, status in (
        (What.BUSY, Status.BUSY),
        (What.FULL, Status.TASK_SET_FULL),
        (What.OFFLINE, Status.CHECK_CONDITION),
    ):
        faulty = unit(Fault(what))
        result = faulty.begin(PORTS, READ_10).result
        assert result is not None
        assert result.status == status
        assert faulty.begin(PORTS, INQUIRY) == CommandFate()
    offline = unit(Fault(What.OFFLINE)).begin(PORTS, READ_10).result
    assert offline is not None
    assert (offline.sense[2] & 0x0F, offline.sense[12], offline.sense[13]) == (0x02, 0x04, 0x03)


def test_a_fault_of_a_unit_may_be_one_initiator_s_and_one_command_s() -> None:
    faulty = unit(Fault(What.BUSY, wwpn=wwpn(1), opcode=0x2A))
    assert faulty.begin(PORTS, WRITE_10).result is not None
    assert faulty.begin(PORTS, READ_10).result is None
    assert faulty.begin((wwpn(2), NAMES[ARRAY]), WRITE_10).result is None


def test_latencies_add_up_before_anything_else() -> None:
    faulty = unit(
        Fault(What.LATENCY, latency=Latency(0.1)), Fault(What.LATENCY, latency=Latency(0.2)), Fault(What.BUSY)
    )
    fate = faulty.begin(PORTS, READ_10)
    assert fate.seconds == pytest.approx(0.3)
    assert fate.result is not None


@pytest.mark.parametrize(
    ("lba", "blocks", "write", "bad"),
    [
        *((0, 100, False, None), (0, 101, False, 100), (105, 1, False, 105), (109, 5, False, 109)),
        *((110, 9, False, None), (100, 1, True, None)),
    ],
)
def test_a_medium_error_names_the_first_bad_block_of_its_range(
    lba: int, blocks: int, write: bool, bad: int | None
) -> None:
    faulty = unit(Fault(What.MEDIUM_ERROR, lba=100, blocks=10, on="read"))
    assert faulty.touch(PORTS, 0x28, lba, blocks, write=write) == bad
    assert faulty.begin(PORTS, READ_10) == CommandFate()


def test_hits_are_told() -> None:
    told: list[Active] = []
    faulty = UnitFaults(told.append)
    active = Active(Fault(What.BUSY, "x", count=1), 1)
    faulty.add(active)
    assert faulty.begin(PORTS, READ_10).result is not None
    assert faulty.begin(PORTS, READ_10).result is None
    assert told == [active]
    faulty.remove("x")
    assert not faulty
