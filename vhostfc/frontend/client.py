"""A vhost-user front end: what QEMU says to a back end, in QEMU's order, without a guest.

It works with any vhost-user back end: it takes of what is offered what it knows, and does without the
rest (no REPLY_ACK: a GET_FEATURES after what must be in force serves as the barrier, as QEMU does it;
no CONFIGURE_MEM_SLOTS: the whole table each time; no protocol features: rings are enabled from the start).

A back end that goes away, says nothing in time or answers nonsense is a BackendError, which names the
socket and the request; from then on every request and every waiter gets it.
"""

from __future__ import annotations

import array
import contextlib
import math
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trio

from vhostfc.errors import VhostfcError
from vhostfc.frontend.memory import GuestMemory, MemoryRegion
from vhostfc.vhost.features import Feature, ProtocolFeature, mask
from vhostfc.vhost.messages import (
    MAX_FDS,
    MAX_REGIONS,
    U64,
    Header,
    MemoryTable,
    Packet,
    Payload,
    ProtocolError,
    Region,
    SingleRegion,
    VringAddr,
    VringFd,
    VringState,
)
from vhostfc.vhost.requests import Request, check_size, decode_reply, encode_request

P = TypeVar("P", bound=Payload)

#: What a Linux guest's driver would acknowledge, and we can drive.
WANTED = mask(
    Feature.SCSI_HOTPLUG,
    Feature.SCSI_CHANGE,
    Feature.INDIRECT_DESC,
    Feature.EVENT_IDX,
    Feature.PROTOCOL_FEATURES,
    Feature.VERSION_1,
)
WANTED_PROTOCOL = mask(
    ProtocolFeature.MQ,
    ProtocolFeature.REPLY_ACK,
    ProtocolFeature.RESET_DEVICE,
    ProtocolFeature.CONFIGURE_MEM_SLOTS,
)
#: sun_path holds 108 bytes, the last of which is 0.
SUN_PATH = 107
#: Seconds for one answer; a back end may take about one to drain a ring.
TIMEOUT = 10.0


@contextlib.asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """A nursery for tasks that end with the block; what the block raises comes out as it is, not in a group."""
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1 and isinstance(group.exceptions[0], Exception):
            raise group.exceptions[0] from group.exceptions[0].__cause__
        raise


class BackendError(VhostfcError):
    """The back end is gone, silent, or does what the protocol does not allow."""


@dataclass(frozen=True, slots=True)
class RingSetup:
    """A ring as the back end is told of it: user addresses, and eventfds that stay the caller's."""

    index: int
    size: int
    desc: int
    avail: int
    used: int
    kick_fd: int
    call_fd: int
    err_fd: int
    base: int = 0


def wire_region(region: MemoryRegion) -> Region:
    return Region(region.guest_phys, region.size, region.user_addr, region.mmap_offset)


