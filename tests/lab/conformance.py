"""libiscsi's SCSI conformance suite, iscsi-test-cu, in a guest: each test in a process of its own, judged honestly.

A process a test, so that one that hangs or dies costs only itself and leaves no state to the next; many
tests in one command to the guest, since each command costs a round trip.  The tool counts a skipped test as
passed; here it is a verdict of its own.

By hand, from the top of the source tree, against an adapter that runs (its first unit, or --device):

    python -m tests.lab.conformance [--only GLOB] [--device /dev/sdX]... SOCKET...
"""

from __future__ import annotations

import argparse
import enum
import re
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tests.lab.guest import Guest, vhost_user_scsi
from tests.lab.packages import unpacked

#: Debian 12's, 1.19.
TOOL = "iscsi-test-cu"
#: Destructive tests too; SANITIZE too; say what is checked; one line for each command.
OPTIONS = "-d -S -v -V"
_NEWER = (
    *("libiscsi-bin", "libiscsi7", "libc6", "libcunit1", "libibverbs1", "librdmacm1t64"),
    *("libnl-3-200", "libnl-route-3-200", "libgcrypt20", "libgpg-error0"),
)
_MARK = "=-=-="
_EXIT_TIMEOUT = 124


class Verdict(enum.Enum):
    """PARTIAL: passed, but one of its checks was skipped.  ERROR: no verdict, it could not start or died."""

    PASSED = "passed"
    PARTIAL = "partial"
    SKIPPED = "skipped"
    FAILED = "failed"
    TIMEOUT = "timeout"
    ERROR = "error"

    @property
    def bad(self) -> bool:
        return self in {Verdict.FAILED, Verdict.TIMEOUT, Verdict.ERROR}


@dataclass(frozen=True, slots=True)
class Result:
    verdict: Verdict
    reason: str
    output: str


Results = Mapping[str, Result]


def judge(test: str, status: int, output: str) -> Result:
    """The verdict of one run of the tool, from its exit status and what it printed."""
    verdict = _verdict(test, status, output)
    return Result(verdict, _reason(verdict, output), output)


def _verdict(test: str, status: int, output: str) -> Verdict:
    if status == _EXIT_TIMEOUT:
        return Verdict.TIMEOUT
    # CUnit's summary: tests, total, ran, passed, failed.
    summary = re.search(r"^\s+tests\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)", output, re.MULTILINE)
    if not summary or summary[2] == "0":
        return Verdict.ERROR
    if summary[4] != "0":
        return Verdict.FAILED
    if "[SKIPPED]" not in _body(output):
        return Verdict.PASSED
    lacking = _reason(Verdict.SKIPPED, output).upper().replace("_", "")
    named = any(part.upper() in lacking for part in test.split("."))
    return Verdict.SKIPPED if "[OK]" not in _body(output) or named else Verdict.PARTIAL


def _body(output: str) -> str:
    return output.split("Test: ", 1)[-1].split("Run Summary", 1)[0]


def _reason(verdict: Verdict, output: str) -> str:
    """The line that says why."""
    if verdict is Verdict.PASSED:
        return ""
    patterns = {
        Verdict.FAILED: (r"\[FAILED\] *(.*)", r"^ +\d+\. (.*)"),
        Verdict.SKIPPED: (r"\[SKIPPED\] *(.*)",),
        Verdict.PARTIAL: (r"\[SKIPPED\] *(.*)",),
    }
    for pattern in patterns.get(verdict, ()):
        if found := re.search(pattern, output, re.MULTILINE):
            return found[1]
    return next((line for line in reversed(output.splitlines()) if line.strip()), "")


def newer_tool() -> str:
    """Debian 13's iscsi-test-cu, 1.20, with its libraries beside it, as a command."""
    root = unpacked("libiscsi-trixie", _NEWER, "trixie")
    libraries = root / "usr/lib/x86_64-linux-gnu"
    return f"{libraries}/ld-linux-x86-64.so.2 --library-path {libraries} {root}/usr/bin/iscsi-test-cu"


def list_tests(guest: Guest, tool: str = TOOL) -> list[str]:
    """All that the tool has, as "Suite.Test"."""
    _, output = guest.run(f"{tool} --list", 60)
    return [line[4:] for line in output.splitlines() if re.fullmatch(r"ALL\.[^.]+\.[^.]+", line)]


def run_suite(
    guest: Guest,
    devices: Sequence[str],
    *,
    only: str | Sequence[str] = "*",
    skip: Sequence[str] = (),
    each: int = 90,
    total: int = 900,
    tool: str = TOOL,
) -> dict[str, Result]:
    """Run the tests that `only` names and `skip` does not, in order.

    devices: one, or two paths to one unit.  each, total: seconds for one test and for all.
    """
    wanted = [only] if isinstance(only, str) else only
    tests = [
        test
        for test in list_tests(guest, tool)
        if any(fnmatch(test, one) for one in wanted) and not any(fnmatch(test, one) for one in skip)
    ]
    paths = " ".join(shlex.quote(device) for device in devices)
    script = (
        f"for t in {' '.join(tests)}; do echo '{_MARK}' $t;"
        f" timeout -k 2 {each} {tool} {OPTIONS} -t ALL.$t {paths} 2>&1; echo; echo '{_MARK}' $?; done"
    )
    _, output = guest.run(script, total)
    return split(tests, output)


def split(tests: Sequence[str], output: str) -> dict[str, Result]:
    """The results in the output of the loop above; a test without any is an ERROR."""
    parts = re.split(rf"^{_MARK} (.*)$", output, flags=re.MULTILINE)
    found = {}
    for name, body, status in zip(parts[1::4], parts[2::4], parts[3::4], strict=False):
        found[name] = judge(name, int(status), body)
    return {test: found.get(test, Result(Verdict.ERROR, "it did not run", "")) for test in tests}


def counts(results: Results) -> dict[str, int]:
    return dict(Counter(result.verdict.value for result in results.values()))


def report(results: Results, *, skipped: bool = False) -> str:
    """The figures, and a line for each test that did not pass."""
    lines = [", ".join(f"{count} {verdict}" for verdict, count in sorted(counts(results).items()))]
    for test, result in results.items():
        if result.verdict.bad or (skipped and result.verdict is not Verdict.PASSED):
            lines.append(f"{result.verdict.value:8} {test}: {result.reason}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab.conformance", description="Run iscsi-test-cu.")
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--device", action="append", default=[], metavar="PATH", help="in the guest; twice: two paths")
    parser.add_argument("--verbose", action="store_true", help="the output of tests that failed")
    parser.add_argument("socket", nargs="+", help="an adapter's socket")
    options = parser.parse_args(arguments)
    args = [word for n, path in enumerate(options.socket) for word in vhost_user_scsi(path, f"hba{n}")]
    with tempfile.TemporaryDirectory(prefix="vhostfc-") as workdir, Guest(args, workdir=Path(workdir)) as guest:
        results = run_suite(guest, options.device or ["/dev/sda"], only=options.only)
    print(report(results, skipped=True))
    for test, result in results.items():
        if options.verbose and result.verdict.bad:
            print(f"=== {test}\n{result.output}")
    return any(result.verdict.bad for result in results.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
