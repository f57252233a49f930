"""The control socket, both sides."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
import trio

from vhostfc.daemon.control import Handler, Json, Send, Stream, call, follow, serve_control
from vhostfc.errors import VhostfcError


async def echo(request: Json) -> Json:
    return {"heard": request["word"]}


async def refuse(_: Json) -> Json:
    raise VhostfcError("50:00: not today")


async def count(_: Json) -> Stream:
    async def run(send: Send) -> None:
        for number in range(20_000):
            await send({"number": number})

    return Stream(run)


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            handlers: dict[str, Handler] = {"echo": echo, "refuse": refuse, "count": count}
            await serve_control(path, handlers, log=structlog.get_logger(), task_status=task_status)

        await nursery.start(serve)
        yield
        nursery.cancel_scope.cancel()


async def test_a_command_is_answered(tmp_path: Path) -> None:
    async with served(tmp_path / "ctl"):
        assert await call(tmp_path / "ctl", "echo", {"word": "hello"}) == {"heard": "hello"}


async def test_an_error_of_a_command_is_an_error_that_names_the_socket(tmp_path: Path) -> None:
    async with served(tmp_path / "ctl"):
        with pytest.raises(VhostfcError, match=r"ctl: 50:00: not today"):
            await call(tmp_path / "ctl", "refuse")


async def test_an_unknown_command_lists_the_known_ones(tmp_path: Path) -> None:
    async with served(tmp_path / "ctl"):
        with pytest.raises(VhostfcError, match="unknown command 'dance'; known: count, echo, refuse"):
            await call(tmp_path / "ctl", "dance")


@pytest.mark.parametrize("line", [b"{\n", b"[1]\n", b"[" * 60_000 + b"\n", b"x" * 100_000 + b"\n"])
async def test_nonsense_is_answered_and_hurts_nobody(tmp_path: Path, line: bytes) -> None:
    async with served(tmp_path / "ctl"):
        async with await trio.open_unix_socket(str(tmp_path / "ctl")) as stream:
            await stream.send_all(line)
            assert b'"ok": false' in await stream.receive_some()
        assert await call(tmp_path / "ctl", "echo", {"word": "still"}) == {"heard": "still"}


async def test_a_client_that_leaves_early_hurts_nobody(tmp_path: Path) -> None:
    async with served(tmp_path / "ctl"):
        async with await trio.open_unix_socket(str(tmp_path / "ctl")) as stream:
            await stream.send_all(b'{"command": "echo", "word": "a"}\n' * 1000)
        assert await call(tmp_path / "ctl", "echo", {"word": "still"}) == {"heard": "still"}


async def test_nobody_there_is_said_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(VhostfcError, match="nothing"):
        await call(tmp_path / "nothing", "status")


async def test_the_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    async with served(tmp_path / "ctl"):
        assert (tmp_path / "ctl").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "ctl").exists()


async def test_a_stream_has_its_objects_in_order_and_an_end(tmp_path: Path) -> None:
    async with served(tmp_path / "ctl"), follow(tmp_path / "ctl", "count") as numbers:
        heard = [one["number"] async for one in numbers]
    assert heard == list(range(20_000))


async def test_whoever_hangs_up_in_the_middle_of_a_stream_hurts_nobody(tmp_path: Path) -> None:
    async with served(tmp_path / "ctl"):
        for _ in range(20):
            async with await trio.open_unix_socket(str(tmp_path / "ctl")) as stream:
                await stream.send_all(b'{"command": "count"}\n')
                await stream.receive_some(100)
        assert await call(tmp_path / "ctl", "echo", {"word": "still here"}) == {"heard": "still here"}
