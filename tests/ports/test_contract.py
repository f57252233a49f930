"""The contract over the emulated port: against a fake fabric, against the real one, and as a guest sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
import trio

from tests.fc.tiny import BLOCK, TinyTarget
from tests.ports.contract import CommandContract, FabricContract, San, lun, read, ready
from tests.ports.driven import DrivenFabric
from tests.ports.fakefabric import FakeFabric
from vhostfc.config import FabricConfig, load_fabric
from vhostfc.daemon import fabricd
from vhostfc.daemon.fabric_link import Link
from vhostfc.fabric.pcapng import Record
from vhostfc.fc.frame import RCtl
from vhostfc.fc.wwn import Wwn
from vhostfc.ports.base import Fabric, Port, Unit
from vhostfc.ports.emulated import EmulatedFabric

ARRAY = Wwn(0x5006_0160_0000_0001)
LOG = structlog.get_logger()


def emulated(path: Path) -> EmulatedFabric:
    return EmulatedFabric(path, name="test", hold_timeout=5.0, command_timeout=10.0, log=LOG)


class FakeSan:
    def __init__(self, directory: Path) -> None:
        units = {lun(0): bytearray(1 << 20), lun(1): bytearray(1 << 20)}
        self.array = TinyTarget(ARRAY, 0x01FE01, units)
        self.fake = FakeFabric(directory / "fabric.sock", self.array)
        self.fabric = emulated(self.fake.path)
        self.target = ARRAY

    async def add_unit(self, number: int) -> None:
        self.array.units[lun(number)] = bytearray(64 * BLOCK)
        await self.fake.rscn(self.array.port_id)

    async def remove_unit(self, number: int) -> None:
        del self.array.units[lun(number)]
        for connection in self.fake.connections:
            await self.fake.end_nexuses(connection)
        await self.fake.rscn(self.array.port_id)

    async def grow_unit(self, number: int) -> None:
        self.array.units[lun(number)] += bytes(1 << 20)
        for connection in self.fake.connections:
            for nexus, route in list(connection.routes.items()):
                await self.fake.route(connection, nexus, blocks=2 * route.blocks)

    async def break_links(self) -> None:
        self.fake.cut()
        await trio.lowlevel.checkpoint()


class TestFakeFabric(FabricContract):
    @pytest.fixture
    async def san(self, tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[San]:
        san = FakeSan(tmp_path)
        await nursery.start(san.fake.serve)
        yield san
        san.fake.close()


class RealSan:
    """`vhostfc fabric` in this process.  Its fence must not kill: we are the adapter."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "fabric.toml"
        self.socket = directory / "fabric.sock"
        self.units = {0: "1MiB", 1: "1MiB"}
        self.served = fabricd.Fabric(self._config(), log=LOG)
        self.fabric: Fabric = emulated(self.socket)
        self.target = ARRAY

    def _config(self) -> FabricConfig:
        text = f'[fabric]\nsocket = "{self.socket}"\nfence_timeout = 60\n'
        text += '[[target]]\nname = "a"\nwwpn = "50:06:01:60:00:00:00:01"\nwwnn = "50:06:01:60:00:00:00:00"\n'
        text += "".join(f'[[target.unit]]\nlun = {number}\nsize = "{size}"\n' for number, size in self.units.items())
        self.path.write_text(text)
        return load_fabric(self.path)

    async def add_unit(self, number: int) -> None:
        self.units[number] = "1MiB"
        await self.served.reload(self._config())

    async def remove_unit(self, number: int) -> None:
        del self.units[number]
        await self.served.reload(self._config())

    async def grow_unit(self, number: int) -> None:
        self.units[number] = "2MiB"
        await self.served.reload(self._config())

    async def break_links(self) -> None:
        for adapter in list(self.served.door.attachments.values()):
            assert isinstance(adapter, Link)
            adapter._socket._socket.shutdown(2)
        await trio.lowlevel.checkpoint()


class TestRealFabric(FabricContract):
    @pytest.fixture
    async def san(self, tmp_path: Path, nursery: trio.Nursery) -> San:
        san = RealSan(tmp_path)
        await nursery.start(san.served.serve)
        return san


class _Guest(CommandContract):
    """What a guest does goes through a whole adapter."""

    fast_path: bool

    @pytest.fixture
    async def san(self, tmp_path: Path, nursery: trio.Nursery) -> San:
        san = RealSan(tmp_path)
        await nursery.start(san.served.serve)
        san.fabric = DrivenFabric(san.fabric, fast_path=self.fast_path)
        return san

    async def test_how_blocks_travel(self, san: RealSan, port: Port) -> None:
        """A read is an FCP_CMND, or none."""
        unit = Unit(san.target, lun(0))
        await ready(port, unit)
        tap = Tap()
        san.served.door.taps.append(tap)
        for block in range(100):
            result = await port.execute(unit, read(block, 1), data_in=512)
            assert (result.status, len(result.data_in)) == (0, 512)
        assert tap.commands == (0 if self.fast_path else 100)


class Tap:
    """Counts the commands that pass as frames."""

    def __init__(self) -> None:
        self.commands = 0

    def put(self, record: Record) -> None:
        self.commands += record.frame[0] == RCtl.DATA_UNSOLICITED_COMMAND


class TestGuestOnTheFastPath(_Guest):
    fast_path = True


class TestGuestWithoutTheFastPath(_Guest):
    """fast_path = false: everything as frames."""

    fast_path = False
