"""Digital PET/CT phantom of the head and neck: patients, anatomy, tumours, scans, outcomes. Pure functions.

Nothing here comes from a real patient: the shapes are ellipsoids and tapered tubes of about adult size, the uptake
values are of the order seen with FDG. The cohort serves to try and test software, never to draw a clinical conclusion.

A patient is :func:`draw_patient` of a seed and an index, and nothing else: the same patient can be scanned at either
scale, in any order, in any process. Lengths are millimetres; *body* coordinates are right-anterior-superior with the
origin in the oropharynx; a :class:`Pose` takes them to *world* coordinates (RAS+), in which every image grid lives.

Outcome (time to relapse ``T`` in days, proportional hazards on a Weibull baseline with shape ``k`` and scale ``s``)::

    log_hazard = 1.3 ln(volume_ml / 25) + 0.12 (suv_mean - 8) + 0.9 [HPV negative] + 0.5 performance_status + 1.2 [M1]
    T = s (E / exp(log_hazard)) ** (1 / k),  E ~ Exp(1)

with the patient's true values, whether or not the cohort's CSV shows them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from scripts.keys import GTVN, GTVP

Array = NDArray[np.float32]
Vector = tuple[float, float, float]
SCALES = ("small", "full")

HAZARD_WEIGHTS = {"log_volume": 1.3, "suv_mean": 0.12, "hpv_negative": 0.9, "performance_status": 0.5, "m1": 1.2}
REFERENCE_VOLUME_ML, REFERENCE_SUV = 25.0, 8.0
WEIBULL_SHAPE, WEIBULL_SCALE_DAYS = 0.9, 44_000.0
FOLLOW_UP_MEDIAN_DAYS, FOLLOW_UP_SPREAD = 1500.0, 0.55
SHORTEST_DAYS, LONGEST_DAYS = 7, 5888  # range of RFS in HECKTOR 2025

# Streams of random numbers of a case: one purpose cannot shift the numbers of another.
_STREAM_BODY, _STREAM_LESIONS, _STREAM_CLINICAL, _STREAM_OUTCOME, _STREAM_SCAN, _STREAM_CT, _STREAM_PET, _STREAM_SEX = (
    range(8)
)
# Quantities spread evenly over the cases (see _spread), each with a square root that no other can be built from.
_EVEN = {
    name: math.sqrt(prime) % 1.0
    for name, prime in {"centre": 2, "hpv": 3, "mask": 5, "hpv_known": 7, "rfs": 11, "habits": 13, "ps": 17}.items()
}


@dataclass(frozen=True)
class Centre:
    """A hospital: how it scans and what its records lack.

    Attributes:
        name, center_id: As in HECKTOR 2025.
        share: Part of the cohort's patients (milder than the real one, where MDA alone has 62 %).
        ct_mm, pet_mm: Voxel sizes at scale ``full``.
        fov_mm: Field of view of CT at scale ``full`` (width, depth); PET's is wider or narrower by ``pet_margin_mm``.
        length_mm: Scan length at scale ``full``; 700 mm or more reaches the abdomen.
        small_ct_mm, small_pet_mm: Voxel sizes at scale ``small``.
        ct_noise_hu, contrast_hu: Noise SD at scale ``full``; enhancement of vessels.
        hpv_share, chemo_share: Share of HPV positive patients, and of chemoradiotherapy.
        no_mask, no_hpv, no_rfs, no_habits, no_ps: Rates at which a label or value is missing.
    """

    name: str
    center_id: int
    share: float
    ct_mm: Vector
    pet_mm: Vector
    fov_mm: float
    pet_margin_mm: float
    length_mm: float
    small_ct_mm: Vector
    small_pet_mm: Vector
    ct_noise_hu: float
    contrast_hu: float
    hpv_share: float
    chemo_share: float
    no_mask: float
    no_hpv: float
    no_rfs: float
    no_habits: float
    no_ps: float


# fmt: off
CENTRES = (
    Centre("CHUM", 1, 0.11, (0.98, 0.98, 2.0), (4.0, 4.0, 4.0), 500, 40, 310, (6.4, 6.4, 6.5), (6.6, 6.6, 6.5),
           16, 90, 0.62, 0.80, 0.10, 0.25, 0.05, 0.55, 0.55),
    Centre("CHUP", 2, 0.09, (1.37, 1.37, 3.0), (2.73, 2.73, 3.27), 548, 20, 900, (6.8, 6.8, 6.6), (6.2, 6.2, 6.6),
           12, 0, 0.50, 0.70, 0.12, 0.45, 0.10, 0.20, 0.35),
    Centre("CHUS", 3, 0.13, (1.17, 1.17, 3.0), (4.0, 4.0, 4.0), 600, -30, 340, (6.6, 6.6, 6.4), (6.9, 6.9, 6.8),
           14, 0, 0.60, 0.85, 0.12, 0.30, 0.05, 0.75, 0.70),
    Centre("MDA", 5, 0.44, (0.98, 0.98, 3.27), (5.47, 5.47, 3.27), 500, 100, 330, (6.5, 6.5, 6.5), (6.5, 6.5, 6.5),
           13, 100, 0.72, 0.75, 0.14, 0.12, 0.08, 0.15, 0.20),
    Centre("HGJ", 6, 0.11, (0.98, 0.98, 3.27), (3.52, 3.52, 3.27), 500, 60, 300, (6.4, 6.4, 6.6), (6.7, 6.7, 6.6),
           12, 0, 0.60, 0.88, 0.08, 0.35, 0.06, 0.40, 0.60),
    Centre("HMR", 7, 0.06, (0.49, 0.49, 2.0), (3.52, 3.52, 3.27), 250, 300, 290, (6.2, 6.2, 6.4), (6.7, 6.7, 6.8),
           20, 110, 0.55, 0.85, 0.10, 0.35, 0.05, 0.50, 0.50),
    Centre("USZ", 8, 0.06, (2.73, 2.73, 3.0), (0.98, 0.98, 2.5), 546, -290, 820, (7.0, 7.0, 6.8), (6.4, 6.4, 6.6),
           10, 0, 0.55, 0.80, 0.10, 0.30, 0.06, 0.30, 0.70),
)
# fmt: on


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
    keep: tuple[int, float, float] | None = None

    def bounds(self) -> NDArray[np.float64]:
        """Corners (2, 3) of the box around it, body coordinates."""
        reach = np.array(self.semi)
        if self.rotation is not None:
            reach = np.sqrt(((self.rotation * reach) ** 2).sum(axis=1))
        low, high = np.array(self.centre) - reach, np.array(self.centre) + reach
        if self.keep is not None:
            axis, least, most = self.keep
            low[axis], high[axis] = max(low[axis], least), min(high[axis], most)
        return np.stack([low, high])

    def contains(self, x: Array, y: Array, z: Array) -> NDArray[np.bool_]:
        """Whether body points, given as offsets that broadcast to (Z, Y, X), lie inside."""
        offsets = (x - self.centre[0], y - self.centre[1], z - self.centre[2])
        if self.rotation is not None:
            turn = self.rotation.T.astype(np.float32)
            offsets = tuple(row[0] * offsets[0] + row[1] * offsets[1] + row[2] * offsets[2] for row in turn)
        radius = sum(np.square(offset * np.float32(1 / semi)) for offset, semi in zip(offsets, self.semi, strict=True))
        inside = radius <= 1.0
        if self.keep is not None:
            axis, least, most = self.keep
            inside &= ((x, y, z)[axis] >= least) & ((x, y, z)[axis] <= most)
        return inside


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
    keep: tuple[int, float, float] | None = None

    def bounds(self) -> NDArray[np.float64]:
        """Corners (2, 3) of the box around it, body coordinates."""
        ends = np.array([self.bottom, self.top])
        low = np.array([*(ends[:, 1:3] - ends[:, 3:5]).min(axis=0), self.bottom[0]])
        high = np.array([*(ends[:, 1:3] + ends[:, 3:5]).max(axis=0), self.top[0]])
        if self.keep is not None:
            axis, least, most = self.keep
            low[axis], high[axis] = max(low[axis], least), min(high[axis], most)
        return np.stack([low, high])

    def contains(self, x: Array, y: Array, z: Array) -> NDArray[np.bool_]:
        """Whether body points, given as arrays that broadcast to (Z, Y, X), lie inside."""
        slope = (np.array(self.top) - np.array(self.bottom)) / (self.top[0] - self.bottom[0])
        start = np.array(self.bottom) - slope * self.bottom[0]
        centre_x, centre_y, half_x, half_y = (
            np.float32(slope[i]) * z + np.float32(start[i]) if slope[i] else np.float32(start[i]) for i in range(1, 5)
        )
        inside = np.square((x - centre_x) / half_x) + np.square((y - centre_y) / half_y) <= 1.0
        inside &= (z >= self.bottom[0]) & (z <= self.top[0])
        if self.keep is not None:
            axis, least, most = self.keep
            inside &= ((x, y, z)[axis] >= least) & ((x, y, z)[axis] <= most)
        return inside


Part = Ellipsoid | Tube


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


@dataclass(frozen=True)
class Patient:
    """A phantom patient: the truth, and which of it the records show.

    Attributes:
        patient_id, centre: Identity.
        age, male, tobacco, alcohol, chemotherapy, performance_status, m1, hpv: True clinical values.
        missing: Names of the CSV columns that are left empty (``M-stage`` reads ``Mx``); ``mask`` = no mask is written.
        pose, body: Position, and build and uptake of the tissues by name.
        lesions: The tumours, primary first.
        gtvp_ml, gtvn_ml, suv_mean, suv_max: The lesions' true volumes and uptake, before any scanner.
        log_hazard: As the module's docstring says.
        rfs_days, relapse: Days to relapse or last visit; whether it was a relapse.
    """

    patient_id: str
    centre: Centre
    age: int
    male: bool
    tobacco: bool
    alcohol: bool
    chemotherapy: bool
    performance_status: int
    m1: bool
    hpv: bool
    missing: frozenset[str]
    pose: Pose
    body: dict[str, float]
    lesions: tuple[Lesion, ...]
    gtvp_ml: float
    gtvn_ml: float
    suv_mean: float
    suv_max: float
    log_hazard: float
    rfs_days: int
    relapse: bool


@dataclass(frozen=True)
class Grid:
    """An axis-aligned image grid: voxel counts, voxel sizes and the world position of voxel (0, 0, 0).

    As in HECKTOR's files the first two voxel axes run to the left and to the back (affine ``diag(-dx, -dy, dz)``).
    """

    shape: tuple[int, int, int]
    spacing_mm: Vector
    origin_mm: Vector

    @property
    def affine(self) -> NDArray[np.float64]:
        """Voxel -> world matrix (4, 4)."""
        matrix = np.diag([-self.spacing_mm[0], -self.spacing_mm[1], self.spacing_mm[2], 1.0])
        matrix[:3, 3] = self.origin_mm
        return matrix

    def finer(self, factor: int) -> Grid:
        """The same field of view with every voxel cut into ``factor`` along each axis."""
        signs = (-1, -1, 1)
        spacing = tuple(size / factor for size in self.spacing_mm)
        origin = tuple(
            start + sign * (fine - coarse) / 2
            for start, sign, fine, coarse in zip(self.origin_mm, signs, spacing, self.spacing_mm, strict=True)
        )
        shape = tuple(count * factor for count in self.shape)
        return Grid(
            (shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2]), (origin[0], origin[1], origin[2])
        )


@dataclass(frozen=True)
class Scan:
    """A patient's images (X, Y, Z): CT in HU, PET times ``pet_slope`` in SUV, tumour mask on the CT grid."""

    ct: NDArray[np.int16]
    ct_grid: Grid
    pet: NDArray[np.int16]
    pet_slope: float
    pet_grid: Grid
    mask: NDArray[np.uint8]


