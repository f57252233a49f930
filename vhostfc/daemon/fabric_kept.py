"""What of a unit outlives the fabric: files named after its NAA designator.

Reservations (APTPL) are NAA.json; notes of the device server, such as "a SANITIZE is under way" and the saved mode
pages, NAA.NAME; what a WRITE ATOMIC may have to undo, NAA.atomic (fabric_journal).

A file takes the place of the one before by a rename, and is on the disk before anybody is told so.  Where
that cannot be, the one before is put back: whoever was told "not done" must not find it done after a restart.
One that cannot be understood is an error at the start: a fabric that forgot who is kept out would be
worse than one that does not come up.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog
import trio

from vhostfc.daemon.fabric_journal import Journal
from vhostfc.daemon.stable import make_directory, sync_directory
from vhostfc.errors import VhostfcError
from vhostfc.scsi import mode, persistent
from vhostfc.scsi.reservations import State
from vhostfc.scsi.sanitize import NOTE


class KeptReservations:
    """The directory of these files.

    port_name, port_number: between the relative identifier of a target port and its Port_Name, 8 bytes.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port_name: Callable[[int], bytes],
        port_number: Callable[[bytes], int],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.directory = directory
        self._port_name = port_name
        self._port_number = port_number
        self._log = log

    def path(self, naa: bytes, name: str = "json") -> Path:
        return self.directory / f"{naa.hex()}.{name}"

    def load(self, naa: bytes) -> State:
        """The reservations of this unit.  Raises VhostfcError, which names the file."""
        path = self.path(naa)
        try:
            return persistent.unpack(path.read_bytes(), self._port_number)
        except FileNotFoundError:
            return State()
        except OSError as error:
            raise VhostfcError(f"{path}: the unit's reservations cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise VhostfcError(
                f"{path}: the unit's reservations cannot be understood: {error}; remove the file to begin without any"
            ) from None

    async def save(self, naa: bytes, state: State | None) -> bool:
        """Make this what load() finds, whatever happens after; False, and a line in the log, if that cannot be."""
        return await self._save(self.path(naa), None if state is None else persistent.pack(state, self._port_name))

    async def _save(self, path: Path, record: bytes | None) -> bool:
        with trio.CancelScope(shield=True):  # whoever is told "not done" must not find it done later
            try:
                await trio.to_thread.run_sync(_replace, path, record)
            except OSError as error:
                self._log.error("cannot keep what has to outlive us", path=str(path), reason=error.strerror)
                return False
        return True

    # ------------------------------------------------------------ notes

    def note(self, naa: bytes, name: str = NOTE) -> bytes | None:
        """A note of this unit.  Raises VhostfcError, which names the file."""
        path = self.path(naa, name)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise VhostfcError(f"{path}: cannot be read: {error.strerror}") from None

    def set_mode(self, naa: bytes, pages: mode.ModePages) -> None:
        """What was saved of this unit's mode pages is in force.  Raises VhostfcError, which names the file."""
        if (note := self.note(naa, mode.NOTE)) is None:
            return
        try:
            pages.found(note)
        except ValueError as error:
            path = self.path(naa, mode.NOTE)
            said = f"the unit's mode pages cannot be understood: {error}; remove the file to begin with the defaults"
            raise VhostfcError(f"{path}: {said}") from None

    async def keep_note(self, naa: bytes, name: str, data: bytes | None) -> bool:
        """Make this what note() finds, whatever happens after; None: nothing."""
        return await self._save(self.path(naa, name), data)

    def journal(self, naa: bytes) -> Journal:
        return Journal(self.path(naa, "atomic"))

    def forget(self, naa: bytes) -> None:
        """The unit is no more."""
        for name in ("json", NOTE, mode.NOTE, "atomic"):
            self.path(naa, name).unlink(missing_ok=True)


def _replace(path: Path, record: bytes | None) -> None:
    """Raises OSError, and then nothing has changed: neither for who reads it now, nor (as far as the disk allows to
    promise anything then) for who reads it after a loss of power."""
    if record is None and not path.parent.exists():
        return
    make_directory(path.parent)
    before = path.read_bytes() if path.exists() else None
    try:
        _put(path, record)
        sync_directory(path.parent)
    except OSError:
        with suppress(OSError):
            _put(path, before)
            sync_directory(path.parent)
        raise


def _put(path: Path, record: bytes | None) -> None:
    """In the place of what was there, at one stroke."""
    if record is None:
        path.unlink(missing_ok=True)
        return
    part = path.with_name(f"{path.name}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb", closefd=False) as stream:
            stream.write(record)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(part, path)
