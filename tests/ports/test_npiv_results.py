"""What the kernel says of a command, in the seam's words; and pages that say what the port can carry."""

from __future__ import annotations

import pytest

from vhostfc.ports.base import Outcome, ScsiResult
from vhostfc.ports.npiv_results import clamped, result_of
from vhostfc.ports.sg import SgOutcome


@pytest.mark.parametrize(
    ("host_status", "outcome", "status"),
    [
        (0x01, Outcome.PATH_LOST, 0),
        (0x02, Outcome.COMPLETE, 8),
        (0x03, Outcome.TIMED_OUT, 0),
        (0x04, Outcome.NO_TARGET, 0),
        (0x05, Outcome.GIVEN_UP, 0),
        (0x06, Outcome.FAILED, 0),
        (0x07, Outcome.FAILED, 0),
        (0x08, Outcome.ABORTED, 0),
        (0x0D, Outcome.COMPLETE, 8),
        (0x0E, Outcome.PATH_LOST, 0),
        (0x0F, Outcome.PATH_LOST, 0),
        (0x10, Outcome.TARGET_FAILED, 0),
        (0x11, Outcome.COMPLETE, 0x18),
        (0x12, Outcome.FAILED, 0),
        (0x13, Outcome.FAILED, 0),
        (0x14, Outcome.PATH_LOST, 0),
        (0x55, Outcome.FAILED, 0),
    ],
)
def test_what_the_kernel_says_becomes_an_outcome(host_status: int, outcome: Outcome, status: int) -> None:
    result = result_of(SgOutcome(0, host_status, 0, b"", b"", 0), 512)
    assert (result.outcome, result.status) == (outcome, status)


@pytest.mark.parametrize("host_status", [0x06, 0x07])
def test_an_error_while_the_remote_port_is_away_is_its_paths(host_status: int) -> None:
    result = result_of(SgOutcome(0, host_status, 0, b"", b"", 0), 512, online=False)
    assert result == ScsiResult(Outcome.PATH_LOST)


@pytest.mark.parametrize(
    ("driver_status", "status", "outcome"),
    [
        (0x06, 0, Outcome.TIMED_OUT),  # DRIVER_TIMEOUT, before Linux 5.14: nothing else says that it failed
        (0x16, 0, Outcome.TIMED_OUT),  # with advice
        (0x04, 0, Outcome.FAILED),  # DRIVER_ERROR
        (0x08, 0, Outcome.COMPLETE),  # DRIVER_SENSE
        (0x08, 2, Outcome.COMPLETE),
        (0x06, 2, Outcome.COMPLETE),
    ],
)
def test_what_only_the_driver_status_tells(driver_status: int, status: int, outcome: Outcome) -> None:
    assert result_of(SgOutcome(status, 0, driver_status, b"", b"", 0), 512).outcome is outcome


def test_a_block_limits_page_is_clamped() -> None:
    page = bytes(8) + (5000).to_bytes(4, "big") + (4000).to_bytes(4, "big") + bytes(48)
    assert clamped(page, 2560)[8:16] == (2560).to_bytes(4, "big") * 2
    assert clamped(page, 4500)[8:16] == (4500).to_bytes(4, "big") + (4000).to_bytes(4, "big")
    assert clamped(bytes(64), 77)[8:16] == (77).to_bytes(4, "big") + bytes(4)
