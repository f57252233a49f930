"""The host's ends of a guest's two lines: commands for guest_agent.py, and QEMU's monitor (QMP).

Both are sockets that the test made before QEMU started, so there is nothing to wait for and no
path that could be too long; when QEMU is gone they say so by their end.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.lab.guest_agent import HEADER

Sink = Callable[[bytes], None]


class GuestError(Exception):
    """The guest or QEMU did not do what it should; the message holds the end of its logs."""


class Job:
    """A command that runs in the guest.  output: stdout and stderr as they came."""

    def __init__(self, channel: Channel, ident: int, sink: Sink | None) -> None:
        self._channel, self._ident, self.sink = channel, ident, sink
        self.status: int | None = None
        self.output = bytearray()
        self.done = threading.Event()

    def write(self, data: bytes) -> None:
        for at in range(0, len(data), 4096):
            self._channel.send(self._ident, b"i", data[at : at + 4096])

    def close_stdin(self) -> None:
        self._channel.send(self._ident, b"i")

    def kill(self, number: int = signal.SIGKILL) -> None:
        self._channel.send(self._ident, b"k", str(int(number)).encode())

    def wait(self, timeout: float | None = None) -> tuple[int, str]:
        """(exit status, output).  What does not end in time is killed and has status 124."""
        if not self.done.wait(timeout):
            self.kill()
            self.done.wait(5)
            self.status = 124
        if self.status is None:
            raise GuestError("the guest went away during the command" + self._channel.why())
        return self.status, self.output.decode(errors="replace")


class Channel:
    """The host's end of the virtio-serial port."""

    def __init__(self, end: socket.socket, why: Callable[[], str]) -> None:
        self._socket = end
        self.why = why
        self._jobs: dict[int, Job] = {}
        self._lock = threading.Lock()
        self._last = 0
        self._marker = b""  # while set: skip everything up to this answer
        self._found = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def synchronise(self, timeout: float) -> None:
        """Wait until the agent answers, after a boot too; what was on the line before is skipped."""
        ident = int.from_bytes(os.urandom(3), "big") | 1 << 30
        self._found.clear()
        self._marker = HEADER.pack(ident, b"r", 0)
        self.send(ident, b"p")
        if not self._found.wait(timeout):
            raise GuestError(f"no answer from the guest in {timeout:g} s" + self.why())
        if self._closed:
            raise GuestError("QEMU ended before the guest was up" + self.why())

    def send(self, ident: int, kind: bytes, payload: bytes = b"") -> None:
        with self._lock:
            try:
                self._socket.sendall(HEADER.pack(ident, kind, len(payload)) + payload)
            except OSError as error:
                raise GuestError(f"the guest is gone: {error}" + self.why()) from None

    def popen(self, command: str, sink: Sink | None = None, *, stdin: bool = False) -> Job:
        self._last += 1
        job = self._jobs[self._last] = Job(self, self._last, sink)
        self.send(self._last, b"x", command.encode())
        if not stdin:
            job.close_stdin()
        return job

    def _read(self) -> None:
        buffer = b""
        while True:
            if self._marker:
                before, found, after = buffer.partition(self._marker)
                if found:
                    buffer, self._marker = after, b""
                    self._drop_jobs()
                    self._found.set()
                else:
                    buffer = before[-len(self._marker) :]
            else:
                buffer = self._frames(buffer)
            try:
                data = self._socket.recv(65536)
            except OSError:
                data = b""
            if not data:
                break
            buffer += data
        self._closed = True
        self._drop_jobs()
        self._found.set()

    def _drop_jobs(self) -> None:
        """Nothing more will come for what ran before."""
        for ident in list(self._jobs):
            self._jobs.pop(ident).done.set()

    def _frames(self, buffer: bytes) -> bytes:
        while len(buffer) >= HEADER.size:
            ident, kind, size = HEADER.unpack_from(buffer)
            if len(buffer) < HEADER.size + size:
                break
            payload, buffer = buffer[HEADER.size : HEADER.size + size], buffer[HEADER.size + size :]
            job = self._jobs.get(ident)
            if job is None:
                continue
            if kind == b"q":
                job.status = int(payload)
                del self._jobs[ident]
                job.done.set()
            else:
                job.output += payload
                if job.sink:
                    job.sink(payload)
        return buffer

    def close(self) -> None:
        self._socket.close()
        self._thread.join()


class Qmp:
    """QEMU's monitor."""

    def __init__(self, end: socket.socket, why: Callable[[], str]) -> None:
        self._socket = end
        self._why = why
        self._file = end.makefile("rw")
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self("qmp_capabilities")

    def _read(self) -> None:
        try:
            for line in self._file:
                message = json.loads(line)
                if "QMP" not in message:  # the greeting
                    (self._events if "event" in message else self._answers).put(message)
        except (OSError, ValueError):
            pass
        self._answers.put({"error": {"desc": "QEMU closed the monitor"}})

    def __call__(self, command: str, **arguments: object) -> Any:
        if command != "device_add":  # its properties may have underscores
            arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        with self._lock:
            try:
                self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
                self._file.flush()
                answer = self._answers.get(timeout=60)
            except (OSError, ValueError, queue.Empty) as error:
                raise GuestError(f"{command}: {error!r}" + self._why()) from None
        if "error" in answer:
            raise GuestError(f"{command}: {answer['error']['desc']}" + self._why())
        return answer["return"]

    def event(self, name: str, timeout: float = 30) -> dict[str, Any]:
        """The data of the next event of this name; others before it are dropped."""
        end = time.monotonic() + timeout
        while True:
            try:
                event = self._events.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise GuestError(f"no {name} event in {timeout:g} s" + self._why()) from None
            if event["event"] == name:
                return dict(event.get("data", {}))

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._file.close()
        self._socket.close()
