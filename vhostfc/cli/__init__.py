"""The vhostfc command: arguments in, exit status out.

Exit status: 0 success, 1 what was asked did not happen, 2 a usage or configuration error.  Errors are
lines on stderr; a traceback is a bug of ours.  Each room of this package has a few commands and adds their
parsers; only the room of the command that is run is loaded, and each command imports what it needs when it
runs, so that `serve`, which a starting guest waits for, loads nothing of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from vhostfc import __version__
from vhostfc.cli.common import FAILED, USAGE, Command
from vhostfc.errors import ConfigError, VhostfcError, plain

#: The rooms and their commands, in the order of --help.
_ROOMS = {
    "daemons": ("demo", "serve", "fabric", "check"),
    "driver": ("probe", "bench"),
    "orders": (
        *("status", "rescan", "ls", "reload"),
        *("topology", "events", "capture", "fault", "zone", "mask", "unit", "access", "changes"),
    ),
    "host": ("login", "setup", "doctor", "helper"),
    "names": ("wwn",),
}


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
        options = _parser(words[0] if words else None).parse_args(words)
    except SystemExit as ending:  # argparse has said what is wrong, or has shown its help
        return int(ending.code or 0)
    command: Command = options.run
    try:
        with plain():
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


def _parser(word: str | None = None) -> argparse.ArgumentParser:
    """The parser for a command line that begins with this word: of all commands, unless it names one of them."""
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

    for room in [room for room, names in _ROOMS.items() if word in names] or _ROOMS:
        import_module(f"vhostfc.cli.{room}").add_commands(command)
    return parser
