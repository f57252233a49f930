"""The vhostfc command: arguments in, exit status out.

Exit status: 0 success, 1 what was asked did not happen, 2 a usage or configuration error.  Errors are
lines on stderr; a traceback is a bug of ours.  Each command imports what it needs when it runs, so
that `serve`, which a starting guest waits for, loads nothing of the others.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vhostfc import __version__
from vhostfc.cli_fabric import add_capture_size, add_commands, capture_size
from vhostfc.errors import ConfigError, VhostfcError

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from vhostfc.config import AdapterConfig, FabricConfig
    from vhostfc.fc.wwn import Wwn

T = TypeVar("T")
Command = Callable[[argparse.Namespace], int]

FAILED, USAGE = 1, 2
RUN = Path("/run/vhostfc")
HELPER = Path("/run/vhostfc-helper/helper.sock")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    # QEMU's conventions for back-end programs know no subcommands: --socket-path, --fd and
    # --print-capabilities, the last of which makes all others void (docs/interop/vhost-user.rst).
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help", "--version"):
        words.insert(0, "serve")
    if words[:1] == ["serve"] and "--print-capabilities" in words:
        print(json.dumps({"type": "scsi", "features": []}))
        return 0
    try:
        options = _parser().parse_args(words)
    except SystemExit as ending:  # argparse has said what is wrong, or has shown its help
        return int(ending.code or 0)
    command: Command = options.run
    try:
        with _plain_errors():
            status = command(options)
            sys.stdout.flush()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE
    except VhostfcError as error:
        print(f"vhostfc: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # `vhostfc status vm1 | head`: python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return FAILED
    except SystemExit as ending:  # options that do not go together
        return int(ending.code or 0)
    return status


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Tasks raise groups; when all in one is for the administrator, raise just the first of them."""
    try:
        yield
    except BaseExceptionGroup as group:
        ours, rest = group.split(VhostfcError)
        if ours is None or rest is not None:
            raise
        error: BaseException = ours
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


