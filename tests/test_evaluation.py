"""Tables of cases, their summary and its intervals."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from scripts import keys
from scripts.evaluation import (
    balanced_accuracy,
    bootstrap_interval,
    c_index,
    case_rows,
    format_summary,
    summarise,
)


def table(n: int = 60, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    log_hazard = rng.normal(size=n)
    time = rng.exponential(1000 * np.exp(-log_hazard))
    hpv = rng.integers(0, 2, n).astype(float)
    return pd.DataFrame(
        {
            "log_hazard": log_hazard,
            "time": time,
            "event": (rng.random(n) < 0.5).astype(float),
            "hpv": hpv,
            "hpv_prob": np.clip(hpv * 0.3 + rng.random(n) * 0.7, 0, 1),
            "dice": rng.random(n),
        }
    )


def test_balanced_accuracy_against_scikit_learn() -> None:
    cases = table()
    expected = balanced_accuracy_score(cases["hpv"], cases["hpv_prob"] > 0.5)
    assert balanced_accuracy(cases) == pytest.approx(expected)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    """95 % intervals of a mean over 100 samples of 50: about 95 of them hold the truth."""
    rng = np.random.default_rng(0)
    hits = 0
    for k in range(100):
        cases = pd.DataFrame({"x": rng.normal(size=50)})
        low, high = bootstrap_interval(lambda c: float(c["x"].mean()), cases, samples=200, seed=k)
        hits += low < 0 < high
    assert 88 <= hits <= 99


def test_interval_is_seeded_and_nan_where_nothing_can_be_had() -> None:
    cases = table()
    assert bootstrap_interval(c_index, cases, 50, seed=1) == bootstrap_interval(c_index, cases, 50, seed=1)
    no_events = cases.assign(event=0.0)
    assert all(math.isnan(x) for x in bootstrap_interval(c_index, no_events, 20))


def test_summary_has_counts_and_intervals() -> None:
    cases = table()
    cases.loc[:9, ["time", "event"]] = math.nan
    cases.loc[10:19, "hpv"] = math.nan
    summary = summarise(cases)
    assert summary["c_index"]["patients"] == 50
    assert summary["c_index"]["events"] == int(cases["event"].sum())
    assert summary["balanced_accuracy"]["patients"] == 50
    for row in summary.values():
        assert row["low"] < row["value"] < row["high"]
    assert "50 patients" in format_summary(summary)


@pytest.mark.parametrize(
    ("change", "metric", "reason"),
    [
        pytest.param({"event": 0.0}, "c_index", "no comparable pair (0 events)", id="no_events"),
        pytest.param({"time": math.nan}, "c_index", "no labelled case", id="no_survival"),
        pytest.param({"hpv": 1.0}, "balanced_accuracy", "one class only", id="one_class"),
        pytest.param({"dice": math.nan}, "dice", "no labelled case", id="no_masks"),
    ],
)
def test_a_figure_that_cannot_be_had_says_why(change, metric, reason) -> None:
    row = summarise(table().assign(**change))[metric]
    assert row["value"] is None
    assert row["reason"] == reason


def test_a_task_the_model_lacks_says_so() -> None:
    assert summarise(table().drop(columns="hpv_prob"))["balanced_accuracy"]["reason"] == "not a task of this model"


def test_case_rows_hide_unknown_labels_and_measure_volumes() -> None:
    truth = torch.zeros(2, 1, 16, 16, 16)
    truth[0, :, :4, :4, :4] = 1
    prob = torch.zeros_like(truth)
    prob[:, :, :4, :4, :2] = 0.9
    batch = {
        keys.PATIENT_ID: ["a", "b"],
        keys.CENTRE: ["X", "Y"],
        keys.TIME: torch.tensor([100.0, 0.0]),
        keys.EVENT: torch.tensor([True, False]),
        keys.SURV_KNOWN: torch.tensor([True, False]),
        keys.HPV: torch.tensor([1.0, 0.0]),
        keys.HPV_KNOWN: torch.tensor([False, True]),
        keys.SEG: truth,
        keys.SEG_KNOWN: torch.tensor([True, False]),
        keys.SEG_INSIDE: torch.tensor([1.0, math.nan]),
        keys.BOX_AFFINE: torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])).repeat(2, 1, 1),
        keys.CROP_METHOD: ["pet_brain", "pet_brain"],
        keys.CROP_FLAG: ["", ""],
    }
    pred = {keys.SEG_PROB: prob, keys.LOG_HAZARD: torch.tensor([0.5, 1.5]), keys.HPV_PROB: torch.tensor([0.1, 0.9])}
    first, second = case_rows(batch, pred)
    assert first["dice"] == pytest.approx(2 * 32 / (32 + 64))
    assert first["volume_ml"] == pytest.approx(32 * 8 / 1000)
    assert first["true_volume_ml"] == pytest.approx(64 * 8 / 1000)
    assert (first["time"], first["event"]) == (100.0, 1.0)
    assert math.isnan(first["hpv"])
    assert all(math.isnan(second[name]) for name in ("time", "event", "dice", "true_volume_ml"))
    assert second["hpv"] == 0.0
