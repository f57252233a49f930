"""Changes of a running fabric over its control socket: in force at once, kept when asked, taken back when asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from tests.daemon.linkadapter import write_10, wwpn
from tests.daemon.test_fabricd import TARGET, config, fabric, join, unit
from vhostfc.daemon.control import call
from vhostfc.daemon.fabric_changes import load_with_kept
from vhostfc.daemon.fabricd import Fabric
from vhostfc.errors import ConfigError, VhostfcError

ARRAY = "50:06:01:60:00:00:00:01"
ONE, TWO = str(wwpn(1)), str(wwpn(2))


async def change(tmp_path: Path, what: str, *, keep: bool = False, **values: Any) -> Any:
    return await call(tmp_path / "f.control", "change", {"change": what, "keep": keep, **values})


def luns(san: Fabric) -> list[int]:
    return [one["lun"] for one in san.topology()["targets"][0]["units"]]


def zones(san: Fabric) -> dict[str, list[str]]:
    return {zone["name"]: [one["wwpn"] for one in zone["members"]] for zone in san.topology()["zones"]}


async def test_a_mask_is_in_force_when_the_order_returns(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (_, nursery):
        one = await join(nursery, tmp_path, 1)
        route = await one.open()
        await change(tmp_path, "mask", unit="array-a:0", allow=[TWO])
        assert one.routes[route.nexus].gone
        assert (await one.command(write_10(0, 1), data_out=bytes(512))).sense[12] == 0x25
        await change(tmp_path, "mask", unit="array-a:0", allow=None)
        assert (await one.command(bytes(6))).sense[2] == 0x06, "a unit attention of one that is back"


async def test_units_come_and_go(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, nursery):
        one = await join(nursery, tmp_path, 1)
        await change(tmp_path, "unit", unit="array-a:5", values={"size": "1MiB", "allow": [ONE]})
        assert luns(san) == [0, 5]
        await one.command(bytes(6), lun=5)
        assert (await one.command(write_10(0, 1), lun=5, data_out=bytes(512))).status == 0
        await change(tmp_path, "unit", unit="array-a:0", gone=True)
        assert luns(san) == [5]
        assert len(san.status()["targets"][0]["units"]) == 1


async def test_zones_are_made_widened_narrowed_and_removed(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, _):
        await change(tmp_path, "zone", zone="vm1", members=["5001438000000001", ARRAY])
        assert zones(san) == {"vm1": [ONE, ARRAY]}
        await change(tmp_path, "zone", zone="vm1", add=[TWO])
        assert zones(san) == {"vm1": [ONE, TWO, ARRAY]}
        await change(tmp_path, "zone", zone="vm1", remove=[ONE])
        assert zones(san) == {"vm1": [TWO, ARRAY]}
        await change(tmp_path, "zone", zone="vm1", gone=True)
        assert zones(san) == {}


async def test_a_group_changes_its_state(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, _):
        await change(tmp_path, "access", group=1, state="standby")
        assert san.topology()["targets"][0]["access"] == "standby"


async def test_what_is_kept_outlives_a_reload_and_a_restart_and_what_is_not_does_not(tmp_path: Path) -> None:
    path = tmp_path / "fabric.toml"
    async with fabric(tmp_path) as (san, _):
        await change(tmp_path, "unit", unit="array-a:5", values={"size": "1MiB"}, keep=True)
        await change(tmp_path, "unit", unit="array-a:6", values={"size": "1MiB"})
        await change(tmp_path, "zone", zone="vm1", members=[ONE, ARRAY], keep=True)
        assert json.loads((tmp_path / "state/changes.json").read_text()) == {
            "unit": {"array-a:5": {"size": "1MiB"}},
            "zone": {"vm1": [ONE, ARRAY]},
        }
        assert luns(san) == [0, 5, 6]
        await call(tmp_path / "f.control", "reload")
        assert luns(san) == [0, 5]
        assert zones(san) == {"vm1": [ONE, ARRAY]}
    file, kept = load_with_kept(path)
    served = Fabric(file, kept=kept, log=structlog.get_logger())
    async with trio.open_nursery() as nursery:
        await nursery.start(served.serve)
        assert luns(served) == [0, 5]
        answer = await change(tmp_path, "list")
        assert set(answer["kept"]) == {"unit", "zone"}
        assert (await change(tmp_path, "undo", keys=["unit array-a:5"]))["undone"] == ["unit array-a:5"]
        assert luns(served) == [0]
        await change(tmp_path, "undo")
        assert zones(served) == {}
        assert not (tmp_path / "state/changes.json").exists()
        nursery.cancel_scope.cancel()


async def test_one_that_was_kept_can_be_changed_for_a_while(tmp_path: Path) -> None:
    async with fabric(tmp_path) as (san, _):
        await change(tmp_path, "mask", unit="array-a:0", allow=[ONE], keep=True)
        await change(tmp_path, "mask", unit="array-a:0", allow=[TWO])
        assert san.topology()["targets"][0]["units"][0]["allow"] == [TWO]
        await change(tmp_path, "mask", unit="array-a:0", allow=[ONE, TWO], keep=True)
        assert san.topology()["targets"][0]["units"][0]["allow"] == [ONE, TWO], "the last word is in force"


@pytest.mark.parametrize(
    ("what", "values", "error"),
    [
        ("unit", {"unit": "array-a:0", "values": {"size": "1MiB"}}, "there is a unit at array-a:0 already; remove"),
        (
            "unit",
            {"unit": "array-b:0", "values": {"size": "1MiB"}},
            "no target is called 'array-b'; there are: array-a",
        ),
        ("unit", {"unit": "array-a:1", "values": {"sice": "1MiB"}}, "unit.sice: unknown key; did you mean size"),
        ("unit", {"unit": "array-a:9", "gone": True}, "there is no unit at array-a:9"),
        ("unit", {"unit": "array-a", "gone": True}, "expected a target's name and a LUN"),
        ("mask", {"unit": "array-a:0", "allow": ["x"]}, "'x'"),
        ("mask", {"unit": "array-a:3", "allow": []}, "there is no unit at array-a:3"),
        ("zone", {"zone": "vm1", "gone": True}, "no zone is called 'vm1'"),
        ("access", {"group": 3, "state": "standby"}, "no target is in target port group 3"),
        ("access", {"group": 1, "state": "tired"}, "target.access: is 'tired'; expected 'optimized' or"),
        ("dance", {}, "unknown change 'dance'"),
        ("undo", {"keys": ["zone x"]}, "no change of zone x; there are: none"),
    ],
)
async def test_a_change_that_cannot_be_is_refused_and_nothing_is_kept(
    tmp_path: Path, what: str, values: dict[str, Any], error: str
) -> None:
    async with fabric(tmp_path) as (san, _):
        before = san.topology()
        with pytest.raises(VhostfcError) as refused:
            await change(tmp_path, what, keep=True, **values)
        assert error in str(refused.value)
        assert san.topology() == before
        assert not (tmp_path / "state/changes.json").exists()


async def test_kept_changes_that_do_not_fit_the_file_any_more_are_named(tmp_path: Path) -> None:
    config(tmp_path, TARGET + unit(0))
    kept = tmp_path / "state/changes.json"
    kept.parent.mkdir()
    kept.write_text('{"unit": {"array-a:1": {"share": "array-a:9"}}}')
    with pytest.raises(ConfigError, match=r"with these changes: unit array-a:1\n.*array-a:9 is not in this file"):
        load_with_kept(tmp_path / "fabric.toml")
    kept.write_text('{"unit": 3}')
    with pytest.raises(ConfigError, match=r"changes.json: the changes that were kept cannot be understood"):
        load_with_kept(tmp_path / "fabric.toml")
