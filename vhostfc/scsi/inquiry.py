"""INQUIRY data and vital product data: who a disk says it is (SPC-4 6.6 and 7.8, SBC-3 6.6).

Multipath software joins paths by the designators of page 83h, and file systems shape their I/O by
pages B0h to B2h, so every byte here is one that somebody acts on.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vhostfc.scsi.sense import invalid_cdb

#: PERIPHERAL QUALIFIER 0, direct access block device (SPC-4 tables 142 and 143).
DISK = 0x00
#: PERIPHERAL QUALIFIER 011b, type 1Fh: no device can be here.
NOBODY = 0x7F
#: A well-known logical unit.
WELL_KNOWN = 0x1E

#: SPC-4 table 146: SAM-5, FCP-4, SPC-4, SBC-3, no version claimed.
_VERSION_DESCRIPTORS = (0x00A0, 0x0A40, 0x0460, 0x04C0)
_WELL_KNOWN_VERSION_DESCRIPTORS = (0x00A0, 0x0A40, 0x0460)
_PROTOCOL_FCP = 0x0

#: What an EXTENDED COPY may hold: CSCD descriptors, segments, and bytes of both; the descriptors' type codes.
MAX_CSCDS, MAX_SEGMENTS, MAX_COPY_LIST = 8, 16, 8 * 32 + 16 * 28
COPY_DESCRIPTORS = (0x02, 0xE4)


@dataclass(frozen=True, slots=True)
class TargetPort:
    """A target port through which the unit is reached.

    relative: its relative target port identifier, 1 and up; name: Port_Name, 8 bytes; group: its target port group.
    """

    relative: int
    name: bytes
    group: int = 1


@dataclass(frozen=True, slots=True)
class Identity:
    """All that does not change in the life of a unit but for its size.

    vendor, product, revision: ASCII, cut at 8, 16 and 4; serial: ASCII; naa: one or more designators of
    8 (NAA 2, 3, 5) or 16 bytes (NAA 6).  ports: all target ports of the device; node: its Node_Name, 8 bytes.
    physical_exponent: logical blocks per physical block, as a power of two.  thin: logical block
    provisioning, blocks that are not mapped read as zeros.  write_cache: there is a volatile cache.
    max_transfer: logical blocks in one command; the other limits of page B0h too are in blocks.
    rotation: page B1h, 1 is non-rotating.
    """

    serial: str
    naa: tuple[bytes, ...]
    vendor: str = "VHOSTFC"
    product: str = "Disk"
    revision: str = "1"
    ports: tuple[TargetPort, ...] = ()
    node: bytes = b""
    block_size: int = 512
    physical_exponent: int = 0
    thin: bool = True
    write_cache: bool = True
    read_only: bool = False
    rotation: int = 1
    max_transfer: int = 0
    max_write_same: int = 0
    max_unmap: int = 1 << 20
    max_unmap_descriptors: int = 256
    max_compare_and_write: int = 255
    max_atomic: int = 0

    def __post_init__(self) -> None:
        """Limits that are 0 take their defaults: 32 MiB a transfer, 1 MiB a WRITE SAME or a WRITE ATOMIC."""
        if not self.max_transfer:
            object.__setattr__(self, "max_transfer", (32 << 20) // self.block_size)
        if not self.max_write_same:
            object.__setattr__(self, "max_write_same", (1 << 20) // self.block_size)
        if not self.max_atomic:
            object.__setattr__(self, "max_atomic", (1 << 20) // self.block_size)

    def group(self, relative: int) -> int:
        """The target port group of a port; 0, which is no group's number, for a port that is not listed."""
        return next((port.group for port in self.ports if port.relative == relative), 0)


def _ascii(text: str, length: int) -> bytes:
    """Left-aligned, padded with spaces, nothing outside 20h..7Eh (SPC-4 4.4.1)."""
    printable = "".join(c if " " <= c <= "~" else "?" for c in text)
    return printable[:length].ljust(length).encode("ascii")


