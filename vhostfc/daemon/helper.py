"""`vhostfc helper`: the privileged steps of adapters on an HBA, and nothing else.

The process that faces a guest has CAP_SYS_RAWIO and no other right.  Making and deleting vports, their settings, scans
and device resets are root's; this process does them, one JSON object a line each way, for the adapter that the first
line names:

    {"adapter": "vm1"}                                                                 {"ok": true}
    {"write": "class/fc_host/host5/vport_create", "data": "50014380...:50014380..."}   {"ok": true, "count": 33}
    {"reset": "7:0:0:1", "level": 257}                                                 {"ok": true}
    {"watch": true}                                                                    {"ok": true} and then hints
                                                                        {"ok": false, "errno": 22, "error": "..."}

What may be written, and whose it must be: permits.py.  Who may ask is the owner of the socket's group, and root.

One adapter does not stand in another's way: each has a share of requests at a time, resets apart from the others since
they may take a minute; a unit is reset by one at a time; and whatever becomes of one client ends that client.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from stat import S_ISVTX
from typing import Any

import structlog
import trio

from vhostfc.daemon.permits import Adapter, Refused, adapter_of, check_reset, check_write, unit_of
from vhostfc.errors import VhostfcError
from vhostfc.fc.wwn import Wwn
from vhostfc.ports.fcevents import FcEvent
from vhostfc.ports.kernel import Kernel
from vhostfc.ports.ownfiles import OwnFiles
from vhostfc.ports.sysfs import Vport

MAX_LINE = 4096
#: A request that nobody finishes does not keep us.
PATIENCE = 30.0
#: What one adapter may have at a time: connections, and of what they ask for, writes and resets that are being done.
CONNECTIONS, WRITES, RESETS = 24, 4, 2
#: The vports that were made here, a name a line.
NOTE = "made"
#: Seconds after which a connection is accepted again when there were no descriptors left.
BREATH = 0.2


@dataclass(eq=False)
class Share:
    """What an adapter has under way.  An adapter is a unit of systemd's, or a process that is in none."""

    connections: int = 0
    writes: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(WRITES))
    resets: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(RESETS))


@dataclass(eq=False)
class Client:
    """One connection.  unit: the instance of vhostfc@.service that it comes from; adapter: the name that it gave."""

    unit: str | None
    share: Share
    adapter: str | None = None


