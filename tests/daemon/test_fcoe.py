"""FCoE attachments of a running fabric: ENodes on datagram sockets and on a network interface."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.daemon.test_fabricd import TARGET, UNIT, config, fabric
from tests.fabric.enode import Enode
from vhostfc.daemon.control import call
from vhostfc.daemon.fabricd import Fabric
from vhostfc.errors import ConfigError, VhostfcError
from vhostfc.fc.els import Els
from vhostfc.fc.wwn import Wwn


def wwpn(number: int) -> Wwn:
    return Wwn(0x2000_5254_0000_0000 + number)


class Wired:
    """An Enode on a socket: a datagram or a packet is an Ethernet frame."""

    def __init__(self, enode: Enode, sock: trio.socket.SocketType, to: str | None) -> None:
        self.enode = enode
        self._sock = sock
        self._to = to

    async def pump(self, until: Callable[[], object]) -> None:
        """Send what it wants to, and take what comes, until the condition holds."""
        with trio.fail_after(10):
            while True:
                while self.enode.out:
                    data = self.enode.out.pop(0)
                    await (self._sock.sendto(data, self._to) if self._to else self._sock.send(data))
                if until():
                    return
                self.enode.receive(await self._sock.recv(4096))

    async def login(self, name: Wwn) -> int:
        """Find the FCF and log in; the N_Port_ID."""
        enode = self.enode
        enode.solicit()
        await self.pump(lambda: enode.fcf)
        enode.login(name)
        await self.pump(lambda: enode.ports or enode.rejected)
        return next(iter(enode.ports), 0)


@contextlib.asynccontextmanager
async def station(directory: Path, number: int, to: Path) -> AsyncIterator[Wired]:
    """What QEMU's -netdev dgram is: bound to a path of its own."""
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        path = directory / f"q{number}.sock"
        path.unlink(missing_ok=True)
        await sock.bind(str(path))
        yield Wired(Enode(number), sock, str(to))


def with_fcoe(tmp_path: Path, more: str = "") -> str:
    return f'{TARGET}{UNIT}[[fcoe]]\nsocket = "{tmp_path}/fcoe.sock"\n{more}'


def names(san: Fabric) -> list[str]:
    return [login["wwpn"] for login in san.status()["logins"]]


async def test_two_machines_log_in_over_one_socket(tmp_path: Path) -> None:
    async with fabric(tmp_path, with_fcoe(tmp_path)) as (san, _):
        to = tmp_path / "fcoe.sock"
        async with station(tmp_path, 1, to) as one, station(tmp_path, 2, to) as two:
            first = await one.login(wwpn(1))
            assert await two.login(wwpn(2)) not in (0, first)
            assert sorted(names(san)) == [str(wwpn(1)), str(wwpn(2))]
            (attachment,) = san.status()["fcoe"]
            assert attachment["enodes"] == ["52:54:00:00:00:01", "52:54:00:00:00:02"]
            target = int(san.status()["targets"][0]["port_id"], 16)
            one.enode.plogi(first, target)
            await one.pump(lambda: one.enode.frames)
            assert one.enode.frames[-1].payload[0] == Els.LS_ACC


async def test_a_name_that_an_adapter_has_is_refused(tmp_path: Path) -> None:
    async with fabric(tmp_path, with_fcoe(tmp_path)):
        to = tmp_path / "fcoe.sock"
        async with station(tmp_path, 1, to) as one, station(tmp_path, 2, to) as two:
            await one.login(wwpn(1))
            assert not await two.login(wwpn(1))
            assert len(two.enode.rejected) == 1


async def test_a_machine_that_is_gone_is_logged_out_and_another_takes_its_place(tmp_path: Path) -> None:
    more = "fka_adv_period = 0.5\n"
    async with fabric(tmp_path, with_fcoe(tmp_path, more)) as (san, _):
        to = tmp_path / "fcoe.sock"
        async with station(tmp_path, 1, to) as one:
            await one.login(wwpn(1))
            assert names(san)
        with trio.fail_after(5):  # the next advertisement finds nobody there
            while names(san):
                await trio.sleep(0.01)
        async with station(tmp_path, 1, to) as again:
            assert await again.login(wwpn(1))


async def test_a_machine_that_comes_back_before_it_was_missed(tmp_path: Path) -> None:
    async with fabric(tmp_path, with_fcoe(tmp_path, "fka_adv_period = 90\n")) as (san, _):
        to = tmp_path / "fcoe.sock"
        async with station(tmp_path, 1, to) as one:
            port_id = await one.login(wwpn(1))
        async with station(tmp_path, 1, to) as again:
            assert await again.login(wwpn(1)) == port_id
            assert names(san) == [str(wwpn(1))]


async def test_a_station_that_does_not_read_holds_up_nobody(tmp_path: Path) -> None:
    async with fabric(tmp_path, with_fcoe(tmp_path)) as (san, _):
        to = tmp_path / "fcoe.sock"
        async with station(tmp_path, 1, to) as deaf, station(tmp_path, 2, to) as two:
            port_id = await deaf.login(wwpn(1))
            target = int(san.status()["targets"][0]["port_id"], 16)
            for _ in range(600):
                deaf.enode.plogi(port_id, target)
            await deaf.pump(lambda: not deaf.enode.out)
            assert await two.login(wwpn(2))
            await deaf.pump(lambda: len(deaf.enode.frames) == 600)


