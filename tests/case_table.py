"""A table of cases as ``evaluating`` writes it, made up from a seed."""

from __future__ import annotations

import numpy as np
import pandas as pd


def table(n: int = 60, seed: int = 0) -> pd.DataFrame:
    """``n`` patients of two centres, eight of them in the second."""
    rng = np.random.default_rng(seed)
    log_hazard = rng.normal(size=n)
    time = rng.exponential(1000 * np.exp(-log_hazard))
    hpv = rng.integers(0, 2, n).astype(float)
    cases = pd.DataFrame(
        {
            "log_hazard": log_hazard,
            "time": time,
            "event": (rng.random(n) < 0.5).astype(float),
            "hpv": hpv,
            "hpv_prob": np.clip(hpv * 0.3 + rng.random(n) * 0.7, 0, 1),
            "dice": rng.random(n),
            "volume_ml": 20 + rng.random(n),
            "true_volume_ml": 20 + rng.random(n),
            "surface_distance_mm": rng.gamma(2, 2, n),
            "true_lesions": rng.integers(1, 4, n),
            "found_lesions": rng.integers(0, 2, n),
            "true_primaries": 1,
            "found_primaries": rng.integers(0, 2, n),
            "true_nodes": rng.integers(0, 3, n) * 2,
            "found_nodes": rng.integers(0, 2, n),
            "false_lesions": rng.integers(0, 3, n),
            "centre": np.where(np.arange(n) < n - 8, "MDA", "USZ"),
        }
    )
    for of in ("lesions", "primaries", "nodes"):
        cases[f"predicted_{of}"] = cases[f"true_{of}"] + rng.integers(0, 2, n)
        cases[f"matched_{of}"] = (cases[f"true_{of}"] - rng.integers(0, 2, n)).clip(lower=0)
    for ending in ("gtvp", "gtvn"):
        cases[f"dice_{ending}"] = rng.random(n)
        cases[f"volume_ml_{ending}"], cases[f"true_volume_ml_{ending}"] = 10 + rng.random(n), 10 + rng.random(n)
    return cases
