"""Another cohort is judged by what the ensemble carries, and by nothing of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_run import external_table, make_cohort, make_run

from conftest import make_tiny_cohort
from evaluate_folds import evaluate_folds
from experiments.comparators import clinical_risks
from experiments.evidence import read_run
from experiments.experiment import ExperimentError, evaluation_folder
from experiments.external_cohort import judge_external, predict_external
from scripts.cohorts.cohort import load_cohort
from scripts.evaluation.case_metrics import c_index
from scripts.evaluation.case_table import write_features

SAMPLES = 40


@pytest.fixture(scope="module")
def run(cohort, tmp_path_factory) -> Path:
    """Three folds."""
    return make_run(tmp_path_factory.mktemp("runs") / "partial", cohort)


def test_an_external_cohort_is_judged_with_the_calibration_of_the_ensemble(run, tmp_path):
    judged = read_run(run)
    report = judge_external(judged, external_table(run, tmp_path), tmp_path / "figures_external", 0, SAMPLES)
    assert report["metrics"]["c_index"]["patients"] == 80
    assert report["survival"]["c_index"]["value"] == pytest.approx(report["metrics"]["c_index"]["value"])
    assert report["survival"]["uno_c_index"]["value"] is not None
    assert report["survival"]["brier_skill"]["value"] > 0
    assert abs(report["survival"]["calibration_2y"]["difference"]["value"]) < 0.2
    assert set(report["survival"]["risk_groups"]) == {"median", "tertiles"}
    assert len(report["metrics"]["balanced_accuracy"]["thresholds"]) == 1
    assert report["centres"]["MDA"]["survival"]["c_index"]["value"] > 0.6
    assert "too few" in report["centres"]["CHUP"]["survival"]["reason"]
    assert {entry.get("file") for entry in report["figures"].values()} == {
        f"figures_external/{name}.png"
        for name in ("roc", "dice", "kaplan_meier_median", "kaplan_meier_tertiles", "calibration_2y")
    }
    assert all((tmp_path / entry["file"]).is_file() for entry in report["figures"].values())
    assert "cannot be read" in report["clinical_only"]["c_index"]["reason"]


def test_an_external_cohort_is_judged_beside_what_clinical_values_alone_tell(run, tmp_path):
    """The clinical models are fitted to the experiment's patients and applied to the others."""
    others = make_cohort(tmp_path / "others", seed=5, first=500)
    judged = read_run(run)
    report = judge_external(judged, external_table(run, tmp_path, cohort=others), tmp_path / "figures", 0, SAMPLES)
    clinical = report["clinical_only"]
    table = pd.read_csv(tmp_path / "cases.csv").merge(
        clinical_risks(judged, load_cohort(others).cases), on="PatientID", validate="one_to_one"
    )
    expected = c_index(table.assign(log_hazard=table["clinical_risk"]).dropna(subset=["time"]))
    assert clinical["c_index"]["value"] == pytest.approx(expected)
    assert clinical["model_minus_clinical"]["patients"] == clinical["c_index"]["patients"] == 80
    assert clinical["hpv"]["model_minus_clinical"]["hpv_auc"]["value"] is not None
    assert report["oracle"]["patients"] == 80


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda run, folder: run / "out_of_fold.csv", "is no external cohort: 90 patients", id="its_own"),
        pytest.param(lambda run, folder: external_table(run, folder, 2), "no column log_hazard_fold_2", id="two_folds"),
    ],
)
def test_what_is_no_external_cohort_of_the_ensemble_is_refused(run, tmp_path, make, message):
    with pytest.raises(ExperimentError, match=message):
        judge_external(read_run(run), make(run, tmp_path), tmp_path / "figures", 0, SAMPLES)


def test_a_folder_is_predicted_by_the_folds_together(trained, tiny_cohort, tmp_path) -> None:
    """Two folds that the bundle has trained, and a cohort that neither has seen."""
    run = make_run(tmp_path / "run", tiny_cohort, roi_size=[32, 32, 32], spacing_mm=8.0, num_folds=2)
    for fold in range(2):
        shutil.copytree(trained / "models", run / f"fold_{fold}" / "models", dirs_exist_ok=True)
        training = evaluation_folder(run, fold, "training")
        patients = pd.read_csv(training / "cases.csv")["PatientID"]
        write_features(training, patients, np.random.default_rng(fold).normal(size=(len(patients), 1, 68)))
    others = make_tiny_cohort(tmp_path / "others", patients=4, first=11)
    evaluate_folds(str(run), external=str(others), samples=SAMPLES, examples=False)
    report = json.loads((run / "evaluation" / "metrics.json").read_text())["external"]
    assert report["cases"] == 4
    assert report["dataset_dir"] == str(others)
    assert report["data"].startswith("others: 4 cases")
    table = pd.read_csv(run / "evaluation" / "external" / "evaluation_all" / "cases.csv")
    assert {"log_hazard_fold_0", "log_hazard_fold_1"} <= set(table)
    with pytest.raises(ExperimentError, match=f"{tiny_cohort} is no external cohort: 6 patients"):
        predict_external(read_run(run), tiny_cohort, tmp_path / "model")
    assert not (tmp_path / "model").exists(), "nothing is joined or predicted for it"


def test_training_patients_of_the_one_split_are_no_external_cohort(cohort, tmp_path) -> None:
    """Its held-out cases are the test cases alone: the network has learnt from others."""
    run = make_run(tmp_path / "run", cohort, "ablation")
    table = pd.read_csv(evaluation_folder(run, 0, "training") / "cases.csv")
    table.to_csv(tmp_path / "cases.csv", index=False)
    with pytest.raises(ExperimentError, match=f"is no external cohort: {len(table)} patients are of the experiment"):
        judge_external(read_run(run), tmp_path / "cases.csv", tmp_path / "figures", 0, SAMPLES)


@pytest.mark.parametrize(
    "respell",
    [
        pytest.param(lambda name: name.replace("-", "_"), id="underscore"),
        pytest.param(str.lower, id="lower_case"),
        pytest.param(lambda name: name.replace("-", "\u2013"), id="dash_of_a_word_processor"),
    ],
)
def test_patients_of_the_experiment_are_known_however_their_ids_are_spelled(run, tmp_path, respell) -> None:
    table = pd.read_csv(external_table(run, tmp_path))
    table.loc[0, "PatientID"] = respell(pd.read_csv(run / "out_of_fold.csv")["PatientID"][0])
    table.to_csv(tmp_path / "cases.csv", index=False)
    with pytest.raises(ExperimentError, match="is no external cohort: 1 patients are of the experiment"):
        judge_external(read_run(run), tmp_path / "cases.csv", tmp_path / "figures", 0, SAMPLES)


def test_an_experiment_is_not_compared_with_itself(run, monkeypatch) -> None:
    monkeypatch.chdir(run)
    with pytest.raises(ExperimentError, match="is the experiment itself"):
        evaluate_folds(str(run), compare=".")
    assert not (run / "evaluation").exists()


def test_another_cohort_that_is_not_there_is_refused_before_anything_is_judged(run) -> None:
    with pytest.raises(ExperimentError, match="--external nowhere: there is no such folder or table"):
        evaluate_folds(str(run), external="nowhere")
    assert not (run / "evaluation").exists()
