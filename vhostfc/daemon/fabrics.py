"""Which fabric an adapter is on: the software fabric, or an HBA's port, as its file says."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import structlog
import trio

from vhostfc.config import AdapterConfig, HbaConfig
from vhostfc.errors import ConfigError
from vhostfc.ports.base import Fabric
from vhostfc.ports.kernel import Kernel


def load(config: AdapterConfig) -> None:
    """Import what this adapter will need, and nothing of the other kind: while it starts, not when its guest does."""
    if config.hba is not None:
        import vhostfc.daemon.helped  # noqa: PLC0415
        import vhostfc.ports.npiv  # noqa: PLC0415
    else:
        import vhostfc.ports.emulated  # noqa: F401, PLC0415


def fabric_of(
    config: AdapterConfig,
    *,
    alive: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
    log: structlog.typing.FilteringBoundLogger,
) -> Fabric:
    """The adapter's way into its fabric.  alive: see EmulatedFabric.  Raises ConfigError where neither is named."""
    if config.hba is not None:
        return _npiv(config, config.hba, log)
    if config.emulated is None:
        raise ConfigError(f"{config.path}: fabric.emulated: is missing")
    from vhostfc.ports.emulated import EmulatedFabric  # noqa: PLC0415  # an adapter has the one or the other

    return EmulatedFabric(
        config.emulated,
        name=config.name,
        hold_timeout=config.hold_timeout,
        command_timeout=config.command_timeout,
        alive=alive,
        log=log,
    )


def _npiv(config: AdapterConfig, hba: HbaConfig, log: structlog.typing.FilteringBoundLogger) -> Fabric:
    from vhostfc.ports.npiv import NpivFabric  # noqa: PLC0415
    from vhostfc.ports.vport import Parents  # noqa: PLC0415

    return NpivFabric(
        kernel_for(hba, config.name),
        Parents(hba.hosts, hba.wwpns, hba.fabric),
        state=config.state,
        log=log,
        dev_loss=hba.dev_loss,
        fast_io_fail=hba.fast_io_fail,
        keep=hba.keep,
        guard=hba.guard,
        workers=config.workers,
        command_timeout=config.command_timeout,
        survey=hba.survey,
    )


def kernel_for(hba: HbaConfig, adapter: str) -> Kernel:
    """Through the helper where it listens, or where we could not do its part ourselves."""
    if hba.helper.exists() or os.geteuid() != 0:
        from vhostfc.daemon.helped import HelpedKernel  # noqa: PLC0415

        return HelpedKernel(hba.helper, adapter)
    from vhostfc.ports.kernel import LinuxKernel  # noqa: PLC0415

    return LinuxKernel()
