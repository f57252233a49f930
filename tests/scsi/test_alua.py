"""Target port groups: ports 1 and 2 are in groups 1 and 2."""

from __future__ import annotations

import pytest

from tests.scsi.cluster import REGISTER, RESERVE, TEST_UNIT_READY, WE, Cluster, nexus
from tests.scsi.conftest import target
from vhostfc.scsi.alua import AccessState

RTPG = "a3 0a 00000000 00000100 00 00"


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def stpg(one: Cluster, who: str, *descriptors: str, length: int | None = None) -> str:
    data = bytes(4) + b"".join(bytes.fromhex(text) for text in descriptors)
    size = len(data) if length is None else length
    return one.send(who, bytes([0xA4, 0x0A, 0, 0, 0, 0, *size.to_bytes(4, "big"), 0, 0]), data)


def test_inquiry_says_that_there_are_groups(cluster: Cluster) -> None:
    assert cluster.target.good("12 00 00 00 60 00", nexus=nexus("A1"))[5] & 0x30 == 0x30
    page = cluster.target.good("12 01 83 00 ff 00", nexus=nexus("A2"))
    assert bytes.fromhex("01 95 00 04 0000 0002") in page, "target port group 2"
    assert bytes.fromhex("01 94 00 04 0000 0002") in page, "relative target port 2"


def test_report_target_port_groups(cluster: Cluster) -> None:
    body = bytes.fromhex(
        "00 8f 0001 00 00 00 01 0000 0001"  # optimized; T, U, S, AN, AO; group; status; 1 port
        "00 8f 0002 00 00 00 01 0000 0002"
    )
    assert cluster.target.good(RTPG, nexus=nexus("A1")) == bytes.fromhex("00000018") + body
    extended = "a3 2a 00000000 00000100 00 00"
    assert cluster.target.good(extended, nexus=nexus("A1")) == bytes.fromhex("0000001c 10 00 0000") + body
    assert cluster.send("A1", "a3 4a 00000000 00000100 00 00") == "5/24/00:c1.7"


def test_set_target_port_groups_is_told_to_the_others(cluster: Cluster) -> None:
    assert stpg(cluster, "A1", "02 00 0002", "01 00 0001") == "good"
    data = cluster.target.good(RTPG, nexus=nexus("A1"))
    assert data[4:10] == bytes.fromhex("01 8f 0001 00 01")
    assert data[16:22] == bytes.fromhex("02 8f 0002 00 01")
    assert cluster.target.send(TEST_UNIT_READY, nexus=nexus("A1")).status == 0
    assert [cluster.send("B1", TEST_UNIT_READY) for _ in range(2)] == ["6/2A/06", "good"]
    assert [cluster.send("A2", TEST_UNIT_READY) for _ in range(2)] == ["6/2A/06", "2/04/0B"]
    assert stpg(cluster, "A2", "00 00 0002") == "good", "also through a port in standby"
    assert stpg(cluster, "A2", "00 00 0002") == "good"
    assert [cluster.send("B1", TEST_UNIT_READY) for _ in range(2)] == ["6/2A/06", "good"]


def test_set_target_port_groups_all_or_nothing(cluster: Cluster) -> None:
    assert stpg(cluster, "A1", "02 00 0002", "02 00 0003") == "5/26/00:p10"
    assert stpg(cluster, "A1", "02 00 0002", "01 00 0002") == "5/26/00:p10"
    for state in ("0e", "0f", "04"):
        assert stpg(cluster, "A1", f"{state} 00 0002") == "5/26/00:p4.3"
    assert stpg(cluster, "A1", length=0) == "good"
    for length in (1, 3, 5):
        assert stpg(cluster, "A1", length=length) == "5/24/00:c6", "no list has this length (SPC-4 6.45)"
    assert stpg(cluster, "A1", length=8) == "5/1A/00", "less came"
    assert cluster.attentions() == {}
    assert cluster.may("A2") == "rw"


