"""What the threads of another process have used: /proc/PID/task/TID/schedstat, in nanoseconds."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Thread:
    """name: the kernel's (comm).  seconds: on a CPU so far.  switches: times that it slept so far."""

    name: str
    seconds: float
    switches: int


def threads(pid: int, root: Path = PROC) -> dict[int, Thread]:
    """The threads of a process, by number; none when it cannot be seen."""
    found: dict[int, Thread] = {}
    with contextlib.suppress(OSError):
        for task in (root / str(pid) / "task").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):  # a thread that has just ended
                seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
                found[int(task.name)] = Thread(_text(task / "comm"), seconds, _switches(task / "status"))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _switches(path: Path) -> int:
    for line in _text(path).splitlines():
        name, _, value = line.partition(":")
        if name == "voluntary_ctxt_switches":
            return int(value)
    return 0


def process_cpu(pid: int, root: Path = PROC) -> float | None:
    """CPU seconds that a process has used so far, all its threads; None when that cannot be known."""
    there = threads(pid, root)
    return sum(thread.seconds for thread in there.values()) if there else None


def used(before: Mapping[int, Thread], after: Mapping[int, Thread]) -> dict[str, float]:
    """CPU seconds between two looks by thread; those of one name are told apart by a number, in order of birth."""
    spent: dict[str, float] = {}
    numbers: dict[str, int] = {}
    for number in sorted(after):
        thread = after[number]
        earlier = before[number].seconds if number in before else 0.0
        count = numbers[thread.name] = numbers.get(thread.name, 0) + 1
        spent[thread.name if count == 1 else f"{thread.name} {count}"] = thread.seconds - earlier
    return spent
