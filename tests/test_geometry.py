"""Grids and one-step resampling, held against scipy.ndimage and SimpleITK."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from scripts.imaging.geometry import (
    Grid,
    bounding_window,
    box_grid,
    field_of_view_fault,
    resample,
    share_inside,
    smooth_resample,
    spline_weights,
    to_ct_window,
)

SHAPE = (31, 27, 18)


def affine(spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), axes=(0, 1, 2), signs=(1, 1, 1), tilt_deg=0.0):
    """Affine whose array axis k runs along world axis ``axes[k]``, turned by ``tilt_deg`` about a skew direction."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for k, (axis, sign, step) in enumerate(zip(axes, signs, spacing, strict=True)):
        matrix[axis, k] = sign * step
    angle = np.deg2rad(tilt_deg)
    cross = np.array([[0, -0.6, 0.5], [0.6, 0, -0.62], [-0.5, 0.62, 0]])
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    matrix[:3, :3] = np.linalg.qr(turn)[0] @ np.diag(np.sign(np.diag(np.linalg.qr(turn)[1]))) @ matrix[:3, :3]
    matrix[:3, 3] = origin
    return matrix


SOURCES = [
    pytest.param(affine((1.5, 1.5, 3.0)), id="anisotropic"),
    pytest.param(affine((1.5, 1.5, 3.0), signs=(-1, -1, 1)), id="flipped_LPS"),
    pytest.param(affine((1.2, 1.4, 3.0), signs=(1, 1, -1)), id="head_at_low_z"),
    pytest.param(affine((2.0, 1.3, 1.7), axes=(2, 0, 1), signs=(-1, 1, -1)), id="axes_permuted_and_flipped"),
    pytest.param(affine((1.5, 1.5, 3.0), tilt_deg=12), id="oblique"),
    pytest.param(affine((1.4, 1.5, 2.5), axes=(1, 0, 2), signs=(-1, 1, 1), tilt_deg=25), id="oblique_and_permuted"),
]
WITHIN = (0.31, -0.17, 0.43)
SHIFTS = [
    pytest.param(WITHIN, id="within"),
    pytest.param((25.0, -14.0, 8.0), id="partly_outside"),
]


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def target_near(source: Grid, shift) -> Grid:
    return box_grid(source.centre + shift, (20, 22, 24), (1.7, 1.6, 1.5))


def positions(source: Grid, target: Grid) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, target.shape), indexing="ij"), axis=-1)
    return source.to_index(target.to_world(index))


def outside_of(source: Grid, target: Grid) -> np.ndarray:
    there = positions(source, target)
    return ((there < -0.5) | (there > np.array(source.shape) - 0.5)).any(axis=-1)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("source_affine", SOURCES)
@pytest.mark.parametrize(
    ("mode", "order", "beyond", "tolerance"),
    [("spline", 3, "mirror", 2e-5), ("linear", 1, "nearest", 2e-5), ("nearest", 0, "nearest", 0)],
    ids=["spline", "linear", "nearest"],
)
def test_resampling_is_scipys(noise, source_affine, shift, mode, order, beyond, tolerance):
    array = (np.abs(noise) * 2).astype(np.uint8) if mode == "nearest" else noise
    source = Grid(SHAPE, source_affine)
    target = target_near(source, shift)
    there, outside = np.moveaxis(positions(source, target), -1, 0), outside_of(source, target)
    expected = ndimage.map_coordinates(array.astype(float), there, order=order, mode=beyond)
    expected[outside] = -7.0
    np.testing.assert_allclose(resample(array, source, target, mode, -7.0), expected, rtol=0, atol=tolerance)
    assert 0 < outside.mean() < 1 or shift == WITHIN


