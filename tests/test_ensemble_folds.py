"""Joining the folds of an experiment in one model: weights, provenance, thresholds, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import ensemble_folds
from experiments.ensemble import (
    calibrate,
    choose_hpv_threshold,
    describe_features,
    empty_ensemble,
    out_of_fold,
    statement_on_training,
)
from experiments.experiment import ExperimentError
from scripts.evaluation.case_table import write_features
from scripts.evaluation.survival import Calibration
from scripts.imaging.quality import check_features
from scripts.model.ensemble import FoldEnsemble, load_weights, read_state, save_weights
from scripts.model.errors import SettingsMismatch
from scripts.model.networks import MultitaskNet

FEATURES = ["age", "gender", "tobacco", "alcohol", "treatment", "performance_status", "m_stage"]
SETTINGS = {
    "tasks": ["seg", "hpv", "surv"],
    "clinical_features": FEATURES,
    "survival_inputs": ["deep"],
    "hpv_inputs": ["image"],
    "roi_size": [32, 32, 32],
    "spacing_mm": 8.0,
    "ct_window": [-1000, 1000],
    "pet_window": None,
    "bn_eps": 1e-05,
}
PHANTOMS = "60 digital phantoms, not for clinical use"


def write_checkpoint(fold: int, folder: Path, settings: dict = SETTINGS, **network) -> None:
    torch.manual_seed(fold)
    options = {"clinical_features": 7, "tasks": settings["tasks"]} | network
    save_weights(FoldEnsemble(MultitaskNet(**options), settings), folder / "models" / "model.pt")


def write_tables(fold: int, folder: Path, rng: np.random.Generator) -> None:
    """Cases whose log hazard tells their time, on a scale of the fold's own."""
    held_out = range(20 * fold, 20 * fold + 20)
    others = [k for k in range(60) if k not in held_out]
    for part, cases in (("evaluation", held_out), ("evaluation_training", others)):
        count = len(cases)
        risk = rng.normal(size=count)
        time = rng.exponential(800 * np.exp(-0.7 * risk)) + 1
        hpv = rng.random(count) < 0.5
        table = pd.DataFrame(
            {
                "PatientID": [f"{k:03d}" for k in cases],
                "log_hazard": 5 * fold + (1 + fold) * risk,
                "time": np.minimum(time, 2000).round(),
                "event": (time < 2000).astype(float),
                "hpv": np.where(np.arange(count) % 4 == 0, np.nan, hpv),
                "hpv_prob": 0.2 + 0.2 * hpv + 0.1 * rng.random(count),
            }
        )
        (folder / part).mkdir(parents=True)
        table.to_csv(folder / part / "cases.csv", index=False)
        write_features(folder / part, table["PatientID"], fold + rng.normal(size=(count, 1, 236)))


@pytest.fixture
def runs(tmp_path) -> Path:
    """An experiment of three folds as train_folds leaves it, with networks that have learnt nothing."""
    folder = tmp_path / "runs"
    rng = np.random.default_rng(0)
    for fold in range(3):
        place = folder / f"fold_{fold}"
        write_checkpoint(fold, place)
        write_tables(fold, place, rng)
        metrics = {
            "c_index": {"value": 0.6 + fold / 100, "patients": 20},
            "dice": {"value": None, "reason": "no masks"},
        }
        outcome = {
            "fold": fold,
            "status": "finished",
            "cases": {"training": {"cases": 40, "events": 30}, "validation": {"cases": 20, "events": 15}},
            "epoch": 9,
            "best_epoch": 7,
            "metrics": {"validation": metrics, "training": metrics},
        }
        (place / "fold.json").write_text(json.dumps(outcome))
    record = {
        "command": "python scripts/train_folds.py --dataset_dir data",
        "dataset_dir": "cohort",
        "protocol": "partial",
        "num_folds": 3,
        "held_out": "validation",
        "settings": {"keep_epoch": "best"},
        "cohort": {
            "trained_on": PHANTOMS,
            "cases": 60,
            "events": 45,
            "voxel_limits": {"ct_slice": {"warn_above": 3.0}},
        },
        "configs": {"configs/train.json": "0123"},
        "versions": {"bundle": "0.1.0", "torch": "2.13.0"},
        "folds": {},
    }
    (folder / "experiment.json").write_text(json.dumps(record))
    return folder


