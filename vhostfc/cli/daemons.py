"""The processes: an adapter, the software fabric, both with drivers in one go; and the check of their files.

`serve`, which a starting guest waits for, loads nothing that it does not use.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vhostfc.cli.common import (
    FAILED,
    RUN,
    USAGE,
    Add,
    add_capture_size,
    add_json,
    add_log_level,
    capture_size,
    parse_wwn,
    run,
    run_daemon,
)
from vhostfc.errors import ConfigError

if TYPE_CHECKING:
    from vhostfc.config import AdapterConfig, FabricConfig


def add_commands(command: Add) -> None:
    """Their parsers."""
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
    serve.add_argument("--wwpn", type=parse_wwn, help="without --config: the adapter's Port_Name")
    serve.add_argument("--wwnn", type=parse_wwn, help="without --config: the adapter's Node_Name")
    serve.add_argument("--fabric", type=Path, metavar="SOCKET", help="without --config: the software fabric's socket")
    serve.add_argument("--state", type=Path, metavar="DIRECTORY", help="without --config: where bindings are kept")
    serve.add_argument("--print-capabilities", action="store_true", help="print what this back end can do, and end")
    add_log_level(serve)

    fabric = command("fabric", _fabric, "the software fabric: a switch, its arrays and their disks")
    fabric.add_argument(
        "--config", type=Path, metavar="FILE", required=True, help="the fabric's file (docs/configuration.md)"
    )
    fabric.add_argument(
        "--capture", type=Path, metavar="FILE", help="write all frames to this pcapng file, from the beginning"
    )
    add_capture_size(fabric)
    add_log_level(fabric)

    check = command("check", _check, "is this file right? errors as file:line: key: what is wrong")
    check.add_argument("files", type=Path, nargs="+", metavar="FILE")
    add_json(check)


def _demo(_options: argparse.Namespace) -> int:
    from vhostfc.daemon.demo import run_demo

    async def demo() -> bool:
        await run_demo()
        return True

    return 0 if run(demo) else FAILED


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
    return run_daemon(serve, logger)


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
    return run_daemon(lambda: fabricd.run_fabric(fabric, kept=kept, capture=capture, log=logger), logger)


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
