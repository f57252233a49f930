"""Runs targets under atheris (libFuzzer over Python's bytecode): one process a target, forked when all is imported.

The seeds are written anew each time; what the fuzzer adds to them is kept beside them when a run has a time instead
of a number of executions, and the next such run begins where it ended.  A run by number is the same each time.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.target import LONGEST, Target

try:
    import atheris
except ImportError:  # pragma: no cover
    sys.exit("fuzzing needs atheris, which is in the extra `test`: pip install atheris")

#: Megabytes that a target may grow to: what is instrumented takes 150 by itself.
RSS_LIMIT = 512
#: Seconds after which one input is a finding: what hangs is as bad as what raises.
HANG = 20


@dataclass(frozen=True)
class Plan:
    """How long: runs, or seconds when runs is 0.  directory: where seeds, corpora, findings and logs go."""

    directory: Path
    runs: int = 0
    seconds: int = 0
    seed: int = 1


@dataclass(frozen=True)
class Report:
    """executions: how many inputs were tried.  peak: megabytes.  finding: the file with the input that fails."""

    name: str
    executions: int
    seconds: float
    peak: int
    finding: Path | None
    log: Path
    status: int

    def __str__(self) -> str:
        fate = f"FINDING {self.finding}, see {self.log}" if self.finding else f"died, see {self.log}"
        what = "nothing found" if self.status == 0 else fate
        return f"{self.name:8} {self.executions:10,} executions in {self.seconds:6.1f} s, {self.peak} MB: {what}"


def load() -> Mapping[str, Target]:
    """All targets, with every module of ours instrumented."""
    told = io.StringIO()  # the name of each module
    with contextlib.redirect_stderr(told), atheris.instrument_imports(include=["vhostfc"]):
        from tests.fuzz import targets
    return targets.ALL


def fuzz(target: Target, plan: Plan) -> Report:
    """Fuzz one target in a process of its own, and wait for it."""
    home = plan.directory / target.name
    for stale in ("seeds", "findings"):
        shutil.rmtree(home / stale, ignore_errors=True)
    for needed in ("seeds", "findings", "corpus"):
        (home / needed).mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (home / "seeds" / f"{number:04}").write_bytes(data)
    log = home / "log"
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        # Ends the process: by itself, or by way of the interpreter's exit, where libFuzzer writes the finding.
        _fuzz(target, plan, home, log)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - begin
    said = log.read_text(errors="replace")
    findings = sorted((home / "findings").iterdir())
    return Report(
        name=target.name,
        executions=_number(r"number_of_executed_units:\s+(\d+)", said) or _number(r"#(\d+)\t(?!.*#)", said),
        seconds=seconds,
        peak=_number(r"peak_rss_mb:\s+(\d+)", said),
        finding=findings[0] if findings else None,
        log=log,
        status=os.waitstatus_to_exitcode(status),
    )


def _fuzz(target: Target, plan: Plan, home: Path, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    arguments = [
        target.name,
        f"-seed={plan.seed}",
        f"-max_len={LONGEST}",
        f"-rss_limit_mb={RSS_LIMIT}",
        f"-timeout={HANG}",
        f"-artifact_prefix={home / 'findings'}/",
        "-print_final_stats=1",
        "-reload=0",  # or the corpus is read again each second, and no two runs are the same
    ]
    if plan.runs:
        arguments += [f"-runs={plan.runs}", str(home / "seeds")]
    else:
        arguments += [f"-max_total_time={plan.seconds}", str(home / "corpus"), str(home / "seeds")]
    atheris.Setup(arguments, target.run)
    atheris.Fuzz()


def _number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0
