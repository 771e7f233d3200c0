"""Every config, run on a tiny cohort with the commands of the README, and what the configs promise each other."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data.utils import pickle_hashing

from conftest import BUNDLE, SMALL_RUN, TINY, make_tiny_cohort
from phantom.cohort import write_cohort
from scripts import keys
from scripts.cohorts.cohort import load_cohort
from scripts.imaging.images import read_image
from scripts.imaging.transforms import INFERENCE_KEYS, TRAINING_KEYS, LoadScansd
from scripts.model.ensemble import saved_provenance, saved_spec
from scripts.model.preprocessing import Preprocessing
from scripts.model.spec import ModelSpec
from scripts.prediction.coarse import CoarsePass

TRAIN, EVALUATE, INFERENCE = "configs/train.json", "configs/evaluate.json", "configs/inference.json"


def config(name: str) -> dict:
    return json.loads((BUNDLE / "configs" / name).read_text())


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


# --- what they promise each other -----------------------------------------------------------------------------
LIMITS = {
    "train.json": (40, 25),
    "inference.json": (25, 13),
    "evaluate.json": (15, 11),
    "multi_gpu_train.json": (7, 8),
    "inference_trt.json": (4, 1),
    "label.json": (3, 0),
    "label_train.json": (10, 3),
    "paper.json": (23, 0),
    "demo.json": (13, 0),
    "phantoms.json": (14, 0),
    "federated.json": (7, 0),
}


def test_metadata_describes_the_shipped_weights() -> None:
    spec, metadata = saved_spec(BUNDLE / "models" / "model.pt"), config("metadata.json")
    facts = metadata["network_data_format"]
    for image in (facts["inputs"]["image"], facts["outputs"]["pred"]):
        assert image["spatial_shape"] == list(spec.roi_size)
    box = f"{' x '.join(map(str, spec.roi_size))} voxels of {spec.spacing_mm:g} mm for the demonstration weights"
    assert box in metadata["image_classes"]
    assert all(f"{k} is {name}" in metadata["label_classes"] for k, name in enumerate(spec.seg_classes, start=1))
    cases = saved_provenance(BUNDLE / "models" / "model.pt")["trained_on"].partition(",")[0]
    assert f"The weights: {cases}, no patients." in metadata["data_source"]


def test_the_setting_of_the_weights_changes_the_augmentation_that_it_means() -> None:
    """An overlay counts the transforms of train.json, whose order is not its own."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / name) for name in ("train.json", "phantoms.json")])
    before, after = config("train.json")["train"]["augmentation"]["transforms"], parser["train#augmentation#transforms"]
    changed = {
        (new["_target_"].rpartition(".")[2], new["channel"]): {key for key in new if new[key] != old[key]}
        for old, new in zip(before, after, strict=True)
        if new != old
    }
    assert changed == {("Scale", "pet"): {"prob", "factors"}, ("Blur", "ct"): {"prob"}}


@pytest.mark.parametrize("name", [path.name for path in sorted((BUNDLE / "configs").glob("*.json"))])
def test_configs_stay_short_and_without_logic(name: str) -> None:
    """Ids at the top and expressions, at most so many."""
    if name == "metadata.json":
        return
    ids, expressions = LIMITS[name]
    assert len(config(name)) <= ids
    assert (BUNDLE / "configs" / name).read_text().count('"$') <= expressions


def test_training_and_inference_define_the_same_network(trained: Path) -> None:
    """In both, ``network`` is the ensemble on the device."""
    assert config("train.json")["network"] == config("inference.json")["network"]
    inference = ConfigParser(config("inference.json"))
    inference.update({"checkpoint": str(trained / "models" / "model.pt"), "device": "cpu"})
    train = ConfigParser(config("train.json"))
    train.update({"roi_size": 32, "spacing_mm": 8.0, "device": "cpu"})
    one, other = (parser.get_parsed_content("network") for parser in (train, inference))
    assert one.settings == other.settings
    assert {name: getattr(value, "shape", None) for name, value in one.state_dict().items()} == {
        name: getattr(value, "shape", None) for name, value in other.state_dict().items()
    }


