"""The daemons' logs, in the report of a test that failed."""

from __future__ import annotations

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    directory = getattr(item, "funcargs", {}).get("tmp_path")
    if directory is not None and report.failed:
        for log in sorted(directory.glob("*.log")):
            report.sections.append((log.name, log.read_text(errors="replace")[-4000:]))
    return report
