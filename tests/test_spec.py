"""What a model may be, and checkpoints that somebody has forged: refused in one line, and nothing of them is run."""

from __future__ import annotations

import copy
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import SETTINGS, write_model

from experiments.ensemble import empty_ensemble
from runtimes.export import ExportError, load_model
from scripts.model.ensemble import (
    EXTRA_STATE,
    FoldEnsemble,
    load_weights,
    read_state,
    saved_provenance,
    saved_spec,
)
from scripts.model.errors import CheckpointError, SpecError
from scripts.model.spec import ModelSpec
from scripts.prediction.coarse import CoarsePass
from scripts.prediction.description import Model

GIVEN: dict[str, Any] = {**SETTINGS, "survival_inputs": ["burden"], "roi_size": 64}


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec(**{**GIVEN, **changes})


# --- what a model may be --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        pytest.param("tasks", "surv,seg", ("seg", "surv"), id="tasks_as_typed_in_any_order"),
        pytest.param("tasks", "seg", ("seg",), id="one_task"),
        pytest.param("tasks", ["seg", "hpv", "surv"], ("seg", "hpv", "surv"), id="list"),
        pytest.param("tasks", ("seg",), ("seg",), id="tuple_as_fire_makes_it"),
        pytest.param("hpv_inputs", "clinical, image", ("image", "clinical"), id="hpv_inputs"),
        pytest.param("survival_inputs", "burden", ("burden",), id="survival_inputs"),
        pytest.param("seg_classes", "GTVn,GTVp", ("GTVp", "GTVn"), id="seg_classes"),
        pytest.param("seg_classes", ["GTV"], ("GTV",), id="one_class"),
        pytest.param("clinical_features", "m_stage,age", ("m_stage", "age"), id="features_keep_their_order"),
        pytest.param("clinical_features", [], (), id="no_features"),
        pytest.param("roi_size", 64, (64, 64, 64), id="cube"),
        pytest.param("roi_size", [32, 48, 64], (32, 48, 64), id="box"),
        pytest.param("spacing_mm", [1, 1, 3.0], (1, 1, 3.0), id="three_spacings"),
        pytest.param("pet_window", [0, 25], (0, 25), id="window"),
        pytest.param("lesion_peak", 0.7, 0.7, id="lesion_peak"),
        pytest.param("lesion_peak", 0.5, 0.5, id="all_lesions"),
    ],
)
def test_a_model_as_it_may_be_given(name: str, given: Any, expected: Any) -> None:
    made = spec(**{name: given})
    assert getattr(made, name) == expected
    assert ModelSpec.read(made.to_dict()) == made


