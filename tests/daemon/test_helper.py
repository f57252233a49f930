"""The privileged helper: what it does for whom, and what it does not; and the kernel by way of it."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import structlog
import trio
from structlog.testing import capture_logs

from tests.fakes.array import FakeTarget, FakeUnit
from tests.fakes.kernel import FakeKernel
from tests.ports.contract import ME, OTHER
from tests.waiting import until
from vhostfc.daemon.helped import HelpedKernel
from vhostfc.daemon.helper import CONNECTIONS, Client, Helper, Share, listening_socket, run_helper
from vhostfc.daemon.permits import unit_of
from vhostfc.errors import LoginRefused, VhostfcError
from vhostfc.fc.wwn import Wwn
from vhostfc.ports.base import PortIdentity, PortState
from vhostfc.ports.fcevents import FcEvent, Hint, Uevent
from vhostfc.ports.npiv import NpivFabric
from vhostfc.ports.sysfs import Lun
from vhostfc.ports.vport import Parents

LOG = structlog.get_logger()
NAMES = f"{ME.wwpn:016x}:{ME.wwnn:016x}"
STRANGER = f"{OTHER.wwpn:016x}:{OTHER.wwnn:016x}"


@dataclass
class Lab:
    kernel: FakeKernel
    helped: HelpedKernel
    helper: Helper
    socket: Path

    def path(self, relative: str) -> Path:
        return self.kernel.root / relative

    async def answer(self, line: bytes) -> dict[str, object]:
        """To vm1."""
        return await self.helper.answer(Client(None, Share(), "vm1"), line)

    def other(self) -> HelpedKernel:
        """Another adapter's."""
        return HelpedKernel(self.socket, "vm2", sys=self.kernel.root)

    def in_a_unit(self, path: str) -> None:
        """From now on this process is in a control group."""
        proc = self.socket.parent / f"proc/{os.getpid()}"
        proc.mkdir(parents=True)
        (proc / "cgroup").write_text(f"0::{path}\n")


@pytest.fixture
async def lab(tmp_path: Path, nursery: trio.Nursery) -> Lab:
    etc = tmp_path / "etc"
    etc.mkdir()
    (etc / "vm1.toml").write_text(f'[[port]]\nwwpn = "{ME.wwpn}"\nwwnn = "{ME.wwnn}"\n')
    (etc / "vm2.toml").write_text(f'[[port]]\nwwpn = "{OTHER.wwpn}"\nwwnn = "{OTHER.wwnn}"\n')
    (etc / "broken.toml").write_text("port = 7\n")
    target = FakeTarget(Wwn(0x5006_0160_0000_0001), 0x01FE01, {0: FakeUnit(bytearray(4096))})
    kernel = FakeKernel(tmp_path, nursery, target)
    path = tmp_path / "helper.sock"
    listener = listening_socket(path, None)
    notes = tmp_path / "notes"
    serve = partial(run_helper, listener, kernel, etc=etc, notes=notes, users={os.getuid()}, log=LOG)
    await nursery.start(partial(serve, proc=tmp_path / "proc"))
    return Lab(kernel, HelpedKernel(path, "vm1", sys=kernel.root), Helper(kernel, etc, notes, log=LOG), path)


async def test_a_vport_is_made_and_deleted(lab: Lab) -> None:
    at = lab.path("class/fc_host/host0")
    assert await lab.helped.write(at / "vport_create", NAMES.encode()) == 33
    assert lab.kernel.sysfs.vport_of(ME.wwpn) is not None
    await lab.helped.write(at / "vport_delete", NAMES.encode())
    assert lab.kernel.sysfs.vport_of(ME.wwpn) is None


@pytest.mark.parametrize("code", [errno.EINTR, errno.ENOSPC, errno.ENOTUNIQ])
async def test_what_the_kernel_says_comes_through(lab: Lab, code: int) -> None:
    lab.kernel.next_create = code
    with pytest.raises(OSError, match=r".") as refused:
        await lab.helped.write(lab.path("class/fc_host/host0/vport_create"), NAMES.encode())
    assert refused.value.errno == code


