"""Models of clinical values alone: coding, filling of missing values, a ridge Cox model, its C-index."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from lifelines import CoxPHFitter
from lifelines.exceptions import ConvergenceError, ConvergenceWarning

from scripts import keys
from scripts.cohorts import clinical
from scripts.cohorts.cohort import Case, CohortError
from scripts.training.concordance import comparable_pairs, resampled_concordance


@dataclass(frozen=True)
class Score:
    """C-index of one set of patients."""

    c_index: float  # Harrell's C-index (lifelines), NaN without a comparable pair
    low: float  # lower end of the 95 % bootstrap interval over patients, the model held fixed
    high: float  # upper end
    patients: int  # number of patients
    events: int  # number of relapses


@dataclass(frozen=True)
class Result:
    """A fitted and scored model."""

    train: Score  # score on the patients the model was fitted to; in cross-validation over all folds, without interval
    test: Score  # score on the other patients; in cross-validation out of fold, with pairs formed within folds
    coefficients: list[dict[str, Any]]  # a row for each column; in cross-validation of a model fitted to all patients
    # columns left out because they are constant among training patients
    dropped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # what lifelines found doubtful about the fit


@dataclass(frozen=True)
class Fit:
    """A fitted Cox model, the columns it uses, those that are constant, and lifelines' warnings."""

    model: CoxPHFitter
    used: list[str]
    dropped: list[str]
    warnings: list[str]


def code_cohort(cases: Sequence[Case], features: Sequence[str]) -> pd.DataFrame:
    """Coded clinical values, time and event of a cohort.

    Returns:
        One row for each patient, indexed by patient id: a column for each level of a category, numbers and stages as
        numbers (NaN where missing), then ``time`` and ``event``.
    """
    names = clinical.indicator_names(features)
    rows = [clinical.code_indicators(case[keys.CLINICAL], features, missing_number=np.nan) for case in cases]
    table = pd.DataFrame(np.asarray(rows, dtype=float).reshape(len(cases), len(names)), columns=names)
    table.index = pd.Index([case[keys.PATIENT_ID] for case in cases], name="patient_id")
    table[keys.TIME] = [float(case[keys.TIME]) for case in cases]
    table[keys.EVENT] = [int(case[keys.EVENT]) for case in cases]
    return table


