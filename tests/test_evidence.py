"""Held-out predictions on one scale: nothing is judged by what was fitted to it."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_run import make_run

from experiments import evidence
from experiments.ensemble import choose_hpv_threshold
from experiments.experiment import ExperimentError, evaluation_folder
from scripts.evaluation.survival import Calibration, fit_calibration

SAMPLES = 40


@pytest.fixture(scope="module")
def run(cohort, tmp_path_factory) -> Path:
    """Three folds."""
    return make_run(tmp_path_factory.mktemp("runs") / "partial", cohort)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """The experiment to be spoilt."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_calibration_cuts_and_thresholds_come_from_the_other_folds(run):
    judged = evidence.read_run(run)
    days = np.array([365.25, 730.5])
    survival = evidence.survival_of(judged.cases, judged.calibrations)(days)
    for fold in range(3):
        others = judged.cases[(judged.cases["fold"] != fold) & judged.cases["time"].notna()]
        expected = fit_calibration(others["risk"], others["time"], others["event"])
        assert judged.calibrations[fold] == expected
        rows = judged.cases["fold"] == fold
        np.testing.assert_array_equal(survival[rows], expected.survival(judged.cases.loc[rows, "risk"], days))
        threshold = judged.cases.loc[judged.cases["fold"] == fold, "hpv_threshold"].unique()
        chosen = choose_hpv_threshold(judged.cases[judged.cases["fold"] != fold])["value"]
        assert threshold == [chosen]


def test_folds_of_several_versions_are_noted(copy):
    """An experiment that was resumed after an update; folds of earlier versions do not say by which they were made."""
    assert not any("different versions" in note for note in evidence.read_run(copy).notes)
    record = json.loads((copy / "experiment.json").read_text())
    record["versions"]["bundle"] = "0.8.0"
    record["folds"]["2"]["versions"] = record["versions"] | {"bundle": "0.9.1"}
    (copy / "experiment.json").write_text(json.dumps(record))
    note = "the folds were made by different versions of bundle: fold 0 by 0.8.0, fold 1 by 0.8.0, fold 2 by 0.9.1"
    assert note in evidence.read_run(copy).notes


@pytest.mark.parametrize(
    ("protocol", "settings", "fitted"),
    [
        pytest.param("partial", {"keep_epoch": "best"}, ["epoch"], id="best"),
        pytest.param("partial", {"keep_epoch": "last", "early_stop_patience": 0}, [], id="last"),
        pytest.param("ablation", {"keep_epoch": "best"}, [], id="best_with_test_cases"),
    ],
)
def test_it_is_said_where_the_epoch_was_chosen_on_the_cases(cohort, tmp_path, protocol, settings, fitted):
    """Not with test cases, which no epoch was chosen on."""
    judged = evidence.read_run(make_run(tmp_path / "run", cohort, protocol, **settings))
    said = evidence.selection_of(judged.record)
    assert (said["keep_epoch"], said["judged"]) == (settings["keep_epoch"], judged.record["held_out"])
    assert said["fitted_to_these_cases"] == fitted
    assert [note for note in judged.notes if "the metrics are too optimistic" in note] == [said["statement"]] * len(
        fitted
    )


def test_without_training_predictions_the_scale_is_of_the_held_out_cases_and_says_so(copy):
    shutil.rmtree(evaluation_folder(copy, 2, "training"))
    judged = evidence.read_run(copy)
    risk = judged.cases.loc[judged.cases["fold"] == 2, "risk"]
    assert risk.mean() == pytest.approx(0)
    assert "fold 2: on the held-out cases themselves" in judged.normalisation


def test_ids_are_read_as_they_are_written(copy):
    path = copy / "out_of_fold.csv"
    table = pd.read_csv(path)
    table.loc[:2, "PatientID"] = ["NA", "007", "1.10"]
    table.to_csv(path, index=False)
    assert evidence.read_cases(path)["PatientID"].tolist()[:3] == ["NA", "007", "1.10"]


