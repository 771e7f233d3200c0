"""Evaluation of a split: one row a case, the paper's metrics and others with bootstrap intervals, written as files.

Every figure comes with the number of patients behind it, and a figure that cannot be had says why.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cc3d
import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from monai.engines import Workflow
from monai.metrics import compute_dice, compute_hausdorff_distance
from scipy.stats import rankdata

from scripts import keys
from scripts.bootstrap import BOOTSTRAP_SAMPLES, bootstrap_interval
from scripts.ensemble import FoldEnsemble
from scripts.files import write_text, written_whole
from scripts.metrics import concordance_index
from scripts.survival import Outcomes
from scripts.survival_metrics import ensemble_survival, survival_metrics

if TYPE_CHECKING:
    from scripts.plots import Drawn

logger = logging.getLogger(__name__)

FEATURES_FILE = "features.npz"

HPV_THRESHOLD = 0.5
SURFACE_PERCENTILE = 95
LESION_OVERLAP = 0.3  # share of a lesion that a prediction must cover to have found it
NO_CUT_POINTS = (
    "the risk is not cut: a single network carries no cut points (evaluate_folds.py cuts by the other folds)"
)
SMALL_GROUP = {"patients": 10, "events": 5, "positive": 3, "negative": 3}
"""Below so many, an interval of one centre would say no more than that there is none."""

LESIONS = {"lesion": "lesions", "primary": "primaries", "node": "nodes"}
"""What is looked for in the true masks, one of it and several: anything, GTVp, GTVn."""

Statistic = Callable[[pd.DataFrame], float]


# --- statistics of a table of cases -----------------------------------------------------------------------------------


def c_index(cases: pd.DataFrame) -> float:
    """C-index (7) of a table with columns ``time``, ``event`` and ``log_hazard``."""
    return concordance_index(cases["time"].to_numpy(), cases["event"].to_numpy(), cases["log_hazard"].to_numpy())


def hpv_calls(cases: pd.DataFrame, threshold: float = HPV_THRESHOLD) -> np.ndarray:
    """(N,) bool, whether HPV is called positive: ``hpv_prob`` is above the row's ``hpv_threshold``, else above that."""
    limit = cases["hpv_threshold"].to_numpy() if "hpv_threshold" in cases else threshold
    return cases["hpv_prob"].to_numpy() > limit


def balanced_accuracy(cases: pd.DataFrame, threshold: float = HPV_THRESHOLD) -> float:
    """Balanced accuracy (9), mean of sensitivity and specificity, of columns ``hpv`` and ``hpv_prob``.

    Args:
        cases: may have a column ``hpv_threshold``, which is then used instead (out-of-fold cases of several networks).
        threshold: above which HPV is called positive.
    """
    positive = cases["hpv"].to_numpy() > 0.5
    called = hpv_calls(cases, threshold)
    if positive.all() or not positive.any():
        return math.nan
    return float((called[positive].mean() + (~called[~positive]).mean()) / 2)


def confusion(cases: pd.DataFrame, threshold: float = HPV_THRESHOLD) -> dict[str, int]:
    """Numbers of patients by true HPV status and call (columns as :func:`balanced_accuracy`)."""
    positive, called = cases["hpv"].to_numpy() > 0.5, hpv_calls(cases, threshold)
    return {
        "true_positive": int((positive & called).sum()),
        "false_negative": int((positive & ~called).sum()),
        "true_negative": int((~positive & ~called).sum()),
        "false_positive": int((~positive & called).sum()),
    }


def roc_auc(cases: pd.DataFrame) -> float:
    """Area under the ROC curve of columns ``hpv`` and ``hpv_prob``: how often a positive case has the higher one."""
    positive = cases["hpv"].to_numpy() > 0.5
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return math.nan
    ranks = rankdata(cases["hpv_prob"].to_numpy())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def roc_curve(cases: pd.DataFrame) -> pd.DataFrame:
    """Points of the ROC curve of columns ``hpv`` and ``hpv_prob``, from the strictest threshold to the loosest.

    Returns:
        Columns ``threshold`` (called positive from it on), ``false_positive_rate``, ``true_positive_rate``.

    Raises:
        ValueError: where only one class is there.
    """
    positive = cases["hpv"].to_numpy() > 0.5
    if positive.all() or not positive.any():
        raise ValueError("one class only: there is no ROC curve")
    values, true, false = _counts_from(cases["hpv_prob"].to_numpy(), positive)
    return pd.DataFrame(
        {
            "threshold": np.concatenate([[math.inf], values]),
            "false_positive_rate": np.concatenate([[0.0], false / (~positive).sum()]),
            "true_positive_rate": np.concatenate([[0.0], true / positive.sum()]),
        }
    )