def fill_missing(train: pd.DataFrame, test: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Replace missing numbers by the training patients' median; by zero in a column that is missing everywhere."""
    values = train.median().fillna(0.0)
    return train.fillna(values), test.fillna(values)


def fit_cox(train: pd.DataFrame, penalizer: float) -> Fit:
    """Fit a ridge Cox model.

    Args:
        train: coded columns, ``time`` and ``event``, without missing values.
        penalizer: strength of the ridge penalty (lifelines standardises the columns itself).

    Returns:
        The fitted model. Left out of it are columns that are constant and, without a penalty, those that follow from
        the columns before them (such as gender=1 after gender=0), whose coefficients would not be determined.

    Raises:
        CohortError: no events, no column that varies, or no convergence.
    """
    columns = [name for name in train.columns if name not in (keys.TIME, keys.EVENT)]
    used = [name for name in columns if train[name].nunique() > 1]
    if penalizer == 0:
        used = _independent(train[used])
    if not train[keys.EVENT].any():
        raise CohortError(f"none of the {len(train)} training patients has a relapse: a Cox model cannot be fitted")
    if not used:
        raise CohortError(f"all {len(train)} training patients have the same clinical values ({', '.join(columns)})")
    model = CoxPHFitter(penalizer=penalizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model.fit(train[[*used, keys.TIME, keys.EVENT]], duration_col=keys.TIME, event_col=keys.EVENT)
        except ConvergenceError as error:
            raise CohortError(f"the Cox model does not converge with --penalizer {penalizer:g}; try more") from error
    doubts = [warning for warning in caught if issubclass(warning.category, ConvergenceWarning)]
    for warning in caught:
        if warning not in doubts:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    texts = [" ".join(str(warning.message).split()) for warning in doubts]
    return Fit(model, used, [name for name in columns if name not in used], texts)


def _independent(table: pd.DataFrame) -> list[str]:
    """Columns that are no linear combination of a constant and the columns before them."""
    kept: list[str] = []
    for name in table.columns:
        candidate = np.column_stack([np.ones(len(table)), table[[*kept, name]].to_numpy()])
        if np.linalg.matrix_rank(candidate) == candidate.shape[1]:
            kept.append(name)
    return kept


def score(risks: Sequence[np.ndarray], tables: Sequence[pd.DataFrame], bootstrap: int, seed: int) -> Score:
    """C-index over one or several sets of patients, each with log hazards and a table, with a bootstrap interval.

    Pairs are formed, and patients drawn, within a set.

    Returns:
        The score; for one set the C-index is exactly lifelines'.
    """
    rng = np.random.default_rng(seed)
    found, draws = np.zeros(2), np.zeros((2, bootstrap))  # concordant and comparable pairs
    for risk, table in zip(risks, tables, strict=True):
        time, event = table[keys.TIME].to_numpy(), table[keys.EVENT].to_numpy().astype(bool)
        pairs = comparable_pairs(time, event)
        weights = rng.multinomial(len(risk), np.full(len(risk), 1 / len(risk)), size=bootstrap).astype(float)
        draws += resampled_concordance(weights, pairs, risk)
        found += np.ravel(resampled_concordance(np.ones((1, len(risk))), pairs, risk))
    patients, events = sum(map(len, tables)), int(sum(table[keys.EVENT].sum() for table in tables))
    drawn = draws[0, draws[1] > 0] / draws[1, draws[1] > 0]
    if found[1] == 0 or not len(drawn):
        return Score(float("nan"), float("nan"), float("nan"), patients, events)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Score(float(found[0] / found[1]), float(low), float(high), patients, events)


def evaluate_cox(
    groups: Sequence[tuple[Sequence[Case], Sequence[Case]]],
    features: Sequence[str],
    penalizer: float = 0.1,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Result:
    """Fit and score a model with (training cases, test cases) of known survival: one pair, or one for each fold.

    Returns:
        The scores, and the coefficients of the model (of one fitted to all cases where there are several folds).
    """
    fits, sides, risks = [], [], []
    for train_cases, test_cases in groups:
        pair = fill_missing(code_cohort(train_cases, features), code_cohort(test_cases, features))
        fits.append(fit_cox(pair[0], penalizer))
        sides.append(pair)
        risks.append([fits[-1].model.predict_log_partial_hazard(table[fits[-1].used]).to_numpy() for table in pair])
    train, test = (score([r[k] for r in risks], [pair[k] for pair in sides], bootstrap, seed) for k in (0, 1))
    shown = fits[0]
    if len(groups) > 1:
        everyone = pd.concat([code_cohort(cases, features) for _, cases in groups])
        shown = fit_cox(fill_missing(everyone, everyone)[0], penalizer)
        # Training sets of folds overlap: an interval over their patients would be too narrow.
        train = replace(train, low=math.nan, high=math.nan, patients=test.patients, events=test.events)
    dropped = sorted({name for fit in fits for name in fit.dropped})
    doubts = sorted({text for fit in fits for text in fit.warnings})
    return Result(train, test, _coefficients(shown), dropped, doubts)


def _coefficients(fit: Fit) -> list[dict[str, Any]]:
    """Log hazard ratio and hazard ratio with its 95 % interval, a row for each column."""
    summary = fit.model.summary
    titles = {
        "log_hazard_ratio": "coef",
        "hazard_ratio": "exp(coef)",
        "low": "exp(coef) lower 95%",
        "high": "exp(coef) upper 95%",
        "p": "p",
    }
    return [
        {"column": name} | {title: float(summary.loc[name, source]) for title, source in titles.items()}
        for name in fit.used
    ]
