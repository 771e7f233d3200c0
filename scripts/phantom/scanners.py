"""Hospitals and how each of their patients is scanned: voxels, resolution, noise, contrast medium.

The ranges are those of published scanners: an intrinsic resolution of 3.5 to 4.5 mm where time of flight and the point
spread function are modelled (Biograph mCT, Discovery 690), 4.8 to 6 mm for older scanners (Discovery ST, STE and RX,
Gemini GXL), a post-filter of 2 to 6.5 mm; voxel sizes as in HECKTOR.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .shapes import Vector


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
        ct_noise_hu: Median noise SD of CT at scale ``full``.
        pet_mm_fwhm: Range of the PET scanners' intrinsic resolution, before the post-filter.
        contrast_share: Share of patients with contrast medium.
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
    pet_mm_fwhm: tuple[float, float]
    contrast_share: float
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
           16, (4.8, 5.6), 0.90, 0.62, 0.80, 0.10, 0.25, 0.05, 0.55, 0.55),
    Centre("CHUP", 2, 0.09, (1.37, 1.37, 3.0), (2.73, 2.73, 3.27), 548, 20, 900, (6.8, 6.8, 6.6), (6.2, 6.2, 6.6),
           12, (3.5, 4.5), 0.10, 0.50, 0.70, 0.12, 0.45, 0.10, 0.20, 0.35),
    Centre("CHUS", 3, 0.13, (1.17, 1.17, 3.0), (4.0, 4.0, 4.0), 600, -30, 340, (6.6, 6.6, 6.4), (6.9, 6.9, 6.8),
           14, (4.8, 6.0), 0.10, 0.60, 0.85, 0.12, 0.30, 0.05, 0.75, 0.70),
    Centre("MDA", 5, 0.44, (0.98, 0.98, 3.27), (5.47, 5.47, 3.27), 500, 100, 330, (6.5, 6.5, 6.5), (6.5, 6.5, 6.5),
           13, (4.0, 6.0), 0.85, 0.72, 0.75, 0.14, 0.12, 0.08, 0.15, 0.20),
    Centre("HGJ", 6, 0.11, (0.98, 0.98, 3.27), (3.52, 3.52, 3.27), 500, 60, 300, (6.4, 6.4, 6.6), (6.7, 6.7, 6.6),
           12, (5.0, 6.0), 0.15, 0.60, 0.88, 0.08, 0.35, 0.06, 0.40, 0.60),
    Centre("HMR", 7, 0.06, (0.49, 0.49, 2.0), (3.52, 3.52, 3.27), 250, 300, 290, (6.2, 6.2, 6.4), (6.7, 6.7, 6.8),
           20, (4.8, 5.6), 0.90, 0.55, 0.85, 0.10, 0.35, 0.05, 0.50, 0.50),
    Centre("USZ", 8, 0.06, (2.73, 2.73, 3.0), (0.98, 0.98, 2.5), 546, -290, 820, (7.0, 7.0, 6.8), (6.4, 6.4, 6.6),
           10, (3.8, 5.5), 0.15, 0.55, 0.80, 0.10, 0.30, 0.06, 0.30, 0.70),
)
# fmt: on


@dataclass(frozen=True)
class Scanner:
    """How one patient is scanned."""

    psf_fwhm_mm: float  # resolution of the PET image: the scanner's own and the post-filter's, in quadrature
    pet_noise: float  # SD of the PET at SUV 1, in SUV, before the mean over a voxel; grows with the root of the uptake
    grain_fwhm_mm: float  # distance over which that noise is correlated
    air_suv: float  # mean of the noise in air, which a reconstruction without negative values leaves
    ct_noise_hu: float  # noise SD of CT at scale "full"
    contrast_hu: float  # enhancement of vessels; 0 without contrast medium


def draw_scanner(rng: np.random.Generator, centre: Centre) -> Scanner:
    """Resolution and noise of a scan: by the centre's scanners, and by the patient's weight, dose and time a bed."""
    intrinsic, post_filter = float(rng.uniform(*centre.pet_mm_fwhm)), float(rng.uniform(2.0, 6.5))
    grain = math.hypot(post_filter, 3.0)  # the reconstruction correlates neighbours without any filter
    counts = 0.11 * math.exp(rng.normal(0.0, 0.35))
    contrast = float(np.clip(rng.normal(100, 30), 40, 180)) if rng.random() < centre.contrast_share else 0.0
    return Scanner(
        psf_fwhm_mm=math.hypot(intrinsic, post_filter),
        pet_noise=float(np.clip(counts * (6.0 / grain) ** 1.5, 0.04, 0.35)),
        grain_fwhm_mm=grain,
        air_suv=math.exp(rng.uniform(math.log(0.003), math.log(0.03))),
        ct_noise_hu=float(np.clip(centre.ct_noise_hu * math.exp(rng.normal(0.0, 0.25)), 6, 40)),
        contrast_hu=contrast,
    )
