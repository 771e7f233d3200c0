"""Primary tumours and nodes: where they sit, how large they are and what they take up, by HPV status."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scripts.keys import GTVN, GTVP

from .shapes import Array, Ellipsoid, Pose, Vector, clipped_lognormal, rotation, vector

# Centre (for the right side), spread (SD), shares among HPV positive and negative patients, largest diameter in mm.
_SITES: tuple[tuple[Vector, Vector, float, float, float], ...] = (
    ((20, 9, 8), (2, 3, 5), 0.54, 0.32, 70),  # tonsil
    ((9, 23, -6), (3, 3, 4), 0.40, 0.22, 70),  # base of tongue
    ((4, 17, 30), (4, 2, 2), 0.03, 0.10, 50),  # soft palate
    ((11, 14, -44), (3, 3, 5), 0.02, 0.22, 55),  # larynx and hypopharynx
    ((14, 44, 14), (4, 5, 4), 0.01, 0.14, 65),  # oral tongue
)
# Centre (right side), spread and share of a node: levels II (twice), III, IV, V, Ib, retropharyngeal.
_STATIONS: tuple[tuple[Vector, Vector, float], ...] = (
    ((41, 0, 12), (3, 3, 5), 0.35),
    ((42, -14, 4), (3, 4, 5), 0.15),
    ((38, 0, -24), (3, 3, 7), 0.22),
    ((36, 2, -58), (3, 3, 7), 0.10),
    ((46, -34, -18), (3, 4, 9), 0.06),
    ((31, 32, -25), (3, 4, 3), 0.07),
    ((17, -8, 34), (2, 1, 5), 0.05),
)
_RETROPHARYNGEAL = 6
_NODE_COUNTS = {True: (0.08, 0.27, 0.30, 0.20, 0.10, 0.05), False: (0.36, 0.30, 0.18, 0.10, 0.04, 0.02)}


@dataclass(frozen=True)
class Lesion:
    """A tumour: a lobulated ellipsoid with an optional cystic or necrotic core and an uneven uptake.

    Attributes:
        label: ``GTVP`` or ``GTVN``.
        centre, semi, rotation: Ellipsoid in body coordinates.
        suv, hu: Uptake and CT value of the viable rim.
        core: Radius of the core as part of the lesion's (0 = none); ``core_suv``, ``core_hu`` are its values.
        uneven: Amplitude of the uptake's texture, as part of the uptake.
        lobulation: Amplitude of the surface's waves, as part of the radius.
        waves: (6, 4) wave vectors and phases, in units of the lesion's radius: 3 for the surface, 3 for the texture.
    """

    label: int
    centre: Vector
    semi: Vector
    rotation: NDArray[np.float64]
    suv: float
    hu: float
    core: float
    core_suv: float
    core_hu: float
    uneven: float
    lobulation: float
    waves: NDArray[np.float64]

    @property
    def radius_mm(self) -> float:
        """Radius of the ball of the same volume."""
        return math.prod(self.semi) ** (1 / 3)

    def bounds(self) -> NDArray[np.float64]:
        """Corners (2, 3) of the box around it, body coordinates."""
        grown = tuple(semi / (1 - self.lobulation) for semi in self.semi)
        return Ellipsoid(self.centre, (grown[0], grown[1], grown[2]), rotation=self.rotation).bounds()

    def fields(self, x: Array, y: Array, z: Array) -> tuple[Array, Array, Array]:
        """Relative radius (inside where <= 1), SUV and HU at body points that broadcast to one shape."""
        turn = self.rotation.T.astype(np.float32)
        offsets = (x - self.centre[0], y - self.centre[1], z - self.centre[2])
        unit = [
            (row[0] * offsets[0] + row[1] * offsets[1] + row[2] * offsets[2]) * np.float32(1 / semi)
            for row, semi in zip(turn, self.semi, strict=True)
        ]
        ripples = [
            np.sin(np.float32(a) * unit[0] + np.float32(b) * unit[1] + np.float32(c) * unit[2] + np.float32(phase))
            for a, b, c, phase in self.waves
        ]
        radius = np.sqrt(unit[0] ** 2 + unit[1] ** 2 + unit[2] ** 2)
        radius = radius * (1 + np.float32(self.lobulation / 3) * (ripples[0] + ripples[1] + ripples[2]))
        viable = np.clip((radius - self.core) / 0.15 + 0.5, 0, 1) if self.core > 0 else np.ones_like(radius)
        texture = 1 + np.float32(self.uneven / 3) * (ripples[3] + ripples[4] + ripples[5])
        suv = self.core_suv + viable * (self.suv * texture - self.core_suv)
        hu = self.core_hu + viable * (self.hu - self.core_hu)
        return radius, suv.astype(np.float32), hu.astype(np.float32)


def measure_lesions(lesions: tuple[Lesion, ...], pose: Pose, step_mm: float = 1.5) -> dict[str, float]:
    """Volumes (ml) of primary and nodes, mean and highest SUV of all tumour, sampled every ``step_mm`` of the body.

    What several lesions cover counts once, for the last of them, as in the images.
    """
    corners = np.array([lesion.bounds() for lesion in lesions])
    low, high = corners[:, 0].min(axis=0), corners[:, 1].max(axis=0)
    x, y, z = (np.arange(a, b, step_mm, dtype=np.float32) for a, b in zip(low, high, strict=True))
    label = np.zeros((len(z), len(y), len(x)), dtype=np.uint8)
    uptake = np.zeros(label.shape, dtype=np.float32)
    for lesion, ends in zip(lesions, corners, strict=True):
        first, last = np.floor((ends - low) / step_mm).astype(int) + np.array([[0], [2]])
        i, j, k = (slice(a, b) for a, b in zip(first, last, strict=True))
        radius, suv, _ = lesion.fields(x[None, None, i], y[None, j, None], z[k, None, None])
        label[k, j, i][radius <= 1] = lesion.label
        np.copyto(uptake[k, j, i], suv, where=radius <= 1)
    point_ml = step_mm**3 * float(pose.scale.prod()) / 1000
    values = uptake[label > 0]
    return {
        "gtvp_ml": float((label == GTVP).sum() * point_ml),
        "gtvn_ml": float((label == GTVN).sum() * point_ml),
        "suv_mean": float(values.mean(dtype=np.float64)),
        "suv_max": float(values.max()),
    }


def draw_lesions(rng: np.random.Generator, hpv: bool, contrast_hu: float) -> tuple[Lesion, ...]:
    """Primary (missing in a few, as in cancers of unknown primary) and 0 to 5 nodes or conglomerates of nodes.

    Diameters are log-normal: primaries of 10 (T1) to 70 mm (T4), nodes of 8 to 60 mm, conglomerates of up to 72 mm
    (200 ml, the most of all nodes together). A lesion that has no room beside the others is pushed outwards, then drawn
    again, then left out.
    """
    count = int(rng.choice(6, p=_NODE_COUNTS[hpv]))
    side = 1.0 if rng.random() < 0.5 else -1.0
    uptake = clipped_lognormal(rng, 9.5 if hpv else 13.0, 0.42, 2.6, 26.0)
    lesions = [_draw_primary(rng, hpv, side, uptake, contrast_hu)]
    for _ in range(count):
        for _ in range(30):
            drawn = _draw_nodes(rng, hpv, side, uptake, contrast_hu)
            placed = next((moved for mm in (0, 4, 8) if _have_room(moved := _pushed(drawn, mm), lesions)), None)
            if placed is not None:
                lesions += placed
                break
    if len(lesions) > 1 and rng.random() < 0.04:
        return tuple(lesions[1:])
    return tuple(lesions)


def _draw_primary(rng: np.random.Generator, hpv: bool, side: float, uptake: float, contrast_hu: float) -> Lesion:
    site = _SITES[int(rng.choice(len(_SITES), p=[site[2 if hpv else 3] for site in _SITES]))]
    centre = np.array(site[0]) + np.array(site[1]) * np.clip(rng.normal(size=3), -2, 2)
    diameter = clipped_lognormal(rng, 26 if hpv else 32, 0.38, 10, site[4])
    necrotic = diameter > 18 and rng.random() < min(diameter / 50, 1) * (0.2 if hpv else 0.9)
    thin_rim = rng.random() < 0.3
    core = float(rng.uniform(0.7, 0.85) if thin_rim else rng.uniform(0.3, 0.6))
    return _draw_lesion(
        rng, GTVP, centre * [side, 1, 1], diameter, uptake, contrast_hu,
        core=core if necrotic else 0.0, core_suv=float(rng.uniform(0.15, 0.4)) * uptake,
        core_hu=float(rng.uniform(15, 32)), uneven=0.25 if hpv else 0.40, irregular=rng.random() < 0.4,
    )  # fmt: skip


def _draw_nodes(
    rng: np.random.Generator, hpv: bool, side: float, uptake: float, contrast_hu: float
) -> tuple[Lesion, ...]:
    """A node, or the two to four matted nodes of a conglomerate, which overlap and follow each other down the neck."""
    number = int(rng.choice(len(_STATIONS), p=[station[2] for station in _STATIONS]))
    station = _STATIONS[number]
    centre = np.array(station[0]) + np.array(station[1]) * np.clip(rng.normal(size=3), -2, 2)
    flank = side if rng.random() < 0.75 else -side
    diameter = clipped_lognormal(rng, 22.0 if hpv else 17.0, 0.42, 8, 25 if number == _RETROPHARYNGEAL else 60)
    suv = float(np.clip(uptake * math.exp(rng.normal(-0.25, 0.35)), 2.0, 26.0))
    matted = number != _RETROPHARYNGEAL and diameter > 15 and rng.random() < 0.15
    parts = int(rng.integers(2, 5)) if matted else 1
    if matted:
        diameter = float(np.clip(diameter * math.exp(rng.uniform(0.2, 0.7)), 24, 72))
    if number != _RETROPHARYNGEAL:  # nodes grow outwards: the spine and the pharynx give way less than the skin
        centre[0] += 0.45 * max(0.0, diameter / 2 / parts ** (1 / 3) - 12)
    shares = rng.uniform(0.5, 1.0, size=parts)
    diameters = diameter * np.cbrt(shares / shares.sum())
    steps = rng.normal(size=(parts, 3)) * [0.35, 0.5, 0.0] - [0, 0, 1]
    steps *= 0.38 * (diameters + np.roll(diameters, 1))[:, None] / np.linalg.norm(steps, axis=1, keepdims=True)
    places = np.cumsum(steps, axis=0)
    places += centre - places.mean(axis=0)
    return tuple(
        _draw_node(rng, hpv, place * [flank, 1, 1], float(part), suv, contrast_hu, matted)
        for place, part in zip(places, diameters, strict=True)
    )


def _draw_node(
    rng: np.random.Generator, hpv: bool, centre: NDArray[np.float64], diameter: float, suv: float, contrast_hu: float,
    matted: bool,
) -> Lesion:  # fmt: skip
    """A node: cystic with a rim of any thickness where HPV positive, else with a necrotic core where it is large."""
    if hpv:
        hollow = diameter > 15 and rng.random() < 0.65
        core, core_suv, core_hu = rng.uniform(0.55, 0.88), rng.uniform(0.8, 1.6), rng.uniform(5, 18)
    else:
        hollow = diameter > 15 and rng.random() < (0.4 if diameter > 25 else 0.1)
        core, core_suv, core_hu = rng.uniform(0.3, 0.6), rng.uniform(0.2, 0.4) * suv, rng.uniform(18, 30)
    beyond_capsule = 0.7 if matted else 0.4 if diameter > 30 else 0.12
    return _draw_lesion(
        rng, GTVN, centre, diameter, suv, contrast_hu,
        core=float(core) if hollow else 0.0, core_suv=float(core_suv), core_hu=float(core_hu),
        uneven=0.30 if hpv else 0.15, irregular=rng.random() < beyond_capsule,
    )  # fmt: skip


def _draw_lesion(
    rng: np.random.Generator, label: int, centre: NDArray[np.float64], diameter: float, suv: float, contrast_hu: float,
    *, core: float, core_suv: float, core_hu: float, uneven: float, irregular: bool,
) -> Lesion:  # fmt: skip
    aspect = np.exp(np.clip(rng.normal(0, 0.13, size=3), -0.3, 0.3))
    semi = diameter / 2 * aspect / aspect.prod() ** (1 / 3)  # volume of a ball of that diameter
    directions = rng.normal(size=(6, 3))
    directions *= np.array([2.5, 3.0, 3.5, 3.5, 4.5, 5.5])[:, None] / np.linalg.norm(directions, axis=1, keepdims=True)
    if irregular:
        directions[:3] *= 1.5
    waves = np.concatenate([directions, rng.uniform(0, 2 * np.pi, size=(6, 1))], axis=1)
    return Lesion(
        label=label,
        centre=vector(centre),
        semi=vector(semi),
        rotation=rotation(rng.uniform(-0.6, 0.6, size=3)),
        suv=suv,
        hu=float(rng.normal(46, 5) + contrast_hu * rng.normal(0.28, 0.07)),
        core=core,
        core_suv=core_suv,
        core_hu=core_hu,
        uneven=uneven,
        lobulation=float(rng.uniform(0.18, 0.3) if irregular else rng.uniform(0.07, 0.12)),
        waves=waves,
    )


def _pushed(lesions: tuple[Lesion, ...], by_mm: float) -> tuple[Lesion, ...]:
    """The lesions further from the middle."""
    return tuple(
        dataclasses.replace(one, centre=(one.centre[0] + math.copysign(by_mm, one.centre[0]), *one.centre[1:]))
        for one in lesions
    )


def _have_room(new: tuple[Lesion, ...], others: list[Lesion]) -> bool:
    """Whether new nodes at most touch the other lesions, and all nodes together stay within what a neck holds."""
    nodes_ml = sum(one.radius_mm**3 for one in (*new, *others) if one.label == GTVN) * 4 / 3 * math.pi / 1000
    return nodes_ml <= 200 and all(
        math.dist(one.centre, other.centre) >= 0.97 * (one.radius_mm + other.radius_mm)
        for one in new
        for other in others
    )
