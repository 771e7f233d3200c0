"""Evaluation of a split, written as files: a table with one row for each case, metrics with intervals, plots.

Every metric is reported with the number of patients, or with the reason why it is undefined.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cc3d
import numpy as np
import pandas as pd
import torch
from ignite.engine import Events
from monai.engines import Workflow
from monai.metrics import compute_dice, compute_hausdorff_distance

from scripts import keys
from scripts.cohorts.cohort import describe_cases
from scripts.cohorts.files import write_text, written_whole
from scripts.cohorts.thresholds import HALF, label_map
from scripts.evaluation.case_metrics import SMALL_GROUP, centre_groups, confusion, format_summary, roc_curve
from scripts.evaluation.detection import class_columns, match_lesions
from scripts.evaluation.judge import judge
from scripts.evaluation.survival import Outcomes
from scripts.evaluation.survival_metrics import ensemble_survival
from scripts.imaging.lesions import without_faint_lesions
from scripts.model.ensemble import KEEP_EPOCH, FoldEnsemble
from scripts.training.handlers import BEST, LAST

if TYPE_CHECKING:
    from scripts.evaluation.plots import Drawn

logger = logging.getLogger(__name__)

FEATURES_FILE = "features.npz"

OF_CLASSES = ("_primaries", "_nodes")  # columns that need a mask that tells classes apart

SURFACE_PERCENTILE = 95
LESION_OVERLAP = 0.3  # share of a lesion that a prediction must cover to have found it
NO_CUT_POINTS = (
    "the risk is not cut: a single network carries no cut points (evaluate_folds.py cuts by the other folds)"
)


@dataclass(eq=False, repr=False)
class CaseTable:
    """Handler that writes ``cases.csv``, ``metrics.json`` and plots of an evaluation and logs the metrics.

    Metrics are of all cases and of each centre; for centres below :data:`SMALL_GROUP` only the reason is given. Deep
    features, where the network returns them, are written to ``features.npz`` (:func:`read_features`); an ensemble
    takes the distribution of its training cases from there.

    Args:
        output_dir: folder of the files; the plots are in ``figures/`` in it.
        dataset_dir: written to ``metrics.json``, and what the cases are, which the plots say too.
        checkpoint: written to ``metrics.json``.
        seed: of the bootstrap.
        training_cases: cases (:mod:`scripts.cohorts.cohort`) whose follow-up weights the survival metrics: those the
            network was trained on, or those evaluated if it was trained elsewhere; None leaves survival metrics out.
        ensemble: the network, for a cohort it was not trained on: its HPV threshold and calibration are then used.
        part: evaluated part of the split (``evaluate_on``); reported with what was fitted to its cases.
        lesion_peak: of the network's specification.
    """

    output_dir: str
    dataset_dir: str
    checkpoint: str
    seed: int = 0
    training_cases: Sequence[Mapping[str, Any]] | None = None
    ensemble: FoldEnsemble | None = None
    part: str = ""
    lesion_peak: float = HALF

    def __post_init__(self) -> None:
        self.folder = Path(self.output_dir)
        self.about = {"dataset_dir": str(self.dataset_dir), "checkpoint": str(self.checkpoint)}
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
        self.rows.extend(case_rows(batch, engine.state.output["pred"], self.lesion_peak))
        if keys.FEATURES in engine.state.output["pred"]:
            self.features.append(engine.state.output["pred"][keys.FEATURES].float().cpu().numpy())

    def write(self, engine: Workflow) -> None:
        """Write all files and log the table of metrics."""
        cases = pd.DataFrame(self.rows)
        threshold = self._carried("hpv_threshold").get("value")
        if threshold is not None and "hpv_prob" in cases:
            cases["hpv_threshold"] = threshold
        write_text(self.folder / "cases.csv", cases.to_csv(index=False))
        if self.features:
            write_features(self.folder, cases["PatientID"], np.concatenate(self.features))
        kept = getattr(getattr(engine, "network", None), "provenance", {}).get(KEEP_EPOCH)
        centres = [str(centre) for centre in cases.get(keys.CENTRE, [""] * len(cases))]
        data = {"data": describe_cases(self.dataset_dir, centres)}
        report = {**self.about, **data, "selection": describe_selection(kept, self.part), **self._judge(cases)}
        report["centres"] = {centre: self._judge(group, SMALL_GROUP) for centre, group in centre_groups(cases)}
        inside = cases.get(keys.SEG_INSIDE, pd.Series(dtype=float)).dropna()
        if len(inside):
            report["tumour_inside_box"] = {"mean": float(inside.mean()), "minimum": float(inside.min())}
        report["figures"] = self._draw(cases, report)
        write_text(self.folder / "metrics.json", json.dumps(report, indent=2, allow_nan=False))
        logger.info("%s: %s\n%s", self.dataset_dir, report["data"], format_summary(report["metrics"]))
        logger.info("%s", report["selection"]["statement"])
        logger.info("written: %s, with metrics.json and figures/ beside it", self.folder / "cases.csv")

    def _judge(self, cases: pd.DataFrame, least: Mapping[str, int] | None = None) -> dict[str, Any]:
        stored = self._carried("calibration") or None
        train = self._training_outcomes() if "log_hazard" in cases else None
        return judge(cases, train, lambda known: ensemble_survival(known, stored), least=least, seed=self.seed)

    def _training_outcomes(self) -> Outcomes | None:
        if self.training_cases is None:
            return None
        known = [case for case in self.training_cases if case[keys.SURV_KNOWN]]
        time, event = ([case[name] for case in known] for name in (keys.TIME, keys.EVENT))
        return Outcomes(np.array(time, dtype=float), np.array(event, dtype=float))

    def _draw(self, cases: pd.DataFrame, report: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """Write the plots; the file of each, or the reason why there is none."""
        from scripts.evaluation.plots import save_plots, survival_figures  # matplotlib is slow to import

        no_groups = self._carried("calibration").get("reason", NO_CUT_POINTS)
        drawn = case_figures(cases, report["metrics"])
        drawn |= survival_figures(report.get("survival", {"reason": "survival is not judged here"}), no_groups)
        return save_plots(self.folder / "figures", drawn, report["data"])

    def _carried(self, name: str) -> Mapping[str, Any]:
        """Entry of the ensemble's provenance; empty without one."""
        return {} if self.ensemble is None else self.ensemble.provenance.get(name) or {}


