"""Pictures of a case: CT, PET and both fused, in three planes through the tumour, and the PET projected as a whole.

The colours of the tumour are those of :data:`scripts.imaging.lesions.COLOURS`, here as in the DICOM segmentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from scipy import ndimage

from scripts.cohorts.files import written_whole
from scripts.evaluation.plots import as_written, png_of
from scripts.imaging.geometry import Grid, bounding_window, box_grid, resample
from scripts.imaging.images import read_image
from scripts.imaging.lesions import COLOURS, find_lesions

CT_WINDOW_HU = (-160.0, 240.0)  # soft tissue
PET_WINDOW_SUV = (0.0, 12.0)
FUSION_OPACITY = 0.75  # of the hottest uptake; without uptake the CT alone is seen
TUMOUR_COLOURS = {name: "#" + "".join(f"{part:02x}" for part in colour) for name, colour in COLOURS.items()}
TUMOUR_COLOUR_NAMES = {"GTV": "red", "GTVp": "red", "GTVn": "blue"}
OUTLINE_COLOURS = ("#00e5ff", TUMOUR_COLOURS["GTV"], "#ffd60a")  # of masks that are compared: true, predicted, other
DISPLAY_VOXELS, DISPLAY_MM = 240, 1.0
PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))  # name, and the world axis across it
CT, PET, FUSION = "CT", "PET", "fusion"
ROWS = (CT, PET, FUSION)
INFLUENCE = "influence"
EDGES = ("APRL", "SIRL", "SIAP")  # letters at the top, bottom, left and right of each plane
DIRECTIONS = ("RL", "AP", "SI")  # letters of positive and negative positions along the world axes (RAS+)
BODY_HU, BODY_STEP_MM, BODY_REACH_MM, BODY_MARGIN_MM = -300.0, 4.0, 600.0, 10.0
SMALLEST_FRAME_MM = 120.0
BODY_SUV = 0.2  # a projection is cut where nothing reaches it
SCALE_MM = 50.0
TILE_INCH, TILE_DPI = 2.4, 180

OUTLINE_WIDTH, RIM_WIDTHS = 1.5, (4.0, 3.0)  # in points; of both rims, outer and inner
LIGHT = 0.5  # luminance, from which on a colour is seen on black rather than on white

Scan = tuple[np.ndarray, Grid]  # (X, Y, Z), of CT in HU, of PET in SUV, or label numbers; and its grid


@dataclass(frozen=True, eq=False)
class Frame:
    """What the planes through a point show of the patient: squares of one size."""

    centre_mm: np.ndarray  # (3,) middle of the squares, world mm (RAS+)
    size_mm: float  # edge


@dataclass(frozen=True, eq=False)
class Views:
    """Three planes of a case through a point, rows from superior or anterior, columns from the patient's right."""

    centre_mm: np.ndarray  # (3,) the point, world mm (RAS+)
    frame: Frame  # what is shown around it
    ct: list[np.ndarray]  # a picture a plane of PLANES, in HU
    pet: list[np.ndarray]  # likewise, in SUV
    outlines: dict[str, list[np.ndarray]]  # name of a mask to its pictures, 0 to 1; the outline is at one half


@dataclass(frozen=True, eq=False)
class Projection:
    """A maximum intensity projection of the whole PET, with the mask projected likewise."""

    name: str  # of the plane
    pet: np.ndarray  # (rows from superior, columns from the patient's right or front), in SUV
    extent: tuple[float, float, float, float]  # left, right, bottom and top of pet in world mm
    # name to mask (0 and 1) and its extent; those that are empty are left out
    masks: Mapping[str, tuple[np.ndarray, tuple[float, float, float, float]]]

    @property
    def window(self) -> tuple[float, float, float, float]:
        """The part of ``extent`` with the patient in it."""
        left, right, bottom, top = self.extent
        columns = np.flatnonzero((self.pet > BODY_SUV).any(axis=0))
        if not len(columns):
            return self.extent
        step = (right - left) / self.pet.shape[1]
        return left + columns[0] * step, left + (columns[-1] + 1) * step, bottom, top