STANDBY = (
    *("12 00 00 00 24 00", "03 00 00 00 12 00", "a0 00 00 000000 00000010 00 00", RTPG),
    *("1a 00 3f 00 ff 00", "5a 00 3f 00 00 00 00 00ff 00", "15 10 00 00 00 00", "55 10 00 00 00 00 00 0000 00"),
    *("4d 00 00 00 00 00 00 00 10 00", "1d 04 00 0000 00", "5e 00 0000000000 0010 00", "5e 03 0000000000 0010 00"),
)
OTHERS = (
    *(TEST_UNIT_READY, "28 00 00000000 00 0001 00", "25 00 00000000 0000 00 00", "9e 10" + "00" * 11 + "20 0000"),
    *("35 00 00000000 00 0000 00", "1b 00 00 00 01 00", "16 00 00 00 00 00", "2a 00 00000000 00 0000 00"),
)


@pytest.mark.parametrize(
    ("state", "asc"),
    [(AccessState.STANDBY, "2/04/0B"), (AccessState.UNAVAILABLE, "2/04/0C"), (AccessState.TRANSITIONING, "2/04/0A")],
)
def test_what_is_served_in_a_state_that_is_not_active(cluster: Cluster, state: AccessState, asc: str) -> None:
    unit = cluster.target.unit
    assert any(unit.verdict(nexus("A2")))
    unit.set_access({2: state})
    assert cluster.target.good("03 00 00 00 12 00", nexus=nexus("A2"))[12:14] == bytes.fromhex("2a06")
    assert not any(unit.verdict(nexus("A2")))
    for n, cdb in enumerate(STANDBY):
        served = n < 4 or state is AccessState.STANDBY
        assert cluster.send("A2", cdb) == ("good" if served else asc)
    for cdb in OTHERS:
        assert cluster.send("A2", cdb) == asc
    for who in ("A1", "B1", "C1"):
        assert cluster.send(who, TEST_UNIT_READY) == "6/2A/06"
    assert cluster.may("A1") == "rw"
    unit.set_access({2: AccessState.NON_OPTIMIZED})
    cluster.attentions()
    assert cluster.may("A2") == "rw"
    assert cluster.target.good(RTPG, nexus=nexus("A1"))[16:22] == bytes.fromhex("01 8f 0002 00 02")


def test_reservations_work_through_a_port_in_standby(cluster: Cluster) -> None:
    cluster.target.unit.set_access({2: AccessState.STANDBY})
    cluster.target.good("03 00 00 00 12 00", nexus=nexus("A2"))
    assert cluster.out("A2", REGISTER, 0, 1) == "good"
    assert cluster.out("A2", RESERVE, 1, kind=WE) == "good"
    assert cluster.send("B1", "2a 00 00000000 00 0001 00", bytes(512)) == "6/2A/06"
    assert cluster.may("B1") == "r"


def test_a_state_that_is_so_already_is_told_to_nobody(cluster: Cluster) -> None:
    cluster.target.unit.set_access({1: AccessState.OPTIMIZED, 2: AccessState.OPTIMIZED})
    assert cluster.attentions() == {}


def test_states_of_groups_that_lead_elsewhere_are_no_news(cluster: Cluster) -> None:
    cluster.target.unit.set_access({1: AccessState.OPTIMIZED, 2: AccessState.OPTIMIZED, 3: AccessState.STANDBY})
    assert cluster.attentions() == {}


def test_what_an_initiator_set_stays_until_the_array_wants_another(cluster: Cluster) -> None:
    unit = cluster.target.unit
    unit.set_access({1: AccessState.OPTIMIZED, 2: AccessState.NON_OPTIMIZED})
    cluster.attentions()
    assert stpg(cluster, "A1", "00 00 0002") == "good"
    cluster.attentions()
    unit.set_access({1: AccessState.OPTIMIZED, 2: AccessState.NON_OPTIMIZED})
    assert cluster.attentions() == {}
    unit.set_access({1: AccessState.OPTIMIZED, 2: AccessState.OPTIMIZED})
    assert cluster.attentions() == {}
    unit.set_access({1: AccessState.OPTIMIZED, 2: AccessState.STANDBY})
    assert cluster.send("B1", TEST_UNIT_READY) == "6/2A/06"


def test_a_unit_with_no_port_listed_has_no_group() -> None:
    one = target(ports=())
    assert one.good(RTPG) == bytes(4)
    assert any(one.unit.verdict(nexus("A1"))) is False, "not attached"
