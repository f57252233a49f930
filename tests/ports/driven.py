"""The seam once more, from above: a port whose commands are a guest's.

What `execute` and `manage` are given goes through the virtqueues of a whole adapter (`vhostfc serve` in this
process), its worker threads, and then either straight to the medium or as frames (`fast_path = false`).  What a
guest cannot see, the topology, is the adapter's own port's.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path as FilePath
from typing import cast

import structlog
import trio

from vhostfc.config import AdapterConfig, PortConfig
from vhostfc.daemon.fdsocket import listen
from vhostfc.daemon.hba import Adapter, run_adapter
from vhostfc.errors import plain
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.ports.base import (
    Fabric,
    Outcome,
    Port,
    PortIdentity,
    ScsiResult,
    TaskManagement,
    TaskManagementResponse,
    Unit,
)
from vhostfc.virtio.scsi import Response, TmfSubtype

#: A target that no adapter here has.
_NOBODY = 200
_OUTCOMES = {
    Response.OK: Outcome.COMPLETE,
    Response.BAD_TARGET: Outcome.NO_TARGET,
    Response.TRANSPORT_FAILURE: Outcome.PATH_LOST,
    Response.RESET: Outcome.ABORTED,
    Response.ABORTED: Outcome.ABORTED,
    Response.BUSY: Outcome.RETRY,
}
_RESPONSES = {
    Response.FUNCTION_COMPLETE: TaskManagementResponse.FUNCTION_COMPLETE,
    Response.FUNCTION_SUCCEEDED: TaskManagementResponse.FUNCTION_SUCCEEDED,
    Response.FUNCTION_REJECTED: TaskManagementResponse.FUNCTION_REJECTED,
    Response.INCORRECT_LUN: TaskManagementResponse.INCORRECT_LUN,
    Response.BAD_TARGET: TaskManagementResponse.NO_TARGET,
}


class DrivenPort:
    """See the head of the file; what is not here is the inner port's.  driver: the guest's."""

    def __init__(self, adapter: Adapter, driver: ScsiDriver, inner: Port) -> None:
        self._adapter = adapter
        self.driver = driver
        self.identity = inner.identity
        self.snapshot = inner.snapshot
        self.events = inner.events
        self.rescan = inner.rescan

    def address(self, unit: Unit) -> tuple[int, int]:
        """Where the guest has it, or would have it."""
        lun = int.from_bytes(unit.lun[:2], "big")
        for remote in self.snapshot().remote_ports:
            if remote.wwpn == unit.wwpn and remote.units and (found := self._adapter.units.address(remote.units[0])):
                return found[0], lun
        return _NOBODY, lun

    async def execute(
        self, unit: Unit, cdb: bytes, *, data_out: bytes = b"", data_in: int = 0, attribute: int = 0, tag: int = 0
    ) -> ScsiResult:
        answer = await self.driver.command(*self.address(unit), cdb, data_out, data_in, attribute, tag=tag, timeout=25)
        return ScsiResult(
            _OUTCOMES[Response(answer.response)],
            answer.status,
            answer.sense,
            answer.data_in,
            answer.residual,
            answer.status_qualifier,
        )

    async def manage(self, unit: Unit, function: TaskManagement, tag: int | None = None) -> TaskManagementResponse:
        subtype = TmfSubtype[function.name]
        return _RESPONSES[Response(await self.driver.manage(subtype, *self.address(unit), tag or 0))]


class DrivenFabric:
    """Every login is an adapter with a driver.  below: the fabric that the adapter logs in to."""

    def __init__(self, below: Fabric, *, fast_path: bool) -> None:
        self._below = below
        self._fast_path = fast_path

    @asynccontextmanager
    async def login(self, identity: PortIdentity) -> AsyncIterator[Port]:
        with tempfile.TemporaryDirectory() as name, plain():
            home = FilePath(name)
            config = AdapterConfig(
                path=home / "vm1.toml",
                name="vm1",
                ports=(PortConfig(identity.wwpn, identity.wwnn),),
                socket=home / "vhost.sock",
                control=home / "control",
                state=home,
                emulated=home / "unused",
                fast_path=self._fast_path,
            )
            with listen(config.socket) as listener:
                async with trio.open_nursery() as nursery:
                    serve = partial(
                        run_adapter, config, listener=listener, log=structlog.get_logger(), fabric=self._below
                    )
                    adapter: Adapter = await nursery.start(serve)
                    with trio.fail_after(10):
                        await adapter._decided.wait()
                    assert adapter._port is not None
                    async with ScsiDriver.open(config.socket) as driver:
                        yield cast("Port", DrivenPort(adapter, driver, adapter._port))
                    nursery.cancel_scope.cancel()
