"""A kernel's own target on the fabric: LIO's tcm_fc in one guest, reached by a vport of another and by an adapter.

The switch carries frames between N_Ports that it knows nothing else of.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.lab.fcoe import FcoeGuest, attachment, netdev, wwpn_of
from tests.lab.san import San, wwpn

pytestmark = pytest.mark.guest

INITIATOR, LIO = 1, 2
VPORT, ADAPTER = 5, 6
LIO_TARGET = r"""
set -e
modprobe target_core_mod; modprobe tcm_fc
mount -t configfs none /sys/kernel/config 2>/dev/null || true
cd /sys/kernel/config/target
mkdir -p core/rd_mcp_0/disk; echo rd_pages=8192 >core/rd_mcp_0/disk/control; echo 1 >core/rd_mcp_0/disk/enable
mkdir -p fc/{port}/tpgt_1/lun/lun_0
ln -s $PWD/core/rd_mcp_0/disk fc/{port}/tpgt_1/lun/lun_0/disk
for initiator in {initiators}; do
    mkdir -p fc/{port}/tpgt_1/acls/$initiator/lun_0
    ln -s $PWD/fc/{port}/tpgt_1/lun/lun_0 fc/{port}/tpgt_1/acls/$initiator/lun_0/lun
done
"""


@pytest.fixture(scope="module")
def san(tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    network = San(tmp_path_factory.mktemp("san"), [])
    network.extra = attachment(network)
    with network:
        yield network


@pytest.fixture(scope="module")
def target(san: San, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FcoeGuest]:
    with FcoeGuest(netdev(san, LIO), workdir=tmp_path_factory.mktemp("lio"), memory="512M") as machine:
        script = LIO_TARGET.replace("{port}", wwpn_of(LIO))
        machine.check(script.replace("{initiators}", f"{wwpn(VPORT)} {wwpn(ADAPTER)}"))
        machine.online()
        yield machine


@pytest.fixture(scope="module")
def guest(san: San, target: FcoeGuest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FcoeGuest]:
    with FcoeGuest(netdev(san, INITIATOR), workdir=tmp_path_factory.mktemp("vm"), memory="512M") as machine:
        yield machine


def test_a_vport_reaches_it_by_its_own_name(guest: FcoeGuest) -> None:
    host = guest.online()
    vport = guest.host_of(guest.create_vport(host, wwpn(VPORT)))
    number = vport.removeprefix("host")
    guest.wait(f"ls -d /sys/class/scsi_disk/{number}:*:0")
    name = guest.luns(vport)[0]
    assert "LIO-ORG" in guest.check(f"sg_inq /dev/{name}")
    guest.check(
        f"fio --name=v --filename=/dev/{name} --rw=randrw --bs=16k --size=8m --direct=1 --verify=crc32c"
        " --ioengine=libaio --iodepth=4 --minimal"
    )
    assert guest.luns(host) == {}, "LIO knows the vport, not the port under it"


def test_an_adapter_reaches_it_too(san: San, target: FcoeGuest) -> None:
    """Every command goes as frames: such a target has no fast path to offer."""
    san.start_adapter(ADAPTER)
    san.wait_for(lambda: any(one["luns"] == [0] for one in san.status(ADAPTER)["targets"]), timeout=60)
    probe = [sys.executable, "-m", "vhostfc", "probe", str(san.socket(ADAPTER)), "--json"]
    (unit,) = json.loads(subprocess.run(probe, capture_output=True, check=True).stdout)["units"]
    assert (unit["vendor"], unit["blocks"] * unit["block_size"]) == ("LIO-ORG", 8192 * 4096)
    where = f"{unit['target']}:{unit['lun']}"
    for kind in ("randwrite", "randread"):
        bench = [sys.executable, "-m", "vhostfc", "bench", str(san.socket(ADAPTER)), "--unit", where, "--rw", kind]
        bench += ["--bs", "4k", "--iodepth", "1", "--seconds", "1", "--runs", "1", "--warmup", "0", "--json"]
        result = json.loads(subprocess.run(bench, capture_output=True, check=True).stdout)
        assert result["errors"] == 0
        assert result["iops"] > 0
