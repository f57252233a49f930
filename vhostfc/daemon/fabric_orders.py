"""What a fabric can be told over its control socket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import trio

from vhostfc import faultfile
from vhostfc.config import FabricConfig
from vhostfc.daemon.capture import pack, sniffing
from vhostfc.daemon.control import Handler, Json, Send, Stream
from vhostfc.daemon.fabric_changes import load_with_kept
from vhostfc.daemon.fabric_door import Door
from vhostfc.daemon.fabric_events import Events
from vhostfc.daemon.fabric_faults import Desk
from vhostfc.errors import VhostfcError
from vhostfc.overlay import Overlay


class Ruled(Protocol):
    """The fabric, as far as orders reach it."""

    config: FabricConfig
    door: Door
    desk: Desk
    events: Events

    def status(self) -> Json: ...

    def topology(self) -> Json: ...

    def changes(self) -> Json: ...

    async def reload(self, config: FabricConfig, kept: Overlay | None = None) -> None: ...

    async def change(self, order: Json, *, lasting: bool) -> str: ...

    async def undo(self, keys: list[str] | None) -> list[str]: ...


def orders_for(fabric: Ruled) -> Mapping[str, Handler]:
    """The handlers of a control socket, by command."""

    async def status(_request: Json) -> Json:
        await trio.lowlevel.checkpoint()
        return fabric.status()

    async def topology(_request: Json) -> Json:
        await trio.lowlevel.checkpoint()
        return fabric.topology()

    async def reload(_request: Json) -> Json:
        await fabric.reload(*load_with_kept(fabric.config.path))
        return {}

    async def change(request: Json) -> Json:
        """{"change": ..., "keep": bool}, or {"change": "undo", "keys": [...] or None}, or {"change": "list"}."""
        if request.get("change") == "undo":
            return {"undone": await fabric.undo(_strings(request, "keys"))}
        if request.get("change") == "list":
            await trio.lowlevel.checkpoint()
            return fabric.changes()
        return {"changed": await fabric.change(request, lasting=request.get("keep") is True)}

    async def fault(request: Json) -> Json:
        """{"do": "add", "fault": [{...}]}, {"do": "clear", "names": [...] or None}, {"do": "list"}."""
        match request.get("do"):
            case "add":
                targets = {target.name: target.wwpn for target in fabric.config.targets}
                named = _named(fabric.desk, request.get("fault"))
                faults = faultfile.said({"fault": named}, targets, where=str(request.get("where", "fault")))
                return {"faults": await fabric.desk.add(faults, source=str(request.get("source", "order")))}
            case "clear":
                return {"cleared": await fabric.desk.clear(_strings(request, "names"))}
            case "list":
                await trio.lowlevel.checkpoint()
                return {"seed": fabric.desk.seed, "faults": fabric.desk.describe()}
        raise VhostfcError(f"unknown order {request.get('do')!r} about faults; known: add, clear, list")

    async def events(request: Json) -> Stream:
        last = request.get("last", 0)
        await trio.lowlevel.checkpoint()

        async def run(send: Send) -> None:
            with fabric.events.listen(last=last if isinstance(last, int) and last > 0 else 0) as listener:
                async for event in listener:
                    await send(event)

        return Stream(run)

    async def capture(_request: Json) -> Stream:
        await trio.lowlevel.checkpoint()

        async def run(send: Send) -> None:
            with sniffing(fabric.door) as sniffer:
                await send(pack([], 0))  # from here on nothing is missed
                async for batch in sniffer:
                    await send(pack(batch, sniffer.dropped))

        return Stream(run)

    return {
        "status": status,
        "topology": topology,
        "reload": reload,
        "change": change,
        "fault": fault,
        "events": events,
        "capture": capture,
    }


def _strings(request: Json, key: str) -> list[str] | None:
    values = request.get(key)
    if values is not None and not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
        raise VhostfcError(f"{key}: is {values!r}; expected an array of texts")
    return values


def _named(desk: Desk, faults: object) -> object:
    """Faults without a name get one that nobody has: what they are, and a number."""
    if not isinstance(faults, list):
        return faults
    taken = {str(one["name"]) for one in desk.describe()}
    taken |= {str(one["name"]) for one in faults if isinstance(one, dict) and "name" in one}
    named = []
    for one in faults:
        if isinstance(one, dict) and "name" not in one:
            what = str(one.get("what", "fault"))
            number = next(n for n in range(1, len(taken) + 2) if f"{what}-{n}" not in taken)
            taken.add(f"{what}-{number}")
            named.append({**one, "name": f"{what}-{number}"})
        else:
            named.append(one)
    return named