# --- patients ----------------------------------------------------------------------------------------------

COHORT_IDS = 10_000  # numbers kept for each seed: phantoms of two cohorts are not taken for the same patient


def draw_patient(seed: int, index: int) -> Patient:
    """Patient number ``index`` (from 0) of the cohort ``seed``; depends on nothing else."""
    centre = _pick_centre(_spread(seed, index, "centre"))
    hpv = _spread(seed, index, "hpv") < centre.hpv_share
    male = _stream(seed, index, _STREAM_SEX).random() < (0.86 if hpv else 0.76)
    body, pose = _draw_body(_stream(seed, index, _STREAM_BODY), male)
    lesions = _draw_lesions(_stream(seed, index, _STREAM_LESIONS), hpv)
    sizes = measure_lesions(lesions, pose)
    volume_ml = sizes["gtvp_ml"] + sizes["gtvn_ml"]
    clinical = _draw_clinical(_stream(seed, index, _STREAM_CLINICAL), centre, hpv, volume_ml)
    status, m1 = int(clinical["performance_status"]), bool(clinical["m1"])
    hazard = log_hazard(volume_ml, sizes["suv_mean"], hpv, status, m1)
    days, relapse = _draw_outcome(_stream(seed, index, _STREAM_OUTCOME), hazard)
    return Patient(
        patient_id=f"{centre.name}-{COHORT_IDS * seed + index + 1:03d}",
        centre=centre,
        age=int(clinical["age"]),
        male=male,
        tobacco=bool(clinical["tobacco"]),
        alcohol=bool(clinical["alcohol"]),
        chemotherapy=bool(clinical["chemotherapy"]),
        performance_status=status,
        m1=m1,
        hpv=hpv,
        missing=_draw_missing(seed, index, centre, clinical),
        pose=pose,
        body=body,
        lesions=lesions,
        **sizes,
        log_hazard=hazard,
        rfs_days=days,
        relapse=relapse,
    )


