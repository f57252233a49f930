"""Which units a target has: asked of the target, because nobody tells.

Linux scans a target when it logs in to it, and never by itself afterwards: a unit that the array adds is found when we
scan for it, one that it takes away stays in sysfs until we take it out there.  We ask every now and then, when a unit
says that its target's list has changed, when the fabric says that something has, and when a guest rescans.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import structlog
import trio

from vhostfc.fc.wwn import Wwn
from vhostfc.ports.base import Outcome, RemotePortState, Unit
from vhostfc.ports.kernel import Kernel
from vhostfc.ports.npiv_commands import Commands
from vhostfc.ports.npiv_results import INQUIRY, REPORT_LUNS
from vhostfc.ports.sysfs import Lun, Rport

#: Seconds for a target's answer.
TIMEOUT = 10.0
_LIST_BYTES = 8 + 8 * 2048
#: Least time between two surveys, seconds.
PAUSE = 0.1
_NO_SUCH_UNIT = (0x05, 0x25)


class View(Protocol):
    """What the port sees."""

    @property
    def host(self) -> str | None: ...

    def rports(self) -> Iterable[Rport]: ...

    def state_of(self, wwpn: Wwn) -> RemotePortState | None: ...

    def units_of(self, wwpn: Wwn) -> Iterable[Unit]: ...

    def lun_of(self, unit: Unit) -> Lun | None: ...

    async def reconcile(self) -> None: ...


class Survey:
    """See the head of the file.  interval: seconds between questions."""

    def __init__(
        self,
        kernel: Kernel,
        view: View,
        commands: Commands,
        *,
        interval: float,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._kernel = kernel
        self._view = view
        self._commands = commands
        self._interval = interval
        self._log = log
        self._wanted = trio.Event()
        self._one_at_a_time = trio.Lock()

    def look_again(self) -> None:
        """Something may have changed: ask soon."""
        self._wanted.set()

    async def run(self) -> None:
        while True:
            with trio.move_on_after(self._interval):
                await self._wanted.wait()
            if self._wanted.is_set():
                self._wanted = trio.Event()
                await self._refresh()
            await self.ask_all()
            await trio.sleep(PAUSE)

    async def ask_all(self) -> None:
        """Ask every target; scan where it has what we do not see, take out what it does not have any more."""
        async with self._one_at_a_time:
            changed = False
            for rport in self._view.rports():
                if rport.target is not None and self._view.state_of(rport.wwpn) is RemotePortState.ONLINE:
                    changed |= await self._ask(rport)
        if changed:
            await self._view.reconcile()

    async def _refresh(self) -> None:
        """Something has changed: have the kernel ask the units anew who they are.  A place may have another disk."""
        for rport in self._view.rports():
            for unit in self._view.units_of(rport.wwpn):
                lun = self._view.lun_of(unit)
                if lun is not None and self._view.state_of(rport.wwpn) is RemotePortState.ONLINE:
                    await self._write(self._kernel.sysfs.of_class("scsi_device") / lun.hctl / "device/rescan", "1")
        await self._view.reconcile()

    async def scan_all(self) -> None:
        """The kernel scans every target, whatever we know; then as ask_all()."""
        await self._scan("- - -")
        await self._view.reconcile()
        await self.ask_all()

    async def _ask(self, rport: Rport) -> bool:
        units = list(self._view.units_of(rport.wwpn))
        if not units:
            return await self._scan(f"0 {rport.target} -")
        cdb = bytes([REPORT_LUNS]) + bytes(5) + _LIST_BYTES.to_bytes(4, "big") + bytes(2)
        result = await self._commands.execute(units[0], cdb, data_in=_LIST_BYTES, timeout=TIMEOUT)
        if result.outcome is not Outcome.COMPLETE or result.status or len(result.data_in) < 8:
            sense = _key(result.sense)
            if result.status == 2 and sense == _NO_SUCH_UNIT:  # the one that we asked is gone
                return await self._take_out(units[0])
            return False
        length = int.from_bytes(result.data_in[:4], "big")
        listed = {result.data_in[at : at + 8] for at in range(8, min(8 + length, len(result.data_in)), 8)}
        known = {_plain(unit.lun): unit for unit in units}
        changed = False
        if {_plain(lun) for lun in listed} - known.keys():
            changed |= await self._scan(f"0 {rport.target} -")
        for lun in known.keys() - {_plain(lun) for lun in listed}:
            changed |= await self._confirm_gone(known[lun])
        return changed

    async def _confirm_gone(self, unit: Unit) -> bool:
        """Not listed: gone when it says so itself, too.  A list can be wrong for a moment, and a disk is dear.

        INQUIRY reports no unit attention and clears none (SAM-5 5.14): the guest's stays the guest's.
        """
        cdb = bytes([INQUIRY, 0, 0, 0, 36, 0])
        result = await self._commands.execute(unit, cdb, data_in=36, timeout=TIMEOUT)
        if result.outcome is not Outcome.COMPLETE:
            return False
        not_there = not result.status and bool(result.data_in) and result.data_in[0] >> 5 != 0  # SPC-5 6.6.2
        if not_there or (result.status == 2 and _key(result.sense) == _NO_SUCH_UNIT):
            return await self._take_out(unit)
        return False

    async def _take_out(self, unit: Unit) -> bool:
        lun = self._view.lun_of(unit)
        if lun is None:
            return False
        self._log.info("unit taken away by its target", unit=str(unit), hctl=lun.hctl)
        path = self._kernel.sysfs.of_class("scsi_device") / lun.hctl / "device/delete"
        return await self._write(path, "1")

    async def _scan(self, what: str) -> bool:
        host = self._view.host
        return host is not None and await self._write(self._kernel.sysfs.of_class("scsi_host") / host / "scan", what)

    async def _write(self, path: Path, text: str) -> bool:
        try:
            await self._kernel.write(path, text.encode())
        except OSError as error:
            self._log.info("the kernel does not", path=str(path), wanted=text, reason=error.strerror)
            return False
        return True


def _plain(lun: bytes) -> bytes:
    """Peripheral and flat addressing name the same unit (SAM-5 4.7.7)."""
    return bytes([lun[0] & 0x3F]) + lun[1:] if lun[0] >> 6 == 1 else lun


def _key(sense: bytes) -> tuple[int, int]:
    """Sense key and additional sense code, of either format (SPC-5 4.4)."""
    if len(sense) < 4:
        return 0, 0
    if sense[0] & 0x7F >= 0x72:
        return sense[1] & 15, sense[2]
    return sense[2] & 15, sense[12] if len(sense) > 12 else 0