EVIL = "$__import__('pathlib').Path('ran').touch()"
WRONG = [
    pytest.param("lesion_peak", 0.4, "a probability from 0.5 on, below 1; got 0.4", id="peak_below_the_threshold"),
    pytest.param("lesion_peak", 1, "a probability from 0.5 on", id="no_lesion_at_all"),
    pytest.param("lesion_peak", "@bn_eps", "a probability from 0.5 on", id="reference_for_the_peak"),
    pytest.param("lesion_peak", None, "a probability from 0.5 on", id="no_peak"),
    pytest.param("tasks", [], "tasks are some of", id="no_task"),
    pytest.param("tasks", ["seg", "os"], "tasks are some of", id="unknown_task"),
    pytest.param("tasks", ["seg", "seg"], "tasks are some of", id="task_twice"),
    pytest.param("tasks", EVIL, "tasks are some of", id="expression_for_tasks"),
    pytest.param("tasks", {"_target_": "os.abort"}, "tasks are some of", id="component_for_tasks"),
    pytest.param("clinical_features", ["age", EVIL], "clinical_features are some of", id="expression_among_features"),
    pytest.param("clinical_features", ["relapse"], "clinical_features are some of", id="a_label"),
    pytest.param("survival_inputs", ["deep", "burden"], "not both", id="both_survival_inputs"),
    pytest.param("survival_inputs", "@tasks", "survival_inputs are some of", id="reference"),
    pytest.param("hpv_inputs", ["clinical"], "must be", id="without_the_image"),
    pytest.param("roi_size", 10**7, "roi_size is", id="10_TB"),
    pytest.param("roi_size", [512, 512, 512], "roi_size is", id="too_large_in_all"),
    pytest.param("roi_size", [32, 32], "roi_size is", id="two_numbers"),
    pytest.param("roi_size", 40, "multiples of 16", id="no_multiple"),
    pytest.param("roi_size", -32, "roi_size is", id="negative"),
    pytest.param("roi_size", True, "roi_size is", id="bool"),
    pytest.param("roi_size", "%configs/train.json", "roi_size is", id="macro"),
    pytest.param("spacing_mm", EVIL, "spacing_mm is", id="expression_for_a_number"),
    pytest.param("spacing_mm", float("nan"), "spacing_mm is", id="nan"),
    pytest.param("spacing_mm", 1e-9, "spacing_mm is", id="too_small"),
    pytest.param("spacing_mm", [1, 1], "spacing_mm is", id="two_spacings"),
    pytest.param("ct_window", [1000, -1000], "ct_window is", id="upside_down"),
    pytest.param("ct_window", None, "ct_window is", id="none"),
    pytest.param("pet_window", [0, float("inf")], "pet_window is", id="infinite"),
    pytest.param("bn_eps", 0, "bn_eps is", id="zero"),
    pytest.param("bn_eps", "1e-5", "bn_eps is", id="text"),
]


@pytest.mark.parametrize(("name", "given", "message"), WRONG)
def test_a_model_that_cannot_be_is_refused(name: str, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        spec(**{name: given})
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_hpv_status_is_not_predicted_from_itself() -> None:
    with pytest.raises(SpecError, match=r"predicted from itself.*--hpv_inputs image"):
        spec(clinical_features=["age", "hpv"])
    assert spec(clinical_features=["age", "hpv"], hpv_inputs="image").hpv_inputs == ("image",)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        pytest.param([1], "a dictionary is expected", id="list"),
        pytest.param({**GIVEN, "extra": 1}, "unknown settings", id="unknown"),
        pytest.param({name: GIVEN[name] for name in GIVEN if name != "bn_eps"}, "without bn_eps", id="missing"),
        pytest.param({**GIVEN, EVIL * 100: 1}, "unknown settings", id="long_name"),
    ],
)
def test_settings_are_all_there_and_no_others(stored: Any, message: str) -> None:
    with pytest.raises(SpecError, match=f"my.pt: .*{message}") as error:
        ModelSpec.read(stored, "my.pt")
    assert len(str(error.value)) < 400


# --- forged checkpoints -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a good file of two folds holds."""
    folder = write_model(tmp_path_factory.mktemp("good"))
    return dict(torch.load(folder / "model.pt", weights_only=True))


