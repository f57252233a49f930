"""The units: systemd's own tools find nothing wrong with them, and they agree with the program."""

from __future__ import annotations

import configparser
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.lab.san import San, UnitSpec
from vhostfc.daemon.notify import LISTEN_FDS_START
from vhostfc.daemon.setup import FILES
from vhostfc.frontend.driver import ScsiDriver
from vhostfc.frontend.probe import probe

SYSTEMD = Path(__file__).resolve().parent.parent / "systemd"
SERVICES = ("vhostfc@.service", "vhostfc-fabric.service", "vhostfc-helper.service")
UNITS = (*SERVICES, "vhostfc@.socket", "vhostfc-helper.socket")
#: systemd-analyze's exposure, tenths of a point: 0 is safe, 100 is open; a service of a plain package has 96.
EXPOSURE = {"vhostfc@.service": 6, "vhostfc-fabric.service": 10, "vhostfc-helper.service": 26}


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=["="], comment_prefixes=["#"])
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys as they are written
    parser.read(SYSTEMD / name)
    return parser


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as systemd/install puts them, with a program that exists."""
    subprocess.run(
        [SYSTEMD / "install", "/usr/bin/env"], env={"DESTDIR": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=True
    )
    return tmp_path


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


def test_systemd_finds_nothing_wrong(installed: Path) -> None:
    units = [installed / "etc/systemd/system" / name for name in UNITS]
    done = analyze("verify", "--man=no", *units)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_hba_adds_one_right_and_one_kind_of_node(installed: Path) -> None:
    """What `vhostfc setup` adds to the adapters' unit."""
    name = "etc/systemd/system/vhostfc@.service.d/50-hba.conf"
    path = installed / name
    path.parent.mkdir()
    path.write_text(FILES[name])
    unit_path = installed / "etc/systemd/system/vhostfc@.service"
    done = analyze("verify", "--man=no", unit_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = analyze("security", "--offline=true", "--threshold=12", "--no-pager", unit_path)
    assert done.returncode == 0, done.stdout


def test_what_verify_would_say(installed: Path) -> None:
    """It does look: a misspelt key is told."""
    path = installed / "etc/systemd/system/vhostfc-fabric.service"
    path.write_text(path.read_text().replace("WatchdogSec", "WatchDogSec"))
    assert "WatchDogSec" in analyze("verify", "--man=no", path).stderr


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_may_do_is_little(installed: Path, name: str) -> None:
    path = installed / "etc/systemd/system" / name
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE[name]}", "--no-pager", path)
    assert done.returncode == 0, done.stdout
    found = re.search(r"Overall exposure level for \S+: (\d)\.(\d) ", done.stdout)
    assert found
    least = int(found[1] + found[2]) - 1
    assert analyze("security", "--offline=true", f"--threshold={least}", "--no-pager", path).returncode == 1


def test_the_watchdog_leaves_time(installed: Path) -> None:
    for name in SERVICES:
        assert unit(name)["Service"]["Type"] == "notify"
    for name in ("vhostfc@.service", "vhostfc-fabric.service"):
        assert int(unit(name)["Service"]["WatchdogSec"]) >= 30


def test_adapter_and_socket_agree_with_the_defaults() -> None:
    socket, service = unit("vhostfc@.socket")["Socket"], unit("vhostfc@.service")["Service"]
    assert socket["ListenStream"] == "/run/vhostfc/%i/vhost.sock"
    assert service["RuntimeDirectory"] == service["StateDirectory"] == "vhostfc/%i"
    assert service["RuntimeDirectoryPreserve"] == "yes", "or a stopping adapter would remove the socket unit's file"
    assert unit("vhostfc@.service")["Unit"]["Requires"] == "vhostfc@%i.socket"


def test_the_helper_listens_where_adapters_ask_and_only_root_writes() -> None:
    from vhostfc.cli.host import HELPER
    from vhostfc.config import HbaConfig

    assert unit("vhostfc-helper.socket")["Socket"]["ListenStream"] == str(HELPER) == str(HbaConfig().helper)
    directories = [line.split()[:5] for line in (SYSTEMD / "vhostfc.tmpfiles").read_text().splitlines()]
    assert ["d", str(HELPER.parent), "0755", "root", "root"] in directories


def test_the_commands_are_real_ones() -> None:
    from vhostfc.cli import _parser

    words = [unit(name)["Service"]["ExecStart"].split()[1:] for name in SERVICES]
    words.append(unit("vhostfc-fabric.service")["Service"]["ExecReload"].split()[1:])
    for line in words:
        assert _parser().parse_args(line)


