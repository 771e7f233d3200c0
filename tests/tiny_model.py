"""Weights of a small ensemble that was never trained, with all that a finished one stores beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.ensemble import empty_ensemble
from scripts.evaluation.survival import FoldScale, fit_calibration
from scripts.model.ensemble import save_weights

SETTINGS: dict[str, Any] = {
    "tasks": ["seg", "hpv", "surv"],
    "clinical_features": ["age", "gender", "m_stage"],
    "survival_inputs": ["burden"],
    "hpv_inputs": ["image", "clinical"],
    "roi_size": [32, 32, 32],
    "spacing_mm": 8.0,
    "ct_window": [-1000, 1000],
    "pet_window": None,
    "bn_eps": 1e-05,
}
TRAINED_ON = "nothing: random weights"


def write_model(
    folder: Path, folds: int = 2, seed: int = 0, hpv_threshold: float | None = 0.4, **settings: Any
) -> Path:
    """Write ``model.pt``; the result is its folder."""
    torch.manual_seed(seed)
    model = empty_ensemble({**SETTINGS, **settings})
    model.resize(folds)
    for fold in model.folds[1:]:  # folds that disagree
        for parameter in fold.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=200)
    relapse, censored = rng.exponential(1500 * np.exp(-risk)), rng.uniform(300, 3000, 200)
    scales = [FoldScale.of(rng.normal(size=50)) for _ in range(folds)]
    calibration = fit_calibration(risk, np.minimum(relapse, censored), relapse <= censored, scales)
    threshold = {"value": hpv_threshold} if hpv_threshold is not None else {"value": None, "reason": "one class only"}
    model.provenance = {"trained_on": TRAINED_ON, "hpv_threshold": threshold, "calibration": calibration.to_dict()}
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / "model.pt")
    return folder
