"""What an evaluation counts in each case, and the files it leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from case_table import table
from scipy import ndimage

from scripts import keys
from scripts.evaluation.case_metrics import (
    balanced_accuracy,
    format_summary,
)
from scripts.evaluation.case_table import (
    CaseTable,
    case_rows,
    count_lesions,
    dice_groups,
    read_features,
    surface_distance_mm,
)
from scripts.evaluation.survival import fit_calibration


def block(*ranges: tuple[int, int], size: int = 16) -> torch.Tensor:
    mask = torch.zeros(size, size, size)
    mask[tuple(slice(*r) for r in ranges)] = 1
    return mask


def surface_oracle(first: np.ndarray, second: np.ndarray, spacing: tuple[float, ...]) -> float:
    """By distance maps of the whole grid."""
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (first, second)]
    maps = [ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges]
    return max(np.percentile(maps[1][edges[0]], 95), np.percentile(maps[0][edges[1]], 95))


@pytest.mark.parametrize(
    "spacing", [pytest.param((2.0, 2.0, 2.0), id="cubes"), pytest.param((1.0, 2.0, 3.5), id="slabs")]
)
def test_surface_distance_in_mm_against_distance_maps(spacing) -> None:
    true, predicted = block((4, 9), (4, 9), (4, 9)), block((5, 12), (4, 8), (3, 9))
    expected = surface_oracle(predicted.numpy() > 0, true.numpy() > 0, spacing)
    assert surface_distance_mm(predicted, true, spacing) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        pytest.param(block((0, 0)), block((0, 0)), math.nan, id="both_empty"),
        pytest.param(block((0, 0)), block((2, 4)), math.inf, id="missed"),
        pytest.param(block((2, 4)), block((0, 0)), math.inf, id="nothing_to_find"),
        pytest.param(block((2, 4)), block((2, 4)), 0.0, id="equal"),
    ],
)
def test_surface_distance_of_masks_that_are_empty_or_equal(predicted, true, expected) -> None:
    assert surface_distance_mm(predicted, true, (2.0, 2.0, 2.0)) == pytest.approx(expected, nan_ok=True)


TWO = block((2, 6), (2, 6), (2, 6)) + block((10, 14), (10, 14), (10, 14))


@pytest.mark.parametrize(
    ("predicted", "found", "of_prediction", "false"),
    [
        pytest.param(TWO, 2, 2, 0, id="right"),
        pytest.param(block((0, 0)), 0, 0, 0, id="nothing"),
        pytest.param(block((2, 6), (2, 6), (2, 6)), 1, 1, 0, id="one_of_two"),
        pytest.param(block((2, 6), (2, 6), (2, 3)), 0, 1, 0, id="a_quarter_is_not_found_and_not_false"),
        pytest.param(block((2, 6), (2, 6), (2, 4)), 1, 1, 0, id="half_is_found"),
        pytest.param(block((2, 6), (10, 14), (2, 6)), 0, 1, 1, id="elsewhere"),
        pytest.param(block((0, 16), (0, 16), (0, 16)), 2, 1, 0, id="everything_is_one"),
        pytest.param(TWO + block((2, 6), (10, 14), (2, 6)), 2, 3, 1, id="one_too_many"),
    ],
)
def test_lesions_are_counted(predicted, found, of_prediction, false) -> None:
    counted = count_lesions(predicted.numpy() > 0, TWO.numpy())
    expected = {"true_lesions": 2, "found_lesions": found, "predicted_lesions": of_prediction, "false_lesions": false}
    assert counted.items() >= expected.items()


def test_lesions_that_touch_at_a_corner_are_one() -> None:
    mask = block((2, 4), (2, 4), (2, 4)) + block((4, 6), (4, 6), (4, 6))
    assert count_lesions(mask.numpy() > 0, mask.numpy())["true_lesions"] == 1


PRIMARY, NODE, TOUCHING_NODE = (block((2, 6), y, (2, 6)) for y in ((2, 6), (10, 14), (6, 9)))


@pytest.mark.parametrize(
    ("nodes", "predicted", "primaries", "found"),
    [
        pytest.param(NODE, PRIMARY + NODE, (1, 1), (1, 1), id="both_found"),
        pytest.param(NODE, PRIMARY, (1, 1), (1, 0), id="node_missed"),
        pytest.param(NODE, NODE, (1, 0), (1, 1), id="primary_missed"),
        pytest.param(TOUCHING_NODE, PRIMARY, (1, 1), (1, 0), id="touching_node_missed"),
        pytest.param(NODE + TOUCHING_NODE, PRIMARY + TOUCHING_NODE, (1, 1), (2, 1), id="one_of_two"),
        pytest.param(block((0, 0)), PRIMARY, (1, 1), (0, 0), id="no_nodes"),
    ],
)
def test_nodes_are_counted_apart(nodes, predicted, primaries, found) -> None:
    counted = count_lesions(predicted.numpy() > 0, (PRIMARY + 2 * nodes).numpy())
    assert (counted["true_primaries"], counted["found_primaries"]) == primaries
    assert (counted["true_nodes"], counted["found_nodes"]) == found


def test_dice_by_centre_only_where_there_are_several() -> None:
    assert [len(values) for values in dice_groups(table()).values()] == [60, 52, 8]
    assert list(dice_groups(table().assign(centre="MDA"))) == ["all"]


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
        keys.SEG: 2 * truth,
        keys.SEG_KNOWN: torch.tensor([True, False]),
        keys.SEG_CLASSES_KNOWN: torch.tensor([True, False]),
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
    assert first["surface_distance_mm"] == pytest.approx(4.0)
    assert (first["true_lesions"], first["found_lesions"], first["false_lesions"]) == (1, 1, 0)
    assert first["matched_lesions"] == 1
    assert (first["true_nodes"], first["found_nodes"], first["true_primaries"]) == (1, 1, 0)
    unknown = (
        "time",
        "event",
        "dice",
        "true_volume_ml",
        "surface_distance_mm",
        "true_lesions",
        "false_lesions",
        "matched_lesions",
    )
    assert all(math.isnan(second[name]) for name in unknown)
    assert second["predicted_lesions"] == 1
    assert second["hpv"] == 0.0
    assert not any(name.startswith("dice_") for name in first), "a network of one class"


@pytest.mark.parametrize(
    ("true", "apart", "expected"),
    [
        pytest.param((1, 2), True, [2 / 3, 0.5, 0.8, 0.002, 0.003, 1], id="both"),
        pytest.param((1, 0), True, [1 / 3, 0.5, 0.0, 0.002, 0.0, 0], id="no_node"),
        pytest.param((1, 1), False, [2 / 3, *[math.nan] * 5], id="merged"),
        pytest.param((0, 0), True, [0.0, 0.0, 0.0, 0.0, 0.0, 0], id="empty"),
    ],
)
def test_case_rows_of_two_classes(true: tuple[int, int], apart: bool, expected: list[float]) -> None:
    """GTVp: 2 voxels predicted, 2 true, 1 in both; GTVn: 3 true, 2 predicted, both right."""
    each, truth = torch.zeros(1, 2, 16, 16, 16), torch.zeros(1, 1, 16, 16, 16)
    each[0, 0, 1, 1, 1:3], each[0, 1, 9, 9, 1:3] = 0.7, 0.8
    truth[0, 0, 1, 1, 2:4], truth[0, 0, 9, 9, 1:4] = true[0], true[1]
    batch = {
        **{keys.PATIENT_ID: ["a"], keys.CENTRE: ["X"], keys.CROP_METHOD: [""], keys.CROP_FLAG: [""]},
        **{keys.TIME: torch.zeros(1), keys.EVENT: torch.tensor([False]), keys.HPV: torch.zeros(1)},
        **{flag: torch.tensor([False]) for flag in (keys.SURV_KNOWN, keys.HPV_KNOWN)},
        **{keys.SEG: truth, keys.SEG_KNOWN: torch.tensor([True]), keys.SEG_CLASSES_KNOWN: torch.tensor([apart])},
        **{keys.SEG_INSIDE: torch.ones(1), keys.BOX_AFFINE: torch.eye(4)[None]},
    }
    (row,) = case_rows(batch, {keys.SEG_PROB: each.sum(dim=1, keepdim=True), keys.CLASS_PROB: each})
    columns = ("dice", "dice_gtvp", "dice_gtvn", "true_volume_ml_gtvp", "true_volume_ml_gtvn", "true_nodes")
    assert [row[name] for name in columns] == pytest.approx(expected, nan_ok=True)
    assert [row["volume_ml_gtvp"], row["volume_ml_gtvn"]] == pytest.approx([0.002, 0.002])


def test_the_handler_writes_table_metrics_survival_and_plots(tmp_path: Path) -> None:
    cases = table(40)
    training = [
        {keys.TIME: row.time, keys.EVENT: row.event == 1, keys.SURV_KNOWN: k > 3}
        for k, row in enumerate(table(50, seed=1).itertuples())
    ]
    handler = CaseTable(str(tmp_path), "cohort", "model.pt", training_cases=training)
    handler.rows = cases.to_dict("records")
    handler.write(SimpleNamespace())
    report = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert report["data"] == "40 cases of 2 centres (MDA, USZ); research use only, not for clinical use"
    assert json.loads((tmp_path / "figures" / "roc.json").read_text())["data"] == report["data"]
    assert report["survival"]["about"]["train_patients"] == 46
    assert report["survival"]["c_index"]["value"] == pytest.approx(report["metrics"]["c_index"]["value"])
    assert "absolute risk" in report["survival"]["brier_skill"]["reason"]
    assert report["centres"]["MDA"]["cases"] + report["centres"]["USZ"]["cases"] == 40
    assert report["centres"]["MDA"]["survival"]["uno_c_index"]["value"] is not None
    assert report["centres"]["USZ"]["survival"]["reason"].startswith("too few: 8 patients")
    assert report["figures"]["roc"] == {"file": "figures/roc.png"}
    assert "a single network carries no cut points" in report["figures"]["kaplan_meier_median"]["reason"]
    assert "no absolute risk" in report["figures"]["calibration_2y"]["reason"]
    assert len(pd.read_csv(tmp_path / "cases.csv")) == 40
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"roc.png", "roc.json", "dice.png", "dice.json"}
    handler.rows = cases.assign(hpv=1.0, dice=math.nan).to_dict("records")
    handler.write(SimpleNamespace())
    assert not list((tmp_path / "figures").iterdir()), "plots of another evaluation must not stay"
    assert "one class only" in json.loads((tmp_path / "metrics.json").read_text())["figures"]["roc"]["reason"]


def test_an_ensemble_cuts_risk_groups_and_is_seen_to_be_calibrated(tmp_path: Path) -> None:
    """On a cohort it has not learnt from: what it carries from its training patients is drawn."""
    training = table(400, seed=1)
    carried = fit_calibration(training["log_hazard"], training["time"], training["event"]).to_dict()
    cases = [{keys.TIME: row.time, keys.EVENT: row.event == 1, keys.SURV_KNOWN: True} for row in training.itertuples()]
    ensemble = SimpleNamespace(provenance={"calibration": carried})
    handler = CaseTable(str(tmp_path), "cohort", "model.pt", training_cases=cases, ensemble=ensemble)
    handler.rows = table(200).to_dict("records")
    handler.write(SimpleNamespace())
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert set(report["figures"]) == {"roc", "dice", "kaplan_meier_median", "kaplan_meier_tertiles", "calibration_2y"}
    for name, entry in report["figures"].items():
        assert (tmp_path / entry["file"]).is_file(), name
    shown = json.loads((tmp_path / "figures" / "kaplan_meier_tertiles.json").read_text())["content"]
    assert shown["cuts"] == pytest.approx(carried["cut_points"]["tertiles"])
    assert shown["log_rank"]["value"] < 0.001


@pytest.mark.parametrize(
    ("keep_epoch", "part", "fitted", "words"),
    [
        pytest.param(
            "best", "validation", ["epoch"], "selected on these cases: the metrics are too optimistic", id="best"
        ),
        pytest.param("last", "validation", [], "nothing was fitted", id="last"),
        pytest.param("best", "test", [], "nothing was fitted", id="test_cases"),
        pytest.param("last", "training", ["weights"], "trained on these cases", id="training_cases"),
        pytest.param("best", "all", [], "unless", id="another_cohort"),
        pytest.param(None, "validation", None, "not recorded", id="weights_of_an_earlier_version"),
        pytest.param("last", "", [], "nothing was fitted", id="part_not_told"),
    ],
)
def test_metrics_say_what_was_fitted_to_the_cases(tmp_path: Path, caplog, keep_epoch, part, fitted, words) -> None:
    handler = CaseTable(str(tmp_path), "cohort", "model.pt", part=part)
    handler.rows = table(20).to_dict("records")
    provenance = {} if keep_epoch is None else {"keep_epoch": keep_epoch}
    with caplog.at_level("INFO", "scripts.evaluation.case_table"):
        handler.write(SimpleNamespace(network=SimpleNamespace(provenance=provenance)))
    said = json.loads((tmp_path / "metrics.json").read_text())["selection"]
    assert (said["keep_epoch"], said["judged"], said["fitted_to_these_cases"]) == (keep_epoch, part, fitted)
    assert words in said["statement"]
    assert said["statement"] in caplog.text


def test_the_handler_keeps_the_deep_features(tmp_path: Path) -> None:
    handler = CaseTable(str(tmp_path), "cohort", "model.pt")
    handler.rows = table(40).assign(PatientID=[f"P{k:02d}" for k in range(40)]).to_dict("records")
    handler.features = [np.ones((39, 2, 5), dtype=np.float32), np.zeros((1, 2, 5), dtype=np.float32)]
    handler.write(SimpleNamespace())
    patients, features = read_features(tmp_path)
    assert patients == [row["PatientID"] for row in handler.rows]
    assert features.shape == (40, 2, 5) and features[:, 0, 0].sum() == 39
    with pytest.raises(FileNotFoundError, match="run the evaluation again"):
        read_features(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("stored", "threshold"),
    [
        pytest.param({"value": 0.3}, 0.3, id="stored"),
        pytest.param({"value": None, "reason": "one class only"}, 0.5, id="none_could_be_chosen"),
        pytest.param(None, 0.5, id="one_network_carries_none"),
    ],
)
def test_an_ensemble_is_judged_at_the_threshold_it_carries(tmp_path: Path, stored, threshold) -> None:
    ensemble = SimpleNamespace(provenance={} if stored is None else {"hpv_threshold": stored})
    handler = CaseTable(str(tmp_path), "cohort", "model.pt", ensemble=ensemble)
    handler.rows = table(40).to_dict("records")
    handler.write(SimpleNamespace())
    row = json.loads((tmp_path / "metrics.json").read_text())["metrics"]["balanced_accuracy"]
    assert row["thresholds"] == [threshold]
    assert row["value"] == pytest.approx(balanced_accuracy(table(40), threshold))
    assert f"called above {threshold:.3f}" in format_summary({"balanced_accuracy": row})
