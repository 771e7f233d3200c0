"""Absolute risk from a log hazard, and the evidence for it: calibration, concordance, AUC, Brier score, risk groups.

A network's log hazard only ranks patients. :func:`fit_calibration` turns it into recurrence-free survival with a Cox
slope and a Breslow baseline, both fitted to pooled out-of-fold log hazards, each put on a common scale by the
statistics of its own fold. :func:`survival_metrics` measures how well rank and probability do on other patients.

Throughout, ``time`` is in days, ``event`` True = relapse, and a higher log hazard means an earlier relapse.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from scripts import evaluation, keys  # evaluation as a module: the two may come to import each other
from scripts.metrics import concordance_index

if TYPE_CHECKING:  # torchsurv and lifelines are imported where they are used: inference need not wait for them
    import torch

__all__ = [
    "DAYS_PER_YEAR",
    "HORIZON_YEARS",
    "Calibration",
    "CalibrationError",
    "FoldScale",
    "HorizonError",
    "Outcomes",
    "SurvivalInterval",
    "cross_fitted_survival",
    "cut_points",
    "fit_calibration",
    "group_names",
    "normalise_out_of_fold",
    "paired_bootstrap",
    "risk_groups",
    "survival_metrics",
]

DAYS_PER_YEAR = 365.25
HORIZON_YEARS = (1.0, 2.0, 3.0, 5.0)
CALIBRATION_YEARS = 2.0
MIN_EVENTS = 10  # ten events a fitted coefficient (Peduzzi et al. 1995)
BASELINE_POINTS = 300
QUANTILE_POINTS = 501
BRIER_POINTS = 100
GROUP_NAMES = {2: ("low", "high"), 3: ("low", "intermediate", "high")}
NORMAL_95 = 1.959963984540054

SurvivalFunction = Callable[[np.ndarray], np.ndarray]  # days (D,) -> survival (N, D)


class CalibrationError(ValueError):
    """Absolute risk cannot be had from these patients, or a stored calibration cannot be read."""


class HorizonError(ValueError):
    """Survival was asked for beyond the training follow-up.

    Attributes:
        last_day: the last day that can be asked for.
    """

    def __init__(self, days: float, last_day: float) -> None:
        super().__init__(
            f"survival at day {days:g} ({days / DAYS_PER_YEAR:.2f} years) cannot be given: "
            f"the training follow-up ends at day {last_day:g}, the last usable day"
        )
        self.last_day = last_day


class FigureUnavailableError(ValueError):
    """A figure cannot be had from these patients; the message is the reason to print beside it."""


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What became of some patients.

    Args:
        time: (N,) days to the relapse or to the last visit, not negative.
        event: (N,) bool or 0/1, True = relapse.

    Raises:
        ValueError: for lengths that differ, a time that is negative, NaN or infinite, an event that is not 0/1.
    """

    time: np.ndarray
    event: np.ndarray

    def __post_init__(self) -> None:
        time, event = _vector("time", self.time), _vector("event", self.event)
        if len(time) != len(event):
            raise ValueError(f"{len(time)} times but {len(event)} events")
        if (time < 0).any():
            raise ValueError(f"patient {int(np.argmax(time < 0))} has the time {time.min():g}; days are not negative")
        if not np.isin(event, (0, 1)).all():
            raise ValueError("event holds values other than 0 and 1")
        object.__setattr__(self, "time", time)
        object.__setattr__(self, "event", event.astype(bool))

    @property
    def patients(self) -> int:
        """How many there are."""
        return len(self.time)

    @property
    def events(self) -> int:
        """How many of them relapsed."""
        return int(self.event.sum())

    @property
    def last_day(self) -> float:
        """The longest time; 0 where there is no patient."""
        return float(self.time.max(initial=0.0))

    def __getitem__(self, rows: np.ndarray) -> Outcomes:
        return Outcomes(self.time[rows], self.event[rows])


# --- absolute risk ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldScale:
    """Where the log hazards of one fold's network lie: networks trained apart have no common zero or unit.

    Attributes:
        centre: what is subtracted.
        scale: what is divided by, above 0.
    """

    centre: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.centre) and math.isfinite(self.scale) and self.scale > 0):
            raise CalibrationError(f"a fold with centre {self.centre} and scale {self.scale} cannot be normalised")

    @classmethod
    def of(cls, log_hazard: ArrayLike, centre_only: bool = False) -> FoldScale:
        """Mean and standard deviation of one network's log hazards.

        Args:
            log_hazard: (N,) of one fold's network for the patients it was trained on.
            centre_only: leave the unit as it is (scale 1).

        Raises:
            CalibrationError: where they are all the same, or there are none.
        """
        values = _vector("log_hazard", log_hazard)
        if not len(values):
            raise CalibrationError("no log hazards to take a fold's centre and scale from")
        if not centre_only and np.ptp(values) == 0:
            raise CalibrationError(f"the fold gives all {len(values)} patients the same log hazard")
        return cls(float(values.mean()), 1.0 if centre_only else float(values.std()))


