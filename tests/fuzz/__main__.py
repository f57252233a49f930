"""Coverage-guided fuzzing of every codec and every door (see docs/testing.md):

    python -m tests.fuzz TARGET|all [--minutes N | --runs N] [--seed N] [--directory DIR]
    python -m tests.fuzz TARGET --input FILE        try one input, such as a finding, without the fuzzer

Exit status 0: nothing was found; 1: something was, its input is in DIR/TARGET/findings.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="fuzz a codec or a door")
    parser.add_argument("target", help="a target's name, or all, one after the other; `list` shows them")
    long = parser.add_mutually_exclusive_group()
    long.add_argument("--minutes", type=float, default=60.0, help="for how long, all targets together (default 60)")
    long.add_argument("--runs", type=int, default=0, help="how many executions of each target, the same each time")
    parser.add_argument("--seed", type=int, default=1, help="of the fuzzer's choices (default 1)")
    parser.add_argument("--directory", type=Path, default=Path("build/fuzz"), help="for corpora, findings and logs")
    parser.add_argument("--input", type=Path, help="only try what is in this file")
    args = parser.parse_args()
    if args.input is not None:
        from tests.fuzz.targets import ALL

        ALL[args.target].run(args.input.read_bytes())
        return 0
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets in another order would be another run
        again = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, "PYTHONHASHSEED": "0"})

    from tests.fuzz import engine

    every = engine.load()
    if args.target == "list":
        print(*every, sep="\n")
        return 0
    if args.target != "all" and args.target not in every:
        parser.error(f"no target {args.target!r}; there are: {', '.join(every)}")
    chosen = list(every.values()) if args.target == "all" else [every[args.target]]
    seconds = max(1, round(args.minutes * 60 / len(chosen)))
    plan = engine.Plan(args.directory.absolute(), runs=args.runs, seconds=seconds, seed=args.seed)
    worst = 0
    for target in chosen:
        report = engine.fuzz(target, plan)
        print(report, flush=True)
        worst |= report.status != 0
    return worst


if __name__ == "__main__":
    sys.exit(main())
