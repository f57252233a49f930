"""Faults in a running fabric: each is in force when it is said to be, and is gone without a trace when it ends."""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.daemon.linkadapter import attach, read_10, write_10, wwpn
from tests.daemon.test_fabricd import TARGET, UNIT, config, fabric, join, started, unit
from tests.waiting import until
from vhostfc.daemon.control import call
from vhostfc.daemon.fabricd import Fabric
from vhostfc.daemon.fdsocket import LinkSocket, connect
from vhostfc.errors import ConfigError, VhostfcError
from vhostfc.fabric import link
from vhostfc.fabric.link import Hello

ARRAY = "50:06:01:60:00:00:00:01"


async def add(tmp_path: Path, what: str, **values: Any) -> str:
    """By way of the control socket; returns the fault's name."""
    answer = await call(tmp_path / "f.control", "fault", {"do": "add", "fault": [{"what": what, **values}]})
    (name,) = answer["faults"]
    return str(name)


async def clear(tmp_path: Path, *names: str) -> None:
    await call(tmp_path / "f.control", "fault", {"do": "clear", "names": list(names) or None})


async def faults(tmp_path: Path) -> dict[str, dict[str, Any]]:
    answer = await call(tmp_path / "f.control", "fault", {"do": "list"})
    return {fault["name"]: fault for fault in answer["faults"]}


def heard(san: Fabric, event: str) -> list[dict[str, Any]]:
    return [told for told in san.events._kept if told["event"] == event]


# ---------------------------------------------------------------- units


