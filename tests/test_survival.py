"""Absolute risk and its evidence, against the truth of simulated patients, lifelines and scikit-survival."""

from __future__ import annotations

import dataclasses
import json
import math
import time as clock
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.statistics import logrank_test
from sksurv.linear_model.coxph import BreslowEstimator
from sksurv.metrics import concordance_index_ipcw, cumulative_dynamic_auc, integrated_brier_score
from sksurv.util import Surv

from scripts.ensemble import plain_copy
from scripts.evaluation import bootstrap_interval, c_index
from scripts.survival import (
    BASELINE_POINTS,
    DAYS_PER_YEAR,
    HORIZON_YEARS,
    Calibration,
    CalibrationError,
    FoldScale,
    HorizonError,
    Outcomes,
    cross_fitted_survival,
    cut_points,
    fit_calibration,
    normalise_out_of_fold,
    paired_bootstrap,
    risk_groups,
    survival_metrics,
)

HORIZON_DAYS = np.array(HORIZON_YEARS) * DAYS_PER_YEAR
RATE = 1 / 2500  # relapses a day at log hazard 0


def simulate(
    patients: int, seed: int = 0, slope: float = 0.8, censor_days: float = 4000.0, whole_days: bool = True
) -> tuple[np.ndarray, Outcomes]:
    """Log hazards z, and exponential times with hazard RATE * exp(slope * z), censored evenly until ``censor_days``."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=patients)
    relapse = rng.exponential(1 / (RATE * np.exp(slope * risk)))
    censored = rng.uniform(100, censor_days, patients)
    time = np.minimum(relapse, censored)
    # Single precision, as a label has by the time it is evaluated; whole days have ties.
    time = np.ceil(time) if whole_days else time.astype(np.float32).astype(float)
    return risk, Outcomes(time, relapse <= censored)


def fitted(patients: int = 400, seed: int = 0, **options: Any) -> tuple[Calibration, np.ndarray, Outcomes]:
    risk, outcomes = simulate(patients, seed, **options)
    return fit_calibration(risk, outcomes.time, outcomes.event), risk, outcomes


def structured(outcomes: Outcomes) -> np.ndarray:
    return Surv.from_arrays(outcomes.event, outcomes.time)


# --- absolute risk ----------------------------------------------------------------------------------------------------


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


def test_survival_curve_goes_from_one_to_the_end_of_follow_up() -> None:
    calibration = fitted(100)[0]
    days, survival = calibration.survival_curve([0.0, 1.0])
    assert (days[0], days[-1]) == (0.0, calibration.last_day)
    assert survival.shape == (2, len(days))
    assert survival[:, 0].tolist() == [1.0, 1.0]
    assert (np.diff(survival) <= 0).all()
    assert (survival[1, 1:] < survival[0, 1:]).all()


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


def test_centring_leaves_the_unit() -> None:
    assert FoldScale.of([1.0, 3.0], centre_only=True) == FoldScale(2.0, 1.0)


def test_cross_fitted_survival_is_that_of_the_other_folds() -> None:
    risk, outcomes = simulate(150)
    folds = np.arange(150) % 3
    days = np.array([365.25, 730.5])
    survival = cross_fitted_survival(risk, folds, outcomes)(days)
    others = folds != 1
    calibration = fit_calibration(risk[others], outcomes.time[others], outcomes.event[others])
    np.testing.assert_array_equal(survival[~others], calibration.survival(risk[~others], days))
    with pytest.raises(CalibrationError, match=r"calibration of fold 0 by the other folds: .* needs 1000"):
        cross_fitted_survival(risk, folds, outcomes, min_events=1000)


# --- evidence ---------------------------------------------------------------------------------------------------------

COHORTS = [
    pytest.param({"whole_days": False}, id="no_ties"),
    pytest.param({"censor_days": 2500.0}, id="ties"),
    pytest.param({"censor_days": 900.0}, id="heavy_censoring"),
]


@pytest.mark.parametrize("options", COHORTS)
def test_figures_are_those_of_scikit_survival(options: dict) -> None:
    calibration, _, train = fitted(300, 1, **options)
    risk, test = simulate(120, 2, **options)
    risk = np.round(risk, 1)  # tied risks too
    figures = survival_metrics(train, test, risk, calibration, samples=5)
    tau = figures["about"]["tau_days"]
    expected = concordance_index_ipcw(structured(train), structured(test), risk, tau=tau)[0]
    assert figures["uno_c_index"]["value"] == pytest.approx(expected, abs=1e-5)
    for years in HORIZON_YEARS:
        figure = figures[f"auc_{years:g}y"]
        if years * DAYS_PER_YEAR >= min(train.last_day, test.last_day):
            assert figure["value"] is None
            continue
        expected = cumulative_dynamic_auc(structured(train), structured(test), risk, [figure["days"]])[0][0]
        assert figure["value"] == pytest.approx(expected, abs=1e-5)
    days = np.linspace(tau / 100, tau, 100)
    whole = _integrated_brier(train, test, calibration.survival(risk, days), days)
    assert figures["integrated_brier"]["value"] == pytest.approx(whole, abs=1e-5)
    null = KaplanMeierFitter().fit(train.time, train.event).survival_function_at_times(days).to_numpy()
    whole = _integrated_brier(train, test, np.tile(null, (len(risk), 1)), days)
    assert figures["integrated_brier_null"]["value"] == pytest.approx(whole, abs=1e-5)
    skill = 1 - figures["integrated_brier"]["value"] / figures["integrated_brier_null"]["value"]
    assert figures["brier_skill"]["value"] == pytest.approx(skill)


def _integrated_brier(train: Outcomes, test: Outcomes, survival: np.ndarray, days: np.ndarray) -> float:
    """By scikit-survival, which wants all days to be between the first and the last time of the test patients.

    One that relapses at day 0 and is surely predicted to (no error) makes room, and is taken out of the mean.
    """
    early = Outcomes(np.append(test.time, 0.0), np.append(test.event, True))
    survival = np.vstack([survival, np.zeros(len(days))])
    score = integrated_brier_score(structured(train), structured(early), survival, days)
    return score * early.patients / test.patients


def test_curves_groups_and_log_rank_are_those_of_lifelines() -> None:
    calibration, _, train = fitted(300, 1)
    risk, test = simulate(150, 2)
    figures = survival_metrics(train, test, risk, calibration, samples=5)["risk_groups"]["median"]
    high = risk > calibration.cut_points["median"][0]
    expected = logrank_test(test.time[high], test.time[~high], test.event[high], test.event[~high])
    assert figures["log_rank"]["value"] == pytest.approx(expected.p_value)
    assert figures["log_rank"]["statistic"] == pytest.approx(expected.test_statistic)
    for curve, members in zip(figures["curves"], (~high, high), strict=True):
        kaplan_meier = KaplanMeierFitter().fit(test.time[members], test.event[members])
        assert (curve["patients"], curve["events"]) == (members.sum(), test.event[members].sum())
        grid = np.linspace(0, test.time[members].max(), 200)
        step = np.searchsorted(curve["days"], grid, side="right") - 1
        np.testing.assert_allclose(
            np.array(curve["survival"])[step], kaplan_meier.survival_function_at_times(grid), rtol=1e-12
        )
        assert curve["at_risk"] == [(test.time[members] >= day).sum() for day in figures["at_risk_days"]]
        assert all(low <= s <= up for low, s, up in zip(curve["low"], curve["survival"], curve["high"], strict=True))
        assert len(curve["censored_days"]) == curve["patients"] - curve["events"]
    assert [curve["group"] for curve in figures["curves"]] == ["low", "high"]


def test_calibration_figures_of_a_right_and_of_an_extreme_model() -> None:
    calibration, _, train = fitted(1000, 1)
    risk, test = simulate(700, 2)
    right = survival_metrics(train, test, risk, calibration, samples=50)["calibration_2y"]
    assert right["difference"]["low"] < 0 < right["difference"]["high"]
    assert right["slope"]["low"] < 1 < right["slope"]["high"]
    for group in right["groups"]:
        assert group["low"] < group["predicted"] < group["high"]
    assert sum(group["patients"] for group in right["groups"]) == 700
    extreme = survival_metrics(train, test, 2 * risk, calibration, samples=50)["calibration_2y"]
    assert extreme["slope"]["value"] == pytest.approx(right["slope"]["value"] / 2)
    assert extreme["slope"]["high"] < 0.7
    assert extreme["groups"][2]["predicted"] < extreme["groups"][2]["low"]


def test_observed_survival_and_its_draws_are_kaplan_meier_curves() -> None:
    """The draws of the observed - predicted difference, one by one, by lifelines."""
    calibration, _, train = fitted(300, 1)
    risk, test = simulate(60, 2, censor_days=2500.0)
    figure = survival_metrics(train, test, risk, calibration, samples=30, seed=3)["calibration_2y"]["difference"]
    table = pd.DataFrame({"time": test.time, "event": test.event, "p": calibration.survival(risk, 730.5)})

    def difference(cases: pd.DataFrame) -> float:
        kaplan_meier = KaplanMeierFitter().fit(cases["time"], cases["event"])
        return float(kaplan_meier.survival_function_at_times(730.5).iloc[0] - cases["p"].mean())

    assert figure["value"] == pytest.approx(difference(table))
    assert (figure["low"], figure["high"]) == pytest.approx(bootstrap_interval(difference, table, 30, seed=3))
    assert figure["observed"] - figure["predicted"] == pytest.approx(figure["value"])


@pytest.mark.parametrize("options", COHORTS)
def test_intervals_are_those_of_drawing_patients_one_by_one(options: dict) -> None:
    """Harrell's, Uno's and AUC by their own libraries on every draw."""
    calibration, _, train = fitted(200, 1, **options)
    risk, test = simulate(60, 2, **options)
    risk = np.round(risk, 1)
    figures = survival_metrics(train, test, risk, calibration, samples=25, seed=5)
    tau = figures["about"]["tau_days"]
    table = pd.DataFrame({"time": test.time, "event": test.event, "log_hazard": risk})

    def uno(cases: pd.DataFrame) -> float:
        drawn = Surv.from_dataframe("event", "time", cases)
        return concordance_index_ipcw(structured(train), drawn, cases["log_hazard"].to_numpy(), tau=tau)[0]

    def auc(cases: pd.DataFrame) -> float:
        drawn = Surv.from_dataframe("event", "time", cases)
        return cumulative_dynamic_auc(structured(train), drawn, cases["log_hazard"].to_numpy(), [DAYS_PER_YEAR])[0][0]

    for name, statistic in (("c_index", c_index), ("uno_c_index", uno), ("auc_1y", auc)):
        figure = figures[name]
        low, high = bootstrap_interval(statistic, table, 25, seed=5)
        assert (figure["low"], figure["high"]) == pytest.approx((low, high), abs=1e-5), name
        assert figure["samples"] == 25


def test_good_predictions_show_and_chance_shows_too() -> None:
    calibration, _, train = fitted(1000, 1)
    risk, test = simulate(600, 2)
    good = survival_metrics(train, test, risk, calibration, samples=100)
    noise = np.random.default_rng(0).normal(size=600)
    chance = survival_metrics(train, test, noise, calibration, samples=100)
    for name in ("c_index", "uno_c_index", "auc_1y", "auc_2y", "auc_5y"):
        assert good[name]["low"] > 0.6, name
        assert chance[name]["low"] < 0.5 < chance[name]["high"], name
    assert good["brier_skill"]["low"] > 0.02
    assert chance["brier_skill"]["value"] < 0
    assert good["risk_groups"]["tertiles"]["log_rank"]["value"] < 1e-6
    assert chance["risk_groups"]["tertiles"]["log_rank"]["value"] > 1e-3


def every_figure(figures: Any) -> list[dict]:
    """All dicts of a nested result that are figures."""
    if isinstance(figures, list):
        return [item for part in figures for item in every_figure(part)]
    if not isinstance(figures, dict):
        return []
    return [figures] if "value" in figures else [item for part in figures.values() for item in every_figure(part)]


TWO_PATIENTS = Outcomes(np.array([300.0, 900.0]), np.array([True, False]))
NOBODY = Outcomes(np.array([]), np.array([]))


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        pytest.param(
            {"test": Outcomes(np.arange(1.0, 91.0) * 30, np.zeros(90))},
            {
                "c_index": r"no comparable pair \(0 events\)",
                "uno_c_index": "no comparable pair before tau",
                "auc_2y": "no relapse up to day 730.5",
                "integrated_brier": "no events",
                "calibration_2y.slope": "no events",
                "risk_groups.tertiles.log_rank": "no events",
            },
            id="no_events",
        ),
        pytest.param(
            {"test": NOBODY, "risk": np.array([])},
            {
                "c_index": "no labelled case",
                "auc_1y": "no labelled case",
                "brier_skill": "no labelled case",
                "calibration_2y.difference": "no labelled case",
                "risk_groups.median.log_rank": "0 of the groups has patients",
            },
            id="no_patients",
        ),
        pytest.param(
            {"test": Outcomes(np.array([1500.0]), np.array([True])), "risk": np.zeros(1)},
            {
                "c_index": "no comparable pair",
                "auc_1y": "no relapse up to day 365.25",
                "integrated_brier": "one patient only",
                "calibration_2y.slope": "all 1 patients have the same",
            },
            id="one_patient",
        ),
        pytest.param(
            {"train": Outcomes(np.arange(1.0, 41.0) * 10, np.arange(40) % 2)},
            {
                "auc_2y": "the horizon, day 730.5, is not within the training follow-up, which ends at day 400",
                "auc_5y": "training follow-up",
            },
            id="short_training",
        ),
        pytest.param(
            {"test": TWO_PATIENTS, "risk": np.array([1.0, 0.0])},
            {"auc_3y": "day 1095.75, is not within the follow-up of these patients, which ends at day 900"},
            id="short_test",
        ),
        pytest.param(
            {"tau": 9000.0},
            {"uno_c_index": "tau, day 9000, is not within", "integrated_brier": "day 9000, is not within"},
            id="tau_beyond",
        ),
        pytest.param(
            {"train": Outcomes(np.arange(1.0, 41.0) * 100, np.zeros(40))},
            {
                "uno_c_index": "no events among the 40 training patients",
                "auc_1y": "no events among the 40 training patients",
                "integrated_brier_null": "no events among the 40 training patients",
            },
            id="no_training_events",
        ),
        pytest.param(
            {"calibration": None},
            {
                "integrated_brier": "the model gives no absolute risk",
                "brier_skill": "the model gives no absolute risk",
                "calibration_2y.difference": "the model gives no absolute risk",
                "calibration_2y.slope": "the model gives no absolute risk",
            },
            id="no_calibration",
        ),
        pytest.param(
            {"risk": np.full(90, -8.0)},
            {
                "risk_groups.median.log_rank": "1 of the groups has patients",
                "calibration_2y.groups.2": "no patients in this group",
            },
            id="one_group",
        ),
        pytest.param(
            {"calibration": fitted(200, censor_days=600.0)[0]},
            {"calibration_2y.difference": "survival at day 730.5 .* cannot be given", "brier_skill": "last usable day"},
            id="calibration_short",
        ),
    ],
)
def test_a_figure_that_cannot_be_had_says_why(change: dict, reasons: dict[str, str]) -> None:
    calibration, _, train = fitted(200, 1)
    risk, test = simulate(90, 2)
    given: dict[str, Any] = {"train": train, "test": test, "risk": risk, "calibration": calibration, "tau": None}
    given.update(change)
    if given["test"].patients != len(given["risk"]):
        given["risk"] = given["risk"][: given["test"].patients]
    figures = survival_metrics(
        given["train"], given["test"], given["risk"], given["calibration"], tau=given["tau"], samples=10
    )
    for path, reason in reasons.items():
        figure: Any = figures
        for step in path.split("."):
            figure = figure[int(step)] if isinstance(figure, list) else figure[step]
        assert figure["value"] is None, path
        assert pd.Series([figure["reason"]]).str.contains(reason).all(), f"{path}: {figure['reason']}"
    for figure in every_figure(figures):
        assert {"patients", "events"} <= set(figure)
        assert ("reason" in figure) == (figure["value"] is None)
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize(
    ("survival", "message"),
    [
        pytest.param(lambda days: np.zeros((3, len(days))), r"shape \(3, .*\), not \(90", id="shape"),
        pytest.param(lambda days: np.full((90, len(days)), 1.5), "not between 0 and 1", id="no_probability"),
    ],
)
def test_survival_that_is_none_is_an_error(survival, message: str) -> None:
    risk, test = simulate(90)
    with pytest.raises(ValueError, match=message):
        survival_metrics(test, test, risk, survival=survival, samples=5)


def test_out_of_fold_survival_is_judged_like_a_calibration() -> None:
    risk, outcomes = simulate(150)
    survival = cross_fitted_survival(risk, np.arange(150) % 3, outcomes)
    figures = survival_metrics(outcomes, outcomes, risk, survival=survival, cuts=cut_points(risk), samples=20)
    assert figures["brier_skill"]["value"] > 0
    assert set(figures["risk_groups"]) == {"median", "tertiles"}
    assert len(figures["calibration_2y"]["groups"]) == 3


def test_a_short_cohort_gets_a_tau_of_its_own() -> None:
    calibration, _, train = fitted(200, 1, censor_days=350.0)
    risk, test = simulate(120, 2, censor_days=300.0)
    figures = survival_metrics(train, test, risk, calibration, samples=5)
    assert 200 < figures["about"]["tau_days"] < test.last_day < 365
    assert figures["uno_c_index"]["value"] > 0.5
    assert figures["integrated_brier"]["value"] is not None


def test_a_thousand_draws_of_everything_take_seconds() -> None:
    calibration, _, train = fitted(200, 1)
    risk, test = simulate(200, 2)
    start = clock.process_time()
    figures = survival_metrics(train, test, risk, calibration)
    assert clock.process_time() - start < 20
    assert figures["uno_c_index"]["samples"] == 1000


# --- two models -------------------------------------------------------------------------------------------------------


def cases(risk: np.ndarray, outcomes: Outcomes) -> pd.DataFrame:
    names = [f"P{k:03d}" for k in range(len(risk))]
    return pd.DataFrame({"PatientID": names, "time": outcomes.time, "event": outcomes.event, "log_hazard": risk})


def test_a_better_model_is_told_from_a_worse_one() -> None:
    risk, outcomes = simulate(150)
    noisy = risk + np.random.default_rng(1).normal(size=150) * 2
    better, worse = cases(risk, outcomes), cases(noisy, outcomes).sample(frac=1, random_state=0)
    result = paired_bootstrap(c_index, better, worse, samples=300)
    assert result["value"] == pytest.approx(c_index(better) - c_index(worse))
    assert 0 < result["low"] < result["value"] < result["high"]
    assert result["p"] < 0.05
    assert (result["patients"], result["events"], result["samples"]) == (150, outcomes.events, 300)
    turned = paired_bootstrap(c_index, worse, better, samples=300)
    assert turned["value"] == pytest.approx(-result["value"])
    assert turned["p"] < 0.05
    assert paired_bootstrap(c_index, better, worse, samples=300) == result


def test_a_model_equals_itself() -> None:
    risk, outcomes = simulate(60)
    result = paired_bootstrap(c_index, cases(risk, outcomes), cases(3 * risk, outcomes), samples=50)
    assert (result["value"], result["low"], result["high"], result["p"]) == (0.0, 0.0, 0.0, 1.0)


def test_p_is_small_as_rarely_as_it_says() -> None:
    """60 pairs of equally good models of a mean: p below 0.3 in about 18 of them."""
    rng = np.random.default_rng(0)
    tables = [[pd.DataFrame({"x": rng.normal(size=40)}) for _ in "ab"] for _ in range(60)]
    p = [paired_bootstrap(lambda c: float(c["x"].to_numpy().mean()), a, b, 100)["p"] for a, b in tables]
    assert 8 <= np.sum(np.array(p) < 0.3) <= 28


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t.iloc[1:], "1 patients are in one of the two tables only, such as P000", id="missing"),
        pytest.param(lambda t: pd.concat([t, t.iloc[:1]]), "P000 occurs twice", id="twice"),
        pytest.param(lambda t: t.assign(event=True), "different event", id="labels"),
        pytest.param(lambda t: t.iloc[1:].drop(columns="PatientID"), "have 40 and 39 patients", id="no_ids"),
    ],
)
def test_tables_of_other_patients_are_refused(change, message: str) -> None:
    table = cases(*simulate(40))
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(c_index, table, change(table), samples=5)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        pytest.param(cases(*simulate(20)).assign(event=False), "does not exist", id="no_events"),
        pytest.param(cases(*simulate(20)).iloc[:0], "no patients", id="nobody"),
    ],
)
def test_a_difference_that_cannot_be_had_says_why(table: pd.DataFrame, reason: str) -> None:
    result = paired_bootstrap(c_index, table, table, samples=5)
    assert result["value"] is None
    assert reason in result["reason"]
