"""The networks of several folds as one network, with its settings.

A checkpoint contains the weights of one or more folds, the settings they were trained with (spacing, box, clinical
features ...) and their provenance. Loading weights into another configuration is an error that names the difference.
"""

from __future__ import annotations

import copy
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scripts.cohorts.files import damaged_part, written_whole
from scripts.keys import (
    CLASS_LOGITS,
    CLASS_PROB,
    FEATURES,
    HPV_LOGIT,
    HPV_PROB,
    HPV_PROB_FOLDS,
    HPV_PROB_STD,
    LOG_HAZARD,
    LOG_HAZARD_FOLDS,
    LOG_HAZARD_STD,
    SEG_LOGITS,
    SEG_PROB,
)
from scripts.model.errors import CheckpointError, SettingsMismatch, SpecError
from scripts.model.networks import MultitaskNet, class_probabilities, fold_norms
from scripts.model.spec import ModelSpec, check_provenance, check_state

logger = logging.getLogger(__name__)

SETTINGS, PROVENANCE = "settings", "provenance"
NOT_RECORDED = "not recorded"
TRAINED_ON = "trained_on"  # in the provenance: what the training cases are, in words for every reader of an output
KEEP_EPOCH = "keep_epoch"  # in the provenance: which epoch's weights these are, as the training config says it
MOST_FOLDS = 100
LFS_POINTER = b"version https://git-lfs"
EXTRA_STATE = "_extra_state"  # torch's name for it
NESTED_KEYS = ("model", "network")  # where a checkpoint of several objects keeps the network
RUNNING_STATISTICS = ("running_mean", "running_var")


