"""Data-out that a command has no use for is a residual (FCP-4 9.5.10), whatever the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.daemon.test_fabric_reservations import GOOD
from tests.daemon.test_fabricd import fabric, join

SIZE = 512
CONTROL = bytes.fromhex("00000000 0a 0a 02 10 00 40 00 00 ffff 0000")


@pytest.mark.parametrize(
    ("cdb", "used"),
    [
        ("2a 00 00000000 00 0001 00", bytes(SIZE)),
        ("8b 00 0000000000000000 00000001 00 00", bytes(SIZE)),
        ("2f 02 00000000 00 0001 00", bytes(SIZE)),
        ("2f 00 00000000 00 0001 00", b""),
        ("93 01 0000000000000000 00000001 00 00", b""),
        ("15 10 00 00 10 00", CONTROL),
        ("42 00 00000000 00 0008 00", bytes.fromhex("0006 0000 00000000")),
        ("5f 06 00 0000 00000018 00", bytes(24)),
        ("00 00 00 00 00 00", b""),
    ],
)
async def test_more_data_than_the_command_has_a_use_for(tmp_path: Path, cdb: str, used: bytes) -> None:
    async with fabric(tmp_path) as (_, nursery):
        one = await join(nursery, tmp_path, 1)
        await one.command(bytes(6))
        for more in (0, 100):
            answer = await one.command(bytes.fromhex(cdb), data_out=used + bytes(more))
            assert (answer.status, answer.residual) == (GOOD, more)
