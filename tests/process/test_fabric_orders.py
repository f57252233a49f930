"""The fabric's commands as their users type them: faults that reach a guest on the fast path, captures, events."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fabric.test_pcapng import faulty, read
from tests.lab.san import San, UnitSpec, wwpn


@pytest.fixture(scope="module")
def san(tmp_path_factory: pytest.TempPathFactory) -> Iterator[San]:
    directory = tmp_path_factory.mktemp("orders")
    capture = ("--capture", str(directory / "all.pcapng"))
    with San(directory, [UnitSpec(0, 'size = "4MiB"')], fabric_options=capture) as network:
        network.start_adapter(1)
        yield network


def vhostfc(*words: object, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vhostfc", *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def fault(san: San, *words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(vhostfc("fault", san.fabric_control, *words, "--json"))
    return found


def bench(san: San, *words: str, status: int = 0, number: int = 1) -> dict[str, Any]:
    out = subprocess.run(
        [
            *(sys.executable, "-m", "vhostfc", "bench", str(san.socket(number)), "--unit", "0:0", "--json"),
            *("--seconds", "0.4", "--runs", "1", "--warmup", "0", *words),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert out.returncode == status, out.stderr
    result: dict[str, Any] = json.loads(out.stdout)
    return result


def test_a_guest_on_the_fast_path_meets_a_fault_and_then_does_not(san: San) -> None:
    fast = bench(san)
    assert fault(san, "add", "latency", "seconds=0.05")["faults"] == ["latency-1"]
    slow = bench(san, "--iodepth", "4")
    assert slow["latency_us"]["p50"] >= 50_000
    assert slow["errors"] == 0
    assert fault(san, "clear")["cleared"] == ["latency-1"]
    again = bench(san)
    assert again["iops"] > 10 * slow["iops"]
    assert fast["iops"] > 10 * slow["iops"]
    fault(san, "add", "medium-error", "target=array-a", "lun=0", "lba=0", "on=read")
    assert bench(san, "--iodepth", "1", status=1)["errors"] > 0
    fault(san, "clear")


def test_data_are_right_where_commands_are_late_and_answers_come_twice(san: San) -> None:
    fault(san, "add", "duplicate", "r_ctl=7", "rate=0.2")
    fault(san, "add", "delay", "seconds=0.001", "to=0.002", "r_ctl=6", "rate=0.3")
    fault(san, "add", "latency", "mean=0.0005")
    assert bench(san, "--rw", "randwrite", "--verify", "--iodepth", "4")["errors"] == 0
    assert {one["state"] for one in fault(san, "list")["faults"]} == {"active"}
    fault(san, "clear")


def test_everything_goes_as_frames_where_the_fast_path_is_off(san: San) -> None:
    """The reference: the same data, the same answers, and no medium in the adapter's hands."""
    san.start_adapter(2, fabric="fast_path = false")
    for words in (["randrw", "--bs", "4k"], ["write", "--bs", "256k"], ["randwrite", "--bs", "512"]):
        assert bench(san, "--verify", "--iodepth", "8", "--rw", *words, number=2)["errors"] == 0
    opened = san.fabric_status()["targets"][0]["units"][0]["open"]
    assert [one["adapter"] for one in opened if one["fast"]] in ([], ["vm1"])
    assert "vm2" not in {one["adapter"] for one in opened}


def test_a_script_is_played_and_its_events_are_heard(san: San, tmp_path: Path) -> None:
    script = tmp_path / "script.toml"
    script.write_text(
        '[[fault]]\nname = "down"\nwhat = "link-down"\nholder = "vm1"\nafter = 0.2\nfor = 0.3\n'
        '[[fault]]\nname = "gone"\nwhat = "target-gone"\ntarget = "array-a"\nafter = 0.3\nfor = 0.1\n'
    )
    listener = subprocess.Popen(
        [sys.executable, "-m", "vhostfc", "events", str(san.fabric_control), "--json", "--last", "1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert listener.stdout is not None
    listener.stdout.readline()
    assert "down, gone" in vhostfc("fault", san.fabric_control, "run", script, "--wait")
    san.wait_online(1)
    listener.send_signal(signal.SIGINT)
    events = [json.loads(line) for line in listener.communicate(timeout=30)[0].splitlines()]
    told = [(event["event"], event.get("fault")) for event in events]
    for event in (("fault begins", "down"), ("fault ends", "down"), ("fault begins", "gone"), ("fault ends", "gone")):
        assert event in told
    assert [event["holder"] for event in events if event["event"] == "link down"] == ["vm1"]


def test_a_running_fabric_is_captured(san: San, tmp_path: Path) -> None:
    path = tmp_path / "some.pcapng"
    capture = subprocess.Popen(
        [sys.executable, "-m", "vhostfc", "capture", str(san.fabric_control), str(path), "--count", "20"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while capture.poll() is None and time.monotonic() < deadline:
        vhostfc("rescan", san.control(1))
    assert capture.communicate(timeout=30)[1] == f"20 frames in {path}\n"
    # It may begin in the middle of an exchange, of which a dissector then does not know what it is about.
    packets = read(path)
    assert len(packets) == 20
    assert {packet["frame.interface_name"] for packet in packets} >= {"vm1"}


def test_what_the_whole_run_looked_like_to_wireshark(san: San) -> None:
    """All tests of this file before, as `vhostfc fabric --capture` wrote them down."""
    packets = read(san.directory / "all.pcapng")
    assert len(packets) > 100
    assert not faulty(packets)
    assert {"vm1", "switch", "array-a"} <= {packet["frame.interface_name"] for packet in packets}


def test_changes_and_the_tree(san: San) -> None:
    vhostfc("unit", san.fabric_control, "add", "array-a:3", "size=1MiB", "--keep")
    vhostfc("mask", san.fabric_control, "array-a:3", wwpn(1), wwpn(2))
    tree = vhostfc("topology", san.fabric_control)
    assert "LUN 3: memory" in tree
    assert f"for {wwpn(1)}, {wwpn(2)}" in tree
    assert "vm1 (link, process" in tree
    san.reload()
    assert "LUN 3: memory" in vhostfc("topology", san.fabric_control)
    assert "array-a:3" in vhostfc("changes", san.fabric_control)
    vhostfc("changes", san.fabric_control, "--undo")
    assert "LUN 3" not in vhostfc("topology", san.fabric_control)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fault", "add"), "fault {} add: expected: add KIND [KEY=VALUE]..."),
        (("fault", "add", "lose", "rate"), "'rate': expected KEY=VALUE"),
        (("fault", "run", "/no/script.toml"), "/no/script.toml: No such file"),
        (("zone", "add", "z"), "add and drop name members, remove does not"),
    ],
)
def test_what_cannot_be_understood_is_a_usage_error(san: San, words: tuple[str, ...], said: str) -> None:
    command, *rest = words
    assert said.format(san.fabric_control) in vhostfc(command, san.fabric_control, *rest, status=2)