class FoldEnsemble(nn.Module):
    """One or more folds of :class:`scripts.model.networks.MultitaskNet`, whose predictions are averaged.

    The state dict has the keys ``folds.<k>.<name in the network>`` and torch's extra state
    ``{"settings": ..., "provenance": ...}``, plain Python that ``torch.load(weights_only=True)`` reads. Loading one
    with K folds, strictly or not, first makes K members. Weights in half precision load into float32.

    Args:
        network: the first fold; further folds are copies of it, into which weights are loaded.
        settings: of the weights: a :class:`.ModelSpec`, or nested plain Python.

    Attributes:
        folds: the members.
        settings: as nested plain Python, tuples as lists.
        provenance: origin of the weights (metrics, versions, ...); free to set, stored with them.

    Raises:
        TypeError: for settings that are not plain Python.

    Example:
        One fold predicts what its network predicts:

        >>> network = MultitaskNet().eval()
        >>> ensemble = FoldEnsemble(network, {"spacing_mm": 2.0}).eval()
        >>> image = torch.rand(1, 2, 32, 32, 32)
        >>> with torch.no_grad():
        ...     torch.equal(ensemble.predict(image)["log_hazard"], network(image)["log_hazard"])
        True
    """

    def __init__(self, network: MultitaskNet, settings: ModelSpec | Mapping[str, Any]) -> None:
        super().__init__()
        self.folds = nn.ModuleList([network])
        plain = settings.to_dict() if isinstance(settings, ModelSpec) else settings
        self.settings = plain_copy(plain, SETTINGS)
        self.provenance = dict[str, Any]()  # not annotated: TorchScript would read the annotation

    def forward(self, image: Tensor, clinical: Tensor | None = None) -> Tensor:
        """The mean tumour probability, (B, 1, R, R, R) float32, for runtimes that take a single tensor.

        Args:
            image: (B, 2, R, R, R), channel 0 CT, channel 1 PET.
            clinical: not used by the segmentation; accepted so that both methods have the same arguments.

        Raises:
            RuntimeError: for networks without the segmentation task.
        """
        total = torch.zeros(1, device=image.device)
        for fold in self.folds:
            total = total + fold.tumour_probability(image)  # type: ignore[operator]
        return total / len(self.folds)

    @torch.jit.unused
    def predict(self, image: Tensor, clinical: Tensor | None = None) -> dict[str, Tensor]:
        """All outputs of the folds, averaged; arguments as for :meth:`scripts.model.networks.MultitaskNet.forward`.

        Returns:
            float32: ``seg_prob`` (B, 1, R, R, R), ``hpv_prob`` (B,), ``log_hazard`` (B,), means over the folds; with
            several classes of tumour ``class_prob`` (B, C, R, R, R), also the mean, with ``seg_prob`` as its sum;
            ``hpv_prob_std``, ``log_hazard_std`` (B,), their standard deviations (not bias-corrected), of several folds;
            ``hpv_prob_folds``, ``log_hazard_folds`` (B, K), of each fold; ``features`` (B, K, F), its deep features.
            Those of absent tasks are absent, and the deviations where there is one fold.
        """
        totals: dict[str, Tensor] = {}
        scores: dict[str, list[Tensor]] = {HPV_PROB: [], LOG_HAZARD: [], FEATURES: []}
        for fold in self.folds:
            outputs = {name: value.float() for name, value in fold(image, clinical).items()}
            maps = {}
            if SEG_LOGITS in outputs:
                maps[SEG_PROB] = torch.sigmoid(outputs[SEG_LOGITS])
            if CLASS_LOGITS in outputs:
                maps[CLASS_PROB] = class_probabilities(outputs[SEG_LOGITS], outputs[CLASS_LOGITS])
            totals = {name: totals[name] + value if name in totals else value for name, value in maps.items()}
            if HPV_LOGIT in outputs:
                scores[HPV_PROB].append(torch.sigmoid(outputs[HPV_LOGIT]))
            for name in (LOG_HAZARD, FEATURES):
                if name in outputs:
                    scores[name].append(outputs[name])
        result = {name: total / len(self.folds) for name, total in totals.items()}
        for name, spread, each in (
            (HPV_PROB, HPV_PROB_STD, HPV_PROB_FOLDS),
            (LOG_HAZARD, LOG_HAZARD_STD, LOG_HAZARD_FOLDS),
        ):
            if scores[name]:
                stacked = torch.stack(scores[name], dim=1)
                result[name], result[each] = stacked.mean(dim=1), stacked
                if len(self.folds) > 1:  # one says nothing of how much they differ
                    result[spread] = stacked.std(dim=1, correction=0)
        if scores[FEATURES]:
            result[FEATURES] = torch.stack(scores[FEATURES], dim=1)
        return result

    def get_extra_state(self) -> dict[str, Any]:
        """Settings and provenance, as torch stores them beside the weights.

        Raises:
            TypeError: for a provenance that is not plain Python.
        """
        return {SETTINGS: copy.deepcopy(self.settings), PROVENANCE: plain_copy(self.provenance, PROVENANCE)}

    def set_extra_state(self, state: Any) -> None:
        """Take over the provenance if the settings agree.

        Raises:
            CheckpointError: the state is not that of a :class:`FoldEnsemble`, or the provenance is not plain data.
            SettingsMismatch: the settings differ; it names each difference.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get(SETTINGS), Mapping):
            raise CheckpointError("the weights carry no settings: they were not written by FoldEnsemble")
        differences = settings_differences(complete(state[SETTINGS]), complete(self.settings))
        if differences:
            raise SettingsMismatch("the weights do not belong to this configuration: " + "; ".join(differences))
        stored = state.get(PROVENANCE, {})
        try:
            check_provenance(stored, len(self.folds), "the weights")
        except SpecError as error:
            raise CheckpointError(str(error)) from error
        self.provenance = copy.deepcopy(dict(stored))

    def fold_norms(self) -> None:
        """Fold the batch norms of every fold (:func:`scripts.model.networks.fold_norms`), for inference only."""
        for fold in self.folds:
            fold_norms(fold)

    def resize(self, folds: int) -> None:
        """Set the number of folds: copies of the first are added, or the last ones removed.

        Raises:
            ValueError: for less than one.
        """
        if folds < 1:
            raise ValueError(f"an ensemble has at least one fold, not {folds}")
        members = list(self.folds)[:folds]
        members += [copy.deepcopy(members[0]) for _ in range(folds - len(members))]
        self.folds = nn.ModuleList(members)

    def _load_from_state_dict(  # torch calls this before it goes on to the members
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if prefix + EXTRA_STATE not in state_dict:
            raise CheckpointError("the weights carry no settings: they were not written by FoldEnsemble")
        own = len(self.folds)
        self.resize(count_folds(state_dict, prefix))
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        except ValueError:  # refused: it stays as it was
            self.resize(own)
            raise


def count_folds(state_dict: Mapping[str, Any], prefix: str = "") -> int:
    """The folds in a state dict.

    Raises:
        CheckpointError: there are none, one is missing, or there are more than :data:`MOST_FOLDS`.

    Example:
        >>> count_folds({"folds.0.weight": 1, "folds.0.bias": 1, "folds.1.weight": 1})
        2
    """
    pattern = re.compile(re.escape(prefix) + r"folds\.([0-9]{1,4})\.")
    found = {int(match[1]) for key in state_dict if (match := pattern.match(str(key)))}
    if not found or found != set(range(len(found))):
        raise CheckpointError(f"the weights hold the folds {sorted(found)[:10]}; 0, 1, ... without a gap are expected")
    if len(found) > MOST_FOLDS:
        raise CheckpointError(f"the weights hold {len(found)} folds; at most {MOST_FOLDS} are read")
    return len(found)


def complete(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of stored settings with the defaults of those that are newer than the weights.

    Example:
        >>> complete({"survival_inputs": ["burden"]})
        {'survival_inputs': ['burden'], 'hpv_inputs': ['image'], 'seg_classes': ['GTV'], 'lesion_peak': 0.5}
    """
    earlier = {item.name: item.default for item in fields(ModelSpec) if item.default is not MISSING}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in earlier.items()}
    return copy.deepcopy({**plain, **settings})


