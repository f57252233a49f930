"""The only door to C: typed wrappers of native/vhostfc.h, and nothing that decides or waits.

A thing of C is an object with close(), also a context manager; a closed one raises ValueError when used.
What C refuses is an OSError that says what was being done.  File descriptors and objects that are passed
in are only borrowed: C dups or counts what it keeps, so closing early is safe.

The daemon's loop around an Engine: wait until `engine.fd(worker)` is readable, then call
`engine.next(worker)` until it gives None.  Each message carries a number of the caller's (`seq`) and is
answered by exactly one Event of kind ACK with that number.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Self

from vhostfc._native import ffi, lib

#: What cffi made, for frontend/load.py: it wraps native/frontend.h as this file wraps native/vhostfc.h.
FFI: Any = ffi
LIB: Any = lib
#: Readable bytes of a control request that reach Python; the size of a latch's memfd, its words, and the bytes
#: of medium that share one of them.
CONTROL_MAX: int = lib.VFC_CONTROL_MAX
MAX_RINGS: int = lib.VFC_MAX_RINGS
LATCH_BYTES: int = lib.VFC_LATCH_BYTES
LATCH_WORDS: int = lib.VFC_LATCH_WORDS
LATCH_STRIPE: int = lib.VFC_LATCH_STRIPE


def _check(result: int, doing: str) -> int:
    """The result, unless it is -errno."""
    if result < 0:
        raise OSError(-result, f"{doing}: {os.strerror(-result)}")
    return result


class _Handle:
    """A counted object of C."""

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer

    @property
    def pointer(self) -> Any:
        """What C calls it."""
        if self._pointer is None:
            raise ValueError(f"{type(self).__name__} is closed")
        return self._pointer

    def _put(self, pointer: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Give up this hold; C may keep its own.  A second call does nothing."""
        if self._pointer is not None:
            pointer, self._pointer = self._pointer, None
            self._put(pointer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---------------------------------------------------------------- guest memory


class Map(_Handle):
    """One region of guest memory, mapped.  Addresses, sizes and the offset into fd are in bytes.

    OSError: EINVAL a size of 0 or an end that wraps, EFBIG larger than its file, else as mmap(2).
    """

    def __init__(self, fd: int, *, gpa: int, size: int, uaddr: int, offset: int = 0) -> None:
        made = ffi.new("struct vfc_map **")
        _check(
            lib.vfc_map_new(fd, gpa, size, uaddr, offset, made),
            f"mapping {size:#x} bytes of guest memory at {gpa:#x} from offset {offset:#x}",
        )
        super().__init__(made[0])
        self.gpa, self.size, self.uaddr, self.offset = gpa, size, uaddr, offset

    def _put(self, pointer: Any) -> None:
        lib.vfc_map_put(pointer)


class Memory(_Handle):
    """A table of regions.  OSError EINVAL: two of them overlap."""

    def __init__(self, maps: Iterable[Map]) -> None:
        pointers = [each.pointer for each in maps]
        made = ffi.new("struct vfc_mem **")
        table = ffi.new("struct vfc_map *[]", pointers)
        _check(lib.vfc_mem_new(table, len(pointers), made), f"making a table of {len(pointers)} regions")
        super().__init__(made[0])

    def covers(self, uaddr: int, size: int) -> bool:
        """Whether the user addresses [uaddr, uaddr + size) lie in one region."""
        return bool(lib.vfc_mem_covers(self.pointer, uaddr, size))

    def _put(self, pointer: Any) -> None:
        lib.vfc_mem_put(pointer)


# ---------------------------------------------------------------- latch and medium


class Latch(_Handle):
    """The words in a shared memfd of LATCH_BYTES that make blocks atomic between processes; and the count of losses."""

    def __init__(self, fd: int) -> None:
        made = ffi.new("struct vfc_latch **")
        _check(lib.vfc_latch_open(fd, made), "opening a range latch")
        super().__init__(made[0])

    def take(self, owner: int, offset: int, length: int) -> int | None:
        """Take the stripes of a range of the medium, bytes: None, or who has one of them (then none was taken)."""
        holder = ffi.new("uint32_t *")
        if lib.vfc_latch_take(self.pointer, owner, offset, length, holder):
            return int(holder[0])
        return None

    def free(self, owner: int, offset: int, length: int) -> None:
        lib.vfc_latch_free(self.pointer, owner, offset, length)

    def recover(self, owner: int) -> int:
        """Free all that a dead owner holds; how many words that were."""
        return int(lib.vfc_latch_recover(self.pointer, owner))

    def redo(self, owner: int, fd: int) -> int:
        """Finish what a dead owner (0: all of them) had begun to write to memory; how many copies.  Before recover().

        OSError: it cannot be written.
        """
        return _check(lib.vfc_latch_redo(self.pointer, owner, fd), "finishing what a dead writer had begun")

    def losses(self) -> int:
        """64 bits: how often the host lost what it had in its cache, and (the low half) how often that is in doubt."""
        return int(lib.vfc_latch_losses(self.pointer))

    def lost(self, known: int) -> int:
        """A call that syncs has failed on a description that is as new as this count; the count from now on."""
        return int(lib.vfc_latch_lost(self.pointer, known))

    def _put(self, pointer: Any) -> None:
        lib.vfc_latch_put(pointer)


class MediumKind(enum.IntEnum):
    """What a unit's blocks are kept in; enum vfc_medium_kind."""

    MEMORY = lib.VFC_MEDIUM_MEMORY
    FILE = lib.VFC_MEDIUM_FILE
    DIRECT = lib.VFC_MEDIUM_DIRECT
    NULL = lib.VFC_MEDIUM_NULL


class Medium(_Handle):
    """A unit's blocks as this process sees them, for the routes that lead there.

    fd, latch_fd: -1 for NULL, which needs neither.  owner: this process in the latch.  losses: those that the
    nexus knows of.  OSError: EINVAL a block size that is no power of two from 512 to LATCH_STRIPE, EFBIG memory
    smaller than its blocks.
    """

    def __init__(
        self,
        kind: MediumKind,
        *,
        blocks: int,
        block_size: int,
        owner: int = 0,
        fd: int = -1,
        latch_fd: int = -1,
        losses: int = 0,
    ) -> None:
        setup = ffi.new("struct vfc_medium_setup *")
        setup.fd, setup.latch_fd, setup.kind, setup.owner = fd, latch_fd, int(kind), owner
        setup.block_size, setup.blocks, setup.losses = block_size, blocks, losses
        made = ffi.new("struct vfc_medium **")
        _check(
            lib.vfc_medium_new(setup, made),
            f"opening a medium ({kind.name.lower()}, {blocks} blocks of {block_size} bytes)",
        )
        super().__init__(made[0])
        self.kind, self.blocks, self.block_size = kind, blocks, block_size

    def _put(self, pointer: Any) -> None:
        lib.vfc_medium_put(pointer)


# ---------------------------------------------------------------- what a worker says


class EventKind(enum.IntEnum):
    """enum vfc_event_kind."""

    ACK = lib.VFC_EVENT_ACK
    PUNT = lib.VFC_EVENT_PUNT
    CONTROL = lib.VFC_EVENT_CONTROL
    BUFFERS = lib.VFC_EVENT_BUFFERS
    BROKEN = lib.VFC_EVENT_BROKEN
    LATCH = lib.VFC_EVENT_LATCH
    BUSY = lib.VFC_EVENT_BUSY


class Why(enum.IntEnum):
    """Why a command was punted; enum vfc_why."""

    NONE = 0
    OPCODE = lib.VFC_WHY_OPCODE
    NO_ROUTE = lib.VFC_WHY_NO_ROUTE
    ATTRIBUTE = lib.VFC_WHY_ATTRIBUTE
    FIELD = lib.VFC_WHY_FIELD
    RANGE = lib.VFC_WHY_RANGE
    TRANSFER = lib.VFC_WHY_TRANSFER
    MEDIUM = lib.VFC_WHY_MEDIUM
    DOUBT = lib.VFC_WHY_DOUBT


@dataclass(frozen=True, slots=True)
class Event:
    """struct vfc_event; which fields mean something depends on the kind.

    ACK: seq, result (0 or -errno), value.  PUNT: handle, index, why to data_out.  CONTROL: handle, index,
    data_in_length, data_out.  BUFFERS: index.  BROKEN: index, result.  LATCH: value = holder.
    lun: 8 bytes as the guest sent them; attribute: virtio's numbers; cdb: 32 bytes, padded with zeros.
    data_in_length: bytes that the guest has room for; data_out: a copy.
    """

    kind: EventKind
    seq: int = 0
    handle: int = 0
    index: int = 0
    result: int = 0
    value: int = 0
    why: Why = Why.NONE
    target: int = 0
    lun: bytes = bytes(8)
    tag: int = 0
    attribute: int = 0
    priority: int = 0
    crn: int = 0
    cdb: bytes = b""
    data_in_length: int = 0
    data_out: bytes = b""


@dataclass(frozen=True, slots=True)
class Stats:
    """struct vfc_stats: counters of one worker since its start; in_flight is how many commands there are now."""

    commands: int
    fast: int
    punted: int
    read_bytes: int
    written_bytes: int
    bad_target: int
    task_set_full: int
    aborted: int
    abandoned: int
    parked: int
    held: int
    medium_errors: int
    bad_chain: int
    bad_address: int
    bad_indirect: int
    bad_header: int
    bad_direction: int
    torn_memory: int
    broken_rings: int
    kicks: int
    calls: int
    in_flight: int


# ---------------------------------------------------------------- what a worker is told


class RingRole(enum.IntEnum):
    """enum vfc_ring_role."""

    CONTROL = lib.VFC_RING_CONTROL
    EVENT = lib.VFC_RING_EVENT
    REQUEST = lib.VFC_RING_REQUEST


@dataclass(frozen=True, slots=True)
class RingSetup:
    """struct vfc_ring_setup.  desc, avail, used: user addresses; base: next avail index; an fd may be -1."""

    role: RingRole
    size: int
    desc: int
    avail: int
    used: int
    features: int = 0
    base: int = 0
    kick_fd: int = -1
    call_fd: int = -1
    err_fd: int = -1


class InFlight(enum.IntEnum):
    """What becomes of commands under a route that is replaced; enum vfc_in_flight."""

    FINISH = lib.VFC_FINISH
    RESET = lib.VFC_ABORT_RESET
    ABORTED = lib.VFC_ABORT_ABORTED


@dataclass(frozen=True, slots=True)
class Match:
    """Which commands; None matches all.  response: what ABORT answers them with (virtio-scsi).

    held: only those that have not begun, because of a task attribute.
    """

    target: int | None = None
    lun: int | None = None
    tag: int | None = None
    response: int = 0
    held: bool = False


class Engine:
    """One adapter's worker threads.

    max_punts, max_punt_bytes: the ration of punted commands at a time, over which guests get TASK SET FULL.
    max_transfer: bytes; a command that moves more is punted.  uring False: as where io_uring is denied.
    poll_us: microseconds after its last command for which a ring is looked at without being asked; 0 for never.
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        max_punts: int = 256,
        max_punt_bytes: int = 64 << 20,
        max_transfer: int = 32 << 20,
        uring: bool = True,
        poll_us: int = 0,
    ) -> None:
        setup = ffi.new("struct vfc_engine_setup *")
        setup.workers, setup.max_punts, setup.max_transfer = workers, max_punts, max_transfer
        setup.max_punt_bytes, setup.poll_us = max_punt_bytes, poll_us
        setup.flags = 0 if uring else lib.VFC_ENGINE_NO_URING
        made = ffi.new("struct vfc_engine **")
        _check(lib.vfc_engine_new(setup, made), f"starting {workers} worker threads")
        self._engine: Any = made[0]
        self._event = ffi.new("struct vfc_event *")
        self._stats = ffi.new("struct vfc_stats *")
        self.workers = workers

    @property
    def pointer(self) -> Any:
        if self._engine is None:
            raise ValueError("Engine is closed")
        return self._engine

    def close(self, grace: float = 5.0) -> None:
        """Stop and join the threads, then free all.  grace in seconds.

        OSError ETIMEDOUT: a thread did not stop; nothing was freed and the process has to exit.
        """
        if self._engine is not None:
            _check(lib.vfc_engine_free(self._engine, int(grace * 1000)), "stopping the worker threads")
            self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def uses_uring(self) -> bool:
        """Whether file media go through io_uring; else a pool of threads does the work."""
        return bool(lib.vfc_uses_uring(self.pointer))

    def pin(self, worker: int, cpu: int) -> None:
        """Keep a worker's thread on one CPU.  OSError EINVAL: this process may not use it, or it is not there."""
        _check(lib.vfc_pin(self.pointer, worker, cpu), f"keeping worker {worker} on CPU {cpu}")

    def fd(self, worker: int) -> int:
        """Readable when next() has something.  Stays the engine's."""
        return _check(lib.vfc_fd(self.pointer, worker), f"worker {worker}")

    def next(self, worker: int) -> Event | None:
        """What the worker has to say, or None for now."""
        event = self._event
        if not _check(lib.vfc_next(self.pointer, worker, event), f"worker {worker}"):
            return None
        return Event(
            kind=EventKind(event.kind),
            seq=event.seq,
            handle=event.handle,
            index=event.index,
            result=event.result,
            value=event.value,
            why=Why(event.why),
            target=event.target,
            lun=bytes(event.lun),
            tag=event.tag,
            attribute=event.attribute,
            priority=event.priority,
            crn=event.crn,
            cdb=bytes(event.cdb)[: event.cdb_length],
            data_in_length=event.data_in_length,
            data_out=bytes(ffi.buffer(event.data_out, event.data_out_length)) if event.data_out_length else b"",
        )

    def stats(self, worker: int) -> Stats:
        """The worker's counters."""
        _check(lib.vfc_stats(self.pointer, worker, self._stats), f"worker {worker}")
        return Stats(*(int(getattr(self._stats, field.name)) for field in fields(Stats)))

    def work(self, worker: int) -> dict[int, int]:
        """How much each ring has made the worker do since its start: bytes, and VFC_WORK_COMMAND for a command."""
        work = ffi.new("uint64_t[]", lib.VFC_MAX_RINGS)
        _check(lib.vfc_work(self.pointer, worker, work), f"worker {worker}")
        return {ring: int(done) for ring, done in enumerate(work) if done}

    # ------------------------------------------------------------ answers

    def reply(
        self,
        handle: int,
        *,
        response: int = 0,
        status: int = 0,
        status_qualifier: int = 0,
        residual: int = 0,
        sense: bytes = b"",
        data_in: bytes = b"",
    ) -> bool:
        """Answer a punt; data_in beyond the guest's room and sense beyond 96 bytes are cut.

        False: the command had been answered meanwhile (abort, reset, stop).
        """
        answer = ffi.new("struct vfc_answer *")
        answer.handle, answer.response, answer.status = handle, response, status
        answer.status_qualifier, answer.residual = status_qualifier, residual
        answer.sense_length, answer.data_in_length = len(sense), len(data_in)
        answer.sense = sense_bytes = ffi.from_buffer("uint8_t[]", sense)
        answer.data_in = data_bytes = ffi.from_buffer("uint8_t[]", data_in)
        result = lib.vfc_reply(self.pointer, answer)
        del sense_bytes, data_bytes  # they had to live until here
        return self._answered(result)

    def reply_control(self, handle: int, answer: bytes) -> bool:
        """Answer a control request with the bytes that the guest will read.  False: as for reply()."""
        return self._answered(
            lib.vfc_reply_control(self.pointer, handle, ffi.from_buffer("uint8_t[]", answer), len(answer))
        )

    @staticmethod
    def _answered(result: int) -> bool:
        if result == -errno.ESTALE:
            return False
        _check(result, "answering a punted command")
        return True

    # ------------------------------------------------------------ messages

    def _message(self, kind: int, seq: int) -> Any:
        message = ffi.new("struct vfc_msg *")
        message.kind, message.seq, message.fd = kind, seq, -1
        return message

    def _post(self, worker: int, message: Any) -> None:
        _check(lib.vfc_post(self.pointer, worker, message), f"a message to worker {worker}")

    def ping(self, worker: int, seq: int) -> None:
        """Acked at once: the worker is alive."""
        self._post(worker, self._message(lib.VFC_MSG_PING, seq))

    def set_memory(self, worker: int, seq: int, memory: Memory) -> None:
        """The table from now on; acked when no command uses what only the old one has."""
        message = self._message(lib.VFC_MSG_MEM, seq)
        message.mem = memory.pointer
        self._post(worker, message)

    def ring_start(self, worker: int, seq: int, index: int, setup: RingSetup) -> None:
        """Ack result: -EFAULT a part is outside memory, -EINVAL size or alignment, -EBUSY it runs already,
        -EOPNOTSUPP a feature that changes the layout of rings or requests."""
        message = self._message(lib.VFC_MSG_RING_START, seq)
        message.index = index
        ring = message.ring
        ring.role, ring.size, ring.features, ring.base = int(setup.role), setup.size, setup.features, setup.base
        ring.desc, ring.avail, ring.used = setup.desc, setup.avail, setup.used
        ring.kick_fd, ring.call_fd, ring.err_fd = setup.kick_fd, setup.call_fd, setup.err_fd
        self._post(worker, message)

    def ring_enable(self, worker: int, seq: int, index: int, *, enabled: bool) -> None:
        message = self._message(lib.VFC_MSG_RING_ENABLE, seq)
        message.index, message.value = index, int(enabled)
        self._post(worker, message)

    def ring_call(self, worker: int, seq: int, index: int, fd: int) -> None:
        """The eventfd that interrupts the guest, -1 for none; a new one is written once if the ring runs."""
        message = self._message(lib.VFC_MSG_RING_CALL, seq)
        message.index, message.fd = index, fd
        self._post(worker, message)

    def ring_err(self, worker: int, seq: int, index: int, fd: int) -> None:
        """The eventfd that tells the front end of a broken ring, -1 for none."""
        message = self._message(lib.VFC_MSG_RING_ERR, seq)
        message.index, message.fd = index, fd
        self._post(worker, message)

    def ring_stop(self, worker: int, seq: int, index: int, drain: float) -> None:
        """Ack value: the next avail index.  drain: seconds that what is in flight may take before it is RESET."""
        message = self._message(lib.VFC_MSG_RING_STOP, seq)
        message.index, message.value = index, int(drain * 1000)
        self._post(worker, message)

    def ring_move(self, worker: int, seq: int, index: int, to: int, patience: float) -> None:
        """A started request ring goes to another worker, which acks it; or it stays, and this one says why:
        -ETIMEDOUT something of it is still in flight after so many seconds, -ECANCELED it was stopped, -EBUSY it stops
        or moves already, -EINVAL no such ring or worker."""
        message = self._message(lib.VFC_MSG_RING_MOVE, seq)
        message.index, message.worker, message.value = index, to, int(patience * 1000)
        self._post(worker, message)

    def target(self, worker: int, seq: int, target: int, *, present: bool) -> None:
        """Absent targets (all, at first) are answered BAD_TARGET at once."""
        message = self._message(lib.VFC_MSG_TARGET, seq)
        message.index, message.value = target, int(present)
        self._post(worker, message)

    def route(
        self,
        worker: int,
        seq: int,
        target: int,
        lun: int,
        *,
        mask: bytes = bytes(32),
        medium: Medium | None = None,
        nexus: int = 0,
        epoch: int = 0,
        read_only: bool = False,
        gone: bool = False,
        in_flight: InFlight = InFlight.FINISH,
    ) -> None:
        """Where (target, lun) leads from now on: acked when nothing that was admitted before can touch its medium.

        mask: 32 bytes, bit n of byte n // 8 lets C run opcode n.  gone: no route; what comes is punted.
        """
        message = self._message(lib.VFC_MSG_ROUTE, seq)
        route = message.route
        route.target, route.lun, route.in_flight = target, lun, int(in_flight)
        route.nexus, route.epoch = nexus, epoch
        route.flags = (lib.VFC_ROUTE_GONE if gone else 0) | (lib.VFC_ROUTE_READ_ONLY if read_only else 0)
        route.mask = mask
        route.medium = ffi.NULL if medium is None else medium.pointer
        self._post(worker, message)

    def abort(self, worker: int, seq: int, match: Match) -> None:
        """Ack value: how many commands were ended; they are in the used rings by then.  Ack result -ETIMEDOUT: some
        were answered while their device still has them."""
        self._match(lib.VFC_MSG_ABORT, worker, seq, match)

    def query(self, worker: int, seq: int, match: Match) -> None:
        """Ack value: how many commands in flight match."""
        self._match(lib.VFC_MSG_QUERY, worker, seq, match)

    def _match(self, kind: int, worker: int, seq: int, match: Match) -> None:
        message = self._message(kind, seq)
        wish = message.match
        wish.response = match.response
        if match.target is not None:
            wish.flags |= lib.VFC_MATCH_TARGET
            wish.target = match.target
        if match.lun is not None:
            wish.flags |= lib.VFC_MATCH_LUN
            wish.lun = match.lun
        if match.tag is not None:
            wish.flags |= lib.VFC_MATCH_TAG
            wish.tag = match.tag
        if match.held:
            wish.flags |= lib.VFC_MATCH_HELD
        self._post(worker, message)

    def event(self, worker: int, seq: int, event: bytes) -> None:
        """Put 16 bytes (struct virtio_scsi_event) into the event ring; ack value 0: no buffer, BUFFERS will follow."""
        message = self._message(lib.VFC_MSG_EVENT, seq)
        message.event = event
        self._post(worker, message)

    def reset(self, worker: int, seq: int) -> None:
        """Forget the state of all rings, which are stopped; ack result -EBUSY: one is not."""
        self._post(worker, self._message(lib.VFC_MSG_RESET, seq))
