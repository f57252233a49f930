"""Two real guests on one fabric: Debian's kernel, Debian's QEMU (split rings) and a newer one (packed rings).

One story in order, because a guest takes long to boot: what each sees, file systems and verified I/O,
units that come and go and grow under load, a rescan, a reboot, a guest that is killed and comes back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lab.backports import backports_qemu
from tests.lab.guest import Guest, vhost_user_scsi
from tests.lab.san import San, UnitSpec

pytestmark = pytest.mark.guest

MIB = 1 << 20


@pytest.fixture(scope="module")
def san(tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    directory = tmp_path_factory.mktemp("san")
    units = [
        UnitSpec(0, 'size = "96MiB"', allow=[1]),
        UnitSpec(1, f'file = "{directory / "vm2.img"}"\nsize = "80MiB"', allow=[2]),
        UnitSpec(2, 'size = "64MiB"', allow=[1, 2]),
    ]
    with San(directory, units) as network:
        network.start_adapter(1)
        network.start_adapter(2, vhost="workers = 2")
        yield network


@pytest.fixture(scope="module")
def guests(san: San, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Guest]]:
    qemus = {1: "qemu-system-x86_64", 2: backports_qemu()}
    machines = {
        number: Guest(
            vhost_user_scsi(san.socket(number), num_queues=2, packed="on" if number == 2 else "off"),
            workdir=tmp_path_factory.mktemp(f"vm{number}"),
            qemu=str(qemu),
            memory="768M",
            reboot=True,
        )
        for number, qemu in qemus.items()
    }
    with ThreadPoolExecutor() as pool:  # QEMU dies with the thread that started it, so the threads stay
        try:
            list(pool.map(Guest.start, machines.values()))
            yield machines
        finally:
            for machine in machines.values():
                machine.stop()


def disks(guest: Guest) -> dict[tuple[int, int], dict[str, str]]:
    """(target, LUN) -> device name, size in bytes, wwid of the guest's disks."""
    command = (
        "for d in /sys/block/sd*; do [ -e $d ] || continue; "
        "echo $(basename $(readlink -f $d/device)) ${d##*/} $(cat $d/size) $(cat $d/device/wwid); done"
    )
    found = {}
    for line in guest.check(command).splitlines():
        address, name, sectors, wwid = line.split(maxsplit=3)
        _, _, target, lun = map(int, address.split(":"))
        found[target, lun] = {"name": name, "size": str(int(sectors) * 512), "wwid": wwid}
    return found


def wait_for(guest: Guest, condition: str, seconds: int = 100) -> None:
    """Until a shell condition holds in the guest."""
    status, output = guest.run(f"for i in $(seq {seconds * 10}); do {condition} && exit 0; sleep 0.1; done; exit 1")
    assert status == 0, f"{condition}: {output}{guest.why()}"


def naa_of(san: San, lun: int) -> str:
    """The name that the array gave a unit."""
    for target in san.fabric_status()["targets"]:
        for unit in target["units"]:
            if unit["lun"] == lun:
                return str(unit["naa"])
    raise AssertionError(f"no unit {lun}")


def test_each_guest_sees_its_own_unit_and_the_shared_one(san: San, guests: dict[int, Guest]) -> None:
    first, second = disks(guests[1]), disks(guests[2])

    assert set(first) == {(0, 0), (0, 2)}
    assert set(second) == {(0, 1), (0, 2)}
    assert first[0, 0]["size"] == str(96 * MIB)
    assert second[0, 1]["size"] == str(80 * MIB)
    assert first[0, 2]["wwid"] == second[0, 2]["wwid"] == f"naa.{naa_of(san, 2)}"
    assert first[0, 0]["wwid"] == f"naa.{naa_of(san, 0)}"
    assert second[0, 1]["wwid"] == f"naa.{naa_of(san, 1)}"


def test_file_systems_hold_verified_data(guests: dict[int, Guest]) -> None:
    def work(number: int) -> str:
        guest, lun = guests[number], number - 1
        name = disks(guest)[0, lun]["name"]
        guest.check(f"mkfs.ext4 -q -F /dev/{name} && mkdir -p /mnt/own && mount /dev/{name} /mnt/own")
        return guest.check(
            "fio --name=v --directory=/mnt/own --numjobs=8 --size=4m --rw=randrw --bsrange=512-64k --bs_unaligned=0 "
            "--verify=crc32c --verify_fatal=1 --ioengine=libaio --direct=1 --iodepth=8 --group_reporting",
            timeout=300,
        )

    with ThreadPoolExecutor() as pool:
        for output in pool.map(work, guests):
            assert "err= 0" in output, output


