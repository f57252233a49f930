"""`vhostfc helper`: the privileged steps of adapters on an HBA, and nothing else.

The process that faces a guest has CAP_SYS_RAWIO and no other right.  Making and deleting vports, their settings, scans
and device resets are root's; this process does them, one JSON object a line each way:

    {"write": "class/fc_host/host5/vport_create", "data": "50014380...:50014380..."}   {"ok": true, "count": 33}
    {"reset": "7:0:0:1", "level": 257}                                                 {"ok": true}
    {"watch": true}                                                                    {"ok": true} and then hints
                                                                        {"ok": false, "errno": 22, "error": "..."}

What may be written is a short list: vports with names that an adapter's file has, and settings of what stands below a
vport.  Who may ask is the owner of the socket's group, and root.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import struct
import tomllib
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from stat import S_ISVTX
from typing import Any

import structlog
import trio

from vhostfc.errors import VhostfcError
from vhostfc.fc.wwn import Wwn, WwnError
from vhostfc.ports.fcevents import FcEvent
from vhostfc.ports.kernel import (
    SG_SCSI_RESET_DEVICE,
    SG_SCSI_RESET_NO_ESCALATE,
    SG_SCSI_RESET_TARGET,
    Kernel,
)

MAX_LINE = 4096
LEVELS = tuple(level | SG_SCSI_RESET_NO_ESCALATE for level in (SG_SCSI_RESET_DEVICE, SG_SCSI_RESET_TARGET))
#: A request that nobody finishes does not keep us.
PATIENCE = 30.0

_NAMES = r"[0-9a-f]{16}:[0-9a-f]{16}"
#: Files that make or delete vports, and files below a vport, each with what may be written there.
_MAKING = re.compile(r"class/(fc_host|scsi_host)/host\d+/vport_(create|delete)")
_BELOW: tuple[tuple[str, str], ...] = (
    (r"class/fc_vports/vport-[\d:-]+/symbolic_name", r"vhostfc [ -~]{0,55}"),
    (r"class/fc_vports/vport-[\d:-]+/vport_disable", r"[01]"),
    (r"class/fc_remote_ports/rport-[\d:-]+/dev_loss_tmo", r"\d{1,6}"),
    (r"class/fc_remote_ports/rport-[\d:-]+/fast_io_fail_tmo", r"\d{1,4}|off"),
    (r"class/scsi_host/host\d+/scan", r"[-0] (-|\d{1,5}) (-|\d{1,10})"),
    (r"class/scsi_device/\d+:\d+:\d+:\d+/device/(delete|rescan)", r"1"),
)


class Refused(Exception):
    """It is none of the things that are done here."""


class Helper:
    """See the head of the file.  etc: where adapters' files are."""

    def __init__(self, kernel: Kernel, etc: Path, *, log: structlog.typing.FilteringBoundLogger) -> None:
        self._kernel = kernel
        self._etc = etc
        self._log = log
        self._made: set[str] = set()

    # ------------------------------------------------------------ what is allowed

    def known(self) -> set[Wwn]:
        """The WWPNs of all adapters that have a file; a file that is wrong has none."""
        names: set[Wwn] = set()
        for path in self._etc.glob("*.toml"):
            try:
                ports = tomllib.loads(path.read_text()).get("port", [])
                names |= {Wwn.parse(port["wwpn"]) for port in ports}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, WwnError):
                continue
        return names

    def allow(self, relative: str, data: str) -> Path:
        """The file to be written.  Raises Refused."""
        root = self._kernel.sysfs.root
        if _MAKING.fullmatch(relative):
            if not re.fullmatch(_NAMES, data):
                raise Refused("expected the two names of a vport, as 16 digits each")
            wwpn = Wwn(int(data[:16], 16))
            if wwpn not in self.known():
                raise Refused(f"{wwpn} is in no adapter's file under {self._etc}")
            if relative.endswith("vport_delete"):
                self._may_go(relative.split("/")[2], data)
            return root / relative
        for pattern, values in _BELOW:
            if re.fullmatch(pattern, relative):
                if not re.fullmatch(values, data):
                    raise Refused(f"not a value for {relative}")
                self._below_a_vport(root / relative)
                return root / relative
        raise Refused(f"{relative} is not written here")

    def _may_go(self, host: str, names: str) -> None:
        """Somebody else's vport may have the names of an adapter: only what an adapter has made is deleted."""
        for vport in self._kernel.sysfs.vports():
            if vport.parent != host or names != f"{vport.wwpn.pack().hex()}:{vport.wwnn.pack().hex()}":
                continue
            if not vport.symbolic_name.startswith("vhostfc ") and vport.name not in self._made:
                owner = repr(vport.symbolic_name) if vport.symbolic_name else "without a name"
                raise Refused(f"{vport.name} on {host} ({owner}) was made by no adapter")

    def _below_a_vport(self, path: Path) -> None:
        """It belongs to a vport of a known adapter: the path shows whose child it is."""
        match = re.search(r"/(vport-[\d:-]+)(/|$)", os.path.realpath(path))
        vport = self._kernel.sysfs.vport(match[1]) if match else None
        if vport is None or vport.wwpn not in self.known():
            raise Refused(f"{path} belongs to no vport of an adapter")

    # ------------------------------------------------------------ serving

    async def write(self, request: dict[str, Any]) -> dict[str, Any]:
        relative, data = str(request["write"]), str(request.get("data", ""))
        path = self.allow(relative, data)
        self._log.info("write", file=relative, data=data)
        count = await self._kernel.write(path, data.encode())
        if relative.endswith("vport_create"):  # some drivers' vports cannot be named
            vport = self._kernel.sysfs.vport_of(Wwn(int(data[:16], 16)))
            self._made |= {vport.name} if vport is not None else set()
        return {"count": count}

    async def reset(self, request: dict[str, Any]) -> dict[str, Any]:
        hctl, level = str(request["reset"]), request.get("level")
        if not re.fullmatch(r"\d+:\d+:\d+:\d+", hctl) or level not in LEVELS:
            raise Refused("not a reset that is done here")
        self._below_a_vport(self._kernel.sysfs.of_class("scsi_device") / hctl)
        lun = self._kernel.sysfs.lun(hctl)
        if lun is None:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        self._log.info("reset", unit=hctl, level=level)
        await self._kernel.reset(lun, level)
        return {}

    async def answer(self, line: bytes) -> dict[str, Any]:
        """The answer to one request; a refusal is one, too."""
        try:
            request = json.loads(line)
            for name, handler in (("write", self.write), ("reset", self.reset)):
                if isinstance(request, dict) and name in request:
                    todo: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]] = handler
                    return {"ok": True, **await todo(request)}
            raise Refused("expected write, reset or watch")
        except OSError as error:
            return {"ok": False, "errno": error.errno or errno.EIO, "error": error.strerror or str(error)}
        except (Refused, ValueError, RecursionError) as error:
            self._log.warning("refused", reason=str(error))
            return {"ok": False, "errno": errno.EPERM, "error": str(error)}

    async def serve_client(self, sock: trio.socket.SocketType) -> None:
        """Requests of one connection; after {"watch": true} only hints."""
        stream = trio.SocketStream(sock)
        async with stream:
            try:
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
                    await stream.send_all(json.dumps(await self.answer(line)).encode() + b"\n")
            except trio.BrokenResourceError:
                pass

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


def may_ask(sock: trio.socket.SocketType, allowed: set[int]) -> bool:
    """Is the peer one of these users (SO_PEERCRED)?"""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in allowed


async def run_helper(
    listener: trio.socket.SocketType,
    kernel: Kernel,
    *,
    etc: Path,
    users: set[int],
    log: structlog.typing.FilteringBoundLogger,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; takes the listener.  users: who may ask, by number, besides root."""
    helper = Helper(kernel, etc, log=log)
    with listener:
        await _accept(helper, listener, users | {0}, log, task_status)


async def _accept(
    helper: Helper,
    listener: trio.socket.SocketType,
    users: set[int],
    log: structlog.typing.FilteringBoundLogger,
    task_status: trio.TaskStatus[None],
) -> None:
    async with trio.open_nursery() as nursery:
        task_status.started()
        while True:
            sock, _ = await listener.accept()
            if may_ask(sock, users):
                nursery.start_soon(helper.serve_client, sock)
            else:
                log.warning("somebody else asked")
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
