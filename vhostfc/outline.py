"""JSON for people: what a daemon answers, as indented lines."""

from __future__ import annotations

import time
from typing import Any


def outline(value: Any, indent: str = "") -> list[str]:
    """The lines: what has parts is a heading over them; a list of plain values stays in its line."""
    lines: list[str] = []
    for key, part in value.items() if isinstance(value, dict) else (("-", one) for one in value):
        label = key if key == "-" else f"{key.replace('_', ' ')}:"
        if not part or _is_plain(part):
            lines.append(f"{indent}{label} {_word(part, key)}")
            continue
        below = outline(part, indent + "  ")
        if label == "-":  # the first line of a member stands beside its dash
            lines += [f"{indent}- {below[0].lstrip()}", *below[1:]]
        else:
            lines += [f"{indent}{label}", *below]
    return lines


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return not any(isinstance(one, dict | list) for one in value)
    return not isinstance(value, dict)


def _word(value: Any, key: str) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list() | dict():
            return ", ".join(_word(one, key) for one in value) or "none"
        case float() | int() if key == "since":  # seconds since 1970
            return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
        case float():
            return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.0f}"
        case _:
            return str(value)


#: A line, and what is below it.
Branch = tuple[str, list[Any]]


def topology_tree(topology: dict[str, Any]) -> list[str]:
    """What `vhostfc topology` shows: a fabric as a tree."""
    f_ports: list[Branch] = [
        (
            f"F_Port {one['f_port']}: {one['holder']} ({one['kind']}{_process(one['pid'])}), link {one['link']}",
            [
                (
                    f"{n['port_id']} {n['wwpn']}{_named(n['symbolic_name'])} since {_word(n['since'], 'since')}",
                    [(f"HBA {', '.join(f'{k}: {v}' for k, v in n['hba'].items())}", [])] if n["hba"] else [],
                )
                for n in one["n_ports"]
            ],
        )
        for one in topology["f_ports"]
    ]
    targets: list[Branch] = [
        (
            f"{one['port_id']} {one['wwpn']} {one['name']}, group {one['group']} {one['access']}"
            + ("" if one["online"] else ", off the fabric"),
            [
                *(
                    (
                        f"login {login['wwpn']}{_named(login['holder'])} since {_word(login['since'], 'since')}"
                        + ("" if login["image"] else ", no image pair"),
                        [],
                    )
                    for login in one["logins"]
                ),
                *(
                    (
                        f"LUN {unit['lun']}: {unit['name']}, {unit['bytes']} bytes, naa.{unit['naa']}, "
                        + ("everybody" if unit["allow"] is None else f"for {_word(unit['allow'], '')}")
                        + ("" if unit["ready"] else ", not ready")
                        + (", with a fault" if unit["faulty"] else ""),
                        [],
                    )
                    for unit in one["units"]
                ),
            ],
        )
        for one in topology["targets"]
    ]
    zones: list[Branch] = [
        (
            f"zone {one['name']}",
            [(f"{m['wwpn']}{_named(m['who'])}" + ("" if m["here"] else ", not here"), []) for m in one["members"]],
        )
        for one in topology["zones"]
    ]
    faults: list[Branch] = [
        (f"fault {one['name']}: {one['what']}, {one['state']}, {one['hits']} hits", []) for one in topology["faults"]
    ]
    parts = [*f_ports, *targets, *(zones or [("no zones: everybody sees everybody", [])]), *faults]
    return [f"{topology['fabric']}, switch {topology['switch']}", *_branches(parts)]


def _branches(parts: list[Branch], indent: str = "") -> list[str]:
    lines = []
    for number, (text, below) in enumerate(parts, 1):
        last = number == len(parts)
        lines.append(f"{indent}{'└─ ' if last else '├─ '}{text}")
        lines += _branches(below, indent + ("   " if last else "│  "))
    return lines


def _process(pid: int | None) -> str:
    return "" if pid is None else f", process {pid}"


def _named(name: str | None) -> str:
    return f" {name}" if name else ""
