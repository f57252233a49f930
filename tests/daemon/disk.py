"""A disk that loses what it should write when a test says so."""

from __future__ import annotations

import os


class Disk:
    """What the kernel says to the fabric: once what was lost, if anything was.  Counts what is flushed."""

    def __init__(self) -> None:
        self.flushed = 0
        self.error = 0

    def fdatasync(self, fd: int) -> None:
        self.flushed += 1
        error, self.error = self.error, 0
        if error:
            raise OSError(error, os.strerror(error))
        os.fsync(fd)
