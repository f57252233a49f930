"""Which ring goes to which worker."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfc.daemon.balance import Move, Work, choose, done_between

WORK = st.lists(st.dictionaries(st.integers(2, 9), st.integers(1, 1000)), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("work", "move"),
    [
        ([{}], None),
        ([{2: 5, 3: 5}], None),
        ([{2: 10}, {}], None),  # one ring alone: the other worker would have as much to do
        ([{2: 5, 4: 5}, {}], Move(2, 0, 1)),
        ([{}, {2: 5, 4: 4}], Move(2, 1, 0)),
        ([{2: 5, 4: 5}, {3: 5}], None),  # three alike on two workers
        ([{2: 9, 4: 9}, {3: 1}], Move(2, 0, 1)),
        ([{2: 100, 4: 70, 6: 10}, {3: 20}], Move(4, 0, 1)),
        ([{2: 10, 4: 1}, {3: 9}], None),  # not worth it
        ([{2: 4, 5: 4}, {3: 6}, {4: 1}], Move(2, 0, 2)),
    ],
)
def test_the_move_that_helps_most(work: Work, move: Move | None) -> None:
    assert choose(work) == move


@given(WORK)
def test_moves_come_to_an_end(work: list[dict[int, int]]) -> None:
    """Each makes the fullest worker of the two less full, so no ring goes to and fro."""
    work = [{ring * 10 + worker: done for ring, done in rings.items()} for worker, rings in enumerate(work)]
    for _ in range(sum(map(len, work)) ** 2 + 1):
        move = choose(work)
        if move is None:
            return
        before = sum(work[move.source].values())
        work[move.target][move.ring] = work[move.source].pop(move.ring)
        assert max(sum(work[move.source].values()), sum(work[move.target].values())) <= 0.8 * before
    pytest.fail("moves without end")


def test_what_was_done_between_two_looks() -> None:
    """Rings that did nothing are not there; one that has moved counts where it is."""
    assert done_between([{2: 5, 3: 7}, {}], [{2: 9, 3: 7}, {3: 4}]) == [{2: 4}, {3: 4}]
