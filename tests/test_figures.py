"""Pictures show what they say: the right slice, the right side, outlines where masks are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.contour import QuadContourSet

from conftest import write_image
from scripts.imaging.geometry import Grid
from scripts.prediction.figures import case_figure, project, save_case_figure


def scene() -> tuple[np.ndarray, Grid, np.ndarray]:
    """A block of tissue with a bright cube in front, on the side where the x index is small, and its mask."""
    ct = np.full((60, 60, 60), 40.0, dtype=np.float32)
    mask = np.zeros(ct.shape, dtype=np.uint8)
    mask[10:16, 40:46, 40:46] = 1  # with the affine below, world x falls with the index and world y grows
    ct[mask > 0] = 240.0
    return ct, Grid(ct.shape, np.diag([-4.0, 4.0, 4.0, 1.0])), mask


def test_every_panel_is_centred_on_the_lesion_and_outlined() -> None:
    ct, grid, mask = scene()
    figure = case_figure((ct, grid), (ct / 20, grid), {"true": (mask, grid)}, "P-001")
    assert len(figure.axes) == 9
    for panel in figure.axes:
        contours = [c for c in panel.get_children() if isinstance(c, QuadContourSet)]
        assert len(contours) == 1
    for panel in figure.axes[:3]:
        image = np.asarray(panel.get_images()[0].get_array())
        middle = image[image.shape[0] // 2 - 3 : image.shape[0] // 2 + 3, image.shape[1] // 2 - 3 :][:, :6]
        assert middle.min() > 200


def test_axial_slices_have_anterior_up_and_the_left_side_on_the_right() -> None:
    ct, grid, mask = scene()
    marker = np.zeros_like(ct)
    marker[10:16, 40:46, 40:46] = 1
    marker[0:6, 50:56, 40:46] = 240  # smaller index: further to the right, since x falls with it; and further in front
    figure = case_figure((marker, grid), (marker, grid), {"true": (mask, grid)})
    image = np.asarray(figure.axes[0].get_images()[0].get_array())
    row, column = np.argwhere(image > 200).mean(axis=0)
    assert row < image.shape[0] / 2, "in front of the middle is above it"
    right_of_patient = grid.to_world([3, 50, 43])[0] > grid.to_world([13, 43, 43])[0]
    assert (column < image.shape[1] / 2) == right_of_patient, "the patient's right is on the left of the picture"


def test_without_a_mask_the_middle_of_the_ct_is_shown() -> None:
    ct, grid, _ = scene()
    figure = case_figure((ct, grid), (ct, grid), {"predicted": (np.zeros(ct.shape), grid)})
    assert not [c for panel in figure.axes for c in panel.get_children() if isinstance(c, QuadContourSet)]


def test_png_from_files(tmp_path: Path) -> None:
    ct, _, mask = scene()
    write_image(tmp_path / "ct.nii.gz", ct, 4.0)
    write_image(tmp_path / "mask.nii.gz", mask, 4.0)
    path = tmp_path / "figures" / "case.png"
    save_case_figure(
        path, tmp_path / "ct.nii.gz", tmp_path / "ct.nii.gz", {"true": tmp_path / "mask.nii.gz"}, r"P-$\\frac{$"
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_projections_show_all_of_the_pet_where_it_is() -> None:
    pet = np.zeros((20, 20, 30), dtype=np.float32)
    pet[2, 5, 25] = 9.0  # voxels of 4 mm, x against the world's: world x -8, y 20, z 100
    pet[10, 10, 3] = np.nan
    grid = Grid(pet.shape, np.diag([-4.0, 4.0, 4.0, 1.0]))
    mask = np.zeros((10, 10, 15), dtype=np.uint8)
    mask[1, 2, 12] = 1
    front, side = project((pet, grid), (mask, Grid(mask.shape, np.diag([-8.0, 8.0, 8.0, 1.0]))))
    assert (front.name, side.name) == ("coronal", "sagittal")
    assert front.pet.shape == side.pet.shape == (30, 20)
    assert not np.isnan(front.pet).any()
    assert np.argwhere(front.pet == 9.0).tolist() == [[4, 2]], "from the top, and from the patient's right"
    assert np.argwhere(side.pet == 9.0).tolist() == [[4, 14]], "from the front"
    assert front.extent == (2.0, -78.0, -2.0, 118.0)
    assert side.extent == (78.0, -2.0, -2.0, 118.0)
    assert front.proportion == 1.5
    left, right, bottom, top = front.mask_extent
    assert ((left + right) / 2, (bottom + top) / 2) == (-8.0, 96.0)
    assert front.mask is not None
    assert front.mask.sum() == 1


def test_projections_of_a_turned_pet_lose_nothing() -> None:
    pet = np.zeros((24, 24, 24), dtype=np.float32)
    pet[8:14, 8:14, 8:14] = 5.0
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]]
    grid = Grid(pet.shape, turn @ np.diag([4.0, 4.0, 4.0, 1.0]))
    front, side = project((pet, grid), (np.zeros((2, 2, 2), dtype=np.uint8), grid.crop((slice(0, 2),) * 3)))
    assert front.mask is None
    for projection in (front, side):
        rows, columns = np.argwhere(projection.pet == 5.0).mean(axis=0)
        left, right, bottom, top = projection.extent
        world = grid.to_world([10.5, 10.5, 10.5])[[0 if projection is front else 1, 2]]
        height, width = projection.pet.shape
        found = (left + (columns + 0.5) * (right - left) / width, top + (rows + 0.5) * (bottom - top) / height)
        assert np.abs(world - found).max() < 3.0
