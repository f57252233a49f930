"""What a command begins and does not wait for: a SANITIZE, a FORMAT UNIT.

It outlives the command, and us: a note beside the unit's reservations says what is to be done, and resume()
goes on with that.  It does not outlive the unit.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog
import trio

from vhostfc.daemon.fabric_units import Served
from vhostfc.scsi import sanitize
from vhostfc.scsi.task import BackgroundSteps, Nexus


@dataclass(eq=False, slots=True)
class _Operation:
    """One of them."""

    served: Served
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)


class Operations:
    """See the head of the file.  drive: does the effects that an operation yields (Effects.drive)."""

    def __init__(
        self,
        drive: Callable[[BackgroundSteps, Served, Nexus], Awaitable[None]],
        *,
        nursery: trio.Nursery,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._drive = drive
        self._nursery = nursery
        self._log = log
        self._operations: set[_Operation] = set()

    def resume(self, served: Served) -> None:
        """The unit is ours now: go on with what an earlier life of ours had begun in the background."""
        operation = served.unit.sanitizing.operation
        if operation is not None and (steps := sanitize.resume(served.unit)) is not None:
            self._log.info(f"going on with a {operation.name} that was cut short", unit=served.medium.name)
            self.start(steps, served, Nexus(b"", 0))

    def start(self, steps: BackgroundSteps, served: Served, nexus: Nexus) -> trio.Event:
        """Begin one; the event is that it is over."""
        operation = _Operation(served)
        self._operations.add(operation)
        self._nursery.start_soon(self._run, steps, operation, nexus)
        return operation.done

    async def _run(self, steps: BackgroundSteps, operation: _Operation, nexus: Nexus) -> None:
        served = operation.served
        try:
            with operation.scope:
                await self._drive(steps, served, nexus)
        except Exception:
            self._log.exception("an operation failed in the fabric", unit=served.medium.name)
        finally:
            self._operations.discard(operation)
            operation.done.set()
        served.changed()

    async def end(self, served: Served) -> None:
        """Stop what goes on at a unit that is taken away."""
        for operation in [one for one in self._operations if one.served is served]:
            operation.scope.cancel()
            await operation.done.wait()