def test_three_folds_become_one_small_file_that_answers_as_their_mean(runs, tmp_path, capsys):
    out = tmp_path / "models" / "model.pt"
    ensemble_folds.ensemble_folds(str(runs), str(out), half=True)
    assert out.stat().st_size <= 30e6
    joined = load_weights(empty_ensemble(SETTINGS), out).eval()
    image, clinical = torch.rand(1, 2, 32, 32, 32), torch.ones(1, 7)
    members = []
    for fold in range(3):
        path = runs / f"fold_{fold}" / "models" / "model.pt"
        members.append(load_weights(empty_ensemble(SETTINGS), path).eval())
    with torch.no_grad():
        alone = torch.stack([member.predict(image, clinical)["log_hazard"] for member in members])
        together = joined.predict(image, clinical)
    torch.testing.assert_close(together["log_hazard"], alone.mean(0), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(together["log_hazard_std"], alone.std(0, correction=0), atol=1e-2, rtol=1e-2)
    said = capsys.readouterr().out
    assert f"model: 3 folds, trained on {PHANTOMS}" in said
    assert "fold 1: weights of epoch 7; c_index 0.610\n" in said
    assert "absolute risk: up to day 2000" in said


@pytest.mark.parametrize(
    ("rejected", "statement"), [((), PHANTOMS), (("007",), f"59 of {PHANTOMS}"), (("007", "040"), f"58 of {PHANTOMS}")]
)
def test_cases_left_out_in_training_are_not_counted(runs, rejected, statement):
    for path in runs.glob("fold_*/evaluation_training/cases.csv"):
        table = pd.read_csv(path, converters={"PatientID": str})
        table[~table["PatientID"].isin(rejected)].to_csv(path, index=False)
    assert statement_on_training(runs, [0, 1, 2], PHANTOMS, 60) == statement


def test_the_file_says_where_the_weights_come_from(runs, tmp_path):
    ensemble_folds.ensemble_folds(str(runs), str(tmp_path / "model.pt"))
    state = torch.load(tmp_path / "model.pt", weights_only=True)["_extra_state"]
    known = state["provenance"]
    assert state["settings"] == known["preprocessing"] == SETTINGS | {"seg_classes": ["GTV"], "lesion_peak": 0.5}
    assert known["trained_on"] == PHANTOMS and "not for clinical decisions" in known["intended_use"]
    assert known["cohort"] == {"cases": 60, "events": 45}
    assert known["voxel_limits"] == {"ct_slice": {"warn_above": 3.0}}
    assert (known["command"], known["protocol"]) == ("python scripts/train_folds.py --dataset_dir data", "partial")
    assert (known["configs"], known["versions"]) == (
        {"configs/train.json": "0123"},
        {"bundle": "0.1.0", "torch": "2.13.0"},
    )
    assert [fold["metrics"]["validation"]["c_index"]["value"] for fold in known["folds"]] == [0.6, 0.61, 0.62]
    assert known["folds"][2]["cases"]["training"] == {"cases": 40, "events": 30}
    assert known["folds_missing"] == []
    assert known["clinical"]["features"] == FEATURES
    assert known["clinical"]["coding"]["m_stage"] == "0 (M0) -> 1, 1 (M1) -> 2; a missing value is 0"
    assert known["clinical"]["coding"]["performance_status"].startswith("0 -> 1, 1 -> 2")
    assert known["hpv_threshold"]["patients"] == 45 and 0.3 < known["hpv_threshold"]["value"] < 0.4


@pytest.mark.parametrize(("keep_epoch", "flattered"), [("best", True), ("last", False)])
def test_the_file_says_what_threshold_and_calibration_rest_on(runs, tmp_path, capsys, keep_epoch, flattered):
    record = json.loads((runs / "experiment.json").read_text())
    (runs / "experiment.json").write_text(json.dumps({**record, "settings": {"keep_epoch": keep_epoch}}))
    ensemble_folds.ensemble_folds(str(runs), str(tmp_path / "model.pt"))
    known = torch.load(tmp_path / "model.pt", weights_only=True)["_extra_state"]["provenance"]
    assert known["keep_epoch"] == keep_epoch
    assert ("too good" in known["selection"]) == flattered
    assert known["selection"] in capsys.readouterr().out


def test_inference_reads_it_and_says_what_it_is(runs, tmp_path, tiny_cohort, run_bundle):
    ensemble_folds.ensemble_folds(str(runs), str(tmp_path / "models" / "model.pt"), half=True)
    where = ["--dataset_dir", str(tiny_cohort / "Task 1" / "CHUM-001"), "--ckpt_dir", str(tmp_path / "models")]
    options = ["--config_file", "configs/inference.json", "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    result = run_bundle("inference", *options, *where)
    assert f"model: 3 folds, trained on {PHANTOMS}" in result.stdout + result.stderr
    (row,) = pd.read_csv(tmp_path / "out" / "predictions.csv").to_dict("records")
    assert row["log_hazard_std"] > 0


def test_the_ensemble_is_evaluated_on_another_cohort(runs, tmp_path, tiny_cohort, run_bundle):
    ensemble_folds.ensemble_folds(str(runs), str(tmp_path / "models" / "model.pt"))
    files = ["--config_file", "['configs/train.json','configs/evaluate.json']", "--evaluate_on", "all"]
    where = ["--dataset_dir", str(tiny_cohort), "--ckpt_dir", str(tmp_path / "models")]
    options = ["--output_dir", str(tmp_path), "--device", "cpu", "--num_workers", "0", "--batch_size", "2"]
    run_bundle("evaluating", *files, *where, *options)
    table = pd.read_csv(tmp_path / "evaluation_all" / "cases.csv")
    assert len(table) == 6
    fold_columns = [f"log_hazard_fold_{k}" for k in range(3)]
    assert table[fold_columns].mean(axis=1).to_numpy() == pytest.approx(table["log_hazard"].to_numpy(), abs=1e-5)
    report = json.loads((tmp_path / "evaluation_all" / "metrics.json").read_text())
    assert report["survival"]["risk_groups"].keys() == {"median", "tertiles"}, "cut points of its own training"


# --- calibration and threshold --------------------------------------------------------------------------------------


def test_folds_on_different_scales_are_calibrated_on_a_common_one(runs):
    """The simulated slope is 0.7 a unit of the true risk, which is what is left once each fold's scale is taken off."""
    calibration = Calibration.from_dict(calibrate(runs, range(3), out_of_fold(runs, range(3))))
    assert (calibration.patients, calibration.last_day) == (60, 2000)
    assert calibration.fold_centres == pytest.approx([0, 5, 10], abs=1.5)
    assert calibration.fold_scales == pytest.approx([1, 2, 3], rel=0.3)
    assert calibration.slope == pytest.approx(0.7, abs=2.5 * calibration.slope_error)
    assert calibration.slope > 0.3


def test_a_patient_of_several_folds_counts_once(runs):
    for fold in range(1, 3):
        path = runs / f"fold_{fold}" / "evaluation" / "cases.csv"
        table = pd.read_csv(path, dtype={"PatientID": str})
        table["PatientID"] = [f"{k:03d}" for k in range(20)]
        table[["time", "event"]] = pd.read_csv(runs / "fold_0" / "evaluation" / "cases.csv")[["time", "event"]]
        table.to_csv(path, index=False)
    assert calibrate(runs, range(3), out_of_fold(runs, range(3)))["patients"] == 20


def test_too_few_events_give_no_absolute_risk_and_say_so(runs, capsys):
    cases = out_of_fold(runs, range(3)).iloc[:5]
    reason = calibrate(runs, range(3), cases)["reason"]
    assert "relapses among 5 patients: absolute risk needs 10" in reason and reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "probability", "value", "reached"),
    [
        pytest.param([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], 0.5, 1.0, id="separated"),
        pytest.param([0, 0, 1, 1], [0.1, 0.6, 0.8, 0.9], 0.7, 1.0, id="above_a_half"),
        pytest.param([0, 1, 0, 1, 1], [0.1, 0.2, 0.3, 0.35, 0.4], 0.325, 5 / 6, id="overlap"),
        pytest.param([0, 1], [0.3, 0.3], 0.5, 0.5, id="same_for_all"),
    ],
)
def test_the_hpv_threshold_has_the_highest_balanced_accuracy(status, probability, value, reached):
    table = pd.DataFrame({"PatientID": [str(k) for k in range(len(status))], "hpv": status, "hpv_prob": probability})
    chosen = choose_hpv_threshold(pd.concat([table, table.assign(PatientID="x", hpv=np.nan)]))
    assert (chosen["value"], chosen["balanced_accuracy"]) == pytest.approx((value, reached))
    assert (chosen["patients"], chosen["positive"]) == (len(status), sum(status))


