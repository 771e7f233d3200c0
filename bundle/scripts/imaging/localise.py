"""Position of the network's box: at the tumour's mask, or by the brain in the PET or the top of the body in the CT.

All positions are world mm (RAS+), independent of the order and direction of the array axes. Each location has the rule
that was used and doubts about it. A coarse pass of the network (:mod:`scripts.prediction.coarse`) may move the box
within the limits of the anatomy that the rules found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import ndimage

from scripts.imaging.geometry import Grid, bounding_window, box_grid, share_inside, smooth_resample

METHOD_MASK = "mask"
METHOD_PET_BRAIN = "pet_brain"
METHOD_CT_TOP = "ct_body_top"
METHOD_CENTRE = "scan_centre"
METHOD_WORDS = {
    METHOD_MASK: "centred on the tumour mask",
    METHOD_PET_BRAIN: "below the brain in the PET",
    METHOD_CT_TOP: "below the top of the body in the CT",
    METHOD_CENTRE: "in the middle of the scan",
}
IN_DOUBT, ALWAYS = "in_doubt", "always"  # when a network is asked
BY_NETWORK = "+network"  # suffix of the rule: the box was then moved to the tumour found by the network

# --- the box in relation to the brain ------------------------------------------------------------------------
# The authors' rule: the box extends from 30 mm above the lowest slice of the brain downwards, and is centred 30 mm
# anterior to the middle of the brain (their y axis is reversed: "y - 30"), at the pharynx.
ABOVE_BRAIN_BASE_MM = 30.0
FRONT_OF_BRAIN_MM = 30.0
# An adult's head from the vertex to the lowest slice of the brain, for use without a brain in the PET.
VERTEX_TO_BRAIN_BASE_MM = 140.0

# --- criteria of a brain -----------------------------------------------------------------------------------------
# Spacing and smoothing of the search, in mm, so that they are the same for any scanner.
LOOK_SPACING_MM = 4.0
LOOK_SIGMA_MM = 4.0
# The paper's 3 SUV first; then higher thresholds, where the brain is connected to other uptake, then a lower one for
# low uptake.
BRAIN_SUV = (3.0, 5.0, 8.0, 2.0)
BRAIN_ML = (350.0, 2600.0)
CUT_BRAIN_ML = 60.0  # where the brain reaches the upper end of the scan
BRAIN_WIDTH_MM = (75.0, 230.0)  # left to right, and front to back
BRAIN_HEIGHT_MM = 200.0
BRAIN_FILL = 0.45  # share of the ellipsoid with the same extents
# Bone in the CT in the layer around it: a skull surrounds the brain, but no tumour, heart or bladder.
SKULL_LAYER_MM = 16.0
SKULL_HU = 250.0
SKULL_SHARE = 0.12
# The lowest slice of the brain has at least this share of the area of its largest slice: below are the brain stem or
# connected uptake.
BRAIN_BASE_SHARE = 0.15

# --- candidates of the network ----------------------------------------------------------------------------------
CANDIDATE_ML = 1.0
CANDIDATE_CONFIDENCE = 0.8
CANDIDATE_MARGIN_MM = 10.0
# Range of a tumour's middle above and below the top of the box, by rule. The top is 30 mm above the base of the brain;
# without a brain it is less certain. Disease is at most 330 mm below the top of a CT.
REACH_MM = {METHOD_PET_BRAIN: (-20.0, 256.0), METHOD_CT_TOP: (60.0, 330.0)}
REACH_SIDE_MM = 110.0  # to the sides, to the front and to the back

# --- criteria of SUV and of a head -----------------------------------------------------------------------------
MAX_MEAN_SUV = 50.0  # the mean over a field of view is below 2 in SUV, in the hundreds in Bq/mL
MIN_SIGNAL_SUV = 0.5
BODY_HU = -400.0
HEAD_AREA_CM2 = 80.0  # a slice through a head; raised forearms, tables and head rests have less
HEAD_DEPTH_MM = 50.0  # over which slices must have this area


@dataclass(frozen=True)
class Location:
    """Position of the box, the rule that was used, and doubts.

    Example:
        >>> Location(np.zeros(3), METHOD_PET_BRAIN + BY_NETWORK).rule
        'pet_brain'
    """

    centre_mm: np.ndarray  # (3,) world position of the box's centre
    method: str  # one of the METHOD_* names, with the suffix BY_NETWORK where a candidate moved the box
    flag: str = ""  # doubts, separated by "; "

    @property
    def rule(self) -> str:
        """The ``METHOD_*`` name without ``BY_NETWORK``."""
        return self.method.removesuffix(BY_NETWORK)

    @property
    def doubtful(self) -> bool:
        """Whether it is not at a whole brain in the PET, all of it in the CT; always where :attr:`Anchor.doubtful`."""
        return self.method != METHOD_PET_BRAIN or self.flag != ""


def method_words(method: str) -> str:
    """How the box was placed, in words for a reader; a method that is not known is returned as it is.

    Example:
        >>> method_words("pet_brain+network")
        'below the brain in the PET, then moved to the tumour found by a coarse pass of the network'
    """
    rule = method.removesuffix(BY_NETWORK)
    moved = ", then moved to the tumour found by a coarse pass of the network" if rule != method else ""
    return METHOD_WORDS.get(rule, rule) + moved


@dataclass(frozen=True)
class Anchor:
    """The anatomical reference point found by a rule, independent of the size of the box."""

    point_mm: np.ndarray  # (3,) world position of the middle of the box's upper face; with METHOD_CENTRE, of the box
    method: str  # the rule, one of the METHOD_* names
    flag: str = ""  # doubts, as of a Location

    @property
    def doubtful(self) -> bool:
        """Whether it is not a whole brain in the PET."""
        return self.method != METHOD_PET_BRAIN or self.flag != ""


@dataclass(frozen=True)
class Candidate:
    """A connected region that the network classifies as tumour."""

    bounds_mm: np.ndarray  # (2, 3) lowest and highest world coordinate
    mass_ml: float  # its volume, weighted by probability
    confidence: float  # its highest probability

    @property
    def centre_mm(self) -> np.ndarray:
        """Middle of the region's bounding box in world mm, (3,)."""
        return self.bounds_mm.mean(axis=0)


