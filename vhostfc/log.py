"""Where log lines go: to people on a terminal, to fields in the journal.

Everybody logs through structlog: a sentence and key=value fields.  On a terminal or in a file that
becomes a line of text.  Under systemd (JOURNAL_STREAM names our stderr) it becomes a native journal
entry, so that `journalctl WWPN=50:01:...` finds all that concerns one port (systemd's
JOURNAL_NATIVE_PROTOCOL).  When the journal cannot be reached, lines go to stderr with the <priority>
prefix of sd-daemon(3).

A value may hold bytes that a guest chose (a model name, a request's name): it is always escaped.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import struct
import sys
import time
from array import array
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, TextIO

import structlog
from structlog.typing import FilteringBoundLogger, WrappedLogger

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
JOURNAL = Path("/run/systemd/journal/socket")

#: syslog(3) priorities of structlog's levels.
_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_COLOUR = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[1;31m"}
#: Fields with a name of their own in the journal; others get VHOSTFC_ before theirs.
_FIELDS = {"adapter": "VHOSTFC_ADAPTER", "wwpn": "WWPN", "wwnn": "WWNN", "target_wwpn": "TARGET_WWPN", "lun": "LUN"}


def configure(
    level: str = "info",
    *,
    stream: TextIO | None = None,
    environ: Mapping[str, str] = os.environ,
    journal: Path = JOURNAL,
) -> FilteringBoundLogger:
    """Set up logging for this process and return a logger.  level: a key of LEVELS."""
    out = sys.stderr if stream is None else stream
    sink: Text | Journal = Text(out, colours=_is_terminal(out, environ))
    if _is_journal(out, environ):
        sink = Journal(journal, fallback=Text(out, prefixed=True))
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            sink.render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=False,
    )
    log: FilteringBoundLogger = structlog.get_logger()
    return log


class _Sink:
    """What structlog calls last: whatever the level's name, the rendered event is written."""

    def msg(self, event: Any) -> None:
        raise NotImplementedError

    def debug(self, event: Any) -> None:
        self.msg(event)

    info = warning = error = critical = debug


class Text(_Sink):
    """Lines for people: time, level, sentence, fields; or, prefixed, for a journal that reads our stderr."""

    def __init__(self, stream: TextIO, *, colours: bool = False, prefixed: bool = False) -> None:
        self._stream = stream
        self._colours = colours
        self._prefixed = prefixed

    def render(self, _logger: WrappedLogger, _name: str, event: MutableMapping[str, Any]) -> str:
        level = str(event.pop("level", "info"))
        lines = sentence(event).split("\n")
        if self._prefixed:
            return "\n".join(f"<{_PRIORITY[level]}>{line}" for line in lines)
        lines[0] = f"{self._level(level)} {lines[0]}"
        return f"{time.strftime('%H:%M:%S')} " + "\n".join(lines)

    def _level(self, level: str) -> str:
        return f"{_COLOUR[level]}{level:<7}\x1b[0m" if self._colours else f"{level:<7}"

    def msg(self, event: str) -> None:
        try:
            self._stream.write(event + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads any more: no reason to end
            pass


class Journal(_Sink):
    """Native journal entries; what does not fit a datagram goes in a sealed memfd.

    Never waits: the loop that logs also answers QEMU.  What a full queue refused is counted and told.
    """

    def __init__(self, path: Path, fallback: Text) -> None:
        self._path = str(path)
        self._fallback = fallback
        self._lost = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)

    def render(self, _logger: WrappedLogger, _name: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
        return {"event": dict(event)}

    def msg(self, event: dict[str, Any]) -> None:
        note = f"{self._lost} log messages were lost: the journal's queue was full"
        if self._lost and self._write({"level": "warning", "event": note}):
            self._lost = 0
        if not self._write(event):
            self._lost += 1

    def close(self) -> None:
        self._socket.close()

    def _write(self, event: dict[str, Any]) -> bool:
        """False when the queue is full."""
        entry = journal_entry(event)
        try:
            try:
                self._socket.sendto(entry, self._path)
            except OSError as error:
                if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                    raise
                self._send_memfd(entry)
        except BlockingIOError:
            return False
        except OSError:
            self._fallback.msg(self._fallback.render(None, "", dict(event)))
        return True

    def _send_memfd(self, entry: bytes) -> None:
        fd = os.memfd_create("journal-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(entry)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
            self._socket.sendmsg([], rights, 0, self._path)
        finally:
            os.close(fd)


def sentence(event: Mapping[str, Any]) -> str:
    """The event and its fields as text; a traceback follows on lines of its own."""
    words = [escape(str(event.get("event", "")))]
    words += [f"{key}={quote(value)}" for key, value in event.items() if key not in ("event", "level", "exception")]
    lines = [" ".join(words)]
    if "exception" in event:
        lines += [escape(line) for line in str(event["exception"]).splitlines()]
    return "\n".join(lines)


def journal_entry(event: Mapping[str, Any]) -> bytes:
    """One entry of the native protocol: NAME=value lines, or NAME, length and bytes when there is a newline."""
    fields = {
        "MESSAGE": sentence(event),
        "PRIORITY": str(_PRIORITY[str(event.get("level", "info"))]),
        "SYSLOG_IDENTIFIER": "vhostfc",
    }
    for key, value in event.items():
        if key not in ("event", "level", "exception"):
            name = _FIELDS.get(key) or "VHOSTFC_" + re.sub(r"[^A-Z0-9_]", "_", key.upper())
            fields[name[:64]] = str(value)
    entry = bytearray()
    for name, value in fields.items():
        data = value.encode(errors="backslashreplace")
        if b"\n" in data:
            entry += name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
        else:
            entry += name.encode() + b"=" + data + b"\n"
    return bytes(entry)


def quote(value: object) -> str:
    """A value as one word, in quotes when it would not look like one."""
    text = value if isinstance(value, str) else str(value)
    return escape(text) if re.fullmatch(r"[^\s\"'=\\]+", text) and text.isprintable() else repr(text)


def escape(text: str) -> str:
    """Printable on one line: no control characters, no half characters."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _is_terminal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    return stream.isatty() and "NO_COLOR" not in environ and environ.get("TERM") != "dumb"


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether this stream is the journal's: JOURNAL_STREAM is its device:inode (systemd.exec(5)), and is inherited."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
