"""Values in the configuration's files: each a function of what TOML gives, which says what was expected instead.

They raise ValueError with a sentence that goes behind the key's name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from vhostfc.fc.fcoe import is_unicast, parse_mac
from vhostfc.fc.wwn import OUI_QEMU, Wwn, WwnError
from vhostfc.tomlfile import Table, spelled

#: What QEMU can connect to: sockaddr_un.sun_path holds 108 bytes, one of them the final zero (unix(7)).
SUN_PATH_MAX = 107
#: Flat space addressing, the largest single-level LUN that virtio-scsi can carry (SAM-5 4.7.7.3, virtio 1.2 5.6.6.1).
LUN_MAX = 16383
#: States of a target port group that a file may ask for (SPC-4 5.11.2).
ACCESS = ("optimized", "non-optimized", "standby", "unavailable", "transitioning")

_UNITS = {
    "B": 1,
    **{f"{prefix}iB": 1 << 10 * power for power, prefix in enumerate("KMGTPE", 1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGTPE", 1)},
    "KB": 1000,
}


def wwn(value: object) -> Wwn:
    if not isinstance(value, str):
        raise ValueError(f"is {spelled(value)}; expected a World Wide Name in quotes")
    try:
        return Wwn.parse(value)
    except WwnError as error:
        raise ValueError(str(error)) from None


def mac(value: object) -> bytes:
    """A MAC address that a station can have."""
    try:
        address = parse_mac(value) if isinstance(value, str) else None
    except ValueError as error:
        raise ValueError(str(error)) from None
    if address is None or not is_unicast(address):
        raise ValueError(f'is {spelled(value)}; expected the MAC address of one station, like "02:00:00:12:34:56"')
    return address


def fc_map(value: object) -> int:
    """The first three bytes of fabric provided MAC addresses (FC-BB-5 7.6)."""
    match = re.fullmatch(r"([0-9A-Fa-f]{2})[:-]?([0-9A-Fa-f]{2})[:-]?([0-9A-Fa-f]{2})", str(value))
    number = int("".join(match.groups()), 16) if match and isinstance(value, str) else 0
    if not 0x0EFC00 <= number <= 0x0EFCFF:
        raise ValueError(f'is {spelled(value)}; expected "0e:fc:00" up to "0e:fc:ff"')
    return number


def interface_name(value: object) -> str:
    """A network interface's name (dev_valid_name() of the kernel)."""
    if not isinstance(value, str) or not re.fullmatch(r"[^\s/:]{1,15}", value) or value in {".", ".."}:
        raise ValueError(f"is {spelled(value)}; expected the name of a network interface")
    return value


def text(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError(f"is {spelled(value)}; expected a printable text in quotes")
    return value


def unit_place(value: object) -> tuple[str, int]:
    """A unit by its target's name and its LUN: "array-a:0"."""
    match = re.fullmatch(r"(.+):(\d{1,5})", value) if isinstance(value, str) else None
    if not match:
        raise ValueError(f'is {spelled(value)}; expected a target\'s name and a LUN, like "array-a:0"')
    return match[1], int(match[2])


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"is {spelled(value)}; expected true or false")
    return value


def integer(low: int, high: int) -> Callable[[object], int]:
    def convert(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"is {spelled(value)}; expected a whole number from {low} to {high}")
        return value

    return convert


def real(value: object) -> float | None:
    """A number, whole or not; None where it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def seconds(low: float, high: float) -> Callable[[object], float]:
    def convert(value: object) -> float:
        found = real(value)
        if found is None or not low <= found <= high:  # NaN is neither
            raise ValueError(f"is {spelled(value)}; expected a number of seconds from {low:g} to {high:g}")
        return found

    return convert


def choice(*allowed: str) -> Callable[[object], str]:
    def convert(value: object) -> str:
        if value not in allowed or not isinstance(value, str):
            raise ValueError(f"is {spelled(value)}; expected {' or '.join(repr(one) for one in allowed)}")
        return value

    return convert


def sector(value: object) -> int:
    if value not in {512, 4096} or not isinstance(value, int):
        raise ValueError(f"is {spelled(value)}; expected 512 or 4096")
    return value


def size(value: object) -> int | None:
    """Bytes: a whole number, or a text such as "1GiB", "512MB", "1.5 TiB"."""
    expected = 'expected bytes, or a text such as "512MB" or "1GiB"'
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+)(?:\.(\d{1,9}))?\s*([A-Za-z]*)", value.strip(), re.ASCII)
        if not match or (match[3] or "B") not in _UNITS:
            raise ValueError(f"is {spelled(value)}; {expected}")
        fraction = match[2] or ""
        value, rest = divmod(int(match[1] + fraction) * _UNITS[match[3] or "B"], 10 ** len(fraction))
        if rest:
            raise ValueError(f"is {spelled(match[0])}, not a whole number of bytes")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 63:
        raise ValueError(f"is {spelled(value)}; {expected}, more than none and less than 8 EiB")
    return value


def path_in(file: Path) -> Callable[[object], Path]:
    def convert(value: object) -> Path:
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError(f"is {spelled(value)}; expected a path in quotes")
        return Path(os.path.abspath(file.parent / value))

    return convert


def socket_in(file: Path) -> Callable[[object], Path]:
    def convert(value: object) -> Path:
        path = path_in(file)(value)
        if len(os.fsencode(path)) > SUN_PATH_MAX:
            raise ValueError(f"is a path of {len(os.fsencode(path))} bytes; QEMU connects to at most {SUN_PATH_MAX}")
        return path

    return convert


# ---------------------------------------------------------------- what is not in the file


def control_in(table: Table, socket: Path) -> Path:
    control = table.get("control", path_in(table.document.path), control_for(socket))
    if control == socket:
        table.problem("control", "is the same path as socket")
    return control


def control_for(socket: Path) -> Path:
    """Where a daemon that serves this socket takes orders: the same path with .control for .sock."""
    return Path(str(socket).removesuffix(".sock") + ".control")


def state_directory(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """systemd tells in STATE_DIRECTORY, a list with colons (systemd.exec(5)), what it made for us."""
    given = environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(given) if given else Path("/var/lib/vhostfc") / name


def derived_wwn(name: str) -> Wwn:
    """A name that is the same each time: NAA 5, QEMU's company id, 36 bits of a hash."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return Wwn(5 << 60 | OUI_QEMU << 36 | int.from_bytes(digest[:8], "big") >> 28)
