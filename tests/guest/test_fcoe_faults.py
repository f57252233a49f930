"""What a storage network may do to a stock Linux kernel, done to one: each fault, the states that the kernel goes
through in its sysfs, and that it comes back by itself.

One story in order, in one guest, with every frame captured; at the end Wireshark judges them all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab import wireshark
from tests.lab.fcoe import FcoeGuest, attachment, mac_of, netdev, wwpn_of
from tests.lab.san import TARGET, San, UnitSpec, wwpn
from vhostfc.fc.els import Els
from vhostfc.fc.frame import FcType, RCtl

pytestmark = pytest.mark.guest

#: A vport that is there from the beginning, and one that comes later.
VPORT, LATER = 1, 2
MIB = 1 << 20


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("capture") / "run.pcapng"


@pytest.fixture(scope="module")
def san(capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    network = San(
        tmp_path_factory.mktemp("san"),
        [UnitSpec(0, 'size = "16MiB"', allow=[VPORT]), UnitSpec(1, 'size = "16MiB"', allow=[VPORT, LATER])],
        fabric_options=["--capture", str(capture)],
    )
    network.extra = attachment(network)
    with network:
        yield network


@pytest.fixture(scope="module")
def guest(san: San, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FcoeGuest]:
    with FcoeGuest(netdev(san, 1), workdir=tmp_path_factory.mktemp("vm"), memory="512M") as machine:
        yield machine


@pytest.fixture(scope="module")
def host(guest: FcoeGuest) -> str:
    return guest.online()


@pytest.fixture(scope="module")
def vport(guest: FcoeGuest, host: str) -> str:
    return guest.create_vport(host, wwpn(VPORT))


@pytest.fixture(scope="module")
def disk(guest: FcoeGuest, vport: str) -> str:
    """LUN 1 of the first vport; with commands that fail after 5 seconds, not after 30."""
    virtual = guest.host_of(vport)
    guest.wait(f"[ $(ls -d /sys/class/scsi_disk/{virtual.removeprefix('host')}:* 2>/dev/null | wc -l) = 2 ]")
    for name in guest.luns(virtual).values():
        guest.check(f"echo 5 >/sys/block/{name}/device/timeout")
    return guest.luns(virtual)[1]


def order(san: San, *words: str) -> dict[str, object]:
    """`vhostfc fault CONTROL WORDS`, as an administrator says it."""
    command = [sys.executable, "-m", "vhostfc", "fault", str(san.fabric_control), *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@contextmanager
def fault(san: San, what: str, *values: str) -> Iterator[str]:
    """A fault that is in force meanwhile; its name."""
    names = order(san, "add", what, *values)["faults"]
    assert isinstance(names, list)
    (name,) = names
    try:
        yield name
    finally:
        order(san, "clear", name)


def hits(san: San, name: str) -> int:
    faults = order(san, "list")["faults"]
    assert isinstance(faults, list)
    return next((int(one["hits"]) for one in faults if one["name"] == name), 0)


def logins(san: San) -> dict[str, str]:
    """WWPN -> N_Port_ID."""
    return {login["wwpn"]: login["port_id"] for login in san.fabric_status()["logins"]}


def sessions(san: San) -> dict[str, str]:
    """WWPN -> since when it has been logged in."""
    return {login["wwpn"]: login["since"] for login in san.fabric_status()["logins"]}


def holder(san: San) -> str:
    """What is plugged into the F_Port of the guest."""
    return f"{mac_of(1)} on {san.fcoe_socket}"


def rport(guest: FcoeGuest, vport: str) -> str:
    """A glob of the array's remote port, as a vport knows it."""
    return f"/sys/class/fc_remote_ports/rport-{guest.host_of(vport).removeprefix('host')}:*"


def state(guest: FcoeGuest, vport: str) -> str:
    return guest.check(f"cat /sys/class/fc_vports/{vport}/vport_state").strip()


def await_vport(guest: FcoeGuest, vport: str, wanted: str, *, timeout: int = 60) -> None:
    guest.wait(f'[ "$(cat /sys/class/fc_vports/{vport}/vport_state)" = "{wanted}" ]', timeout=timeout)


