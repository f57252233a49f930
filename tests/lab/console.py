"""What a machine without an operating system has to say: lines on its serial console."""

from __future__ import annotations

import time

from tests.lab.guest import Machine


def wait_for_line(machine: Machine, *lines: str, seconds: float = 60) -> str:
    """The first of these lines that the serial console shows."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        console = machine.console()
        for line in lines:
            if line in console:
                return line
        assert machine.process is not None
        assert machine.process.poll() is None, machine.why()
        time.sleep(0.05)
    raise AssertionError(f"none of {lines} in {seconds} s" + machine.why())
