"""Media of every kind: bytes in and out, holes, errors, and the range latch around them."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from vhostfc.daemon import media
from vhostfc.daemon.fabric_latch import OWNER, Holding
from vhostfc.daemon.medium import PIECE, Medium
from vhostfc.errors import VhostfcError
from vhostfc.fabric.link import MediumKind
from vhostfc.native import LATCH_STRIPE, LATCH_WORDS
from vhostfc.scsi.task import MediumError

SIZE = 4 << 20


def _direct_works(path: Path) -> bool:
    try:
        os.close(os.open(path / "direct", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.fixture(params=["memory", "file", "direct"])
def medium(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Medium]:
    if request.param == "memory":
        made = media.memory(SIZE, block_size=512, name="m")
    else:
        direct = request.param == "direct"
        if direct and not _direct_works(tmp_path):
            pytest.skip("no O_DIRECT here")
        made = media.file(tmp_path / "f", SIZE, block_size=4096, direct=direct, read_only=False)
    yield made
    made.close()


def pattern(medium: Medium, blocks: int) -> bytes:
    return os.urandom(blocks * medium.block_size)


# ---------------------------------------------------------------- data


async def test_what_is_written_is_read(medium: Medium) -> None:
    for lba, blocks in ((0, 1), (3, 5), (medium.blocks - 1, 1), (0, medium.blocks)):
        data = pattern(medium, blocks)
        await medium.write(lba, data, fua=True)
        assert await medium.read(lba, blocks, fua=True) == data
    await medium.flush()
    assert await medium.read(0, 0) == b""


async def test_a_fill_repeats_its_block(medium: Medium) -> None:
    block = pattern(medium, 1)
    blocks = 2 * PIECE // medium.block_size + 1
    await medium.fill(1, min(blocks, medium.blocks - 1), block)
    assert await medium.read(1, blocks) == block * blocks
    assert not any(await medium.read(0, 1))


async def test_an_unmapped_range_reads_as_zeros_and_is_a_hole(medium: Medium) -> None:
    page = 65536 // medium.block_size
    await medium.write(0, pattern(medium, 4 * page))
    await medium.fill(page, page, bytes(medium.block_size), unmap=True)
    assert not any(await medium.read(page, page))
    extents = await medium.extents(0, 4 * page)
    assert extents == [(0, page, True), (page, page, False), (2 * page, 2 * page, True)]
    assert await medium.extents(page + 1, 2) == [(page + 1, 2, False)]


async def test_unmap_with_a_pattern_is_a_fill(medium: Medium) -> None:
    await medium.fill(0, 2, b"\1" * medium.block_size, unmap=True)
    assert await medium.read(0, 2) == b"\1" * 2 * medium.block_size


async def test_extents_cover_the_range_in_order(medium: Medium) -> None:
    step = 65536 // medium.block_size
    for lba in range(0, medium.blocks, 4 * step):
        await medium.write(lba, pattern(medium, step))
    extents = await medium.extents(5, medium.blocks - 5)
    assert extents[0][0] == 5
    assert all(a[0] + a[1] == b[0] and a[2] != b[2] for a, b in itertools.pairwise(extents))
    assert sum(blocks for _, blocks, _ in extents) == medium.blocks - 5


async def test_null_takes_everything_and_gives_zeros() -> None:
    medium = media.null(1 << 40, block_size=512, name="n")
    await medium.write(7, b"x" * 512)
    await medium.fill(0, 1 << 20, b"y" * 512)
    await medium.flush()
    assert await medium.read(7, 2) == bytes(1024)
    assert await medium.extents(0, 8) == [(0, 8, False)]
    assert medium.latch is None
    async with trio.open_nursery():
        with Holding(medium) as holding:
            await holding.take(0, 1)
    medium.close()


# ---------------------------------------------------------------- errors


async def test_a_file_that_was_truncated_is_a_medium_error_at_its_block(tmp_path: Path) -> None:
    medium = media.file(tmp_path / "f", SIZE, block_size=512, direct=False, read_only=False)
    os.truncate(tmp_path / "f", 10 * 512 + 100)
    with pytest.raises(MediumError) as error:
        await medium.read(8, 8)
    assert error.value.lba in (10, 8)
    assert not error.value.space
    medium.close()


@pytest.mark.parametrize(("number", "space"), [(errno.EIO, False), (errno.ENOSPC, True), (errno.EDQUOT, True)])
async def test_a_write_that_fails_says_where_and_whether_for_lack_of_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, space: bool
) -> None:
    medium = media.file(tmp_path / "f", SIZE, block_size=512, direct=False, read_only=False)
    real = os.pwrite

    def fails(fd: int, data: bytes, offset: int) -> int:
        if offset >= 6 * 512:
            raise OSError(number, "no")
        return real(fd, data[: 6 * 512 - offset], offset)

    monkeypatch.setattr(os, "pwrite", fails)
    with pytest.raises(MediumError) as error:
        await medium.write(4, bytes(4 * 512))
    assert (error.value.lba, error.value.space) == (6, space)
    medium.close()


async def test_a_full_file_system_is_lack_of_space() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    fd = os.open("/dev/full", os.O_RDWR)
    medium = Medium(MediumKind.FILE, fd, name="full", block_size=512, size=SIZE)
    with pytest.raises(MediumError) as error:
        await medium.write(3, bytes(512))
    assert (error.value.lba, error.value.space) == (3, True)
    medium.close()


# ---------------------------------------------------------------- opening


@pytest.mark.parametrize(
    ("prepare", "size", "read_only", "message"),
    [
        (lambda path: None, None, False, "No such file"),
        (lambda path: path.mkdir(), SIZE, False, "Is a directory"),
        (lambda path: path.write_bytes(b"x"), None, False, "no whole block"),
        (lambda path: path.write_bytes(bytes(512)), SIZE, True, "read-only"),
        (lambda path: path.symlink_to("/dev/null"), SIZE, False, "not a regular file"),
    ],
)
def test_what_cannot_be_a_file_unit_is_said_with_its_path(
    tmp_path: Path, prepare: Callable[[Path], object], size: int | None, read_only: bool, message: str
) -> None:
    path = tmp_path / "disk"
    prepare(path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(VhostfcError) as error:
        media.file(path, size, block_size=512, direct=False, read_only=read_only)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_block_device_unit_is_a_block_device(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(512))
    with pytest.raises(VhostfcError, match="not a block device"):
        media.block(tmp_path / "f", block_size=512, direct=False, read_only=False)


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    made = subprocess.run(["losetup", "-f", "--show", tmp_path / "disk"], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip("no loop devices here")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)


async def test_a_block_device_of_the_kernel_s(loop_device: Path) -> None:
    medium = media.block(loop_device, block_size=512, direct=True, read_only=False)
    assert (medium.kind, medium.blocks, medium.current_size()) == (MediumKind.DIRECT, SIZE // 512, SIZE)
    data = pattern(medium, 5)
    await medium.write(3, data, fua=True)
    await medium.fill(4, 2, bytes(512), unmap=True)
    assert await medium.read(3, 5) == data[:512] + bytes(1024) + data[1536:]
    assert await medium.extents(0, 9) == [(0, 9, True)]
    medium.close()
    with pytest.raises(VhostfcError, match="not a regular file"):
        media.file(loop_device, None, block_size=512, direct=False, read_only=False)


def test_a_size_makes_a_sparse_file_and_none_takes_what_is_there(tmp_path: Path) -> None:
    made = media.file(tmp_path / "f", SIZE, block_size=512, direct=False, read_only=False)
    assert (tmp_path / "f").stat().st_size == SIZE
    assert (tmp_path / "f").stat().st_blocks == 0
    again = media.file(tmp_path / "f", None, block_size=4096, direct=False, read_only=True)
    assert again.blocks == SIZE // 4096
    with os.fdopen(again.reopen(), "rb") as given, pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(given.fileno(), b"x", 0)
    made.close()
    again.close()


def test_memory_grows_and_nobody_can_shrink_it() -> None:
    medium = media.memory(SIZE, block_size=512, name="m")
    medium.grow(2 * SIZE)
    assert (medium.blocks, os.fstat(medium.fd).st_size) == (2 * SIZE // 512, 2 * SIZE)
    with pytest.raises(VhostfcError, match="shrink"):
        medium.grow(SIZE)
    with pytest.raises(PermissionError):
        os.ftruncate(medium.fd, SIZE)
    medium.close()


def test_a_reopened_medium_is_another_description_of_the_same_bytes(medium: Medium) -> None:
    fd = medium.reopen()
    os.lseek(fd, 100, os.SEEK_SET)
    assert os.lseek(medium.fd, 0, os.SEEK_CUR) == 0
    assert os.fstat(fd).st_ino == os.fstat(medium.fd).st_ino
    os.close(fd)


# ---------------------------------------------------------------- the range latch


async def test_a_latch_is_waited_for_and_freed(autojump_clock: trio.testing.MockClock) -> None:
    medium = media.memory(SIZE, block_size=512, name="m")
    assert medium.latch is not None
    assert medium.latch.take(7, 0, 512) is None
    asked: list[int] = []
    taken = trio.Event()

    async def take() -> None:
        with Holding(medium, asked.append) as holding:
            await holding.take(0, 1)
            taken.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await trio.sleep(3.5)
        assert not taken.is_set()
        assert asked == [7, 7, 7], "each second"
        medium.latch.free(7, 0, 512)
        with trio.fail_after(0.1):
            await taken.wait()
    assert medium.latch.take(7, 0, SIZE) is None, "all is free again"
    medium.close()


async def test_two_of_our_own_commands_exclude_each_other() -> None:
    medium = media.memory(SIZE, block_size=512, name="m")
    with Holding(medium) as one, Holding(medium) as two:
        await one.take(0, 1)
        with trio.move_on_after(0.01) as scope:
            await two.take(1, 1)  # the same stripe
        assert scope.cancelled_caught
        await two.take(LATCH_STRIPE // 512, 1)
    medium.close()


async def test_what_is_held_already_is_not_taken_again_and_release_gives_back_the_rest() -> None:
    medium = media.memory(SIZE, block_size=512, name="m")
    assert medium.latch is not None
    stripe = LATCH_STRIPE // 512
    with Holding(medium) as holding:
        await holding.take(stripe, stripe)
        mark = holding.mark()
        with trio.fail_after(1):
            await holding.take(0, 3 * stripe)
        assert medium.latch.take(7, 0, 512) == OWNER
        assert medium.latch.take(7, 2 * LATCH_STRIPE, 512) == OWNER
        holding.release(to=mark)
        assert medium.latch.take(7, 0, 512) is None
        assert medium.latch.take(7, LATCH_STRIPE, 512) == OWNER
    assert medium.latch.take(7, LATCH_STRIPE, 512) is None
    medium.close()


async def test_a_range_larger_than_the_table_is_the_whole_table() -> None:
    size = 2 * LATCH_WORDS * LATCH_STRIPE
    medium = media.memory(size, block_size=512, name="m")
    assert medium.latch is not None
    with Holding(medium) as holding:
        await holding.take(10, 1)
        with trio.fail_after(1):
            await holding.take(0, medium.blocks)
    assert medium.latch.recover(OWNER) == 0
    medium.close()


async def test_a_cancelled_wait_keeps_nothing_of_it() -> None:
    medium = media.memory(SIZE, block_size=512, name="m")
    assert medium.latch is not None
    medium.latch.take(7, 2 * LATCH_STRIPE, 512)
    with Holding(medium) as holding:
        await holding.take(LATCH_STRIPE // 512, 1)
        with trio.move_on_after(0.01):
            await holding.take(0, 3 * LATCH_STRIPE // 512)
        assert medium.latch.take(8, 0, 512) is None
        assert medium.latch.take(8, LATCH_STRIPE, 512) == OWNER
    medium.close()


async def test_memory_that_was_only_read_is_no_more_mapped_than_before() -> None:
    """The adapters' reads go through a mapping, and fill a hole with a page of zeros."""
    medium = media.memory(SIZE, block_size=512, name="m")
    await medium.write(8, b"x" * 512)
    with mmap.mmap(medium.fd, SIZE) as mapping:
        assert not any(mapping[i] for i in range(16 * 512, SIZE, 512))
    assert await medium.extents(0, SIZE // 512) == [(0, 8, False), (8, 8, True), (16, SIZE // 512 - 16, False)]
    medium.close()
