"""`vhostfc probe`: be a guest's driver for a moment and tell what units it would see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.scan import UnitInfo
from vhostfc.vhost import features

DEVICE_TYPES = {0x00: "disk", 0x01: "tape", 0x05: "cd", 0x08: "changer", 0x0C: "array", 0x0D: "enclosure"}


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a back end offers, and the units that a driver finds there."""

    socket: Path
    features: int
    protocol_features: int
    queues: int
    units: tuple[UnitInfo, ...]

    def as_json(self) -> dict[str, Any]:
        """For `--json`: stable names, numbers as numbers."""
        return {
            "socket": str(self.socket),
            "queues": self.queues,
            "features": f"{self.features:#x}",
            "protocol_features": f"{self.protocol_features:#x}",
            "units": [
                {
                    "target": unit.target,
                    "lun": unit.lun,
                    "type": unit.device_type,
                    "blocks": unit.blocks,
                    "block_size": unit.block_size,
                    "vendor": unit.vendor,
                    "product": unit.product,
                    "revision": unit.revision,
                    "serial": unit.serial,
                    "naa": unit.naa,
                }
                for unit in self.units
            ],
        }

    def as_text(self) -> str:
        """A table for people."""
        head = f"{self.socket}: {self.queues} request queues, " + (
            features.names(self.features, features.Feature) or "no features"
        )
        if not self.units:
            return f"{head}\nno units"
        rows = [("T:L", "type", "vendor", "product", "size", "block", "naa")]
        rows += [
            (
                unit.address,
                DEVICE_TYPES.get(unit.device_type, f"type {unit.device_type:02x}h"),
                unit.vendor,
                unit.product,
                size_text(unit.size),
                str(unit.block_size),
                unit.naa or "-",
            )
            for unit in self.units
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([head, *lines])


def size_text(size: float) -> str:
    """Bytes for people: 512 B, 1 GiB, 1.5 TiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"


async def probe(socket: Path, *, timeout: float = 10.0) -> ProbeResult:
    """Connect, scan, disconnect.  timeout: seconds for each answer of the back end on its socket.

    Raises BackendError (no such socket, nobody there, it went away) and ScanError, both one line that names it.
    """
    async with ScsiDriver.open(socket, timeout=timeout) as driver:
        units = await driver.scan()
        client = driver.client
        return ProbeResult(socket, client.features, client.protocol_features, client.queue_num, tuple(units))
