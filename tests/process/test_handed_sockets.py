"""Sockets that an adapter is started with, and what a service manager hears of it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.lab.san import Daemon, San, UnitSpec
from tests.process.driving import units
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.probe import probe

WATCHDOG = 0.5
#: linux/ptrace.h
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
WALL = 0x40000000


@pytest.fixture
def san(tmp_path: Path) -> Iterator[San]:
    with San(tmp_path, [UnitSpec(0)]) as network:
        yield network


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(tmp_path / "given.sock"))
        end.listen()
        yield end


async def test_a_listening_socket_serves_any_number(san: San, listening: socket.socket) -> None:
    fd = listening.fileno()
    adapter = san.start_adapter(1, options=["--fd", str(fd)], fds=[fd])
    path = san.directory / "given.sock"
    for _ in range(2):
        assert [unit.lun for unit in (await probe(path)).units] == [0]
    assert not san.socket(1).exists(), "it has been given another one"
    assert adapter.stop() == 0
    assert path.exists(), "it is not the adapter's to remove"


async def test_a_connected_socket_is_served_until_it_ends(san: San, listening: socket.socket) -> None:
    done = trio.Event()

    async def guest() -> None:
        async with ScsiDriver.open(san.directory / "given.sock", timeout=30) as driver:
            assert list(await units(driver)) == [0]
            done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guest)
        connection, _ = await trio.to_thread.run_sync(listening.accept)
        with connection:
            fd = connection.fileno()
            adapter = Daemon(
                ["serve", "--config", san.write_adapter(1), "--fd", str(fd)], san.directory / "vm1.log", fds=[fd]
            )
            san.started.append(adapter)
        await done.wait()
    assert await trio.to_thread.run_sync(adapter.process.wait, 20) == 0
    assert san.fabric_status()["logins"] == []
    assert not san.control(1).exists()


async def test_sockets_as_systemd_hands_them_over(san: San, listening: socket.socket) -> None:
    """Descriptor 3, announced by LISTEN_FDS, to the process whose pid is in LISTEN_PID."""
    command = 'exec 3<&"$1"; shift; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'
    fd, log = listening.fileno(), san.directory / "vm1.log"
    adapter = Daemon(["serve", "--config", san.write_adapter(1)], log, fds=[fd], shell=(command, str(fd)))
    san.started.append(adapter)
    assert [unit.lun for unit in (await probe(san.directory / "given.sock", timeout=30)).units] == [0]
    assert not san.socket(1).exists()
    assert adapter.stop() == 0


# ---------------------------------------------------------------- the manager


class Manager:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))

    def hear(self, line: str, timeout: float) -> bool:
        """Is this said within so many seconds?"""
        self._socket.settimeout(timeout)
        try:
            while line not in self._socket.recv(4096).decode().split("\n"):
                pass
        except TimeoutError:
            return False
        return True

    def forget(self) -> None:
        """What has been said so far."""
        self._socket.setblocking(False)
        while True:
            try:
                self._socket.recv(4096)
            except BlockingIOError:
                return

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()


def ptrace(request: int, thread: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long] * 4
    if libc.ptrace(request, thread, 0, 0) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


@contextmanager
def hung(pid: int, name: str) -> Iterator[None]:
    """Stop a single thread, by its name: the process is alive, but for that."""
    tasks = Path(f"/proc/{pid}/task")
    thread = next(int(task.name) for task in tasks.iterdir() if (task / "comm").read_text().strip() == name)
    try:
        ptrace(PTRACE_SEIZE, thread)
    except PermissionError:
        pytest.skip("ptrace is not allowed here")
    ptrace(PTRACE_INTERRUPT, thread)
    os.waitpid(thread, WALL)
    try:
        yield
    finally:
        ptrace(PTRACE_DETACH, thread)


def test_the_watchdog_is_fed_only_while_the_workers_answer(san: San, manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": str(int(WATCHDOG * 1e6))}
    adapter = san.start_adapter(1, environment=environment)
    assert manager.hear("READY=1", 10)
    assert manager.hear("WATCHDOG=1", 10)
    with hung(adapter.pid, "vhostfc-worker"):
        manager.forget()
        manager.hear("WATCHDOG=1", WATCHDOG / 2)  # one that was under way
        assert not manager.hear("WATCHDOG=1", 3 * WATCHDOG)
        adapter.await_line("a worker does not answer")
        assert san.status(1)["port"]["state"] == "online", "the rest of it is well"
    assert manager.hear("WATCHDOG=1", 10)
    adapter.signal(signal.SIGTERM)
    assert manager.hear("STOPPING=1", 10)
    assert adapter.process.wait(20) == 0
