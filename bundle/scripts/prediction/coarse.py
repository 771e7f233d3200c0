"""Coarse pass: the network's segmentation of a scan at low resolution, for :mod:`scripts.imaging.localise`.

The network was trained on boxes of the head and neck and is unreliable elsewhere (bladder, heart, an injection site).
It is applied only where, by the anatomy, a tumour of the head and neck is possible; without anatomy, to the whole scan.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from scipy import ndimage
from torch import Tensor

from scripts.cohorts.thresholds import above
from scripts.imaging.geometry import Grid, box_grid, resample
from scripts.imaging.localise import ALWAYS, BODY_HU, IN_DOUBT, Anchor, Candidate, NoCoarsePass, credible_bounds
from scripts.imaging.transforms import CT_FILL, PET_FILL, ScaleIntensityPETCTd
from scripts.keys import IMAGE, TASK_SEG
from scripts.model.ensemble import read_state, saved_spec
from scripts.model.networks import MultitaskNet
from scripts.model.unet import ROI_FACTOR

COARSE_SPACING_MM = 4.0
WINDOW_OVERLAP = 0.25
CONTEXT_MM = 40.0  # margin around the bounds, for tumours at their edge
# Highest uptake in a box of the head and neck: an injection site would compress the range of a network that scales by
# the box's maximum.
HIGHEST_SUV = 30.0
FIRST_FOLD = "folds.0."


class CoarsePass:
    """Tumour candidates of a model's first fold in a scan, at low resolution.

    The common field of view of CT and PET, within given bounds, is resampled to ``spacing_mm``, or to the network's
    voxel size if larger, and segmented in windows of at most ``roi_size`` voxels, with the intensity scaling of a box.
    The weights are read from the file at the first scan. A pickled copy holds the file's size and time instead of the
    weights, so that a cache keyed by it is invalidated by new weights.

    Args:
        checkpoint: file of a :class:`scripts.model.ensemble.FoldEnsemble`.
        when: ``"in_doubt"`` to run only if the anatomy is doubtful (anything but a whole brain in the PET), or
            ``"always"``.
        spacing_mm: smallest voxel size, in mm.
        device: of the network; the worker processes of a data loader use the CPU.

    Raises:
        ValueError: another ``when``.

    Example:
        >>> grid = Grid((8, 8, 8), np.eye(4))
        >>> CoarsePass("no_such_model.pt")(np.zeros(grid.shape), grid, np.zeros(grid.shape), grid)
        Traceback (most recent call last):
        scripts.imaging.localise.NoCoarsePass: no weights at no_such_model.pt
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        when: str = IN_DOUBT,
        spacing_mm: float = COARSE_SPACING_MM,
        device: str | torch.device = "cpu",
    ) -> None:
        if when not in (IN_DOUBT, ALWAYS):
            raise ValueError(f"the coarse pass runs {IN_DOUBT!r} or {ALWAYS!r}, not {when!r}")
        self.when = when
        self.checkpoint, self.spacing_mm, self.device = str(checkpoint), float(spacing_mm), torch.device(device)
        self._loaded: tuple[MultitaskNet, dict[str, Any]] | None = None

    def __call__(
        self, ct: np.ndarray, ct_grid: Grid, pet: np.ndarray, pet_grid: Grid, anchor: Anchor | None = None
    ) -> list[Candidate] | None:
        """Candidates in a scan, largest first; None if the pass is not needed.

        Scans as for :func:`.locate_head_neck`; the anchor limits the region, None for the whole scan.

        Raises:
            NoCoarsePass: no weights, no segmentation task, CT and PET do not overlap, or values are not finite.
        """
        if anchor is not None and self.when == IN_DOUBT and not anchor.doubtful:
            return None
        network, settings = self._load()
        spacing = max(self.spacing_mm, float(np.max(settings["spacing_mm"])))
        look = look_grid(ct_grid, pet_grid, spacing, None if anchor is None else credible_bounds(anchor))
        look, probability = see_tumour(network.to(self.device), settings, look, ct, ct_grid, pet, pet_grid)
        return find_candidates(probability, look)

    def _load(self) -> tuple[MultitaskNet, dict[str, Any]]:
        """The first fold's segmentation path and the settings in the file, read once."""
        if self._loaded is None:
            if not Path(self.checkpoint).is_file():
                raise NoCoarsePass(f"no weights at {self.checkpoint}")
            state, settings = read_state(self.checkpoint), saved_spec(self.checkpoint).to_dict()
            if TASK_SEG not in settings["tasks"]:
                raise NoCoarsePass(f"the model at {self.checkpoint} was not trained for segmentation")
            classes = len(settings["seg_classes"])
            network = MultitaskNet(tasks=[TASK_SEG], seg_classes=classes, bn_eps=settings["bn_eps"])
            names = network.state_dict().keys()
            network.load_state_dict({name: state[FIRST_FOLD + name] for name in names})
            self._loaded = network.eval(), settings
        return self._loaded

    def __getstate__(self) -> dict[str, Any]:
        """Parameters, and size and time of the weights' file: all that the result depends on."""
        file = Path(self.checkpoint)
        stat = file.stat() if file.is_file() else None
        weights = None if stat is None else (stat.st_size, stat.st_mtime_ns)
        return {**vars(self), "_loaded": None, "weights": weights}