def patient_frame(ct: Scan, point_mm: np.ndarray) -> Frame:
    """The frame that is cropped to the patient: the body in the axial plane, at most 240 mm, and in the CT's length.

    Where the body is wider than the frame, the frame moves towards the point, and does not leave the body.
    """
    steps = round(BODY_REACH_MM / BODY_STEP_MM)
    around = box_grid(point_mm, (steps, steps, 1), BODY_STEP_MM)
    parts, count = ndimage.label(resample(*ct, around, "linear", -1024.0)[..., 0] > BODY_HU)
    low, high = (point_mm + side * DISPLAY_VOXELS * DISPLAY_MM / 2 for side in (-1, 1))
    if count:
        body = np.argwhere(parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:])))
        corners = [around.to_world([*corner, 0]) for corner in (body.min(axis=0), body.max(axis=0))]
        low[:2], high[:2] = corners[0][:2] - BODY_MARGIN_MM, corners[1][:2] + BODY_MARGIN_MM
    low[2], high[2] = ct[1].bounds[:, 2]
    size = float(np.clip((high - low)[:2].max(), SMALLEST_FRAME_MM, DISPLAY_VOXELS * DISPLAY_MM))
    room = np.maximum(high - low - size, 0.0) / 2
    middle = (low + high) / 2
    return Frame(middle + np.clip(point_mm - middle, -room, room), size)


def cut_views(ct: Scan, pet: Scan, masks: Mapping[str, Scan], point_mm: np.ndarray | None = None) -> Views:
    """Three planes through a point, cropped to the patient; without one, 240 mm through the largest lesion.

    Only what is shown is resampled. The largest lesion is that of the first mask that is not empty. Without a lesion
    the planes go through the middle of the CT.
    """
    small = {name: _cropped(*mask) for name, mask in masks.items()}
    point = middle_of(ct, small) if point_mm is None else point_mm
    frame = Frame(point, DISPLAY_VOXELS * DISPLAY_MM) if point_mm is None else patient_frame(ct, point)
    return Views(
        point,
        frame,
        cut_planes(*ct, point, frame, fill=-1024.0),
        cut_planes(*pet, point, frame),
        {name: cut_planes(*mask, point, frame) for name, mask in small.items()},
    )


def cut_planes(
    array: np.ndarray, grid: Grid, point_mm: np.ndarray, frame: Frame, fill: float = 0.0
) -> list[np.ndarray]:
    """The pictures (R, R) of :data:`PLANES` through a point, linearly interpolated; ``fill`` out of view."""
    pictures = []
    for _, axis in PLANES:
        shape, centre = [round(frame.size_mm / DISPLAY_MM)] * 3, frame.centre_mm.copy()
        shape[axis], centre[axis] = 1, point_mm[axis]
        pictures.append(_slice(resample(array, grid, box_grid(centre, shape, DISPLAY_MM), "linear", fill), axis))
    return pictures


def project(pet: Scan, masks: Mapping[str, Scan]) -> list[Projection]:
    """Maximum intensity projections of the whole field of view, from the front and from the side.

    The PET may have any orientation, and the masks another grid.
    """
    upright, grid = _upright(*pet)
    labels = {name: _upright(*_cropped(*mask)) for name, mask in masks.items()}
    projections = []
    for name, axis in PLANES[1:]:
        shadows = {
            kind: (_slice(array.max(axis=axis, keepdims=True), axis), _extent(own, axis))
            for kind, (array, own) in labels.items()
            if array.any()
        }
        seen = np.fmax.reduce(upright, axis=axis, keepdims=True)  # NaN of a damaged PET are passed over
        projections.append(Projection(name, _slice(seen, axis), _extent(grid, axis), shadows))
    return projections


