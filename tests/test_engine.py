"""Batches on their way to the network, inferers, schedule, and errors as a user sees them."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from torch.profiler import profile

from conftest import BUNDLE
from scripts import keys
from scripts.model.ensemble import FoldEnsemble
from scripts.model.networks import MultitaskNet
from scripts.training.augmentation import Augmentation, Flip
from scripts.training.engine import (
    EnsembleInferer,
    NetworkInferer,
    learning_rate_schedule,
    prepare_batch,
    speed_up,
)


def test_schedule_steps_once_an_epoch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=1e-4)
    scheduler = learning_rate_schedule(optimizer, [1, 3], [0.5, 0.1])  # the paper: 1e-4, then 5e-5 from epoch 100, ...
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-4, 5e-5, 5e-5, 1e-5])


def test_milestones_after_the_last_epoch_change_nothing() -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = learning_rate_schedule(optimizer, (100, 200), (0.5, 0.1))
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize(
    ("milestones", "factors", "message"),
    [
        pytest.param([1, 2], [0.1], r"lr_milestones \[1, 2\] must rise and match lr_factors \[0.1\]", id="too_few"),
        pytest.param([2, 1], [0.1, 0.2], r"lr_milestones \[2, 1\] must rise", id="falling"),
        pytest.param(100, 0.5, r"lr_milestones 100 and lr_factors 0.5 must be lists", id="numbers"),
        pytest.param([100], 0.5, r"lr_factors 0.5 must be lists", id="one_number"),
        pytest.param([1, 2], [0.5, -0.1], r"lr_factors \[0.5, -0.1\] must not be negative", id="negative"),
        pytest.param([1], [float("nan")], r"lr_factors \[nan\] must not be", id="nan"),
    ],
)
def test_schedules_that_contradict_themselves(milestones, factors, message: str) -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=message):
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


def test_prepare_batch_augments_image_and_mask() -> None:
    image, mask = torch.rand(2, 2, 16, 16, 16), torch.rand(2, 1, 16, 16, 16)
    batch = {keys.IMAGE: image.clone(), keys.SEG: mask.clone(), keys.SEED: torch.tensor([1, 2])}
    flip = Augmentation([Flip(prob=1.0)], spacing_mm=2.0)
    flipped, targets, _, _ = prepare_batch(batch, device="cpu", augmentation=flip)
    assert torch.equal(flipped, image.flip(2)) and torch.equal(targets[keys.SEG], mask.flip(2))


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


@pytest.mark.parametrize("amp", ["false", "true", 1, None])
def test_amp_is_true_or_false(amp):
    with pytest.raises(ValueError, match=r"amp is .*must be True or False"):
        NetworkInferer(amp)


def ensemble_with_a_past() -> FoldEnsemble:
    """Two folds whose batch norms do something, as after training."""
    torch.manual_seed(1)
    ensemble = FoldEnsemble(MultitaskNet(), {"roi_size": [32, 32, 32]})
    ensemble.resize(2)
    for norm in (module for module in ensemble.modules() if isinstance(module, torch.nn.BatchNorm3d)):
        for values, low, high in ((norm.running_mean, -0.2, 0.2), (norm.running_var, 0.5, 2), (norm.weight, 0.5, 2)):
            torch.nn.init.uniform_(values, low, high)
    return ensemble


def plain_answer(ensemble: FoldEnsemble, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """With torch's own convolutions, which a gradient asks for."""
    return {name: value.detach() for name, value in ensemble.eval().predict(image).items()}


@pytest.mark.parametrize("roi", [16, 32, 48])
def test_the_quick_network_answers_as_the_plain_one(roi: int) -> None:
    ensemble, image = ensemble_with_a_past(), torch.rand(1, 2, roi, roi, roi)
    expected, inferer = plain_answer(ensemble, image), EnsembleInferer(amp=False)
    speed_up(ensemble, inferer)
    with torch.no_grad():
        answer = inferer(image, ensemble)
    torch.testing.assert_close(answer, expected, atol=5e-4, rtol=1e-3)
    left = [name for name, module in ensemble.named_modules() if isinstance(module, torch.nn.BatchNorm3d)]
    assert not any("encoder" in name or "decoder" in name or "summaries" in name for name in left)


