"""Patients with a known hazard, for the tests of survival."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from sksurv.util import Surv

from scripts.evaluation.survival import (
    DAYS_PER_YEAR,
    HORIZON_YEARS,
    Calibration,
    Outcomes,
    fit_calibration,
)

HORIZON_DAYS = np.array(HORIZON_YEARS) * DAYS_PER_YEAR
RATE = 1 / 2500  # relapses a day at log hazard 0


def simulate(
    patients: int, seed: int = 0, slope: float = 0.8, censor_days: float = 4000.0, whole_days: bool = True
) -> tuple[np.ndarray, Outcomes]:
    """Log hazards z, and exponential times with hazard RATE * exp(slope * z), censored evenly until ``censor_days``."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=patients)
    relapse = rng.exponential(1 / (RATE * np.exp(slope * risk)))
    censored = rng.uniform(100, censor_days, patients)
    time = np.minimum(relapse, censored)
    # Single precision, as a label has by the time it is evaluated; whole days have ties.
    time = np.ceil(time) if whole_days else time.astype(np.float32).astype(float)
    return risk, Outcomes(time, relapse <= censored)


def fitted(patients: int = 400, seed: int = 0, **options: Any) -> tuple[Calibration, np.ndarray, Outcomes]:
    risk, outcomes = simulate(patients, seed, **options)
    return fit_calibration(risk, outcomes.time, outcomes.event), risk, outcomes


def structured(outcomes: Outcomes) -> np.ndarray:
    return Surv.from_arrays(outcomes.event, outcomes.time)


def cases(risk: np.ndarray, outcomes: Outcomes) -> pd.DataFrame:
    names = [f"P{k:03d}" for k in range(len(risk))]
    return pd.DataFrame({"PatientID": names, "time": outcomes.time, "event": outcomes.event, "log_hazard": risk})
