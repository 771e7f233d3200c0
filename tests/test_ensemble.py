"""The ensemble: what folds give together, what its checkpoints hold, what they refuse."""

from __future__ import annotations

import copy
import pickle
import zipfile

import pytest
import torch
from ignite.handlers import Checkpoint

from scripts.keys import (
    CLASS_LOGITS,
    CLASS_PROB,
    FEATURES,
    HPV_PROB,
    HPV_PROB_FOLDS,
    HPV_PROB_STD,
    LOG_HAZARD,
    LOG_HAZARD_FOLDS,
    LOG_HAZARD_STD,
    SEG_PROB,
)
from scripts.model.ensemble import (
    EXTRA_STATE,
    FoldEnsemble,
    complete,
    count_folds,
    join_folds,
    load_weights,
    read_facts,
    read_state,
    save_weights,
    saved_spec,
)
from scripts.model.errors import CheckpointError, SettingsMismatch
from scripts.model.networks import MultitaskNet

OLD = {  # as versions 0.1 and 0.2 wrote them
    "tasks": ["seg", "hpv", "surv"],
    "clinical_features": ["age", "gender"],
    "roi_size": [32, 32, 32],
    "spacing_mm": 2.0,
    "ct_window": [-1000, 1000],
    "pet_window": None,
    "bn_eps": 1e-05,
}
SETTINGS = {**OLD, "survival_inputs": ["deep"], "hpv_inputs": ["image"], "seg_classes": ["GTV"], "lesion_peak": 0.5}


def ensemble(folds=1, seed=0, tasks=("seg", "hpv", "surv"), settings=None):
    """An evaluated ensemble whose members differ."""
    torch.manual_seed(seed)
    made = FoldEnsemble(MultitaskNet(2, tasks), {**SETTINGS, "tasks": list(tasks)} if settings is None else settings)
    made.resize(folds)
    for member in made.folds:
        for parameter in member.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return made.eval()


@pytest.fixture
def image():
    torch.manual_seed(7)
    return torch.rand(2, 2, 16, 16, 16)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "models" / "model.pt"


def answers(made, image):
    with torch.no_grad():
        return made.predict(image, torch.ones(2, 2))


HPV_KEYS = {HPV_PROB, HPV_PROB_STD, HPV_PROB_FOLDS}
SURVIVAL_KEYS = {LOG_HAZARD, LOG_HAZARD_STD, LOG_HAZARD_FOLDS, FEATURES}

# --- prediction --------------------------------------------------------------------------------------------


def test_classes_of_tumour_are_averaged_and_add_up_to_the_tumour(image):
    torch.manual_seed(0)
    made = FoldEnsemble(MultitaskNet(2, seg_classes=2), {**SETTINGS, "seg_classes": ["GTVp", "GTVn"]})
    made.resize(2)
    for parameter in made.folds[1].parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    found = answers(made.eval(), image)
    with torch.no_grad():
        logits = [fold(image, torch.ones(2, 2))[CLASS_LOGITS] for fold in made.folds]
    each = [torch.softmax(torch.cat([torch.zeros(2, 1, 16, 16, 16), one], dim=1), dim=1)[:, 1:] for one in logits]
    torch.testing.assert_close(found[CLASS_PROB], torch.stack(each).mean(dim=0))
    torch.testing.assert_close(found[CLASS_PROB].sum(dim=1, keepdim=True), found[SEG_PROB])
    with torch.no_grad():
        assert torch.equal(made(image), found[SEG_PROB])


def test_prediction_is_the_mean_and_the_spread_of_the_members(image):
    made = ensemble(3)
    result = answers(made, image)
    with torch.no_grad():
        members = [fold(image, torch.ones(2, 2)) for fold in made.folds]
    hazards = torch.stack([member["log_hazard"] for member in members])
    probabilities = torch.stack([member["hpv_logit"].sigmoid() for member in members])
    masks = torch.stack([member["seg_logits"].sigmoid() for member in members])
    assert hazards.std() > 0
    torch.testing.assert_close(result[LOG_HAZARD], hazards.mean(0))
    torch.testing.assert_close(result[LOG_HAZARD_STD], hazards.std(0, correction=0))
    torch.testing.assert_close(result[HPV_PROB], probabilities.mean(0))
    torch.testing.assert_close(result[HPV_PROB_STD], probabilities.std(0, correction=0))
    torch.testing.assert_close(result[SEG_PROB], masks.mean(0))
    torch.testing.assert_close(result[LOG_HAZARD_FOLDS], hazards.T)
    torch.testing.assert_close(result[HPV_PROB_FOLDS], probabilities.T)
    torch.testing.assert_close(result[FEATURES], torch.stack([member["features"] for member in members], dim=1))
    with torch.no_grad():
        torch.testing.assert_close(made(image), result[SEG_PROB])


