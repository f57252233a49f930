"""Buffers in many small pieces at odd addresses, as Windows' driver gives them, and as large as a command may be.

A medium wants whole blocks in aligned memory, a guest's buffer is none of that: wherever the pieces are
put together, nothing may be lost, and no byte beside them may change.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from tests.lab.san import San, UnitSpec
from tests.process.driving import KIB, MIB, ready
from vhostfc.frontend.client import WANTED
from vhostfc.frontend.driver import Response, ScsiDriver, sense_code
from vhostfc.frontend.memory import Buffer
from vhostfc.vhost.features import Feature, mask
from vhostfc.virtio import scsi
from vhostfc.virtio.scsi import CommandRequest, CommandResponse, Queue

BLOCK = 512
#: QEMU's seg_max: data pieces of one command.
PIECES = 126
MOST = 32 * MIB
BETWEEN = 0xEE
MEMORY, FILE, DIRECT = 0, 1, 2


def read_16(lba: int, blocks: int) -> bytes:
    return b"\x88\x00" + lba.to_bytes(8, "big") + blocks.to_bytes(4, "big") + bytes(2)


def write_16(lba: int, blocks: int) -> bytes:
    return b"\x8a\x00" + lba.to_bytes(8, "big") + blocks.to_bytes(4, "big") + bytes(2)


@pytest.fixture(scope="module")
def san(tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    """Adapter 1 does reads and writes itself, adapter 2 sends them as frames."""
    directory = tmp_path_factory.mktemp("san")
    units = [
        UnitSpec(MEMORY, 'size = "64MiB"'),
        UnitSpec(FILE, f'file = "{directory / "file.img"}"\nsize = "64MiB"'),
        UnitSpec(DIRECT, f'file = "{directory / "direct.img"}"\nsize = "64MiB"\ncache = "none"'),
    ]
    with San(directory, units) as network:
        network.start_adapter(1)
        network.start_adapter(2, fabric="fast_path = false")
        yield network


@asynccontextmanager
async def driver_of(san: San, number: int, lun: int, features: int = WANTED) -> AsyncIterator[ScsiDriver]:
    """A driver whose memory has two regions, neither large enough for the largest transfer."""
    async with ScsiDriver.open(san.socket(number), regions=(24 * MIB, 24 * MIB), features=features) as driver:
        await ready(driver, lun)
        yield driver


class Scattered:
    """A data buffer in pieces: odd sizes at odd addresses, taken from both regions in turn."""

    def __init__(self, driver: ScsiDriver, size: int, rng: random.Random) -> None:
        cuts = sorted(rng.sample(range(1, size), PIECES - 1))
        sizes = [end - start for start, end in zip([0, *cuts], [*cuts, size], strict=True)]
        self.whole: list[Buffer] = []
        self.pieces: list[Buffer] = []
        for region, mine in zip(driver.memory.regions, (sizes[::2], sizes[1::2]), strict=True):
            buffer = region.allocate(sum(mine) + 16 * len(mine), 64)
            assert buffer is not None
            buffer.view[:] = bytes([BETWEEN]) * len(buffer)
            self.whole.append(buffer)
            at = 0
            for length in mine:
                at += rng.randrange(1, 16, 2)
                self.pieces.append(buffer.slice(at, length))
                at += length
        half = len(sizes[::2])
        self.pieces[::2], self.pieces[1::2] = self.pieces[:half], self.pieces[half:]
        assert [len(piece) for piece in self.pieces] == sizes

    def put(self, data: bytes) -> None:
        at = 0
        for piece in self.pieces:
            piece.view[:] = data[at : at + len(piece)]
            at += len(piece)

    def take(self) -> bytes:
        """What is in it; the bytes between the pieces must be as they were."""
        data = b"".join(bytes(piece.view) for piece in self.pieces)
        for piece in self.pieces:
            piece.view[:] = bytes([BETWEEN]) * len(piece)
        for buffer in self.whole:
            assert bytes(buffer.view).count(BETWEEN) == len(buffer), "a byte beside a piece was written"
        return data

    def listed(self) -> list[tuple[int, int]]:
        return [(piece.guest, len(piece)) for piece in self.pieces]


async def run(driver: ScsiDriver, lun: int, cdb: bytes, out: Scattered | None, room: Scattered | None) -> Response:
    """A command with such buffers; data_in of the answer is empty."""
    request, response = driver.memory.allocate(CommandRequest.SIZE), driver.memory.allocate(CommandResponse.SIZE)
    request.view[:] = CommandRequest(scsi.encode_lun(0, lun), 1, cdb, 0).pack()
    posted = driver.queues[Queue.REQUEST].post(
        [(request.guest, len(request)), *(out.listed() if out else [])],
        [(response.guest, len(response)), *(room.listed() if room else [])],
    )
    used = await posted.wait()
    answer = CommandResponse.unpack(bytes(response.view))
    assert answer is not None
    driver.memory.free(request)
    driver.memory.free(response)
    return Response(answer.response, answer.status, answer.sense, answer.residual, used_length=used.length)


async def there_and_back(driver: ScsiDriver, lun: int, size: int, seed: int) -> None:
    """Write one buffer, read into another, and in one piece as well."""
    rng = random.Random(seed)
    data = rng.randbytes(size)
    lba, blocks = rng.randrange(0, (64 * MIB - size) // BLOCK), size // BLOCK
    buffer = Scattered(driver, size, rng)
    buffer.put(data)
    answer = await run(driver, lun, write_16(lba, blocks), buffer, None)
    assert (answer.good, answer.residual, answer.used_length) == (True, 0, CommandResponse.SIZE), answer
    assert buffer.take() == data

    answer = await run(driver, lun, read_16(lba, blocks), None, buffer)
    assert (answer.good, answer.residual, answer.used_length) == (True, 0, CommandResponse.SIZE + size), answer
    assert buffer.take() == data
    for whole in buffer.whole:
        driver.memory.free(whole)

    piece = min(size, 4 * MIB)
    for at in range(0, size, piece):
        part = await driver.command(0, lun, read_16(lba + at // BLOCK, piece // BLOCK), data_in=piece)
        assert part.data_in == data[at : at + piece]


@pytest.mark.parametrize("lun", [MEMORY, FILE, DIRECT])
@pytest.mark.parametrize("size", [4 * KIB, 512 * KIB, MOST])
async def test_many_odd_pieces(san: San, lun: int, size: int) -> None:
    async with driver_of(san, 1, lun) as driver:
        before = san.status(1)["counters"]["fast"]
        await there_and_back(driver, lun, size, seed=size + lun)
        assert san.status(1)["counters"]["fast"] > before + 1  # it is the fast path that is judged here


@pytest.mark.parametrize("size", [4 * KIB, 512 * KIB, 4 * MIB])
async def test_many_odd_pieces_as_frames(san: San, size: int) -> None:
    async with driver_of(san, 2, DIRECT) as driver:
        await there_and_back(driver, DIRECT, size, seed=size)
        assert san.status(2)["counters"]["fast"] == 0


async def test_a_chain_as_long_as_the_ring(san: San) -> None:
    """Without indirect descriptors the command takes all of a ring of 128."""
    async with driver_of(san, 1, FILE, features=mask(Feature.VERSION_1, Feature.PROTOCOL_FEATURES)) as driver:
        for seed in range(5):
            await there_and_back(driver, FILE, 512 * KIB, seed)


async def test_more_than_the_unit_transfers_is_refused(san: San) -> None:
    """Windows' driver does not ask for MAXIMUM TRANSFER LENGTH (SBC-4 6.6.4): it must get an answer, not a hang."""
    async with driver_of(san, 1, MEMORY) as driver:
        buffer = Scattered(driver, MOST + BLOCK, random.Random(1))
        answer = await run(driver, MEMORY, read_16(0, (MOST + BLOCK) // BLOCK), None, buffer)
        assert (answer.response, answer.status) == (0, 0x02)
        assert sense_code(answer.sense) == (0x05, 0x24, 0x00)
        assert set(buffer.take()) == {BETWEEN}
        await there_and_back(driver, MEMORY, 64 * KIB, seed=2)
