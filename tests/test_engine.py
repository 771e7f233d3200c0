"""Batches on their way to the network, inferers, schedule, and errors as a user sees them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor

from conftest import BUNDLE
from scripts import keys
from scripts.engine import (
    EnsembleInferer,
    FlattenPrediction,
    NetworkInferer,
    as_roi_size,
    as_tasks,
    learning_rate_schedule,
    prepare_batch,
)
from scripts.ensemble import FoldEnsemble
from scripts.networks import MultitaskNet


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param("surv", ("surv",), id="one_word"),
        pytest.param("surv,seg", ("seg", "surv"), id="as_typed_in_any_order"),
        pytest.param(["seg", "hpv", "surv"], ("seg", "hpv", "surv"), id="list"),
        pytest.param(("seg",), ("seg",), id="tuple_as_fire_makes_it"),
    ],
)
def test_tasks(given, expected) -> None:
    assert as_tasks(given) == expected


@pytest.mark.parametrize("given", ["", [], "segmentation", ["seg", "os"]])
def test_unknown_tasks_are_refused(given) -> None:
    with pytest.raises(ValueError, match="tasks are some of"):
        as_tasks(given)


@pytest.mark.parametrize(("given", "expected"), [(64, (64, 64, 64)), ([32, 48, 64], (32, 48, 64))])
def test_roi_size(given, expected) -> None:
    assert as_roi_size(given) == expected


def test_two_numbers_are_no_roi_size() -> None:
    with pytest.raises(ValueError, match="one number or three"):
        as_roi_size([32, 32])


def test_schedule_steps_once_an_epoch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=1e-4)
    scheduler = learning_rate_schedule(optimizer, [1, 3], [0.5, 0.1])
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-4, 5e-5, 5e-5, 1e-5])


@pytest.mark.parametrize(("milestones", "factors"), [([1, 2], [0.1]), ([2, 1], [0.1, 0.2])])
def test_schedules_that_contradict_themselves(milestones, factors) -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="milestones"):
        learning_rate_schedule(optimizer, milestones, factors)


def test_prepare_batch_separates_input_and_targets() -> None:
    batch = {
        keys.IMAGE: MetaTensor(torch.rand(2, 2, 16, 16, 16)),
        keys.CLINICAL: torch.rand(2, 7),
        keys.SEG: torch.zeros(2, 1, 16, 16, 16),
        keys.SEG_KNOWN: torch.tensor([True, False]),
        keys.PATIENT_ID: ["a", "b"],
    }
    image, targets, args, kwargs = prepare_batch(batch, device="cpu")
    assert type(image) is torch.Tensor
    assert set(targets) == {keys.SEG, keys.SEG_KNOWN}
    assert args == ()
    assert kwargs[keys.CLINICAL] is batch[keys.CLINICAL]


def test_prepare_batch_takes_a_batch_without_labels_or_clinical_values() -> None:
    _, targets, _, kwargs = prepare_batch({keys.IMAGE: torch.rand(1, 2, 16, 16, 16)})
    assert targets == {}
    assert kwargs == {keys.CLINICAL: None}


@pytest.mark.parametrize("amp", [False, True])
def test_inferers_give_float32_of_one_network(amp: bool) -> None:
    torch.manual_seed(0)
    network = MultitaskNet().eval()
    ensemble = FoldEnsemble(network, {}).eval()
    image, clinical = torch.rand(2, 2, 32, 32, 32), torch.rand(2, 7)
    with torch.no_grad():
        raw = NetworkInferer(amp)(image, network, clinical=clinical)
        mean = EnsembleInferer(amp)(image, ensemble, clinical=clinical)
    assert {value.dtype for value in (*raw.values(), *mean.values())} == {torch.float32}
    torch.testing.assert_close(mean[keys.SEG_PROB], torch.sigmoid(raw[keys.SEG_LOGITS]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mean[keys.LOG_HAZARD], raw[keys.LOG_HAZARD])


def test_flatten_prediction_leaves_its_input_alone() -> None:
    data = {"pred": {"hpv_prob": 0.3}, "patient_id": "a"}
    assert FlattenPrediction()(data) == {"hpv_prob": 0.3, "patient_id": "a"}
    assert "pred" in data


@pytest.mark.parametrize(
    ("statement", "shown", "hidden"),
    [
        pytest.param("engine.as_tasks('os')", "error: tasks are some of", "Traceback", id="raised_on_purpose"),
        pytest.param("int('x')", "Traceback", "error: invalid", id="any_other_error"),
    ],
)
def test_plain_errors(statement: str, shown: str, hidden: str, tmp_path: Path) -> None:
    code = f"from scripts import engine; engine.plain_errors(); {statement}"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(BUNDLE)}, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert shown in result.stderr
    assert hidden not in result.stderr
