"""Experiments of several folds: what is planned, run, continued, refused and kept."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser
from monai.utils import optional_import
from tiny_model import write_model

from command_line import read_arguments

import ensemble_folds
import train_folds
from conftest import BUNDLE, ROOT, TINY, make_tiny_cohort
from experiments import experiment
from experiments.experiment import ExperimentError, read_experiment, read_fold, read_override
from experiments.processes import FolderInUseError, last_lines
from scripts import keys
from scripts.cohorts.cohort import CohortError

DEMO = tuple(json.loads((BUNDLE / "configs" / "demo.json").read_text())[name] for name in ("epochs", "val_interval"))
SMALL = {"num_folds": 2, "epochs": 1, "val_interval": 1, "batch_size": 2, "survival_inputs": "deep"}

# Stands in for ``python -m monai.bundle run``: leaves the files that the real one leaves, or does what is asked of it.
FAKE_BUNDLE = """
import json, os, pathlib, shutil, subprocess, sys, time
workflow, given = sys.argv[1], dict(option[2:].split("=", 1) for option in sys.argv[2:])
folder, home = pathlib.Path(given["output_dir"]), pathlib.Path(__file__).parent
print("fake", workflow, given.get("evaluate_on", ""))
facts = {"args": given, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": os.environ.get("OMP_NUM_THREADS")}
with (home / "calls.txt").open("a") as file:
    file.write(json.dumps({"workflow": workflow, **facts}) + "\\n")
if (home / f"fail_{given['fold']}").exists():
    print("50%|#####     | 1/2")
    print("ValueError: the scan is broken")
    sys.exit(3)
if (home / "hang").exists():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    (home / f"pids_{given['fold']}").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(100)
if workflow == "training":
    (folder / "models" / "resume").mkdir(parents=True, exist_ok=True)
    (folder / "models" / "model.pt").write_bytes(b"weights")
    shutil.copy(home / "last.pt", folder / "models" / "resume" / "last.pt")
    (folder / "history.part").write_text(json.dumps([{"epoch": int(given.get("epochs", 1))}]))
    (folder / "history.part").replace(folder / "history.json")  # whole at once, as the real one: it is read meanwhile
else:
    part = given["evaluate_on"]
    place = folder / ("evaluation" if part == "validation" else f"evaluation_{part}")
    place.mkdir(exist_ok=True)
    (place / "cases.csv").write_text(f"PatientID,log_hazard\\n00{given['fold']}_{part},0.5\\n")
    figure = {"value": 0.5 + int(given["fold"]) / 10}
    metrics = dict.fromkeys(("c_index", "dice"), figure) | {"balanced_accuracy": {"value": None}}
    (place / "metrics.json").write_text(json.dumps({"metrics": metrics}))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Folder of a stand-in for the bundle, which is quick."""
    home = tmp_path / "fake"
    home.mkdir()
    (home / "bundle.py").write_text(FAKE_BUNDLE)
    torch.save({"epoch": 1, "best_epoch": 1, "best": 0.5, "stopped_early": False}, home / "last.pt")

    def command(workflow, config_files, overrides):
        options = [f"--{name}={experiment.typed(value)}" for name, value in overrides.items()]
        return [sys.executable, str(home / "bundle.py"), workflow, *options]

    monkeypatch.setattr(experiment, "bundle_command", command)
    monkeypatch.setattr(train_folds, "POLL_SECONDS", 0.02)
    return home


@pytest.fixture(scope="module")
def centres(tmp_path_factory) -> Path:
    """Twelve patients of three centres."""
    folder = make_tiny_cohort(tmp_path_factory.mktemp("centres"), patients=12)
    table = folder / "HECKTOR_2025_Training_Task_3.csv"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    for k, row in enumerate(rows):
        row["CenterID"] = (6, 1, 5)[k % 3]
    pd.DataFrame(rows).to_csv(table, index=False)
    return folder


def calls(home: Path) -> list[dict]:
    return [json.loads(line) for line in (home / "calls.txt").read_text().splitlines()]


def steps(home: Path) -> list[tuple]:
    return [(c["args"]["fold"], c["workflow"], c["args"].get("evaluate_on")) for c in calls(home)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


# --- with the bundle ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_run(tiny_cohort, tmp_path_factory) -> Path:
    """Two folds of one epoch, both at once, by the command line."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    options = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    command = ["scripts/train_folds.py", "--dataset_dir", str(tiny_cohort), *options, *TINY, "--jobs", "2"]
    result = subprocess.run(
        [sys.executable, *command, "--output_dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"fold 0 epoch 0/1, fold 1 epoch 0/1 \| 0 % of all epochs", result.stderr)
    assert "fold 0: finished" in result.stderr and "fold 1: finished" in result.stderr
    assert re.search(r"^fold 1 +3 +1 ", result.stdout, re.MULTILINE)
    return folder


def arguments_of(real_run: Path, cohort: Path) -> dict:
    tiny = dict(zip((word[2:] for word in TINY[::2]), map(experiment.DefaultParseValue, TINY[1::2]), strict=True))
    return {"dataset_dir": str(cohort), **SMALL, **tiny, "output_dir": str(real_run)}


def test_every_case_has_a_prediction_from_a_network_that_did_not_see_it(real_run):
    pooled = pd.read_csv(real_run / "out_of_fold.csv", dtype={"PatientID": str})
    assert sorted(pooled["PatientID"]) == [f"CHUM-{k:03d}" for k in range(1, 7)]
    for fold in range(2):
        cases = pd.read_csv(real_run / f"fold_{fold}" / "evaluation" / "cases.csv", dtype={"PatientID": str})
        same = pooled[pooled["fold"] == fold].drop(columns="fold").reset_index(drop=True)
        pd.testing.assert_frame_equal(same, cases)
        learnt = pd.read_csv(real_run / f"fold_{fold}" / "evaluation_training" / "cases.csv", dtype={"PatientID": str})
        assert not set(learnt["PatientID"]) & set(cases["PatientID"])
        assert len(learnt) + len(cases) == 6


def test_the_record_says_what_was_run_on_what(real_run, tiny_cohort):
    record = read_experiment(real_run)
    assert (record["protocol"], record["num_folds"], record["held_out"]) == ("partial", 2, "validation")
    assert record["dataset_dir"] == str(tiny_cohort)
    assert record["command"].startswith("python scripts/train_folds.py --dataset_dir")
    assert record["settings"]["roi_size"] == [32, 32, 32] and record["settings"]["epochs"] == 1
    assert {"bundle", "torch", "monai", "python"} <= set(record["versions"])
    assert set(record["configs"]) == {"configs/train.json", "configs/evaluate.json"}
    assert {name: record["cohort"][name] for name in ("cases", "with_mask", "with_hpv", "events")} == {
        "cases": 6,
        "with_mask": 5,
        "with_hpv": 5,
        "events": 2,
    }
    assert record["cohort"]["voxel_limits"]["pet_slice"] == pytest.approx({"warn_below": 7.84, "warn_above": 8.16})
    assert record["cohort"]["clinical"]["age"] == {
        "known": 6,
        "mean": 52.5,
        "standard_deviation": pytest.approx(1.7078, abs=1e-4),
    }
    fold = record["folds"]["1"]
    assert (fold["status"], fold["epoch"], fold["best_epoch"]) == ("finished", 1, 1)
    assert fold["cases"]["training"]["cases"] == 3
    assert fold["versions"] == record["versions"]
    report = json.loads((real_run / "fold_1" / "evaluation" / "metrics.json").read_text())
    assert fold["metrics"]["validation"] == report["metrics"]


def test_folds_share_preprocessed_cases_and_keep_a_log_each(real_run):
    assert len(list((real_run / "cache").glob("*.pt"))) == 12, "six on the tumour, six as for inference"
    assert not list(real_run.glob("fold_*/cache"))
    log = (real_run / "fold_0" / "log.txt").read_text()
    assert [line.split()[3] for line in log.splitlines() if line.startswith("== ")] == [
        "training:",
        "evaluating",
        "evaluating",
    ]
    assert "key metric: " in log


def test_started_again_a_finished_experiment_runs_nothing(real_run, tiny_cohort, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", None)
    train_folds.train_folds(**arguments_of(real_run, tiny_cohort))
    said = capsys.readouterr()
    assert "fold 0: finished before\nfold 1: finished before" in said.err
    assert "C-index" in said.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"seed": 3}, "seed: there 0, now 3", id="seed"),
        pytest.param({"epochs": 2}, "epochs: there 1, now 2", id="epochs"),
        pytest.param(
            {"tasks": ("seg", "surv")}, r"tasks: there \['seg', 'hpv', 'surv'\], now \['seg', 'surv'\]", id="tasks"
        ),
        pytest.param({"config_file": "configs/paper.json"}, "bn_eps: there 1e-05, now 0.001;.* flow", id="overlay"),
        pytest.param({"protocol": "leave_one_centre_out", "num_folds": None}, "two centres", id="protocol"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_by_name(real_run, tiny_cohort, change, message):
    with pytest.raises((ExperimentError, CohortError), match=message):
        train_folds.train_folds(**arguments_of(real_run, tiny_cohort) | change)


def test_a_changed_cohort_is_refused(real_run, tiny_cohort, tmp_path):
    record = read_experiment(real_run)
    record["cohort"] |= {"fingerprint": "another", "cases": 7}
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    with pytest.raises(ExperimentError, match=r"labels or clinical values have changed \(7 cases there, 6 now\)"):
        train_folds.train_folds(**arguments_of(tmp_path, tiny_cohort))


def test_the_folds_of_the_run_join_to_one_model(real_run, tmp_path, capsys):
    ensemble_folds.ensemble_folds(str(real_run), str(tmp_path / "model.pt"), half=True)
    said = capsys.readouterr()
    assert "model: 2 folds, trained on 6 cases of 1 centre (CHUM)" in said.out
    assert "2 relapses among 6 patients" in said.err
    assert (tmp_path / "model.pt").stat().st_size < 2 / 3 * 30e6


@pytest.mark.parametrize(("part", "place"), [("validation", "evaluation"), ("test", "evaluation_test")])
def test_the_configs_evaluate_the_part_asked_for(centres, tmp_path, part, place):
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / name) for name in ("train.json", "evaluate.json")])
    parser.update({"checkpoint": str(write_model(tmp_path) / "model.pt")})
    parser.update({"dataset_dir": str(centres), "output_dir": "out", "protocol": "ablation", "evaluate_on": part})
    split = parser.get_parsed_content("split")
    assert parser.get_parsed_content("validate#dataset#data") == getattr(split, part) != []
    assert parser.get_parsed_content("evaluation_dir") == f"out/{place}"


