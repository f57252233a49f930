"""The adapter's end of a fabric link: SOCK_SEQPACKET, one message and its file descriptors a packet.

The kernel keeps the borders of packets, so a message and the descriptors that it carries cannot drift
apart.  Whoever is returned a descriptor owns it; on every other way out those that came are closed here.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import trio
from trio.socket import SocketType

from vhostfc.errors import LinkLost
from vhostfc.fabric import link


class LinkSocket:
    """One end of a link."""

    def __init__(self, sock: SocketType) -> None:
        self._socket = sock

    @classmethod
    async def connect(cls, path: Path) -> Self:
        """Raises OSError when nobody listens there."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            await sock.connect(str(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def receive(self) -> tuple[link.Message, list[int]]:
        """The next message with its descriptors, which are the caller's now.

        Raises LinkLost when the peer went away, or sent what is no message or has not the descriptors it needs.
        """
        try:
            data, ancillary, flags, _ = await self._socket.recvmsg(
                link.MAX_MESSAGE, socket.CMSG_SPACE(4 * link.MAX_FDS), socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise LinkLost(f"the link broke: {error.strerror}") from error
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
        try:
            if not data:
                raise LinkLost("the fabric closed the link")
            if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                raise LinkLost("a message that is too long, or has more descriptors than this process can open")
            try:
                message = link.decode(data)
            except link.LinkError as error:
                raise LinkLost(f"the fabric sent {error}") from error
            if len(fds) != link.fd_count(message):
                raise LinkLost(f"a {message.kind.name} message with {len(fds)} descriptors")
        except LinkLost:
            close_fds(fds)
            raise
        return message, list(fds)

    async def send(self, message: bytes) -> None:
        """Send a message whole.  Raises LinkLost when the peer is gone."""
        try:
            await self._socket.send(message)
        except OSError as error:
            raise LinkLost(f"the link broke: {error.strerror}") from error

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def close_fds(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
