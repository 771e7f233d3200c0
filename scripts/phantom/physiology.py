"""Build, pose and the uptake of normal tissue: what differs between patients besides their tumours."""

from __future__ import annotations

import math

import numpy as np

from .shapes import Pose, clipped_lognormal, rotation

SIDES = ("right", "left")


def draw_pose(rng: np.random.Generator, male: bool) -> Pose:
    """Size and position: some degrees and millimetres, and any table position along z."""
    size = rng.normal(1.0 if male else 0.94, 0.03)
    scale = np.clip(size * rng.normal(1.0, 0.02, size=3), 0.84, 1.10)
    angles = np.deg2rad(np.clip(rng.normal(0.0, [3.5, 2.5, 4.0]), -9, 9))
    shift = np.array([rng.normal(0, 6), rng.normal(0, 6), rng.uniform(-900, 300)])
    return Pose(rotation(angles), scale, shift)


def draw_fillings(rng: np.random.Generator) -> tuple[float, ...]:
    """Angles on the dental arch (radians, 0 right, pi left) of fillings of metal; four patients in ten have some."""
    if rng.random() >= 0.4:
        return ()
    return tuple(float(angle) for angle in rng.uniform(0.15, math.pi - 0.15, size=int(rng.integers(1, 6))))


def draw_body(rng: np.random.Generator, male: bool) -> dict[str, float]:
    """Build and uptake (SUV) of normal tissue by name; 0 for what a patient has not.

    Tissues in pairs have a value for each side, ``_right`` and ``_left``. Sources of uptake that mislead: the rings of
    lymphatic tissue, glands, muscles that worked after the injection, vocal cords after speaking, or a single one where
    the other is paralysed, brown fat, inflamed gums, a diffusely active thyroid, reflux in the oesophagus, marrow under
    growth factors, the vein of the injection.
    """
    body = {
        "fat_mm": float(np.clip(rng.normal(7, 3), 2.5, 15)),
        "arms_up": float(rng.random() < 0.10),
        "brain": clipped_lognormal(rng, 9.3, 0.25, 5.0, 15.0),
        "muscle": float(np.clip(rng.normal(0.8, 0.12), 0.5, 1.2)),
        "blood": float(np.clip(rng.normal(1.7, 0.3), 1.0, 2.6)),
        "lingual_tonsil": clipped_lognormal(rng, 3.2, 0.35, 1.5, 8.0),
        "adenoid": clipped_lognormal(rng, 2.6, 0.35, 1.2, 7.0),
        "palate": clipped_lognormal(rng, 2.6, 0.3, 1.2, 6.0),
        "sublingual": clipped_lognormal(rng, 2.7, 0.3, 1.3, 6.0),
        "longus_colli": float(rng.uniform(1.8, 4.0)) if rng.random() < 0.08 else 0.0,
        "thyroid": float(rng.uniform(2.5, 9.0)) if rng.random() < 0.05 else 1.4,
        "oesophagus": clipped_lognormal(rng, 1.8, 0.3, 1.0, 5.0),
        "marrow": float(rng.uniform(3.5, 8.0)) if rng.random() < 0.03 else clipped_lognormal(rng, 1.6, 0.2, 1.0, 2.6),
        "heart": clipped_lognormal(rng, 3.5, 0.6, 1.5, 16.0),
        "bladder": float(rng.uniform(8, 30)),
    }
    body |= _sided(rng, "tonsil", clipped_lognormal(rng, 3.8, 0.35, 1.8, 9.0), 0.12)
    body |= _sided(rng, "parotid", clipped_lognormal(rng, 2.2, 0.28, 1.1, 5.0), 0.08)
    body |= _sided(rng, "submandibular", clipped_lognormal(rng, 2.5, 0.28, 1.2, 5.5), 0.08)
    spoke, palsy = rng.random() < 0.20, rng.random() < 0.04
    body |= _sided(
        rng, "larynx", float(rng.uniform(3.0, 7.0)) if spoke else clipped_lognormal(rng, 2.0, 0.25, 1.1, 3.5), 0.1
    )
    if palsy:
        body["larynx_" + SIDES[int(rng.integers(2))]] = 1.0
    for name, share in (("sternomastoid", 0.10), ("masseter", 0.06)):
        tense = float(rng.uniform(1.5, 4.0)) if rng.random() < share else 0.0
        body |= {key: max(value, body["muscle"]) for key, value in _sided(rng, name, tense, 0.5).items()}
    brown = float(rng.uniform(2.5, 11)) if rng.random() < (0.04 if male else 0.10) else 0.0
    body |= _sided(rng, "brown_fat", brown, 0.15)
    for number in (1, 2):
        inflamed = rng.random() < 0.15
        body[f"gum_{number}"] = float(rng.uniform(2.5, 7.0)) if inflamed else 0.0
        body[f"gum_{number}_angle"] = float(rng.uniform(0.15, math.pi - 0.15))
    return body | _draw_injection(rng)


def _draw_injection(rng: np.random.Generator) -> dict[str, float]:
    """Activity left at the injection and in the vein above it, both in one arm."""
    left_behind = rng.random()
    return {
        "injection_side": 1.0 if rng.random() < 0.5 else -1.0,
        "injection_z": float(rng.uniform(-560, -400)),
        "injection": math.exp(rng.uniform(math.log(8), math.log(120))) if left_behind < 0.25 else 0.0,
        "vein": float(rng.uniform(3, 20)) if left_behind < 0.08 else 0.0,
    }


def _sided(rng: np.random.Generator, name: str, value: float, spread: float) -> dict[str, float]:
    """A value for either side, apart by a factor of that spread (SD of its logarithm)."""
    factor = math.exp(rng.normal(0.0, spread) / 2)
    return {f"{name}_right": value * factor, f"{name}_left": value / factor}
