"""A minimal reader of pcap files, for frames that were recorded."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

#: What one run of Linux 6.1 (libfc, fcoe) and an FCF said to each other: login, NPIV, discovery, I/O, logout.
LINUX = Path(__file__).parent / "fcoe.pcap"


def packets(path: Path = LINUX) -> Iterator[bytes]:
    data = path.read_bytes()
    magic = struct.unpack_from("<I", data)[0]
    assert magic == 0xA1B2C3D4
    at = 24
    while at < len(data):
        length = struct.unpack_from("<IIII", data, at)[2]
        yield data[at + 16 : at + 16 + length]
        at += 16 + length