def _standard(
    device: int, vendor: str, product: str, revision: str, *, multiport: bool, versions: tuple[int, ...], flags: int = 0
) -> bytes:
    """Standard INQUIRY data, 96 bytes, of a device that claims SPC-4.  flags: byte 5."""
    head = bytes(
        [
            device,
            0x00,  # RMB 0
            0x06,  # VERSION: SPC-4
            0x12,  # HISUP, RESPONSE DATA FORMAT 2
            96 - 5,  # ADDITIONAL LENGTH
            flags,
            0x10 if multiport else 0x00,  # MULTIP
            0x02,  # CMDQUE
        ]
    )
    names = _ascii(vendor, 8) + _ascii(product, 16) + _ascii(revision, 4)
    descriptors = struct.pack(f"!{len(versions)}H", *versions)
    return (head + names + bytes(22) + descriptors).ljust(96, b"\0")


def standard(identity: Identity) -> bytes:
    """Standard INQUIRY data of the disk (SPC-4 6.6.2)."""
    return _standard(
        DISK,
        identity.vendor,
        identity.product,
        identity.revision,
        multiport=len(identity.ports) > 1,
        versions=_VERSION_DESCRIPTORS,
        flags=0x38,  # TPGS: implicit and explicit; 3PC; no SCCS, PROTECT
    )


def standard_absent() -> bytes:
    """Standard INQUIRY data of a LUN at which there is nothing (SAM-5 4.6.19, SPC-4 6.6.1)."""
    return _standard(NOBODY, "", "", "", multiport=False, versions=())


def absent_data(code: int | None) -> bytes:
    """INQUIRY data of a LUN at which there is nothing; code: a vital product data page, None for standard data."""
    if code is None:
        return standard_absent()
    if code != 0x00:
        raise invalid_cdb(2)
    return page(NOBODY, 0x00, b"\0")


def page(device: int, code: int, body: bytes) -> bytes:
    """A vital product data page: header and body."""
    return struct.pack("!BBH", device, code, len(body)) + body


def designator(code_set: int, kind: int, value: bytes, *, association: int = 0) -> bytes:
    """A designation descriptor (SPC-4 7.8.6.1); for ports and devices PIV and the protocol are filled in.

    association: 0 logical unit, 1 target port, 2 target device.
    """
    piv = 0x80 if association else 0x00
    return bytes([_PROTOCOL_FCP << 4 | code_set, piv | association << 4 | kind, 0, len(value)]) + value


def designators(identity: Identity, port: int) -> bytes:
    """Page 83h's designation descriptors, for a command that came through the port with this relative identifier."""
    parts = [designator(1, 3, naa) for naa in identity.naa]
    parts.append(designator(2, 1, _ascii(identity.vendor, 8) + identity.serial.encode("ascii", "replace")))
    return b"".join(parts) + _port_designators(identity, port)


def _port_designators(identity: Identity, port: int) -> bytes:
    parts = []
    for one in identity.ports:
        if one.relative == port:
            parts.append(designator(1, 3, one.name, association=1))
            parts.append(designator(1, 4, struct.pack("!HH", 0, one.relative), association=1))
            parts.append(designator(1, 5, struct.pack("!HH", 0, one.group), association=1))
    if identity.node:
        parts.append(designator(1, 3, identity.node, association=2))
    return b"".join(parts)


def _extended(identity: Identity) -> bytes:
    """86h, Extended INQUIRY Data (SPC-4 7.8.7): HEADSUP, ORDSUP, SIMPSUP, V_SUP if there is a cache, LUICLR."""
    body = bytearray(0x3C)
    body[5 - 4] = 0x07
    body[6 - 4] = 0x01 if identity.write_cache else 0x00
    body[7 - 4] = 0x01
    return bytes(body)


def _scsi_ports(identity: Identity) -> bytes:
    """88h (SPC-4 7.8.15): every target port of the device, whichever one the command came through."""
    body = b""
    for one in identity.ports:
        name = designator(1, 3, one.name, association=1)
        body += struct.pack("!2xH2xH2xH", one.relative, 0, len(name)) + name
    return body