def describe_selection(keep_epoch: str | None, part: str) -> dict[str, Any]:
    """Whether weights or epoch were selected on the evaluated cases, for ``metrics.json``.

    Args:
        keep_epoch: epoch whose weights were kept, ``best`` on the validation cases or ``last``; None: not recorded.
        part: the cases: ``training``, ``validation``, ``test`` or ``all`` of another cohort.

    Returns:
        ``keep_epoch``, ``judged`` (the part), ``fitted_to_these_cases`` (of ``weights`` and ``epoch``; None if unknown)
        and ``statement``, in words.

    Example:
        >>> describe_selection("best", "validation")["fitted_to_these_cases"]
        ['epoch']
    """
    fitted: list[str] | None = []
    statement = "nothing was fitted to these cases"
    if part == "training":
        fitted, statement = (
            ["weights"],
            "the network was trained on these cases: the metrics show how well it fits them",
        )
    elif part == "all":
        statement = "nothing was fitted to these cases, unless the network was trained on some of them"
    elif part != "test" and keep_epoch == BEST:
        fitted = ["epoch"]
        statement = "the epoch was selected on these cases: the metrics are too optimistic (keep_epoch: best)"
    elif part != "test" and keep_epoch != LAST:
        fitted = None
        statement = (
            "whether the epoch was selected on these cases is not recorded; if so, the metrics are too optimistic"
        )
    return {"keep_epoch": keep_epoch, "judged": part, "fitted_to_these_cases": fitted, "statement": statement}


def write_features(folder: Path, patients: Sequence[str], features: np.ndarray) -> None:
    """Write the deep features (N, K, F) of N patients by the K networks of an ensemble to ``features.npz``."""
    with written_whole(folder / FEATURES_FILE) as partial, partial.open("wb") as file:
        np.savez_compressed(file, patients=np.asarray(patients, dtype=str), features=features)