def normalise_out_of_fold(log_hazard: ArrayLike, folds: ArrayLike, scales: Sequence[FoldScale]) -> np.ndarray:
    r"""Out-of-fold log hazards on one scale, so that they can be pooled.

    .. math:: z_i = (h_i - c_{k(i)}) / s_{k(i)}

    Args:
        log_hazard: (N,) each from the network that did not see the patient.
        folds: (N,) number k of that network, in the order of ``scales``.
        scales: of each network, from the patients it was trained on (:meth:`FoldScale.of`): those held out would tell
            it about the patients it is tested on.

    Returns:
        (N,) float64.

    Raises:
        ValueError: for a fold without a scale, or lengths that differ.

    Example:
        What is an affine function of the same risk in each fold becomes the same:

        >>> scales = [FoldScale(10.0, 2.0), FoldScale(-1.0, 0.5)]
        >>> normalise_out_of_fold([12.0, -0.5], [0, 1], scales)
        array([1., 1.])
    """
    values, numbers = _vector("log_hazard", log_hazard), _vector("folds", folds).astype(int)
    if len(values) != len(numbers):
        raise ValueError(f"{len(values)} log hazards but {len(numbers)} fold numbers")
    unknown = sorted(set(numbers.tolist()) - set(range(len(scales))))
    if unknown:
        raise ValueError(f"folds {unknown} have no centre and scale; there are {len(scales)}, numbered from 0")
    centre, scale = _scale_arrays(scales)
    return (values - centre[numbers]) / scale[numbers]


@dataclass(frozen=True, eq=False)
class SurvivalInterval:
    """Recurrence-free survival by an ensemble, and how far its members differ.

    ``low`` and ``high`` are the least and the greatest among the folds: a spread of models. They are no confidence
    interval, they do not hold the truth with any stated probability, and with one fold they equal the estimate.

    Attributes:
        days: (D,) horizons.
        survival: (..., D) at the mean of the folds' normalised log hazards.
        low: (..., D) of the fold with the highest log hazard.
        high: (..., D) of the fold with the lowest.
        log_hazard: (...,) the mean of the folds' normalised log hazards.
    """

    days: np.ndarray
    survival: np.ndarray
    low: np.ndarray
    high: np.ndarray
    log_hazard: np.ndarray