def log_hazard(volume_ml: float, suv_mean: float, hpv: bool, performance_status: int, m1: bool) -> float:
    """True log hazard of a patient, by the formula in the module's docstring.

    >>> log_hazard(25.0, 8.0, True, 0, False)
    0.0
    >>> round(log_hazard(50.0, 8.0, True, 0, False), 3) == round(HAZARD_WEIGHTS["log_volume"] * math.log(2), 3)
    True
    """
    return (
        HAZARD_WEIGHTS["log_volume"] * math.log(volume_ml / REFERENCE_VOLUME_ML)
        + HAZARD_WEIGHTS["suv_mean"] * (suv_mean - REFERENCE_SUV)
        + HAZARD_WEIGHTS["hpv_negative"] * (not hpv)
        + HAZARD_WEIGHTS["performance_status"] * performance_status
        + HAZARD_WEIGHTS["m1"] * m1
    )


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


def _stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, purpose])


def _spread(seed: int, index: int, name: str) -> float:
    """A number in [0, 1), evenly spread over the indices (Kronecker sequence) so that small cohorts are mixed too."""
    start = np.random.default_rng([seed, list(_EVEN).index(name)]).random()
    return (start + (index + 1) * _EVEN[name]) % 1.0


def _pick_centre(position: float) -> Centre:
    edges = np.cumsum([centre.share for centre in CENTRES])
    return CENTRES[min(int(np.searchsorted(edges, position, side="right")), len(CENTRES) - 1)]


def _draw_clinical(rng: np.random.Generator, centre: Centre, hpv: bool, volume_ml: float) -> dict[str, float]:
    """Clinical values; large tumours go with worse performance status, metastases and chemotherapy."""
    burden = math.log(volume_ml / REFERENCE_VOLUME_ML)
    age = float(np.clip(rng.normal(60 if hpv else 65, 9), 34, 89))
    status = rng.normal(0.45 + 0.45 * burden + 0.02 * (age - 62), 0.75)
    return {
        "age": round(age),
        "tobacco": float(rng.random() < (0.36 if hpv else 0.82)),
        "alcohol": float(rng.random() < (0.32 if hpv else 0.66)),
        "chemotherapy": float(rng.random() < centre.chemo_share + 0.10 * burden - (0.25 if age > 72 else 0.0)),
        "performance_status": float(np.clip(round(status), 0, 4)),
        "m1": float(rng.random() < 0.05 * math.exp(0.6 * burden)),
        "u_treatment": rng.random(),
        "u_m_stage": rng.random(),
    }


def _draw_missing(seed: int, index: int, centre: Centre, clinical: dict[str, float]) -> frozenset[str]:
    """Columns (and ``mask``) that the centre did not record for this patient."""
    habits = _spread(seed, index, "habits")
    gaps = {
        "mask": _spread(seed, index, "mask") < centre.no_mask,
        "HPV Status": _spread(seed, index, "hpv_known") < centre.no_hpv,
        "RFS": _spread(seed, index, "rfs") < centre.no_rfs,
        "Tobacco Consumption": habits < centre.no_habits,
        "Alcohol Consumption": habits < centre.no_habits + 0.01,
        "Performance Status": _spread(seed, index, "ps") < centre.no_ps,
        "Treatment": clinical["u_treatment"] < 0.02,
        "M-stage": clinical["u_m_stage"] < 0.03,
    }
    return frozenset(name for name, gap in gaps.items() if gap)


def _draw_outcome(rng: np.random.Generator, hazard: float) -> tuple[int, bool]:
    relapse_days = WEIBULL_SCALE_DAYS * (rng.exponential() / math.exp(hazard)) ** (1 / WEIBULL_SHAPE)
    last_visit = float(np.clip(FOLLOW_UP_MEDIAN_DAYS * math.exp(FOLLOW_UP_SPREAD * rng.normal()), 90, LONGEST_DAYS))
    days = int(np.clip(math.ceil(min(relapse_days, last_visit)), SHORTEST_DAYS, LONGEST_DAYS))
    return days, bool(relapse_days <= last_visit)


