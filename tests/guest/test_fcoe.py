"""A stock Linux kernel on the fabric: libfc logs in over FCoE, makes NPIV ports, finds its units and does I/O.

One story in order, in one guest.  What happened is read where an administrator would: in the kernel's sysfs and
in `vhostfc status`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.lab.fcoe import FcoeGuest, attachment, mac_of, netdev, wwpn_of
from tests.lab.san import TARGET, San, UnitSpec, wwpn

pytestmark = pytest.mark.guest

#: The vports of this guest, by number: adapters' WWPNs, which no adapter has here.
VPORTS = (1, 2, 3, 4)
#: The physical port sees LUN 9 only.
PHYSICAL = 9


def zone(name: str, *members: str) -> str:
    return f'[[zone]]\nname = "{name}"\nmembers = {list(members)}\n'.replace("'", '"')


def zones(*visible: int) -> str:
    """The physical port and these vports are zoned with the target."""
    return zone("physical", TARGET, wwpn_of(1)) + "".join(zone(f"v{n}", TARGET, wwpn(n)) for n in visible)


@pytest.fixture(scope="module")
def san(tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    directory = tmp_path_factory.mktemp("san")
    size = 'size = "48MiB"\n'
    units = [
        UnitSpec(0, size, allow=[1, 2, 3]),
        UnitSpec(1, f'{size}file = "{directory / "one.img"}"', allow=[1]),
        UnitSpec(2, f"{size}block_size = 4096", allow=[2, 4]),
        UnitSpec(PHYSICAL, f'{size}allow = ["{wwpn_of(1)}"]'),
    ]
    network = San(directory, units)
    network.extra = attachment(network) + zones(1, 2, 3)
    with network:
        yield network


@pytest.fixture(scope="module")
def guest(san: San, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FcoeGuest]:
    with FcoeGuest(netdev(san, 1), workdir=tmp_path_factory.mktemp("vm"), memory="768M") as machine:
        yield machine


@pytest.fixture(scope="module")
def host(guest: FcoeGuest) -> str:
    return guest.online()


@pytest.fixture(scope="module")
def vports(guest: FcoeGuest, host: str) -> dict[int, tuple[str, str]]:
    """Number -> (fc_vport, Scsi_Host)."""
    made = {number: guest.create_vport(host, wwpn(number)) for number in VPORTS}
    return {number: (vport, guest.host_of(vport)) for number, vport in made.items()}


def settle(guest: FcoeGuest, host: str, luns: set[int]) -> None:
    number = host.removeprefix("host")
    seen = f"ls -d /sys/class/scsi_disk/{number}:* 2>/dev/null | sed 's/.*://' | sort -n | tr '\\n' ' '"
    wanted = "".join(f"{lun} " for lun in sorted(luns))
    guest.wait(f'[ "$({seen})" = "{wanted}" ]')


def rport(guest: FcoeGuest, host: str) -> str:
    """The state of the array's port, as this host knows it."""
    number = host.removeprefix("host")
    name = TARGET.replace(":", "")
    return guest.check(
        f"cd /sys/class/fc_remote_ports; for r in rport-{number}:*; do"
        f" [ $(cat $r/port_name) = 0x{name} ] && cat $r/port_state; done; true"
    ).strip()


# ---------------------------------------------------------------- login and discovery


def test_the_physical_port_logs_in(san: San, guest: FcoeGuest, host: str) -> None:
    (login,) = san.fabric_status()["logins"]
    assert login["wwpn"] == wwpn_of(1)
    assert login["adapter"] == f"{mac_of(1)} on {san.fcoe_socket}"
    facts = guest.check(f"cd /sys/class/fc_host/{host}; cat port_id port_type fabric_name max_npiv_vports").split("\n")
    assert facts[0] == f"0x{login['port_id']}"
    assert facts[1] == "NPort (fabric via point-to-point)"
    assert facts[2] == "0x" + san.fabric_status()["fabric"]["wwn"].replace(":", "")
    settle(guest, host, {PHYSICAL})


