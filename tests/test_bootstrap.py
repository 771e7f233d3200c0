"""Intervals over patients drawn with replacement, of one model and of the difference between two."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from simulated_patients import cases, simulate

from scripts.evaluation.bootstrap import bootstrap_interval, paired_bootstrap
from scripts.evaluation.case_metrics import c_index


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    """95 % intervals of a mean over 100 samples of 50: about 95 of them hold the truth."""
    rng = np.random.default_rng(0)
    hits = 0
    for k in range(100):
        table = pd.DataFrame({"x": rng.normal(size=50)})
        low, high = bootstrap_interval(lambda c: float(c["x"].mean()), table, samples=200, seed=k)
        hits += low < 0 < high
    assert 88 <= hits <= 99


def test_interval_is_seeded_and_nan_where_nothing_can_be_had() -> None:
    table = cases(*simulate(40))
    assert bootstrap_interval(c_index, table, 50, seed=1) == bootstrap_interval(c_index, table, 50, seed=1)
    no_events = table.assign(event=0.0)
    assert all(math.isnan(x) for x in bootstrap_interval(c_index, no_events, 20))


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
        pytest.param(lambda t: t.assign(event=True), "patients a different event, such as P0", id="labels"),
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
        pytest.param(cases(*simulate(20)).assign(event=False), "is undefined", id="no_events"),
        pytest.param(cases(*simulate(20)).iloc[:0], "no patients", id="nobody"),
    ],
)
def test_a_difference_that_cannot_be_had_says_why(table: pd.DataFrame, reason: str) -> None:
    result = paired_bootstrap(c_index, table, table, samples=5)
    assert result["value"] is None
    assert reason in result["reason"]