def test_bfloat16_is_near_float32() -> None:
    ensemble, image = ensemble_with_a_past(), torch.rand(1, 2, 32, 32, 32)
    expected = plain_answer(ensemble, image)
    speed_up(ensemble, EnsembleInferer(amp=True))
    with torch.no_grad():
        answer = EnsembleInferer(amp=True)(image, ensemble)
    masks = [answer[keys.SEG_PROB] >= 0.5, expected[keys.SEG_PROB] >= 0.5]
    assert 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum()) > 0.98
    torch.testing.assert_close(answer[keys.LOG_HAZARD], expected[keys.LOG_HAZARD], atol=0.05, rtol=0.05)


def test_training_keeps_its_batch_norms() -> None:
    ensemble = ensemble_with_a_past()
    names = list(ensemble.state_dict())
    speed_up(ensemble)
    assert list(ensemble.state_dict()) == names


@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        pytest.param(None, "there is no C++ compiler (install g++)", id="none"),
        pytest.param(
            "/usr/bin/g++", "compile: no space left for the compiler; the network runs uncompiled", id="it_fails"
        ),
    ],
)
def test_without_a_compiler_the_network_runs_uncompiled(
    compiler: str | None, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ensemble, image = ensemble_with_a_past(), torch.rand(1, 2, 32, 32, 32)
    expected, inferer = plain_answer(ensemble, image), EnsembleInferer(amp=False)

    def broken(module: MultitaskNet, **options: object) -> None:
        module._compiled_call_impl = lambda *args: (_ for _ in ()).throw(RuntimeError("no space left for the compiler"))

    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    monkeypatch.setattr(MultitaskNet, "compile", broken)
    with caplog.at_level(logging.WARNING):
        speed_up(ensemble, inferer, compiled=True)
    assert told in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(inferer(image, ensemble), expected, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("statement", "shown", "hidden"),
    [
        pytest.param(
            "engine.learning_rate_schedule(None, [1], [])",
            "error: lr_milestones [1] must",
            "Traceback",
            id="raised_on_purpose",
        ),
        pytest.param("int('x')", "Traceback", "error: invalid", id="any_other_error"),
        pytest.param(
            "raise KeyboardInterrupt", "interrupted: rerun the same command to resume", "Traceback", id="ctrl_c"
        ),
    ],
)
def test_plain_errors(statement: str, shown: str, hidden: str, tmp_path: Path) -> None:
    code = f"from scripts.training import engine; engine.plain_errors(); {statement}"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(BUNDLE)}, capture_output=True, text=True
    )
    assert result.returncode == (-signal.SIGINT if "KeyboardInterrupt" in statement else 1)
    assert shown in result.stderr
    assert hidden not in result.stderr


READ_BY_THE_HOST = {
    *("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"),
    *("aten::masked_select", "aten::_unique2", "aten::bincount"),
}
"""Operators whose result the host, or the shape of a tensor, waits for."""
READING_METHODS = ("tolist", "numpy", "cpu")
"""On CPU they call no operator."""
AXES = "monai/losses/dice.py"  # lists axes of a tensor with one that is always on the host
FUSED_ADAM = "aten::_fused_adam_"  # on CPU it reads its own counters; on a GPU its kernel does


def callers(event: Any) -> list[str]:
    """The name of a profiled operator, then those that called it."""
    return [event.name, *(callers(event.cpu_parent) if event.cpu_parent else [])]


