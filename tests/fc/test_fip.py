"""FIP: what Linux and an FCF said to each other, read and written again, and what has to be discarded."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fc import golden
from tests.fc.pcap import packets
from vhostfc.fc import fip
from vhostfc.fc.fcoe import Ethernet
from vhostfc.fc.fip import Encapsulated, Fip, Flag, Operation
from vhostfc.fc.frame import FrameError
from vhostfc.fc.wwn import Wwn

SOLICITATION = bytes.fromhex("1000000100010006800002025254001234560403000010005254001234560601086e")
MAC = bytes.fromhex("525400123456")


def test_every_operation_of_a_recorded_session_is_read_and_written_the_same() -> None:
    seen = set()
    for packet in packets():
        ethernet = Ethernet.unpack(packet)
        if ethernet.ethertype == 0x8914:
            message = Fip.unpack(ethernet.payload)
            assert message.pack(pad_to=len(ethernet.payload)) == ethernet.payload
            seen.add(message.operation)
    assert seen == {
        Operation.SOLICITATION,
        Operation.ADVERTISEMENT,
        Operation.LINK_SERVICE_REQUEST,
        Operation.LINK_SERVICE_REPLY,
        Operation.KEEP_ALIVE,
    }


def test_a_solicitation() -> None:
    message = Fip.unpack(SOLICITATION)
    assert message == Fip(
        Operation.SOLICITATION,
        Flag.FPMA,
        (fip.Mac(MAC), fip.NameIdentifier(Wwn(0x1000525400123456)), fip.MaxFcoeSize(0x86E)),
    )
    assert message.pack() == SOLICITATION
    assert message.one(fip.Mac).address == MAC
    with pytest.raises(FrameError, match="0 VxPortId"):
        message.one(fip.VxPortId)


EVERY_DESCRIPTOR = (
    fip.Priority(3),
    fip.Mac(MAC),
    fip.FcMap(0x0EFC01),
    fip.NameIdentifier(Wwn(0x1000525400123456)),
    fip.Fabric(Wwn(0x1000000000000001), 0x0EFC00, 7),
    fip.MaxFcoeSize(2158),
    Encapsulated(Encapsulated.FLOGI, golden.FLOGI),
    Encapsulated(Encapsulated.FDISC, golden.FDISC),
    Encapsulated(Encapsulated.LOGO, golden.LOGO),
    fip.VxPortId(MAC, 0x010203, Wwn(0x2000525400123456)),
    fip.KeepAlivePeriod(8000, no_keep_alives=True),
    fip.VendorId(b"vhostfc!"),
    fip.Vlan(100),
)


def test_every_descriptor_there_and_back() -> None:
    message = Fip(Operation.ADVERTISEMENT, Flag.FPMA | Flag.FROM_FCF, EVERY_DESCRIPTOR)
    assert Fip.unpack(message.pack()) == message


def test_a_descriptor_that_is_not_critical_is_skipped() -> None:
    data = bytearray(SOLICITATION)
    data[7] += 1
    assert Fip.unpack(bytes(data) + bytes([128, 1, 0, 0])) == Fip.unpack(SOLICITATION)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({0: 0x20}, "version 2"),
        ({3: 9}, "operation 0x0009"),
        ({7: 7}, "28 bytes in 24"),
        ({11: 1}, "Mac descriptor of 4 bytes; 8 is right"),
        ({11: 0}, "type 2 and 0 bytes"),
        ({11: 63}, "type 2 and 252 bytes"),
        ({10: 99}, "critical"),
        ({10: 7}, "that shall hold an FC frame"),
    ],
)
def test_what_has_to_be_discarded(change: dict[int, int], why: str) -> None:
    data = bytearray(SOLICITATION)
    for at, value in change.items():
        data[at] = value
    with pytest.raises(FrameError, match=why):
        Fip.unpack(bytes(data))


@given(st.binary(max_size=64), st.integers(0, 20))
def test_anything_is_an_operation_or_a_frame_error(data: bytes, words: int) -> None:
    for attempt in (data, bytes.fromhex("10000001000100") + bytes([words]) + b"\x80\0" + data):
        with contextlib.suppress(FrameError):
            Fip.unpack(attempt)


def test_what_tshark_makes_of_ours(tmp_path: Path) -> None:
    """Wireshark's dissector reads every descriptor, and finds nothing to complain about."""
    messages = [
        Fip(Operation.ADVERTISEMENT, Flag.FPMA | Flag.FROM_FCF | Flag.AVAILABLE, EVERY_DESCRIPTOR[:6]),
        Fip(Operation.LINK_SERVICE_REPLY, Flag.FPMA | Flag.FROM_FCF, (*EVERY_DESCRIPTOR[6:8], fip.Mac(MAC))),
        Fip(Operation.CLEAR_VIRTUAL_LINKS, Flag.FPMA | Flag.FROM_FCF, (fip.Mac(MAC), EVERY_DESCRIPTOR[9])),
        Fip(Operation.KEEP_ALIVE, Flag.FPMA, (fip.Mac(MAC), EVERY_DESCRIPTOR[9])),
        Fip(Operation.VLAN_NOTIFICATION, Flag.FPMA | Flag.FROM_FCF, (fip.Mac(MAC), fip.Vlan(100))),
    ]
    capture = tmp_path / "fip.pcap"
    with capture.open("wb") as stream:
        stream.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        for message in messages:
            data = Ethernet(MAC, bytes.fromhex("020000000001"), 0x8914, message.pack()).pack()
            stream.write(struct.pack("<IIII", 0, 0, len(data), len(data)) + data)
    fields = ["fip.opcode", "fip.fab.map", "fip.fka", "fip.vlan", "fip.vn.fc_id", "fip.desc_unk"]
    fields += ["fip.descriptors.length_error", "_ws.malformed", "_ws.expert.message"]
    command = ["tshark", "-n", "-r", str(capture), "-T", "json", *(word for name in fields for word in ("-e", name))]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    layers = [packet["_source"]["layers"] for packet in json.loads(run.stdout)]
    assert [layer["fip.opcode"] for layer in layers] == [["0x0001"], ["0x0002"], ["0x0003"], ["0x0003"], ["0x0004"]]
    assert layers[0]["fip.fab.map"] == ["0e.fc.00"]
    assert layers[2]["fip.vn.fc_id"] == ["0x00010203"]
    assert layers[4]["fip.vlan"] == ["100"]
    complaints = {"fip.desc_unk", "fip.descriptors.length_error", "_ws.malformed", "_ws.expert.message"}
    assert [layer for layer in layers if complaints & layer.keys()] == []
