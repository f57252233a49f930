"""The range latch of a medium, as the fabric's commands hold it.

Nobody blocks on a latch: its words are in memory that is shared with the adapters, a holder may be
killed at any moment, and no wait of the kernel's would survive that.  We ask, sleep a little, ask again.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from vhostfc.daemon.medium import Medium
from vhostfc.native import LATCH_STRIPE, LATCH_WORDS, Latch

#: The fabric's own number in every latch.
OWNER = 1
#: The first pause and the longest, in seconds; after STUCK we ask after the holder.
PAUSE, PAUSE_MAX, STUCK = 0.0002, 0.01, 1.0


class Holding:
    """The stripes of a medium that one command holds in the range latch.

    take() adds a range, whatever parts of it are held already; release() frees all.  `stuck` is told the
    owner that a wait of more than a second is for, each second.
    """

    def __init__(self, medium: Medium, stuck: Callable[[int], None] = lambda owner: None) -> None:
        self._medium = medium
        self._stuck = stuck
        self._words: set[int] = set()
        self._taken: list[tuple[int, int]] = []

    def __enter__(self) -> Holding:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def mark(self) -> int:
        """What is held now, for release(to=...)."""
        return len(self._taken)

    async def take(self, lba: int, blocks: int) -> None:
        """Waits until nobody else has a stripe of the range.  Cancelled, it holds what it held before."""
        latch, size = self._medium.latch, self._medium.block_size
        await trio.lowlevel.checkpoint_if_cancelled()
        if latch is None or not blocks:
            return
        before = self.mark()
        try:
            for offset, length in self._missing(lba * size, blocks * size):
                await self._take(latch, offset, length)
        except BaseException:
            self.release(to=before)
            raise

    def _missing(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts of a range whose words we do not have: runs of stripes, cut to the range."""
        if not self._words:
            return [(offset, length)]
        end, runs, have = offset + length, list[tuple[int, int]](), set(self._words)
        for stripe in range(offset // LATCH_STRIPE, -(-end // LATCH_STRIPE)):
            if stripe % LATCH_WORDS in have:
                continue
            have.add(stripe % LATCH_WORDS)
            first, last = max(offset, stripe * LATCH_STRIPE), min(end, (stripe + 1) * LATCH_STRIPE)
            if runs and sum(runs[-1]) == first:
                runs[-1] = (runs[-1][0], last - runs[-1][0])
            else:
                runs.append((first, last - first))
        return runs

    async def _take(self, latch: Latch, offset: int, length: int) -> None:
        pause, asked = PAUSE, trio.current_time()
        while (holder := latch.take(OWNER, offset, length)) is not None:
            if trio.current_time() - asked > STUCK:
                asked = trio.current_time()
                self._stuck(holder)
            await trio.sleep(pause)
            pause = min(2 * pause, PAUSE_MAX)
        self._taken.append((offset, length))
        self._words |= _words(offset, length)

    def hand_over(self) -> Holding:
        """All of it, held by somebody else from now on."""
        other = Holding(self._medium, self._stuck)
        other._taken, other._words, self._taken, self._words = self._taken, self._words, [], set()
        return other

    def release(self, *, to: int = 0) -> None:
        """Free all, or what was taken since mark() said `to`."""
        latch = self._medium.latch
        while len(self._taken) > to:
            offset, length = self._taken.pop()
            if latch is not None:
                latch.free(OWNER, offset, length)
        self._words = set().union(*(_words(*one) for one in self._taken))


def _words(offset: int, length: int) -> set[int]:
    first, last = offset // LATCH_STRIPE, (offset + length - 1) // LATCH_STRIPE
    return {stripe % LATCH_WORDS for stripe in range(first, min(last, first + LATCH_WORDS - 1) + 1)}
