"""Masked metric handlers in an engine, and the choice of the metric that picks the best checkpoint."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from lifelines.utils import concordance_index as lifelines_c_index
from monai.metrics import compute_dice

from conftest import TINY
from scripts import keys
from scripts.cohorts.files import WriteError
from scripts.model.ensemble import FoldEnsemble
from scripts.model.losses import MultitaskLoss
from scripts.model.networks import MultitaskNet
from scripts.training.engine import learning_rate_schedule
from scripts.training.handlers import (
    TrainingState,
    choose_key_metric,
    is_better,
    validation_metrics,
)
from scripts.training.sampling import EventBatchSampler


def output(n: int = 6, seed: int = 0, known: bool | None = None) -> dict:
    """An engine's output with random labels, about half of them unknown."""
    rng = torch.Generator().manual_seed(seed)
    flag = (torch.rand(3, n, generator=rng) < 0.6) if known is None else torch.full((3, n), known)
    label = {
        keys.SEG: (torch.rand(n, 1, 8, 8, 8, generator=rng) < 0.3).float(),
        keys.SEG_KNOWN: flag[0],
        keys.HPV: (torch.rand(n, generator=rng) < 0.5).float(),
        keys.HPV_KNOWN: flag[1],
        keys.TIME: torch.rand(n, generator=rng) * 1000 + 1,
        keys.EVENT: torch.rand(n, generator=rng) < 0.7,
        keys.SURV_KNOWN: flag[2],
    }
    pred = {
        keys.SEG_PROB: torch.rand(n, 1, 8, 8, 8, generator=rng),
        keys.HPV_PROB: torch.rand(n, generator=rng),
        keys.LOG_HAZARD: torch.randn(n, generator=rng),
    }
    return {"pred": pred, "label": label}


def run(handlers: dict, outputs: list[dict]) -> dict[str, float]:
    engine = Engine(lambda engine, batch: batch)
    for name, handler in handlers.items():
        handler.attach(engine, name)
    engine.run(outputs, max_epochs=1)
    return {name: float(value) for name, value in engine.state.metrics.items()}


def pooled(outputs: list[dict], part: str, key: str) -> torch.Tensor:
    return torch.cat([o[part][key] for o in outputs])


def test_metrics_of_an_epoch_equal_those_of_the_pooled_known_cases() -> None:
    outputs = [output(seed=k) for k in range(5)]
    metrics = run(validation_metrics("c_index", keys.TASKS, MultitaskLoss()), outputs)
    known = pooled(outputs, "label", keys.SURV_KNOWN)
    expected = lifelines_c_index(
        pooled(outputs, "label", keys.TIME)[known],
        -pooled(outputs, "pred", keys.LOG_HAZARD)[known],
        pooled(outputs, "label", keys.EVENT)[known],
    )
    assert metrics["c_index"] == pytest.approx(expected)
    known = pooled(outputs, "label", keys.SEG_KNOWN)
    dice = compute_dice((pooled(outputs, "pred", keys.SEG_PROB) > 0.5).float(), pooled(outputs, "label", keys.SEG))
    assert metrics["dice"] == pytest.approx(float(dice[known].mean()))
    known = pooled(outputs, "label", keys.HPV_KNOWN)
    truth = pooled(outputs, "label", keys.HPV)[known] > 0.5
    called = pooled(outputs, "pred", keys.HPV_PROB)[known] > 0.5
    rates = (called[truth].float().mean() + (~called[~truth]).float().mean()) / 2
    assert metrics["balanced_accuracy"] == pytest.approx(float(rates))


def test_an_epoch_without_labels_gives_nan_and_the_next_is_not_touched_by_it() -> None:
    handlers = validation_metrics("c_index", keys.TASKS, MultitaskLoss())
    del handlers["loss"]
    engine = Engine(lambda engine, batch: batch)
    for name, handler in handlers.items():
        handler.attach(engine, name)
    engine.run([output(known=False)], max_epochs=1)
    assert all(math.isnan(value) for value in engine.state.metrics.values())
    engine.run([output(known=True)], max_epochs=1)
    assert all(math.isfinite(value) for value in engine.state.metrics.values())


