"""CT, PET and tumour mask of a patient, as the patient's hospital scans."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from scripts.keys import GTVN, GTVP

from .anatomy import build_anatomy, on_dental_arch
from .patients import STREAM_CT, STREAM_PET, STREAM_SCAN, Patient, stream
from .scanners import Scanner
from .shapes import Array, Ellipsoid, Part, Pose, Vector
from .tumours import Lesion

SCALES = ("small", "full")
VIEWS = ("hospital", "neck")
NECK_Z = (-130.0, 45.0)  # from the clavicles to below the brain, body coordinates


@dataclass(frozen=True)
class Grid:
    """An axis-aligned image grid: voxel counts, voxel sizes and the world position of voxel (0, 0, 0).

    As in HECKTOR's files the first two voxel axes run to the left and to the back (affine ``diag(-dx, -dy, dz)``).
    """

    shape: tuple[int, int, int]
    spacing_mm: Vector
    origin_mm: Vector

    @property
    def affine(self) -> NDArray[np.float64]:
        """Voxel -> world matrix (4, 4)."""
        matrix = np.diag([-self.spacing_mm[0], -self.spacing_mm[1], self.spacing_mm[2], 1.0])
        matrix[:3, 3] = self.origin_mm
        return matrix

    def finer(self, factor: int) -> Grid:
        """The same field of view with every voxel cut into ``factor`` along each axis."""
        signs = (-1, -1, 1)
        spacing = tuple(size / factor for size in self.spacing_mm)
        origin = tuple(
            start + sign * (fine - coarse) / 2
            for start, sign, fine, coarse in zip(self.origin_mm, signs, spacing, self.spacing_mm, strict=True)
        )
        shape = tuple(count * factor for count in self.shape)
        return Grid(
            (shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2]), (origin[0], origin[1], origin[2])
        )


@dataclass(frozen=True)
class Scan:
    """A patient's images (X, Y, Z): CT in HU, PET times ``pet_slope`` in SUV, tumour mask on the CT grid."""

    ct: NDArray[np.int16]
    ct_grid: Grid
    pet: NDArray[np.int16]
    pet_slope: float
    pet_grid: Grid
    mask: NDArray[np.uint8]


def scan_patient(patient: Patient, seed: int, index: int, scale: str, view: str = "hospital") -> Scan:
    """CT, PET and tumour mask of a patient.

    Args:
        patient: ``draw_patient(seed, index)``.
        seed: As of the patient; with ``index`` it also decides positioning and noise.
        index: As of the patient.
        scale: ``full`` (voxels and extents as the centres scan) or ``small`` (6 to 7 mm voxels, 0.3 m field of view).
        view: ``hospital``, or ``neck``: no brain in view, and a PET of 0.7 m of which the neck fills little.

    Raises:
        ValueError: If the scale or the view is none of these.
    """
    ct_grid, pet_grid = scan_grids(patient, stream(seed, index, STREAM_SCAN), scale, view)
    scanner = patient.scanner
    floor = min(_lowest_body_z(grid, patient.pose) for grid in (ct_grid, pet_grid))
    anatomy = build_anatomy(patient.body, patient.lesions)
    parts = [part for part in anatomy if part.bounds()[1, 2] >= floor]  # most of the trunk is out of a neck scan
    small = scale == "small"
    noise_hu, ct_step = (5.0, 6) if small else (scanner.ct_noise_hu, 1)
    ct_hu = paint_ct(patient, parts, ct_grid, oversample=2 if small else 1)
    pet_suv = paint_pet(patient, parts, pet_grid, scanner.psf_fwhm_mm)
    ct = _finish_ct(ct_hu, stream(seed, index, STREAM_CT), noise_hu, ct_step)
    pet_slope = max(0.04 if small else 0.002, 1.2 * float(pet_suv.max()) / np.iinfo(np.int16).max)
    pet = _finish_pet(pet_suv, stream(seed, index, STREAM_PET), pet_slope, scanner, pet_grid)
    mask = paint_mask(patient, ct_grid, oversample=2 if small else 1)
    return Scan(ct.T, ct_grid, pet.T, pet_slope, pet_grid, mask.T)


