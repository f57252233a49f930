"""What the daemons' tests share."""

from __future__ import annotations

import os

import pytest

from tests.daemon.disk import Disk


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    one = Disk()
    monkeypatch.setattr(os, "fdatasync", one.fdatasync)
    return one
