"""Voxel grids in world coordinates, and resampling of an image onto another grid.

World coordinates are NIfTI's RAS+ in mm: x increases to the patient's right, y to anterior, z to superior. Arrays are
indexed (x, y, z) as in nibabel; voxel index (0, 0, 0) is the *centre* of the first voxel.

An image is interpolated once, and only where the result is needed. Between axis-aligned grids (including flipped and
permuted axes) cubic spline interpolation *with its prefilter* is linear and separable: one small dense matrix per axis,
applied to the slab of the source with non-zero weights. For oblique grids, scipy interpolates the part that is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np
from scipy import linalg, ndimage

if TYPE_CHECKING:
    import torch

# Weights below this are set to zero: denormal numbers slow matrix products 10 to 30 times, and without them a target
# voxel depends on about 17 source voxels to each side.
NEGLIGIBLE_WEIGHT = 1e-10
# A grid that deviates at most this far (in source voxels) from the axes counts as aligned.
ALIGNED_TOLERANCE = 1e-3
# The impulse response of the spline prefilter decreases by 0.268 per voxel: below 1e-8 after 14 voxels.
SPLINE_MARGIN = 14
# Rounding of affines must not move a voxel on the edge of the field of view out of it.
EDGE_TOLERANCE = 1e-6

# Limits for a scan of a body; the search for the head allocates memory by the field of view.
MAX_FIELD_MM = (1500.0, 2500.0)  # of all axes but the longest one, and of that
VOXEL_MM = (0.01, 100.0)
MAX_DISTANCE_MM = 1e5  # from the scanner's origin
MAX_VOXELS = 2**29  # 512 x 512 x 2048

SPLINE_ORDER = {"nearest": 0, "linear": 1, "spline": 3}


@dataclass(frozen=True, eq=False)
class Grid:
    """Position of the voxels of a 3-D image.

    Args:
        shape: voxels along the three array axes.
        affine: (4, 4) matrix from voxel index to world millimetres (RAS+), NIfTI's convention.

    Raises:
        ValueError: when the shape is not three positive numbers or the affine cannot be inverted.

    Example:
        >>> grid = Grid((10, 10, 5), np.diag([2.0, 2.0, 3.0, 1.0]))
        >>> grid.spacing.tolist(), grid.centre.tolist()
        ([2.0, 2.0, 3.0], [9.0, 9.0, 6.0])
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"a grid needs three positive numbers of voxels, got {shape}")
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
            raise ValueError(f"a grid needs an invertible 4 x 4 affine, got {affine.tolist()}")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size along each array axis in mm, (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def extent(self) -> np.ndarray:
        """Length of the field of view along each array axis in mm, edge to edge, (3,)."""
        return self.spacing * np.array(self.shape)

    @property
    def centre(self) -> np.ndarray:
        """World position of the middle of the field of view in mm, (3,)."""
        return self.to_world((np.array(self.shape) - 1) / 2)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres, sheared affines included."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def corners(self) -> np.ndarray:
        """World positions of the eight outer corners of the field of view in mm, (8, 3)."""
        ends = [(-0.5, n - 0.5) for n in self.shape]
        return self.to_world(np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3))

    @property
    def bounds(self) -> np.ndarray:
        """Lowest and highest world coordinate of the field of view in mm, (2, 3)."""
        return np.stack([self.corners.min(axis=0), self.corners.max(axis=0)])

    def to_world(self, index: Sequence[float] | np.ndarray) -> np.ndarray:
        """World positions (..., 3) in mm of voxel indices (..., 3)."""
        return np.asarray(index, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_index(self, world: Sequence[float] | np.ndarray) -> np.ndarray:
        """Fractional voxel indices (..., 3) of world positions (..., 3) in mm."""
        inverse = np.linalg.inv(self.affine)
        return np.asarray(world, dtype=np.float64) @ inverse[:3, :3].T + inverse[:3, 3]

    def crop(self, window: Sequence[slice], step: int | Sequence[int] = 1) -> Grid:
        """The grid of ``array[window]``, then of every ``step``-th voxel of it."""
        steps = np.broadcast_to(step, 3)
        start = np.array([s.start for s in window])
        shape = [-(-(s.stop - s.start) // int(k)) for s, k in zip(window, steps, strict=True)]
        affine = self.affine.copy()
        affine[:3, 3] = self.to_world(start)
        affine[:3, :3] *= steps
        return Grid((shape[0], shape[1], shape[2]), affine)


def field_of_view_fault(shape: Sequence[int], affine: np.ndarray) -> str:
    """Why the size or position is impossible for a scan of a body, "" where it is possible.

    Example:
        >>> field_of_view_fault((512, 512, 200), np.diag([0.98, 0.98, 3.0, 1.0]))
        ''
        >>> field_of_view_fault((512, 512, 200), np.diag([980.0, 980.0, 3000.0, 1.0]))
        'voxels of 980 x 980 x 3000 mm, a field of view of 5.018e+05 x 5.018e+05 x 6e+05 mm: no scan of a body'
    """
    if math.prod(int(n) for n in shape[:3]) > MAX_VOXELS:
        return f"{' x '.join(str(n) for n in shape[:3])} voxels, more than any scan has"
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        return "no usable voxel size or direction"
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    extent = spacing * np.array(shape[:3], dtype=np.float64)
    ordered = np.sort(extent)
    distance = float(np.abs(affine[:3, 3]).max())
    if distance > MAX_DISTANCE_MM:
        return f"a first voxel {distance:.4g} mm from the origin: no place in a scanner"
    small, large = VOXEL_MM
    if small <= spacing.min() and spacing.max() <= large and (ordered[1:] <= MAX_FIELD_MM).all():
        return ""
    sizes, extents = (" x ".join(f"{number:.4g}" for number in numbers) for numbers in (spacing, extent))
    return f"voxels of {sizes} mm, a field of view of {extents} mm: no scan of a body"


def box_grid(
    centre_mm: Sequence[float] | np.ndarray, roi_size: int | Sequence[int], spacing_mm: float | Sequence[float]
) -> Grid:
    """The axis-aligned RAS+ grid of ``roi_size`` voxels whose field of view is centred on ``centre_mm``.

    Args:
        centre_mm: (3,) world position in mm.
        roi_size: voxels along x, y and z (one number for a cube).
        spacing_mm: voxel size along x, y and z (one number for cubic voxels).

    Example:
        >>> box_grid((0, 0, 0), 4, 2.0).bounds.tolist()
        [[-4.0, -4.0, -4.0], [4.0, 4.0, 4.0]]
    """
    shape = np.broadcast_to(np.asarray(roi_size, dtype=int), 3)
    spacing = np.broadcast_to(np.asarray(spacing_mm, dtype=float), 3)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = np.asarray(centre_mm, dtype=float) - spacing * (shape - 1) / 2
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def resample(array: np.ndarray, source: Grid, target: Grid, mode: str = "spline", fill: float = 0.0) -> np.ndarray:
    """Interpolate an image at the voxels of another grid, as float32.

    Args:
        array: (X, Y, Z) values on ``source``, any real type.
        source: grid of the values.
        target: grid of the result.
        mode: ``"spline"`` (cubic B-spline that passes through the values; equals ``scipy.ndimage`` with order 3
            and mode ``mirror``), ``"linear"`` or ``"nearest"``.
        fill: value of target voxels outside the source's field of view, which ends half a voxel beyond the
            centres of the outer voxels.

    Raises:
        ValueError: when the array does not have the source's shape or the mode is unknown.
    """
    _check(array, source)
    if mode not in SPLINE_ORDER:
        raise ValueError(f"mode must be one of {sorted(SPLINE_ORDER)}, got {mode!r}")
    axes = _aligned_axes(source, target)
    if axes is None:
        return _resample_oblique(array, source, target, SPLINE_ORDER[mode], fill)
    if mode == "nearest":
        return _place(_lookup(array, axes), axes, target.shape, fill)
    weights = spline_weights if mode == "spline" else linear_weights
    return _place(
        _apply(array, [weights(a.inside, n) for a, n in zip(axes, source.shape, strict=True)]), axes, target.shape, fill
    )


def smooth_resample(array: np.ndarray, source: Grid, target: Grid, sigma_mm: float, fill: float = 0.0) -> np.ndarray:
    """Gaussian-smoothed image at the voxels of another grid, in one step; for searching, not for the network.

    Arguments as for :func:`resample`.

    Smoothing is in mm along the source's axes; voxels larger than ``sigma_mm / 0.6`` are smoothed by 0.6 voxels, so
    that the result is continuous.
    """
    _check(array, source)
    sigmas = np.maximum(sigma_mm / source.spacing, 0.6)
    axes = _aligned_axes(source, target)
    if axes is not None:
        matrices = [gaussian_weights(a.inside, n, s) for a, n, s in zip(axes, source.shape, sigmas, strict=True)]
        return _place(_apply(array, matrices), axes, target.shape, fill)
    # oblique: smooth along the source's axes, at every k-th voxel, which samples the smoothed image densely enough
    steps = np.maximum(1, (sigmas / 1.5).astype(int)).tolist()
    thin = source.crop([slice(0, n) for n in source.shape], steps)
    taken = [np.arange(0, n, k, dtype=float) for n, k in zip(source.shape, steps, strict=True)]
    smooth = _apply(array, [gaussian_weights(t, n, s) for t, n, s in zip(taken, source.shape, sigmas, strict=True)])
    values = _resample_oblique(smooth, thin, target, 1, fill)
    values[_outside(np.linalg.inv(source.affine) @ target.affine, source.shape, target.shape)] = fill
    return values


def to_ct_window(prob: np.ndarray, box: Grid, ct: Grid) -> tuple[tuple[slice, slice, slice], np.ndarray]:
    """Resample a map from the network's box to the voxels of the CT around the box.

    Args:
        prob: (R, R, R) tumour probability on ``box``.
        box: the network's grid.
        ct: the CT's own grid.

    Returns:
        The window of the CT around the box (three slices, possibly empty) and the linearly interpolated float32 values
        on it, 0 where a voxel of the window is outside the box.
    """
    _check(prob, box)
    window = _window(ct.to_index(box.corners), ct.shape, margin=0)
    if any(s.stop <= s.start for s in window):
        return (slice(0, 0),) * 3, np.zeros((0, 0, 0), dtype=np.float32)
    return window, resample(prob, box, ct.crop(window), "linear", 0.0)


def share_inside(mask: np.ndarray, grid: Grid, box: Grid) -> float:
    """Share of a mask's non-zero voxels whose centres lie in the box's field of view; NaN for an empty mask."""
    _check(mask, grid)
    window = bounding_window(mask)
    if window is None:
        return float("nan")
    part, where = mask[window] != 0, grid.crop(window)
    axes = _aligned_axes(box, where)
    if axes is None:
        outside = _outside(np.linalg.inv(box.affine) @ where.affine, box.shape, where.shape)
        return float((part & ~outside).sum() / part.sum())
    inside = [slice(0)] * 3
    for axis in axes:
        inside[axis.target_axis] = slice(axis.start, axis.start + len(axis.inside))
    return float(part[tuple(inside)].sum() / part.sum())


def bounding_window(mask: np.ndarray) -> tuple[slice, slice, slice] | None:
    """The smallest window of a 3-D mask with all non-zero voxels; None for an empty mask."""
    if mask.flags.f_contiguous and not mask.flags.c_contiguous:  # in memory order, which is several times faster
        window = bounding_window(mask.T)
        return None if window is None else (window[2], window[1], window[0])
    filled: np.ndarray = np.any(mask, axis=2)
    x, y = np.flatnonzero(filled.any(axis=1)), np.flatnonzero(filled.any(axis=0))
    if len(x) == 0:
        return None
    z = np.flatnonzero(mask[x[0] : x[-1] + 1, y[0] : y[-1] + 1].any(axis=(0, 1)))
    return slice(int(x[0]), int(x[-1]) + 1), slice(int(y[0]), int(y[-1]) + 1), slice(int(z[0]), int(z[-1]) + 1)


def spline_weights(coordinates: np.ndarray, count: int) -> np.ndarray:
    """Matrix (M, count) that turns values at 0..count-1 into their cubic spline at ``coordinates``.

    With A the collocation matrix of the cubic B-spline (values = A @ coefficients, mirrored at the ends, a
    tridiagonal matrix of 1/6, 4/6, 1/6) and B the B-spline's weights at the coordinates, the matrix is B A^-1:
    A^-1 is the prefilter.

    Args:
        coordinates: (M,) fractional indices between -0.5 and count - 0.5.
        count: number of source values.
    """
    if count == 1:
        return np.ones((len(coordinates), 1))
    first = np.floor(coordinates).astype(int) - 1
    fraction = coordinates - np.floor(coordinates)
    basis = np.zeros((len(coordinates), count))
    rows = np.arange(len(coordinates))
    for tap, weight in enumerate(_cubic_basis(fraction)):
        np.add.at(basis, (rows, _mirror(first + tap, count)), weight)
    bands = np.full((3, count), 1 / 6)
    bands[1] = 4 / 6
    bands[0, 1] = bands[2, -2] = 2 / 6  # mirrored neighbours of the first and of the last value
    # rows of B A^-1 solve A^T x = b: transposing a tridiagonal matrix swaps its outer bands
    transposed = np.zeros_like(bands)
    transposed[0, 1:], transposed[1], transposed[2, :-1] = bands[2, :-1], bands[1], bands[0, 1:]
    return linalg.solve_banded((1, 1), transposed, basis.T).T


def linear_weights(coordinates: np.ndarray, count: int) -> np.ndarray:
    """Matrix (M, count) of linear interpolation; beyond the outer values the nearest one is used."""
    position = np.clip(coordinates, 0, count - 1)
    return np.clip(1 - np.abs(position[:, None] - np.arange(count)), 0, None)


def gaussian_weights(coordinates: np.ndarray, count: int, sigma: float) -> np.ndarray:
    """Matrix (M, count) of Gaussian averages with standard deviation ``sigma`` voxels; every row sums to one."""
    weights = np.exp(-0.5 * ((coordinates[:, None] - np.arange(count)) / sigma) ** 2)
    return weights / weights.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class _Axis:
    """One source axis in target voxels: the target axis along it, and the source indices of its voxels."""

    target_axis: int
    start: int  # first target voxel inside the source's field of view
    inside: np.ndarray  # (stop - start,) fractional source indices of the target voxels inside
    count: int


def _aligned_axes(source: Grid, target: Grid) -> list[_Axis] | None:
    """The three source axes in target voxels, or None when the grids are oblique to each other."""
    transform = np.linalg.inv(source.affine) @ target.affine
    linear = transform[:3, :3]
    half = (np.array(target.shape) - 1) / 2
    partner = np.abs(linear * half.clip(min=0.5)).argmax(axis=1)
    if len(set(partner.tolist())) != 3:
        return None
    stray = linear.copy()
    stray[np.arange(3), partner] = 0.0
    if (np.abs(stray) @ half).max() > ALIGNED_TOLERANCE:
        return None
    axes = []
    for s, t in enumerate(partner):
        # the deviation is evaluated at the middle of the target, which halves its effect
        coordinates = transform[s, 3] + stray[s] @ half + linear[s, t] * np.arange(target.shape[t])
        count = source.shape[s]
        inside = np.flatnonzero((coordinates >= -0.5 - EDGE_TOLERANCE) & (coordinates <= count - 0.5 + EDGE_TOLERANCE))
        start, stop = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
        axes.append(_Axis(int(t), start, coordinates[start:stop], count))
    return axes


def _place(values: np.ndarray, axes: list[_Axis], shape: Sequence[int], fill: float) -> np.ndarray:
    """The target array: values, in the order of the source's axes, and ``fill`` elsewhere."""
    target = np.full(tuple(shape), fill, dtype=np.float32)
    source_of = np.argsort([a.target_axis for a in axes])
    window = tuple(slice(axes[s].start, axes[s].start + len(axes[s].inside)) for s in source_of)
    target[window] = values.transpose(source_of)
    return target


def _lookup(array: np.ndarray, axes: list[_Axis]) -> np.ndarray:
    """Nearest source values; midway between two the upper one, independent of rounding."""
    nearest = [np.clip(np.floor(a.inside + 0.5 + EDGE_TOLERANCE).astype(int), 0, a.count - 1) for a in axes]
    return array[np.ix_(*nearest)]


def _apply(array: np.ndarray, matrices: list[np.ndarray]) -> np.ndarray:
    """Multiply an array by one matrix per axis (M_k, N_k), reading only the slab with non-zero weights."""
    import torch  # takes seconds, which commands that end before this need not wait for

    if any(m.shape[0] == 0 for m in matrices):
        return np.zeros([m.shape[0] for m in matrices], dtype=np.float32)
    small, window = [], []
    for matrix in matrices:
        matrix = np.where(np.abs(matrix) < NEGLIGIBLE_WEIGHT, 0.0, matrix)
        used = np.flatnonzero(matrix.any(axis=0))
        window.append(slice(int(used[0]), int(used[-1]) + 1))
        small.append(torch.from_numpy(np.ascontiguousarray(matrix[:, window[-1]], dtype=np.float32)))
    slab = array[tuple(window)]
    memory = np.argsort([-abs(s) for s in slab.strides], kind="stable")  # slowest axis first, which needs no copy
    values = torch.from_numpy(np.array(slab.transpose(memory), dtype=np.float32, order="C"))
    # float32 even under autocast: CT values need more than the 8 bits of bfloat16
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for axis in _cheapest_order(values.shape, [small[k] for k in memory]):
            values = _multiply(values, small[memory[axis]], axis)
    return values.numpy().transpose(np.argsort(memory))


def _cheapest_order(shape: Sequence[int], matrices: list[torch.Tensor]) -> tuple[int, ...]:
    """The order of axes in which three matrix products need the fewest multiplications."""

    def cost(order: tuple[int, ...]) -> int:
        size, total = list(shape), 0
        for axis in order:
            total += int(np.prod(size)) * matrices[axis].shape[0]
            size[axis] = matrices[axis].shape[0]
        return total

    return min(permutations(range(3)), key=cost)


def _multiply(values: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """Product of a contiguous (A, B, C) tensor and a matrix along one axis, without transposing."""
    a, b, c = values.shape
    if axis == 0:
        return (matrix @ values.reshape(a, b * c)).reshape(-1, b, c)
    if axis == 1:
        return matrix @ values
    return values @ matrix.T


def _resample_oblique(array: np.ndarray, source: Grid, target: Grid, order: int, fill: float) -> np.ndarray:
    """Interpolation between oblique grids, on the part of the source around the target."""
    transform = np.linalg.inv(source.affine) @ target.affine
    window = _window(source.to_index(target.corners), source.shape, SPLINE_MARGIN if order > 1 else 1)
    if any(s.stop <= s.start for s in window):
        return np.full(target.shape, fill, dtype=np.float32)
    part = np.asarray(array[window], dtype=np.float32)
    mode = "mirror" if order > 1 else "nearest"
    if order > 1:
        part = ndimage.spline_filter(part, order, output=np.float32, mode=mode)
    start = np.array([s.start for s in window])
    values = ndimage.affine_transform(
        part, transform[:3, :3], transform[:3, 3] - start, target.shape, np.float32, order, mode, prefilter=False
    )
    values[_outside(transform, source.shape, target.shape)] = fill
    return values


def _outside(transform: np.ndarray, source_shape: Sequence[int], target_shape: Sequence[int]) -> np.ndarray:
    """Which target voxels fall outside the source's field of view, bool of ``target_shape``."""
    i, j, k = np.ogrid[tuple(slice(n) for n in target_shape)]
    outside = np.zeros(tuple(target_shape), dtype=bool)
    for (a, b, c, d), count in zip(transform[:3], source_shape, strict=True):
        position = a * i + b * j + (c * k + d)
        outside |= (position < -0.5 - EDGE_TOLERANCE) | (position > count - 0.5 + EDGE_TOLERANCE)
    return outside


def _window(corners: np.ndarray, shape: Sequence[int], margin: int) -> tuple[slice, slice, slice]:
    """Slices of an array of ``shape`` for the index range of ``corners`` (N, 3) and a margin of voxels."""
    low = np.clip(np.floor(corners.min(axis=0)).astype(int) - margin, 0, shape)
    high = np.clip(np.ceil(corners.max(axis=0)).astype(int) + margin + 1, 0, shape)
    x, y, z = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return x, y, z


def _mirror(index: np.ndarray, count: int) -> np.ndarray:
    """Indices reflected about the first and the last value (d c b a b c d)."""
    period = 2 * (count - 1)
    wrapped = np.mod(index, period)
    return np.where(wrapped >= count, period - wrapped, wrapped)


def _cubic_basis(fraction: np.ndarray) -> list[np.ndarray]:
    """Weights of the four cubic B-splines around a position ``fraction`` past the second of them."""
    t = fraction
    return [(1 - t) ** 3 / 6, (4 - 6 * t**2 + 3 * t**3) / 6, (1 + 3 * t + 3 * t**2 - 3 * t**3) / 6, t**3 / 6]


def _check(array: np.ndarray, grid: Grid) -> None:
    if tuple(array.shape) != grid.shape:
        raise ValueError(f"the array has shape {tuple(array.shape)}, its grid {grid.shape}")