async def _connect(path: Path) -> trio.SocketStream:
    directory = -1
    try:
        if len(os.fsencode(path)) <= SUN_PATH:
            return await trio.open_unix_socket(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return await trio.open_unix_socket(f"/proc/self/fd/{directory}/{path.name}")
    except FileNotFoundError as error:
        raise BackendError(f"{path}: there is no such socket") from error
    except ConnectionRefusedError as error:
        raise BackendError(f"{path}: nobody listens there") from error
    except OSError as error:
        raise BackendError(f"{path}: cannot connect: {error.strerror or error}") from error
    finally:
        if directory >= 0:
            os.close(directory)


class VhostUserClient:
    """One connection to a back end; see open().

    features, protocol_features: what is in force (0 before negotiate()).
    """

    def __init__(self, path: Path, sock: trio.socket.SocketType, memory: GuestMemory, timeout: float) -> None:
        self.path = path
        self.memory = memory
        self.timeout = timeout
        self.offered = 0
        self.features = 0
        self.protocol_features = 0
        self.queue_num = 1
        self.max_mem_slots = MAX_REGIONS
        #: Set when the connection is of no more use; `reason` then says why.
        self.gone = trio.Event()
        self.reason: BackendError | None = None
        self._socket = sock
        self._turn = trio.Lock()
        self._memory_turn = trio.Lock()
        self._replies: trio.MemoryReceiveChannel[Packet]
        self._arrived, self._replies = trio.open_memory_channel[Packet](math.inf)
        self._known: list[MemoryRegion] = []

    def __repr__(self) -> str:
        state = f"gone: {self.reason}" if self.reason else f"features {self.features:#x}"
        return f"<VhostUserClient {self.path} [{state}]>"

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, path: Path | str, *, memory: GuestMemory | None = None, timeout: float = TIMEOUT
    ) -> AsyncIterator[VhostUserClient]:
        """Connect.  memory: the guest's; without it a new one, closed at the end.  timeout: seconds for each answer.

        Raises BackendError when nobody listens at `path`.
        """
        path = Path(path)
        stream = await _connect(path)
        own = memory is None
        client = cls(path, stream.socket, memory or GuestMemory(), timeout)
        try:
            async with background() as nursery:
                nursery.start_soon(client._read)
                yield client
        finally:
            client._lose("the connection was closed by us")
            stream.socket.close()
            if own:
                client.memory.close()

    @property
    def peer_pid(self) -> int:
        """The process that listens (SO_PEERCRED); 0 when it is not of our PID namespace."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid: int = struct.unpack("iII", credentials)[0]
        return pid

    def has(self, feature: ProtocolFeature) -> bool:
        """Whether a protocol feature is in force."""
        return bool(self.protocol_features >> feature & 1)

    # ------------------------------------------------------------------ messages

    async def request(self, request: Request, payload: Payload | None = None, fds: Sequence[int] = ()) -> None:
        """Send a request that has no reply of its own; returns when it is in force.

        With REPLY_ACK the back end confirms; without, a GET_FEATURES is the barrier.
        """
        if self.has(ProtocolFeature.REPLY_ACK):
            answer = await self._ask(request, payload, fds, need_reply=True)
            if not isinstance(answer, U64) or answer.value:
                raise BackendError(f"{self.path}: the back end refused {request.name}")
        else:
            await self.tell(request, payload, fds)

    async def tell(self, request: Request, payload: Payload | None = None, fds: Sequence[int] = ()) -> None:
        """Send a request, ask for no confirmation."""
        async with self._turn:
            with self._limit(request):
                await self._send(encode_request(request, payload), fds)

    async def ask(self, request: Request, shape: type[P], payload: Payload | None = None) -> P:
        """Send a request that has a reply of its own; the reply."""
        answer = await self._ask(request, payload, (), need_reply=False)
        if not isinstance(answer, shape):
            raise BackendError(f"{self.path}: the back end could not answer {request.name}")
        return answer

    async def barrier(self) -> None:
        """Returns when all that was sent is in force."""
        await self.ask(Request.GET_FEATURES, U64)

    async def _ask(self, request: Request, payload: Payload | None, fds: Sequence[int], *, need_reply: bool) -> Payload:
        async with self._turn:
            with self._limit(request):
                await self._send(encode_request(request, payload, need_reply=need_reply), fds)
                try:
                    packet = await self._replies.receive()
                except trio.EndOfChannel:
                    raise self._why(request) from None
        try:
            return decode_reply(request, packet)
        except ProtocolError as error:
            self._lose(f"the back end answers nonsense: {error}")
            raise self._why(request) from error
        finally:
            for fd in packet.fds:
                os.close(fd)

    @contextlib.contextmanager
    def _limit(self, request: Request) -> Iterator[None]:
        """Bounded by the time limit alone: a cancellation between question and answer would mix up all later ones."""
        try:
            with trio.CancelScope(shield=True), trio.fail_after(self.timeout):
                yield
        except trio.TooSlowError:
            self._lose(f"the back end did not answer {request.name} within {self.timeout:g} s")
            raise self._why(request) from None

    def _why(self, request: Request) -> BackendError:
        text = str(self.reason) if self.reason else f"{self.path}: the connection is lost"
        return BackendError(f"{text} (at {request.name})" if request.name not in text else text)

    def _lose(self, why: str) -> None:
        """The connection is of no more use; the first reason is the one that counts."""
        if self.reason is None:
            self.reason = BackendError(f"{self.path}: {why}")
            self.gone.set()
            self._arrived.close()

    def check(self) -> None:
        """Raises BackendError when the connection is lost."""
        if self.reason is not None:
            raise BackendError(str(self.reason))

    async def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Put any bytes on the wire: for tests of what no front end would say."""
        await self._send(data, fds)

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        self.check()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = await self._socket.sendmsg([data], rights)
            while sent < len(data):
                sent += await self._socket.send(data[sent:])
        except (BrokenPipeError, ConnectionResetError):
            self._lose("the back end closed the connection")
            self.check()

    # ------------------------------------------------------------------ the reader

    async def _read(self) -> None:
        """Read replies for whoever asked; notice at once that the back end is gone."""
        try:
            while (packet := await self._receive()) is not None:
                await self._arrived.send(packet)
            self._lose("the back end closed the connection")
        except ProtocolError as error:
            self._lose(f"the back end answers nonsense: {error}")
        except (OSError, trio.ClosedResourceError, trio.BrokenResourceError) as error:
            if self.reason is None:
                self._lose(f"the connection broke: {error}")

    async def _receive(self) -> Packet | None:
        fds: list[int] = []
        try:
            data = await self._exactly(Header.SIZE, fds)
            if data is None:
                return None
            header = check_size(Header.unpack(data))
            payload = await self._exactly(header.size, fds) if header.size else b""
            if payload is None:
                raise ProtocolError("the connection ended inside a message")
            return Packet(header, payload, tuple(fds))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    async def _exactly(self, size: int, fds: list[int]) -> bytes | None:
        data = b""
        while len(data) < size:
            try:
                more, ancillary, _, _ = await self._socket.recvmsg(
                    size - len(data), socket.CMSG_SPACE(4 * MAX_FDS), socket.MSG_CMSG_CLOEXEC
                )
            except ConnectionResetError:
                more, ancillary = b"", []
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds += array.array("i", content[: len(content) // 4 * 4])
            if not more:
                if data:
                    raise ProtocolError("the connection ended inside a message")
                return None
            data += more
        return data

    # ------------------------------------------------------------------ sequences

    async def negotiate(self, *, features: int = WANTED, protocol: int = WANTED_PROTOCOL) -> None:
        """QEMU's connect sequence: learn what there is, take what is wanted of it, own the device."""
        self.offered = (await self.ask(Request.GET_FEATURES, U64)).value
        self.features = self.offered & features
        if self.features >> Feature.PROTOCOL_FEATURES & 1:
            offered = (await self.ask(Request.GET_PROTOCOL_FEATURES, U64)).value
            await self.tell(Request.SET_PROTOCOL_FEATURES, U64(offered & protocol))
            self.protocol_features = offered & protocol
        if self.has(ProtocolFeature.MQ):
            self.queue_num = (await self.ask(Request.GET_QUEUE_NUM, U64)).value
        if self.has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            self.max_mem_slots = (await self.ask(Request.GET_MAX_MEM_SLOTS, U64)).value
        await self.request(Request.SET_OWNER)
        await self.barrier()

    async def start(self, rings: Iterable[RingSetup], *, ring_count: int = 0) -> None:
        """QEMU's start sequence at DRIVER_OK.  ring_count: rings of the device, configured or not."""
        rings = list(rings)
        count = max([ring_count, *(ring.index + 1 for ring in rings)])
        await self.request(Request.SET_FEATURES, U64(self.features))
        await self.send_memory()
        for ring in rings:
            await self.request(Request.SET_VRING_ERR, VringFd.of(ring.index), [ring.err_fd])
            await self.request(Request.SET_VRING_NUM, VringState(ring.index, ring.size))
            await self.request(Request.SET_VRING_BASE, VringState(ring.index, ring.base))
            await self.request(Request.SET_VRING_ADDR, VringAddr(ring.index, 0, ring.desc, ring.used, ring.avail))
            await self.request(Request.SET_VRING_KICK, VringFd.of(ring.index), [ring.kick_fd])
        await self.enable(range(count), enable=True)
        for ring in rings:
            await self.request(Request.SET_VRING_CALL, VringFd.of(ring.index), [ring.call_fd])

    async def enable(self, indices: Iterable[int], *, enable: bool) -> None:
        """SET_VRING_ENABLE for each; nothing to do where rings are enabled from the start."""
        if not self.features >> Feature.PROTOCOL_FEATURES & 1:
            return
        for index in indices:
            await self.request(Request.SET_VRING_ENABLE, VringState(index, int(enable)))
        if not self.has(ProtocolFeature.REPLY_ACK):
            await self.barrier()

    async def stop(self, indices: Iterable[int], *, ring_count: int = 0) -> dict[int, int]:
        """QEMU's stop sequence: disable all, then stop each; where each ring goes on (its next avail index)."""
        indices = list(indices)
        await self.enable(range(max([ring_count, *(index + 1 for index in indices)])), enable=False)
        bases: dict[int, int] = {}
        for index in indices:
            state = await self.ask(Request.GET_VRING_BASE, VringState, VringState(index))
            if state.index != index:
                raise BackendError(f"{self.path}: GET_VRING_BASE of ring {index} was answered for ring {state.index}")
            bases[index] = state.num
        return bases

    async def reset_device(self) -> None:
        """A virtio reset, after stop(); without the feature there is nothing to say."""
        if self.has(ProtocolFeature.RESET_DEVICE):
            await self.request(Request.RESET_DEVICE)

    # ------------------------------------------------------------------ memory

    async def send_memory(self) -> None:
        """Let the back end know the regions of `memory` that it does not know yet (all, without memory slots)."""
        async with self._memory_turn:
            await self._send_memory()

    async def add_region(self, size: int, *, mmap_offset: int = 0) -> MemoryRegion:
        """Plug memory in, as a guest's hotplug does, while the rings run or not."""
        async with self._memory_turn:
            if len(self.memory.regions) >= self.max_mem_slots:
                raise BackendError(f"{self.path}: the back end takes {self.max_mem_slots} memory regions, all in use")
            region = self.memory.add(size, mmap_offset=mmap_offset)
            await self._send_memory()
            return region

    async def remove_region(self, region: MemoryRegion) -> None:
        """Take memory out again; when this returns the back end has let go of it."""
        async with self._memory_turn:
            if self.has(ProtocolFeature.CONFIGURE_MEM_SLOTS) and region in self._known:
                await self.request(Request.REM_MEM_REG, SingleRegion.of(wire_region(region)))
                self._known.remove(region)
                self.memory.remove(region)
                await self._memory_barrier()
            else:
                self.memory.remove(region)
                if region in self._known:
                    await self._send_table()

    async def _send_memory(self) -> None:
        if not self.has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            await self._send_table()
            return
        for region in self.memory.regions:
            if region not in self._known:
                await self._send_region(region)

    async def _send_region(self, region: MemoryRegion) -> None:
        await self.request(Request.ADD_MEM_REG, SingleRegion.of(wire_region(region)), [region.fd])
        self._known.append(region)
        await self._memory_barrier()

    async def _send_table(self) -> None:
        regions = self.memory.regions
        table = MemoryTable(tuple(wire_region(region) for region in regions))
        await self.request(Request.SET_MEM_TABLE, table, [region.fd for region in regions])
        self._known = list(regions)
        await self._memory_barrier()

    async def _memory_barrier(self) -> None:
        if not self.has(ProtocolFeature.REPLY_ACK):
            await self.barrier()
