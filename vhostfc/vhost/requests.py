"""Every vhost-user request in both directions: its payload, its descriptors, its reply; and the codec.

FRONT_END and BACK_END are the tables; the functions below read them and nothing else.  Both sides of
each direction are here:

    front end                             back end
      encode_request(SET_VRING_NUM, ...)    decode_request(packet)
      decode_reply(GET_FEATURES, packet)    encode_reply(GET_FEATURES, ...)

and the same functions serve the back end's own channel, since a row is found by the request's enum
(decode_request takes the table).  A request without a reply of its own is acknowledged by a U64 when
need_reply is set and REPLY_ACK was negotiated; that rule is the session's.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from vhostfc.vhost import messages as m
from vhostfc.vhost.features import ProtocolFeature as F
from vhostfc.vhost.messages import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    VERSION,
    VERSION_MASK,
    Header,
    Packet,
    Payload,
    ProtocolError,
)


class Request(enum.IntEnum):
    """Front end to back end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class BackendRequest(enum.IntEnum):
    """Back end to front end, on the socket that SET_BACKEND_REQ_FD handed over."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


AnyRequest = Request | BackendRequest


@dataclass(frozen=True, slots=True)
class Row:
    """What a request is.

    fds, reply_fds: fewest and most descriptors; where a payload knows its own number, that counts.
    reply: the shapes that its own reply may have; none: only the acknowledgement, if asked for.
    postcopy_reply: the shape that the acknowledgement gives way to during postcopy.
    needs: the protocol feature that must have been negotiated.
    """

    payload: type[Payload] = m.Empty
    fds: tuple[int, int] = (0, 0)
    reply: tuple[type[Payload], ...] = ()
    reply_fds: tuple[int, int] = (0, 0)
    needs: F | None = None
    postcopy_reply: type[Payload] | None = None


ONE = (1, 1)
MAYBE_ONE = (0, 1)

FRONT_END: Mapping[int, Row] = {
    Request.GET_FEATURES: Row(reply=(m.U64,)),
    Request.SET_FEATURES: Row(m.U64),
    Request.SET_OWNER: Row(),
    Request.RESET_OWNER: Row(),
    Request.SET_MEM_TABLE: Row(m.MemoryTable, postcopy_reply=m.MemoryTable),
    Request.SET_LOG_BASE: Row(m.Log, ONE, reply=(m.U64,), needs=F.LOG_SHMFD),
    Request.SET_LOG_FD: Row(m.Empty, ONE),
    Request.SET_VRING_NUM: Row(m.VringState),
    Request.SET_VRING_ADDR: Row(m.VringAddr),
    Request.SET_VRING_BASE: Row(m.VringState),
    Request.GET_VRING_BASE: Row(m.VringState, reply=(m.VringState,)),
    Request.SET_VRING_KICK: Row(m.VringFd),
    Request.SET_VRING_CALL: Row(m.VringFd),
    Request.SET_VRING_ERR: Row(m.VringFd),
    Request.GET_PROTOCOL_FEATURES: Row(reply=(m.U64,)),
    Request.SET_PROTOCOL_FEATURES: Row(m.U64),
    Request.GET_QUEUE_NUM: Row(reply=(m.U64,), needs=F.MQ),
    Request.SET_VRING_ENABLE: Row(m.VringState),
    Request.SEND_RARP: Row(m.U64, needs=F.RARP),
    Request.NET_SET_MTU: Row(m.U64, needs=F.MTU),
    Request.SET_BACKEND_REQ_FD: Row(m.Empty, ONE, needs=F.BACKEND_REQ),
    Request.IOTLB_MSG: Row(m.Iotlb, reply=(m.U64,)),
    Request.SET_VRING_ENDIAN: Row(m.VringState, needs=F.CROSS_ENDIAN),
    # a GET_CONFIG that failed is answered without any payload
    Request.GET_CONFIG: Row(m.Config, reply=(m.Config, m.Empty), needs=F.CONFIG),
    Request.SET_CONFIG: Row(m.Config, needs=F.CONFIG),
    Request.CREATE_CRYPTO_SESSION: Row(m.Opaque, reply=(m.Opaque,), needs=F.CRYPTO_SESSION),
    Request.CLOSE_CRYPTO_SESSION: Row(m.U64, needs=F.CRYPTO_SESSION),
    Request.POSTCOPY_ADVISE: Row(reply=(m.Empty,), reply_fds=ONE, needs=F.PAGEFAULT),
    Request.POSTCOPY_LISTEN: Row(reply=(m.U64,), needs=F.PAGEFAULT),
    Request.POSTCOPY_END: Row(reply=(m.U64,), needs=F.PAGEFAULT),
    Request.GET_INFLIGHT_FD: Row(m.Inflight, reply=(m.Inflight,), reply_fds=MAYBE_ONE, needs=F.INFLIGHT_SHMFD),
    Request.SET_INFLIGHT_FD: Row(m.Inflight, ONE, needs=F.INFLIGHT_SHMFD),
    Request.GPU_SET_SOCKET: Row(m.Empty, ONE),
    Request.RESET_DEVICE: Row(needs=F.RESET_DEVICE),
    Request.VRING_KICK: Row(m.VringState, needs=F.INBAND_NOTIFICATIONS),
    Request.GET_MAX_MEM_SLOTS: Row(reply=(m.U64,), needs=F.CONFIGURE_MEM_SLOTS),
    Request.ADD_MEM_REG: Row(m.SingleRegion, ONE, needs=F.CONFIGURE_MEM_SLOTS, postcopy_reply=m.SingleRegion),
    # front ends have been seen to send the region's descriptor along
    Request.REM_MEM_REG: Row(m.SingleRegion, MAYBE_ONE, needs=F.CONFIGURE_MEM_SLOTS),
    Request.SET_STATUS: Row(m.U64, needs=F.STATUS),
    Request.GET_STATUS: Row(reply=(m.U64,), needs=F.STATUS),
    # libvhost-user sends the request's payload back beside the descriptor
    Request.GET_SHARED_OBJECT: Row(
        m.SharedObject, reply=(m.SharedObject, m.Empty), reply_fds=MAYBE_ONE, needs=F.SHARED_OBJECT
    ),
    Request.SET_DEVICE_STATE_FD: Row(m.DeviceState, ONE, reply=(m.U64,), reply_fds=MAYBE_ONE, needs=F.DEVICE_STATE),
    Request.CHECK_DEVICE_STATE: Row(reply=(m.U64,), needs=F.DEVICE_STATE),
    Request.GET_SHMEM_CONFIG: Row(reply=(m.ShmemConfig,), needs=F.SHMEM),
    Request.GET_VRING_BASE_SKIP_DRAIN: Row(m.VringState, reply=(m.VringState,), needs=F.GET_VRING_BASE_SKIP_DRAIN),
}

BACK_END: Mapping[int, Row] = {
    BackendRequest.IOTLB_MSG: Row(m.Iotlb),
    BackendRequest.CONFIG_CHANGE_MSG: Row(needs=F.CONFIG),
    BackendRequest.VRING_HOST_NOTIFIER_MSG: Row(m.VringArea, needs=F.HOST_NOTIFIER),
    BackendRequest.VRING_CALL: Row(m.VringState, needs=F.INBAND_NOTIFICATIONS),
    BackendRequest.VRING_ERR: Row(m.VringState, needs=F.INBAND_NOTIFICATIONS),
    BackendRequest.SHARED_OBJECT_ADD: Row(m.SharedObject, needs=F.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_REMOVE: Row(m.SharedObject, needs=F.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_LOOKUP: Row(
        m.SharedObject, reply=(m.U64,), reply_fds=MAYBE_ONE, needs=F.SHARED_OBJECT
    ),
    BackendRequest.SHMEM_MAP: Row(m.MmapRequest, ONE, needs=F.SHMEM),
    BackendRequest.SHMEM_UNMAP: Row(m.MmapRequest, needs=F.SHMEM),
}

#: No message of either direction is longer; a header that says more is refused before its payload is read.
MAX_PAYLOAD = 4096


@dataclass(frozen=True, slots=True)
class Message:
    """A request, decoded.  need_reply: an acknowledgement is asked for."""

    request: AnyRequest
    payload: Payload
    need_reply: bool = False


def row(request: AnyRequest) -> Row:
    return FRONT_END[request] if isinstance(request, Request) else BACK_END[request]


def has_own_reply(request: AnyRequest) -> bool:
    """True: the request is always answered, by this reply alone.  False: by an acknowledgement, if asked for."""
    return bool(row(request).reply)


def check_size(header: Header) -> Header:
    """The header, if its payload may be read.  Raises ProtocolError: nobody reads gigabytes for a stranger."""
    if header.size > MAX_PAYLOAD:
        raise ProtocolError(f"{_name(header.request, Request)}: a payload of {header.size} bytes, far too long")
    return header


def encode_request(request: AnyRequest, payload: Payload | None = None, *, need_reply: bool = False) -> bytes:
    """The bytes of a request; the descriptors that go with its first byte are the caller's to add."""
    body = (payload or m.Empty()).pack()
    return Header(request, VERSION | (FLAG_NEED_REPLY if need_reply else 0), len(body)).pack() + body


