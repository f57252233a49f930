"""An adapter's file that names an HBA."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostfc.config import HbaConfig, load, load_adapter
from vhostfc.errors import ConfigError
from vhostfc.fc.wwn import Wwn

PORT = '[[port]]\nwwpn = "50:01:43:80:12:34:56:78"\nwwnn = "50:01:43:80:12:34:56:79"\n[fabric]\n'
HBA_PORT = Wwn(0x2100_00E0_8B05_0504)


def write(directory: Path, fabric: str) -> Path:
    path = directory / "vm1.toml"
    path.write_text(PORT + fabric)
    return path


def hba(directory: Path, fabric: str) -> HbaConfig:
    config = load_adapter(write(directory, fabric), environ={})
    assert config.emulated is None
    assert config.hba is not None
    return config.hba


def problems(directory: Path, fabric: str) -> list[str]:
    path = write(directory, fabric)
    with pytest.raises(ConfigError) as caught:
        load(path, environ={})
    return [problem.removeprefix(str(path)) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('parent = "host5"', HbaConfig(hosts=("host5",))),
        ('parent = "scsi_host5"', HbaConfig(hosts=("host5",))),
        ('parent = ["host5", "host6"]', HbaConfig(hosts=("host5", "host6"))),
        ('parent_wwpn = "21:00:00:e0:8b:05:05:04"', HbaConfig(wwpns=(HBA_PORT,))),
        ('parent_wwpn = ["210000e08b050504"]', HbaConfig(wwpns=(HBA_PORT,))),
        ('fabric_wwn = "10:00:00:05:1e:35:a2:01"', HbaConfig(fabric=Wwn(0x1000_0005_1E35_A201))),
    ],
)
def test_an_hba_is_named(tmp_path: Path, text: str, expected: HbaConfig) -> None:
    assert hba(tmp_path, text) == expected


def test_all_that_can_be_said(tmp_path: Path) -> None:
    text = 'parent = "host5"\ndev_loss = 300\nfast_io_fail = 10\nkeep = true\nguard = false\n'
    text += 'survey = 5\nhelper = "h.sock"\n'
    assert hba(tmp_path, text) == HbaConfig(
        hosts=("host5",), dev_loss=300, fast_io_fail=10, keep=True, guard=False, survey=5.0, helper=tmp_path / "h.sock"
    )


def test_a_set_of_ports_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "parents.toml").write_text('san-a = ["host5", "21:00:00:e0:8b:05:05:04"]\nsan-b = ["host6"]\n')
    assert hba(tmp_path, 'parents = "san-a"') == HbaConfig(hosts=("host5",), wwpns=(HBA_PORT,))
    assert problems(tmp_path, 'parents = "san-c"') == [
        f":5: fabric.parents: 'san-c' is no set in {tmp_path}/parents.toml;"
        ' write san-c = ["host5", "21:00:..."] there'
    ]
    (tmp_path / "parents.toml").write_text('san-a = ["hostile"]\n')
    assert "expected the name of a SCSI host" in problems(tmp_path, 'parents = "san-a"')[-1]
    (tmp_path / "parents.toml").unlink()
    assert "No such file" in problems(tmp_path, 'parents = "san-a"')[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('parent = "eth0"', ":5: fabric.parent: is 'eth0'; expected the name of a SCSI host, like \"host5\""),
        ('parent = "host5"\nemulated = "x.sock"', ":6: fabric.emulated: and an HBA exclude each other"),
        ('parent = "host5"\nfast_io_fail = 60', ":6: fabric.fast_io_fail: 60 s is not less than dev_loss, 60 s"),
        ('parent = "host5"\ndev_loss = 0', ":6: fabric.dev_loss: is 0; expected a whole number"),
        ('emulated = "x.sock"\nkeep = true', ":6: fabric.keep: is for an HBA's port; for an HBA parent"),
        ("login = 'always'", ":4: fabric.emulated: is missing; write emulated"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, problem: str) -> None:
    found = problems(tmp_path, text)
    assert found[0].startswith(problem), found


def test_a_file_of_an_hba_is_an_adapters(tmp_path: Path) -> None:
    path = tmp_path / "vm1.toml"
    path.write_text('[fabric]\nparent = "host5"\n')
    with pytest.raises(ConfigError, match="port: is missing"):
        load(path, environ={})
