"""A storage area network of real processes: one `vhostfc fabric` and an adapter per virtual machine.

For tests that judge the program as its users run it: over files, sockets and signals.  Everything
lives in one directory; whatever was started is killed at the end, and the logs stay for the message
of a failed test.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TARGET = "50:06:01:60:00:00:00:01"
TARGET_NODE = "50:06:01:60:00:00:00:00"


def wwpn(number: int) -> str:
    """The WWPN of adapter vm<number>."""
    return f"50:01:43:80:00:00:{number:02x}:00"


@dataclass
class UnitSpec:
    """A [[target.unit]] table; allow: adapters' numbers."""

    lun: int
    source: str = 'size = "64MiB"'
    allow: Sequence[int] | None = None
    extra: str = ""

    def toml(self) -> str:
        lines = ["[[target.unit]]", f"lun = {self.lun}", self.source]
        if self.allow is not None:
            lines.append(f"allow = {json.dumps([wwpn(number) for number in self.allow])}")
        return "\n".join([*lines, self.extra])


@dataclass
class Zone:
    """A [[zone]] of adapters' numbers with the one target."""

    name: str
    adapters: Sequence[int]

    def toml(self) -> str:
        members = [TARGET, *(wwpn(number) for number in self.adapters)]
        return f'[[zone]]\nname = "{self.name}"\nmembers = {json.dumps(members)}'