def decode_request(packet: Packet, kind: type[Request] | type[BackendRequest] = Request) -> Message:
    """The request in a packet.

    Raises ProtocolError for a wrong version, a reply, unknown flags or request, a payload that is not
    exactly the request's, and for too many or missing descriptors.
    """
    header = packet.header
    name = _name(header.request, kind)
    _check_flags(name, header.flags, FLAG_NEED_REPLY)
    try:
        request: AnyRequest = kind(header.request)
    except ValueError:
        raise ProtocolError(f"{name}: unknown request") from None
    spec = row(request)
    payload = _unpack(name, (spec.payload,), packet)
    _check_fds(name, payload, spec.fds, len(packet.fds))
    return Message(request, payload, header.need_reply)


def encode_reply(request: AnyRequest, payload: Payload) -> bytes:
    """The bytes of a reply or an acknowledgement (a U64): flags exactly 0x5, or QEMU drops the connection."""
    body = payload.pack()
    return Header(request, VERSION | FLAG_REPLY, len(body)).pack() + body


def decode_reply(request: AnyRequest, packet: Packet) -> Payload:
    """The reply to `request` in a packet: one of its own shapes, or the U64 that acknowledges it.

    Raises ProtocolError when the packet answers another request or is not such a reply.
    """
    name = f"reply to {request.name}"
    if packet.header.request != request:
        raise ProtocolError(f"{name}: it answers {_name(packet.header.request, type(request))} instead")
    if not packet.header.is_reply:
        raise ProtocolError(f"{name}: the reply flag is missing")
    _check_flags(name, packet.header.flags, FLAG_REPLY)
    spec = row(request)
    shapes = spec.reply or ((m.U64,) if spec.postcopy_reply is None else (m.U64, spec.postcopy_reply))
    payload = _unpack(name, shapes, packet)
    fewest, most = spec.reply_fds
    if not fewest <= len(packet.fds) <= most:
        raise ProtocolError(f"{name}: {len(packet.fds)} file descriptors, expected {_count(fewest, most)}")
    return payload