def await_rport(guest: FcoeGuest, vport: str, wanted: str, *, timeout: int = 60) -> None:
    """Until the array's port is in this state."""
    name = TARGET.replace(":", "")
    guest.wait(
        f'for r in {rport(guest, vport)}; do [ "$(cat $r/port_name)" = 0x{name} ] &&'
        f' [ "$(cat $r/port_state)" = "{wanted}" ] && exit 0; done; false',
        timeout=timeout,
    )


@contextmanager
def watching(guest: FcoeGuest, path: str) -> Iterator[list[str]]:
    """What a file of sysfs says meanwhile, each change: short states are seen too."""
    seen: list[str] = []
    on = f"/run/watching{path.replace('/', '.')}"
    guest.check(f"rm -f {on}.began; touch {on}")
    look = f's=$(cat {path}); [ "$s" = "$before" ] || echo "$s"; before=$s; : >{on}.began'
    job = guest.popen(f"while [ -e {on} ]; do {look}; done")
    guest.wait(f"[ -e {on}.began ]")
    try:
        yield seen
    finally:
        guest.check(f"rm {on}")
        seen += job.wait(30)[1].splitlines()


def went_and_came_back(states: list[str], well: str, between: set[str]) -> None:
    """Not each state lasts long enough to be seen, but one of them does."""
    assert states[0] == states[-1] == well, states
    assert between & set(states), states
    assert set(states) <= between | {well}, states


def verified_io(guest: FcoeGuest, disk: str, *, size: str = "2m", depth: int = 4) -> None:
    guest.check(
        f"fio --name=v --filename=/dev/{disk} --rw=randrw --bs=16k --size={size} --direct=1 --verify=crc32c"
        f" --ioengine=libaio --iodepth={depth} --randseed=7 --minimal"
    )


# ---------------------------------------------------------------- without any


def test_all_is_well_first(san: San, guest: FcoeGuest, host: str, vport: str, disk: str) -> None:
    assert logins(san).keys() == {wwpn_of(1), wwpn(VPORT)}
    assert guest.check(f"cat /sys/class/fc_host/{host}/port_state").strip() == "Online"
    await_rport(guest, vport, "Online")
    verified_io(guest, disk)


# ---------------------------------------------------------------- logins


def test_an_fdisc_that_is_rejected(san: San, guest: FcoeGuest, host: str) -> None:
    """libfc does not read the reason: the vport stays Initializing, asks again and again, and is let in at last."""
    name, node = wwpn(LATER).replace(":", ""), wwpn(LATER).replace(":", "")[:-2] + "fe"
    words = ("els=FDISC", f"wwpn={wwpn(LATER)}", "reason=unable to perform", "explanation=insufficient resources")
    with fault(san, "reject", *words) as rejecting:
        guest.check(f"echo {name}:{node} >/sys/class/fc_host/{host}/vport_create")
        later = guest.check(f"cd /sys/class/fc_vports; dirname $(grep -l 0x{name.lstrip('0')} */port_name)").strip()
        san.wait_for(lambda: hits(san, rejecting) >= 2, timeout=60)
        assert state(guest, later) == "Initializing"
        assert wwpn(LATER) not in logins(san)
    await_vport(guest, later, "Active")
    assert logins(san)[wwpn(LATER)] == guest.check(f"cat /sys/class/fc_host/{guest.host_of(later)}/port_id")[2:].strip()
    await_rport(guest, later, "Online")
    guest.wait(f"ls -d /sys/class/scsi_disk/{guest.host_of(later).removeprefix('host')}:*:1")


def test_a_name_server_that_is_silent(san: San, guest: FcoeGuest, vport: str, disk: str) -> None:
    """A vport that begins anew is not Active before it has registered."""
    with fault(san, "silence", "server=name server") as silent:
        with fault(san, "clear-virtual-link", f"wwpn={wwpn(VPORT)}"):
            san.wait_for(lambda: hits(san, silent) >= 1, timeout=60)
        assert state(guest, vport) == "Initializing"
    await_vport(guest, vport, "Active")
    await_rport(guest, vport, "Online")
    verified_io(guest, disk)


# ---------------------------------------------------------------- links


