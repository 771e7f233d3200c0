"""Metrics of a table of cases: the paper's and others, with bootstrap intervals, counts, or why one is undefined.

A table has one row for each patient, as :class:`.CaseTable` writes it; NaN where a label is unknown. scikit-learn is
slow to import and imported where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from scripts import keys
from scripts.cohorts.thresholds import HALF, above
from scripts.evaluation.bootstrap import BOOTSTRAP_SAMPLES, bootstrap_interval
from scripts.training.concordance import concordance_index

SMALL_GROUP = {"patients": 10, "events": 5, "positive": 3, "negative": 3}
"""Smallest counts for which metrics of one centre are reported: below, the intervals are too wide to be useful."""

LESIONS = {"lesion": "lesions", "primary": "primaries", "node": "nodes"}
"""Structures of the true masks, singular and plural: any, GTVp, GTVn."""

LESION_COUNTS = (*LESIONS.values(), "predicted", "matched", "missed", "both_empty")
"""What is counted beside the metrics of the mask, in the order in which it is shown."""

CLASSES = {"gtvp": ("GTVp", keys.GTVP, "primaries"), "gtvn": ("GTVn", keys.GTVN, "nodes")}
"""Classes of tumour that some models tell apart: ending of columns -> name, value in a mask, lesions in columns."""
NOT_APART = "the model does not tell GTVp and GTVn apart"
"""Why their metrics are undefined for other models; tables leave them out then."""

Statistic = Callable[[pd.DataFrame], float]


def c_index(cases: pd.DataFrame) -> float:
    """C-index (7) of a table with columns ``time``, ``event`` and ``log_hazard``."""
    return concordance_index(cases["time"].to_numpy(), cases["event"].to_numpy(), cases["log_hazard"].to_numpy())


def hpv_calls(cases: pd.DataFrame, threshold: float = HALF) -> np.ndarray:
    """(N,) bool, whether HPV is called positive: ``hpv_prob`` above the row's ``hpv_threshold``, else ``threshold``."""
    limit = cases["hpv_threshold"].to_numpy() if "hpv_threshold" in cases else threshold
    return above(cases["hpv_prob"].to_numpy(), limit)


def balanced_accuracy(cases: pd.DataFrame, threshold: float = HALF) -> float:
    """Balanced accuracy (9), mean of sensitivity and specificity, of columns ``hpv`` and ``hpv_prob``.

    Args:
        cases: may have a column ``hpv_threshold``, which is then used instead (out-of-fold cases of several networks).
        threshold: above which HPV is called positive.
    """
    from sklearn.metrics import balanced_accuracy_score

    truth = _hpv_status(cases)
    return float(balanced_accuracy_score(truth, hpv_calls(cases, threshold))) if _two_classes(truth) else math.nan


def confusion(cases: pd.DataFrame) -> dict[str, int]:
    """Numbers of patients by true HPV status and call (columns as :func:`balanced_accuracy`)."""
    from sklearn.metrics import confusion_matrix

    matrix = confusion_matrix(_hpv_status(cases), hpv_calls(cases), labels=[False, True])
    (true_negative, false_positive), (false_negative, true_positive) = matrix.tolist()
    return {
        "true_positive": true_positive,
        "false_negative": false_negative,
        "true_negative": true_negative,
        "false_positive": false_positive,
    }


def roc_auc(cases: pd.DataFrame) -> float:
    """Area under the ROC curve of columns ``hpv`` and ``hpv_prob``."""
    from sklearn.metrics import auc  # of the curve: half the time of roc_auc_score, which a bootstrap would notice

    if not _two_classes(_hpv_status(cases)):
        return math.nan
    curve = roc_curve(cases)
    return float(auc(curve["false_positive_rate"], curve["true_positive_rate"]))


def roc_curve(cases: pd.DataFrame) -> pd.DataFrame:
    """Points of the ROC curve of columns ``hpv`` and ``hpv_prob``, from the strictest threshold to the loosest.

    Returns:
        Columns ``threshold`` (the lowest probability called positive), ``false_positive_rate``, ``true_positive_rate``.

    Raises:
        ValueError: only one class is present.
    """
    from sklearn import metrics

    truth = _hpv_status(cases)
    if not _two_classes(truth):
        raise ValueError("one class only: there is no ROC curve")
    false, true, thresholds = metrics.roc_curve(truth, cases["hpv_prob"].to_numpy(), drop_intermediate=False)
    return pd.DataFrame({"threshold": thresholds, "false_positive_rate": false, "true_positive_rate": true})