class NoCoarsePass(RuntimeError):  # noqa: N818 - a reason, told as a flag
    """Why the coarse pass was not possible."""


# (ct, ct_grid, pet, pet_grid, anchor) -> candidates, None where it is not needed; raises NoCoarsePass
Proposer = Callable[[np.ndarray, Grid, np.ndarray, Grid, Anchor], list[Candidate] | None]


@dataclass
class _Brain:
    """A brain-like region of the PET, in world mm."""

    low: np.ndarray  # (3,) lower bound of its bounding box
    high: np.ndarray  # (3,) upper bound
    base: float  # z of its lowest slice
    flags: list[str] = field(default_factory=list)


def locate_mask(
    mask: np.ndarray, mask_grid: Grid, roi_size: int | Sequence[int], spacing_mm: float | Sequence[float]
) -> Location:
    """Centre the box on the bounding box of a mask (X, Y, Z), which is not zero in the tumour.

    Returns:
        The location; its flag says if part of the mask is outside the box.

    Raises:
        ValueError: the mask is empty.
    """
    window = bounding_window(mask)
    if window is None:
        raise ValueError("the mask is empty: nothing to centre the box on")
    centre = mask_grid.crop(window).centre
    centre = _keep_inside(centre, mask_grid, box_grid(centre, roi_size, spacing_mm))
    share = share_inside(mask, mask_grid, box_grid(centre, roi_size, spacing_mm))
    flag = "" if share == 1.0 else f"the mask does not fit into the box: {100 * share:.1f} % of it inside"
    return Location(centre, METHOD_MASK, flag)


def locate_head_neck(
    ct: np.ndarray,
    ct_grid: Grid,
    pet: np.ndarray,
    pet_grid: Grid,
    roi_size: int | Sequence[int],
    spacing_mm: float | Sequence[float],
    proposer: Proposer | None = None,
) -> Location:
    """Find the head and neck in a PET/CT without a mask.

    The brain in the PET is used if found, by its uptake, size, shape and the bone around it; otherwise the top of the
    head in the CT; without a head the middle of the scan. With candidates of a ``proposer``, the box is centred on the
    tumour that the network finds where the head and neck can be. See :func:`find_anchor` and :func:`place_box`.

    Args:
        ct: (X, Y, Z) CT in HU.
        ct_grid: its grid.
        pet: (X, Y, Z) PET in SUV, on a grid of its own.
        pet_grid: the PET's grid.
        roi_size: voxels of the box.
        spacing_mm: voxel size of the box in mm.
        proposer: what proposes tumours, as :class:`scripts.prediction.coarse.CoarsePass`; None for the rules alone.
    """
    anchor = find_anchor(ct, ct_grid, pet, pet_grid)
    candidates = None
    if proposer is not None and not pet_faults(pet, pet_grid, ct_grid):
        try:
            candidates = proposer(ct, ct_grid, pet, pet_grid, anchor)
        except NoCoarsePass as reason:
            anchor = replace(anchor, flag="; ".join(filter(None, [anchor.flag, f"no coarse pass: {reason}"])))
    return place_box(anchor, ct_grid, roi_size, spacing_mm, candidates)