@pytest.mark.parametrize(
    ("purpose", "keys_kept", "use_mask"),
    [
        pytest.param("training", TRAINING_KEYS, True, id="training"),
        pytest.param("evaluation", TRAINING_KEYS, False, id="evaluation"),
        pytest.param("inference", INFERENCE_KEYS, False, id="inference"),
    ],
)
def test_training_evaluation_and_inference_preprocess_alike(purpose: str, keys_kept: tuple, use_mask: bool) -> None:
    spec = ModelSpec(["seg"], ["m_stage", "age"], 32, 4.0, [-100, 900], [0, 20], 1e-5)
    load, box, quality, resample, scale, clinical, select = Preprocessing(spec, purpose).transforms
    assert isinstance(load, LoadScansd)
    assert (box.roi_size, box.spacing_mm, box.use_mask) == ((32, 32, 32), 4.0, use_mask)
    assert quality.roi_size == resample.roi_size == (32, 32, 32)
    assert (scale.ct_window, scale.pet_window) == ((-100, 900), (0, 20))
    assert clinical.features == ("m_stage", "age")
    assert select.keys == keys_kept


@pytest.mark.parametrize(
    ("proposer", "shared"),
    [
        pytest.param(None, False, id="no_network"),
        pytest.param(CoarsePass("model.pt"), True, id="in_doubt"),
        pytest.param(CoarsePass("model.pt", when="always"), False, id="always"),
        pytest.param(lambda *_: [], False, id="of_a_user"),
    ],
)
def test_cases_are_prepared_by_rules_alone_where_a_network_is_asked_in_doubt_only(proposer: Any, shared: bool) -> None:
    spec = ModelSpec(["seg"], [], 32, 4.0, [-1000, 1000], None, 1e-5)
    rules = Preprocessing(spec, "evaluation", proposer, advisory=["box_in_view"]).by_rules
    assert (rules is not None) == shared
    if rules is not None:
        plain = Preprocessing(spec, "evaluation", None, advisory=["box_in_view"])
        assert pickle_hashing(rules.transforms) == pickle_hashing(plain.transforms)


def test_preprocessing_for_another_purpose_is_refused() -> None:
    spec = ModelSpec(["seg"], [], 32, 4.0, [-1000, 1000], None, 1e-5)
    with pytest.raises(ValueError, match="purpose is one of training, evaluation, inference"):
        Preprocessing(spec, "predict")


@pytest.mark.parametrize(
    "overlay", ["evaluate.json", "paper.json", "demo.json", "phantoms.json", "multi_gpu_train.json", "label_train.json"]
)
def test_overlays_change_only_what_exists(overlay: str) -> None:
    """An id that train.json does not have would be ignored in silence."""
    parser = ConfigParser(config("train.json"))
    own = {
        "evaluate.json": {
            "checkpoint",
            "proposer",
            "split#divided",
            "evaluating",
            "evaluate_on",
            "evaluation_dir",
            "finalize",
        },
        "multi_gpu_train.json": {"local_rank", "validate#dataloader#sampler", "finalize"},
        "label_train.json": {"finalize"},
    }
    unknown = [key for key in config(overlay) if key not in parser and key not in own.get(overlay, set())]
    assert not unknown


