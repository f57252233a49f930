"""Nothing lands after GOOD, whoever forbids it and how: guests that write in every way, by frames, on a slow medium.

Each guest has blocks of its own, so that the medium knows whose write it is.  Somebody else takes their right to write
away, by whatever there is to do that with, and from the moment in which that has ended in GOOD not one block of theirs
may change until it is given back.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from tests.daemon.linkadapter import LinkAdapter, write_10, wwpn
from tests.daemon.test_fabric_reservations import CLEAR, EA, GOOD, IGNORE, PREEMPT, PREEMPT_AND_ABORT, RESERVE, WE, WERO
from tests.daemon.test_fabricd import config, fabric, join
from tests.scsi.test_extended_copy import cdb as copy_cdb
from tests.scsi.test_extended_copy import cscd, parameters, segment
from vhostfc.daemon.fabricd import Fabric
from vhostfc.daemon.medium import Medium

GUESTS = (1, 2, 3)
ADMIN = 9
#: Blocks of each guest on LUN 0; the first ones are nobody's.
BLOCKS, SIZE = 40, 512


@dataclass
class Watch:
    """What the medium sees.  taken: the name of what forbids writing now.  landed: what was written all the same."""

    taken: str | None = None
    landed: list[tuple[str, int, str]] = field(default_factory=list)

    def see(self, medium: Medium, lba: int, when: str) -> None:
        if self.taken is not None and medium.name.endswith("disk0") and lba >= BLOCKS:
            self.landed.append((self.taken, lba, when))


@contextmanager
def watched(pause: Callable[[], float]) -> Iterator[Watch]:
    """All media are slow, and watched, before and after each write."""
    watch, patch = Watch(), pytest.MonkeyPatch()

    def slow(name: str) -> None:
        before = getattr(Medium, name)

        def call(self: Medium, lba: int, *arguments: object) -> object:
            time.sleep(pause())
            if name != "_read":
                watch.see(self, lba, "begun")
            try:
                return before(self, lba, *arguments)
            finally:
                if name != "_read":
                    watch.see(self, lba, "done")

        patch.setattr(Medium, name, call)

    for name in ("_read", "_write", "_fill"):
        slow(name)
    try:
        yield watch
    finally:
        patch.undo()


def described(path: Path, *, access: str = "optimized", more: str = "") -> str:
    """Two targets, and behind each of them both units; more: of LUN 0."""
    text = ""
    for number in (1, 2):
        text += f'[[target]]\nname = "array-{number}"\nwwpn = "50:06:01:60:00:00:00:0{number}"\n'
        text += f'wwnn = "50:06:01:60:00:00:00:00"\ngroup = {number}\naccess = "{access}"\n'
        for lun, about in ((0, more), (1, "")):
            text += f'[[target.unit]]\nlun = {lun}\nfile = "{path}/disk{lun}"\nsize = "96KiB"\n{about}'
    return text


# ---------------------------------------------------------------- the guests


def _some(rng: random.Random, lba: int, count: int) -> tuple[bytes, bytes]:
    """A command, and its data-out, that writes so many blocks here."""
    long = lba.to_bytes(8, "big") + count.to_bytes(4, "big") + bytes(2)
    data = rng.randbytes(SIZE * count)
    return rng.choice(
        (
            (write_10(lba, count), data),
            (bytes([0x8A, 0x08]) + long, data),
            (bytes([0x8B, 0x00]) + long, data),
            (bytes([0x2E, 0x02]) + lba.to_bytes(4, "big") + bytes([0, 0, count, 0]), data),
            (bytes([0x89, 0]) + lba.to_bytes(8, "big") + bytes([0, 0, 0, 1, 0, 0]), bytes(2 * SIZE)),
            (bytes([0x93, 0x08]) + long, bytes(SIZE)),
            (bytes([0x93, 0x00]) + long, data[:SIZE]),
            (bytes([0x9C, 0]) + lba.to_bytes(8, "big") + bytes([0, 0, 0, count, 0, 0]), data),
            (bytes([0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]), bytes.fromhex("00160010 00000000") + long[:12] + bytes(4)),
        )
    )


def _copy(rng: random.Random, first: int, names: list[bytes]) -> tuple[bytes, bytes]:
    """An EXTENDED COPY of a few segments from anywhere to blocks of the guest's."""
    segments = [
        segment(rng.randrange(2), 0, rng.randint(1, 3), rng.randrange(150), first + rng.randrange(BLOCKS - 4))
        for _ in range(6)
    ]
    data = parameters([cscd(name) for name in names], segments, list_id=0, usage=3)
    return copy_cdb(data), data


async def write_for_ever(one: LinkAdapter, number: int, rng: random.Random, names: list[bytes]) -> None:
    first = number * BLOCKS
    while True:
        count = rng.randint(1, 3)
        lun, (cdb, data) = 0, _some(rng, first + rng.randrange(BLOCKS - 4), count)
        if rng.random() < 0.3:
            lun, (cdb, data) = rng.choice((0, 1)), _copy(rng, first, names)
        await one.command(cdb, lun=lun, data_out=data, attribute=rng.choice((0, 0, 0, 1, 2)))


