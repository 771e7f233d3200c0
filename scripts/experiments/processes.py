"""Processes that a command starts and stops with itself, and the end of their logs."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

STOP_SECONDS = 10.0
LOG_LINES = 12


class FolderInUseError(RuntimeError):
    """A folder that another process uses; the message says what to do."""


def start_logged(
    command: Sequence[str],
    log: Path,
    title: str,
    environment: Mapping[str, str],
    cwd: Path | None,
    files: Sequence[int] = (),
) -> subprocess.Popen:
    """Start a command whose output is appended to a log, under a line with time, title and command.

    It is a process group of its own, so that a Ctrl-C reaches only the caller, and ends when the caller is gone.
    """
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n== {time.strftime('%Y-%m-%d %H:%M:%S')} {title}: {shlex.join(command)}\n")
        file.flush()
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=tuple(files),
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


def lock_folder(folder: Path, seconds: float = 5.0) -> IO[str]:
    """Lock the folder of a fold; the lock is released when the returned file is closed or the processes end."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise FolderInUseError(f"another process uses {folder}: wait for it or end it") from None
            time.sleep(0.2)
        else:
            return file


def signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    """Send a signal to a process and its children, unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, number)


def _end_with_parent() -> None:
    """Ask Linux to end this process when its parent is gone, even if that was killed (prctl, PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))


def stop(processes: Sequence[subprocess.Popen], seconds: float = STOP_SECONDS) -> None:
    """Send SIGTERM to processes and their children, and SIGKILL to those that still run so many seconds later."""
    for process in processes:
        signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            signal_group(process, signal.SIGKILL)
            process.wait()


def last_lines(path: Path, count: int = LOG_LINES) -> list[str]:
    """The end of a log without progress bars, after the first error of its last step, which tends to be the cause."""
    text = path.read_text(encoding="utf-8", errors="replace").rpartition("\n== ")[2]
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and "%|" not in line]
    errors = [line for line in lines[:-count] if re.match(r"(error|[\w.]+(Error|Exception)): ", line)]
    return [*errors[:1], *lines[-count:]]


@contextmanager
def signals_as_exit() -> Iterator[None]:
    """Let the first SIGINT, SIGTERM or SIGHUP raise SystemExit here, so that processes are stopped on the way out."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def leave(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    except SystemExit:
        print("interrupted: rerun the same command to resume from the last complete epoch", file=sys.stderr)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
