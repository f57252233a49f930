"""Small files in an adapter's own directory, safe for root too.

The directory belongs to the adapter's user, and `vhostfc login` is run by root: a link that is put there in place of a
file must not have root write to, lock or give away something else.  So nothing is followed, nothing that is there is
written to or given away, and a file that two names lead to is nobody's.  What root makes belongs to the directory's
owner.  Only the directory's own last part is looked at so closely: through a link further up one gets files of these
names in another directory, and no more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_MOST = 1 << 16


class OwnFiles:
    """See the head of the file.  All functions raise OSError that has the whole path."""

    def __init__(self, directory: Path) -> None:
        self._path = directory

    def open(self, name: str) -> int:
        """A file to be locked, made when it is not there; the caller closes it."""
        with self._directory(name, make=True) as directory:
            try:
                return self._make(directory, name)
            except FileExistsError:
                pass
            fd = self._checked(os.open(name, os.O_RDWR | _SAFELY, dir_fd=directory))
            if os.fstat(fd).st_uid == 0 != os.fstat(directory).st_uid:  # root died before it gave it away
                os.close(fd)
                os.unlink(name, dir_fd=directory)
                return self._make(directory, name)
            return fd

    def read(self, name: str) -> str:
        with self._directory(name) as directory:
            fd = self._checked(os.open(name, os.O_RDONLY | _SAFELY, dir_fd=directory))
            with open(fd, "rb") as file:
                return file.read(_MOST).decode(errors="replace")

    def write(self, name: str, text: str) -> None:
        """All of it or nothing, in place of what is there."""
        temporary = f"{name}.new"
        with self._directory(name, make=True) as directory:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=directory)
            with open(self._make(directory, temporary), "wb") as file:
                file.write(text.encode())
            os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)

    def remove(self, name: str) -> None:
        with self._directory(name) as directory, contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)

    # ------------------------------------------------------------ below

    @contextmanager
    def _directory(self, name: str, *, make: bool = False) -> Iterator[int]:
        """The directory, open; errors are of `name` in it."""
        try:
            made = make and self._mkdir()
            fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | self._no_links())
        except OSError as error:
            if self._no_links() and self._path.is_symlink():
                message = "is a link; root does not follow what another user may have put there"
                raise OSError(errno.ELOOP, message, str(self._path)) from None
            raise OSError(error.errno, error.strerror, error.filename or str(self._path)) from error
        try:
            if made:
                _give(fd, os.stat(self._path.parent))
            yield fd
        except OSError as error:
            why = "is a link; a file of this adapter's own should be there" if error.errno == errno.ELOOP else None
            raise OSError(error.errno, why or error.strerror, str(self._path / name)) from error
        finally:
            os.close(fd)

    def _mkdir(self) -> bool:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._path.mkdir(mode=0o700)
        except FileExistsError:
            return False
        return True

    @staticmethod
    def _no_links() -> int:
        return os.O_NOFOLLOW if os.geteuid() == 0 else 0

    @staticmethod
    def _make(directory: int, name: str) -> int:
        """A new file.  FileExistsError, also for a link to nowhere."""
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFELY, 0o600, dir_fd=directory)
        _give(fd, os.fstat(directory))
        return fd

    @staticmethod
    def _checked(fd: int) -> int:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            os.close(fd)
            raise OSError(errno.EPERM, "is not a plain file of this adapter's own")
        return fd


def _give(fd: int, owner: os.stat_result) -> None:
    """Something that we have just made, to another's user, when we are root."""
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.fchown(fd, owner.st_uid, owner.st_gid)