def test_another_cohort_is_evaluated_whole_however_small(tmp_path):
    """One patient cannot be divided into folds, and need not be: nobody is held out from."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / name) for name in ("train.json", "evaluate.json")])
    parser.update({"checkpoint": str(write_model(tmp_path) / "model.pt"), "output_dir": "out", "evaluate_on": "all"})
    parser.update({"dataset_dir": str(make_tiny_cohort(tmp_path / "one", 1)), "protocol": "leave_one_centre_out"})
    [case] = parser.get_parsed_content("validate#dataset#data")
    assert case["patient_id"] == "CHUM-001"
    assert parser.get_parsed_content("split").training == []


# --- running and continuing -----------------------------------------------------------------------------------------


def test_a_failing_fold_does_not_stop_the_others_and_is_all_that_is_repeated(fake, tmp_path, tiny_cohort, capsys):
    run = {"dataset_dir": str(tiny_cohort), "output_dir": str(tmp_path / "run"), "num_folds": 3}
    (fake / "fail_1").touch()
    with pytest.raises(SystemExit) as ended:
        train_folds.train_folds(**run)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "fold 1 failed in training (exit code 3)" in said.err
    assert "    ValueError: the scan is broken\n" in said.err
    assert "50%|" not in said.err
    assert [read_fold(run["output_dir"], k)["status"] for k in range(3)] == ["finished", "failed", "finished"]
    assert set(pd.read_csv(tmp_path / "run" / "out_of_fold.csv")["fold"]) == {0, 2}
    before = len(calls(fake))
    (fake / "fail_1").unlink()
    train_folds.train_folds(**run)
    assert steps(fake)[before:] == [
        ("1", "training", None),
        ("1", "evaluating", "validation"),
        ("1", "evaluating", "training"),
    ]
    pooled = pd.read_csv(tmp_path / "run" / "out_of_fold.csv", dtype=str)
    assert pooled["PatientID"].tolist() == ["000_validation", "001_validation", "002_validation"]
    assert "mean                                            0.600" in capsys.readouterr().out


def test_counts_of_a_finished_fold_are_of_those_evaluated(tmp_path, centres):
    """Not of those that quality control left out, beside whose number a metric would seem better founded."""
    plan = experiment.make_plan(str(centres), "partial", (), None, str(tmp_path / "run"), {}, "")
    cases = plan.splits[0].part("validation")
    table = experiment.evaluation_folder(plan.folder, 0) / "cases.csv"
    table.parent.mkdir(parents=True)
    pd.DataFrame({"PatientID": [case[keys.PATIENT_ID] for case in cases[1:]]}).to_csv(table, index=False)
    assert len(cases) == 4 and experiment.evaluated(plan, 0, "validation", cases) == cases[1:]


def test_some_folds_and_then_the_others(fake, tmp_path, tiny_cohort):
    run = {"dataset_dir": str(tiny_cohort), "output_dir": str(tmp_path / "run"), "num_folds": 3}
    train_folds.train_folds(**run, folds=(0, 2))
    assert {call[0] for call in steps(fake)} == {"0", "2"}
    assert read_experiment(tmp_path / "run")["folds"]["1"]["status"] == "pending"
    train_folds.train_folds(**run)
    assert [call[0] for call in steps(fake)] == ["0"] * 3 + ["2"] * 3 + ["1"] * 3


def test_a_finished_fold_whose_files_are_gone_is_run_again(fake, tmp_path, tiny_cohort):
    run = {"dataset_dir": str(tiny_cohort), "output_dir": str(tmp_path / "run"), "num_folds": 2}
    train_folds.train_folds(**run)
    (tmp_path / "run" / "fold_0" / "models" / "model.pt").unlink()
    train_folds.train_folds(**run)
    assert [call[0] for call in steps(fake)] == ["0"] * 3 + ["1"] * 3 + ["0"] * 3


@pytest.mark.parametrize("keep", ["best", "last"])
def test_metrics_of_cases_on_which_the_epoch_was_chosen_say_so(fake, tmp_path, tiny_cohort, capsys, keep):
    train_folds.train_folds(str(tiny_cohort), output_dir=str(tmp_path / "run"), num_folds=2, keep_epoch=keep)
    said = capsys.readouterr().out
    assert ("the metrics are too optimistic (keep_epoch: best)" in said) == (keep == "best")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_children_and_the_same_command_goes_on(fake, tmp_path, tiny_cohort, capsys, number):
    run = {"dataset_dir": str(tiny_cohort), "output_dir": str(tmp_path / "run"), "num_folds": 2, "jobs": 2}
    (fake / "hang").touch()
    files = [fake / f"pids_{fold}" for fold in range(2)]

    def interrupt():
        wait_for(lambda: all(file.is_file() and file.read_text() for file in files))
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SystemExit) as ended:
        train_folds.train_folds(**run)
    thread.join()
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert "rerun the same command to resume" in capsys.readouterr().err
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    assert len(pids) == 4 and wait_for(lambda: not any(map(is_alive, pids)))
    (fake / "hang").unlink()
    train_folds.train_folds(**run)
    assert [read_fold(run["output_dir"], k)["status"] for k in range(2)] == ["finished"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end the children of a process that was killed")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_when_the_tool_itself_is_killed_its_folds_end(fake, tmp_path, tiny_cohort):
    (fake / "hang").touch()
    run = {"dataset_dir": str(tiny_cohort), "output_dir": str(tmp_path / "run"), "num_folds": 2}
    tool = os.fork()
    if not tool:
        try:
            train_folds.train_folds(**run)
        finally:
            os._exit(1)
    pids = fake / "pids_0"
    assert wait_for(lambda: pids.is_file() and pids.read_text())
    child, grandchild = map(int, pids.read_text().split())
    os.kill(tool, signal.SIGKILL)
    os.waitpid(tool, 0)
    ended = wait_for(lambda: not is_alive(child))
    os.kill(grandchild, signal.SIGKILL)  # the stand-in's own child; torch's loaders end with their parent
    assert ended
    (fake / "hang").unlink()
    train_folds.train_folds(**run)
    assert read_fold(run["output_dir"], 1)["status"] == "finished"


def test_two_commands_do_not_train_the_same_fold(fake, tmp_path, tiny_cohort, monkeypatch):
    monkeypatch.setattr(train_folds.lock_folder, "__defaults__", (0.0,))
    run = {"dataset_dir": str(tiny_cohort), "output_dir": str(tmp_path / "run"), "num_folds": 2}
    (tmp_path / "run" / "fold_1").mkdir(parents=True)
    with (tmp_path / "run" / "fold_1" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(FolderInUseError, match=r"another process uses .*fold_1"):
            train_folds.train_folds(**run)
        assert not (fake / "calls.txt").exists()
        train_folds.train_folds(**run, folds=0)
    train_folds.train_folds(**run)
    assert [call[0] for call in steps(fake)] == ["0"] * 3 + ["1"] * 3


@pytest.mark.parametrize(
    ("options", "visible", "places"),
    [
        pytest.param({"devices": (0, 1)}, None, {("0", "cuda:0"), ("1", "cuda:0")}, id="two_gpus"),
        pytest.param({"devices": (0, 1)}, "4,7", {("4", "cuda:0"), ("7", "cuda:0")}, id="of_the_visible_ones"),
        pytest.param({"devices": 1}, None, {("1", "cuda:0")}, id="second_gpu"),
        pytest.param({"devices": "cpu", "jobs": 2}, None, {(None, "cpu")}, id="cpu"),
        pytest.param({}, None, {(None, None)}, id="own_choice"),
    ],
)
def test_folds_are_shared_out_over_devices(fake, tmp_path, tiny_cohort, monkeypatch, options, visible, places):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    train_folds.train_folds(str(tiny_cohort), output_dir=str(tmp_path / "run"), num_folds=2, **options)
    assert {(call["gpu"], call["args"].get("device")) for call in calls(fake)} == places
    at_once = options.get("jobs", 0) or len(places)
    threads = str(max(1, os.cpu_count() // at_once)) if at_once > 1 else None
    assert {call["threads"] for call in calls(fake)} == {threads}


def test_the_end_of_a_log_goes_with_the_first_error_of_its_last_step(tmp_path):
    chain = [
        "Traceback",
        "  File",
        "OSError: the disk is full",
        *(f"  frame {k}" for k in range(20)),
        "RuntimeError: later",
    ]
    steps = ["== step one: x", "ValueError: of an earlier step", "", "== step two: x", " 50%|## | 1/2", *chain, ""]
    (tmp_path / "log.txt").write_text("\n".join(steps))
    found = last_lines(tmp_path / "log.txt", 3)
    assert found == ["OSError: the disk is full", "  frame 18", "  frame 19", "RuntimeError: later"]


# --- what is planned ------------------------------------------------------------------------------------------------


def plan(cohort: Path, protocol: str = "partial", config_files=(), folds=None, **overrides) -> experiment.Plan:
    return experiment.make_plan(str(cohort), protocol, config_files, folds, None, overrides, "")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, (3, 500, 5), id="partial"),
        pytest.param({"protocol": "full"}, (5, 500, 5), id="full"),
        pytest.param({"protocol": "full", "num_folds": 2}, (2, 500, 5), id="full_in_two"),
        pytest.param({"protocol": "ablation"}, (1, 100, 10), id="ablation"),
        pytest.param({"protocol": "ablation", "config_files": "configs/demo.json"}, (1, *DEMO), id="ablation_demo"),
        pytest.param({"protocol": "ablation", "epochs": 7}, (1, 7, 10), id="ablation_epochs"),
        pytest.param({"protocol": "leave_one_centre_out"}, (3, 500, 5), id="leave_one_centre_out"),
    ],
)
def test_protocols_bring_their_folds_and_epochs(centres, options, expected):
    made = plan(centres, **options)
    assert (len(made.splits), made.epochs, made.config["val_interval"]) == expected
    assert made.folder == ROOT / "runs" / f"{centres.name}_{options.get('protocol', 'partial')}"


def test_the_ablation_holds_out_its_test_cases(fake, centres, tmp_path, capsys):
    train_folds.train_folds(str(centres), "ablation", tasks="surv", output_dir=str(tmp_path / "run"))
    parts = ["validation", "test", "training"]
    assert [call[2] for call in steps(fake)] == [None, *parts]
    assert {call["args"]["tasks"] for call in calls(fake)} == {"surv"}
    assert pd.read_csv(tmp_path / "run" / "out_of_fold.csv")["PatientID"].tolist() == ["000_test"]
    assert capsys.readouterr().out.startswith("test cases, from networks")


def test_each_centre_is_held_out_in_turn(fake, centres, tmp_path):
    train_folds.train_folds(str(centres), leave_one_centre_out=True, output_dir=str(tmp_path / "run"))
    folds = read_experiment(tmp_path / "run")["folds"]
    assert [fold["centre"] for fold in folds.values()] == ["CHUM", "HGJ", "MDA"]
    assert {(c["args"]["protocol"], c["args"]["num_folds"]) for c in calls(fake)} == {("leave_one_centre_out", "3")}


def test_commands_are_those_of_the_bundle(centres, tmp_path):
    made = plan(
        centres, config_files="configs/demo.json,configs/paper.json", cache_dir=tmp_path / "c", tracking="mlflow"
    )
    (_, training), (title, evaluating), _ = made.steps(2)
    assert training[1:5] == ["-m", "monai.bundle", "run", "training"]
    files = ["configs/train.json", "configs/demo.json", "configs/paper.json"]
    assert (
        training[5] == f"--config_file={files}"
        and evaluating[5] == f"--config_file={[*files, 'configs/evaluate.json']}"
    )
    assert {"--fold=2", "--num_folds=3", "--protocol=partial", f"--dataset_dir={centres}"} <= set(training)
    assert f"--cache_dir={tmp_path / 'c'}" in training and f"--output_dir={made.folder / 'fold_2'}" in evaluating
    assert title == "evaluating validation" and "--evaluate_on=validation" in evaluating
    assert "--tracking=mlflow" in training and "--tracking=mlflow" not in evaluating


def test_a_table_named_from_the_working_folder_is_found_by_the_bundle(centres, monkeypatch):
    monkeypatch.chdir(centres)
    assert plan(centres, ehr_csv="HECKTOR_2025_Training_Task_3.csv").overrides["ehr_csv"] == str(
        centres / "HECKTOR_2025_Training_Task_3.csv"
    )


@pytest.mark.parametrize("name", ["2024_001", "1.10", "a#b", "$x @y"])
def test_names_of_cohort_and_experiment_stay_what_was_typed(centres, tmp_path, monkeypatch, name):
    shutil.copytree(centres, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    typed = read_arguments(train_folds.train_folds, [name, "--cache_dir", f"cache {name}"], read=read_override)
    made = plan(typed["dataset_dir"], cache_dir=typed["cache_dir"])
    assert made.overrides["cache_dir"] == str(tmp_path / f"cache {name}")
    assert len(made.cohort.cases) == len(plan(centres).cohort.cases)
    assert f"--dataset_dir={tmp_path / name}" in made.steps(0)[0][1]


def test_an_overlay_of_ones_own(centres, tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text('{"epochs": 9}')
    monkeypatch.chdir(tmp_path)
    made = plan(centres, config_files=["mine.json"])
    assert made.epochs == 9 and made.config_files[1] == str(tmp_path / "mine.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"epoch": 3}, "no config has the id 'epoch', .*: is 'epochs' meant", id="unknown_id"),
        pytest.param({"leave_one_center_out": True}, "is 'leave_one_centre_out' meant", id="misspelt_option"),
        pytest.param({"epochs": 0}, "epochs is 0: give a whole number, 1 or more", id="no_epochs"),
        pytest.param({"epochs": 1.5}, r"epochs is 1\.5: give a whole number", id="part_of_an_epoch"),
        pytest.param({"val_interval": -1}, "val_interval is -1: give a whole number", id="interval"),
        pytest.param({"batch_size": 0}, "batch_size is 0: give a whole number", id="empty_batch"),
        pytest.param({"fold": 1}, "--fold is set by train_folds", id="reserved"),
        pytest.param({"config_file": "configs/none.json"}, r"no config file configs/none\.json", id="no_config"),
        pytest.param({"config_file": "configs/multi_gpu_train.json"}, "is for torchrun", id="multi_gpu"),
        pytest.param({"folds": (0, 3)}, r"folds are \[0, 3\]; this experiment has the folds 0 to 2", id="folds"),
        pytest.param({"devices": "gpu"}, "'cpu' or numbers of GPUs", id="devices"),
        pytest.param({"devices": 0, "device": "cpu"}, "not both", id="device_twice"),
        pytest.param({"jobs": -1}, "number of folds in parallel; got -1", id="jobs"),
        pytest.param(
            {"leave_one_centre_out": True, "protocol": "full"}, "leave out --protocol full", id="two_protocols"
        ),
        pytest.param({"protocol": "half"}, "unknown protocol 'half'; known are partial, full", id="protocol"),
        pytest.param({"protocol": "leave_one_centre_out", "num_folds": 2}, "set it to 3", id="folds_of_centres"),
        pytest.param({"dataset_dir": "nowhere"}, "nowhere does not exist", id="no_data"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(fake, centres, tmp_path, options, message):
    with pytest.raises((ExperimentError, CohortError), match=message):
        train_folds.train_folds(**{"dataset_dir": str(centres), "output_dir": str(tmp_path / "run")} | options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        pytest.param("mine.json", '{"epochs": 9,}', r"mine\.json cannot be read as a config .*: .*line 1", id="json"),
        pytest.param("mine.yaml", "epochs: 9\n  a: [1,\n", r"mine\.yaml cannot be read as a config", id="yaml"),
        pytest.param("mine.txt", "epochs: 9\n", r"mine\.txt cannot be read as a config", id="ending"),
        pytest.param("mine.yaml", "- 9\n", r"mine\.yaml is no config: it must hold ids", id="list"),
        pytest.param("mine.yml", "", r"mine\.yml is no config: it must hold ids", id="empty"),
    ],
)
def test_an_overlay_that_is_no_config_is_refused(monkeypatch, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExperimentError, match=message):
        experiment.find_config(name)


def test_yaml_without_its_reader_says_what_to_install(monkeypatch, tmp_path):
    """PyYAML is not among the requirements: the bundle's own configs are JSON."""
    monkeypatch.setattr("monai.bundle.config_parser.yaml", optional_import("no_such_yaml")[0])
    (tmp_path / "mine.yaml").write_text("epochs: 9\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExperimentError, match=r"mine\.yaml: to read YAML, install PyYAML .*, or write .* as JSON$"):
        experiment.find_config("mine.yaml")


def test_a_gpu_that_is_not_visible_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ExperimentError, match="no GPU 1: CUDA_VISIBLE_DEVICES is 3"):
        train_folds.environment_of("1", 1)


