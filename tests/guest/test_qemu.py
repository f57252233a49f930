"""What QEMU, not the guest, does to an adapter: wrong command lines, hotplug, stops, resets, memory, lost daemons.

The order of those that share a guest is that of one story; booting one takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.backports import backports_qemu
from tests.lab.bootdisk import bios_disk
from tests.lab.channel import GuestError, Job
from tests.lab.console import wait_for_line
from tests.lab.disks import disk_of, disks, fio, wait_for, wait_for_disk
from tests.lab.guest import Guest, Machine, vhost_user_scsi
from tests.lab.san import San, UnitSpec

pytestmark = pytest.mark.guest

DEBIAN = "qemu-system-x86_64"
BOOTS = "the array's boot sector runs"


@pytest.fixture(scope="module")
def san(tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    """Adapter n has n workers; all see LUN 0, from which a machine boots, and adapter n has LUN n for itself."""
    directory = tmp_path_factory.mktemp("san")
    (directory / "boot.img").write_bytes(bios_disk(BOOTS))
    units = [UnitSpec(0, f'file = "{directory / "boot.img"}"')]
    units += [UnitSpec(number, 'size = "32MiB"', allow=[number]) for number in (1, 2, 3)]
    with San(directory, units) as network:
        for number in (1, 2, 3):
            network.start_adapter(number, vhost=f"workers = {number}")
        yield network


def boots(san: San, number: int, directory: Path, qemu: str = DEBIAN, *args: str) -> None:
    """A machine boots from the adapter, so it serves."""
    workdir = directory / f"next-{number}"
    workdir.mkdir()
    with Machine([*vhost_user_scsi(san.socket(number)), *args], workdir=workdir, memory="128M", slots=0) as machine:
        wait_for_line(machine, BOOTS)


# ------------------------------------------------------------------ what cannot be, said in words


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_migration_is_refused_by_qemu(san: San, tmp_path: Path, version: str) -> None:
    qemu = DEBIAN if version == "7.2" else backports_qemu()
    with Machine(vhost_user_scsi(san.socket(1)), workdir=tmp_path, memory="128M", qemu=qemu) as machine:
        wait_for_line(machine, BOOTS)
        reason = "Migration disabled: vhost-user backend lacks VHOST_USER_PROTOCOL_F_LOG_SHMFD feature"
        with pytest.raises(GuestError, match=reason):
            machine.qmp("migrate", uri=f"exec:cat >{tmp_path}/nothing")
        assert machine.qmp("query-status")["running"]


def test_what_qemu_gives_unasked_is_refused(san: San, tmp_path: Path) -> None:
    """The adapter says what to set, and serves the next machine."""
    machine = Guest(vhost_user_scsi(san.socket(2), t10_pi="on"), workdir=tmp_path, qemu=backports_qemu(), memory="512M")
    try:
        Machine.start(machine)
        line = san.adapters[2].await_line("refused", timeout=60)
        assert "set t10_pi=off on QEMU's vhost-user-scsi device" in line
        assert san.adapters[2].lines("refused") == [line]
    finally:
        machine.stop()
    boots(san, 2, tmp_path)


def test_an_iommu_is_refused(san: San, tmp_path: Path) -> None:
    devices = [
        *("-device", "intel-iommu,device-iotlb=on"),
        *vhost_user_scsi(san.socket(3), bus="slot0", iommu_platform="on"),
    ]
    with Machine(devices, workdir=tmp_path, memory="128M") as machine:
        assert machine.process
        assert machine.process.wait(60) == 1  # this QEMU gives up
        assert "unable to start vhost-user-scsi" in machine.qemu_log.read_text()
    (line,) = san.adapters[3].lines("refused")
    assert "set iommu_platform=off on QEMU's vhost-user-scsi device" in line
    boots(san, 3, tmp_path)


@pytest.mark.parametrize(
    ("backend", "line"),
    [
        ("memory-backend-ram", "front end refused"),  # there is no descriptor to send
        ("memory-backend-file,mem-path=/dev/shm", "nothing is seen"),  # share=off is this one's default
    ],
)
def test_memory_that_is_not_shared_is_named(san: San, tmp_path: Path, backend: str, line: str) -> None:
    machine = Machine(vhost_user_scsi(san.socket(2)), workdir=tmp_path, memory="128M")
    machine.command = [word.replace("memory-backend-memfd", backend) for word in machine.command]
    machine.command = [word.replace(",share=on", "") for word in machine.command]
    before = len(san.adapters[2].lines("not shared"))
    with machine:
        san.wait_for(lambda: len(san.adapters[2].lines("not shared")) > before, san.adapters[2])
    (said,) = san.adapters[2].lines("not shared")[before:]
    assert line in said
    assert "guest memory is not shared: use memory-backend-memfd,share=on" in said
    boots(san, 2, tmp_path)


# ------------------------------------------------------------------ adapters that come and go


def plug(guest: Guest, san: San, number: int, queues: int) -> None:
    address = {"type": "unix", "data": {"path": str(san.socket(number))}}
    guest.qmp("chardev-add", id="chr", backend={"type": "socket", "data": {"addr": address, "server": False}})
    guest.qmp("device_add", driver="vhost-user-scsi-pci", id="hot", chardev="chr", bus="slot0", num_queues=queues)


def unplug(guest: Guest) -> None:
    guest.qmp("device_del", id="hot")
    while guest.event("DEVICE_DELETED").get("device") != "hot":
        pass
    guest.qmp("chardev-remove", id="chr")


def test_adapters_are_plugged_in_and_out(san: San, tmp_path: Path) -> None:
    """Again and again in the same slot, with one to four queues on two or three workers."""
    with Guest(vhost_user_scsi(san.socket(1), num_queues=1), workdir=tmp_path, memory="640M", cpus=4) as guest:
        before = disks(guest)
        for number, queues in [(2, 1), (3, 4), (2, 3), (3, 2)]:
            plug(guest, san, number, queues)
            disk = wait_for_disk(guest, number)
            front_end = san.status(number)["front_end"]
            assert (front_end["state"], front_end["rings"]) == ("active", list(range(2 + queues)))

            spread = ("--numjobs=4", "--cpus_allowed=0-3", "--cpus_allowed_policy=split", "--group_reporting")
            verify(guest, san, number, "--size=1m", "--offset_increment=4m", *spread)

            unplug(guest)
            san.wait_for(lambda n=number: san.status(n)["front_end"]["state"] == "detached")  # type: ignore[misc]
            wait_for(guest, f"[ ! -e {disk.path} ]")
            assert disks(guest) == before
        assert guest.kernel_errors() == []


def verify(guest: Guest, san: San, number: int, *words: str) -> None:
    """fio on the adapter's own disk must succeed."""
    status, output = guest.run(fio(disk_of(guest, number), *words), timeout=60)
    if status:
        guest.run("echo w >/proc/sysrq-trigger")
        stacks = guest.run("dmesg | tail -60")[1]
        raise AssertionError(f"{output}{stacks}{san.status(number)}\n{san.adapters[number].text()}")