def test_the_link_of_one_virtual_port_is_cleared(san: San, guest: FcoeGuest, host: str, vport: str, disk: str) -> None:
    """It logs in again at once, under the N_Port_ID that it had; nobody else notices."""
    before, since = logins(san), sessions(san)
    with (
        watching(guest, f"/sys/class/fc_vports/{vport}/vport_state") as states,
        watching(guest, f"/sys/class/fc_host/{host}/port_state") as others,
        fault(san, "clear-virtual-link", f"wwpn={wwpn(VPORT)}"),
    ):
        san.wait_for(lambda: sessions(san).get(wwpn(VPORT)) not in {None, since[wwpn(VPORT)]})
        await_vport(guest, vport, "Active")
        await_rport(guest, vport, "Online")
    assert states[0] == states[-1] == "Active"
    assert set(states) <= {"Active", "Initializing"}, "in between for less than a look takes, perhaps"
    assert others == ["Online"]
    assert logins(san) == before
    after = sessions(san)
    assert {name for name in since if since[name] != after[name]} == {wwpn(VPORT)}
    assert guest.luns(guest.host_of(vport))[1] == disk, "the disk is the same"
    verified_io(guest, disk)


def test_all_links_of_the_physical_port_are_cleared(
    san: San, guest: FcoeGuest, host: str, vport: str, disk: str
) -> None:
    """All ports go and come back."""
    before, since = logins(san), sessions(san)
    with (
        watching(guest, f"/sys/class/fc_vports/{vport}/vport_state") as states,
        watching(guest, f"/sys/class/fc_host/{host}/port_state") as physical,
        fault(san, "clear-virtual-link", f"holder={holder(san)}"),
    ):
        san.wait_for(lambda: logins(san) == before and not set(sessions(san).items()) & set(since.items()), timeout=60)
        await_vport(guest, vport, "Active")
        await_rport(guest, vport, "Online")
    went_and_came_back(states, "Active", {"Linkdown", "Initializing"})
    went_and_came_back(physical, "Online", {"Offline", "Linkdown"})
    assert guest.luns(guest.host_of(vport))[1] == disk
    verified_io(guest, disk)


def test_a_link_that_is_down_for_three_seconds(san: San, guest: FcoeGuest, host: str, vport: str, disk: str) -> None:
    guest.check(f"for r in {rport(guest, vport)}; do echo 60 >$r/dev_loss_tmo; done")
    with (
        watching(guest, f"/sys/class/fc_vports/{vport}/vport_state") as states,
        watching(guest, f"/sys/class/fc_host/{host}/port_state") as physical,
    ):
        with fault(san, "link-down", f"holder={holder(san)}"):
            await_rport(guest, vport, "Blocked")
            guest.check("sleep 3")
            assert logins(san) == {}
        san.wait_for(lambda: wwpn(VPORT) in logins(san), timeout=60)
        await_vport(guest, vport, "Active")
        await_rport(guest, vport, "Online")
    went_and_came_back(states, "Active", {"Linkdown", "Initializing"})
    went_and_came_back(physical, "Online", {"Offline", "Linkdown"})
    assert guest.luns(guest.host_of(vport))[1] == disk
    verified_io(guest, disk)


# ---------------------------------------------------------------- frames


@pytest.mark.parametrize(
    ("r_ctl", "direction", "rate"),
    [
        (RCtl.DATA_UNSOLICITED_COMMAND, "in", 0.05),
        (RCtl.DATA_SOLICITED, "in", 0.01),
        (RCtl.DATA_SOLICITED, "out", 0.01),
        (RCtl.DATA_DESCRIPTOR, "out", 0.05),
        (RCtl.DATA_COMMAND_STATUS, "out", 0.05),
    ],
)
def test_frames_that_are_lost(
    san: San, guest: FcoeGuest, vport: str, disk: str, r_ctl: RCtl, direction: str, rate: float
) -> None:
    """The kernel asks with REC, and sends the command again: nobody above hears of it."""
    words = ("type=FCP", f"r_ctl={int(r_ctl)}", f"direction={direction}", f"wwpn={wwpn(VPORT)}", f"rate={rate}")
    with fault(san, "lose", *words) as losing:
        verified_io(guest, disk)
        assert hits(san, losing) > 0
    await_rport(guest, vport, "Online")