def test_validation_loss_is_the_training_loss_of_the_same_predictions() -> None:
    loss = MultitaskLoss(tasks=keys.TASKS)
    one = output(known=True)
    logits = {
        keys.SEG_LOGITS: torch.logit(one["pred"][keys.SEG_PROB]),
        keys.HPV_LOGIT: torch.logit(one["pred"][keys.HPV_PROB]),
        keys.LOG_HAZARD: one["pred"][keys.LOG_HAZARD],
    }
    expected = float(loss(logits, one["label"]))
    assert run(validation_metrics("loss", keys.TASKS, loss), [one])["loss"] == pytest.approx(expected, rel=1e-4)


def output_of_classes(n: int = 6, seed: int = 0) -> dict:
    """:func:`output` of a network of two classes, with masks of both, some of which do not tell them apart."""
    rng = torch.Generator().manual_seed(seed)
    one = output(n, seed)
    one["label"][keys.SEG] = torch.randint(0, 3, (n, 1, 8, 8, 8), generator=rng).float()
    one["label"][keys.SEG_CLASSES_KNOWN] = torch.arange(n) % 2 == 0
    softmax = torch.softmax(torch.randn(n, 3, 8, 8, 8, generator=rng), dim=1)
    one["pred"][keys.SEG_PROB], one["pred"][keys.CLASS_PROB] = 1 - softmax[:, :1], softmax[:, 1:]
    return one


def test_each_class_is_judged_where_masks_tell_it() -> None:
    outputs = [output_of_classes(seed=k) for k in range(3)]
    metrics = run(validation_metrics("dice", ("seg",), MultitaskLoss(("seg",)), ["GTVp", "GTVn"]), outputs)
    assert list(metrics) == ["dice", "loss", "dice_gtvp", "dice_gtvn"]
    each, truth = pooled(outputs, "pred", keys.CLASS_PROB), pooled(outputs, "label", keys.SEG)
    known = pooled(outputs, "label", keys.SEG_KNOWN)
    apart = known & pooled(outputs, "label", keys.SEG_CLASSES_KNOWN)
    tumour = each.sum(dim=1, keepdim=True) > 0.5
    assert metrics["dice"] == pytest.approx(float(compute_dice(tumour[known].float(), (truth > 0)[known]).mean()))
    for value, name in ((1, "dice_gtvp"), (2, "dice_gtvn")):
        own = tumour & (each[:, value - 1 : value] >= each.amax(dim=1, keepdim=True))
        scores = compute_dice(own[apart].float(), (truth == value)[apart].float())
        assert metrics[name] == pytest.approx(float(scores.mean())), name


def test_validation_loss_of_classes_is_the_training_loss() -> None:
    loss, one = MultitaskLoss(tasks=("seg",)), output_of_classes()
    each, none = one["pred"][keys.CLASS_PROB], 1 - one["pred"][keys.SEG_PROB]
    logits = {keys.CLASS_LOGITS: torch.log(each / none), keys.SEG_LOGITS: torch.logit(one["pred"][keys.SEG_PROB])}
    metrics = validation_metrics("loss", ("seg",), loss, ["GTVp", "GTVn"])
    assert run(metrics, [one])["loss"] == pytest.approx(float(loss(logits, one["label"])), rel=1e-4)


def validation_case(survival: tuple[float, bool] | None, mask: bool) -> dict:
    time, event = survival or (0.0, False)
    known = survival is not None
    return {keys.TIME: time, keys.EVENT: event, keys.SURV_KNOWN: known, keys.SEG_KNOWN: mask}


