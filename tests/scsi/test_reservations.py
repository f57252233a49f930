"""Persistent reservations by the tables of SPC-4 5.12, with several initiators and two target ports."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.scsi.cluster import (
    CAPABILITIES,
    CLEAR,
    EA,
    EAAR,
    EARO,
    FULL_STATUS,
    IGNORE,
    KEYS,
    PREEMPT,
    PREEMPT_AND_ABORT,
    REGISTER,
    RELEASE,
    RESERVATION,
    RESERVE,
    TYPES,
    WE,
    WEAR,
    WERO,
    Cluster,
    nexus,
    transport_id,
)
from vhostfc.scsi.cdb import (
    COMMANDS,
    RECEIVE_COPY_FAILURE_DETAILS,
    RECEIVE_COPY_STATUS,
    SANITIZE_OVERWRITE,
    parse,
)
from vhostfc.scsi.reservations import MAX_REGISTRATIONS
from vhostfc.scsi.task import AbortTasks, Keep, Nexus, TakeTurn, Task, TaskManagement


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def trio_of_three(cluster: Cluster) -> Cluster:
    """A1, B1 and C1 are registered with keys 0xA, 0xB and 0xC."""
    for who, key in (("A1", 0xA), ("B1", 0xB), ("C1", 0xC)):
        assert cluster.out(who, REGISTER, 0, key) == "good"
    return cluster


# ---------------------------------------------------------------- parameter data


def test_nothing_is_registered_at_first(cluster: Cluster) -> None:
    assert cluster.read(KEYS) == bytes(8)
    assert cluster.read(RESERVATION) == bytes(8)
    assert cluster.read(FULL_STATUS) == bytes(8)


def test_read_keys_has_a_key_for_each_nexus_even_equal_ones(cluster: Cluster) -> None:
    for who in ("B1", "A1"):
        cluster.out(who, REGISTER, 0, 0x1234)

    assert cluster.read(KEYS) == bytes.fromhex("00000002 00000010 0000000000001234 0000000000001234")
    assert cluster.read(KEYS, room=12) == bytes.fromhex("00000002 00000010 00000000")
    assert cluster.read(KEYS, room=0) == b""


def test_read_reservation(cluster: Cluster) -> None:
    cluster.out("A1", REGISTER, 0, 0x1234)
    cluster.out("A1", RESERVE, 0x1234, kind=WERO)

    # PRgeneration 1, 16 bytes; key, obsolete, reserved, LU_SCOPE and type 5, obsolete
    assert cluster.read(RESERVATION) == bytes.fromhex("00000001 00000010 0000000000001234 00000000 00 05 0000")


def test_read_reservation_of_all_registrants_has_no_key(cluster: Cluster) -> None:
    cluster.out("A1", REGISTER, 0, 0x1234)
    cluster.out("A1", RESERVE, 0x1234, kind=EAAR)

    assert cluster.read(RESERVATION, "A1") == bytes.fromhex("00000001 00000010 0000000000000000 00000000 00 08 0000")


def test_read_full_status_shows_the_port_names_of_initiators(cluster: Cluster) -> None:
    cluster.out("A2", REGISTER, 0, 0x1234)
    cluster.out("B1", REGISTER, 0, 0x5678)
    cluster.out("A2", RESERVE, 0x1234, kind=WE)

    assert cluster.read(FULL_STATUS) == bytes.fromhex(
        "00000002 00000060"
        # key, reserved, R_HOLDER, type 1, reserved, relative target port 2, 24 bytes: FORMAT CODE 0, FCP
        "0000000000001234 00000000 01 01 00000000 0002 00000018"
        "00 00000000000000 5001438000000041 0000000000000000"
        "0000000000005678 00000000 00 00 00000000 0001 00000018"
        "00 00000000000000 5001438000000042 0000000000000000"
    )


def test_report_capabilities(cluster: Cluster) -> None:
    # CRH, SIP_C, ATP_C, PTPL_C; TMV, ALLOW COMMANDS 4, PTPL_A; all six types
    assert cluster.read(CAPABILITIES) == bytes.fromhex("0008 1d c0 ea01 0000")
    cluster.out("A1", REGISTER, 0, 1, aptpl=True)
    assert cluster.read(CAPABILITIES) == bytes.fromhex("0008 1d c1 ea01 0000")


def test_service_actions_that_do_not_exist(cluster: Cluster) -> None:
    for action in range(4, 0x20):
        assert cluster.send("A1", bytes([0x5E, action, 0, 0, 0, 0, 0, 0, 8, 0])) == "5/24/00:c1.4"
    for action in range(8, 0x20):
        assert cluster.raw("A1", action, bytes(24)) == "5/24/00:c1.4"


@pytest.mark.parametrize("length", [0, 1, 23, 25, 48])
def test_a_parameter_list_has_24_bytes(cluster: Cluster, length: int) -> None:
    assert cluster.raw("A1", REGISTER, bytes(length)) == "5/1A/00"


def test_a_parameter_list_that_is_cut_off(cluster: Cluster) -> None:
    assert cluster.raw("A1", REGISTER, bytes(23), length=24) == "5/1A/00"
    assert cluster.raw("A1", REGISTER, bytes(24), length=0xFFFFFFFF) == "5/1A/00"


# ---------------------------------------------------------------- registering


def test_register_change_and_unregister(cluster: Cluster) -> None:
    assert cluster.out("A1", REGISTER, 0, 1) == "good"
    assert cluster.out("A1", REGISTER, 1, 2) == "good"
    assert cluster.registered() == {"A1": 2}
    assert cluster.out("A1", REGISTER, 2, 0) == "good"
    assert cluster.registered() == {}
    assert cluster.read(KEYS)[:4] == bytes.fromhex("00000003")
    assert cluster.attentions() == {}


def test_register_wants_the_key_that_is_registered(cluster: Cluster) -> None:
    assert cluster.out("A1", REGISTER, 7, 1) == "conflict"
    assert cluster.out("A1", REGISTER, 7, 0) == "conflict"
    cluster.out("A1", REGISTER, 0, 1)
    assert cluster.out("A1", REGISTER, 0, 2) == "conflict"
    assert cluster.out("A1", REGISTER, 9, 2) == "conflict"
    assert cluster.registered() == {"A1": 1}


def test_register_nothing_is_good_and_does_not_count(cluster: Cluster) -> None:
    assert cluster.out("A1", REGISTER, 0, 0) == "good"
    assert cluster.out("A1", IGNORE, 5, 0) == "good"
    assert cluster.read(KEYS) == bytes(8)


def test_register_and_ignore_existing_key(cluster: Cluster) -> None:
    assert cluster.out("A1", IGNORE, 99, 1) == "good"
    assert cluster.out("A1", IGNORE, 98, 2) == "good"
    assert cluster.registered() == {"A1": 2}
    assert cluster.out("A1", IGNORE, 97, 0) == "good"
    assert cluster.registered() == {}


def test_every_target_port_is_a_nexus_of_its_own(cluster: Cluster) -> None:
    cluster.out("A1", REGISTER, 0, 1)
    assert cluster.out("A2", RESERVE, 1, kind=WE) == "conflict"
    assert cluster.out("A2", REGISTER, 0, 2) == "good"
    assert cluster.registered() == {"A1": 1, "A2": 2}


def test_all_tg_pt_registers_through_every_port(cluster: Cluster) -> None:
    assert cluster.out("A1", REGISTER, 0, 1, all_tg_pt=True) == "good"
    assert cluster.registered() == {"A1": 1, "A2": 1}
    assert cluster.read(KEYS)[:4] == bytes.fromhex("00000001")
    assert cluster.out("A2", IGNORE, 0, 5) == "good"
    assert cluster.out("A1", REGISTER, 1, 2, all_tg_pt=True) == "conflict", "A2 has another key"
    assert cluster.out("A1", IGNORE, 0, 0, all_tg_pt=True) == "good"
    assert cluster.registered() == {}


def test_spec_i_pt_registers_others_too(cluster: Cluster) -> None:
    cluster.out("B2", REGISTER, 0, 9)
    assert cluster.out("A1", REGISTER, 0, 1, others="BCD") == "good"
    assert cluster.registered() == {"B2": 9, "A1": 1, "B1": 1, "C1": 1, "D1": 1}
    assert cluster.out("C1", REGISTER, 1, 7) == "good"


def test_spec_i_pt_registers_nobody_if_one_of_them_is_registered(cluster: Cluster) -> None:
    cluster.out("C1", REGISTER, 0, 9)
    assert cluster.out("A1", REGISTER, 0, 1, others="BCD") == "5/26/00:p52"
    assert cluster.registered() == {"C1": 9}
    cluster.out("D2", REGISTER, 0, 9)
    assert cluster.out("A1", REGISTER, 0, 1, others="D", all_tg_pt=True) == "5/26/00:p28"
    assert cluster.out("A1", REGISTER, 0, 1, others="D") == "good", "through this port it is not"


def test_spec_i_pt_and_all_tg_pt(cluster: Cluster) -> None:
    assert cluster.out("A1", REGISTER, 0, 1, others="D", all_tg_pt=True) == "good"
    assert cluster.registered() == {"A1": 1, "A2": 1, "D1": 1, "D2": 1}


def test_spec_i_pt_is_for_register_of_an_unregistered_nexus(cluster: Cluster) -> None:
    assert cluster.out("A1", IGNORE, 0, 1, others="B") == "5/26/00:p20.3"
    cluster.out("A1", REGISTER, 0, 1)
    assert cluster.out("A1", REGISTER, 1, 2, others="B") == "5/26/00:p20.3"
    assert cluster.out("A1", RESERVE, 1, kind=WE, others="B") == "5/26/00:p20.3"
    assert cluster.registered() == {"A1": 1}


def test_spec_i_pt_with_wrong_lists(cluster: Cluster) -> None:
    head = bytes(15) + b"\1" + bytes(4) + b"\x08\0\0\0"
    assert cluster.raw("A1", REGISTER, head) == "5/1A/00"
    assert cluster.raw("A1", REGISTER, head + bytes.fromhex("00000018") + bytes(23)) == "5/1A/00"
    assert cluster.raw("A1", REGISTER, head + bytes.fromhex("00000017") + bytes(23)) == "5/26/00:p24"
    iscsi = b"\x05" + transport_id("B")[1:]
    assert cluster.raw("A1", REGISTER, head + bytes.fromhex("00000018") + iscsi) == "5/26/00:p28"
    assert cluster.registered() == {}


def test_registrations_are_limited(cluster: Cluster) -> None:
    state = cluster.target.unit.reservations.state
    some = {Nexus(transport_id("D"), port): 1 for port in range(MAX_REGISTRATIONS)}
    cluster.target.unit.reservations.state = replace(state, keys=some)

    assert cluster.out("A1", REGISTER, 0, 1) == "5/55/04"


def test_unregister_of_the_holder_releases(trio_of_three: Cluster) -> None:
    for kind, told in ((WE, {}), (EA, {}), (WERO, {"B1": ["2A/04"], "C1": ["2A/04"]})):
        assert trio_of_three.out("A1", RESERVE, 0xA, kind=kind) == "good"
        assert trio_of_three.out("A1", REGISTER, 0xA, 0) == "good"
        assert trio_of_three.attentions() == told
        assert trio_of_three.read(RESERVATION)[4:] == bytes(4)
        trio_of_three.out("A1", REGISTER, 0, 0xA)


def test_unregister_of_one_of_all_registrants_releases_only_with_the_last(trio_of_three: Cluster) -> None:
    trio_of_three.out("A1", RESERVE, 0xA, kind=WEAR)
    for who, key in (("A1", 0xA), ("B1", 0xB)):
        trio_of_three.out(who, REGISTER, key, 0)
        assert trio_of_three.read(RESERVATION)[4:8] == bytes.fromhex("00000010")
    trio_of_three.out("C1", REGISTER, 0xC, 0)
    assert trio_of_three.read(RESERVATION)[4:] == bytes(4)
    assert trio_of_three.attentions() == {}


# ---------------------------------------------------------------- REGISTER AND MOVE


def test_register_and_move(trio_of_three: Cluster) -> None:
    trio_of_three.out("A1", RESERVE, 0xA, kind=EARO)

    assert trio_of_three.move("A1", 0xA, 0xD, "D2") == "good"

    assert trio_of_three.registered() == {"A1": 0xA, "B1": 0xB, "C1": 0xC, "D2": 0xD}
    assert trio_of_three.read(RESERVATION)[8:16] == (0xD).to_bytes(8, "big")
    assert trio_of_three.read(KEYS)[:4] == bytes.fromhex("00000004")
    assert trio_of_three.attentions() == {}


def test_register_and_move_may_unregister_and_change_a_key(trio_of_three: Cluster) -> None:
    trio_of_three.out("A1", RESERVE, 0xA, kind=WE)

    assert trio_of_three.move("A1", 0xA, 0xE, "B1", unreg=True) == "good"

    assert trio_of_three.registered() == {"B1": 0xE, "C1": 0xC}
    assert trio_of_three.may("B1") == "rw"
    assert trio_of_three.may("A1") == "r"


def test_register_and_move_refused(trio_of_three: Cluster) -> None:
    assert trio_of_three.move("A2", 0xA, 0xD, "D2") == "conflict", "not registered"
    assert trio_of_three.move("A1", 0xB, 0xD, "D2") == "conflict", "another key"
    assert trio_of_three.move("A1", 0xA, 0xD, "D2") == "5/24/00:c1.4", "no reservation"
    trio_of_three.out("A1", RESERVE, 0xA, kind=WE)
    assert trio_of_three.move("B1", 0xB, 0xD, "D2") == "conflict", "not the holder"
    assert trio_of_three.move("A1", 0xA, 0, "D2") == "5/26/00:p8"
    assert trio_of_three.move("A1", 0xA, 1, "D2", port=3) == "5/26/00:p18"
    assert trio_of_three.move("A1", 0xA, 1, "A2") == "5/26/00:p24", "to itself"
    assert trio_of_three.raw("A1", 7, bytes(24)) == "5/26/00:p20"
    assert trio_of_three.raw("A1", 7, bytes(24) + transport_id("B")) == "5/1A/00"
    trio_of_three.out("A1", RELEASE, 0xA, kind=WE)
    trio_of_three.out("A1", RESERVE, 0xA, kind=WEAR)
    assert trio_of_three.move("A1", 0xA, 1, "D2") == "conflict", "all registrants"


# ---------------------------------------------------------------- RESERVE and RELEASE


def test_reserve_is_for_the_registered(cluster: Cluster) -> None:
    assert cluster.out("A1", RESERVE, 0, kind=WE) == "conflict"
    assert cluster.out("A1", RESERVE, 0, kind=WE, scope=1) == "conflict", "the key counts first (SPC-4 6.16.3)"
    assert cluster.out("A1", RESERVE, 0, kind=2) == "conflict"
    cluster.out("A1", REGISTER, 0, 1)
    assert cluster.out("A1", RESERVE, 2, kind=WE) == "conflict"
    assert cluster.out("A1", RESERVE, 1, kind=WE, scope=1) == "5/24/00:c2.7"
    for kind in (0, 2, 4, 9, 15):
        assert cluster.out("A1", RESERVE, 1, kind=kind) == "5/24/00:c2.3"
    assert cluster.out("A1", RESERVE, 1, kind=WE) == "good"
    assert cluster.out("A1", RESERVE, 1, kind=WE) == "good", "it is so already"
    assert cluster.out("A1", RESERVE, 1, kind=EA) == "conflict", "not without a release"
    assert cluster.read(KEYS)[:4] == bytes.fromhex("00000001"), "RESERVE does not count"


@pytest.mark.parametrize("kind", TYPES)
def test_reserve_when_another_holds(trio_of_three: Cluster, kind: int) -> None:
    trio_of_three.out("A1", RESERVE, 0xA, kind=kind)
    again = "good" if kind in (WEAR, EAAR) else "conflict"
    assert trio_of_three.out("B1", RESERVE, 0xB, kind=kind) == again
    assert trio_of_three.out("B1", RESERVE, 0xB, kind=WE if kind != WE else EA) == "conflict"


@pytest.mark.parametrize("kind", TYPES)
def test_release(trio_of_three: Cluster, kind: int) -> None:
    trio_of_three.out("A1", RESERVE, 0xA, kind=kind)
    assert trio_of_three.out("A1", RELEASE, 0xB, kind=kind) == "conflict"
    assert trio_of_three.out("A1", RELEASE, 0xA, kind=kind % 8 + 1) == "5/26/04"
    assert trio_of_three.out("A1", RELEASE, 0xA, kind=kind, scope=1) == "5/26/04"
    if kind not in (WEAR, EAAR):
        assert trio_of_three.out("B1", RELEASE, 0xB, kind=kind) == "good", "nothing to release"
        assert trio_of_three.read(RESERVATION)[4:8] == bytes.fromhex("00000010")
    assert trio_of_three.out("A1", RELEASE, 0xA, kind=kind) == "good"
    assert trio_of_three.read(RESERVATION)[4:] == bytes(4)
    told = {} if kind in (WE, EA) else {"B1": ["2A/04"], "C1": ["2A/04"]}
    assert trio_of_three.attentions() == told
    assert len(trio_of_three.registered()) == 3
    assert trio_of_three.out("A1", RELEASE, 0xA, kind=kind) == "good"


def test_clear(trio_of_three: Cluster) -> None:
    trio_of_three.out("A1", RESERVE, 0xA, kind=EA)
    assert trio_of_three.out("B1", CLEAR, 0xA) == "conflict"
    assert trio_of_three.out("B1", CLEAR, 0xB) == "good"
    assert trio_of_three.attentions() == {"A1": ["2A/03"], "C1": ["2A/03"]}
    assert trio_of_three.read(RESERVATION) == bytes.fromhex("00000004 00000000")
    assert trio_of_three.registered() == {}


# ---------------------------------------------------------------- PREEMPT


def test_preempt_of_the_holder(trio_of_three: Cluster) -> None:
    trio_of_three.out("A1", RESERVE, 0xA, kind=WERO)
    assert trio_of_three.out("A2", PREEMPT, 0, 0xA, WERO) == "conflict", "not registered"
    assert trio_of_three.out("B1", PREEMPT, 0xC, 0xA, WERO) == "conflict", "another key"
    assert trio_of_three.out("B1", PREEMPT, 0xB, 0xA, 2) == "5/24/00:c2.3"
    assert trio_of_three.out("B1", PREEMPT, 0xB, 0xA, WERO, scope=2) == "5/24/00:c2.7"
    assert trio_of_three.out("B1", PREEMPT, 0xB, 0xA, WERO) == "good"
    assert trio_of_three.registered() == {"B1": 0xB, "C1": 0xC}
    assert trio_of_three.attentions() == {"A1": ["2A/05"]}
    assert trio_of_three.read(RESERVATION)[8:16] == (0xB).to_bytes(8, "big")
    assert trio_of_three.read(KEYS)[:4] == bytes.fromhex("00000004")


def test_preempt_of_the_holder_with_another_type_is_told_to_bystanders(trio_of_three: Cluster) -> None:
    trio_of_three.out("A1", RESERVE, 0xA, kind=WERO)
    assert trio_of_three.out("B1", PREEMPT, 0xB, 0xA, EARO) == "good"
    assert trio_of_three.attentions() == {"A1": ["2A/05"], "C1": ["2A/04"]}


def test_preempt_of_oneself_changes_the_type(trio_of_three: Cluster) -> None:
    trio_of_three.out("A1", RESERVE, 0xA, kind=WERO)
    assert trio_of_three.out("A1", PREEMPT, 0xA, 0xA, EA) == "good"
    assert trio_of_three.registered() == {"A1": 0xA, "B1": 0xB, "C1": 0xC}
    assert trio_of_three.attentions() == {"B1": ["2A/04"], "C1": ["2A/04"]}
    assert [trio_of_three.may(who) for who in ("A1", "B1")] == ["rw", ""]


def test_preempt_of_registrations(trio_of_three: Cluster) -> None:
    trio_of_three.out("A2", REGISTER, 0, 0xC)
    trio_of_three.out("A1", RESERVE, 0xA, kind=WE)
    assert trio_of_three.out("B1", PREEMPT, 0xB, 0xC, 15) == "good", "scope and type are passed over"
    assert trio_of_three.registered() == {"A1": 0xA, "B1": 0xB}
    assert trio_of_three.attentions() == {"A2": ["2A/05"], "C1": ["2A/05"]}
    assert trio_of_three.read(RESERVATION)[8:16] == (0xA).to_bytes(8, "big")
    assert trio_of_three.out("B1", PREEMPT, 0xB, 0xC, WE) == "conflict", "nobody has that key"
    assert trio_of_three.out("B1", PREEMPT, 0xB, 0, WE) == "5/26/00:p8"


def test_preempt_without_a_reservation_makes_none(trio_of_three: Cluster) -> None:
    assert trio_of_three.out("B1", PREEMPT, 0xB, 0xA, EA) == "good"
    assert trio_of_three.read(RESERVATION)[4:] == bytes(4)
    assert trio_of_three.out("B1", PREEMPT, 0xB, 0, EA) == "5/26/00:p8"
    assert trio_of_three.out("B1", PREEMPT, 0xB, 0xB, EA) == "good", "one may remove oneself"
    assert trio_of_three.registered() == {"C1": 0xC}
    assert trio_of_three.attentions() == {"A1": ["2A/05"]}


def test_preempt_of_all_registrants(trio_of_three: Cluster) -> None:
    trio_of_three.out("A1", RESERVE, 0xA, kind=WEAR)
    assert trio_of_three.out("B1", PREEMPT, 0xB, 0xA, EA) == "good", "only the registration goes"
    assert trio_of_three.read(RESERVATION)[21] == WEAR
    assert trio_of_three.out("B1", PREEMPT, 0xB, 0, EA) == "good", "zero: all of them"
    assert trio_of_three.registered() == {"B1": 0xB}
    assert trio_of_three.attentions() == {"A1": ["2A/05"], "C1": ["2A/05"]}
    assert trio_of_three.read(RESERVATION)[8:22] == bytes.fromhex("000000000000000b 00000000 00 03")


def test_preempt_and_abort_ends_the_tasks_of_the_preempted(trio_of_three: Cluster) -> None:
    trio_of_three.out("A2", REGISTER, 0, 0xA)
    trio_of_three.out("A1", RESERVE, 0xA, kind=WERO)

    assert trio_of_three.out("B1", PREEMPT_AND_ABORT, 0xB, 0xA, WERO) == "good"

    assert trio_of_three.target.effects == [TakeTurn(), AbortTasks(frozenset((nexus("A1"), nexus("A2"))))]
    assert trio_of_three.attentions() == {"A1": ["2A/05"], "A2": ["2A/05"]}


def test_it_is_in_force_before_tasks_are_aborted(trio_of_three: Cluster) -> None:
    """Else a task could begin between the abort and the end of the right to begin it."""
    trio_of_three.out("A1", RESERVE, 0xA, kind=WERO)
    data = (0xB).to_bytes(8, "big") + (0xA).to_bytes(8, "big") + bytes(8)
    steps = trio_of_three.target.unit.execute(Task(nexus("B1"), bytes.fromhex("5f 05 05 0000 00000018 00"), data))
    assert steps.send(None) == TakeTurn()
    assert any(trio_of_three.target.unit.verdict(nexus("A1")))
    assert steps.send(None) == AbortTasks(frozenset((nexus("A1"),)))
    assert not any(trio_of_three.target.unit.verdict(nexus("A1")))


# ---------------------------------------------------------------- over time


def test_logout_and_reset_leave_them_alone(trio_of_three: Cluster) -> None:
    trio_of_three.out("A1", RESERVE, 0xA, kind=EA)
    unit = trio_of_three.target.unit
    unit.detach(nexus("A1"))
    trio_of_three.target.manage(TaskManagement.LOGICAL_UNIT_RESET, nexus("B1"))
    assert trio_of_three.attentions().keys() == {"A1", "A2", "B1", "C1"}
    assert trio_of_three.may("B1") == ""
    unit.attach(nexus("A1"))
    trio_of_three.attentions()
    assert trio_of_three.may("A1") == "rw"
    assert trio_of_three.registered() == {"A1": 0xA, "B1": 0xB, "C1": 0xC}


def test_aptpl_is_kept_before_it_is_in_force(cluster: Cluster) -> None:
    medium, unit = cluster.target.medium, cluster.target.unit
    cluster.out("B1", REGISTER, 0, 2)
    assert Keep not in map(type, cluster.target.effects), "nothing to keep"
    cluster.out("A1", REGISTER, 0, 1, aptpl=True)
    assert list(map(type, cluster.target.effects)) == [TakeTurn, Keep]
    assert medium.kept == unit.reservations.state.kept
    cluster.out("A1", RESERVE, 1, kind=WE)
    assert medium.kept is not None
    assert (medium.kept.kind, medium.kept.holder, medium.kept.generation) == (WE, nexus("A1"), 0)
    cluster.out("A1", RESERVE, 1, kind=WE)
    assert list(map(type, cluster.target.effects)) == [TakeTurn], "it is kept so already"
    cluster.out("A1", REGISTER, 1, 3, aptpl=False)
    assert medium.kept is None


def test_what_cannot_be_kept_is_not_done(cluster: Cluster) -> None:
    cluster.target.medium.forgetful = True
    assert cluster.out("A1", REGISTER, 0, 1, aptpl=True) == "4/44/00"
    assert cluster.registered() == {}
    assert cluster.read(CAPABILITIES)[3] == 0xC0


# ---------------------------------------------------------------- who may do what

#: SPC-4 table 65 and SBC-3 table 13, by what an unregistered nexus may do: always, with write exclusive types, never.
ALWAYS = (
    *("00 00 00 00 00 00", "03 00 00 00 12 00", "12 00 00 00 24 00", "1b 00 00 00 01 00", "1e 00 00 00 00 00"),
    *("25 00 00000000 0000 00 00", "4d 00 00 00 00 00 00 00 10 00", "9e 10" + "00" * 11 + "20 0000"),
    *("a0 00 00 000000 00000010 00 00", "5e 00 0000000000 0010 00", "5e 03 0000000000 0010 00"),
    "a3 0a 00000000 00000100 00 00",
    "84 03" + "00" * 14,
)
READS = (
    *("08 00 00 00 01 00", "28 00 00000000 00 0001 00", "a8 00 00000000 00000001 00 00"),
    *("88 00 0000000000000000 00000001 00 00", "2f 00 00000000 00 0001 00", "af 00 00000000 00000001 00 00"),
    *("8f 00 0000000000000000 00000001 00 00", "34 00 00000000 00 0001 00", "90 00 0000000000000000 00000001 00 00"),
    *(
        "1a 00 3f 00 ff 00",
        "5a 00 3f 00 00 00 00 00ff 00",
        "37 00 08 00000000 0010 00",
        "b7 08 00000000 00000010 00 00",
    ),
    *(
        "7f 00 00000000 00 18 0009 00 00" + "00" * 16 + "00000001",
        "7f 00 00000000 00 18 000a 00 00" + "00" * 16 + "00000001",
    ),
    *("9e 12 0000000000000000 00000020 00 00", "a3 0c 00 00 0000 00000100 00 00", "a3 0d 00 00 0000 00000004 00 00"),
)
WRITES = (
    "04 00 00 00 00 00",
    *("0a 00 00 00 01 00", "2a 00 00000000 00 0001 00", "aa 00 00000000 00000001 00 00"),
    *("8a 00 0000000000000000 00000001 00 00", "2e 00 00000000 00 0001 00", "ae 00 00000000 00000001 00 00"),
    *("8e 00 0000000000000000 00000001 00 00", "41 00 00000000 00 0001 00", "93 00 0000000000000000 00000001 00 00"),
    *("42 00 00000000 00 0000 00", "89 00 0000000000000000 000000 00 00 00", "8b 00 0000000000000000 00000001 00 00"),
    *(
        "15 10 00 00 00 00",
        "55 10 00 00 00 00 00 0000 00",
        "1d 04 00 0000 00",
        "1b 00 00 00 00 00",
        "1e 00 00 00 01 00",
    ),
    *(
        "7f 00 00000000 00 18 000b 00 00" + "00" * 16 + "00000001",
        "7f 00 00000000 00 18 000c 00 00" + "00" * 16 + "00000001",
        "7f 00 00000000 00 18 000d 00 00" + "00" * 16 + "00000001",
    ),
    *("48 02" + "00" * 8, "48 03" + "00" * 8, "48 1f" + "00" * 8, "9c" + "00" * 15),
    "83" + "00" * 15,
    *("a4 0a 00000000 00000000 00 00", "35 00 00000000 00 0000 00", "91 00 0000000000000000 00000000 00 00"),
)


@pytest.mark.parametrize("kind", TYPES)
def test_commands_that_reservations_allow(kind: int) -> None:
    one = Cluster()
    one.out("A1", REGISTER, 0, 1)
    one.out("B1", REGISTER, 0, 2)
    one.out("A1", RESERVE, 1, kind=kind)
    reads = kind in (WE, WERO, WEAR)
    registered = kind >= WERO
    for cdbs, other in ((ALWAYS, True), (READS, reads), (WRITES, False)):
        for cdb in cdbs:
            data = b"" if cdb.startswith("89") else bytes(512)
            assert one.send("A1", cdb, data) == "good"
            assert one.send("B1", cdb, data) == ("good" if other or registered else "conflict"), cdb
            assert one.send("C1", cdb, data) == ("good" if other else "conflict"), cdb
            assert one.send("A2", cdb, data) == ("good" if other else "conflict"), cdb
    assert [one.may(who) for who in one.names] == [
        "rw",
        "r" * reads,
        "rw" if registered else "r" * reads,
        "r" * reads,
    ]


def test_every_command_is_in_one_of_these_lists() -> None:
    """A new command must be sorted into the tables above, and access.py must know it."""
    tried = {parse(bytes.fromhex(cdb)) for cdb in (*ALWAYS, *READS, *WRITES)}
    others = {one for one in COMMANDS if one.opcode in (0x5E, 0x5F, 0x16, 0x17, 0x56, 0x57)}
    others |= {RECEIVE_COPY_STATUS, RECEIVE_COPY_FAILURE_DETAILS, SANITIZE_OVERWRITE}
    assert set(COMMANDS) == tried | others


# ---------------------------------------------------------------- RESERVE and RELEASE of SPC-2


@pytest.mark.parametrize(("reserve", "release"), [("16", "17"), ("56", "57")])
def test_reserve_6_keeps_all_others_out(cluster: Cluster, reserve: str, release: str) -> None:
    size = 6 if reserve == "16" else 10
    reserve, release = reserve + "00" * (size - 1), release + "00" * (size - 1)
    assert cluster.send("A1", reserve) == "good"
    assert cluster.send("A1", reserve) == "good"
    assert cluster.may("A1") == "rw"
    for who in ("A2", "B1"):
        assert cluster.may(who) == ""
        assert cluster.send(who, reserve) == "conflict"
        assert cluster.send(who, TEST) == "conflict"
        for cdb in ("12 00 00 00 24 00", "03 00 00 00 12 00", "a0 00 00 000000 00000010 00 00"):
            assert cluster.send(who, cdb) == "good"
        assert cluster.send(who, release) == "good", "it does nothing"
    assert cluster.out("A1", REGISTER, 0, 1) == "conflict"
    assert cluster.send("A1", "5e 00 0000000000 0010 00") == "conflict"
    assert cluster.send("A1", release) == "good"
    assert cluster.may("B1") == "rw"
    assert cluster.attentions() == {}


TEST = "00 00 00 00 00 00"
RESERVE_6, RELEASE_6 = "16 00 00 00 00 00", "17 00 00 00 00 00"


def test_reserve_6_ends_with_its_nexus_and_with_a_reset(cluster: Cluster) -> None:
    cluster.send("A1", RESERVE_6)
    cluster.target.unit.detach(nexus("B1"))
    assert cluster.may("C1") == ""
    cluster.target.unit.detach(nexus("A1"))
    assert cluster.may("C1") == "rw"
    cluster.send("C1", RESERVE_6)
    cluster.target.manage(TaskManagement.LOGICAL_UNIT_RESET, nexus("B1"))
    cluster.attentions()
    assert cluster.send("B1", RESERVE_6) == "good"


def test_third_party_reservations_are_refused(cluster: Cluster) -> None:
    assert cluster.send("A1", "16 10 00 00 00 00") == "5/24/00:c1.4"
    assert cluster.send("A1", "16 01 00 00 00 00") == "5/24/00:c1.0"
    assert cluster.send("A1", "16 e0 00 00 00 00") == "good"


def test_compatible_reservation_handling(cluster: Cluster) -> None:
    """SPC-4 5.12.3."""
    cluster.out("A1", REGISTER, 0, 1)
    cluster.out("B1", REGISTER, 0, 2)
    for who in ("A1", "B1", "C1"):
        assert cluster.send(who, RESERVE_6) == "conflict", "registrations and no reservation"
        assert cluster.send(who, RELEASE_6) == "conflict"
    for kind in TYPES:
        assert cluster.out("A1", RESERVE, 1, kind=kind) == "good"
        expected = {"A1": "good", "B1": "good" if kind >= WERO else "conflict", "C1": "conflict"}
        for cdb in (RESERVE_6, RELEASE_6):
            assert {who: cluster.send(who, cdb) for who in expected} == expected
        assert cluster.target.unit.reservations.reserved is None
        cluster.out("A1", RELEASE, 1, kind=kind)
        cluster.attentions()
