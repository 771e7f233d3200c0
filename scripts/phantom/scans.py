"""CT, PET and tumour mask of a patient, as the patient's hospital scans."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from scripts.keys import GTVN, GTVP

from .anatomy import build_anatomy
from .patients import STREAM_CT, STREAM_PET, STREAM_SCAN, Patient, stream
from .shapes import Array, Part, Pose, Vector
from .tumours import Lesion

SCALES = ("small", "full")


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


def scan_patient(patient: Patient, seed: int, index: int, scale: str) -> Scan:
    """CT, PET and tumour mask of a patient.

    Args:
        patient: ``draw_patient(seed, index)``.
        seed: As of the patient; with ``index`` it also decides positioning and noise.
        index: As of the patient.
        scale: ``full`` (voxels and extents as the centres scan) or ``small`` (6 to 7 mm voxels, 0.3 m field of view).

    Raises:
        ValueError: If the scale is neither.
    """
    ct_grid, pet_grid = scan_grids(patient, stream(seed, index, STREAM_SCAN), scale)
    floor = min(_lowest_body_z(grid, patient.pose) for grid in (ct_grid, pet_grid))
    anatomy = build_anatomy({**patient.body, "contrast_hu": patient.centre.contrast_hu}, patient.lesions)
    parts = [part for part in anatomy if part.bounds()[1, 2] >= floor]  # most of the trunk is out of a neck scan
    small = scale == "small"
    noise_hu, ct_step = (5.0, 6) if small else (patient.centre.ct_noise_hu, 1)
    pet_slope = 0.04 if small else 0.002
    ct_hu = paint_ct(patient, parts, ct_grid, oversample=2 if small else 1)
    pet_suv = paint_pet(patient, parts, pet_grid, fwhm_mm=6.5)
    ct = _finish_ct(ct_hu, stream(seed, index, STREAM_CT), noise_hu, ct_step)
    pet = _finish_pet(pet_suv, stream(seed, index, STREAM_PET), pet_slope, noise=0.05 if small else 0.09)
    mask = paint_mask(patient, ct_grid, oversample=2 if small else 1)
    return Scan(ct.T, ct_grid, pet.T, pet_slope, pet_grid, mask.T)


def scan_grids(patient: Patient, rng: np.random.Generator, scale: str) -> tuple[Grid, Grid]:
    """CT and PET grid of a patient: each with its own voxels, extent and origin.

    In one patient of 25 the scan starts below the top of the head, so that the brain is cut.

    Raises:
        ValueError: If ``scale`` is not one of ``SCALES``.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}: give one of {', '.join(SCALES)}")
    centre, pose = patient.centre, patient.pose
    top = pose.to_world(np.array([[0.0, -8.0, 192.0]]))[0]
    middle = pose.to_world(np.array([[0.0, -22.0, 0.0]]))[0]
    above = float(rng.uniform(-45, -25)) if rng.random() < 0.04 else float(rng.uniform(8, 30))
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
    """Noise-free CT (Z, Y, X) in HU: air, table, body, tumours."""
    fine = grid.finer(oversample)
    volume = _air_and_table(fine, patient.pose)
    for part in parts:
        if part.hu is not None:
            _paint_part(volume, fine, patient.pose, part, part.hu)
    for lesion in patient.lesions:
        for box, inside, _, hu in _lesion_boxes(lesion, patient.pose, fine):
            np.copyto(volume[box], hu, where=inside)
    return _block_mean(volume, oversample)


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
    """Tumour mask (Z, Y, X): a voxel is tumour where lesions fill at least half of it, of the kind that fills more."""
    fine = grid.finer(oversample)
    kind = np.zeros(fine.shape[::-1], dtype=np.uint8)
    for lesion in patient.lesions:
        for box, inside, _, _ in _lesion_boxes(lesion, patient.pose, fine):
            kind[box][inside] = lesion.label
    if oversample == 1:
        return kind
    primary, nodes = (_block_mean((kind == label).astype(np.float32), oversample) for label in (GTVP, GTVN))
    return np.where(primary + nodes >= 0.5, np.where(nodes > primary, GTVN, GTVP), 0).astype(np.uint8)


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


def _finish_pet(volume: Array, rng: np.random.Generator, slope: float, noise: float) -> NDArray[np.int16]:
    """PET with noise that grows with the square root of uptake, clipped at 0, in steps of ``slope`` SUV."""
    grain = ndimage.gaussian_filter(rng.standard_normal(volume.shape, dtype=np.float32), 0.5)
    grain *= noise / grain.std()
    noisy = volume + grain * np.sqrt(volume)
    return np.rint(np.maximum(noisy, 0) / slope).astype(np.int16)