# --- training -------------------------------------------------------------------------------------------------
def test_training_leaves_what_it_promises(trained: Path) -> None:
    assert (trained / "models" / "model.pt").is_file()
    assert list((trained / "tensorboard").glob("events.*"))
    history = json.loads((trained / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2]
    assert {"loss", "val_c_index", "val_dice", "val_balanced_accuracy", "val_loss", "lr"} <= set(history[0])
    assert all(np.isfinite(row["loss"]) for row in history)


def test_training_does_not_touch_the_shipped_model(trained: Path) -> None:
    assert not (BUNDLE / "models" / "resume").exists()


def test_started_again_a_complete_run_has_nothing_to_do(trained: Path, tiny_cohort: Path, run_bundle) -> None:
    arguments = ["--dataset_dir", str(tiny_cohort), "--output_dir", str(trained), *SMALL_RUN]
    result = run_bundle("training", "--config_file", TRAIN, *arguments)
    assert "is complete after epoch 2: nothing to do" in result.stdout + result.stderr


def test_a_broken_off_run_ends_as_an_unbroken_one(trained: Path, tiny_cohort: Path, tmp_path: Path, run_bundle) -> None:
    """One epoch, then the same command for two: losses, metrics and weights equal those of the unbroken run."""
    arguments = ["--dataset_dir", str(tiny_cohort), "--output_dir", str(tmp_path), *SMALL_RUN]
    run_bundle("training", "--config_file", TRAIN, *arguments, "--epochs", "1")
    result = run_bundle("run", "--config_file", TRAIN, *arguments)
    assert "resuming after epoch 1" in result.stdout + result.stderr
    broken, unbroken = (json.loads((p / "history.json").read_text()) for p in (tmp_path, trained))
    assert [row["epoch"] for row in broken] == [1, 2]
    for a, b in zip(broken, unbroken, strict=True):
        assert a == pytest.approx(b)
    states = [
        torch.load(p / "models" / "resume" / "last.pt", weights_only=True)["network"] for p in (tmp_path, trained)
    ]
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, states[1][name])


def test_one_more_patient_is_another_run(tmp_path: Path, run_bundle) -> None:
    """The folds differ then: resuming would validate on cases that were trained on."""
    cohort = make_tiny_cohort(tmp_path / "cohort")
    arguments = ["--dataset_dir", str(cohort), "--output_dir", str(tmp_path / "out"), *SMALL_RUN, "--epochs", "1"]
    run_bundle("training", "--config_file", TRAIN, *arguments)
    before = (tmp_path / "out" / "models" / "model.pt").read_bytes()
    make_tiny_cohort(cohort, patients=7)
    last = run_bundle("training", "--config_file", TRAIN, *arguments, code=1).stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "CHUM-007 came in" in last
    assert "give another output_dir, or delete" in last and str(tmp_path / "out" / "models" / "resume") in last
    assert (tmp_path / "out" / "models" / "model.pt").read_bytes() == before


ON_NOTHING = ["--dataset_dir", "no_such_folder"]


@pytest.mark.parametrize(
    ("run_id", "files", "options", "message"),
    [
        pytest.param("training", [TRAIN], ["--epoch", "1"], "the id 'epoch'.*'epochs' meant", id="training"),
        pytest.param("evaluating", [TRAIN, EVALUATE], ["--evaluate_in=all"], "'evaluate_on' meant", id="evaluating"),
        pytest.param("inference", [INFERENCE], ["--forced", "True"], "'force' meant", id="inference"),
        pytest.param("training", [TRAIN], ["--device", "gpu"], "device 'gpu' cannot be used", id="device"),
        pytest.param("inference", [INFERENCE], ["--device", "cuda:99"], "device 'cuda:99' cannot", id="no_such_gpu"),
    ],
)
def test_what_cannot_be_meant_ends_a_run_in_one_line(run_bundle, run_id, files, options, message) -> None:
    said = run_bundle(run_id, "--config_file", str(files), *ON_NOTHING, *options, code=1).stderr
    assert re.search(f"error: .*{message}", said.strip().splitlines()[-1])
    assert "Traceback" not in said