def test_without_both_classes_there_is_no_threshold():
    table = pd.DataFrame({"PatientID": ["a", "b"], "hpv": [1.0, np.nan], "hpv_prob": [0.5, 0.2]})
    assert choose_hpv_threshold(table)["reason"].startswith("no two classes")
    assert choose_hpv_threshold(table.drop(columns="hpv_prob"))["value"] is None


# --- refusals -------------------------------------------------------------------------------------------------------


def test_the_model_knows_what_features_its_training_cases_have(runs, tmp_path):
    ensemble_folds.ensemble_folds(str(runs), str(tmp_path / "model.pt"))
    known = load_weights(empty_ensemble(SETTINGS), tmp_path / "model.pt").provenance
    like_fold = np.random.default_rng(5).normal(size=236)
    verdicts = [check_features(fold + like_fold, known["feature_statistics"][fold]).verdict for fold in range(3)]
    assert verdicts == ["ok", "ok", "ok"]
    assert check_features(30 + like_fold, known["feature_statistics"][0]).verdict != "ok"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param(None, "run the evaluation again", id="evaluated_before_features_were_kept"),
        pytest.param(5, "N of 10 or more", id="few_training_cases"),
    ],
)
def test_no_statistics_without_features(runs, rows, message):
    folder = runs / "fold_1" / "evaluation_training"
    if rows is None:
        (folder / "features.npz").unlink()
        with pytest.raises(FileNotFoundError, match=message):
            describe_features(runs, 1)
    else:
        write_features(folder, ["a"] * rows, np.zeros((rows, 1, 236)))
        assert message in describe_features(runs, 1)["reason"]


