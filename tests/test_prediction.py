"""The dictionary of a prediction: against its schema, with and without a calibration, and through the config."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from functools import cache
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from monai.data import MetaTensor
from monai.transforms import Compose, FlattenSubKeysd

from conftest import BUNDLE
from scripts import keys
from scripts.cohorts.clinical import DEFAULT_FEATURES
from scripts.evaluation.plots import draw_patient_curve
from scripts.evaluation.survival import DAYS_PER_YEAR, Calibration, FoldScale, fit_calibration
from scripts.imaging.geometry import Grid, box_grid
from scripts.imaging.quality import Check, QualityError, checks_to_json
from scripts.imaging.quality_features import fit_feature_statistics
from scripts.imaging.transforms import CodeClinicald, RestoreMaskd
from scripts.model.ensemble import FoldEnsemble, save_weights
from scripts.model.networks import MultitaskNet
from scripts.prediction.description import CURVE_POINTS, DescribePredictiond, Model, survival_curve, weights_sha256
from scripts.prediction.measures import MeasureTumourd

SCHEMA = json.loads((BUNDLE / "docs" / "prediction.schema.json").read_text())
FOLDS = 3
CT = Grid((30, 28, 26), np.diag([4.0, 4.0, 4.0, 1.0]))
BOX = box_grid(CT.centre, 16, 4.0)
THRESHOLD = {"value": 0.4, "balanced_accuracy": 0.9, "patients": 10, "positive": 5}


def valid(prediction: dict) -> dict:
    """The prediction, once it is seen to follow the schema and to survive JSON."""
    jsonschema.validate(prediction, SCHEMA, format_checker=jsonschema.FormatChecker())
    assert json.loads(json.dumps(prediction, allow_nan=False)) == prediction
    return prediction


@cache
def calibration(years: float = 4.0, patients: int = 200, sign: float = 1.0, folds: int = FOLDS) -> Calibration:
    """Fitted to exponential times whose rate rises with the log hazard, all followed for ``years`` at most."""
    rng = np.random.default_rng(0)
    risk = rng.normal(size=patients)
    relapse = rng.exponential(2000 * np.exp(-sign * risk))
    end = rng.uniform(0.3, 1.0, patients) * years * DAYS_PER_YEAR
    end[0], relapse[0] = years * DAYS_PER_YEAR, 1e9
    scales = [FoldScale(0.1 * k, 1.0 + k) for k in range(folds)]
    return fit_calibration(risk, np.minimum(relapse, end), relapse <= end, scales)


def statistics() -> list[dict]:
    rng = np.random.default_rng(1)
    return [fit_feature_statistics(rng.normal(size=(60, 5))) for _ in range(FOLDS)]


SETTINGS = {
    "tasks": list(keys.TASKS),
    "clinical_features": list(DEFAULT_FEATURES),
    "roi_size": list(BOX.shape),
    "spacing_mm": 8.0,
    "ct_window": [-1000, 1000],
    "pet_window": None,
    "bn_eps": 1e-5,
}


def ensemble(tasks: tuple[str, ...] = keys.TASKS, folds: int = FOLDS, **provenance: object) -> FoldEnsemble:
    torch.manual_seed(0)
    model = FoldEnsemble(MultitaskNet(tasks=tasks), {**SETTINGS, "tasks": list(tasks)})
    model.resize(folds)
    model.provenance = dict(provenance)
    return model.eval()


@pytest.fixture(scope="module")
def whole() -> FoldEnsemble:
    """Three folds that know all there is to know."""
    return ensemble(
        trained_on="300 digital phantoms, not for clinical use",
        calibration=calibration().to_dict(),
        hpv_threshold=THRESHOLD,
        feature_statistics=statistics(),
    )


@pytest.fixture(scope="module")
def bare() -> FoldEnsemble:
    """A single fold, as train.json leaves it."""
    return ensemble(folds=1, trained_on="3 cases")


def result(folds: int = FOLDS, log_hazard: float = 0.5, hpv: float = 0.7) -> dict:
    """A patient after the network, flat and without a batch axis, up to the mask's measures."""
    distance = np.linalg.norm(BOX.to_world(np.moveaxis(np.indices(BOX.shape), 0, -1)) - CT.centre, axis=-1)
    spread = torch.linspace(-0.1, 0.1, folds) if folds > 1 else torch.zeros(1)
    pet = torch.full((1, *CT.shape), 5.0)
    checks = [Check("pet_lowest", 0.0, "SUV", "at least -0.05 SUV", "ok", "lowest PET value: 0 SUV")]
    item = {
        keys.PATIENT_ID: "CHUM-001",
        keys.IMAGE: MetaTensor(torch.zeros(2, *BOX.shape)),
        keys.PET: MetaTensor(pet, affine=torch.from_numpy(CT.affine)),
        keys.CT_SHAPE: torch.tensor(CT.shape),
        keys.CT_AFFINE: torch.from_numpy(CT.affine),
        keys.BOX_AFFINE: torch.from_numpy(BOX.affine),
        keys.CROP_METHOD: "pet_brain",
        keys.CROP_FLAG: "",
        keys.QUALITY: checks_to_json(checks),
        keys.STARTED: torch.tensor(time.monotonic() - 2.0, dtype=torch.float64),
        keys.CLINICAL: {"age": 61.3, "gender": "female"},
        keys.SEG_PROB: torch.from_numpy((distance < 12).astype(np.float32))[None],
        keys.HPV_PROB: torch.tensor(hpv),
        keys.HPV_PROB_STD: torch.tensor(0.05),
        keys.HPV_PROB_FOLDS: hpv + spread,
        keys.LOG_HAZARD: torch.tensor(log_hazard),
        keys.LOG_HAZARD_STD: torch.tensor(0.1),
        keys.LOG_HAZARD_FOLDS: log_hazard + spread,
        keys.FEATURES: torch.zeros(folds, 5),
    }
    if folds == 1:  # as FoldEnsemble.predict leaves them out
        del item[keys.HPV_PROB_STD], item[keys.LOG_HAZARD_STD]
    return Compose([CodeClinicald(DEFAULT_FEATURES), RestoreMaskd(), MeasureTumourd()])(item)


