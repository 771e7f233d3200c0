"""Pictures of a case: CT, PET and both fused, in three planes through the tumour, and the PET projected as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import ndimage

from scripts.cohorts.files import written_whole
from scripts.evaluation.plots import as_written
from scripts.imaging.geometry import Grid, bounding_window, box_grid, resample
from scripts.imaging.images import read_image

CT_WINDOW_HU = (-160.0, 240.0)  # soft tissue
PET_WINDOW_SUV = (0.0, 12.0)
FUSION_OPACITY = 0.75  # of the hottest uptake; without uptake the CT alone is seen
OUTLINE_COLOURS = ("#00e5ff", "#ff3b30", "#ffd60a")
DISPLAY_VOXELS, DISPLAY_MM = 240, 1.0
PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))  # name, and the world axis across it
CT, PET, FUSION = "CT", "PET", "fusion"
ROWS = (CT, PET, FUSION)

Scan = tuple[np.ndarray, Grid]


@dataclass(frozen=True, eq=False)
class Views:
    """The three planes of a case through one point, rows from superior or anterior, columns from the patient's right.

    Attributes:
        centre_mm: (3,) the point, world mm (RAS+).
        ct: a picture a plane of :data:`PLANES`, in HU.
        pet: likewise, in SUV.
        outlines: name of a mask to its pictures, 0 to 1; the outline is at one half.
    """

    centre_mm: np.ndarray
    ct: list[np.ndarray]
    pet: list[np.ndarray]
    outlines: dict[str, list[np.ndarray]]


@dataclass(frozen=True, eq=False)
class Projection:
    """A maximum intensity projection of the whole PET, with the mask projected likewise.

    Attributes:
        name: of the plane.
        pet: (rows from superior, columns from the patient's right or front), in SUV.
        extent: left, right, bottom and top of ``pet`` in world mm.
        mask: 0 and 1; None where the mask is empty.
        mask_extent: likewise of ``mask``.
    """

    name: str
    pet: np.ndarray
    extent: tuple[float, float, float, float]
    mask: np.ndarray | None
    mask_extent: tuple[float, float, float, float]

    @property
    def proportion(self) -> float:
        """Height to width."""
        left, right, bottom, top = self.extent
        return abs((top - bottom) / (right - left))


def cut_views(ct: Scan, pet: Scan, masks: Mapping[str, Scan]) -> Views:
    """Three planes of 240 mm through the largest lesion of the first mask that is not empty.

    Only what is shown is resampled. Without a lesion the planes go through the middle of the CT.

    Args:
        ct: array (X, Y, Z) in HU and its grid.
        pet: array (X, Y, Z) in SUV and its grid.
        masks: name to label array and grid.
    """
    small = {name: _cropped(*mask) for name, mask in masks.items()}
    centre = _middle(ct, small)
    return Views(
        centre,
        cut_planes(*ct, centre, fill=-1024.0),
        cut_planes(*pet, centre),
        {name: cut_planes(*mask, centre) for name, mask in small.items()},
    )


def cut_planes(array: np.ndarray, grid: Grid, centre_mm: np.ndarray, fill: float = 0.0) -> list[np.ndarray]:
    """The pictures (R, R) of :data:`PLANES` through a point, linearly interpolated.

    Args:
        array: (X, Y, Z) values on ``grid``.
        grid: where they are.
        centre_mm: (3,) the point, world mm (RAS+).
        fill: value outside the field of view.
    """
    pictures = []
    for _, axis in PLANES:
        shape = [DISPLAY_VOXELS] * 3
        shape[axis] = 1
        pictures.append(_slice(resample(array, grid, box_grid(centre_mm, shape, DISPLAY_MM), "linear", fill), axis))
    return pictures


def project(pet: Scan, mask: Scan) -> list[Projection]:
    """Maximum intensity projections of the whole field of view, from the front and from the side.

    Args:
        pet: array (X, Y, Z) in SUV and its grid, in any orientation.
        mask: label array and its grid, which may be another.
    """
    upright, grid = _upright(*pet)
    labels, label_grid = _upright(*_cropped(*mask))
    projections = []
    for name, axis in PLANES[1:]:
        shadow = labels.max(axis=axis, keepdims=True) if labels.any() else None
        projections.append(
            Projection(
                name,
                _slice(np.fmax.reduce(upright, axis=axis, keepdims=True), axis),  # NaN of a damaged PET are passed over
                _extent(grid, axis),
                None if shadow is None else _slice(shadow, axis),
                _extent(label_grid, axis),
            )
        )
    return projections


def draw_view(panel: Axes, views: Views, row: str, plane: int) -> None:
    """Draw one picture with the outlines of all masks.

    Args:
        panel: to draw into.
        views: of the case.
        row: ``"CT"``, ``"PET"`` or ``"fusion"``.
        plane: index in :data:`PLANES`.
    """
    low, high = PET_WINDOW_SUV
    uptake = views.pet[plane]
    if row != PET:
        panel.imshow(views.ct[plane], cmap="gray", vmin=CT_WINDOW_HU[0], vmax=CT_WINDOW_HU[1])
    if row == PET:
        panel.imshow(uptake, cmap="gray_r", vmin=low, vmax=high)
    if row == FUSION:
        opacity = FUSION_OPACITY * np.sqrt(np.clip((np.nan_to_num(uptake) - low) / (high - low), 0, 1))
        panel.imshow(uptake, cmap="hot", vmin=low, vmax=high, alpha=opacity)
    for colour, outline in zip(OUTLINE_COLOURS, views.outlines.values(), strict=False):
        _outline(panel, outline[plane], colour)
    panel.set_axis_off()


def draw_influence(panel: Axes, views: Views, plane: int, influence: np.ndarray, limit: float) -> None:
    """Draw what moved the risk over the CT: red raised it, blue lowered it, and what did neither is not seen.

    Args:
        panel: to draw into.
        views: of the case.
        plane: index in :data:`PLANES`.
        influence: the picture of that plane, see :func:`cut_planes`.
        limit: value of the deepest colours.
    """
    panel.imshow(views.ct[plane], cmap="gray", vmin=CT_WINDOW_HU[0], vmax=CT_WINDOW_HU[1])
    opacity = np.clip(np.abs(influence) / limit, 0, 1) ** 0.7 * 0.8
    panel.imshow(influence, cmap="bwr", vmin=-limit, vmax=limit, alpha=opacity)
    for colour, outline in zip(OUTLINE_COLOURS, views.outlines.values(), strict=False):
        _outline(panel, outline[plane], colour)
    panel.set_axis_off()


def draw_projection(panel: Axes, projection: Projection) -> None:
    """Draw a projection of the PET with the mask's outline, in its true proportions."""
    low, high = PET_WINDOW_SUV
    panel.imshow(projection.pet, cmap="gray_r", vmin=low, vmax=high, extent=projection.extent, aspect="equal")
    if projection.mask is not None:
        left, right, bottom, top = projection.mask_extent
        rows, columns = projection.mask.shape
        panel.contour(
            left + (np.arange(columns) + 0.5) * (right - left) / columns,
            top + (np.arange(rows) + 0.5) * (bottom - top) / rows,
            projection.mask,
            levels=[0.5],
            colors=[OUTLINE_COLOURS[1]],  # cyan is lost on white
            linewidths=0.9,
        )
    left, right, bottom, top = projection.extent
    panel.set(xlim=(left, right), ylim=(bottom, top))
    panel.set_axis_off()


def case_figure(ct: Scan, pet: Scan, masks: Mapping[str, Scan], title: str = "") -> Figure:
    """CT, PET and fusion (rows) in axial, coronal and sagittal planes (columns), masks outlined.

    Everything is shown in planes of 240 mm around the largest lesion of the first mask that is not empty (the middle
    of the CT where there is none). Radiological convention: the patient's left is on the right.

    Args:
        ct: array (X, Y, Z) in HU and its grid.
        pet: array (X, Y, Z) in SUV and its grid.
        masks: name to label array and grid; outlined in this order of colours: cyan, red, yellow.
        title: above the picture.

    Returns:
        A figure of its own canvas; nothing of matplotlib's global state is touched.
    """
    views = cut_views(ct, pet, masks)
    figure = Figure(figsize=(9, 9.4), facecolor="black")
    FigureCanvasAgg(figure)
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
    """:func:`case_figure` of image files, as a PNG.

    Args:
        path: of the PNG.
        ct: file of the CT.
        pet: file of the PET.
        masks: name to file of a label image.
        title: above the picture.
    """
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


def _middle(ct: Scan, masks: Mapping[str, Scan]) -> np.ndarray:
    """Middle of the largest lesion: the middle of all of them may lie in none."""
    for array, grid in masks.values():
        lesions, count = ndimage.label(array)
        if count:
            largest = 1 + int(np.argmax(np.bincount(lesions.ravel())[1:]))
            return grid.to_world(np.argwhere(lesions == largest).mean(axis=0))
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


def _outline(panel: Axes, plane: np.ndarray, colour: str) -> None:
    if plane.min() < 0.5 < plane.max():
        panel.contour(plane, levels=[0.5], colors=[colour], linewidths=1.2)
