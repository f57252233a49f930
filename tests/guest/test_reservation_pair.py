"""Two real guests share a unit under a reservation, and one is fenced while it writes: nothing of it lands any more.

By hand (sg_persist) and with the cluster's own agent (fence_scsi).  What lands is looked at in the file itself.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.guest import cluster
from tests.guest.devices import heard
from tests.lab.guest import Guest, vhost_user_scsi
from tests.lab.san import San, UnitSpec, wwpn

pytestmark = pytest.mark.guest

PERSIST = "sg_persist -n"
DISK = "/dev/sda"
LOAD = (
    f"fio --name=w --filename={DISK} --rw=randwrite --bsrange=4k-64k --ioengine=libaio --direct=1 --iodepth=32 "
    "--time_based --runtime=100"
)
ROUNDS = 3


@pytest.fixture(scope="module")
def san(tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    directory = tmp_path_factory.mktemp("san")
    with San(directory, [UnitSpec(0, f'size = "64MiB"\nfile = "{directory}/disk"')]) as network:
        for number in (1, 2):
            network.start_adapter(number)
        yield network


@pytest.fixture(scope="module")
def guests(san: San, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Guest, Guest]]:
    machines = [
        Guest(
            vhost_user_scsi(san.socket(number), num_queues=2),
            workdir=tmp_path_factory.mktemp(f"vm{number}"),
            memory="640M",
            cpus=1,
        )
        for number in (1, 2)
    ]
    with ThreadPoolExecutor() as pool:  # QEMU dies with the thread that started it, so the threads stay
        try:
            list(pool.map(Guest.start, machines))
            for machine in machines:
                machine.check(f"until [ -b {DISK} ]; do sleep 0.1; done")
            yield machines[0], machines[1]
        finally:
            for machine in machines:
                machine.stop()


def digest(san: San) -> str:
    """Of the blocks where they are."""
    return hashlib.sha256(Path(san.directory / "disk").read_bytes()).hexdigest()


def wait_for_writes(san: San) -> None:
    before = digest(san)
    San.wait_for(lambda: digest(san) != before, timeout=60)


def assert_nothing_lands(san: San) -> None:
    after = digest(san)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        assert digest(san) == after, "a block of the fenced guest has landed"


def register(guest: Guest, key: str) -> None:
    guest.check(f"{PERSIST} -o -I -S {key} {DISK}")


def test_each_guest_is_an_initiator_of_its_own(guests: tuple[Guest, Guest]) -> None:
    for number, guest in enumerate(guests, 1):
        heard(guest, DISK)
        register(guest, f"0x{number}")
    guests[0].check(f"{PERSIST} -o -R -K 0x1 -T 5 {DISK}")
    status = guests[1].check(f"{PERSIST} -s {DISK}").replace(" ", "")
    for number in (1, 2):
        assert wwpn(number).replace(":", "") in status, status


def test_preempt_and_abort_of_a_guest_that_writes(san: San, guests: tuple[Guest, Guest]) -> None:
    one, two = guests
    for number in range(ROUNDS):
        register(two, "0x2")
        job = two.popen(LOAD)
        wait_for_writes(san)
        one.check(f"{PERSIST} -o -A -K 0x1 -S 0x2 -T 5 {DISK}")
        assert_nothing_lands(san)
        status, output = job.wait(60)
        assert status != 0, f"round {number}: it writes on: {output}"
        one.check(f"dd if=/dev/urandom of={DISK} bs=64k count=4 oflag=direct status=none")
        assert two.run(f"dd if=/dev/zero of={DISK} bs=64k count=1 oflag=direct")[0] != 0
        two.check(f"dd if={DISK} of=/dev/null bs=64k count=4 iflag=direct status=none")
        heard(two, DISK)
    one.check(f"{PERSIST} -o -C -K 0x1 {DISK}")


def test_fence_scsi(san: San, guests: tuple[Guest, Guest]) -> None:
    """on: both are registered, one reserves; off: the other one is out at once; on again: it is back."""
    for guest in guests:
        cluster.install(guest)
        heard(guest, DISK)
        guest.check("mkdir -p /var/run/cluster")
    one, two = guests

    def agent(guest: Guest, action: str, number: int) -> tuple[int, str]:
        return guest.run(f"fence_scsi -o {action} -d {DISK} -n node{number} -k {number:04d} -v 2>&1", 120)

    for number, guest in enumerate(guests, 1):
        status, output = agent(guest, "on", number)
        assert status == 0, output
    job = two.popen(LOAD)
    wait_for_writes(san)
    status, output = agent(one, "off", 2)
    assert status == 0, output
    assert_nothing_lands(san)
    assert job.wait(60)[0] != 0
    assert agent(one, "status", 1)[0] == 0
    assert agent(one, "status", 2)[0] == 2, "off"
    one.check(f"dd if=/dev/urandom of={DISK} bs=64k count=4 oflag=direct status=none")
    assert two.run(f"dd if=/dev/zero of={DISK} bs=64k count=1 oflag=direct")[0] != 0
    heard(two, DISK)
    status, output = agent(two, "on", 2)
    assert status == 0, output
    two.check(f"dd if=/dev/urandom of={DISK} bs=64k count=4 oflag=direct status=none")
