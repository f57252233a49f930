"""What is fuzzed: a function of bytes that raises when something is wrong, and the bytes to begin with.

A target's property is in its function.  Of a codec: whatever comes is a value or the room's own error, and a value
that was decoded is decoded again, the same, from its encoding.  Of a door: whatever comes, nothing is raised, the
tables stay as small as they should, and a port that behaves is served afterwards as before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

#: The longest input: a few frames, or the longest message of any codec here.
LONGEST = 4608
#: Steps of one script; more make it slower, not better.
MOST_STEPS = 48
_HEADER, _MAX_FRAME = 24, 2136


@dataclass(frozen=True)
class Target:
    """seeds: made by encoders of ours and from frames of Linux, so that nothing binary has to be kept."""

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


class Packable(Protocol):
    def pack(self) -> bytes: ...


V = TypeVar("V")
P = TypeVar("P", bound=Packable)


def attempt(decode: Callable[[], V], *errors: type[Exception]) -> V | None:
    """The value, or None for an error that the codec may answer with; any other goes through, as a finding."""
    try:
        return decode()
    except errors:
        return None


def same(value: P, decode: Callable[[bytes], P]) -> None:
    """The value is read again from what it is written as."""
    again = decode(value.pack())
    assert again == value, f"{value!r} comes back as {again!r}"


@dataclass
class Cases:
    """A target of several decoders: the first byte says which, the rest is for it.

    decoders: what to do with the bytes, by name.  seeds: a name, and bytes for it.
    """

    decoders: dict[str, Callable[[bytes], None]]
    seeds: Callable[[], Iterable[tuple[str, bytes]]]

    def run(self, data: bytes) -> None:
        if data:
            decoders = list(self.decoders.values())
            decoders[data[0] % len(decoders)](data[1:])

    def corpus(self) -> Iterator[bytes]:
        numbers = {name: number for number, name in enumerate(self.decoders)}
        for name, data in self.seeds():
            yield bytes([numbers[name]]) + data

    def target(self, name: str) -> Target:
        return Target(name, self.run, self.corpus)


@dataclass(frozen=True)
class Step:
    """One thing that happens at a door."""

    what: int
    data: bytes = b""

    def pack(self) -> bytes:
        return bytes([self.what]) + len(self.data).to_bytes(2, "big") + self.data

    @classmethod
    def each(cls, script: bytes) -> Iterator[Self]:
        """The steps of a script: whatever bytes it is, it has some; the last may be cut short."""
        at = 0
        while at + 3 <= len(script):
            end = at + 3 + int.from_bytes(script[at + 1 : at + 3], "big")
            yield cls(script[at], script[at + 3 : end])
            at = end


def script(*told: tuple[int, bytes]) -> bytes:
    return b"".join(Step(what, data).pack() for what, data in told)


def steps(data: bytes) -> Iterator[Step]:
    """Those of a script that are played."""
    return itertools.islice(Step.each(data), MOST_STEPS)


def whole(data: bytes) -> bytes:
    """As long as an FC frame has to be."""
    cut = data[:_MAX_FRAME].ljust(_HEADER, b"\0")
    return cut + bytes(-len(cut) % 4)
