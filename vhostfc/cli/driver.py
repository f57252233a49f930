"""The driver's side of an adapter: look through its socket, and measure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vhostfc.cli.common import FAILED, Add, add_json, run


def add_commands(command: Add) -> None:
    """Their parsers."""
    probe = command("probe", _probe, "be a driver: list targets, units, sizes")
    probe.add_argument("socket", type=Path, metavar="SOCKET", help="an adapter's vhost-user socket")
    add_json(probe)

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
    add_json(bench)


def _probe(options: argparse.Namespace) -> int:
    from vhostfc.frontend.probe import probe

    result = run(lambda: probe(options.socket))
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
        runs = run(lambda: null_path(wanted))
        if runs is None:
            return FAILED
        print(json.dumps({"null_path": figures.null_json(runs)}) if options.json else figures.null_text(runs))
        return 0
    result: figures.BenchResult | figures.Comparison | None
    if options.compare is not None:
        result = run(lambda: compare((options.socket, options.compare), wanted))
    else:
        result = run(lambda: bench(options.socket, wanted))
    if result is None:
        return FAILED
    print(json.dumps(result.as_json()) if options.json else result.as_text())
    return FAILED if result.errors else 0