def settings_differences(
    one: Any, other: Any, sides: tuple[str, str] = ("weights", "config"), name: str = ""
) -> list[str]:
    """What differs between two nested settings, called ``sides``, a line each.

    Example:
        >>> settings_differences({"spacing_mm": 2.0, "box": {"roi_size": 96}}, {"spacing_mm": 3.0, "box": {}})
        ['box.roi_size: weights 96, config (absent)', 'spacing_mm: weights 2.0, config 3.0']
    """
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return [] if one == other else [f"{name}: {sides[0]} {one}, {sides[1]} {other}"]
    differences: list[str] = []
    for key in sorted({*one, *other}):
        pair = (one.get(key, "(absent)"), other.get(key, "(absent)"))
        differences += settings_differences(*pair, sides, name=f"{name}.{key}" if name else str(key))
    return differences


def plain_copy(value: Any, name: str) -> Any:
    """A copy of nested settings as dicts, lists, strings, numbers, bools and None.

    Raises:
        TypeError: for anything else, with its name.

    Example:
        >>> plain_copy({"roi_size": (128, 128, 128)}, "settings")
        {'roi_size': [128, 128, 128]}
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_copy(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain_copy(item, f"{name}[{k}]") for k, item in enumerate(value)]
    raise TypeError(f"{name} is a {type(value).__name__}; numbers, strings, bools, None, lists and dicts are stored")


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The network's state dict in a checkpoint file, bare or under "model" or "network".

    It is kept in memory, to be read only, until :func:`load_weights` has loaded it or the file changes.

    Raises:
        FileNotFoundError: there is no such file; the message says how to get one.
        CheckpointError: the file is not such a checkpoint.
    """
    return dict(_read_file(*_version(path)))


def read_facts(path: str | os.PathLike[str]) -> tuple[Mapping[str, Any], int]:
    """Settings and provenance in a checkpoint file, and the number of its folds.

    Kept in memory, to be read only; errors as :func:`read_state`.
    """
    return _read_facts(*_version(path))


