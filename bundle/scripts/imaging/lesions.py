"""Lesions of a tumour mask: its connected components, their classes, names, sizes and colours.

Every count, table, DICOM object and picture of lesions comes from :func:`find_lesions`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import cc3d
import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from scripts.cohorts.thresholds import HALF, above
from scripts.imaging.geometry import Grid, bounding_window

CONNECTIVITY: Final = 26  # voxels that touch at a corner belong to one lesion
SMALLEST_LESION_ML = 0.1  # about one PET voxel; smaller components are noise at the edge of the mask

# Classes of the mask's values 1, 2, ... by AAPM TG-263: of a model that does not tell primary tumour (p) and nodes (n)
# apart, and of one that does.
MERGED, APART = ("GTV",), ("GTVp", "GTVn")
COLOURS = {"GTV": (230, 40, 40), "GTVp": (230, 40, 40), "GTVn": (30, 170, 240)}  # red, green, blue of 255


@dataclass(frozen=True)
class Lesion:
    """A connected component of the mask that is large enough."""

    name: str  # GTVp; with a number where the class has several lesions, the largest first: GTVn_01
    label: str  # its class: GTV, GTVp or GTVn
    volume_ml: float  # voxels times voxel volume
    centre_mm: np.ndarray  # (3,) mean position of its voxels, world mm (RAS+)
    window: tuple[slice, slice, slice]  # of the whole mask, in which it lies


@dataclass(frozen=True, eq=False)
class Lesions:
    """What a mask consists of, by volume, largest first."""

    window: tuple[slice, slice, slice]  # of the mask, with all that is not zero
    numbers: np.ndarray  # of the window's shape: 0 for background, k for the k-th component, first the lesions
    grid: Grid | None  # of ``numbers``; None for an empty mask
    found: tuple[Lesion, ...]  # the lesions: components 1, 2, ...
    small: tuple[Lesion, ...]  # components that are too small to be lesions, with the name ""

    def on(self, shape: tuple[int, ...]) -> np.ndarray:
        """The lesions' numbers on the whole mask: (X, Y, Z), 0 for background, k for the k-th lesion."""
        whole = np.zeros(shape, dtype=np.uint8 if len(self.found) < 256 else np.uint16)
        whole[self.window] = np.where(self.numbers <= len(self.found), self.numbers, 0)
        return whole

    def diameter_mm(self, number: int) -> float:
        """Longest diameter of the k-th lesion in three dimensions (see :func:`longest_diameter`)."""
        if self.grid is None:
            raise IndexError("an empty mask has no lesions")
        window = self.found[number - 1].window
        inner = tuple(slice(w.start - o.start, w.stop - o.start) for w, o in zip(window, self.window, strict=True))
        return longest_diameter(self.numbers[inner] == number, self.grid)


def find_lesions(mask: np.ndarray, grid: Grid, classes: Sequence[str] = MERGED) -> Lesions:
    """Connected components (26 neighbours) of each class of a mask, by volume.

    Components of different classes are separate, even where they touch. Those below :data:`SMALLEST_LESION_ML` are no
    lesions.

    Args:
        mask: (X, Y, Z) integers, 0 for background, k for ``classes[k - 1]``.
        grid: of the mask.
        classes: :data:`MERGED` or :data:`APART`.

    Raises:
        ValueError: when the mask holds a value without a class.
    """
    window = bounding_window(mask)
    if window is None:
        return Lesions((slice(0, 0),) * 3, np.zeros((0, 0, 0), dtype=np.uint8), None, (), ())
    part, where = np.ascontiguousarray(mask[window]), grid.crop(window)
    if part.dtype.kind not in "bui" or part.min() < 0 or part.max() > len(classes):
        raise ValueError(f"the mask holds values other than 0 to {len(classes)} ({', '.join(classes)})")
    components = cc3d.connected_components(part.astype(np.uint8, copy=False), connectivity=CONNECTIVITY)
    statistics = cc3d.statistics(components)
    voxels = statistics["voxel_counts"][1:].astype(np.int64)
    order = np.argsort(-voxels, kind="stable")
    rank = np.zeros(len(voxels) + 1, dtype=components.dtype)
    rank[order + 1] = np.arange(1, len(voxels) + 1)
    volumes = voxels[order] * where.voxel_ml
    boxes = [statistics["bounding_boxes"][k + 1] for k in order]
    labels = [classes[_value(part, components, k + 1, box) - 1] for k, box in zip(order, boxes, strict=True)]
    count = int((volumes >= SMALLEST_LESION_ML).sum())
    names = [*_names(labels[:count]), *[""] * (len(labels) - count)]
    parts = [
        Lesion(
            name,
            label,
            float(volume),
            where.to_world(statistics["centroids"][k + 1]),
            _shifted(box, window),
        )
        for name, label, volume, k, box in zip(names, labels, volumes, order, boxes, strict=True)
    ]
    return Lesions(window, rank[components], where, tuple(parts[:count]), tuple(parts[count:]))


