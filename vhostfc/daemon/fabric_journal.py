"""All or nothing: what a WRITE ATOMIC is about to write over, on stable storage until the write is too.

A process may be killed, and a machine lose its power, in the middle of a write; so what the blocks hold is
put into a file first, and put back when the unit is opened again and the file is not empty.  Nobody else
has written there meanwhile: the range latch was ours until we died, and no adapter keeps a medium longer
than its fabric lives.  The file is emptied before the command is answered; it is never removed while the
unit lives, since an emptied file needs no directory to be written.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

from vhostfc.daemon.stable import make_directory, sync_directory

#: LBA, bytes of a block, bytes of data, and SHA-256 of all that: half a record is none.
_HEAD = struct.Struct("!QII")
_DIGEST = 32


class Journal:
    """The file of one unit, with room for one write.  Methods raise OSError; they take time: call them in a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, lba: int, block_size: int, data: bytes) -> None:
        """When this returns, load() finds it after a crash."""
        new = not self.path.exists()
        make_directory(self.path.parent)
        body = _HEAD.pack(lba, block_size, len(data)) + data
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, 0)  # a longer one that was not written whole would hide this one
            with open(fd, "wb", closefd=False) as stream:
                stream.write(hashlib.sha256(body).digest() + body)
            os.fsync(fd)
        finally:
            os.close(fd)
        if new:
            sync_directory(self.path.parent)

    def clear(self) -> None:
        """When this returns, load() finds nothing."""
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.ftruncate(fd, 0)
                os.fsync(fd)
            finally:
                os.close(fd)
        except FileNotFoundError:  # never made; or removed, and who knows whether for good
            if self.path.parent.exists():
                sync_directory(self.path.parent)
        except OSError:  # a record that stayed would undo what is written later
            self.path.unlink()
            sync_directory(self.path.parent)

    def load(self) -> tuple[int, int, bytes] | None:
        """(LBA, bytes of a block, data) of a write that was cut short; None: of none.

        Half a record means that the medium was not touched yet.
        """
        try:
            record = self.path.read_bytes()
        except FileNotFoundError:
            return None
        body = record[_DIGEST:]
        if len(body) < _HEAD.size or hashlib.sha256(body).digest() != record[:_DIGEST]:
            return None
        lba, block_size, length = _HEAD.unpack_from(body)
        return (lba, block_size, body[_HEAD.size :]) if length == len(body) - _HEAD.size else None
