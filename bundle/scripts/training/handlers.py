"""Ignite handlers: validation metrics, selection of the best checkpoint, resuming, progress bar."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Events
from ignite.metrics import Average, Metric
from monai.engines import Evaluator, Workflow
from monai.handlers import IgniteMetricHandler, TensorBoardStatsHandler
from monai.metrics import CumulativeIterationMetric
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from scripts import keys
from scripts.cohorts.files import require_writable, write_text, written_whole
from scripts.cohorts.thresholds import above, label_map
from scripts.imaging.lesions import MERGED
from scripts.model.ensemble import FoldEnsemble, load_checkpoint, save_weights
from scripts.model.errors import CheckpointError
from scripts.model.ranks import rank, world_size
from scripts.training.concordance import concordance_index
from scripts.training.configuration import run_differences
from scripts.training.metrics import BalancedAccuracyMetric, ConcordanceIndexMetric, MaskedDiceMetric
from scripts.training.sampling import EventBatchSampler, seed_epoch

logger = logging.getLogger(__name__)

C_INDEX, DICE, BALANCED_ACCURACY, LOSS = "c_index", "dice", "balanced_accuracy", "loss"
BEST, LAST = "best", "last"
LOWER_IS_BETTER = (LOSS,)
LEAST_PROBABILITY = 1e-6  # so that logits are finite
BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm3d)
LOST_DICE = 0.5  # share of the highest Dice below which an epoch's masks are of little use


# --- metrics -------------------------------------------------------------------------------------------------
def nan_where_unknown(values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """``values`` (B, ...) as float, with NaN for the cases without a label."""
    mask = known.bool().reshape(-1, *[1] * (values.ndim - 1))
    return torch.where(mask, values.float(), torch.full_like(values.float(), math.nan))


def survival_pairs(output: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log hazard (B, 1) and [time, event] (B, 2) of an engine's output."""
    pred, label = output["pred"], output["label"]
    truth = torch.stack([label[keys.TIME].double(), label[keys.EVENT].double()], dim=1)
    known = label[keys.SURV_KNOWN].bool()[:, None]
    return pred[keys.LOG_HAZARD].reshape(-1, 1), truth.masked_fill(~known, math.nan)


