"""A fast path that cannot disagree: one stream of commands, three ways, the same bytes, status and sense.

Two initiators send the same random stream to two units that began alike.  To the first unit it goes through adapters
with the fast path (their C threads do what they may), to the second through adapters that put every command into
frames (the fabric's Python does all).  Beside them runs the device server on a bytearray, and a model that is a list
of letters.  Reads and writes of all lengths of CDB, wrong lengths and ranges, unmaps, compare-and-write, task
attributes, formats, reservations of both kinds, write protection, resets: whatever one of them says, all of them say.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.lab.san import San, UnitSpec
from tests.process.driving import TEST_UNIT_READY, ready
from tests.scsi.conftest import Medium, Target, identity
from vhostfc.frontend.driver import Response, ScsiDriver
from vhostfc.scsi.task import Nexus, TaskManagement
from vhostfc.virtio import scsi

T = TypeVar("T")

BLOCKS, SIZE = 256, 512
#: What commands reach for: a few stripes of the latch and the last blocks.
FLAGS = st.sampled_from((0, 0, 0x08, 0x10, 0x20))
LBAS = st.one_of(st.integers(0, 20), st.integers(BLOCKS - 12, BLOCKS + 2))
COUNTS, LETTERS, SENDERS = st.integers(0, 9), st.integers(0, 3), st.integers(0, 1)
#: The task attributes of virtio-scsi, and FCP's numbers for them.
ATTRIBUTES = {scsi.TaskAttribute.SIMPLE: 0, scsi.TaskAttribute.ORDERED: 2, scsi.TaskAttribute.HEAD_OF_QUEUE: 1}
#: Service actions of PERSISTENT RESERVE OUT, and the types of persistent reservations.
REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT, IGNORE = range(7)
KINDS = st.sampled_from((1, 3, 5, 6, 7, 8))
NEXUSES = (Nexus(b"one", 1), Nexus(b"two", 1))
MEDIA = {"memory": "", "file": 'file = "{directory}/disk{lun}"\n'}


def block(letter: int) -> bytes:
    return bytes([letter]) * SIZE


class World:
    """Drivers of four adapters, in a thread of their own: [initiator][0: fast, 1: frames]."""

    def __init__(self, san: San) -> None:
        self.san = san
        self.drivers: list[list[ScsiDriver]] = []
        self._token: trio.lowlevel.TrioToken | None = None
        self._started = threading.Event()
        self._end: trio.Event | None = None
        self._thread = threading.Thread(target=trio.run, args=(self._main,), daemon=True)

    async def _main(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            found = [
                await stack.enter_async_context(ScsiDriver.open(self.san.socket(number), regions=(4 << 20,)))
                for number in (1, 2, 3, 4)
            ]
            self.drivers = [[found[0], found[2]], [found[1], found[3]]]
            self._token, self._end = trio.lowlevel.current_trio_token(), trio.Event()
            self._started.set()
            await self._end.wait()

    def __enter__(self) -> World:
        self._thread.start()
        assert self._started.wait(30), "the drivers do not start"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        assert self._end is not None
        self._token.run_sync_soon(self._end.set)
        self._thread.join(30)

    def run(self, call: Callable[..., Awaitable[T]], *args: object) -> T:
        result: T = trio.from_thread.run(call, *args, trio_token=self._token)
        return result

    async def send(
        self, sender: int, cdb: bytes, data: bytes = b"", room: int = 0, attribute: int = 0
    ) -> tuple[Response, Response]:
        """To both units, one after the other."""
        fast, frames = self.drivers[sender]
        return (
            await fast.command(0, 0, cdb, data, room, attribute),
            await frames.command(0, 1, cdb, data, room, attribute),
        )

    async def reset(self, sender: int) -> tuple[int, int]:
        fast, frames = self.drivers[sender]
        subtype = scsi.TmfSubtype.LOGICAL_UNIT_RESET
        return await fast.manage(subtype, 0, 0), await frames.manage(subtype, 0, 1)

    async def clean(self) -> None:
        """As at the beginning: nothing reserved, the default mode pages, zeros, nothing pending."""
        register = bytes([0x5F, 6, 0, 0, 0, 0, 0, 0, 24, 0]), bytes(15) + b"\x09" + bytes(8)
        clear = bytes([0x5F, 3, 0, 0, 0, 0, 0, 0, 24, 0]), bytes(7) + b"\x09" + bytes(16)
        zeros = bytes([0x93, 0x01, *bytes(8), *BLOCKS.to_bytes(4, "big"), 0, 0]), b""
        await self.reset(0)
        for pair in self.drivers:
            for lun, driver in enumerate(pair):
                await ready(driver, lun)
        for cdb, data in (register, clear, zeros):
            for answer in await self.send(0, cdb, data):
                assert answer.good, answer
        for pair in self.drivers:
            for lun, driver in enumerate(pair):
                await ready(driver, lun)


@pytest.fixture(scope="module", params=list(MEDIA))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory: Path = tmp_path_factory.mktemp(request.param)
    medium = MEDIA[request.param]
    units = [UnitSpec(lun, medium.format(directory=directory, lun=lun) + f"size = {BLOCKS * SIZE}") for lun in (0, 1)]
    with San(directory, units) as san:
        san.start_adapters({n: {} if n < 3 else {"fabric": "fast_path = false"} for n in (1, 2, 3, 4)})
        with World(san) as running:
            yield running


class Streams(RuleBasedStateMachine):
    """See the head of the file."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    @initialize()
    def begin(self) -> None:
        self.world.run(self.world.clean)
        cached = self.mode_sense_from(0)
        self.target = Target(identity(write_cache=cached, physical_exponent=3 * cached), Medium(BLOCKS))
        for nexus in NEXUSES:
            self.target.unit.attach(nexus)
            self.target.send(TEST_UNIT_READY, nexus=nexus)
        self.model = [0] * BLOCKS

    def mode_sense_from(self, sender: int) -> bool:
        """Has the unit a cache?"""
        answer, _ = self.world.run(self.world.send, sender, bytes([0x1A, 8, 8, 0, 24, 0]), b"", 24)
        return bool(answer.data_in[6] & 0x04)

    def send(
        self, sender: int, cdb: bytes, data: bytes = b"", room: int = 0, attribute: int = 0, *, skip: int = 0
    ) -> bool:
        """All three; True when the answer is GOOD.  skip: bytes of data-in that only the real units agree about."""
        fast, frames = self.world.run(self.world.send, sender, cdb, data, room, attribute)
        assert dataclasses.replace(fast, used_length=0) == dataclasses.replace(frames, used_length=0), cdb.hex()
        if fast.response == scsi.Response.OVERRUN:
            return False
        assert fast.response == scsi.Response.OK
        code = ATTRIBUTES[scsi.TaskAttribute(attribute)]
        expected = self.target.send(cdb, data, nexus=NEXUSES[sender], attribute=code)
        assert (fast.status, fast.sense) == (expected.status, expected.sense), cdb.hex()
        assert fast.data_in[skip:] == expected.data_in[:room][skip:], cdb.hex()
        return fast.good

    def fits(self, lba: int, count: int) -> bool:
        return lba + count <= BLOCKS

    # ------------------------------------------------------------ reading and writing

    @rule(
        sender=SENDERS, lba=LBAS, count=COUNTS, letter=LETTERS, attribute=st.sampled_from(list(ATTRIBUTES)),
        opcode=st.sampled_from((0x0A, 0x2A, 0xAA, 0x8A, 0x7F, 0x2E, 0x9C)), flags=FLAGS,
        over=st.sampled_from((0, 0, 0, 0, SIZE, -SIZE, 100)),
    )  # fmt: skip
    def write(
        self, sender: int, lba: int, count: int, letter: int, attribute: int, opcode: int, flags: int, over: int
    ) -> None:
        cdb = media_cdb(opcode, lba, count, flags, 0x0B)
        wanted = (count or 256) if opcode == 0x0A else count
        data = block(letter) * wanted
        data = data + b"!" * over if over >= 0 else data[:over]
        if self.send(sender, cdb, data, attribute=attribute):
            assert self.fits(lba, wanted)
            self.model[lba : lba + wanted] = [letter] * wanted

    @rule(
        sender=SENDERS, lba=LBAS, count=COUNTS, attribute=st.sampled_from(list(ATTRIBUTES)),
        opcode=st.sampled_from((0x08, 0x28, 0xA8, 0x88, 0x7F)), flags=FLAGS,
        over=st.sampled_from((0, 0, 0, SIZE, -SIZE, 100)),
    )  # fmt: skip
    def read(self, sender: int, lba: int, count: int, attribute: int, opcode: int, flags: int, over: int) -> None:
        wanted = (count or 256) if opcode == 0x08 else count
        room = max(0, wanted * SIZE + over)
        if self.send(sender, media_cdb(opcode, lba, count, flags, 0x09), room=room, attribute=attribute):
            assert self.fits(lba, wanted)

    @rule(sender=SENDERS, lba=st.integers(0, 20), count=st.integers(1, 9), letter=LETTERS)
    def write_the_fast_way(self, sender: int, lba: int, count: int, letter: int) -> None:
        """If anything lets it: nothing pends, nothing is odd."""
        self.hear(sender)
        if self.send(sender, media_cdb(0x2A, lba, count, 0, 0), block(letter) * count):
            self.model[lba : lba + count] = [letter] * count

    @rule(sender=SENDERS, lba=st.integers(0, 20), count=st.integers(1, 9))
    def read_the_fast_way(self, sender: int, lba: int, count: int) -> None:
        self.hear(sender)
        self.send(sender, media_cdb(0x28, lba, count, 0, 0), room=count * SIZE)

    def hear(self, sender: int) -> None:
        """Take what pends."""
        for _ in range(8):
            if self.send(sender, TEST_UNIT_READY):
                return

    @rule(sender=SENDERS, lba=LBAS, count=COUNTS, letter=LETTERS, unmap=st.booleans())
    def write_same(self, sender: int, lba: int, count: int, letter: int, unmap: bool) -> None:
        if self.send(sender, bytes([0x41, 8 * unmap, *lba.to_bytes(4, "big"), 0, 0, count, 0]), block(letter)):
            self.model[lba : lba + count] = [letter] * count

    @rule(sender=SENDERS, lba=LBAS, count=COUNTS)
    def unmap(self, sender: int, lba: int, count: int) -> None:
        data = bytes([0, 22, 0, 16, 0, 0, 0, 0]) + lba.to_bytes(8, "big") + count.to_bytes(4, "big") + bytes(4)
        if self.send(sender, bytes([0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]), data):
            self.model[lba : lba + count] = [0] * count

    @rule(sender=SENDERS, lba=LBAS, count=COUNTS, expected=LETTERS, letter=LETTERS)
    def compare_and_write(self, sender: int, lba: int, count: int, expected: int, letter: int) -> None:
        cdb = bytes([0x89, 0, *lba.to_bytes(8, "big"), 0, 0, 0, count, 0, 0])
        if self.send(sender, cdb, block(expected) * count + block(letter) * count):
            assert self.model[lba : lba + count] == [expected] * count
            self.model[lba : lba + count] = [letter] * count

    @rule(sender=SENDERS, lba=LBAS, count=COUNTS, letter=LETTERS)
    def orwrite(self, sender: int, lba: int, count: int, letter: int) -> None:
        if self.send(sender, media_cdb(0x8B, lba, count, 0, 0), block(letter) * count):
            self.model[lba : lba + count] = [old | letter for old in self.model[lba : lba + count]]

    @rule(sender=SENDERS, lba=LBAS, count=COUNTS, letter=LETTERS)
    def verify(self, sender: int, lba: int, count: int, letter: int) -> None:
        if self.send(sender, media_cdb(0x2F, lba, count, 0x02, 0), block(letter) * count):
            assert self.model[lba : lba + count] == [letter] * count

    @rule(sender=SENDERS, opcode=st.sampled_from((0x35, 0x91)), lba=LBAS, count=COUNTS)
    def synchronize_cache(self, sender: int, opcode: int, lba: int, count: int) -> None:
        self.send(sender, media_cdb(opcode, lba, count, 0, 0))

    @rule(sender=SENDERS, pattern=st.booleans())
    def format_unit(self, sender: int, pattern: bool) -> None:
        cdb, data = (
            bytes([0x04, 0x10 * pattern, 0, 0, 0, 0]),
            bytes.fromhex("00 88 0000 00 01 0001 03") if pattern else b"",
        )
        if self.send(sender, cdb, data):
            self.model[:] = [3 * pattern] * BLOCKS

    @rule(sender=SENDERS)
    def test_unit_ready(self, sender: int) -> None:
        self.send(sender, TEST_UNIT_READY)

    @rule(sender=SENDERS, opcode=st.sampled_from((0x03, 0x25, 0x1A)))
    def ask(self, sender: int, opcode: int) -> None:
        cdb = {0x03: "03 00 00 00 12 00", 0x25: "25 00 00000000 0000 00 00", 0x1A: "1a 08 3f 00 ff 00"}[opcode]
        self.send(sender, bytes.fromhex(cdb), room=255)

    # ------------------------------------------------------------ who may do what

    @rule(
        sender=SENDERS,
        action=st.sampled_from((REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT, IGNORE)),
        key=st.integers(0, 2),
        new=st.integers(0, 2),
        kind=KINDS,
    )
    def persistent_reserve_out(self, sender: int, action: int, key: int, new: int, kind: int) -> None:
        self.out(sender, action, key, new, kind)

    def out(self, sender: int, action: int, key: int, new: int = 0, kind: int = 0) -> bool:
        data = key.to_bytes(8, "big") + new.to_bytes(8, "big") + bytes(8)
        return self.send(sender, bytes([0x5F, action, kind, 0, 0, 0, 0, 0, 24, 0]), data)

    @rule(sender=SENDERS, kind=KINDS, both=st.booleans())
    def make_a_reservation(self, sender: int, kind: int, both: bool) -> None:
        """One that succeeds, if there is none: the other one is registered too, or not."""
        for one in (sender, 1 - sender) if both else (sender,):
            self.hear(one)
            self.out(one, IGNORE, 0, 1 + one)
        self.out(sender, RESERVE, 1 + sender, 0, kind)

    @rule(sender=SENDERS, kind=KINDS, abort=st.booleans())
    def preempt_the_other(self, sender: int, kind: int, abort: bool) -> None:
        self.hear(sender)
        self.out(sender, IGNORE, 0, 1 + sender)
        self.out(sender, PREEMPT + abort, 1 + sender, 2 - sender, kind)

    @rule(sender=SENDERS)
    def clear_reservations(self, sender: int) -> None:
        self.hear(sender)
        self.out(sender, IGNORE, 0, 1 + sender)
        self.out(sender, CLEAR, 1 + sender)

    @rule(sender=SENDERS, action=st.sampled_from((0, 1)))
    def persistent_reserve_in(self, sender: int, action: int) -> None:
        self.send(sender, bytes([0x5E, action, 0, 0, 0, 0, 0, 0, 255, 0]), room=255, skip=4)

    @rule(sender=SENDERS, opcode=st.sampled_from((0x16, 0x17, 0x57)))
    def reserve_or_release(self, sender: int, opcode: int) -> None:
        self.send(sender, bytes([opcode, *bytes(9 if opcode == 0x57 else 5)]))

    @rule(sender=SENDERS, protect=st.booleans(), descriptors=st.booleans())
    def mode_select(self, sender: int, protect: bool, descriptors: bool) -> None:
        control = bytes([0x0A, 0x0A, 0x02 | 0x04 * descriptors, 0x10, 0x08 * protect, 0x40, 0, 0, 0xFF, 0xFF, 0, 0])
        self.send(sender, bytes([0x15, 0x10, 0, 0, 16, 0]), bytes(4) + control)

    @rule(sender=SENDERS)
    def logical_unit_reset(self, sender: int) -> None:
        fast, frames = self.world.run(self.world.reset, sender)
        assert fast == frames
        self.target.manage(TaskManagement.LOGICAL_UNIT_RESET, NEXUSES[sender])

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        if hasattr(self, "target"):
            assert self.target.medium.data == b"".join(map(block, self.model))