def average_precision(cases: pd.DataFrame) -> float:
    r"""Average precision of columns ``hpv`` and ``hpv_prob``.

    .. math:: AP = \sum_n (R_n - R_{n-1}) P_n

    over the distinct probabilities from the highest, with recall R and precision P. Chance is the share of positives.
    """
    positive = cases["hpv"].to_numpy() > 0.5
    if positive.all() or not positive.any():
        return math.nan
    _, true, false = _counts_from(cases["hpv_prob"].to_numpy(), positive)
    return float(np.sum(np.diff(true, prepend=0) * true / (true + false)) / positive.sum())


def _counts_from(prob: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct probabilities from the highest, and the positive and negative cases at or above each."""
    order = np.argsort(-prob, kind="stable")
    last = np.flatnonzero(np.diff(prob[order], append=-math.inf))
    true = np.cumsum(positive[order])[last]
    return prob[order][last], true, last + 1 - true


def aggregated_dice(cases: pd.DataFrame) -> float:
    r"""HECKTOR's aggregated Dice of columns ``dice``, ``volume_ml`` and ``true_volume_ml``.

    .. math:: DSC_{agg} = \frac{2 \sum_i |P_i \cap G_i|}{\sum_i (|P_i| + |G_i|)}

    Large tumours weigh more; an empty mask cannot bring a case to 0 or 1 at one voxel.

    Reference:
        Andrearczyk V. et al. Overview of the HECKTOR challenge at MICCAI 2022. LNCS 13626, 2023.
    """
    volumes = (cases["volume_ml"] + cases["true_volume_ml"]).to_numpy()
    return float((cases["dice"].to_numpy() * volumes).sum() / volumes.sum()) if volumes.sum() else math.nan


def surface_distance(cases: pd.DataFrame) -> float:
    """Median of ``surface_distance_mm`` over the cases in which there are two surfaces."""
    values = cases["surface_distance_mm"].to_numpy()
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def volume_error(cases: pd.DataFrame) -> float:
    """Mean absolute difference between ``volume_ml`` and ``true_volume_ml``."""
    return float(np.abs(cases["volume_ml"].to_numpy() - cases["true_volume_ml"].to_numpy()).mean())


def volume_bias(cases: pd.DataFrame) -> float:
    """Mean of ``volume_ml`` less ``true_volume_ml``; above 0 the prediction is too large."""
    return float((cases["volume_ml"].to_numpy() - cases["true_volume_ml"].to_numpy()).mean())


def relative_volume_error(cases: pd.DataFrame) -> float:
    """Median absolute difference of the volumes as a share of the true one, over the cases that have a tumour."""
    volume, true = cases["volume_ml"].to_numpy(), cases["true_volume_ml"].to_numpy()
    return float(np.median(np.abs(volume - true)[true > 0] / true[true > 0])) if (true > 0).any() else math.nan


def sensitivity(cases: pd.DataFrame, of: str) -> float:
    """Share of all true lesions that were found: of columns ``true_<of>`` and ``found_<of>``."""
    true = cases[f"true_{of}"].sum()
    return float(cases[f"found_{of}"].sum() / true) if true else math.nan


# --- summary ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A figure of a table of cases.

    Attributes:
        title: its name for readers, with its unit.
        columns: what it reads; a case counts where none of them is NaN. A table without the first one is of a model
            that lacks the task.
        statistic: function of a table of the cases that count; NaN where it does not exist.
        why_not: the reason then; ``{events}`` and other counts are filled in.
        digits: decimals to show.
    """

    title: str
    columns: tuple[str, ...]
    statistic: Statistic
    why_not: str
    digits: int = 3


_HPV, _VOLUMES = ("hpv_prob", "hpv"), ("volume_ml", "true_volume_ml")
_ONE_CLASS, _NO_MASKS, _NO_TUMOUR = "one class only", "no masks", "no tumour in any mask"
MEASURES = {
    "c_index": Measure("C-index", ("log_hazard", "time", "event"), c_index, "no comparable pair ({events} events)"),
    "dice": Measure("Dice", ("dice",), lambda c: float(c["dice"].mean()), _NO_MASKS),
    "balanced_accuracy": Measure("HPV balanced accuracy", _HPV, balanced_accuracy, _ONE_CLASS),
    "hpv_auc": Measure("HPV ROC AUC", _HPV, roc_auc, _ONE_CLASS),
    "hpv_average_precision": Measure("HPV average precision", _HPV, average_precision, _ONE_CLASS),
    "dice_aggregated": Measure("Dice, aggregated", ("dice", *_VOLUMES), aggregated_dice, "all masks are empty"),
    "surface_distance_mm": Measure(
        "surface distance, mm", ("surface_distance_mm",), surface_distance, "{missed} of {patients} are missed", 1
    ),
    "volume_error_ml": Measure("volume error, ml", _VOLUMES, volume_error, _NO_MASKS, 1),
    "volume_bias_ml": Measure("volume bias, ml", _VOLUMES, volume_bias, _NO_MASKS, 1),
    "volume_error_relative": Measure("volume error, relative", _VOLUMES, relative_volume_error, _NO_TUMOUR),
    **{
        f"{name}_sensitivity": Measure(
            f"{name} sensitivity", (f"found_{of}", f"true_{of}"), partial(sensitivity, of=of), f"no {name} in any mask"
        )
        for name, of in LESIONS.items()
    },
    "false_lesions_per_case": Measure(
        "false lesions a case", ("false_lesions",), lambda c: float(c["false_lesions"].mean()), _NO_MASKS, 2
    ),
}
"""What :func:`summarise` gives; the paper's three metrics first."""
PAPER_MEASURES = ("c_index", "dice", "balanced_accuracy")


def summarise(
    cases: pd.DataFrame,
    seed: int = 0,
    measures: Sequence[str] = tuple(MEASURES),
    least: Mapping[str, int] | None = None,
    samples: int = BOOTSTRAP_SAMPLES,
) -> dict[str, dict[str, Any]]:
    """Figures of a table of cases, each with interval, counts, or why there is none.

    Args:
        cases: columns of :class:`CaseTable`; NaN where a label is unknown. A column ``hpv_threshold`` is used where
            there is one, else 0.5.
        seed: of the bootstrap.
        measures: keys of :data:`MEASURES`.
        least: counts (``patients``, ``events``, ...) below which no figure is given, such as :data:`SMALL_GROUP`.
        samples: draws of the bootstrap.

    Returns:
        metric name to ``{"value", "low", "high", "patients", ...}`` or ``{"value": None, "reason", ...}``. The figure
        ``balanced_accuracy`` also has ``confusion`` and ``thresholds``, the distinct ones that were used.
    """
    return {name: _figure(cases, MEASURES[name], name, seed, least, samples) for name in measures}


def centre_groups(cases: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Name and cases of each centre, sorted by name; none where the table does not tell."""
    groups = cases.groupby(keys.CENTRE, sort=True) if keys.CENTRE in cases else ()
    return [(str(centre), group) for centre, group in groups]


def too_few(counts: Mapping[str, Any], least: Mapping[str, int] | None) -> str:
    """Why a group is too small for a figure, or nothing.

    Args:
        counts: ``patients``, ``events``, ...; one that is not there is not asked for.
        least: such as :data:`SMALL_GROUP`.

    Example:
        >>> too_few({"patients": 12, "events": 3}, SMALL_GROUP), too_few({"patients": 12}, SMALL_GROUP)
        ('too few: 3 events of at least 5', '')
    """
    few = [f"{counts[what]} {what} of at least {n}" for what, n in (least or {}).items() if counts.get(what, n) < n]
    return f"too few: {', '.join(few)}" if few else ""


def _figure(
    cases: pd.DataFrame, measure: Measure, name: str, seed: int, least: Mapping[str, int] | None, samples: int
) -> dict[str, Any]:
    present = [column for column in (*measure.columns, "hpv_threshold") if column in cases]
    known = cases[present].dropna(subset=[column for column in present if column in measure.columns])
    if any(column not in cases for column in measure.columns[1:]):  # nobody has the label
        known = known.iloc[:0]
    head = {"patients": len(known), **_class_counts(name, known)}
    if measure.columns[0] not in cases:
        counted_later = measure.columns[0].startswith("found_") and "dice" in cases
        reason = "not counted by the version that judged these cases" if counted_later else "not a task of this model"
        return {"value": None, "reason": reason, **head}
    if not len(known):
        return {"value": None, "reason": "no labelled case", **head}
    value = measure.statistic(known)
    if math.isnan(value):
        return {"value": None, "reason": measure.why_not.format(**head), **head}
    if few := too_few(head, least):
        return {"value": None, "reason": few, **head}
    low, high = bootstrap_interval(measure.statistic, known, samples, seed)
    figure: dict[str, Any] = {"value": value, "low": low, "high": high, **head}
    if name == "balanced_accuracy":
        thresholds = known["hpv_threshold"] if "hpv_threshold" in known else pd.Series([HPV_THRESHOLD])
        figure |= {"confusion": confusion(known), "thresholds": sorted({float(value) for value in thresholds})}
    return figure


def _class_counts(name: str, known: pd.DataFrame) -> dict[str, int]:
    """What besides patients is counted beside a figure."""
    if name == "c_index":
        return {"events": int(known["event"].sum()) if "event" in known else 0}
    if "hpv" in known:
        positive = int(known["hpv"].sum())
        return {"positive": positive, "negative": len(known) - positive}
    if name.endswith("_sensitivity"):
        of = LESIONS[name.removesuffix("_sensitivity")]
        return {of: int(known[f"true_{of}"].sum()) if f"true_{of}" in known else 0}
    if name == "surface_distance_mm":
        return {"missed": int(np.isinf(known["surface_distance_mm"]).sum()) if "surface_distance_mm" in known else 0}
    return {}


def format_summary(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Table of :func:`summarise` to read."""
    lines = []
    for name, row in summary.items():
        title, digits = MEASURES[name].title, MEASURES[name].digits
        names = ("patients", "events", "positive", *LESIONS.values(), "missed")
        counts = ", ".join(f"{row[k]} {k}" for k in names if k in row)
        if len(row.get("thresholds", ())) == 1:
            counts += f"; called above {row['thresholds'][0]:.3f}"
        if row["value"] is None:
            lines.append(f"  {title:<22} -      ({row['reason']}; {counts})")
        else:
            value, low, high = (f"{row[k]:.{digits}f}" for k in ("value", "low", "high"))
            lines.append(f"  {title:<22} {value}  [{low}, {high}]  ({counts})")
    return "\n".join(lines)


# --- rows and files of a run ------------------------------------------------------------------------------------------


class CaseTable:
    """Handler that writes ``cases.csv``, ``metrics.json`` and plots of an evaluation and logs the metrics.

    Figures are of all cases and of each centre, of small ones (:data:`SMALL_GROUP`) with the reason only.

    Where the network tells its deep features they go to ``features.npz`` (see :func:`read_features`), from which
    an ensemble learns what its training cases look like.

    Args:
        output_dir: folder for the files; the plots go to ``figures/`` in it.
        dataset_dir: stated in ``metrics.json``: no figure without its data.
        checkpoint: stated in ``metrics.json``.
        seed: of the bootstrap.
        training_cases: cases (:mod:`scripts.cohort`) whose follow-up weights the survival figures of
            :func:`scripts.survival_metrics.survival_metrics`: those that the network was trained on, or those judged
            where it was trained elsewhere; None leaves these figures out.
        ensemble: the network, where the cohort is one that it has not learnt from: HPV is then called at the threshold
            that it carries, and its calibration gives absolute risk, which is judged too.
    """

    def __init__(
        self,
        output_dir: str,
        dataset_dir: str,
        checkpoint: str,
        seed: int = 0,
        training_cases: Sequence[Mapping[str, Any]] | None = None,
        ensemble: FoldEnsemble | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.about = {"dataset_dir": str(dataset_dir), "checkpoint": str(checkpoint)}
        self.seed = seed
        self.training_cases = training_cases
        self.ensemble = ensemble
        self.rows: list[dict[str, Any]] = []
        self.features: list[np.ndarray] = []

    def attach(self, engine: Workflow) -> None:
        """Register with the evaluator ``engine`` (which must not decollate)."""
        engine.add_event_handler(Events.STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.STARTED, lambda _: self.features.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def collect(self, engine: Workflow) -> None:
        """Append the cases of one batch."""
        batch: Mapping[str, Any] = engine.state.batch
        self.rows.extend(case_rows(batch, engine.state.output["pred"]))
        if keys.FEATURES in engine.state.output["pred"]:
            self.features.append(engine.state.output["pred"][keys.FEATURES].float().cpu().numpy())

    def write(self, engine: Workflow) -> None:
        """Write all files and log the table of metrics."""
        cases = pd.DataFrame(self.rows)
        threshold = self._carried("hpv_threshold").get("value")
        if threshold is not None and "hpv_prob" in cases:
            cases["hpv_threshold"] = threshold
        write_text(self.output_dir / "cases.csv", cases.to_csv(index=False))
        if self.features:
            write_features(self.output_dir, cases["PatientID"], np.concatenate(self.features))
        report = {**self.about, **self._judge(cases)}
        report["centres"] = {centre: self._judge(group, SMALL_GROUP) for centre, group in centre_groups(cases)}
        if keys.SEG_INSIDE in cases and cases[keys.SEG_INSIDE].notna().any():
            report["tumour_inside_box"] = {
                "mean": float(cases[keys.SEG_INSIDE].mean()),
                "minimum": float(cases[keys.SEG_INSIDE].min()),
            }
        report["figures"] = self._draw(cases, report)
        write_text(self.output_dir / "metrics.json", json.dumps(report, indent=2, allow_nan=False))
        logger.info("%d cases of %s\n%s", len(cases), self.about["dataset_dir"], format_summary(report["metrics"]))
        logger.info("written: %s, with metrics.json and figures/ beside it", self.output_dir / "cases.csv")

    def _judge(self, cases: pd.DataFrame, least: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Every figure of some of the cases; none where there are fewer than ``least``."""
        report: dict[str, Any] = {"cases": len(cases), "metrics": summarise(cases, self.seed, least=least)}
        if self.training_cases is not None and "log_hazard" in cases:
            report["survival"] = self._survival(cases.dropna(subset=["time"]), least)
        return report

    def _survival(self, cases: pd.DataFrame, least: Mapping[str, int] | None) -> dict[str, Any]:
        if few := too_few({"patients": len(cases), "events": int(cases["event"].sum())}, least):
            return {"reason": few}
        known = [case for case in self.training_cases or () if case[keys.SURV_KNOWN]]
        train = Outcomes(
            np.array([case[keys.TIME] for case in known], dtype=float),
            np.array([case[keys.EVENT] for case in known], dtype=float),
        )
        test = Outcomes(cases["time"].to_numpy(), cases["event"].to_numpy())
        stored = self._carried("calibration") or None
        return survival_metrics(train, test, **ensemble_survival(cases, stored), seed=self.seed)

    def _draw(self, cases: pd.DataFrame, report: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """Write what can be drawn, and tell the file of each picture or why there is none."""
        from scripts.plots import save_plots, survival_figures  # matplotlib is slow to import

        no_groups = self._carried("calibration").get("reason", NO_CUT_POINTS)
        drawn = case_figures(cases, report["metrics"])
        drawn |= survival_figures(report.get("survival", {"reason": "survival is not judged here"}), no_groups)
        return save_plots(self.output_dir / "figures", drawn, self.about["dataset_dir"])

    def _carried(self, name: str) -> Mapping[str, Any]:
        """What the ensemble carries under this name, or nothing."""
        return {} if self.ensemble is None else self.ensemble.provenance.get(name) or {}


def write_features(folder: Path, patients: Sequence[str], features: np.ndarray) -> None:
    """Write the deep features (N, K, F) of N patients by the K networks of an ensemble to ``features.npz``."""
    with written_whole(folder / FEATURES_FILE) as partial, partial.open("wb") as file:
        np.savez_compressed(file, patients=np.asarray(patients, dtype=str), features=features)


def read_features(folder: str | Path) -> tuple[list[str], np.ndarray]:
    """Patients (N) and their deep features (N, K, F) that an evaluation left in ``folder``.

    Raises:
        FileNotFoundError: where there are none; the message says how to get them.
    """
    path = Path(folder) / FEATURES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run the evaluation again, which writes it for networks with survival")
    with np.load(path) as stored:
        return stored["patients"].tolist(), stored["features"]


def case_figures(cases: pd.DataFrame, summary: Mapping[str, Mapping[str, Any]]) -> dict[str, Drawn]:
    """ROC curve of HPV status and Dice of each case, as :func:`scripts.plots.save_plots` takes them.

    Args:
        cases: as :func:`summarise` takes it.
        summary: what it gave.
    """
    from scripts.plots import dice_figure, roc_figure  # matplotlib is slow to import

    drawn: dict[str, Drawn] = {
        name: (None, summary[of].get("reason")) for name, of in (("roc", "hpv_auc"), ("dice", "dice"))
    }
    if summary["hpv_auc"]["value"] is not None:
        curve = {"HPV": roc_data(cases, summary["hpv_auc"])}
        drawn["roc"] = (roc_figure(curve, "HPV status"), curve)
    if summary["dice"]["value"] is not None:
        groups = dice_groups(cases)
        drawn["dice"] = (dice_figure(groups, "overlap with the true mask"), groups)
    return drawn


def roc_data(cases: pd.DataFrame, auc: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`scripts.plots.roc_figure` takes: the curve, its area and the point at the threshold in use.

    Args:
        cases: columns as :func:`balanced_accuracy`; rows without a known status are left out.
        auc: figure of the area.
    """
    known = cases.dropna(subset=["hpv", "hpv_prob"])
    curve, counts = roc_curve(known), confusion(known)
    negative = counts["false_positive"] + counts["true_negative"]
    positive = counts["true_positive"] + counts["false_negative"]
    return {
        "false_positive_rate": curve["false_positive_rate"].tolist(),
        "true_positive_rate": curve["true_positive_rate"].tolist(),
        "point": [counts["false_positive"] / negative, counts["true_positive"] / positive],
        "auc": dict(auc),
    }


def dice_groups(cases: pd.DataFrame) -> dict[str, list[float]]:
    """Dice of all cases that have one, and of each centre where there are several."""
    known = cases.dropna(subset=["dice"])
    groups = {"all": known["dice"].tolist()}
    by_centre = dict(list(known.groupby(keys.CENTRE, sort=True))) if keys.CENTRE in known else {}
    if len(by_centre) > 1:
        groups |= {str(centre): rows["dice"].tolist() for centre, rows in by_centre.items()}
    return groups


def case_rows(batch: Mapping[str, Any], pred: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """One row a case of a collated ``batch`` and its prediction; NaN where a label is unknown.

    Dice (8), surface distance and lesions are taken on the network's grid; the share of the true mask outside the
    box (``1 - seg_inside``) is beside them, since they cannot see that part.
    """
    columns: dict[str, Any] = {"PatientID": batch[keys.PATIENT_ID], keys.CENTRE: batch[keys.CENTRE]}
    if keys.LOG_HAZARD in pred:
        columns["log_hazard"] = _numbers(pred[keys.LOG_HAZARD])
        folds = pred[keys.LOG_HAZARD_FOLDS].float().cpu().numpy() if keys.LOG_HAZARD_FOLDS in pred else np.empty((0, 0))
        if folds.shape[1] > 1:
            columns |= {f"{keys.FOLD_COLUMN}{k}": folds[:, k] for k in range(folds.shape[1])}
    columns["time"] = _numbers(batch[keys.TIME], batch[keys.SURV_KNOWN])
    columns["event"] = _numbers(batch[keys.EVENT], batch[keys.SURV_KNOWN])
    if keys.HPV_PROB in pred:
        columns["hpv_prob"] = _numbers(pred[keys.HPV_PROB])
    columns["hpv"] = _numbers(batch[keys.HPV], batch[keys.HPV_KNOWN])
    if keys.SEG_PROB in pred:
        columns |= _mask_columns(batch, (pred[keys.SEG_PROB] > 0.5).float().cpu())
    columns[keys.CROP_METHOD] = batch[keys.CROP_METHOD]
    columns[keys.CROP_FLAG] = batch[keys.CROP_FLAG]
    return pd.DataFrame(columns).to_dict("records")


def _mask_columns(batch: Mapping[str, Any], predicted: torch.Tensor) -> dict[str, Any]:
    """Columns that compare predicted masks (B, 1, *roi_size) in {0, 1} with the true ones."""
    truth, known = torch.as_tensor(batch[keys.SEG]).float().cpu(), batch[keys.SEG_KNOWN]
    affines = np.asarray(batch[keys.BOX_AFFINE], dtype=float)[:, :3, :3]
    voxel_ml = np.abs(np.linalg.det(affines)) / 1000
    spacing_mm = np.linalg.norm(affines, axis=1)
    columns = {
        "dice": _numbers(compute_dice(predicted, truth, ignore_empty=False)[:, 0], known),
        "volume_ml": _numbers(predicted.flatten(1).sum(1)) * voxel_ml,
        "true_volume_ml": _numbers(truth.flatten(1).sum(1), known) * voxel_ml,
        keys.SEG_INSIDE: _numbers(batch[keys.SEG_INSIDE]),
    }
    pairs = list(zip(predicted[:, 0], truth[:, 0], strict=True))
    distances = [surface_distance_mm(*pair, of) for pair, of in zip(pairs, spacing_mm, strict=True)]
    columns["surface_distance_mm"] = _numbers(distances, known)
    labels = torch.as_tensor(batch[keys.SEG_LABELS]).cpu()[:, 0]
    lesions = pd.DataFrame(
        [count_lesions(mask.numpy() > 0, true.numpy()) for mask, true in zip(predicted[:, 0], labels, strict=True)]
    )
    columns["predicted_lesions"] = lesions.pop("predicted_lesions").to_numpy()
    return columns | {name: _numbers(values.to_numpy(), known) for name, values in lesions.items()}


def surface_distance_mm(predicted: torch.Tensor, truth: torch.Tensor, spacing_mm: Sequence[float]) -> float:
    """95 % Hausdorff distance of two masks: the greater of the two directions' 95 % quantiles.

    Args:
        predicted: (X, Y, Z) in {0, 1}.
        truth: (X, Y, Z) in {0, 1}.
        spacing_mm: edge lengths of a voxel.

    Returns:
        mm; 0 where both masks are empty, infinite where one is.
    """
    filled = bool(predicted.any()), bool(truth.any())
    if not all(filled):
        return math.inf if any(filled) else 0.0
    with warnings.catch_warnings():
        # MONAI 1.6 calls a function of its own with an argument that it deprecates.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        distance = compute_hausdorff_distance(
            predicted[None, None],
            truth[None, None],
            include_background=True,
            percentile=SURFACE_PERCENTILE,
            spacing=[float(size) for size in spacing_mm],
        )
    return float(distance)


def count_lesions(predicted: np.ndarray, truth: np.ndarray) -> dict[str, int]:
    """Lesions, which are connected components (26 neighbours), of a predicted mask and a true one.

    A true lesion is found where the prediction covers at least 30 % of it; a predicted one is false where it touches
    no true one. Among all lesions a primary tumour and a node that touch are one; counted apart they are two. The
    network does not say which of its lesions are nodes, so that nodes can be missed but not be false.

    Args:
        predicted: (X, Y, Z) bool.
        truth: (X, Y, Z) in {0, 1 (GTVp), 2 (GTVn)}.

    Returns:
        ``true_lesions`` and ``found_lesions``, the same of ``primaries`` and ``nodes``, ``predicted_lesions``,
        ``false_lesions``.
    """
    labels, count = cc3d.connected_components(predicted, connectivity=26, return_N=True)
    touching = np.bincount(labels[truth > 0].ravel(), minlength=count + 1)[1:]
    counted = {"predicted_lesions": int(count), "false_lesions": int((touching == 0).sum())}
    for name, mask in {"lesions": truth > 0, "primaries": truth == keys.GTVP, "nodes": truth == keys.GTVN}.items():
        true, found = found_of(predicted, mask)
        counted |= {f"true_{name}": true, f"found_{name}": found}
    return counted


def found_of(predicted: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """How many connected components ``truth`` (X, Y, Z) bool has, and how many ``predicted`` covers by 30 %."""
    labels, count = cc3d.connected_components(truth, connectivity=26, return_N=True)
    size = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    covered = np.bincount(labels[predicted].ravel(), minlength=count + 1)[1:]
    return int(count), int((covered >= LESION_OVERLAP * size).sum())


def _numbers(values: Any, known: Any = None) -> np.ndarray:
    array = torch.as_tensor(values).detach().cpu().double().numpy().reshape(-1)
    return array if known is None else np.where(torch.as_tensor(known).cpu().numpy().astype(bool), array, np.nan)
