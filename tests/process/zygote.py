"""Real daemons in a few milliseconds, that die or stop at a step of fencing when they are told to.

`python -m tests.process.zygote` has the program loaded and forks for each line on stdin: a daemon like any other,
but that its plan (a file of one line, "STEP ACTION [PID]") is looked at whenever it comes to a step:

    message   an adapter has got a Route that takes the right to write, and has not looked at it
    ack       it has obeyed, and has not said so
    acked     it has said so
    good      the fabric is about to answer a PREEMPT (AND ABORT): everybody has obeyed

The action is "kill" or "stop", of the process itself or of the one that the plan names.  It happens once.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab.san import Daemon
from vhostfc import cli, log
from vhostfc.cli import daemons
from vhostfc.daemon import capture, control, fabric_changes, fabricd, fabrics, fdsocket, hba, notify
from vhostfc.daemon.workers import Workers
from vhostfc.fabric import link
from vhostfc.fabric.sessions import Exchange
from vhostfc.fabric.target import TargetPort
from vhostfc.fc.frame import Frame
from vhostfc.ports import emulated
from vhostfc.ports.emulated_paths import Paths
from vhostfc.scsi.task import ScsiResult

#: What a daemon imports when it runs, so that a child has nothing to load.
LOADED = (log, daemons, capture, control, fabric_changes, fabricd, fabrics, fdsocket, hba, notify, emulated)

_WRITE_10 = 0x2A
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


# ---------------------------------------------------------------- in the daemon


def _act(plan: Path, step: str) -> None:
    """Do what the plan says of this step."""
    try:
        wanted, action, *pid = plan.read_text().split()
    except (OSError, ValueError):
        return
    if wanted == step:
        plan.unlink()
        with contextlib.suppress(ProcessLookupError):  # fenced already
            os.kill(int(pid[0]) if pid else os.getpid(), _SIGNALS[action])


def _patch(plan: Path) -> None:
    may_write: dict[int, bool] = {}
    route = Paths.route
    acknowledgement = Paths._acknowledgement
    finish = TargetPort.finish
    narrowing: set[int] = set()

    def routed(self: Paths, what: link.Route, fds: list[int]) -> None:
        allowed = bool(what.mask[_WRITE_10 // 8] >> _WRITE_10 % 8 & 1)
        if may_write.get(what.nexus) and not allowed:
            narrowing.add(what.seq)
            _act(plan, "message")
        may_write[what.nexus] = allowed
        route(self, what, fds)

    def acknowledged(self: Paths, seq: int) -> Callable[[], None]:
        say = acknowledgement(self, seq)

        def wrapped() -> None:
            if seq in narrowing:
                _act(plan, "ack")
            say()
            if seq in narrowing:
                threading.Timer(0.002, _act, (plan, "acked")).start()

        return wrapped

    def finished(self: TargetPort, exchange: Exchange, result: ScsiResult, moved: int | None = None) -> Iterator[Frame]:
        if exchange.cmnd.cdb[0] == 0x5F and exchange.cmnd.cdb[1] & 0x1F in (4, 5):
            _act(plan, "good")
        return finish(self, exchange, result, moved)

    Paths.route = routed  # type: ignore[method-assign, assignment]
    Paths._acknowledgement = acknowledged  # type: ignore[method-assign]
    TargetPort.finish = finished  # type: ignore[method-assign]
    # io_uring writes in the kernel, where nothing can be made slow from here.
    Workers.running = functools.partial(Workers.running, uring=False)  # type: ignore[method-assign]


def _become(arguments: list[str], log: str, plan: str) -> int:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, number in ((null, 0), (out, 1), (out, 2)):
        os.dup2(fd, number)
    sys.argv = ["vhostfc", *arguments]
    _patch(Path(plan))
    return cli.main(arguments)


def main() -> None:
    children: set[int] = set()
    gc.freeze()  # a child that collects does not look at, and so copy, what is loaded here
    for line in sys.stdin.buffer:
        # Until it is waited for, a child's number is nobody else's.
        children -= {pid for pid in children if os.waitpid(pid, os.WNOHANG)[0]}
        pid = os.fork()
        if not pid:
            os._exit(_become(**json.loads(line)))
        children.add(pid)
        print(pid, flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# ---------------------------------------------------------------- in the test


class Forked(Daemon):
    """A daemon that a Zygote has made."""

    def __init__(self, zygote: Zygote, arguments: list[str], log: Path, plan: Path) -> None:
        self.log = log
        self.arguments = arguments
        self._from = log.stat().st_size if log.exists() else 0
        self._pid = zygote.fork(arguments, log, plan)
        self._dead = False

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def alive(self) -> bool:
        """A process has its files until its last thread is gone, though its first one is a zombie by then."""
        if not self._dead:  # once it is, its number may come to be another's
            try:
                fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(") ")[2].split()
                self._dead = fields[0] in "ZX" and int(fields[17]) <= 1  # state, num_threads (proc(5))
            except OSError:
                self._dead = True
        return not self._dead

    def signal(self, number: int) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    def stop(self, timeout: float = 20) -> int:
        self.signal(signal.SIGTERM)
        self._gone(timeout)
        return 0

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._gone(20)

    def _gone(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while self.alive:
            assert time.monotonic() < end, f"{self.arguments} does not end"
            time.sleep(0.001)


class Zygote:
    """The process that forks.  preload: a library for all that it makes."""

    def __init__(self, preload: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.process.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "LD_PRELOAD": str(preload)},
        )

    def fork(self, arguments: list[str], log: Path, plan: Path) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        wanted: dict[str, Any] = {"arguments": arguments, "log": str(log), "plan": str(plan)}
        self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


if __name__ == "__main__":
    main()
