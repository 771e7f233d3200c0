"""Measurements of a predicted tumour and of each lesion: volume, diameter, SUV, metabolic volume, glycolysis.

SUV is read from the native PET, never from a resampled one: a voxel belongs to a lesion when its centre lies in the
lesion's mask, which has the CT's voxels. Everything happens within the mask's bounding window.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import Transform

from scripts import keys
from scripts.imaging.geometry import Grid, resample
from scripts.imaging.lesions import CONNECTIVITY, MERGED, SMALLEST_LESION_ML, Lesions, find_lesions
from scripts.imaging.transforms import array_and_grid

MTV_SHARE = 0.41  # of the lesion's highest SUV
PEAK_RADIUS_MM = 10 * (3 / (4 * math.pi)) ** (1 / 3)  # of a sphere of 1 ml
TOTALS = ("volume_ml", "lesions", "suv_max", "suv_mean", "suv_peak", "mtv_ml", "tlg_g")  # measured of the whole tumour
OF_LESION = ("volume_ml", "suv_max", "suv_mean", "suv_peak", "mtv_ml", "tlg_g", "longest_diameter_mm")

LESION_RULE = (
    f"connected parts of the mask ({CONNECTIVITY} neighbours) of at least {SMALLEST_LESION_ML:g} ml; smaller ones "
    "count in the mask's volume and SUV alone"
)
MTV_RULE = (
    f"per lesion, its PET voxels of at least {100 * MTV_SHARE:.0f} % of its SUVmax (EANM guideline 2.0, Boellaard et "
    "al. 2015); a lesion between the centres of PET voxels has its own volume and the SUV of the nearest voxel"
)


class MeasureTumourd(Transform):
    """Measure the predicted mask, and the PET under it (see :func:`measure_tumour`).

    Reads ``pred`` (1, X, Y, Z) and ``pet``, as :class:`scripts.imaging.transforms.RestoreMaskd` and
    :class:`scripts.imaging.transforms.LoadScansd` leave them; sets ``measures``. A case without a mask (a model that
    does not segment) passes.

    Args:
        classes: of the mask's values 1, 2, ...: ``("GTV",)`` or ``("GTVp", "GTVn")``.
    """

    def __init__(self, classes: Sequence[str] = MERGED) -> None:
        self.classes = tuple(classes)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Measure the case's tumour."""
        d = dict(data)
        if d.get(keys.PRED) is not None:
            mask, pet = (array_and_grid(d[key]) for key in (keys.PRED, keys.PET))
            d[keys.MEASURES] = measure_tumour(*mask, *pet, self.classes)
        return d


def measure_tumour(
    mask: np.ndarray, mask_grid: Grid, pet: np.ndarray, pet_grid: Grid, classes: Sequence[str] = MERGED
) -> dict[str, Any]:
    """Volume, lesions and uptake of a tumour mask.

    Metabolic tumour volume and total lesion glycolysis, summed over the lesions:

        MTV = sum of v over PET voxels of the lesion with SUV >= 0.41 SUVmax(lesion), TLG = sum of v SUV over the same

    with v the volume of a PET voxel, so that TLG is the mean SUV within the MTV times the MTV. SUVpeak is the highest
    mean SUV of a sphere of 1 ml around a PET voxel of the lesion; the sphere may reach beyond the lesion (IBSI's global
    intensity peak, 0F91). The longest diameter is three-dimensional (:func:`scripts.imaging.lesions.longest_diameter`).

    Args:
        mask: (X, Y, Z) integers, 0 for background, k for ``classes[k - 1]``.
        mask_grid: its grid.
        pet: (X, Y, Z) PET in SUV, on a grid of its own. Values that are not finite are left out.
        pet_grid: the PET's grid.
        classes: of the mask's values, ``("GTV",)`` or ``("GTVp", "GTVn")``.

    Returns:
        Plain numbers: ``volume_ml``, ``lesions`` (their number), ``suv_max``, ``suv_mean`` (of the mask), ``suv_peak``
        (of the lesions), ``mtv_ml``, ``tlg_g``, ``lesion_rule``, ``mtv_rule``, ``classes`` and ``lesion_list``, the
        largest first, each with ``name``, ``label`` (its class), ``volume_ml``, ``suv_max``, ``suv_mean``,
        ``suv_peak``, ``mtv_ml``, ``tlg_g``, ``longest_diameter_mm`` and ``centre_mm`` [x, y, z] (world, RAS+). An empty
        mask has zeros and no SUV (None); where the PET does not reach a lesion its uptake is None.

    Raises:
        ValueError: when the mask holds a value without a class.

    Reference:
        Boellaard R. et al. FDG PET/CT: EANM procedure guidelines for tumour imaging: version 2.0. Eur. J. Nucl. Med.
        Mol. Imaging 42, 2015. Zwanenburg A. et al. The Image Biomarker Standardization Initiative. Radiology 295, 2020.

    Example:
        A block of 4 x 4 x 4 voxels of 1 ml, half of it at SUV 10 and half at SUV 2:

        >>> grid = Grid((8, 8, 8), np.diag([10.0, 10.0, 10.0, 1.0]))
        >>> mask, pet = np.zeros((8, 8, 8), dtype=int), np.zeros((8, 8, 8))
        >>> mask[2:6, 2:6, 2:6] = 1
        >>> pet[2:6, 2:6, 2:4], pet[2:6, 2:6, 4:6] = 10, 2
        >>> found = measure_tumour(mask, grid, pet, grid)
        >>> [round(found[name], 6) for name in ("volume_ml", "lesions", "suv_max", "suv_mean", "mtv_ml", "tlg_g")]
        [64.0, 1, 10.0, 6.0, 32.0, 320.0]
    """
    found = find_lesions(mask, mask_grid, classes)
    parts = _measure_parts(found, pet, pet_grid)
    values = np.concatenate([part.pop("values") for part in parts] or [np.zeros(0)])
    lesions = parts[: len(found.found)]
    for number, (lesion, measured) in enumerate(zip(found.found, lesions, strict=True), start=1):
        measured["longest_diameter_mm"] = found.diameter_mm(number)
        measured["centre_mm"] = [float(v) for v in lesion.centre_mm]
    return {
        "volume_ml": float(sum(part["volume_ml"] for part in parts)),
        "lesions": len(lesions),
        "suv_max": float(values.max()) if len(values) else None,
        "suv_mean": float(values.mean()) if len(values) else None,
        "suv_peak": max((lesion["suv_peak"] for lesion in lesions if lesion["suv_peak"] is not None), default=None),
        "mtv_ml": _total([lesion["mtv_ml"] for lesion in lesions]),
        "tlg_g": _total([lesion["tlg_g"] for lesion in lesions]),
        "lesion_rule": LESION_RULE,
        "mtv_rule": MTV_RULE,
        "classes": list(classes),
        "lesion_list": lesions,
    }


