"""What the kernel says by itself: messages as it sends them, and sockets on a kernel that is there."""

from __future__ import annotations

import struct

from vhostfc.ports.fcevents import FC_EVENTS, FcEvent, FcEventCode, Uevent, decode_fc, decode_uevent

#: As seen: a vport's LIPRESET, 56 bytes; and a unit attention met by somebody's command.
HEADER = struct.Struct("=IHHII")
EVENT = struct.Struct("=BBHHHQQHHII")


def event(code: int, data: bytes = b"", *, magic: int = 0xA1B2, host: int = 3, number: int = 7) -> bytes:
    body = EVENT.pack(1, 1, magic, 0x0100, 40 + len(data), 1_700_000_000, 0, host, len(data) or 4, number, code)
    body += data or bytes(4)
    return HEADER.pack(16 + len(body), 0x11, 0, 0, 0) + body


def test_a_fibre_channel_event() -> None:
    assert decode_fc(event(4)) == [FcEvent(3, FcEventCode.LIPRESET, 7, bytes(4))]
    assert len(event(4)) == 16 + 36 + 4


def test_an_rscn_has_its_page() -> None:
    (found,) = decode_fc(event(5, b"\0\x01\xfe\x01"))
    assert (found.code, found.data) == (FcEventCode.RSCN, b"\0\x01\xfe\x01")


def test_several_in_one_datagram() -> None:
    assert [one.number for one in decode_fc(event(2, number=1) + event(3, number=2))] == [1, 2]


def test_what_is_none_is_left_out() -> None:
    assert decode_fc(event(5, magic=0x1234)) == []
    assert decode_fc(event(5)[:20]) == []
    assert decode_fc(b"") == []
    assert decode_fc(struct.pack("=I", 0xFFFFFFFF) + bytes(100)) == []


def test_the_group_is_the_fourth() -> None:
    """The kernel uses the constant 4 as a group's number: bit 3."""
    assert FC_EVENTS == 0x8


def test_a_uevent() -> None:
    text = (
        "change@/devices/pci0/host0/vport-0:0-0/host1/rport-1:0-0/target1:0:0/1:0:0:1",
        "ACTION=change",
        "DEVPATH=/devices/pci0/host0/vport-0:0-0/host1/rport-1:0-0/target1:0:0/1:0:0:1",
        "SUBSYSTEM=scsi",
        "SDEV_UA=CAPACITY_DATA_HAS_CHANGED",
        "DEVTYPE=scsi_device",
        "SEQNUM=1234",
    )
    found = decode_uevent("\0".join(text).encode() + b"\0")
    assert isinstance(found, Uevent)
    assert (found.action, found.subsystem) == ("change", "scsi")
    assert found.devpath.endswith("1:0:0:1")
    assert found.properties["SDEV_UA"] == "CAPACITY_DATA_HAS_CHANGED"


def test_udevs_own_and_nonsense_are_not_uevents() -> None:
    assert decode_uevent(b"libudev\0" + bytes(64)) is None
    assert decode_uevent(b"nonsense") is None
