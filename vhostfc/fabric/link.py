"""The link between an adapter and the software fabric: a codec, bytes in and values out.

A link is a SOCK_SEQPACKET unix socket; one packet is one message, so a message and the file
descriptors that it carries cannot drift apart.  It stands for an FC link: nearly everything on it
is FC frames.  The rest is what a real HBA has no need for: file descriptors of media for the fast
path, and the routes that say what may be done with them (fencing).

    adapter                                          fabric
      HELLO(version, name)              ->
                                        <-           HELLO(version, fabric name)
      FRAME ...                        <->           FRAME ...
      OPEN(seq, S_ID, D_ID, LUN)        ->
                                        <-           ROUTE(seq, nexus, epoch, mask, medium + fds)
      ROUTE_ACK(seq)                    ->
                                        <-           ROUTE(...)            whenever the verdict changes
      ROUTE_ACK(seq)                    ->
      CLOSE(nexus)                      ->                                 after its route is closed
      LATCH_STUCK(nexus, owner)         ->                                 another one keeps blocks for long
                                        <-           PING(number)          to the owner
      PONG(number)                      ->                                 when all its workers have answered
                                        <-           NOTE(text)            why the next frame rejects

A ROUTE_ACK is a promise: nothing that was admitted under an older route of that nexus can touch the
medium any more, and the older medium is unmapped and closed.  The fabric kills an adapter that does
not keep it in time.  Byte order is big endian, as in the frames.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar

VERSION = 2
#: The longest message: a FRAME with 2112 bytes of payload.
MAX_MESSAGE = 4096
MAX_FDS = 2


class LinkError(Exception):
    """The peer sent what is not a message of this protocol; the link must be closed."""


class Kind(enum.IntEnum):
    HELLO = 1
    FRAME = 2
    OPEN = 3
    ROUTE = 4
    ROUTE_ACK = 5
    CLOSE = 6
    NOTE = 7
    LATCH_STUCK = 8
    PING = 9
    PONG = 10


class InFlight(enum.IntEnum):
    """What becomes of commands admitted under the older route."""

    FINISH = 0
    RESET = 1
    ABORTED = 2


class MediumKind(enum.IntEnum):
    """How the medium's fd is used; the numbers of enum vfc_medium_kind."""

    NONE = 0  # no medium: everything is punted
    MEMORY = 1
    FILE = 2
    DIRECT = 3
    NULL = 4


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of each side.  name: adapter's or fabric's, for messages to people."""

    kind: ClassVar[Kind] = Kind.HELLO
    name: str
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Frame:
    """An FC frame: 24-byte header and payload, without SOF, EOF and CRC (they are implied by the header)."""

    kind: ClassVar[Kind] = Kind.FRAME
    data: bytes


@dataclass(frozen=True, slots=True)
class Open:
    """Ask for a path: answered by a Route with this seq."""

    kind: ClassVar[Kind] = Kind.OPEN
    seq: int
    s_id: int
    d_id: int
    lun: bytes


@dataclass(frozen=True, slots=True)
class Route:
    """The verdict on one I_T_L nexus, to be in force before it is acknowledged.

    seq: the Open's, or the fabric's own with the top bit set.  mask: opcodes that the adapter may run
    itself.  gone: the unit or the login is no more; nexus 0 with gone is a refused Open.  losses: what the nexus
    knows of the host's losses; while the count beside the range latch is another, what syncs goes to the fabric.
    fds: none for MediumKind NONE and NULL, else [medium, latch].
    """

    kind: ClassVar[Kind] = Kind.ROUTE
    seq: int
    nexus: int
    epoch: int
    mask: bytes = bytes(32)
    in_flight: InFlight = InFlight.FINISH
    gone: bool = False
    read_only: bool = False
    medium: MediumKind = MediumKind.NONE
    owner: int = 0  # this nexus in the range latch
    block_size: int = 0
    blocks: int = 0
    losses: int = 0


@dataclass(frozen=True, slots=True)
class RouteAck:
    kind: ClassVar[Kind] = Kind.ROUTE_ACK
    seq: int


@dataclass(frozen=True, slots=True)
class Close:
    """The adapter gives a path up; its route is closed already."""

    kind: ClassVar[Kind] = Kind.CLOSE
    nexus: int


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence for people that goes with the frame that follows, such as who holds a WWPN."""

    kind: ClassVar[Kind] = Kind.NOTE
    text: str