class HostReads:
    """What a block reads of tensors: the operators, and the methods, for which the host waits on a GPU.

    Args:
        on_host: returns a tensor that is never on a GPU.

    Attributes:
        called: operators and reading methods, each with its callers, of all blocks.
    """

    def __init__(self, on_host: Callable[[], Any] = lambda: None) -> None:
        self.on_host = on_host
        self.called: list[list[str]] = []

    def __enter__(self) -> HostReads:
        self.patch = pytest.MonkeyPatch()
        for name in READING_METHODS:
            self.patch.setattr(torch.Tensor, name, self._noting(name, getattr(torch.Tensor, name)))
        self.profile = profile().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        self.patch.undo()
        self.called += [callers(event) for event in self.profile.events()]

    def _noting(self, name: str, method: Callable) -> Callable:
        def noting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor is not self.on_host():
                frame = sys._getframe(1)
                self.called.append([name, f"line {frame.f_lineno} of {frame.f_code.co_filename}"])
            return method(tensor, *args, **kwargs)

        return noting

    def found(self) -> list[list[str]]:
        """The calls for which the host waits."""
        reading = READ_BY_THE_HOST.union(READING_METHODS)
        calls = [call for call in self.called if call[0] in reading and FUSED_ADAM not in call]
        return [call for call in calls if not call[-1].endswith(AXES)]


@pytest.mark.parametrize(
    ("read", "seen"),
    [
        pytest.param(lambda x: x.item(), True, id="item"),
        pytest.param(lambda x: float(x), True, id="float"),
        pytest.param(lambda x: x.item() if x > 0 else 0, True, id="condition"),
        pytest.param(lambda x: x[None][x[None] > 0], True, id="selection"),
        pytest.param(lambda x: torch.masked_select(x, x > 0), True, id="masked_select"),
        pytest.param(lambda x: torch.unique(x), True, id="unique"),
        pytest.param(lambda x: torch.equal(x, x), True, id="equal"),
        pytest.param(lambda x: x.tolist(), True, id="tolist"),
        pytest.param(lambda x: x.numpy(), True, id="numpy"),
        pytest.param(lambda x: np.asarray(x), True, id="asarray"),
        pytest.param(lambda x: x.detach().cpu(), True, id="cpu"),
        pytest.param(lambda x: torch.where(x > 0, x, 0.0).sum(), False, id="mask"),
        pytest.param(lambda x: x[None][torch.tensor([0])], False, id="numbers_of_cases"),
        pytest.param(lambda x: x.float().to("cpu", non_blocking=True), False, id="moving"),
    ],
)
def test_what_the_host_reads_is_seen(read: Callable, seen: bool) -> None:
    value = torch.tensor(1.5)
    with HostReads() as reads:
        read(value)
    assert bool(reads.found()) == seen
    with HostReads(lambda: value) as reads:
        value.tolist()
    assert not reads.found()


@pytest.mark.parametrize(
    "weights", [{}, {"train#loss#task_weights": "uncertainty"}], ids=["default", "learned_weights"]
)
def test_a_step_of_training_never_waits_for_the_device(tiny_cohort: Path, tmp_path: Path, monkeypatch, weights) -> None:
    """Augmentation, forward, loss, backward, optimizer and handlers of the config, on cases with labels missing."""
    monkeypatch.chdir(BUNDLE)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    options = {"dataset_dir": str(tiny_cohort), "output_dir": str(tmp_path), "num_folds": 2, "epochs": 1, **weights}
    tiny = {"roi_size": [32] * 3, "spacing_mm": 8.0, "num_workers": 0, "device": "cpu", "batch_size": 2}
    options |= {f"train#augmentation#transforms#{k}#prob": 1.0 for k in range(12)}
    workflow = ConfigWorkflow(
        str(BUNDLE / "configs/train.json"), logging_file=False, workflow_type="train", **options, **tiny
    )
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    reads = HostReads(lambda: trainer.state.batch[keys.SEED])  # the seeds stay on the host
    steps = (reads.__enter__, lambda: reads.__exit__(None, None, None))
    for event, act in zip((Events.ITERATION_STARTED, Events.ITERATION_COMPLETED), steps, strict=True):
        trainer.add_event_handler(event, act)
    workflow.run()
    called = {call[0] for call in reads.called}
    assert {"aten::grid_sampler_3d", "aten::normal_", "aten::convolution", "aten::logsumexp", FUSED_ADAM} <= called
    assert not reads.found()
