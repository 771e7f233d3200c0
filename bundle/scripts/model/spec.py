"""The specification of a model, and the checks of everything that a checkpoint contains.

A checkpoint may come from anybody. Loading it (``weights_only``) runs no code, but its content is arbitrary: a setting
could be text that a config parser evaluates, a box of 10 TB, a weight that is not a number. :class:`ModelSpec` accepts
only names from fixed lists and numbers within limits; :func:`check_state` and :func:`check_provenance` check the
weights and the provenance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from numbers import Real
from typing import Any

import torch

from scripts.cohorts.clinical import FEATURES, clinical_scales
from scripts.cohorts.thresholds import HALF
from scripts.imaging.lesions import APART, MERGED
from scripts.imaging.quality import VOXEL_SIZES, merge_limits
from scripts.keys import TASK_SURV
from scripts.model.choices import (
    SHOWN,
    SURVIVAL_INPUTS,
    checked_hpv_inputs,
    checked_inputs,
    checked_names,
    checked_tasks,
    in_order,
    shown,
)
from scripts.model.errors import SpecError
from scripts.model.networks import MultitaskNet
from scripts.model.unet import ROI_FACTOR

MOST_VOXELS = 256**3  # of a box: 128 MB of float32 for CT and PET, some 20 GB of activations
SPACING_MM = (0.1, 50.0)
MOST_BN_EPS = 0.1
LARGEST_VALUE = 1e6  # of a window's ends, in HU or SUV
MOST_VALUES, DEEPEST, LONGEST_TEXT = 1_000_000, 12, 10_000  # of a provenance


@dataclass(frozen=True)
class ModelSpec:
    """The settings that belong to the weights of a model; an instance is always valid.

    Lists may be given as text, ``"seg,surv"``, and are put in their fixed order.

    Attributes:
        tasks: of "seg", "hpv", "surv".
        clinical_features: names of the clinical values (keys of :data:`.FEATURES`), in the network's order.
        roi_size: voxels of the network's box along x, y and z, multiples of 16; one number for a cube.
        spacing_mm: edge of a voxel in mm, or three of them.
        ct_window: lowest and highest HU; others are clipped.
        pet_window: lowest and highest SUV; None for the minimum and maximum in each box.
        bn_eps: epsilon of every batch norm.
        survival_inputs: of the log hazard, "deep" or "burden"; the default is for weights older than this setting.
        hpv_inputs: of the HPV logit, "image" alone or with "clinical"; the default is for weights older than this
            setting.
        seg_classes: classes of tumour that the mask tells apart, its values 1, 2, ...: ("GTV",), primary tumour and
            nodes as one, or ("GTVp", "GTVn"); the default is for weights older than this setting.
        lesion_peak: tumour probability that some voxel of a lesion must exceed (:func:`.without_faint_lesions`), from
            0.5, which keeps all; the default is for weights older than this setting.

    Raises:
        SpecError: for a value of another type, outside its range, or that contradicts another one.

    Example:
        >>> spec = ModelSpec("surv,seg", ["age"], 64, 4.0, [-1000, 1000], None, 1e-5)
        >>> spec.tasks, spec.roi_size
        (('seg', 'surv'), (64, 64, 64))
        >>> ModelSpec(["seg"], [], 64, "$open('x')", [-1000, 1000], None, 1e-5)
        Traceback (most recent call last):
        scripts.model.errors.SpecError: spacing_mm is a number of mm, or three, from 0.1 to 50; got "$open('x')"
    """

    tasks: tuple[str, ...]
    clinical_features: tuple[str, ...]
    roi_size: tuple[int, int, int]
    spacing_mm: float | tuple[float, float, float]
    ct_window: tuple[float, float]
    pet_window: tuple[float, float] | None
    bn_eps: float
    survival_inputs: tuple[str, ...] = ("deep",)
    hpv_inputs: tuple[str, ...] = ("image",)
    seg_classes: tuple[str, ...] = MERGED
    lesion_peak: float = HALF

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "tasks": checked_tasks(self.tasks),
            "clinical_features": checked_names("clinical_features", self.clinical_features, tuple(FEATURES)),
            "roi_size": _roi_size(self.roi_size),
            "spacing_mm": _spacing(self.spacing_mm),
            "ct_window": _window("ct_window", self.ct_window),
            "pet_window": None if self.pet_window is None else _window("pet_window", self.pet_window),
            "survival_inputs": in_order("survival_inputs", self.survival_inputs, SURVIVAL_INPUTS),
            "hpv_inputs": checked_hpv_inputs(self.hpv_inputs),
            "seg_classes": in_order("seg_classes", self.seg_classes, (*MERGED, *APART)),
        }
        if not _is_number(self.bn_eps) or not 0 < self.bn_eps <= MOST_BN_EPS:
            raise SpecError(f"bn_eps is a number above 0, at most {MOST_BN_EPS:g}; got {shown(self.bn_eps)}")
        if not _is_number(self.lesion_peak) or not HALF <= self.lesion_peak < 1:
            raise SpecError(f"lesion_peak is a probability from {HALF:g} on, below 1; got {shown(self.lesion_peak)}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if TASK_SURV in self.tasks:
            checked_inputs(self.survival_inputs, self.tasks)
        if self.seg_classes not in (MERGED, APART):
            raise SpecError(f"seg_classes is {list(MERGED)} or {list(APART)}; got {shown(list(self.seg_classes))}")
        if "clinical" in self.hpv_inputs and "hpv" in self.clinical_features:
            raise SpecError(
                "the HPV status would be predicted from itself: 'hpv' is among clinical_features and 'clinical' among "
                "hpv_inputs; leave out one of them (--hpv_inputs image)"
            )

    @classmethod
    def read(cls, stored: Any, where: str = "the weights") -> ModelSpec:
        """The specification stored with weights, as :meth:`to_dict` gives it; ``where``: the file, for messages.

        Raises:
            SpecError: for anything else.
        """
        if not isinstance(stored, Mapping):
            raise SpecError(f"{where}: the settings are {shown(stored)}; a dictionary is expected")
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(str(name) for name in stored if name not in known)
        missing = [name for name, field in known.items() if field.default is MISSING and name not in stored]
        if unknown or missing:
            wrong = [f"settings without {', '.join(missing)}"] if missing else []
            wrong += [f"unknown settings {shown(unknown)}"] if unknown else []
            raise SpecError(f"{where}: {' and '.join(wrong)}: was it written by another version?")
        try:
            return cls(**stored)
        except ValueError as error:
            raise SpecError(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Lists, numbers and strings, as ``torch.load(weights_only=True)`` and JSON take them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def network(self, **training: Any) -> MultitaskNet:
        """The untrained network of one fold; ``training``: arguments for training, as ``mask_gradient``."""
        return MultitaskNet(
            clinical_features=len(self.clinical_features),
            tasks=self.tasks,
            seg_classes=len(self.seg_classes),
            survival_inputs=self.survival_inputs,
            hpv_inputs=self.hpv_inputs,
            clinical_scales=clinical_scales(self.clinical_features),
            bn_eps=self.bn_eps,
            **training,
        )


def _roi_size(given: Any) -> tuple[int, ...]:
    size = (given,) * 3 if _is_number(given) else given
    right = isinstance(size, list | tuple) and len(size) == 3 and all(_is_number(n) and n == int(n) for n in size)
    if not right or any(n < ROI_FACTOR or n % ROI_FACTOR for n in size) or math.prod(size) > MOST_VOXELS:
        raise SpecError(
            f"roi_size is one number of voxels, or three, multiples of {ROI_FACTOR}, at most {MOST_VOXELS} in all "
            f"(256 x 256 x 256); got {shown(given)}"
        )
    return tuple(int(n) for n in size)


def _spacing(given: Any) -> float | tuple[float, ...]:
    edges = (given,) if _is_number(given) else given
    low, high = SPACING_MM
    right = isinstance(edges, list | tuple) and len(edges) in ((1, 3) if _is_number(given) else (3,))
    if not right or not all(_is_number(edge) and low <= edge <= high for edge in edges):
        raise SpecError(f"spacing_mm is a number of mm, or three, from {low:g} to {high:g}; got {shown(given)}")
    return given if _is_number(given) else tuple(given)


def _window(name: str, given: Any) -> tuple[float, float]:
    right = isinstance(given, list | tuple) and len(given) == 2 and all(map(_is_number, given))
    if not right or not -LARGEST_VALUE <= given[0] < given[1] <= LARGEST_VALUE:
        raise SpecError(f"{name} is the lowest and the highest value, such as [-1000, 1000]; got {shown(given)}")
    return given[0], given[1]


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, which True is not."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


# --- weights ------------------------------------------------------------------------------------------------------
def check_state(state: Mapping[Any, Any], spec: ModelSpec, folds: int, extra: str, where: str) -> None:
    """Check that a state dict holds the weights of so many networks of a specification, and nothing else.

    Shapes are checked before values: a forged tensor may claim more values than there is memory.

    Args:
        state: ``folds.<k>.<name in the network>`` to tensor.
        spec: of the networks.
        folds: number of networks.
        extra: key that does not name a weight.
        where: the file, for messages.

    Raises:
        SpecError: for a missing or unknown name, another shape or type, or a value that is not finite.
    """
    weights = {key: value for key, value in state.items() if key != extra}
    expected = {f"folds.{k}.{name}": like for k in range(folds) for name, like in _weights_of(spec).items()}
    missing, strange = sorted(set(expected) - set(weights)), [key for key in weights if key not in expected]
    if missing or strange:
        wrong = [f"{len(missing)} weights are missing, such as {missing[0]}"] if missing else []
        wrong += [f"{len(strange)} are not the network's, such as {shown(strange[0])}"] if strange else []
        raise SpecError(f"{where}: {' and '.join(wrong)}: the weights are not those of the network in its settings")
    for name, (shape, floating) in expected.items():
        value = weights[name]
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise SpecError(f"{where}: {name} has the shape {found}; {tuple(shape)} is expected")
        if value.is_floating_point() != floating or value.is_complex() or value.layout != torch.strided:
            raise SpecError(f"{where}: {name} is of type {value.dtype}")
        if floating and not bool(torch.isfinite(value).all()):
            raise SpecError(f"{where}: {name} holds values that are not finite numbers; the file is damaged")


@lru_cache(maxsize=8)
def _weights_of(spec: ModelSpec) -> Mapping[str, tuple[torch.Size, bool]]:
    """Shape of each weight of one network, and whether it is a floating-point one; nothing is computed."""
    with torch.device("meta"):
        network = spec.network()
    return {name: (value.shape, value.is_floating_point()) for name, value in network.state_dict().items()}


# --- provenance ---------------------------------------------------------------------------------------------------
def check_provenance(stored: Any, folds: int, where: str) -> None:
    """Check that the provenance in a checkpoint is plain data that the outputs can contain and print.

    Args:
        stored: the provenance, see :mod:`scripts.model.ensemble`.
        folds: number of networks beside it.
        where: the file, for messages.

    Raises:
        SpecError: for anything else; it names the entry.
    """
    if not isinstance(stored, Mapping):
        raise SpecError(f"{where}: the provenance is {shown(stored)}; a dictionary is expected")
    try:
        _check_plain(stored, "provenance", 0, [MOST_VALUES])
        trained_on = stored.get("trained_on", "")
        if not isinstance(trained_on, str) or not trained_on.isprintable():
            raise SpecError(f"trained_on is {shown(trained_on)}; one line of text is expected")
        _check_limits(stored.get("voxel_limits", {}))
        _check_threshold(stored.get("hpv_threshold"))
        _check_calibration(stored.get("calibration"), folds)
        _check_statistics(stored.get("feature_statistics"), folds)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error


def _check_plain(value: Any, name: str, depth: int, left: list[int]) -> None:
    """Dictionaries, lists, printable text, finite numbers, bools and None, and not too many of them."""
    left[0] -= 1
    if left[0] < 0 or depth > DEEPEST:
        raise SpecError(f"more than {MOST_VALUES} values, or {DEEPEST} levels, in {name[:SHOWN]}")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise SpecError(f"{name[:SHOWN]} has the key {shown(key)}, which is not text")
            _check_plain(key, f"a key of {name}", depth + 1, left)
            _check_plain(item, f"{name}.{key}", depth + 1, left)
    elif isinstance(value, list):
        for k, item in enumerate(value):
            _check_plain(item, f"{name}[{k}]", depth + 1, left)
    elif isinstance(value, str):
        if len(value) > LONGEST_TEXT or not value.translate(LINE_ENDS).isprintable():
            raise SpecError(f"{name[:SHOWN]} is {shown(value)}; printable text of at most {LONGEST_TEXT} characters")
    elif not (value is None or isinstance(value, bool) or _is_number(value)):
        raise SpecError(f"{name[:SHOWN]} is {shown(value)}; text, finite numbers, lists and dictionaries are read")


LINE_ENDS = {ord("\n"): " ", ord("\t"): " "}


def _check_limits(stored: Any) -> None:
    if not isinstance(stored, Mapping) or not all(
        name in VOXEL_SIZES and isinstance(kinds, Mapping) and all(map(_is_number, kinds.values()))
        for name, kinds in stored.items()
    ):
        raise SpecError(f"voxel_limits are numbers for {', '.join(VOXEL_SIZES)}; got {shown(stored)}")
    try:
        merge_limits(stored)
    except ValueError as error:
        raise SpecError(f"voxel_limits: {error}") from error


def _check_threshold(stored: Any) -> None:
    if stored is None:
        return
    right = isinstance(stored, Mapping) and isinstance(stored.get("reason", ""), str)
    value = stored.get("value") if right else None
    if not right or not ("reason" in stored if value is None else _is_number(value) and 0 <= value <= 1):
        raise SpecError(f"hpv_threshold is a value from 0 to 1, or a reason why there is none; got {shown(stored)}")


def _check_calibration(stored: Any, folds: int) -> None:
    """Types and lengths; :meth:`.from_dict` checks how the entries fit together."""
    if stored is None:
        return
    if not stored or not isinstance(stored, Mapping) or not isinstance(stored.get("reason", ""), str):
        raise SpecError(f"calibration is {shown(stored)}; numbers, or a reason why there is none")
    if "reason" in stored:
        return
    for name, value in stored.items():
        groups = list(value.values()) if isinstance(value, Mapping) else [value]
        if not all(_is_number(group) or _is_vector(group) for group in groups):
            raise SpecError(f"calibration.{name} is {shown(value)}; numbers are expected")
    scales = stored.get("fold_scales", [1.0] * folds)
    if not _is_vector(scales) or len(scales) != folds or min(scales) <= 0:
        raise SpecError(f"calibration.fold_scales is {shown(scales)}; {folds} positive numbers are expected")


def _check_statistics(stored: Any, folds: int) -> None:
    """Statistics of the deep features, one for each fold (:func:`.fit_feature_statistics`), or none of any."""
    if stored is None:
        return
    if not isinstance(stored, list) or len(stored) not in (0, folds):
        raise SpecError(f"feature_statistics are {shown(stored)}; one for each of {folds} folds is expected")
    for k, entry in enumerate(stored):
        if isinstance(entry, Mapping) and isinstance(entry.get("reason"), str):
            continue
        if not isinstance(entry, Mapping) or not _are_statistics(entry):
            raise SpecError(
                f"feature_statistics[{k}] is {shown(entry)}; mean, scale, axes, variances, noise, reference"
            )


def _are_statistics(entry: Mapping[str, Any]) -> bool:
    mean, scale, axes, variances = (entry.get(name) for name in ("mean", "scale", "axes", "variances"))
    return (
        all(_is_vector(values) for values in (mean, scale, variances))
        and isinstance(axes, list)
        and all(_is_vector(axis) and len(axis) == len(mean) for axis in axes)  # type: ignore[arg-type]
        and len(scale) == len(mean)  # type: ignore[arg-type]
        and len(variances) == len(axes)  # type: ignore[arg-type]
        and min([*scale, *variances]) > 0  # type: ignore[misc]
        and all(_is_number(entry.get(name)) and entry[name] > 0 for name in ("noise", "reference"))
    )


def _is_vector(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_number, value))
