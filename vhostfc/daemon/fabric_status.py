"""What `vhostfc status` and `vhostfc topology` show of a fabric, as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vhostfc.config import FabricConfig, UnitConfig
from vhostfc.daemon.fabric_door import Door
from vhostfc.daemon.fabric_faults import Desk
from vhostfc.daemon.fabric_maker import key
from vhostfc.daemon.fabric_units import Key, Served
from vhostfc.daemon.fcoe import FcoeAttachment
from vhostfc.daemon.fencing import Opening
from vhostfc.fabric.array import initiator
from vhostfc.fabric.management import ManagementServer
from vhostfc.fabric.switch import NPort, Switch
from vhostfc.fabric.target import TargetPort
from vhostfc.fc import fdmi
from vhostfc.fc.fdmi import HbaAttribute, PortAttribute
from vhostfc.fc.wwn import Wwn
from vhostfc.scsi.access import Reservations

Json = dict[str, Any]


def describe(
    config: FabricConfig,
    switch: Switch,
    targets: Mapping[Wwn, TargetPort],
    served: Mapping[Key, Served],
    pids: Mapping[int, int | None],
    attachments: Iterable[FcoeAttachment] = (),
) -> Json:
    """The fabric, logins, targets with their units and who has them open, FCoE attachments, zones.  pids: by F_Port."""
    return {
        "fabric": {
            "name": config.name,
            "wwn": str(config.wwn),
            "socket": str(config.socket),
            "fence_timeout": config.fence_timeout,
            "discarded": dict(switch.discarded),
        },
        "logins": [_login(login, pids.get(login.f_port)) for login in switch.logins()],
        "targets": [
            {
                "name": target.name,
                "wwpn": str(target.wwpn),
                "wwnn": str(target.wwnn),
                "port_id": f"{targets[target.wwpn].port_id:06x}",
                "units": [
                    _unit(unit, served[key(target, unit)], targets[target.wwpn].relative) for unit in target.units
                ],
            }
            for target in config.targets
        ],
        "fcoe": [
            {
                "at": one.config.where,
                "mac": one.forwarder.mac.hex(":"),
                "enodes": one.forwarder.enodes(),
                "discarded": dict(one.forwarder.discarded),
            }
            for one in attachments
        ],
        "zones": [
            {"name": zone.name, "members": sorted(str(member) for member in zone.members)} for zone in config.zones
        ],
    }


_HBA_TEXTS = (
    HbaAttribute.MANUFACTURER,
    HbaAttribute.SERIAL_NUMBER,
    HbaAttribute.MODEL,
    HbaAttribute.MODEL_DESCRIPTION,
    HbaAttribute.HARDWARE_VERSION,
    HbaAttribute.DRIVER_VERSION,
    HbaAttribute.OPTION_ROM_VERSION,
    HbaAttribute.FIRMWARE_VERSION,
    HbaAttribute.OS_NAME_AND_VERSION,
)
_PORT_TEXTS = (PortAttribute.OS_DEVICE_NAME, PortAttribute.HOST_NAME)


def topology(
    config: FabricConfig,
    switch: Switch,
    targets: Mapping[Wwn, TargetPort],
    served: Mapping[Key, Served],
    door: Door,
    desk: Desk,
) -> Json:
    """What is plugged in where; who is logged in to whom since when; who may see what; what is wrong on purpose."""
    names = {target.wwpn: target.name for target in config.targets}
    names |= {login.wwpn: login.holder for login in switch.logins()}
    return {
        "fabric": config.name,
        "switch": str(switch.name),
        "f_ports": [
            {
                "f_port": f_port,
                "holder": attachment.name,
                "kind": attachment.kind,
                "pid": attachment.pid,
                "link": "down" if door.is_down(f_port) else "up",
                "n_ports": [_n_port(login, switch) for login in switch.behind(f_port)],
            }
            for f_port, attachment in sorted(door.attachments.items())
        ],
        "targets": [
            {
                "name": target.name,
                "wwpn": str(target.wwpn),
                "port_id": f"{targets[target.wwpn].port_id:06x}",
                "online": switch.target(targets[target.wwpn].port_id) is targets[target.wwpn],
                "group": target.group,
                "access": target.access,
                "logins": [
                    {
                        "wwpn": str(session.wwpn),
                        "holder": names.get(session.wwpn),
                        "port_id": f"{session.port_id:06x}",
                        "since": session.since,
                        "image": session.image,
                        "commands": len(session.exchanges),
                    }
                    for session in targets[target.wwpn].sessions.values()
                ],
                "units": [_short(unit, served[key(target, unit)]) for unit in target.units],
            }
            for target in config.targets
        ],
        "zones": [
            {
                "name": zone.name,
                "members": [
                    {"wwpn": str(wwpn), "who": names.get(wwpn), "here": switch.names.by_name.get(wwpn) is not None}
                    for wwpn in sorted(zone.members)
                ],
            }
            for zone in config.zones
        ],
        "faults": [fault for fault in desk.describe() if fault["state"] in {"active", "waiting"}],
    }


def _n_port(login: NPort, switch: Switch) -> Json:
    entry = switch.names.entries[login.port_id]
    return {
        "port_id": f"{login.port_id:06x}",
        "wwpn": str(login.wwpn),
        "wwnn": str(login.wwnn),
        "since": login.since,
        "symbolic_name": entry.symbolic_name.decode(errors="replace"),
        "target": entry.is_target,
        "hba": _hba(login.wwpn, switch.management),
    }


def _hba(wwpn: Wwn, management: ManagementServer) -> Json | None:
    """What the port's driver has told the management server, as far as it is text; None when it has not."""
    hba = management.hba_of(wwpn)
    if hba is None:
        return None
    texts = {kind.name.lower(): fdmi.text(hba.attributes.get(kind, b"")) for kind in _HBA_TEXTS}
    texts |= {kind.name.lower(): fdmi.text(hba.ports[wwpn].get(kind, b"")) for kind in _PORT_TEXTS}
    return {"identifier": str(hba.identifier), **{name: said for name, said in texts.items() if said}}