# ---------------------------------------------------------------- the array


def test_a_target_port_that_goes_and_comes_back(san: San, guest: FcoeGuest, vport: str, disk: str) -> None:
    guest.check(f"for r in {rport(guest, vport)}; do echo 60 >$r/dev_loss_tmo; done")
    with fault(san, "target-gone", "target=array-a"):
        await_rport(guest, vport, "Blocked")
    await_rport(guest, vport, "Online")
    assert guest.luns(guest.host_of(vport))[1] == disk
    verified_io(guest, disk)


def test_a_medium_error_at_one_block(san: San, guest: FcoeGuest, disk: str) -> None:
    with fault(san, "medium-error", "target=array-a", "lun=1", "lba=2048", "blocks=1", "on=read"):
        assert guest.run(f"dd if=/dev/{disk} of=/dev/null bs=512 skip=2048 count=1 iflag=direct")[0] == 1
        guest.check(f"dd if=/dev/{disk} of=/dev/null bs=512 skip=2047 count=1 iflag=direct")
        status, output = guest.run(f"sg_dd if=/dev/{disk} of=/dev/null bs=512 skip=2048 count=1 blk_sgio=1 verbose=2")
        assert status != 0
        assert "Unrecovered read error" in output, output
    guest.check(f"dd if=/dev/{disk} of=/dev/null bs=512 skip=2048 count=1 iflag=direct")


def test_a_unit_that_is_busy(san: San, guest: FcoeGuest, disk: str) -> None:
    """The kernel tries again."""
    with fault(san, "busy", "target=array-a", "lun=1", "rate=0.3") as busy:
        guest.check(f"dd if=/dev/{disk} of=/dev/null bs=4k count=16 iflag=direct")
        assert hits(san, busy) > 0


def test_a_unit_that_is_mapped_and_taken_away(san: San, guest: FcoeGuest, vport: str, disk: str) -> None:
    virtual = guest.host_of(vport)
    number = virtual.removeprefix("host")
    with fault(san, "map", "target=array-a", "lun=7", "share=array-a:1"):
        guest.run(f"sg_turs /dev/{disk}")  # the unit attention
        guest.check(f"echo '- - -' >/sys/class/scsi_host/{virtual}/scan")
        guest.wait(f"ls -d /sys/class/scsi_disk/{number}:*:7")
        name = guest.luns(virtual)[7]
        guest.check(f"cmp -n {MIB} /dev/{name} /dev/{disk}")
    status, output = guest.run(f"sg_turs -v /dev/{name}; sg_turs -v /dev/{name}")
    assert status == 5, output
    guest.check(f"echo 1 >/sys/block/{name}/device/delete")


# ---------------------------------------------------------------- the judge


def test_wireshark_reads_every_frame_of_it_as_we_do(
    san: San, guest: FcoeGuest, host: str, vport: str, disk: str, capture: Path
) -> None:
    guest.check(f"echo 1 >/sys/class/fc_vports/{vport}/vport_delete")
    san.wait_for(lambda: wwpn(VPORT) not in logins(san))
    assert san.the_fabric.stop() == 0
    frames = wireshark.frames(capture)
    packets = wireshark.read(capture, [*wireshark.FAULTS, *wireshark.COMPARED, "_ws.col.Info"])
    assert len(packets) > 2000
    assert wireshark.faulty(packets)[:5] == []
    assert wireshark.differences(packets, frames)[:5] == []
    kinds = Counter((frame.type, frame.r_ctl) for frame in frames)
    for kind in (RCtl.DATA_UNSOLICITED_COMMAND, RCtl.DATA_DESCRIPTOR, RCtl.DATA_SOLICITED, RCtl.DATA_COMMAND_STATUS):
        assert kinds[FcType.FCP, kind] > 10, kinds
    said = Counter(frame.payload[0] for frame in frames if frame.r_ctl == RCtl.ELS_REQUEST)
    for request in (Els.FLOGI, Els.FDISC, Els.PLOGI, Els.PRLI, Els.SCR, Els.RSCN, Els.REC, Els.LOGO):
        assert said[request] > 0, said
    told = {packet["_ws.col.Info"] for packet in packets}
    assert any("LS_RJT" in one for one in told), told
