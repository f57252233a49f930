"""Any command at all, and long streams of them, against a model that a child could write."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.scsi.conftest import ALICE, BOB, Medium, Target, describe, identity, target
from vhostfc.scsi.cdb import COMMANDS, Command
from vhostfc.scsi.task import Hold, Read, Write

BLOCKS = 24
SIZE = 512


@st.composite
def cdbs(draw: st.DrawFn) -> bytes:
    """Often a CDB that is nearly right: an opcode of the table, bits that it knows, a small address or a huge one."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=32))
    command: Command = draw(st.sampled_from(COMMANDS))
    noise = draw(st.binary(min_size=len(command.usage), max_size=len(command.usage)))
    strict = draw(st.booleans())
    raw = bytearray(a & b for a, b in zip(noise, command.usage, strict=True)) if strict else bytearray(noise)
    if draw(st.booleans()):  # small numbers: zero all but the last two bytes in front of CONTROL, and the address
        raw[2:-3] = bytes(len(raw) - 5)
        raw[-3] &= 0x0F
    raw[0] = command.opcode
    if command.service_action is not None:
        raw[1] = command.service_action
    if draw(st.integers(0, 3)):
        raw[-1] &= 0xC0
    return bytes(raw)


def check(one: Target, cdb: bytes, data: bytes) -> None:
    """Whatever it is: a status, well-formed sense, nothing outside the medium (the medium asserts it)."""
    result = one.send(cdb, data)
    if result.status == 0x02:
        describe(result.sense)
        assert not result.data_in
    else:
        assert result.status in (0x00, 0x18)
        assert result.sense == b""
    if any(isinstance(effect, Write) for effect in one.effects) and any(
        isinstance(effect, Read) for effect in one.effects
    ):
        assert isinstance(one.effects[0], Hold)


@settings(max_examples=600, deadline=None)
@given(st.lists(st.tuples(cdbs(), st.binary(max_size=1200)), min_size=1, max_size=8))
def test_no_command_is_an_exception(commands: list[tuple[bytes, bytes]]) -> None:
    one = target(blocks=BLOCKS)
    for cdb, data in commands:
        check(one, cdb, data)


@settings(max_examples=200, deadline=None)
@given(cdbs(), st.binary(max_size=300))
def test_no_command_is_an_exception_where_there_is_no_disk(cdb: bytes, data: bytes) -> None:
    one = target(blocks=BLOCKS)
    for server in (one.absent, one.well_known):
        result = one.send(cdb, data, at=server)
        assert result.status in (0x00, 0x02)
        if result.status:
            describe(result.sense)
        assert one.effects == []


@settings(max_examples=300, deadline=None)
@given(st.sampled_from((0x15, 0x55)), st.binary(max_size=80), st.integers(0, 1), st.integers(0x10, 0x11))
def test_no_mode_parameter_list_is_an_exception(opcode: int, data: bytes, short: int, flags: int) -> None:
    one = target(blocks=BLOCKS)
    length = min(len(data) + short, 255)
    cdb = bytes([opcode, flags, 0, 0, length, 0] if opcode == 0x15 else [opcode, flags, 0, 0, 0, 0, 0, 0, length, 0])
    check(one, cdb, data)
    one.good("1a 00 3f 00 ff 00")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100))
def test_no_unmap_list_is_an_exception(data: bytes) -> None:
    one = target(blocks=BLOCKS)
    check(one, bytes([0x42, 0, 0, 0, 0, 0, 0, 0, len(data), 0]), data)