# ------------------------------------------------------------------ one guest, and what QEMU does to it


@pytest.fixture(scope="module")
def guest(san: San, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest on adapter 1, with room for memory."""
    args = [*vhost_user_scsi(san.socket(1), num_queues=2), "-m", "slots=2,maxmem=2G"]
    with Guest(args, workdir=tmp_path_factory.mktemp("guest"), memory="640M", reboot=True) as machine:
        yield machine


def moved(san: San, number: int) -> int:
    """Bytes that the adapter has read and written."""
    counters = san.status(number)["counters"]
    return int(counters["read_bytes"]) + int(counters["written_bytes"])


def wait_until_busy(san: San, number: int, load: Job) -> None:
    """Until a load has moved something more."""
    before = moved(san, number)
    san.wait_for(lambda: load.done.is_set() or moved(san, number) > before, san.adapters[number])
    assert not load.done.is_set(), load.wait()


def test_stop_and_cont_under_load(guest: Guest, san: San) -> None:
    load = guest.popen(fio(disk_of(guest, 1), "--time_based", "--runtime=8"))
    for _ in range(8):
        wait_until_busy(san, 1, load)  # this QEMU does not wait until rings are enabled
        guest.qmp("stop")
        assert san.status(1)["front_end"]["state"] == "standby"
        assert san.status(1)["counters"]["in_flight"] == 0
        guest.qmp("cont")
    status, output = load.wait(120)

    assert status == 0, output
    assert guest.kernel_errors() == []


#: Write and read a disk from memory in the physical range `start`, `size`; how many pages of 2048 were there.
DIRECT = """
import ctypes, mmap, os, struct, sys
start, size, path, offset = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
out, back = (mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2))
out[:], back[:] = os.urandom(4 << 20), bytes(4 << 20)
def pages(memory):
    with open("/proc/self/pagemap", "rb") as map:
        map.seek(ctypes.addressof(ctypes.c_char.from_buffer(memory)) // 4096 * 8)
        return [(word & (1 << 55) - 1) * 4096 for word in struct.unpack("<1024Q", map.read(8192))]
disk = os.open(path, os.O_RDWR | os.O_DIRECT)
assert os.pwritev(disk, [out], offset) == os.preadv(disk, [back], offset) == 4 << 20
assert out[:] == back[:]
print(sum(start <= page < start + size for page in pages(out) + pages(back)))
"""


def test_memory_is_plugged_in_and_out_under_load(guest: Guest, san: San) -> None:
    """A program's pages are taken from movable memory first, so they lie in the new DIMM."""
    disk = disk_of(guest, 1)
    load = guest.popen(fio(disk, "--time_based", "--runtime=6"))
    wait_until_busy(san, 1, load)
    guest.qmp("object-add", qom_type="memory-backend-memfd", id="more", size=128 << 20, share=True)
    guest.qmp("device_add", driver="pc-dimm", id="dimm", memdev="more")
    blocks = "/sys/devices/system/memory/memory*/state"
    wait_for(guest, f"grep -qx offline {blocks}")
    guest.check(f"for b in $(grep -lx offline {blocks}); do echo online_movable >$b; done")
    (dimm,) = (device["data"] for device in guest.qmp("query-memory-devices"))
    status, output = guest.run(f"python3 - {dimm['addr']} {dimm['size']} {disk.path} {24 << 20}", data=DIRECT.encode())
    assert (status, output) == (0, "2048\n")
    status, output = load.wait(120)
    assert status == 0, output

    guest.qmp("device_del", id="dimm")
    assert guest.event("DEVICE_DELETED")["device"] == "dimm"
    guest.qmp("object-del", id="more")
    verify(guest, san, 1, "--size=2m")
    assert not san.adapters[1].lines(" (error|warning) ")
    assert guest.kernel_errors() == []


def test_resets_while_firmware_and_linux_look_for_disks(guest: Guest, san: San) -> None:
    """SeaBIOS runs the first request ring alone; Linux runs them all, and then scans."""
    firmware, linux = [2], [0, 1, 2, 3]
    for rings in (firmware, linux, firmware, linux, firmware):
        guest.qmp("system_reset")
        guest.event("RESET")
        san.wait_for(lambda rings=rings: san.status(1)["front_end"]["rings"] == rings, timeout=120)  # type: ignore[misc]
    guest.ready()

    assert [disk.lun for disk in disks(guest)] == [0, 1]
    verify(guest, san, 1, "--size=2m")
    assert not san.adapters[1].lines(" (error|warning) ")
    assert guest.kernel_errors() == []


# ------------------------------------------------------------------ an adapter that is lost, and comes back


def test_a_killed_adapter_comes_back(san: San, tmp_path: Path) -> None:
    """Its guest is idle meanwhile; requests in flight are not tracked."""
    chardev = f"socket,id=chr,path={san.socket(3)},reconnect=1"
    args = ["-chardev", chardev, "-device", "vhost-user-scsi-pci,chardev=chr,num_queues=2"]
    with Guest(args, workdir=tmp_path, qemu=backports_qemu(), memory="512M") as guest:
        disk = disk_of(guest, 3)
        for _ in range(2):
            guest.check(f"dd if=/dev/urandom of={disk.path} bs=1M count=4 oflag=direct status=none")
            digest = guest.check(f"dd if={disk.path} bs=1M count=4 iflag=direct status=none | sha256sum")

            san.adapters[3].kill()
            san.start_adapter(3, vhost="workers = 3")
            san.adapters[3].await_line("front end connected")

            again = guest.check(f"dd if={disk.path} bs=1M count=4 iflag=direct status=none | sha256sum", timeout=30)
            assert again == digest
        verify(guest, san, 3, "--size=2m")
        assert disks(guest) == [disk_of(guest, 0), disk]
        assert not san.adapters[3].lines(" (error|warning) ")
        assert guest.kernel_errors() == []
