"""Rations: who may have how much here, and whose turn it is."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from vhostfc.fabric.rations import Rations
from vhostfc.fc.wwn import Wwn

A, B, C = Wwn(1), Wwn(2), Wwn(3)


def test_a_ration_is_a_port_s_own() -> None:
    rations = Rations[str](commands=2, size=100)
    assert rations.admit(A, 10)
    assert rations.admit(A, 10)
    assert not rations.admit(A, 0), "a third command"
    assert rations.admit(B, 99)
    assert not rations.admit(B, 2), "more bytes than are left"
    rations.release(A, 10)
    assert rations.admit(A, 90)
    assert rations.usage(A) == (2, 100)


def test_a_command_that_is_alone_is_admitted_whatever_its_size() -> None:
    assert Rations[str](commands=2, size=100).admit(A, 1000)


def test_ports_take_turns_however_many_commands_one_of_them_has() -> None:
    rations = Rations[str](commands=100)
    for n in range(50):
        rations.admit(A, 0)
        rations.put(A, f"a{n}")
    rations.admit(B, 0)
    rations.put(B, "b0")
    assert [rations.take() for _ in range(3)] == [(A, "a0"), (B, "b0"), (A, "a1")]
    assert rations.take(lambda port: port != A) is None


@given(st.lists(st.sampled_from([A, B, C]), max_size=60))
def test_nobody_waits_longer_than_one_round_and_everybody_in_order(arrivals: list[Wwn]) -> None:
    rations = Rations[int](commands=1000)
    for n, port in enumerate(arrivals):
        assert rations.admit(port, 1)
        rations.put(port, n)
    served: list[tuple[Wwn, int]] = []
    while taken := rations.take():
        served.append(taken)
        rations.release(taken[0], 1)
    assert sorted(n for _, n in served) == list(range(len(arrivals)))
    for port in {*arrivals}:
        mine = [i for i, (who, _) in enumerate(served) if who == port]
        assert [served[i][1] for i in mine] == [n for n, who in enumerate(arrivals) if who == port]
        others = len({*arrivals}) - 1
        assert all(b - a <= others + 1 for a, b in itertools.pairwise(mine))
    assert rations.usage(A) == (0, 0)
