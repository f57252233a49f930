"""The kernel by way of `vhostfc helper` (helper.py): for an adapter that is not root.

Units are opened here: the SCSI generic driver takes commands only from the process that opened the file.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from vhostfc.errors import VhostfcError
from vhostfc.ports.fcevents import FcEvent, Hint, Uevent
from vhostfc.ports.kernel import open_units
from vhostfc.ports.sysfs import Lun, Sysfs

_MAX_LINE = 1 << 16
#: The longest that a write takes, seconds: a driver may wait for its firmware.
MAKING = 120.0
_UDEV_LOOKS, _UDEV_PAUSE = 20, 0.1


class HelpedKernel:
    """A Kernel of ports/kernel.py.  socket: the helper's; adapter: the name of ours, by its file under /etc/vhostfc."""

    def __init__(self, socket: Path, adapter: str, sys: Path = Path("/sys"), dev: Path = Path("/dev")) -> None:
        self._socket = socket
        self._adapter = adapter
        # What more we ask for at a time waits here: there it would be refused.  A guest may ask for many resets.
        self._writes, self._resets = trio.CapacityLimiter(8), trio.CapacityLimiter(4)
        self._sysfs = Sysfs(sys)
        self._dev = dev

    @property
    def sysfs(self) -> Sysfs:
        return self._sysfs

    async def write(self, path: Path, data: bytes) -> int:
        """A vport that is being made is waited for, whoever is cancelled meanwhile: it would come without an owner."""
        relative = str(path.relative_to(self._sysfs.root))
        with trio.move_on_after(MAKING) as scope:
            scope.shield = path.name == "vport_create"
            async with self._writes:
                answer = await self._ask({"write": relative, "data": data.decode()}, str(path))
            return int(answer.get("count", 0))
        raise OSError(errno.ETIMEDOUT, f"{self._socket}: the helper does not answer", str(path))

    async def open_units(self, lun: Lun, count: int) -> tuple[list[int], int]:
        """A node that has just come is root's until udev has looked at it: wait a little."""
        for _ in range(_UDEV_LOOKS):
            try:
                return await trio.to_thread.run_sync(open_units, self._dev, lun, count)
            except (PermissionError, FileNotFoundError):
                await trio.sleep(_UDEV_PAUSE)
        return await trio.to_thread.run_sync(open_units, self._dev, lun, count)

    async def reset(self, lun: Lun, level: int) -> None:
        async with self._resets:
            await self._ask({"reset": lun.hctl, "level": level}, lun.hctl)

    @asynccontextmanager
    async def hints(self) -> AsyncIterator[trio.MemoryReceiveChannel[Hint]]:
        """As the helper passes them on; while it is away there are none, and sysfs is looked at every second."""
        send, receive = trio.open_memory_channel[Hint](256)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, send)
            yield receive
            nursery.cancel_scope.cancel()

    async def _connect(self) -> trio.SocketStream:
        try:
            return await trio.open_unix_socket(str(self._socket))
        except OSError as error:
            raise VhostfcError(
                f"{self._socket}: {error.strerror}; is vhostfc-helper.socket active, and is this user in its group?"
            ) from error

    async def _ask(self, request: dict[str, Any], what: str) -> dict[str, Any]:
        """Raises OSError as the kernel gave it to the helper, or when the helper cannot be reached."""
        both = ({"adapter": self._adapter}, request)
        try:
            async with await self._connect() as stream, aclosing(_lines(stream)) as lines:
                await stream.send_all(b"".join(json.dumps(one).encode() + b"\n" for one in both))
                named = False
                async for line in lines:
                    answer: dict[str, Any] = json.loads(line)
                    if answer.get("ok"):
                        if named:
                            return answer
                        named = True
                        continue
                    number = int(answer.get("errno", errno.EIO))
                    raise OSError(number, str(answer.get("error") or os.strerror(number)), what)
        except (VhostfcError, trio.BrokenResourceError, ValueError) as error:
            raise OSError(errno.ECONNREFUSED, str(error), what) from error
        raise OSError(errno.ECONNRESET, f"{self._socket}: the helper left in the middle of a request", what)

    async def _watch(self, send: trio.MemorySendChannel[Hint]) -> None:
        while True:
            try:
                async with await self._connect() as stream, aclosing(_lines(stream)) as lines:
                    await stream.send_all(b'{"watch": true}\n')
                    async for line in lines:
                        hint = _hint(json.loads(line))
                        if hint is not None:
                            await send.send(hint)
            except (VhostfcError, trio.BrokenResourceError, ValueError):
                pass
            await trio.sleep(1)


async def _lines(stream: trio.SocketStream) -> AsyncGenerator[bytes, None]:
    buffer = bytearray()
    while True:
        while (end := buffer.find(b"\n")) >= 0:
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            yield line
        try:
            chunk = await stream.receive_some(_MAX_LINE)
        except trio.BrokenResourceError:
            return
        if not chunk or len(buffer) > _MAX_LINE:
            return
        buffer += chunk


def _hint(told: dict[str, Any]) -> Hint | None:
    if "fc" in told:
        event = told["fc"]
        return FcEvent(event["host"], event["code"], event["number"], bytes.fromhex(event["data"]))
    if "uevent" in told:
        event = told["uevent"]
        return Uevent(event["action"], event["devpath"], event["subsystem"], {"SDEV_UA": event["ua"]})
    return None