def find_anchor(ct: np.ndarray, ct_grid: Grid, pet: np.ndarray, pet_grid: Grid) -> Anchor:
    """The anchor by the first rule that applies: brain in the PET, top of the head in the CT, middle of the scan.

    Arguments as for :func:`locate_head_neck`.
    """
    faults = pet_faults(pet, pet_grid, ct_grid)
    anchor = None if faults else anchor_at_brain(ct, ct_grid, pet, pet_grid)
    if anchor is not None:
        return anchor
    anchor = anchor_at_body_top(ct, ct_grid)
    reasons = [*(faults or ["no plausible brain in the PET"]), anchor.flag]
    return replace(anchor, flag="; ".join(filter(None, reasons)))


def anchor_at_brain(ct: np.ndarray, ct_grid: Grid, pet: np.ndarray, pet_grid: Grid) -> Anchor | None:
    """The anchor by the brain in the PET; None where there is no plausible brain."""
    brain = _find_brain(ct, ct_grid, pet, pet_grid)
    if brain is None:
        return None
    x, y, _ = (brain.low + brain.high) / 2
    point = np.array([x, y + FRONT_OF_BRAIN_MM, brain.base + ABOVE_BRAIN_BASE_MM])
    return Anchor(point, METHOD_PET_BRAIN, "; ".join(brain.flags))


def place_box(
    anchor: Anchor,
    ct_grid: Grid,
    roi_size: int | Sequence[int],
    spacing_mm: float | Sequence[float],
    candidates: Sequence[Candidate] | None = None,
) -> Location:
    """The box by the anchor and the candidates, within the CT as far as possible.

    Only confident candidates whose middle is in the range of the anchor are used. The one of largest mass is always in
    the box, further ones in order of mass if all fit; the box is centred on all of them, as on the mask in training.

    Args:
        anchor: of :func:`find_anchor`.
        ct_grid: the CT's grid.
        roi_size: voxels of the box.
        spacing_mm: voxel size of the box in mm.
        candidates: regions found by the network anywhere in the scan; None without a coarse pass.

    Returns:
        The location. Its method ends in ``BY_NETWORK`` where candidates placed the box.
    """
    box = box_grid((0.0, 0.0, 0.0), roi_size, spacing_mm)
    method, doubts = anchor.method, [anchor.flag]
    drop = 0.0 if anchor.method == METHOD_CENTRE else box.extent[2] / 2
    centre = anchor.point_mm - [0.0, 0.0, drop]
    if candidates is not None:
        bounds = _bounds_of_tumour(anchor, candidates, box.extent - 2 * CANDIDATE_MARGIN_MM)
        if bounds is None:
            doubts.append("the network finds no tumour there")
        else:
            centre, method = bounds.mean(axis=0), method + BY_NETWORK
    centre = _keep_inside(centre, ct_grid, box)
    covered = _covered(ct_grid, box_grid(centre, roi_size, spacing_mm))
    if covered < 0.5:
        doubts.append(f"the CT covers only {100 * covered:.0f} % of the box")
    return Location(centre, method, "; ".join(filter(None, doubts)))


def credible_bounds(anchor: Anchor) -> np.ndarray | None:
    """Lowest and highest possible position (2, 3) of a tumour's middle in mm; None where it is not restricted."""
    if anchor.method == METHOD_CENTRE:
        return None
    above, below = REACH_MM[anchor.method]
    reach = np.array([[-REACH_SIDE_MM, -REACH_SIDE_MM, -below], [REACH_SIDE_MM, REACH_SIDE_MM, above]])
    return anchor.point_mm + reach


def _bounds_of_tumour(anchor: Anchor, candidates: Sequence[Candidate], room: np.ndarray) -> np.ndarray | None:
    """Bounds (2, 3) of the possible candidates, by mass, that fit into ``room`` mm together; None without any."""
    credible = credible_bounds(anchor)
    bounds = None
    for candidate in sorted(candidates, key=lambda c: -c.mass_ml):
        if candidate.mass_ml < CANDIDATE_ML or candidate.confidence < CANDIDATE_CONFIDENCE:
            continue
        middle = candidate.centre_mm
        if credible is not None and not ((middle >= credible[0]) & (middle <= credible[1])).all():
            continue
        both = candidate.bounds_mm
        if bounds is not None:
            both = np.stack([np.minimum(bounds[0], both[0]), np.maximum(bounds[1], both[1])])
        if bounds is None or (both[1] - both[0] <= room).all():
            bounds = both
    return bounds


