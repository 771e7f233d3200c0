"""Ellipsoids and tapered tubes that a body is made of, and how it lies in the scanner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Vector = tuple[float, float, float]
Keep = tuple[int, float, float]  # axis, lowest and highest body coordinate


@dataclass(frozen=True)
class Pose:
    """How a body lies in the scanner: ``world = rotation @ (scale * body) + shift``."""

    rotation: NDArray[np.float64]
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]

    def to_world(self, body: NDArray[np.float64]) -> NDArray[np.float64]:
        """World coordinates (N, 3) of body coordinates (N, 3)."""
        return (body * self.scale) @ self.rotation.T + self.shift

    def to_body_matrix(self) -> NDArray[np.float64]:
        """Matrix (3, 3) ``A`` with ``body = A @ (world - shift)``."""
        return self.rotation.T / self.scale[:, None]


@dataclass(frozen=True)
class Ellipsoid:
    """Ellipsoid in body coordinates, optionally turned and cut.

    ``hu`` and ``suv`` are what it paints on CT and PET; None leaves that image as it was.
    ``keep`` = (axis, low, high) keeps the part with body coordinate ``low <= p[axis] <= high``.
    """

    centre: Vector
    semi: Vector
    hu: float | None = None
    suv: float | None = None
    rotation: NDArray[np.float64] | None = None
    keep: Keep | None = None

    def bounds(self) -> NDArray[np.float64]:
        """Corners (2, 3) of the box around it, body coordinates."""
        reach = np.array(self.semi)
        if self.rotation is not None:
            reach = np.sqrt(((self.rotation * reach) ** 2).sum(axis=1))
        low, high = np.array(self.centre) - reach, np.array(self.centre) + reach
        return _kept_bounds(low, high, self.keep)

    def contains(self, x: Array, y: Array, z: Array) -> NDArray[np.bool_]:
        """Whether body points, given as offsets that broadcast to (Z, Y, X), lie inside."""
        offsets = (x - self.centre[0], y - self.centre[1], z - self.centre[2])
        if self.rotation is not None:
            turn = self.rotation.T.astype(np.float32)
            offsets = tuple(row[0] * offsets[0] + row[1] * offsets[1] + row[2] * offsets[2] for row in turn)
        radius = sum(np.square(offset * np.float32(1 / semi)) for offset, semi in zip(offsets, self.semi, strict=True))
        inside = radius <= 1.0
        return inside & _kept((x, y, z), self.keep)


@dataclass(frozen=True)
class Tube:
    """Elliptic tube between two heights, its centre and half-widths linear in body z.

    Attributes:
        bottom, top: ``(z, centre_x, centre_y, half_x, half_y)`` at either end.
        hu, suv, keep: As for :class:`Ellipsoid`.
    """

    bottom: tuple[float, float, float, float, float]
    top: tuple[float, float, float, float, float]
    hu: float | None = None
    suv: float | None = None
    keep: Keep | None = None

    def bounds(self) -> NDArray[np.float64]:
        """Corners (2, 3) of the box around it, body coordinates."""
        ends = np.array([self.bottom, self.top])
        low = np.array([*(ends[:, 1:3] - ends[:, 3:5]).min(axis=0), self.bottom[0]])
        high = np.array([*(ends[:, 1:3] + ends[:, 3:5]).max(axis=0), self.top[0]])
        return _kept_bounds(low, high, self.keep)

    def contains(self, x: Array, y: Array, z: Array) -> NDArray[np.bool_]:
        """Whether body points, given as arrays that broadcast to (Z, Y, X), lie inside."""
        slope = (np.array(self.top) - np.array(self.bottom)) / (self.top[0] - self.bottom[0])
        start = np.array(self.bottom) - slope * self.bottom[0]
        centre_x, centre_y, half_x, half_y = (
            np.float32(slope[i]) * z + np.float32(start[i]) if slope[i] else np.float32(start[i]) for i in range(1, 5)
        )
        inside = np.square((x - centre_x) / half_x) + np.square((y - centre_y) / half_y) <= 1.0
        inside &= (z >= self.bottom[0]) & (z <= self.top[0])
        return inside & _kept((x, y, z), self.keep)


Part = Ellipsoid | Tube


def _kept_bounds(low: NDArray[np.float64], high: NDArray[np.float64], keep: Keep | None) -> NDArray[np.float64]:
    """Corners (2, 3) of the part of a box that is kept."""
    if keep is not None:
        axis, least, most = keep
        low[axis], high[axis] = max(low[axis], least), min(high[axis], most)
    return np.stack([low, high])


def _kept(point: Sequence[Array], keep: Keep | None) -> NDArray[np.bool_] | bool:
    """Whether body points, arrays of x, y and z that broadcast, are in the part that is kept."""
    if keep is None:
        return True
    axis, least, most = keep
    return (point[axis] >= least) & (point[axis] <= most)


def vector(values: NDArray[np.float64]) -> Vector:
    """Three numbers as a tuple."""
    return float(values[0]), float(values[1]), float(values[2])


def rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation matrix (3, 3) about x, then y, then z, of three angles in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def clipped_lognormal(rng: np.random.Generator, median: float, spread: float, low: float, high: float) -> float:
    """A number whose logarithm is normal with SD ``spread``, clipped."""
    return float(np.clip(median * math.exp(rng.normal(0.0, spread)), low, high))
