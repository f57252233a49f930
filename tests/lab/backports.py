"""A newer QEMU than the system's: bookworm-backports' (10.0: it reconnects), unpacked beside it, once.

Nothing is installed.  The suite comes from the system's own Debian mirror, with package lists of its
own under the cache.  By hand: python -m tests.lab.backports prints the program's path.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.lab.boot import CACHE

SUITE = "bookworm-backports"
PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

_WRAPPER = """#!/bin/sh
r={root}/usr
export QEMU_MODULE_DIR=$r/lib/x86_64-linux-gnu/qemu
exec $r/bin/qemu-system-x86_64 -L $r/share/seabios -L $r/share/qemu -L /usr/lib/ipxe/qemu "$@"
"""


def backports_qemu() -> str:
    """The path of its qemu-system-x86_64, for Guest(qemu=...)."""
    top = CACHE / f"qemu-{SUITE}"
    program = top / "qemu-system-x86_64"
    if program.exists():
        return str(program)
    for directory in ("lists/partial", "cache/archives/partial", "root"):
        (top / directory).mkdir(parents=True, exist_ok=True)
    (top / "sources.list").write_text(f"deb [signed-by={KEYRING}] {_mirror()} {SUITE} main\n")
    options = {
        "Dir::Etc::sourcelist": top / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::Lists": top / "lists",
        "Dir::Cache": top / "cache",
        "APT::Sandbox::User": "root",
        "Acquire::Retries": 3,
    }
    apt = ["apt-get", "-qq", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *PACKAGES], cwd=top / "cache", check=True)
    for package in (top / "cache").glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, top / "root"], check=True)
        package.unlink()
    part = program.with_suffix(".part")
    part.write_text(_WRAPPER.format(root=top / "root"))
    part.chmod(0o755)
    subprocess.run([part, "--version"], check=True, stdout=subprocess.DEVNULL)
    part.rename(program)
    return str(program)


def _mirror() -> str:
    """The first mirror in apt's own sources, in either of their two formats."""
    for name in ("sources.list.d/debian.sources", "sources.list"):
        path = Path("/etc/apt") / name
        found = re.search(r"^(?:URIs:|deb (?:\[.*?\] )?)\s*(\S+)", path.read_text(), re.M) if path.exists() else None
        if found:
            return found[1]
    return "http://deb.debian.org/debian"


if __name__ == "__main__":
    print(backports_qemu())
