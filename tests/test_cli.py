"""The command line: arguments, exit statuses, messages, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from vhostfc import __version__, cli
from vhostfc.cli import names
from vhostfc.cli.common import control_path
from vhostfc.config import AdapterConfig, PortConfig
from vhostfc.daemon import hba
from vhostfc.daemon.control import Json, serve_control
from vhostfc.daemon.fdsocket import Listener
from vhostfc.errors import ConfigError, LinkLost, LoginRefused, VhostfcError
from vhostfc.fc.wwn import Wwn
from vhostfc.outline import outline

ADAPTER = """
[[port]]
wwpn = "50:01:43:80:12:34:56:78"
wwnn = "50:01:43:80:12:34:56:79"
[fabric]
emulated = "fabric.sock"
[vhost]
socket = "vm1.sock"
"""
NAMES = ["--wwpn", "5001438012345678", "--wwnn", "5001438012345679"]


@pytest.fixture(autouse=True)
def default_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "vm1.toml"
    path.write_text(ADAPTER)
    return path


def refused(capsys: pytest.CaptureFixture[str], status: int, *words: str | Path) -> str:
    """What a command that must fail with this status says."""
    assert cli.main([str(word) for word in words]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


# ---------------------------------------------------------------- usage


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert {"demo", "serve", "fabric", "check", "probe", "bench", "status", "rescan", "reload", "wwn"} <= set(shown)
    assert shown == [name for names in cli._ROOMS.values() for name in names]
    for command in shown:
        assert cli.main([command, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: vhostfc {command}")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vhostfc {__version__}\n"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        "serve --fd x",
        "serve --fd 3 --socket-path x",
        "serve --conf x",  # no abbreviations: a later option might share it
        "fabric",
        "check",
        "probe",
        "bench",
        "bench x --rw trim",
        "status",
        "wwn",
        "wwn show",
        "wwn show 50:01",
        "serve --config x --log-level loud",
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert refused(capsys, 2, *line.split()).startswith("usage: vhostfc")


@pytest.mark.parametrize(
    "line",
    [
        "serve --print-capabilities",
        "serve --print-capabilities --fd nonsense --socket-path x",
        "serve --config /none --print-capabilities",
        "--print-capabilities",
        "--socket-path=/none --print-capabilities",
    ],
)
def test_capabilities_in_qemus_way(capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert cli.main(line.split()) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"type": "scsi", "features": []}
    assert err == ""


# ---------------------------------------------------------------- serve


class FakeAdapter:
    """Stands in for run_adapter: notes what it was started with, and ends at once."""

    def __init__(self) -> None:
        self.config: AdapterConfig | None = None
        self.listening: Path | None = None
        self.door: Any = None
        self.error: Exception | None = None

    async def __call__(self, config: AdapterConfig, *, listener: Any, log: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.config, self.door = config, listener
        self.listening = listener.path if isinstance(listener, Listener) else None
        if self.listening:
            assert self.listening.is_socket()
        log.info("fake adapter")
        if self.error:
            raise self.error


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeAdapter:
    fake = FakeAdapter()
    monkeypatch.setattr(hba, "run_adapter", fake)
    return fake


def test_serve_from_a_file(fake: FakeAdapter, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--config", str(adapter)]) == 0
    assert fake.config
    assert fake.config.name == "vm1"
    assert fake.listening == adapter.parent / "vm1.sock"
    assert not fake.listening.exists(), "the socket goes with the adapter"
    assert capsys.readouterr().err[8:] == " info    fake adapter adapter=vm1\n"


def test_serve_at_another_socket(fake: FakeAdapter, adapter: Path, tmp_path: Path) -> None:
    assert cli.main(["serve", "--config", str(adapter), "--socket-path", str(tmp_path / "x.sock")]) == 0
    assert fake.config
    assert fake.listening == fake.config.socket == tmp_path / "x.sock"
    assert fake.config.control == tmp_path / "x.control"


def test_serve_without_a_file(fake: FakeAdapter, tmp_path: Path) -> None:
    words = ["--socket-path", str(tmp_path / "x.sock"), *NAMES, "--fabric", "f.sock", "--state", str(tmp_path / "s")]
    assert cli.main(words) == 0  # as QEMU's conventions have it: no command
    assert fake.config == AdapterConfig(
        path=Path("/dev/null"),
        name="5001438012345678",
        ports=(PortConfig(Wwn(0x5001438012345678), Wwn(0x5001438012345679)),),
        emulated=Path.cwd() / "f.sock",
        socket=tmp_path / "x.sock",
        control=tmp_path / "x.control",
        state=tmp_path / "s",
    )


def test_serve_a_connection_that_was_inherited(fake: FakeAdapter, adapter: Path) -> None:
    ours, theirs = socket.socketpair()
    assert cli.main(["serve", "--config", str(adapter), "--fd", str(theirs.detach())]) == 0
    assert fake.listening is None
    assert fake.door.type == socket.SOCK_STREAM
    assert ours.recv(1) == b"", "the connection goes with the adapter"
    ours.close()


def test_serve_needs_names_of_its_own(capsys: pytest.CaptureFixture[str], adapter: Path) -> None:
    said = refused(capsys, 2, "serve", "--socket-path", "x.sock", *NAMES[:2])
    assert "missing: --wwnn, --fabric" in said
    said = refused(capsys, 2, "serve", "--config", adapter, *NAMES)
    assert said == "--wwpn, --wwnn: not together with --config, which has them\n"


def test_serve_says_what_is_wrong_with_the_file(capsys: pytest.CaptureFixture[str], adapter: Path) -> None:
    adapter.write_text(ADAPTER + "workers = 0\n")
    said = refused(capsys, 2, "serve", "--config", adapter)
    assert said == f"{adapter}:9: vhost.workers: is 0; expected a whole number from 1 to 64\n"
    assert refused(capsys, 2, "fabric", "--config", "/none") == "/none: No such file or directory\n"


@pytest.mark.parametrize("wrap", [lambda error: error, lambda error: ExceptionGroup("", [ExceptionGroup("", [error])])])
def test_what_ends_an_adapter_is_one_line_of_its_log(
    fake: FakeAdapter, adapter: Path, capsys: pytest.CaptureFixture[str], wrap: Callable[[Exception], Exception]
) -> None:
    fake.error = wrap(LoginRefused("50:01:43:80:12:34:56:78 is logged in already, by vm2"))
    said = refused(capsys, 1, "serve", "--config", adapter)
    assert said.splitlines()[1][8:] == " error   50:01:43:80:12:34:56:78 is logged in already, by vm2 adapter=vm1"


def test_a_bug_is_not_hushed_up(fake: FakeAdapter, adapter: Path) -> None:
    fake.error = ExceptionGroup("", [LinkLost("known"), ZeroDivisionError("ours")])
    with pytest.raises(ExceptionGroup) as caught:
        cli.main(["serve", "--config", str(adapter)])
    assert caught.group_contains(ZeroDivisionError)


def test_a_socket_in_use_is_named(capsys: pytest.CaptureFixture[str], fake: FakeAdapter, adapter: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(adapter.parent / "vm1.sock"))
        other.listen()
        assert str(adapter.parent / "vm1.sock") in refused(capsys, 1, "serve", "--config", adapter)
    assert fake.config is None


# ---------------------------------------------------------------- starting and stopping


def python(program: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_daemon_cleanly_and_tells_systemd(tmp_path: Path, number: int) -> None:
    program = (
        "import sys, trio; from vhostfc import log; from vhostfc.cli import common\n"
        "async def daemon():\n"
        "    try:\n"
        "        print('up', flush=True); await trio.sleep_forever()\n"
        "    finally:\n"
        "        print('clean', flush=True)\n"
        "sys.exit(common.run_daemon(daemon, log.configure()))"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        with python(program, env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}) as process:
            assert process.stdout
            assert process.stdout.readline() == "up\n"
            process.send_signal(number)
            assert process.communicate(timeout=10) == ("clean\n", "")
        assert process.returncode == 0
        assert manager.recv(100) == b"STOPPING=1"


def test_a_second_signal_ends_what_does_not_end() -> None:
    program = (
        "import trio; from vhostfc.cli import common\n"
        "async def stubborn():\n"
        "    try:\n"
        "        print('up', flush=True); await trio.sleep_forever()\n"
        "    finally:\n"
        "        with trio.CancelScope(shield=True):\n"
        "            print('stuck', flush=True); await trio.sleep_forever()\n"
        "common.run(stubborn)"
    )
    with python(program) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.stdout.readline() == "stuck\n"
        process.terminate()
        process.wait(10)
    assert process.returncode == -signal.SIGTERM


def test_serve_loads_nothing_of_the_other_commands() -> None:
    program = (
        "import sys; from vhostfc import cli\n"
        "print(sorted(sys.modules))\n"
        "from vhostfc.daemon import hba\n"
        "print(sorted(sys.modules))"
    )
    with python(program) as process:
        out, err = process.communicate(timeout=30)
    assert err == ""
    start, serve = (set(json.loads(line.replace("'", '"'))) for line in out.splitlines())
    assert not start & {"trio", "structlog", "tomllib", "vhostfc.config", "vhostfc.log", "vhostfc.native"}
    others = {"vhostfc.daemon.fabricd", "vhostfc.daemon.demo", "vhostfc.frontend", "vhostfc.fabric.switch"}
    assert not serve & (others | {"hypothesis", "pyroute2", "cffi"})


def test_a_reader_that_has_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "vhostfc", "wwn", "new"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


# ---------------------------------------------------------------- check, probe, bench


def test_check_tells_good_from_bad(capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path) -> None:
    bad, fabric = tmp_path / "bad.toml", tmp_path / "fabric.toml"
    bad.write_text("[[port]]\n")
    fabric.write_text('[[target]]\nname = "a"\nwwpn = "5006016000000001"\nwwnn = "5006016000000000"\n')
    assert cli.main(["check", str(adapter), str(fabric)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{adapter}: adapter vm1, WWPN 50:01:43:80:12:34:56:78",
        f"{fabric}: fabric fabric: targets 1, units 0, zones 0",
    ]
    assert err == ""
    assert cli.main(["check", str(bad), str(adapter)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{adapter}: adapter vm1, WWPN 50:01:43:80:12:34:56:78\n"
    assert [line.split(";")[0] for line in err.splitlines()] == [
        f"{bad}:1: port.wwpn: is missing",
        f"{bad}:1: port.wwnn: is missing",
        f"{bad}:1: fabric.emulated: is missing",
    ]
    assert cli.main(["check", "--json", str(bad), str(adapter)]) == 2
    files = json.loads(capsys.readouterr().out)["files"]
    assert [len(one["problems"]) for one in files] == [3, 0]
    assert files[1]["kind"] == "adapter"


def test_nobody_at_the_socket(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "none.sock"
    for command in ("probe", "bench"):
        said = refused(capsys, 1, command, path)
        assert said.startswith(f"vhostfc: {path}: ")
        assert said.count("\n") == 1


def test_bench_options_that_are_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, 2, "bench", "x", "--bs", "4q").startswith("--bs: ")
    assert refused(capsys, 2, "bench", "x", "--unit", "5").startswith("--unit: ")
    assert refused(capsys, 2, "bench", "x", "--iodepth", "0", "--queues", "0").count("\n") == 2
    assert "--unit" in refused(capsys, 2, "bench", "x", "--rw", "write")


# ---------------------------------------------------------------- control sockets


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[dict[str, Callable[[Json], Awaitable[Json]]]], Path]]:
    """Serve these control commands in a thread; returns the socket's path."""
    stop: list[Callable[[], None]] = []
    threads: list[threading.Thread] = []

    def start(handlers: dict[str, Callable[[Json], Awaitable[Json]]]) -> Path:
        path = tmp_path / "vm1.control"
        ready = threading.Event()

        async def run() -> None:
            async with trio.open_nursery() as nursery:
                token = trio.lowlevel.current_trio_token()
                stop.append(lambda: token.run_sync_soon(nursery.cancel_scope.cancel))
                log = structlog.get_logger()
                await nursery.start(lambda task_status: serve_control(path, handlers, log=log, task_status=task_status))
                ready.set()

        threads.append(threading.Thread(target=trio.run, args=(run,)))
        threads[-1].start()
        assert ready.wait(10)
        return path

    yield start
    for cancel in stop:
        cancel()
    for thread in threads:
        thread.join(10)


