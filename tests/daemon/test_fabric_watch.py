"""What one sees of a running fabric: events, frames, and the whole as a tree."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.daemon.linkadapter import read_10, write_10, wwpn
from tests.daemon.test_fabricd import TARGET, fabric, join, started, unit
from tests.fabric.test_pcapng import faulty, read
from vhostfc.daemon import capture
from vhostfc.daemon.capture import CaptureFile, Sniffer, capture_to, receive
from vhostfc.daemon.control import call, follow
from vhostfc.daemon.fabric_events import WAITING, Events
from vhostfc.errors import VhostfcError
from vhostfc.fabric.pcapng import Interface, Record
from vhostfc.fc import ct, fdmi
from vhostfc.fc.fdmi import HbaAttribute, PortAttribute
from vhostfc.fc.frame import Address
from vhostfc.outline import topology_tree


async def some(events: AsyncIterator[dict[str, Any]], *wanted: str) -> list[dict[str, Any]]:
    """The next of each of these, in this order; others in between are let pass."""
    found = []
    with trio.fail_after(10):
        for name in wanted:
            async for event in events:
                if event["event"] == name:
                    found.append(event)
                    break
    return found


async def test_events_tell_what_happens_in_its_order(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery), follow(tmp_path / "f.control", "events") as events:
        one = await join(nursery, tmp_path, 1)
        up, login = await some(events, "link up", "login")
        assert (up["holder"], login["wwpn"], login["holder"]) == ("vm1", str(wwpn(1)), "vm1")
        await call(tmp_path / "f.control", "change", {"change": "zone", "zone": "z", "members": [str(wwpn(1))]})
        await some(events, "zones", "change")
        one.close()
        (logout,) = await some(events, "logout")
        assert logout["port_id"] == login["port_id"]
        assert logout["time"] >= login["time"]


async def test_who_comes_later_may_hear_the_last_ones(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        await join(nursery, tmp_path, 1)
        async with follow(tmp_path / "f.control", "events", {"last": 500}) as events:
            await some(events, "target", "link up", "login")


async def test_a_listener_that_sleeps_is_told_how_much_it_has_missed() -> None:
    events = Events(clock=lambda: 1.0)
    with events.listen() as listener:
        for number in range(WAITING + 5):
            events.publish("tick", {"number": number})
        heard = []
        async for event in listener:
            heard.append(event)
            if event["event"] == "events lost":
                break
    assert len(heard) == WAITING + 1
    assert heard[-1]["count"] == 5


async def test_a_stream_of_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    async with fabric(tmp_path):
        with pytest.raises(VhostfcError, match="unknown command 'evnts'"):
            async with follow(tmp_path / "f.control", "evnts"):
                pass


# ---------------------------------------------------------------- captures


async def test_a_capture_of_a_login_and_io_is_what_wireshark_expects(tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    async with fabric(tmp_path) as (san, nursery):
        capturing = trio.CancelScope()
        done = trio.Event()

        async def record(task_status: trio.TaskStatus[None]) -> None:
            with capturing:
                await capture_to(san.door, CaptureFile(path), task_status=task_status)
            done.set()

        await nursery.start(record)
        (one,) = await started(nursery, tmp_path, 1)
        await one.command(write_10(0, 16), data_out=bytes(16 * 512))
        await one.command(read_10(0, 16), data_in=16 * 512)
        await call(tmp_path / "f.control", "fault", {"do": "add", "fault": [{"what": "lose", "r_ctl": 7, "count": 1}]})
        one.port.start_command(one.remote(), bytes(8), bytes(6), one._now())
        await one._flush()
        await one.until(lambda: san.desk.describe()[0]["hits"])
        capturing.cancel()
        await done.wait()

    packets = read(path)

    assert not faulty(packets)
    told = [packet["_ws.col.Info"] for packet in packets]
    assert told[:2] == ["FLOGI", "ACC (FLOGI)"]
    assert any("Write(10)" in info for info in told)
    assert {packet["frame.interface_name"] for packet in packets} == {"vm1", "switch", "array-a"}
    assert len([info for info in told if "Write(10)" in info]) == 1, "each frame once"
    comments = [packet["frame.comment"] for packet in packets if packet["frame.comment"]]
    assert f"{one.port.port_id:06x} is {wwpn(1)} of vm1" in comments
    assert "lost: fault lose-1" in comments


async def test_the_last_frame_before_the_end_is_in_the_capture(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        capturing, done = trio.CancelScope(), trio.Event()

        async def record(task_status: trio.TaskStatus[None]) -> None:
            with capturing:
                await capture_to(san.door, CaptureFile(tmp_path / "x.pcapng"), task_status=task_status)
            done.set()

        await nursery.start(record)
        await trio.testing.wait_all_tasks_blocked()
        for tap in san.door.taps:
            tap.put(Record(0, Interface("vm1"), bytes(24)))
        capturing.cancel()
        await done.wait()
    assert len(read(tmp_path / "x.pcapng")) == 1


async def test_frames_come_over_the_control_socket_as_well(tmp_path: Path) -> None:
    path = tmp_path / "y.pcapng"
    async with fabric(tmp_path) as (_, nursery):
        one = await join(nursery, tmp_path, 1)
        file = CaptureFile(path)
        async with follow(tmp_path / "f.control", "capture") as batches:
            await anext(batches)
            await one.command(bytes(6))
            await receive(batches, file, count=2)
        file.close()
    first, second = read(path)
    assert (first["frame.interface_name"], second["frame.interface_name"]) == ("vm1", "array-a")
    assert "Test Unit Ready" in first["_ws.col.Info"]


def records(count: int, size: int = 1000) -> list[Record]:
    return [Record(n, Interface("a"), bytes([0x22]) + bytes(size)) for n in range(count)]


def test_captures_rotate_by_size_and_keep_as_many_files_as_they_shall(tmp_path: Path) -> None:
    path = tmp_path / "r.pcapng"
    file = CaptureFile(path, size=5000, files=3)
    for record in records(30):
        file.write([record])
    file.close()
    files = [path, tmp_path / "r.1.pcapng", tmp_path / "r.2.pcapng"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(one.stat().st_size < 5200 for one in files)
    times = [float(packet["frame.time_epoch"]) for one in reversed(files) for packet in read(one)]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(29e-9)


def test_a_capture_of_one_large_frame_after_the_other_still_goes_on(tmp_path: Path) -> None:
    file = CaptureFile(tmp_path / "big.pcapng", size=100, files=2)
    file.write(records(5, 2000))
    file.close()
    assert file.count == 5
    assert len(list(tmp_path.iterdir())) == 2


def test_a_capture_that_cannot_be_made_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(VhostfcError, match=r"no/x\.pcapng: cannot capture there: No such file"):
        CaptureFile(tmp_path / "no/x.pcapng")
    full = CaptureFile(tmp_path / "x.pcapng")
    full._stream.close()
    full._stream = open("/dev/full", "wb", buffering=0)  # noqa: SIM115  CaptureFile.close() does
    with pytest.raises(VhostfcError, match="the capture ends: No space left"):
        full.write(records(1))
    full.close()


def test_a_sniffer_keeps_no_more_than_its_room() -> None:
    sniffer = Sniffer(room=3000)
    for record in records(5):
        sniffer.put(record)
    assert sniffer.dropped == 3
    assert len(sniffer.take()) == 2
    sniffer.put(records(1)[0])
    assert len(sniffer.take()) == 1


def test_a_batch_of_nonsense_is_an_error() -> None:
    batch = capture.pack(records(2), 1)
    assert capture.unpack(batch) == records(2)
    for nonsense in ({}, {"frames": [[1]]}, {"frames": [["x", "a", "b", "!", ""]]}):
        with pytest.raises(VhostfcError):
            capture.unpack(nonsense)


# ---------------------------------------------------------------- the tree


async def test_the_topology_says_who_is_where_since_when(tmp_path: Path) -> None:
    zone = f'[[zone]]\nname = "vm1"\nmembers = ["{wwpn(1)}", "{wwpn(5)}", "50:06:01:60:00:00:00:01"]\n'
    async with fabric(tmp_path, TARGET + unit(0) + zone) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        topology = await call(tmp_path / "f.control", "topology")
        (f_port,), (target,) = topology["f_ports"], topology["targets"]
        assert (f_port["holder"], f_port["kind"], f_port["link"]) == ("vm1", "link", "up")
        assert [n["port_id"] for n in f_port["n_ports"]] == [f"{one.port.port_id:06x}"]
        (login,) = target["logins"]
        assert (login["wwpn"], login["holder"], login["image"]) == (str(wwpn(1)), "vm1", True)
        assert 0 <= login["since"] - f_port["n_ports"][0]["since"] < 10
        assert [member["here"] for member in topology["zones"][0]["members"]] == [True, False, True]
        await san.change({"change": "mask", "unit": "array-a:0", "allow": []}, lasting=False)
        await call(tmp_path / "f.control", "fault", {"do": "add", "fault": [{"what": "busy"}]})
        lines = topology_tree(await call(tmp_path / "f.control", "topology"))
        assert lines[0].startswith("fabric, switch 50:01")
        assert any("F_Port 1: vm1 (link, process " in line and line.startswith("├─ ") for line in lines)
        assert any("LUN 0: memory" in line and "for none, with a fault" in line for line in lines)
        assert any(line.endswith(f"{wwpn(5)}, not here") for line in lines)
        assert lines[-1] == "└─ fault busy-1: busy, active, 0 hits"


async def test_the_topology_shows_what_a_driver_says_of_its_hba(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        topology = await call(tmp_path / "f.control", "topology")
        assert topology["f_ports"][0]["n_ports"][0]["hba"] is None
        about: dict[int, bytes] = {
            HbaAttribute.MODEL: b"X-1".ljust(256, b"\0"),
            HbaAttribute.OS_NAME_AND_VERSION: b"Linux v6.1\0\0",
        }
        registration = fdmi.RegisterHba(wwpn(1), (wwpn(1),), {**about, HbaAttribute.MAXIMUM_CT_PAYLOAD: bytes(4)})
        host = fdmi.RegisterAttributes(fdmi.Fdmi.RPA, wwpn(1), {PortAttribute.HOST_NAME: b"node7\0"})
        for payload in (registration.pack(), host.pack()):
            frame = ct.ct_request(one.port.port_id, Address.MANAGEMENT_SERVER, 0x7000, payload)
            san.door.arrive(1, frame.pack())
        topology = await call(tmp_path / "f.control", "topology")
        (n_port,) = topology["f_ports"][0]["n_ports"]
        told = {"model": "X-1", "os_name_and_version": "Linux v6.1", "host_name": "node7"}
        assert n_port["hba"] == {"identifier": str(wwpn(1)), **told}
        words = "model: X-1, os_name_and_version: Linux v6.1, host_name: node7"
        assert any(line.endswith(words) for line in topology_tree(topology))