def _draw_body(rng: np.random.Generator, male: bool) -> tuple[dict[str, float], Pose]:
    """Build, tissue uptake and pose: some degrees and millimetres, and any table position along z."""
    size = rng.normal(1.0 if male else 0.94, 0.03)
    scale = np.clip(size * rng.normal(1.0, 0.02, size=3), 0.84, 1.10)
    angles = np.deg2rad(np.clip(rng.normal(0.0, [3.5, 2.5, 4.0]), -9, 9))
    shift = np.array([rng.normal(0, 6), rng.normal(0, 6), rng.uniform(-900, 300)])
    body = {
        "fat_mm": float(np.clip(rng.normal(7, 3), 2.5, 15)),
        "brain": float(np.clip(rng.normal(9.5, 1.8), 6.0, 14.0)),
        "tonsil": float(np.clip(rng.normal(3.8, 0.8), 2.2, 5.8)),
        "gland": float(np.clip(rng.normal(2.3, 0.4), 1.5, 3.4)),
        "muscle": float(np.clip(rng.normal(0.8, 0.1), 0.6, 1.1)),
        "blood": float(np.clip(rng.normal(1.7, 0.2), 1.2, 2.2)),
        "larynx": float(np.clip(rng.normal(2.2, 0.6), 1.2, 4.0)),
        "brown_fat": float(rng.uniform(3, 7)) if rng.random() < 0.05 else 0.0,
        "heart": float(rng.uniform(1.8, 7)),
        "bladder": float(rng.uniform(8, 30)),
    }
    return body, Pose(_rotation(angles), scale, shift)


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation matrix (3, 3) about x, then y, then z, of three angles in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


# --- tumours -----------------------------------------------------------------------------------------------

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


def _draw_lesions(rng: np.random.Generator, hpv: bool) -> tuple[Lesion, ...]:
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
        centre=_vector(centre),
        semi=_vector(semi),
        rotation=_rotation(rng.uniform(-0.6, 0.6, size=3)),
        suv=suv,
        hu=float(rng.normal(72, 8)),
        core=core,
        core_suv=core_suv,
        core_hu=core_hu,
        uneven=uneven,
        waves=waves,
    )


def _vector(values: NDArray[np.float64]) -> Vector:
    return float(values[0]), float(values[1]), float(values[2])


def _apart(one: Lesion, other: Lesion) -> bool:
    gap = float(np.linalg.norm(np.array(one.centre) - np.array(other.centre)))
    return gap >= 1.02 * (max(one.semi) + max(other.semi))


# --- anatomy -----------------------------------------------------------------------------------------------

# Outline of neck and trunk: (z, centre_x, centre_y, half_x, half_y), from the top down.
_TRUNK = (
    (50.0, 0.0, -14.0, 55.0, 58.0),
    (-20.0, 0.0, -12.0, 57.0, 55.0),
    (-70.0, 0.0, -18.0, 60.0, 58.0),
    (-90.0, 0.0, -22.0, 84.0, 64.0),
    (-110.0, 0.0, -25.0, 128.0, 76.0),
    (-130.0, 0.0, -27.0, 162.0, 86.0),
    (-160.0, 0.0, -28.0, 192.0, 96.0),
    (-210.0, 0.0, -28.0, 206.0, 102.0),
    (-265.0, 0.0, -26.0, 172.0, 106.0),
    (-450.0, 0.0, -26.0, 158.0, 104.0),
    (-600.0, 0.0, -26.0, 170.0, 106.0),
    (-950.0, 0.0, -26.0, 170.0, 104.0),
)
# Front of the spine's bodies: (z, y); cervical lordosis, thoracic kyphosis, lumbar lordosis.
_SPINE_Z = (-700.0, -620.0, -520.0, -420.0, -280.0, -200.0, -110.0, -60.0, 0.0, 50.0)
_SPINE_Y = (-75.0, -60.0, -38.0, -46.0, -68.0, -64.0, -44.0, -26.0, -17.0, -20.0)


def build_anatomy(body: dict[str, float], lesions: tuple[Lesion, ...] = ()) -> list[Part]:
    """Parts of the body in painting order: a later part covers an earlier one.

    Args:
        body: Build and uptake by name, of :func:`draw_patient`.
        lesions: Tumours that make the skin bulge; they are not painted here.
    """
    return [
        *_outline(body, lesions),
        *_trunk_organs(body),
        *_neck_spaces(body),
        *_spine(),
        *_skull_and_brain(body),
        *_face(body),
        *_airway(),
        *_glands(body),
    ]


def _mirrored(part: Ellipsoid) -> tuple[Ellipsoid, Ellipsoid]:
    """An organ on the right and its image on the left."""
    x, y, z = part.centre
    turn = None if part.rotation is None else part.rotation * np.outer([-1, 1, 1], [-1, 1, 1])
    return part, Ellipsoid((-x, y, z), part.semi, part.hu, part.suv, turn, part.keep)


def _chain(
    points: tuple[tuple[float, float, float, float, float], ...], hu: float | None, suv: float | None
) -> list[Part]:
    """Tubes through the points, which run from the top down."""
    return [Tube(low, high, hu, suv) for high, low in itertools.pairwise(points)]


def _outline(body: dict[str, float], lesions: tuple[Lesion, ...]) -> Iterator[Part]:
    """Skin, then fat, then muscle, of all regions: each layer is the union of the regions shrunk to its depth."""
    layers = ((0.0, 20.0, 0.5), (2.0, -100.0, 0.3), (2.0 + body["fat_mm"], 55.0, body["muscle"]))
    for depth, hu, suv in layers:
        lean = min(depth, 5.0)  # scalp, face and nape carry less fat than the trunk
        regions: list[tuple[Vector, Vector]] = [
            ((0, -8, 122), (75, 95, 70)),
            ((0, -8, 78), (73, 76, 44)),
            ((-32, 66, 76), (27, 24, 24)),
            ((32, 66, 76), (27, 24, 24)),
            ((0, 38, 48), (62, 56, 72)),
            ((0, 54, -2), (40, 38, 26)),
            ((0, 91, 48), (14, 18, 19)),
        ]
        regions += [(lesion.centre, _grown(lesion.semi, 7.0)) for lesion in lesions if lesion.label == GTVN]
        for centre, semi in regions:
            yield Ellipsoid(centre, _grown(semi, -lean), hu, suv)
        for x in (-73.0, 73.0):
            yield Ellipsoid((x, -14, 66), _grown((8, 15, 28), -min(depth, 2.0)), hu, suv)
        trunk = tuple(
            (z, x, y, a - (lean if z > -80 else depth), b - (lean if z > -80 else depth)) for z, x, y, a, b in _TRUNK
        )
        yield from _chain(trunk, hu, suv)
        for x in (-216.0, 216.0):
            yield Tube((-700, x, -40, 38 - depth, 40 - depth), (-165, x * 0.93, -34, 44 - depth, 52 - depth), hu, suv)


