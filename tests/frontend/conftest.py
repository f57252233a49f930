"""A fake back end on a socket for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.frontend.fakebackend import FakeBackend


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "vhost.sock"


@pytest.fixture
async def backend(socket_path: Path) -> AsyncIterator[FakeBackend]:
    """One disk of 256 blocks at 0:0; everything that we know is offered."""
    async with FakeBackend().listen(socket_path) as fake:
        yield fake
