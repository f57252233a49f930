"""An adapter for the fabric's tests: a real N_Port on a real link, that acknowledges routes as told to.

In the test's own process it is an object; as a process of its own (`python -m tests.daemon.linkadapter
SOCKET NUMBER`) it takes one command a line on stdin and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import trio

from vhostfc.daemon.fdsocket import LinkSocket, close_fds, connect
from vhostfc.errors import LinkLost
from vhostfc.fabric import link
from vhostfc.fabric.link import Hello, MediumKind, Note, Route
from vhostfc.fc.fcp import TmFlag
from vhostfc.fc.initiator import CommandDone, CommandResult, ManagementDone
from vhostfc.fc.nport import LoginRejected, NPort
from vhostfc.fc.remote import RemotePort
from vhostfc.fc.wwn import Wwn
from vhostfc.native import Latch


def wwpn(number: int) -> Wwn:
    return Wwn(0x5001_4380_0000_0000 + number)


def read_10(lba: int, blocks: int) -> bytes:
    return bytes([0x28, 0, *lba.to_bytes(4, "big"), 0, *blocks.to_bytes(2, "big"), 0])


def write_10(lba: int, blocks: int) -> bytes:
    return bytes([0x2A, *read_10(lba, blocks)[1:]])


def lun_bytes(lun: int) -> bytes:
    return bytes([0, lun, 0, 0, 0, 0, 0, 0])


class LinkAdapter:
    """routes, fds: the newest Route of each open path by its handle, and the descriptors held for it.

    acks, releases: whether Routes are acknowledged, and whether older descriptors are closed before.
    """

    def __init__(self, connection: LinkSocket, number: int, *, name: str = "") -> None:
        self.wwpn = wwpn(number)
        self.name = name or f"vm{number}"
        self.port = NPort(self.wwpn, Wwn(self.wwpn | 1 << 40), symbolic_name=self.name)
        self.routes: dict[int, Route] = {}
        self.fds: dict[int, list[int]] = {}
        self.seen: list[link.Message] = []
        self.notes: list[str] = []
        self.refusals: list[LoginRejected] = []
        self.topology = 0
        self.acks = True
        self.releases = True
        self.gone = False
        self._withheld: list[Route] = []
        self._connection = connection
        self._done: dict[object, object] = {}
        self._seq = 0
        self._scope = trio.CancelScope()
        self._lot = trio.lowlevel.ParkingLot()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until the link ends."""
        await self._connection.send(link.encode(Hello(self.name)))
        packet, _ = await self._connection.receive()
        self.seen.append(link.decode(packet))
        self.port.link_up(self._now())
        await self._flush()
        task_status.started()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._tick)
                    await self._read()
                    nursery.cancel_scope.cancel()
        except LinkLost:
            pass
        finally:
            self.gone = True
            self._connection.close()
            self._lot.unpark_all()

    async def _read(self) -> None:
        while True:
            packet, fds = await self._connection.receive()
            if not packet:
                return
            await self._handle(link.decode(packet), fds)

    async def _tick(self) -> None:
        while True:
            await trio.sleep(0.02)  # the port's clock: nothing is waited for here
            self.port.tick(self._now())
            await self._flush()

    async def _handle(self, message: link.Message, fds: list[int]) -> None:
        self.seen.append(message)
        match message:
            case link.Frame(data):
                self.port.receive(data, self._now())
                await self._flush()
            case Note(text):
                self.notes.append(text)
            case Route() as route:
                if self.releases:
                    close_fds(self.fds.pop(route.nexus, []))
                self.fds.setdefault(route.nexus, []).extend(fds)
                self.routes[route.nexus] = route
                if self.acks:
                    await self.send(link.RouteAck(route.seq))
                else:
                    self._withheld.append(route)
            case link.Ping(number):
                await self.send(link.Pong(number))
        self._lot.unpark_all()

    async def acknowledge(self) -> None:
        """What was withheld."""
        while self._withheld:
            await self.send(link.RouteAck(self._withheld.pop(0).seq))

    async def send(self, message: link.Message) -> None:
        await self._connection.send(link.encode(message))

    async def _flush(self) -> None:
        for frame in self.port.take_frames():
            await self._connection.send(link.encode(link.Frame(frame)))
        for event in self.port.take_events():
            match event:
                case CommandDone():
                    self._done[event.command] = event.result
                case ManagementDone():
                    self._done[event.management] = event.code
                case LoginRejected():
                    self.refusals.append(event)
                case _:
                    self.topology += 1
        self._lot.unpark_all()

    @staticmethod
    def _now() -> float:
        return time.monotonic()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for something that comes over the link."""
        with trio.fail_after(10):
            while not condition():
                assert not self.gone, f"{self.name}: the link is down"
                await self._lot.park()

    def close(self) -> None:
        """Break the link."""
        self._scope.cancel()

    def drop_media(self) -> None:
        for fds in self.fds.values():
            close_fds(fds)
        self.fds.clear()

    # ------------------------------------------------------------ as an initiator

    def remote(self, target: Wwn | None = None) -> RemotePort:
        return next(r for r in self.port.remotes.values() if target is None or r.wwpn == target)

    async def ready(self) -> LinkAdapter:
        """Logged in to the fabric and to a target."""
        await self.until(lambda: any(remote.logged_in for remote in self.port.remotes.values()))
        return self

    async def command(
        self, cdb: bytes, *, lun: int = 0, data_out: bytes = b"", data_in: int = 0, attribute: int = 0
    ) -> CommandResult:
        command = self.port.start_command(
            self.remote(),
            lun_bytes(lun),
            cdb,
            self._now(),
            data_out=data_out,
            data_in_length=data_in,
            attribute=attribute,
        )
        await self._flush()
        await self.until(lambda: command in self._done)
        result = self._done.pop(command)
        assert isinstance(result, CommandResult)
        return result

    async def manage(self, flag: TmFlag, *, lun: int = 0) -> object:
        management = self.port.manage(self.remote(), lun_bytes(lun), flag, 20.0, self._now())
        await self._flush()
        await self.until(lambda: management in self._done)
        return self._done.pop(management)

    async def open(self, lun: int = 0, *, ready: bool = True) -> Route:
        """Open a path; ready: take unit attentions until the adapter may read by itself."""
        self._seq += 1
        seq = self._seq
        await self.send(link.Open(seq, self.port.port_id, self.remote().port_id, lun_bytes(lun)))
        await self.until(lambda: any(isinstance(m, Route) and m.seq == seq for m in self.seen))
        (route,) = (m for m in self.seen if isinstance(m, Route) and m.seq == seq)
        if ready and not route.gone:
            await self.command(bytes(6), lun=lun)
            await self.until(lambda: self.routes[route.nexus].mask[0x28 // 8] & 1 << 0x28 % 8)
        return self.routes[route.nexus]


async def attach(nursery: trio.Nursery, path: Path, number: int, *, name: str = "") -> LinkAdapter:
    """An adapter in this process; it lets go of everything when the nursery is cancelled."""
    connection = LinkSocket(await connect(path, socket.SOCK_SEQPACKET))
    adapter = LinkAdapter(connection, number, name=name)

    async def run(task_status: trio.TaskStatus[None]) -> None:
        try:
            await adapter.run(task_status=task_status)
            await trio.sleep_forever()
        finally:
            adapter.drop_media()

    await nursery.start(run)
    return adapter


# ---------------------------------------------------------------- as a process


async def _obey(adapter: LinkAdapter, words: list[str]) -> object:
    match words:
        case ["ready"]:
            await adapter.ready()
        case ["open", lun]:
            route = await adapter.open(int(lun))
            return {"medium": route.medium, "nexus": route.nexus, "owner": route.owner}
        case ["mute"]:
            adapter.acks = False
        case ["hoard"]:
            adapter.releases = False
        case ["latch", offset]:
            (route,) = adapter.routes.values()
            assert route.medium is not MediumKind.NULL
            with Latch(adapter.fds[route.nexus][1]) as latch:
                return latch.take(route.owner, int(offset), 512)
        case ["stuck", nexus, owner]:
            await adapter.send(link.LatchStuck(int(nexus), int(owner)))
        case ["pings"]:
            return sum(isinstance(message, link.Ping) for message in adapter.seen)
        case ["hang up"]:
            adapter.close()
        case ["drop"]:
            adapter.drop_media()
        case _:
            raise AssertionError(words)
    return None


async def _main(path: Path, number: int) -> None:
    async with trio.open_nursery() as nursery:
        adapter = await attach(nursery, path, number)
        stdin = trio.lowlevel.FdStream(os.dup(0))
        buffer = b""
        while chunk := await stdin.receive_some():
            buffer += chunk
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                print(json.dumps(await _obey(adapter, line.decode().split(","))), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_main, Path(sys.argv[1]), int(sys.argv[2]))