# ---------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vhostfc", description="A Fibre Channel host bus adapter for a virtual machine.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"vhostfc {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Command, help_: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help_, description=help_[0].upper() + help_[1:] + ".", allow_abbrev=False
        )
        added.set_defaults(run=run)
        return added

    command("demo", _demo, "a fabric, two adapters and their drivers in one go; prints what happened")

    serve = command("serve", _serve, "one virtual adapter, for one QEMU")
    serve.add_argument("--config", type=Path, metavar="FILE", help="the adapter's file (docs/configuration.md)")
    where = serve.add_mutually_exclusive_group()
    where.add_argument(
        "--socket-path", type=Path, metavar="PATH", help="listen here for QEMU, instead of the file's socket"
    )
    where.add_argument(
        "--fd", type=int, metavar="N", help="QEMU's connection, or a listening socket, that was inherited"
    )
    serve.add_argument("--wwpn", type=_wwn, help="without --config: the adapter's Port_Name")
    serve.add_argument("--wwnn", type=_wwn, help="without --config: the adapter's Node_Name")
    serve.add_argument("--fabric", type=Path, metavar="SOCKET", help="without --config: the software fabric's socket")
    serve.add_argument("--state", type=Path, metavar="DIRECTORY", help="without --config: where bindings are kept")
    serve.add_argument("--print-capabilities", action="store_true", help="print what this back end can do, and end")
    _add_log_level(serve)

    fabric = command("fabric", _fabric, "the software fabric: a switch, its arrays and their disks")
    fabric.add_argument(
        "--config", type=Path, metavar="FILE", required=True, help="the fabric's file (docs/configuration.md)"
    )
    fabric.add_argument(
        "--capture", type=Path, metavar="FILE", help="write all frames to this pcapng file, from the beginning"
    )
    add_capture_size(fabric)
    _add_log_level(fabric)

    check = command("check", _check, "is this file right? errors as file:line: key: what is wrong")
    check.add_argument("files", type=Path, nargs="+", metavar="FILE")
    _add_json(check)

    probe = command("probe", _probe, "be a driver: list targets, units, sizes")
    probe.add_argument("socket", type=Path, metavar="SOCKET", help="an adapter's vhost-user socket")
    _add_json(probe)

    bench = command("bench", _bench, "be a driver: measure, and verify when asked")
    bench.set_defaults(usage=bench.error)
    bench.add_argument(
        "socket", type=Path, nargs="?", metavar="SOCKET", help="a back end's vhost-user socket (vhost-user-scsi)"
    )
    bench.add_argument("--rw", choices=("randread", "randwrite", "randrw", "read", "write"), default="randread")
    bench.add_argument("--bs", default="4k", metavar="SIZE", help="bytes of a command: 512, 4k (default), 1M")
    bench.add_argument("--iodepth", type=int, default=32, metavar="N", help="commands in flight on each queue (32)")
    bench.add_argument("--queues", type=int, default=1, metavar="N", help="request queues, each with a thread (1)")
    bench.add_argument("--seconds", type=float, default=10.0, metavar="S", help="how long to measure, all runs (10)")
    bench.add_argument("--runs", type=int, default=5, metavar="N", help="runs to take medians of (5)")
    bench.add_argument("--warmup", type=float, default=0.5, metavar="S", help="before each run, not measured (0.5)")
    bench.add_argument("--read-percent", type=int, default=50, metavar="N", help="of randrw (50)")
    bench.add_argument("--unit", metavar="T:L", help="target and LUN; must be said where the unit is written to")
    bench.add_argument("--verify", action="store_true", help="write tagged blocks, and check all that is read")
    bench.add_argument("--packed", action="store_true", help="packed rings instead of split ones")
    bench.add_argument("--poll", action="store_true", help="spin for answers instead of sleeping")
    bench.add_argument(
        "--null-path", action="store_true", help="also, or without SOCKET only, measure the driver against nothing"
    )
    bench.add_argument("--bare-copy", action="store_true", help="also time the copy that a unit of memory needs")
    bench.add_argument(
        "--compare", type=Path, metavar="SOCKET", help="load this one too, in turn (A B A B), and print the ratio"
    )
    _add_json(bench)

    for name, help_ in (
        ("status", "what a running daemon is doing"),
        ("rescan", "have an adapter ask the fabric and every target afresh"),
        ("ls", "what an adapter's port can see: targets, units, and what these say of themselves"),
        ("reload", "have a fabric read its file again; returns when the change is in force"),
    ):
        steer = command(name, _steer, help_)
        steer.set_defaults(order=name)
        steer.add_argument("name", metavar="NAME", help=f"a name under {RUN}, or the path of a control socket")
        _add_json(steer)

    login = command("login", _login, "log an adapter's WWPN in without a guest, so that it can be zoned and masked")
    login.add_argument("name", metavar="NAME", help="an adapter under /etc/vhostfc, or the path of its file")
    login.add_argument("--for", dest="duration", type=_duration, default=1800.0, metavar="TIME", help="30m (default)")
    _add_log_level(login)

    setup = command("setup", _setup, "have this host keep its hands off the units of vports")
    setup.add_argument("--undo", action="store_true", help="take it back")

    doctor = command("doctor", _doctor, "what of this host is ready for an HBA's adapters, missing or wrong")
    _add_json(doctor)

    helper = command("helper", _helper, "the privileged steps of adapters on an HBA (a service, for root)")
    helper.add_argument("--socket", type=Path, default=HELPER, metavar="PATH")
    helper.add_argument("--etc", type=Path, default=Path("/etc/vhostfc"), metavar="DIRECTORY", help="adapters' files")
    helper.add_argument("--user", default="vhostfc", metavar="USER", help="who may ask, besides root")
    _add_log_level(helper)

    add_commands(command, _Tools())

    wwn = command("wwn", _wwn_new, "make a WWPN/WWNN pair, read any spelling").add_subparsers(
        metavar="ACTION", required=True
    )
    new = wwn.add_parser("new", help="a fresh pair, as an adapter's file spells it", allow_abbrev=False)
    new.set_defaults(run=_wwn_new)
    _add_json(new)
    show = wwn.add_parser("show", help="what a name says, from any spelling", allow_abbrev=False)
    show.set_defaults(run=_wwn_show)
    show.add_argument("names", type=_wwn, nargs="+", metavar="WWN")
    _add_json(show)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")