def test_each_virtual_port_sees_what_zones_and_masks_let_it(
    san: San, guest: FcoeGuest, vports: dict[int, tuple[str, str]]
) -> None:
    logins = {login["wwpn"] for login in san.fabric_status()["logins"]}
    assert logins == {wwpn_of(1), *(wwpn(number) for number in VPORTS)}
    settle(guest, vports[1][1], {0, 1})
    settle(guest, vports[2][1], {0, 2})
    settle(guest, vports[3][1], {0})
    settle(guest, vports[4][1], set())  # masked for LUN 2, and in no zone
    assert rport(guest, vports[4][1]) == ""


# ---------------------------------------------------------------- I/O


def test_verified_io_on_every_virtual_port(guest: FcoeGuest, vports: dict[int, tuple[str, str]]) -> None:
    shapes = ((1, 1, "4k", "randrw"), (1, 0, "512", "randrw"), (2, 2, "1m", "write"))
    for number, lun, size, kind in shapes:
        name = guest.luns(vports[number][1])[lun]
        amount = {"512": "1m", "4k": "8m", "1m": "48m"}[size]
        guest.check(
            f"fio --name=v --filename=/dev/{name} --rw={kind} --bs={size} --size={amount} --direct=1 --verify=crc32c"
            " --ioengine=libaio --iodepth=8 --randseed=7 --minimal"
        )


def test_sg3_utils(san: San, guest: FcoeGuest, vports: dict[int, tuple[str, str]]) -> None:
    name = guest.luns(vports[1][1])[1]
    assert "VHOSTFC" in guest.check(f"sg_inq /dev/{name}")
    assert TARGET.replace(":", "") in guest.check(f"sg_vpd -p di /dev/{name}")
    guest.check(f"sg_turs /dev/{name}; sg_readcap -l /dev/{name}; sg_luns /dev/{name}; sg_reset -d /dev/{name}")
    guest.run(f"sg_turs /dev/{name}")  # the unit attention of the reset
    # A persistent reservation is this vport's, and no one else's.
    guest.check(f"sg_persist -n -o -G -S 0xabc /dev/{name}; sg_persist -n -o -R -K 0xabc -T 1 /dev/{name}")
    (target,) = san.fabric_status()["targets"]
    (unit,) = (unit for unit in target["units"] if unit["lun"] == 1)
    assert [(one["wwpn"], one["holder"]) for one in unit["reservations"]["registrations"]] == [(wwpn(1), True)]
    guest.check(f"sg_persist -n -o -C -K 0xabc /dev/{name}")


@pytest.mark.parametrize(
    ("r_ctl", "command"),
    [
        (7, "sg_turs /dev/{}"),
        (7, "dd if=/dev/{} of=/dev/null bs=4k count=1 iflag=direct"),
        (1, "dd if=/dev/{} of=/dev/null bs=4k count=1 iflag=direct"),
        (5, "dd if=/dev/zero of=/dev/{} bs=4k count=1 oflag=direct"),
    ],
    ids=["FCP_RSP", "FCP_RSP of a read", "FCP_DATA of a read", "FCP_XFER_RDY"],
)
def test_a_lost_frame_costs_seconds_not_a_command_timeout(
    san: San, guest: FcoeGuest, vports: dict[int, tuple[str, str]], r_ctl: int, command: str
) -> None:
    """libfc asks with REC how far its command has come, and begins it anew; its timeout would be 30 s."""
    name = guest.luns(vports[1][1])[1]
    order = ("fault", str(san.fabric_control), "add", "lose", f"r_ctl={r_ctl}", f"wwpn={wwpn(1)}", "count=1", "--json")
    added = subprocess.run([sys.executable, "-m", "vhostfc", *order], capture_output=True, text=True, check=True)
    took = guest.check(f"read b x </proc/uptime; {command.format(name)} >&2; read e x </proc/uptime; echo $b $e")
    begin, end = (float(time) for time in took.split()[-2:])
    show = [sys.executable, "-m", "vhostfc", "fault", str(san.fabric_control), "list", "--json"]
    told = json.loads(subprocess.run(show, capture_output=True, text=True, check=True).stdout)
    mine = json.loads(added.stdout)["faults"]
    assert [one["hits"] for one in told["faults"] if one["name"] in mine] == [1]
    assert end - begin < 20, took


# ---------------------------------------------------------------- changes