def _third_party_copy(identity: Identity) -> bytes:
    """8Fh (SPC-4 7.8.17): supported commands, parameter data, supported descriptors, CSCD IDs, general operations."""
    commands = bytes([0x83, 1, 0x00, 0x84, 3, 0x00, 0x03, 0x04])
    parts = (
        (0x0001, bytes([len(commands)]) + commands),
        (0x0004, struct.pack("!4xHHII12x", MAX_CSCDS, MAX_SEGMENTS, MAX_COPY_LIST, 0)),
        (0x0008, bytes([len(COPY_DESCRIPTORS), *COPY_DESCRIPTORS])),
        (0x000C, bytes(2)),  # no CSCD IDs but those of descriptors
        (0x8001, struct.pack("!IIIBB18x", 1, 1, 0xFFFF * identity.block_size, 0, 0)),
    )
    body = b""
    for kind, part in parts:
        padded = part.ljust((len(part) + 3) // 4 * 4, b"\0")
        body += struct.pack("!HH", kind, len(padded)) + padded
    return body


def _block_limits(identity: Identity) -> bytes:
    """B0h (SBC-3 6.6.4, with the atomic fields of SBC-4)."""
    granularity = 1 << identity.physical_exponent
    return struct.pack(
        "!BBHIIIIIIIQIIIII",
        0x01,  # WSNZ: a WRITE SAME of zero blocks is refused
        identity.max_compare_and_write,
        granularity if identity.physical_exponent else 0,  # OPTIMAL TRANSFER LENGTH GRANULARITY
        identity.max_transfer,
        0,  # OPTIMAL TRANSFER LENGTH: not reported
        0,  # MAXIMUM PREFETCH LENGTH: not reported
        identity.max_unmap if identity.thin else 0,
        identity.max_unmap_descriptors if identity.thin else 0,
        granularity if identity.thin else 0,  # OPTIMAL UNMAP GRANULARITY
        0x80000000 if identity.thin else 0,  # UGAVALID, UNMAP GRANULARITY ALIGNMENT 0
        identity.max_write_same,
        identity.max_atomic,
        *(0, 0, 0, 0),  # ATOMIC ALIGNMENT and GRANULARITY: any; with ATOMIC BOUNDARY: nothing
    )


def _characteristics(identity: Identity) -> bytes:
    """B1h (SBC-3 6.6.3): MEDIUM ROTATION RATE; WABEREQ and WACEREQ 01b; form factor not reported; VBULS.

    01b: after a SANITIZE with erasure, what is not written yet is read without an error (SBC-3 table 202).
    VBULS: VERIFY compares blocks that are not mapped too, as the zeros that they read as.
    """
    return struct.pack("!HxBB55x", identity.rotation, (0x40 if identity.thin else 0x00) | 0x10, 0x01)


def _provisioning(identity: Identity) -> bytes:
    """B2h (SBC-3 6.6.5): LBPU, LBPWS, LBPWS10, LBPRZ and thin, or nothing for a fully provisioned unit."""
    return bytes([0, 0xE4, 0x02, 0]) if identity.thin else bytes(4)


def vital_product_data(identity: Identity, code: int, port: int) -> bytes:
    """A vital product data page of the disk.  Raises CheckCondition for one that it does not have."""
    match code:
        case 0x00:
            body = bytes([0x00, 0x80, 0x83, 0x86, 0x87, 0x88, 0x8F, 0xB0, 0xB1, 0xB2])
        case 0x80:
            body = identity.serial.encode("ascii", "replace")
        case 0x83:
            body = designators(identity, port)
        case 0x86:
            body = _extended(identity)
        case 0x87:
            body = bytes([0x3F, 0xFF, 0x00, 0x00])  # all mode pages are shared by all nexuses (SPC-4 7.8.10)
        case 0x88:
            body = _scsi_ports(identity)
        case 0x8F:
            body = _third_party_copy(identity)
        case 0xB0:
            body = _block_limits(identity)
        case 0xB1:
            body = _characteristics(identity)
        case 0xB2:
            body = _provisioning(identity)
        case _:
            raise invalid_cdb(2)
    return page(DISK, code, body)


def well_known_data(identity: Identity, code: int | None, port: int) -> bytes:
    """INQUIRY data of the REPORT LUNS well-known logical unit; code: a page, None for standard data.

    Page 83h has no designator of the unit, only of port and device (SPC-4 7.8.6.2.1).
    """
    if code is None:
        return _standard(
            WELL_KNOWN,
            identity.vendor,
            "REPORT LUNS",
            identity.revision,
            multiport=len(identity.ports) > 1,
            versions=_WELL_KNOWN_VERSION_DESCRIPTORS,
        )
    match code:
        case 0x00:
            return page(WELL_KNOWN, code, bytes([0x00, 0x83]))
        case 0x83:
            return page(WELL_KNOWN, code, _port_designators(identity, port))
    raise invalid_cdb(2)
