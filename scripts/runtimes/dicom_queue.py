"""Received studies on disk, and where each stands: what is here survives the end of the program at any moment.

A study is a folder ``studies/<StudyInstanceUID>`` with ``images/<SOPInstanceUID>.dcm`` and, once it has been looked at,
``status.json``. The images say what is to be done: those that ``status.json`` does not count among the answered ones
wait for a prediction. Every file appears under its name only when it is whole and on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from scripts.dicom.web import is_uid

PREDICTING, SENDING, DONE = "predicting", "sending", "done"
STATUS, ANSWERS = "status.json", "answers.jsonl"
MOST_IMAGES = 20_000  # of a study


class QueueError(OSError):
    """The folder cannot be used, or has no room; the message says why and what to do."""


@dataclass
class Status:
    """What became of a study."""

    state: str = ""  # PREDICTING, SENDING or DONE; "" for a new one
    images: str = ""  # digest of the names of the images that are being predicted or were answered
    attempts: int = 0  # predictions of these images that were begun
    outcome: str = ""  # "results" or "reason"
    reason: str = ""  # why there is no prediction
    files: list[str] = field(default_factory=list)  # DICOM files to send, in the study's folder results
    problem: str = ""  # why they could not be sent so far
    time: str = ""  # of the last change


class StudyQueue:
    """The studies in a folder. One program at a time uses it; threads may.

    Args:
        folder: where; made where it is not there, for this user alone.
        stable_s: seconds without a new image after which a study counts as complete.
        keep_s: seconds after its answer for which a study is kept, should further images of it come.
        min_free_bytes: free bytes of the disk below which no image is taken.

    Raises:
        QueueError: another program uses the folder, or it cannot be written to.
    """

    def __init__(self, folder: Path, stable_s: float, keep_s: float, min_free_bytes: float) -> None:
        self.folder, self.stable_s, self.keep_s, self.min_free_bytes = folder, stable_s, keep_s, min_free_bytes
        self.studies, self.work = folder / "studies", folder / "work"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._locked = (folder / "lock").open("w")
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.work, ignore_errors=True)  # of a program that was killed
            for place in (self.studies, self.work):
                place.mkdir(exist_ok=True, mode=0o700)
        except BlockingIOError as error:
            self._locked.close()
            raise QueueError(f"{folder} is used by another listener") from error
        except OSError as error:
            raise QueueError(f"{folder} cannot be used for received studies: {error.strerror}") from error
        self._changing = threading.Lock()
        self._waiting: dict[str, float] = {}  # study to the time at which it counts as complete
        self._later: dict[str, float] = {}  # study to the time at which it is sent again
        for study in sorted(path.name for path in self.studies.iterdir() if is_uid(path.name)):
            status, names = self.status(study), self.images(study)
            if status.state == SENDING:
                self._later[study] = 0.0
            if names and (status.state in ("", PREDICTING) or status.images != digest_of(names)):
                self._waiting[study] = time.monotonic() + stable_s

    def receive(self, study: str, instance: str, content: bytes) -> None:
        """Keep an image; when this returns, it is on the disk. One that is there already stays as it is.

        Raises:
            ValueError: one of them is no UID.
            QueueError: there is no room for it.
        """
        if not (is_uid(study) and is_uid(instance)):
            raise ValueError("Study Instance UID or SOP Instance UID is no valid UID")
        if shutil.disk_usage(self.folder).free < self.min_free_bytes + len(content):
            raise QueueError(f"less than {self.min_free_bytes / 1e9:g} GB are free in {self.folder}")
        images = self._place(study) / "images"
        with self._changing:
            images.mkdir(parents=True, exist_ok=True, mode=0o700)
            target = images / f"{instance}.dcm"
            if not target.exists():
                if sum(1 for _ in images.iterdir()) >= MOST_IMAGES:
                    raise QueueError(f"study {study} has more than {MOST_IMAGES} images")
                write_durably(target, content)
                self._waiting[study] = time.monotonic() + self.stable_s
            elif study in self._waiting:
                self._waiting[study] = time.monotonic() + self.stable_s

    def next_complete(self) -> str | None:
        """The study that has been complete for longest and waits for its prediction; None where there is none."""
        with self._changing:
            due = [(when, study) for study, when in self._waiting.items() if when <= time.monotonic()]
            return min(due)[1] if due else None

    def next_to_send(self) -> str | None:
        """A study whose answer is to be sent now; None where there is none."""
        with self._changing:
            return next((study for study, when in self._later.items() if when <= time.monotonic()), None)

    def begin(self, study: str, place: Path) -> Status:
        """Begin a prediction of the images that are there now, linked into a folder; its status counts the attempt."""
        with self._changing:
            self._waiting.pop(study, None)
            self._later.pop(study, None)  # the new answer takes the place of one that has not arrived
            names = self.images(study)
            place.mkdir(parents=True)
            for name in names:
                os.link(self._place(study) / "images" / name, place / name)
            status, digest = self.status(study), digest_of(names)
            attempts = status.attempts + 1 if (status.state, status.images) == (PREDICTING, digest) else 1
            status = Status(PREDICTING, digest, attempts)
            self._write(study, status)
            return status

    def interrupt(self, study: str, status: Status) -> None:
        """Let a prediction that was ended on purpose begin again; it does not count as an attempt."""
        with self._changing:
            self._write(study, Status(PREDICTING, status.images, status.attempts - 1))
            self._waiting[study] = 0.0

    def retry(self, study: str, seconds: float) -> None:
        """Begin a prediction that broke off again, after some seconds."""
        with self._changing:
            self._waiting[study] = time.monotonic() + seconds

    def answer(self, study: str, status: Status, outcome: str, reason: str, files: Sequence[Path]) -> None:
        """Take the answer to a study: from now on it is sent until it has arrived.

        Args:
            study: StudyInstanceUID.
            status: as :meth:`begin` gave it.
            outcome: "results" or "reason".
            reason: why there is no prediction, "" otherwise.
            files: to send, in this order; they are copied. Several examinations of a study have files of one name.
        """
        results = self._place(study) / "results"
        with self._changing:
            shutil.rmtree(results, ignore_errors=True)
            results.mkdir(mode=0o700)
            names: list[str] = []
            for file in files:
                names.append(f"{len(names) + 1}_{file.name}" if file.name in names else file.name)
            for name, file in zip(names, files, strict=True):
                write_durably(results / name, file.read_bytes())
            self._write(study, Status(SENDING, status.images, status.attempts, outcome, reason, names))
            self._later[study] = 0.0

    def to_send(self, study: str) -> list[Path]:
        """The files of a study's answer."""
        return [self._place(study) / "results" / name for name in self.status(study).files]

    def postpone(self, study: str, problem: str, seconds: float) -> None:
        """Send an answer again later."""
        with self._changing:
            status = self.status(study)
            status.problem = problem
            self._write(study, status)
            self._later[study] = time.monotonic() + seconds

    def finish(self, study: str, where: str) -> None:
        """An answer has arrived: one line of ``answers.jsonl`` says so."""
        with self._changing:
            status = self.status(study)
            status.state, status.problem = DONE, ""
            facts = {"study": study, "outcome": status.outcome, "reason": status.reason, "files": status.files}
            append_line(self.folder / ANSWERS, {"time": now(), **facts, "sent_to": where})
            self._write(study, status)
            self._later.pop(study, None)

    def forget_old(self) -> None:
        """Remove the studies that were answered long ago."""
        for path in self.studies.iterdir():
            with self._changing:
                status = path / STATUS
                old = status.is_file() and time.time() - status.stat().st_mtime > self.keep_s
                if old and path.name not in self._waiting and self.status(path.name).state == DONE:
                    shutil.rmtree(path, ignore_errors=True)

    def status(self, study: str) -> Status:
        """What became of a study so far; a status that cannot be read counts as none."""
        try:
            return Status(**json.loads((self._place(study) / STATUS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return Status()

    def images(self, study: str) -> list[str]:
        """Names of the images of a study, sorted."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(path.name for path in (self._place(study) / "images").iterdir() if path.suffix == ".dcm")
        return []

    def close(self) -> None:
        """Let another program use the folder."""
        self._locked.close()

    def _place(self, study: str) -> Path:
        return self.studies / study

    def _write(self, study: str, status: Status) -> None:
        status.time = now()
        write_durably(self._place(study) / STATUS, (json.dumps(asdict(status), indent=1) + "\n").encode())


def digest_of(names: Sequence[str]) -> str:
    """A short text that stands for a set of images."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or not there, and on the disk when this returns."""
    partial = path.with_name(f"{path.name}.part")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Append one line of JSON in a single write."""
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(content) + "\n").encode())


def now() -> str:
    """The time, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
