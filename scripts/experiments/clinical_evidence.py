"""The clinical model that the bundle ships: how it is made, and how good it is on patients it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.clinical_cox import Fit, code_cohort, fill_missing, fit_cox, score
from scripts import keys
from scripts.cohorts.cohort import Case, CohortError
from scripts.evaluation.bootstrap import bootstrap_interval
from scripts.evaluation.case_metrics import summarise
from scripts.evaluation.clinical_model import FORMAT, ClinicalModel
from scripts.evaluation.survival import (
    DAYS_PER_YEAR,
    Calibration,
    FoldScale,
    Outcomes,
    fit_calibration,
    normalise_out_of_fold,
)
from scripts.evaluation.survival_metrics import survival_metrics

FEATURES = ("age", "gender", "performance_status", "tobacco", "treatment", "t_stage", "n_stage", "hpv")
"""Chosen on RADCURE by cross-validation over years, see docs/clinical.md."""
HPV_FEATURES = ("gender", "age", "tobacco", "t_stage", "n_stage", "site")
PENALIZER = 0.01  # chosen with FEATURES
FOLDS = 10
MONTH = DAYS_PER_YEAR / 12
LEAST_AT_RISK = 100
TAU = 5 * DAYS_PER_YEAR  # of Uno's C and the Brier score
DIGITS = 6
PERCENTILES = 101
ENDPOINT = (
    "recurrence-free survival: no local, regional or distant failure; counted from the start of radiotherapy, in days; "
    "deaths without a failure are censored"
)


def year_folds(years: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, test rows): each calendar year is in one of ten folds, or of as many as there are years."""
    groups = np.asarray(years)
    folds = min(FOLDS, len(set(groups.tolist())))
    if folds < 2:
        raise CohortError("all patients were treated in one year; cross-validation by year needs two")
    return list(GroupKFold(folds).split(groups, groups=groups))


def linear_risk(fit: Fit, table: pd.DataFrame) -> np.ndarray:
    """(N,) sum of coefficients times columns, not centred as lifelines does."""
    return table[fit.used].to_numpy(dtype=float) @ fit.model.params_[fit.used].to_numpy()


def out_of_fold(
    cases: Sequence[Case], years: Sequence[int], features: Sequence[str], penalizer: float
) -> tuple[list[np.ndarray], list[pd.DataFrame], np.ndarray]:
    """Cross-validation by year.

    Returns:
        Of each fold the log hazards of its patients and their coded table; and all log hazards (N,), each normalised by
        mean and standard deviation of its fold's training patients, in the order of ``cases``.
    """
    table, risks, tables, scales = code_cohort(cases, features), [], [], []
    raw, numbers = np.zeros(len(cases)), np.zeros(len(cases), dtype=int)
    for number, (train_rows, test_rows) in enumerate(year_folds(years)):
        train, test = fill_missing(table.iloc[train_rows], table.iloc[test_rows])
        fit = fit_cox(train, penalizer)
        scales.append(FoldScale.of(linear_risk(fit, train)))
        raw[test_rows], numbers[test_rows] = linear_risk(fit, test), number
        risks.append(raw[test_rows])
        tables.append(test)
    return risks, tables, normalise_out_of_fold(raw, numbers, scales)


