"""What is looked after below a vport each time that the port looks.

The timers of remote ports are set.  A unit that the kernel's error recovery has given up is "offline": it fails every
command until somebody says that it is running, and nobody else does.  So we do, while its remote port is Online.  A
unit that a driver of this host has taken (sd, which reads it and takes the guest's unit attentions) is taken back.

The kernel asks a unit before it sets it running, and sd has it write its cache out before it lets go: a sick one may
keep both for minutes.  So these writes are made beside everything else, and less and less often where they do not help.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from vhostfc.ports.kernel import Kernel
from vhostfc.ports.sysfs import Lun, Rport

OFFLINE = "offline"
#: The kernel wants its end of line here, and nowhere else (store_state_field of scsi_sysfs.c).
RUNNING = "running\n"
#: Seconds between two attempts to mend a unit: they become longer, and what held so long is forgotten.
FIRST, LONGEST = 10.0, 600.0
HANDS_OFF = (
    "this host would attach the guest's units to itself: run `vhostfc setup`, which keeps its drivers off vports' units"
    " and has its other disks found as before"
)
Serve = Callable[[Callable[[], Awaitable[None]]], None]


class Care:
    """See the head of the file.  dev_loss, fast_io_fail: seconds; guard: take units back, else only warn; serve: runs a
    task of the port's."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        dev_loss: int,
        fast_io_fail: int,
        guard: bool,
        serve: Serve,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._kernel = kernel
        self._sysfs = kernel.sysfs
        self._dev_loss, self._fast_io_fail = dev_loss, fast_io_fail
        self._guard = guard
        self._log = log
        self._set: set[str] = set()
        self._loose = False
        self._running = _Attempts(kernel, serve, log, "set a unit running again")
        self._unbinding = _Attempts(kernel, serve, log, "took a unit back from this host's driver")

    def begin_anew(self) -> None:
        """The vport is another one."""
        self._set.clear()

    def kept_off(self, lun: Lun) -> bool:
        """Must nobody use this unit, since a driver of this host has it?"""
        return self._guard and lun.driver is not None

    async def look(self, rports: Collection[Rport], luns: Collection[Lun]) -> None:
        """Do what is to be done."""
        self._look_at_hands()
        self._look_for_drivers(luns)
        self._look_for_offline(rports, luns)
        await self._set_timers(rports)

    # ------------------------------------------------------------ units that are not as they should be

    def _look_at_hands(self) -> None:
        loose = bool(self._sysfs.autoprobe())
        if loose and not self._loose and self._guard:
            self._log.error(HANDS_OFF)
        self._loose = loose

    def _look_for_drivers(self, luns: Iterable[Lun]) -> None:
        bound = {lun.hctl: lun for lun in luns if lun.driver is not None}
        say = self._log.error if self._guard else self._log.warning
        for hctl in self._unbinding.look(bound):
            say(
                "this host's driver had a unit of the guest's, and may have read it",
                unit=hctl,
                driver=bound[hctl].driver,
            )
        if self._guard:
            drivers = self._sysfs.root / "bus/scsi/drivers"
            self._unbinding.go({hctl: (drivers / f"{lun.driver}/unbind", hctl) for hctl, lun in bound.items()})

    def _look_for_offline(self, rports: Iterable[Rport], luns: Iterable[Lun]) -> None:
        offline = {lun.hctl: lun for lun in luns if lun.state == OFFLINE}
        for hctl in self._running.look(offline):
            self._log.error("the kernel has set a unit offline: its error recovery did not help", unit=hctl)
        online = {rport.target for rport in rports if rport.state == "Online"}
        devices = self._sysfs.of_class("scsi_device")
        self._running.go(
            {hctl: (devices / hctl / "device/state", RUNNING) for hctl, lun in offline.items() if lun.target in online}
        )

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


@dataclass(eq=False)
class _Ailing:
    """due: when to try; pause: until the time after that."""

    due: float
    pause: float = FIRST


class _Attempts:
    """Writes that mend units, one at a time.  done: what is logged when one was made."""

    def __init__(self, kernel: Kernel, serve: Serve, log: structlog.typing.FilteringBoundLogger, done: str) -> None:
        self._kernel = kernel
        self._serve = serve
        self._log = log
        self._done = done
        self._units: dict[str, _Ailing] = {}
        self._busy = False

    def look(self, ailing: Collection[str]) -> list[str]:
        """These units are not as they should be, by "H:C:T:L"; which of them are news?"""
        now = trio.current_time()
        for hctl, known in list(self._units.items()):
            if hctl not in ailing and now > known.due + known.pause:
                del self._units[hctl]
        news = [hctl for hctl in ailing if hctl not in self._units]
        self._units |= {hctl: _Ailing(now) for hctl in news}
        return news

    def go(self, writes: Mapping[str, tuple[Path, str]]) -> None:
        """What mends each of them; begins with what is due."""
        due = {hctl: write for hctl, write in writes.items() if self._units[hctl].due <= trio.current_time()}
        if due and not self._busy:
            self._busy = True
            self._serve(lambda: self._mend(due))

    async def _mend(self, writes: Mapping[str, tuple[Path, str]]) -> None:
        try:
            for hctl, (path, text) in writes.items():
                known = self._units.setdefault(hctl, _Ailing(0))
                known.due = trio.current_time() + known.pause
                known.pause = min(2 * known.pause, LONGEST)
                try:
                    await self._kernel.write(path, text.encode())
                except OSError as error:
                    self._log.warning("cannot mend a unit", unit=hctl, path=str(path), reason=error.strerror)
                else:
                    self._log.warning(self._done, unit=hctl)
        finally:
            self._busy = False