class _SegmentationPath(Protocol):
    def parameters(self) -> Iterator[torch.nn.Parameter]: ...
    def tumour_probability(self, image: Tensor) -> Tensor: ...


def see_tumour(
    network: _SegmentationPath,
    settings: Mapping[str, Any],
    look: Grid,
    ct: np.ndarray,
    ct_grid: Grid,
    pet: np.ndarray,
    pet_grid: Grid,
) -> tuple[Grid, np.ndarray]:
    """Tumour probability on a grid, in windows as large as the network's box.

    Args:
        network: its ``tumour_probability`` reads (1, 2, X, Y, Z), edges multiples of 16, intensities as in a box.
        settings: the network's ``roi_size``, ``ct_window`` and ``pet_window``.
        look: grid of :func:`look_grid`.
        ct: (X, Y, Z) CT in HU.
        ct_grid: its grid.
        pet: (X, Y, Z) PET in SUV, on a grid of its own.
        pet_grid: the PET's grid.

    Returns:
        The grid, enlarged at its upper ends to whole windows, and the probability on it, float32.
    """
    size = np.minimum(look.shape, settings["roi_size"])
    window = [int(n) for n in -(-size // ROI_FACTOR) * ROI_FACTOR]
    look = look.crop([slice(0, max(n, w)) for n, w in zip(look.shape, window, strict=True)])
    suv = np.minimum(resample(pet, pet_grid, look, fill=PET_FILL), HIGHEST_SUV)
    image = torch.from_numpy(np.stack([resample(ct, ct_grid, look, fill=CT_FILL), suv]))
    if not bool(torch.isfinite(image).all()):  # quality control reports it, with the patient
        raise NoCoarsePass("CT or PET holds values that are not finite numbers")
    scale = ScaleIntensityPETCTd(settings["ct_window"], settings["pet_window"])

    def predict(windows: Tensor) -> Tensor:
        if not bool((windows[:, 0] > BODY_HU).any()):  # air
            return torch.zeros_like(windows[:, :1])
        return network.tumour_probability(torch.stack([scale({IMAGE: item})[IMAGE] for item in windows]))

    device = next(network.parameters(), torch.empty(0)).device
    with torch.inference_mode():
        answer = sliding_window_inference(
            image[None].to(device), window, 1, predict, overlap=WINDOW_OVERLAP, mode="gaussian"
        )
    return look, torch.as_tensor(answer)[0, 0].float().cpu().numpy()


def look_grid(ct_grid: Grid, pet_grid: Grid, spacing_mm: float, bounds: np.ndarray | None = None) -> Grid:
    """Axis-aligned grid over the common field of view of CT and PET, or over the part around ``bounds`` (2, 3) in mm.

    Raises:
        NoCoarsePass: there is none.
    """
    low = np.maximum(ct_grid.bounds[0], pet_grid.bounds[0])
    high = np.minimum(ct_grid.bounds[1], pet_grid.bounds[1])
    if bounds is not None:
        low, high = np.maximum(low, bounds[0] - CONTEXT_MM), np.minimum(high, bounds[1] + CONTEXT_MM)
    if (high <= low).any():
        raise NoCoarsePass("PET and CT have no part in common where a tumour of the head and neck can be")
    shape = np.ceil((high - low) / spacing_mm - 1e-6).astype(int)
    return box_grid((low + high) / 2, shape.tolist(), spacing_mm)


def find_candidates(probability: np.ndarray, grid: Grid) -> list[Candidate]:
    """Connected regions of tumour in a probability map (X, Y, Z) on an axis-aligned grid, largest mass first."""
    labels, count = ndimage.label(above(probability))
    found = []
    for number, window in enumerate(ndimage.find_objects(labels, count), start=1):
        values = probability[window][labels[window] == number]
        mass = float(values.sum(dtype=np.float64)) * grid.voxel_ml
        found.append(Candidate(grid.crop(window).bounds, mass, float(values.max())))
    return sorted(found, key=lambda c: -c.mass_ml)