@pytest.mark.parametrize(
    ("cases", "tasks", "expected"),
    [
        pytest.param([((10, True), True), ((20, False), True)], keys.TASKS, "c_index", id="comparable"),
        pytest.param([((10, False), True), ((20, False), True)], keys.TASKS, "dice", id="no_events"),
        pytest.param([((10, False), True), ((20, True), True)], keys.TASKS, "dice", id="last_alone_has_the_event"),
        pytest.param([(None, True), (None, False)], keys.TASKS, "dice", id="masks_only"),
        pytest.param([(None, False), (None, False)], keys.TASKS, "loss", id="nothing_but_hpv"),
        pytest.param([((10, False), True), ((20, False), True)], ("surv",), "loss", id="masks_are_no_task"),
        pytest.param([((10, True), True), ((20, False), True)], ("seg", "hpv"), "dice", id="survival_is_no_task"),
    ],
)
def test_key_metric(cases, tasks, expected, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert choose_key_metric([validation_case(*c) for c in cases], tasks) == expected
    assert "key metric: " in caplog.text


def test_key_metric_comes_first_and_tasks_bring_their_metrics() -> None:
    loss = MultitaskLoss(tasks=keys.TASKS)
    assert list(validation_metrics("dice", keys.TASKS, loss)) == ["dice", "loss", "c_index", "balanced_accuracy"]
    assert list(validation_metrics("c_index", ("surv",), loss)) == ["c_index", "loss"]


def training_state(folder: Path, metric: str, patience: int, keep: str = "best") -> TrainingState:
    """A state around a network of one number, whose evaluator's metric the test sets."""
    network = FoldEnsemble(MultitaskNet(tasks=("surv",)), {})
    optimizer = torch.optim.Adam(network.parameters())
    evaluator = SimpleNamespace(state=SimpleNamespace(metrics={}, key_metric_name=metric))
    return TrainingState(
        ensemble=network,
        optimizer=optimizer,
        scheduler=learning_rate_schedule(optimizer, [], []),
        loss=MultitaskLoss(tasks=("surv",)),
        sampler=EventBatchSampler([validation_case((1, True), False)] * 4, 2),
        evaluator=evaluator,
        val_interval=1,
        ckpt_dir=str(folder),
        output_dir=str(folder),
        settings={},
        patience=patience,
        keep=keep,
    )


def run_epoch(state: TrainingState, trainer: SimpleNamespace, metrics: dict[str, float]) -> None:
    """An epoch of one batch that ends with these validation metrics."""
    state.evaluator.state.metrics = metrics
    trainer.state.output = {"loss": torch.tensor(1.0)}
    state.begin_epoch(trainer)
    state.record_loss(trainer)
    state.parts["optimizer"].step()
    state.end_epoch(trainer)


def test_a_folder_that_takes_no_checkpoint_is_told_before_the_first_epoch(tmp_path):
    (tmp_path / "resume").write_text("somebody's")
    state = training_state(tmp_path, "c_index", 0)
    with pytest.raises(WriteError, match="resume: it is a file, not a folder"):
        state.resume(SimpleNamespace(state=SimpleNamespace(epoch=0, max_epochs=1)))
    assert (tmp_path / "resume").read_text() == "somebody's"


@pytest.mark.parametrize(
    ("metric", "values", "patience", "keep", "best_epoch", "stops_at"),
    [
        pytest.param("c_index", [0.5, 0.7, 0.6, 0.6, 0.6], 0, "best", 2, None, id="no_patience_asked"),
        pytest.param("c_index", [0.5, 0.7, 0.6, 0.6, 0.6], 2, "best", 2, 4, id="two_without_improvement"),
        pytest.param("c_index", [0.5, 0.5, 0.6], 2, "best", 3, None, id="improves_in_time"),
        pytest.param("loss", [0.5, 0.4, 0.6], 0, "best", 2, None, id="lower_loss_is_better"),
        pytest.param("c_index", [math.nan, 0.4, math.nan], 0, "best", 2, None, id="nan_never_wins"),
        pytest.param("c_index", [0.5, 0.7, 0.6], 0, "last", 3, None, id="last_epoch_is_kept"),
    ],
)
def test_kept_epoch_and_early_stopping(tmp_path, caplog, metric, values, patience, keep, best_epoch, stops_at) -> None:
    caplog.set_level("INFO")
    state = training_state(tmp_path, metric, patience, keep)
    trainer = SimpleNamespace(state=SimpleNamespace(epoch=0, max_epochs=len(values)), stopped_at=None)
    trainer.terminate = lambda: setattr(trainer, "stopped_at", trainer.state.epoch)
    for epoch, value in enumerate(values, start=1):
        trainer.state.epoch = epoch
        run_epoch(state, trainer, {metric: value})
        if trainer.stopped_at:
            break
    assert state.best_epoch == best_epoch
    assert trainer.stopped_at == stops_at
    assert (tmp_path / "model.pt").is_file()
    history = json.loads((tmp_path / "history.json").read_text(), parse_constant=pytest.fail)
    assert len(history) == (stops_at or len(values))
    assert ("too optimistic (keep_epoch: best)" in caplog.text) == (keep == "best")
    told = f", the best of {len(history)} by {metric} on the validation cases" if keep == "best" else ", the last"
    assert f"weights kept: epoch {best_epoch}{told}" in caplog.text


def trained_state(folder: Path, epochs: int) -> TrainingState:
    """A run of so many epochs whose validation C-index is 0.1 times the epoch."""
    state = training_state(folder, "c_index", 0)
    for epoch in range(1, epochs + 1):
        trainer = SimpleNamespace(state=SimpleNamespace(epoch=epoch, max_epochs=9))
        run_epoch(state, trainer, {"c_index": 0.1 * epoch})
    return state


def resumed(folder: Path) -> tuple[TrainingState, int]:
    """A new state that resumes the run in ``folder``, and the epoch that it goes on after."""
    state = training_state(folder, "c_index", 0)
    trainer = SimpleNamespace(state=SimpleNamespace(epoch=0, iteration=0, epoch_length=1, max_epochs=9))
    state.resume(trainer)
    return state, trainer.state.epoch


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def strange(path: Path) -> None:
    torch.save({"epoch": 7}, path)


def with_code(path: Path) -> None:
    torch.save({"epoch": Path}, path)


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"epoch": Path}))


