"""Connected components of masks: what is a lesion, what it is called, how long it is."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from scripts.imaging.geometry import Grid
from scripts.imaging.lesions import APART, MERGED, find_lesions, longest_diameter, without_faint_lesions

GRID = Grid((30, 30, 30), np.diag([2.0, 2.0, 2.0, 1.0]))  # 0.008 ml a voxel


def mask_of(*boxes: tuple[int, int, int, int], dtype: type = np.uint8) -> np.ndarray:
    """A mask with cubes: first voxel on all axes, edge, shift along x, value."""
    mask = np.zeros(GRID.shape, dtype=dtype)
    for first, edge, shift, value in boxes:
        cube = slice(first, first + edge)
        mask[first + shift : first + shift + edge, cube, cube] = value
    return mask


@pytest.mark.parametrize(
    ("mask", "classes", "names"),
    [
        pytest.param(mask_of((2, 4, 0, 1)), MERGED, ["GTV"], id="one"),
        pytest.param(mask_of((2, 4, 0, 1), (10, 5, 0, 1)), MERGED, ["GTV_01", "GTV_02"], id="two"),
        pytest.param(mask_of((2, 4, 0, 1), (6, 4, 0, 1)), MERGED, ["GTV"], id="corners_join"),
        pytest.param(mask_of((2, 4, 0, 1), (2, 4, 4, 2)), APART, ["GTVp", "GTVn"], id="classes_that_touch"),
        pytest.param(
            mask_of((2, 3, 0, 2), (10, 5, 0, 2), (20, 4, 0, 1)), APART, ["GTVn_01", "GTVp", "GTVn_02"], id="nodes"
        ),
        pytest.param(mask_of((2, 3, 0, 2)), APART, ["GTVn"], id="no_primary"),
        pytest.param(mask_of((2, 4, 0, 1), (10, 2, 0, 1)), MERGED, ["GTV"], id="too_small_has_no_number"),
        pytest.param(mask_of((2, 2, 0, 1)), MERGED, [], id="too_small"),
        pytest.param(mask_of((2, 4, 0, 1)) > 0, MERGED, ["GTV"], id="bool"),
        pytest.param(mask_of(), MERGED, [], id="empty"),
    ],
)
def test_names_and_order(mask: np.ndarray, classes: tuple[str, ...], names: list[str]) -> None:
    lesions = find_lesions(mask, GRID, classes)
    assert [lesion.name for lesion in lesions.found] == names
    volumes = [lesion.volume_ml for lesion in (*lesions.found, *lesions.small)]
    assert volumes == sorted(volumes, reverse=True)
    assert sum(volumes) == pytest.approx((mask > 0).sum() * 0.008)
    whole = lesions.on(mask.shape)
    for number, lesion in enumerate(lesions.found, start=1):
        assert classes[mask[whole == number].max() - 1] == lesion.label == lesion.name.partition("_")[0]
        assert (whole == number).sum() * 0.008 == pytest.approx(lesion.volume_ml)
        np.testing.assert_allclose(lesion.centre_mm, 2.0 * np.argwhere(whole == number).mean(axis=0))
        assert (whole[lesion.window] == number).sum() == (whole == number).sum()
    assert whole.max() == len(names) and not whole[mask == 0].any()


def test_ten_lesions_and_more_have_numbers_of_two_digits() -> None:
    corners = product(range(0, 28, 9), range(0, 28, 9), (0, 9))
    mask = np.zeros(GRID.shape, dtype=np.uint8)
    for x, y, z in corners:
        mask[x : x + 3, y : y + 3, z : z + 3] = 1
    assert find_lesions(mask, GRID).found[-1].name == "GTV_32"


@pytest.mark.parametrize("value", [2, 255])
def test_values_without_a_class_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=r"other than 0 to 1 \(GTV\)"):
        find_lesions(mask_of((2, 4, 0, value)), GRID)


def test_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match="values other than"):
        find_lesions(mask_of((2, 4, 0, 1), dtype=float), GRID)


ANGLE = np.deg2rad(30)
TURNED = np.array(
    [[np.cos(ANGLE), -np.sin(ANGLE), 0, 5], [np.sin(ANGLE), np.cos(ANGLE), 0, 9], [0, 0, 1, 2], [0, 0, 0, 1]]
)


@pytest.mark.parametrize(
    "affine", [np.diag([1.0, 1, 3, 1]), TURNED @ np.diag([1.0, 2, 3, 1])], ids=["straight", "oblique"]
)
def test_diameter_is_the_longest_of_all_pairs(affine: np.ndarray) -> None:
    part = np.random.default_rng(3).random((6, 5, 4)) > 0.4
    voxels = np.argwhere(part)
    faces = np.concatenate([voxels + sign * 0.5 * np.eye(3)[axis] for axis in range(3) for sign in (-1, 1)])
    expected = pdist(faces @ affine[:3, :3].T).max()
    assert longest_diameter(part, Grid(part.shape, affine)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        pytest.param((1, 1, 1), 3.0, id="a_voxel_has_its_longest_edge"),
        pytest.param((10, 1, 1), 10.0, id="a_row"),
        pytest.param((1, 1, 5), 15.0, id="a_column"),
    ],
)
def test_diameter_of_lesions_without_a_volume(shape: tuple[int, int, int], expected: float) -> None:
    assert longest_diameter(np.ones(shape, dtype=bool), Grid(shape, np.diag([1.0, 1, 3, 1]))) == pytest.approx(expected)


def test_diameter_of_a_ball() -> None:
    where = np.stack(np.meshgrid(*[np.arange(61) - 30.0] * 3, indexing="ij"))
    ball = np.linalg.norm(where, axis=0) <= 25
    assert longest_diameter(ball, Grid(ball.shape, np.eye(4))) == pytest.approx(50, abs=1.1)


# --- faint lesions -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "peak", "expected"),
    [
        pytest.param([0.6, 0.1, 0.6, 0.9], 0.7, [0.5, 0.1, 0.6, 0.9], id="the_confident_one_is_kept_whole"),
        pytest.param([0.6, 0.5, 0.9, 0.4], 0.7, [0.5, 0.5, 0.9, 0.4], id="at_the_threshold_it_does_not_connect"),
        pytest.param([0.6, 0.51, 0.71, 0.2], 0.7, [0.6, 0.51, 0.71, 0.2], id="connected"),
        pytest.param([0.7, 0.0, 0.0, 0.8], 0.7, [0.5, 0.0, 0.0, 0.8], id="at_the_peak_is_not_above_it"),
        pytest.param([0.6, 0.0, 0.65, 0.1], 0.7, [0.5, 0.0, 0.5, 0.1], id="none_is_left"),
        pytest.param([0.6, 0.0, 0.9, 0.0], 0.5, [0.6, 0.0, 0.9, 0.0], id="a_peak_of_the_threshold_keeps_all"),
        pytest.param([0.2, 0.0, 0.5, 0.1], 0.7, [0.2, 0.0, 0.5, 0.1], id="no_tumour"),
    ],
)
@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_lesions_without_a_confident_voxel_are_left_out(row, peak, expected, axis, kind) -> None:
    shape = [4 if k == axis else 1 for k in range(3)]
    given = np.array(row, dtype=kind).reshape(shape)
    before = given.copy()
    found = without_faint_lesions(given, peak)
    assert found.dtype == kind and found.ravel().tolist() == np.array(expected, dtype=kind).tolist()
    np.testing.assert_array_equal(given, before)


def test_corners_connect() -> None:
    given = np.full((2, 2, 2), 0.1)
    given[0, 0, 0], given[1, 1, 1] = 0.6, 0.9
    np.testing.assert_array_equal(without_faint_lesions(given, 0.7), given)


def test_the_threshold_of_faint_lesions_is_the_masks() -> None:
    given = np.array([[[0.35, 0.1, 0.6, 0.4]]])
    assert without_faint_lesions(given, 0.5, threshold=0.3).ravel().tolist() == [0.3, 0.1, 0.6, 0.4]
