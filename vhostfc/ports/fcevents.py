"""What the kernel says by itself: uevents, and the SCSI transport's Fibre Channel events.

Both are hints.  No driver tells of a vport's or a remote port's state by uevent, libfc posts nothing but LIPRESET, and
what a socket's buffer had no room for is lost; so whoever listens looks at sysfs (sysfs.py), and looks without a hint
now and then.

The codecs are pyroute2's, the sockets trio's.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

NETLINK_KOBJECT_UEVENT = 15
NETLINK_SCSITRANSPORT = 18
#: The kernel's own uevents; udev's are group 2.
UEVENT_KERNEL = 1
#: SCSI_NL_GRP_FC_EVENTS is 1 << 2, and used by the kernel as a group's number: the fourth group.
FC_EVENTS = 1 << (4 - 1)
#: scsi_netlink.h: struct scsi_nl_hdr's magic, and its message type for an asynchronous FC event.
_MAGIC = 0xA1B2
_FC_NL_ASYNC_EVENT = 0x0100
_BUFFER = 1 << 20


class FcEventCode(enum.IntEnum):
    """enum fc_host_event_code of scsi_transport_fc.h."""

    LIP = 0x1
    LINKUP = 0x2
    LINKDOWN = 0x3
    LIPRESET = 0x4
    RSCN = 0x5
    ADAPTER_CHANGE = 0x103
    PORT_UNKNOWN = 0x200
    PORT_OFFLINE = 0x201
    PORT_ONLINE = 0x202
    PORT_FABRIC = 0x204
    LINK_UNKNOWN = 0x500
    LINK_FPIN = 0x501
    VENDOR_UNIQUE = 0xFFFF


@dataclass(frozen=True, slots=True)
class Uevent:
    """A kernel object came, went or changed."""

    action: str
    devpath: str
    subsystem: str
    properties: dict[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class FcEvent:
    """An event of a Fibre Channel host.  data: the RSCN page, or the port's identifier."""

    host: int
    code: int
    number: int
    data: bytes


Hint = Uevent | FcEvent


def decode_uevent(data: bytes) -> Uevent | None:
    """A datagram of the kernel's; None for what is none (udev's have another form)."""
    from pyroute2.netlink.uevent import MarshalUevent  # noqa: PLC0415  # only who listens needs it

    if data.startswith(b"libudev\0"):
        return None
    for message in MarshalUevent().parse(data):
        properties = {str(key): str(value) for key, value in message.items() if key not in {"header", "attrs"}}
        if "ACTION" in properties and "DEVPATH" in properties:
            return Uevent(properties["ACTION"], properties["DEVPATH"], properties.get("SUBSYSTEM", ""), properties)
    return None


@functools.cache
def _fc_message() -> Any:
    from pyroute2.netlink import nlmsg  # noqa: PLC0415

    class fc_nl_event(nlmsg):  # type: ignore[misc]  # noqa: N801  # the kernel's name
        """struct fc_nl_event, behind the netlink header; in the machine's byte order."""

        prefix = "FC_"
        fields = (
            ("version", "B"),
            ("transport", "B"),
            ("magic", "H"),
            ("msgtype", "H"),
            ("msglen", "H"),
            ("seconds", "Q"),
            ("vendor_id", "Q"),
            ("host_no", "H"),
            ("event_datalen", "H"),
            ("event_num", "I"),
            ("event_code", "I"),
        )

    return fc_nl_event


def decode_fc(data: bytes) -> list[FcEvent]:
    """A datagram of the SCSI transport's; what is not an FC event is left out."""
    message_class = _fc_message()
    found: list[FcEvent] = []
    at = 0
    while at + 16 + 36 <= len(data):
        length = int.from_bytes(data[at : at + 4], sys.byteorder)
        if length < 16 + 36 or at + length > len(data):
            break
        message = message_class(data[at : at + length])
        message.decode()
        if message["magic"] == _MAGIC and message["transport"] == 1 and message["msgtype"] == _FC_NL_ASYNC_EVENT:
            body = data[at + 16 + 36 : at + length][: message["event_datalen"]]
            found.append(FcEvent(message["host_no"], message["event_code"], message["event_num"], body))
        at += (length + 3) & ~3
    return found


@asynccontextmanager
async def hints() -> AsyncIterator[trio.MemoryReceiveChannel[Hint]]:
    """What the kernel says while the context lasts.  FC events only where they can be had: they need CAP_NET_ADMIN and
    the first network namespace.  What is not read in time is lost; the channel holds the last few hundred."""
    send, receive = trio.open_memory_channel[Hint](256)
    async with trio.open_nursery() as nursery:
        for family, groups, decode in (
            (NETLINK_KOBJECT_UEVENT, UEVENT_KERNEL, _uevents),
            (NETLINK_SCSITRANSPORT, FC_EVENTS, decode_fc),
        ):
            try:
                sock = trio.socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
                await sock.bind((0, groups))
            except OSError:
                continue
            nursery.start_soon(_listen, sock, decode, send)
        yield receive
        nursery.cancel_scope.cancel()


def _uevents(data: bytes) -> list[Uevent]:
    event = decode_uevent(data)
    return [event] if event else []


async def _listen(sock: trio.socket.SocketType, decode: Any, send: trio.MemorySendChannel[Hint]) -> None:
    with sock:
        while True:
            try:
                data, (port, _) = await sock.recvfrom(65536)
            except OSError:  # ENOBUFS: the kernel had more to say than there was room for; a look will tell
                data, port = b"", 0
            if port:  # another process may write here, but only the kernel is 0
                continue
            for hint in decode(data) if data else [Uevent("lost", "", "")]:
                with contextlib.suppress(trio.WouldBlock):  # whoever is so late looks anyway
                    send.send_nowait(hint)
