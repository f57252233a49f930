"""What a session wants done: values that the daemon carries out, in order, each before the next.

Descriptors in an effect are *lent*: they stay the session's, and whoever keeps one duplicates it (the
data path does).  The session says in a Close when it is done with one; every descriptor that came in
with a message goes out in exactly one Close, the last of them when the session ends.  -1: there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

from vhostfc.vhost.messages import Region


@dataclass(frozen=True, slots=True)
class Reply:
    """Send these bytes to the front end."""

    data: bytes


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """A region of the table.  fd: its file, to be mapped anew; -1: the region was in the table before, as it is."""

    region: Region
    fd: int = -1


@dataclass(frozen=True, slots=True)
class SetMemory:
    """This is all of guest memory from now on.  Done when nothing uses a region that is gone."""

    regions: tuple[MemoryRegion, ...]


@dataclass(frozen=True, slots=True)
class StartRing:
    """Start a ring: disabled, at avail index `base`; addresses are user addresses.

    features: virtio bits as acknowledged.  kick_fd -1: look at the ring unasked.
    """

    index: int
    size: int
    desc: int
    used: int
    avail: int
    base: int
    features: int
    kick_fd: int = -1
    call_fd: int = -1
    err_fd: int = -1


@dataclass(frozen=True, slots=True)
class EnableRing:
    """Serve a started ring or leave it alone.  On enabling look at the ring: its kick may have come before."""

    index: int
    enabled: bool


@dataclass(frozen=True, slots=True)
class SetCall:
    """A started ring has another call eventfd.  Write to it once: what was signalled to the old one may be lost."""

    index: int
    fd: int


@dataclass(frozen=True, slots=True)
class SetErr:
    """A started ring has another eventfd for telling that it is broken."""

    index: int
    fd: int


@dataclass(frozen=True, slots=True)
class StopRing:
    """Stop a ring, in bounded time; then tell Session.ring_stopped() the next avail index.

    The ring may not be running in the data path (its start failed, or this is asked a second time).
    """

    index: int


@dataclass(frozen=True, slots=True)
class ResetDevice:
    """The device is as new: drop requests, events, unit attentions.  All rings are stopped; memory stays."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close these descriptors."""

    fds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refuse:
    """Log this line and end the connection; nothing comes after it but what Session.close() says."""

    text: str


Effect = Reply | SetMemory | StartRing | EnableRing | SetCall | SetErr | StopRing | ResetDevice | Close | Refuse