def test_user_and_directories_are_what_systemd_reads(installed: Path) -> None:
    for tool, path in (
        (["systemd-sysusers", "--dry-run"], "usr/lib/sysusers.d/vhostfc.conf"),
        (["systemd-tmpfiles", "--create", "--prefix=/none"], "usr/lib/tmpfiles.d/vhostfc.conf"),
    ):
        done = subprocess.run([*tool, installed / path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Unknown" not in done.stderr
        assert "ignoring" not in done.stderr


def test_the_descriptor_follows_qemus_schema(installed: Path) -> None:
    """docs/interop/vhost-user.json: VhostUserBackend, and the program behind it keeps the conventions."""
    descriptor = json.loads((installed / "usr/share/qemu/vhost-user/50-vhostfc.json").read_text())
    assert set(descriptor) == {"description", "type", "binary", "tags"}
    assert descriptor["type"] == "scsi"
    assert descriptor["binary"] == "/usr/bin/env"
    done = subprocess.run(
        [sys.executable, "-m", "vhostfc", "--print-capabilities", "--socket-path=/none", "--nonsense"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"type": "scsi", "features": []}


@pytest.mark.parametrize("program", ["/home/me/.venv/bin/vhostfc", "/root/x", "vhostfc"])
def test_a_program_that_the_units_could_not_see_is_refused(tmp_path: Path, program: str) -> None:
    done = subprocess.run(
        [SYSTEMD / "install", program],
        env={"DESTDIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"{program}: ")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- as systemd starts them


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """Plays systemd at the other end of NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.settimeout(30)
        yield end


def hear(manager: socket.socket, line: bytes) -> bytes:
    """The next message that has this line."""
    while line not in (message := manager.recv(4096)).split(b"\n"):
        pass
    return message


def test_a_connection_starts_the_adapter(tmp_path: Path, manager: socket.socket) -> None:
    """As vhostfc@.socket does it: the adapter is handed the listening socket and the connection that waits in it."""
    path = tmp_path / "activated.sock"
    with San(tmp_path, [UnitSpec(0)]) as san:
        config = san.write_adapter(1)
        command = ["systemd-socket-activate", f"--listen={path}", f"--setenv=NOTIFY_SOCKET={tmp_path / 'notify'}"]
        command += ["--setenv=WATCHDOG_USEC=2000000", f"--setenv=PYTHONPATH={SYSTEMD.parent}"]
        command += [sys.executable, "-m", "vhostfc", "serve", "--config", str(config)]
        with open(tmp_path / "vm1.log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as adapter:
            San.wait_for(path.exists)
            assert not san.control(1).exists(), "nobody has connected yet"
            result = trio.run(probe, path)
            assert [(unit.target, unit.lun) for unit in result.units] == [(0, 0)]
            assert b"STATUS=adapter vm1" in hear(manager, b"READY=1")
            hear(manager, b"WATCHDOG=1")
            assert [(unit.target, unit.lun) for unit in trio.run(probe, path).units] == [(0, 0)]
            adapter.terminate()
            assert adapter.wait(20) == 0
        hear(manager, b"STOPPING=1")
        assert path.exists(), "the socket is systemd's: the next connection starts the adapter again"
        assert not san.control(1).exists()


def test_the_fabric_tells_systemd_how_it_is(tmp_path: Path, manager: socket.socket) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}
    with San(tmp_path, [UnitSpec(0)], environment=environment) as san:
        hear(manager, b"READY=1")
        hear(manager, b"WATCHDOG=1")
        assert san.fabric
        san.fabric.signal(signal.SIGHUP)
        assert b"MONOTONIC_USEC=" in hear(manager, b"RELOADING=1")
        hear(manager, b"READY=1")
        assert san.fabric.stop() == 0
        hear(manager, b"STOPPING=1")


def test_memory_units_outlive_a_restart_of_the_fabric(tmp_path: Path, manager: socket.socket) -> None:
    """FileDescriptorStoreMax=: what the fabric stores is handed back, with its data in it."""
    with San(tmp_path, [UnitSpec(0)], environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as san:
        stored: list[tuple[str, int]] = []
        while True:
            message, fds, _, _ = socket.recv_fds(manager, 4096, 16)
            lines = message.decode().split("\n")
            name = next((line.partition("=")[2] for line in lines if line.startswith("FDNAME=")), "")
            stored += [(name, fd) for fd in fds]
            if "READY=1" in lines:
                break
        assert stored
        naa = san.fabric_status()["targets"][0]["units"][0]["naa"]
        for _, fd in stored:
            if os.fstat(fd).st_size == 64 << 20:
                os.pwrite(fd, b"kept", 0)
        assert san.fabric
        assert san.fabric.stop() == 0
        handed = {number: fd for number, (_, fd) in enumerate(stored, LISTEN_FDS_START)}
        script = "".join(f" {number}<&{fd}" for number, fd in handed.items())
        arguments = ["fabric", "--config", str(san.write_fabric())]
        command = f'export LISTEN_PID=$$ LISTEN_FDS={len(handed)}; exec "$0" -m vhostfc "$@"{script}'
        environment = {**os.environ, "LISTEN_FDNAMES": ":".join(name for name, _ in stored)}
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in handed.values()]
        for old, new in zip(handed.values(), high, strict=True):
            command = command.replace(f"<&{old}", f"<&{new}")
        with open(tmp_path / "again.log", "wb") as log:
            again = subprocess.Popen(
                ["bash", "-c", command, sys.executable, *arguments],
                pass_fds=high,
                env=environment,
                stdout=log,
                stderr=log,
            )
        try:
            San.wait_for(san.fabric_control.exists)
            assert san.fabric_status()["targets"][0]["units"][0]["naa"] == naa, "the same disk"
            san.start_adapter(1)
            read = bytes([0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0])

            async def first_block() -> bytes:
                async with ScsiDriver.open(san.socket(1)) as driver:
                    await driver.scan()
                    return (await driver.command(0, 0, read, data_in=512)).data_in

            assert trio.run(first_block)[:4] == b"kept"
        finally:
            again.terminate()
            assert again.wait(20) == 0
            for fd in {fd for _, fd in stored} | set(high):
                os.close(fd)
