"""The quantities of quality control: of CT, PET and mask, of their fields of view and of their alignment.

All are measured on subsampled or coarsely resampled scans. Positions are world mm (RAS+), independent of the order and
direction of the array axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from scripts.imaging.geometry import Grid, bounding_window, box_grid, resample, share_inside
from scripts.keys import BACKGROUND, GTVN, GTVP

THIN_MM = 5.0  # approximate voxel size of the subsampled scans
# Body in the PET, in any unit: above this share of the body's median (fat has a third of it); for the median, the body
# has at least this share of the field of view.
BODY_SHARE_OF_MEDIAN, LEAST_BODY_SHARE = 0.35, 0.02
# A hot spot exceeds both; the first is in SUV, the second for any unit.
HOT_SUV, HOT_TIMES_BODY = 8.0, 10.0
# Head, neck, heart, kidneys and bladder are within 130 mm of the midline, an arm beside the trunk is not.
LATERAL_MM = 130.0
BODY_HU, AIR_HU = -400.0, -500.0
TISSUE_HU = -300.0  # lungs, foam and clothes have less
# Below this the lowest value may be padding (-2000, -3024); air is at least -1024.
PADDING_HU = -1200.0
AIR_BIN_HU, LEAST_AIR = 10.0, 50  # width of a bin, and the minimum number of voxels of air
# Speckle: pixels that differ from all their neighbours in the slice: in the CT by this, in the PET, with its limited
# resolution, by a multiple of the neighbours and of the body's median.
SPECKLE_HU, SPECKLE_TIMES_NEXT, SPECKLE_TIMES_BODY = 300.0, 3.0, 2.0
SPECKLE_SLICES = 8
DRAWN_SHARE = 0.01  # of the pixels of a slice differ from its corner where it shows more than noise
AIRWAY_MM, AIRWAY_CM2 = 4.0, 0.5  # spacing of the search, and area of a narrow pharynx
POINTS = 24  # per axis, to measure shared volumes
BODY_POINTS = 48  # per axis, to measure the body: about 400 of them in a neck in a field of view of 500 mm
NEIGHBOURS = np.array([[[1], [1], [1]], [[1], [0], [1]], [[1], [1], [1]]], dtype=bool)  # in a slice along z
IN_PLANE = ndimage.generate_binary_structure(3, 1) & np.array([False, True, False])  # neighbours within a slice along z


@dataclass(frozen=True)
class Thin:
    """Every k-th voxel of a scan, as finite float32."""

    values: np.ndarray
    grid: Grid


def _thin_out(array: np.ndarray, grid: Grid, spacing_mm: float) -> Thin:
    steps = np.maximum(1, np.rint(spacing_mm / grid.spacing)).astype(int).tolist()
    window = tuple(slice(None, None, k) for k in steps)
    values = array[window].astype(np.float32)
    if array.dtype.kind == "f":
        np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    return Thin(values, grid.crop([slice(0, n) for n in grid.shape], steps))


def _not_finite(array: np.ndarray) -> tuple[float, float, float]:
    """Number of voxels that are not finite, and lowest and highest of the others, of a whole scan."""
    with np.errstate(invalid="ignore"):
        lowest, highest = float(array.min()), float(array.max())
    if np.isfinite(lowest) and np.isfinite(highest):  # either would be NaN or infinite
        return 0.0, lowest, highest
    finite = array[np.isfinite(array)]
    count = float(array.size - finite.size)
    return (count, float(finite.min()), float(finite.max())) if finite.size else (count, 0.0, 0.0)


def measure_pet(pet: np.ndarray, grid: Grid, ct: Thin) -> tuple[dict[str, float | None], Thin]:
    """Quantities of the PET (X, Y, Z), with the subsampled CT for the share of the body in the field of view."""
    count, lowest, highest = _not_finite(pet)
    thin = _thin_out(pet, grid, THIN_MM)
    level = pet_body_level(ct, thin)
    hot_from = max(HOT_SUV, HOT_TIMES_BODY * (level or 0.0))
    values: dict[str, float | None] = {
        "pet_not_finite": count,
        "pet_lowest": lowest,
        "pet_contrast": highest - lowest,
        "pet_body": level,
        "pet_highest": highest,
        "pet_injection_site": 100 * _lateral_share(thin, BODY_SHARE_OF_MEDIAN * (level or 0.0), hot_from),
        "pet_speckle": 100 * _pet_speckle(_some_slices(pet, grid), level) if level else 0.0,
        "pet_blank_slices": _blank_slices(pet, grid),
    }
    return values, thin


def pet_body_level(ct: Thin, pet: Thin) -> float | None:
    """Median PET value of the body, in any unit; None where CT and PET have no overlap.

    The body is assumed as large in the PET as in the CT: in their overlap, it is the voxels of highest PET value, as
    many as the CT has of tissue (including the table, some percent). The result does not depend on the alignment of PET
    and CT, nor on PET values in air: noise, zeros, negative values or padding, which is excluded.
    """
    scanned = bounding_window(pet.values > 0)
    if scanned is None:
        return 0.0
    bounds = pet.grid.crop(scanned).bounds
    low, high = np.maximum(ct.grid.bounds[0], bounds[0]), np.minimum(ct.grid.bounds[1], bounds[1])
    if (high <= low).any():
        return None
    common = box_grid((low + high) / 2, BODY_POINTS, (high - low) / BODY_POINTS)
    hu = resample(ct.values, ct.grid, common, "nearest", fill=np.nan)
    suv = resample(pet.values, pet.grid, common, "nearest", fill=np.nan)
    seen = np.isfinite(hu) & np.isfinite(suv)
    warm = suv[seen & (suv > 0)]
    if not warm.size:
        return None
    share = np.clip((hu[seen] > TISSUE_HU).sum() / warm.size, LEAST_BODY_SHARE, 1.0)
    return float(np.quantile(warm, 1 - share / 2))


def _lateral_share(pet: Thin, body_from: float, hot_from: float) -> float:
    """Share of the activity in hot voxels far to the left or right of the body's middle."""
    hot = np.argwhere(pet.values > hot_from)
    total = float(np.clip(pet.values, 0, None).sum(dtype=np.float64))
    if len(hot) == 0 or total <= 0:
        return 0.0
    body = np.argwhere(pet.values > body_from)
    middle = np.median(pet.grid.to_world(body[:: max(1, len(body) // 10_000)])[:, 0])
    lateral = hot[np.abs(pet.grid.to_world(hot)[:, 0] - middle) > LATERAL_MM]
    return float(pet.values[tuple(lateral.T)].sum(dtype=np.float64)) / total


def measure_ct(ct: np.ndarray, grid: Grid) -> tuple[dict[str, float | None], Thin]:
    """Quantities of the CT."""
    thin = _thin_out(ct, grid, THIN_MM)
    count = _not_finite(ct)[0] if ct.dtype.kind == "f" else 0.0
    body = thin.values[thin.values > TISSUE_HU]
    values: dict[str, float | None] = {
        "ct_not_finite": count,
        "ct_lowest": float(thin.values.min()),
        "ct_air": _air_hu(thin.values),
        "ct_tissue": float(np.median(body)) if len(body) else None,
        "ct_body": 100.0 * len(body) / thin.values.size,
        "ct_speckle": 100 * _ct_speckle(_some_slices(ct, grid)),
        "ct_blank_slices": _blank_slices(ct, grid),
    }
    return values, thin


def _air_hu(hu: np.ndarray) -> float | None:
    """The most frequent value of air, without padding; None where there is (almost) no air."""
    air = hu[hu < AIR_HU]
    if air.size < LEAST_AIR:
        return None
    lowest = air.min()
    if lowest < PADDING_HU and (air > lowest).sum() >= LEAST_AIR:
        air = air[air > lowest]
    bins = np.floor((AIR_HU - np.maximum(air, 10 * AIR_HU)) / AIR_BIN_HU).astype(int)
    counts = np.convolve(np.bincount(bins), [1, 2, 3, 2, 1])[2:-2]
    return AIR_HU - (float(counts.argmax()) + 0.5) * AIR_BIN_HU


def _across(grid: Grid) -> int:
    """The slice axis of the array: the one nearest to the body's axis."""
    return int(np.abs(grid.affine[2, :3] / grid.spacing).argmax())


def _some_slices(array: np.ndarray, grid: Grid) -> np.ndarray:
    """Some whole slices (X, Y, S) of a scan, as float32."""
    slices = np.moveaxis(array, _across(grid), 2)
    count = slices.shape[2]
    taken = np.unique(np.rint(np.linspace(0, count - 1, min(count, SPECKLE_SLICES))).astype(int))
    return np.asarray(np.nan_to_num(slices[:, :, taken].astype(np.float32), posinf=0.0, neginf=0.0))


def _ct_speckle(slices: np.ndarray) -> float:
    """Share of pixels above or below all their neighbours by more than the limit."""
    above = slices - ndimage.maximum_filter(slices, footprint=NEIGHBOURS)
    below = ndimage.minimum_filter(slices, footprint=NEIGHBOURS) - slices
    return float((np.maximum(above, below) > SPECKLE_HU).mean())


def _pet_speckle(slices: np.ndarray, level: float) -> float:
    """Share of pixels above all their neighbours by more than a scanner's resolution allows."""
    beside = ndimage.maximum_filter(slices, footprint=NEIGHBOURS)
    return float(((slices > SPECKLE_TIMES_BODY * level) & (slices > SPECKLE_TIMES_NEXT * beside)).mean())


def _blank_slices(array: np.ndarray, grid: Grid) -> float:
    """Number of slices of a single value between others that show more than noise."""
    slices = np.moveaxis(array, _across(grid), 2)
    steps = np.maximum(1, np.rint(THIN_MM / np.delete(grid.spacing, _across(grid)))).astype(int)
    thin = slices[:: steps[0], :: steps[1]]
    uneven = (thin != thin[:1, :1]).mean(axis=(0, 1))
    drawn = np.flatnonzero(uneven > DRAWN_SHARE)
    return float((uneven[drawn[0] : drawn[-1]] == 0).sum()) if len(drawn) else 0.0


def measure_mask(
    mask: np.ndarray, grid: Grid, ct_grid: Grid, pet: np.ndarray, pet_grid: Grid, body: float
) -> tuple[dict[str, float | None], list[float]]:
    """Quantities of a tumour's mask, and some of its values without a meaning.

    Arguments as for :func:`scripts.imaging.quality.check_mask`.

    Returns:
        For an empty mask only ``mask_values``.
    """
    window = bounding_window(mask)
    if window is None:
        return {"mask_values": 0.0}, []
    part, where = mask[window], grid.crop(window)
    tumour = part != BACKGROUND
    strange = part[tumour & (part != GTVP) & (part != GTVN)]
    suv = resample(pet, pet_grid, where, "nearest")[tumour]
    values: dict[str, float | None] = {
        "mask_values": float(strange.size),
        "mask_in_ct": 100 * share_inside(mask, grid, ct_grid),
        "mask_volume": float(tumour.sum()) * grid.voxel_ml,
        "mask_uptake": float(np.nan_to_num(suv, posinf=0.0, neginf=0.0).mean(dtype=np.float64)) / body
        if body > 0
        else None,
    }
    return values, np.unique(strange)[:3].tolist()


def voxel_sizes(ct_grid: Grid, pet_grid: Grid) -> dict[str, float]:
    """Voxel sizes in mm in the slice (mean of the two) and across slices (the axis nearest to the body's)."""
    sizes = {}
    for name, grid in (("ct", ct_grid), ("pet", pet_grid)):
        across = _across(grid)
        sizes[f"{name}_in_plane"] = float(np.delete(grid.spacing, across).mean())
        sizes[f"{name}_slice"] = float(grid.spacing[across])
    return sizes


def grid_shape(*grids: Grid) -> dict[str, float]:
    """Largest deviation of the voxels of some grids from right angles and square pixels.

    Returns:
        ``voxel_skew``, the largest deviation from 90 degrees between two axes, and ``pixel_aspect``, the longer side of
        a pixel in the slice over the shorter one.
    """
    skew, aspect = 0.0, 1.0
    for grid in grids:
        axes = grid.affine[:3, :3] / grid.spacing
        cosines = np.abs(np.triu(axes.T @ axes, 1)).max()
        skew = max(skew, float(np.rad2deg(np.arcsin(min(1.0, cosines)))))
        sides = np.delete(grid.spacing, _across(grid))
        aspect = max(aspect, float(sides.max() / sides.min()))
    return {"voxel_skew": skew, "pixel_aspect": aspect}


def _points(grid: Grid) -> np.ndarray:
    """Evenly spaced world positions (N, 3) in a field of view."""
    steps = [(np.arange(POINTS) + 0.5) * n / POINTS - 0.5 for n in grid.shape]
    return grid.to_world(np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3))


def _inside(points: np.ndarray, grid: Grid) -> np.ndarray:
    """Whether world positions (N, 3) lie in a field of view, (N,)."""
    index = grid.to_index(points)
    return np.asarray(((index >= -0.5) & (index <= np.array(grid.shape) - 0.5)).all(axis=1))


def shared_by(box: Grid, *scans: Grid) -> float:
    """Share of a box in the field of view of every scan."""
    places = _points(box)
    return float(np.mean(np.all([_inside(places, scan) for scan in scans], axis=0)))


def overlap(one: Grid, other: Grid) -> float:
    """Share of the smaller field of view inside the larger one."""
    small, large = sorted((one, other), key=lambda g: float(np.prod(g.extent)))
    return float(_inside(_points(small), large).mean())


def enclosed(mask: np.ndarray, sides_open: bool = True) -> np.ndarray:
    """The places that a mask (X, Y, Z) encloses within slices along z, as a mask.

    Args:
        mask: the mask.
        sides_open: whether a place that reaches the left or right end of the slice is not enclosed. False for a field
            of view narrower than the chest, where lungs reach the end.
    """
    labels: np.ndarray = ndimage.label(~mask, IN_PLANE)[0]
    ends = [labels[:, 0], labels[:, -1], *([labels[0], labels[-1]] if sides_open else [])]
    open_air = np.zeros(int(labels.max()) + 1, dtype=bool)
    open_air[np.concatenate([end.ravel() for end in ends])] = True
    open_air[0] = True
    return np.asarray(~open_air[labels], dtype=bool)


def airway_mm(ct: np.ndarray, ct_grid: Grid, box: Grid) -> float:
    """Length along z over which the body in the box encloses air."""
    corners = ct_grid.to_index(box.corners)
    first = np.clip(np.floor(corners.min(axis=0)), 0, np.array(ct_grid.shape) - 1).astype(int)
    last = np.clip(np.ceil(corners.max(axis=0)), first, np.array(ct_grid.shape) - 1).astype(int)
    window = (slice(first[0], last[0] + 1), slice(first[1], last[1] + 1), slice(first[2], last[2] + 1))
    thin = _thin_out(ct[window], ct_grid.crop(window), AIRWAY_MM)
    shape = np.maximum(1, np.rint(box.extent / AIRWAY_MM)).astype(int).tolist()
    hu = resample(thin.values, thin.grid, box_grid(box.centre, shape, AIRWAY_MM), "nearest", -1024.0)
    air = enclosed(hu > BODY_HU) & (hu < AIR_HU)
    return float((air.sum(axis=(0, 1)) * AIRWAY_MM**2 / 100 >= AIRWAY_CM2).sum()) * AIRWAY_MM
