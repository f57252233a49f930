"""What is looked after below a vport each time that the port looks: the timers of remote ports."""

from __future__ import annotations

import errno
from collections.abc import Iterable

import structlog

from vhostfc.ports.kernel import Kernel
from vhostfc.ports.sysfs import Rport


class Care:
    """See the head of the file.  dev_loss, fast_io_fail: seconds."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        dev_loss: int,
        fast_io_fail: int,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._kernel = kernel
        self._sysfs = kernel.sysfs
        self._dev_loss, self._fast_io_fail = dev_loss, fast_io_fail
        self._log = log
        self._set: set[str] = set()

    def begin_anew(self) -> None:
        """The vport is another one."""
        self._set.clear()

    async def look(self, rports: Iterable[Rport]) -> None:
        """Do what is to be done."""
        await self._set_timers(list(rports))

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
