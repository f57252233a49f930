"""Target numbers are dense, and nobody gets another's."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfc.fc.bindings import LIMIT, Bindings
from vhostfc.fc.wwn import Wwn

wwns = st.integers(1, 2**64 - 1).map(Wwn)


@given(st.lists(wwns))
def test_numbers_are_dense_and_stay(names: list[Wwn]) -> None:
    bindings = Bindings()
    first = [bindings.bind(name) for name in names]

    assert sorted({number for number in first if number is not None}) == list(range(len(bindings)))
    assert [bindings.bind(name) for name in names] == first
    assert all(bindings.wwpn(number) == name for name, number in zip(names, first, strict=True) if number is not None)


@given(st.lists(wwns))
def test_they_survive_a_restart(names: list[Wwn]) -> None:
    bindings = Bindings()
    for name in names:
        bindings.bind(name)
    again = Bindings.from_dict(json.loads(json.dumps(bindings.to_dict())))

    assert [again.target(name) for name in names] == [bindings.target(name) for name in names]
    assert again.to_dict() == bindings.to_dict()


def test_when_all_numbers_are_given_away_there_is_none() -> None:
    bindings = Bindings()
    for number in range(LIMIT):
        assert bindings.bind(Wwn(number + 1)) == number

    assert bindings.bind(Wwn(9999)) is None
    assert bindings.bind(Wwn(1)) == 0
    assert bindings.wwpn(LIMIT) is None


@pytest.mark.parametrize(
    "saved",
    [
        [],
        {"targets": "50:01:43:80:12:34:56:78"},
        {"targets": [1]},
        {"targets": ["not a name"]},
        {"targets": ["5001438012345678", "50:01:43:80:12:34:56:78"]},
        {"targets": [f"{number:016x}" for number in range(1, LIMIT + 2)]},
    ],
)
def test_a_broken_file_is_refused(saved: object) -> None:
    with pytest.raises(ValueError, match=r"targets|name|Name|number"):
        Bindings.from_dict(saved)
