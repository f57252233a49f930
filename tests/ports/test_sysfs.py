"""What is read from a tree like /sys."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.fakes.array import FakeTarget, FakeUnit
from tests.fakes.kernel import FABRIC_NAME, FakeKernel
from tests.ports.contract import ME
from vhostfc.fc.wwn import Wwn
from vhostfc.ports.sysfs import Sysfs, scsi_lun

ARRAY = Wwn(0x0006_0160_0000_0001)  # with zeros in front, which the kernel does not print


@pytest.fixture
async def kernel(tmp_path: Path, nursery: trio.Nursery) -> FakeKernel:
    units = {number: FakeUnit(bytearray(4096), b"unit %d" % number, queue_depth=7) for number in (0, 3, 12)}
    fake = FakeKernel(tmp_path, nursery, FakeTarget(ARRAY, 0x01FE01, units), hosts=2)
    fake.make_vport(fake.hosts["host1"], ME.wwpn, ME.wwnn, "vhostfc vm1")
    while len(fake.nodes) < 3:
        await trio.sleep(0.01)
    return fake


async def test_hosts_and_who_makes_vports(kernel: FakeKernel) -> None:
    hosts = {host.name: host for host in kernel.sysfs.hosts()}
    assert hosts.keys() == {"host0", "host1", "host2"}
    assert (hosts["host1"].max_vports, hosts["host1"].vports_in_use) == (255, 1)
    assert hosts["host1"].fabric_name == FABRIC_NAME
    assert hosts["host2"].vport_create is None
    assert hosts["host2"].wwpn == ME.wwpn


async def test_a_vport_is_found_by_its_name_as_a_number(kernel: FakeKernel) -> None:
    vport = kernel.sysfs.vport_of(ME.wwpn)
    assert vport is not None
    assert (vport.name, vport.parent, vport.host, vport.state) == ("vport-1:0-0", "host1", "host2", "Active")
    assert vport.symbolic_name == "vhostfc vm1"
    assert kernel.sysfs.vport_of(Wwn(1)) is None


async def test_remote_ports_and_units_in_the_order_of_their_numbers(kernel: FakeKernel) -> None:
    (rport,) = kernel.sysfs.rports("host2")
    assert (rport.wwpn, rport.port_id, rport.state, rport.target) == (ARRAY, 0x01FE01, "Online", 0)
    assert list(kernel.sysfs.rports("host1")) == []
    luns = list(kernel.sysfs.luns("host2"))
    assert [lun.hctl for lun in luns] == ["2:0:0:0", "2:0:0:3", "2:0:0:12"]
    assert luns[1].lun == b"\0\3" + bytes(6)
    assert luns[1].sg is not None
    assert (luns[1].queue_depth, luns[1].type, luns[1].driver) == (7, 0, None)
    assert b"unit 3" in luns[1].disk


async def test_host_2_is_not_host_20(kernel: FakeKernel) -> None:
    assert list(kernel.sysfs.luns("host20")) == []
    assert list(kernel.sysfs.rports("host")) == []


def test_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    nothing = Sysfs(tmp_path)
    assert not list(nothing.hosts())
    assert not list(nothing.vports())
    assert nothing.host("host0") is None
    assert nothing.lun("0:0:0:0") is None
    assert nothing.autoprobe() is None


@pytest.mark.parametrize(
    ("number", "lun"),
    [
        (0, "0000000000000000"),
        (255, "00ff000000000000"),
        (16640, "4100000000000000"),
        (0x0001_0002, "0002000100000000"),
    ],
)
def test_a_lun_as_linux_prints_it(number: int, lun: str) -> None:
    assert scsi_lun(number).hex() == lun
