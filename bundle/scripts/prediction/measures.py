"""What is measured on a predicted tumour: volume, lesions, SUV, metabolic tumour volume, total lesion glycolysis.

SUV is read from the native PET, never from a resampled one: a voxel belongs to a lesion when its centre lies in the
lesion's mask, which has the CT's voxels. Everything happens within the mask's bounding window.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import cc3d
import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform

from scripts import keys
from scripts.imaging.geometry import Grid, bounding_window, resample
from scripts.imaging.transforms import array_and_grid

CONNECTIVITY: Final = 26  # voxels that touch at a corner belong to one lesion
SMALLEST_LESION_ML = 0.1  # about one PET voxel; less is a crumb at the edge of the mask
MTV_SHARE = 0.41  # of the lesion's highest SUV

LESION_RULE = (
    f"connected parts of the mask ({CONNECTIVITY} neighbours) of at least {SMALLEST_LESION_ML:g} ml; smaller ones "
    "count in the mask's volume and SUV alone"
)
MTV_RULE = (
    f"per lesion, its PET voxels of at least {100 * MTV_SHARE:.0f} % of its SUVmax (EANM guideline 2.0, Boellaard et "
    "al. 2015); a lesion between the centres of PET voxels has its own volume and the SUV of the nearest voxel"
)


class MeasureTumourd(MapTransform):
    """Measure the predicted mask, and the PET under it (see :func:`measure_tumour`).

    Sets ``measures``. A case without a mask (a model that does not segment) passes.

    Args:
        keys: the mask (1, X, Y, Z) and the PET, as :class:`scripts.imaging.transforms.RestoreMaskd` and
            :class:`scripts.imaging.transforms.LoadScansd` leave them.
        measures_key: where the measures go.
    """

    def __init__(self, keys: KeysCollection = (keys.PRED, keys.PET), measures_key: str = keys.MEASURES) -> None:
        super().__init__(keys)
        if len(self.keys) != 2:
            raise ValueError(f"a mask and a PET are measured, got keys {self.keys}")
        self.measures_key = measures_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Measure the case's tumour."""
        d = dict(data)
        if d.get(self.keys[0]) is not None:
            d[self.measures_key] = measure_tumour(*array_and_grid(d[self.keys[0]]), *array_and_grid(d[self.keys[1]]))
        return d


def measure_tumour(mask: np.ndarray, mask_grid: Grid, pet: np.ndarray, pet_grid: Grid) -> dict[str, Any]:
    """Volume, lesions and uptake of a tumour mask.

    Metabolic tumour volume and total lesion glycolysis, summed over the lesions:

        MTV = sum of v over PET voxels of the lesion with SUV >= 0.41 SUVmax(lesion), TLG = sum of v SUV over the same

    with v the volume of a PET voxel, so that TLG is the mean SUV within the MTV times the MTV.

    Args:
        mask: (X, Y, Z), not zero where there is tumour.
        mask_grid: its grid.
        pet: (X, Y, Z) PET in SUV, on a grid of its own. Values that are not finite are left out.
        pet_grid: the PET's grid.

    Returns:
        Plain numbers: ``volume_ml``, ``lesions`` (their number), ``suv_max``, ``suv_mean`` (of the mask), ``mtv_ml``,
        ``tlg_g``, ``lesion_rule``, ``mtv_rule`` and ``lesion_list``, the largest first, each with ``volume_ml``,
        ``suv_max``, ``suv_mean``, ``mtv_ml``, ``tlg_g`` and ``centre_mm`` [x, y, z] (world, RAS+). An empty mask has
        zeros and no SUV (None); where the PET does not reach a lesion its uptake is None.

    Reference:
        Boellaard R. et al. FDG PET/CT: EANM procedure guidelines for tumour imaging: version 2.0. Eur. J. Nucl. Med.
        Mol. Imaging 42, 2015.

    Example:
        A block of 4 x 4 x 4 voxels of 1 ml, half of it at SUV 10 and half at SUV 2:

        >>> grid = Grid((8, 8, 8), np.diag([10.0, 10.0, 10.0, 1.0]))
        >>> mask, pet = np.zeros((2, 8, 8, 8))
        >>> mask[2:6, 2:6, 2:6] = 1
        >>> pet[2:6, 2:6, 2:4], pet[2:6, 2:6, 4:6] = 10, 2
        >>> found = measure_tumour(mask, grid, pet, grid)
        >>> [round(found[name], 6) for name in ("volume_ml", "lesions", "suv_max", "suv_mean", "mtv_ml", "tlg_g")]
        [64.0, 1, 10.0, 6.0, 32.0, 320.0]
    """
    window = bounding_window(mask)
    parts = [] if window is None else _measure_parts(mask[window], mask_grid.crop(window), pet, pet_grid)
    values = np.concatenate([part.pop("values") for part in parts] or [np.zeros(0)])
    lesions = [part for part in parts if part["volume_ml"] >= SMALLEST_LESION_ML]
    return {
        "volume_ml": float(sum(part["volume_ml"] for part in parts)),
        "lesions": len(lesions),
        "suv_max": float(values.max()) if len(values) else None,
        "suv_mean": float(values.mean()) if len(values) else None,
        "mtv_ml": _total([lesion["mtv_ml"] for lesion in lesions]),
        "tlg_g": _total([lesion["tlg_g"] for lesion in lesions]),
        "lesion_rule": LESION_RULE,
        "mtv_rule": MTV_RULE,
        "lesion_list": sorted(lesions, key=lambda lesion: -lesion["volume_ml"]),
    }


