"""The vport of a port that lives: which one it is now, what the kernel says of it, and help when it does not come back.

The login waits for a vport and helps it along (vport.py).  Afterwards the switch may throw it out, or somebody may take
it away; then what the login does is done again, on another HBA port where that is better.
"""

from __future__ import annotations

import structlog
import trio

from vhostfc.errors import LoginRefused
from vhostfc.ports.base import PortIdentity
from vhostfc.ports.sysfs import Sysfs, Vport
from vhostfc.ports.vport import ACTIVE, ADVICE, FINAL, WAITING, Vports

#: Seconds after a refusal until we ask again.
AGAIN = 10.0


class Watch:
    """See the head of the file.  patience: as for Vports, seconds."""

    def __init__(
        self,
        vport: Vport,
        vports: Vports,
        sysfs: Sysfs,
        identity: PortIdentity,
        *,
        patience: float,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.vport = vport
        self._vports = vports
        self._sysfs = sysfs
        self._identity = identity
        self._patience = patience
        self._log = log
        self._said: str | None = None
        self._ails_since: float | None = None

    def look(self) -> Vport | None:
        """The vport as it is now, None: it is gone.  Says what has become of it, and what to do about it."""
        vport = self._sysfs.vport(self.vport.name)
        state = None if vport is None else vport.state
        if state != self._said:
            self._said = state
            if state == ACTIVE:
                self._log.info("the vport is", state=state, vport=self.vport.name)
            elif state is not None:
                self._log.warning("the vport is", state=state, vport=self.vport.name, advice=ADVICE.get(state))
        return vport

    def needs_help(self) -> bool:
        """Is it gone, or has it been logged out for too long?  Not while it waits for a link, or is disabled."""
        vport = self._sysfs.vport(self.vport.name)
        if vport is None:
            self._log.error("the vport is gone; making it anew", vport=self.vport.name)
            return True
        parent = self._sysfs.host(vport.parent)
        if vport.state in {ACTIVE, *WAITING} or parent is None or parent.state != "Online":
            self._ails_since = None
            return False
        if self._ails_since is None:
            self._ails_since = trio.current_time()
        patience = self._patience / 10 if vport.state in FINAL else self._patience
        if trio.current_time() - self._ails_since <= patience:
            return False
        self._log.error("the vport does not come back by itself", vport=vport.name, state=vport.state)
        return True

    async def help(self) -> bool:
        """Log in anew.  False when it is refused; after a while it may be tried again."""
        try:
            self.vport = await self._vports.acquire(self._identity)
        except LoginRefused as error:
            self._log.error("cannot log in", reason=str(error))
            return False
        self._ails_since = None
        return True