@dataclass(frozen=True)
class Calibration:
    r"""Recurrence-free survival as a function of a normalised log hazard z.

    .. math:: S(t | z) = \exp(-H_0(t) \exp(\beta z))

    Made by :func:`fit_calibration`; plain Python, so that it can be stored with the weights.

    Attributes:
        slope: beta, not negative.
        fitted_slope: beta before that limit.
        slope_error: its standard error.
        fold_centres: (K,) subtracted from the log hazard of each member of the ensemble.
        fold_scales: (K,) by which it is then divided.
        baseline_days: (T,) rising days with a relapse.
        baseline_hazard: (T,) H_0 from that day on.
        baseline_at_risk: (T,) patients still followed on that day.
        last_day: longest follow-up; nothing is said beyond it.
        quantiles: rising normalised log hazards of the training patients (all, or evenly spaced quantiles of them).
        cut_points: name to the normalised log hazards at which risk groups are cut.
        patients: that it was fitted to.
        events: relapses among them.

    Reference:
        Cox D. R. Regression models and life-tables. J. R. Stat. Soc. B 34, 1972, and the discussion by N. Breslow.
    """

    slope: float
    fitted_slope: float
    slope_error: float
    fold_centres: list[float]
    fold_scales: list[float]
    baseline_days: list[float]
    baseline_hazard: list[float]
    baseline_at_risk: list[int]
    last_day: float
    quantiles: list[float]
    cut_points: dict[str, list[float]]
    patients: int
    events: int

    def to_dict(self) -> dict[str, Any]:
        """Lists, numbers and strings, as ``torch.load(weights_only=True)`` and JSON take them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Calibration:
        """The inverse of :meth:`to_dict`.

        Raises:
            CalibrationError: for names that are missing or unknown, and lists that do not belong together.
        """
        names = {item.name for item in fields(cls)}
        if set(stored) != names:
            wrong = [f"without {sorted(names - set(stored))}"] if names - set(stored) else []
            wrong += [f"with unknown {sorted(set(stored) - names)}"] if set(stored) - names else []
            raise CalibrationError(f"stored calibration {' and '.join(wrong)}: was it written by another version?")
        calibration = cls(**stored)
        if len(calibration.fold_centres) != len(calibration.fold_scales):
            raise CalibrationError("stored calibration: fold_centres and fold_scales differ in length")
        baseline = (calibration.baseline_days, calibration.baseline_hazard)
        if len({len(calibration.baseline_at_risk), *map(len, baseline)}) != 1 or any(
            (np.diff(values) < 0).any() for values in baseline
        ):
            raise CalibrationError("stored calibration: the baseline is not a rising curve")
        return calibration

    @property
    def doubt(self) -> str:
        """Why the absolute risk may not depend on the patient, to be shown beside it; empty where it does."""
        low, high = (self.fitted_slope + sign * NORMAL_95 * self.slope_error for sign in (-1, 1))
        if low > 0:
            return ""
        return (
            f"the log hazard does not order the {self.events} training relapses beyond chance "
            f"(slope {self.fitted_slope:.2f}, 95 % {low:.2f} to {high:.2f})"
        )

    def usable(self, days: ArrayLike) -> np.ndarray:
        """True for days within the training follow-up."""
        return np.asarray(days, dtype=float) <= self.last_day

    def normalise(self, fold_log_hazards: ArrayLike) -> np.ndarray:
        """Log hazards of the members, (..., K), on the common scale.

        Raises:
            ValueError: where K is not the number of folds that the calibration knows.
        """
        values = np.asarray(fold_log_hazards, dtype=float)
        if values.ndim == 0 or values.shape[-1] != len(self.fold_centres):
            raise ValueError(f"log hazards of shape {values.shape}, but {len(self.fold_centres)} folds were calibrated")
        return (values - np.asarray(self.fold_centres)) / np.asarray(self.fold_scales)

    def survival(self, log_hazard: ArrayLike, days: ArrayLike) -> np.ndarray:
        """Probability to be without a relapse at ``days``.

        Args:
            log_hazard: any shape S, normalised (:meth:`normalise`).
            days: any shape D, from 0 to ``last_day``.

        Returns:
            Of shape S + D.

        Raises:
            HorizonError: for a day beyond the training follow-up; nothing is extrapolated.
            ValueError: for a negative day, or a number that is not finite.
        """
        days, risk = np.asarray(days, dtype=float), np.asarray(log_hazard, dtype=float)
        if not np.isfinite(days).all() or (days < 0).any():
            raise ValueError("days of survival must be finite and not negative")
        if not np.isfinite(risk).all():
            raise ValueError("a log hazard is not finite")
        if not self.usable(days).all():
            raise HorizonError(float(days.max()), self.last_day)
        step = np.searchsorted(self.baseline_days, days, side="right")
        hazard = np.concatenate([[0.0], self.baseline_hazard])[step]
        with np.errstate(divide="ignore", over="ignore"):  # no hazard: log -inf, survival 1; a huge one: survival 0
            return np.exp(-np.exp(np.add.outer(self.slope * risk, np.log(hazard))))

    def survival_curve(self, log_hazard: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Survival from day 0 to the end of follow-up, constant between the days given.

        Args:
            log_hazard: any shape S, normalised.

        Returns:
            days (T,) and survival S + (T,).
        """
        days = np.unique([0.0, *self.baseline_days, self.last_day])
        return days, self.survival(log_hazard, days)

    def survival_interval(self, fold_log_hazards: ArrayLike, days: ArrayLike) -> SurvivalInterval:
        """Survival by the whole ensemble, with the range over its members (no confidence interval).

        Args:
            fold_log_hazards: (..., K) as the members give them, not normalised.
            days: (D,) from 0 to ``last_day``.

        Raises:
            HorizonError: for a day beyond the training follow-up.
            ValueError: as :meth:`normalise` and :meth:`survival`.

        Note:
            The slope was fitted to single networks. The mean of several varies less between patients, so its survival
            is a little closer to the average than it would have to be.
        """
        risk = self.normalise(fold_log_hazards)
        mean = risk.mean(axis=-1)
        days = np.asarray(days, dtype=float)
        return SurvivalInterval(
            days=days,
            survival=self.survival(mean, days),
            low=self.survival(risk.max(axis=-1), days),
            high=self.survival(risk.min(axis=-1), days),
            log_hazard=mean,
        )

    def percentile(self, log_hazard: ArrayLike) -> np.ndarray:
        """Share of the training patients with a lower normalised log hazard, in percent; equal ones count half.

        Theirs are out-of-fold, each by one network; the mean of an ensemble varies a little less between patients.
        """
        lower = np.searchsorted(self.quantiles, log_hazard, side="left")
        not_higher = np.searchsorted(self.quantiles, log_hazard, side="right")
        return 50.0 * (lower + not_higher) / len(self.quantiles)


