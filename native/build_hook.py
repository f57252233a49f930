"""Builds the C part into a wheel or beside the package for an editable install (PEP 517, hatchling).

cffi's API mode: the declarations come from the very headers that the compiler reads, between two
marker lines, so they cannot disagree.  The product is vhostfc/_native.abi3.so.

Environment: VHOSTFC_CFLAGS and VHOSTFC_LDFLAGS are appended (sanitizers, profiling).
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path(__file__).resolve().parent
HEADERS = ("vhostfc.h", "hba.h", "frontend.h")
CFLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-pthread"]
# A line that another CPU has written and we are about to write is fetched once, as ours, and not first to be read.  All
# 64-bit processors know the instruction or take it for none; the compiler has to be told.
if platform.machine() in ("x86_64", "amd64"):
    CFLAGS.append("-mprfchw")


def declarations(header: Path) -> str:
    """What cffi may see of a header: the lines between the two markers."""
    text = header.read_text()
    begin, end = "/* ---- cffi reads from here ---- */", "/* ---- cffi reads to here ---- */"
    return text[text.index(begin) + len(begin) : text.index(end)]


def compile_native(target: Path) -> Path:
    """Compile native/*.c into target, a directory; returns the shared object's path."""
    import cffi

    headers = [name for name in HEADERS if (NATIVE / name).exists()]
    ffi = cffi.FFI()
    for name in headers:
        ffi.cdef(declarations(NATIVE / name))
    ffi.set_source(
        "vhostfc._native",
        "\n".join(f'#include "{name}"' for name in headers),
        sources=sorted(str(path) for path in NATIVE.glob("*.c")),
        include_dirs=[str(NATIVE)],
        libraries=["uring"],
        # What cffi generates is not ours to keep free of warnings; our own sources are compiled with the same flags.
        extra_compile_args=[*CFLAGS, "-Wno-unused-parameter", *shlex.split(os.environ.get("VHOSTFC_CFLAGS", ""))],
        extra_link_args=["-pthread", *shlex.split(os.environ.get("VHOSTFC_LDFLAGS", ""))],
        py_limited_api=True,
    )
    with tempfile.TemporaryDirectory() as work:
        built = Path(ffi.compile(tmpdir=work, target="vhostfc._native.abi3.so"))
        target.mkdir(parents=True, exist_ok=True)
        # Put in place at once: whoever has the older one mapped keeps it.
        return Path(shutil.copy2(built, target / "_native.abi3.new")).replace(target / "_native.abi3.so")


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]  # hatchling's parameter is its own config class
    """Called by hatchling before a wheel or an editable install is put together."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        compile_native(Path(self.root) / "vhostfc")
        build_data["pure_python"] = False
        build_data["tag"] = f"cp311-abi3-{self._platform()}"
        build_data["artifacts"].append("vhostfc/_native.abi3.so")

    @staticmethod
    def _platform() -> str:
        import sysconfig

        return sysconfig.get_platform().replace("-", "_").replace(".", "_")


if __name__ == "__main__":  # a quick rebuild in the source tree: python native/build_hook.py
    print(compile_native(NATIVE.parent / "vhostfc"))