@pytest.mark.parametrize("damage", [cut, empty, strange, with_code, bare_pickle, Path.unlink])
def test_a_damaged_state_falls_back_to_the_epoch_before(tmp_path, caplog, damage) -> None:
    trained_state(tmp_path, 3)
    last = tmp_path / "resume" / "last.pt"
    damage(last)
    state, epoch = resumed(tmp_path)
    assert epoch == 2 and state.best == pytest.approx(0.2)
    assert [row["epoch"] for row in json.loads((tmp_path / "history.json").read_text())] == [1, 2]
    assert (f"resuming from the epoch before: {last}" in caplog.text) == (damage is not Path.unlink)
    assert "weights_only" not in caplog.text, "torch's advice to load without its safety check is not passed on"


@pytest.mark.parametrize("damage", [cut, empty, strange, with_code, bare_pickle])
def test_a_state_damaged_beyond_use_says_what_to_do(tmp_path, damage) -> None:
    trained_state(tmp_path, 1)  # the first epoch has none before it
    damage(tmp_path / "resume" / "last.pt")
    with pytest.raises(RuntimeError, match=r"delete the folder .*resume to train from the first epoch") as caught:
        resumed(tmp_path)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_a_kill_between_state_and_history_loses_no_row(tmp_path) -> None:
    trained_state(tmp_path, 3)
    history = tmp_path / "history.json"
    whole = history.read_text()
    history.write_text(json.dumps(json.loads(whole)[:2]))
    assert resumed(tmp_path)[1] == 3
    assert history.read_text() == whole