def describe(model: FoldEnsemble, data: dict, **settings: object) -> dict:
    return DescribePredictiond(model, **settings)(data)[keys.PREDICTION]


# --- the whole ------------------------------------------------------------------------------------------------------
def test_a_whole_prediction(whole: FoldEnsemble) -> None:
    said = valid(describe(whole, result()))
    assert said["notice"] == keys.RESEARCH_USE_ONLY
    assert said["model"]["trained_on"] == "300 digital phantoms, not for clinical use"
    assert (said["model"]["folds"], said["model"]["tasks"]) == (3, ["seg", "hpv", "surv"])
    assert said["model"]["sha256"] == weights_sha256(whole)
    metadata = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
    assert (said["model"]["name"], said["model"]["version"]) == (metadata["name"], metadata["version"])
    assert said["tumour"]["volume_ml"] == pytest.approx(result()[keys.VOLUME_ML])
    assert said["tumour"]["suv_max"] == 5.0
    assert said["clinical"][0] == {"name": "age", "value": 61.3, "coded": pytest.approx(61.3), "missing": False}
    assert [row["missing"] for row in said["clinical"]] == [False, False, True, True, True, True, True]
    np.testing.assert_allclose(said["crop"]["centre_mm"], BOX.centre)
    np.testing.assert_allclose(said["crop"]["size_mm"], BOX.extent)
    assert 2.0 <= said["seconds"]["total"] < 60
    assert said["quality"]["verdict"] == "ok" and not said["quality"]["forced"]
    assert [check["name"] for check in said["quality"]["checks"]] == ["pet_lowest", "feature_distance"]


