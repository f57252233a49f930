"""The import arrows between the rooms: islands know nothing of each other, and only daemon/ sees all.

Read from the source, so that an import inside a function or under TYPE_CHECKING counts as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "vhostfc"
ISLANDS = ("vhost", "virtio", "scsi", "fc")

#: For each room (or module at the top), what of vhostfc it may import; a room may always import itself.
ALLOWED = {
    "errors": set(),
    "tomlfile": {"errors"},
    "overlay": set(),
    "values": {"tomlfile", "fc.wwn", "fc.fcoe"},
    "faultfile": {"errors", "tomlfile", "values", "fc", "fabric.faults", "scsi.cdb"},
    "fabricfile": {"tomlfile", "values", "overlay", "faultfile", "fabric.faults", "fc.wwn", "fc.fcoe"},
    "config": {"errors", "tomlfile", "values", "fabricfile", "overlay", "fc.wwn"},
    "lean": set(),
    "log": set(),
    "outline": set(),
    "native": {"errors", "_native"},
    "vhost": set(),
    "virtio": set(),
    "scsi": set(),
    "fc": set(),
    "fabric": {"fc", "scsi"},
    "ports": {"errors", "fc", "fabric.link", "native"},
    "frontend": {"errors", "vhost", "virtio", "native"},
    "daemon": {
        *(
            "__version__",
            "errors",
            "config",
            "overlay",
            "faultfile",
            "log",
            "native",
            "vhost",
            "virtio",
            "scsi",
            "fc",
            "fabric",
            "ports",
            "frontend",
        ),
    },
    "cli": {
        "errors",
        "config",
        "tomlfile",
        "values",
        "lean",
        "log",
        "outline",
        "fc.wwn",
        "daemon",
        "frontend",
        "ports",
        "__version__",
    },
    "__main__": {"cli"},
    "__init__": set(),
}

#: What a sans-IO island may not import of the rest of the world: sockets, clocks, tasks, the system.
IMPURE = {
    *(
        "asyncio",
        "fcntl",
        "io",
        "mmap",
        "multiprocessing",
        "os",
        "pathlib",
        "random",
        "select",
        "selectors",
    ),
    *("shutil", "signal", "socket", "ssl", "subprocess", "tempfile", "threading", "time"),
    *("cffi", "pyroute2", "structlog", "trio"),
}
#: Names are made at random in one place; whoever makes them passes nothing in.
ALLOWED_IMPURE = {("fc/wwn.py", "secrets")}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, by its full name, with the line; relative imports are resolved."""
    package = ["vhostfc", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                yield f"{source}.{alias.name}", node.lineno


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def is_allowed(source: str, imported: str) -> bool:
    """imported: a dotted name below vhostfc, whose last part may be a name inside a module."""
    if imported == source or imported.startswith(f"{source}."):
        return True
    return any(imported == allowed or imported.startswith(f"{allowed}.") for allowed in ALLOWED[source])


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path: Path) -> None:
    source = room(path)
    assert source in ALLOWED, f"{path.name} is a new room: say in ALLOWED what it stands on"
    for name, line in imports(path):
        if name.startswith("vhostfc."):
            assert is_allowed(source, name.removeprefix("vhostfc.")), f"{path}:{line} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_islands_are_sans_io(path: Path) -> None:
    if room(path) not in (*ISLANDS, "fabric"):
        return
    where = str(path.relative_to(PACKAGE))
    for name, line in imports(path):
        top = name.partition(".")[0]
        assert top not in IMPURE, f"{path}:{line} imports {name}"
        if top == "secrets":
            assert (where, top) in ALLOWED_IMPURE, f"{path}:{line} imports {name}"


def test_nobody_pure_looks_at_a_clock() -> None:
    """datetime writes a time out; what it is now comes in as an argument."""
    for path in modules():
        if room(path) not in (*ISLANDS, "fabric"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("now", "today", "utcnow"):
                assert ast.unparse(node.value) not in ("date", "datetime"), f"{path}:{node.lineno}"


def test_only_the_daemons_and_the_drivers_side_run_tasks() -> None:
    for path in modules():
        if any(name.partition(".")[0] == "trio" for name, _ in imports(path)):
            assert room(path) in ("daemon", "ports", "frontend", "cli", "native"), path


def test_the_door_to_c_is_one() -> None:
    for path in modules():
        if any(name.startswith(("vhostfc._native", "cffi", "_cffi")) for name, _ in imports(path)):
            assert room(path) == "native", path


@pytest.mark.parametrize(
    ("where", "text", "expected"),
    [
        ("fc/a.py", "from .wwn import Wwn", "vhostfc.fc.wwn.Wwn"),
        ("fc/a.py", "from ..scsi import cdb", "vhostfc.scsi.cdb"),
        ("fc/a.py", "from .. import native", "vhostfc.native"),
        ("fc/a.py", "def f():\n    import vhostfc.native", "vhostfc.native"),
        ("a.py", "from . import native", "vhostfc.native"),
        ("a.py", "if TYPE_CHECKING:\n    from vhostfc import native", "vhostfc.native"),
    ],
)
def test_no_spelling_of_an_import_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, text: str, expected: str
) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert [name for name, _ in imports(path)] == [expected]


def test_an_arrow_the_wrong_way_is_seen() -> None:
    assert not is_allowed("fc", "scsi.cdb")
    assert not is_allowed("ports", "fabric.switch")
    assert not is_allowed("config", "fc.wwnx")
    assert is_allowed("ports", "fabric.link.Frame")
    assert is_allowed("daemon", "fabric.switch")
