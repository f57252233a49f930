"""The configuration files: what is right, and that all that is wrong is told with its line."""

from __future__ import annotations

import math
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfc.config import (
    AdapterConfig,
    FabricConfig,
    PortConfig,
    UnitConfig,
    control_for,
    load,
    load_adapter,
    load_fabric,
)
from vhostfc.errors import ConfigError
from vhostfc.fabricfile import NULL_SIZE
from vhostfc.fc.wwn import Wwn
from vhostfc.tomlfile import Document, Table
from vhostfc.values import derived_wwn, seconds, size

HOST, HOST_NODE = Wwn(0x5001438012345678), Wwn(0x5001438012345679)
ARRAY, ARRAY_NODE = Wwn(0x5006016000000001), Wwn(0x5006016000000000)

ADAPTER = """
[[port]]
wwpn = "50:01:43:80:12:34:56:78"
wwnn = "5001438012345679"
[fabric]
emulated = "/run/vhostfc/fabric.sock"
"""
FABRIC = """
[fabric]
socket = "/run/vhostfc/fabric.sock"
[[target]]
name = "array-a"
wwpn = "0x5006016000000001"
wwnn = "naa.5006016000000000"
"""


def write(directory: Path, text: str, name: str = "vm1.toml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def problems(path: Path, kind: Any = load) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        kind(path, environ={})
    return [problem.removeprefix(str(path)) for problem in caught.value.problems]


def unit(directory: Path, text: str) -> UnitConfig:
    return load_fabric(write(directory, FABRIC + "[[target.unit]]\n" + text), environ={}).targets[0].units[0]


# ---------------------------------------------------------------- what is right


def test_the_shortest_adapter(tmp_path: Path) -> None:
    path = write(tmp_path, ADAPTER)
    assert load_adapter(path, environ={}) == AdapterConfig(
        path=path,
        name="vm1",
        ports=(PortConfig(HOST, HOST_NODE),),
        emulated=Path("/run/vhostfc/fabric.sock"),
        socket=Path("/run/vhostfc/vm1/vhost.sock"),
        control=Path("/run/vhostfc/vm1/vhost.control"),
        state=Path("/var/lib/vhostfc/vm1"),
        login="always",
        fast_path=True,
        hold_timeout=30.0,
        command_timeout=60.0,
        workers=1,
        cpus=(),
        poll_us=50,
        drain_timeout=1.0,
    )


def test_an_adapter_that_says_everything(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        state = "state"
        port = [{ wwpn = "5001.4380.1234.5678", wwnn = "50-01-43-80-12-34-56-79" }]
        [fabric]
        emulated = "fabric.sock"
        login = "start"
        fast_path = false
        hold_timeout = 5
        command_timeout = 7.5
        [vhost]
        socket = "vm1.sock"
        workers = 4
        poll_us = 0
        drain_timeout = 0.5
        control = "steer"
        """,
    )
    assert load(path, environ={"STATE_DIRECTORY": "/elsewhere"}) == AdapterConfig(
        path=path,
        name="vm1",
        ports=(PortConfig(HOST, HOST_NODE),),
        emulated=tmp_path / "fabric.sock",
        socket=tmp_path / "vm1.sock",
        control=tmp_path / "steer",
        state=tmp_path / "state",
        login="start",
        fast_path=False,
        hold_timeout=5.0,
        command_timeout=7.5,
        workers=4,
        poll_us=0,
        drain_timeout=0.5,
    )


def test_workers_on_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 3})

    def wrong(text: str) -> str:
        (problem,) = problems(write(tmp_path, ADAPTER + text))
        return problem

    adapter = load(write(tmp_path, ADAPTER + "[vhost]\nworkers = 2\ncpus = [3, 2]\n"))
    assert isinstance(adapter, AdapterConfig)
    assert adapter.cpus == (3, 2)
    assert "vhost.cpus: names 1 CPUs for 2 workers; name one for each" in wrong("[vhost]\nworkers = 2\ncpus = [2]\n")
    assert "vhost.cpus: CPU 4 is none of those that this process may use" in wrong("[vhost]\ncpus = [4]\n")


def test_a_fabric_with_everything(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        FABRIC.replace("[[target]]", 'fence_timeout = 3\nwwn = "10:00:00:00:00:00:00:01"\n[[target]]')
        + """
        [[target.unit]]
        lun = 0
        size = "1GiB"
        allow = ["5001438012345678"]
        [[target.unit]]
        lun = 16383
        file = "disk.img"
        size = 4096
        block_size = 4096
        cache = "none"
        read_only = true
        [[target.unit]]
        lun = 2
        block = "/dev/vg/disk"
        [[target.unit]]
        lun = 3
        null = true
        allow = []
        [[zone]]
        name = "vm1"
        members = ["5001438012345678", "5006016000000001"]
        """,
        "san.toml",
    )
    config = load(path, environ={"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"})
    assert isinstance(config, FabricConfig)
    assert (config.name, config.wwn, config.fence_timeout) == ("san", Wwn(0x1000000000000001), 3.0)
    assert (config.control, config.state) == (Path("/run/vhostfc/fabric.control"), Path("/var/lib/a"))
    (target,) = config.targets
    assert (target.name, target.wwpn, target.wwnn, target.line) == ("array-a", ARRAY, ARRAY_NODE, 6)
    assert [unit.lun for unit in target.units] == [0, 16383, 2, 3]
    memory, file, block, null = target.units
    assert (memory.size, memory.block_size, memory.cache, memory.allow) == (
        1 << 30,
        512,
        "writeback",
        frozenset([HOST]),
    )
    assert (file.file, file.size, file.block_size, file.cache) == (tmp_path / "disk.img", 4096, 4096, "none")
    assert (file.read_only, file.allow) == (True, None)
    assert (block.block, block.size) == (Path("/dev/vg/disk"), None)
    assert (null.null, null.size, null.allow) == (True, NULL_SIZE, frozenset())
    (zone,) = config.zones
    assert (zone.name, zone.members) == ("vm1", frozenset([HOST, ARRAY]))


def test_a_fabric_that_says_nothing_of_itself(tmp_path: Path) -> None:
    config = load_fabric(write(tmp_path, "", "fabric.toml"), environ={})
    assert config.socket == Path("/run/vhostfc/fabric.sock")
    assert config.wwn == derived_wwn("fabric") != derived_wwn("other")
    assert config.wwn.naa == 5
    assert (config.targets, config.zones, config.fence_timeout) == ((), (), 2.0)


def test_one_medium_at_two_targets_is_one_unit(tmp_path: Path) -> None:
    second = FABRIC.partition("[[target]]")[2].replace("array-a", "array-b").replace('01"', '02"', 1)
    medium = '[[target.unit]]\nlun = 0\nfile = "disk"\nsize = "1MiB"\n'
    text = FABRIC + medium + "[[target]]" + second + medium
    assert len(load_fabric(write(tmp_path, text)).targets) == 2
    differing = text + 'cache = "none"\nread_only = true\n'
    found = problems(write(tmp_path, differing))
    assert found == [
        f":20: target.unit.cache: differs from the unit in line 8, which has the same medium {tmp_path / 'disk'}",
        f":21: target.unit.read_only: differs from the unit in line 8, which has the same medium {tmp_path / 'disk'}",
    ]


def test_physical_blocks(tmp_path: Path) -> None:
    text = FABRIC + '[[target.unit]]\nlun = 0\nsize = "1MiB"\n'
    (target,) = load_fabric(write(tmp_path, text)).targets
    assert target.units[0].physical_block_size is None
    (target,) = load_fabric(write(tmp_path, text + "physical_block_size = 4096\n")).targets
    assert target.units[0].physical_block_size == 4096
    (problem,) = problems(write(tmp_path, text + "block_size = 4096\nphysical_block_size = 512\n"))
    assert "target.unit.physical_block_size: 512 is less than block_size, 4096" in problem


def test_a_unit_that_is_shared_is_as_it_is_at_home(tmp_path: Path) -> None:
    second = FABRIC.partition("[[target]]")[2].replace("array-a", "array-b").replace('01"', '02"', 1)
    home = '[[target.unit]]\nlun = 3\nsize = "1MiB"\nblock_size = 4096\n'
    text = FABRIC + home + "[[target]]" + second + 'group = 2\naccess = "standby"\n[[target.unit]]\nlun = 0\n'
    one, two = load_fabric(write(tmp_path, text + 'share = "array-a:3"\nallow = []\n')).targets
    (here,) = two.units
    assert (here.lun, here.size, here.block_size, here.allow) == (0, 1 << 20, 4096, frozenset())
    assert here.home == (one.wwpn, 3)
    assert (one.group, one.access, two.group, two.access) == (1, "optimized", 2, "standby")
    assert problems(write(tmp_path, text + 'share = "array-a:4"\n')) == [
        ":20: target.unit.share: the unit array-a:4 is not in this file"
    ]
    assert problems(write(tmp_path, text + 'share = "array-b:0"\nsize = "1MiB"\n')) == [
        ":20: target.unit.share: the unit array-b:0 is shared itself; write the LUN where it has its medium",
        ":21: target.unit.size: does not go with share: it is as at the unit's home",
    ]
    assert 'like "array-a:0"' in problems(write(tmp_path, text + 'share = "array-a"\n'))[0]
    assert problems(write(tmp_path, text.replace("group = 2", "group = 1") + 'share = "array-a:3"\n')) == [
        ":17: target.access: differs from the target in line 4, which is in the same group 1"
    ]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (512, 512),
        ("512", 512),
        ("512 B", 512),
        ("1GiB", 1 << 30),
        ("512MB", 512_000_000),
        ("10 GB", 10_000_000_000),
        (" 1.5 TiB ", 3 << 39),
        ("4kB", 4000),
        ("4KB", 4000),
        ("7EiB", 7 << 60),
    ],
)
def test_sizes(text: object, number: int) -> None:
    assert size(text) == number


@pytest.mark.parametrize(
    "text", ["", "GiB", "1G", "1gib", "-1", -1, 0, "0", True, 1.5, "0.3KiB", "8EiB", "1e9", "١KiB", None]
)
def test_sizes_that_are_none(text: object) -> None:
    with pytest.raises(ValueError, match=r"^is "):
        size(text)


@given(st.integers(1, (1 << 63) - 1))
def test_every_whole_number_of_bytes_is_a_size(number: int) -> None:
    assert size(number) == size(f"{number}B") == number


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 61, "1", True, None])
def test_times_have_bounds(value: object) -> None:
    with pytest.raises(ValueError, match=r"expected a number of seconds from 0 to 60$"):
        seconds(0, 60)(value)


def test_where_the_control_socket_is() -> None:
    assert control_for(Path("/run/vm.1/vhost.sock")) == Path("/run/vm.1/vhost.control")
    assert control_for(Path("/run/vm.1")) == Path("/run/vm.1.control")


# ---------------------------------------------------------------- what is wrong


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    found = problems(
        write(
            tmp_path,
            """
            name = "x"
            [[port]]
            wwpn = "50:01"
            [[port]]
            wwpn = "5001438012345678"
            wwnn = 7
            [fabric]
            login = "sometimes"
            fast_path = "yes"
            hold_timeout = -1
            comand_timeout = 3
            [vhost]
            workers = 65
            drain_timeout = "1s"
            """,
        )
    )
    assert [re.sub(r"[;,] .*", "", line) for line in found] == [
        ":2: name: unknown key",
        ":3: port.wwnn: is missing",
        ":4: port.wwpn: '50:01' is not a World Wide Name: expected 16 hexadecimal digits",
        ":5: port: is one too many: an adapter has exactly one port for now",
        ":7: port.wwnn: is 7",
        ":8: fabric.emulated: is missing",
        ":9: fabric.login: is 'sometimes'",
        ":10: fabric.fast_path: is 'yes'",
        ":11: fabric.hold_timeout: is -1",
        ":12: fabric.comand_timeout: unknown key",
        ":14: vhost.workers: is 65",
        ":15: vhost.drain_timeout: is '1s'",
    ]
    assert found[9].endswith("; did you mean command_timeout?")
    assert found[0].endswith("; allowed here: fabric, port, state, vhost")
    assert found[10].endswith("; expected a whole number from 1 to 64")
    assert found[6].endswith("; expected 'always' or 'start'")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('lun = 16384\nsize = "1MiB"', r":9: target.unit.lun: is 16384; expected a whole number from 0 to 16383"),
        ('size = "1MiB"', r":8: target.unit.lun: is missing; write lun = 0, .*"),
        ("lun = 0", r":8: target.unit: has no medium; write one of size = .*"),
        ('lun = 0\nfile = "a"\nblock = "b"', r":11: target.unit.block: and file exclude each other: .*"),
        ('lun = 0\nfile = "a"\nnull = true', r":11: target.unit.null: and file exclude each other: .*"),
        ('lun = 0\nblock = "a"\nsize = 512', r":11: target.unit.size: does not go with block: .*"),
        ("lun = 0\nsize = 1000", r":10: target.unit.size: 1000 bytes is not a multiple of block_size, 512"),
        ("lun = 0\nsize = 512\nblock_size = 4096", r":10: target.unit.size: 512 bytes is not a multiple .* 4096"),
        ("lun = 0\nsize = 512\nblock_size = 1024", r":11: target.unit.block_size: is 1024; expected 512 or 4096"),
        ('lun = 0\nsize = 512\ncache = "none"', r":11: target.unit.cache: is for file and block; .*"),
        ('lun = 0\nfile = "a"\ncache = "off"', r":11: target.unit.cache: is 'off'; expected 'writeback' or 'none'"),
        ('lun = 0\nsize = 512\nallow = "5001438012345678"', r":11: target.unit.allow: is '.*'; expected an array.*"),
        ("lun = 0\nsize = 512\n[[target.unit]]\nlun = 0\nsize = 512", r":12: .*lun: 0 is already the LUN .* in line 8"),
        ('lun = 0\nsize = 512\nallow = [\n  "5001438012345678", # ours\n  5,\n]', r":13: target.unit.allow: is 5; .*"),
        ("lun = 0\nsize = 512\n[[zone]]\nname = 'z'", r":11: zone.members: is missing; .*"),
        ("lun = 0\nsize = 512\n[zone]\nname = 'z'", r":11: zone: expected an array of tables: \[\[zone\]\]"),
    ],
)
def test_units_and_zones_that_are_wrong(tmp_path: Path, text: str, expected: str) -> None:
    (found,) = problems(write(tmp_path, FABRIC + "[[target.unit]]\n" + text))
    assert re.fullmatch(expected, found), found


def test_what_must_be_unique(tmp_path: Path) -> None:
    zone = '[[zone]]\nname = "z"\nmembers = []\n'
    found = problems(write(tmp_path, FABRIC + "[[target]]" + FABRIC.partition("[[target]]")[2] + zone + zone))
    assert found == [
        ":9: target.name: 'array-a' is already the name of the target in line 4",
        f":10: target.wwpn: {ARRAY} is already the WWPN of the target in line 4",
        ":16: zone.name: 'z' is already the name of the zone in line 12",
    ]


def test_a_socket_that_qemu_could_not_connect_to(tmp_path: Path) -> None:
    (found,) = problems(write(tmp_path, ADAPTER + f'[vhost]\nsocket = "/{"x" * 107}"'))
    assert found == ":8: vhost.socket: is a path of 108 bytes; QEMU connects to at most 107"
    (found,) = problems(write(tmp_path, ADAPTER + '[vhost]\nsocket = "/run/s"\ncontrol = "/run/s"'))
    assert found == ":9: vhost.control: is the same path as socket"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1\nb = ", r":2: not TOML: Invalid value.*"),
        ("a = 1\na = 2", r":2: not TOML: Cannot overwrite a value.*"),
        ('a = """\n\n', r":3: not TOML: .*"),
        ("a = 1\n", r":1: neither an adapter's file .*"),
    ],
)
def test_what_is_no_configuration_at_all(tmp_path: Path, text: str, expected: str) -> None:
    (found,) = problems(write(tmp_path, text))
    assert re.fullmatch(expected, found), found


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert problems(tmp_path / "none") == [": No such file or directory"]
    assert problems(tmp_path) == [": Is a directory"]
    (tmp_path / "latin").write_bytes(b"# caf\xe9")
    assert problems(tmp_path / "latin") == [": byte 5 is not UTF-8, as TOML must be"]


