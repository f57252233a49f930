"""`probe` and `bench` as the program calls them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.frontend.fakebackend import Disk, FakeBackend, check
from vhostfc.errors import ConfigError, VhostfcError
from vhostfc.frontend import bench as bench_module
from vhostfc.frontend.bench import bench, compare, null_path
from vhostfc.frontend.client import BackendError
from vhostfc.frontend.cputime import Thread, process_cpu, threads, used
from vhostfc.frontend.options import BenchOptions, parse_size, parse_unit
from vhostfc.frontend.probe import probe, size_text
from vhostfc.frontend.scan import UnitInfo

QUICK = {"seconds": 0.05, "warmup": 0.0, "iodepth": 4}


async def test_probe_tells_units(socket_path: Path) -> None:
    """JSON holds what a script needs; the text is a table."""
    fake = FakeBackend({(0, 0): Disk(blocks=2048, attention=1), (3, 5): Disk(block_size=4096, naa=bytes(8))})
    async with fake.listen(socket_path):
        result = await probe(socket_path)

    data = json.loads(json.dumps(result.as_json()))
    assert data["units"][0] == {
        "target": 0,
        "lun": 0,
        "type": 0,
        "blocks": 2048,
        "block_size": 512,
        "vendor": "VHOSTFC",
        "product": "FAKE DISK",
        "revision": "0001",
        "serial": "S0001",
        "naa": "60014380123456780000000000000001",
    }
    assert [(unit["target"], unit["lun"]) for unit in data["units"]] == [(0, 0), (3, 5)]
    assert data["queues"] == 4
    lines = result.as_text().splitlines()
    assert lines[2].split() == [
        "0:0", "disk", "VHOSTFC", "FAKE", "DISK", "1", "MiB", "512", "60014380123456780000000000000001",
    ]  # fmt: skip


async def test_probe_of_nothing(socket_path: Path, tmp_path: Path) -> None:
    """No units is an answer; no socket, or nobody behind it, is an error that says which."""
    async with FakeBackend({}).listen(socket_path):
        assert (await probe(socket_path)).as_text().endswith("no units")
    with pytest.raises(BackendError, match=f"{socket_path}: nobody listens there"):
        await probe(socket_path)
    with pytest.raises(BackendError, match="nothing: there is no such socket"):
        await probe(tmp_path / "nothing")
    with pytest.raises(BackendError, match="cannot connect"):
        await probe(Path("/" + "x" * 200))


@pytest.mark.parametrize("rw", ["randread", "randwrite", "randrw", "read", "write"])
@pytest.mark.parametrize("verify", [False, True])
async def test_bench_of_every_kind(backend: FakeBackend, socket_path: Path, rw: str, verify: bool) -> None:
    """The numbers that the program promises are there and agree with each other."""
    options = BenchOptions(rw=rw, block_size=1024, queues=2, unit=(0, 0), verify=verify, **QUICK)  # type: ignore[arg-type]
    result = await bench(socket_path, options)
    data = json.loads(json.dumps(result.as_json()))

    assert data["errors"] == result.errors == 0
    assert data["iops"] > 0
    assert data["bytes_per_s"] == pytest.approx(data["iops"] * 1024, rel=0.01)
    latency = data["latency_us"]
    assert 0 < latency["min"] <= latency["p50"] <= latency["p99"] <= latency["p999"] <= latency["max"]
    assert latency["mean"] > 0
    assert ("read" in data and "write" in data) == (rw == "randrw")
    assert data["cpu"]["backend"] is None  # it is this very process
    assert verify == (data.get("verified_blocks", 0) > 0)
    assert any(request.cdb[0] in (0x2A, 0x8A) for request in backend.commands) == options.writes
    assert "ERRORS" not in result.as_text()
    if rw == "read" and not verify:  # each queue has a slice of its own
        lbas = {int.from_bytes(request.cdb[2:6], "big") for request in backend.commands if request.cdb[0] == 0x28}
        assert {lba % 2 for lba in lbas} == {0}


async def test_bench_by_count(backend: FakeBackend, socket_path: Path) -> None:
    """So many commands, shared by the queues, and no more."""
    options = BenchOptions(commands=100, queues=2, seconds=0, warmup=0, unit=(0, 0))
    assert (await bench(socket_path, options)).load.commands == 100


async def test_runs_and_medians(backend: FakeBackend, socket_path: Path) -> None:
    """Each run is told; the figure is their median."""
    result = await bench(socket_path, BenchOptions(commands=40, seconds=0, warmup=0, runs=3))
    data = result.as_json()

    assert result.load.commands == data["commands"] == 120
    assert len(data["runs"]) == 3
    assert data["iops"] == sorted(run["iops"] for run in data["runs"])[1]
    assert data["cpu"]["driver_ns_per_command"] == pytest.approx(
        sorted(run["driver_ns_per_command"] for run in data["runs"])[1]
    )
    assert "median of 3 runs" in result.as_text()


async def test_packed_rings_are_asked_for(backend: FakeBackend, socket_path: Path) -> None:
    """A back end without them is an error, not a bench of something else."""
    with pytest.raises(BackendError, match="does not offer packed rings"):
        await bench(socket_path, BenchOptions(packed=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rw", ["randread", "randrw", "write"])
async def test_null_path(packed: bool, rw: str) -> None:
    """The whole workload, every command answered well, with nobody there."""
    options = BenchOptions(
        rw=rw, packed=packed, commands=3000, seconds=0, warmup=0, runs=2, queues=2, unit=(0, 0), iodepth=100
    )
    runs = await null_path(options)

    assert [run.load.commands for run in runs] == [3000, 3000]
    assert not any(run.load.errors or run.load.kicks or run.load.waits for run in runs)
    assert all(run.load.cpu_seconds > 0 for run in runs)


async def test_null_path_refuses_what_cannot_be() -> None:
    """As a unit of that geometry would."""
    with pytest.raises(VhostfcError, match="--null-path: commands of 2048 bytes"):
        await null_path(BenchOptions(block_size=2048), UnitInfo(0, 0, blocks=100, block_size=4096))


async def test_what_figures_are_to_be_seen_against(backend: FakeBackend, socket_path: Path) -> None:
    """The null path and the bare copy beside the back end's figures."""
    options = BenchOptions(commands=50, seconds=0, warmup=0, null_path=True, bare_copy=True)
    result = await bench(socket_path, options)
    data = json.loads(json.dumps(result.as_json()))

    assert data["null_path"]["driver_ns_per_command"] > 0
    assert data["bare_copy_ns"] > 0
    assert data["backend_to_bare_copy"] is None  # the back end is this very process
    assert "null path: " in result.as_text()
    assert "bare copy: " in result.as_text()


