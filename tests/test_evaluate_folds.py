"""The evidence of an experiment as the command leaves it: of folds, pooled and by centre, with counts and reasons."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from synthetic_run import SAMPLES, make_run

from command_line import UsageError

import evaluate_folds as tool
from experiments.evaluation import case_table
from experiments.evidence import read_run
from experiments.experiment import evaluation_folder
from scripts import keys
from scripts.cohorts.cohort import load_cohort
from scripts.evaluation.case_metrics import c_index


def test_pooled_folds_and_centres_have_figures_and_counts(evaluated_report):
    known = evaluated_report["pooled"]["metrics"]["c_index"]
    assert known["patients"] == 80
    assert sum(fold["metrics"]["c_index"]["patients"] for fold in evaluated_report["folds"].values()) == 80
    assert sum(fold["metrics"]["c_index"]["events"] for fold in evaluated_report["folds"].values()) == known["events"]
    assert list(evaluated_report["folds"]) == ["fold 0", "fold 1", "fold 2"]
    assert known["low"] < known["value"] < known["high"]
    small, large = evaluated_report["centres"]["CHUP"], evaluated_report["centres"]["MDA"]
    assert small["metrics"]["c_index"]["reason"].startswith("too few: 3 patients of at least 10")
    assert small["survival"]["reason"].startswith("too few: 3 patients of at least 10")
    assert large["metrics"]["c_index"]["value"] > 0.6
    assert large["survival"]["uno_c_index"]["value"] > 0.6
    assert (
        sum(centre["cases"] for centre in evaluated_report["centres"].values())
        == evaluated_report["pooled"]["cases"]
        == 90
    )
    survival = evaluated_report["pooled"]["survival"]
    assert survival["brier_skill"]["value"] > 0
    assert survival["about"]["patients"] == 80


def test_log_hazards_of_folds_are_pooled_on_one_scale(evaluated, evaluated_report):
    """The folds differ in zero and unit: pooled as they are they would order patients by fold."""
    cases = pd.read_csv(evaluated / "out_of_fold.csv")
    raw = c_index(cases.dropna(subset=["time"]))
    of_folds = [fold["metrics"]["c_index"]["value"] for fold in evaluated_report["folds"].values()]
    assert evaluated_report["pooled"]["metrics"]["c_index"]["value"] == pytest.approx(np.mean(of_folds), abs=0.05)
    assert raw < min(of_folds) - 0.05
    assert evaluated_report["fold_mean"]["c_index"]["mean"] == pytest.approx(np.mean(of_folds))
    training = pd.read_csv(evaluation_folder(evaluated, 1, "training") / "cases.csv")["log_hazard"]
    judged = pd.read_csv(evaluated / "evaluation" / "cases.csv")
    rows = judged[judged["fold"] == 1]
    np.testing.assert_allclose(rows["risk"], (rows["log_hazard"] - training.mean()) / training.std(ddof=0))


def test_changing_a_patients_outcome_leaves_its_own_survival_alone(evaluated, evaluated_copy):
    """No leak: what a case is told about itself does not depend on its outcome."""
    path = evaluated_copy / "out_of_fold.csv"
    table = pd.read_csv(path)
    row = table.index[(table["fold"] == 0) & table["event"].eq(0)][0]
    patient = table.loc[row, "PatientID"]
    table.loc[row, "event"] = 1
    table.loc[row, "hpv"] = 1 - np.nan_to_num(table.loc[row, "hpv"])
    table.to_csv(path, index=False)
    before, after = (case_table(r, r.cases).set_index("PatientID") for r in map(read_run, (evaluated, evaluated_copy)))
    columns = ["risk", "survival_2y", "hpv_threshold"]
    assert before.loc[patient, columns].tolist() == after.loc[patient, columns].tolist()
    others = before["fold"] != 0
    assert not np.allclose(before.loc[others, "survival_2y"], after.loc[others, "survival_2y"], rtol=1e-9)


def test_hpv_less_that_of_clinical_values(evaluated_report):
    hpv, pooled = evaluated_report["clinical_only"]["hpv"], evaluated_report["pooled"]["metrics"]
    for name in ("hpv_auc", "balanced_accuracy"):
        row = hpv["model_minus_clinical"][name]
        assert row["patients"] == pooled[name]["patients"] == hpv[name]["patients"]
        assert row["value"] == pytest.approx(pooled[name]["value"] - hpv[name]["value"])
    assert hpv["balanced_accuracy"]["thresholds"] == [0.5]


def test_the_phantoms_truth_is_the_ceiling(evaluated_report, cohort):
    truth = pd.read_csv(cohort / "truth.csv")
    cases = {case[keys.PATIENT_ID]: case for case in load_cohort(cohort).cases if case[keys.SURV_KNOWN]}
    rows = truth[truth["PatientID"].isin(cases)]
    times, events = ([cases[p][key] for p in rows["PatientID"]] for key in (keys.TIME, keys.EVENT))
    expected = c_index(pd.DataFrame({"time": times, "event": events, "log_hazard": rows["log_hazard"].to_numpy()}))
    assert evaluated_report["oracle"]["value"] == pytest.approx(expected)


def test_figures_are_drawn_with_their_data(evaluated, evaluated_report):
    for name, entry in evaluated_report["figures"].items():
        png = evaluated / "evaluation" / entry["file"]
        assert png.read_bytes().startswith(b"\x89PNG")
        assert json.loads(png.with_suffix(".json").read_text())["content"], name
    groups = json.loads((evaluated / "evaluation/figures/kaplan_meier_tertiles.json").read_text())["content"]
    assert sum(curve["patients"] for curve in groups["curves"]) == 80
    assert groups["log_rank"]["value"] < 0.01


def test_the_ablation_is_judged_on_its_test_cases_with_what_the_validation_cases_tell(cohort, tmp_path):
    folder = make_run(tmp_path / "surv", cohort, "ablation", tasks=["surv"])
    tool.evaluate_folds(str(folder), samples=SAMPLES, examples=False)
    report = json.loads((folder / "evaluation" / "metrics.json").read_text())
    judged = read_run(folder)
    validation = pd.read_csv(evaluation_folder(folder, 0) / "cases.csv")
    assert not set(judged.cases["PatientID"]) & set(validation["PatientID"])
    assert judged.calibrations[0].patients == validation["time"].notna().sum()
    assert report["held_out"] == "test"
    assert report["data"].startswith(f"{len(judged.cases)} of 90 ")
    assert report["figures"]["dice"]["reason"] == "not a task of this model"
    assert report["pooled"]["metrics"]["hpv_auc"]["reason"] == "not a task of this model"


def test_without_survival_its_figures_say_why(cohort, tmp_path, capsys):
    folder = make_run(tmp_path / "seg", cohort, tasks=["seg"])
    tool.evaluate_folds(str(folder), samples=SAMPLES, examples=False)
    report = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert report["pooled"]["survival"]["reason"] == "survival is not a task of this model"
    assert report["figures"]["kaplan_meier_median"]["reason"] == "survival is not a task of this model"
    assert report["clinical_only"]["c_index"]["value"] is not None
    assert "not a task of this model" in capsys.readouterr().out


def test_a_bootstrap_without_draws_is_refused(evaluated):
    with pytest.raises(UsageError, match="--samples is the number of draws, 1 or more; got 0"):
        tool.evaluate_folds(str(evaluated), samples=0)