def read_features(folder: str | Path) -> tuple[list[str], np.ndarray]:
    """Patients (N) and their deep features (N, K, F) from the evaluation in ``folder``.

    Raises:
        FileNotFoundError: there are none; the message says how to compute them.
    """
    path = Path(folder) / FEATURES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run the evaluation again, which writes it for networks with survival")
    with np.load(path) as stored:
        return stored["patients"].tolist(), stored["features"]


def case_figures(cases: pd.DataFrame, summary: Mapping[str, Mapping[str, Any]]) -> dict[str, Drawn]:
    """ROC curve of HPV status and Dice of each case, for :func:`scripts.evaluation.plots.save_plots`."""
    from scripts.evaluation.plots import dice_figure, roc_figure  # matplotlib is slow to import

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
    """Curve, area (``auc``) and point at the threshold in use, for :func:`.roc_figure`; unknown cases left out."""
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


def case_rows(
    batch: Mapping[str, Any], pred: Mapping[str, torch.Tensor], lesion_peak: float = HALF
) -> list[dict[str, Any]]:
    """One row for each case of a collated ``batch`` and its prediction; NaN where a label is unknown.

    Dice (8), surface distance and lesions are computed on the network's grid, without the part of the true mask
    outside the box; its share is ``1 - seg_inside``. A network of two classes of tumour has the columns of
    :func:`.class_columns` too. What is true of a class is known only where the mask tells classes apart. Lesions of the
    prediction that are nowhere above ``lesion_peak`` are left out (:func:`.without_faint_lesions`).
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
        maps = [without_faint_lesions(each[0], lesion_peak) for each in pred[keys.SEG_PROB].float().cpu().numpy()]
        classes = pred.get(keys.CLASS_PROB)
        labels = label_map(torch.from_numpy(np.stack(maps))[:, None], None if classes is None else classes.cpu())
        columns |= mask_columns(batch, labels, keys.CLASS_PROB in pred)
    columns[keys.CROP_METHOD] = batch[keys.CROP_METHOD]
    columns[keys.CROP_FLAG] = batch[keys.CROP_FLAG]
    return pd.DataFrame(columns).to_dict("records")


def mask_columns(batch: Mapping[str, Any], labels: torch.Tensor, classes: bool = False) -> dict[str, Any]:
    """Columns of a table of cases that compare predicted masks with the true ones, of one shape.

    Args:
        batch: of its keys ``seg`` (B, 1, X, Y, Z) in {0, 1 (GTVp), 2 (GTVn)}, ``seg_known``, ``seg_classes_known``,
            ``seg_inside`` and ``box_affine`` (B, 4, 4), which is that of the masks.
        labels: (B, 1, X, Y, Z), 0 for background, k for the k-th class of the network.
        classes: whether the network tells GTVp and GTVn apart; then with the columns of :func:`.class_columns`.

    Returns:
        column to (B,) values; NaN where the truth is not known.
    """
    true_labels, known = torch.as_tensor(batch[keys.SEG]).cpu().float(), batch[keys.SEG_KNOWN]
    predicted, truth = (labels > 0).float(), (true_labels > 0).float()
    voxel_ml = _voxel_ml(batch)
    spacing_mm = np.linalg.norm(np.asarray(batch[keys.BOX_AFFINE], dtype=float)[:, :3, :3], axis=1)
    columns = {
        "dice": _numbers(compute_dice(predicted, truth, ignore_empty=False)[:, 0], known),
        "volume_ml": _numbers(predicted.flatten(1).sum(1)) * voxel_ml,
        "true_volume_ml": _numbers(truth.flatten(1).sum(1), known) * voxel_ml,
        keys.SEG_INSIDE: _numbers(batch[keys.SEG_INSIDE]),
    }
    pairs = list(zip(predicted[:, 0], truth[:, 0], strict=True))
    distances = [surface_distance_mm(*pair, of) for pair, of in zip(pairs, spacing_mm, strict=True)]
    columns["surface_distance_mm"] = _numbers(distances, known)
    masks = zip(predicted[:, 0], true_labels[:, 0], strict=True)
    lesions = pd.DataFrame([count_lesions(mask.numpy() > 0, true.numpy()) for mask, true in masks])
    columns["predicted_lesions"] = lesions.pop("predicted_lesions").to_numpy()
    for name, values in lesions.items():
        of_class = str(name).endswith(OF_CLASSES)
        columns[str(name)] = _numbers(values.to_numpy(), _classes_known(batch) if of_class else known)
    if classes:
        columns |= class_columns(labels, true_labels, _classes_known(batch).numpy(), voxel_ml)
    return columns


def _classes_known(batch: Mapping[str, Any]) -> torch.Tensor:
    """(B,) bool, whether a mask is known that tells primary tumour and nodes apart."""
    return torch.as_tensor(batch[keys.SEG_KNOWN]).bool() & torch.as_tensor(batch[keys.SEG_CLASSES_KNOWN]).bool()


def _voxel_ml(batch: Mapping[str, Any]) -> np.ndarray:
    """(B,) volume of a voxel of the network's grid."""
    return np.abs(np.linalg.det(np.asarray(batch[keys.BOX_AFFINE], dtype=float)[:, :3, :3])) / 1000