@pytest.mark.parametrize(
    ("c_index", "dice", "keep", "warning"),
    [
        pytest.param([0.7, 0.6], [0.1, 0.4], "best", "(1, by c_index) has a validation Dice of 0.100", id="lost"),
        pytest.param([0.7, 0.6], [0.3, 0.4], "best", "", id="not_much_lower"),
        pytest.param([0.6, 0.7], [0.1, 0.4], "best", "", id="best_of_both"),
        pytest.param([0.7, 0.6], [0.1, 0.4], "last", "", id="last"),
        pytest.param([0.7, 0.6], [0.0, 0.0], "best", "", id="no_epoch_finds_any"),
        pytest.param([0.7, 0.6], [math.nan, 0.4], "best", "", id="no_masks_then"),
        pytest.param([0.7, 0.6], [None, None], "best", "", id="not_a_task"),
    ],
)
def test_an_epoch_kept_whose_masks_are_of_little_use_is_told(tmp_path, caplog, c_index, dice, keep, warning) -> None:
    state = training_state(tmp_path, "c_index", 0, keep)
    trainer = SimpleNamespace(state=SimpleNamespace(epoch=0, max_epochs=2))
    for epoch in (1, 2):
        trainer.state.epoch = epoch
        metrics = {"c_index": c_index[epoch - 1], "dice": dice[epoch - 1]}
        run_epoch(state, trainer, {name: value for name, value in metrics.items() if value is not None})
    assert ("of little use" in caplog.text) == bool(warning)
    assert warning in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("validated", [True, False], ids=["validated", "not_validated"])
def test_a_training_that_diverges_ends_before_it_is_written(tmp_path, value: float, validated: bool) -> None:
    """The weights of the epochs before stay."""
    state = trained_state(tmp_path, 2)
    state.val_interval, state.evaluator = (1 if validated else 5), Engine(lambda engine, batch: pytest.fail())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    trainer = Engine(lambda engine, batch: {"loss": torch.tensor(value if batch == 1 else 1.0)})
    trainer.add_event_handler(Events.STARTED, lambda: setattr(trainer.state, "epoch", 2))
    state.resume = lambda engine: None  # type: ignore[method-assign]
    if validated:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: state.evaluator.run([0]))
    state.attach(trainer)
    with pytest.raises(
        RuntimeError, match=r"training has diverged in epoch 3 \(loss (nan|inf)\).* learning_rate .in this epoch 0.001"
    ):
        trainer.run([0, 1, 2], max_epochs=9)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("keep", "patience", "message"),
    [
        ("newest", 0, "keep_epoch is 'best' or 'last'"),
        ("last", 5, "set early_stop_patience to 0, not 5, or keep_epoch to 'best'"),
    ],
)
def test_what_to_keep_is_checked(tmp_path, keep, patience, message) -> None:
    with pytest.raises(ValueError, match=message):
        training_state(tmp_path, "c_index", patience, keep)


@pytest.mark.parametrize(
    ("metric", "value", "best", "better"),
    [("dice", 0.7, 0.6, True), ("dice", 0.6, 0.6, False), ("loss", 0.5, 0.6, True), ("c_index", math.nan, -1, False)],
)
def test_comparison(metric, value, best, better) -> None:
    assert is_better(value, best, metric) is better


OPTIONS = ["--network_def#network#mask_gradient", "flow", "--train#loss#task_weights", "uncertainty"]


def test_a_run_with_flowing_gradient_and_learned_weights_ends_alike_when_broken_off(
    tiny_cohort, tmp_path, run_bundle
) -> None:
    common = ["--dataset_dir", str(tiny_cohort), "--val_interval", "1", "--batch_size", "2", "--num_folds", "2"]
    for folder, epochs in (("whole", (2,)), ("parts", (1, 2))):
        for epoch in epochs:
            options = [*common, *OPTIONS, "--output_dir", str(tmp_path / folder), "--epochs", str(epoch)]
            run_bundle("training", "--config_file", "configs/train.json", *options, *TINY)
    whole, parts = (
        torch.load(tmp_path / name / "models" / "resume" / "last.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert whole["history"] == parts["history"]
    assert {f"weight_{task}" for task in keys.TASKS} <= set(whole["history"][0])
    assert set(whole["loss"]) >= {f"log_variances.{task}" for task in keys.TASKS}
    for name in ("loss", "network"):
        tensors = [{k: v for k, v in state[name].items() if isinstance(v, torch.Tensor)} for state in (whole, parts)]
        torch.testing.assert_close(*tensors, rtol=0, atol=0)
    assert all(float(whole["loss"][f"log_variances.{task}"]) for task in ("seg", "hpv"))
