"""The life of a vport on a fake kernel: which port it gets, and what is said when it gets none."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import structlog
import trio
from structlog.testing import capture_logs

from tests.fakes.array import FakeTarget, FakeUnit
from tests.fakes.kernel import FakeKernel
from tests.ports.contract import ME, OTHER
from vhostfc.errors import LoginRefused
from vhostfc.fc.wwn import Wwn
from vhostfc.ports.base import PortIdentity
from vhostfc.ports.sysfs import FcHost
from vhostfc.ports.vport import ADVICE, NoParent, Parents, Vports, candidates

LOG = structlog.get_logger()


def host(name: str, *, used: int = 0, state: str = "Online", maximum: int = 10, create: bool = True) -> FcHost:
    number = int(name.removeprefix("host"))
    return FcHost(
        name=name,
        wwpn=Wwn(0x2100_0000_0000_0000 + number),
        wwnn=Wwn(1),
        fabric_name=Wwn(0xFA00 + number % 2),
        state=state,
        port_id=1,
        max_vports=maximum,
        vports_in_use=used,
        symbolic_name="",
        driver="lpfc",
        speed="",
        vport_create=Path("/x/vport_create") if create else None,
    )


def names(hosts: list[FcHost], parents: Parents) -> list[str]:
    return [one.name for one in candidates(hosts, parents)]


def kernel(tmp_path: Path, nursery: trio.Nursery, **options: object) -> FakeKernel:
    target = FakeTarget(Wwn(0x5006_0160_0000_0001), 0x01FE01, {0: FakeUnit(bytearray(4096))})
    return FakeKernel(tmp_path, nursery, target, **options)  # type: ignore[arg-type]


def vports(fake: FakeKernel, tmp_path: Path, *, patience: float = 0.3, parents: Parents | None = None) -> Vports:
    return Vports(fake, parents or Parents(), state=tmp_path / "state", log=LOG, patience=patience)


# ---------------------------------------------------------------- which port


def test_the_least_used_port_comes_first() -> None:
    hosts = [host("host5", used=4), host("host6", used=1), host("host7", used=1, maximum=4)]
    assert names(hosts, Parents()) == ["host6", "host7", "host5"]


def test_ports_that_cannot_are_left_out() -> None:
    hosts = [host("host5", used=10), host("host6", state="Linkdown"), host("host7"), host("host8", create=False)]
    assert names(hosts, Parents()) == ["host7"]


def test_a_port_is_named_by_host_by_wwpn_or_by_fabric() -> None:
    hosts = [host("host4"), host("host5"), host("host6")]
    assert names(hosts, Parents(("host5",))) == ["host5"]
    assert names(hosts, Parents(wwpns=(Wwn(0x2100_0000_0000_0006),))) == ["host6"]
    assert names(hosts, Parents(fabric=Wwn(0xFA00))) == ["host4", "host6"]
    assert names(hosts, Parents(("host5", "host6"), fabric=Wwn(0xFA00))) == ["host6"]


def test_why_no_port_can_is_said_of_each() -> None:
    hosts = [host("host5", used=10), host("host6", state="Linkdown")]
    with pytest.raises(NoParent, match=r"host5 .*10 of 10 vports in use; host6 .* is Linkdown: look at its cable"):
        candidates(hosts, Parents())
    with pytest.raises(NoParent, match=r"no HBA port here is host9; there is host5 .*, host6"):
        candidates(hosts, Parents(("host9",)))
    with pytest.raises(NoParent, match="there is no port that makes vports"):
        candidates([], Parents())


# ---------------------------------------------------------------- making one


@pytest.mark.parametrize("style", ["fcoe", "lpfc", "qla2xxx"])
async def test_a_vport_is_made_named_and_taken_away(tmp_path: Path, nursery: trio.Nursery, style: str) -> None:
    fake = kernel(tmp_path, nursery, style=style)
    life = vports(fake, tmp_path)
    vport = await life.acquire(ME)
    assert (vport.state, vport.parent, vport.wwpn, vport.wwnn) == ("Active", "host0", ME.wwpn, ME.wwnn)
    made = next(fake.sysfs.vports())
    assert made.symbolic_name == ME.symbolic_name
    await life.delete(ME)
    assert list(fake.sysfs.vports()) == []
    assert not list((tmp_path / "state").iterdir())
    await life.delete(ME)  # gone is gone


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.EINVAL, "does not take the name; is the WWPN in use here already"),
        (errno.ENOENT, "is NPIV on"),
        (errno.ENOSPC, "all of its 255 vports are in use"),
        (errno.EINTR, "no resources left"),
        (errno.ENOSYS, "NPIV switched off"),
        (errno.ENOTUNIQ, "in use here already, or malformed"),
        (errno.EOPNOTSUPP, "the switch's port does no NPIV"),
        (errno.EPERM, "refused by the driver"),
        (errno.EIO, "the kernel's log may say more"),
        (-9, "the driver has failed to make it"),
    ],
)
async def test_every_failure_to_make_one_is_a_sentence(
    tmp_path: Path, nursery: trio.Nursery, code: int, says: str
) -> None:
    """A short count, which qla2xxx gives, is one of them; and none is tried twice."""
    fake = kernel(tmp_path, nursery)
    fake.next_create = code
    with pytest.raises(LoginRefused, match=f"50:01:43:80:00:00:00:02 on host0 .*{says}"):
        await vports(fake, tmp_path).acquire(ME)
    assert len([path for path, _ in fake.writes if path.endswith("vport_create")]) == 1


@pytest.mark.parametrize(
    ("verdict", "state"),
    [("no npiv", "No Fabric Support"), ("no resources", "No Fabric Resources"), ("duplicate", "Fabric Rejected WWN")],
)
async def test_a_fabric_that_says_no_is_told_with_what_to_do(
    tmp_path: Path, nursery: trio.Nursery, verdict: str, state: str
) -> None:
    fake = kernel(tmp_path, nursery, style="lpfc")
    fake.verdict = verdict
    with pytest.raises(LoginRefused) as refused:
        await vports(fake, tmp_path).acquire(ME)
    assert state in str(refused.value)
    assert ADVICE[state] in str(refused.value)
    assert list(fake.sysfs.vports()) == []


async def test_the_next_port_is_taken_when_one_refuses(tmp_path: Path, nursery: trio.Nursery) -> None:
    fake = kernel(tmp_path, nursery, hosts=2)
    fake.next_create = errno.EIO
    vport = await vports(fake, tmp_path).acquire(ME)
    assert vport.parent == "host1"


async def test_a_link_that_is_down_is_waited_for(tmp_path: Path, nursery: trio.Nursery) -> None:
    fake = kernel(tmp_path, nursery)
    await fake.link_down()
    with capture_logs() as logs:
        with trio.move_on_after(0.2):
            await vports(fake, tmp_path).acquire(ME)
            raise AssertionError
        assert any("waiting for an HBA port: host0" in log["event"] for log in logs)
    await fake.link_up()
    assert (await vports(fake, tmp_path).acquire(ME)).state == "Active"


async def test_a_login_that_hangs_is_shaken_then_made_anew(tmp_path: Path, nursery: trio.Nursery) -> None:
    fake = kernel(tmp_path, nursery)
    fake.verdict = "silent"

    async def relent() -> None:
        while [data for path, data in fake.writes if path.endswith("vport_create")] != 2 * [
            f"{ME.wwpn:016x}:{ME.wwnn:016x}"
        ]:
            await trio.sleep(0.01)
        fake.verdict = "accept"

    nursery.start_soon(relent)
    with capture_logs() as logs:
        vport = await vports(fake, tmp_path, patience=0.1).acquire(ME)
    assert vport.state == "Active"
    assert [data for path, data in fake.writes if path.endswith("vport_disable")][:2] == ["1", "0"]
    assert any(ADVICE["Initializing"] in log["event"] for log in logs)


# ---------------------------------------------------------------- whose is it


def left_behind(fake: FakeKernel, identity: PortIdentity, name: str) -> None:
    fake.make_vport(fake.hosts["host0"], identity.wwpn, identity.wwnn, name)


async def test_what_a_life_of_ours_left_is_adopted(tmp_path: Path, nursery: trio.Nursery) -> None:
    fake = kernel(tmp_path, nursery)
    left_behind(fake, ME, ME.symbolic_name)
    vport = await vports(fake, tmp_path).acquire(ME)
    assert vport.name == "vport-0:0-0"
    assert not [path for path, _ in fake.writes if path.endswith("vport_create")]


async def test_what_we_were_making_when_we_died_is_ours(tmp_path: Path, nursery: trio.Nursery) -> None:
    fake = kernel(tmp_path, nursery)
    life = vports(fake, tmp_path)
    life._remember(ME)
    left_behind(fake, ME, "")  # as if it had been made, and not been named any more
    assert (await life.acquire(ME)).name == next(fake.sysfs.vports()).name


async def test_a_note_is_of_one_vport(tmp_path: Path, nursery: trio.Nursery) -> None:
    """Not of the next one with these names, whoever makes it."""
    fake = kernel(tmp_path, nursery)
    life = vports(fake, tmp_path)
    fake.next_create = errno.EIO
    with pytest.raises(LoginRefused):
        await life.acquire(ME)
    left_behind(fake, ME, "")
    with pytest.raises(LoginRefused, match="made by nobody that left a name"):
        await life.acquire(ME)
    fake.remove_vport(next(host for host in fake.hosts.values() if host.parent))
    await life.acquire(ME)
    fake.remove_vport(next(host for host in fake.hosts.values() if host.parent))
    left_behind(fake, ME, "")
    await life.delete(ME)
    assert len(list(fake.sysfs.vports())) == 1


@pytest.mark.parametrize("name", ["libvirt web7", ""])
async def test_what_is_somebody_elses_is_not_touched(tmp_path: Path, nursery: trio.Nursery, name: str) -> None:
    fake = kernel(tmp_path, nursery)
    left_behind(fake, ME, name)
    with pytest.raises(LoginRefused, match=r"already logged in here as vport-0:0-0.*vport_delete of host0"):
        await vports(fake, tmp_path).acquire(ME)
    assert fake.writes == []


async def test_the_hbas_own_name_is_refused(tmp_path: Path, nursery: trio.Nursery) -> None:
    fake = kernel(tmp_path, nursery)
    own = PortIdentity(fake.hosts["host0"].wwpn, OTHER.wwnn, "vm1")
    with pytest.raises(LoginRefused, match="is the WWPN of host0 itself"):
        await vports(fake, tmp_path).acquire(own)


@pytest.mark.parametrize("name", ["libvirt web7", "vhostfc vm2"])
async def test_what_somebody_made_in_its_place_is_not_deleted(tmp_path: Path, nursery: trio.Nursery, name: str) -> None:
    """The same names, another owner: ours was taken away, and theirs is there now."""
    fake = kernel(tmp_path, nursery)
    life = vports(fake, tmp_path)
    await life.acquire(ME)
    fake.remove_vport(next(host for host in fake.hosts.values() if host.parent))
    left_behind(fake, ME, name)
    with capture_logs() as logs:
        await life.delete(ME)
    assert [vport.symbolic_name for vport in fake.sysfs.vports()] == [name]
    assert not [path for path, _ in fake.writes if path.endswith("vport_delete")]
    assert [log["symbolic_name"] for log in logs] == [name]


async def test_one_that_its_driver_cannot_name_is_deleted_by_our_note(tmp_path: Path, nursery: trio.Nursery) -> None:
    fake = kernel(tmp_path, nursery)
    life = vports(fake, tmp_path)
    vport = await life.acquire(ME)
    fake._set(fake.root / "class/fc_vports" / vport.name / "symbolic_name", "")
    await life.delete(ME)
    assert list(fake.sysfs.vports()) == []