def test_units_come_and_go(san: San, guest: FcoeGuest, vports: dict[int, tuple[str, str]]) -> None:
    host = vports[3][1]
    san.units.append(UnitSpec(5, 'size = "16MiB"', allow=[3]))
    san.reload()
    # Linux is told by the unit attention of the next command, and looks when it is asked to.
    guest.check(f"sg_turs /dev/{guest.luns(host)[0]}; echo '- - -' >/sys/class/scsi_host/{host}/scan")
    settle(guest, host, {0, 5})
    name = guest.luns(host)[5]
    guest.check(f"dd if=/dev/{name} of=/dev/null bs=1M iflag=direct")
    san.units.pop()
    san.reload()
    status, output = guest.run(f"sg_turs -v /dev/{name}")
    assert status == 5, output  # illegal request: logical unit not supported
    guest.check(f"echo 1 >/sys/block/{name}/device/delete")
    settle(guest, host, {0})


def test_a_zone_that_opens_and_closes_is_told_by_rscn(
    san: San, guest: FcoeGuest, vports: dict[int, tuple[str, str]]
) -> None:
    host = vports[4][1]
    san.extra = attachment(san) + zones(1, 2, 3, 4)
    san.reload()
    settle(guest, host, {2})
    assert rport(guest, host) == "Online"
    number = host.removeprefix("host")
    guest.check(f"for r in /sys/class/fc_remote_ports/rport-{number}:*; do echo 2 >$r/dev_loss_tmo; done")
    san.extra = attachment(san) + zones(1, 2, 3)
    san.reload()
    guest.wait(f"grep -qs Blocked /sys/class/fc_remote_ports/rport-{number}:*/port_state", timeout=10)
    settle(guest, host, set())
    assert guest.luns(vports[1][1]).keys() == {0, 1}, "others have noticed nothing"


def test_the_cable_is_pulled_and_plugged_in(san: San, guest: FcoeGuest, host: str, vports: dict[int, object]) -> None:
    """All ports of the guest go, and come back by themselves with the N_Port_IDs that they had."""
    before = {login["wwpn"]: login["port_id"] for login in san.fabric_status()["logins"]}
    guest.qmp("set_link", name="cable1", up=False)
    guest.wait(f"[ $(cat /sys/class/fc_host/{host}/port_state) = Linkdown ]")
    # The other end cannot see the cable: it misses the keep-alives.
    san.wait_for(lambda: not san.fabric_status()["logins"], timeout=60)
    guest.qmp("set_link", name="cable1", up=True)
    guest.wait(f"[ $(cat /sys/class/fc_host/{host}/port_state) = Online ]")
    guest.wait(f"[ $(grep -l Active /sys/class/fc_vports/*/vport_state | wc -l) = {len(VPORTS)} ]")
    san.wait_for(lambda: {one["wwpn"]: one["port_id"] for one in san.fabric_status()["logins"]} == before)


def test_a_virtual_port_that_is_deleted_logs_out(
    san: San, guest: FcoeGuest, vports: dict[int, tuple[str, str]]
) -> None:
    guest.check(f"echo 1 >/sys/class/fc_vports/{vports[4][0]}/vport_delete")
    san.wait_for(lambda: wwpn(4) not in {login["wwpn"] for login in san.fabric_status()["logins"]}, timeout=10)


def test_a_restarted_fabric_is_found_again(
    san: San, guest: FcoeGuest, host: str, vports: dict[int, tuple[str, str]]
) -> None:
    """The kernel believes to be logged in; its next keep-alive finds out."""
    before = {login["wwpn"]: login["port_id"] for login in san.fabric_status()["logins"]}
    san.the_fabric.kill()
    san.start_fabric()
    san.wait_for(lambda: len(san.fabric_status()["logins"]) == len(before), timeout=60)
    assert {login["wwpn"]: login["port_id"] for login in san.fabric_status()["logins"]} == before
    settle(guest, vports[1][1], {0, 1})
    name = guest.luns(vports[1][1])[1]
    guest.check(f"dd if=/dev/{name} of=/dev/null bs=1M count=4 iflag=direct")


def test_no_frame_was_lost_on_the_way(san: San, guest: FcoeGuest, host: str) -> None:
    assert int(guest.check(f"cat /sys/class/fc_host/{host}/statistics/error_frames"), 16) == 0
    (segment,) = san.fabric_status()["fcoe"]
    assert set(segment["discarded"]) <= {"not logged in"}, segment["discarded"]
