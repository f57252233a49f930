"""The wheel, built as pip builds it from a fresh copy of the source, installed and run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

from vhostfc import __version__

pytestmark = pytest.mark.long

TREE = Path(__file__).resolve().parent.parent


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    generated = shutil.ignore_patterns("_native*", "__pycache__", "*.o")
    for name in ("vhostfc", "native", "systemd", "docs"):
        shutil.copytree(TREE / name, source / name, ignore=generated)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TREE / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", target, source)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def archive(wheel: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheel) as file:
        yield file


def test_its_name_says_what_runs_it(wheel: Path) -> None:
    """One wheel for every Python from 3.11 on, on this kind of machine."""
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, version, python, abi) == ("vhostfc", __version__, "cp311", "abi3")
    assert platform.startswith("linux_")


def test_it_holds_the_program_and_nothing_of_the_workshop(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    assert "vhostfc/_native.abi3.so" in names
    assert "vhostfc/cli/__init__.py" in names
    sources = {path.relative_to(TREE).as_posix() for path in (TREE / "vhostfc").rglob("*.py")}
    assert sources <= set(names)
    assert f"vhostfc-{__version__}.data/data/share/qemu/vhost-user/50-vhostfc.json" in names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"vhostfc", f"vhostfc-{__version__}.dist-info", f"vhostfc-{__version__}.data"}


def test_its_metadata(archive: zipfile.ZipFile) -> None:
    directory = f"vhostfc-{__version__}.dist-info"
    metadata = Parser().parsestr(archive.read(f"{directory}/METADATA").decode())
    assert metadata["Name"] == "vhostfc"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert {str(line).partition(">")[0] for line in metadata.get_all("Requires-Dist", []) if "extra" not in line} == {
        *("trio", "cffi", "pyroute2", "structlog"),
    }
    assert f"{directory}/licenses/LICENSE" in archive.namelist()
    assert "vhostfc = vhostfc.cli:main" in archive.read(f"{directory}/entry_points.txt").decode()


def test_it_runs_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path)
    run(tmp_path / "bin/pip", "install", "-q", wheel)
    assert run(tmp_path / "bin/vhostfc", "--version") == f"vhostfc {__version__}\n"
    found = run(tmp_path / "bin/python", "-c", "import vhostfc._native as native; print(native.__file__)")
    assert found.startswith(str(tmp_path))
    assert (tmp_path / "share/qemu/vhost-user/50-vhostfc.json").exists()