def draw_view(panel: Axes, views: Views, row: str, plane: int) -> None:
    """Draw one picture, of a row of :data:`ROWS` and a plane of :data:`PLANES` (its index), with all outlines."""
    low, high = PET_WINDOW_SUV
    uptake = views.pet[plane]
    if row != PET:
        panel.imshow(views.ct[plane], cmap="gray", vmin=CT_WINDOW_HU[0], vmax=CT_WINDOW_HU[1])
    if row == PET:
        panel.imshow(uptake, cmap="gray_r", vmin=low, vmax=high)
    if row == FUSION:
        opacity = FUSION_OPACITY * np.sqrt(np.clip((np.nan_to_num(uptake) - low) / (high - low), 0, 1))
        panel.imshow(uptake, cmap="hot", vmin=low, vmax=high, alpha=opacity)
    _outlines(panel, views, plane)


def draw_influence(panel: Axes, views: Views, plane: int, influence: np.ndarray, limit: float) -> None:
    """Draw what moved the risk over the CT: red raised it, blue lowered it, and what did neither is not seen.

    ``influence`` is the picture of that plane, see :func:`cut_planes`; ``limit`` is the value of the deepest colours.
    """
    panel.imshow(views.ct[plane], cmap="gray", vmin=CT_WINDOW_HU[0], vmax=CT_WINDOW_HU[1])
    opacity = np.clip(np.abs(influence) / limit, 0, 1) ** 0.7 * 0.8
    panel.imshow(influence, cmap="bwr", vmin=-limit, vmax=limit, alpha=opacity)
    _outlines(panel, views, plane)


def draw_projection(panel: Axes, projection: Projection) -> None:
    """Draw a projection of the PET with the masks' outlines, in its true proportions, cropped to the patient."""
    low, high = PET_WINDOW_SUV
    panel.imshow(projection.pet, cmap="gray_r", vmin=low, vmax=high, extent=projection.extent, aspect="equal")
    for name, (mask, extent) in projection.masks.items():
        left, right, bottom, top = extent
        rows, columns = mask.shape
        drawn = panel.contour(
            left + (np.arange(columns) + 0.5) * (right - left) / columns,
            top + (np.arange(rows) + 0.5) * (bottom - top) / rows,
            mask,
            levels=[0.5],
            colors=[TUMOUR_COLOURS[name]],
        )
        _rim(drawn, TUMOUR_COLOURS[name])
    left, right, bottom, top = projection.window
    panel.set(xlim=(left, right), ylim=(bottom, top))
    panel.set_axis_off()


def tile(views: Views, row: str, plane: int, influence: tuple[list[np.ndarray], float] | None = None) -> bytes:
    """One picture as a PNG, with orientation letters, slice position, scale and, for PET, the SUV bar.

    Args:
        views: of the case.
        row: ``"CT"``, ``"PET"``, ``"fusion"`` or ``"influence"``.
        plane: index in :data:`PLANES`.
        influence: the pictures of the planes and the value of the deepest colours, for ``"influence"``.
    """
    figure = Figure(figsize=(TILE_INCH, TILE_INCH), facecolor="black")
    panel = figure.add_axes((0, 0, 1, 1))
    if influence is not None:
        draw_influence(panel, views, plane, influence[0][plane], influence[1])
    else:
        draw_view(panel, views, row, plane)
    size = len(views.ct[plane])
    panel.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    name, axis = PLANES[plane]
    colour = "black" if row == PET else "white"
    _say(panel, 0.02, 0.98, f"{row} {name}\n{position_name(views.centre_mm, axis)}", colour, size=8.5)
    _letters(panel, plane, colour)
    length = SCALE_MM / (size * DISPLAY_MM)
    panel.plot([0.03, 0.03 + length], [0.04, 0.04], transform=panel.transAxes, color=colour, linewidth=1.6)
    _say(panel, 0.03, 0.105, f"{SCALE_MM / 10:.0f} cm", colour, size=7.5)
    if row in (PET, FUSION):
        _suv_bar(figure, "gray_r" if row == PET else "hot", colour)
    return png_of(figure, TILE_DPI)