def scan_grids(patient: Patient, rng: np.random.Generator, scale: str, view: str = "hospital") -> tuple[Grid, Grid]:
    """CT and PET grid of a patient: each with its own voxels, extent and origin.

    In 15 % of patients the scan starts below the top of the head, so that the brain is cut.

    Raises:
        ValueError: If ``scale`` is not one of ``SCALES``, or ``view`` none of ``VIEWS``.
    """
    for name, value, known in (("scale", scale, SCALES), ("view", view, VIEWS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: give one of {', '.join(known)}")
    centre, pose = patient.centre, patient.pose
    top = pose.to_world(np.array([[0.0, -8.0, 192.0]]))[0]
    middle = pose.to_world(np.array([[0.0, -22.0, 0.0]]))[0]
    above = float(rng.uniform(-60, -12)) if rng.random() < 0.15 else float(rng.uniform(8, 30))
    jitter = rng.uniform(-8, 8, size=(2, 3))
    if scale == "small":
        extents = (np.array([306.0, 286.0, 312.0]), np.array([318.0, 296.0, 306.0]))
        voxels = (centre.small_ct_mm, centre.small_pet_mm)
    else:
        width = centre.fov_mm + centre.pet_margin_mm
        extents = (
            np.array([centre.fov_mm, centre.fov_mm, centre.length_mm]),
            np.array([width, width, centre.length_mm + rng.uniform(-25, 25)]),
        )
        voxels = (centre.ct_mm, centre.pet_mm)
    if view == "neck":
        low, top = pose.to_world(np.array([[0.0, -22.0, z] for z in NECK_Z]))
        above = 0.0
        extents[0][2] = extents[1][2] = top[2] - low[2]
        extents[1][:2] = 700.0
    grids = []
    for extent, voxel, shake in zip(extents, voxels, jitter, strict=True):
        counts = np.round(extent / np.array(voxel)).astype(int)
        reach = (counts - 1) * np.array(voxel) / 2
        right, front = middle[0] + reach[0] + shake[0], middle[1] + reach[1] + shake[1]
        bottom = top[2] + above + shake[2] / 2 - 2 * reach[2]
        origin = (round(float(right), 3), round(float(front), 3), round(float(bottom), 3))
        grids.append(Grid((int(counts[0]), int(counts[1]), int(counts[2])), voxel, origin))
    return grids[0], grids[1]


def paint_ct(patient: Patient, parts: list[Part], grid: Grid, oversample: int) -> Array:
    """CT (Z, Y, X) in HU without noise: air, table, body, tumours, streaks of metal fillings."""
    fine = grid.finer(oversample)
    volume = _air_and_table(fine, patient.pose)
    for part in parts:
        if part.hu is not None:
            _paint_part(volume, fine, patient.pose, part, part.hu)
    for lesion in patient.lesions:
        for box, inside, _, hu in _lesion_boxes(lesion, patient.pose, fine):
            np.copyto(volume[box], hu, where=inside)
    _paint_fillings(volume, fine, patient)
    return _block_mean(volume, oversample)


def _paint_fillings(volume: Array, grid: Grid, patient: Patient) -> None:
    """Metal in the teeth, and the bright and dark streaks it leaves in the slices around it."""
    for angle in patient.fillings:
        x, y = on_dental_arch(angle)
        z = 22.0 + 8.0 * math.sin(7.0 * angle)  # in the upper or the lower jaw
        found = _coordinates(grid, patient.pose, Ellipsoid((x, y, z), (110, 110, 7)).bounds())
        if found is None:
            continue
        box, (dx, dy, dz) = found
        dx, dy, dz = dx - np.float32(x), dy - np.float32(y), dz - np.float32(z)
        middle = len(dz) // 2  # the streaks run in the slices: one pattern serves them all
        around, away = np.arctan2(dy[middle], dx[middle]), np.hypot(dx[middle], dy[middle])
        rays = sum(np.cos(n * around + np.float32(n * n * angle)) for n in (2, 3, 5, 8, 13)) / 5
        pattern = rays * 900 / (1 + away / 8) * np.clip((110 - away) / 60, 0, 1)
        near = np.exp(-np.square(dz / 4.5))
        inside = volume[box] > -300  # in air no streak is seen beside the noise
        volume[box] += np.where(inside, near * pattern[None], 0).astype(np.float32)
        filling = np.square(dx / 3.5) + np.square(dy / 3.5) + np.square(dz / 4) <= 1
        volume[box][filling] = 3071
    np.clip(volume, -1000, 3071, out=volume)


def paint_pet(patient: Patient, parts: list[Part], grid: Grid, fwhm_mm: float) -> Array:
    """Noise-free PET (Z, Y, X) in SUV: true activity, then the scanner's Gaussian blur of ``fwhm_mm``."""
    oversample = 2 if sum(grid.spacing_mm) > 3 * 3.6 else 1  # fine voxels need none under the blur
    fine = grid.finer(oversample)
    volume = np.full(fine.shape[::-1], 0.01, dtype=np.float32)
    for part in parts:
        if part.suv is not None:
            _paint_part(volume, fine, patient.pose, part, part.suv)
    for lesion in patient.lesions:
        for box, inside, suv, _ in _lesion_boxes(lesion, patient.pose, fine):
            np.copyto(volume[box], suv, where=inside)
    sigma_mm = fwhm_mm / (2 * math.sqrt(2 * math.log(2)))
    sigma = [sigma_mm / size for size in fine.spacing_mm[::-1]]
    return _block_mean(ndimage.gaussian_filter(volume, sigma, truncate=3.0), oversample)


def paint_mask(patient: Patient, grid: Grid, oversample: int) -> NDArray[np.uint8]:
    """Tumour mask (Z, Y, X): a voxel is tumour where lesions fill at least half of it, of the kind that fills more.

    A lesion that fills half of no voxel gets the voxel of its centre: whoever has a primary or nodes has them in the
    mask at any voxel size, and their volume there is at least that of a voxel. (Lesions out of view are not shown.)
    """
    fine = grid.finer(oversample)
    kind = np.zeros(fine.shape[::-1], dtype=np.uint8)
    for lesion in patient.lesions:
        for box, inside, _, _ in _lesion_boxes(lesion, patient.pose, fine):
            kind[box][inside] = lesion.label
    mask = kind if oversample == 1 else _majority(kind, oversample)
    for lesion in patient.lesions:
        _mark_small(mask, grid, patient.pose, lesion)
    return mask


def _majority(kind: NDArray[np.uint8], oversample: int) -> NDArray[np.uint8]:
    primary, nodes = (_block_mean((kind == label).astype(np.float32), oversample) for label in (GTVP, GTVN))
    return np.where(primary + nodes >= 0.5, np.where(nodes > primary, GTVN, GTVP), 0).astype(np.uint8)


def _mark_small(mask: NDArray[np.uint8], grid: Grid, pose: Pose, lesion: Lesion) -> None:
    """Give the voxel of its centre to a lesion smaller than a few voxels that has none of its kind around it."""
    if lesion.radius_mm > max(grid.spacing_mm):
        return
    x, y, z = (pose.to_world(np.array([lesion.centre]))[0] - grid.origin_mm) / [-1, -1, 1] / grid.spacing_mm
    i, j, k = (round(float(value)) for value in (x, y, z))
    if not all(0 <= value < count for value, count in zip((i, j, k), grid.shape, strict=True)):
        return
    around = mask[max(k - 1, 0) : k + 2, max(j - 1, 0) : j + 2, max(i - 1, 0) : i + 2]
    if not (around == lesion.label).any():
        mask[k, j, i] = lesion.label


def _coordinates(
    grid: Grid, pose: Pose, corners: NDArray[np.float64]
) -> tuple[tuple[slice, slice, slice], tuple[Array, Array, Array]] | None:
    """Index box (Z, Y, X) around a body box and the body coordinates of its voxels; None if it is out of view."""
    low, high = corners
    body = np.array([[a, b, c] for a in (low[0], high[0]) for b in (low[1], high[1]) for c in (low[2], high[2])])
    world = pose.to_world(body)
    step = np.array([-grid.spacing_mm[0], -grid.spacing_mm[1], grid.spacing_mm[2]])
    index = (world - np.array(grid.origin_mm)) / step
    first = np.maximum(np.floor(index.min(axis=0)).astype(int), 0)
    last = np.minimum(np.ceil(index.max(axis=0)).astype(int), np.array(grid.shape) - 1)
    if np.any(last < first):
        return None
    axes = [np.arange(a, b + 1) * s + o for a, b, s, o in zip(first, last, step, grid.origin_mm, strict=True)]
    dx, dy, dz = (axis - start for axis, start in zip(axes, pose.shift, strict=True))
    x, y, z = (
        ((row[1] * dy)[None, :, None] + (row[2] * dz)[:, None, None]).astype(np.float32)
        + (row[0] * dx).astype(np.float32)[None, None, :]
        for row in pose.to_body_matrix()
    )
    box = tuple(slice(int(a), int(b) + 1) for a, b in zip(first[::-1], last[::-1], strict=True))
    return (box[0], box[1], box[2]), (x, y, z)


def _lowest_body_z(grid: Grid, pose: Pose) -> float:
    """Lowest body z that a grid shows."""
    ends = np.array([[-0.5, count - 0.5] for count in grid.shape])
    corners = np.array([[a, b, c, 1] for a in ends[0] for b in ends[1] for c in ends[2]]) @ grid.affine.T
    return float(((corners[:, :3] - pose.shift) @ pose.to_body_matrix().T)[:, 2].min())


def _paint_part(volume: Array, grid: Grid, pose: Pose, part: Part, value: float) -> None:
    found = _coordinates(grid, pose, part.bounds())
    if found is not None:
        box, (x, y, z) = found
        np.copyto(volume[box], np.float32(value), where=part.contains(x, y, z))


def _lesion_boxes(
    lesion: Lesion, pose: Pose, grid: Grid
) -> Iterator[tuple[tuple[slice, slice, slice], NDArray[np.bool_], Array, Array]]:
    """Index box, inside, SUV and HU of a lesion; nothing if it is out of view."""
    found = _coordinates(grid, pose, lesion.bounds())
    if found is not None:
        box, (x, y, z) = found
        radius, suv, hu = lesion.fields(x, y, z)
        yield box, radius <= 1, suv, hu


def _air_and_table(grid: Grid, pose: Pose) -> Array:
    """CT (Z, Y, X) before the patient: air, a table (foam in a shell) under the back, a head rest. World-aligned."""
    head, *back = pose.to_world(np.array([[0.0, -103.0, 122.0], [0.0, -104.0, -110.0], [0.0, -122.0, -150.0]]))
    top = min(float(point[1]) for point in (head, *back)) - 6.0
    x, y, z = (
        start + sign * size * np.arange(count)
        for start, sign, size, count in zip(grid.origin_mm, (-1, -1, 1), grid.spacing_mm, grid.shape, strict=True)
    )
    x = x - pose.shift[0]
    depth = top + 14.0 * (x / 200.0)[None, :] ** 2 - y[:, None]  # a shallow trough
    within = (np.abs(x) < 205)[None, :]
    slice_hu = np.where((depth > 0) & (depth < 34) & within, -880.0, -1000.0)
    slice_hu[((np.abs(depth - 3) < 3) | (np.abs(depth - 31) < 3)) & within] = -150.0
    volume = np.repeat(slice_hu.astype(np.float32)[None], len(z), axis=0)
    cushion = (np.abs(x) < 85)[None, :] & (depth <= 0) & (y[:, None] < head[1] + 12 + (x / 18.0)[None, :] ** 2)
    rest = np.where(cushion, np.float32(-820.0), volume[0])
    volume[np.abs(z - head[2]) < 75] = rest
    return volume


def _block_mean(volume: Array, factor: int) -> Array:
    """Mean over blocks of ``factor`` voxels along each axis."""
    if factor == 1:
        return volume
    for axis in range(3):
        shape = (*volume.shape[:axis], volume.shape[axis] // factor, factor, *volume.shape[axis + 1 :])
        volume = volume.reshape(shape).mean(axis=axis + 1, dtype=np.float32)
    return volume


def _finish_ct(volume: Array, rng: np.random.Generator, noise_hu: float, step: int) -> NDArray[np.int16]:
    """CT with grainy noise as int16, in steps of ``step`` HU from -1000 on.

    One slab of noise serves the whole volume, each slice with its own shift: much faster than fresh noise.
    """
    slab = ndimage.gaussian_filter(
        rng.standard_normal((16, *volume.shape[1:]), dtype=np.float32), (0, 0.6, 0.6), mode="wrap"
    )
    slab *= noise_hu / slab.std()
    shifts = rng.integers(0, volume.shape[1:], size=(len(volume), 2))
    result = np.empty(volume.shape, dtype=np.int16)
    for number, (image, shift) in enumerate(zip(volume, shifts, strict=True)):
        noisy = image + np.roll(slab[number % 16], shift, axis=(0, 1))
        result[number] = np.rint(np.maximum(noisy + 1000, 0) / step) * step - 1000
    return result


def _finish_pet(
    volume: Array, rng: np.random.Generator, slope: float, scanner: Scanner, grid: Grid
) -> NDArray[np.int16]:
    """PET with the scanner's noise, clipped at 0, in steps of ``slope`` SUV.

    The noise grows with the root of the uptake and is correlated over the grain; a voxel shows its mean (a box of
    width v is taken for a Gaussian of FWHM 0.68 v). In air it is positive with the mean ``air_suv``.
    """
    grain_mm = [math.hypot(scanner.grain_fwhm_mm, 0.68 * size) for size in grid.spacing_mm[::-1]]
    sigma = [mm / size / 2.355 for mm, size in zip(grain_mm, grid.spacing_mm[::-1], strict=True)]
    grain = ndimage.gaussian_filter(rng.standard_normal(volume.shape, dtype=np.float32), sigma, truncate=2.5)
    grain /= grain.std()
    kept = math.prod(math.sqrt(scanner.grain_fwhm_mm / mm) for mm in grain_mm)
    noisy = volume + np.float32(scanner.pet_noise * kept) * grain * np.sqrt(volume)
    noisy += np.float32(scanner.air_suv) * np.square(grain)
    return np.rint(np.maximum(noisy, 0) / slope).astype(np.int16)