def _measure_parts(found: Lesions, pet: np.ndarray, pet_grid: Grid) -> list[dict[str, Any]]:
    """Volume and uptake of each component, lesion or too small, with the SUV ``values`` that are its own."""
    owner, index = _pet_voxels(found, pet_grid)
    order = np.argsort(owner, kind="stable")
    components = [*found.found, *found.small]
    bounds = np.searchsorted(owner[order], np.arange(1, len(components) + 2))
    parts = []
    for number, part in enumerate(components, start=1):
        own, voxel_ml = index[order[bounds[number - 1] : bounds[number]]], pet_grid.voxel_ml
        if len(own) == 0:
            own, voxel_ml = _nearest(part.centre_mm, pet_grid), part.volume_ml
        values = pet[tuple(own.T)].astype(np.float64)
        own, values = own[np.isfinite(values)], values[np.isfinite(values)]
        uptake = _uptake(values, own, voxel_ml, pet, pet_grid)
        parts.append({"name": part.name, "label": part.label, "volume_ml": part.volume_ml, **uptake, "values": values})
    return parts


def _pet_voxels(found: Lesions, pet_grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Number of the component (N,) and index (N, 3) of each PET voxel whose centre lies in one."""
    if found.grid is None:
        return np.zeros(0, dtype=int), np.zeros((0, 3), dtype=int)
    corners = pet_grid.to_index(found.grid.corners)
    first = np.clip(np.floor(corners.min(axis=0)), 0, pet_grid.shape).astype(int)
    stop = np.clip(np.ceil(corners.max(axis=0)) + 1, 0, pet_grid.shape).astype(int)
    if (stop <= first).any():
        return np.zeros(0, dtype=int), np.zeros((0, 3), dtype=int)
    window = (slice(first[0], stop[0]), slice(first[1], stop[1]), slice(first[2], stop[2]))
    owner = resample(found.numbers, found.grid, pet_grid.crop(window), "nearest", 0.0).astype(int)
    inside = owner > 0
    return owner[inside], np.argwhere(inside) + first


def _nearest(point: np.ndarray, grid: Grid) -> np.ndarray:
    """Index (1, 3) of the voxel nearest to a world position; (0, 3) where it lies outside the field of view."""
    index = np.rint(grid.to_index(point)).astype(int)
    inside = (index >= 0).all() and (index < grid.shape).all()
    return index[None] if inside else np.zeros((0, 3), dtype=int)


def _uptake(
    values: np.ndarray, index: np.ndarray, voxel_ml: float, pet: np.ndarray, pet_grid: Grid
) -> dict[str, float | None]:
    """SUV, MTV and TLG of one component: ``values`` (N,) at ``index`` (N, 3) of the PET."""
    if len(values) == 0:
        return dict.fromkeys(("suv_max", "suv_mean", "suv_peak", "mtv_ml", "tlg_g"))
    highest = float(values.max())
    active = values[values >= MTV_SHARE * highest] if highest > 0 else values[:0]
    return {
        "suv_max": highest,
        "suv_mean": float(values.mean()),
        "suv_peak": _peak(index, pet, pet_grid),
        "mtv_ml": len(active) * voxel_ml,
        "tlg_g": float(active.sum()) * voxel_ml,
    }


def _peak(index: np.ndarray, pet: np.ndarray, grid: Grid) -> float:
    """Highest mean of the voxels whose centres lie within 1 ml spheres around voxels (N, 3) with finite values."""
    reach = np.ceil(PEAK_RADIUS_MM * np.linalg.norm(np.linalg.inv(grid.affine)[:3, :3], axis=1)).astype(int)
    offsets = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in reach], indexing="ij"), axis=-1).reshape(-1, 3)
    offsets = offsets[np.linalg.norm(offsets @ grid.affine[:3, :3].T, axis=1) <= PEAK_RADIUS_MM]
    total, count = np.zeros(len(index)), np.zeros(len(index))
    for offset in offsets:
        at = index + offset
        inside = ((at >= 0) & (at < grid.shape)).all(axis=1)
        values = np.where(inside, pet[tuple(np.clip(at, 0, np.array(grid.shape) - 1).T)], np.nan)
        known = np.isfinite(values)
        total[known] += values[known]
        count += known
    return float((total / count).max())


def _total(amounts: Sequence[float | None]) -> float | None:
    """Sum of what is known; None where there are lesions and none of them is known."""
    known = [amount for amount in amounts if amount is not None]
    return None if amounts and not known else float(sum(known))
