"""The C path gets no slower unnoticed: its instructions per command stay within 5 % of the last row of
instructions.tsv.  Whoever makes it faster, or slower for a reason, adds a row (see instructions.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("bench_instructions", HERE / "instructions.py")
assert _spec is not None
assert _spec.loader is not None
instructions = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = instructions
_spec.loader.exec_module(instructions)

REGRESSION = 1.05
PROFILE = """\
# callgrind format
events: Ir

fn=(1) ring_run
10 5
+2 7
cfn=(2) vq_next
calls=3 40
11 30
* 1

fn=(2)
40 20
41 10
fn=(1)
12 2
totals: 75
"""


def test_own_instructions_of_functions() -> None:
    """A callee's cost, which stands after its calls line, is not the caller's own."""
    assert instructions.parse(PROFILE) == {"ring_run": 15, "vq_next": 30}


def test_no_command_costs_more_than_it_did() -> None:
    last = instructions.rows()[-1]
    found = {instructions.column(kind): one.total for kind, one in instructions.counts().items()}
    assert set(found) <= set(last)
    more = {name: (cost, last[name]) for name, cost in found.items() if cost > float(last[name]) * REGRESSION}
    assert not more, f"(instructions now, in the table's last row) {more}"
