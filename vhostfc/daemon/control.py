"""The control socket: how `status`, `rescan` and `reload` reach a running daemon.

One JSON object a line, both ways: {"command": NAME, ...arguments} is answered by {"ok": true, ...}
or {"ok": false, "error": "one line for an administrator"}.  Any number of requests a connection,
answered in order.  Whoever may open the socket may steer the daemon: it is made with mode 0600.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
import trio

from vhostfc.daemon.fdsocket import connect, listen
from vhostfc.errors import VhostfcError

MAX_LINE = 64 * 1024
Json = dict[str, Any]
Handler = Callable[[Json], Awaitable[Json]]


class _Lines:
    """The lines of a stream."""

    def __init__(self, stream: trio.abc.ReceiveStream, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._buffer = bytearray()

    async def next(self) -> bytes | None:
        """A line without its end, or None at the end of the stream; ValueError when it is too long."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > self._limit:
                raise ValueError(f"a line of more than {self._limit} bytes")
            chunk = await self._stream.receive_some(65536)
            if not chunk:
                return None
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


async def _answer(handlers: Mapping[str, Handler], line: bytes) -> Json:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {"ok": False, "error": f"not JSON: {error}"}
    if not isinstance(request, dict):
        return {"ok": False, "error": "expected a JSON object"}
    handler = handlers.get(str(request.get("command")))
    if handler is None:
        known = ", ".join(sorted(handlers))
        return {"ok": False, "error": f"unknown command {request.get('command')!r}; known: {known}"}
    try:
        return {"ok": True, **await handler(request)}
    except VhostfcError as error:
        return {"ok": False, "error": str(error)}


async def _serve_client(sock: trio.socket.SocketType, handlers: Mapping[str, Handler]) -> None:
    stream = trio.SocketStream(sock)
    async with stream:
        try:
            lines = _Lines(stream, MAX_LINE)
            while (line := await lines.next()) is not None:
                answer = await _answer(handlers, line)
                await stream.send_all(json.dumps(answer).encode() + b"\n")
        except ValueError as error:
            await stream.send_all(json.dumps({"ok": False, "error": str(error)}).encode() + b"\n")


async def serve_control(
    path: Path,
    handlers: Mapping[str, Handler],
    *,
    log: structlog.typing.FilteringBoundLogger,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests on a socket at `path` until cancelled; a handler's VhostfcError is an answer.

    Raises VhostfcError when the socket cannot be made (it is somebody's, no such directory, ...).
    """

    async def client(sock: trio.socket.SocketType) -> None:
        try:
            await _serve_client(sock, handlers)
        except trio.BrokenResourceError:
            log.debug("control client left in the middle of an answer")

    with listen(path, mode=0o600) as listener:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                nursery.start_soon(client, await listener.accept())


async def call(path: Path, command: str, arguments: Json | None = None, *, timeout: float = 60.0) -> Json:
    """Ask the daemon behind `path`; returns its answer without "ok".

    Raises VhostfcError when nobody answers there, in time, or when the answer is an error.
    """
    try:
        with trio.fail_after(timeout):
            async with trio.SocketStream(await connect(path)) as stream:
                await stream.send_all(json.dumps({"command": command, **(arguments or {})}).encode() + b"\n")
                line = await _Lines(stream, 1 << 30).next()
    except trio.TooSlowError:
        raise VhostfcError(f"{path}: no answer in {timeout:g} s") from None
    except (ValueError, trio.BrokenResourceError) as error:
        raise VhostfcError(f"{path}: {error}; is it a vhostfc daemon?") from None
    if line is None:
        raise VhostfcError(f"{path}: the daemon closed the connection")
    answer = json.loads(line)
    if not answer.pop("ok", False):
        raise VhostfcError(f"{path}: {answer.get('error', 'no reason given')}")
    return dict(answer)