def test_both_guests_write_the_shared_unit_without_hurting_each_other(guests: dict[int, Guest]) -> None:
    def work(number: int) -> str:
        name = disks(guests[number])[0, 2]["name"]
        return guests[number].check(
            f"fio --name=s --filename=/dev/{name} --offset={(number - 1) * 32}m --size=16m --rw=randwrite --bs=4k "
            "--verify=crc32c --verify_fatal=1 --do_verify=1 --ioengine=libaio --direct=1 --iodepth=16",
            timeout=300,
        )

    with ThreadPoolExecutor() as pool:
        for output in pool.map(work, guests):
            assert "err= 0" in output, output
    # what one wrote the other reads
    shared = {number: disks(guest)[0, 2]["name"] for number, guest in guests.items()}
    sums = [
        guest.check(f"dd if=/dev/{shared[number]} bs=1M iflag=direct status=none | sha256sum")
        for number, guest in guests.items()
    ]
    assert sums[0] == sums[1]


def test_a_unit_comes_grows_and_goes_under_load(san: San, guests: dict[int, Guest]) -> None:
    guest = guests[1]
    load = guest.popen(
        "fio --name=l --directory=/mnt/own --size=8m --rw=randrw --bs=4k --verify=crc32c --verify_fatal=1 "
        "--ioengine=libaio --direct=1 --iodepth=8 --time_based --runtime=12"
    )
    san.units.append(UnitSpec(5, 'size = "16MiB"', allow=[1]))
    san.reload()
    wait_for(guest, "ls -d /sys/class/scsi_disk/*:0:0:5 2>/dev/null")
    name = disks(guest)[0, 5]["name"]
    guest.check(f"dd if=/dev/urandom of=/dev/{name} bs=1M count=4 oflag=direct status=none")

    san.units[-1].source = 'size = "24MiB"'
    san.reload()
    wait_for(guest, f"[ $(cat /sys/block/{name}/size) = {24 * MIB // 512} ]")

    san.units.pop()
    san.reload()
    wait_for(guest, "! ls -d /sys/class/scsi_disk/*:0:0:5 2>/dev/null")
    assert (0, 5) not in disks(guests[2])
    status, output = load.wait(120)
    assert status == 0, output


def test_a_rescan_in_the_guest_reaches_the_fabric(san: San, guests: dict[int, Guest]) -> None:
    before = san.status(2)["counters"]["punted"]
    guests[2].check("echo '- - -' > /sys/class/scsi_host/host0/scan")

    assert san.status(2)["counters"]["punted"] > before
    assert set(disks(guests[2])) == {(0, 1), (0, 2)}


def test_a_guest_reboots_and_finds_its_data(guests: dict[int, Guest]) -> None:
    guest = guests[2]
    digest = guest.check("cat /mnt/own/* | sha256sum; sync; umount /mnt/own")
    guest.run("sync; echo b > /proc/sysrq-trigger", timeout=1)
    guest.ready()

    assert set(disks(guest)) == {(0, 1), (0, 2)}
    name = disks(guest)[0, 1]["name"]
    assert guest.check(f"mkdir -p /mnt/own && mount /dev/{name} /mnt/own; cat /mnt/own/* | sha256sum") == digest


def test_a_killed_guest_comes_back_to_the_same_adapter(san: San, guests: dict[int, Guest], tmp_path: Path) -> None:
    guests[1].check("sync")
    guests[1].kill()
    with Guest(vhost_user_scsi(san.socket(1)), workdir=tmp_path, memory="768M") as again:
        assert set(disks(again)) == {(0, 0), (0, 2)}
        name = disks(again)[0, 0]["name"]
        again.check(f"mkdir -p /mnt/own && mount /dev/{name} /mnt/own && ls /mnt/own/v.0.0")
        assert unprovoked(again) == []


def test_no_kernel_error_but_those_provoked(guests: dict[int, Guest]) -> None:
    assert unprovoked(guests[2]) == []


def unprovoked(guest: Guest) -> list[str]:
    """Kernel errors other than those that a killed machine's file system and TCG's clock explain."""
    harmless = re.compile(r"EXT4-fs .*recovery|clocksource|TSC|i8042|AMD-Vi|pci .*BAR|MDS|platform eisa")
    return [line for line in guest.kernel_errors() if not harmless.search(line)]
