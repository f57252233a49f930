"""A newer QEMU than the system's: bookworm-backports' (10.0: it reconnects), unpacked beside it, once.

By hand: python -m tests.lab.backports prints the program's path.
"""

from __future__ import annotations

import subprocess

from tests.lab.boot import CACHE
from tests.lab.packages import unpacked

SUITE = "bookworm-backports"
PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")

_WRAPPER = """#!/bin/sh
r={root}/usr
export QEMU_MODULE_DIR=$r/lib/x86_64-linux-gnu/qemu
exec $r/bin/qemu-system-x86_64 -L $r/share/seabios -L $r/share/qemu -L /usr/lib/ipxe/qemu "$@"
"""


def backports_qemu() -> str:
    """The path of its qemu-system-x86_64, for Guest(qemu=...)."""
    name = f"qemu-{SUITE}"
    program = CACHE / name / "qemu-system-x86_64"
    if program.exists():
        return str(program)
    root = unpacked(name, PACKAGES, SUITE)
    part = program.with_suffix(".part")
    part.write_text(_WRAPPER.format(root=root))
    part.chmod(0o755)
    subprocess.run([part, "--version"], check=True, stdout=subprocess.DEVNULL)
    part.rename(program)
    return str(program)


if __name__ == "__main__":
    print(backports_qemu())
