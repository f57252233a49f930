"""`vhostfc setup` and its undoing, in a directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from vhostfc.daemon.setup import FILES, MARK, set_up, undo
from vhostfc.errors import VhostfcError


class Programs:
    def __init__(self, *, work: bool = True) -> None:
        self.work = work
        self.ran: list[str] = []

    def __call__(self, command: Sequence[str]) -> bool:
        self.ran.append(" ".join(command))
        return self.work


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("sys/bus/scsi", "run/udev", "run/systemd/system", "etc"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "sys/bus/scsi/drivers_autoprobe").write_text("1\n")
    return tmp_path


def autoprobe(root: Path) -> str:
    return (root / "sys/bus/scsi/drivers_autoprobe").read_text().strip()


def test_all_is_written_and_put_in_force(root: Path) -> None:
    programs = Programs()
    steps = set_up(root, programs)
    assert all(step.done for step in steps)
    assert all((root / name).read_text().startswith(MARK) for name in FILES)
    assert autoprobe(root) == "0"
    assert programs.ran == ["udevadm control --reload", "systemctl daemon-reload", "modprobe sg"]


def test_a_second_time_changes_nothing(root: Path) -> None:
    set_up(root, Programs())
    before = {name: (root / name).stat().st_mtime_ns for name in FILES}
    steps = set_up(root, Programs())
    assert [step.what for step in steps if "wrote" in step.what] == []
    assert {name: (root / name).stat().st_mtime_ns for name in FILES} == before


def test_an_older_one_of_ours_is_replaced(root: Path) -> None:
    path = root / "etc/udev/rules.d/59-vhostfc.rules"
    path.parent.mkdir(parents=True)
    path.write_text(MARK + "old\n")
    set_up(root, Programs())
    assert path.read_text() == FILES["etc/udev/rules.d/59-vhostfc.rules"]


def test_somebody_elses_file_is_not_touched(root: Path) -> None:
    path = root / "etc/udev/rules.d/59-vhostfc.rules"
    path.parent.mkdir(parents=True)
    path.write_text("mine\n")
    with pytest.raises(VhostfcError, match=r"59-vhostfc\.rules is there and not ours"):
        set_up(root, Programs())
    steps = undo(root, Programs())
    assert path.read_text() == "mine\n"
    assert [step.done for step in steps if "not ours" in step.what] == [False]


def test_it_is_undone(root: Path) -> None:
    set_up(root, Programs())
    undo(root, Programs())
    assert not [name for name in FILES if (root / name).exists()]
    assert autoprobe(root) == "1"
    assert [step.what for step in undo(root, Programs()) if "removed" in step.what] == []


def test_it_is_not_undone_under_adapters(root: Path) -> None:
    """This host would take the units of their guests."""
    set_up(root, Programs())
    for name, symbolic in (("vport-5:0-1", "vhostfc vm1"), ("vport-5:0-2", "libvirt web7")):
        at = root / "sys/class/fc_vports" / name
        at.mkdir(parents=True)
        for file, text in (("port_name", "0x50014380000000aa"), ("symbolic_name", symbolic)):
            (at / file).write_text(text + "\n")
    with pytest.raises(VhostfcError, match=r"vport-5:0-1 \(vhostfc vm1\) is logged in; stop") as refused:
        undo(root, Programs())
    assert "web7" not in str(refused.value)
    assert all((root / name).exists() for name in FILES)
    assert autoprobe(root) == "0"


def test_multipathd_is_told_where_it_is(root: Path) -> None:
    (root / "etc/multipath.conf").write_text("")
    set_up(root, Programs())
    path = root / "etc/multipath/conf.d/vhostfc.conf"
    assert 'property "VHOSTFC"' in path.read_text()
    undo(root, Programs())
    assert not path.exists()


def test_a_program_that_fails_is_told(root: Path) -> None:
    steps = set_up(root, Programs(work=False))
    assert [step.what for step in steps if not step.done] == [
        "udev reads its rules: udevadm control --reload failed",
        "systemd reads its units: systemctl daemon-reload failed",
    ]


def test_without_scsi_there_is_nothing_to_switch(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    steps = set_up(tmp_path, Programs())
    assert [step.what for step in steps if not step.done] == [
        f"{tmp_path}/sys/bus/scsi/drivers_autoprobe is not there: no SCSI in this kernel yet"
    ]