def test_the_kind_of_a_file_is_seen_from_its_tables(tmp_path: Path) -> None:
    assert isinstance(load(write(tmp_path, ADAPTER)), AdapterConfig)
    assert isinstance(load(write(tmp_path, FABRIC)), FabricConfig)
    assert problems(write(tmp_path, "\n[[port]]"))[1].startswith(":2: port.wwpn: is missing")
    assert problems(write(tmp_path, "[fabric]\nfence_timeout = 0"))[0].startswith(":2: fabric.fence_timeout: is 0;")


# ---------------------------------------------------------------- lines

KEYS = st.sampled_from(["a", "b", '"c d"', "'e.f'", "x.y", "z"])
SCALARS = st.sampled_from(
    [
        "1",
        "-1.5e3",
        "true",
        '"a [ # = \\" b"',
        "'x \\'",
        '"""q\n"" \\""""',
        "'''l\n'''",
        "1979-05-27T07:32:00Z",
        "07:32:00",
    ]
)
NEWLINE = st.sampled_from(["", "\n", " # [note] = 'x'\n", "\n\n"])


@st.composite
def values(draw: st.DrawFn, depth: int = 2) -> str:
    kind = draw(st.integers(0, 3 if depth else 0))
    if kind <= 1:
        return draw(SCALARS)
    if kind == 2:
        inner = [draw(NEWLINE) + draw(values(depth - 1)) + draw(NEWLINE) for _ in range(draw(st.integers(0, 3)))]
        return f"[{','.join(inner)}{draw(NEWLINE)}]"
    names = draw(st.lists(st.sampled_from(["p", "q", "r.s"]), unique=True))
    return "{ " + ", ".join(f"{name} = {draw(values(depth - 1)).replace(chr(10), ' ')}" for name in names) + " }"