# ---------------------------------------------------------------- taking their right away


@dataclass
class Taker:
    """Ways to take it, each a context in which it is taken."""

    san: Fabric
    admin: LinkAdapter
    guests: list[LinkAdapter]
    path: Path
    rng: random.Random

    async def send(self, cdb: bytes, data: bytes = b"", *, of: LinkAdapter | None = None) -> int:
        """The status, when there is no news to be heard any more."""
        answer = await (of or self.admin).command(cdb, data_out=data)
        while answer.status == 2 and answer.sense[2] == 6:
            answer = await (of or self.admin).command(cdb, data_out=data)
        return answer.status

    async def out(self, action: int, key: int, new: int = 0, kind: int = 0, *, of: LinkAdapter | None = None) -> int:
        data = key.to_bytes(8, "big") + new.to_bytes(8, "big") + bytes(8)
        return await self.send(bytes([0x5F, action, kind, 0, 0, 0, 0, 0, 24, 0]), data, of=of)

    async def reload(self, text: str) -> None:
        await self.san.reload(config(self.path, text))

    @asynccontextmanager
    async def write_protect(self) -> AsyncIterator[None]:
        cdb, page = bytes([0x15, 0x10, 0, 0, 16, 0]), "00000000 0a 0a 02 10 {} 40 00 00 ffff 0000"
        assert await self.send(cdb, bytes.fromhex(page.format("08"))) == GOOD
        yield
        assert await self.send(cdb, bytes.fromhex(page.format("00"))) == GOOD

    @asynccontextmanager
    async def reserve(self) -> AsyncIterator[None]:
        assert await self.send(bytes([0x16, 0, 0, 0, 0, 0])) == GOOD
        yield
        assert await self.send(bytes([0x17, 0, 0, 0, 0, 0])) == GOOD

    @asynccontextmanager
    async def reserve_persistently(self) -> AsyncIterator[None]:
        assert await self.out(IGNORE, 0, 5) == GOOD
        assert await self.out(RESERVE, 5, kind=self.rng.choice((WE, EA))) == GOOD
        yield
        assert await self.out(CLEAR, 5) == GOOD

    @asynccontextmanager
    async def preempt(self) -> AsyncIterator[None]:
        assert await self.out(IGNORE, 0, 5) == GOOD
        for one in self.guests:
            assert await self.out(IGNORE, 0, 7, of=one) == GOOD
        assert await self.out(RESERVE, 5, kind=WERO) == GOOD
        await trio.sleep(self.rng.random() / 50)
        assert await self.out(self.rng.choice((PREEMPT, PREEMPT_AND_ABORT)), 5, 7, WERO) == GOOD
        yield
        assert await self.out(CLEAR, 5) == GOOD

    @asynccontextmanager
    async def set_groups(self) -> AsyncIterator[None]:
        cdb = bytes([0xA4, 0x0A, 0, 0, 0, 0, 0, 0, 0, 12, 0, 0])
        assert await self.send(cdb, bytes.fromhex("00000000 02000001 03000002")) == GOOD
        yield
        assert await self.send(cdb, bytes.fromhex("00000000 00000001 00000002")) == GOOD

    @asynccontextmanager
    async def configure(self) -> AsyncIterator[None]:
        how = self.rng.randrange(3)
        access = self.rng.choice(("standby", "unavailable")) if how == 0 else "optimized"
        more = ("", "read_only = true\n", f'allow = ["{wwpn(ADMIN)}"]\n')[how]
        await self.reload(described(self.path, access=access, more=more))
        yield
        await self.reload(described(self.path))

    def any(self) -> AbstractAsyncContextManager[None]:
        ways = (self.write_protect, self.reserve, self.reserve_persistently, self.preempt, self.set_groups)
        return self.rng.choice((*ways, self.configure, self.configure))()


@pytest.mark.parametrize(
    ("rounds", "seed"), [(12, 1), *(pytest.param(250, seed, marks=pytest.mark.long) for seed in (2, 3, 4, 5))]
)
async def test_nothing_lands_after_good(tmp_path: Path, rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    with watched(lambda: rng.random() / 150) as watch:
        async with fabric(tmp_path, described(tmp_path)) as (san, nursery):
            admin, guests = await join(nursery, tmp_path, ADMIN), [await join(nursery, tmp_path, n) for n in GUESTS]
            names = [served.unit.identity.naa[0] for _, served in sorted(san.placement.served.items())]
            for number, one in zip(GUESTS, guests, strict=True):
                for _ in range(4):
                    nursery.start_soon(write_for_ever, one, number, random.Random(rng.random()), names)
            taker = Taker(san, admin, guests, tmp_path, rng)
            for number in range(rounds):
                await trio.sleep(rng.random() / 20)
                async with taker.any():
                    watch.taken = f"round {number}"
                    await trio.sleep(rng.random() / 40)
                    watch.taken = None
                assert watch.landed == []
