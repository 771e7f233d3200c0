"""Explanation of the risk: contributions of clinical values and image voxels to the log hazard.

Integrated gradients (captum) of the log hazard, averaged over the folds, from an empty scan without clinical values to
the patient's data. The contributions add up to the difference of the two log hazards; the error of the sum is reported.
They describe the computation of one model, not causes.

Reference:
    Sundararajan M., Taly A., Yan Q. Axiomatic attribution for deep networks. ICML 2017.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from scripts import keys
from scripts.cohorts.files import write_text
from scripts.cohorts.thresholds import HALF, above
from scripts.imaging.geometry import Grid
from scripts.imaging.lesions import without_faint_lesions
from scripts.model.ensemble import NOT_RECORDED, TRAINED_ON, FoldEnsemble
from scripts.model.networks import MultitaskNet

logger = logging.getLogger(__name__)

EXPLANATION_FILE = "explanation.json"
# Points of the Gauss-Legendre rule. On one CPU core a point takes, per fold, 0.1 s for a box of 32 voxels and 9 s for
# one of 128, for which fewer points are used without a GPU: 6 minutes for five folds.
STEPS, STEPS_SLOW = 24, 8
VOXELS_AT_ONCE = 64**3  # batch size in voxels; a point with more is computed alone
SMOOTH_MM = 5.0  # standard deviation; single voxels of a gradient are noise
ACCEPTED_ERROR = 0.1
CHANNELS = ("ct", "pet")
BASELINE = "an empty scan (air without uptake: 0 in both channels) and no clinical value (0, as missing ones are coded)"


class ExplainError(ValueError):
    """The risk of this model cannot be explained; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """Contributions to the log hazard of one patient."""

    patient_id: str  # of the patient
    log_hazard: float  # mean over the folds
    baseline_log_hazard: float  # that of BASELINE
    image: np.ndarray  # (2, X, Y, Z) contribution of each voxel of CT and PET on grid
    # name of the clinical value, its coded value and its contribution, in the network's order
    clinical: list[tuple[str, float, float]]
    tumour: np.ndarray | None  # (X, Y, Z) bool, the predicted tumour; None without the segmentation task
    grid: Grid  # of the network's box
    steps: int  # points of the integration rule
    folds: int  # number of folds
    seconds: float  # computing time
    trained_on: str = NOT_RECORDED  # description of the model's training data

    @property
    def smooth(self) -> np.ndarray:
        """(X, Y, Z) contributions of CT and PET together, smoothed for display."""
        both = self.image.sum(axis=0, dtype=np.float32)
        return ndimage.gaussian_filter(both, SMOOTH_MM / self.grid.spacing, mode="constant")

    @property
    def total(self) -> float:
        """Sum of all contributions."""
        return float(self.image.sum(dtype=np.float64)) + sum(value for _, _, value in self.clinical)

    @property
    def expected(self) -> float:
        """Ideal sum: the difference of the two log hazards."""
        return self.log_hazard - self.baseline_log_hazard

    @property
    def relative_error(self) -> float:
        """Error of the sum, relative to the sum of absolute contributions of CT, PET and each clinical value."""
        moved = [float(channel.sum(dtype=np.float64)) for channel in self.image]
        moved += [value for _, _, value in self.clinical]
        scale = max(abs(self.expected), sum(map(abs, moved)))
        return abs(self.total - self.expected) / scale if scale > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        channels = {name: float(self.image[k].sum(dtype=np.float64)) for k, name in enumerate(CHANNELS)}
        size = np.abs(self.image).sum(axis=0, dtype=np.float64)
        largest = float(size.sum()) or 1.0
        return {
            "patient_id": self.patient_id,
            "notice": f"{keys.RESEARCH_USE_ONLY} Contributions to the computation of one model: no causes.",
            "trained_on": self.trained_on,
            "target": "log hazard, mean over the folds",
            "method": (
                f"Integrated gradients from {BASELINE}, {self.steps} points, {self.folds} "
                f"fold{'' if self.folds == 1 else 's'}; the picture is smoothed by {SMOOTH_MM:g} mm."
            ),
            "baseline": BASELINE,
            "log_hazard": self.log_hazard,
            "baseline_log_hazard": self.baseline_log_hazard,
            "sum": self.total,
            "expected": self.expected,
            "error": self.total - self.expected,
            "relative_error": self.relative_error,
            "complete": self.relative_error <= ACCEPTED_ERROR,
            "clinical": {
                "sum": sum(value for _, _, value in self.clinical),
                "features": [
                    {"name": name, "coded": coded, "contribution": value} for name, coded, value in self.clinical
                ],
            },
            "image": {
                "sum": sum(channels.values()),
                "channels": channels,
                "channel_shares": {
                    name: float(np.abs(self.image[k]).sum(dtype=np.float64)) / largest
                    for k, name in enumerate(CHANNELS)
                },
                **self._inside(size / largest),
            },
            "steps": self.steps,
            "folds": self.folds,
            "seconds": self.seconds,
        }

    def write(self, folder: str | Path) -> Path:
        """Write ``explanation.json`` to a folder, atomically."""
        path = Path(folder) / EXPLANATION_FILE
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return path

    def _inside(self, share: np.ndarray) -> dict[str, Any]:
        """Sums inside and outside the tumour, and the share of absolute contributions inside."""
        names = ("inside", "outside", "inside_share", "inside_volume_share")
        if self.tumour is None or not self.tumour.any():
            why = "segmentation is not a task of this model" if self.tumour is None else "no tumour found"
            return {**dict.fromkeys(names), "inside_unavailable": why}
        both = self.image.sum(axis=0, dtype=np.float64)
        inside = float(both[self.tumour].sum())
        values = (inside, float(both.sum()) - inside, float(share[self.tumour].sum()), float(self.tumour.mean()))
        return {**dict(zip(names, values, strict=True)), "inside_unavailable": ""}