def _measure_parts(mask: np.ndarray, grid: Grid, pet: np.ndarray, pet_grid: Grid) -> list[dict[str, Any]]:
    """Each connected part of a mask, with the SUV ``values`` that are its own."""
    labels = cc3d.connected_components(np.ascontiguousarray(mask != 0), connectivity=CONNECTIVITY)
    statistics = cc3d.statistics(labels)
    owner, suv = _pet_voxels(labels, grid, pet, pet_grid)
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(1, len(statistics["voxel_counts"]) + 1))
    parts = []
    for label in range(1, len(statistics["voxel_counts"])):
        volume = float(statistics["voxel_counts"][label]) * grid.voxel_ml
        centre = grid.to_world(statistics["centroids"][label])
        values = suv[order[bounds[label - 1] : bounds[label]]]
        voxel_ml = pet_grid.voxel_ml
        if len(values) == 0:
            values, voxel_ml = _nearest(centre, pet, pet_grid), volume
        values = values[np.isfinite(values)]
        uptake = _uptake(values, voxel_ml)
        parts.append({"volume_ml": volume, **uptake, "centre_mm": [float(v) for v in centre], "values": values})
    return parts


def _pet_voxels(labels: np.ndarray, grid: Grid, pet: np.ndarray, pet_grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Label (N,) and SUV (N,) of the PET voxels around a labelled window; 0 where a centre lies in no part."""
    corners = pet_grid.to_index(grid.corners)
    first = np.clip(np.floor(corners.min(axis=0)), 0, pet.shape).astype(int)
    stop = np.clip(np.ceil(corners.max(axis=0)) + 1, 0, pet.shape).astype(int)
    if (stop <= first).any():
        return np.zeros(0, dtype=int), np.zeros(0)
    window = (slice(first[0], stop[0]), slice(first[1], stop[1]), slice(first[2], stop[2]))
    owner = resample(labels, grid, pet_grid.crop(window), "nearest", 0.0).astype(int)
    inside = owner > 0
    return owner[inside], pet[window][inside].astype(np.float64)


def _nearest(point: np.ndarray, pet: np.ndarray, grid: Grid) -> np.ndarray:
    """The PET value nearest to a world position, (1,); (0,) where it lies outside the field of view."""
    index = np.rint(grid.to_index(point)).astype(int)
    if (index < 0).any() or (index >= pet.shape).any():
        return np.zeros(0)
    return np.array([pet[tuple(index)]], dtype=np.float64)


def _uptake(values: np.ndarray, voxel_ml: float) -> dict[str, float | None]:
    """SUV, MTV and TLG of one lesion."""
    if len(values) == 0:
        return dict.fromkeys(("suv_max", "suv_mean", "mtv_ml", "tlg_g"))
    highest = float(values.max())
    active = values[values >= MTV_SHARE * highest] if highest > 0 else values[:0]
    return {
        "suv_max": highest,
        "suv_mean": float(values.mean()),
        "mtv_ml": len(active) * voxel_ml,
        "tlg_g": float(active.sum()) * voxel_ml,
    }


def _total(amounts: Sequence[float | None]) -> float | None:
    """Sum of what is known; None where there are lesions and none of them is known."""
    known = [amount for amount in amounts if amount is not None]
    return None if amounts and not known else float(sum(known))
