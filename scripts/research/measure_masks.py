"""Masks that ``predict.py`` writes against the true ones, on the scans' own grid: of any model and folder with masks.

``python scripts/research measure_masks --dataset_dir FOLDER --ckpt_dir MODEL --output_dir OUT`` predicts every patient
of a folder as a user does (no mask is read for it) and writes ``masks.csv``, a row for each patient, and
``masks.json``, the metrics with intervals. The bundle's ``evaluating --evaluate_on all`` gives more metrics, but of
masks on the network's grid: models with voxels of different sizes have different true masks there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from command_line import BUNDLE, run_tool

from runtimes.inference import configure_log, load_bundle, named_files, run_cases
from scripts import keys
from scripts.cohorts.cohort import CohortError, load_cohort
from scripts.cohorts.files import write_text
from scripts.cohorts.scans import counted
from scripts.evaluation.case_metrics import MEASURES, format_summary, summarise
from scripts.evaluation.case_table import mask_columns
from scripts.imaging.geometry import Grid, bounding_window, resample
from scripts.imaging.images import read_image
from scripts.keys import FAILED
from scripts.model.ensemble import saved_provenance, saved_spec
from scripts.model.errors import CheckpointError
from scripts.prediction.inputs import find_cases
from scripts.training.configuration import ConfigurationError

TABLE, METRICS = "masks.csv", "masks.json"


class MeasureError(ValueError):
    """What cannot be measured."""


def measure_masks(
    dataset_dir: str, output_dir: str, ckpt_dir: str = str(BUNDLE / "models"), device: str | None = None
) -> None:
    """Predict a folder of patients with masks and compare predicted and true masks on the CT's grid.

    If interrupted, rerun the same command: what this model predicted already is kept. Ends with exit code 1 if a
    patient with a mask has no prediction.

    Args:
        dataset_dir: folder of patients in one of HECKTOR's layouts, with masks.
        output_dir: receives the predictions, masks.csv and masks.json.
        ckpt_dir: folder that holds the weights, model.pt.
        device: cpu or cuda:0; by default the GPU where there is one.
    """
    configure_log()
    masks = {case[keys.PATIENT_ID]: case for case in load_cohort(dataset_dir).cases if case[keys.SEG_KNOWN]}
    if not masks:
        raise MeasureError(f"{dataset_dir} holds no mask to compare with")
    spec = saved_spec(Path(ckpt_dir) / "model.pt")
    if "seg" not in spec.tasks:
        raise MeasureError(f"{ckpt_dir}: this model predicts no mask")
    cases = [case for case in find_cases(dataset_dir, spec.clinical_features) if case[keys.PATIENT_ID] in masks]
    writer = run_cases(load_bundle(output_dir, ckpt_dir, device), cases, resume=True)
    failed = [patient for patient in masks if writer.rows[patient]["status"] == FAILED]
    nodes = {case[keys.CENTRE] for case in masks.values() if (read_image(case[keys.MASK])[0] == keys.GTVN).any()}
    rows = []
    for patient in (name for name in masks if name not in failed):
        true, centre = (masks[patient][name] for name in (keys.MASK, keys.CENTRE))
        predicted = writer.folder(patient) / named_files(writer.folder(patient))["mask"]
        compared = compare(predicted, true, centre in nodes, len(spec.seg_classes) > 1)
        crop = {name: writer.rows[patient][name] for name in (keys.CROP_METHOD, keys.CROP_FLAG)}
        rows.append({"PatientID": patient, keys.CENTRE: centre, **compared, **crop})
    report = write(pd.DataFrame(rows), Path(output_dir), dataset_dir, Path(ckpt_dir) / "model.pt", failed)
    print(f"{report}\n{keys.RESEARCH_USE_ONLY}")
    if failed:
        raise SystemExit(1)


def compare(predicted: Path, true: str | Path, apart: bool, classes: bool) -> dict[str, float]:
    """The columns of :func:`scripts.evaluation.case_table.mask_columns` of one patient.

    Args:
        predicted: mask on the CT's grid.
        true: mask; the nearest values of one on another grid are taken.
        apart: whether the true mask tells GTVp and GTVn apart.
        classes: whether the model does.
    """
    (found, affine), (truth, true_affine) = read_image(predicted), read_image(true)
    if truth.shape != found.shape or not np.allclose(true_affine, affine, atol=1e-3):
        truth = resample(truth, Grid(truth.shape, true_affine), Grid(found.shape, affine), "nearest")
    window = bounding_window((found > 0) | (truth > 0)) or (slice(0, 1),) * 3
    labels, seg = (torch.from_numpy(np.rint(mask[window]).astype(np.uint8))[None, None] for mask in (found, truth))
    batch = {keys.SEG: seg, keys.SEG_KNOWN: torch.tensor([True]), keys.SEG_CLASSES_KNOWN: torch.tensor([apart])}
    batch |= {keys.SEG_INSIDE: torch.ones(1), keys.BOX_AFFINE: torch.from_numpy(affine)[None]}
    return {name: float(values[0]) for name, values in mask_columns(batch, labels, classes).items()}


def write(cases: pd.DataFrame, folder: Path, dataset_dir: str, checkpoint: Path, failed: list[str]) -> str:
    """Write both files; the metrics as text."""
    write_text(folder / TABLE, cases.to_csv(index=False))
    names = [name for name, measure in MEASURES.items() if measure.columns[0] in cases]
    metrics: Mapping[str, Any] = summarise(cases, measures=names)
    trained_on = saved_provenance(checkpoint).get("trained_on")
    about = {"dataset_dir": str(dataset_dir), "checkpoint": str(checkpoint), "trained_on": trained_on}
    write_text(folder / METRICS, json.dumps({**about, "failed": failed, "metrics": metrics}, indent=2, allow_nan=False))
    lines = [
        f"{counted(len(cases), 'patient')} of {dataset_dir}; model trained on {trained_on}",
        format_summary(metrics),
    ]
    lines += [f"no prediction of {patient}: the messages above say why" for patient in failed]
    return "\n".join([*lines, f"written: {folder / TABLE}, {METRICS}"])


if __name__ == "__main__":
    run_tool(measure_masks, MeasureError, CohortError, CheckpointError, ConfigurationError, OSError)
