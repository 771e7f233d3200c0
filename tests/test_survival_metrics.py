"""The evidence for survival predictions, against lifelines, scikit-survival and drawing patients one by one."""

from __future__ import annotations

import json
import time as clock
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lifelines import KaplanMeierFitter
from lifelines.statistics import logrank_test
from simulated_patients import fitted, simulate, structured
from sksurv.metrics import concordance_index_ipcw, cumulative_dynamic_auc, integrated_brier_score
from sksurv.util import Surv

from scripts.evaluation.bootstrap import bootstrap_interval
from scripts.evaluation.case_metrics import c_index
from scripts.evaluation.survival import (
    DAYS_PER_YEAR,
    HORIZON_YEARS,
    Outcomes,
)
from scripts.evaluation.survival_metrics import survival_metrics

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


def test_calibration_metrics_of_a_right_and_of_an_extreme_model() -> None:
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


def test_a_survival_function_is_judged_like_a_calibration() -> None:
    calibration, risk, outcomes = fitted(150)

    def survival(days: np.ndarray) -> np.ndarray:
        return calibration.survival(risk, days)

    figures = survival_metrics(outcomes, outcomes, risk, survival=survival, cuts=calibration.cut_points, samples=20)
    assert figures == survival_metrics(outcomes, outcomes, risk, calibration, samples=20)
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