def _grown(semi: Vector, by_mm: float) -> Vector:
    return (max(semi[0] + by_mm, 1.0), max(semi[1] + by_mm, 1.0), max(semi[2] + by_mm, 1.0))


def _trunk_organs(body: dict[str, float]) -> Iterator[Part]:
    """Lungs, heart, liver, kidneys, bladder, shoulder bones: seen in part or only in long scans."""
    yield from _mirrored(Ellipsoid((78, -24, -222), (62, 78, 128), -840, 0.5))
    yield Ellipsoid((0, -10, -215), (26, 62, 110), 45, body["blood"])
    yield Ellipsoid((-32, 12, -300), (56, 46, 48), 50, body["heart"])
    yield Ellipsoid((-30, 12, -300), (34, 26, 30), 50, body["blood"])
    yield Ellipsoid((62, -12, -392), (92, 80, 72), 65, 2.3)
    yield Ellipsoid((-100, -50, -385), (36, 42, 52), 55, 2.0)
    yield from _mirrored(Ellipsoid((62, -72, -470), (28, 26, 52), 40, 3.5))
    yield Ellipsoid((0, 8, -645), (38, 32, 30), 8, body["bladder"])
    yield from _mirrored(Ellipsoid((110, -30, -620), (14, 46, 60), 350, 1.4))
    yield Ellipsoid((0, 55, -190), (18, 7, 70), 220, 1.2)
    yield from _mirrored(Ellipsoid((78, 16, -108), (66, 7, 6), 550, 1.0, _rotation(np.array([0.0, -0.12, -0.35]))))
    yield from _mirrored(Ellipsoid((172, -36, -152), (25, 25, 25), 380, 1.0))
    yield from _mirrored(Ellipsoid((118, -84, -190), (46, 7, 62), 450, 1.0, _rotation(np.array([0.0, 0.0, 0.35]))))


def _neck_spaces(body: dict[str, float]) -> Iterator[Part]:
    """Fat planes, the sternocleidomastoid muscles, great vessels and thyroid."""
    fat, muscle, blood = 0.35, body["muscle"], body["blood"]
    for side in (-1.0, 1.0):
        yield Tube((-95, side * 36, -12, 15, 17), (22, side * 38, -8, 13, 16), -95, fat)
        yield Tube((-92, side * 50, -40, 17, 13), (-12, side * 45, -36, 8, 12), -95, fat)
        yield Tube((-108, side * 18, 28, 9, 7), (45, side * 51, -18, 7, 13), 58, muscle)
        yield Tube((-150, side * 19, -6, 4, 4), (50, side * 27, -4, 3.5, 3.5), 45 + body["contrast_hu"], blood)
        yield Tube((-150, side * 27, -4, 7, 6), (50, side * 33, -10, 5, 6), 45 + body["contrast_hu"], blood)
        if body["brown_fat"] > 0:
            yield Ellipsoid((side * 58, -38, -84), (14, 11, 9), None, body["brown_fat"])
        yield Ellipsoid((side * 17, 8, -72), (8, 9, 19), 95, 1.5)


def _spine() -> Iterator[Part]:
    """Vertebrae with arches and spinous processes, discs between them, and the canal with the cord."""
    z, pitch = 42.0, 17.5
    while z > -720:
        y = float(np.interp(z, _SPINE_Z, _SPINE_Y))
        growth = float(np.interp(-z, [0, 90, 450], [0.0, 0.25, 1.0]))
        half, depth = 11 + 13 * growth, 9 + 9 * growth
        yield Ellipsoid((0, y - depth - 9, z), (17 + 6 * growth, 13, pitch * 0.32), 420, 1.3)
        yield Ellipsoid((0, y - depth - 30, z - 4), (4, 15, pitch * 0.25), 420, 1.2)
        yield Tube((z - pitch / 2, 0, y, half - 1, depth - 1), (z + pitch / 2, 0, y, half - 1, depth - 1), 85, 0.9)
        yield Tube((z - pitch * 0.4, 0, y, half, depth), (z + pitch * 0.4, 0, y, half, depth), 330, 1.6)
        z -= pitch
        pitch = float(np.interp(-z, [0, 60, 90, 450], [17.5, 17.5, 21.0, 33.0]))
    for low, high in itertools.pairwise(_SPINE_Z):
        ends = []
        for height in (low, high):
            growth = float(np.interp(-height, [0, 90, 450], [0.0, 0.25, 1.0]))
            ends.append((height, 0.0, float(np.interp(height, _SPINE_Z, _SPINE_Y)) - 9 - 9 * growth - 9, 9.0, 7.5))
        yield Tube(ends[0], ends[1], 25, 1.5)


def _skull_and_brain(body: dict[str, float]) -> Iterator[Part]:
    brain = body["brain"]
    yield Ellipsoid((0, -8, 122), (70, 90, 66), 1000, 0.9)
    yield Ellipsoid((0, -8, 88), (67, 72, 30), 900, 0.9)
    yield Ellipsoid((0, -54, 80), (58, 43, 36), 900, 0.9)
    yield Ellipsoid((0, 10, 68), (58, 62, 11), 650, 1.0)
    yield from _mirrored(Ellipsoid((54, -22, 56), (13, 17, 18), 250, 1.0))
    yield from _mirrored(Ellipsoid((55, -22, 56), (8, 11, 12), -450, 0.4))
    yield Ellipsoid((0, -8, 126), (64, 84, 59), 36, brain, keep=(2, 72, 300))
    yield Ellipsoid((0, -6, 90), (61, 66, 26), 36, brain, keep=(2, 72, 300))
    yield Ellipsoid((0, -8, 124), (48, 66, 40), 30, 0.55 * brain, keep=(2, 78, 300))
    yield from _mirrored(Ellipsoid((17, 8, 112), (15, 20, 14), 40, 1.05 * brain))
    yield from _mirrored(Ellipsoid((11, -6, 126), (6, 32, 9), 6, 0.3 * brain))
    yield Ellipsoid((0, -54, 80), (50, 35, 28), 38, 0.85 * brain)
    yield Tube((42, 0, -37, 10, 9), (88, 0, -24, 14, 12), 34, 0.55 * brain)