@pytest.fixture
def forge(good: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write the good file with a change; the working folder is where code that ran would leave its mark."""
    monkeypatch.chdir(tmp_path)

    def write(change: Callable[[dict[str, Any]], Any]) -> Path:
        state = copy.deepcopy(good)
        changed = change(state)
        (tmp_path / "models").mkdir(exist_ok=True)
        torch.save(state if changed is None else changed, tmp_path / "models" / "model.pt")
        return tmp_path / "models" / "model.pt"

    return write


def setting(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state[EXTRA_STATE]["settings"].update({name: value})


def told(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state[EXTRA_STATE]["provenance"].update({name: value})


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def weight(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({name: value})


BIAS = "folds.1.decoder.logits.bias"
FORGED = [
    *(pytest.param(setting(*case.values[:2]), case.values[2], id=f"setting_{case.id}") for case in WRONG),
    pytest.param(setting("extra", EVIL), "unknown settings", id="unknown_setting"),
    pytest.param(
        lambda s: s[EXTRA_STATE].update(settings={"tasks": ["seg"]}),
        "settings without clinical_features",
        id="setting_missing",
    ),
    pytest.param(lambda s: s[EXTRA_STATE].update(settings=[1]), "a dictionary is expected", id="settings_a_list"),
    pytest.param(weight(BIAS, torch.tensor([float("nan")])), "not finite", id="weight_nan"),
    pytest.param(weight(BIAS, torch.ones(2)), r"shape \(2,\); \(1,\) is expected", id="weight_of_another_shape"),
    pytest.param(weight(BIAS, torch.ones(1).expand(2**40)), "shape", id="weight_of_4_TB"),
    pytest.param(weight(BIAS, torch.ones(1, dtype=torch.int64)), "is of type", id="weight_of_another_type"),
    pytest.param(weight(BIAS, torch.ones(1, dtype=torch.complex64)), "is of type", id="complex_weight"),
    pytest.param(weight(BIAS, EVIL), "shape str", id="weight_that_is_text"),
    pytest.param(without(BIAS), f"1 weights are missing, such as {BIAS}", id="weight_missing"),
    pytest.param(weight("folds.0.other", torch.ones(1)), "are not the network's", id="weight_too_many"),
    pytest.param(lambda s: {**s, 7: torch.ones(1)}, "are not the network's", id="key_that_is_no_text"),
    pytest.param(weight("folds.4.x", torch.ones(1)), r"the folds \[0, 1, 4\]", id="fold_missing"),
    pytest.param(
        lambda s: {**s, **{f"folds.{k}.x": torch.ones(1) for k in range(2, 500)}}, "500 folds", id="many_folds"
    ),
    pytest.param(lambda s: s[EXTRA_STATE].update(provenance=EVIL), "dictionary is expected", id="provenance_text"),
    pytest.param(told("trained_on", ["x"]), "trained_on is", id="trained_on_a_list"),
    pytest.param(told("trained_on", "a\nb"), "trained_on is", id="trained_on_of_two_lines"),
    pytest.param(told("note", "\x1b[2J"), r"provenance\.note is", id="control_characters"),
    pytest.param(told("note", "x" * 10**6), r"provenance\.note is", id="long_text"),
    pytest.param(told("note", float("inf")), "finite", id="infinite_number"),
    pytest.param(told("note", torch.ones(1)), r"provenance\.note is", id="tensor"),
    pytest.param(told("note", [0] * 2_000_000), "more than 1000000 values", id="too_much"),
    pytest.param(told("voxel_limits", {"ct_slice": {"warn_above": EVIL}}), "voxel_limits are", id="limit_text"),
    pytest.param(told("voxel_limits", {"misalignment": {"reject_above": 9e9}}), "voxel_limits are", id="other_limits"),
    pytest.param(told("voxel_limits", {"ct_slice": {"nothing": 1}}), "voxel_limits: ", id="limit_of_another_kind"),
    pytest.param(told("hpv_threshold", {"value": 7}), "hpv_threshold is", id="threshold_out_of_range"),
    pytest.param(told("hpv_threshold", {"value": EVIL}), "hpv_threshold is", id="threshold_text"),
    pytest.param(told("hpv_threshold", [0.5]), "hpv_threshold is", id="threshold_a_list"),
    *(
        pytest.param(told(name, empty), f"{name} (is|are) ", id=f"{name}_{type(empty).__name__}_{empty!r}")
        for name, kinds in {
            "hpv_threshold": ([], {}, "", 0, False, {"value": None}),
            "calibration": ([], {}, "", 0, False),
            "feature_statistics": ({}, "", 0, False),
            "voxel_limits": ([], "", 0, False),
            "trained_on": ([], {}, 0, False),
        }.items()
        for empty in kinds
    ),
    pytest.param(told("calibration", EVIL), "calibration is", id="calibration_text"),
    pytest.param(told("calibration", {"reason": 3}), "calibration is", id="calibration_reason_a_number"),
    pytest.param(
        lambda s: s[EXTRA_STATE]["provenance"]["calibration"].update(slope=EVIL), r"calibration\.slope", id="slope_text"
    ),
    pytest.param(
        lambda s: s[EXTRA_STATE]["provenance"]["calibration"].update(fold_scales=[1.0, 0.0]),
        r"calibration\.fold_scales",
        id="scale_of_zero",
    ),
    pytest.param(told("feature_statistics", [{"reason": "x"}]), "one for each of 2", id="statistics_of_one_fold"),
    pytest.param(
        told("feature_statistics", [{"mean": [1.0]}] * 2), r"feature_statistics\[0\]", id="statistics_in_part"
    ),
]


@pytest.mark.parametrize(("change", "message"), FORGED)
def test_a_forged_checkpoint_is_refused_in_one_line(forge: Callable, tmp_path: Path, change: Any, message: str) -> None:
    path = forge(change)
    with pytest.raises(CheckpointError, match=message) as error:
        read_state(path)
    said = str(error.value)
    assert said.startswith(str(path)) and "\n" not in said and said.isprintable() and len(said) < 600
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda path: load_weights(FoldEnsemble(spec().network(), spec()), path), id="load_weights"),
        pytest.param(saved_spec, id="inference.json"),
        pytest.param(saved_provenance, id="provenance"),
        pytest.param(Model.of, id="describe_prediction"),
        pytest.param(lambda path: CoarsePass(path)._load(), id="coarse_pass"),
        pytest.param(load_model, id="export"),
    ],
)
def test_wherever_a_checkpoint_is_read_it_is_checked(forge: Callable, tmp_path: Path, use: Callable) -> None:
    path = forge(setting("spacing_mm", EVIL))
    with pytest.raises((CheckpointError, ExportError, RuntimeError)) as error:
        use(path)
    cause: BaseException | None = error.value
    while cause is not None and not isinstance(cause, CheckpointError):
        cause = cause.__cause__
    assert "spacing_mm is a number of mm" in str(cause)
    assert not (tmp_path / "ran").exists()


def test_settings_that_are_expressions_do_not_reach_a_parser_in_ensemble_folds(tmp_path, monkeypatch) -> None:
    """A network whose settings are handed over directly is checked as well."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match="spacing_mm"):
        empty_ensemble({**SETTINGS, "spacing_mm": EVIL})
    assert not (tmp_path / "ran").exists()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 22827041\n")


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Evil()))


