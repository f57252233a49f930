"""A medium of bytes and a runner of effects, with a device server on top: what the fabric is to a unit, in memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import pytest

from vhostfc.scsi.inquiry import Identity, TargetPort
from vhostfc.scsi.reservations import State
from vhostfc.scsi.server import AbsentUnit, DeviceServer, ReportLunsUnit
from vhostfc.scsi.task import (
    AbortTasks,
    At,
    Background,
    Effect,
    Extents,
    Fill,
    Flush,
    Hold,
    Keep,
    KeepNote,
    ManageSteps,
    MediumError,
    Nexus,
    Read,
    ScsiResult,
    ServiceResponse,
    Steps,
    TakeTurn,
    Task,
    TaskManagement,
    Write,
)
from vhostfc.scsi.unit import LogicalUnit

R = TypeVar("R", ScsiResult, ServiceResponse)

ALICE = Nexus(b"alice", 1)
BOB = Nexus(b"bob", 1)

NAA = bytes.fromhex("6001a4a000000000 0000000000000001")


@dataclass
class Medium:
    """A bytearray that knows which of its blocks are mapped, and which of them are broken."""

    blocks: int
    block_size: int = 512
    data: bytearray = field(init=False)
    mapped: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    full: bool = False
    kept: State | None = None
    forgetful: bool = False
    notes: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data = bytearray(self.blocks * self.block_size)

    def _span(self, lba: int, blocks: int) -> slice:
        assert lba >= 0
        assert blocks > 0
        assert lba + blocks <= self.blocks, f"{lba}+{blocks} is outside the medium"
        for block in range(lba, lba + blocks):
            if block in self.broken:
                raise MediumError(block)
        return slice(lba * self.block_size, (lba + blocks) * self.block_size)

    def do(self, effect: Effect) -> object:
        """What the runner does for an effect, and what it is answered with."""
        match effect:
            case Read(lba, blocks):
                return bytes(self.data[self._span(lba, blocks)])
            case Write(lba, data):
                assert len(data) % self.block_size == 0
                if self.full:
                    raise MediumError(lba, space=True)
                blocks = len(data) // self.block_size
                self.data[self._span(lba, blocks)] = data
                self.mapped.update(range(lba, lba + blocks))
            case Fill(lba, blocks, block, unmap):
                assert len(block) == self.block_size
                assert not unmap or not any(block)
                self.data[self._span(lba, blocks)] = block * blocks
                if unmap:
                    self.mapped.difference_update(range(lba, lba + blocks))
                else:
                    self.mapped.update(range(lba, lba + blocks))
            case Extents(lba, blocks):
                self._span(lba, blocks)
                runs: list[list[int]] = []
                for at in range(lba, lba + blocks):
                    state = at in self.mapped
                    if runs and bool(runs[-1][2]) == state:
                        runs[-1][1] += 1
                    else:
                        runs.append([at, 1, state])
                return [(start, count, bool(state)) for start, count, state in runs]
            case Hold(lba, blocks):
                self._span(lba, blocks)
            case Flush() | AbortTasks() | TakeTurn():
                pass
            case KeepNote(name, data):
                if not self.forgetful:
                    self.notes = {key: value for key, value in {**self.notes, name: data}.items() if value is not None}
                return not self.forgetful
            case Keep(state):
                if not self.forgetful:
                    self.kept = state
                return not self.forgetful
        return None


@dataclass
class Target:
    """Units, a medium under the disk, and a log of the effects."""

    identity: Identity
    medium: Medium
    numbers: tuple[int, ...] = (0,)
    others: list[Target] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    waiting: list[Generator[Effect, object, None]] = field(default_factory=list)
    answer: object = None

    def __post_init__(self) -> None:
        self.unit = LogicalUnit(self.identity, self.medium.blocks, self)
        self.absent = AbsentUnit(self)
        self.well_known = ReportLunsUnit(self, self.unit)

    def luns(self, nexus: Nexus) -> Iterable[int]:
        assert nexus
        return self.numbers

    def units(self, nexus: Nexus) -> Iterable[LogicalUnit]:
        assert nexus
        return [self.unit, *(one.unit for one in self.others)]

    def reported(self, nexus: Nexus) -> None:
        for server in (self.unit, self.absent, self.well_known):
            server.inventory_reported(nexus)

    def go_on(self, most: int | None = None) -> None:
        """Run what is in the background: to its end, or so many effects."""
        while self.waiting and most != 0:
            steps = self.waiting[0]
            try:
                self.answer = self._step(steps, self.answer)
            except StopIteration:
                self.waiting.pop(0)
                self.answer = None
            most = None if most is None else most - 1

    def _step(self, steps: Generator[Effect, object, None], answer: object) -> object:
        effect = steps.throw(answer) if isinstance(answer, MediumError) else steps.send(answer)
        self.effects.append(effect)
        try:
            return self.medium.do(effect)
        except MediumError as error:
            return error

    def run(self, steps: Steps | ManageSteps) -> ScsiResult | ServiceResponse:
        """All steps, one after the other."""
        answer: object = None
        failure: MediumError | None = None
        while True:
            try:
                effect = steps.throw(failure) if failure else steps.send(answer)
            except StopIteration as done:
                result: ScsiResult | ServiceResponse = done.value
                return result
            answer = failure = None
            if isinstance(effect, Background):
                self.waiting.append(effect.steps)
                if effect.wait:
                    self.go_on()
                continue
            self.effects.append(effect)
            medium = self.medium
            if isinstance(effect, At):
                medium = next(one.medium for one in self.others if one.unit is effect.unit)
                effect = effect.effect
            try:
                answer = medium.do(effect)
            except MediumError as error:
                failure = error

    def send(
        self,
        cdb: str | bytes,
        data_out: bytes = b"",
        *,
        nexus: Nexus = ALICE,
        at: DeviceServer | None = None,
        attribute: int = 0,
    ) -> ScsiResult:
        """One command; cdb in hexadecimal or as bytes."""
        raw = bytes.fromhex(cdb) if isinstance(cdb, str) else cdb
        self.effects.clear()
        result = self.run((at or self.unit).execute(Task(nexus, raw, data_out, attribute=attribute)))
        assert isinstance(result, ScsiResult)
        return result

    def good(
        self, cdb: str | bytes, data_out: bytes = b"", *, nexus: Nexus = ALICE, at: DeviceServer | None = None
    ) -> bytes:
        """The data-in of a command that must end in GOOD."""
        result = self.send(cdb, data_out, nexus=nexus, at=at)
        assert (result.status, result.sense) == (0x00, b"")
        return result.data_in

    def bad(
        self, cdb: str | bytes, data_out: bytes = b"", *, nexus: Nexus = ALICE, at: DeviceServer | None = None
    ) -> str:
        """The sense of a command that must end in CHECK CONDITION, as "5/24/00", with ":c2.5" for a field pointer.

        c or p: CDB or parameter list; the byte; the bit if there is one.
        """
        result = self.send(cdb, data_out, nexus=nexus, at=at)
        assert result.status == 0x02
        assert not result.data_in
        return describe(result.sense)

    def manage(self, function: TaskManagement, nexus: Nexus = ALICE) -> ServiceResponse:
        self.effects.clear()
        result = self.run(self.unit.manage(nexus, function))
        assert isinstance(result, ServiceResponse)
        return result


def describe(sense: bytes) -> str:
    """Fixed or descriptor format sense data in short; asserts that it is well formed.

    After "@" is INFORMATION, after "#" COMMAND-SPECIFIC INFORMATION, in hexadecimal.
    """
    code = sense[0] & 0x7F
    specific = b""
    information = None
    command_specific = 0
    if code == 0x70:
        assert len(sense) == 18 == sense[7] + 8
        key, asc, ascq = sense[2], sense[12], sense[13]
        if sense[0] & 0x80:
            information = int.from_bytes(sense[3:7], "big")
        command_specific = int.from_bytes(sense[8:12], "big")
        specific = sense[15:18] if sense[15] & 0x80 else b""
    else:
        assert code == 0x72
        assert len(sense) == sense[7] + 8
        key, asc, ascq = sense[1], sense[2], sense[3]
        rest = sense[8:]
        while rest:
            kind, length = rest[0], rest[1]
            body, rest = rest[2 : 2 + length], rest[2 + length :]
            if kind == 0x00:
                assert length == 0x0A
                assert body[0] == 0x80
                information = int.from_bytes(body[2:], "big")
            elif kind == 0x01:
                assert length == 0x0A
                command_specific = int.from_bytes(body[2:], "big")
            else:
                assert (kind, length) == (0x02, 0x06)
                specific = body[2:5]
    text = f"{key:X}/{asc:02X}/{ascq:02X}"
    if specific:
        text += f":{'c' if specific[0] & 0x40 else 'p'}{int.from_bytes(specific[1:], 'big')}"
        if specific[0] & 0x08:
            text += f".{specific[0] & 0x07}"
    if information is not None:
        text += f"@{information:X}"
    if command_specific:
        text += f"#{command_specific:X}"
    return text


def identity(**changes: object) -> Identity:
    """A disk's identity, with some of it changed."""
    values: dict[str, object] = {
        "serial": "SN0001",
        "naa": (NAA,),
        "product": "Software disk",
        "revision": "0001",
        "ports": (
            TargetPort(1, bytes.fromhex("5006016000000001")),
            TargetPort(2, bytes.fromhex("5006016000000002"), 2),
        ),
        "node": bytes.fromhex("5006016000000000"),
    }
    return Identity(**{**values, **changes})  # type: ignore[arg-type]


def target(blocks: int = 64, *, attach: bool = True, **changes: object) -> Target:
    """A target with one disk; ALICE and BOB are attached and have heard their power-on unit attentions."""
    names = identity(**changes)
    made = Target(names, Medium(blocks, names.block_size))
    if attach:
        for nexus in (ALICE, BOB):
            made.unit.attach(nexus)
            assert made.bad("00 00 00 00 00 00", nexus=nexus) == "6/29/01"
    return made


@pytest.fixture
def disk() -> Target:
    """64 blocks of 512 bytes, thin, with a cache."""
    return target()


@pytest.fixture
def make() -> Callable[..., Target]:
    """target(), for tests that want another disk."""
    return target
