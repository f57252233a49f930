"""The control socket: how orders (`status`, `reload`, `fault`, ...) reach a running daemon.

One JSON object a line, both ways: {"command": NAME, ...arguments} is answered by {"ok": true, ...}
or {"ok": false, "error": "one line for an administrator"}.  Any number of requests a connection,
answered in order.  Some orders are answered by a stream: after {"ok": true} come objects until there
are no more, or until the one who asked hangs up; nothing else is answered on that connection.

Whoever may open the socket may steer the daemon: it is made with mode 0600.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import trio

from vhostfc.daemon.fdsocket import connect, listen
from vhostfc.errors import VhostfcError

MAX_LINE = 64 * 1024
Json = dict[str, Any]
#: How a stream sends one object.
Send = Callable[[Json], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer that goes on: run() sends until there is no more, or is cancelled."""

    run: Callable[[Send], Awaitable[None]]


Handler = Callable[[Json], Awaitable["Json | Stream"]]


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


async def _answer(handlers: Mapping[str, Handler], line: bytes) -> Json | Stream:
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
        answer = await handler(request)
        return answer if isinstance(answer, Stream) else {"ok": True, **answer}
    except VhostfcError as error:
        return {"ok": False, "error": str(error)}


async def _serve_client(sock: trio.socket.SocketType, handlers: Mapping[str, Handler]) -> None:
    stream = trio.SocketStream(sock)
    async with stream:
        try:
            lines = _Lines(stream, MAX_LINE)
            while (line := await lines.next()) is not None:
                answer = await _answer(handlers, line)
                if isinstance(answer, Stream):
                    await _stream(stream, answer)
                    return
                await stream.send_all(json.dumps(answer).encode() + b"\n")
        except ValueError as error:
            await stream.send_all(json.dumps({"ok": False, "error": str(error)}).encode() + b"\n")


async def _stream(connection: trio.SocketStream, stream: Stream) -> None:
    async with trio.open_nursery() as nursery:

        async def send(value: Json) -> None:
            try:
                await connection.send_all(json.dumps(value).encode() + b"\n")
            except trio.BrokenResourceError:  # it has hung up in the middle of what we had for it
                nursery.cancel_scope.cancel()
                await trio.lowlevel.checkpoint()

        async def hung_up() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                while await connection.receive_some(4096):
                    pass
            nursery.cancel_scope.cancel()

        await send({"ok": True})
        nursery.start_soon(hung_up)
        await stream.run(send)
        nursery.cancel_scope.cancel()


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


class _Objects:
    """What comes on a stream."""

    def __init__(self, path: Path, lines: _Lines) -> None:
        self._path = path
        self._lines = lines

    def __aiter__(self) -> AsyncIterator[Json]:
        return self

    async def __anext__(self) -> Json:
        try:
            line = await self._lines.next()
            if line is None:
                raise StopAsyncIteration
            return dict(json.loads(line))
        except (ValueError, trio.BrokenResourceError) as error:
            raise VhostfcError(f"{self._path}: {error}") from None


@asynccontextmanager
async def follow(path: Path, command: str, arguments: Json | None = None) -> AsyncIterator[AsyncIterator[Json]]:
    """Ask for a stream; what comes is iterated over, and the end of the block hangs up.

    Raises VhostfcError when nobody answers there, or when the answer is an error.
    """
    async with trio.SocketStream(await connect(path)) as stream:
        lines = _Lines(stream, 1 << 30)
        try:
            await stream.send_all(json.dumps({"command": command, **(arguments or {})}).encode() + b"\n")
            first = await lines.next()
        except (ValueError, trio.BrokenResourceError) as error:
            raise VhostfcError(f"{path}: {error}; is it a vhostfc daemon?") from None
        answer = json.loads(first) if first is not None else {"error": "the daemon closed the connection"}
        if not answer.get("ok"):
            raise VhostfcError(f"{path}: {answer.get('error', 'no reason given')}")
        yield _Objects(path, lines)
