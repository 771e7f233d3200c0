"""Overlap by class and lesion by lesion as the challenge measures it, against hand-made cases and another way."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from case_table import table
from scipy import ndimage

from scripts.evaluation.case_metrics import NOT_APART, aggregated_dice, aggregated_f1, format_summary, summarise
from scripts.evaluation.detection import class_columns, match_lesions


def boxes(*ranges: tuple[int, int], width: int = 4, size: int = 40) -> np.ndarray:
    """Bars along the first axis, from the first number to the second, that do not touch along the others."""
    mask = np.zeros((size, width, width), dtype=bool)
    for start, stop in ranges:
        mask[start:stop] = True
    return mask


def line(labels: str) -> torch.Tensor:
    """A mask (1, X, 1, 1) from its values."""
    return torch.tensor([int(value) for value in labels])[None, :, None, None]


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        pytest.param(boxes(), boxes(), (0, 0, 0), id="both_empty"),
        pytest.param(boxes(), boxes((2, 6)), (0, 1, 0), id="prediction_empty"),
        pytest.param(boxes((2, 6)), boxes(), (1, 0, 0), id="truth_empty"),
        pytest.param(boxes((2, 6)), boxes((2, 6)), (1, 1, 1), id="equal"),
        pytest.param(boxes((2, 5)), boxes((2, 12)), (1, 1, 0), id="iou_of_0.3_is_not_above"),
        pytest.param(boxes((2, 6)), boxes((2, 12)), (1, 1, 1), id="iou_of_0.4"),
        pytest.param(boxes((0, 40)), boxes((2, 12)), (1, 1, 0), id="covered_but_far_too_large"),
        pytest.param(boxes((2, 6), (7, 11)), boxes((2, 12)), (2, 1, 1), id="one_true_takes_one_of_two_that_tie"),
        pytest.param(boxes((2, 12)), boxes((2, 6), (7, 11)), (1, 2, 1), id="one_predicted_takes_one_of_two_that_tie"),
        pytest.param(boxes((2, 12)), boxes((2, 7), (8, 30)), (1, 2, 1), id="bridge_finds_the_one_with_the_overlap"),
        pytest.param(boxes((2, 10), (12, 20)), boxes((2, 20)), (2, 1, 1), id="split"),
        pytest.param(boxes((2, 6), (10, 14), (20, 24)), boxes((2, 6), (30, 34)), (3, 2, 1), id="false_and_missed"),
    ],
)
def test_lesions_match_one_to_one_above_the_threshold(predicted, truth, expected) -> None:
    assert match_lesions(predicted, truth) == expected


def test_a_greedy_choice_of_the_best_pair_would_lose_a_match() -> None:
    """P1 overlaps best with T1, which P2 needs: T1 and P2, T2 and P1 are two pairs instead of one."""
    truth, predicted = boxes((0, 10), (11, 18), width=1), np.zeros((40, 1, 1), dtype=bool)
    predicted[5:16] = True
    predicted[0:4] = True
    p1 = (5 / (11 + 10 - 5), 5 / (11 + 7 - 5))
    assert p1[0] > 0.3 and p1[1] > 0.3 and 4 / 10 > 0.3
    assert match_lesions(predicted, truth) == (2, 2, 2)


def test_lesions_that_touch_at_a_corner_are_one() -> None:
    mask = np.zeros((8, 8, 8), dtype=bool)
    mask[1:3, 1:3, 1:3] = mask[3:5, 3:5, 3:5] = True
    assert match_lesions(mask, mask) == (1, 1, 1)


def by_hand(predicted: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    """By scipy's components and every way of pairing them."""
    found, true = (ndimage.label(mask, np.ones((3, 3, 3))) for mask in (predicted, truth))
    may = [
        {t for t in range(1, true[1] + 1) if _iou(found[0] == p, true[0] == t) > 0.3} for p in range(1, found[1] + 1)
    ]
    most = 0
    for choice in itertools.product(*[[*sorted(partners), None] for partners in may]):
        taken = [t for t in choice if t is not None]
        most = max(most, len(taken) if len(taken) == len(set(taken)) else 0)
    return found[1], true[1], most


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_counts_against_every_way_of_pairing() -> None:
    rng = np.random.default_rng(3)
    totals = np.zeros(3, dtype=int)
    for _ in range(40):
        truth = ndimage.gaussian_filter(rng.random((16, 16, 16)), 1.6) > 0.535
        predicted = ndimage.shift(truth.astype(float), rng.integers(-1, 2, 3), order=0) > 0.5
        predicted ^= ndimage.gaussian_filter(rng.random((16, 16, 16)), 1.2) > 0.56
        assert match_lesions(predicted, truth) == by_hand(predicted, truth)
        totals += by_hand(predicted, truth)
    assert 0 < totals[2] < totals[0] and totals[2] < totals[1], totals


# --- classes -------------------------------------------------------------------------------------------------------
def columns_of(predicted: list[str], truth: list[str], known: list[bool] | None = None) -> pd.DataFrame:
    batch = [torch.stack([line(text) for text in texts]) for texts in (predicted, truth)]
    flags = np.array(known or [True] * len(truth))
    return pd.DataFrame(class_columns(*batch, flags, np.full(len(truth), 0.008)))


