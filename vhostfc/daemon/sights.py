"""What a port sees, for `vhostfc ls` and `vhostfc login`: targets, their units, and what these say of themselves.

Only INQUIRY is asked, which takes no unit attention from a guest (SAM-5 5.14).
"""

from __future__ import annotations

from typing import Any

from vhostfc.daemon.units import lun_number
from vhostfc.ports.base import Outcome, Port, RemotePortState, Unit

#: Peripheral device types (SPC-5 table 144) by the names that people use.
TYPES = {0: "disk", 1: "tape", 3: "processor", 5: "cd", 8: "changer", 0x0C: "array", 0x0D: "enclosure", 0x1E: "wlun"}


async def look(port: Port) -> dict[str, Any]:
    """Targets and units as one JSON object."""
    topology = port.snapshot()
    targets = []
    for remote in topology.remote_ports:
        units = []
        for unit in remote.units if remote.state is RemotePortState.ONLINE else ():
            units.append(await _unit(port, unit))
        targets.append(
            {
                "wwpn": str(remote.wwpn),
                "state": remote.state.value,
                "port_id": f"{remote.port_id:06x}",
                "units": units,
            }
        )
    return {
        "wwpn": str(port.identity.wwpn),
        "state": topology.state.value,
        "port_id": f"{topology.port_id:06x}",
        "fabric": str(topology.fabric_name) if topology.fabric_name else None,
        "targets": targets,
    }


async def _unit(port: Port, unit: Unit) -> dict[str, Any]:
    told: dict[str, Any] = {"lun": lun_number(unit.lun), "lun_hex": unit.lun.hex()}
    standard = await port.execute(unit, bytes([0x12, 0, 0, 0, 96, 0]), data_in=96)
    if standard.outcome is not Outcome.COMPLETE or len(standard.data_in) < 36:
        return told | {"answer": standard.outcome.value}
    data = standard.data_in
    told["type"] = TYPES.get(data[0] & 0x1F, f"type {data[0] & 0x1F}")
    told["vendor"] = data[8:16].decode("ascii", "replace").strip()
    told["product"] = data[16:32].decode("ascii", "replace").strip()
    page = await port.execute(unit, bytes([0x12, 1, 0x83, 0, 252, 0]), data_in=252)
    told["naa"] = naa(page.data_in)
    return told


def naa(page: bytes) -> str | None:
    """The unit's NAA designator in a Device Identification page (SPC-5 7.7.6), as hexadecimal digits."""
    at = 4
    while at + 4 <= len(page):
        length = page[at + 3]
        if page[at + 1] & 0x3F == 0x03:  # association: the unit; designator type: NAA
            return page[at + 4 : at + 4 + length].hex()
        at += 4 + length
    return None
