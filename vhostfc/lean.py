"""A daemon's memory: an adapter is a process, a host has dozens of them, and each stays for weeks.

trio and structlog import at their top what only programs of another kind use (asyncio, TLS, internationalized domain
names, the standard library's logging): with what these import in turn that is a fifth of an adapter's memory and of the
time until it listens.  postpone() has the import system load them when they are first looked into, which here is never.
(importlib's LazyLoader does the same, but loads a module when it is imported a second time, in Python 3.11.)
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it brings importlib.resources and all that that needs
    from importlib.abc import Loader

#: Modules that are whole when first used, should they ever be.
POSTPONED = frozenset(
    {
        *("asyncio", "difflib", "fnmatch", "hmac", "idna", "ipaddress", "locale", "secrets", "shutil", "ssl"),
        *("structlog.stdlib", "tempfile", "uuid"),
    }
)


class _Later(ModuleType):
    """A module that is loaded at the first look into it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's own questions
            raise AttributeError(name)
        spec = self.__spec__
        assert spec is not None
        waiting: Any = spec.loader
        self.__class__ = ModuleType  # type: ignore[assignment]  # from now on as any other
        spec.loader = waiting.loader
        waiting.loader.exec_module(self)
        return getattr(self, name)


class _Postponing:
    """A loader (importlib.abc.Loader) that waits."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Later(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Not yet."""


class _Finder:
    """In front of the others."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in POSTPONED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Postponing(spec.loader)  # type: ignore[assignment]  # it is none by inheritance
        return spec


def postpone() -> None:
    """From now on; to be called before the first import of trio or structlog."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def settle() -> None:
    """When all is imported: what is there stays, so the collector need not look at it; free memory goes back."""
    import ctypes  # noqa: PLC0415  # after all else: trio has loaded it

    gc.collect()
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)