def _face(body: dict[str, float]) -> Iterator[Part]:
    """Jaws, teeth, tongue, orbits, sinuses' walls."""
    arch = (1, 18.0, 200.0)
    for x in (-47.0, 47.0):
        yield Ellipsoid((x, 12, 28), (5, 15, 38), 900, 0.9)
        yield Ellipsoid((x * 1.07, 18, 22), (5, 15, 26), 58, 0.9)  # masseter
        yield Ellipsoid((x * 1.05, 50, 57), (8, 18, 6), 800, 0.8)  # cheek bone
    yield Tube((-14, 0, 18, 47, 64), (12, 0, 18, 50, 66), 950, 0.9, arch)
    yield Tube((-14, 0, 18, 37, 53), (12, 0, 18, 40, 55), 50, body["muscle"], arch)
    yield Tube((32, 0, 20, 42, 62), (46, 0, 20, 40, 62), 600, 0.8, arch)
    yield Tube((12, 0, 22, 41, 60), (32, 0, 22, 41, 60), 1700, 0.6, arch)
    yield Tube((12, 0, 22, 32, 50), (46, 0, 22, 32, 50), 50, body["muscle"], arch)
    yield Ellipsoid((0, 46, 34.5), (30, 28, 3.5), 500, 0.8)
    yield Ellipsoid((0, 42, 13), (25, 36, 19), 58, 1.3)  # tongue
    for x in (-32.0, 32.0):
        yield Ellipsoid((x, 64, 78), (21, 25, 20), 600, 0.8, keep=(1, 0, 80))
        yield Ellipsoid((x, 66, 78), (18, 23, 17), -80, 0.5)
        yield Ellipsoid((x * 0.9, 54, 78), (8, 12, 8), 45, 2.6)  # muscles of the eye
        yield Ellipsoid((x, 74, 78), (12, 12, 12), 12, 0.8)


def _airway() -> Iterator[Part]:
    """Nose, sinuses, pharynx, larynx, trachea."""
    air = -980.0
    for x in (-1.0, 1.0):
        yield Ellipsoid((x * 27, 52, 54), (14, 16, 14), air, 0.05)
        yield Ellipsoid((x * 9, 64, 50), (6, 34, 15), -700, 0.3)
        yield Ellipsoid((x * 8, 88, 100), (9, 5, 9), air, 0.1)
    yield Ellipsoid((0, 34, 70), (13, 12, 8), air, 0.1)
    yield Ellipsoid((0, 22, 47), (14, 11, 13), air, 0.1)
    yield Ellipsoid((0, 48, 30), (19, 24, 2.5), air, 0.2)
    yield Tube((12, 0, 8, 13, 7), (46, 0, 16, 12, 8), air, 0.1)
    yield Tube((-18, 0, 9, 14, 8), (12, 0, 8, 13, 7), air, 0.1)
    shell = (1, 4.0, 60.0)
    yield Tube((-24, 0, 12, 21, 23), (-19, 0, 12, 21, 23), 450, 0.9, (1, 10.0, 60.0))  # hyoid
    yield Tube((-24, 0, 12, 17, 19), (-19, 0, 12, 17, 19), 45, 1.0, (1, 10.0, 60.0))
    yield Tube((-62, 0, 10, 19, 21), (-34, 0, 10, 21, 24), 190, 1.0, shell)  # thyroid cartilage
    yield Tube((-62, 0, 10, 16, 18), (-34, 0, 10, 18, 21), 50, 1.2, shell)
    yield Tube((-44, 0, 12, 7, 10), (-18, 0, 9, 13, 8), air, 0.1)
    yield Tube((-56, 0, 11, 3.5, 9), (-44, 0, 12, 7, 10), air, 0.1)
    yield Tube((-66, 0, 9, 8.5, 9), (-56, 0, 11, 3.5, 9), air, 0.1)
    yield Tube((-185, 0, -26, 9, 9), (-66, 0, 9, 8.5, 9), air, 0.1)
    for x in (-1.0, 1.0):
        yield Ellipsoid((x * 16, -28, -198), (20, 9, 9), air, 0.1)


def _glands(body: dict[str, float]) -> Iterator[Part]:
    """Structures with physiological uptake: what makes a mere threshold on PET fail."""
    tonsil, gland = body["tonsil"], body["gland"]
    yield from _mirrored(Ellipsoid((19, 9, 10), (7, 9, 14), 52, tonsil))
    yield Ellipsoid((0, 24, -7), (14, 7, 9), 52, 0.9 * tonsil)
    yield Ellipsoid((0, 9, 53), (12, 5, 8), 50, 0.75 * tonsil)
    yield Ellipsoid((0, 21, 31), (13, 12, 4), 50, 0.7 * tonsil)
    yield from _mirrored(Ellipsoid((44, -3, 24), (9, 16, 20), -15, gland))
    yield from _mirrored(Ellipsoid((29, 30, -14), (10, 15, 10), 48, 1.1 * gland))
    yield from _mirrored(Ellipsoid((11, 52, 0), (5, 15, 5), 45, 1.2 * gland))
    yield from _mirrored(Ellipsoid((8, 12, -51), (4, 10, 4), 60, body["larynx"]))


# --- scanning ----------------------------------------------------------------------------------------------


