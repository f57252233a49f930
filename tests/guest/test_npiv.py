"""An adapter on a real fc_host: Linux's FCoE port in a guest carries its vport, the software fabric is the network.

One story in order, in one guest.  Nothing here knows our own frames: between the adapter and the fabric stand the
kernel's SCSI midlayer, libfc and fcoe.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.channel import Job
from tests.lab.fcoe import attachment, netdev, wwpn_of
from tests.lab.npiv import NpivGuest
from tests.lab.san import TARGET, San, UnitSpec, wwpn

pytestmark = pytest.mark.guest

OTHER = 2  # an adapter that is masked for LUN 2 only
REGISTER = {"cdb": "5f000000000000001800", "out": "0" * 16 + "0000000000000abc" + "0" * 16}
RESERVE = {"cdb": "5f010100000000001800", "out": "0000000000000abc" + "0" * 32}
TEST_UNIT_READY = "000000000000"


def on(target: int, lun: int, **what: Any) -> dict[str, Any]:
    return {"target": target, "lun": lun, **what}


def zone(name: str, *members: str) -> str:
    return f'[[zone]]\nname = "{name}"\nmembers = {list(members)}\n'.replace("'", '"')


def zones(*adapters: int) -> str:
    return zone("physical", wwpn_of(1), "50:00:00:00:00:00:00:01") + "".join(
        zone(f"v{number}", TARGET, wwpn(number)) for number in adapters
    )


@pytest.fixture(scope="module")
def san(tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    network = San(
        tmp_path_factory.mktemp("san"),
        [
            UnitSpec(0, 'size = "8MiB"', allow=[1]),
            UnitSpec(1, 'size = "16MiB"\nblock_size = 4096', allow=[1]),
            UnitSpec(2, 'size = "16MiB"', allow=[2]),
        ],
    )
    network.extra = attachment(network) + zones(1, 2)
    with network:
        yield network


@pytest.fixture(scope="module")
def guest(san: San, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NpivGuest]:
    with NpivGuest(netdev(san, 1), workdir=tmp_path_factory.mktemp("vm"), memory="1G") as machine:
        machine.make_ready()
        yield machine


@pytest.fixture(scope="module")
def adapter(guest: NpivGuest) -> list[Job]:
    """The running adapter's job is the last of these."""
    return [guest.start_adapter(1)]


def await_luns(guest: NpivGuest, wanted: list[int], *, seconds: int = 20) -> None:
    for _ in range(seconds):
        targets = guest.status(1)["targets"]
        if [target["luns"] for target in targets] == ([wanted] if wanted else []):
            return
    raise AssertionError(f"{wanted} wanted: {targets}\n{guest.log(1)}")


# ---------------------------------------------------------------- the host


def test_the_other_disks_of_the_host_are_found_as_before(guest: NpivGuest) -> None:
    """drivers_autoprobe is off; the udev rule binds what is not below a vport."""
    assert guest.check("cat /sys/bus/scsi/drivers_autoprobe").strip() == "0"
    guest.check("modprobe scsi_debug dev_size_mb=8")
    guest.wait("ls -d /sys/bus/pseudo/drivers/scsi_debug/adapter0/host*/target*/*/block/sd*", timeout=20)
    assert guest.check("lsscsi | grep -c scsi_debug").strip() == "1"


def test_the_doctor_finds_a_host_that_is_ready(guest: NpivGuest) -> None:
    status, output = guest.run(f"{guest.python} -m vhostfc doctor --json")
    findings = {(one["about"], one["verdict"]) for one in __import__("json").loads(output)["findings"]}
    assert {("hba host0", "ready"), ("hands off", "ready"), ("rules", "ready"), ("helper", "ready")} <= findings
    assert status == 0, output


# ---------------------------------------------------------------- discovery and I/O


def test_the_port_is_logged_in_with_its_own_name(san: San, guest: NpivGuest, adapter: list[Job]) -> None:
    logins = {login["wwpn"]: login for login in san.fabric_status()["logins"]}
    assert logins.keys() == {wwpn_of(1), wwpn(1)}
    assert guest.status(1)["port"]["port_id"] == logins[wwpn(1)]["port_id"]
    vport = guest.vport(1)
    assert guest.check(f"cat /sys/class/fc_vports/{vport}/symbolic_name").strip() == "vhostfc vm1"