def average_precision(cases: pd.DataFrame) -> float:
    r"""Average precision of columns ``hpv`` and ``hpv_prob``.

    .. math:: AP = \sum_n (R_n - R_{n-1}) P_n

    over the distinct probabilities from the highest, with recall R and precision P. Chance level: share of positives.
    """
    from sklearn.metrics import average_precision_score

    truth = _hpv_status(cases)
    return float(average_precision_score(truth, cases["hpv_prob"].to_numpy())) if _two_classes(truth) else math.nan


def _hpv_status(cases: pd.DataFrame) -> np.ndarray:
    return cases["hpv"].to_numpy() > 0.5


def _two_classes(truth: np.ndarray) -> bool:
    return bool(truth.any() and not truth.all())


def mean_of(cases: pd.DataFrame, column: str) -> float:
    """Mean of a column over the cases; Dice is 1 in a case in which both masks are empty."""
    return float(cases[column].mean())


def aggregated_dice(cases: pd.DataFrame, ending: str = "") -> float:
    r"""HECKTOR's aggregated Dice of columns ``dice``, ``volume_ml`` and ``true_volume_ml``.

    .. math:: DSC_{agg} = \frac{2 \sum_i |P_i \cap G_i|}{\sum_i (|P_i| + |G_i|)}

    A case without any tumour adds nothing to either sum. Where all cases are such, DSCagg is 1, as in the challenge.

    Args:
        cases: table of cases.
        ending: of the columns, ``_gtvp`` for ``dice_gtvp`` etc.

    Reference:
        Andrearczyk V. et al. Overview of the HECKTOR challenge at MICCAI 2022. LNCS 13626, 2023.
    """
    volumes = (cases[f"volume_ml{ending}"] + cases[f"true_volume_ml{ending}"]).to_numpy()
    return float((cases[f"dice{ending}"].to_numpy() * volumes).sum() / volumes.sum()) if volumes.sum() else 1.0


def both_masks_empty(cases: pd.DataFrame, ending: str = "") -> pd.Series:
    """(N,) bool, whether true and predicted mask are both empty: correct, but no surface distance exists."""
    unknown = pd.Series(np.nan, cases.index)
    return (cases.get(f"volume_ml{ending}", unknown) == 0) & (cases.get(f"true_volume_ml{ending}", unknown) == 0)


def surface_distance(cases: pd.DataFrame) -> float:
    """Median of ``surface_distance_mm`` over the cases in which both masks have a surface."""
    values = cases["surface_distance_mm"].to_numpy()
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def volume_errors(cases: pd.DataFrame) -> np.ndarray:
    """(N,) predicted less true volume, ml; above 0 the prediction is too large."""
    return cases["volume_ml"].to_numpy() - cases["true_volume_ml"].to_numpy()


def relative_volume_error(cases: pd.DataFrame) -> float:
    """Median absolute difference of the volumes relative to the true one, over the cases with a tumour."""
    true = cases["true_volume_ml"].to_numpy()
    errors = np.abs(volume_errors(cases))[true > 0] / true[true > 0]
    return float(np.median(errors)) if len(errors) else math.nan


def sensitivity(cases: pd.DataFrame, of: str) -> float:
    """Share of all true lesions that were found, from columns ``true_<of>`` and ``found_<of>``."""
    true = cases[f"true_{of}"].sum()
    return float(cases[f"found_{of}"].sum() / true) if true else math.nan


def aggregated_f1(cases: pd.DataFrame, of: str) -> float:
    r"""HECKTOR's aggregated F1 score of the detection of lesions, accumulated over all cases.

    .. math:: F1_{agg} = \frac{2 TP}{2 TP + FP + FN}

    From columns ``matched_<of>`` (TP, by :func:`.match_lesions`), ``predicted_<of>`` (TP + FP) and ``true_<of>``
    (TP + FN). NaN where there is no lesion, true or predicted.

    Reference:
        HECKTOR 2025, evaluation of Task 1: https://hecktor25.grand-challenge.org/tasks-and-evaluation
    """
    lesions = cases[f"predicted_{of}"].sum() + cases[f"true_{of}"].sum()
    return float(2 * cases[f"matched_{of}"].sum() / lesions) if lesions else math.nan


# --- summary ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A metric of a table of cases."""

    title: str  # display name, with unit
    # required columns; a case counts where none of them is NaN. A table without the first one is of a model that
    # lacks the task
    columns: tuple[str, ...]
    statistic: Statistic  # function of a table of the cases that count; NaN where it is undefined
    why_not: str  # the reason then; {events} and other counts are filled in
    digits: int = 3  # decimals to show
    absent: str = "not a task of this model"  # the reason where the table lacks the first column


