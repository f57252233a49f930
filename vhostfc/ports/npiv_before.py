"""What a life of the adapter before this one may have left with the kernel, and how this one begins after it.

A vport outlives its adapter when that is killed, or keeps it on purpose.  So do the commands that the kernel had then:
closing a unit's files ends none of them, and a write of before could land on what is written now.  Only when the vport
goes are they surely over, those included that the kernel means to send again.  So a vport is gone on with where the
last life has left a note that the kernel had nothing more of it; else it is made anew before the first command.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from vhostfc.errors import LoginRefused
from vhostfc.ports.base import PortIdentity
from vhostfc.ports.ownfiles import OwnFiles
from vhostfc.ports.sysfs import Sysfs, Vport
from vhostfc.ports.vport import Vports


class Before:
    """See the head of the file.  state: a directory of this adapter's own."""

    def __init__(
        self,
        identity: PortIdentity,
        vports: Vports,
        sysfs: Sysfs,
        *,
        state: Path,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._identity = identity
        self._vports = vports
        self._sysfs = sysfs
        self._files = OwnFiles(state)
        self._name = f"vport-{identity.wwpn.pack().hex()}.idle"
        self._log = log

    async def acquire(self) -> Vport:
        """A vport with nothing under way.  Raises LoginRefused."""
        left = self._sysfs.vport_of(self._identity.wwpn)
        if left is not None and not self._was_idle(left):
            self._log.warning("commands of a life before this one may be under way: its vport goes", vport=left.name)
            await self._vports.delete(self._identity)
        elif left is not None:
            left = None
        vport = await self._vports.acquire(self._identity)
        if left is not None and vport.name == left.name:
            raise LoginRefused(
                f"{vport.name} on {vport.parent} cannot be deleted, and commands of a life before this one may still be"
                " under way there; the kernel's log may say why"
            )
        try:
            self._files.remove(self._name)
        except OSError as error:
            raise LoginRefused(f"{error.filename}: {error.strerror}") from error
        return vport

    def leave(self, *, idle: bool) -> None:
        """The vport stays.  idle: the kernel has given back all that it had."""
        vport = self._sysfs.vport_of(self._identity.wwpn)
        if vport is None or not idle:
            return
        try:
            self._files.write(self._name, vport.name)
        except OSError as error:
            self._log.warning("cannot note that the vport is idle", path=error.filename, reason=error.strerror)

    def _was_idle(self, vport: Vport) -> bool:
        try:
            return self._files.read(self._name) == vport.name  # the kernel gives no vport's name twice
        except OSError:
            return False