def test_absolute_risk_is_that_of_the_calibration(whole: FoldEnsemble) -> None:
    known = calibration()
    said = describe(whole, result())["survival"]
    folds = said["log_hazard_folds"]
    at = known.survival_interval(folds, np.array([1, 2, 3]) * DAYS_PER_YEAR)
    rows = said["recurrence_free_survival"]
    assert [row["years"] for row in rows] == [1, 2, 3]
    assert [row["survival"] for row in rows] == at.survival.tolist()
    assert all(row["low"] < row["survival"] < row["high"] for row in rows)
    assert said["beyond_follow_up"] == [5]
    assert said["percentile"] == known.percentile(at.log_hazard)
    assert (said["unavailable"], said["doubt"]) == ("", "")
    assert said["curve"]["days"][0] == 0 and said["curve"]["survival"][0] == 1
    assert said["curve"]["days"][-1] == known.last_day
    assert len(said["curve"]["days"]) <= CURVE_POINTS


def test_a_higher_log_hazard_is_a_higher_risk(whole: FoldEnsemble) -> None:
    low, middle, high = (describe(whole, result(log_hazard=value))["survival"] for value in (-4, 0.2, 4))
    assert [s["risk_group"] for s in (low, middle, high)] == ["low", "intermediate", "high"]
    assert low["percentile"] < middle["percentile"] < high["percentile"]
    survival = [s["recurrence_free_survival"][1]["survival"] for s in (low, middle, high)]
    assert survival == sorted(survival, reverse=True)


def test_a_risk_that_means_nothing_is_doubted() -> None:
    model = ensemble(calibration=calibration(sign=0.0).to_dict())
    assert "beyond chance" in valid(describe(model, result()))["survival"]["doubt"]


@pytest.mark.parametrize("points", [5, 300])
def test_long_curves_are_thinned(points: int) -> None:
    known = calibration().to_dict()
    known |= {
        "baseline_days": np.linspace(1, 1400, points).tolist(),
        "baseline_hazard": np.linspace(0.01, 0.5, points).tolist(),
        "baseline_at_risk": [10] * points,
    }
    curve = survival_curve(Calibration.from_dict(known), [0.0] * FOLDS)
    assert len(curve["days"]) == min(points + 2, CURVE_POINTS)
    assert np.all(np.diff(curve["days"]) > 0) and np.all(np.diff(curve["survival"]) <= 0)


# --- what cannot be said --------------------------------------------------------------------------------------------
def test_a_single_fold_gives_a_rank_and_says_why_no_more(bare: FoldEnsemble) -> None:
    said = valid(describe(bare, result(folds=1)))
    survival = said["survival"]
    assert survival["log_hazard"] == 0.5
    assert survival["log_hazard_std"] is said["hpv"]["probability_std"] is None
    assert survival["percentile"] is survival["risk_group"] is survival["curve"] is None
    assert survival["recurrence_free_survival"] == survival["beyond_follow_up"] == []
    assert "ensemble_folds.py" in survival["unavailable"]
    assert said["hpv"]["threshold"] is said["hpv"]["positive"] is None
    assert "ensemble_folds.py" in said["hpv"]["unavailable"]
    (check,) = (c for c in said["quality"]["checks"] if c["name"] == "feature_distance")
    assert (check["value"], check["verdict"]) == (None, "ok") and "not available" in check["message"]


def test_one_fold_has_a_calibration_and_no_spread() -> None:
    """As ``ensemble_folds.py --allow_missing`` leaves it: null is not the same as a spread of nothing."""
    model = ensemble(folds=1, calibration=calibration(folds=1).to_dict())
    survival = valid(describe(model, result(folds=1)))["survival"]
    assert [row["years"] for row in survival["recurrence_free_survival"]] == [1, 2, 3]
    for row in survival["recurrence_free_survival"]:
        assert 0 < row["survival"] < 1
        assert row["low"] is row["high"] is None
    assert survival["curve"]["low"] is survival["curve"]["high"] is None
    assert len(survival["curve"]["survival"]) == len(survival["curve"]["days"])
    figure = Figure()
    draw_patient_curve(figure.subplots(), survival)
    assert len(figure.axes[0].lines) and not figure.axes[0].collections


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        pytest.param({"reason": "3 relapses among 9 patients"}, "3 relapses among 9 patients", id="no_fit"),
        pytest.param({"slope": 1.0}, "another version", id="another_version"),
    ],
)
def test_calibrations_that_cannot_be_used_are_told(stored: dict, reason: str) -> None:
    assert reason in valid(describe(ensemble(calibration=stored), result()))["survival"]["unavailable"]


