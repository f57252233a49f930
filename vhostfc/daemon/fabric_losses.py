"""What the host lost of its cache, and which nexus has yet to hear of it.

Linux says once for each open file description that it could not write something back, and never to one that
was opened after somebody was told.  Each nexus has its data behind a description of its own, and gets another
one with every Route; the fabric has one for all commands that come as frames.  So whoever is told counts it, in
memory that all share (native/vhostfc.h: losses), and each nexus is told once: its next SYNCHRONIZE CACHE, or
write that has to be on the medium, ends in MEDIUM ERROR.

The count has a low half, doubts: a call failed in an adapter, and only we can find out whether that was a loss
which is counted already.  Our description is as old as the unit, so one sync of ours after the doubt tells.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from vhostfc.daemon.medium import Medium, NotSynced
from vhostfc.scsi.task import MediumError, Nexus

_LOSSES, _DOUBTS = 0xFFFFFFFF << 32, 0xFFFFFFFF


class Losses:
    """Those of one unit, as its nexuses know them."""

    def __init__(self, medium: Medium) -> None:
        self._medium = medium
        self._known: dict[Nexus, int] = {}

    def known(self, nexus: Nexus) -> int:
        """The count that this nexus knows of; who comes for the first time has nothing to lose yet."""
        return self._known.setdefault(nexus, self._medium.losses())

    async def sync(self, nexus: Nexus, lba: int, work: Callable[[], Awaitable[None]]) -> None:
        """Do work that ends in a sync, for this nexus.

        Raises MediumError: that failed, or the nexus had not heard yet of what was lost before.
        """
        before = self._medium.losses()
        try:
            await work()
        except NotSynced:
            self._tell(nexus, before)
            raise
        if self._tell(nexus, before):
            raise MediumError(lba)

    def _tell(self, nexus: Nexus, before: int) -> bool:
        """The nexus hears of all that is counted; True: that is news.  Doubts are cleared up as of before the sync."""
        known = self.known(nexus)
        self._known[nexus] = now = self._medium.losses() & _LOSSES | before & _DOUBTS
        return now & _LOSSES != known & _LOSSES