def make_model(
    cases: Sequence[Case],
    years: Sequence[int],
    features: Sequence[str],
    penalizer: float,
    about: Mapping[str, Any],
    evidence: Mapping[str, Any],
) -> ClinicalModel:
    """Ridge Cox model of all cases; slope and Breslow baseline of its out-of-fold log hazards.

    Values of single patients are coarsened: the baseline to months, percentiles of the log hazard to a hundred,
    and nothing is stored beyond the month in which fewer than :data:`LEAST_AT_RISK` patients are followed.
    """
    table = code_cohort(cases, features)
    filled, _ = fill_missing(table, table)
    fit = fit_cox(filled, penalizer)
    columns = [name for name in table.columns if name not in (keys.TIME, keys.EVENT)]
    coefficients = {name: _rounded(fit.model.params_[name]) if name in fit.used else 0.0 for name in columns}
    risk = filled[columns].to_numpy(dtype=float) @ np.array([coefficients[name] for name in columns])
    _, _, pooled = out_of_fold(cases, years, features, penalizer)
    time, event = table[keys.TIME].to_numpy(), table[keys.EVENT].to_numpy()
    calibration = fit_calibration(pooled, time, event, [FoldScale.of(risk)])
    medians = filled[columns].median()
    return ClinicalModel(
        format=FORMAT,
        endpoint=ENDPOINT,
        features=list(features),
        fill={name: _rounded(medians[name]) for name in columns if "=" not in name},
        coefficients=coefficients,
        calibration=coarsened(calibration, Outcomes(time, event)),
        about={
            **about,
            "patients": len(cases),
            "events": int(event.sum()),
            "hospitals": len({case[keys.CENTRE] for case in cases}),
            "years": [int(min(years)), int(max(years))],
            "method": f"Cox model with ridge penalty {penalizer:g} (lifelines); slope and Breslow baseline of log "
            f"hazards out of {len(year_folds(years))} folds of calendar years",
        },
        evidence=dict(evidence),
    )


def coarsened(calibration: Calibration, outcomes: Outcomes) -> Calibration:
    """The calibration on a monthly grid, as long as enough patients are followed, in few digits."""
    days = np.arange(1, int(outcomes.last_day / MONTH) + 1) * MONTH
    at_risk = np.array([(outcomes.time >= day).sum() for day in days])
    days, at_risk = days[at_risk >= LEAST_AT_RISK], at_risk[at_risk >= LEAST_AT_RISK]
    if not len(days):
        raise CohortError(f"fewer than {LEAST_AT_RISK} patients are followed for a month")
    steps = np.searchsorted(calibration.baseline_days, days, side="right")
    hazard = np.concatenate([[0.0], calibration.baseline_hazard])[steps]
    quantiles = np.quantile(calibration.quantiles, (np.arange(PERCENTILES) + 0.5) / PERCENTILES, method="hazen")
    stored = calibration.to_dict() | {
        "baseline_days": days.tolist(),
        "baseline_hazard": hazard.tolist(),
        "baseline_at_risk": at_risk.tolist(),
        "last_day": float(days[-1]),
        "quantiles": quantiles.tolist(),
    }
    return Calibration.from_dict(_rounded(stored))


def _rounded(value: Any) -> Any:
    """Numbers in :data:`DIGITS` digits: the last ones depend on the computer."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


# --- evidence ---------------------------------------------------------------------------------------------------------


def judge_survival(
    model: ClinicalModel, train: Sequence[Case], test: Sequence[Case], seed: int, samples: int
) -> dict[str, Any]:
    """C-index, Uno's C, Brier score and calibration at 2 and 5 years of a model on patients it has not seen."""
    known_outcomes, judged = (
        Outcomes(np.array([case[keys.TIME] for case in cases]), np.array([case[keys.EVENT] for case in cases]))
        for cases in (train, test)
    )
    risk = model.normalised([case[keys.CLINICAL] for case in test])
    years = (2.0, 5.0)
    found = survival_metrics(
        known_outcomes, judged, risk, model.calibration, calibration_years=years, tau=TAU, seed=seed, samples=samples
    )
    known = {name: sum(case[keys.CLINICAL].get(name) is not None for case in test) for name in model.features}
    return {"known": known, **{name: value for name, value in found.items() if name != "risk_groups"}}


def cross_validated(
    cases: Sequence[Case], years: Sequence[int], features: Sequence[str], penalizer: float, seed: int, samples: int
) -> dict[str, Any]:
    """C-index of cross-validation by year, pairs formed within folds."""
    risks, tables, _ = out_of_fold(cases, years, features, penalizer)
    found = score(risks, tables, samples, seed)
    return {
        "value": found.c_index,
        "low": found.low,
        "high": found.high,
        "patients": found.patients,
        "events": found.events,
        "folds": len(risks),
    }