def _version(path: str | os.PathLike[str]) -> tuple[str, tuple[int, int, int]]:
    """A file's path, and values that change with its content."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"no weights at {path}: train some with `python -m monai.bundle run training --config_file "
            "configs/train.json`, or name the folder that holds model.pt with --ckpt_dir"
        )
    status = file.stat()
    return str(file.absolute()), (status.st_ino, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1)
def _read_file(path: str, version: tuple[int, int, int]) -> Mapping[str, Any]:
    state = load_checkpoint(path)
    for key in NESTED_KEYS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    extra = state.get(EXTRA_STATE) if isinstance(state, Mapping) else None
    if not isinstance(extra, Mapping) or SETTINGS not in extra:
        raise CheckpointError(f"{path} is not a checkpoint of this bundle: it carries no settings")
    try:
        folds = count_folds(state)
        check_state(state, ModelSpec.read(extra[SETTINGS], path), folds, EXTRA_STATE, path)
        check_provenance(extra.get(PROVENANCE, {}), folds, path)
    except SpecError as error:
        raise CheckpointError(str(error)) from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return state


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """The content of a file of ``torch.save``: tensors and plain Python, never other objects.

    Raises:
        CheckpointError: for any other file; the message says what to do.
    """
    with Path(path).open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull`")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} cannot be read as a checkpoint: it is cut off, or torch.save did not write it")
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist())
        damaged = "" if packed else damaged_part(path)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}; copy or download it again") from error
    if packed:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: it is compressed, which torch.save never does")
    if damaged:
        raise CheckpointError(f"{path} is damaged: {damaged} in it has another checksum; copy or download it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not loaded: it holds other Python objects than weights, which could run code. Ask whoever "
            "made it for a file of weights and plain settings"
        ) from error
    except Exception as error:  # torch raises many kinds for a broken file
        why = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {why})") from error


@lru_cache(maxsize=8)
def _read_facts(path: str, version: tuple[int, int, int]) -> tuple[Mapping[str, Any], int]:
    state = _read_file(path, version)
    return state[EXTRA_STATE], count_folds(state)


def saved_spec(path: str | os.PathLike[str], **given: Any) -> ModelSpec:
    """The specification of the model in a checkpoint file.

    Args:
        path: the file.
        **given: settings that were given beside the file (``--spec#seg_classes``), which must be those of the model.

    Raises:
        FileNotFoundError: there is no such file; the message says how to get one.
        CheckpointError: the file is not such a checkpoint.
        SettingsMismatch: a setting that was given differs from that of the checkpoint.
    """
    saved = ModelSpec.read(read_facts(path)[0][SETTINGS], str(path))
    if differences := settings_differences(saved.to_dict(), replace(saved, **given).to_dict()):
        raise SettingsMismatch(
            f"{path}: the weights do not belong to this configuration, whose settings come from the weights: "
            + "; ".join(differences)
        )
    return saved


def saved_provenance(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The provenance stored in a checkpoint file; errors as :func:`saved_spec`."""
    return dict(read_facts(path)[0].get(PROVENANCE, {}))


def saved_limits(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The limits of quality control that a checkpoint file brings, from the voxels it was trained on."""
    return dict(saved_provenance(path).get("voxel_limits", {}))


def load_weights(ensemble: FoldEnsemble, path: str | os.PathLike[str]) -> FoldEnsemble:
    """Load a checkpoint file, strictly, log a description of it, and return the ensemble.

    Raises:
        FileNotFoundError: there is no such file; the message says how to get one.
        CheckpointError: the file is not such a checkpoint.
        SettingsMismatch: its settings differ from the ensemble's.
    """
    try:
        ensemble.load_state_dict(read_state(path))
    except SettingsMismatch as error:
        raise SettingsMismatch(f"{path}: {error}") from error
    _read_file.cache_clear()  # the weights are in memory once, not twice
    logger.info("%s", describe_model(ensemble))
    return ensemble


def describe_model(ensemble: FoldEnsemble) -> str:
    """Number of folds and training data, in one line for a log.

    Example:
        >>> ensemble = FoldEnsemble(MultitaskNet(), {})
        >>> describe_model(ensemble)
        'model: 1 fold, trained on: not recorded'
        >>> ensemble.provenance = {"trained_on": "300 digital phantoms, not for clinical use"}
        >>> describe_model(ensemble)
        'model: 1 fold, trained on 300 digital phantoms, not for clinical use'
    """
    count = len(ensemble.folds)
    trained_on = ensemble.provenance.get(TRAINED_ON)
    folds = "1 fold" if count == 1 else f"{count} folds"
    return f"model: {folds}, trained on {trained_on}" if trained_on else f"model: {folds}, trained on: not recorded"


def name_of_release(name: str, provenance: Mapping[str, Any]) -> str:
    """The name of a released file of weights; it says whether they are of phantoms.

    Example:
        >>> name_of_release("model", {"trained_on": "300 digital phantoms, not for clinical use"})
        'model_of_phantoms'
        >>> name_of_release("model", {"trained_on": "672 cases"})
        'model'
    """
    return f"{name}_of_phantoms" if "phantom" in str(provenance.get(TRAINED_ON)).lower() else name


def record(ensemble: FoldEnsemble, **facts: Any) -> None:
    """Add ``facts`` (plain Python) to the provenance that is stored with the weights.

    Raises:
        TypeError: for a fact that is not plain Python.
    """
    ensemble.provenance.update(plain_copy(facts, PROVENANCE))


def join_folds(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One state dict from several, each of one fold, as :func:`read_state` gives them.

    The result has their settings and an empty provenance.

    Args:
        states: name of each fold for messages -> its state dict, in the order of the folds.

    Raises:
        CheckpointError: there is no state dict, or one holds several folds or other weights than the first.
        SettingsMismatch: the settings differ; it names each difference.
    """
    joint: dict[str, Any] = {}
    first = next(iter(states), "")
    for number, (name, state) in enumerate(states.items()):
        if count_folds(state) != 1:
            raise CheckpointError(f"{name} is an ensemble of {count_folds(state)} folds already")
        one, other = (complete(states[side][EXTRA_STATE][SETTINGS]) for side in (first, name))
        differences = settings_differences(one, other, (first, name))
        if differences:
            raise SettingsMismatch(f"{first} and {name} do not belong together: " + "; ".join(differences))
        if _shapes(state) != _shapes(states[first]):
            raise CheckpointError(f"the networks of {first} and {name} differ in their weights")
        joint |= {f"folds.{number}.{key.removeprefix('folds.0.')}": state[key] for key in _shapes(state)}
    if not joint:
        raise CheckpointError("no folds to join")
    return {**joint, EXTRA_STATE: {SETTINGS: copy.deepcopy(states[first][EXTRA_STATE][SETTINGS]), PROVENANCE: {}}}


def _shapes(state: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Shape of each weight by its name."""
    return {key: value.shape for key, value in state.items() if key != EXTRA_STATE}


def save_weights(ensemble: FoldEnsemble, path: str | os.PathLike[str], half: bool = False) -> None:
    """Write the ensemble's state dict, completely or not at all.

    Args:
        ensemble: to write.
        path: the file; its folder is created if missing.
        half: store weights in float16 (half the size), except the running statistics of the batch norms, whose range
            may exceed float16's.
    """
    state = ensemble.state_dict()
    if half:
        state = {name: to_half(name, value) for name, value in state.items()}
    with written_whole(path) as partial:
        torch.save(state, partial)


def to_half(name: str, value: Any) -> Any:
    """A float tensor of a state dict in float16, unless it is a running statistic."""
    if isinstance(value, Tensor) and value.is_floating_point() and not name.endswith(RUNNING_STATISTICS):
        return value.half()
    return value
