"""dm-multipath in a guest with two adapters, to a unit behind two target ports: four paths, in two groups.

Paths go and come back, by zoning and by the state of a target port group, under verified I/O: no error reaches it.
mpathpersist registers and reserves through all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.guest import cluster
from tests.guest.test_sg3_utils import TwoPorts
from tests.lab.guest import Guest, vhost_user_scsi
from tests.lab.san import UnitSpec, Zone, wwpn

pytestmark = pytest.mark.guest

KEY = "0xabc123"
BOTH, ONLY_SECOND = [Zone("all", [1, 2])], [Zone("all", [2])]
CONFIGURATION = f"""
    find_multipaths no
    user_friendly_names yes
    polling_interval 1
    max_polling_interval 2
    no_path_retry 30
    path_grouping_policy group_by_prio
    failback immediate
    detect_prio yes
    prkeys_file /run/multipath/prkeys
    reservation_key {KEY}
"""


@pytest.fixture(scope="module")
def san(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoPorts]:
    directory = tmp_path_factory.mktemp("san")
    units = [UnitSpec(0, f'size = "64MiB"\nfile = "{directory}/disk"')]
    with TwoPorts(directory, units, zones=list(BOTH)) as network:
        for number in (1, 2):
            network.start_adapter(number)
        yield network


@pytest.fixture(scope="module")
def guest(san: TwoPorts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    args = [word for n in (1, 2) for word in vhost_user_scsi(san.socket(n), f"hba{n}", num_queues=2)]
    with Guest(args, workdir=tmp_path_factory.mktemp("vm"), memory="768M") as machine:
        wait_for(machine, "[ $(ls -d /sys/block/sd* | wc -l) = 4 ]")
        cluster.install(machine)
        cluster.start_udev(machine)
        cluster.start_multipathd(machine, CONFIGURATION)
        wait_for(machine, "[ -b /dev/mapper/mpatha ]")
        wait_for_paths(machine, 4)
        yield machine


def wait_for(guest: Guest, condition: str, seconds: int = 60) -> None:
    status, output = guest.run(f"for i in $(seq {seconds * 5}); do {condition} && exit 0; sleep 0.2; done; exit 1")
    assert status == 0, f"{condition}: {output}{guest.run('multipath -ll; dmesg | tail -30')[1]}"


def wait_for_paths(guest: Guest, ready: int) -> None:
    wait_for(guest, f"[ $(multipathd show paths raw format '%t %T %o' | grep -c 'active.*ready.*running') = {ready} ]")


def states(guest: Guest) -> str:
    return guest.check("multipath -ll mpatha")


def load(guest: Guest, seconds: int) -> str:
    return (
        f"fio --name=m --filename=/dev/mapper/mpatha --size=16m --rw=randwrite --bs=4k --verify=crc32c "
        f"--verify_fatal=1 --do_verify=1 --ioengine=libaio --direct=1 --iodepth=8 --time_based --runtime={seconds} "
        "--verify_backlog=512"
    )


def test_all_paths_are_one_disk_in_two_groups(guest: Guest) -> None:
    shown = states(guest)
    assert len(re.findall(r"active ready running", shown)) == 4, shown
    assert len(re.findall(r"policy=", shown)) == 1, f"all are optimized: {shown}"
    assert "VHOSTFC" in shown


def test_paths_go_and_come_back_by_zoning(guest: Guest, san: TwoPorts) -> None:
    job = guest.popen(load(guest, 15))
    wait_for(guest, "[ $(cut -d' ' -f5 /sys/block/dm-0/stat | tr -d ' ' | grep -c .) = 1 ]")
    san.zones[:] = ONLY_SECOND
    san.reload()
    wait_for(guest, "[ $(ls -d /sys/block/sd* | wc -l) = 2 ]")
    wait_for_paths(guest, 2)
    san.zones[:] = BOTH
    san.reload()
    wait_for(guest, "[ $(ls -d /sys/block/sd* | wc -l) = 4 ]")
    wait_for_paths(guest, 4)
    status, output = job.wait(180)
    assert status == 0, output
    assert "err= 0" in output, output
    assert "I/O error, dev dm" not in guest.check("dmesg"), guest.check("dmesg | tail -40")


def test_a_group_becomes_unavailable_and_comes_back(guest: Guest) -> None:
    """The array says so; the paths of the other group take over, and give back."""
    one = guest.check("for d in /sys/class/scsi_device/*:0:0:0/device/scsi_generic; do ls $d; done").split()[0]
    job = guest.popen(load(guest, 12))
    for state in ("u", "s", "an", "ao"):
        guest.check(f"sg_turs /dev/{one} >/dev/null 2>&1; sg_stpg --tp=2 --state={state} /dev/{one}")
        guest.check("sleep 2")
    wait_for_paths(guest, 4)
    status, output = job.wait(180)
    assert status == 0, output
    assert "err= 0" in output, output
    assert "I/O error, dev dm" not in guest.check("dmesg"), guest.check("dmesg | tail -40")


def test_mpathpersist(guest: Guest) -> None:
    persist = "mpathpersist"
    guest.check(f"{persist} --out --register --param-sark={KEY} /dev/mapper/mpatha")
    guest.check(f"{persist} --out --reserve --param-rk={KEY} --prout-type=5 /dev/mapper/mpatha")
    keys = guest.check(f"{persist} --in -k /dev/mapper/mpatha")
    assert keys.lower().count(KEY[2:]) >= 4, f"one for each path: {keys}"
    reservation = guest.check(f"{persist} --in -r /dev/mapper/mpatha")
    assert "Write Exclusive, registrants only" in reservation, reservation
    status = guest.check("sg_persist -n -s /dev/sda").replace(" ", "")
    for number in (1, 2):
        assert status.count(wwpn(number).replace(":", "")) == 2, status
    output = guest.check(load(guest, 2), timeout=120)
    assert "err= 0" in output, output
    guest.check(f"{persist} --out --release --param-rk={KEY} --prout-type=5 /dev/mapper/mpatha")
    guest.check(f"{persist} --out --register --param-rk={KEY} --param-sark=0 /dev/mapper/mpatha")
    assert KEY[2:] not in guest.check(f"{persist} --in -k /dev/mapper/mpatha")
