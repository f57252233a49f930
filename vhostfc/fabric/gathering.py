"""Requests of several frames, put together: a driver's registration with the management server does not fit in one."""

from __future__ import annotations

from vhostfc.fc.frame import Frame, FrameError
from vhostfc.fc.sequence import Reassembly

#: The longest request, and how many of them one N_Port may have half sent; the oldest gives way.
LONGEST, AT_ONCE = 16384, 4


class Gathering:
    """The sequences that have begun, by S_ID and OX_ID."""

    def __init__(self) -> None:
        self._begun: dict[int, dict[int, Reassembly]] = {}

    def add(self, frame: Frame) -> bytes | None:
        """The whole payload with the last frame of its sequence, else None.  Raises FrameError for a broken one."""
        of_port = self._begun.get(frame.s_id, {})
        if frame.seq_cnt == 0:
            of_port.pop(frame.ox_id, None)
            if frame.ends_sequence:
                return frame.payload
            if len(of_port) >= AT_ONCE:
                del of_port[next(iter(of_port))]
            of_port[frame.ox_id] = Reassembly(LONGEST)
            self._begun[frame.s_id] = of_port
        reassembly = of_port.get(frame.ox_id)
        if reassembly is None:
            raise FrameError(f"frame {frame.seq_cnt} of a sequence that has not begun")
        try:
            whole = reassembly.add(frame)
        except FrameError:
            del of_port[frame.ox_id]
            raise
        if whole is not None:
            del of_port[frame.ox_id]
        return whole

    def forget(self, port_id: int) -> None:
        """This N_Port is gone."""
        self._begun.pop(port_id, None)

    def __len__(self) -> int:
        return sum(len(of_port) for of_port in self._begun.values())
