"""The commands of an HBA's side, as typed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vhostfc.cli import main
from vhostfc.cli.host import _duration

ADAPTER = '[[port]]\nwwpn = "50:01:43:80:12:34:56:78"\nwwnn = "50:01:43:80:12:34:56:79"\n[fabric]\nparent = "host77"\n'


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2d", 172800)])
def test_a_time(text: str, seconds: float) -> None:
    assert _duration(text) == seconds


def test_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["login", "vm1", "--for", "a while"]) == 2
    assert "'a while' is no time; write 90s, 30m, 8h or 2d" in capsys.readouterr().err


def test_check_knows_an_hba(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vm1.toml"
    path.write_text(ADAPTER)
    assert main(["check", str(path)]) == 0
    assert "adapter vm1, WWPN 50:01:43:80:12:34:56:78" in capsys.readouterr().out


def test_doctor_looks_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VHOSTFC_ROOT", str(tmp_path))
    assert main(["doctor", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {"about": "hba", "verdict": "missing"}.items() <= findings[0].items()
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.startswith("missing  hba: there is no Fibre Channel host\n         -> ")


def test_login_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vm1.toml"
    path.write_text(ADAPTER + f'helper = "{tmp_path}/none"\n[vhost]\nsocket = "{tmp_path}/v.sock"\n')
    path.write_text(f'state = "{tmp_path}"\n' + path.read_text())
    assert main(["login", str(path), "--for", "1s"]) == 1
    error = capsys.readouterr().err
    assert "no HBA port here is host77" in error or "vhostfc setup" in error


def test_setup_is_for_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["setup"]) == 1
    assert "this is for root" in capsys.readouterr().err


def test_the_helper_needs_a_user(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["helper", "--user", "nobody-of-that-name"]) == 2
    assert "there is no such user" in capsys.readouterr().err