async def test_a_unit_with_a_fault_is_taken_from_the_adapters_before_the_order_returns(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        one = await join(nursery, tmp_path, 1)
        route = await one.open()
        assert any(route.mask)
        name = await add(tmp_path, "busy", opcode=0x28)
        assert one.routes[route.nexus].mask == bytes(32)
        assert one.fds[route.nexus] == []
        assert (await one.command(read_10(0, 1), data_in=512)).status == 0x08
        assert (await one.command(write_10(0, 1), data_out=bytes(512))).status == 0
        await clear(tmp_path, name)
        await one.until(lambda: any(one.routes[route.nexus].mask))
        assert (await one.command(read_10(0, 1), data_in=512)).status == 0


async def test_an_adapter_that_does_not_let_go_is_fenced_for_a_fault_too(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        route = await one.open()
        one.acks = False
        done: list[str] = []

        async def order() -> None:
            done.append(await add(tmp_path, "offline"))

        nursery.start_soon(order)
        await one.until(lambda: not any(one.routes[route.nexus].mask))
        assert not done, "not in force before it is acknowledged"
        await one.acknowledge()
        await until(lambda: done)
        assert heard(san, "fence")


async def test_the_states_that_a_unit_may_be_in(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        for what, status in (("busy", 0x08), ("full", 0x28), ("offline", 0x02)):
            name = await add(tmp_path, what, target="array-a", lun=0)
            result = await one.command(bytes(6))
            assert result.status == status
            if what == "offline":
                assert (result.sense[2] & 0x0F, result.sense[12:14]) == (2, b"\x04\x03")
            assert (await one.command(bytes([0x12, 0, 0, 0, 36, 0]), data_in=36)).status == 0
            await clear(tmp_path, name)
            assert (await one.command(bytes(6))).status == 0


async def test_blocks_that_cannot_be_read_and_then_can(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        data = os.urandom(20 * 512)
        assert (await one.command(write_10(90, 20), data_out=data)).status == 0
        name = await add(tmp_path, "medium-error", lba=100, blocks=5, on="read")
        assert (await one.command(read_10(90, 10), data_in=10 * 512)).data_in == data[: 10 * 512]
        bad = await one.command(read_10(95, 10), data_in=10 * 512)
        assert (bad.status, bad.sense[2] & 0x0F, bad.sense[12]) == (0x02, 0x03, 0x11)
        assert int.from_bytes(bad.sense[3:7], "big") == 100
        assert (await one.command(write_10(100, 1), data_out=data[5120:5632])).status == 0
        await clear(tmp_path, name)
        assert (await one.command(read_10(90, 20), data_in=20 * 512)).data_in == data


async def test_a_write_error_leaves_the_block_as_it_was(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        await add(tmp_path, "medium-error", lba=7, blocks=1, on="write", count=1)
        assert (await one.command(write_10(7, 1), data_out=b"\x11" * 512)).status == 0x02
        assert (await one.command(read_10(7, 1), data_in=512)).data_in == bytes(512)
        assert (await one.command(write_10(7, 1), data_out=b"\x22" * 512)).status == 0, "its count is used up"
        assert (await faults(tmp_path))["medium-error-1"]["state"] == "over"


async def test_latency_is_had_by_whom_it_is_for(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        one, two = await started(nursery, tmp_path, 1, 2)
        await add(tmp_path, "latency", seconds=0.2, wwpn=str(wwpn(1)))
        begin = trio.current_time()
        assert (await two.command(read_10(0, 1), data_in=512)).status == 0
        assert trio.current_time() - begin < 0.15
        begin = trio.current_time()
        assert (await one.command(read_10(0, 1), data_in=512)).status == 0
        assert trio.current_time() - begin >= 0.2


# ---------------------------------------------------------------- frames


async def test_a_plogi_that_is_rejected_is_tried_again_until_it_is_not(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        await add(tmp_path, "reject", els="PLOGI", target="array-a", reason="logical busy", count=2)
        await join(nursery, tmp_path, 1)
        assert len(heard(san, "fault hit")) == 2
        assert (await faults(tmp_path))["reject-1"]["hits"] == 2
        assert heard(san, "fault ends")


async def test_a_login_is_refused_with_the_reason_that_was_asked_for(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        await add(tmp_path, "reject", els="FLOGI", reason="unable to perform", explanation="insufficient resources")
        one = await attach(nursery, tmp_path / "f.sock", 1)
        await one.until(lambda: one.refusals)
        assert (one.refusals[0].rejection.reason, one.refusals[0].rejection.explanation) == (0x09, 0x29)


async def test_a_name_server_that_is_silent_keeps_a_port_from_its_targets(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        name = await add(tmp_path, "silence", server="name server", count=1)
        one = await attach(nursery, tmp_path / "f.sock", 1)
        await until(lambda: heard(san, "fault hit"))
        assert not any(remote.logged_in for remote in one.port.remotes.values())
        await clear(tmp_path, name)


async def test_a_lost_response_costs_a_command_and_no_more(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        await add(tmp_path, "lose", direction="out", r_ctl=7, opcode="TEST UNIT READY", count=1)
        command = one.port.start_command(one.remote(), bytes(8), bytes(6), one._now())
        await one._flush()
        assert (await one.command(read_10(0, 1), data_in=512)).status == 0, "what came after is answered"
        one.port.abort(command, one._now())
        await one._flush()
        await one.until(lambda: command in one._done)
        assert (await one.command(bytes(6))).status == 0


async def test_frames_that_are_late_or_come_twice_do_no_harm(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        await add(tmp_path, "delay", seconds=0.01, to=0.03, r_ctl=6)
        await add(tmp_path, "duplicate", r_ctl=7)
        data = os.urandom(8 * 512)
        for lba in range(0, 64, 8):
            assert (await one.command(write_10(lba, 8), data_out=data)).status == 0
            assert (await one.command(read_10(lba, 8), data_in=8 * 512)).data_in == data


async def test_a_corrupt_frame_is_delivered_as_it_is(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        await add(tmp_path, "corrupt", r_ctl=1, direction="out", byte=24 + 100, count=1)
        bad = (await one.command(read_10(0, 1), data_in=512)).data_in
        assert [at for at in range(512) if bad[at]] == [100]
        assert (await one.command(read_10(0, 1), data_in=512)).data_in == bytes(512)


# ---------------------------------------------------------------- ports


async def test_a_link_that_is_down_stays_down_until_the_fault_ends(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        name = await add(tmp_path, "link-down", wwpn=str(wwpn(1)))
        await until(lambda: one.gone)
        assert san.status()["logins"] == []
        with LinkSocket(await connect(tmp_path / "f.sock", socket.SOCK_SEQPACKET)) as again:
            await again.send(link.encode(Hello("vm1")))
            assert (await again.receive())[0] == b"", "it hangs up instead of saying HELLO"
        await clear(tmp_path, name)
        await join(nursery, tmp_path, 1)


async def test_a_port_that_is_logged_out_is_told_and_logs_in_again(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        for number, what in enumerate(("logout", "clear-virtual-link"), 2):
            await add(tmp_path, what, wwpn=str(wwpn(1)))
            await until(lambda number=number: len(heard(san, "login")) == number)  # type: ignore[misc]  # mypy infers no lambda's defaults
            await one.ready()
            await one.until(lambda: one.remote().logged_in)
        with pytest.raises(VhostfcError, match="is not logged in"):
            await add(tmp_path, "logout", wwpn=str(wwpn(9)))


async def test_a_target_that_was_gone_is_the_same_when_it_is_back(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        await one.command(write_10(3, 1), data_out=b"\x77" * 512)
        port_id = one.remote().port_id
        name = await add(tmp_path, "target-gone", target="array-a")
        await one.until(lambda: not one.remote().logged_in)
        assert not san.topology()["targets"][0]["online"]
        await san.reload(config(tmp_path, TARGET + UNIT + unit(1)))
        assert not san.topology()["targets"][0]["online"], "a reload does not bring it back"
        await clear(tmp_path, name)
        await one.until(lambda: any(remote.logged_in for remote in one.port.remotes.values()))
        assert one.remote().port_id == port_id
        await one.command(bytes(6))
        assert (await one.command(read_10(3, 1), data_in=512)).data_in == b"\x77" * 512


# ---------------------------------------------------------------- the configuration


async def test_a_zone_a_mask_and_a_map_change_and_are_what_they_were(tmp_path: Path) -> None:
    async with fabric(tmp_path, TARGET + unit(0) + unit(1)) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        for lun in (0, 1):
            await one.command(bytes(6), lun=lun)
        await one.command(write_10(0, 1), data_out=b"\x66" * 512)
        route = await one.open()

        async def sees(lun: int) -> bool:
            result = await one.command(bytes(6), lun=lun)
            while result.sense and result.sense[2] & 0x0F == 6:
                result = await one.command(bytes(6), lun=lun)
            return result.status == 0

        name = await add(tmp_path, "mask", target="array-a", lun=0, allow=[str(wwpn(2))])
        assert one.routes[route.nexus].gone, "before the order returns"
        assert (await sees(0), await sees(1)) == (False, True)
        await clear(tmp_path, name)
        assert await sees(0)

        name = await add(tmp_path, "unmap", target="array-a", lun=0)
        assert not await sees(0)
        await clear(tmp_path, name)
        assert await sees(0)
        assert (await one.command(read_10(0, 1), data_in=512)).data_in == b"\x66" * 512, "the same unit"

        name = await add(tmp_path, "map", target="array-a", lun=7, share="array-a:0")
        assert await sees(7)
        await clear(tmp_path, name)
        assert not await sees(7)

        name = await add(tmp_path, "zone", zone="other", members=[str(wwpn(2)), ARRAY])
        await one.until(lambda: not one.remote().logged_in)
        await clear(tmp_path, name)
        await one.until(lambda: any(remote.logged_in for remote in one.port.remotes.values()))
        assert san.view == san.config == san.file


async def test_a_target_port_group_changes_its_state(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        (one,) = await started(nursery, tmp_path, 1)
        name = await add(tmp_path, "access", group=1, access="standby")
        assert (await one.command(bytes(6))).sense[12:14] == b"\x2a\x06"
        assert (await one.command(bytes(6))).sense[12:14] == b"\x04\x0b"
        await clear(tmp_path, name)
        assert (await one.command(bytes(6))).sense[12:14] == b"\x2a\x06"
        assert (await one.command(bytes(6))).status == 0


async def test_faults_of_the_configuration_lie_over_changes_and_reloads(tmp_path: Path) -> None:
    async with fabric(tmp_path, TARGET + unit(0) + unit(1)) as (san, _):
        name = await add(tmp_path, "unmap", target="array-a", lun=0)
        await san.reload(config(tmp_path, TARGET + unit(0) + unit(1) + unit(2)))
        assert [one["lun"] for one in san.topology()["targets"][0]["units"]] == [1, 2]
        await clear(tmp_path, name)
        assert [one["lun"] for one in san.topology()["targets"][0]["units"]] == [0, 1, 2]


# ---------------------------------------------------------------- times, files, errors


async def test_a_fault_of_the_file_begins_by_itself_and_ends_with_the_file(tmp_path: Path) -> None:
    fault = '[[fault]]\nname = "slow"\nwhat = "latency"\nseconds = 0.01\n'
    async with fabric(tmp_path, TARGET + UNIT + fault) as (san, _):
        await until(lambda: heard(san, "fault begins"))
        await san.reload(config(tmp_path, TARGET + UNIT + fault + '[[fault]]\nname = "b"\nwhat = "busy"\n'))
        await until(lambda: len(heard(san, "fault begins")) == 2)
        assert not heard(san, "fault ends"), "one that stays in the file goes on"
        await san.reload(config(tmp_path, TARGET + UNIT))
        assert await faults(tmp_path) == {}
        assert len(heard(san, "fault ends")) == 2


async def test_times_in_a_script_are_kept(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    async with _desk(tmp_path) as san:
        begin = trio.current_time()
        script = [
            {"what": "busy", "name": "a", "after": 10, "for": 5},
            {"what": "full", "name": "b", "after": 12},
            {"what": "offline", "name": "c", "for": 3},
        ]
        from vhostfc import faultfile

        await san.desk.add(faultfile.said({"fault": script}, {}, where="script"), source="script")
        seen: list[tuple[float, str, str]] = []
        with trio.move_on_after(60), san.events.listen() as listener:
            async for event in listener:
                if event["event"] in {"fault begins", "fault ends"}:
                    seen.append((round(trio.current_time() - begin), event["event"][6:], event["fault"]))
        assert seen == [(3, "ends", "c"), (10, "begins", "a"), (12, "begins", "b"), (15, "ends", "a")]
        await san.desk.clear()


@asynccontextmanager
async def _desk(tmp_path: Path) -> Any:
    async with fabric(tmp_path) as (san, _):
        yield san


async def test_a_fault_that_cannot_be_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, _):
        with pytest.raises(VhostfcError, match=r"fault: fault.what: is 'nonsense'; expected 'lose' or"):
            await add(tmp_path, "nonsense")
        with pytest.raises(VhostfcError, match=r"fault.colour: unknown key"):
            await add(tmp_path, "lose", colour="red")
        with pytest.raises(VhostfcError, match="there is no unit at array-a:9"):
            await add(tmp_path, "unmap", target="array-a", lun=9)
        with pytest.raises(VhostfcError, match="expected the name of a target here: 'array-a'"):
            await add(tmp_path, "target-gone", target="array-b")
        with pytest.raises(VhostfcError, match="no fault is called 'x'; there are: "):
            await clear(tmp_path, "x")
        await add(tmp_path, "busy", name="x")
        with pytest.raises(VhostfcError, match="'x' is already the name of a fault; clear it first"):
            await add(tmp_path, "busy", name="x")
        await clear(tmp_path)
        assert san.view == san.config
        assert await faults(tmp_path) == {}


async def test_a_fabric_that_ends_with_faults_in_force_ends_well(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        await join(nursery, tmp_path, 1)
        await add(tmp_path, "unmap", target="array-a", lun=0)
        await add(tmp_path, "latency", seconds=5)
        await add(tmp_path, "lose", after=100)


async def test_a_reload_that_a_fault_makes_impossible_is_an_error_that_names_the_change(tmp_path: Path) -> None:
    async with fabric(tmp_path, TARGET + unit(0)) as (san, _):
        await add(tmp_path, "map", target="array-a", lun=7, share="array-a:0")
        with pytest.raises(ConfigError, match="with these changes: unit array-a:7"):
            await san.reload(config(tmp_path, TARGET + unit(1)))
        assert [one["lun"] for one in san.topology()["targets"][0]["units"]] == [0, 7]