def test_the_bundle_run_from_another_folder_says_what_is_missing_or_works(
    trained: Path, tiny_cohort: Path, tmp_path: Path, run_bundle
) -> None:
    where = ["--bundle_root", str(BUNDLE), "--dataset_dir", str(tiny_cohort), "--ckpt_dir", str(trained / "models")]
    command = ["inference", "--config_file", str(BUNDLE / INFERENCE), *where, "--device", "cpu"]
    said = run_bundle(*command, code=1, cwd=tmp_path).stderr
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("error: the code of the bundle is not on the path of Python")
    assert "set PYTHONPATH" in said
    # a folder whose name looks like a number, below one with a '#', neither of which MONAI's command line leaves alone
    (tmp_path / "a#1").mkdir()
    run_bundle(*command, "--output_dir", "2025_11", cwd=tmp_path / "a#1", path=str(BUNDLE))
    run_bundle(*command, "--output_dir", str(tmp_path / "a#1" / "b"), cwd=tmp_path, path=str(BUNDLE))
    for folder in (tmp_path / "a#1" / "2025_11", tmp_path / "a#1" / "b"):
        assert [row["status"] for row in rows_of(folder / "predictions.csv")] == ["ok"] * 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a#1"]


def test_another_run_in_the_same_folder_is_refused(trained: Path, tiny_cohort: Path, run_bundle) -> None:
    arguments = ["--dataset_dir", str(tiny_cohort), "--output_dir", str(trained), *SMALL_RUN, "--fold", "1"]
    result = run_bundle("training", "--config_file", TRAIN, *arguments, code=1)
    assert "error: " in result.stderr
    assert "fold: 0 there, 1 now" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("tasks", "overlay"),
    [
        pytest.param("['surv']", ["configs/paper.json"], id="surv"),
        pytest.param("seg,surv", [], id="seg_surv"),
        pytest.param("['seg','hpv','surv']", ["configs/paper.json"], id="paper"),
    ],
)
def test_ablations_and_the_paper_overlay_train_and_evaluate(tmp_path, tiny_cohort, run_bundle, tasks, overlay) -> None:
    files = [TRAIN, *overlay]
    common = ["--dataset_dir", str(tiny_cohort), "--output_dir", str(tmp_path), "--num_folds", "2"]
    arguments = [*common, *SMALL_RUN, "--epochs", "1", "--tasks", tasks]
    run_bundle("training", "--config_file", str(files), *arguments)
    result = run_bundle("evaluating", "--config_file", str([*files, EVALUATE]), *common, "--batch_size", "2")
    report = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert report["cases"] == 3
    assert (report["metrics"]["dice"]["value"] is None) == ("seg" not in tasks), result.stdout
    reasons = {name: row.get("reason") for name, row in report["metrics"].items()}
    assert (reasons["balanced_accuracy"] == "not a task of this model") == ("hpv" not in tasks)


def test_survival_alone_has_no_tumour_to_measure(tmp_path, tiny_cohort, run_bundle) -> None:
    arguments = ["--dataset_dir", str(tiny_cohort), "--output_dir", str(tmp_path), *SMALL_RUN, "--tasks", "surv"]
    said = run_bundle("training", "--config_file", TRAIN, *arguments, code=1).stderr
    assert "without the task 'seg' there is no tumour" in said and "set survival_inputs to ['deep']" in said
    assert "Traceback" not in said


def test_a_cohort_with_masks_only_is_judged_by_dice(tmp_path: Path, run_bundle) -> None:
    cohort = make_tiny_cohort(tmp_path / "cohort")
    (cohort / "HECKTOR_2025_Training_Task_3.csv").unlink()
    arguments = ["--dataset_dir", str(cohort), "--output_dir", str(tmp_path / "out"), *SMALL_RUN, "--epochs", "1"]
    arguments += ["--keep_epoch", "best"]
    result = run_bundle("training", "--config_file", TRAIN, *arguments)
    assert "the best of 1 by dice on the validation cases" in result.stdout + result.stderr


