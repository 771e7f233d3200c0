"""Metrics of survival predictions: concordance, AUC, Brier score, calibration and risk groups, with intervals.

``time`` is in days, ``event`` True = relapse, a higher log hazard means an earlier relapse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from scripts import keys
from scripts.evaluation.bootstrap import BOOTSTRAP_SAMPLES
from scripts.evaluation.survival import (
    DAYS_PER_YEAR,
    HORIZON_YEARS,
    NORMAL_95,
    Calibration,
    CalibrationError,
    HorizonError,
    Outcomes,
    SurvivalFunction,
    checked_risk,
    cox_slope,
    group_names,
    risk_groups,
)
from scripts.training.concordance import comparable_pairs, concordance_index, resampled_concordance

if TYPE_CHECKING:  # torch, torchsurv and lifelines are imported where they are used
    import torch

CALIBRATION_YEARS = (2.0,)
BRIER_POINTS = 100


class MetricUnavailableError(ValueError):
    """A metric is undefined for these patients; the message is the reason to print instead of it."""


def survival_metrics(
    train: Outcomes,
    test: Outcomes,
    log_hazard: ArrayLike,
    calibration: Calibration | None = None,
    *,
    survival: SurvivalFunction | None = None,
    cuts: Mapping[str, Sequence[float]] | None = None,
    calibration_years: Sequence[float] = CALIBRATION_YEARS,
    tau: float | None = None,
    seed: int = 0,
    samples: int = BOOTSTRAP_SAMPLES,
) -> dict[str, Any]:
    """All metrics of survival predictions, each with its interval and counts, or the reason why it is undefined.

    A metric is ``{"value", "low", "high", "patients", "events", "samples", ...}`` or ``{"value": None, "reason",
    "patients", "events"}``. Intervals are 95 % percentiles over patients of ``test`` drawn with replacement (the draws
    of :func:`.bootstrap_interval`); the training patients, the model and its calibration stay fixed. ``samples`` counts
    the draws in which the metric exists; without any, low and high are None.

    Args:
        train: patients the model was trained on: their censoring distribution weights the test patients, their
            Kaplan-Meier curve is the null model.
        test: patients to evaluate on.
        log_hazard: (N,) of the test patients, normalised.
        calibration: gives survival and cut points where these are not given.
        survival: function of days (D,) that returns (N, D).
        cuts: name to cut points, found on training patients.
        calibration_years: of observed against predicted survival.
        tau: days up to which Uno's C and the Brier score are computed; None = the longest of the AUC's
            horizons within the follow-up of both sets (without one, the last observed day within it).
        seed: of the bootstrap.
        samples: number of bootstrap draws.

    Returns:
        - ``about``: patients and events of both sets, follow-up, tau, seed, samples;
        - ``c_index`` (Harrell), ``uno_c_index`` (Uno's, with inverse probability of censoring weights, up to tau);
        - ``auc_<years>y``: cumulative/dynamic AUC, with its number of cases and controls;
        - ``integrated_brier``, ``integrated_brier_null`` (training Kaplan-Meier curve for all patients) and
          ``brier_skill`` = 1 - the first / the second, above 0 where the model is better than the null model;
        - ``calibration_2y``: ``difference`` (observed - predicted survival; 0 is ideal), ``slope`` (Cox model of the
          predictions; 1 is ideal, below 1 too extreme; Wald interval) and ``groups``, observed against predicted;
        - ``risk_groups``: for each set of cut points, Kaplan-Meier ``curves`` with numbers at risk, and ``log_rank``.

    Raises:
        ValueError: arguments of different lengths, or predicted survival outside 0 to 1.

    Reference:
        Harrell F. E. et al. JAMA 247, 1982. Uno H. et al. Stat. Med. 30, 2011 (C) and J. Am. Stat. Assoc. 102, 2007
        (AUC). Graf E. et al. Stat. Med. 18, 1999 (Brier score). van Houwelingen H. C. Stat. Med. 19, 2000
        (calibration slope).
    """
    risk = checked_risk(log_hazard, test)
    if survival is None and calibration is not None:
        survival = partial(calibration.survival, risk)
    if cuts is None:
        cuts = calibration.cut_points if calibration is not None else {}
    horizons = np.array(HORIZON_YEARS, dtype=float) * DAYS_PER_YEAR
    tau = _default_tau(train, test, horizons) if tau is None else float(tau)
    judged = _Judged(train, test, risk, tau, _draws(test.patients, samples, seed), survival)
    metrics: dict[str, Any] = {
        "about": {**judged.about, "seed": seed, "samples": samples},
        "c_index": _metric(judged, _harrell),
        "uno_c_index": _metric(judged, _uno),
    }
    for days in horizons:
        metrics[f"auc_{days / DAYS_PER_YEAR:g}y"] = _metric(judged, _auc, days)
    for name in ("integrated_brier", "integrated_brier_null", "brier_skill"):
        metrics[name] = _metric(judged, _brier, name)
    for years in calibration_years:
        metrics[f"calibration_{years:g}y"] = _calibration_metrics(judged, cuts, years * DAYS_PER_YEAR)
    metrics["risk_groups"] = {name: _group_metrics(judged, points) for name, points in cuts.items()}
    return metrics


def ensemble_survival(cases: pd.DataFrame, stored: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of :func:`survival_metrics` for an ensemble's predictions of patients it was not trained on.

    Args:
        cases: columns ``log_hazard`` and, for several members, ``log_hazard_fold_<k>``, as in ``cases.csv``.
        stored: :meth:`Calibration.to_dict` that the ensemble carries, ``{"reason": why it has none}``, or None.

    Returns:
        ``log_hazard``: the mean of the members' normalised ones, and the ``calibration``; without a calibration the
        mean as it is, and a ``survival`` function that raises :class:`MetricUnavailableError` with the reason.
    """
    if stored is None or "reason" in stored:
        why = "no calibration was stored with the weights" if stored is None else str(stored["reason"])

        def unavailable(days: np.ndarray) -> np.ndarray:
            raise MetricUnavailableError(f"no absolute risk: {why}")

        return {"log_hazard": cases["log_hazard"].to_numpy(), "survival": unavailable}
    calibration = Calibration.from_dict(stored)
    names = [f"{keys.FOLD_COLUMN}{k}" for k in range(len(calibration.fold_centres))]
    if len(names) == 1:
        names = ["log_hazard"]
    missing = [name for name in names if name not in cases]
    if missing:
        raise ValueError(f"the table of cases has no column {missing[0]}: evaluate with the ensemble of these folds")
    return {"log_hazard": calibration.normalise(cases[names].to_numpy()).mean(axis=1), "calibration": calibration}


@dataclass(frozen=True, eq=False)
class _Judged:
    """Patients to evaluate on, and what all metrics share. ``draws`` (B, N) counts each patient in each draw."""

    train: Outcomes
    test: Outcomes
    risk: np.ndarray
    tau: float
    draws: np.ndarray
    survival: SurvivalFunction | None

    @property
    def counts(self) -> dict[str, int]:
        return {"patients": self.test.patients, "events": self.test.events}

    @property
    def about(self) -> dict[str, float]:
        return {
            **self.counts,
            "last_day": self.test.last_day,
            "train_patients": self.train.patients,
            "train_events": self.train.events,
            "train_last_day": self.train.last_day,
            "tau_days": self.tau,
        }

    def predicted(self, days: np.ndarray) -> np.ndarray:
        """(N, D) predicted survival, checked."""
        if self.survival is None:
            raise MetricUnavailableError("the model gives no absolute risk")
        predicted = np.asarray(self.survival(days), dtype=float)
        if predicted.shape != (self.test.patients, len(days)):
            raise ValueError(f"predicted survival has shape {predicted.shape}, not {(self.test.patients, len(days))}")
        if not ((predicted >= 0) & (predicted <= 1)).all():
            raise ValueError("a predicted survival is not between 0 and 1")
        return predicted


def _draws(patients: int, samples: int, seed: int) -> np.ndarray:
    """(B, N) how often each patient is in each draw, the draws of ``bootstrap_interval``."""
    rng = np.random.default_rng(seed)
    draws = np.zeros((samples, patients))
    for draw in draws if patients else ():
        draw += np.bincount(rng.integers(0, patients, patients), minlength=patients)
    return draws


def _default_tau(train: Outcomes, test: Outcomes, horizons: np.ndarray) -> float:
    common = min(train.last_day, test.last_day)
    times = np.concatenate([train.time, test.time])
    for candidates in (horizons, times):
        if (candidates < common).any():
            return float(candidates[candidates < common].max())
    return common


Computed = tuple[float, np.ndarray | None, dict[str, Any]]  # value, its value in each draw, what else belongs to it


def _metric(judged: _Judged, compute: Callable[..., Computed], *arguments: Any) -> dict[str, Any]:
    """The metric that ``compute`` returns, or the reason why it is undefined."""
    try:
        if not judged.test.patients:
            raise MetricUnavailableError("no labelled case")
        value, draws, extra = compute(judged, *arguments)
    except (MetricUnavailableError, HorizonError) as reason:
        return {"value": None, "reason": str(reason), **judged.counts}
    if draws is None:  # the interval is not by bootstrap and comes with the rest
        return {"value": float(value), **judged.counts, **extra}
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [0.025, 0.975]).tolist() if len(draws) else (None, None)
    return {"value": float(value), "low": low, "high": high, **judged.counts, "samples": len(draws), **extra}


