"""The contract of the port seam on a real kernel; runs inside a guest (tests/guest/test_npiv_contract.py).

What has to change on the network is asked of the host: a file N.json in the directory that VHOSTFC_LAB_REQUESTS names
is a request, N.done its answer.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import structlog
import trio

from tests.ports.contract import FabricContract, San
from vhostfc.fc.wwn import Wwn
from vhostfc.ports.kernel import LinuxKernel
from vhostfc.ports.npiv import NpivFabric
from vhostfc.ports.vport import Parents

REQUESTS = Path(os.environ["VHOSTFC_LAB_REQUESTS"])
NUMBERS = itertools.count(1)


async def ask(what: str, *arguments: int) -> None:
    """Returns when it has happened."""
    number = next(NUMBERS)
    path = REQUESTS / f"{number}.json"
    path.with_suffix(".new").write_text(json.dumps([what, *arguments]))
    path.with_suffix(".new").rename(path)
    with trio.fail_after(60):
        while not (REQUESTS / f"{number}.done").exists():
            await trio.sleep(0.05)


class KernelSan:
    def __init__(self, directory: Path) -> None:
        self.kernel = LinuxKernel()
        self.target = Wwn.parse(os.environ["VHOSTFC_LAB_TARGET"])
        self.fabric = NpivFabric(
            self.kernel,
            Parents(("host0",)),
            state=directory,
            log=structlog.get_logger(),
            dev_loss=60,
            fast_io_fail=30,
            survey=2.0,
        )

    async def add_unit(self, number: int) -> None:
        await ask("add", number)

    async def remove_unit(self, number: int) -> None:
        await ask("remove", number)

    async def grow_unit(self, number: int) -> None:
        """The next command is told of it, and the kernel hears that."""
        await ask("grow", number)
        for host in [vport.host for vport in self.kernel.sysfs.vports()]:
            for lun in self.kernel.sysfs.luns(host or ""):
                if lun.lun[1] == number:
                    await trio.run_process(["sg_turs", f"/dev/{lun.sg}"], check=False, capture_stderr=True)

    async def break_links(self) -> None:
        await ask("cut")


class TestRealKernel(FabricContract):
    #: libfc keeps the residual of a command to itself, so Linux' FCoE says that all has been moved.  What drivers of
    #: HBAs say (lpfc, qla2xxx) is passed on, as over the fake kernel.
    residuals = False

    @pytest.fixture
    async def san(self, tmp_path: Path) -> San:
        await ask("reset")
        return KernelSan(tmp_path)