async def test_a_short_count_comes_through(lab: Lab) -> None:
    lab.kernel.next_create = -9
    assert await lab.helped.write(lab.path("class/fc_host/host0/vport_create"), NAMES.encode()) == 9


@pytest.mark.parametrize(
    ("relative", "data"),
    [
        ("class/fc_host/host0/vport_create", STRANGER),
        ("class/fc_host/host0/vport_delete", STRANGER),
        ("class/fc_host/host0/vport_create", "all of them"),
        ("class/fc_host/host0/issue_lip", "1"),
        ("class/fc_host/host0/dev_loss_tmo", "1"),
        ("class/fc_host/../../bus/scsi/drivers_autoprobe", "1"),
        ("bus/scsi/drivers_autoprobe", "1"),
        ("class/scsi_host/host0/scan", "- - -"),
        ("class/scsi_device/0:0:0:0/device/delete", "1"),
        ("class/fc_vports/vport-0:0-0/symbolic_name", "somebody else"),
        ("class/fc_vports/vport-0:0-0/vport_disable", "yes"),
        ("/etc/passwd", "x"),
    ],
)
async def test_nothing_else_is_written(lab: Lab, relative: str, data: str) -> None:
    lab.kernel.make_vport(lab.kernel.hosts["host0"], ME.wwpn, ME.wwnn)
    answer = await lab.answer(b'{"write": "%s", "data": "%s"}' % (relative.encode(), data.encode()))
    assert (answer["ok"], answer["errno"]) == (False, errno.EPERM)
    assert lab.kernel.writes == []


async def test_what_is_below_a_strangers_vport_is_not_touched(lab: Lab) -> None:
    vhost = lab.kernel.make_vport(lab.kernel.hosts["host0"], OTHER.wwpn, OTHER.wwnn)
    with pytest.raises(PermissionError, match=r"belongs to no vport of vm1"):
        await lab.helped.write(lab.path(f"class/scsi_host/{vhost.name}/scan"), b"- - -")


@pytest.mark.parametrize("name", ["", "libvirt web7"])
async def test_somebody_elses_vport_with_our_names_is_not_deleted(lab: Lab, name: str) -> None:
    lab.kernel.make_vport(lab.kernel.hosts["host0"], ME.wwpn, ME.wwnn, name)
    with pytest.raises(PermissionError, match=r"vport-0:0-0 on host0 \(.*\) was not made by vm1"):
        await lab.helped.write(lab.path("class/fc_host/host0/vport_delete"), NAMES.encode())
    assert lab.kernel.writes == []


async def settled(lab: Lab) -> str:
    """A vport of ours with its unit; the name of its host."""
    vhost = lab.kernel.make_vport(lab.kernel.hosts["host0"], ME.wwpn, ME.wwnn)
    await until(lambda: lab.kernel.nodes)
    return vhost.name


async def test_settings_below_a_vport_of_ours(lab: Lab) -> None:
    name = await settled(lab)
    for relative, data in (
        ("class/fc_remote_ports/rport-1:0-0/dev_loss_tmo", "30"),
        ("class/fc_remote_ports/rport-1:0-0/fast_io_fail_tmo", "5"),
        ("class/fc_vports/vport-0:0-0/symbolic_name", "vhostfc vm1"),
        (f"class/scsi_host/{name}/scan", "0 0 -"),
        ("class/scsi_device/1:0:0:0/device/delete", "1"),
    ):
        await lab.helped.write(lab.path(relative), data.encode())
        assert lab.kernel.writes[-1] == (relative, data)


