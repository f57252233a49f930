"""An adapter on a fake kernel's HBA: what the kernel keeps after its guest was answered, across a path that flaps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
import trio

from tests.fakes.array import FakeTarget, FakeUnit
from tests.fakes.kernel import FakeKernel
from tests.waiting import until
from vhostfc.config import AdapterConfig, PortConfig
from vhostfc.daemon.fdsocket import listen
from vhostfc.daemon.hba import Adapter, run_adapter
from vhostfc.errors import plain
from vhostfc.fc.wwn import Wwn
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.ports.npiv import NpivFabric, NpivPort
from vhostfc.ports.vport import Parents
from vhostfc.virtio.scsi import Response, TmfSubtype

ME = PortConfig(Wwn(0x5001438012345678), Wwn(0x5001438012345679))
ARRAY = Wwn(0x5006_0160_0000_0001)
WRITE = bytes([0x2A, 0, 0, 0, 0, 8, 0, 0, 1, 0])
TUR = bytes(6)
OLD, NEW = b"O" * 512, b"N" * 512
AT = slice(8 * 512, 9 * 512)
SAM_BUSY = 8
LOG = structlog.get_logger()


class Lab:
    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.unit = FakeUnit(bytearray(1 << 20), b"disk")
        self.array = FakeTarget(ARRAY, 0x01FE01, {0: self.unit})
        self.kernel = FakeKernel(directory, nursery, self.array)
        self.directory = directory
        self.socket = directory / "vhost.sock"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Adapter]:
        config = AdapterConfig(
            path=self.directory / "vm.toml",
            name="vm",
            ports=(ME,),
            emulated=None,
            socket=self.socket,
            control=self.directory / "vhost.control",
            state=self.directory / "state",
            drain_timeout=0.1,
        )
        fabric = NpivFabric(self.kernel, Parents(), state=config.state, log=LOG, survey=1000.0)
        with plain(), listen(self.socket) as listener:
            async with trio.open_nursery() as nursery:

                async def run(task_status: trio.TaskStatus[Adapter]) -> None:
                    await run_adapter(config, listener=listener, log=LOG, fabric=fabric, task_status=task_status)

                yield await nursery.start(run)
                nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def driver(self) -> AsyncIterator[ScsiDriver]:
        async with ScsiDriver.open(self.socket) as driver:
            with trio.fail_after(10):
                while not (await driver.command(0, 0, TUR)).good:
                    await trio.sleep(0.01)
            yield driver

    def held(self) -> list[object]:
        return [command for node in self.kernel.nodes.values() for command in node.held]


@pytest.fixture
def lab(tmp_path: Path, nursery: trio.Nursery) -> Lab:
    return Lab(tmp_path, nursery)


async def write_and_stop(lab: Lab) -> Callable[[], None]:
    """A guest writes, and is gone before the kernel has carried it out; what carries it out after all."""
    async with lab.driver() as driver, trio.open_nursery() as nursery:
        lab.unit.hold = True
        nursery.start_soon(lambda: driver.command(0, 0, WRITE, data_out=OLD))
        await until(lab.held)
        await driver.stop()
        nursery.cancel_scope.cancel()
    lab.unit.hold = False
    (node,) = (node for node in lab.kernel.nodes.values() if node.held)
    (command,) = node.held
    node.held = []
    return lambda: lab.kernel._run(node, command, anyway=True)


async def test_a_write_of_before_is_not_overtaken_after_a_path_was_lost(lab: Lab) -> None:
    async with lab.running() as adapter:
        run = await write_and_stop(lab)
        vhost = next(host for host in lab.kernel.hosts.values() if host.parent)
        opened = len(lab.kernel.nodes["sg0"].ends)
        lab.kernel.lose(vhost, lab.array)
        port = adapter._port
        assert isinstance(port, NpivPort)
        await until(lambda: port._paths._paths[0].lun is None)
        lab.kernel.back(vhost, lab.array)
        await until(lambda: len(lab.kernel.nodes["sg0"].ends) > opened)
        async with ScsiDriver.open(lab.socket) as driver:
            answer = await driver.command(0, 0, WRITE, data_out=NEW)
            assert (answer.response, answer.status) == (Response.OK, SAM_BUSY)
            # Nor is anything ended that is still under way.
            assert await driver.manage(TmfSubtype.ABORT_TASK_SET, 0, 0) == Response.FUNCTION_REJECTED
            run()
            assert lab.unit.data[AT] == OLD
            with trio.fail_after(10):
                while not (await driver.command(0, 0, WRITE, data_out=NEW)).good:
                    await trio.sleep(0.01)
            assert lab.unit.data[AT] == NEW
            assert await driver.manage(TmfSubtype.ABORT_TASK_SET, 0, 0) == Response.FUNCTION_COMPLETE
