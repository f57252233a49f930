"""A WWPN that is logged in already is refused, and the message tells who has it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from tests.lab.san import Daemon, San, UnitSpec, wwpn


def test_the_second_one_is_told_and_ends(tmp_path: Path) -> None:
    with San(tmp_path, [UnitSpec(0)]) as san:
        san.start_adapter(1)
        twin = tmp_path / "twin.toml"
        twin.write_text(san.write_adapter(1).read_text().replace("vm1", "twin"))
        arguments = [sys.executable, "-m", "vhostfc", "serve", "--config", str(twin)]
        began = time.monotonic()
        second = subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=False)
        assert time.monotonic() - began < 5
        assert second.returncode == 1
        said = second.stderr + second.stdout
        refusal = next(line for line in said.splitlines() if "refuses the login" in line)
        assert wwpn(1) in refusal
        assert "vm1" in refusal, "who holds it"
        assert re.search(r"since \d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d", refusal), refusal
        assert "Traceback" not in said
        assert not (tmp_path / "twin.sock").exists()
        assert not (tmp_path / "twin.control").exists()
        assert san.status(1)["port"]["state"] == "online", "the first one has not noticed"
        assert [login["adapter"] for login in san.fabric_status()["logins"]] == ["vm1"]

        assert san.adapters[1].stop() == 0
        assert san.fabric_status()["logins"] == []
        third = Daemon(["serve", "--config", twin], tmp_path / "twin.log")
        san.started.append(third)
        control = tmp_path / "twin.control"
        San.wait_for(lambda: San.answers(control, third) and San.call(control)[0]["port"]["state"] == "online", third)
        assert third.stop() == 0
