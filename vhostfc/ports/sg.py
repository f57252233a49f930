"""Units behind /dev/sgN: what the workers' routes lead to, and single commands from here.

The C side is native/hba.h.  A SgFile is one open file with some commands on their way, each a Call.
The kernel cannot take a command back: one whose waiter has left is under way until it ends.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from vhostfc.native import FFI, LIB, Medium

#: Commands that an open file carries at a time (SG_MAX_QUEUE).
QUEUE: int = LIB.VFC_SG_QUEUE
#: Seconds for a command that no class is known for.
DEFAULT_TIMEOUT = 60
_MINUTES = 60
_HOURS = 3600
#: Seconds by opcode, for every type of device but tapes and changers: what moves or changes a lot takes long
#: (SBC-4, SPC-5).  Times that the drivers' side has itself are longer or the same (Linux: sd 30 s, UNMAP 30 s).
_TIMEOUTS: dict[int, int] = {
    0x04: 12 * _HOURS,  # FORMAT UNIT
    0x07: 10 * _MINUTES,  # REASSIGN BLOCKS
    0x1B: 2 * _MINUTES,  # START STOP UNIT
    0x1D: 2 * _HOURS,  # SEND DIAGNOSTIC: self tests
    0x2F: 10 * _MINUTES,  # VERIFY(10)
    0x35: 5 * _MINUTES,  # SYNCHRONIZE CACHE(10)
    0x3B: 10 * _MINUTES,  # WRITE BUFFER: firmware
    0x41: 60 * _MINUTES,  # WRITE SAME(10)
    0x42: 5 * _MINUTES,  # UNMAP
    0x48: 12 * _HOURS,  # SANITIZE
    0x83: 60 * _MINUTES,  # EXTENDED COPY
    0x8F: 10 * _MINUTES,  # VERIFY(16)
    0x91: 5 * _MINUTES,  # SYNCHRONIZE CACHE(16)
    0x93: 60 * _MINUTES,  # WRITE SAME(16)
    0xAF: 10 * _MINUTES,  # VERIFY(12)
}
#: Tapes wind, and erase to their end (SSC-5).
_TAPE: dict[int, int] = {
    0x01: 60 * _MINUTES,  # REWIND
    0x04: 12 * _HOURS,  # FORMAT MEDIUM
    0x08: 15 * _MINUTES,  # READ(6): may wait for the tape
    0x0A: 15 * _MINUTES,  # WRITE(6)
    0x10: 15 * _MINUTES,  # WRITE FILEMARKS(6): flushes the buffer
    0x11: 3 * _HOURS,  # SPACE(6)
    0x13: 3 * _HOURS,  # VERIFY(6)
    0x19: 12 * _HOURS,  # ERASE(6)
    0x1B: 60 * _MINUTES,  # LOAD UNLOAD
    0x1D: 3 * _HOURS,  # SEND DIAGNOSTIC
    0x2B: 3 * _HOURS,  # LOCATE(10)
    0x3B: 30 * _MINUTES,  # WRITE BUFFER
    0x80: 15 * _MINUTES,  # WRITE FILEMARKS(16)
    0x88: 15 * _MINUTES,  # READ(16)
    0x8A: 15 * _MINUTES,  # WRITE(16)
    0x91: 3 * _HOURS,  # SPACE(16)
    0x92: 3 * _HOURS,  # LOCATE(16)
    0x93: 12 * _HOURS,  # ERASE(16)
}
#: Changers carry things about, and look at every place (SMC-3).
_CHANGER: dict[int, int] = {
    0x01: 30 * _MINUTES,  # REZERO UNIT
    0x07: 60 * _MINUTES,  # INITIALIZE ELEMENT STATUS
    0x1B: 30 * _MINUTES,  # OPEN/CLOSE IMPORT/EXPORT ELEMENT
    0x1D: 3 * _HOURS,  # SEND DIAGNOSTIC
    0x2B: 10 * _MINUTES,  # POSITION TO ELEMENT
    0x37: 60 * _MINUTES,  # INITIALIZE ELEMENT STATUS WITH RANGE
    0x3B: 30 * _MINUTES,  # WRITE BUFFER
    0xA5: 10 * _MINUTES,  # MOVE MEDIUM
    0xA6: 10 * _MINUTES,  # EXCHANGE MEDIUM
    0xB8: 10 * _MINUTES,  # READ ELEMENT STATUS
}
TAPE, CHANGER = 1, 8


def timeouts(peripheral_type: int | None, usual: float = DEFAULT_TIMEOUT) -> list[int]:
    """Seconds by opcode for a device of this type (SPC-5 table 144); `usual` for what is in no class."""
    classes: Mapping[int, int] = {TAPE: _TAPE, CHANGER: _CHANGER}.get(peripheral_type or 0, _TIMEOUTS)
    return [max(int(usual), classes.get(opcode, 0)) for opcode in range(256)]


def cdb_of(padded: bytes) -> bytes:
    """The CDB that begins so, without what a guest's request or a frame has behind it (as sg_cdb_length() in C)."""
    group = padded[0] >> 5
    length = (6, 10, 10, 16, 16, 12, 16, 16)[group]
    if padded[0] == 0x7F:
        length = min(max(8 + (padded[7] if len(padded) > 7 else 0), 12), 32)
    return padded[:length].ljust(length, b"\0")


