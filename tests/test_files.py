"""Files that appear under their name only when whole, and what a killed process leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.files import write_text, written_whole


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