def fit_calibration(
    log_hazard: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    scales: Sequence[FoldScale] = (FoldScale(),),
    min_events: int = MIN_EVENTS,
) -> Calibration:
    r"""Cox slope and Breslow baseline of pooled out-of-fold log hazards.

    The slope is that of Cox's partial likelihood (Efron's for ties; lifelines) under the condition that it is not
    negative: where the log hazard orders relapses the wrong way everybody gets the average curve. The baseline is

    .. math:: H_0(t) = \sum_{t_i \le t} d_i / \sum_{j: t_j \ge t_i} \exp(\beta z_j)

    Args:
        log_hazard: (N,) as :func:`normalise_out_of_fold` gives them.
        time: (N,) days.
        event: (N,) bool or 0/1.
        scales: that they were normalised with, in the order of the ensemble's members.
        min_events: least number of relapses.

    Returns:
        The calibration.

    Raises:
        CalibrationError: for too few relapses, log hazards that are all the same or that separate the relapses
            completely, so that no finite slope exists.
        ValueError: for values that are no times or events.
    """
    risk, outcomes = _scored(log_hazard, Outcomes(np.asarray(time), np.asarray(event)))
    if outcomes.events < max(1, min_events):
        raise CalibrationError(
            f"{outcomes.events} relapses among {outcomes.patients} patients: absolute risk needs {max(1, min_events)}"
        )
    fitted_slope, error = _cox_slope(risk, outcomes)
    slope = max(0.0, fitted_slope)
    days, hazard, at_risk = _breslow(risk, outcomes, slope)
    kept = _thinned(days, hazard)
    centre, scale = _scale_arrays(scales)
    ranked = np.sort(risk)
    if len(ranked) > QUANTILE_POINTS:
        ranked = np.quantile(ranked, (np.arange(QUANTILE_POINTS) + 0.5) / QUANTILE_POINTS, method="hazen")
    return Calibration(
        slope=slope,
        fitted_slope=fitted_slope,
        slope_error=error,
        fold_centres=centre.tolist(),
        fold_scales=scale.tolist(),
        baseline_days=days[kept].tolist(),
        baseline_hazard=hazard[kept].tolist(),
        baseline_at_risk=at_risk[kept].tolist(),
        last_day=outcomes.last_day,
        quantiles=ranked.tolist(),
        cut_points=cut_points(risk),
        patients=outcomes.patients,
        events=outcomes.events,
    )


def cross_fitted_survival(
    log_hazard: ArrayLike, folds: ArrayLike, outcomes: Outcomes, min_events: int = MIN_EVENTS
) -> SurvivalFunction:
    """Out-of-fold survival: the calibration of a fold's patients is fitted to those of the other folds.

    To judge the calibration on the pooled out-of-fold patients: the one stored with the ensemble has seen them.

    Args:
        log_hazard: (N,) normalised.
        folds: (N,) fold of each patient.
        outcomes: of the N patients.
        min_events: least number of relapses in the other folds.

    Returns:
        A function of days (D,) that gives survival (N, D) and raises :class:`HorizonError` beyond the shortest
        follow-up among them.

    Raises:
        CalibrationError: as :func:`fit_calibration`, with the fold.
    """
    risk, outcomes = _scored(log_hazard, outcomes)
    numbers = _vector("folds", folds)
    calibrations = {}
    for fold in np.unique(numbers):
        others = outcomes[numbers != fold]
        try:
            calibrations[fold] = fit_calibration(risk[numbers != fold], others.time, others.event, (), min_events)
        except CalibrationError as error:
            raise CalibrationError(f"calibration of fold {fold:g} by the other folds: {error}") from error

    def survival(days: np.ndarray) -> np.ndarray:
        result = np.empty((len(risk), len(days)))
        for fold, calibration in calibrations.items():
            result[numbers == fold] = calibration.survival(risk[numbers == fold], days)
        return result

    return survival


def cut_points(log_hazard: ArrayLike) -> dict[str, list[float]]:
    """Where risk groups are cut: at the median, and at the tertiles, of these (training) log hazards."""
    values = _vector("log_hazard", log_hazard)
    return {"median": [float(np.median(values))], "tertiles": np.quantile(values, [1 / 3, 2 / 3]).tolist()}


def risk_groups(log_hazard: ArrayLike, cuts: Sequence[float]) -> np.ndarray:
    """Number of the risk group, 0 the lowest; a log hazard on a cut belongs below it.

    Example:
        >>> risk_groups([-2.0, 0.0, 0.1], cuts=[0.0])
        array([0, 0, 1])
    """
    return np.searchsorted(np.asarray(cuts, dtype=float), np.asarray(log_hazard, dtype=float), side="left")


def group_names(groups: int) -> tuple[str, ...]:
    """Names of so many risk groups, lowest risk first.

    Example:
        >>> group_names(3)
        ('low', 'intermediate', 'high')
    """
    return GROUP_NAMES.get(groups, tuple(f"{k + 1} of {groups}" for k in range(groups)))


