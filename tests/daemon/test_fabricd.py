"""The fabric as a daemon: adapters in this process, over its socket."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Sized
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import structlog
import trio

from tests.daemon.linkadapter import LinkAdapter, attach, read_10, write_10, wwpn
from tests.waiting import until
from vhostfc.config import FabricConfig, load_fabric
from vhostfc.daemon.control import call
from vhostfc.daemon.fabricd import Fabric, run_fabric
from vhostfc.daemon.fdsocket import LinkSocket, connect
from vhostfc.daemon.fencing import OURS
from vhostfc.daemon.notify import Notifier, PassedFd
from vhostfc.errors import ConfigError, VhostfcError
from vhostfc.fabric import link
from vhostfc.fabric.link import Hello, MediumKind
from vhostfc.fc.nport import LocalState
from vhostfc.native import LATCH_WORDS, Latch

LOG = structlog.get_logger()
TARGET = """
[[target]]
name = "array-a"
wwpn = "50:06:01:60:00:00:00:01"
wwnn = "50:06:01:60:00:00:00:00"
"""
UNIT = """
[[target.unit]]
lun = 0
size = "1MiB"
"""


def config(tmp_path: Path, text: str) -> FabricConfig:
    path = tmp_path / "fabric.toml"
    path.write_text(f'state = "{tmp_path}/state"\n[fabric]\nsocket = "{tmp_path}/f.sock"\nfence_timeout = 0.3\n' + text)
    return load_fabric(path)


@asynccontextmanager
async def fabric(tmp_path: Path, text: str = TARGET + UNIT) -> AsyncIterator[tuple[Fabric, trio.Nursery]]:
    """A running fabric, and a nursery for adapters."""
    served = Fabric(config(tmp_path, text), log=LOG)
    async with trio.open_nursery() as nursery:
        await nursery.start(served.serve)
        yield served, nursery
        nursery.cancel_scope.cancel()


async def join(nursery: trio.Nursery, tmp_path: Path, number: int) -> LinkAdapter:
    return await (await attach(nursery, tmp_path / "f.sock", number)).ready()


async def started(nursery: trio.Nursery, tmp_path: Path, *numbers: int) -> list[LinkAdapter]:
    """Adapters that have been told of the power on."""
    adapters = [await join(nursery, tmp_path, number) for number in numbers]
    for one in adapters:
        await one.command(bytes(6))
    return adapters


async def test_an_adapter_logs_in_and_does_its_io_in_frames(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        assert one.seen[0] == Hello("fabric")
        assert (await one.command(bytes(6))).status == 2, "the power-on unit attention"
        data = os.urandom(300 * 512)
        assert (await one.command(write_10(5, 300), data_out=data)).status == 0
        result = await one.command(read_10(5, 300), data_in=300 * 512)
        assert (result.status, result.data_in) == (0, data)
        assert [login["wwpn"] for login in san.status()["logins"]] == [str(wwpn(1))]


async def test_an_adapter_is_given_the_medium_and_what_it_may_do(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        one = await join(nursery, tmp_path, 1)
        route = await one.open(ready=False)
        assert (route.medium, route.mask) == (MediumKind.NONE, bytes(32)), "a unit attention is pending"
        route = await one.open()
        assert (route.medium, route.block_size, route.blocks) == (MediumKind.MEMORY, 512, 2048)
        assert route.owner > 1
        await one.command(write_10(7, 1), data_out=b"\x5a" * 512)
        assert os.pread(one.fds[route.nexus][0], 512, 7 * 512) == b"\x5a" * 512


# ---------------------------------------------------------------- who is who


async def test_a_name_in_use_is_refused_with_a_sentence_about_who_has_it(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        await join(nursery, tmp_path, 1)
        thief = await attach(nursery, tmp_path / "f.sock", 1, name="thief")
        await thief.until(lambda: thief.refusals)
        assert len(thief.notes) == 1
        assert f"{wwpn(1)} is already logged in, by 'vm1' since 20" in thief.notes[0]
        assert [login["adapter"] for login in san.status()["logins"]] == ["vm1"]


async def test_a_link_that_ends_is_a_logout_and_the_name_returns_to_its_id(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        port_id = one.port.port_id
        one.close()
        await until(lambda: not san.status()["logins"])
        assert (await join(nursery, tmp_path, 1)).port.port_id == port_id


@pytest.mark.parametrize(
    "packets",
    [
        [link.encode(link.Frame(bytes(24)))],
        [link.encode(Hello("x", version=99))],
        [b"\xff"],
        [link.encode(Hello("x")), b"\xff\x01"],
        [link.encode(Hello("x")), link.encode(link.Note("hello"))],
        [link.encode(Hello("x")), link.encode(link.Open(OURS, 1, 2, bytes(8)))],
        [link.encode(Hello("x")), bytes(5000)],
    ],
)
async def test_who_does_not_speak_the_protocol_loses_the_link_and_others_do_not(
    tmp_path: Path, packets: list[bytes]
) -> None:
    async with fabric(tmp_path) as (_, nursery):
        with LinkSocket(await connect(tmp_path / "f.sock", socket.SOCK_SEQPACKET)) as stranger:
            for packet in packets:
                await stranger.send(packet)
            with trio.fail_after(5):
                while (await stranger.receive())[0]:
                    pass
        assert (await (await join(nursery, tmp_path, 1)).command(bytes(6))).status == 2


async def test_descriptors_from_an_adapter_are_refused_and_closed(tmp_path: Path) -> None:
    async with fabric(tmp_path):
        with LinkSocket(await connect(tmp_path / "f.sock", socket.SOCK_SEQPACKET)) as stranger:
            await stranger.send(link.encode(Hello("x")))
            await stranger.receive()
            read, write = os.pipe()
            await stranger.send(link.encode(link.RouteAck(1)), [write])
            os.close(write)
            with trio.fail_after(5):
                assert await stranger.receive() == (b"", [])
            assert os.read(read, 1) == b"", "nobody has the other end"
            os.close(read)


async def test_the_socket_is_removed_at_the_end_and_a_second_fabric_is_told(tmp_path: Path) -> None:
    async with fabric(tmp_path):
        second = Fabric(config(tmp_path, TARGET + UNIT), log=LOG)
        with pytest.raises(VhostfcError, match=r"f\.sock: .* listens there already"):
            await second.serve()
    assert not (tmp_path / "f.sock").exists()
    assert not (tmp_path / "f.control").exists()


# ---------------------------------------------------------------- zones, masks, changes


async def report(adapter: LinkAdapter) -> list[int]:
    data = (await adapter.command(bytes([0xA0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0]), data_in=1024)).data_in
    return [data[at + 1] for at in range(8, len(data), 8)]


def unit(lun: int, more: str = "", size: str = "1MiB") -> str:
    return f'\n[[target.unit]]\nlun = {lun}\nsize = "{size}"\n{more}\n'


async def test_zones_and_masks_decide_who_sees_what(tmp_path: Path) -> None:
    zones = f'[[zone]]\nname = "z"\nmembers = ["{wwpn(1)}", "{wwpn(2)}", "50:06:01:60:00:00:00:01"]\n'
    async with fabric(tmp_path, TARGET + unit(0) + unit(1, f'allow = ["{wwpn(2)}"]') + zones) as (_, nursery):
        assert await report(await join(nursery, tmp_path, 1)) == [0]
        assert await report(await join(nursery, tmp_path, 2)) == [0, 1]
        outsider = await attach(nursery, tmp_path / "f.sock", 3)
        await outsider.until(lambda: outsider.port.state is LocalState.READY)
        assert outsider.port.remotes == {}


async def test_a_unit_is_added_and_taken_away_while_initiators_look_on(tmp_path: Path) -> None:
    async with fabric(tmp_path, TARGET + unit(0)) as (san, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        before = one.topology
        await san.reload(config(tmp_path, TARGET + unit(0) + unit(5, f'allow = ["{wwpn(1)}"]')))
        await one.until(lambda: one.topology > before)
        result = await one.command(bytes(6))
        assert result.sense[12:14] == b"\x3f\x0e", "REPORTED LUNS DATA HAS CHANGED"
        assert await report(one) == [0, 5]
        assert (await two.command(bytes(6))).status == 0, "nothing changed for those who do not see it"
        await one.open(5)
        await san.reload(config(tmp_path, TARGET + unit(0)))
        assert await report(one) == [0]
        assert (await one.command(bytes(6), lun=5)).sense[12:14] == b"\x25\x00"
        assert one.routes[max(one.routes)].gone


async def test_a_unit_that_grows_says_so_and_keeps_what_it_holds(tmp_path: Path) -> None:
    async with fabric(tmp_path, TARGET + unit(0)) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        route = await one.open()
        await one.command(write_10(0, 1), data_out=b"\x77" * 512)
        await san.reload(config(tmp_path, TARGET + unit(0, size="3MiB")))
        assert one.routes[route.nexus].blocks == 3 * 2048
        assert (await one.command(bytes(6))).sense[12:14] == b"\x2a\x09"
        assert (await one.command(write_10(6143, 1), data_out=bytes(512))).status == 0
        assert (await one.command(read_10(0, 1), data_in=512)).data_in == b"\x77" * 512
        await one.until(lambda: any(one.routes[route.nexus].mask))
        with pytest.raises(ConfigError, match=r"fabric\.toml:\d+: size: cannot shrink"):
            await san.reload(config(tmp_path, TARGET + unit(0, size="2MiB")))
        assert san.status()["targets"][0]["units"][0]["blocks"] == 3 * 2048


async def test_write_protection_comes_and_goes(tmp_path: Path) -> None:
    async with fabric(tmp_path, TARGET + unit(0)) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        route = await one.open()
        naa = san.status()["targets"][0]["units"][0]["naa"]
        await san.reload(config(tmp_path, TARGET + unit(0, "read_only = true")))
        assert one.routes[route.nexus].read_only
        assert (await one.command(bytes(6))).status == 2
        assert (await one.command(write_10(0, 1), data_out=bytes(512))).sense[2] & 0xF == 7
        await one.until(lambda: any(one.routes[route.nexus].mask))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(one.fds[route.nexus][0], b"x", 0)
        await san.reload(config(tmp_path, TARGET + unit(0)))
        assert (await one.command(bytes(6))).status == 2
        assert (await one.command(write_10(0, 1), data_out=bytes(512))).status == 0
        assert san.status()["targets"][0]["units"][0]["naa"] == naa


async def test_mode_pages_stay_when_write_protection_comes_and_goes(tmp_path: Path) -> None:
    """A guest that has turned the cache off sends no flushes any more; one that has set SWP relies on it."""
    text = TARGET + f'[[target.unit]]\nlun = 0\nfile = "{tmp_path}/disk"\nsize = "1MiB"\n'
    caching = bytes.fromhex("0812 0000 ffff 0000 ffff ffff 00 00 0000 00 000000")
    control = bytes.fromhex("0a0a 0210 0840 0000 ffff 0000")
    async with fabric(tmp_path, text) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        await one.command(bytes(6))
        pages = bytes(4) + caching + control
        assert (await one.command(bytes([0x15, 0x10, 0, 0, len(pages), 0]), data_out=pages)).status == 0
        for more in ("read_only = true\n", ""):
            await san.reload(config(tmp_path, text + more))
            assert (await one.command(bytes(6))).status == 2
            for code, page in ((8, caching), (0xA, control)):
                found = await one.command(bytes([0x1A, 0x08, code, 0, 255, 0]), data_in=255)
                assert found.data_in[4:] == bytes([0x80 | code]) + page[1:], "with PS"
        assert (await one.command(write_10(0, 1), data_out=bytes(512))).sense[2] & 0xF == 7


async def test_zones_that_part_end_the_login_and_zones_that_join_bring_it_back(tmp_path: Path) -> None:
    apart = f'[[zone]]\nname = "z"\nmembers = ["{wwpn(9)}"]\n'
    async with fabric(tmp_path, TARGET + unit(0)) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        route = await one.open()
        await san.reload(config(tmp_path, TARGET + unit(0) + apart))
        assert one.routes[route.nexus].gone
        await one.until(lambda: not any(r.logged_in for r in one.port.remotes.values()))
        await san.reload(config(tmp_path, TARGET + unit(0)))
        await one.ready()
        assert (await one.command(bytes(6))).sense[12:14] == b"\x29\x07", "I_T NEXUS LOSS OCCURRED"


async def test_targets_come_and_go(tmp_path: Path) -> None:
    second = TARGET.replace("array-a", "array-b").replace(':01"', ':11"')
    async with fabric(tmp_path, TARGET + unit(0)) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        await san.reload(config(tmp_path, TARGET + unit(0) + second + unit(0)))
        await one.until(lambda: len([r for r in one.port.remotes.values() if r.logged_in]) == 2)
        await san.reload(config(tmp_path, TARGET + unit(0)))
        await one.until(lambda: len([r for r in one.port.remotes.values() if r.logged_in]) == 1)
        assert len(san.status()["targets"]) == 1


async def test_one_file_behind_two_targets_is_one_unit_with_two_ports(tmp_path: Path) -> None:
    disk = f'\n[[target.unit]]\nlun = 0\nfile = "{tmp_path}/d.img"\nsize = "1MiB"\n'
    second = TARGET.replace("array-a", "array-b").replace(':01"', ':11"')
    async with fabric(tmp_path, TARGET + disk + second + disk) as (san, nursery):
        a, b = (target["units"][0] for target in san.status()["targets"])
        assert a["naa"] == b["naa"]
        one = await join(nursery, tmp_path, 1)
        inquiry = (await one.command(bytes([0x12, 0, 0, 0, 96, 0]), data_in=96)).data_in
        assert inquiry[6] & 0x10, "MULTIP"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TARGET + unit(0, "block_size = 4096"), "block_size"),
        (TARGET + unit(0) + '\n[[target.unit]]\nlun = 1\nfile = "/nonexistent/disk"\n', "/nonexistent/disk: No such"),
        (
            TARGET + unit(0).replace('size = "1MiB"', 'null = true\nsize = "1MiB"'),
            "lun: 0 of 'array-a' is another unit",
        ),
        (TARGET.replace("50:06:01:60:00:00:00:01", str(wwpn(1))) + unit(0), "is logged in, by 'vm1'"),
    ],
)
async def test_a_configuration_that_cannot_be_changes_nothing(tmp_path: Path, text: str, message: str) -> None:
    async with fabric(tmp_path, TARGET + unit(0)) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        await one.open()
        before, fds = san.status(), len(os.listdir("/proc/self/fd"))
        with pytest.raises(VhostfcError, match=message):
            await san.reload(config(tmp_path, text))
        assert san.status() == before
        assert len(os.listdir("/proc/self/fd")) == fds
        assert (await one.command(bytes(6))).status == 0


async def test_what_cannot_change_in_a_running_fabric(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, _):
        other = dataclasses.replace(san.config, socket=tmp_path / "other.sock")
        with pytest.raises(ConfigError, match="socket: cannot change while the fabric runs"):
            await san.reload(other)


async def test_the_control_socket_tells_and_reloads(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        await join(nursery, tmp_path, 1)
        control = tmp_path / "f.control"
        status = await call(control, "status")
        assert status == san.status()
        config(tmp_path, TARGET + UNIT + unit(3))
        assert await call(control, "reload") == {}
        assert [one["lun"] for one in san.status()["targets"][0]["units"]] == [0, 3]
        (tmp_path / "fabric.toml").write_text("[fabric]\nnonsense = 1\n")
        with pytest.raises(VhostfcError, match="nonsense"):
            await call(control, "reload")
        assert [one["lun"] for one in san.status()["targets"][0]["units"]] == [0, 3]


async def test_a_hangup_reloads_the_file(tmp_path: Path) -> None:
    settings = config(tmp_path, TARGET + unit(0))
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(run_fabric, settings, log=LOG))
        config(tmp_path, TARGET + unit(0) + unit(1))
        os.kill(os.getpid(), signal.SIGHUP)
        control = tmp_path / "f.control"
        with trio.fail_after(5):
            while len((await call(control, "status"))["targets"][0]["units"]) == 1:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


# ---------------------------------------------------------------- fairness


async def test_a_flood_from_one_does_not_delay_another(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        one, two = await join(nursery, tmp_path, 1), await join(nursery, tmp_path, 2)
        await two.command(bytes(6))
        statuses: list[int] = []
        inquiry = bytes([0x12, 0, 0, 0, 96, 0])

        async def flood() -> None:
            statuses.append((await one.command(inquiry, data_in=96)).status)

        async with trio.open_nursery() as flooding:
            for _ in range(600):
                flooding.start_soon(flood)
            await until(lambda: statuses)
            answered = len(statuses)
            assert (await two.command(bytes(6))).status == 0
            assert len(statuses) - answered < 300, "two did not wait for all of one's"
        assert set(statuses) <= {0, 0x28}
        assert statuses.count(0) >= 256


def _more_than(running: Sized, count: int, order: list[str]) -> bool:
    return len(running) > count or bool(order)


async def test_an_ordered_command_is_alone(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one, two = await join(nursery, tmp_path, 1), await join(nursery, tmp_path, 2)
        route = await one.open()
        await two.command(bytes(6))
        (served,) = san.placement.served.values()
        assert served.medium.latch is not None
        served.medium.latch.take(77, 0, 512)
        order: list[str] = []

        async def run(name: str, attribute: int, lba: int) -> None:
            assert (await two.command(read_10(lba, 1), data_in=512, attribute=attribute)).status == 0
            order.append(name)

        async with trio.open_nursery() as commands:
            running = san._runner._running
            for count, (name, attribute, lba) in enumerate(
                (("before", 0, 0), ("ordered", 2, 1024), ("after", 0, 1500), ("head", 1, 1600))
            ):
                commands.start_soon(run, name, attribute, lba)
                await until(partial(_more_than, running, count, order))
            await until(lambda: order == ["head"])
            served.medium.latch.recover(77)
        assert order == ["head", "before", "ordered", "after"]
        closed = [r for r in one.seen if isinstance(r, link.Route) and r.nexus == route.nexus and not any(r.mask)]
        assert len(closed) == 2, "at the beginning, and for the ordered command"
        await one.until(lambda: any(one.routes[route.nexus].mask))


# ---------------------------------------------------------------- names, and memory over a restart


async def test_a_file_keeps_its_name_and_memory_is_a_new_disk(tmp_path: Path) -> None:
    disk = f'\n[[target.unit]]\nlun = 1\nfile = "{tmp_path}/d.img"\nsize = "1MiB"\n'
    seen = []
    for moved in (disk, disk.replace("lun = 1", "lun = 2")):
        async with fabric(tmp_path, TARGET + unit(0) + moved) as (san, _):
            seen.append([one["naa"] for one in san.status()["targets"][0]["units"]])
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] == seen[1][1]
    assert all(naa.startswith("6001a4a") and len(naa) == 32 for naas in seen for naa in naas)


class Manager:
    """systemd's file descriptor store, as far as we use it (sd_pid_notify_with_fds(3))."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store: dict[str, int] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def passed(self) -> list[PassedFd]:
        """What a service that starts now is given."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, 4096, 8)
            except BlockingIOError:
                return [PassedFd(name, os.dup(fd)) for name, fd in self.store.items()]
            said = dict(line.split("=", 1) for line in data.decode().splitlines())
            if "FDSTORE" in said:
                (self.store[said["FDNAME"]],) = fds
            elif "FDSTOREREMOVE" in said:
                os.close(self.store.pop(said["FDNAME"]))

    def close(self) -> None:
        for fd in self.store.values():
            os.close(fd)
        self._socket.close()


@asynccontextmanager
async def life(tmp_path: Path, manager: Manager, text: str) -> AsyncIterator[tuple[Fabric, trio.Nursery]]:
    """A fabric as a service: one life of it."""
    served = Fabric(config(tmp_path, text), log=LOG, notifier=Notifier(str(manager.path)), passed=manager.passed())
    async with trio.open_nursery() as nursery:
        await nursery.start(served.serve)
        yield served, nursery
        nursery.cancel_scope.cancel()


async def test_memory_survives_a_restart_in_systemd_s_store(tmp_path: Path) -> None:
    manager = Manager(tmp_path / "notify")
    names = []
    for text in (unit(0), unit(0), unit(0, size="2MiB")):
        async with life(tmp_path, manager, TARGET + text) as (san, nursery):
            names.append(san.status()["targets"][0]["units"][0]["naa"])
            (one,) = await started(nursery, tmp_path, 1)
            if len(names) == 1:
                await one.command(write_10(3, 1), data_out=b"\x42" * 512)
            assert (await one.command(read_10(3, 1), data_in=512)).data_in == b"\x42" * 512
    assert len(set(names)) == 1
    async with life(tmp_path, manager, TARGET + unit(0)) as (san, _):
        assert san.status()["targets"][0]["units"][0]["naa"] not in names, "smaller: it cannot be the same disk"
    async with life(tmp_path, manager, TARGET + unit(1)) as (san, _):
        await san.reload(config(tmp_path, TARGET))
    manager.passed()
    assert manager.store == {}, "what is not configured any more is not kept"
    manager.close()


async def test_what_adapters_left_behind_while_there_was_no_fabric_is_dealt_with(tmp_path: Path) -> None:
    """Killed in the middle of a block, with its latch in hand: the latch is kept like the memory, and tells."""
    manager = Manager(tmp_path / "notify")
    async with life(tmp_path, manager, TARGET + unit(0)) as (san, _):
        (served,) = san.placement.served.values()
        with Latch(served.medium.latch_fd) as latch:
            assert latch.take(5, 0, 512) is None
        places, data = 4 * LATCH_WORDS, 4 * LATCH_WORDS + 512 * 64  # latch.h
        os.pwrite(served.medium.latch_fd, struct.pack("=QQ", 5 << 32 | 1, 3 << 8 | 1), places)
        os.pwrite(served.medium.latch_fd, b"N" * 512, data)
        os.pwrite(served.medium.fd, b"N" * 100, 3 * 512)
    async with life(tmp_path, manager, TARGET + unit(0)) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        assert (await one.command(read_10(3, 2), data_in=1024)).data_in == b"N" * 512 + bytes(512)
    manager.close()
