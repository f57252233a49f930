"""Log lines, as a terminal, a pipe and the journal get them."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from vhostfc.log import Journal, Text, configure, escape, journal_entry, quote


@pytest.fixture(autouse=True)
def default_logging() -> Iterator[None]:
    yield
    if structlog.is_configured() and isinstance(sink := structlog.get_config()["logger_factory"](), Journal):
        sink.close()
    structlog.reset_defaults()


def parse(entry: bytes) -> dict[str, bytes]:
    """What journald makes of a native entry (JOURNAL_NATIVE_PROTOCOL)."""
    fields = {}
    while entry:
        line, _, rest = entry.partition(b"\n")
        if b"=" in line:
            name, _, value = line.partition(b"=")
            entry = rest
        else:
            name, (size,) = line, struct.unpack_from("<Q", rest)
            value = rest[8 : 8 + size]
            assert rest[8 + size : 9 + size] == b"\n"
            entry = rest[9 + size :]
        fields[name.decode()] = value
    return fields


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_for_people() -> None:
    out = io.StringIO()
    log = configure("info", stream=out, environ={})
    log.debug("not said")
    log.bind(wwpn="50:01:43:80:12:34:56:78").warning("login refused", reason="already logged in", tries=3)
    line = out.getvalue()
    assert line[8:] == " warning login refused wwpn=50:01:43:80:12:34:56:78 reason='already logged in' tries=3\n"


def test_colours_only_on_a_terminal() -> None:
    for out, environ, coloured in (
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ):
        configure(stream=out, environ=environ).info("hello")
        assert ("\x1b" in out.getvalue()) == coloured


def test_an_exception_is_told_with_its_traceback() -> None:
    out = io.StringIO()
    log = configure(stream=out, environ={})
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        log.exception("a bug")
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("error   a bug")
    assert lines[1].startswith("Traceback")
    assert lines[-1] == "RuntimeError: boom"


def test_a_reader_that_is_gone_does_not_matter() -> None:
    read, write = os.pipe()
    os.close(read)
    out = os.fdopen(write, "w")
    configure(stream=out, environ={}).info("nobody hears this")
    with pytest.raises(BrokenPipeError):
        out.close()


@given(st.text())
def test_no_value_breaks_a_line_or_reaches_the_terminal_raw(text: str) -> None:
    for spelled in (quote(text), escape(text)):
        assert spelled.isprintable()
    assert quote(text) != ""


@given(st.dictionaries(st.sampled_from(["wwpn", "lun", "request", "bytes"]), st.text() | st.integers()), st.text())
def test_an_entry_is_read_back_by_the_journal(fields: dict[str, str | int], message: str) -> None:
    found = parse(journal_entry({**fields, "event": message, "level": "error"}))
    names = {"wwpn": "WWPN", "lun": "LUN", "request": "VHOSTFC_REQUEST", "bytes": "VHOSTFC_BYTES"}
    for key, value in fields.items():
        assert found[names[key]] == str(value).encode(errors="backslashreplace")
    assert found["PRIORITY"] == b"3"
    assert found["MESSAGE"].startswith(escape(message).encode())
    assert b"\n" not in found["MESSAGE"]


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "journal"))
        end.settimeout(5)
        yield end


@pytest.fixture
def sink(journald: socket.socket, tmp_path: Path) -> Iterator[Journal]:
    with contextlib.closing(Journal(tmp_path / "journal", Text(sys.stderr))) as sink:
        yield sink


def journal_stream(out: io.TextIOBase) -> dict[str, str]:
    found = os.fstat(out.fileno())
    return {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}


def test_fields_in_the_journal(journald: socket.socket, tmp_path: Path) -> None:
    with open(tmp_path / "stderr", "w+") as out:
        log = configure(stream=out, environ=journal_stream(out), journal=tmp_path / "journal")
        log.bind(adapter="vm1").info("unit found", lun=3, target_wwpn="50:06:01:60:00:00:00:01")
        assert parse(journald.recv(65536)) == {
            "MESSAGE": b"unit found adapter=vm1 lun=3 target_wwpn=50:06:01:60:00:00:00:01",
            "PRIORITY": b"6",
            "SYSLOG_IDENTIFIER": b"vhostfc",
            "VHOSTFC_ADAPTER": b"vm1",
            "LUN": b"3",
            "TARGET_WWPN": b"50:06:01:60:00:00:00:01",
        }
        out.seek(0)
        assert out.read() == ""


def test_an_entry_that_is_too_long_for_a_datagram(journald: socket.socket, sink: Journal) -> None:
    text = "x" * (16 << 20)
    sink.msg({"event": text, "level": "info"})
    _, fds, _, _ = socket.recv_fds(journald, 1, 1)
    try:
        assert parse(os.pread(fds[0], 17 << 20, 0))["MESSAGE"] == text.encode()
    finally:
        os.close(fds[0])


def test_another_stream_than_the_journals_is_just_text(journald: socket.socket, tmp_path: Path) -> None:
    """JOURNAL_STREAM is inherited by `systemd-run --pty` children and the like, whose stderr is something else."""
    with open(tmp_path / "stderr", "w+") as out:
        configure(stream=out, environ={"JOURNAL_STREAM": "1:2"}, journal=tmp_path / "journal").info("hello")
        out.seek(0)
        assert out.read()[8:] == " info    hello\n"


def test_without_a_journal_socket_lines_carry_their_priority(tmp_path: Path) -> None:
    with open(tmp_path / "stderr", "w+") as out:
        log = configure(stream=out, environ=journal_stream(out), journal=tmp_path / "nobody")
        log.error("link lost", adapter="vm1")
        out.seek(0)
        assert out.read() == "<3>link lost adapter=vm1\n"


def test_a_full_queue_is_counted_not_waited_for(journald: socket.socket, sink: Journal) -> None:
    event = {"event": "storm", "level": "info"}
    limit = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 10
    for _ in range(limit):
        sink.msg(event)
    heard = 0
    journald.setblocking(False)
    while True:
        try:
            assert parse(journald.recv(65536))["MESSAGE"] == b"storm"
        except BlockingIOError:
            break
        heard += 1
    sink.msg(event)
    lost = limit - heard
    assert lost > 0
    told = parse(journald.recv(65536))
    assert told["MESSAGE"] == f"{lost} log messages were lost: the journal's queue was full".encode()
    assert parse(journald.recv(65536))["MESSAGE"] == b"storm"