@pytest.mark.parametrize("in_file", [False, True], ids=["network", "file"])
@pytest.mark.parametrize(
    ("settings", "inputs"),
    [
        pytest.param({}, ["image"], id="older_than_the_setting"),
        pytest.param({"hpv_inputs": ["image", "clinical"]}, ["image", "clinical"], id="image_and_clinical"),
    ],
)
def test_what_the_hpv_probability_is_read_from(tmp_path: Path, settings: dict, inputs: list, in_file: bool) -> None:
    model = FoldEnsemble(MultitaskNet(**settings), {**SETTINGS, **settings})
    save_weights(model, tmp_path / "model.pt")
    assert valid(describe(tmp_path / "model.pt" if in_file else model, result()))["hpv"]["inputs"] == inputs


@pytest.mark.parametrize(
    ("hpv", "positive"), [pytest.param(0.41, True, id="above"), pytest.param(0.39, False, id="below")]
)
def test_hpv_class_is_by_the_stored_threshold(whole: FoldEnsemble, hpv: float, positive: bool) -> None:
    said = valid(describe(whole, result(hpv=hpv)))["hpv"]
    assert (said["positive"], said["threshold"], said["unavailable"]) == (positive, 0.4, "")


def test_no_threshold_gives_its_reason() -> None:
    model = ensemble(hpv_threshold={"value": None, "reason": "no two classes"})
    said = valid(describe(model, result()))["hpv"]
    assert (said["positive"], said["unavailable"]) == (None, "no two classes")


@pytest.mark.parametrize(
    ("tasks", "gone", "parts"),
    [
        pytest.param(("surv",), ("seg", "hpv"), ("tumour", "hpv"), id="surv"),
        pytest.param(("seg", "hpv"), ("log",), ("survival",), id="seg_hpv"),
    ],
)
def test_parts_of_absent_tasks_are_null(tasks: tuple, gone: tuple, parts: tuple) -> None:
    data = {k: v for k, v in result().items() if not any(str(k).startswith(name) for name in (*gone, "pred", "meas"))}
    if "seg" in tasks:
        data = MeasureTumourd()(RestoreMaskd()({**data, keys.SEG_PROB: torch.zeros(1, *BOX.shape)}))
    said = valid(describe(ensemble(tasks), data))
    assert [name for name in ("survival", "hpv", "tumour") if said[name] is None] == sorted(
        parts, key=["survival", "hpv", "tumour"].index
    )
    assert said["model"]["tasks"] == list(tasks)


def test_an_empty_mask_is_no_error(whole: FoldEnsemble) -> None:
    data = {**result(), keys.SEG_PROB: torch.zeros(1, *BOX.shape)}
    said = valid(describe(whole, MeasureTumourd()(RestoreMaskd()(data))))["tumour"]
    assert (said["volume_ml"], said["lesions"], said["suv_max"]) == (0.0, 0, None)


@pytest.mark.parametrize("key", [keys.LOG_HAZARD, keys.HPV_PROB])
def test_scores_that_are_not_finite_fail(whole: FoldEnsemble, key: str) -> None:
    with pytest.raises(ValueError, match=f"the network gave {key} = nan"):
        describe(whole, {**result(), key: torch.tensor(float("nan"))})


# --- quality --------------------------------------------------------------------------------------------------------
def test_a_rejected_patient_is_predicted_only_by_force(whole: FoldEnsemble) -> None:
    """The scans' checks with CheckQualityd flagging; forced says that one of them would have stopped it."""
    fault = Check("pet_body", 4000.0, "SUV", "at most 10 SUV", "reject", "median PET value of the body: 4000 SUV")
    data = {**result(), keys.QUALITY: checks_to_json([fault])}
    with pytest.raises(QualityError, match="CHUM-001: rejected by quality control: pet_body"):
        describe(whole, data)
    said = valid(describe(whole, data, on_reject="flag"))["quality"]
    assert (said["verdict"], said["forced"]) == ("reject", True)