def _keep_inside(centre: np.ndarray, grid: Grid, box: Grid) -> np.ndarray:
    """The box's centre moved so that the box is within the scan; along axes where the scan is smaller, its middle."""
    low, high = grid.bounds
    half = np.minimum(box.extent, high - low) / 2
    return np.clip(centre, low + half, high - half)


def _covered(grid: Grid, box: Grid) -> float:
    """Share of the box within the bounds of a scan."""
    low = np.maximum(grid.bounds[0], box.bounds[0])
    high = np.minimum(grid.bounds[1], box.bounds[1])
    return float(np.prod(np.clip(high - low, 0, None) / box.extent))


def pet_faults(pet: np.ndarray, pet_grid: Grid, ct_grid: Grid) -> list[str]:
    """Reasons not to search this PET for a brain or a tumour."""
    overlap = np.minimum(pet_grid.bounds[1], ct_grid.bounds[1]) - np.maximum(pet_grid.bounds[0], ct_grid.bounds[0])
    if (overlap <= 0).any():
        return ["PET and CT do not overlap"]
    coarse = pet[::2, ::2, ::2]
    if not np.isfinite(coarse).all():
        return ["the PET has values that are not finite numbers"]
    mean = float(coarse.mean(dtype=np.float64))
    if mean > MAX_MEAN_SUV:
        return [f"the PET is not in SUV (mean {mean:.0f})"]
    if float(coarse.max()) < MIN_SIGNAL_SUV:
        return ["the PET has no signal"]
    return []


def _find_brain(ct: np.ndarray, ct_grid: Grid, pet: np.ndarray, pet_grid: Grid) -> _Brain | None:
    """The uppermost brain-like region of the PET, at the first threshold that gives one."""
    low, high = pet_grid.bounds
    # limited to the CT in the plane only: along z, a brain outside the CT is useful too
    low[:2] = np.maximum(low[:2], ct_grid.bounds[0, :2] - SKULL_LAYER_MM)
    high[:2] = np.minimum(high[:2], ct_grid.bounds[1, :2] + SKULL_LAYER_MM)
    look = _look_grid(low, high, LOOK_SPACING_MM)
    suv = smooth_resample(pet, pet_grid, look, LOOK_SIGMA_MM)
    for threshold in BRAIN_SUV:
        labels, count = ndimage.label(suv > threshold)
        if count == 0:
            continue
        sizes = np.bincount(labels.ravel())
        found = []
        for label, region in enumerate(ndimage.find_objects(labels), start=1):
            if sizes[label] * look.voxel_ml < CUT_BRAIN_ML:
                continue
            brain = _as_brain(labels[region] == label, region, look, ct, ct_grid)
            if brain is not None:
                found.append(brain)
        if found:
            return max(found, key=lambda b: float(b.high[2]))
    return None


def _as_brain(
    region: np.ndarray, window: tuple[slice, slice, slice], look: Grid, ct: np.ndarray, ct_grid: Grid
) -> _Brain | None:
    """A connected region as a brain; None where its size, shape or surroundings do not match."""
    region = ndimage.binary_fill_holes(region)
    size = np.array(region.shape) * look.spacing
    volume = float(region.sum()) * look.voxel_ml
    ellipsoid = np.pi / 6 * float(np.prod(size)) / 1000.0
    cut = window[2].stop >= look.shape[2] - 1
    flags = ["the brain is cut off at the top of the scan"] if cut else []
    narrow, wide = BRAIN_WIDTH_MM
    if not (CUT_BRAIN_ML if cut else BRAIN_ML[0]) <= volume <= BRAIN_ML[1]:
        return None
    if size[:2].min() < narrow or size[:2].max() > wide or size[2] > BRAIN_HEIGHT_MM or volume < BRAIN_FILL * ellipsoid:
        return None
    skull = _bone_around(region, window, look, ct, ct_grid)
    if skull is None:
        flags.append("the brain lies outside the CT")
    elif skull < SKULL_SHARE:
        return None
    area = region.sum(axis=(0, 1))
    lowest = int(np.flatnonzero(area >= BRAIN_BASE_SHARE * area.max())[0])
    start = np.array([w.start for w in window])
    low, high = look.crop(window).bounds
    return _Brain(low, high, float(look.to_world([0, 0, start[2] + lowest])[2] - look.spacing[2] / 2), flags)