async def test_two_back_ends_in_turn(backend: FakeBackend, socket_path: Path, tmp_path: Path) -> None:
    """A B A B, a connection each, and the ratio of the pairs."""
    other = FakeBackend()
    async with other.listen(tmp_path / "other.sock"):
        options = BenchOptions(commands=60, seconds=0, warmup=0, runs=3, verify=True, rw="randrw", unit=(0, 0))
        result = await compare((socket_path, tmp_path / "other.sock"), options)
    data = json.loads(json.dumps(result.as_json()))

    assert (backend.connections, other.connections) == (3, 3)
    assert (data["errors"], len(data["a"]["runs"]), len(data["b"]["runs"])) == (0, 3, 3)
    assert data["b_to_a"]["iops"] > 0
    assert data["b_to_a"]["backend_ns_per_command"] is None
    assert data["a"]["socket"] == str(socket_path)
    assert result.as_text().splitlines()[-1].startswith("B / A: commands/s ")


async def test_bench_verifies(backend: FakeBackend, socket_path: Path) -> None:
    """A write that goes astray is found and told, and counts as an error."""

    def stray(request: object, data: bytes, room: int) -> object:
        cdb = request.cdb  # type: ignore[attr-defined]
        if cdb[0] == 0x2A and int.from_bytes(cdb[2:6], "big") == 100 and cdb[8] == 2:
            object.__setattr__(request, "cdb", cdb[:5] + b"\x66" + cdb[6:])
        return backend.execute(request, data, room)  # type: ignore[arg-type]

    backend.answer = stray  # type: ignore[assignment]
    options = BenchOptions(rw="write", block_size=1024, unit=(0, 0), verify=True, commands=128, seconds=0, warmup=0)
    result = await bench(socket_path, options)

    assert result.errors
    assert "ERRORS" in result.as_text()
    data = result.as_json()
    assert data["error_kinds"].keys() & {"stale block", "misplaced block"}
    assert "LBA" in data["first_error"]


async def test_bench_counts_errors(backend: FakeBackend, socket_path: Path) -> None:
    """What a unit answers badly is a number and a text, not an exception."""
    backend.answer = lambda request, data, room: (
        check(3, 0x11, 0) if request.cdb[0] == 0x28 else backend.execute(request, data, room)
    )
    result = await bench(socket_path, BenchOptions(commands=10, seconds=0, warmup=0))
    assert (result.errors, result.as_json()["error_kinds"]) == (10, {"status": 10})
    assert "sense 3/11/00" in str(result.first_error)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"rw": "scribble"}, "--rw: 'scribble' is unknown; one of randread, randwrite, randrw, read, write"),
        ({"block_size": 1000}, "--bs: 1000 bytes; a multiple of 512"),
        ({"block_size": 128 << 20}, "--bs: .* at most 64M"),
        ({"iodepth": 0}, "--iodepth: 0; 1 to 1024"),
        ({"queues": 0}, "--queues: 0; 1 to 254"),
        ({"seconds": 0.0}, "--seconds: 0.0; more than 0"),
        ({"seconds": float("nan")}, "--seconds: nan"),
        ({"read_percent": 101}, "--read-percent"),
        ({"runs": 0}, "--runs: 0; 1 to 1000"),
        ({"rw": "randwrite"}, "--unit: --rw randwrite writes, so it must be told where"),
        ({"verify": True}, "--unit: --verify writes the blocks that it checks, so it must be told where"),
    ],
)
def test_options_say_what_is_wrong(wrong: dict[str, object], text: str) -> None:
    """Each mistake is named with the option and what is allowed."""
    with pytest.raises(ConfigError, match=text):
        BenchOptions(**wrong)  # type: ignore[arg-type]


