"""The merged configuration: misspelt ids, text that stays text, devices, and what makes a run another one."""

from __future__ import annotations

import csv
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from conftest import BUNDLE, make_tiny_cohort
from runtimes.inference import CaseList, load_bundle
from scripts.training.configuration import (
    PROCESSES,
    ConfigurationError,
    check_device,
    check_ids,
    check_numbers,
    paths_as_typed,
    run_differences,
)
from scripts.training.configuration import _typed as typed_options
from scripts.training.engine import innermost

TRAIN, EVALUATE, INFERENCE = ("train.json",), ("train.json", "evaluate.json"), ("inference.json",)
OF_INFERENCE = ("inference.json", "inference_trt.json", "label.json")
LOSS, MOMENTUM = "train#loss", "network_def#network#bn_momentum"
AUGMENTATION, PRIOR = "train#augmentation#transforms", "network_def#network#tumour_prior"
CONFIGS = [path.name for path in sorted((BUNDLE / "configs").glob("*.json")) if path.name != "metadata.json"]


def merged(*files: str, **changes: Any) -> ConfigParser:
    """Configs as MONAI's workflow merges them with options."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / name) for name in files])
    parser.read_meta(str(BUNDLE / "configs" / "metadata.json"))
    parser.update(changes)
    parser.parse()
    return parser


# --- ids ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("overlay", [name for name in CONFIGS if name not in OF_INFERENCE])
def test_the_bundles_own_configs_pass(overlay: str) -> None:
    check_ids(merged("train.json", overlay).get())


def test_the_bundles_own_configs_of_inference_pass() -> None:
    check_ids(merged(*OF_INFERENCE).get())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"epochs": "ten"}, "epochs is 'ten', not a whole number from 1 on", id="word"),
        pytest.param({"epochs": 0}, "epochs is 0, not a whole number from 1 on", id="none"),
        pytest.param({"epochs": -1}, "epochs is -1, not", id="negative"),
        pytest.param({"epochs": 1.5}, "epochs is 1.5, not", id="part"),
        pytest.param({"epochs": True}, "epochs is True, not", id="switch_for_a_number"),
        pytest.param({"batch_size": [4]}, r"batch_size is \[4\], not", id="list"),
        pytest.param({"num_workers": -2}, "num_workers is -2, not a whole number from 0 on", id="workers"),
        pytest.param({"learning_rate": "1e-4x"}, "learning_rate is '1e-4x', not a number from 0 on$", id="rate"),
        pytest.param({"learning_rate": -0.1}, "learning_rate is -0.1, not a number from 0 on", id="negative_rate"),
        pytest.param({"learning_rate": math.inf}, "learning_rate is inf, not a number from 0 on", id="infinite"),
        pytest.param({"lr_factors": [math.nan, 1, 1]}, "lr_factors#0 is nan, not a number", id="not_a_number"),
        pytest.param({f"{LOSS}#hpv_alpha": 1.5}, "train#loss#hpv_alpha is 1.5, not a number from 0 to 1", id="alpha"),
        pytest.param({f"{LOSS}#hpv_alpha": -0.1}, "train#loss#hpv_alpha is -0.1, not a number", id="negative_alpha"),
        pytest.param({f"{LOSS}#hpv_alpha": None}, "train#loss#hpv_alpha is None, not a number", id="no_alpha"),
        pytest.param({f"{LOSS}#hpv_gamma": -2}, "train#loss#hpv_gamma is -2, not a number from 0 on", id="gamma"),
        pytest.param(
            {f"{LOSS}#task_weights": {"seg": 1, "surv": -1}},
            "train#loss#task_weights#surv is -1, not a number from 0 on",
            id="weight",
        ),
        pytest.param({f"{LOSS}#task_weights": {"hpv": "2"}}, "weights#hpv is '2', not a number", id="weight_as_text"),
        pytest.param(
            {MOMENTUM: 1.1}, "network_def#network#bn_momentum is 1.1, not a number from 0 to 1", id="momentum"
        ),
        pytest.param({"num_folds": 1}, "num_folds is 1, not a whole number from 2 on", id="one_fold"),
        pytest.param({"epochs": None}, "epochs is None, not a whole number from 1 on", id="null"),
        pytest.param({"seed": 1.5}, "seed is 1.5, not a whole number from 0 on", id="part_of_a_seed"),
        pytest.param({"seed": -1}, "seed is -1, not", id="negative_seed"),
        pytest.param({"early_stop_patience": -1}, "early_stop_patience is -1, not", id="no_patience"),
        pytest.param({"early_stop_patience": 2.5}, "early_stop_patience is 2.5, not a whole number", id="patience"),
        pytest.param({"l2_weight": -0.1}, "l2_weight is -0.1, not a number from 0 on", id="negative_penalty"),
        pytest.param({"lr_factors": ["0.5", 0.1, 0.01]}, "lr_factors#0 is '0.5', not a number", id="text_in_a_list"),
        pytest.param({"lr_milestones": [1, 2, 3, "9"]}, "lr_milestones#3 is '9', not a number", id="longer_list"),
        pytest.param({"lr_milestones": (4, "6")}, "lr_milestones#1 is '6', not a number", id="tuple"),
        pytest.param({"train#sampler#event_fraction": "0.5"}, "event_fraction is '0.5', not a number", id="component"),
        pytest.param({PRIOR: "0.05"}, "network_def#network#tumour_prior is '0.05', not a number", id="prior"),
        pytest.param({f"{AUGMENTATION}#0#prob": "0.5"}, "transforms#0#prob is '0.5', not a number", id="augmentation"),
        pytest.param({f"{AUGMENTATION}#3#fwhm_mm#1": True}, "fwhm_mm#1 is True, not a number", id="switch_in_a_list"),
        pytest.param({"train#trainer#non_blocking": "false"}, "non_blocking is 'false', not True", id="switch"),
    ],
)
def test_what_is_no_number_is_refused_where_there_is_to_be_one(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_numbers(merged(*TRAIN, **changes).get())


@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"epochs": 1}, {"epochs": "$2 * 3"}, {"learning_rate": 1}, {"fold": "@seed"}, {"l2_weight": 0}),
        *({"spacing_mm": [2, 3, 4]}, {"spacing_mm": (2, 3, 4)}, {"roi_size": 64}, {"lr_milestones": (4, 6, 8)}),
        *({PRIOR: None}, {PRIOR: "@fold"}, {"train#sampler#event_fraction": None}, {"train#loss#hpv_gamma": 2}),
        *({f"{LOSS}#task_weights": {"hpv": 0}}, {f"{LOSS}#task_weights": "uncertainty"}, {f"{LOSS}#hpv_alpha": 1}),
        *({MOMENTUM: 0}, {f"{LOSS}#hpv_gamma": "@fold"}, {f"{LOSS}#task_weights": {"surv": "$0.5"}}),
        *({AUGMENTATION: []}, {AUGMENTATION: [{"_target_": "mine", "prob": 1, "axis": "$1"}]}),
    ],
    ids=str,
)
def test_numbers_pass(changes: dict[str, Any]) -> None:
    check_numbers(merged(*TRAIN, **changes).get())
    check_numbers(merged(*TRAIN, "paper.json", **changes).get())


def test_a_switch_is_true_or_false() -> None:
    check_numbers(merged(*INFERENCE, force=True).get())
    with pytest.raises(ConfigurationError, match="force is 'maybe', not True or False"):
        check_numbers(merged(*INFERENCE, force="maybe").get())


FLIP = [{"_target_": "scripts.training.augmentation.Flip", "prob": 1.0}]


@pytest.mark.parametrize(
    ("files", "changes"),
    [
        pytest.param(TRAIN, {"epochs": 1, "roi_size": 64, "train#trainer#amp": True}, id="known"),
        pytest.param(TRAIN, {"train#loss#task_weights": {"hpv": 10.0}}, id="parts_of_a_value"),
        pytest.param(EVALUATE, {"checkpoint": "x", "epochs": 3, "evaluate_on": "all"}, id="of_an_overlay"),
        pytest.param(TRAIN, {"mine": 0.3, "train#loss#hpv_alpha": "@mine"}, id="referred_to"),
        pytest.param(
            TRAIN, {"mine": {"a": 0.3}, "train#loss#hpv_alpha": "$@mine['a'] / 2"}, id="referred_to_as_a_whole"
        ),
        pytest.param(TRAIN, {"mine": {"a": {"b": 3}}, "train#loss#hpv_alpha": "@mine#a#b"}, id="referred_to_in_part"),
        pytest.param(TRAIN, {"mine": FLIP, AUGMENTATION: "%mine"}, id="copied_by_a_macro"),
        pytest.param(TRAIN, {"look": ["$print(@epochs)"]}, id="expressions_to_run"),
        pytest.param(
            TRAIN, {"train#loss": {"_target_": "torch.nn.L1Loss"}}, id="own_ids_that_nothing_refers_to_any_more"
        ),
        pytest.param(TRAIN, {"tracking_uri": "x", "experiment_name": "y", "run_name": "z"}, id="tracking"),
        pytest.param(INFERENCE, {"force": True, "proposer#when": "always"}, id="inference"),
    ],
)
def test_ids_that_mean_something(files: tuple[str, ...], changes: dict[str, Any]) -> None:
    check_ids(merged(*files, **changes).get())


@pytest.mark.parametrize(
    ("files", "name", "value", "message"),
    [
        pytest.param(TRAIN, "epoch", 1, "no config has the id 'epoch'.*'epochs' meant", id="epoch"),
        pytest.param(TRAIN, "learningrate", 0.1, "'learning_rate' meant", id="learning_rate"),
        pytest.param(TRAIN, "checkpoint", "x.pt", "no config has the id 'checkpoint'", id="of_a_config_not_in_use"),
        pytest.param(TRAIN, "train#datasets", [], "'train#dataset' meant", id="list"),
        pytest.param(TRAIN, "train#epochs", 1, "no config has the id 'train#epochs'.*'epochs' meant", id="nested"),
        pytest.param(TRAIN, "validate#preprocess", {}, "'validate#preprocessing'", id="nested_dictionary"),
        pytest.param(TRAIN, "xyzzy", 1, "see the ids in configs", id="like_nothing"),
        pytest.param(EVALUATE, "evaluate_with", "all", "'evaluate_on' meant", id="evaluating"),
        pytest.param(INFERENCE, "forced", True, "'force' meant", id="inference"),
        pytest.param(INFERENCE, "epochs", 2, "no config has the id 'epochs'", id="of_training"),
    ],
)
def test_ids_that_would_do_nothing(files: tuple[str, ...], name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        check_ids(merged(*files, **{name: value}).get())
    assert "\n" not in str(error.value)


# --- text -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "typed", "restored"),
    [
        pytest.param({"output_dir": "out"}, {"output_dir": "out"}, {}, id="as_it_is"),
        pytest.param({"output_dir": 202511}, {"output_dir": "2025_11"}, {"output_dir": "2025_11"}, id="underscore"),
        pytest.param({"output_dir": 1.1}, {"output_dir": "1.10"}, {"output_dir": "1.10"}, id="float"),
        pytest.param({"ckpt_dir": True}, {"ckpt_dir": "True"}, {"ckpt_dir": "True"}, id="bool"),
        pytest.param({"output_dir": ("a", "b")}, {"output_dir": "a,b"}, {"output_dir": "a,b"}, id="comma"),
        pytest.param({"dataset_dir": "/d/a::b"}, {"dataset_dir": "/d/a#b"}, {"dataset_dir": "/d/a#b"}, id="hash"),
        pytest.param({"output_dir": "out"}, {"output_dir": "out#1"}, {"output_dir": "out#1"}, id="fire_cuts_at_hash"),
        pytest.param({"output_dir": "2025_11"}, {"output_dir": "'2025_11'"}, {}, id="quoted"),
        pytest.param({"ehr_csv": ("a.csv", "b.csv")}, {"ehr_csv": "a.csv,b.csv"}, {}, id="several_tables"),
        pytest.param({"ehr_csv": 2025}, {"ehr_csv": "2025"}, {"ehr_csv": "2025"}, id="one_table"),
        pytest.param({"cache_dir": "$None"}, {"cache_dir": "$None"}, {}, id="expression"),
        pytest.param({"cache_dir": None}, {}, {}, id="none"),
        pytest.param({"ehr_csv": None}, {"ehr_csv": "None"}, {}, id="none_typed"),
        pytest.param({"a": "@b::c", "b": "$@c::d", "c": "%d::e"}, {}, {}, id="references"),
        pytest.param({"epochs": 2}, {"epochs": "2"}, {}, id="no_path"),
    ],
)
def test_paths_stay_what_was_typed(config: dict, typed: dict, restored: dict) -> None:
    assert paths_as_typed(config, typed) == restored


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param({"output_dir": 202511}, "output_dir is the number 202511", id="number_of_an_overlay"),
        pytest.param({"ckpt_dir": "/m/a::b"}, "ckpt_dir is '/m/a::b'.*'#'", id="hash_of_an_overlay"),
        pytest.param({"train": {"handlers": [{"log_dir": "x::y"}]}}, "train#handlers#0#log_dir", id="hash_nested"),
    ],
)
def test_paths_that_cannot_be_had_back_are_refused(config: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        paths_as_typed(config, {})


def test_cases_of_a_caller_may_have_any_name() -> None:
    """One patient called so must not end the cohort."""
    cases = CaseList([{"patient_id": "a::b", "ct": "/data/$x/::1", "weight": "@id"}])
    assert paths_as_typed({"output_dir": "out", "dataset": {"data": cases}}, {}) == {}


def test_only_the_command_line_of_monai_is_read() -> None:
    command = ["run", "training", "--output_dir", "1_0", "--ckpt-dir=2_0", "--output_dir", "3_0"]
    assert typed_options(["/x/monai/bundle/__main__.py", *command]) == {"output_dir": "3_0", "ckpt_dir": "2_0"}
    assert typed_options(["/x/predict.py", *command]) == {}


@pytest.mark.parametrize(("files", "name"), [(TRAIN, "output_dir"), (TRAIN, "cache_dir"), (INFERENCE, "output_dir")])
def test_a_run_sees_first_that_it_can_write(files: tuple[str, ...], name: str, tiny_cohort: Path, tmp_path: Path):
    (tmp_path / "file").write_text("somebody's")
    folders = {"output_dir": str(tmp_path / "out"), name: str(tmp_path / "file")}
    parser = merged(*files, dataset_dir=str(tiny_cohort), device="cpu", **folders)
    with pytest.raises(RuntimeError) as error:
        parser.get_parsed_content("initialize")
    assert "file: it is a file, not a folder" in str(innermost(error.value))
    assert (tmp_path / "file").read_text() == "somebody's"


# --- devices --------------------------------------------------------------------------------------------------------
def test_the_cpu_is_there() -> None:
    check_device("cpu")
    check_device(torch.device("cpu"))


@pytest.mark.parametrize(
    "device",
    [
        "gpu",
        "cuda:99",
        "",
        None,
        1.5,
        "meta",
        pytest.param("cuda:0", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)
def test_devices_that_are_not_there(device: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"device '.*' cannot be used here .*: give cpu, or cuda:N") as error:
        check_device(device)
    assert "\n" not in str(error.value)


def test_predict_looks_for_the_device_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="device 'gpu' cannot be used here"):
        load_bundle(str(tmp_path), str(tmp_path / "no_weights"), device="gpu")


# --- what makes a run another one -----------------------------------------------------------------------------------
SMALL = {"roi_size": 32, "spacing_mm": 8.0, "num_workers": 0, "device": "cpu", "batch_size": 2, "num_folds": 2}


@pytest.fixture
def describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """What defines a run of train.json on a cohort."""
    monkeypatch.setattr(sys, "argv", ["pytest"])

    def run(cohort: Path, *overlays: str, **changes: Any) -> dict[str, Any]:
        where = {"dataset_dir": str(cohort), "output_dir": str(tmp_path / "out")}
        return merged("train.json", *overlays, **{**where, **SMALL, **changes}).get_parsed_content("train#settings")

    return run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"fold": 1}, "fold: 0 there, 1 now", id="fold"),
        pytest.param({"lr_milestones": [1, 2, 3]}, "lr_milestones#0: 100 there, 1 now", id="milestones"),
        pytest.param({"lr_milestones": (100, 200, 250)}, "lr_milestones#2: 300 there, 250 now", id="typed_with_commas"),
        pytest.param({"network_def#network#bn_momentum": 0.01}, "bn_momentum: 0.1 there, 0.01 now", id="batch_norm"),
        pytest.param(
            {f"{AUGMENTATION}#1#prob": 0.9},
            "augmentation#transforms#1#prob: 0.5 there, 0.9 now",
            id="augmentation",
        ),
        pytest.param(
            {AUGMENTATION: []},
            "transforms#0#_target_: 'scripts.training.augmentation.Flip' there",
            id="no_augmentation",
        ),
        pytest.param({"train#trainer#amp": True}, "train#trainer#amp: '(absent)' there, True now", id="nested"),
        pytest.param({"train#optimizer#_target_": "torch.optim.SGD"}, "torch.optim.SGD' now", id="optimizer"),
        pytest.param({"keep_epoch": "best"}, "keep_epoch: 'last' there, 'best' now", id="epoch_kept"),
        pytest.param({"val_interval": 1}, "val_interval: 5 there, 1 now", id="validations"),
        pytest.param({"roi_size": 48}, "roi_size: 32 there, 48 now", id="box"),
        pytest.param({"train#preprocessing#advisory": []}, "advisory#0", id="quality"),
        pytest.param({"seed": 1}, "seed: 0 there, 1 now", id="seed"),
    ],
)
def test_another_configuration_is_another_run(describe: Callable, tiny_cohort: Path, changes: dict, message) -> None:
    differences = run_differences(describe(tiny_cohort), describe(tiny_cohort, **changes))
    assert message in "; ".join(differences)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="same"),
        pytest.param({"epochs": 900}, id="more_epochs"),
        pytest.param({"lr_milestones": (100, 200, 300)}, id="same_numbers_typed_with_commas"),
        pytest.param({"num_workers": 1, "amp": True, "compile": True, "checkpointing": True}, id="how_it_computes"),
        pytest.param({"output_dir": "x", "ckpt_dir": "y", "cache_dir": "$None"}, id="moved"),
        pytest.param({"validate#dataset#cache_dir": "x", "validate#dataset#shared_cache_dir": "y"}, id="cache_moved"),
        pytest.param({"tracking_uri": "x", "save_execute_config": "y"}, id="tracking"),
    ],
)
def test_what_changes_no_result_may_differ(describe: Callable, tiny_cohort: Path, changes: dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_differences(describe(tiny_cohort), describe(tiny_cohort, **changes)) == []


def change_cell(folder: Path, patient: str, column: str, value: str) -> None:
    table = next(folder.glob("*.csv"))
    rows = list(csv.DictReader(table.read_text().splitlines()))
    for row in rows:
        if row["PatientID"] == patient:
            row[column] = value
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda folder: make_tiny_cohort(folder, 7), "CHUM-007 came in", id="one_more_patient"),
        pytest.param(
            lambda folder: shutil.rmtree(folder / "Task 1" / "CHUM-002"),
            "CHUM-001, CHUM-002, CHUM-006 left",
            id="one_patient_less",
        ),
        pytest.param(
            lambda folder: change_cell(folder, "CHUM-001", "RFS", "17"),
            "other labels, clinical values or files: CHUM-001",
            id="survival",
        ),
        pytest.param(
            lambda folder: change_cell(folder, "CHUM-004", "Age", "80"),
            "other labels, clinical values or files: CHUM-004",
            id="clinical_value",
        ),
        pytest.param(
            lambda folder: (folder / "Task 1" / "CHUM-005" / "CHUM-005.nii.gz").unlink(), "CHUM-005", id="mask_removed"
        ),
        pytest.param(
            lambda folder: shutil.copy(
                folder / "Task 1" / "CHUM-003" / "CHUM-003__CT.nii.gz",
                folder / "Task 1" / "CHUM-005" / "CHUM-005__CT.nii.gz",
            ),
            "CHUM-005",
            id="other_scan",
        ),
    ],
)
def test_another_cohort_is_another_run(describe: Callable, tmp_path: Path, change: Callable, message: str) -> None:
    folder = make_tiny_cohort(tmp_path / "cohort")
    before = describe(folder)
    change(folder)
    assert message in "; ".join(run_differences(before, describe(folder)))


def test_a_cohort_that_was_copied_is_the_same(describe: Callable, tiny_cohort: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(tiny_cohort, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert run_differences(describe(tiny_cohort), describe(copied)) == []


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        pytest.param(2, 1, ["processes of torchrun (nnodes x nproc_per_node): 2 there, 1 now"], id="fewer"),
        pytest.param(1, 3, ["processes of torchrun (nnodes x nproc_per_node): 1 there, 3 now"], id="more"),
        pytest.param(2, 2, [], id="same"),
        pytest.param(None, 1, [], id="of_a_version_that_did_not_record_them"),
    ],
)
def test_another_number_of_processes_is_another_run(
    describe: Callable, tiny_cohort: Path, monkeypatch: pytest.MonkeyPatch, before: int | None, now: int, told: list
) -> None:
    monkeypatch.setattr("scripts.training.configuration.world_size", lambda: before)
    one = describe(tiny_cohort)
    if before is None:
        del one["configuration"][PROCESSES]
    monkeypatch.setattr("scripts.training.configuration.world_size", lambda: now)
    assert run_differences(one, describe(tiny_cohort)) == told


def test_a_state_of_an_earlier_version_is_told(describe: Callable, tiny_cohort: Path) -> None:
    assert run_differences({"fold": 0}, describe(tiny_cohort)) == ["it was written by another version of this bundle"]


def test_long_lists_are_cut() -> None:
    many = {f"P-{k:04d}": "1" for k in range(1000)}
    (text,) = run_differences({"training": many}, {"training": {}})
    assert "1000 training cases there, 0 now: P-0000, P-0001" in text and len(text) < 300