def saved_object(path: Path) -> None:
    torch.save({"model": Evil()}, path)


def compressed(path: Path) -> None:
    torch.save({"model": {EXTRA_STATE: {}}}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def cut_off(path: Path) -> None:
    torch.save({"x": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(pointer, "is a Git LFS pointer, not the weights themselves: run `git lfs pull`", id="lfs_pointer"),
        pytest.param(pickled, "cannot be read as a checkpoint", id="plain_pickle"),
        pytest.param(saved_object, "holds other Python objects than weights", id="object_in_a_checkpoint"),
        pytest.param(compressed, "it is compressed", id="compressed"),
        pytest.param(cut_off, "cannot be read as a checkpoint: it is cut off", id="cut_off"),
        pytest.param(Path.touch, "cannot be read as a checkpoint", id="empty"),
    ],
)
def test_files_that_are_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable, message
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        read_state(tmp_path / "model.pt")
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_provenance_that_is_not_data_is_refused_by_whatever_loads_the_weights(forge: Callable) -> None:
    state = torch.load(forge(told("trained_on", ["x"])), weights_only=True)
    target = empty_ensemble(SETTINGS)
    with pytest.raises(CheckpointError, match="trained_on is"):
        target.load_state_dict(state)
    assert len(target.folds) == 1 and target.provenance == {}