def test_the_worst_fold_decides_on_the_features(whole: FoldEnsemble) -> None:
    data = result()
    data[keys.FEATURES] = torch.zeros(FOLDS, 5)
    data[keys.FEATURES][1] = 100.0
    with pytest.raises(QualityError, match="feature_distance"):
        describe(whole, data)
    alone = {c["name"]: c for c in describe(whole, result())["quality"]["checks"]}["feature_distance"]
    forced = {c["name"]: c for c in describe(whole, data, on_reject="flag")["quality"]["checks"]}["feature_distance"]
    assert alone["verdict"] == "ok" and forced["verdict"] == "reject"
    assert forced["value"] > 10 * alone["value"]
    data[keys.FEATURES][2, 0] = float("nan")
    broken = {c["name"]: c for c in describe(whole, data, on_reject="flag")["quality"]["checks"]}["feature_distance"]
    assert broken["verdict"] == "reject"


def test_unknown_ways_are_refused(whole: FoldEnsemble) -> None:
    with pytest.raises(ValueError, match="'raise' or 'flag'"):
        DescribePredictiond(whole, on_reject="stop")


# --- where it runs --------------------------------------------------------------------------------------------------
def test_a_batch_axis_of_one_changes_nothing(whole: FoldEnsemble) -> None:
    """A server may give the network's outputs as they come, (1,) and (1, K)."""
    data = result()
    batched = {k: v[None] if k in (*SCORES, keys.FEATURES) else v for k, v in data.items()}
    one, other = describe(whole, data), describe(whole, batched)
    for part in ("survival", "hpv", "tumour", "quality"):
        assert one[part] == other[part]


SCORES = (
    *(keys.LOG_HAZARD, keys.LOG_HAZARD_STD, keys.LOG_HAZARD_FOLDS),
    *(keys.HPV_PROB, keys.HPV_PROB_STD, keys.HPV_PROB_FOLDS),
)


def test_the_chain_runs_on_a_network_without_a_loader(whole: FoldEnsemble) -> None:
    """As a server does it: the network on ``image``, its dictionary under ``pred`` without the batch axis."""
    scores = (*SCORES, keys.FEATURES, keys.SEG_PROB)
    data = {k: v for k, v in result().items() if k not in (*scores, keys.PRED, keys.MEASURES, keys.VOLUME_ML)}
    image = torch.rand(1, 2, 32, 32, 32)
    data[keys.IMAGE], data[keys.BOX_AFFINE] = image[0], torch.from_numpy(box_grid(CT.centre, 32, 4.0).affine)
    model = copy.deepcopy(whole)
    del model.provenance["feature_statistics"]
    with torch.no_grad():
        output = model.predict(image, data[keys.CLINICAL][None])
    data["pred"] = {name: value[0] for name, value in output.items()}
    chain = Compose([FlattenSubKeysd("pred"), RestoreMaskd(), MeasureTumourd(), DescribePredictiond(model)])
    said = valid(chain(data)[keys.PREDICTION])
    assert said["survival"]["log_hazard"] == float(output[keys.LOG_HAZARD])
    assert len(said["hpv"]["probability_folds"]) == FOLDS


def test_the_file_tells_as_much_as_the_network(whole: FoldEnsemble, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_weights(whole, path)
    data = result()
    one, other = (valid(describe(model, data)) for model in (whole, str(path)))
    assert other["model"].pop("sha256") == hashlib.sha256(path.read_bytes()).hexdigest()
    one["model"].pop("sha256")
    for part in ("model", "survival", "hpv", "quality"):
        assert one[part] == other[part]


def test_the_file_is_read_only_when_there_is_a_patient(tmp_path: Path) -> None:
    transform = DescribePredictiond(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        transform(result())


def test_the_hash_tells_weights_apart(bare: FoldEnsemble) -> None:
    other = copy.deepcopy(bare)
    assert weights_sha256(other) == weights_sha256(bare) == Model.of(bare).sha256
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    assert weights_sha256(other) != weights_sha256(bare)


def test_the_schema_refuses_what_it_does_not_know(whole: FoldEnsemble) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    said = describe(whole, result())
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        valid({**said, "surprise": 1})
    with pytest.raises(jsonschema.ValidationError, match="'notice' is a required"):
        valid({k: v for k, v in said.items() if k != "notice"})