def media_cdb(opcode: int, lba: int, count: int, flags: int, action: int) -> bytes:
    """A command's CDB, by its opcode's length; action: the service action of one of 32 bytes."""
    match opcode >> 5:
        case 0:
            return bytes([opcode, *lba.to_bytes(3, "big"), count, 0])
        case 1:
            return bytes([opcode, flags, *lba.to_bytes(4, "big"), 0, *count.to_bytes(2, "big"), 0])
        case 5:
            return bytes([opcode, flags, *lba.to_bytes(4, "big"), *count.to_bytes(4, "big"), 0, 0])
        case 3:
            head = bytes([opcode, 0, 0, 0, 0, 0, 0, 0x18, 0, action, flags, 0])
            return head + lba.to_bytes(8, "big") + bytes(8) + count.to_bytes(4, "big")
        case _:
            return bytes([opcode, flags, *lba.to_bytes(8, "big"), *count.to_bytes(4, "big"), 0, 0])


def play(world: World, examples: int, steps: int) -> None:
    before = world.san.status(1)["counters"]["fast"]

    class Here(Streams):
        def __init__(self) -> None:
            super().__init__(world)

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert world.san.status(1)["counters"]["fast"] > before, "nothing went the fast way"
    assert world.san.status(3)["counters"]["fast"] == 0


def test_the_fast_path_and_the_frames_say_the_same(world: World) -> None:
    play(world, 25, 40)


@pytest.mark.long
def test_the_fast_path_and_the_frames_say_the_same_for_long(world: World) -> None:
    play(world, 1000, 60)