def test_training_leaves_out_faulty_scans_and_keeps_other_body_regions(tmp_path: Path, run_bundle) -> None:
    """No head in view is no reason to leave a training case out, a PET in Bq/mL is; both are told."""
    cohort = make_tiny_cohort(tmp_path / "cohort")
    for patient in (f"CHUM-{k}" for k in ("001", "002", "003", "004", "005", "006")):
        scans = cohort / "Task 1" / patient
        change_image(scans / f"{patient}__CT.nii.gz", lambda ct: np.where(ct == -950, 40, ct).astype(np.int16))
    change_image(scans / f"{patient}__PT.nii.gz", lambda pet: pet * np.float32(5000))
    arguments = ["--dataset_dir", str(cohort), "--output_dir", str(tmp_path / "out"), *SMALL_RUN, "--epochs", "1"]
    result = run_bundle("training", "--config_file", TRAIN, *arguments)
    (row,) = rows_of(tmp_path / "out" / "exclusions.csv")
    assert row["PatientID"] == "CHUM-006" and "is the PET in Bq/mL" in row["reason"]
    assert "kept in spite of head_in_view" in result.stdout + result.stderr


def test_without_a_cohort_one_line_says_how_to_make_one(tmp_path: Path, run_bundle) -> None:
    bundle = shutil.copytree(BUNDLE, tmp_path / "bundle", ignore=shutil.ignore_patterns("output", "data"))
    result = run_bundle("training", "--config_file", TRAIN, code=1, cwd=bundle)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: no dataset_dir given")
    assert "python scripts/make_cohort.py --out" in last


NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as docs/training.md says: else a restart finds old addresses
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "1", "--nproc_per_node"]


