"""Python environments of their own for programs that need other packages than this project."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path


class OwnEnvironmentError(RuntimeError):
    """An environment cannot be made; the message says at which step and why."""


def make_environment(place: Path, title: str, contents: str, install: Callable[[Path], None]) -> Path:
    """The Python of an environment, which is created if it is missing or of other contents.

    Args:
        place: its folder.
        title: of what it is, and how long it takes and how large it is in brackets.
        contents: changes whenever it has to be made anew.
        install: installs everything with the environment's Python.

    Raises:
        OwnEnvironmentError: it cannot be made, or the folder holds something else.
    """
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = place / "installed.txt"
    wanted = hashlib.sha256(contents.encode()).hexdigest()
    made = stamp.read_text() if stamp.is_file() else None
    if made == wanted and python.is_file():
        return python
    if made is None and place.is_dir() and any(place.iterdir()):
        raise OwnEnvironmentError(f"{place} holds something else; name a new folder with --env")
    print(f"making the environment of {title} in {place} ...", file=sys.stderr, flush=True)
    try:
        venv.create(place, with_pip=True, clear=made is not None)
    except (OSError, subprocess.CalledProcessError) as error:
        raise OwnEnvironmentError(f"python -m venv {place}: {error}") from error
    stamp.write_text("not finished")
    install(python)
    stamp.write_text(wanted)
    return python


def pip_install(python: Path, *arguments: str) -> None:
    """Install packages."""
    run_step([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])


def packages_of(python: Path) -> Path:
    """Folder of the packages of a Python."""
    return Path(run_step([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())


def run_step(command: Sequence[str]) -> str:
    """Run a step of the installation, and give what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shown = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise OwnEnvironmentError(f"`{' '.join(command[:6])} ...` ended with {done.returncode}:\n  {shown}")
    return done.stdout
