"""What a target port remembers of exchanges that are over: for REC, and for responses that are to be confirmed.

An initiator that misses an answer asks with REC how far its exchange has come (FCP-4 clause 12).  "Complete" means that
the FCP_RSP is lost and the command was done; an exchange that is not known was never begun.  The two must not be
mixed up, so the last ones are remembered.

Where PRLI has agreed on it, an FCP_RSP with sense data asks for an FCP_CONF (FCP-4 4.6): telling a unit attention
condition clears it, and one that was lost on the way would never be heard of.  If the initiator aborts the exchange
instead of confirming it, the condition is established anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from vhostfc.fc import els

#: Exchanges that are remembered of each initiator; the longest over gives way.
KEPT = 64


@dataclass(slots=True)
class Ended:
    """An exchange whose FCP_RSP is out.  moved: bytes of data.  confirmed: nobody waits for an FCP_CONF (any more)."""

    ox_id: int
    rx_id: int
    moved: int
    lun: bytes
    sense: bytes = b""
    confirmed: bool = True


class Ends:
    """The exchanges of one initiator that ended last, by OX_ID."""

    def __init__(self) -> None:
        self._ends: dict[int, Ended] = {}

    def add(self, ended: Ended) -> None:
        self._ends.pop(ended.ox_id, None)
        self._ends[ended.ox_id] = ended
        if len(self._ends) > KEPT:
            del self._ends[next(iter(self._ends))]

    def forget(self, ox_id: int) -> None:
        """This OX_ID is another exchange's now."""
        self._ends.pop(ox_id, None)

    def confirm(self, ox_id: int) -> None:
        """An FCP_CONF has come."""
        ended = self._ends.get(ox_id)
        if ended is not None:
            ended.confirmed = True

    def abort(self, ox_id: int) -> Ended | None:
        """An ABTS has come: the exchange, if its response was to be confirmed and was not."""
        ended = self._ends.get(ox_id)
        if ended is None or ended.confirmed:
            return None
        del self._ends[ox_id]
        return ended

    def concise(self, request: els.Rec, responder: int) -> els.RecAcc | None:
        """The answer to a REC for one of these, None when there is none."""
        ended = self._ends.get(request.ox_id)
        if ended is None or request.rx_id not in {ended.rx_id, 0xFFFF}:
            return None
        # The exchange is open until it is confirmed, and it is the initiator's turn.
        status = els.RecAcc.OWNER_RESPONDER | (els.RecAcc.COMPLETED if ended.confirmed else 0)
        return els.RecAcc(ended.ox_id, ended.rx_id, request.s_id, responder, ended.moved, status)

    def __len__(self) -> int:
        return len(self._ends)
