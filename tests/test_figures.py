"""Pictures show what they say: the right slice, the right side, outlines where masks are."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from PIL import Image

from conftest import write_image
from scripts.imaging.geometry import Grid
from scripts.prediction.figures import (
    TUMOUR_COLOURS,
    case_figure,
    cut_views,
    draw_view,
    patient_frame,
    position_name,
    project,
    save_case_figure,
    tile,
)


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
    front, side = project((pet, grid), {"GTV": (mask, Grid(mask.shape, np.diag([-8.0, 8.0, 8.0, 1.0])))})
    assert (front.name, side.name) == ("coronal", "sagittal")
    assert front.pet.shape == side.pet.shape == (30, 20)
    assert not np.isnan(front.pet).any()
    assert np.argwhere(front.pet == 9.0).tolist() == [[4, 2]], "from the top, and from the patient's right"
    assert np.argwhere(side.pet == 9.0).tolist() == [[4, 14]], "from the front"
    assert front.extent == (2.0, -78.0, -2.0, 118.0)
    assert side.extent == (78.0, -2.0, -2.0, 118.0)
    assert front.window == (-6.0, -10.0, -2.0, 118.0), "cropped to what has uptake"
    shadow, (left, right, bottom, top) = front.masks["GTV"]
    assert ((left + right) / 2, (bottom + top) / 2) == (-8.0, 96.0)
    assert shadow.sum() == 1


def test_projections_of_a_turned_pet_lose_nothing() -> None:
    pet = np.zeros((24, 24, 24), dtype=np.float32)
    pet[8:14, 8:14, 8:14] = 5.0
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]]
    grid = Grid(pet.shape, turn @ np.diag([4.0, 4.0, 4.0, 1.0]))
    front, side = project((pet, grid), {"GTV": (np.zeros((2, 2, 2), dtype=np.uint8), grid.crop((slice(0, 2),) * 3))})
    assert not front.masks
    for projection in (front, side):
        rows, columns = np.argwhere(projection.pet == 5.0).mean(axis=0)
        left, right, bottom, top = projection.extent
        world = grid.to_world([10.5, 10.5, 10.5])[[0 if projection is front else 1, 2]]
        height, width = projection.pet.shape
        found = (left + (columns + 0.5) * (right - left) / width, top + (rows + 0.5) * (bottom - top) / height)
        assert np.abs(world - found).max() < 3.0


def body(width: int, depth: int, length: int = 100) -> tuple[np.ndarray, Grid]:
    """A block of tissue of so many voxels of 4 mm in the middle of 160 x 160 x ``length``, world 0 in its middle."""
    ct = np.full((160, 160, length), -1000, dtype=np.int16)
    ct[80 - width // 2 : 80 + width // 2, 80 - depth // 2 : 80 + depth // 2] = 40
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = [-318, -318, -2.0 * length + 2]
    return ct, Grid(ct.shape, affine)


@pytest.mark.parametrize(
    ("width", "depth", "point", "centre", "size"),
    [
        pytest.param(40, 30, (30, 10, 0), (0, 0, 0), 176, id="a head: all of it, in its middle"),
        pytest.param(10, 10, (0, 0, 0), (0, 0, 0), 120, id="a limb: not smaller than 120 mm"),
        pytest.param(120, 60, (150, 0, 0), (126, 0, 0), 240, id="shoulders: 240 mm around the lesion, within the body"),
        pytest.param(120, 60, (40, 0, 0), (40, 0, 0), 240, id="shoulders: centred on the lesion"),
        pytest.param(40, 30, (0, 0, 190), (0, 0, 112), 176, id="not beyond the end of the scan"),
    ],
)
def test_pictures_are_cropped_to_the_patient(width, depth, point, centre, size) -> None:
    frame = patient_frame(body(width, depth), np.array(point, dtype=float))
    assert frame.size_mm == pytest.approx(size, abs=8)
    assert frame.centre_mm == pytest.approx(centre, abs=8)


def test_without_a_body_the_picture_is_240_mm_around_the_point() -> None:
    ct, grid = body(40, 30)
    frame = patient_frame((np.full_like(ct, -1000), grid), np.array([10.0, 20.0, 0.0]))
    assert frame.size_mm == 240
    assert frame.centre_mm == pytest.approx([10, 20, 0])


def test_a_lesion_is_seen_at_its_place_in_a_frame_that_is_not_centred_on_it() -> None:
    ct, grid = body(40, 30)
    mask = np.zeros(ct.shape, dtype=np.uint8)
    mask[86:90, 82:86, 50:54] = 1
    point = grid.to_world(np.argwhere(mask).mean(axis=0))
    views = cut_views((ct, grid), (ct, grid), {"GTVn": (mask, grid)}, point)
    size = len(views.ct[0])
    assert size == round(views.frame.size_mm)
    for plane, (across, along) in enumerate(((0, 1), (0, 2), (1, 2))):
        row, column = np.argwhere(views.outlines["GTVn"][plane] > 0.5).mean(axis=0)
        offset = views.frame.centre_mm - point
        assert column - (size - 1) / 2 == pytest.approx(offset[across], abs=1.5)
        assert row - (size - 1) / 2 == pytest.approx(offset[along], abs=1.5)


@pytest.mark.parametrize("name", ["GTV", "GTVp", "GTVn"])
def test_a_class_has_its_colour_in_every_picture(name) -> None:
    ct, grid, mask = scene()
    views = cut_views((ct, grid), (ct / 20, grid), {name: (mask, grid)})
    panel = Figure().subplots()
    draw_view(panel, views, "fusion", 0)
    (contour,) = [c for c in panel.get_children() if isinstance(c, QuadContourSet)]
    assert to_hex(contour.get_edgecolor()[0]) == TUMOUR_COLOURS[name]


@pytest.mark.parametrize("row", ["CT", "PET", "fusion"])
@pytest.mark.parametrize("suv", [0.0, 5.0, 12.0], ids=["cold", "red_in_hot", "white_in_hot"])
@pytest.mark.parametrize("name", ["GTVp", "GTVn"])
def test_an_outline_is_seen_on_any_uptake_by_lightness_alone(name, suv, row) -> None:
    ct, grid, mask = scene()
    views = cut_views((ct, grid), (np.full(ct.shape, suv, dtype=np.float32), grid), {name: (mask, grid)})
    plain = cut_views((ct, grid), (np.full(ct.shape, suv, dtype=np.float32), grid), {})
    outlined, without = (lightness(tile(each, row, 0)) for each in (views, plain))
    assert (outlined - without).max() > 0.25 or (without - outlined).max() > 0.25
    line = outlined[np.abs(outlined - without) > 0.05]
    assert line.max() - line.min() > 0.5, "a light rim beside a dark one"


def lightness(png: bytes) -> np.ndarray:
    """Of a picture, 0 to 1, as a reader sees it who distinguishes no colours."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=float) / 255


@pytest.mark.parametrize(
    ("axis", "position", "said"),
    [(0, 3.24, "R 3.2 mm"), (0, -3.2, "L 3.2 mm"), (1, 5.0, "A 5.0 mm"), (1, -5.0, "P 5.0 mm"), (2, -7.0, "I 7.0 mm")],
)
def test_positions_are_named_by_their_side(axis, position, said) -> None:
    point = np.zeros(3)
    point[axis] = position
    assert position_name(point, axis) == said


def test_a_tile_says_what_it_shows(monkeypatch) -> None:
    said = []
    monkeypatch.setattr("scripts.prediction.figures._say", lambda panel, x, y, text, *more, **style: said.append(text))
    ct, grid, mask = scene()
    views = cut_views((ct, grid), (ct / 20, grid), {"GTV": (mask, grid)}, grid.to_world([12.5, 42.5, 42.5]))
    assert tile(views, "PET", 1).startswith(b"\x89PNG")
    assert said == ["PET coronal\nA 170.0 mm", "S", "I", "R", "L", "5 cm", "12", "0 SUV"]
    said.clear()
    tile(views, "CT", 2)
    assert said == ["CT sagittal\nL 50.0 mm", "S", "I", "A", "P", "5 cm"], "a CT has no SUV bar"