def test_folds_without_a_record_are_refused(fake, tmp_path, tiny_cohort):
    run = {"dataset_dir": str(tiny_cohort), "output_dir": str(tmp_path / "run"), "num_folds": 2}
    train_folds.train_folds(**run)
    (tmp_path / "run" / "experiment.json").unlink()
    with pytest.raises(ExperimentError, match=r"holds folds but no experiment\.json"):
        train_folds.train_folds(**run)


def test_scans_that_cannot_be_read_are_not_counted_in_the_range_of_voxel_sizes(tmp_path, capsys):
    cohort = make_tiny_cohort(tmp_path, patients=3)
    (cohort / "Task 1" / "CHUM-002" / "CHUM-002__PT.nii.gz").write_bytes(b"damaged")
    limits = experiment.voxel_limits(experiment.load_cohort(cohort))
    assert limits["ct_slice"]["warn_above"] == pytest.approx(8.16)
    assert "CHUM-002: not counted in the range of voxel sizes" in capsys.readouterr().err


# --- what is shown --------------------------------------------------------------------------------------------------


class Terminal:
    """A standard error that says whether it is a terminal."""

    def __init__(self, is_terminal: bool) -> None:
        self.is_terminal = is_terminal
        self.text = ""

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(("is_terminal", "lines"), [(True, 2), (False, 1)])
def test_progress_shows_fold_epoch_and_time_left(centres, tmp_path, monkeypatch, is_terminal, lines):
    made = experiment.make_plan(str(centres), "partial", (), None, str(tmp_path / "run"), {"epochs": 8}, "")
    now = [0.0]
    monkeypatch.setattr(train_folds.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", Terminal(is_terminal))
    (tmp_path / "run" / "fold_0").mkdir(parents=True)
    history = tmp_path / "run" / "fold_0" / "history.json"
    history.write_text('[{"epoch": 2}]')
    display = train_folds.Display(made, [0, 1])
    run = type("Run", (), {"fold": 0, "step": "training"})()
    history.write_text('[{"epoch": 4}]')
    now[0] = 120.0
    display.show([run])
    display.show([run])
    said = sys.stderr.text
    assert said.count("fold 0 epoch 4/8 | 25 % of all epochs | 12 min left") == lines
    assert ("\r" in said) == is_terminal


def test_none_reaches_the_bundle(tmp_path):
    """MONAI ignores an override of None, so that the config's own value would be trained with."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"pet_window": [0, 25], "training": ["$print('the window is', @pet_window)"]}))
    command = experiment.bundle_command("training", [str(config)], {"pet_window": None})
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the window is None" in said.stdout