@pytest.mark.parametrize("source_affine", SOURCES)
def test_spline_equals_itk(noise, source_affine):
    source = Grid(SHAPE, source_affine)
    target = box_grid(source.centre, (8, 8, 8), 1.3)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])

    def reference(grid: Grid, values: np.ndarray) -> sitk.Image:
        image = sitk.GetImageFromArray(np.ascontiguousarray(values.transpose()))
        matrix = lps @ grid.affine
        image.SetSpacing(grid.spacing.tolist())
        image.SetOrigin(matrix[:3, 3].tolist())
        image.SetDirection((matrix[:3, :3] / grid.spacing).ravel().tolist())
        return image

    frame = reference(target, np.zeros(target.shape, dtype=np.float32))
    moved = sitk.Resample(reference(source, noise), frame, sitk.Transform(), sitk.sitkBSpline, 0.0, sitk.sitkFloat64)
    expected = sitk.GetArrayFromImage(moved).transpose()
    np.testing.assert_allclose(resample(noise, source, target), expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_spline_matrix_passes_through_the_values(count):
    np.testing.assert_allclose(spline_weights(np.arange(count, dtype=float), count), np.eye(count), atol=1e-12)


@pytest.mark.parametrize("mode", ["spline", "linear", "nearest"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float64, np.dtype(">i2")])
def test_same_grid_gives_the_same_values(mode, order, dtype):
    values = np.random.default_rng(1).integers(0, 200, size=SHAPE).astype(dtype, order=order)
    grid = Grid(SHAPE, affine((1.5, 1.5, 3.0), signs=(-1, -1, 1)))
    result = resample(values, grid, grid, mode)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, values, atol=1e-4)


@pytest.mark.parametrize("mode", ["spline", "linear", "nearest"])
@pytest.mark.parametrize("tilt_deg", [0.0, 10.0])
def test_wholly_outside_is_fill(noise, mode, tilt_deg):
    source = Grid(SHAPE, affine((1.5, 1.5, 3.0), tilt_deg=tilt_deg))
    target = box_grid(source.centre + np.array([0, 0, 500.0]), 8, 2.0)
    assert np.array_equal(resample(noise, source, target, mode, -1024), np.full((8, 8, 8), -1024, dtype=np.float32))


@pytest.mark.parametrize("shape", [(1, 9, 9), (9, 1, 2), (1, 1, 1)])
@pytest.mark.parametrize("tilt_deg", [0.0, 5.0])
def test_thin_images(shape, tilt_deg):
    source = Grid(shape, affine((3.0, 3.0, 3.0), tilt_deg=tilt_deg))
    result = resample(np.full(shape, 5.0), source, box_grid(source.centre, 4, 0.5), "spline", 0.0)
    np.testing.assert_allclose(result, 5.0, atol=1e-5)


def test_rounding_of_an_affine_keeps_the_quick_route(noise):
    """A turn as small as float32 headers hold makes no difference beyond its own size."""
    source = Grid(SHAPE, affine((1.5, 1.5, 3.0)))
    jittered = source.affine.copy()
    jittered[:3, :3] += 1e-6
    target = box_grid(source.centre, 16, 1.5)
    np.testing.assert_allclose(
        resample(noise, Grid(SHAPE, jittered), target), resample(noise, source, target), atol=1e-3
    )


def test_only_the_slab_that_matters_is_read():
    """A NaN far from the target must not reach it: the rest of the source is never multiplied."""
    values = np.zeros((100, 100, 100), dtype=np.float32)
    values[:20] = np.nan
    source = Grid(values.shape, np.eye(4))
    assert np.isfinite(resample(values, source, box_grid((70, 50, 50), 16, 1.0))).all()


