"""Which ring should go to which worker, so that the one with most to do has less.

Work is what vfc_work() counts: bytes, and so much for each command.  Rings are dealt out before anybody knows what the
guest will do with them; this looks at what it did for a moment, and moves one ring at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: A move has to take at least this part off the fullest worker: a ring stands still while it moves, and loads vary.
GAIN = 0.2

#: By worker: the work of each ring.
Work = Sequence[Mapping[int, int]]


@dataclass(frozen=True, slots=True)
class Move:
    """This ring, from its worker to another."""

    ring: int
    source: int
    target: int


def done_between(before: Work, after: Work) -> list[dict[int, int]]:
    """The work between two looks."""
    return [
        {ring: work - then.get(ring, 0) for ring, work in now.items() if work > then.get(ring, 0)}
        for then, now in zip(before, after, strict=True)
    ]


def choose(work: Work) -> Move | None:
    """The move after which the fuller of the two workers has least to do, or None where none is worth it."""
    totals = [sum(rings.values()) for rings in work]
    source = max(range(len(work)), key=totals.__getitem__)
    target = min(range(len(work)), key=totals.__getitem__)

    def left(ring: int) -> int:
        return max(totals[source] - work[source][ring], totals[target] + work[source][ring])

    ring = min(work[source], key=left, default=None)
    if ring is None or left(ring) > totals[source] * (1 - GAIN):
        return None
    return Move(ring, source, target)
