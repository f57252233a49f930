"""Debian packages unpacked beside the system, once: what tests need and a machine should not have to install.

A package that is installed starts its daemons and pulls in what it recommends; unpacked it is only files.  A
guest sees them under the cache (its root is the host's), and takes them over its own root with into_root().

Of another suite than the system's, the package lists come from the system's own mirror into a place of their own.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.lab.boot import CACHE

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def unpacked(name: str, packages: Sequence[str], suite: str | None = None) -> Path:
    """The directory that holds the packages' files, as below /.  name: of the place in the cache."""
    top = CACHE / name
    root, done = top / "root", top / "done"
    wanted = " ".join([suite or "-", *packages])
    if done.exists() and done.read_text() == wanted:
        return root
    for directory in ("lists/partial", "cache/archives/partial", "root"):
        (top / directory).mkdir(parents=True, exist_ok=True)
    options: dict[str, object] = {"APT::Sandbox::User": "root", "Acquire::Retries": 3, "Dir::Cache": top / "cache"}
    if suite is not None:
        (top / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n")
        options |= {
            "Dir::Etc::sourcelist": top / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::Lists": top / "lists",
        }
    apt = ["apt-get", "-qq", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *packages], cwd=top / "cache", check=True)
    for package in (top / "cache").glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, root], check=True)
        package.unlink()
    done.write_text(wanted)
    return root


def into_root(root: Path) -> str:
    """What a guest says to have the files of unpacked() in its own root."""
    return f"tar -C {root} -c . | tar -C / -x --keep-directory-symlink --skip-old-files"


def mirror() -> str:
    """The first mirror in apt's own sources, in either of their two formats."""
    for name in ("sources.list.d/debian.sources", "sources.list"):
        path = Path("/etc/apt") / name
        found = re.search(r"^(?:URIs:|deb (?:\[.*?\] )?)\s*(\S+)", path.read_text(), re.M) if path.exists() else None
        if found:
            return found[1]
    return "http://deb.debian.org/debian"
