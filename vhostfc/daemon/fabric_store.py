"""Memory that outlives the fabric: systemd keeps its descriptors, under names that say target, LUN and NAA."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from vhostfc.daemon.notify import Notifier, PassedFd


class Store:
    """What systemd kept for us, and what we ask it to keep."""

    _NAME = re.compile(r"(unit|latch)-([0-9a-f]{16}-\d+)-([0-9a-f]{32})")

    def __init__(self, notifier: Notifier, passed: Sequence[PassedFd] = ()) -> None:
        self._notifier = notifier
        self._kept: dict[str, tuple[bytes, int]] = {}
        self._latches: dict[bytes, int] = {}
        for one in passed:
            if not (match := self._NAME.fullmatch(one.name)):
                continue
            if match[1] == "unit":
                self._kept[match[2]] = (bytes.fromhex(match[3]), one.fd)
            else:
                self._latches[bytes.fromhex(match[3])] = one.fd

    def take(self, place: str, size: int) -> tuple[bytes, int] | None:
        """(NAA, memfd) that was kept for this place, if it is not larger than it shall be now."""
        kept = self._kept.get(place)
        if kept is None or os.fstat(kept[1]).st_size > size:
            return None
        return self._kept.pop(place)

    def take_latch(self, naa: bytes) -> int | None:
        """The latch that was kept with it: in it is what dead adapters had begun to write."""
        return self._latches.pop(naa, None)

    def put(self, place: str, naa: bytes, fd: int, latch_fd: int) -> None:
        self._notifier.store(self._name("unit", place, naa), [fd])
        self._notifier.store(self._name("latch", place, naa), [latch_fd])

    def remove(self, place: str, naa: bytes) -> None:
        self._notifier.forget(self._name("unit", place, naa))
        self._notifier.forget(self._name("latch", place, naa))

    def drop_rest(self) -> None:
        """What nobody took is of units that are not configured any more, or not so large."""
        for place, kept in list(self._kept.items()):
            self._drop(place, *kept)
        self._kept.clear()
        for fd in self._latches.values():
            os.close(fd)
        self._latches.clear()

    def _drop(self, place: str, naa: bytes, fd: int) -> None:
        os.close(fd)
        self.remove(place, naa)

    @staticmethod
    def _name(what: str, place: str, naa: bytes) -> str:
        return f"{what}-{place}-{naa.hex()}"