def start_processes(cohort: Path, output: Path, count: int = 2, device: str = "cpu") -> subprocess.Popen[str]:
    files = str([TRAIN, "configs/multi_gpu_train.json"])
    where = ["--dataset_dir", str(cohort), "--output_dir", str(output), *SMALL_RUN, "--epochs", "3"]
    where[where.index("--device") + 1] = device
    command = ["-m", "monai.bundle", "run", "training", "--config_file", files, *where]
    return subprocess.Popen(
        [sys.executable, *TORCHRUN, str(count), *command],
        cwd=BUNDLE,
        env={**os.environ, **NEW_STORE, "OMP_NUM_THREADS": "1", "NCCL_DEBUG": "VERSION"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_second(torchrun: subprocess.Popen[str]) -> None:
    """Kill -9 the second of the processes that ``torchrun`` started."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    (second,) = [child for child in children if b"LOCAL_RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()]
    os.kill(int(second), signal.SIGKILL)


@pytest.fixture(scope="module")
def cohort_of_eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cohort, and its patient, of those that the second of two processes prepares, whose PET is damaged."""
    cohort = make_tiny_cohort(tmp_path_factory.mktemp("eight"), patients=8)
    damaged = load_cohort(cohort).split("partial", 2, 0, 0).validation[1]
    Path(damaged["pet"]).write_bytes(b"damaged")
    return cohort, damaged["patient_id"]


@pytest.fixture(scope="module")
def trained_by_two(cohort_of_eight: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of two processes on CPU (gloo)."""
    output = tmp_path_factory.mktemp("two")
    run = start_processes(cohort_of_eight[0], output)
    log, _ = run.communicate()
    assert run.returncode == 0, log[-3000:]
    return output


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", id="gloo"),
        pytest.param("cuda:0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), id="nccl"),
    ],
)
def test_one_process_joins_itself(cohort_of_eight: tuple[Path, str], tmp_path: Path, device: str) -> None:
    run = start_processes(cohort_of_eight[0], tmp_path, 1, device)
    log, _ = run.communicate()
    assert run.returncode == 0, log[-3000:]
    assert ("NCCL version" in log) == (device != "cpu")
    history = json.loads((tmp_path / "history.json").read_text())
    assert len(history) == 3 and all(np.isfinite(row["val_dice"]) for row in history)
    assert saved_provenance(tmp_path / "models" / "model.pt")["trained_on"]


def test_two_processes_train_together(trained_by_two: Path, cohort_of_eight: tuple[Path, str]) -> None:
    """A case that only the second process reads, and cannot, is listed, and the three others are validated."""
    assert (trained_by_two / "models" / "model.pt").is_file()
    assert all(np.isfinite(row["val_dice"]) for row in json.loads((trained_by_two / "history.json").read_text()))
    (excluded,) = rows_of(trained_by_two / "exclusions.csv")
    assert (excluded["PatientID"], excluded["set"]) == (cohort_of_eight[1], "validation")


def test_when_one_process_is_killed_the_run_ends_as_an_unbroken_one(
    trained_by_two: Path, cohort_of_eight: tuple[Path, str], tmp_path: Path
) -> None:
    run = start_processes(cohort_of_eight[0], tmp_path)
    while not (tmp_path / "models" / "resume" / "last.pt").is_file() and run.poll() is None:
        time.sleep(0.01)
    kill_second(run)
    log, _ = run.communicate()
    assert run.returncode == 0, log[-3000:]
    assert "resuming after epoch" in log
    assert json.loads((tmp_path / "history.json").read_text()) == json.loads(
        (trained_by_two / "history.json").read_text()
    )
    whole, parts = (
        torch.load(folder / "models" / "resume" / "last.pt", weights_only=True)["network"]
        for folder in (trained_by_two, tmp_path)
    )
    tensors = [{k: v for k, v in state.items() if isinstance(v, torch.Tensor)} for state in (whole, parts)]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)


def test_mlflow_tracking(tmp_path: Path, tiny_cohort: Path, run_bundle) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    arguments = ["--dataset_dir", str(tiny_cohort), "--output_dir", str(tmp_path), *SMALL_RUN, "--epochs", "1"]
    run_bundle("training", "--config_file", TRAIN, *arguments, "--tracking", "mlflow")
    assert (tmp_path / "mlruns.db").is_file()


# --- evaluating and inference ------------------------------------------------------------------------------------
def test_evaluating_reads_the_trained_model(trained: Path, tiny_cohort: Path, run_bundle) -> None:
    common = ["--dataset_dir", str(tiny_cohort), "--output_dir", str(trained), "--num_folds", "2", *TINY]
    run_bundle("evaluating", "--config_file", f"['{TRAIN}','{EVALUATE}']", *common)
    report = json.loads((trained / "evaluation" / "metrics.json").read_text())
    assert report["dataset_dir"] == str(tiny_cohort)
    assert report["tumour_inside_box"]["minimum"] == 1.0
    rows = rows_of(trained / "evaluation" / "cases.csv")
    assert len(rows) == report["cases"] == 3


def test_evaluating_prepares_every_case_once(trained: Path, tmp_path: Path, monkeypatch) -> None:
    """With the cache of the training only what is in doubt, and with the same results."""
    loaded, load = [], LoadScansd.__call__
    monkeypatch.setattr(
        LoadScansd, "__call__", lambda self, data: loaded.append(data[keys.PATIENT_ID]) or load(self, data)
    )
    monkeypatch.chdir(BUNDLE)
    cohort = tmp_path / "phantoms"
    write_cohort(cohort, 6, 0, "small")
    first = min((cohort / "Task 1").rglob("*__PT.nii.gz"))
    change_image(first, lambda pet: np.minimum(pet, np.float32(1.0)))  # no brain
    where = {"dataset_dir": str(cohort), "ckpt_dir": str(trained / "models"), "output_dir": str(tmp_path)}
    options = {"evaluate_on": "all", "num_workers": 0, "device": "cpu", "logging_file": False, "workflow_type": "train"}

    def evaluate(**more: Any) -> str:
        loaded.clear()
        workflow = ConfigWorkflow([str(BUNDLE / TRAIN), str(BUNDLE / EVALUATE)], **where, **options, **more)
        workflow.initialize()
        workflow.run()
        workflow.finalize()
        assert not (tmp_path / "evaluation_all" / "cache").exists()
        return (tmp_path / "evaluation_all" / "cases.csv").read_text()

    table = evaluate()
    assert json.loads((tmp_path / "evaluation_all" / "metrics.json").read_text())["cases"] == len(loaded)
    assert len(loaded) == len(set(loaded))
    rows = rows_of(tmp_path / "evaluation_all" / "cases.csv")
    doubtful = [row["PatientID"] for row in rows if (row["crop_method"], row["crop_flag"]) != ("pet_brain", "")]
    assert 0 < len(doubtful) < len(rows)
    assert evaluate(**{"validate#dataset#shared_cache_dir": str(tmp_path / "shared")}) == table
    assert sorted(loaded) == sorted([row["PatientID"] for row in rows] + doubtful)
    assert evaluate(**{"validate#dataset#shared_cache_dir": str(tmp_path / "shared")}) == table
    assert sorted(loaded) == sorted(doubtful)


def test_settings_that_differ_from_the_weights_are_refused(trained: Path, tiny_cohort: Path, run_bundle) -> None:
    arguments = ["--dataset_dir", str(tiny_cohort), "--ckpt_dir", str(trained / "models"), "--spacing_mm", "4.0"]
    result = run_bundle("inference", "--config_file", INFERENCE, *arguments, code=1)
    assert "spacing_mm: weights 8.0, config 4.0" in result.stderr


@pytest.fixture(scope="module")
def faulty_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good patients, one without PET, one whose CT is damaged, one without a clinical row, one with PET in Bq/mL."""
    folder = make_tiny_cohort(tmp_path_factory.mktemp("faulty"), patients=6)
    images = folder / "Task 1"
    (images / "CHUM-002" / "CHUM-002__PT.nii.gz").unlink()
    damaged = images / "CHUM-003" / "CHUM-003__CT.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:500])
    table = folder / "HECKTOR_2025_Training_Task_3.csv"
    table.write_text("".join(line for line in table.read_text().splitlines(True) if "CHUM-004" not in line))
    change_image(images / "CHUM-006" / "CHUM-006__PT.nii.gz", lambda pet: pet * np.float32(5000))
    return folder


def change_image(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write an image again with other values."""
    array, affine = read_image(path)
    nibabel.save(nibabel.Nifti1Image(change(array.copy()), affine), path)


def test_inference_gives_every_patient_a_row(trained: Path, faulty_cohort: Path, tmp_path: Path, run_bundle) -> None:
    arguments = [
        "--dataset_dir",
        str(faulty_cohort),
        "--ckpt_dir",
        str(trained / "models"),
        "--output_dir",
        str(tmp_path),
    ]
    result = run_bundle("inference", "--config_file", INFERENCE, *arguments, code=1)
    assert "model: 1 fold, trained on 3 cases of 1 centre (CHUM)" in result.stdout + result.stderr
    rows = {row["PatientID"]: row for row in rows_of(tmp_path / "predictions.csv")}
    statuses = {patient: row["status"] for patient, row in rows.items()}
    assert statuses == {
        "CHUM-001": "ok",
        "CHUM-002": "failed",
        "CHUM-003": "failed",
        "CHUM-004": "incomplete",
        "CHUM-005": "ok",
        "CHUM-006": "failed",
    }
    assert "PET" in rows["CHUM-002"]["reason"]
    assert "CHUM-003__CT.nii.gz" in rows["CHUM-003"]["reason"]
    assert "clinical" in rows["CHUM-004"]["reason"]
    assert "is the PET in Bq/mL" in rows["CHUM-006"]["reason"] and "('force', --force)" in rows["CHUM-006"]["reason"]
    good = rows["CHUM-001"]
    assert np.isfinite([float(good[c]) for c in ("log_hazard", "hpv_probability", "tumour_volume_ml")]).all()
    assert good["crop_method"]
    ct = nibabel.load(faulty_cohort / "Task 1" / "CHUM-001" / "CHUM-001__CT.nii.gz")
    mask = nibabel.load(tmp_path / good["mask"])
    assert mask.shape == ct.shape
    np.testing.assert_allclose(mask.affine, ct.affine)
    volume = np.count_nonzero(np.asarray(mask.dataobj)) * 8**3 / 1000
    assert float(good["tumour_volume_ml"]) == pytest.approx(volume)
    assert not list(tmp_path.glob("*.partial"))
    assert sorted(path.parent.name for path in tmp_path.glob("*/prediction.json")) == [
        "CHUM-001",
        "CHUM-004",
        "CHUM-005",
    ]
    said = json.loads((tmp_path / "CHUM-001" / "prediction.json").read_text())
    jsonschema.validate(said, json.loads((BUNDLE / "docs" / "prediction.schema.json").read_text()))
    assert float(good["log_hazard"]) == said["survival"]["log_hazard"]
    assert good["model_sha256"] == hashlib.sha256((trained / "models" / "model.pt").read_bytes()).hexdigest()
    assert good["trained_on"] == "3 cases of 1 centre (CHUM); research use only, not for clinical use"


def test_by_force_a_rejected_patient_is_predicted_and_every_output_says_so(
    trained: Path, faulty_cohort: Path, tmp_path: Path, run_bundle
) -> None:
    where = ["--dataset_dir", str(faulty_cohort), "--ckpt_dir", str(trained / "models"), "--output_dir", str(tmp_path)]
    run_bundle("inference", "--config_file", INFERENCE, *where, "--force", "True", code=1)
    rows = {row["PatientID"]: row for row in rows_of(tmp_path / "predictions.csv")}
    assert (rows["CHUM-006"]["status"], rows["CHUM-006"]["quality"]) == ("ok", "reject")
    assert {patient: row["forced"] for patient, row in rows.items()} == {
        **{"CHUM-001": "False", "CHUM-002": "", "CHUM-003": "", "CHUM-004": "False", "CHUM-005": "False"},
        "CHUM-006": "True",
    }
    said = json.loads((tmp_path / "CHUM-006" / "prediction.json").read_text())
    assert said["quality"]["forced"]
    assert "pet_body" in [check["name"] for check in said["quality"]["checks"] if check["verdict"] == "reject"]


def test_inference_without_weights_says_so(tiny_cohort: Path, tmp_path: Path, run_bundle) -> None:
    arguments = ["--dataset_dir", str(tiny_cohort), "--ckpt_dir", str(tmp_path)]
    result = run_bundle("inference", "--config_file", INFERENCE, *arguments, code=1)
    assert result.stderr.strip().splitlines()[-1].startswith("error: no weights at")


# --- as MONAI's workflow sees them ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(TRAIN, "train", id="train"), pytest.param(INFERENCE, "infer", id="inference")]
)
def test_check_properties_passes(trained, tiny_cohort, tmp_path, monkeypatch, name, kind) -> None:
    monkeypatch.chdir(BUNDLE)
    where = {"dataset_dir": str(tiny_cohort), "output_dir": str(tmp_path), "device": "cpu"}
    if kind == "infer":
        where["ckpt_dir"] = str(trained / "models")
    workflow = ConfigWorkflow(
        str(BUNDLE / name), workflow_type=kind, logging_file=False, roi_size=[32, 32, 32], spacing_mm=8.0, **where
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.finalize()


def test_the_bundle_works_when_copied_elsewhere(trained: Path, tiny_cohort: Path, tmp_path: Path, run_bundle) -> None:
    bundle = shutil.copytree(BUNDLE, tmp_path / "copy", ignore=shutil.ignore_patterns("output", "data", "model.pt"))
    shutil.copy(trained / "models" / "model.pt", bundle / "models" / "model.pt")
    run_bundle("inference", "--config_file", INFERENCE, "--dataset_dir", str(tiny_cohort), cwd=bundle)
    rows = rows_of(bundle / "output" / "predictions" / "predictions.csv")
    assert [row["status"] for row in rows] == ["ok"] * 6
