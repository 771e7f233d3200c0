"""Contributions add up to the difference in risk, are those of the model as it is, and leave it as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scripts.prediction.explain
from scripts import keys
from scripts.cohorts.clinical import clinical_scales
from scripts.imaging.geometry import Grid
from scripts.model.ensemble import FoldEnsemble
from scripts.model.networks import MultitaskNet
from scripts.prediction.explain import ExplainError, Explanation, RiskExplainer, explain_risk

EDGE = 16
GRID = Grid((EDGE,) * 3, np.diag([2.0, 2.0, 2.0, 1.0]))
FEATURES = ["age", "gender", "tobacco"]
STEPS = 6


def ensemble(folds: int = 2, tasks: tuple[str, ...] = keys.TASKS, seg_classes: int = 1) -> FoldEnsemble:
    torch.manual_seed(0)
    network = MultitaskNet(clinical_features=3, tasks=tasks, seg_classes=seg_classes)
    network = FoldEnsemble(network, {"clinical_features": FEATURES}).eval()
    network.resize(folds)
    for fold in network.folds[1:]:
        for parameter in fold.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return network


def patient() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(1, 2, EDGE, EDGE, EDGE), torch.tensor([[61.0, 2.0, 0.0]])


def tumour() -> np.ndarray:
    inside = np.zeros(GRID.shape, dtype=bool)
    inside[4:8, 4:8, 4:8] = True
    return inside


def numbers(network: FoldEnsemble, image: torch.Tensor, clinical: torch.Tensor) -> float:
    with torch.no_grad():
        return float(network.predict(image, clinical)[keys.LOG_HAZARD])


def test_clinical_values_that_reach_the_risk_by_hpv_status_add_up() -> None:
    """They act on the HPV probability, which is a part of the burden; the knots of their scales are on the way."""
    torch.manual_seed(0)
    options = {"survival_inputs": ["burden"], "hpv_inputs": ["image", "clinical"]}
    fold = MultitaskNet(clinical_features=3, clinical_scales=clinical_scales(FEATURES), **options)
    fold.hpv_clinical.weight.data = torch.tensor([[0.2, -0.5, -1.0], [-0.7, 0.3, -1.5]])
    torch.nn.init.constant_(fold.burden.burden.weight, -0.8)
    network = FoldEnsemble(fold, {"clinical_features": FEATURES}).eval()
    image, clinical = patient()[0], torch.tensor([[71.0, 2.0, 2.0]])
    found = explain_risk(network, image, clinical, tumour(), GRID, scripts.prediction.explain.STEPS)
    assert found.relative_error < scripts.prediction.explain.ACCEPTED_ERROR
    alone = {name: abs(contribution) for name, _, contribution in found.clinical}
    assert min(alone["age"], alone["tobacco"]) > 0.02, "nothing but HPV status carries them: there is no other weight"


@pytest.mark.parametrize(
    ("tasks", "seg_classes"),
    [
        pytest.param(keys.TASKS, 1, id="all tasks"),
        pytest.param(keys.TASKS, 2, id="all tasks, two classes"),
        pytest.param((keys.TASK_SURV,), 1, id="survival alone"),
    ],
)
def test_contributions_add_up(tasks: tuple[str, ...], seg_classes: int) -> None:
    network, (image, clinical) = ensemble(tasks=tasks, seg_classes=seg_classes), patient()
    found = explain_risk(network, image, clinical, tumour(), GRID, STEPS)
    empty = numbers(network, torch.zeros_like(image), torch.zeros_like(clinical))
    assert found.log_hazard == pytest.approx(numbers(network, image, clinical), abs=1e-5)
    assert found.baseline_log_hazard == pytest.approx(empty, abs=1e-5)
    assert abs(found.expected) > 1e-3, "there is something to explain"
    assert found.relative_error < 0.05
    assert found.total == pytest.approx(found.expected, rel=0.05)
    assert found.to_dict()["complete"] is True


def test_the_mask_that_the_hpv_branch_reads_is_part_of_it() -> None:
    network, (image, clinical) = ensemble(folds=1), patient()
    torch.nn.init.normal_(network.folds[0].decoder.logits.weight, std=3.0)  # the map depends on the image strongly
    stopped = explain_risk(network, image, clinical, None, GRID, 24)
    network.folds[0].mask_gradient = "flow"
    flowing = explain_risk(network, image, clinical, None, GRID, 24)
    assert np.array_equal(stopped.image, flowing.image)


def test_a_clinical_value_contributes_what_leaving_it_out_changes() -> None:
    network, (image, clinical) = ensemble(), patient()
    found = explain_risk(network, image, clinical, None, GRID, STEPS)
    assert [name for name, _, _ in found.clinical] == FEATURES
    for place, (_, coded, contribution) in enumerate(found.clinical):
        without = clinical.clone()
        without[0, place] = 0
        assert coded == clinical[0, place]
        change = numbers(network, image, clinical) - numbers(network, image, without)
        assert contribution == pytest.approx(change, abs=1e-4)  # the log hazard is linear in the clinical vector
    assert found.clinical[2][2] == 0, "missing"


def test_no_clinical_values_at_all() -> None:
    network, (image, _) = ensemble(folds=1), patient()
    network.provenance = {"trained_on": "2 digital phantoms"}
    found = explain_risk(network, image, None, None, GRID, STEPS)
    assert found.to_dict()["trained_on"] == "2 digital phantoms"
    assert [contribution for _, _, contribution in found.clinical] == [0, 0, 0]


def test_the_network_is_left_as_it_was() -> None:
    network, (image, clinical) = ensemble(), patient()
    network.folds[1].train()
    next(network.folds[0].parameters()).requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in network.parameters()]
    with torch.no_grad():
        explain_risk(network, image, clinical, None, GRID, STEPS)
    assert [fold.training for fold in network.folds] == [False, True]
    assert [fold.mask_gradient for fold in network.folds] == ["stop", "stop"]
    assert [parameter.requires_grad for parameter in network.parameters()] == wanted
    assert all(parameter.grad is None for parameter in network.parameters())


def explained(inside: np.ndarray | None) -> Explanation:
    image = np.zeros((2, *GRID.shape), dtype=np.float32)
    image[0, 5, 5, 5], image[1, 5, 5, 6], image[1, 12, 12, 12] = 0.4, -0.1, 0.5
    return Explanation("P", 2.0, 1.0, image, [("age", 61.0, 0.25)], inside, GRID, STEPS, 2, 0.5)


def test_the_numbers(tmp_path: Path) -> None:
    said = json.loads(explained(tumour()).write(tmp_path).read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["explanation.json"]
    assert said["expected"] == 1.0
    assert said["sum"] == pytest.approx(1.05)
    assert said["error"] == pytest.approx(0.05)
    assert said["relative_error"] == pytest.approx(0.05 / 1.05)
    image = said["image"]
    assert image["channels"] == {"ct": pytest.approx(0.4), "pet": pytest.approx(0.4)}
    assert image["channel_shares"] == {"ct": pytest.approx(0.4), "pet": pytest.approx(0.6)}
    assert (image["inside"], image["outside"]) == (pytest.approx(0.3), pytest.approx(0.5))
    assert image["inside_share"] == pytest.approx(0.5)
    assert image["inside_volume_share"] == pytest.approx((4 / EDGE) ** 3)
    assert said["clinical"]["features"] == [{"name": "age", "coded": 61.0, "contribution": 0.25}]
    assert "no causes" in said["notice"]
    assert "2 folds" in said["method"]


@pytest.mark.parametrize(
    ("inside", "why"),
    [(None, "segmentation is not a task of this model"), (np.zeros(GRID.shape, dtype=bool), "no tumour found")],
)
def test_without_a_tumour_there_is_no_inside(inside: np.ndarray | None, why: str) -> None:
    image = explained(inside).to_dict()["image"]
    assert image["inside_unavailable"] == why
    assert image["inside"] is image["outside"] is image["inside_share"] is None


def test_contributions_that_do_not_add_up_are_said_to() -> None:
    bad = explained(None)
    object.__setattr__(bad, "log_hazard", 5.0)
    assert bad.to_dict()["complete"] is False


def test_the_picture_is_smooth_and_keeps_the_sum() -> None:
    found = explained(None)
    assert found.smooth.shape == GRID.shape
    assert 0 < np.abs(found.smooth).max() < 0.1
    image = np.zeros_like(found.image)
    image[1, 8, 8, 8] = 1.0
    object.__setattr__(found, "image", image)
    assert found.smooth.sum() == pytest.approx(1.0, abs=0.02)
    assert np.unravel_index(found.smooth.argmax(), GRID.shape) == (8, 8, 8)


def item(**changes: Any) -> dict[str, Any]:
    image, clinical = patient()
    return {
        keys.PATIENT_ID: "P-1",
        keys.IMAGE: image[0],
        keys.CLINICAL: clinical[0],
        keys.SEG_PROB: torch.from_numpy(tumour()[None].astype(np.float32)),
        keys.BOX_AFFINE: torch.from_numpy(GRID.affine),
        **changes,
    }


def test_the_explainer_reads_an_item() -> None:
    found = RiskExplainer(ensemble(folds=1), STEPS)(item())
    assert found.patient_id == "P-1"
    assert found.tumour is not None
    assert np.array_equal(found.tumour, tumour())
    assert np.array_equal(found.grid.affine, GRID.affine)


def test_the_explainer_takes_more_points_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.prediction.explain, "ACCEPTED_ERROR", -1.0)
    assert RiskExplainer(ensemble(folds=1), 2)(item()).steps == 4


@pytest.mark.parametrize(("at_once", "steps"), [(EDGE**3, 3), (EDGE**3 - 1, 2)], ids=["small box", "large box"])
def test_large_boxes_take_fewer_points_on_a_cpu(at_once: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.prediction.explain, "VOXELS_AT_ONCE", at_once)
    monkeypatch.setattr(scripts.prediction.explain, "ACCEPTED_ERROR", 1.0)
    monkeypatch.setattr(scripts.prediction.explain, "STEPS", 3)
    monkeypatch.setattr(scripts.prediction.explain, "STEPS_SLOW", 2)
    assert RiskExplainer(ensemble(folds=1))(item()).steps == steps


def test_a_model_without_a_risk() -> None:
    network = ensemble(folds=1, tasks=(keys.TASK_SEG, keys.TASK_HPV))
    with pytest.raises(ExplainError, match="task\\(s\\) seg, hpv gives no risk to be explained; leave --explain out"):
        RiskExplainer(network)