async def status(_: Json) -> Json:
    return {"name": "vm1", "port": {"state": "online", "port_id": None}, "targets": [{"lun": 0, "up": True}]}


async def rescan(_: Json) -> Json:
    raise VhostfcError("the port is not logged in")


def test_a_running_daemon_is_asked(
    capsys: pytest.CaptureFixture[str], serve: Callable[[Any], Path], tmp_path: Path
) -> None:
    path = serve({"status": status, "rescan": rescan})
    assert cli.main(["status", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "name: vm1",
        "port:",
        "  state: online",
        "  port id: -",
        "targets:",
        "  - lun: 0",
        "    up: yes",
    ]
    assert cli.main(["status", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["port"]["state"] == "online"
    assert "the port is not logged in" in refused(capsys, 1, "rescan", path)
    assert "unknown command 'reload'" in refused(capsys, 1, "reload", path)


def test_a_daemon_has_a_name(tmp_path: Path) -> None:
    adapter, fabric = tmp_path / "vm1/vhost.control", tmp_path / "fabric.control"
    adapter.parent.mkdir()
    for path in (adapter, fabric):
        path.touch()
    assert control_path("vm1", tmp_path) == adapter
    assert control_path("fabric", tmp_path) == fabric
    assert control_path(str(fabric), Path("/none")) == fabric
    with pytest.raises(VhostfcError) as caught:
        control_path("vm2", tmp_path)
    assert str(caught.value) == (
        f"vm2: no such daemon is running; tried vm2, {tmp_path}/vm2/vhost.control, {tmp_path}/vm2.control"
    )


def test_an_answer_as_an_outline() -> None:
    answer = {
        "a": 1.5,
        "b": [],
        "c": [1, {"d": {"e_f": False}, "g": 0}],
        "h": [[1, 2], ["x"]],
        "i": None,
        "j": {},
        "k": 12345678.9,
        "l": [3, 4],
        "since": 86400 * 365.0,
    }
    assert outline(answer) == [
        "a: 1.5",
        "b: none",
        "c:",
        "  - 1",
        "  - d:",
        "      e f: no",
        "    g: 0",
        "h:",
        "  - 1, 2",
        "  - x",
        "i: -",
        "j: none",
        "k: 12345679",
        "l: 3, 4",
        f"since: {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(86400 * 365))}",
    ]


# ---------------------------------------------------------------- names


def test_new_names_are_a_pair(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["wwn", "new"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert cli.main(["wwn", "new", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert first.startswith('wwpn = "50:01:a4:a')
    assert second.startswith('wwnn = "50:01:a4:a')
    assert Wwn.parse(names["wwnn"]) == Wwn.parse(names["wwpn"]) + 1
    assert f'wwpn = "{names["wwpn"]}"' != first


@pytest.mark.parametrize(
    ("spelled", "shown"),
    [
        (
            "5001-4380-1234-5678",
            "50:01:43:80:12:34:56:78  0x5001438012345678  NAA 5: IEEE registered, company id 00:14:38",
        ),
        (
            "naa.20000025b5000001",
            "20:00:00:25:b5:00:00:01  0x20000025b5000001  NAA 2: IEEE extended, company id 00:25:b5",
        ),
        ("100000051e0414d2", "10:00:00:05:1e:04:14:d2  0x100000051e0414d2  NAA 1: IEEE 48-bit, company id 00:05:1e"),
        ("3000000000000001", "30:00:00:00:00:00:00:01  0x3000000000000001  NAA 3: locally assigned"),
        ("f000000000000001", "f0:00:00:00:00:00:00:01  0xf000000000000001  NAA 15: unknown format"),
    ],
)
def test_a_name_in_any_spelling(capsys: pytest.CaptureFixture[str], spelled: str, shown: str) -> None:
    assert cli.main(["wwn", "show", spelled]) == 0
    assert capsys.readouterr().out == shown + "\n"
    assert cli.main(["wwn", "show", spelled, "--json"]) == 0
    (name,) = json.loads(capsys.readouterr().out)["names"]
    assert Wwn.parse(name["wwn"]) == Wwn.parse(spelled)


def test_errors_have_statuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> Callable[[Any], int]:
        def command(_: Any) -> int:
            raise error

        return command

    for error, status_, said in (
        (ConfigError("a:1: b", "a:2: c"), 2, "a:1: b\na:2: c\n"),
        (VhostfcError("no"), 1, "vhostfc: no\n"),
        (KeyboardInterrupt(), 1, ""),
    ):
        monkeypatch.setattr(names, "_wwn_new", fail(error))
        assert refused(capsys, status_, "wwn", "new") == said