class Daemon:
    """A running `vhostfc ...`, its log in a file: text() is what this one has said, not those before it.

    fds: descriptors that it inherits.  shell: a script and its arguments that start it, with the command line after
    them.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        log: Path,
        environment: dict[str, str] | None = None,
        fds: Sequence[int] = (),
        shell: Sequence[str] = (),
    ) -> None:
        self.log = log
        self.arguments = [str(argument) for argument in arguments]
        self._from = log.stat().st_size if log.exists() else 0
        before = ["bash", "-c", shell[0], "bash", *shell[1:]] if shell else []
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [*before, sys.executable, "-m", "vhostfc", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **(environment or {})},
                pass_fds=fds,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self, timeout: float = 20) -> int:
        """SIGTERM; the exit status."""
        if self.alive:
            self.process.terminate()
        return self.process.wait(timeout)

    def kill(self) -> None:
        if self.alive:
            self.process.kill()
        self.process.wait()

    def text(self) -> str:
        return self.log.read_bytes()[self._from :].decode(errors="replace")

    def lines(self, pattern: str) -> list[str]:
        """The lines of the log in which a pattern is found."""
        return [line for line in self.text().splitlines() if re.search(pattern, line)]

    def await_line(self, pattern: str, timeout: float = 10) -> str:
        """The first line of the log in which a pattern is found, when it is there."""
        San.wait_for(lambda: self.lines(pattern), self, timeout)
        return self.lines(pattern)[0]


@dataclass
class San:
    """The network.  Use as a context manager; adapters are started with adapter(number)."""

    directory: Path
    units: list[UnitSpec]
    zones: list[Zone] = field(default_factory=list)
    fence_timeout: float = 2.0
    extra: str = ""  # more of the fabric's file
    fabric_options: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    adapters: dict[int, Daemon] = field(default_factory=dict)
    fabric: Daemon | None = None
    started: list[Daemon] = field(default_factory=list)

    @property
    def fabric_socket(self) -> Path:
        return self.directory / "fabric.sock"

    @property
    def fabric_control(self) -> Path:
        return self.directory / "fabric.control"

    @property
    def the_fabric(self) -> Daemon:
        assert self.fabric is not None
        return self.fabric

    def socket(self, number: int) -> Path:
        return self.directory / f"vm{number}.sock"

    def control(self, number: int) -> Path:
        return self.directory / f"vm{number}.control"

    @property
    def fcoe_socket(self) -> Path:
        return self.directory / "fcoe.sock"

    def write_fabric(self) -> Path:
        """Write the fabric's file as the fields have it now."""
        path = self.directory / "fabric.toml"
        parts = [
            f'state = "{self.directory / "fabric-state"}"\n[fabric]\nsocket = "{self.fabric_socket}"\n'
            f"fence_timeout = {self.fence_timeout}",
            f'[[target]]\nname = "array-a"\nwwpn = "{TARGET}"\nwwnn = "{TARGET_NODE}"',
            *(unit.toml() for unit in self.units),
            *(zone.toml() for zone in self.zones),
            self.extra,
        ]
        path.write_text("\n".join(parts) + "\n")
        return path

    def write_adapter(self, number: int, vhost: str = "", fabric: str = "") -> Path:
        path = self.directory / f"vm{number}.toml"
        path.write_text(
            f'state = "{self.directory / f"vm{number}-state"}"\n'
            f'[[port]]\nwwpn = "{wwpn(number)}"\nwwnn = "{wwpn(number)[:-2]}01"\n'
            f'[fabric]\nemulated = "{self.fabric_socket}"\n{fabric}\n'
            f'[vhost]\nsocket = "{self.socket(number)}"\n{vhost}\n'
        )
        return path

    def start_fabric(self, *options: str) -> Daemon:
        self.fabric = Daemon(
            ["fabric", "--config", self.write_fabric(), *self.fabric_options, *options],
            self.directory / "fabric.log",
            self.environment,
        )
        self.started.append(self.fabric)
        self.wait_for(lambda: self.answers(self.fabric_control, self.the_fabric), self.fabric)
        return self.fabric

    def start_adapter(self, number: int, *, online: bool = True, **how: Any) -> Daemon:
        """Start an adapter; returns when its control socket answers and, with `online`, its port is logged in.

        how: as for spawn_adapter().
        """
        daemon = self.spawn_adapter(number, **how)
        self.wait_for(lambda: self.answers(self.control(number), daemon), daemon)
        if online:
            self.wait_online(number)
        return daemon

    def start_adapters(self, how: Mapping[int, dict[str, Any]]) -> None:
        """Some at a time: what each shall be, by its number, as for spawn_adapter(); returns when all are logged in."""
        for number, options in how.items():
            self.spawn_adapter(number, **options)
        for number in how:
            daemon = self.adapters[number]
            self.wait_for(partial(self.answers, self.control(number), daemon), daemon)
            self.wait_online(number)

    def spawn_adapter(
        self,
        number: int,
        *,
        vhost: str = "",
        fabric: str = "",
        options: Sequence[str | Path] = (),
        fds: Sequence[int] = (),
        environment: dict[str, str] | None = None,
    ) -> Daemon:
        """Begin to start an adapter.

        vhost, fabric: more lines for these tables of its file.  options: more words for the command.
        """
        daemon = Daemon(
            ["serve", "--config", self.write_adapter(number, vhost, fabric), *options],
            self.directory / f"vm{number}.log",
            {**self.environment, **(environment or {})},
            fds,
        )
        self.adapters[number] = daemon
        self.started.append(daemon)
        return daemon

    def wait_online(self, number: int, timeout: float = 30) -> None:
        """Until the adapter's port is logged in."""
        self.wait_for(lambda: self.status(number)["port"]["state"] == "online", self.adapters[number], timeout)

    def status(self, number: int) -> dict[str, Any]:
        return self.call(self.control(number))[0]

    def fabric_status(self) -> dict[str, Any]:
        return self.call(self.fabric_control)[0]

    @staticmethod
    def call(control: Path, command: str = "status") -> tuple[dict[str, Any], int]:
        """A daemon's answer on its control socket, and its pid.  Raises OSError where nobody listens."""
        with socket.socket(socket.AF_UNIX) as end:
            end.settimeout(30)
            end.connect(str(control))
            pid: int = struct.unpack("iII", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            end.sendall(json.dumps({"command": command}).encode() + b"\n")
            with end.makefile("rb") as lines:
                answer: dict[str, Any] = json.loads(lines.readline())
        assert answer.pop("ok", False), answer
        return answer, pid

    @staticmethod
    def answers(control: Path, daemon: Daemon) -> bool:
        """Does this very process answer there, not only a socket that a dead one left?"""
        try:
            return San.call(control)[1] == daemon.pid
        except OSError:
            return False

    @staticmethod
    def ask(control: Path, command: str = "status") -> dict[str, Any]:
        """`vhostfc COMMAND --json`."""
        done = subprocess.run(
            [sys.executable, "-m", "vhostfc", command, str(control), "--json"], capture_output=True, check=False
        )
        if done.returncode:
            raise AssertionError(f"vhostfc {command} {control}: {done.stderr.decode()}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def reload(self) -> None:
        """Write the fabric's file anew and have it taken over; returns when it is in force."""
        self.write_fabric()
        self.call(self.fabric_control, "reload")

    @staticmethod
    def wait_for(condition: Callable[[], object], daemon: Daemon | None = None, timeout: float = 30) -> None:
        """Until the condition holds; a daemon that ended meanwhile fails at once, with its log."""
        end = time.monotonic() + timeout
        while not condition():
            if daemon is not None and not daemon.alive:
                raise AssertionError(f"{daemon.arguments} ended: {daemon.text()}")
            if time.monotonic() > end:
                raise AssertionError(f"waited {timeout} s" + (f": {daemon.text()}" if daemon else ""))
            time.sleep(0.02)

    def stop(self) -> None:
        for daemon in reversed(self.started):
            daemon.kill()

    def __enter__(self) -> Self:
        try:
            self.start_fabric()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        logs = {log.name: log.read_text(errors="replace") for log in sorted(self.directory.glob("*.log"))}
        if error is not None:
            for name, text in logs.items():
                error.add_note(f"--- {name}\n{text[-4000:]}")
            return
        for name, text in logs.items():
            assert "Traceback" not in text, f"{name}: an exception in the log is a fault\n{text}"