_HPV, _VOLUMES = ("hpv_prob", "hpv"), ("volume_ml", "true_volume_ml")
_UNCOUNTED = "not counted by the version that judged these cases"
_ONE_CLASS, _NO_MASKS, _NO_TUMOUR = "one class only", "no masks", "no tumour in any mask"
MEASURES = {
    "c_index": Measure("C-index", ("log_hazard", "time", "event"), c_index, "no comparable pair ({events} events)"),
    "dice": Measure("Dice", ("dice",), partial(mean_of, column="dice"), _NO_MASKS),
    "balanced_accuracy": Measure("HPV balanced accuracy", _HPV, balanced_accuracy, _ONE_CLASS),
    "hpv_auc": Measure("HPV ROC AUC", _HPV, roc_auc, _ONE_CLASS),
    "hpv_average_precision": Measure("HPV average precision", _HPV, average_precision, _ONE_CLASS),
    "dice_aggregated": Measure("Dice, aggregated", ("dice", *_VOLUMES), aggregated_dice, _NO_MASKS),
    **{
        f"dice_{ending}": Measure(
            f"Dice, {name}", (f"dice_{ending}",), partial(mean_of, column=f"dice_{ending}"), _NO_MASKS, 3, NOT_APART
        )
        for ending, (name, *_) in CLASSES.items()
    },
    **{
        f"dice_aggregated_{ending}": Measure(
            f"Dice, aggregated, {name}",
            (f"dice_{ending}", f"volume_ml_{ending}", f"true_volume_ml_{ending}"),
            partial(aggregated_dice, ending=f"_{ending}"),
            _NO_MASKS,
            3,
            NOT_APART,
        )
        for ending, (name, *_) in CLASSES.items()
    },
    "surface_distance_mm": Measure(
        "surface distance, mm", ("surface_distance_mm",), surface_distance, "{missed} of {patients} are missed", 1
    ),
    "volume_error_ml": Measure(
        "volume error, ml", _VOLUMES, lambda c: float(np.abs(volume_errors(c)).mean()), _NO_MASKS, 1
    ),
    "volume_bias_ml": Measure("volume bias, ml", _VOLUMES, lambda c: float(volume_errors(c).mean()), _NO_MASKS, 1),
    "volume_error_relative": Measure("volume error, relative", _VOLUMES, relative_volume_error, _NO_TUMOUR),
    **{
        f"{name}_sensitivity": Measure(
            f"{name} sensitivity",
            (f"found_{of}", f"true_{of}"),
            partial(sensitivity, of=of),
            f"no {name} in any mask",
            3,
            _UNCOUNTED,
        )
        for name, of in LESIONS.items()
    },
    **{
        f"{name}_f1": Measure(
            f"{name} F1, aggregated",
            (f"matched_{of}", f"predicted_{of}", f"true_{of}"),
            partial(aggregated_f1, of=of),
            f"no {name} in any mask, true or predicted",
            3,
            _UNCOUNTED if name == "lesion" else NOT_APART,
        )
        for name, of in LESIONS.items()
    },
    "false_lesions_per_case": Measure(
        "false lesions a case", ("false_lesions",), partial(mean_of, column="false_lesions"), _NO_MASKS, 2
    ),
}
"""Metrics of :func:`summarise`; the paper's three first."""
PAPER_MEASURES = ("c_index", "dice", "balanced_accuracy")


def summarise(
    cases: pd.DataFrame,
    seed: int = 0,
    measures: Sequence[str] = tuple(MEASURES),
    least: Mapping[str, int] | None = None,
    samples: int = BOOTSTRAP_SAMPLES,
) -> dict[str, dict[str, Any]]:
    """Metrics of a table of cases, each with interval and counts, or the reason why it is undefined.

    Args:
        cases: columns of :class:`CaseTable`; NaN where a label is unknown. HPV is called positive above the column
            ``hpv_threshold``, or above 0.5 without it.
        seed: of the bootstrap.
        measures: keys of :data:`MEASURES`.
        least: counts (``patients``, ``events``, ...) below which no metric is reported, such as :data:`SMALL_GROUP`.
        samples: number of bootstrap draws.

    Returns:
        metric name to ``{"value", "low", "high", "patients", ...}`` or ``{"value": None, "reason", ...}``.
        ``balanced_accuracy`` also has ``confusion`` and ``thresholds``, the distinct ones in use.
    """
    return {name: _metric(cases, MEASURES[name], name, seed, least, samples) for name in measures}