def _pair_draws(draws: np.ndarray, pairs: np.ndarray, risk: np.ndarray) -> np.ndarray:
    """(B,) the concordance of :func:`.resampled_concordance` in each draw, NaN where a draw has no pair."""
    concordant, comparable = resampled_concordance(draws, pairs, risk)
    return np.divide(concordant, comparable, out=np.full(len(draws), np.nan), where=comparable > 0)


def _harrell(judged: _Judged) -> Computed:
    test = judged.test
    value = concordance_index(test.time, test.event, judged.risk)
    if math.isnan(value):
        raise MetricUnavailableError(f"no comparable pair ({test.events} events)")
    return value, _pair_draws(judged.draws, comparable_pairs(test.time, test.event), judged.risk), {}


def _uno(judged: _Judged) -> Computed:
    from torchsurv.metrics.cindex import ConcordanceIndex

    test, tau = judged.test, judged.tau
    if tau > min(judged.train.last_day, test.last_day):
        raise MetricUnavailableError(_beyond(judged, "tau", tau))
    used = test.event & (test.time < tau)
    pairs = comparable_pairs(test.time, test.event)
    if not pairs[used].any():
        raise MetricUnavailableError(f"no comparable pair before tau, day {tau:g} ({int(used.sum())} events)")
    weight = np.where(used, _censoring_weights(judged.train, test.time), 0.0)
    value = ConcordanceIndex()(*_tensors(judged.risk, test), weight=_tensor(weight), instate=False).item()
    draws = _pair_draws(judged.draws, pairs * np.square(weight)[:, None], judged.risk)
    return value, draws, {"tau_days": tau, "events_before_tau": int(used.sum())}