def split_by_year(cases: Sequence[Case], years: Sequence[int]) -> tuple[list[Case], list[Case], int]:
    """Patients treated before the median year, those from then on, and that year."""
    middle = int(np.median(years))
    early = [case for case, year in zip(cases, years, strict=True) if year < middle]
    late = [case for case, year in zip(cases, years, strict=True) if year >= middle]
    if not early:
        raise CohortError(f"no patient was treated before {middle}: there is no early half")
    return early, late, middle


def fit_hpv(cases: Sequence[Case], features: Sequence[str]) -> tuple[Pipeline, pd.Series]:
    """Ridge logistic regression of HPV status (scikit-learn, C = 1, columns standardised), and its filling values."""
    table = hpv_table(cases, features)
    fill = table.median().fillna(0.0)
    model = make_pipeline(StandardScaler(), LogisticRegression())
    return model.fit(table.fillna(fill), [int(case[keys.HPV]) for case in cases]), fill


def hpv_table(cases: Sequence[Case], features: Sequence[str]) -> pd.DataFrame:
    """Coded clinical values without outcome."""
    return code_cohort(cases, features).drop(columns=[keys.TIME, keys.EVENT])


def hpv_probabilities(model: tuple[Pipeline, pd.Series], cases: Sequence[Case], features: Sequence[str]) -> np.ndarray:
    """(N,) probability that a patient is positive."""
    return model[0].predict_proba(hpv_table(cases, features).fillna(model[1]))[:, 1]


def judge_hpv(probability: np.ndarray, cases: Sequence[Case], seed: int, samples: int) -> dict[str, Any]:
    """ROC AUC and calibration of HPV probabilities, each with interval and counts.

    ``difference`` is the share of positives less the mean probability; ``slope`` and the intercept of a logistic
    regression on the log odds, 1 where probabilities are neither too extreme nor too moderate.
    """
    table = pd.DataFrame({keys.HPV: [float(case[keys.HPV]) for case in cases], keys.HPV_PROB: probability})
    counts = {"patients": len(table), "positive": int(table[keys.HPV].sum())}
    found: dict[str, Any] = {"roc_auc": summarise(table, seed, ("hpv_auc",), samples=samples)["hpv_auc"]}
    for name, statistic in (("difference", _hpv_difference), ("slope", _hpv_slope)):
        low, high = bootstrap_interval(statistic, table, samples, seed)
        found[name] = {"value": statistic(table), "low": low, "high": high, **counts}
    return found


def _hpv_difference(table: pd.DataFrame) -> float:
    return float(table[keys.HPV].mean() - table[keys.HPV_PROB].mean())


def _hpv_slope(table: pd.DataFrame) -> float:
    if table[keys.HPV].nunique() < 2:
        return float("nan")
    odds = np.log(table[[keys.HPV_PROB]] / (1 - table[[keys.HPV_PROB]]))
    return float(LogisticRegression(C=np.inf).fit(odds, table[keys.HPV]).coef_[0, 0])


def hpv_evidence(
    cases: Sequence[Case], years: Sequence[int], others: Sequence[Case], seed: int, samples: int
) -> dict[str, Any]:
    """HPV status from clinical values alone: from early to late years, by year, and on another cohort."""
    features = HPV_FEATURES
    known = [case for case in cases if case[keys.HPV_KNOWN]]
    its_years = [year for case, year in zip(cases, years, strict=True) if case[keys.HPV_KNOWN]]
    early, late, middle = split_by_year(known, its_years)
    report: dict[str, Any] = {"features": list(features), "from_year": middle}
    report["temporal"] = judge_hpv(hpv_probabilities(fit_hpv(early, features), late, features), late, seed, samples)
    report["temporal"]["train"] = len(early)
    pooled = np.zeros(len(known))
    for train, test in year_folds(its_years):
        model = fit_hpv([known[row] for row in train], features)
        pooled[test] = hpv_probabilities(model, [known[row] for row in test], features)
    report["by_year"] = judge_hpv(pooled, known, seed, samples)
    tested = [case for case in others if case[keys.HPV_KNOWN]]
    if tested:
        model = fit_hpv(known, features)
        report["external"] = judge_hpv(hpv_probabilities(model, tested, features), tested, seed, samples)
    return report
