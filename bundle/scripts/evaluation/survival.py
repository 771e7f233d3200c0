"""Absolute risk from a log hazard: calibration, survival, risk groups.

A network's log hazard only ranks patients. :func:`fit_calibration` converts it to recurrence-free survival with a Cox
slope and a Breslow baseline, fitted to out-of-fold log hazards on a common scale. ``time`` is in days, ``event`` True =
relapse, and a higher log hazard means an earlier relapse. Metrics: :mod:`scripts.evaluation.survival_metrics`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

DAYS_PER_YEAR = 365.25
HORIZON_YEARS = (1.0, 2.0, 3.0, 5.0)
MIN_EVENTS = 10  # ten events a fitted coefficient (Peduzzi et al. 1995)
BASELINE_POINTS = 300
QUANTILE_POINTS = 501
GROUP_NAMES = {2: ("low", "high"), 3: ("low", "intermediate", "high")}
NORMAL_95 = 1.959963984540054

SurvivalFunction = Callable[[np.ndarray], np.ndarray]  # days (D,) -> survival (N, D)


class CalibrationError(ValueError):
    """Absolute risk cannot be estimated from these patients, or a stored calibration cannot be read."""


class HorizonError(ValueError):
    """Survival was asked for beyond the training follow-up.

    Attributes:
        last_day: the last day with an estimate.
    """

    def __init__(self, days: float, last_day: float) -> None:
        super().__init__(
            f"survival at day {days:g} ({days / DAYS_PER_YEAR:.2f} years) cannot be given: "
            f"the training follow-up ends at day {last_day:g}, the last usable day"
        )
        self.last_day = last_day


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Follow-up of some patients.

    Args:
        time: (N,) days to the relapse or to the last visit, not negative.
        event: (N,) bool or 0/1, True = relapse.

    Raises:
        ValueError: lengths that differ, a time that is negative, NaN or infinite, an event that is not 0/1.
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
        """Number of patients."""
        return len(self.time)

    @property
    def events(self) -> int:
        """Number of relapses."""
        return int(self.event.sum())

    @property
    def last_day(self) -> float:
        """The longest time; 0 without patients."""
        return float(self.time.max(initial=0.0))

    def __getitem__(self, rows: np.ndarray) -> Outcomes:
        return Outcomes(self.time[rows], self.event[rows])


@dataclass(frozen=True)
class FoldScale:
    """Location and scale of one network's log hazards: networks trained separately have no common zero or unit."""

    centre: float = 0.0  # subtracted from the log hazard
    scale: float = 1.0  # by which it is then divided; above 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.centre) and math.isfinite(self.scale) and self.scale > 0):
            raise CalibrationError(f"a fold with centre {self.centre} and scale {self.scale} cannot be normalised")

    @classmethod
    def of(cls, log_hazard: ArrayLike) -> FoldScale:
        """Mean and standard deviation of one network's log hazards (N,) of the patients it was trained on.

        Raises:
            CalibrationError: where they are all the same, or there are none.
        """
        values = _vector("log_hazard", log_hazard)
        if not len(values):
            raise CalibrationError("a fold has no log hazards: its centre and scale are undefined")
        if np.ptp(values) == 0:
            raise CalibrationError(f"the fold gives all {len(values)} patients the same log hazard")
        return cls(float(values.mean()), float(values.std()))


def normalise_out_of_fold(log_hazard: ArrayLike, folds: ArrayLike, scales: Sequence[FoldScale]) -> np.ndarray:
    r"""Out-of-fold log hazards on one scale, so that they can be pooled.

    .. math:: z_i = (h_i - c_{k(i)}) / s_{k(i)}

    Args:
        log_hazard: (N,) each from the network that was not trained on the patient.
        folds: (N,) number k of that network, in the order of ``scales``.
        scales: of each network, from the patients it was trained on (:meth:`FoldScale.of`), not from those it is
            tested on.

    Returns:
        (N,) float64.

    Raises:
        ValueError: a fold without a scale, or lengths that differ.

    Example:
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
    """Recurrence-free survival by an ensemble, and its range over the folds.

    ``low`` and ``high`` are the smallest and the largest value of any fold. This is not a confidence interval; with one
    fold both equal the estimate.
    """

    days: np.ndarray  # (D,) horizons
    survival: np.ndarray  # (..., D) at the mean of the folds' normalised log hazards
    low: np.ndarray  # (..., D) of the fold with the highest log hazard
    high: np.ndarray  # (..., D) of the fold with the lowest
    log_hazard: np.ndarray  # (...,) the mean of the folds' normalised log hazards


@dataclass(frozen=True)
class Calibration:
    r"""Recurrence-free survival as a function of a normalised log hazard z.

    .. math:: S(t | z) = \exp(-H_0(t) \exp(\beta z))

    Made by :func:`fit_calibration`; stored with the weights.

    Attributes:
        slope: beta, not negative.
        fitted_slope: beta before that limit.
        slope_error: its standard error.
        fold_centres: (K,) subtracted from the log hazard of each member of the ensemble.
        fold_scales: (K,) by which it is then divided.
        baseline_days: (T,) increasing days with a relapse.
        baseline_hazard: (T,) H_0 from that day on.
        baseline_at_risk: (T,) patients still followed on that day.
        last_day: longest follow-up; there is no estimate beyond it.
        quantiles: sorted normalised log hazards of the training patients (all, or evenly spaced quantiles of them).
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
        """Lists, numbers and strings only, for ``torch.load(weights_only=True)`` and JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Calibration:
        """The inverse of :meth:`to_dict`.

        Raises:
            CalibrationError: names that are missing or unknown, or lists of different lengths.
        """
        names = {item.name for item in fields(cls)}
        if set(stored) != names:
            differences = (("without", names - set(stored)), ("with unknown", set(stored) - names))
            wrong = [f"{how} {sorted(which)}" for how, which in differences if which]
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
        """A warning to show beside the absolute risk where it may not depend on the patient; else empty."""
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

    def at_risk(self, day: float) -> int | None:
        """Training patients that are still followed on the first day of a relapse at or after ``day``.

        So many are at risk on ``day`` at least. None after the last of these days.
        """
        later = np.flatnonzero(np.asarray(self.baseline_days) >= day)
        return int(self.baseline_at_risk[later[0]]) if len(later) else None

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
        """Probability of no relapse until ``days``.

        Args:
            log_hazard: any shape S, normalised (:meth:`normalise`).
            days: any shape D, from 0 to ``last_day``.

        Returns:
            Of shape S + D.

        Raises:
            HorizonError: a day beyond the training follow-up; nothing is extrapolated.
            ValueError: a negative day, or a number that is not finite.
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

    def survival_interval(self, fold_log_hazards: ArrayLike, days: ArrayLike) -> SurvivalInterval:
        """Survival by the whole ensemble, with the range over its members.

        The slope was fitted to single networks. The mean of several varies less between patients, so its survival is
        slightly too close to the average.

        Args:
            fold_log_hazards: (..., K) of the members, not normalised.
            days: (D,) from 0 to ``last_day``.

        Raises:
            HorizonError: a day beyond the training follow-up.
            ValueError: as :meth:`normalise` and :meth:`survival`.
        """
        risk = self.normalise(fold_log_hazards)
        mean = risk.mean(axis=-1)
        days = np.asarray(days, dtype=float)
        survival, low, high = (self.survival(z, days) for z in (mean, risk.max(axis=-1), risk.min(axis=-1)))
        return SurvivalInterval(days, survival, low, high, mean)

    def percentile(self, log_hazard: ArrayLike) -> np.ndarray:
        """Share of the training patients with a lower (out-of-fold) log hazard, in percent; equal ones count half."""
        lower = np.searchsorted(self.quantiles, log_hazard, side="left")
        not_higher = np.searchsorted(self.quantiles, log_hazard, side="right")
        return 50.0 * (lower + not_higher) / len(self.quantiles)