def _auc(judged: _Judged, days: float) -> Computed:
    from torchsurv.metrics.auc import Auc

    test = judged.test
    _check_horizon(judged, days)
    case, control = test.event & (test.time <= days), test.time > days
    if not case.any():
        raise MetricUnavailableError(f"no relapse up to day {days:g}")
    weight = _censoring_weights(judged.train, test.time)
    value = Auc()(
        *_tensors(judged.risk, test),
        weight=_tensor(weight),
        new_time=_tensor([days]),
        weight_new_time=_tensor(_censoring_weights(judged.train, np.array([days]))),
        instate=False,
    ).item()
    draws = _pair_draws(judged.draws, np.where(case, weight, 0.0)[:, None] * control, judged.risk)
    return value, draws, {"days": days, "cases": int(case.sum()), "controls": int(control.sum())}


def _brier(judged: _Judged, name: str) -> Computed:
    from lifelines import KaplanMeierFitter

    if not judged.test.events or judged.test.patients < 2:
        raise MetricUnavailableError("no events" if not judged.test.events else "one patient only")
    _check_horizon(judged, judged.tau)
    days = np.linspace(judged.tau / BRIER_POINTS, judged.tau, BRIER_POINTS)
    extra = {"tau_days": judged.tau}
    if name != "integrated_brier_null":
        value, draws = _integrated_brier(judged, days, judged.predicted(days))
    if name == "integrated_brier":
        return value, draws, extra
    curve = KaplanMeierFitter().fit(judged.train.time, judged.train.event).survival_function_at_times(days).to_numpy()
    null, null_draws = _integrated_brier(judged, days, np.tile(curve, (judged.test.patients, 1)))
    if name == "integrated_brier_null":
        return null, null_draws, extra
    if null == 0:
        raise MetricUnavailableError("the Kaplan-Meier null makes no error")
    ratio = np.divide(draws, null_draws, out=np.full(len(draws), np.nan), where=null_draws > 0)
    return 1 - value / null, 1 - ratio, extra


def _integrated_brier(judged: _Judged, days: np.ndarray, predicted: np.ndarray) -> tuple[float, np.ndarray]:
    """Brier score integrated over ``days`` and divided by their range, and its value in each draw."""
    import torch
    from torchsurv.metrics.brier_score import BrierScore

    metric = BrierScore()
    metric(
        torch.from_numpy(predicted),
        *_tensors(judged.risk, judged.test)[1:],
        new_time=_tensor(days),
        weight=_tensor(_censoring_weights(judged.train, judged.test.time)),
        weight_new_time=_tensor(_censoring_weights(judged.train, days)),
    )
    assert metric.residuals is not None  # for mypy: just computed
    of_patient = np.trapezoid(metric.residuals.numpy(), days, axis=1) / (days[-1] - days[0])
    return metric.integral().item(), judged.draws @ of_patient / judged.test.patients