def centre_groups(cases: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Name and cases of each centre, sorted by name; none without a column of centres."""
    groups = cases.groupby(keys.CENTRE, sort=True) if keys.CENTRE in cases else ()
    return [(str(centre), group) for centre, group in groups]


def too_few(counts: Mapping[str, Any], least: Mapping[str, int] | None) -> str:
    """The reason why a group is too small for a metric, by counts that are not missing; empty where it is not.

    Example:
        >>> too_few({"patients": 12, "events": 3}, SMALL_GROUP), too_few({"patients": 12}, SMALL_GROUP)
        ('too few: 3 events of at least 5', '')
    """
    few = [f"{counts[what]} {what} of at least {n}" for what, n in (least or {}).items() if counts.get(what, n) < n]
    return f"too few: {', '.join(few)}" if few else ""


def _metric(
    cases: pd.DataFrame, measure: Measure, name: str, seed: int, least: Mapping[str, int] | None, samples: int
) -> dict[str, Any]:
    if name == "surface_distance_mm" and name in cases:  # 0 mm in tables of earlier versions
        cases = cases.assign(surface_distance_mm=cases[name].mask(both_masks_empty(cases)))
    present = [column for column in (*measure.columns, "hpv_threshold") if column in cases]
    known = cases[present].dropna(subset=[column for column in present if column in measure.columns])
    if any(column not in cases for column in measure.columns[1:]):  # nobody has the label
        known = known.iloc[:0]
    head = _counts(name, known, cases)
    if measure.columns[0] not in cases:
        reason = measure.absent if "dice" in cases else Measure.absent
        return {"value": None, "reason": reason, **head}
    if not len(known):
        reason = _NO_TUMOUR if name == "surface_distance_mm" and head.get("both_empty") else "no labelled case"
        return {"value": None, "reason": reason, **head}
    value = measure.statistic(known)
    if math.isnan(value):
        return {"value": None, "reason": measure.why_not.format(**head), **head}
    if few := too_few(head, least):
        return {"value": None, "reason": few, **head}
    low, high = bootstrap_interval(measure.statistic, known, samples, seed)
    metric: dict[str, Any] = {"value": value, "low": low, "high": high, **head}
    if name == "balanced_accuracy":
        thresholds = known["hpv_threshold"] if "hpv_threshold" in known else pd.Series([HALF])
        metric |= {"confusion": confusion(known), "thresholds": sorted({float(value) for value in thresholds})}
    return metric


def _counts(name: str, known: pd.DataFrame, cases: pd.DataFrame) -> dict[str, int]:
    """Counts reported with a metric: of its ``known`` cases, and of all ``cases`` those with both masks empty."""
    nothing = pd.Series(dtype=float)
    counts = {"patients": len(known)}
    if name == "c_index":
        counts["events"] = int(known.get("event", nothing).sum())
    elif "hpv" in known:
        counts["positive"] = int(known["hpv"].sum())
        counts["negative"] = len(known) - counts["positive"]
    elif name.endswith("_sensitivity"):
        of = LESIONS[name.removesuffix("_sensitivity")]
        counts[of] = int(known.get(f"true_{of}", nothing).sum())
    elif name.endswith("_f1"):
        of = LESIONS[name.removesuffix("_f1")]
        columns = {of: f"true_{of}", "predicted": f"predicted_{of}", "matched": f"matched_{of}"}
        counts |= {title: int(known.get(column, nothing).sum()) for title, column in columns.items()}
    elif name == "surface_distance_mm":
        counts["missed"] = int(np.isinf(known.get(name, nothing)).sum())
    if name.startswith(("dice", "surface_distance_mm")):  # undefined or perfect in these
        ending = next((f"_{ending}" for ending in CLASSES if name.endswith(ending)), "")
        both_empty = int(both_masks_empty(cases, ending).sum())
        counts |= {"both_empty": both_empty} if both_empty else {}
    return counts


def format_summary(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Text table of :func:`summarise`."""
    lines = []
    for name, row in summary.items():
        if row.get("reason") == NOT_APART:
            continue
        title, digits = MEASURES[name].title, MEASURES[name].digits
        names = ("patients", "events", "positive", *LESION_COUNTS)
        counts = ", ".join(f"{row[k]} {k.replace('_', ' ')}" for k in names if k in row)
        if len(row.get("thresholds", ())) == 1:
            counts += f"; called above {row['thresholds'][0]:.3f}"
        if row["value"] is None:
            lines.append(f"  {title:<22} -      ({row['reason']}; {counts})")
        else:
            value, low, high = (f"{row[k]:.{digits}f}" for k in ("value", "low", "high"))
            lines.append(f"  {title:<22} {value}  [{low}, {high}]  ({counts})")
    return "\n".join(lines)