def _short(config: UnitConfig, served: Served) -> Json:
    return {
        "lun": config.lun,
        "name": served.medium.name,
        "naa": served.unit.identity.naa[0].hex(),
        "bytes": served.unit.blocks * served.medium.block_size,
        "allow": None if config.allow is None else sorted(str(wwpn) for wwpn in config.allow),
        "ready": served.ready,
        "faulty": bool(served.faults),
    }


def _login(login: NPort, pid: int | None) -> Json:
    return {
        "wwpn": str(login.wwpn),
        "wwnn": str(login.wwnn),
        "port_id": f"{login.port_id:06x}",
        "adapter": login.holder,
        "pid": pid,
        "since": login.since,
    }


def _unit(config: UnitConfig, served: Served, port: int) -> Json:
    """A unit at a LUN of the target port with this relative identifier."""
    return {
        "lun": config.lun,
        "medium": served.medium.kind.name.lower(),
        "name": served.medium.name,
        "naa": served.unit.identity.naa[0].hex(),
        "blocks": served.unit.blocks,
        "block_size": served.medium.block_size,
        "read_only": served.medium.read_only,
        "ready": served.ready,
        "allow": None if config.allow is None else sorted(str(wwpn) for wwpn in config.allow),
        "open": [_opening(one) for one in served.fence.openings.values() if one.nexus.port == port],
        "reservations": _reservations(served.unit.reservations, port),
    }


def _reservations(reservations: Reservations, port: int) -> Json:
    """The persistent ones as initiators see them through this target port, and who has sent RESERVE."""
    state = reservations.state
    return {
        "type": None if state.kind is None else state.kind.name.lower().replace("_", " "),
        "aptpl": state.aptpl,
        "registrations": [
            {"wwpn": str(initiator(nexus)), "key": f"{key:#x}", "holder": state.holds(nexus)}
            for nexus, key in state.keys.items()
            if nexus.port == port
        ],
        "reserved_by": str(initiator(reservations.reserved)) if reservations.reserved else None,
    }


def _opening(opening: Opening) -> Json:
    return {
        "wwpn": str(opening.wwpn),
        "adapter": opening.adapter.name,
        "nexus": opening.handle,
        "epoch": opening.epoch,
        "state": opening.end.value if opening.end else "open",
        "fast": any(opening.out.mask),
    }
