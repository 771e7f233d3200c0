"""Files that appear under their name only when whole, and what a killed process leaves behind."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.cohorts.files import WriteError, require_writable, write_text, written_whole


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ValueError, match="stop"), written_whole(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise ValueError("stop")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_leftovers_of_a_killed_process_are_removed_by_the_next_write(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {
        f".{ended.pid}.report.pdf": False,  # left by a killed process
        f".{99999999999999999999}.report.pdf": False,  # no number of a process
        f".{os.getppid()}.report.pdf": True,  # somebody is writing it
        f".{ended.pid}.other.pdf": True,  # another file's
        ".x.report.pdf": True,
        "report.pdf.bak": True,
    }
    for name in names:
        (tmp_path / name).write_text("half")
    write_text(tmp_path / "report.pdf", "whole")
    assert {file.name for file in tmp_path.iterdir()} == {name for name, stays in names.items() if stays} | {
        "report.pdf"
    }


def refuse(number: int, named: bool = False):
    """A function that fails as the system does, with the file's name or, as for a write to an open file, without."""

    def fail(self: Path, *arguments: object, **more: object) -> None:
        raise OSError(number, os.strerror(number), *([str(self)] if named else []))

    return fail


@pytest.mark.parametrize("method", ["mkdir", "write_text", "replace"])
@pytest.mark.parametrize(
    ("number", "why"),
    [
        pytest.param(errno.ENOSPC, "no space left on device", id="full"),
        pytest.param(errno.EROFS, "read-only file system", id="read_only"),
        pytest.param(errno.EACCES, "permission denied", id="not_allowed"),
        pytest.param(errno.EDQUOT, "quota exceeded", id="quota"),
    ],
)
def test_what_cannot_be_written_is_named_with_the_reason(tmp_path, monkeypatch, method, number, why):
    (tmp_path / "a.txt").write_text("before")
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, refuse(number, named=method != "write_text"))
        with pytest.raises(WriteError, match=rf"^cannot write {re.escape(str(tmp_path))}/a\.txt: .*{why}$"):
            write_text(tmp_path / "a.txt", "after")
    assert (tmp_path / "a.txt").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_a_writer_that_gives_no_reason_failed_for_a_full_disk_where_it_is_full(tmp_path, monkeypatch):
    """As SimpleITK's and torch's: a RuntimeError that says nothing of the disk."""

    def write() -> None:
        with written_whole(tmp_path / "a.mha") as partial:
            partial.write_bytes(b"half")
            raise RuntimeError("itk::ERROR: MetaImageIO: File cannot be written")

    with pytest.raises(RuntimeError, match="MetaImageIO"):
        write()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(WriteError, match=r"a\.mha: no space left on device$"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_file_elsewhere_that_cannot_be_read_is_not_blamed_on_the_target(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"), written_whole(tmp_path / "out" / "a.txt"):
        (tmp_path / "absent").read_bytes()


def test_a_folder_for_results_can_be_written_to_or_says_why(tmp_path, monkeypatch):
    require_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot write to .*/file: it is a file, not a folder$"):
        require_writable(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(WriteError, match=r"cannot write to .*/link: it is a broken link$"):
        require_writable(tmp_path / "link")

    def refused(**more: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(WriteError, match=r"read-only file system$"):
        require_writable(tmp_path)
