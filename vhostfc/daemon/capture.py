"""Captures of frames into files that Wireshark opens: from the door to the disk, here or with the one who asked.

A sniffer stands at the door and must never hold it up: it keeps frames until they are fetched, up to a
bound, and counts those that it had no room for.  Files are written in threads.
"""

from __future__ import annotations

import base64
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import trio

from vhostfc import __version__
from vhostfc.daemon.fabric_door import Door
from vhostfc.errors import VhostfcError
from vhostfc.fabric.pcapng import Interface, Record, Section

Json = dict[str, Any]
#: Bytes of frames that wait to be fetched, and records that are fetched at a time.
ROOM, BATCH = 32 << 20, 256


class Sniffer:
    """A Tap.  dropped: frames that there was no room for."""

    def __init__(self, room: int = ROOM) -> None:
        self.dropped = 0
        self._room = room
        self._waiting: deque[Record] = deque()
        self._size = 0
        self._news = trio.Event()

    def put(self, record: Record) -> None:
        if self._size + len(record.frame) > self._room:
            self.dropped += 1
            return
        self._size += len(record.frame)
        self._waiting.append(record)
        self._news.set()

    def __aiter__(self) -> AsyncIterator[list[Record]]:
        return self

    async def __anext__(self) -> list[Record]:
        """What has come, in order, without end."""
        while not self._waiting:
            self._news = trio.Event()
            await self._news.wait()
        return self.take()

    def take(self) -> list[Record]:
        """What is there, without waiting."""
        batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
        self._size -= sum(len(record.frame) for record in batch)
        return batch


@contextmanager
def sniffing(door: Door) -> Iterator[Sniffer]:
    """A sniffer at the door."""
    sniffer = Sniffer()
    door.taps.append(sniffer)
    try:
        yield sniffer
    finally:
        door.taps.remove(sniffer)


class CaptureFile:
    """A capture on the disk.  size: bytes after which another file is begun; files: how many are kept then.

    The newest is always at `path`; older ones have a number before the suffix: x.pcapng, x.1.pcapng, ...
    "-" is standard output.  Raises VhostfcError when the file cannot be made.
    """

    def __init__(self, path: Path, *, size: int | None = None, files: int = 2, comment: str = "") -> None:
        self.path = path
        self.count = 0
        self.dropped = 0
        self._size = size
        self._files = files
        self._comment = comment
        self._open()

    def _open(self) -> None:
        self._section = Section(f"vhostfc {__version__}", self._comment)
        self._written = 0
        try:
            self._stream: BinaryIO = sys.stdout.buffer if str(self.path) == "-" else self.path.open("wb")
            self._put(self._section.header())
            self._stream.flush()
        except OSError as error:
            raise VhostfcError(f"{self.path}: cannot capture there: {error.strerror}") from None

    def _put(self, data: bytes) -> None:
        self._stream.write(data)
        self._written += len(data)

    def write(self, records: list[Record]) -> None:
        """Raises VhostfcError: the disk is full, the reader of a pipe has gone."""
        try:
            for record in records:
                packet = self._section.packet(record)
                if self._size is not None and self._written + len(packet) > self._size and self._section.packets > 1:
                    self._rotate()
                    packet = self._section.packet(record)
                self._put(packet)
                self.count += 1
            self._stream.flush()
        except OSError as error:
            raise VhostfcError(f"{self.path}: the capture ends: {error.strerror}") from None

    def _numbered(self, number: int) -> Path:
        return self.path.with_suffix(f".{number}{self.path.suffix}") if number else self.path

    def _rotate(self) -> None:
        self.close()
        for number in range(self._files - 1, 0, -1):
            if self._numbered(number - 1).exists():
                self._numbered(number - 1).replace(self._numbered(number))
        self._open()

    def close(self) -> None:
        """Write what belongs at the end."""
        try:
            self._put(self._section.statistics(time.time_ns(), self.dropped))
            self._stream.flush()
        except OSError:
            return  # whoever reads a pipe has gone, or write() has said that the disk is full
        finally:
            if str(self.path) != "-":
                self._stream.close()


async def capture_to(
    door: Door, file: CaptureFile, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Write all that passes the door, until cancelled.  Raises VhostfcError when the file cannot be written."""
    with sniffing(door) as sniffer:
        task_status.started()
        try:
            async for batch in sniffer:
                with trio.CancelScope(shield=True):  # what has been taken must not be lost on the way to the file
                    await trio.to_thread.run_sync(file.write, batch)
        finally:
            while batch := sniffer.take():
                file.write(batch)
            file.dropped = sniffer.dropped
            file.close()


# ---------------------------------------------------------------- over the control socket


def pack(records: list[Record], dropped: int) -> Json:
    """A batch of records as JSON."""
    return {
        "dropped": dropped,
        "frames": [
            [
                record.time,
                record.interface.name,
                record.interface.description,
                base64.b64encode(record.frame).decode(),
                record.comment,
            ]
            for record in records
        ],
    }


def unpack(batch: Json) -> list[Record]:
    """Raises VhostfcError for what pack() cannot have made."""
    try:
        return [
            Record(int(time_), Interface(str(name), str(description)), base64.b64decode(frame), str(comment))
            for time_, name, description, frame, comment in batch["frames"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise VhostfcError(f"not a batch of frames: {error}") from None


async def receive(
    lines: AsyncIterator[Json],
    file: CaptureFile,
    *,
    count: int | None = None,
    said: Callable[[int], object] = lambda frames: None,
) -> None:
    """Write what comes over a control socket to a file, up to so many frames."""
    async for batch in lines:
        records = unpack(batch)
        if count is not None:
            records = records[: count - file.count]
        file.dropped = int(batch.get("dropped", 0))
        await trio.to_thread.run_sync(file.write, records)
        said(file.count)
        if file.count == count:
            return