class RiskExplainer:
    """Explains the risk of a patient; once more with twice the points if the error exceeds :data:`ACCEPTED_ERROR`.

    Args:
        network: the ensemble, whose settings name the clinical values.
        steps: points of the integration rule, each a forward and backward pass through every fold; None:
            :data:`STEPS`, or :data:`STEPS_SLOW` for boxes of more than :data:`VOXELS_AT_ONCE` on a CPU.

    Raises:
        ExplainError: a model without the survival task.
    """

    def __init__(self, network: FoldEnsemble, steps: int | None = None) -> None:
        _check_task(_member(network, 0))
        self.network, self.steps = network, steps

    def __call__(self, result: Mapping[str, Any]) -> Explanation:
        """Explanation of an item after the network: ``image``, ``clinical``, ``box_affine`` and, if any, ``seg_prob``.

        The item has no batch axis.
        """
        image = torch.as_tensor(result[keys.IMAGE]).detach()[None]
        clinical = result.get(keys.CLINICAL)
        clinical = None if clinical is None else torch.as_tensor(clinical).detach()[None]
        probability = result.get(keys.SEG_PROB)
        tumour = None
        if probability is not None:
            found, peak = torch.as_tensor(probability)[0].cpu().numpy(), self.network.settings.get("lesion_peak", HALF)
            tumour = above(without_faint_lesions(found, peak))
        shape = tuple(image.shape[-3:])
        grid = Grid((shape[0], shape[1], shape[2]), torch.as_tensor(result[keys.BOX_AFFINE]).cpu().double().numpy())
        patient = str(result.get(keys.PATIENT_ID, ""))
        slow = image[0, 0].numel() > VOXELS_AT_ONCE and next(self.network.parameters()).device.type == "cpu"
        steps = self.steps or (STEPS_SLOW if slow else STEPS)
        explanation = explain_risk(self.network, image, clinical, tumour, grid, steps, patient)
        if explanation.relative_error > ACCEPTED_ERROR:
            explanation = explain_risk(self.network, image, clinical, tumour, grid, 2 * steps, patient)
        logger.info("%s: risk explained in %.1f s", patient, explanation.seconds)
        return explanation