def _add_log_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")


def _wwn(text: str) -> Wwn:
    from vhostfc.fc.wwn import Wwn, WwnError

    try:
        return Wwn.parse(text)
    except WwnError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# ---------------------------------------------------------------- daemons


def _run(function: Callable[[], Awaitable[T]], stopping: Callable[[], object] = lambda: None) -> T | None:
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


def _daemon(function: Callable[[], Awaitable[None]], logger: FilteringBoundLogger) -> int:
    """Run a daemon until it is told to end; what ends it before that goes to the log."""
    from vhostfc.daemon.notify import Notifier

    try:
        with _plain_errors():
            _run(function, stopping=Notifier.from_environment().stopping)
    except VhostfcError as error:
        logger.error(str(error))
        return USAGE if isinstance(error, ConfigError) else FAILED
    return 0


def _serve(options: argparse.Namespace) -> int:
    from vhostfc import lean

    lean.postpone()
    from vhostfc import log
    from vhostfc.daemon import fabrics, hba
    from vhostfc.daemon.fdsocket import adopt, listen
    from vhostfc.daemon.notify import passed_fds

    config = _adapter_config(options)
    fabrics.load(config)
    logger = log.configure(options.log_level).bind(adapter=config.name)

    async def serve() -> None:
        passed = [options.fd] if options.fd is not None else [given.fd for given in passed_fds()]
        if len(passed) > 1:
            raise ConfigError(f"{len(passed)} sockets were passed to this adapter; expected one")
        with contextlib.closing(adopt(passed[0]) if passed else listen(config.socket)) as door:
            await hba.run_adapter(config, listener=door, log=logger)

    lean.settle()
    return _daemon(serve, logger)


def _adapter_config(options: argparse.Namespace) -> AdapterConfig:
    """The adapter from its file, or from --wwpn, --wwnn and --fabric."""
    from vhostfc import config

    given = {name: getattr(options, name) for name in ("wwpn", "wwnn", "fabric", "state")}
    if options.config is not None:
        also = [f"--{name}" for name, value in given.items() if value is not None]
        if also:
            raise ConfigError(f"{', '.join(also)}: not together with --config, which has them")
        adapter = config.load_adapter(options.config)
        if options.socket_path is None:
            return adapter
        socket = options.socket_path.absolute()
        return dataclasses.replace(adapter, socket=socket, control=config.control_for(socket))
    missing = [f"--{name}" for name in ("wwpn", "wwnn", "fabric") if given[name] is None]
    if missing:
        raise ConfigError(
            "an adapter needs names of its own and a fabric: give --config FILE,"
            f" or --wwpn, --wwnn and --fabric (missing: {', '.join(missing)}); `vhostfc wwn new` makes names"
        )
    name = options.wwpn.pack().hex()
    socket = (options.socket_path or RUN / name / "vhost.sock").absolute()
    return config.AdapterConfig(
        path=Path(os.devnull),
        name=name,
        ports=(config.PortConfig(options.wwpn, options.wwnn),),
        emulated=options.fabric.absolute(),
        socket=socket,
        control=config.control_for(socket),
        state=config.state_directory(name) if options.state is None else options.state.absolute(),
    )


def _fabric(options: argparse.Namespace) -> int:
    from vhostfc import lean

    lean.postpone()
    from vhostfc import log
    from vhostfc.daemon import fabricd
    from vhostfc.daemon.capture import CaptureFile
    from vhostfc.daemon.fabric_changes import load_with_kept

    fabric, kept = load_with_kept(options.config)
    logger = log.configure(options.log_level)
    capture = None
    if options.capture is not None:
        capture = CaptureFile(options.capture, size=capture_size(options), files=options.capture_files)
    lean.settle()
    return _daemon(lambda: fabricd.run_fabric(fabric, kept=kept, capture=capture, log=logger), logger)


# ---------------------------------------------------------------- an HBA's side


