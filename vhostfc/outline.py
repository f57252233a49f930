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
