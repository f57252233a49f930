"""The daemons' logs, in the report of a test that failed; and the process that forks daemons with a slow medium."""

from __future__ import annotations

import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.process.zygote import Zygote


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    directory = getattr(item, "funcargs", {}).get("tmp_path")
    if directory is not None and report.failed:
        for log in sorted(directory.glob("*.log")):
            report.sections.append((log.name, log.read_text(errors="replace")[-4000:]))
    return report


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    library = tmp_path_factory.mktemp("slow") / "slow.so"
    source = Path(__file__).with_name("slow.c")
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-fno-builtin", "-fPIC", "-shared"]
    subprocess.run(["gcc", *flags, "-o", library, source, "-ldl"], check=True)
    with Zygote(library) as running:
        yield running
