"""Instructions per command of the C path, counted by valgrind: exact, and the same on a busy machine.

    python tests/bench/instructions.py              print them, by function
    python tests/bench/instructions.py --record     and add a row to instructions.tsv

worker.c, compiled as the package is, runs reads of 4 KiB in batches of 32 through ring_run(): pop, parse, route,
medium, push, publish.  What is counted is all of that but the memory medium's copy (libc's mem* functions); with the
null medium there is none.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent.parent / "native"
TABLE = HERE / "instructions.tsv"
#: As native/build_hook.py compiles the package.
FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-pthread"]
FLAGS += ["-mprfchw"] if platform.machine() in ("x86_64", "amd64") else []
KINDS = [(layout, medium) for layout in ("split", "packed") for medium in ("null", "memory")]
COMMANDS = 3200
#: Commands of the program before those that it is asked for.
WARM_UP = 100 * 32


@dataclass(frozen=True, slots=True)
class Count:
    """Instructions per command: in all, the copy excluded, and by function (copy included)."""

    total: float
    functions: dict[str, float]


def build(where: Path) -> Path:
    """Compile worker.c with the data path; the program's path."""
    sources = [path for path in sorted(NATIVE.glob("*.c")) if not path.name.startswith("frontend")]
    objects, compilers = [], []
    for source in [*sources, HERE / "worker.c"]:
        target = where / f"{source.parent.name}-{source.stem}.o"
        objects.append(str(target))
        command = ["gcc", *FLAGS, f"-I{NATIVE}", "-c", str(source), "-o", str(target)]
        compilers.append(subprocess.Popen(command))
        if len(compilers) % (os.cpu_count() or 1) == 0:
            compilers[-1].wait()
    if any(compiler.wait() for compiler in compilers):
        raise RuntimeError("the data path does not compile")
    program = where / "worker"
    subprocess.run(["gcc", "-pthread", *objects, "-luring", "-o", str(program)], check=True)
    return program


def parse(text: str) -> dict[str, int]:
    """Each function's own instructions in a profile of callgrind's (its manual, "Callgrind Format Specification")."""
    names: dict[str, str] = {}
    own: Counter[str] = Counter()
    function, called = "", False
    for line in text.splitlines():
        if named := re.fullmatch(r"fn=\((\d+)\)(?: (.*))?", line):
            if named[2]:
                names[named[1]] = named[2]
            function = names[named[1]]
        elif named := re.fullmatch(r"cfn=\((\d+)\) (.*)", line):
            names[named[1]] = named[2]
        elif line.startswith("calls="):
            called = True  # the line after it is the callee's cost
        elif re.match(r"[+\-*\d]", line):
            if called:
                called = False
            else:
                own[function] += int(line.split()[1])
    return dict(own)


def count(program: Path, layout: str, medium: str) -> Count:
    """Run one kind under callgrind."""
    with tempfile.TemporaryDirectory() as work:
        profile = Path(work) / "profile"
        valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={profile}", "--toggle-collect=ring_run"]
        done = subprocess.run(
            [*valgrind, program, layout, medium, str(COMMANDS)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        own = parse(profile.read_text())
    each = {name: cost / (COMMANDS + WARM_UP) for name, cost in own.items() if cost}
    return Count(sum(cost for name, cost in each.items() if not re.search(r"mem(cpy|move|set)", name)), each)


def counts() -> dict[tuple[str, str], Count]:
    """All kinds."""
    with tempfile.TemporaryDirectory() as work:
        program = build(Path(work))
        return {kind: count(program, *kind) for kind in KINDS}


def rows() -> list[dict[str, str]]:
    """The table, oldest first."""
    head, *lines = TABLE.read_text().splitlines()
    return [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]


def column(kind: tuple[str, str]) -> str:
    return kind[0] if kind[1] == "null" else f"{kind[0]} {kind[1]}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--record", metavar="WHAT", help="add a row to instructions.tsv: what changed")
    asked = arguments.parse_args()
    if not shutil.which("valgrind"):
        arguments.error("valgrind is not installed")
    found = counts()
    for kind, one in found.items():
        print(f"{column(kind)}: {one.total:.1f}")
        for name, cost in sorted(one.functions.items(), key=lambda item: -item[1]):
            print(f"    {cost:7.1f}  {name}")
    if asked.record:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
        )
        cells = [commit.stdout.strip(), *(f"{one.total:.1f}" for one in found.values()), asked.record]
        with TABLE.open("a") as table:
            table.write("\t".join(cells) + "\n")


if __name__ == "__main__":
    main()
