"""The host of an HBA: log an adapter in without a guest, make the host ready, and the helper's service."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vhostfc.cli.common import FAILED, Add, add_json, add_log_level, run, run_daemon
from vhostfc.errors import ConfigError

#: Where the helper listens.
HELPER = Path("/run/vhostfc-helper/helper.sock")


def add_commands(command: Add) -> None:
    """Their parsers."""
    login = command("login", _login, "log an adapter's WWPN in without a guest, so that it can be zoned and masked")
    login.add_argument("name", metavar="NAME", help="an adapter under /etc/vhostfc, or the path of its file")
    login.add_argument("--for", dest="duration", type=_duration, default=1800.0, metavar="TIME", help="30m (default)")
    add_log_level(login)

    setup = command("setup", _setup, "have this host keep its hands off the units of vports")
    setup.add_argument("--undo", action="store_true", help="take it back")

    doctor = command("doctor", _doctor, "what of this host is ready for an HBA's adapters, missing or wrong")
    add_json(doctor)

    helper = command("helper", _helper, "the privileged steps of adapters on an HBA (a service, for root)")
    helper.add_argument("--socket", type=Path, default=HELPER, metavar="PATH")
    helper.add_argument("--etc", type=Path, default=Path("/etc/vhostfc"), metavar="DIRECTORY", help="adapters' files")
    helper.add_argument("--user", default="vhostfc", metavar="USER", help="who may ask, besides root")
    add_log_level(helper)


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

    done = run(lambda: hold_login(adapter, seconds=options.duration, tell=tell, log=logger))
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

    return run_daemon(serve, logger)
