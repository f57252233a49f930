"""What the commands share: how they are added to the parser, what arguments they have in common, how they run.

An async command runs until it ends or a signal cancels it; a daemon besides says to the log what ended it.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vhostfc.errors import ConfigError, VhostfcError, plain

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from vhostfc.fc.wwn import Wwn

T = TypeVar("T")
#: What a command does with its arguments; returns the exit status.
Command = Callable[[argparse.Namespace], int]
#: Adds a command: its name, what it does, and that in words; returns the parser of its arguments.
Add = Callable[[str, Command, str], argparse.ArgumentParser]

FAILED, USAGE = 1, 2
#: Where daemons have their sockets.
RUN = Path("/run/vhostfc")


# ---------------------------------------------------------------- arguments


def add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=f"a name under {RUN}, or the path of a control socket")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")


def add_log_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")


def parse_wwn(text: str) -> Wwn:
    from vhostfc.fc.wwn import Wwn, WwnError

    try:
        return Wwn.parse(text)
    except WwnError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_capture_size(parser: argparse.ArgumentParser) -> None:
    """--capture-size and --capture-files, of `capture` and `fabric`."""
    parser.add_argument("--capture-size", metavar="SIZE", help="begin another file when one has this size: 64MiB")
    parser.add_argument("--capture-files", type=int, default=2, metavar="N", help="files that are kept then (2)")


def capture_size(options: argparse.Namespace) -> int | None:
    """Bytes.  Raises ConfigError."""
    from vhostfc.values import size

    try:
        found = size(options.capture_size) if options.capture_size is not None else None
    except ValueError as error:
        raise ConfigError(f"--capture-size: {error}") from None
    if options.capture_files < 1:
        raise ConfigError(f"--capture-files: {options.capture_files}; at least one is kept")
    return found


# ---------------------------------------------------------------- running


def run(function: Callable[[], Awaitable[T]], stopping: Callable[[], object] = lambda: None) -> T | None:
    """Run an async function.  SIGTERM and SIGINT cancel it (None is returned); a second one ends us at once."""
    import signal

    import trio

    async def watch(cancel: Callable[[], None], task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for _ in signals:
                break
        stopping()
        cancel()

    async def supervise() -> T | None:
        result: T | None = None
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: watch(nursery.cancel_scope.cancel, task_status))
            result = await function()
            nursery.cancel_scope.cancel()
        return result

    return trio.run(supervise)


def run_daemon(function: Callable[[], Awaitable[None]], logger: FilteringBoundLogger) -> int:
    """Run a daemon until it is told to end; what ends it before that goes to the log."""
    from vhostfc.daemon.notify import Notifier

    try:
        with plain():
            run(function, stopping=Notifier.from_environment().stopping)
    except VhostfcError as error:
        logger.error(str(error))
        return USAGE if isinstance(error, ConfigError) else FAILED
    return 0


def control_path(name: str, root: Path = RUN) -> Path:
    """The control socket of a daemon: a path as it is, else a name under the run directory.

    Raises VhostfcError that lists what was tried.
    """
    tried = [Path(name), root / name / "vhost.control", root / f"{name}.control"]
    for path in tried:
        if path.exists() and not path.is_dir():
            return path
    raise VhostfcError(f"{name}: no such daemon is running; tried {', '.join(map(str, tried))}")