def without_faint_lesions(tumour: np.ndarray, peak: float, threshold: float = HALF) -> np.ndarray:
    """The tumour probability without the components of its mask that are nowhere above ``peak``.

    They are lowered to ``threshold``, at which a voxel is not tumour. A component is connected (26 neighbours) and
    above ``threshold``. This is a threshold with hysteresis: the network has to be confident of some voxel of a lesion,
    not of its edge.

    Args:
        tumour: (X, Y, Z) probability of tumour of any class.
        peak: probability that some voxel of a lesion must exceed; ``threshold`` keeps all.
        threshold: of the mask.

    Returns:
        (X, Y, Z), of the same type.

    Example:
        >>> without_faint_lesions(np.array([[[0.6, 0.1, 0.6, 0.9]]]), peak=0.7)
        array([[[0.5, 0.1, 0.6, 0.9]]])
    """
    mask = above(tumour, threshold)
    kept = ndimage.binary_propagation(above(tumour, max(peak, threshold)), np.ones((3, 3, 3), dtype=bool), mask=mask)
    return np.where(mask & ~kept, tumour.dtype.type(threshold), tumour)


def longest_diameter(component: np.ndarray, grid: Grid) -> float:
    """Longest distance in mm between two points of a component's surface, in three dimensions.

    The surface has the centres of the voxel faces that separate the component from its surroundings: the vertices of
    marching cubes of a binary mask, so that this is IBSI's maximum 3D diameter (L0JK).

    Args:
        component: (X, Y, Z), true inside; not empty.
        grid: whose voxel axes it has; the position does not matter.

    Reference:
        Zwanenburg A. et al. The Image Biomarker Standardization Initiative. Radiology 295, 2020.

    Example:
        >>> longest_diameter(np.ones((3, 1, 1), dtype=bool), Grid((3, 1, 1), np.diag([2.0, 1.0, 1.0, 1.0])))
        6.0
    """
    padded = np.pad(component, 1).astype(np.int8)
    faces = []
    for axis in range(3):
        found = np.argwhere(np.diff(padded, axis=axis)).astype(float)
        found[:, axis] += 0.5
        faces.append(found)
    points = np.concatenate(faces) @ grid.affine[:3, :3].T
    return float(pdist(points[ConvexHull(points).vertices]).max())


def _names(labels: Sequence[str]) -> list[str]:
    """A name for each lesion; the largest of a class comes first."""
    of_class, seen = Counter(labels), Counter[str]()
    names = []
    for label in labels:
        seen[label] += 1
        names.append(label if of_class[label] == 1 else f"{label}_{seen[label]:02d}")
    return names


def _value(part: np.ndarray, components: np.ndarray, number: int, box: tuple[slice, ...]) -> int:
    """The mask's value in a component, of which every voxel has the same."""
    inside = components[box] == number
    return int(part[box][inside][0])


def _shifted(box: tuple[slice, ...], window: tuple[slice, slice, slice]) -> tuple[slice, slice, slice]:
    x, y, z = (slice(int(b.start) + w.start, int(b.stop) + w.start) for b, w in zip(box, window, strict=True))
    return x, y, z
