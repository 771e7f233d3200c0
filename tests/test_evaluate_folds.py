"""The evidence of an experiment: nothing is judged by what was fitted to it, and every figure says why or how many."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import evaluate_folds as tool
import numpy as np
import pandas as pd
import pytest
from compare_clinical import evaluate_coding
from experiment import ExperimentError, evaluation_folder
from scipy.optimize import minimize
from synthetic_run import external_table, make_cohort, make_run

from scripts import keys
from scripts.clinical import code_indicators
from scripts.cohort import load_cohort
from scripts.evaluation import c_index
from scripts.survival import Calibration, fit_calibration

SAMPLES = 40


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def run(cohort, tmp_path_factory) -> Path:
    """Three folds, evaluated."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "partial", cohort)
    tool.evaluate_folds(str(folder), samples=SAMPLES)
    return folder


@pytest.fixture(scope="module")
def report(run) -> dict:
    return json.loads((run / "evaluation" / "metrics.json").read_text())


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """The experiment to be spoilt."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_pooled_folds_and_centres_have_figures_and_counts(report):
    known = report["pooled"]["metrics"]["c_index"]
    assert known["patients"] == 80
    assert sum(fold["metrics"]["c_index"]["patients"] for fold in report["folds"].values()) == 80
    assert sum(fold["metrics"]["c_index"]["events"] for fold in report["folds"].values()) == known["events"]
    assert list(report["folds"]) == ["fold 0", "fold 1", "fold 2"]
    assert known["low"] < known["value"] < known["high"]
    small, large = report["centres"]["CHUP"], report["centres"]["MDA"]
    assert small["metrics"]["c_index"]["reason"].startswith("too few: 3 patients of at least 10")
    assert small["survival"]["reason"].startswith("too few: 3 patients of at least 10")
    assert large["metrics"]["c_index"]["value"] > 0.6
    assert large["survival"]["uno_c_index"]["value"] > 0.6
    assert sum(centre["cases"] for centre in report["centres"].values()) == report["pooled"]["cases"] == 90
    survival = report["pooled"]["survival"]
    assert survival["brier_skill"]["value"] > 0
    assert survival["about"]["patients"] == 80


def test_log_hazards_of_folds_are_pooled_on_one_scale(run, report):
    """The folds differ in zero and unit: pooled as they are they would order patients by fold."""
    cases = pd.read_csv(run / "out_of_fold.csv")
    raw = c_index(cases.dropna(subset=["time"]))
    of_folds = [fold["metrics"]["c_index"]["value"] for fold in report["folds"].values()]
    assert report["pooled"]["metrics"]["c_index"]["value"] == pytest.approx(np.mean(of_folds), abs=0.05)
    assert raw < min(of_folds) - 0.05
    assert report["fold_mean"]["c_index"]["mean"] == pytest.approx(np.mean(of_folds))
    training = pd.read_csv(evaluation_folder(run, 1, "training") / "cases.csv")["log_hazard"]
    judged = pd.read_csv(run / "evaluation" / "cases.csv")
    rows = judged[judged["fold"] == 1]
    np.testing.assert_allclose(rows["risk"], (rows["log_hazard"] - training.mean()) / training.std(ddof=0))


def test_calibration_cuts_and_thresholds_come_from_the_other_folds(run):
    judged = tool.read_run(run)
    for fold in range(3):
        others = judged.cases[(judged.cases["fold"] != fold) & judged.cases["time"].notna()]
        expected = fit_calibration(others["risk"], others["time"], others["event"])
        assert judged.calibrations[fold] == expected
        threshold = judged.cases.loc[judged.cases["fold"] == fold, "hpv_threshold"].unique()
        chosen = tool.choose_hpv_threshold(judged.cases[judged.cases["fold"] != fold])["value"]
        assert threshold == [chosen]


def test_changing_a_patients_outcome_leaves_its_own_survival_alone(run, copy):
    """No leak: what a case is told about itself does not depend on its outcome."""
    path = copy / "out_of_fold.csv"
    table = pd.read_csv(path)
    row = table.index[(table["fold"] == 0) & table["event"].eq(0)][0]
    patient = table.loc[row, "PatientID"]
    table.loc[row, "event"] = 1
    table.loc[row, "hpv"] = 1 - np.nan_to_num(table.loc[row, "hpv"])
    table.to_csv(path, index=False)
    before, after = (tool.case_table(r, r.cases).set_index("PatientID") for r in map(tool.read_run, (run, copy)))
    columns = ["risk", "survival_2y", "hpv_threshold"]
    assert before.loc[patient, columns].tolist() == after.loc[patient, columns].tolist()
    others = before["fold"] != 0
    assert not np.allclose(before.loc[others, "survival_2y"], after.loc[others, "survival_2y"], rtol=1e-9)


def test_without_training_predictions_the_scale_is_of_the_held_out_cases_and_says_so(copy):
    shutil.rmtree(evaluation_folder(copy, 2, "training"))
    judged = tool.read_run(copy)
    risk = judged.cases.loc[judged.cases["fold"] == 2, "risk"]
    assert risk.mean() == pytest.approx(0)
    assert "fold 2: on the held-out cases themselves" in judged.normalisation


def test_clinical_values_alone_are_fitted_on_the_same_folds(run, report, cohort):
    """The same coding, folds and penalty as scripts/compare_clinical.py: each fold's C-index agrees with it."""
    loaded = load_cohort(cohort)
    features = report["clinical_only"]["features"]
    judged = pd.read_csv(run / "evaluation" / "cases.csv").dropna(subset=["time"])
    for fold in range(3):
        split = loaded.split("partial", 3, fold, 0)
        groups = [[case for case in part if case[keys.SURV_KNOWN]] for part in (split.training, split.validation)]
        expected = evaluate_coding([tuple(groups)], features, "indicators", "training_median", 0.1, 2, 0)
        rows = judged[judged["fold"] == fold]
        assert c_index(rows.assign(log_hazard=rows["clinical_risk"])) == pytest.approx(expected.test.c_index)
    row = report["clinical_only"]["model_minus_clinical"]
    assert row["patients"] == 80
    assert row["value"] == pytest.approx(
        report["pooled"]["metrics"]["c_index"]["value"] - report["clinical_only"]["c_index"]["value"]
    )