def projection_png(projection: Projection) -> bytes:
    """A projection as a PNG, with orientation letters and the SUV bar."""
    left, right, bottom, top = projection.window
    width = TILE_INCH * 1.4 * abs((right - left) / (top - bottom))
    figure = Figure(figsize=(min(width, TILE_INCH * 1.4), TILE_INCH * 1.4), facecolor="white")
    panel = figure.add_axes((0, 0, 1, 1))
    draw_projection(panel, projection)
    plane = [name for name, _ in PLANES].index(projection.name)
    _letters(panel, plane, "black")
    _suv_bar(figure, "gray_r", "black")
    return png_of(figure, TILE_DPI)


def position_name(point_mm: np.ndarray, axis: int) -> str:
    """Position of a slice with the letter of its side of the origin, as viewers give it.

    Example:
        >>> position_name(np.array([3.2, -11.04, 54.0]), 1), position_name(np.array([3.2, -11.0, 54.0]), 2)
        ('P 11.0 mm', 'S 54.0 mm')
    """
    return f"{DIRECTIONS[axis][int(point_mm[axis] < 0)]} {abs(point_mm[axis]):.1f} mm"


def _letters(panel: Axes, plane: int, colour: str) -> None:
    places = [(0.5, 0.99, "center", "top"), (0.5, 0.01, "center", "bottom")]
    places += [(0.01, 0.5, "left", "center"), (0.93, 0.5, "right", "center")]
    for letter, (x, y, across, along) in zip(EDGES[plane], places, strict=True):
        _say(panel, x, y, letter, colour, ha=across, va=along, weight="bold")


def _say(panel: Axes, x: float, y: float, text: str, colour: str, size: float = 9.5, **style: Any) -> None:
    edge = "white" if colour == "black" else "black"
    placed: dict[str, Any] = {"ha": "left", "va": "top", **style}
    said = panel.text(x, y, text, transform=panel.transAxes, color=colour, fontsize=size, **placed)
    said.set_path_effects([Stroke(linewidth=1.5, foreground=edge), Normal()])


def _suv_bar(figure: Figure, colours: str, colour: str) -> None:
    """The colours of the SUV window at the right edge, with its ends."""
    low, high = PET_WINDOW_SUV
    bar = figure.add_axes((0.95, 0.2, 0.03, 0.6))
    bar.imshow(np.linspace(high, low, 64)[:, None], cmap=colours, aspect="auto")
    bar.set(xticks=[], yticks=[])
    for spine in bar.spines.values():
        spine.set(color=colour, linewidth=0.5)
    for y, text, along in ((1.02, f"{high:.0f}", "bottom"), (-0.02, f"{low:.0f} SUV", "top")):
        _say(bar, 1.3, y, text, colour, size=7.5, ha="right", va=along)


def case_figure(ct: Scan, pet: Scan, masks: Mapping[str, Scan], title: str = "") -> Figure:
    """CT, PET and fusion (rows) in axial, coronal and sagittal planes (columns), masks outlined.

    Everything is shown in planes of 240 mm around the largest lesion of the first mask that is not empty (the middle
    of the CT where there is none). Radiological convention: the patient's left is on the right.

    Args:
        ct: array (X, Y, Z) in HU and its grid.
        pet: array (X, Y, Z) in SUV and its grid.
        masks: name to label array and grid; outlined in this order of colours: cyan, red (the colour of a predicted
            tumour everywhere), yellow.
        title: above the picture.

    Returns:
        A figure of its own canvas; nothing of matplotlib's global state is touched.
    """
    views = cut_views(ct, pet, masks)
    figure = Figure(figsize=(9, 9.4), facecolor="black")
    axes = figure.subplots(len(ROWS), len(PLANES), gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for column, (plane, _) in enumerate(PLANES):
        for row, name in enumerate(ROWS):
            draw_view(axes[row, column], views, name, column)
            axes[row, column].set_title(f"{name} {plane}", color="white", fontsize=8, pad=2)
    legend = "   ".join(f"{name}: {('cyan', 'red', 'yellow')[k]}" for k, name in enumerate(masks))
    figure.suptitle(f"{title}\n{legend}" if legend else title, color="white", fontsize=10)
    return figure


def save_case_figure(
    path: str | Path, ct: str | Path, pet: str | Path, masks: Mapping[str, str | Path], title: str = ""
) -> None:
    """:func:`case_figure` of image files, as a PNG."""
    figure = case_figure(_load(ct), _load(pet), {name: _load(file) for name, file in masks.items()}, title)
    as_written(figure)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=90, bbox_inches="tight", facecolor="black")