def _duration(text: str) -> float:
    import re

    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 30m, 8h or 2d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _login(options: argparse.Namespace) -> int:
    from vhostfc import config, log
    from vhostfc.daemon.login import hold_login
    from vhostfc.outline import outline

    path = Path(options.name) if options.name.endswith(".toml") else Path("/etc/vhostfc") / f"{options.name}.toml"
    adapter = config.load_adapter(path)
    logger = log.configure(options.log_level).bind(adapter=adapter.name)

    def tell(sight: dict[str, Any]) -> None:
        print("\n".join(outline(sight)), flush=True)

    done = _run(lambda: hold_login(adapter, seconds=options.duration, tell=tell, log=logger))
    return 0 if done else FAILED


def _setup(options: argparse.Namespace) -> int:
    from vhostfc.daemon import setup

    setup.as_root()
    steps = setup.undo() if options.undo else setup.set_up()
    for step in steps:
        print(step.what)
    return 0 if all(step.done for step in steps) else FAILED


def _doctor(options: argparse.Namespace) -> int:
    from vhostfc.daemon import doctor

    findings = list(doctor.examine(doctor.where_am_i(), doctor.real_facts()))
    print(json.dumps({"findings": doctor.as_json(findings)}) if options.json else doctor.as_text(findings))
    return 0 if doctor.healthy(findings) else FAILED


def _helper(options: argparse.Namespace) -> int:
    import pwd
    import socket

    import trio

    from vhostfc import log
    from vhostfc.daemon.helper import listening_socket, run_helper
    from vhostfc.daemon.notify import Notifier, passed_fds
    from vhostfc.ports.kernel import LinuxKernel

    logger = log.configure(options.log_level)
    try:
        user = pwd.getpwnam(options.user)
    except KeyError:
        raise ConfigError(f"--user {options.user}: there is no such user") from None

    async def serve() -> None:
        passed = [given.fd for given in passed_fds()]
        if passed:
            listener = trio.socket.from_stdlib_socket(socket.socket(fileno=passed[0]))
        else:
            listener = listening_socket(options.socket, user.pw_gid)
        Notifier.from_environment().ready("the helper of adapters on an HBA")
        await run_helper(
            listener,
            LinuxKernel(),
            etc=options.etc,
            notes=options.socket.parent,
            users={user.pw_uid},
            log=logger,
        )

    return _daemon(serve, logger)


# ---------------------------------------------------------------- the driver's side


def _demo(_options: argparse.Namespace) -> int:
    from vhostfc.daemon.demo import run_demo

    async def demo() -> bool:
        await run_demo()
        return True

    return 0 if _run(demo) else FAILED


def _probe(options: argparse.Namespace) -> int:
    from vhostfc.frontend.probe import probe

    result = _run(lambda: probe(options.socket))
    if result is None:
        return FAILED
    print(json.dumps(result.as_json()) if options.json else result.as_text())
    return 0


def _bench(options: argparse.Namespace) -> int:
    from vhostfc.frontend import figures
    from vhostfc.frontend.bench import bench, compare, null_path
    from vhostfc.frontend.options import BenchOptions, parse_size, parse_unit

    if options.socket is None and (not options.null_path or options.compare):
        options.usage("say which SOCKET to load; only --null-path by itself does without")
    wanted = BenchOptions(
        rw=options.rw,
        block_size=parse_size(options.bs),
        iodepth=options.iodepth,
        queues=options.queues,
        seconds=options.seconds,
        unit=None if options.unit is None else parse_unit(options.unit),
        verify=options.verify,
        read_percent=options.read_percent,
        warmup=options.warmup,
        poll=options.poll,
        runs=options.runs,
        packed=options.packed,
        null_path=options.null_path,
        bare_copy=options.bare_copy,
    )
    if options.socket is None:
        runs = _run(lambda: null_path(wanted))
        if runs is None:
            return FAILED
        print(json.dumps({"null_path": figures.null_json(runs)}) if options.json else figures.null_text(runs))
        return 0
    result: figures.BenchResult | figures.Comparison | None
    if options.compare is not None:
        result = _run(lambda: compare((options.socket, options.compare), wanted))
    else:
        result = _run(lambda: bench(options.socket, wanted))
    if result is None:
        return FAILED
    print(json.dumps(result.as_json()) if options.json else result.as_text())
    return FAILED if result.errors else 0