def test_one_fold_has_no_spread(image):
    result = answers(ensemble(1), image)
    assert not {LOG_HAZARD_STD, HPV_PROB_STD} & set(result)


def test_prediction_under_autocast_is_float32(image):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = answers(ensemble(2), image)
        assert {value.dtype for value in result.values()} == {torch.float32}
        assert ensemble(2)(image).dtype == torch.float32


@pytest.mark.parametrize(
    ("tasks", "keys"),
    [
        pytest.param(("seg",), {SEG_PROB}, id="seg"),
        pytest.param(("hpv",), HPV_KEYS, id="hpv"),
        pytest.param(("surv",), SURVIVAL_KEYS, id="surv"),
        pytest.param(("hpv", "surv"), HPV_KEYS | SURVIVAL_KEYS, id="hpv+surv"),
    ],
)
def test_prediction_of_some_tasks(tasks, keys, image):
    assert set(answers(ensemble(2, tasks=tasks), image)) == keys


def test_no_mask_without_segmentation(image):
    with pytest.raises(RuntimeError, match="built without the 'seg' task"):
        ensemble(tasks=("surv",))(image)


def test_forward_scripts_as_the_zoo_exports_it(image):
    made = ensemble(2)
    torch.testing.assert_close(torch.jit.script(made)(image), made(image))


# --- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("stored", "present"), [(1, 1), (3, 1), (1, 3), (2, 3)])
def test_loading_makes_as_many_folds_as_are_stored(stored, present, strict, image):
    source, target = ensemble(stored), ensemble(present, seed=1)
    source.provenance = {"folds": [{"dice": 0.8}], "trained_on": "phantoms"}
    result = target.load_state_dict(source.state_dict(), strict=strict)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert len(target.folds) == stored and target.provenance == source.provenance
    torch.testing.assert_close(answers(target, image), answers(source, image), atol=0, rtol=0)


def test_loading_keeps_the_first_member_and_the_mode():
    target = ensemble(1, seed=1)
    first = target.folds[0]
    target.load_state_dict(ensemble(2).state_dict())
    assert target.folds[0] is first and not target.folds[1].training


def test_loading_inside_another_module():
    outer = torch.nn.ModuleDict({"net": ensemble(1, seed=1)})
    outer.load_state_dict(torch.nn.ModuleDict({"net": ensemble(3)}).state_dict())
    assert len(outer["net"].folds) == 3


def test_state_dict_keys_are_stable():
    names = list(ensemble(2).state_dict())
    assert "_extra_state" in names and "folds.1.survival.log_hazard.weight" in names
    assert {name.split(".")[0] for name in names} == {"_extra_state", "folds"}


def test_file_round_trip(path, image):
    source = ensemble(3)
    save_weights(source, path)
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"], "no partial file is left"
    loaded = load_weights(ensemble(1, seed=1), path)
    torch.testing.assert_close(answers(loaded, image), answers(source, image), atol=0, rtol=0)


def test_weights_older_than_a_setting_load_as_what_they_were(tmp_path):
    torch.manual_seed(0)
    path, old = tmp_path / "model.pt", FoldEnsemble(MultitaskNet(2), OLD)
    save_weights(old, path)
    assert saved_spec(path).to_dict() == SETTINGS
    new = load_weights(FoldEnsemble(MultitaskNet(2), saved_spec(path)), path).eval()
    image = torch.rand(1, 2, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(new.predict(image), old.eval().predict(image))


@pytest.mark.parametrize("settings", [OLD, SETTINGS], ids=["older", "stored"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"hpv_inputs": ["image", "clinical"]},
            r"hpv_inputs: weights \['image'\], config \['image', 'clinical'\]",
            id="hpv_inputs",
        ),
        pytest.param(
            {"seg_classes": ["GTVp", "GTVn"]},
            r"seg_classes: weights \['GTV'\], config \['GTVp', 'GTVn'\]",
            id="seg_classes",
        ),
    ],
)
def test_weights_older_than_a_setting_are_refused_where_it_differs(path, settings, change, message):
    save_weights(ensemble(settings=settings), path)
    with pytest.raises(SettingsMismatch, match=message):
        load_weights(ensemble(settings={**SETTINGS, **change}), path)


