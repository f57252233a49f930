"""A back end to attack, a guest that attacks it, and the proof that a good one is served afterwards."""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.hostile.adapter import DaemonAdapter
from tests.hostile.guest import Guest, prove_good
from vhostfc.frontend.driver import ScsiDriver


def descriptors(most: int = 0) -> int:
    """Open descriptors of this process: both sides' are in it.  most: what is not worth a second look."""
    if len(os.listdir("/proc/self/fd")) > most:
        gc.collect()  # a driver's mappings keep a descriptor each, and go when nothing refers to them any more
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
async def adapter(tmp_path: Path) -> AsyncIterator[DaemonAdapter]:
    """A running back end with a disk at 0:0.  Whatever the test does to it, a good driver is served afterwards,
    no descriptor has leaked, and nothing went wrong that a guest must not be able to cause."""
    async with DaemonAdapter.running(tmp_path / "vhost.sock") as adapter:
        await prove_good(adapter.socket)
        await adapter.idle()
        before = descriptors()
        yield adapter
        await prove_good(adapter.socket)
        await adapter.idle()
        assert adapter.wrong == []
        assert descriptors(before) <= before
        assert adapter.counters()["in_flight"] == 0


@pytest.fixture
async def guest(adapter: DaemonAdapter) -> AsyncIterator[Guest]:
    """A connected driver with its rings in the test's hands."""
    async with ScsiDriver.open(adapter.socket, queue_size=64) as driver:
        guest = Guest(driver)
        yield guest
    vars(guest).clear()  # pytest holds on to it, and so to its memory
    del driver
