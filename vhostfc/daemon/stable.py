"""Directories on stable storage: a file that was made, replaced or removed stays so only when its directory says so."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def sync_directory(path: Path) -> None:
    """What this directory lists now is what it lists after a loss of power.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """With the parents that are missing, each for its owner alone and each to stay.  Raises OSError."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    try:
        sync_directory(path.parent)
    except OSError:
        with suppress(OSError):
            path.rmdir()  # whoever finds it takes it for one that stays
        raise
