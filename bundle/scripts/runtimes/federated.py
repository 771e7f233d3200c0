"""Federated training: a centre trains on its own cases and sends weights, never cases.

In each round a server sends the weights of the network to the centres. :class:`CentreClient`, MONAI's client, trains
them on the cases of its centre and answers with an :class:`Update`: the differences of the weights, and a few numbers
about all of its cases (:data:`METRICS`). The server averages the differences (FedAvg). :func:`check_update` checks each
update before it leaves the centre: names and shapes are those of the network, and numbers have a name in that list.
Means are over at least :data:`LEAST_CASES` cases.

Nothing here needs NVIDIA FLARE; the program that connects it with this module is in the job folder.

References:
    McMahan et al., "Communication-efficient learning of deep networks from decentralized data", 2017 (FedAvg).
    Li et al., "FedBN: federated learning on non-IID features via local batch normalization", 2021.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.engines import SupervisedEvaluator, SupervisedTrainer, Workflow
from monai.fl.client import MonaiAlgo
from monai.fl.utils.exchange_object import ExchangeObject
from monai.networks.utils import copy_model_state
from torch import nn

from scripts import keys
from scripts.cohorts.clinical import DEFAULT_FEATURES
from scripts.cohorts.cohort import Cohort, CohortError, load_cohort
from scripts.cohorts.files import written_whole
from scripts.keys import Case
from scripts.model.ensemble import (
    FoldEnsemble,
    load_checkpoint,
    load_weights,
    record,
    save_weights,
    saved_spec,
)
from scripts.training.handlers import BALANCED_ACCURACY, C_INDEX, DICE, LOSS
from scripts.training.sampling import EventBatchSampler, seed_epoch

logger = logging.getLogger(__name__)

SHARED, LOCAL = "shared", "local"
NORMS = (SHARED, LOCAL)
CASES, PHANTOMS, TRAIN_LOSS = "cases", "phantoms", "train_loss"
COUNTS = (CASES, PHANTOMS)
VALIDATION = {
    LOSS: None,
    C_INDEX: keys.SURV_KNOWN,
    DICE: keys.SEG_KNOWN,
    f"{DICE}_gtvp": keys.SEG_KNOWN,
    f"{DICE}_gtvn": keys.SEG_KNOWN,
    BALANCED_ACCURACY: keys.HPV_KNOWN,
}
"""Metrics of the validation cases, and the flag of the label that each is computed from."""
METRICS = (*COUNTS, TRAIN_LOSS, *VALIDATION)
"""Every number about cases that a centre may send."""
LEAST_CASES = 10
"""A metric of fewer cases is not sent: it would say too much about each."""
LABELS = {
    "decoder": keys.SEG_KNOWN,
    "hpv": keys.HPV_KNOWN,
    "hpv_clinical": keys.HPV_KNOWN,
    "summaries": keys.EVENT,
    "survival": keys.EVENT,
    "burden": keys.EVENT,
}
"""Parts of the network that one task alone trains, and what a case must have for it."""
STATE_FILE = "federated.pt"
CENTRE_LOG, REASON = "centre.log", "reason: "  # what stays at a centre, and how the line on a failure starts there
FEDERATED = "federated"  # in the provenance of the global model


class FederatedError(RuntimeError):
    """A centre cannot take part, or a message must not be sent; the message says why."""


# --- parts of configs/federated.json --------------------------------------------------------------------------------
def cohort_of_centre(
    dataset_dir: str,
    ehr_csv: str | Sequence[str] | None = None,
    clinical_features: Sequence[str] = DEFAULT_FEATURES,
    centre: str | None = None,
) -> Cohort:
    """:func:`scripts.cohorts.cohort.load_cohort`, of one centre; without ``centre`` of all.

    Raises:
        CohortError: as ``load_cohort``, or there is no case of this centre.
    """
    cohort = load_cohort(dataset_dir, ehr_csv, clinical_features)
    if centre is None:
        return cohort
    cases = [case for case in cohort.cases if case[keys.CENTRE] == centre]
    if not cases:
        raise CohortError(f"{dataset_dir} has no case of the centre {centre!r}; it has {', '.join(cohort.centres)}")
    return replace(cohort, cases=cases)


@dataclass(eq=False, repr=False)
class LocalEpochs:
    """Handler of the local epochs: learning rate, batches and random numbers depend on the epoch only.

    Epochs are counted over all rounds, so that a centre that was restarted trains as if it had not been.

    Args:
        optimizer: of the trainer.
        scheduler: its learning-rate schedule, whose factors are read.
        sampler: batches of the training loader.
        seed: of the run.

    Attributes:
        losses: mean training loss of each epoch of the last run.
    """

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    sampler: EventBatchSampler
    seed: int = 0
    losses: list[float] = field(default_factory=list)

    def attach(self, engine: Workflow) -> None:
        """Register with the trainer ``engine``."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.begin_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.record_loss)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.end_epoch)

    def begin_epoch(self, engine: Workflow) -> None:
        """Set learning rate, batches and random numbers of the epoch."""
        epoch = engine.state.epoch
        rates = zip(self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        for group, rate, factor in rates:
            group["lr"] = rate * factor(epoch - 1)
        self.sampler.set_epoch(epoch)
        seed_epoch(self.seed, epoch)
        self._batches: list[torch.Tensor] = []

    def record_loss(self, engine: Workflow) -> None:
        """Remember the loss of a batch."""
        self._batches.append(engine.state.output["loss"].detach())

    def end_epoch(self, engine: Workflow) -> None:
        """Mean loss of the epoch."""
        self.losses.append(float(torch.stack(self._batches).mean()))


# --- what a centre sends --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Update:
    """What a centre sends after a round."""

    weights: dict[str, np.ndarray]  # name in the network -> float32 array, new weights minus those received
    metrics: dict[str, float]  # of METRICS, each a number
    cases: int  # training cases, the weight of the centre in the average


def check_update(update: Update, network: nn.Module) -> Update:
    """Check that an update holds nothing but weights of the network and the numbers of :data:`METRICS`.

    Raises:
        FederatedError: it does, or a value is not finite; nothing must be sent then.
    """
    known = {name: value for name, value in network.state_dict().items() if value.is_floating_point()}
    for name, value in update.weights.items():
        if name not in known:
            raise FederatedError(f"not sent: {name!r} is no weight of the network")
        if type(value) is not np.ndarray or value.dtype != np.float32 or value.shape != tuple(known[name].shape):
            found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise FederatedError(f"not sent: {name} is {found}, not float32 {tuple(known[name].shape)}")
        if not np.isfinite(value).all():
            raise FederatedError(f"not sent: {name} has values that are not finite: lower learning_rate")
    check_metrics(update.metrics)
    if type(update.cases) is not int:
        raise FederatedError(f"not sent: the number of cases is a {type(update.cases).__name__}")
    return update


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Check that metrics are finite numbers with the names of :data:`METRICS`.

    Raises:
        FederatedError: they are not.
    """
    for name, value in metrics.items():
        if name not in METRICS:
            raise FederatedError(f"not sent: {name!r} is no metric that a centre sends")
        if type(value) not in (int, float) or not math.isfinite(value):
            raise FederatedError(f"not sent: {name} is {type(value).__name__}, not a finite number")


def validation_numbers(metrics: Mapping[str, Any], cases: Sequence[Case]) -> dict[str, float]:
    """The validation metrics that may be sent: defined, and of at least :data:`LEAST_CASES` cases.

    Example:
        >>> cases = [{"seg_known": k < 12, "hpv_known": k < 3} for k in range(20)]
        >>> validation_numbers({"loss": 1.5, "dice": 0.7, "balanced_accuracy": 1.0}, cases)
        {'loss': 1.5, 'dice': 0.7}
    """
    sent = {}
    for name in [name for name in VALIDATION if name in metrics]:
        flag = VALIDATION[name]
        count = sum(flag is None or bool(case[flag]) for case in cases)
        if count >= LEAST_CASES and math.isfinite(metrics[name]):
            sent[name] = float(metrics[name])
    return sent


def norm_names(network: nn.Module) -> set[str]:
    """Names of the weights and statistics of all normalisation layers."""
    norms = [(name, part) for name, part in network.named_modules() if isinstance(part, nn.modules.batchnorm._NormBase)]
    return {f"{name}.{key}" for name, part in norms for key in part.state_dict()}


def untrained_parts(cases: Sequence[Case]) -> set[str]:
    """Parts of the network that these cases cannot train: no case has a label, or an event, for them.

    Example:
        >>> cases = [{"seg_known": True, "hpv_known": False, "event": False}]
        >>> sorted(untrained_parts(cases))
        ['burden', 'hpv', 'hpv_clinical', 'summaries', 'survival']
    """
    return {part for part, flag in LABELS.items() if not any(case[flag] for case in cases)}


# --- a centre -------------------------------------------------------------------------------------------------------
class CentreClient(MonaiAlgo):
    """MONAI's federated client on this bundle's training.

    The state of the optimiser, and with ``norms="local"`` (FedBN) the batch norms, never leave the centre. They are
    kept in ``<output_dir>/federated.pt``, so that a client that is restarted continues with them.

    Args:
        bundle_root: folder of the bundle.
        dataset_dir: folder of the centre's cases; ``$NAME`` stands for a variable of its environment.
        output_dir: folder for everything that stays at the centre: cache, log, state.
        local_epochs: epochs in each round.
        config_files: overlays on ``configs/train.json``, relative to the bundle.
        settings: ids of the configs and their values.
        centre: keep the cases of this centre only.
        norms: "shared", batch norms are averaged as all other weights; "local", each centre keeps its own.

    Raises:
        FederatedError: another ``norms``, or a variable that is not set.
    """

    def __init__(
        self,
        bundle_root: str,
        dataset_dir: str,
        output_dir: str,
        local_epochs: int = 1,
        config_files: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        centre: str | None = None,
        norms: str = SHARED,
    ) -> None:
        if norms not in NORMS:
            raise FederatedError(f"norms is one of {', '.join(NORMS)}; got {norms!r}")
        place = os.path.expandvars(dataset_dir)
        if "$" in place:
            raise FederatedError(f"dataset_dir is {dataset_dir}: set this variable of the environment on this machine")
        self.state_path = Path(output_dir) / STATE_FILE
        self.norms = norms
        given = {**(settings or {}), "dataset_dir": place, "output_dir": output_dir, "bundle_root": bundle_root}
        super().__init__(
            bundle_root=bundle_root,
            local_epochs=local_epochs,
            config_train_filename=["configs/train.json", *config_files, "configs/federated.json"],
            train_kwargs={**given, "centre": centre},
            config_evaluate_filename=None,
        )

    def initialize(self, extra: dict[str, Any] | None = None) -> None:
        """Read configs and cohort, and what an earlier process of this centre has kept."""
        super().initialize(extra)
        parser = cast(ConfigWorkflow, self.train_workflow).parser
        self.evaluator = parser.get_parsed_content("validate#evaluator")
        self.training: list[Case] = parser.get_parsed_content("train#dataset").data
        self.validation: list[Case] = parser.get_parsed_content("validate#dataset").data
        statement = parser.get_parsed_content("split#cohort").statement(self.training)
        self.phantoms = len(self.training) if "phantom" in statement else 0
        self.epochs: LocalEpochs = parser.get_parsed_content("train#handlers")[0]
        self.kept = norm_names(self.network) if self.norms == LOCAL else set[str]()
        if self.state_path.is_file():
            state = load_checkpoint(self.state_path)
            self._trainer.optimizer.load_state_dict(state["optimizer"])
            copy_model_state(dst=self.network, src=state["norms"])
        missing = sorted(untrained_parts(self.training))
        logger.info("%d training cases; weights not sent, without labels for them: %s", len(self.training), missing)

    @property
    def _trainer(self) -> SupervisedTrainer:
        if self.trainer is None:
            raise FederatedError("the client has not been initialised")
        return self.trainer

    @property
    def network(self) -> nn.Module:
        """The network in training."""
        return self._trainer.network

    def train(self, data: ExchangeObject, extra: dict[str, Any] | None = None) -> None:
        """Train the weights received; ``extra`` has the ``round``, from 0."""
        state, done = self._trainer.state, (extra or {})["round"] * self.local_epochs
        state.epoch, state.iteration = done, done * cast(int, state.epoch_length)
        self.epochs.losses.clear()
        super().train(self._received(data), extra)
        norms = {name: value for name, value in self.network.state_dict().items() if name in self.kept}
        with written_whole(self.state_path) as partial:
            torch.save({"optimizer": self._trainer.optimizer.state_dict(), "norms": norms}, partial)

    def update(self) -> Update:
        """What to send after :meth:`train`; checked."""
        parts = untrained_parts(self.training)
        weights = {
            name: value.detach().float().cpu().numpy()
            for name, value in cast(dict[str, torch.Tensor], self.get_weights().weights).items()
            if value.is_floating_point() and name not in self.kept and name.split(".")[0] not in parts
        }
        metrics: dict[str, float] = {CASES: len(self.training), PHANTOMS: self.phantoms}
        if len(self.training) >= LEAST_CASES:
            metrics[TRAIN_LOSS] = self.epochs.losses[-1]
        return check_update(Update(weights, metrics, len(self.training)), self.network)

    def evaluate(self, data: ExchangeObject, extra: dict[str, Any] | None = None) -> ExchangeObject:
        """Metrics of the weights received on this centre's validation cases, as far as they may be sent."""
        copy_model_state(dst=self.network, src=cast(dict[str, Any], self._received(data).weights))
        evaluator = cast(SupervisedEvaluator, self.evaluator)
        evaluator.run(self._trainer.state.epoch + 1)
        metrics = validation_numbers(evaluator.state.metrics, self.validation)
        check_metrics(metrics)
        return ExchangeObject(metrics=metrics)

    def save_own_model(self, path: str | os.PathLike[str]) -> None:
        """Write the weights received last with this centre's own norms, as a checkpoint that stays here."""
        ensemble = cast(ConfigWorkflow, self.train_workflow).parser.get_parsed_content("network")
        trained_on = f"{ensemble.provenance['trained_on']}; federated, norms of this centre"
        record(ensemble, trained_on=trained_on, **{FEDERATED: {"norms": self.norms}})
        save_weights(ensemble, path)

    def _received(self, data: ExchangeObject) -> ExchangeObject:
        """The weights received, as tensors, without those that are the centre's own."""
        network, weights = self.network.state_dict(), cast(Mapping[str, Any], data.weights)
        strange = sorted(set(weights) - set(network))
        if strange:
            raise FederatedError(f"the weights received are of another network, with {strange[0]}: are configs equal?")
        tensors = {name: torch.as_tensor(value) for name, value in weights.items() if name not in self.kept}
        return ExchangeObject(weights=tensors)


def keep_log_here(path: Path) -> None:
    """Write what the bundle logs, which names patients, to a file of this centre, and to nothing else.

    NVIDIA FLARE copies a client's log to the server unless the site forbids it (``allow_log_streaming``).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("scripts", "monai", "ignite", "py.warnings"):
        own = logging.getLogger(name)
        own.handlers, own.propagate = [handler], False
        own.setLevel(logging.INFO)
    for name in list(logging.root.manager.loggerDict):  # loggers below these with handlers of their own
        if name.startswith(("scripts.", "monai.", "ignite.")):
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True
    logging.captureWarnings(True)


# --- the server -----------------------------------------------------------------------------------------------------
def read_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The weights in a checkpoint of one fold that are averaged, by name in the network."""
    ensemble = _read(path)
    state = ensemble.folds[0].state_dict()
    return {name: value.numpy().copy() for name, value in state.items() if value.is_floating_point()}


def write_global_model(
    path: str | os.PathLike[str],
    start: str | os.PathLike[str],
    weights: Mapping[str, np.ndarray],
    centres: Mapping[str, Mapping[str, float]],
    facts: Mapping[str, Any],
) -> None:
    """Write the weights of the server as a checkpoint of the bundle.

    Args:
        path: the file.
        start: the checkpoint that the training started from; the new one has its settings.
        weights: by name in the network.
        centres: name -> numbers of its last update.
        facts: of the training, for the provenance: rounds, local epochs, norms ...
    """
    ensemble = _read(start)
    state = ensemble.folds[0].state_dict()
    state.update({name: torch.as_tensor(np.asarray(value)).to(state[name]) for name, value in weights.items()})
    ensemble.folds[0].load_state_dict(state)
    cases = {name: int(numbers[CASES]) for name, numbers in sorted(centres.items())}
    phantoms = any(numbers[PHANTOMS] for numbers in centres.values())
    what = "digital phantoms" if phantoms else "cases"
    purpose = "not for clinical use" if phantoms else "research use only, not for clinical use"
    count = f"{len(cases)} centres" if len(cases) != 1 else "1 centre"
    how = f"federated over {count} ({', '.join(cases)}), {facts['rounds']} rounds"
    trained_on = f"{sum(cases.values())} {what}, {how}; {purpose}"
    record(ensemble, trained_on=trained_on, keep_epoch="last", **{FEDERATED: {**facts, CASES: cases}})
    save_weights(ensemble, path)


def _read(path: str | os.PathLike[str]) -> FoldEnsemble:
    spec = saved_spec(path)
    return load_weights(FoldEnsemble(spec.network(), spec), path)