def _cox_slope(covariate: np.ndarray, outcomes: Outcomes) -> tuple[float, float]:
    """Coefficient of a Cox model of one covariate and its standard error.

    Raises:
        CalibrationError: where there is no finite one.
    """
    from lifelines import CoxPHFitter
    from lifelines.exceptions import ConvergenceError, ConvergenceWarning

    if outcomes.patients < 2 or np.ptp(covariate) == 0:
        raise CalibrationError(f"all {outcomes.patients} patients have the same log hazard")
    unit = covariate.std()  # lifelines' steps and checks suppose a covariate of common size
    table = pd.DataFrame(
        {"z": (covariate - covariate.mean()) / unit, "time": outcomes.time, "event": outcomes.event.astype(int)}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            model = CoxPHFitter().fit(table, "time", "event")
        except (ConvergenceError, ConvergenceWarning) as error:
            raise CalibrationError(
                f"the log hazards of {outcomes.patients} patients allow no finite Cox slope for "
                f"{outcomes.events} relapses (lifelines: {str(error).splitlines()[0]})"
            ) from error
    return float(model.params_["z"] / unit), float(model.standard_errors_["z"] / unit)


def _breslow(risk: np.ndarray, outcomes: Outcomes, slope: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Days with an event (T,), the cumulative baseline hazard from each on, and the patients at risk on each."""
    order = np.argsort(outcomes.time)
    time, event = outcomes.time[order], outcomes.event[order]
    weight = np.cumsum(np.exp(slope * risk[order])[::-1])[::-1]  # of all from this row on
    days, deaths = np.unique(time[event], return_counts=True)
    first = np.searchsorted(time, days, side="left")
    return days, np.cumsum(deaths / weight[first]), len(time) - first


def _thinned(days: np.ndarray, hazard: np.ndarray) -> np.ndarray:
    """Rows of the baseline to keep: evenly spaced in survival, and all that the horizons read."""
    if len(days) <= BASELINE_POINTS:
        return np.arange(len(days))
    lost = -np.expm1(-hazard)
    even = np.searchsorted(lost, np.linspace(lost[0], lost[-1], BASELINE_POINTS - len(HORIZON_YEARS)))
    read = np.searchsorted(days, np.array(HORIZON_YEARS) * DAYS_PER_YEAR, side="right") - 1
    return np.unique(np.concatenate([even.clip(max=len(days) - 1), read[read >= 0]]))


def _scale_arrays(scales: Sequence[FoldScale]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([item.centre for item in scales]), np.array([item.scale for item in scales])


def _vector(name: str, values: ArrayLike) -> np.ndarray:
    """(N,) float64, finite."""
    vector = np.asarray(values, dtype=float)
    if vector.ndim != 1:
        raise ValueError(f"{name} has shape {vector.shape}; one value a patient is needed")
    if not np.isfinite(vector).all():
        raise ValueError(f"{int((~np.isfinite(vector)).sum())} of {len(vector)} values of {name} are not finite")
    return vector


def _scored(log_hazard: ArrayLike, outcomes: Outcomes) -> tuple[np.ndarray, Outcomes]:
    risk = _vector("log_hazard", log_hazard)
    if len(risk) != outcomes.patients:
        raise ValueError(f"{len(risk)} log hazards but {outcomes.patients} outcomes")
    return risk, outcomes


# --- evidence ---------------------------------------------------------------------------------------------------------


def survival_metrics(
    train: Outcomes,
    test: Outcomes,
    log_hazard: ArrayLike,
    calibration: Calibration | None = None,
    *,
    survival: SurvivalFunction | None = None,
    cuts: Mapping[str, Sequence[float]] | None = None,
    horizons_years: Sequence[float] = HORIZON_YEARS,
    tau: float | None = None,
    seed: int = 0,
    samples: int = evaluation.BOOTSTRAP_SAMPLES,
) -> dict[str, Any]:
    """All that is said about survival predictions, each figure with its interval and counts or why there is none.

    A figure is ``{"value", "low", "high", "patients", "events", "samples", ...}`` or ``{"value": None, "reason",
    "patients", "events"}``. Intervals are 95 % percentiles over patients of ``test`` drawn with replacement (the same
    draws as :func:`scripts.evaluation.bootstrap_interval` makes); the training patients, the model and its calibration
    are held fixed. ``samples`` counts the draws in which the figure exists; without any, low and high are None. All is
    plain Python.

    Args:
        train: patients the model was trained on: their censoring distribution weights the test patients, their
            Kaplan-Meier curve is the null model.
        test: patients to judge on.
        log_hazard: (N,) of the test patients, normalised.
        calibration: gives survival and cut points where these are not given.
        survival: function of days (D,) that gives (N, D), such as :func:`cross_fitted_survival`.
        cuts: name to cut points, found on training patients.
        horizons_years: for the AUC.
        tau: days up to which Uno's C and the Brier score look; None = the longest horizon within the follow-up of both
            (where there is none, the last observed day within it).
        seed: of the bootstrap.
        samples: its draws.

    Returns:
        - ``about``: patients and events of both sets, follow-up, tau, seed, samples;
        - ``c_index`` (Harrell), ``uno_c_index`` (Uno's, with inverse probability of censoring weights, up to tau);
        - ``auc_<years>y``: cumulative/dynamic AUC, with its number of cases and controls;
        - ``integrated_brier``, ``integrated_brier_null`` (training Kaplan-Meier curve for everybody) and
          ``brier_skill`` = 1 - the first / the second: above 0 is better than knowing nothing of the patient;
        - ``calibration_2y``: ``difference`` (observed - predicted survival, 0 is right), ``slope`` (Cox model of the
          predictions; 1 is right, below 1 too extreme; Wald interval) and ``groups``, observed against predicted;
        - ``risk_groups``: for each way to cut, Kaplan-Meier ``curves`` with numbers at risk, and ``log_rank``.

    Raises:
        ValueError: for arguments that do not belong together.

    Reference:
        Harrell F. E. et al. JAMA 247, 1982. Uno H. et al. Stat. Med. 30, 2011 (C) and J. Am. Stat. Assoc. 102, 2007
        (AUC). Graf E. et al. Stat. Med. 18, 1999 (Brier score). van Houwelingen H. C. Stat. Med. 19, 2000
        (calibration slope).
    """
    risk, test = _scored(log_hazard, test)
    if survival is None and calibration is not None:
        survival = _survival_of(calibration, risk)
    if cuts is None:
        cuts = calibration.cut_points if calibration is not None else {}
    horizons = np.array(sorted(horizons_years), dtype=float) * DAYS_PER_YEAR
    tau = _default_tau(train, test, horizons) if tau is None else float(tau)
    judged = _Judged(train, test, risk, tau, _draws(test.patients, samples, seed), survival)
    figures: dict[str, Any] = {
        "about": _about(judged, seed, samples),
        "c_index": _figure(judged, _harrell),
        "uno_c_index": _figure(judged, _uno),
    }
    for days in horizons:
        figures[f"auc_{days / DAYS_PER_YEAR:g}y"] = _figure(judged, _auc, days)
    for name in ("integrated_brier", "integrated_brier_null", "brier_skill"):
        figures[name] = _figure(judged, _brier, name)
    figures[f"calibration_{CALIBRATION_YEARS:g}y"] = _calibration_figures(judged, cuts)
    figures["risk_groups"] = {name: _group_figures(judged, points) for name, points in cuts.items()}
    return figures


def ensemble_survival(cases: pd.DataFrame, stored: Mapping[str, Any] | None) -> dict[str, Any]:
    """What :func:`survival_metrics` needs of an ensemble's predictions of patients that it has not learnt from.

    Args:
        cases: columns ``log_hazard`` and, for several members, ``log_hazard_fold_<k>``, as ``cases.csv`` has them.
        stored: :meth:`Calibration.to_dict` that the ensemble carries, ``{"reason": why it has none}``, or None.

    Returns:
        ``log_hazard``: the mean of the members' normalised ones, and the ``calibration``; without a calibration the
        mean as it is, and a ``survival`` function that raises :class:`FigureUnavailableError` with the reason.
    """
    if stored is None or "reason" in stored:
        why = "no calibration was stored with the weights" if stored is None else str(stored["reason"])

        def unavailable(days: np.ndarray) -> np.ndarray:
            raise FigureUnavailableError(f"no absolute risk: {why}")

        return {"log_hazard": cases["log_hazard"].to_numpy(), "survival": unavailable}
    calibration = Calibration.from_dict(stored)
    names = [f"{evaluation.FOLD_COLUMN}{k}" for k in range(len(calibration.fold_centres))]
    if len(names) == 1:
        names = ["log_hazard"]
    missing = [name for name in names if name not in cases]
    if missing:
        raise ValueError(f"the table of cases has no column {missing[0]}: evaluate with the ensemble of these folds")
    return {"log_hazard": calibration.normalise(cases[names].to_numpy()).mean(axis=1), "calibration": calibration}


def paired_bootstrap(
    statistic: Callable[[pd.DataFrame], float],
    cases_a: pd.DataFrame,
    cases_b: pd.DataFrame,
    samples: int = evaluation.BOOTSTRAP_SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Difference of a statistic between two models on the same patients.

    Both tables are drawn alike, so that what makes a patient hard for both cancels out.

    Args:
        statistic: function of a table of cases; NaN where it does not exist.
        cases_a: one row a patient, as in ``cases.csv``.
        cases_b: the same patients, in any order where both have a column ``PatientID``.
        samples: number of draws.
        seed: of the draws.

    Returns:
        ``{"value" (A - B), "low", "high", "p", "value_a", "value_b", "patients", "samples"}`` and ``"events"`` where
        the tables have them, or ``{"value": None, "reason", ...}``. ``p`` is two-sided, twice the smaller share of
        draws on either side of 0 (an inversion of the percentile interval), at least 2 / (samples + 1).

    Raises:
        ValueError: where the patients or their labels differ.

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
        return {"value": None, "reason": "the statistic does not exist for these patients", **head}
    found: list[float] = []

    def difference(rows: pd.DataFrame) -> float:
        drawn = rows["row"].to_numpy()
        found.append(statistic(first.iloc[drawn]) - statistic(second.iloc[drawn]))
        return found[-1]

    low, high = evaluation.bootstrap_interval(difference, pd.DataFrame({"row": range(len(first))}), samples, seed)
    differences = np.array(found)
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        return {"value": None, "reason": "the statistic exists in no bootstrap draw", **head}
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
    for label in (keys.TIME, keys.EVENT, keys.HPV):
        if label in first and label in second and not np.allclose(first[label], second[label], equal_nan=True):
            raise ValueError(f"the two tables give patients a different {label}")
    return first, second


@dataclass(frozen=True, eq=False)
class _Judged:
    """Patients to judge on, and all that the figures share. ``draws`` (B, N) counts each patient in each draw."""

    train: Outcomes
    test: Outcomes
    risk: np.ndarray
    tau: float
    draws: np.ndarray
    survival: SurvivalFunction | None

    @property
    def counts(self) -> dict[str, int]:
        return {"patients": self.test.patients, "events": self.test.events}

    def predicted(self, days: np.ndarray) -> np.ndarray:
        """(N, D) predicted survival, checked."""
        if self.survival is None:
            raise FigureUnavailableError("the model gives no absolute risk")
        predicted = np.asarray(self.survival(days), dtype=float)
        if predicted.shape != (self.test.patients, len(days)):
            raise ValueError(f"predicted survival has shape {predicted.shape}, not {(self.test.patients, len(days))}")
        if not ((predicted >= 0) & (predicted <= 1)).all():
            raise ValueError("a predicted survival is not between 0 and 1")
        return predicted


def _survival_of(calibration: Calibration, risk: np.ndarray) -> SurvivalFunction:
    def survival(days: np.ndarray) -> np.ndarray:
        return calibration.survival(risk, days)

    return survival


def _draws(patients: int, samples: int, seed: int) -> np.ndarray:
    """(B, N) how often each patient is in each draw, the draws of ``evaluation.bootstrap_interval``."""
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


def _about(judged: _Judged, seed: int, samples: int) -> dict[str, Any]:
    return {
        **judged.counts,
        "last_day": judged.test.last_day,
        "train_patients": judged.train.patients,
        "train_events": judged.train.events,
        "train_last_day": judged.train.last_day,
        "tau_days": judged.tau,
        "seed": seed,
        "samples": samples,
    }


Computed = tuple[float, np.ndarray | None, dict[str, Any]]  # value, its value in each draw, what else belongs to it


def _figure(judged: _Judged, compute: Callable[..., Computed], *arguments: Any) -> dict[str, Any]:
    """The figure that ``compute`` gives, or the reason why there is none."""
    try:
        if not judged.test.patients:
            raise FigureUnavailableError("no labelled case")
        value, draws, extra = compute(judged, *arguments)
    except (FigureUnavailableError, HorizonError) as reason:
        return {"value": None, "reason": str(reason), **judged.counts}
    if draws is None:  # the interval is not by bootstrap and comes with the rest
        return {"value": float(value), **judged.counts, **extra}
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [0.025, 0.975]).tolist() if len(draws) else (None, None)
    return {"value": float(value), "low": low, "high": high, **judged.counts, "samples": len(draws), **extra}


def _pair_draws(draws: np.ndarray, pairs: np.ndarray, risk: np.ndarray) -> np.ndarray:
    r"""A concordance in each draw, :math:`\sum_{ij} n_i n_j w_{ij} r_{ij} / \sum_{ij} n_i n_j w_{ij}`.

    A draw only changes how often a patient counts, so that all draws are two products of matrices.

    Args:
        draws: (B, N) counts n.
        pairs: (N, N) weights w, 0 where i and j cannot be compared.
        risk: (N,); r is 1 where i has the higher one, 1/2 where both have the same.

    Returns:
        (B,), NaN where a draw has no pair.
    """
    right = (risk[:, None] > risk) + 0.5 * (risk[:, None] == risk)
    comparable = ((draws @ pairs) * draws).sum(axis=1)
    concordant = ((draws @ (pairs * right)) * draws).sum(axis=1)
    return np.divide(concordant, comparable, out=np.full(len(draws), np.nan), where=comparable > 0)


def _comparable(test: Outcomes) -> np.ndarray:
    """(N, N) bool: i relapsed while j was still without (at the same time: j was censored)."""
    later = test.time > test.time[:, None]
    return test.event[:, None] & (later | ((test.time == test.time[:, None]) & ~test.event))


def _harrell(judged: _Judged) -> Computed:
    test = judged.test
    value = concordance_index(test.time, test.event, judged.risk)
    if math.isnan(value):
        raise FigureUnavailableError(f"no comparable pair ({test.events} events)")
    return value, _pair_draws(judged.draws, _comparable(test).astype(float), judged.risk), {}


def _uno(judged: _Judged) -> Computed:
    from torchsurv.metrics.cindex import ConcordanceIndex

    test, tau = judged.test, judged.tau
    if tau > min(judged.train.last_day, test.last_day):
        raise FigureUnavailableError(_beyond(judged, "tau", tau))
    used = test.event & (test.time < tau)
    pairs = _comparable(test)
    if not pairs[used].any():
        raise FigureUnavailableError(f"no comparable pair before tau, day {tau:g} ({int(used.sum())} events)")
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
        raise FigureUnavailableError(f"no relapse up to day {days:g}")
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
        raise FigureUnavailableError("no events" if not judged.test.events else "one patient only")
    _check_horizon(judged, judged.tau)
    days = np.linspace(judged.tau / BRIER_POINTS, judged.tau, BRIER_POINTS)
    extra = {"tau_days": judged.tau}
    if name != "integrated_brier_null":
        value, draws = _integrated_brier(judged, days, judged.predicted(days))
    if name != "integrated_brier":
        fitter = KaplanMeierFitter().fit(judged.train.time, judged.train.event)
        curve = fitter.survival_function_at_times(days).to_numpy()
        null, null_draws = _integrated_brier(judged, days, np.tile(curve, (judged.test.patients, 1)))
    if name == "integrated_brier_null":
        return null, null_draws, extra
    if name == "integrated_brier":
        return value, draws, extra
    if null == 0:
        raise FigureUnavailableError("the Kaplan-Meier null makes no error")
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
    """Raise where nothing can be said about ``days``: nobody followed beyond it, in training or test."""
    if not judged.train.events:
        raise FigureUnavailableError(f"no events among the {judged.train.patients} training patients")
    if days >= min(judged.train.last_day, judged.test.last_day):
        raise FigureUnavailableError(_beyond(judged, "the horizon", days))


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
        raise FigureUnavailableError(f"no events among the {train.patients} training patients")
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


def _calibration_figures(judged: _Judged, cuts: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Observed against predicted survival at two years: on the whole, by a Cox model, and by group."""
    days = CALIBRATION_YEARS * DAYS_PER_YEAR
    difference = _figure(judged, _observed_minus_predicted, days)
    groups = []
    if difference["value"] is not None and "tertiles" in cuts:
        predicted = judged.predicted(np.array([days]))[:, 0]
        for name, members in _members(judged.risk, cuts["tertiles"]):
            groups.append({"group": name, **_observed(judged.test[members], days, predicted[members])})
    return {
        "days": days,
        "difference": difference,
        "slope": _figure(judged, _calibration_slope, days),
        "groups": groups,
    }


def _observed_minus_predicted(judged: _Judged, days: float) -> Computed:
    if days >= judged.test.last_day:
        raise FigureUnavailableError(_beyond(judged, "the horizon", days))
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
        raise FigureUnavailableError("no events")
    if not ((predicted > 0) & (predicted < 1)).all():
        raise FigureUnavailableError("a predicted survival is exactly 0 or 1")
    try:
        slope, error = _cox_slope(np.log(-np.log(predicted)), judged.test)
    except CalibrationError as reason:
        raise FigureUnavailableError(str(reason)) from reason
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


def _group_figures(judged: _Judged, cuts: Sequence[float]) -> dict[str, Any]:
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
    """The p value that the groups relapse alike; it has no interval."""
    from lifelines.statistics import multivariate_logrank_test

    filled = len(np.unique(groups))
    if filled < 2:
        return {"value": None, "reason": f"{filled} of the groups has patients", **judged.counts}
    if not judged.test.events:
        return {"value": None, "reason": "no events", **judged.counts}
    result = multivariate_logrank_test(judged.test.time, groups, judged.test.event)
    if math.isnan(result.p_value):
        return {"value": None, "reason": "nobody is at risk together", **judged.counts}
    return {
        "value": float(result.p_value),
        "statistic": float(result.test_statistic),
        "degrees_of_freedom": filled - 1,
        **judged.counts,
    }


def _number(value: float) -> float | None:
    """Plain, None for NaN: JSON has no word for it."""
    return None if math.isnan(value) else float(value)
