"""Pictures of a case: CT, PET and both fused, in three planes through the tumour, with outlines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import ndimage

from scripts.files import written_whole
from scripts.geometry import Grid, box_grid, resample
from scripts.images import read_image

CT_WINDOW_HU = (-160.0, 240.0)  # soft tissue
PET_WINDOW_SUV = (0.0, 12.0)
OUTLINE_COLOURS = ("#00e5ff", "#ff3b30", "#ffd60a")
DISPLAY_VOXELS, DISPLAY_MM = 120, 2.0


def case_figure(
    ct: tuple[np.ndarray, Grid],
    pet: tuple[np.ndarray, Grid],
    masks: Mapping[str, tuple[np.ndarray, Grid]],
    title: str = "",
) -> Figure:
    """CT, PET and fusion (rows) in axial, coronal and sagittal planes (columns), masks outlined.

    Everything is shown on one grid of 240 mm around the largest lesion of the first mask that is not empty (the middle
    of the CT where there is none). Radiological convention: the patient's left is on the right.

    Args:
        ct: array (X, Y, Z) in HU and its grid.
        pet: array (X, Y, Z) in SUV and its grid.
        masks: name to label array and grid; outlined in this order of colours: cyan, red, yellow.
        title: above the picture.

    Returns:
        A figure of its own canvas; nothing of matplotlib's global state is touched.
    """
    grid = box_grid(_middle(ct, masks), DISPLAY_VOXELS, DISPLAY_MM)
    ct_box = resample(*ct, grid, "linear", fill=-1024.0)
    pet_box = resample(*pet, grid, "linear", fill=0.0)
    outlines = {name: resample(array != 0, of, grid, "linear", fill=0.0) for name, (array, of) in masks.items()}
    figure = Figure(figsize=(9, 9.4), facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 3, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for column, (plane, axis) in enumerate((("axial", 2), ("coronal", 1), ("sagittal", 0))):
        for row in range(3):
            panel = axes[row, column]
            if row != 1:
                panel.imshow(_slice(ct_box, axis), cmap="gray", vmin=CT_WINDOW_HU[0], vmax=CT_WINDOW_HU[1])
            if row != 0:
                colours = {"cmap": "gray_r"} if row == 1 else {"cmap": "hot", "alpha": 0.45}
                panel.imshow(_slice(pet_box, axis), vmin=PET_WINDOW_SUV[0], vmax=PET_WINDOW_SUV[1], **colours)
            for colour, outline in zip(OUTLINE_COLOURS, outlines.values(), strict=False):
                _outline(panel, _slice(outline, axis), colour)
            panel.set_axis_off()
            panel.set_title(f"{('CT', 'PET', 'fusion')[row]} {plane}", color="white", fontsize=8, pad=2)
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
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=90, bbox_inches="tight", facecolor="black")


def _load(path: str | Path) -> tuple[np.ndarray, Grid]:
    array, affine = read_image(path)
    return array, Grid(array.shape, affine)


def _middle(ct: tuple[np.ndarray, Grid], masks: Mapping[str, tuple[np.ndarray, Grid]]) -> np.ndarray:
    """Middle of the largest lesion: the middle of all of them may lie in none."""
    for array, grid in masks.values():
        lesions, count = ndimage.label(array != 0)
        if count:
            largest = 1 + int(np.argmax(np.bincount(lesions.ravel())[1:]))
            return grid.to_world(np.argwhere(lesions == largest).mean(axis=0))
    return ct[1].centre


def _slice(volume: np.ndarray, axis: int) -> np.ndarray:
    """The middle plane across ``axis`` as rows from superior (or anterior) and columns from the patient's right."""
    plane = np.take(volume, volume.shape[axis] // 2, axis=axis)
    return plane[::-1, ::-1].T if axis else plane[:, ::-1].T


def _outline(panel: Axes, plane: np.ndarray, colour: str) -> None:
    if plane.min() < 0.5 < plane.max():
        panel.contour(plane, levels=[0.5], colors=[colour], linewidths=1.2)