def surface_distance_mm(predicted: torch.Tensor, truth: torch.Tensor, spacing_mm: Sequence[float]) -> float:
    """95 % Hausdorff distance of two masks: the greater of the two directions' 95 % quantiles.

    Args:
        predicted: (X, Y, Z) in {0, 1}.
        truth: (X, Y, Z) in {0, 1}.
        spacing_mm: edge lengths of a voxel.

    Returns:
        mm; NaN if both masks are empty, infinite if one is.
    """
    filled = bool(predicted.any()), bool(truth.any())
    if not all(filled):
        return math.inf if any(filled) else math.nan
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
    """Numbers of lesions, which are connected components (26 neighbours), of a predicted mask and a true one.

    A true lesion is found if the prediction covers at least 30 % of it; a predicted one is false if it overlaps no
    true one. HECKTOR counts otherwise, by pairs: ``matched_lesions`` (see :func:`.match_lesions`). A primary tumour and
    a node that touch are one of the ``lesions``. Unlike in the results of a patient
    (:func:`scripts.imaging.lesions.find_lesions`), components of any size count. The class of a
    prediction does not matter: there are no false nodes.

    Args:
        predicted: (X, Y, Z) bool.
        truth: (X, Y, Z) in {0, 1 (GTVp), 2 (GTVn)}.

    Returns:
        ``true_lesions`` and ``found_lesions``, the same of ``primaries`` and ``nodes``, ``predicted_lesions``,
        ``false_lesions``, ``matched_lesions``.
    """
    labels, count = cc3d.connected_components(predicted, connectivity=26, return_N=True)
    touching = np.bincount(labels[truth > 0].ravel(), minlength=count + 1)[1:]
    counted = {"predicted_lesions": int(count), "false_lesions": int((touching == 0).sum())}
    counted["matched_lesions"] = match_lesions(predicted, truth > 0)[2]
    for name, mask in {"lesions": truth > 0, "primaries": truth == keys.GTVP, "nodes": truth == keys.GTVN}.items():
        true, found = found_of(predicted, mask)
        counted |= {f"true_{name}": true, f"found_{name}": found}
    return counted


def found_of(predicted: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """Number of connected components of ``truth`` (X, Y, Z) bool, and of those that ``predicted`` covers by 30 %."""
    labels, count = cc3d.connected_components(truth, connectivity=26, return_N=True)
    size = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    covered = np.bincount(labels[predicted].ravel(), minlength=count + 1)[1:]
    return int(count), int((covered >= LESION_OVERLAP * size).sum())


def _numbers(values: Any, known: Any = None) -> np.ndarray:
    array = torch.as_tensor(values).detach().cpu().double().numpy().reshape(-1)
    return array if known is None else np.where(torch.as_tensor(known).cpu().numpy().astype(bool), array, np.nan)