async def test_attachments_come_and_go_with_a_reload(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, _):
        to = tmp_path / "fcoe.sock"
        await san.reload(config(tmp_path, with_fcoe(tmp_path)))
        async with station(tmp_path, 1, to) as one:
            assert await one.login(wwpn(1))
            with pytest.raises(ConfigError, match="cannot change while it is in use"):
                await san.reload(config(tmp_path, with_fcoe(tmp_path, "priority = 1\n")))
            assert names(san)
            await san.reload(config(tmp_path, TARGET + UNIT))
            with trio.fail_after(5):
                while names(san) or to.exists():
                    await trio.sleep(0.01)


async def test_a_place_that_cannot_be_had_is_named_and_changes_nothing(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, _):
        with pytest.raises(VhostfcError, match="nosuch0: no such network interface"):
            await san.reload(config(tmp_path, TARGET + UNIT + '[[fcoe]]\ninterface = "nosuch0"\n'))
        (tmp_path / "fcoe.sock").write_text("")
        with pytest.raises(VhostfcError, match=r"fcoe\.sock: something that is not a socket is in the way"):
            await san.reload(config(tmp_path, with_fcoe(tmp_path)))
        assert san.status()["fcoe"] == []


# ---------------------------------------------------------------- a network interface

_NUMBERS = itertools.count()


@pytest.fixture
def veth() -> Iterator[tuple[str, str]]:
    """Two ends of a cable."""
    number = f"{os.getpid() % 10000}-{next(_NUMBERS)}"
    ours, theirs = f"vfa{number}", f"vfb{number}"
    subprocess.run(["ip", "link", "add", ours, "type", "veth", "peer", theirs], check=True)
    try:
        for name in (ours, theirs):
            subprocess.run(["ip", "link", "set", name, "mtu", "2500", "up"], check=True)
        yield ours, theirs
    finally:
        subprocess.run(["ip", "link", "del", ours], check=False, capture_output=True)


@contextlib.asynccontextmanager
async def wired(interface: str) -> AsyncIterator[Wired]:
    with trio.socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as sock:
        await sock.bind((interface, 3))
        yield Wired(Enode(1), sock, None)


@pytest.mark.skipif(os.geteuid() != 0, reason="network interfaces are made by root")
async def test_an_interface(tmp_path: Path, veth: tuple[str, str]) -> None:
    ours, theirs = veth
    text = f'{TARGET}{UNIT}[[fcoe]]\ninterface = "{ours}"\n'
    async with fabric(tmp_path, text) as (san, _), wired(theirs) as one:
        port_id = await one.login(wwpn(1))
        assert one.enode.fcf is not None
        assert one.enode.fcf.hex(":") == Path(f"/sys/class/net/{ours}/address").read_text().strip()
        one.enode.plogi(port_id, int(san.status()["targets"][0]["port_id"], 16))
        await one.pump(lambda: one.enode.frames)
        # The cable is pulled: all that was logged in there is not any more; plugged in again, it works again.
        await trio.run_process(["ip", "link", "set", ours, "down"])
        with trio.fail_after(5):
            while names(san):
                await trio.sleep(0.01)
        await trio.run_process(["ip", "link", "set", ours, "up"])
        one.enode.fcf = None
        with trio.fail_after(10):
            while one.enode.fcf is None:
                one.enode.solicit()
                with trio.move_on_after(0.3):
                    await one.pump(lambda: one.enode.fcf)
        assert await one.login(wwpn(1)) == port_id


# ---------------------------------------------------------------- faults


async def order(tmp_path: Path, **order: object) -> None:
    await call(tmp_path / "f.control", "fault", order)


async def test_a_virtual_link_is_cleared_by_a_fault_in_the_words_of_fip(tmp_path: Path) -> None:
    async with (
        fabric(tmp_path, with_fcoe(tmp_path)) as (san, _),
        station(tmp_path, 1, tmp_path / "fcoe.sock") as one,
    ):
        await one.login(wwpn(1))
        one.enode.login(wwpn(2), fdisc=True)
        await one.pump(lambda: len(one.enode.ports) == 2)
        vport = {"what": "clear-virtual-link", "wwpn": str(wwpn(2))}
        await order(tmp_path, do="add", fault=[vport])
        await one.pump(lambda: one.enode.cleared)
        assert list(one.enode.ports.values()) == [wwpn(1)]
        assert names(san) == [str(wwpn(1))]
        (f_port,) = san.topology()["f_ports"]
        everything = {"what": "clear-virtual-link", "holder": f_port["holder"]}
        await order(tmp_path, do="add", fault=[everything])
        await one.pump(lambda: len(one.enode.cleared) == 2)
        assert not one.enode.ports
        assert names(san) == []
        assert await one.login(wwpn(1))


async def test_a_cable_that_is_pulled_by_a_fault_and_plugged_in_again(tmp_path: Path) -> None:
    async with (
        fabric(tmp_path, with_fcoe(tmp_path)) as (san, _),
        station(tmp_path, 1, tmp_path / "fcoe.sock") as one,
    ):
        await one.login(wwpn(1))
        await order(tmp_path, do="add", fault=[{"what": "link-down", "wwpn": str(wwpn(1)), "name": "x"}])
        await one.pump(lambda: one.enode.cleared)
        assert names(san) == []
        one.enode.fcf = None
        one.enode.solicit()
        await order(tmp_path, do="clear", names=["x"])
        assert await one.login(wwpn(1)), "it advertises itself again"
        assert names(san) == [str(wwpn(1))]
