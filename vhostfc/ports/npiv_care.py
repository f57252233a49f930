"""What is looked after below a vport each time that the port looks.

The timers of remote ports are set.  A unit that the kernel's error recovery has given up is "offline": it fails every
command until somebody says that it is running, and nobody else does.  So we do, while its remote port is Online, and
less and less often where that does not help.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import structlog
import trio

from vhostfc.ports.kernel import Kernel
from vhostfc.ports.sysfs import Lun, Rport

OFFLINE = "offline"
#: Seconds between two attempts to have a unit running: they become longer, and what held so long is forgotten.
FIRST, LONGEST = 10.0, 600.0


@dataclass(eq=False)
class _Offline:
    """A unit that was found offline.  due: when to try; pause: until the time after that."""

    due: float
    pause: float = FIRST


class Care:
    """See the head of the file.  dev_loss, fast_io_fail: seconds; serve: runs a task of the port's."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        dev_loss: int,
        fast_io_fail: int,
        serve: Callable[[Callable[[], Awaitable[None]]], None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._kernel = kernel
        self._sysfs = kernel.sysfs
        self._dev_loss, self._fast_io_fail = dev_loss, fast_io_fail
        self._log = log
        self._serve = serve
        self._set: set[str] = set()
        self._offline: dict[str, _Offline] = {}
        self._starting = False

    def begin_anew(self) -> None:
        """The vport is another one."""
        self._set.clear()
        self._offline.clear()

    async def look(self, rports: Iterable[Rport], luns: Iterable[Lun]) -> None:
        """Do what is to be done."""
        await self._set_timers(rports)
        self._look_for_offline(rports, luns)

    # ------------------------------------------------------------ units that the kernel has given up

    def _look_for_offline(self, rports: Iterable[Rport], luns: Iterable[Lun]) -> None:
        now = trio.current_time()
        online = {rport.target for rport in rports if rport.state == "Online"}
        for lun in luns:
            known = self._offline.get(lun.hctl)
            if lun.state == OFFLINE:
                if known is None:
                    self._log.error(
                        "the kernel has set a unit offline: its error recovery did not help; see the kernel's log",
                        unit=lun.hctl,
                        lun=lun.lun.hex(),
                    )
                    self._offline[lun.hctl] = _Offline(now)
            elif known is not None and now > known.due + known.pause:
                del self._offline[lun.hctl]
        due = [lun for lun in luns if lun.state == OFFLINE and self._offline[lun.hctl].due <= now]
        if not self._starting and any(lun.target in online for lun in due):
            self._starting = True
            self._serve(lambda: self._start([lun for lun in due if lun.target in online]))

    async def _start(self, luns: Iterable[Lun]) -> None:
        """Beside everything else: the kernel asks the unit who it is before the write is done, and a sick unit may not
        answer for minutes."""
        try:
            for lun in luns:
                known = self._offline.setdefault(lun.hctl, _Offline(0))
                known.due = trio.current_time() + known.pause
                known.pause = min(2 * known.pause, LONGEST)
                try:
                    await self._kernel.write(
                        self._sysfs.of_class("scsi_device") / lun.hctl / "device/state", b"running"
                    )
                except OSError as error:
                    self._log.warning("cannot set a unit running", unit=lun.hctl, reason=error.strerror)
                else:
                    self._log.warning("set a unit running again", unit=lun.hctl)
        finally:
            self._starting = False

    # ------------------------------------------------------------ timers

    async def _set_timers(self, rports: Iterable[Rport]) -> None:
        """dev_loss_tmo and fast_io_fail_tmo of each remote port, once: a new one has the kernel's own."""
        for rport in rports:
            if rport.state == "Online" and rport.name not in self._set:
                self._set.add(rport.name)
                await self._set_timers_of(rport)

    async def _set_timers_of(self, rport: Rport) -> None:
        # fast_io_fail_tmo must be less than dev_loss_tmo at any moment, and set where that is more than 600 s.
        steps = [("fast_io_fail_tmo", "off"), ("dev_loss_tmo", f"{min(self._dev_loss, 600)}")]
        steps += [("fast_io_fail_tmo", f"{self._fast_io_fail}"), ("dev_loss_tmo", f"{self._dev_loss}")]
        at = self._sysfs.of_class("fc_remote_ports") / rport.name
        if self._sysfs.number(at / "dev_loss_tmo") > 600:
            del steps[0]  # it must not be off now, and is set
        for name, wanted in steps:
            if self._sysfs.text(at / name) == wanted:
                continue
            try:
                await self._kernel.write(at / name, wanted.encode())
            except OSError as error:
                if error.errno == errno.EBUSY:  # it has just been blocked: when it is back
                    self._set.discard(rport.name)
                    return
                if error.errno not in {errno.ENOENT, errno.ENODEV}:
                    self._log.warning(
                        "cannot set a timer", rport=rport.name, timer=name, seconds=wanted, reason=error.strerror
                    )
