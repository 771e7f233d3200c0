"""What an experiment is held against is fitted on the same folds and compared on the same patients."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from synthetic_run import SAMPLES, make_run

from experiments import comparators, evidence
from experiments.clinical_cox import evaluate_cox
from experiments.experiment import ExperimentError
from scripts import keys
from scripts.cohorts.clinical import code_indicators
from scripts.cohorts.cohort import load_cohort
from scripts.evaluation.case_metrics import c_index
from scripts.evaluation.clinical_model import ClinicalModelError, shipped


def test_clinical_values_alone_are_fitted_on_the_same_folds(evaluated, evaluated_report, cohort):
    """The same coding, folds and penalty as scripts/fit_clinical.py: each fold's C-index agrees with it."""
    loaded = load_cohort(cohort)
    features = evaluated_report["clinical_only"]["features"]
    judged = pd.read_csv(evaluated / "evaluation" / "cases.csv").dropna(subset=["time"])
    for fold in range(3):
        split = loaded.split("partial", 3, fold, 0)
        groups = [[case for case in part if case[keys.SURV_KNOWN]] for part in (split.training, split.validation)]
        expected = evaluate_cox([tuple(groups)], features, 0.1, 2, 0)
        rows = judged[judged["fold"] == fold]
        assert c_index(rows.assign(log_hazard=rows["clinical_risk"])) == pytest.approx(expected.test.c_index)
    row = evaluated_report["clinical_only"]["model_minus_clinical"]
    assert row["patients"] == 80
    assert row["value"] == pytest.approx(
        evaluated_report["pooled"]["metrics"]["c_index"]["value"]
        - evaluated_report["clinical_only"]["c_index"]["value"]
    )


def test_the_clinical_model_of_the_bundle_is_a_comparator_of_its_own(evaluated, evaluated_report, cohort):
    """Its risks are those of the file for the values in the cohort's tables; it is fitted to none of these cases."""
    loaded = {case[keys.PATIENT_ID]: case for case in load_cohort(cohort).cases}
    judged = pd.read_csv(evaluated / "evaluation" / "cases.csv").dropna(subset=["time"])
    values = [
        {**loaded[patient][keys.CLINICAL_OTHERS], **loaded[patient][keys.CLINICAL]} for patient in judged["PatientID"]
    ]
    found = evaluated_report["clinical_only"]["shipped"]
    expected = c_index(judged.assign(log_hazard=shipped().log_hazard(values)))
    assert found["c_index"]["value"] == pytest.approx(expected)
    assert found["c_index"]["patients"] == len(judged)
    assert found["known"]["hpv"] == sum(case[keys.HPV_KNOWN] for case in loaded.values())
    assert "trained on 3,267 patients of one hospital" in found["model"]
    assert found["model_minus_clinical"]["value"] == pytest.approx(
        evaluated_report["pooled"]["metrics"]["c_index"]["value"] - expected
    )


def test_without_the_clinical_model_the_reason_is_given(evaluated, monkeypatch):
    def gone() -> None:
        raise ClinicalModelError("the clinical model x cannot be read: No such file")

    monkeypatch.setattr(comparators, "shipped", gone)
    found = comparators.add_shipped(evidence.read_run(evaluated), pd.DataFrame(), seed=0, samples=2)
    assert found["c_index"]["reason"] == "the clinical model x cannot be read: No such file"


def test_hpv_of_clinical_values_alone_is_fitted_on_the_same_folds(evaluated, evaluated_report, cohort):
    """Each fold's probabilities are those of a ridge logistic regression by scipy, whose classes weigh alike."""
    loaded = load_cohort(cohort)
    judged = pd.read_csv(evaluated / "evaluation" / "cases.csv").set_index("PatientID")
    features = evaluated_report["clinical_only"]["features"]
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


def test_one_hpv_status_leaves_no_comparator(evaluated, evaluated_copy, monkeypatch):
    """No logistic regression can be fitted where no training patient is negative."""
    judged = evidence.read_run(evaluated_copy)
    parts = comparators.clinical_parts(judged, keys.HPV_KNOWN)
    positive = [([case for case in train if case[keys.HPV] == 1], test) for train, test in parts]
    monkeypatch.setattr(comparators, "clinical_parts", lambda *_: positive)
    cases, about = comparators.add_clinical_hpv(judged, judged.cases, 0, 10)
    assert "clinical_hpv" not in cases
    assert "have one HPV status" in about["hpv_auc"]["reason"] and about["hpv_auc"]["value"] is None


def test_a_cohort_that_is_gone_or_has_changed_leaves_the_comparator_out(evaluated_copy, cohort, tmp_path):
    record = json.loads((evaluated_copy / "experiment.json").read_text())
    for change, reason in (
        ({"dataset_dir": str(tmp_path / "gone")}, "gone"),
        ({"cohort": record["cohort"] | {"fingerprint": "other"}}, "no longer the cohort"),
    ):
        (evaluated_copy / "experiment.json").write_text(json.dumps(record | change))
        judged = evidence.read_run(evaluated_copy)
        cases, about = comparators.add_clinical(judged, judged.cases, 0, SAMPLES)
        assert "clinical_risk" not in cases
        assert about["c_index"]["value"] is None
        assert reason in about["c_index"]["reason"]


def test_two_experiments_are_compared_on_the_patients_of_both(evaluated, cohort, tmp_path):
    other = make_run(tmp_path / "other", cohort, tasks=["surv"], seed=1)
    table = pd.read_csv(other / "out_of_fold.csv")
    table.drop(index=table.index[table["time"].notna()][:4]).to_csv(other / "out_of_fold.csv", index=False)
    first, second = evidence.read_run(evaluated), evidence.read_run(other)
    rows = comparators.compare_runs(first, second, 0, SAMPLES)["differences"]
    assert rows["c_index"]["patients"] == 76
    assert rows["c_index"]["in_one_only"] == 4
    assert rows["dice"]["reason"] == "not a task of both models"
    same = comparators.compare_runs(first, first, 0, SAMPLES)["differences"]
    assert all(row["value"] == row["low"] == row["high"] == 0 for row in same.values())


def test_an_experiment_with_another_outcome_of_a_patient_is_not_compared(evaluated, cohort, tmp_path):
    other = make_run(tmp_path / "other", cohort, seed=1)
    table = pd.read_csv(other / "out_of_fold.csv")
    known = table.index[table["time"].notna()][:2]
    table.loc[known, "time"] += 100
    table.to_csv(other / "out_of_fold.csv", index=False)
    message = rf"other: the two tables give 2 patients a different time, such as {table['PatientID'][known].min()}: its"
    with pytest.raises(ExperimentError, match=message):
        comparators.compare_runs(evidence.read_run(evaluated), evidence.read_run(other), 0, SAMPLES)