def mask_pairs(output: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted tumour (B, 1, *roi_size) at probability 0.5 and the true one of an engine's output."""
    pred, label = output["pred"], output["label"]
    return above(pred[keys.SEG_PROB]).float(), nan_where_unknown(label[keys.SEG] > 0, label[keys.SEG_KNOWN])


def class_pairs(output: Mapping[str, Any], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`mask_pairs` of the class with this value in masks; NaN where the mask does not tell classes apart."""
    pred, label = output["pred"], output["label"]
    known = label[keys.SEG_KNOWN].bool() & label[keys.SEG_CLASSES_KNOWN].bool()
    predicted = label_map(pred[keys.SEG_PROB], pred[keys.CLASS_PROB]) == value
    return predicted.float(), nan_where_unknown(label[keys.SEG] == value, known)


def hpv_pairs(output: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """HPV probability (B, 1) and status (B, 1) of an engine's output."""
    pred, label = output["pred"], output["label"]
    return pred[keys.HPV_PROB].reshape(-1, 1), nan_where_unknown(label[keys.HPV].reshape(-1, 1), label[keys.HPV_KNOWN])


def mean_loss(loss: torch.nn.Module) -> Average:
    """Metric handler: ``loss`` of the predictions of an epoch, averaged over batches.

    Args:
        loss: a :class:`scripts.model.losses.MultitaskLoss`; probabilities are converted back to logits for it.
    """

    def batch_loss(output: Mapping[str, Any]) -> torch.Tensor:
        pred = dict(output["pred"])
        for prob, logit in ((keys.SEG_PROB, keys.SEG_LOGITS), (keys.HPV_PROB, keys.HPV_LOGIT)):
            if prob in pred:
                pred[logit] = torch.logit(pred[prob], eps=LEAST_PROBABILITY)
        if keys.CLASS_PROB in pred:
            each, none = pred[keys.CLASS_PROB], 1 - pred[keys.SEG_PROB]
            pred[keys.CLASS_LOGITS] = torch.log(each.clamp_min(LEAST_PROBABILITY) / none.clamp_min(LEAST_PROBABILITY))
        was_training = loss.training
        loss.eval()  # learned task weights count as 1
        with torch.no_grad():
            value = loss(pred, output["label"])
        loss.train(was_training)
        return value

    return Average(output_transform=batch_loss)


def choose_key_metric(cases: Sequence[Mapping], tasks: Sequence[str]) -> str:
    """Name of the metric that judges an epoch: with ``keep_epoch: best`` it selects the checkpoint.

    The C-index if ``cases`` (the validation set) have a comparable pair, else Dice if a case has a mask, else the
    loss. The choice is logged with its reason.
    """
    known = [c for c in cases if c[keys.SURV_KNOWN]]
    events = sum(bool(c[keys.EVENT]) for c in known)
    comparable = len(known) > 1 and not math.isnan(
        concordance_index([c[keys.TIME] for c in known], [c[keys.EVENT] for c in known], [0.0] * len(known))
    )
    masks = sum(bool(c[keys.SEG_KNOWN]) for c in cases)
    if keys.TASK_SURV in tasks and comparable:
        logger.info("key metric: C-index of %d validation cases, %d events", len(known), events)
        return C_INDEX
    no_survival = keys.TASK_SURV not in tasks
    why = "survival is not a task" if no_survival else f"validation has {events} events and no comparable pair"
    if keys.TASK_SEG in tasks and masks:
        logger.warning("key metric: Dice over %d masks, not C-index: %s", masks, why)
        return DICE
    logger.warning("key metric: the loss, not C-index: %s and no masks", why)
    return LOSS


def validation_metrics(
    key_metric: str, tasks: Sequence[str], loss: torch.nn.Module, seg_classes: Sequence[str] = MERGED
) -> dict[str, Metric]:
    """Metric handlers by name, ``key_metric`` first as MONAI's evaluator requires.

    The loss, and of ``tasks``: C-index (7), mean Dice (8) of tumour of any class and, of a network of several
    ``seg_classes``, of each (``dice_gtvp``, ``dice_gtvn``), balanced accuracy (9), each over the cases whose label is
    known.
    """
    each: list[tuple[str, str, CumulativeIterationMetric, Callable]] = [
        (keys.TASK_SURV, C_INDEX, ConcordanceIndexMetric(), survival_pairs),
        (keys.TASK_SEG, DICE, MaskedDiceMetric(), mask_pairs),
        (keys.TASK_HPV, BALANCED_ACCURACY, BalancedAccuracyMetric(), hpv_pairs),
    ]
    if len(seg_classes) > 1:
        each += [
            (keys.TASK_SEG, f"{DICE}_{name.lower()}", MaskedDiceMetric(), partial(class_pairs, value=value))
            for value, name in enumerate(seg_classes, start=1)
        ]
    metrics: dict[str, Metric] = {LOSS: mean_loss(loss)}
    for task, name, metric, pairs in each:
        if task in tasks:
            metrics[name] = IgniteMetricHandler(metric_fn=metric, output_transform=pairs, save_details=False)
    return {key_metric: metrics.pop(key_metric), **metrics}


def is_better(value: float, best: float | None, metric: str) -> bool:
    """Whether ``value`` of ``metric`` is better than ``best``: NaN never is, any other number is better than ``None``.

    >>> is_better(0.7, 0.6, "c_index"), is_better(0.7, 0.6, "loss"), is_better(math.nan, None, "dice")
    (True, False, False)
    """
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best if metric in LOWER_IS_BETTER else value > best


# --- best checkpoint, early stopping, resuming ------------------------------------------------------------------
@dataclass(eq=False, repr=False)
class TrainingState:
    """Checkpoints, early stopping and resuming of a run.

    Attach *after* the validation handler. At the end of each epoch it compares the validation metric and writes
    ``<ckpt_dir>/model.pt`` if it is the best so far (or always, see ``keep``), ``<ckpt_dir>/resume/last.pt``, and
    ``<output_dir>/history.json``, all atomically. At the start it resumes from ``last.pt``, or from ``previous.pt``,
    the epoch before, if ``last.pt`` cannot be read. Random numbers depend on ``(seed, epoch)`` only, so that a resumed
    run ends with the metrics of an uninterrupted one.

    (MONAI's ``CheckpointSaver`` does not write atomically and forgets the best metric on resuming. ignite's
    ``EarlyStopping`` takes NaN for an improvement. Neither falls back from a damaged file or refuses another run's.)

    Args:
        ensemble: :class:`scripts.model.ensemble.FoldEnsemble` around the trained network; written as ``model.pt``.
        optimizer: its optimiser.
        scheduler: its learning-rate schedule, stepped here once an epoch.
        loss: loss module, whose state (learned task weights) is part of the run.
        sampler: batches of the training loader.
        evaluator: validation engine, already run by a ``ValidationHandler`` every ``val_interval`` epochs.
        val_interval: epochs between validations; the last epoch is always validated.
        ckpt_dir: folder of ``model.pt``.
        output_dir: folder of ``history.json``.
        settings: what defines the run (:func:`.describe_run`); a ``last.pt`` of another one is
            refused.
        seed: of the run.
        patience: validations without improvement after which training stops; 0 to never stop early.
        keep: ``"best"``: ``model.pt`` is of the epoch with the best validation metric, as in the paper; ``"last"``: of
            the last validated one. The C-index of some 20 events is so uncertain that the best epoch is largely chance;
            the metrics of the last one are not biased by selection.

    Raises:
        ValueError: another ``keep``, or early stopping with ``"last"``.
    """

    ensemble: FoldEnsemble
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loss: torch.nn.Module
    sampler: EventBatchSampler
    evaluator: Evaluator
    val_interval: int
    ckpt_dir: str
    output_dir: str
    settings: Mapping[str, Any]
    seed: int = 0
    patience: int = 0
    keep: str = BEST

    def __post_init__(self) -> None:
        if self.keep not in (BEST, LAST):
            raise ValueError(f"keep_epoch is '{BEST}' or '{LAST}'; got {self.keep!r}")
        if self.keep == LAST and self.patience:
            raise ValueError(
                f"keep_epoch '{LAST}' has no early stopping: set early_stop_patience to 0, not {self.patience}, or "
                f"keep_epoch to '{BEST}'"
            )
        self.parts: dict[str, Any] = {"network": self.ensemble}
        self.parts |= {"optimizer": self.optimizer, "scheduler": self.scheduler, "loss": self.loss}
        self.best_path = Path(self.ckpt_dir) / "model.pt"
        self.last_path = Path(self.ckpt_dir) / "resume" / "last.pt"
        self.previous_path = self.last_path.with_name("previous.pt")
        self.history_path = Path(self.output_dir) / "history.json"
        self.settings = json.loads(json.dumps(dict(self.settings), default=str))
        self.best: float | None = None
        self.best_epoch = 0
        self.stale = 0
        self.stopped_early = False
        self.history: list[dict[str, float]] = []
        self._losses: list[dict[str, torch.Tensor]] = []

    def attach(self, engine: Workflow) -> None:
        """Register with the trainer ``engine``."""
        engine.add_event_handler(Events.STARTED, self.resume)
        engine.add_event_handler(Events.EPOCH_STARTED, self.begin_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.record_loss)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.end_epoch)
        self.evaluator.add_event_handler(Events.STARTED, self.check_losses)  # the C-index of NaN would be an error

    # -- events ------------------------------------------------------------------------------------------------
    def resume(self, engine: Workflow) -> None:
        """Resume from the last complete epoch, if any.

        Raises:
            RuntimeError: the state on disk cannot be read, or is of another run.
            scripts.cohorts.files.WriteError: no checkpoint can be written there.
        """
        require_writable(self.last_path.parent)  # now, rather than after the first epoch
        state = self._read_state()
        if state is None:
            return
        self._refuse_other_run(state["settings"])
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name in ("best", "best_epoch", "stale", "stopped_early", "history"):
            setattr(self, name, state[name])
        engine.state.epoch = state["epoch"]
        engine.state.iteration = state["epoch"] * engine.state.epoch_length
        if rank() == 0:
            self._write_history()  # a kill may have come between last.pt and history.json
        if self.stopped_early or state["epoch"] >= engine.state.max_epochs:
            why = "stopped early" if self.stopped_early else "is complete"
            logger.info("the run of %s %s after epoch %d: nothing to do", self.last_path, why, state["epoch"])
            engine.terminate()
        else:
            logger.info("resuming after epoch %d of %s", state["epoch"], self.last_path)

    def begin_epoch(self, engine: Workflow) -> None:
        """Seed the epoch's batches and random numbers."""
        self.sampler.set_epoch(engine.state.epoch)
        seed_epoch(self.seed, engine.state.epoch)
        self._losses = []

    def record_loss(self, engine: Workflow) -> None:
        """Remember the parts of the loss of one batch, unread, since the host would wait for the device."""
        loss = engine.state.output["loss"].detach()
        self._losses.append({"loss": loss, **getattr(self.parts["loss"], "parts", {})})
        # As logging handlers (MLflow's) read it. Decollating the output would read the loss at each step.
        engine.state.output = [{"loss": loss}]

    def check_losses(self, engine: Any = None) -> None:
        """End a run whose losses of the epoch are not numbers, before its weights are validated or written.

        Raises:
            RuntimeError: training has diverged.
        """
        wrong = [f"{name} {value}" for name, value in self._mean_losses().items() if not math.isfinite(value)]
        if wrong:
            rate = self.parts["optimizer"].param_groups[0]["lr"]
            raise RuntimeError(
                f"training has diverged in epoch {self.sampler.epoch} ({', '.join(wrong)}), which is not written: "
                f"train with a lower learning_rate (in this epoch {rate:g}) in another output_dir"
            )

    def end_epoch(self, engine: Workflow) -> None:
        """Validate if due, save the epoch, and stop the run after ``patience`` validations without improvement."""
        self.check_losses()
        epoch = engine.state.epoch
        due, last = epoch % self.val_interval == 0, epoch == engine.state.max_epochs
        if last and not due:  # else the ValidationHandler has run it
            self.evaluator.run(epoch)
        validated = due or last
        losses = self._mean_losses()
        engine.state.metrics = {f"train_{name}": value for name, value in losses.items()}  # for logging handlers
        row = {"epoch": epoch, "lr": self.parts["optimizer"].param_groups[0]["lr"], **losses}
        self.parts["scheduler"].step()
        improved = False
        if validated:
            metrics = {f"val_{k}": float(v) for k, v in self.evaluator.state.metrics.items()}
            row.update(metrics)
            improved = self._judge(epoch)
        self.history.append(row)
        if rank() == 0:
            if improved:
                save_weights(self.ensemble, self.best_path)
            with written_whole(self.last_path) as partial:
                torch.save(self._state(epoch), partial)
                if self.last_path.is_file():
                    self.last_path.replace(self.previous_path)
            self._write_history()
        if validated:
            self._report(row)
        if self.stopped_early:
            logger.info("no improvement of %s in %d validations: training stops early", self._key, self.stale)
            engine.terminate()
        if self.stopped_early or last:
            self._tell_kept_epoch()
            self._warn_of_lost_tumours()

    # -- parts ---------------------------------------------------------------------------------------------------
    @property
    def _key(self) -> str:
        return self.evaluator.state.key_metric_name

    def _judge(self, epoch: int) -> bool:
        value = float(self.evaluator.state.metrics[self._key])
        improved = self.keep == LAST or is_better(value, self.best, self._key)
        if improved:
            self.best, self.best_epoch, self.stale = value, epoch, 0
        else:
            self.stale += 1
        self.stopped_early = bool(self.patience) and self.stale >= self.patience
        return improved

    def _mean_losses(self) -> dict[str, float]:
        if not self._losses:
            return {}
        rows = torch.stack([torch.stack(list(row.values())) for row in self._losses]).tolist()  # read at once
        means = [sum(column) / len(column) for column in zip(*rows, strict=True)]
        return dict(zip(self._losses[0], means, strict=True))

    def _read_state(self) -> dict[str, Any] | None:
        """State of the last epoch with a readable file; None before the first complete epoch."""
        faults = []
        for path in (self.last_path, self.previous_path):
            if not path.is_file():
                continue
            try:
                state = load_checkpoint(path)
                missing = [name for name in self._state(0) if name not in state]
                if missing:
                    raise CheckpointError(f"{path} is not a training state: {', '.join(missing)} missing")
            except (CheckpointError, OSError) as error:
                faults.append(str(error))
                continue
            for fault in faults:
                logger.warning("cannot be read, resuming from the epoch before: %s", fault)
            return state
        if not faults:
            return None
        raise RuntimeError(
            f"the training cannot be resumed, its state is damaged ({'; '.join(faults)}): delete the folder "
            f"{self.last_path.parent} to train from the first epoch, or restore it from a backup"
        )

    def _write_history(self) -> None:
        write_text(self.history_path, json.dumps([_without_nan(row) for row in self.history], indent=1))

    def _state(self, epoch: int) -> dict[str, Any]:
        return {
            **{name: part.state_dict() for name, part in self.parts.items()},
            "settings": self.settings,
            "epoch": epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "stale": self.stale,
            "stopped_early": self.stopped_early,
            "history": self.history,
        }

    def _report(self, row: Mapping[str, float]) -> None:
        shown = "  ".join(f"{k.removeprefix('val_')} {v:.3f}" for k, v in row.items() if k.startswith("val_"))
        best = "none yet" if self.best is None else f"{self.best:.3f} at epoch {self.best_epoch}"
        logger.info(
            "epoch %d  train loss %.3f | %s | %s %s: %s", row["epoch"], row["loss"], shown, self.keep, self._key, best
        )

    def _tell_kept_epoch(self) -> None:
        """Log which epoch's weights were kept, and whether its metrics are biased by the choice."""
        validated = sum(f"val_{self._key}" in row for row in self.history)
        if self.keep == LAST:
            logger.info("weights kept: epoch %d, the last", self.best_epoch)
            return
        logger.info(
            "weights kept: epoch %d, the best of %d by %s on the validation cases: its metrics of these cases are too "
            "optimistic (keep_epoch: best)",
            *(self.best_epoch, validated, self._key),
        )

    def _warn_of_lost_tumours(self) -> None:
        """Warn if the kept epoch (selected by C-index, for example) has a far lower Dice than another one."""
        dice = {int(row["epoch"]): row["val_dice"] for row in self.history if row.get("val_dice") is not None}
        best = max((epoch for epoch in dice if not math.isnan(dice[epoch])), key=lambda epoch: dice[epoch], default=0)
        kept = dice.get(self.best_epoch, math.nan)
        if best and kept < LOST_DICE * dice[best]:
            logger.warning(
                "the epoch kept (%d, by %s) has a validation Dice of %.3f, epoch %d had %.3f: its masks are of little "
                "use; train longer, with --keep_epoch last, or with --network_def#network#mask_gradient stop",
                *(self.best_epoch, self._key, kept, best, dice[best]),
            )

    def _refuse_other_run(self, found: Mapping[str, Any]) -> None:
        differences = run_differences(found, self.settings)
        if differences:
            raise RuntimeError(
                f"{self.last_path} is of another run, whose result going on would mix with this one's "
                f"({'; '.join(differences)}): give another output_dir, or delete {self.last_path.parent} to start anew"
            )


@dataclass
class RankStatistics:
    """Averages the statistics of batch norms over ranks at the end of each epoch, before validation.

    All ranks then evaluate and save the same network. Attach *before* the validation handler. No effect with a single
    process, nor on norms that are computed over all ranks (``SyncBatchNorm``, on GPUs).
    """

    network: torch.nn.Module  # with the batch norms

    def attach(self, engine: Workflow) -> None:
        """Register with the trainer ``engine``."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.average)

    def average(self) -> None:
        """Average means and variances; the averaged variance is that within the ranks' batches, as always."""
        if world_size() == 1:
            return
        for norm in self.network.modules():
            if isinstance(norm, BATCH_NORMS):
                for values in (norm.running_mean, norm.running_var):
                    dist.all_reduce(values)
                    values.div_(world_size())  # type: ignore[union-attr]


def tensorboard(output_dir: str, **options: Any) -> TensorBoardStatsHandler | None:
    """MONAI's TensorBoard handler in ``<output_dir>/tensorboard``; None, so none at all, in a process but the first."""
    return TensorBoardStatsHandler(log_dir=f"{output_dir}/tensorboard", **options) if rank() == 0 else None


def _without_nan(row: Mapping[str, float]) -> dict[str, float | None]:
    """``row`` with null for NaN, which JSON lacks."""
    return {name: None if math.isnan(value) else value for name, value in row.items()}


# --- progress ---------------------------------------------------------------------------------------------------
class Progress:
    """Progress bar over all iterations of a run, with the time left (ignite's restarts at every epoch).

    Args:
        desc: label of the bar.
        unit: of an iteration.
    """

    def __init__(self, desc: str, unit: str = "batch") -> None:
        self.desc = desc
        self.unit = unit
        self.bar: tqdm | None = None
        self._stack = ExitStack()

    def attach(self, engine: Workflow) -> None:
        """Register with ``engine``."""
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.COMPLETED, self._close)
        engine.add_event_handler(Events.TERMINATE, self._close)

    def _open(self, engine: Workflow) -> None:
        state = engine.state
        self._stack.enter_context(logging_redirect_tqdm())  # log lines go above the bar, not into it
        epochs_left = (state.max_epochs or 1) - state.epoch if self.unit == "batch" and state.max_epochs else 1
        total = max(1, epochs_left) * (state.epoch_length or 0)
        self.bar = tqdm(total=total, desc=self.desc, unit=self.unit, disable=rank() > 0, leave=True)

    def _advance(self, engine: Workflow) -> None:
        if self.bar is not None:
            if self.unit == "batch" and (engine.state.max_epochs or 1) > 1:
                self.bar.set_description(f"{self.desc}: epoch {engine.state.epoch}/{engine.state.max_epochs}", False)
            self.bar.update()

    def _close(self, engine: Workflow) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
            self._stack.close()