def test_options_tell_all_problems_at_once() -> None:
    """Nobody likes to mend one mistake at a time."""
    with pytest.raises(ConfigError) as error:
        BenchOptions(rw="scribble", iodepth=0, queues=0)
    assert len(error.value.problems) == 3


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"unit": (4, 0)}, "--unit 4:0: there is no such disk; there are 0:0, 1:0"),
        ({}, "say which unit with --unit; there are 0:0, 1:0"),
        ({"unit": (1, 0), "block_size": 2048}, "--bs: 2048 bytes are not a multiple of unit 1:0's blocks of 4096"),
        ({"unit": (0, 0), "block_size": 1 << 20}, "--bs: 1 x 1048576 bytes are more than unit 0:0 has"),
        ({"unit": (0, 0), "queues": 5}, "5 request queues wanted, the back end has 4"),
    ],
)
async def test_bench_refuses_what_is_not_there(socket_path: Path, wrong: dict[str, object], text: str) -> None:
    """What only the back end knows is checked before anything is written."""
    fake = FakeBackend({(0, 0): Disk(), (1, 0): Disk(block_size=4096)})
    async with fake.listen(socket_path):
        with pytest.raises(VhostfcError, match=text):
            await bench(socket_path, BenchOptions(**wrong))  # type: ignore[arg-type]
    assert not any(request.cdb[0] in (0x28, 0x2A) for request in fake.commands)


async def test_bench_without_indirect_descriptors_knows_its_depth(socket_path: Path) -> None:
    """A ring holds a third as many commands then."""
    fake = FakeBackend()
    fake.offered &= ~(1 << 28)
    async with fake.listen(socket_path):
        with pytest.raises(VhostfcError, match="--iodepth: 100 in flight, but a ring of 128 holds 42 commands"):
            await bench(socket_path, BenchOptions(iodepth=100))


def test_sizes_and_units() -> None:
    """What people write."""
    assert [parse_size(text) for text in ("512", "4k", "4K", "64KiB", "1M", "1 g")] == [
        512, 4096, 4096, 65536, 1 << 20, 1 << 30,
    ]  # fmt: skip
    assert parse_unit("3:16383") == (3, 16383)
    for text in ("", "4x", "-1", "k"):
        with pytest.raises(ConfigError, match="--bs"):
            parse_size(text)
    for text in ("", "1", "1:2:3", "256:0", "0:16384", "a:b"):
        with pytest.raises(ConfigError, match="--unit"):
            parse_unit(text)
    assert [size_text(size) for size in (0, 512, 1536, 1 << 40, 1 << 60)] == [
        "0 B", "512 B", "1.5 KiB", "1 TiB", "1.049e+06 TiB",
    ]  # fmt: skip


def test_cpu_of_a_process(tmp_path: Path) -> None:
    """All threads add up; a process that cannot be seen has none."""
    for thread, nanoseconds in ((10, 1_500_000_000), (11, 500_000_000)):
        (tmp_path / "10" / "task" / str(thread)).mkdir(parents=True)
        (tmp_path / "10" / "task" / str(thread) / "schedstat").write_text(f"{nanoseconds} 5 6\n")
    (tmp_path / "10" / "task" / "12").mkdir()
    assert process_cpu(10, tmp_path) == 2.0
    assert process_cpu(99, tmp_path) is None
    before = threads(10, tmp_path)
    (tmp_path / "10" / "task" / "10" / "schedstat").write_text("2500000000 5 6\n")
    (tmp_path / "10" / "task" / "10" / "comm").write_text("worker\n")
    (tmp_path / "10" / "task" / "11" / "comm").write_text("worker\n")
    (tmp_path / "10" / "task" / "11" / "status").write_text("Name:\tx\nvoluntary_ctxt_switches:\t7\n")
    after = threads(10, tmp_path)
    assert after[11] == Thread("worker", 0.5, 7)
    assert used(before, after) == {"worker": 1.0, "worker 2": 0.0}
    assert (process_cpu(os.getpid()) or 0) > 0


def test_units_have_numbers_of_their_own() -> None:
    """The same from every side, by what the array calls the unit."""
    one = UnitInfo(0, 0, naa="6001")
    assert bench_module.unit_number(one) == bench_module.unit_number(UnitInfo(7, 3, naa="6001"))
    assert bench_module.unit_number(one) != bench_module.unit_number(UnitInfo(0, 0, naa="6002"))