def _bone_around(
    region: np.ndarray, window: tuple[slice, slice, slice], look: Grid, ct: np.ndarray, ct_grid: Grid
) -> float | None:
    """Share of bone in the layer around a region, in slices; None where most of the layer is outside the CT."""
    steps = int(np.ceil(SKULL_LAYER_MM / look.spacing[0]))
    padded = np.pad(region, ((steps, steps), (steps, steps), (0, 0)))
    disc = ndimage.generate_binary_structure(3, 1)
    disc[:, :, [0, 2]] = False
    layer = ndimage.binary_dilation(padded, disc, iterations=steps) & ~padded
    start = np.array([w.start for w in window]) - [steps, steps, 0]
    there = np.rint(ct_grid.to_index(look.to_world(np.argwhere(layer) + start))).astype(int)
    there = there[((there >= 0) & (there < ct_grid.shape)).all(axis=1)]
    if len(there) < 0.5 * layer.sum():
        return None
    return float((ct[tuple(there.T)] > SKULL_HU).mean())


def anchor_at_body_top(ct: np.ndarray, ct_grid: Grid) -> Anchor:
    """The anchor by the top of the head in the CT, or of the scan if the head is cut off; without a head its middle."""
    coarse, coarse_grid = _thin_out(ct, ct_grid, LOOK_SPACING_MM)
    look = _look_grid(ct_grid.bounds[0], ct_grid.bounds[1], LOOK_SPACING_MM * 1.5)
    body = smooth_resample(coarse, coarse_grid, look, LOOK_SIGMA_MM * 1.5, fill=-1024.0) > BODY_HU
    pieces = [_largest_piece(body[:, :, k]) for k in range(look.shape[2])]
    areas = np.array([p.sum() for p in pieces]) * look.spacing[0] * look.spacing[1] / 100.0
    window = bounding_window(body)
    if window is None:
        return Anchor(ct_grid.centre, METHOD_CENTRE, "no body in the CT")
    if not (areas >= HEAD_AREA_CM2).any():
        return Anchor(look.crop(window).centre, METHOD_CENTRE, "no head in the CT")
    top, open_ended = _head_top(areas, look)
    slices = np.arange(look.shape[2])
    z = look.to_world(np.stack([0 * slices, 0 * slices, slices], axis=-1))[:, 2]
    drop = 0.0 if open_ended else VERTEX_TO_BRAIN_BASE_MM - ABOVE_BRAIN_BASE_MM
    head = (z <= top) & (z >= top - 150.0) & (areas > 0)
    middle = np.mean([np.argwhere(pieces[k]).mean(axis=0) for k in np.flatnonzero(head)], axis=0)
    x, y = look.to_world([*middle, 0.0])[:2]
    flag = "the head is cut off or absent at the top of the CT" if open_ended else ""
    return Anchor(np.array([x, y, top - drop]), METHOD_CT_TOP, flag)


def _head_top(areas: np.ndarray, look: Grid) -> tuple[float, bool]:
    """World z of the top of the head, and whether the body extends to the upper end of the scan.

    The top is the uppermost slice below which, over :data:`HEAD_DEPTH_MM`, one connected section is as large as a head:
    raised arms are two smaller ones.
    """
    depth = max(1, round(HEAD_DEPTH_MM / look.spacing[2]))
    large = areas >= HEAD_AREA_CM2
    runs = [k for k in range(len(areas)) if large[max(0, k - depth) : k + 1].all()]
    highest = max(runs) if runs else int(np.flatnonzero(large)[-1])
    open_ended = highest >= len(areas) - 2
    # a head reaches this area about 2 cm below its top
    top = float(look.to_world([0, 0, highest])[2]) + (0.0 if open_ended else 15.0)
    return top, open_ended


def _largest_piece(section: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(section)
    if count <= 1:
        return section
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()


def _look_grid(low: np.ndarray, high: np.ndarray, spacing_mm: float) -> Grid:
    """Axis-aligned grid between two corners in world mm."""
    shape = np.maximum(1, np.ceil((high - low) / spacing_mm - 1e-6)).astype(int)
    return box_grid((low + high) / 2, shape.tolist(), spacing_mm)


def _thin_out(array: np.ndarray, grid: Grid, spacing_mm: float) -> tuple[np.ndarray, Grid]:
    """Every k-th voxel of an image with voxels smaller than ``spacing_mm``, for a fast search."""
    steps = np.maximum(1, np.floor(spacing_mm / grid.spacing + 1e-6)).astype(int)
    whole = tuple(slice(0, n) for n in grid.shape)
    return array[tuple(slice(None, None, int(k)) for k in steps)], grid.crop(whole, steps.tolist())
