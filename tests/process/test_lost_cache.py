"""The host cannot write back what two guests have written: each of them is told, whoever asks first, and once.

The disk is a loop device over a file that has no room on its file system, which is how a thin volume runs full:
the page cache takes what it gets, and says later that it could not keep it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.san import San, UnitSpec
from tests.process.driving import KIB, ready, write_10
from vhostfc.frontend.driver import Response, ScsiDriver

SYNC = bytes([0x35, *bytes(9)])
ORDERED = 1
HALF = 8 << 20


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[str]:
    """A block device of 16 MiB with room for 2."""
    where = tmp_path / "full"
    where.mkdir()
    try:
        _run("mount", "-t", "tmpfs", "-o", "size=2M", "none", where)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nothing can be mounted here")
    try:
        _run("truncate", "-s", str(2 * HALF), where / "image")
        try:
            device = _run("losetup", "-f", "--show", where / "image")
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("there are no loop devices here")
        try:
            yield device
        finally:
            _run("losetup", "-d", device)
    finally:
        _run("umount", "-l", where)


async def fill(driver: ScsiDriver, first: int) -> None:
    """More than there is room for."""
    for at in range(0, 3 << 20, 64 * KIB):
        answer = await driver.command(0, 0, write_10((first + at) // 512, 128), data_out=b"\x5a" * (64 * KIB))
        assert answer.good, "it is in the cache"


def lost(answer: Response) -> bool:
    return (answer.status, answer.sense[2:3], answer.sense[12:14]) == (2, b"\x03", b"\x0c\x00")


@pytest.mark.parametrize("attribute", [0, ORDERED], ids=["by its worker", "by the fabric"])
async def test_each_guest_is_told_of_what_was_lost(tmp_path: Path, full_disk: str, attribute: int) -> None:
    with San(tmp_path, [UnitSpec(0, f'block = "{full_disk}"')]) as san:
        san.start_adapters({1: {}, 2: {}})
        async with ScsiDriver.open(san.socket(1)) as one, ScsiDriver.open(san.socket(2)) as two:
            for driver in (one, two):
                await ready(driver, 0)
            await fill(one, 0)
            await fill(two, HALF)
            assert lost(await one.command(0, 0, SYNC, attribute=attribute))
            assert lost(await two.command(0, 0, SYNC))
            for driver in (one, two, one, two):
                assert (await driver.command(0, 0, SYNC)).good, "nothing was written since"
