"""Absolute risk, against the truth of simulated patients, lifelines and scikit-survival."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter, KaplanMeierFitter
from simulated_patients import HORIZON_DAYS, RATE, fitted, simulate
from sksurv.linear_model.coxph import BreslowEstimator

from scripts.evaluation.survival import (
    BASELINE_POINTS,
    Calibration,
    CalibrationError,
    FoldScale,
    HorizonError,
    cut_points,
    fit_calibration,
    normalise_out_of_fold,
    risk_groups,
)
from scripts.model.ensemble import plain_copy


def test_survival_of_simulated_patients_is_the_truth() -> None:
    """Three folds that each see the risk on their own scale; 20,000 patients."""
    risk, outcomes = simulate(20_000)
    folds = np.arange(len(risk)) % 3
    shift, stretch = np.array([3.0, -20.0, 0.0]), np.array([1.0, 0.1, 7.0])
    raw = shift[folds] + stretch[folds] * risk
    scales = [FoldScale.of(shift[k] + stretch[k] * risk[folds != k]) for k in range(3)]
    pooled = normalise_out_of_fold(raw, folds, scales)
    calibration = fit_calibration(pooled, outcomes.time, outcomes.event, scales)

    for z in (-1.5, 0.0, 1.5):
        truth = np.exp(-RATE * HORIZON_DAYS * np.exp(0.8 * z))
        interval = calibration.survival_interval(shift + stretch * z, HORIZON_DAYS)
        np.testing.assert_allclose(interval.survival, truth, atol=0.012)
        assert (interval.low <= interval.survival).all()
        assert (interval.survival <= interval.high).all()
        assert (interval.high - interval.low < 0.02).all()  # the folds mean the same patient
    assert calibration.doubt == ""
    assert calibration.slope == pytest.approx(0.8, abs=3 * calibration.slope_error)


@pytest.mark.parametrize("whole_days", [pytest.param(True, id="ties"), pytest.param(False, id="no_ties")])
def test_slope_and_baseline_are_those_of_lifelines(whole_days: bool) -> None:
    calibration, risk, outcomes = fitted(250, censor_days=1500.0, whole_days=whole_days)
    table = pd.DataFrame({"z": risk, "time": outcomes.time, "event": outcomes.event})
    model = CoxPHFitter().fit(table, "time", "event")
    assert (len(np.unique(outcomes.time)) < len(risk)) == whole_days
    assert calibration.fitted_slope == pytest.approx(model.params_["z"], rel=1e-5)
    assert calibration.slope_error == pytest.approx(model.standard_errors_["z"], rel=1e-5)
    days = np.unique(outcomes.time)  # between them lifelines draws lines, not steps
    expected = model.predict_survival_function(pd.DataFrame({"z": [-1.0, 2.0]}), times=days).T.to_numpy()
    np.testing.assert_allclose(calibration.survival([-1.0, 2.0], days), expected, atol=1e-6)


def test_baseline_is_that_of_scikit_survival() -> None:
    calibration, risk, outcomes = fitted(250)
    oracle = BreslowEstimator().fit(calibration.slope * risk, outcomes.event, outcomes.time)
    hazard = oracle.cum_baseline_hazard_
    expected = [hazard(day) for day in calibration.baseline_days]
    np.testing.assert_allclose(calibration.baseline_hazard, expected, rtol=1e-10)
    assert calibration.baseline_at_risk[0] == (outcomes.time >= calibration.baseline_days[0]).sum()


def test_the_number_at_risk_is_that_of_the_next_relapse() -> None:
    calibration, _, outcomes = fitted(250)
    for day in (0.0, 365.25, 730.5, float(calibration.baseline_days[-1])):
        at_risk = calibration.at_risk(day)
        after = min(relapse for relapse in calibration.baseline_days if relapse >= day)
        assert at_risk == (outcomes.time >= after).sum()
        assert at_risk <= (outcomes.time >= day).sum()
    assert calibration.at_risk(calibration.baseline_days[-1] + 1) is None


def test_a_long_baseline_is_thinned_but_exact_at_the_horizons() -> None:
    calibration, risk, outcomes = fitted(2500, whole_days=False)
    oracle = BreslowEstimator().fit(calibration.slope * risk, outcomes.event, outcomes.time)
    assert outcomes.events > 2 * BASELINE_POINTS
    assert len(calibration.baseline_days) <= BASELINE_POINTS
    exact = oracle.get_survival_function(np.array([calibration.slope * 0.3]))[0]
    np.testing.assert_allclose(
        calibration.survival(0.3, HORIZON_DAYS), [exact(day) for day in HORIZON_DAYS], rtol=1e-10
    )
    days = np.linspace(calibration.baseline_days[0], calibration.last_day, 500)
    np.testing.assert_allclose(calibration.survival(0.3, days), [exact(day) for day in days], atol=0.005)


def test_without_any_effect_survival_is_the_kaplan_meier_curve() -> None:
    """A log hazard that orders relapses the wrong way says nothing: everybody gets the average curve."""
    risk, outcomes = simulate(300)
    calibration = fit_calibration(-risk, outcomes.time, outcomes.event)
    assert calibration.slope == 0
    assert calibration.fitted_slope < -0.4
    assert "beyond chance" in calibration.doubt
    average = KaplanMeierFitter().fit(outcomes.time, outcomes.event).survival_function_at_times(HORIZON_DAYS)
    survival = calibration.survival([-3.0, 3.0], HORIZON_DAYS)
    np.testing.assert_array_equal(survival[0], survival[1])
    np.testing.assert_allclose(survival[0], average, atol=0.01)


def test_calibration_survives_storage(tmp_path) -> None:
    calibration = fitted(60, censor_days=3000.0)[0]
    torch.save(plain_copy({"calibration": calibration.to_dict()}, "provenance"), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)["calibration"]
    assert Calibration.from_dict(loaded) == calibration
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
    assert Calibration.from_dict(calibration.to_dict()).survival(0.4, 700) == calibration.survival(0.4, 700)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"slope": None}, r"without \['slope'\]", id="missing"),
        pytest.param({"novel": 1}, r"unknown \['novel'\]", id="unknown"),
        pytest.param({"baseline_days": [3.0, 1.0]}, "not a rising curve", id="other_length"),
        pytest.param({"fold_scales": [1.0, 2.0]}, "differ in length", id="folds"),
    ],
)
def test_a_stored_calibration_that_is_none_is_refused(change: dict, message: str) -> None:
    stored = {**fitted(60)[0].to_dict(), **change}
    with pytest.raises(CalibrationError, match=message):
        Calibration.from_dict({key: value for key, value in stored.items() if value is not None})


@pytest.mark.parametrize("ask", ["survival", "survival_interval"])
def test_a_horizon_beyond_follow_up_is_refused_and_names_the_last_day(ask: str) -> None:
    calibration = fitted(200, censor_days=1200.0)[0]
    method, risk = getattr(calibration, ask), [0.0]
    with pytest.raises(HorizonError, match=f"day 1826.25 .5.00 years.*ends at day {calibration.last_day:g}") as caught:
        method(risk, HORIZON_DAYS)
    assert caught.value.last_day == calibration.last_day
    assert calibration.usable(HORIZON_DAYS).tolist() == [True, True, True, False]
    assert np.isfinite(calibration.survival(risk, calibration.last_day)).all()


@pytest.mark.parametrize(
    ("risk", "days", "message"),
    [
        pytest.param(0.0, -1.0, "not negative", id="negative_day"),
        pytest.param(0.0, math.nan, "finite", id="nan_day"),
        pytest.param(math.nan, 1.0, "log hazard is not finite", id="nan_log_hazard"),
    ],
)
def test_survival_of_nonsense_is_refused(risk: float, days: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(60)[0].survival(risk, days)


def test_survival_has_the_shape_of_both_and_stays_in_its_bounds() -> None:
    calibration = fitted(100)[0]
    survival = calibration.survival(np.array([[-2000.0, 0.0, 2000.0]]), HORIZON_DAYS)
    assert survival.shape == (1, 3, 4)
    assert survival[0, 0].tolist() == [1.0] * 4
    assert survival[0, 2].tolist() == [0.0] * 4
    assert (np.diff(survival[0, 1]) < 0).all()
    assert calibration.survival(2000.0, 0) == 1


def test_interval_is_the_range_of_the_folds() -> None:
    risk, outcomes = simulate(300)
    scales = [FoldScale(1.0, 2.0), FoldScale(0.0, 1.0)]
    calibration = fit_calibration(risk, outcomes.time, outcomes.event, scales)
    interval = calibration.survival_interval([[2.0, -0.5], [1.0, 0.0]], [365.25, 730.5])
    np.testing.assert_allclose(interval.log_hazard, [0.0, 0.0])
    np.testing.assert_allclose(interval.low[0], calibration.survival(0.5, [365.25, 730.5]))
    np.testing.assert_allclose(interval.high[0], calibration.survival(-0.5, [365.25, 730.5]))
    np.testing.assert_allclose(interval.low[1], interval.high[1])
    with pytest.raises(ValueError, match="but 2 folds were calibrated"):
        calibration.survival_interval([1.0, 2.0, 3.0], [365.25])


def test_percentile_counts_the_training_patients_below() -> None:
    calibration = dataclasses.replace(fitted(60)[0], quantiles=[-1.0, 0.0, 0.0, 2.0])
    assert calibration.percentile([-5.0, -1.0, 0.0, 1.0, 9.0]).tolist() == [0.0, 12.5, 50.0, 75.0, 100.0]


def test_percentile_of_a_large_cohort_is_that_of_its_quantiles() -> None:
    calibration, risk, _ = fitted(2500)
    assert len(calibration.quantiles) == 501
    for z in (-2.0, -0.3, 0.0, 1.7):
        assert calibration.percentile(z) == pytest.approx(100 * (risk < z).mean(), abs=0.25)


def test_cut_points_make_groups_of_one_size() -> None:
    risk, _ = simulate(600)
    cuts = cut_points(risk)
    assert np.bincount(risk_groups(risk, cuts["median"])).tolist() == [300, 300]
    assert np.bincount(risk_groups(risk, cuts["tertiles"])).tolist() == [200, 200, 200]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"event": np.zeros(40)}, "0 relapses among 40 patients: absolute risk needs 10", id="no_events"),
        pytest.param({"event": np.arange(40) < 9}, "9 relapses among 40", id="too_few"),
        pytest.param({"event": np.arange(40) < 1}, "1 relapse among 40 patients", id="one_event"),
        pytest.param({"log_hazard": np.full(40, 0.3)}, "same log hazard", id="constant"),
        pytest.param({"log_hazard": -np.arange(40.0)}, "no finite Cox slope", id="perfect_order"),
        pytest.param({"log_hazard": np.arange(39.0)}, "39 log hazards but 40 outcomes", id="lengths"),
        pytest.param({"log_hazard": np.full(40, np.nan)}, "40 of 40 values of log_hazard are not finite", id="nan"),
        pytest.param({"time": -np.arange(40.0)}, "days are not negative", id="negative_time"),
        pytest.param({"event": np.full(40, 0.5)}, "other than 0 and 1", id="half_an_event"),
    ],
)
def test_what_cannot_be_calibrated_says_why(change: dict, message: str) -> None:
    rng = np.random.default_rng(0)
    data = {"log_hazard": rng.normal(size=40), "time": np.arange(40.0) + 1, "event": np.ones(40)}
    with pytest.raises(ValueError, match=message):
        fit_calibration(**{**data, **change})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: FoldScale.of([1.0, 1.0]), "all 2 patients the same", id="collapsed_fold"),
        pytest.param(lambda: FoldScale.of([]), "no log hazards", id="empty_fold"),
        pytest.param(lambda: FoldScale(0.0, 0.0), "cannot be normalised", id="scale_zero"),
        pytest.param(lambda: normalise_out_of_fold([1.0], [1], [FoldScale()]), r"folds \[1\] have no", id="unknown"),
        pytest.param(lambda: normalise_out_of_fold([1.0], [0, 0], [FoldScale()]), "1 log hazards but 2", id="lengths"),
    ],
)
def test_folds_that_cannot_be_normalised_say_why(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