def scan_patient(patient: Patient, seed: int, index: int, scale: str) -> Scan:
    """CT, PET and tumour mask of a patient.

    Args:
        patient: ``draw_patient(seed, index)``.
        seed: As of the patient; with ``index`` it also decides positioning and noise.
        index: As of the patient.
        scale: ``full`` (voxels and extents as the centres scan) or ``small`` (6 to 7 mm voxels, 0.3 m field of view).

    Raises:
        ValueError: If the scale is neither.
    """
    ct_grid, pet_grid = scan_grids(patient, _stream(seed, index, _STREAM_SCAN), scale)
    floor = min(_lowest_body_z(grid, patient.pose) for grid in (ct_grid, pet_grid))
    anatomy = build_anatomy({**patient.body, "contrast_hu": patient.centre.contrast_hu}, patient.lesions)
    parts = [part for part in anatomy if part.bounds()[1, 2] >= floor]  # most of the trunk is out of a neck scan
    small = scale == "small"
    noise_hu, ct_step = (5.0, 6) if small else (patient.centre.ct_noise_hu, 1)
    pet_slope = 0.04 if small else 0.002
    ct_hu = paint_ct(patient, parts, ct_grid, oversample=2 if small else 1)
    pet_suv = paint_pet(patient, parts, pet_grid, fwhm_mm=6.5)
    ct = _finish_ct(ct_hu, _stream(seed, index, _STREAM_CT), noise_hu, ct_step)
    pet = _finish_pet(pet_suv, _stream(seed, index, _STREAM_PET), pet_slope, noise=0.05 if small else 0.09)
    mask = paint_mask(patient, ct_grid, oversample=2 if small else 1)
    return Scan(ct.T, ct_grid, pet.T, pet_slope, pet_grid, mask.T)


def scan_grids(patient: Patient, rng: np.random.Generator, scale: str) -> tuple[Grid, Grid]:
    """CT and PET grid of a patient: each with its own voxels, extent and origin.

    In one patient of 25 the scan starts below the top of the head, so that the brain is cut.

    Raises:
        ValueError: If ``scale`` is not one of ``SCALES``.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}: give one of {', '.join(SCALES)}")
    centre, pose = patient.centre, patient.pose
    top = pose.to_world(np.array([[0.0, -8.0, 192.0]]))[0]
    middle = pose.to_world(np.array([[0.0, -22.0, 0.0]]))[0]
    above = float(rng.uniform(-45, -25)) if rng.random() < 0.04 else float(rng.uniform(8, 30))
    jitter = rng.uniform(-8, 8, size=(2, 3))
    if scale == "small":
        extents = (np.array([306.0, 286.0, 312.0]), np.array([318.0, 296.0, 306.0]))
        voxels = (centre.small_ct_mm, centre.small_pet_mm)
    else:
        width = centre.fov_mm + centre.pet_margin_mm
        extents = (
            np.array([centre.fov_mm, centre.fov_mm, centre.length_mm]),
            np.array([width, width, centre.length_mm + rng.uniform(-25, 25)]),
        )
        voxels = (centre.ct_mm, centre.pet_mm)
    grids = []
    for extent, voxel, shake in zip(extents, voxels, jitter, strict=True):
        counts = np.round(extent / np.array(voxel)).astype(int)
        reach = (counts - 1) * np.array(voxel) / 2
        right, front = middle[0] + reach[0] + shake[0], middle[1] + reach[1] + shake[1]
        bottom = top[2] + above + shake[2] / 2 - 2 * reach[2]
        origin = (round(float(right), 3), round(float(front), 3), round(float(bottom), 3))
        grids.append(Grid((int(counts[0]), int(counts[1]), int(counts[2])), voxel, origin))
    return grids[0], grids[1]


def paint_ct(patient: Patient, parts: list[Part], grid: Grid, oversample: int) -> Array:
    """Noise-free CT (Z, Y, X) in HU: air, table, body, tumours."""
    fine = grid.finer(oversample)
    volume = _air_and_table(fine, patient.pose)
    for part in parts:
        if part.hu is not None:
            _paint_part(volume, fine, patient.pose, part, part.hu)
    for lesion in patient.lesions:
        for box, inside, _, hu in _lesion_boxes(lesion, patient.pose, fine):
            np.copyto(volume[box], hu, where=inside)
    return _block_mean(volume, oversample)


def paint_pet(patient: Patient, parts: list[Part], grid: Grid, fwhm_mm: float) -> Array:
    """Noise-free PET (Z, Y, X) in SUV: true activity, then the scanner's Gaussian blur of ``fwhm_mm``."""
    oversample = 2 if sum(grid.spacing_mm) > 3 * 3.6 else 1  # fine voxels need none under the blur
    fine = grid.finer(oversample)
    volume = np.full(fine.shape[::-1], 0.01, dtype=np.float32)
    for part in parts:
        if part.suv is not None:
            _paint_part(volume, fine, patient.pose, part, part.suv)
    for lesion in patient.lesions:
        for box, inside, suv, _ in _lesion_boxes(lesion, patient.pose, fine):
            np.copyto(volume[box], suv, where=inside)
    sigma_mm = fwhm_mm / (2 * math.sqrt(2 * math.log(2)))
    sigma = [sigma_mm / size for size in fine.spacing_mm[::-1]]
    return _block_mean(ndimage.gaussian_filter(volume, sigma, truncate=3.0), oversample)


def paint_mask(patient: Patient, grid: Grid, oversample: int) -> NDArray[np.uint8]:
    """Tumour mask (Z, Y, X): a voxel is tumour where lesions fill at least half of it, of the kind that fills more."""
    fine = grid.finer(oversample)
    kind = np.zeros(fine.shape[::-1], dtype=np.uint8)
    for lesion in patient.lesions:
        for box, inside, _, _ in _lesion_boxes(lesion, patient.pose, fine):
            kind[box][inside] = lesion.label
    if oversample == 1:
        return kind
    primary, nodes = (_block_mean((kind == label).astype(np.float32), oversample) for label in (GTVP, GTVN))
    return np.where(primary + nodes >= 0.5, np.where(nodes > primary, GTVN, GTVP), 0).astype(np.uint8)


