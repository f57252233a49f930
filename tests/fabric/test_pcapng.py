"""Capture files, as Wireshark's own reader understands them."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.fabric.san import Initiator, San
from vhostfc.fabric import pcapng
from vhostfc.fabric.pcapng import EOF_N, EOF_T, SOF_I3, SOF_N3, Interface, Record, Section, delimited
from vhostfc.fc import els
from vhostfc.fc.fcp import FcpCmnd
from vhostfc.fc.frame import Frame, els_request
from vhostfc.fc.sequence import target_data

FIELDS = [
    *("frame.interface_name", "frame.interface_description", "frame.comment", "frame.time_epoch", "frame.encap_type"),
    *("fc.sof", "fc.eof", "fc.crc.status", "_ws.col.Protocol", "_ws.col.Info", "_ws.malformed", "_ws.expert.severity"),
]


def read(path: Path) -> list[dict[str, str]]:
    """What tshark makes of each packet."""
    command = ["tshark", "-n", "-r", str(path), "-T", "json", *(word for name in FIELDS for word in ("-e", name))]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    packets = [packet["_source"]["layers"] for packet in json.loads(run.stdout)]
    return [{name: "; ".join(layers.get(name, [])) for name in FIELDS} for layers in packets]


def faulty(packets: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those that are malformed, or that an expert has an error or a warning for; a comment is an expert's word too."""
    return [
        p for p in packets if p["_ws.malformed"] or {"6291456", "8388608"} & {*p["_ws.expert.severity"].split("; ")}
    ]


def test_wireshark_reads_frames_with_their_delimiters_names_and_comments(tmp_path: Path) -> None:
    section = Section("vhostfc", "a lab")
    one, other = Interface("vm1", "F_Port 1"), Interface("array-a")
    echo = els_request(0x010101, 0x01FE01, 1, els.Echo(b"12345678").pack())
    data = list(target_data(echo, bytes(5000), rx_id=7, seq_id=1))
    records = [Record(1_700_000_000_123_456_789, one, echo.pack(), "lost: fault lose-1")]
    records += [Record(1_700_000_001_000_000_000 + n, other, frame.pack()) for n, frame in enumerate(data)]
    path = tmp_path / "c.pcapng"
    text = section.header() + b"".join(map(section.packet, records)) + section.statistics(1_700_000_002_000_000_000, 3)
    path.write_bytes(text)

    first, *rest = read(path)

    assert first["frame.interface_name"] == "vm1"
    assert first["frame.interface_description"] == "F_Port 1"
    assert first["frame.comment"] == "lost: fault lose-1"
    assert first["frame.time_epoch"] == "1700000000.123456789"
    assert first["_ws.col.Info"] == "ECHO"
    assert [packet["frame.interface_name"] for packet in rest] == ["array-a"] * 3
    assert {packet["fc.crc.status"] for packet in [first, *rest]} == {"1"}, "good"
    assert not faulty([first, *rest])


def test_the_delimiters_are_those_of_the_place_in_the_sequence() -> None:
    template = Frame(1, 1, 2, 8, 0x800000, 1)
    frames = [f.pack() for f in target_data(template, bytes(5000), rx_id=7, seq_id=1)]
    starts = [int.from_bytes(delimited(frame)[:4], "big") for frame in frames]
    ends = [int.from_bytes(delimited(frame)[-4:], "big") for frame in frames]
    assert starts == [SOF_I3, SOF_N3, SOF_N3]
    assert ends == [EOF_N, EOF_N, EOF_T]


def test_a_whole_session_has_no_malformed_frame(tmp_path: Path) -> None:
    """Everything that goes through the switch's door in a login, commands and a logout."""
    san = San()
    section = Section("vhostfc")
    written = [section.header()]
    receive, send = san.switch.receive, san.deliver

    def record(name: str, frame: bytes) -> None:
        written.append(section.packet(Record(len(written), Interface(name), frame)))

    def sniff(f_port: int, data: bytes) -> object:
        record(f"F_Port {f_port}", data)
        return receive(f_port, data)

    def deliver(outputs: list[tuple[int, object]]) -> None:
        for _, what in outputs:
            if isinstance(what, bytes):
                record("switch", what)
        send(outputs)  # type: ignore[arg-type]  # a spy

    san.switch.receive = sniff  # type: ignore[method-assign, assignment]  # a spy
    san.deliver = deliver  # type: ignore[method-assign, assignment]  # a spy
    one = Initiator(san, 1).login().scr().open()
    one.command(bytes([0x12, 0, 0, 0, 96, 0]), data_in=96)
    one.command(bytes([0x28, 0, 0, 0, 0, 0, 0, 0, 8, 0]), data_in=8 * 512)
    one.start(FcpCmnd(bytes(8), bytes([0x2A, 0, 0, 0, 0, 0, 0, 0, 8, 0]), 8 * 512, write=True))
    one.els(0xFFFFFE, els.Logo(one.port_id, one.wwpn).pack())
    path = tmp_path / "s.pcapng"
    path.write_bytes(b"".join(written))

    packets = read(path)

    assert len(packets) > 20
    assert not faulty(packets)
    assert {p["fc.crc.status"] for p in packets} == {"1"}


@given(st.binary(max_size=2200), st.text(max_size=20), st.integers(0, (1 << 64) - 1))
def test_blocks_are_whole_words_whose_length_stands_at_both_ends(frame: bytes, text: str, time: int) -> None:
    section = Section("x", text)
    written = (
        section.header() + section.packet(Record(time, Interface(text), frame, text)) + section.statistics(time, 1)
    )
    kinds, at = [], 0
    while at < len(written):
        kind, length = struct.unpack_from("<II", written, at)
        assert length % 4 == 0
        assert struct.unpack_from("<I", written, at + length - 4) == (length,)
        kinds.append(kind)
        at += length
    assert kinds == [0x0A0D0D0A, 1, 6, 5]


def test_a_text_without_end_is_cut() -> None:
    long = "x" * 100_000
    packet = Section(long).packet(Record(0, Interface(long), bytes(24), long))
    assert len(packet) < 3 * pcapng.MAX_TEXT + 500