async def test_a_unit_is_reset_without_escalation_only(lab: Lab) -> None:
    await settled(lab)
    (lun,) = lab.kernel.sysfs.luns("host1")
    await lab.helped.reset(lun, 0x101)
    assert lab.kernel.resets == [("1:0:0:0", 0x101)]
    for level in (0x103, 1, 3, "all"):
        answer = await lab.answer(b'{"reset": "1:0:0:0", "level": %s}' % repr(level).encode().replace(b"'", b'"'))
        assert answer["errno"] == errno.EPERM
    with pytest.raises(OSError, match=r".") as refused:
        await lab.helped.reset(lun, 0x104)
    assert refused.value.errno == errno.EIO
    assert await lab.answer(b'{"reset": "0:0:0:0", "level": 257}') == {
        "ok": False,
        "errno": errno.EPERM,
        "error": f"{lab.kernel.root}/class/scsi_device/0:0:0:0 belongs to no vport of vm1",
    }


# ---------------------------------------------------------------- one adapter and another


async def test_an_adapter_has_nothing_of_anothers(lab: Lab) -> None:
    name = await settled(lab)
    (lun,) = lab.kernel.sysfs.luns(name)
    before = list(lab.kernel.writes)
    for relative, data in (
        ("class/fc_host/host0/vport_delete", NAMES),
        ("class/fc_vports/vport-0:0-0/vport_disable", "1"),
        ("class/fc_vports/vport-0:0-0/symbolic_name", "vhostfc vm2"),
        ("class/scsi_device/1:0:0:0/device/delete", "1"),
    ):
        with pytest.raises(PermissionError, match=r"vm2"):
            await lab.other().write(lab.path(relative), data.encode())
    with pytest.raises(PermissionError, match=r"belongs to no vport of vm2"):
        await lab.other().reset(lun, 0x101)
    assert (lab.kernel.writes, lab.kernel.resets) == (before, [])
    lab.kernel._set(lab.path("class/fc_vports/vport-0:0-0/symbolic_name"), "vhostfc vm2")
    with pytest.raises(PermissionError, match=r"belongs to no vport of vm1"):
        await lab.helped.reset(lun, 0x101)


async def test_a_unit_of_systemds_is_the_adapter_of_its_name(lab: Lab) -> None:
    lab.in_a_unit("/system.slice/system-vhostfc.slice/vhostfc@vm2.service")
    with pytest.raises(PermissionError, match=r"vhostfc@vm2\.service is not the adapter vm1"):
        await lab.helped.write(lab.path("class/fc_host/host0/vport_create"), NAMES.encode())
    assert await lab.other().write(lab.path("class/fc_host/host0/vport_create"), STRANGER.encode()) == 33


@pytest.mark.parametrize(
    ("text", "instance"),
    [
        ("0::/system.slice/system-vhostfc.slice/vhostfc@web-1.service\n", "web-1"),
        ("12:pids:/x\n1:name=systemd:/machine.slice/vhostfc@vm1.service/worker\n", "vm1"),
        ("0::/user.slice/user-7.slice/user@7.service/app.slice/vhostfc@vm1.service\n", None),
        ("3:cpu:/vhostfc@vm1.service\n0::/system.slice/cron.service\n", None),
        ("0::/\n", None),
        (None, None),
    ],
)
def test_which_unit_a_process_is_in(tmp_path: Path, text: str | None, instance: str | None) -> None:
    if text is not None:
        (tmp_path / "7").mkdir()
        (tmp_path / "7/cgroup").write_text(text)
    assert unit_of(tmp_path, 7) == instance


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vm3", r"etc/vm3\.toml is not there"),
        ("broken", r"etc/broken\.toml is no adapter's file: see `vhostfc check"),
        ("../etc/vm1", "expected the name of an adapter's file"),
        ("", "expected the name"),
    ],
)
async def test_an_adapter_without_a_file_is_told(lab: Lab, name: str, says: str) -> None:
    with pytest.raises(PermissionError, match=says):
        await HelpedKernel(lab.socket, name, sys=lab.kernel.root).write(lab.path("class/x"), b"1")