def _check_horizon(judged: _Judged, days: float) -> None:
    """Raise where no training or no test patient was followed beyond ``days``."""
    if not judged.train.events:
        raise MetricUnavailableError(f"no events among the {judged.train.patients} training patients")
    if days >= min(judged.train.last_day, judged.test.last_day):
        raise MetricUnavailableError(_beyond(judged, "the horizon", days))


def _beyond(judged: _Judged, name: str, days: float) -> str:
    whose, last = min(
        (("training follow-up", judged.train.last_day), ("follow-up of these patients", judged.test.last_day)),
        key=lambda item: item[1],
    )
    return f"{name}, day {days:g}, is not within the {whose}, which ends at day {last:g}"


def _censoring_weights(train: Outcomes, days: np.ndarray) -> np.ndarray:
    """1 / probability to be still followed at ``days``, by the training patients; 0 where that probability is 0."""
    from torchsurv.stats.ipcw import get_ipcw

    if not train.events:
        raise MetricUnavailableError(f"no events among the {train.patients} training patients")
    return get_ipcw(*_tensors(train.time, train)[1:], new_time=_tensor(days)).double().numpy()


def _tensor(values: ArrayLike) -> torch.Tensor:
    """In single precision: torchsurv computes weights in it and compares times with those it was given."""
    import torch

    return torch.as_tensor(np.asarray(values, dtype=np.float32))


def _tensors(risk: np.ndarray, outcomes: Outcomes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Estimate, event and time in torchsurv's order."""
    import torch

    return torch.from_numpy(risk), torch.from_numpy(outcomes.event), _tensor(outcomes.time)


# --- calibration and risk groups --------------------------------------------------------------------------------------


def _calibration_metrics(judged: _Judged, cuts: Mapping[str, Sequence[float]], days: float) -> dict[str, Any]:
    """Observed against predicted survival at ``days``: on the whole, by a Cox model, and by group."""
    difference = _metric(judged, _observed_minus_predicted, days)
    groups = []
    if difference["value"] is not None and "tertiles" in cuts:
        predicted = judged.predicted(np.array([days]))[:, 0]
        for name, members in _members(judged.risk, cuts["tertiles"]):
            groups.append({"group": name, **_observed(judged.test[members], days, predicted[members])})
    return {
        "days": days,
        "difference": difference,
        "slope": _metric(judged, _calibration_slope, days),
        "groups": groups,
    }


def _observed_minus_predicted(judged: _Judged, days: float) -> Computed:
    if days >= judged.test.last_day:
        raise MetricUnavailableError(_beyond(judged, "the horizon", days))
    predicted = judged.predicted(np.array([days]))[:, 0]
    every = np.ones((1, judged.test.patients))
    observed = _kaplan_meier_draws(judged.test, every, days)[0]
    draws = _kaplan_meier_draws(judged.test, judged.draws, days) - judged.draws @ predicted / judged.test.patients
    return observed - predicted.mean(), draws, {"observed": float(observed), "predicted": float(predicted.mean())}


def _kaplan_meier_draws(outcomes: Outcomes, draws: np.ndarray, days: float) -> np.ndarray:
    """(B,) Kaplan-Meier survival at ``days`` in each draw; NaN where its last patient left before, without relapse."""
    order = np.argsort(outcomes.time)
    time, event, counts = outcomes.time[order], outcomes.event[order], draws[:, order]
    first = np.unique(time, return_index=True)[1]
    at_risk = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1][:, first]
    deaths = np.add.reduceat(counts * event, first, axis=1)
    hazard = np.divide(deaths, at_risk, out=np.zeros_like(deaths), where=at_risk > 0)
    survival = np.prod(1 - hazard[:, time[first] <= days], axis=1)
    followed = np.where(counts > 0, time, 0.0).max(axis=1) >= days
    return np.where(followed | (survival == 0), survival, np.nan)