def test_autocast_does_not_touch_ct_values(noise):
    import torch

    source = Grid(SHAPE, np.eye(4))
    target = box_grid(source.centre, 8, 1.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = resample(noise * 1000, source, target)
    np.testing.assert_array_equal(inside, resample(noise * 1000, source, target))


@pytest.mark.parametrize("source_affine", SOURCES)
def test_smoothing_is_in_millimetres(source_affine):
    """A point becomes a Gaussian of the same width in mm whatever the voxels; a constant stays constant."""
    source = Grid((41, 39, 37), source_affine)
    point = np.zeros(source.shape)
    point[20, 19, 18] = 1.0 / source.voxel_ml
    look = box_grid(source.to_world([20, 19, 18]), 41, 1.5)
    blurred = smooth_resample(point, source, look, sigma_mm=4.0)
    world = look.to_world(np.argwhere(np.ones(look.shape))) - look.centre
    weight = blurred.ravel() / blurred.sum()
    np.testing.assert_allclose(np.sqrt(weight @ world**2), 4.0, rtol=0.08)
    constant = smooth_resample(np.full(source.shape, 3.0), source, box_grid(source.centre, 8, 2.0), 4.0)
    np.testing.assert_allclose(constant, 3.0, rtol=1e-5)


def sphere(grid: Grid, centre, radius_mm: float) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    return (np.linalg.norm(grid.to_world(index) - centre, axis=-1) <= radius_mm).astype(np.uint8)


def to_ct_grid(prob, box, ct):
    window, values = to_ct_window(prob, box, ct)
    whole = np.zeros(ct.shape, dtype=np.float32)
    whole[window] = values
    return whole


@pytest.mark.parametrize(
    "ct_affine",
    [
        pytest.param(affine((0.98, 0.98, 3.0), signs=(-1, -1, 1)), id="typical"),
        pytest.param(affine((1.0, 1.0, 2.0), axes=(1, 0, 2), signs=(1, -1, -1)), id="permuted"),
        pytest.param(affine((1.0, 1.0, 2.5), tilt_deg=10), id="oblique"),
    ],
)
def test_round_trip_of_a_sphere(ct_affine):
    ct = Grid((90, 84, 40), ct_affine)
    mask = sphere(ct, ct.centre, 18.0)
    box = box_grid(ct.centre + 3.1, 32, 2.0)
    restored = to_ct_grid(resample(mask, ct, box, "nearest"), box, ct) >= 0.5
    assert restored.shape == mask.shape
    dice = 2 * (restored & (mask > 0)).sum() / (restored.sum() + mask.sum())
    assert dice > 0.95
    assert restored.sum() * ct.voxel_ml == pytest.approx(mask.sum() * ct.voxel_ml, rel=0.06)


def test_only_the_boxs_window_of_the_ct_is_made():
    ct = Grid((100, 100, 50), affine((1.0, 1.0, 2.0)))
    box = box_grid((20.2, 30.3, 40.4), 10, 2.0)
    window, values = to_ct_window(np.ones(box.shape), box, ct)
    assert values.shape == tuple(s.stop - s.start for s in window)
    assert values.size < 0.03 * np.prod(ct.shape)
    assert to_ct_grid(np.ones(box.shape), box, ct).sum() == 20 * 20 * 10


def test_box_beside_the_ct_restores_nothing():
    ct = Grid((10, 10, 10), np.eye(4))
    box = box_grid((500, 0, 0), 8, 2.0)
    window, values = to_ct_window(np.ones(box.shape), box, ct)
    assert values.size == 0
    assert not to_ct_grid(np.ones(box.shape), box, ct).any()
    assert all(s.stop == s.start for s in window)


@pytest.mark.parametrize("source_affine", SOURCES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_share_inside_counts_voxels(source_affine, order):
    grid = Grid(SHAPE, source_affine)
    mask = np.asarray(np.random.default_rng(2).random(SHAPE) > 0.7, dtype=np.uint8, order=order)
    box = box_grid(grid.centre + 4.0, (12, 14, 10), 1.9)
    there = box.to_index(grid.to_world(np.argwhere(mask)))
    expected = ((there >= -0.5) & (there <= np.array(box.shape) - 0.5)).all(axis=1).mean()
    assert 0 < expected < 1
    assert share_inside(mask, grid, box) == pytest.approx(expected, abs=1e-12)


def test_share_inside_of_nothing_is_nan_and_of_elsewhere_zero():
    grid, box = Grid((9, 9, 9), np.eye(4)), box_grid((100, 0, 0), 8, 1.0)
    assert np.isnan(share_inside(np.zeros(grid.shape), grid, box))
    assert share_inside(np.ones(grid.shape), grid, box) == 0.0


@pytest.mark.parametrize("order", ["C", "F"])
def test_bounding_window(order):
    mask = np.zeros((9, 8, 7), order=order)
    assert bounding_window(mask) is None
    mask[2:4, 5, 1:6] = 1
    assert bounding_window(mask) == (slice(2, 4), slice(5, 6), slice(1, 6))


def test_grid_geometry():
    grid = Grid((10, 20, 5), affine((2.0, 1.0, 3.0), origin=(5, -3, 8), signs=(-1, 1, 1)))
    np.testing.assert_allclose(grid.spacing, [2, 1, 3])
    np.testing.assert_allclose(grid.extent, [20, 20, 15])
    np.testing.assert_allclose(grid.bounds, [[-14, -3.5, 6.5], [6, 16.5, 21.5]])
    np.testing.assert_allclose(grid.centre, grid.bounds.mean(axis=0))
    np.testing.assert_allclose(grid.to_index(grid.to_world([1.5, 2, 3])), [1.5, 2, 3])
    assert grid.voxel_ml == pytest.approx(0.006)
    window = (slice(2, 9), slice(3, 8), slice(1, 5))
    np.testing.assert_allclose(grid.crop(window, (3, 2, 1)).to_world([1, 1, 0]), grid.to_world([5, 5, 1]))
    assert grid.crop(window, (3, 2, 1)).shape == (3, 3, 4)


@pytest.mark.parametrize(
    ("shape", "matrix", "fault"),
    [
        pytest.param((512, 512, 1100), affine((0.98, 0.98, 2.0)), "", id="whole_body"),
        pytest.param((400, 400, 300), affine((2.04, 2.04, 3.0), tilt_deg=20), "", id="oblique"),
        pytest.param((300, 200, 200), affine((8.0, 4.0, 4.0)), "", id="head_to_foot_along_the_first_axis"),
        pytest.param((512, 512, 200), affine((1e-3, 1e-3, 3e-3)), "no scan of a body", id="micrometres"),
        pytest.param((512, 512, 200), affine((980, 980, 3000)), "no scan of a body", id="metres"),
        pytest.param((400, 400, 40), affine((4, 4, 3)), "1600 x 1600 x 120 mm", id="too_wide"),
        pytest.param((40, 40, 900), affine((4, 4, 3)), "160 x 160 x 2700 mm", id="too_long"),
        pytest.param((4096, 4096, 64), affine((0.1, 0.1, 1.0)), "more than any scan", id="too_many_voxels"),
        pytest.param((10**20, 5, 5), affine(), "more than any scan", id="beyond_int64"),
        pytest.param((50, 50, 50), affine(origin=(1e6, 0, 0)), "no place in a scanner", id="far_away"),
        pytest.param((50, 50, 50), np.zeros((4, 4)), "no usable voxel size", id="flat"),
        pytest.param((50, 50, 50), np.full((4, 4), np.nan), "no usable voxel size", id="not_numbers"),
        pytest.param((50, 50, 50), np.full((4, 4), np.inf), "no usable voxel size", id="infinite"),
    ],
)
def test_what_can_be_a_scan_of_a_body(shape, matrix, fault):
    told = field_of_view_fault(shape, matrix)
    assert fault in told
    assert bool(told) == bool(fault)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: Grid((3, 3), np.eye(4)), "three positive", id="two_axes"),
        pytest.param(lambda: Grid((3, 0, 3), np.eye(4)), "three positive", id="empty"),
        pytest.param(lambda: Grid((3, 3, 3), np.zeros((4, 4))), "invertible", id="no_volume"),
        pytest.param(lambda: Grid((3, 3, 3), np.full((4, 4), np.nan)), "invertible", id="nan"),
        pytest.param(
            lambda: resample(np.zeros((3, 3, 4)), Grid((3, 3, 3), np.eye(4)), box_grid((0, 0, 0), 4, 1.0)),
            "shape",
            id="array_of_another_shape",
        ),
        pytest.param(
            lambda: resample(np.zeros((3, 3, 3)), Grid((3, 3, 3), np.eye(4)), box_grid((0, 0, 0), 4, 1.0), "cubic"),
            "mode",
            id="unknown_mode",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