def explain_risk(
    network: FoldEnsemble,
    image: Tensor,
    clinical: Tensor | None,
    tumour: np.ndarray | None,
    grid: Grid,
    steps: int = STEPS,
    patient_id: str = "",
) -> Explanation:
    r"""Integrated gradients of the mean log hazard f of the folds.

    .. math:: a_i = x_i \int_0^1 \partial_i f(s x) ds, \quad \sum_i a_i = f(x) - f(0)

    with x the image and the clinical vector. Gradients flow through the probability map to the HPV branch, whatever
    ``mask_gradient`` is; otherwise the contributions would not add up.

    Args:
        network: the ensemble; not changed.
        image: (1, 2, X, Y, Z), channel 0 CT, channel 1 PET.
        clinical: (1, F) coded; None if all are missing.
        tumour: (X, Y, Z) bool, or None without the segmentation task.
        grid: of the image.
        steps: points of the Gauss-Legendre rule.
        patient_id: of the patient.

    Raises:
        ExplainError: a model without the survival task.
    """
    from captum.attr import IntegratedGradients  # only needed here

    started = time.monotonic()
    first = _member(network, 0)
    _check_task(first)
    device = next(first.parameters()).device
    names = list(network.settings.get("clinical_features", []))
    count = first.clinical_features
    names = names if len(names) == count else [f"value {k + 1}" for k in range(count)]
    vector = (torch.zeros(1, count) if clinical is None else clinical).to(device, torch.float32)
    image = image.to(device, torch.float32).contiguous(memory_format=torch.channels_last_3d)
    inputs = (image, vector)
    at_once = max(1, VOXELS_AT_ONCE // image[0, 0].numel())
    image_sum, vector_sum, ends = torch.zeros_like(image), torch.zeros_like(vector), np.zeros(2)
    for number in range(len(network.folds)):
        with _open_to_gradients(_member(network, number)) as risk, torch.enable_grad():
            parts = IntegratedGradients(risk).attribute(
                inputs, n_steps=steps, method="gausslegendre", internal_batch_size=at_once
            )
            with torch.no_grad():
                ends += [float(risk(*inputs)), float(risk(*(torch.zeros_like(x) for x in inputs)))]
        image_sum += parts[0].detach()
        vector_sum += parts[1].detach()
    folds = len(network.folds)
    contributions = (vector_sum[0] / folds).cpu().tolist()
    return Explanation(
        patient_id,
        float(ends[0]) / folds,
        float(ends[1]) / folds,
        (image_sum[0] / folds).cpu().numpy(),
        list(zip(names, vector[0].cpu().tolist(), contributions, strict=True)),
        tumour,
        grid,
        steps,
        folds,
        time.monotonic() - started,
        str(network.provenance.get(TRAINED_ON) or NOT_RECORDED),
    )


def _member(network: FoldEnsemble, number: int) -> MultitaskNet:
    return network.folds[number]  # type: ignore[return-value]


def _check_task(fold: MultitaskNet) -> None:
    if keys.TASK_SURV not in fold.tasks:
        raise ExplainError(
            f"a model of the task(s) {', '.join(fold.tasks)} gives no risk to be explained; leave --explain out, or "
            "take a model that was trained with the task 'surv'"
        )


@contextmanager
def _open_to_gradients(fold: MultitaskNet) -> Iterator[Any]:
    """The log hazard of a fold as a function of image and clinical vector; restores the fold afterwards."""
    training, gradient = fold.training, fold.mask_gradient
    wanted = [parameter.requires_grad for parameter in fold.parameters()]
    fold.eval()
    fold.mask_gradient = "flow"
    fold.requires_grad_(False)
    try:
        yield lambda image, clinical: fold(image, clinical)[keys.LOG_HAZARD].float()
    finally:
        fold.train(training)
        fold.mask_gradient = gradient
        for parameter, flag in zip(fold.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)
