"""The audit: one line of JSON for each prediction, or attempt at one, that says from what it was made and by what.

A line names no patient: a study by its UIDs, an image file by its SHA-256.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from scripts import keys
from scripts.cohorts.files import sha256_of
from scripts.dicom.choice import Choice
from scripts.dicom.web import is_uid
from scripts.prediction.description import METADATA

AUDIT = "audit.jsonl"


def audit_line(
    case: Mapping[str, Any], outcome: str, checkpoint: str | None, prediction: Mapping[str, Any] | None
) -> str:
    """The line of one patient.

    Args:
        case: of the patient.
        outcome: status of the patient's row.
        checkpoint: the weights.
        prediction: as ``prediction.json`` has it; None where there is none.

    Raises:
        OSError: a scan cannot be read.
    """
    metadata = json.loads(METADATA.read_text(encoding="utf-8"))
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "software": f"{metadata['name']} {metadata['version']}",
        "weights_sha256": _weights(checkpoint, prediction),
        "input": _inputs(case),
        "outcome": outcome,
        "quality": prediction["quality"]["verdict"] if prediction else None,
        "forced": prediction["quality"]["forced"] if prediction else None,
        "files": sorted(name for name, file in prediction["files"].items() if file) if prediction else [],
    }
    return json.dumps(line)


def append_line(path: Path, line: str) -> None:
    """Append a line in a single write, so that several programs of one computer may share a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def _weights(checkpoint: str | None, prediction: Mapping[str, Any] | None) -> str | None:
    if prediction is not None:
        return str(prediction["model"]["sha256"])
    return None if checkpoint is None else _sha256(checkpoint, Path(checkpoint).stat().st_mtime_ns)


def _inputs(case: Mapping[str, Any]) -> dict[str, Any]:
    """UIDs of the series, or hashes of the files; None for a missing scan."""
    choice: Choice | None = case.get(keys.DICOM)
    if choice is not None:
        studies = sorted({choice.ct.study_uid, choice.pet.study_uid})
        chosen = {"ct": choice.ct, "pet": choice.pet}
        series = {name: {"series": scan.uid, "images": len(scan.paths)} for name, scan in chosen.items()}
        return {"studies": studies, **series}
    scans = {name: case.get(key) for name, key in (("ct", keys.CT), ("pet", keys.PET))}
    return {name: _file(scan) for name, scan in scans.items()}


def _file(scan: Any) -> dict[str, Any] | None:
    if not isinstance(scan, str | os.PathLike):
        return None
    if Path(scan).is_dir() and is_uid(Path(scan).name):  # of a server's cache
        return {"series": Path(scan).name, "images": sum(path.is_file() for path in Path(scan).iterdir())}
    if not Path(scan).is_file():
        return None
    return {"sha256": _sha256(os.fspath(scan), Path(scan).stat().st_mtime_ns)}


@cache
def _sha256(path: str, changed_ns: int) -> str:
    return sha256_of(path)
