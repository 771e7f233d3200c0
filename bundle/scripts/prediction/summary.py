"""The page of a cohort: who was predicted, who was not and why, and the way to each patient's report."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scripts.cohorts.files import write_text
from scripts.cohorts.scans import counted
from scripts.evaluation.plots import GREY, GROUP_COLOURS, png_of
from scripts.imaging.quality import VERDICTS
from scripts.keys import FAILED, OK, RESEARCH_USE_ONLY
from scripts.prediction.findings import FORCED, page_verdict, quality_problems, trained_on_of
from scripts.prediction.outputs import TABLE, folder_names
from scripts.prediction.pages import Link, Ranked, render

INDEX, PREDICTION, REPORT = "index.html", "prediction.json", "report.html"
VIEWER = "viewer.html"
GROUPS = tuple(GROUP_COLOURS)
TITLES = (
    *("patient", "status", "risk percentile", "risk group", "HPV probability", "HPV", "tumour ml", "lesions"),
    *("SUVmax", "quality"),
)
SCANS = "scans"  # title of a column that is there if a patient has the viewer
NOTHING = "\u2013"


class SummaryError(ValueError):
    """A folder that holds no predictions; the message says what to do."""


def write_summary(output_dir: str | Path) -> Path:
    """Write ``index.html`` over what a run left in its folder.

    Raises:
        SummaryError: where there is no ``predictions.csv``.
    """
    folder = Path(output_dir)
    if not (folder / TABLE).is_file():
        raise SummaryError(f"{folder} holds no {TABLE}: predict some patients first")
    with (folder / TABLE).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    folders = {patient: folder / name for patient, name in folder_names(row["PatientID"] for row in rows).items()}
    predictions = {
        patient: _prediction(folders[patient])
        for patient, status in ((row["PatientID"], row["status"]) for row in rows)
        if status != FAILED
    }
    found = [prediction for prediction in predictions.values() if prediction is not None]
    forced = [prediction["patient_id"] for prediction in found if prediction["quality"]["forced"]]
    warnings = [f"{counted(len(forced), 'patient')}: {', '.join(forced)}. {FORCED}"] if forced else []
    ordered = sorted(rows, key=lambda row: _urgency(row, predictions.get(row["PatientID"])))
    patients = [_row(folders[row["PatientID"]], row, predictions.get(row["PatientID"])) for row in ordered]
    scans = [_viewer(folders[row["PatientID"]], predictions.get(row["PatientID"])) for row in ordered]
    titles: tuple[str, ...] = TITLES
    if any(isinstance(cell, Link) for cell in scans):
        titles, patients = (*TITLES, SCANS), [[*row, cell] for row, cell in zip(patients, scans, strict=True)]
    html = render(
        "index.html",
        title=f"Predictions of {counted(len(rows), 'patient')}",
        warnings=warnings,
        notice=f"{RESEARCH_USE_ONLY} {trained_on_of(found)}" if found else RESEARCH_USE_ONLY,
        counts=_counts(rows, found),
        risks=_risks(found),
        titles=titles,
        patients=patients,
        table=TABLE,
        failures=[(row["PatientID"], f"{row['status']}: {row['reason']}") for row in ordered if row["reason"]],
        findings=_findings(found),
        sortable=True,
    )
    write_text(folder / INDEX, html)
    return folder / INDEX


def _prediction(folder: Path) -> dict[str, Any] | None:
    """The prediction of a patient; None where its file is gone."""
    path = folder / PREDICTION
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _urgency(row: Mapping[str, str], prediction: Mapping[str, Any] | None) -> tuple[int, int]:
    """Sorts failed patients first, then incomplete ones, then by the verdict on the scans; else the order stays."""
    if prediction is None:
        return 0, 0
    return 1 + (row["status"] == OK), -VERDICTS.index(page_verdict(prediction["quality"]))


def _counts(rows: Sequence[Mapping[str, str]], predictions: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """How many patients have which status, risk group, HPV class and quality."""
    status = Counter(row["status"] for row in rows)
    verdicts = Counter(page_verdict(prediction["quality"]) for prediction in predictions)
    said = [("patients", f"{len(rows)} ({', '.join(f'{count} {name}' for name, count in status.most_common())})")]
    groups = Counter(_survival(prediction).get("risk_group") for prediction in predictions)
    known = [f"{groups[name]} {name}" for name in GROUPS if groups[name]]
    why = sorted({_survival(prediction).get("unavailable") or "survival is no task" for prediction in predictions})
    said.append(("risk groups", ", ".join(known) if known else f"not available: {'; '.join(why) or 'no prediction'}"))
    hpv = Counter((prediction.get("hpv") or {}).get("positive") for prediction in predictions)
    classes = f"{hpv[True]} positive, {hpv[False]} negative"
    said.append(("HPV", classes + (f", {hpv[None]} without a class" if hpv[None] else "")))
    said.append(
        ("quality", ", ".join(f"{count} {name}" for name, count in verdicts.most_common()) or "nothing checked")
    )
    return said


def _survival(prediction: Mapping[str, Any]) -> Mapping[str, Any]:
    return prediction.get("survival") or {}


def _risks(predictions: Sequence[Mapping[str, Any]]) -> tuple[bytes, str] | None:
    """A picture with a mark for each patient at its percentile among the training cases, and its caption."""
    placed = [
        (p["percentile"], p.get("risk_group") or "")
        for p in map(_survival, predictions)
        if p.get("percentile") is not None
    ]
    if not placed:
        return None
    figure = Figure(figsize=(7.1, 1.8), facecolor="white", layout="constrained")
    _draw_percentiles(figure.subplots(), placed)
    caption = (
        "Patients by their risk percentile among the training cases, in steps of 10. A cohort like the training cases "
        "would be level."
    )
    return png_of(figure, 150), caption


def _draw_percentiles(panel: Axes, placed: Sequence[tuple[float, str]]) -> None:
    heights = [0] * 10
    for percentile, group in sorted(placed):
        step = min(9, int(percentile // 10))
        panel.bar(10 * step + 5, 1, 9, bottom=heights[step], color=GROUP_COLOURS.get(group, GREY), edgecolor="white")
        heights[step] += 1
    for name in GROUPS:
        panel.bar(0, 0, color=GROUP_COLOURS[name], label=f"{name} risk")
    panel.set(xlim=(0, 100), ylim=(0, max(heights) * 1.25))
    panel.set_xlabel("risk percentile", fontsize=8)
    panel.set_ylabel("patients", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(ncols=3, frameon=False, fontsize=8, loc="upper right")


def _row(folder: Path, row: Mapping[str, str], prediction: Mapping[str, Any] | None) -> list[object]:
    patient = row["PatientID"]
    report = folder / REPORT
    if prediction is None:  # whatever report an earlier run has left there
        return [patient, row["status"], *[Ranked(NOTHING, None)] * (len(TITLES) - 2)]
    name = Link(patient, f"{folder.name}/{REPORT}") if report.is_file() else patient
    survival, hpv, tumour = (prediction.get(part) or {} for part in ("survival", "hpv", "tumour"))
    group = survival.get("risk_group")
    positive = hpv.get("positive")
    return [
        name,
        row["status"],
        _ranked(survival.get("percentile"), 0),
        Ranked(group, GROUPS.index(group)) if group in GROUPS else Ranked(NOTHING, None),
        _ranked(hpv.get("probability"), 2),
        NOTHING if positive is None else ("positive" if positive else "negative"),
        _ranked(tumour.get("volume_ml"), 1),
        _ranked(tumour.get("lesions"), 0),
        _ranked(tumour.get("suv_max"), 1),
        _quality(prediction["quality"]),
    ]


def _viewer(folder: Path, prediction: Mapping[str, Any] | None) -> str:
    """The way to a patient's viewer."""
    if prediction is None or "viewer" not in prediction["files"] or not (folder / VIEWER).is_file():
        return NOTHING
    return Link("view", f"{folder.name}/{VIEWER}")


def _quality(quality: Mapping[str, Any]) -> Ranked:
    verdict = page_verdict(quality)
    return Ranked(f"{verdict}{' (forced)' if quality['forced'] else ''}", VERDICTS.index(verdict))


def _ranked(value: float | None, digits: int) -> Ranked:
    return Ranked(NOTHING if value is None else f"{value:.{digits}f}", value)


def _findings(predictions: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Every check that a patient did not pass, but for ordinary voxel sizes."""
    return [
        (prediction["patient_id"], problem)
        for prediction in predictions
        for problem in quality_problems(prediction["quality"])
    ]
