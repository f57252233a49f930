"""The errors that an administrator may see.

A situation has a class; the message names the thing (a WWPN, a path, file:line) and what to do.
Whatever else reaches the log as an exception is a bug of ours.  What a guest does is never an
exception: it is a value in the protocols (a virtio response, a CHECK CONDITION) and a counter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class VhostfcError(Exception):
    """Something that was asked for did not happen; str() is one line for an administrator.  Exit status 1."""


class ConfigError(VhostfcError):
    """A file or an argument is wrong: `file:line: key: what is wrong and what is allowed`.  Exit status 2.

    `problems` holds each line; str() joins them.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class LoginRefused(VhostfcError):
    """The fabric does not let this port in; the message carries the WWPN and the fabric's reason."""


class LinkLost(VhostfcError):
    """The connection to the fabric broke."""


@contextmanager
def plain() -> Iterator[None]:
    """Take an administrator's error out of the exception groups that nurseries wrap around it.

    Tasks that fail together for reasons of the same kind give the first; anything else stays a group.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        told, other = group.split(VhostfcError)
        if told is None or other is not None:
            raise
        first: BaseException = told
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from first.__cause__
