"""Faults as files and orders spell them: [[fault]] tables, scripts, and what `vhostfc fault NAME add` says.

Each kind of fault has keys of its own; others are errors, as everywhere.  Names of the standards are
taken in any case and with blanks, dashes or underscores: "LS_ACC", "logical busy", "READ(10)".
"""

from __future__ import annotations

import datetime
import enum
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vhostfc.fabric.faults import AT_ONCE, OF_FRAMES, OF_UNITS, Direction, Fault, Latency, What
from vhostfc.fc.ct import Ct
from vhostfc.fc.els import Els, Explanation, Reason
from vhostfc.fc.frame import Address, FcType
from vhostfc.fc.wwn import Wwn, WwnError
from vhostfc.scsi.cdb import COMMANDS
from vhostfc.tomlfile import Document, Table, spelled
from vhostfc.values import ACCESS, LUN_MAX, boolean, choice, integer, real, seconds, text, wwn

T = TypeVar("T")

#: Seconds: a day is the longest that anything here waits or lasts.
_DAY = 86400.0
_SERVERS = {
    "name server": Address.DIRECTORY_SERVER,
    "fabric controller": Address.FABRIC_CONTROLLER,
    "management server": Address.MANAGEMENT_SERVER,
    "f_port": Address.F_PORT,
}


def read(table: Table, targets: Mapping[str, Wwn]) -> tuple[Fault, ...]:
    """The [[fault]] tables in a table.  targets: Port_Names of targets by their names.  Problems go to the document."""
    faults: list[Fault] = []
    for number, one in enumerate(table.tables("fault"), 1):
        fault = read_one(one, targets, default_name=f"fault-{number}")
        if any(other.name == fault.name for other in faults):
            one.problem("name", f"{fault.name!r} is already the name of a fault in this file")
        faults.append(fault)
    return tuple(faults)


def load_script(path: Path, targets: Mapping[str, Wwn]) -> tuple[Fault, ...]:
    """A file of nothing but [[fault]] tables.  Raises ConfigError."""
    document = Document(path)
    return _whole(document, targets)


def said(values: dict[str, Any], targets: Mapping[str, Wwn], *, where: str) -> tuple[Fault, ...]:
    """Faults that were told over the control socket: {"fault": [...]}.  Raises ConfigError."""
    return _whole(Document.told(where, values), targets)


def _whole(document: Document, targets: Mapping[str, Wwn]) -> tuple[Fault, ...]:
    root = document.root
    faults = read(root, targets)
    root.finish()
    document.raise_problems()
    return faults


def read_one(table: Table, targets: Mapping[str, Wwn], *, default_name: str) -> Fault:
    """One fault."""

    def target(value: object) -> Wwn:
        if isinstance(value, str) and value in targets:
            return targets[value]
        try:
            found = Wwn.parse(value) if isinstance(value, str) else None
        except WwnError:
            found = None
        if found is None or found not in targets.values():
            known = ", ".join(repr(name) for name in targets) or "none"
            raise ValueError(f"is {spelled(value)}; expected the name of a target here: {known}")
        return found

    kinds = {what.value: what for what in What}
    what = table.need("what", _of(kinds), What.LOSE, f'what = "lose", or another of {", ".join(kinds)}')
    given: dict[str, Any] = {"what": what, "name": table.get("name", text, default_name)}
    given["after"] = table.get("after", seconds(0, _DAY), 0.0)
    given["at"] = table.get("at", _moment, None)
    if table.has("at") and table.has("after"):
        table.problem("at", "and after exclude each other")
    if what not in AT_ONCE:
        given["lasts"] = table.get("for", seconds(0, _DAY), None)
    if what in OF_FRAMES | OF_UNITS:
        given["rate"] = table.get("rate", _rate, 1.0)
        given["count"] = table.get("count", integer(1, 1 << 31), None)
        given["wwpn"] = table.get("wwpn", wwn, None)
        given["target"] = table.get("target", target, None)
        given["opcode"] = table.get("opcode", _opcode, None)
    if what in OF_FRAMES:
        _frames(table, what, given)
    elif what in OF_UNITS:
        _units(table, what, given)
    else:
        _others(table, what, given, target)
    table.finish()
    return Fault(**given)


def _frames(table: Table, what: What, given: dict[str, Any]) -> None:
    if what is What.SILENCE:
        given["d_id"] = table.get("server", _of(_SERVERS), Address.DIRECTORY_SERVER)
        given["direction"] = Direction.IN
        return
    given["direction"] = table.get("direction", _of({one.value: one for one in Direction}), None)
    given["s_id"] = table.get("s_id", _address, None)
    given["d_id"] = table.get("d_id", _address, None)
    given["r_ctl"] = table.get("r_ctl", _octet, None)
    given["type"] = table.get("type", _member(FcType), None)
    given["els"] = table.get("els", _member(Els), None)
    given["ct"] = table.get("ct", _member(Ct, 0xFFFF), None)
    if what is What.REJECT:
        given["reason"] = table.get("reason", _member(Reason), int(Reason.UNABLE_TO_PERFORM))
        given["explanation"] = table.get("explanation", _member(Explanation), int(Explanation.NONE))
        if given["els"] is None:
            table.problem("els", 'is missing; write els = "PLOGI", or another request that shall be rejected')
        if given["direction"] is Direction.OUT:
            table.problem("direction", "requests that are rejected come in")
    elif what is What.CORRUPT:
        given["byte"] = table.get("byte", integer(0, 2135), None)
    elif what is What.DELAY:
        given["latency"] = _latency(table)


