"""`vhostfc login NAME`: an adapter's port on the fabric without a guest, so that it can be zoned and masked.

Switches and arrays offer the WWPNs that are logged in; a machine that does not exist yet has none there.  While it
lasts `vhostfc ls NAME` shows what the port can see, as it does of a running adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import structlog
import trio

from vhostfc.config import AdapterConfig
from vhostfc.daemon.control import Json, serve_control
from vhostfc.daemon.fabrics import fabric_of
from vhostfc.daemon.sights import look
from vhostfc.ports.base import Fabric, PortIdentity


async def hold_login(
    config: AdapterConfig,
    *,
    seconds: float,
    tell: Callable[[dict[str, Any]], None],
    log: structlog.typing.FilteringBoundLogger,
    fabric: Fabric | None = None,
) -> bool:
    """Log in for so long; tell is called with what the port sees, at first and after each change.

    Raises LoginRefused, or VhostfcError when the adapter runs already.
    """
    port_config = config.ports[0]
    identity = PortIdentity(port_config.wwpn, port_config.wwnn, f"vhostfc {config.name}")
    fabric = fabric or fabric_of(config, log=log)
    async with fabric.login(identity) as port, trio.open_nursery() as nursery:

        async def ls(_: Json) -> Json:
            return await look(port)

        config.control.parent.mkdir(parents=True, exist_ok=True)
        await nursery.start(partial(serve_control, config.control, {"ls": ls}, log=log))
        with trio.move_on_after(seconds):
            async for _ in port.events():
                tell(await look(port))
        nursery.cancel_scope.cancel()
    return True