def _name(number: int, kind: type[AnyRequest]) -> str:
    try:
        return kind(number).name
    except ValueError:
        return f"request {number}"


def _check_flags(name: str, flags: int, allowed: int) -> None:
    if flags & VERSION_MASK != VERSION:
        raise ProtocolError(f"{name}: protocol version {flags & VERSION_MASK}, expected {VERSION}")
    if flags & ~(VERSION_MASK | allowed):
        raise ProtocolError(f"{name}: flags {flags:#x}, expected {VERSION:#x} or {VERSION | allowed:#x}")


def _unpack(name: str, shapes: tuple[type[Payload], ...], packet: Packet) -> Payload:
    """The payload in the first shape that fits; the first shape's complaint when none does."""
    if len(packet.payload) != packet.header.size:
        raise ProtocolError(f"{name}: {len(packet.payload)} bytes of payload, its header says {packet.header.size}")
    complaint: ProtocolError | None = None
    for shape in shapes:
        try:
            return shape.unpack(packet.payload)
        except ProtocolError as error:
            complaint = complaint or error
    raise ProtocolError(f"{name}: {complaint}")


def _check_fds(name: str, payload: Payload, limits: tuple[int, int], count: int) -> None:
    exact = payload.fd_count
    fewest, most = limits if exact is None else (exact, exact)
    if not fewest <= count <= most:
        raise ProtocolError(f"{name}: {count} file descriptors, expected {_count(fewest, most)}")


def _count(fewest: int, most: int) -> str:
    return str(most) if fewest == most else f"{fewest} or {most}"
