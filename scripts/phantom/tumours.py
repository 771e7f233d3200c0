"""Primary tumours and nodes: where they sit, how large they are and what they take up, by HPV status."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scripts.keys import GTVN, GTVP

from .shapes import Array, Ellipsoid, Pose, Vector, rotation, vector

# Centre (for the right side), spread (SD) and shares among HPV positive and negative patients.
_SITES: tuple[tuple[Vector, Vector, float, float], ...] = (
    ((20, 9, 8), (2, 3, 5), 0.54, 0.32),  # tonsil
    ((9, 23, -6), (3, 3, 4), 0.40, 0.22),  # base of tongue
    ((4, 17, 30), (4, 2, 2), 0.03, 0.10),  # soft palate
    ((11, 14, -44), (3, 3, 5), 0.02, 0.22),  # larynx and hypopharynx
    ((14, 44, 14), (4, 5, 4), 0.01, 0.14),  # oral tongue
)
# Centre (right side), spread and share of a node: levels II (twice), III, IV, V, Ib.
_STATIONS: tuple[tuple[Vector, Vector, float], ...] = (
    ((41, 0, 12), (3, 3, 5), 0.36),
    ((42, -14, 4), (3, 4, 5), 0.16),
    ((38, 0, -24), (3, 3, 7), 0.24),
    ((36, 2, -58), (3, 3, 7), 0.10),
    ((46, -34, -18), (3, 4, 9), 0.06),
    ((31, 32, -25), (3, 4, 3), 0.08),
)
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
    waves: NDArray[np.float64]

    LOBULATION = 0.10

    def bounds(self) -> NDArray[np.float64]:
        """Corners (2, 3) of the box around it, body coordinates."""
        grown = tuple(semi / (1 - self.LOBULATION) for semi in self.semi)
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
        radius = radius * (1 + np.float32(self.LOBULATION / 3) * (ripples[0] + ripples[1] + ripples[2]))
        viable = np.clip((radius - self.core) / 0.15 + 0.5, 0, 1) if self.core > 0 else np.ones_like(radius)
        texture = 1 + np.float32(self.uneven / 3) * (ripples[3] + ripples[4] + ripples[5])
        suv = self.core_suv + viable * (self.suv * texture - self.core_suv)
        hu = self.core_hu + viable * (self.hu - self.core_hu)
        return radius, suv.astype(np.float32), hu.astype(np.float32)


def measure_lesions(lesions: tuple[Lesion, ...], pose: Pose, step_mm: float = 1.5) -> dict[str, float]:
    """Volumes (ml) of primary and nodes, mean and highest SUV of all tumour, sampled every ``step_mm`` of the body."""
    point_ml = step_mm**3 * float(pose.scale.prod()) / 1000
    volume = {GTVP: 0.0, GTVN: 0.0}
    uptake: list[Array] = []
    for lesion in lesions:
        low, high = lesion.bounds()
        x, y, z = (np.arange(a, b, step_mm, dtype=np.float32) for a, b in zip(low, high, strict=True))
        radius, suv, _ = lesion.fields(x[None, None, :], y[None, :, None], z[:, None, None])
        inside = suv[radius <= 1]
        volume[lesion.label] += inside.size * point_ml
        uptake.append(inside)
    values = np.concatenate(uptake)
    return {
        "gtvp_ml": volume[GTVP],
        "gtvn_ml": volume[GTVN],
        "suv_mean": float(values.mean(dtype=np.float64)),
        "suv_max": float(values.max()),
    }


def draw_lesions(rng: np.random.Generator, hpv: bool) -> tuple[Lesion, ...]:
    """Primary (missing in a few, as in cancers of unknown primary) and 0 to 5 nodes that do not overlap."""
    count = int(rng.choice(6, p=_NODE_COUNTS[hpv]))
    side = 1.0 if rng.random() < 0.5 else -1.0
    uptake = float(np.clip(math.exp(rng.normal(math.log(9.5 if hpv else 13.0), 0.32)), 4.5, 26.0))
    lesions = [_draw_primary(rng, hpv, side, uptake)]
    for _ in range(count):
        node = _draw_node(rng, hpv, side, uptake)
        for _ in range(30):  # somewhere free; a neck that is full gets no further node
            if all(_apart(node, other) for other in lesions):
                lesions.append(node)
                break
            node = _draw_node(rng, hpv, side, uptake)
    if len(lesions) > 1 and rng.random() < 0.03:
        return tuple(lesions[1:])
    return tuple(lesions)


def _draw_primary(rng: np.random.Generator, hpv: bool, side: float, uptake: float) -> Lesion:
    site = _SITES[int(rng.choice(len(_SITES), p=[site[2 if hpv else 3] for site in _SITES]))]
    centre = np.array(site[0]) + np.array(site[1]) * np.clip(rng.normal(size=3), -2, 2)
    diameter = float(np.clip(math.exp(rng.normal(math.log(29 if hpv else 36), 0.24)), 21, 52))
    necrotic = rng.random() < (0.10 if hpv else 0.60)
    return _draw_lesion(
        rng, GTVP, centre * [side, 1, 1], diameter, uptake,
        core=float(rng.uniform(0.35, 0.6)) if necrotic else 0.0, core_suv=0.35 * uptake, core_hu=28.0,
        uneven=0.25 if hpv else 0.40,
    )  # fmt: skip


def _draw_node(rng: np.random.Generator, hpv: bool, side: float, uptake: float) -> Lesion:
    station = _STATIONS[int(rng.choice(len(_STATIONS), p=[station[2] for station in _STATIONS]))]
    centre = np.array(station[0]) + np.array(station[1]) * np.clip(rng.normal(size=3), -2, 2)
    flank = side if rng.random() < 0.75 else -side
    diameter = float(np.clip(math.exp(rng.normal(math.log(24 if hpv else 18.5), 0.22)), 15, 36))
    cystic = diameter > 17 and rng.random() < (0.65 if hpv else 0.10)
    return _draw_lesion(
        rng, GTVN, centre * [flank, 1, 1], diameter,
        float(np.clip(uptake * math.exp(rng.normal(-0.25, 0.2)), 3.5, 22.0)),
        core=float(rng.uniform(0.55, 0.72)) if cystic else 0.0, core_suv=1.3, core_hu=12.0,
        uneven=0.30 if hpv else 0.15,
    )  # fmt: skip


def _draw_lesion(
    rng: np.random.Generator, label: int, centre: NDArray[np.float64], diameter: float, suv: float, *,
    core: float, core_suv: float, core_hu: float, uneven: float,
) -> Lesion:  # fmt: skip
    aspect = np.exp(np.clip(rng.normal(0, 0.13, size=3), -0.3, 0.3))
    semi = diameter / 2 * aspect / aspect.prod() ** (1 / 3)  # volume of a ball of that diameter
    directions = rng.normal(size=(6, 3))
    directions *= np.array([2.5, 3.0, 3.5, 3.5, 4.5, 5.5])[:, None] / np.linalg.norm(directions, axis=1, keepdims=True)
    waves = np.concatenate([directions, rng.uniform(0, 2 * np.pi, size=(6, 1))], axis=1)
    return Lesion(
        label=label,
        centre=vector(centre),
        semi=vector(semi),
        rotation=rotation(rng.uniform(-0.6, 0.6, size=3)),
        suv=suv,
        hu=float(rng.normal(72, 8)),
        core=core,
        core_suv=core_suv,
        core_hu=core_hu,
        uneven=uneven,
        waves=waves,
    )


def _apart(one: Lesion, other: Lesion) -> bool:
    gap = float(np.linalg.norm(np.array(one.centre) - np.array(other.centre)))
    return gap >= 1.02 * (max(one.semi) + max(other.semi))
