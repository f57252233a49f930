"""The commands that ask, steer and watch a running daemon; most are of a software fabric: faults, zones, masks, units.

Each is an order over the daemon's control socket; what an order means is decided there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vhostfc.cli.common import (
    FAILED,
    Add,
    add_capture_size,
    add_json,
    add_name,
    capture_size,
    control_path,
    run,
)
from vhostfc.errors import ConfigError

Json = dict[str, Any]


def add_commands(command: Add) -> None:
    """Their parsers."""
    for name, help_ in (
        ("status", "what a running daemon is doing"),
        ("rescan", "have an adapter ask the fabric and every target afresh"),
        ("ls", "what an adapter's port can see: targets, units, and what these say of themselves"),
        ("reload", "have a fabric read its file again; returns when the change is in force"),
    ):
        steer = command(name, _steer, help_)
        steer.set_defaults(order=name)
        add_name(steer)
        add_json(steer)

    topology = command("topology", _topology, "a fabric as a tree: ports, logins, targets, units, zones")
    add_name(topology)
    add_json(topology)

    events = command("events", _events, "what happens in a fabric, as it happens")
    add_name(events)
    events.add_argument("--last", type=int, default=0, metavar="N", help="begin with the last N events from before")
    events.add_argument("--count", type=int, metavar="N", help="end after N events")
    events.add_argument("--json", action="store_true", help="for programs: one JSON object a line")

    capture = command("capture", _capture, "write the frames of a running fabric to a file for Wireshark")
    add_name(capture)
    capture.add_argument("file", type=Path, metavar="FILE", help='a pcapng file; "-" is standard output')
    capture.add_argument("--count", type=int, metavar="N", help="end after N frames")
    capture.add_argument("--seconds", type=float, metavar="S", help="end after so many seconds (default: ^C)")
    add_capture_size(capture)

    fault = command("fault", _fault, "make something go wrong in a fabric, on purpose")
    add_name(fault)
    fault.add_argument("do", choices=("add", "run", "list", "clear"), metavar="ACTION", help="add, run, list or clear")
    fault.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="add KIND [KEY=VALUE]... (docs/configuration.md has them); run SCRIPT.toml; clear [FAULT]... (none: all)",
    )
    fault.add_argument("--wait", action="store_true", help="run: return when every fault of the script is over")
    add_json(fault)

    zone = command("zone", _zone, "change the zones of a running fabric")
    add_name(zone)
    zone.add_argument("do", choices=("set", "add", "drop", "remove"), metavar="ACTION")
    zone.add_argument("zone", metavar="ZONE", help="the zone's name")
    zone.add_argument("members", nargs="*", metavar="WWPN", help="set: all members; add, drop: these; remove: none")
    _keep(zone)

    mask = command("mask", _mask, "change who sees a unit of a running fabric")
    add_name(mask)
    mask.add_argument("unit", metavar="TARGET:LUN")
    mask.add_argument("allow", nargs="+", metavar="WWPN", help="who sees it; all: everybody in the zones; none: nobody")
    _keep(mask)

    unit = command("unit", _unit, "add a unit to a running fabric, or remove one")
    add_name(unit)
    unit.add_argument("do", choices=("add", "remove"), metavar="ACTION")
    unit.add_argument("unit", metavar="TARGET:LUN")
    unit.add_argument("values", nargs="*", metavar="KEY=VALUE", help="as in [[target.unit]]: size=1GiB, file=..., ...")
    _keep(unit)

    access = command("access", _access, "change the state of a target port group of a running fabric (ALUA)")
    add_name(access)
    access.add_argument("group", type=int, metavar="GROUP")
    access.add_argument("state", metavar="STATE", help="optimized, non-optimized, standby, unavailable, transitioning")
    _keep(access)

    changes = command("changes", _changes, "changes that were made to a running fabric; take them back")
    add_name(changes)
    changes.add_argument("--undo", nargs="*", metavar="CHANGE", help='such as "zone vm1"; without any: all of them')
    add_json(changes)


def _keep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", action="store_true", help="also after a reload or a restart of the fabric")
    add_json(parser)


def _steer(options: argparse.Namespace) -> int:
    return _do(options, options.order, {})


def _call(options: argparse.Namespace, command: str, arguments: Json) -> Json | None:
    from functools import partial

    from vhostfc.daemon import control

    path = control_path(options.name)
    return run(partial(control.call, path, command, arguments))


def _do(options: argparse.Namespace, command: str, arguments: Json) -> int:
    from vhostfc.outline import outline

    answer = _call(options, command, arguments)
    if answer is None:
        return FAILED
    print(json.dumps(answer) if options.json else "\n".join(outline(answer)) or "done")
    return 0


# ---------------------------------------------------------------- looking


def _topology(options: argparse.Namespace) -> int:
    from vhostfc.outline import topology_tree

    answer = _call(options, "topology", {})
    if answer is None:
        return FAILED
    print(json.dumps(answer) if options.json else "\n".join(topology_tree(answer)))
    return 0


def _events(options: argparse.Namespace) -> int:
    from vhostfc.daemon import control

    path = control_path(options.name)
    shown = 0

    async def follow() -> bool:
        nonlocal shown
        async with control.follow(path, "events", {"last": options.last}) as events:
            async for event in events:
                print(json.dumps(event) if options.json else _line(event), flush=True)
                shown += 1
                if shown == options.count:
                    return True
        return options.count is None

    ended = run(follow)
    return 0 if ended or (ended is None and options.count is None) else 1


def _capture(options: argparse.Namespace) -> int:
    import sys

    import trio

    from vhostfc.daemon import control
    from vhostfc.daemon.capture import CaptureFile, receive

    path = control_path(options.name)
    file = CaptureFile(options.file, size=capture_size(options), files=options.capture_files)

    async def take() -> None:
        with trio.move_on_after(options.seconds if options.seconds is not None else float("inf")):
            async with control.follow(path, "capture") as batches:
                await receive(batches, file, count=options.count)

    try:
        run(take)
    finally:
        file.close()
    lost = f", {file.dropped} lost for want of room" if file.dropped else ""
    print(f"{file.count} frames in {options.file}{lost}", file=sys.stderr)
    return 0 if options.count in {None, file.count} else 1


# ---------------------------------------------------------------- faults


def _fault(options: argparse.Namespace) -> int:
    match options.do, options.words:
        case "add", [what, *words]:
            return _do(options, "fault", {"do": "add", "fault": [{"what": what, **_pairs(words)}]})
        case "run", [script]:
            return _script(options, Path(script))
        case "list", []:
            return _do(options, "fault", {"do": "list"})
        case "clear", names:
            return _do(options, "fault", {"do": "clear", "names": names or None})
    usage = {"add": "add KIND [KEY=VALUE]...", "run": "run SCRIPT.toml", "list": "list"}
    raise ConfigError(f"fault {options.name} {options.do}: expected: {usage[options.do]}")


def _script(options: argparse.Namespace, script: Path) -> int:
    import trio

    from vhostfc.daemon import control
    from vhostfc.errors import VhostfcError
    from vhostfc.tomlfile import Document

    faults = Document(script).values.get("fault")
    if not faults:
        raise ConfigError(f"{script}:1: no [[fault]] in it")
    path = control_path(options.name)
    order = {"do": "add", "fault": _plain(faults), "source": "script", "where": str(script)}

    async def play() -> Json:
        answer = await control.call(path, "fault", order)
        mine = set(answer["faults"])
        while options.wait:
            now = (await control.call(path, "fault", {"do": "list"}))["faults"]
            if failed := [one for one in now if one["name"] in mine and one["state"] == "failed"]:
                raise VhostfcError(f"fault {failed[0]['name']}: {failed[0].get('error')}")
            if not any(one["name"] in mine and one["state"] in {"waiting", "active"} for one in now):
                break
            await trio.sleep(0.1)
        return answer

    answer = run(play)
    if answer is None:
        return FAILED
    print(json.dumps(answer) if options.json else f"faults: {', '.join(answer['faults'])}")
    return 0


# ---------------------------------------------------------------- changes


def _zone(options: argparse.Namespace) -> int:
    order: Json = {"change": "zone", "zone": options.zone, "keep": options.keep}
    match options.do, options.members:
        case "set", members:
            order["members"] = members
        case "add", [_, *_] as members:
            order["add"] = members
        case "drop", [_, *_] as members:
            order["remove"] = members
        case "remove", []:
            order["gone"] = True
        case _:
            raise ConfigError(f"zone {options.name} {options.do}: add and drop name members, remove does not")
    return _do(options, "change", order)


def _mask(options: argparse.Namespace) -> int:
    words: dict[str, list[str] | None] = {"all": None, "none": []}
    allow = words.get(options.allow[0], options.allow) if len(options.allow) == 1 else options.allow
    order = {"change": "mask", "unit": options.unit, "allow": allow, "keep": options.keep}
    return _do(options, "change", order)


def _unit(options: argparse.Namespace) -> int:
    order: Json = {"change": "unit", "unit": options.unit, "keep": options.keep}
    if options.do == "remove":
        if options.values:
            raise ConfigError(f"unit {options.name} remove: {options.values[0]}: nothing goes with remove")
        order["gone"] = True
    else:
        order["values"] = _pairs(options.values)
        for key in ("file", "block"):
            if key in order["values"]:
                order["values"][key] = str(Path(order["values"][key]).absolute())
    return _do(options, "change", order)


def _access(options: argparse.Namespace) -> int:
    order = {"change": "access", "group": options.group, "state": options.state, "keep": options.keep}
    return _do(options, "change", order)


def _changes(options: argparse.Namespace) -> int:
    if options.undo is not None:
        return _do(options, "change", {"change": "undo", "keys": options.undo or None})
    return _do(options, "change", {"change": "list"})


def _pairs(words: Sequence[str]) -> Json:
    """KEY=VALUE; a value is as in TOML where it is that, else a text.  Raises ConfigError."""
    values: Json = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r}: expected KEY=VALUE")
        if key in _ARRAYS:
            values[key] = [one for one in value.split(",") if one]
        else:
            values[key] = value if key in _TEXTS else _value(value)
    return values


#: Keys whose value is an array of names, however many there are.
_ARRAYS = frozenset({"members", "allow"})
#: Keys whose value is a text, even where it looks like a number.
_TEXTS = frozenset({"name", "s_id", "d_id", "wwpn", "target", "holder", "zone", "share", "file", "block", "at"})


def _value(text: str) -> Any:
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _plain(value: Any) -> Any:
    """What TOML may hold and JSON may not."""
    match value:
        case dict():
            return {key: _plain(one) for key, one in value.items()}
        case list():
            return [_plain(one) for one in value]
        case str() | bool() | int() | float():
            return value
    return value.isoformat()


def _line(event: Json) -> str:
    """An event for people."""
    moment = time.strftime("%H:%M:%S", time.localtime(event["time"])) + f"{event['time'] % 1:.3f}"[1:]
    values = " ".join(f"{key}={value}" for key, value in event.items() if key not in {"time", "event"})
    return f"{moment} {event['event']}  {values}".rstrip()
