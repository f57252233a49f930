"""The data path's tests in C: all under the address and undefined behaviour sanitizers, those with threads at work
under the thread sanitizer too.  Each runs in a process of its own; the program is compiled once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("native_build", HERE / "build.py")
assert _spec is not None
assert _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

SOURCES = {
    "address": (
        "malformed",
        "requests",
        "ordered",
        "mixed",
        "rings",
        "packed",
        "polling",
        "moves",
        "fencing",
        "paths",
        "cached",
        "losses",
        "generic",
        "kept",
        "memory",
        "together",
    ),
    "thread": (
        "ordered",
        "mixed",
        "rings",
        "packed",
        "polling",
        "moves",
        "fencing",
        "paths",
        "cached",
        "losses",
        "memory",
        "together",
    ),
}
#: Tests that are about commands, and so run over rings of each layout (see HARNESS_LAYOUT in harness.h).
COMMANDS = ("requests", "ordered", "mixed", "fencing", "paths", "generic", "kept", "memory")
#: Those of them that look into a split ring themselves.
OF_SPLIT_RINGS = {
    "abort_and_query_match",
    "a_stop_is_bounded_when_io_hangs",
    "a_path_that_does_not_let_go_is_waited_for",
}
LAYOUTS = ("", "indirect", "packed")
CASES = [
    pytest.param(sanitizer, name, layout, id="-".join(filter(None, (sanitizer, source, name, layout))))
    for sanitizer, sources in SOURCES.items()
    for source in sources
    for name in build.names(HERE / f"{source}.c")
    for layout in (LAYOUTS if source in COMMANDS and sanitizer == "address" else ("",))
    if layout != "packed" or name not in OF_SPLIT_RINGS
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The program under each sanitizer."""
    return {sanitizer: build.compile_tests(tmp_path_factory.mktemp(sanitizer), sanitizer) for sanitizer in SOURCES}


@pytest.mark.parametrize(("sanitizer", "name", "layout"), CASES)
def test_in_c(programs: dict[str, Path], sanitizer: str, name: str, layout: str) -> None:
    """See the test of that name."""
    environment = {**os.environ, **({"HARNESS_LAYOUT": layout} if layout else {})}
    environment |= {"ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [programs[sanitizer], name], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_test_is_forgotten() -> None:
    """A source file with tests is in the table above."""
    with_tests = {path.stem for path in HERE.glob("*.c") if build.names(path)}
    assert with_tests == set(SOURCES["address"])