def _units(table: Table, what: What, given: dict[str, Any]) -> None:
    given["lun"] = table.get("lun", integer(0, LUN_MAX), None)
    if what is What.LATENCY:
        given["latency"] = _latency(table)
    elif what is What.MEDIUM_ERROR:
        given["lba"] = table.get("lba", integer(0, (1 << 64) - 1), 0)
        given["blocks"] = table.get("blocks", integer(1, (1 << 64) - 1), None)
        given["on"] = table.get("on", choice("read", "write", "both"), "both")


def _others(table: Table, what: What, given: dict[str, Any], target: Callable[[object], Wwn]) -> None:
    match what:
        case What.LINK_DOWN | What.CLEAR_VIRTUAL_LINK | What.LOGOUT:
            given["wwpn"] = table.get("wwpn", wwn, None)
            given["holder"] = table.get("holder", text, None)
            if table.has("wwpn") == table.has("holder"):
                table.problem("wwpn", 'say one: wwpn = "50:...", or holder = "vm1", the name of what is plugged in')
        case What.TARGET_GONE:
            given["target"] = table.need("target", target, Wwn(0), 'target = "array-a"')
        case What.ZONE:
            given["zone"] = table.need("zone", text, "", 'zone = "vm1"')
            given["members"] = _names(table, "members")
            gone = table.get("gone", boolean, False)
            if gone == (given["members"] is not None):
                table.problem("members", 'write members = ["50:..."], or gone = true')
        case What.MASK:
            _place(table, given, target)
            given["allow"] = _names(table, "allow")
        case What.UNMAP:
            _place(table, given, target)
        case What.MAP:
            _place(table, given, target)
            given["share"] = table.need("share", _share, ("", 0), 'share = "array-a:0", the unit that is to be there')
        case What.ACCESS:
            given["group"] = table.need("group", integer(1, 0xFFFF), 1, "group = 1")
            given["access"] = table.need("access", choice(*ACCESS), "", 'access = "standby"')


def _place(table: Table, given: dict[str, Any], target: Callable[[object], Wwn]) -> None:
    given["target"] = table.need("target", target, Wwn(0), 'target = "array-a"')
    given["lun"] = table.need("lun", integer(0, LUN_MAX), 0, "lun = 0")


def _latency(table: Table) -> Latency:
    least = table.get("seconds", seconds(0, _DAY), None)
    most = table.get("to", seconds(0, _DAY), None)
    mean = table.get("mean", seconds(0, _DAY), None)
    if least is None and mean is None:
        table.problem("seconds", "is missing; write seconds = 0.1, with to = 0.3 for any time between, or mean = 0.1")
    if most is not None and (mean is not None or most < (least or 0.0)):
        table.problem("to", "goes with a smaller `seconds`, and not with mean")
    return Latency(least or 0.0, most, mean)


def _names(table: Table, key: str) -> frozenset[Wwn] | None:
    names = table.each(key, wwn)
    return None if names is None else frozenset(names)


# ---------------------------------------------------------------- values


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def _of(allowed: Mapping[str, T]) -> Callable[[object], T]:
    names = {_plain(name): value for name, value in allowed.items()}

    def convert(value: object) -> T:
        if not isinstance(value, str) or _plain(value) not in names:
            raise ValueError(f"is {spelled(value)}; expected {' or '.join(repr(name) for name in allowed)}")
        return names[_plain(value)]

    return convert


def _member(kind: type[enum.IntEnum], most: int = 0xFF) -> Callable[[object], int]:
    names = {_plain(member.name): int(member) for member in kind}

    def convert(value: object) -> int:
        if isinstance(value, str) and _plain(value) in names:
            return names[_plain(value)]
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most:
            return value
        known = ", ".join(member.name for member in kind)
        raise ValueError(f"is {spelled(value)}; expected a number up to {most:#x} or one of {known}")

    return convert


def _octet(value: object) -> int:
    return integer(0, 0xFF)(value)


def _opcode(value: object) -> int:
    if isinstance(value, str):
        for command in COMMANDS:
            if _plain(command.name) == _plain(value):
                return command.opcode
        raise ValueError(f'is {spelled(value)}; expected a number up to 0xff or the name of a command: "READ(10)"')
    return _octet(value)


def _address(value: object) -> int:
    """An N_Port_ID in six hexadecimal digits, or a well-known address by its name."""
    if isinstance(value, str):
        if re.fullmatch(r"[0-9A-Fa-f]{6}", value):
            return int(value, 16)
        if _plain(value) in {_plain(name) for name in _SERVERS}:
            return int(_of(_SERVERS)(value))
    names = ", ".join(_SERVERS)
    raise ValueError(f'is {spelled(value)}; expected six hexadecimal digits in quotes, "01fe01", or one of {names}')


def _rate(value: object) -> float:
    share = real(value)
    if share is None or not 0 < share <= 1:
        raise ValueError(f"is {spelled(value)}; expected a share of what could be hit, more than 0 and at most 1")
    return share


def _moment(value: object) -> float:
    """A date with its time; without an offset it is local time (TOML 1.0)."""
    moment = value
    if isinstance(value, str):
        try:
            moment = datetime.datetime.fromisoformat(value)
        except ValueError:
            moment = None
    if not isinstance(moment, datetime.datetime):
        raise ValueError(f"is {spelled(value)}; expected a date and a time: 2030-01-31T12:00:00")
    return moment.timestamp()


def _share(value: object) -> tuple[str, int]:
    match = re.fullmatch(r"(.+):(\d{1,5})", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'is {spelled(value)}; expected a target\'s name and a LUN, like "array-a:0"')
    return match[1], int(match[2])
