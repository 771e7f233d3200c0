"""Bootstrap intervals of a statistic, and of its difference between two models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from scripts import keys

BOOTSTRAP_SAMPLES = 1000


def bootstrap_interval(
    statistic: Callable[[pd.DataFrame], float], cases: pd.DataFrame, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of ``statistic``, a function of a table of cases, over patients drawn with replacement.

    Draws in which the statistic is undefined (no comparable pair, one class) are left out.

    Returns:
        The 2.5 % and the 97.5 % quantile; NaN if the statistic is undefined in every draw.

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


def paired_bootstrap(
    statistic: Callable[[pd.DataFrame], float],
    cases_a: pd.DataFrame,
    cases_b: pd.DataFrame,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Difference of a statistic between two models on the same patients.

    Each draw takes the same patients from both tables.

    Args:
        statistic: function of a table of cases; NaN where it is undefined.
        cases_a: one row for each patient, as in ``cases.csv``.
        cases_b: the same patients, in any order where both have a column ``PatientID``.
        samples: number of draws.
        seed: of the draws.

    Returns:
        ``{"value" (A - B), "low", "high", "p", "value_a", "value_b", "patients", "samples"}`` and ``"events"`` where
        the tables have them, or ``{"value": None, "reason", ...}``. ``p`` is two-sided, twice the smaller share of
        draws on either side of 0 (an inversion of the percentile interval), at least 2 / (samples + 1).

    Raises:
        ValueError: the patients or their labels differ.

    Reference:
        Efron B., Tibshirani R. An Introduction to the Bootstrap. Chapman & Hall, 1993, chapters 13 and 15.
    """
    first, second = _paired(cases_a, cases_b)
    head = {"patients": len(first)}
    if keys.EVENT in first:
        head["events"] = int(first[keys.EVENT].sum())
    if not len(first):
        return {"value": None, "reason": "no patients", **head}
    value_a, value_b = statistic(first), statistic(second)
    if math.isnan(value_a) or math.isnan(value_b):
        return {"value": None, "reason": "the statistic is undefined for these patients", **head}
    found: list[float] = []

    def difference(rows: pd.DataFrame) -> float:
        drawn = rows["row"].to_numpy()
        found.append(statistic(first.iloc[drawn]) - statistic(second.iloc[drawn]))
        return found[-1]

    low, high = bootstrap_interval(difference, pd.DataFrame({"row": range(len(first))}), samples, seed)
    differences = np.array(found)
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        return {"value": None, "reason": "the statistic is undefined in every bootstrap draw", **head}
    tails = (int((differences <= 0).sum()), int((differences >= 0).sum()))
    return {
        "value": float(value_a - value_b),
        "low": low,
        "high": high,
        "p": min(1.0, 2 * (1 + min(tails)) / (1 + len(differences))),
        "value_a": float(value_a),
        "value_b": float(value_b),
        **head,
        "samples": len(differences),
    }


def _paired(cases_a: pd.DataFrame, cases_b: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables with the same patients in the same order."""
    first, second = cases_a.reset_index(drop=True), cases_b.reset_index(drop=True)
    if "PatientID" in first and "PatientID" in second:
        for table in (first, second):
            if table["PatientID"].duplicated().any():
                raise ValueError(f"patient {table['PatientID'][table['PatientID'].duplicated()].iloc[0]} occurs twice")
        alone = sorted(set(first["PatientID"]) ^ set(second["PatientID"]))
        if alone:
            raise ValueError(f"{len(alone)} patients are in one of the two tables only, such as {alone[0]}")
        second = second.set_index("PatientID").loc[first["PatientID"]].reset_index()
    elif len(first) != len(second):
        raise ValueError(f"the tables have {len(first)} and {len(second)} patients")
    for label in (name for name in (keys.TIME, keys.EVENT, keys.HPV) if name in first and name in second):
        differs = ~np.isclose(first[label], second[label], equal_nan=True)
        if differs.any():
            such = f", such as {first['PatientID'][differs].iloc[0]}" if "PatientID" in first else ""
            raise ValueError(f"the two tables give {differs.sum()} patients a different {label}{such}")
    return first, second
