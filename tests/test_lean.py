"""What a daemon does not import; asked of a fresh interpreter, as `vhostfc serve` is one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vhostfc.lean import POSTPONED

LOADED = """
import json, sys
from vhostfc import lean
lean.postpone()
lean.postpone()
import vhostfc.cli
{imports}
lean.settle()
there = [name for name, module in sys.modules.items() if type(module).__name__ != "_Later"]
import structlog
assert structlog.stdlib.BoundLogger and "structlog.stdlib" not in there
print(json.dumps(there))
"""
SERVE = "from vhostfc import config, log; from vhostfc.daemon import fdsocket, hba, notify"
EMULATED, HBA = f"{SERVE}; import vhostfc.ports.emulated", f"{SERVE}; import vhostfc.daemon.helped, vhostfc.ports.npiv"
FABRIC = "from vhostfc import config, log; from vhostfc.daemon import fabricd"


@pytest.mark.parametrize("imports", [EMULATED, HBA, FABRIC], ids=["serve", "serve on an HBA", "fabric"])
def test_imports_nothing_that_is_not_used(imports: str) -> None:
    """No event loop but trio's, nothing of the tests', nothing of the driver's side, no netlink; yet it works."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(imports=imports)], capture_output=True, check=True, text=True
    )
    there = set(json.loads(done.stdout))

    assert "trio" in there
    unused = {"asyncio.base_events", "hypothesis", "pytest", "pyroute2", "cffi", "unittest", "rich"}
    assert there & (unused | POSTPONED) == set()
    assert not [name for name in there if name.startswith("vhostfc.frontend")]
