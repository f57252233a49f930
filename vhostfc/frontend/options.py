"""What `vhostfc bench` can be asked for, as a value that is right."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from vhostfc.errors import ConfigError

MIB = 1 << 20
#: --rw: (random, writes, reads).
WORKLOADS = {
    "randread": (True, False, True),
    "randwrite": (True, True, False),
    "randrw": (True, True, True),
    "read": (False, False, True),
    "write": (False, True, False),
}
MAX_BLOCK = 64 * MIB
MAX_RING = 1024
MIN_RING = 128
MAX_RUNS = 1000
#: How many request queues a vhost-user device can have beside control and event (the index is a byte).
MAX_QUEUES = 254

_SIZE = re.compile(r"(\d+)\s*([kmg]?)(?:i?b)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes: "4k", "1M", "512", "64KiB".  Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--bs: {text!r} is not a size; write 512, 4k or 1M")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2].lower()]


def parse_unit(text: str) -> tuple[int, int]:
    """(target, LUN) from "T:L".  Raises ConfigError."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None or int(match[1]) > 255 or int(match[2]) > 16383:
        raise ConfigError(f"--unit: {text!r} is not a unit; write TARGET:LUN, 0:0 to 255:16383")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to run; the checks that need no back end happen here, and raise ConfigError with every problem.

    rw: one of WORKLOADS.  block_size: bytes of a command.  iodepth: commands in flight on each of `queues` queues.
    seconds: measured in all, shared by `runs`, each after `warmup`; commands: a run ends after so many instead (0: by
    the clock alone).  unit: (target, LUN), needed for all that writes.  read_percent: of randrw.  verify: see bench().
    poll: spin instead of sleeping.  packed: packed rings.  null_path: also without a back end.  bare_copy: also what
    copying as much from random places costs.
    """

    rw: str = "randread"
    block_size: int = 4096
    iodepth: int = 32
    queues: int = 1
    seconds: float = 10.0
    unit: tuple[int, int] | None = None
    verify: bool = False
    warmup: float = 0.5
    read_percent: int = 50
    poll: bool = False
    commands: int = 0
    seed: int = 1
    runs: int = 1
    packed: bool = False
    null_path: bool = False
    bare_copy: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.rw not in WORKLOADS:
            problems.append(f"--rw: {self.rw!r} is unknown; one of {', '.join(WORKLOADS)}")
        if not 512 <= self.block_size <= MAX_BLOCK or self.block_size % 512:
            problems.append(f"--bs: {self.block_size} bytes; a multiple of 512, at most {MAX_BLOCK // MIB}M")
        if not 1 <= self.iodepth <= MAX_RING:
            problems.append(f"--iodepth: {self.iodepth}; 1 to {MAX_RING}")
        if not 1 <= self.queues <= MAX_QUEUES:
            problems.append(f"--queues: {self.queues}; 1 to {MAX_QUEUES}")
        if not (math.isfinite(self.seconds) and self.seconds > 0) and not self.commands:
            problems.append(f"--seconds: {self.seconds}; more than 0")
        if not 1 <= self.runs <= MAX_RUNS:
            problems.append(f"--runs: {self.runs}; 1 to {MAX_RUNS}")
        if not 0 <= self.read_percent <= 100:
            problems.append(f"--read-percent: {self.read_percent}; 0 to 100")
        if self.rw in WORKLOADS and self.writes and self.unit is None:
            why = f"--rw {self.rw} writes" if WORKLOADS[self.rw][1] else "--verify writes the blocks that it checks"
            problems.append(f"--unit: {why}, so it must be told where: --unit TARGET:LUN destroys that unit's data")
        if problems:
            raise ConfigError(*problems)

    @property
    def writes(self) -> bool:
        """Whether this destroys data."""
        return WORKLOADS[self.rw][1] or self.verify

    @property
    def ring_size(self) -> int:
        """Entries of each request ring."""
        return max(MIN_RING, 1 << (self.iodepth - 1).bit_length())

    @property
    def percent(self) -> int:
        """Reads, per cent."""
        _, writes, reads = WORKLOADS[self.rw]
        return self.read_percent if writes and reads else 100 if reads else 0
