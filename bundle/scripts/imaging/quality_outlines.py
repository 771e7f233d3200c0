"""The body's outlines in CT and PET, and the shift, rotation and scaling between them.

Outlines have +1 for body, -1 for air and 0 outside the field of view, on one coarse grid in world mm (RAS+).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import fft, ndimage

from scripts.imaging.geometry import Grid, box_grid, smooth_resample
from scripts.imaging.quality_measures import BODY_HU, BODY_SHARE_OF_MEDIAN, Thin, enclosed

OUTLINE_MM, OUTLINE_SIGMA_MM = 8.0, 6.0
OUTLINE_MARGIN_MM = 48.0  # around the box, to include shoulders and vertex, which determine a shift along z
OUTLINE_LEAST_MM = 80.0  # minimum size of the overlap
LARGEST_SHIFT_MM = 96.0
# Minimum gain in agreement of the outlines (-1 to 1) of a shift, in total and per mm: a cylinder matches itself at any
# height.
LEAST_GAIN, GAIN_PER_MM = 0.03, 0.0005
# Fit of a linear map, with ridge regularisation by the expected size of the linear part, of the shift in voxels and of
# the error of an outline in voxels. Points at a distance above FIT_FAR have less weight.
FIT_STEPS, FIT_LINEAR, FIT_SHIFT, FIT_ERROR, FIT_FAR = 5, 0.15, 3.0, 3.0, 2.0
FIT_POINTS = 50  # minimum number of points on the outline
FIT_SEEN, FIT_STEEP = 0.6, 0.1  # minimum share in view around a point, and minimum gradient


def body_outlines(ct: Thin, pet: Thin, level: float | None, box: Grid) -> tuple[np.ndarray, np.ndarray] | None:
    """The body's outlines in CT and PET around the box, on one coarse grid; None where they cannot be determined.

    ``level`` is the median PET value of the body.
    """
    low = np.max([ct.grid.bounds[0], pet.grid.bounds[0], box.bounds[0] - OUTLINE_MARGIN_MM], axis=0)
    high = np.min([ct.grid.bounds[1], pet.grid.bounds[1], box.bounds[1] + OUTLINE_MARGIN_MM], axis=0)
    if (high - low).min() < OUTLINE_LEAST_MM or not level:
        return None
    grid = box_grid((low + high) / 2, np.floor((high - low) / OUTLINE_MM).astype(int).tolist(), OUTLINE_MM)
    hu = smooth_resample(ct.values, ct.grid, grid, OUTLINE_SIGMA_MM, fill=np.nan)
    suv = smooth_resample(pet.values, pet.grid, grid, OUTLINE_SIGMA_MM, fill=np.nan)
    one, other = _signed(hu, BODY_HU), _signed(suv, BODY_SHARE_OF_MEDIAN * level)
    return None if min((one > 0).mean(), (other > 0).mean()) < 0.01 else (one, other)


def best_shift(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, float]:
    """Shift (3,) in mm of the second outline against the first, and their agreement after it.

    Agreement is the mean product: 1 for equal outlines and -1 for opposite ones. The shift of largest gain is used,
    less a penalty for its length.
    """
    reach = np.minimum(round(LARGEST_SHIFT_MM / OUTLINE_MM), np.array(one.shape) // 4).tolist()
    seen = _correlate(np.abs(one), np.abs(other), reach)
    agreement = _correlate(one, other, reach) / np.maximum(seen, 1)
    shifts = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), axis=-1) * OUTLINE_MM
    # voxels that a shift moves out of view do not count
    gain = (agreement - agreement[tuple(reach)]) * seen / max(1.0, float(seen[tuple(reach)]))
    best = int((gain - GAIN_PER_MM * np.linalg.norm(shifts, axis=-1)).argmax())
    if gain.ravel()[best] < LEAST_GAIN:
        return np.zeros(3), float(agreement[tuple(reach)])
    return shifts.reshape(-1, 3)[best], float(agreement.ravel()[best])


def distortion(one: np.ndarray, other: np.ndarray, shift: np.ndarray) -> tuple[float, float]:
    """Rotation and scaling of the second outline against the first, beyond a shift.

    The map x -> x + A (x - c) + t, c the outline's middle, that takes points on the first outline to the second, by
    least squares of their distances along the outline's normal (Gauss-Newton).

    Args:
        one: outline of :func:`body_outlines`.
        other: the second one.
        shift: (3,) mm, of :func:`best_shift`.

    Returns:
        Root mean square in mm of n . A (x - c) over the outline with its normals n, and the angle in degrees of the
        rotation in A. Both 0 where too little of an outline is in view.
    """
    (first, seen), (second, seen_there) = _blurred(one), _blurred(other)
    slope = np.stack(np.gradient(first), axis=-1)
    steep = np.linalg.norm(slope, axis=-1)
    edge = (steep > FIT_STEEP) & (seen > FIT_SEEN)
    if edge.sum() < FIT_POINTS:
        return 0.0, 0.0
    points, value, normal = np.argwhere(edge).astype(float), first[edge], slope[edge] / steep[edge][:, None]
    arm = points - points.mean(axis=0)
    rows = np.concatenate([(normal[:, :, None] * arm[:, None, :]).reshape(-1, 9), normal], axis=1)
    likely = np.array([FIT_LINEAR] * 9 + [FIT_SHIFT] * 3)
    ridge = (FIT_ERROR / likely) ** 2
    start = np.concatenate([np.zeros(9), shift / OUTLINE_MM])
    found, weight = start.copy(), np.zeros(len(points))
    for _ in range(FIT_STEPS):
        there = (points + arm @ found[:9].reshape(3, 3).T + found[9:]).T
        off = (value - ndimage.map_coordinates(second, there, order=1)) / steep[edge]
        weight = (ndimage.map_coordinates(seen_there, there, order=1) > FIT_SEEN) / (1 + (off / FIT_FAR) ** 2)
        normal_matrix = rows.T @ (rows * weight[:, None]) + np.diag(ridge)
        found = found + np.linalg.solve(normal_matrix, rows.T @ (weight * off) - ridge * (found - start))
        found = np.clip(found, start - 4 * likely, start + 4 * likely)
    if not weight.any():
        return 0.0, 0.0
    linear = found[:9].reshape(3, 3)
    moved = np.average((rows[:, :9] @ found[:9]) ** 2, weights=weight)
    turn = np.array([linear[2, 1] - linear[1, 2], linear[0, 2] - linear[2, 0], linear[1, 0] - linear[0, 1]]) / 2
    return OUTLINE_MM * float(np.sqrt(moved)), float(np.rad2deg(np.linalg.norm(turn)))


def _blurred(outline: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A smoothed outline, and the share in view around each voxel."""
    seen = ndimage.gaussian_filter(np.abs(outline), 1.0)
    return ndimage.gaussian_filter(outline, 1.0) / np.maximum(seen, 0.05), seen


def _signed(values: np.ndarray, body_from: float) -> np.ndarray:
    """+1 in the body and enclosed air, -1 in air, 0 outside the field of view."""
    outside = np.isnan(values)
    body = np.where(outside, -np.inf, values) > body_from
    body |= enclosed(body, sides_open=False)
    return np.where(outside, np.float32(0), np.where(body, np.float32(1), np.float32(-1)))


def _correlate(one: np.ndarray, other: np.ndarray, reach: Sequence[int]) -> np.ndarray:
    """Sum over x of one(x) other(x + s) for all shifts s up to ``reach`` voxels along each axis."""
    shape = [fft.next_fast_len(n + r, real=True) for n, r in zip(one.shape, reach, strict=True)]
    product = np.conj(fft.rfftn(one, shape)) * fft.rfftn(other, shape)
    return fft.irfftn(product, shape)[np.ix_(*(np.arange(-r, r + 1) for r in reach))]
