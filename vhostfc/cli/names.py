"""Names: make a pair, and say what a name says."""

from __future__ import annotations

import argparse
import json

from vhostfc.cli.common import Add, add_json, parse_wwn

#: Name_Identifier formats, and where an IEEE company id starts in them, counted in bits from below (FC-FS-4 clause 15).
_NAA = {
    1: ("IEEE 48-bit", 24),
    2: ("IEEE extended", 24),
    3: ("locally assigned", None),
    5: ("IEEE registered", 36),
    6: ("IEEE registered extended", 36),
}


def add_commands(command: Add) -> None:
    """Their parsers."""
    wwn = command("wwn", _wwn_new, "make a WWPN/WWNN pair, read any spelling").add_subparsers(
        metavar="ACTION", required=True
    )
    new = wwn.add_parser("new", help="a fresh pair, as an adapter's file spells it", allow_abbrev=False)
    new.set_defaults(run=_wwn_new)
    add_json(new)
    show = wwn.add_parser("show", help="what a name says, from any spelling", allow_abbrev=False)
    show.set_defaults(run=_wwn_show)
    show.add_argument("names", type=parse_wwn, nargs="+", metavar="WWN")
    add_json(show)


def _wwn_new(options: argparse.Namespace) -> int:
    from vhostfc.fc.wwn import new_pair

    names = dict(zip(("wwpn", "wwnn"), map(str, new_pair()), strict=True))
    if options.json:
        print(json.dumps(names))
    else:
        for key, name in names.items():
            print(f'{key} = "{name}"')
    return 0


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
