"""Zones: who sees whom, and whom a change concerns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vhostfc.fabric.zoning import Zone, Zoning, affected
from vhostfc.fc.wwn import Wwn

A, B, C, D = (Wwn(0x5001 << 48 | n) for n in range(1, 5))


def zone(*members: Wwn) -> Zone:
    return Zone("z", frozenset(members))


def test_no_zone_at_all_lets_everybody_see_everybody() -> None:
    assert Zoning().visible(A, B)


def test_members_of_a_common_zone_see_each_other_and_nobody_else() -> None:
    zoning = Zoning([zone(A, B), zone(B, C)])
    assert zoning.visible(A, B)
    assert zoning.visible(C, B)
    assert not zoning.visible(A, C)
    assert not zoning.visible(A, D)
    assert zoning.visible(D, D), "a port in no zone still sees itself"


def test_an_empty_zone_is_zoning_all_the_same() -> None:
    assert not Zoning([zone()]).visible(A, B)


def test_a_change_names_each_pair_on_both_sides_and_only_logged_in_ports() -> None:
    ports = {A: 1, B: 2, C: 3}
    pages = affected(Zoning([zone(A, B)]), Zoning([zone(A, C)]), ports, ports)
    assert pages == {1: [2, 3], 2: [1], 3: [1]}
    assert affected(Zoning([zone(A, B)]), Zoning([zone(A, B), zone(D, C)]), ports, ports) == {}


def test_initiators_are_no_concern_of_each_other() -> None:
    ports = {A: 1, B: 2, C: 3}
    assert affected(Zoning([zone(A, B)]), Zoning([zone(A, B, C)]), ports, [C]) == {1: [3], 2: [3], 3: [1, 2]}


def test_whom_a_port_sees() -> None:
    zoning = Zoning([zone(A, B), zone(B, C)])
    assert zoning.peers(B) == {A, B, C}
    assert zoning.peers(D) == {D}
    assert Zoning().peers(A) is None
    assert sorted(zoning.peers_in(A, {B: 2, C: 3})) == [B]
    assert sorted(Zoning().peers_in(A, {B: 2, C: 3})) == [B, C]


zonings = st.lists(st.frozensets(st.sampled_from([A, B, C, D])), max_size=4).map(
    lambda zones: Zoning(Zone(str(n), members) for n, members in enumerate(zones))
)


@given(zonings, zonings, st.frozensets(st.sampled_from([A, B, C, D])))
def test_what_a_change_names_is_exactly_what_looks_different(old: Zoning, new: Zoning, targets: frozenset[Wwn]) -> None:
    ports = {A: 1, B: 2, C: 3, D: 4}
    pages = affected(old, new, ports, targets)
    for one, one_id in ports.items():
        differs = {
            other_id
            for other, other_id in ports.items()
            if old.visible(one, other) != new.visible(one, other) and {one, other} & targets
        }
        assert set(pages.get(one_id, [])) == differs