def test_missing_folds_are_refused_unless_allowed(runs, tmp_path):
    (runs / "fold_0" / "fold.json").write_text('{"fold": 0, "status": "failed"}')
    (runs / "fold_1" / "fold.json").unlink()
    with pytest.raises(
        ExperimentError, match=r"fold 0 failed, see .*log.txt; fold 1 is not done.*allow_missing"
    ) as error:
        ensemble_folds.ensemble_folds(str(runs), str(tmp_path / "model.pt"))
    assert "python scripts/train_folds.py --dataset_dir data" in str(error.value)
    assert not (tmp_path / "model.pt").exists()
    ensemble_folds.ensemble_folds(str(runs), str(tmp_path / "model.pt"), allow_missing=True)
    known = read_state(tmp_path / "model.pt")["_extra_state"]["provenance"]
    assert [fold["fold"] for fold in known["folds"]] == [2] and known["folds_missing"] == [0, 1]
    assert len(known["calibration"]["fold_centres"]) == 1


def test_no_finished_fold_is_refused_even_if_missing_ones_are_allowed(runs, tmp_path):
    for fold in range(3):
        (runs / f"fold_{fold}" / "fold.json").unlink()
    with pytest.raises(ExperimentError, match="fold 2 is not done"):
        ensemble_folds.ensemble_folds(str(runs), str(tmp_path / "model.pt"), allow_missing=True)


def test_folds_of_other_settings_are_refused_by_name(runs, tmp_path):
    write_checkpoint(2, runs / "fold_2", SETTINGS | {"spacing_mm": 4.0})
    with pytest.raises(SettingsMismatch, match=r"fold 0 and fold 2 .* spacing_mm: fold 0 8\.0, fold 2 4\.0"):
        ensemble_folds.ensemble_folds(str(runs), str(tmp_path / "model.pt"))


def test_a_folder_without_an_experiment_is_refused(tmp_path):
    with pytest.raises(ExperimentError, match=r"no experiment\.json in .*: make an experiment"):
        ensemble_folds.ensemble_folds(str(tmp_path))