def test_units_are_those_that_masking_shows(guest: NpivGuest, adapter: list[Job]) -> None:
    units = guest.units(1)
    assert units.keys() == {(0, 0), (0, 1)}
    assert (units[0, 0]["block_size"], units[0, 1]["block_size"]) == (512, 4096)
    assert units[0, 0]["vendor"] == "VHOSTFC"


@pytest.mark.parametrize(
    ("unit", "size", "kind"), [("0:0", "512", "randrw"), ("0:1", "4k", "randrw"), ("0:0", "1M", "write")]
)
def test_verified_io(guest: NpivGuest, adapter: list[Job], unit: str, size: str, kind: str) -> None:
    result = guest.vhostfc(
        f"bench {guest.socket(1)} --unit {unit} --rw {kind} --bs {size} --iodepth 8 --seconds 2 --runs 1 --warmup 0"
        " --verify"
    )
    assert result["errors"] == 0
    assert result["iops"] > 0


def test_the_host_keeps_its_hands_off(guest: NpivGuest, adapter: list[Job]) -> None:
    """No driver, no block device; what the units were asked was asked by the scan, and by us."""
    luns = guest.check("ls -d /sys/class/fc_vports/vport-*/device/host*/rport*/target*/*:*:*:*").split()
    assert len(luns) == 2
    for lun in luns:
        assert guest.run(f"ls -d {lun}/driver {lun}/block 2>/dev/null")[1] == ""
    before = [int(guest.check(f"cat {lun}/iorequest_cnt"), 16) for lun in luns]
    guest.check("udevadm settle; sleep 2")
    after = [int(guest.check(f"cat {lun}/iorequest_cnt"), 16) for lun in luns]
    # The survey asks one unit of the target for its list every two seconds.
    assert [late - early <= 4 for early, late in zip(before, after, strict=True)] == [True, True]
    assert guest.check("cat /proc/partitions | grep -c sd; true").strip() == "1", "scsi_debug's"


