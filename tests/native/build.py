"""Compiles the data path and its tests in C into one program, under a sanitizer."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent.parent / "native"
#: The pool's calls go through the tests' gate; the worker's engine for files may be the tests' own; a kernel that has
#: no memory refuses what io_uring is to submit.
WRAPPED = (
    *("preadv2", "pwritev2", "fdatasync", "path_pool_new", "path_pool_free"),
    "io_uring_submit_and_get_events",
)
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    # The fences are about memory that guest and device map at different addresses, which it cannot follow anyway.
    "thread": ["-fsanitize=thread", "-Wno-tsan"],
}


def names(source: Path) -> list[str]:
    """The tests in a source file."""
    return re.findall(r"^TEST\((\w+)\)", source.read_text(), re.MULTILINE)


def compile_tests(where: Path, sanitizer: str) -> Path:
    """The program with all tests; RuntimeError carries the compiler's words."""
    sources = [*sorted(NATIVE.glob("*.c")), *sorted(HERE.glob("*.c"))]
    flags = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-fno-omit-frame-pointer"]
    flags += [*SANITIZERS[sanitizer], f"-I{NATIVE}", f"-I{HERE}"]
    compilers = []
    for source in sources:
        target = where / f"{source.parent.name}-{source.stem}.o"
        compilers.append((target, subprocess.Popen(["gcc", *flags, "-c", str(source), "-o", str(target)])))
        if len(compilers) % (os.cpu_count() or 1) == 0:
            compilers[-1][1].wait()
    if any(process.wait() for _, process in compilers):
        raise RuntimeError("the tests in C do not compile")
    program = where / f"tests-{sanitizer}"
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    link = ["gcc", *SANITIZERS[sanitizer], "-pthread", *wraps, *(str(target) for target, _ in compilers)]
    subprocess.run([*link, "-luring", "-o", str(program)], check=True)
    return program


if __name__ == "__main__":
    import sys

    print(compile_tests(Path(sys.argv[2]), sys.argv[1]))