class Streams(RuleBasedStateMachine):
    """Writes of all kinds from two nexuses to one disk; the model is a list of blocks."""

    lbas = st.integers(0, BLOCKS - 1)
    counts = st.integers(0, 6)
    letters = st.integers(0, 3)  # 0: zeros

    @initialize(thin=st.booleans(), cache=st.booleans())
    def begin(self, thin: bool, cache: bool) -> None:
        self.names = identity(thin=thin, write_cache=cache)
        self.target = Target(self.names, Medium(BLOCKS))
        self.model = [0] * BLOCKS
        for nexus in (ALICE, BOB):
            self.target.unit.attach(nexus)
            self.target.send("00 00 00 00 00 00", nexus=nexus)

    def block(self, letter: int) -> bytes:
        return bytes([letter]) * SIZE

    def fits(self, lba: int, count: int) -> bool:
        return lba + count <= BLOCKS

    @rule(lba=lbas, count=counts, letter=letters, bob=st.booleans(), opcode=st.sampled_from((0x2A, 0x2E)))
    def write(self, lba: int, count: int, letter: int, bob: bool, opcode: int) -> None:
        cdb = bytes([opcode, 0, 0, 0, 0, lba, 0, 0, count, 0])
        result = self.target.send(cdb, self.block(letter) * count, nexus=BOB if bob else ALICE)
        assert (result.status == 0) == self.fits(lba, count)
        if result.status == 0:
            self.model[lba : lba + count] = [letter] * count

    @rule(lba=lbas, count=counts)
    def read(self, lba: int, count: int) -> None:
        result = self.target.send(bytes([0x28, 0, 0, 0, 0, lba, 0, 0, count, 0]))
        assert (result.status == 0) == self.fits(lba, count)
        if result.status == 0:
            assert result.data_in == b"".join(self.block(letter) for letter in self.model[lba : lba + count])

    @rule(lba=lbas, count=st.integers(1, 6), letter=letters, unmap=st.booleans())
    def write_same(self, lba: int, count: int, letter: int, unmap: bool) -> None:
        result = self.target.send(bytes([0x41, 0x08 * unmap, 0, 0, 0, lba, 0, 0, count, 0]), self.block(letter))
        assert (result.status == 0) == (self.fits(lba, count) and (not unmap or self.names.thin))
        if result.status == 0:
            self.model[lba : lba + count] = [letter] * count

    @rule(ranges=st.lists(st.tuples(lbas, counts), max_size=3))
    def unmap(self, ranges: list[tuple[int, int]]) -> None:
        size = 16 * len(ranges)
        data = (size + 6).to_bytes(2, "big") + size.to_bytes(2, "big") + bytes(4)
        data += b"".join(bytes(7) + bytes([lba, 0, 0, 0, count]) + bytes(4) for lba, count in ranges)
        result = self.target.send(bytes([0x42, 0, 0, 0, 0, 0, 0, 0, len(data), 0]), data)
        assert (result.status == 0) == (self.names.thin and all(self.fits(*one) for one in ranges))
        if result.status == 0:
            for lba, count in ranges:
                self.model[lba : lba + count] = [0] * count

    @rule(lba=lbas, count=counts, expected=letters, letter=letters)
    def compare_and_write(self, lba: int, count: int, expected: int, letter: int) -> None:
        cdb = bytes([0x89, 0, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, count, 0, 0])
        result = self.target.send(cdb, self.block(expected) * count + self.block(letter) * count)
        equal = self.model[lba : lba + count] == [expected] * count
        assert (result.status == 0) == (self.fits(lba, count) and equal)
        if result.status == 0:
            self.model[lba : lba + count] = [letter] * count

    @rule(lba=lbas, count=counts, letter=letters)
    def orwrite(self, lba: int, count: int, letter: int) -> None:
        cdb = bytes([0x8B, 0, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, count, 0, 0])
        if self.target.send(cdb, self.block(letter) * count).status == 0:
            self.model[lba : lba + count] = [old | letter for old in self.model[lba : lba + count]]

    @rule(lba=lbas, count=st.integers(1, 6), letter=letters)
    def verify(self, lba: int, count: int, letter: int) -> None:
        result = self.target.send(bytes([0x2F, 0x06, 0, 0, 0, lba, 0, 0, count, 0]), self.block(letter))
        equal = self.model[lba : lba + count] == [letter] * count
        assert (result.status == 0) == (self.fits(lba, count) and equal)

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        if hasattr(self, "target"):
            assert self.target.medium.data == b"".join(self.block(letter) for letter in self.model)


Streams.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestStreams = Streams.TestCase
