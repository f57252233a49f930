"""How faults are spelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vhostfc import faultfile
from vhostfc.errors import ConfigError
from vhostfc.fabric.faults import Direction, Fault, Latency, What
from vhostfc.fc.els import Els, Explanation, Reason
from vhostfc.fc.wwn import Wwn

ARRAY = Wwn(0x5006_0160_0000_0001)
TARGETS = {"array-a": ARRAY}


def said(what: str, **values: Any) -> Fault:
    (fault,) = faultfile.said({"fault": [{"what": what, "name": "x", **values}]}, TARGETS, where="order")
    return fault


@pytest.mark.parametrize(
    ("fault", "meant"),
    [
        (
            said("lose", direction="out", r_ctl=7, rate=0.5, count=3, after=1, **{"for": 2}),
            Fault(What.LOSE, "x", after=1, lasts=2, rate=0.5, count=3, direction=Direction.OUT, r_ctl=7),
        ),
        (
            said("reject", els="fdisc", reason="Logical-Busy", explanation="INSUFFICIENT_RESOURCES"),
            Fault(What.REJECT, "x", els=Els.FDISC, reason=Reason.LOGICAL_BUSY, explanation=Explanation(0x29)),
        ),
        (said("reject", els=0x20, reason=0xFF), Fault(What.REJECT, "x", els=0x20, reason=0xFF)),
        (said("silence"), Fault(What.SILENCE, "x", d_id=0xFFFFFC, direction=Direction.IN)),
        (said("lose", s_id="01fe01", d_id="name server"), Fault(What.LOSE, "x", s_id=0x01FE01, d_id=0xFFFFFC)),
        (said("lose", type="fcp", opcode="READ(10)"), Fault(What.LOSE, "x", type=8, opcode=0x28)),
        (said("delay", mean=0.1), Fault(What.DELAY, "x", latency=Latency(0.0, None, 0.1))),
        (said("latency", seconds=0.1, to=0.2, lun=3), Fault(What.LATENCY, "x", latency=Latency(0.1, 0.2), lun=3)),
        (
            said("medium-error", target="array-a", lba=5, blocks=1, on="read"),
            Fault(What.MEDIUM_ERROR, "x", target=ARRAY, lba=5, blocks=1, on="read"),
        ),
        (said("target-gone", target=str(ARRAY)), Fault(What.TARGET_GONE, "x", target=ARRAY)),
        (said("zone", zone="z", gone=True), Fault(What.ZONE, "x", zone="z")),
        (
            said("map", target="array-a", lun=1, share="array-a:0"),
            Fault(What.MAP, "x", target=ARRAY, lun=1, share=("array-a", 0)),
        ),
        (said("logout", holder="vm1"), Fault(What.LOGOUT, "x", holder="vm1")),
    ],
    ids=lambda value: value.what.value,
)
def test_what_is_said_is_what_is_meant(fault: Fault, meant: Fault) -> None:
    assert fault == meant


@pytest.mark.parametrize(
    ("what", "values", "error"),
    [
        ("lose", {"rate": 0}, "fault.rate: is 0; expected a share"),
        ("lose", {"els": "PLOGO"}, "fault.els: is 'PLOGO'; expected a number up to 0xff or one of LS_RJT, LS_ACC"),
        ("lose", {"opcode": "READ(11)"}, "fault.opcode: is 'READ(11)'; expected a number up to 0xff or the name"),
        ("lose", {"s_id": 5}, "fault.s_id: is 5; expected six hexadecimal digits"),
        ("lose", {"lba": 1}, "fault.lba: unknown key"),
        ("lose", {"after": 1, "at": "2030-01-01"}, "fault.at: and after exclude each other"),
        ("lose", {"at": "noon"}, "fault.at: is 'noon'; expected a date and a time"),
        ("reject", {}, 'fault.els: is missing; write els = "PLOGI"'),
        ("reject", {"els": "PRLI", "direction": "out"}, "fault.direction: requests that are rejected come in"),
        ("delay", {}, "fault.seconds: is missing"),
        ("delay", {"seconds": 2, "to": 1}, "fault.to: goes with a smaller `seconds`"),
        ("logout", {}, "fault.wwpn: say one"),
        ("logout", {"wwpn": str(ARRAY), "for": 1}, "fault.for: unknown key"),
        ("zone", {"zone": "z"}, 'fault.members: write members = ["50:..."], or gone = true'),
        (
            "target-gone",
            {"target": "array-b"},
            "fault.target: is 'array-b'; expected the name of a target here: 'array-a'",
        ),
        ("busy", {"lun": -1}, "fault.lun: is -1; expected a whole number from 0 to 16383"),
    ],
)
def test_what_is_wrong_is_said_with_its_key(what: str, values: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError) as refused:
        said(what, **values)
    assert f"order: {error}" in str(refused.value)


def test_a_script_knows_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text('[[fault]]\nwhat = "busy"\nafter = 1.5\n[[fault]]\nwhat = "full"\nat = 2030-01-31T12:00:00Z\n')
    first, second = faultfile.load_script(path, {})
    assert (first.after, second.at) == (1.5, 1896091200.0)
    path.write_text('[[fault]]\nwhat = "busy"\n[[fault]]\nname = "fault-1"\nwhat = "ful"\n')
    with pytest.raises(ConfigError, match=r"s\.toml:5: fault\.what: is 'ful'"):
        faultfile.load_script(path, {})
    path.write_text('[[fault]]\nwhat = "busy"\n[[fault]]\nname = "fault-1"\nwhat = "full"\n')
    with pytest.raises(ConfigError, match=r"s\.toml:4: fault\.name: 'fault-1' is already the name"):
        faultfile.load_script(path, {})