def test_folds_older_than_a_setting_join_those_that_say_the_same():
    old, new = (FoldEnsemble(MultitaskNet(2), settings) for settings in (OLD, complete(OLD)))
    assert count_folds(join_folds({"old": old.state_dict(), "new": new.state_dict()})) == 2


def test_a_file_is_read_once_until_it_is_another(path, monkeypatch):
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: loads.append(args) or load(*args, **options))
    save_weights(ensemble(1), path)
    first = read_state(path)
    first.pop(EXTRA_STATE)  # the caller's own dictionary
    assert EXTRA_STATE in read_state(path) and saved_spec(path).to_dict() == SETTINGS and len(loads) == 1
    load_weights(ensemble(1), path)
    assert read_facts(path)[1] == 1 and len(loads) == 1
    save_weights(ensemble(2), path)
    assert read_facts(path)[1] == 2 and len(loads) == 2


def test_half_precision_on_disk_is_float32_in_memory(path, image):
    source = ensemble(2)
    save_weights(source, path)
    whole = path.stat().st_size
    save_weights(source, path, half=True)
    assert path.stat().st_size < 0.6 * whole
    state = torch.load(path, weights_only=True)
    assert state["folds.0.decoder.logits.weight"].dtype == torch.float16
    assert state["folds.0.survival.norm.running_var"].dtype == torch.float32
    loaded = load_weights(ensemble(1, seed=1), path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(answers(loaded, image), answers(source, image), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("key", [None, "model", "network"])
def test_checkpoints_of_several_objects(path, key):
    path.parent.mkdir()
    state = ensemble(2).state_dict()
    torch.save(state if key is None else {key: state, "epoch": 3}, path)
    assert len(load_weights(ensemble(1), path).folds) == 2
    assert saved_spec(path).to_dict() == SETTINGS


@pytest.mark.parametrize("strict", [True, False])
def test_ignite_loads_it(path, strict):
    save_weights(ensemble(2), path)
    target = ensemble(1)
    Checkpoint.load_objects({"network": target}, torch.load(path, weights_only=True), strict=strict)
    assert len(target.folds) == 2


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    save_weights(ensemble(1), path)
    before = path.read_bytes()

    def fail(state, target):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(ensemble(2), path)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["deepcopy", "pickle"]
)
def test_copies(duplicate, image):
    made = ensemble(2)
    made.provenance = {"note": "phantoms"}
    other = duplicate(made)
    assert (other.settings, other.provenance) == (made.settings, made.provenance)
    torch.testing.assert_close(answers(other, image), answers(made, image), atol=0, rtol=0)


# --- settings ----------------------------------------------------------------------------------------------


def test_settings_given_beside_a_file_must_be_its_own(path):
    save_weights(ensemble(1), path)
    own, other = {"seg_classes": ("GTV",)}, {"seg_classes": ("GTVp", "GTVn"), "spacing_mm": SETTINGS["spacing_mm"]}
    assert saved_spec(path, **own).to_dict() == SETTINGS
    message = r"whose settings come from the weights: seg_classes: weights \['GTV'\], config \['GTVp', 'GTVn'\]$"
    with pytest.raises(SettingsMismatch, match=message):
        saved_spec(path, **other)


def test_tuples_and_whole_floats_are_the_same_settings():
    alike = {**SETTINGS, "spacing_mm": 2, "roi_size": (32, 32, 32), "clinical_features": ("age", "gender")}
    ensemble(1, settings=alike).load_state_dict(ensemble(1).state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_settings_that_differ_are_named_and_nothing_is_loaded(strict):
    target = ensemble(1, seed=1, settings=SETTINGS | {"spacing_mm": 3.0, "clinical_features": ["age"], "new": 1})
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(SettingsMismatch) as error:
        target.load_state_dict(ensemble(2).state_dict(), strict=strict)
    for difference in (
        "spacing_mm: weights 2.0, config 3.0",
        "clinical_features: weights ['age', 'gender'], config ['age']",
        "new: weights (absent), config 1",
    ):
        assert difference in str(error.value)
    assert "roi_size" not in str(error.value)
    torch.testing.assert_close(target.folds.state_dict(), {k[6:]: v for k, v in before.items() if k[:6] == "folds."})


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(TypeError, match=r"settings.box\[0\] is a Tensor"):
        FoldEnsemble(MultitaskNet(), {"box": [torch.ones(1)]})
    made = ensemble(1)
    made.provenance = {"metric": torch.ones(1)}
    with pytest.raises(TypeError, match=r"provenance\.metric is a Tensor"):
        made.state_dict()


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_something_else_are_refused(strict):
    with pytest.raises(CheckpointError, match="carry no settings"):
        ensemble(1).load_state_dict(MultitaskNet(2).state_dict(), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_a_gap_among_the_folds_is_refused(strict):
    state = {name: value for name, value in ensemble(3).state_dict().items() if not name.startswith("folds.1.")}
    with pytest.raises(CheckpointError, match=r"the folds \[0, 2\]"):
        ensemble(1).load_state_dict(state, strict=strict)


def test_a_missing_weight_is_refused_when_strict():
    state = ensemble(2).state_dict()
    del state["folds.1.decoder.logits.bias"]
    with pytest.raises(RuntimeError, match=r"folds\.1\.decoder\.logits\.bias"):
        ensemble(1).load_state_dict(state)


def test_no_fold_is_refused():
    with pytest.raises(ValueError, match="at least one fold"):
        ensemble(1).resize(0)


@pytest.mark.parametrize("read", [saved_spec, lambda path: load_weights(ensemble(1), path)], ids=["spec", "weights"])
def test_no_file_says_how_to_get_one(read, path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*model\.pt: train some with") as error:
        read(path)
    assert "\n" not in str(error.value)


def write_garbage(path):
    path.write_bytes(b"not a checkpoint")


def write_bare_network(path):
    torch.save(MultitaskNet(2).state_dict(), path)


def write_list(path):
    torch.save([1, 2], path)


def write_cut(path):
    save_weights(ensemble(1), path)
    path.write_bytes(path.read_bytes()[:-100])


def write_flipped(path):
    """Weights of which one bit has changed, which torch.load does not notice."""
    save_weights(ensemble(1), path)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda item: item.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(write_garbage, "cannot be read as a checkpoint", id="garbage"),
        pytest.param(write_cut, "cannot be read as a checkpoint", id="cut"),
        pytest.param(write_flipped, "is damaged: .*copy or download it again", id="flipped"),
        pytest.param(write_bare_network, "carries no settings", id="bare_network"),
        pytest.param(write_list, "carries no settings", id="list"),
    ],
)
def test_files_of_something_else_are_refused(write, message, path):
    path.parent.mkdir()
    write(path)
    for call in (lambda: load_weights(ensemble(1), path), lambda: saved_spec(path)):
        with pytest.raises(CheckpointError, match=message) as error:
            call()
        assert str(path) in str(error.value)


# --- several folds in one ----------------------------------------------------------------------------------


def test_joined_folds_answer_as_each_of_them_on_average(image):
    members = [ensemble(1, seed=seed) for seed in range(3)]
    joined = ensemble(1, seed=9)
    joined.load_state_dict(join_folds({f"fold {k}": member.state_dict() for k, member in enumerate(members)}))
    assert len(joined.folds) == 3 and joined.provenance == {}
    separate = torch.stack([answers(member, image)[LOG_HAZARD] for member in members])
    torch.testing.assert_close(answers(joined, image)[LOG_HAZARD], separate.mean(0))
    torch.testing.assert_close(answers(joined, image)[LOG_HAZARD_STD], separate.std(0, correction=0))


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        pytest.param(
            {"settings": SETTINGS | {"spacing_mm": 3.0}},
            SettingsMismatch,
            "fold 0 and fold 1 do not belong together: spacing_mm: fold 0 2.0, fold 1 3.0",
            id="settings",
        ),
        pytest.param(
            {"tasks": ("surv",), "settings": SETTINGS},
            CheckpointError,
            "fold 0 and fold 1 differ in their weights",
            id="weights",
        ),
        pytest.param({"folds": 2}, CheckpointError, "fold 1 is an ensemble of 2 folds already", id="ensemble"),
    ],
)
def test_folds_that_do_not_belong_together_are_not_joined(others, error, message):
    with pytest.raises(error, match=message):
        join_folds({"fold 0": ensemble(1).state_dict(), "fold 1": ensemble(**others).state_dict()})


def test_no_folds_are_not_joined():
    with pytest.raises(CheckpointError, match="no folds to join"):
        join_folds({})


def test_loading_says_what_the_model_is(path, caplog):
    source = ensemble(3)
    source.provenance = {"trained_on": "300 digital phantoms, not for clinical use"}
    save_weights(source, path)
    with caplog.at_level("INFO", logger="scripts.model.ensemble"):
        load_weights(ensemble(1), path)
    assert caplog.messages == ["model: 3 folds, trained on 300 digital phantoms, not for clinical use"]
