"""Evaluation of a split: one row a case, the paper's three metrics with bootstrap intervals, written as files.

Every figure comes with the number of patients behind it, and a figure that cannot be had says why.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from monai.engines import Workflow
from monai.metrics import compute_dice

from scripts import keys
from scripts.files import write_text
from scripts.metrics import concordance_index

logger = logging.getLogger(__name__)

BOOTSTRAP_SAMPLES = 1000


def bootstrap_interval(
    statistic: Callable[[pd.DataFrame], float], cases: pd.DataFrame, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of ``statistic`` over patients drawn with replacement.

    Draws for which the statistic does not exist (no comparable pair, one class) are left out.

    Args:
        statistic: function of a table of cases.
        cases: one row a patient.
        samples: number of draws.
        seed: of the draws.

    Returns:
        The 2.5 % and the 97.5 % quantile; NaN where no draw had a value.

    Reference:
        Efron B., Tibshirani R. An Introduction to the Bootstrap. Chapman & Hall, 1993, chapter 13.
    """
    rng = np.random.default_rng(seed)
    values = np.array([statistic(cases.iloc[rng.integers(0, len(cases), len(cases))]) for _ in range(samples)])
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def c_index(cases: pd.DataFrame) -> float:
    """C-index (7) of a table with columns ``time``, ``event`` and ``log_hazard``."""
    return concordance_index(cases["time"].to_numpy(), cases["event"].to_numpy(), cases["log_hazard"].to_numpy())


def balanced_accuracy(cases: pd.DataFrame, threshold: float = 0.5) -> float:
    """Balanced accuracy (9), mean of sensitivity and specificity, of columns ``hpv`` and ``hpv_prob``."""
    positive = cases["hpv"].to_numpy() > 0.5
    called = cases["hpv_prob"].to_numpy() > threshold
    if positive.all() or not positive.any():
        return math.nan
    return float((called[positive].mean() + (~called[~positive]).mean()) / 2)