class Credits:
    """Commands that the workers may have with the kernel at a time, of a host or of a unit; see native/hba.h.

    A unit's outlives its routes: what the kernel has not given back counts whatever has become of them.
    """

    def __init__(self, limit: int) -> None:
        made = FFI.new("struct vfc_credits **")
        _check(LIB.vfc_credits_new(limit, made), "counting commands")
        self._pointer: Any = FFI.gc(made[0], LIB.vfc_credits_put)
        self.limit = limit

    @property
    def pointer(self) -> Any:
        return self._pointer

    def set(self, limit: int) -> None:
        """Commands at a time from now on."""
        LIB.vfc_credits_set(self._pointer, limit)
        self.limit = limit

    @property
    def used(self) -> int:
        """Commands of the workers that the kernel has, those included that were answered without it."""
        return int(LIB.vfc_credits_used(self._pointer))

    @property
    def stale(self) -> int:
        """Of these, those that were answered without it and may still change what is on the medium; and such of
        others (spoil())."""
        return int(LIB.vfc_credits_stale(self._pointer))

    def spoil(self, by: int) -> None:
        """So many more, or fewer, stale ones that others than the workers have sent."""
        LIB.vfc_credits_spoil(self._pointer, by)


class SgMedium(Medium):
    """A medium whose commands go as they are.

    fds: of one unit, `share` for each worker; port_state: its remote port's in sysfs, or -1; borrowed.  own: the
    credits of this unit, the same for all its media.
    """

    def __init__(
        self,
        fds: Sequence[int],
        *,
        share: int,
        max_transfer: int,
        grace: float,
        own: Credits,
        host: Credits,
        timeouts: Sequence[int],
        port_state: int = -1,
    ) -> None:
        setup = FFI.new("struct vfc_sg_setup *")
        numbers = FFI.new("int32_t[]", list(fds))
        setup.fds, setup.count, setup.share = numbers, len(fds), share
        setup.max_transfer, setup.grace_ms, setup.port_state_fd = max_transfer, int(grace * 1000), port_state
        setup.own, setup.host = own.pointer, host.pointer
        setup.timeouts = [min(seconds, 0xFFFF) for seconds in timeouts]
        made = FFI.new("struct vfc_medium **")
        _check(LIB.vfc_sg_medium_new(setup, made), "opening a unit for the workers")
        self._pointer = made[0]
        self.blocks, self.block_size = 0, 0


@dataclass(frozen=True, slots=True)
class SgOutcome:
    """How a command ended: struct sg_io_hdr's words.  residual: bytes that were not moved."""

    status: int
    host_status: int
    driver_status: int
    sense: bytes
    data_in: bytes
    residual: int


class SgGone(OSError):
    """The device is not there any more."""