CASES = "PatientID,centre,time,event,hpv,log_hazard\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "cannot be read as a table: No columns", id="empty"),
        pytest.param(b"\x89PNG\xff\x00", "cannot be read as a table: ", id="picture"),
        pytest.param(
            "PatientID,a\n1,2\n", "has no column centre, time, event, hpv: is it a cases.csv", id="other_table"
        ),
        pytest.param(CASES, "has no row: no case was evaluated", id="no_row"),
        pytest.param(CASES + "P1,A,soon,1,,0.5\n", "column time holds something else than numbers", id="word"),
        pytest.param(CASES + "P1,A,9,1,,high\n", "column log_hazard holds something else than numbers", id="risk"),
        pytest.param(CASES + "P1,A,9,1,,0\n" * 2, r"1 patients stand there twice \(P1 ...\)", id="twice"),
    ],
)
def test_what_is_no_table_of_cases_is_refused(tmp_path, text, message):
    path = tmp_path / "cases.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ExperimentError, match=message):
        evidence.read_cases(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{", r"experiment\.json cannot be read: ", id="half"),
        pytest.param("{}", r"has no entry 'command': is it of scripts/train_folds\.py", id="of_something_else"),
        pytest.param("[]", r"has no entry 'command'", id="list"),
    ],
)
def test_what_is_no_record_of_an_experiment_is_refused(tmp_path, text, message):
    (tmp_path / "experiment.json").write_text(text)
    with pytest.raises(ExperimentError, match=message):
        evidence.read_run(tmp_path)


def test_full_label_cases_of_every_fold_count_once(cohort, tmp_path):
    folder = make_run(tmp_path / "full", cohort, "full", num_folds=3)
    judged = evidence.read_run(folder)
    table = pd.read_csv(folder / "out_of_fold.csv")
    repeated = table["PatientID"].value_counts()
    assert (judged.cases["PatientID"].value_counts() == 1).all()
    assert set(judged.cases.loc[judged.cases["fold"] == evidence.SHARED, "PatientID"]) == set(
        repeated[repeated > 1].index
    )
    assert judged.folds == [0, 1, 2]
    assert "are predicted by several folds" in judged.notes[0]
    assert isinstance(judged.calibrations[evidence.SHARED], Calibration)


def test_a_centre_left_out_names_its_fold(cohort, tmp_path):
    folder = make_run(tmp_path / "centres", cohort, "leave_one_centre_out")
    judged = evidence.read_run(folder)
    assert [judged.name(fold) for fold in judged.folds] == ["CHUM", "CHUP", "MDA"]


def test_few_events_leave_the_probabilities_out(copy):
    path = copy / "out_of_fold.csv"
    table = pd.read_csv(path)
    table.loc[table.index[table["event"].eq(1)][6:], "event"] = 0
    table.to_csv(path, index=False)
    judged = evidence.read_run(copy)
    report = evidence.judge(judged, judged.cases, judged.cases, 0, SAMPLES)
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
        evidence.read_run(copy)


def test_a_fold_with_the_same_log_hazard_for_all_is_judged_with_a_note(copy):
    """Its network ranks nobody, as one that finds no tumour; mask and HPV status are judged all the same."""
    path, pooled = evaluation_folder(copy, 0, "training") / "cases.csv", copy / "out_of_fold.csv"
    pd.read_csv(path).assign(log_hazard=1.0).to_csv(path, index=False)
    table = pd.read_csv(pooled)
    table.loc[table["fold"] == 0, "log_hazard"] = 1.0
    table.to_csv(pooled, index=False)
    judged = evidence.read_run(copy)
    assert (judged.cases.loc[judged.cases["fold"] == 0, "risk"] == 0).all()
    assert any(re.fullmatch(r"fold 0 gives all \d+ patients .* the same log hazard", note) for note in judged.notes)
    fold = judged.cases[judged.cases["fold"] == 0]
    metrics = evidence.judge(judged, fold, judged.others(0), 0, SAMPLES)["metrics"]
    assert metrics["c_index"]["value"] == 0.5
    assert metrics["dice"]["value"] is not None and metrics["hpv_auc"]["value"] is not None


def test_one_fold_has_nobody_to_be_calibrated_on(copy):
    table = pd.read_csv(copy / "out_of_fold.csv")
    table[table["fold"] == 0].to_csv(copy / "out_of_fold.csv", index=False)
    judged = evidence.read_run(copy)
    assert judged.calibrations == {0: evidence.NO_CALIBRATION}
    report = evidence.judge(judged, judged.cases, judged.cases, 0, SAMPLES)
    assert "to calibrate on" in report["survival"]["integrated_brier"]["reason"]
    assert judged.cases["hpv_threshold"].unique() == [0.5]
    assert "HPV threshold of fold 0 is 0.5" in judged.notes[0]