def test_hpv_of_clinical_values_alone_is_fitted_on_the_same_folds(run, report, cohort):
    """Each fold's probabilities are those of a ridge logistic regression by scipy, whose classes weigh alike."""
    loaded = load_cohort(cohort)
    judged = pd.read_csv(run / "evaluation" / "cases.csv").set_index("PatientID")
    features = report["clinical_only"]["features"]
    for fold in range(3):
        split = loaded.split("partial", 3, fold, 0)
        parts = [[case for case in part if case[keys.HPV_KNOWN]] for part in (split.training, split.validation)]
        coded = [
            np.array([code_indicators(case[keys.CLINICAL], features, np.nan) for case in part], float) for part in parts
        ]
        median = pd.DataFrame(coded[0]).median().fillna(0).to_numpy()
        filled = [np.where(np.isnan(values), median, values) for values in coded]
        mean, deviation = filled[0].mean(axis=0), filled[0].std(axis=0)
        x = [(values - mean) / np.where(deviation > 0, deviation, 1) for values in filled]
        status = np.array([case[keys.HPV] for case in parts[0]], float)
        weight = np.where(status > 0, 0.5 / status.mean(), 0.5 / (1 - status.mean()))

        def objective(w, x=x[0], status=status, weight=weight):
            score = x @ w[1:] + w[0]
            return (weight * (np.logaddexp(0, score) - status * score)).sum() + 0.5 * (w[1:] ** 2).sum()

        w = minimize(objective, np.zeros(x[0].shape[1] + 1), method="BFGS").x
        expected = 1 / (1 + np.exp(-(x[1] @ w[1:] + w[0])))
        found = judged.loc[[case[keys.PATIENT_ID] for case in parts[1]], "clinical_hpv"]
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_hpv_less_that_of_clinical_values(report):
    hpv, pooled = report["clinical_only"]["hpv"], report["pooled"]["metrics"]
    for name in ("hpv_auc", "balanced_accuracy"):
        row = hpv["model_minus_clinical"][name]
        assert row["patients"] == pooled[name]["patients"] == hpv[name]["patients"]
        assert row["value"] == pytest.approx(pooled[name]["value"] - hpv[name]["value"])
    assert hpv["balanced_accuracy"]["thresholds"] == [0.5]


