"""A guest that writes its rings by hand: what no driver would put there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import trio

from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.memory import Buffer
from vhostfc.frontend.queue import DriverQueue
from vhostfc.frontend.ring import INDIRECT, NEXT, WRITE, Used, descriptor
from vhostfc.virtio.scsi import CommandRequest, CommandResponse, Response, encode_lun

READ = bytes.fromhex("28 00 00000008 00 0001 00")
WRITE_BLOCK = bytes.fromhex("2a 00 00000008 00 0001 00")
INQUIRY = bytes.fromhex("12 00 00 00 24 00")
PATIENCE = 10.0

Descriptor = tuple[int, int, int, int]


class Guest:
    """Descriptors 0 to 31 of the request ring are the test's own; what it allocates is never given back."""

    RESERVED = 32

    def __init__(self, driver: ScsiDriver) -> None:
        self.driver = driver
        self.queue: DriverQueue = driver.queues[2]
        assert self.queue.ring.reserve(self.RESERVED) == list(range(self.RESERVED))

    # ------------------------------------------------------------------ parts

    def buffer(self, content: bytes | int) -> Buffer:
        """Guest memory, with this content or of this size (filled with EEh, so that what is written shows)."""
        size = content if isinstance(content, int) else len(content)
        buffer = self.driver.memory.allocate(max(size, 1), 64)
        buffer.view[:size] = b"\xee" * size if isinstance(content, int) else content
        return buffer

    def request(self, cdb: bytes = READ, *, lun: bytes | None = None, tag: int = 1, attribute: int = 0) -> Buffer:
        return self.buffer(CommandRequest(lun or encode_lun(0, 0), tag, cdb, attribute).pack())

    def response(self) -> Buffer:
        return self.buffer(CommandResponse.SIZE)

    @staticmethod
    def decode(response: Buffer) -> CommandResponse:
        answer = CommandResponse.unpack(bytes(response.view))
        assert answer is not None
        return answer

    # ------------------------------------------------------------------ attacks

    def table(self, descriptors: Sequence[Descriptor]) -> Buffer:
        """An indirect table."""
        return self.buffer(b"".join(descriptor(*each) for each in descriptors))

    def put(self, descriptors: Sequence[Descriptor], first: int = 0) -> None:
        """Write descriptors (address, length, flags, next) into the ring's table from `first` on."""
        for index, each in enumerate(descriptors, first):
            self.queue.ring.put_descriptor(index, *each)

    async def submit(self, descriptors: Sequence[Descriptor], first: int = 0) -> Used:
        """Offer the chain that begins at `first`; how the device used it."""
        self.put(descriptors, first)
        return await self.offer(first)

    async def offer(self, head: int) -> Used:
        posted = self.queue.expect(head)
        self.queue.ring.offer(head)
        self.queue.publish()
        with trio.fail_after(PATIENCE):
            return await posted.wait()

    async def indirect(self, table: Buffer, *, length: int | None = None, flags: int = INDIRECT) -> Used:
        """Offer an indirect table."""
        return await self.submit([(table.guest, len(table) if length is None else length, flags, 0)])

    async def broken(self) -> None:
        """Wait until the back end has called the ring broken."""
        with trio.fail_after(PATIENCE):
            await self.queue.broken.wait()

    async def works(self) -> None:
        """This very connection still does I/O."""
        answer = await self.driver.command(0, 0, READ, data_in=512, timeout=PATIENCE)
        assert answer.good


def chain(*parts: tuple[Buffer | tuple[int, int], int]) -> list[Descriptor]:
    """Descriptors 0, 1, ... for (buffer or (address, length), flags), linked in order."""
    out = []
    for index, (part, flags) in enumerate(parts):
        address, length = (part.guest, len(part)) if isinstance(part, Buffer) else part
        last = index == len(parts) - 1
        out.append((address, length, flags if last else flags | NEXT, 0 if last else index + 1))
    return out


R, W = 0, WRITE
FAILURE = Response.FAILURE


async def prove_good(socket: Path) -> None:
    """A driver that does nothing wrong connects, writes, reads back, and leaves."""
    data = bytes(range(256)) * 2
    with trio.fail_after(PATIENCE):
        async with ScsiDriver.open(socket, queues=2) as driver:
            assert (await driver.command(0, 0, INQUIRY, data_in=36)).good
            assert (await driver.command(0, 0, WRITE_BLOCK, data_out=data)).good
            assert (await driver.command(0, 0, READ, data_in=512)).data_in == data