def summarise(cases: pd.DataFrame, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The paper's three metrics of a table of cases, each with interval, counts, or why there is none.

    Args:
        cases: columns of :class:`CaseTable`; NaN where a label is unknown.
        seed: of the bootstrap.

    Returns:
        metric name to ``{"value", "low", "high", "patients", ...}`` or ``{"value": None, "reason", ...}``.
    """
    with_time = cases.dropna(subset=["time"]) if "time" in cases else cases.iloc[:0]
    with_hpv = cases.dropna(subset=["hpv"]) if "hpv" in cases else cases.iloc[:0]
    with_mask = cases.dropna(subset=["dice"]) if "dice" in cases else cases.iloc[:0]
    events = int(with_time["event"].sum()) if len(with_time) else 0
    positives = int(with_hpv["hpv"].sum()) if len(with_hpv) else 0
    return {
        "c_index": _figure(
            with_time, "log_hazard", c_index, seed, f"no comparable pair ({events} events)", {"events": events}
        ),
        "dice": _figure(with_mask, "dice", lambda c: float(c["dice"].mean()), seed, "no masks", {}),
        "balanced_accuracy": _figure(
            with_hpv, "hpv_prob", balanced_accuracy, seed, "one class only", {"positive": positives}
        ),
    }


def _figure(
    cases: pd.DataFrame, column: str, statistic: Callable, seed: int, why_not: str, counts: Mapping[str, int]
) -> dict[str, Any]:
    head = {"patients": len(cases), **counts}
    if column not in cases:
        return {"value": None, "reason": "not a task of this model", **head}
    if not len(cases):
        return {"value": None, "reason": "no labelled case", **head}
    value = statistic(cases)
    if math.isnan(value):
        return {"value": None, "reason": why_not, **head}
    low, high = bootstrap_interval(statistic, cases, seed=seed)
    return {"value": value, "low": low, "high": high, **head}


def format_summary(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Table of :func:`summarise` to read."""
    names = {"c_index": "C-index", "dice": "Dice", "balanced_accuracy": "HPV balanced accuracy"}
    lines = []
    for key, name in names.items():
        row = summary[key]
        counts = ", ".join(f"{row[k]} {k}" for k in ("patients", "events", "positive") if k in row)
        if row["value"] is None:
            lines.append(f"  {name:<22} -      ({row['reason']}; {counts})")
        else:
            lines.append(f"  {name:<22} {row['value']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]  ({counts})")
    return "\n".join(lines)


class CaseTable:
    """Handler that writes ``cases.csv`` and ``metrics.json`` of an evaluation and logs the metrics.

    Args:
        output_dir: folder for both files.
        dataset_dir: stated in ``metrics.json``: no figure without its data.
        checkpoint: stated in ``metrics.json``.
        seed: of the bootstrap.
    """

    def __init__(self, output_dir: str, dataset_dir: str, checkpoint: str, seed: int = 0) -> None:
        self.output_dir = Path(output_dir)
        self.about = {"dataset_dir": str(dataset_dir), "checkpoint": str(checkpoint)}
        self.seed = seed
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Workflow) -> None:
        """Register with the evaluator ``engine`` (which must not decollate)."""
        engine.add_event_handler(Events.STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def collect(self, engine: Workflow) -> None:
        """Append the cases of one batch."""
        batch: Mapping[str, Any] = engine.state.batch
        self.rows.extend(case_rows(batch, engine.state.output["pred"]))

    def write(self, engine: Workflow) -> None:
        """Write both files and log the table of metrics."""
        cases = pd.DataFrame(self.rows)
        summary = summarise(cases, self.seed)
        write_text(self.output_dir / "cases.csv", cases.to_csv(index=False))
        report = {**self.about, "cases": len(cases), "metrics": summary}
        if keys.SEG_INSIDE in cases and cases[keys.SEG_INSIDE].notna().any():
            report["tumour_inside_box"] = {
                "mean": float(cases[keys.SEG_INSIDE].mean()),
                "minimum": float(cases[keys.SEG_INSIDE].min()),
            }
        write_text(self.output_dir / "metrics.json", json.dumps(report, indent=2))
        logger.info("%d cases of %s\n%s", len(cases), self.about["dataset_dir"], format_summary(summary))
        logger.info("written: %s, %s", self.output_dir / "cases.csv", self.output_dir / "metrics.json")


def case_rows(batch: Mapping[str, Any], pred: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """One row a case of a collated ``batch`` and its prediction; NaN where a label is unknown.

    Dice (8) is taken on the network's grid; the share of the true mask outside the box (``1 - seg_inside``) is
    beside it, since Dice cannot see that part.
    """
    columns: dict[str, Any] = {"PatientID": batch[keys.PATIENT_ID], keys.CENTRE: batch[keys.CENTRE]}
    if keys.LOG_HAZARD in pred:
        columns["log_hazard"] = _numbers(pred[keys.LOG_HAZARD])
    columns["time"] = _numbers(batch[keys.TIME], batch[keys.SURV_KNOWN])
    columns["event"] = _numbers(batch[keys.EVENT], batch[keys.SURV_KNOWN])
    if keys.HPV_PROB in pred:
        columns["hpv_prob"] = _numbers(pred[keys.HPV_PROB])
    columns["hpv"] = _numbers(batch[keys.HPV], batch[keys.HPV_KNOWN])
    if keys.SEG_PROB in pred:
        predicted = (pred[keys.SEG_PROB] > 0.5).float().cpu()
        truth = torch.as_tensor(batch[keys.SEG]).float().cpu()
        voxel_ml = np.abs(np.linalg.det(np.asarray(batch[keys.BOX_AFFINE], dtype=float)[:, :3, :3])) / 1000
        columns["dice"] = _numbers(compute_dice(predicted, truth, ignore_empty=False)[:, 0], batch[keys.SEG_KNOWN])
        columns["volume_ml"] = _numbers(predicted.flatten(1).sum(1)) * voxel_ml
        columns["true_volume_ml"] = _numbers(truth.flatten(1).sum(1), batch[keys.SEG_KNOWN]) * voxel_ml
        columns[keys.SEG_INSIDE] = _numbers(batch[keys.SEG_INSIDE])
    columns[keys.CROP_METHOD] = batch[keys.CROP_METHOD]
    columns[keys.CROP_FLAG] = batch[keys.CROP_FLAG]
    return pd.DataFrame(columns).to_dict("records")


def _numbers(values: Any, known: Any = None) -> np.ndarray:
    array = torch.as_tensor(values).detach().cpu().double().numpy().reshape(-1)
    return array if known is None else np.where(torch.as_tensor(known).cpu().numpy().astype(bool), array, np.nan)