@st.composite
def documents(draw: st.DrawFn) -> str:
    text = ""
    for _ in range(draw(st.integers(1, 6))):
        text += draw(NEWLINE)
        if draw(st.booleans()):
            text += draw(st.sampled_from(["[t]", "[[u]]", "[[ u . w ]]", "[u.v]", '["t".n]'])) + draw(NEWLINE)
            text += "" if text.endswith("\n") else "\n"
        text += f"{draw(KEYS)} = {draw(values())}\n"
    return text


@given(documents())
def test_the_scanner_sees_what_tomllib_sees(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Every key, element and table of the parsed document has a line, and its text is there."""
    try:
        parsed = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    path = tmp_path_factory.getbasetemp() / "scanned.toml"
    path.write_text(text)
    document = Document(path)
    lines = text.split("\n")

    def visit(where: tuple[str | int, ...], value: object) -> None:
        if where:
            assert where in document._lines, (where, text)
            if isinstance(where[-1], str):
                assert where[-1] in lines[document.line(where) - 1]
        members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, member in members:
            visit((*where, key), member)

    visit((), parsed)


# ---------------------------------------------------------------- the documentation

#: One of each kind of fault.
FAULTS = "".join(
    f"[[fault]]\nwhat = '{what}'\n{keys}\n"
    for what, keys in {
        **dict.fromkeys(("lose", "duplicate", "corrupt", "silence", "busy", "full", "offline", "medium-error"), ""),
        **dict.fromkeys(("delay", "latency"), "seconds = 1\nto = 2"),
        **dict.fromkeys(("link-down", "logout", "clear-virtual-link"), "holder = 'vm1'"),
        "reject": "els = 'FDISC'",
        "target-gone": "target = 'array-a'",
        "zone": "zone = 'z'\nmembers = []",
        **dict.fromkeys(("mask", "unmap"), "target = 'array-a'\nlun = 0"),
        "map": "target = 'array-a'\nlun = 9\nshare = 'array-a:0'",
        "access": "group = 1\naccess = 'standby'",
    }.items()
)


def known_keys(monkeypatch: pytest.MonkeyPatch, directory: Path) -> dict[str, set[str]]:
    """What the loaders ask for, table by table, as seen while they read a full file of each kind."""
    asked: dict[str, set[str]] = {}
    finish = Table.finish

    def spy(table: Table) -> None:
        kind = table.document.path.stem
        name = ".".join(part for part in (kind, *table.where) if isinstance(part, str))
        asked.setdefault(name, set()).update(table._known)
        finish(table)

    monkeypatch.setattr(Table, "finish", spy)
    load_adapter(write(directory, ADAPTER, "adapter.toml"))
    on_an_hba = ADAPTER.replace('emulated = "/run/vhostfc/fabric.sock"', 'parents = "san-a"')
    write(directory, 'san-a = ["host5"]\n', "parents.toml")
    load_adapter(write(directory, on_an_hba, "adapter.toml"))
    zone = "[[target.unit]]\nlun = 0\nsize = 512\n[[zone]]\nname = 'z'\nmembers = []\n"
    load_fabric(write(directory, FABRIC + zone + "[[fcoe]]\nsocket = 'f'\n" + FAULTS, "fabric.toml"))
    return asked


def test_every_key_is_documented_in_its_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs/configuration.md").read_text()
    adapter, fabric = text.split("\n## An adapter\n")[1].split("\n## A fabric\n")
    asked = known_keys(monkeypatch, tmp_path)
    assert set(asked) == {
        *("adapter", "adapter.port", "adapter.fabric", "adapter.vhost"),
        *("fabric", "fabric.fabric", "fabric.target", "fabric.target.unit", "fabric.zone"),
        *("fabric.fcoe", "fabric.fault"),
    }
    for table, keys in asked.items():
        kind, _, name = table.partition(".")
        half = adapter if kind == "adapter" else fabric
        if not name:  # top-level keys and tables have headings
            for key in keys:
                assert re.search(rf"^### `\[*{key}\]*`", half, re.M), f"{table}: {key}"
            continue
        (section,) = re.findall(rf"^### `\[+{re.escape(name)}\]+`[^\n]*\n(.*?)(?=^### |\Z)", half, re.M | re.S)
        rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", section, re.M)
        documented = {key for row in rows for key in re.findall(r"\w+", row)}
        assert documented == keys - {"unit"}, table


def test_the_documented_examples_are_right(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs/configuration.md").read_text()
    adapter, state, fabric, paths, units, fcoe, fault = re.findall(r"^```toml\n(.*?)^```", text, re.M | re.S)
    assert load_adapter(write(tmp_path, state + adapter)).state == Path("/var/lib/vhostfc/vm1")
    head, _, zone = fabric.partition("[[zone]]")
    config = load_fabric(write(tmp_path, f"{head}{units}{paths}[[zone]]{zone}{fcoe}{fault}"))
    assert [unit.lun for unit in config.targets[0].units] == [0, 1, 2, 3]
    assert [one.where for one in config.fcoe] == ["/run/vhostfc/fcoe.sock"]
    assert [unit.home for unit in config.targets[1].units] == [(config.targets[0].wwpn, 0)]