@pytest.mark.parametrize(
    ("predicted", "truth", "gtvp", "gtvn", "lesions"),
    [
        pytest.param("0000000", "0000000", 1.0, 1.0, (0, 0, 0, 0), id="both_empty"),
        pytest.param("0000000", "0110220", 0.0, 0.0, (0, 0, 0, 0), id="nothing_predicted"),
        pytest.param("0110000", "0110000", 1.0, 1.0, (1, 1, 0, 0), id="no_node_is_right"),
        pytest.param("0110220", "0110000", 1.0, 0.0, (1, 1, 1, 0), id="a_node_too_many"),
        pytest.param("0111220", "0112220", 0.8, 0.8, (1, 1, 1, 1), id="touching_classes_are_apart"),
        pytest.param("0220110", "0110220", 0.0, 0.0, (1, 0, 1, 0), id="classes_exchanged"),
        pytest.param("0110110", "0110220", 2 / 3, 0.0, (2, 1, 0, 0), id="all_called_primary"),
    ],
)
def test_classes_are_compared_each_on_its_own(predicted, truth, gtvp, gtvn, lesions) -> None:
    row = columns_of([predicted], [truth]).iloc[0]
    assert (row["dice_gtvp"], row["dice_gtvn"]) == pytest.approx((gtvp, gtvn))
    names = ("predicted_primaries", "matched_primaries", "predicted_nodes", "matched_nodes")
    assert tuple(row[name] for name in names) == lesions
    assert row["volume_ml_gtvp"] == pytest.approx(0.008 * predicted.count("1"))
    assert row["true_volume_ml_gtvn"] == pytest.approx(0.008 * truth.count("2"))


def test_a_mask_that_does_not_tell_them_apart_counts_in_no_class() -> None:
    row = columns_of(["0110220"], ["0110110"], [False]).iloc[0]
    unknown = [f"{name}_{of}" for name in ("dice", "true_volume_ml") for of in ("gtvp", "gtvn")]
    assert row[[*unknown, "matched_primaries", "matched_nodes"]].isna().all()
    assert (row["predicted_nodes"], row["volume_ml_gtvn"]) == (1, pytest.approx(0.016))


def test_metrics_of_classes_are_those_of_all_voxels_and_all_lesions_together() -> None:
    predicted = ["0110220", "0111022", "0000000", "0110000", "0100202"]
    truth = ["0110022", "0110222", "0000000", "0000110", "0110220"]
    known = [True, True, True, True, False]
    cases = columns_of(predicted, truth, known).assign(dice=0.5)
    cases["true_primaries"] = cases["true_nodes"] = [1, 1, 0, 1, 1]
    cases.loc[3, "true_nodes"] = 0
    summary = summarise(cases, samples=50)
    for ending, value in (("gtvp", "1"), ("gtvn", "2")):
        pairs = [(p == value, t == value) for k in range(4) for p, t in zip(predicted[k], truth[k], strict=True)]
        expected = 2 * sum(p and t for p, t in pairs) / sum(p + t for p, t in pairs)
        row = summary[f"dice_aggregated_{ending}"]
        assert row["value"] == pytest.approx(expected), ending
        assert row["patients"] == 4
    assert summary["dice_gtvp"]["value"] == pytest.approx((1 + 0.8 + 1 + 0) / 4)
    assert (summary["dice_gtvp"]["both_empty"], summary["dice_gtvn"]["both_empty"]) == (1, 2)
    assert summary["primary_f1"]["value"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    found = {name: summary["node_f1"][name] for name in ("nodes", "predicted", "matched")}
    assert found == {"nodes": 2, "predicted": 2, "matched": 2}


@pytest.mark.parametrize("statistic", ["dice_aggregated", "dice_aggregated_gtvp", "dice_aggregated_gtvn"])
def test_dscagg_of_a_cohort_without_any_tumour_is_1_as_in_the_challenge(statistic) -> None:
    ending = statistic.removeprefix("dice_aggregated")
    cases = table(10).assign(**{f"dice{ending}": 1.0, f"volume_ml{ending}": 0.0, f"true_volume_ml{ending}": 0.0})
    assert aggregated_dice(cases, ending) == 1.0
    row = summarise(cases, measures=(statistic,), samples=20)[statistic]
    assert (row["value"], row["both_empty"]) == (1.0, 10)


def test_f1agg_of_a_cohort_without_any_lesion_says_why_it_is_undefined() -> None:
    nothing = {f"{what}_lesions": 0 for what in ("true", "predicted", "matched")}
    assert math.isnan(aggregated_f1(table(10).assign(**nothing), "lesions"))
    row = summarise(table(10).assign(**nothing), measures=("lesion_f1",), samples=20)["lesion_f1"]
    assert (row["value"], row["reason"]) == (None, "no lesion in any mask, true or predicted")


def test_a_model_with_a_merged_label_has_no_metrics_of_classes_and_no_lines_of_them() -> None:
    merged = table().drop(columns=[name for name in table() if name.endswith(("gtvp", "gtvn"))])
    merged = merged.drop(columns=[f"{what}_{of}" for what in ("predicted", "matched") for of in ("primaries", "nodes")])
    names = ("dice_gtvp", "dice_aggregated_gtvn", "primary_f1", "node_f1")
    summary = summarise(merged, measures=("dice", *names, "lesion_f1"), samples=20)
    assert {summary[name]["reason"] for name in names} == {NOT_APART}
    assert summary["lesion_f1"]["value"] is not None
    assert [text.split("  ")[1] for text in format_summary(summary).splitlines()] == ["Dice", "lesion F1, aggregated"]


def test_matches_of_cases_judged_before_they_were_counted() -> None:
    row = summarise(table().drop(columns="matched_lesions"), measures=("lesion_f1",), samples=20)["lesion_f1"]
    assert row["reason"] == "not counted by the version that judged these cases"