def _calibration_slope(judged: _Judged, days: float) -> Computed:
    """Cox coefficient of log(-log S), which for proportional hazards is the log hazard but for a constant."""
    predicted = judged.predicted(np.array([days]))[:, 0]
    if not judged.test.events:
        raise MetricUnavailableError("no events")
    if not ((predicted > 0) & (predicted < 1)).all():
        raise MetricUnavailableError("a predicted survival is exactly 0 or 1")
    try:
        slope, error = cox_slope(np.log(-np.log(predicted)), judged.test)
    except CalibrationError as reason:
        raise MetricUnavailableError(str(reason)) from reason
    return slope, None, {"low": slope - NORMAL_95 * error, "high": slope + NORMAL_95 * error, "interval": "Wald"}


def _observed(outcomes: Outcomes, days: float, predicted: np.ndarray) -> dict[str, Any]:
    """Kaplan-Meier survival of one group with its interval (Greenwood, log-log) beside the mean predicted one."""
    from lifelines import KaplanMeierFitter

    head: dict[str, Any] = {"patients": outcomes.patients, "events": outcomes.events}
    if not outcomes.patients:
        return {"value": None, "reason": "no patients in this group", **head}
    head["predicted"] = float(predicted.mean())
    fitter = KaplanMeierFitter().fit(outcomes.time, outcomes.event)
    value = float(fitter.survival_function_at_times(days).iloc[0])
    if days > outcomes.last_day and value > 0:
        reason = f"the follow-up of this group ends at day {outcomes.last_day:g}"
        return {"value": None, "reason": reason, **head}
    low, high = fitter.confidence_interval_survival_function_.loc[:days].iloc[-1]
    return {"value": value, "low": _number(low), "high": _number(high), **head}


def _group_metrics(judged: _Judged, cuts: Sequence[float]) -> dict[str, Any]:
    """Kaplan-Meier curves of the risk groups, numbers at risk at whole years, and the log-rank test."""
    ticks = np.arange(0, judged.test.last_day + 1, DAYS_PER_YEAR)
    curves = []
    for name, members in _members(judged.risk, cuts):
        outcomes = judged.test[members]
        curves.append(
            {
                "group": name,
                "patients": outcomes.patients,
                "events": outcomes.events,
                **_curve(outcomes),
                "at_risk": [int((outcomes.time >= day).sum()) for day in ticks],
            }
        )
    return {
        "cuts": [float(cut) for cut in cuts],
        "at_risk_days": ticks.tolist(),
        "curves": curves,
        "log_rank": _log_rank(judged, risk_groups(judged.risk, cuts)),
    }


def _members(risk: np.ndarray, cuts: Sequence[float]) -> list[tuple[str, np.ndarray]]:
    """Name and rows of each group, lowest risk first."""
    numbers = risk_groups(risk, cuts)
    return [(name, np.flatnonzero(numbers == k)) for k, name in enumerate(group_names(len(cuts) + 1))]


def _curve(outcomes: Outcomes) -> dict[str, list]:
    """Steps of a Kaplan-Meier curve with its interval, and the days on which patients were censored."""
    from lifelines import KaplanMeierFitter

    if not outcomes.patients:
        return {"days": [], "survival": [], "low": [], "high": [], "censored_days": []}
    fitter = KaplanMeierFitter().fit(outcomes.time, outcomes.event)
    table = pd.concat([fitter.survival_function_, fitter.confidence_interval_survival_function_], axis=1)
    table.columns = pd.Index(["survival", "low", "high"])
    kept = (fitter.event_table["observed"] > 0).to_numpy(copy=True)
    kept[[0, -1]] = True  # where the curve begins and ends
    curve = {name: [_number(value) for value in column] for name, column in table[kept].items()}
    days = table.index[kept].astype(float).tolist()
    return {"days": days, **curve, "censored_days": sorted(outcomes.time[~outcomes.event].tolist())}


def _log_rank(judged: _Judged, groups: np.ndarray) -> dict[str, Any]:
    """Log-rank test of equal survival of the groups: p value, statistic, degrees of freedom."""
    from lifelines.statistics import multivariate_logrank_test

    filled = len(np.unique(groups))
    if filled < 2:
        return {"value": None, "reason": f"{filled} of the groups has patients", **judged.counts}
    if not judged.test.events:
        return {"value": None, "reason": "no events", **judged.counts}
    result = multivariate_logrank_test(judged.test.time, groups, judged.test.event)
    if math.isnan(result.p_value):
        return {"value": None, "reason": "no time at which patients of several groups are at risk", **judged.counts}
    return {
        "value": float(result.p_value),
        "statistic": float(result.test_statistic),
        "degrees_of_freedom": filled - 1,
        **judged.counts,
    }


def _number(value: float) -> float | None:
    """Plain, None for NaN: JSON has no word for it."""
    return None if math.isnan(value) else float(value)