def test_the_adapter_has_one_right(guest: NpivGuest, adapter: list[Job]) -> None:
    pid = guest.check("pgrep -u vhostfc -f 'vhostfc serve' | head -1").strip()
    rights = dict(line.split(":\t") for line in guest.check(f"grep Cap /proc/{pid}/status").splitlines())
    assert {int(rights[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")} == {1 << 17}  # CAP_SYS_RAWIO


def test_a_reservation_is_the_vports(san: San, guest: NpivGuest, adapter: list[Job]) -> None:
    answers = guest.drive(
        1, [on(0, 0, **REGISTER), on(0, 0, **RESERVE), on(0, 0, cdb="5e000000000000010000", **{"in": 256})]
    )
    assert [(answer["response"], answer["status"]) for answer in answers] == [(0, 0)] * 3
    assert answers[2]["in"][16:32] == "0000000000000abc"
    (target,) = san.fabric_status()["targets"]
    (unit,) = (unit for unit in target["units"] if unit["lun"] == 0)
    assert [(one["wwpn"], one["holder"]) for one in unit["reservations"]["registrations"]] == [(wwpn(1), True)]


def test_another_adapter_sees_its_own(san: San, guest: NpivGuest, adapter: list[Job]) -> None:
    job = guest.start_adapter(OTHER)
    try:
        assert guest.units(OTHER).keys() == {(0, 2)}
    finally:
        guest.check("kill $(pgrep -u vhostfc -f 'serve --config /etc/vhostfc/vm2.toml')")
        assert job.wait(60)[0] == 0
    assert guest.vport(OTHER) is None
    assert wwpn(OTHER) not in {login["wwpn"] for login in san.fabric_status()["logins"]}


def test_a_unit_reset_reaches_the_unit(guest: NpivGuest, adapter: list[Job]) -> None:
    """SG_SCSI_RESET by way of the helper; the unit tells of it."""
    logical_unit_reset = 5
    answers = guest.drive(
        1,
        [
            on(0, 0, cdb=TEST_UNIT_READY),
            on(0, 0, tmf=logical_unit_reset),
            on(0, 0, cdb=TEST_UNIT_READY, patient=False),
        ],
    )
    assert answers[1] == {"answer": 0}, guest.check("cat /run/helper.log")
    assert (answers[2]["status"], answers[2]["sense"][4:6], answers[2]["sense"][24:26]) == (2, "06", "29")


# ---------------------------------------------------------------- changes


def test_units_come_and_go(san: San, guest: NpivGuest, adapter: list[Job]) -> None:
    san.units.append(UnitSpec(5, 'size = "16MiB"', allow=[1]))
    san.reload()
    await_luns(guest, [0, 1, 5])
    assert guest.units(1).keys() == {(0, 0), (0, 1), (0, 5)}
    san.units.pop()
    san.reload()
    await_luns(guest, [0, 1])
    (answer,) = guest.drive(1, [on(0, 5, cdb=TEST_UNIT_READY)])
    assert (answer["status"], answer["sense"][4:6], answer["sense"][24:26]) == (2, "05", "25")


def test_what_this_host_does_to_a_unit_is_mended(guest: NpivGuest, adapter: list[Job]) -> None:
    """It is offline, as error recovery leaves it; then sd has it."""
    (lun,) = guest.check("ls -d /sys/class/fc_vports/vport-*/device/host*/rport*/target*/*:*:*:0").split()
    guest.check(f"echo offline >{lun}/state")
    guest.wait(f"grep -q running {lun}/state", timeout=20)
    guest.check(f"echo {lun.rpartition('/')[2]} >/sys/bus/scsi/drivers_probe")
    guest.wait('grep -q "took a unit back from this host\'s driver" /run/vm1.log', timeout=20)
    assert guest.run(f"ls -d {lun}/driver 2>/dev/null")[1] == ""
    (answer,) = guest.drive(1, [on(0, 0, cdb=TEST_UNIT_READY)])
    assert (answer["response"], answer["status"]) == (0, 0)


def test_a_zone_that_closes_and_opens(san: San, guest: NpivGuest, adapter: list[Job]) -> None:
    san.extra = attachment(san) + zones(2)
    san.reload()
    # Until dev_loss the units stay; what is sent fails when fast_io_fail is over.
    guest.wait(
        "grep -qs Blocked /sys/class/fc_vports/vport-*/device/host*/rport*/fc_remote_ports/*/port_state", timeout=20
    )
    (answer,) = guest.drive(1, [on(0, 0, cdb=TEST_UNIT_READY, patient=False)])
    assert answer["response"] in {6, 3}, "TRANSPORT FAILURE, or BAD TARGET when dev_loss is over already"
    await_luns(guest, [], seconds=30)
    san.extra = attachment(san) + zones(1, 2)
    san.reload()
    await_luns(guest, [0, 1], seconds=30)
    (answer,) = guest.drive(1, [on(0, 0, cdb=TEST_UNIT_READY)])
    assert (answer["response"], answer["status"]) == (0, 0)


def devices(guest: NpivGuest) -> str:
    """The SCSI devices as the kernel has them now; one that comes back under its old name has another inode."""
    return guest.check("stat -L -c '%n %i' /sys/class/scsi_generic/*")


def test_a_cable_that_is_pulled_for_longer_than_dev_loss(san: San, guest: NpivGuest, adapter: list[Job]) -> None:
    before = devices(guest)
    guest.qmp("set_link", name="cable1", up=False)
    guest.wait("[ $(cat /sys/class/fc_host/host0/port_state) = Linkdown ]")
    await_luns(guest, [], seconds=40)
    guest.qmp("set_link", name="cable1", up=True)
    guest.wait("[ $(cat /sys/class/fc_host/host0/port_state) = Online ]")
    await_luns(guest, [0, 1], seconds=60)
    result = guest.vhostfc(
        f"bench {guest.socket(1)} --unit 0:1 --rw randrw --bs 4k --iodepth 8 --seconds 1 --runs 1 --warmup 0 --verify"
    )
    assert result["errors"] == 0
    after = devices(guest).splitlines()
    assert len(set(after) & set(before.splitlines())) == 1, "only scsi_debug's is the same"
    assert len(after) == 3


def test_a_cable_that_is_pulled_for_a_moment(guest: NpivGuest, adapter: list[Job]) -> None:
    """Shorter than dev_loss: the same units, and a guest that tries again has lost nothing."""
    before = devices(guest)
    job = guest.popen(
        f"{guest.python} -m vhostfc bench {guest.socket(1)} --unit 0:1 --rw randrw --bs 4k --iodepth 4 --seconds 12"
        " --runs 1 --warmup 0 --verify --json"
    )
    guest.check("sleep 4")
    guest.qmp("set_link", name="cable1", up=False)
    guest.check("sleep 1")
    guest.qmp("set_link", name="cable1", up=True)
    status, output = job.wait(120)
    assert "verified" in output, f"{output}\n{guest.log(1)}"
    guest.wait("[ $(cat /sys/class/fc_host/host0/port_state) = Online ]")
    await_luns(guest, [0, 1], seconds=60)
    assert devices(guest) == before
    assert status in {0, 1}


def test_a_guest_that_leaves_while_its_path_is_lost(guest: NpivGuest, adapter: list[Job]) -> None:
    """Its rings stop at once, with commands that the kernel still has; the next guest's are not overtaken by them."""
    job = guest.popen(
        f"{guest.python} -m vhostfc bench {guest.socket(1)} --unit 0:1 --rw randwrite --bs 4k --iodepth 8 --seconds 60"
        " --runs 1 --warmup 0 >/run/bench.log 2>&1"
    )
    for _ in range(30):
        if guest.status(1)["counters"]["in_flight"]:
            break
    guest.qmp("set_link", name="cable1", up=False)
    guest.check("sleep 0.5; pkill -9 -f '[v]hostfc bench'")
    job.wait(30)
    for _ in range(30):
        if guest.status(1)["front_end"]["state"] == "detached":
            break
    counters = guest.status(1)["counters"]
    assert counters["in_flight"] == 0
    guest.qmp("set_link", name="cable1", up=True)
    guest.wait("[ $(cat /sys/class/fc_host/host0/port_state) = Online ]")
    await_luns(guest, [0, 1], seconds=60)
    result = guest.vhostfc(
        f"bench {guest.socket(1)} --unit 0:1 --rw randrw --bs 4k --iodepth 8 --seconds 1 --runs 1 --warmup 0 --verify"
    )
    assert result["errors"] == 0


# ---------------------------------------------------------------- lives


def test_a_killed_adapter_begins_with_a_vport_of_its_own(san: San, guest: NpivGuest, adapter: list[Job]) -> None:
    """The kernel may have commands of the killed one: they are over when its vport is gone."""
    vport = guest.vport(1)
    guest.check("kill -9 $(pgrep -u vhostfc -f 'serve --config /etc/vhostfc/vm1.toml')")
    adapter[-1].wait(30)
    assert guest.vport(1) == vport
    adapter.append(guest.start_adapter(1))
    assert guest.vport(1) not in {None, vport}
    assert "commands of a life before this one may be under way" in guest.log(1)
    await_luns(guest, [0, 1], seconds=60)


def test_a_vport_that_somebody_deletes_is_made_anew(guest: NpivGuest, adapter: list[Job]) -> None:
    guest.check(f"echo 1 >/sys/class/fc_vports/{guest.vport(1)}/vport_delete")
    guest.wait("grep -q 'the vport is gone' /run/vm1.log", timeout=20)
    await_luns(guest, [0, 1], seconds=60)


def test_at_the_end_the_vport_is_gone(san: San, guest: NpivGuest, adapter: list[Job]) -> None:
    guest.check("kill $(pgrep -u vhostfc -f 'serve --config /etc/vhostfc/vm1.toml')")
    assert adapter[-1].wait(60)[0] == 0, guest.log(1)
    assert guest.vport(1) is None
    assert {login["wwpn"] for login in san.fabric_status()["logins"]} == {wwpn_of(1)}
    expected = ("the vport is gone", "set a unit offline", "this host's driver had")
    told = [line for line in guest.log(1).splitlines() if not any(what in line for what in expected)]
    assert "error" not in "".join(told).lower(), guest.log(1)


def test_login_without_a_guest(san: San, guest: NpivGuest) -> None:
    """As root: what the SAN team needs before the machine exists."""
    job = guest.popen(f"{guest.python} -m vhostfc login vm1 --for 30s >/run/login.log 2>&1")
    san.wait_for(lambda: wwpn(1) in {login["wwpn"] for login in san.fabric_status()["logins"]}, timeout=60)
    guest.wait("[ -S /run/vhostfc/vm1/vhost.control ]")
    seen = guest.vhostfc("ls /run/vhostfc/vm1/vhost.control")
    assert [unit["lun"] for target in seen["targets"] for unit in target["units"]] == [0, 1]
    assert seen["targets"][0]["units"][0]["vendor"] == "VHOSTFC"
    assert job.wait(120)[0] == 0, guest.check("cat /run/login.log")
    assert guest.vport(1) is None


def test_a_host_that_would_use_the_units_is_no_host(guest: NpivGuest) -> None:
    guest.check(f"({guest.python} -m vhostfc setup --undo)")
    assert guest.check("cat /sys/bus/scsi/drivers_autoprobe").strip() == "1"
    status, output = guest.run(f"{guest.python} -m vhostfc login vm1 --for 1s")
    assert status == 1
    assert "run `vhostfc setup`" in output
    assert guest.vport(1) is None
