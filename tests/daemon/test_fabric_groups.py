"""A unit behind two targets, in two target port groups, while adapters have it open."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.daemon.linkadapter import LinkAdapter, attach, lun_bytes, read_10, write_10
from tests.daemon.test_fabricd import TARGET, config, fabric
from vhostfc.errors import ConfigError
from vhostfc.fabric import link
from vhostfc.fabric.link import Route
from vhostfc.fc.initiator import CommandResult
from vhostfc.fc.wwn import Wwn
from vhostfc.scsi.report import REPORT_LUNS_W_LUN

ONE, TWO = Wwn(0x5006_0160_0000_0001), Wwn(0x5006_0160_0000_0002)
REPORT_TARGET_PORT_GROUPS = bytes.fromhex("a30a 00000000 00000100 0000")
INQUIRY_83 = bytes.fromhex("12 01 83 00ff 00")


def two_targets(access: str) -> str:
    second = TARGET.replace("array-a", "array-b").replace(':01"', ':02"') + f'group = 2\naccess = "{access}"\n'
    return (
        TARGET
        + '[[target.unit]]\nlun = 0\nsize = "1MiB"\n'
        + second
        + '[[target.unit]]\nlun = 5\nshare = "array-a:0"\n'
    )


async def join(nursery: trio.Nursery, tmp_path: Path, number: int) -> LinkAdapter:
    one = await attach(nursery, tmp_path / "f.sock", number)
    await one.until(lambda: sum(remote.logged_in for remote in one.port.remotes.values()) == 2)
    return one


async def command(
    one: LinkAdapter, target: Wwn, cdb: bytes, *, data_out: bytes = b"", data_in: int = 0, lun: bytes = b""
) -> CommandResult:
    lun = lun or lun_bytes(0 if target == ONE else 5)
    sent = one.port.start_command(one.remote(target), lun, cdb, one._now(), data_out=data_out, data_in_length=data_in)
    await one._flush()
    await one.until(lambda: sent in one._done)
    result = one._done.pop(sent)
    assert isinstance(result, CommandResult)
    return result


async def open_path(one: LinkAdapter, target: Wwn, seq: int) -> int:
    """The handle of a path that the adapter has open, with the unit attention taken."""
    await one.send(link.Open(seq, one.port.port_id, one.remote(target).port_id, lun_bytes(0 if target == ONE else 5)))
    await one.until(lambda: any(isinstance(m, Route) and m.seq == seq for m in one.seen))
    (route,) = (m for m in one.seen if isinstance(m, Route) and m.seq == seq)
    await command(one, target, bytes(6))
    await one.until(lambda: any(one.routes[route.nexus].mask))
    return route.nexus


async def test_one_unit_through_two_targets(tmp_path: Path) -> None:
    async with fabric(tmp_path, two_targets("non-optimized")) as (_, nursery):
        one = await join(nursery, tmp_path, 1)
        for target in (ONE, TWO):
            assert (await command(one, target, bytes(6))).sense[2] & 0x0F == 6
        assert (await command(one, ONE, write_10(3, 1), data_out=b"\x77" * 512)).status == 0
        assert (await command(one, TWO, read_10(3, 1), data_in=512)).data_in == b"\x77" * 512
        pages = [(await command(one, target, INQUIRY_83, data_in=255)).data_in for target in (ONE, TWO)]
        assert pages[0][4:24] == pages[1][4:24], "one NAA designator"
        assert pages[0] != pages[1], "and the port's own"
        # Groups 1 and 2, optimized and non-optimized, each with one port
        groups = (await command(one, TWO, REPORT_TARGET_PORT_GROUPS, data_in=256)).data_in
        assert groups == bytes.fromhex("00000018 008f0001 00000001 00000001 018f0002 00020001 00000002")


async def test_a_path_goes_to_standby_while_it_is_open(tmp_path: Path) -> None:
    async with fabric(tmp_path, two_targets("optimized")) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        for target in (ONE, TWO):
            await command(one, target, bytes(6))
        first, second = await open_path(one, ONE, 1), await open_path(one, TWO, 2)
        await san.reload(config(tmp_path, two_targets("standby")))
        assert not any(one.routes[second].mask), "in force when the reload returns"
        for target, sense in ((ONE, "062a06"), (TWO, "062a06"), (TWO, "02040b")):
            found = (await command(one, target, write_10(0, 1), data_out=bytes(512))).sense
            assert bytes([found[2], found[12], found[13]]).hex() == sense
        await one.until(lambda: any(one.routes[first].mask))
        assert (await command(one, ONE, write_10(0, 1), data_out=bytes(512))).status == 0
        assert not any(one.routes[second].mask)
        await san.reload(config(tmp_path, two_targets("optimized")))
        assert (await command(one, TWO, bytes(6))).sense[12:14] == bytes.fromhex("2a06")
        await one.until(lambda: any(one.routes[second].mask))


async def test_who_has_a_unit_is_told_that_its_paths_are_others(tmp_path: Path) -> None:
    """Pages 83h and 88h say so: INQUIRY DATA HAS CHANGED, on every path, once."""
    both = two_targets("optimized")
    alone = both[: both.index(TARGET.replace("array-a", "array-b").replace(':01"', ':02"'))]
    async with fabric(tmp_path, both) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        for target in (ONE, TWO):
            await command(one, target, bytes(6))
        await san.reload(config(tmp_path, both))
        assert (await command(one, ONE, bytes(6))).status == 0, "nothing is another"
        await san.reload(config(tmp_path, both.replace("group = 2", "group = 3")))
        for target in (ONE, TWO):
            assert (await command(one, target, bytes(6))).sense[12:14] == bytes.fromhex("3f03")
            assert (await command(one, target, bytes(6))).status == 0
        await san.reload(config(tmp_path, alone))
        assert (await command(one, ONE, bytes(6))).sense[12:14] == bytes.fromhex("3f03")
        assert (await command(one, ONE, bytes(6))).status == 0


async def test_the_well_known_unit_tells_of_the_groups_as_the_units_do(tmp_path: Path) -> None:
    """SPC-4 7.8.6.8: the target port group descriptor of page 83h is about the port that the command came through."""
    both = two_targets("optimized")
    async with fabric(tmp_path, both) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        for group in (2, 3):
            await san.reload(config(tmp_path, both.replace("group = 2", f"group = {group}")))
            await command(one, TWO, bytes(6))
            for lun in (lun_bytes(5), REPORT_LUNS_W_LUN):
                page = (await command(one, TWO, bytes.fromhex("120183010000"), data_in=256, lun=lun)).data_in
                descriptor = bytes.fromhex("01950004 0000") + group.to_bytes(2)
                assert descriptor in page, (group, lun.hex(), page.hex())


async def test_physical_blocks_are_reported_and_stay(tmp_path: Path) -> None:
    unit = '[[target.unit]]\nlun = 0\nsize = "1MiB"\n'
    async with fabric(tmp_path, TARGET + unit + "physical_block_size = 4096\n") as (san, nursery):
        one = await (await attach(nursery, tmp_path / "f.sock", 1)).ready()
        await one.command(bytes(6))
        found = await one.command(bytes.fromhex("9e10") + bytes(11) + b"\x20\0\0", data_in=32)
        assert found.data_in[8:14] == bytes.fromhex("00000200 00 03"), "8 blocks of 512 bytes in a physical one"
        with pytest.raises(ConfigError, match="physical_block_size: is 4096 and cannot change while it is served"):
            await san.reload(config(tmp_path, TARGET + unit + "physical_block_size = 512\n"))