def _coordinates(
    grid: Grid, pose: Pose, corners: NDArray[np.float64]
) -> tuple[tuple[slice, slice, slice], tuple[Array, Array, Array]] | None:
    """Index box (Z, Y, X) around a body box and the body coordinates of its voxels; None if it is out of view."""
    low, high = corners
    body = np.array([[a, b, c] for a in (low[0], high[0]) for b in (low[1], high[1]) for c in (low[2], high[2])])
    world = pose.to_world(body)
    step = np.array([-grid.spacing_mm[0], -grid.spacing_mm[1], grid.spacing_mm[2]])
    index = (world - np.array(grid.origin_mm)) / step
    first = np.maximum(np.floor(index.min(axis=0)).astype(int), 0)
    last = np.minimum(np.ceil(index.max(axis=0)).astype(int), np.array(grid.shape) - 1)
    if np.any(last < first):
        return None
    axes = [np.arange(a, b + 1) * s + o for a, b, s, o in zip(first, last, step, grid.origin_mm, strict=True)]
    dx, dy, dz = (axis - start for axis, start in zip(axes, pose.shift, strict=True))
    x, y, z = (
        ((row[1] * dy)[None, :, None] + (row[2] * dz)[:, None, None]).astype(np.float32)
        + (row[0] * dx).astype(np.float32)[None, None, :]
        for row in pose.to_body_matrix()
    )
    box = tuple(slice(int(a), int(b) + 1) for a, b in zip(first[::-1], last[::-1], strict=True))
    return (box[0], box[1], box[2]), (x, y, z)


def _lowest_body_z(grid: Grid, pose: Pose) -> float:
    """Lowest body z that a grid shows."""
    ends = np.array([[-0.5, count - 0.5] for count in grid.shape])
    corners = np.array([[a, b, c, 1] for a in ends[0] for b in ends[1] for c in ends[2]]) @ grid.affine.T
    return float(((corners[:, :3] - pose.shift) @ pose.to_body_matrix().T)[:, 2].min())


def _paint_part(volume: Array, grid: Grid, pose: Pose, part: Part, value: float) -> None:
    found = _coordinates(grid, pose, part.bounds())
    if found is not None:
        box, (x, y, z) = found
        np.copyto(volume[box], np.float32(value), where=part.contains(x, y, z))


def _lesion_boxes(
    lesion: Lesion, pose: Pose, grid: Grid
) -> Iterator[tuple[tuple[slice, slice, slice], NDArray[np.bool_], Array, Array]]:
    """Index box, inside, SUV and HU of a lesion; nothing if it is out of view."""
    found = _coordinates(grid, pose, lesion.bounds())
    if found is not None:
        box, (x, y, z) = found
        radius, suv, hu = lesion.fields(x, y, z)
        yield box, radius <= 1, suv, hu


def _air_and_table(grid: Grid, pose: Pose) -> Array:
    """CT (Z, Y, X) before the patient: air, a table (foam in a shell) under the back, a head rest. World-aligned."""
    head, *back = pose.to_world(np.array([[0.0, -103.0, 122.0], [0.0, -104.0, -110.0], [0.0, -122.0, -150.0]]))
    top = min(float(point[1]) for point in (head, *back)) - 6.0
    x, y, z = (
        start + sign * size * np.arange(count)
        for start, sign, size, count in zip(grid.origin_mm, (-1, -1, 1), grid.spacing_mm, grid.shape, strict=True)
    )
    x = x - pose.shift[0]
    depth = top + 14.0 * (x / 200.0)[None, :] ** 2 - y[:, None]  # a shallow trough
    within = (np.abs(x) < 205)[None, :]
    slice_hu = np.where((depth > 0) & (depth < 34) & within, -880.0, -1000.0)
    slice_hu[((np.abs(depth - 3) < 3) | (np.abs(depth - 31) < 3)) & within] = -150.0
    volume = np.repeat(slice_hu.astype(np.float32)[None], len(z), axis=0)
    cushion = (np.abs(x) < 85)[None, :] & (depth <= 0) & (y[:, None] < head[1] + 12 + (x / 18.0)[None, :] ** 2)
    rest = np.where(cushion, np.float32(-820.0), volume[0])
    volume[np.abs(z - head[2]) < 75] = rest
    return volume


def _block_mean(volume: Array, factor: int) -> Array:
    """Mean over blocks of ``factor`` voxels along each axis."""
    if factor == 1:
        return volume
    for axis in range(3):
        shape = (*volume.shape[:axis], volume.shape[axis] // factor, factor, *volume.shape[axis + 1 :])
        volume = volume.reshape(shape).mean(axis=axis + 1, dtype=np.float32)
    return volume


def _finish_ct(volume: Array, rng: np.random.Generator, noise_hu: float, step: int) -> NDArray[np.int16]:
    """CT with grainy noise as int16, in steps of ``step`` HU from -1000 on.

    One slab of noise serves the whole volume, each slice with its own shift: much faster than fresh noise.
    """
    slab = ndimage.gaussian_filter(
        rng.standard_normal((16, *volume.shape[1:]), dtype=np.float32), (0, 0.6, 0.6), mode="wrap"
    )
    slab *= noise_hu / slab.std()
    shifts = rng.integers(0, volume.shape[1:], size=(len(volume), 2))
    result = np.empty(volume.shape, dtype=np.int16)
    for number, (image, shift) in enumerate(zip(volume, shifts, strict=True)):
        noisy = image + np.roll(slab[number % 16], shift, axis=(0, 1))
        result[number] = np.rint(np.maximum(noisy + 1000, 0) / step) * step - 1000
    return result


def _finish_pet(volume: Array, rng: np.random.Generator, slope: float, noise: float) -> NDArray[np.int16]:
    """PET with noise that grows with the square root of uptake, clipped at 0, in steps of ``slope`` SUV."""
    grain = ndimage.gaussian_filter(rng.standard_normal(volume.shape, dtype=np.float32), 0.5)
    grain *= noise / grain.std()
    noisy = volume + grain * np.sqrt(volume)
    return np.rint(np.maximum(noisy, 0) / slope).astype(np.int16)
