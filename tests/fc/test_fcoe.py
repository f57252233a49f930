"""FCoE encapsulation: what Linux put on the wire, read and written again, and what is no frame."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fc import golden
from tests.fc.pcap import packets
from vhostfc.fc import fcoe
from vhostfc.fc.fcoe import Eof, Ethernet, Sof, decapsulate, delimiters, encapsulate, fpma, is_unicast, parse_mac
from vhostfc.fc.frame import Frame, FrameError


def test_every_frame_of_a_recorded_session_is_read_and_written_the_same() -> None:
    pdus = [Ethernet.unpack(packet).payload for packet in packets() if packet[12:14] == b"\x89\x06"]
    assert len(pdus) == 243
    for pdu in pdus:
        frame = decapsulate(pdu)
        assert encapsulate(frame) == pdu
        assert Frame.unpack(frame).pack() == frame


def test_the_first_and_the_last_frame_of_a_sequence_show_in_its_delimiters() -> None:
    assert delimiters(golden.FLOGI) == (Sof.I3, Eof.T)
    assert [delimiters(header + bytes(length)) for header, length in golden.WRITE_DATA] == [
        (Sof.I3, Eof.N),
        (Sof.N3, Eof.T),
    ]


@given(st.binary(max_size=2300))
def test_anything_is_a_frame_or_a_frame_error(data: bytes) -> None:
    for read in (decapsulate, Ethernet.unpack):
        with contextlib.suppress(FrameError):
            read(data)


PDU = encapsulate(golden.FLOGI)


@pytest.mark.parametrize(
    ("pdu", "why"),
    [
        (PDU[:45], "45 bytes"),
        (b"\x10" + PDU[1:], "version 1"),
        (PDU[:13] + b"\x2d" + PDU[14:], "SOF 0x2d"),
        (PDU[:-4] + b"\x50\0\0\0", "EOF 0x50"),
        (PDU[:40] + bytes([PDU[40] ^ 1]) + PDU[41:], "wrong CRC"),
        (PDU + bytes(2144), "bytes"),
    ],
)
def test_what_is_no_pdu(pdu: bytes, why: str) -> None:
    with pytest.raises(FrameError, match=why):
        decapsulate(pdu)


def test_mac_addresses() -> None:
    assert fpma(fcoe.FC_MAP, 0x010203).hex(":") == "0e:fc:00:01:02:03"
    assert parse_mac(" 52-54-00-AB-cd-ef ") == bytes.fromhex("525400abcdef")
    for wrong in ("", "52:54:00:12:34", "52:54:00:12:34:5g", "525400123456", "52:54:00:12:34:567"):
        with pytest.raises(ValueError, match="six pairs"):
            parse_mac(wrong)
    assert [is_unicast(mac) for mac in (fcoe.ALL_FCF_MACS, bytes(6), bytes.fromhex("020000000001"))] == [
        False,
        False,
        True,
    ]