def _load(path: str | Path) -> Scan:
    array, affine = read_image(path)
    return array, Grid(array.shape, affine)


def _cropped(mask: np.ndarray, grid: Grid) -> Scan:
    """The mask as 0 and 1 where it is not empty, with a voxel of 0 around it so that outlines close."""
    window = bounding_window(mask)
    if window is None:
        return np.zeros((1, 1, 1), dtype=np.uint8), Grid((1, 1, 1), grid.affine)
    part = np.pad((mask[window] != 0).astype(np.uint8), 1)
    affine = grid.affine.copy()
    affine[:3, 3] = grid.to_world([s.start - 1 for s in window])
    return part, Grid(part.shape, affine)


def middle_of(ct: Scan, masks: Mapping[str, Scan]) -> np.ndarray:
    """Middle of the largest lesion of the first mask that is not empty, world mm (RAS+); else the middle of the CT.

    The middle of all lesions may lie in none.
    """
    for array, grid in masks.values():
        lesions = find_lesions(array != 0, grid)
        for largest in (*lesions.found, *lesions.small):
            return largest.centre_mm
    return ct[1].centre


def _upright(array: np.ndarray, grid: Grid) -> Scan:
    """The array on the grid along the world's axes that covers it, its nearest values: only reordered if aligned."""
    along = np.abs(grid.affine[:3, :3]).argmax(axis=1)
    spacing = grid.spacing[along]
    low, high = grid.bounds
    count = np.maximum(1, np.round((high - low) / spacing)).astype(int)
    target = box_grid((low + high) / 2, count.tolist(), spacing)
    return resample(array, grid, target, "nearest"), target


def _extent(grid: Grid, axis: int) -> tuple[float, float, float, float]:
    """Left, right, bottom and top in world mm of a picture by :func:`_slice` across x or y."""
    low, high = grid.bounds
    across = 1 - axis
    return float(high[across]), float(low[across]), float(low[2]), float(high[2])


def _slice(volume: np.ndarray, axis: int) -> np.ndarray:
    """The middle plane across ``axis`` as rows from superior (or anterior) and columns from the patient's right."""
    plane = np.take(volume, volume.shape[axis] // 2, axis=axis)
    return plane[::-1, ::-1].T


def _outlines(panel: Axes, views: Views, plane: int) -> None:
    """Draw the outlines of all masks: a tumour class in its colour, other masks by their order."""
    for colour, (name, outline) in zip(OUTLINE_COLOURS, views.outlines.items(), strict=False):
        if outline[plane].min() < 0.5 < outline[plane].max():
            line = TUMOUR_COLOURS.get(name, colour)
            _rim(panel.contour(outline[plane], levels=[0.5], colors=[line]), line)
    panel.set_axis_off()


def _rim(drawn: QuadContourSet, colour: str) -> None:
    """Give an outline two rims, so that it is seen on grey values and on red, yellow and white uptake alike.

    The inner rim is white, of a light colour black; the outer one the other of the two.
    """
    luminance = float(np.power(to_rgb(colour), 2.2) @ (0.2126, 0.7152, 0.0722))
    rims = ("white", "black") if luminance > LIGHT else ("black", "white")
    drawn.set_linewidth(OUTLINE_WIDTH)
    strokes = [Stroke(linewidth=w, foreground=c) for w, c in zip(RIM_WIDTHS, rims, strict=True)]
    drawn.set_path_effects([*strokes, Normal()])
