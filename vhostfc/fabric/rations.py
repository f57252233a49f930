"""What is waiting to be run, by initiator port: rationed on the way in, served in turns on the way out.

One guest that sends INQUIRYs as fast as it can must not delay another's PERSISTENT RESERVE OUT, and
must not make the fabric keep more for it than its ration: what goes beyond is answered TASK SET FULL or BUSY.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from vhostfc.fc.wwn import Wwn

T = TypeVar("T")


@dataclass(slots=True)
class _Share(Generic[T]):
    commands: int = 0
    size: int = 0
    waiting: deque[T] = field(default_factory=deque)


class Rations(Generic[T]):
    """commands: at a time, per port, from the command's arrival to its answer; size: bytes of their data."""

    def __init__(self, commands: int = 256, size: int = 64 << 20) -> None:
        self.commands = commands
        self.size = size
        self._shares: dict[Wwn, _Share[T]] = {}
        self._row: dict[Wwn, None] = {}  # those that have something waiting, in the order in which they are served

    def admit(self, port: Wwn, size: int) -> bool:
        """A command with this much data has arrived; False when it is beyond the port's ration.

        A command that is alone is always admitted, however large: it could never be otherwise.
        """
        share = self._shares.setdefault(port, _Share())
        if share.commands and (share.commands >= self.commands or share.size + size > self.size):
            return False
        share.commands += 1
        share.size += size
        return True

    def release(self, port: Wwn, size: int) -> None:
        """An admitted command has been answered or dropped."""
        share = self._shares[port]
        share.commands -= 1
        share.size -= size
        if not share.commands:
            del self._shares[port]

    def put(self, port: Wwn, item: T) -> None:
        """An admitted command is ready to be run."""
        self._shares[port].waiting.append(item)
        self._row.setdefault(port)

    def drop(self, port: Wwn, item: T) -> None:
        """It will not be run after all (release() is another matter)."""
        waiting = self._shares[port].waiting
        waiting.remove(item)
        if not waiting:
            del self._row[port]

    def take(self, may_run: Callable[[Wwn], bool] = lambda port: True) -> tuple[Wwn, T] | None:
        """The next command of the port whose turn it is, of those that may run one now."""
        for port in self._row:
            if may_run(port):
                waiting = self._shares[port].waiting
                item = waiting.popleft()
                del self._row[port]
                if waiting:
                    self._row[port] = None  # to the end of the row
                return port, item
        return None

    def waiting(self, port: Wwn) -> Iterator[T]:
        share = self._shares.get(port)
        return iter(share.waiting if share else ())

    def usage(self, port: Wwn) -> tuple[int, int]:
        """(commands, bytes) that the port has here."""
        share = self._shares.get(port)
        return (share.commands, share.size) if share else (0, 0)