@dataclass(frozen=True, slots=True)
class LatchStuck:
    """Owner `owner` has held a range latch of nexus's unit for longer than a second."""

    kind: ClassVar[Kind] = Kind.LATCH_STUCK
    nexus: int
    owner: int


@dataclass(frozen=True, slots=True)
class Ping:
    """A sign of life is asked for: of the threads that do I/O, whatever their I/O waits for."""

    kind: ClassVar[Kind] = Kind.PING
    number: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Here it is."""

    kind: ClassVar[Kind] = Kind.PONG
    number: int


Message = Hello | Frame | Open | Route | RouteAck | Close | Note | LatchStuck | Ping | Pong

_OPEN = struct.Struct("!I3s3s8s")
_ROUTE = struct.Struct("!III32sBBBBIIQQ")
_GONE, _READ_ONLY = 1, 2
_MAX_TEXT = 1024


def encode(message: Message) -> bytes:
    """One packet.  A name or a text that is too long is cut at 1024 bytes."""
    match message:
        case Hello(name, version):
            body = struct.pack("!H", version) + _text(name)
        case Frame(data):
            body = data
        case Open(seq, s_id, d_id, lun):
            body = _OPEN.pack(seq, s_id.to_bytes(3, "big"), d_id.to_bytes(3, "big"), lun)
        case Route() as r:
            flags = _GONE * r.gone | _READ_ONLY * r.read_only
            sizes = r.owner, r.block_size, r.blocks, r.losses
            body = _ROUTE.pack(r.seq, r.nexus, r.epoch, r.mask, r.in_flight, flags, r.medium, 0, *sizes)
        case RouteAck(value) | Close(value) | Ping(value) | Pong(value):
            body = struct.pack("!I", value)
        case Note(text):
            body = _text(text)
        case LatchStuck(nexus, owner):
            body = struct.pack("!II", nexus, owner)
    return bytes([message.kind]) + body


def _text(text: str) -> bytes:
    """Cut between two characters: half of one would be a broken message."""
    return text.encode()[:_MAX_TEXT].decode(errors="ignore").encode()


def fd_count(message: Message) -> int:
    """How many file descriptors go with this message."""
    return 2 if isinstance(message, Route) and message.medium not in (MediumKind.NONE, MediumKind.NULL) else 0


def decode(packet: bytes) -> Message:
    """The message in a packet.  Raises LinkError for anything that is not exactly one."""
    if not packet:
        raise LinkError("an empty packet")
    body = packet[1:]
    try:
        match packet[0]:
            case Kind.HELLO:
                return Hello(version=struct.unpack_from("!H", body)[0], name=body[2:].decode())
            case Kind.FRAME:
                if len(body) < 24:
                    raise LinkError(f"a frame of {len(body)} bytes")
                return Frame(body)
            case Kind.OPEN:
                seq, s_id, d_id, lun = _OPEN.unpack(body)
                return Open(seq, int.from_bytes(s_id, "big"), int.from_bytes(d_id, "big"), lun)
            case Kind.ROUTE:
                seq, nexus, epoch, mask, in_flight, flags, medium, _, owner, *sizes = _ROUTE.unpack(body)
                block_size, blocks, losses = sizes
                return Route(
                    seq=seq,
                    nexus=nexus,
                    epoch=epoch,
                    mask=mask,
                    in_flight=InFlight(in_flight),
                    gone=bool(flags & _GONE),
                    read_only=bool(flags & _READ_ONLY),
                    medium=MediumKind(medium),
                    owner=owner,
                    block_size=block_size,
                    blocks=blocks,
                    losses=losses,
                )
            case Kind.ROUTE_ACK:
                return RouteAck(*struct.unpack("!I", body))
            case Kind.CLOSE:
                return Close(*struct.unpack("!I", body))
            case Kind.NOTE:
                return Note(body.decode())
            case Kind.LATCH_STUCK:
                return LatchStuck(*struct.unpack("!II", body))
            case Kind.PING:
                return Ping(*struct.unpack("!I", body))
            case Kind.PONG:
                return Pong(*struct.unpack("!I", body))
            case kind:
                raise LinkError(f"unknown message {kind}")
    except (struct.error, ValueError) as error:
        raise LinkError(f"a broken {Kind(packet[0]).name} message: {error}") from error
