"""PERSISTENT RESERVE IN and OUT: their parameter data (SPC-4 6.15, 6.16), and reservations as bytes that are kept.

An initiator is a TransportID for FCP (7.6.4.2): 24 bytes, in which bytes 8 to 15 are its Port_Name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

from vhostfc.scsi import cdb as fields
from vhostfc.scsi.reservations import Action, Kind, MoveRequest, Request, State
from vhostfc.scsi.sense import Asc, illegal, invalid_parameter
from vhostfc.scsi.task import Nexus

TRANSPORT_ID_LENGTH = 24
#: The longest list that is read: one for as many TransportIDs as there may be registrations.
_MAX_LIST = 28 + 1024 * TRANSPORT_ID_LENGTH


# ---------------------------------------------------------------- PERSISTENT RESERVE OUT


def parse_out(cdb: bytes, data: bytes) -> Request | MoveRequest:
    """The request in a PERSISTENT RESERVE OUT.  Raises CheckCondition."""
    action = cdb[1] & 0x1F
    length = fields.number(cdb, 5, 8)
    if length < 24 or length > _MAX_LIST or len(data) < length:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    data = data[:length]
    key, new_key = struct.unpack("!QQ", data[:16])
    if action == Action.REGISTER_AND_MOVE:
        return _parse_move(key, new_key, data)
    spec_i_pt = bool(data[20] & 0x08)
    if spec_i_pt and action != Action.REGISTER:
        raise invalid_parameter(20, 3)
    if not spec_i_pt and length != 24:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    return Request(
        key,
        new_key,
        scope=cdb[2] >> 4,
        kind=cdb[2] & 0x0F,
        others=_transport_ids(data) if spec_i_pt else (),
        spec_i_pt=spec_i_pt,
        all_tg_pt=bool(data[20] & 0x04),
        aptpl=bool(data[20] & 0x01),
    )


def _transport_ids(data: bytes) -> tuple[bytes, ...]:
    """The list of SPEC_I_PT, from byte 24 on."""
    if len(data) < 28 or fields.number(data, 24, 27) != len(data) - 28:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    if (len(data) - 28) % TRANSPORT_ID_LENGTH:
        raise invalid_parameter(24)
    return tuple(_transport_id(data, at) for at in range(28, len(data), TRANSPORT_ID_LENGTH))


def _transport_id(data: bytes, at: int) -> bytes:
    one = data[at : at + TRANSPORT_ID_LENGTH]
    if one[0] & 0xCF or not any(one[8:16]):  # FORMAT CODE 00b, PROTOCOL IDENTIFIER 0h
        raise invalid_parameter(at)
    return bytes(8) + one[8:16] + bytes(8)


def _parse_move(key: int, new_key: int, data: bytes) -> MoveRequest:
    length = fields.number(data, 20, 23)
    if length != len(data) - 24:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    if length != TRANSPORT_ID_LENGTH:
        raise invalid_parameter(20)
    return MoveRequest(
        key,
        new_key,
        _transport_id(data, 24),
        fields.number(data, 18, 19),
        unregister=bool(data[17] & 0x02),
        aptpl=bool(data[17] & 0x01),
    )


# ---------------------------------------------------------------- PERSISTENT RESERVE IN


def read_keys(state: State) -> bytes:
    """6.15.2: one key for each registered nexus."""
    return _counted(state, b"".join(struct.pack("!Q", key) for key in state.keys.values()))


def read_reservation(state: State) -> bytes:
    """6.15.3: with all registrants as holders the key is zero."""
    if state.kind is None:
        return _counted(state, b"")
    key = state.keys[state.holder] if state.holder else 0
    return _counted(state, struct.pack("!Q4xxBxx", key, state.kind))


def report_capabilities(state: State) -> bytes:
    """6.15.4."""
    return struct.pack(
        "!HBBHxx",
        8,
        0x1D,  # CRH, SIP_C, ATP_C, PTPL_C
        0x80 | 4 << 4 | state.aptpl,  # TMV, ALLOW COMMANDS 100b, PTPL_A
        0xEA01,  # PERSISTENT RESERVATION TYPE MASK: all six
    )


def read_full_status(state: State) -> bytes:
    """6.15.5: a descriptor for each registered nexus (so ALL_TG_PT is never set), with its TransportID."""
    body = b""
    for nexus, key in state.keys.items():
        held = state.kind if state.holds(nexus) else None
        body += struct.pack("!Q4xBB4xHI", key, held is not None, held or 0, nexus.port, len(nexus.initiator))
        body += nexus.initiator
    return _counted(state, body)


def _counted(state: State, body: bytes) -> bytes:
    return struct.pack("!II", state.generation, len(body)) + body


# ---------------------------------------------------------------- over a restart


def pack(state: State, port_name: Callable[[int], bytes]) -> bytes:
    """What is kept of a state (State.kept): JSON.  Target ports go by their names, which outlive their numbers."""

    def name(nexus: Nexus) -> dict[str, str]:
        return {"initiator": nexus.initiator[8:16].hex(), "target_port": port_name(nexus.port).hex()}

    value = {
        "version": 1,
        "registrations": [{**name(nexus), "key": f"{key:016x}"} for nexus, key in state.keys.items()],
        "type": state.kind,
        "holder": name(state.holder) if state.holder else None,
    }
    return json.dumps(value, indent=1).encode() + b"\n"


def unpack(data: bytes, port_number: Callable[[bytes], int]) -> State:
    """The state in what pack() has made.  Raises ValueError, which says what is wrong with it."""
    try:
        value = json.loads(data)
        if value["version"] != 1:
            raise ValueError(f"version {value['version']!r} is not known")

        def nexus(one: dict[str, str]) -> Nexus:
            initiator, port = bytes.fromhex(one["initiator"]), bytes.fromhex(one["target_port"])
            if len(initiator) != 8 or len(port) != 8:
                raise ValueError("a Port_Name has 8 bytes")
            return Nexus(bytes(8) + initiator + bytes(8), port_number(port))

        keys = {nexus(one): int(one["key"], 16) for one in value["registrations"]}
        kind = None if value["type"] is None else Kind(value["type"])
        holder = nexus(value["holder"]) if value["holder"] else None
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a record of reservations: {error!r}") from None
    sole = kind is not None and not kind.all_registrants
    if (holder is not None) != sole or (holder is not None and holder not in keys) or (kind and not keys):
        raise ValueError("the reservation's holder is not registered")
    if not all(0 < key < 1 << 64 for key in keys.values()):
        raise ValueError("a key is not in 1..2^64-1")
    return State(aptpl=True, keys=keys, kind=kind, holder=holder)
