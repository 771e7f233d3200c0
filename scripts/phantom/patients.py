"""Patients: hospital, build, clinical values, what the records lack, and what became of them.

Outcome (time to relapse ``T`` in days, proportional hazards on a Weibull baseline with shape ``k`` and scale ``s``)::

    log_hazard = 1.3 ln(volume_ml / 25) + 0.12 (suv_mean - 8) + 0.9 [HPV negative] + 0.5 performance_status + 1.2 [M1]
    T = s (E / exp(log_hazard)) ** (1 / k),  E ~ Exp(1)

with the patient's true values, whether or not the cohort's CSV shows them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .physiology import draw_body, draw_fillings, draw_pose
from .scanners import CENTRES, Centre, Scanner, draw_scanner
from .shapes import Pose
from .tumours import Lesion, draw_lesions, measure_lesions

HAZARD_WEIGHTS = {"log_volume": 1.3, "suv_mean": 0.12, "hpv_negative": 0.9, "performance_status": 0.5, "m1": 1.2}
REFERENCE_VOLUME_ML, REFERENCE_SUV = 25.0, 8.0
WEIBULL_SHAPE, WEIBULL_SCALE_DAYS = 0.9, 50_000.0
FOLLOW_UP_MEDIAN_DAYS, FOLLOW_UP_SPREAD = 1500.0, 0.55
SHORTEST_DAYS, LONGEST_DAYS = 7, 5888  # range of RFS in HECKTOR 2025
COHORT_IDS = 10_000  # numbers kept for each seed: phantoms of two cohorts are not taken for the same patient
# Streams of random numbers of a case: one purpose cannot shift the numbers of another.
STREAM_POSE, STREAM_LESIONS, STREAM_CLINICAL, STREAM_OUTCOME, STREAM_SCAN, STREAM_CT, STREAM_PET, STREAM_SEX = range(8)
STREAM_SCANNER, STREAM_BODY, STREAM_TEETH = range(8, 11)
# Quantities spread evenly over the cases (see _spread), each with a square root that no other can be built from.
_EVEN = {
    name: math.sqrt(prime) % 1.0
    for name, prime in {"centre": 2, "hpv": 3, "mask": 5, "hpv_known": 7, "rfs": 11, "habits": 13, "ps": 17}.items()
}


@dataclass(frozen=True)
class Patient:
    """A phantom patient: the truth, and which of it the records show.

    Attributes:
        patient_id, centre: Identity.
        age, male, tobacco, alcohol, chemotherapy, performance_status, m1, hpv: True clinical values.
        missing: Names of the CSV columns that are left empty (``M-stage`` reads ``Mx``); ``mask`` = no mask is written.
        pose, body: Position; build and uptake of the tissues by name, with ``contrast_hu`` of the scanner.
        fillings: Angles on the dental arch of fillings of metal.
        scanner: How the patient is scanned.
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
    fillings: tuple[float, ...]
    scanner: Scanner
    lesions: tuple[Lesion, ...]
    gtvp_ml: float
    gtvn_ml: float
    suv_mean: float
    suv_max: float
    log_hazard: float
    rfs_days: int
    relapse: bool


def draw_patient(seed: int, index: int) -> Patient:
    """Patient number ``index`` (from 0) of the cohort ``seed``; depends on nothing else."""
    centre = _pick_centre(_spread(seed, index, "centre"))
    hpv = _spread(seed, index, "hpv") < centre.hpv_share
    male = stream(seed, index, STREAM_SEX).random() < (0.86 if hpv else 0.76)
    pose = draw_pose(stream(seed, index, STREAM_POSE), male)
    scanner = draw_scanner(stream(seed, index, STREAM_SCANNER), centre)
    lesions = draw_lesions(stream(seed, index, STREAM_LESIONS), hpv, scanner.contrast_hu)
    sizes = measure_lesions(lesions, pose)
    volume_ml = sizes["gtvp_ml"] + sizes["gtvn_ml"]
    clinical = _draw_clinical(stream(seed, index, STREAM_CLINICAL), centre, hpv, volume_ml)
    status, m1 = int(clinical["performance_status"]), bool(clinical["m1"])
    hazard = log_hazard(volume_ml, sizes["suv_mean"], hpv, status, m1)
    days, relapse = _draw_outcome(stream(seed, index, STREAM_OUTCOME), hazard)
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
        body={**draw_body(stream(seed, index, STREAM_BODY), male), "contrast_hu": scanner.contrast_hu},
        fillings=draw_fillings(stream(seed, index, STREAM_TEETH)),
        scanner=scanner,
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


def stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    """Random numbers of one case for one purpose."""
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
