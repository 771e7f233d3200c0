"""The learning study: what is run in which order, what is refused, and metrics that are those of the runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lifelines.utils import concordance_index
from synthetic_run import make_cohort, make_run

from experiments.experiment import DEEP, NESTED, ExperimentError, make_plan
from research import study as study_plan
from research import study_learning as tool
from research import study_report
from scripts import keys
from scripts.cohorts.cohort import Cohort, load_cohort
from scripts.model.ensemble import complete

DEMO = ("configs/demo.json",)
SAMPLES = 30

# Stands in for train_folds.py: notes how it was called and leaves what a finished run leaves, or does as it is told.
FAKE = """
import json, os, pathlib, sys, time
home = pathlib.Path(__file__).parent
given = dict(option[2:].split("=", 1) for option in sys.argv[1:])
name = pathlib.Path(given["output_dir"]).name
facts = {"name": name, "given": given, "threads": os.environ["OMP_NUM_THREADS"], "at": time.time()}
with (home / "calls.txt").open("a") as file:
    file.write(json.dumps(facts) + "\\n")
if (home / f"fail_{name}").exists():
    print("error: no such luck")
    sys.exit(3)
if (home / "hang").exists():
    (home / "pid").write_text(str(os.getpid()))
    time.sleep(100)
"""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def runs(cohort, tmp_path_factory) -> Path:
    """Finished runs: the base and ``equal`` with two seeds, ``surv`` and ``full`` with one."""
    folder = tmp_path_factory.mktemp("study")
    for noise, (name, split_seed, protocol, options) in enumerate(
        [
            ("base", 0, "partial", {}),
            ("base", 1, "partial", {}),
            ("equal", 0, "partial", {"train#loss#task_weights": None}),
            ("equal", 1, "partial", {"train#loss#task_weights": None}),
            ("surv", 0, "partial", {"tasks": ["surv"]}),
            ("full", 0, "full", {}),
        ]
    ):
        options = {**DEEP, **options}
        make_run(folder / f"{name}_s{split_seed}", cohort, protocol, noise, DEMO, split_seed, **options)
    return folder


def make_study(
    cohort: Path, folder: Path, variants="base", seeds=(0,), folds=(0,), test_dir=None, **overrides
) -> study_plan.Study:
    names, other = tuple(variants.split(",")), str(test_dir) if test_dir else None
    return study_plan.Study(folder, str(cohort), load_cohort(cohort).fingerprint, names, seeds, folds, overrides, other)


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    home = tmp_path / "fake"
    home.mkdir()
    (home / "train_folds.py").write_text(FAKE)
    monkeypatch.setattr(study_plan, "TRAIN_TOOL", home / "train_folds.py")
    monkeypatch.setattr(tool, "POLL_SECONDS", 0.02)
    return home


def calls(home: Path) -> list[dict]:
    path = home / "calls.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# --- what is run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", study_plan.VARIANTS)
def test_every_variant_is_an_experiment_that_differs_from_what_it_is_compared_with(cohort, tmp_path, variant):
    study = make_study(cohort, tmp_path, variant)
    settings = study.settings(variant, 0)
    protocol = settings.pop("protocol", "partial")
    files = study.config_files(variant)
    plan = make_plan(str(cohort), protocol, files, (0,), str(tmp_path), settings, "")
    short = {place: name for name, place in NESTED.items()}
    assert {name: plan.config[short.get(name, name)] for name in settings} == settings
    assert plan.config_files[1] == "configs/demo.json"
    if variant != study_plan.BASE:
        against = study_plan.VARIANTS[variant].against
        other = make_plan(str(cohort), "partial", DEMO, (0,), str(tmp_path), study.settings(against, 0), "")
        assert plan.config != other.config


def test_runs_go_variant_by_variant_before_the_next_seed(cohort, tmp_path):
    study = make_study(cohort, tmp_path, "flow,base", (3, 1))
    assert study.runs == [("flow", 3), ("base", 3), ("flow", 1), ("base", 1)]


def test_each_run_is_a_command_with_its_own_folder_and_threads(cohort, tmp_path, fake):
    (fake / "fail_equal_s0").touch()
    study = make_study(cohort, tmp_path / "study", "equal,flow", (0, 2), (0, 1), epochs=3)
    assert tool.run_study(study, jobs=1, threads=2) == ["equal_s0"]
    assert [call["name"] for call in calls(fake)] == ["equal_s0", "flow_s0", "equal_s2", "flow_s2"]
    assert {call["threads"] for call in calls(fake)} == {"2"}
    first, second = (call["given"] for call in calls(fake)[:2])
    assert first["train#loss#task_weights"] == "None" and "train#loss#task_weights" not in second
    assert second["network_def#network#mask_gradient"] == "flow" and second["epochs"] == "3" and second["seed"] == "0"
    assert second["folds"] == "[0, 1]" and second["config_file"] == "['configs/demo.json']"
    assert second["dataset_dir"] == str(cohort) and second["cache_dir"] == first["cache_dir"]
    assert not (tmp_path / "study" / "equal_s0" / "run.json").exists()
    record = json.loads((tmp_path / "study" / "flow_s2" / "run.json").read_text())
    assert record["threads"] == 2 and record["cores"] >= 1 and record["cpu"]
    assert "no such luck" in (tmp_path / "study" / "logs" / "equal_s0.txt").read_text()


def test_jobs_run_at_once(cohort, tmp_path, fake):
    (fake / "train_folds.py").write_text(FAKE + "\ntime.sleep(1)\n")
    assert tool.run_study(make_study(cohort, tmp_path / "study", "base,flow"), jobs=2, threads=1) == []
    begun = [call["at"] for call in calls(fake)]
    assert len(begun) == 2 and abs(begun[0] - begun[1]) < 1


def test_finished_runs_are_left_alone_and_the_others_run(cohort, runs, fake, capsys):
    study = make_study(cohort, runs, "base,surv", (0, 1))
    assert tool.run_study(study, jobs=1, threads=1) == []
    assert [call["name"] for call in calls(fake)] == ["surv_s1"]
    assert "base_s0: finished before" in capsys.readouterr().err


def test_a_run_of_another_name_or_cohort_is_refused(cohort, runs, tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    for name, kept in (("flow_s0", "base_s0"), ("base_s0", "base_s0"), ("base_s1", "base_s0")):
        (folder / name).symlink_to(runs / kept)
    with pytest.raises(ExperimentError, match="flow_s0 is not the run that its name says: mask_gradient 'stop' inst"):
        tool.run_study(make_study(cohort, folder, "flow"), 1, 1)
    with pytest.raises(ExperimentError, match="seed 0 instead of 1"):
        tool.run_study(make_study(cohort, folder, seeds=(1,)), 1, 1)
    with pytest.raises(ExperimentError, match="epochs 24 instead of 5"):
        tool.run_study(make_study(cohort, folder, epochs=5), 1, 1)
    other = make_cohort(tmp_path / "other", patients=30)
    with pytest.raises(ExperimentError, match="another cohort"):
        tool.run_study(make_study(other, folder), 1, 1)


def write_old_run(runs: Path, folder: Path, *options: str) -> None:
    """The record of a run of the base from before these options existed."""
    folder.mkdir()
    record = json.loads((runs / "base_s0" / "experiment.json").read_text())
    for option in options:
        del record["settings"][option]
    (folder / "experiment.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("options", "variant", "message"),
    [
        pytest.param(["mask_gradient"], "flow", "mask_gradient 'stop' instead of 'flow'", id="not_the_variants_option"),
        pytest.param(  # it did not take over a default that came later: survival was read from deep features
            {*complete({})} - {"lesion_peak"},
            "burden",
            r"survival_inputs \['deep'\] instead of \['burden'\]",
            id="not_a_later_default",
        ),
    ],
)
def test_a_run_from_before_an_option_existed_did_what_was_done_then(cohort, runs, tmp_path, options, variant, message):
    for name in ("base", variant):
        write_old_run(runs, tmp_path / f"{name}_s0", *options)
    study_plan.check_run(make_study(cohort, tmp_path), "base", 0)
    with pytest.raises(ExperimentError, match=message):
        study_plan.check_run(make_study(cohort, tmp_path, variant), variant, 0)


def test_masks_of_a_run_from_before_lesion_peak_are_not_mixed_with_others(cohort, runs, tmp_path):
    write_old_run(runs, tmp_path / "base_s0", "lesion_peak")
    with pytest.raises(ExperimentError, match=r"lesion_peak 0\.5 instead of 0\.7"):
        study_plan.check_run(make_study(cohort, tmp_path), "base", 0)


def test_a_signal_ends_the_runs(cohort, tmp_path, fake):
    (fake / "hang").touch()

    def interrupt():
        while not (fake / "pid").is_file() or not (fake / "pid").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        tool.study_learning(str(cohort), str(tmp_path / "study"), variants="base", seeds=0)
    assert ended.value.code == 128 + signal.SIGTERM
    child = Path(f"/proc/{(fake / 'pid').read_text()}/stat")
    assert not child.is_file() or child.read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"variants": "base,floww"}, "no variant floww; there are base", id="variant"),
        pytest.param({"jobs": 0}, "--jobs and --threads", id="jobs"),
        pytest.param({"report": True}, "no finished run", id="nothing_to_report"),
        pytest.param({"epoch": 3}, "no config has the id 'epoch', .*: is 'epochs' meant", id="unknown_id"),
        pytest.param({"job": 3}, "no config has the id 'job', .*: is 'jobs' meant", id="misspelt_option"),
        pytest.param({"seed": 3}, "is --seeds meant", id="seed"),
    ],
)
def test_refuses(cohort, tmp_path, options, message):
    with pytest.raises(ExperimentError, match=message):
        tool.study_learning(str(cohort), str(tmp_path), **options)


# --- the report ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(cohort, runs) -> dict:
    study = make_study(cohort, runs, "base,surv,equal,full,flow", (0, 1))
    return json.loads(json.dumps(study_report.make_report(study, SAMPLES, 0, "the command")))


def held_out(runs: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(runs / name / "fold_0" / "evaluation" / "cases.csv", dtype={"PatientID": str})


def lifelines_c_index(cases: pd.DataFrame) -> float:
    known = cases.dropna(subset=["time"])
    return concordance_index(known["time"], -known["log_hazard"], known["event"])


def test_metrics_are_means_over_the_networks_own_held_out_cases(runs, report):
    tables = [held_out(runs, f"base_s{seed}") for seed in (0, 1)]
    found = report["variants"]["base"]["metrics"]
    expected = [lifelines_c_index(table) for table in tables]
    assert found["c_index"]["value"] == pytest.approx(np.mean(expected))
    assert found["c_index"]["standard_deviation"] == pytest.approx(np.std(expected, ddof=1))
    assert list(found["c_index"]["networks"].values()) == pytest.approx(expected)
    assert found["dice"]["value"] == pytest.approx(np.mean([table["dice"].mean() for table in tables]))
    known = pd.concat(tables).dropna(subset=["time"]).drop_duplicates("PatientID")
    assert found["c_index"]["patients"] == len(known)
    assert found["c_index"]["events"] == known["event"].sum()
    for row in found.values():
        assert row["low"] <= row["value"] <= row["high"]


def test_threshold_is_chosen_on_training_cases(cohort, runs):
    study = make_study(cohort, runs)
    (cells,) = study_report.read_cells(study, "base").values()
    training = pd.read_csv(runs / "base_s0" / "fold_0" / "evaluation_training" / "cases.csv", dtype={"PatientID": str})
    threshold = study_report.choose_hpv_threshold(training)["value"]
    known = held_out(runs, "base_s0").dropna(subset=["hpv"])
    called, positive = known["hpv_prob"] > threshold, known["hpv"] > 0.5
    expected = (called[positive].mean() + (~called[~positive]).mean()) / 2
    figure = study_report.metric({"seed 0, fold 0": cells}, "balanced_accuracy_chosen", SAMPLES, 0)
    assert figure["value"] == pytest.approx(expected)


def test_differences_are_on_shared_patients_and_networks(runs, report):
    less = report["variants"]["equal"]["differences"]["c_index"]
    values = {v: report["variants"][v]["metrics"]["c_index"]["value"] for v in ("base", "equal")}
    assert less["value"] == pytest.approx(values["equal"] - values["base"])
    assert less["networks"] == 2 and less["low"] <= less["value"] <= less["high"] and 0 < less["p"] <= 1
    full = report["variants"]["full"]["differences"]["c_index"]
    both = held_out(runs, "full_s0").merge(held_out(runs, "base_s0"), on="PatientID", suffixes=("", "_base"))
    assert full["networks"] == 1 and full["patients"] == len(both.dropna(subset=["time"]))
    base = both.drop(columns="log_hazard").rename(columns={"log_hazard_base": "log_hazard"})
    assert full["value"] == pytest.approx(lifelines_c_index(both) - lifelines_c_index(base))


@pytest.mark.parametrize(("variants", "against"), [("base,equal,full", "base"), ("equal,full", "equal")])
def test_the_first_is_compared_with_where_a_variants_own_is_not_there(cohort, runs, variants, against):
    written = study_report.make_report(make_study(cohort, runs, variants), SAMPLES, 0, "the command")
    assert written["variants"]["full"]["against"] == against
    assert f"| `full` | `{against}` |" in study_report.as_markdown(written)


def test_a_model_does_not_differ_from_itself(cohort, runs):
    cells = study_report.read_cells(make_study(cohort, runs), "base")
    less = study_report.difference(cells, {name: table.copy() for name, table in cells.items()}, "hpv_auc", SAMPLES, 0)
    assert (less["value"], less["low"], less["high"], less["p"]) == (0, 0, 0, 1)


def test_oracle_and_clinical_values_are_judged_on_the_same_patients(cohort, runs, report):
    truth = pd.read_csv(cohort / "truth.csv", dtype={"PatientID": str}).set_index("PatientID")["log_hazard"]
    expected = [
        lifelines_c_index(table.assign(log_hazard=truth.loc[table["PatientID"]].to_numpy()))
        for table in (held_out(runs, f"base_s{seed}") for seed in (0, 1))
    ]
    oracle = report["comparators"][study_report.ORACLE]["metrics"]["c_index"]
    assert oracle["value"] == pytest.approx(np.mean(expected))
    base = report["variants"]["base"]["metrics"]["c_index"]
    assert report["share_of_oracle"]["base"] == pytest.approx((base["value"] - 0.5) / (oracle["value"] - 0.5))
    clinical = report["comparators"][study_report.CLINICAL]["metrics"]["c_index"]
    assert clinical["patients"] == base["patients"] and 0.5 < clinical["value"] < oracle["value"]
    figures = report["comparators"][study_report.CLINICAL]["metrics"]
    assert figures["hpv_auc"]["patients"] == report["variants"]["base"]["metrics"]["hpv_auc"]["patients"]
    assert figures["balanced_accuracy"]["value"] == figures["balanced_accuracy_chosen"]["value"]


# --- judged by another cohort -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """Another cohort: patients with the same values and other names."""
    return make_cohort(tmp_path_factory.mktemp("others"), first=200)


def test_another_cohort_is_evaluated_after_the_training(cohort, others, tmp_path, fake, monkeypatch):
    (fake / "evaluate.py").write_text(FAKE.replace('"name": name', '"name": "evaluate"'))
    command = [sys.executable, str(fake / "evaluate.py")]
    monkeypatch.setattr(
        study_plan, "bundle_command", lambda _, files, options: [*command, *(f"--{k}={v}" for k, v in options.items())]
    )
    study = make_study(cohort, tmp_path, "burden", folds=(0, 2), test_dir=others)
    assert tool.run_study(study, jobs=1, threads=1) == []
    assert [call["name"] for call in calls(fake)] == ["burden_s0", "evaluate", "evaluate"]
    given = calls(fake)[2]["given"]
    assert given["dataset_dir"] == str(others) and given["evaluate_on"] == "all"
    assert given["ckpt_dir"] == str(tmp_path / "burden_s0" / "fold_2" / "models")
    assert given["evaluation_dir"] == str(tmp_path / "burden_s0" / "fold_2" / "evaluation_others")


def test_metrics_of_another_cohort(cohort, others, runs, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(runs / "base_s0", folder / "base_s0")
    study = make_study(cohort, folder, test_dir=others)
    assert study_report.read_cells(study, "base") == {}  # trained, but not yet seen the others
    place = folder / "base_s0" / "fold_0" / "evaluation_others"
    place.mkdir()
    cases = held_out(runs, "base_s0")
    cases["PatientID"] = [f"{name[:-3]}{int(name[-3:]) + 200}" for name in cases["PatientID"]]
    cases.to_csv(place / "cases.csv", index=False)
    report = study_report.make_report(study, SAMPLES, 0, "")
    assert report["variants"]["base"]["metrics"]["c_index"]["value"] == pytest.approx(lifelines_c_index(cases))
    assert "others" in report["judged_by"]
    for name in (study_report.CLINICAL, study_report.ORACLE):
        assert report["comparators"][name]["metrics"]["c_index"]["patients"] == cases["time"].notna().sum()


def test_a_cohort_with_patients_of_the_study_is_refused(cohort, tmp_path):
    with pytest.raises(ExperimentError, match="patients of the test cohort are in the study's own"):
        tool.study_learning(str(cohort), str(tmp_path), test_dir=str(cohort))


def test_a_patient_of_the_study_is_known_by_any_spelling():
    def made(*patients: str) -> Cohort:
        return Cohort("", [{keys.PATIENT_ID: patient} for patient in patients])

    tool.check_others(made("CHUM-001"), made("CHUM-002"))
    for patient in ("CHUM_001", "chum 001"):
        with pytest.raises(ExperimentError, match=f"1 patients of the test cohort are in the study's own .{patient}"):
            tool.check_others(made("CHUM-001"), made(patient, "CHUM-002"))


def test_what_cannot_be_had_says_why(report):
    assert report["variants"]["surv"]["metrics"]["dice"] == {
        "value": None,
        "reason": "not a task of this variant",
    }
    assert report["variants"]["surv"]["differences"]["dice"]["reason"] == "nothing that both have"
    assert "flow" not in report["variants"]


def test_command_writes_json_and_a_table(cohort, runs):
    tool.study_learning(str(cohort), str(runs), "base,surv", 0, report=True, samples=SAMPLES)
    table = (runs / "study.md").read_text()
    assert "Research use only" in table and "--variants base,surv --seeds 0 --folds 0" in table
    written = json.loads((runs / "study.json").read_text(), parse_constant=pytest.fail)
    value = written["variants"]["base"]["metrics"]["c_index"]["value"]
    row = next(line for line in table.splitlines() if line.startswith("| `base`"))
    assert f"{value:.3f} [" in row and row.count("|") == table.splitlines()[8].count("|")