class Helper:
    """See the head of the file.  etc: where adapters' files are; notes: a directory of our own, kept until the host
    boots, as vports are."""

    def __init__(self, kernel: Kernel, etc: Path, notes: Path, *, log: structlog.typing.FilteringBoundLogger) -> None:
        self._kernel = kernel
        self._etc = etc
        self._log = log
        self._shares: dict[str, Share] = {}
        self._resetting: dict[str, trio.Lock] = {}
        self._notes = OwnFiles(notes)
        self._made = self._noted()

    # ------------------------------------------------------------ what is asked

    def name(self, client: Client, request: dict[str, Any]) -> dict[str, Any]:
        """Who asks.  What a unit of systemd's says of itself is checked."""
        adapter = adapter_of(self._etc, request["adapter"])
        if client.unit not in {None, adapter.name}:
            raise Refused(f"vhostfc@{client.unit}.service is not the adapter {adapter.name}")
        client.adapter = adapter.name
        return {}

    def _adapter(self, client: Client) -> Adapter:
        if client.adapter is None:
            raise Refused("expected the adapter's name first")
        return adapter_of(self._etc, client.adapter)  # its file may have changed

    async def write(self, client: Client, request: dict[str, Any]) -> dict[str, Any]:
        relative, data = str(request["write"]), str(request.get("data", ""))
        async with client.share.writes:
            sysfs, adapter = self._kernel.sysfs, self._adapter(client)
            path = check_write(sysfs, adapter, relative, data, self._was_made)
            self._log.info("write", adapter=adapter.name, file=relative, data=data)
            count = await self._kernel.write(path, data.encode())
            if path.name == "vport_create":
                self._note_made(path.parent.name, data)
        return {"count": count}

    # Some drivers' vports cannot be named, and what has no name may be anybody's.  So those that were made here are
    # known by the kernel's own names, which it gives once.

    def _was_made(self, vport: Vport) -> bool:
        return vport.name in self._made

    def _noted(self) -> set[str]:
        try:
            return set(self._notes.read(NOTE).split())
        except OSError:
            return set()

    def _note_made(self, host: str, names: str) -> None:
        there = list(self._kernel.sysfs.vports())
        self._made &= {vport.name for vport in there}
        made = (host, *(Wwn(int(part, 16)) for part in names.split(":")))
        self._made |= {vport.name for vport in there if (vport.parent, vport.wwpn, vport.wwnn) == made}
        try:
            self._notes.write(NOTE, "\n".join(sorted(self._made)))
        except OSError as error:
            self._log.warning("cannot note a vport", path=error.filename, reason=error.strerror)

    async def reset(self, client: Client, request: dict[str, Any]) -> dict[str, Any]:
        hctl, level = str(request["reset"]), request.get("level")
        check_reset(self._kernel.sysfs, self._adapter(client), hctl, level)
        async with client.share.resets, self._alone(hctl):
            adapter = self._adapter(client)  # again: it has waited
            check_reset(self._kernel.sysfs, adapter, hctl, level)
            lun = self._kernel.sysfs.lun(hctl)
            if lun is None or not isinstance(level, int):
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            self._log.info("reset", adapter=adapter.name, unit=hctl, level=level)
            await self._kernel.reset(lun, level)
        return {}

    @asynccontextmanager
    async def _alone(self, hctl: str) -> AsyncIterator[None]:
        lock = self._resetting.setdefault(hctl, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and self._resetting.get(hctl) is lock:
                del self._resetting[hctl]

    async def answer(self, client: Client, line: bytes) -> dict[str, Any]:
        """The answer to one request; a refusal is one, too."""
        try:
            request = json.loads(line)
            if isinstance(request, dict) and "adapter" in request:
                return {"ok": True, **self.name(client, request)}
            for name, handler in (("write", self.write), ("reset", self.reset)):
                if isinstance(request, dict) and name in request:
                    todo: Callable[[Client, dict[str, Any]], Awaitable[dict[str, Any]]] = handler
                    return {"ok": True, **await todo(client, request)}
            raise Refused("expected adapter, write, reset or watch")
        except OSError as error:
            return {"ok": False, "errno": error.errno or errno.EIO, "error": error.strerror or str(error)}
        except (Refused, ValueError, RecursionError) as error:
            self._log.warning("refused", adapter=client.adapter or client.unit, reason=str(error))
            return {"ok": False, "errno": errno.EPERM, "error": str(error)}

    # ------------------------------------------------------------ serving

    async def serve_client(self, sock: trio.socket.SocketType, unit: str | None, pid: int) -> None:
        """Requests of one connection; after {"watch": true} only hints.  Whatever happens is this client's end only."""
        key = f"pid {pid}" if unit is None else unit
        share = self._shares.setdefault(key, Share())
        share.connections += 1
        try:
            async with trio.SocketStream(sock) as stream:
                if share.connections > CONNECTIONS:
                    self._log.warning("too many connections of one adapter", adapter=key)
                    busy = {"ok": False, "errno": errno.EBUSY, "error": "the helper is busy with this adapter"}
                    with trio.move_on_after(PATIENCE):
                        await stream.send_all(json.dumps(busy).encode() + b"\n")
                else:
                    await self._requests(stream, Client(unit, share))
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # it has gone, with something unread, or does not read
        except* Exception:
            self._log.exception("a client was given up", adapter=key)
        finally:
            share.connections -= 1
            if not share.connections:
                self._shares.pop(key, None)

    async def _requests(self, stream: trio.SocketStream, client: Client) -> None:
        buffer = bytearray()
        while True:
            with trio.move_on_after(PATIENCE):
                while b"\n" not in buffer and len(buffer) <= MAX_LINE:
                    chunk = await stream.receive_some(MAX_LINE)
                    if not chunk:
                        return
                    buffer += chunk
            end = buffer.find(b"\n")
            if end < 0:
                return
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            if line.replace(b" ", b"") == b'{"watch":true}':
                await self._watch(stream)
                return
            answer = json.dumps(await self.answer(client, line)).encode() + b"\n"
            with trio.fail_after(PATIENCE):
                await stream.send_all(answer)
            if client.adapter is None:  # what else it has to say is of no use
                return

    async def _watch(self, stream: trio.SocketStream) -> None:
        await stream.send_all(b'{"ok": true}\n')
        async with self._kernel.hints() as hints, trio.open_nursery() as nursery:
            nursery.start_soon(self._until_left, stream, nursery.cancel_scope)
            async for hint in hints:
                if isinstance(hint, FcEvent):
                    told: dict[str, Any] = {"fc": {**asdict(hint), "data": hint.data.hex()}}
                elif hint.subsystem in {"scsi", "scsi_generic", "fc_vports", "fc_remote_ports", "fc_host", ""}:
                    told = {"uevent": {"action": hint.action, "devpath": hint.devpath, "subsystem": hint.subsystem}}
                    told["uevent"]["ua"] = hint.properties.get("SDEV_UA", "")
                else:
                    continue
                await stream.send_all(json.dumps(told).encode() + b"\n")

    @staticmethod
    async def _until_left(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        while await stream.receive_some(256):
            pass
        scope.cancel()


def peer_of(sock: trio.socket.SocketType) -> tuple[int, int]:
    """The process at the other end, and its user (SO_PEERCRED)."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


async def run_helper(
    listener: trio.socket.SocketType,
    kernel: Kernel,
    *,
    etc: Path,
    notes: Path,
    users: set[int],
    log: structlog.typing.FilteringBoundLogger,
    proc: Path = Path("/proc"),
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; takes the listener.  users: who may ask, by number, besides root."""
    helper = Helper(kernel, etc, notes, log=log)
    users = users | {0}
    with listener:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                try:
                    sock, _ = await listener.accept()
                except OSError as error:  # no descriptors left, most likely: those who are served finish
                    log.error("cannot take a connection", reason=error.strerror)
                    await trio.sleep(BREATH)
                    continue
                pid, uid = peer_of(sock)
                if uid in users:
                    nursery.start_soon(helper.serve_client, sock, unit_of(proc, pid), pid)
                else:
                    log.warning("somebody else asked", user=uid)
                    sock.close()


def listening_socket(path: Path, group: int | None) -> trio.socket.SocketType:
    """Where the helper listens when nobody passes it a socket.  VhostfcError when it cannot be made, or where somebody
    else could put something else in its place: what we change by its path must be what we have made."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        directory = path.parent.stat()
        if directory.st_uid not in {0, os.geteuid()} or (directory.st_mode & 0o022 and not directory.st_mode & S_ISVTX):
            raise VhostfcError(f"{path}: others may write to its directory; the helper listens in one of its own")
        path.unlink(missing_ok=True)
        os.fchmod(sock.fileno(), 0o600)  # bind() gives it to the file
        sock.bind(str(path))
        os.chown(path, -1, -1 if group is None else group, follow_symlinks=False)
        os.chmod(path, 0o660)
        sock.listen()
    except OSError as error:
        sock.close()
        raise VhostfcError(f"{path}: {error.strerror}") from error
    except VhostfcError:
        sock.close()
        raise
    return trio.socket.from_stdlib_socket(sock)