def test_one_hpv_status_leaves_no_comparator(run, copy, monkeypatch):
    """No logistic regression can be fitted where no training patient is negative."""
    judged = tool.read_run(copy)
    parts = tool.clinical_parts(judged, keys.HPV_KNOWN)
    positive = [([case for case in train if case[keys.HPV] == 1], test) for train, test in parts]
    monkeypatch.setattr(tool, "clinical_parts", lambda *_: positive)
    cases, about = tool.add_clinical_hpv(judged, judged.cases, 0, 10)
    assert "clinical_hpv" not in cases
    assert "have one HPV status" in about["hpv_auc"]["reason"] and about["hpv_auc"]["value"] is None


def test_the_phantoms_truth_is_the_ceiling(report, cohort):
    truth = pd.read_csv(cohort / "truth.csv")
    cases = {case[keys.PATIENT_ID]: case for case in load_cohort(cohort).cases if case[keys.SURV_KNOWN]}
    rows = truth[truth["PatientID"].isin(cases)]
    times, events = ([cases[p][key] for p in rows["PatientID"]] for key in (keys.TIME, keys.EVENT))
    expected = c_index(pd.DataFrame({"time": times, "event": events, "log_hazard": rows["log_hazard"].to_numpy()}))
    assert report["oracle"]["value"] == pytest.approx(expected)


def test_figures_are_drawn_with_their_data(run, report):
    for name, entry in report["figures"].items():
        png = run / "evaluation" / entry["file"]
        assert png.read_bytes().startswith(b"\x89PNG")
        assert json.loads(png.with_suffix(".json").read_text())["content"], name
    groups = json.loads((run / "evaluation/figures/kaplan_meier_tertiles.json").read_text())["content"]
    assert sum(curve["patients"] for curve in groups["curves"]) == 80
    assert groups["log_rank"]["value"] < 0.01


def test_a_cohort_that_is_gone_or_has_changed_leaves_the_comparator_out(copy, cohort, tmp_path):
    record = json.loads((copy / "experiment.json").read_text())
    for change, reason in (
        ({"dataset_dir": str(tmp_path / "gone")}, "gone"),
        ({"cohort": record["cohort"] | {"fingerprint": "other"}}, "no longer the cohort"),
    ):
        (copy / "experiment.json").write_text(json.dumps(record | change))
        judged = tool.read_run(copy)
        cases, about = tool.add_clinical(judged, judged.cases, 0, SAMPLES)
        assert "clinical_risk" not in cases
        assert about["c_index"]["value"] is None
        assert reason in about["c_index"]["reason"]


def test_full_label_cases_of_every_fold_count_once(cohort, tmp_path):
    folder = make_run(tmp_path / "full", cohort, "full", num_folds=3)
    judged = tool.read_run(folder)
    table = pd.read_csv(folder / "out_of_fold.csv")
    repeated = table["PatientID"].value_counts()
    assert (judged.cases["PatientID"].value_counts() == 1).all()
    assert set(judged.cases.loc[judged.cases["fold"] == tool.SHARED, "PatientID"]) == set(repeated[repeated > 1].index)
    assert judged.folds == [0, 1, 2]
    assert "are predicted by several folds" in judged.notes[0]
    assert isinstance(judged.calibrations[tool.SHARED], Calibration)


def test_the_ablation_is_judged_on_its_test_cases_with_what_the_validation_cases_tell(cohort, tmp_path):
    folder = make_run(tmp_path / "surv", cohort, "ablation", tasks=["surv"])
    tool.evaluate_folds(str(folder), samples=SAMPLES)
    report = json.loads((folder / "evaluation" / "metrics.json").read_text())
    judged = tool.read_run(folder)
    validation = pd.read_csv(evaluation_folder(folder, 0) / "cases.csv")
    assert not set(judged.cases["PatientID"]) & set(validation["PatientID"])
    assert judged.calibrations[0].patients == validation["time"].notna().sum()
    assert report["held_out"] == "test"
    assert report["figures"]["dice"]["reason"] == "not a task of this model"
    assert report["pooled"]["metrics"]["hpv_auc"]["reason"] == "not a task of this model"


def test_a_centre_left_out_names_its_fold(cohort, tmp_path):
    folder = make_run(tmp_path / "centres", cohort, "leave_one_centre_out")
    judged = tool.read_run(folder)
    assert [judged.name(fold) for fold in judged.folds] == ["CHUM", "CHUP", "MDA"]