async def test_a_file_that_root_cannot_read_is_told(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The helper is root without CAP_DAC_OVERRIDE."""

    def locked(path: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_text", locked)
    with pytest.raises(PermissionError, match=r"cannot read .*etc/vm1\.toml: give it to root \(chown root:vhostfc"):
        await lab.helped.write(lab.path("class/fc_host/host0/vport_create"), NAMES.encode())


async def test_an_administrator_reads_the_helpers_own_words(lab: Lab, tmp_path: Path) -> None:
    kernel = HelpedKernel(lab.socket, "vm3", sys=lab.kernel.root)
    with pytest.raises(LoginRefused, match=r"50:01.*on host0 .*: .*etc/vm3\.toml is not there: the helper works for"):
        async with NpivFabric(kernel, Parents(), state=tmp_path / "state", log=LOG).login(ME):
            pass
    kernel = HelpedKernel(tmp_path / "nowhere.sock", "vm1", sys=lab.kernel.root)
    with pytest.raises(LoginRefused, match=r"nowhere\.sock: .*is vhostfc-helper\.socket active"):
        async with NpivFabric(kernel, Parents(), state=tmp_path / "state", log=LOG).login(ME):
            pass


async def test_a_life_by_way_of_the_helper(lab: Lab, tmp_path: Path) -> None:
    """All that an adapter writes in it is permitted."""
    me = PortIdentity(ME.wwpn, ME.wwnn, "vhostfc vm1")
    fabric = NpivFabric(lab.helped, Parents(), state=tmp_path / "state", log=LOG, survey=0.2)
    with capture_logs() as logs:
        async with fabric.login(me) as port:
            assert [vport.symbolic_name for vport in lab.kernel.sysfs.vports()] == ["vhostfc vm1"]
            assert port.snapshot().state is PortState.ONLINE
            lab.kernel._set(lab.path("class/scsi_device/1:0:0:0/device/state"), "offline")
            lab.kernel.bind("1:0:0:0")
            await port.rescan()
            with trio.fail_after(5):
                while any((lun.state, lun.driver) != ("running", None) for lun in lab.kernel.sysfs.luns("host1")):
                    await trio.sleep(0.01)
    assert list(lab.kernel.sysfs.vports()) == []
    assert [log for log in logs if log["event"] == "refused"] == []


async def test_a_unit_is_set_running_when_it_is_offline_only(lab: Lab) -> None:
    await settled(lab)
    at = lab.path("class/scsi_device/1:0:0:0/device/state")
    for text in (b"offline\n", b"running\n", b"running"):
        with pytest.raises(PermissionError, match=r"not a value|not offline"):
            await lab.helped.write(at, text)
    lab.kernel._set(at, "offline")
    await lab.helped.write(at, b"running\n")
    assert at.read_text() == "running\n"


async def test_a_unit_is_taken_from_a_driver_of_the_host(lab: Lab) -> None:
    await settled(lab)
    lab.kernel.bind("1:0:0:0")
    unbind = lab.path("bus/scsi/drivers/sd/unbind")
    for text in (b"0:0:0:0", b"1:0:0:9", b"all"):
        with pytest.raises(PermissionError, match=r"not a value|belongs to no vport"):
            await lab.helped.write(unbind, text)
    with pytest.raises(PermissionError, match=r"belongs to no vport of vm2"):
        await lab.other().write(unbind, b"1:0:0:0")
    await lab.helped.write(unbind, b"1:0:0:0")
    assert [lun.driver for lun in lab.kernel.sysfs.luns("host1")] == [None]


async def test_who_has_not_said_who_it_is_gets_nothing(lab: Lab) -> None:
    answer = await lab.helper.answer(Client(None, Share()), b'{"reset": "1:0:0:0", "level": 257}')
    assert answer == {"ok": False, "errno": errno.EPERM, "error": "expected the adapter's name first"}


async def test_a_vport_that_cannot_be_named_is_deleted_by_a_restarted_helper(lab: Lab) -> None:
    await lab.helped.write(lab.path("class/fc_host/host0/vport_create"), NAMES.encode())
    again = Helper(lab.kernel, lab.socket.parent / "etc", lab.socket.parent / "notes", log=LOG)
    request = b'{"write": "class/fc_host/host0/vport_delete", "data": "%s"}' % NAMES.encode()
    assert (await again.answer(Client(None, Share(), "vm1"), request))["ok"] is True
    assert list(lab.kernel.sysfs.vports()) == []


# ---------------------------------------------------------------- one adapter's trouble


@dataclass
class SlowResets:
    """A unit whose resets take until they are let go."""

    lab: Lab
    go: trio.Event = field(default_factory=trio.Event)
    at_once: int = 0
    most: int = 0

    async def reset(self, lun: Lun, level: int) -> None:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await self.go.wait()
        self.at_once -= 1
        self.lab.kernel.resets.append((lun.hctl, level))


async def test_a_flood_of_resets_keeps_nobody_else(
    lab: Lab, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = await settled(lab)
    slow = SlowResets(lab)
    monkeypatch.setattr(lab.kernel, "reset", slow.reset)
    (lun,) = lab.kernel.sysfs.luns(name)
    async with trio.open_nursery() as flood:
        for _ in range(100):
            flood.start_soon(lab.helped.reset, lun, 0x101)
        await until(lambda: slow.at_once)
        with trio.fail_after(5):
            await lab.other().write(lab.path("class/fc_host/host0/vport_create"), STRANGER.encode())
            await lab.helped.write(lab.path("class/fc_remote_ports/rport-1:0-0/dev_loss_tmo"), b"30")
        slow.go.set()
    assert (slow.most, len(lab.kernel.resets)) == (1, 100), "a unit is reset by one at a time"


async def test_who_opens_too_many_connections_is_told(lab: Lab) -> None:
    lab.in_a_unit("/system.slice/vhostfc@vm2.service")
    streams = [await trio.open_unix_socket(str(lab.socket)) for _ in range(CONNECTIONS + 1)]
    with trio.fail_after(5):
        assert b"the helper is busy with this adapter" in await streams[-1].receive_some(1000)
    for stream in streams:
        await stream.aclose()


async def test_an_adapter_that_is_killed_with_unread_hints_ends_nothing(lab: Lab) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(lab.socket))
    sock.sendall(b'{"watch": true}\n')
    await until(lambda: lab.kernel._listeners)
    lab.kernel._tell(Uevent("add", "/x", "scsi"))
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(sock)
    sock.close()
    while lab.kernel._listeners:
        await trio.sleep(0.01)
    assert await lab.helped.write(lab.path("class/fc_host/host0/vport_create"), NAMES.encode()) == 33


async def test_what_goes_wrong_with_one_client_ends_that_one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(path: Path, data: bytes) -> int:
        raise RuntimeError("a bug of ours")

    with monkeypatch.context() as patch:
        patch.setattr(lab.kernel, "write", broken)
        with pytest.raises(OSError, match=r"the helper left in the middle of a request"):
            await lab.helped.write(lab.path("class/fc_host/host0/vport_create"), NAMES.encode())
    assert await lab.helped.write(lab.path("class/fc_host/host0/vport_create"), NAMES.encode()) == 33


async def test_no_descriptors_left_is_not_the_end(tmp_path: Path, nursery: trio.Nursery) -> None:
    listener = listening_socket(tmp_path / "h.sock", None)
    whole, failures = listener.accept, [errno.EMFILE, errno.ECONNABORTED]

    class Starved:
        """The listener; its first connections find no descriptor."""

        def __enter__(self) -> Starved:
            listener.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            listener.close()

        async def accept(self) -> tuple[trio.socket.SocketType, object]:
            if failures:
                code = failures.pop()
                raise OSError(code, os.strerror(code))
            return await whole()

    serve = partial(run_helper, Starved(), FakeKernel(tmp_path, nursery), etc=tmp_path, notes=tmp_path)  # type: ignore[arg-type]  # a fake
    await nursery.start(partial(serve, users={os.getuid()}, log=LOG))
    with trio.fail_after(5):
        async with await trio.open_unix_socket(str(tmp_path / "h.sock")) as stream:
            await stream.send_all(b"{}\n")
            assert b"expected adapter" in await stream.receive_some(1000)


# ---------------------------------------------------------------- lines, hints, the socket


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"7", b'{"write": 7}', b"[" * 100_000, b'{"nonsense": true}'])
async def test_nonsense_is_answered(lab: Lab, line: bytes) -> None:
    assert (await lab.answer(line))["ok"] is False


async def test_who_sends_too_much_is_left(lab: Lab) -> None:
    stream = await trio.open_unix_socket(str(lab.socket))
    async with stream:
        await stream.send_all(bytes(6000))
        assert await stream.receive_some(10) == b""


async def test_a_vport_in_the_making_is_waited_for_by_who_is_stopped(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, begun, stopped = lab.kernel.write, trio.Event(), trio.Event()

    async def slow(path: Path, data: bytes) -> int:
        begun.set()
        await stopped.wait()
        return await whole(path, data)

    monkeypatch.setattr(lab.kernel, "write", slow)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lab.helped.write, lab.path("class/fc_host/host0/vport_create"), NAMES.encode())
            await begun.wait()
            scope.cancel()
            stopped.set()
    assert lab.kernel.sysfs.vport_of(ME.wwpn) is not None, "and now its maker knows, and takes it away"


async def test_hints_are_passed_on(lab: Lab) -> None:
    async with lab.helped.hints() as hints:
        await until(lambda: lab.kernel._listeners)
        await settled(lab)
        seen: list[Hint] = []
        with trio.fail_after(5):
            while not any(isinstance(hint, FcEvent) for hint in seen) or not any(
                isinstance(hint, Uevent) and hint.subsystem == "scsi_generic" for hint in seen
            ):
                seen.append(await hints.receive())
        lab.kernel.attention(lab.kernel.targets[0], "CAPACITY_DATA_HAS_CHANGED", 0)
        with trio.fail_after(5):
            while not (isinstance(hint := await hints.receive(), Uevent) and hint.action == "change"):
                pass
        assert hint.properties["SDEV_UA"] == "CAPACITY_DATA_HAS_CHANGED"


async def test_a_helper_that_is_away_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"helper\.sock.*vhostfc-helper\.socket"):
        await HelpedKernel(tmp_path / "helper.sock", "vm1").write(Path("/sys/x"), b"1")


async def test_others_are_not_answered(tmp_path: Path, nursery: trio.Nursery) -> None:
    if os.getuid() == 0:
        pytest.skip("root is always answered")
    listener = listening_socket(tmp_path / "h.sock", None)
    kernel = FakeKernel(tmp_path, nursery)
    await nursery.start(partial(run_helper, listener, kernel, etc=tmp_path, notes=tmp_path, users={12345}, log=LOG))
    stream = await trio.open_unix_socket(str(tmp_path / "h.sock"))
    async with stream:
        assert await stream.receive_some(10) == b""


def test_the_socket_is_for_its_group(tmp_path: Path) -> None:
    with listening_socket(tmp_path / "h.sock", os.getgid()):
        assert (tmp_path / "h.sock").stat().st_mode & 0o777 == 0o660
    with listening_socket(tmp_path / "own/h.sock", None):
        assert (tmp_path / "own").stat().st_mode & 0o777 == 0o755
    with pytest.raises(VhostfcError, match=r"nowhere/at/all/h\.sock"):
        listening_socket(tmp_path / "nowhere/at/all/h.sock", None)


@pytest.mark.parametrize("whose", ["another user's", "open to all"])
def test_the_socket_is_in_a_directory_that_others_cannot_change(tmp_path: Path, whose: str) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    if whose == "another user's":
        if os.getuid():
            pytest.skip("only root can give a directory away")
        os.chown(directory, 65534, 65534)
    else:
        directory.chmod(0o777)
    (directory / "h.sock").symlink_to(tmp_path / "victim")
    with pytest.raises(VhostfcError, match=r"others may write to its directory"):
        listening_socket(directory / "h.sock", None)
    assert (directory / "h.sock").is_symlink()
    directory.chmod(0o1777)
    if whose == "open to all":
        with listening_socket(directory / "h.sock", None):
            assert (directory / "h.sock").is_socket()
