"""The fuzzed targets with their seeds, a short run of the fuzzer over all of them, and that it finds what is there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.target import Step, script
from tests.fuzz.targets import ALL

ROOT = Path(__file__).parents[2]
#: Executions of each target in the short run; some ten seconds together.
RUNS = 1000


needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has wheels for x86-64 only, and is not installed here"
)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=115, check=False)


@pytest.mark.parametrize("name", ALL)
def test_every_seed_is_a_story_without_a_finding(name: str) -> None:
    seeds = list(ALL[name].seeds())
    assert len(seeds) > 5
    for seed in seeds:
        ALL[name].run(seed)
        ALL[name].run(seed[: len(seed) // 2])
    ALL[name].run(b"")


def test_a_script_is_read_as_it_was_written_and_any_bytes_are_one() -> None:
    assert list(Step.each(script((1, b"ab"), (2, b"")))) == [Step(1, b"ab"), Step(2)]
    assert list(Step.each(b"\x07\xff\xffabc")) == [Step(7, b"abc")]
    assert list(Step.each(b"\x07\xff")) == []


@needs_atheris
def test_a_short_run_finds_nothing(tmp_path: Path) -> None:
    run = python("-m", "tests.fuzz", "all", "--runs", str(RUNS), "--directory", str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(ALL)
    for line in lines:
        assert f" {RUNS:,} executions" in line, line


@needs_atheris
def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    """A decoder that fails behind two comparisons, which bytes at random would not pass in this many tries."""
    (tmp_path / "wrong.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from tests.fuzz import engine\n"
        "from tests.fuzz.target import Target\n"
        "engine.load()\n"
        "def run(data):\n"
        "    if len(data) > 8 and data[3] == 0x51:\n"
        "        if data[5] == 0xA7:\n"
        "            raise IndexError('as a codec must not')\n"
        "target = Target('wrong', engine.atheris.instrument_func(run), lambda: [bytes(12)])\n"
        f"report = engine.fuzz(target, engine.Plan(Path({str(tmp_path)!r}), runs=200_000))\n"
        "print(report)\n"
        "data = report.finding.read_bytes()\n"
        "assert (data[3], data[5]) == (0x51, 0xA7)\n"
        "sys.exit(report.status)\n"
    )
    run = python(str(tmp_path / "wrong.py"))
    assert run.returncode not in {0, 1}, run.stdout + run.stderr
    assert "FINDING" in run.stdout
    assert "as a codec must not" in (tmp_path / "wrong" / "log").read_text()


@needs_atheris
def test_a_target_that_is_not_there_is_a_usage_error() -> None:
    run = python("-m", "tests.fuzz", "nonsense")
    assert run.returncode == 2
    assert "no target 'nonsense'; there are: frame, " in run.stderr
