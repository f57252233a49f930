"""Changes over a fabric's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_config import FABRIC, write
from vhostfc.config import FabricConfig, load_fabric, overlaid
from vhostfc.errors import ConfigError
from vhostfc.overlay import Overlay, merged

FILE = """
[[target.unit]]
lun = 0
size = "1MiB"
allow = ["50:01:43:80:00:00:00:01"]
[[target.unit]]
lun = 1
size = "1MiB"
[[zone]]
name = "vm1"
members = []
"""
ONE = "50:01:43:80:00:00:00:01"


@pytest.fixture
def config(tmp_path: Path) -> FabricConfig:
    return load_fabric(write(tmp_path, FABRIC + FILE))


def test_nothing_changes_nothing(config: FabricConfig) -> None:
    assert overlaid(config, Overlay()) == config
    assert not Overlay()


def test_each_kind_of_change(config: FabricConfig) -> None:
    name = config.targets[0].name
    changed = overlaid(
        config,
        Overlay(
            zone={"vm1": None, "vm2": [ONE]},
            mask={f"{name}:0": None, f"{name}:1": []},
            unit={f"{name}:7": {"null": True}},
            access={"1": "standby"},
        ),
    )
    assert [(zone.name, [str(one) for one in zone.members]) for zone in changed.zones] == [("vm2", [ONE])]
    assert [(unit.lun, unit.allow) for unit in changed.targets[0].units] == [(0, None), (1, frozenset()), (7, None)]
    assert changed.targets[0].access == "standby"
    assert overlaid(config, Overlay(unit={f"{name}:0": None})).targets[0].units == config.targets[0].units[1:]
    assert overlaid(config, Overlay(unit={f"{name}:1": {"null": True}})).targets[0].units[1].null


def test_changes_obey_the_file_s_rules(config: FabricConfig) -> None:
    name = config.targets[0].name
    with pytest.raises(ConfigError, match=r"unit\.size: is 'much'"):
        overlaid(config, Overlay(unit={f"{name}:7": {"size": "much"}}))
    assert overlaid(config, Overlay(mask={"nobody:0": []}, unit={"nobody:3": None})) == config


def test_a_later_one_goes_over_an_earlier_one() -> None:
    first, second = Overlay(zone={"a": [], "b": []}), Overlay(zone={"b": None}, access={"1": "standby"})
    both = merged([first, second])
    assert both == Overlay(zone={"a": [], "b": None}, access={"1": "standby"})
    assert both.keys() == ["zone a", "zone b", "access 1"]
    assert both.without(["zone b", "access 1"]) == Overlay(zone={"a": []})
    assert Overlay.from_json(both.as_json()) == both


@pytest.mark.parametrize("nonsense", [[], {"zones": {}}, {"zone": []}, {"zone": {"a": 3}}, {"access": {"1": None}}])
def test_what_is_no_overlay(nonsense: object) -> None:
    with pytest.raises(ValueError, match="expected an object"):
        Overlay.from_json(nonsense)
