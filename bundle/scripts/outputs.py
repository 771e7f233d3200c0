"""What a prediction leaves on disk: one mask a patient on the CT's own grid, and ``predictions.csv``."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import IterationEvents, Workflow

from scripts import keys
from scripts.files import write_text
from scripts.images import write_mask

logger = logging.getLogger(__name__)

OK, INCOMPLETE, FAILED = "ok", "incomplete", "failed"
COLUMNS = (
    "PatientID",
    "status",
    "reason",
    "log_hazard",
    "log_hazard_std",
    "hpv_probability",
    "tumour_volume_ml",
    "crop_method",
    "crop_flag",
    "mask",
)
NO_CLINICAL_ROW = "no row of the clinical table has this PatientID: all clinical values were taken as missing"


class PredictionWriter:
    """Handler that writes each patient's mask and collects ``predictions.csv``, one row for *every* patient.

    A row's status is ``ok``, ``incomplete`` (predicted, but a clinical table was given and lacks the patient) or
    ``failed`` (no prediction; the reason says why). Rows go to ``predictions.csv.partial`` while the run lasts and
    take their final name at its end.

    Args:
        output_dir: receives ``predictions.csv`` and ``<PatientID>/<PatientID>__tumour.nii.gz``.
        cases: the datalist, which fixes the order of the rows.
    """

    def __init__(self, output_dir: str, cases: Sequence[Mapping[str, Any]]) -> None:
        self.output_dir = Path(output_dir)
        self.cases = {case[keys.PATIENT_ID]: case for case in cases}
        self.rows: dict[str, dict[str, Any]] = {}

    def attach(self, engine: Workflow) -> None:
        """Register with a :class:`scripts.engine.PatientEvaluator`."""
        # In the same event as the post transforms and after them: what fails here fails one patient.
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self.write_patient)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.note_failure)
        engine.add_event_handler(Events.COMPLETED, self.write_table)

    def write_patient(self, engine: Workflow) -> None:
        """Write the mask of the one patient of the batch and fill its row."""
        result = {**engine.state.batch[0], **engine.state.output[0]}
        patient = result[keys.PATIENT_ID]
        row = self._row(patient, OK, "")
        if self.cases[patient].get(keys.CLINICAL_FOUND) is False:
            row.update(status=INCOMPLETE, reason=NO_CLINICAL_ROW)
        scores = {
            "log_hazard": result.get(keys.LOG_HAZARD),
            "log_hazard_std": result.get("log_hazard_std"),
            "hpv_probability": result.get(keys.HPV_PROB),
            "tumour_volume_ml": result.get("volume_ml"),
        }
        row.update({name: _finite(name, value) for name, value in scores.items() if value is not None})
        row.update(crop_method=result[keys.CROP_METHOD], crop_flag=result[keys.CROP_FLAG])
        if "pred" in result:
            path = self.output_dir / patient / f"{patient}__tumour.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            mask = np.asarray(torch.as_tensor(result["pred"]).cpu())[0].astype(np.uint8)
            write_mask(path, mask, np.asarray(torch.as_tensor(result[keys.CT_AFFINE]), dtype=float))
            row["mask"] = path.relative_to(self.output_dir).as_posix()
        self.rows[patient] = row

    def note_failure(self, engine: Workflow) -> None:
        """Give a failed patient its row, and keep the table so far."""
        for patient, why in engine.state.failures.items():
            self.rows[patient] = self._row(patient, FAILED, why)
        write_text(self._partial, self._table())

    def write_table(self, engine: Workflow) -> None:
        """Write ``predictions.csv`` and log what became of the cohort."""
        write_text(self._partial, self._table())
        self._partial.replace(self.output_dir / "predictions.csv")
        counts = {status: sum(r["status"] == status for r in self.rows.values()) for status in (OK, INCOMPLETE, FAILED)}
        logger.info(
            "%d patients: %s. Written: %s",
            len(self.rows),
            ", ".join(f"{n} {status}" for status, n in counts.items()),
            self.output_dir / "predictions.csv",
        )

    def exit_if_incomplete(self) -> None:
        """End the program with exit code 1 if any patient's row is not ``ok``.

        Raises:
            SystemExit: so that a script sees it.
        """
        bad = [f"{p} ({r['status']}: {r['reason']})" for p, r in self.rows.items() if r["status"] != OK]
        if bad:
            logger.error("%d of %d patients are not ok: %s", len(bad), len(self.rows), "; ".join(bad))
            raise SystemExit(1)

    @property
    def _partial(self) -> Path:
        return self.output_dir / "predictions.csv.partial"

    def _row(self, patient: str, status: str, why: str) -> dict[str, Any]:
        return {**dict.fromkeys(COLUMNS, ""), "PatientID": patient, "status": status, "reason": why}

    def _table(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows[p] for p in self.cases if p in self.rows)
        return text.getvalue()


def _finite(name: str, value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the network gave {name} = {number}; the weights or the input are damaged")
    return number
