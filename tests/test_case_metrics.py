"""Metrics of a table of cases and their intervals, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from case_table import table

from scripts import keys
from scripts.evaluation.case_metrics import (
    SMALL_GROUP,
    aggregated_dice,
    average_precision,
    balanced_accuracy,
    centre_groups,
    confusion,
    format_summary,
    roc_auc,
    roc_curve,
    summarise,
    too_few,
)


def test_summary_has_counts_and_intervals() -> None:
    cases = table()
    cases.loc[:9, ["time", "event"]] = math.nan
    cases.loc[10:19, "hpv"] = math.nan
    summary = summarise(cases, samples=100)
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
        pytest.param({"true_nodes": 0, "found_nodes": 0}, "node_sensitivity", "no node in any mask", id="no_nodes"),
    ],
)
def test_a_figure_that_cannot_be_had_says_why(change, metric, reason) -> None:
    row = summarise(table().assign(**change), measures=(metric,), samples=50)[metric]
    assert row["value"] is None
    assert row["reason"] == reason


def test_a_task_the_model_lacks_says_so() -> None:
    assert (
        summarise(table().drop(columns="hpv_prob"), samples=50)["balanced_accuracy"]["reason"]
        == "not a task of this model"
    )


def test_nodes_of_cases_judged_before_they_were_counted() -> None:
    earlier = table().drop(columns=["true_nodes", "found_nodes"])
    row = summarise(earlier, measures=("node_sensitivity",), samples=20)["node_sensitivity"]
    assert (row["value"], row["reason"]) == (None, "not counted by the version that judged these cases")


@pytest.mark.parametrize("ties", [pytest.param(False, id="distinct"), pytest.param(True, id="ties")])
def test_rank_measures_are_those_of_their_definitions(ties) -> None:
    cases = table(80)
    if ties:
        cases["hpv_prob"] = cases["hpv_prob"].round(1)
    positive, prob = cases["hpv"].to_numpy() == 1, cases["hpv_prob"].to_numpy()
    first, second = prob[positive][:, None], prob[~positive]
    assert roc_auc(cases) == pytest.approx(np.mean((first > second) + (first == second) / 2))
    levels = np.unique(prob)[::-1]
    true, false = (np.array([(prob[of] >= level).sum() for level in levels]) for of in (positive, ~positive))
    recall = true / positive.sum()
    assert average_precision(cases) == pytest.approx((np.diff(recall, prepend=0) * true / (true + false)).sum())
    curve = roc_curve(cases)
    np.testing.assert_allclose(curve["threshold"], [math.inf, *levels])
    np.testing.assert_allclose(curve["true_positive_rate"], [0, *recall])
    np.testing.assert_allclose(curve["false_positive_rate"], [0, *(false / (~positive).sum())])


def test_confusion_by_one_threshold_and_by_that_of_the_row() -> None:
    hpv, prob = [1.0, 1.0, 1.0, 0.0, 0.0], [0.9, 0.5, 0.3, 0.6, 0.1]
    cases = pd.DataFrame({"hpv": hpv, "hpv_prob": prob})
    counted = {"true_positive": 1, "false_negative": 2, "true_negative": 1, "false_positive": 1}
    assert confusion(cases) == counted
    assert balanced_accuracy(cases) == pytest.approx((1 / 3 + 1 / 2) / 2)
    by_row = cases.assign(hpv_threshold=[0.2, 0.2, 0.7, 0.7, 0.2])
    assert balanced_accuracy(by_row) == pytest.approx((2 / 3 + 1) / 2)
    row = summarise(by_row, measures=("balanced_accuracy",), samples=20)["balanced_accuracy"]
    assert row["thresholds"] == [0.2, 0.7]
    assert row["confusion"] == {"true_positive": 2, "false_negative": 1, "true_negative": 2, "false_positive": 0}


@pytest.mark.parametrize("status", [0.0, 1.0])
def test_confusion_of_one_class(status) -> None:
    found = confusion(pd.DataFrame({"hpv": [status, status], "hpv_prob": [0.9, 0.1]}))
    assert list(found.values()) == ([1, 1, 0, 0] if status else [0, 0, 1, 1])


@pytest.mark.parametrize("measure", [roc_auc, average_precision, balanced_accuracy])
def test_one_class_has_no_rank(measure) -> None:
    assert math.isnan(measure(table(10).assign(hpv=1.0)))
    with pytest.raises(ValueError, match="one class only"):
        roc_curve(table(10).assign(hpv=1.0))


def test_aggregated_dice_is_that_of_all_voxels_together() -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((5, 2, 8, 8, 8)) < np.array([0.02, 0.1, 0.3, 0.5, 0.9])[:, None, None, None, None]
    rows = []
    for predicted, true in masks:
        both, volumes = (predicted & true).sum(), (predicted.sum(), true.sum())
        rows.append(
            {"dice": 2 * both / sum(volumes), "volume_ml": volumes[0] * 0.064, "true_volume_ml": volumes[1] * 0.064}
        )
    predicted, true = masks[:, 0], masks[:, 1]
    expected = 2 * (predicted & true).sum() / (predicted.sum() + true.sum())
    assert aggregated_dice(pd.DataFrame(rows)) == pytest.approx(expected)


def test_missed_cases_are_counted_beside_the_surface_distance() -> None:
    cases = table(20)
    cases.loc[:4, "surface_distance_mm"] = math.inf
    row = summarise(cases, measures=("surface_distance_mm",), samples=20)["surface_distance_mm"]
    assert (row["patients"], row["missed"]) == (20, 5)
    assert row["value"] == pytest.approx(cases["surface_distance_mm"][5:].median())
    all_missed = summarise(cases.assign(surface_distance_mm=math.inf), measures=("surface_distance_mm",))
    assert all_missed["surface_distance_mm"]["reason"] == "20 of 20 are missed"


@pytest.mark.parametrize("distance", [math.nan, 0.0], ids=["now", "tables_of_earlier_versions"])
def test_cases_without_any_tumour_are_counted_and_have_no_surface(distance) -> None:
    """Half of the cases are rightly empty: as 0 mm they would make the median 0."""
    cases = table(20)
    cases.loc[:11, ["volume_ml", "true_volume_ml"]] = 0.0
    cases.loc[:11, "surface_distance_mm"] = distance
    cases.loc[12, ["volume_ml", "surface_distance_mm"]] = [0.0, math.inf]
    row = summarise(cases, measures=("surface_distance_mm",), samples=20)["surface_distance_mm"]
    assert (row["patients"], row["missed"], row["both_empty"]) == (8, 1, 12)
    assert row["value"] == pytest.approx(cases["surface_distance_mm"][13:].median())
    assert "1 missed, 12 both empty" in format_summary({"surface_distance_mm": row})
    dice = summarise(cases, measures=("dice",), samples=20)["dice"]
    assert (dice["patients"], dice["both_empty"]) == (20, 12)
    nothing = summarise(cases[:12], measures=("surface_distance_mm",))["surface_distance_mm"]
    assert (nothing["value"], nothing["reason"]) == (None, "no tumour in any mask")


def test_small_groups_have_counts_and_a_reason() -> None:
    groups = dict(centre_groups(table()))
    assert list(groups) == ["MDA", "USZ"] and not centre_groups(table().drop(columns=keys.CENTRE))
    assert summarise(groups["MDA"], least=SMALL_GROUP)["c_index"]["value"] is not None
    for name, row in summarise(groups["USZ"], least=SMALL_GROUP, samples=20).items():
        assert row["value"] is None, name
        assert row["reason"].startswith("too few: 8 patients of at least 10"), name


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        pytest.param({"patients": 10, "events": 5}, "", id="enough"),
        pytest.param({"patients": 10}, "", id="not_asked_for"),
        pytest.param(
            {"patients": 9, "events": 4}, "too few: 9 patients of at least 10, 4 events of at least 5", id="two"
        ),
    ],
)
def test_too_few(counts, reason) -> None:
    assert too_few(counts, SMALL_GROUP) == reason
    assert too_few(counts, None) == ""
