"""Commands in a certain order: a request ring that is filled as a test likes, and what task attributes make of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import trio
import trio.testing

from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.memory import Buffer
from vhostfc.frontend.queue import Posted
from vhostfc.virtio.scsi import CommandRequest, CommandResponse, Response, TaskAttribute, encode_lun

SIMPLE, ORDERED, HEAD = TaskAttribute.SIMPLE, TaskAttribute.ORDERED, TaskAttribute.HEAD_OF_QUEUE
READ = bytes.fromhex("28 00 00000008 00 0001 00")
WRITE = bytes.fromhex("2a 00 00000008 00 0001 00")
INQUIRY = bytes.fromhex("12 00 00 00 24 00")
PATIENCE = 10.0


@dataclass(eq=False, slots=True)
class Task:
    """A command that was made.  place: of its answer in the used ring, None while there is none."""

    attribute: int
    request: Buffer
    response: Buffer
    data: Buffer | None
    writes: bool
    place: int | None = None

    @property
    def answer(self) -> CommandResponse:
        found = CommandResponse.unpack(bytes(self.response.view))
        assert found is not None
        return found


class Stream:
    """Commands put into request ring 0 in a certain order, and shown to the device as many at a time as one likes."""

    def __init__(self, driver: ScsiDriver, target: int = 0) -> None:
        self.driver = driver
        self.target = target
        self.queue = driver.queues[2]
        self.tasks: list[Task] = []
        self.answered: list[Task] = []

    def put(self, cdb: bytes, attribute: int = SIMPLE, data: bytes | int = 0, *, lun: int = 0, pieces: int = 1) -> Task:
        """data: what is written, or how many bytes are read.  pieces: descriptors that the data are in."""
        memory = self.driver.memory
        writes = isinstance(data, bytes)
        size = len(data) if isinstance(data, bytes) else data
        task = Task(
            attribute, memory.allocate(51), memory.allocate(108), memory.allocate(size) if size else None, writes
        )
        task.request.view[:] = CommandRequest(encode_lun(self.target, lun), len(self.tasks), cdb, attribute).pack()
        if task.data is not None and isinstance(data, bytes):
            task.data.view[:] = data
        place = [(task.data.guest + size * n // pieces, size // pieces) for n in range(pieces)] if task.data else []
        head = self.queue.vring.add(
            [(task.request.guest, 51), *(place if writes else [])],
            [(task.response.guest, 108), *([] if writes else place)],
        )
        self.queue.expect(head, partial(self._ended, task))
        self.tasks.append(task)
        return task

    def _ended(self, task: Task, _: Posted) -> None:
        task.place = len(self.answered)
        self.answered.append(task)

    def show(self) -> None:
        self.queue.publish()

    async def until(self, *tasks: Task) -> None:
        """These are answered."""
        with trio.fail_after(PATIENCE):
            while any(task.place is None for task in tasks):
                await trio.testing.wait_all_tasks_blocked(0.001)

    def forget(self) -> None:
        """Give the memory of what was answered back."""
        for task in self.answered:
            for buffer in (task.request, task.response, task.data):
                if buffer is not None:
                    self.driver.memory.free(buffer)
        self.tasks.clear()
        self.answered.clear()


def block(number: int) -> bytes:
    return bytes([number]) * 512


def _stretches(tasks: Sequence[Task]) -> list[list[int]]:
    """The numbers of the tasks, cut where the order is certain: an ORDERED one is by itself."""
    cut: list[list[int]] = [[]]
    for number, task in enumerate(tasks):
        if task.attribute == ORDERED:
            cut += [[number], []]
        else:
            cut[-1].append(number)
    return cut


def check(ring: Stream) -> None:
    """Each ORDERED task was answered after all that was put before it, and before all that was put after it; a read saw
    a write of its own stretch, or else one of the last stretch before it that has any; block 0 was there first."""
    order = [ring.tasks.index(task) for task in ring.answered]
    last = [0]
    for numbers in _stretches(ring.tasks):
        if numbers and ring.tasks[numbers[0]].attribute == ORDERED:
            (number,) = numbers
            assert order.index(number) == number, order
            assert sorted(order[:number]) == list(range(number)), order
        written = [number + 1 for number in numbers if ring.tasks[number].writes]
        for number in numbers:
            task = ring.tasks[number]
            if task.data is not None and len(task.data) == 512 and not task.writes:
                assert bytes(task.data.view) in map(block, [*last, *written])
        last = written or last


async def random_stream(ring: Stream, chance: random.Random, rounds: int, ordered: Callable[[int], object]) -> None:
    """Rounds of 20 commands for one block of LUN 0, in batches and shapes as they come.

    ordered: puts an ORDERED one; its argument is what it writes, if it writes a block.
    """
    for _ in range(rounds):
        assert (await ring.driver.command(ring.target, 0, WRITE, data_out=block(0))).good
        for number in range(20):
            match chance.randrange(6):
                case 0:
                    ordered(number + 1)
                case 1:
                    ring.put(INQUIRY, SIMPLE, 36)
                case 2 | 3:
                    ring.put(READ, SIMPLE, 512, pieces=chance.choice([1, 1, 2]))
                case _:
                    ring.put(WRITE, SIMPLE, block(number + 1), pieces=chance.choice([1, 1, 2]))
            if not chance.randrange(4):
                ring.show()
        ring.show()
        await ring.until(*ring.tasks)
        assert all(task.answer.response == Response.OK and not task.answer.status for task in ring.tasks)
        check(ring)
        ring.forget()