def test_without_survival_its_figures_say_why(cohort, tmp_path, capsys):
    folder = make_run(tmp_path / "seg", cohort, tasks=["seg"])
    tool.evaluate_folds(str(folder), samples=SAMPLES)
    report = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert report["pooled"]["survival"]["reason"] == "survival is not a task of this model"
    assert report["figures"]["kaplan_meier_median"]["reason"] == "survival is not a task of this model"
    assert report["clinical_only"]["c_index"]["value"] is not None
    assert "not a task of this model" in capsys.readouterr().out


def test_two_experiments_are_compared_on_the_patients_of_both(run, cohort, tmp_path):
    other = make_run(tmp_path / "other", cohort, tasks=["surv"], seed=1)
    table = pd.read_csv(other / "out_of_fold.csv")
    table.drop(index=table.index[table["time"].notna()][:4]).to_csv(other / "out_of_fold.csv", index=False)
    first, second = tool.read_run(run), tool.read_run(other)
    rows = tool.compare_runs(first, second, 0, SAMPLES)["differences"]
    assert rows["c_index"]["patients"] == 76
    assert rows["c_index"]["in_one_only"] == 4
    assert rows["dice"]["reason"] == "not a task of both models"
    same = tool.compare_runs(first, first, 0, SAMPLES)["differences"]
    assert all(row["value"] == row["low"] == row["high"] == 0 for row in same.values())


def test_an_external_cohort_is_judged_with_the_calibration_of_the_ensemble(copy, tmp_path):
    judged = tool.read_run(copy)
    report = tool.judge_external(judged, external_table(copy, tmp_path), 0, SAMPLES)
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
    assert all((copy / "evaluation" / entry["file"]).is_file() for entry in report["figures"].values())
    assert "cannot be read" in report["clinical_only"]["c_index"]["reason"]


def test_an_external_cohort_is_judged_beside_what_clinical_values_alone_tell(copy, tmp_path):
    """The clinical models are fitted to the experiment's patients and applied to the others."""
    others = make_cohort(tmp_path / "others", seed=5, first=500)
    judged = tool.read_run(copy)
    report = tool.judge_external(judged, external_table(copy, tmp_path, cohort=others), 0, SAMPLES)
    clinical = report["clinical_only"]
    table = pd.read_csv(tmp_path / "cases.csv").merge(
        tool.clinical_risks(judged, load_cohort(others).cases), on="PatientID", validate="one_to_one"
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
        tool.judge_external(tool.read_run(run), make(run, tmp_path), 0, SAMPLES)


def test_few_events_leave_the_probabilities_out(copy):
    path = copy / "out_of_fold.csv"
    table = pd.read_csv(path)
    table.loc[table.index[table["event"].eq(1)][6:], "event"] = 0
    table.to_csv(path, index=False)
    judged = tool.read_run(copy)
    report = tool.judge(judged, judged.cases, judged.cases, 0, SAMPLES)
    assert "no absolute risk" in report["survival"]["brier_skill"]["reason"]
    assert report["survival"]["risk_groups"] == {}
    assert math.isfinite(report["metrics"]["c_index"]["value"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda run: (run / "experiment.json").unlink(), "make an experiment with", id="no_experiment"),
        pytest.param(lambda run: (run / "out_of_fold.csv").unlink(), "no fold of .* is finished", id="no_fold"),
        pytest.param(
            lambda run: pd.read_csv(run / "out_of_fold.csv").drop(columns="hpv").to_csv(run / "out_of_fold.csv"),
            "has no column hpv",
            id="no_column",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(copy, spoil, message):
    spoil(copy)
    with pytest.raises(ExperimentError, match=message):
        tool.read_run(copy)


def test_the_same_log_hazard_for_all_cannot_be_brought_to_a_scale(copy):
    path = evaluation_folder(copy, 0, "training") / "cases.csv"
    pd.read_csv(path).assign(log_hazard=1.0).to_csv(path, index=False)
    with pytest.raises(ValueError, match="the same log hazard"):
        tool.read_run(copy)


def test_one_fold_has_nobody_to_be_calibrated_on(copy):
    table = pd.read_csv(copy / "out_of_fold.csv")
    table[table["fold"] == 0].to_csv(copy / "out_of_fold.csv", index=False)
    judged = tool.read_run(copy)
    assert judged.calibrations == {0: tool.NO_CALIBRATION}
    report = tool.judge(judged, judged.cases, judged.cases, 0, SAMPLES)
    assert "to calibrate on" in report["survival"]["integrated_brier"]["reason"]
    assert judged.cases["hpv_threshold"].unique() == [0.5]
    assert "HPV threshold of fold 0 is 0.5" in judged.notes[0]