def fit_calibration(
    log_hazard: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    scales: Sequence[FoldScale] = (FoldScale(),),
) -> Calibration:
    r"""Cox slope and Breslow baseline of pooled out-of-fold log hazards.

    The slope maximises Cox's partial likelihood (lifelines; Efron's for ties) and is at least 0: where the log hazard
    orders relapses the wrong way, every patient gets the average curve. The baseline is

    .. math:: H_0(t) = \sum_{t_i \le t} d_i / \sum_{j: t_j \ge t_i} \exp(\beta z_j)

    Args:
        log_hazard: (N,) of :func:`normalise_out_of_fold`.
        time: (N,) days.
        event: (N,) bool or 0/1.
        scales: used for normalising, in the order of the ensemble's members.

    Raises:
        CalibrationError: too few relapses, log hazards that are all the same or that separate the relapses completely,
            so that no finite slope exists.
        ValueError: values that are no times or events.
    """
    outcomes = Outcomes(np.asarray(time), np.asarray(event))
    risk = checked_risk(log_hazard, outcomes)
    if outcomes.events < MIN_EVENTS:
        raise CalibrationError(
            f"{outcomes.events} relapse{'s' * (outcomes.events != 1)} among {outcomes.patients} patients: "
            f"absolute risk needs {MIN_EVENTS}"
        )
    fitted_slope, error = cox_slope(risk, outcomes)
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


def cut_points(log_hazard: ArrayLike) -> dict[str, list[float]]:
    """Limits of the risk groups: the median, and the tertiles, of these (training) log hazards."""
    values = _vector("log_hazard", log_hazard)
    return {"median": [float(np.median(values))], "tertiles": np.quantile(values, [1 / 3, 2 / 3]).tolist()}


def risk_groups(log_hazard: ArrayLike, cuts: Sequence[float]) -> np.ndarray:
    """Number of the risk group, 0 the lowest; a log hazard equal to a cut point belongs to the lower group.

    Example:
        >>> risk_groups([-2.0, 0.0, 0.1], cuts=[0.0])
        array([0, 0, 1])
    """
    return np.searchsorted(np.asarray(cuts, dtype=float), np.asarray(log_hazard, dtype=float), side="left")


def group_names(groups: int) -> tuple[str, ...]:
    """Names of the risk groups, lowest risk first.

    Example:
        >>> group_names(3)
        ('low', 'intermediate', 'high')
    """
    return GROUP_NAMES.get(groups, tuple(f"{k + 1} of {groups}" for k in range(groups)))


def cox_slope(covariate: np.ndarray, outcomes: Outcomes) -> tuple[float, float]:
    """Coefficient of a Cox model of one covariate and its standard error.

    Raises:
        CalibrationError: no finite one exists.
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
    """Rows of the baseline to keep: evenly spaced in survival, and those of the horizons."""
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
        raise ValueError(f"{name} has shape {vector.shape}; one value for each patient is needed")
    if not np.isfinite(vector).all():
        raise ValueError(f"{int((~np.isfinite(vector)).sum())} of {len(vector)} values of {name} are not finite")
    return vector


def checked_risk(log_hazard: ArrayLike, outcomes: Outcomes) -> np.ndarray:
    """(N,) float64 log hazards.

    Raises:
        ValueError: a log hazard that is not finite, or another number of patients than in ``outcomes``.
    """
    risk = _vector("log_hazard", log_hazard)
    if len(risk) != outcomes.patients:
        raise ValueError(f"{len(risk)} log hazards but {outcomes.patients} outcomes")
    return risk
