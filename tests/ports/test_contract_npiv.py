"""The contract over a vport of a fake kernel, in the manner of each driver."""

from __future__ import annotations

from pathlib import Path

import pytest
import structlog
import trio

from tests.fakes.array import FakeTarget, FakeUnit
from tests.fakes.kernel import FakeKernel
from tests.ports.contract import FabricContract, San
from vhostfc.fc.wwn import Wwn
from vhostfc.ports.npiv import NpivFabric
from vhostfc.ports.vport import Parents

ARRAY = Wwn(0x5006_0160_0000_0001)
LOG = structlog.get_logger()
#: Longer than the second between two looks: fcoe tells nobody of it.
OUTAGE = 1.5


class FakeKernelSan:
    def __init__(self, directory: Path, nursery: trio.Nursery, style: str) -> None:
        units = {number: FakeUnit(bytearray(1 << 20), b"disk %d" % number) for number in (0, 1)}
        self.array = FakeTarget(ARRAY, 0x01FE01, units)
        self.kernel = FakeKernel(directory, nursery, self.array, style=style)
        self.fabric = NpivFabric(
            self.kernel, Parents(("host0",)), state=directory / "state", log=LOG, command_timeout=10.0
        )
        self.target = ARRAY
        self._nursery = nursery

    async def add_unit(self, number: int) -> None:
        self.array.units[number] = FakeUnit(bytearray(1 << 20), b"disk %d" % number)
        self.kernel.attention(self.array, "REPORTED_LUNS_DATA_HAS_CHANGED")

    async def remove_unit(self, number: int) -> None:
        del self.array.units[number]
        self.kernel.attention(self.array, "REPORTED_LUNS_DATA_HAS_CHANGED")

    async def grow_unit(self, number: int) -> None:
        self.array.units[number].data += bytes(1 << 20)
        self.kernel.attention(self.array, "CAPACITY_DATA_HAS_CHANGED", number)

    async def break_links(self) -> None:
        await self.kernel.link_down()
        self._nursery.start_soon(self._mend)

    async def _mend(self) -> None:
        await trio.sleep(OUTAGE)
        await self.kernel.link_up()


class TestFakeKernel(FabricContract):
    @pytest.fixture(params=["fcoe", "lpfc", "qla2xxx"])
    async def san(self, tmp_path: Path, nursery: trio.Nursery, request: pytest.FixtureRequest) -> San:
        return FakeKernelSan(tmp_path, nursery, request.param)
