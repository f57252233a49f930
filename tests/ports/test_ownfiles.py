"""Files in an adapter's own directory: what a link, or another file in their place, can do: nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vhostfc.ports.ownfiles import OwnFiles

NOBODY = 65534


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An adapter's, of another user where we are root."""
    path = tmp_path / "state"
    path.mkdir()
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    return path


def test_a_note_is_written_read_and_removed(tmp_path: Path) -> None:
    files = OwnFiles(tmp_path / "deep/state")
    files.write("note", "one")
    files.write("note", "two")
    assert files.read("note") == "two"
    assert os.listdir(tmp_path / "deep/state") == ["note"]
    files.remove("note")
    files.remove("note")
    with pytest.raises(FileNotFoundError, match="deep/state/note"):
        files.read("note")


def test_a_lock_is_the_same_file_each_time(directory: Path) -> None:
    files = OwnFiles(directory)
    first, second = files.open("lock"), files.open("lock")
    assert os.fstat(first).st_ino == os.fstat(second).st_ino
    assert os.fstat(first).st_uid == directory.stat().st_uid, "its user opens it, too"
    os.close(first)
    os.close(second)


def test_no_link_is_followed(tmp_path: Path, directory: Path) -> None:
    other = tmp_path / "shadow"
    other.write_text("root:x")
    before = other.stat()
    for name in ("lock", "note.new", "other"):
        (directory / name).symlink_to(other)
    files = OwnFiles(directory)
    with pytest.raises(OSError, match=r"state/lock") as refused:
        files.open("lock")
    assert refused.value.errno == errno.ELOOP
    files.write("note", "mine")
    files.write("other", "mine")
    with pytest.raises(OSError, match=r"state/lock"):
        files.read("lock")
    assert (other.read_text(), other.stat()) == ("root:x", before)


@pytest.mark.parametrize("kind", ["hard link", "fifo", "directory", "link to nowhere"])
def test_what_is_no_plain_file_is_not_used(tmp_path: Path, directory: Path, kind: str) -> None:
    other = tmp_path / "shadow"
    other.write_text("root:x")
    lock = directory / "lock"
    match kind:
        case "hard link":
            lock.hardlink_to(other)
        case "fifo":
            os.mkfifo(lock)
        case "directory":
            lock.mkdir()
        case _:
            lock.symlink_to(tmp_path / "nowhere")
    owner = other.stat().st_uid
    with pytest.raises(OSError, match=r"state/lock"):
        OwnFiles(directory).open("lock")
    assert other.stat().st_uid == owner
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="root's part")
def test_root_does_not_go_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "etc")
    files = OwnFiles(tmp_path / "state")
    with pytest.raises(OSError, match=r"is a link; root does not follow"):
        files.open("lock")
    with pytest.raises(OSError, match=r"is a link; root does not follow"):
        files.write("note", "x")
    assert os.listdir(tmp_path / "etc") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="root's part")
def test_what_root_makes_is_the_owners(directory: Path) -> None:
    files = OwnFiles(directory / "vm1")
    files.write("note", "x")
    os.close(files.open("lock"))
    assert {path.stat().st_uid for path in (directory / "vm1", *(directory / "vm1").iterdir())} == {NOBODY}


@pytest.mark.skipif(os.geteuid() != 0, reason="root's part")
def test_a_lock_that_root_could_not_give_away_any_more_is_made_anew(directory: Path) -> None:
    (directory / "lock").touch()
    os.close(OwnFiles(directory).open("lock"))
    assert (directory / "lock").stat().st_uid == NOBODY
