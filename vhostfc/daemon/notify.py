"""What a service says to systemd and what it gets from it: sd_notify(3), sd_listen_fds(3), without libsystemd.

Without systemd (no NOTIFY_SOCKET) a Notifier says nothing, so nobody above has to ask.
"""

from __future__ import annotations

import os
import socket
import time
from array import array
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

#: SD_LISTEN_FDS_START: the first descriptor that a service manager hands over.
LISTEN_FDS_START = 3


@dataclass(frozen=True, slots=True)
class PassedFd:
    """A descriptor from systemd: a socket unit's (its FileDescriptorName=) or one that we stored before."""

    name: str
    fd: int


class Notifier:
    """The way to the service manager.

    address: NOTIFY_SOCKET, empty when there is none.  watchdog: seconds within which watchdog()
    must be called, None when nobody watches; call it twice as often.
    """

    def __init__(self, address: str = "", watchdog: float | None = None) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_timeout = watchdog

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ, pid: int | None = None) -> Notifier:
        """The Notifier that systemd's environment variables describe."""
        watchdog = None
        timeout = environ.get("WATCHDOG_USEC", "")
        if timeout.isdecimal() and int(timeout) and _is_for_us(environ.get("WATCHDOG_PID"), pid):
            watchdog = int(timeout) / 1e6
        return cls(environ.get("NOTIFY_SOCKET", ""), watchdog)

    def ready(self, status: str = "") -> bool:
        """The service is up (or has reloaded)."""
        return self.send("READY=1", *([f"STATUS={status}"] if status else []))

    def status(self, text: str) -> bool:
        """One line for `systemctl status`."""
        return self.send(f"STATUS={text}")

    def watchdog(self) -> bool:
        return self.send("WATCHDOG=1")

    def stopping(self) -> bool:
        return self.send("STOPPING=1")

    def reloading(self) -> bool:
        """A reload begins; ready() ends it."""
        return self.send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def store(self, name: str, fds: Sequence[int]) -> bool:
        """Keep descriptors over a restart: they come back in passed_fds() under this name.

        name: up to 255 printable ASCII characters without a colon.  False when nobody keeps them.
        """
        return self.send("FDSTORE=1", f"FDNAME={name}", fds=fds)

    def forget(self, name: str) -> bool:
        """Drop what was stored under this name."""
        return self.send("FDSTOREREMOVE=1", f"FDNAME={name}")

    def send(self, *assignments: str, fds: Sequence[int] = ()) -> bool:
        """One datagram.  False when there is no service manager, or it does not take it."""
        if not self._address:
            return False
        message = "\n".join(assignment.replace("\n", " ") for assignment in assignments).encode(errors="replace")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
            try:
                end.sendmsg([message], rights, socket.MSG_NOSIGNAL, self._address)
            except OSError:  # a manager that went away is no reason to end the service
                return False
        return True


def passed_fds(environ: MutableMapping[str, str] = os.environ, pid: int | None = None) -> list[PassedFd]:
    """The descriptors that systemd passed to this process, close-on-exec from now on.

    Takes the variables out of the environment, so that a second call and our children find none.
    Raises OSError when one of the descriptors is not open.
    """
    count, names = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_FDNAMES", "")
    if not _is_for_us(environ.pop("LISTEN_PID", ""), pid) or not count.isdecimal():
        return []
    named = names.split(":") if names else []
    passed = []
    for number in range(int(count)):
        fd = LISTEN_FDS_START + number
        os.set_inheritable(fd, False)
        passed.append(PassedFd(named[number] if number < len(named) else "unknown", fd))
    return passed


def _is_for_us(spelled: str | None, pid: int | None) -> bool:
    """Variables are inherited; the pid in them tells whom they were meant for (None: whoever reads them)."""
    return spelled is None or spelled == str(os.getpid() if pid is None else pid)
