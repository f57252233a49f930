"""The real kernel's door, as far as it can be tried without an HBA."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import trio
import trio.testing

from vhostfc.ports.kernel import LinuxKernel


async def test_writes_that_wait_keep_no_other_waiting(tmp_path: Path) -> None:
    """A scan, or a reset, may wait for a minute: neither the next one nor any other thread waits for it."""
    kernel = LinuxKernel(sys=tmp_path)
    pipes = [tmp_path / f"pipe{number}" for number in range(60)]  # a write waits for somebody who reads
    for pipe in pipes:
        os.mkfifo(pipe)
    (tmp_path / "file").touch()
    with ExitStack() as readers:
        async with trio.open_nursery() as nursery:
            for pipe in pipes:
                nursery.start_soon(kernel.write, pipe, b"1")
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(10) as late:
                await kernel.write(tmp_path / "file", b"2")
                await trio.to_thread.run_sync(os.getpid)
            for pipe in pipes:
                fd = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
                readers.callback(os.close, fd)
    assert not late.cancelled_caught
    assert (tmp_path / "file").read_bytes() == b"2"
