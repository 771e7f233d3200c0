"""A patient's prediction as DICOM objects: lesions as segmentation and contours of the CT, numbers as a report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts import keys
from scripts.dicom.choice import Choice
from scripts.dicom.rtstruct import write_rtstruct
from scripts.dicom.seg import Model, write_seg
from scripts.dicom.sr import PREDICTION, TUMOUR, Findings, write_sr
from scripts.imaging.lesions import find_lesions
from scripts.prediction.description import METADATA
from scripts.prediction.findings import AS_IN_TRAINING, clinical_name, quality_problems, quality_remarks
from scripts.prediction.measures import OF_LESION, TOTALS

SEG_FILE, RTSTRUCT_FILE, SR_FILE = "tumour_seg.dcm", "tumour_rtstruct.dcm", "report_sr.dcm"
FORCED = "Tumour, research use only; FORCED in spite of quality control"  # of at most 64 letters


def write_dicom_results(case: Mapping[str, Any], result: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
    """Write SEG, RTSTRUCT and SR of a case that was given as DICOM; a product of :class:`.PredictionWriter`.

    Args:
        case: its key ``dicom`` holds the series that were used; without it nothing is written.
        result: ``prediction``, and ``pred`` where the model segments.
        folder: receives ``tumour_seg.dcm``, ``tumour_rtstruct.dcm`` and ``report_sr.dcm``.

    Yields:
        Name and file of each, for ``files`` of the prediction.

    Raises:
        scripts.dicom.tags.DicomError: where the source series can no longer be read.
    """
    choice: Choice | None = case.get(keys.DICOM)
    if choice is None:
        return
    prediction = result[keys.PREDICTION]
    model, seg = dicom_model(prediction), None
    folder.mkdir(parents=True, exist_ok=True)
    if result.get(keys.PRED) is not None:
        mask = np.asarray(torch.as_tensor(result[keys.PRED]).cpu())[0].astype(np.uint8, copy=False)
        lesions = find_lesions(mask, choice.ct.grid, prediction["tumour"]["classes"])
        numbers = lesions.on(mask.shape)
        title: dict[str, Any] = {"description": FORCED} if prediction["quality"]["forced"] else {}
        seg = write_seg(folder / SEG_FILE, numbers, lesions.found, choice.ct, model=model, **title)
        yield "dicom_seg", SEG_FILE
        write_rtstruct(folder / RTSTRUCT_FILE, numbers, lesions.found, choice.ct, model=model, **title)
        yield "dicom_rtstruct", RTSTRUCT_FILE
    write_sr(
        folder / SR_FILE,
        findings(prediction),
        ct=choice.ct,
        pet=choice.pet,
        model=model,
        seg=seg,
        notes=notes(prediction),
        remarks=remarks(prediction),
    )
    yield "dicom_sr", SR_FILE


def dicom_model(prediction: Mapping[str, Any]) -> Model:
    """What made the prediction, as DICOM names it."""
    model = prediction["model"]
    authors = json.loads(METADATA.read_text(encoding="utf-8"))["authors"]
    return Model(model["name"], model["version"], authors, model["sha256"], model["trained_on"])


def findings(prediction: Mapping[str, Any]) -> Findings:
    """The numbers of ``prediction.json`` that the structured report has a place for."""
    survival, hpv, tumour = (prediction[part] or {} for part in ("survival", "hpv", "tumour"))
    return Findings(
        tumour={name: tumour.get(name) for name in TOTALS},
        lesions=[{name: lesion[name] for name in OF_LESION} for lesion in tumour.get("lesion_list", [])],
        log_hazard=survival.get("log_hazard"),
        risk_percentile=survival.get("percentile"),
        survival={round(row["days"]): row["survival"] for row in survival.get("recurrence_free_survival", [])},
        hpv_probability=hpv.get("probability"),
        hpv_positive=hpv.get("positive"),
    )


def notes(prediction: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers must know: quality, what was missing; nothing that identifies anyone."""
    survival, hpv = (prediction[part] or {} for part in ("survival", "hpv"))
    said = []
    if prediction["quality"]["forced"]:
        said.append("FORCED: quality control rejected these scans, and they were predicted in spite of it")
    quality = prediction["quality"]
    said += [f"Quality control, {text}" for text in (*quality_problems(quality), *quality_remarks(quality))]
    if prediction["crop"]["flag"]:
        said.append(f"Field of view of the network: {prediction['crop']['flag']}")
    missing = [clinical_name(row["name"]) for row in prediction["clinical"] if row["missing"]]
    if missing:
        said.append(f"Clinical values that were missing: {', '.join(missing)}")
    said += [f"{title}: {part['doubt']}" for title, part in (("Survival", survival),) if part.get("doubt")]
    said += [
        f"{title} not available: {part['unavailable']}"
        for title, part in (("Absolute risk", survival), ("HPV class", hpv))
        if part.get("unavailable")
    ]
    return said


def remarks(prediction: Mapping[str, Any]) -> dict[str, list[str]]:
    """How to read the numbers of each group: the rule of MTV; spread of the folds, threshold, endpoint."""
    survival, hpv, tumour = (prediction[part] or {} for part in ("survival", "hpv", "tumour"))
    rule = tumour.get("mtv_rule") if tumour.get("lesions") else ""
    said: dict[str, list[str]] = {
        TUMOUR: [f"Metabolic Volume and Total Lesion Glycolysis: {rule}"] if rule else [],
        PREDICTION: [],
    }
    given = survival.get("recurrence_free_survival") or []
    ranges = [f"{r['low']:.3f} to {r['high']:.3f} at {r['days']:.0f} days" for r in given if r["low"] is not None]
    if ranges:
        folds = len(survival["log_hazard_folds"])
        said[PREDICTION].append(
            f"Recurrence-free survival, range of {folds} folds, no confidence interval: {', '.join(ranges)}"
        )
    said[PREDICTION] += [AS_IN_TRAINING] if given else []
    if hpv.get("threshold") is not None:
        values = hpv["probability_folds"]
        spread = f"; of {len(values)} folds {min(values):.3f} to {max(values):.3f}" if len(values) > 1 else ""
        said[PREDICTION].append(f"HPV status is positive above a probability of {hpv['threshold']:.3f}{spread}")
    return said