class Call:
    """A command with the kernel.  ended: what to do when it has given the command back, or forgotten it."""

    def __init__(self, pointer: Any, ended: Callable[[], None]) -> None:
        self.pointer = pointer
        self.outcome: SgOutcome | None = None
        self.over = trio.Event()
        self._ended = ended

    def end(self, outcome: SgOutcome | None) -> None:
        """The kernel does not have it any more."""
        LIB.vfc_sg_call_free(self.pointer)
        self.outcome = outcome
        self.over.set()
        self._ended()

    async def wait(self) -> SgOutcome:
        """How it ended.  Raises SgGone when that will not be known."""
        await self.over.wait()
        if self.outcome is None:
            raise SgGone(errno.ENODEV, "the unit is gone")
        return self.outcome


class SgFile:
    """One open file of a unit.  serve() is a task that reads what has ended, as long as there is something to read.

    close() tells who waits SgGone; the file itself goes when the kernel has given back what it has, so that
    `in_flight` is true until then.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._calls: dict[int, Call] = {}
        self.closed = False

    @property
    def in_flight(self) -> int:
        """Commands that the kernel has, those included that nobody waits for any more."""
        return len(self._calls)

    def close(self) -> None:
        """Nothing more is sent here."""
        self.closed = True
        for call in self._calls.values():
            call.over.set()
        if not self._calls:
            self._release()

    def _release(self) -> None:
        self.closed = True
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            trio.lowlevel.notify_closing(fd)
            os.close(fd)
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.end(None)

    async def serve(self) -> None:
        """Read until the file is closed and nothing is under way, or the device is gone."""
        made = FFI.new("struct vfc_sg_call **")
        try:
            while self._fd >= 0:
                await trio.lowlevel.wait_readable(self._fd)
                while (result := LIB.vfc_sg_collect(self._fd, made)) == 1:
                    call = self._calls.pop(int(FFI.cast("uintptr_t", made[0])))
                    call.end(_outcome(made[0]))
                if result < 0 or (self.closed and not self._calls):
                    return
        except trio.ClosedResourceError:
            pass
        finally:
            self._release()

    def submit(
        self, cdb: bytes, *, data_out: bytes = b"", data_in: int = 0, timeout: float, ended: Callable[[], None]
    ) -> Call:
        """Give the kernel a command, at once: whoever asks whether it may still go does so right before this.

        timeout: seconds, then the kernel aborts it.  Raises SgGone, or OSError as write(2); ended is not called then.
        """
        if self.closed:
            raise SgGone(errno.ENODEV, "the unit is gone")
        command = FFI.new("struct vfc_sg_command *")
        cdb_bytes, out_bytes = FFI.from_buffer("uint8_t[]", cdb), FFI.from_buffer("uint8_t[]", data_out)
        command.cdb, command.cdb_length = cdb_bytes, len(cdb)
        command.data_out, command.out_length, command.in_length = out_bytes, len(data_out), data_in
        command.timeout_ms = int(timeout * 1000)
        made = FFI.new("struct vfc_sg_call **")
        result = LIB.vfc_sg_submit(self._fd, command, made)
        if result in {-errno.ENODEV, -errno.ENXIO, -errno.EPIPE}:
            raise SgGone(errno.ENODEV, "the unit is gone")
        _check(result, "a command for a unit")
        call = self._calls[int(FFI.cast("uintptr_t", made[0]))] = Call(made[0], ended)
        return call


def _outcome(pointer: Any) -> SgOutcome:
    told = FFI.new("struct vfc_sg_outcome *")
    LIB.vfc_sg_outcome(pointer, told)
    return SgOutcome(
        status=told.status,
        host_status=told.host_status,
        driver_status=told.driver_status,
        sense=bytes(FFI.buffer(told.sense, told.sense_length)),
        data_in=bytes(FFI.buffer(told.data_in, told.in_length)),
        residual=told.residual,
    )


def _check(result: int, doing: str) -> None:
    if result < 0:
        raise OSError(-result, f"{doing}: {os.strerror(-result)}")