# ---------------------------------------------------------------- files, control sockets, names


def _check(options: argparse.Namespace) -> int:
    from vhostfc import config

    found: list[dict[str, Any]] = []
    for path in options.files:
        try:
            loaded = config.load(path)
        except ConfigError as error:
            found.append({"file": str(path), "problems": list(error.problems)})
            continue
        kind = "fabric" if isinstance(loaded, config.FabricConfig) else "adapter"
        found.append({"file": str(path), "kind": kind, "problems": [], "says": _summary(loaded)})
    wrong = any(one["problems"] for one in found)
    if options.json:
        print(json.dumps({"files": found}))
        return USAGE if wrong else 0
    for one in found:
        for problem in one["problems"]:
            print(problem, file=sys.stderr)
        if not one["problems"]:
            print(f"{one['file']}: {one['says']}")
    return USAGE if wrong else 0


def _summary(loaded: AdapterConfig | FabricConfig) -> str:
    """What a file is, in a few words, so that a wrong one under a right name is noticed."""
    from vhostfc.config import AdapterConfig

    if isinstance(loaded, AdapterConfig):
        return f"adapter {loaded.name}, WWPN {', '.join(str(port.wwpn) for port in loaded.ports)}"
    units = sum(len(target.units) for target in loaded.targets)
    return f"fabric {loaded.name}: targets {len(loaded.targets)}, units {units}, zones {len(loaded.zones)}"


def _steer(options: argparse.Namespace) -> int:
    from functools import partial

    from vhostfc.daemon import control
    from vhostfc.outline import outline

    path = control_path(options.name)
    answer = _run(partial(control.call, path, options.order))
    if answer is None:
        return FAILED
    print(json.dumps(answer) if options.json else "\n".join(outline(answer)) or "done")
    return 0


def control_path(name: str, run: Path = RUN) -> Path:
    """The control socket of a daemon: a path as it is, else a name under the run directory.

    Raises VhostfcError that lists what was tried.
    """
    tried = [Path(name), run / name / "vhost.control", run / f"{name}.control"]
    for path in tried:
        if path.exists() and not path.is_dir():
            return path
    raise VhostfcError(f"{name}: no such daemon is running; tried {', '.join(map(str, tried))}")


class _Tools:
    """What the commands of cli_fabric are lent."""

    def run(self, function: Callable[[], Awaitable[T]]) -> T | None:
        return _run(function)

    def control_path(self, name: str) -> Path:
        return control_path(name)


def _wwn_new(options: argparse.Namespace) -> int:
    from vhostfc.fc.wwn import new_pair

    names = dict(zip(("wwpn", "wwnn"), map(str, new_pair()), strict=True))
    if options.json:
        print(json.dumps(names))
    else:
        for key, name in names.items():
            print(f'{key} = "{name}"')
    return 0


#: Name_Identifier formats, and where an IEEE company id starts in them, counted in bits from below (FC-FS-4 clause 15).
_NAA = {
    1: ("IEEE 48-bit", 24),
    2: ("IEEE extended", 24),
    3: ("locally assigned", None),
    5: ("IEEE registered", 36),
    6: ("IEEE registered extended", 36),
}


def _wwn_show(options: argparse.Namespace) -> int:
    shown = []
    for name in options.names:
        kind, shift = _NAA.get(name.naa, ("unknown format", None))
        company = None if shift is None else (int(name) >> shift & 0xFFFFFF).to_bytes(3, "big").hex(":")
        shown.append(
            {"wwn": str(name), "hex": f"0x{name.pack().hex()}", "naa": name.naa, "format": kind, "oui": company}
        )
    if options.json:
        print(json.dumps({"names": shown}))
        return 0
    for one in shown:
        company = f", company id {one['oui']}" if one["oui"] else ""
        print(f"{one['wwn']}  {one['hex']}  NAA {one['naa']}: {one['format']}{company}")
    return 0
