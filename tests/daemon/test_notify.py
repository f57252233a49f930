"""The service's words to systemd, heard by a socket that plays the manager."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vhostfc.daemon.notify import Notifier, passed_fds


@pytest.fixture
def manager(tmp_path: Path) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    end.bind(str(tmp_path / "notify"))
    end.settimeout(5)
    return end


@pytest.fixture
def notifier(manager: socket.socket) -> Notifier:
    return Notifier.from_environment({"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "60000000"})


def test_states_arrive_as_the_manager_expects_them(manager: socket.socket, notifier: Notifier) -> None:
    with manager:
        assert notifier.ready("2 ports online")
        assert manager.recv(4096) == b"READY=1\nSTATUS=2 ports online"
        assert notifier.status("two\nlines")
        assert manager.recv(4096) == b"STATUS=two lines"
        assert notifier.watchdog()
        assert manager.recv(4096) == b"WATCHDOG=1"
        assert notifier.stopping()
        assert manager.recv(4096) == b"STOPPING=1"
        assert notifier.reloading()
        first, second = manager.recv(4096).split(b"\n")
        assert first == b"RELOADING=1"
        assert second.startswith(b"MONOTONIC_USEC=")
        assert int(second.split(b"=")[1]) > 0


def test_descriptors_are_stored_and_forgotten(manager: socket.socket, notifier: Notifier) -> None:
    fd = os.memfd_create("unit")
    os.pwrite(fd, b"block", 0)
    with manager:
        assert notifier.store("unit-0", [fd, fd])
        message, fds, _, _ = socket.recv_fds(manager, 4096, 8)
        assert message == b"FDSTORE=1\nFDNAME=unit-0"
        assert [os.pread(kept, 5, 0) for kept in fds] == [b"block", b"block"]
        assert notifier.forget("unit-0")
        assert manager.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=unit-0"
    for kept in (fd, *fds):
        os.close(kept)


def test_an_abstract_address(tmp_path: Path) -> None:
    name = f"\0vhostfc-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(name)
        assert Notifier("@" + name[1:]).ready()
        assert end.recv(4096) == b"READY=1"


def test_without_a_manager_nothing_is_said(tmp_path: Path) -> None:
    assert not Notifier.from_environment({}).ready()
    assert not Notifier(str(tmp_path / "nobody")).watchdog()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_for_the_process_that_it_names(environ: dict[str, str], seconds: float | None) -> None:
    assert Notifier.from_environment(environ, pid=7).watchdog_timeout == seconds


def test_descriptors_for_somebody_else_are_left_alone() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "HOME": "/"}
    assert passed_fds(environ, pid=2) == []
    assert environ == {"HOME": "/"}


def test_passed_descriptors_have_names_and_are_not_inherited_further() -> None:
    """In a process of its own, because the numbers are fixed."""
    program = (
        "import os; from vhostfc.daemon.notify import passed_fds\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "fds = passed_fds(os.environ)\n"
        "print([(p.name, p.fd, os.get_inheritable(p.fd)) for p in fds], 'LISTEN_FDS' in os.environ, passed_fds())"
    )
    read, write = os.pipe()
    script = f'exec 3<&{read} 4>&{write}; exec "$0" -c "$1"'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, program],
        env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "vhost"},
        pass_fds=[read, write],
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(read)
    os.close(write)
    assert done.stdout.strip() == "[('vhost', 3, False), ('unknown', 4, False)] False []", done.stderr
