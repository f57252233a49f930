"""Names in every spelling that people paste."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfc.fc.wwn import Wwn, WwnError, new_pair

NAME = Wwn(0x5001438012345678)


@pytest.mark.parametrize(
    "spelling",
    [
        "50:01:43:80:12:34:56:78",
        "50-01-43-80-12-34-56-78",
        "5001.4380.1234.5678",
        "0x5001438012345678",
        "5001438012345678",
        "naa.5001438012345678",
        "pwwn-5001438012345678",
        "  50:01:43:80:12:34:56:78\n",
        "NAA.5001438012345678",
    ],
)
def test_every_common_spelling_is_read(spelling: str) -> None:
    assert Wwn.parse(spelling) == NAME


@pytest.mark.parametrize(
    "text", ["", "500143801234567", "50:01-43:80:12:34:56:78", "50:01:43:80:12:34:56", "0" * 16, "g001438012345678"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(WwnError, match=r"World Wide Name|zero"):
        Wwn.parse(text)


@given(st.integers(1, 2**64 - 1).map(Wwn))
def test_one_spelling_comes_out(name: Wwn) -> None:
    assert Wwn.parse(str(name)) == name
    assert Wwn.unpack(name.pack()) == name
    assert f"{name}" == str(name) == name.pack().hex(":")


def test_new_pairs_are_neighbours_and_differ() -> None:
    pairs = [new_pair() for _ in range(50)]

    assert len(set(pairs)) == 50
    assert all(wwnn == wwpn + 1 and wwpn.naa == 5 for wwpn, wwnn in pairs)


def test_a_name_can_be_formatted_as_text_and_as_a_number() -> None:
    assert f"{NAME:>25}" == "  50:01:43:80:12:34:56:78"
    assert f"{NAME:016x}" == "5001438012345678"
    assert f"{NAME:_d}".replace("_", "") == str(int(NAME))
